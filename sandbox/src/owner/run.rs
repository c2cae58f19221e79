//! From start to exit: starting, execs, signals, and the order in which ends are told.

use super::{Done, Exec, Owner, wrong_state};
use crate::error::{Error, Result};
use crate::ids::{ContainerId, ProcessId};
use crate::ops::{self, AddedExec};
use crate::prepare::Prepared;
use crate::process::{ExitStatus, Phase, Process, Reply};
use crate::sandbox::{ExecProcess, Notification};
use crate::stdio::Copies;
use std::sync::Arc;

/// Signals that don't end a process by default (signal(7)); so a pod's sandbox ignores them too.
const HARMLESS: [i32; 5] = [
    libc::SIGCHLD,
    libc::SIGCONT,
    libc::SIGURG,
    libc::SIGWINCH,
    0,
];

/// What a start needs.
enum Startable {
    Init(Arc<Prepared>),
    Exec(Arc<AddedExec>),
}

impl Owner {
    pub(super) fn start(&mut self, id: ProcessId, reply: Reply<u32>) {
        if let Err(error) = self.try_start(id, reply) {
            let (reply, error) = *error;
            let _ = reply.send(Err(error));
        }
    }

    fn try_start(
        &mut self,
        id: ProcessId,
        reply: Reply<u32>,
    ) -> std::result::Result<(), Box<(Reply<u32>, Error)>> {
        let checked = self.process(&id).and_then(|process| match process.phase {
            Phase::Created => Ok(()),
            other => Err(wrong_state("start", &id, other)),
        });
        let guest = match checked.and_then(|()| self.guest()) {
            Ok(guest) => guest,
            Err(error) => return Err(Box::new((reply, error))),
        };
        if self.is_pod_sandbox(&id.container) {
            self.started(id.container, Ok(()), reply);
            return Ok(());
        }
        if self
            .containers
            .get(&id.container)
            .is_some_and(|one| one.paused)
        {
            return Err(Box::new((reply, super::resources::paused("start", &id))));
        }
        let found = self
            .containers
            .get(&id.container)
            .and_then(|container| match &id.exec {
                None => container.prepared.clone().map(Startable::Init),
                Some(exec) => container
                    .execs
                    .get(exec)
                    .map(|exec| Startable::Exec(exec.added.clone())),
            });
        if let Ok(process) = self.process(&id) {
            process.phase = Phase::Starting;
        }
        let namespace = self.namespace.clone();
        let network = self.network();
        match found {
            Some(Startable::Init(prepared)) => self.spawn(async move {
                let started = async { ops::start(guest, prepared, network?).await };
                let result = started.await;
                Done::Started {
                    id: id.container,
                    result,
                    reply,
                }
            }),
            Some(Startable::Exec(added)) => self.spawn(async move {
                let result = ops::start_exec(guest, id.clone(), added, namespace).await;
                Done::ExecStarted { id, result, reply }
            }),
            None => return Err(Box::new((reply, Error::NotFound(id.to_string())))),
        }
        Ok(())
    }

    pub(super) fn started(&mut self, id: ContainerId, result: Result<()>, reply: Reply<u32>) {
        let Ok(container) = self.container(&id) else {
            return drop(reply.send(Err(Error::NotFound(format!("container {id}")))));
        };
        let pid = container.pid;
        let early = container.init.early_exit.take();
        if let Err(error) = result {
            if container.init.exit().is_none() {
                container.init.phase = Phase::Created;
            }
            let _ = reply.send(Err(error));
        } else {
            if container.init.exit().is_none() {
                container.init.phase = Phase::Running;
            }
            self.notify(Notification::Started {
                container: id.clone(),
                pid,
            });
            let _ = reply.send(Ok(pid));
        }
        if let Some(exit) = early {
            self.exited(&ProcessId::init(id), exit, false);
        }
    }

    pub(super) fn add_exec(&mut self, request: ExecProcess) -> Result<()> {
        let init = ProcessId::init(request.container.clone());
        if self.is_pod_sandbox(&request.container) {
            let problem = format!("{init} is its pod's sandbox and has no processes");
            return Err(Error::Invalid(problem));
        }
        let container = self.container(&request.container)?;
        if container.init.phase != Phase::Running {
            return Err(wrong_state("exec in", &init, container.init.phase));
        }
        self.guest()?;
        let container = self.container(&request.container)?;
        if container.paused {
            return Err(super::resources::paused("exec in", &init));
        }
        let id = ProcessId {
            container: request.container,
            exec: Some(request.exec.clone()),
        };
        if container.execs.contains_key(&request.exec) {
            return Err(Error::AlreadyExists(id.to_string()));
        }
        let added = Arc::new(AddedExec::new(&request.process, &request.stdio)?);
        let process = Process::new(Phase::Created, request.stdio);
        container.execs.insert(
            request.exec.clone(),
            Exec {
                process,
                added,
                guest_pid: None,
            },
        );
        self.notify(Notification::ExecAdded {
            container: id.container,
            exec: request.exec,
        });
        Ok(())
    }

