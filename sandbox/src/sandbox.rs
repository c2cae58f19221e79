//! The handle on a sandbox: each method is one request to the task that owns the state.

use crate::config::Config;
use crate::error::{Error, Result};
use crate::ids::{ContainerId, ExecId, Namespace, ProcessId, SandboxId};
use crate::mounts::RootfsMount;
use crate::owner::Owner;
use crate::pod::PodSandbox;
use crate::process::{ExitStatus, Reply, Status};
use bulkhead_proto::agent::StatsResponse;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;
use tokio::sync::{mpsc, oneshot};

/// Requests that may wait for the owner's attention.
const QUEUE: usize = 64;

/// A process's standard streams as the daemon names them; an empty one is /dev/null.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StdioPaths {
    /// A FIFO.
    pub stdin: String,
    /// A FIFO, a `file://` or a `binary://` URI.
    pub stdout: String,
    /// As stdout; ignored with a terminal.
    pub stderr: String,
    /// The process gets a terminal, whose output goes to stdout.
    pub terminal: bool,
}

/// A container to create.
#[derive(Debug, Clone)]
pub struct CreateContainer {
    /// Its id.
    pub id: ContainerId,
    /// The folder with config.json; absolute.
    pub bundle: PathBuf,
    /// What to mount at the bundle's rootfs folder; may be empty.
    pub rootfs: Vec<RootfsMount>,
    /// Its standard streams.
    pub stdio: StdioPaths,
    /// The configuration, used if this container is the sandbox's first.
    pub config: Arc<Config>,
    /// For a pod's sandbox that comes by the sandbox API: what stands in for the bundle's spec. No
    /// notification tells of such a container.
    pub pod: Option<PodSandbox>,
}

/// A further process to add to a container.
#[derive(Debug, Clone)]
pub struct ExecProcess {
    /// The container.
    pub container: ContainerId,
    /// Its id.
    pub exec: ExecId,
    /// An OCI Process object as JSON.
    pub process: Vec<u8>,
    /// Its standard streams.
    pub stdio: StdioPaths,
}

/// A process that is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Deleted {
    /// The pid that was reported for it.
    pub pid: u32,
    /// How it ended.
    pub exit: ExitStatus,
}

/// A process of a container, as the guest sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestProcess {
    /// Its pid in the guest.
    pub pid: u32,
    /// The exec that it was started as; none for the init and for children.
    pub exec: Option<ExecId>,
}

/// What is known of a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProcessState {
    /// Its container's bundle.
    pub bundle: PathBuf,
    /// The VMM's pid on the host.
    pub pid: u32,
    /// When its container was created.
    pub created_at: SystemTime,
    /// It isn't a pod's sandbox that came by the sandbox API.
    pub is_task: bool,
    /// Where it is in its life.
    pub status: Status,
    /// Its standard streams.
    pub stdio: StdioPaths,
}

/// What happened, in the order in which it happened.
#[derive(Debug, Clone)]
pub enum Notification {
    /// A container was created.
    Created {
        /// Its id.
        container: ContainerId,
        /// Its bundle.
        bundle: PathBuf,
        /// What was mounted.
        rootfs: Vec<RootfsMount>,
        /// Its streams.
        stdio: StdioPaths,
        /// The VMM's pid.
        pid: u32,
    },
    /// A container's init was started.
    Started {
        /// Its id.
        container: ContainerId,
        /// The VMM's pid.
        pid: u32,
    },
    /// An exec was added.
    ExecAdded {
        /// The container.
        container: ContainerId,
        /// The exec.
        exec: ExecId,
    },
    /// An exec was started.
    ExecStarted {
        /// The container.
        container: ContainerId,
        /// The exec.
        exec: ExecId,
        /// The VMM's pid.
        pid: u32,
    },
    /// A container's processes stand still.
    Paused {
        /// The container.
        container: ContainerId,
    },
    /// They go on.
    Resumed {
        /// The container.
        container: ContainerId,
    },
    /// The guest ran out of memory in this container; comes before the exit it caused.
    OutOfMemory {
        /// The container.
        container: ContainerId,
    },
    /// A process ended; an init's end comes after its execs'.
    Exited {
        /// Which.
        process: ProcessId,
        /// The VMM's pid.
        pid: u32,
        /// How.
        exit: ExitStatus,
    },
    /// A container was deleted.
    Deleted {
        /// Its id.
        container: ContainerId,
        /// The VMM's pid.
        pid: u32,
        /// How its init ended.
        exit: ExitStatus,
    },
}

