//! Filters as the kernel's classic BPF.
//!
//! Numbers of system calls with the same outcome next to each other make one range, and ranges are
//! found by halving: a filter runs on every call, and where kernel mode is emulated each of its
//! instructions is dear. The kernel also tries every number once when the filter is loaded.

use super::names::{Abi, X32_BIT};
use std::collections::BTreeMap;

/// `struct sock_filter`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Instruction {
    /// Operation.
    pub code: u16,
    /// Instructions to skip if a comparison holds.
    pub yes: u8,
    /// And if it doesn't.
    pub no: u8,
    /// Operand.
    pub operand: u32,
}

/// What an argument is compared with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Comparison {
    /// `argument != value`
    Unequal(u64),
    /// `argument < value`
    Less(u64),
    /// `argument <= value`
    LessOrEqual(u64),
    /// `argument == value`
    Equal(u64),
    /// `argument >= value`
    GreaterOrEqual(u64),
    /// `argument > value`
    Greater(u64),
    /// `argument & mask == value & mask`
    Masked {
        /// Bits that are looked at.
        mask: u64,
        /// What they must be.
        value: u64,
    },
}

/// A condition on one argument.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Condition {
    /// 0 to 5.
    pub argument: u8,
    /// What must hold.
    pub comparison: Comparison,
}

/// What happens to one system call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// Conditions that must all hold, and the action then. The first that applies counts.
    pub rules: Vec<(Vec<Condition>, u32)>,
    /// The action when none applies; `None` is the default.
    pub action: Option<u32>,
}

/// What happens to the system calls of one ABI.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Section {
    /// The ABI.
    pub abi: Abi,
    /// By number.
    pub calls: BTreeMap<u32, Outcome>,
    /// For all others.
    pub default: u32,
    /// Calls with higher numbers than this get ENOSYS.
    pub beyond: Option<u32>,
}

/// Operation codes (linux/filter.h, linux/bpf_common.h).
pub const LOAD: u16 = 0x20;
pub const JUMP: u16 = 0x05;
pub const JUMP_EQUAL: u16 = 0x15;
pub const JUMP_GREATER: u16 = 0x25;
pub const JUMP_NOT_LESS: u16 = 0x35;
pub const AND: u16 = 0x54;
pub const RETURN: u16 = 0x06;

/// Offsets in `struct seccomp_data`; each argument is 8 bytes, the lower half first.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const ARGUMENTS: u32 = 16;

/// For calls of an ABI that isn't listed.
const FOREIGN: u32 = libc::SECCOMP_RET_KILL_THREAD;
const UNKNOWN: u32 = libc::SECCOMP_RET_ERRNO | libc::ENOSYS.cast_unsigned();

/// The whole filter. The first section is that of the native ABI.
pub fn assemble(sections: &[Section]) -> Vec<Instruction> {
    let find = |abi| sections.iter().find(|section| section.abi == abi);
    let body = |abi| {
        find(abi)
            .map(|section| section.search())
            .unwrap_or_else(|| vec![ret(FOREIGN)])
    };
    let mut native = vec![load(NUMBER)];
    // Both ABIs are one architecture to the kernel; all numbers of x32 are above the native ones.
    native.extend(split(X32_BIT, body(Abi::X86_64), body(Abi::X32)));
    let mut program = vec![load(ARCHITECTURE)];
    let mut others = vec![ret(FOREIGN)];
    if find(Abi::X86).is_some() {
        let mut search = vec![load(NUMBER)];
        search.extend(body(Abi::X86));
        others = equal(Abi::X86.audit_number(), search, others);
    }
    program.extend(equal(Abi::X86_64.audit_number(), native, others));
    program
}

impl Section {
    /// Finds the call whose number has been loaded.
    fn search(&self) -> Vec<Instruction> {
        let default = Outcome {
            rules: Vec::new(),
            action: Some(self.default),
        };
        let unknown = Outcome {
            rules: Vec::new(),
            action: Some(UNKNOWN),
        };
        let first = if self.abi == Abi::X32 { X32_BIT } else { 0 };
        let rest = match self.beyond {
            Some(_) => &unknown,
            None => &default,
        };
        // Where each outcome begins; it goes on to where the next one begins.
        let mut ranges: Vec<(u32, &Outcome)> = Vec::new();
        let mut begin = |number: u32, outcome| {
            if ranges.last().is_none_or(|(_, last)| *last != outcome) {
                ranges.push((number, outcome));
            }
        };
        let mut next = first;
        for (number, outcome) in &self.calls {
            if *number > next {
                begin(next, &default);
            }
            begin(*number, outcome);
            next = number.saturating_add(1);
        }
        let known = self.beyond.map_or(next, |newest| newest.saturating_add(1));
        if known > next {
            begin(next, &default);
        }
        begin(known, rest);
        self.halve(&ranges)
    }

    fn halve(&self, ranges: &[(u32, &Outcome)]) -> Vec<Instruction> {
        match ranges {
            [] => vec![ret(self.default)],
            [(_, outcome)] => self.decide(outcome),
            _ => {
                let (below, above) = ranges.split_at(ranges.len() / 2);
                let start = above.first().map_or(0, |(start, _)| *start);
                split(start, self.halve(below), self.halve(above))
            }
        }
    }

