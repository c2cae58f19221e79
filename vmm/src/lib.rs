//! `bulkhead-vmm`: boots one guest kernel on KVM and serves its virtio devices.
//!
//! A process of its own for each sandbox, started by the sandbox library with an empty
//! environment and only the descriptors that its configuration names (see
//! [`bulkhead_proto::vmm`]). Threads: `main` (control socket, end of the machine), `vcpuN`
//! (KVM_RUN), `events` (virtqueues) and `fs` (virtio-fs); each under a seccomp filter of its own.

pub mod arch;
pub mod bus;
pub mod coalesced;
pub mod command_line;
pub mod config;
pub mod control;
pub mod devices;
pub mod event_loop;
pub mod events;
pub mod kernel;
pub mod machine;
pub mod memory;
pub mod pins;
pub mod privileges;
pub mod probe;
pub mod recipe;
pub mod seccomp;
pub mod snapshot;
pub mod spares;
pub mod vcpu;
pub mod virtio;
pub mod wiring;
pub mod xstate;
