//! The device as a FUSE client sees it, a hostile one above all.

use super::super::VirtioDevice;
use super::super::testing::{Desc, DriverQueue, activation, install_filter, wait_until};
use super::sync::SYNCFS;
use super::*;
use crate::event_loop::EventLoop;
use crate::seccomp::ThreadKind;
use caps::CapSet;
use proptest::prelude::*;
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

pub(super) const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
pub(super) const GETATTR: u32 = 3;
pub(super) const SETATTR: u32 = 4;
const READLINK: u32 = 5;
pub(super) const SYMLINK: u32 = 6;
pub(super) const MKNOD: u32 = 8;
pub(super) const MKDIR: u32 = 9;
pub(super) const UNLINK: u32 = 10;
pub(super) const RMDIR: u32 = 11;
pub(super) const RENAME: u32 = 12;
pub(super) const LINK: u32 = 13;
pub(super) const OPEN: u32 = 14;
pub(super) const READ: u32 = 15;
pub(super) const WRITE: u32 = 16;
const STATFS: u32 = 17;
const RELEASE: u32 = 18;
const FSYNC: u32 = 20;
pub(super) const SETXATTR: u32 = 21;
const GETXATTR: u32 = 22;
const LISTXATTR: u32 = 23;
const FLUSH: u32 = 25;
const INIT: u32 = 26;
pub(super) const OPENDIR: u32 = 27;
const READDIR: u32 = 28;
const ACCESS: u32 = 34;
pub(super) const CREATE: u32 = 35;
const IOCTL: u32 = 39;
const FALLOCATE: u32 = 43;
pub(super) const READDIRPLUS: u32 = 44;
const LSEEK: u32 = 46;

const REQUEST: u64 = 0x10_0000;
const REPLY: u64 = 0x20_0000;
pub(super) const ROOT: u64 = 1;

/// A FUSE client on the driver's side of the rings.
pub(super) struct Client {
    pub(super) mem: GuestMemoryMmap,
    pub(super) priority: DriverQueue,
    requests: DriverQueue,
    pub(super) device: FsDevice,
    interrupt: Arc<super::super::Interrupt>,
    pub(super) share: PathBuf,
    /// Holds the share and a file beside it that no client may reach.
    pub(super) folder: tempfile::TempDir,
    pub(super) ids: (u32, u32),
    _events: EventLoop,
}

/// Bytes of a request's body.
#[derive(Default)]
pub(super) struct Body(Vec<u8>);

impl Body {
    pub(super) fn u32(mut self, value: u32) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }
    pub(super) fn u64(mut self, value: u64) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }
    pub(super) fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }
    /// With its NUL.
    pub(super) fn name(self, name: &str) -> Self {
        self.bytes(name.as_bytes()).bytes(b"\0")
    }
}

