//! Watching a process and all that it starts: what it executes, when it first enters a guest, and
//! when the guest reaches certain instructions. Nothing in the watched programs takes part, so that
//! any VMM is measured the same way.

use super::event::{
    Counter, FLAG_COMM, FLAG_COMM_EXEC, FLAG_SAMPLE_ID_ALL, FLAG_USE_CLOCKID, PERF_COUNT_SW_DUMMY,
    PERF_SAMPLE_RAW, PERF_SAMPLE_TID, PERF_SAMPLE_TIME, PERF_TYPE_SOFTWARE, PERF_TYPE_TRACEPOINT,
    PerfEventAttr, online_cpus,
};
use super::ring::{Record, Ring};
use super::tracepoint::{EmulateTracepoint, entry_tracepoint};
use crate::error::{Context, Error, Result};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const PERF_RECORD_COMM: u32 = 3;
const PERF_RECORD_SAMPLE: u32 = 9;
const PERF_RECORD_MISC_COMM_EXEC: u16 = 1 << 13;

/// Data pages of the rings: few records come by, or, of guest entries, many until the first has
/// been read.
const FEW: usize = 16;
const MANY: usize = 256;

/// Bytes before the raw data in a sample of thread, time and raw data: two ids, the time, a size.
const RAW_AT: usize = 4 + 4 + 8 + 4;

/// How long a wait may last before the watching thread looks whether it's still wanted.
const LOOK_UP: libc::c_int = 100;

/// Nanoseconds on CLOCK_MONOTONIC, the clock of [`Seen::at_ns`].
pub fn now_ns() -> u64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `time` is valid for writing; this clock always exists.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut time) };
    (time.tv_sec as u64) * 1_000_000_000 + time.tv_nsec as u64
}

/// What was seen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum What {
    /// A program began; its file name, cut to 15 bytes.
    Exec(String),
    /// For the first time a thread that isn't its process's first entered a guest. (The first
    /// thread may run a guest of a few instructions, to see how KVM treats it.)
    FirstEntry,
    /// The guest came to the instruction at this address.
    Instruction(u64),
}

/// One observation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// What it was.
    pub what: What,
    /// When, on CLOCK_MONOTONIC.
    pub at_ns: u64,
    /// The process.
    pub pid: u32,
    /// Emulated guest instructions of all watched processes together, read just after.
    pub instructions: Option<u64>,
}

/// A watch over one process and its children. Dropping it ends it.
#[derive(Debug)]
pub struct Watch {
    seen: Receiver<Seen>,
    counter: Option<Arc<Counter>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    /// Watches process `pid`, which should not have begun yet, and all that it will start. The
    /// guest's coming to one of `addresses` is seen only where KVM emulates guest kernel mode.
    ///
    /// # Errors
    /// When the kernel refuses; it takes root.
    pub fn start(pid: u32, addresses: &[u64]) -> Result<Self> {
        let emulate = EmulateTracepoint::find().ok();
        let counter = emulate
            .map(|tracepoint| tracepoint.count(pid))
            .transpose()?
            .map(Arc::new);
        let (sender, seen) = mpsc::channel();
        let mut watcher = Watcher {
            execs: open(pid, PERF_TYPE_SOFTWARE, PERF_COUNT_SW_DUMMY, FEW, None)?,
            entries: Vec::new(),
            addresses: Vec::new(),
            rip_offset: emulate.map_or(0, |tracepoint| tracepoint.rip_offset),
            counter: counter.clone(),
            sender,
        };
        if let Ok(id) = entry_tracepoint() {
            watcher.entries = open(pid, PERF_TYPE_TRACEPOINT, id, MANY, None)?;
        }
        if let Some(EmulateTracepoint { id, .. }) = emulate {
            let first = open(pid, PERF_TYPE_TRACEPOINT, id, MANY, None)?;
            watcher.entries.extend(first);
            if !addresses.is_empty() {
                let filter = filter_for(addresses);
                watcher.addresses = open(pid, PERF_TYPE_TRACEPOINT, id, FEW, Some(&filter))?;
            }
        }
        let stop = Arc::new(AtomicBool::new(false));
        let thread = {
            let stop = stop.clone();
            std::thread::spawn(move || watcher.run(&stop))
        };
        Ok(Self {
            seen,
            counter,
            stop,
            thread: Some(thread),
        })
    }

    /// Emulated guest instructions so far; `None` where the host doesn't count them.
    ///
    /// # Errors
    /// When the count can't be read.
    pub fn instructions(&self) -> Result<Option<u64>> {
        self.counter.as_deref().map(Counter::read).transpose()
    }

