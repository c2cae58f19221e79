//! The bundle's OCI spec: read and checked on the host, then made a guest spec.
//!
//! The agent gets the spec as containerd wrote it but for what only makes sense on the host:
//!
//! | in the bundle | in the guest's spec |
//! |---|---|
//! | `root.path` | the root below the share ([`guest_rootfs`]) |
//! | a bind mount's source | its place below the share, for files and folders; volumes in memory are the guest's own |
//! | `linux.namespaces[].path` | see `namespaces.rs` |
//! | `hooks` | `startContainer` only, whose programs are the container's; the others run on the host |
//! | AppArmor profile, SELinux labels | gone; the guest has neither |

mod binds;
mod json_path;
mod namespaces;

pub use binds::{Bind, MountIds};
pub use namespaces::HostNetns;

use crate::Kind;
use crate::host_cgroup::HostCgroup;
use crate::ids::{ContainerId, Namespace, SandboxId};
use crate::pod::{self, Annotations, PodLimits, PodSandbox, PodSettings, Role};
use crate::pod_files;
use bulkhead_proto::agent::StorageMount;
use bulkhead_proto::guest::{SHARE_MOUNT, SHARE_MOUNTS, SHARE_VOLUMES};
use oci_spec::runtime::{Hooks, Linux, LinuxResources, Process, Spec};
use std::io;
use std::path::{Path, PathBuf};

/// Largest spec that is read, in bytes; the agent's RPC frame holds 4 MiB.
const MAX_SPEC_BYTES: u64 = 3 << 20;

/// A spec that can't be read or honoured.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// The file can't be read.
    #[error("cannot read the OCI spec {path}: {cause}", path = .path.display())]
    Read {
        /// The spec's file.
        path: PathBuf,
        /// Why.
        cause: io::Error,
    },
    /// Not JSON, or a field of the wrong type.
    #[error("{what} is invalid at {field}: {detail}")]
    Parse {
        /// The spec's file, or the exec's process.
        what: String,
        /// The field as a path, `process.args[0]`.
        field: String,
        /// The parser's message.
        detail: String,
    },
    /// A field's value is missing or wrong.
    #[error("the OCI spec is invalid: {field}: {problem}")]
    Field {
        /// The field as a path.
        field: String,
        /// What is wrong and what is needed.
        problem: String,
    },
    /// A field asks for something that Bulkhead can't do.
    #[error("the OCI spec asks for something that is not supported: {field}: {problem}")]
    Unsupported {
        /// The field as a path.
        field: String,
        /// What it is and what to do instead.
        problem: String,
    },
}

impl SpecError {
    pub(crate) fn kind(&self) -> Kind {
        match self {
            SpecError::Read { .. } => Kind::Unknown,
            SpecError::Parse { .. } | SpecError::Field { .. } => Kind::InvalidArgument,
            SpecError::Unsupported { .. } => Kind::Unimplemented,
        }
    }
}

fn field(field: impl Into<String>, problem: impl Into<String>) -> SpecError {
    SpecError::Field {
        field: field.into(),
        problem: problem.into(),
    }
}

fn unsupported(field: impl Into<String>, problem: impl Into<String>) -> SpecError {
    SpecError::Unsupported {
        field: field.into(),
        problem: problem.into(),
    }
}

/// Where the container's root is in the guest.
pub fn guest_rootfs(id: &ContainerId) -> PathBuf {
    Path::new(SHARE_MOUNT).join(id).join("rootfs")
}

/// Where the container has `bind` in the guest.
pub(crate) fn guest_bind(id: &ContainerId, bind: &Bind) -> PathBuf {
    Path::new(SHARE_MOUNT)
        .join(id)
        .join(SHARE_MOUNTS)
        .join(bind.name())
}

/// Where a volume that containers of a pod have in common is in the guest.
fn guest_volume(name: &str) -> PathBuf {
    Path::new(SHARE_MOUNT)
        .join(SHARE_VOLUMES)
        .join(SHARE_MOUNTS)
        .join(name)
}

/// A spec that has been read and checked, still as the host sees it.
#[derive(Debug, Clone)]
pub struct BundleSpec {
    spec: Spec,
    bundle: PathBuf,
}

/// What the host has to do for a container, and the spec that goes to the agent.
#[derive(Debug)]
pub struct GuestSpec {
    /// The guest's spec.
    pub spec: Spec,
    /// What to bind into the share.
    pub binds: Vec<Bind>,
    /// What the guest mounts itself, before it sets the container up.
    pub storage: Vec<StorageMount>,
}

