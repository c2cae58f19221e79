//! The guest's own network namespace, which the pod's containers share: its interfaces, addresses,
//! routes, routing rules and neighbours, as the host wants them.
//!
//! What was applied last is remembered, and only the difference is done. The kernel is never asked
//! what is there: what others have added stays, and a dump would cost more than all changes.

mod apply;
pub mod forward;
mod messages;
mod resolver;
mod rules;
mod wanted;

use crate::error::Failure;
use apply::Applied;
use bulkhead_netlink::Netlink;
use bulkhead_proto::agent::SetNetworkRequest;
use std::sync::{Mutex, PoisonError};
use wanted::Wanted;

/// See the module.
#[derive(Debug, Default)]
pub struct Network {
    applied: Mutex<Applied>,
}

impl Network {
    /// Makes the network of the calling thread's namespace what `request` says.
    pub fn set(&self, request: &SetNetworkRequest) -> Result<(), Failure> {
        let wanted = Wanted::new(request)?;
        let mut netlink = Netlink::open().map_err(|error| Failure::internal("network", error))?;
        let mut applied = self.applied.lock().unwrap_or_else(PoisonError::into_inner);
        applied.change_to(wanted, &mut netlink)
    }
}

#[cfg(test)]
mod tests;
