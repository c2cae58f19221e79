//! What the guest is told of its processor.

use bulkhead_proto::vmm::KvmKind;
use kvm_bindings::{CpuId, kvm_cpuid_entry2};

/// Leaf 1, ECX.
const CMPXCHG16B: u32 = 13;
const TSC_DEADLINE: u32 = 24;
const HYPERVISOR: u32 = 31;
const MONITOR: u32 = 3;

/// KVM's feature leaf and the paravirtual features that a guest of ours is to see.
const KVM_FEATURES: u32 = 0x4000_0001;
const KVM_CLOCKSOURCE2: u32 = 3;
const KVM_NOP_IO_DELAY: u32 = 1;
const KVM_CLOCKSOURCE_STABLE: u32 = 24;

/// The CPUID of vCPU `index` of `vcpus`, made from what KVM supports on this host.
pub fn for_vcpu(
    supported: &CpuId,
    kind: KvmKind,
    tsc_deadline: bool,
    index: u8,
    vcpus: u8,
) -> CpuId {
    let mut cpuid = supported.clone();
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            0x1 => feature_leaf(entry, kind, tsc_deadline, index, vcpus),
            0x4 => entry.eax = cores_sharing(entry.eax, vcpus),
            // No performance counters: they would tell one tenant of another.
            0xa => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
            0xb | 0x1f => topology_leaf(entry, index, vcpus),
            KVM_FEATURES if kind == KvmKind::Emulated => {
                // Every other paravirtual feature costs emulated instructions to set up and gains
                // nothing where no exit is dearer than an instruction.
                entry.eax &=
                    1 << KVM_CLOCKSOURCE2 | 1 << KVM_NOP_IO_DELAY | 1 << KVM_CLOCKSOURCE_STABLE;
            }
            _ => {}
        }
    }
    cpuid
}

fn feature_leaf(
    entry: &mut kvm_cpuid_entry2,
    kind: KvmKind,
    tsc_deadline: bool,
    index: u8,
    vcpus: u8,
) {
    // EBX: initial APIC id and number of logical processors (Intel SDM 2A, CPUID, leaf 1).
    entry.ebx = (entry.ebx & 0x0000_ffff)
        | (u32::from(index) << 24)
        | (u32::from(vcpus.next_power_of_two()) << 16);
    entry.ecx |= 1 << HYPERVISOR;
    entry.ecx &= !(1 << MONITOR);
    if tsc_deadline {
        entry.ecx |= 1 << TSC_DEADLINE;
    }
    if kind == KvmKind::Emulated {
        // The instruction emulator has no cmpxchg16b, and the slab allocator would use it.
        entry.ecx &= !(1 << CMPXCHG16B);
    }
}

/// Leaf 4, EAX: bits 31..26 are cores in the package less one, 25..14 threads sharing the cache
/// less one.
fn cores_sharing(eax: u32, vcpus: u8) -> u32 {
    let cores = u32::from(vcpus.next_power_of_two()) - 1;
    (eax & 0x3fff) | (cores.min(0x3f) << 26)
}

/// Extended topology: one thread a core, all cores in one package.
fn topology_leaf(entry: &mut kvm_cpuid_entry2, index: u8, vcpus: u8) {
    const LEVEL_THREAD: u32 = 1;
    const LEVEL_CORE: u32 = 2;
    let core_bits = u32::from(vcpus.next_power_of_two()).trailing_zeros();
    (entry.eax, entry.ebx, entry.ecx) = match entry.index {
        0 => (0, 1, LEVEL_THREAD << 8),
        1 => (core_bits, u32::from(vcpus), (LEVEL_CORE << 8) | 1),
        level => (0, 0, level & 0xff),
    };
    entry.edx = u32::from(index);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn supported() -> CpuId {
        let leaf = |function, index| kvm_cpuid_entry2 {
            function,
            index,
            eax: u32::MAX,
            ebx: u32::MAX,
            ecx: u32::MAX,
            edx: u32::MAX,
            ..Default::default()
        };
        CpuId::from_entries(&[
            leaf(1, 0),
            leaf(4, 0),
            leaf(0xa, 0),
            leaf(0xb, 0),
            leaf(0xb, 1),
            leaf(KVM_FEATURES, 0),
        ])
        .unwrap()
    }

    #[test]
    fn each_vcpu_has_its_own_apic_id() {
        for index in 0..4 {
            let cpuid = for_vcpu(&supported(), KvmKind::Vmx, true, index, 4);
            let entries = cpuid.as_slice();
            assert_eq!(entries[0].ebx >> 24, u32::from(index));
            assert_eq!(entries[3].edx, u32::from(index));
            assert_eq!(entries[4].ebx, 4);
        }
    }

    #[test]
    fn only_an_emulated_kernel_mode_loses_features() {
        let vmx = for_vcpu(&supported(), KvmKind::Vmx, true, 0, 1);
        let emulated = for_vcpu(&supported(), KvmKind::Emulated, true, 0, 1);
        assert_ne!(vmx.as_slice()[0].ecx & (1 << CMPXCHG16B), 0);
        assert_eq!(emulated.as_slice()[0].ecx & (1 << CMPXCHG16B), 0);
        assert_eq!(vmx.as_slice()[5].eax, u32::MAX);
        assert_eq!(emulated.as_slice()[5].eax.count_ones(), 3);
    }
}
