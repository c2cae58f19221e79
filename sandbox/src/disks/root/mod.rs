//! A root file system that comes as disks: what containerd's erofs, blockfile and devmapper
//! snapshotters hand over, as the guest has to put it together.
//!
//! | mount of the create request | in the guest |
//! |---|---|
//! | `erofs`, `ext4` … from a file or a block device | a disk, mounted there; `loop` is left out, and each `device=` is a disk, too |
//! | `format/…` | its templates name the guest's mounts |
//! | `mkdir/…` | the folders are made on the disk that they are on |
//! | `overlay`, the upper layer on a disk | the same |
//! | `overlay`, the upper layer in a folder of the host's | that folder through the share |
//! | `bind` of an earlier mount | the same |
//!
//! The last mount is the root. With a limit of what the container may write, an upper layer of the
//! host's is a disk ([`super::writable`]); an overlay that the host mounts is then the lower layer of
//! one in the guest.

mod upper;

use super::format::expand;
use super::writable::WritableLimit;
use super::{Disk, DiskError, FILE_SYSTEMS};
use crate::ids::ContainerId;
use crate::mounts::RootfsMount;
use crate::spec::Bind;
use bulkhead_proto::agent::{StorageFolder, StorageMount};
use bulkhead_proto::guest::STORAGE_MOUNT;
use std::path::{Path, PathBuf};

/// What containerd's mount transformers read.
const MKDIR: &str = "X-containerd.mkdir.path=";

/// A root that the guest puts together itself.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct DiskRoot {
    /// What it is made of.
    pub disks: Vec<Disk>,
    /// What the guest mounts, in this order.
    pub storage: Vec<StorageMount>,
    /// Where it has the root then.
    pub path: PathBuf,
    /// The host mounts the root, too, as what lies below this one.
    pub over_hosts: bool,
    /// The host's folder of an upper layer that the guest writes to.
    pub upper: Option<PathBuf>,
}

/// A [`DiskRoot`] in the making.
struct Plan<'a> {
    id: &'a ContainerId,
    binds: &'a mut Vec<Bind>,
    limit: WritableLimit,
    root: DiskRoot,
    /// Where the mounts so far are in the guest.
    places: Vec<PathBuf>,
}

impl DiskRoot {
    /// Reads the mounts of `id`'s root; none if they are the host's to make and the guest takes them
    /// as they are. What the guest needs of the host's folders is added to `binds`.
    ///
    /// # Errors
    /// When a mount can't be made in a guest, or the disk for what the container writes can't be.
    pub fn plan(
        mounts: &[RootfsMount],
        id: &ContainerId,
        limit: WritableLimit,
        binds: &mut Vec<Bind>,
    ) -> Result<Option<Self>, DiskError> {
        let mut plan = Plan {
            id,
            binds,
            limit,
            root: Self::default(),
            places: Vec::new(),
        };
        let on_disk = |one: &RootfsMount| {
            FILE_SYSTEMS.contains(&base(&one.kind)) && !Path::new(&one.source).is_dir()
        };
        if !mounts.iter().any(on_disk) {
            return plan.over_hosts(mounts);
        }
        for (index, one) in mounts.iter().enumerate() {
            let last = index + 1 == mounts.len();
            let name = if last {
                "root".into()
            } else {
                index.to_string()
            };
            plan.add(one, &name).map_err(|problem| DiskError::Refused {
                what: format!("{} ({}) of the root file system", one.source, one.kind),
                problem,
            })?;
        }
        plan.check_limit()?;
        let mut root = plan.root;
        root.path = plan.places.pop().unwrap_or_default();
        Ok(Some(root))
    }
}

/// The file system behind containerd's prefixes for what is to be done first.
fn base(kind: &str) -> &str {
    let kind = kind.strip_prefix("format/").unwrap_or(kind);
    kind.strip_prefix("mkdir/").unwrap_or(kind)
}

