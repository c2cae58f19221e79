//! Which model-specific registers belong to a saved vCPU: a list of its own, not whatever KVM
//! offers. KVM_SET_MSRS stops at the first that it rejects, and a register that nobody has thought
//! about may be the host's rather than the guest's.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};

use super::restore::{Refused, kvm_refused};
use super::save::{SaveError, kvm_failed};

/// IA32_TSC: set apart from the others, as its value is one with the clock.
pub const TSC: u32 = 0x10;
/// IA32_TSC_DEADLINE: counts from the time-stamp counter and only in the local APIC's matching
/// mode, so it comes after both.
pub const TSC_DEADLINE: u32 = 0x6e0;
/// MSR_KVM_SYSTEM_TIME_NEW: where the vCPU's kvm-clock page is; bit 0 turns it on.
pub const KVM_SYSTEM_TIME: u32 = 0x4b56_4d01;

/// Saved if KVM_GET_MSR_INDEX_LIST has them and the vCPU's CPUID makes them readable.
const LISTED: &[u32] = &[
    0x0000_003a, // IA32_FEATURE_CONTROL
    0x0000_003b, // IA32_TSC_ADJUST
    0x0000_0048, // IA32_SPEC_CTRL
    0x0000_00e1, // IA32_UMWAIT_CONTROL
    0x0000_010a, // IA32_ARCH_CAPABILITIES
    0x0000_0122, // IA32_TSX_CTRL
    0x0000_0140, // MISC_FEATURES_ENABLES
    0x0000_0174, // IA32_SYSENTER_CS
    0x0000_0175, // IA32_SYSENTER_ESP
    0x0000_0176, // IA32_SYSENTER_EIP
    0x0000_017a, // IA32_MCG_STATUS
    0x0000_01a0, // IA32_MISC_ENABLE
    0x0000_01c4, // IA32_XFD
    0x0000_01c5, // IA32_XFD_ERR
    0x0000_01d9, // IA32_DEBUGCTL
    0x0000_0277, // IA32_PAT
    0x0000_06a0, // IA32_U_CET
    0x0000_06a2, // IA32_S_CET
    0x0000_06a4, // IA32_PL0_SSP
    0x0000_06a5, // IA32_PL1_SSP
    0x0000_06a6, // IA32_PL2_SSP
    0x0000_06a7, // IA32_PL3_SSP
    0x0000_06a8, // IA32_INTERRUPT_SSP_TABLE_ADDR
    0x0000_0da0, // IA32_XSS
    0xc000_0081, // STAR
    0xc000_0082, // LSTAR
    0xc000_0083, // CSTAR
    0xc000_0084, // SYSCALL_MASK
    0xc000_0102, // KERNEL_GS_BASE
    0xc000_0103, // TSC_AUX
    0xc001_011f, // VIRT_SPEC_CTRL
    0x4b56_4d00, // MSR_KVM_WALL_CLOCK_NEW
    KVM_SYSTEM_TIME,
    0x4b56_4d03, // MSR_KVM_STEAL_TIME
    0x4b56_4d04, // MSR_KVM_PV_EOI_EN
    0x4b56_4d05, // MSR_KVM_POLL_CONTROL
    0x4b56_4d06, // MSR_KVM_ASYNC_PF_INT, before the switch that follows
    0x4b56_4d02, // MSR_KVM_ASYNC_PF_EN
    0x4b56_4d08, // MSR_KVM_MIGRATION_CONTROL
];

/// Memory type registers: architectural, and saved whether or not KVM's list has them, which older
/// kernels' hasn't.
const MEMORY_TYPES: &[u32] = &[
    0x200, 0x201, 0x202, 0x203, 0x204, 0x205, 0x206, 0x207, 0x208, 0x209, 0x20a, 0x20b, 0x20c,
    0x20d, 0x20e, 0x20f, // base and mask, eight pairs
    0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e,
    0x26f, // fixed ranges
    0x2ff, // default type
];

