//! The guest-physical memory map.
//!
//! ```text
//! 0x0000_0010            MP floating pointer (the first place where Linux looks for it)
//! 0x0000_0500            GDT
//! 0x0000_7000            boot_params ("zero page")
//! 0x0000_8ff0            boot stack, growing down
//! 0x0000_9000            page tables: PML4, PDPT, PD
//! 0x0001_f000            setup_data: random seed
//! 0x0002_0000            kernel command line
//! 0x0009_fc00            MP configuration table, up to 640 KiB
//! 0x0010_0000            RAM, up to 3.25 GiB
//! 0xd000_0000            virtio-mmio windows, 4 KiB each
//! 0xfec0_0000            IO-APIC (KVM)
//! 0xfee0_0000            local APICs (KVM)
//! 0xfffb_c000            identity map page and TSS that KVM needs on VMX
//! 0x1_0000_0000          the rest of RAM
//! behind it              memory that can be plugged, from a multiple of 2 GiB on
//! ```

use vm_memory::GuestAddress;

/// MP floating pointer structure (Intel MultiProcessor Specification 1.4, §4.1).
pub const MP_FLOATING_POINTER: GuestAddress = GuestAddress(0x10);
/// Global descriptor table.
pub const GDT: GuestAddress = GuestAddress(0x500);
/// `struct boot_params`.
pub const BOOT_PARAMS: GuestAddress = GuestAddress(0x7000);
/// Initial stack pointer.
pub const BOOT_STACK: u64 = 0x8ff0;
/// Root of the boot page tables.
pub const PML4: GuestAddress = GuestAddress(0x9000);
/// Second level: one entry for each GiB.
pub const PDPT: GuestAddress = GuestAddress(0xa000);
/// Third level: 512 pages of 2 MiB, the first GiB mapped onto itself.
pub const PD: GuestAddress = GuestAddress(0xb000);
/// `struct setup_data` with the random seed.
pub const SETUP_DATA: GuestAddress = GuestAddress(0x1_f000);
/// Kernel command line, NUL-terminated.
pub const COMMAND_LINE: GuestAddress = GuestAddress(0x2_0000);
/// Longest command line in bytes, NUL included (COMMAND_LINE_SIZE of Linux on x86).
pub const COMMAND_LINE_MAX: usize = 2048;
/// MP configuration table; also the end of the low RAM that Linux may use.
pub const MP_TABLE: GuestAddress = GuestAddress(0x9_fc00);
/// End of the space for the MP configuration table.
pub const MP_TABLE_END: u64 = 0xa_0000;
/// Start of RAM above the legacy hole.
pub const HIGH_RAM: u64 = 0x10_0000;
/// End of RAM below the device windows.
pub const LOW_RAM_END: u64 = 0xd000_0000;
/// First virtio-mmio window.
pub const MMIO_BASE: u64 = 0xd000_0000;
/// IO-APIC registers.
pub const IO_APIC: u32 = 0xfec0_0000;
/// Local APIC registers.
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// Page for KVM's identity map on VMX.
pub const IDENTITY_MAP: u64 = 0xfffb_c000;
/// Three pages for KVM's TSS on VMX.
pub const TSS: usize = 0xfffb_d000;
/// Start of RAM above 4 GiB.
pub const RAM_ABOVE_4G: u64 = 1 << 32;

/// Linux adds memory in blocks of 128 MiB, and of up to 2 GiB where it booted with 64 GiB or more
/// (`probe_memory_block_size()`). A part of one at the start or end of a region it leaves alone.
const MEMORY_BLOCK: u64 = 128 << 20;
/// See [`MEMORY_BLOCK`].
const LARGEST_MEMORY_BLOCK: u64 = 2 << 30;
/// See [`MEMORY_BLOCK`].
const MUCH_MEMORY: u64 = 64 << 30;

/// Interrupt lines of the IO-APIC for devices. 0 to 4 are the timer, cascade and serial lines.
pub const FIRST_DEVICE_IRQ: u32 = 5;
/// Interrupt lines of spare slots. The guest is not told of them at its boot, and sets each up when
/// a device is there that needs it; it takes a number of 16 and more for the pin of that number.
pub const FIRST_SPARE_IRQ: u32 = 16;
/// One past the last pin of KVM's IO-APIC.
pub const IRQ_END: u32 = 24;

/// RAM ranges (start, length in bytes) for a guest of `bytes` bytes.
pub fn ram_ranges(bytes: u64) -> Vec<(GuestAddress, usize)> {
    let low = bytes.min(LOW_RAM_END);
    let mut ranges = vec![(GuestAddress(0), low as usize)];
    if bytes > low {
        ranges.push((GuestAddress(RAM_ABOVE_4G), (bytes - low) as usize));
    }
    ranges
}

/// Where memory begins that can be plugged into a guest of `bytes` bytes.
pub fn hotplug_start(bytes: u64) -> GuestAddress {
    let above_4g = bytes.saturating_sub(LOW_RAM_END);
    GuestAddress(RAM_ABOVE_4G + above_4g.next_multiple_of(LARGEST_MEMORY_BLOCK))
}

/// How long the region must be for a guest of `bytes` bytes to take `hotplug` bytes more: whole
/// blocks.
pub fn hotplug_region(bytes: u64, hotplug: u64) -> u64 {
    hotplug.next_multiple_of(if bytes < MUCH_MEMORY {
        MEMORY_BLOCK
    } else {
        LARGEST_MEMORY_BLOCK
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_guests_have_one_range() {
        assert_eq!(ram_ranges(128 << 20), [(GuestAddress(0), 128 << 20)]);
    }

    #[test]
    fn memory_is_plugged_behind_the_rest() {
        assert_eq!(hotplug_start(128 << 20), GuestAddress(RAM_ABOVE_4G));
        assert_eq!(hotplug_start(LOW_RAM_END), GuestAddress(RAM_ABOVE_4G));
        assert_eq!(
            hotplug_start(LOW_RAM_END + 1),
            GuestAddress(RAM_ABOVE_4G + (2 << 30))
        );
        assert_eq!(hotplug_region(128 << 20, 0), 0);
        assert_eq!(hotplug_region(128 << 20, 130 << 20), 256 << 20);
        assert_eq!(hotplug_region(64 << 30, 130 << 20), 2 << 30);
    }

    #[test]
    fn ram_goes_around_the_device_windows() {
        let ranges = ram_ranges(4 << 30);
        assert_eq!(ranges.len(), 2);
        assert_eq!(ranges[0].1 as u64, LOW_RAM_END);
        assert_eq!(ranges[1].0.0, RAM_ABOVE_4G);
        assert_eq!(
            ranges.iter().map(|range| range.1 as u64).sum::<u64>(),
            4 << 30
        );
    }
}
