//! Root file systems whose owners are shown as other ids: containerd's `uidmap=` and `gidmap=`, for
//! containers in a user namespace.

use super::idmap::{attach_mapped, user_namespace};
use super::{MountError, failed};
use crate::spec::MountIds;
use nix::mount::{MntFlags, umount2};
use oci_spec::runtime::{LinuxIdMapping, LinuxIdMappingBuilder};
use std::fs;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

/// Takes the ids out of a mount's `options`.
pub(super) fn take_ids(
    options: &[String],
    target: &Path,
) -> Result<(Vec<String>, Option<MountIds>), MountError> {
    let (mut uids, mut gids, mut rest) = (None, None, Vec::new());
    for option in options {
        match option.split_once('=') {
            Some(("uidmap", text)) => uids = Some(ranges(text, option, target)?),
            Some(("gidmap", text)) => gids = Some(ranges(text, option, target)?),
            _ => rest.push(option.clone()),
        }
    }
    match (uids, gids) {
        (None, None) => Ok((rest, None)),
        (Some(uids), Some(gids)) => {
            let ids = MountIds {
                uids,
                gids,
                recursive: false,
            };
            Ok((rest, Some(ids)))
        }
        (uids, _) => Err(MountError::Option {
            target: target.to_owned(),
            option: if uids.is_some() { "uidmap" } else { "gidmap" }.into(),
            problem: "stands alone; a mapped root needs both maps",
        }),
    }
}

/// `container:host:size`, several of them separated by commas.
fn ranges(text: &str, option: &str, target: &Path) -> Result<Vec<LinuxIdMapping>, MountError> {
    let range = |text: &str| {
        let numbers: Vec<u32> = text.split(':').map_while(|n| n.parse().ok()).collect();
        let [container, host, size] = numbers[..] else {
            return None;
        };
        (text.matches(':').count() == 2).then_some(())?;
        let mapping = LinuxIdMappingBuilder::default()
            .container_id(container)
            .host_id(host)
            .size(size);
        mapping.build().ok()
    };
    let parsed: Option<Vec<_>> = text.split(',').map(range).collect();
    parsed.ok_or_else(|| MountError::Option {
        target: target.to_owned(),
        option: option.to_owned(),
        problem: "is no list of container:host:size",
    })
}

/// Shows what is mounted at `target` with other owners.
pub(super) fn map_in_place(target: &Path, ids: &MountIds) -> Result<(), MountError> {
    let mapped = || attach_mapped(target, &user_namespace(ids)?, false, target);
    mapped().map_err(|cause| failed("map the owners of", target, None, cause))
}

/// An overlay's lower layers, each with other owners, for as long as it takes to mount it: overlayfs
/// takes no map of its own, and keeps a mount of each layer for itself. Its upper layer needs none,
/// since what a container writes is written with the mapped ids.
#[derive(Debug)]
pub(super) struct MappedLayers {
    folder: PathBuf,
    mounted: usize,
}

impl MappedLayers {
    /// Mounts the layers that `data` names beside `target`; returns the data with these instead.
    pub fn mount(data: &str, target: &Path, ids: &MountIds) -> Result<(Self, String), MountError> {
        let users = user_namespace(ids)
            .map_err(|cause| failed("map the owners of the layers of", target, None, cause))?;
        let mut name = target.file_name().unwrap_or_default().to_owned();
        name.push("-layers");
        let folder = target.with_file_name(name);
        fs::create_dir(&folder).map_err(|cause| failed("make", &folder, None, cause))?;
        let mut layers = Self { folder, mounted: 0 };
        let mut options = Vec::new();
        for option in data.split(',') {
            options.push(match option.strip_prefix("lowerdir=") {
                Some(lower) => format!("lowerdir={}", layers.map(lower, &users)?),
                None => option.to_owned(),
            });
        }
        Ok((layers, options.join(",")))
    }

    fn map(&mut self, lower: &str, users: &OwnedFd) -> Result<String, MountError> {
        let mut mapped = Vec::new();
        for layer in lower.split(':').map(Path::new) {
            let place = self.place(self.mounted);
            let attach = || {
                fs::create_dir(&place)?;
                attach_mapped(layer, users, false, &place)
            };
            attach().map_err(|cause| failed("map the owners of", &place, Some(layer), cause))?;
            self.mounted += 1;
            mapped.push(place.display().to_string());
        }
        Ok(mapped.join(":"))
    }

