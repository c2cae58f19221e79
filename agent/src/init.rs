//! What the agent makes of a bare guest: file systems, the loopback device, the virtio-fs share.
//!
//! Before the agent is ready only descriptors and sockets exist. Everything here that costs mounts
//! is done by [`Guest::prepare`], right after the host has been told that the agent listens, so
//! that it runs while the host is still busy with the first request.

use crate::cgroups::Hierarchy;
use crate::error::{Context, Failure, Kind};
use crate::generation::Generation;
use crate::log;
use crate::namespaces;
use crate::slots::Slots;
use bulkhead_proto::guest::{EMULATED_SWITCH, SHARE_MOUNT, SHARE_TAG, STORAGE_MOUNT, TCP_SEGMENTS};
use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, MountPropagationFlags};
use rustix::process::{Resource, Rlimit};
use std::ffi::CString;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock};

/// Descriptors that the agent may have, and a process once it has asked.
const MAX_DESCRIPTORS: u64 = 524_288;

/// Descriptors that a process may have before it asks for more.
const FIRST_DESCRIPTORS: u64 = 1024;

/// Where the agent runs.
#[derive(Debug, Clone)]
pub enum Surroundings {
    /// As PID 1 of a guest: vsock, its own mounts.
    Guest,
    /// Outside a guest, for tests: Unix sockets in `sockets`, no mounts, and containers' cgroups
    /// below `cgroup` if one is given. Limits whose controller is missing there are left out.
    Outside {
        /// Folder of `agent.sock` and `stream.sock`.
        sockets: PathBuf,
        /// An existing cgroup v2 folder.
        cgroup: Option<PathBuf>,
    },
}

impl Surroundings {
    /// The folder below which file systems are mounted for containers.
    pub fn storage(&self) -> PathBuf {
        match self {
            Self::Guest => STORAGE_MOUNT.into(),
            Self::Outside { sockets, .. } => sockets.join("storage"),
        }
    }
}

/// Makes sure that descriptors 0 to 2 are open, so that no socket ever gets one of these numbers
/// (without a console the kernel starts PID 1 with none), and returns /dev/null.
pub fn standard_descriptors() -> rustix::io::Result<OwnedFd> {
    loop {
        let opened = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty());
        let null = match opened {
            Ok(null) => null,
            // A kernel that doesn't mount devtmpfs by itself.
            Err(Errno::NOENT) if rustix::process::getpid().is_init() => {
                mount("devtmpfs", "/dev", "devtmpfs", MountFlags::NOSUID, None)?;
                continue;
            }
            Err(error) => return Err(error),
        };
        if null.as_raw_fd() > 2 {
            return Ok(null);
        }
        std::mem::forget(null);
    }
}

/// The kernel gives PID 1 only 1024 descriptors, and every process with three streams takes seven.
/// Processes get the values that systemd gives to services, unless their spec sets others: few at
/// first, because old programs use select(2), and many for those that ask. Outside of a guest the
/// agent takes as many as whoever started it allows.
pub fn raise_descriptor_limit(surroundings: &Surroundings) -> rustix::io::Result<()> {
    let maximum = match surroundings {
        Surroundings::Guest => Some(MAX_DESCRIPTORS),
        Surroundings::Outside { .. } => rustix::process::getrlimit(Resource::Nofile).maximum,
    };
    let limit = Rlimit {
        current: maximum,
        maximum,
    };
    rustix::process::setrlimit(Resource::Nofile, limit)
}

/// In a process whose spec sets no RLIMIT_NOFILE.
pub fn lower_descriptor_limit() -> rustix::io::Result<()> {
    let maximum = rustix::process::getrlimit(Resource::Nofile).maximum;
    let limit = Rlimit {
        current: Some(FIRST_DESCRIPTORS.min(maximum.unwrap_or(FIRST_DESCRIPTORS))),
        maximum,
    };
    rustix::process::setrlimit(Resource::Nofile, limit)
}

/// How often the kernel adds up statistics of memory, in seconds, and the file that takes it
/// (Documentation/admin-guide/sysctl/vm.rst, stat_interval). At its default of one second an idle guest
/// never sleeps longer: the look wakes a kernel thread, the scheduler's timer for that thread wakes the
/// CPU a second later, and as the CPU is awake it looks again. Much longer it must not be either: it is
/// then, too, that a CPU's lists of free pages shrink, which the host can only have back afterwards.
const STATISTICS_INTERVAL: (&str, &str) = ("/proc/sys/vm/stat_interval", "5");

/// See [`TCP_SEGMENTS`].
fn send_large_frames() -> std::io::Result<()> {
    let words = std::fs::read_to_string("/proc/cmdline")?;
    if !words.split_whitespace().any(|word| word == EMULATED_SWITCH) {
        return Ok(());
    }
    let (file, number) = TCP_SEGMENTS;
    std::fs::write(file, number)
}

/// A host that closes a stream must not end the agent.
pub fn ignore_broken_pipes() {
    // SAFETY: SIG_IGN runs no code of ours.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
}

