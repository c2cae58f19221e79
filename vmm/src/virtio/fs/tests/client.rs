//! A FUSE client on the driver's side of the rings.

use super::super::super::testing::{Desc, DriverQueue, activation, install_filter};
use super::super::super::{Interrupt, VirtioDevice};
use super::super::*;
use crate::event_loop::EventLoop;
use crate::seccomp::ThreadKind;
use std::fs;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

pub const LOOKUP: u32 = 1;
pub const FORGET: u32 = 2;
pub const GETATTR: u32 = 3;
pub const SETATTR: u32 = 4;
pub const READLINK: u32 = 5;
pub const SYMLINK: u32 = 6;
pub const MKNOD: u32 = 8;
pub const MKDIR: u32 = 9;
pub const UNLINK: u32 = 10;
pub const RMDIR: u32 = 11;
pub const RENAME: u32 = 12;
pub const LINK: u32 = 13;
pub const OPEN: u32 = 14;
pub const READ: u32 = 15;
pub const WRITE: u32 = 16;
pub const STATFS: u32 = 17;
pub const RELEASE: u32 = 18;
pub const FSYNC: u32 = 20;
pub const SETXATTR: u32 = 21;
pub const GETXATTR: u32 = 22;
pub const LISTXATTR: u32 = 23;
pub const FLUSH: u32 = 25;
pub const INIT: u32 = 26;
pub const OPENDIR: u32 = 27;
pub const READDIR: u32 = 28;
pub const ACCESS: u32 = 34;
pub const CREATE: u32 = 35;
pub const IOCTL: u32 = 39;
pub const FALLOCATE: u32 = 43;
pub const READDIRPLUS: u32 = 44;
pub const LSEEK: u32 = 46;

pub const REQUEST: u64 = 0x10_0000;
pub const REPLY: u64 = 0x20_0000;
pub const ROOT: u64 = 1;

/// A FUSE client on the driver's side of the rings.
pub struct Client {
    pub mem: GuestMemoryMmap,
    pub priority: DriverQueue,
    pub requests: DriverQueue,
    pub device: FsDevice,
    pub interrupt: Arc<Interrupt>,
    pub share: PathBuf,
    /// Holds the share and a file beside it that no client may reach.
    pub folder: tempfile::TempDir,
    pub ids: (u32, u32),
    _events: EventLoop,
}

/// Bytes of a request's body.
#[derive(Default)]
pub struct Body(Vec<u8>);

impl Body {
    pub fn u32(mut self, value: u32) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }
    pub fn u64(mut self, value: u64) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }
    pub fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }
    /// With its NUL.
    pub fn name(self, name: &str) -> Self {
        self.bytes(name.as_bytes()).bytes(b"\0")
    }
}

pub fn body() -> Body {
    Body::default()
}

pub fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

pub fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

impl Client {
    pub fn new() -> Self {
        Self::with_thread(|| ())
    }

    /// `on_start` runs first in the server's thread, which then gets the filter that it has in
    /// earnest.
    pub fn with_thread(on_start: impl FnOnce() + Send + 'static) -> Self {
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

    pub fn init(&mut self) -> Vec<u8> {
        // 7.40, all flags, the second word of them, too.
        let body = body().u32(7).u32(40).u32(1 << 20).u32(!0).u32(!0);
        self.ok(INIT, 0, body.bytes(&[0; 44]))
    }

    pub fn message(&self, opcode: u32, node: u64, body: &[u8]) -> Vec<u8> {
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
    pub fn raw(&mut self, message: &[u8], room: u32) -> Vec<u8> {
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

    pub fn send(&mut self, opcode: u32, node: u64, body: Body) -> Result<Vec<u8>, i32> {
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
    pub fn ok(&mut self, opcode: u32, node: u64, body: Body) -> Vec<u8> {
        self.send(opcode, node, body).unwrap()
    }

    /// Takes lookups of a node back.
    pub fn forget(&mut self, node: u64, count: u64) {
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
    pub fn lookup(&mut self, parent: u64, name: &str) -> u64 {
        u64_at(&self.ok(LOOKUP, parent, body().name(name)), 0)
    }

    pub fn create(&mut self, name: &str, flags: i32) -> Result<Vec<u8>, i32> {
        let body = body().u32(flags as u32).u32(0o644).u32(0).u32(0);
        self.send(CREATE, ROOT, body.name(name))
    }

    pub fn open(&mut self, opcode: u32, node: u64, flags: i32) -> Result<u64, i32> {
        let reply = self.send(opcode, node, body().u32(flags as u32).u32(0))?;
        Ok(u64_at(&reply, 0))
    }

    pub fn read(&mut self, opcode: u32, node: u64, handle: u64, size: u32) -> Result<Vec<u8>, i32> {
        let body = body().u64(handle).u64(0).u32(size).u32(0).u64(0);
        self.send(opcode, node, body.u32(0).u32(0))
    }

    pub fn write(&mut self, node: u64, handle: u64, bytes: &[u8]) -> Result<Vec<u8>, i32> {
        let body = body().u64(handle).u64(0).u32(bytes.len() as u32).u32(0);
        self.send(WRITE, node, body.u64(0).u32(1).u32(0).bytes(bytes))
    }
}
