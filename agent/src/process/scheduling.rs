//! When and where a process runs: `process.scheduler`, `process.ioPriority`,
//! `process.execCPUAffinity`, and `linux.personality`, which is of the same kind.

use crate::error::Failure;
use crate::syscalls::last_error;
use oci_spec::runtime::{
    IOPriorityClass, LinuxPersonality, LinuxPersonalityDomain, LinuxSchedulerFlag,
    LinuxSchedulerPolicy, Process, Scheduler,
};
use rustix::io::Errno;
use rustix::thread::CpuSet;

/// What `ioprio_set` is about (linux/ioprio.h).
const IOPRIO_WHO_PROCESS: libc::c_int = 1;
const IOPRIO_CLASS_SHIFT: i64 = 13;

/// Execution domains (linux/personality.h).
const PER_LINUX: libc::c_ulong = 0;
const PER_LINUX32: libc::c_ulong = 8;

/// `struct sched_attr` as of its first size, which every kernel takes.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Attributes {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime: u64,
    deadline: u64,
    period: u64,
}

/// All of it; the default changes nothing.
#[derive(Debug, Clone, Default)]
pub struct SchedulingPlan {
    scheduler: Option<Attributes>,
    io_priority: Option<libc::c_int>,
    first_cpus: Option<CpuSet>,
    cpus: Option<CpuSet>,
}

impl SchedulingPlan {
    /// Checks the fields of a `process`.
    pub fn new(process: &Process) -> Result<Self, Failure> {
        let affinity = process.exec_cpu_affinity().as_ref();
        let first = affinity.and_then(|affinity| affinity.initial().as_deref());
        let last = affinity.and_then(|affinity| affinity.cpu_affinity_final().as_deref());
        let io = process.io_priority().as_ref();
        Ok(Self {
            scheduler: process.scheduler().as_ref().map(attributes).transpose()?,
            io_priority: io
                .map(|io| io_priority(io.class(), io.priority()))
                .transpose()?,
            first_cpus: cpus("process.execCPUAffinity.initial", first)?,
            cpus: cpus("process.execCPUAffinity.final", last)?,
        })
    }

    /// As soon as there is a process; only for further ones, says the runtime spec.
    pub fn begin(&self) -> Result<(), Failure> {
        set_cpus("process.execCPUAffinity.initial", self.first_cpus.as_ref())
    }

    /// While the process still has all capabilities.
    pub fn apply(&self) -> Result<(), Failure> {
        if let Some(attributes) = &self.scheduler {
            // SAFETY: the kernel reads a sched_attr of the size that it names itself.
            let set = unsafe {
                libc::syscall(
                    libc::SYS_sched_setattr,
                    0,
                    std::ptr::from_ref(attributes),
                    0,
                )
            };
            checked("process.scheduler", set)?;
        }
        if let Some(priority) = self.io_priority {
            // SAFETY: takes no pointers.
            let set =
                unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, priority) };
            checked("process.ioPriority", set)?;
        }
        Ok(())
    }

    /// For further processes, when they are in the container.
    pub fn finish(&self) -> Result<(), Failure> {
        set_cpus("process.execCPUAffinity.final", self.cpus.as_ref())
    }
}

/// An execution domain of `linux.personality`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Personality(libc::c_ulong);

impl Personality {
    /// Checks it. No flags exist in the runtime spec so far.
    pub fn new(personality: &LinuxPersonality) -> Result<Self, Failure> {
        if personality
            .flags()
            .as_ref()
            .is_some_and(|flags| !flags.is_empty())
        {
            return Err(Failure::invalid(
                "linux.personality.flags",
                "no flag is defined; leave them out",
            ));
        }
        Ok(Self(match personality.domain() {
            LinuxPersonalityDomain::PerLinux => PER_LINUX,
            LinuxPersonalityDomain::PerLinux32 => PER_LINUX32,
        }))
    }

