//! The registers that a CPU offers a guest's programs are theirs alone. Where kernel mode is emulated
//! programs run on the CPU, which may have more registers than the guest's kernel saves.

use super::clone_network::install;
use super::volumes::inside;
use bulkhead_tests::Artifacts;
use bulkhead_tests::runner::Checks;
use bulkhead_tests::shim::{Bundle, TaskVersion, spec};

const PROGRAM: &str = env!("CARGO_BIN_EXE_vector-registers");
const V: TaskVersion = TaskVersion::V3;

pub fn run(checks: &mut Checks, artifacts: &Artifacts) {
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
        let output = inside(&bundle, &shim, "vectors", &["/vector-registers"]);
        assert!(output.contains(": 0 lost"), "{output}");
    });
    checks.check("ends", || {
        shim.kill(V, "", 9, true).unwrap();
        shim.wait(V, "").unwrap();
        shim.delete(V, "").unwrap();
        shim.shutdown(V).unwrap();
    });
}
