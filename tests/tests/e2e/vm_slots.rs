//! Devices that come and go while the guest runs, by the contracts of VMM and agent alone.

use crate::vm::{ask, boot, end_of};
use crate::vm_container;
use crate::vm_template::{continued, refusal, save, status};
use bulkhead_proto::agent::{
    AttachDeviceRequest, AttachDeviceResponse, DetachDeviceRequest, DetachDeviceResponse, Slot,
};
use bulkhead_proto::guest::DISKS;
use bulkhead_proto::vmm::{
    ExitReason, FIRST_SPARE_SLOT, PluggedDevice, PluggedSlot, Request, Response, SPARE_SLOTS,
};
use bulkhead_tests::Artifacts;
use bulkhead_tests::runner::Checks;
use bulkhead_tests::vm::{TemplatePaths, Vm, VmSpec};
use serde_json::json;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

const SHORT: Duration = Duration::from_secs(60);
const DISK_BYTES: usize = 4 << 20;

/// The agent's name for a slot.
fn slot(plugged: PluggedSlot) -> protobuf::MessageField<Slot> {
    Some(Slot {
        address: plugged.address,
        irq: plugged.irq,
        number: plugged.slot,
        ..Default::default()
    })
    .into()
}

pub(crate) fn attach(vm: &Vm, plugged: PluggedSlot) -> Result<String, String> {
    let request = AttachDeviceRequest {
        slot: slot(plugged),
        ..Default::default()
    };
    let answer: AttachDeviceResponse = ask(vm, "AttachDevice", &request)?;
    Ok(answer.name)
}

pub(crate) fn detach(vm: &Vm, plugged: PluggedSlot) -> Result<(), String> {
    let request = DetachDeviceRequest {
        slot: slot(plugged),
        ..Default::default()
    };
    ask::<DetachDeviceResponse>(vm, "DetachDevice", &request).map(drop)
}

/// A disk whose bytes begin with its name.
fn disk(name: &str) -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(DISK_BYTES as u64).unwrap();
    file.write_all_at(name.as_bytes(), 0).unwrap();
    file
}

fn try_plug(vm: &Vm, serial: &str, read_only: bool, files: &[File]) -> Response {
    let request = Request::PlugBlock {
        serial: serial.into(),
        read_only,
    };
    vm.control_with(&request, files).unwrap()
}

#[track_caller]
fn plug(vm: &Vm, serial: &str, read_only: bool, file: &File) -> PluggedSlot {
    match try_plug(vm, serial, read_only, &[file.try_clone().unwrap()]) {
        Response::Plugged { slot } => slot,
        other => panic!("{other:?}; {}", vm.logs()),
    }
}

#[track_caller]
fn refused(response: Response, why: &str) {
    match response {
        Response::Error { message } => assert!(message.contains(why), "{message}"),
        other => panic!("{other:?} instead of {why:?}"),
    }
}

pub(crate) fn unplug(vm: &Vm, slot: u32) -> Response {
    vm.control(&Request::Unplug { slot }).unwrap()
}

/// Runs a script that finds the disk with this serial number as /disk.
fn with_disk(vm: &Vm, id: &str, serial: &str, script: &str) -> String {
    vm_container::run(vm, id, script, |spec| {
        spec["mounts"].as_array_mut().unwrap().push(json!({
            "destination": "/disk", "type": "bind", "source": format!("{DISKS}/{serial}"),
            "options": ["bind", "rw"]
        }));
        spec["linux"]["resources"]["devices"] = json!([{ "allow": true, "access": "rwm" }]);
    })
}

/// What the first bytes of the disk with this serial number are.
fn name_of(vm: &Vm, id: &str, serial: &str) -> String {
    with_disk(vm, id, serial, "dd if=/disk bs=512 count=1 > /out")
        .trim_end_matches('\0')
        .into()
}

pub fn run(checks: &mut Checks, artifacts: &Artifacts) {
    let folder = tempfile::tempdir().unwrap();
    let template = TemplatePaths::in_folder(folder.path());
    let spec = VmSpec::default();
    let Some(mut vm) = checks.require("boots with empty slots", || {
        let vm = boot(&spec, artifacts);
        assert_eq!(status(&vm).plugged, []);
        vm
    }) else {
        return;
    };
    checks.check("what can't be plugged or unplugged is refused", || {
        bad_requests(&vm);
    });
    checks.check("a machine with a plugged device is not saved", || {
        let slot = plug(&vm, "one", false, &disk("one"));
        let message = refusal(&vm, &template);
        assert!(
            message.contains("is plugged into a spare slot"),
            "{message}"
        );
        assert_eq!(unplug(&vm, slot.slot), Response::Ok);
    });
    let clone = checks.require("a clone of one with empty slots goes on", || {
        save(&vm, &template);
        assert_eq!(end_of(&mut vm, SHORT), ExitReason::Saved);
        continued(&spec, &template, artifacts)
    });
    let Some(clone) = clone else { return };
    checks.check("a disk is read and written", || read_and_written(&clone));
    checks.check("others come into the same slot, again and again", || {
        again_and_again(&clone);
    });
    checks.check("many disks share the interrupt lines", || many(&clone));
    checks.check(
        "a disk that is pulled out is dead, and its slot free",
        || {
            pulled_out(&clone);
        },
    );
}

