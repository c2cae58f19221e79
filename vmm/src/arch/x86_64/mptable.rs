//! MP table: how a guest without ACPI learns of its processors and its IO-APIC
//! (Intel MultiProcessor Specification, version 1.4).

use vm_memory::{Bytes, GuestMemoryError, GuestMemoryMmap};

use super::layout;

/// Local APIC version as KVM's LAPIC reports it.
const LOCAL_APIC_VERSION: u8 = 0x14;
/// IO-APIC version as KVM's IO-APIC reports it.
const IO_APIC_VERSION: u8 = 0x11;
/// Entry types, §4.3.
const ENTRY_PROCESSOR: u8 = 0;
const ENTRY_BUS: u8 = 1;
const ENTRY_IO_APIC: u8 = 2;
const ENTRY_IO_INTERRUPT: u8 = 3;
const ENTRY_LOCAL_INTERRUPT: u8 = 4;
/// Interrupt types, table 4-10.
const INTERRUPT_INT: u8 = 0;
const INTERRUPT_NMI: u8 = 1;
const INTERRUPT_EXTINT: u8 = 3;
/// Processor flags, table 4-4.
const CPU_ENABLED: u8 = 1;
const CPU_BOOTSTRAP: u8 = 2;
/// Length of the configuration table's header.
const HEADER_LEN: usize = 44;

/// Line of the timer, which Linux looks for even where it has a better one.
const TIMER_IRQ: u8 = 0;

/// Writes the floating pointer and the configuration table for `vcpus` processors and the
/// interrupt lines of `devices` devices. Linux prepares each line in the table when it boots: 4,000
/// instructions. So those of spare slots are not in it.
///
/// # Errors
/// When guest memory is smaller than the layout needs.
pub fn write(memory: &GuestMemoryMmap, vcpus: u8, devices: usize) -> Result<(), GuestMemoryError> {
    let table = configuration_table(vcpus, devices);
    debug_assert!(layout::MP_TABLE.0 + table.len() as u64 <= layout::MP_TABLE_END);
    memory.write_slice(&table, layout::MP_TABLE)?;
    memory.write_slice(&floating_pointer(), layout::MP_FLOATING_POINTER)
}

/// §4.1: 16 bytes with the table's address.
fn floating_pointer() -> [u8; 16] {
    let mut pointer = [0u8; 16];
    pointer[0..4].copy_from_slice(b"_MP_");
    pointer[4..8].copy_from_slice(&(layout::MP_TABLE.0 as u32).to_le_bytes());
    pointer[8] = 1; // length in units of 16 bytes
    pointer[9] = 4; // specification 1.4
    pointer[10] = checksum(&pointer);
    pointer
}

/// §4.2 and §4.3.
fn configuration_table(vcpus: u8, devices: usize) -> Vec<u8> {
    // Ids: processors are 0..vcpus, the IO-APIC comes after them.
    let io_apic_id = vcpus;
    let mut entries = Vec::new();
    let mut count: u16 = 0;
    let mut push = |entry: &[u8]| {
        entries.extend_from_slice(entry);
        count += 1;
    };

    for id in 0..vcpus {
        let flags = CPU_ENABLED | if id == 0 { CPU_BOOTSTRAP } else { 0 };
        let mut entry = [0u8; 20];
        entry[0] = ENTRY_PROCESSOR;
        entry[1] = id;
        entry[2] = LOCAL_APIC_VERSION;
        entry[3] = flags;
        entry[4..8].copy_from_slice(&0x600u32.to_le_bytes()); // family 6, for the record
        entry[8..12].copy_from_slice(&0x201u32.to_le_bytes()); // FPU and APIC on chip
        push(&entry);
    }
    push(&[ENTRY_BUS, 0, b'I', b'S', b'A', b' ', b' ', b' ']);

    let [a, b, c, d] = layout::IO_APIC.to_le_bytes();
    push(&[
        ENTRY_IO_APIC,
        io_apic_id,
        IO_APIC_VERSION,
        1, // usable
        a,
        b,
        c,
        d,
    ]);
    let device_irqs = (layout::FIRST_DEVICE_IRQ as u8..layout::FIRST_SPARE_IRQ as u8).take(devices);
    for irq in std::iter::once(TIMER_IRQ).chain(device_irqs) {
        push(&[
            ENTRY_IO_INTERRUPT,
            INTERRUPT_INT,
            0, // polarity and trigger as the bus has them
            0,
            0, // bus 0
            irq,
            io_apic_id,
            irq,
        ]);
    }
    push(&[ENTRY_LOCAL_INTERRUPT, INTERRUPT_EXTINT, 0, 0, 0, 0, 0, 0]);
    push(&[ENTRY_LOCAL_INTERRUPT, INTERRUPT_NMI, 0, 0, 0, 0, 0xff, 1]);

    let mut table = vec![0u8; HEADER_LEN];
    table[0..4].copy_from_slice(b"PCMP");
    let length = (HEADER_LEN + entries.len()) as u16;
    table[4..6].copy_from_slice(&length.to_le_bytes());
    table[6] = 4; // specification 1.4
    table[8..16].copy_from_slice(b"BULKHEAD");
    table[16..28].copy_from_slice(b"MICROVM     ");
    table[34..36].copy_from_slice(&count.to_le_bytes());
    table[36..40].copy_from_slice(&layout::LOCAL_APIC.to_le_bytes());
    table.extend_from_slice(&entries);
    table[7] = checksum(&table);
    table
}

/// The byte that makes all bytes add up to 0.
fn checksum(bytes: &[u8]) -> u8 {
    bytes
        .iter()
        .fold(0u8, |sum, byte| sum.wrapping_add(*byte))
        .wrapping_neg()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn checksums_hold_and_the_table_fits_for_every_vcpu_count() {
        assert_eq!(sum(&floating_pointer()), 0);
        for vcpus in 1..=bulkhead_proto::vmm::MAX_VCPUS {
            let table = configuration_table(vcpus, usize::MAX);
            assert_eq!(sum(&table), 0);
            assert_eq!(
                usize::from(u16::from_le_bytes([table[4], table[5]])),
                table.len()
            );
            assert!(layout::MP_TABLE.0 + table.len() as u64 <= layout::MP_TABLE_END);
        }
    }

    #[test]
    fn the_table_has_the_lines_of_the_timer_and_of_each_device() {
        let table = configuration_table(1, 2);
        // Behind a processor, a bus and an IO-APIC.
        let lines: Vec<u8> = table[HEADER_LEN + 20 + 8 + 8..]
            .chunks(8)
            .take_while(|entry| entry[0] == ENTRY_IO_INTERRUPT)
            .map(|entry| entry[7])
            .collect();
        assert_eq!(lines, [0, 5, 6]);
    }
}
