//! `Start`: lets a created container's process execute.

use super::Containers;
use crate::error::{Failure, Kind};
use crate::process::Progress;
use std::sync::PoisonError;

impl Containers {
    /// Returns once the program runs, or with the reason why the kernel didn't execute it. Then
    /// the container is stopped.
    pub async fn start(&self, id: &str) -> Result<(), Failure> {
        let container = self.container(id)?;
        container.refuse_paused()?;
        let waiting = container
            .waiting
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        let stopped = container.init.child.exit().is_some();
        let Some(control) = waiting.filter(|_| !stopped) else {
            let state = if stopped { "stopped" } else { "running" };
            return Err(Failure::new(
                Kind::FailedPrecondition,
                format!("container {id:?} is {state}; only a created one can be started"),
            ));
        };
        control.start()?;
        match control.next().await? {
            Progress::Gone => Ok(()),
            Progress::Ready(_) => Err(Failure::new(
                Kind::Internal,
                format!("container {id:?} reported twice that it is ready"),
            )),
        }
    }
}