/// Outside of a guest: whoever started the agent may have had it ignore signals, as a shell does
/// with SIGINT for what it runs in the background. Containers would inherit that; PID 1 of a guest
/// starts with none ignored.
pub fn take_default_signals() {
    for signal in [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT, libc::SIGTERM] {
        // SAFETY: SIG_DFL runs no code of ours.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
}

/// Outside of a guest: orphans of containers become the agent's children, as they do with PID 1.
pub fn adopt_orphans() -> rustix::io::Result<()> {
    rustix::process::set_child_subreaper(Some(rustix::process::getpid()))
}

/// The guest: its mounts and its identity.
#[derive(Debug)]
pub struct Guest {
    surroundings: Surroundings,
    cgroups: OnceLock<Hierarchy>,
    shared: Mutex<bool>,
    generation: Generation,
}

impl Guest {
    /// Nothing is mounted yet.
    pub fn new(surroundings: Surroundings) -> Self {
        Self {
            surroundings,
            cgroups: OnceLock::new(),
            shared: Mutex::new(false),
            generation: Generation::default(),
        }
    }

    /// Where this is.
    pub fn surroundings(&self) -> &Surroundings {
        &self.surroundings
    }

    /// Its spare slots; fails outside of a guest, and as long as sysfs can't be mounted.
    pub fn slots(&self) -> Result<Slots, Failure> {
        if matches!(self.surroundings, Surroundings::Outside { .. }) {
            let message = "the agent runs outside of a guest: there are no slots for devices";
            return Err(Failure::new(Kind::FailedPrecondition, message));
        }
        self.prepare()?;
        Ok(Slots::default())
    }

    /// Its identity.
    pub fn generation(&self) -> &Generation {
        &self.generation
    }

    /// Mounts what containers need, once; fails as long as the virtio-fs share can't be mounted,
    /// and can be called again.
    pub fn prepare(&self) -> Result<&Hierarchy, Failure> {
        let hierarchy = match self.cgroups.get() {
            Some(hierarchy) => hierarchy,
            None => {
                let hierarchy = self.mount_own()?;
                self.cgroups.get_or_init(|| hierarchy)
            }
        };
        self.mount_share()?;
        Ok(hierarchy)
    }

    /// Ends the guest, or the agent when it runs outside of one.
    pub fn switch_off(&self) -> rustix::io::Result<()> {
        match self.surroundings {
            // A reset, which the kernel does through the port that the VMM listens on; a guest
            // without ACPI has no other way to switch itself off.
            Surroundings::Guest => rustix::system::reboot(rustix::system::RebootCommand::Restart),
            Surroundings::Outside { .. } => std::process::exit(0),
        }
    }

    fn mount_own(&self) -> Result<Hierarchy, Failure> {
        let root = match &self.surroundings {
            Surroundings::Outside { cgroup: None, .. } => return Ok(Hierarchy::absent()),
            Surroundings::Outside {
                cgroup: Some(root), ..
            } => return Ok(Hierarchy::tolerant(root.clone())),
            Surroundings::Guest => Path::new("/sys/fs/cgroup"),
        };
        let hardened = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
        let table = [
            ("proc", "/proc", "proc", hardened, None),
            ("sysfs", "/sys", "sysfs", hardened, None),
            ("devtmpfs", "/dev", "devtmpfs", MountFlags::NOSUID, None),
            (
                "tmpfs",
                "/run",
                "tmpfs",
                MountFlags::NOSUID | MountFlags::NODEV,
                Some("mode=755"),
            ),
            (
                "tmpfs",
                "/tmp",
                "tmpfs",
                MountFlags::NOSUID | MountFlags::NODEV,
                None,
            ),
            ("cgroup2", "/sys/fs/cgroup", "cgroup2", hardened, None),
        ];
        for (source, target, kind, flags, data) in table {
            match mount(source, target, kind, flags, data) {
                // Mounted by the kernel (CONFIG_DEVTMPFS_MOUNT), or by an earlier, failed try.
                Ok(()) | Err(Errno::BUSY) => {}
                Err(error) => {
                    return Err(Failure::internal(
                        format!("mount {kind} on {target} in the guest"),
                        error,
                    ));
                }
            }
        }
        if let Err(error) = send_large_frames() {
            // It's slower without.
            log::error(format!("set {}: {error}", TCP_SEGMENTS.0));
        }
        let (file, seconds) = STATISTICS_INTERVAL;
        if let Err(error) = std::fs::write(file, seconds) {
            // An idle guest takes more of the CPU.
            log::error(format!("set {file}: {error}"));
        }
        // What is mounted later also shows up in the mount namespaces that are made ahead.
        let shared = MountPropagationFlags::SHARED | MountPropagationFlags::REC;
        rustix::mount::mount_change("/", shared).context(|| "share the guest's mounts")?;
        namespaces::bring_loopback_up().context(|| "bring the guest's loopback device up")?;
        Hierarchy::open(root.to_owned())
    }

    fn mount_share(&self) -> Result<(), Failure> {
        if !matches!(self.surroundings, Surroundings::Guest) {
            return Ok(());
        }
        let mut shared = self.shared.lock().unwrap_or_else(|e| e.into_inner());
        if *shared {
            return Ok(());
        }
        let mut path = PathBuf::from("/run");
        for part in Path::new(SHARE_MOUNT)
            .strip_prefix("/run")
            .unwrap_or(Path::new(SHARE_MOUNT))
        {
            path.push(part);
            match rustix::fs::mkdirat(CWD, &path, Mode::from_raw_mode(0o700)) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(error) => {
                    return Err(Failure::internal(
                        format!("create {} in the guest", path.display()),
                        error,
                    ));
                }
            }
        }
        mount(
            SHARE_TAG,
            SHARE_MOUNT,
            "virtiofs",
            MountFlags::empty(),
            None,
        )
        .context(|| {
            format!("mount the virtio-fs share with tag {SHARE_TAG:?} on {SHARE_MOUNT} in the guest (does the VM have a share?)")
        })?;
        *shared = true;
        Ok(())
    }
}

fn mount(
    source: &str,
    target: &str,
    kind: &str,
    flags: MountFlags,
    data: Option<&str>,
) -> rustix::io::Result<()> {
    let data = data.map(|data| CString::new(data).unwrap_or_default());
    rustix::mount::mount(source, target, kind, flags, data.as_deref())
}
