//! Which devices a container may use: `linux.resources.devices` as a BPF program, since cgroup v2
//! has no files for it.
//!
//! The rules are applied in their order, later ones over earlier ones, to each kind of access by
//! itself. What no rule speaks of is denied. As with runc, the devices that every container has are
//! allowed at the end, whatever the spec says, and so is making nodes: a node alone is of no use.

use crate::error::Failure;
use crate::syscalls::last_error;
use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType};
use rustix::io::Errno;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// Bits of access (`BPF_DEVCG_ACC_*`, linux/bpf.h).
const MKNOD: u8 = 1;
const READ: u8 = 2;
const WRITE: u8 = 4;
const ALL: u8 = MKNOD | READ | WRITE;

/// Kinds of device (`BPF_DEVCG_DEV_*`).
const BLOCK: i32 = 1;
const CHARACTER: i32 = 2;

/// Most rules of one container; a program for as many is far below the kernel's limits.
const MAX_RULES: usize = 4096;

/// One rule; `None` stands for any.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Rule {
    allow: bool,
    kind: Option<i32>,
    major: Option<u32>,
    minor: Option<u32>,
    access: u8,
}

impl Rule {
    const fn allow(kind: i32, major: Option<u32>, minor: Option<u32>, access: u8) -> Self {
        Self {
            allow: true,
            kind: Some(kind),
            major,
            minor,
            access,
        }
    }

    /// Applies to every access to every device.
    fn is_total(&self) -> bool {
        (self.kind, self.major, self.minor, self.access) == (None, None, None, ALL)
    }
}

/// Allowed in every container: null, zero, full, random, urandom, tty, console, ptmx, and the
/// slaves of pseudo-terminals.
const DEFAULT: [Rule; 11] = [
    Rule::allow(CHARACTER, None, None, MKNOD),
    Rule::allow(BLOCK, None, None, MKNOD),
    Rule::allow(CHARACTER, Some(1), Some(3), ALL),
    Rule::allow(CHARACTER, Some(1), Some(5), ALL),
    Rule::allow(CHARACTER, Some(1), Some(7), ALL),
    Rule::allow(CHARACTER, Some(1), Some(8), ALL),
    Rule::allow(CHARACTER, Some(1), Some(9), ALL),
    Rule::allow(CHARACTER, Some(5), Some(0), ALL),
    Rule::allow(CHARACTER, Some(5), Some(1), ALL),
    Rule::allow(CHARACTER, Some(5), Some(2), ALL),
    Rule::allow(CHARACTER, Some(136), None, ALL),
];

/// The devices of a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceRules {
    /// Those that can still have an effect, the last one first.
    rules: Vec<Rule>,
}

impl Default for DeviceRules {
    fn default() -> Self {
        Self::of(Vec::new())
    }
}

impl DeviceRules {
    /// Checks `linux.resources.devices`.
    pub fn new(list: &[LinuxDeviceCgroup]) -> Result<Self, Failure> {
        if list.len() > MAX_RULES {
            return Err(Failure::invalid(
                "linux.resources.devices",
                format!("{} rules; {MAX_RULES} are taken", list.len()),
            ));
        }
        let mut rules = Vec::new();
        for (index, entry) in list.iter().enumerate() {
            let field = format!("linux.resources.devices[{index}]");
            rules.extend(rule(&field, entry)?);
        }
        Ok(Self::of(rules))
    }

    fn of(mut rules: Vec<Rule>) -> Self {
        rules.extend(DEFAULT);
        rules.reverse();
        // Nothing shows through a rule for everything, and at the end everything is denied.
        if let Some(total) = rules.iter().position(Rule::is_total) {
            let keep = total + usize::from(rules.get(total).is_some_and(|rule| rule.allow));
            rules.truncate(keep);
        }
        Self { rules }
    }

    /// Whether they forbid nothing.
    pub fn allow_all(&self) -> bool {
        self.rules.last().is_some_and(Rule::is_total) && self.rules.iter().all(|rule| rule.allow)
    }