/// The registers to save on this host, in the order in which they are to be set.
///
/// # Errors
/// When KVM doesn't tell its list.
pub fn to_save(kvm: &Kvm) -> Result<Vec<u32>, kvm_ioctls::Error> {
    let list = kvm.get_msr_index_list()?;
    let known = list.as_slice();
    let listed = |index: &u32| known.contains(index);
    let mut indices: Vec<u32> = MEMORY_TYPES.to_vec();
    indices.extend(LISTED.iter().copied().filter(listed));
    indices.extend([TSC, TSC_DEADLINE].into_iter().filter(listed));
    Ok(indices)
}

/// Whether a saved state may set this register.
fn allowed(index: u32) -> bool {
    LISTED.contains(&index) || MEMORY_TYPES.contains(&index) || [TSC, TSC_DEADLINE].contains(&index)
}

/// Reads those of `indices` that this vCPU has.
///
/// # Errors
/// When KVM refuses the call itself.
pub fn read(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, SaveError> {
    let mut entries = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let wanted: Vec<kvm_msr_entry> = rest.iter().map(|&index| entry(index, 0)).collect();
        let mut msrs = Msrs::from_entries(&wanted).map_err(|_| SaveError::TooManyMsrs)?;
        let count = vcpu
            .get_msrs(&mut msrs)
            .map_err(kvm_failed("KVM_GET_MSRS"))?;
        entries.extend_from_slice(msrs.as_slice().get(..count).unwrap_or_default());
        // The call stopped at one that this vCPU hasn't, if it stopped at all.
        rest = rest.get(count + 1..).unwrap_or_default();
    }
    Ok(entries)
}

/// Sets `entries` in their order.
///
/// # Errors
/// When one is not on the list, or KVM doesn't take it.
pub fn write(vcpu: &VcpuFd, entries: &[kvm_msr_entry]) -> Result<(), Refused> {
    if let Some(foreign) = entries.iter().find(|entry| !allowed(entry.index)) {
        return Err(Refused::Msr {
            index: foreign.index,
            why: "it is not one that is ever saved",
        });
    }
    let clean: Vec<kvm_msr_entry> = entries
        .iter()
        .map(|saved| entry(saved.index, saved.data))
        .collect();
    let msrs = Msrs::from_entries(&clean).map_err(|_| Refused::TooManyMsrs(entries.len()))?;
    let set = vcpu.set_msrs(&msrs).map_err(kvm_refused("KVM_SET_MSRS"))?;
    match entries.get(set) {
        None => Ok(()),
        Some(rejected) => Err(Refused::Msr {
            index: rejected.index,
            why: "this host's KVM does not take its value",
        }),
    }
}

/// Reads one register of a vCPU that is being restored.
///
/// # Errors
/// When KVM doesn't have it.
pub fn read_one(vcpu: &VcpuFd, index: u32) -> Result<u64, Refused> {
    let mut msrs = Msrs::from_entries(&[entry(index, 0)]).map_err(|_| Refused::TooManyMsrs(1))?;
    let count = vcpu
        .get_msrs(&mut msrs)
        .map_err(kvm_refused("KVM_GET_MSRS"))?;
    match msrs.as_slice().first() {
        Some(found) if count == 1 => Ok(found.data),
        _ => Err(Refused::Msr {
            index,
            why: "this host's KVM does not tell its value",
        }),
    }
}

/// Sets one register.
///
/// # Errors
/// As [`write`].
pub fn write_one(vcpu: &VcpuFd, index: u32, data: u64) -> Result<(), Refused> {
    write(vcpu, &[entry(index, data)])
}

fn entry(index: u32, data: u64) -> kvm_msr_entry {
    kvm_msr_entry {
        index,
        data,
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn each_register_is_listed_once_and_the_deadline_comes_last() {
        let mut all = MEMORY_TYPES.to_vec();
        all.extend_from_slice(LISTED);
        all.extend([TSC, TSC_DEADLINE]);
        let distinct: HashSet<u32> = all.iter().copied().collect();
        assert_eq!(distinct.len(), all.len());
        assert!(all.iter().all(|index| allowed(*index)));
        // IA32_APIC_BASE and EFER are part of KVM_SET_SREGS and must not be set twice.
        assert!(!allowed(0x1b) && !allowed(0xc000_0080));
    }
}
