//! Containers of a pod that share their processes.

mod common;

use bulkhead_proto::guest::POD_PID_NAMESPACE;
use common::{Agent, host_is_able, read_all, status, with};
use serde_json::{Value, json};
use std::time::Duration;
use ttrpc::Code;

/// A spec with the pod's pid namespace.
fn sharing(agent: &Agent, id: &str, args: &[&str]) -> Value {
    let pids = json!({"type": "pid", "path": POD_PID_NAMESPACE});
    with(agent.spec(id, args), "/linux/namespaces/0", pids)
}

async fn start(agent: &Agent, id: &str, spec: &Value) {
    agent
        .create(id, spec, Default::default())
        .await
        .expect("created");
    agent.start_container(id).await.expect("started");
}

/// What a shell script prints that runs in a container.
async fn shell(agent: &Agent, id: &str, name: &str, script: &str) -> String {
    let process = json!({"args": ["sh", "-c", script], "cwd": "/", "env": ["PATH=/bin"], "user": {"uid": 0, "gid": 0},
        "capabilities": {"bounding": ["CAP_KILL", "CAP_SYS_PTRACE"], "effective": ["CAP_KILL", "CAP_SYS_PTRACE"], "permitted": ["CAP_KILL", "CAP_SYS_PTRACE"]}});
    let (tokens, [_stdin, stdout, stderr]) = agent.streams().await;
    agent
        .exec(id, name, &process, tokens)
        .await
        .expect("executed");
    let text = read_all(stdout).await;
    let errors = read_all(stderr).await;
    assert_eq!(errors, "", "{script}: {text}");
    text
}

async fn end(agent: &Agent, id: &str) {
    agent.signal(id, "", 9, true).await.expect("killed");
    agent.wait(id, "").await.expect("waited");
    agent.delete(id, "").await.expect("deleted");
}

/// Waits until a container sees as many processes sleep, and returns the names of all.
async fn until_sleeping(agent: &Agent, id: &str, count: usize) -> String {
    let script = "for p in /proc/[0-9]*; do cat $p/comm 2>/dev/null; done; true";
    for attempt in 0..300 {
        let name = format!("look-{count}-{attempt}");
        let seen = shell(agent, id, &name, script).await;
        if seen.matches("sleep").count() == count {
            return seen;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    panic!("there are never {count} sleeps");
}

#[tokio::test]
async fn they_see_each_other_and_nothing_else() {
    if !host_is_able() {
        return;
    }
    let agent = Agent::start().await;
    let spec = sharing(&agent, "c1", &["sleep", "1000"]);
    start(&agent, "c1", &spec).await;
    start(&agent, "c2", &sharing(&agent, "c2", &["sleep", "1000"])).await;
    let busy = sharing(&agent, "c3", &["sh", "-c", "sleep 1000 & sleep 1001"]);
    start(&agent, "c3", &busy).await;
    assert_eq!(shell(&agent, "c3", "e1", "cat /proc/1/comm").await, "pod\n");
    let seen = until_sleeping(&agent, "c3", 4).await;
    let strangers: Vec<&str> = seen
        .lines()
        .filter(|command| !["pod", "sleep", "sh", "cat"].contains(command))
        .collect();
    assert!(strangers.is_empty(), "{seen}");

    // The first one's end is not that of the others, and what one leaves behind goes with it.
    end(&agent, "c1").await;
    until_sleeping(&agent, "c2", 3).await;
    end(&agent, "c3").await;
    until_sleeping(&agent, "c2", 1).await;

    // A restarted one comes back to the same namespace.
    start(&agent, "c1", &spec).await;
    let of = "readlink /proc/self/ns/pid";
    let (one, other) = (
        shell(&agent, "c1", "e1", of).await,
        shell(&agent, "c2", "e3", of).await,
    );
    assert_eq!(one, other);
    let own = std::fs::read_link("/proc/self/ns/pid").expect("a link");
    assert_ne!(one.trim_end(), own.to_string_lossy());
    end(&agent, "c1").await;
    end(&agent, "c2").await;
}

#[tokio::test]
async fn process_1_is_worth_nothing_to_them() {
    if !host_is_able() {
        return;
    }
    let agent = Agent::start().await;
    start(&agent, "c1", &sharing(&agent, "c1", &["sleep", "1000"])).await;
    let script = "kill -9 1; kill 1; cat /proc/1/status";
    let seen = shell(&agent, "c1", "e1", script).await;
    let none = "0000000000000000";
    for line in [
        "Uid:\t65534\t65534\t65534\t65534\n".to_owned(),
        format!("CapPrm:\t{none}\nCapEff:\t{none}\n"),
        "NoNewPrivs:\t1\n".to_owned(),
    ] {
        assert!(seen.contains(&line), "{seen}");
    }
    // Its root is empty, and nothing is above it; it has no open files.
    let script = "for f in root root/.. root/../.. cwd fd; do ls -A /proc/1/$f/; done";
    assert_eq!(shell(&agent, "c1", "e2", script).await, "");
    end(&agent, "c1").await;
}

#[tokio::test]
async fn who_comes_to_a_container_with_its_own_processes_sees_these() {
    if !host_is_able() {
        return;
    }
    let agent = Agent::start().await;
    start(&agent, "c1", &agent.spec("c1", &["sleep", "1000"])).await;
    start(&agent, "c2", &sharing(&agent, "c2", &["sleep", "1000"])).await;
    let of = "readlink /proc/self/ns/pid; cat /proc/1/comm";
    let (one, other) = (
        shell(&agent, "c1", "e1", of).await,
        shell(&agent, "c2", "e1", of).await,
    );
    assert_eq!(one, other);
    // With the first process of its namespace the other goes as well.
    end(&agent, "c1").await;
    let exit = agent.wait("c2", "").await.expect("waited");
    assert_eq!(exit.exit_status, 137);
    let process = json!({"args": ["true"], "cwd": "/", "user": {"uid": 0, "gid": 0}});
    let late = agent.exec("c2", "e2", &process, Default::default()).await;
    assert_eq!(status(late).0, Code::FAILED_PRECONDITION);
    agent.delete("c2", "").await.expect("deleted");
    agent.assert_nothing_left();
}
