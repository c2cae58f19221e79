//! vCPU threads: one for each processor, in KVM_RUN nearly always.
//!
//! ```text
//!            pause              stop
//! Running ─────────► Paused ──────────► Stopped
//!    ▲                  │                  ▲
//!    └──────────────────┘ resume           │
//!    └─────────────────────────────────────┘ stop, reset, failure
//! ```

use std::io;
use std::os::unix::thread::JoinHandleExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use kvm_ioctls::{VcpuExit, VcpuFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use crate::bus::{Bus, PortEffect};
use crate::coalesced::GatheredWrites;
use crate::seccomp::{ThreadKind, ThreadStart};
use crate::xstate::{Xstate, XstateLayout, XstateRequest};

/// Bytes of the instruction that are reported when KVM gives up; no x86 instruction is longer.
const MAX_INSTRUCTION: usize = 15;
/// How long a kick is given before it is repeated. A signal that comes just before KVM_RUN is
/// entered is lost, so kicks are repeated until the thread has seen the new state.
const KICK_INTERVAL: Duration = Duration::from_millis(1);

/// Why a vCPU's thread came to its end by itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VcpuEnd {
    /// The guest reset the machine, or faulted three times over.
    Reset,
    /// KVM could not go on.
    Failed {
        /// Index of the vCPU.
        vcpu: u8,
        /// Guest instruction pointer, 0 when it could not be read.
        rip: u64,
        /// Instruction bytes at rip in hex.
        instruction: String,
        /// KVM's exit reason or the failed call.
        detail: String,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wanted {
    Run,
    Pause,
    Stop,
}

struct RunState {
    wanted: Wanted,
    /// Threads that are inside their run loop and have not acknowledged a pause.
    running: usize,
}

/// Shared by the vCPU threads and the one that steers them.
struct RunControl {
    state: Mutex<RunState>,
    changed: Condvar,
}

impl RunControl {
    fn lock(&self) -> std::sync::MutexGuard<'_, RunState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asked by a vCPU thread before each KVM_RUN.
    fn may_run(&self) -> bool {
        self.lock().wanted == Wanted::Run
    }

    /// Called by a vCPU thread that may not run: blocks while paused. False: leave.
    fn park(&self) -> bool {
        let mut state = self.lock();
        if state.wanted == Wanted::Run {
            return true;
        }
        state.running -= 1;
        self.changed.notify_all();
        while state.wanted == Wanted::Pause {
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        state.running += 1;
        state.wanted == Wanted::Run
    }

    fn leave(&self) {
        self.lock().running -= 1;
        self.changed.notify_all();
    }
}

/// All vCPU threads of the machine.
pub struct Vcpus {
    control: Arc<RunControl>,
    /// Locked by their threads for each KVM_RUN, so free while paused.
    fds: Vec<Arc<Mutex<VcpuFd>>>,
    threads: Vec<JoinHandle<()>>,
    exits: Arc<AtomicU64>,
}

/// What a vCPU's thread works with.
pub struct VcpuContext {
    /// Ports and device windows.
    pub bus: Arc<Bus>,
    /// Writes to device windows that came without an exit.
    pub gathered: GatheredWrites,
    /// For the areas of extended registers, and for reading the instruction that KVM gave up on.
    pub memory: GuestMemoryMmap,
    /// If the VMM saves and loads extended registers for the guest's kernel.
    pub xstate: Option<Arc<XstateLayout>>,
    /// Told once when a thread ends by itself.
    pub on_end: Arc<dyn Fn(VcpuEnd) + Send + Sync>,
    /// Run first in each thread.
    pub on_start: ThreadStart,
}

impl Vcpus {
    /// Starts one thread for each of `vcpus`, paused: [`Vcpus::resume`] lets them go.
    ///
    /// # Errors
    /// When a thread can't be started; those already started have ended again.
    pub fn start(vcpus: Vec<VcpuFd>, context: VcpuContext) -> io::Result<Self> {
        extern "C" fn interrupt_kvm_run(
            _: libc::c_int,
            _: *mut libc::siginfo_t,
            _: *mut libc::c_void,
        ) {
        }
        register_signal_handler(SIGRTMIN(), interrupt_kvm_run)?;

        let mut this = Self {
            control: Arc::new(RunControl {
                state: Mutex::new(RunState {
                    wanted: Wanted::Pause,
                    running: 0,
                }),
                changed: Condvar::new(),
            }),
            fds: vcpus
                .into_iter()
                .map(|fd| Arc::new(Mutex::new(fd)))
                .collect(),
            threads: Vec::new(),
            exits: Arc::new(AtomicU64::new(0)),
        };
        let context = Arc::new(context);
        for (index, fd) in this.fds.iter().enumerate() {
            let vcpu = Vcpu {
                index: index as u8,
                fd: Arc::clone(fd),
                io_pending: false,
                xstate: context.xstate.clone().map(Xstate::new),
                context: Arc::clone(&context),
                exits: Arc::clone(&this.exits),
            };
            this.control.lock().running += 1;
            let control = Arc::clone(&this.control);
            let thread = std::thread::Builder::new()
                .name(format!("vcpu{index}"))
                .stack_size(256 << 10)
                .spawn(move || vcpu.run(&control));
            match thread {
                Ok(thread) => this.threads.push(thread),
                Err(error) => {
                    this.control.leave();
                    this.stop();
                    return Err(error);
                }
            }
        }
        Ok(this)
    }

    /// Number of returns of KVM_RUN to user space so far.
    pub fn exits(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.exits)
    }

    /// Stops all vCPUs between two instructions; returns when none runs.
    pub fn pause(&self) {
        self.steer(Wanted::Pause);
    }

    /// The vCPUs in order, for reading and writing their state. Blocks unless they are paused.
    pub fn fds(&self) -> impl Iterator<Item = MutexGuard<'_, VcpuFd>> {
        self.fds.iter().map(|fd| lock(fd))
    }

    /// Lets all vCPUs go on.
    pub fn resume(&self) {
        self.control.lock().wanted = Wanted::Run;
        self.control.changed.notify_all();
    }

    /// Ends all vCPU threads; returns when they have left their run loops.
    pub fn stop(&mut self) {
        self.steer(Wanted::Stop);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }

    fn steer(&self, wanted: Wanted) {
        let mut state = self.control.lock();
        state.wanted = wanted;
        self.control.changed.notify_all();
        while state.running > 0 {
            for thread in &self.threads {
                // SAFETY: the handle is not joined yet, so the thread id is valid; the signal has
                // a handler that does nothing.
                unsafe { libc::pthread_kill(thread.as_pthread_t(), SIGRTMIN()) };
            }
            state = self
                .control
                .changed
                .wait_timeout(state, KICK_INTERVAL)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}

struct Vcpu {
    index: u8,
    fd: Arc<Mutex<VcpuFd>>,
    /// The last exit's port or window access is only complete after the next KVM_RUN.
    io_pending: bool,
    xstate: Option<Xstate>,
    context: Arc<VcpuContext>,
    exits: Arc<AtomicU64>,
}

impl Vcpu {
    fn run(mut self, control: &RunControl) {
        (self.context.on_start)(ThreadKind::Vcpu);
        let mut end = None;
        while end.is_none() {
            if !control.may_run() {
                end = self.complete_io();
                if end.is_some() || !control.park() {
                    break;
                }
            }
            end = self.run_once();
        }
        control.leave();
        if let Some(end) = end {
            (self.context.on_end)(end);
        }
    }

    /// Has KVM take note of the last access's outcome without running the guest any further: the
    /// vCPU's state is not whole before (Documentation/virt/kvm/api.rst, KVM_RUN).
    fn complete_io(&mut self) -> Option<VcpuEnd> {
        let mut end = None;
        // One access may be carried out in several exits.
        while self.io_pending && end.is_none() {
            self.set_immediate_exit(1);
            end = self.run_once();
        }
        self.set_immediate_exit(0);
        end
    }

    fn set_immediate_exit(&self, value: u8) {
        lock(&self.fd).set_kvm_immediate_exit(value);
    }

    /// One KVM_RUN and what it asks for.
    fn run_once(&mut self) -> Option<VcpuEnd> {
        let bus = &self.context.bus;
        let mut fd = lock(&self.fd);
        let exit = fd.run();
        self.exits.fetch_add(1, Ordering::Relaxed);
        // They came before this exit's access, and none is left behind when this vCPU is paused.
        let gathered = &self.context.gathered;
        gathered.drain(|address, data| bus.write(address, data));
        self.io_pending = matches!(
            exit,
            Ok(VcpuExit::MmioRead(..)
                | VcpuExit::MmioWrite(..)
                | VcpuExit::IoIn(..)
                | VcpuExit::IoOut(..))
        );
        let failure = match exit {
            Ok(VcpuExit::MmioRead(address, data)) => {
                bus.read(address, data);
                return None;
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                bus.write(address, data);
                return None;
            }
            Ok(VcpuExit::IoIn(port, data)) => {
                bus.port_in(port, data);
                return None;
            }
            Ok(VcpuExit::IoOut(port, data)) => {
                match (&mut self.xstate, XstateRequest::of(port, data)) {
                    (Some(xstate), Some(request)) => {
                        match xstate.serve(&fd, &self.context.memory, request) {
                            Ok(()) => return None,
                            Err(error) => error.to_string(),
                        }
                    }
                    _ => match bus.port_out(port, data) {
                        PortEffect::None => return None,
                        PortEffect::Reset => return Some(VcpuEnd::Reset),
                    },
                }
            }
            Ok(VcpuExit::Shutdown | VcpuExit::SystemEvent(..)) => return Some(VcpuEnd::Reset),
            Ok(VcpuExit::Hlt | VcpuExit::Intr) => return None,
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => return None,
            Ok(exit) => format!("{exit:?}"),
            Err(error) => format!("KVM_RUN: {error}"),
        };
        Some(self.failed(&mut fd, failure))
    }

    fn failed(&self, fd: &mut VcpuFd, exit: String) -> VcpuEnd {
        let rip = fd.get_regs().map_or(0, |regs| regs.rip);
        let (detail, kvm_bytes) = internal_error(fd, exit);
        let instruction = kvm_bytes
            .or_else(|| self.instruction_at(fd, rip))
            .unwrap_or_default();
        VcpuEnd::Failed {
            vcpu: self.index,
            rip,
            instruction: instruction
                .iter()
                .map(|byte| format!("{byte:02x}"))
                .collect::<Vec<_>>()
                .join(" "),
            detail,
        }
    }

    fn instruction_at(&self, fd: &VcpuFd, rip: u64) -> Option<Vec<u8>> {
        let translation = fd.translate_gva(rip).ok()?;
        if translation.valid == 0 {
            return None;
        }
        let mut bytes = [0u8; MAX_INSTRUCTION];
        let read = self
            .context
            .memory
            .read(&mut bytes, GuestAddress(translation.physical_address))
            .ok()?;
        Some(bytes[..read].to_vec())
    }
}

/// What KVM says of an internal error: the suberror, and for failed emulation the
/// instruction's bytes (Documentation/virt/kvm/api.rst, KVM_EXIT_INTERNAL_ERROR).
fn internal_error(fd: &mut VcpuFd, exit: String) -> (String, Option<Vec<u8>>) {
    const EMULATION: u32 = 1;
    const FLAG_INSTRUCTION_BYTES: u64 = 1;
    let run = fd.get_kvm_run();
    if run.exit_reason != kvm_bindings::KVM_EXIT_INTERNAL_ERROR {
        return (exit, None);
    }
    // SAFETY: exit_reason says that this member of the union is the one KVM filled in; both
    // views are plain integers.
    let internal = unsafe { run.__bindgen_anon_1.internal };
    let detail = format!("internal error, suberror {}", internal.suberror);
    // data[0] is flags, then a byte of length and 15 bytes of instruction.
    if internal.suberror != EMULATION
        || internal.ndata < 4
        || internal.data[0] & FLAG_INSTRUCTION_BYTES == 0
    {
        return (detail, None);
    }
    let bytes: Vec<u8> = internal.data[1..4]
        .iter()
        .flat_map(|word| word.to_le_bytes())
        .collect();
    let length = usize::from(bytes[0]).min(MAX_INSTRUCTION);
    (detail, Some(bytes[1..=length].to_vec()))
}

fn lock(fd: &Mutex<VcpuFd>) -> MutexGuard<'_, VcpuFd> {
    fd.lock().unwrap_or_else(PoisonError::into_inner)
}
