//! The specs of a Kubernetes pod as containerd's CRI plugin writes them: a sandbox container, and
//! members that share its namespaces.

use crate::shim::spec;
use serde_json::{Value, json};

/// Annotation that says what a container is to its pod.
const KIND: &str = "io.kubernetes.cri.container-type";
/// Annotation with the id of the pod's sandbox.
const SANDBOX: &str = "io.kubernetes.cri.sandbox-id";

/// The spec of the sandbox container of pod `sandbox`.
pub fn sandbox_spec(sandbox: &str) -> Value {
    let mut value = spec(&["/pause"]);
    value["annotations"] = json!({ KIND: "sandbox", SANDBOX: sandbox });
    value
}

/// The spec of a container of pod `sandbox` that runs `argv` and shares network, ipc and uts with
/// process `pid` of the host, the task of the pod's sandbox.
pub fn member_spec(sandbox: &str, pid: u32, argv: &[&str]) -> Value {
    let mut value = spec(argv);
    value["annotations"] = json!({ KIND: "container", SANDBOX: sandbox });
    share_namespaces(&mut value, pid);
    // The pod's; a member that joins an UTS namespace may not name it.
    if let Some(fields) = value.as_object_mut() {
        fields.remove("hostname");
    }
    value
}

fn share_namespaces(value: &mut Value, pid: u32) {
    let joined = [("network", "net"), ("ipc", "ipc"), ("uts", "uts")];
    let namespaces = value["linux"]["namespaces"].as_array_mut();
    for namespace in namespaces.into_iter().flatten() {
        let kind = namespace["type"].as_str().unwrap_or_default();
        if let Some((_, file)) = joined.iter().find(|(name, _)| *name == kind) {
            namespace["path"] = format!("/proc/{pid}/ns/{file}").into();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_member_shares_what_a_pod_shares_and_nothing_else() {
        let value = member_spec("pod", 42, &["true"]);
        assert_eq!(value["annotations"][SANDBOX], "pod");
        let namespaces = value["linux"]["namespaces"].as_array().unwrap();
        let shared: Vec<_> = namespaces
            .iter()
            .filter_map(|one| one["path"].as_str())
            .collect();
        assert_eq!(
            shared,
            ["/proc/42/ns/ipc", "/proc/42/ns/uts", "/proc/42/ns/net"]
        );
        assert_eq!(value.get("hostname"), None);
    }
}