    pub(super) fn exec_started(
        &mut self,
        id: ProcessId,
        result: Result<(Copies, u32)>,
        reply: Reply<u32>,
    ) {
        if let Ok((_, guest_pid)) = &result {
            self.note_guest_pid(&id, *guest_pid);
        }
        let guest = self.guest();
        let Some(exec) = id.exec.clone() else { return };
        let pid = self
            .container(&id.container)
            .map_or(0, |container| container.pid);
        let Ok(process) = self.process(&id) else {
            return drop(reply.send(Err(Error::NotFound(id.to_string()))));
        };
        let early = process.early_exit.take();
        let started = result.and_then(|(copies, _)| Ok((copies, guest?)));
        match started {
            Ok((copies, guest)) => {
                let progress = copies.progress();
                process.attach(Some(copies));
                if process.exit().is_none() {
                    process.phase = Phase::Running;
                }
                let container = id.container.clone();
                self.notify(Notification::ExecStarted {
                    container,
                    exec,
                    pid,
                });
                let _ = reply.send(Ok(pid));
                self.watch(guest, id.clone(), progress);
            }
            Err(error) => {
                // As runc's shim: a failed start leaves a stopped exec to be deleted.
                process.set_exited(ExitStatus {
                    code: 255,
                    ..ExitStatus::killed()
                });
                let _ = reply.send(Err(error));
                self.release_held_exit(&id.container);
            }
        }
        if let Some(exit) = early {
            self.exited(&id, exit, false);
        }
    }

    pub(super) fn signal(&mut self, id: ProcessId, signal: u32, all: bool, reply: Reply<()>) {
        let checked = self.process(&id).and_then(|process| match process.phase {
            Phase::Exited(_) | Phase::Deleting(_) => Err(Error::AlreadyFinished),
            Phase::Creating => Err(wrong_state("signal", &id, Phase::Creating)),
            Phase::Created if id.exec.is_some() => Err(wrong_state("signal", &id, Phase::Created)),
            Phase::Created | Phase::Starting | Phase::Running => Ok(()),
        });
        let guest = match checked.and_then(|()| self.guest()) {
            Ok(guest) => guest,
            Err(error) => return drop(reply.send(Err(error))),
        };
        if self.is_pod_sandbox(&id.container) {
            if !HARMLESS
                .iter()
                .any(|harmless| u32::try_from(*harmless) == Ok(signal))
            {
                self.exited(&id, ExitStatus::signalled(signal), false);
            }
            return drop(reply.send(Ok(())));
        }
        tokio::spawn(async move {
            let _ = reply.send(ops::signal(guest, id, signal, all).await);
        });
    }

    /// A process has ended. Ends are told in this order: after the start, and an init's after all
    /// of its execs'.
    pub(super) fn exited(&mut self, id: &ProcessId, exit: ExitStatus, oom: bool) {
        if oom {
            self.notify(Notification::OutOfMemory {
                container: id.container.clone(),
            });
        }
        let Ok(process) = self.process(id) else {
            return;
        };
        if process.exit().is_some() {
            return;
        }
        if process.phase == Phase::Starting {
            process.early_exit = Some(exit);
            return;
        }
        let Ok(container) = self.container(&id.container) else {
            return;
        };
        let execs_run = container
            .execs
            .values()
            .any(|exec| exec.process.is_active());
        if id.exec.is_none() && execs_run && container.held_exit.is_none() {
            container.held_exit = Some(exit);
            return self.end_execs(id.container.clone());
        }
        if id.exec.is_none() && execs_run {
            return;
        }
        self.set_exited(id, exit);
        if id.exec.is_some() {
            self.release_held_exit(&id.container);
        }
    }

    fn set_exited(&mut self, id: &ProcessId, exit: ExitStatus) {
        let pid = self
            .container(&id.container)
            .map_or(0, |container| container.pid);
        let Ok(process) = self.process(id) else {
            return;
        };
        if !process.set_exited(exit) {
            return;
        }
        let delete = process.delete_after_exit.take();
        tracing::info!(process = %id, code = exit.code, "exited");
        self.notify(Notification::Exited {
            process: id.clone(),
            pid,
            exit,
        });
        if let Some(reply) = delete {
            self.delete(id.clone(), reply);
        }
    }

    /// Kills what is left of a container after its init's end, and waits a bounded time for it.
    fn end_execs(&mut self, id: ContainerId) {
        let Ok(guest) = self.guest() else {
            return self.execs_overdue(&id);
        };
        self.spawn(async move {
            let init = ProcessId::init(id.clone());
            if let Err(error) = guest.signal(&init, libc::SIGKILL as u32, true).await {
                // With a pid namespace the kernel has killed them already.
                tracing::debug!(%error, "killing a container's execs");
            }
            tokio::time::sleep(guest.pace.call()).await;
            Done::ExecsOverdue { id }
        });
    }

    pub(super) fn execs_overdue(&mut self, id: &ContainerId) {
        let Ok(container) = self.container(id) else {
            return;
        };
        if container.held_exit.is_none() {
            return;
        }
        let active: Vec<_> = container
            .execs
            .iter()
            .filter(|(_, exec)| exec.process.is_active())
            .map(|(exec, _)| ProcessId {
                container: id.clone(),
                exec: Some(exec.clone()),
            })
            .collect();
        for exec in active {
            tracing::warn!(process = %exec, "no word of its end; taking it for killed");
            self.set_exited(&exec, ExitStatus::killed());
        }
        self.release_held_exit(id);
    }

    fn release_held_exit(&mut self, id: &ContainerId) {
        let Ok(container) = self.container(id) else {
            return;
        };
        if container
            .execs
            .values()
            .any(|exec| exec.process.is_active())
        {
            return;
        }
        if let Some(exit) = container.held_exit.take() {
            self.set_exited(&ProcessId::init(id.clone()), exit);
        }
    }
}
