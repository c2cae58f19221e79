//! Which blocks of the region are plugged, and what of it KVM and the host's memory know.

use super::request::{Blocks, State};
use crate::memory;
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use vm_memory::{GuestMemoryRegion, GuestRegionMmap, MemoryRegionAddress};

/// Size of a block in bytes.
pub const BLOCK: u64 = (bulkhead_proto::vmm::HOTPLUG_BLOCK_MIB as u64) << 20;

/// Least size of a slot in bytes: Linux adds memory in pieces of so much (a section on x86-64).
const LEAST_SLOT: u64 = 128 << 20;

/// Most slots of a region. KVM allows some hundreds at least, and each takes the host a moment.
const MOST_SLOTS: u64 = 256;

/// What can make a part of the region the guest's memory.
pub trait MemorySlots: std::fmt::Debug + Send {
    /// Has the guest's accesses to the bytes at `range` of the region reach memory, as slot number
    /// `index` of the region's.
    ///
    /// # Errors
    /// When it can't be had; nothing has changed then.
    fn map(&mut self, index: usize, range: Range<u64>) -> io::Result<()>;

    /// Takes slot `index` away again.
    ///
    /// # Errors
    /// When it stays.
    fn unmap(&mut self, index: usize, range: Range<u64>) -> io::Result<()>;
}

/// KVM's memory slots.
pub struct KvmSlots {
    vm: Arc<VmFd>,
    memory: Arc<GuestRegionMmap>,
}

impl std::fmt::Debug for KvmSlots {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.debug_struct("KvmSlots").finish_non_exhaustive()
    }
}

impl KvmSlots {
    /// Slots of `vm` over `memory`.
    pub fn new(vm: Arc<VmFd>, memory: Arc<GuestRegionMmap>) -> Self {
        Self { vm, memory }
    }

    /// A slot without length is deleted.
    fn set(&self, index: usize, range: &Range<u64>, bytes: u64) -> io::Result<()> {
        let outside = |_| io::Error::from(io::ErrorKind::InvalidInput);
        let offset = usize::try_from(range.start).map_err(outside)?;
        let slice = self
            .memory
            .get_slice(
                MemoryRegionAddress(range.start),
                usize::try_from(range.end - range.start).map_err(outside)?,
            )
            .map_err(io::Error::other)?;
        debug_assert!(offset.is_multiple_of(memory::PAGE_SIZE));
        let region = kvm_userspace_memory_region {
            slot: memory::FIRST_HOTPLUG_SLOT + u32::try_from(index).map_err(outside)?,
            flags: 0,
            guest_phys_addr: self.memory.start_addr().0 + range.start,
            memory_size: bytes,
            userspace_addr: slice.ptr_guard_mut().as_ptr() as u64,
        };
        // SAFETY: the range lies in the region's mapping, which lives as long as the VM runs: the
        // `Machine` drops its vCPUs first and its memory, which the region is a part of, last.
        unsafe { self.vm.set_user_memory_region(region) }
            .map_err(|error| io::Error::from_raw_os_error(error.errno()))
    }
}

impl MemorySlots for KvmSlots {
    fn map(&mut self, index: usize, range: Range<u64>) -> io::Result<()> {
        self.set(index, &range, range.end - range.start)
    }

    fn unmap(&mut self, index: usize, range: Range<u64>) -> io::Result<()> {
        self.set(index, &range, 0)
    }
}

/// Blocks that can't be named or plugged.
#[derive(Debug)]
pub enum PlugError {
    /// None, not aligned, beyond the region, or in the other state already.
    Invalid,
    /// KVM has no slot for them now.
    NoSlot(io::Error),
}

/// What has a slot of its own, or none.
#[derive(Debug, Clone, Copy, Default)]
struct Part {
    /// How many of its blocks are plugged.
    plugged: u32,
    /// KVM knows of it.
    mapped: bool,
}

/// The region that the device manages.
#[derive(Debug)]
pub struct Region {
    memory: Arc<GuestRegionMmap>,
    slots: Box<dyn MemorySlots>,
    slot_bytes: u64,
    /// For each block, whether it is plugged.
    plugged: Vec<bool>,
    parts: Vec<Part>,
    /// The host has refused to take pages, and the log tells.
    refused: bool,
}

impl Region {
    /// Nothing of `memory` is plugged yet. A piece of less than a block at its end never is.
    pub fn new(memory: Arc<GuestRegionMmap>, slots: Box<dyn MemorySlots>) -> Self {
        let bytes = memory.len();
        // At most 4 GiB for a region of a TiB, so nothing overflows.
        let slot_bytes = LEAST_SLOT.max(bytes.div_ceil(MOST_SLOTS).next_multiple_of(LEAST_SLOT));
        Self {
            plugged: vec![false; (bytes / BLOCK) as usize],
            parts: vec![Part::default(); bytes.div_ceil(slot_bytes) as usize],
            memory,
            slots,
            slot_bytes,
            refused: false,
        }
    }

    /// Guest-physical address of the first block.
    pub fn start(&self) -> u64 {
        self.memory.start_addr().0
    }

    /// Length in bytes.
    pub fn bytes(&self) -> u64 {
        self.plugged.len() as u64 * BLOCK
    }

