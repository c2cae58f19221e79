//! Guest bytes to requests and back (virtio 1.3 §5.2.6); knows no file and no ring.

use super::super::buffers::{Buffers, ChainError, Segments};
use super::SECTOR;
use virtio_bindings::virtio_blk as ids;
use vm_memory::{ByteValued, GuestMemoryMmap, Le32, Le64};

/// Most data descriptors of a request (seg_max in the configuration space): Linux then doesn't cut
/// requests of 1 MiB up, whose pages may each be somewhere else. Fewer than IOV_MAX (1024).
pub const MAX_SEGMENTS: u32 = 510;
/// Most descriptors of a chain: data, header and status.
pub const MAX_DESCRIPTORS: usize = MAX_SEGMENTS as usize + 2;
/// Most ranges of a discard or write-zeroes request.
pub const MAX_RANGES: u32 = 16;
/// Most sectors of a range.
pub const MAX_RANGE_SECTORS: u32 = 1 << 21;
/// Length of the answer to GET_ID.
pub const ID_BYTES: usize = ids::VIRTIO_BLK_ID_BYTES as usize;

/// Last byte of the answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// VIRTIO_BLK_S_OK
    Ok = ids::VIRTIO_BLK_S_OK as u8,
    /// VIRTIO_BLK_S_IOERR
    IoError = ids::VIRTIO_BLK_S_IOERR as u8,
    /// VIRTIO_BLK_S_UNSUPP
    Unsupported = ids::VIRTIO_BLK_S_UNSUPP as u8,
}

/// struct virtio_blk_req up to its data.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
struct Header {
    kind: Le32,
    reserved: Le32,
    sector: Le64,
}

// SAFETY: only integers, without padding.
unsafe impl ByteValued for Header {}

/// struct virtio_blk_discard_write_zeroes.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
struct RawRange {
    sector: Le64,
    sectors: Le32,
    flags: Le32,
}

// SAFETY: only integers, without padding.
unsafe impl ByteValued for RawRange {}

/// A range of bytes of the device, known to lie within its capacity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// First byte.
    pub offset: u64,
    /// Number of bytes.
    pub len: u64,
    /// VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP: the storage may be given back.
    pub unmap: bool,
}

/// What the driver wants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Operation {
    /// Fill `data` from byte `offset` on.
    Read {
        /// First byte.
        offset: u64,
        /// Where to.
        data: Segments,
    },
    /// Write `data` from byte `offset` on.
    Write {
        /// First byte.
        offset: u64,
        /// Where from.
        data: Segments,
    },
    /// Make completed writes durable.
    Flush,
    /// Tell the serial number.
    GetId {
        /// Where to.
        data: Segments,
    },
    /// Give storage back.
    Discard(Vec<Range>),
    /// Zero ranges.
    WriteZeroes(Vec<Range>),
    /// Refused already.
    Refuse(Status),
}

/// A request and the place for its answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// Index of the chain's head.
    pub head: u16,
    /// What to do.
    pub operation: Operation,
    status: Segments,
}

/// What requests are checked against.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Capacity of the device, in sectors.
    pub sectors: u64,
    /// Whether everything that writes is refused.
    pub read_only: bool,
}

impl Request {
    /// Parses a chain. An error means that there is not even a place for the status; all else that
    /// is wrong with a request becomes [`Operation::Refuse`].
    pub fn parse(
        buffers: Buffers,
        mem: &GuestMemoryMmap,
        limits: Limits,
    ) -> Result<Self, ChainError> {
        let Buffers {
            head,
            mut readable,
            mut writable,
        } = buffers;
        let status = writable.take_back(1).ok_or(ChainError::TooShort {
            head,
            what: "the status byte of a block request",
        })?;
        let operation = match readable.take_object::<Header>(mem) {
            Some(header) => {
                operation(header, readable, writable, mem, limits).unwrap_or_else(Operation::Refuse)
            }
            None => Operation::Refuse(Status::IoError),
        };
        Ok(Request {
            head,
            operation,
            status,
        })
    }

    /// Writes the status byte.
    pub fn answer(&self, mem: &GuestMemoryMmap, status: Status) {
        self.status.write(mem, &[status as u8]);
    }
}

