//! What the end-to-end tests and `bulkhead-bench` are made of: a VM, a shim and a containerd as
//! objects that clean up behind themselves, and a runner that isolates each test and says aloud
//! what it skips.

pub mod artifacts;
pub mod containerd;
pub mod error;
pub mod fifo;
pub mod figures;
pub mod footprint;
pub mod leaks;
pub mod perf;
pub mod plot;
pub mod pod;
pub mod runner;
pub mod shim;
pub mod stats;
pub mod storm;
pub mod vm;

/// The containerd namespace of all that the tests start; daemons name cgroups after it.
pub const NAMESPACE: &str = "e2e";

pub use artifacts::Artifacts;
pub use error::{Error, Result};
