//! What the annotations of a container say about the pod it belongs to.

use crate::ids::{ContainerId, IdError, SandboxId};
use crate::pod_files::PodFile;
use serde_json::{Map, Value, json};
use std::collections::HashMap;
use std::path::PathBuf;

const CRI_TYPE: &str = "io.kubernetes.cri.container-type";
const CRI_SANDBOX: &str = "io.kubernetes.cri.sandbox-id";
const CRI_QUOTA: &str = "io.kubernetes.cri.sandbox-cpu-quota";
const CRI_PERIOD: &str = "io.kubernetes.cri.sandbox-cpu-period";
const CRI_MEMORY: &str = "io.kubernetes.cri.sandbox-memory";
const CRIO_TYPE: &str = "io.kubernetes.cri-o.ContainerType";
const CRIO_SANDBOX: &str = "io.kubernetes.cri-o.SandboxID";
/// The pod's resources in CRI-O's wording: JSON of CRI's LinuxContainerResources. The first name is
/// the current one and wins; releases up to 1.34 know only the second.
const CRIO_RESOURCES: [&str; 2] = [
    "pod-linux-resources.crio.io",
    "io.kubernetes.cri-o.PodLinuxResources",
];
const RUNC_GROUP: &str = "io.containerd.runc.v2.group";

/// What this runtime's own annotations begin with.
const OUR_PREFIX: &str = "io.bulkhead.";

/// What a container is to its sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Not part of a Kubernetes pod.
    Lone,
    /// The pod's own container ("pause"): a task without a process in the guest.
    PodSandbox,
    /// One of a pod's containers.
    PodContainer,
}

/// The annotations of a spec.
pub type Annotations = HashMap<String, String>;

/// The container's role.
pub fn role(annotations: &Annotations) -> Role {
    let kind = annotations
        .get(CRI_TYPE)
        .or_else(|| annotations.get(CRIO_TYPE));
    match kind.map(String::as_str) {
        Some("sandbox") => Role::PodSandbox,
        Some("container") => Role::PodContainer,
        _ => Role::Lone,
    }
}

/// The sandbox that the container `id` belongs to: its pod's, its group's, or its own.
///
/// # Errors
/// When the id breaks the rules for ids.
pub fn sandbox_of(annotations: &Annotations, id: &str) -> Result<SandboxId, IdError> {
    let group = [CRI_SANDBOX, CRIO_SANDBOX, RUNC_GROUP]
        .iter()
        .find_map(|key| annotations.get(*key))
        .map_or(id, String::as_str);
    SandboxId::try_from(group)
}

/// What a pod's sandbox asks for that its containers take over, as it has no process in the guest.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PodSettings {
    /// Its host name, for containers that join its UTS namespace.
    pub hostname: Option<String>,
    /// Its kernel parameters, in the spelling of the OCI spec.
    pub sysctls: HashMap<String, String>,
    /// What its containers find in /etc and at /dev/shm, if that isn't the daemon's doing.
    pub files: Vec<PodFile>,
}

/// A pod's sandbox as the sandbox API describes it: without an OCI spec.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PodSandbox {
    /// The host name of its containers.
    pub hostname: Option<String>,
    /// Its kernel parameters, in the spelling of the OCI spec.
    pub sysctls: HashMap<String, String>,
    /// What sizes its VM.
    pub limits: PodLimits,
    /// The network namespace of the host that is the pod's; none for the host's own.
    pub netns: Option<PathBuf>,
    /// The pod's cgroup on the host, a path or the name of a slice of systemd's.
    pub cgroup_parent: Option<String>,
    /// Its resolver.
    pub dns: Dns,
    /// All of the pod's. Only those of this runtime are looked at: by this way daemons pass on
    /// whatever the pod's author wrote.
    pub annotations: Annotations,
}

/// What a pod's resolv.conf is made of; all empty for the host's own.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Dns {
    /// Addresses.
    pub servers: Vec<String>,
    /// Domains to search.
    pub searches: Vec<String>,
    /// Options of resolv.conf(5).
    pub options: Vec<String>,
}

