//! What a process has used: CPU time and private memory, as /proc tells.

use bulkhead_tests::error::{Context, Error, Result};
use std::path::Path;

fn read(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).context(|| format!("read {}", path.display()))
}

/// CPU time in milliseconds that process `pid` has used for itself: all of what its other threads
/// ran, and of its vCPU threads only what they ran in user space outside the guest (what KVM does
/// for the guest in the kernel is the guest's work, all the more where it emulates it).
///
/// # Errors
/// When /proc can't be read.
pub fn vmm_cpu_ms(pid: u32) -> Result<f64> {
    let tasks = format!("/proc/{pid}/task");
    let mut total = 0.0;
    for task in std::fs::read_dir(&tasks).context(|| format!("read {tasks}"))? {
        let task = task.context(|| format!("read {tasks}"))?.path();
        if read(&task.join("comm"))?.starts_with("vcpu") {
            total += user_ms_outside_guest(&read(&task.join("stat"))?)?;
        } else {
            // First field of schedstat: nanoseconds on a CPU.
            let schedstat = read(&task.join("schedstat"))?;
            let nanos = schedstat
                .split(' ')
                .next()
                .and_then(|field| field.parse::<f64>().ok());
            total += nanos.ok_or_else(|| unexpected("schedstat", &schedstat))? / 1e6;
        }
    }
    Ok(total)
}

fn unexpected(what: &str, text: &str) -> Error {
    Error::Unexpected(format!("cannot understand {what}: {text:?}"))
}

/// utime less guest_time (proc(5): fields 14 and 43; the former includes the latter).
fn user_ms_outside_guest(stat: &str) -> Result<f64> {
    // The second field is the name in parentheses and may hold blanks.
    let fields: Vec<&str> = stat
        .rsplit(')')
        .next()
        .unwrap_or("")
        .split_whitespace()
        .collect();
    let field = |number: usize| fields.get(number - 3).and_then(|f| f.parse::<f64>().ok());
    match (field(14), field(43)) {
        (Some(user), Some(guest)) => {
            // SAFETY: sysconf only reads.
            let ticks = unsafe { libc::sysconf(libc::_SC_CLK_TCK) } as f64;
            Ok((user - guest).max(0.0) * 1000.0 / ticks)
        }
        _ => Err(unexpected("stat", stat)),
    }
}

/// Private memory of process `pid` in KiB, its mapping of `guest_bytes` of guest memory left out.
///
/// # Errors
/// When /proc can't be read or holds no mapping of that size.
pub fn private_kib(pid: u32, guest_bytes: u64) -> Result<u64> {
    let text = read(Path::new(&format!("/proc/{pid}/smaps")))?;
    private_kib_of(&text, guest_bytes / 1024)
        .ok_or_else(|| Error::Unexpected(format!("process {pid} maps no guest memory")))
}

fn private_kib_of(smaps: &str, guest_kib: u64) -> Option<u64> {
    let mut mappings: Vec<(u64, u64)> = Vec::new();
    for line in smaps.lines() {
        let Some((key, value)) = line.split_once(':') else {
            continue;
        };
        let kib = || {
            value
                .trim()
                .strip_suffix(" kB")
                .and_then(|v| v.parse::<u64>().ok())
        };
        match key {
            "Size" => mappings.push((kib()?, 0)),
            "Private_Clean" | "Private_Dirty" => mappings.last_mut()?.1 += kib()?,
            _ => {}
        }
    }
    // The one whose size is nearest: the kernel may have merged a neighbour into it.
    let guest = (0..mappings.len())
        .filter(|&index| mappings[index].0 >= guest_kib)
        .min_by_key(|&index| mappings[index].0)?;
    mappings.remove(guest);
    Some(mappings.iter().map(|(_, private)| private).sum())
}
