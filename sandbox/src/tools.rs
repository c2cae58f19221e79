//! Programs of the host's that do what no library does as well: mkfs.erofs and mkfs.ext4.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Where they are besides the folders of PATH, in which a daemon often has no sbin.
const FOLDERS: [&str; 6] = [
    "/usr/local/sbin",
    "/usr/local/bin",
    "/usr/sbin",
    "/usr/bin",
    "/sbin",
    "/bin",
];

/// Most that is kept of what one says.
const MAX_SAID: u64 = 2048;

/// How often a running one is looked at.
const POLL: Duration = Duration::from_millis(10);

/// Why a program didn't do its work.
#[derive(Debug, thiserror::Error)]
pub enum ToolError {
    /// The host doesn't have it.
    #[error("the host has no {name}; install it (Debian: {package})")]
    Missing {
        /// Its name.
        name: &'static str,
        /// The package of Debian's that it is in.
        package: &'static str,
    },
    /// It can't be started or waited for.
    #[error("cannot run {name}: {cause}")]
    Run {
        /// Its name.
        name: &'static str,
        /// Why.
        cause: io::Error,
    },
    /// It failed.
    #[error("{name} failed ({status}): {said}")]
    Failed {
        /// Its name.
        name: &'static str,
        /// How it ended.
        status: std::process::ExitStatus,
        /// What it said.
        said: String,
    },
    /// It was killed, since it didn't come to an end.
    #[error("{name} was still running after {limit:?}")]
    TimedOut {
        /// Its name.
        name: &'static str,
        /// How long it was given.
        limit: Duration,
    },
}

/// A program and the package of Debian's that it is in.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tool {
    pub name: &'static str,
    pub package: &'static str,
}

impl Tool {
    /// Where it is.
    pub fn find(&self) -> Result<PathBuf, ToolError> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let runs = |path: &Path| {
            path.metadata()
                .is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0)
        };
        std::env::split_paths(&path)
            .chain(FOLDERS.iter().map(PathBuf::from))
            .filter(|folder| folder.is_absolute())
            .map(|folder| folder.join(self.name))
            .find(|path| runs(path))
            .ok_or(ToolError::Missing {
                name: self.name,
                package: self.package,
            })
    }

    /// Runs `command` for at most `limit`; what it says goes to the file `log`.
    pub fn run(&self, command: &mut Command, log: &Path, limit: Duration) -> Result<(), ToolError> {
        let name = self.name;
        let failed = |cause| ToolError::Run { name, cause };
        let output = File::create(log).map_err(failed)?;
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(output)
            .env_clear();
        let mut child = command.spawn().map_err(failed)?;
        let end = Instant::now() + limit;
        let status = loop {
            match child.try_wait() {
                Ok(Some(status)) => break status,
                Ok(None) if Instant::now() < end => std::thread::sleep(POLL),
                stuck => {
                    let _ = child.kill();
                    let _ = child.wait();
                    return Err(match stuck {
                        Err(cause) => failed(cause),
                        Ok(_) => ToolError::TimedOut { name, limit },
                    });
                }
            }
        };
        if status.success() {
            return Ok(());
        }
        let said = said(log);
        Err(ToolError::Failed { name, status, said })
    }
}

fn said(log: &Path) -> String {
    let mut bytes = Vec::new();
    let read = File::open(log).and_then(|file| file.take(MAX_SAID).read_to_end(&mut bytes));
    if read.is_err() {
        return String::new();
    }
    let text = String::from_utf8_lossy(&bytes);
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    lines.collect::<Vec<_>>().join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHELL: Tool = Tool {
        name: "sh",
        package: "dash",
    };

    fn run(script: &str, limit: Duration) -> Result<(), ToolError> {
        let dir = tempfile::tempdir().unwrap();
        let mut command = Command::new(SHELL.find().unwrap());
        SHELL.run(command.args(["-c", script]), &dir.path().join("log"), limit)
    }

    #[test]
    fn what_a_program_says_is_in_its_error_and_a_slow_one_is_killed() {
        run("exit 0", Duration::from_secs(60)).unwrap();
        let error = run("echo no room >&2; exit 3", Duration::from_secs(60)).unwrap_err();
        assert!(error.to_string().contains("no room"), "{error}");
        let error = run("exec sleep 1000", Duration::from_millis(50)).unwrap_err();
        assert!(matches!(error, ToolError::TimedOut { .. }), "{error}");
        let missing = Tool {
            name: "no-such-program",
            package: "nothing",
        };
        let error = missing.find().unwrap_err().to_string();
        assert!(error.contains("no-such-program"), "{error}");
    }
}
