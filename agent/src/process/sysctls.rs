//! `linux.sysctl`: kernel parameters of a container's namespaces.

use crate::error::Failure;
use crate::namespaces::NamespacePlan;
use crate::spec::ContainerPlan;

/// Parameters of an IPC namespace (sysctl/kernel.rst, ipc_namespaces(7)), below /proc/sys.
const OF_IPC: [&str; 4] = ["kernel/msg", "kernel/sem", "kernel/shm", "fs/mqueue/"];

/// In the agent: writes those of namespaces that are the guest's, which root of the container's own
/// user namespace has no power over. The pod has asked for them, or it wouldn't share them.
pub(super) fn write_shared(plan: &ContainerPlan) -> Result<(), Failure> {
    write(plan, |file| is_out_of_reach(&plan.namespaces, file))
}

/// In the container's first process: writes the others.
pub(super) fn write_own(plan: &ContainerPlan) -> Result<(), Failure> {
    write(plan, |file| !is_out_of_reach(&plan.namespaces, file))
}

fn write(plan: &ContainerPlan, wanted: impl Fn(&str) -> bool) -> Result<(), Failure> {
    for (file, value) in plan.sysctls.iter().filter(|(file, _)| wanted(file)) {
        std::fs::write(format!("/proc/sys/{file}"), value).map_err(|error| {
            Failure::invalid(
                "linux.sysctl",
                format!("write {value:?} to /proc/sys/{file}: {error}"),
            )
        })?;
    }
    Ok(())
}

fn is_out_of_reach(namespaces: &NamespacePlan, file: &str) -> bool {
    let of_net = file.starts_with("net/");
    let of_ipc = OF_IPC.iter().any(|start| file.starts_with(start));
    namespaces.ids.is_some()
        && ((of_net && !namespaces.own_net()) || (of_ipc && !namespaces.own_ipc()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_agent_writes_what_root_of_the_container_may_not() {
        let plan = |kinds: &[&str]| {
            let kinds: Vec<_> = kinds
                .iter()
                .map(|kind| serde_json::json!({"type": kind}))
                .collect();
            let maps = serde_json::json!([{"containerID": 0, "hostID": 9, "size": 9}]);
            let mut spec =
                serde_json::json!({"ociVersion": "1.2.0", "linux": {"namespaces": kinds}});
            if kinds.iter().any(|kind| kind["type"] == "user") {
                spec["linux"]["uidMappings"] = maps.clone();
                spec["linux"]["gidMappings"] = maps;
            }
            NamespacePlan::new(&serde_json::from_value(spec).expect("a spec")).expect("a plan")
        };
        let shared = plan(&["mount", "user"]);
        let own = plan(&["mount", "user", "network", "ipc"]);
        let same_users = plan(&["mount"]);
        for file in ["net/ipv4/ip_forward", "kernel/shmmax", "fs/mqueue/msg_max"] {
            assert!(is_out_of_reach(&shared, file), "{file}");
            assert!(!is_out_of_reach(&own, file), "{file}");
            assert!(!is_out_of_reach(&same_users, file), "{file}");
        }
        assert!(!is_out_of_reach(&shared, "kernel/panic"));
    }
}
