//! OCI runtime specs (1.2): parsed, checked, and turned into plans that can be carried out without
//! further questions.
//!
//! Everything that can be refused by looking at the spec alone is refused here, by the field's
//! name and before anything is changed. The documented exceptions, which are ignored:
//! `process.apparmorProfile`, `process.selinuxLabel` and `linux.mountLabel` (the guest's kernel
//! has no such modules), `linux.cgroupsPath` (the guest's cgroup tree is the agent's), and
//! annotations.

use crate::cgroups::CgroupSettings;
use crate::error::Failure;
use crate::namespaces::NamespacePlan;
use crate::process::{HookPlan, Personality, ProcessPlan};
use crate::rootfs::RootfsPlan;
use crate::seccomp::Filter;
use oci_spec::runtime::{Hooks, Linux, LinuxResources, Process, Spec};
use std::path::{Component, Path};
use std::sync::Arc;

/// Longest spec, in bytes of JSON. ttrpc itself carries at most 4 MiB.
const MAX_SPEC_BYTES: usize = 2 * 1024 * 1024;

/// A container as it will be set up.
#[derive(Debug, Clone)]
pub struct ContainerPlan {
    /// Its namespaces and what belongs to them.
    pub namespaces: NamespacePlan,
    /// What it sees of the file system.
    pub rootfs: RootfsPlan,
    /// Its limits.
    pub cgroup: CgroupSettings,
    /// Files below /proc/sys and their values.
    pub sysctls: Vec<(String, String)>,
    /// What runs before its first program does.
    pub hooks: HookPlan,
    /// What its processes may ask of the kernel; shared with those that come later.
    pub seccomp: Option<Arc<Filter>>,
    /// Their execution domain.
    pub personality: Option<Personality>,
    /// Its first process.
    pub process: ProcessPlan,
}

impl ContainerPlan {
    /// Parses and checks the JSON of a spec.
    pub fn parse(json: &[u8]) -> Result<Self, Failure> {
        check_size("spec_json", json)?;
        let spec: Spec = serde_json::from_slice(json)
            .map_err(|error| Failure::invalid("the OCI spec", error))?;
        Self::new(&spec)
    }

    fn new(spec: &Spec) -> Result<Self, Failure> {
        if !spec.version().starts_with("1.") {
            return Err(Failure::invalid(
                "ociVersion",
                format!(
                    "{:?} is not a version 1 of the runtime spec",
                    spec.version()
                ),
            ));
        }
        refuse_hooks(spec.hooks().as_ref())?;
        let linux = spec.linux().as_ref();
        if let Some(linux) = linux {
            refuse_unsupported(linux)?;
        }
        let process = spec
            .process()
            .as_ref()
            .ok_or_else(|| Failure::invalid("process", "missing; a container needs a process"))?;
        let process = ProcessPlan::new(process)?;
        let namespaces = NamespacePlan::new(spec)?;
        let rootfs = RootfsPlan::new(spec, namespaces.new_cgroup, process.terminal)?;
        let resources = linux.and_then(|linux| linux.resources().as_ref());
        let mut sysctls = Vec::new();
        for (name, value) in linux
            .and_then(|linux| linux.sysctl().as_ref())
            .into_iter()
            .flatten()
        {
            sysctls.push((sysctl_file(name)?, value.clone()));
        }
        Ok(Self {
            namespaces,
            rootfs,
            cgroup: resources.map_or_else(|| Ok(CgroupSettings::default()), CgroupSettings::new)?,
            sysctls,
            hooks: HookPlan::new(spec)?,
            seccomp: linux
                .and_then(|linux| linux.seccomp().as_ref())
                .map(|seccomp| Filter::new(seccomp).map(Arc::new))
                .transpose()?,
            personality: linux
                .and_then(|linux| linux.personality().as_ref())
                .map(Personality::new)
                .transpose()?,
            process,
        })
    }
}

/// Parses and checks the JSON of an OCI process, for exec.
pub fn parse_process(json: &[u8]) -> Result<ProcessPlan, Failure> {
    check_size("process_json", json)?;
    let process: Process =
        serde_json::from_slice(json).map_err(|error| Failure::invalid("the OCI process", error))?;
    ProcessPlan::new(&process)
}

/// Parses and checks the JSON of OCI resources, for update.
pub fn parse_resources(json: &[u8]) -> Result<CgroupSettings, Failure> {
    check_size("resources_json", json)?;
    let resources: LinuxResources = serde_json::from_slice(json)
        .map_err(|error| Failure::invalid("the OCI resources", error))?;
    CgroupSettings::new(&resources)
}

