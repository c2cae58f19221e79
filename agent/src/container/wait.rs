//! `Wait`.

use super::Containers;
use crate::error::{Failure, Kind};
use crate::reaper::Exit;
use bulkhead_proto::agent::Process;

impl Containers {
    /// Waits until a process has exited, however long that takes. What it wrote may still be on
    /// its way then; the end of each stream says when it isn't.
    pub async fn wait(&self, process: &Process) -> Result<Exit, Failure> {
        // The container may be deleted meanwhile: this only holds on to the process.
        let child = {
            let container = self.container(&process.container_id)?;
            container.process(&process.exec_id)?.child.clone()
        };
        child
            .wait()
            .await
            .ok_or_else(|| Failure::new(Kind::Internal, "the agent no longer reaps processes"))
    }
}
