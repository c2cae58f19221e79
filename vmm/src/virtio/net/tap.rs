//! The host's end of a network device: a descriptor that gives and takes one frame at a time, each
//! with a header in front; knows nothing of queues.

use super::super::iovec::{IoVectors, Room};
use super::HEADER;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use vm_memory::volatile_memory::VolatileSlice;

/// Requests of tap descriptors (linux/if_tun.h).
pub mod ioctls {
    /// TUNGETIFF: name and flags.
    pub const GET_INTERFACE: u64 = 0x8004_54d2;
    /// TUNSETOFFLOAD: what frames to us may be left to do.
    pub const SET_OFFLOAD: u64 = 0x4004_54d0;
    /// TUNSETVNETHDRSZ: length of the header.
    pub const SET_HEADER_LENGTH: u64 = 0x4004_54d8;
    /// TUNSETQUEUE: takes part in a device of several queues, or not.
    pub const SET_QUEUE: u64 = 0x4004_54d9;
}

const OFFLOAD_CHECKSUM: u32 = 0x01;
const OFFLOAD_TSO4: u32 = 0x02;
const OFFLOAD_TSO6: u32 = 0x04;
const OFFLOAD_USO4: u32 = 0x20;
const OFFLOAD_USO6: u32 = 0x40;

/// Why a descriptor can't be a network device's.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// It isn't a tap's.
    #[error(
        "{call} on the descriptor of a network device: {source}; it must be a tap's that is attached (TUNSETIFF)"
    )]
    Call {
        /// The call.
        call: &'static str,
        /// Its error.
        #[source]
        source: io::Error,
    },
    /// It was opened otherwise.
    #[error("the tap has the flags {found:#x}; it needs IFF_TAP, IFF_NO_PI and IFF_VNET_HDR")]
    Flags {
        /// As it has them.
        found: u32,
    },
}

/// What frames to the guest may be left to do for it (§5.1.4): what its driver has accepted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Offloads {
    /// Checksums.
    pub checksum: bool,
    /// Segmentation of TCP over IPv4.
    pub tso4: bool,
    /// The same over IPv6.
    pub tso6: bool,
    /// Segmentation of UDP over IPv4.
    pub uso4: bool,
    /// The same over IPv6.
    pub uso6: bool,
}

impl Offloads {
    /// Whether frames can be longer than the link's.
    pub fn segmentation(self) -> bool {
        self.tso4 || self.tso6 || self.uso4 || self.uso6
    }

    fn bits(self) -> u32 {
        [
            (self.checksum, OFFLOAD_CHECKSUM),
            (self.tso4, OFFLOAD_TSO4),
            (self.tso6, OFFLOAD_TSO6),
            (self.uso4, OFFLOAD_USO4),
            (self.uso6, OFFLOAD_USO6),
        ]
        .into_iter()
        .filter_map(|(wanted, bit)| wanted.then_some(bit))
        .sum()
    }
}

/// One queue of a tap device.
#[derive(Debug)]
pub struct Tap {
    descriptor: OwnedFd,
    /// Segmentation of UDP is known here (Linux 6.2).
    uso: bool,
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

impl AsRawFd for Tap {
    fn as_raw_fd(&self) -> RawFd {
        self.descriptor.as_raw_fd()
    }
}

impl Tap {
    /// Takes a tap's descriptor.
    ///
    /// # Errors
    /// When it is none, or was opened without what is needed.
    pub fn new(descriptor: OwnedFd) -> Result<Self, TapError> {
        let failed = |call| move |source| TapError::Call { call, source };
        let flags = interface_flags(&descriptor).map_err(failed("TUNGETIFF"))?;
        let needed = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as u32;
        if flags & needed != needed {
            return Err(TapError::Flags { found: flags });
        }
        let length = HEADER as libc::c_int;
        // SAFETY: reads an int.
        check(unsafe {
            libc::ioctl(
                descriptor.as_raw_fd(),
                ioctls::SET_HEADER_LENGTH as _,
                &raw const length,
            )
        })
        .map_err(failed("TUNSETVNETHDRSZ"))?;
        let mut tap = Self::of_packets(descriptor).map_err(failed("FIONBIO"))?;
        tap.uso = tap
            .set_offloads(Offloads {
                checksum: true,
                uso4: true,
                uso6: true,
                ..Offloads::default()
            })
            .is_ok();
        tap.set_offloads(Offloads::default())
            .map_err(failed("TUNSETOFFLOAD"))?;
        Ok(tap)
    }

