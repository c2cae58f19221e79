//! What the devices' tests have in common: the fake driver, guest memory, and descriptors of a
//! hostile guest's.

pub use super::fake_driver::*;
use proptest::prelude::*;
use vm_memory::{GuestAddress, GuestMemoryMmap};

/// Flag of a descriptor that points to a table of descriptors (virtio 1.3 §2.7.5.3).
const INDIRECT: u16 = 4;

/// Size of the guest memory that [`memory`] makes; the rings of the first queue are below 0x4000.
pub const MEMORY_SIZE: usize = 0x40_0000;

thread_local! {
    static MEMORY: GuestMemoryMmap =
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY_SIZE)]).unwrap();
}

/// Guest memory, the same for all calls on one thread: making it anew for each of thousands of
/// cases of a property would be slow.
pub fn memory() -> GuestMemoryMmap {
    MEMORY.with(GuestMemoryMmap::clone)
}

impl Desc {
    /// Any descriptor, mostly one that looks sane.
    pub fn any() -> impl Strategy<Value = Desc> {
        let address = prop_oneof![
            8 => 0x4000u64..0x8000,
            // Overlaps the rings, so that tables are read from what was written there.
            1 => 0u64..0x4000,
            1 => MEMORY_SIZE as u64 - 64..MEMORY_SIZE as u64 + 64,
            1 => any::<u64>(),
        ];
        let len = prop_oneof![8 => 0u32..0x1000, 1 => any::<u32>()];
        let flags = prop_oneof![
            8 => prop_oneof![Just(0), Just(WRITE)],
            1 => Just(INDIRECT),
            1 => any::<u16>(),
        ];
        let next = prop_oneof![6 => Just(None), 1 => any::<u16>().prop_map(Some)];
        (address, len, flags, next)
            .prop_map(|(address, len, flags, next)| Desc::raw(address, len, flags, next))
    }
}
