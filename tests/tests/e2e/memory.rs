//! A VM takes from the host what its containers need, and gives back what they have let go of.

use bulkhead_tests::fifo::ReadFifo;
use bulkhead_tests::footprint::Footprint;
use bulkhead_tests::leaks::processes_of;
use bulkhead_tests::runner::Checks;
use bulkhead_tests::shim::{Bundle, Shim, TaskVersion, process, spec};
use bulkhead_tests::{Artifacts, Error};
use serde_json::json;
use std::time::{Duration, Instant};

const V: TaskVersion = TaskVersion::V3;
/// A bound for a loaded machine; Linux reports what is free two seconds after it was freed.
const SLOW: Duration = Duration::from_secs(120);
/// What the burst takes, in MiB: most of what a guest of 128 MiB has to give, and within the
/// 64 MiB of the container's /dev.
const BURST_MIB: u64 = 48;

/// Limits of a container in a VM that boots with 128 MiB, and one that this can't hold.
const LOW_MIB: u64 = 48;
const HIGH_MIB: u64 = 200;
/// What is taken under the high limit, in MiB: more than the VM had.
const FILL_MIB: u64 = 144;
/// So much of that is written: where kernel mode is emulated each MiB may take more than a second.
const WRITE_MIB: u64 = 16;

/// Runs an exec to its end, which must be a good one.
fn exec(bundle: &Bundle, shim: &Shim<'_>, id: &str, script: &str) {
    let (status, output) = try_exec(bundle, shim, id, script);
    assert_eq!(status, 0, "{output}");
}

/// Runs an exec to its end: its status and what it has written.
fn try_exec(bundle: &Bundle, shim: &Shim<'_>, id: &str, script: &str) -> (u32, String) {
    let out = ReadFifo::make(&bundle.beside(id)).unwrap();
    let script = format!("exec 2>&1; {script}");
    let process = process(&["sh", "-c", &script]);
    shim.exec(V, id, &process, ["", &out.path(), ""]).unwrap();
    shim.start_process(V, id).unwrap();
    let status = shim.wait(V, id).unwrap().exit_status;
    shim.delete(V, id).unwrap();
    let output = out.read(SLOW);
    std::fs::remove_file(bundle.beside(id)).unwrap();
    (status, output)
}

/// Private memory of the VMM, the guest's included, in KiB.
fn private_kib() -> u64 {
    let vmm = processes_of("bulkhead-vmm");
    assert_eq!(vmm.len(), 1, "VMMs: {vmm:?}");
    let pid = u32::try_from(vmm[0].as_raw()).unwrap();
    Footprint::of(pid).unwrap().written_kib
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

fn start<'a>(checks: &mut Checks, bundle: &'a Bundle) -> Option<Shim<'a>> {
    checks.require("a container starts", || {
        let shim = bundle.start().unwrap();
        shim.create(V, [""; 3]).unwrap();
        shim.start_process(V, "").unwrap();
        shim
    })
}

fn end(checks: &mut Checks, shim: &Shim<'_>) {
    checks.check("ends", || {
        shim.kill(V, "", 9, true).unwrap();
        shim.wait(V, "").unwrap();
        shim.delete(V, "").unwrap();
        shim.shutdown(V).unwrap();
    });
}

pub fn run(checks: &mut Checks, artifacts: &Artifacts) {
    let bundle = Bundle::new(artifacts, "memory", "").unwrap();
    bundle.set_spec(&spec(&["sleep", "100000"])).unwrap();
    let Some(shim) = start(checks, &bundle) else {
        return;
    };
    checks.check("most of what a burst took comes back", || {
        burst(&bundle, &shim);
    });
    end(checks, &shim);
}

/// A VM grows with its container's limit, and shrinks with it.
pub fn resized(checks: &mut Checks, artifacts: &Artifacts) {
    let bundle = Bundle::new(artifacts, "resized", "").unwrap();
    let mut small = spec(&["sleep", "100000"]);
    small["linux"]["resources"] = limit(LOW_MIB);
    // Large pages: with small ones, filling it would take a minute where kernel mode is emulated.
    let fill = json!({ "destination": "/fill", "type": "tmpfs", "source": "tmpfs",
                       "options": ["size=1g", "huge=always"] });
    small["mounts"].as_array_mut().unwrap().push(fill);
    bundle.set_spec(&small).unwrap();
    let Some(shim) = start(checks, &bundle) else {
        return;
    };
    checks.check("a limit that no memory can be had for is refused", || {
        match shim.update(V, &limit(1 << 20)) {
            Err(Error::Rpc { code, message, .. }) => {
                assert_eq!(code, ttrpc::Code::INVALID_ARGUMENT as i32);
                assert!(message.contains("memory_max_mib"), "{message}");
            }
            other => panic!("{other:?}"),
        }
        assert!(guest_mib(&bundle, &shim) < 128, "nothing was plugged");
    });
    checks.check("a higher limit: more than the VM had can be used", || {
        grow(&bundle, &shim);
    });
    checks.check("a lower limit: the host has it back", || {
        shrink(&bundle, &shim);
    });
    end(checks, &shim);
}

fn limit(mib: u64) -> serde_json::Value {
    json!({ "memory": { "limit": mib << 20 } })
}

/// All memory of the guest, in MiB.
fn guest_mib(bundle: &Bundle, shim: &Shim<'_>) -> u64 {
    let script = "read name kib unit < /proc/meminfo && echo $kib";
    let (status, output) = try_exec(bundle, shim, "meminfo", script);
    assert_eq!(status, 0, "{output}");
    output.trim().parse::<u64>().unwrap() / 1024
}

fn grow(bundle: &Bundle, shim: &Shim<'_>) {
    let (before, begin) = (private_kib(), Instant::now());
    shim.update(V, &limit(HIGH_MIB)).unwrap();
    let (grown, seconds) = (private_kib(), begin.elapsed().as_secs_f64());
    assert!(guest_mib(bundle, shim) >= HIGH_MIB);
    let fill = format!(
        "fallocate -l {FILL_MIB}m /fill/file && \
         dd if=/dev/zero of=/fill/file bs=1M count={WRITE_MIB} conv=notrunc"
    );
    exec(bundle, shim, "fill", &fill);
    let filled = private_kib();
    assert!(
        filled >= grown + WRITE_MIB * 1024 * 3 / 4,
        "{grown} KiB before, {filled} KiB with {FILL_MIB} MiB in use"
    );
    println!(
        "raised in {seconds:.1} s; private memory of the VMM: {before} KiB, {grown} KiB after \
         that, {filled} KiB with {FILL_MIB} MiB in use"
    );
}

fn shrink(bundle: &Bundle, shim: &Shim<'_>) {
    let (filled, begin) = (private_kib(), Instant::now());
    exec(bundle, shim, "empty", "rm /fill/file");
    shim.update(V, &limit(LOW_MIB)).unwrap();
    while guest_mib(bundle, shim) > 128 {
        assert!(begin.elapsed() < SLOW, "the memory stays plugged");
    }
    let after = comes_down_to(filled - WRITE_MIB * 1024 * 3 / 4);
    let seconds = begin.elapsed().as_secs_f64();
    println!("private memory of the VMM: {after} KiB {seconds:.1} s after its use");
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
