//! Asking a VMM on its control socket.

use crate::folder::{RuntimeFolder, short_path};
use bulkhead_proto::vmm::{MAX_CONTROL_LINE, Request, Response};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use std::fs::File;
use std::io::{self, BufRead, BufReader, IoSlice, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

/// [`ask`] on a thread that may block.
///
/// # Errors
/// Those of [`ask`].
pub(crate) async fn ask_later(
    folder: &Arc<RuntimeFolder>,
    request: Request,
    files: Vec<File>,
    limit: Duration,
) -> io::Result<Response> {
    let folder = Arc::clone(folder);
    tokio::task::spawn_blocking(move || ask(&folder, &request, &files, limit))
        .await
        .unwrap_or_else(|error| Err(io::Error::other(error)))
}

/// Sends the VMM whose sockets are in `folder` one request, with descriptors of `files`, and reads
/// its answer; each step within `limit`. Blocks.
///
/// # Errors
/// When it can't be reached, doesn't answer in time, or not as the contract says.
pub(crate) fn ask(
    folder: &RuntimeFolder,
    request: &Request,
    files: &[File],
    limit: Duration,
) -> io::Result<Response> {
    let opened = folder.open()?;
    let mut stream = UnixStream::connect(short_path(&opened, "control.sock"))?;
    stream.set_read_timeout(Some(limit))?;
    stream.set_write_timeout(Some(limit))?;
    let mut line = serde_json::to_vec(request)?;
    line.push(b'\n');
    let fds: Vec<_> = files.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&fds)];
    let sent = sendmsg::<()>(
        stream.as_raw_fd(),
        &[IoSlice::new(&line)],
        if fds.is_empty() { &[] } else { &rights },
        MsgFlags::MSG_NOSIGNAL,
        None,
    )?;
    stream.write_all(line.get(sent..).unwrap_or_default())?;
    let mut answer = Vec::new();
    BufReader::new(stream.take(MAX_CONTROL_LINE as u64)).read_until(b'\n', &mut answer)?;
    if answer.is_empty() {
        return Err(io::Error::new(
            io::ErrorKind::UnexpectedEof,
            "it closed the control connection without an answer",
        ));
    }
    Ok(serde_json::from_slice(&answer)?)
}
