//! Guest memory: private mappings, so that a clone of a template can share every page it has not
//! written.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use thiserror::Error;
use vm_memory::mmap::FromRangesError;
use vm_memory::volatile_memory::VolatileSlice;
use vm_memory::{
    GuestAddress, GuestMemory, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap, MmapRegion,
};

use crate::arch::x86_64::layout;

/// Size of a page in bytes, the guest's and the host's.
pub const PAGE_SIZE: usize = 4096;

/// Guest memory could not be had.
#[derive(Debug, Error)]
#[error(
    "mapping {bytes} bytes of guest memory: {source}; give the sandbox less memory, or less to grow \
     to, or the host more"
)]
pub struct MemoryError {
    /// How much was asked for.
    bytes: u64,
    /// What mmap said.
    #[source]
    source: FromRangesError,
}

/// All memory that a guest has or may get.
#[derive(Debug, Clone)]
pub struct Memory {
    /// What it boots with, and what a template holds.
    pub boot: GuestMemoryMmap,
    /// The same and the region for what is plugged, wherever in it there is any. This is what
    /// devices resolve addresses in: what a guest has them write to blocks that it hasn't plugged
    /// takes memory from the host, though never more than the region has.
    pub whole: GuestMemoryMmap,
    /// That region.
    pub hotplug: Option<Arc<GuestRegionMmap>>,
}

impl Memory {
    /// Maps memory for a guest that boots with `bytes` bytes and may get `hotplug` bytes more, for
    /// which only addresses are taken.
    ///
    /// # Errors
    /// When a mapping fails.
    pub fn allocate(bytes: u64, hotplug: u64) -> Result<Self, MemoryError> {
        let boot = allocate(bytes)?;
        let hotplug = match hotplug {
            0 => None,
            _ => Some(reserve(layout::hotplug_start(bytes), hotplug)?),
        };
        let whole = match &hotplug {
            None => boot.clone(),
            Some(region) => {
                boot.insert_region(Arc::clone(region))
                    .map_err(|error| MemoryError {
                        bytes: region.len(),
                        source: error.into(),
                    })?
            }
        };
        Ok(Self {
            boot,
            whole,
            hotplug,
        })
    }

    /// Guest-physical addresses of the region for what is plugged; empty if there is none.
    pub fn hotplug_range(&self) -> Range<u64> {
        self.hotplug.as_ref().map_or(0..0, |region| {
            let start = region.start_addr().0;
            // Can't overflow: it was checked when the region was made.
            start..start + region.len()
        })
    }
}

/// Reserves `bytes` bytes of addresses, without swap or memory behind them (MAP_NORESERVE) until
/// they are written.
fn reserve(start: GuestAddress, bytes: u64) -> Result<Arc<GuestRegionMmap>, MemoryError> {
    let failed = |source| MemoryError { bytes, source };
    let size = usize::try_from(bytes).unwrap_or(usize::MAX);
    let mapping = MmapRegion::new(size).map_err(|error| failed(error.into()))?;
    GuestRegionMmap::new(mapping, start)
        .map(Arc::new)
        .ok_or_else(|| failed(FromRangesError::InvalidGuestRegion))
}

/// Maps `bytes` bytes of zeroed guest memory as [`layout`] places them. Pages are taken from the
/// host when they are first touched.
///
/// # Errors
/// When the mapping fails.
pub fn allocate(bytes: u64) -> Result<GuestMemoryMmap, MemoryError> {
    GuestMemoryMmap::from_ranges(&layout::ram_ranges(bytes))
        .map_err(|source| MemoryError { bytes, source })
}

/// The first of KVM's slots for memory that is plugged. Those before it are for what a guest boots
/// with, which is in one or two pieces.
pub const FIRST_HOTPLUG_SLOT: u32 = 8;

/// Gives `memory` to the VM, one slot for each range.
///
/// # Errors
/// What KVM_SET_USER_MEMORY_REGION says.
pub fn register(vm: &VmFd, memory: &GuestMemoryMmap) -> Result<(), kvm_ioctls::Error> {
    for (slot, region) in memory.iter().enumerate() {
        debug_assert!((slot as u32) < FIRST_HOTPLUG_SLOT);
        let region = kvm_userspace_memory_region {
            slot: slot as u32,
            flags: 0,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: the range is a mapping owned by `memory`. Callers keep that alive for as long as
        // the VM runs: `Machine` drops its vCPUs first, the probe owns both in one scope.
        unsafe { vm.set_user_memory_region(region)? };
    }
    Ok(())
}

/// Gives the host back the whole pages within `slice`, which is a piece of guest memory. The guest
/// sees zeros there afterwards, or in a clone what its template had there. Less than a page is left
/// alone.
///
/// # Errors
/// What madvise(2) says; some of the pages may have been given back.
pub fn discard(slice: &VolatileSlice) -> io::Result<()> {
    let guard = slice.ptr_guard_mut();
    let start = guard.as_ptr();
    let skipped = start.align_offset(PAGE_SIZE);
    let Some(len) = slice.len().checked_sub(skipped) else {
        return Ok(());
    };
    let len = len - len % PAGE_SIZE;
    if len == 0 {
        return Ok(());
    }
    // SAFETY: the range lies in the slice, hence in a mapping that outlives it. The process has no
    // references into guest memory, whose bytes may change at any time, as they do now.
    let result = unsafe { libc::madvise(start.add(skipped).cast(), len, libc::MADV_DONTNEED) };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
