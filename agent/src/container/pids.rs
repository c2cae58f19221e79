//! `Pids`.

use super::{Container, Containers};
use crate::error::Failure;

impl Containers {
    /// The guest pids of all processes of a container.
    pub fn pids(&self, id: &str) -> Result<Vec<u32>, Failure> {
        self.container(id)?.all_pids()
    }
}

impl Container {
    /// From the cgroup; without cgroups (only outside a guest) those that the agent has made.
    pub(super) fn all_pids(&self) -> Result<Vec<u32>, Failure> {
        if let Some(cgroup) = &self.cgroup {
            return cgroup.pids();
        }
        let execs = self.execs.all();
        let processes = execs.iter().map(|process| &process.child);
        Ok([&self.init.child]
            .into_iter()
            .chain(processes)
            .filter(|child| child.exit().is_none())
            .filter_map(|child| u32::try_from(child.pid).ok())
            .collect())
    }
}
