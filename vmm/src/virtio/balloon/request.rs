//! Which pages a request is about.

use super::super::buffers::{Buffers, ChainError};
use crate::memory::PAGE_SIZE;
use vm_memory::volatile_memory::VolatileSlice;
use vm_memory::{GuestAddress, GuestMemory, GuestMemoryMmap};

/// Page numbers looked at in one request; Linux sends up to 256 (VIRTIO_BALLOON_ARRAY_PFNS_MAX).
/// Those beyond it stay with the guest, as they may.
pub const MAX_PAGE_NUMBERS: usize = 256;
/// A page number on the wire: 32 bits, little-endian (§5.5.6).
const NUMBER_SIZE: usize = size_of::<u32>();

/// The pages that the driver has put into the balloon: an array of their numbers in what the
/// device reads. Consecutive ones are joined.
///
/// # Errors
/// When a page is not in guest memory.
pub fn inflated<'m>(
    buffers: &Buffers,
    mem: &'m GuestMemoryMmap,
) -> Result<Vec<VolatileSlice<'m>>, ChainError> {
    let mut bytes = [0; MAX_PAGE_NUMBERS * NUMBER_SIZE];
    let read = buffers.readable.read(mem, &mut bytes);
    let mut runs: Vec<(u64, usize)> = Vec::new();
    for number in bytes[..read].as_chunks::<NUMBER_SIZE>().0 {
        // Can't overflow: 32 bits of number and 12 of offset.
        let address = u64::from(u32::from_le_bytes(*number)) * PAGE_SIZE as u64;
        match runs.last_mut() {
            Some((start, len)) if *start + *len as u64 == address => *len += PAGE_SIZE,
            _ => runs.push((address, PAGE_SIZE)),
        }
    }
    runs.into_iter()
        .map(|(address, len)| {
            mem.get_slice(GuestAddress(address), len)
                .map_err(|_| ChainError::OutsideMemory {
                    head: buffers.head,
                    address,
                    // At most MAX_PAGE_NUMBERS pages.
                    len: len as u32,
                })
        })
        .collect()
}

/// The free memory that the driver reports: the buffers themselves, as the device may write them
/// (§5.5.6.7). What it may only read is none of it.
pub fn reported<'m>(buffers: &Buffers, mem: &'m GuestMemoryMmap) -> Vec<VolatileSlice<'m>> {
    buffers.writable.slices(mem).into_vec()
}
