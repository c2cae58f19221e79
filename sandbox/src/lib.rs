//! A pod's life: from the bundle that containerd prepared to a container that runs in its own
//! microVM, and back to nothing.
//!
//! ```text
//! caller ── Sandbox (handle) ──commands──► owner task (owner.rs): the only holder of state
//!                                            │ spawns operations, takes their results back
//!            ┌───────────────┬───────────────┼────────────────┬─────────────────┐
//!         prepare.rs      boot.rs         guest.rs         stdio/           teardown
//!         spec, size,     folder, share,  vsock, agent     FIFOs, files,    folder.rs,
//!         rootfs mounts   VMM process     calls            log binaries     cleanup.rs
//! ```
//!
//! A VM that boots does so once for all of its kind: what its kernel and agent have become is saved
//! and every later start continues a clone of it; see [`template`].
//!
//! Everything privileged that a sandbox needs is done here before the VMM starts; see
//! [`bulkhead_proto::vmm`] for what the VMM is given.

mod boot;
mod cache;
pub mod cleanup;
pub mod config;
mod control;
mod disks;
mod error;
pub mod fds;
mod folder;
mod guest;
mod hooks;
mod host_cgroup;
mod hotplug;
pub mod ids;
pub mod images;
pub mod layers;
mod mounts;
mod network;
mod ops;
mod owner;
mod pace;
pub mod pod;
mod pod_files;
mod prepare;
mod process;
mod process_ref;
mod sandbox;
pub mod sizing;
mod slots;
pub mod spec;
mod stdio;
pub mod template;
mod tools;
mod vmm;

pub use error::{Error, Kind, Result};
pub use folder::{Locator, RuntimeFolder};
pub use hotplug::HotplugError;
pub use mounts::{MountError, RootfsMount};
pub use network::{NetworkConfig, NetworkError, SourceAddresses};
pub use process::{ExitStatus, Status};
pub use sandbox::{
    CreateContainer, Deleted, ExecProcess, GuestProcess, Notification, ProcessState, Sandbox,
    StdioPaths,
};