impl Notification {
    /// The container that it is about.
    pub fn container(&self) -> &ContainerId {
        match self {
            Self::Created { container, .. }
            | Self::Started { container, .. }
            | Self::ExecAdded { container, .. }
            | Self::ExecStarted { container, .. }
            | Self::Paused { container }
            | Self::Resumed { container }
            | Self::OutOfMemory { container }
            | Self::Deleted { container, .. } => container,
            Self::Exited { process, .. } => &process.container,
        }
    }
}

pub(crate) enum Command {
    Create(Box<CreateContainer>, Reply<u32>),
    Start(ProcessId, Reply<u32>),
    Exec(Box<ExecProcess>, Reply<()>),
    Signal {
        process: ProcessId,
        signal: u32,
        all: bool,
        reply: Reply<()>,
    },
    Wait(ProcessId, Reply<ExitStatus>),
    Delete(ProcessId, Reply<Deleted>),
    State(ProcessId, Reply<ProcessState>),
    Resize {
        process: ProcessId,
        rows: u32,
        columns: u32,
        reply: Reply<()>,
    },
    CloseStdin(ProcessId, Reply<()>),
    Freeze {
        container: ContainerId,
        frozen: bool,
        reply: Reply<()>,
    },
    Update {
        container: ContainerId,
        resources: Vec<u8>,
        reply: Reply<()>,
    },
    Stats(ContainerId, Reply<Box<StatsResponse>>),
    Pids(ContainerId, Reply<Vec<GuestProcess>>),
    TaskPid(ContainerId, Reply<Option<u32>>),
    IsEmpty(Reply<bool>),
    EndPod(ContainerId, Reply<()>),
    Alive(ContainerId, Reply<()>),
    Stop(Reply<()>),
}

/// A handle on one sandbox. Clones share it.
#[derive(Debug, Clone)]
pub struct Sandbox {
    commands: mpsc::Sender<Command>,
}

impl Sandbox {
    /// Starts the owner of a sandbox that has no VM and no container yet; the first create boots
    /// the VM, the last delete ends it. Must be called on a tokio runtime with I/O and time.
    pub fn new(
        id: SandboxId,
        namespace: Namespace,
        notifications: mpsc::UnboundedSender<Notification>,
    ) -> Self {
        let (commands, queue) = mpsc::channel(QUEUE);
        tokio::spawn(Owner::new(id, namespace, notifications).run(queue));
        Self { commands }
    }

    async fn ask<T>(&self, command: impl FnOnce(Reply<T>) -> Command) -> Result<T> {
        let (reply, answer) = oneshot::channel();
        self.commands
            .send(command(reply))
            .await
            .map_err(|_| Error::ShuttingDown)?;
        answer.await.map_err(|_| Error::ShuttingDown)?
    }

    /// Creates a container, booting the VM if there is none; returns the VMM's pid.
    ///
    /// # Errors
    /// When anything fails; then nothing is left of it.
    pub async fn create(&self, request: CreateContainer) -> Result<u32> {
        self.ask(|reply| Command::Create(Box::new(request), reply))
            .await
    }

    /// Starts a created container or an added exec; returns the VMM's pid.
    ///
    /// # Errors
    /// When there is no such process, or it isn't in state created, or the guest fails to.
    pub async fn start(&self, process: ProcessId) -> Result<u32> {
        self.ask(|reply| Command::Start(process, reply)).await
    }

    /// Adds an exec to a running container; [`Sandbox::start`] starts it.
    ///
    /// # Errors
    /// When the container doesn't run, the exec's id is taken or its process is invalid.
    pub async fn exec(&self, request: ExecProcess) -> Result<()> {
        self.ask(|reply| Command::Exec(Box::new(request), reply))
            .await
    }

    /// Sends a signal to a process, or to all of its container's.
    ///
    /// # Errors
    /// When there is no such process or it has ended.
    pub async fn signal(&self, process: ProcessId, signal: u32, all: bool) -> Result<()> {
        self.ask(|reply| Command::Signal {
            process,
            signal,
            all,
            reply,
        })
        .await
    }

    /// Waits for a process's end, however long that takes.
    ///
    /// # Errors
    /// When there is no such process.
    pub async fn wait(&self, process: ProcessId) -> Result<ExitStatus> {
        self.ask(|reply| Command::Wait(process, reply)).await
    }

