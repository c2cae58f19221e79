//! From the two files to a machine that is about to run.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::thread::JoinHandle;

use bulkhead_proto::vmm::KvmKind;
use kvm_bindings::CpuId;
use kvm_ioctls::{VcpuFd, VmFd};
use thiserror::Error;
use vm_memory::GuestMemoryMmap;

use super::format::{self, FormatError, MAX_STATE};
use super::memory::{MemoryFileError, Progress};
use super::shape::Difference;
use super::{HostKvm, MachineState, Shape};
use crate::bus::Bus;
use crate::config::TemplateFiles;
use crate::virtio::mmio::StateError;

/// Why a template can't be used. No guest instruction has run.
#[derive(Debug, Error)]
pub enum Refused {
    /// A file can't be read.
    #[error("reading the state file: {0}")]
    Read(#[source] io::Error),
    /// The state file.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// The memory file.
    #[error(transparent)]
    Memory(#[from] MemoryFileError),
    /// The thread that checks the memory file could not be started or has failed.
    #[error("checking the memory file on a thread of its own: {0}")]
    Thread(String),
    /// Another machine.
    #[error(transparent)]
    Shape(#[from] Difference),
    /// The state contradicts itself.
    #[error("the template has {found} {what}, its machine {expected}")]
    Count {
        /// Of what.
        what: &'static str,
        /// How many there are.
        found: usize,
        /// How many there should be.
        expected: usize,
    },
    /// Another processor or KVM.
    #[error(
        "the template's processor differs from this host's: CPUID leaf {leaf:#x}.{index} is \
         {saved:08x?} there and {here:08x?} here"
    )]
    Cpuid {
        /// EAX.
        leaf: u32,
        /// ECX.
        index: u32,
        /// EAX, EBX, ECX, EDX as saved.
        saved: [u32; 4],
        /// The same on this host.
        here: [u32; 4],
    },
    /// Another processor or KVM.
    #[error("the template's processor has {saved} CPUID entries, this host's {here}")]
    CpuidLength {
        /// As saved.
        saved: usize,
        /// On this host.
        here: usize,
    },
    /// Time would pass at another rate.
    #[error("the template's time-stamp counter runs at {saved} kHz, this host's at {here} kHz")]
    TscRate {
        /// As saved.
        saved: u32,
        /// On this host.
        here: u32,
    },
    /// Time would stand still.
    #[error(
        "the template's time-stamp counter was at {saved}, this host's is behind it at {now} and \
         can't be set: the host was restarted"
    )]
    TscBehind {
        /// As saved.
        saved: u64,
        /// On this host.
        now: u64,
    },
    /// Registers that don't fit.
    #[error("the vCPUs' extended registers take {0} bytes here, which is more than a template has")]
    Xsave(i32),
    /// A model-specific register.
    #[error("the template's MSR {index:#x} can't be set: {why}")]
    Msr {
        /// Its index.
        index: u32,
        /// Why.
        why: &'static str,
    },
    /// More of them than KVM takes at once.
    #[error("the template has {0} MSRs, more than can be set")]
    TooManyMsrs(usize),
    /// KVM doesn't take a part of the state.
    #[error("KVM does not take the template's state: {call}: {source}")]
    Kvm {
        /// The call.
        call: &'static str,
        /// Its error.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// A device window.
    #[error("{0}")]
    Device(#[from] StateError),
    /// The early console.
    #[error("the template's early console is in an impossible state: {0}")]
    Uart(String),
}

/// Names the call that KVM has refused.
pub(super) fn kvm_refused(call: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Refused {
    move |source| Refused::Kvm { call, source }
}

/// A template whose state file is whole, and whose memory file is being checked.
pub struct Template {
    state: Arc<MachineState>,
    memory: Arc<File>,
    progress: Arc<Progress>,
    /// Checks while the machine is built.
    thread: JoinHandle<Result<(), MemoryFileError>>,
}

impl Template {
    /// Reads and checks the state file, and begins to check the memory file: that takes longest of
    /// all that a start does, so it should begin first.
    ///
    /// # Errors
    /// When it is not one that this VMM has written.
    pub fn open(files: TemplateFiles) -> Result<Self, Refused> {
        let length = files.state.metadata().map_err(Refused::Read)?.len();
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        if length > MAX_STATE {
            return Err(FormatError::Long(length).into());
        }
        let mut bytes = vec![0; length];
        files
            .state
            .read_exact_at(&mut bytes, 0)
            .map_err(Refused::Read)?;
        let state: Arc<MachineState> = Arc::new(format::decode(&bytes)?);
        let memory = Arc::new(files.memory);
        let progress = Arc::new(Progress::default());
        let thread = {
            let (state, memory) = (Arc::clone(&state), Arc::clone(&memory));
            let progress = Arc::clone(&progress);
            std::thread::Builder::new()
                .name("verify".into())
                .spawn(move || state.memory.verify(&memory, &progress))
                .map_err(|error| Refused::Thread(error.to_string()))?
        };
        Ok(Self {
            state,
            memory,
            progress,
            thread,
        })
    }

    /// How KVM runs guest kernel mode, if this is the KVM that the template was saved on.
    pub fn kvm_kind(&self, here: &HostKvm) -> Option<KvmKind> {
        (self.state.host == *here).then_some(self.state.shape.kvm)
    }

    /// Whether a machine of shape `here` can go on from this.
    ///
    /// # Errors
    /// The first difference.
    pub fn check_shape(&self, here: &Shape) -> Result<(), Refused> {
        self.state.shape.check(here)?;
        let vcpus = usize::from(here.vcpus);
        if self.state.vcpus.len() != vcpus {
            return Err(Refused::Count {
                what: "vCPUs",
                found: self.state.vcpus.len(),
                expected: vcpus,
            });
        }
        Ok(())
    }

    /// Maps the memory file over `memory`, which is fresh.
    ///
    /// # Errors
    /// When the file has another length than it should, or can't be mapped.
    pub fn map_memory(&self, memory: &GuestMemoryMmap) -> Result<(), Refused> {
        Ok(self.state.memory.map(memory, &self.memory)?)
    }

    /// Puts the machine into the saved state, with all of its memory checked before any of it is
    /// used. `vcpus` have the CPUIDs that come with them.
    ///
    /// # Errors
    /// When memory, vCPUs or devices are not what a VMM can have saved on this host.
    pub fn apply(self, vm: &VmFd, vcpus: &[(VcpuFd, CpuId)], bus: &Bus) -> Result<(), Refused> {
        let state = &self.state;
        for (saved, (vcpu, cpuid)) in state.vcpus.iter().zip(vcpus) {
            saved.write(vm, vcpu, cpuid)?;
        }
        state.vm.write(vm)?;
        for (saved, (vcpu, _)) in state.vcpus.iter().zip(vcpus) {
            saved.tell_stopped(vm, vcpu)?;
        }
        bus.restore_uart(state.uart)?;
        self.state.memory.verify(&self.memory, &self.progress)?;
        match self.thread.join() {
            Ok(verified) => verified?,
            Err(_) => return Err(Refused::Thread("it has panicked".into())),
        }
        // Last: devices begin to work on guest memory, and to raise interrupts.
        bus.resume(&self.state.devices)
    }
}
