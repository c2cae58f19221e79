//! A log program (`binary://`): gets the output on descriptors 3 and 4 and closes 5 when it's
//! ready to read.

use super::target::LogProgram;
use super::{StdioError, logger_fds};
use crate::ids::Namespace;
use nix::fcntl::OFlag;
use std::io;
use std::process::{Command, Stdio};
use std::time::Duration;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::time::timeout;

/// How long it may take until it's ready, and until it has ended after its input has.
const PATIENCE: Duration = Duration::from_secs(10);

/// A running log program.
#[derive(Debug)]
pub(crate) struct Logger {
    child: std::process::Child,
}

impl Logger {
    /// Starts `log` and waits until it's ready; also gives the write ends for stdout and stderr.
    pub async fn start(
        log: &LogProgram,
        container: &str,
        namespace: &Namespace,
    ) -> Result<(Self, pipe::Sender, pipe::Sender), StdioError> {
        let failed = |cause: io::Error| StdioError::Logger {
            program: log.program.clone(),
            cause,
        };
        let pipe = || nix::unistd::pipe2(OFlag::O_CLOEXEC).map_err(|errno| failed(errno.into()));
        let ((out_read, out), (err_read, err), (ready, ready_write)) = (pipe()?, pipe()?, pipe()?);
        let fds = logger_fds(&out_read, &err_read, &ready_write).map_err(failed)?;
        let mut command = Command::new(&log.program);
        command
            .args(&log.args)
            .env("CONTAINER_ID", container)
            .env("CONTAINER_NAMESPACE", namespace.as_str())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let mut logger = Self {
            child: fds.spawn(&mut command).map_err(failed)?,
        };
        drop((out_read, err_read, ready_write));
        let ready = pipe::Receiver::from_owned_fd(ready).map_err(failed)?;
        if let Err(cause) = wait_ready(ready).await {
            logger.kill();
            return Err(failed(cause));
        }
        let out = pipe::Sender::from_owned_fd(out).map_err(failed)?;
        let err = pipe::Sender::from_owned_fd(err).map_err(failed)?;
        Ok((logger, out, err))
    }

    /// Waits for its end once its input has ended, and kills it if it doesn't come.
    pub async fn finish(mut self) {
        let pidfd = crate::process_ref::async_pidfd(self.child.id());
        let ended = async {
            if let Ok(pidfd) = &pidfd {
                let _ = pidfd.readable().await;
            }
        };
        if timeout(PATIENCE, ended).await.is_err() {
            tracing::warn!("the log program does not end; killing it");
            self.kill();
            return;
        }
        let _ = self.child.wait();
    }

    fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Ready is when the program closes its descriptor 5, or writes to it.
async fn wait_ready(mut ready: pipe::Receiver) -> io::Result<()> {
    match timeout(PATIENCE, ready.read(&mut [0])).await {
        Ok(result) => result.map(drop),
        Err(_) => Err(io::Error::new(
            io::ErrorKind::TimedOut,
            format!("it did not close descriptor 5 within {PATIENCE:?}"),
        )),
    }
}
