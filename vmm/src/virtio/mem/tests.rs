//! The device behind a fake driver.

use super::super::testing::{Desc, DriverQueue, activation, event_loop, memory};
use super::super::{DeviceState, SuspendError, VirtioDevice};
use super::request::{REQUEST_SIZE, RESPONSE_SIZE};
use super::{BLOCK, KvmSlots, MemDevice, MemHandle, MemorySlots, Region, ResizeError};
use crate::event_loop::EventLoop;
use crate::memory::Memory;
use proptest::prelude::*;
use std::collections::BTreeSet;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, mpsc};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, GuestRegionMmap};
use vmm_sys_util::eventfd::EventFd;

const MIB: u64 = 1 << 20;
const SLOT: u64 = 128 * MIB;
/// Where the fake driver's request and its answer are.
const REQUEST: u64 = 0x8000;
const RESPONSE: u64 = 0x9000;

const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;

const ACK: (u16, u16) = (0, 0);
const UNPLUGGED: (u16, u16) = (0, 1);
const MIXED: (u16, u16) = (0, 2);
const NACK: (u16, u16) = (1, 0);
const BUSY: (u16, u16) = (2, 0);
const ERROR: (u16, u16) = (3, 0);

/// Which slots there are. Where KVM is, the tests of whole machines use the real ones.
#[derive(Debug, Clone, Default)]
struct NotedSlots {
    mapped: Arc<Mutex<BTreeSet<usize>>>,
    /// This one can't be had.
    missing: Option<usize>,
}

impl MemorySlots for NotedSlots {
    fn map(&mut self, index: usize, range: Range<u64>) -> io::Result<()> {
        assert!(range.start < range.end && range.start == index as u64 * SLOT);
        if self.missing == Some(index) {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        assert!(self.mapped.lock().unwrap().insert(index), "mapped twice");
        Ok(())
    }

    fn unmap(&mut self, index: usize, _range: Range<u64>) -> io::Result<()> {
        assert!(self.mapped.lock().unwrap().remove(&index), "not mapped");
        Ok(())
    }
}

struct Driver {
    mem: GuestMemoryMmap,
    queue: DriverQueue,
    device: MemDevice,
    handle: MemHandle,
    reached: mpsc::Receiver<u32>,
    line: EventFd,
    /// Its region's memory.
    region: Arc<GuestRegionMmap>,
    start: u64,
    mapped: Arc<Mutex<BTreeSet<usize>>>,
    _events: EventLoop,
}

impl Driver {
    /// Of an active device with a region of `slots` slots, of which one may be missing.
    fn new(slots: u64, limit_mib: u32, missing: Option<usize>) -> Self {
        let noted = NotedSlots {
            missing,
            ..NotedSlots::default()
        };
        let mapped = noted.mapped.clone();
        let region = Memory::allocate(MIB, slots * SLOT)
            .unwrap()
            .hotplug
            .unwrap();
        let events = event_loop();
        let (tell, reached) = mpsc::channel();
        let (mut device, handle) = MemDevice::new(
            Region::new(region.clone(), Box::new(noted)),
            limit_mib,
            Box::new(move |mib| tell.send(mib).unwrap()),
            events.handle(),
        );
        let mem = memory();
        let queue = DriverQueue::new(&mem, 8);
        let (activation, line) = activation(&mem, &[&queue], 0);
        device.activate(activation).unwrap();
        Self {
            start: u64_at(&device.config(), 16),
            mem,
            queue,
            device,
            handle,
            reached,
            line,
            region,
            mapped,
            _events: events,
        }
    }

    /// Type and state of the answer.
    fn ask(&mut self, kind: u16, address: u64, count: u16) -> (u16, u16) {
        let mut request = [0; REQUEST_SIZE];
        request[..2].copy_from_slice(&kind.to_le_bytes());
        request[8..16].copy_from_slice(&address.to_le_bytes());
        request[16..18].copy_from_slice(&count.to_le_bytes());
        self.mem
            .write_slice(&request, GuestAddress(REQUEST))
            .unwrap();
        self.mem
            .write_slice(&[0xee; RESPONSE_SIZE], GuestAddress(RESPONSE))
            .unwrap();
        self.queue.add(&[
            Desc::readable(REQUEST, REQUEST_SIZE as u32),
            Desc::writable(RESPONSE, RESPONSE_SIZE as u32),
        ]);
        self.queue.kick();
        assert_eq!(self.queue.wait_used().1, RESPONSE_SIZE as u32);
        let read = |at| {
            self.mem
                .read_obj::<u16>(GuestAddress(RESPONSE + at))
                .unwrap()
        };
        (read(0), read(8))
    }