    /// For the calling process and what it executes.
    pub fn apply(self) -> Result<(), Failure> {
        // SAFETY: takes no pointers.
        let set = unsafe { libc::personality(self.0) };
        match set {
            0.. => Ok(()),
            _ => Err(Failure::internal("linux.personality: set it", last_error())),
        }
    }
}

fn attributes(scheduler: &Scheduler) -> Result<Attributes, Failure> {
    use LinuxSchedulerPolicy as Policy;
    let invalid = |reason: String| Err(Failure::invalid("process.scheduler", reason));
    let policy = *scheduler.policy();
    let nice = scheduler.nice().unwrap_or(0);
    if !(-20..=19).contains(&nice) {
        return invalid(format!("nice {nice} is not in -20 to 19"));
    }
    let priority = scheduler.priority().unwrap_or(0);
    let real_time = matches!(policy, Policy::SchedFifo | Policy::SchedRr);
    match u32::try_from(priority) {
        Ok(0) if !real_time => {}
        Ok(1..=99) if real_time => {}
        _ if real_time => return invalid(format!("priority {priority} is not in 1 to 99")),
        _ => return invalid("priority is only for SCHED_FIFO and SCHED_RR".to_owned()),
    }
    let deadline = [
        scheduler.runtime(),
        scheduler.deadline(),
        scheduler.period(),
    ]
    .map(|value| value.unwrap_or(0));
    if policy != Policy::SchedDeadline && deadline != [0; 3] {
        return invalid("runtime, deadline and period are only for SCHED_DEADLINE".to_owned());
    }
    let [runtime, deadline, period] = deadline;
    let mut flags = 0;
    for flag in scheduler.flags().iter().flatten() {
        flags |= flag_bit(*flag);
    }
    Ok(Attributes {
        size: u32::try_from(size_of::<Attributes>()).unwrap_or(0),
        policy: match policy {
            Policy::SchedOther => 0,
            Policy::SchedFifo => 1,
            Policy::SchedRr => 2,
            Policy::SchedBatch => 3,
            // The kernel has the number and not the policy; it refuses it.
            Policy::SchedIso => 4,
            Policy::SchedIdle => 5,
            Policy::SchedDeadline => 6,
        },
        flags,
        nice,
        priority: u32::try_from(priority).unwrap_or(0),
        runtime,
        deadline,
        period,
    })
}

/// `SCHED_FLAG_*` of linux/sched.h.
fn flag_bit(flag: LinuxSchedulerFlag) -> u64 {
    use LinuxSchedulerFlag as Flag;
    match flag {
        Flag::SchedResetOnFork => 0x01,
        Flag::SchedFlagReclaim => 0x02,
        Flag::SchedFlagDLOverrun => 0x04,
        Flag::SchedFlagKeepPolicy => 0x08,
        Flag::SchedFlagKeepParams => 0x10,
        Flag::SchedFlagUtilClampMin => 0x20,
        Flag::SchedFlagUtilClampMax => 0x40,
    }
}

fn io_priority(class: IOPriorityClass, priority: i64) -> Result<libc::c_int, Failure> {
    if !(0..=7).contains(&priority) {
        return Err(Failure::invalid(
            "process.ioPriority.priority",
            format!("{priority} is not in 0 to 7"),
        ));
    }
    let class = match class {
        IOPriorityClass::IoprioClassRt => 1,
        IOPriorityClass::IoprioClassBe => 2,
        IOPriorityClass::IoprioClassIdle => 3,
    };
    let value = class << IOPRIO_CLASS_SHIFT | priority;
    Ok(libc::c_int::try_from(value).unwrap_or(0))
}

