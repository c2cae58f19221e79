//! The device as a driver sees it.

use super::super::testing::{Desc, DriverQueue, activation, event_loop, memory, wait_until};
use super::super::{Activation, F_EVENT_IDX, SuspendError, VirtioDevice};
use super::request::write_header;
use super::*;
use crate::event_loop::EventLoop;
use proptest::prelude::*;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use virtio_bindings::virtio_blk as ids;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

struct Driver {
    queue: DriverQueue,
    device: BlockDevice,
    handle: BlockHandle,
    interrupt: Arc<super::super::Interrupt>,
    line: EventFd,
    _events: EventLoop,
}

const HEADER: u64 = 0x10000;
const STATUS: u64 = 0x10100;
const DATA: u64 = 0x11000;

impl Driver {
    fn new(backing: Option<&File>, read_only: bool) -> Self {
        let mem = memory();
        let events = event_loop();
        let backing = backing.map(|file| Backing::new(file.try_clone().unwrap()).unwrap());
        let (mut device, handle) =
            BlockDevice::new("serial-1", backing, read_only, events.handle());
        let queue = DriverQueue::new(&mem, 128);
        let (activation, line) = activation(&mem, &[&queue], 0);
        let interrupt = activation.interrupt.clone();
        device.activate(activation).unwrap();
        Driver {
            queue,
            device,
            handle,
            interrupt,
            line,
            _events: events,
        }
    }

    /// One request; gives its status and used length.
    fn request(&mut self, kind: u32, sector: u64, data: &[Desc]) -> (u8, u32) {
        let mem = memory();
        write_header(&mem, HEADER, kind, sector);
        mem.write_obj(0xffu8, GuestAddress(STATUS)).unwrap();
        let mut chain = vec![Desc::readable(HEADER, 16)];
        chain.extend(data);
        chain.push(Desc::writable(STATUS, 1));
        let head = self.queue.add(&chain);
        self.queue.kick();
        let (used, len) = self.queue.wait_used();
        assert_eq!(used, head);
        (mem.read_obj(GuestAddress(STATUS)).unwrap(), len)
    }
}

fn image(sectors: u64) -> File {
    let file = tempfile::tempfile().unwrap();
    let bytes: Vec<u8> = (0..sectors * SECTOR).map(|at| (at / 7) as u8).collect();
    file.write_all_at(&bytes, 0).unwrap();
    file
}

fn bytes(file: &File, offset: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    file.read_exact_at(&mut bytes, offset).unwrap();
    bytes
}

#[test]
fn reads_and_writes_are_scattered_into_guest_memory() {
    let file = image(64);
    let mut driver = Driver::new(Some(&file), false);
    let data = [
        Desc::writable(DATA, 700),
        Desc::writable(DATA + 0x1000, 324),
    ];
    assert_eq!(driver.request(ids::VIRTIO_BLK_T_IN, 3, &data), (0, 1025));
    let mut seen = vec![0; 1024];
    memory()
        .read_slice(&mut seen[..700], GuestAddress(DATA))
        .unwrap();
    memory()
        .read_slice(&mut seen[700..], GuestAddress(DATA + 0x1000))
        .unwrap();
    assert_eq!(seen, bytes(&file, 3 * SECTOR, 1024));
    assert!(driver.line.read().unwrap() >= 1);

    memory()
        .write_slice(&[0x5a; 512], GuestAddress(DATA))
        .unwrap();
    let data = [Desc::readable(DATA, 512)];
    assert_eq!(driver.request(ids::VIRTIO_BLK_T_OUT, 63, &data), (0, 1));
    assert_eq!(bytes(&file, 63 * SECTOR, 512), [0x5a; 512]);
    assert_eq!(driver.request(ids::VIRTIO_BLK_T_FLUSH, 0, &[]), (0, 1));
    assert_eq!(driver.request(ids::VIRTIO_BLK_T_OUT, 64, &data), (1, 1));

    let data = [Desc::writable(DATA, 20)];
    assert_eq!(driver.request(ids::VIRTIO_BLK_T_GET_ID, 0, &data), (0, 21));
    let mut id = [0xff; 20];
    memory().read_slice(&mut id, GuestAddress(DATA)).unwrap();
    assert_eq!(&id, b"serial-1\0\0\0\0\0\0\0\0\0\0\0\0");
    assert_eq!(driver.request(99, 0, &[]), (2, 1));
}

#[test]
fn a_request_longer_than_a_wake_up_s_budget_is_whole() {
    let file = image(6000);
    let mut driver = Driver::new(Some(&file), false);
    let base = 0x10_0000;
    let len = 5000 * SECTOR as u32;
    let data = [Desc::writable(base, len)];
    assert_eq!(driver.request(ids::VIRTIO_BLK_T_IN, 7, &data), (0, len + 1));
    let mut seen = vec![0; len as usize];
    memory().read_slice(&mut seen, GuestAddress(base)).unwrap();
    assert!(seen == bytes(&file, 7 * SECTOR, len as usize));
}

