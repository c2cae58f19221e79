//! A pod's life as its callers see it, with a VMM's double and an agent in the test's own memory.

mod common;
#[path = "life/memory.rs"]
mod memory;
#[path = "life/network.rs"]
mod network;
#[path = "life/pods.rs"]
mod pods;
#[path = "life/resources.rs"]
mod resources;
#[path = "life/templates.rs"]
mod templates;

use bulkhead_sandbox::{Error, ExitStatus, Kind, RootfsMount, Status, StdioPaths};
use common::{Pod, exec, possible, process};
use serde_json::json;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

fn kill(pid: u32) {
    let pid = nix::unistd::Pid::from_raw(pid.try_into().unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
}

#[tokio::test]
async fn from_nothing_to_a_container_and_back() {
    if !possible() {
        return;
    }
    let mut pod = Pod::new("ready").await;
    let pid = pod.run("c1", &["exit", "3"]).await;
    let exit = pod.sandbox.wait(process("c1")).await.unwrap();
    assert_eq!(exit.code, 3);
    let state = pod.sandbox.state(process("c1")).await.unwrap();
    assert_eq!((state.pid, state.status), (pid, Status::Stopped(exit)));
    assert!(matches!(
        pod.sandbox.signal(process("c1"), 9, false).await,
        Err(Error::AlreadyFinished)
    ));
    let deleted = pod.sandbox.delete(process("c1")).await.unwrap();
    assert_eq!((deleted.pid, deleted.exit), (pid, exit));
    assert_eq!(
        pod.told(),
        ["created c1", "started c1", "exited c1 3", "deleted c1"]
    );
    assert!(pod.sandbox.is_empty().await.unwrap());
    pod.assert_nothing_left().await;
    // And once more in the same sandbox.
    pod.run("c1", &["exit", "0"]).await;
    pod.sandbox.wait(process("c1")).await.unwrap();
    pod.sandbox.delete(process("c1")).await.unwrap();
    pod.assert_nothing_left().await;
}

#[tokio::test]
async fn calls_that_do_not_fit_are_refused_by_kind() {
    if !possible() {
        return;
    }
    let pod = Pod::new("ready").await;
    pod.run("c1", &["sleep"]).await;
    let kind = |error: Error| error.kind();
    let sandbox = &pod.sandbox;
    assert_eq!(
        kind(
            sandbox
                .create(pod.request("c1", &["sleep"]))
                .await
                .unwrap_err()
        ),
        Kind::AlreadyExists
    );
    assert_eq!(
        kind(sandbox.start(process("c1")).await.unwrap_err()),
        Kind::FailedPrecondition
    );
    assert_eq!(
        kind(sandbox.delete(process("c1")).await.unwrap_err()),
        Kind::FailedPrecondition
    );
    assert_eq!(
        kind(sandbox.start(process("c2")).await.unwrap_err()),
        Kind::NotFound
    );
    assert_eq!(
        kind(sandbox.wait(exec("c1", "e1")).await.unwrap_err()),
        Kind::NotFound
    );
    assert_eq!(
        sandbox.task_pid(process("c2").container).await.unwrap(),
        None
    );
    sandbox.stop().await.unwrap();
    pod.assert_nothing_left().await;
}

#[tokio::test]
async fn a_failed_create_names_the_cause_and_leaves_nothing() {
    if !possible() {
        return;
    }
    let pod = Pod::new("ready").await;
    let good = || pod.request("c1", &["exit", "0"]);
    let spec = |root: &str, mounts: serde_json::Value| {
        json!({"ociVersion": "1.0.2", "root": {"path": root}, "mounts": mounts,
               "process": {"cwd": "/", "args": ["exit", "0"], "user": {"uid": 0, "gid": 0}}})
    };
    let config = |change: &dyn Fn(&mut bulkhead_sandbox::config::Config)| {
        let mut config = pod.config();
        change(&mut config);
        let mut request = good();
        request.config = config.into();
        request
    };
    let mounted = |options: &[&str], kind: &str| {
        let options = options.iter().map(|option| (*option).into()).collect();
        let tmpfs = RootfsMount {
            kind: "tmpfs".into(),
            source: "t".into(),
            target: String::new(),
            options: Vec::new(),
        };
        let bad = RootfsMount {
            kind: kind.into(),
            source: "/nonexistent/layer".into(),
            target: String::new(),
            options,
        };
        let mut request = good();
        request.rootfs = vec![tmpfs, bad];
        request
    };
    let stdio = |stdout: &str| {
        let mut request = good();
        request.stdio = StdioPaths {
            stdout: stdout.into(),
            ..StdioPaths::default()
        };
        request
    };
    let mut missing = pod.request("c1", &["missing"]);
    missing.rootfs = mounted(&[], "").rootfs[..1].to_vec();
    let bind = json!([{"destination": "/x", "type": "bind", "source": "/nonexistent/volume"}]);
    let hook = json!({"prestart": [{"path": "/bin/false"}]});
    let mut hooked = spec("rootfs", json!([]));
    hooked["hooks"] = hook;
    for (request, wanted) in [
        (
            missing,
            r#"OCI runtime create failed: exec: "missing": executable file not found in $PATH"#,
        ),
        (
            pod.request_with("c1", spec("nonexistent-root", json!([]))),
            "nonexistent-root",
        ),
        (
            pod.request_with("c1", spec("rootfs", bind)),
            "/nonexistent/volume",
        ),
        (pod.request_with("c1", hooked), "prestart hook /bin/false"),
        (
            config(&|config| config.kernel = "/nonexistent/vmlinux".into()),
            "/nonexistent/vmlinux",
        ),
        (
            config(&|config| config.memory_mib = 1 << 20),
            "this host has",
        ),
        (mounted(&["bind"], "bind"), "/nonexistent/layer"),
        // A disk, which goes to the guest; a tmpfs below it does not.
        (mounted(&["loop"], "ext4"), "as a disk"),
        (stdio("/nonexistent/fifo"), "/nonexistent/fifo"),
        (stdio("carrier-pigeon:///x"), "carrier-pigeon"),
    ] {
        let error = pod.sandbox.create(request).await.unwrap_err().to_string();
        assert!(error.contains(wanted), "{wanted}: {error}");
        pod.assert_nothing_left().await;
        assert!(pod.sandbox.is_empty().await.unwrap());
        assert!(pod.sandbox.state(process("c1")).await.is_err());
    }
    // The sandbox is as good as new.
    let request = pod.request("c1", &["exit", "0"]);
    pod.sandbox.create(request).await.unwrap();
    pod.sandbox.delete(process("c1")).await.unwrap();
    pod.assert_nothing_left().await;
}

#[tokio::test]
async fn a_vm_that_does_not_come_up_says_why_and_leaves_nothing() {
    if !possible() {
        return;
    }
    for (mode, wanted) in [
        ("fail", "cannot create a VM: the double was told so"),
        ("panic", "Kernel panic - not syncing"),
        ("vanish", "exit code 7"),
        ("bye", "the guest shut down"),
    ] {
        let pod = Pod::new(mode).await;
        let error = pod
            .sandbox
            .create(pod.request("c1", &["sleep"]))
            .await
            .unwrap_err()
            .to_string();
        assert!(error.contains(wanted), "{mode}: {error}");
        pod.assert_nothing_left().await;
    }
}

#[tokio::test]
async fn when_the_vmm_is_killed_every_process_ends_once_with_137() {
    if !possible() {
        return;
    }
    let mut pod = Pod::new("ready").await;
    let pid = pod.run("c1", &["sleep"]).await;
    pod.add_exec("c1", "e1", &["sleep"]).await;
    pod.sandbox.start(exec("c1", "e1")).await.unwrap();
    let (one, two) = (pod.sandbox.clone(), pod.sandbox.clone());
    let waiting = tokio::spawn(async move { one.wait(process("c1")).await });
    let waiting_exec = tokio::spawn(async move { two.wait(exec("c1", "e1")).await });
    tokio::time::sleep(Duration::from_millis(50)).await;
    kill(pid);
    let limit = Duration::from_secs(5);
    assert_eq!(
        timeout(limit, waiting)
            .await
            .unwrap()
            .unwrap()
            .unwrap()
            .code,
        137
    );
    assert_eq!(
        timeout(limit, waiting_exec)
            .await
            .unwrap()
            .unwrap()
            .unwrap()
            .code,
        137
    );
    assert!(matches!(
        pod.sandbox.signal(process("c1"), 9, false).await,
        Err(Error::AlreadyFinished)
    ));
    let error = pod
        .sandbox
        .create(pod.request("c2", &["sleep"]))
        .await
        .unwrap_err()
        .to_string();
    assert!(error.contains("killed by signal 9"), "{error}");
    pod.sandbox.delete(exec("c1", "e1")).await.unwrap();
    pod.sandbox.delete(process("c1")).await.unwrap();
    let told = pod.told();
    let wanted = [
        "created c1",
        "started c1",
        "added e1",
        "started e1",
        "exited e1 137",
        "exited c1 137",
        "deleted c1",
    ];
    assert_eq!(told, wanted);
    pod.assert_nothing_left().await;
}

#[tokio::test]
async fn an_inits_end_is_told_after_its_execs() {
    if !possible() {
        return;
    }
    let mut pod = Pod::new("ready").await;
    pod.run("c1", &["sleep"]).await;
    pod.add_exec("c1", "e1", &["sleep"]).await;
    pod.add_exec("c1", "e2", &["exit", "4"]).await;
    pod.sandbox.start(exec("c1", "e1")).await.unwrap();
    pod.sandbox.start(exec("c1", "e2")).await.unwrap();
    assert_eq!(pod.sandbox.wait(exec("c1", "e2")).await.unwrap().code, 4);
    pod.sandbox.delete(exec("c1", "e2")).await.unwrap();
    pod.told();
    pod.sandbox.signal(process("c1"), 15, false).await.unwrap();
    assert_eq!(pod.sandbox.wait(process("c1")).await.unwrap().code, 143);
    assert_eq!(pod.told(), ["exited e1 137", "exited c1 143"]);
    pod.sandbox.delete(process("c1")).await.unwrap();
    pod.assert_nothing_left().await;
}

#[tokio::test]
async fn a_container_that_never_started_is_killed_by_its_delete() {
    if !possible() {
        return;
    }
    let mut pod = Pod::new("ready").await;
    pod.sandbox
        .create(pod.request("c1", &["sleep"]))
        .await
        .unwrap();
    let deleted = pod.sandbox.delete(process("c1")).await.unwrap();
    assert_eq!(deleted.exit.code, 137);
    assert_eq!(
        pod.agent.calls(),
        [
            "create c1 sleep",
            "signal c1 9 true",
            "delete c1",
            "shutdown"
        ]
    );
    assert_eq!(pod.told(), ["created c1", "exited c1 137", "deleted c1"]);
    pod.assert_nothing_left().await;
}

#[tokio::test]
async fn containers_share_the_vm_which_ends_with_the_last_and_a_slow_one_holds_up_nobody() {
    if !possible() {
        return;
    }
    let pod = Pod::new("ready").await;
    let (first, second) = tokio::join!(pod.run("c1", &["sleep"]), pod.run("c2", &["sleep"]));
    assert_eq!(first, second, "one VM");
    let (sandbox, slow) = (pod.sandbox.clone(), pod.request("c3", &["hang"]));
    let slow = tokio::spawn(async move { sandbox.create(slow).await });
    tokio::time::sleep(Duration::from_millis(50)).await;
    let quick = timeout(Duration::from_secs(5), pod.sandbox.state(process("c1")));
    assert_eq!(quick.await.unwrap().unwrap().status, Status::Running);
    assert!(
        pod.sandbox.state(process("c3")).await.is_err(),
        "not there before it's created"
    );
    for id in ["c1", "c2"] {
        pod.sandbox.signal(process(id), 9, false).await.unwrap();
        pod.sandbox.wait(process(id)).await.unwrap();
        pod.sandbox.delete(process(id)).await.unwrap();
    }
    assert!(!slow.is_finished());
    let error = timeout(Duration::from_secs(60), slow)
        .await
        .unwrap()
        .unwrap()
        .unwrap_err();
    assert!(
        error.to_string().contains("did not answer `create`"),
        "{error}"
    );
    pod.assert_nothing_left().await;
}

#[tokio::test]
async fn a_pods_own_container_needs_no_process_and_ends_by_signal() {
    if !possible() {
        return;
    }
    let mut pod = Pod::new("ready").await;
    let annotated = |kind: &str, uts: serde_json::Value| {
        json!({"ociVersion": "1.0.2", "root": {"path": "rootfs"}, "hostname": if kind == "sandbox" { json!("web-0") } else { json!(null) },
               "annotations": {"io.kubernetes.cri.container-type": kind, "io.kubernetes.cri.sandbox-id": "pod"},
               "linux": {"namespaces": [uts]},
               "process": {"cwd": "/", "args": ["sleep"], "user": {"uid": 0, "gid": 0}}})
    };
    let request = pod.request_with("pod", annotated("sandbox", json!({"type": "uts"})));
    pod.sandbox.create(request).await.unwrap();
    pod.sandbox.start(process("pod")).await.unwrap();
    assert!(pod.agent.calls().is_empty());
    let joined = json!({"type": "uts", "path": "/proc/1/ns/uts"});
    pod.sandbox
        .create(pod.request_with("c1", annotated("container", joined)))
        .await
        .unwrap();
    pod.sandbox.start(process("c1")).await.unwrap();
    pod.sandbox.signal(process("c1"), 9, false).await.unwrap();
    pod.sandbox.wait(process("c1")).await.unwrap();
    pod.sandbox.delete(process("c1")).await.unwrap();
    assert_eq!(
        pod.sandbox.state(process("pod")).await.unwrap().status,
        Status::Running
    );
    pod.sandbox.signal(process("pod"), 28, false).await.unwrap();
    pod.sandbox.signal(process("pod"), 15, false).await.unwrap();
    assert_eq!(pod.sandbox.wait(process("pod")).await.unwrap().code, 143);
    pod.sandbox.delete(process("pod")).await.unwrap();
    assert!(
        pod.told()
            .ends_with(&["exited pod 143".into(), "deleted pod".into()])
    );
    pod.assert_nothing_left().await;
}

#[tokio::test]
async fn standard_streams_reach_the_process_and_all_output_comes_before_the_end() {
    if !possible() {
        return;
    }
    let pod = Pod::new("ready").await;
    let fifo = |name: &str| {
        let path = pod.dir.path().join(name);
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        path
    };
    let (stdin, stdout) = (fifo("in"), fifo("out"));
    let mut request = pod.request("c1", &["cat"]);
    request.stdio.stdin = stdin.display().to_string();
    request.stdio.stdout = stdout.display().to_string();
    let mut output = tokio::net::unix::pipe::OpenOptions::new()
        .open_receiver(&stdout)
        .unwrap();
    pod.sandbox.create(request).await.unwrap();
    pod.sandbox.start(process("c1")).await.unwrap();
    let sent: Vec<u8> = (0..3_000_000_u32).map(|n| (n % 251) as u8).collect();
    let expected = sent.clone();
    let reader = tokio::spawn(async move {
        let mut received = Vec::new();
        output.read_to_end(&mut received).await.unwrap();
        received
    });
    let mut input = tokio::net::unix::pipe::OpenOptions::new()
        .open_sender(&stdin)
        .unwrap();
    input.write_all(&sent).await.unwrap();
    drop(input);
    assert_eq!(
        pod.sandbox.state(process("c1")).await.unwrap().status,
        Status::Running
    );
    pod.sandbox.close_stdin(process("c1")).await.unwrap();
    let exit: ExitStatus = timeout(Duration::from_secs(10), pod.sandbox.wait(process("c1")))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(exit.code, 0);
    assert!(
        timeout(Duration::from_secs(5), reader)
            .await
            .unwrap()
            .unwrap()
            == expected
    );
    pod.sandbox.delete(process("c1")).await.unwrap();
    pod.assert_nothing_left().await;
}
