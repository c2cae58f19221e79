//! Makes processes, from the agent's side.

use super::ahead::{self, Ahead, Orders};
use super::child::{self, ChildSetup, Role, Shared};
use super::clone::{Cloned, clone};
use super::control::{self, Control, Progress};
use super::plan::ProcessPlan;
use super::pod::{self, PodInit};
use super::stdio::{self, AgentEnds};
use super::sysctls;
use super::terminal::WindowSize;
use crate::cgroups::{Cgroup, Hierarchy};
use crate::error::{Context, Failure, Kind};
use crate::log;
use crate::namespaces;
use crate::reaper::{Child, Reaper};
use crate::rootfs::Sources;
use crate::spares::Spares;
use crate::spec::ContainerPlan;
use crate::streams::HostStreams;
use crate::syscalls::Linux;
use crate::users::IdMaps;
use rustix::io::Errno;
use rustix::thread::{LinkNameSpaceType, ThreadNameSpaceType};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::OnceCell;

/// A process that is being set up.
#[derive(Debug)]
pub struct Spawned {
    /// For waiting and signals.
    pub child: Child,
    /// Refers to the process for as long as it is open.
    pub pidfd: OwnedFd,
    /// How it reports.
    pub control: Control,
    /// The agent's ends of its standard streams.
    pub ends: AgentEnds,
}

/// What a further process of a container shares with its first.
#[derive(Debug, Clone, Copy)]
pub struct Joined<'a> {
    /// The container's first process.
    pub init: &'a OwnedFd,
    /// Whether that one is in another pid namespace than the agent.
    pub other_pids: bool,
    /// Its ids, if it has a user namespace.
    pub ids: Option<&'a IdMaps>,
    /// What else.
    pub shared: Shared<'a>,
}

/// Makes processes and hands them to the reaper.
#[derive(Clone)]
pub struct Spawner {
    reaper: Reaper,
    null: Arc<OwnedFd>,
    spares: Arc<Spares>,
    ahead: Arc<Mutex<Option<Ahead>>>,
    pod: Arc<OnceCell<PodInit>>,
}

impl Spawner {
    /// `null` is /dev/null.
    pub fn new(reaper: Reaper, null: OwnedFd) -> Self {
        Self {
            reaper,
            null: Arc::new(null),
            spares: Arc::default(),
            ahead: Arc::default(),
            pod: Arc::default(),
        }
    }

    /// Namespaces for first processes of containers.
    pub fn spares(&self) -> &Spares {
        &self.spares
    }

    /// Makes the set-up process of the next container, unless there is one, and waits until it has
    /// nothing more to do before it knows its container. The spare namespaces must be there.
    pub async fn make_ahead(&self, hierarchy: &Hierarchy) -> Result<(), Failure> {
        if self.ahead().is_some() {
            return Ok(());
        }
        let cgroup = hierarchy.create_ahead()?;
        let (control, process_control) = control::pair()?;
        // SAFETY: the agent is single-threaded (main.rs), and the child only runs ahead::run,
        // which never returns.
        let cloned = unsafe { clone(ahead::NAMESPACES, cgroup.as_ref().map(|c| c.as_fd())) };
        let cloned = cloned.context(|| "make a process ahead in the guest")?;
        let Cloned::Parent { pid, pidfd } = cloned else {
            let cgroup = cgroup.as_ref().map(|cgroup| cgroup.path());
            ahead::run(process_control.as_raw_fd(), cgroup, &self.spares)
        };
        let spawned = Spawned {
            child: self.reaper.watch(pid, cgroup.clone()),
            pidfd,
            control,
            ends: AgentEnds::default(),
        };
        drop(process_control);
        match spawned.control.next().await? {
            Progress::Ready(_) => {
                *self.ahead() = Some(Ahead { spawned, cgroup });
                Ok(())
            }
            Progress::Gone => Err(Failure::new(
                Kind::Internal,
                "the process made ahead died before it was ready",
            )),
        }
    }

    /// Whether a container has asked for the pod's pid namespace before.
    pub fn has_pod_pids(&self) -> bool {
        self.pod.initialized()
    }

