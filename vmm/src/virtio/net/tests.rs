//! The device as a driver sees it, with a socket of packets in the tap's place.

use super::super::testing::{Desc, DriverQueue, activation, event_loop, memory, wait_until};
use super::super::{Interrupt, SuspendError, VirtioDevice};
use super::*;
use crate::event_loop::EventLoop;
use bulkhead_proto::vmm::RateLimit;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, recv, send, setsockopt, socketpair, sockopt,
};
use proptest::prelude::*;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};
use virtio_bindings::virtio_net as ids;
use vm_memory::{Bytes, GuestAddress};

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];
const OTHER: [u8; 6] = [2, 0, 0, 0, 0, 8];
const BUFFERS: u64 = 0x4_0000;
const BUFFER_LEN: u32 = 2048;
const FRAMES: u64 = 0x1_0000;
const MERGEABLE: u64 = 1 << ids::VIRTIO_NET_F_MRG_RXBUF;
const TSO: u64 = 1 << ids::VIRTIO_NET_F_GUEST_TSO4;
const MQ: u64 = 1 << ids::VIRTIO_NET_F_MQ;

fn config() -> NetConfig {
    NetConfig {
        mac: MAC,
        mtu: 1500,
        any_sender: false,
        to_guest: RateLimit::default(),
        from_guest: RateLimit::default(),
    }
}

struct Driver {
    /// Receive, transmit, receive, transmit, ..., control.
    queues: Vec<DriverQueue>,
    device: NetDevice,
    counters: Arc<NetCounters>,
    interrupt: Arc<Interrupt>,
    /// The network's ends.
    peers: Vec<OwnedFd>,
    _events: EventLoop,
}

impl Driver {
    fn new(config: NetConfig, pairs: usize, features: u64) -> Self {
        let events = event_loop();
        let (peers, taps): (Vec<_>, Vec<_>) = (0..pairs)
            .map(|_| {
                let (peer, tap) = socketpair(
                    AddressFamily::Unix,
                    SockType::SeqPacket,
                    None,
                    SockFlag::SOCK_NONBLOCK,
                )
                .unwrap();
                (peer, Tap::of_packets(tap).unwrap())
            })
            .unzip();
        let (device, counters) = NetDevice::new(config, taps, events.handle()).unwrap();
        let mut driver = Driver {
            queues: Vec::new(),
            device,
            counters,
            interrupt: activation(&memory(), &[], 0).0.interrupt,
            peers,
            _events: events,
        };
        driver.activate(features);
        driver
    }

    fn activate(&mut self, features: u64) {
        let mem = memory();
        let sizes = self.device.queue_max_sizes().to_vec();
        self.queues = sizes
            .iter()
            .enumerate()
            .map(|(index, size)| DriverQueue::at(&mem, *size, 0x1000 + 0x3000 * index as u64))
            .collect();
        let queues: Vec<_> = self.queues.iter().collect();
        let (activation, _) = activation(&mem, &queues, features);
        self.interrupt = activation.interrupt.clone();
        self.device.activate(activation).unwrap();
    }

    fn add_buffers(&mut self, queue: usize, count: u64) {
        for index in 0..count {
            let address = BUFFERS + index * u64::from(BUFFER_LEN);
            self.queues[queue].add(&[Desc::writable(address, BUFFER_LEN)]);
        }
        self.queues[queue].kick();
    }

    fn arrives(&self, peer: usize, payload: &[u8]) {
        let frame = [&[0; HEADER], payload].concat();
        let fd = self.peers[peer].as_raw_fd();
        assert_eq!(send(fd, &frame, MsgFlags::empty()).unwrap(), frame.len());
    }

    fn send(&mut self, queue: usize, frame: &[u8]) {
        let address = FRAMES + u64::from(self.queues[queue].next_head()) * 128;
        memory().write_slice(frame, GuestAddress(address)).unwrap();
        self.queues[queue].add(&[Desc::readable(address, frame.len() as u32)]);
    }

