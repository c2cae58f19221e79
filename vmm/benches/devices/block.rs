//! virtio-blk over a file that is in the page cache.

use super::ring::{Line, memory};
use super::{Subject, group, measure};
use bulkhead_vmm::event_loop::EventLoop;
use bulkhead_vmm::virtio::VirtioDevice;
use bulkhead_vmm::virtio::block::{Backing, BlockDevice, SECTOR};
use bulkhead_vmm::virtio::fake_driver::{Desc, DriverQueue, event_loop};
use criterion::Criterion;
use std::os::unix::fs::FileExt;
use virtio_bindings::virtio_blk as ids;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// Bytes of the file.
const FILE: u64 = 64 << 20;
const QUEUE_SIZE: u16 = 128;
const HEADERS: u64 = 0x1_0000;
const STATUSES: u64 = 0x2_0000;
const DATA: u64 = 0x10_0000;

struct Disk {
    mem: GuestMemoryMmap,
    queue: DriverQueue,
    line: Line,
    _device: BlockDevice,
    _events: EventLoop,
    next_sector: u64,
}

impl Disk {
    fn new() -> Self {
        let mem = memory();
        let events = event_loop();
        let file = tempfile::tempfile().expect("a file in the temporary folder");
        let piece = vec![0x5a; 1 << 20];
        for offset in (0..FILE).step_by(piece.len()) {
            file.write_all_at(&piece, offset).expect("64 MiB of room");
        }
        let backing = Backing::new(file).expect("a file is a backing");
        let (mut device, _) = BlockDevice::new("bench", Some(backing), false, events.handle());
        let queue = DriverQueue::new(&mem, QUEUE_SIZE);
        let (activation, line) = Line::activation(&mem, &[&queue], 0);
        device.activate(activation).expect("the loop runs");
        Self {
            mem,
            queue,
            line,
            _device: device,
            _events: events,
            next_sector: 0,
        }
    }

    /// `depth` requests of `len` bytes each, at steps through the file that are no sequence.
    fn batch(&mut self, kind: u32, len: u32, depth: u16) {
        for index in 0..u64::from(depth) {
            let header = HEADERS + index * 16;
            let sector = self.next_sector;
            let step = 1009 * u64::from(len.max(512)) / SECTOR;
            self.next_sector = (sector + step) % ((FILE - u64::from(len)) / SECTOR);
            let write = |bytes: &[u8], at| self.mem.write_slice(bytes, GuestAddress(at)).is_ok();
            let written = write(&kind.to_le_bytes(), header)
                && write(&[0; 4], header + 4)
                && write(&sector.to_le_bytes(), header + 8)
                && write(&[0xff], STATUSES + index);
            assert!(written, "headers lie in guest memory");
            let address = DATA + index * u64::from(len);
            let mut chain = vec![Desc::readable(header, 16)];
            chain.push(match kind {
                ids::VIRTIO_BLK_T_IN => Desc::writable(address, len),
                _ => Desc::readable(address, len),
            });
            chain.push(Desc::writable(STATUSES + index, 1));
            self.queue.add(&chain);
        }
        self.queue.kick();
        self.line.wait_used(&mut self.queue, depth);
        for index in 0..u64::from(depth) {
            let status: u8 = self
                .mem
                .read_obj(GuestAddress(STATUSES + index))
                .expect("statuses lie in guest memory");
            assert_eq!(u32::from(status), ids::VIRTIO_BLK_S_OK);
        }
    }
}

/// Reads and writes of 4 KiB and 256 KiB, alone and 32 at once.
pub fn measure_all<M: Subject>(criterion: &mut Criterion<M>) {
    let mut disk = Disk::new();
    let mut group = group(criterion, "block");
    for (name, kind, len) in [
        ("read-4k", ids::VIRTIO_BLK_T_IN, 4 << 10),
        ("write-4k", ids::VIRTIO_BLK_T_OUT, 4 << 10),
        ("read-256k", ids::VIRTIO_BLK_T_IN, 256 << 10),
        ("write-256k", ids::VIRTIO_BLK_T_OUT, 256 << 10),
    ] {
        for depth in [1, 32] {
            measure(&mut group, name, depth, || disk.batch(kind, len, depth));
        }
    }
    group.finish();
}
