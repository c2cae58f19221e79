//! What the figures were measured on.

use bulkhead_proto::vmm::KvmKind;
use bulkhead_tests::Artifacts;
use bulkhead_tests::error::{Context, Error, Result};
use serde::{Deserialize, Serialize};
use std::process::Command;

/// Facts of the machine and of the programs that were compared.
#[derive(Debug, Clone, Serialize)]
pub struct Machine {
    /// As /proc/cpuinfo names it.
    pub processor: String,
    /// Online processors.
    pub processors: usize,
    /// MemTotal.
    pub memory_mib: u64,
    /// The host's kernel.
    pub host_kernel: String,
    /// Processes that wanted to run in the minute before the measurement, on average: on a machine
    /// that was busy with something else, times are too long.
    pub load_before: f64,
    /// QEMU's version, if it was there.
    pub qemu: Option<String>,
    /// runc's version, if it was there.
    pub runc: Option<String>,
    /// Bulkhead's.
    pub bulkhead: &'static str,
    /// Bytes of the guest kernel.
    pub kernel_bytes: u64,
    /// Bytes of the guest root image.
    pub rootfs_bytes: u64,
}

/// What `bulkhead-vmm --probe` prints, as far as it's needed.
#[derive(Deserialize)]
struct Findings {
    kvm: KvmKind,
}

impl Machine {
    /// Looks.
    ///
    /// # Errors
    /// When a file of the build can't be looked at.
    pub fn look(artifacts: &Artifacts) -> Result<Self> {
        let size = |path: std::path::PathBuf| {
            let metadata = std::fs::metadata(&path).context(|| format!("stat {}", path.display()));
            metadata.map(|metadata| metadata.len())
        };
        Ok(Self {
            processor: field("/proc/cpuinfo", "model name").unwrap_or_else(|| "unknown".into()),
            processors: std::thread::available_parallelism().map_or(1, usize::from),
            memory_mib: memory_kib("MemTotal").unwrap_or(0) / 1024,
            host_kernel: read("/proc/sys/kernel/osrelease"),
            load_before: read("/proc/loadavg")
                .split(' ')
                .next()
                .and_then(|load| load.parse().ok())
                .unwrap_or(0.0),
            qemu: version(crate::start::qemu::PROGRAM, |text| {
                text.split("version ").nth(1)?.split_whitespace().next()
            }),
            runc: version(crate::start::runc::PROGRAM, |text| {
                text.lines().next()?.strip_prefix("runc version ")
            }),
            bulkhead: env!("CARGO_PKG_VERSION"),
            kernel_bytes: size(artifacts.kernel())?,
            rootfs_bytes: size(artifacts.rootfs())?,
        })
    }

    /// In one line, for people.
    pub fn line(&self) -> String {
        format!(
            "{} x {}, {} MiB, Linux {}, load {} before; QEMU {}, runc {}",
            self.processors,
            self.processor,
            self.memory_mib,
            self.host_kernel,
            self.load_before,
            self.qemu.as_deref().unwrap_or("missing"),
            self.runc.as_deref().unwrap_or("missing"),
        )
    }
}

/// How this host's KVM runs guest kernel mode.
///
/// # Errors
/// When no guest runs here.
pub fn kvm_kind(artifacts: &Artifacts) -> Result<KvmKind> {
    let program = artifacts.program("bulkhead-vmm");
    let output = Command::new(&program).arg("--probe").output();
    let output = output.context(|| format!("run {} --probe", program.display()))?;
    serde_json::from_slice(&output.stdout)
        .map(|findings: Findings| findings.kvm)
        .map_err(|_| {
            let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            Error::Unexpected(format!("no guest runs on this host: {said}"))
        })
}

/// A line of /proc/meminfo, in KiB.
pub fn memory_kib(name: &str) -> Option<u64> {
    let value = field("/proc/meminfo", name)?;
    value.strip_suffix(" kB")?.trim().parse().ok()
}

fn read(path: &str) -> String {
    std::fs::read_to_string(path)
        .unwrap_or_default()
        .trim()
        .to_owned()
}

fn field(path: &str, name: &str) -> Option<String> {
    read(path).lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key.trim() == name).then(|| value.trim().to_owned())
    })
}

fn version(program: &str, pick: fn(&str) -> Option<&str>) -> Option<String> {
    let output = Command::new(program).arg("--version").output().ok()?;
    pick(&String::from_utf8_lossy(&output.stdout)).map(str::to_owned)
}
