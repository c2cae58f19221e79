//! Page faults ahead of time.
//!
//! A guest whose kernel is emulated pays some thousand instructions for each page that is touched
//! for the first time, or for the first time after a fork. What is touched before the machine is
//! saved costs its clones nothing.

use std::io::Read;

/// Most of /proc/self/maps that is read; the agent has some twenty mappings.
const MAX_MAPS: u64 = 64 * 1024;

/// How much of the stack is in use at the deepest, with room to spare.
const STACK: usize = 48 * 1024;

/// Heap that is kept at hand for requests, specs and buffers.
const HEAP: usize = 192 * 1024;

/// The C library gives free memory back to the kernel only above this.
const TRIM_ABOVE: libc::c_int = 1024 * 1024;

/// Grows the heap to what requests need.
pub fn heap() {
    // SAFETY: changes a number in the allocator.
    unsafe { libc::mallopt(libc::M_TRIM_THRESHOLD, TRIM_ABOVE) };
    // In parts, since large ones aren't taken from the heap.
    let parts: Vec<Vec<u8>> = (0..HEAP / 65_536)
        .map(|_| {
            let mut part = vec![0; 65_536];
            touch(&mut part);
            part
        })
        .collect();
    drop(std::hint::black_box(parts));
}

/// Touches every page of `memory`.
pub fn touch(memory: &mut [u8]) {
    for byte in memory.iter_mut().step_by(4096) {
        // SAFETY: a write to a byte of an exclusively borrowed slice; volatile so that it happens.
        unsafe { std::ptr::write_volatile(byte, 0) };
    }
}

/// Maps every page of the program that can be read, and makes every page that can be written the
/// calling process's own. What can't be done ahead is done when it is needed, so errors are of no
/// interest.
pub fn memory() {
    let mut maps = String::new();
    let read = std::fs::File::open("/proc/self/maps")
        .and_then(|file| file.take(MAX_MAPS).read_to_string(&mut maps));
    if read.is_err() {
        return;
    }
    for mapping in maps.lines().filter_map(Mapping::parse) {
        mapping.populate();
    }
}

#[derive(Debug, PartialEq, Eq)]
struct Mapping {
    start: usize,
    end: usize,
    writable: bool,
}

impl Mapping {
    /// A line of proc_pid_maps(5); `None` for what isn't ordinary, readable, private memory.
    fn parse(line: &str) -> Option<Self> {
        let mut fields = line.split_ascii_whitespace();
        let (start, end) = fields.next()?.split_once('-')?;
        let access = fields.next()?.as_bytes();
        let name = fields.nth(3).unwrap_or_default();
        let ordinary = !name.starts_with('[') || matches!(name, "[heap]" | "[stack]");
        if access.first() != Some(&b'r') || access.get(3) != Some(&b'p') || !ordinary {
            return None;
        }
        let address = |text| usize::from_str_radix(text, 16).ok();
        let (start, end) = (address(start)?, address(end)?);
        let start = match name {
            "[stack]" => start.max(end.saturating_sub(STACK)),
            _ => start,
        };
        Some(Self {
            start,
            end,
            writable: access.get(1) == Some(&b'w'),
        })
    }

    fn populate(&self) {
        let how = match self.writable {
            true => libc::MADV_POPULATE_WRITE,
            false => libc::MADV_POPULATE_READ,
        };
        // SAFETY: neither advice changes what is in the memory.
        unsafe {
            libc::madvise(
                std::ptr::with_exposed_provenance_mut(self.start),
                self.end.saturating_sub(self.start),
                how,
            )
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn reads_the_kernels_lines() {
        let line = "00400000-0066b000 r-xp 00001000 fe:00 42                         /sbin/agent";
        assert_eq!(
            Mapping::parse(line),
            Some(Mapping {
                start: 0x40_0000,
                end: 0x66_b000,
                writable: false
            })
        );
        let line = "7ffc00000000-7ffc00021000 rw-p 00000000 00:00 0                  [stack]";
        let stack = Mapping::parse(line).expect("the stack");
        assert_eq!(stack.end - stack.start, STACK);
        for line in [
            "7ffd1000-7ffd2000 r--p 00000000 00:00 0                              [vvar]",
            "00400000-0066b000 ---p 00001000 fe:00 42 /x",
            "00400000-0066b000 rw-s 00001000 fe:00 42 /x",
            "nonsense",
        ] {
            assert_eq!(Mapping::parse(line), None, "{line}");
        }
    }

    #[test]
    fn leaves_memory_as_it_is() {
        let before = vec![3_u8; 300_000];
        memory();
        heap();
        assert!(before.iter().all(|byte| *byte == 3));
    }

    proptest! {
        #[test]
        fn never_panics(line: String) {
            let _ = Mapping::parse(&line);
        }
    }
}
