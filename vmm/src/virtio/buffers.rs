//! The buffers of a descriptor chain, checked once.
//!
//! A chain is read from guest memory exactly once, into a [`Buffers`] value with a bounded number
//! of segments, each of which lies in guest memory. The devices parse requests from the two byte
//! streams and never look at descriptors again, so the driver can't change a length or an address
//! between check and use; nor does it matter how a driver cuts a request into descriptors
//! (virtio 1.3 §2.7.4: devices make no assumption about framing).

use super::queue::Chain;
use smallvec::SmallVec;
use vm_memory::volatile_memory::VolatileSlice;
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemory, GuestMemoryMmap};

/// What is wrong with a chain. All of it breaks rules that virtio 1.3 §2.7 has for drivers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// §2.7.5: the chain leads out of the table, loops, or is longer than 2^32 bytes.
    #[error("descriptor chain {head} is broken or loops")]
    Broken {
        /// Index of the chain's head.
        head: u16,
    },
    /// More descriptors than the device has told the driver.
    #[error("descriptor chain {head} has more than {max} descriptors")]
    TooLong {
        /// Index of the chain's head.
        head: u16,
        /// The device's limit.
        max: usize,
    },
    /// §2.7.4.2: device-readable descriptors come first.
    #[error("descriptor chain {head} has a readable descriptor after a writable one")]
    Order {
        /// Index of the chain's head.
        head: u16,
    },
    /// A buffer lies outside RAM, if only with its last byte.
    #[error(
        "descriptor chain {head} has a buffer of {len} bytes at {address:#x}, which does not lie in \
         guest memory"
    )]
    OutsideMemory {
        /// Index of the chain's head.
        head: u16,
        /// Start of the buffer.
        address: u64,
        /// Its length in bytes.
        len: u32,
    },
    /// The chain has no room for what the device must write or lacks what it must read.
    #[error("descriptor chain {head} has no room for {what}")]
    TooShort {
        /// Index of the chain's head.
        head: u16,
        /// What is missing.
        what: &'static str,
    },
}

/// A piece of guest memory, known to lie in one region.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    address: GuestAddress,
    len: usize,
}

/// Segments, or slices, of a usual chain: so many need no allocation.
const USUAL: usize = 6;

/// Pieces of guest memory, as the VMM has it mapped.
pub type Slices<'m> = SmallVec<[VolatileSlice<'m>; USUAL]>;

/// A stream of bytes in guest memory.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Segments(SmallVec<[Segment; USUAL]>);

/// The two streams of a chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Buffers {
    /// Index of the chain's head, by which it is returned.
    pub head: u16,
    /// What the driver says to the device.
    pub readable: Segments,
    /// Room for the answer.
    pub writable: Segments,
}

impl Buffers {
    /// Walks the chain, at most `max` descriptors of it, empty ones included.
    pub fn collect(chain: Chain, mem: &GuestMemoryMmap, max: usize) -> Result<Self, ChainError> {
        let head = chain.head_index();
        let mut buffers = Buffers {
            head,
            readable: Segments::default(),
            writable: Segments::default(),
        };
        // The iterator ends both at the end of the chain and where the chain is broken; the last
        // descriptor's NEXT flag tells which it was.
        let mut expect_more = true;
        let mut count = 0;
        let mut writing = false;
        for descriptor in chain {
            count += 1;
            if count > max {
                return Err(ChainError::TooLong { head, max });
            }
            expect_more = descriptor.has_next();
            if writing && !descriptor.is_write_only() {
                return Err(ChainError::Order { head });
            }
            writing = descriptor.is_write_only();
            let segment = Segment {
                address: descriptor.addr(),
                len: descriptor.len() as usize,
            };
            if segment.len == 0 {
                continue;
            }
            if mem.get_slice(segment.address, segment.len).is_err() {
                return Err(ChainError::OutsideMemory {
                    head,
                    address: descriptor.addr().0,
                    len: descriptor.len(),
                });
            }
            if writing {
                buffers.writable.0.push(segment);
            } else {
                buffers.readable.0.push(segment);
            }
        }
        if expect_more {
            return Err(ChainError::Broken { head });
        }
        Ok(buffers)
    }
}