fn operation(
    header: Header,
    readable: Segments,
    writable: Segments,
    mem: &GuestMemoryMmap,
    limits: Limits,
) -> Result<Operation, Status> {
    let sector = header.sector.to_native();
    let unless_read_only = |status| {
        if limits.read_only {
            Err(status)
        } else {
            Ok(())
        }
    };
    match header.kind.to_native() {
        ids::VIRTIO_BLK_T_IN => Ok(Operation::Read {
            offset: transfer_offset(sector, &writable, limits)?,
            data: writable,
        }),
        ids::VIRTIO_BLK_T_OUT => {
            // §5.2.6.2: a write to a read-only device fails with IOERR.
            unless_read_only(Status::IoError)?;
            Ok(Operation::Write {
                offset: transfer_offset(sector, &readable, limits)?,
                data: readable,
            })
        }
        ids::VIRTIO_BLK_T_GET_ID => Ok(Operation::GetId { data: writable }),
        // §5.2.6.2: UNSUPP for commands whose feature was not offered; a read-only device offers
        // none of these.
        ids::VIRTIO_BLK_T_FLUSH => {
            unless_read_only(Status::Unsupported)?;
            Ok(Operation::Flush)
        }
        ids::VIRTIO_BLK_T_DISCARD => {
            unless_read_only(Status::Unsupported)?;
            // §5.2.6.2: UNMAP and all reserved flags must be clear for a discard.
            Ok(Operation::Discard(ranges(readable, mem, limits, 0)?))
        }
        ids::VIRTIO_BLK_T_WRITE_ZEROES => {
            unless_read_only(Status::Unsupported)?;
            let flags = ids::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;
            Ok(Operation::WriteZeroes(ranges(
                readable, mem, limits, flags,
            )?))
        }
        _ => Err(Status::Unsupported),
    }
}

/// Checks that the data are whole sectors within the capacity; gives the byte offset.
fn transfer_offset(sector: u64, data: &Segments, limits: Limits) -> Result<u64, Status> {
    let len = data.len() as u64;
    if !len.is_multiple_of(SECTOR) {
        return Err(Status::IoError);
    }
    byte_offset(sector, len / SECTOR, limits)
}

fn byte_offset(sector: u64, sectors: u64, limits: Limits) -> Result<u64, Status> {
    let end = sector.checked_add(sectors).ok_or(Status::IoError)?;
    if end > limits.sectors {
        return Err(Status::IoError);
    }
    sector.checked_mul(SECTOR).ok_or(Status::IoError)
}

fn ranges(
    mut data: Segments,
    mem: &GuestMemoryMmap,
    limits: Limits,
    allowed_flags: u32,
) -> Result<Vec<Range>, Status> {
    let len = data.len();
    let count = len / size_of::<RawRange>();
    if count == 0 || count > MAX_RANGES as usize || !len.is_multiple_of(size_of::<RawRange>()) {
        return Err(Status::IoError);
    }
    let mut ranges = Vec::with_capacity(count);
    while let Some(raw) = data.take_object::<RawRange>(mem) {
        let flags = raw.flags.to_native();
        if flags & !allowed_flags != 0 {
            return Err(Status::Unsupported);
        }
        let sectors = raw.sectors.to_native();
        if sectors > MAX_RANGE_SECTORS {
            return Err(Status::IoError);
        }
        ranges.push(Range {
            offset: byte_offset(raw.sector.to_native(), sectors.into(), limits)?,
            len: u64::from(sectors) * SECTOR,
            unmap: flags & ids::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0,
        });
    }
    Ok(ranges)
}

/// Writes the header of a request (for tests that play the driver).
#[cfg(test)]
pub fn write_header(mem: &GuestMemoryMmap, at: u64, kind: u32, sector: u64) {
    let header = Header {
        kind: kind.into(),
        reserved: 0.into(),
        sector: sector.into(),
    };
    vm_memory::Bytes::write_obj(mem, header, vm_memory::GuestAddress(at)).unwrap();
}

