use super::*;
use crate::error::Kind;
use proptest::prelude::*;
use std::os::unix::fs::MetadataExt;

fn tmpfs(target: &str, pod: bool, options: &[&str]) -> StorageMount {
    StorageMount {
        target: target.into(),
        type_: "tmpfs".into(),
        source: "tmpfs".into(),
        options: options.iter().map(|&word| word.to_owned()).collect(),
        pod,
        ..Default::default()
    }
}

/// A storage in a mount namespace of this test's thread.
fn alone(test: impl FnOnce(Storage) + Send + 'static) {
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED 1 test: it needs root");
        return;
    }
    let thread = std::thread::spawn(|| {
        use rustix::mount::MountPropagationFlags as P;
        crate::namespaces::unshare(rustix::thread::UnshareFlags::NEWNS).expect("unshared");
        rustix::mount::mount_change("/", P::PRIVATE | P::REC).expect("private");
        let folder = tempfile::tempdir().expect("a folder");
        test(Storage::new(folder.path().join("storage")));
    });
    thread.join().expect("the test");
}

fn is_mount(storage: &Storage, name: &str) -> bool {
    let path = storage.root.join(name);
    let device = |path: &Path| std::fs::metadata(path).map(|found| found.dev()).ok();
    device(&path).is_some_and(|own| path.parent().and_then(device) != Some(own))
}

#[test]
fn a_containers_mounts_go_with_it_and_a_pods_stay() {
    alone(|storage| {
        let own = tmpfs("c1/0", false, &["size=1m,mode=2750", "uid=7", "nodev"]);
        let mut pods = tmpfs("volumes/cache", true, &["size=64k"]);
        pods.folders.push(StorageFolder {
            path: "sub".into(),
            mode: 0o2770,
            uid: 5,
            gid: 6,
            ..Default::default()
        });
        let mounted = storage
            .mount(&[own.clone(), pods.clone()])
            .expect("mounted");
        let found = std::fs::metadata(storage.root.join("c1/0")).expect("a folder");
        assert_eq!((found.mode() & 0o7777, found.uid()), (0o2750, 7));
        let found = std::fs::metadata(storage.root.join("volumes/cache/sub")).expect("a folder");
        assert_eq!(
            (found.mode() & 0o7777, found.uid(), found.gid()),
            (0o2770, 5, 6)
        );
        let full = std::fs::write(storage.root.join("volumes/cache/big"), vec![1; 100_000]);
        assert_eq!(full.map_err(|e| e.raw_os_error()), Err(Some(libc::ENOSPC)));
        let twice = storage
            .mount(&[own])
            .map(drop)
            .map_err(|failure| failure.kind);
        assert_eq!(twice, Err(Kind::AlreadyExists));
        std::fs::create_dir(storage.root.join("volumes/cache/sub/kept")).expect("made");
        drop(mounted);
        assert!(!storage.root.join("c1").exists());
        // The pod's next container finds what the first one left.
        storage.mount(&[pods]).expect("mounted again");
        assert!(storage.root.join("volumes/cache/sub/kept").exists());
    });
}

#[test]
fn after_a_failure_nothing_is_left() {
    alone(|storage| {
        let all = [
            tmpfs("c1/0", false, &[]),
            tmpfs("volumes/a", true, &[]),
            tmpfs("c1/1", false, &["size=nonsense"]),
        ];
        let failure = storage.mount(&all).map(drop).expect_err("refused");
        assert_eq!(failure.kind, Kind::InvalidArgument);
        assert!(failure.message.contains("nonsense"), "{failure}");
        assert!(!storage.root.join("c1").exists() && !storage.root.join("volumes").exists());
        let mut unknown = tmpfs("c1/0", false, &[]);
        unknown.type_ = "floppyfs".into();
        let failure = storage.mount(&[unknown]).map(drop).expect_err("refused");
        assert_eq!(failure.kind, Kind::InvalidArgument, "{failure}");
        storage.mount(&all[..2]).expect("the names are free again");
    });
}

#[test]
fn layers_are_stacked_and_links_in_a_mount_lead_nowhere() {
    alone(|storage| {
        let names = ["c1/0", "c1/1"];
        let layers = names.map(|name| tmpfs(name, false, &[]));
        let held = storage.mount(&layers).expect("mounted");
        let at = |name: &str| storage.root.join(name);
        for (name, number) in names.iter().zip(0..) {
            std::fs::write(at(name).join(format!("file{number}")), "x").expect("written");
        }
        let mut upper = tmpfs("c1/upper", false, &[]);
        upper.folders = ["fs", "work"]
            .map(|path| StorageFolder {
                path: path.into(),
                mode: 0o755,
                ..Default::default()
            })
            .into();
        let path = |name: &str| at(name).display().to_string();
        let overlay = StorageMount {
            target: "c1/root".into(),
            type_: "overlay".into(),
            source: "overlay".into(),
            options: vec![
                format!("upperdir={}", path("c1/upper/fs")),
                format!("workdir={}", path("c1/upper/work")),
                format!("lowerdir+={}", path("c1/0")),
                format!("lowerdir+={}", path("c1/1")),
            ],
            ..Default::default()
        };
        let root = storage.mount(&[upper, overlay]).expect("stacked");
        assert!(is_mount(&storage, "c1/root"));
        assert!(at("c1/root/file0").exists() && at("c1/root/file1").exists());
        std::fs::write(at("c1/root/new"), "x").expect("written");
        assert!(at("c1/upper/fs/new").exists());
        std::os::unix::fs::symlink("/etc", at("c1/0/link")).expect("a link");
        let wanted = StorageFolder {
            path: "link/x".into(),
            ..Default::default()
        };
        assert!(make_folder(&at("c1/0/link/x"), &wanted).is_err());
        root.release();
        root.release();
        drop(held);
        assert!(!at("c1").exists());
    });
}

proptest! {
    #[test]
    fn targets_stay_below_the_root(path in "[a./]{0,8}") {
        if let Ok(path) = plain("f", &path) {
            prop_assert!(path.is_relative() && path.components().count() > 0);
            prop_assert!(path.components().all(|part| matches!(part, Component::Normal(_))));
        }
    }
}
