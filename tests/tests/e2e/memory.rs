//! Memory that a container has let go of goes back to the host.

use bulkhead_tests::Artifacts;
use bulkhead_tests::fifo::ReadFifo;
use bulkhead_tests::footprint::Footprint;
use bulkhead_tests::leaks::processes_of;
use bulkhead_tests::runner::Checks;
use bulkhead_tests::shim::{Bundle, Shim, TaskVersion, process, spec};
use std::time::{Duration, Instant};

const V: TaskVersion = TaskVersion::V3;
/// A bound for a loaded machine; Linux reports what is free two seconds after it was freed.
const SLOW: Duration = Duration::from_secs(120);
/// What the burst takes, in MiB: most of what a guest of 128 MiB has to give, and within the
/// 64 MiB of the container's /dev.
const BURST_MIB: u64 = 48;

/// Runs an exec to its end, which must be a good one.
fn exec(bundle: &Bundle, shim: &Shim<'_>, id: &str, script: &str) {
    let out = ReadFifo::make(&bundle.beside(id)).unwrap();
    let script = format!("exec 2>&1; {script}");
    let process = process(&["sh", "-c", &script]);
    shim.exec(V, id, &process, ["", &out.path(), ""]).unwrap();
    shim.start_process(V, id).unwrap();
    let status = shim.wait(V, id).unwrap().exit_status;
    shim.delete(V, id).unwrap();
    assert_eq!(status, 0, "{}", out.read(SLOW));
}

/// Private memory of the VMM, the guest's included, in KiB.
fn private_kib() -> u64 {
    let vmm = processes_of("bulkhead-vmm");
    assert_eq!(vmm.len(), 1, "VMMs: {vmm:?}");
    let pid = u32::try_from(vmm[0].as_raw()).unwrap();
    Footprint::of(pid).unwrap().private_kib
}

/// Looks again until no more than `wanted` KiB are held.
fn comes_down_to(wanted: u64) -> u64 {
    let end = Instant::now() + SLOW;
    loop {
        let held = private_kib();
        if held <= wanted {
            return held;
        }
        assert!(
            Instant::now() < end,
            "{held} KiB are held, {wanted} at most were expected"
        );
        std::thread::sleep(Duration::from_millis(500));
    }
}

pub fn run(checks: &mut Checks, artifacts: &Artifacts) {
    let bundle = Bundle::new(artifacts, "memory", "").unwrap();
    bundle.set_spec(&spec(&["sleep", "100000"])).unwrap();
    let Some(shim) = checks.require("a container starts", || {
        let shim = bundle.start().unwrap();
        shim.create(V, [""; 3]).unwrap();
        shim.start_process(V, "").unwrap();
        shim
    }) else {
        return;
    };
    checks.check("most of what a burst took comes back", || {
        burst(&bundle, &shim);
    });
    checks.check("ends", || {
        shim.kill(V, "", 9, true).unwrap();
        shim.wait(V, "").unwrap();
        shim.delete(V, "").unwrap();
        shim.shutdown(V).unwrap();
    });
}

fn burst(bundle: &Bundle, shim: &Shim<'_>) {
    let before = private_kib();
    let fill = format!("dd if=/dev/zero of=/dev/burst bs=1M count={BURST_MIB}");
    exec(bundle, shim, "fill", &fill);
    let peak = private_kib();
    let taken = peak.saturating_sub(before);
    assert!(
        taken >= BURST_MIB * 1024 * 3 / 4,
        "{before} KiB before, {peak} KiB with {BURST_MIB} MiB in use"
    );
    exec(bundle, shim, "free", "rm /dev/burst");
    let after = comes_down_to(peak - taken / 2);
    println!("private memory of the VMM: {before} KiB, {peak} KiB at the peak, {after} KiB after");
}
