//! emptyDir volumes with `medium: Memory`. kubelet mounts a tmpfs of the volume's size for each on
//! the host; only containers of the pod ever use it, so in the guest it is a tmpfs of the same size:
//! what is written to it is the guest's memory, counted and limited there, and not the host's.

use super::mountinfo::{Mount, mounts};
use super::{MountError, failed};
use bulkhead_proto::agent::{StorageFolder, StorageMount};
use bulkhead_proto::guest::STORAGE_MOUNT;
use nix::sys::statfs::{TMPFS_MAGIC, statfs};
use nix::sys::statvfs::statvfs;
use std::ffi::OsStr;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

/// The folder of a pod's volumes of this kind, as kubelet's plugin names it.
const PLUGIN: &str = "kubernetes.io~empty-dir";

/// Longest name of a volume (RFC 1123, as Kubernetes has it).
const MAX_NAME: usize = 63;

/// Such a volume, or a folder of it (`subPath`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct MemoryVolume {
    name: String,
    /// Where it is mounted on the host.
    point: PathBuf,
    /// The folder in it; empty for all of it.
    folder: PathBuf,
}

impl MemoryVolume {
    /// The volume that the folder `source` is of; none if it is of none.
    pub fn of(source: &Path) -> Result<Option<Self>, MountError> {
        let fail = |cause: io::Error| failed("look at", source, None, cause);
        let kind = statfs(source).map_err(|errno| fail(errno.into()))?;
        if kind.filesystem_type() != TMPFS_MAGIC {
            // Most are none, and the table of mounts may be long.
            return Ok(None);
        }
        let source = source.canonicalize().map_err(fail)?;
        Ok(Self::find(&source, &mounts()?))
    }

    fn find(source: &Path, mounts: &[Mount]) -> Option<Self> {
        let holds = |mount: &&Mount| source.starts_with(&mount.point);
        let depth = |mount: &&Mount| mount.point.components().count();
        // Of two at one place the later one hides the other; max_by_key takes the last.
        let found = mounts.iter().filter(holds).max_by_key(depth)?;
        if found.kind != "tmpfs" {
            return None;
        }
        let whole = |mount: &&Mount| mount.device == found.device && mount.root == Path::new("/");
        let (name, point) = mounts.iter().filter(whole).find_map(|mount| {
            let name = volume_name(&mount.point)?;
            Some((name.to_owned(), mount.point.clone()))
        })?;
        let root = found.root.strip_prefix("/").ok()?;
        let folder = root.join(source.strip_prefix(&found.point).ok()?);
        let plain = |part: Component| matches!(part, Component::Normal(_));
        (folder.to_str().is_some() && folder.components().all(plain)).then_some(Self {
            name,
            point,
            folder,
        })
    }

    /// Where the guest has it.
    pub fn in_guest(&self) -> PathBuf {
        let volume = Path::new(STORAGE_MOUNT).join(self.target());
        match self.folder.as_os_str().is_empty() {
            true => volume,
            false => volume.join(&self.folder),
        }
    }

    fn target(&self) -> String {
        format!("volumes/{}", self.name)
    }

    /// What the guest has to mount, with the size, owners and modes that the host's has.
    pub fn mount(&self) -> Result<StorageMount, MountError> {
        let fail = |cause: io::Error| failed("look at", &self.point, None, cause);
        let size = statvfs(&self.point).map_err(|errno| fail(errno.into()))?;
        let size = size.blocks().saturating_mul(size.fragment_size());
        let root = self.point.metadata().map_err(fail)?;
        let (mode, uid, gid) = (root.mode() & 0o7777, root.uid(), root.gid());
        // A size of 0 is no limit, to tmpfs as well.
        let options = [
            format!("mode={mode:o}"),
            format!("uid={uid}"),
            format!("gid={gid}"),
            format!("size={size}"),
        ];
        let mut folders = Vec::new();
        let mut path = PathBuf::new();
        for part in &self.folder {
            path.push(part);
            let found = self.point.join(&path).metadata().map_err(fail)?;
            folders.push(StorageFolder {
                path: path.display().to_string(),
                mode: found.mode() & 0o7777,
                uid: found.uid(),
                gid: found.gid(),
                ..Default::default()
            });
        }
        Ok(StorageMount {
            target: self.target(),
            type_: "tmpfs".into(),
            source: "tmpfs".into(),
            options: options.into(),
            pod: true,
            folders,
            ..Default::default()
        })
    }
}

/// NAME of `…/kubernetes.io~empty-dir/NAME`, if it is one that Kubernetes allows.
fn volume_name(point: &Path) -> Option<&str> {
    let fits = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    let name = point.file_name()?.to_str()?;
    let plugin = point.parent()?.file_name()?;
    (plugin == OsStr::new(PLUGIN) && name.len() <= MAX_NAME && name.bytes().all(fits))
        .then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(device: &str, root: &str, point: &str, kind: &str) -> Mount {
        Mount {
            number: 0,
            device: device.into(),
            root: root.into(),
            point: point.into(),
            kind: kind.into(),
        }
    }

    #[test]
    fn a_volume_is_found_by_what_is_mounted_where() {
        let pod = "/var/lib/kubelet/pods/u";
        let cache = &format!("{pod}/volumes/kubernetes.io~empty-dir/cache");
        let token = &format!("{pod}/volumes/kubernetes.io~projected/token");
        let sub = &format!("{pod}/volume-subpaths/cache/web/0");
        let table = [
            mount("8:1", "/", "/", "ext4"),
            mount("0:50", "/", cache, "tmpfs"),
            mount("0:51", "/", token, "tmpfs"),
            mount("0:50", "/a/b", sub, "tmpfs"),
        ];
        let find = |path: &str| MemoryVolume::find(Path::new(path), &table);
        let in_guest = |path: &str| find(path).map(|found| found.in_guest());
        let at = |path: &str| Some(Path::new(STORAGE_MOUNT).join(path));
        assert_eq!(in_guest(cache), at("volumes/cache"));
        assert_eq!(in_guest(&format!("{cache}/x")), at("volumes/cache/x"));
        assert_eq!(in_guest(sub), at("volumes/cache/a/b"));
        // A Secret's tmpfs has content that comes from the host, and a plain emptyDir is on a disk.
        assert_eq!(in_guest(token), None);
        let plain = format!("{pod}/volumes/kubernetes.io~empty-dir/plain");
        assert_eq!(in_guest(&plain), None);
    }

    /// Needs root.
    #[test]
    fn size_owner_and_mode_are_the_hosts() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let point = dir.path().join(PLUGIN).join("cache");
        std::fs::create_dir_all(&point).unwrap();
        let options = Some("size=1m,mode=2770,uid=3,gid=4");
        let (kind, none) = (Some("tmpfs"), nix::mount::MsFlags::empty());
        nix::mount::mount(kind, &point, kind, none, options).unwrap();
        std::fs::create_dir(point.join("sub")).unwrap();
        let found = MemoryVolume::of(&point.join("sub")).unwrap();
        let wanted = found.as_ref().map(MemoryVolume::mount);
        super::super::unmount_tree(dir.path()).unwrap();
        assert!(found.unwrap().in_guest().ends_with("volumes/cache/sub"));
        let wanted = wanted.unwrap().unwrap();
        assert_eq!(
            wanted.options,
            ["mode=2770", "uid=3", "gid=4", "size=1048576"]
        );
        assert!(wanted.pod && wanted.target == "volumes/cache");
        let sub = &wanted.folders[0];
        assert_eq!((sub.path.as_str(), sub.gid), ("sub", 4));
    }
}
