//! Memory that is plugged and unplugged, by the VMM's contract alone.

use crate::vm::boot;
use bulkhead_proto::vmm::{Event, HotplugStatus, Request, Response};
use bulkhead_tests::Artifacts;
use bulkhead_tests::footprint::Footprint;
use bulkhead_tests::runner::Checks;
use bulkhead_tests::vm::{Vm, VmSpec};
use std::time::{Duration, Instant};

/// A bound for a loaded machine whose KVM emulates kernel mode: plugging 128 MiB takes it some 2
/// million instructions.
const SLOW: Duration = Duration::from_secs(240);
const LIMIT_MIB: u32 = 300;

fn status(vm: &Vm) -> HotplugStatus {
    match vm.control(&Request::Status {}).unwrap() {
        Response::Status(status) => status.hotplug.unwrap(),
        other => panic!("not a status: {other:?}"),
    }
}

fn ask(vm: &Vm, mib: u32) -> Response {
    vm.control(&Request::SetHotplug { mib }).unwrap()
}

/// Asks for so much and waits until it's there.
fn resize(vm: &Vm, mib: u32) {
    let begin = Instant::now();
    assert_eq!(ask(vm, mib), Response::Ok);
    match vm.event(SLOW).unwrap() {
        Some(Event::HotplugReached { mib: reached }) => assert_eq!(reached, mib),
        other => panic!("{other:?}; {}", vm.logs()),
    }
    let status = status(vm);
    assert_eq!((status.requested_mib, status.plugged_mib), (mib, mib));
    println!(
        "{mib} MiB plugged after {:.1} s, private memory {} KiB",
        begin.elapsed().as_secs_f64(),
        Footprint::of(vm.pid()).unwrap().written_kib
    );
}

#[track_caller]
fn refused(vm: &Vm, mib: u32, why: &str) {
    match ask(vm, mib) {
        Response::Error { message } => assert!(message.contains(why), "{message}"),
        other => panic!("{other:?} instead of {why:?}"),
    }
}

pub fn run(checks: &mut Checks, artifacts: &Artifacts) {
    let spec = VmSpec {
        hotplug_mib: LIMIT_MIB,
        ..VmSpec::default()
    };
    let Some(vm) = checks.require("boots with nothing plugged", || {
        let vm = boot(&spec, artifacts);
        assert_eq!((status(&vm).requested_mib, status(&vm).plugged_mib), (0, 0));
        vm
    }) else {
        return;
    };
    checks.check("a size that can't be had is refused", || {
        refused(&vm, 3, "not a multiple of 2 MiB");
        refused(&vm, LIMIT_MIB + 2, "more than the 300 MiB");
        assert_eq!(status(&vm).requested_mib, 0);
    });
    checks.check("grows to the limit and shrinks, again and again", || {
        let before = Footprint::of(vm.pid()).unwrap().written_kib;
        for mib in [130, LIMIT_MIB, 64, 0, 200, 0] {
            resize(&vm, mib);
        }
        // What Linux noted about the plugged pages went with them.
        let after = Footprint::of(vm.pid()).unwrap().written_kib;
        assert!(after < before + 16 * 1024, "{before} KiB, then {after} KiB");
    });
}
