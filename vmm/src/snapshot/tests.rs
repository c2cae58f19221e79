//! The state file as others may leave it: truncated, flipped, rewritten with a good checksum.

use super::format::{self, FORMAT_VERSION, FormatError, HEADER_LEN};
use super::memory::MemoryMap;
use super::shape::{BlockShape, Image};
use super::vcpu::VcpuState;
use super::vm::VmState;
use super::{HostKvm, MachineState, Shape, UartState};
use crate::config::{BlockResource, TemplateFiles};
use crate::snapshot::Template;
use crate::virtio::interrupt::Line;
use crate::virtio::mmio::MmioTransport;
use crate::virtio::rng::RngDevice;
use crate::virtio::testing::{event_loop, memory};
use bulkhead_proto::vmm::KvmKind;
use proptest::prelude::*;
use std::fs::File;
use std::io::Write;
use std::sync::OnceLock;
use vm_superio::SerialState;
use vmm_sys_util::eventfd::EventFd;

/// Makes a shape differ in one place.
type Spoil = fn(&mut Shape);

fn file(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}

fn shape() -> Shape {
    let block = BlockResource {
        serial: "root".into(),
        file: Some(file(&[1; 5000])),
        read_only: true,
    };
    Shape {
        vcpus: 2,
        memory_bytes: 64 << 20,
        hotplug_bytes: 0,
        kvm: KvmKind::Emulated,
        command_line: "quiet ro".into(),
        kernel: Image::of(&file(&[2; 50_000])).unwrap(),
        block: BlockShape::of_all(&[block]).unwrap(),
        share: true,
    }
}

fn state() -> MachineState {
    let events = event_loop();
    let device = Box::new(RngDevice::new(events.handle()));
    let line = Line::of_event(EventFd::new(0).unwrap());
    let mut window = MmioTransport::new(memory(), device, line).unwrap();
    MachineState {
        shape: shape(),
        host: HostKvm::synthetic(),
        memory: MemoryMap::write(&memory(), &mut tempfile::tempfile().unwrap()).unwrap(),
        vm: VmState::synthetic(),
        vcpus: vec![VcpuState::synthetic(), VcpuState::synthetic()],
        devices: vec![window.suspend().unwrap()],
        uart: UartState::from(SerialState::default()),
    }
}

/// The same bytes for every case of a property.
fn encoded() -> &'static [u8] {
    static ENCODED: OnceLock<Vec<u8>> = OnceLock::new();
    ENCODED.get_or_init(|| format::encode(&state()).unwrap())
}

#[test]
fn what_is_encoded_is_decoded_again() {
    let again = format::decode(encoded()).unwrap();
    assert_eq!(format::encode(&again).unwrap(), encoded());
    assert_eq!(again.shape, shape());
    assert_eq!(again.vcpus.len(), 2);
}

#[test]
fn each_part_of_the_header_has_its_own_error() {
    let spoiled = |at: usize| {
        let mut bytes = encoded().to_vec();
        bytes[at] ^= 0x40;
        format::decode(&bytes).unwrap_err()
    };
    assert!(matches!(spoiled(0), FormatError::Magic(_)));
    assert_eq!(
        spoiled(8).to_string(),
        format!(
            "the state file has format version {}, this VMM reads {FORMAT_VERSION}",
            FORMAT_VERSION ^ 0x40
        )
    );
    let version = spoiled(12).to_string();
    assert!(version.contains("saved by VMM version"), "{version}");
    assert!(matches!(spoiled(32), FormatError::Length { .. }));
    assert!(matches!(spoiled(40), FormatError::Checksum { .. }));
    assert!(matches!(spoiled(HEADER_LEN), FormatError::Checksum { .. }));
    let mut longer = encoded().to_vec();
    longer.push(0);
    assert!(matches!(
        format::decode(&longer).unwrap_err(),
        FormatError::Length { .. }
    ));
}