impl Segments {
    /// Length in bytes. Chains are at most 2^32 bytes long, so the sum can't overflow.
    pub fn len(&self) -> usize {
        self.0.iter().map(|segment| segment.len).sum()
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Takes the first `count` bytes off, or as many as there are.
    pub fn take_front(&mut self, count: usize) -> Segments {
        let mut left = count;
        let mut taken = SmallVec::new();
        let mut rest = SmallVec::new();
        for segment in self.0.drain(..) {
            let len = segment.len.min(left);
            left -= len;
            if len > 0 {
                taken.push(Segment { len, ..segment });
            }
            if len < segment.len {
                rest.push(Segment {
                    // Can't overflow: the whole segment lies in memory.
                    address: GuestAddress(segment.address.0 + len as u64),
                    len: segment.len - len,
                });
            }
        }
        self.0 = rest;
        Segments(taken)
    }

    /// Takes the last `count` bytes off; `None` if there are fewer.
    pub fn take_back(&mut self, count: usize) -> Option<Segments> {
        let keep = self.len().checked_sub(count)?;
        let front = self.take_front(keep);
        Some(std::mem::replace(self, front))
    }

    /// The bytes as slices of the VMM's mapping.
    pub fn slices<'m>(&self, mem: &'m GuestMemoryMmap) -> Slices<'m> {
        self.0
            .iter()
            // Was checked in `collect`; memory does not shrink.
            .filter_map(|segment| mem.get_slice(segment.address, segment.len).ok())
            .collect()
    }

    /// Copies bytes out, as many as there are in both; returns how many.
    pub fn read(&self, mem: &GuestMemoryMmap, into: &mut [u8]) -> usize {
        let mut done = 0;
        for slice in self.slices(mem) {
            let Some(rest) = into.get_mut(done..) else {
                break;
            };
            done += slice.copy_to(rest);
        }
        done
    }

    /// Copies bytes in, as many as there are in both; returns how many.
    pub fn write(&self, mem: &GuestMemoryMmap, from: &[u8]) -> usize {
        let mut done = 0;
        for slice in self.slices(mem) {
            let Some(rest) = from.get(done..).filter(|rest| !rest.is_empty()) else {
                break;
            };
            let len = rest.len().min(slice.len());
            let Ok(()) = slice.write_slice(&rest[..len], 0) else {
                break;
            };
            done += len;
        }
        done
    }

    /// Takes an object off the front; `None` if there are too few bytes.
    pub fn take_object<T: ByteValued + Default>(&mut self, mem: &GuestMemoryMmap) -> Option<T> {
        let front = self.take_front(size_of::<T>());
        let mut object = T::default();
        (front.read(mem, object.as_mut_slice()) == size_of::<T>()).then_some(object)
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Desc, DriverQueue, memory};
    use super::*;
    use proptest::prelude::*;

    fn collect(descriptors: &[Desc], max: usize) -> Result<Buffers, ChainError> {
        let mem = memory();
        let mut driver = DriverQueue::new(&mem, 16);
        driver.add(descriptors);
        let mut queue = driver.device_side(&mem);
        Buffers::collect(queue.pop(&mem).unwrap().unwrap(), &mem, max)
    }

    #[test]
    fn streams_are_cut_anywhere() {
        let mem = memory();
        mem.write_slice(b"hello", GuestAddress(0x4000)).unwrap();
        mem.write_slice(b" world", GuestAddress(0x5000)).unwrap();
        let mut buffers = collect(
            &[
                Desc::readable(0x4000, 5),
                Desc::readable(0x4800, 0),
                Desc::readable(0x5000, 6),
                Desc::writable(0x6000, 4),
            ],
            4,
        )
        .unwrap();
        assert_eq!(buffers.readable.len(), 11);
        assert_eq!(buffers.writable.len(), 4);
        let front = buffers.readable.take_front(7);
        let mut text = [0; 16];
        assert_eq!(front.read(&mem, &mut text), 7);
        assert_eq!(&text[..7], b"hello w");
        let back = buffers.readable.take_back(2).unwrap();
        assert_eq!(back.read(&mem, &mut text), 2);
        assert_eq!(&text[..2], b"ld");
        assert_eq!(buffers.readable.read(&mem, &mut text), 2);
        assert_eq!(&text[..2], b"or");
        assert!(buffers.readable.take_back(3).is_none());
        assert_eq!(buffers.writable.write(&mem, b"123456"), 4);
        assert_eq!(
            mem.read_obj::<u32>(GuestAddress(0x6000)).unwrap(),
            u32::from_le_bytes(*b"1234")
        );
    }

    #[test]
    fn bad_chains_are_told_apart() {
        let end = memory().last_addr().0 + 1;
        assert!(matches!(
            collect(&[Desc::writable(0x4000, 4), Desc::readable(0x5000, 4)], 8),
            Err(ChainError::Order { .. })
        ));
        assert!(matches!(
            collect(&[Desc::readable(0x4000, 4), Desc::readable(0x5000, 4)], 1),
            Err(ChainError::TooLong { max: 1, .. })
        ));
        assert!(collect(&[Desc::readable(end - 4, 4)], 8).is_ok());
        for (address, len) in [(end - 4, 5), (end, 1), (u64::MAX, 1), (u64::MAX - 3, 8)] {
            assert!(matches!(
                collect(&[Desc::readable(address, len)], 8),
                Err(ChainError::OutsideMemory { .. })
            ));
        }
        // A loop: the second descriptor leads back to the first.
        let looped = [Desc::readable(0x4000, 4), Desc::readable(0x5000, 4).next(0)];
        assert!(matches!(
            collect(&looped, 100),
            Err(ChainError::Broken { .. })
        ));
        assert!(matches!(
            collect(&looped, 8),
            Err(ChainError::TooLong { .. })
        ));
        let out_of_table = [
            Desc::readable(0x4000, 4),
            Desc::readable(0x5000, 4).next(99),
        ];
        assert!(matches!(
            collect(&out_of_table, 100),
            Err(ChainError::Broken { .. })
        ));
    }

    proptest! {
        /// Random descriptors, indirect ones among them, give an error or streams within memory.
        #[test]
        fn any_chain_is_refused_or_lies_in_memory(
            descriptors in prop::collection::vec(Desc::any(), 1..16),
            cut in 0usize..0x4000,
        ) {
            if let Ok(buffers) = collect(&descriptors, 32) {
                let mem = memory();
                for mut stream in [buffers.readable, buffers.writable] {
                    let len = stream.len();
                    prop_assert!(stream.0.len() <= 32);
                    prop_assert_eq!(stream.slices(&mem).iter().map(VolatileSlice::len).sum::<usize>(), len);
                    let front = stream.take_front(cut);
                    prop_assert_eq!(front.len(), cut.min(len));
                    prop_assert_eq!(front.len() + stream.len(), len);
                }
            }
        }
    }
}