    /// A socket of packets in a tap's place: what reads and writes frames needs no more of it.
    ///
    /// # Errors
    /// What FIONBIO says.
    pub fn of_packets(descriptor: OwnedFd) -> io::Result<Self> {
        let on: libc::c_int = 1;
        // SAFETY: reads an int.
        check(unsafe { libc::ioctl(descriptor.as_raw_fd(), libc::FIONBIO, &raw const on) })?;
        Ok(Self {
            descriptor,
            uso: false,
        })
    }

    /// Whether it can segment UDP.
    pub fn uso(&self) -> bool {
        self.uso
    }

    /// Sets what frames from now on may be left to do.
    ///
    /// # Errors
    /// What TUNSETOFFLOAD says.
    pub fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        let bits = libc::c_ulong::from(offloads.bits());
        // SAFETY: takes a number.
        check(unsafe { libc::ioctl(self.as_raw_fd(), ioctls::SET_OFFLOAD as _, bits) })
    }

    /// Has the tap device use this queue, or not.
    ///
    /// # Errors
    /// What TUNSETQUEUE says.
    pub fn set_attached(&self, attached: bool) -> io::Result<()> {
        let flag = if attached {
            libc::IFF_ATTACH_QUEUE
        } else {
            libc::IFF_DETACH_QUEUE
        };
        // SAFETY: all-zero is a valid ifreq.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        request.ifr_ifru.ifru_flags = flag as libc::c_short;
        // SAFETY: reads an ifreq.
        check(unsafe { libc::ioctl(self.as_raw_fd(), ioctls::SET_QUEUE as _, &raw const request) })
    }

    /// Reads a frame and its header into the first vectors of the room, at most `most` of them;
    /// tells their length, and how long they might have been. The room stays as it is.
    ///
    /// # Errors
    /// What readv(2) says; WouldBlock when there is none.
    pub fn receive(&self, room: &mut Room, most: usize) -> io::Result<(usize, usize)> {
        room.readv(self, most)
    }

    /// Writes a frame: `start`, which has its header, and the slices, fewer than IOV_MAX.
    ///
    /// # Errors
    /// What writev(2) says; WouldBlock when there is no room.
    pub fn send(&self, start: &[u8], slices: &[VolatileSlice]) -> io::Result<usize> {
        IoVectors::after(start, slices).writev(self)
    }
}

fn interface_flags(descriptor: &OwnedFd) -> io::Result<u32> {
    // SAFETY: all-zero is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // SAFETY: writes an ifreq.
    check(unsafe {
        libc::ioctl(
            descriptor.as_raw_fd(),
            ioctls::GET_INTERFACE as _,
            &raw mut request,
        )
    })?;
    // SAFETY: the call has set the flags, and any bits are valid ones.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    Ok(u32::from(flags as u16))
}

fn check(returned: libc::c_int) -> io::Result<()> {
    match returned {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_tap_is_taken() {
        let file = tempfile::tempfile().unwrap();
        let error = Tap::new(file.into()).unwrap_err().to_string();
        assert!(error.contains("must be a tap's"), "{error}");
    }

    #[test]
    fn offloads_have_their_bits() {
        let all = Offloads {
            checksum: true,
            tso4: true,
            tso6: true,
            uso4: true,
            uso6: true,
        };
        assert_eq!(all.bits(), 0x67);
        assert!(all.segmentation());
        assert_eq!(Offloads::default().bits(), 0);
    }
}
