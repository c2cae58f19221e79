//! The two wire contracts of Bulkhead, each shared by its two ends, and what is read of another.
//!
//! * [`agent`] (feature `agent`): what the sandbox library asks of the agent in the guest, as
//!   generated from `agent.proto`; ttrpc over vsock.
//! * [`vmm`] (feature `vmm`): how `bulkhead-vmm` is configured, driven and heard from; JSON over
//!   inherited descriptors.
//! * [`cri`] (feature `cri`): what the shim reads of a pod's configuration in the sandbox API.
//! * [`guest`]: ports and paths that the host and the guest must agree on.

pub mod guest;

#[cfg(feature = "vmm")]
pub mod vmm;

/// Messages of the Kubernetes CRI, as far as they are read, generated from `cri.proto`.
#[cfg(feature = "cri")]
pub mod cri {
    // Generated code carries no comments of ours.
    #![allow(missing_docs, unused, nonstandard_style, clippy::all)]

    include!(concat!(env!("OUT_DIR"), "/cri.rs"));
}

/// The agent's messages, client and server, generated from `agent.proto`.
#[cfg(feature = "agent")]
pub mod agent {
    // Generated code carries no comments of ours.
    #![allow(missing_docs, unused, nonstandard_style, clippy::all)]

    mod messages {
        include!(concat!(env!("OUT_DIR"), "/agent.rs"));
    }
    mod agent {
        pub(super) use super::messages::*;
    }
    mod service {
        include!(concat!(env!("OUT_DIR"), "/agent_ttrpc.rs"));
    }
    pub use messages::*;
    pub use service::{Agent, AgentClient, create_agent};
}
