//! A scenario's own process and mount namespaces.

use super::Need;
use super::report::{self, Totals};
use crate::artifacts::{self, Artifacts};
use crate::containerd::Release;
use crate::docker;
use crate::leaks::Snapshot;
use crate::thin_pool;
use std::io::{BufRead, BufReader};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Where a scenario's temporary files go: below the fresh /run, where an overlay can always be
/// mounted and paths of sockets stay short.
const SCRATCH: &str = "/run/t";

/// Parts of paths that may come and go: what containerd makes with fixed names and never removes,
/// files in which still count.
const FIXED_FOLDERS: [&str; 8] = [
    // mount(8) keeps its notes there.
    "/run/mount",
    "/run/containerd",
    "/run/containerd/s",
    "/run/containerd/fifo",
    "/run/bulkhead",
    "/run/containerd/runc",
    "/run/docker",
    "/run/docker/plugins",
];

/// Why scenarios can't run here.
#[derive(Debug)]
pub struct Obstacles {
    host: Option<String>,
    guest: Option<String>,
    containerd: Option<String>,
    pods: Option<String>,
    taps: Option<String>,
    docker: Option<String>,
    vhost: Option<String>,
    ipvlan: Option<String>,
}

impl Obstacles {
    /// Looks at this host once, and says what it will run on.
    pub fn find() -> Self {
        let host = (!nix::unistd::geteuid().is_root()).then(|| "needs root".to_owned());
        let guest = probe_kvm().err();
        let current = Release::current();
        for release in [Some(Release::debian()), current.clone()]
            .into_iter()
            .flatten()
        {
            let version = release.version().unwrap_or_else(|error| error.to_string());
            println!("containerd under test: {version}");
        }
        let containerd = current.is_none().then(|| {
            "no current containerd beside Debian's: it takes Go's toolchain to build it".to_owned()
        });
        Self {
            host,
            guest,
            containerd,
            pods: probe_pod_network().err(),
            taps: probe_taps().err(),
            vhost: (!std::path::Path::new("/dev/vhost-net").exists())
                .then(|| "no /dev/vhost-net here; see scripts/dev test --svm".to_owned()),
            ipvlan: probe_ipvlan().err(),
            docker: docker::programs()
                .is_none()
                .then(|| "no Docker daemon: it takes Go's toolchain to build it".to_owned()),
        }
    }

    /// The obstacle to a scenario, if there is one.
    pub fn against(&self, needs: Need) -> Option<String> {
        let guest = || self.host.clone().or_else(|| self.guest.clone());
        match needs {
            Need::Host => self.host.clone(),
            Need::Guest => guest(),
            Need::Taps => guest().or_else(|| self.taps.clone()),
            Need::VhostNet => guest()
                .or_else(|| self.taps.clone())
                .or_else(|| self.vhost.clone()),
            Need::CurrentContainerd => guest().or_else(|| self.containerd.clone()),
            Need::ThinPools => guest()
                .or_else(|| self.containerd.clone())
                .or_else(thin_pool::obstacle),
            Need::FileSystemPrograms => {
                guest().or_else(|| match artifacts::file_system_programs() {
                    Some(_) => None,
                    None => Some("pjdfstest and fsx could not be built".into()),
                })
            }
            Need::Pods => guest().or_else(|| self.pods.clone()),
            Need::Docker => guest()
                .or_else(|| self.containerd.clone())
                .or_else(|| self.docker.clone()),
            Need::Ipvlan => guest()
                .or_else(|| self.pods.clone())
                .or_else(|| self.ipvlan.clone()),
            Need::PodsOnCurrentContainerd => guest()
                .or_else(|| self.containerd.clone())
                .or_else(|| self.pods.clone()),
        }
    }
}

