//! Named pipes as containerd makes them for a task's streams.

use crate::error::{Context, Result};
use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver};
use std::time::Duration;

/// A FIFO that this side reads to its end, in a thread.
#[derive(Debug)]
pub struct ReadFifo {
    path: PathBuf,
    output: Receiver<std::io::Result<Vec<u8>>>,
}

impl ReadFifo {
    /// Makes the FIFO and begins to wait for its writer.
    ///
    /// # Errors
    /// When it can't be made.
    pub fn make(path: &Path) -> Result<Self> {
        mkfifo(path)?;
        let (sender, output) = mpsc::channel();
        let opened = path.to_owned();
        std::thread::spawn(move || {
            let mut bytes = Vec::new();
            let read = File::open(opened).and_then(|mut fifo| fifo.read_to_end(&mut bytes));
            let _ = sender.send(read.map(|_| bytes));
        });
        Ok(Self {
            path: path.to_owned(),
            output,
        })
    }

    /// Its path.
    pub fn path(&self) -> String {
        self.path.display().to_string()
    }

    /// All that was written, once every writer has closed it.
    ///
    /// # Panics
    /// When that doesn't happen in time.
    #[track_caller]
    pub fn read(self, timeout: Duration) -> String {
        match self.output.recv_timeout(timeout) {
            Ok(Ok(bytes)) => String::from_utf8_lossy(&bytes).into_owned(),
            other => panic!(
                "{} was not closed within {timeout:?}: {other:?}",
                self.path.display()
            ),
        }
    }
}

/// A FIFO that this side writes.
#[derive(Debug)]
pub struct WriteFifo {
    path: PathBuf,
    file: File,
}

impl WriteFifo {
    /// Makes the FIFO and opens it. A read end is held too, so that opening doesn't wait.
    ///
    /// # Errors
    /// When it can't be made or opened.
    pub fn make(path: &Path) -> Result<Self> {
        mkfifo(path)?;
        let file = File::options().read(true).write(true).open(path);
        let file = file.context(|| format!("open {}", path.display()))?;
        Ok(Self {
            path: path.to_owned(),
            file,
        })
    }

    /// Its path.
    pub fn path(&self) -> String {
        self.path.display().to_string()
    }

    /// Writes all of `text`.
    ///
    /// # Errors
    /// When the pipe breaks.
    pub fn write(&mut self, text: &str) -> Result<()> {
        let written = self.file.write_all(text.as_bytes());
        written.context(|| format!("write {}", self.path.display()))
    }
}

fn mkfifo(path: &Path) -> Result<()> {
    nix::unistd::mkfifo(path, nix::sys::stat::Mode::from_bits_truncate(0o600))
        .context(|| format!("make the FIFO {}", path.display()))
}
