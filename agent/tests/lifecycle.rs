//! The life of containers and their further processes.

mod common;

use common::{Agent, host_is_able, read_all, status, with};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use ttrpc::Code;

#[tokio::test]
async fn a_container_runs_and_leaves_nothing() {
    if !host_is_able() {
        return;
    }
    let agent = Agent::start().await;
    let spec = agent.spec("c1", &["sh", "-c", "echo out; echo err >&2; cat; exit 7"]);
    let (tokens, [mut stdin, stdout, stderr]) = agent.streams().await;
    let pid = agent.create("c1", &spec, tokens).await.expect("created");
    assert!(pid > 1);
    agent.start_container("c1").await.expect("started");
    stdin.write_all(b"in\n").await.expect("written");
    drop(stdin);
    assert_eq!(read_all(stdout).await, "out\nin\n");
    assert_eq!(read_all(stderr).await, "err\n");
    let exit = agent.wait("c1", "").await.expect("waited");
    assert_eq!(exit.exit_status, 7);
    assert!(exit.exited_at_seconds > 1_700_000_000 && !exit.oom_killed);
    assert_eq!(agent.wait("c1", "").await.expect("waited again"), exit);
    agent.delete("c1", "").await.expect("deleted");
    assert_eq!(status(agent.wait("c1", "").await).0, Code::NOT_FOUND);
    agent.assert_nothing_left();
}

#[tokio::test]
async fn a_further_process_runs_inside() {
    if !host_is_able() {
        return;
    }
    let agent = Agent::start().await;
    let spec = agent.spec("c1", &["sleep", "1000"]);
    agent
        .create("c1", &spec, Default::default())
        .await
        .expect("created");
    agent.start_container("c1").await.expect("started");
    let script = "hostname; echo $$; cat /proc/1/comm; cat";
    let process = json!({"args": ["sh", "-c", script], "cwd": "/tmp", "env": ["PATH=/bin"], "user": {"uid": 0, "gid": 0}});
    let (tokens, [mut stdin, stdout, _stderr]) = agent.streams().await;
    let pid = agent
        .exec("c1", "e1", &process, tokens)
        .await
        .expect("executed");
    stdin.write_all(b"hello\n").await.expect("written");
    drop(stdin);
    let output = read_all(stdout).await;
    let lines: Vec<&str> = output.lines().collect();
    let [host, own, init, echo] = lines[..] else {
        panic!("{output}");
    };
    assert_eq!((host, echo), ("inside", "hello"));
    assert_eq!(init, "sleep", "it sees the container's processes");
    assert_ne!(
        own.parse(),
        Ok(pid),
        "it has a pid of the container's namespace"
    );
    assert_eq!(agent.wait("c1", "e1").await.expect("waited").exit_status, 0);
    assert_eq!(
        status(agent.exec("c1", "e1", &process, Default::default()).await).0,
        Code::ALREADY_EXISTS
    );
    agent.delete("c1", "e1").await.expect("deleted");
    assert_eq!(status(agent.wait("c1", "e1").await).0, Code::NOT_FOUND);

    assert_eq!(
        status(agent.delete("c1", "").await).0,
        Code::FAILED_PRECONDITION
    );
    agent.signal("c1", "", 9, false).await.expect("killed");
    assert_eq!(agent.wait("c1", "").await.expect("waited").exit_status, 137);
    assert_eq!(
        status(agent.signal("c1", "", 15, false).await).0,
        Code::NOT_FOUND
    );
    assert_eq!(
        status(agent.exec("c1", "e2", &process, Default::default()).await).0,
        Code::FAILED_PRECONDITION
    );
    agent.delete("c1", "").await.expect("deleted");
    agent.assert_nothing_left();
}

