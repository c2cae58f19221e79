//! What a container uses, from the files of its cgroup.

use super::Cgroup;
use crate::error::Failure;
use bulkhead_proto::agent::{HugetlbStats, IoStats, StatsResponse};
use std::collections::HashMap;
use std::io;

/// How cgroup files and the protocol write "no limit".
const UNLIMITED: &str = "max";
const NO_LIMIT: u64 = u64::MAX;

/// Most entries of one file that are passed on; the kernel's have some seventy.
const MAX_ENTRIES: usize = 1024;

/// Sizes that x86 has huge pages of, as they are in the names of files.
const PAGE_SIZES: [&str; 2] = ["2MB", "1GB"];

impl Cgroup {
    /// All that cgroup v2 counts. What the guest has no controller for is left out.
    pub fn stats(&self) -> Result<StatsResponse, Failure> {
        let mut stats = StatsResponse {
            pids_current: self.value("pids.current")?,
            pids_max: self.value("pids.max")?,
            cpu: flat_keyed(&self.text("cpu.stat")?),
            memory: flat_keyed(&self.text("memory.stat")?),
            memory_events: flat_keyed(&self.text("memory.events")?),
            memory_current: self.value("memory.current")?,
            memory_max: self.value("memory.max")?,
            memory_peak: self.value("memory.peak")?,
            swap_current: self.value("memory.swap.current")?,
            swap_max: self.value("memory.swap.max")?,
            swap_peak: self.value("memory.swap.peak")?,
            io: io_stats(&self.text("io.stat")?),
            ..Default::default()
        };
        for page_size in PAGE_SIZES {
            let file = |what: &str| format!("hugetlb.{page_size}.{what}");
            let Some(current) = self.number(&file("current"))? else {
                continue;
            };
            stats.hugetlb.push(HugetlbStats {
                page_size: page_size.to_owned(),
                current,
                max: self.value(&file("max"))?,
                ..Default::default()
            });
        }
        Ok(stats)
    }

    /// The content of a file; nothing if it is missing.
    fn text(&self, file: &str) -> Result<String, Failure> {
        match self.read(file) {
            Ok(text) => Ok(text),
            // Without its controller there is no file; without the kernel's feature, as with
            // pressure, there is one that can't be read.
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::Unsupported
                ) =>
            {
                Ok(String::new())
            }
            Err(error) => Err(Failure::internal(
                format!("read {file} of {}", self.path.display()),
                error,
            )),
        }
    }

    /// The number in a file; `None` if it is missing.
    pub fn number(&self, file: &str) -> Result<Option<u64>, Failure> {
        Ok(number(&self.text(file)?))
    }

    fn value(&self, file: &str) -> Result<u64, Failure> {
        Ok(self.number(file)?.unwrap_or(0))
    }
}

fn number(text: &str) -> Option<u64> {
    match text.trim_end() {
        UNLIMITED => Some(NO_LIMIT),
        text => text.parse().ok(),
    }
}

/// `name number` on each line.
fn flat_keyed(text: &str) -> HashMap<String, u64> {
    text.lines()
        .filter_map(|line| line.split_once(' '))
        .filter_map(|(name, value)| Some((name.to_owned(), value.parse().ok()?)))
        .take(MAX_ENTRIES)
        .collect()
}

/// `major:minor name=number name=number …` on each line.
fn io_stats(text: &str) -> Vec<IoStats> {
    let device = |line: &str| {
        let mut words = line.split_ascii_whitespace();
        let (major, minor) = words.next()?.split_once(':')?;
        let mut stats = IoStats {
            major: major.parse().ok()?,
            minor: minor.parse().ok()?,
            ..Default::default()
        };
        for (name, value) in words.filter_map(|word| word.split_once('=')) {
            let value = value.parse().unwrap_or(0);
            match name {
                "rbytes" => stats.read_bytes = value,
                "wbytes" => stats.written_bytes = value,
                "rios" => stats.reads = value,
                "wios" => stats.writes = value,
                _ => {}
            }
        }
        Some(stats)
    };
    text.lines().filter_map(device).take(MAX_ENTRIES).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn reads_the_kernels_files() {
        assert_eq!(number("max\n"), Some(NO_LIMIT));
        assert_eq!(number("4096\n"), Some(4096));
        assert_eq!(number(""), None);
        let cpu = flat_keyed("usage_usec 150000\nuser_usec 100000\nsystem_usec 50000\nbroken\n");
        assert_eq!(cpu.len(), 3);
        assert_eq!(cpu.get("user_usec"), Some(&100_000));
        let io = io_stats(
            "254:0 rbytes=4096 wbytes=8192 rios=1 wios=2 dbytes=0 dios=0\n254:16\nnonsense\n",
        );
        assert_eq!(io.len(), 2);
        assert_eq!(
            (io[0].major, io[0].minor, io[0].read_bytes, io[0].writes),
            (254, 0, 4096, 2)
        );
        assert_eq!((io[1].minor, io[1].read_bytes), (16, 0));
    }

    proptest! {
        #[test]
        fn never_panics(text: String) {
            let _ = (number(&text), flat_keyed(&text), io_stats(&text));
        }
    }
}
