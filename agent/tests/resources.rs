//! Figures, changed limits, pauses and devices: what works on a cgroup, controllers or not.

mod common;

use common::{Agent, host_is_able, read_all, status, with};
use serde_json::json;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use ttrpc::Code;

/// An agent whose containers have cgroups; says so if they can't have any.
async fn agent_with_cgroups() -> Option<Agent> {
    if !host_is_able() {
        return None;
    }
    let agent = Agent::start().await;
    if agent.cgroup_of("c").is_none() {
        eprintln!("SKIPPED 1 test: this host has no cgroup v2 tree");
        return None;
    }
    Some(agent)
}

async fn end(agent: &Agent, id: &str) {
    agent.signal(id, "", 9, false).await.expect("killed");
    assert_eq!(agent.wait(id, "").await.expect("waited").exit_status, 137);
    agent.delete(id, "").await.expect("deleted");
}

#[tokio::test]
async fn a_paused_container_stands_still_and_goes_on() {
    let Some(agent) = agent_with_cgroups().await else {
        return;
    };
    let spec = agent.spec("c1", &["cat"]);
    let (tokens, [mut stdin, mut stdout, _stderr]) = agent.streams().await;
    agent.create("c1", &spec, tokens).await.expect("created");
    agent.start_container("c1").await.expect("started");
    let (code, message) = status(agent.resume("c1").await);
    assert_eq!(code, Code::FAILED_PRECONDITION);
    assert!(message.contains("not paused"), "{message}");

    agent.pause("c1").await.expect("paused");
    let events = agent.cgroup_of("c1").expect("a cgroup");
    let events = std::fs::read_to_string(events.join("cgroup.events")).expect("events");
    assert!(events.contains("frozen 1"), "{events}");
    assert_eq!(
        status(agent.pause("c1").await).0,
        Code::FAILED_PRECONDITION,
        "twice"
    );
    let process = json!({"args": ["true"], "cwd": "/", "user": {"uid": 0, "gid": 0}});
    let (code, message) = status(agent.exec("c1", "e1", &process, Default::default()).await);
    assert_eq!(code, Code::FAILED_PRECONDITION);
    assert!(message.contains("paused"), "{message}");
    stdin.write_all(b"hello\n").await.expect("written");
    let mut echo = [0; 6];
    let early = tokio::time::timeout(Duration::from_millis(200), stdout.read_exact(&mut echo));
    assert!(early.await.is_err(), "a paused process answered");

    agent.resume("c1").await.expect("resumed");
    stdout.read_exact(&mut echo).await.expect("an answer");
    assert_eq!(&echo, b"hello\n");
    end(&agent, "c1").await;
    agent.assert_nothing_left();
}

#[tokio::test]
async fn a_paused_container_can_be_killed() {
    let Some(agent) = agent_with_cgroups().await else {
        return;
    };
    for (id, all) in [("c1", false), ("c2", true)] {
        let spec = agent.spec(id, &["sleep", "1000"]);
        agent
            .create(id, &spec, Default::default())
            .await
            .expect("created");
        agent.pause(id).await.expect("paused before its start");
        assert_eq!(
            status(agent.start_container(id).await).0,
            Code::FAILED_PRECONDITION
        );
        agent.resume(id).await.expect("resumed");
        agent.start_container(id).await.expect("started");
        agent.pause(id).await.expect("paused");
        agent.signal(id, "", 9, all).await.expect("killed");
        assert_eq!(agent.wait(id, "").await.expect("waited").exit_status, 137);
        assert_eq!(
            status(agent.pause(id).await).0,
            Code::FAILED_PRECONDITION,
            "stopped"
        );
        agent.delete(id, "").await.expect("deleted");
    }
    for missing in [agent.pause("c1").await, agent.resume("c1").await] {
        assert_eq!(status(missing).0, Code::NOT_FOUND);
    }
    agent.assert_nothing_left();
}

#[tokio::test]
async fn a_signal_reaches_a_paused_container_when_it_goes_on() {
    let Some(agent) = agent_with_cgroups().await else {
        return;
    };
    let script = "trap 'echo caught; exit 3' TERM; echo ready; while :; do sleep 0.05; done";
    let spec = agent.spec("c1", &["sh", "-c", script]);
    let (tokens, [_stdin, mut stdout, _stderr]) = agent.streams().await;
    agent.create("c1", &spec, tokens).await.expect("created");
    agent.start_container("c1").await.expect("started");
    let mut ready = [0; 6];
    stdout.read_exact(&mut ready).await.expect("output");
    agent.pause("c1").await.expect("paused");
    agent.signal("c1", "", 15, false).await.expect("sent");
    agent.resume("c1").await.expect("resumed");
    assert_eq!(read_all(stdout).await, "caught\n");
    assert_eq!(agent.wait("c1", "").await.expect("waited").exit_status, 3);
    agent.delete("c1", "").await.expect("deleted");
}