impl PodSandbox {
    /// The OCI spec that a daemon would have written for this pod's own container.
    pub(crate) fn to_spec(&self, id: &ContainerId) -> Value {
        let mut namespaces = vec![json!({ "type": "ipc" }), json!({ "type": "uts" })];
        if let Some(path) = &self.netns {
            namespaces.push(json!({ "type": "network", "path": path }));
        }
        let ours = self.annotations.iter();
        let ours = ours.filter(|(key, _)| key.starts_with(OUR_PREFIX));
        let mut annotations: Map<String, Value> = ours
            .map(|(key, value)| (key.clone(), value.as_str().into()))
            .collect();
        annotations.insert(CRI_TYPE.into(), "sandbox".into());
        let limits = [
            (CRI_QUOTA, self.limits.cpu_quota.map(|n| n.to_string())),
            (CRI_PERIOD, self.limits.cpu_period.map(|n| n.to_string())),
            (CRI_MEMORY, self.limits.memory.map(|n| n.to_string())),
        ];
        for (key, value) in limits {
            annotations.extend(value.map(|value| (key.to_owned(), value.into())));
        }
        let mut spec = json!({
            "ociVersion": "1.0.2",
            "root": { "path": "rootfs" },
            "process": { "user": { "uid": 0, "gid": 0 }, "cwd": "/", "args": ["pause"] },
            "annotations": annotations,
            "linux": { "namespaces": namespaces, "sysctl": self.sysctls },
        });
        if let Some(parent) = &self.cgroup_parent {
            spec["linux"]["cgroupsPath"] = cgroups_path(parent, id).into();
        }
        if let Some(hostname) = self.hostname.as_deref().filter(|name| !name.is_empty()) {
            spec["hostname"] = hostname.into();
        }
        spec
    }
}

/// The cgroup of a pod's own container below the pod's `parent`, as containerd names it.
fn cgroups_path(parent: &str, id: &ContainerId) -> String {
    // Of a.slice/a-b.slice systemd needs the last: its name holds the way there.
    match parent.rsplit('/').next() {
        Some(slice) if slice.ends_with(".slice") => format!("{slice}:cri-containerd:{id}"),
        _ => format!("{}/{id}", parent.trim_end_matches('/')),
    }
}

/// Limits that the pod has as a whole.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PodLimits {
    /// CPU quota in microseconds for each period.
    pub cpu_quota: Option<i64>,
    /// CPU period in microseconds.
    pub cpu_period: Option<u64>,
    /// Memory in bytes.
    pub memory: Option<i64>,
}

