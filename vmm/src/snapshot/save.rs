//! From a running machine to the two files.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;

use kvm_bindings::CpuId;
use kvm_ioctls::{Kvm, VmFd};
use thiserror::Error;
use vm_memory::GuestMemoryMmap;

use super::format::{self, FormatError};
use super::memory::MemoryMap;
use super::vcpu::VcpuState;
use super::vm::VmState;
use super::{HostKvm, MachineState, Shape, msrs};
use crate::bus::Bus;
use crate::recipe;
use crate::vcpu::Vcpus;
use crate::virtio::mmio::StateError;

/// Why a machine was not saved. It goes on.
#[derive(Debug, Error)]
pub enum SaveError {
    /// Nothing to write to.
    #[error(
        "saving a template takes two descriptors, of a memory file and a state file; {0} came with \
         the request"
    )]
    Descriptors(usize),
    /// A file that is in use, or none.
    #[error("the {file} file must be a regular, empty file; this one has {bytes} bytes or is none")]
    NotEmpty {
        /// Which of the two.
        file: &'static str,
        /// Its length.
        bytes: u64,
    },
    /// Too early.
    #[error("the guest is not ready yet; ask again after the Ready event")]
    NotReady,
    /// Clones would lack the device.
    #[error("a device is plugged into a spare slot; unplug it first")]
    Plugged,
    /// A device is in use.
    #[error("{0}; nothing of that survives in a template, so it must be finished before")]
    Device(#[from] StateError),
    /// A file can't be written.
    #[error("{what} the template's {file} file: {source}; is its file system full?")]
    Io {
        /// What was tried.
        what: &'static str,
        /// Which of the two.
        file: &'static str,
        /// Its error.
        #[source]
        source: io::Error,
    },
    /// KVM refused to tell a state.
    #[error("reading the machine's state: {call}: {source}")]
    Kvm {
        /// The call.
        call: &'static str,
        /// Its error.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// This processor's registers don't fit.
    #[error("the vCPUs' extended registers take {0} bytes, which is more than is saved here")]
    Xsave(i32),
    /// A list of ours that is too long.
    #[error("the list of MSRs to save is longer than KVM takes")]
    TooManyMsrs,
    /// The state can't be encoded.
    #[error(transparent)]
    Encode(#[from] FormatError),
}

/// Names the call that KVM has refused.
pub(super) fn kvm_failed(call: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> SaveError {
    move |source| SaveError::Kvm { call, source }
}

fn io_failed(what: &'static str, file: &'static str) -> impl FnOnce(io::Error) -> SaveError {
    move |source| SaveError::Io { what, file, source }
}

/// The files that a template is written to.
pub struct Saving {
    memory: File,
    state: File,
}

/// The parts of a machine whose vCPUs are paused.
pub struct Paused<'a> {
    /// For what this host's KVM has.
    pub kvm: &'a Kvm,
    /// Interrupt controllers, timer, clock.
    pub vm: &'a VmFd,
    /// Paused.
    pub vcpus: &'a Vcpus,
    /// What each of them was given as its CPUID.
    pub cpuids: &'a [CpuId],
    /// Device windows.
    pub bus: &'a Bus,
    /// Guest memory.
    pub memory: &'a GuestMemoryMmap,
    /// What the guest was told of the machine.
    pub shape: &'a Shape,
    /// This host.
    pub host: &'a HostKvm,
}

impl Saving {
    /// Takes the descriptors that came with the request.
    ///
    /// # Errors
    /// When they are not two empty files.
    pub fn new(descriptors: Vec<OwnedFd>) -> Result<Self, SaveError> {
        let count = descriptors.len();
        let [memory, state] =
            <[OwnedFd; 2]>::try_from(descriptors).map_err(|_| SaveError::Descriptors(count))?;
        let files = Self {
            memory: memory.into(),
            state: state.into(),
        };
        for (name, file) in [("memory", &files.memory), ("state", &files.state)] {
            let found = file.metadata().map_err(io_failed("looking at", name))?;
            if !found.is_file() || found.len() != 0 {
                return Err(SaveError::NotEmpty {
                    file: name,
                    bytes: found.len(),
                });
            }
        }
        Ok(files)
    }

    /// Writes the machine. Its devices are suspended afterwards; when it failed they work as
    /// before, and the files are empty again.
    ///
    /// # Errors
    /// [`SaveError`].
    pub fn run(mut self, machine: &Paused) -> Result<(), SaveError> {
        let devices = machine.bus.suspend()?;
        let written = self.write(machine, &devices);
        if written.is_err() {
            machine.bus.resume_here(&devices);
            for file in [&self.memory, &self.state] {
                if let Err(error) = file.set_len(0) {
                    tracing::warn!("emptying a template's file that could not be written: {error}");
                }
            }
        }
        written
    }

    fn write(
        &mut self,
        machine: &Paused,
        devices: &[crate::virtio::mmio::TransportState],
    ) -> Result<(), SaveError> {
        let msrs = msrs::to_save(machine.kvm).map_err(kvm_failed("KVM_GET_MSR_INDEX_LIST"))?;
        let vcpus = machine
            .vcpus
            .fds()
            .zip(machine.cpuids)
            .map(|(vcpu, cpuid)| VcpuState::read(machine.vm, &vcpu, cpuid, &msrs))
            .collect::<Result<_, _>>()?;
        let vm = VmState::read(machine.vm, recipe::has_pit(machine.kvm))?;
        let memory = MemoryMap::write(machine.memory, &mut self.memory)
            .map_err(io_failed("writing", "memory"))?;
        let state = format::encode(&MachineState {
            shape: machine.shape.clone(),
            host: machine.host.clone(),
            memory,
            vm,
            vcpus,
            devices: devices.to_vec(),
            uart: machine.bus.uart_state(),
        })?;
        self.state
            .write_all(&state)
            .map_err(io_failed("writing", "state"))?;
        // Whoever finds the state complete must find the memory complete, too.
        self.memory
            .sync_all()
            .map_err(io_failed("flushing", "memory"))?;
        self.state
            .sync_all()
            .map_err(io_failed("flushing", "state"))
    }
}
