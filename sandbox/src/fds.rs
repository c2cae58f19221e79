//! Starting a program with exactly the descriptors it is meant to have, at the numbers it expects.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};

/// Descriptors for a child, from number 3 up in the order in which they were added.
#[derive(Debug, Default)]
pub struct ChildFds {
    sources: Vec<OwnedFd>,
}

/// First number that the copies in this process get: above any number in the child, so that
/// placing one there can't overwrite another that is still to be placed.
const COPIES_FROM: RawFd = 64;

/// First number in the child; 0 to 2 are the standard streams, set on the `Command`.
const FIRST: RawFd = 3;

impl ChildFds {
    /// No descriptors.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a copy of `fd` and returns its number in the child.
    ///
    /// # Errors
    /// When the process has no descriptor left.
    pub fn add(&mut self, fd: impl AsFd) -> io::Result<RawFd> {
        // SAFETY: F_DUPFD_CLOEXEC on a borrowed, open descriptor.
        let copy =
            unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), libc::F_DUPFD_CLOEXEC, COPIES_FROM) };
        if copy < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: fcntl has just returned this new descriptor.
        self.sources.push(unsafe { OwnedFd::from_raw_fd(copy) });
        Ok(FIRST + self.sources.len() as RawFd - 1)
    }

    /// Starts `command` with the standard streams it names, these descriptors, and no other.
    ///
    /// # Errors
    /// When the program can't be started.
    pub fn spawn(self, command: &mut Command) -> io::Result<Child> {
        let sources: Vec<RawFd> = self.sources.iter().map(AsRawFd::as_raw_fd).collect();
        let end = FIRST + sources.len() as RawFd;
        // The standard library tells us of a failed exec through a descriptor of its own. Holding
        // all numbers below `end` keeps that one out of the way of what is placed there.
        let _placeholders = occupy_below(end)?;
        // SAFETY: the closure runs between fork and exec and only makes system calls on numbers
        // prepared before; it neither allocates nor locks.
        unsafe {
            command.pre_exec(move || place(&sources, end));
        }
        command.spawn()
    }
}

fn place(sources: &[RawFd], end: RawFd) -> io::Result<()> {
    for (target, source) in (FIRST..).zip(sources) {
        // SAFETY: both are descriptor numbers of this process; dup2 clears close-on-exec.
        if unsafe { libc::dup2(*source, target) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    // Everything else goes at exec, whatever library forgot to mark it.
    // SAFETY: a plain system call that changes only flags of descriptors.
    let marked = unsafe {
        libc::syscall(
            libc::SYS_close_range,
            end,
            u32::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        )
    };
    if marked != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn occupy_below(end: RawFd) -> io::Result<Vec<File>> {
    let mut held = Vec::new();
    loop {
        let file = File::open("/dev/null")?;
        if file.as_raw_fd() >= end {
            return Ok(held);
        }
        held.push(file);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::process::Stdio;

    #[test]
    fn a_child_has_exactly_what_it_was_given() {
        let stray = File::open("/dev/zero").unwrap();
        // SAFETY: clears close-on-exec of a descriptor that this test owns.
        unsafe { libc::fcntl(stray.as_raw_fd(), libc::F_SETFD, 0) };
        let (mut near, far) = std::os::unix::net::UnixStream::pair().unwrap();
        let mut fds = ChildFds::new();
        assert_eq!(fds.add(File::open("/dev/full").unwrap()).unwrap(), 3);
        assert_eq!(fds.add(&far).unwrap(), 4);
        let mut command = Command::new("/bin/sh");
        command
            .args([
                "-c",
                "readlink /proc/$$/fd/3; read word <&4; echo $word; echo /proc/$$/fd/*",
            ])
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        let child = fds.spawn(&mut command).unwrap();
        near.write_all(b"hello\n").unwrap();
        let output = String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap();
        let lines: Vec<_> = output.lines().collect();
        assert_eq!(lines[..2], ["/dev/full", "hello"]);
        let numbers: Vec<_> = lines[2]
            .split(' ')
            .filter_map(|p| p.rsplit('/').next()?.parse::<u32>().ok())
            .collect();
        // The glob itself may hold one more while it reads the folder.
        assert!(
            numbers.starts_with(&[0, 1, 2, 3, 4]) && numbers.len() <= 6,
            "{numbers:?}"
        );
    }

    #[test]
    fn a_program_that_does_not_exist_is_an_error() {
        let mut fds = ChildFds::new();
        fds.add(File::open("/dev/null").unwrap()).unwrap();
        let error = fds
            .spawn(&mut Command::new("/nonexistent/program"))
            .unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }
}