fn bad_requests(vm: &Vm) {
    let long = "x".repeat(21);
    refused(try_plug(vm, &long, true, &[disk("")]), "at most 20");
    refused(try_plug(vm, "x", true, &[]), "0 descriptors");
    refused(
        try_plug(vm, "x", true, &[disk(""), disk("")]),
        "2 descriptors",
    );
    let folder = File::open("/").unwrap();
    refused(try_plug(vm, "x", true, &[folder]), "regular file");
    for slot in [
        0,
        FIRST_SPARE_SLOT,
        FIRST_SPARE_SLOT + SPARE_SLOTS,
        u32::MAX,
    ] {
        refused(unplug(vm, slot), "there is no device in slot");
    }
    assert_eq!(status(vm).plugged, []);
}

fn read_and_written(vm: &Vm) {
    let exits = status(vm).userspace_exits;
    let begin = Instant::now();
    let file = disk("hello");
    let slot = plug(vm, "first", false, &file);
    let device = PluggedDevice {
        slot: slot.slot,
        device: "block".into(),
        net: None,
    };
    assert_eq!(status(vm).plugged, [device]);
    let name = attach(vm, slot).unwrap();
    println!(
        "plugged and attached as {name} in {:.2} s, {} exits",
        begin.elapsed().as_secs_f64(),
        status(vm).userspace_exits - exits
    );
    assert_eq!(name, "vdb");
    let twice = attach(vm, slot).unwrap_err();
    assert!(twice.contains("in use already"), "{twice}");

    let script = "dd if=/disk bs=512 count=1 > /out; \
        echo written by the guest | dd of=/disk bs=4096 seek=1 conv=fsync";
    assert!(with_disk(vm, "c1", "first", script).starts_with("hello\0"));
    let mut written = [0; 20];
    file.read_exact_at(&mut written, 4096).unwrap();
    assert_eq!(&written, b"written by the guest");

    detach(vm, slot).unwrap();
    let gone = detach(vm, slot).unwrap_err();
    assert!(gone.contains("no device of it is in use"), "{gone}");
    assert_eq!(unplug(vm, slot.slot), Response::Ok);
    assert_eq!(status(vm).plugged, []);
}

fn again_and_again(vm: &Vm) {
    for (round, serial) in ["second", "third"].into_iter().enumerate() {
        let slot = plug(vm, serial, true, &disk(serial));
        assert_eq!(slot.slot, FIRST_SPARE_SLOT);
        attach(vm, slot).unwrap();
        assert_eq!(name_of(vm, &format!("c2.{round}"), serial), serial);
        detach(vm, slot).unwrap();
        assert_eq!(unplug(vm, slot.slot), Response::Ok);
    }
    // Without containers, whose files the file server would hold for a while.
    let before = descriptors(vm);
    for _ in 0..3 {
        let slot = plug(vm, "fourth", true, &disk("fourth"));
        attach(vm, slot).unwrap();
        assert!(descriptors(vm) > before);
        detach(vm, slot).unwrap();
        assert_eq!(unplug(vm, slot.slot), Response::Ok);
    }
    // The VMM closes the last request's connection when it has answered.
    let end = Instant::now() + Duration::from_secs(20);
    while descriptors(vm) > before {
        assert!(Instant::now() < end, "the VMM holds more than {before}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn descriptors(vm: &Vm) -> usize {
    let folder = format!("/proc/{}/fd", vm.pid());
    std::fs::read_dir(folder).unwrap().count()
}

/// More than there are lines, so that two share one.
fn many(vm: &Vm) {
    let disks: Vec<_> = (0..10)
        .map(|number| {
            let serial = format!("disk-{number}");
            let slot = plug(vm, &serial, number % 2 == 0, &disk(&serial));
            attach(vm, slot).unwrap();
            (serial, slot)
        })
        .collect();
    let mut lines: Vec<_> = disks.iter().map(|(_, slot)| slot.irq).collect();
    lines.sort_unstable();
    lines.dedup();
    assert!(lines.len() > 1 && lines.len() < disks.len(), "{lines:?}");
    for number in [0, 8, 9] {
        let (serial, _) = &disks[number];
        assert_eq!(name_of(vm, &format!("c3.{number}"), serial), *serial);
    }
    for (_, slot) in &disks {
        detach(vm, *slot).unwrap();
        assert_eq!(unplug(vm, slot.slot), Response::Ok);
    }
}

fn pulled_out(vm: &Vm) {
    let slot = plug(vm, "pulled", true, &disk("pulled"));
    attach(vm, slot).unwrap();
    assert_eq!(unplug(vm, slot.slot), Response::Ok);
    // The guest has not let go, so it doesn't take the next one.
    let next = plug(vm, "next", true, &disk("next"));
    assert_eq!(next.slot, slot.slot);
    let error = attach(vm, next).unwrap_err();
    assert!(error.contains("in use already"), "{error}");
    detach(vm, slot).unwrap();
    attach(vm, next).unwrap();
    assert_eq!(name_of(vm, "c4", "next"), "next");
}
