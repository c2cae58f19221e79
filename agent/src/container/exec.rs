//! `Exec`: a further process in a running container.

use super::{Containers, Id, MAX_EXECS, Pids, Process, abandon};
use crate::error::{Failure, Kind};
use crate::process::{Copiers, Joined, Progress, Shared, Spawned, WindowSize};
use crate::spec::parse_process;
use crate::streams::{HostStreams, Tokens};
use bulkhead_proto::agent::ExecRequest;
use std::sync::PoisonError;

impl Containers {
    /// Returns the pid of a process whose program runs. After a failure nothing is left.
    pub async fn exec(&self, request: ExecRequest) -> Result<u32, Failure> {
        let tokens = Tokens::from(&*request.streams);
        let executed = self.try_exec(&request, tokens).await;
        if executed.is_err() {
            self.streams.discard(tokens.iter());
        }
        executed
    }

    async fn try_exec(&self, request: &ExecRequest, tokens: Tokens) -> Result<u32, Failure> {
        let container = self.container(&request.container_id)?;
        let id = Id::new("exec_id", &request.exec_id)?;
        let plan = parse_process(&request.process_json)?;
        let size = WindowSize::new(request.terminal_rows, request.terminal_columns)?;
        let created = container
            .waiting
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .is_some();
        if created || container.init.child.exit().is_some() {
            return Err(Failure::new(
                Kind::FailedPrecondition,
                format!(
                    "container {:?} is not running, so nothing can be executed in it",
                    request.container_id
                ),
            ));
        }
        container.refuse_paused()?;
        let reservation = container.execs.reserve("exec", &id, MAX_EXECS)?;
        let host = self.streams.claim(tokens).await?;
        let joined = Joined {
            init: &container.pidfd,
            other_pids: container.pids != Pids::Guest,
            ids: container.ids.as_deref(),
            shared: Shared {
                seccomp: container.seccomp.as_deref(),
                personality: container.personality,
            },
        };
        let spawned = self
            .spawner
            .exec(&plan, joined, container.cgroup.as_ref(), &host, size)?;
        let pid = u32::try_from(spawned.child.pid).unwrap_or_default();
        reservation.fill(running(spawned, host).await?);
        Ok(pid)
    }
}

/// Waits until the program runs.
async fn running(mut spawned: Spawned, host: HostStreams) -> Result<Process, Failure> {
    let mut master = None;
    let executed = loop {
        match spawned.control.next().await {
            Ok(Progress::Ready(terminal)) => master = terminal,
            Ok(Progress::Gone) => {
                let ends = std::mem::take(&mut spawned.ends);
                break Copiers::start(host, ends, master);
            }
            Err(failure) => break Err(failure),
        }
    };
    match executed {
        Ok(copiers) => Ok(Process {
            child: spawned.child,
            copiers,
        }),
        Err(failure) => {
            abandon(&spawned).await;
            Err(failure)
        }
    }
}