    fn sent(&self, peer: usize) -> Option<Vec<u8>> {
        let mut frame = vec![0; 70_000];
        match recv(self.peers[peer].as_raw_fd(), &mut frame, MsgFlags::empty()) {
            Ok(len) => Some(frame[..len].to_vec()),
            Err(nix::errno::Errno::EAGAIN) => None,
            Err(error) => panic!("{error}"),
        }
    }

    fn wait_sent(&self, peer: usize) -> Vec<u8> {
        wait_until("a frame from the guest", || self.sent(peer))
    }
}

fn frame(from: [u8; 6], number: u8) -> Vec<u8> {
    [&[0; HEADER][..], &OTHER, &from, &[8, 0], &[number; 40]].concat()
}

fn buffer(index: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    let address = BUFFERS + index * u64::from(BUFFER_LEN);
    memory()
        .read_slice(&mut bytes, GuestAddress(address))
        .unwrap();
    bytes
}

fn merged(index: u64) -> u16 {
    let header = buffer(index, HEADER);
    u16::from_le_bytes([header[10], header[11]])
}

#[test]
fn the_configuration_says_what_the_card_is() {
    let driver = Driver::new(config(), 2, 0);
    let config = [&MAC[..], &[1, 0], &[2, 0], &1500u16.to_le_bytes()].concat();
    assert_eq!(driver.device.config(), config);
    assert_eq!(driver.device.queue_max_sizes(), [256, 256, 256, 256, 16]);
    assert_ne!(driver.device.device_features() & MQ, 0);
    let one = Driver::new(self::config(), 1, 0);
    assert_eq!(one.device.device_features() & MQ, 0);
    assert_eq!(one.device.queue_max_sizes(), [256, 256]);
}

#[test]
fn frames_arrive_in_as_many_buffers_as_they_take() {
    let mut driver = Driver::new(config(), 1, MERGEABLE | TSO);
    driver.add_buffers(0, 64);
    driver.arrives(0, &[7; 100]);
    assert_eq!(driver.queues[0].wait_used(), (0, 112));
    assert_eq!(merged(0), 1);
    assert_eq!(buffer(0, 112)[HEADER..], [7; 100]);

    let long: Vec<u8> = (0..5000u32).map(|at| (at / 3) as u8).collect();
    driver.arrives(0, &long);
    assert_eq!(driver.queues[0].wait_used(), (1, 2048));
    // The others were there at once.
    assert_eq!(driver.queues[0].used(), Some((2, 2048)));
    assert_eq!(driver.queues[0].used(), Some((3, 5012 - 4096)));
    assert_eq!(merged(1), 3);
    let all: Vec<u8> = (1..4).flat_map(|index| buffer(index, 2048)).collect();
    assert!(all[HEADER..5012] == long);
    let counters = driver.counters.read();
    assert_eq!(
        (counters.received_frames, counters.received_bytes),
        (2, 5124)
    );
}

#[test]
fn frames_wait_in_the_tap_for_buffers() {
    let mut driver = Driver::new(config(), 1, MERGEABLE);
    for number in 0..3 {
        driver.arrives(0, &[number; 60]);
    }
    // Nothing can happen, so there is nothing to wait for but time.
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(driver.queues[0].used(), None);
    driver.add_buffers(0, 4);
    for number in 0..3 {
        assert_eq!(driver.queues[0].wait_used(), (u16::from(number), 72));
        assert_eq!(buffer(number.into(), 72)[HEADER..], [number; 60]);
    }
    assert_eq!(driver.counters.read().lost_frames, 0);
}

#[test]
fn a_frame_too_long_for_its_buffer_is_lost_and_the_next_arrives() {
    let mut driver = Driver::new(config(), 1, 0);
    driver.queues[0].add(&[Desc::writable(BUFFERS, 200)]);
    driver.queues[0].kick();
    driver.arrives(0, &[1; 1000]);
    driver.arrives(0, &[2; 100]);
    assert_eq!(driver.queues[0].wait_used(), (0, 112));
    assert_eq!(merged(0), 1);
    assert_eq!(buffer(0, 112)[HEADER..], [2; 100]);
    assert_eq!(driver.counters.read().lost_frames, 1);
}

