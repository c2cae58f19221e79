//! Packet headers (virtio 1.3 §5.10.6) in and out; knows no connection.

use super::super::buffers::Segments;
use super::HOST_CID;
use bulkhead_proto::guest::GUEST_CID;
use vm_memory::{ByteValued, GuestMemoryMmap, Le16, Le32, Le64};

/// Longest payload taken in one packet, as Linux's VIRTIO_VSOCK_MAX_PKT_BUF_SIZE.
pub const MAX_PAYLOAD: u32 = 64 << 10;
/// VIRTIO_VSOCK_TYPE_STREAM.
pub const TYPE_STREAM: u16 = 1;
/// Flag of [`Op::Shutdown`]: the sender will receive no more.
pub const SHUTDOWN_RECEIVE: u32 = 1;
/// Flag of [`Op::Shutdown`]: the sender will send no more.
pub const SHUTDOWN_SEND: u32 = 2;
/// Both flags.
pub const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// enum virtio_vsock_op.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Op {
    /// Asks for a connection.
    Request = 1,
    /// Accepts it.
    Response = 2,
    /// Ends or refuses a connection at once.
    Reset = 3,
    /// Ends one or both directions in order.
    Shutdown = 4,
    /// Carries payload.
    ReadWrite = 5,
    /// Tells buf_alloc and fwd_cnt.
    CreditUpdate = 6,
    /// Asks for [`Op::CreditUpdate`].
    CreditRequest = 7,
}

impl Op {
    fn parse(value: u16) -> Option<Op> {
        [
            Op::Request,
            Op::Response,
            Op::Reset,
            Op::Shutdown,
            Op::ReadWrite,
            Op::CreditUpdate,
            Op::CreditRequest,
        ]
        .into_iter()
        .find(|op| *op as u16 == value)
    }
}

/// struct virtio_vsock_hdr.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(C, packed)]
pub struct RawHeader {
    src_cid: Le64,
    dst_cid: Le64,
    src_port: Le32,
    dst_port: Le32,
    len: Le32,
    kind: Le16,
    op: Le16,
    flags: Le32,
    buf_alloc: Le32,
    fwd_cnt: Le32,
}

// SAFETY: only integers, packed and so without padding.
unsafe impl ByteValued for RawHeader {}

/// Length of a header in bytes.
pub const HEADER_LEN: usize = size_of::<RawHeader>();

/// The two ends of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ports {
    /// On the host's side; ours to give.
    pub host: u32,
    /// On the guest's side.
    pub guest: u32,
}

/// How much may be under way (§5.10.6.3).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Credit {
    /// The sender's buffer for this connection, in bytes.
    pub buf_alloc: u32,
    /// Bytes that have left that buffer since the connection began, modulo 2^32.
    pub fwd_cnt: u32,
}

/// A packet of the guest's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestPacket {
    /// Which connection.
    pub ports: Ports,
    /// What it is.
    pub op: Op,
    /// Of [`Op::Shutdown`].
    pub flags: u32,
    /// The guest's.
    pub credit: Credit,
    /// Of [`Op::ReadWrite`]; otherwise empty.
    pub payload: Segments,
}

/// What to do with a packet that is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Malformed {
    /// Nobody could make sense of an answer.
    Drop,
    /// §5.10.6.4: an unknown type, and whatever else is wrong with a connection, is answered by
    /// RST, of the packet's own type.
    Reset(Ports, u16),
}

impl GuestPacket {
    /// Parses what a chain of the transmit queue holds. All header fields are read once.
    pub fn parse(mut bytes: Segments, mem: &GuestMemoryMmap) -> Result<Self, Malformed> {
        let header: RawHeader = bytes.take_object(mem).ok_or(Malformed::Drop)?;
        let cids = (header.src_cid.to_native(), header.dst_cid.to_native());
        if cids != (GUEST_CID, HOST_CID) {
            return Err(Malformed::Drop);
        }
        let ports = Ports {
            host: header.dst_port.to_native(),
            guest: header.src_port.to_native(),
        };
        let kind = header.kind.to_native();
        let malformed = Malformed::Reset(ports, kind);
        let op = Op::parse(header.op.to_native()).ok_or(malformed)?;
        let len = header.len.to_native();
        if kind != TYPE_STREAM
            || len > MAX_PAYLOAD
            || len as usize > bytes.len()
            || (op != Op::ReadWrite && len != 0)
        {
            // An RST is never answered by one.
            return Err(if op == Op::Reset {
                Malformed::Drop
            } else {
                malformed
            });
        }
        Ok(GuestPacket {
            ports,
            op,
            flags: header.flags.to_native(),
            credit: Credit {
                buf_alloc: header.buf_alloc.to_native(),
                fwd_cnt: header.fwd_cnt.to_native(),
            },
            payload: bytes.take_front(len as usize),
        })
    }
}

/// The header of a packet for the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostPacket {
    /// Which connection.
    pub ports: Ports,
    /// What it is.
    pub op: Op,
    /// Of [`Op::Shutdown`].
    pub flags: u32,
    /// Ours.
    pub credit: Credit,
    /// Bytes of payload that follow the header.
    pub len: u32,
    /// [`TYPE_STREAM`], but for the RST of another type.
    pub kind: u16,
}

impl HostPacket {
    /// A packet without flags and payload.
    pub fn new(ports: Ports, op: Op, credit: Credit) -> Self {
        HostPacket {
            ports,
            op,
            flags: 0,
            credit,
            len: 0,
            kind: TYPE_STREAM,
        }
    }

