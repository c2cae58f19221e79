//! `Delete`.

use super::{Containers, Id};
use crate::error::{Failure, Kind};
use bulkhead_proto::agent::Process;
use std::sync::Arc;
use std::time::Duration;

/// How long what a deleted container has written may take to reach the host.
const DRAIN: Duration = Duration::from_secs(60);

impl Containers {
    /// Forgets an exited process; the whole container if it is the first one.
    pub async fn delete(&self, process: &Process) -> Result<(), Failure> {
        let container = self.container(&process.container_id)?;
        let named = container.process(&process.exec_id)?;
        if named.child.exit().is_none() {
            return Err(Failure::new(
                Kind::FailedPrecondition,
                "the process has not exited; kill it first",
            ));
        }
        named.copiers.end_input();
        if !process.exec_id.is_empty() {
            // A background process that it left keeps writing to where it wrote before.
            container
                .execs
                .remove(&Id::new("exec_id", &process.exec_id)?);
            return Ok(());
        }
        if let Some(cgroup) = &container.cgroup {
            // Without a pid namespace of its own, processes can outlive the first one.
            cgroup.remove().await?;
        }
        container.storage.release();
        self.table.remove(&container.id);
        let left = Arc::clone(&container);
        tokio::spawn(async move {
            tokio::time::sleep(DRAIN).await;
            left.init.copiers.end();
            for exec in left.execs.all() {
                exec.copiers.end();
            }
        });
        Ok(())
    }
}
