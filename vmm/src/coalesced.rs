//! Writes to device windows that KVM gathers in a ring instead of leaving KVM_RUN for each: those
//! that only prepare what a later access does, and acknowledgements of interrupts (Documentation/virt/kvm/api.rst,
//! KVM_REGISTER_COALESCED_MMIO). A booting guest makes 110 of them and more, and each exit spared is
//! two changes between KVM and this process.

use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};
use std::{io, ptr};

use kvm_bindings::{KVM_COALESCED_MMIO_PAGE_OFFSET, kvm_coalesced_mmio, kvm_coalesced_mmio_ring};
use kvm_ioctls::{IoEventAddress, VcpuFd, VmFd};

use crate::memory::PAGE_SIZE;

/// Writes that one ring holds (`KVM_COALESCED_MMIO_MAX`); when it is full, KVM exits as ever.
const ENTRIES: u32 =
    ((PAGE_SIZE - size_of::<kvm_coalesced_mmio_ring>()) / size_of::<kvm_coalesced_mmio>()) as u32;

/// Has KVM gather the writes to `length` bytes from `address` on.
///
/// # Errors
/// What KVM_REGISTER_COALESCED_MMIO says.
pub fn gather(vm: &VmFd, address: u64, length: u32) -> Result<(), kvm_ioctls::Error> {
    vm.register_coalesced_mmio(IoEventAddress::Mmio(address), length)
}

/// Has KVM exit again for each write to these bytes, if it doesn't already.
pub fn leave(vm: &VmFd, address: u64, length: u32) {
    // Fails for what isn't registered, and for nothing else.
    let _ = vm.unregister_coalesced_mmio(IoEventAddress::Mmio(address), length);
}

/// A VM's ring of gathered writes. KVM fills it while any vCPU runs; every vCPU thread empties it
/// before it looks at what its own exit is about, so that all accesses take effect in order.
pub struct GatheredWrites {
    page: NonNull<kvm_coalesced_mmio_ring>,
    /// Held by the thread that empties the ring.
    turn: Mutex<()>,
}

// SAFETY: the page is memory shared with KVM, which is read and written by atomic and volatile
// accesses only; what belongs to this side of the ring is only changed under `turn`.
unsafe impl Send for GatheredWrites {}
// SAFETY: as above.
unsafe impl Sync for GatheredWrites {}

impl GatheredWrites {
    /// Maps the ring of the VM that `vcpu` belongs to; each of its vCPUs would do.
    ///
    /// # Errors
    /// What mmap says.
    pub fn map(vcpu: &VcpuFd) -> io::Result<Self> {
        let offset = i64::from(KVM_COALESCED_MMIO_PAGE_OFFSET) * PAGE_SIZE as i64;
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing of ours. KVM
        // keeps the page for as long as it is mapped.
        let page = unsafe {
            libc::mmap(
                ptr::null_mut(),
                PAGE_SIZE,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                vcpu.as_raw_fd(),
                offset,
            )
        };
        if page == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let page = NonNull::new(page.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self {
            page,
            turn: Mutex::new(()),
        })
    }

    /// Hands what has been gathered to `write`, oldest first. When it returns, every write that
    /// KVM had gathered before has taken effect, by this thread or another.
    pub fn drain(&self, mut write: impl FnMut(u64, &[u8])) {
        let (first, last) = (self.first(), self.last());
        // An entry leaves the ring only after its write: an empty ring means that all are done.
        if first.load(Ordering::Acquire) == last.load(Ordering::Acquire) {
            return;
        }
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let mut index = first.load(Ordering::Relaxed);
        // No more than a full ring: a vCPU that goes on writing must not keep this one from its
        // own work, and what it adds from now on is not ours to wait for.
        for _ in 0..ENTRIES {
            if index == last.load(Ordering::Acquire) {
                break;
            }
            let entry = self.entry(index);
            let length = (entry.len as usize).min(entry.data.len());
            write(entry.phys_addr, &entry.data[..length]);
            index = (index + 1) % ENTRIES;
            first.store(index, Ordering::Release);
        }
    }

    fn first(&self) -> &AtomicU32 {
        // SAFETY: the page is mapped for as long as `self` lives, and aligned; both sides only
        // access this word atomically.
        unsafe { AtomicU32::from_ptr(&raw mut (*self.page.as_ptr()).first) }
    }