    /// As it goes over the ring.
    pub fn to_raw(self) -> RawHeader {
        RawHeader {
            src_cid: HOST_CID.into(),
            dst_cid: GUEST_CID.into(),
            src_port: self.ports.host.into(),
            dst_port: self.ports.guest.into(),
            len: self.len.into(),
            kind: self.kind.into(),
            op: (self.op as u16).into(),
            flags: self.flags.into(),
            buf_alloc: self.credit.buf_alloc.into(),
            fwd_cnt: self.credit.fwd_cnt.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::buffers::Buffers;
    use super::super::super::testing::{Desc, DriverQueue, memory};
    use super::*;
    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestAddress};

    fn parse(header: RawHeader, descriptors: &[Desc]) -> Result<GuestPacket, Malformed> {
        let mem = memory();
        mem.write_obj(header, GuestAddress(0x4000)).unwrap();
        let mut driver = DriverQueue::new(&mem, 16);
        driver.add(descriptors);
        let chain = driver.device_side(&mem).pop(&mem).unwrap().unwrap();
        GuestPacket::parse(Buffers::collect(chain, &mem, 32).unwrap().readable, &mem)
    }

    fn good() -> RawHeader {
        RawHeader {
            src_cid: 3.into(),
            dst_cid: 2.into(),
            src_port: 7.into(),
            dst_port: 9.into(),
            len: 100.into(),
            kind: 1.into(),
            op: 5.into(),
            flags: 0.into(),
            buf_alloc: 1000.into(),
            fwd_cnt: 10.into(),
        }
    }

    #[test]
    fn the_header_is_44_bytes_and_round_trips() {
        assert_eq!(HEADER_LEN, 44);
        let packet = HostPacket {
            flags: 2,
            len: 5,
            ..HostPacket::new(
                Ports { host: 9, guest: 7 },
                Op::Shutdown,
                Credit {
                    buf_alloc: 11,
                    fwd_cnt: 12,
                },
            )
        };
        let raw = packet.to_raw();
        assert_eq!(
            raw.as_slice()[..36],
            [
                2, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0, 7, 0, 0, 0, 5, 0, 0, 0,
                1, 0, 4, 0, 2, 0, 0, 0
            ]
        );
        assert_eq!(raw.as_slice()[36..], [11, 0, 0, 0, 12, 0, 0, 0]);
    }

    #[test]
    fn payload_may_come_in_the_same_or_in_other_descriptors() {
        for chain in [
            &[Desc::readable(0x4000, 144)][..],
            &[Desc::readable(0x4000, 44), Desc::readable(0x5000, 100)],
            &[
                Desc::readable(0x4000, 20),
                Desc::readable(0x4014, 24 + 50),
                Desc::readable(0x5000, 999),
            ],
        ] {
            let packet = parse(good(), chain).unwrap();
            assert_eq!(packet.payload.len(), 100);
            assert_eq!(packet.op, Op::ReadWrite);
            assert_eq!(packet.ports, Ports { host: 9, guest: 7 });
            assert_eq!(packet.credit.buf_alloc, 1000);
        }
    }

    #[test]
    fn wrong_headers_are_dropped_or_answered_by_reset() {
        let chain = [Desc::readable(0x4000, 44), Desc::readable(0x5000, 100)];
        let ports = Ports { host: 9, guest: 7 };
        for (header, expected) in [
            (
                RawHeader {
                    src_cid: 4.into(),
                    ..good()
                },
                Malformed::Drop,
            ),
            (
                RawHeader {
                    dst_cid: 0.into(),
                    ..good()
                },
                Malformed::Drop,
            ),
            (
                RawHeader {
                    kind: 2.into(),
                    ..good()
                },
                Malformed::Reset(ports, 2),
            ),
            (
                RawHeader {
                    op: 0.into(),
                    ..good()
                },
                Malformed::Reset(ports, 1),
            ),
            (
                RawHeader {
                    op: 8.into(),
                    ..good()
                },
                Malformed::Reset(ports, 1),
            ),
            (
                RawHeader {
                    op: 1.into(),
                    ..good()
                },
                Malformed::Reset(ports, 1),
            ),
            (
                RawHeader {
                    op: 3.into(),
                    ..good()
                },
                Malformed::Drop,
            ),
            (
                RawHeader {
                    len: 101.into(),
                    ..good()
                },
                Malformed::Reset(ports, 1),
            ),
            (
                RawHeader {
                    len: u32::MAX.into(),
                    ..good()
                },
                Malformed::Reset(ports, 1),
            ),
        ] {
            assert_eq!(parse(header, &chain).unwrap_err(), expected);
        }
        assert_eq!(
            parse(good(), &[Desc::readable(0x4000, 43)]).unwrap_err(),
            Malformed::Drop
        );
    }

    proptest! {
        /// Any 44 bytes and any lengths: no panic, and a payload only of the length that the
        /// header says.
        #[test]
        fn any_header_is_survived(
            noise in prop::collection::vec(any::<u8>(), 44),
            plausible: bool,
            lens in prop::collection::vec(0u32..0x2_0000, 1..4),
        ) {
            let mut header = RawHeader::default();
            header.as_mut_slice().copy_from_slice(&noise);
            if plausible {
                header.src_cid = 3.into();
                header.dst_cid = 2.into();
                header.kind = 1.into();
                header.op = (u16::from(noise[0]) % 9).into();
                header.len = (u32::from(noise[1]) * 512).into();
            }
            let len = header.len;
            let chain: Vec<_> = lens.iter().map(|&len| Desc::readable(0x4000, len)).collect();
            if let Ok(packet) = parse(header, &chain) {
                prop_assert_eq!(packet.payload.len(), len.to_native() as usize);
                prop_assert!(packet.payload.len() <= MAX_PAYLOAD as usize);
            }
        }
    }
}
