//! Guest memory for vectored system calls, so that host I/O goes straight to and from the guest
//! without a buffer whose size the guest could choose.

use super::buffers::{Segments, Slices};
use smallvec::SmallVec;
use std::collections::VecDeque;
use std::io;
use std::os::fd::AsRawFd;
use vm_memory::GuestMemoryMmap;
use vm_memory::volatile_memory::{PtrGuardMut, VolatileSlice};

/// Vectors of a usual request: so many need no allocation.
const USUAL: usize = 8;

/// Slices of guest memory as the kernel wants them, at most IOV_MAX (1024).
pub struct IoVectors<'m> {
    /// Keep the mapping alive as long as the vectors may be used.
    guards: SmallVec<[PtrGuardMut; USUAL]>,
    vectors: SmallVec<[libc::iovec; USUAL]>,
    /// Vectors that are done with.
    done: usize,
    memory: std::marker::PhantomData<VolatileSlice<'m>>,
}

impl<'m> IoVectors<'m> {
    /// Borrows the slices' memory.
    pub fn new(slices: &[VolatileSlice<'m>]) -> Self {
        Self::after(&[], slices)
    }

    /// The same with bytes of ours in front of them, for writing; none if they are empty.
    pub fn after(start: &'m [u8], slices: &[VolatileSlice<'m>]) -> Self {
        let guards: SmallVec<_> = slices.iter().map(VolatileSlice::ptr_guard_mut).collect();
        let start = (!start.is_empty()).then(|| libc::iovec {
            iov_base: start.as_ptr().cast_mut().cast(),
            iov_len: start.len(),
        });
        let vectors = start.into_iter().chain(guards.iter().map(vector)).collect();
        IoVectors {
            guards,
            vectors,
            done: 0,
            memory: std::marker::PhantomData,
        }
    }

    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.left().is_empty()
    }

    /// Drops the first `bytes` bytes of what is left.
    pub fn advance(&mut self, mut bytes: usize) {
        for vector in self.vectors.iter_mut().skip(self.done) {
            if bytes < vector.iov_len {
                vector.iov_base = vector.iov_base.cast::<u8>().wrapping_add(bytes).cast();
                vector.iov_len -= bytes;
                break;
            }
            bytes -= vector.iov_len;
            self.done += 1;
        }
    }

    fn left(&self) -> &[libc::iovec] {
        debug_assert!(self.guards.len() <= self.vectors.len());
        self.vectors.get(self.done..).unwrap_or_default()
    }

    fn count(&self) -> io::Result<i32> {
        i32::try_from(self.left().len()).map_err(|_| io::ErrorKind::InvalidInput.into())
    }

    /// preadv(2) once.
    pub fn preadv(&self, file: &impl AsRawFd, offset: i64) -> io::Result<usize> {
        // SAFETY: the vectors point to guest memory, which stays mapped while it is borrowed, and
        // which nobody reaches by reference: the kernel may write to it.
        result(unsafe {
            libc::preadv(
                file.as_raw_fd(),
                self.left().as_ptr(),
                self.count()?,
                offset,
            )
        })
    }

    /// pwritev(2) once.
    pub fn pwritev(&self, file: &impl AsRawFd, offset: i64) -> io::Result<usize> {
        // SAFETY: as in `preadv`; the kernel only reads.
        result(unsafe {
            libc::pwritev(
                file.as_raw_fd(),
                self.left().as_ptr(),
                self.count()?,
                offset,
            )
        })
    }

    /// readv(2) once.
    pub fn readv(&self, file: &impl AsRawFd) -> io::Result<usize> {
        // SAFETY: as in `preadv`.
        result(unsafe { libc::readv(file.as_raw_fd(), self.left().as_ptr(), self.count()?) })
    }

    /// writev(2) once.
    pub fn writev(&self, file: &impl AsRawFd) -> io::Result<usize> {
        // SAFETY: as in `preadv`; the kernel only reads.
        result(unsafe { libc::writev(file.as_raw_fd(), self.left().as_ptr(), self.count()?) })
    }

    /// sendmsg(2) once, without a SIGPIPE.
    pub fn send(&self, socket: &impl AsRawFd) -> io::Result<usize> {
        // SAFETY: all-zero is a valid msghdr: no name, no control data.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = self.left().as_ptr().cast_mut();
        message.msg_iovlen = self.left().len() as _;
        // SAFETY: as in `preadv`; sendmsg only reads through msg_iov.
        result(unsafe { libc::sendmsg(socket.as_raw_fd(), &message, libc::MSG_NOSIGNAL) })
    }
}

fn vector(guard: &PtrGuardMut) -> libc::iovec {
    libc::iovec {
        iov_base: guard.as_ptr().cast(),
        iov_len: guard.len(),
    }
}

/// Room in guest memory that is kept ready for several readv(2), which fill it from its front.
pub struct Room {
    /// What the vectors point into, and with this it stays mapped.
    mem: GuestMemoryMmap,
    vectors: VecDeque<libc::iovec>,
}

// SAFETY: the vectors point into `mem`, which is shared by all threads and which nobody reaches by
// reference.
unsafe impl Send for Room {}

impl std::fmt::Debug for Room {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.debug_struct("Room")
            .field("vectors", &self.vectors.len())
            .finish_non_exhaustive()
    }
}

impl Room {
    /// None yet.
    pub fn new(mem: GuestMemoryMmap) -> Self {
        Room {
            mem,
            vectors: VecDeque::new(),
        }
    }