/// Reads the pod's size from the annotations of containerd's CRI plugin or of CRI-O. An unreadable
/// number counts as not given, as the daemon itself would have written it.
pub fn limits(annotations: &Annotations) -> PodLimits {
    fn number<T: std::str::FromStr>(annotations: &Annotations, key: &str) -> Option<T> {
        annotations.get(key)?.trim().parse().ok()
    }
    let found = PodLimits {
        cpu_quota: number(annotations, CRI_QUOTA),
        cpu_period: number(annotations, CRI_PERIOD),
        memory: number(annotations, CRI_MEMORY),
    };
    if found != PodLimits::default() {
        return found;
    }
    let text = CRIO_RESOURCES.iter().find_map(|key| annotations.get(*key));
    let resources: Map<String, Value> = text
        .and_then(|text| serde_json::from_str(text).ok())
        .unwrap_or_default();
    // Zero means not given there.
    let given = |name: &str| {
        let value = resources.get(name).and_then(Value::as_i64);
        value.filter(|value| *value != 0)
    };
    PodLimits {
        cpu_quota: given("cpu_quota"),
        cpu_period: given("cpu_period").and_then(|period| u64::try_from(period).ok()),
        memory: given("memory_limit_in_bytes"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pods_own_cgroup_is_named_as_containerd_does() {
        let id = ContainerId::try_from("p1").unwrap();
        for (parent, path) in [
            ("/kubepods/pod7", "/kubepods/pod7/p1"),
            ("/kubepods/", "/kubepods/p1"),
            ("/k.slice/k-a.slice", "k-a.slice:cri-containerd:p1"),
        ] {
            assert_eq!(cgroups_path(parent, &id), path);
        }
    }

    #[test]
    fn a_pods_own_annotations_cannot_pass_for_the_daemons() {
        let pod = PodSandbox {
            annotations: annotations(&[
                ("io.bulkhead.network.source_addresses", "own"),
                (CRI_TYPE, "container"),
                (CRI_MEMORY, "1"),
            ]),
            ..Default::default()
        };
        let spec = pod.to_spec(&ContainerId::try_from("p1").unwrap());
        let wanted = json!({
            CRI_TYPE: "sandbox",
            "io.bulkhead.network.source_addresses": "own",
        });
        assert_eq!(spec["annotations"], wanted);
    }

    fn annotations(pairs: &[(&str, &str)]) -> Annotations {
        pairs
            .iter()
            .map(|(key, value)| ((*key).into(), (*value).into()))
            .collect()
    }

    #[test]
    fn a_container_without_annotations_is_its_own_sandbox() {
        let none = annotations(&[]);
        assert_eq!(role(&none), Role::Lone);
        assert_eq!(sandbox_of(&none, "c1").unwrap().as_str(), "c1");
    }

    #[test]
    fn pods_group_by_either_daemons_key() {
        for (kind, id) in [(CRI_TYPE, CRI_SANDBOX), (CRIO_TYPE, CRIO_SANDBOX)] {
            let pod = annotations(&[(kind, "container"), (id, "pod7")]);
            assert_eq!(role(&pod), Role::PodContainer);
            assert_eq!(sandbox_of(&pod, "c1").unwrap().as_str(), "pod7");
        }
        let group = annotations(&[(RUNC_GROUP, "g")]);
        assert_eq!(sandbox_of(&group, "c1").unwrap().as_str(), "g");
        let bad = annotations(&[(CRI_SANDBOX, "../../etc")]);
        assert!(sandbox_of(&bad, "c1").is_err());
    }

    #[test]
    fn limits_come_from_the_pods_annotations() {
        let pod = annotations(&[
            ("io.kubernetes.cri.sandbox-cpu-quota", "150000"),
            ("io.kubernetes.cri.sandbox-cpu-period", "100000"),
            ("io.kubernetes.cri.sandbox-memory", "not a number"),
        ]);
        let wanted = PodLimits {
            cpu_quota: Some(150_000),
            cpu_period: Some(100_000),
            memory: None,
        };
        assert_eq!(limits(&pod), wanted);
    }

    #[test]
    fn cri_o_says_it_in_one_annotation_of_two_names() {
        let json = r#"{"cpu_period":100000,"cpu_quota":250000,"cpu_shares":2560,
                       "memory_limit_in_bytes":268435456,"unified":{"memory.high":"1"}}"#;
        let wanted = PodLimits {
            cpu_quota: Some(250_000),
            cpu_period: Some(100_000),
            memory: Some(256 << 20),
        };
        for key in CRIO_RESOURCES {
            assert_eq!(limits(&annotations(&[(key, json)])), wanted);
        }
        let none = PodLimits::default();
        for text in ["null", "{}", "wrong", r#"{"cpu_period":"100m"}"#, "[1]"] {
            assert_eq!(
                limits(&annotations(&[(CRIO_RESOURCES[0], text)])),
                none,
                "{text}"
            );
        }
        let both = annotations(&[
            (CRIO_RESOURCES[1], r#"{"memory_limit_in_bytes":1}"#),
            (CRIO_RESOURCES[0], json),
        ]);
        assert_eq!(limits(&both), wanted);
    }

    proptest::proptest! {
        #[test]
        fn any_annotation_is_read_without_a_panic(text in "\\PC{0,100}") {
            limits(&annotations(&[(CRIO_RESOURCES[0], &text)]));
        }
    }
}
