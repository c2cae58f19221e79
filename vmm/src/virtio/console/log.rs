//! The console's log: the last lines in memory, for reports of a panic, and a file of bounded
//! length. Shared by the virtio console and the serial port.

use std::collections::VecDeque;
use std::fs::File;
use std::io::Write;

/// Lines kept in memory.
const MAX_LINES: usize = 32;
/// Bytes kept of each line; the rest of a longer one goes to the file only.
const MAX_LINE: usize = 512;

/// Takes console output. A guest can make it neither grow nor fail.
#[derive(Debug)]
pub struct ConsoleLog {
    file: Option<File>,
    /// Bytes that may still be written to the file.
    left: u64,
    /// Bytes for the file, up to the end of a line: a serial port brings them one by one.
    unwritten: Vec<u8>,
    lines: VecDeque<Vec<u8>>,
    /// The line that has no end yet.
    line: Vec<u8>,
}

impl ConsoleLog {
    /// An empty log; `limit` is in bytes and is the file's.
    pub fn new(file: Option<File>, limit: u64) -> Self {
        ConsoleLog {
            file,
            left: limit,
            unwritten: Vec::new(),
            lines: VecDeque::new(),
            line: Vec::new(),
        }
    }

    /// Takes output. Errors of the file end its part; the tail goes on.
    pub fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            if byte == b'\n' {
                let line = std::mem::take(&mut self.line);
                if self.lines.len() == MAX_LINES {
                    self.lines.pop_front();
                }
                self.lines.push_back(line);
            } else if self.line.len() < MAX_LINE {
                self.line.push(byte);
            }
        }
        self.write_file(bytes);
    }

    fn write_file(&mut self, bytes: &[u8]) {
        if self.file.is_none() {
            return;
        }
        let len = bytes
            .len()
            .min(usize::try_from(self.left).unwrap_or(usize::MAX));
        let Some(bytes) = bytes.get(..len) else {
            return;
        };
        self.left -= len as u64;
        self.unwritten.extend_from_slice(bytes);
        if self.unwritten.len() >= MAX_LINE || self.unwritten.contains(&b'\n') || self.left == 0 {
            self.flush();
        }
    }

    /// Writes to the file what waits for the end of its line.
    pub fn flush(&mut self) {
        let bytes = std::mem::take(&mut self.unwritten);
        if let Some(file) = &mut self.file
            && let Err(error) = file.write_all(&bytes)
        {
            tracing::warn!("writing the console log failed: {error}; no more of it is written");
            self.file = None;
        }
    }

    /// The last lines, the unfinished one among them: at most 32 of at most 512 bytes, with `?`
    /// for control characters and what is not UTF-8.
    pub fn tail(&self) -> Vec<String> {
        let unfinished = (!self.line.is_empty()).then_some(&self.line);
        let all = self.lines.len() + usize::from(unfinished.is_some());
        self.lines
            .iter()
            .chain(unfinished)
            .skip(all.saturating_sub(MAX_LINES))
            .map(|line| printable(line))
            .collect()
    }
}

impl Drop for ConsoleLog {
    fn drop(&mut self) {
        self.flush();
    }
}

/// Never longer than `line`: a malformed sequence of one or more bytes becomes one `?`.
fn printable(line: &[u8]) -> String {
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    String::from_utf8_lossy(line)
        .chars()
        .map(|character| match character {
            '\t' => ' ',
            char::REPLACEMENT_CHARACTER => '?',
            _ if character.is_control() => '?',
            _ => character,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::{Read, Seek};

    #[test]
    fn the_tail_has_the_last_lines() {
        let mut log = ConsoleLog::new(None, 0);
        for number in 0..40 {
            log.write(format!("line {number}\r\n").as_bytes());
        }
        log.write(b"\x1b[31munfinished\t\xff\xffx");
        let tail = log.tail();
        assert_eq!(tail.len(), 32);
        assert_eq!(tail[0], "line 9");
        assert_eq!(tail[30], "line 39");
        assert_eq!(tail[31], "?[31munfinished ??x");
    }

    #[test]
    fn the_file_ends_at_its_limit() {
        let mut file = tempfile::tempfile().unwrap();
        let mut log = ConsoleLog::new(Some(file.try_clone().unwrap()), 10);
        for byte in b"ab\ncdefghijklm\nn" {
            log.write(&[*byte]);
        }
        file.rewind().unwrap();
        let mut text = String::new();
        file.read_to_string(&mut text).unwrap();
        assert_eq!(text, "ab\ncdefghi");
        assert_eq!(log.tail(), ["ab", "cdefghijklm", "n"]);
    }

    #[test]
    fn an_unfinished_line_reaches_the_file_at_the_end() {
        let mut file = tempfile::tempfile().unwrap();
        let mut log = ConsoleLog::new(Some(file.try_clone().unwrap()), 100);
        log.write(b"no newline");
        drop(log);
        file.rewind().unwrap();
        let mut text = String::new();
        file.read_to_string(&mut text).unwrap();
        assert_eq!(text, "no newline");
    }

    proptest! {
        /// Any output in any pieces: the tail and the buffers stay within their bounds.
        #[test]
        fn bounds_hold(runs in prop::collection::vec((prop_oneof![Just(b'\n'), any::<u8>()], 0usize..900), 0..60)) {
            let mut log = ConsoleLog::new(Some(tempfile::tempfile().unwrap()), 5000);
            for (byte, count) in runs {
                log.write(&vec![byte; count]);
                prop_assert!(log.unwritten.len() < MAX_LINE);
            }
            let tail = log.tail();
            prop_assert!(tail.len() <= MAX_LINES);
            for line in tail {
                prop_assert!(line.len() <= MAX_LINE);
                prop_assert!(!line.contains(char::is_control));
            }
        }
    }
}
