//! The memory file: the guest's pages that are not all zeros, packed, and the map that says where
//! they belong.
//!
//! Packed rather than sparse: every byte of the file is covered by a checksum, none of it is a
//! hole whose contents nobody looks at, and what was zero stays anonymous memory, which costs
//! neither page cache nor a copy when it is first written.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde::{Deserialize, Serialize};
use thiserror::Error;
use vm_memory::{
    Address, GuestAddress, GuestMemory, GuestMemoryMmap, GuestMemoryRegion, MemoryRegionAddress,
};

use super::format::checksum;

/// Size of a page in bytes, the guest's and the host's.
const PAGE: usize = 4096;
/// Pages of the largest extent, 256 KiB of them: what is read stays in a processor's own cache
/// until its checksum is made. Memory is also written in pieces of so many.
const EXTENT_PAGES: usize = 64;
/// Up to so many zero pages between others are written along with them: fewer mappings are worth
/// a little more file.
const GAP_PAGES: usize = 8;

/// Which guest pages the memory file holds.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryMap {
    /// In ascending order in guest memory; in the file each begins where the last one ended.
    extents: Vec<Extent>,
}

/// Consecutive guest pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Extent {
    /// Number of the first page.
    page: u64,
    /// How many, at most [`EXTENT_PAGES`].
    pages: u32,
    /// Of the pages' contents.
    checksum: u64,
}

impl Extent {
    fn bytes(&self) -> u64 {
        u64::from(self.pages) * PAGE as u64
    }

    fn end(&self) -> Option<u64> {
        self.page.checked_add(u64::from(self.pages))
    }
}

/// Why a memory file can't be used.
#[derive(Debug, Error)]
pub enum MemoryFileError {
    /// The map is not one that a VMM writes.
    #[error("the memory map is impossible: extent {index} {why}")]
    Map {
        /// Which extent.
        index: usize,
        /// What is impossible.
        why: &'static str,
    },
    /// Truncated, extended or another machine's.
    #[error("the memory file has {found} bytes, the state file says {said}")]
    Length {
        /// Its length.
        found: u64,
        /// What it should be.
        said: u64,
    },
    /// Its contents were changed.
    #[error(
        "the memory file is damaged: the {bytes} bytes from {offset:#x} on have the checksum \
         {found:016x}, the state file says {said:016x}"
    )]
    Checksum {
        /// Where the extent begins in the file.
        offset: u64,
        /// Its length.
        bytes: u64,
        /// As computed.
        found: u64,
        /// As saved.
        said: u64,
    },
    /// The file can't be read or mapped.
    #[error("{what} the memory file: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// Its error.
        #[source]
        source: io::Error,
    },
}

fn failed(what: &'static str) -> impl FnOnce(io::Error) -> MemoryFileError {
    move |source| MemoryFileError::Io { what, source }
}

impl MemoryMap {
    /// Writes guest memory, which nobody changes meanwhile, to `file`, which is empty.
    ///
    /// # Errors
    /// When writing fails; the file holds a part then.
    pub fn write(memory: &GuestMemoryMmap, file: &mut File) -> io::Result<Self> {
        let mut map = Self::default();
        let mut buffer = vec![0; EXTENT_PAGES * PAGE];
        for region in memory.iter() {
            let first_page = region.start_addr().raw_value() / PAGE as u64;
            let mut offset = 0;
            while offset < region.len() {
                let len = buffer.len().min((region.len() - offset) as usize);
                let piece = &mut buffer[..len];
                region
                    .get_slice(MemoryRegionAddress(offset), len)
                    .map_err(io::Error::other)?
                    .copy_to(piece);
                map.append(piece, first_page + offset / PAGE as u64, file)?;
                offset += len as u64;
            }
        }
        Ok(map)
    }

