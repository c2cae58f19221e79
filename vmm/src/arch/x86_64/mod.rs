//! x86-64: what the boot protocol of Linux asks a loader to prepare, and the state of a vCPU that
//! enters the kernel at its 64-bit entry point.

pub mod boot_params;
pub mod cpuid;
pub mod layout;
pub mod mptable;
pub mod registers;
