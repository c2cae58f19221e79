//! A VM's size follows the limits of its containers. VMM and agent are doubles.

use crate::common::{Pod, possible, process};
use bulkhead_sandbox::{Error, HotplugError, Kind};
use serde_json::json;

const MIB: u64 = 1 << 20;

fn limit(mib: u64) -> Vec<u8> {
    json!({"memory": {"limit": mib * MIB}}).to_string().into()
}

/// The sizes that the VMM was asked for so far, once there are as many as `count`.
async fn sizes(pod: &Pod, count: usize) -> Vec<u32> {
    let path = pod.dir.path().join("sizes");
    for _ in 0..3000 {
        let text = std::fs::read_to_string(&path).unwrap_or_default();
        let sizes: Vec<u32> = text.lines().map(|line| line.parse().unwrap()).collect();
        if sizes.len() >= count {
            return sizes;
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    panic!("no {count} sizes were asked for");
}

async fn update(pod: &Pod, id: &str, mib: u64) -> Result<(), Error> {
    pod.sandbox.update(process(id).container, limit(mib)).await
}

#[tokio::test]
async fn a_higher_limit_is_plugged_before_it_is_set_and_a_lower_one_unplugged_after() {
    if !possible() {
        return;
    }
    let pod = Pod::new("ready").await;
    pod.run("c1", &["sleep"]).await;
    update(&pod, "c1", 64).await.unwrap();
    assert!(sizes(&pod, 0).await.is_empty(), "it fits what the VM has");
    pod.agent.calls();
    update(&pod, "c1", 256).await.unwrap();
    // 192 MiB more than the 64 that 128 leave, and 1.6% of them.
    assert_eq!(sizes(&pod, 1).await, [196]);
    assert_eq!(pod.agent.calls().len(), 1);

    // A second container in the VM: both limits count.
    let mut spec = json!({
        "ociVersion": "1.0.2",
        "root": {"path": "rootfs"},
        "process": {"cwd": "/", "args": ["sleep"], "user": {"uid": 0, "gid": 0}},
    });
    spec["linux"]["resources"] = json!({"memory": {"limit": 128 * MIB}});
    let request = pod.request_with("c2", spec);
    pod.sandbox.create(request).await.unwrap();
    pod.sandbox.start(process("c2")).await.unwrap();
    assert_eq!(sizes(&pod, 2).await, [196, 326]);
    update(&pod, "c1", 64).await.unwrap();
    assert_eq!(sizes(&pod, 3).await, [196, 326, 130]);
    // None is no reason to give anything back.
    let unlimited = json!({"memory": {"limit": -1}}).to_string();
    let id = process("c2").container;
    pod.sandbox.update(id, unlimited.into()).await.unwrap();
    pod.sandbox.signal(process("c2"), 9, true).await.unwrap();
    pod.sandbox.wait(process("c2")).await.unwrap();
    pod.sandbox.delete(process("c2")).await.unwrap();
    assert_eq!(sizes(&pod, 4).await, [196, 326, 130, 0]);
    pod.sandbox.stop().await.unwrap();
    pod.assert_nothing_left().await;
}

#[tokio::test]
async fn a_limit_beyond_what_the_vm_can_have_is_refused_and_changes_nothing() {
    if !possible() {
        return;
    }
    let pod = Pod::new("ready").await;
    pod.run("c1", &["sleep"]).await;
    pod.agent.calls();
    let error = update(&pod, "c1", 1 << 20).await.unwrap_err();
    assert_eq!(error.kind(), Kind::InvalidArgument);
    assert!(error.to_string().contains("memory_max_mib"), "{error}");
    assert!(pod.agent.calls().is_empty());
    update(&pod, "c1", 96).await.unwrap();
    assert_eq!(sizes(&pod, 1).await, [32], "the refused limit is forgotten");
    pod.sandbox.stop().await.unwrap();
}

#[tokio::test]
async fn a_guest_that_takes_less_keeps_its_old_limit() {
    if !possible() {
        return;
    }
    let pod = Pod::new("ready").await;
    pod.run("c1", &["sleep"]).await;
    std::fs::write(pod.dir.path().join("no-plug"), "").unwrap();
    pod.agent.calls();
    let error = update(&pod, "c1", 256).await.unwrap_err();
    assert_eq!(error.kind(), Kind::DeadlineExceeded);
    let Error::Hotplug(HotplugError::NotTaken {
        wanted_mib: 196,
        plugged_mib: 98,
        ..
    }) = error
    else {
        panic!("{error}");
    };
    assert!(pod.agent.calls().is_empty());
    assert_eq!(sizes(&pod, 2).await, [196, 0]);
    pod.sandbox.stop().await.unwrap();
}
