//! Disks of containers: files and block devices of the host's that the guest has as virtio-blk, for
//! roots that come as images and for volumes. What is on a disk is declared by whoever names it,
//! and never looked at on the host: its bytes are the guest's.

mod attach;
mod format;
mod root;
pub(crate) mod upper;
pub(crate) mod volumes;
mod writable;

pub(crate) use attach::Attached;
pub(crate) use root::DiskRoot;
pub(crate) use writable::WritableLimit;

use crate::Kind;
use bulkhead_proto::guest::DISKS;
use sha2::{Digest, Sha256};
use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// File systems that the guest's kernel has for disks.
const FILE_SYSTEMS: [&str; 4] = ["erofs", "ext4", "ext3", "ext2"];

/// A disk that can't be used.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// What describes it makes no sense, or asks for what can't be done.
    #[error("cannot attach {what} as a disk: {problem}")]
    Refused {
        /// The mount, or the path.
        what: String,
        /// What is wrong with it, and what to do.
        problem: String,
    },
    /// It can't be opened.
    #[error("cannot open the disk {path}: {cause}", path = .path.display())]
    Open {
        /// The file or device.
        path: PathBuf,
        /// Why.
        cause: io::Error,
    },
    /// The VMM or the guest didn't take it.
    #[error("cannot attach the disk {path}: {cause}", path = .path.display())]
    NotAttached {
        /// The file or device.
        path: PathBuf,
        /// Why.
        cause: String,
    },
    /// It can't be made.
    #[error("cannot make the disk {path}: {cause}", path = .path.display())]
    NotMade {
        /// The file.
        path: PathBuf,
        /// Why.
        cause: String,
    },
    /// Somebody else writes to it.
    #[error(
        "the disk {path} is in use by another virtual machine or by the host, and a file system that \
         two write to is soon lost; stop the other one first",
        path = .path.display()
    )]
    InUse {
        /// The file or device.
        path: PathBuf,
    },
}

impl DiskError {
    pub(crate) fn kind(&self) -> Kind {
        match self {
            DiskError::Refused { .. } => Kind::Unimplemented,
            DiskError::Open { .. } | DiskError::NotAttached { .. } | DiskError::NotMade { .. } => {
                Kind::Unknown
            }
            DiskError::InUse { .. } => Kind::FailedPrecondition,
        }
    }
}

/// One disk, and how the guest finds it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Disk {
    /// A file or a block device on the host.
    pub path: PathBuf,
    /// The guest can't write to it.
    pub read_only: bool,
    /// Serial number: unique in the pod.
    pub serial: String,
}

impl Disk {
    /// The `number`th disk of what is named `owner` in the pod.
    pub fn new(path: &Path, read_only: bool, owner: &str, number: usize) -> Self {
        // A serial number has 20 characters, an id up to 76.
        let digest = Sha256::digest(owner);
        let digest: String = digest.iter().take(6).map(|b| format!("{b:02x}")).collect();
        Self {
            path: path.to_owned(),
            read_only,
            serial: format!("{digest}-{number}"),
        }
    }

    /// Its node in the guest.
    pub fn in_guest(&self) -> PathBuf {
        Path::new(DISKS).join(&self.serial)
    }

    /// Whether there is a file or a block device of this name.
    pub fn exists(path: &Path) -> bool {
        let kind = path.metadata().map(|found| found.file_type());
        kind.is_ok_and(|kind| kind.is_file() || kind.is_block_device())
    }

    /// Opens it. One that is written to has no other user: files are locked for as long as the
    /// VMM has the descriptor, block devices claimed from the host's kernel.
    pub fn open(&self) -> Result<File, DiskError> {
        let path = || self.path.clone();
        let failed = |cause: io::Error| match cause.raw_os_error() {
            Some(libc::EBUSY) => DiskError::InUse { path: path() },
            _ => DiskError::Open {
                path: path(),
                cause,
            },
        };
        // What is looked at is what is opened then, whatever the path leads to by that time.
        let found = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_PATH)
            .open(&self.path)
            .map_err(failed)?;
        let kind = found.metadata().map_err(failed)?.file_type();
        let device = kind.is_block_device();
        if !device && !kind.is_file() {
            let problem = "it is neither a file nor a block device".into();
            let what = self.path.display().to_string();
            return Err(DiskError::Refused { what, problem });
        }
        let mut flags = libc::O_NONBLOCK;
        if device && !self.read_only {
            flags |= libc::O_EXCL;
        }
        let file = OpenOptions::new()
            .read(true)
            .write(!self.read_only)
            .custom_flags(flags)
            .open(format!("/proc/self/fd/{}", found.as_raw_fd()))
            .map_err(failed)?;
        if device {
            return Ok(file);
        }
        // Given up with the last descriptor of this open file, which is the VMM's.
        let locked = match self.read_only {
            true => file.try_lock_shared(),
            false => file.try_lock(),
        };
        match locked {
            Ok(()) => Ok(file),
            Err(TryLockError::WouldBlock) => Err(DiskError::InUse { path: path() }),
            Err(TryLockError::Error(cause)) => Err(failed(cause)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn serial_numbers_fit_and_differ() {
        let of = |owner: &str, number| Disk::new(Path::new("/x"), true, owner, number).serial;
        let long = "x".repeat(76);
        assert!(of(&long, 511).len() <= 20);
        assert_ne!(of("a", 1), of("b", 1));
        assert_ne!(of("a", 1), of("a", 2));
    }

    #[test]
    fn a_disk_has_one_writer() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        std::fs::write(&path, [0; 512]).unwrap();
        let disk = |read_only| Disk::new(&path, read_only, "c1", 0);
        let writer = disk(false).open().unwrap();
        // As the VMM gets it.
        let passed = writer.try_clone().unwrap();
        drop(writer);
        for read_only in [true, false] {
            let error = disk(read_only).open().unwrap_err();
            assert!(matches!(error, DiskError::InUse { .. }), "{error}");
        }
        drop(passed);
        let readers = [disk(true).open().unwrap(), disk(true).open().unwrap()];
        assert!(disk(false).open().is_err());
        drop(readers);
        disk(false).open().unwrap();
        let fifo = dir.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        for other in [dir.path(), &fifo, Path::new("/dev/null")] {
            let error = Disk::new(other, true, "c1", 0).open().unwrap_err();
            assert!(error.to_string().contains("neither"), "{error}");
        }
        let missing = Disk::new(&dir.path().join("none"), true, "c1", 0).open();
        assert!(missing.unwrap_err().to_string().contains("/none"));
    }
}
