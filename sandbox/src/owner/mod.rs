//! The one owner of a sandbox's state: a task that takes commands and the results of operations,
//! one at a time, and never waits for either. What takes time is spawned (ops.rs) and comes back
//! as a [`Done`].
//!
//! ```text
//!           first create                 booted                last container gone
//! Absent ───────────────► Booting ─────────────────► Up ───────────────────────► Stopping
//!    ▲                       │ failed                │ the VM ended by itself       │
//!    ├───────────────────────┘                       ▼                              │
//!    │                                             Dead ── last container gone ─────┤
//!    └──────────────────────────── folder removed ──────────────────────────────────┘
//! ```
//!
//! A process's own life is drawn in process.rs.

mod create;
mod memory;
mod pod;
mod remove;
mod resources;
mod run;

use crate::boot::{BootError, BootPlan};
use crate::disks::Attached;
use crate::error::{Error, Result};
use crate::folder::StateFile;
use crate::guest::Guest;
use crate::hotplug::Hotplug;
use crate::ids::{ContainerId, ExecId, Namespace, ProcessId, SandboxId};
use crate::mounts::RootfsMount;
use crate::network::{NetworkHandle, PodNetwork};
use crate::ops::{AddedExec, SetUp};
use crate::pod::{PodSettings, Role};
use crate::prepare::Prepared;
use crate::process::{ExitStatus, Phase, Process, Reply, Status};
use crate::process_ref::ProcessRef;
use crate::sandbox::{Command, Deleted, Notification, ProcessState};
use crate::stdio::Copies;
use crate::vmm::VmEnd;
use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;
use tokio::sync::mpsc;

/// The sandbox's VM.
enum Vm {
    Absent,
    Booting,
    Up(Running),
    /// Ended by itself; its folder is removed with the last container.
    Dead {
        plan: BootPlan,
        end: VmEnd,
        network: PodNetwork,
    },
    Stopping,
}

/// A VM whose agent has answered.
struct Running {
    guest: Arc<Guest>,
    plan: BootPlan,
    state: StateFile,
    /// None if the VM can't grow.
    hotplug: Option<Hotplug>,
    network: PodNetwork,
    /// So its end is no surprise.
    told_to_end: bool,
}

/// A container that this sandbox knows.
struct Container {
    bundle: PathBuf,
    rootfs: Vec<RootfsMount>,
    init: Process,
    execs: BTreeMap<ExecId, Exec>,
    /// Known once the request has been checked.
    prepared: Option<Arc<Prepared>>,
    create_reply: Option<Reply<u32>>,
    /// What was attached to the VM for it.
    disks: Attached,
    /// The init's end, held back until the execs have ended.
    held_exit: Option<ExitStatus>,
    /// The VMM's pid, once there is one.
    pid: u32,
    /// When that was.
    created_at: SystemTime,
    /// Its processes stand still.
    paused: bool,
    /// A pod's sandbox that came by the sandbox API: no task to the daemon.
    by_sandbox_api: bool,
    /// Its memory limit in bytes, as far as the VM was sized for it; 0 for none.
    memory_limit: u64,
    /// A higher one that is being set; 0 for none.
    raising: u64,
}

impl Container {
    /// What the VM must have room for.
    fn memory_limit(&self) -> u64 {
        self.memory_limit.max(self.raising)
    }
}

/// A further process and what to start it with.
struct Exec {
    process: Process,
    added: Arc<AddedExec>,
    /// In the guest, once it's started.
    guest_pid: Option<u32>,
}

/// What an operation's task hands back.
enum Done {
    Prepared {
        id: ContainerId,
        result: Result<Arc<Prepared>>,
    },
    Booted {
        plan: BootPlan,
        result: Box<std::result::Result<(Guest, StateFile), BootError>>,
    },
    Created {
        id: ContainerId,
        result: Result<Option<SetUp>>,
    },
    Started {
        id: ContainerId,
        result: Result<()>,
        reply: Reply<u32>,
    },
    Frozen {
        id: ContainerId,
        frozen: bool,
        result: Result<()>,
        reply: Reply<()>,
    },
    Updated {
        id: ContainerId,
        limit: Option<u64>,
        result: Result<()>,
        reply: Reply<()>,
    },
    ExecStarted {
        id: ProcessId,
        result: Result<(Copies, u32)>,
        reply: Reply<u32>,
    },
    Exited {
        id: ProcessId,
        exit: ExitStatus,
        oom: bool,
    },
    ExecsOverdue {
        id: ContainerId,
    },
    ExecDeleted {
        id: ProcessId,
        result: Result<()>,
        reply: Reply<Deleted>,
    },
    Deleted {
        id: ContainerId,
        result: Result<()>,
        reply: Reply<Deleted>,
    },
    VmEnded {
        vmm: ProcessRef,
        end: VmEnd,
    },
    Stopped {
        result: Result<()>,
    },
}