    /// A way into the pod's pid namespace, which is made when it is first asked for.
    pub async fn pod_pids(&self) -> Result<OwnedFd, Failure> {
        let init = self.pod.get_or_try_init(|| self.make_pod_init()).await?;
        if init.child.exit().is_some() {
            return Err(Failure::new(
                Kind::FailedPrecondition,
                "the first process of the pod's pid namespace has been killed, and with it all \
                 processes in there; make the pod anew",
            ));
        }
        let way = init.pidfd.try_clone();
        way.context(|| "copy the descriptor of the pod's first process")
    }

    async fn make_pod_init(&self) -> Result<PodInit, Failure> {
        let (control, process_control) = control::pair()?;
        // SAFETY: the agent is single-threaded (main.rs), and the child only runs pod::run, which
        // never returns.
        let cloned = unsafe { clone(pod::NAMESPACES, None) };
        let cloned = cloned.context(|| "make the pod's first process in the guest")?;
        let Cloned::Parent { pid, pidfd } = cloned else {
            pod::run(process_control.as_raw_fd())
        };
        let child = self.reaper.watch(pid, None);
        drop(process_control);
        match control.next().await? {
            Progress::Ready(_) => Ok(PodInit { child, pidfd }),
            Progress::Gone => Err(Failure::new(
                Kind::Internal,
                "the first process of the pod's pid namespace died before it was ready",
            )),
        }
    }

    /// The process made ahead, if there is one that suits this container.
    pub async fn take_ahead(&self, plan: &ContainerPlan, spec: &[u8]) -> Option<Ahead> {
        let taken = self.ahead().take_if(|_| ahead::suits(plan, spec))?;
        if taken.spawned.child.exit().is_none() {
            return Some(taken);
        }
        if let Some(cgroup) = taken.cgroup
            && let Err(failure) = cgroup.remove().await
        {
            log::error(failure);
        }
        None
    }

    /// Makes a process from [`Self::take_ahead`] the first one of a container; `spec` is what
    /// `plan` was made of.
    pub fn order(
        &self,
        spawned: &mut Spawned,
        plan: &ContainerPlan,
        spec: &[u8],
        host: &HostStreams,
        size: Option<WindowSize>,
    ) -> Result<(), Failure> {
        let (process_ends, ends) = stdio::make(host, plan.process.terminal, plan.process.uid)?;
        let spares = self.spares.take(&plan.namespaces);
        let orders = Orders {
            spec,
            spares: spares.flags(),
            stdio: process_ends.borrow(self.null.as_fd()),
            size,
        };
        orders.give(&spawned.control)?;
        spawned.ends = ends;
        Ok(())
    }

    fn ahead(&self) -> MutexGuard<'_, Option<Ahead>> {
        self.ahead.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the first process of a container, in the pid namespace of the process or the link
    /// that `pids` is, if it is given one.
    pub fn init(
        &self,
        id: &str,
        plan: &ContainerPlan,
        pids: Option<&OwnedFd>,
        cgroup: Option<&Arc<Cgroup>>,
        host: &HostStreams,
        size: Option<WindowSize>,
    ) -> Result<Spawned, Failure> {
        // Root of another user namespace may not see what is to be mounted.
        let sources = match plan.namespaces.ids {
            Some(_) => {
                sysctls::write_shared(plan)?;
                let guests_ipc = !plan.namespaces.own_ipc();
                Some(Sources::open(&plan.rootfs, guests_ipc, &Linux)?)
            }
            None => None,
        };
        let spares = self.spares.take(&plan.namespaces);
        let flags = plan.namespaces.clone_flags & !spares.flags();
        let role = Role::Init {
            id,
            plan,
            cgroup: cgroup.map(|cgroup| cgroup.path()),
            born: flags,
            spares: &spares,
            sources: sources.as_ref(),
        };
        let ids = plan.namespaces.ids.as_deref();
        let stage = match &sources {
            Some(sources) => sources.enter_stage(&Linux)?,
            None => None,
        };
        let spawned = self.spawn(&plan.process, role, flags, pids, ids, cgroup, host, size);
        if let Some(stage) = stage {
            stage.leave()?;
        }
        spawned
    }

