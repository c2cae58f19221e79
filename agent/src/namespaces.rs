//! Namespaces: which a container gets, which it shares, and what is set up inside them.

use crate::error::{Context, Failure};
use crate::spares::Taken;
use crate::spec::no_nul;
use crate::users::IdMaps;
use bulkhead_proto::guest::POD_PID_NAMESPACE;
use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceType, Spec};
use rustix::fs::{CWD, Mode, OFlags};
use rustix::thread::{LinkNameSpaceType, UnshareFlags};
use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

/// Longest host name, `__NEW_UTS_LEN` of the kernel.
const MAX_HOSTNAME: usize = 64;

/// The namespaces of a container.
#[derive(Debug, Clone, Default)]
pub struct NamespacePlan {
    /// CLONE_NEW* flags for the clone that makes the container's first process.
    pub clone_flags: i32,
    /// A new user namespace with these maps.
    pub ids: Option<Arc<IdMaps>>,
    /// A new cgroup namespace. Not by clone: its root is the cgroup of whoever makes it, and that
    /// has to be the process that is already in the container's cgroup.
    pub new_cgroup: bool,
    /// A new time namespace with these offsets, as lines for /proc/self/timens_offsets.
    pub new_time: Option<String>,
    /// The existing pid namespace that its processes are in.
    pub join_pid: Option<JoinedPids>,
    /// Further namespaces of processes of the sandbox.
    pub join: Vec<JoinedNamespace>,
    /// Set in the container's uts namespace.
    pub hostname: Option<String>,
    /// Set in the container's uts namespace.
    pub domainname: Option<String>,
}

/// A pid namespace to join.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum JoinedPids {
    /// The pod's.
    Pod,
    /// That of a process of the sandbox.
    Process(JoinedNamespace),
}

/// A namespace of a running process, named by its path in the guest's /proc.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JoinedNamespace {
    kind: LinuxNamespaceType,
    path: String,
}

impl JoinedNamespace {
    /// `/proc/<pid>/ns/<kind>`, the only form in which a guest namespace can be named.
    fn new(namespace: &LinuxNamespace) -> Result<Self, Failure> {
        let kind = namespace.typ();
        let path = namespace.path().as_ref().and_then(|path| path.to_str());
        let path = path.unwrap_or_default();
        let pid = path
            .strip_prefix("/proc/")
            .and_then(|rest| rest.strip_suffix(&format!("/ns/{kind}")))
            .filter(|pid| pid.parse::<u32>().is_ok_and(|pid| pid > 0));
        match pid {
            Some(_) => Ok(Self {
                kind,
                path: path.to_owned(),
            }),
            None => Err(Failure::invalid(
                "linux.namespaces",
                format!("{path:?} is not /proc/<pid>/ns/{kind} of a process in the guest"),
            )),
        }
    }

    /// Opens it.
    pub fn open(&self) -> Result<OwnedFd, Failure> {
        rustix::fs::open(
            self.path.as_str(),
            OFlags::RDONLY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .context(|| format!("open the namespace {}", self.path))
    }

    /// Moves the calling process into it.
    fn enter(&self) -> Result<(), Failure> {
        let kind = match self.kind {
            LinuxNamespaceType::Ipc => LinkNameSpaceType::InterProcessCommunication,
            _ => LinkNameSpaceType::HostNameAndNISDomainName,
        };
        rustix::thread::move_into_link_name_space(self.open()?.as_fd(), Some(kind))
            .context(|| format!("join the namespace {}", self.path))
    }
}

impl NamespacePlan {
    /// Checks `linux.namespaces` and the fields that belong to namespaces.
    pub fn new(spec: &Spec) -> Result<Self, Failure> {
        let empty = Vec::new();
        let linux = spec.linux().as_ref();
        let listed = linux
            .and_then(|linux| linux.namespaces().as_ref())
            .unwrap_or(&empty);
        let mut by_kind = BTreeMap::new();
        for namespace in listed {
            // A number stands for the kind, which has no order of its own.
            if by_kind.insert(namespace.typ() as u32, namespace).is_some() {
                return Err(Failure::invalid(
                    "linux.namespaces",
                    format!("{} is listed twice", namespace.typ()),
                ));
            }
        }
        let mut plan = Self::default();
        for namespace in listed {
            plan.add(namespace)?;
        }
        if plan.clone_flags & libc::CLONE_NEWNS == 0 {
            return Err(Failure::invalid(
                "linux.namespaces",
                "a container needs a mount namespace of its own; add {\"type\":\"mount\"}",
            ));
        }
        let has_user = plan.clone_flags & libc::CLONE_NEWUSER != 0;
        if let Some(linux) = linux {
            plan.ids = IdMaps::new(linux, has_user)?.map(Arc::new);
        }
        let has_uts = by_kind.contains_key(&(LinuxNamespaceType::Uts as u32));
        plan.hostname = uts_name("hostname", spec.hostname().as_deref(), has_uts)?;
        plan.domainname = uts_name("domainname", spec.domainname().as_deref(), has_uts)?;
        if let Some(lines) = &mut plan.new_time {
            let offsets = linux.and_then(|linux| linux.time_offsets().as_ref());
            for (clock, offset) in offsets.into_iter().flatten() {
                if !matches!(clock.as_str(), "monotonic" | "boottime") {
                    return Err(Failure::invalid(
                        "linux.timeOffsets",
                        format!("{clock:?} is neither monotonic nor boottime"),
                    ));
                }
                let seconds = offset.secs().unwrap_or(0);
                let nanos = offset.nanosecs().unwrap_or(0);
                lines.push_str(&format!("{clock} {seconds} {nanos}\n"));
            }
        }
        Ok(plan)
    }