/// Who is told when the VM is gone.
enum AfterStop {
    CreateFailed(Reply<u32>, Error),
    Deleted(Reply<Deleted>, Deleted),
    Stop(Reply<()>),
}

/// See the module.
pub(crate) struct Owner {
    id: SandboxId,
    namespace: Namespace,
    vm: Vm,
    containers: HashMap<ContainerId, Container>,
    /// Containers that wait for the VM, in the order of their creation.
    waiting: Vec<ContainerId>,
    after_stop: Vec<AfterStop>,
    /// What the pod's sandbox asked for on behalf of its containers.
    pod: PodSettings,
    notifications: mpsc::UnboundedSender<Notification>,
    done: mpsc::UnboundedSender<Done>,
    results: mpsc::UnboundedReceiver<Done>,
}

impl Owner {
    pub fn new(
        id: SandboxId,
        namespace: Namespace,
        notifications: mpsc::UnboundedSender<Notification>,
    ) -> Self {
        let (done, results) = mpsc::unbounded_channel();
        Self {
            id,
            namespace,
            vm: Vm::Absent,
            containers: HashMap::new(),
            waiting: Vec::new(),
            after_stop: Vec::new(),
            pod: PodSettings::default(),
            notifications,
            done,
            results,
        }
    }

    /// Runs until every handle is gone.
    pub async fn run(mut self, mut commands: mpsc::Receiver<Command>) {
        loop {
            tokio::select! {
                command = commands.recv() => match command {
                    Some(command) => self.command(command),
                    None => return,
                },
                Some(done) = self.results.recv() => self.finish(done),
            }
        }
    }

    fn command(&mut self, command: Command) {
        match command {
            Command::Create(request, reply) => self.create(*request, reply),
            Command::Start(id, reply) => self.start(id, reply),
            Command::Exec(request, reply) => drop(reply.send(self.add_exec(*request))),
            Command::Signal {
                process,
                signal,
                all,
                reply,
            } => {
                self.signal(process, signal, all, reply);
            }
            Command::Wait(id, reply) => match self.process(&id) {
                Ok(process) => process.wait(reply),
                Err(error) => drop(reply.send(Err(error))),
            },
            Command::Delete(id, reply) => self.delete(id, reply),
            Command::State(id, reply) => drop(reply.send(self.state(&id))),
            Command::Resize {
                process,
                rows,
                columns,
                reply,
            } => {
                self.resize(process, rows, columns, reply);
            }
            Command::Freeze {
                container,
                frozen,
                reply,
            } => self.freeze(container, frozen, reply),
            Command::Update {
                container,
                resources,
                reply,
            } => self.update(container, resources, reply),
            Command::Stats(id, reply) => self.stats(id, reply),
            Command::Pids(id, reply) => self.pids(id, reply),
            Command::CloseStdin(id, reply) => drop(reply.send(self.close_stdin(&id))),
            Command::TaskPid(id, reply) => {
                let container = self.containers.get(&id);
                drop(reply.send(Ok(container.map(|container| container.pid))));
            }
            Command::EndPod(id, reply) => self.end_pod(&id, reply),
            Command::Alive(id, reply) => {
                let alive = self.container(&id).map(drop).and_then(|()| self.guest());
                drop(reply.send(alive.map(drop)));
            }
            Command::IsEmpty(reply) => drop(reply.send(Ok(self.containers.is_empty()))),
            Command::Stop(reply) => self.stop(reply),
        }
    }

    fn finish(&mut self, done: Done) {
        match done {
            Done::Prepared { id, result } => self.prepared(id, result),
            Done::Booted { plan, result } => self.booted(plan, *result),
            Done::Created { id, result } => self.created(id, result),
            Done::Started { id, result, reply } => self.started(id, result, reply),
            Done::Frozen {
                id,
                frozen,
                result,
                reply,
            } => self.frozen(id, frozen, result, reply),
            Done::Updated {
                id,
                limit,
                result,
                reply,
            } => self.updated(&id, limit, result, reply),
            Done::ExecStarted { id, result, reply } => self.exec_started(id, result, reply),
            Done::Exited { id, exit, oom } => self.exited(&id, exit, oom),
            Done::ExecsOverdue { id } => self.execs_overdue(&id),
            Done::ExecDeleted { id, result, reply } => self.exec_deleted(&id, result, reply),
            Done::Deleted { id, result, reply } => self.deleted(&id, result, reply),
            Done::VmEnded { vmm, end } => self.vm_ended(vmm, &end),
            Done::Stopped { result } => self.stopped(result),
        }
    }

