//! What is made before a machine is saved, and the identity that comes after it was continued.

mod common;

use common::{Agent, host_is_able, read_all, status, with};
use serde_json::json;
use tokio::io::AsyncWriteExt;
use ttrpc::Code;

const ID: [u8; 16] = [7; 16];

/// The namespaces that the agent holds by descriptors, as the kernel names them.
fn held(agent: &Agent) -> Vec<String> {
    let folder = format!("/proc/{}/fd", agent.pid());
    let mut held: Vec<String> = std::fs::read_dir(folder)
        .expect("its descriptors")
        .flatten()
        .filter_map(|entry| std::fs::read_link(entry.path()).ok())
        .map(|link| link.to_string_lossy().into_owned())
        .filter(|link| link.starts_with("net:[") || link.starts_with("ipc:["))
        .collect();
    held.sort();
    held
}

fn children(agent: &Agent) -> Vec<u32> {
    let list = std::fs::read_to_string(format!("/proc/{0}/task/{0}/children", agent.pid()));
    let list = list.expect("its children");
    list.split_whitespace()
        .filter_map(|pid| pid.parse().ok())
        .collect()
}

fn namespace_of(pid: u32, kind: &str) -> String {
    let link = std::fs::read_link(format!("/proc/{pid}/ns/{kind}")).expect("a namespace");
    link.to_string_lossy().into_owned()
}

#[tokio::test]
async fn spares_serve_the_first_container_that_wants_new_ones() {
    if !host_is_able() {
        return;
    }
    let agent = Agent::start().await;
    let own = namespace_of(agent.pid(), "net");
    agent.prepare().await.expect("prepared");
    let spares = held(&agent);
    assert_eq!(spares.len(), 2, "{spares:?}");
    agent.prepare().await.expect("prepared again");
    assert_eq!(held(&agent), spares, "nothing is made twice");
    assert_eq!(namespace_of(agent.pid(), "net"), own, "the agent is back");
    agent.identify(&ID).await.expect("identified");

    let sharing = agent.spec("c0", &["sleep", "1000"]);
    let shared = json!([{"type": "pid"}, {"type": "uts"}, {"type": "mount"}]);
    let sharing = with(sharing, "/linux/namespaces", shared);
    let pid = agent.create("c0", &sharing, Default::default()).await;
    assert_eq!(namespace_of(pid.expect("created"), "net"), own);
    assert_eq!(held(&agent), spares, "it wanted none");

    let spec = agent.spec("c1", &["sleep", "1000"]);
    let pid = agent.create("c1", &spec, Default::default()).await;
    let pid = pid.expect("created");
    let mut taken = vec![namespace_of(pid, "net"), namespace_of(pid, "ipc")];
    taken.sort();
    assert_eq!(taken, spares);
    assert!(held(&agent).is_empty(), "only the container holds them now");

    let spec = agent.spec("c2", &["ip", "-o", "link", "show", "up"]);
    let (_, out, err) = agent.run("c2", &spec).await;
    assert!(out.contains("lo:"), "made when it was needed: {out}{err}");
    for id in ["c0", "c1"] {
        agent.signal(id, "", 9, false).await.expect("killed");
        agent.wait(id, "").await.expect("waited");
        agent.delete(id, "").await.expect("deleted");
    }
    agent.assert_nothing_left();
}

#[tokio::test]
async fn a_container_works_in_spare_namespaces() {
    if !host_is_able() {
        return;
    }
    let agent = Agent::start().await;
    agent.prepare().await.expect("prepared");
    agent.identify(&ID).await.expect("identified");
    let script = "ip -o link show up; ls /sys/class/net; hostname; cat /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/kernel/msgmax; echo $$";
    let spec = with(
        agent.spec("c1", &["sh", "-c", script]),
        "/linux/sysctl",
        json!({"net.ipv4.ip_unprivileged_port_start": "81", "kernel.msgmax": "4321"}),
    );
    let (status, out, err) = agent.run("c1", &spec).await;
    assert_eq!(status, 0, "{out}{err}");
    assert!(out.starts_with("1: lo:"), "loopback is up: {out}");
    let rest: Vec<&str> = out.lines().skip(1).collect();
    assert_eq!(rest, ["lo", "inside", "81", "4321", "1"], "{out}{err}");
    agent.assert_nothing_left();
}

#[tokio::test]
async fn a_prepared_guest_needs_an_identity_first() {
    if !host_is_able() {
        return;
    }
    let agent = Agent::start().await;
    let spec = agent.spec("c1", &["true"]);
    agent.prepare().await.expect("prepared");
    let create = || agent.create("c1", &spec, Default::default());
    let (code, message) = status(create().await);
    assert_eq!(code, Code::FAILED_PRECONDITION);
    assert!(message.contains("Identify"), "{message}");
    let (code, message) = status(agent.identify(&ID[1..]).await);
    assert_eq!(code, Code::INVALID_ARGUMENT);
    assert!(message.contains("generation_id"), "{message}");
    assert_eq!(status(create().await).0, Code::FAILED_PRECONDITION);

    assert_eq!(agent.identify(&ID).await.expect("identified"), ID);
    create().await.expect("created");
    let (code, message) = status(agent.prepare().await);
    assert_eq!(code, Code::FAILED_PRECONDITION, "{message}");
    agent.start_container("c1").await.expect("started");
    agent.wait("c1", "").await.expect("waited");
    agent.delete("c1", "").await.expect("deleted");
    agent.assert_nothing_left();

    agent.prepare().await.expect("prepared once more");
    assert_eq!(
        status(create().await).0,
        Code::FAILED_PRECONDITION,
        "the identity of before is no longer its own"
    );
}