    /// The same for block number `first` and those behind it.
    fn ask_blocks(&mut self, kind: u16, first: u64, count: u16) -> (u16, u16) {
        self.ask(kind, self.start + first * BLOCK, count)
    }

    fn plugged_mib(&self) -> u32 {
        assert_eq!(
            u64_at(&self.device.config(), 40),
            u64::from(self.handle.status().plugged_mib) * MIB
        );
        self.handle.status().plugged_mib
    }

    fn mapped(&self) -> Vec<usize> {
        self.mapped.lock().unwrap().iter().copied().collect()
    }
}

fn u64_at(config: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(config[at..at + 8].try_into().unwrap())
}

#[test]
fn what_the_host_asks_for_is_plugged_and_no_more() {
    let mut driver = Driver::new(2, 200, None);
    let config = driver.device.config();
    assert_eq!(config.len(), 56);
    assert_eq!(u64_at(&config, 0), BLOCK);
    assert_eq!(
        (u64_at(&config, 24), u64_at(&config, 32)),
        (2 * SLOT, 2 * SLOT)
    );
    assert_eq!(driver.ask_blocks(PLUG, 0, 1), NACK, "nothing was asked for");

    driver.handle.request(8).unwrap();
    assert!(driver.line.read().is_ok(), "a configuration change");
    assert_eq!(u64_at(&driver.device.config(), 48), 8 * MIB);
    assert_eq!(driver.device.config_generation(), 1);
    assert_eq!(driver.ask_blocks(PLUG, 63, 2), ACK);
    assert_eq!(driver.mapped(), [0, 1], "a block in each");
    assert!(driver.reached.try_recv().is_err());
    assert_eq!(driver.ask_blocks(PLUG, 0, 3), NACK);
    assert_eq!(driver.ask_blocks(PLUG, 0, 2), ACK);
    assert_eq!(driver.reached.recv(), Ok(8));
    assert_eq!(driver.plugged_mib(), 8);
    assert_eq!(driver.ask_blocks(STATE, 63, 2), ACK);
    assert_eq!(driver.ask_blocks(STATE, 62, 2), MIXED);
    assert_eq!(driver.ask_blocks(STATE, 65, 63), UNPLUGGED);

    driver.handle.request(2).unwrap();
    assert_eq!(driver.ask_blocks(UNPLUG, 63, 2), ACK);
    assert_eq!(driver.mapped(), [0]);
    assert_eq!(driver.ask_blocks(UNPLUG, 1, 1), ACK);
    assert_eq!(driver.reached.recv(), Ok(2));
    assert_eq!(driver.ask_blocks(UNPLUG_ALL, 0, 0), ACK);
    assert_eq!(driver.plugged_mib(), 0);
    assert!(driver.mapped().is_empty());
    assert!(driver.reached.try_recv().is_err(), "told once");
}

#[test]
fn a_size_that_is_there_is_told_at_once_and_a_wrong_one_refused() {
    let driver = Driver::new(2, 200, None);
    driver.handle.request(0).unwrap();
    assert_eq!(driver.reached.try_recv(), Ok(0));
    assert_eq!(
        driver.handle.request(7),
        Err(ResizeError::Misaligned { mib: 7 })
    );
    let limit_mib = 200;
    assert_eq!(
        driver.handle.request(202),
        Err(ResizeError::TooMuch {
            mib: 202,
            limit_mib
        })
    );
    assert_eq!(driver.handle.status().requested_mib, 0);
}

#[test]
fn unplugged_memory_is_the_hosts_again_and_zeros() {
    let mut driver = Driver::new(1, 128, None);
    driver.handle.request(8).unwrap();
    assert_eq!(driver.ask_blocks(PLUG, 0, 4), ACK);
    let fill = |byte: u8| {
        for block in 0..4 {
            let at = vm_memory::MemoryRegionAddress(block * BLOCK + 4096);
            driver.region.write_slice(&[byte; 4096], at).unwrap();
        }
    };
    let filled = |driver: &Driver| -> Vec<u64> {
        (0..4)
            .filter(|block| {
                let at = vm_memory::MemoryRegionAddress(block * BLOCK + 4096);
                let mut page = [0; 4096];
                driver.region.read_slice(&mut page, at).unwrap();
                page != [0; 4096]
            })
            .collect()
    };
    fill(1);
    assert_eq!(driver.ask_blocks(UNPLUG, 1, 2), ACK);
    assert_eq!(filled(&driver), [0, 3]);
    assert_eq!(driver.ask_blocks(UNPLUG, 0, 1), ACK);
    // By a device, in blocks that the driver has unplugged.
    let at = vm_memory::MemoryRegionAddress(4096);
    driver.region.write_slice(&[1; 4096], at).unwrap();
    assert_eq!(driver.ask_blocks(UNPLUG, 3, 1), ACK);
    assert!(
        filled(&driver).is_empty(),
        "the slot's last block takes all"
    );
}

#[test]
fn requests_without_sense_are_errors_and_change_nothing() {
    let mut driver = Driver::new(1, 128, None);
    driver.handle.request(128).unwrap();
    assert_eq!(driver.ask_blocks(PLUG, 4, 4), ACK);
    let start = driver.start;
    for kind in [PLUG, UNPLUG, STATE] {
        for (address, count) in [
            (start, 0),
            (start + 4096, 1),
            (start - BLOCK, 1),
            (0, 1),
            (start + SLOT, 1),
            (start, 65),
            (start, u16::MAX),
            (u64::MAX, 1),
            (u64::MAX - BLOCK + 1, u16::MAX),
        ] {
            assert_eq!(
                driver.ask(kind, address, count),
                ERROR,
                "{kind} {address:#x}"
            );
        }
    }
    for (kind, first, count) in [
        (PLUG, 4, 1),
        (PLUG, 3, 2),
        (PLUG, 7, 2),
        (UNPLUG, 0, 1),
        (UNPLUG, 3, 2),
        (UNPLUG, 7, 2),
        (4, 4, 1),
        (u16::MAX, 0, 0),
    ] {
        let answer = driver.ask_blocks(kind, first, count);
        assert_eq!(answer, ERROR, "{kind} {first} {count}");
    }
    assert_eq!(driver.plugged_mib(), 8);
    assert_eq!(driver.ask_blocks(STATE, 4, 4), ACK);
}

#[test]
fn without_a_slot_the_driver_may_try_again() {
    let mut driver = Driver::new(2, 256, Some(1));
    driver.handle.request(256).unwrap();
    assert_eq!(driver.ask_blocks(PLUG, 0, 128), BUSY);
    assert!(
        driver.mapped().is_empty(),
        "what was mapped on the way is not"
    );
    assert_eq!(driver.ask_blocks(PLUG, 0, 64), ACK);
    assert_eq!((driver.plugged_mib(), driver.mapped()), (128, vec![0]));
}

#[test]
fn a_reset_keeps_what_is_plugged_and_a_save_is_refused() {
    let mut driver = Driver::new(1, 128, None);
    driver.handle.request(2).unwrap();
    let refused = driver.device.suspend().unwrap_err();
    assert!(matches!(refused, SuspendError::InUse { .. }), "{refused}");
    assert_eq!(driver.ask_blocks(PLUG, 0, 1), ACK);
    driver.handle.request(0).unwrap();
    let refused = driver.device.suspend().unwrap_err().to_string();
    assert!(refused.contains("2 MiB are plugged"), "{refused}");

    assert_eq!(driver.device.reset().unwrap().len(), 1);
    assert_eq!((driver.plugged_mib(), driver.mapped()), (2, vec![0]));
    driver.queue = DriverQueue::new(&driver.mem, 8);
    let (activation, line) = activation(&driver.mem, &[&driver.queue], 0);
    driver.device.activate(activation).unwrap();
    assert!(line.read().is_ok(), "it looks again at the sizes");
    assert_eq!(driver.ask_blocks(STATE, 0, 1), ACK);
    assert_eq!(driver.ask_blocks(UNPLUG_ALL, 0, 0), ACK);
    let (queues, state) = driver.device.suspend().unwrap();
    assert_eq!((queues.len(), state), (1, DeviceState::None));
}

/// KVM's slots come and go, under the system-call filter of the thread that changes them.
#[test]
fn kvm_takes_and_gives_slots() {
    let Ok(kvm) = kvm_ioctls::Kvm::new() else {
        return eprintln!("SKIPPED 1 test: it needs /dev/kvm");
    };
    let vm = Arc::new(kvm.create_vm().unwrap());
    let memory = Memory::allocate(MIB, 2 * SLOT).unwrap();
    crate::memory::register(&vm, &memory.boot).unwrap();
    let region = memory.hotplug.clone().unwrap();
    let slots = KvmSlots::new(Arc::clone(&vm), Arc::clone(&region));
    let region = Arc::new(Mutex::new(Region::new(region, Box::new(slots))));
    let start = region.lock().unwrap().start();
    std::thread::spawn(move || {
        super::super::testing::install_filter(crate::seccomp::ThreadKind::Events);
        let mut region = region.lock().unwrap();
        let blocks = |first, count| super::request::Blocks {
            address: start + first * BLOCK,
            count,
        };
        for _ in 0..3 {
            region.plug(blocks(0, 128)).unwrap();
            region.unplug(blocks(0, 64)).unwrap();
            region.unplug_all();
        }
    })
    .join()
    .unwrap();
}

/// Requests of any kind, mostly about blocks that are there.
fn any_request() -> impl Strategy<Value = (u16, u64, u16)> {
    let kind = prop_oneof![8 => 0u16..4, 1 => any::<u16>()];
    let offset = prop_oneof![
        8 => (0u64..130).prop_map(|block| block * BLOCK),
        1 => any::<u64>(),
    ];
    let count = prop_oneof![8 => 0u16..80, 1 => any::<u16>()];
    (kind, offset, count)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever is asked in whatever order: the sizes agree with the states of the blocks, no more
    /// is plugged than was asked for, and KVM has a slot exactly where a block is plugged.
    #[test]
    fn any_requests_leave_a_region_that_agrees_with_itself(
        requests in prop::collection::vec((any_request(), prop::option::of(0u32..130)), 1..40),
    ) {
        let mut driver = Driver::new(2, 256, None);
        for ((kind, offset, count), asked) in requests {
            if let Some(blocks) = asked {
                let _ = driver.handle.request(blocks * 2);
            }
            let before = driver.plugged_mib();
            let answer = driver.ask(kind, driver.start.wrapping_add(offset), count);
            prop_assert!(answer.0 <= 3);
            let plugged = driver.plugged_mib();
            prop_assert!(plugged <= before || plugged <= driver.handle.status().requested_mib);
            prop_assert!(plugged == before || answer == ACK);
        }
        let states: Vec<bool> = (0..128).map(|block| driver.ask_blocks(STATE, block, 1) == ACK).collect();
        let plugged = states.iter().filter(|plugged| **plugged).count() as u32;
        prop_assert_eq!(driver.plugged_mib(), plugged * 2);
        let slots: Vec<usize> = (0..2).filter(|slot| states[slot * 64..slot * 64 + 64].contains(&true)).collect();
        prop_assert_eq!(driver.mapped(), slots);
    }

    /// Chains of any shape get an answer or break the queue, never the VMM.
    #[test]
    fn any_chains_are_survived(chains in prop::collection::vec(prop::collection::vec(Desc::any(), 1..6), 1..6)) {
        let mut driver = Driver::new(1, 128, None);
        driver.handle.request(128).unwrap();
        for chain in &chains {
            driver.queue.add(chain);
        }
        driver.queue.kick();
        // Taken back from the event loop after what it serves, so it has survived.
        driver.device.reset().unwrap();
        prop_assert!(driver.plugged_mib() <= 128);
    }
}