    fn decide(&self, outcome: &Outcome) -> Vec<Instruction> {
        let mut instructions = Vec::new();
        for (conditions, action) in &outcome.rules {
            let blocks: Vec<Vec<Step>> = conditions
                .iter()
                .map(|condition| condition.steps(self.abi.is_wide()))
                .collect();
            let mut left: usize = blocks.iter().map(Vec::len).sum();
            for block in blocks {
                for (index, step) in block.iter().enumerate() {
                    left -= 1;
                    // Behind the action, which follows the last condition.
                    let fail = left + 1;
                    let hold = block.len() - index - 1;
                    instructions.push(step.resolve(hold, fail));
                }
            }
            instructions.push(ret(*action));
        }
        instructions.push(ret(outcome.action.unwrap_or(self.default)));
        instructions
    }
}

/// Where a step of a condition leads.
#[derive(Clone, Copy)]
enum Target {
    /// The next step.
    Next,
    /// The condition holds.
    Hold,
    /// It doesn't.
    Fail,
}

/// One instruction of a condition.
enum Step {
    Plain(Instruction),
    Compare(u16, u32, Target, Target),
}

impl Step {
    fn resolve(&self, hold: usize, fail: usize) -> Instruction {
        // A condition has at most six steps and a rule at most six conditions.
        let distance = |target| {
            let distance = match target {
                Target::Next => 0,
                Target::Hold => hold,
                Target::Fail => fail,
            };
            u8::try_from(distance).unwrap_or(u8::MAX)
        };
        match *self {
            Self::Plain(instruction) => instruction,
            Self::Compare(code, operand, yes, no) => Instruction {
                code,
                yes: distance(yes),
                no: distance(no),
                operand,
            },
        }
    }
}

impl Condition {
    fn steps(&self, wide: bool) -> Vec<Step> {
        use Comparison as C;
        use Target::{Fail, Hold, Next};
        let low_at = ARGUMENTS + u32::from(self.argument) * 8;
        let (mask, value) = match self.comparison {
            C::Masked { mask, value } => (Some(mask), value & mask),
            C::Unequal(value)
            | C::Less(value)
            | C::LessOrEqual(value)
            | C::Equal(value)
            | C::GreaterOrEqual(value)
            | C::Greater(value) => (None, value),
        };
        // How the lower half decides, and what an upper half that is greater or less says.
        let (code, yes, no, greater, less) = match self.comparison {
            C::Equal(_) | C::Masked { .. } => (JUMP_EQUAL, Hold, Fail, Fail, Fail),
            C::Unequal(_) => (JUMP_EQUAL, Fail, Hold, Hold, Hold),
            C::GreaterOrEqual(_) => (JUMP_NOT_LESS, Hold, Fail, Hold, Fail),
            C::Greater(_) => (JUMP_GREATER, Hold, Fail, Hold, Fail),
            C::Less(_) => (JUMP_NOT_LESS, Fail, Hold, Fail, Hold),
            C::LessOrEqual(_) => (JUMP_GREATER, Fail, Hold, Fail, Hold),
        };
        let mut steps = Vec::new();
        if wide {
            let (high, high_mask) = (upper(value), mask.map(upper));
            steps.push(Step::Plain(load(low_at + 4)));
            steps.extend(high_mask.map(and));
            if !matches!(code, JUMP_EQUAL) {
                steps.push(Step::Compare(JUMP_GREATER, high, greater, Next));
            }
            steps.push(Step::Compare(JUMP_EQUAL, high, Next, less));
        }
        steps.push(Step::Plain(load(low_at)));
        steps.extend(mask.map(lower).map(and));
        steps.push(Step::Compare(code, lower(value), yes, no));
        steps
    }
}

fn and(mask: u32) -> Step {
    Step::Plain(Instruction {
        code: AND,
        yes: 0,
        no: 0,
        operand: mask,
    })
}

fn upper(value: u64) -> u32 {
    u32::try_from(value >> 32).unwrap_or(0)
}

fn lower(value: u64) -> u32 {
    u32::try_from(value & u64::from(u32::MAX)).unwrap_or(0)
}

fn load(offset: u32) -> Instruction {
    Instruction {
        code: LOAD,
        yes: 0,
        no: 0,
        operand: offset,
    }
}

fn ret(action: u32) -> Instruction {
    Instruction {
        code: RETURN,
        yes: 0,
        no: 0,
        operand: action,
    }
}

/// `below` for values less than `start`, otherwise `above`.
fn split(start: u32, below: Vec<Instruction>, above: Vec<Instruction>) -> Vec<Instruction> {
    branch(JUMP_NOT_LESS, start, above, below)
}

/// `same` for this value, otherwise `other`.
fn equal(value: u32, same: Vec<Instruction>, other: Vec<Instruction>) -> Vec<Instruction> {
    branch(JUMP_EQUAL, value, same, other)
}

fn branch(
    code: u16,
    operand: u32,
    yes: Vec<Instruction>,
    no: Vec<Instruction>,
) -> Vec<Instruction> {
    let mut instructions = Vec::with_capacity(2 + yes.len() + no.len());
    match u8::try_from(no.len()) {
        Ok(distance) => instructions.push(Instruction {
            code,
            yes: distance,
            no: 0,
            operand,
        }),
        // Comparisons reach 255 instructions, jumps any number.
        Err(_) => {
            instructions.push(Instruction {
                code,
                yes: 0,
                no: 1,
                operand,
            });
            instructions.push(Instruction {
                code: JUMP,
                yes: 0,
                no: 0,
                operand: u32::try_from(no.len()).unwrap_or(u32::MAX),
            });
        }
    }
    instructions.extend(no);
    instructions.extend(yes);
    instructions
}
