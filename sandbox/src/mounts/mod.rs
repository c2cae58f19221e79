//! Mounts on the host: a task's root file system, what is bound into the share, and taking all of
//! it away again.

mod idmap;
mod layers;
mod memory;
mod mountinfo;
mod options;
mod rootfs;

pub(crate) use memory::MemoryVolume;
pub(crate) use mountinfo::{mounted_below, mounts_below};
pub use rootfs::RootfsMount;
pub(crate) use rootfs::mount_rootfs;

use crate::spec::Bind;
use bulkhead_proto::guest::SHARE_MOUNTS;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use std::ffi::CString;
use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// A mount that failed.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// The kernel refused.
    #[error("cannot {verb} {target}{from}: {cause}", target = .target.display())]
    Failed {
        /// What was tried.
        verb: &'static str,
        /// Where.
        target: PathBuf,
        /// " from SOURCE", or empty.
        from: String,
        /// Why.
        cause: io::Error,
    },
    /// An option that can't be honoured.
    #[error("cannot mount {target}: option {option:?}: {problem}", target = .target.display())]
    Option {
        /// Where.
        target: PathBuf,
        /// The option.
        option: String,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// There is no root file system.
    #[error(
        "the container's root file system {path} does not exist or is no folder: {cause}",
        path = .path.display()
    )]
    NoRootfs {
        /// Where it should be.
        path: PathBuf,
        /// Why it can't be used.
        cause: io::Error,
    },
    /// The table of mounts can't be read.
    #[error("cannot read /proc/self/mountinfo: {0}")]
    Mountinfo(io::Error),
}

fn failed(
    verb: &'static str,
    target: &Path,
    source: Option<&Path>,
    cause: impl Into<io::Error>,
) -> MountError {
    let from = source
        .map(|source| format!(" from {}", source.display()))
        .unwrap_or_default();
    MountError::Failed {
        verb,
        target: target.into(),
        from,
        cause: cause.into(),
    }
}

/// Binds `skeleton` read-only at `share`, as the root of what the guest sees: the host makes mount
/// points in the skeleton, the guest can make or swap none.
pub(crate) fn mount_share(skeleton: &Path, share: &Path) -> Result<(), MountError> {
    let bind = bind_flags(false);
    mount(Some(skeleton), share, None::<&str>, bind, None::<&str>)
        .map_err(|errno| failed("bind", share, Some(skeleton), errno))?;
    let finish = || {
        set_attributes(share, true, false)?;
        // Out of the peer group of the file system that it came from, or each later mount would
        // appear in the skeleton too; then shared anew, so that a VMM with a mount namespace of
        // its own receives the mounts that come later.
        for flags in [MsFlags::MS_PRIVATE, MsFlags::MS_SHARED] {
            mount(None::<&str>, share, None::<&str>, flags, None::<&str>)
                .map_err(|errno| failed("set the propagation of", share, None, errno))?;
        }
        Ok(())
    };
    finish().inspect_err(|_| unmount_logged(share))
}

/// Binds a container's root at `target` below the share.
pub(crate) fn bind_root_into_share(
    source: &Path,
    target: &Path,
    readonly: bool,
) -> Result<(), MountError> {
    bind_plainly(source, target, readonly, true, true)
}

/// Binds a bind mount's source at `target` below the share.
pub(crate) fn bind_into_share(bind: &Bind, target: &Path) -> Result<(), MountError> {
    match &bind.ids {
        Some(ids) => idmap::bind_mapped(bind, ids, target),
        None => bind_plainly(
            &bind.source,
            target,
            bind.readonly,
            bind.recursive,
            bind.follows,
        ),
    }
}

fn bind_plainly(
    source: &Path,
    target: &Path,
    readonly: bool,
    recursive: bool,
    follows: bool,
) -> Result<(), MountError> {
    let (flags, none) = (bind_flags(recursive), None::<&str>);
    bind_into_share_with(target, readonly, recursive, follows, || {
        mount(Some(source), target, none, flags, none)
            .map_err(|errno| failed("bind", target, Some(source), errno))
    })
}

