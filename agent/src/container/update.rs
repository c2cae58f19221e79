//! `Update`.

use super::Containers;
use crate::error::{Failure, Kind};
use crate::spec::parse_resources;
use bulkhead_proto::agent::UpdateRequest;

impl Containers {
    /// Changes a container's limits, or none of them.
    pub fn update(&self, request: &UpdateRequest) -> Result<(), Failure> {
        let container = self.container(&request.container_id)?;
        let settings = parse_resources(&request.resources_json)?;
        let cgroup = container.cgroup()?;
        if container.init.child.exit().is_some() {
            return Err(Failure::new(
                Kind::FailedPrecondition,
                format!("container {:?} is stopped", request.container_id),
            ));
        }
        settings.check_usage(|file| cgroup.number(file))?;
        self.guest.prepare()?.change(cgroup, &settings)
    }
}
