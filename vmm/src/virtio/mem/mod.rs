//! virtio-mem (virtio 1.3 §5.15): memory beyond that which the guest booted with, plugged and
//! unplugged by its driver in blocks of 2 MiB, as the host asks.
//!
//! ```text
//!          MemHandle::request           (control socket)
//!               │ requested_size, configuration change
//!               ▼
//!   driver: PLUG, UNPLUG ──► worker ──► Region: which blocks are plugged
//!                                         ├─ KVM's memory slots, where any block is
//!                                         └─ pages given back to the host
//! ```
//!
//! The device's region is addresses only. KVM keeps tables for each page of a slot, so a part of
//! the region has a slot only while a block of it is plugged: a large region costs an idle VM
//! nothing, and the rest of it doesn't exist for the guest's own accesses. They read zeros there,
//! and write nothing.
//!
//! What is plugged outlives a reset of the device (§5.15.6.4), and ends with the machine. A machine
//! with plugged memory isn't saved: a template is what every clone starts from, and none has been
//! asked to grow.

mod device;
mod region;
mod request;
#[cfg(test)]
mod tests;

pub use device::{MemDevice, MemHandle, ResizeError};
pub use region::{BLOCK, KvmSlots, MemorySlots, Region};