    /// Waits for the next observation that `wanted` accepts; those before it are dropped.
    ///
    /// # Errors
    /// When it doesn't come in time.
    pub fn wait_for(
        &self,
        what: &str,
        timeout: Duration,
        mut wanted: impl FnMut(&Seen) -> bool,
    ) -> Result<Seen> {
        let end = Instant::now() + timeout;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            match self.seen.recv_timeout(left) {
                Ok(seen) if wanted(&seen) => return Ok(seen),
                Ok(_) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(Error::Unexpected(format!(
                        "waiting for {what}: all that was watched has ended"
                    )));
                }
                Err(RecvTimeoutError::Timeout) => {
                    return Err(Error::TimedOut {
                        what: what.into(),
                        seconds: timeout.as_secs(),
                        detail: String::new(),
                    });
                }
            }
        }
    }

    /// What has been seen and not been taken yet.
    pub fn seen(&self) -> Vec<Seen> {
        self.seen.try_iter().collect()
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A filter of ftrace (Documentation/trace/events.rst) that lets these instruction pointers pass.
fn filter_for(addresses: &[u64]) -> String {
    let terms: Vec<String> = addresses
        .iter()
        .map(|address| format!("rip == {address:#x}"))
        .collect();
    terms.join(" || ")
}

/// The event on each CPU, with programs' names and times.
fn open(pid: u32, kind: u32, config: u64, pages: usize, filter: Option<&str>) -> Result<Vec<Ring>> {
    let mut attr = PerfEventAttr::inherited(kind, config);
    attr.sample_period = 1;
    attr.sample_type = PERF_SAMPLE_TID | PERF_SAMPLE_TIME | PERF_SAMPLE_RAW;
    attr.flags |= FLAG_SAMPLE_ID_ALL | FLAG_USE_CLOCKID;
    if kind == PERF_TYPE_SOFTWARE {
        attr.flags |= FLAG_COMM | FLAG_COMM_EXEC;
    }
    attr.wakeup_events = 1;
    attr.clockid = libc::CLOCK_MONOTONIC;
    (0..online_cpus())
        .map(|cpu| {
            let event = attr.open(pid, cpu)?;
            if let Some(filter) = filter {
                set_filter(&event, filter)?;
            }
            Ring::map(event, pages)
        })
        .collect()
}

fn set_filter(event: &File, filter: &str) -> Result<()> {
    /// _IOW('$', 6, char *)
    const PERF_EVENT_IOC_SET_FILTER: libc::c_ulong = 0x4008_2406;
    let text = std::ffi::CString::new(filter).map_err(std::io::Error::from);
    let text = text.context(|| format!("filter {filter:?}"))?;
    // SAFETY: the request reads a C string, which lives until the call has returned.
    let done = unsafe { libc::ioctl(event.as_raw_fd(), PERF_EVENT_IOC_SET_FILTER, text.as_ptr()) };
    if done == 0 {
        return Ok(());
    }
    Err(std::io::Error::last_os_error())
        .context(|| format!("set the filter {filter:?} on a tracepoint"))
}

/// The watching thread's.
struct Watcher {
    execs: Vec<Ring>,
    /// Dropped, with all its cost, once the first entry has been seen.
    entries: Vec<Ring>,
    addresses: Vec<Ring>,
    rip_offset: usize,
    counter: Option<Arc<Counter>>,
    sender: Sender<Seen>,
}

impl Watcher {
    fn run(mut self, stop: &AtomicBool) {
        be_prompt();
        while !stop.load(Ordering::Relaxed) {
            let ended = self.wait();
            let mut found = Vec::new();
            for ring in &self.execs {
                ring.drain(|record| found.extend(exec_of(&record)));
            }
            for ring in &self.addresses {
                ring.drain(|record| found.extend(instruction_of(&record, self.rip_offset)));
            }
            let mut entries = Vec::new();
            for ring in &self.entries {
                ring.drain(|record| entries.extend(entry_of(&record)));
            }
            let first = entries.into_iter().min_by_key(|entry: &Seen| entry.at_ns);
            if first.is_some() {
                self.entries.clear();
            }
            found.extend(first);
            if !found.is_empty() {
                let instructions = self.counter.as_deref().and_then(|c| c.read().ok());
                found.sort_by_key(|seen| seen.at_ns);
                for seen in found {
                    let _ = self.sender.send(Seen {
                        instructions,
                        ..seen
                    });
                }
            }
            // Whoever waits for more learns by the channel's end that there is none.
            if ended {
                return;
            }
        }
    }

    /// Until there is something to read, or for a moment. Whether all that was watched has ended:
    /// then no more comes than is there now.
    fn wait(&self) -> bool {
        let rings = [&self.execs, &self.entries, &self.addresses];
        let mut polled: Vec<libc::pollfd> = rings
            .into_iter()
            .flatten()
            .map(|ring| libc::pollfd {
                fd: ring.descriptor(),
                events: libc::POLLIN,
                revents: 0,
            })
            .collect();
        // SAFETY: `polled` is an array of as many entries as are named.
        unsafe { libc::poll(polled.as_mut_ptr(), polled.len() as libc::nfds_t, LOOK_UP) };
        polled
            .iter()
            .all(|entry| entry.revents & libc::POLLHUP != 0)
    }
}

/// Puts this thread before all ordinary ones: instructions are counted until it reads their count.
/// Where it may not be, counts are a little too high on a busy machine.
fn be_prompt() {
    let lowest = libc::sched_param { sched_priority: 1 };
    // SAFETY: 0 is the calling thread, and the parameter is valid.
    unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &lowest) };
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_ne_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