#[tokio::test]
async fn figures_are_those_of_the_container() {
    let Some(agent) = agent_with_cgroups().await else {
        return;
    };
    let script = "i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done; echo done; cat";
    let spec = agent.spec("c1", &["sh", "-c", script]);
    let (tokens, [stdin, mut stdout, _stderr]) = agent.streams().await;
    agent.create("c1", &spec, tokens).await.expect("created");
    let before = agent.stats("c1").await.expect("figures before the start");
    agent.start_container("c1").await.expect("started");
    let mut done = [0; 5];
    stdout.read_exact(&mut done).await.expect("output");
    let after = agent.stats("c1").await.expect("figures");
    let usage = |stats: &bulkhead_proto::agent::StatsResponse| {
        stats.cpu.get("usage_usec").copied().unwrap_or_default()
    };
    assert!(usage(&after) > usage(&before), "{after:?}");
    if agent.has_controllers() {
        assert!(after.pids_current >= 1 && after.memory_current > 0);
        assert!(after.memory.contains_key("anon"));
    }
    drop(stdin);
    agent.wait("c1", "").await.expect("waited");
    let last = agent.stats("c1").await.expect("figures of a stopped one");
    assert!(usage(&last) >= usage(&after));
    agent.delete("c1", "").await.expect("deleted");
    assert_eq!(status(agent.stats("c1").await).0, Code::NOT_FOUND);
}

#[tokio::test]
async fn an_update_changes_all_or_nothing() {
    let Some(agent) = agent_with_cgroups().await else {
        return;
    };
    if !agent.enable("+hugetlb") {
        eprintln!("SKIPPED 1 test: this host's cgroup v2 tree lacks the hugetlb controller");
        return;
    }
    let spec = agent.spec("c1", &["sleep", "1000"]);
    agent
        .create("c1", &spec, Default::default())
        .await
        .expect("created");
    let folder = agent.cgroup_of("c1").expect("a cgroup");
    let limit = || std::fs::read_to_string(folder.join("hugetlb.2MB.max")).expect("a limit");
    let pages = |limit: i64| json!({"hugepageLimits": [{"pageSize": "2MB", "limit": limit}]});
    agent.update("c1", &pages(4 << 20)).await.expect("updated");
    assert_eq!(limit(), "4194304\n");
    let stats = agent.stats("c1").await.expect("figures");
    let huge = stats.hugetlb.iter().find(|huge| huge.page_size == "2MB");
    assert_eq!(huge.map(|huge| huge.max), Some(4 << 20));

    let half = with(pages(8 << 20), "/unified", json!({"hugetlb.nonsense": "1"}));
    let (code, message) = status(agent.update("c1", &half).await);
    assert_eq!(code, Code::INVALID_ARGUMENT);
    assert!(message.contains("unified"), "{message}");
    assert_eq!(
        limit(),
        "4194304\n",
        "what came before the refusal is undone"
    );
    for refused in [
        json!({"hugepageLimits": 7}),
        json!({"memory": {"limit": 5, "swap": 1}}),
    ] {
        let code = status(agent.update("c1", &refused).await).0;
        assert_eq!(code, Code::INVALID_ARGUMENT);
    }
    assert_eq!(
        status(agent.update("c2", &pages(1)).await).0,
        Code::NOT_FOUND
    );
    agent.update("c1", &pages(-1)).await.expect("updated");
    assert_eq!(limit(), "max\n");
    end(&agent, "c1").await;
}

/// Whether a container with these rules can open a node of the kernel's log, which every host has.
async fn opens_the_log(agent: &Agent, id: &str, rules: serde_json::Value) -> String {
    let script = "(: > /dev/log-node) && echo opened; : > /dev/null && : < /dev/zero && echo ok";
    let spec = agent.spec(id, &["sh", "-c", script]);
    let node = json!([{"path": "/dev/log-node", "type": "c", "major": 1, "minor": 11}]);
    let spec = with(spec, "/linux/devices", node);
    let spec = with(spec, "/linux/resources", json!({"devices": rules}));
    let (_, out, err) = agent.run(id, &spec).await;
    out + &err
}

#[tokio::test]
async fn only_allowed_devices_can_be_used() {
    let Some(agent) = agent_with_cgroups().await else {
        return;
    };
    let none = json!([{"allow": false, "access": "rwm"}]);
    let refused = "can't create /dev/log-node: Operation not permitted\n";
    let text = opens_the_log(&agent, "c1", none.clone()).await;
    if text.contains("opened") {
        eprintln!("SKIPPED 1 test: this host's kernel has no device rules for cgroup v2");
        return;
    }
    assert!(
        text.starts_with("ok\n") && text.ends_with(refused),
        "{text}"
    );
    let text = opens_the_log(&agent, "c2", json!([])).await;
    assert!(text.ends_with(refused), "denied unless allowed: {text}");
    let some = json!([
        {"allow": false, "access": "rwm"},
        {"allow": true, "type": "c", "major": 1, "minor": 11, "access": "w"},
    ]);
    assert_eq!(opens_the_log(&agent, "c3", some).await, "opened\nok\n");
    let all = json!([{"allow": false, "access": "rwm"}, {"allow": true, "access": "rwm"}]);
    assert_eq!(
        opens_the_log(&agent, "c4", all.clone()).await,
        "opened\nok\n"
    );

    // A process made ahead has the default rules until it knows its container.
    for (id, rules, opened) in [("c5", none, false), ("c6", all, true)] {
        agent.prepare().await.expect("prepared");
        agent.identify(&[7; 16]).await.expect("identified");
        let text = opens_the_log(&agent, id, rules).await;
        assert_eq!(text.contains("opened"), opened, "{text}");
        assert!(text.contains("ok\n"), "{text}");
    }
    agent.assert_nothing_left();
}
