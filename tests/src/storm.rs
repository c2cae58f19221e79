//! Storms of execs, and what shim, VMM and agent hold before and after them.

use crate::artifacts::Artifacts;
use crate::error::{Error, Result};
use crate::fifo::ReadFifo;
use crate::footprint::Footprint;
use crate::pod::{member_spec, sandbox_spec};
use crate::shim::{Bundle, Shim, TaskVersion, process};
use containerd_shim_protos::api;
use serde::Serialize;
use serde_json::Value;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

const VERSION: TaskVersion = TaskVersion::V3;
const POD: &str = "storm-pod";
const NO_STREAMS: [&str; 3] = [""; 3];

/// How long what a storm has raised may take to settle: idle threads are kept for a while.
const SETTLE: Duration = Duration::from_secs(90);

/// Run in the guest's own process namespace, where the agent is process 1: prints the number of its
/// descriptors, and what [`Inside`] reads. A process may end while it's looked at.
const LOOK: &str = "set -- /proc/1/fd/*; echo $#; \
    cat /proc/1/status /proc/meminfo /proc/[0-9]*/stat 2>/dev/null; true";

/// Parent of all threads of the kernel's, which come and go as they like.
const KTHREADD: u64 = 2;

/// What is held at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Holdings {
    /// The shim, on the host.
    pub shim: Footprint,
    /// The VMM, on the host; its memory is the guest's too.
    pub vmm: Footprint,
    /// Processes in the guest, zombies and those that count them among them, the kernel's left out.
    pub guest_processes: u64,
    /// Open descriptors of the agent.
    pub agent_descriptors: u64,
    /// KiB of anonymous memory of the agent.
    pub agent_kib: u64,
    /// KiB of memory of the guest's kernel that it can't give back (SUnreclaim).
    pub guest_kernel_kib: u64,
}

impl Holdings {
    /// What must be the same before and after: processes, threads and descriptors everywhere.
    fn countable(&self) -> [u64; 6] {
        [
            self.guest_processes,
            self.agent_descriptors,
            self.shim.threads,
            self.shim.descriptors,
            self.vmm.threads,
            self.vmm.descriptors,
        ]
    }

    /// Which of them there are more of than in `before`, in words.
    pub fn more_than(&self, before: &Self) -> Vec<String> {
        let names = [
            "processes in the guest",
            "descriptors of the agent",
            "threads of the shim",
            "descriptors of the shim",
            "threads of the VMM",
            "descriptors of the VMM",
        ];
        let pairs = before.countable().into_iter().zip(self.countable());
        names
            .into_iter()
            .zip(pairs)
            .filter(|(_, (before, after))| after > before)
            .map(|(name, (before, after))| format!("{name}: {before}, now {after}"))
            .collect()
    }
}

/// The bundles of a pod for storms.
#[derive(Debug)]
pub struct Bundles {
    sandbox: Bundle,
    member: Bundle,
}

impl Bundles {
    /// Makes them; `settings` are further lines of the shim's configuration.
    ///
    /// # Errors
    /// When a file can't be written.
    pub fn new(artifacts: &Artifacts, settings: &str) -> Result<Self> {
        let sandbox = Bundle::new(artifacts, POD, settings)?;
        sandbox.set_spec(&sandbox_spec(POD))?;
        Ok(Self {
            sandbox,
            member: Bundle::new(artifacts, "storm", settings)?,
        })
    }
}

/// A pod with one container that sees all of the guest's processes.
pub struct Pod<'a> {
    sandbox: Shim<'a>,
    member: Shim<'a>,
    bundle: &'a Bundle,
    shim_pid: u32,
    vmm_pid: u32,
    next: AtomicU32,
}

impl<'a> Pod<'a> {
    /// Starts it.
    ///
    /// # Errors
    /// What the shim answers.
    pub fn start(bundles: &'a Bundles) -> Result<Self> {
        let sandbox = bundles.sandbox.start()?;
        let vmm_pid = sandbox.create(VERSION, NO_STREAMS)?.pid;
        sandbox.start_process(VERSION, "")?;
        let request = api::ConnectRequest {
            id: POD.into(),
            ..Default::default()
        };
        let connected: api::ConnectResponse = sandbox.call(VERSION, "Connect", &request)?;
        let mut spec = member_spec(POD, vmm_pid, &["sleep", "1000000"]);
        share_processes(&mut spec);
        bundles.member.set_spec(&spec)?;
        let member = bundles.member.connect(&sandbox.address)?;
        member.create(VERSION, NO_STREAMS)?;
        member.start_process(VERSION, "")?;
        Ok(Self {
            sandbox,
            member,
            bundle: &bundles.member,
            shim_pid: connected.shim_pid,
            vmm_pid,
            next: AtomicU32::new(0),
        })
    }

    fn exec_id(&self) -> String {
        format!("x{}", self.next.fetch_add(1, Ordering::Relaxed))
    }

    /// One exec of `true`, from its beginning to its deletion.
    ///
    /// # Errors
    /// What the shim answers, or another exit code than 0.
    pub fn exec(&self) -> Result<()> {
        self.run(&self.exec_id(), &process(&["true"]), "")
    }

    fn run(&self, id: &str, process: &Value, stdout: &str) -> Result<()> {
        self.member.exec(VERSION, id, process, ["", stdout, ""])?;
        self.member.start_process(VERSION, id)?;
        let status = self.member.wait(VERSION, id)?.exit_status;
        self.member.delete(VERSION, id)?;
        match status {
            0 => Ok(()),
            other => Err(Error::Unexpected(format!("{id} exited with {other}"))),
        }
    }

