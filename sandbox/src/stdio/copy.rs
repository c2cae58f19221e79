//! Copying between the host's ends and the guest's streams.

use super::Sink;
use super::logger::Logger;
use crate::pace::Pace;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::pipe;
use tokio::sync::Notify;
use tokio::task::{AbortHandle, JoinHandle};

/// Bytes copied at once.
const CHUNK: usize = 32 * 1024;

/// How often progress is looked for.
const POLL: Duration = Duration::from_millis(50);

/// Our write end of the stdin FIFO. While it's held, input doesn't end.
#[derive(Debug)]
pub(crate) struct StdinKeeper {
    _write_end: OwnedFd,
}

impl StdinKeeper {
    pub(super) fn new(write_end: OwnedFd) -> Self {
        Self {
            _write_end: write_end,
        }
    }
}

/// The copying of one process's streams.
pub(crate) struct Copies {
    keeper: Option<StdinKeeper>,
    input: Option<AbortHandle>,
    outputs: Vec<JoinHandle<()>>,
    logger: Option<Logger>,
    progress: Progress,
    pace: Pace,
}

/// How the copying of one process's output goes. Clones watch the same.
#[derive(Clone, Default)]
pub(crate) struct Progress(Arc<Counters>);

#[derive(Default)]
struct Counters {
    /// Grows whenever bytes move.
    moved: AtomicU64,
    /// Streams that haven't ended.
    open: AtomicUsize,
    ended: Notify,
}

/// Counts a stream as open for as long as it lives.
struct OpenStream(Progress);

impl OpenStream {
    fn new(progress: &Progress) -> Self {
        progress.0.open.fetch_add(1, Ordering::Relaxed);
        Self(progress.clone())
    }
}

impl Drop for OpenStream {
    fn drop(&mut self) {
        self.0.0.open.fetch_sub(1, Ordering::Relaxed);
        self.0.0.ended.notify_one();
    }
}

impl Progress {
    fn advance(&self) {
        self.0.moved.fetch_add(1, Ordering::Relaxed);
    }

    /// Waits until all streams have ended (true), or nothing has moved for `stall` (false): a
    /// stream stays open as long as any process holds it, and a reader may never come.
    pub async fn settle(&self, stall: Duration) -> bool {
        let mut quiet = Duration::ZERO;
        let mut before = self.0.moved.load(Ordering::Relaxed);
        while self.0.open.load(Ordering::Relaxed) > 0 {
            if quiet >= stall {
                return false;
            }
            tokio::select! {
                () = self.0.ended.notified() => {}
                () = tokio::time::sleep(POLL) => quiet += POLL,
            }
            let now = self.0.moved.load(Ordering::Relaxed);
            if now != before {
                quiet = Duration::ZERO;
            }
            before = now;
        }
        true
    }
}

impl Copies {
    pub(super) fn new(pace: Pace) -> Self {
        Self {
            keeper: None,
            input: None,
            outputs: Vec::new(),
            logger: None,
            progress: Progress::default(),
            pace,
        }
    }

    /// The outputs' progress.
    pub fn progress(&self) -> Progress {
        self.progress.clone()
    }

    pub(super) fn input(
        &mut self,
        source: pipe::Receiver,
        keeper: StdinKeeper,
        stream: UnixStream,
    ) {
        self.keeper = Some(keeper);
        self.input = Some(tokio::spawn(copy_in(source, stream)).abort_handle());
    }

    pub(super) fn output(&mut self, stream: UnixStream, sink: Sink) {
        let open = OpenStream::new(&self.progress);
        self.outputs
            .push(tokio::spawn(copy_out(stream, sink, open)));
    }

    pub(super) fn logger(&mut self, logger: Option<Logger>) {
        self.logger = logger;
    }

    /// Ends the process's input once what the client has written is read. Idempotent.
    pub fn close_stdin(&mut self) {
        self.keeper = None;
    }

    /// After the process's end: stops its input and moves the rest of its output, as long as any
    /// moves.
    pub async fn drain(mut self) {
        self.keeper = None;
        if let Some(input) = self.input.take() {
            input.abort();
        }
        let stall = self.pace.drain_stall();
        if !self.progress.settle(stall).await {
            tracing::warn!(
                ?stall,
                "output stands still after the process's end; giving up on it"
            );
        }
        for output in &mut self.outputs {
            output.abort();
            // Its write end is closed only once the task is gone.
            let _ = output.await;
        }
        if let Some(logger) = self.logger.take() {
            logger.finish().await;
        }
    }
}

impl Drop for Copies {
    fn drop(&mut self) {
        // Not drained: the process was never created.
        for output in &self.outputs {
            output.abort();
        }
        if let Some(input) = &self.input {
            input.abort();
        }
        if let Some(logger) = self.logger.take() {
            tokio::spawn(logger.finish());
        }
    }
}

/// Client to process; the end of input closes our side of the stream only.
async fn copy_in(mut source: pipe::Receiver, mut stream: UnixStream) {
    let mut chunk = vec![0; CHUNK];
    loop {
        let length = match source.read(&mut chunk).await {
            Ok(0) => break,
            Ok(length) => length,
            Err(error) => {
                tracing::warn!(%error, "reading stdin failed");
                break;
            }
        };
        if let Err(error) = stream.write_all(&chunk[..length]).await {
            tracing::debug!(%error, "the process's stdin is closed");
            return;
        }
    }
    if let Err(error) = stream.shutdown().await {
        tracing::debug!(%error, "the process's stdin is closed");
    }
    // Dropping the stream would close the other direction too, which the VMM may take for a reset
    // of what is still on its way. It ends when the process does.
    std::future::pending::<()>().await;
}

/// Process to client. When the client's end fails, output is thrown away: a process must not
/// stand still because its log can't be written.
async fn copy_out(mut stream: UnixStream, sink: Sink, open: OpenStream) {
    let progress = &open.0;
    let mut chunk = vec![0; CHUNK];
    let mut sink = Some(sink);
    let mut total = 0u64;
    loop {
        let length = match stream.read(&mut chunk).await {
            Ok(0) => {
                tracing::debug!(total, "an output stream has ended");
                return;
            }
            Ok(length) => length,
            Err(error) => {
                tracing::debug!(%error, "an output stream broke");
                return;
            }
        };
        if let Some(target) = &mut sink
            && let Err(error) = write_all(target, &chunk[..length], progress).await
        {
            tracing::warn!(%error, "writing output failed; the rest is thrown away");
            sink = None;
        }
        total = total.saturating_add(length as u64);
        progress.advance();
    }
}

async fn write_all(sink: &mut Sink, mut bytes: &[u8], progress: &Progress) -> io::Result<()> {
    match sink {
        Sink::Pipe { writer, .. } => {
            while !bytes.is_empty() {
                let written = writer.write(bytes).await?;
                bytes = &bytes[written..];
                progress.advance();
            }
            Ok(())
        }
        Sink::File(file) => {
            let mut file = file.try_clone()?;
            let bytes = bytes.to_vec();
            tokio::task::spawn_blocking(move || file.write_all(&bytes)).await?
        }
    }
}
