//! The virtio-mmio transport: register window and status machine (virtio 1.3 §4.2, §3.1, §2.1).
//!
//! ```text
//!  0 ──► ACKNOWLEDGE ──► +DRIVER ──► +FEATURES_OK ──► +DRIVER_OK
//!          1               3           11 │              15 │
//!                  features written       │ queues set up   │ device active
//!                                         └─ only here ─┘   │
//!  writing 0 resets from everywhere; FAILED (128) and       ▼
//!  DEVICE_NEEDS_RESET (64) end in a reset, too
//! ```
//!
//! What a driver writes at the wrong time is ignored, so that a queue's configuration is frozen
//! from DRIVER_OK on. Accesses that §4.2.2.2 forbids (other than aligned 32-bit ones outside the
//! configuration space) read zeros and write nothing.

mod registers;
mod state;
mod status;
#[cfg(test)]
mod tests;

use super::interrupt::Line;
use super::queue::Virtqueue;
use super::queue_config::QueueConfig;
use super::{Activation, DeviceType, F_EVENT_IDX, F_VERSION_1, Interrupt, VirtioDevice};
use registers::Register;
pub use state::{StateError, TransportState};
use status::Status;
use std::sync::Arc;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Length of a transport's register window in bytes; its address is a multiple of it.
pub const MMIO_SIZE: u64 = 0x1000;

/// Offset of the QueueNotify register, where the queues' ioeventfds are registered with the
/// queue's index as 32-bit datamatch.
pub const QUEUE_NOTIFY: u64 = virtio_bindings::virtio_mmio::VIRTIO_MMIO_QUEUE_NOTIFY as u64;

/// Offsets and lengths of the registers whose writes only prepare what another access does:
/// feature selectors, driver features, queue selector and size; and the addresses of a queue's parts.
/// They may take effect as late as the next access to any other register.
pub const PREPARING: [(u64, u32); 2] = [
    between(
        virtio_bindings::virtio_mmio::VIRTIO_MMIO_DEVICE_FEATURES_SEL,
        virtio_bindings::virtio_mmio::VIRTIO_MMIO_QUEUE_NUM,
    ),
    between(
        virtio_bindings::virtio_mmio::VIRTIO_MMIO_QUEUE_DESC_LOW,
        virtio_bindings::virtio_mmio::VIRTIO_MMIO_QUEUE_USED_HIGH,
    ),
];

/// Offset and length of the register by which a driver acknowledges an interrupt. A write may take
/// effect as late as the next access to any other register: see [`Interrupt`].
pub const ACKNOWLEDGEMENT: (u64, u32) = between(
    virtio_bindings::virtio_mmio::VIRTIO_MMIO_INTERRUPT_ACK,
    virtio_bindings::virtio_mmio::VIRTIO_MMIO_INTERRUPT_ACK,
);

/// Offset and length in bytes of the registers from `first` to `last`.
const fn between(first: u32, last: u32) -> (u64, u32) {
    (first as u64, last - first + size_of::<u32>() as u32)
}

/// Why a transport could not be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel refused an event descriptor.
    #[error(
        "creating the event descriptors of the {} device failed: {source}; check the limit on open \
         files (ulimit -n)", .device.name()
    )]
    EventFd {
        /// For which device.
        device: DeviceType,
        /// Why.
        source: std::io::Error,
    },
}

/// One device's register window. Its owner puts it on the bus, calls [`MmioTransport::read`] and
/// [`MmioTransport::write`] for the guest's accesses, and registers
/// [`MmioTransport::queue_events`] as ioeventfds.
pub struct MmioTransport {
    mem: GuestMemoryMmap,
    device: Box<dyn VirtioDevice>,
    interrupt: Arc<Interrupt>,
    queue_events: Vec<EventFd>,
    /// The workers' ends of `queue_events`; none while the device has them, or if they were lost
    /// with a broken event loop.
    kicks: Option<Vec<EventFd>>,
    driver: DriverState,
}

/// What the driver has written.
#[derive(Debug, Default)]
struct DriverState {
    status: Status,
    features: u64,
    device_features_select: u32,
    driver_features_select: u32,
    queue_select: u32,
    queues: Vec<QueueConfig>,
}

impl DriverState {
    fn new(queue_sizes: &[u16]) -> Self {
        DriverState {
            queues: queue_sizes
                .iter()
                .map(|&max| QueueConfig {
                    size: max.into(),
                    ..QueueConfig::default()
                })
                .collect(),
            ..DriverState::default()
        }
    }

    fn selected_queue(&mut self) -> Option<&mut QueueConfig> {
        self.queues
            .get_mut(usize::try_from(self.queue_select).ok()?)
    }
}

