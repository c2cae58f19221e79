//! A thread's registers are its own: those that the guest's kernel lists, and those that programs see
//! by the CPU's word, as most look for them. Where kernel mode is emulated programs run on the CPU,
//! which may have more than the kernel saves.

use super::clone_network::install;
use super::volumes::inside;
use bulkhead_tests::Artifacts;
use bulkhead_tests::runner::Checks;
use bulkhead_tests::shim::{Bundle, TaskVersion, spec};

const PROGRAM: &str = env!("CARGO_BIN_EXE_vector-registers");
const V: TaskVersion = TaskVersion::V3;

/// What is in /proc/cpuinfo.
pub fn listed(checks: &mut Checks, artifacts: &Artifacts) {
    keeps(checks, artifacts, "listed");
}

/// What CPUID and XGETBV say.
pub fn seen(checks: &mut Checks, artifacts: &Artifacts) {
    keeps(checks, artifacts, "seen");
}

fn keeps(checks: &mut Checks, artifacts: &Artifacts, which: &str) {
    let bundle = Bundle::new(artifacts, "registers", "").unwrap();
    install(PROGRAM, &bundle.path().join("rootfs"));
    bundle
        .set_spec(&spec(&["sh", "-c", "sleep 100000; true"]))
        .unwrap();
    let Some(shim) = checks.require("a container that runs", || {
        let shim = bundle.start().unwrap();
        shim.create(V, [""; 3]).unwrap();
        shim.start_process(V, "").unwrap();
        shim
    }) else {
        return;
    };
    checks.check("no thread's vector registers are lost", || {
        let output = inside(&bundle, &shim, "vectors", &["/vector-registers", which]);
        assert!(output.contains(": 0 lost"), "{output}");
    });
    checks.check("ends", || {
        shim.kill(V, "", 9, true).unwrap();
        shim.wait(V, "").unwrap();
        shim.delete(V, "").unwrap();
        shim.shutdown(V).unwrap();
    });
}
