//! A pod with a user namespace (`hostUsers: false`): its root is nobody's on the host.

use super::client::Client;
use super::{Pod, own_pids, pod_config, security, shell_container};
use bulkhead_tests::cgroups::Cgroup;
use bulkhead_tests::containerd::Containerd;
use bulkhead_tests::runner::Checks;
use k8s_cri::v1::{
    IdMapping, LinuxSandboxSecurityContext, Mount, NamespaceMode, NamespaceOption, UserNamespace,
};
use std::os::unix::fs::MetadataExt;

/// The host's first id of the pod's; kubelet gives each pod 65536 of its own.
const FIRST: u32 = 524_288;

pub fn checks(checks: &mut Checks, containerd: &Containerd, client: &Client, pods: &Cgroup) {
    checks.check("the runtime says that it has user namespaces", || {
        let features = client.handler_features();
        assert!(features.user_namespaces, "{features:?}");
        assert!(features.recursive_read_only_mounts, "{features:?}");
    });
    let mut config = pod_config(containerd, pods, "mapped");
    config.linux.get_or_insert_default().security_context = Some(LinuxSandboxSecurityContext {
        namespace_options: Some(mapped()),
        ..Default::default()
    });
    let pod = checks.require("RunPodSandbox with a user namespace", || Pod {
        client,
        id: client.run_pod(&config).unwrap(),
        config: config.clone(),
    });
    let Some(pod) = pod else {
        return;
    };
    let volume = containerd.folder().join("mapped-volume");
    let container = checks.require("a container of it runs", || {
        std::fs::create_dir(&volume).unwrap();
        let mut config = shell_container("mapped", "sleep 1000");
        security(&mut config).namespace_options = Some(mapped());
        config.mounts.push(Mount {
            container_path: "/volume".into(),
            host_path: volume.display().to_string(),
            uid_mappings: vec![range()],
            gid_mappings: vec![range()],
            ..Default::default()
        });
        pod.run(containerd, config)
    });
    if let Some(container) = container {
        inside(checks, &pod, &container, &volume);
    }
    pod.removed(checks);
}

fn inside(checks: &mut Checks, pod: &Pod<'_>, container: &str, volume: &std::path::Path) {
    let shell = |script: &str| pod.client.shell(container, script);
    checks.check("it has the pod's ids", || {
        let map = shell("cat /proc/self/uid_map /proc/self/gid_map");
        for line in map.lines() {
            let numbers: Vec<u32> = line
                .split_whitespace()
                .map(|n| n.parse().unwrap())
                .collect();
            assert_eq!(numbers, [0, FIRST, 65536]);
        }
        assert_eq!(map.lines().count(), 2, "{map}");
        assert_eq!(shell("id -u; stat -c %u:%g /bin/busybox"), "0\n0:0");
    });
    checks.check(
        "what it writes to its root and its volume belongs to its root",
        || {
            let script = "touch /written /volume/written; chown 7:8 /volume/written; \
            stat -c %u:%g /written /volume/written";
            assert_eq!(shell(script), "0:0\n7:8");
            // The volume's mount is mapped, so that other pods can use it as well.
            let kept = std::fs::metadata(volume.join("written")).unwrap();
            assert_eq!((kept.uid(), kept.gid()), (7, 8));
        },
    );
    checks.check(
        "message queues, shared memory and the kernel's files are there",
        || {
            let script = "grep -c ' /dev/mqueue mqueue ' /proc/mounts; echo x >/dev/shm/note; \
            cat /dev/shm/note; test -d /sys/class/net/lo && echo sysfs";
            assert_eq!(shell(script), "1\nx\nsysfs");
        },
    );
}

fn range() -> IdMapping {
    IdMapping {
        host_id: FIRST,
        container_id: 0,
        length: 65536,
    }
}

fn mapped() -> NamespaceOption {
    NamespaceOption {
        userns_options: Some(UserNamespace {
            mode: NamespaceMode::Pod.into(),
            uids: vec![range()],
            gids: vec![range()],
        }),
        ..own_pids()
    }
}