    /// Gives the first process of a container what only the guest's root may give it, and lets it
    /// go on. Does nothing without a user namespace.
    pub fn admit(spawned: &Spawned, plan: &ContainerPlan) -> Result<(), Failure> {
        let Some(ids) = &plan.namespaces.ids else {
            return Ok(());
        };
        let pid = spawned.child.pid;
        ids.write(pid)?;
        if let Some(score) = plan.process.oom_score_adj {
            std::fs::write(format!("/proc/{pid}/oom_score_adj"), score.to_string())
                .context(|| format!("process.oomScoreAdj: set {score}"))?;
        }
        let pid = rustix::process::Pid::from_raw(pid);
        for (resource, limit) in &plan.process.rlimits {
            rustix::process::prlimit(pid, *resource, *limit)
                .context(|| format!("process.rlimits: set {resource:?}"))?;
        }
        spawned.control.start()
    }

    /// Makes a further process of a container.
    pub fn exec(
        &self,
        plan: &ProcessPlan,
        joined: Joined<'_>,
        cgroup: Option<&Arc<Cgroup>>,
        host: &HostStreams,
        size: Option<WindowSize>,
    ) -> Result<Spawned, Failure> {
        let role = Role::Exec {
            plan,
            init: joined.init.as_raw_fd(),
            users: joined.ids.is_some(),
            shared: joined.shared,
        };
        let pids = joined.other_pids.then_some(joined.init);
        self.spawn(plan, role, 0, pids, joined.ids, cgroup, host, size)
    }

    #[expect(clippy::too_many_arguments, reason = "private, and called twice")]
    fn spawn(
        &self,
        plan: &ProcessPlan,
        role: Role<'_>,
        namespaces: i32,
        pids: Option<&OwnedFd>,
        ids: Option<&IdMaps>,
        cgroup: Option<&Arc<Cgroup>>,
        host: &HostStreams,
        size: Option<WindowSize>,
    ) -> Result<Spawned, Failure> {
        let uid = ids.map_or(Ok(plan.uid), |ids| ids.user(plan.uid))?;
        let (process_ends, ends) = stdio::make(host, plan.terminal, uid)?;
        let (control, process_control) = control::pair()?;
        // A pid namespace is joined by children only. So the agent goes there for the moment of
        // the clone, which saves a process in between.
        let home = match pids {
            Some(pids) => {
                let home = namespaces::own_pid_namespace()?;
                enter_pids(pids)?;
                Some(home)
            }
            None => None,
        };
        // SAFETY: the agent is single-threaded (main.rs), and the child only runs child::run,
        // which never returns.
        let cloned = unsafe { clone(namespaces, cgroup.map(|cgroup| cgroup.as_fd())) };
        if matches!(cloned, Ok(Cloned::Child)) {
            child::run(ChildSetup {
                role,
                stdio: process_ends.raw(self.null.as_raw_fd()),
                control: process_control.as_raw_fd(),
                size,
            });
        }
        if let Some(home) = home {
            rustix::thread::move_into_link_name_space(
                home.as_fd(),
                Some(LinkNameSpaceType::ProcessID),
            )
            .context(|| "come back to the agent's own pid namespace")?;
        }
        let cloned = cloned.map_err(|error| match (error, pids.is_some()) {
            // What the kernel says when the namespace's first process is gone (pid_namespaces(7)).
            (Errno::NOMEM, true) => Failure::new(
                Kind::FailedPrecondition,
                "the first process of the pid namespace to join has exited",
            ),
            (error, _) => Failure::internal("make a process in the guest", error),
        })?;
        match cloned {
            Cloned::Parent { pid, pidfd } => Ok(Spawned {
                child: self.reaper.watch(pid, cgroup.cloned()),
                pidfd,
                control,
                ends,
            }),
            Cloned::Child => Err(Failure::new(Kind::Internal, "a child went astray")),
        }
    }
}

/// Has the caller's next children be made in the pid namespace that `pids` leads to: a process's
/// descriptor, or a link of /proc/PID/ns.
fn enter_pids(pids: &OwnedFd) -> Result<(), Failure> {
    let kind = ThreadNameSpaceType::PROCESS_ID;
    rustix::thread::move_into_thread_name_spaces(pids.as_fd(), kind).map_err(|error| match error {
        Errno::SRCH => Failure::new(
            Kind::FailedPrecondition,
            "the process whose pid namespace is to be joined has exited",
        ),
        other => Failure::internal("join a pid namespace", other),
    })
}
