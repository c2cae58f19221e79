//! Ends that nobody asked for: the VMM or the shim killed, the agent killed inside the guest.

use crate::containerd::Events;
use bulkhead_tests::Artifacts;
use bulkhead_tests::containerd::{Containerd, Release};
use bulkhead_tests::fifo::ReadFifo;
use bulkhead_tests::leaks::{Snapshot, processes_of};
use bulkhead_tests::runner::Checks;
use bulkhead_tests::shim::{Bundle, TaskVersion, spec};
use nix::sys::signal::{Signal, kill};
use std::io::{BufRead, BufReader};
use std::process::Stdio;
use std::time::{Duration, Instant};

const V: TaskVersion = TaskVersion::V3;

pub fn run(checks: &mut Checks, artifacts: &Artifacts) {
    vmm_killed(checks, artifacts);
    shim_killed(checks, artifacts);
    below_containerd(checks, artifacts);
}

fn kill_all(program: &str) {
    let found = processes_of(program);
    assert!(!found.is_empty(), "no {program} runs");
    for pid in found {
        kill(pid, Signal::SIGKILL).unwrap();
    }
}

fn wait_until_gone(program: &str) {
    let end = Instant::now() + Duration::from_secs(10);
    while !processes_of(program).is_empty() {
        assert!(
            Instant::now() < end,
            "{program} still runs: {:?}",
            processes_of(program)
        );
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn vmm_killed(checks: &mut Checks, artifacts: &Artifacts) {
    let before = Snapshot::take(&[]);
    checks.check(
        "kill -9 of the VMM: waiters get 137, the streams end, delete works",
        || {
            let bundle = Bundle::new(artifacts, "vmm-killed", "").unwrap();
            bundle
                .set_spec(&spec(&["sh", "-c", "echo started; exec sleep 100000"]))
                .unwrap();
            let out = ReadFifo::make(&bundle.beside("out")).unwrap();
            let shim = bundle.start().unwrap();
            shim.create(V, ["", &out.path(), ""]).unwrap();
            shim.start_process(V, "").unwrap();
            std::thread::scope(|scope| {
                let waiter = scope.spawn(|| shim.wait(V, ""));
                std::thread::sleep(Duration::from_secs(2));
                kill_all("bulkhead-vmm");
                assert_eq!(waiter.join().unwrap().unwrap().exit_status, 137);
            });
            assert_eq!(shim.delete(V, "").unwrap().exit_status, 137);
            out.read(Duration::from_secs(10));
            shim.shutdown(V).unwrap();
        },
    );
    checks.check("and nothing is left", || before.assert_nothing_added(&[]));
}

fn shim_killed(checks: &mut Checks, artifacts: &Artifacts) {
    let before = Snapshot::take(&[]);
    checks.check(
        "kill -9 of the shim: after delete no VMM is left; status 137",
        || {
            let bundle = Bundle::new(artifacts, "shim-killed", "").unwrap();
            let shim = bundle.start().unwrap();
            shim.create(V, [""; 3]).unwrap();
            shim.start_process(V, "").unwrap();
            kill_all("containerd-shim-bulkhead-v2");
            wait_until_gone("containerd-shim-bulkhead-v2");
            let deleted = bundle.delete().unwrap();
            assert_eq!(deleted.exit_status, 137);
            wait_until_gone("bulkhead-vmm");
            assert_eq!(
                bundle.delete().unwrap().exit_status,
                137,
                "delete is idempotent"
            );
        },
    );
    checks.check("and nothing is left either", || {
        before.assert_nothing_added(&[])
    });
}

/// The same two through containerd, which must hear of the exit and call delete by itself.
fn below_containerd(checks: &mut Checks, artifacts: &Artifacts) {
    let Some(containerd) = checks.require("containerd with a busybox image", || {
        let containerd = Containerd::start(artifacts, &Release::debian(), "").unwrap();
        containerd.import_busybox().unwrap();
        containerd
    }) else {
        return;
    };
    let ignored = ["file /run/t"];
    let events = Events::follow(&containerd);
    let before = Snapshot::take(&ignored);
    for (victim, id) in [
        ("bulkhead-vmm", "c-vmm"),
        ("containerd-shim-bulkhead-v2", "c-shim"),
    ] {
        checks.check(
            &format!("kill -9 of {victim}: ctr run ends, the exit event says 137"),
            || {
                let argv = ["sh", "-c", "echo up; exec sleep 100000"];
                let mut command = containerd.run_command(&["--rm"], id, &argv);
                command.stdout(Stdio::piped()).stderr(Stdio::piped());
                let mut running = command.spawn().unwrap();
                let mut first = String::new();
                let mut stdout = BufReader::new(running.stdout.take().unwrap());
                stdout.read_line(&mut first).unwrap();
                assert_eq!(first, "up\n", "not running: {}", containerd.log_tail(5));
                // What it says comes before ctr has the answer to its start call.
                std::thread::sleep(Duration::from_secs(2));
                kill_all(victim);
                let finished = running.wait_with_output().unwrap();
                let text = String::from_utf8_lossy(&finished.stderr).into_owned();
                let code = finished.status.code();
                if victim == "bulkhead-vmm" {
                    assert_eq!(code, Some(137), "{text}; {}", containerd.log_tail(12));
                } else {
                    // ctr's wait call goes through the shim and breaks, as it does with runc's.
                    assert!(!matches!(code, Some(0)), "{text}");
                }
                let exit_status = "\"exit_status\":137";
                events.wait_for(&["/tasks/exit ", &format!("\"{id}\""), exit_status]);
            },
        );
        checks.check(&format!("and nothing is left of {id}"), || {
            let _ = containerd.ctr(&["tasks", "delete", "--force", id]);
            let _ = containerd.ctr(&["containers", "delete", id]);
            before.assert_nothing_added(&ignored);
            let run = containerd.runtime_dir();
            let left: Vec<_> = std::fs::read_dir(run).into_iter().flatten().collect();
            assert!(left.is_empty(), "in the runtime folder: {left:?}");
        });
    }
}
