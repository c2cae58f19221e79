//! The device as a FUSE client sees it.

mod client;
mod hostile;

pub(super) use client::*;

use super::super::VirtioDevice;
use super::super::testing::{DriverQueue, activation};
use super::sync::SYNCFS;
use super::*;
use caps::CapSet;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;

#[test]
fn the_configuration_space_has_the_tag() {
    let client = Client::new();
    let config = client.device.config();
    assert_eq!(config.len(), 40);
    assert_eq!(&config[..9], b"bulkhead\0");
    assert_eq!(config[36..], [1, 0, 0, 0]);
}

#[test]
fn large_requests_and_no_dax_are_negotiated() {
    let reply = Client::new().init();
    assert_eq!(u32_at(&reply, 0), 7);
    assert_eq!(u32_at(&reply, 20), 1 << 20, "max_write");
    let flags = u64::from(u32_at(&reply, 12)) | u64::from(u32_at(&reply, 32)) << 32;
    for (bit, wanted) in [
        (0x1, true),            // ASYNC_READ
        (0x8, true),            // ATOMIC_O_TRUNC
        (0x2000, true),         // DO_READDIRPLUS
        (0x1_0000, false),      // WRITEBACK_CACHE
        (0x40_0000, true),      // MAX_PAGES
        (0x1000_0000, true),    // HANDLE_KILLPRIV_V2
        (0x2_0000_0000, false), // PERFILE_DAX
    ] {
        assert_eq!(flags & bit != 0, wanted, "{bit:#x}");
    }
}

#[test]
fn files_are_made_written_read_and_listed() {
    let mut client = Client::new();
    client.ids = (1234, 5678);
    let created = client.create("file", libc::O_RDWR).unwrap();
    let (node, handle) = (u64_at(&created, 0), u64_at(&created, 128));
    client.write(node, handle, b"some bytes").unwrap();
    let path = client.share.join("file");
    assert_eq!(fs::read(&path).unwrap(), b"some bytes");
    let metadata = fs::metadata(&path).unwrap();
    assert_eq!((metadata.uid(), metadata.gid()), (1234, 5678));
    assert_eq!(client.read(READ, node, handle, 100).unwrap(), b"some bytes");
    client.ok(RELEASE, node, body().u64(handle).u32(2).u32(0).u64(0));
    assert!(client.read(READ, node, handle, 100).is_err());

    client.ok(MKDIR, ROOT, body().u32(0o750).u32(0o022).name("folder"));
    let folder = client.lookup(ROOT, "folder");
    assert_eq!(
        fs::metadata(client.share.join("folder")).unwrap().mode(),
        0o40750
    );
    fs::write(client.share.join("folder/host"), "of the host").unwrap();
    let handle = client.open(OPENDIR, folder, libc::O_RDONLY).unwrap();
    let listing = client.read(READDIRPLUS, folder, handle, 4096).unwrap();
    let node = client.lookup(folder, "host");
    // struct fuse_direntplus: entry of 128 bytes, then ino, off, namelen, type, name.
    assert_eq!(u64_at(&listing, 0), node);
    assert_eq!(u64_at(&listing, 40), node, "st_ino");
    assert_eq!(u64_at(&listing, 128), node, "d_ino");
    assert_eq!(&listing[152..156], b"host");
    let plain = client.read(READDIR, folder, handle, 4096).unwrap();
    assert_eq!(u64_at(&plain, 0), node, "d_ino");
    let attributes = client.ok(GETATTR, node, body().u32(0).u32(0).u64(0));
    assert_eq!(u64_at(&attributes, 16), node, "st_ino");

    let handle = client
        .open(OPEN, node, libc::O_RDONLY | 0x8000 | 0x20)
        .unwrap();
    assert_eq!(
        client.read(READ, node, handle, 4096).unwrap(),
        b"of the host"
    );
    client.ok(RENAME, folder, body().u64(ROOT).name("host").name("moved"));
    assert!(client.share.join("moved").exists());
    client.ok(LINK, ROOT, body().u64(node).name("again"));
    assert_eq!(fs::metadata(client.share.join("again")).unwrap().nlink(), 2);
    client.ok(UNLINK, ROOT, body().name("again"));
    client.ok(RMDIR, ROOT, body().name("folder"));
    assert_eq!(
        client.send(LOOKUP, ROOT, body().name("folder")),
        Err(libc::ENOENT)
    );
}

