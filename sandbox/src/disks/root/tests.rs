//! What a guest mounts for a root, by what a daemon lists.

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
        options.contains(&"upperdir=/run/bulkhead/shared/c1/mounts/upper0/fs".to_owned()),
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
    for (option, text) in [
        ("lowerdir+=/etc", "lowerdir+=/etc"),
        ("lowerdir={{ mount 0 }}::{{ mount 0 }}", "on the host"),
    ] {
        let layers = snapshots.mount("format/overlay", "overlay", &[option]);
        refused(&[layer(), layers], text);
    }
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

/// The disk of a layer with a limit is a mount that the daemon's list doesn't have.
#[test]
fn folders_are_made_on_the_mount_that_they_name_also_behind_a_limited_layer() {
    let snapshots = Snapshots::new();
    std::fs::create_dir_all(snapshots.path("9/fs/kept")).unwrap();
    std::fs::write(snapshots.path("9/bulkhead-writable.ext4"), "").unwrap();
    let overlay = [
        &format!("workdir={}", snapshots.path("9/work")),
        &format!("upperdir={}", snapshots.path("9/fs")),
        "lowerdir={{ mount 0 }}",
    ];
    let folder = "X-containerd.mkdir.path={{ mount 1 }}/made:0750:1:2";
    let mounts = [
        snapshots.layer("1.erofs"),
        snapshots.mount("format/overlay", "overlay", &overlay),
        snapshots.mount(
            "format/mkdir/bind",
            "{{ mount 1 }}/made",
            &[folder, "rbind"],
        ),
    ];
    let limit = WritableLimit {
        mib: Some(64),
        annotated: true,
    };
    let id = ContainerId::try_from("c1").unwrap();
    let root = DiskRoot::plan(&mounts, &id, limit, &mut Vec::new());
    let root = root.unwrap().unwrap();
    let folders = |name: &str| -> Vec<&str> {
        let target = format!("containers/c1/{name}");
        let mount = root.storage.iter().find(|one| one.target == target);
        let folders = mount.unwrap().folders.iter();
        folders.map(|one| one.path.as_str()).collect()
    };
    assert_eq!(folders("1"), ["made"]);
    assert_eq!(folders("writable"), ["upper", "work"]);
    assert_eq!(root.upper, None);
}

#[test]
fn a_link_in_the_place_of_an_upper_layer_is_not_followed() {
    let snapshots = Snapshots::new();
    std::fs::remove_dir(snapshots.path("9/fs")).unwrap();
    std::os::unix::fs::symlink("/etc", snapshots.path("9/fs")).unwrap();
    let overlay = [
        &format!("workdir={}", snapshots.path("9/work")),
        &format!("upperdir={}", snapshots.path("9/fs")),
        "lowerdir={{ mount 0 }}",
    ];
    let mounts = [
        snapshots.layer("1.erofs"),
        snapshots.mount("format/overlay", "overlay", &overlay),
    ];
    let error = plan(&mounts).unwrap_err();
    assert!(error.contains("are not two folders"), "{error}");
    let on_host = [snapshots.mount("overlay", "overlay", &overlay[..2])];
    let limit = WritableLimit {
        mib: Some(64),
        annotated: false,
    };
    let id = ContainerId::try_from("c1").unwrap();
    let error = DiskRoot::plan(&on_host, &id, limit, &mut Vec::new()).unwrap_err();
    assert!(error.to_string().contains("9/fs"), "{error}");
}