fn seen(what: What, pid: u32, at_ns: u64) -> Seen {
    Seen {
        what,
        at_ns,
        pid,
        instructions: None,
    }
}

/// PERF_RECORD_COMM: two ids, the name, and at the end two ids and the time again.
fn exec_of(record: &Record<'_>) -> Option<Seen> {
    if record.kind != PERF_RECORD_COMM || record.misc & PERF_RECORD_MISC_COMM_EXEC == 0 {
        return None;
    }
    let body = record.body;
    let time_at = body.len().checked_sub(8)?;
    let name = body.get(8..time_at.checked_sub(8)?)?;
    let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
    let name = String::from_utf8_lossy(name).into_owned();
    Some(seen(
        What::Exec(name),
        u32_at(body, 0)?,
        u64_at(body, time_at)?,
    ))
}

/// A sample of a thread that isn't its process's first.
fn entry_of(record: &Record<'_>) -> Option<Seen> {
    let (pid, tid) = (u32_at(record.body, 0)?, u32_at(record.body, 4)?);
    if record.kind != PERF_RECORD_SAMPLE || pid == tid {
        return None;
    }
    Some(seen(What::FirstEntry, pid, u64_at(record.body, 8)?))
}

fn instruction_of(record: &Record<'_>, rip_offset: usize) -> Option<Seen> {
    if record.kind != PERF_RECORD_SAMPLE {
        return None;
    }
    let rip = u64_at(record.body, RAW_AT + rip_offset)?;
    let pid = u32_at(record.body, 0)?;
    Some(seen(What::Instruction(rip), pid, u64_at(record.body, 8)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(words: &[u64]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_ne_bytes()).collect()
    }

    #[test]
    fn a_program_is_told_by_name_process_and_time() {
        let mut body = bytes(&[7 | 9 << 32]);
        body.extend_from_slice(b"bulkhead-vmm\0\0\0\0");
        body.extend(bytes(&[7 | 9 << 32, 123_456]));
        let mut record = Record {
            kind: PERF_RECORD_COMM,
            misc: PERF_RECORD_MISC_COMM_EXEC,
            body: &body,
        };
        let exec = exec_of(&record).unwrap();
        assert_eq!(exec.what, What::Exec("bulkhead-vmm".into()));
        assert_eq!((exec.pid, exec.at_ns), (7, 123_456));
        record.misc = 0;
        assert_eq!(exec_of(&record), None, "a thread's new name is no program");
        record.body = &[];
        assert_eq!(exec_of(&record), None);
    }

    #[test]
    fn the_first_thread_does_not_count_as_an_entry() {
        for (tid, counts) in [(7, false), (8, true)] {
            let body = bytes(&[7 | tid << 32, 5, 0]);
            let record = Record {
                kind: PERF_RECORD_SAMPLE,
                misc: 0,
                body: &body,
            };
            assert_eq!(entry_of(&record).is_some(), counts, "{tid}");
        }
    }

    #[test]
    fn an_instruction_is_told_by_its_address() {
        // Two ids, the time, the raw data's size and its first four bytes, then bytes 4 to 11.
        let mut body = bytes(&[7 | 8 << 32, 5]);
        body.extend_from_slice(&16u32.to_ne_bytes());
        body.extend(bytes(&[0, 0xffff_ffff_8100_0000]));
        let record = Record {
            kind: PERF_RECORD_SAMPLE,
            misc: 0,
            body: &body,
        };
        let instruction = instruction_of(&record, 8).unwrap();
        assert_eq!(instruction.what, What::Instruction(0xffff_ffff_8100_0000));
        assert_eq!((instruction.pid, instruction.at_ns), (7, 5));
        assert_eq!(instruction_of(&record, 64), None, "beyond the record");
    }

    #[test]
    fn a_filter_lets_each_address_pass() {
        assert_eq!(filter_for(&[1, 0xab]), "rip == 0x1 || rip == 0xab");
    }
}
