//! Copies between a process and its host streams, with back-pressure: nothing is read before what
//! was read earlier has been written.

use crate::transport::Endpoint;
use std::io;
use std::sync::Arc;
use std::time::Duration;

/// Most bytes that are under way in one direction, equal to a pipe's default capacity. The buffer
/// only exists while there is something to copy, and only its used pages are ever touched.
const CHUNK: usize = 64 * 1024;

/// How long the host may take to close a stream that the agent has ended.
const LINGER: Duration = Duration::from_secs(60);

/// Copies what the host sends to the process until the host ends its input or the process no
/// longer reads. A pipe is then closed; a terminal stays as it is, since an end of input is a
/// character there that only its user can type.
pub async fn copy_input(host: Endpoint, process: Arc<Endpoint>) {
    // An error means that the reader is gone, which dropping both ends tells the host.
    let _ = copy(&host, &process).await;
}

/// Copies what the process writes to the host until every writer has closed its end, then ends the
/// stream. Without a host stream the output is thrown away.
pub async fn copy_output(process: Arc<Endpoint>, host: Option<Endpoint>) {
    let Some(host) = host else {
        let _ = discard(&process).await;
        return;
    };
    // An error in writing means that the host no longer listens: dropping the pipe tells the
    // process so by SIGPIPE.
    if copy(&process, &host).await.is_ok() && host.shut_down_write().is_ok() {
        // Closing at once could overtake what is still on its way to the host.
        let _ = tokio::time::timeout(LINGER, discard(&host)).await;
    }
}

/// Copies until `from` has come to its end, then ends `to` in this direction.
pub async fn copy_until_end(from: &Endpoint, to: &Endpoint) -> io::Result<()> {
    copy(from, to).await?;
    to.shut_down_write()
}

async fn copy(from: &Endpoint, to: &Endpoint) -> io::Result<()> {
    loop {
        from.readable().await?;
        let mut buffer = Vec::with_capacity(CHUNK);
        while let Some(count) = from.try_read(&mut buffer)? {
            if count == 0 {
                return Ok(());
            }
            to.write_all(&buffer).await?;
            buffer.clear();
        }
    }
}

async fn discard(from: &Endpoint) -> io::Result<()> {
    loop {
        from.readable().await?;
        let mut buffer = Vec::with_capacity(CHUNK);
        while let Some(count) = from.try_read(&mut buffer)? {
            if count == 0 {
                return Ok(());
            }
            buffer.clear();
        }
    }
}
