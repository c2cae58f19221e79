//! The agent's own messages. There are few: what goes wrong with a request is told to its caller.
//!
//! In a guest, standard error is the kernel's log, whose errors reach the VM's console even when
//! it is quiet, and with it the report of a guest that has ended by itself.

use rustix::fs::{Mode, OFlags};
use std::fmt::Display;
use std::io::Write;

/// Level "error" of the kernel's log, as sd-daemon(3) writes it as well.
const ERROR: &str = "<3>";

/// Writes one message. It has to be one write: the kernel makes a record of each.
pub fn error(message: impl Display) {
    let line = format!("{ERROR}bulkhead-agent: {message}\n");
    // There is no other place to complain about this.
    let _ = std::io::stderr().write_all(line.as_bytes());
}

/// Makes the kernel's log standard error, and panics one message each.
pub fn to_kernel() -> rustix::io::Result<()> {
    let flags = OFlags::WRONLY | OFlags::CLOEXEC;
    let log = rustix::fs::open("/dev/kmsg", flags, Mode::empty())?;
    rustix::stdio::dup2_stderr(&log)?;
    // The kernel panics right after this, as PID 1 aborts.
    std::panic::set_hook(Box::new(|panic| error(panic)));
    Ok(())
}