    /// Writes what is not zero of `piece`, which begins at guest page `first`.
    fn append(&mut self, piece: &[u8], first: u64, file: &mut File) -> io::Result<()> {
        for (start, end) in runs(piece) {
            let bytes = &piece[start * PAGE..end * PAGE];
            file.write_all(bytes)?;
            self.extents.push(Extent {
                page: first + start as u64,
                pages: (end - start) as u32,
                checksum: checksum(bytes),
            });
        }
        Ok(())
    }

    /// Length of the memory file in bytes.
    pub fn file_bytes(&self) -> u64 {
        self.extents.iter().map(Extent::bytes).sum()
    }

    /// Maps `file` privately over `memory`, which is fresh: all zeros, and given to no VM yet.
    ///
    /// # Errors
    /// When the map doesn't fit the memory or the file; nothing is checked of what is in the file.
    pub fn map(&self, memory: &GuestMemoryMmap, file: &File) -> Result<(), MemoryFileError> {
        self.check(memory)?;
        let found = file.metadata().map_err(failed("looking at"))?.len();
        let said = self.file_bytes();
        if found != said {
            return Err(MemoryFileError::Length { found, said });
        }
        let mut offset = 0;
        for extent in self.merged() {
            map_extent(memory, file, &extent, offset)?;
            offset += extent.bytes();
        }
        Ok(())
    }

    /// Reads `file` and compares it with the checksums, together with all other threads that do so
    /// with the same `progress`: each takes the next extent that nobody has taken. All of the file
    /// is as it was saved once all of them have returned without an error.
    ///
    /// # Errors
    /// The first extent that differs of those that this thread has looked at.
    pub fn verify(&self, file: &File, progress: &Progress) -> Result<(), MemoryFileError> {
        let mut buffer = vec![0; EXTENT_PAGES * PAGE];
        let mut taken = progress.take();
        let mut offset: u64 = 0;
        for (index, extent) in self.extents.iter().enumerate() {
            let bytes = extent.bytes();
            if index == taken {
                let piece = buffer
                    .get_mut(..bytes as usize)
                    .ok_or(MemoryFileError::Map {
                        index,
                        why: "is too long",
                    })?;
                verify_extent(file, offset, piece, extent.checksum)?;
                taken = progress.take();
            }
            // A map that nobody has checked can name more than a file can hold.
            offset = offset.saturating_add(bytes);
        }
        Ok(())
    }

    /// Extents in order, none empty or too long, all within one region of guest memory.
    fn check(&self, memory: &GuestMemoryMmap) -> Result<(), MemoryFileError> {
        let mut free_from = 0;
        for (index, extent) in self.extents.iter().enumerate() {
            let refuse = |why| MemoryFileError::Map { index, why };
            if extent.pages == 0 || extent.pages as usize > EXTENT_PAGES {
                return Err(refuse("is empty or too long"));
            }
            if extent.page < free_from {
                return Err(refuse("overlaps the one before"));
            }
            let end = extent.end().ok_or(refuse("ends beyond all memory"))?;
            let address = extent
                .page
                .checked_mul(PAGE as u64)
                .ok_or(refuse("begins beyond all memory"))?;
            if memory
                .get_slice(GuestAddress(address), extent.bytes() as usize)
                .is_err()
            {
                return Err(refuse("does not lie in guest memory"));
            }
            free_from = end;
        }
        Ok(())
    }

    /// Extents as they are mapped: neighbours within one region are one. A region ends where guest
    /// memory has a hole, so neighbours never lie in two.
    fn merged(&self) -> Vec<Extent> {
        let mut merged: Vec<Extent> = Vec::new();
        for extent in &self.extents {
            match merged.last_mut() {
                Some(last) if last.end() == Some(extent.page) => {
                    last.pages = last.pages.saturating_add(extent.pages);
                }
                _ => merged.push(*extent),
            }
        }
        merged
    }
}

/// Which extent of a memory file is to be checked next.
#[derive(Debug, Default)]
pub struct Progress(AtomicUsize);

impl Progress {
    fn take(&self) -> usize {
        self.0.fetch_add(1, Ordering::Relaxed)
    }
}