#[test]
fn a_file_is_used_in_every_way() {
    let mut client = Client::new();
    let created = client.create("file", libc::O_RDWR).unwrap();
    let (node, handle) = (u64_at(&created, 0), u64_at(&created, 128));
    let path = client.share.join("file");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o4755)).unwrap();
    // FUSE_WRITE_KILL_SUIDGID: the server drops the bits, as CAP_FSETID would keep them.
    let write = body().u64(handle).u64(0).u32(4).u32(4).u64(0).u32(2).u32(0);
    client.ok(WRITE, node, write.bytes(b"text"));
    assert_eq!(fs::metadata(&path).unwrap().mode(), 0o100_755);
    client.ok(FALLOCATE, node, body().u64(handle).u64(0).u64(9000).u64(0));
    assert_eq!(fs::metadata(&path).unwrap().len(), 9000);
    let seek = body().u64(handle).u64(0).u32(libc::SEEK_HOLE as u32).u32(0);
    // Storage that was never written may count as a hole.
    let hole = u64_at(&client.ok(LSEEK, node, seek), 0);
    assert!((4..=9000).contains(&hole), "{hole}");
    // FATTR_ATIME | FATTR_MTIME, by handle and by node.
    for (valid, fh) in [(0x10 | 0x20 | 0x40, handle), (0x10 | 0x20, 0)] {
        let set = body()
            .u32(valid)
            .u32(0)
            .u64(fh)
            .u64(0)
            .u64(0)
            .u64(11)
            .u64(22);
        client.ok(SETATTR, node, set.bytes(&[0; 40]));
        let metadata = fs::metadata(&path).unwrap();
        assert_eq!((metadata.atime(), metadata.mtime()), (11, 22));
    }
    let flush = client.send(FLUSH, node, body().u64(handle).bytes(&[0; 16]));
    assert_eq!(flush, Err(libc::ENOSYS), "so that it is not sent again");
    client.ok(FSYNC, node, body().u64(handle).u32(1).u32(0));
    client.ok(FSYNC, node, body().u64(handle).u32(0).u32(0));
    let reply = client.ok(STATFS, ROOT, body());
    assert_ne!(u64_at(&reply, 0), 0, "blocks");
    assert_eq!(client.send(ACCESS, node, body().u32(7).u32(0)), Ok(vec![]));
    // O_TRUNC comes with the open.
    client
        .open(OPEN, node, libc::O_RDWR | libc::O_TRUNC)
        .unwrap();
    assert_eq!(fs::metadata(&path).unwrap().len(), 0);
}

#[test]
fn only_the_top_of_the_share_is_looked_up_each_time() {
    let mut client = Client::new();
    fs::create_dir_all(client.share.join("container/rootfs")).unwrap();
    let top = client.ok(LOOKUP, ROOT, body().name("container"));
    let below = client.ok(LOOKUP, u64_at(&top, 0), body().name("rootfs"));
    // struct fuse_entry_out: nodeid, generation, entry_valid, attr_valid, in seconds.
    assert_eq!((u64_at(&top, 16), u64_at(&top, 24)), (0, 10));
    assert_eq!((u64_at(&below, 16), u64_at(&below, 24)), (10, 10));
}

/// The server holds a descriptor for each file that the guest knows.
#[test]
fn thousands_of_files_can_be_known_at_a_time() {
    let mut client = Client::new();
    for number in 0..3000 {
        fs::write(client.share.join(number.to_string()), "").unwrap();
        client.lookup(ROOT, &number.to_string());
    }
}

