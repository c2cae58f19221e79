//! Limits, on hosts whose cgroup v2 tree has the controllers (a guest's has).

mod common;

use common::{Agent, host_is_able, status, with};
use serde_json::json;
use ttrpc::Code;

/// An agent whose containers' limits are real; says so if they can't be.
async fn limited_agent() -> Option<Agent> {
    if !host_is_able() {
        return None;
    }
    let agent = Agent::start().await;
    if !agent.has_controllers() {
        eprintln!(
            "SKIPPED 1 test: this host's cgroup v2 tree lacks the cpu, memory or pids controller"
        );
        return None;
    }
    Some(agent)
}

#[tokio::test]
async fn limits_are_written_where_the_kernel_reads_them() {
    let Some(agent) = limited_agent().await else {
        return;
    };
    let resources = json!({
        "cpu": {"shares": 1024, "quota": 50000, "period": 100000},
        "memory": {"limit": 67108864, "reservation": 33554432},
        "pids": {"limit": 32},
        "unified": {"memory.high": "50331648"},
    });
    let spec = with(
        agent.spec("c1", &["sleep", "1000"]),
        "/linux/resources",
        resources,
    );
    agent
        .create("c1", &spec, Default::default())
        .await
        .expect("created");
    let folder = agent.cgroup_of("c1").expect("a cgroup");
    for (file, expected) in [
        ("cpu.weight", "39"),
        ("cpu.max", "50000 100000"),
        ("memory.max", "67108864"),
        ("memory.low", "33554432"),
        ("memory.high", "50331648"),
        ("pids.max", "32"),
    ] {
        let value = std::fs::read_to_string(folder.join(file)).expect(file);
        assert_eq!(value.trim(), expected, "{file}");
    }
    agent.signal("c1", "", 9, false).await.expect("killed");
    agent.wait("c1", "").await.expect("waited");
    agent.delete("c1", "").await.expect("deleted");
    let refused = with(
        spec,
        "/linux/resources",
        json!({"unified": {"memory.high": "much"}}),
    );
    let (code, message) = status(agent.create("c1", &refused, Default::default()).await);
    assert_eq!(code, Code::INVALID_ARGUMENT);
    assert!(message.contains("memory.high"), "{message}");
    agent.assert_nothing_left();
}

#[tokio::test]
async fn running_out_of_memory_is_told() {
    let Some(agent) = limited_agent().await else {
        return;
    };
    let hog = "x=1234567890123456; while true; do x=$x$x; done";
    let spec = with(
        agent.spec("c1", &["sh", "-c", hog]),
        "/linux/resources",
        json!({"memory": {"limit": 16777216, "swap": 16777216}}),
    );
    agent
        .create("c1", &spec, Default::default())
        .await
        .expect("created");
    agent.start_container("c1").await.expect("started");
    let exit = agent.wait("c1", "").await.expect("waited");
    assert_eq!((exit.exit_status, exit.oom_killed), (137, true));
    agent.delete("c1", "").await.expect("deleted");
    agent.assert_nothing_left();
}

#[tokio::test]
async fn a_fork_bomb_stays_small() {
    let Some(agent) = limited_agent().await else {
        return;
    };
    let bomb = "for n in $(seq 40); do sleep 1000 & done; exit 0";
    let spec = with(
        agent.spec("c1", &["sh", "-c", bomb]),
        "/linux/resources",
        json!({"pids": {"limit": 8}}),
    );
    agent
        .create("c1", &spec, Default::default())
        .await
        .expect("created");
    agent.start_container("c1").await.expect("started");
    // The shell gives up when it can't fork.
    assert_ne!(agent.wait("c1", "").await.expect("waited").exit_status, 0);
    agent.delete("c1", "").await.expect("deleted");
    agent.assert_nothing_left();
}

#[tokio::test]
async fn the_cgroup_a_container_sees_is_its_own() {
    let Some(agent) = limited_agent().await else {
        return;
    };
    let mount = json!({"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["nosuid", "noexec", "nodev", "relatime", "ro"]});
    let script = "cat /sys/fs/cgroup/pids.max; cat /proc/self/cgroup; mkdir /sys/fs/cgroup/x 2>/dev/null || echo refused";
    let spec = with(agent.spec("c1", &["sh", "-c", script]), "/mounts/-", mount);
    let spec = with(spec, "/linux/resources", json!({"pids": {"limit": 21}}));
    let shared = agent.run("c1", &spec).await;
    assert_eq!(
        (shared.0, shared.1.lines().next(), shared.1.lines().last()),
        (0, Some("21"), Some("refused")),
        "{shared:?}"
    );
    let own = with(spec, "/linux/namespaces/-", json!({"type": "cgroup"}));
    assert_eq!(
        agent.run("c2", &own).await,
        (0, "21\n0::/\nrefused\n".to_owned(), String::new())
    );
    agent.assert_nothing_left();
}
