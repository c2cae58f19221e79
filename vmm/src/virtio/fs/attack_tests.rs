//! Attacks on the server by way of names, links and folders that change under it.

use super::tests::{CREATE, Client, LINK, LOOKUP, MKDIR, OPEN, RENAME, ROOT, SYMLINK, body};
use super::tests::{GETATTR, READ, READDIRPLUS, SETATTR, SETXATTR, UNLINK, WRITE, u64_at};
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

const RENAME2: u32 = 45;
const RENAME_EXCHANGE: u32 = 2;

/// Swaps two names of one folder, as renameat2(2) does with RENAME_EXCHANGE.
fn exchange(client: &mut Client, one: &str, other: &str) {
    let body = body().u64(ROOT).u32(RENAME_EXCHANGE).u32(0);
    client.ok(RENAME2, ROOT, body.name(one).name(other));
}

#[test]
fn a_folder_that_was_exchanged_for_a_link_is_still_the_folder() {
    let mut client = Client::new();
    let outside = client.folder.path().to_owned();
    client.ok(MKDIR, ROOT, body().u32(0o755).u32(0).name("folder"));
    let target = outside.to_str().unwrap();
    client.ok(SYMLINK, ROOT, body().name("link").name(target));
    let folder = client.lookup(ROOT, "folder");
    exchange(&mut client, "folder", "link");
    // By the number that it had before, it is what it was, whatever its name is now.
    let secret = client.send(LOOKUP, folder, body().name("secret"));
    assert_eq!(secret, Err(libc::ENOENT));
    let create = body().u32(libc::O_RDWR as u32).u32(0o644).u32(0).u32(0);
    client.ok(CREATE, folder, create.name("made"));
    assert!(client.share.join("link/made").exists() && !outside.join("made").exists());
    client.ok(MKDIR, folder, body().u32(0o755).u32(0).name("below"));
    assert!(!outside.join("below").exists());
    // By its name, it is a link, which nothing is looked up in.
    let link = client.lookup(ROOT, "folder");
    for name in ["secret", "share"] {
        let found = client.send(LOOKUP, link, body().name(name));
        assert_eq!(found, Err(libc::ENOTDIR));
        let removed = client.send(UNLINK, link, body().name(name));
        assert_eq!(removed, Err(libc::ENOTDIR));
        let moved = body().u64(ROOT).name(name).name("taken");
        assert_eq!(client.send(RENAME, link, moved), Err(libc::ENOTDIR));
    }
    let file = client.lookup(folder, "made");
    let linked = client.send(LINK, link, body().u64(file).name("out"));
    assert_eq!(linked, Err(libc::ENOTDIR));
    assert_eq!(fs::read(outside.join("secret")).unwrap(), b"secret");
}

/// A container that swaps folders for links all the time, while its kernel walks through them.
#[test]
fn folders_that_turn_into_links_during_a_walk_lead_nowhere() {
    let mut client = Client::new();
    let outside = client.folder.path().to_owned();
    for path in ["a", "a/b", "a/b/c"] {
        fs::create_dir(client.share.join(path)).unwrap();
    }
    // Below the link there is the same path as below the folder, with another file at its end.
    fs::create_dir_all(outside.join("b/c")).unwrap();
    for (folder, text) in [(client.share.join("a"), "own"), (outside.clone(), "secret")] {
        fs::write(folder.join("b/c/file"), text).unwrap();
    }
    let link = client.share.join("swap");
    symlink(&outside, &link).unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let (done, folder) = (stop.clone(), client.share.join("a"));
    let swapper = std::thread::spawn(move || {
        let (one, other) = (cstring(&folder), cstring(&link));
        let mut swaps = 0;
        while !done.load(Ordering::Relaxed) {
            // SAFETY: both paths are C strings that outlive the call.
            let result = unsafe {
                libc::renameat2(
                    libc::AT_FDCWD,
                    one.as_ptr(),
                    libc::AT_FDCWD,
                    other.as_ptr(),
                    libc::RENAME_EXCHANGE,
                )
            };
            swaps += u32::from(result == 0);
        }
        swaps
    });
    let (mut reached, mut refused) = (0, 0);
    let end = std::time::Instant::now() + Duration::from_secs(20);
    while (reached < 20 || refused < 20) && std::time::Instant::now() < end {
        let mut node = ROOT;
        let walked = ["a", "b", "c", "file"].iter().try_for_each(|name| {
            let entry = client.send(LOOKUP, node, body().name(name))?;
            node = u64_at(&entry, 0);
            Ok::<_, i32>(())
        });
        match walked {
            Err(error) => {
                assert_eq!(error, libc::ENOTDIR);
                refused += 1;
            }
            Ok(()) => {
                let handle = client.open(OPEN, node, libc::O_RDONLY).unwrap();
                assert_eq!(client.read(READ, node, handle, 100).unwrap(), b"own");
                reached += 1;
            }
        }
    }
    stop.store(true, Ordering::Relaxed);
    let swaps = swapper.join().unwrap();
    assert!(
        swaps > 0 && reached > 0 && refused > 0,
        "{swaps} swaps, {reached} times reached, {refused} refused"
    );
}

