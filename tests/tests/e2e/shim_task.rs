//! A task's whole life through a shim without containerd, by both versions of the Task service.

use bulkhead_tests::fifo::{ReadFifo, WriteFifo};
use bulkhead_tests::leaks::{Snapshot, sockets_below_run};
use bulkhead_tests::runner::Checks;
use bulkhead_tests::shim::{Bundle, Shim, TaskVersion, process};
use bulkhead_tests::{Artifacts, Error, Result};
use containerd_shim_protos::api::{self, Status};
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

const SLOW: Duration = Duration::from_secs(60);

pub fn v2(checks: &mut Checks, artifacts: &Artifacts) {
    life(checks, artifacts, TaskVersion::V2);
}

pub fn v3(checks: &mut Checks, artifacts: &Artifacts) {
    life(checks, artifacts, TaskVersion::V3);
}

/// The call must have been refused with this status code and a message that holds `text`.
#[track_caller]
pub fn assert_refused<T: std::fmt::Debug>(result: Result<T>, code: ttrpc::Code, text: &str) {
    match result {
        Err(Error::Rpc {
            code: got, message, ..
        }) => {
            assert_eq!(got, code as i32, "{message}");
            assert!(
                message.contains(text),
                "the message lacks {text:?}: {message}"
            );
        }
        other => panic!("not refused: {other:?}"),
    }
}

fn life(checks: &mut Checks, artifacts: &Artifacts, version: TaskVersion) {
    let before = Snapshot::take(&[]);
    {
        let bundle = Bundle::new(artifacts, "life", "").unwrap();
        let Some(shim) = checks.require("start prints an address that answers", || {
            bundle.start().unwrap()
        }) else {
            return;
        };
        start_again(checks, &bundle, &shim);
        before_create(checks, &shim, version);
        let Some((out, err)) = created(checks, &bundle, &shim, version) else {
            return;
        };
        running(checks, &bundle, &shim, version);
        execs(checks, &bundle, &shim, version);
        ended(checks, &shim, version, out, err);
        checks.check("shutdown ends the shim", || shim.shutdown(version).unwrap());
    }
    checks.check(
        "no process, mount, socket, cgroup or folder is left",
        || {
            before.assert_nothing_added(&[]);
        },
    );
}

fn start_again(checks: &mut Checks, bundle: &Bundle, shim: &Shim<'_>) {
    checks.check("start again prints the same address", || {
        assert_eq!(bundle.start().unwrap().address, shim.address);
        let written = std::fs::read_to_string(bundle.path().join("address")).unwrap();
        assert_eq!(
            written.trim(),
            shim.address,
            "the file `address` in the bundle"
        );
    });
    checks.check("the shim's socket is a file of root's alone", || {
        let path = shim.address.strip_prefix("unix://").unwrap();
        let socket = std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(socket, 0o600, "{path}");
        assert!(path.len() <= 106, "{path}");
    });
}

fn before_create(checks: &mut Checks, shim: &Shim<'_>, version: TaskVersion) {
    checks.check(
        "unknown task: not found; connect answers all the same",
        || {
            assert_refused(shim.state(version, ""), ttrpc::Code::NOT_FOUND, "not found");
            assert_refused(
                shim.start_process(version, ""),
                ttrpc::Code::NOT_FOUND,
                "not found",
            );
            assert_refused(
                shim.kill(version, "", 9, false),
                ttrpc::Code::NOT_FOUND,
                "not found",
            );
            let request = api::ConnectRequest {
                id: "life".into(),
                ..Default::default()
            };
            let answer: api::ConnectResponse = shim.call(version, "Connect", &request).unwrap();
            assert!(answer.shim_pid > 1 && answer.task_pid == 0, "{answer:?}");
        },
    );
}

