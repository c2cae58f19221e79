//! The one place where the agent makes processes.

use crate::syscalls::last_error;
use rustix::io::Result;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// Bits above 31 of clone3's flags, which libc still declares too narrow (linux/sched.h).
const CLONE_CLEAR_SIGHAND: u64 = 1 << 32;
const CLONE_INTO_CGROUP: u64 = 1 << 33;

/// Which side of the clone this is.
pub enum Cloned {
    /// The new process.
    Child,
    /// The agent.
    Parent {
        /// The child in the agent's pid namespace.
        pid: i32,
        /// Refers to the child for as long as it is open.
        pidfd: OwnedFd,
    },
}

/// clone3(2): a child with `namespaces` (CLONE_NEW*) of its own, born in `cgroup`, with every
/// signal handler reset.
///
/// # Safety
///
/// The calling process must have a single thread, so that the child doesn't inherit a lock that
/// no one will ever release. The child must not return into the agent's event loop, and must end
/// with `_exit` or an exec.
pub unsafe fn clone(namespaces: i32, cgroup: Option<BorrowedFd<'_>>) -> Result<Cloned> {
    let mut pidfd: libc::c_int = -1;
    // SAFETY: clone_args is plain data, for which all zeroes is a value.
    let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
    let flags = libc::CLONE_PIDFD | namespaces;
    arguments.flags = u64::from(flags.cast_unsigned()) | CLONE_CLEAR_SIGHAND;
    arguments.pidfd = (&raw mut pidfd) as u64;
    arguments.exit_signal = libc::SIGCHLD as u64;
    if let Some(cgroup) = cgroup {
        arguments.flags |= CLONE_INTO_CGROUP;
        arguments.cgroup = u64::try_from(cgroup.as_raw_fd()).unwrap_or_default();
    }
    // SAFETY: the arguments are valid for their size and outlive the call. Without CLONE_VM the
    // child runs on a copy of this stack; the rest is the caller's promise.
    let pid = unsafe {
        libc::syscall(
            libc::SYS_clone3,
            &raw const arguments,
            size_of::<libc::clone_args>(),
        )
    };
    match i32::try_from(pid) {
        Ok(0) => Ok(Cloned::Child),
        Ok(pid) if pid > 0 => Ok(Cloned::Parent {
            pid,
            // SAFETY: the kernel has put a new descriptor there, which no one else owns.
            pidfd: unsafe { OwnedFd::from_raw_fd(pidfd) },
        }),
        _ => Err(last_error()),
    }
}