/// Has `attach` put a mount at `target` below the share, and makes it fit to be there.
fn bind_into_share_with(
    target: &Path,
    readonly: bool,
    recursive: bool,
    follows: bool,
    attach: impl FnOnce() -> Result<(), MountError>,
) -> Result<(), MountError> {
    attach()?;
    let finish = || {
        // A slave sees what the host mounts there later. With either, unmounting here takes nothing
        // away from the host.
        let mut kind = match follows {
            true => MsFlags::MS_SLAVE,
            false => MsFlags::MS_PRIVATE,
        };
        kind.set(MsFlags::MS_REC, recursive);
        mount(None::<&str>, target, None::<&str>, kind, None::<&str>)
            .map_err(|errno| failed("set the propagation of", target, None, errno))?;
        set_attributes(target, readonly, recursive)
    };
    finish().inspect_err(|_| unmount_logged(target))
}

/// Mounts a tmpfs for the POSIX shared memory of a pod: of the size that daemons give it.
pub(crate) fn mount_shm(target: &Path) -> Result<(), MountError> {
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let options = Some("mode=1777,size=65536k");
    mount(Some("shm"), target, Some("tmpfs"), flags, options)
        .map_err(|errno| failed("mount", target, None, errno))
}

/// Makes the mount points of a container in the skeleton.
pub(crate) fn make_mount_points(folder: &Path, binds: &[Bind]) -> io::Result<()> {
    let mounts = folder.join(SHARE_MOUNTS);
    fs::create_dir(folder)?;
    fs::create_dir(folder.join("rootfs"))?;
    fs::create_dir(&mounts)?;
    for bind in binds.iter().filter(|bind| bind.volume.is_none()) {
        let target = mounts.join(bind.name());
        if bind.is_dir {
            fs::create_dir(target)?;
        } else {
            OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(target)?;
        }
    }
    Ok(())
}

/// Unmounts everything at and below `path`, newest first. Idempotent.
pub(crate) fn unmount_tree(path: &Path) -> Result<(), MountError> {
    // More than one round: a mount can hide another at the same place.
    for _ in 0..8 {
        let mounts = mounts_below(path)?;
        if mounts.is_empty() {
            return Ok(());
        }
        for target in mounts.iter().rev() {
            match umount2(target, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
                // EINVAL: it went away with its parent.
                Ok(()) | Err(nix::errno::Errno::EINVAL | nix::errno::Errno::ENOENT) => {}
                Err(errno) => return Err(failed("unmount", target, None, errno)),
            }
        }
    }
    match mounts_below(path)?.first() {
        None => Ok(()),
        Some(left) => {
            let cause = io::Error::other("something keeps mounting there");
            Err(failed("unmount", left, None, cause))
        }
    }
}

fn unmount_logged(path: &Path) {
    if let Err(error) = unmount_tree(path) {
        tracing::warn!(%error, "undoing a mount failed");
    }
}

fn bind_flags(recursive: bool) -> MsFlags {
    if recursive {
        MsFlags::MS_BIND | MsFlags::MS_REC
    } else {
        MsFlags::MS_BIND
    }
}

/// Sets nosuid and nodev, and read-only where asked for: the VMM serves these files to a guest
/// that may have broken it, so device nodes must not open and nothing read-only be writable.
fn set_attributes(target: &Path, readonly: bool, recursive: bool) -> Result<(), MountError> {
    let fail = |cause: io::Error| failed("set the attributes of", target, None, cause);
    let path = CString::new(target.as_os_str().as_bytes()).map_err(|e| fail(e.into()))?;
    let mut attributes = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV;
    if readonly {
        attributes |= libc::MOUNT_ATTR_RDONLY;
    }
    // SAFETY: mount_attr is plain data for which all zeroes is valid.
    let mut request: libc::mount_attr = unsafe { std::mem::zeroed() };
    request.attr_set = attributes;
    let flags = if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: `path` is a C string and `request` a mount_attr of the size given; both outlive the
    // call, which only reads them.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            libc::AT_FDCWD,
            path.as_ptr(),
            flags,
            &raw const request,
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(fail(io::Error::last_os_error()))
    }
}
