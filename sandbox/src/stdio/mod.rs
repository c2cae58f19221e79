//! A process's standard streams on the host: what the daemon named, opened, and copied from and to
//! the guest's streams.
//!
//! ```text
//! client ─FIFO─► stdin ──copy──► vsock stream ─► process        CloseIO drops our write end of the
//! client ◄─FIFO─ stdout ◄─copy── vsock stream ◄─ process        FIFO; its reader then sees the end
//! ```

mod copy;
mod logger;
mod target;

pub(crate) use copy::{Copies, Progress, StdinKeeper};
pub(crate) use target::Target;

use crate::Kind;
use crate::fds::ChildFds;
use crate::guest::{AgentError, Guest};
use crate::ids::Namespace;
use crate::sandbox::StdioPaths;
use logger::Logger;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use tokio::net::unix::pipe;

/// A stream that can't be used.
#[derive(Debug, thiserror::Error)]
pub enum StdioError {
    /// The URI makes no sense.
    #[error("the {stream} URI {uri:?} is invalid: {problem}")]
    Uri {
        /// stdin, stdout or stderr.
        stream: &'static str,
        /// What the daemon gave.
        uri: String,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// Opening failed.
    #[error("cannot open {path} for {stream}: {cause}", path = .path.display())]
    Open {
        /// stdin, stdout or stderr.
        stream: &'static str,
        /// The FIFO or file.
        path: PathBuf,
        /// Why.
        cause: io::Error,
    },
    /// The log program failed.
    #[error("the log program {program} cannot be used: {cause}", program = .program.display())]
    Logger {
        /// The program.
        program: PathBuf,
        /// Why.
        cause: io::Error,
    },
}

impl StdioError {
    pub(crate) fn kind(&self) -> Kind {
        match self {
            StdioError::Uri { .. } => Kind::InvalidArgument,
            StdioError::Open { .. } | StdioError::Logger { .. } => Kind::Unknown,
        }
    }
}

/// The streams' targets, parsed.
#[derive(Debug, Clone)]
pub(crate) struct Stdio {
    stdin: Target,
    stdout: Target,
    stderr: Target,
}

/// The host's ends, open.
pub(crate) struct HostEnds {
    stdin: Option<(pipe::Receiver, StdinKeeper)>,
    stdout: Option<Sink>,
    stderr: Option<Sink>,
    logger: Option<Logger>,
}

/// Where output goes.
pub(crate) enum Sink {
    /// A FIFO or a pipe.
    Pipe {
        /// Where to write.
        writer: pipe::Sender,
        /// A read end of a FIFO: so that it stays open while the daemon restarts.
        _reader: Option<OwnedFd>,
    },
    /// A file or device.
    File(File),
}

impl Stdio {
    /// Parses what the daemon named.
    pub fn parse(paths: &StdioPaths) -> Result<Self, StdioError> {
        let stderr = if paths.terminal {
            Target::Null
        } else {
            Target::parse("stderr", &paths.stderr)?
        };
        let stdin = Target::parse("stdin", &paths.stdin)?;
        if matches!(stdin, Target::Log(_)) {
            let problem = "input cannot come from a log program";
            return Err(StdioError::Uri {
                stream: "stdin",
                uri: paths.stdin.clone(),
                problem,
            });
        }
        Ok(Self {
            stdin,
            stdout: Target::parse("stdout", &paths.stdout)?,
            stderr,
        })
    }

