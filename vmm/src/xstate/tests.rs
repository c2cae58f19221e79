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
        request(SAVE_THEN_LOAD),
        Some(XstateRequest::SaveThenLoad(0x4_8d15_9e00))
    );
    assert_eq!(
        request(FEATURES),
        Some(XstateRequest::Features(0x1234_5678))
    );
    assert_eq!(request(FIRST_PORT + 1), None);
    assert_eq!(XstateRequest::of(SAVE, &[0]), None);
}

const MEMORY: usize = 0x4000;

/// Memory of these bytes, but for the area at `units`, as far as it is in there: it names the area
/// at `save_to`.
fn memory_with(bytes: &[u8], units: u32, save_to: u32) -> GuestMemoryMmap {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
    memory.write_slice(bytes, GuestAddress(0)).unwrap();
    let named = address_of(units) + SAVE_TO as u64 * 4;
    let _ = memory.write_slice(&save_to.to_le_bytes(), GuestAddress(named));
    memory
}

fn contents(memory: &GuestMemoryMmap) -> Vec<u8> {
    let mut bytes = vec![0; MEMORY];
    memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
    bytes
}

#[test]
fn an_area_that_names_itself_changes_places_with_the_registers() {
    let memory = memory_with(&[0x11; MEMORY], 4, 4);
    let loaded = to_bytes(&exchange(&memory, address_of(4), &[0x22; 832]).unwrap());
    assert_eq!(loaded[..464], [0x11; 464]);
    assert_eq!(loaded[464..468], [0; 4]);
    assert_eq!(loaded[468..832], [0x11; 364]);
    let after = contents(&memory);
    assert_eq!(after[..256], [0x11; 256]);
    assert_eq!(after[256..256 + 832], [0x22; 832]);
    assert_eq!(after[256 + 832..], [0x11; MEMORY - 256 - 832]);
}

/// In memory, across its end and beyond it: two of these often enough are the same or overlap. Or
/// anywhere.
fn any_units() -> impl Strategy<Value = u32> {
    prop_oneof![1 => 0..8_u32, 3 => 0..MEMORY as u32 / 64 + 8, 1 => any::<u32>()]
}

proptest! {
    #[test]
    fn a_save_goes_where_the_loaded_area_said_before(
        bytes in prop::collection::vec(any::<u8>(), MEMORY),
        saved in prop::collection::vec(any::<u8>(), LEAST_AREA..=size_of::<Area>()),
        units in any_units(),
        save_to in any_units(),
    ) {
        let memory = memory_with(&bytes, units, save_to);
        let before = contents(&memory);
        let range = |units| {
            let start = usize::try_from(address_of(units)).unwrap();
            start..start + saved.len()
        };
        let loaded = exchange(&memory, address_of(units), &saved);
        let (Some(was), Some(_)) = (before.get(range(units)), before.get(range(save_to))) else {
            prop_assert!(loaded.is_err());
            return Ok(());
        };
        let mut expected = was.to_vec();
        expected[464..468].fill(0);
        let loaded = to_bytes(&loaded.unwrap());
        prop_assert_eq!(&loaded[..saved.len()], &expected[..]);
        prop_assert!(loaded[saved.len()..].iter().all(|byte| *byte == 0));
        let mut expected = before.clone();
        expected[range(save_to)].copy_from_slice(&saved);
        prop_assert_eq!(contents(&memory), expected);
    }

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