#[test]
fn chains_without_room_for_a_header_break_the_ring() {
    for (features, len) in [(MERGEABLE, 0), (MERGEABLE, 11), (0, 11)] {
        let mut driver = Driver::new(config(), 1, features);
        for _ in 0..256 {
            driver.queues[0].add(&[Desc::writable(BUFFERS, len)]);
        }
        driver.queues[0].kick();
        driver.arrives(0, &[1; 60]);
        wait_until("a reset is needed", || {
            driver.interrupt.reset_needed().then_some(())
        });
        assert_eq!(driver.queues[0].used(), None);
        assert_eq!(driver.counters.read().lost_frames, 0);
    }
}

#[test]
fn only_the_card_s_own_frames_are_sent() {
    let mut driver = Driver::new(config(), 1, 0);
    driver.send(1, &frame(MAC, 1));
    driver.send(1, &frame(OTHER, 2));
    driver.send(1, &frame(MAC, 3)[..START_LESS_ONE]);
    driver.send(1, &frame(MAC, 4));
    driver.queues[1].kick();
    for head in 0..4 {
        assert_eq!(driver.queues[1].wait_used(), (head, 0));
    }
    assert_eq!(driver.wait_sent(0), frame(MAC, 1));
    assert_eq!(driver.wait_sent(0), frame(MAC, 4));
    assert_eq!(driver.sent(0), None);
    let counters = driver.counters.read();
    assert_eq!((counters.sent_frames, counters.spoofed_frames), (2, 1));
    assert_eq!(counters.lost_frames, 1);

    let any = NetConfig {
        any_sender: true,
        ..config()
    };
    let mut driver = Driver::new(any, 1, 0);
    driver.send(1, &frame(OTHER, 5));
    driver.queues[1].kick();
    assert_eq!(driver.wait_sent(0), frame(OTHER, 5));
}

const START_LESS_ONE: usize = HEADER + ETHERNET_HEADER - 1;

#[test]
fn an_answer_comes_with_the_same_interrupt() {
    let mut driver = Driver::new(config(), 1, MERGEABLE);
    driver.arrives(0, &[1; 60]);
    // Nothing can happen, so there is nothing to wait for but time.
    std::thread::sleep(Duration::from_millis(50));
    // Without a notification of its own this room is found when something is sent.
    driver.queues[0].add(&[Desc::writable(BUFFERS, BUFFER_LEN)]);
    driver.send(1, &frame(MAC, 2));
    driver.queues[1].kick();
    assert_eq!(driver.queues[0].wait_used(), (0, 72));
    assert_eq!(driver.queues[1].wait_used(), (0, 0));
    assert_eq!(driver.wait_sent(0), frame(MAC, 2));
    let line = || driver.interrupt.event().read().ok();
    assert_eq!(wait_until("an interrupt", line), 1);
}

#[test]
fn a_full_tap_stops_the_guest_and_loses_nothing() {
    let mut driver = Driver::new(config(), 1, 0);
    setsockopt(&driver.peers[0], sockopt::RcvBuf, &2048).unwrap();
    for number in 0..200 {
        driver.send(1, &frame(MAC, number));
    }
    driver.queues[1].kick();
    for number in 0..200 {
        assert_eq!(driver.wait_sent(0), frame(MAC, number));
    }
    for head in 0..200 {
        assert_eq!(driver.queues[1].wait_used(), (head, 0));
    }
}

#[test]
fn rate_limits_delay_and_lose_nothing() {
    let limit = RateLimit {
        frames_per_second: 100,
        ..RateLimit::default()
    };
    let limited = NetConfig {
        to_guest: limit,
        from_guest: limit,
        ..config()
    };
    let mut driver = Driver::new(limited, 1, MERGEABLE);
    driver.add_buffers(0, 40);
    let begin = Instant::now();
    for number in 0..30 {
        driver.send(1, &frame(MAC, number));
        driver.arrives(0, &[number; 60]);
    }
    driver.queues[1].kick();
    for number in 0..30 {
        assert_eq!(driver.wait_sent(0), frame(MAC, number));
        assert_eq!(driver.queues[0].wait_used().1, 72);
    }
    // Ten at once, and one each 10 ms after that.
    let passed = begin.elapsed();
    assert!(passed >= Duration::from_millis(190), "{passed:?}");
}

