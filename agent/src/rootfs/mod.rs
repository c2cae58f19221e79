//! The root file system of a container: from its plan to `pivot_root`.
//!
//! Runs in the container's first process, in a new mount namespace that is still a copy of the
//! guest's. Nothing here follows a path out of the container's root: places inside it are opened
//! with RESOLVE_IN_ROOT and then used by descriptor (CVE-2021-30465, CVE-2019-19921 and others of
//! runc's came from using paths twice).

mod copy_up;
mod devices;
mod mounts;
mod options;
mod paths;
mod sources;
#[cfg(test)]
mod tests;

pub use devices::DevicePlan;
pub use mounts::MountPlan;
pub use options::{Attributes, MountOptions};
pub use sources::Sources;

use crate::error::{Context, Failure, Kind};
use crate::spec::absolute_path;
use crate::syscalls::Syscalls;
use oci_spec::runtime::Spec;
use rustix::fs::{FileType, OFlags, ResolveFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, MountPropagationFlags};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

/// What a container sees of the file system.
#[derive(Debug, Clone)]
pub struct RootfsPlan {
    /// Folder in the guest.
    pub path: PathBuf,
    /// Nothing may be written outside of mounts.
    pub readonly: bool,
    /// Propagation of the root mount, set at the end.
    pub propagation: Option<MountPropagationFlags>,
    /// In the order in which they are made.
    pub mounts: Vec<MountPlan>,
    /// Devices beyond the default ones.
    pub devices: Vec<DevicePlan>,
    /// The default devices are made; not so when /dev is a bind mount, whose content is its own.
    pub default_devices: bool,
    /// Made invisible.
    pub masked: Vec<PathBuf>,
    /// Made read-only.
    pub readonly_paths: Vec<PathBuf>,
}

/// A folder that every guest has and every user can reach.
const ELSEWHERE: &str = "/tmp";

impl RootfsPlan {
    /// Checks `root`, `mounts` and those fields of `linux` that are about files.
    pub fn new(spec: &Spec, own_cgroups: bool, terminal: bool) -> Result<Self, Failure> {
        let root = spec
            .root()
            .as_ref()
            .ok_or_else(|| Failure::invalid("root", "missing; a container needs a root"))?;
        let linux = spec.linux().as_ref();
        let mut mounts = Vec::new();
        for (index, mount) in spec.mounts().iter().flatten().enumerate() {
            mounts.push(MountPlan::new(index, mount, own_cgroups)?);
        }
        let terminals = Path::new("/dev/pts");
        if terminal && !mounts.iter().any(|mount| mount.destination == terminals) {
            mounts.push(MountPlan::terminals());
        }
        let default_devices = !mounts
            .iter()
            .any(|mount| mount.destination == Path::new("/dev") && mount.is_bind());
        let mut devices = Vec::new();
        for device in linux
            .and_then(|linux| linux.devices().as_ref())
            .into_iter()
            .flatten()
        {
            devices.push(DevicePlan::new(device)?);
        }
        let paths = |field: &str, list: Option<&Vec<String>>| -> Result<Vec<PathBuf>, Failure> {
            list.into_iter()
                .flatten()
                .map(|path| Ok(absolute_path(field, Path::new(path))?.to_owned()))
                .collect()
        };
        let propagation = match linux.and_then(|linux| linux.rootfs_propagation().as_deref()) {
            None | Some("") => None,
            Some(name) => Some(options::propagation(name).ok_or_else(|| {
                Failure::invalid("linux.rootfsPropagation", format!("{name:?} is unknown"))
            })?),
        };
        Ok(Self {
            path: absolute_path("root.path", root.path())?.to_owned(),
            readonly: root.readonly().unwrap_or(false),
            propagation,
            mounts,
            devices,
            default_devices,
            masked: paths(
                "linux.maskedPaths",
                linux.and_then(|linux| linux.masked_paths().as_ref()),
            )?,
            readonly_paths: paths(
                "linux.readonlyPaths",
                linux.and_then(|linux| linux.readonly_paths().as_ref()),
            )?,
        })
    }

    /// Puts everything together and makes it the root of this mount namespace. `cgroup` is the
    /// folder of the container's cgroup in the guest. Returns the new root.
    pub fn enter(
        &self,
        sys: &dyn Syscalls,
        cgroup: Option<&Path>,
        sources: Option<&Sources>,
    ) -> Result<OwnedFd, Failure> {
        // Nothing that happens here may show up in the guest. Without propagation into the
        // container either, unless the spec wants it, mounts need no further change later.
        let wants_propagation =
            self.propagation.is_some() || self.mounts.iter().any(MountPlan::wants_propagation);
        let mode = if wants_propagation {
            MountPropagationFlags::DOWNSTREAM
        } else {
            MountPropagationFlags::PRIVATE
        };
        let guest = sys
            .open_folder(Path::new("/"))
            .context(|| "open the guest's root")?;
        sys.set_propagation(guest.as_fd(), mode | MountPropagationFlags::REC)
            .context(|| "cut the container's mounts off from the guest's")?;
        let opened = match sources {
            Some(sources) => sources.take(sys)?,
            None => Vec::new(),
        };
        let root = self.mount_root(sys, sources)?;
        if sources.is_some() {
            // Cloned in the guest, so still one with the guest's own.
            sys.set_propagation(root.as_fd(), mode | MountPropagationFlags::REC)
                .context(|| "cut the rootfs off from the guest's mounts")?;
        }
        for (index, mount) in self.mounts.iter().enumerate() {
            let source = opened.get(index).and_then(Option::as_ref);
            let source = source.map(AsFd::as_fd);
            mount.make(sys, root.as_fd(), (cgroup, source), wants_propagation)?;
        }
        if self.default_devices {
            devices::make_default(sys, root.as_fd())?;
        }
        for device in &self.devices {
            device.make(sys, root.as_fd())?;
        }
        for path in &self.readonly_paths {
            make_readonly(sys, root.as_fd(), path)?;
        }
        for path in &self.masked {
            mask(sys, root.as_fd(), path)?;
        }
        sys.pivot(root.as_fd())
            .context(|| "make the rootfs the root")?;
        if let Some(propagation) = self.propagation {
            sys.set_root_propagation(propagation)
                .context(|| "linux.rootfsPropagation: set it")?;
        }
        Ok(root)
    }