impl Plan<'_> {
    fn add(&mut self, one: &RootfsMount, name: &str) -> Result<(), String> {
        if !one.target.is_empty() {
            return Err(format!("its target {:?} is not supported", one.target));
        }
        let expanded = |text: &str| match one.kind.starts_with("format/") {
            true => expand(text, &self.places),
            false => Ok(text.to_owned()),
        };
        let source = expanded(&one.source)?;
        let options: Result<Vec<_>, _> = one.options.iter().map(|one| expanded(one)).collect();
        let mut options = options?;
        self.take_folders(&mut options)?;
        if let Some(option) = options.iter().find(|o| o.starts_with("X-containerd.")) {
            return Err(format!("the option {option:?} is not supported"));
        }
        let kind = base(&one.kind);
        let (source, options) = match kind {
            "overlay" => ("overlay".into(), self.overlay(options)?),
            "bind" => (self.earlier(&source)?, options),
            _ if FILE_SYSTEMS.contains(&kind) => self.disk(kind, &source, options)?,
            other => return Err(format!("{other:?} can't be mounted in a guest")),
        };
        let target = format!("containers/{}/{name}", self.id);
        self.places.push(Path::new(STORAGE_MOUNT).join(&target));
        self.root.storage.push(StorageMount {
            target,
            type_: kind.to_owned(),
            source,
            options,
            ..Default::default()
        });
        Ok(())
    }

    fn attach(&mut self, path: &str, read_only: bool) -> Result<String, String> {
        let path = Path::new(path);
        if !path.is_absolute() || !Disk::exists(path) {
            return Err(format!("{} is no file and no block device", path.display()));
        }
        let number = self.root.disks.len();
        let disk = Disk::new(path, read_only, self.id.as_str(), number);
        let node = disk.in_guest().display().to_string();
        self.root.disks.push(disk);
        Ok(node)
    }

    fn disk(
        &mut self,
        kind: &str,
        source: &str,
        options: Vec<String>,
    ) -> Result<(String, Vec<String>), String> {
        let read_only = kind == "erofs" || options.iter().any(|option| option == "ro");
        let node = self.attach(source, read_only)?;
        let mut kept = Vec::new();
        for option in options.into_iter().filter(|option| option != "loop") {
            kept.push(match option.strip_prefix("device=") {
                Some(path) if kind == "erofs" => format!("device={}", self.attach(path, true)?),
                _ => option,
            });
        }
        Ok((node, kept))
    }

    /// A place of an earlier mount's, or below one.
    fn earlier(&self, path: &str) -> Result<String, String> {
        let known = self
            .places
            .iter()
            .any(|place| Path::new(path).starts_with(place));
        let plain = !path.split('/').any(|part| part == "..");
        match known && plain {
            true => Ok(path.to_owned()),
            false => Err(format!(
                "{path} is on the host, and other parts of the root are not"
            )),
        }
    }

    /// Takes `X-containerd.mkdir.path=PATH[:MODE[:UID:GID]]` out of `options`.
    fn take_folders(&mut self, options: &mut Vec<String>) -> Result<(), String> {
        let (folders, others) = std::mem::take(options)
            .into_iter()
            .partition(|option| option.starts_with(MKDIR));
        *options = others;
        let folders: Vec<String> = folders;
        for option in &folders {
            let wrong = || format!("the option {option:?} is not PATH[:MODE[:UID:GID]]");
            let mut parts = option.strip_prefix(MKDIR).unwrap_or_default().split(':');
            let path = PathBuf::from(parts.next().ok_or_else(wrong)?);
            let mode = parts
                .next()
                .map_or(Ok(0o700), |mode| u32::from_str_radix(mode, 8));
            let ids: Result<Vec<u32>, _> = parts.map(str::parse).collect();
            let (uid, gid) = match ids.map_err(|_| wrong())?.as_slice() {
                [] => (0, 0),
                [uid, gid] => (*uid, *gid),
                _ => return Err(wrong()),
            };
            // By its target: not every mount has a place that a template can name.
            let found = self.places.iter().find_map(|place| {
                let relative = path.strip_prefix(place).ok()?;
                Some((place.strip_prefix(STORAGE_MOUNT).ok()?, relative))
            });
            let (Some((target, relative)), Ok(mode)) = (found, mode) else {
                return Err(wrong());
            };
            let mut mounts = self.root.storage.iter_mut();
            let mount = mounts.find(|one| Path::new(&one.target) == target);
            let mount = mount.ok_or_else(wrong)?;
            mount.folders.push(StorageFolder {
                path: relative.display().to_string(),
                mode,
                uid,
                gid,
                ..Default::default()
            });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
