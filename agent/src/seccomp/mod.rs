//! `linux.seccomp`: from the rules of a spec to a filter in the kernel.
//!
//! The rules mean what they mean to runc and libseccomp:
//! * A system call that no rule names gets the default action; so does one whose rules' conditions
//!   all fail. Names that no listed architecture knows are passed over.
//! * A rule's conditions must all hold. If two of them are about the same argument, each makes a
//!   rule of its own, as specs for libseccomp rely on.
//! * Calls of an architecture that isn't listed kill the thread. The native one is always listed.
//! * When the default is to refuse, system calls that are newer than all that the spec names are
//!   answered with ENOSYS, so that programs fall back to older ones.

mod names;
mod program;

use crate::error::Failure;
use crate::syscalls::last_error;
use names::Abi;
use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompFilterFlag,
    LinuxSeccompOperator, LinuxSyscall,
};
use program::{Comparison, Condition, Instruction, Outcome, Section};
use std::collections::BTreeMap;

/// Most instructions that the kernel takes (`BPF_MAXINSNS`).
const MAX_INSTRUCTIONS: usize = 4096;

/// Largest error number that the kernel passes on (`MAX_ERRNO`).
const MAX_ERRNO: u32 = 4095;

/// Arguments of a system call.
const ARGUMENTS: usize = 6;

const SECCOMP_SET_MODE_FILTER: libc::c_uint = 1;
const SECCOMP_FILTER_FLAG_LOG: u32 = 1 << 1;
const SECCOMP_FILTER_FLAG_SPEC_ALLOW: u32 = 1 << 2;

/// A filter, ready to be loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Filter {
    program: Vec<Instruction>,
    flags: u32,
}

impl Filter {
    /// Checks and translates `linux.seccomp`.
    pub fn new(seccomp: &LinuxSeccomp) -> Result<Self, Failure> {
        if seccomp.listener_path().is_some() {
            return Err(no_notifications("linux.seccomp.listenerPath"));
        }
        let default = action(
            "linux.seccomp.defaultAction",
            seccomp.default_action(),
            seccomp.default_errno_ret(),
        )?;
        let mut flags = 0;
        for flag in seccomp.flags().iter().flatten() {
            flags |= match flag {
                LinuxSeccompFilterFlag::SeccompFilterFlagLog => SECCOMP_FILTER_FLAG_LOG,
                LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow => {
                    SECCOMP_FILTER_FLAG_SPEC_ALLOW
                }
                // A new process has one thread, and nothing waits for a notification.
                LinuxSeccompFilterFlag::SeccompFilterFlagTsync
                | LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv => 0,
            };
        }
        let rules = rules(seccomp.syscalls().as_deref().unwrap_or_default(), default)?;
        let mut sections = vec![section(Abi::X86_64, &rules, default)];
        let listed = seccomp.architectures().as_deref().unwrap_or_default();
        for (arch, abi) in [(Arch::ScmpArchX32, Abi::X32), (Arch::ScmpArchX86, Abi::X86)] {
            if listed.contains(&arch) {
                sections.push(section(abi, &rules, default));
            }
        }
        let program = program::assemble(&sections);
        if program.len() > MAX_INSTRUCTIONS {
            return Err(Failure::invalid(
                "linux.seccomp.syscalls",
                format!(
                    "the rules make a filter of {} instructions; the kernel takes {MAX_INSTRUCTIONS}",
                    program.len()
                ),
            ));
        }
        Ok(Self { program, flags })
    }

    /// Puts it on the calling process for good. Needs either no_new_privs or CAP_SYS_ADMIN.
    pub fn load(&self) -> Result<(), Failure> {
        let program = libc::sock_fprog {
            len: u16::try_from(self.program.len()).unwrap_or(0),
            filter: self.program.as_ptr().cast_mut().cast(),
        };
        // SAFETY: the kernel only reads the program, whose instructions are laid out as
        // sock_filter, have the given number, and live across the call.
        let loaded = unsafe {
            libc::syscall(
                libc::SYS_seccomp,
                SECCOMP_SET_MODE_FILTER,
                self.flags,
                &raw const program,
            )
        };
        match loaded {
            0 => Ok(()),
            _ => Err(Failure::internal(
                "linux.seccomp: load the filter",
                last_error(),
            )),
        }
    }
}

/// A rule for every system call that it names.
#[derive(Debug, Clone)]
struct Rule<'a> {
    names: &'a [String],
    alternatives: Vec<Vec<Condition>>,
    action: u32,
}