    fn add(&mut self, namespace: &LinuxNamespace) -> Result<(), Failure> {
        let kind = namespace.typ();
        let joined = namespace
            .path()
            .as_ref()
            .is_some_and(|path| !path.as_os_str().is_empty());
        match (kind, joined) {
            (LinuxNamespaceType::Mount, false) => self.clone_flags |= libc::CLONE_NEWNS,
            (LinuxNamespaceType::Pid, false) => self.clone_flags |= libc::CLONE_NEWPID,
            (LinuxNamespaceType::Uts, false) => self.clone_flags |= libc::CLONE_NEWUTS,
            (LinuxNamespaceType::Ipc, false) => self.clone_flags |= libc::CLONE_NEWIPC,
            (LinuxNamespaceType::Network, false) => self.clone_flags |= libc::CLONE_NEWNET,
            (LinuxNamespaceType::Cgroup, false) => self.new_cgroup = true,
            (LinuxNamespaceType::Time, false) => self.new_time = Some(String::new()),
            // The path names a namespace of the host's, which is the pod's network; in the guest
            // that is the network namespace that everything starts in.
            (LinuxNamespaceType::Network, true) => {}
            (LinuxNamespaceType::Pid, true) => {
                let pod = Some(Path::new(POD_PID_NAMESPACE));
                self.join_pid = Some(if namespace.path().as_deref() == pod {
                    JoinedPids::Pod
                } else {
                    JoinedPids::Process(JoinedNamespace::new(namespace)?)
                });
            }
            (LinuxNamespaceType::Ipc | LinuxNamespaceType::Uts, true) => {
                self.join.push(JoinedNamespace::new(namespace)?);
            }
            (LinuxNamespaceType::User, false) => self.clone_flags |= libc::CLONE_NEWUSER,
            (other, true) => {
                return Err(Failure::invalid(
                    "linux.namespaces",
                    format!("a {other} namespace can't be joined; leave its path out"),
                ));
            }
        }
        Ok(())
    }

    /// Whether the container gets a new pid namespace.
    pub fn own_pids(&self) -> bool {
        self.clone_flags & libc::CLONE_NEWPID != 0
    }

    /// Whether the container gets a new network namespace.
    pub fn own_net(&self) -> bool {
        self.clone_flags & libc::CLONE_NEWNET != 0
    }

    /// Whether the container gets a new IPC namespace.
    pub fn own_ipc(&self) -> bool {
        self.clone_flags & libc::CLONE_NEWIPC != 0
    }

