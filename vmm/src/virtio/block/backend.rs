//! The file behind a block device; knows nothing of virtio.

use super::super::iovec::IoVectors;
use super::SECTOR;
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use vm_memory::volatile_memory::VolatileSlice;

/// Why a file can't back a block device.
#[derive(Debug, thiserror::Error)]
#[error(
    "finding the size of a block device's backing failed: {0}; it must be a regular file or a block \
     device"
)]
pub struct BackingError(#[from] io::Error);

/// A raw image of fixed size.
#[derive(Debug)]
pub struct Backing {
    file: File,
    sectors: u64,
}

impl Backing {
    /// The size is that of now, rounded down to whole sectors.
    pub fn new(mut file: File) -> Result<Self, BackingError> {
        // Works for regular files and for block devices; a folder or a pipe gives an error.
        let bytes = file.seek(SeekFrom::End(0))?;
        if file.metadata()?.is_dir() {
            return Err(BackingError(io::Error::from(io::ErrorKind::IsADirectory)));
        }
        Ok(Backing {
            file,
            sectors: bytes / SECTOR,
        })
    }

    /// Capacity.
    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    /// Reads into the slices, at most IOV_MAX (1024) of them, until they are full.
    pub fn read_at(&self, slices: &[VolatileSlice], offset: u64) -> io::Result<()> {
        transfer(slices, offset, |vectors, offset| {
            vectors.preadv(&self.file, offset)
        })
    }

    /// Writes the slices, at most IOV_MAX (1024) of them.
    pub fn write_at(&self, slices: &[VolatileSlice], offset: u64) -> io::Result<()> {
        transfer(slices, offset, |vectors, offset| {
            vectors.pwritev(&self.file, offset)
        })
    }

    /// Makes completed writes durable.
    pub fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// Gives the range's storage back; it reads as zeros afterwards.
    pub fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.fallocate(
            libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
            offset,
            len,
        )
    }

    /// Zeroes the range and keeps its storage.
    pub fn write_zeroes(&self, offset: u64, len: u64) -> io::Result<()> {
        self.fallocate(
            libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE,
            offset,
            len,
        )
    }

    fn fallocate(&self, mode: i32, offset: u64, len: u64) -> io::Result<()> {
        let (offset, len) = (offset_of(offset)?, offset_of(len)?);
        if len == 0 {
            return Ok(());
        }
        // SAFETY: takes no pointers.
        let result = unsafe { libc::fallocate(self.file.as_raw_fd(), mode, offset, len) };
        if result == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }
}

fn transfer(
    slices: &[VolatileSlice],
    mut offset: u64,
    call: impl Fn(&IoVectors, i64) -> io::Result<usize>,
) -> io::Result<()> {
    let mut vectors = IoVectors::new(slices);
    while !vectors.is_empty() {
        match call(&vectors, offset_of(offset)?) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(done) => {
                offset += done as u64;
                vectors.advance(done);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn offset_of(value: u64) -> io::Result<i64> {
    i64::try_from(value).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;
    use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap};

    #[test]
    fn a_file_that_shrinks_gives_an_error_and_folders_are_refused() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4 * SECTOR + 100).unwrap();
        file.write_all_at(b"abc", SECTOR).unwrap();
        let backing = Backing::new(file.try_clone().unwrap()).unwrap();
        assert_eq!(backing.sectors(), 4);

        let mem: GuestMemoryMmap =
            GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x2000)]).unwrap();
        let slices = [
            mem.get_slice(GuestAddress(0x10), 512).unwrap(),
            mem.get_slice(GuestAddress(0x1000), 512).unwrap(),
        ];
        backing.read_at(&slices, SECTOR).unwrap();
        let mut text = [0; 3];
        mem.read_slice(&mut text, GuestAddress(0x10)).unwrap();
        assert_eq!(&text, b"abc");
        file.set_len(2 * SECTOR).unwrap();
        let error = backing.read_at(&slices, SECTOR).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);

        let folder = File::open(tempfile::tempdir().unwrap().path()).unwrap();
        assert!(Backing::new(folder).is_err());
    }
}