fn cstring(path: &std::path::Path) -> std::ffi::CString {
    std::ffi::CString::new(path.to_str().unwrap()).unwrap()
}

#[test]
fn a_name_ends_at_its_nul_and_nothing_after_it_counts() {
    let mut client = Client::new();
    fs::create_dir(client.share.join("a")).unwrap();
    fs::write(client.share.join("a/file"), "x").unwrap();
    // What follows the NUL is no part of the name, be it a way out or a second name.
    for rest in ["/../../secret", "b", "/file"] {
        let request = body().name("a").bytes(rest.as_bytes()).bytes(b"\0");
        let found = client.send(LOOKUP, ROOT, request);
        match found {
            Err(error) => assert_eq!(error, libc::EINVAL, "{rest}"),
            Ok(entry) => {
                let kind = u64_at(&entry, 100) as u32 & libc::S_IFMT;
                assert_eq!(kind, libc::S_IFDIR, "{rest}");
            }
        }
    }
    let both = body().u64(ROOT).name("a").name("../secret");
    assert_eq!(client.send(RENAME, ROOT, both), Err(libc::EINVAL));
    let nothing = body().u32(0o755).u32(0).bytes(b"\0");
    assert_eq!(client.send(MKDIR, ROOT, nothing), Err(libc::EINVAL));
}

/// Needs to be root.
#[test]
fn set_id_bits_go_where_the_kernel_says_so_and_groups_are_inherited() {
    let mut client = Client::new();
    let path = client.share.join("shared");
    fs::create_dir(&path).unwrap();
    std::os::unix::fs::chown(&path, Some(0), Some(77)).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o2777)).unwrap();
    let folder = client.lookup(ROOT, "shared");
    client.ids = (1000, 1000);
    let flags = (libc::O_RDWR | libc::O_CREAT) as u32;
    let create = body().u32(flags).u32(0o2755).u32(0).u32(0);
    let made = client.ok(CREATE, folder, create.name("file"));
    let (node, handle) = (u64_at(&made, 0), u64_at(&made, 128));
    client.ok(MKDIR, folder, body().u32(0o755).u32(0).name("sub"));
    let sub = fs::metadata(path.join("sub")).unwrap();
    assert_eq!((sub.gid(), sub.mode() & 0o2000), (77, 0o2000));
    let file = fs::metadata(path.join("file")).unwrap();
    assert_eq!((file.uid(), file.gid()), (1000, 77));
    // A change of owner takes the bits (FATTR_UID with FATTR_KILL_SUIDGID), and so does a write
    // that says so (FUSE_WRITE_KILL_SUIDGID).
    client.ids = (0, 0);
    fs::set_permissions(path.join("file"), fs::Permissions::from_mode(0o6755)).unwrap();
    let set = body()
        .u32(2 | 1 << 11)
        .u32(0)
        .bytes(&[0; 64])
        .u32(0)
        .u32(1001);
    client.ok(SETATTR, node, set.u32(0).u32(0));
    let file = fs::metadata(path.join("file")).unwrap();
    assert_eq!((file.uid(), file.mode() & 0o6000), (1001, 0));
    fs::set_permissions(path.join("file"), fs::Permissions::from_mode(0o6755)).unwrap();
    let write = body().u64(handle).u64(0).u32(4).u32(4).u64(0).u32(2).u32(0);
    client.ok(WRITE, node, write.bytes(b"text"));
    let file = fs::metadata(path.join("file")).unwrap();
    assert_eq!(file.mode() & 0o6000, 0);
}

#[test]
fn attributes_that_are_the_hosts_alone_are_not_set() {
    let mut client = Client::with_thread(|| {
        crate::privileges::keep_across_users().unwrap();
        let keep = super::CAPABILITIES.iter().copied().collect();
        for set in [caps::CapSet::Effective, caps::CapSet::Permitted] {
            caps::set(None, set, &keep).unwrap();
        }
    });
    fs::write(client.share.join("file"), "").unwrap();
    let node = client.lookup(ROOT, "file");
    let set = |name: &str| body().u32(1).u32(0).name(name).bytes(b"x");
    for name in ["trusted.other", "user.bulkhead.overlay.opaque"] {
        let result = client.send(SETXATTR, node, set(name));
        assert_eq!(result, Err(libc::EPERM), "{name}");
    }
    // An overlay of the host's would take these for its own (CVE-2021-3493 is of that family): they
    // are kept under names that it doesn't know.
    for name in ["trusted.overlay.opaque", "trusted.overlay.redirect"] {
        client.ok(SETXATTR, node, set(name));
        let file = client.share.join("file");
        let attribute = |name: &str| {
            let name = std::ffi::CString::new(name).unwrap();
            let path = std::ffi::CString::new(file.as_os_str().as_encoded_bytes()).unwrap();
            // SAFETY: two C strings, and no buffer to write to.
            unsafe { libc::lgetxattr(path.as_ptr(), name.as_ptr(), std::ptr::null_mut(), 0) }
        };
        assert_eq!(attribute(name), -1, "{name}");
        let kept = name.replace("trusted.", "user.bulkhead.");
        assert_eq!(attribute(&kept), 1, "{kept}");
    }
}