    /// Opens the host's ends, and starts the log program if there is one.
    pub async fn open(
        &self,
        container: &str,
        namespace: &Namespace,
    ) -> Result<HostEnds, StdioError> {
        let mut ends = HostEnds {
            stdin: open_stdin(&self.stdin)?,
            stdout: open_output("stdout", &self.stdout)?,
            stderr: open_output("stderr", &self.stderr)?,
            logger: None,
        };
        let logs = [&self.stdout, &self.stderr]
            .into_iter()
            .find_map(|target| match target {
                Target::Log(log) => Some(log),
                _ => None,
            });
        if let Some(log) = logs {
            let (logger, stdout, stderr) = Logger::start(log, container, namespace).await?;
            ends.logger = Some(logger);
            if matches!(self.stdout, Target::Log(_)) {
                ends.stdout = Some(Sink::Pipe {
                    writer: stdout,
                    _reader: None,
                });
            }
            if matches!(self.stderr, Target::Log(_)) {
                ends.stderr = Some(Sink::Pipe {
                    writer: stderr,
                    _reader: None,
                });
            }
        }
        Ok(ends)
    }
}

impl HostEnds {
    /// Opens the guest's streams for those that the host has, and returns the tokens by which to
    /// name them with what copies between the two once the process exists.
    pub async fn connect(self, guest: &Guest) -> Result<([Option<u64>; 3], Copies), AgentError> {
        let mut copies = Copies::new(guest.pace);
        copies.logger(self.logger);
        let open = async |wanted: bool| match wanted {
            true => guest.open_stream().await.map(Some),
            false => Ok(None),
        };
        // At once: where guest kernels are emulated, each takes a noticeable time.
        let (stdin, stdout, stderr) = tokio::try_join!(
            open(self.stdin.is_some()),
            open(self.stdout.is_some()),
            open(self.stderr.is_some()),
        )?;
        let tokens = [&stdin, &stdout, &stderr].map(|stream| stream.as_ref().map(|one| one.token));
        if let (Some((source, keeper)), Some(stream)) = (self.stdin, stdin) {
            copies.input(source, keeper, stream.socket);
        }
        for (sink, stream) in [(self.stdout, stdout), (self.stderr, stderr)] {
            if let (Some(sink), Some(stream)) = (sink, stream) {
                copies.output(stream.socket, sink);
            }
        }
        Ok((tokens, copies))
    }
}

/// The FIFO's read end, non-blocking, and a write end of our own: a client that detaches must not
/// look like the end of input.
fn open_stdin(target: &Target) -> Result<Option<(pipe::Receiver, StdinKeeper)>, StdioError> {
    let path = match target {
        Target::Null | Target::Log(_) => return Ok(None),
        Target::Path(path) | Target::File(path) => path,
    };
    let failed = |cause| StdioError::Open {
        stream: "stdin",
        path: path.clone(),
        cause,
    };
    if !is_fifo(path).map_err(failed)? {
        // /dev/null and the like: nothing to read, ever.
        return Ok(None);
    }
    let reader = open(path, true, false).map_err(failed)?;
    let keeper = open(path, false, true).map_err(failed)?;
    let reader = pipe::Receiver::from_file(reader).map_err(failed)?;
    Ok(Some((reader, StdinKeeper::new(keeper.into()))))
}

fn open_output(stream: &'static str, target: &Target) -> Result<Option<Sink>, StdioError> {
    let (path, make) = match target {
        Target::Null | Target::Log(_) => return Ok(None),
        Target::Path(path) => (path, false),
        Target::File(path) => (path, true),
    };
    let failed = |cause| StdioError::Open {
        stream,
        path: path.clone(),
        cause,
    };
    if make {
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent).map_err(failed)?;
        }
    } else if is_fifo(path).map_err(failed)? {
        // The read end first: without a reader a non-blocking open for writing fails (fifo(7)).
        let reader = open(path, true, false).map_err(failed)?;
        let writer = open(path, false, true).map_err(failed)?;
        let writer = pipe::Sender::from_file(writer).map_err(failed)?;
        return Ok(Some(Sink::Pipe {
            writer,
            _reader: Some(reader.into()),
        }));
    }
    let mut options = OpenOptions::new();
    options.append(true).create(make).mode(0o640);
    Ok(Some(Sink::File(options.open(path).map_err(failed)?)))
}

fn is_fifo(path: &Path) -> io::Result<bool> {
    Ok(path.metadata()?.file_type().is_fifo())
}

fn open(path: &Path, read: bool, write: bool) -> io::Result<File> {
    OpenOptions::new()
        .read(read)
        .write(write)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
}

/// Descriptors 3 to 5 of a log program.
fn logger_fds(stdout: &OwnedFd, stderr: &OwnedFd, ready: &OwnedFd) -> io::Result<ChildFds> {
    let mut fds = ChildFds::new();
    for fd in [stdout, stderr, ready] {
        fds.add(fd)?;
    }
    Ok(fds)
}

#[cfg(test)]
mod tests;
