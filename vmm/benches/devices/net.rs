//! virtio-net, with a socket of packets in the tap's place, whose other end is the driver's thread's.

use super::ring::{Line, memory};
use super::{Subject, group, measure};
use bulkhead_proto::vmm::RateLimit;
use bulkhead_vmm::event_loop::EventLoop;
use bulkhead_vmm::virtio::VirtioDevice;
use bulkhead_vmm::virtio::fake_driver::{Desc, DriverQueue, event_loop};
use bulkhead_vmm::virtio::net::{NetConfig, NetDevice, Tap};
use criterion::Criterion;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, recv, send, setsockopt, socketpair, sockopt,
};
use std::os::fd::{AsRawFd, OwnedFd};
use virtio_bindings::virtio_net as ids;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];
const PEER: [u8; 6] = [2, 0, 0, 0, 0, 8];
/// Length of struct virtio_net_hdr (virtio 1.3 §5.1.6).
const HEADER: usize = 12;
/// Bytes of a receive buffer.
const BUFFER: u32 = 4096;
const FRAMES: u64 = 0x10_0000;
/// Distance of frames in guest memory.
const FRAME_ROOM: u64 = 0x1_1000;
const BUFFERS: u64 = 0x100_0000;
/// Descriptors of a queue.
const QUEUE: u16 = 256;
/// Receive buffers that stay with the device: with segmentation left to it, it takes no frame before
/// there is room for the longest one (virtio 1.3 §5.1.6.3.1).
const RESERVE: u16 = 32;
/// Bytes that the sockets hold.
const SOCKET: usize = 4 << 20;

struct Card {
    mem: GuestMemoryMmap,
    receive: DriverQueue,
    transmit: DriverQueue,
    line: Line,
    peer: OwnedFd,
    frame: Vec<u8>,
    /// Receive buffers given so far.
    given: u64,
    _device: NetDevice,
    _events: EventLoop,
}

impl Card {
    fn new() -> Self {
        let mem = memory();
        let events = event_loop();
        let kind = SockType::SeqPacket;
        let (peer, tap) = socketpair(AddressFamily::Unix, kind, None, SockFlag::empty())
            .expect("a pair of sockets");
        for end in [&peer, &tap] {
            setsockopt(end, sockopt::SndBufForce, &SOCKET)
                .expect("needs CAP_NET_ADMIN: run it as root");
        }
        let tap = Tap::of_packets(tap).expect("a socket of packets is good for a tap");
        let config = NetConfig {
            mac: MAC,
            mtu: 1500,
            any_sender: false,
            to_guest: RateLimit::default(),
            from_guest: RateLimit::default(),
        };
        let (mut device, _) = NetDevice::new(config, vec![tap], events.handle())
            .expect("a device with one pair of queues");
        let receive = DriverQueue::at(&mem, QUEUE, 0x1000);
        let transmit = DriverQueue::at(&mem, QUEUE, 0x4000);
        let features = [
            ids::VIRTIO_NET_F_MRG_RXBUF,
            ids::VIRTIO_NET_F_GUEST_CSUM,
            ids::VIRTIO_NET_F_GUEST_TSO4,
        ];
        let features = features.iter().fold(0, |all, bit| all | 1 << bit);
        let (activation, line) = Line::activation(&mem, &[&receive, &transmit], features);
        device.activate(activation).expect("the loop runs");
        let mut card = Self {
            mem,
            receive,
            transmit,
            line,
            peer,
            frame: vec![0; 0x1_2000],
            given: 0,
            _device: device,
            _events: events,
        };
        card.give(RESERVE);
        card
    }

    /// Receive buffers for the device.
    fn give(&mut self, count: u16) {
        for _ in 0..count {
            let at = BUFFERS + self.given % u64::from(QUEUE) * u64::from(BUFFER);
            self.receive.add(&[Desc::writable(at, BUFFER)]);
            self.given += 1;
        }
    }

    /// `depth` frames of `len` bytes after the header, from the guest to the network.
    fn transmit(&mut self, len: usize, depth: u16) {
        let mut start = [0; HEADER + 14];
        start[HEADER..HEADER + 6].copy_from_slice(&PEER);
        start[HEADER + 6..HEADER + 12].copy_from_slice(&MAC);
        for index in 0..u64::from(depth) {
            let at = FRAMES + index * FRAME_ROOM;
            self.mem
                .write_slice(&start, GuestAddress(at))
                .expect("frames lie in guest memory");
            self.transmit
                .add(&[Desc::readable(at, (HEADER + len) as u32)]);
        }
        self.transmit.kick();
        for _ in 0..depth {
            let received = recv(self.peer.as_raw_fd(), &mut self.frame, MsgFlags::empty());
            assert_eq!(received, Ok(HEADER + len));
        }
        self.line.wait_used(&mut self.transmit, depth);
    }

    /// The same from the network to the guest.
    fn receive(&mut self, len: usize, depth: u16) {
        let buffers = (HEADER + len).div_ceil(BUFFER as usize) as u16 * depth;
        self.give(buffers);
        self.receive.kick();
        let frame = &mut self.frame[..HEADER + len];
        frame[..HEADER].fill(0);
        for _ in 0..depth {
            let sent = send(self.peer.as_raw_fd(), frame, MsgFlags::empty());
            assert_eq!(sent, Ok(frame.len()));
        }
        self.line.wait_used(&mut self.receive, buffers);
    }
}

/// Frames of 64, 1514 and 60,000 bytes both ways, alone and several at once.
pub fn measure_all<M: Subject>(criterion: &mut Criterion<M>) {
    let mut card = Card::new();
    let mut group = group(criterion, "net");
    for (size, len, many) in [("64", 64, 32), ("1514", 1514, 32), ("60000", 60_000, 8)] {
        for depth in [1, many] {
            let name = format!("transmit-{size}");
            measure(&mut group, &name, depth, || card.transmit(len, depth));
            let name = format!("receive-{size}");
            measure(&mut group, &name, depth, || card.receive(len, depth));
        }
    }
    group.finish();
}
