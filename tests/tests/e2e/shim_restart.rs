//! containerd crashes and comes back while tasks run: they, their streams, their ends and the
//! events of those outlive it.

use crate::containerd::Events;
use bulkhead_tests::Artifacts;
use bulkhead_tests::containerd::{Containerd, Release};
use bulkhead_tests::leaks::{Snapshot, processes_of};
use bulkhead_tests::runner::Checks;
use std::io::{BufRead, BufReader, Write};
use std::process::Stdio;
use std::time::{Duration, Instant};

const SLOW: Duration = Duration::from_secs(120);
/// The scenario's own folders, and the daemon that comes back as another process.
const IGNORED: [&str; 2] = ["file /run/t", "bin/containerd --log-level"];

pub fn run(checks: &mut Checks, artifacts: &Artifacts) {
    let Some(mut containerd) = checks.require("containerd with a busybox image", || {
        let containerd = Containerd::start(artifacts, &Release::debian(), "").unwrap();
        containerd.import_busybox().unwrap();
        containerd
    }) else {
        return;
    };
    let before = Snapshot::take(&IGNORED);
    let started = checks.require("two tasks run", || {
        run_echo(&containerd);
        run_brief(&containerd);
    });
    if started.is_none() {
        return;
    }
    let log_before = containerd.log().len();
    let restarted = checks.require(
        "they outlive containerd, and one of them ends meanwhile",
        || {
            let shims = processes_of("containerd-shim-bulkhead-v2").len();
            containerd.crash().unwrap();
            std::fs::write(containerd.folder().join("data/go"), "").unwrap();
            // Its machine goes on after its end, until somebody deletes the task.
            assert_eq!(processes_of("containerd-shim-bulkhead-v2").len(), shims);
            assert_eq!(processes_of("bulkhead-vmm").len(), shims);
            containerd.start_again().unwrap();
        },
    );
    if restarted.is_some() {
        after(checks, &containerd, log_before);
    }
    checks.check("no process, mount, socket or cgroup is left", || {
        before.assert_nothing_added(&IGNORED);
    });
}

/// Answers each line of its input; its streams are FIFOs.
fn run_echo(containerd: &Containerd) {
    let script = "while read line; do echo got $line; done";
    let run = containerd.run(&["--detach"], "echo", &["sh", "-c", script]);
    run.unwrap().success();
}

/// Ends with 7 once the host has made a file.
fn run_brief(containerd: &Containerd) {
    let data = containerd.folder().join("data");
    std::fs::create_dir(&data).unwrap();
    let bind = format!(
        "type=bind,src={},dst=/data,options=rbind:ro",
        data.display()
    );
    let script = "until [ -e /data/go ]; do sleep 0.5; done; exit 7";
    let options = ["--detach", "--mount", &bind];
    let run = containerd.run(&options, "brief", &["sh", "-c", script]);
    run.unwrap().success();
}

fn after(checks: &mut Checks, containerd: &Containerd, log_before: usize) {
    let line_of = |id: &str| {
        let listed = containerd.ctr(&["tasks", "ls"]).unwrap().success();
        let line = listed.lines().find(|line| line.starts_with(id));
        line.unwrap_or_default().to_owned()
    };
    checks.check(
        "the new containerd knows both: one runs, one has stopped",
        || {
            assert!(line_of("echo").contains("RUNNING"), "{}", line_of("echo"));
            until("the end of `brief` is known", || {
                line_of("brief").contains("STOPPED")
            });
        },
    );
    checks.check("the event of that end has come, late", || {
        until("an exit event is forwarded", || {
            let log = containerd.log();
            let since = log.get(log_before..).unwrap_or_default();
            let is_exit =
                |line: &str| line.contains("event forwarded") && line.contains("/tasks/exit");
            since.lines().any(is_exit)
        });
    });
    checks.check("its exit code is told at its delete", || {
        let deleted = containerd.ctr(&["tasks", "delete", "brief"]).unwrap();
        assert!(deleted.stderr.contains("exit code 7"), "{deleted:?}");
        let deleted = containerd.ctr(&["containers", "delete", "brief"]).unwrap();
        deleted.success();
    });
    checks.check("attach: the other's streams still work, both ways", || {
        let mut attach = containerd
            .endless_ctr_command(&["tasks", "attach", "echo"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdin = attach.stdin.take().unwrap();
        stdin.write_all(b"through the crash\n").unwrap();
        let mut answer = String::new();
        BufReader::new(attach.stdout.take().unwrap())
            .read_line(&mut answer)
            .unwrap();
        let _ = attach.kill();
        let _ = attach.wait();
        drop(stdin);
        assert_eq!(answer, "got through the crash\n");
    });
    checks.check("exec, and the end with its event", || {
        let exec = containerd
            .exec(&[], "echo", &["echo", "still here"])
            .unwrap();
        assert_eq!(exec.stdout, "still here\n", "{exec:?}");
        let events = Events::follow(containerd);
        let killed = containerd.ctr(&["tasks", "kill", "--signal", "SIGKILL", "echo"]);
        killed.unwrap().success();
        events.wait_for(&["/tasks/exit ", "\"echo\"", "\"exit_status\":137"]);
        until("the end of `echo` is known", || {
            line_of("echo").contains("STOPPED")
        });
        containerd.ctr(&["tasks", "delete", "echo"]).unwrap();
        let deleted = containerd.ctr(&["containers", "delete", "echo"]).unwrap();
        deleted.success();
    });
}

fn until(what: &str, mut so: impl FnMut() -> bool) {
    let end = Instant::now() + SLOW;
    while !so() {
        assert!(Instant::now() < end, "{what}: not within {SLOW:?}");
        std::thread::sleep(Duration::from_millis(200));
    }
}