/// `path`, if it is absolute and has no `..` in it.
pub fn absolute_path<'a>(field: &str, path: &'a Path) -> Result<&'a Path, Failure> {
    no_nul(field, path.as_os_str().as_encoded_bytes())?;
    if !path.is_absolute() || path.components().any(|part| part == Component::ParentDir) {
        return Err(Failure::invalid(
            field,
            format!("{path:?} is not an absolute path without \"..\""),
        ));
    }
    Ok(path)
}

/// Refuses what no system call could take.
pub fn no_nul(field: &str, bytes: &[u8]) -> Result<(), Failure> {
    if bytes.contains(&0) {
        return Err(Failure::invalid(field, "contains a NUL byte"));
    }
    Ok(())
}

fn check_size(field: &str, json: &[u8]) -> Result<(), Failure> {
    if json.len() > MAX_SPEC_BYTES {
        return Err(Failure::invalid(
            field,
            format!("{} bytes long, the limit is {MAX_SPEC_BYTES}", json.len()),
        ));
    }
    Ok(())
}

fn refuse_hooks(hooks: Option<&Hooks>) -> Result<(), Failure> {
    let Some(hooks) = hooks else {
        return Ok(());
    };
    let all = [
        ("hooks.prestart", hooks.prestart()),
        ("hooks.createRuntime", hooks.create_runtime()),
        ("hooks.createContainer", hooks.create_container()),
        ("hooks.poststart", hooks.poststart()),
        ("hooks.poststop", hooks.poststop()),
    ];
    for (field, list) in all {
        if list.as_ref().is_some_and(|list| !list.is_empty()) {
            return Err(Failure::invalid(
                field,
                "belongs to the host and doesn't run in the guest; run it there, or leave it out",
            ));
        }
    }
    Ok(())
}

fn refuse_unsupported(linux: &Linux) -> Result<(), Failure> {
    let refused = [
        (
            "linux.intelRdt",
            linux.intel_rdt().is_some(),
            "the guest has no cache or bandwidth control",
        ),
        (
            "linux.memoryPolicy",
            linux.memory_policy().is_some(),
            "the guest has one memory node",
        ),
        (
            "linux.netDevices",
            linux
                .net_devices()
                .as_ref()
                .is_some_and(|map| !map.is_empty()),
            "the host's network devices don't exist in the guest",
        ),
    ];
    match refused.into_iter().find(|(_, given, _)| *given) {
        Some((field, _, reason)) => Err(Failure::invalid(field, reason)),
        None => Ok(()),
    }
}

