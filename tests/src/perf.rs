//! What the kernel sees of a VMM from outside, by perf_event_open: guest instructions that KVM
//! emulates (tracepoint `kvm:kvm_emulate_insn`; where a KVM emulates guest kernel mode as a whole,
//! that is every guest kernel instruction, exactly), and the moments at which a process and its
//! children execute programs, enter the guest, or reach certain guest instructions.

mod event;
mod ring;
mod tracepoint;
mod watch;

pub use event::Counter;
pub use tracepoint::{EmulateTracepoint, Sampler, count_port_exits, count_userspace_exits};
pub use watch::{Seen, Watch, What, now_ns};