pub(super) fn body() -> Body {
    Body::default()
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

pub(super) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

impl Client {
    pub(super) fn new() -> Self {
        Self::with_thread(|| ())
    }

    /// `on_start` runs first in the server's thread, which then gets the filter that it has in
    /// earnest.
    pub(super) fn with_thread(on_start: impl FnOnce() + Send + 'static) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let share = folder.path().join("share");
        fs::create_dir(&share).unwrap();
        fs::write(folder.path().join("secret"), "secret").unwrap();
        let mem = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x40_0000)]).unwrap();
        let events = EventLoop::new("fs", || {
            on_start();
            install_filter(ThreadKind::FileServer);
        })
        .unwrap();
        let descriptor = OwnedFd::from(fs::File::open(&share).unwrap());
        let mut device = FsDevice::new(descriptor, events.handle()).unwrap();
        let priority = DriverQueue::at(&mem, 32, 0x1000);
        let requests = DriverQueue::at(&mem, 128, 0x4000);
        let (activation, _line) = activation(&mem, &[&priority, &requests], 0);
        let interrupt = activation.interrupt.clone();
        device.activate(activation).unwrap();
        let mut client = Client {
            mem,
            priority,
            requests,
            device,
            interrupt,
            share,
            folder,
            ids: (0, 0),
            _events: events,
        };
        client.init();
        client
    }

    fn init(&mut self) -> Vec<u8> {
        // 7.40, all flags, the second word of them, too.
        let body = body().u32(7).u32(40).u32(1 << 20).u32(!0).u32(!0);
        self.ok(INIT, 0, body.bytes(&[0; 44]))
    }

    pub(super) fn message(&self, opcode: u32, node: u64, body: &[u8]) -> Vec<u8> {
        let len = (40 + body.len()) as u32;
        let header = Body::default()
            .u32(len)
            .u32(opcode)
            .u64(77)
            .u64(node)
            .u32(self.ids.0)
            .u32(self.ids.1)
            .u32(1)
            .u32(0);
        header.bytes(body).0
    }

    /// Sends raw bytes; gives what was written to the reply buffer.
    fn raw(&mut self, message: &[u8], room: u32) -> Vec<u8> {
        self.mem
            .write_slice(message, GuestAddress(REQUEST))
            .unwrap();
        self.requests.add(&[
            Desc::readable(REQUEST, message.len() as u32),
            Desc::writable(REPLY, room),
        ]);
        self.requests.kick();
        let (_, len) = self.requests.wait_used();
        let mut reply = vec![0; len as usize];
        self.mem
            .read_slice(&mut reply, GuestAddress(REPLY))
            .unwrap();
        reply
    }

    pub(super) fn send(&mut self, opcode: u32, node: u64, body: Body) -> Result<Vec<u8>, i32> {
        let message = self.message(opcode, node, &body.0);
        let reply = self.raw(&message, 0x10000);
        assert_eq!(u32_at(&reply, 0) as usize, reply.len());
        assert_eq!(u64_at(&reply, 8), 77);
        match u32_at(&reply, 4) as i32 {
            0 => Ok(reply[16..].to_vec()),
            error => Err(-error),
        }
    }

    #[track_caller]
    pub(super) fn ok(&mut self, opcode: u32, node: u64, body: Body) -> Vec<u8> {
        self.send(opcode, node, body).unwrap()
    }

    /// Takes lookups of a node back.
    pub(super) fn forget(&mut self, node: u64, count: u64) {
        let message = self.message(FORGET, node, &count.to_le_bytes());
        let sent = self.mem.write_slice(&message, GuestAddress(REQUEST));
        sent.unwrap();
        let len = message.len() as u32;
        self.priority.add(&[Desc::readable(REQUEST, len)]);
        self.priority.kick();
        assert_eq!(self.priority.wait_used().1, 0);
    }

    /// Node id of a name in a folder.
    #[track_caller]
    pub(super) fn lookup(&mut self, parent: u64, name: &str) -> u64 {
        u64_at(&self.ok(LOOKUP, parent, body().name(name)), 0)
    }

    fn create(&mut self, name: &str, flags: i32) -> Result<Vec<u8>, i32> {
        let body = body().u32(flags as u32).u32(0o644).u32(0).u32(0);
        self.send(CREATE, ROOT, body.name(name))
    }

    pub(super) fn open(&mut self, opcode: u32, node: u64, flags: i32) -> Result<u64, i32> {
        let reply = self.send(opcode, node, body().u32(flags as u32).u32(0))?;
        Ok(u64_at(&reply, 0))
    }

    pub(super) fn read(
        &mut self,
        opcode: u32,
        node: u64,
        handle: u64,
        size: u32,
    ) -> Result<Vec<u8>, i32> {
        let body = body().u64(handle).u64(0).u32(size).u32(0).u64(0);
        self.send(opcode, node, body.u32(0).u32(0))
    }

    fn write(&mut self, node: u64, handle: u64, bytes: &[u8]) -> Result<Vec<u8>, i32> {
        let body = body().u64(handle).u64(0).u32(bytes.len() as u32).u32(0);
        self.send(WRITE, node, body.u64(0).u32(1).u32(0).bytes(bytes))
    }
}

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
fn names_that_are_no_component_are_refused() {
    let mut client = Client::new();
    fs::create_dir(client.share.join("folder")).unwrap();
    fs::write(client.share.join("file"), "").unwrap();
    let folder = client.lookup(ROOT, "folder");
    let file = client.lookup(ROOT, "file");
    let absolute = client.folder.path().join("made");
    let absolute = absolute.to_str().unwrap();
    for name in [
        "..",
        ".",
        "",
        "/",
        "../made",
        "a/b",
        "folder/../../made",
        absolute,
    ] {
        for parent in [ROOT, folder] {
            for (opcode, request) in [
                (LOOKUP, body().name(name)),
                (MKDIR, body().u32(0o755).u32(0).name(name)),
                (MKNOD, body().u32(0o100_644).u32(0).u32(0).u32(0).name(name)),
                (SYMLINK, body().name(name).name("target")),
                (CREATE, body().u32(2).u32(0o644).u32(0).u32(0).name(name)),
                (LINK, body().u64(file).name(name)),
                (UNLINK, body().name(name)),
                (RMDIR, body().name(name)),
                (RENAME, body().u64(ROOT).name("file").name(name)),
                (RENAME, body().u64(ROOT).name(name).name("new")),
            ] {
                let result = client.send(opcode, parent, request);
                assert_eq!(result, Err(libc::EINVAL), "operation {opcode} on {name:?}");
            }
        }
    }
    let mut names: Vec<_> = fs::read_dir(client.folder.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    names.sort();
    assert_eq!(names, ["secret", "share"]);
    let long = "x".repeat(256);
    assert_eq!(
        client.send(LOOKUP, ROOT, body().name(&long)),
        Err(libc::ENAMETOOLONG)
    );
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
fn messages_without_sense_are_answered_or_dropped() {
    let mut client = Client::new();
    // 48 and 49 are the DAX window's.
    for (opcode, error) in [
        (0, libc::ENOSYS),
        (7, libc::ENOSYS),
        (IOCTL, libc::ENOTTY),
        (48, libc::EINVAL),
        (49, libc::EINVAL),
        (99, libc::ENOSYS),
        (u32::MAX, libc::ENOSYS),
    ] {
        let answer = client.send(opcode, ROOT, body().bytes(&[0; 64]));
        assert_eq!(answer, Err(error), "{opcode}");
    }
    // Too short for a header: no answer can be given.
    for len in [0, 1, 39] {
        assert!(client.raw(&vec![1; len], 4096).is_empty());
    }
    // Too short for its fields, a name without its NUL, a length beyond the bytes that are there.
    let mut long = client.message(LOOKUP, ROOT, b"x\0");
    long[..4].copy_from_slice(&0x1000u32.to_le_bytes());
    for message in [
        client.message(MKDIR, ROOT, &[0; 3]),
        client.message(LOOKUP, ROOT, b"name"),
        long,
    ] {
        let reply = client.raw(&message, 4096);
        assert_eq!(reply.len(), 16);
        assert_eq!(u32_at(&reply, 4) as i32, -libc::EINVAL);
        assert_eq!(u64_at(&reply, 8), 77);
    }
    // No room for an answer.
    let message = client.message(GETATTR, ROOT, &[0; 16]);
    assert!(client.raw(&message, 8).is_empty());
    // Nodes and handles that don't exist.
    for node in [2, 99, u64::MAX] {
        assert_eq!(
            client.send(LOOKUP, node, body().name("x")),
            Err(libc::EBADF)
        );
        assert_eq!(client.read(READ, node, 5, 100), Err(libc::EBADF));
    }
    // A folder's listing longer than any reply.
    let handle = client.open(OPENDIR, ROOT, libc::O_RDONLY).unwrap();
    assert_eq!(
        client.read(READDIR, ROOT, handle, u32::MAX),
        Err(libc::ENOMEM)
    );
    // FORGET has no answer and comes on its own queue.
    client.forget(ROOT, u64::MAX);
    client.ok(GETATTR, ROOT, body().u32(0).u32(0).u64(0));
    assert!(!client.interrupt.reset_needed());
}

#[test]
fn endless_messages_are_refused_and_broken_chains_need_a_reset() {
    let mut client = Client::new();
    let message = client.message(GETATTR, ROOT, &[0; 16]);
    client
        .mem
        .write_slice(&message, GuestAddress(REQUEST))
        .unwrap();
    let mut chain = vec![Desc::readable(REQUEST, message.len() as u32)];
    chain.extend(vec![Desc::writable(REPLY, 0x10_0000); 8]);
    client.requests.add(&chain);
    client.requests.kick();
    assert_eq!(client.requests.wait_used().1, 0);

    let looped = [
        Desc::readable(REQUEST, 56),
        Desc::writable(REPLY, 16).next(0),
    ];
    client.requests.add_head(0);
    let mut broken = Client::new();
    broken.requests.add(&looped);
    broken.requests.kick();
    wait_until("DEVICE_NEEDS_RESET", || {
        broken.interrupt.reset_needed().then_some(())
    });
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

fn any_message() -> impl Strategy<Value = (u32, u64, Vec<u8>, u32)> {
    let opcode = prop_oneof![8 => 1u32..52, 1 => any::<u32>()];
    let node = prop_oneof![8 => 1u64..5, 1 => any::<u64>()];
    let word = prop_oneof![
        4 => (0u64..4).prop_map(|value| value.to_le_bytes().to_vec()),
        1 => any::<u64>().prop_map(|value| value.to_le_bytes().to_vec()),
        3 => prop::sample::select(vec!["a", "b", "..", "/", "../secret", "a/b"])
            .prop_map(|name| format!("{name}\0").into_bytes()),
        1 => prop::collection::vec(any::<u8>(), 0..40),
    ];
    let bytes = prop::collection::vec(word, 0..8).prop_map(|words| words.concat());
    let room = prop_oneof![4 => Just(0x4000u32), 1 => 0u32..200];
    (opcode, node, bytes, room)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Any messages: the server lives, the ring lives, and nothing beside the share is touched.
    #[test]
    fn any_messages_stay_inside(messages in prop::collection::vec(any_message(), 1..32)) {
        let mut client = Client::new();
        fs::write(client.share.join("a"), "a").unwrap();
        fs::create_dir(client.share.join("b")).unwrap();
        client.lookup(ROOT, "a");
        client.lookup(ROOT, "b");
        for (opcode, node, bytes, room) in messages {
            // fallocate(2) could fill the host's disk, which is the guest's right.
            if opcode == FALLOCATE {
                continue;
            }
            let message = client.message(opcode, node, &bytes);
            let reply = client.raw(&message, room);
            prop_assert!(reply.len() <= room as usize);
        }
        client.ok(GETATTR, ROOT, body().u32(0).u32(0).u64(0));
        prop_assert!(!client.interrupt.reset_needed());
        prop_assert_eq!(fs::read(client.folder.path().join("secret")).unwrap(), b"secret");
        prop_assert_eq!(fs::read_dir(client.folder.path()).unwrap().count(), 2);
    }

    /// Any chains, looped and indirect ones among them: the worker lives.
    #[test]
    fn any_chains_are_survived(chains in prop::collection::vec(prop::collection::vec(Desc::any(), 1..6), 1..8)) {
        let mut client = Client::new();
        for chain in &chains {
            client.requests.add(chain);
            client.requests.kick();
        }
        wait_until("an end", || {
            let mut all = 0;
            while client.requests.used().is_some() {
                all += 1;
            }
            (all > 0 || client.interrupt.reset_needed()).then_some(())
        });
        prop_assert_eq!(client.device.reset().unwrap().len(), 2);
    }
}
