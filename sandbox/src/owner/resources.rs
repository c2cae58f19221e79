//! What a container may use and does use: limits, counters, processes, and standing still.

use super::memory::Update;
use super::pod::MAX_ENTRIES;
use super::{Done, Owner, wrong_state};
use crate::error::{Error, Result};
use crate::guest::Guest;
use crate::ids::{ContainerId, ExecId, ProcessId};
use crate::process::{Phase, Reply};
use crate::sandbox::{GuestProcess, Notification};
use bulkhead_proto::agent::StatsResponse;
use oci_spec::runtime::LinuxResources;
use std::collections::HashMap;
use std::sync::Arc;

/// Most processes that are listed.
const MAX_PIDS: usize = 65_536;

/// What a call is told that needs the container's processes to run.
pub(super) fn paused(verb: &'static str, id: &ProcessId) -> Error {
    Error::WrongState {
        verb,
        process: id.to_string(),
        state: "paused",
    }
}

impl Owner {
    /// A container that has been created, with the guest it is in.
    fn created_container(
        &mut self,
        verb: &'static str,
        id: &ContainerId,
    ) -> Result<(Phase, Arc<Guest>)> {
        let phase = self.container(id)?.init.phase;
        if phase == Phase::Creating {
            return Err(wrong_state(verb, &ProcessId::init(id.clone()), phase));
        }
        Ok((phase, self.guest()?))
    }

    pub(super) fn freeze(&mut self, id: ContainerId, frozen: bool, reply: Reply<()>) {
        let guest = match self.may_freeze(&id, frozen) {
            Ok(guest) => guest,
            Err(error) => return drop(reply.send(Err(error))),
        };
        // A pod's own container has no process that could stand still.
        let virtual_task = self.is_pod_sandbox(&id);
        self.spawn(async move {
            let result = if virtual_task {
                Ok(())
            } else {
                guest.freeze(&id, frozen).await.map_err(Error::from)
            };
            Done::Frozen {
                id,
                frozen,
                result,
                reply,
            }
        });
    }

    fn may_freeze(&mut self, id: &ContainerId, frozen: bool) -> Result<Arc<Guest>> {
        let verb = if frozen { "pause" } else { "resume" };
        let (phase, guest) = self.created_container(verb, id)?;
        let init = ProcessId::init(id.clone());
        let stands_still = self.container(id)?.paused;
        match phase {
            Phase::Running if stands_still && frozen => Err(paused(verb, &init)),
            Phase::Running if stands_still || frozen => Ok(guest),
            other => Err(wrong_state(verb, &init, other)),
        }
    }

    pub(super) fn frozen(
        &mut self,
        id: ContainerId,
        frozen: bool,
        result: Result<()>,
        reply: Reply<()>,
    ) {
        if result.is_ok()
            && let Ok(container) = self.container(&id)
        {
            container.paused = frozen;
            let container = id;
            self.notify(if frozen {
                Notification::Paused { container }
            } else {
                Notification::Resumed { container }
            });
        }
        let _ = reply.send(result);
    }

    pub(super) fn update(&mut self, id: ContainerId, resources: Vec<u8>, reply: Reply<()>) {
        let checked = for_guest(&resources);
        let guest = match checked
            .and_then(|resources| Ok((resources, self.created_container("update", &id)?)))
        {
            Ok((_, (Phase::Exited(_) | Phase::Deleting(_), _))) => Err(Error::AlreadyFinished),
            Ok((resources, (_, guest))) => Ok((resources, guest)),
            Err(error) => Err(error),
        };
        match guest {
            // The pod's own container has no cgroup.
            Ok(_) if self.is_pod_sandbox(&id) => drop(reply.send(Ok(()))),
            Ok(((resources, json), guest)) => self.begin_update(Update {
                id,
                guest,
                resources,
                json,
                reply,
            }),
            Err(error) => drop(reply.send(Err(error))),
        }
    }

    pub(super) fn stats(&mut self, id: ContainerId, reply: Reply<Box<StatsResponse>>) {
        let guest = match self.created_container("count", &id) {
            Ok((_, guest)) => guest,
            Err(error) => return drop(reply.send(Err(error))),
        };
        if self.is_pod_sandbox(&id) {
            return self.pod_stats(guest, reply);
        }
        tokio::spawn(async move {
            let stats = guest.stats(&id).await.map(|mut stats| {
                stats.io.truncate(MAX_ENTRIES);
                stats.hugetlb.truncate(MAX_ENTRIES);
                Box::new(stats)
            });
            let _ = reply.send(stats.map_err(Error::from));
        });
    }

    /// Never an empty list: a daemon that restarts takes a task without processes for one that was
    /// never created, and ends its shim. Where the guest has none to tell of, the VMM stands.
    pub(super) fn pids(&mut self, id: ContainerId, reply: Reply<Vec<GuestProcess>>) {
        let (phase, vmm) = match self.container(&id) {
            Ok(container) => (container.init.phase, container.pid),
            Err(error) => return drop(reply.send(Err(error))),
        };
        let stand_in = vec![GuestProcess {
            pid: vmm,
            exec: None,
        }];
        let ended = matches!(phase, Phase::Exited(_) | Phase::Deleting(_));
        let guest = match self.created_container("list", &id) {
            Ok((_, guest)) if !ended && !self.is_pod_sandbox(&id) => guest,
            Ok(_) | Err(Error::VmEnded(_)) => return drop(reply.send(Ok(stand_in))),
            Err(error) => return drop(reply.send(Err(error))),
        };
        let execs = self.guest_pids_of_execs(&id);
        tokio::spawn(async move {
            let processes = match guest.pids(&id).await {
                Ok(pids) if !pids.is_empty() => {
                    let named = pids.into_iter().take(MAX_PIDS).map(|pid| GuestProcess {
                        pid,
                        exec: execs.get(&pid).cloned(),
                    });
                    named.collect()
                }
                Ok(_) => stand_in,
                Err(error) => {
                    tracing::warn!(%error, container = %id, "its processes cannot be listed");
                    stand_in
                }
            };
            let _ = reply.send(Ok(processes));
        });
    }

    fn guest_pids_of_execs(&self, id: &ContainerId) -> HashMap<u32, ExecId> {
        let execs = self.containers.get(id).map(|container| &container.execs);
        execs
            .into_iter()
            .flatten()
            .filter(|(_, exec)| exec.process.is_active())
            .filter_map(|(id, exec)| Some((exec.guest_pid?, id.clone())))
            .collect()
    }

    pub(super) fn note_guest_pid(&mut self, id: &ProcessId, pid: u32) {
        if let Ok(container) = self.container(&id.container)
            && let Some(exec) = id
                .exec
                .as_ref()
                .and_then(|exec| container.execs.get_mut(exec))
        {
            exec.guest_pid = Some(pid);
        }
    }
}

/// Checks the JSON of an update's resources, and leaves out what a guest hasn't; in both forms.
fn for_guest(json: &[u8]) -> Result<(LinuxResources, Vec<u8>)> {
    let invalid = |error| Error::Invalid(format!("the resources are not valid: {error}"));
    let mut resources: LinuxResources = serde_json::from_slice(json).map_err(invalid)?;
    crate::spec::drop_swap_limit(&mut resources);
    let json = serde_json::to_vec(&resources).map_err(invalid)?;
    Ok((resources, json))
}
