//! Collects every child that dies: those of containers, whose end someone waits for, and the
//! orphans that PID 1 inherits.

use crate::cgroups::Cgroup;
use rustix::process::{WaitOptions, WaitStatus};
use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex};
use std::time::{SystemTime, UNIX_EPOCH};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// Exit code, or 128 + signal number.
    pub status: u32,
    /// Seconds since the epoch.
    pub seconds: i64,
    /// And nanoseconds.
    pub nanos: u32,
    /// The kernel has killed a process of this cgroup for want of memory.
    pub oom_killed: bool,
}

/// A child as its owner sees it.
#[derive(Debug, Clone)]
pub struct Child {
    /// In the guest's initial pid namespace.
    pub pid: i32,
    exit: watch::Receiver<Option<Exit>>,
}

impl Child {
    /// How it ended, if it has. As long as it hasn't, its pid can't belong to another process.
    pub fn exit(&self) -> Option<Exit> {
        *self.exit.borrow()
    }

    /// Waits for its end. `None` only when the reaper is gone.
    pub async fn wait(&self) -> Option<Exit> {
        let mut exit = self.exit.clone();
        let ended = exit.wait_for(Option::is_some).await.ok()?;
        *ended
    }
}

struct Watched {
    exit: watch::Sender<Option<Exit>>,
    cgroup: Option<Arc<Cgroup>>,
}

/// Owner of the table of running children.
#[derive(Clone, Default)]
pub struct Reaper {
    watched: Arc<Mutex<BTreeMap<i32, Watched>>>,
}

impl Reaper {
    /// Takes responsibility for a child that has just been made. There must be no await between
    /// the clone and this call: the loop below could otherwise take the child for an orphan.
    pub fn watch(&self, pid: i32, cgroup: Option<Arc<Cgroup>>) -> Child {
        let (sender, exit) = watch::channel(None);
        let watched = Watched {
            exit: sender,
            cgroup,
        };
        self.lock().insert(pid, watched);
        Child { pid, exit }
    }

    /// Reaps for ever.
    pub async fn run(self) -> io::Result<()> {
        let mut child_signal = signal(SignalKind::child())?;
        loop {
            self.reap_all();
            if child_signal.recv().await.is_none() {
                return Ok(());
            }
        }
    }

    fn reap_all(&self) {
        // One signal can stand for many children. ECHILD means that there are none at all.
        while let Ok(Some((pid, status))) = rustix::process::wait(WaitOptions::NOHANG) {
            let Some(code) = exit_code(status) else {
                continue;
            };
            let watched = self.lock().remove(&pid.as_raw_nonzero().get());
            if let Some(watched) = watched {
                let now = SystemTime::now()
                    .duration_since(UNIX_EPOCH)
                    .unwrap_or_default();
                watched.exit.send_replace(Some(Exit {
                    status: code,
                    seconds: i64::try_from(now.as_secs()).unwrap_or(i64::MAX),
                    nanos: now.subsec_nanos(),
                    oom_killed: watched.cgroup.is_some_and(|cgroup| cgroup.oom_killed()),
                }));
            }
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<i32, Watched>> {
        self.watched.lock().unwrap_or_else(|e| e.into_inner())
    }
}

fn exit_code(status: WaitStatus) -> Option<u32> {
    if let Some(code) = status.exit_status() {
        return u32::try_from(code).ok();
    }
    let signal = status.terminating_signal()?;
    u32::try_from(signal).ok().map(|signal| 128 + signal)
}