    fn place(&self, number: usize) -> PathBuf {
        self.folder.join(number.to_string())
    }
}

impl Drop for MappedLayers {
    fn drop(&mut self) {
        for number in 0..self.mounted {
            let _ = umount2(&self.place(number), MntFlags::MNT_DETACH);
        }
        // Never through a mount that is still there: only empty folders go.
        for number in 0..=self.mounted {
            let _ = fs::remove_dir(self.place(number));
        }
        if let Err(error) = fs::remove_dir(&self.folder) {
            tracing::warn!(%error, folder = %self.folder.display(), "mapped layers are left");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mounts::{RootfsMount, mount_rootfs, unmount_tree};
    use std::os::unix::fs::{MetadataExt, chown};

    #[test]
    fn ids_are_told_from_other_options() {
        let take = |options: &[&str]| {
            let options: Vec<String> = options.iter().map(|option| (*option).into()).collect();
            take_ids(&options, Path::new("/r"))
        };
        let (rest, ids) = take(&["index=off", "uidmap=0:9:5,5:20:1", "gidmap=0:7:5"]).unwrap();
        let ids = ids.unwrap();
        assert_eq!(rest, ["index=off"]);
        let second = ids.uids[1];
        let second = (second.container_id(), second.host_id(), second.size());
        assert_eq!((ids.uids.len(), second), (2, (5, 20, 1)));
        assert_eq!(ids.gids[0].host_id(), 7);
        assert_eq!(take(&["ro"]).unwrap().1, None);
        for bad in [
            &["uidmap=0:9:5"][..],
            &["uidmap=0:9", "gidmap=0:9:5"],
            &["uidmap=0:9:5", "gidmap=0:x:5"],
            &["uidmap=0:9:5:1", "gidmap=0:9:5"],
            &["uidmap=", "gidmap=0:9:5"],
        ] {
            assert!(take(bad).is_err(), "{bad:?}");
        }
    }

    /// Needs root, and a temporary folder on a file system with id-mapped mounts.
    #[test]
    fn an_overlays_files_have_other_owners_and_no_layer_stays_mounted() {
        let dir = tempfile::tempdir().unwrap();
        let folder = |name: &str| {
            let path = dir.path().join(name);
            fs::create_dir(&path).unwrap();
            path
        };
        let (below, above) = (folder("below"), folder("above"));
        let (upper, work) = (folder("upper"), folder("work"));
        fs::write(below.join("old"), "").unwrap();
        fs::write(above.join("new"), "").unwrap();
        let rootfs = dir.path().join("rootfs");
        let layers = format!("lowerdir={}:{}", above.display(), below.display());
        let mount = RootfsMount {
            kind: "overlay".into(),
            source: "overlay".into(),
            target: String::new(),
            options: vec![
                layers,
                format!("upperdir={}", upper.display()),
                format!("workdir={}", work.display()),
                "uidmap=0:100000:1000".into(),
                "gidmap=0:200000:1000".into(),
            ],
        };
        match mount_rootfs(&[mount], &rootfs) {
            Err(MountError::Failed { cause, .. })
                if !nix::unistd::geteuid().is_root()
                    || cause.to_string().contains("has no id-mapped mounts") =>
            {
                eprintln!("SKIPPED 1 test: {cause}");
                return;
            }
            mounted => mounted.unwrap(),
        }
        assert!(!dir.path().join("rootfs-layers").exists());
        for name in ["old", "new"] {
            let shown = fs::metadata(rootfs.join(name)).unwrap();
            assert_eq!((shown.uid(), shown.gid()), (100_000, 200_000), "{name}");
        }
        fs::write(rootfs.join("written"), "").unwrap();
        chown(rootfs.join("written"), Some(100_007), Some(200_007)).unwrap();
        let kept = fs::metadata(upper.join("written")).unwrap();
        assert_eq!((kept.uid(), kept.gid()), (100_007, 200_007));
        unmount_tree(&rootfs).unwrap();
        assert!(fs::read_dir(&rootfs).unwrap().next().is_none());
    }
}
