//! `Pause` and `Resume`.

use super::Containers;
use crate::error::{Failure, Kind};

impl Containers {
    /// Returns once every process of the container stands still.
    pub async fn pause(&self, id: &str) -> Result<(), Failure> {
        let container = self.container(id)?;
        if container.init.child.exit().is_some() {
            return Err(not_in_state(
                id,
                "stopped; only a running one can be paused",
            ));
        }
        let cgroup = container.cgroup()?;
        if cgroup.is_frozen()? {
            return Err(not_in_state(id, "paused already"));
        }
        cgroup.freeze().await
    }

    /// Lets the processes of a paused container go on.
    pub async fn resume(&self, id: &str) -> Result<(), Failure> {
        let container = self.container(id)?;
        let cgroup = container.cgroup()?;
        if !cgroup.is_frozen()? {
            return Err(not_in_state(id, "not paused"));
        }
        cgroup.thaw().await
    }
}

fn not_in_state(id: &str, state: &str) -> Failure {
    Failure::new(
        Kind::FailedPrecondition,
        format!("container {id:?} is {state}"),
    )
}
