//! `Signal`.

use super::{Container, Containers, send_signal};
use crate::error::{Context, Failure, Kind};
use bulkhead_proto::agent::SignalRequest;
use rustix::io::Errno;
use std::sync::Arc;

/// Largest signal number, SIGRTMAX.
const MAX_SIGNAL: i32 = 64;

impl Containers {
    /// Sends a signal to one process of a container, or to all of them.
    pub fn signal(&self, request: &SignalRequest) -> Result<(), Failure> {
        let signal = i32::try_from(request.signal)
            .ok()
            .filter(|signal| (1..=MAX_SIGNAL).contains(signal))
            .ok_or_else(|| {
                let reason = format!("{} is not a signal; 1 to {MAX_SIGNAL} are", request.signal);
                Failure::invalid("signal", reason)
            })?;
        let container = self.container(&request.process.container_id)?;
        if request.all {
            return signal_all(&container, signal);
        }
        let process = container.process(&request.process.exec_id)?;
        if process.child.exit().is_some() {
            return Err(exited());
        }
        match send_signal(process.child.pid, signal) {
            Err(Errno::SRCH) => Err(exited()),
            sent => sent.context(|| format!("send signal {signal}")),
        }
    }
}

fn exited() -> Failure {
    Failure::new(Kind::NotFound, "the process has already exited")
}

fn signal_all(container: &Arc<Container>, signal: i32) -> Result<(), Failure> {
    let pids = container.all_pids()?;
    if pids.is_empty() {
        return Err(exited());
    }
    if let (libc::SIGKILL, Some(cgroup)) = (signal, &container.cgroup) {
        return cgroup.kill();
    }
    for pid in pids {
        // Between the reading of the list and here a pid may have become free; in the instant
        // that takes it isn't given out again, as pids are given out in turn.
        match send_signal(i32::try_from(pid).unwrap_or_default(), signal) {
            Ok(()) | Err(Errno::SRCH) => {}
            Err(error) => {
                return Err(Failure::internal(
                    format!("send signal {signal} to {pid}"),
                    error,
                ));
            }
        }
    }
    Ok(())
}
