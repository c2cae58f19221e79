//! What processes hold, as /proc tells: memory, threads, descriptors.

use crate::error::{Context, Error, Result};
use serde::Serialize;
use std::collections::HashMap;
use std::ops::AddAssign;

/// What one process holds, or several together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Footprint {
    /// KiB of memory that nobody else maps (Private_Clean and Private_Dirty of smaps_rollup).
    pub private_kib: u64,
    /// KiB of these that the process has written to. The rest, its program above all, becomes
    /// private or shared as others of its kind come and go.
    pub written_kib: u64,
    /// KiB of memory that others map too; of several processes the sum, shared pages counted once
    /// for each.
    pub shared_kib: u64,
    /// KiB of memory with shared pages divided by the number of those who map them.
    pub proportional_kib: u64,
    /// Threads.
    pub threads: u64,
    /// Open descriptors.
    pub descriptors: u64,
}

impl AddAssign for Footprint {
    fn add_assign(&mut self, other: Self) {
        self.private_kib += other.private_kib;
        self.written_kib += other.written_kib;
        self.shared_kib += other.shared_kib;
        self.proportional_kib += other.proportional_kib;
        self.threads += other.threads;
        self.descriptors += other.descriptors;
    }
}

impl Footprint {
    /// Of process `pid`.
    ///
    /// # Errors
    /// When it's gone or belongs to somebody else.
    pub fn of(pid: u32) -> Result<Self> {
        let path = format!("/proc/{pid}/smaps_rollup");
        let text = std::fs::read_to_string(&path).context(|| format!("read {path}"))?;
        let memory = memory_of(&text)
            .ok_or_else(|| Error::Unexpected(format!("{path} lacks a line: {text:?}")))?;
        Ok(Self {
            threads: entries(&format!("/proc/{pid}/task"))?,
            descriptors: entries(&format!("/proc/{pid}/fd"))?,
            ..memory
        })
    }

    /// Of process `pid` and all its descendants together.
    ///
    /// # Errors
    /// When one of them is gone.
    pub fn of_tree(pid: u32) -> Result<Self> {
        let mut sum = Self::of(pid)?;
        for child in descendants(pid)? {
            sum += Self::of(child)?;
        }
        Ok(sum)
    }
}

fn memory_of(rollup: &str) -> Option<Footprint> {
    let field = |name: &str| -> Option<u64> {
        rollup.lines().find_map(|line| {
            let value = line.strip_prefix(name)?.strip_prefix(':')?;
            value.trim().strip_suffix(" kB")?.parse().ok()
        })
    };
    Some(Footprint {
        private_kib: field("Private_Clean")? + field("Private_Dirty")?,
        written_kib: field("Private_Dirty")?,
        shared_kib: field("Shared_Clean")? + field("Shared_Dirty")?,
        proportional_kib: field("Pss")?,
        ..Default::default()
    })
}

fn entries(folder: &str) -> Result<u64> {
    let entries = std::fs::read_dir(folder).context(|| format!("list {folder}"))?;
    Ok(entries.count() as u64)
}

/// CPU time in milliseconds that process `pid` has used, its guest's included.
///
/// # Errors
/// When it's gone.
pub fn cpu_ms(pid: u32) -> Result<f64> {
    let folder = format!("/proc/{pid}/task");
    let mut nanos = 0;
    for task in std::fs::read_dir(&folder).context(|| format!("list {folder}"))? {
        let path = task.context(|| format!("list {folder}"))?.path();
        // First field: nanoseconds on a CPU. A thread may end between the two steps.
        let text = std::fs::read_to_string(path.join("schedstat")).unwrap_or_default();
        let on_cpu = text.split(' ').next().and_then(|field| field.parse().ok());
        nanos += on_cpu.unwrap_or(0u64);
    }
    Ok(nanos as f64 / 1e6)
}

/// All processes below `pid`.
///
/// # Errors
/// When /proc can't be listed.
pub fn descendants(pid: u32) -> Result<Vec<u32>> {
    let mut children: HashMap<u32, Vec<u32>> = HashMap::new();
    for entry in std::fs::read_dir("/proc").context(|| "list /proc".into())? {
        let name = entry.context(|| "list /proc".into())?.file_name();
        let Some(child) = name.to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        // Gone meanwhile.
        let Ok(stat) = std::fs::read_to_string(format!("/proc/{child}/stat")) else {
            continue;
        };
        if let Some(parent) = parent_of(&stat) {
            children.entry(parent).or_default().push(child);
        }
    }
    let mut found = Vec::new();
    let mut waiting = vec![pid];
    while let Some(parent) = waiting.pop() {
        let below = children.remove(&parent).unwrap_or_default();
        waiting.extend(&below);
        found.extend(below);
    }
    Ok(found)
}

/// The fourth field of proc(5)'s stat; the second is a name in parentheses and may hold anything.
fn parent_of(stat: &str) -> Option<u32> {
    let after_name = stat.rsplit_once(')')?.1;
    after_name.split_whitespace().nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_the_sum_of_clean_and_dirty() {
        let rollup = "5600-7fff ---p 00000000 00:00 0 [rollup]\nRss: 100 kB\nPss: 60 kB\n\
            Pss_Dirty: 1 kB\nShared_Clean: 40 kB\nShared_Dirty: 2 kB\nPrivate_Clean: 8 kB\n\
            Private_Dirty: 50 kB\n";
        let found = memory_of(rollup).unwrap();
        assert_eq!(
            (found.private_kib, found.shared_kib, found.proportional_kib),
            (58, 42, 60)
        );
        assert_eq!(found.written_kib, 50);
        assert_eq!(memory_of("Rss: 100 kB\n"), None);
    }

    #[test]
    fn a_name_with_parentheses_hides_no_parent() {
        assert_eq!(parent_of("7 (a) b) S 42 7 7 0"), Some(42));
        assert_eq!(parent_of("7"), None);
    }

    #[test]
    fn this_process_holds_something() {
        let own = Footprint::of(std::process::id()).unwrap();
        assert!(cpu_ms(std::process::id()).unwrap() > 0.0);
        assert!(
            own.private_kib > 0 && own.threads > 0 && own.descriptors > 2,
            "{own:?}"
        );
    }
}