    /// Loads them into the kernel.
    pub fn load(&self) -> Result<OwnedFd, Failure> {
        let program = self.program();
        let attributes = LoadAttributes {
            program_type: BPF_PROG_TYPE_CGROUP_DEVICE,
            instruction_count: u32::try_from(program.len()).unwrap_or(u32::MAX),
            instructions: program.as_ptr() as u64,
            license: c"Apache-2.0".as_ptr() as u64,
        };
        let mut attempts = 1;
        loop {
            // SAFETY: the kernel reads the attributes, and the program and the string that they
            // point to, all of which live across the call.
            let loaded = unsafe {
                libc::syscall(
                    libc::SYS_bpf,
                    BPF_PROG_LOAD,
                    &raw const attributes,
                    size_of::<LoadAttributes>(),
                )
            };
            match i32::try_from(loaded) {
                // SAFETY: the kernel has made a new descriptor, which no one else owns.
                Ok(fd) if fd >= 0 => return Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
                _ => {}
            }
            let error = last_error();
            // The verifier gives up as soon as a signal waits, such as that of a child's end.
            if error == Errno::AGAIN && attempts < MAX_LOAD_ATTEMPTS {
                attempts += 1;
                continue;
            }
            return Err(Failure::internal(
                "linux.resources.devices: load the rules into the guest's kernel",
                error,
            ));
        }
    }

    fn program(&self) -> Vec<Instruction> {
        let mut program = vec![
            Instruction::load(KIND, CONTEXT, 0),
            Instruction::copy(ACCESS, KIND),
            Instruction::immediate(RIGHT_SHIFT, ACCESS, 16),
            Instruction::immediate(AND, KIND, 0xffff),
            Instruction::load(MAJOR, CONTEXT, 4),
            Instruction::load(MINOR, CONTEXT, 8),
        ];
        for rule in &self.rules {
            program.extend(rule.instructions());
        }
        program.extend(Instruction::answer(false));
        program
    }
}

/// Attaches a program to a cgroup. More programs below, such as those of a systemd in the
/// container, can only forbid more.
pub fn attach(cgroup: BorrowedFd<'_>, program: BorrowedFd<'_>) -> Result<(), Failure> {
    change(BPF_PROG_ATTACH, BPF_F_ALLOW_MULTI, cgroup, program)
}

/// Takes a program away from a cgroup.
pub fn detach(cgroup: BorrowedFd<'_>, program: BorrowedFd<'_>) -> Result<(), Failure> {
    change(BPF_PROG_DETACH, 0, cgroup, program)
}

fn change(
    command: libc::c_int,
    flags: u32,
    cgroup: BorrowedFd<'_>,
    program: BorrowedFd<'_>,
) -> Result<(), Failure> {
    let attributes = AttachAttributes {
        target: cgroup.as_raw_fd(),
        program: program.as_raw_fd(),
        attach_type: BPF_CGROUP_DEVICE,
        flags,
    };
    // SAFETY: the kernel reads the attributes, which live across the call.
    let changed = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            &raw const attributes,
            size_of::<AttachAttributes>(),
        )
    };
    match changed {
        0 => Ok(()),
        _ => Err(Failure::internal(
            "linux.resources.devices: set the rules of the container's cgroup",
            last_error(),
        )),
    }
}

fn rule(field: &str, entry: &LinuxDeviceCgroup) -> Result<Option<Rule>, Failure> {
    let kind = match entry.typ().unwrap_or(LinuxDeviceType::A) {
        LinuxDeviceType::A => None,
        LinuxDeviceType::B => Some(BLOCK),
        LinuxDeviceType::C | LinuxDeviceType::U => Some(CHARACTER),
        LinuxDeviceType::P => {
            return Err(Failure::invalid(field, "a FIFO is no device"));
        }
    };
    let mut access = 0;
    for letter in entry.access().as_deref().unwrap_or_default().chars() {
        access |= match letter {
            'r' => READ,
            'w' => WRITE,
            'm' => MKNOD,
            _ => {
                return Err(Failure::invalid(
                    field,
                    format!("access {letter:?} is none of r, w and m"),
                ));
            }
        };
    }
    if access == 0 {
        // Nothing is allowed by what doesn't say what, and everything denied.
        if entry.allow() {
            return Ok(None);
        }
        access = ALL;
    }
    let number = |name: &str, value: Option<i64>| match value {
        // As in the runtime spec's examples, and for runc.
        None | Some(-1) => Ok(None),
        // Of all kinds means of all numbers.
        Some(_) if kind.is_none() => Ok(None),
        Some(value) => u32::try_from(value)
            .map(Some)
            .map_err(|_| Failure::invalid(field, format!("{name} {value} is no device number"))),
    };
    Ok(Some(Rule {
        allow: entry.allow(),
        kind,
        major: number("major", entry.major())?,
        minor: number("minor", entry.minor())?,
        access,
    }))
}