#[test]
fn modes_and_attributes_are_set() {
    let mut client = Client::new();
    fs::write(client.share.join("file"), "12345").unwrap();
    let node = client.lookup(ROOT, "file");
    // FATTR_MODE | FATTR_UID | FATTR_SIZE
    let set = body().u32(1 | 2 | 8).u32(0).u64(0).u64(3).u64(0);
    let set = set.bytes(&[0; 32]).bytes(&[0; 4]).u32(0o100_640).u32(0);
    client.ok(SETATTR, node, set.u32(77).u32(0).u32(0));
    let metadata = fs::metadata(client.share.join("file")).unwrap();
    assert_eq!(metadata.mode(), 0o100_640);
    assert_eq!((metadata.uid(), metadata.len()), (77, 3));

    let value = b"value";
    let set = body().u32(value.len() as u32).u32(0).name("user.test");
    // The file system of temporary files may have no attributes; then the server says so.
    match client.send(SETXATTR, node, set.bytes(value)) {
        Ok(_) => {
            let get = body().u32(u32::MAX).u32(0).name("user.test");
            assert_eq!(client.ok(GETXATTR, node, get), value);
            let names = client.ok(LISTXATTR, node, body().u32(u32::MAX).u32(0));
            assert!(names.windows(10).any(|name| name == b"user.test\0"));
        }
        Err(error) => assert_eq!(error, libc::EOPNOTSUPP),
    }
}

#[test]
fn links_lead_nowhere_on_the_host() {
    let mut client = Client::new();
    let secret = client.folder.path().join("secret");
    symlink(&secret, client.share.join("to-secret")).unwrap();
    symlink(client.folder.path(), client.share.join("to-folder")).unwrap();
    let to_secret = client.lookup(ROOT, "to-secret");
    let to_folder = client.lookup(ROOT, "to-folder");
    assert_eq!(
        client.ok(READLINK, to_secret, body()),
        secret.to_str().unwrap().as_bytes()
    );
    assert_eq!(
        client.open(OPEN, to_secret, libc::O_RDONLY),
        Err(libc::EBADF)
    );
    assert_eq!(
        client.open(OPENDIR, to_folder, libc::O_RDONLY),
        Err(libc::EBADF)
    );
    assert_eq!(
        client.send(LOOKUP, to_folder, body().name("secret")),
        Err(libc::ENOTDIR)
    );
    assert_eq!(client.create("to-secret", libc::O_RDWR), Err(libc::EBADF));
    // With O_PATH, creating would follow the link.
    for flags in [libc::O_PATH, libc::O_TMPFILE, libc::O_ASYNC, 1 << 30] {
        assert_eq!(client.create("to-secret", flags), Err(libc::EINVAL));
        assert_eq!(client.open(OPEN, to_secret, flags), Err(libc::EINVAL));
        assert_eq!(client.open(OPENDIR, ROOT, flags), Err(libc::EINVAL));
    }
    // The guest's own links may say what they like.
    client.ok(SYMLINK, ROOT, body().name("own").name("/etc/passwd"));
    assert_eq!(
        fs::read_link(client.share.join("own")).unwrap(),
        Path::new("/etc/passwd")
    );
    assert_eq!(fs::read(&secret).unwrap(), b"secret");
}