fn created(
    checks: &mut Checks,
    bundle: &Bundle,
    shim: &Shim<'_>,
    version: TaskVersion,
) -> Option<(ReadFifo, ReadFifo)> {
    let argv = "echo to stdout; echo to stderr >&2; exec sleep 100000";
    bundle
        .set_spec(&bulkhead_tests::shim::spec(&["sh", "-c", argv]))
        .unwrap();
    let out = ReadFifo::make(&bundle.beside("out")).unwrap();
    let err = ReadFifo::make(&bundle.beside("err")).unwrap();
    let pid = checks.require(
        "create boots the VM and answers with a pid of this host",
        || {
            let created = shim
                .create(version, ["", &out.path(), &err.path()])
                .unwrap();
            assert!(
                std::path::Path::new(&format!("/proc/{}", created.pid)).exists(),
                "{created:?}"
            );
            created.pid
        },
    )?;
    checks.check("state is created", || {
        let state = shim.state(version, "").unwrap();
        assert_eq!(state.status.enum_value(), Ok(Status::CREATED), "{state:?}");
        assert_eq!((state.pid, state.id.as_str()), (pid, "life"));
        assert_eq!(state.stdout, out.path());
        assert_eq!(state.bundle, bundle.path().display().to_string());
    });
    checks.check("create again: already exists", || {
        assert_refused(
            shim.create(version, [""; 3]),
            ttrpc::Code::ALREADY_EXISTS,
            "life",
        );
    });
    checks.check("the sandbox's sockets are of root's alone", || {
        let sockets = sockets_below_run();
        assert!(
            sockets.len() >= 3,
            "the shim's, control and vsock: {sockets:?}"
        );
        for path in sockets {
            let folder = path.parent().unwrap();
            let closed = |path: &std::path::Path| {
                std::fs::metadata(path).unwrap().permissions().mode() & 0o077 == 0
            };
            assert!(closed(&path) || closed(folder), "{}", path.display());
        }
    });
    Some((out, err))
}

fn running(checks: &mut Checks, bundle: &Bundle, shim: &Shim<'_>, version: TaskVersion) {
    checks.check("start, then state is running", || {
        shim.start_process(version, "").unwrap();
        let state = shim.state(version, "").unwrap();
        assert_eq!(state.status.enum_value(), Ok(Status::RUNNING), "{state:?}");
    });
    checks.check("start again: failed precondition", || {
        assert_refused(
            shim.start_process(version, ""),
            ttrpc::Code::FAILED_PRECONDITION,
            "",
        );
    });
    checks.check("delete of a running task: failed precondition", || {
        assert_refused(
            shim.delete(version, ""),
            ttrpc::Code::FAILED_PRECONDITION,
            "",
        );
    });
    checks.check("connect and pids", || {
        let id = bundle.id().to_owned();
        let request = api::ConnectRequest {
            id: id.clone(),
            ..Default::default()
        };
        let connected: api::ConnectResponse = shim.call(version, "Connect", &request).unwrap();
        assert!(connected.task_pid > 0, "{connected:?}");
        let request = api::PidsRequest {
            id,
            ..Default::default()
        };
        let pids: api::PidsResponse = shim.call(version, "Pids", &request).unwrap();
        assert!(
            !pids.processes.is_empty(),
            "containerd reaps a shim without a process"
        );
    });
    checks.check("resize without a terminal is refused", || {
        let request = api::ResizePtyRequest {
            id: bundle.id().to_owned(),
            width: 80,
            height: 25,
            ..Default::default()
        };
        let resized = shim.call::<api::Empty>(version, "ResizePty", &request);
        assert_refused(resized, ttrpc::Code::FAILED_PRECONDITION, "terminal");
    });
    checks.check(
        "what is not there yet is unimplemented, not unknown",
        || {
            let request = api::CheckpointTaskRequest {
                id: bundle.id().to_owned(),
                ..Default::default()
            };
            let answer = shim.call::<api::Empty>(version, "Checkpoint", &request);
            assert_refused(answer, ttrpc::Code::UNIMPLEMENTED, "");
        },
    );
}

