//! How much memory the VM needs for the limits of its containers.

use super::{Container, Done, Owner, Vm};
use crate::error::{Error, Result};
use crate::guest::Guest;
use crate::hotplug::Hotplug;
use crate::ids::ContainerId;
use crate::process::Reply;
use oci_spec::runtime::LinuxResources;
use std::sync::Arc;

/// A size that the VM may have to grow to before a limit is set.
pub(super) struct Growth {
    hotplug: Hotplug,
    mib: u64,
}

impl Growth {
    /// All of it, or an error.
    async fn whole(self) -> Result<()> {
        Ok(self.hotplug.grow(self.mib).await?)
    }

    /// What can be had of it: a container may have a limit that its VM can't fill.
    pub async fn best(self, id: ContainerId) {
        let mib = u64::from(self.hotplug.most_of(self.mib));
        if let Err(error) = self.hotplug.grow(mib).await {
            tracing::warn!(%error, container = %id, "its VM has less memory than its limit");
        }
    }
}

/// An update of a container's limits under way.
pub(super) struct Update {
    pub id: ContainerId,
    pub guest: Arc<Guest>,
    pub resources: LinuxResources,
    pub json: Vec<u8>,
    pub reply: Reply<()>,
}

/// The memory limit in bytes, if there is one: 0 and below are none, as in cgroups.
pub(super) fn limit_of(resources: &LinuxResources) -> Option<u64> {
    let limit = resources.memory().as_ref()?.limit()?;
    u64::try_from(limit).ok().filter(|limit| *limit > 0)
}

impl Owner {
    /// The size for the containers as they are; none if the VM can't grow or need not.
    pub(super) fn growth(&self) -> Option<Growth> {
        let (hotplug, mib) = self.wanted()?;
        (mib > 0).then_some(Growth { hotplug, mib })
    }

    fn wanted(&self) -> Option<(Hotplug, u64)> {
        let Vm::Up(running) = &self.vm else {
            return None;
        };
        let limits = self
            .containers
            .values()
            .map(Container::memory_limit)
            .fold(0, u64::saturating_add);
        let hotplug = running.hotplug.clone()?;
        Some((hotplug, running.plan.size.hotplug_for(limits)))
    }

    /// Has the VM take on or give back what its containers' limits make of it by now.
    pub(super) fn settle_memory(&self) {
        if let Some((hotplug, mib)) = self.wanted() {
            hotplug.settle(mib);
        }
    }

    /// Plugs what a new limit needs, then sets it. Until that is done the higher of both counts.
    pub(super) fn begin_update(&mut self, update: Update) {
        let Update {
            id,
            guest,
            resources,
            json,
            reply,
        } = update;
        let limit = limit_of(&resources);
        let growth = match (limit, self.container(&id)) {
            (Some(limit), Ok(container)) if limit > container.memory_limit => {
                container.raising = container.raising.max(limit);
                self.growth()
            }
            _ => None,
        };
        self.spawn(async move {
            let result = async {
                if let Some(growth) = growth {
                    growth.whole().await?;
                }
                guest.update(&id, json).await.map_err(Error::from)
            };
            Done::Updated {
                result: result.await,
                id,
                limit,
                reply,
            }
        });
    }

    pub(super) fn updated(
        &mut self,
        id: &ContainerId,
        limit: Option<u64>,
        result: Result<()>,
        reply: Reply<()>,
    ) {
        if let (Some(limit), Ok(container)) = (limit, self.container(id)) {
            if container.raising == limit {
                container.raising = 0;
            }
            if result.is_ok() {
                container.memory_limit = limit;
            }
            self.settle_memory();
        }
        let _ = reply.send(result);
    }
}