#[test]
fn device_nodes_and_fifos_are_neither_made_nor_opened() {
    let mut client = Client::new();
    let mknod = |mode: u32, rdev: u32| body().u32(mode).u32(rdev).u32(0).u32(0);
    for (mode, rdev) in [(0o020_666, 0x103), (0o060_666, 0x800), (0o060_666, 0)] {
        let result = client.send(MKNOD, ROOT, mknod(mode, rdev).name("node"));
        assert_eq!(result, Err(libc::EPERM));
    }
    client.ok(MKNOD, ROOT, mknod(0o010_666, 0).name("fifo"));
    let file_type = fs::metadata(client.share.join("fifo")).unwrap().file_type();
    assert!(file_type.is_fifo());
    // Made by the host, as in an image that was unpacked there.
    let path = std::ffi::CString::new(client.share.join("null").to_str().unwrap()).unwrap();
    // SAFETY: the path is a valid string.
    let made = unsafe { libc::mknod(path.as_ptr(), libc::S_IFCHR | 0o666, libc::makedev(1, 3)) };
    let names = if made == 0 {
        &["fifo", "null"][..]
    } else {
        &["fifo"]
    };
    for name in names {
        let node = client.lookup(ROOT, name);
        for flags in [libc::O_RDONLY, libc::O_RDWR, libc::O_NONBLOCK] {
            assert_eq!(client.open(OPEN, node, flags), Err(libc::EBADF), "{name}");
        }
        assert_eq!(
            client.create(name, libc::O_RDWR),
            Err(libc::EBADF),
            "{name}"
        );
    }
}

#[test]
fn all_file_systems_of_containers_are_synced() {
    let mut client = Client::new();
    for path in ["c1/rootfs", "c1/mounts/0", "c2/rootfs", "c2/mounts"] {
        fs::create_dir_all(client.share.join(path)).unwrap();
    }
    fs::write(client.share.join("c1/mounts/1"), "").unwrap();
    // One padding word, which Linux leaves at 0.
    client.ok(SYNCFS, ROOT, body().u64(0));
    // What can't be opened is no success.
    fs::remove_dir(client.share.join("c1/rootfs")).unwrap();
    symlink(client.folder.path(), client.share.join("c1/rootfs")).unwrap();
    assert_eq!(client.send(SYNCFS, ROOT, body().u64(0)), Err(libc::ELOOP));
    fs::remove_dir_all(client.share.join("c1")).unwrap();
    client.ok(SYNCFS, ROOT, body().u64(0));
    assert!(client.raw(&client.message(SYNCFS, ROOT, &[]), 8).is_empty());
}

#[test]
fn a_reset_forgets_the_drivers_files() {
    let mut client = Client::new();
    fs::write(client.share.join("file"), "").unwrap();
    let node = client.lookup(ROOT, "file");
    let handle = client.open(OPEN, node, libc::O_RDONLY).unwrap();
    assert_eq!(client.device.reset().unwrap().len(), 2);
    client.priority = DriverQueue::at(&client.mem, 32, 0x1000);
    client.requests = DriverQueue::at(&client.mem, 128, 0x4000);
    let (activation, _line) = activation(&client.mem, &[&client.priority, &client.requests], 0);
    client.device.activate(activation).unwrap();
    client.init();
    assert_eq!(client.read(READ, node, handle, 10), Err(libc::EBADF));
    let node = client.lookup(ROOT, "file");
    client.open(OPEN, node, libc::O_RDONLY).unwrap();
}

