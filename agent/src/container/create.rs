//! `Create`: everything up to the point where the first process waits to execute.

use super::{Container, Containers, Id, MAX_CONTAINERS, Pids, Process, Table, abandon};
use crate::cgroups::{Cgroup, Hierarchy};
use crate::error::{Context, Failure, Kind};
use crate::namespaces::JoinedPids;
use crate::process::{Copiers, Progress, Spawned, Spawner, WindowSize};
use crate::spec::ContainerPlan;
use crate::streams::{HostStreams, Tokens};
use bulkhead_proto::agent::CreateRequest;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

impl Containers {
    /// Returns the pid of the first process. After a failure nothing is left.
    pub async fn create(&self, request: CreateRequest) -> Result<u32, Failure> {
        let tokens = Tokens::from(&*request.streams);
        let created = self.try_create(&request, tokens).await;
        if created.is_err() {
            self.streams.discard(tokens.iter());
        }
        created
    }

    async fn try_create(&self, request: &CreateRequest, tokens: Tokens) -> Result<u32, Failure> {
        self.guest.generation().check()?;
        let id = Id::new("container_id", &request.container_id)?;
        let plan = ContainerPlan::parse(&request.spec_json)?;
        let size = WindowSize::new(request.terminal_rows, request.terminal_columns)?;
        let reservation = self.table.reserve("container", &id, MAX_CONTAINERS)?;
        let hierarchy = self.guest.prepare()?;
        let pids = self.pids_to_join(&plan).await?;
        let host = self.streams.claim(tokens).await?;
        let storage = self.storage.mount(&request.storage)?;
        let spec = request.spec_json.as_slice();
        let (cgroup, made) = match self.spawner.take_ahead(&plan, spec).await {
            Some(ahead) => (ahead.cgroup, Some((ahead.spawned, spec, hierarchy))),
            None => (hierarchy.create(id.as_str(), &plan.cgroup)?, None),
        };
        match self
            .set_up(
                (id.as_str(), pids.as_ref()),
                &plan,
                cgroup.as_ref(),
                made,
                host,
                size,
            )
            .await
        {
            Ok((spawned, copiers)) => {
                let pid = u32::try_from(spawned.child.pid).unwrap_or_default();
                reservation.fill(Container {
                    id,
                    init: Process {
                        child: spawned.child,
                        copiers,
                    },
                    pidfd: spawned.pidfd,
                    pids: match (plan.namespaces.own_pids(), &pids) {
                        (true, _) => Pids::Own,
                        (false, Some(_)) => Pids::Joined,
                        (false, None) => Pids::Guest,
                    },
                    ids: plan.namespaces.ids,
                    cgroup,
                    seccomp: plan.seccomp,
                    personality: plan.personality,
                    waiting: Mutex::new(Some(spawned.control)),
                    execs: Table::default(),
                    storage,
                });
                Ok(pid)
            }
            Err(failure) => {
                let removed = match cgroup {
                    Some(cgroup) => cgroup.remove().await,
                    None => Ok(()),
                };
                match removed {
                    Ok(()) => Err(failure),
                    Err(second) => {
                        let message = format!("{failure}; and then: {second}");
                        Err(Failure::new(failure.kind, message))
                    }
                }
            }
        }
    }

    /// A process or a link that leads into the pid namespace that the container is to join; none
    /// if it gets a new one or stays in the agent's.
    async fn pids_to_join(&self, plan: &ContainerPlan) -> Result<Option<OwnedFd>, Failure> {
        match &plan.namespaces.join_pid {
            None => Ok(None),
            Some(JoinedPids::Process(process)) => process.open().map(Some),
            Some(JoinedPids::Pod) if self.spawner.has_pod_pids() => {
                self.spawner.pod_pids().await.map(Some)
            }
            // A pod whose containers share their processes has all of them do so. One that comes
            // to others that don't is there to look at one of these, and what it is told by is the
            // machine's pid on the host, the same for each of them.
            Some(JoinedPids::Pod) => match self.containers_with_own_pids().as_slice() {
                [] => self.spawner.pod_pids().await.map(Some),
                [target] => target
                    .pidfd
                    .try_clone()
                    .map(Some)
                    .context(|| "copy a container's descriptor"),
                // All that the guest runs, so the right one among it.
                _ => Ok(None),
            },
        }
    }

    fn containers_with_own_pids(&self) -> Vec<Arc<Container>> {
        let mut all = self.table.all();
        all.retain(|one| one.pids == Pids::Own && one.init.child.exit().is_none());
        all
    }

    async fn set_up(
        &self,
        (id, pids): (&str, Option<&OwnedFd>),
        plan: &ContainerPlan,
        cgroup: Option<&Arc<Cgroup>>,
        made: Option<(Spawned, &[u8], &Hierarchy)>,
        host: HostStreams,
        size: Option<WindowSize>,
    ) -> Result<(Ready, Copiers), Failure> {
        let (mut spawned, ordered) = match made {
            Some((mut spawned, spec, hierarchy)) => {
                let limited = match cgroup {
                    Some(cgroup) => hierarchy.limit(cgroup, &plan.cgroup),
                    None => Ok(()),
                };
                let order = |()| self.spawner.order(&mut spawned, plan, spec, &host, size);
                let ordered = limited.and_then(order);
                (spawned, ordered)
            }
            None => {
                let spawned = self.spawner.init(id, plan, pids, cgroup, &host, size)?;
                let admitted = Spawner::admit(&spawned, plan);
                (spawned, admitted)
            }
        };
        let progress = match ordered {
            Ok(()) => spawned.control.next().await,
            Err(failure) => Err(failure),
        };
        let ready = match progress {
            Ok(Progress::Ready(master)) => {
                let ends = std::mem::take(&mut spawned.ends);
                Copiers::start(host, ends, master)
            }
            Ok(Progress::Gone) => Err(died(&spawned).await),
            Err(failure) => Err(failure),
        };
        match ready {
            Ok(copiers) => Ok((spawned.into(), copiers)),
            Err(failure) => {
                abandon(&spawned).await;
                Err(failure)
            }
        }
    }
}

/// What is left of a [`Spawned`] once its streams are connected.
struct Ready {
    child: crate::reaper::Child,
    pidfd: OwnedFd,
    control: crate::process::Control,
}

impl From<Spawned> for Ready {
    fn from(spawned: Spawned) -> Self {
        Self {
            child: spawned.child,
            pidfd: spawned.pidfd,
            control: spawned.control,
        }
    }
}

async fn died(spawned: &Spawned) -> Failure {
    let exit = spawned.child.wait().await;
    let how = match exit {
        Some(exit) if exit.oom_killed => {
            "killed for want of memory; raise linux.resources.memory.limit".to_owned()
        }
        Some(exit) => format!("exit status {}", exit.status),
        None => "unknown".to_owned(),
    };
    Failure::new(
        Kind::Internal,
        format!("the process that sets the container up died before it was ready ({how})"),
    )
}