impl Rule {
    /// Decides, or falls through to what follows.
    fn instructions(&self) -> Vec<Instruction> {
        let decision = match (self.allow, self.access) {
            (allow, ALL) => Instruction::answer(allow).to_vec(),
            (true, access) => {
                // What it allows need not be asked any more; if that is all, the answer is yes.
                let rest = Instruction::immediate(AND, ACCESS, i32::from(ALL & !access));
                let skip = Instruction::jump(JUMP_UNEQUAL, ACCESS, 0, 2);
                let [set, exit] = Instruction::answer(true);
                vec![rest, skip, set, exit]
            }
            (false, access) => {
                let hit = Instruction::jump(JUMP_ANY_BIT, ACCESS, i32::from(access), 1);
                let skip = Instruction::jump(JUMP, 0, 0, 2);
                let [set, exit] = Instruction::answer(false);
                vec![hit, skip, set, exit]
            }
        };
        let number = |number: Option<u32>| number.map(u32::cast_signed);
        let conditions: Vec<(u8, i32)> = [
            (KIND, self.kind),
            (MAJOR, number(self.major)),
            (MINOR, number(self.minor)),
        ]
        .into_iter()
        .filter_map(|(register, value)| Some((register, value?)))
        .collect();
        let mut instructions = Vec::new();
        for (index, (register, value)) in conditions.iter().enumerate() {
            let behind = conditions.len() - index - 1 + decision.len();
            let behind = i16::try_from(behind).unwrap_or(i16::MAX);
            instructions.push(Instruction::jump(JUMP_UNEQUAL, *register, *value, behind));
        }
        instructions.extend(decision);
        instructions
    }
}

/// Each attempt delivers the signals that interrupted the one before.
const MAX_LOAD_ATTEMPTS: u32 = 100;

const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_PROG_ATTACH: libc::c_int = 8;
const BPF_PROG_DETACH: libc::c_int = 9;
const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const BPF_CGROUP_DEVICE: u32 = 6;
const BPF_F_ALLOW_MULTI: u32 = 1 << 1;

/// The beginning of `union bpf_attr` for BPF_PROG_LOAD; the kernel takes the rest for zero.
#[repr(C)]
struct LoadAttributes {
    program_type: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
}

/// The same for BPF_PROG_ATTACH and BPF_PROG_DETACH.
#[repr(C)]
struct AttachAttributes {
    target: i32,
    program: i32,
    attach_type: u32,
    flags: u32,
}

/// Registers. The program gets a `struct bpf_cgroup_dev_ctx` in the first one.
const RESULT: u8 = 0;
const CONTEXT: u8 = 1;
const KIND: u8 = 2;
const ACCESS: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;

/// Operation codes (linux/bpf_common.h, linux/bpf.h), on 32 bits.
const LOAD_WORD: u8 = 0x61;
const COPY: u8 = 0xbc;
const SET: u8 = 0xb4;
const AND: u8 = 0x54;
const RIGHT_SHIFT: u8 = 0x74;
const JUMP: u8 = 0x05;
const JUMP_UNEQUAL: u8 = 0x56;
const JUMP_ANY_BIT: u8 = 0x46;
const EXIT: u8 = 0x95;

/// `struct bpf_insn`: both registers share a byte, the destination in its lower half.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Instruction {
    code: u8,
    registers: u8,
    offset: i16,
    immediate: i32,
}

impl Instruction {
    fn load(to: u8, from: u8, offset: i16) -> Self {
        Self {
            code: LOAD_WORD,
            registers: to | from << 4,
            offset,
            immediate: 0,
        }
    }

    fn copy(to: u8, from: u8) -> Self {
        Self {
            code: COPY,
            registers: to | from << 4,
            offset: 0,
            immediate: 0,
        }
    }

    fn immediate(code: u8, register: u8, immediate: i32) -> Self {
        Self {
            code,
            registers: register,
            offset: 0,
            immediate,
        }
    }

    fn jump(code: u8, register: u8, immediate: i32, over: i16) -> Self {
        Self {
            code,
            registers: register,
            offset: over,
            immediate,
        }
    }

    fn answer(allow: bool) -> [Self; 2] {
        [
            Self::immediate(SET, RESULT, allow.into()),
            Self::immediate(EXIT, 0, 0),
        ]
    }
}

#[cfg(test)]
#[path = "devices_tests.rs"]
mod tests;
