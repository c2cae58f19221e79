//! `Resize`.

use super::Containers;
use crate::error::{Failure, Kind};
use crate::process::WindowSize;
use bulkhead_proto::agent::ResizeRequest;
use std::os::fd::AsFd;

impl Containers {
    /// Sets the size of a process's terminal.
    pub fn resize(&self, request: &ResizeRequest) -> Result<(), Failure> {
        let size = WindowSize::new(request.rows, request.columns)?;
        let container = self.container(&request.process.container_id)?;
        let process = container.process(&request.process.exec_id)?;
        let Some(terminal) = process.copiers.terminal() else {
            return Err(Failure::new(
                Kind::FailedPrecondition,
                "the process has no terminal, so it has no size",
            ));
        };
        match size {
            Some(size) => size.apply(terminal.as_fd()),
            None => Ok(()),
        }
    }
}
