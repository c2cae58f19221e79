//! Every register in every status, and whole lives of a device.

use super::super::testing::{DriverQueue, MEMORY_SIZE, memory};
use super::super::{DeviceError, DeviceType};
use super::*;
use crate::virtio::F_EVENT_IDX;
use proptest::prelude::*;
use std::sync::Mutex;
use virtio_bindings::virtio_mmio as offsets;

/// Records what the transport does with it.
struct FakeDevice {
    seen: Arc<Mutex<Seen>>,
    queues: Vec<Virtqueue>,
}

#[derive(Default)]
struct Seen {
    activations: Vec<(u64, Vec<virtio_queue::QueueState>)>,
    resets: usize,
}

const OFFERED: u64 = F_EVENT_IDX | 0b101;

impl VirtioDevice for FakeDevice {
    fn device_type(&self) -> DeviceType {
        DeviceType::Vsock
    }
    fn queue_max_sizes(&self) -> &[u16] {
        &[16, 8]
    }
    fn device_features(&self) -> u64 {
        OFFERED
    }
    fn config_generation(&self) -> u32 {
        7
    }
    fn config(&self) -> Vec<u8> {
        (1..=12).collect()
    }
    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let states = activation.queues.iter().map(Virtqueue::state).collect();
        self.seen
            .lock()
            .unwrap()
            .activations
            .push((activation.features, states));
        self.queues = activation.queues;
        Ok(())
    }
    fn reset(&mut self) -> Result<Vec<Virtqueue>, DeviceError> {
        self.seen.lock().unwrap().resets += 1;
        Ok(std::mem::take(&mut self.queues))
    }
}

struct Driver {
    transport: MmioTransport,
    seen: Arc<Mutex<Seen>>,
    line: EventFd,
}

impl Driver {
    fn new() -> Self {
        let seen = Arc::new(Mutex::new(Seen::default()));
        let device = FakeDevice {
            seen: seen.clone(),
            queues: Vec::new(),
        };
        let line = EventFd::new(EFD_NONBLOCK).unwrap();
        let transport = MmioTransport::new(
            memory(),
            Box::new(device),
            Line::of_event(line.try_clone().unwrap()),
        )
        .unwrap();
        Driver {
            transport,
            seen,
            line,
        }
    }

