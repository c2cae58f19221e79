//! How a bench on the host drives a guest: through a small raw disk that both have, so that it works
//! alike under every virtual machine monitor and needs no device that one of them lacks.
//!
//! ```text
//! 0      the host's command: a block, and its words after it
//! 1 MiB  the guest's answer: a block that says how far it is, and the output after it
//! 3 MiB  marks: a block each, written by programs in the guest to tell how far they are
//! ```
//!
//! Each side writes its own part only, and what a block announces before the block. Commands are
//! numbered from 1. The guest says when it begins one and when it has ended it, and rests for
//! [`REST`] after either: in that time the host can read its counters with nothing going on.

use std::time::Duration;

/// Serial number of the disk.
pub const SERIAL: &str = "bench-control";
/// Unit of all transfers, so that they can be direct ones.
pub const BLOCK: usize = 4096;
/// Where the command is.
pub const COMMAND_AT: u64 = 0;
/// Where its words are.
pub const WORDS_AT: u64 = COMMAND_AT + BLOCK as u64;
/// Longest words in bytes, with a NUL after each.
pub const MAX_WORDS: usize = 1 << 18;
/// Where the answer's block is.
pub const ANSWER_AT: u64 = 1 << 20;
/// Where the output is.
pub const OUTPUT_AT: u64 = ANSWER_AT + BLOCK as u64;
/// Longest output in bytes; what is beyond is cut off.
pub const MAX_OUTPUT: usize = 1 << 20;
/// Where the marks are.
pub const MARKS_AT: u64 = 3 << 20;
/// How many there can be.
pub const MAX_MARKS: usize = 255;
/// Length of the disk.
pub const DISK_BYTES: u64 = 4 << 20;
/// How long the guest rests after it has said that it begins a command, or that it has ended it.
pub const REST: Duration = Duration::from_millis(40);

/// Begins every block that was written.
const MAGIC: [u8; 8] = *b"BHBENCH1";

/// What the guest is to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Command {
    /// From 1.
    pub number: u32,
    /// The verb and what it's about; see the guest's program.
    pub words: Vec<String>,
}

impl Command {
    /// The block and the words as they are on the disk; none if they are too long or a word has a NUL
    /// in it.
    pub fn encode(&self) -> Option<([u8; BLOCK], Vec<u8>)> {
        if self.words.iter().any(|word| word.contains('\0')) {
            return None;
        }
        let words: String = self.words.iter().map(|word| format!("{word}\0")).collect();
        let length = u32::try_from(words.len()).ok()?;
        (words.len() <= MAX_WORDS).then(|| (block(self.number, length, 0), words.into_bytes()))
    }

    /// Number and length of the words that a block announces; none if it isn't a command's.
    pub fn announced(bytes: &[u8]) -> Option<(u32, usize)> {
        let (number, length, _) = header(bytes)?;
        let length = length as usize;
        (length <= MAX_WORDS).then_some((number, length))
    }

    /// The command of this number with these words; none if they are no text.
    pub fn decode(number: u32, words: &[u8]) -> Option<Self> {
        let text = std::str::from_utf8(words).ok()?;
        let words = text.split_terminator('\0').map(str::to_owned).collect();
        Some(Self { number, words })
    }
}

/// How far the guest is with a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// It begins, after a rest.
    Begun,
    /// It has ended, and rests; the output comes.
    Ended,
    /// It has ended well, with so many bytes of output.
    Done(u32),
    /// It has failed; the output says why.
    Failed(u32),
}

/// What the guest says of a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Answer {
    /// The command's number.
    pub number: u32,
    /// How far it is.
    pub stage: Stage,
}

impl Answer {
    /// As it is on the disk.
    pub fn encode(&self) -> [u8; BLOCK] {
        let (code, length) = match self.stage {
            Stage::Begun => (1, 0),
            Stage::Ended => (2, 0),
            Stage::Done(length) => (3, length),
            Stage::Failed(length) => (4, length),
        };
        block(self.number, length, code)
    }

    /// The answer in a block; none if there is none.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let (number, length, code) = header(bytes)?;
        if length as usize > MAX_OUTPUT {
            return None;
        }
        let stage = match code {
            1 => Stage::Begun,
            2 => Stage::Ended,
            3 => Stage::Done(length),
            4 => Stage::Failed(length),
            _ => return None,
        };
        Some(Self { number, stage })
    }
}

fn block(number: u32, length: u32, code: u32) -> [u8; BLOCK] {
    let mut block = [0; BLOCK];
    block[..8].copy_from_slice(&MAGIC);
    block[8..12].copy_from_slice(&number.to_le_bytes());
    block[12..16].copy_from_slice(&length.to_le_bytes());
    block[16..20].copy_from_slice(&code.to_le_bytes());
    block
}

/// Number, length and code.
fn header(bytes: &[u8]) -> Option<(u32, u32, u32)> {
    if bytes.get(..8)? != MAGIC {
        return None;
    }
    let word = |at: usize| {
        let four = bytes.get(at..at + 4)?.try_into().ok()?;
        Some(u32::from_le_bytes(four))
    };
    Some((word(8)?, word(12)?, word(16)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_does_not_fit_is_no_command() {
        let command = |word: String| Command {
            number: 1,
            words: vec![word],
        };
        assert!(command("x".repeat(MAX_WORDS - 1)).encode().is_some());
        assert!(command("x".repeat(MAX_WORDS)).encode().is_none());
        assert!(command("a\0b".into()).encode().is_none());
        assert_eq!(Command::announced(&[0; BLOCK]), None);
        assert_eq!(Answer::decode(&[0; BLOCK]), None);
    }

    proptest! {
        #[test]
        fn commands_and_answers_arrive_as_they_were_sent(
            number: u32,
            words in prop::collection::vec("[ -~]{0,40}", 0..20),
            length in 0u32..=MAX_OUTPUT as u32,
        ) {
            let command = Command { number, words };
            let (block, words) = command.encode().unwrap();
            prop_assert_eq!(Command::announced(&block), Some((number, words.len())));
            prop_assert_eq!(Command::decode(number, &words), Some(command));
            for stage in [Stage::Begun, Stage::Ended, Stage::Done(length), Stage::Failed(length)] {
                let answer = Answer { number, stage };
                prop_assert_eq!(Answer::decode(&answer.encode()), Some(answer));
            }
        }

        /// Whatever the bytes: nothing, or something within the bounds.
        #[test]
        fn any_bytes_are_read(
            magic: bool,
            mut bytes in prop::collection::vec(any::<u8>(), 0..200),
        ) {
            if magic && bytes.len() >= 8 {
                bytes[..8].copy_from_slice(&MAGIC);
            }
            if let Some(Answer { stage: Stage::Done(length) | Stage::Failed(length), .. }) = Answer::decode(&bytes) {
                prop_assert!(length as usize <= MAX_OUTPUT);
            }
            if let Some((_, length)) = Command::announced(&bytes) {
                prop_assert!(length <= MAX_WORDS);
            }
            let _ = Command::decode(1, &bytes);
        }
    }
}
