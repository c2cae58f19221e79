//! Namespaces: what a path to one of the host's means when the container is in a VM.
//!
//! | namespace | without a path | with a path |
//! |---|---|---|
//! | network | a new one in the guest | the guest's root network, which is the pod's; on the host the VMM lives in the one named |
//! | ipc | a new one in the guest | the guest's root one, which the pod's containers share |
//! | uts | a new one in the guest | a new one, with the pod's host name |
//! | pid | a new one in the guest | in a pod, that of a process: the pod's own, which its containers then share; else refused |
//! | mount, cgroup | a new one in the guest | refused |
//! | user | a new one in the guest | in a pod, that of a process: a new one with the same ids, which the spec repeats; else refused |
//! | time | a new one in the guest | refused |

use super::{SpecError, unsupported};
use bulkhead_proto::guest::POD_PID_NAMESPACE;
use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceType, Spec};
use std::path::{Path, PathBuf};

/// The host network namespace for the VMM process, whose pid the task reports. Daemons wire a
/// task's network by that pid, so it must not be the host's own unless the spec says so.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HostNetns {
    /// The host's own: the spec has no network namespace.
    Host,
    /// A fresh one.
    New,
    /// An existing one, by path.
    Path(PathBuf),
}

pub(super) fn host_netns(spec: &Spec) -> HostNetns {
    let namespaces = spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.namespaces().as_ref());
    let network = namespaces.and_then(|all| {
        all.iter()
            .find(|one| one.typ() == LinuxNamespaceType::Network)
    });
    match network {
        None => HostNetns::Host,
        Some(network) => match network.path() {
            None => HostNetns::New,
            Some(path) if path.as_os_str().is_empty() => HostNetns::New,
            Some(path) => HostNetns::Path(path.clone()),
        },
    }
}

/// Whether the container shares the pod's IPC: joins a namespace by its path, or has none listed.
pub(super) fn joins_ipc(spec: &Spec) -> bool {
    let linux = spec.linux().as_ref();
    let namespaces = linux.and_then(|linux| linux.namespaces().as_ref());
    let ipc = namespaces
        .into_iter()
        .flatten()
        .find(|one| one.typ() == LinuxNamespaceType::Ipc);
    ipc.is_none_or(|ipc| {
        let path = ipc.path().as_ref();
        path.is_some_and(|path| !path.as_os_str().is_empty())
    })
}

pub(super) fn translate(
    spec: &mut Spec,
    pod_hostname: Option<&str>,
    in_pod: bool,
) -> Result<(), SpecError> {
    let Some(linux) = spec.linux_mut() else {
        return Ok(());
    };
    let some = |maps: &Option<Vec<_>>| maps.as_ref().is_some_and(|maps| !maps.is_empty());
    let has_maps = some(linux.uid_mappings()) && some(linux.gid_mappings());
    let Some(namespaces) = linux.namespaces_mut() else {
        return Ok(());
    };
    let mut kept = Vec::with_capacity(namespaces.len());
    let mut joins_pod_uts = false;
    for (n, mut namespace) in namespaces.drain(..).enumerate() {
        let path = namespace
            .path()
            .clone()
            .filter(|path| !path.as_os_str().is_empty());
        let Some(path) = path else {
            namespace.set_path(None);
            kept.push(namespace);
            continue;
        };
        match namespace.typ() {
            // A namespace that isn't listed is inherited from the runtime (OCI runtime spec,
            // config-linux, "Namespaces"); the agent's own are the pod's.
            LinuxNamespaceType::Network => check_type(n, &path, "net")?,
            LinuxNamespaceType::Ipc => check_type(n, &path, "ipc")?,
            // The sandbox's or another container's, of which the pid is the VMM's in either case.
            LinuxNamespaceType::Pid if in_pod && is_of_process(&path, "pid") => {
                namespace.set_path(Some(POD_PID_NAMESPACE.into()));
                kept.push(namespace);
            }
            LinuxNamespaceType::User if in_pod && is_of_process(&path, "user") => {
                check_maps(n, has_maps)?;
                namespace.set_path(None);
                kept.push(namespace);
            }
            LinuxNamespaceType::Uts => {
                check_type(n, &path, "uts")?;
                joins_pod_uts = true;
                namespace.set_path(None);
                kept.push(namespace);
            }
            other => {
                return Err(unsupported(
                    format!("linux.namespaces[{n}].path"),
                    format!(
                        "{} is a {other:?} namespace of the host, which a container in a VM cannot \
                         join; leave the path out",
                        path.display()
                    ),
                ));
            }
        }
    }
    check_pair(&kept)?;
    *namespaces = kept;
    if joins_pod_uts && spec.hostname().is_none() {
        spec.set_hostname(pod_hostname.map(str::to_owned));
    }
    Ok(())
}

/// Refuses a path to a namespace of another type (OCI runtime spec, config-linux, "Namespaces"), as
/// far as the path itself tells: those of /proc are links like `ipc:[4026531839]`.
fn check_type(n: usize, path: &Path, wanted: &str) -> Result<(), SpecError> {
    let Ok(target) = std::fs::read_link(path) else {
        return Ok(());
    };
    match target.to_str().and_then(|target| target.split_once(":[")) {
        Some((found, _)) if found != wanted => Err(unsupported(
            format!("linux.namespaces[{n}].path"),
            format!(
                "{} is a namespace of type {found}, not {wanted}; give the path of one that is",
                path.display()
            ),
        )),
        _ => Ok(()),
    }
}

/// The pod's user namespace exists in the guest only as its ids: daemons repeat them in the spec of
/// each of its containers, since a runtime maps the owners of files by them.
fn check_maps(n: usize, has_maps: bool) -> Result<(), SpecError> {
    if has_maps {
        return Ok(());
    }
    Err(unsupported(
        format!("linux.namespaces[{n}].path"),
        "a user namespace can be joined only by its ids: repeat them as linux.uidMappings and \
         linux.gidMappings",
    ))
}

/// The pod's processes are in a namespace of the guest's own users, of which root of another user
/// namespace can't mount /proc (mount_namespaces(7)).
fn check_pair(namespaces: &[LinuxNamespace]) -> Result<(), SpecError> {
    let shares_pids =
        |one: &LinuxNamespace| one.typ() == LinuxNamespaceType::Pid && one.path().is_some();
    let own_users = |one: &LinuxNamespace| one.typ() == LinuxNamespaceType::User;
    if namespaces.iter().any(shares_pids) && namespaces.iter().any(own_users) {
        return Err(unsupported(
            "linux.namespaces",
            "a container with a user namespace cannot share the pod's processes; leave out either \
             hostUsers: false or shareProcessNamespace: true",
        ));
    }
    Ok(())
}

/// Whether `path` is `/proc/PID/ns/KIND`.
fn is_of_process(path: &Path, kind: &str) -> bool {
    let pid = path.to_str().and_then(|path| {
        let rest = path.strip_prefix("/proc/")?.strip_suffix(kind)?;
        rest.strip_suffix("/ns/")
    });
    pid.is_some_and(|pid| pid.parse::<u32>().is_ok_and(|pid| pid > 0))
}