    /// `pivot_root` needs a mount, so the folder is mounted on itself; or, when it is out of reach,
    /// on any other that the container will not see.
    fn mount_root(
        &self,
        sys: &dyn Syscalls,
        sources: Option<&Sources>,
    ) -> Result<OwnedFd, Failure> {
        let action = || format!("mount the rootfs {}", self.path.display());
        let (place, tree) = match sources {
            Some(sources) => {
                let place = sys.open_folder(Path::new(ELSEWHERE)).context(action)?;
                (place, sources.root().try_clone_to_owned().context(action)?)
            }
            None => self.open_root(sys)?,
        };
        sys.attach(tree.as_fd(), place.as_fd()).context(action)?;
        // The descriptor of the clone now stands for the root of the attached mount.
        Ok(tree)
    }

    /// The folder, and a clone of what is mounted there.
    fn open_root(&self, sys: &dyn Syscalls) -> Result<(OwnedFd, OwnedFd), Failure> {
        let path = &self.path;
        let missing = |error: Errno| match error {
            Errno::NOENT | Errno::NOTDIR => Failure::new(
                Kind::NotFound,
                format!(
                    "root.path: there is no folder {} in the guest",
                    path.display()
                ),
            ),
            other => Failure::internal(format!("open the rootfs {}", path.display()), other),
        };
        let place = sys.open_folder(path).map_err(missing)?;
        let tree = sys
            .clone_mount(place.as_fd(), true)
            .context(|| format!("clone the mount of the rootfs {}", path.display()))?;
        Ok((place, tree))
    }

    /// What would have been in the way before. `root` is the new root.
    pub fn finish(&self, sys: &dyn Syscalls, root: BorrowedFd<'_>) -> Result<(), Failure> {
        if self.readonly {
            sys.set_attributes(root, Attributes::READONLY, false)
                .context(|| "make the rootfs read-only")?;
        }
        Ok(())
    }
}

/// Covers a path with nothing: a file with /dev/null, a folder with an empty read-only tmpfs.
fn mask(sys: &dyn Syscalls, root: BorrowedFd<'_>, path: &Path) -> Result<(), Failure> {
    let action = || format!("linux.maskedPaths: mask {}", path.display());
    let place = match sys.open_in_root(root, path, OFlags::PATH, ResolveFlags::empty()) {
        Ok(place) => place,
        Err(Errno::NOENT | Errno::NOTDIR) => return Ok(()),
        Err(error) => return Err(Failure::internal(action(), error)),
    };
    // The guest's own /dev/null, which no container can have replaced (CVE-2025-31133).
    match sys.mount(
        Path::new("/dev/null"),
        place.as_fd(),
        "",
        MountFlags::BIND,
        c"",
    ) {
        // A file can't be mounted on a folder.
        Err(Errno::NOTDIR) => sys
            .mount(
                Path::new("tmpfs"),
                place.as_fd(),
                "tmpfs",
                MountFlags::RDONLY,
                c"nr_inodes=1",
            )
            .context(action),
        masked => masked.context(action),
    }
}

fn make_readonly(sys: &dyn Syscalls, root: BorrowedFd<'_>, path: &Path) -> Result<(), Failure> {
    let action = || format!("linux.readonlyPaths: make {} read-only", path.display());
    let place = match sys.open_in_root(root, path, OFlags::PATH, ResolveFlags::empty()) {
        Ok(place) => place,
        Err(Errno::NOENT | Errno::NOTDIR) => return Ok(()),
        Err(error) => return Err(Failure::internal(action(), error)),
    };
    let copy = sys.clone_mount(place.as_fd(), true).context(action)?;
    sys.set_attributes(copy.as_fd(), Attributes::READONLY, false)
        .context(action)?;
    sys.attach(copy.as_fd(), place.as_fd()).context(action)
}

/// What a place is, as far as mount points are concerned.
fn is_folder(sys: &dyn Syscalls, place: BorrowedFd<'_>) -> rustix::io::Result<bool> {
    Ok(FileType::from_raw_mode(sys.stat(place)?.st_mode) == FileType::Directory)
}

/// Opens the file `path` inside `root` as a place to mount on, and creates it if it is missing.
pub fn file_place(
    sys: &dyn Syscalls,
    root: BorrowedFd<'_>,
    path: &Path,
) -> Result<OwnedFd, Failure> {
    paths::open_or_create(
        sys,
        root,
        path,
        || Ok(paths::Missing::File),
        ResolveFlags::empty(),
    )
}
