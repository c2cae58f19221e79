//! The way back: deletion, the VM's end by itself or on request, and the folder's removal.

use super::{AfterStop, Done, Owner, Vm, wrong_state};
use crate::error::{Error, Result};
use crate::ids::{ContainerId, ProcessId};
use crate::ops;
use crate::process::{ExitStatus, Phase, Reply};
use crate::process_ref::ProcessRef;
use crate::sandbox::{Deleted, Notification};
use crate::vmm::VmEnd;

impl Owner {
    pub(super) fn delete(&mut self, id: ProcessId, reply: Reply<Deleted>) {
        let phase = match self.process(&id) {
            Ok(process) => process.phase,
            Err(error) => return drop(reply.send(Err(error))),
        };
        match phase {
            Phase::Exited(exit) => self.delete_exited(id, exit, reply),
            Phase::Created if id.exec.is_some() => self.forget_added_exec(&id, reply),
            Phase::Created => self.kill_then_delete(id, reply),
            other => drop(reply.send(Err(wrong_state("delete", &id, other)))),
        }
    }

    /// An exec that never started exists nowhere but here.
    fn forget_added_exec(&mut self, id: &ProcessId, reply: Reply<Deleted>) {
        let exit = ExitStatus {
            code: 0,
            ..ExitStatus::killed()
        };
        let pid = self.remove_exec(id);
        let _ = reply.send(Ok(Deleted { pid, exit }));
    }

    /// A container that never started has a process in the guest that waits to.
    fn kill_then_delete(&mut self, id: ProcessId, reply: Reply<Deleted>) {
        if let Ok(process) = self.process(&id) {
            if process.delete_after_exit.is_some() {
                return drop(reply.send(Err(wrong_state(
                    "delete",
                    &id,
                    Phase::Deleting(ExitStatus::killed()),
                ))));
            }
            process.delete_after_exit = Some(reply);
        }
        let guest = self.guest();
        if self.is_pod_sandbox(&id.container) || guest.is_err() {
            return self.exited(&id, ExitStatus::killed(), false);
        }
        if let Ok(guest) = guest {
            self.spawn(async move {
                if let Err(error) = guest.signal(&id, libc::SIGKILL as u32, true).await {
                    tracing::warn!(%error, process = %id, "killing it before its delete failed");
                } else {
                    // The real end comes by way of the agent's answer to Wait; this is for when it
                    // doesn't.
                    tokio::time::sleep(guest.pace.call()).await;
                }
                Done::Exited {
                    id,
                    exit: ExitStatus::killed(),
                    oom: false,
                }
            });
        }
    }

    fn delete_exited(&mut self, id: ProcessId, exit: ExitStatus, reply: Reply<Deleted>) {
        let guest = self.guest().ok();
        let Ok(container) = self.container(&id.container) else {
            return;
        };
        let (prepared, pid) = (container.prepared.clone(), container.pid);
        let disks = container.disks.clone();
        let Ok(process) = self.process(&id) else {
            return;
        };
        process.phase = Phase::Deleting(exit);
        let copies = process.copies.take();
        if id.exec.is_some() {
            return self.spawn(async move {
                let result = ops::delete(guest, id.clone(), copies).await;
                Done::ExecDeleted { id, result, reply }
            });
        }
        let virtual_task = self.is_pod_sandbox(&id.container);
        self.spawn(async move {
            let guest = guest.filter(|_| !virtual_task);
            let mut result = ops::delete(guest.clone(), id.clone(), copies).await;
            if let (Ok(()), Some(prepared)) = (&result, prepared) {
                result = ops::remove_container(guest, prepared, disks, pid).await;
            }
            Done::Deleted {
                id: id.container,
                result,
                reply,
            }
        });
    }

    pub(super) fn exec_deleted(
        &mut self,
        id: &ProcessId,
        result: Result<()>,
        reply: Reply<Deleted>,
    ) {
        let Ok(process) = self.process(id) else {
            return;
        };
        let Phase::Deleting(exit) = process.phase else {
            return;
        };
        if let Err(error) = result {
            process.phase = Phase::Exited(exit);
            return drop(reply.send(Err(error)));
        }
        let pid = self.remove_exec(id);
        let _ = reply.send(Ok(Deleted { pid, exit }));
    }

    fn remove_exec(&mut self, id: &ProcessId) -> u32 {
        let Ok(container) = self.container(&id.container) else {
            return 0;
        };
        if let Some(mut exec) = id
            .exec
            .as_ref()
            .and_then(|exec| container.execs.remove(exec))
        {
            exec.process.abandon(&Error::NotFound(id.to_string()));
        }
        container.pid
    }

