//! File systems that are mounted for a container before it is set up: its root's parts from disks,
//! and the pod's volumes in memory.
//!
//! All of them are below one folder of the agent's own, which no container reaches, so a path in it
//! can't be led astray. A container's are on its account ([`Mounted`]) and go with it; a pod's stay.

mod mounts;
#[cfg(test)]
mod tests;

use crate::error::{Context, Failure, Kind};
use crate::log;
use bulkhead_proto::agent::{StorageFolder, StorageMount};
use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::UnmountFlags;
use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

/// Most mounts that one request may list.
const MAX_MOUNTS: usize = 512;

/// Most folders that one mount may list.
const MAX_FOLDERS: usize = 64;

/// Owner of all that is mounted. Clones are the same owner.
#[derive(Debug, Clone)]
pub struct Storage {
    root: PathBuf,
    taken: Arc<Mutex<BTreeSet<PathBuf>>>,
}

/// What is mounted on a container's account; taken away when this is dropped, if it hasn't been
/// before.
#[derive(Debug)]
pub struct Mounted {
    storage: Storage,
    targets: Mutex<Vec<PathBuf>>,
}

impl Storage {
    /// Nothing is mounted below `root` yet.
    pub fn new(root: PathBuf) -> Self {
        Self {
            root,
            taken: Arc::default(),
        }
    }

    /// Mounts `all`, in order. After a failure none of it is left.
    pub fn mount(&self, all: &[StorageMount]) -> Result<Mounted, Failure> {
        let mounted = Mounted {
            storage: self.clone(),
            targets: Mutex::default(),
        };
        if all.len() > MAX_MOUNTS {
            return Err(Failure::invalid(
                "storage",
                format!("{} mounts; no more than {MAX_MOUNTS}", all.len()),
            ));
        }
        let mut pods = Vec::new();
        for (index, one) in all.iter().enumerate() {
            if let Err(failure) = self.mount_one(index, one, &mounted, &mut pods) {
                drop(mounted);
                pods.iter().rev().for_each(|target| self.take_away(target));
                return Err(failure);
            }
        }
        Ok(mounted)
    }

    fn mount_one(
        &self,
        index: usize,
        one: &StorageMount,
        mounted: &Mounted,
        pods: &mut Vec<PathBuf>,
    ) -> Result<(), Failure> {
        let field = |name: &str| format!("storage[{index}].{name}");
        let target = self.root.join(plain(&field("target"), &one.target)?);
        if one.folders.len() > MAX_FOLDERS {
            return Err(Failure::invalid(
                field("folders"),
                format!("{}; no more than {MAX_FOLDERS}", one.folders.len()),
            ));
        }
        let folders = one.folders.iter().map(|folder| {
            let path = plain(&field("folders"), &folder.path)?;
            Ok((target.join(path), folder))
        });
        let folders = folders.collect::<Result<Vec<_>, Failure>>()?;
        let wanted = mounts::Wanted::new(&field("options"), one)?;
        let free = self.locked().insert(target.clone());
        match (free, one.pod) {
            (true, pod) => {
                if let Err(failure) = make_all(&target).and_then(|()| wanted.mount(&target)) {
                    self.forget(&target);
                    return Err(failure);
                }
                if pod {
                    pods.push(target);
                } else {
                    mounted.locked().push(target);
                }
            }
            (false, true) => {}
            (false, false) => {
                return Err(Failure::new(
                    Kind::AlreadyExists,
                    format!("{}: {} is in use", field("target"), one.target),
                ));
            }
        }
        folders
            .iter()
            .try_for_each(|(path, folder)| make_folder(path, folder))
    }

    fn locked(&self) -> std::sync::MutexGuard<'_, BTreeSet<PathBuf>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes out what is below `target`, and unmounts it.
    fn take_away(&self, target: &Path) {
        // What is unmounted while something still uses it, is written out at some later time; but
        // when the container is gone, its disks may go too.
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        if let Ok(folder) = rustix::fs::open(target, flags, Mode::empty()) {
            let _ = rustix::fs::syncfs(&folder);
        }
        let flags = UnmountFlags::NOFOLLOW;
        let unmounted = rustix::mount::unmount(target, flags).or_else(|error| match error {
            Errno::BUSY => rustix::mount::unmount(target, flags | UnmountFlags::DETACH),
            other => Err(other),
        });
        match unmounted {
            Ok(()) => self.forget(target),
            Err(error) => log::error(Failure::internal(
                format!("unmount {}", target.display()),
                error,
            )),
        }
    }

    /// Gives a target up, and the folders that were made for it as far as they are empty.
    fn forget(&self, target: &Path) {
        self.locked().remove(target);
        let empty = |path: &&Path| std::fs::remove_dir(path).is_ok();
        let below = |path: &&Path| path.starts_with(&self.root) && *path != self.root;
        let _ = target
            .ancestors()
            .take_while(below)
            .take_while(empty)
            .count();
    }
}

impl Mounted {
    fn locked(&self) -> std::sync::MutexGuard<'_, Vec<PathBuf>> {
        self.targets.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes it all away, the last one first.
    pub fn release(&self) {
        let targets = std::mem::take(&mut *self.locked());
        for target in targets.iter().rev() {
            self.storage.take_away(target);
        }
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        self.release();
    }
}

/// A relative path of plain names.
fn plain<'a>(field: &str, path: &'a str) -> Result<&'a Path, Failure> {
    let fits = |part: Component| matches!(part, Component::Normal(name) if name != OsStr::new(""));
    let parsed = Path::new(path);
    let whole = !path.is_empty() && !path.contains('\0') && !path.contains("//");
    if whole && !path.contains("/./") && !path.ends_with('/') && parsed.components().all(fits) {
        return Ok(parsed);
    }
    Err(Failure::invalid(
        field,
        format!("{path:?} is not a relative path of plain names"),
    ))
}

fn make_all(path: &Path) -> Result<(), Failure> {
    std::fs::create_dir_all(path).context(|| format!("make the folder {}", path.display()))
}

/// Makes a folder below a mount, whose content may be anything: no link in it is followed.
fn make_folder(path: &Path, wanted: &StorageFolder) -> Result<(), Failure> {
    let action = || format!("make the folder {}", path.display());
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(Failure::internal(action(), "it has no name"));
    };
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let resolve = rustix::fs::ResolveFlags::NO_SYMLINKS;
    let parent = rustix::fs::openat2(CWD, parent, flags, Mode::empty(), resolve).context(action)?;
    match rustix::fs::mkdirat(&parent, name, Mode::RWXU) {
        Ok(()) => {}
        Err(Errno::EXIST) => return Ok(()),
        Err(error) => return Err(Failure::internal(action(), error)),
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let folder = rustix::fs::openat(&parent, name, flags, Mode::empty()).context(action)?;
    let (owner, group) = (
        rustix::fs::Uid::from_raw(wanted.uid),
        rustix::fs::Gid::from_raw(wanted.gid),
    );
    rustix::fs::fchown(&folder, Some(owner), Some(group)).context(action)?;
    // After the owner: changing that clears the set-id bits.
    let mode = Mode::from_raw_mode(wanted.mode & 0o7777);
    rustix::fs::fchmod(&folder, mode).context(action)
}
