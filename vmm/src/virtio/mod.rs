//! The virtio devices, over virtio-mmio (virtio 1.3, no legacy interface).
//!
//! ```text
//! vCPU thread                         event loop thread
//!   MmioTransport                       worker (one for each active device)
//!     registers, status machine           virtqueues, guest memory, back end
//!     Box<dyn VirtioDevice> ──activate──► (moved in)
//!                           ◄──reset───── (moved out)
//!   └──────────── Arc<Interrupt> ─────────┘
//! ```
//!
//! A device is `mod.rs` (what it is), `device.rs` (what the transport sees, and the worker),
//! `request.rs` (guest bytes in and out) and a back end. Everything read from guest memory or
//! registers is hostile: a bad request gets an error status, a broken ring sets
//! DEVICE_NEEDS_RESET, and nothing a guest writes makes a device allocate or work without bound.

pub mod balloon;
pub mod block;
pub mod buffers;
pub mod console;
#[cfg(any(test, feature = "fake-driver"))]
pub mod fake_driver;
pub mod fs;
pub mod interrupt;
mod iovec;
pub mod mem;
pub mod mmio;
pub mod net;
pub mod queue;
pub mod queue_config;
pub mod rng;
#[cfg(test)]
pub(crate) mod testing;
pub mod vsock;
mod worker;

pub use interrupt::Interrupt;
pub use mmio::MmioTransport;
pub use queue::Virtqueue;

use crate::event_loop;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use vm_memory::GuestMemoryMmap;

/// Feature bit VIRTIO_F_VERSION_1 (virtio 1.3 §6); the transport offers it for every device.
pub const F_VERSION_1: u64 = 1 << virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
/// Feature bit VIRTIO_F_EVENT_IDX (virtio 1.3 §6, §2.7.7): fewer notifications both ways.
pub const F_EVENT_IDX: u64 = 1 << virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

/// Device types (virtio 1.3 §5) that exist here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeviceType {
    /// Block device, §5.2.
    Block,
    /// Console, §5.3.
    Console,
    /// Entropy source, §5.4.
    Rng,
    /// Traditional memory balloon, §5.5.
    Balloon,
    /// Socket, §5.10.
    Vsock,
    /// File system, §5.11.
    Fs,
    /// Memory that can be plugged and unplugged, §5.15.
    Mem,
    /// Network card, §5.1.
    Net,
}

impl DeviceType {
    /// Device id in the DeviceID register.
    pub fn id(self) -> u32 {
        use virtio_bindings::virtio_ids as ids;
        match self {
            DeviceType::Block => ids::VIRTIO_ID_BLOCK,
            DeviceType::Console => ids::VIRTIO_ID_CONSOLE,
            DeviceType::Rng => ids::VIRTIO_ID_RNG,
            DeviceType::Balloon => ids::VIRTIO_ID_BALLOON,
            DeviceType::Vsock => ids::VIRTIO_ID_VSOCK,
            DeviceType::Fs => ids::VIRTIO_ID_FS,
            DeviceType::Mem => ids::VIRTIO_ID_MEM,
            DeviceType::Net => ids::VIRTIO_ID_NET,
        }
    }

    /// Name as in [`bulkhead_proto::vmm::Status::devices`].
    pub fn name(self) -> &'static str {
        match self {
            DeviceType::Block => "block",
            DeviceType::Console => "console",
            DeviceType::Rng => "rng",
            DeviceType::Balloon => "balloon",
            DeviceType::Vsock => "vsock",
            DeviceType::Fs => "fs",
            DeviceType::Mem => "mem",
            DeviceType::Net => "net",
        }
    }
}

/// All that a device needs to work, moved to it when the driver sets DRIVER_OK.
#[derive(Debug)]
pub struct Activation {
    /// Guest memory.
    pub mem: GuestMemoryMmap,
    /// How to notify the driver.
    pub interrupt: Arc<Interrupt>,
    /// The device's queues, as many as [`VirtioDevice::queue_max_sizes`] has, validated.
    pub queues: Vec<Virtqueue>,
    /// Features that the driver accepted, a subset of those offered.
    pub features: u64,
}

/// Why a device could not be activated or reset: its event loop is gone.
#[derive(Debug, thiserror::Error)]
#[error("{verb} the {} device failed: {source}", .device.name())]
pub struct DeviceError {
    /// What was tried.
    pub verb: &'static str,
    /// Which device.
    pub device: DeviceType,
    /// Why it failed.
    pub source: event_loop::Error,
}

/// What a device and its driver have agreed on by messages rather than by registers; part of a
/// saved machine, so every value may be hostile.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeviceState {
    /// Nothing.
    None,
    /// A block device.
    Block {
        /// The capacity that the driver has seen, in sectors; 0 for an empty slot.
        sectors: u64,
    },
    /// A file system.
    Fs {
        /// Options that the client offered with FUSE_INIT; none before that.
        capable: Option<u64>,
    },
}

/// Why a device can't be suspended now, or resumed from this state.
#[derive(Debug, thiserror::Error)]
pub enum SuspendError {
    /// Its event loop is gone.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// There is something that would not survive.
    #[error("the {} device is in use: {what}", .device.name())]
    InUse {
        /// Which device.
        device: DeviceType,
        /// What is in use.
        what: String,
    },
    /// The state is not one that this device can go on from.
    #[error("the saved {} device doesn't fit: {what}", .device.name())]
    Mismatch {
        /// Which device.
        device: DeviceType,
        /// Found and expected.
        what: String,
    },
}

/// A device as its transport sees it. Methods are called from vCPU threads, one at a time.
pub trait VirtioDevice: Send {
    /// The type of device.
    fn device_type(&self) -> DeviceType;

    /// Largest size of each queue, a power of two up to 32768 (virtio 1.3 §2.7).
    fn queue_max_sizes(&self) -> &[u16];

    /// Features offered besides [`F_VERSION_1`].
    fn device_features(&self) -> u64;

    /// Changes whenever the configuration space has changed by itself (virtio 1.3 §2.5.1).
    fn config_generation(&self) -> u32 {
        0
    }

    /// The configuration space as the driver sees it now.
    fn config(&self) -> Vec<u8>;

    /// Starts work on the queues.
    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError>;

    /// Stops work, waits until what is in flight is finished, and hands the queues back. A device
    /// that is not active hands back none.
    fn reset(&mut self) -> Result<Vec<Virtqueue>, DeviceError>;

    /// Stops work as [`VirtioDevice::reset`] does, but so that the driver notices nothing once
    /// [`VirtioDevice::resume`] has been called, here or in another process. Requests that were
    /// taken from a queue are finished. When it is refused the device works on.
    fn suspend(&mut self) -> Result<(Vec<Virtqueue>, DeviceState), SuspendError> {
        Ok((self.reset()?, DeviceState::None))
    }

    /// Goes on from where the device was suspended. Called for active devices only.
    fn resume(&mut self, activation: Activation, state: DeviceState) -> Result<(), SuspendError> {
        if state != DeviceState::None {
            return Err(mismatch(self.device_type(), state));
        }
        Ok(self.activate(activation)?)
    }
}

/// The error of a state that is another type of device's.
fn mismatch(device: DeviceType, state: DeviceState) -> SuspendError {
    SuspendError::Mismatch {
        device,
        what: format!("its state is {state:?}"),
    }
}
