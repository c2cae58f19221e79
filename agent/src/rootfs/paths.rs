//! Places inside a container's root, created where they are missing.

use crate::error::{Context, Failure, Kind};
use crate::syscalls::Syscalls;
use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

/// What a missing place is created as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Missing {
    /// An empty folder.
    Folder,
    /// An empty file.
    File,
}

/// Opens `path` inside `root`, and creates it with the folders above it if it is missing.
pub fn open_or_create(
    sys: &dyn Syscalls,
    root: BorrowedFd<'_>,
    path: &Path,
    missing: impl FnOnce() -> rustix::io::Result<Missing>,
    resolve: ResolveFlags,
) -> Result<OwnedFd, Failure> {
    let action = || format!("open {} in the rootfs", path.display());
    match sys.open_in_root(root, path, OFlags::PATH, resolve) {
        Err(Errno::NOENT) => {}
        Err(Errno::LOOP) if resolve.contains(ResolveFlags::NO_SYMLINKS) => {
            return Err(Failure::new(
                Kind::InvalidArgument,
                format!(
                    "{} in the rootfs is reached over a symbolic link, which a mount of this type must not be",
                    path.display()
                ),
            ));
        }
        opened => return opened.context(action),
    }
    let kind = missing().context(|| format!("find out what to create {} as", path.display()))?;
    let name = path
        .file_name()
        .ok_or_else(|| Failure::internal(action(), Errno::NOENT))?;
    let parent = open_or_create_folder(sys, root, path.parent().unwrap_or(Path::new("/")))?;
    let created = match kind {
        Missing::Folder => {
            sys.make_folder(parent.as_fd(), name.as_ref(), Mode::from_raw_mode(0o755))
        }
        Missing::File => sys.make_file(parent.as_fd(), name.as_ref(), Mode::from_raw_mode(0o644)),
    };
    match created {
        Ok(()) => {}
        Err(Errno::EXIST) => return Err(dangling(path)),
        Err(error) => {
            return Err(Failure::internal(
                format!("create the mount point {} in the rootfs", path.display()),
                error,
            ));
        }
    }
    sys.open_in_root(root, path, OFlags::PATH, resolve)
        .context(action)
}

/// Opens a folder inside `root`, and creates it and those above it as far as they are missing.
pub fn open_or_create_folder(
    sys: &dyn Syscalls,
    root: BorrowedFd<'_>,
    path: &Path,
) -> Result<OwnedFd, Failure> {
    let flags = OFlags::PATH | OFlags::DIRECTORY;
    let none = ResolveFlags::empty();
    match sys.open_in_root(root, path, flags, none) {
        Err(Errno::NOENT) => {}
        opened => return opened.context(|| format!("open {} in the rootfs", path.display())),
    }
    let mut reached = PathBuf::from("/");
    let mut folder = sys
        .open_in_root(root, &reached, flags, none)
        .context(|| "open the rootfs")?;
    for part in path.components() {
        let Component::Normal(name) = part else {
            continue;
        };
        reached.push(name);
        folder = match sys.open_in_root(root, &reached, flags, none) {
            Err(Errno::NOENT) => {
                match sys.make_folder(folder.as_fd(), name.as_ref(), Mode::from_raw_mode(0o755)) {
                    Ok(()) => sys.open_in_root(root, &reached, flags, none),
                    Err(Errno::EXIST) => return Err(dangling(&reached)),
                    Err(error) => Err(error),
                }
            }
            opened => opened,
        }
        .context(|| format!("create the folder {} in the rootfs", reached.display()))?;
    }
    Ok(folder)
}

fn dangling(path: &Path) -> Failure {
    Failure::new(
        Kind::InvalidArgument,
        format!(
            "{} in the rootfs is a symbolic link to something that doesn't exist, so nothing can be mounted there",
            path.display()
        ),
    )
}