/// Reads a list such as `0-3,7`.
fn cpus(field: &str, list: Option<&str>) -> Result<Option<CpuSet>, Failure> {
    let Some(list) = list.filter(|list| !list.is_empty()) else {
        return Ok(None);
    };
    let bad = |part: &str| {
        let most = CpuSet::MAX_CPU - 1;
        Failure::invalid(
            field,
            format!("{part:?} in {list:?} is no CPU or range of CPUs from 0 to {most}"),
        )
    };
    let number = |text: &str| {
        let cpu = text.trim().parse::<usize>().ok();
        cpu.filter(|cpu| *cpu < CpuSet::MAX_CPU)
    };
    let mut set = CpuSet::new();
    for part in list.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        match (number(first), number(last)) {
            (Some(first), Some(last)) if first <= last => {
                (first..=last).for_each(|cpu| set.set(cpu));
            }
            _ => return Err(bad(part)),
        }
    }
    Ok(Some(set))
}

fn set_cpus(field: &str, cpus: Option<&CpuSet>) -> Result<(), Failure> {
    let Some(cpus) = cpus else {
        return Ok(());
    };
    rustix::thread::sched_setaffinity(None, cpus).map_err(|error| match error {
        Errno::INVAL => Failure::invalid(field, "the container may use none of these CPUs"),
        other => Failure::internal(format!("{field}: set it"), other),
    })
}

fn checked(field: &str, result: libc::c_long) -> Result<(), Failure> {
    match (result, last_error()) {
        (0.., _) => Ok(()),
        (_, Errno::INVAL) => Err(Failure::invalid(field, "the guest's kernel refuses it")),
        (_, error) => Err(Failure::internal(format!("{field}: set it"), error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn plan(changes: serde_json::Value) -> Result<SchedulingPlan, Failure> {
        let mut process = json!({"cwd": "/", "args": ["true"], "user": {"uid": 0, "gid": 0}});
        for (key, value) in changes.as_object().expect("an object") {
            process[key] = value.clone();
        }
        SchedulingPlan::new(&serde_json::from_value(process).expect("a process"))
    }

    #[test]
    fn translates_what_the_kernel_knows() {
        let plan = plan(json!({
            "scheduler": {"policy": "SCHED_FIFO", "priority": 7, "flags": ["SCHED_RESET_ON_FORK"]},
            "ioPriority": {"class": "IOPRIO_CLASS_BE", "priority": 3},
            "execCPUAffinity": {"initial": "0", "final": "0-2,5"},
        }))
        .expect("a plan");
        let attributes = plan.scheduler.expect("a policy");
        assert_eq!(
            (attributes.policy, attributes.priority, attributes.flags),
            (1, 7, 1)
        );
        assert_eq!(attributes.size, 48, "SCHED_ATTR_SIZE_VER0");
        assert_eq!(plan.io_priority, Some(2 << 13 | 3));
        let cpus = plan.cpus.expect("CPUs");
        let set: Vec<usize> = (0..8).filter(|cpu| cpus.is_set(*cpu)).collect();
        assert_eq!(set, [0, 1, 2, 5]);
    }

    #[test]
    fn refuses_by_name_what_makes_no_sense() {
        for (changes, field) in [
            (
                json!({"scheduler": {"policy": "SCHED_FIFO"}}),
                "process.scheduler",
            ),
            (
                json!({"scheduler": {"policy": "SCHED_OTHER", "priority": 1}}),
                "process.scheduler",
            ),
            (
                json!({"scheduler": {"policy": "SCHED_OTHER", "nice": 20}}),
                "process.scheduler",
            ),
            (
                json!({"scheduler": {"policy": "SCHED_RR", "priority": 1, "runtime": 5}}),
                "process.scheduler",
            ),
            (
                json!({"ioPriority": {"class": "IOPRIO_CLASS_RT", "priority": 8}}),
                "process.ioPriority",
            ),
        ] {
            let failure = plan(changes.clone()).expect_err("refused");
            assert!(failure.message.starts_with(field), "{changes}: {failure}");
        }
        for list in ["1-0", "x", "99999", "0,,1", "-"] {
            assert!(cpus("f", Some(list)).is_err(), "{list}");
        }
        assert!(cpus("f", Some("")).is_ok_and(|set| set.is_none()));
    }

    proptest! {
        #[test]
        fn never_panics(list in "[0-9,-]{0,12}") {
            let _ = cpus("f", Some(&list));
        }
    }
}