fn rules(list: &[LinuxSyscall], default: u32) -> Result<Vec<Rule<'_>>, Failure> {
    let mut rules = Vec::new();
    for (index, entry) in list.iter().enumerate() {
        let field = format!("linux.seccomp.syscalls[{index}]");
        let action = action(&field, entry.action(), entry.errno_ret())?;
        if entry.names().is_empty() {
            return Err(Failure::invalid(&field, "names is empty"));
        }
        let conditions = entry
            .args()
            .iter()
            .flatten()
            .map(|argument| condition(&field, argument))
            .collect::<Result<Vec<_>, _>>()?;
        // It changes nothing, but its names still count as known.
        let alternatives = match action == default {
            true => Vec::new(),
            false => alternatives(conditions),
        };
        rules.push(Rule {
            names: entry.names(),
            alternatives,
            action,
        });
    }
    Ok(rules)
}

fn alternatives(conditions: Vec<Condition>) -> Vec<Vec<Condition>> {
    let repeated = conditions.iter().enumerate().any(|(index, condition)| {
        conditions
            .iter()
            .skip(index + 1)
            .any(|other| other.argument == condition.argument)
    });
    if repeated {
        conditions.into_iter().map(|one| vec![one]).collect()
    } else {
        vec![conditions]
    }
}

fn condition(field: &str, argument: &LinuxSeccompArg) -> Result<Condition, Failure> {
    use LinuxSeccompOperator as Operator;
    let index = argument.index();
    let argument_index = u8::try_from(index)
        .ok()
        .filter(|index| usize::from(*index) < ARGUMENTS)
        .ok_or_else(|| {
            Failure::invalid(
                field,
                format!("there is no argument {index}; they are numbered 0 to 5"),
            )
        })?;
    let value = argument.value();
    let comparison = match argument.op() {
        Operator::ScmpCmpNe => Comparison::Unequal(value),
        Operator::ScmpCmpLt => Comparison::Less(value),
        Operator::ScmpCmpLe => Comparison::LessOrEqual(value),
        Operator::ScmpCmpEq => Comparison::Equal(value),
        Operator::ScmpCmpGe => Comparison::GreaterOrEqual(value),
        Operator::ScmpCmpGt => Comparison::Greater(value),
        Operator::ScmpCmpMaskedEq => Comparison::Masked {
            mask: value,
            value: argument.value_two().unwrap_or(0),
        },
    };
    Ok(Condition {
        argument: argument_index,
        comparison,
    })
}

/// The kernel's number for an action.
fn action(field: &str, action: LinuxSeccompAction, errno: Option<u32>) -> Result<u32, Failure> {
    use LinuxSeccompAction as Action;
    let with_errno = matches!(action, Action::ScmpActErrno | Action::ScmpActTrace);
    match errno {
        Some(errno) if errno > MAX_ERRNO => Err(Failure::invalid(
            field,
            format!("{errno} is no error number; the largest is {MAX_ERRNO}"),
        )),
        Some(_) if !with_errno => Err(Failure::invalid(
            field,
            format!("{action} returns no error number; leave errnoRet out"),
        )),
        _ if action == Action::ScmpActNotify => Err(no_notifications(field)),
        errno => Ok(action.as_u32(errno)),
    }
}

fn no_notifications(field: &str) -> Failure {
    Failure::invalid(
        field,
        "SCMP_ACT_NOTIFY needs a process beside the container that decides, which the guest doesn't have; use another action",
    )
}

/// What happens to each system call of one ABI.
fn section(abi: Abi, rules: &[Rule<'_>], default: u32) -> Section {
    let mut calls: BTreeMap<u32, Outcome> = BTreeMap::new();
    let mut newest = None;
    for rule in rules {
        for number in rule.names.iter().filter_map(|name| abi.number(name)) {
            newest = newest.max(Some(number));
            if rule.alternatives.is_empty() {
                continue;
            }
            let outcome = calls.entry(number).or_insert_with(|| Outcome {
                rules: Vec::new(),
                action: None,
            });
            for alternative in &rule.alternatives {
                if alternative.is_empty() {
                    // Of several without a condition the first one counts.
                    outcome.action.get_or_insert(rule.action);
                } else {
                    outcome.rules.push((alternative.clone(), rule.action));
                }
            }
        }
    }
    Section {
        abi,
        calls,
        default,
        beyond: newest.filter(|_| refuses(default)),
    }
}

/// Whether this default action keeps programs from calling what the spec doesn't know.
fn refuses(default: u32) -> bool {
    let kind = default & libc::SECCOMP_RET_ACTION_FULL;
    let not_found = libc::SECCOMP_RET_ERRNO | libc::ENOSYS.cast_unsigned();
    !matches!(
        kind,
        libc::SECCOMP_RET_ALLOW | libc::SECCOMP_RET_LOG | libc::SECCOMP_RET_TRACE
    ) && default != not_found
}

#[cfg(test)]
mod tests;
