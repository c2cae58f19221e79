//! What a container writes to its root: the overlay's upper layer, in a folder of the host's, on a
//! disk of the snapshot's, or on one of limited size.

use super::super::DiskError;
use super::super::writable;
use super::{DiskRoot, Plan};
use crate::mounts::RootfsMount;
use crate::spec::{Bind, guest_bind, guest_rootfs};
use bulkhead_proto::agent::{StorageFolder, StorageMount};
use bulkhead_proto::guest::STORAGE_MOUNT;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Where, below a container's, the disk with its writable layer is mounted.
const WRITABLE: &str = "writable";

/// Options besides `lowerdir=` by which an overlay's layers can be named: what they name is not
/// looked up among the guest's mounts.
const LAYERS: [&str; 2] = ["lowerdir+=", "datadir+="];

/// Whether `path` is a folder, and no link to one: a guest may have put one there.
fn is_folder(path: &Path) -> bool {
    path.symlink_metadata().is_ok_and(|found| found.is_dir())
}

impl Plan<'_> {
    /// A root that the host mounts, below a layer with a limit. None if there is no limit.
    pub(super) fn over_hosts(
        mut self,
        mounts: &[RootfsMount],
    ) -> Result<Option<DiskRoot>, DiskError> {
        let Some(mib) = self.limit.mib else {
            return Ok(None);
        };
        let upper = match mounts {
            [one] if one.kind == "overlay" => {
                let mut options = one.options.iter();
                options.find_map(|option| option.strip_prefix("upperdir="))
            }
            _ => None,
        };
        let Some(upper) = upper.map(Path::new) else {
            self.check_limit()?;
            return Ok(None);
        };
        let mut options = vec![format!("lowerdir+={}", guest_rootfs(self.id).display())];
        options.extend(self.writable(upper, mib)?);
        let target = format!("containers/{}/root", self.id);
        self.root.path = Path::new(STORAGE_MOUNT).join(&target);
        self.root.over_hosts = true;
        self.root.storage.push(StorageMount {
            target,
            type_: "overlay".into(),
            source: "overlay".into(),
            options,
            ..Default::default()
        });
        Ok(Some(self.root))
    }

    /// A limit that a container asks for holds, or is refused.
    pub(super) fn check_limit(&self) -> Result<(), DiskError> {
        let limited = self
            .root
            .storage
            .iter()
            .any(|one| one.target.ends_with(WRITABLE));
        if limited || self.limit.mib.is_none() {
            return Ok(());
        }
        let problem = "it has no writable layer of its own that could be limited: it is a folder or a \
                       disk as a whole, or its snapshotter sets the layer's size";
        if self.limit.annotated {
            return Err(DiskError::Refused {
                what: "a writable layer of limited size for the root file system".into(),
                problem: problem.into(),
            });
        }
        tracing::info!(container = %self.id, "the root's size is not limited: {problem}");
        Ok(())
    }

    /// The options of an overlay whose upper layer is a disk of `mib` MiB, in place of the host's
    /// folder `upper`: with that one's owner and mode, which are those of the container's `/`.
    fn writable(&mut self, upper: &Path, mib: u32) -> Result<Vec<String>, DiskError> {
        let failed = |cause| DiskError::Open {
            path: upper.to_owned(),
            cause,
        };
        let snapshot = upper.parent().unwrap_or(upper);
        let own = upper.symlink_metadata().map_err(failed)?;
        if !own.is_dir() {
            return Err(failed(std::io::ErrorKind::NotADirectory.into()));
        }
        let disk = writable::disk(snapshot, mib)?;
        let node = self
            .attach(&disk.display().to_string(), false)
            .map_err(|problem| DiskError::Refused {
                what: disk.display().to_string(),
                problem,
            })?;
        let target = format!("containers/{}/{WRITABLE}", self.id);
        let place = Path::new(STORAGE_MOUNT).join(&target);
        let folder = |path: &str| StorageFolder {
            path: path.into(),
            mode: own.mode() & 0o7777,
            uid: own.uid(),
            gid: own.gid(),
            ..Default::default()
        };
        self.root.storage.push(StorageMount {
            target,
            type_: "ext4".into(),
            source: node,
            // Its tables are zeroes: no need to write them once more.
            options: vec!["noinit_itable".into()],
            folders: vec![folder("upper"), folder("work")],
            ..Default::default()
        });
        Ok(["upper", "work"]
            .map(|name| format!("{name}dir={}", place.join(name).display()))
            .into())
    }

    /// Layers one by one, of which there may be many; the upper one may be the host's.
    pub(super) fn overlay(&mut self, options: Vec<String>) -> Result<Vec<String>, String> {
        let value = |key: &str| options.iter().find_map(|option| option.strip_prefix(key));
        let upper = match (value("upperdir="), value("workdir=")) {
            (Some(upper), Some(work)) => {
                Some(self.upper(Path::new(upper), Path::new(work), &options)?)
            }
            (None, None) => None,
            _ => return Err("an upper layer needs both upperdir and workdir".into()),
        };
        let mut kept = self.earlier_changes(upper.is_some(), value("upperdir="))?;
        for option in &options {
            if let Some(layers) = option.strip_prefix("lowerdir=") {
                for layer in layers.split(':') {
                    kept.push(format!("lowerdir+={}", self.earlier(layer)?));
                }
            } else if LAYERS.iter().any(|key| option.starts_with(key)) {
                return Err(format!(
                    "the option {option:?} is not supported; name layers in lowerdir="
                ));
            } else if option.starts_with("uidmap=") || option.starts_with("gidmap=") {
                return Err(format!(
                    "the option {option:?} (user namespaces) is not supported"
                ));
            } else if !option.starts_with("upperdir=") && !option.starts_with("workdir=") {
                kept.push(option.clone());
            }
        }
        kept.extend(upper.into_iter().flatten());
        Ok(kept)
    }

    /// What a folder of the host's has of the container's changes already, as a layer below the disk
    /// that has them from now on.
    fn earlier_changes(&mut self, any: bool, upper: Option<&str>) -> Result<Vec<String>, String> {
        let Some(upper) = upper
            .filter(|_| any && self.limit.mib.is_some())
            .map(Path::new)
        else {
            return Ok(Vec::new());
        };
        let empty = |path: &Path| Ok(std::fs::read_dir(path)?.next().is_none());
        if upper.starts_with(STORAGE_MOUNT)
            || empty(upper).map_err(|error: std::io::Error| error.to_string())?
        {
            return Ok(Vec::new());
        }
        Ok(vec![format!(
            "lowerdir+={}",
            self.share(upper, true, false).display()
        )])
    }

    /// Has the guest see a folder of the host's, `upper` if an overlay's upper layer is in it; where
    /// it sees it.
    fn share(&mut self, source: &Path, readonly: bool, upper: bool) -> PathBuf {
        let bind = Bind {
            number: self.binds.len(),
            source: source.to_owned(),
            is_dir: true,
            readonly,
            recursive: false,
            follows: false,
            ids: None,
            volume: None,
            upper,
        };
        let place = guest_bind(self.id, &bind);
        self.binds.push(bind);
        place
    }

    fn upper(
        &mut self,
        upper: &Path,
        work: &Path,
        options: &[String],
    ) -> Result<Vec<String>, String> {
        let own = |path: &Path| path.starts_with(STORAGE_MOUNT);
        let option = |key: &str, path: &Path| format!("{key}={}", path.display());
        if own(upper) && own(work) {
            return Ok(vec![option("upperdir", upper), option("workdir", work)]);
        }
        // Both have to be in one mount.
        let (Some(parent), Some(upper_name), Some(work_name)) =
            (upper.parent(), upper.file_name(), work.file_name())
        else {
            return Err(format!(
                "{} is no folder for an upper layer",
                upper.display()
            ));
        };
        if work.parent() != Some(parent) || !is_folder(upper) || !is_folder(work) {
            return Err(format!(
                "{} and {} are not two folders side by side",
                upper.display(),
                work.display()
            ));
        }
        if let Some(mib) = self.limit.mib {
            return self.writable(upper, mib).map_err(|error| error.to_string());
        }
        if !options.iter().any(|option| option == "userxattr") {
            self.root.upper = Some(upper.to_owned());
        }
        let place = self.share(parent, false, true);
        // Its marks are trusted attributes, as those of the layers below are; the file server, which
        // may set none, keeps them under other names (vmm/src/virtio/fs/xattrs.rs).
        Ok(vec![
            option("upperdir", &place.join(upper_name)),
            option("workdir", &place.join(work_name)),
        ])
    }
}
