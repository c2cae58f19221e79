//! The pod's own pid namespace, which its containers share if the pod asks for that.
//!
//! The first container that asks has it made. Its process 1 is none of theirs, so that the
//! namespace outlives each of them; it reaps what they orphan, and does nothing else. They all see
//! it, so it gives up what it has of the agent's: a fork of PID 1 that containers could look into
//! must be worth nothing to them.

use super::child::{close_all_but, end, give_up, heed_broken_pipes};
use super::control::send;
use super::report::Report;
use crate::error::{Context, Failure};
use crate::reaper::Child;
use crate::syscalls::{Linux, Syscalls};
use rustix::mount::{MountFlags, MountPropagationFlags};
use rustix::process::{DumpableBehavior, Signal};
use rustix::thread::{Gid, Uid};
use std::io::ErrorKind;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::path::Path;

/// New namespaces that process 1 is born in.
pub const NAMESPACES: i32 = libc::CLONE_NEWPID | libc::CLONE_NEWNS;

/// The user and the group nobody, which own nothing.
const NOBODY: u32 = 65_534;

/// What the process table calls it.
const NAME: &std::ffi::CStr = c"pod";

/// A folder that every guest has, to put an empty root in place of.
const PLACE: &str = "/tmp";

/// Process 1 of the namespace, from the agent's side. It lives as long as the guest.
#[derive(Debug)]
pub struct PodInit {
    /// To know whether it lives.
    pub child: Child,
    /// The way into its namespace.
    pub pidfd: OwnedFd,
}

/// In the process: gives everything up, reports, and waits for ever.
pub fn run(control: RawFd) -> ! {
    // SAFETY: the descriptor is open, and is closed by nothing before the report has been sent.
    let socket = unsafe { BorrowedFd::borrow_raw(control) };
    if let Err(failure) = retire(control) {
        give_up(socket, failure);
    }
    if send(socket, &Report::Ready, None).is_err() || close_all_but([]).is_err() {
        end();
    }
    for standard in 0..=2 {
        // SAFETY: takes no pointers; nothing in this process uses the agent's streams.
        unsafe { libc::close(standard) };
    }
    loop {
        // SAFETY: takes no pointers. Nothing is ever handled, so it doesn't return.
        unsafe { libc::pause() };
    }
}

fn retire(control: RawFd) -> Result<(), Failure> {
    let sys = Linux;
    heed_broken_pipes();
    close_all_but([control])?;
    // The kernel reaps what it inherits, without waking it.
    // SAFETY: SIG_IGN runs no code of ours.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) };
    // Its end would be that of all the pod's containers.
    match std::fs::write("/proc/self/oom_score_adj", "-1000") {
        // Takes CAP_SYS_RESOURCE, which the agent may lack outside of a guest.
        Err(error) if error.kind() == ErrorKind::PermissionDenied => {}
        written => written
            .context(|| "keep the pod's first process from being killed for want of memory")?,
    }
    // /proc/1/root must lead nowhere.
    let action = || "give the pod's first process an empty root";
    let old = sys.open_folder(Path::new("/")).context(action)?;
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    sys.set_propagation(old.as_fd(), private).context(action)?;
    let place = sys.open_folder(Path::new(PLACE)).context(action)?;
    let flags = MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    let options = c"nr_inodes=1,mode=555";
    sys.mount(Path::new("none"), place.as_fd(), "tmpfs", flags, options)
        .context(action)?;
    let root = sys.open_folder(Path::new(PLACE)).context(action)?;
    sys.pivot(root.as_fd()).context(action)?;
    give_up_privileges().context(|| "take the privileges of the pod's first process")?;
    rustix::process::setsid().context(|| "start a session")?;
    // Only outside of a guest can the agent end before it.
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
        .context(|| "end with the agent")
}

fn give_up_privileges() -> rustix::io::Result<()> {
    let (uid, gid) = (Uid::from_raw(NOBODY), Gid::from_raw(NOBODY));
    rustix::thread::set_name(NAME)?;
    rustix::thread::set_thread_groups(&[])?;
    rustix::thread::set_thread_res_gid(gid, gid, gid)?;
    // With the user go all capabilities (capabilities(7), "Effect of user ID changes").
    rustix::thread::set_thread_res_uid(uid, uid, uid)?;
    rustix::thread::set_no_new_privs(true)?;
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
}
