//! What the end-to-end tests and `bulkhead-bench` are made of: a VM, a shim and a containerd as
//! objects that clean up behind themselves, and a runner that isolates each test and says aloud
//! what it skips.

pub mod artifacts;
pub mod cgroups;
pub mod containerd;
pub mod docker;
pub mod error;
pub mod fifo;
pub mod figures;
pub mod fio;
pub mod footprint;
pub mod iperf;
pub mod leaks;
pub mod packets;
pub mod perf;
pub mod plot;
pub mod pod;
pub mod runner;
pub mod shim;
pub mod stats;
pub mod storm;
pub mod tap;
pub mod thin_pool;
pub mod vm;

/// The containerd namespace of what this scenario starts: daemons name cgroups after it, and the
/// host's cgroups are what scenarios that run at the same time share.
pub fn namespace() -> String {
    let scenario = std::env::var(runner::SCENARIO_ENV).unwrap_or_else(|_| "bench".into());
    format!("e2e-{scenario}")
}

pub use artifacts::Artifacts;
pub use error::{Error, Result};