/// From `net.ipv4.ip_forward` or `net/ipv4/ip_forward` to the file below /proc/sys. As with
/// sysctl(8), whichever of `.` and `/` comes first is the separator; the other stands for the
/// other one.
fn sysctl_file(name: &str) -> Result<String, Failure> {
    let dotted = name
        .find(['.', '/'])
        .is_some_and(|index| name.as_bytes().get(index) == Some(&b'.'));
    let file: String = if dotted {
        name.chars()
            .map(|c| match c {
                '.' => '/',
                '/' => '.',
                other => other,
            })
            .collect()
    } else {
        name.to_owned()
    };
    let valid = !file.contains('\0')
        && !file.is_empty()
        && file
            .split('/')
            .all(|part| !part.is_empty() && part != "." && part != "..");
    if valid {
        Ok(file)
    } else {
        Err(Failure::invalid(
            "linux.sysctl",
            format!("{name:?} is not the name of a kernel parameter"),
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;
    use proptest::prelude::*;

    pub fn spec(changes: &[(&str, serde_json::Value)]) -> Vec<u8> {
        let mut spec = serde_json::json!({
            "ociVersion": "1.2.0",
            "root": {"path": "/run/bulkhead/shared/c1/rootfs"},
            "process": {"cwd": "/", "args": ["true"], "user": {"uid": 0, "gid": 0}},
            "linux": {"namespaces": [{"type": "mount"}, {"type": "pid"}]},
        });
        for (pointer, value) in changes {
            let (parent, key) = pointer.rsplit_once('/').expect("a pointer");
            spec.pointer_mut(parent).expect("a parent")[key] = value.clone();
        }
        serde_json::to_vec(&spec).expect("JSON")
    }

    #[test]
    fn accepts_a_plain_spec() {
        let plan = ContainerPlan::parse(&spec(&[])).expect("a plan");
        assert_eq!(plan.process.args, [c"true".to_owned()]);
        assert!(plan.sysctls.is_empty());
    }

    #[test]
    fn refuses_by_name_what_it_cannot_honour() {
        use serde_json::json;
        for (pointer, value, field) in [
            ("/ociVersion", json!("2.0.0"), "ociVersion"),
            ("/process", json!(null), "process"),
            ("/root", json!(null), "root"),
            ("/root/path", json!("rootfs"), "root.path"),
            ("/root/path", json!("/run/../etc"), "root.path"),
            ("/process/args", json!([]), "process.args"),
            ("/process/args", json!(["a\u{0}b"]), "process.args"),
            ("/process/cwd", json!("tmp"), "process.cwd"),
            (
                "/process/scheduler",
                json!({"policy": "SCHED_FIFO"}),
                "process.scheduler",
            ),
            (
                "/linux/personality",
                json!({"domain": "LINUX", "flags": ["X"]}),
                "linux.personality.flags",
            ),
            (
                "/process/rlimits",
                json!([{"type": "RLIMIT_NOFILE", "soft": 2, "hard": 1}]),
                "process.rlimits",
            ),
            (
                "/hooks",
                json!({"createContainer": [{"path": "/bin/true"}]}),
                "hooks.createContainer",
            ),
            (
                "/linux/seccomp",
                json!({"defaultAction": "SCMP_ACT_NOTIFY"}),
                "linux.seccomp.defaultAction",
            ),
            ("/linux/intelRdt", json!({}), "linux.intelRdt"),
            ("/linux/sysctl", json!({"net..x": "1"}), "linux.sysctl"),
            ("/linux/sysctl", json!({"../x": "1"}), "linux.sysctl"),
            (
                "/linux/namespaces",
                json!([{"type": "pid"}]),
                "linux.namespaces",
            ),
            (
                "/linux/namespaces",
                json!([{"type": "mount"}, {"type": "user"}]),
                "linux.uidMappings",
            ),
            (
                "/linux/namespaces",
                json!([{"type": "mount"}, {"type": "pid", "path": "/var/run/x"}]),
                "linux.namespaces",
            ),
            (
                "/linux/rootfsPropagation",
                json!("sideways"),
                "linux.rootfsPropagation",
            ),
            ("/hostname", json!("web"), "hostname"),
            (
                "/mounts",
                json!([{"destination": "/x", "type": "tmpfs", "options": ["ridmap"]}]),
                "mounts[0].options",
            ),
            (
                "/mounts",
                json!([{"destination": "/x", "options": ["bind"]}]),
                "mounts[0].source",
            ),
        ] {
            let failure = ContainerPlan::parse(&spec(&[(pointer, value)])).expect_err(field);
            assert_eq!(failure.kind, Kind::InvalidArgument, "{failure}");
            assert!(failure.message.starts_with(field), "{field}: {failure}");
        }
    }

    #[test]
    fn refuses_what_is_not_a_spec() {
        for json in [
            &b""[..],
            b"{",
            b"[]",
            b"{\"ociVersion\":1}",
            &vec![b' '; MAX_SPEC_BYTES + 1],
        ] {
            let failure = ContainerPlan::parse(json).expect_err("not a spec");
            assert_eq!(failure.kind, Kind::InvalidArgument);
        }
    }

    #[test]
    fn names_sysctl_files() {
        assert_eq!(
            sysctl_file("net.ipv4.ip_forward").as_deref(),
            Ok("net/ipv4/ip_forward")
        );
        assert_eq!(
            sysctl_file("net.ipv4.conf.eth0/1.forwarding").as_deref(),
            Ok("net/ipv4/conf/eth0.1/forwarding")
        );
        assert_eq!(
            sysctl_file("net/ipv4/conf/eth0.1/forwarding").as_deref(),
            Ok("net/ipv4/conf/eth0.1/forwarding")
        );
    }

    proptest! {
        #[test]
        fn never_panics(bytes: Vec<u8>) {
            let _ = ContainerPlan::parse(&bytes);
            let _ = parse_process(&bytes);
            let _ = parse_resources(&bytes);
        }

        #[test]
        fn sysctl_files_stay_below_their_folder(name in "[a-z./]{0,12}") {
            if let Ok(file) = sysctl_file(&name) {
                prop_assert!(!file.starts_with('/') && !file.split('/').any(|part| part == ".." || part.is_empty()));
            }
        }
    }
}
