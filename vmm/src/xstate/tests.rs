use kvm_bindings::kvm_cpuid_entry2;
use proptest::prelude::*;

use super::*;

/// Leaf 0xd of a processor with `offered` and, from bit 2 on, components of these (size, offset).
fn cpuid(offered: u32, components: &[(u32, u32, u32)]) -> CpuId {
    let leaf = |index, eax, ebx| kvm_cpuid_entry2 {
        function: LEAF,
        index,
        eax,
        ebx,
        ..Default::default()
    };
    let mut entries = vec![leaf(0, offered, 0)];
    let parts = components.iter();
    entries.extend(parts.map(|(index, size, offset)| leaf(*index, *size, *offset)));
    CpuId::from_entries(&entries).unwrap()
}

const ZEN: &[(u32, u32, u32)] = &[(2, 256, 576), (5, 64, 832), (6, 512, 896), (7, 1024, 1408)];

#[test]
fn an_area_ends_with_the_last_component_in_use() {
    let layout = XstateLayout::of_cpuid(&cpuid(0x2e7, ZEN)).unwrap();
    assert_eq!(layout.known(u64::MAX), 0xe7);
    assert_eq!(layout.size(0x3), LEAST_AREA);
    assert_eq!(layout.size(0x7), 832);
    assert_eq!(layout.size(0xe7), 2432);
}

#[test]
fn without_avx_there_is_nothing_to_do() {
    assert_eq!(XstateLayout::of_cpuid(&cpuid(0x3, &[])), None);
    assert_eq!(XstateLayout::of_cpuid(&cpuid(0x7, &[])), None);
    let beyond = [(2, 256, 4000)];
    assert_eq!(XstateLayout::of_cpuid(&cpuid(0x7, &beyond)), None);
    let overflowing = [(2, 256, u32::MAX)];
    assert_eq!(XstateLayout::of_cpuid(&cpuid(0x7, &overflowing)), None);
}

#[test]
fn requests_are_writes_of_32_bits() {
    let address = 0x1234_5678_u32.to_le_bytes();
    let request = |port| XstateRequest::of(port, &address);
    assert_eq!(request(SAVE), Some(XstateRequest::Save(0x4_8d15_9e00)));
    assert_eq!(request(LOAD), Some(XstateRequest::Load(0x4_8d15_9e00)));
    assert_eq!(
        request(FEATURES),
        Some(XstateRequest::Features(0x1234_5678))
    );
    assert_eq!(request(FIRST_PORT + 1), None);
    assert_eq!(XstateRequest::of(SAVE, &[0]), None);
}

proptest! {
    #[test]
    fn what_is_loaded_has_nothing_reserved(
        bytes in prop::collection::vec(any::<u8>(), size_of::<Area>()),
        features: u64,
    ) {
        let bytes: [u8; size_of::<Area>()] = bytes.try_into().unwrap();
        let layout = XstateLayout::of_cpuid(&cpuid(0xe7, ZEN)).unwrap();
        let features = layout.known(features);
        let area = made_valid(from_bytes(&bytes), Valid { features, mxcsr: 0xffff });
        let found = to_bytes(&area);
        prop_assert_eq!(&found[..24], &bytes[..24]);
        prop_assert_eq!(&found[28..512], &bytes[28..512]);
        prop_assert_eq!(&found[576..], &bytes[576..]);
        prop_assert_eq!(area[MXCSR] >> 16, 0);
        prop_assert_eq!(u64::from(area[XSTATE_BV]) & !features, 0);
        prop_assert!(found[516..576].iter().all(|byte| *byte == 0));
    }
}
