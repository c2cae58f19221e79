//! The host's end of the control disk: see `bulkhead_bench_guest`.

use bulkhead_bench_guest::{
    ANSWER_AT, Answer, BLOCK, COMMAND_AT, Command, DISK_BYTES, MARKS_AT, OUTPUT_AT, Stage, WORDS_AT,
};
use bulkhead_tests::error::{Context, Error, Result};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// The disk.
pub struct Control {
    file: File,
    path: PathBuf,
    /// Of the last command.
    number: u32,
}

impl Control {
    /// A new one in `folder`.
    ///
    /// # Errors
    /// When it can't be made.
    pub fn create(folder: &Path) -> Result<Self> {
        let path = folder.join("control");
        let what = || format!("make {}", path.display());
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path)
            .context(what)?;
        file.set_len(DISK_BYTES).context(what)?;
        Ok(Self {
            file,
            path,
            number: 0,
        })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Gives the guest a command.
    ///
    /// # Errors
    /// When it is too long, or the disk can't be written.
    pub fn send(&mut self, words: &[&str]) -> Result<()> {
        self.number += 1;
        let command = Command {
            number: self.number,
            words: words.iter().map(|word| (*word).to_owned()).collect(),
        };
        let (block, text) = command
            .encode()
            .ok_or_else(|| Error::Unexpected(format!("a command is too long: {words:?}")))?;
        // What the block announces comes before it.
        self.file
            .write_all_at(&text, WORDS_AT)
            .and_then(|()| self.file.write_all_at(&block, COMMAND_AT))
            .context(|| format!("write {}", self.path.display()))
    }

    /// Takes all marks back.
    ///
    /// # Errors
    /// When the disk can't be written.
    pub fn clear_marks(&self) -> Result<()> {
        let zeros = vec![0; (DISK_BYTES - MARKS_AT) as usize];
        let written = self.file.write_all_at(&zeros, MARKS_AT);
        written.context(|| format!("write {}", self.path.display()))
    }

    /// Whether this mark was made.
    ///
    /// # Errors
    /// When the disk can't be read.
    pub fn marked(&self, index: usize) -> Result<bool> {
        let mut start = [0; 8];
        let read = self
            .file
            .read_exact_at(&mut start, MARKS_AT + (index * BLOCK) as u64);
        read.context(|| format!("read {}", self.path.display()))?;
        Ok(start != [0; 8])
    }

    /// How far the guest is with the last command; none if it hasn't begun.
    ///
    /// # Errors
    /// When the disk can't be read.
    pub fn stage(&self) -> Result<Option<Stage>> {
        let mut block = [0; BLOCK];
        let read = self.file.read_exact_at(&mut block, ANSWER_AT);
        read.context(|| format!("read {}", self.path.display()))?;
        let answer = Answer::decode(&block).filter(|answer| answer.number == self.number);
        Ok(answer.map(|answer| answer.stage))
    }

    /// The output of a command that has ended.
    ///
    /// # Errors
    /// When the command failed: then it's the output that says why.
    pub fn output(&self, stage: Stage) -> Result<String> {
        let (length, failed) = match stage {
            Stage::Done(length) => (length, false),
            Stage::Failed(length) => (length, true),
            Stage::Begun | Stage::Ended => (0, false),
        };
        let mut output = vec![0; length as usize];
        let read = self.file.read_exact_at(&mut output, OUTPUT_AT);
        read.context(|| format!("read {}", self.path.display()))?;
        let output = String::from_utf8_lossy(&output).into_owned();
        match failed {
            true => Err(Error::Unexpected(format!("in the guest: {output}"))),
            false => Ok(output),
        }
    }
}
