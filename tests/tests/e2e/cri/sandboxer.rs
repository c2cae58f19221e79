//! Pods of a current containerd whose sandboxes are the shim's: `sandboxer = "shim"`, which drives
//! them by the sandbox API, without a pause container.

use super::client::Client;
use super::{IGNORED, Pod, containers, host_cgroup, own_network, pod_config};
use bulkhead_tests::Artifacts;
use bulkhead_tests::cgroups::Cgroup;
use bulkhead_tests::containerd::{Containerd, Release};
use bulkhead_tests::leaks::{Snapshot, processes_of};
use bulkhead_tests::runner::Checks;
use k8s_cri::v1::PodSandboxState;

pub fn run(checks: &mut Checks, artifacts: &Artifacts) {
    let started = checks.require("a containerd with the shim as its sandboxer", || {
        let release = Release::current().unwrap();
        own_network();
        let settings = "memory_mib = 160\n";
        let containerd =
            Containerd::start_with_sandboxer(artifacts, &release, settings, "shim").unwrap();
        let client = Client::with_images(&containerd);
        (containerd, client)
    });
    let Some((containerd, client)) = started else {
        return;
    };
    let pods = Cgroup::make("pods").unwrap();
    let before = Snapshot::take(&IGNORED);
    let config = pod_config(&containerd, &pods, "web");
    let pod = checks.require("RunPodSandbox: ready, one VMM, and no task", || {
        let id = client.run_pod(&config);
        let id = id.unwrap_or_else(|error| panic!("{error}: {}", containerd.log_tail(12)));
        let status = client.pod_status(&id).unwrap();
        assert_eq!(status.state(), PodSandboxState::SandboxReady, "{status:?}");
        assert!(status.created_at > 1_600_000_000_000_000_000, "{status:?}");
        assert_eq!(processes_of("bulkhead-vmm").len(), 1);
        let tasks = containerd.ctr(&["tasks", "ls", "-q"]).unwrap().success();
        assert_eq!(tasks, "");
        Pod {
            client: &client,
            config: config.clone(),
            id,
        }
    });
    if let Some(pod) = pod {
        containers(checks, &containerd, &pod);
        host_cgroup(checks, &pod, &pods);
        pod.removed(checks);
    }
    drop(client);
    checks.check("no process, mount, socket or cgroup is left", || {
        before.assert_nothing_added(&IGNORED);
        let run = containerd.runtime_dir();
        let left: Vec<_> = std::fs::read_dir(run).into_iter().flatten().collect();
        assert!(left.is_empty(), "in the runtime folder: {left:?}");
    });
}
