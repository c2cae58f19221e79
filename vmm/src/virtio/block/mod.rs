//! virtio-blk (virtio 1.3 §5.2) over a raw file or block device.
//!
//! A slot is placed when the machine is built and may get its backing later, once
//! ([`BlockHandle::set_backing`]). The format is raw by definition: nothing of the guest's bytes is
//! ever looked at.

mod backend;
mod device;
mod request;
#[cfg(test)]
mod tests;

pub use backend::{Backing, BackingError};
pub use device::{BlockDevice, BlockHandle, SetBackingError};

/// Bytes of a sector, the unit of addresses whatever the block size (§5.2.4).
pub const SECTOR: u64 = 512;