    /// Which blocks these are: at least one, and all in the region (§5.15.6.2 and the following).
    fn indices(&self, blocks: Blocks) -> Option<Range<usize>> {
        let offset = blocks.address.checked_sub(self.start())?;
        if blocks.count == 0 || !offset.is_multiple_of(BLOCK) {
            return None;
        }
        let first = usize::try_from(offset / BLOCK).ok()?;
        let end = first.checked_add(usize::from(blocks.count))?;
        (end <= self.plugged.len()).then_some(first..end)
    }

    /// Whether the blocks are plugged.
    pub fn state(&self, blocks: Blocks) -> Option<State> {
        let blocks = self.plugged.get(self.indices(blocks)?)?;
        let plugged = blocks.iter().filter(|plugged| **plugged).count();
        Some(match plugged {
            0 => State::Unplugged,
            all if all == blocks.len() => State::Plugged,
            _ => State::Mixed,
        })
    }

    /// Plugs blocks of which none is plugged.
    ///
    /// # Errors
    /// [`PlugError`]; nothing has changed then.
    pub fn plug(&mut self, blocks: Blocks) -> Result<(), PlugError> {
        let blocks = match (self.state(blocks), self.indices(blocks)) {
            (Some(State::Unplugged), Some(indices)) => indices,
            _ => return Err(PlugError::Invalid),
        };
        let slots = self.slots_of(&blocks);
        for slot in slots.clone() {
            if self.parts[slot].mapped {
                continue;
            }
            if let Err(error) = self.slots.map(slot, self.slot_range(slot)) {
                for mapped in slots.start..slot {
                    self.unmap_if_empty(mapped);
                }
                return Err(PlugError::NoSlot(error));
            }
            self.parts[slot].mapped = true;
        }
        for index in blocks {
            self.plugged[index] = true;
            let slot = self.slot_of(index);
            self.parts[slot].plugged += 1;
        }
        Ok(())
    }

    /// Unplugs blocks of which all are plugged, and gives their memory to the host.
    ///
    /// # Errors
    /// [`PlugError::Invalid`]; nothing has changed then.
    pub fn unplug(&mut self, blocks: Blocks) -> Result<(), PlugError> {
        match (self.state(blocks), self.indices(blocks)) {
            (Some(State::Plugged), Some(indices)) => {
                self.take_away(indices);
                Ok(())
            }
            _ => Err(PlugError::Invalid),
        }
    }

    /// Unplugs all blocks that are plugged.
    pub fn unplug_all(&mut self) {
        self.take_away(0..self.plugged.len());
    }

    fn take_away(&mut self, blocks: Range<usize>) {
        if blocks.is_empty() {
            return;
        }
        let slots = self.slots_of(&blocks);
        for index in blocks.clone() {
            let slot = self.slot_of(index);
            let plugged = std::mem::take(&mut self.plugged[index]);
            self.parts[slot].plugged -= u32::from(plugged);
        }
        // First, so that the guest can't touch again what is given back after it.
        for slot in slots.clone() {
            self.unmap_if_empty(slot);
        }
        // All of an empty slot: the guest may have used blocks of it that it had not plugged.
        let from = if self.parts[slots.start].plugged == 0 {
            self.slot_range(slots.start).start
        } else {
            blocks.start as u64 * BLOCK
        };
        let to = if self.parts[slots.end - 1].plugged == 0 {
            self.slot_range(slots.end - 1).end
        } else {
            blocks.end as u64 * BLOCK
        };
        self.give_back(from..to);
    }

    /// Takes a slot away in which nothing is plugged.
    fn unmap_if_empty(&mut self, slot: usize) {
        let Part { plugged, mapped } = self.parts[slot];
        if plugged > 0 || !mapped {
            return;
        }
        match self.slots.unmap(slot, self.slot_range(slot)) {
            Ok(()) => self.parts[slot].mapped = false,
            Err(error) => tracing::warn!(
                "taking {} bytes of guest memory out of KVM failed: {error}",
                self.slot_bytes
            ),
        }
    }

    /// Gives pages to the host. Those that it doesn't take stay the VM's.
    fn give_back(&mut self, range: Range<u64>) {
        let slice = self.memory.get_slice(
            MemoryRegionAddress(range.start),
            (range.end - range.start) as usize,
        );
        let result = slice
            .map_err(io::Error::other)
            .and_then(|slice| memory::discard(&slice));
        if let Err(error) = result
            && !self.refused
        {
            self.refused = true;
            tracing::warn!(
                "giving unplugged guest memory back to the host failed: {error}; the VM keeps what \
                 the host refuses"
            );
        }
    }

    fn slot_of(&self, block: usize) -> usize {
        (block as u64 * BLOCK / self.slot_bytes) as usize
    }

    /// Of at least one block.
    fn slots_of(&self, blocks: &Range<usize>) -> Range<usize> {
        self.slot_of(blocks.start)..self.slot_of(blocks.end - 1) + 1
    }

    fn slot_range(&self, slot: usize) -> Range<u64> {
        let start = slot as u64 * self.slot_bytes;
        start..(start + self.slot_bytes).min(self.memory.len())
    }
}
