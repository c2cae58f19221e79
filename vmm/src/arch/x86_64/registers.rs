//! The state in which a vCPU enters the kernel: 64-bit mode, paging on, the first GiB mapped onto
//! itself (Documentation/arch/x86/boot.rst, "64-bit Boot Protocol").

use kvm_bindings::{
    Msrs, kvm_dtable, kvm_fpu, kvm_lapic_state, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs,
};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use super::layout;

/// CR0: protected mode, extension type, paging.
const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
/// CR4: physical address extension.
const CR4_PAE: u64 = 1 << 5;
/// EFER: long mode enabled and active.
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// RFLAGS: the bit that is always set.
const RFLAGS_RESERVED: u64 = 1 << 1;
/// Page table entry bits: present, writable, 2 MiB page.
const PAGE_PRESENT: u64 = 1;
const PAGE_WRITABLE: u64 = 1 << 1;
const PAGE_LARGE: u64 = 1 << 7;

/// Selectors that the boot protocol prescribes.
const BOOT_CS: u16 = 0x10;
const BOOT_DS: u16 = 0x18;
const BOOT_TSS: u16 = 0x20;

/// IA32_MISC_ENABLE and its fast-string bit.
const MSR_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
/// IA32_MTRR_DEF_TYPE: MTRRs on, write-back by default.
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
const MTRR_ENABLE_WRITE_BACK: u64 = (1 << 11) | 6;

/// Offsets of the local vector table in the local APIC (Intel SDM 3A, table 11-1).
const APIC_LVT_LINT0: usize = 0x350;
const APIC_LVT_LINT1: usize = 0x360;
const APIC_MODE_NMI: u32 = 0x4 << 8;
const APIC_MODE_EXTINT: u32 = 0x7 << 8;

/// Writes GDT and page tables, shared by all vCPUs.
///
/// # Errors
/// When guest memory is smaller than the layout needs.
pub fn write_tables(memory: &GuestMemoryMmap) -> Result<(), GuestMemoryError> {
    let gdt: [u64; 5] = [
        0,
        0,
        descriptor(&code_segment()),
        descriptor(&data_segment()),
        descriptor(&task_segment()),
    ];
    for (index, entry) in gdt.into_iter().enumerate() {
        memory.write_obj(entry, GuestAddress(layout::GDT.0 + index as u64 * 8))?;
    }

    let table = PAGE_PRESENT | PAGE_WRITABLE;
    memory.write_obj(layout::PDPT.0 | table, layout::PML4)?;
    memory.write_obj(layout::PD.0 | table, layout::PDPT)?;
    for index in 0..512u64 {
        let entry = (index << 21) | table | PAGE_LARGE;
        memory.write_obj(entry, GuestAddress(layout::PD.0 + index * 8))?;
    }
    Ok(())
}

/// Puts a vCPU in front of the kernel's 64-bit entry point at `entry`. Further processors get the
/// same state; KVM holds them until the kernel starts them.
///
/// # Errors
/// When KVM refuses one of the register sets.
pub fn set_up(vcpu: &VcpuFd, entry: GuestAddress) -> Result<(), kvm_ioctls::Error> {
    vcpu.set_fpu(&kvm_fpu {
        fcw: 0x37f,
        mxcsr: 0x1f80,
        ..Default::default()
    })?;
    vcpu.set_regs(&kvm_regs {
        rip: entry.0,
        rsi: layout::BOOT_PARAMS.0,
        rsp: layout::BOOT_STACK,
        rbp: layout::BOOT_STACK,
        rflags: RFLAGS_RESERVED,
        ..Default::default()
    })?;
    let mut sregs = vcpu.get_sregs()?;
    enter_long_mode(&mut sregs);
    vcpu.set_sregs(&sregs)?;
    set_msrs(vcpu)?;
    route_local_interrupts(vcpu)
}

fn enter_long_mode(sregs: &mut kvm_sregs) {
    sregs.gdt = kvm_dtable {
        base: layout::GDT.0,
        limit: 5 * 8 - 1,
        ..Default::default()
    };
    sregs.idt = kvm_dtable::default();
    sregs.cs = code_segment();
    for segment in [
        &mut sregs.ds,
        &mut sregs.es,
        &mut sregs.fs,
        &mut sregs.gs,
        &mut sregs.ss,
    ] {
        *segment = data_segment();
    }
    sregs.tr = task_segment();
    sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
    sregs.cr3 = layout::PML4.0;
    sregs.cr4 = CR4_PAE;
    sregs.efer = EFER_LME | EFER_LMA;
}