/// A command to the control queue; its answer.
fn command(driver: &mut Driver, queue: usize, bytes: &[u8]) -> u8 {
    let mem = memory();
    mem.write_slice(bytes, GuestAddress(FRAMES)).unwrap();
    mem.write_obj(0xffu8, GuestAddress(FRAMES + 64)).unwrap();
    driver.queues[queue].add(&[
        Desc::readable(FRAMES, bytes.len() as u32),
        Desc::writable(FRAMES + 64, 1),
    ]);
    driver.queues[queue].kick();
    driver.queues[queue].wait_used();
    mem.read_obj(GuestAddress(FRAMES + 64)).unwrap()
}

#[test]
fn pairs_are_used_as_the_driver_asks() {
    let mut driver = Driver::new(config(), 2, MERGEABLE | MQ);
    driver.add_buffers(2, 8);
    driver.arrives(1, &[1; 60]);
    for wrong in [
        &[4, 0, 3, 0][..],
        &[4, 0, 0, 0],
        &[4, 0, 2],
        &[1, 0, 1, 0],
        &[],
    ] {
        assert_eq!(command(&mut driver, 4, wrong), 1, "{wrong:?}");
    }
    assert_eq!(driver.queues[2].used(), None, "one pair is used at first");
    assert_eq!(command(&mut driver, 4, &[4, 0, 2, 0]), 0);
    assert_eq!(driver.queues[2].wait_used(), (0, 72));
    driver.send(3, &frame(MAC, 1));
    driver.queues[3].kick();
    assert_eq!(driver.wait_sent(1), frame(MAC, 1));

    // Without VIRTIO_NET_F_MQ the control queue is the third.
    driver.device.reset().unwrap();
    driver.activate(MERGEABLE);
    assert_eq!(command(&mut driver, 2, &[4, 0, 2, 0]), 1);
    assert_eq!(command(&mut driver, 2, &[4, 0, 1, 0]), 0);
    assert_eq!(driver.device.reset().unwrap().len(), 5);
}

#[test]
fn a_reset_card_can_be_used_again_but_is_never_saved() {
    let mut driver = Driver::new(config(), 1, MERGEABLE);
    driver.add_buffers(0, 4);
    for number in 0..2 {
        driver.arrives(0, &[number; 60]);
        driver.queues[0].wait_used();
        assert!(matches!(
            driver.device.suspend(),
            Err(SuspendError::InUse { .. })
        ));
        assert_eq!(driver.device.reset().unwrap().len(), 2);
        assert!(driver.device.reset().unwrap().is_empty());
        driver.activate(MERGEABLE);
        driver.add_buffers(0, 4);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Any chains in any queue: the device serves them or wants a reset, and works after it.
    #[test]
    fn hostile_chains_harm_nothing(
        queue in 0usize..5,
        chains in prop::collection::vec(prop::collection::vec(Desc::any(), 1..6), 1..12),
        features in prop_oneof![Just(0), Just(MERGEABLE), Just(MERGEABLE | TSO | MQ)],
    ) {
        let mut driver = Driver::new(config(), 2, features);
        for number in 0..4 {
            driver.arrives(0, &[number; 60]);
        }
        for chain in &chains {
            driver.queues[queue].add(chain);
        }
        driver.queues[queue].kick();
        // Answered once the worker has had its turn.
        driver.device.reset().unwrap();
        let _ = driver.interrupt.reset_needed();

        driver.activate(MERGEABLE);
        while driver.sent(0).is_some() {}
        driver.send(1, &frame(MAC, 9));
        driver.queues[1].kick();
        prop_assert_eq!(driver.wait_sent(0), frame(MAC, 9));
    }
}
