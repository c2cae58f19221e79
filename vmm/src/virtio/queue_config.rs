//! A virtqueue as its driver configures it, and the checks that make a ring of that.

use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemory, GuestMemoryMmap};

/// What the driver wrote into a queue's registers; nothing of it is checked.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueConfig {
    /// QueueSize, in descriptors.
    pub size: u32,
    /// QueueReady.
    pub ready: bool,
    /// QueueDesc: address of the descriptor table.
    pub descriptor_table: u64,
    /// QueueDriver: address of the available ring.
    pub available_ring: u64,
    /// QueueDevice: address of the used ring.
    pub used_ring: u64,
}

/// Why a driver's queue configuration can't be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum QueueConfigError {
    /// Virtio 1.3 §2.7: queue sizes are powers of two, at most the size offered.
    #[error("queue {index} has size {size}, not a power of two up to {max}")]
    Size {
        /// Which queue.
        index: usize,
        /// As configured.
        size: u32,
        /// As offered.
        max: u16,
    },
    /// Virtio 1.3 §2.7: alignments are 16, 2 and 4 bytes.
    #[error("the {part} of queue {index} is at {address:#x}, which is not aligned")]
    Alignment {
        /// Which queue.
        index: usize,
        /// Which of its three parts.
        part: &'static str,
        /// As configured.
        address: u64,
    },
    /// A part lies outside RAM, if only with its last byte.
    #[error("the {part} of queue {index} at {address:#x} does not lie in guest memory")]
    OutsideMemory {
        /// Which queue.
        index: usize,
        /// Which of its three parts.
        part: &'static str,
        /// As configured.
        address: u64,
    },
    /// Address 0 is where a queue is that was never configured; virtio-queue refuses it too.
    #[error("queue {index} is ready but its {part} was not configured")]
    Unconfigured {
        /// Which queue.
        index: usize,
        /// Which of its three parts.
        part: &'static str,
    },
}

impl QueueConfig {
    /// Checks the configuration of queue `index` (virtio 1.3 §2.7) and makes the ring of it. A
    /// queue that is not ready gives a ring that never has chains.
    pub fn validate(
        &self,
        index: usize,
        max: u16,
        event_idx: bool,
        mem: &GuestMemoryMmap,
    ) -> Result<Queue, QueueConfigError> {
        let size_error = QueueConfigError::Size {
            index,
            size: self.size,
            max,
        };
        let mut ring = Queue::new(max).map_err(|_| size_error)?;
        if !self.ready {
            return Ok(ring);
        }
        let size = u16::try_from(self.size).map_err(|_| size_error)?;
        ring.try_set_size(size).map_err(|_| size_error)?;
        let entries = usize::from(size);
        // Lengths: virtio 1.3 §2.7; each ring ends with a 16-bit event field.
        let parts = [
            ("descriptor table", self.descriptor_table, 16, 16 * entries),
            ("available ring", self.available_ring, 2, 6 + 2 * entries),
            ("used ring", self.used_ring, 4, 6 + 8 * entries),
        ];
        for (part, address, alignment, length) in parts {
            if address == 0 {
                return Err(QueueConfigError::Unconfigured { index, part });
            }
            if address % alignment != 0 {
                return Err(QueueConfigError::Alignment {
                    index,
                    part,
                    address,
                });
            }
            if mem.get_slice(GuestAddress(address), length).is_err() {
                return Err(QueueConfigError::OutsideMemory {
                    index,
                    part,
                    address,
                });
            }
        }
        let halves = |address: u64| (Some(address as u32), Some((address >> 32) as u32));
        let (low, high) = halves(self.descriptor_table);
        ring.set_desc_table_address(low, high);
        let (low, high) = halves(self.available_ring);
        ring.set_avail_ring_address(low, high);
        let (low, high) = halves(self.used_ring);
        ring.set_used_ring_address(low, high);
        ring.set_event_idx(event_idx);
        ring.set_ready(true);
        Ok(ring)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MEM: u64 = 0x10000;

    fn memory() -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEM as usize)]).unwrap()
    }

    fn good() -> QueueConfig {
        QueueConfig {
            size: 16,
            ready: true,
            descriptor_table: 0x1000,
            available_ring: 0x2000,
            used_ring: 0x3000,
        }
    }

    #[test]
    fn sizes_other_than_powers_of_two_are_refused() {
        let mem = memory();
        for size in [0, 3, 15, 64, 128, 0x1_0010, u32::MAX] {
            let config = QueueConfig { size, ..good() };
            assert!(matches!(
                config.validate(0, 32, true, &mem),
                Err(QueueConfigError::Size { .. })
            ));
        }
        for size in [1, 2, 16, 32] {
            let ring = QueueConfig { size, ..good() }.validate(0, 32, true, &mem);
            assert_eq!(u32::from(ring.unwrap().size()), size);
        }
    }

    #[test]
    fn the_last_byte_of_each_part_must_lie_in_memory() {
        let mem = memory();
        // Exactly at the end of memory is good, one alignment step further is not.
        for (length, step, set) in [
            (
                16 * 16,
                16,
                (|c, a| c.descriptor_table = a) as fn(&mut QueueConfig, u64),
            ),
            (6 + 2 * 16, 2, |c, a| c.available_ring = a),
            (6 + 8 * 16 + 2, 4, |c, a| c.used_ring = a),
        ] {
            let mut config = good();
            set(&mut config, MEM - length);
            config.validate(0, 32, true, &mem).unwrap();
            set(&mut config, MEM - length + step);
            assert!(matches!(
                config.validate(0, 32, true, &mem),
                Err(QueueConfigError::OutsideMemory { .. })
            ));
            set(&mut config, 0u64.wrapping_sub(step));
            assert!(config.validate(0, 32, true, &mem).is_err());
            set(&mut config, MEM - length - step / 2);
            assert!(matches!(
                config.validate(0, 32, true, &mem),
                Err(QueueConfigError::Alignment { .. })
            ));
        }
    }

    proptest! {
        /// Any configuration is refused, or gives a ring that can be read and answered without an
        /// error of guest memory.
        #[test]
        fn validated_rings_lie_in_memory(
            size in prop_oneof![0u32..64, any::<u32>()],
            descriptor_table in prop_oneof![0..MEM + 64, any::<u64>()],
            available_ring in prop_oneof![0..MEM + 64, any::<u64>()],
            used_ring in prop_oneof![0..MEM + 64, any::<u64>()],
            event_idx: bool,
        ) {
            let mem = memory();
            let config = QueueConfig { size, ready: true, descriptor_table, available_ring, used_ring };
            if let Ok(mut ring) = config.validate(0, 32, event_idx, &mem) {
                prop_assert!(ring.enable_notification(&mem).is_ok());
                for _ in 0..=size {
                    prop_assert!(ring.add_used(&mem, 0, 0).is_ok());
                }
                prop_assert!(ring.needs_notification(&mem).is_ok());
            }
        }
    }
}
