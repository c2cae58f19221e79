//! The two wire contracts of Bulkhead, each shared by its two ends.
//!
//! * [`agent`] (feature `agent`): what the sandbox library asks of the agent in the guest, as
//!   generated from `agent.proto`; ttrpc over vsock.
//! * [`vmm`] (feature `vmm`): how `bulkhead-vmm` is configured, driven and heard from; JSON over
//!   inherited descriptors.
//! * [`guest`]: ports and paths that the host and the guest must agree on.

pub mod guest;

#[cfg(feature = "vmm")]
pub mod vmm;

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
