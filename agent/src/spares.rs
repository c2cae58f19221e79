//! Namespaces made ahead, for the first container that asks for new ones.
//!
//! A network namespace is by far the dearest one to make, an ipc namespace the second; every other
//! one costs less than joining one does. They are made while nobody waits, before the machine is
//! saved, and held by descriptors. They are not replaced: that would take the CPU from the very
//! container that has just started, and a pod seldom has a second container with a network of its
//! own.
//!
//! All of them belong to the guest's initial user namespace, so a container with a user namespace
//! of its own can't take one.

use crate::error::{Context, Failure};
use crate::namespaces::{NamespacePlan, bring_loopback_up, unshare};
use rustix::fs::{Mode, OFlags};
use rustix::thread::{LinkNameSpaceType, UnshareFlags};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Namespaces that no process is in.
#[derive(Debug, Default)]
pub struct Spares(Mutex<Taken>);

impl Spares {
    fn lock(&self) -> MutexGuard<'_, Taken> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes those that are missing.
    pub fn fill(&self) -> Result<(), Failure> {
        let mut made = self.lock();
        if made.network.is_none() {
            let up =
                || bring_loopback_up().context(|| "bring a spare network's loopback device up");
            made.network = Some(make(NETWORK, up)?);
        }
        if made.ipc.is_none() {
            made.ipc = Some(make(IPC, || Ok(()))?);
        }
        Ok(())
    }

    /// Those that stand in for namespaces that `plan` wants to be new. They are used up, even if
    /// the container then comes to nothing.
    pub fn take(&self, plan: &NamespacePlan) -> Taken {
        match plan.ids {
            Some(_) => Taken::default(),
            None => self.take_flags(plan.clone_flags),
        }
    }

    /// Their descriptors.
    pub fn raw(&self) -> [Option<RawFd>; 2] {
        let made = self.lock();
        [&made.network, &made.ipc].map(|spare| spare.as_ref().map(AsRawFd::as_raw_fd))
    }

    /// Those of these CLONE_NEW* flags.
    pub fn take_flags(&self, flags: i32) -> Taken {
        let mut made = self.lock();
        let wanted = |flag| flags & flag != 0;
        Taken {
            network: made.network.take_if(|_| wanted(libc::CLONE_NEWNET)),
            ipc: made.ipc.take_if(|_| wanted(libc::CLONE_NEWIPC)),
        }
    }
}

/// Spare namespaces of one container.
#[derive(Debug, Default)]
pub struct Taken {
    network: Option<OwnedFd>,
    ipc: Option<OwnedFd>,
}

impl Taken {
    /// The CLONE_NEW* flags that the container's process need not be made with.
    pub fn flags(&self) -> i32 {
        let flag = |spare: &Option<OwnedFd>, flag| if spare.is_some() { flag } else { 0 };
        flag(&self.network, libc::CLONE_NEWNET) | flag(&self.ipc, libc::CLONE_NEWIPC)
    }

    /// In the container's first process: moves it into them.
    pub fn enter(&self) -> Result<(), Failure> {
        for (kind, spare) in [(NETWORK, &self.network), (IPC, &self.ipc)] {
            if let Some(spare) = spare {
                join(kind, spare)?;
            }
        }
        Ok(())
    }
}

#[derive(Clone, Copy)]
struct Kind {
    name: &'static str,
    flag: UnshareFlags,
    link: LinkNameSpaceType,
}

const NETWORK: Kind = Kind {
    name: "net",
    flag: UnshareFlags::NEWNET,
    link: LinkNameSpaceType::Network,
};

const IPC: Kind = Kind {
    name: "ipc",
    flag: UnshareFlags::NEWIPC,
    link: LinkNameSpaceType::InterProcessCommunication,
};

/// The agent itself goes there for a moment: it has one thread, and does nothing else meanwhile.
fn make(kind: Kind, set_up: impl FnOnce() -> Result<(), Failure>) -> Result<OwnedFd, Failure> {
    let home = open(kind)?;
    unshare(kind.flag).context(|| format!("make a spare {} namespace", kind.name))?;
    let made = open(kind).and_then(|made| set_up().map(|()| made));
    join(kind, &home)?;
    made
}

fn open(kind: Kind) -> Result<OwnedFd, Failure> {
    let path = format!("/proc/self/ns/{}", kind.name);
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    rustix::fs::open(&path, flags, Mode::empty()).context(|| format!("open {path}"))
}

fn join(kind: Kind, namespace: &OwnedFd) -> Result<(), Failure> {
    rustix::thread::move_into_link_name_space(namespace.as_fd(), Some(kind.link))
        .context(|| format!("join a {} namespace", kind.name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spares() -> Spares {
        let any = || OwnedFd::from(std::fs::File::open("/dev/null").expect("a file"));
        Spares(Mutex::new(Taken {
            network: Some(any()),
            ipc: Some(any()),
        }))
    }

    #[test]
    fn are_given_to_who_wants_new_ones_and_only_once() {
        let spares = spares();
        let mut plan = NamespacePlan {
            clone_flags: libc::CLONE_NEWNS,
            ..NamespacePlan::default()
        };
        assert_eq!(spares.take(&plan).flags(), 0, "it shares both");
        plan.clone_flags |= libc::CLONE_NEWNET;
        assert_eq!(spares.take(&plan).flags(), libc::CLONE_NEWNET);
        plan.clone_flags |= libc::CLONE_NEWIPC;
        assert_eq!(spares.take(&plan).flags(), libc::CLONE_NEWIPC);
        assert_eq!(spares.take(&plan).flags(), 0, "none is left");
    }
}
