//! A process on the host, named so that it can't be mistaken for a later one with the same pid.

use serde::{Deserialize, Serialize};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

/// A pid with the start time that makes it unique (proc_pid_stat(5), field 22, in clock ticks
/// since boot).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ProcessRef {
    pub pid: u32,
    pub start_time: u64,
}

impl ProcessRef {
    /// The process that has `pid` now.
    pub fn of(pid: u32) -> io::Result<Self> {
        let (_, start_time) = stat(pid)?;
        Ok(Self { pid, start_time })
    }

    /// This process.
    pub fn own() -> io::Result<Self> {
        Self::of(std::process::id())
    }

    /// Whether it still runs (a zombie doesn't).
    pub fn is_alive(self) -> bool {
        matches!(stat(self.pid), Ok((state, start)) if start == self.start_time && !matches!(state, b'Z' | b'X'))
    }

    /// Kills it with SIGKILL and waits up to `limit` for its end. Done at once if it's gone.
    pub fn kill(self, limit: Duration) -> io::Result<()> {
        let Some(pidfd) = open_pidfd(self.pid)? else {
            return Ok(());
        };
        // If the pid still belongs to the process meant, it did when the pidfd was opened too.
        if !self.is_alive() {
            return Ok(());
        }
        // SAFETY: a plain system call on an owned descriptor; a null siginfo is allowed.
        let sent = unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                pidfd.as_raw_fd(),
                libc::SIGKILL,
                std::ptr::null::<libc::siginfo_t>(),
                0,
            )
        };
        if sent != 0 {
            let error = io::Error::last_os_error();
            return if error.raw_os_error() == Some(libc::ESRCH) {
                Ok(())
            } else {
                Err(error)
            };
        }
        wait_readable(&pidfd, limit)
    }
}

/// A pidfd of `pid` that the runtime can wait on; readable when the process has ended. Must be
/// called on the runtime.
pub(crate) fn async_pidfd(pid: u32) -> io::Result<tokio::io::unix::AsyncFd<OwnedFd>> {
    let pidfd = open_pidfd(pid)?.ok_or_else(|| io::Error::from_raw_os_error(libc::ESRCH))?;
    let interest = tokio::io::Interest::READABLE;
    // SAFETY: the descriptor is owned by the AsyncFd from here on and stays the same one until the
    // AsyncFd, which deregisters it first, closes it.
    let registered = unsafe { tokio::io::unix::AsyncFd::register_with_interest(pidfd, interest) };
    Ok(registered?)
}

fn open_pidfd(pid: u32) -> io::Result<Option<OwnedFd>> {
    // SAFETY: a plain system call; a non-negative result is a new descriptor that nobody else owns.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    if fd >= 0 {
        // SAFETY: see above; descriptors fit into an i32.
        return Ok(Some(unsafe { OwnedFd::from_raw_fd(fd as i32) }));
    }
    let error = io::Error::last_os_error();
    if error.raw_os_error() == Some(libc::ESRCH) {
        Ok(None)
    } else {
        Err(error)
    }
}

/// A pidfd becomes readable when its process ends (pidfd_open(2)).
fn wait_readable(pidfd: &OwnedFd, limit: Duration) -> io::Result<()> {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use std::os::fd::AsFd;
    let timeout = PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX);
    match poll(
        &mut [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)],
        timeout,
    )? {
        0 => Err(io::Error::new(
            io::ErrorKind::TimedOut,
            "it did not end in time after SIGKILL",
        )),
        _ => Ok(()),
    }
}

fn stat(pid: u32) -> io::Result<(u8, u64)> {
    let text = std::fs::read(format!("/proc/{pid}/stat"))?;
    parse_stat(&text).ok_or_else(|| io::Error::other(format!("/proc/{pid}/stat is unreadable")))
}

/// State and start time. The second field, the program's name in brackets, may itself hold
/// brackets and blanks, so fields are counted from the last closing bracket.
fn parse_stat(text: &[u8]) -> Option<(u8, u64)> {
    let end = text.iter().rposition(|byte| *byte == b')')?;
    let mut fields = text
        .get(end + 1..)?
        .split(|byte| *byte == b' ')
        .filter(|field| !field.is_empty());
    let state = *fields.next()?.first()?;
    let start = std::str::from_utf8(fields.nth(18)?)
        .ok()?
        .trim()
        .parse()
        .ok()?;
    Some((state, start))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn a_program_name_with_brackets_is_no_trap() {
        let text = b"7 (a) R (b) S 1 7 7 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 4711 99 1\n";
        assert_eq!(parse_stat(text), Some((b'S', 4711)));
        assert_eq!(parse_stat(b"7 (a"), None);
    }

    #[test]
    fn kills_exactly_the_process_meant() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let process = ProcessRef::of(child.id()).unwrap();
        let other = ProcessRef {
            start_time: process.start_time + 1,
            ..process
        };
        other.kill(Duration::from_secs(1)).unwrap();
        assert!(process.is_alive(), "another start time is another process");
        process.kill(Duration::from_secs(5)).unwrap();
        assert!(!process.is_alive(), "a zombie counts as ended");
        child.wait().unwrap();
        process.kill(Duration::from_secs(1)).unwrap();
    }
}
