//! virtio-fs over a folder whose files are in the page cache.

use super::ring::{Line, memory};
use super::{Subject, group, measure};
use bulkhead_vmm::event_loop::EventLoop;
use bulkhead_vmm::seccomp::ThreadKind;
use bulkhead_vmm::virtio::VirtioDevice;
use bulkhead_vmm::virtio::fake_driver::{Desc, DriverQueue, install_filter};
use bulkhead_vmm::virtio::fs::FsDevice;
use criterion::Criterion;
use std::fs;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

// Opcodes of FUSE's protocol (include/uapi/linux/fuse.h).
const LOOKUP: u32 = 1;
const GETATTR: u32 = 3;
const OPEN: u32 = 14;
const READ: u32 = 15;
const WRITE: u32 = 16;
const INIT: u32 = 26;

const ROOT: u64 = 1;
/// Lengths of the messages' headers.
const IN_HEADER: usize = 40;
const OUT_HEADER: u32 = 16;
const FILE: usize = 4 << 20;
const REQUESTS: u64 = 0x10_0000;
const REPLIES: u64 = 0x100_0000;
/// Distance of messages in guest memory.
const ROOM: u64 = 0x2_1000;

struct Share {
    mem: GuestMemoryMmap,
    queue: DriverQueue,
    line: Line,
    _device: FsDevice,
    _events: EventLoop,
    _folder: tempfile::TempDir,
}

impl Share {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        fs::write(folder.path().join("file"), vec![0x5a; FILE]).expect("4 MiB of room");
        let mem = memory();
        let events = EventLoop::new("fs", || install_filter(ThreadKind::FileServer))
            .expect("a thread for the server");
        let root = fs::File::open(folder.path())
            .expect("our own folder")
            .into();
        let mut device = FsDevice::new(root, events.handle()).expect("run it as root");
        let priority = DriverQueue::at(&mem, 32, 0x1000);
        let queue = DriverQueue::at(&mem, 128, 0x4000);
        let (activation, line) = Line::activation(&mem, &[&priority, &queue], 0);
        device.activate(activation).expect("the loop runs");
        let mut share = Self {
            mem,
            queue,
            line,
            _device: device,
            _events: events,
            _folder: folder,
        };
        let flags = [7u32, 40, 1 << 20, !0, !0].map(u32::to_le_bytes).concat();
        share.batch(INIT, 0, &[flags, vec![0; 44]].concat(), 4096, 1);
        share
    }

    /// `depth` times the same message; gives what the first answer says after its header.
    fn batch(&mut self, opcode: u32, node: u64, body: &[u8], room: u32, depth: u16) -> Vec<u8> {
        let len = (IN_HEADER + body.len()) as u32;
        let mut message = Vec::with_capacity(len as usize);
        message.extend([len, opcode].map(u32::to_le_bytes).concat());
        message.extend([77, node].map(u64::to_le_bytes).concat());
        message.extend([0, 0, 1, 0].map(u32::to_le_bytes).concat());
        message.extend(body);
        for index in 0..u64::from(depth) {
            let (request, reply) = (REQUESTS + index * ROOM, REPLIES + index * ROOM);
            self.mem
                .write_slice(&message, GuestAddress(request))
                .expect("requests lie in guest memory");
            self.queue.add(&[
                Desc::readable(request, len),
                Desc::writable(reply, OUT_HEADER + room),
            ]);
        }
        self.queue.kick();
        self.line.wait_used(&mut self.queue, depth);
        let mut header = [0; OUT_HEADER as usize];
        self.mem
            .read_slice(&mut header, GuestAddress(REPLIES))
            .expect("replies lie in guest memory");
        assert_eq!(header[4..8], [0; 4], "request {opcode} failed");
        let mut answer = vec![0; 64];
        self.mem
            .read_slice(&mut answer, GuestAddress(REPLIES + u64::from(OUT_HEADER)))
            .expect("replies lie in guest memory");
        answer
    }
}

fn first(answer: &[u8]) -> u64 {
    answer
        .first_chunk()
        .map_or(0, |bytes| u64::from_le_bytes(*bytes))
}

/// What a guest asks most, alone and 32 at once.
pub fn measure_all<M: Subject>(criterion: &mut Criterion<M>) {
    let mut share = Share::new();
    let node = first(&share.batch(LOOKUP, ROOT, b"file\0", 128, 1));
    let flags = [libc::O_RDWR as u32, 0].map(u32::to_le_bytes).concat();
    let handle = first(&share.batch(OPEN, node, &flags, 16, 1)).to_le_bytes();
    let transfer = |len: u32| {
        let words = [len, 0, 0, 0, 0, 0].map(u32::to_le_bytes).concat();
        [&handle[..], &[0; 8], &words].concat()
    };
    let write = [transfer(4 << 10), vec![0x5a; 4 << 10]].concat();
    let cases = [
        ("getattr", GETATTR, vec![0; 16], 104),
        ("read-4k", READ, transfer(4 << 10), 4 << 10),
        ("read-128k", READ, transfer(128 << 10), 128 << 10),
        ("write-4k", WRITE, write, 8),
    ];
    let mut group = group(criterion, "fs");
    for (name, opcode, body, room) in cases {
        for depth in [1, 32] {
            measure(&mut group, name, depth, || {
                share.batch(opcode, node, &body, room, depth);
            });
        }
    }
    group.finish();
}
