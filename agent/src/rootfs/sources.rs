//! What the agent opens for a container with a user namespace of its own, whose root may see less
//! of the guest than is to be mounted.
//!
//! The attributes of a mount (read-only, nosuid and so on) can be changed by who has CAP_SYS_ADMIN
//! over its mount namespace, which here the container's root may have. Not so when the mount was
//! there as its namespace was copied from a more privileged one (mount_namespaces(7),
//! "Restrictions on mount namespaces"), and copies of such a mount stay so. So sources with
//! attributes are on a stage at the moment of the clone: a mount namespace in which the agent is
//! just then, and of which the container's becomes a copy.

use super::{ELSEWHERE, RootfsPlan, is_folder};
use crate::error::{Context, Failure};
use crate::namespaces::unshare;
use crate::syscalls::Syscalls;
use rustix::fs::{Mode, OFlags};
use rustix::mount::{MountFlags, MountPropagationFlags};
use rustix::thread::{LinkNameSpaceType, UnshareFlags};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};

/// Detached mounts of the rootfs and of the sources of bind mounts.
#[derive(Debug)]
pub struct Sources {
    root: OwnedFd,
    mounts: Vec<Option<Source>>,
}

#[derive(Debug)]
struct Source {
    mount: OwnedFd,
    /// It has attributes to be kept.
    staged: bool,
}

impl Sources {
    /// In the agent: opens what `plan` names. `guests_ipc` says that the container has no IPC
    /// namespace of its own.
    pub fn open(plan: &RootfsPlan, guests_ipc: bool, sys: &dyn Syscalls) -> Result<Self, Failure> {
        let mut mounts = Vec::with_capacity(plan.mounts.len());
        for mount in &plan.mounts {
            let staged = mount.restricts();
            let source = mount.open_source(sys, guests_ipc)?;
            mounts.push(source.map(|mount| Source { mount, staged }));
        }
        Ok(Self {
            root: plan.open_root(sys)?.1,
            mounts,
        })
    }

    /// The descriptors that the container's process needs.
    pub fn raw(&self) -> Vec<RawFd> {
        let mounts = self.mounts.iter().flatten().map(|source| &source.mount);
        mounts.chain([&self.root]).map(AsRawFd::as_raw_fd).collect()
    }

    /// In the agent: has what is cloned until the stage is left take the sources over with their
    /// attributes. Nothing if there are none.
    pub fn enter_stage(&self, sys: &dyn Syscalls) -> Result<Option<Stage>, Failure> {
        if !self.mounts.iter().flatten().any(|source| source.staged) {
            return Ok(None);
        }
        let action = || "make a stage for read-only mounts";
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let home = rustix::fs::open("/proc/self/ns/mnt", flags, Mode::empty()).context(action)?;
        unshare(UnshareFlags::NEWNS).context(action)?;
        let stage = Stage { home };
        match self.set_stage(sys) {
            Ok(()) => Ok(Some(stage)),
            Err(failure) => stage.leave().and(Err(failure)),
        }
    }

    fn set_stage(&self, sys: &dyn Syscalls) -> Result<(), Failure> {
        let action = || "set a stage for read-only mounts";
        let guest = sys.open_folder(Path::new("/")).context(action)?;
        let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        sys.set_propagation(guest.as_fd(), private)
            .context(action)?;
        let place = sys.open_folder(Path::new(ELSEWHERE)).context(action)?;
        let (none, flags) = (Path::new("none"), MountFlags::empty());
        sys.mount(none, place.as_fd(), "tmpfs", flags, c"mode=755")
            .context(action)?;
        let floor = sys.open_folder(Path::new(ELSEWHERE)).context(action)?;
        for (index, source) in self.staged() {
            let name = PathBuf::from(index.to_string());
            let mode = Mode::from_raw_mode(0o755);
            let mount = source.mount.as_fd();
            match is_folder(sys, mount).context(action)? {
                true => sys.make_folder(floor.as_fd(), &name, mode),
                false => sys.make_file(floor.as_fd(), &name, mode),
            }
            .context(action)?;
            let place = sys.open_place(&on_stage(index)).context(action)?;
            sys.attach(mount, place.as_fd()).context(action)?;
        }
        Ok(())
    }

    fn staged(&self) -> impl Iterator<Item = (usize, &Source)> {
        let all = self.mounts.iter().enumerate();
        all.filter_map(|(index, source)| Some((index, source.as_ref().filter(|one| one.staged)?)))
    }

    /// In the container's process, while the stage can be seen: every source as a mount that can be
    /// attached, in the order of the plan's mounts.
    pub(super) fn take(&self, sys: &dyn Syscalls) -> Result<Vec<Option<Taken<'_>>>, Failure> {
        let mut taken = Vec::with_capacity(self.mounts.len());
        for (index, source) in self.mounts.iter().enumerate() {
            taken.push(match source {
                None => None,
                Some(source) if source.staged => {
                    let action = || "take over the source of a bind mount";
                    let place = sys.open_place(&on_stage(index)).context(action)?;
                    // With all below it: what covers something must not be taken off either.
                    let copy = sys.clone_mount(place.as_fd(), true).context(action)?;
                    Some(Taken::Copy(copy))
                }
                Some(source) => Some(Taken::Source(source.mount.as_fd())),
            });
        }
        Ok(taken)
    }

    /// The rootfs as a mount.
    pub(super) fn root(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }
}

/// A source in the container's process.
#[derive(Debug)]
pub(super) enum Taken<'a> {
    /// As it was opened.
    Source(BorrowedFd<'a>),
    /// A copy of what is on the stage.
    Copy(OwnedFd),
}

impl AsFd for Taken<'_> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Source(source) => *source,
            Self::Copy(copy) => copy.as_fd(),
        }
    }
}

fn on_stage(index: usize) -> PathBuf {
    Path::new(ELSEWHERE).join(index.to_string())
}

/// The agent is on a stage, for the moment of a clone. It must be left in any case.
#[must_use]
#[derive(Debug)]
pub struct Stage {
    home: OwnedFd,
}

impl Stage {
    /// Back to the agent's own mount namespace. The stage then goes with those who copied it.
    pub fn leave(self) -> Result<(), Failure> {
        let kind = Some(LinkNameSpaceType::Mount);
        rustix::thread::move_into_link_name_space(self.home.as_fd(), kind)
            .context(|| "come back to the agent's own mount namespace")
    }
}
