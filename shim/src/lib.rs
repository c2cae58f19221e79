//! The programs that people and daemons meet: `containerd-shim-bulkhead-v2`, which containerd,
//! CRI-O and Docker start, and the `bulkhead` command.
//!
//! The shim decodes a request, makes one call to the sandbox library, and encodes the answer:
//!
//! ```text
//! containerd ──exec──► start ──re-exec──► daemon ◄──ttrpc── containerd
//!                        │                  │ service.rs ──► bulkhead_sandbox::Sandbox
//!                        └ prints address   └ publisher.rs ──events──► containerd
//! containerd ──exec──► delete ──► bulkhead_sandbox::cleanup
//! ```

pub mod address;
pub mod bootstrap;
pub mod check;
pub mod command;
pub mod daemon;
pub mod delete;
pub mod flags;
pub mod info;
pub mod layers;
pub mod logging;
pub mod metrics;
pub mod options;
pub mod publisher;
pub mod sandbox_service;
pub mod service;
pub mod start;
pub mod status;
pub mod template;