/// Fills `piece` from `file` and compares it.
fn verify_extent(
    file: &File,
    offset: u64,
    piece: &mut [u8],
    said: u64,
) -> Result<(), MemoryFileError> {
    file.read_exact_at(piece, offset)
        .map_err(failed("reading"))?;
    let found = checksum(piece);
    if found == said {
        return Ok(());
    }
    Err(MemoryFileError::Checksum {
        offset,
        bytes: piece.len() as u64,
        found,
        said,
    })
}

fn map_extent(
    memory: &GuestMemoryMmap,
    file: &File,
    extent: &Extent,
    offset: u64,
) -> Result<(), MemoryFileError> {
    let outside = MemoryFileError::Map {
        index: 0,
        why: "does not lie in guest memory",
    };
    let Some(address) = extent.page.checked_mul(PAGE as u64) else {
        return Err(outside);
    };
    let Ok(slice) = memory.get_slice(GuestAddress(address), extent.bytes() as usize) else {
        return Err(outside);
    };
    let Ok(offset) = libc::off_t::try_from(offset) else {
        return Err(outside);
    };
    // SAFETY: the range is whole pages of a mapping that `memory` owns, is replaced by one of the
    // same length and rights, and is unmapped with the rest of it. Nothing refers into it yet.
    let mapped = unsafe {
        libc::mmap(
            slice.ptr_guard_mut().as_ptr().cast(),
            slice.len(),
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE,
            file.as_raw_fd(),
            offset,
        )
    };
    if mapped == libc::MAP_FAILED {
        return Err(failed("mapping")(io::Error::last_os_error()));
    }
    Ok(())
}

/// Runs (first page, page behind the last) of `piece` that are worth writing.
fn runs(piece: &[u8]) -> Vec<(usize, usize)> {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for (index, page) in piece.chunks(PAGE).enumerate() {
        if is_zero(page) {
            continue;
        }
        match runs.last_mut() {
            Some((_, end)) if index - *end <= GAP_PAGES => *end = index + 1,
            _ => runs.push((index, index + 1)),
        }
    }
    runs
}

