//! One process's life as the daemon sees it.
//!
//! ```text
//!            created          start             started            exit            delete
//! Creating ─────────► Created ─────► Starting ─────────► Running ─────► Exited ─────► Deleting ─► gone
//!                        │               │ start failed                    ▲             │ failed
//!                        │               └──► Created                      │             └──► Exited
//!                        └── killed before its start ──────────────────────┘
//! ```

use crate::error::{Error, Result};
use crate::sandbox::StdioPaths;
use crate::stdio::Copies;
use std::time::SystemTime;
use tokio::sync::oneshot;

/// Where an answer goes.
pub(crate) type Reply<T> = oneshot::Sender<Result<T>>;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExitStatus {
    /// Exit code, or 128 + the signal's number; at most 255.
    pub code: u32,
    /// When, by the guest's clock if that is plausible, else the host's.
    pub at: SystemTime,
}

impl ExitStatus {
    /// Killed by SIGKILL, now: what a process gets whose VM is gone.
    pub fn killed() -> Self {
        Self::signalled(libc::SIGKILL as u32)
    }

    /// Ended by `signal`, now.
    pub(crate) fn signalled(signal: u32) -> Self {
        Self {
            code: 128_u32.saturating_add(signal).min(255),
            at: SystemTime::now(),
        }
    }
}

/// A process's state, in the daemon's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// Set up, not yet started.
    Created,
    /// Started.
    Running,
    /// Started, and standing still with its container.
    Paused,
    /// Ended.
    Stopped(ExitStatus),
}

/// See the module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    Creating,
    Created,
    Starting,
    Running,
    Exited(ExitStatus),
    Deleting(ExitStatus),
}

impl Phase {
    pub fn name(self) -> &'static str {
        match self {
            Phase::Creating => "still being created",
            Phase::Created => "created but not started",
            Phase::Starting => "starting",
            Phase::Running => "running",
            Phase::Exited(_) => "stopped",
            Phase::Deleting(_) => "being deleted",
        }
    }
}

/// A container's init or one of its execs.
pub(crate) struct Process {
    pub phase: Phase,
    pub paths: StdioPaths,
    pub copies: Option<Copies>,
    /// The daemon has closed stdin, perhaps before there were copies.
    stdin_closed: bool,
    /// An exit that was heard of before the start's answer.
    pub early_exit: Option<ExitStatus>,
    /// The caller of a delete that waits for the process to be killed.
    pub delete_after_exit: Option<Reply<crate::sandbox::Deleted>>,
    waiters: Vec<Reply<ExitStatus>>,
}

impl Process {
    pub fn new(phase: Phase, paths: StdioPaths) -> Self {
        Self {
            phase,
            paths,
            copies: None,
            stdin_closed: false,
            early_exit: None,
            delete_after_exit: None,
            waiters: Vec::new(),
        }
    }

    /// Takes the copies of its streams, once they run.
    pub fn attach(&mut self, copies: Option<Copies>) {
        self.copies = copies;
        if self.stdin_closed {
            self.close_stdin();
        }
    }

    /// Ends stdin once what the client has written is through. A client whose stdin is short asks
    /// for it while the process is still being started; it holds from then on.
    pub fn close_stdin(&mut self) {
        self.stdin_closed = true;
        if let Some(copies) = &mut self.copies {
            copies.close_stdin();
        }
    }

    /// Whether it may still run in the guest.
    pub fn is_active(&self) -> bool {
        matches!(self.phase, Phase::Starting | Phase::Running)
    }

    /// How it ended, if it has.
    pub fn exit(&self) -> Option<ExitStatus> {
        match self.phase {
            Phase::Exited(status) | Phase::Deleting(status) => Some(status),
            _ => None,
        }
    }

    pub fn status(&self) -> Option<Status> {
        match self.phase {
            Phase::Creating => None,
            // Not running before its start has been answered.
            Phase::Created | Phase::Starting => Some(Status::Created),
            Phase::Running => Some(Status::Running),
            Phase::Exited(status) | Phase::Deleting(status) => Some(Status::Stopped(status)),
        }
    }

    /// Answers `waiter` at once or at the process's end.
    pub fn wait(&mut self, waiter: Reply<ExitStatus>) {
        match self.exit() {
            Some(status) => drop(waiter.send(Ok(status))),
            None => {
                // Callers that went away would pile up otherwise.
                self.waiters.retain(|waiter| !waiter.is_closed());
                self.waiters.push(waiter);
            }
        }
    }

    /// Takes note of the end and tells everyone who waits. False if it had ended before.
    pub fn set_exited(&mut self, status: ExitStatus) -> bool {
        if self.exit().is_some() {
            return false;
        }
        self.phase = Phase::Exited(status);
        for waiter in self.waiters.drain(..) {
            let _ = waiter.send(Ok(status));
        }
        true
    }

    /// The process will never exist: its waiters have nothing to wait for.
    pub fn abandon(&mut self, why: &Error) {
        for waiter in self.waiters.drain(..) {
            let _ = waiter.send(Err(why.clone()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_wait_and_a_late_one_is_answered_at_once() {
        let mut process = Process::new(Phase::Running, StdioPaths::default());
        let mut waiting: Vec<_> = (0..3)
            .map(|_| {
                let (reply, answer) = oneshot::channel();
                process.wait(reply);
                answer
            })
            .collect();
        drop(waiting.pop());
        let status = ExitStatus {
            code: 3,
            at: SystemTime::now(),
        };
        assert!(process.set_exited(status));
        assert!(
            !process.set_exited(ExitStatus::killed()),
            "only the first end counts"
        );
        for mut answer in waiting {
            assert_eq!(answer.try_recv().unwrap().unwrap(), status);
        }
        let (reply, mut answer) = oneshot::channel();
        process.wait(reply);
        assert_eq!(answer.try_recv().unwrap().unwrap(), status);
        assert_eq!(process.status(), Some(Status::Stopped(status)));
    }

    #[test]
    fn a_signals_status_is_128_and_its_number() {
        assert_eq!(ExitStatus::killed().code, 137);
        assert_eq!(ExitStatus::signalled(15).code, 143);
        assert_eq!(ExitStatus::signalled(u32::MAX).code, 255);
    }
}