#[tokio::test]
async fn the_process_made_ahead_becomes_the_first_container_that_it_suits() {
    if !host_is_able() {
        return;
    }
    let agent = Agent::start().await;
    agent.prepare().await.expect("prepared");
    agent.identify(&ID).await.expect("identified");
    let ahead = children(&agent);
    assert_eq!(ahead.len(), 1, "{ahead:?}");

    // One that sees the guest's processes can't be made of it.
    let namespaces = json!([{"type": "mount"}, {"type": "ipc"}]);
    let spec = with(
        agent.spec("c0", &["true"]),
        "/linux/namespaces",
        namespaces.clone(),
    );
    let spec = with(spec, "/hostname", json!(""));
    let pid = agent.create("c0", &spec, Default::default()).await;
    assert_ne!(pid.expect("created"), ahead[0]);
    // Nor one whose spec is longer than anyone expects.
    let spec = agent.spec("c1", &["true"]);
    let long = with(spec, "/annotations", json!({"long": "x".repeat(70_000)}));
    let pid = agent.create("c1", &long, Default::default()).await;
    assert_ne!(pid.expect("created"), ahead[0]);
    assert!(children(&agent).contains(&ahead[0]), "it still waits");

    let script = "cat; readlink /proc/self/ns/uts; echo err >&2; exit 9";
    let spec = agent.spec("c2", &["sh", "-c", script]);
    let (tokens, [mut stdin, stdout, stderr]) = agent.streams().await;
    let pid = agent.create("c2", &spec, tokens).await.expect("created");
    assert_eq!(pid, ahead[0]);
    assert_ne!(
        namespace_of(pid, "uts"),
        namespace_of(agent.pid(), "uts"),
        "what wasn't made ahead is made now"
    );
    agent.start_container("c2").await.expect("started");
    stdin.write_all(b"in\n").await.expect("written");
    drop(stdin);
    let out = read_all(stdout).await;
    assert!(out.starts_with("in\nuts:["), "{out}");
    assert_eq!(read_all(stderr).await, "err\n");
    assert_eq!(agent.wait("c2", "").await.expect("waited").exit_status, 9);
    for id in ["c0", "c1"] {
        agent.signal(id, "", 9, false).await.expect("killed");
        agent.wait(id, "").await.expect("waited");
    }
    for id in ["c0", "c1", "c2"] {
        agent.delete(id, "").await.expect("deleted");
    }
    agent.assert_nothing_left();
}

#[tokio::test]
async fn a_refused_container_leaves_nothing_of_what_was_made_ahead() {
    if !host_is_able() {
        return;
    }
    let agent = Agent::start().await;
    agent.prepare().await.expect("prepared");
    agent.identify(&ID).await.expect("identified");
    let spec = agent.spec("c1", &["/no/such/program"]);
    let (tokens, [_stdin, stdout, _stderr]) = agent.streams().await;
    let (code, message) = status(agent.create("c1", &spec, tokens).await);
    assert_eq!(code, Code::NOT_FOUND, "{message}");
    assert!(message.contains("/no/such/program"), "{message}");
    assert_eq!(read_all(stdout).await, "");
    agent.assert_nothing_left();
    let (status, out, _) = agent.run("c1", &agent.spec("c2", &["echo", "next"])).await;
    assert_eq!((status, out.as_str()), (0, "next\n"));
    agent.assert_nothing_left();
}

#[tokio::test]
async fn a_process_made_ahead_that_has_died_is_done_without() {
    if !host_is_able() {
        return;
    }
    let agent = Agent::start().await;
    agent.prepare().await.expect("prepared");
    agent.identify(&ID).await.expect("identified");
    let [ahead] = children(&agent)[..] else {
        panic!("one process is made ahead");
    };
    let pid = rustix::process::Pid::from_raw(ahead as i32).expect("a pid");
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).expect("killed");
    while !children(&agent).is_empty() {
        tokio::task::yield_now().await;
    }
    let (status, out, _) = agent.run("c1", &agent.spec("c1", &["echo", "here"])).await;
    assert_eq!((status, out.as_str()), (0, "here\n"));
    agent.assert_nothing_left();
}

#[tokio::test]
async fn a_terminal_works_in_a_process_made_ahead() {
    if !host_is_able() {
        return;
    }
    let agent = Agent::start().await;
    agent.prepare().await.expect("prepared");
    agent.identify(&ID).await.expect("identified");
    let spec = agent.spec("c1", &["sh", "-c", "tty; stty size"]);
    let spec = with(spec, "/process/terminal", json!(true));
    let (stdout_token, stdout) = agent.dial().await;
    let streams = bulkhead_proto::agent::Streams {
        stdout_token,
        ..Default::default()
    };
    agent.create("c1", &spec, streams).await.expect("created");
    agent.start_container("c1").await.expect("started");
    assert_eq!(read_all(stdout).await, "/dev/pts/0\r\n33 101\r\n");
    agent.wait("c1", "").await.expect("waited");
    agent.delete("c1", "").await.expect("deleted");
    agent.assert_nothing_left();
}
