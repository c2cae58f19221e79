//! What a process is to be, from an OCI `process` object.

use super::scheduling::SchedulingPlan;
use crate::capabilities::CapabilityPlan;
use crate::error::Failure;
use crate::spec::{absolute_path, no_nul};
use oci_spec::runtime::{PosixRlimitType, Process};
use rustix::process::{Resource, Rlimit};
use std::ffi::CString;
use std::path::PathBuf;

/// RLIMIT values that mean "no limit".
const INFINITY: u64 = libc::RLIM_INFINITY;

/// Most supplementary groups, NGROUPS_MAX of the kernel.
const MAX_GROUPS: usize = 65_536;

/// A process as it will be executed.
#[derive(Debug, Clone)]
pub struct ProcessPlan {
    /// The executable and its arguments; never empty.
    pub args: Vec<CString>,
    /// `NAME=value` each.
    pub env: Vec<CString>,
    /// Working directory, absolute.
    pub cwd: PathBuf,
    /// It gets a terminal.
    pub terminal: bool,
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Supplementary group ids.
    pub groups: Vec<u32>,
    /// File mode creation mask.
    pub umask: u32,
    /// Capability sets.
    pub capabilities: CapabilityPlan,
    /// Resource limits, in the kernel's terms.
    pub rlimits: Vec<(Resource, Rlimit)>,
    /// No program that it executes can gain privileges.
    pub no_new_privileges: bool,
    /// When and where it runs.
    pub scheduling: SchedulingPlan,
    /// -1000 to 1000.
    pub oom_score_adj: Option<i32>,
}

impl ProcessPlan {
    /// Checks a `process`.
    pub fn new(process: &Process) -> Result<Self, Failure> {
        refuse_unsupported(process)?;
        let args = strings("process.args", process.args().as_ref())?;
        if args.first().is_none_or(|executable| executable.is_empty()) {
            return Err(Failure::invalid(
                "process.args",
                "missing; its first entry is the executable",
            ));
        }
        let user = process.user();
        let groups = user.additional_gids().clone().unwrap_or_default();
        if groups.len() > MAX_GROUPS {
            return Err(Failure::invalid(
                "process.user.additionalGids",
                format!("{} groups, the kernel takes {MAX_GROUPS}", groups.len()),
            ));
        }
        let oom_score_adj = process.oom_score_adj();
        if let Some(score) = oom_score_adj.filter(|score| !(-1000..=1000).contains(score)) {
            return Err(Failure::invalid(
                "process.oomScoreAdj",
                format!("{score} is not in -1000 to 1000"),
            ));
        }
        Ok(Self {
            args,
            env: strings("process.env", process.env().as_ref())?,
            cwd: absolute_path("process.cwd", process.cwd())?.to_owned(),
            terminal: process.terminal().unwrap_or(false),
            uid: user.uid(),
            gid: user.gid(),
            groups,
            umask: user.umask().unwrap_or(0o022) & 0o777,
            capabilities: CapabilityPlan::new(process.capabilities().as_ref())?,
            rlimits: rlimits(process)?,
            no_new_privileges: process.no_new_privileges().unwrap_or(false),
            scheduling: SchedulingPlan::new(process)?,
            oom_score_adj,
        })
    }
}

fn refuse_unsupported(process: &Process) -> Result<(), Failure> {
    let line = process.command_line().as_ref();
    if line.is_some_and(|line| !line.is_empty()) {
        return Err(Failure::invalid(
            "process.commandLine",
            "is for Windows; use process.args",
        ));
    }
    Ok(())
}

fn strings(field: &str, list: Option<&Vec<String>>) -> Result<Vec<CString>, Failure> {
    list.into_iter()
        .flatten()
        .enumerate()
        .map(|(index, text)| {
            no_nul(&format!("{field}[{index}]"), text.as_bytes())?;
            Ok(CString::new(text.as_str()).unwrap_or_default())
        })
        .collect()
}

fn rlimits(process: &Process) -> Result<Vec<(Resource, Rlimit)>, Failure> {
    let mut limits = Vec::new();
    for limit in process.rlimits().iter().flatten() {
        let (kind, soft, hard) = (limit.typ(), limit.soft(), limit.hard());
        let kernel_kind = kernel_rlimit(kind);
        if limits.iter().any(|(other, _)| *other == kernel_kind) {
            return Err(Failure::invalid(
                "process.rlimits",
                format!("{kind} is listed twice"),
            ));
        }
        if soft > hard {
            return Err(Failure::invalid(
                "process.rlimits",
                format!("{kind}: the soft limit {soft} is above the hard limit {hard}"),
            ));
        }
        let finite = |value: u64| (value != INFINITY).then_some(value);
        let values = Rlimit {
            current: finite(soft),
            maximum: finite(hard),
        };
        limits.push((kernel_kind, values));
    }
    Ok(limits)
}

fn kernel_rlimit(kind: PosixRlimitType) -> Resource {
    use PosixRlimitType as Type;
    match kind {
        Type::RlimitCpu => Resource::Cpu,
        Type::RlimitFsize => Resource::Fsize,
        Type::RlimitData => Resource::Data,
        Type::RlimitStack => Resource::Stack,
        Type::RlimitCore => Resource::Core,
        Type::RlimitRss => Resource::Rss,
        Type::RlimitNproc => Resource::Nproc,
        Type::RlimitNofile => Resource::Nofile,
        Type::RlimitMemlock => Resource::Memlock,
        Type::RlimitAs => Resource::As,
        Type::RlimitLocks => Resource::Locks,
        Type::RlimitSigpending => Resource::Sigpending,
        Type::RlimitMsgqueue => Resource::Msgqueue,
        Type::RlimitNice => Resource::Nice,
        Type::RlimitRtprio => Resource::Rtprio,
        Type::RlimitRttime => Resource::Rttime,
    }
}