fn set_msrs(vcpu: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
    let entry = |index, data| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    };
    let entries = [
        entry(MSR_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
        entry(MSR_MTRR_DEF_TYPE, MTRR_ENABLE_WRITE_BACK),
    ];
    for entry in entries {
        // One at a time: KVM_SET_MSRS stops at the first that it rejects, and a kernel boots
        // without any of these.
        if let Ok(msrs) = Msrs::from_entries(&[entry])
            && vcpu.set_msrs(&msrs)? == 0
        {
            tracing::debug!(msr = entry.index, "this KVM doesn't take the MSR");
        }
    }
    Ok(())
}

/// LINT0 takes the legacy interrupt controller, LINT1 is the NMI, as firmware would set them up.
fn route_local_interrupts(vcpu: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
    let mut lapic = vcpu.get_lapic()?;
    set_lapic_mode(&mut lapic, APIC_LVT_LINT0, APIC_MODE_EXTINT);
    set_lapic_mode(&mut lapic, APIC_LVT_LINT1, APIC_MODE_NMI);
    vcpu.set_lapic(&lapic)
}

fn set_lapic_mode(lapic: &mut kvm_lapic_state, offset: usize, mode: u32) {
    const MODE_MASK: u32 = 0x7 << 8;
    let register = &mut lapic.regs[offset..offset + 4];
    let mut bytes = [0u8; 4];
    for (byte, from) in bytes.iter_mut().zip(register.iter()) {
        *byte = *from as u8;
    }
    let value = (u32::from_le_bytes(bytes) & !MODE_MASK) | mode;
    for (to, byte) in register.iter_mut().zip(value.to_le_bytes()) {
        *to = byte as std::ffi::c_char;
    }
}

fn code_segment() -> kvm_segment {
    kvm_segment {
        limit: 0xffff_ffff,
        selector: BOOT_CS,
        type_: 0xb, // execute, read, accessed
        present: 1,
        s: 1,
        l: 1,
        g: 1,
        ..Default::default()
    }
}

fn data_segment() -> kvm_segment {
    kvm_segment {
        limit: 0xffff_ffff,
        selector: BOOT_DS,
        type_: 0x3, // read, write, accessed
        present: 1,
        s: 1,
        db: 1,
        g: 1,
        ..Default::default()
    }
}

fn task_segment() -> kvm_segment {
    kvm_segment {
        limit: 0x67,
        selector: BOOT_TSS,
        type_: 0xb, // busy 64-bit TSS
        present: 1,
        ..Default::default()
    }
}

/// The 8-byte descriptor of a segment with base 0 (Intel SDM 3A, figure 3-8).
fn descriptor(segment: &kvm_segment) -> u64 {
    let limit = u64::from(if segment.g == 1 {
        segment.limit >> 12
    } else {
        segment.limit
    });
    (limit & 0xffff)
        | (u64::from(segment.type_) << 40)
        | (u64::from(segment.s) << 44)
        | (u64::from(segment.dpl) << 45)
        | (u64::from(segment.present) << 47)
        | ((limit >> 16) << 48)
        | (u64::from(segment.l) << 53)
        | (u64::from(segment.db) << 54)
        | (u64::from(segment.g) << 55)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_those_of_a_flat_model() {
        assert_eq!(descriptor(&code_segment()), 0x00af_9b00_0000_ffff);
        assert_eq!(descriptor(&data_segment()), 0x00cf_9300_0000_ffff);
    }

    #[test]
    fn a_local_vector_keeps_its_other_bits() {
        let mut lapic = kvm_lapic_state::default();
        lapic.regs[APIC_LVT_LINT0 + 2] = 1; // masked
        set_lapic_mode(&mut lapic, APIC_LVT_LINT0, APIC_MODE_EXTINT);
        assert_eq!(lapic.regs[APIC_LVT_LINT0 + 1], 7);
        assert_eq!(lapic.regs[APIC_LVT_LINT0 + 2], 1);
    }
}
