//! Saving a machine as a template, and continuing it in another process.
//!
//! ```text
//!   state file                                    memory file
//!   header: magic, versions, length, checksum     pages that are not all zeros, one after the
//!   payload: shape, memory map, KVM's VM and      other in the order of the state's memory map
//!            vCPU state, device windows
//! ```
//!
//! | file | what it is about |
//! |---|---|
//! | `format.rs` | the state file's header and encoding |
//! | `shape.rs` | what a machine must have in common with the saved one |
//! | `host.rs` | whether this is the KVM that the machine was saved on |
//! | `memory.rs` | the memory file |
//! | `vcpu.rs`, `msrs.rs` | a vCPU's registers, in the order in which KVM wants them |
//! | `vm.rs` | interrupt controllers, timer and clock |
//! | `save.rs`, `restore.rs` | the two ways through all of it |
//!
//! Both files are hostile: whatever they hold, the outcome is a machine or a [`Refused`].
//! Checksums find damage; whoever can write the files can put any guest into them, so they must
//! come from where only the sandbox library writes.

pub mod format;
pub mod host;
pub mod memory;
pub mod msrs;
pub mod restore;
pub mod save;
pub mod shape;
#[cfg(test)]
mod tests;
pub mod vcpu;
pub mod vm;

pub use host::HostKvm;
pub use restore::{Refused, Template};
pub use save::{SaveError, Saving};
pub use shape::Shape;

use serde::{Deserialize, Serialize};
use vm_superio::SerialState;

use crate::virtio::mmio::TransportState;

/// All of a machine but its memory's contents.
#[derive(Debug, Serialize, Deserialize)]
pub struct MachineState {
    /// What the machine that goes on from here must look like.
    pub shape: Shape,
    /// Where it was saved.
    pub host: HostKvm,
    /// Which guest pages the memory file holds.
    pub memory: memory::MemoryMap,
    /// Interrupt controllers, timer, clock.
    pub vm: vm::VmState,
    /// One for each vCPU, in order.
    pub vcpus: Vec<vcpu::VcpuState>,
    /// One for each device window, in order.
    pub devices: Vec<TransportState>,
    /// Registers of the early console.
    pub uart: UartState,
}

/// The registers of the early console's UART. It is polled, and nothing is ever typed into it, so
/// there is no input.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct UartState {
    baud_divisor: [u8; 2],
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
}

impl From<SerialState> for UartState {
    fn from(state: SerialState) -> Self {
        Self {
            baud_divisor: [state.baud_divisor_low, state.baud_divisor_high],
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
        }
    }
}

impl From<UartState> for SerialState {
    fn from(state: UartState) -> Self {
        let [baud_divisor_low, baud_divisor_high] = state.baud_divisor;
        Self {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: Vec::new(),
        }
    }
}