#[tokio::test]
async fn states_are_kept_apart() {
    if !host_is_able() {
        return;
    }
    let agent = Agent::start().await;
    let spec = agent.spec("c1", &["sleep", "1000"]);
    agent
        .create("c1", &spec, Default::default())
        .await
        .expect("created");
    assert_eq!(
        status(agent.create("c1", &spec, Default::default()).await).0,
        Code::ALREADY_EXISTS
    );
    let process = json!({"args": ["true"], "cwd": "/", "user": {"uid": 0, "gid": 0}});
    assert_eq!(
        status(agent.exec("c1", "e", &process, Default::default()).await).0,
        Code::FAILED_PRECONDITION
    );
    agent.start_container("c1").await.expect("started");
    assert_eq!(
        status(agent.start_container("c1").await).0,
        Code::FAILED_PRECONDITION
    );
    assert_eq!(status(agent.start_container("c2").await).0, Code::NOT_FOUND);
    assert_eq!(
        status(agent.signal("c1", "", 65, false).await).0,
        Code::INVALID_ARGUMENT
    );
    assert_eq!(
        status(agent.resize("c1", "", 1, 1).await).0,
        Code::FAILED_PRECONDITION
    );
    agent.signal("c1", "", 9, true).await.expect("killed");
    agent.wait("c1", "").await.expect("waited");

    // Killed before it was started.
    agent
        .create("c3", &spec, Default::default())
        .await
        .expect("created");
    agent.signal("c3", "", 9, false).await.expect("killed");
    assert_eq!(agent.wait("c3", "").await.expect("waited").exit_status, 137);
    let (code, message) = status(agent.start_container("c3").await);
    assert_eq!(code, Code::FAILED_PRECONDITION);
    assert!(message.contains("stopped"), "{message}");
    agent.delete("c1", "").await.expect("deleted");
    agent.delete("c3", "").await.expect("deleted");
    agent.assert_nothing_left();
}

#[tokio::test]
async fn a_wrong_executable_is_named_and_nothing_is_left() {
    if !host_is_able() {
        return;
    }
    let agent = Agent::start().await;
    let spec = agent.spec("c1", &["true"]);
    std::fs::write(agent.path().join("c1/bin/data"), "no program").expect("a file");
    for (args, code, expected) in [
        (
            json!(["nope"]),
            Code::NOT_FOUND,
            "exec: \"nope\": executable file not found in $PATH",
        ),
        (
            json!(["/bin/nope"]),
            Code::NOT_FOUND,
            "exec: \"/bin/nope\": stat /bin/nope: no such file or directory",
        ),
        (
            json!(["/bin/data"]),
            Code::INVALID_ARGUMENT,
            "exec: \"/bin/data\": permission denied",
        ),
        (
            json!(["/etc"]),
            Code::INVALID_ARGUMENT,
            "exec: \"/etc\": is a directory",
        ),
    ] {
        let spec = with(spec.clone(), "/process/args", args);
        assert_eq!(
            status(agent.create("c1", &spec, Default::default()).await),
            (code, expected.to_owned())
        );
        agent.assert_nothing_left();
    }
    let missing = with(spec.clone(), "/root/path", json!("/no/such/rootfs"));
    let (code, message) = status(agent.create("c1", &missing, Default::default()).await);
    assert_eq!(code, Code::NOT_FOUND);
    assert!(message.contains("/no/such/rootfs"), "{message}");
    let refused = with(
        spec.clone(),
        "/linux/seccomp",
        json!({"defaultAction": "SCMP_ACT_NOTIFY"}),
    );
    let (code, message) = status(agent.create("c1", &refused, Default::default()).await);
    assert_eq!(code, Code::INVALID_ARGUMENT);
    assert!(message.starts_with("linux.seccomp"), "{message}");
    agent.assert_nothing_left();

    // A script without an interpreter: only the kernel can tell.
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(agent.path().join("c1/bin/data"), mode).expect("a mode");
    let script = with(spec.clone(), "/process/args", json!(["/bin/data"]));
    agent
        .create("c1", &script, Default::default())
        .await
        .expect("created");
    let (code, message) = status(agent.start_container("c1").await);
    assert_eq!(
        (code, &*message),
        (Code::INVALID_ARGUMENT, "exec /bin/data: exec format error")
    );
    agent.wait("c1", "").await.expect("it has exited");
    agent.delete("c1", "").await.expect("deleted");

    // The same for further processes.
    let spec = with(spec, "/process/args", json!(["sleep", "1000"]));
    agent
        .create("c2", &spec, Default::default())
        .await
        .expect("created");
    agent.start_container("c2").await.expect("started");
    for (args, code, expected) in [
        (
            json!(["nope"]),
            Code::NOT_FOUND,
            "exec: \"nope\": executable file not found in $PATH",
        ),
        (
            json!(["/bin/data"]),
            Code::INVALID_ARGUMENT,
            "exec /bin/data: exec format error",
        ),
    ] {
        let process = json!({"args": args, "cwd": "/", "user": {"uid": 0, "gid": 0}});
        assert_eq!(
            status(agent.exec("c2", "e", &process, Default::default()).await),
            (code, expected.to_owned())
        );
    }
    let process = json!({"args": ["true"], "cwd": "/nowhere", "user": {"uid": 0, "gid": 0}});
    let (code, message) = status(agent.exec("c2", "e", &process, Default::default()).await);
    assert_eq!(code, Code::INVALID_ARGUMENT);
    assert!(message.contains("/nowhere"), "{message}");
    assert_eq!(
        agent.pids("c2").await.expect("pids").len(),
        1,
        "nothing but the first process"
    );
    agent.signal("c2", "", 9, false).await.expect("killed");
    agent.wait("c2", "").await.expect("waited");
    agent.delete("c2", "").await.expect("deleted");
    agent.assert_nothing_left();
}

