//! Guest memory for vectored system calls, so that host I/O goes straight to and from the guest
//! without a buffer whose size the guest could choose.

use std::io;
use std::os::fd::AsRawFd;
use vm_memory::volatile_memory::{PtrGuardMut, VolatileSlice};

/// Slices of guest memory as the kernel wants them, at most IOV_MAX (1024).
pub struct IoVectors<'m> {
    /// Keep the mapping alive as long as the vectors may be used.
    guards: Vec<PtrGuardMut>,
    vectors: Vec<libc::iovec>,
    /// Vectors that are done with.
    done: usize,
    memory: std::marker::PhantomData<VolatileSlice<'m>>,
}

impl<'m> IoVectors<'m> {
    /// Borrows the slices' memory.
    pub fn new(slices: &[VolatileSlice<'m>]) -> Self {
        let guards: Vec<_> = slices.iter().map(VolatileSlice::ptr_guard_mut).collect();
        let vectors = guards
            .iter()
            .map(|guard| libc::iovec {
                iov_base: guard.as_ptr().cast(),
                iov_len: guard.len(),
            })
            .collect();
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
        debug_assert_eq!(self.guards.len(), self.vectors.len());
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

/// writev(2) once: `start`, and then the slices.
pub fn writev_after(
    file: &impl AsRawFd,
    start: &[u8],
    slices: &[VolatileSlice],
) -> io::Result<usize> {
    let mut vectors = IoVectors::new(slices);
    let first = libc::iovec {
        iov_base: start.as_ptr().cast_mut().cast(),
        iov_len: start.len(),
    };
    vectors.vectors.insert(0, first);
    let count = i32::try_from(vectors.vectors.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: as in `preadv`, and `start` is borrowed meanwhile; the kernel only reads.
    result(unsafe { libc::writev(file.as_raw_fd(), vectors.vectors.as_ptr(), count) })
}

fn result(returned: isize) -> io::Result<usize> {
    usize::try_from(returned).map_err(|_| io::Error::last_os_error())
}

#[cfg(test)]
mod tests {
    use super::*;

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
