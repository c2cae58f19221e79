//! Many execs, one after another and at once: nothing of them stays in shim, VMM or agent. The
//! thousand of the project's own bound is `scripts/dev bench storm`; here are as many as show a leak
//! of one thing for each exec.

use bulkhead_tests::Artifacts;
use bulkhead_tests::leaks::Snapshot;
use bulkhead_tests::runner::Checks;
use bulkhead_tests::storm::{Bundles, Pod};

const IN_A_ROW: u32 = 24;
const AT_ONCE: u32 = 12;

/// KiB by which a process may have grown at the end, since allocators keep what a burst needed. The
/// long storm of the bench shows what an exec itself leaves.
const SLACK: u64 = 512;

pub fn run(checks: &mut Checks, artifacts: &Artifacts) {
    let before = Snapshot::take(&[]);
    {
        let bundles = Bundles::new(artifacts, "").unwrap();
        let pod = checks.require("a pod whose container sees the agent", || {
            let pod = Pod::start(&bundles).unwrap();
            pod.exec().unwrap();
            pod.at_once(AT_ONCE).unwrap();
            pod
        });
        let Some(pod) = pod else { return };
        storm(checks, &pod, &format!("{IN_A_ROW} execs in a row"), || {
            for _ in 0..IN_A_ROW {
                pod.exec().unwrap();
            }
        });
        storm(checks, &pod, &format!("{AT_ONCE} execs at once"), || {
            pod.at_once(AT_ONCE).unwrap();
        });
        checks.check("the pod ends", || pod.end().unwrap());
    }
    checks.check("no process, mount, socket or folder is left", || {
        before.assert_nothing_added(&[]);
    });
}

fn storm(checks: &mut Checks, pod: &Pod<'_>, name: &str, blow: impl FnOnce()) {
    checks.check(&format!("{name} leave nothing behind"), || {
        let before = pod.holdings().unwrap();
        blow();
        let after = pod.settled(&before).unwrap();
        let left = after.more_than(&before);
        assert!(left.is_empty(), "{left:?}");
        for (name, before, after) in [
            ("shim", before.shim.written_kib, after.shim.written_kib),
            ("agent", before.agent_kib, after.agent_kib),
        ] {
            assert!(after <= before + SLACK, "{name}: {before} KiB, now {after}");
        }
    });
}
