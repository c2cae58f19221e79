//! `Stats`.

use super::Containers;
use crate::error::Failure;
use bulkhead_proto::agent::StatsResponse;

impl Containers {
    /// What a container uses.
    pub fn stats(&self, id: &str) -> Result<StatsResponse, Failure> {
        self.container(id)?.cgroup()?.stats()
    }
}
