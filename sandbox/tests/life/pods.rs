//! A pod that comes by the sandbox API: no task of its own, no word of it to the daemon, and an end
//! that all who wait for hear of. VMM and agent are doubles.

use crate::common::{Pod, possible, process};
use bulkhead_sandbox::pod::{Dns, PodSandbox};
use bulkhead_sandbox::{CreateContainer, Kind, Status};
use serde_json::json;

fn request(pod: &Pod) -> CreateContainer {
    let asked = PodSandbox {
        hostname: Some("web-0".into()),
        sysctls: [("kernel.shm_rmid_forced".to_owned(), "1".to_owned())].into(),
        dns: Dns {
            servers: vec!["192.0.2.53".into()],
            ..Default::default()
        },
        netns: Some(pod.netns.clone()),
        ..Default::default()
    };
    let request = pod.request("pod", &["none"]);
    std::fs::remove_file(request.bundle.join("config.json")).unwrap();
    CreateContainer {
        pod: Some(asked),
        ..request
    }
}

fn member(pod: &Pod, id: &str) -> CreateContainer {
    let pid = std::process::id();
    pod.request_with(
        id,
        json!({
            "ociVersion": "1.0.2",
            "root": {"path": "rootfs"},
            "process": {"cwd": "/", "args": ["sleep"], "user": {"uid": 0, "gid": 0}},
            "annotations": {"io.kubernetes.cri.container-type": "container"},
            "mounts": [{"destination": "/dev/shm", "type": "tmpfs", "source": "shm"}],
            "linux": {"namespaces": [
                {"type": "pid"}, {"type": "ipc", "path": format!("/proc/{pid}/ns/ipc")},
                {"type": "uts", "path": format!("/proc/{pid}/ns/uts")},
            ]},
        }),
    )
}

#[tokio::test]
async fn a_pod_of_the_sandbox_api_from_its_beginning_to_its_end() {
    if !possible() {
        return;
    }
    let mut pod = Pod::new("ready").await;
    let id = process("pod").container;
    let not_found = pod.sandbox.end_pod(id.clone()).await.unwrap_err().kind();
    assert_eq!(not_found, Kind::NotFound);
    let vmm = pod.sandbox.create(request(&pod)).await.unwrap();
    let state = pod.sandbox.state(process("pod")).await.unwrap();
    assert_eq!((state.pid, state.status), (vmm, Status::Created));
    pod.sandbox.start(process("pod")).await.unwrap();
    pod.sandbox.alive(id.clone()).await.unwrap();
    assert!(pod.told().is_empty(), "it is no task to the daemon");

    pod.sandbox.create(member(&pod, "c1")).await.unwrap();
    pod.sandbox.start(process("c1")).await.unwrap();
    let place = pod.runtime_dir().join(pod.namespace()).join("pod/pod");
    let file = |name: &str| std::fs::read_to_string(place.join(name)).unwrap();
    assert_eq!(file("hostname"), "web-0\n");
    assert_eq!(file("resolv.conf"), "nameserver 192.0.2.53\n");
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let shm = place.join("shm").display().to_string();
    let of_shm: Vec<_> = mounts.lines().filter(|line| line.contains(&shm)).collect();
    assert!(
        of_shm.len() == 1 && of_shm[0].contains("size=65536k"),
        "{of_shm:?}"
    );
    let not_a_pod = pod.sandbox.end_pod(process("c1").container).await;
    assert_eq!(not_a_pod.unwrap_err().kind(), Kind::InvalidArgument);
    assert_eq!(pod.told(), ["created c1", "started c1"]);

    let (sandbox, waited) = (pod.sandbox.clone(), process("c1"));
    let waiter = tokio::spawn(async move { sandbox.wait(waited).await });
    pod.sandbox.end_pod(id.clone()).await.unwrap();
    assert_eq!(waiter.await.unwrap().unwrap().code, 137);
    assert_eq!(pod.told(), ["exited c1 137"]);
    let state = pod.sandbox.state(process("pod")).await.unwrap();
    assert!(matches!(state.status, Status::Stopped(exit) if exit.code == 137));
    pod.sandbox.end_pod(id.clone()).await.unwrap();
    let dead = pod.sandbox.alive(id.clone()).await.unwrap_err().kind();
    assert_eq!(dead, Kind::Unavailable);
    pod.sandbox.delete(process("c1")).await.unwrap();
    assert!(!pod.sandbox.is_empty().await.unwrap(), "the pod stays");
    pod.sandbox.stop().await.unwrap();
    pod.assert_nothing_left().await;
}

#[tokio::test]
async fn a_pods_counters_are_those_of_its_containers() {
    if !possible() {
        return;
    }
    let pod = Pod::new("ready").await;
    pod.sandbox.create(request(&pod)).await.unwrap();
    pod.sandbox.start(process("pod")).await.unwrap();
    let of = async |id| pod.sandbox.stats(process(id).container).await.unwrap();
    assert_eq!(of("pod").await.cpu.len(), 0);
    for id in ["c1", "c2"] {
        pod.sandbox.create(member(&pod, id)).await.unwrap();
        pod.sandbox.start(process(id)).await.unwrap();
    }
    let (one, both) = (of("c1").await, of("pod").await);
    assert!(one.pids_current > 0);
    assert_eq!(both.pids_current, 2 * one.pids_current);
    pod.sandbox.stop().await.unwrap();
    pod.assert_nothing_left().await;
}