    /// Adds room at the end; gives how many vectors it takes.
    pub fn add(&mut self, segments: &Segments) -> usize {
        let slices: Slices = segments.slices(&self.mem);
        self.vectors
            .extend(slices.iter().map(|slice| vector(&slice.ptr_guard_mut())));
        slices.len()
    }

    /// Takes away the first `count` vectors.
    pub fn remove(&mut self, count: usize) {
        self.vectors.drain(..count.min(self.vectors.len()));
    }

    /// readv(2) once into the first vectors, at most `most` and IOV_MAX of them; gives how many
    /// bytes came, and how many would have had room.
    pub fn readv(&mut self, file: &impl AsRawFd, most: usize) -> io::Result<(usize, usize)> {
        let all = &*self.vectors.make_contiguous();
        let vectors = all
            .get(..most.min(libc::UIO_MAXIOV as usize))
            .unwrap_or(all);
        // SAFETY: the vectors point to guest memory, which `mem` keeps mapped, and which nobody
        // reaches by reference: the kernel may write to it.
        let read = result(unsafe {
            libc::readv(file.as_raw_fd(), vectors.as_ptr(), vectors.len() as i32)
        })?;
        Ok((read, vectors.iter().map(|vector| vector.iov_len).sum()))
    }
}

fn result(returned: isize) -> io::Result<usize> {
    usize::try_from(returned).map_err(|_| io::Error::last_os_error())
}

#[cfg(test)]
mod tests {
    use super::super::buffers::Buffers;
    use super::super::testing::{Desc, DriverQueue, memory};
    use super::*;
    use vm_memory::{Bytes, GuestAddress};

    const BUFFERS: u64 = 0x8000;

    /// Single buffers of these lengths, one after the other from the memory's start.
    fn segments(mem: &GuestMemoryMmap, lengths: &[u32]) -> Vec<Segments> {
        let mut driver = DriverQueue::new(mem, 16);
        let mut address = BUFFERS;
        for len in lengths {
            driver.add(&[Desc::writable(address, *len)]);
            address += u64::from(*len);
        }
        let mut queue = driver.device_side(mem);
        let mut next = || {
            let chain = queue.pop(mem).unwrap()?;
            Some(Buffers::collect(chain, mem, 1).unwrap().writable)
        };
        std::iter::from_fn(&mut next).collect()
    }

    #[test]
    fn room_is_filled_from_its_front_and_moves_on() {
        let mem = memory();
        let (here, there) = std::os::unix::net::UnixStream::pair().unwrap();
        here.set_nonblocking(true).unwrap();
        let mut room = Room::new(mem.clone());
        let chains = segments(&mem, &[4, 0, 4, 4, 4]);
        let add = |room: &mut Room, chain: usize| room.add(&chains[chain]);
        assert_eq!(
            [0, 1, 2].map(|chain| add(&mut room, chain)),
            [1, 0, 1],
            "vectors of each"
        );
        let write = |bytes: &[u8]| std::io::Write::write_all(&mut &there, bytes).unwrap();

        write(b"01234567");
        assert_eq!(room.readv(&here, 1).unwrap(), (4, 4));
        assert_eq!(room.readv(&here, usize::MAX).unwrap(), (4, 8));
        room.remove(1);
        // The vectors' ring wraps somewhere in this.
        for round in 0..20u8 {
            add(&mut room, 2 + usize::from(round % 3));
            write(&[round; 6]);
            assert_eq!(room.readv(&here, 9).unwrap(), (6, 8));
            room.remove(1);
        }
        room.remove(9);
        write(b"x");
        assert_eq!(room.readv(&here, 9).unwrap(), (0, 0));
        add(&mut room, 4);
        assert_eq!(room.readv(&here, 9).unwrap(), (1, 4));
        let mut bytes = [0; 16];
        mem.read_slice(&mut bytes, GuestAddress(BUFFERS)).unwrap();
        assert_eq!(&bytes[..4], b"4567");
        assert_eq!(bytes[12], b'x');
    }

    #[test]
    fn bytes_of_ours_come_first() {
        let mut bytes = *b"guest";
        let whole = VolatileSlice::from(&mut bytes[..]);
        let (here, mut there) = std::os::unix::net::UnixStream::pair().unwrap();
        let vectors = IoVectors::after(b"ours ", &[whole]);
        assert_eq!(vectors.writev(&here).unwrap(), 10);
        let mut seen = [0; 10];
        std::io::Read::read_exact(&mut there, &mut seen).unwrap();
        assert_eq!(&seen, b"ours guest");
    }

    #[test]
    fn partial_vectors_are_advanced() {
        let mut bytes = *b"0123456789";
        let whole = VolatileSlice::from(&mut bytes[..]);
        let slices = [whole.subslice(0, 4).unwrap(), whole.subslice(4, 6).unwrap()];
        let (here, there) = std::os::unix::net::UnixStream::pair().unwrap();
        let mut vectors = IoVectors::new(&slices);
        for (step, expected) in [(0, "0123456789"), (4, "456789"), (5, "9")] {
            vectors.advance(step);
            assert_eq!(vectors.send(&here).unwrap(), expected.len());
            let mut seen = [0; 16];
            let len = std::io::Read::read(&mut &there, &mut seen).unwrap();
            assert_eq!(&seen[..len], expected.as_bytes());
        }
        assert!(!vectors.is_empty());
        vectors.advance(1);
        assert!(vectors.is_empty());
        drop(there);
        assert_eq!(
            IoVectors::new(&slices).send(&here).unwrap_err().kind(),
            io::ErrorKind::BrokenPipe
        );
    }
}