    /// Deletes an ended exec, or an ended or never started container, once its output is drained.
    /// With the last container the VM ends.
    ///
    /// # Errors
    /// When there is no such process or it runs.
    pub async fn delete(&self, process: ProcessId) -> Result<Deleted> {
        self.ask(|reply| Command::Delete(process, reply)).await
    }

    /// What is known of a process.
    ///
    /// # Errors
    /// When there is no such process.
    pub async fn state(&self, process: ProcessId) -> Result<ProcessState> {
        self.ask(|reply| Command::State(process, reply)).await
    }

    /// Sets the size of a process's terminal.
    ///
    /// # Errors
    /// When there is no such process or it has no terminal.
    pub async fn resize(&self, process: ProcessId, rows: u32, columns: u32) -> Result<()> {
        self.ask(|reply| Command::Resize {
            process,
            rows,
            columns,
            reply,
        })
        .await
    }

    /// Ends a process's input. Idempotent.
    ///
    /// # Errors
    /// When there is no such process.
    pub async fn close_stdin(&self, process: ProcessId) -> Result<()> {
        self.ask(|reply| Command::CloseStdin(process, reply)).await
    }

    /// Freezes all processes of a running container.
    ///
    /// # Errors
    /// When there is no such container, or it doesn't run, or is paused already.
    pub async fn pause(&self, container: ContainerId) -> Result<()> {
        self.freeze(container, true).await
    }

    /// Lets the processes of a paused container go on.
    ///
    /// # Errors
    /// When there is no such container, or it isn't paused.
    pub async fn resume(&self, container: ContainerId) -> Result<()> {
        self.freeze(container, false).await
    }

    async fn freeze(&self, container: ContainerId, frozen: bool) -> Result<()> {
        self.ask(|reply| Command::Freeze {
            container,
            frozen,
            reply,
        })
        .await
    }

    /// Changes a container's limits; `resources` is an OCI LinuxResources object as JSON, and what
    /// it leaves out stays as it is.
    ///
    /// # Errors
    /// When there is no such container, it has ended, or the limits can't be honoured.
    pub async fn update(&self, container: ContainerId, resources: Vec<u8>) -> Result<()> {
        self.ask(|reply| Command::Update {
            container,
            resources,
            reply,
        })
        .await
    }

    /// What a container uses, as its cgroup in the guest counts it. For a pod's own container,
    /// which has no processes, the sum over the pod's containers.
    ///
    /// # Errors
    /// When there is no such container or its guest is gone.
    pub async fn stats(&self, container: ContainerId) -> Result<StatsResponse> {
        let stats = self.ask(|reply| Command::Stats(container, reply)).await;
        stats.map(|stats| *stats)
    }

    /// The processes of a container, by their pids in the guest. Never none: for a container without
    /// processes, or whose guest is gone, the VMM's pid on the host stands.
    ///
    /// # Errors
    /// When there is no such container.
    pub async fn pids(&self, container: ContainerId) -> Result<Vec<GuestProcess>> {
        self.ask(|reply| Command::Pids(container, reply)).await
    }

    /// The pid reported for a container; none if there is no such container.
    ///
    /// # Errors
    /// Only when the sandbox is shutting down.
    pub async fn task_pid(&self, container: ContainerId) -> Result<Option<u32>> {
        self.ask(|reply| Command::TaskPid(container, reply)).await
    }

    /// Whether no container is left, nor one being created.
    ///
    /// # Errors
    /// Only when the sandbox is shutting down.
    pub async fn is_empty(&self) -> Result<bool> {
        self.ask(Command::IsEmpty).await
    }

    /// Ends a pod: its VM shuts down, with every process in it, and all that wait for one hear of
    /// its end. Its containers stay to be deleted. Idempotent.
    ///
    /// # Errors
    /// When `pod` isn't the id of a pod's sandbox here, or it is still being created.
    pub async fn end_pod(&self, pod: ContainerId) -> Result<()> {
        self.ask(|reply| Command::EndPod(pod.clone(), reply))
            .await?;
        self.wait(ProcessId::init(pod)).await.map(drop)
    }

    /// Makes sure that the VM of `container` runs.
    ///
    /// # Errors
    /// When there is no such container, or its VM has ended.
    pub async fn alive(&self, container: ContainerId) -> Result<()> {
        self.ask(|reply| Command::Alive(container, reply)).await
    }

    /// Ends the VM at once with everything in it and removes what was on the host.
    ///
    /// # Errors
    /// When something can't be removed.
    pub async fn stop(&self) -> Result<()> {
        self.ask(Command::Stop).await
    }
}