#[test]
fn discarded_and_zeroed_ranges_read_as_zeros() {
    let file = image(64);
    let mut driver = Driver::new(Some(&file), false);
    for (kind, sector, flags) in [
        (ids::VIRTIO_BLK_T_DISCARD, 8u64, 0u32),
        (ids::VIRTIO_BLK_T_WRITE_ZEROES, 24, 1),
    ] {
        memory().write_obj(sector, GuestAddress(DATA)).unwrap();
        memory().write_obj(8u32, GuestAddress(DATA + 8)).unwrap();
        memory().write_obj(flags, GuestAddress(DATA + 12)).unwrap();
        let data = [Desc::readable(DATA, 16)];
        assert_eq!(driver.request(kind, 0, &data), (0, 1));
        assert_eq!(bytes(&file, sector * SECTOR, 8 * 512), [0; 8 * 512]);
        assert_ne!(bytes(&file, (sector - 1) * SECTOR, 512), [0; 512]);
    }
}

#[test]
fn an_empty_slot_is_filled_once_and_the_driver_told() {
    let mut driver = Driver::new(None, true);
    assert_eq!(driver.device.config()[..8], [0; 8]);
    assert_eq!(driver.device.config_generation(), 0);
    let data = [Desc::writable(DATA, 512)];
    assert_eq!(driver.request(ids::VIRTIO_BLK_T_IN, 0, &data).0, 1);
    driver.line.read().unwrap();
    assert_eq!(driver.interrupt.look(), 1);

    driver.handle.set_backing(image(5)).unwrap();
    assert_eq!(driver.line.read().unwrap(), 1);
    assert_eq!(driver.interrupt.look() & 2, 2);
    assert_eq!(driver.device.config_generation(), 1);
    assert_eq!(driver.device.config()[..8], 5u64.to_le_bytes());
    assert_eq!(driver.request(ids::VIRTIO_BLK_T_IN, 4, &data), (0, 513));
    assert!(matches!(
        driver.handle.set_backing(image(1)),
        Err(SetBackingError::AlreadySet)
    ));
}

#[test]
fn a_read_only_device_offers_no_writing_and_keeps_the_file() {
    let file = image(8);
    let before = bytes(&file, 0, 4096);
    let mut driver = Driver::new(Some(&file), true);
    assert_eq!(
        driver.device.device_features(),
        F_EVENT_IDX
            | 1 << ids::VIRTIO_BLK_F_RO
            | 1 << ids::VIRTIO_BLK_F_SEG_MAX
            | 1 << ids::VIRTIO_BLK_F_BLK_SIZE
    );
    let data = [Desc::readable(DATA, 512)];
    assert_eq!(driver.request(ids::VIRTIO_BLK_T_OUT, 0, &data), (1, 1));
    assert_eq!(driver.request(ids::VIRTIO_BLK_T_DISCARD, 0, &data), (2, 1));
    assert_eq!(bytes(&file, 0, 4096), before);
}

#[test]
fn broken_rings_need_a_reset_and_a_reset_hands_the_queue_back() {
    let file = image(8);
    let mut driver = Driver::new(Some(&file), false);
    // More available chains than the ring has entries.
    driver.queue.set_available(1000);
    driver.queue.kick();
    wait_until("DEVICE_NEEDS_RESET", || {
        driver.interrupt.reset_needed().then_some(())
    });
    driver.queue.kick();

    let queues = driver.device.reset().unwrap();
    assert_eq!(queues.len(), 1);
    assert!(driver.device.reset().unwrap().is_empty());
    let mem = memory();
    driver.queue = DriverQueue::new(&mem, 128);
    let (
        Activation {
            interrupt, queues, ..
        },
        line,
    ) = activation(&mem, &[&driver.queue], 0);
    driver.line = line;
    let again = Activation {
        mem,
        interrupt,
        queues,
        features: 0,
    };
    driver.device.activate(again).unwrap();
    let data = [Desc::writable(DATA, 512)];
    assert_eq!(driver.request(ids::VIRTIO_BLK_T_IN, 0, &data), (0, 513));
}

/// CVE-2026-45782 of Cloud Hypervisor: a reset with requests under way.
#[test]
fn after_a_reset_nothing_is_written_to_the_guest_any_more() {
    let file = image(6000);
    for _ in 0..10 {
        let mut driver = Driver::new(Some(&file), false);
        let mem = memory();
        write_header(&mem, HEADER, ids::VIRTIO_BLK_T_IN, 0);
        // Each takes several wake-ups.
        let (base, len) = (0x10_0000, 5000 * SECTOR as u32);
        for _ in 0..16 {
            let data = Desc::writable(base, len);
            let status = Desc::writable(STATUS, 1);
            driver
                .queue
                .add(&[Desc::readable(HEADER, 16), data, status]);
        }
        driver.queue.kick();
        driver.queue.wait_used();
        assert_eq!(driver.device.reset().unwrap().len(), 1);
        let pattern = vec![0xee; len as usize];
        mem.write_slice(&pattern, GuestAddress(base)).unwrap();
        driver.queue.kick();
        std::thread::sleep(std::time::Duration::from_millis(5));
        let mut seen = vec![0; len as usize];
        mem.read_slice(&mut seen, GuestAddress(base)).unwrap();
        assert!(seen == pattern);
    }
}

