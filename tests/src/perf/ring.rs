//! The kernel's ring buffer of an event that is sampled (perf_event_open(2), "MMAP layout").

use crate::error::{Context, Result};
use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering};

const PAGE: usize = 4096;
/// Offsets in `struct perf_event_mmap_page`.
const DATA_HEAD: usize = 1024;
const DATA_TAIL: usize = 1032;

/// `struct perf_event_header` and what follows it.
pub(super) struct Record<'a> {
    /// PERF_RECORD_*.
    pub kind: u32,
    /// PERF_RECORD_MISC_*.
    pub misc: u16,
    /// Without the header.
    pub body: &'a [u8],
}

/// The ring buffer of one event on one CPU.
#[derive(Debug)]
pub(super) struct Ring {
    event: File,
    base: *mut u8,
    data_bytes: usize,
}

// SAFETY: the mapping belongs to this value alone and is only accessed through `&self` or `&mut
// self` of whatever thread holds it; nothing in it depends on the thread.
unsafe impl Send for Ring {}

impl Ring {
    /// Maps `pages` data pages, a power of two.
    pub fn map(event: File, pages: usize) -> Result<Self> {
        let data_bytes = pages * PAGE;
        // SAFETY: a new shared mapping of the event's buffer, at an address the kernel chooses.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                data_bytes + PAGE,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                event.as_raw_fd(),
                0,
            )
        };
        if base == libc::MAP_FAILED {
            let cause: std::result::Result<Self, _> = Err(std::io::Error::last_os_error());
            return cause.context(|| "map the samples' buffer".into());
        }
        Ok(Self {
            event,
            base: base.cast(),
            data_bytes,
        })
    }

    /// For poll(2).
    pub fn descriptor(&self) -> RawFd {
        self.event.as_raw_fd()
    }

    fn position(&self, offset: usize) -> &AtomicU64 {
        // SAFETY: DATA_HEAD and DATA_TAIL are aligned 64-bit fields within the mapping's first
        // page, which lives as long as `self`; the kernel accesses them atomically too.
        unsafe { &*self.base.add(offset).cast::<AtomicU64>() }
    }

    fn byte(&self, position: u64) -> u8 {
        let index = (position as usize) % self.data_bytes;
        // SAFETY: the index is within the data pages that follow the first page of the mapping.
        unsafe { self.base.add(PAGE + index).read_volatile() }
    }

    fn bytes(&self, from: u64, count: u64) -> Vec<u8> {
        (from..from + count)
            .map(|position| self.byte(position))
            .collect()
    }

    /// Hands over the records that have come since the last call.
    pub fn drain(&self, mut take: impl FnMut(Record<'_>)) {
        let head = self.position(DATA_HEAD).load(Ordering::Acquire);
        let mut tail = self.position(DATA_TAIL).load(Ordering::Relaxed);
        while tail + 8 <= head {
            // u32 type, u16 misc, u16 size.
            let header = self.bytes(tail, 8);
            let kind = u32::from_ne_bytes([header[0], header[1], header[2], header[3]]);
            let misc = u16::from_ne_bytes([header[4], header[5]]);
            let size = u64::from(u16::from_ne_bytes([header[6], header[7]])).max(8);
            let body = self.bytes(tail + 8, size - 8);
            take(Record {
                kind,
                misc,
                body: &body,
            });
            tail += size;
        }
        self.position(DATA_TAIL)
            .store(tail.min(head), Ordering::Release);
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `map` with this size and is used by nobody any more.
        unsafe { libc::munmap(self.base.cast(), self.data_bytes + PAGE) };
    }
}