impl MmioTransport {
    /// A transport for `device`; `line` is of the interrupt that the guest is told of.
    pub fn new(
        mem: GuestMemoryMmap,
        device: Box<dyn VirtioDevice>,
        line: Line,
    ) -> Result<Self, Error> {
        let event_error = |source| Error::EventFd {
            device: device.device_type(),
            source,
        };
        let queue_sizes = device.queue_max_sizes();
        let queue_events = queue_sizes
            .iter()
            .map(|_| EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC))
            .collect::<Result<Vec<_>, _>>()
            .map_err(event_error)?;
        let kicks = queue_events
            .iter()
            .map(EventFd::try_clone)
            .collect::<Result<Vec<_>, _>>()
            .map_err(event_error)?;
        Ok(MmioTransport {
            driver: DriverState::new(queue_sizes),
            interrupt: Arc::new(Interrupt::new(line)),
            kicks: Some(kicks),
            mem,
            device,
            queue_events,
        })
    }

    /// One descriptor for each queue: register it as ioeventfd at [`QUEUE_NOTIFY`].
    pub fn queue_events(&self) -> &[EventFd] {
        &self.queue_events
    }

    /// The interrupt's descriptor: register it as irqfd.
    pub fn interrupt_event(&self) -> &EventFd {
        self.interrupt.event()
    }

    /// Which device is behind the window.
    pub fn device_type(&self) -> DeviceType {
        self.device.device_type()
    }

    /// Ends the device: nothing of it runs any more, whatever its driver has begun.
    pub fn end(mut self) {
        self.reset();
    }

    /// The guest reads `data.len()` bytes at `offset` of the window.
    pub fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(offset) = offset.checked_sub(registers::CONFIG) {
            self.read_config(offset, data);
        } else if let Ok(data) = <&mut [u8; 4]>::try_from(data)
            && let Some(register) = Register::at(offset)
        {
            *data = self.read_register(register).to_le_bytes();
        }
    }

    /// The guest writes `data` at `offset` of the window.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        // No device here has a writable field in its configuration space; virtio 1.3 §2.5.1 says
        // nothing of such writes, so they are dropped with all else that is no register.
        if let Ok(data) = <[u8; 4]>::try_from(data)
            && let Some(register) = Register::at(offset)
        {
            self.write_register(register, u32::from_le_bytes(data));
        }
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.device.config();
        let Some(from) = usize::try_from(offset)
            .ok()
            .and_then(|offset| config.get(offset..))
        else {
            return;
        };
        let len = from.len().min(data.len());
        data[..len].copy_from_slice(&from[..len]);
    }

    fn offered_features(&self) -> u64 {
        self.device.device_features() | F_VERSION_1
    }

    fn read_register(&mut self, register: Register) -> u32 {
        match register {
            Register::MagicValue => registers::MAGIC,
            Register::Version => registers::VERSION,
            Register::DeviceId => self.device.device_type().id(),
            Register::VendorId => registers::VENDOR,
            Register::DeviceFeatures => match self.driver.device_features_select {
                0 => self.offered_features() as u32,
                1 => (self.offered_features() >> 32) as u32,
                _ => 0,
            },
            // §4.2.2.1: zero for a queue that doesn't exist.
            Register::QueueSizeMax => usize::try_from(self.driver.queue_select)
                .ok()
                .and_then(|index| self.device.queue_max_sizes().get(index))
                .map_or(0, |&max| max.into()),
            Register::QueueReady => self
                .driver
                .selected_queue()
                .is_some_and(|queue| queue.ready)
                .into(),
            Register::InterruptStatus => self.interrupt.look(),
            Register::Status => self.driver.status.register(self.interrupt.reset_needed()),
            // §4.2.2.1: length -1 says that there is no such shared memory region.
            Register::SharedMemoryLengthLow
            | Register::SharedMemoryLengthHigh
            | Register::SharedMemoryBaseLow
            | Register::SharedMemoryBaseHigh => u32::MAX,
            Register::ConfigGeneration => self.device.config_generation(),
            // Write-only.
            Register::DeviceFeaturesSelect
            | Register::DriverFeatures
            | Register::DriverFeaturesSelect
            | Register::QueueSelect
            | Register::QueueSize
            | Register::QueueNotify
            | Register::InterruptAcknowledge
            | Register::QueueDescriptorLow
            | Register::QueueDescriptorHigh
            | Register::QueueDriverLow
            | Register::QueueDriverHigh
            | Register::QueueDeviceLow
            | Register::QueueDeviceHigh
            | Register::SharedMemorySelect => 0,
        }
    }

    fn write_register(&mut self, register: Register, value: u32) {
        match register {
            Register::DeviceFeaturesSelect => self.driver.device_features_select = value,
            Register::DriverFeaturesSelect => self.driver.driver_features_select = value,
            Register::DriverFeatures => self.write_driver_features(value),
            Register::QueueSelect => self.driver.queue_select = value,
            Register::QueueNotify => self.notify(value),
            Register::InterruptAcknowledge => self.interrupt.acknowledge(value),
            Register::Status => self.write_status(value),
            Register::QueueSize
            | Register::QueueReady
            | Register::QueueDescriptorLow
            | Register::QueueDescriptorHigh
            | Register::QueueDriverLow
            | Register::QueueDriverHigh
            | Register::QueueDeviceLow
            | Register::QueueDeviceHigh => self.write_queue(register, value),
            // Read-only, or without effect as there is no shared memory.
            Register::MagicValue
            | Register::Version
            | Register::DeviceId
            | Register::VendorId
            | Register::DeviceFeatures
            | Register::QueueSizeMax
            | Register::InterruptStatus
            | Register::SharedMemorySelect
            | Register::SharedMemoryLengthLow
            | Register::SharedMemoryLengthHigh
            | Register::SharedMemoryBaseLow
            | Register::SharedMemoryBaseHigh
            | Register::ConfigGeneration => {}
        }
    }

    /// §3.1.1: features are chosen between DRIVER and FEATURES_OK.
    fn write_driver_features(&mut self, value: u32) {
        if !self.driver.status.choosing_features() {
            return;
        }
        let features = &mut self.driver.features;
        match self.driver.driver_features_select {
            0 => *features = (*features & !0xffff_ffff) | u64::from(value),
            1 => *features = (*features & 0xffff_ffff) | (u64::from(value) << 32),
            // No feature has a bit from 64 on: accepting one is accepting what was not offered.
            _ => {}
        }
    }

    /// §3.1.1: queues are set up between FEATURES_OK and DRIVER_OK; §4.2.2.2: and not while ready.
    fn write_queue(&mut self, register: Register, value: u32) {
        if !self.driver.status.setting_up_queues() {
            return;
        }
        let Some(queue) = self.driver.selected_queue() else {
            return;
        };
        if register == Register::QueueReady {
            queue.ready = value == 1;
            return;
        }
        if queue.ready {
            return;
        }
        match register {
            Register::QueueSize => queue.size = value,
            Register::QueueDescriptorLow => set_low(&mut queue.descriptor_table, value),
            Register::QueueDescriptorHigh => set_high(&mut queue.descriptor_table, value),
            Register::QueueDriverLow => set_low(&mut queue.available_ring, value),
            Register::QueueDriverHigh => set_high(&mut queue.available_ring, value),
            Register::QueueDeviceLow => set_low(&mut queue.used_ring, value),
            Register::QueueDeviceHigh => set_high(&mut queue.used_ring, value),
            _ => {}
        }
    }

    /// A notification that came as an exit instead of through the ioeventfd.
    fn notify(&mut self, value: u32) {
        if !self.driver.status.active() {
            return;
        }
        if let Some(event) = usize::try_from(value)
            .ok()
            .and_then(|index| self.queue_events.get(index))
        {
            // Fails only if the counter is full, and then the worker wakes up anyway.
            let _ = event.write(1);
        }
    }

    fn write_status(&mut self, value: u32) {
        if value == 0 {
            self.reset();
            return;
        }
        let features_good = self.features_good();
        if self.driver.status.write(value, features_good) == status::Change::DriverOk {
            self.activate();
        }
    }

    /// §2.2.1 and §6.1: only offered features, and VERSION_1 among them.
    fn features_good(&self) -> bool {
        let features = self.driver.features;
        features & !self.offered_features() == 0 && features & F_VERSION_1 != 0
    }

    fn name(&self) -> &'static str {
        self.device.device_type().name()
    }

    fn activate(&mut self) {
        let name = self.name();
        let Some(kicks) = self.kicks.take() else {
            self.interrupt
                .needs_reset(name, &"its queues were lost with its event loop");
            return;
        };
        // A driver has its interrupt by now, but need not have had it when the configuration changed.
        self.interrupt.repeat();
        let event_idx = self.driver.features & F_EVENT_IDX != 0;
        let rings = self
            .driver
            .queues
            .iter()
            .zip(self.device.queue_max_sizes())
            .enumerate()
            .map(|(index, (config, &max))| config.validate(index, max, event_idx, &self.mem))
            .collect::<Result<Vec<_>, _>>();
        let rings = match rings {
            Ok(rings) => rings,
            Err(error) => {
                self.kicks = Some(kicks);
                self.interrupt.needs_reset(name, &error);
                return;
            }
        };
        let activation = Activation {
            mem: self.mem.clone(),
            interrupt: self.interrupt.clone(),
            queues: rings
                .into_iter()
                .zip(kicks)
                .map(|(ring, kick)| Virtqueue::new(ring, kick))
                .collect(),
            features: self.driver.features,
        };
        if let Err(error) = self.device.activate(activation) {
            self.interrupt.needs_reset(name, &error);
        }
    }

    /// §2.4: back to the state after power-on, with nothing of the device running any more.
    fn reset(&mut self) {
        match self.device.reset() {
            Ok(queues) if !queues.is_empty() => {
                self.kicks = Some(queues.into_iter().map(Virtqueue::into_kick).collect());
            }
            Ok(_) => {}
            Err(error) => tracing::error!("{error}"),
        }
        self.driver = DriverState::new(self.device.queue_max_sizes());
        self.interrupt.reset();
    }
}

fn set_low(address: &mut u64, value: u32) {
    *address = (*address & !0xffff_ffff) | u64::from(value);
}

fn set_high(address: &mut u64, value: u32) {
    *address = (*address & 0xffff_ffff) | (u64::from(value) << 32);
}
