//! perf_event_open, and events that are only counted.

use crate::error::{Context, Result};
use std::ffi::CString;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, FromRawFd};

/// `struct perf_event_attr` up to its fourth published size (PERF_ATTR_SIZE_VER3, 96 bytes), the
/// first that can name a clock; every kernel since 4.1 takes it.
#[repr(C)]
#[derive(Debug, Default)]
pub(super) struct PerfEventAttr {
    pub kind: u32,
    pub size: u32,
    pub config: u64,
    pub sample_period: u64,
    pub sample_type: u64,
    pub read_format: u64,
    pub flags: u64,
    pub wakeup_events: u32,
    pub bp_type: u32,
    pub bp_addr: u64,
    pub config2: u64,
    pub branch_sample_type: u64,
    pub sample_regs_user: u64,
    pub sample_stack_user: u32,
    pub clockid: i32,
}

pub(super) const PERF_TYPE_SOFTWARE: u32 = 1;
pub(super) const PERF_TYPE_TRACEPOINT: u32 = 2;
pub(super) const PERF_COUNT_SW_DUMMY: u64 = 9;
pub(super) const PERF_SAMPLE_TID: u64 = 1 << 1;
pub(super) const PERF_SAMPLE_TIME: u64 = 1 << 2;
pub(super) const PERF_SAMPLE_RAW: u64 = 1 << 10;
pub(super) const FLAG_INHERIT: u64 = 1 << 1;
pub(super) const FLAG_COMM: u64 = 1 << 9;
pub(super) const FLAG_SAMPLE_ID_ALL: u64 = 1 << 18;
pub(super) const FLAG_COMM_EXEC: u64 = 1 << 24;
pub(super) const FLAG_USE_CLOCKID: u64 = 1 << 25;
const PERF_FLAG_FD_CLOEXEC: libc::c_ulong = 1 << 3;

impl PerfEventAttr {
    /// Of this type and number, for a process and all that it starts from now on.
    pub fn inherited(kind: u32, config: u64) -> Self {
        Self {
            kind,
            size: size_of::<Self>() as u32,
            config,
            flags: FLAG_INHERIT,
            ..Default::default()
        }
    }

    /// Opens the event for process `pid` on `cpu`, or on all with -1.
    ///
    /// # Errors
    /// What perf_event_open says; it needs CAP_PERFMON or root.
    pub fn open(&self, pid: u32, cpu: i32) -> Result<File> {
        // SAFETY: `self` is a valid attribute of the size it names; no group, no output descriptor.
        let fd = unsafe {
            libc::syscall(
                libc::SYS_perf_event_open,
                self as *const Self,
                pid as libc::pid_t,
                cpu,
                -1,
                PERF_FLAG_FD_CLOEXEC,
            )
        };
        if fd < 0 {
            let cause: std::result::Result<File, _> = Err(std::io::Error::last_os_error());
            return cause.context(|| format!("perf_event_open for process {pid} on CPU {cpu}"));
        }
        // SAFETY: the call has just returned this new descriptor.
        Ok(unsafe { File::from_raw_fd(fd as i32) })
    }
}

/// A running count.
#[derive(Debug)]
pub struct Counter {
    pub(super) event: File,
}

/// `PERF_EVENT_IOC_SET_FILTER` of include/uapi/linux/perf_event.h.
const SET_FILTER: libc::c_ulong = 0x4008_2406;

impl Counter {
    /// Counts only those events of a tracepoint that a filter lets pass
    /// (Documentation/trace/events.rst).
    pub(super) fn filter(&self, filter: &str) -> Result<()> {
        let what = || format!("count only events with {filter:?}");
        let text = CString::new(filter).map_err(std::io::Error::other);
        let text = text.context(what)?;
        // SAFETY: the kernel reads a C string, which lives across the call.
        let set = unsafe { libc::ioctl(self.event.as_raw_fd(), SET_FILTER, text.as_ptr()) };
        if set != 0 {
            let cause: std::result::Result<(), _> = Err(std::io::Error::last_os_error());
            return cause.context(what);
        }
        Ok(())
    }

    /// The count so far.
    ///
    /// # Errors
    /// When the event can't be read.
    pub fn read(&self) -> Result<u64> {
        let mut bytes = [0; 8];
        (&self.event)
            .read_exact(&mut bytes)
            .context(|| "read the instruction count".into())?;
        Ok(u64::from_ne_bytes(bytes))
    }
}

pub(super) fn online_cpus() -> i32 {
    // SAFETY: sysconf only reads.
    let cpus = unsafe { libc::sysconf(libc::_SC_NPROCESSORS_ONLN) };
    i32::try_from(cpus).unwrap_or(1).max(1)
}
