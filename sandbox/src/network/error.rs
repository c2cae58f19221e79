//! What can go wrong with a pod's network.

use crate::guest::AgentError;
use bulkhead_netlink::NetlinkError;
use std::io;
use std::sync::Arc;

/// A pod's network that the guest could not be given.
#[derive(Debug, Clone, thiserror::Error)]
pub enum NetworkError {
    /// The namespace can't be entered.
    #[error("cannot enter the pod's network namespace: {0}")]
    Namespace(Arc<io::Error>),
    /// What is in it can't be read.
    #[error("cannot read the {what} in the pod's network namespace: {cause}")]
    Read {
        /// What there are several of.
        what: &'static str,
        /// Why.
        cause: Arc<NetlinkError>,
    },
    /// There is more in it than is taken on.
    #[error(
        "the pod's network namespace has too many {what}: {limit} addresses, routes, interfaces and \
         neighbours are possible together; give the pod fewer"
    )]
    TooMuch {
        /// With what the limit was reached.
        what: &'static str,
        /// How many entries there may be.
        limit: usize,
    },
    /// An interface can't be joined to the guest.
    #[error("cannot {step} for the pod's network interface {interface:?}: {cause}")]
    Interface {
        /// The interface's name.
        interface: String,
        /// What was tried.
        step: &'static str,
        /// Why it failed.
        cause: String,
    },
    /// The guest didn't take it on.
    #[error("cannot set the guest's network: {0}")]
    Guest(Arc<AgentError>),
    /// The VM is ending, and its network with it.
    #[error("the pod's network is gone with its virtual machine")]
    Ended,
}

impl From<AgentError> for NetworkError {
    fn from(cause: AgentError) -> Self {
        Self::Guest(Arc::new(cause))
    }
}
