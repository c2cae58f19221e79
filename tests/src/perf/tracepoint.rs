//! Tracepoints of KVM: their numbers and the layout of their records, as tracefs tells them.

use super::event::{Counter, PERF_SAMPLE_RAW, PERF_TYPE_TRACEPOINT, PerfEventAttr, online_cpus};
use super::ring::Ring;
use crate::error::{Context, Error, Result};
use std::collections::HashMap;
use std::path::Path;

const PERF_RECORD_SAMPLE: u32 = 9;

/// Data pages of a ring that holds the samples of a profile: 512 KiB.
const PROFILE_PAGES: usize = 128;

/// The tracepoint `kvm:kvm_emulate_insn`: its number, and where in its record the guest's
/// instruction pointer is.
#[derive(Debug, Clone, Copy)]
pub struct EmulateTracepoint {
    pub(super) id: u64,
    pub(super) rip_offset: usize,
}

impl EmulateTracepoint {
    /// Looks the tracepoint up. Mounts tracefs in a mount namespace of this thread's own when it
    /// isn't mounted, so call it from the thread that may lose sight of later mounts.
    ///
    /// # Errors
    /// When the host has no such tracepoint or this process may not see it.
    pub fn find() -> Result<Self> {
        let (id, format) = look_up("kvm_emulate_insn")?;
        let rip_offset = field_offset(&format, "rip")
            .ok_or_else(|| Error::Unexpected("kvm_emulate_insn has no 64-bit field rip".into()))?;
        Ok(Self { id, rip_offset })
    }

    /// Counts in process `pid` and in all threads and processes that it starts from now on.
    ///
    /// # Errors
    /// What perf_event_open says; it needs CAP_PERFMON or root.
    pub fn count(self, pid: u32) -> Result<Counter> {
        let attr = PerfEventAttr::inherited(PERF_TYPE_TRACEPOINT, self.id);
        Ok(Counter {
            event: attr.open(pid, -1)?,
        })
    }

    /// Takes a sample at every `period`-th instruction of process `pid` and of all threads that it
    /// starts from now on.
    ///
    /// # Errors
    /// What perf_event_open or mmap says.
    pub fn sample(self, pid: u32, period: u64) -> Result<Sampler> {
        let attr = PerfEventAttr {
            sample_period: period,
            sample_type: PERF_SAMPLE_RAW,
            ..PerfEventAttr::inherited(PERF_TYPE_TRACEPOINT, self.id)
        };
        let mut rings = Vec::new();
        // An inherited event can only be mapped when it is bound to a CPU: one for each.
        for cpu in 0..online_cpus() {
            rings.push(Ring::map(attr.open(pid, cpu)?, PROFILE_PAGES)?);
        }
        Ok(Sampler {
            rings,
            rip_offset: self.rip_offset,
        })
    }
}

/// Counts the returns from KVM to user space (`kvm:kvm_userspace_exit`) of process `pid` and of all
/// threads and processes that it starts from now on.
///
/// # Errors
/// When the host has no such tracepoint, and what perf_event_open says.
pub fn count_userspace_exits(pid: u32) -> Result<Counter> {
    let (id, _) = look_up("kvm_userspace_exit")?;
    let attr = PerfEventAttr::inherited(PERF_TYPE_TRACEPOINT, id);
    Ok(Counter {
        event: attr.open(pid, -1)?,
    })
}

/// `KVM_EXIT_IO` of include/uapi/linux/kvm.h.
const KVM_EXIT_IO: u32 = 2;

/// Counts those of [`count_userspace_exits`] that are for an access to a port.
///
/// # Errors
/// As there, and when the kernel takes no filter.
pub fn count_port_exits(pid: u32) -> Result<Counter> {
    let counter = count_userspace_exits(pid)?;
    counter.filter(&format!("reason == {KVM_EXIT_IO}"))?;
    Ok(counter)
}

/// Number of the tracepoint `kvm:kvm_entry`: KVM enters the guest. A software KVM has it but may
/// never come by.
pub(super) fn entry_tracepoint() -> Result<u64> {
    Ok(look_up("kvm_entry")?.0)
}

/// Number and record format of a tracepoint of KVM.
fn look_up(name: &str) -> Result<(u64, String)> {
    let root = Path::new("/sys/kernel/tracing");
    if !root.join("events").exists() {
        mount_tracefs_for_this_thread(root)?;
    }
    let event = root.join("events/kvm").join(name);
    let read = |name: &str| {
        let path = event.join(name);
        std::fs::read_to_string(&path).context(|| format!("read {}", path.display()))
    };
    let id = read("id")?;
    let id = id
        .trim()
        .parse()
        .map_err(|_| Error::Unexpected(format!("tracepoint id {id:?}")))?;
    Ok((id, read("format")?))
}

/// tracefs in a namespace of this thread, so that the host's mounts stay as they are.
fn mount_tracefs_for_this_thread(root: &Path) -> Result<()> {
    use nix::mount::{MsFlags, mount};
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS)
        .context(|| "make a mount namespace for tracefs".into())?;
    mount(
        None::<&str>,
        "/",
        None::<&str>,
        MsFlags::MS_REC | MsFlags::MS_PRIVATE,
        None::<&str>,
    )
    .context(|| "make the mounts private".into())?;
    mount(
        Some("tracefs"),
        root,
        Some("tracefs"),
        MsFlags::empty(),
        None::<&str>,
    )
    .context(|| format!("mount tracefs on {}", root.display()))
}

/// Offset of an 8-byte field in a tracepoint's `format` file.
fn field_offset(format: &str, name: &str) -> Option<usize> {
    format.lines().find_map(|line| {
        let mut parts = line.trim().split(';').map(str::trim);
        let declaration = parts.next()?.strip_prefix("field:")?;
        if declaration.rsplit([' ', '\t']).next()? != name {
            return None;
        }
        let offset = parts.next()?.strip_prefix("offset:")?.parse().ok()?;
        (parts.next()?.strip_prefix("size:")? == "8").then_some(offset)
    })
}

/// Samples of guest instruction pointers.
#[derive(Debug)]
pub struct Sampler {
    rings: Vec<Ring>,
    rip_offset: usize,
}

impl Sampler {
    /// Adds the samples taken since the last call to `samples`, by address. Call it more often than
    /// the rings fill up.
    pub fn drain(&mut self, samples: &mut HashMap<u64, u64>) {
        for ring in &self.rings {
            ring.drain(|record| {
                // A raw sample is a 32-bit size followed by the tracepoint's record.
                let at = 4 + self.rip_offset;
                let rip = record.body.get(at..at + 8).and_then(|b| b.try_into().ok());
                if let (PERF_RECORD_SAMPLE, Some(rip)) = (record.kind, rip) {
                    *samples.entry(u64::from_ne_bytes(rip)).or_default() += 1;
                }
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_is_found_by_its_name_and_size() {
        let format = "name: kvm_emulate_insn\nformat:\n\
            \tfield:unsigned short common_type;\toffset:0;\tsize:2;\tsigned:0;\n\n\
            \tfield:__u64 rip;\toffset:8;\tsize:8;\tsigned:0;\n\
            \tfield:__u32 csbase;\toffset:16;\tsize:4;\tsigned:0;\n";
        assert_eq!(field_offset(format, "rip"), Some(8));
        assert_eq!(field_offset(format, "csbase"), None, "not 8 bytes");
        assert_eq!(field_offset(format, "ip"), None);
    }
}