#[test]
fn any_truncation_is_refused() {
    for len in 0..encoded().len() {
        let error = format::decode(&encoded()[..len]).unwrap_err();
        let expected = if len < HEADER_LEN {
            FormatError::Short(len)
        } else {
            FormatError::Length {
                found: len as u64,
                said: encoded().len() as u64,
            }
        };
        assert_eq!(error, expected);
    }
}

#[test]
fn surplus_in_a_payload_is_refused() {
    let mut payload = encoded()[HEADER_LEN..].to_vec();
    payload.extend([0; 3]);
    let error = format::decode(&format::seal(&payload)).unwrap_err();
    assert!(error.to_string().contains("3 bytes are left over"));
}

#[test]
fn a_template_is_opened_wherever_its_file_was_read_to() {
    let files = || TemplateFiles {
        // Written to its end.
        state: file(encoded()),
        memory: tempfile::tempfile().unwrap(),
    };
    let template = Template::open(files()).unwrap();
    assert_eq!(
        template.kvm_kind(&HostKvm::synthetic()),
        Some(KvmKind::Emulated)
    );
    let mut vast = files();
    vast.state = tempfile::tempfile().unwrap();
    vast.state.set_len(1 << 40).unwrap();
    let error = Template::open(vast).err().unwrap().to_string();
    assert!(error.contains("at most"), "{error}");
}

#[test]
fn another_machine_is_refused_by_its_first_difference() {
    let spoils: [(&str, Spoil); 7] = [
        ("vcpus", |shape| shape.vcpus = 3),
        ("memory_bytes", |shape| shape.memory_bytes = 1),
        ("KVM kind", |shape| shape.kvm = KvmKind::Vmx),
        ("kernel image", |shape| {
            shape.kernel = Image::of(&file(&[3; 50_000])).unwrap();
        }),
        ("number of block devices", |shape| shape.block.clear()),
        ("share", |shape| shape.share = false),
        ("command line", |shape| shape.command_line.push('x')),
    ];
    let saved = shape();
    saved.check(&shape()).unwrap();
    for (what, spoil) in spoils {
        let mut other = shape();
        spoil(&mut other);
        let error = saved.check(&other).unwrap_err().to_string();
        assert!(error.contains(what), "{error}");
    }
}

#[test]
fn only_an_empty_slot_may_have_been_filled() {
    let block = |contents: Option<&[u8]>| {
        let block = BlockResource {
            serial: "data".into(),
            file: contents.map(file),
            read_only: true,
        };
        Shape {
            block: BlockShape::of_all(&[block]).unwrap(),
            ..shape()
        }
    };
    block(None).check(&block(Some(&[1; 512]))).unwrap();
    block(Some(&[1; 512]))
        .check(&block(Some(&[1; 512])))
        .unwrap();
    for other in [None, Some(&[2; 512][..]), Some(&[1; 1024])] {
        let error = block(Some(&[1; 512])).check(&block(other)).unwrap_err();
        assert_eq!(error.what, "block image");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn any_flip_is_refused(position: prop::sample::Index, bit in 0u8..8) {
        let mut bytes = encoded().to_vec();
        bytes[position.index(encoded().len())] ^= 1 << bit;
        prop_assert!(format::decode(&bytes).is_err());
    }

    /// With the checksum made good again, whatever a payload holds is an error or a state that can
    /// be encoded: no panic, no allocation beyond what is there.
    #[test]
    fn any_payload_is_survived(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        cut: prop::sample::Index,
    ) {
        let mut payload = encoded()[HEADER_LEN..].to_vec();
        for (position, value) in changes {
            let at = position.index(payload.len());
            payload[at] = value;
        }
        for payload in [&payload[..], &payload[..cut.index(payload.len())]] {
            if let Ok(state) = format::decode(&format::seal(payload)) {
                prop_assert!(format::encode(&state).is_ok());
            }
        }
    }

    #[test]
    fn any_bytes_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        prop_assert!(format::decode(&bytes).is_err());
        // An error nearly always, and in no case a panic.
        let _ = format::decode(&format::seal(&bytes));
    }
}