    /// `count` execs at once.
    ///
    /// # Errors
    /// The first failure of one of them.
    pub fn at_once(&self, count: u32) -> Result<()> {
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..count).map(|_| scope.spawn(|| self.exec())).collect();
            threads.into_iter().try_for_each(|thread| {
                thread
                    .join()
                    .unwrap_or_else(|_| Err(Error::Unexpected("an exec panicked".into())))
            })
        })
    }

    /// What is held now.
    ///
    /// # Errors
    /// When it can't be looked at, inside or outside.
    pub fn holdings(&self) -> Result<Holdings> {
        let id = self.exec_id();
        let out = ReadFifo::make(&self.bundle.beside(&id))?;
        let mut process = process(&["sh", "-c", LOOK]);
        for set in ["bounding", "effective", "permitted"] {
            if let Some(names) = process["capabilities"][set].as_array_mut() {
                // For /proc/1/fd (proc(5)).
                names.push("CAP_SYS_PTRACE".into());
            }
        }
        self.run(&id, &process, &out.path())?;
        let text = out.read(Duration::from_secs(60));
        let inside = Inside::parse(&text)
            .ok_or_else(|| Error::Unexpected(format!("a look at the agent: {text:?}")))?;
        Ok(Holdings {
            shim: Footprint::of(self.shim_pid)?,
            vmm: Footprint::of(self.vmm_pid)?,
            guest_processes: inside.processes,
            agent_descriptors: inside.descriptors,
            agent_kib: inside.agent_kib,
            guest_kernel_kib: inside.kernel_kib,
        })
    }

    /// What is held once nothing that can be counted is more than `before`, or once it has had the
    /// time to be.
    ///
    /// # Errors
    /// As [`Pod::holdings`].
    pub fn settled(&self, before: &Holdings) -> Result<Holdings> {
        let end = Instant::now() + SETTLE;
        loop {
            let now = self.holdings()?;
            if now.more_than(before).is_empty() || Instant::now() > end {
                return Ok(now);
            }
            std::thread::sleep(Duration::from_secs(2));
        }
    }

    /// Ends the pod.
    ///
    /// # Errors
    /// What the shim answers.
    pub fn end(self) -> Result<()> {
        for shim in [&self.member, &self.sandbox] {
            shim.kill(VERSION, "", 9, true)?;
            shim.wait(VERSION, "")?;
            shim.delete(VERSION, "")?;
        }
        self.sandbox.shutdown(VERSION)
    }
}

/// What [`LOOK`] has printed.
#[derive(Debug, PartialEq, Eq)]
struct Inside {
    processes: u64,
    descriptors: u64,
    agent_kib: u64,
    kernel_kib: u64,
}

impl Inside {
    fn parse(text: &str) -> Option<Self> {
        let kib = |name: &str| -> Option<u64> {
            let value = text.lines().find_map(|line| line.strip_prefix(name))?;
            value.trim().strip_suffix(" kB")?.parse().ok()
        };
        Some(Self {
            processes: text.lines().filter(|line| is_process(line)).count() as u64,
            descriptors: text.lines().next()?.parse().ok()?,
            agent_kib: kib("RssAnon:")?,
            kernel_kib: kib("SUnreclaim:")?,
        })
    }
}

/// Whether a line is proc_pid_stat(5) of something else than a thread of the kernel's: pid, name in
/// parentheses, state, parent.
fn is_process(line: &str) -> bool {
    let parsed = || -> Option<(u64, u64)> {
        let (pid, _) = line.split_once(" (")?;
        let (_, rest) = line.rsplit_once(") ")?;
        let parent = rest.split(' ').nth(1)?;
        Some((pid.parse().ok()?, parent.parse().ok()?))
    };
    parsed().is_some_and(|(pid, parent)| pid != KTHREADD && parent != KTHREADD)
}

/// A namespace that isn't listed is inherited from the runtime (OCI runtime spec, config-linux,
/// "Namespaces"): the agent's own.
fn share_processes(spec: &mut Value) {
    if let Some(namespaces) = spec["linux"]["namespaces"].as_array_mut() {
        namespaces.retain(|namespace| namespace["type"] != "pid");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_of_the_kernel_are_no_processes() {
        let text = "24\nName:\tagent\nRssAnon:\t     452 kB\nSUnreclaim:         3156 kB\n\
            1 (agent) S 0 1 1 0\n2 (kthreadd) S 0 0 0 0\n9 (kworker/0:1) I 2 0 0 0\n\
            40 (a) b) Z 1 40 40 0\n";
        let wanted = Inside {
            processes: 2,
            descriptors: 24,
            agent_kib: 452,
            kernel_kib: 3156,
        };
        assert_eq!(Inside::parse(text), Some(wanted));
        assert_eq!(Inside::parse("sh: not found"), None);
    }

    #[test]
    fn what_has_grown_is_named() {
        let before = Holdings {
            shim: Footprint {
                descriptors: 10,
                ..Default::default()
            },
            vmm: Footprint::default(),
            guest_processes: 40,
            agent_descriptors: 20,
            agent_kib: 900,
            guest_kernel_kib: 4000,
        };
        let mut after = before;
        assert!(after.more_than(&before).is_empty());
        after.shim.descriptors = 11;
        after.guest_processes = 39;
        after.agent_kib = 5000;
        let grown = after.more_than(&before);
        assert_eq!(grown, ["descriptors of the shim: 10, now 11"]);
    }
}
