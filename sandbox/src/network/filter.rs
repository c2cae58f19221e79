//! A small assembler for programs of the classic packet filter
//! (Documentation/networking/filter.rst), whose jumps only ever go forward. A load beyond the
//! packet's end ends a program with 0, so whoever lets 0 stand for "no" fails on the safe side.

use std::collections::HashMap;

/// Most instructions of a program (BPF_MAXINSNS).
pub(super) const MAX_INSTRUCTIONS: usize = 4096;

const LOAD_WORD: u16 = 0x20;
const LOAD_HALF: u16 = 0x28;
const LOAD_BYTE: u16 = 0x30;
/// Added to a load: from X on instead of from the packet's start.
const FROM_X: u16 = 0x20;
/// Not in the packet: whether it has a VLAN's tag (SKF_AD_OFF + SKF_AD_VLAN_TAG_PRESENT). The
/// kernel takes the outermost one out of the packet before a program sees it.
const TAGGED: u32 = 0xffff_f000 + 48;
const LOAD_SCRATCH: u16 = 0x60;
const STORE_SCRATCH: u16 = 0x02;
const ADD: u16 = 0x04;
const ADD_X: u16 = 0x0c;
const AND: u16 = 0x54;
const SHIFT_LEFT: u16 = 0x64;
const JUMP: u16 = 0x05;
const JUMP_IF_EQUAL: u16 = 0x15;
const RETURN: u16 = 0x06;
const A_TO_X: u16 = 0x07;
const X_TO_A: u16 = 0x87;

/// struct sock_filter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Instruction {
    pub code: u16,
    pub if_true: u8,
    pub if_false: u8,
    pub value: u32,
}

/// Where a load is from.
#[derive(Debug, Clone, Copy)]
pub(super) enum At {
    /// An offset in the packet.
    Packet(u32),
    /// An offset from X on.
    X(u32),
}

/// How much a load takes, in network byte order.
#[derive(Debug, Clone, Copy)]
pub(super) enum Size {
    Word,
    Half,
    Byte,
}

/// A place to jump to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Label(usize);

/// A program in the making.
#[derive(Debug, Default)]
pub(super) struct Assembler {
    instructions: Vec<Instruction>,
    labels: usize,
    places: HashMap<Label, usize>,
    /// Jumps whose distance isn't known yet.
    jumps: Vec<(usize, Label)>,
}

impl Assembler {
    /// A label that is still to be placed.
    pub fn label(&mut self) -> Label {
        self.labels += 1;
        Label(self.labels)
    }

    /// The next instruction is where `label` is.
    pub fn place(&mut self, label: Label) {
        self.places.insert(label, self.instructions.len());
    }

    fn push(&mut self, code: u16, value: u32) {
        self.instructions.push(Instruction {
            code,
            if_true: 0,
            if_false: 0,
            value,
        });
    }

    pub fn load(&mut self, size: Size, at: At) {
        let code = match size {
            Size::Word => LOAD_WORD,
            Size::Half => LOAD_HALF,
            Size::Byte => LOAD_BYTE,
        };
        match at {
            At::Packet(offset) => self.push(code, offset),
            At::X(offset) => self.push(code + FROM_X, offset),
        }
    }

    /// Loads whether the packet has a VLAN's tag: 0 if not.
    pub fn load_tagged(&mut self) {
        self.push(LOAD_WORD, TAGGED);
    }

    pub fn add(&mut self, value: u32) {
        self.push(ADD, value);
    }

    pub fn add_x(&mut self) {
        self.push(ADD_X, 0);
    }

    pub fn and(&mut self, mask: u32) {
        self.push(AND, mask);
    }

    pub fn shift_left(&mut self, bits: u32) {
        self.push(SHIFT_LEFT, bits);
    }

    pub fn a_to_x(&mut self) {
        self.push(A_TO_X, 0);
    }

    pub fn x_to_a(&mut self) {
        self.push(X_TO_A, 0);
    }

    /// Keeps A in one of the sixteen words of scratch memory.
    pub fn store(&mut self, word: u32) {
        self.push(STORE_SCRATCH, word);
    }

    /// Gets a word that was kept.
    pub fn recall(&mut self, word: u32) {
        self.push(LOAD_SCRATCH, word);
    }