    /// Runs `operation` as a task of its own; its result comes back to [`Owner::finish`].
    fn spawn(&self, operation: impl Future<Output = Done> + Send + 'static) {
        let done = self.done.clone();
        tokio::spawn(async move {
            // Fails only when the owner is gone, and then nobody cares.
            let _ = done.send(operation.await);
        });
    }

    fn notify(&self, notification: Notification) {
        let container = self.containers.get(notification.container());
        if container.is_some_and(|container| container.by_sandbox_api) {
            return;
        }
        let _ = self.notifications.send(notification);
    }

    fn container(&mut self, id: &ContainerId) -> Result<&mut Container> {
        self.containers
            .get_mut(id)
            .ok_or_else(|| Error::NotFound(format!("container {id}")))
    }

    fn process(&mut self, id: &ProcessId) -> Result<&mut Process> {
        let container = self.container(&id.container)?;
        match &id.exec {
            None => Ok(&mut container.init),
            Some(exec) => match container.execs.get_mut(exec) {
                Some(exec) => Ok(&mut exec.process),
                None => Err(Error::NotFound(id.to_string())),
            },
        }
    }

    /// The guest, or why there is none.
    fn guest(&self) -> Result<Arc<Guest>> {
        match &self.vm {
            Vm::Up(running) => Ok(running.guest.clone()),
            Vm::Dead { end, .. } => Err(Error::VmEnded(end.clone())),
            Vm::Absent | Vm::Booting | Vm::Stopping => Err(Error::ShuttingDown),
        }
    }

    /// The pod's network, or why there is none.
    fn network(&self) -> Result<NetworkHandle> {
        self.guest()?;
        match &self.vm {
            Vm::Up(running) => Ok(running.network.handle()),
            _ => Err(Error::ShuttingDown),
        }
    }

    /// Whether `id` is a pod's own container, which has no process in the guest.
    fn is_pod_sandbox(&self, id: &ContainerId) -> bool {
        let prepared = self
            .containers
            .get(id)
            .and_then(|container| container.prepared.as_ref());
        prepared.is_some_and(|prepared| prepared.role == Role::PodSandbox)
    }

    fn state(&mut self, id: &ProcessId) -> Result<ProcessState> {
        let process = self.process(id)?;
        // A container that is still being created isn't there yet for anyone but its creator.
        let status = process
            .status()
            .ok_or_else(|| Error::NotFound(id.to_string()))?;
        let stdio = process.paths.clone();
        let container = self.container(&id.container)?;
        let status = match status {
            Status::Running if container.paused => Status::Paused,
            other => other,
        };
        Ok(ProcessState {
            bundle: container.bundle.clone(),
            pid: container.pid,
            created_at: container.created_at,
            is_task: !container.by_sandbox_api,
            status,
            stdio,
        })
    }

    fn close_stdin(&mut self, id: &ProcessId) -> Result<()> {
        self.process(id)?.close_stdin();
        Ok(())
    }

    fn resize(&mut self, id: ProcessId, rows: u32, columns: u32, reply: Reply<()>) {
        let checked = self.process(&id).and_then(|process| match process.phase {
            Phase::Created | Phase::Running => Ok(()),
            other => Err(wrong_state("resize", &id, other)),
        });
        let guest = match checked.and_then(|()| self.guest()) {
            Ok(guest) if !self.is_pod_sandbox(&id.container) => guest,
            Ok(_) => return drop(reply.send(Ok(()))),
            Err(error) => return drop(reply.send(Err(error))),
        };
        tokio::spawn(async move {
            let _ = reply.send(guest.resize(&id, rows, columns).await.map_err(Error::from));
        });
    }

    /// Writes down for `delete` in another process which containers are here.
    fn save_state(&mut self) {
        let containers = self
            .containers
            .iter()
            .map(|(id, container)| (id.to_string(), container.bundle.clone()))
            .collect();
        if let Vm::Up(running) = &mut self.vm {
            running.state.containers = containers;
            if let Err(error) = running.plan.folder.write_state(&running.state) {
                tracing::error!(%error, "state.json is out of date");
            }
        }
    }
}

fn wrong_state(verb: &'static str, id: &ProcessId, phase: Phase) -> Error {
    Error::WrongState {
        verb,
        process: id.to_string(),
        state: phase.name(),
    }
}
