//! What a virtual machine monitor does for its guest, counted from outside and alike for each.

use bulkhead_proto::vmm::KvmKind;
use bulkhead_tests::error::{Context, Error, Result};
use bulkhead_tests::footprint::descendants;
use bulkhead_tests::perf::{Counter, EmulateTracepoint, count_port_exits, count_userspace_exits};
use std::ops::Sub;

/// Attached to a monitor that hasn't begun yet.
pub struct Counters {
    pid: u32,
    helpers: Vec<u32>,
    /// None where KVM runs guest kernel mode natively.
    instructions: Option<Counter>,
    exits: Option<Counter>,
    port_exits: Option<Counter>,
}

/// Counts up to a moment, or between two.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Counts {
    /// Guest kernel instructions.
    pub instructions: Option<u64>,
    /// Returns from KVM to the monitor, but for those of `port_exits`.
    pub exits: Option<u64>,
    /// Those for accesses to ports, where no device is that these benches measure.
    pub port_exits: Option<u64>,
    /// Nanoseconds of CPU time of all threads that run no vCPU, of all processes that the monitor
    /// consists of: of what they do themselves and of what the kernel does for them.
    pub device_ns: u64,
    /// Nanoseconds of CPU time of the threads that run vCPUs.
    pub vcpu_ns: u64,
}

impl Sub for Counts {
    type Output = Self;

    fn sub(self, before: Self) -> Self {
        let less = |now: Option<u64>, before: Option<u64>| Some(now?.saturating_sub(before?));
        Self {
            instructions: less(self.instructions, before.instructions),
            exits: less(self.exits, before.exits),
            port_exits: less(self.port_exits, before.port_exits),
            device_ns: self.device_ns.saturating_sub(before.device_ns),
            vcpu_ns: self.vcpu_ns.saturating_sub(before.vcpu_ns),
        }
    }
}

impl Counters {
    /// Counts in the monitor `pid` and what it starts from now on. CPU time is that of `helpers`,
    /// too: processes that the monitor gives its work to.
    pub fn attach(pid: u32, helpers: &[u32], kvm: KvmKind) -> Self {
        let told = |counter: Result<Counter>, what: &str| match counter {
            Ok(counter) => Some(counter),
            Err(error) => {
                eprintln!("{what} can't be counted here: {error}");
                None
            }
        };
        let instructions = (kvm == KvmKind::Emulated)
            .then(|| EmulateTracepoint::find().and_then(|tracepoint| tracepoint.count(pid)))
            .and_then(|counter| told(counter, "guest instructions"));
        Self {
            pid,
            helpers: helpers.to_vec(),
            instructions,
            exits: told(count_userspace_exits(pid), "exits to user space"),
            port_exits: told(count_port_exits(pid), "exits for ports"),
        }
    }

    /// The counts so far.
    ///
    /// # Errors
    /// When one can't be read.
    pub fn read(&self) -> Result<Counts> {
        let port_exits = self.port_exits.as_ref().map(Counter::read).transpose()?;
        let all_exits = self.exits.as_ref().map(Counter::read).transpose()?;
        let mut counts = Counts {
            instructions: self.instructions.as_ref().map(Counter::read).transpose()?,
            exits: all_exits.map(|all| all.saturating_sub(port_exits.unwrap_or(0))),
            port_exits,
            ..Counts::default()
        };
        counts.vcpu_ns = vcpu_ns(self.pid)?;
        // Threads that have ended count in the process's time.
        counts.device_ns = process_ns(self.pid)?.saturating_sub(counts.vcpu_ns);
        for helper in &self.helpers {
            counts.device_ns += process_ns(*helper)?;
            // It may do its work in a child.
            for child in descendants(*helper)? {
                counts.device_ns += process_ns(child)?;
            }
        }
        Ok(counts)
    }
}

/// CPU time of a process in nanoseconds.
fn process_ns(pid: u32) -> Result<u64> {
    let mut clock: libc::clockid_t = 0;
    // SAFETY: writes a clock's number.
    let found = unsafe { libc::clock_getcpuclockid(pid as libc::pid_t, &raw mut clock) };
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: writes a time; the clock's number is valid if the call before has succeeded.
    if found != 0 || unsafe { libc::clock_gettime(clock, &raw mut time) } != 0 {
        let cause: std::result::Result<u64, _> = Err(std::io::Error::last_os_error());
        return cause.context(|| format!("read the CPU time of process {pid}"));
    }
    Ok(time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64)
}

/// What a thread does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// It runs a vCPU.
    Vcpu,
    /// Anything else.
    Other,
}

/// The threads of a process; those that run vCPUs are known by their names: Bulkhead's, and QEMU's
/// with debug-threads=on.
///
/// # Errors
/// When /proc can't be read.
pub fn threads(pid: u32) -> Result<Vec<(u32, Kind)>> {
    let folder = format!("/proc/{pid}/task");
    let mut threads = Vec::new();
    for task in std::fs::read_dir(&folder).context(|| format!("read {folder}"))? {
        let task = task.context(|| format!("read {folder}"))?;
        // A thread that has just ended is none of a vCPU.
        let name = std::fs::read_to_string(task.path().join("comm")).unwrap_or_default();
        let number: Option<u32> = task.file_name().to_str().and_then(|name| name.parse().ok());
        let kind = match is_vcpu(&name) {
            true => Kind::Vcpu,
            false => Kind::Other,
        };
        threads.extend(number.map(|number| (number, kind)));
    }
    Ok(threads)
}

/// Those of them that run vCPUs.
///
/// # Errors
/// When /proc can't be read.
pub fn vcpu_threads(pid: u32) -> Result<Vec<u32>> {
    let mut all = threads(pid)?;
    all.retain(|(_, kind)| *kind == Kind::Vcpu);
    Ok(all.into_iter().map(|(thread, _)| thread).collect())
}

fn vcpu_ns(pid: u32) -> Result<u64> {
    let mut sum = 0;
    for thread in vcpu_threads(pid)? {
        let path = format!("/proc/{pid}/task/{thread}/schedstat");
        let text = std::fs::read_to_string(&path).context(|| format!("read {path}"))?;
        sum += schedstat_ns(&text).ok_or_else(|| Error::Unexpected(format!("{path}: {text:?}")))?;
    }
    Ok(sum)
}

fn is_vcpu(name: &str) -> bool {
    name.starts_with("vcpu") || name.starts_with("CPU ")
}

/// First field of schedstat: nanoseconds on a CPU.
fn schedstat_ns(text: &str) -> Option<u64> {
    text.split(' ').next()?.parse().ok()
}