#[test]
fn chains_without_a_place_for_the_status_need_a_reset() {
    for chain in [
        vec![Desc::readable(HEADER, 16)],
        vec![Desc::readable(HEADER, 16).next(0)],
        vec![Desc::readable(u64::MAX, 16), Desc::writable(STATUS, 1)],
    ] {
        let mut driver = Driver::new(Some(&image(1)), false);
        driver.queue.add(&chain);
        driver.queue.kick();
        wait_until("DEVICE_NEEDS_RESET", || {
            driver.interrupt.reset_needed().then_some(())
        });
        assert!(driver.queue.used().is_none());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Any chains, looped and indirect ones among them: the worker lives and can be reset, and the
    /// file keeps its length.
    #[test]
    fn any_chains_are_survived(
        chains in prop::collection::vec(prop::collection::vec(Desc::any(), 0..6), 1..8),
        kind in prop_oneof![0u32..16, any::<u32>()],
    ) {
        let file = image(64);
        let mut driver = Driver::new(Some(&file), false);
        write_header(&memory(), 0x5000, kind, 3);
        for chain in &chains {
            let mut with_header = vec![Desc::readable(0x5000, 16)];
            with_header.extend(chain);
            driver.queue.add(&with_header);
            driver.queue.kick();
        }
        wait_until("an end", || {
            let used = driver.queue.used().is_some();
            (used || driver.interrupt.reset_needed()).then_some(())
        });
        prop_assert_eq!(driver.device.reset().unwrap().len(), 1);
        prop_assert_eq!(file.metadata().unwrap().len(), 64 * SECTOR);
    }
}

/// The queue after the device was suspended, and a new device that goes on with it.
fn resumed(
    driver: &mut Driver,
    backing: Option<&File>,
) -> Result<(BlockDevice, EventLoop), SuspendError> {
    let (queues, state) = driver.device.suspend()?;
    let events = event_loop();
    let backing = backing.map(|file| Backing::new(file.try_clone().unwrap()).unwrap());
    let (mut device, _) = BlockDevice::new("serial-1", backing, true, events.handle());
    let (mut activation, line) = activation(&memory(), &[], 0);
    activation.queues = queues;
    driver.interrupt = activation.interrupt.clone();
    driver.line = line;
    device.resume(activation, state)?;
    Ok((device, events))
}

#[test]
fn a_long_transfer_is_finished_before_the_device_is_suspended() {
    let file = image(8192);
    let mut driver = Driver::new(Some(&file), true);
    let mem = memory();
    write_header(&mem, HEADER, ids::VIRTIO_BLK_T_IN, 0);
    mem.write_obj(0xffu8, GuestAddress(STATUS)).unwrap();
    // Three wake-ups' worth.
    let data = Desc::writable(DATA, 3 << 20);
    driver
        .queue
        .add(&[Desc::readable(HEADER, 16), data, Desc::writable(STATUS, 1)]);
    driver.queue.kick();
    let (_device, _events) = resumed(&mut driver, Some(&file)).unwrap();
    // Before or after: the request is answered once, with all of its data.
    driver.queue.kick();
    assert_eq!(driver.queue.wait_used(), (0, (3 << 20) + 1));
    assert_eq!(driver.queue.used(), None);
    assert_eq!(mem.read_obj::<u8>(GuestAddress(STATUS)).unwrap(), 0);
    let mut last = vec![0; 512];
    mem.read_slice(&mut last, GuestAddress(DATA + (3 << 20) - 512))
        .unwrap();
    assert_eq!(last, bytes(&file, (3 << 20) - 512, 512));
}

#[test]
fn a_full_slot_keeps_its_size_and_an_empty_one_may_be_filled() {
    let (small, large) = (image(8), image(16));
    let mut driver = Driver::new(Some(&small), true);
    let error = resumed(&mut driver, Some(&large)).err().unwrap();
    assert!(error.to_string().contains("8 sectors"), "{error}");

    let mut driver = Driver::new(None, true);
    let (device, _events) = resumed(&mut driver, Some(&large)).unwrap();
    assert_eq!(device.config_generation(), 1);
    assert_eq!(driver.line.read().unwrap(), 1, "the driver is told");
    assert_eq!(device.config()[..8], 16u64.to_le_bytes());
    let data = [Desc::writable(DATA, 512)];
    assert_eq!(driver.request(ids::VIRTIO_BLK_T_IN, 15, &data), (0, 513));
}