impl BundleSpec {
    /// Reads and checks `config.json` in `bundle`.
    ///
    /// # Errors
    /// When it can't be read, isn't a spec, or lacks what a container needs.
    pub fn load(bundle: &Path) -> Result<Self, SpecError> {
        let path = bundle.join("config.json");
        let read = |cause| SpecError::Read {
            path: path.clone(),
            cause,
        };
        let length = path.metadata().map_err(read)?.len();
        if length > MAX_SPEC_BYTES {
            let cause = io::Error::other(format!(
                "it has {length} bytes; {MAX_SPEC_BYTES} are allowed"
            ));
            return Err(read(cause));
        }
        let text = std::fs::read(&path).map_err(read)?;
        let spec = parse(&format!("the OCI spec {}", path.display()), &text)?;
        let this = Self {
            spec,
            bundle: bundle.to_owned(),
        };
        this.check()?;
        Ok(this)
    }

    /// The spec of a pod's sandbox that comes without one.
    ///
    /// # Errors
    /// When a value of the pod's has no place in an OCI spec.
    pub fn of_pod(bundle: &Path, id: &ContainerId, pod: &PodSandbox) -> Result<Self, SpecError> {
        let text = pod.to_spec(id).to_string();
        let spec = parse("the pod's configuration", text.as_bytes())?;
        let this = Self {
            spec,
            bundle: bundle.to_owned(),
        };
        this.check()?;
        Ok(this)
    }

    fn check(&self) -> Result<(), SpecError> {
        let version = self.spec.version();
        if !version.starts_with("1.") {
            return Err(field(
                "ociVersion",
                format!("{version:?} is not supported; 1.x is"),
            ));
        }
        let root = self
            .spec
            .root()
            .as_ref()
            .ok_or_else(|| field("root", "is missing"))?;
        if root.path().as_os_str().is_empty() {
            return Err(field(
                "root.path",
                "is empty; it must name the root file system's folder",
            ));
        }
        let process = self
            .spec
            .process()
            .as_ref()
            .ok_or_else(|| field("process", "is missing"))?;
        check_process(process, "process")?;
        for (n, mount) in self.spec.mounts().iter().flatten().enumerate() {
            if mount.destination().as_os_str().is_empty() {
                return Err(field(format!("mounts[{n}].destination"), "is empty"));
            }
        }
        Ok(())
    }

    /// The spec's annotations.
    pub fn annotations(&self) -> Annotations {
        self.spec.annotations().clone().unwrap_or_default()
    }

    /// The container's root file system on the host.
    pub fn root_path(&self) -> PathBuf {
        let path = self
            .spec
            .root()
            .as_ref()
            .map(|root| root.path().clone())
            .unwrap_or_default();
        self.bundle.join(path)
    }

    /// The hooks that run on the host.
    pub fn hooks(&self) -> Option<&Hooks> {
        self.spec.hooks().as_ref()
    }

    /// The host name that the spec sets.
    pub fn hostname(&self) -> Option<&str> {
        self.spec.hostname().as_deref()
    }

    /// The host network namespace in which the task's pid has to live.
    ///
    /// # Errors
    /// When it's the host's own.
    pub fn host_netns(&self) -> Result<HostNetns, SpecError> {
        namespaces::host_netns(&self.spec)
    }

    /// The host's cgroup in which the VMM of the sandbox `id` runs, if this is that sandbox's spec.
    ///
    /// # Errors
    /// When the path that the spec gives can't be one.
    pub(crate) fn host_cgroup(
        &self,
        namespace: &Namespace,
        id: &SandboxId,
    ) -> Result<HostCgroup, SpecError> {
        let linux = self.spec.linux().as_ref();
        let path = linux.and_then(|linux| linux.cgroups_path().as_deref());
        HostCgroup::named(path, namespace, id)
            .map_err(|problem| field("linux.cgroupsPath", problem))
    }

    /// The limits that size the VM: the pod's if this is a pod's sandbox, else the container's.
    pub fn limits(&self) -> PodLimits {
        let annotations = self.annotations();
        if pod::role(&annotations) == Role::PodSandbox {
            return pod::limits(&annotations);
        }
        let resources = self
            .spec
            .linux()
            .as_ref()
            .and_then(|linux| linux.resources().as_ref());
        let memory = resources.and_then(|all| all.memory().as_ref());
        let cpu = resources.and_then(|all| all.cpu().as_ref());
        PodLimits {
            cpu_quota: cpu.and_then(|cpu| cpu.quota()),
            cpu_period: cpu.and_then(|cpu| cpu.period()),
            memory: memory.and_then(|memory| memory.limit()),
        }
    }

