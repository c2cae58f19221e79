//! FUSE_SYNCFS: what sync(2) and syncfs(2) become in the guest. The server that this device is built
//! on lacks it, and without an answer Linux takes the file system for one with nothing to write.

use bulkhead_proto::guest::SHARE_MOUNTS;
use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// FUSE's number of it (linux/fuse.h).
pub const SYNCFS: u32 = 50;

/// Has the host write out each file system whose mount is a container's root or volume. What is
/// mounted below a volume in turn is written by fsync(2) of its files only.
pub fn sync_all(share: BorrowedFd<'_>) -> io::Result<()> {
    let root = PathBuf::from(format!("/proc/self/fd/{}", share.as_raw_fd()));
    let mut synced = BTreeSet::new();
    for container in entries(&root)? {
        let volumes = entries(&container.join(SHARE_MOUNTS))?;
        for path in volumes.into_iter().chain([container.join("rootfs")]) {
            // Names that the host has made and the guest can't change.
            let Some(file) = open(&path)? else { continue };
            if synced.insert(file.metadata()?.dev()) {
                sync(&file)?;
            }
        }
    }
    Ok(())
}

fn sync(file: &File) -> io::Result<()> {
    // SAFETY: takes no pointers.
    match unsafe { libc::syncfs(file.as_raw_fd()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// None if it has just been taken away.
fn open(path: &Path) -> io::Result<Option<File>> {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    match OpenOptions::new().read(true).custom_flags(flags).open(path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// The entries of a folder; none if there is no such folder.
fn entries(folder: &Path) -> io::Result<Vec<PathBuf>> {
    match fs::read_dir(folder) {
        Ok(all) => all.map(|entry| Ok(entry?.path())).collect(),
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            Ok(Vec::new())
        }
        Err(error) => Err(error),
    }
}
