//! `struct boot_params`: memory map, command line and random seed for the kernel
//! (Documentation/arch/x86/{boot,zero-page}.rst).

use linux_loader::loader::bootparam::boot_params;
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use super::layout;

/// `setup_header.boot_flag`.
const BOOT_FLAG: u16 = 0xaa55;
/// `setup_header.header`, "HdrS".
const HEADER_MAGIC: u32 = 0x5372_6448;
/// `setup_header.type_of_loader`: "undefined".
const LOADER_UNDEFINED: u8 = 0xff;
/// `setup_header.version`: protocol 2.15, the first that is sure to know every setup_data type.
const PROTOCOL_VERSION: u16 = 0x020f;
/// `setup_header.root_flags`: the root file system is mounted read-only, as "ro" would say.
const ROOT_READ_ONLY: u16 = 1;
/// E820 type of usable memory.
const E820_RAM: u32 = 1;
/// `setup_data.type`: seed for the random number generator (SETUP_RNG_SEED).
const SETUP_RNG_SEED: u32 = 9;
/// Length of that seed in bytes: what the kernel's generator can take in whole.
pub const SEED_LEN: usize = 32;

/// `struct boot_params` in a form that can be written to guest memory.
#[derive(Clone, Copy, Default)]
#[repr(transparent)]
struct BootParams(boot_params);

// SAFETY: `boot_params` is plain old data generated from the kernel's header: integers and arrays
// of integers, packed, without padding that carries meaning.
unsafe impl ByteValued for BootParams {}

/// Header and payload of the seed's `struct setup_data`.
#[derive(Clone, Copy)]
#[repr(C, packed)]
struct SeedSetupData {
    next: u64,
    kind: u32,
    len: u32,
    seed: [u8; SEED_LEN],
}

// SAFETY: packed, integers only.
unsafe impl ByteValued for SeedSetupData {}

/// Writes boot parameters, command line (without its NUL) and seed where [`layout`] says.
///
/// # Errors
/// When guest memory is smaller than the layout needs.
pub fn write(
    memory: &GuestMemoryMmap,
    ram_bytes: u64,
    command_line: &str,
    seed: [u8; SEED_LEN],
) -> Result<(), GuestMemoryError> {
    memory.write_slice(command_line.as_bytes(), layout::COMMAND_LINE)?;
    let end = GuestAddress(layout::COMMAND_LINE.0 + command_line.len() as u64);
    memory.write_obj(0u8, end)?;

    let setup_data = SeedSetupData {
        next: 0,
        kind: SETUP_RNG_SEED,
        len: SEED_LEN as u32,
        seed,
    };
    memory.write_obj(setup_data, layout::SETUP_DATA)?;

    let mut params = BootParams::default();
    let header = &mut params.0.hdr;
    header.root_flags = ROOT_READ_ONLY;
    header.boot_flag = BOOT_FLAG;
    header.header = HEADER_MAGIC;
    header.version = PROTOCOL_VERSION;
    header.type_of_loader = LOADER_UNDEFINED;
    header.cmd_line_ptr = layout::COMMAND_LINE.0 as u32;
    header.cmdline_size = command_line.len() as u32;
    header.setup_data = layout::SETUP_DATA.0;
    for (slot, (start, len)) in e820_ram(ram_bytes).into_iter().enumerate() {
        let entry = &mut params.0.e820_table[slot];
        entry.addr = start;
        entry.size = len;
        entry.type_ = E820_RAM;
        params.0.e820_entries = slot as u8 + 1;
    }
    memory.write_obj(params, layout::BOOT_PARAMS)
}

/// Usable RAM as (start, length): all of it but the legacy hole below 1 MiB, whose first KiB holds
/// the MP table.
fn e820_ram(ram_bytes: u64) -> Vec<(u64, u64)> {
    let mut usable = vec![(0, layout::MP_TABLE.0)];
    for (start, len) in layout::ram_ranges(ram_bytes) {
        let end = start.0 + len as u64;
        let start = start.0.max(layout::HIGH_RAM);
        usable.push((start, end.saturating_sub(start)));
    }
    usable
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_map_leaves_the_legacy_hole_out() {
        assert_eq!(
            e820_ram(128 << 20),
            [(0, 0x9_fc00), (0x10_0000, (128 << 20) - 0x10_0000)]
        );
    }

    #[test]
    fn everything_lands_where_the_boot_protocol_has_it() {
        let ranges = layout::ram_ranges(64 << 20);
        let memory = GuestMemoryMmap::<()>::from_ranges(&ranges).unwrap();
        write(&memory, 64 << 20, "root=/dev/vda", [7; SEED_LEN]).unwrap();

        // Offsets from Documentation/arch/x86/zero-page.rst and boot.rst.
        let at = |offset: u64| GuestAddress(layout::BOOT_PARAMS.0 + offset);
        assert_eq!(memory.read_obj::<u8>(at(0x1e8)).unwrap(), 2, "e820_entries");
        assert_eq!(memory.read_obj::<u16>(at(0x1fe)).unwrap(), 0xaa55);
        assert_eq!(memory.read_obj::<u32>(at(0x202)).unwrap(), 0x5372_6448);
        assert_eq!(memory.read_obj::<u32>(at(0x228)).unwrap(), 0x2_0000);
        assert_eq!(memory.read_obj::<u64>(at(0x250)).unwrap(), 0x1_f000);
        assert_eq!(memory.read_obj::<u64>(at(0x2d0 + 20)).unwrap(), 0x10_0000);

        let mut line = [0u8; 14];
        memory.read_slice(&mut line, layout::COMMAND_LINE).unwrap();
        assert_eq!(&line, b"root=/dev/vda\0");
        let seed_type: u32 = memory
            .read_obj(GuestAddress(layout::SETUP_DATA.0 + 8))
            .unwrap();
        assert_eq!(seed_type, 9);
    }
}
