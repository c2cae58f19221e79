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

use super::format::expand;
use super::writable::{self, WritableLimit};
use super::{Disk, DiskError, FILE_SYSTEMS};
use crate::ids::ContainerId;
use crate::mounts::RootfsMount;
use crate::spec::{Bind, guest_bind, guest_rootfs};
use bulkhead_proto::agent::{StorageFolder, StorageMount};
use bulkhead_proto::guest::STORAGE_MOUNT;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// What containerd's mount transformers read.
const MKDIR: &str = "X-containerd.mkdir.path=";

/// Where, below a container's, the disk with its writable layer is mounted.
const WRITABLE: &str = "writable";

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
    /// A root that the host mounts, below a layer with a limit. None if there is no limit.
    fn over_hosts(mut self, mounts: &[RootfsMount]) -> Result<Option<DiskRoot>, DiskError> {
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
    fn check_limit(&self) -> Result<(), DiskError> {
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
        let own = upper.metadata().map_err(failed)?;
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

    /// Layers one by one, of which there may be many; the upper one may be the host's.
    fn overlay(&mut self, options: Vec<String>) -> Result<Vec<String>, String> {
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
                for layer in layers.split(':').filter(|layer| !layer.is_empty()) {
                    kept.push(format!("lowerdir+={}", self.earlier(layer)?));
                }
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
            self.share(upper, true).display()
        )])
    }

    /// Has the guest see a folder of the host's; where it sees it.
    fn share(&mut self, source: &Path, readonly: bool) -> PathBuf {
        let number = self.binds.len();
        self.binds.push(Bind {
            number,
            source: source.to_owned(),
            is_dir: true,
            readonly,
            recursive: false,
            follows: false,
            ids: None,
            volume: None,
        });
        guest_bind(self.id, number)
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
        if work.parent() != Some(parent) || !upper.is_dir() || !work.is_dir() {
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
        let place = self.share(parent, false);
        // Its marks are trusted attributes, as those of the layers below are; the file server, which
        // may set none, keeps them under other names (vmm/src/virtio/fs/xattrs.rs).
        Ok(vec![
            option("upperdir", &place.join(upper_name)),
            option("workdir", &place.join(work_name)),
        ])
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
            let below = |place: &&PathBuf| path.starts_with(place);
            let place = self.places.iter().position(|place| below(&place));
            let (Some(index), Ok(mode)) = (place, mode) else {
                return Err(wrong());
            };
            let relative = path
                .strip_prefix(&self.places[index])
                .map_err(|_| wrong())?;
            self.root.storage[index].folders.push(StorageFolder {
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
mod tests {
    use super::*;

    struct Snapshots(tempfile::TempDir);

    impl Snapshots {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            for name in ["rw.img", "1.erofs", "2.erofs", "meta.erofs"] {
                std::fs::write(dir.path().join(name), [0; 512]).unwrap();
            }
            for name in ["9/fs", "9/work"] {
                std::fs::create_dir_all(dir.path().join(name)).unwrap();
            }
            Self(dir)
        }

        fn path(&self, name: &str) -> String {
            self.0.path().join(name).display().to_string()
        }

        fn mount(&self, kind: &str, source: &str, options: &[&str]) -> RootfsMount {
            RootfsMount {
                kind: kind.into(),
                source: source.into(),
                target: String::new(),
                options: options.iter().map(|&one| one.into()).collect(),
            }
        }

        fn layer(&self, name: &str) -> RootfsMount {
            self.mount("erofs", &self.path(name), &["ro", "loop"])
        }
    }

    fn plan(mounts: &[RootfsMount]) -> Result<(Option<DiskRoot>, Vec<Bind>), String> {
        let mut binds = Vec::new();
        let id = ContainerId::try_from("c1").unwrap();
        let root = DiskRoot::plan(mounts, &id, WritableLimit::default(), &mut binds);
        root.map(|root| (root, binds))
            .map_err(|error| error.to_string())
    }

    const AT: &str = "/run/bulkhead/storage/containers/c1";

    #[test]
    fn layers_and_a_writable_disk_are_stacked_in_the_guest() {
        let snapshots = Snapshots::new();
        let overlay = [
            "X-containerd.mkdir.path={{ mount 0 }}/upper:0755",
            "X-containerd.mkdir.path={{ mount 0 }}/work:0755",
            "workdir={{ mount 0 }}/work",
            "upperdir={{ mount 0 }}/upper",
            "lowerdir={{ overlay 1 2 }}",
        ];
        let mounts = [
            snapshots.mount("ext4", &snapshots.path("rw.img"), &["rw", "loop"]),
            snapshots.layer("1.erofs"),
            snapshots.layer("2.erofs"),
            snapshots.mount("format/mkdir/overlay", "overlay", &overlay),
        ];
        let (root, binds) = plan(&mounts).unwrap();
        let root = root.unwrap();
        assert!(binds.is_empty());
        assert_eq!(root.path, Path::new(AT).join("root"));
        let writable: Vec<_> = root.disks.iter().map(|disk| !disk.read_only).collect();
        assert_eq!(writable, [true, false, false]);
        let kinds: Vec<_> = root.storage.iter().map(|one| one.type_.as_str()).collect();
        assert_eq!(kinds, ["ext4", "erofs", "erofs", "overlay"]);
        assert_eq!(root.storage[0].options, ["rw"]);
        assert_eq!(
            root.storage[1].source,
            root.disks[1].in_guest().display().to_string()
        );
        let folders: Vec<_> = root.storage[0]
            .folders
            .iter()
            .map(|one| (&*one.path, one.mode))
            .collect();
        assert_eq!(folders, [("upper", 0o755), ("work", 0o755)]);
        assert_eq!(
            root.storage[3].options,
            [
                format!("lowerdir+={AT}/1"),
                format!("lowerdir+={AT}/2"),
                format!("upperdir={AT}/0/upper"),
                format!("workdir={AT}/0/work"),
            ]
        );
    }

    #[test]
    fn a_blockfile_is_the_root_itself_and_an_overlay_is_the_hosts() {
        let snapshots = Snapshots::new();
        let (root, _) =
            plan(&[snapshots.mount("ext4", &snapshots.path("rw.img"), &["loop", "rw"])]).unwrap();
        let root = root.unwrap();
        assert_eq!((root.disks.len(), root.storage.len()), (1, 1));
        assert_eq!(root.path, Path::new(AT).join("root"));
        for (kind, source) in [
            ("overlay", "overlay"),
            ("bind", "/tmp"),
            ("xfs", "/dev/x"),
            ("ext4", "/tmp"),
        ] {
            assert_eq!(
                plan(&[snapshots.mount(kind, source, &["rw"])]).unwrap().0,
                None,
                "{kind}"
            );
        }
    }

    #[test]
    fn an_upper_layer_of_the_hosts_goes_through_the_share() {
        let snapshots = Snapshots::new();
        let (upper, work) = (snapshots.path("9/fs"), snapshots.path("9/work"));
        let device = format!("device={}", snapshots.path("1.erofs"));
        let mounts = [
            snapshots.mount(
                "erofs",
                &snapshots.path("meta.erofs"),
                &["ro", "loop", &device],
            ),
            snapshots.mount(
                "format/mkdir/overlay",
                "overlay",
                &[
                    &format!("workdir={work}"),
                    &format!("upperdir={upper}"),
                    "lowerdir={{ mount 0 }}",
                ],
            ),
        ];
        let (root, binds) = plan(&mounts).unwrap();
        let root = root.unwrap();
        assert_eq!(binds[0].source, Path::new(&upper).parent().unwrap());
        assert_eq!(
            root.storage[0].options[1],
            format!("device={}", root.disks[1].in_guest().display())
        );
        let options = &root.storage[1].options;
        assert!(
            options.contains(&"upperdir=/run/bulkhead/shared/c1/mounts/0/fs".to_owned()),
            "{options:?}"
        );
        assert_eq!(root.upper.as_deref(), Some(Path::new(&upper)));
    }

    #[test]
    fn what_a_guest_cannot_mount_is_refused() {
        let snapshots = Snapshots::new();
        let layer = || snapshots.layer("1.erofs");
        let refused = |mounts: &[RootfsMount], text: &str| {
            let error = plan(mounts).unwrap_err();
            assert!(error.contains(text), "{text}: {error}");
        };
        let verity = snapshots.mount(
            "erofs",
            &snapshots.path("1.erofs"),
            &["X-containerd.dmverity=/m"],
        );
        refused(&[verity], "X-containerd.dmverity");
        refused(
            &[snapshots.mount("erofs", "/nonexistent", &[])],
            "/nonexistent",
        );
        let on_host = snapshots.mount("overlay", "overlay", &["lowerdir=/etc:/usr"]);
        refused(&[layer(), on_host], "/etc is on the host");
        let out = snapshots.mount("format/bind", "{{ mount 0 }}/../../x", &["rbind"]);
        refused(&[layer(), out], "on the host");
        let later = snapshots.mount("format/bind", "{{ mount 1 }}", &["rbind"]);
        refused(&[layer(), later], "no earlier mount 1");
        let ids = snapshots.mount(
            "format/overlay",
            "overlay",
            &["uidmap=0:1:2", "lowerdir={{ mount 0 }}"],
        );
        refused(&[layer(), ids], "uidmap");
        refused(
            &[layer(), snapshots.mount("squashfs", "/x", &[])],
            "squashfs",
        );
    }
}
