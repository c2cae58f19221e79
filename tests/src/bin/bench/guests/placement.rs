//! Which of the host's CPUs a monitor's threads run on.
//!
//! Left alone, the scheduler keeps a device's thread for a whole run on the CPU of its vCPU, where
//! what it needs is in the caches, or on another one, which sleeps between two requests: the same
//! work takes up to twice the CPU time there, whoever does it. So they are kept apart, with all
//! monitors alike.

use super::counters::{Kind, threads};
use bulkhead_tests::error::{Context, Result};
use bulkhead_tests::footprint::descendants;
use nix::errno::Errno;
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

/// The CPUs of vCPUs, and those of all other threads.
#[derive(Debug, Clone)]
pub struct Placement {
    vcpus: CpuSet,
    others: CpuSet,
}

impl Placement {
    /// The last CPU is for all that is no vCPU. None where the vCPUs would share the rest: then the
    /// scheduler decides.
    ///
    /// # Errors
    /// When this process's CPUs can't be asked for.
    pub fn of_host(vcpus: u8) -> Result<Option<Self>> {
        let allowed = sched_getaffinity(Pid::from_raw(0)).context(|| "ask for our CPUs".into())?;
        let cpus: Vec<usize> = (0..CpuSet::count())
            .filter(|cpu| allowed.is_set(*cpu).unwrap_or(false))
            .collect();
        let Some((last, rest)) = cpus.split_last() else {
            return Ok(None);
        };
        if rest.len() < usize::from(vcpus) {
            return Ok(None);
        }
        Ok(Some(Self {
            vcpus: set_of(rest)?,
            others: set_of(&[*last])?,
        }))
    }

    /// Puts a monitor's threads and those of its helpers there; what they start later follows.
    ///
    /// # Errors
    /// When a thread that there is can't be moved.
    pub fn apply(&self, monitor: u32, helpers: &[u32]) -> Result<()> {
        self.put(monitor)?;
        for helper in helpers {
            self.put(*helper)?;
            for child in descendants(*helper)? {
                self.put(child)?;
            }
        }
        Ok(())
    }

    /// The same for a single process.
    ///
    /// # Errors
    /// As [`Placement::apply`].
    pub fn put(&self, process: u32) -> Result<()> {
        for (thread, kind) in threads(process)? {
            move_to(thread, self.cpus(kind))?;
        }
        Ok(())
    }

    /// Puts this process to the vCPUs: it looks a thousand times a second whether they are done, and
    /// must not keep awake what waits for them.
    ///
    /// # Errors
    /// As [`Placement::apply`].
    pub fn put_ourselves(&self) -> Result<()> {
        for (thread, _) in threads(std::process::id())? {
            move_to(thread, self.cpus(Kind::Vcpu))?;
        }
        Ok(())
    }

    fn cpus(&self, kind: Kind) -> &CpuSet {
        match kind {
            Kind::Vcpu => &self.vcpus,
            Kind::Other => &self.others,
        }
    }
}

fn move_to(thread: u32, cpus: &CpuSet) -> Result<()> {
    match sched_setaffinity(Pid::from_raw(thread as i32), cpus) {
        // It has ended meanwhile.
        Ok(()) | Err(Errno::ESRCH) => Ok(()),
        Err(error) => Err(error).context(|| format!("move thread {thread}")),
    }
}

/// What a report says of it.
pub fn note(placement: Option<&Placement>) -> String {
    match placement {
        Some(_) => {
            "Threads: those that run vCPUs are kept off the host's last CPU, all others of a \
             monitor's, and the server that a guest talks to, on it, with both monitors alike."
        }
        None => {
            "Threads: the host has no CPU to spare for what runs no vCPU, so where a thread runs \
             is up to its scheduler, which makes CPU times differ by up to a factor of two."
        }
    }
    .to_owned()
}

fn set_of(cpus: &[usize]) -> Result<CpuSet> {
    let mut set = CpuSet::new();
    for cpu in cpus {
        set.set(*cpu).context(|| format!("name CPU {cpu}"))?;
    }
    Ok(set)
}