/// Whether there are tap devices.
fn probe_taps() -> Result<(), String> {
    let tap = ["--net", "ip", "tuntap", "add", "probe0", "mode", "tap"];
    let output = Command::new("unshare").args(tap).output();
    let output = output.map_err(|error| format!("unshare: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!(
        "this kernel makes no tap device: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    ))
}

/// Whether there are ipvlan interfaces.
fn probe_ipvlan() -> Result<(), String> {
    let script = "ip link add probe0 type veth peer name probe1 && \
        ip link add probe2 link probe0 type ipvlan";
    let output = Command::new("unshare")
        .args(["--net", "sh", "-c", script])
        .output();
    let output = output.map_err(|error| format!("unshare: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!(
        "this kernel makes no ipvlan interface (scripts/dev test --svm has one that does): {}",
        String::from_utf8_lossy(&output.stderr).trim()
    ))
}

/// Whether pods can get a network here: the CNI plugins, and a kernel with veth pairs.
fn probe_pod_network() -> Result<(), String> {
    for plugin in [
        "loopback",
        "ptp",
        "host-local",
        "bridge",
        "macvlan",
        "portmap",
    ] {
        let path = std::path::Path::new(crate::containerd::CNI_PLUGINS).join(plugin);
        if !path.is_file() {
            return Err(format!(
                "{} is missing; install containernetworking-plugins",
                path.display()
            ));
        }
    }
    let pair = ["--net", "ip", "link", "add", "probe0", "type", "veth"];
    let output = Command::new("unshare").args(pair).output();
    let output = output.map_err(|error| format!("unshare: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!(
        "this kernel makes no veth pair for pods: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    ))
}

/// Whether a guest runs here, as the VMM's probe sees it.
fn probe_kvm() -> Result<(), String> {
    let artifacts = Artifacts::find().map_err(|error| error.to_string())?;
    let output = Command::new(artifacts.program("bulkhead-vmm"))
        .arg("--probe")
        .output();
    let output = output.map_err(|error| format!("bulkhead-vmm --probe: {error}"))?;
    if output.status.success() {
        println!("KVM: {}", String::from_utf8_lossy(&output.stdout).trim());
        return Ok(());
    }
    Err(format!(
        "no guest runs here: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    ))
}

/// Runs a scenario in namespaces of its own and passes its output on.
pub fn run(name: &str, limit: Duration) -> Totals {
    let mut totals = Totals::default();
    let began = Instant::now();
    println!("running scenario {name}");
    let exe = std::env::current_exe().unwrap_or_default();
    let spawned = Command::new("unshare")
        .args(["--mount", "--pid", "--fork", "--kill-child", "--mount-proc"])
        .arg(exe)
        .args(["--init", name])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn();
    let mut child = match spawned {
        Ok(child) => child,
        Err(error) => {
            println!("test {name} ... FAILED: unshare: {error}");
            totals.fail(name.to_owned());
            return totals;
        }
    };
    let ended = Arc::new(AtomicBool::new(false));
    let watchdog = {
        let (ended, pid) = (ended.clone(), nix::unistd::Pid::from_raw(child.id() as i32));
        std::thread::spawn(move || {
            while !ended.load(Ordering::Relaxed) && began.elapsed() < limit {
                std::thread::sleep(Duration::from_millis(200));
            }
            if !ended.load(Ordering::Relaxed) {
                let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
            }
        })
    };
    // As they come, so that people see that it goes on; the other lane's lines may come between.
    let mut complete = false;
    let stdout = child.stdout.take().into_iter();
    for line in stdout.flat_map(|stdout| BufReader::new(stdout).lines().map_while(Result::ok)) {
        if line == report::END_MARK {
            complete = true;
        } else if line.starts_with("test ") {
            totals.count_line(&line);
            println!("{line}");
        } else {
            println!("    [{name}] {line}");
        }
    }
    let status = child.wait();
    ended.store(true, Ordering::Relaxed);
    let _ = watchdog.join();
    if !complete {
        let how = status.map_or_else(|error| error.to_string(), |status| status.to_string());
        println!(
            "test {name}::ran to its end ... FAILED ({how} after {:.0} s, limit {} s)",
            began.elapsed().as_secs_f64(),
            limit.as_secs()
        );
        totals.fail(format!("{name}::ran to its end"));
    }
    println!(
        "scenario {name} took {:.1} s",
        began.elapsed().as_secs_f64()
    );
    totals
}

/// Process 1 of a scenario: starts the scenario proper and reaps everything until that has ended.
pub fn init(name: &str) -> ExitCode {
    use nix::errno::Errno;
    use nix::sys::wait::{WaitStatus, wait};
    let exe = std::env::current_exe().unwrap_or_default();
    let spawned = Command::new(exe)
        .args(["--scenario", name])
        .env("TMPDIR", SCRATCH)
        .env(super::SCENARIO_ENV, name)
        .spawn();
    let Ok(child) = spawned else {
        return ExitCode::from(2);
    };
    let child = nix::unistd::Pid::from_raw(child.id() as i32);
    loop {
        match wait() {
            Ok(WaitStatus::Exited(pid, code)) if pid == child => {
                return ExitCode::from(u8::try_from(code).unwrap_or(1));
            }
            Ok(WaitStatus::Signaled(pid, signal, _)) if pid == child => {
                let status = std::process::ExitStatus::from_raw(signal as i32);
                println!("the scenario's process ended: {status}");
                return ExitCode::from(1);
            }
            Ok(_) | Err(Errno::EINTR) => {}
            Err(_) => return ExitCode::from(2),
        }
    }
}

/// A fresh /run for this mount namespace.
///
/// # Panics
/// When it can't be mounted.
pub fn prepare_run() {
    use nix::mount::{MsFlags, mount};
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    if let Err(error) = mount(
        Some("tmpfs"),
        "/run",
        Some("tmpfs"),
        flags,
        Some("mode=755"),
    ) {
        panic!("mount a fresh /run: {error}");
    }
    for folder in [SCRATCH].into_iter().chain(FIXED_FOLDERS) {
        if let Err(error) = std::fs::create_dir_all(folder) {
            panic!("make {folder}: {error}");
        }
    }
}

/// What is here before a scenario.
pub fn snapshot() -> Snapshot {
    Snapshot::take(&[])
}

/// Compares with what was here before a scenario.
///
/// # Panics
/// When something was left.
pub fn assert_nothing_left(before: &Snapshot) {
    before.assert_nothing_added(&[]);
}