#[tokio::test]
async fn all_processes_are_seen_and_signalled() {
    if !host_is_able() {
        return;
    }
    let agent = Agent::start().await;
    // Without a pid namespace of its own, what the first process leaves behind lives on.
    let spec = agent.spec("c1", &["sh", "-c", "sleep 1000 & sleep 1000 & exit 0"]);
    let namespaces = json!([{"type": "mount"}, {"type": "uts"}]);
    let spec = with(spec, "/linux/namespaces", namespaces);
    agent
        .create("c1", &spec, Default::default())
        .await
        .expect("created");
    agent.start_container("c1").await.expect("started");
    assert_eq!(agent.wait("c1", "").await.expect("waited").exit_status, 0);
    let pids = agent.pids("c1").await.expect("pids");
    if pids.is_empty() {
        eprintln!("SKIPPED half of 1 test: this host has no cgroup v2");
        return;
    }
    assert_eq!(pids.len(), 2);
    agent.delete("c1", "").await.expect("deleted");
    for pid in pids {
        // The agent reaps it like any orphan, in its own time.
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while std::path::Path::new(&format!("/proc/{pid}")).exists() {
            assert!(std::time::Instant::now() < deadline, "{pid} is left");
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    }
    agent.assert_nothing_left();
}

#[tokio::test]
async fn waiting_does_not_hang_on_a_child_that_holds_the_output() {
    if !host_is_able() {
        return;
    }
    let agent = Agent::start().await;
    let spec = agent.spec("c1", &["sleep", "1000"]);
    agent
        .create("c1", &spec, Default::default())
        .await
        .expect("created");
    agent.start_container("c1").await.expect("started");
    let process = json!({"args": ["sh", "-c", "sleep 1000 & echo done"], "cwd": "/", "env": ["PATH=/bin"], "user": {"uid": 0, "gid": 0}});
    let (tokens, [_stdin, mut stdout, _stderr]) = agent.streams().await;
    agent
        .exec("c1", "e1", &process, tokens)
        .await
        .expect("executed");
    assert_eq!(agent.wait("c1", "e1").await.expect("waited").exit_status, 0);
    agent.delete("c1", "e1").await.expect("deleted");
    let mut text = [0; 5];
    stdout.read_exact(&mut text).await.expect("what it wrote");
    assert_eq!(&text, b"done\n");
    agent.signal("c1", "", 9, false).await.expect("killed");
    assert_eq!(
        read_all(stdout).await,
        "",
        "the stream ends with the last writer"
    );
    agent.wait("c1", "").await.expect("waited");
    agent.delete("c1", "").await.expect("deleted");
    agent.assert_nothing_left();
}