fn execs(checks: &mut Checks, bundle: &Bundle, shim: &Shim<'_>, version: TaskVersion) {
    checks.check("exec: stdin up to close-IO, output, exit code", || {
        let mut stdin = WriteFifo::make(&bundle.beside("cat-in")).unwrap();
        let out = ReadFifo::make(&bundle.beside("cat-out")).unwrap();
        let cat = process(&["sh", "-c", "cat; exit 5"]);
        shim.exec(version, "cat", &cat, [&stdin.path(), &out.path(), ""])
            .unwrap();
        let state = shim.state(version, "cat").unwrap();
        assert_eq!(state.status.enum_value(), Ok(Status::CREATED), "{state:?}");
        shim.start_process(version, "cat").unwrap();
        stdin.write("first line\nsecond line\n").unwrap();
        // A client closes its end first; the shim holds one until CloseIO.
        drop(stdin);
        let request = api::CloseIORequest {
            id: bundle.id().to_owned(),
            exec_id: "cat".into(),
            stdin: true,
            ..Default::default()
        };
        let _: api::Empty = shim.call(version, "CloseIO", &request).unwrap();
        let waited = shim.wait(version, "cat").unwrap();
        assert_eq!(waited.exit_status, 5);
        assert!(waited.exited_at.seconds > 1_600_000_000, "{waited:?}");
        assert_eq!(
            shim.wait(version, "cat").unwrap().exit_status,
            5,
            "waiting again answers"
        );
        assert_eq!(shim.delete(version, "cat").unwrap().exit_status, 5);
        assert_eq!(out.read(SLOW), "first line\nsecond line\n");
        assert_refused(
            shim.state(version, "cat"),
            ttrpc::Code::NOT_FOUND,
            "not found",
        );
    });
    checks.check("exec with an id that is taken: already exists", || {
        let sleep = process(&["sleep", "100000"]);
        shim.exec(version, "sleep", &sleep, [""; 3]).unwrap();
        let again = shim.exec(version, "sleep", &sleep, [""; 3]);
        assert_refused(again, ttrpc::Code::ALREADY_EXISTS, "sleep");
    });
    checks.check(
        "SIGTERM to an exec: 143, for two waiters; then kill is not found",
        || {
            shim.start_process(version, "sleep").unwrap();
            let statuses = std::thread::scope(|scope| {
                let waiters = [(); 2].map(|()| scope.spawn(|| shim.wait(version, "sleep")));
                std::thread::sleep(Duration::from_millis(300));
                shim.kill(version, "sleep", 15, false).unwrap();
                waiters.map(|waiter| waiter.join().unwrap().unwrap().exit_status)
            });
            assert_eq!(statuses, [143, 143]);
            assert_refused(
                shim.kill(version, "sleep", 15, false),
                ttrpc::Code::NOT_FOUND,
                "",
            );
            assert_eq!(shim.delete(version, "sleep").unwrap().exit_status, 143);
        },
    );
    checks.check(
        "exec of a missing program names it, and leaves no exec behind",
        || {
            let missing = process(&["/no/such/program"]);
            let added = shim.exec(version, "missing", &missing, [""; 3]);
            let failed = added.and_then(|_| shim.start_process(version, "missing").map(|_| ()));
            let message = failed.unwrap_err().to_string();
            assert!(message.contains("/no/such/program"), "{message}");
            let _ = shim.delete(version, "missing");
            assert_refused(shim.state(version, "missing"), ttrpc::Code::NOT_FOUND, "");
        },
    );
    checks.check(
        "exec with a bad id, or a process that is no JSON, is refused",
        || {
            let bad = shim.exec(version, "../up", &process(&["true"]), [""; 3]);
            assert_refused(bad, ttrpc::Code::INVALID_ARGUMENT, "../up");
            let none = shim.exec(version, "nothing", &serde_json::json!({"args": 5}), [""; 3]);
            assert_refused(none, ttrpc::Code::INVALID_ARGUMENT, "");
        },
    );
}

fn ended(checks: &mut Checks, shim: &Shim<'_>, version: TaskVersion, out: ReadFifo, err: ReadFifo) {
    checks.check("SIGKILL to the container: 137, state stopped", || {
        shim.kill(version, "", 9, true).unwrap();
        assert_eq!(shim.wait(version, "").unwrap().exit_status, 137);
        let state = shim.state(version, "").unwrap();
        assert_eq!(state.status.enum_value(), Ok(Status::STOPPED), "{state:?}");
        assert_eq!(state.exit_status, 137);
    });
    checks.check("delete, with all output drained to its own FIFO", || {
        let began = Instant::now();
        let deleted = shim.delete(version, "").unwrap();
        assert_eq!(deleted.exit_status, 137);
        assert_eq!(out.read(SLOW), "to stdout\n");
        assert_eq!(err.read(SLOW), "to stderr\n");
        assert!(began.elapsed() < SLOW);
        assert_refused(shim.delete(version, ""), ttrpc::Code::NOT_FOUND, "");
    });
}