    /// In the container's first process: joins and makes what clone couldn't, and sets up what is
    /// inside. It is in the new namespaces `born` and in `spares` already.
    pub fn set_up(&self, born: i32, spares: &Taken) -> Result<(), Failure> {
        let missing = self.clone_flags & !born & !spares.flags();
        if missing != 0 {
            unshare(UnshareFlags::from_bits_retain(missing.cast_unsigned()))
                .context(|| "make the container's namespaces")?;
        }
        for namespace in &self.join {
            namespace.enter()?;
        }
        if self.new_cgroup {
            unshare(UnshareFlags::NEWCGROUP).context(|| "make a cgroup namespace")?;
        }
        if let Some(offsets) = &self.new_time {
            // The process itself moves into it when it executes its program.
            unshare(UnshareFlags::NEWTIME).context(|| "make a time namespace")?;
            if !offsets.is_empty() {
                std::fs::write("/proc/self/timens_offsets", offsets)
                    .context(|| "linux.timeOffsets: set the clocks' offsets")?;
            }
        }
        if self.clone_flags & libc::CLONE_NEWNET & !spares.flags() != 0 {
            bring_loopback_up().context(|| "bring the container's loopback device up")?;
        }
        if let Some(name) = &self.hostname {
            rustix::system::sethostname(name.as_bytes())
                .context(|| format!("set the host name {name:?}"))?;
        }
        if let Some(name) = &self.domainname {
            rustix::system::setdomainname(name.as_bytes())
                .context(|| format!("set the domain name {name:?}"))?;
        }
        Ok(())
    }
}

/// Gives the calling process new namespaces.
pub fn unshare(flags: UnshareFlags) -> rustix::io::Result<()> {
    // SAFETY: only FILES could hurt others, by taking descriptors away from other threads.
    unsafe { rustix::thread::unshare_unsafe(flags) }
}

/// The agent's own pid namespace, to come back to after a child has been made in another one.
pub fn own_pid_namespace() -> Result<OwnedFd, Failure> {
    rustix::fs::openat(
        CWD,
        "/proc/self/ns/pid",
        OFlags::RDONLY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .context(|| "open the agent's own pid namespace")
}

/// Sets IFF_UP of `lo` in the current network namespace; the kernel gives it its addresses.
pub fn bring_loopback_up() -> io::Result<()> {
    let socket = rustix::net::socket_with(
        rustix::net::AddressFamily::INET,
        rustix::net::SocketType::DGRAM,
        rustix::net::SocketFlags::CLOEXEC,
        None,
    )?;
    // SAFETY: ifreq is plain data, for which all zeroes is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = *from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
    // SAFETY: SIOCSIFFLAGS reads an ifreq, which lives across the call.
    if unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn uts_name(field: &str, name: Option<&str>, has_uts: bool) -> Result<Option<String>, Failure> {
    let Some(name) = name.filter(|name| !name.is_empty()) else {
        return Ok(None);
    };
    no_nul(field, name.as_bytes())?;
    if !has_uts {
        return Err(Failure::invalid(
            field,
            "can't be set without a uts namespace; add one to linux.namespaces",
        ));
    }
    if name.len() > MAX_HOSTNAME {
        return Err(Failure::invalid(
            field,
            format!("{} bytes long, the kernel takes {MAX_HOSTNAME}", name.len()),
        ));
    }
    Ok(Some(name.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(namespaces: serde_json::Value) -> Result<NamespacePlan, Failure> {
        let spec = serde_json::json!({"ociVersion": "1.2.0", "linux": {"namespaces": namespaces}});
        NamespacePlan::new(&serde_json::from_value(spec).expect("a spec"))
    }

    #[test]
    fn shares_the_pods_network_and_joins_the_sandboxs_processes() {
        let plan = plan(serde_json::json!([
            {"type": "mount"},
            {"type": "network", "path": "/var/run/netns/cni-1"},
            {"type": "ipc", "path": "/proc/12/ns/ipc"},
            {"type": "pid", "path": "/proc/12/ns/pid"},
            {"type": "cgroup"},
        ]))
        .expect("a plan");
        assert_eq!(plan.clone_flags, libc::CLONE_NEWNS);
        assert!(plan.new_cgroup);
        assert!(plan.join_pid.is_some());
        assert_eq!(plan.join.len(), 1);
    }

    #[test]
    fn knows_the_pods_pid_namespace_by_its_name() {
        let pids = serde_json::json!({"type": "pid", "path": POD_PID_NAMESPACE});
        let plan = plan(serde_json::json!([{"type": "mount"}, pids])).expect("a plan");
        assert_eq!(plan.join_pid, Some(JoinedPids::Pod));
        assert!(!plan.own_pids());
    }

    #[test]
    fn refuses_other_paths() {
        for (kind, path) in [
            ("ipc", "/proc/12/ns/uts"),
            ("ipc", POD_PID_NAMESPACE),
            ("pid", "/run/bulkhead/pod/../pid"),
            ("ipc", "/proc/self/ns/ipc"),
            ("ipc", "/proc/0/ns/ipc"),
            ("uts", "/proc/1/../ns/uts"),
            ("mount", "/proc/12/ns/mnt"),
            ("cgroup", "/proc/12/ns/cgroup"),
        ] {
            let namespaces = serde_json::json!([{"type": kind, "path": path}]);
            assert!(plan(namespaces).is_err(), "{kind} {path}");
        }
    }

    #[test]
    fn writes_time_offsets() {
        let spec = serde_json::json!({"ociVersion": "1.2.0", "linux": {
            "namespaces": [{"type": "mount"}, {"type": "time"}],
            "timeOffsets": {"monotonic": {"secs": 172800, "nanosecs": 5}},
        }});
        let plan = NamespacePlan::new(&serde_json::from_value(spec).expect("a spec"));
        assert_eq!(
            plan.expect("a plan").new_time.as_deref(),
            Some("monotonic 172800 5\n")
        );
    }
}