    fn read(&mut self, offset: u32) -> u32 {
        let mut data = [0xaa; 4];
        self.transport.read(offset.into(), &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&mut self, offset: u32, value: u32) {
        self.transport.write(offset.into(), &value.to_le_bytes());
    }

    fn status(&mut self) -> u32 {
        self.read(offsets::VIRTIO_MMIO_STATUS)
    }

    fn set_status(&mut self, value: u32) {
        self.write(offsets::VIRTIO_MMIO_STATUS, value);
    }

    fn accept(&mut self, features: u64) {
        for half in 0..2 {
            self.write(offsets::VIRTIO_MMIO_DRIVER_FEATURES_SEL, half);
            self.write(
                offsets::VIRTIO_MMIO_DRIVER_FEATURES,
                (features >> (32 * half)) as u32,
            );
        }
    }

    fn set_up_queue(&mut self, index: u32, config: QueueConfig) {
        self.write(offsets::VIRTIO_MMIO_QUEUE_SEL, index);
        self.write(offsets::VIRTIO_MMIO_QUEUE_NUM, config.size);
        for (offset, address) in [
            (offsets::VIRTIO_MMIO_QUEUE_DESC_LOW, config.descriptor_table),
            (offsets::VIRTIO_MMIO_QUEUE_AVAIL_LOW, config.available_ring),
            (offsets::VIRTIO_MMIO_QUEUE_USED_LOW, config.used_ring),
        ] {
            self.write(offset, address as u32);
            self.write(offset + 4, (address >> 32) as u32);
        }
        self.write(offsets::VIRTIO_MMIO_QUEUE_READY, config.ready.into());
    }

    /// As far as `status`, with the features and queues that a good driver sets on the way.
    fn reach(&mut self, status: u32) {
        for bits in [1, 3, 11, 15] {
            if bits & !status != 0 {
                break;
            }
            if bits == 11 {
                self.accept(OFFERED | F_VERSION_1);
            }
            if bits == 15 {
                let first = DriverQueue::at(&memory(), 16, 0x1000).config();
                let second = DriverQueue::at(&memory(), 8, 0x4000).config();
                self.set_up_queue(0, first);
                self.set_up_queue(1, second);
            }
            self.set_status(bits);
        }
        if status & 128 != 0 {
            self.set_status(status);
        }
        assert_eq!(self.status(), status);
    }
}

const STATUSES: [u32; 9] = [0, 1, 3, 11, 15, 129, 131, 139, 143];

#[test]
fn a_good_driver_gets_a_working_device_and_can_reset_it() {
    let mut driver = Driver::new();
    assert_eq!(driver.read(offsets::VIRTIO_MMIO_MAGIC_VALUE), 0x7472_6976);
    assert_eq!(driver.read(offsets::VIRTIO_MMIO_VERSION), 2);
    assert_eq!(driver.read(offsets::VIRTIO_MMIO_DEVICE_ID), 19);
    driver.write(offsets::VIRTIO_MMIO_DEVICE_FEATURES_SEL, 0);
    assert_eq!(
        driver.read(offsets::VIRTIO_MMIO_DEVICE_FEATURES),
        OFFERED as u32
    );
    driver.write(offsets::VIRTIO_MMIO_DEVICE_FEATURES_SEL, 1);
    assert_eq!(driver.read(offsets::VIRTIO_MMIO_DEVICE_FEATURES), 1);
    driver.write(offsets::VIRTIO_MMIO_DEVICE_FEATURES_SEL, 2);
    assert_eq!(driver.read(offsets::VIRTIO_MMIO_DEVICE_FEATURES), 0);
    for (queue, max) in [(0, 16), (1, 8), (2, 0), (u32::MAX, 0)] {
        driver.write(offsets::VIRTIO_MMIO_QUEUE_SEL, queue);
        assert_eq!(driver.read(offsets::VIRTIO_MMIO_QUEUE_NUM_MAX), max);
    }
    assert_eq!(driver.read(offsets::VIRTIO_MMIO_SHM_LEN_LOW), u32::MAX);
    assert_eq!(driver.read(offsets::VIRTIO_MMIO_SHM_LEN_HIGH), u32::MAX);
    assert_eq!(driver.read(offsets::VIRTIO_MMIO_CONFIG_GENERATION), 7);

    for life in 1..=2 {
        driver.reach(15);
        {
            let seen = driver.seen.lock().unwrap();
            assert_eq!(seen.activations.len(), life);
            let (features, states) = seen.activations.last().unwrap();
            assert_eq!(*features, OFFERED | F_VERSION_1);
            assert_eq!((states[0].size, states[1].size), (16, 8));
            assert!(
                states
                    .iter()
                    .all(|state| state.ready && state.event_idx_enabled)
            );
            assert_eq!(states[1].avail_ring, 0x5000);
        }
        driver.write(offsets::VIRTIO_MMIO_QUEUE_NOTIFY, 1);
        driver.write(offsets::VIRTIO_MMIO_QUEUE_NOTIFY, 2);
        assert_eq!(driver.transport.queue_events()[1].read().unwrap(), 1);
        assert!(driver.transport.queue_events()[0].read().is_err());
        driver.set_status(0);
        assert_eq!(driver.seen.lock().unwrap().resets, life);
        assert_eq!(driver.status(), 0);
        assert_eq!(driver.read(offsets::VIRTIO_MMIO_INTERRUPT_STATUS), 0);
    }
}

#[test]
fn every_register_written_in_every_status_changes_only_what_it_may() {
    for status in STATUSES {
        for &(register, offset) in Register::ALL {
            for value in [0u32, 1, 2, 0x40, 0xffff_ffff] {
                let mut driver = Driver::new();
                driver.reach(status);
                // Select a queue and feature words that exist.
                driver.write(offsets::VIRTIO_MMIO_QUEUE_SEL, 0);
                driver.write(offsets::VIRTIO_MMIO_DRIVER_FEATURES_SEL, 0);
                let features = driver.transport.driver.features;
                let queues = driver.transport.driver.queues.clone();
                let activations = driver.seen.lock().unwrap().activations.len();

                driver.transport.write(offset, &value.to_le_bytes());

                let now = &driver.transport.driver;
                let reset = register == Register::Status && value == 0;
                if !reset {
                    assert!(
                        now.features == features
                            || (register == Register::DriverFeatures && status == 3),
                        "{register:?} = {value:#x} in status {status} changed the features"
                    );
                    assert!(
                        now.queues == queues || status == 11,
                        "{register:?} = {value:#x} in status {status} changed a queue"
                    );
                }
                let expected = match (register, value) {
                    (Register::Status, 0) => 0,
                    (Register::Status, 1) if status == 0 => 1,
                    // All bits: FAILED is among them. FAILED stays FAILED.
                    (Register::Status, 0xffff_ffff) => status | 128,
                    _ => status,
                };
                assert_eq!(
                    driver.status(),
                    expected,
                    "{register:?} = {value:#x} in status {status}"
                );
                assert_eq!(driver.seen.lock().unwrap().activations.len(), activations);
            }
        }
    }
}

#[test]
fn a_ready_queue_keeps_its_configuration() {
    let mut driver = Driver::new();
    driver.reach(11);
    driver.set_up_queue(0, DriverQueue::new(&memory(), 16).config());
    let before = driver.transport.driver.queues[0];
    for offset in [
        offsets::VIRTIO_MMIO_QUEUE_NUM,
        offsets::VIRTIO_MMIO_QUEUE_DESC_LOW,
        offsets::VIRTIO_MMIO_QUEUE_AVAIL_HIGH,
        offsets::VIRTIO_MMIO_QUEUE_USED_LOW,
    ] {
        driver.write(offset, 0x1234_5670);
    }
    assert_eq!(driver.transport.driver.queues[0], before);
    driver.write(offsets::VIRTIO_MMIO_QUEUE_READY, 0);
    assert_eq!(driver.read(offsets::VIRTIO_MMIO_QUEUE_READY), 0);
    driver.write(offsets::VIRTIO_MMIO_QUEUE_NUM, 4);
    assert_eq!(driver.transport.driver.queues[0].size, 4);
}

#[test]
fn unusable_queues_need_a_reset_instead_of_an_activation() {
    let good = DriverQueue::new(&memory(), 16).config();
    for bad in [
        QueueConfig { size: 0, ..good },
        QueueConfig { size: 12, ..good },
        QueueConfig { size: 32, ..good },
        QueueConfig {
            descriptor_table: 0x1008,
            ..good
        },
        QueueConfig {
            used_ring: MEMORY_SIZE as u64 - 4,
            ..good
        },
    ] {
        let mut driver = Driver::new();
        driver.reach(11);
        driver.set_up_queue(0, bad);
        driver.set_status(15);
        assert_eq!(driver.status(), 15 | 64);
        assert!(driver.seen.lock().unwrap().activations.is_empty());
        assert_eq!(driver.read(offsets::VIRTIO_MMIO_INTERRUPT_STATUS), 2);
        assert_eq!(driver.line.read().unwrap(), 1);
        // A reset makes it good again.
        driver.set_status(0);
        driver.reach(15);
        assert_eq!(driver.seen.lock().unwrap().activations.len(), 1);
    }
}

#[test]
fn features_that_were_not_offered_are_not_ok() {
    for features in [OFFERED, F_VERSION_1 | 2, F_VERSION_1 | 1 << 63, 0] {
        let mut driver = Driver::new();
        driver.set_status(1);
        driver.set_status(3);
        driver.accept(features);
        driver.set_status(11);
        assert_eq!(driver.status(), 3, "{features:#x}");
    }
}

#[test]
fn configuration_is_read_in_any_width_and_other_registers_in_one() {
    let mut driver = Driver::new();
    for (offset, len, expected) in [
        (0x100, 1, &[1][..]),
        (0x103, 2, &[4, 5]),
        (0x104, 4, &[5, 6, 7, 8]),
        (0x104, 8, &[5, 6, 7, 8, 9, 10, 11, 12]),
        (0x108, 8, &[9, 10, 11, 12, 0, 0, 0, 0]),
        (0x10c, 4, &[0; 4]),
        (0xfff, 1, &[0]),
        (0x000, 1, &[0]),
        (0x000, 2, &[0, 0]),
        (0x000, 8, &[0; 8]),
        (0x002, 4, &[0; 4]),
        (0x028, 4, &[0; 4]),
    ] {
        let mut data = vec![0xaa; len];
        driver.transport.read(offset, &mut data);
        assert_eq!(data, expected, "{offset:#x}, {len} bytes");
    }
    // A status write of another width is no write.
    driver.transport.write(0x70, &[1]);
    driver.transport.write(0x70, &[1, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(driver.status(), 0);
}

proptest! {
    /// Any sequence of accesses: no panic, and an active device always has checked queues.
    #[test]
    fn any_accesses_are_survived(
        accesses in prop::collection::vec(
            (any::<bool>(), prop_oneof![0u64..0x110, any::<u64>()], prop::collection::vec(any::<u8>(), 0..9), any::<u32>()),
            0..64,
        ),
        start in prop::sample::select(&STATUSES),
    ) {
        let mut driver = Driver::new();
        driver.reach(start);
        for (write, offset, mut data, value) in accesses {
            if write {
                driver.transport.write(offset, &data);
                driver.transport.write(offset & 0xffc, &(value % 300).to_le_bytes());
            } else {
                driver.transport.read(offset, &mut data);
            }
        }
        for (_, states) in &driver.seen.lock().unwrap().activations {
            for state in states.iter().filter(|state| state.ready) {
                prop_assert!(state.size.is_power_of_two() && state.size <= 16);
                prop_assert!((state.used_ring as usize) < MEMORY_SIZE);
            }
        }
    }
}

/// The driver's requests up to here were served: the rings say so, and the fake device's position.
fn suspended_while_active() -> (Driver, TransportState) {
    let mut driver = Driver::new();
    driver.reach(15);
    driver.transport.interrupt.used_buffers();
    let state = driver.transport.suspend().unwrap();
    (driver, state)
}

#[test]
fn a_transport_goes_on_in_another_process_as_in_its_own() {
    let (mut driver, state) = suspended_while_active();
    assert_eq!(driver.seen.lock().unwrap().resets, 1);
    let mut other = Driver::new();
    for driver in [&mut driver, &mut other] {
        let _ = driver.line.read();
        driver.transport.resume(&state).unwrap();
        assert_eq!(driver.status(), 15);
        assert_eq!(driver.read(offsets::VIRTIO_MMIO_INTERRUPT_STATUS), 1);
        assert_eq!(driver.line.read().unwrap(), 1, "it may have been lost");
        for event in driver.transport.queue_events() {
            assert_eq!(event.read().unwrap(), 1, "a kick may have been lost");
        }
        driver.write(offsets::VIRTIO_MMIO_QUEUE_SEL, 1);
        assert_eq!(driver.read(offsets::VIRTIO_MMIO_QUEUE_READY), 1);
    }
    let activations = |driver: &Driver| driver.seen.lock().unwrap().activations.last().cloned();
    assert_eq!(activations(&other), activations(&driver));
    // And once more, from there.
    let again = other.transport.suspend().unwrap();
    assert_eq!(again, state);
    other.set_status(0);
    other.reach(15);
}

#[test]
fn an_inactive_transport_goes_on_as_such() {
    for status in [0, 1, 3, 11] {
        let mut driver = Driver::new();
        driver.reach(status);
        let state = driver.transport.suspend().unwrap();
        let mut other = Driver::new();
        other.transport.resume(&state).unwrap();
        assert_eq!(other.status(), status);
        assert!(other.seen.lock().unwrap().activations.is_empty());
        assert!(other.line.read().is_err());
    }
}

#[test]
fn a_transport_that_needs_a_reset_is_not_suspended() {
    let mut driver = Driver::new();
    driver.reach(15);
    driver.transport.interrupt.needs_reset("test", &"because");
    assert!(driver.transport.suspend().is_err());
    let mut failed = Driver::new();
    failed.reach(131);
    assert!(failed.transport.suspend().is_err());
}

#[test]
fn indices_that_the_rings_contradict_are_refused() {
    use vm_memory::{Bytes, GuestAddress};
    let used_index = GuestAddress(0x1000 + 0x2002);
    let available_index = GuestAddress(0x1000 + 0x1002);
    for (address, index, why) in [
        (used_index, 1u16, "used ring ends elsewhere"),
        (available_index, 17, "available ring ends elsewhere"),
    ] {
        let (_, state) = suspended_while_active();
        memory().write_obj(index, address).unwrap();
        let error = Driver::new().transport.resume(&state).unwrap_err();
        assert!(error.to_string().contains(why), "{error}");
    }
    let (_, state) = suspended_while_active();
    memory().write_obj(16u16, available_index).unwrap();
    Driver::new().transport.resume(&state).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// Whatever a state says, it is refused or gives a device with queues in guest memory.
    #[test]
    fn any_state_is_survived(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let (_, state) = suspended_while_active();
        let mut bytes = postcard::to_stdvec(&state).unwrap();
        for (position, value) in changes {
            let at = position.index(bytes.len());
            bytes[at] = value;
        }
        if let Ok(state) = postcard::from_bytes::<TransportState>(&bytes) {
            let mut other = Driver::new();
            let resumed = other.transport.resume(&state);
            let activations = other.seen.lock().unwrap().activations.clone();
            prop_assert!(activations.len() <= 1);
            prop_assert!(resumed.is_err() || activations.is_empty() == (other.status() != 15));
            for (features, queues) in activations {
                prop_assert_eq!(features & !(OFFERED | F_VERSION_1), 0);
                for queue in queues.iter().filter(|queue| queue.ready) {
                    for address in [queue.desc_table, queue.avail_ring, queue.used_ring] {
                        prop_assert!(address < MEMORY_SIZE as u64);
                    }
                    prop_assert_eq!(queue.next_avail, queue.next_used);
                }
            }
            // The driver can start over in any case.
            other.set_status(0);
            prop_assert_eq!(other.status(), 0);
        }
    }
}