#[cfg(test)]
mod tests {
    use super::super::super::testing::{Desc, DriverQueue, memory};
    use super::*;
    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestAddress};

    const LIMITS: Limits = Limits {
        sectors: 100,
        read_only: false,
    };

    fn parse(descriptors: &[Desc], limits: Limits) -> Result<Request, ChainError> {
        let mem = memory();
        let mut driver = DriverQueue::new(&mem, 128);
        driver.add(descriptors);
        let chain = driver.device_side(&mem).pop(&mem).unwrap().unwrap();
        Request::parse(
            Buffers::collect(chain, &mem, MAX_DESCRIPTORS)?,
            &mem,
            limits,
        )
    }

    fn transfer(kind: u32, sector: u64, len: u32, limits: Limits) -> Operation {
        write_header(&memory(), 0x4000, kind, sector);
        let header = Desc::readable(0x4000, 16);
        let status = Desc::writable(0x5000, 1);
        let chain = match kind {
            ids::VIRTIO_BLK_T_IN => [header, Desc::writable(0x6000, len), status],
            _ => [header, Desc::readable(0x6000, len), status],
        };
        parse(&chain, limits).unwrap().operation
    }

    #[test]
    fn transfers_must_lie_within_the_capacity() {
        let read = ids::VIRTIO_BLK_T_IN;
        assert!(matches!(
            transfer(read, 98, 1024, LIMITS),
            Operation::Read { offset: 50_176, data } if data.len() == 1024
        ));
        let refused = Operation::Refuse(Status::IoError);
        for (sector, len) in [
            (99, 1024),
            (100, 512),
            (u64::MAX, 512),
            (1 << 60, 512),
            (0, 100),
        ] {
            assert_eq!(transfer(read, sector, len, LIMITS), refused);
            assert_eq!(
                transfer(ids::VIRTIO_BLK_T_OUT, sector, len, LIMITS),
                refused
            );
        }
    }

    #[test]
    fn a_read_only_device_refuses_what_writes() {
        let read_only = Limits {
            read_only: true,
            ..LIMITS
        };
        assert_eq!(
            transfer(ids::VIRTIO_BLK_T_OUT, 0, 512, read_only),
            Operation::Refuse(Status::IoError)
        );
        for kind in [
            ids::VIRTIO_BLK_T_FLUSH,
            ids::VIRTIO_BLK_T_DISCARD,
            ids::VIRTIO_BLK_T_WRITE_ZEROES,
        ] {
            assert_eq!(
                transfer(kind, 0, 16, read_only),
                Operation::Refuse(Status::Unsupported)
            );
        }
        assert!(matches!(
            transfer(ids::VIRTIO_BLK_T_IN, 0, 512, read_only),
            Operation::Read { .. }
        ));
    }

    #[test]
    fn ranges_are_checked() {
        let mem = memory();
        let write = |sector: u64, sectors: u32, flags: u32| {
            let range = RawRange {
                sector: sector.into(),
                sectors: sectors.into(),
                flags: flags.into(),
            };
            mem.write_obj(range, GuestAddress(0x6000)).unwrap();
        };
        let (discard, zero) = (ids::VIRTIO_BLK_T_DISCARD, ids::VIRTIO_BLK_T_WRITE_ZEROES);
        write(10, 20, 1);
        assert_eq!(
            transfer(zero, 0, 16, LIMITS),
            Operation::WriteZeroes(vec![Range {
                offset: 5120,
                len: 10_240,
                unmap: true
            }])
        );
        assert_eq!(
            transfer(discard, 0, 16, LIMITS),
            Operation::Refuse(Status::Unsupported)
        );
        write(10, 20, 2);
        assert_eq!(
            transfer(zero, 0, 16, LIMITS),
            Operation::Refuse(Status::Unsupported)
        );
        write(10, 20, 0);
        assert!(matches!(
            transfer(discard, 0, 16, LIMITS),
            Operation::Discard(_)
        ));
        let refused = Operation::Refuse(Status::IoError);
        for len in [0, 15, 17, 17 * 16] {
            assert_eq!(transfer(discard, 0, len, LIMITS), refused);
        }
        for (sector, sectors) in [(90, 11), (u64::MAX, 1), (0, u32::MAX)] {
            write(sector, sectors, 0);
            assert_eq!(transfer(discard, 0, 16, LIMITS), refused);
        }
    }

    #[test]
    fn framing_does_not_matter_but_the_status_byte_must_exist() {
        write_header(&memory(), 0x4000, ids::VIRTIO_BLK_T_IN, 1);
        let chain = [
            Desc::readable(0x4000, 3),
            Desc::readable(0x4003, 13),
            Desc::writable(0x5000, 100),
            Desc::writable(0x6000, 413),
        ];
        let request = parse(&chain, LIMITS).unwrap();
        assert!(
            matches!(&request.operation, Operation::Read { offset: 512, data } if data.len() == 512)
        );
        request.answer(&memory(), Status::Unsupported);
        let status: u8 = memory().read_obj(GuestAddress(0x6000 + 412)).unwrap();
        assert_eq!(status, 2);
        assert!(matches!(
            parse(&chain[..2], LIMITS),
            Err(ChainError::TooShort { .. })
        ));
        let short = [Desc::readable(0x4000, 15), Desc::writable(0x5000, 1)];
        assert_eq!(
            parse(&short, LIMITS).unwrap().operation,
            Operation::Refuse(Status::IoError)
        );
    }

    proptest! {
        /// Whatever the chain and the bytes: an error, or an operation within the limits.
        #[test]
        fn any_bytes_become_operations_within_the_limits(
            descriptors in prop::collection::vec(Desc::any(), 1..8),
            kind in prop_oneof![0u32..20, any::<u32>()],
            sector in prop_oneof![0u64..200, any::<u64>()],
            noise in prop::collection::vec(any::<u8>(), 0x400),
            read_only: bool,
        ) {
            let mem = memory();
            mem.write_slice(&noise, GuestAddress(0x4000)).unwrap();
            write_header(&mem, 0x4100, kind, sector);
            let limits = Limits { sectors: 100, read_only };
            let mut chain = vec![Desc::readable(0x4100, 16)];
            chain.extend(descriptors);
            let Ok(request) = parse(&chain, limits) else { return Ok(()); };
            let fits = |offset: u64, len: u64| offset + len <= limits.sectors * SECTOR;
            match request.operation {
                Operation::Read { offset, data } => prop_assert!(fits(offset, data.len() as u64)),
                Operation::Write { offset, data } => {
                    prop_assert!(!read_only && fits(offset, data.len() as u64));
                }
                Operation::Discard(ranges) | Operation::WriteZeroes(ranges) => {
                    prop_assert!(!read_only && ranges.len() <= MAX_RANGES as usize);
                    prop_assert!(ranges.iter().all(|range| fits(range.offset, range.len)));
                }
                Operation::Flush => prop_assert!(!read_only),
                Operation::GetId { .. } | Operation::Refuse(_) => {}
            }
        }
    }
}
