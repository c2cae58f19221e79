//! The system calls with which a root file system is put together, as a trait, so that tests can
//! record them instead of needing root and a mount namespace.
//!
//! Places are always given as descriptors that were opened inside the container's root, never as
//! paths that someone could redirect.

#[cfg(test)]
pub mod recorder;

use crate::rootfs::Attributes;
use rustix::fs::{Dev, FileType, Gid, Mode, OFlags, ResolveFlags, Stat, Uid};
use rustix::io::Result;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MountPropagationFlags, MoveMountFlags,
    OpenTreeFlags, UnmountFlags,
};
use std::ffi::{CStr, CString};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

/// What set-up asks of the kernel.
pub trait Syscalls {
    /// Opens `path` as if `root` were `/` (openat2 with RESOLVE_IN_ROOT): no symbolic link and no
    /// `..` leads out of it. `flags` and `resolve` are added to the ones that this always has.
    fn open_in_root(
        &self,
        root: BorrowedFd<'_>,
        path: &Path,
        flags: OFlags,
        resolve: ResolveFlags,
    ) -> Result<OwnedFd>;
    /// Opens `path` in the guest itself, as a place only.
    fn open_place(&self, path: &Path) -> Result<OwnedFd>;
    /// Opens the folder `path` in the guest itself, as a place only.
    fn open_folder(&self, path: &Path) -> Result<OwnedFd>;
    /// Creates the folder `name` in `parent`.
    fn make_folder(&self, parent: BorrowedFd<'_>, name: &Path, mode: Mode) -> Result<()>;
    /// Creates the empty file `name` in `parent`.
    fn make_file(&self, parent: BorrowedFd<'_>, name: &Path, mode: Mode) -> Result<()>;
    /// Creates the device or FIFO `name` in `parent`.
    fn make_node(
        &self,
        parent: BorrowedFd<'_>,
        name: &Path,
        kind: FileType,
        mode: Mode,
        device: Dev,
    ) -> Result<()>;
    /// Changes the owner of `name` in `parent`.
    fn change_owner(&self, parent: BorrowedFd<'_>, name: &Path, uid: u32, gid: u32) -> Result<()>;
    /// Creates a symbolic link `name` in `parent`.
    fn make_link(&self, target: &Path, parent: BorrowedFd<'_>, name: &Path) -> Result<()>;
    /// Removes the file `name` from `parent`.
    fn remove_file(&self, parent: BorrowedFd<'_>, name: &Path) -> Result<()>;
    /// What `place` is.
    fn stat(&self, place: BorrowedFd<'_>) -> Result<Stat>;
    /// Mounts a new file system on `place`.
    fn mount(
        &self,
        source: &Path,
        place: BorrowedFd<'_>,
        kind: &str,
        flags: MountFlags,
        data: &CStr,
    ) -> Result<()>;
    /// A detached mount of a new instance of a file system, as the caller's namespaces have it.
    fn new_mount(&self, kind: &str) -> Result<OwnedFd>;
    /// A detached copy of the mount at `place`, with those below it if `recursive`.
    fn clone_mount(&self, place: BorrowedFd<'_>, recursive: bool) -> Result<OwnedFd>;
    /// Changes what may be done on a mount (mount_setattr).
    fn set_attributes(
        &self,
        mount: BorrowedFd<'_>,
        attributes: Attributes,
        recursive: bool,
    ) -> Result<()>;
    /// Puts a detached mount on `place`.
    fn attach(&self, mount: BorrowedFd<'_>, place: BorrowedFd<'_>) -> Result<()>;
    /// Changes how mounts and unmounts propagate from and to the mount at `place`.
    fn set_propagation(&self, place: BorrowedFd<'_>, flags: MountPropagationFlags) -> Result<()>;
    /// Makes `root` the root of this mount namespace and takes the old one away.
    fn pivot(&self, root: BorrowedFd<'_>) -> Result<()>;
    /// Like [`Self::set_propagation`], of `/` after the pivot.
    fn set_root_propagation(&self, flags: MountPropagationFlags) -> Result<()>;
}

/// The running kernel.
#[derive(Debug, Clone, Copy)]
pub struct Linux;

impl Syscalls for Linux {
    fn open_in_root(
        &self,
        root: BorrowedFd<'_>,
        path: &Path,
        flags: OFlags,
        resolve: ResolveFlags,
    ) -> Result<OwnedFd> {
        // The kernel gives up with EAGAIN when something was renamed meanwhile.
        loop {
            let opened = rustix::fs::openat2(
                root,
                path,
                flags | OFlags::CLOEXEC,
                Mode::empty(),
                resolve | ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS,
            );
            if !matches!(opened, Err(rustix::io::Errno::AGAIN)) {
                return opened;
            }
        }
    }

    fn open_place(&self, path: &Path) -> Result<OwnedFd> {
        rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
    }

    fn open_folder(&self, path: &Path) -> Result<OwnedFd> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        rustix::fs::open(path, flags, Mode::empty())
    }

    fn make_folder(&self, parent: BorrowedFd<'_>, name: &Path, mode: Mode) -> Result<()> {
        rustix::fs::mkdirat(parent, name, mode)
    }

    fn make_file(&self, parent: BorrowedFd<'_>, name: &Path, mode: Mode) -> Result<()> {
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        rustix::fs::openat(parent, name, flags | OFlags::WRONLY, mode).map(drop)
    }

    fn make_node(
        &self,
        parent: BorrowedFd<'_>,
        name: &Path,
        kind: FileType,
        mode: Mode,
        device: Dev,
    ) -> Result<()> {
        rustix::fs::mknodat(parent, name, kind, mode, device)
    }

    fn change_owner(&self, parent: BorrowedFd<'_>, name: &Path, uid: u32, gid: u32) -> Result<()> {
        rustix::fs::chownat(
            parent,
            name,
            Some(Uid::from_raw(uid)),
            Some(Gid::from_raw(gid)),
            rustix::fs::AtFlags::SYMLINK_NOFOLLOW,
        )
    }

    fn make_link(&self, target: &Path, parent: BorrowedFd<'_>, name: &Path) -> Result<()> {
        rustix::fs::symlinkat(target, parent, name)
    }

    fn remove_file(&self, parent: BorrowedFd<'_>, name: &Path) -> Result<()> {
        rustix::fs::unlinkat(parent, name, rustix::fs::AtFlags::empty())
    }

    fn stat(&self, place: BorrowedFd<'_>) -> Result<Stat> {
        rustix::fs::fstat(place)
    }

    fn mount(
        &self,
        source: &Path,
        place: BorrowedFd<'_>,
        kind: &str,
        flags: MountFlags,
        data: &CStr,
    ) -> Result<()> {
        let data = Some(data).filter(|data| !data.is_empty());
        rustix::mount::mount(source, path_of(place), kind, flags, data)
    }

    fn new_mount(&self, kind: &str) -> Result<OwnedFd> {
        let context = rustix::mount::fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
        rustix::mount::fsconfig_create(&context)?;
        let (flags, attributes) = (FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty());
        rustix::mount::fsmount(&context, flags, attributes)
    }

    fn clone_mount(&self, place: BorrowedFd<'_>, recursive: bool) -> Result<OwnedFd> {
        let mut flags = OpenTreeFlags::OPEN_TREE_CLONE
            | OpenTreeFlags::OPEN_TREE_CLOEXEC
            | OpenTreeFlags::AT_EMPTY_PATH;
        if recursive {
            flags |= OpenTreeFlags::AT_RECURSIVE;
        }
        rustix::mount::open_tree(place, c"", flags)
    }

    fn set_attributes(
        &self,
        mount: BorrowedFd<'_>,
        attributes: Attributes,
        recursive: bool,
    ) -> Result<()> {
        let mut flags = libc::AT_EMPTY_PATH;
        if recursive {
            flags |= libc::AT_RECURSIVE;
        }
        let request = libc::mount_attr {
            attr_set: attributes.set,
            attr_clr: attributes.clear,
            propagation: 0,
            userns_fd: 0,
        };
        // SAFETY: the kernel reads an empty path and a mount_attr of the given size, which both
        // live across the call.
        let changed = unsafe {
            libc::syscall(
                libc::SYS_mount_setattr,
                mount.as_raw_fd(),
                c"".as_ptr(),
                flags,
                &raw const request,
                size_of::<libc::mount_attr>(),
            )
        };
        match changed {
            0 => Ok(()),
            _ => Err(last_error()),
        }
    }

    fn attach(&self, mount: BorrowedFd<'_>, place: BorrowedFd<'_>) -> Result<()> {
        rustix::mount::move_mount(
            mount,
            c"",
            place,
            c"",
            MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH,
        )
    }

    fn set_propagation(&self, place: BorrowedFd<'_>, flags: MountPropagationFlags) -> Result<()> {
        rustix::mount::mount_change(path_of(place), flags)
    }

    fn pivot(&self, root: BorrowedFd<'_>) -> Result<()> {
        rustix::process::fchdir(root)?;
        // With the same folder twice the old root ends up mounted on the new one, where nothing
        // has to exist for it (pivot_root(2)).
        rustix::process::pivot_root(c".", c".")?;
        rustix::mount::unmount(c".", UnmountFlags::DETACH)?;
        rustix::process::chdir(c"/")
    }

    fn set_root_propagation(&self, flags: MountPropagationFlags) -> Result<()> {
        rustix::mount::mount_change(c"/", flags)
    }
}

/// The error of the last libc call.
pub fn last_error() -> rustix::io::Errno {
    std::io::Error::last_os_error()
        .raw_os_error()
        .map_or(rustix::io::Errno::IO, rustix::io::Errno::from_raw_os_error)
}

/// mount(2) takes no descriptors. Until the root is pivoted this is the guest's own /proc.
fn path_of(place: BorrowedFd<'_>) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", place.as_raw_fd()))
}

/// `text` for a system call; what contains NUL bytes has been refused before.
pub fn c_string(text: &str) -> CString {
    CString::new(text).unwrap_or_default()
}