/// Files of volumes are soon looked at again, others not.
#[test]
fn what_the_host_changes_is_not_kept_for_long() {
    let mut client = Client::new();
    for path in ["c1/rootfs/sub", "c1/mounts/0/sub", "c1/rootfs/mounts/0"] {
        fs::create_dir_all(client.share.join(path)).unwrap();
    }
    let walk = |client: &mut Client, path: &str| {
        let mut node = ROOT;
        let mut entry = Vec::new();
        for name in path.split('/') {
            entry = client.ok(LOOKUP, node, body().name(name));
            node = u64_at(&entry, 0);
        }
        // struct fuse_entry_out: nodeid, generation, entry_valid, attr_valid.
        (node, u64_at(&entry, 16), u64_at(&entry, 24))
    };
    let attributes = |client: &mut Client, node: u64| {
        u64_at(&client.ok(GETATTR, node, body().u32(0).u32(0).u64(0)), 0)
    };
    for (path, seconds) in [
        ("c1/rootfs/sub", 10),
        ("c1/rootfs/mounts/0", 10),
        ("c1/mounts/0", 1),
        ("c1/mounts/0/sub", 1),
    ] {
        let (node, name, found) = walk(&mut client, path);
        assert_eq!((name, found), (seconds, seconds), "{path}");
        assert_eq!(attributes(&mut client, node), seconds, "{path}");
    }
    assert_eq!(walk(&mut client, "c1").1, 0);
    // As listed: the times stand in each entry, too.
    let (mounts, ..) = walk(&mut client, "c1/mounts");
    let handle = client
        .open(super::tests::OPENDIR, mounts, libc::O_RDONLY)
        .unwrap();
    let listing = client.read(READDIRPLUS, mounts, handle, 4096).unwrap();
    assert_eq!((u64_at(&listing, 16), u64_at(&listing, 24)), (1, 1));
}

/// The host's daemons find an upper layer and its work folder by their names.
#[test]
fn an_upper_layer_keeps_its_name_and_its_folder() {
    let mut client = Client::new();
    let pair = client.share.join("c1/mounts/upper3");
    for name in ["fs/below", "work/work"] {
        fs::create_dir_all(pair.join(name)).unwrap();
    }
    let walk = |client: &mut Client, path: &str| {
        path.split('/')
            .fold(ROOT, |node, name| client.lookup(node, name))
    };
    let above = walk(&mut client, "c1/mounts/upper3");
    // As often as the client likes: it is found anew by its name only.
    client.forget(above, u64::MAX);
    let above = walk(&mut client, "c1/mounts/upper3");
    let (upper, work) = (client.lookup(above, "fs"), client.lookup(above, "work"));
    let below = client.lookup(upper, "below");
    let create = || body().u32(libc::O_RDWR as u32).u32(0o644).u32(0).u32(0);
    client.ok(CREATE, upper, create().name("file"));
    let file = client.lookup(upper, "file");
    // struct fuse_setattr_in with FATTR_MODE.
    let mode = [0; 6]
        .iter()
        .fold(body().u32(1).u32(0), |body, zero| body.u64(*zero));
    let fields = [0, 0, 0, 0o777, 0, 0, 0, 0];
    let mode = fields.iter().fold(mode, |body, field| body.u32(*field));
    for (opcode, node, body) in [
        (SYMLINK, above, body().name("link").name("/etc")),
        (MKDIR, above, body().u32(0o755).u32(0).name("new")),
        (
            super::tests::MKNOD,
            above,
            body().u32(libc::S_IFIFO).u32(0).u32(0).u32(0).name("f"),
        ),
        (CREATE, above, create().name("new")),
        (LINK, above, body().u64(file).name("linked")),
        (UNLINK, above, body().name("fs")),
        (super::tests::RMDIR, above, body().name("work")),
        (RENAME, above, body().u64(above).name("fs").name("other")),
        (RENAME, above, body().u64(work).name("fs").name("moved")),
        (RENAME, upper, body().u64(above).name("below").name("moved")),
        (
            RENAME2,
            above,
            body()
                .u64(upper)
                .u32(RENAME_EXCHANGE)
                .u32(0)
                .name("work")
                .name("below"),
        ),
        (SETATTR, above, mode),
        (
            SETXATTR,
            above,
            body().u32(1).u32(0).name("user.x").bytes(b"x"),
        ),
    ] {
        assert_eq!(
            client.send(opcode, node, body),
            Err(libc::EPERM),
            "{opcode}"
        );
    }
    // An overlay works in both, and moves from one to the other.
    client.ok(SYMLINK, work, body().name("link").name("/etc"));
    client.ok(RENAME, work, body().u64(below).name("link").name("moved"));
    assert!(pair.join("fs/below/moved").is_symlink());
    let names = fs::read_dir(&pair)
        .unwrap()
        .map(|entry| entry.unwrap().file_name());
    let mut names: Vec<_> = names.collect();
    names.sort_unstable();
    assert_eq!(names, ["fs", "work"]);
}
