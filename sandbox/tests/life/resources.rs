//! Pause and resume, limits, counters and processes. VMM and agent are doubles.

use crate::common::{Pod, exec, possible, process};
use bulkhead_sandbox::{Error, GuestProcess, Kind, Status};
use serde_json::json;

fn kind<T: std::fmt::Debug>(result: Result<T, Error>) -> Kind {
    result.unwrap_err().kind()
}

#[tokio::test]
async fn a_paused_container_stands_still_is_seen_so_and_can_be_killed() {
    if !possible() {
        return;
    }
    let mut pod = Pod::new("ready").await;
    let id = process("c1").container;
    assert_eq!(kind(pod.sandbox.pause(id.clone()).await), Kind::NotFound);
    pod.sandbox
        .create(pod.request("c1", &["sleep"]))
        .await
        .unwrap();
    assert_eq!(
        kind(pod.sandbox.pause(id.clone()).await),
        Kind::FailedPrecondition
    );
    pod.sandbox.start(process("c1")).await.unwrap();
    pod.add_exec("c1", "e1", &["sleep"]).await;
    pod.sandbox.start(exec("c1", "e1")).await.unwrap();
    pod.add_exec("c1", "e2", &["sleep"]).await;
    assert_eq!(
        kind(pod.sandbox.resume(id.clone()).await),
        Kind::FailedPrecondition
    );
    pod.told();
    pod.agent.calls();

    pod.sandbox.pause(id.clone()).await.unwrap();
    let sandbox = pod.sandbox.clone();
    let status = async |id| sandbox.state(id).await.unwrap().status;
    assert_eq!(status(process("c1")).await, Status::Paused);
    assert_eq!(status(exec("c1", "e1")).await, Status::Paused);
    assert_eq!(status(exec("c1", "e2")).await, Status::Created);
    for refused in [
        kind(pod.sandbox.pause(id.clone()).await),
        kind(pod.sandbox.start(exec("c1", "e2")).await),
        kind(pod.sandbox.delete(process("c1")).await),
    ] {
        assert_eq!(refused, Kind::FailedPrecondition);
    }
    pod.sandbox.resume(id.clone()).await.unwrap();
    assert_eq!(status(process("c1")).await, Status::Running);
    pod.sandbox.start(exec("c1", "e2")).await.unwrap();
    pod.sandbox.pause(id.clone()).await.unwrap();
    assert_eq!(pod.agent.calls(), ["pause c1", "resume c1", "pause c1"]);
    assert_eq!(
        pod.told(),
        ["paused c1", "resumed c1", "started e2", "paused c1"]
    );

    pod.sandbox.signal(process("c1"), 9, true).await.unwrap();
    let exit = pod.sandbox.wait(process("c1")).await.unwrap();
    assert_eq!(
        (exit.code, status(process("c1")).await),
        (137, Status::Stopped(exit))
    );
    assert_eq!(kind(pod.sandbox.resume(id).await), Kind::FailedPrecondition);
    pod.sandbox.delete(process("c1")).await.unwrap();
    pod.assert_nothing_left().await;
}

#[tokio::test]
async fn limits_reach_the_agent_if_they_are_any() {
    if !possible() {
        return;
    }
    let pod = Pod::new("ready").await;
    pod.run("c1", &["sleep"]).await;
    let id = process("c1").container;
    pod.agent.calls();
    let limits = json!({"memory": {"limit": 33_554_432}}).to_string();
    pod.sandbox
        .update(id.clone(), limits.clone().into())
        .await
        .unwrap();
    assert_eq!(pod.agent.calls(), [format!("update c1 {limits}")]);
    for nonsense in ["", "limits", r#"{"memory": {"limit": "much"}}"#] {
        let refused = pod.sandbox.update(id.clone(), nonsense.into()).await;
        assert_eq!(kind(refused), Kind::InvalidArgument, "{nonsense}");
    }
    pod.sandbox.signal(process("c1"), 9, false).await.unwrap();
    pod.sandbox.wait(process("c1")).await.unwrap();
    assert_eq!(
        kind(pod.sandbox.update(id, limits.into()).await),
        Kind::NotFound
    );
    pod.sandbox.stop().await.unwrap();
}

#[tokio::test]
async fn processes_are_the_guests_and_execs_are_named() {
    if !possible() {
        return;
    }
    let pod = Pod::new("ready").await;
    let vmm = pod.run("c1", &["sleep"]).await;
    let stand_in = vec![GuestProcess {
        pid: vmm,
        exec: None,
    }];
    pod.add_exec("c1", "e1", &["sleep"]).await;
    pod.sandbox.start(exec("c1", "e1")).await.unwrap();
    let id = process("c1").container;
    let mut processes = pod.sandbox.pids(id.clone()).await.unwrap();
    processes.sort_by_key(|process| process.pid);
    let wanted = [(100, None), (101, exec("c1", "e1").exec)];
    assert_eq!(
        processes,
        wanted.map(|(pid, exec)| GuestProcess { pid, exec })
    );
    pod.sandbox.signal(process("c1"), 9, true).await.unwrap();
    pod.sandbox.wait(process("c1")).await.unwrap();
    assert_eq!(pod.sandbox.pids(id.clone()).await.unwrap(), stand_in);
    assert_eq!(
        kind(pod.sandbox.pids(process("c2").container).await),
        Kind::NotFound
    );
    pod.sandbox.stop().await.unwrap();
}

#[tokio::test]
async fn counters_are_there_until_delete_and_bounded() {
    if !possible() {
        return;
    }
    let pod = Pod::new("ready").await;
    pod.run("c1", &["exit", "0"]).await;
    pod.sandbox.wait(process("c1")).await.unwrap();
    let id = process("c1").container;
    let stats = pod.sandbox.stats(id.clone()).await.unwrap();
    assert_eq!((stats.pids_current, stats.io.len()), (7, 1024));
    pod.sandbox.delete(process("c1")).await.unwrap();
    assert_eq!(kind(pod.sandbox.stats(id).await), Kind::NotFound);
}

#[tokio::test]
async fn a_pods_own_container_has_nothing_to_count_or_to_freeze() {
    if !possible() {
        return;
    }
    let pod = Pod::new("ready").await;
    let request = pod.request_with(
        "pod",
        json!({
            "ociVersion": "1.0.2",
            "root": {"path": "rootfs"},
            "annotations": {"io.kubernetes.cri.container-type": "sandbox"},
            "process": {"cwd": "/", "args": ["/pause"], "user": {"uid": 0, "gid": 0}},
        }),
    );
    let vmm = pod.sandbox.create(request).await.unwrap();
    pod.sandbox.start(process("pod")).await.unwrap();
    let id = process("pod").container;
    pod.agent.calls();
    pod.sandbox.pause(id.clone()).await.unwrap();
    pod.sandbox.resume(id.clone()).await.unwrap();
    pod.sandbox.update(id.clone(), "{}".into()).await.unwrap();
    assert_eq!(pod.sandbox.stats(id.clone()).await.unwrap().pids_current, 0);
    assert_eq!(pod.sandbox.pids(id).await.unwrap()[0].pid, vmm);
    assert!(pod.agent.calls().is_empty());
    pod.sandbox.stop().await.unwrap();
}