fn is_zero(page: &[u8]) -> bool {
    // SAFETY: every bit pattern is a u128.
    let (head, words, tail) = unsafe { page.align_to::<u128>() };
    head.iter().all(|byte| *byte == 0)
        && words.iter().all(|word| *word == 0)
        && tail.iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use vm_memory::Bytes;

    /// Two regions with a hole between them, as a large guest has.
    fn memory() -> GuestMemoryMmap {
        let ranges = [
            (GuestAddress(0), 150 * PAGE),
            (GuestAddress(0x10_0000), 20 * PAGE),
        ];
        GuestMemoryMmap::from_ranges(&ranges).unwrap()
    }

    /// Guest memory with a byte in each of these pages.
    fn filled(pages: &[(u64, u8)]) -> GuestMemoryMmap {
        let memory = memory();
        for &(page, value) in pages {
            let base = if page < 150 {
                0
            } else {
                0x10_0000 - 150 * PAGE as u64
            };
            let address = GuestAddress(base + page * PAGE as u64 + u64::from(value));
            memory.write_obj(value, address).unwrap();
        }
        memory
    }

    fn contents(memory: &GuestMemoryMmap) -> Vec<u8> {
        let mut all = Vec::new();
        for region in memory.iter() {
            let mut bytes = vec![0; region.len() as usize];
            memory.read_slice(&mut bytes, region.start_addr()).unwrap();
            all.extend(bytes);
        }
        all
    }

    fn written(memory: &GuestMemoryMmap) -> (MemoryMap, File) {
        let mut file = tempfile::tempfile().unwrap();
        let map = MemoryMap::write(memory, &mut file).unwrap();
        (map, file)
    }

    #[test]
    fn small_gaps_are_written_and_large_ones_are_not() {
        let page = |filled: &[usize], count| {
            let mut bytes = vec![0; count * PAGE];
            filled.iter().for_each(|at| bytes[at * PAGE + 7] = 1);
            runs(&bytes)
        };
        assert_eq!(page(&[], 64), []);
        assert_eq!(page(&[0, 63], 64), [(0, 1), (63, 64)]);
        assert_eq!(page(&[3, 4, 4 + GAP_PAGES + 1], 64), [(3, 14)]);
        assert_eq!(page(&[3, 3 + GAP_PAGES + 2], 64), [(3, 4), (13, 14)]);
    }

    #[test]
    fn what_is_mapped_is_a_private_copy() {
        let (map, file) = written(&filled(&[(1, 5), (160, 6)]));
        assert_eq!(file.metadata().unwrap().len(), 2 * PAGE as u64);
        let clones = [memory(), memory()];
        for clone in &clones {
            map.map(clone, &file).unwrap();
        }
        clones[0]
            .write_obj(9u8, GuestAddress(PAGE as u64 + 5))
            .unwrap();
        let other: u8 = clones[1].read_obj(GuestAddress(PAGE as u64 + 5)).unwrap();
        assert_eq!(other, 5);
        map.verify(&file, &Progress::default()).unwrap();
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn any_memory_survives(pages in prop::collection::vec((0u64..170, 1u8..), 0..40)) {
            let saved = filled(&pages);
            let (map, file) = written(&saved);
            prop_assert_eq!(file.metadata().unwrap().len(), map.file_bytes());
            let here = memory();
            map.map(&here, &file).unwrap();
            map.verify(&file, &Progress::default()).unwrap();
            prop_assert!(contents(&here) == contents(&saved));
        }

        #[test]
        fn any_damage_is_found(
            pages in prop::collection::vec((0u64..170, 1u8..), 1..40),
            position: prop::sample::Index,
            bit in 0u8..8,
            threads in 1usize..4,
        ) {
            let (map, file) = written(&filled(&pages));
            let len = file.metadata().unwrap().len();
            let at = position.index(len as usize) as u64;
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).unwrap();
            file.write_all_at(&[byte[0] ^ (1 << bit)], at).unwrap();
            let progress = Progress::default();
            let found: Vec<_> = std::thread::scope(|scope| {
                let check = || map.verify(&file, &progress);
                let checking: Vec<_> = (0..threads).map(|_| scope.spawn(check)).collect();
                checking.into_iter().map(|thread| thread.join().unwrap()).collect()
            });
            let failed: Vec<_> = found.iter().filter_map(|result| result.as_ref().err()).collect();
            let is_checksum = matches!(failed[..], [MemoryFileError::Checksum { .. }]);
            prop_assert!(is_checksum, "{:?}", found);

            for other in [at, len + 1] {
                file.set_len(other).unwrap();
                let found = map.map(&memory(), &file);
                let is_length = matches!(found, Err(MemoryFileError::Length { .. }));
                prop_assert!(is_length, "{:?}", found);
            }
        }

        /// Any map: refused, or it covers guest memory only.
        #[test]
        fn any_map_is_survived(extents in prop::collection::vec(
            (
                prop_oneof![8 => 0u64..300, 1 => any::<u64>()],
                prop_oneof![8 => 0u32..70, 1 => any::<u32>()],
                any::<u64>(),
            ),
            0..6,
        )) {
            let map = MemoryMap {
                extents: extents
                    .into_iter()
                    .map(|(page, pages, checksum)| Extent { page, pages, checksum })
                    .collect(),
            };
            let file = tempfile::tempfile().unwrap();
            let here = memory();
            let bytes = map.file_bytes();
            if bytes < 1 << 30 {
                file.set_len(bytes).unwrap();
            }
            if map.map(&here, &file).is_ok() {
                for extent in &map.extents {
                    let address = GuestAddress(extent.page * PAGE as u64);
                    prop_assert!(here.get_slice(address, extent.bytes() as usize).is_ok());
                }
            }
            let _ = map.verify(&file, &Progress::default());
        }
    }
}