    fn last(&self) -> &AtomicU32 {
        // SAFETY: as for `first`.
        unsafe { AtomicU32::from_ptr(&raw mut (*self.page.as_ptr()).last) }
    }

    fn entry(&self, index: u32) -> kvm_coalesced_mmio {
        // SAFETY: a place within the page. KVM doesn't write to an entry between `first` and
        // `last`.
        unsafe { ptr::read_volatile(self.place(index)) }
    }

    /// Where entry `index` is: the entries follow the ring's head within its page.
    fn place(&self, index: u32) -> *mut kvm_coalesced_mmio {
        // SAFETY: the head is one element long, and the index is below the number of entries.
        unsafe {
            let entries = self.page.add(1).cast::<kvm_coalesced_mmio>();
            entries.add((index % ENTRIES) as usize).as_ptr()
        }
    }
}

impl Drop for GatheredWrites {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and nothing refers to it any more.
        unsafe { libc::munmap(self.page.as_ptr().cast(), PAGE_SIZE) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A ring in memory of our own, in which the test does KVM's part.
    fn ring() -> GatheredWrites {
        // SAFETY: a new anonymous mapping.
        let page = unsafe {
            libc::mmap(
                ptr::null_mut(),
                PAGE_SIZE,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert_ne!(page, libc::MAP_FAILED);
        GatheredWrites {
            page: NonNull::new(page.cast()).unwrap(),
            turn: Mutex::new(()),
        }
    }

    /// As virt/kvm/coalesced_mmio.c does: false when the ring is full.
    fn gathered(ring: &GatheredWrites, address: u64, data: &[u8]) -> bool {
        let last = ring.last().load(Ordering::Relaxed);
        let next = (last + 1) % ENTRIES;
        if next == ring.first().load(Ordering::Acquire) {
            return false;
        }
        let mut entry = kvm_coalesced_mmio {
            phys_addr: address,
            len: data.len() as u32,
            ..Default::default()
        };
        entry.data[..data.len()].copy_from_slice(data);
        // SAFETY: within the page, and not yet the reader's.
        unsafe { ptr::write_volatile(ring.place(last), entry) };
        ring.last().store(next, Ordering::Release);
        true
    }

    fn drained(ring: &GatheredWrites) -> Vec<(u64, Vec<u8>)> {
        let mut writes = Vec::new();
        ring.drain(|address, data| writes.push((address, data.to_vec())));
        writes
    }

    #[test]
    fn writes_come_out_in_order_and_once() {
        let ring = ring();
        assert_eq!(drained(&ring), []);
        assert!(gathered(&ring, 0xd000_0030, &[1, 0, 0, 0]));
        assert!(gathered(&ring, 0xd000_1080, &[2; 8]));
        let expected = [(0xd000_0030, vec![1, 0, 0, 0]), (0xd000_1080, vec![2; 8])];
        assert_eq!(drained(&ring), expected);
        assert_eq!(drained(&ring), []);
    }

    #[test]
    fn a_full_ring_comes_out_whole_wherever_it_begins() {
        let ring = ring();
        for round in 0..3 {
            let mut put = Vec::new();
            while gathered(&ring, put.len() as u64, &[round]) {
                put.push((put.len() as u64, vec![round]));
            }
            assert_eq!(put.len() as u32, ENTRIES - 1);
            assert_eq!(drained(&ring), put);
        }
    }

    #[test]
    fn a_length_that_cannot_be_is_cut() {
        let ring = ring();
        assert!(gathered(&ring, 1, &[7; 8]));
        // SAFETY: as in `gathered`.
        unsafe { (*ring.place(0)).len = u32::MAX };
        assert_eq!(drained(&ring), [(1, vec![7; 8])]);
    }

    #[test]
    fn an_empty_ring_means_that_all_writes_are_done() {
        let ring = ring();
        let done = std::sync::atomic::AtomicU32::new(0);
        for round in 1..=200 {
            assert!(gathered(&ring, 0, &[0]));
            std::thread::scope(|scope| {
                for _ in 0..2 {
                    scope.spawn(|| {
                        ring.drain(|_, _| {
                            std::thread::yield_now();
                            done.fetch_add(1, Ordering::Relaxed);
                        });
                        assert_eq!(done.load(Ordering::Relaxed), round);
                    });
                }
            });
        }
    }
}