    pub fn finish(&mut self, value: u32) {
        self.push(RETURN, value);
    }

    pub fn jump(&mut self, to: Label) {
        self.jumps.push((self.instructions.len(), to));
        self.push(JUMP, 0);
    }

    /// Jumps if A is `value`.
    pub fn if_equal(&mut self, value: u32, to: Label) {
        self.compare(value, 0, 1);
        self.jump(to);
    }

    /// Jumps unless A is `value`.
    pub fn unless_equal(&mut self, value: u32, to: Label) {
        self.compare(value, 1, 0);
        self.jump(to);
    }

    /// The distances of comparisons have eight bits only, those of jumps 32.
    fn compare(&mut self, value: u32, if_true: u8, if_false: u8) {
        self.instructions.push(Instruction {
            code: JUMP_IF_EQUAL,
            if_true,
            if_false,
            value,
        });
    }

    /// The program; none if it has more instructions than the kernel takes.
    pub fn assemble(mut self) -> Option<Vec<Instruction>> {
        for (from, to) in self.jumps {
            // A label that was never placed, or lies behind, is a mistake of the program's.
            let distance = self.places.get(&to)?.checked_sub(from + 1)?;
            self.instructions[from].value = u32::try_from(distance).ok()?;
        }
        (self.instructions.len() <= MAX_INSTRUCTIONS).then_some(self.instructions)
    }
}

/// Runs a program as the kernel does on a packet whose VLAN tag, if it was tagged, is out.
#[cfg(test)]
pub(super) fn run(program: &[Instruction], packet: &[u8], tagged: bool) -> u32 {
    let (mut a, mut x, mut scratch, mut at) = (0u32, 0u32, [0u32; 16], 0usize);
    let load = |size: usize, offset: u32| {
        let offset = offset as usize;
        let bytes = packet.get(offset..offset.checked_add(size)?)?;
        Some(
            bytes
                .iter()
                .fold(0u32, |all, byte| all << 8 | u32::from(*byte)),
        )
    };
    loop {
        let Instruction {
            code,
            if_true,
            if_false,
            value,
        } = program[at];
        at += 1;
        let size = match code & 0x18 {
            0x00 => 4,
            0x08 => 2,
            _ => 1,
        };
        let loaded = match code {
            LOAD_WORD if value == TAGGED => Some(u32::from(tagged)),
            LOAD_WORD | LOAD_HALF | LOAD_BYTE => load(size, value),
            0x40 | 0x48 | 0x50 => load(size, x.wrapping_add(value)),
            LOAD_SCRATCH => Some(scratch[value as usize]),
            ADD => Some(a.wrapping_add(value)),
            ADD_X => Some(a.wrapping_add(x)),
            AND => Some(a & value),
            SHIFT_LEFT => Some(a << value),
            X_TO_A => Some(x),
            RETURN => return value,
            A_TO_X => {
                x = a;
                Some(a)
            }
            STORE_SCRATCH => {
                scratch[value as usize] = a;
                Some(a)
            }
            JUMP => {
                at += value as usize;
                Some(a)
            }
            JUMP_IF_EQUAL => {
                at += usize::from(if a == value { if_true } else { if_false });
                Some(a)
            }
            other => panic!("{other:#x} is no instruction of this assembler's"),
        };
        match loaded {
            Some(value) => a = value,
            None => return 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jumps_find_their_labels_and_loads_beyond_the_end_are_a_no() {
        let mut program = Assembler::default();
        let yes = program.label();
        program.load(Size::Half, At::Packet(1));
        program.if_equal(0x0203, yes);
        program.finish(7);
        program.place(yes);
        program.finish(9);
        let program = program.assemble().unwrap();
        assert_eq!(run(&program, &[1, 2, 3], false), 9);
        assert_eq!(run(&program, &[1, 2, 4], false), 7);
        assert_eq!(run(&program, &[1, 2], false), 0);
    }

    #[test]
    fn what_the_kernel_would_not_take_is_none() {
        let mut program = Assembler::default();
        let nowhere = program.label();
        program.jump(nowhere);
        assert_eq!(program.assemble(), None);
        let mut program = Assembler::default();
        for _ in 0..=MAX_INSTRUCTIONS {
            program.finish(0);
        }
        assert_eq!(program.assemble(), None);
    }
}
