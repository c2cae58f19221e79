//! Device nodes and the links beside them.

use super::paths::{Missing, open_or_create, open_or_create_folder};
use crate::error::{Context, Failure};
use crate::spec::absolute_path;
use crate::syscalls::Syscalls;
use oci_spec::runtime::{LinuxDevice, LinuxDeviceType};
use rustix::fs::{Dev, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

/// The devices of the runtime spec's "Default Devices", all with major number 1 but the last.
const DEFAULT: [(&str, u32, u32); 6] = [
    ("null", 1, 3),
    ("zero", 1, 5),
    ("full", 1, 7),
    ("random", 1, 8),
    ("urandom", 1, 9),
    ("tty", 5, 0),
];

/// Its "Dev symbolic links", and the multiplexer of the container's own devpts.
const LINKS: [(&str, &str); 5] = [
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("ptmx", "pts/ptmx"),
];

/// A device of the spec's.
#[derive(Debug, Clone)]
pub struct DevicePlan {
    path: PathBuf,
    kind: FileType,
    device: Dev,
    mode: u32,
    uid: u32,
    gid: u32,
}

impl DevicePlan {
    /// Checks an entry of `linux.devices`.
    pub fn new(device: &LinuxDevice) -> Result<Self, Failure> {
        let path = absolute_path("linux.devices", device.path())?;
        if path.file_name().is_none() {
            return Err(Failure::invalid(
                "linux.devices",
                format!("{path:?} names no file"),
            ));
        }
        let kind = match device.typ() {
            LinuxDeviceType::C | LinuxDeviceType::U => FileType::CharacterDevice,
            LinuxDeviceType::B => FileType::BlockDevice,
            LinuxDeviceType::P => FileType::Fifo,
            LinuxDeviceType::A => {
                return Err(Failure::invalid(
                    "linux.devices",
                    format!(
                        "{}: type a can't be made, only c, u, b and p",
                        path.display()
                    ),
                ));
            }
        };
        // Linux device numbers have 12 bits of major and 20 of minor.
        let number = |name: &str, value: i64, bits: u32| {
            u32::try_from(value)
                .ok()
                .filter(|value| *value < 1 << bits)
                .ok_or_else(|| {
                    Failure::invalid(
                        "linux.devices",
                        format!("{}: {name} {value} is not a device number", path.display()),
                    )
                })
        };
        Ok(Self {
            path: path.to_owned(),
            kind,
            device: rustix::fs::makedev(
                number("major", device.major(), 12)?,
                number("minor", device.minor(), 20)?,
            ),
            mode: device.file_mode().unwrap_or(0o666) & 0o7777,
            uid: device.uid().unwrap_or(0),
            gid: device.gid().unwrap_or(0),
        })
    }

    /// Makes it inside `root`.
    pub fn make(&self, sys: &dyn Syscalls, root: BorrowedFd<'_>) -> Result<(), Failure> {
        let parent = self.path.parent().unwrap_or(Path::new("/"));
        let folder = open_or_create_folder(sys, root, parent)?;
        self.make_in(sys, root, folder.as_fd())
    }

    fn make_in(
        &self,
        sys: &dyn Syscalls,
        root: BorrowedFd<'_>,
        folder: BorrowedFd<'_>,
    ) -> Result<(), Failure> {
        let name = Path::new(self.path.file_name().unwrap_or_default());
        let made = sys.make_node(
            folder,
            name,
            self.kind,
            Mode::from_raw_mode(self.mode),
            self.device,
        );
        match made {
            Ok(()) if (self.uid, self.gid) != (0, 0) => sys
                .change_owner(folder, name, self.uid, self.gid)
                .context(|| format!("linux.devices: set the owner of {}", self.path.display())),
            Ok(()) => Ok(()),
            Err(Errno::EXIST) if self.exists(sys, root) => Ok(()),
            // The file system takes no device nodes (virtio-fs), or something else is there: the
            // guest's own node is mounted on it.
            Err(Errno::PERM | Errno::EXIST | Errno::OPNOTSUPP) => self.bind(sys, root),
            Err(error) => Err(Failure::internal(
                format!("create the device {} in the rootfs", self.path.display()),
                error,
            )),
        }
    }

    fn exists(&self, sys: &dyn Syscalls, root: BorrowedFd<'_>) -> bool {
        sys.open_in_root(
            root,
            &self.path,
            OFlags::PATH | OFlags::NOFOLLOW,
            ResolveFlags::empty(),
        )
        .and_then(|node| sys.stat(node.as_fd()))
        .is_ok_and(|stat| {
            FileType::from_raw_mode(stat.st_mode) == self.kind && stat.st_rdev == self.device
        })
    }

    fn bind(&self, sys: &dyn Syscalls, root: BorrowedFd<'_>) -> Result<(), Failure> {
        let action = || {
            format!(
                "mount the guest's {0} on {0} in the rootfs",
                self.path.display()
            )
        };
        let node = sys.open_place(&self.path).context(action)?;
        let stat = sys.stat(node.as_fd()).context(action)?;
        if FileType::from_raw_mode(stat.st_mode) != self.kind || stat.st_rdev != self.device {
            return Err(Failure::internal(action(), "the guest's is another device"));
        }
        let copy = sys.clone_mount(node.as_fd(), false).context(action)?;
        let place = open_or_create(
            sys,
            root,
            &self.path,
            || Ok(Missing::File),
            ResolveFlags::empty(),
        )?;
        sys.attach(copy.as_fd(), place.as_fd()).context(action)
    }
}

/// Makes what the spec demands in every container's /dev.
pub fn make_default(sys: &dyn Syscalls, root: BorrowedFd<'_>) -> Result<(), Failure> {
    let folder = open_or_create_folder(sys, root, Path::new("/dev"))?;
    for (name, major, minor) in DEFAULT {
        let device = DevicePlan {
            path: Path::new("/dev").join(name),
            kind: FileType::CharacterDevice,
            device: rustix::fs::makedev(major, minor),
            mode: 0o666,
            uid: 0,
            gid: 0,
        };
        device.make_in(sys, root, folder.as_fd())?;
    }
    for (name, target) in LINKS {
        let link = || sys.make_link(Path::new(target), folder.as_fd(), Path::new(name));
        let made = match link() {
            // The image brings its own; /dev/ptmx of an image would be the guest's.
            Err(Errno::EXIST) => sys
                .remove_file(folder.as_fd(), Path::new(name))
                .and_then(|()| link()),
            made => made,
        };
        made.context(|| format!("create the link /dev/{name} in the rootfs"))?;
    }
    Ok(())
}