/// Needs to be root.
#[test]
fn the_documented_capabilities_do() {
    let mut client = Client::with_thread(|| {
        crate::privileges::keep_across_users().unwrap();
        let keep = CAPABILITIES.iter().copied().collect();
        for set in [CapSet::Effective, CapSet::Permitted] {
            caps::set(None, set, &keep).unwrap();
        }
    });
    fs::set_permissions(&client.share, fs::Permissions::from_mode(0o755)).unwrap();
    client.ids = (1000, 1000);
    // The share is root's and closed to others. That the guest's user may write to it is known to
    // the guest's kernel, by one of the user's further groups for example.
    client.create("by-user", libc::O_RDWR).unwrap();
    client.ok(MKDIR, ROOT, body().u32(0o755).u32(0).name("folder-by-user"));
    client.ok(SYMLINK, ROOT, body().name("link-by-user").name("target"));
    for name in ["by-user", "folder-by-user", "link-by-user"] {
        let metadata = fs::symlink_metadata(client.share.join(name)).unwrap();
        assert_eq!((metadata.uid(), metadata.gid()), (1000, 1000), "{name}");
    }
    client.ids = (0, 0);
    let node = u64_at(&client.create("file", libc::O_RDWR).unwrap(), 0);
    let set = |valid: u32, mode: u32| {
        let times = body().u32(valid).u32(0).u64(0).u64(0).u64(0);
        times
            .bytes(&[0; 36])
            .u32(mode)
            .u32(0)
            .u32(1000)
            .u32(1000)
            .u32(0)
    };
    // To another user, then with a set-user-ID bit, then linked: none of it is the server's file.
    client.ok(SETATTR, node, set(2 | 4, 0));
    client.ok(SETATTR, node, set(1, 0o104_700));
    client.ok(LINK, ROOT, body().u64(node).name("hard-link"));
    let metadata = fs::metadata(client.share.join("hard-link")).unwrap();
    assert_eq!((metadata.uid(), metadata.mode()), (1000, 0o104_700));
    client.open(OPEN, node, libc::O_RDWR).unwrap();
    // As another user and back: the capabilities are still there.
    fs::set_permissions(&client.share, fs::Permissions::from_mode(0o777)).unwrap();
    client.ids = (1000, 1000);
    let made = u64_at(&client.create("own", libc::O_RDWR).unwrap(), 0);
    client.ok(LINK, ROOT, body().u64(made).name("own-link"));
    // A file that the server found before it changed users: newer kernels let it link what it has
    // opened with the credentials of now, but not this one.
    client.ok(LINK, ROOT, body().u64(node).name("old-link"));
    client.ids = (0, 0);
    client.ok(SETATTR, made, set(2 | 4, 0));
    // A whiteout of an overlay needs no capability, though it looks like a device.
    let mknod = body().u32(0o020_000).u32(0).u32(0).u32(0);
    client.ok(MKNOD, ROOT, mknod.name("whiteout"));
}

/// Mounts made after the start appear, with numbers of their own. Needs CAP_SYS_ADMIN.
#[test]
fn mounts_below_the_share_are_served_with_distinct_numbers() {
    // A mount namespace of the thread's own, which the loop's thread inherits.
    let thread = std::thread::spawn(|| {
        if nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).is_err() {
            eprintln!("not run: needs CAP_SYS_ADMIN");
            return;
        }
        use nix::mount::{MsFlags, mount};
        let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        mount(None::<&str>, "/", None::<&str>, private, None::<&str>).unwrap();
        let mut client = Client::new();
        let mut numbers = Vec::new();
        for name in ["one", "two", "three"] {
            let path = client.share.join(name);
            fs::create_dir(&path).unwrap();
            let (kind, none) = (Some("tmpfs"), None::<&str>);
            mount(kind, &path, kind, MsFlags::empty(), none).unwrap();
            fs::write(path.join("file"), name).unwrap();
            fs::set_permissions(path.join("file"), fs::Permissions::from_mode(0o600)).unwrap();
            let folder = client.lookup(ROOT, name);
            let entry = client.ok(LOOKUP, folder, body().name("file"));
            let (node, st_ino) = (u64_at(&entry, 0), u64_at(&entry, 40));
            let handle = client.open(OPEN, node, libc::O_RDONLY).unwrap();
            let read = client.read(READ, node, handle, 100).unwrap();
            assert_eq!(read, name.as_bytes());
            let host = fs::metadata(path.join("file")).unwrap().ino();
            numbers.push((host, st_ino));
        }
        let hosts: Vec<_> = numbers.iter().map(|number| number.0).collect();
        assert!(hosts.windows(2).all(|pair| pair[0] == pair[1]), "{hosts:?}");
        let mut guests: Vec<_> = numbers.iter().map(|number| number.1).collect();
        guests.sort_unstable();
        guests.dedup();
        assert_eq!(guests.len(), 3);
    });
    thread.join().unwrap();
}