    /// What the containers of a pod take over if this is its sandbox's spec.
    pub fn pod_settings(&self) -> PodSettings {
        let linux = self.spec.linux().as_ref();
        let sysctls = linux.and_then(|linux| linux.sysctl().clone());
        PodSettings {
            hostname: self.spec.hostname().clone(),
            sysctls: sysctls.unwrap_or_default(),
            files: Vec::new(),
        }
    }

    /// Makes the guest's spec for the container `id`. `pod` is what its pod's sandbox asked for.
    ///
    /// # Errors
    /// When a bind mount's source is missing or can't be shared, or a namespace can't be joined.
    pub fn for_guest(&self, id: &ContainerId, pod: &PodSettings) -> Result<GuestSpec, SpecError> {
        let mut spec = self.spec.clone();
        if let Some(root) = spec.root_mut() {
            root.set_path(guest_rootfs(id));
        }
        let hooks = spec.hooks().as_ref();
        let inside = hooks.and_then(|hooks| hooks.start_container().clone());
        spec.set_hooks(inside.filter(|hooks| !hooks.is_empty()).map(|hooks| {
            let mut inside = Hooks::default();
            inside.set_start_container(Some(hooks));
            inside
        }));
        if let Some(process) = spec.process_mut() {
            strip_labels(process);
        }
        if let Some(linux) = spec.linux_mut() {
            linux.set_mount_label(None);
            if let Some(resources) = linux.resources_mut() {
                drop_swap_limit(resources);
            }
            add_sysctls(linux, pod);
        }
        let annotations = self.annotations();
        let owner = pod::sandbox_of(&annotations, id.as_str());
        let vm = match pod::role(&annotations) {
            Role::PodContainer => namespaces::Vm::Pod,
            _ if owner.is_ok_and(|owner| owner.as_str() == id.as_str()) => namespaces::Vm::Own,
            _ => namespaces::Vm::Other,
        };
        pod_files::add(&mut spec, &pod.files, namespaces::joins_ipc(&self.spec));
        namespaces::translate(&mut spec, pod.hostname.as_deref(), vm)?;
        let in_pod = pod::role(&annotations) == Role::PodContainer;
        let sources = binds::translate(&mut spec, id, &self.bundle, in_pod)?;
        Ok(GuestSpec {
            spec,
            binds: sources.binds,
            storage: sources.storage,
        })
    }
}

/// Reads and checks the process of an exec.
///
/// # Errors
/// When it isn't an OCI process.
pub fn parse_process(json: &[u8], terminal: bool) -> Result<Process, SpecError> {
    let mut process: Process = parse("the exec's process", json)?;
    check_process(&process, "process")?;
    strip_labels(&mut process);
    process.set_terminal(Some(terminal));
    Ok(process)
}

fn check_process(process: &Process, at: &str) -> Result<(), SpecError> {
    match process.args().as_deref() {
        None | Some([]) => {
            return Err(field(
                format!("{at}.args"),
                "is empty; it must name a program",
            ));
        }
        Some([program, ..]) if program.is_empty() => {
            return Err(field(
                format!("{at}.args[0]"),
                "is empty; it must name a program",
            ));
        }
        Some(_) => {}
    }
    if !process.cwd().is_absolute() {
        let problem = format!("{:?} is not an absolute path", process.cwd());
        return Err(field(format!("{at}.cwd"), problem));
    }
    Ok(())
}

/// The guest kernel has neither AppArmor nor SELinux; the labels are the host's.
fn strip_labels(process: &mut Process) {
    process.set_apparmor_profile(None);
    process.set_selinux_label(None);
}

/// Without swap in the guest, any limit of it holds; daemons set one wherever the host has swap.
pub(crate) fn drop_swap_limit(resources: &mut LinuxResources) {
    if let Some(mut memory) = *resources.memory() {
        memory.set_swap(None);
        resources.set_memory(Some(memory));
    }
}

/// The pod's kernel parameters: its sandbox has no process in the guest that could set them, so
/// each container does when it is created, to the same values. Its own ones come first.
fn add_sysctls(linux: &mut Linux, pod: &PodSettings) {
    if pod.sysctls.is_empty() {
        return;
    }
    let mut sysctls = pod.sysctls.clone();
    sysctls.extend(linux.sysctl().clone().unwrap_or_default());
    linux.set_sysctl(Some(sysctls));
}

fn parse<T: serde::de::DeserializeOwned>(what: &str, json: &[u8]) -> Result<T, SpecError> {
    serde_json::from_slice(json).map_err(|error| SpecError::Parse {
        what: what.to_owned(),
        field: json_path::at(json, error.line(), error.column()),
        detail: error.to_string(),
    })
}

#[cfg(test)]
mod tests;