    pub(super) fn deleted(&mut self, id: &ContainerId, result: Result<()>, reply: Reply<Deleted>) {
        let Ok(container) = self.container(id) else {
            return;
        };
        let Phase::Deleting(exit) = container.init.phase else {
            return;
        };
        if let Err(error) = result {
            container.init.phase = Phase::Exited(exit);
            return drop(reply.send(Err(error)));
        }
        let pid = container.pid;
        self.containers.remove(id);
        self.save_state();
        self.settle_memory();
        self.notify(Notification::Deleted {
            container: id.clone(),
            pid,
            exit,
        });
        self.answer_when_settled(AfterStop::Deleted(reply, Deleted { pid, exit }));
    }

    /// Answers `waiter` once everything that its container needed is gone: with the last container
    /// that includes the VM.
    pub(super) fn answer_when_settled(&mut self, waiter: AfterStop) {
        let idle = self.containers.is_empty() && self.waiting.is_empty();
        match self.vm {
            Vm::Up(_) | Vm::Dead { .. } if idle => {
                self.after_stop.push(waiter);
                self.stop_vm(false);
            }
            Vm::Stopping => self.after_stop.push(waiter),
            _ => waiter.answer(Ok(())),
        }
    }

    pub(super) fn stop_vm(&mut self, at_once: bool) {
        let (guest, network, plan) = match std::mem::replace(&mut self.vm, Vm::Stopping) {
            Vm::Up(running) => (Some(running.guest), running.network, running.plan),
            Vm::Dead { plan, network, .. } => (None, network, plan),
            other => {
                self.vm = other;
                return;
            }
        };
        self.spawn(async move {
            Done::Stopped {
                result: ops::stop_vm(guest, network, plan.folder, at_once).await,
            }
        });
    }

    pub(super) fn stopped(&mut self, result: Result<()>) {
        self.vm = Vm::Absent;
        if let Err(error) = &result {
            tracing::error!(%error, "the sandbox's folder could not be removed");
        }
        self.answer_after_stop(&result);
        // A container that came while the VM stopped gets one of its own.
        let next = self.waiting.first().and_then(|id| self.containers.get(id));
        if let Some(plan) = next
            .and_then(|one| one.prepared.as_ref())
            .map(|one| one.plan.clone())
        {
            self.boot(plan);
        }
    }

    fn answer_after_stop(&mut self, result: &Result<()>) {
        for waiter in self.after_stop.drain(..) {
            waiter.answer(result.clone());
        }
    }

    /// The VM ended by itself: every process in it is gone. Execs are told before their inits.
    pub(super) fn vm_ended(&mut self, vmm: ProcessRef, end: &VmEnd) {
        let running = match std::mem::replace(&mut self.vm, Vm::Stopping) {
            Vm::Up(running) if running.guest.vmm.process == vmm => running,
            // An earlier VM, or one that was stopped for good.
            other => {
                self.vm = other;
                return;
            }
        };
        let told = running.told_to_end;
        match told {
            true => tracing::info!(sandbox = %self.id, %end, "the virtual machine was shut down"),
            false => tracing::error!(sandbox = %self.id, %end, "the virtual machine has ended"),
        }
        self.vm = Vm::Dead {
            plan: running.plan,
            end: end.clone(),
            network: running.network,
        };
        let ids: Vec<ContainerId> = self.containers.keys().cloned().collect();
        // A pod's own container ends last.
        let (pods, containers): (Vec<_>, Vec<_>) =
            ids.into_iter().partition(|id| self.is_pod_sandbox(id));
        for id in containers.into_iter().chain(pods) {
            self.end_container(&id);
        }
    }

    fn end_container(&mut self, id: &ContainerId) {
        let Ok(container) = self.container(id) else {
            return;
        };
        if container.init.phase == Phase::Creating {
            // Its create fails by itself: the call to the agent has broken.
            return;
        }
        let execs: Vec<_> = container.execs.keys().cloned().collect();
        for exec in execs {
            let id = ProcessId {
                container: id.clone(),
                exec: Some(exec),
            };
            if self.process(&id).is_ok_and(|process| process.is_active()) {
                self.exited(&id, ExitStatus::killed(), false);
            }
        }
        self.exited(&ProcessId::init(id.clone()), ExitStatus::killed(), false);
    }

    /// Ends everything at once: for the shim's own end.
    pub(super) fn stop(&mut self, reply: Reply<()>) {
        self.after_stop.push(AfterStop::Stop(reply));
        match self.vm {
            Vm::Up(_) | Vm::Dead { .. } => self.stop_vm(true),
            // Answered when that is done.
            Vm::Booting | Vm::Stopping => {}
            Vm::Absent => self.answer_after_stop(&Ok(())),
        }
    }
}

impl AfterStop {
    fn answer(self, result: Result<()>) {
        match self {
            AfterStop::CreateFailed(reply, error) => drop(reply.send(Err(error))),
            AfterStop::Deleted(reply, deleted) => drop(reply.send(result.map(|()| deleted))),
            AfterStop::Stop(reply) => drop(reply.send(result)),
        }
    }
}
