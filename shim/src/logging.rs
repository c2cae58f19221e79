//! Logs of the shim: to the FIFO `log` in the bundle, which the daemon reads. Never to the
//! standard streams, which belong to the protocol, and never at the price of standing still.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

/// Environment variable that sets the level, in tracing's syntax.
const LEVEL_ENV: &str = "BULKHEAD_LOG";

/// Sends this process's log lines to the FIFO `log` in `bundle`.
pub fn to_bundle(bundle: &Path, debug: bool) {
    let level = if debug { "debug" } else { "info" };
    let filter = EnvFilter::try_from_env(LEVEL_ENV).unwrap_or_else(|_| EnvFilter::new(level));
    // Fails only if a subscriber is there already, and then that one is right.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(false)
        .with_writer(LogFifo::new(bundle.join("log")))
        .try_init();
}

/// A FIFO that may have no reader: lines are dropped then, and when the reader is slow.
struct LogFifo {
    path: PathBuf,
    file: Mutex<Option<File>>,
}

impl LogFifo {
    fn new(path: PathBuf) -> Self {
        Self {
            path,
            file: Mutex::new(None),
        }
    }
}

/// One line's way into the FIFO.
struct LogLine<'a>(&'a LogFifo);

impl<'a> MakeWriter<'a> for LogFifo {
    type Writer = LogLine<'a>;

    fn make_writer(&'a self) -> LogLine<'a> {
        LogLine(self)
    }
}

impl Write for LogLine<'_> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let mut file = self.0.file.lock().unwrap_or_else(PoisonError::into_inner);
        if file.is_none() {
            // Without a reader a non-blocking open fails (fifo(7)); the next line tries again.
            let mut options = OpenOptions::new();
            *file = options
                .write(true)
                .custom_flags(libc::O_NONBLOCK)
                .open(&self.0.path)
                .ok();
        }
        if let Some(open) = file.as_mut() {
            // A line of up to PIPE_BUF bytes is written whole or not at all (pipe(7)).
            let _ = open.write(line);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    fn write(fifo: &LogFifo, line: &[u8]) {
        fifo.make_writer().write_all(line).unwrap();
    }

    #[test]
    fn lines_reach_a_reader_and_are_dropped_without_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let fifo = LogFifo::new(path.clone());
        write(&fifo, b"no FIFO yet\n");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        write(&fifo, b"no reader yet\n");
        let open = || {
            OpenOptions::new()
                .read(true)
                .custom_flags(libc::O_NONBLOCK)
                .open(&path)
                .unwrap()
        };
        let mut reader = open();
        write(&fifo, b"first\n");
        let mut text = [0; 64];
        let length = reader.read(&mut text).unwrap();
        assert_eq!(&text[..length], b"first\n");
        drop(reader);
        write(&fifo, b"between two readers\n");
        let mut reader = open();
        write(&fifo, b"second\n");
        let length = reader.read(&mut text).unwrap();
        assert_eq!(&text[..length], b"second\n");
        // A reader that doesn't read must not stop the shim.
        for _ in 0..5000 {
            write(&fifo, &[b'x'; 100]);
        }
    }
}
