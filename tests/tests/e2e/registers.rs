//! A thread's registers are its own, all that the CPU says it has. Where kernel mode is emulated
//! programs run on the CPU, whose registers the guest's kernel can't save by itself.

use super::clone_network::install;
use super::volumes::inside;
use bulkhead_tests::Artifacts;
use bulkhead_tests::runner::Checks;
use bulkhead_tests::shim::{Bundle, TaskVersion, spec};

const PROGRAM: &str = env!("CARGO_BIN_EXE_vector-registers");
const V: TaskVersion = TaskVersion::V3;

/// What they must survive, as [`PROGRAM`] names it.
const THROUGH: [(&str, &str); 5] = [
    (
        "listed",
        "the kernel lists the vector registers that the CPU says it has",
    ),
    (
        "switch",
        "threads that give up the CPU keep their vector registers",
    ),
    ("signal", "a signal's handler harms no vector registers"),
    ("fork", "a child has its parent's vector registers"),
    ("ptrace", "a tracer reads and writes vector registers"),
];

/// On a single CPU, where a kernel may save registers late.
pub fn on_one_cpu(checks: &mut Checks, artifacts: &Artifacts) {
    kept(checks, artifacts, 1);
}

/// On two, where a thread may go on elsewhere.
pub fn on_two_cpus(checks: &mut Checks, artifacts: &Artifacts) {
    kept(checks, artifacts, 2);
}

/// The program's findings, one by one, beside processes that begin and end.
fn kept(checks: &mut Checks, artifacts: &Artifacts, vcpus: u8) {
    let bundle = Bundle::new(artifacts, "registers", &format!("vcpus = {vcpus}\n")).unwrap();
    install(PROGRAM, &bundle.path().join("rootfs"));
    bundle
        .set_spec(&spec(&["sh", "-c", "while :; do ls /; done"]))
        .unwrap();
    let Some(shim) = checks.require("a container that runs", || {
        let shim = bundle.start().unwrap();
        shim.create(V, [""; 3]).unwrap();
        shim.start_process(V, "").unwrap();
        shim
    }) else {
        return;
    };
    let Some(output) = checks.require("a program that looks at its registers", || {
        inside(&bundle, &shim, "vectors", &["/vector-registers"])
    }) else {
        return;
    };
    for (name, check) in THROUGH {
        checks.check(check, || {
            let well = format!("{name}: ok");
            assert!(output.lines().any(|line| line == well), "{output}");
        });
    }
    checks.check("ends", || {
        shim.kill(V, "", 9, true).unwrap();
        shim.wait(V, "").unwrap();
        shim.delete(V, "").unwrap();
        shim.shutdown(V).unwrap();
    });
}
