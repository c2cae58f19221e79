//! How a machine is built, from top to bottom: booted from a kernel, or continued from a template.

use std::fs::File;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use bulkhead_proto::vmm::KvmKind;
use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, KVM_PIT_SPEAKER_DUMMY, kvm_pit_config};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use thiserror::Error;
use vm_memory::GuestMemoryMmap;

use crate::arch::x86_64::{boot_params, cpuid, layout, mptable, registers};
use crate::bus::Bus;
use crate::coalesced::GatheredWrites;
use crate::command_line::{self, CommandLineError, Words};
use crate::config::Resources;
use crate::devices::{self, DeviceContext, Devices, DevicesError, Loops};
use crate::events::EventSink;
use crate::kernel::{self, KernelError};
use crate::machine::{Ended, Machine};
use crate::memory::{self, Memory, MemoryError};
use crate::pins::Pins;
use crate::privileges::{self, PrivilegeError};
use crate::probe::{self, ProbeError};
use crate::seccomp::{self, Filters, SeccompError, ThreadKind, ThreadStart};
use crate::snapshot::shape::{BlockShape, Image};
use crate::snapshot::{HostKvm, Refused, Shape, Template};
use crate::spares::Spares;
use crate::vcpu::{VcpuContext, Vcpus};
use crate::virtio::console::ConsoleLog;
use crate::xstate::{self, XstateLayout};

/// Why a machine could not be built.
#[derive(Debug, Error)]
pub enum BuildError {
    /// Privileges could not be given up.
    #[error(transparent)]
    Privileges(#[from] PrivilegeError),
    /// System calls could not be limited.
    #[error(transparent)]
    Seccomp(#[from] SeccompError),
    /// KVM can't run guests.
    #[error(transparent)]
    Probe(#[from] ProbeError),
    /// Guest memory could not be had.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The kernel's command line.
    #[error(transparent)]
    CommandLine(#[from] CommandLineError),
    /// A device could not be built.
    #[error(transparent)]
    Devices(#[from] DevicesError),
    /// A call to KVM failed.
    #[error("building the VM: {call}: {source}")]
    Kvm {
        /// The call.
        call: &'static str,
        /// Its error.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// The kernel image is not what it should be.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The boot tables do not fit guest memory.
    #[error("writing the boot tables: {0}")]
    Tables(#[from] vm_memory::GuestMemoryError),
    /// The template can't be used.
    #[error(transparent)]
    Template(#[from] Refused),
    /// Random numbers, threads, descriptors.
    #[error("{what}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// Its error.
        #[source]
        source: std::io::Error,
    },
}

fn kvm_failed(call: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> BuildError {
    move |source| BuildError::Kvm { call, source }
}

fn system_failed(what: &'static str) -> impl FnOnce(std::io::Error) -> BuildError {
    move |source| BuildError::System { what, source }
}

/// Builds the machine. Nothing of the guest runs before all of it has succeeded.
///
/// # Errors
/// The first step that failed; [`BuildError::Template`] if it is the template's fault.
pub(crate) fn build(
    mut resources: Resources,
    events: &EventSink,
    started: Instant,
) -> Result<Machine, BuildError> {
    privileges::drop_all_but(resources.share.is_some())?;
    let template = resources.template.take();
    let template = template.map(Template::open).transpose()?;
    seccomp::report_trapped_calls().map_err(system_failed("handling SIGSYS"))?;
    let on_start = thread_start(Filters::compile()?);
    let loops = Loops::start(&on_start, resources.share.is_some()).map_err(DevicesError::from)?;

    check_kvm(&resources.kvm)?;
    let host = HostKvm::of(&resources.kvm).map_err(system_failed("asking KVM what it is"))?;
    let kind = kvm_kind(&resources, &host, template.as_ref())?;
    let supported = resources
        .kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(kvm_failed("KVM_GET_SUPPORTED_CPUID"))?;
    let xstate = xstate_layout(&resources, kind, &supported);
    let shape = shape_of(&resources, kind, xstate.is_some())?;
    let memory = Memory::allocate(resources.memory_bytes, resources.hotplug_region)?;
    let start = match template {
        None => Start::Boot(resources.kernel),
        Some(template) => {
            template.check_shape(&shape)?;
            template.map_memory(&memory.boot)?;
            Start::Continue(template)
        }
    };
    let vm = Arc::new(create_vm(&resources.kvm, &memory.boot)?);
    let vcpus = create_vcpus(&resources.kvm, &vm, &shape, &supported)?;
    let pins = Arc::new(Pins::new(Arc::clone(&vm)));

    let console = Arc::new(Mutex::new(ConsoleLog::new(
        resources.console_log,
        resources.console_limit,
    )));
    let (devices, windows) = Devices::build(DeviceContext {
        pins: &pins,
        memory: &memory,
        hotplug_mib: resources.hotplug_mib,
        block: resources.block,
        vsock: resources.vsock,
        share: resources.share,
        console: resources.console_verbose.then(|| Arc::clone(&console)),
        loops,
        events: events.clone(),
        started,
        ready: matches!(start, Start::Continue(_)),
    })?;
    let device_count = windows.len();
    let bus = Arc::new(Bus::new(
        Arc::clone(&console),
        windows,
        memory.hotplug_range(),
    ));
    match start {
        Start::Boot(kernel) => load_boot_state(&memory.boot, &shape, device_count, kernel, &vcpus)?,
        Start::Continue(template) => template.apply(&vm, &vcpus, &bus)?,
    }

    let ended = Ended::new().map_err(system_failed("creating an event descriptor"))?;
    let (vcpus, cpuids) = vcpus.into_iter().unzip();
    let vcpus = start_vcpus(vcpus, xstate, &bus, &memory.whole, &ended, &on_start)?;
    devices.count_exits(vcpus.exits());
    let spares = Spares::new(
        pins,
        memory.whole.clone(),
        Arc::clone(&bus),
        devices.event_loop().clone(),
    );
    on_start(ThreadKind::Main);
    Ok(Machine {
        vcpus,
        cpuids,
        devices,
        spares,
        bus,
        vm,
        kvm: resources.kvm,
        memory,
        shape,
        host,
        console,
        control: resources.control,
        ended,
        paused: false,
        saved: false,
    })
}

/// How KVM runs guest kernel mode: as the template says if it was saved on this very KVM, and as
/// the probe finds out otherwise.
fn kvm_kind(
    resources: &Resources,
    host: &HostKvm,
    template: Option<&Template>,
) -> Result<KvmKind, ProbeError> {
    if let Some(kind) = template.and_then(|template| template.kvm_kind(host)) {
        return Ok(kind);
    }
    let findings = probe::run(&resources.kvm)?;
    tracing::info!(sandbox = resources.sandbox_id, ?findings, "KVM probed");
    Ok(findings.kvm)
}

/// How this host lays out extended registers, if the guest's kernel has to have them saved for it.
fn xstate_layout(
    resources: &Resources,
    kind: KvmKind,
    supported: &CpuId,
) -> Option<Arc<XstateLayout>> {
    let end = layout::hotplug_start(resources.memory_bytes).0 + resources.hotplug_region;
    if kind != KvmKind::Emulated || end > xstate::ADDRESS_LIMIT {
        return None;
    }
    XstateLayout::of_host(&resources.kvm, supported).map(Arc::new)
}

/// What the guest is told of the machine.
fn shape_of(resources: &Resources, kvm: KvmKind, xstate: bool) -> Result<Shape, BuildError> {
    let share = resources.share.is_some();
    let verbose = resources.console_verbose;
    let hotplug = resources.hotplug_region != 0;
    let devices = devices::count(resources.block.len(), share, verbose, hotplug);
    let words = Words {
        kind: kvm,
        xstate,
        devices,
        verbose,
        hotplug,
    };
    let line = command_line::build(words, &resources.kernel_params)?;
    tracing::debug!(line, "guest kernel command line");
    Ok(Shape {
        vcpus: resources.vcpus,
        memory_bytes: resources.memory_bytes,
        hotplug_bytes: resources.hotplug_region,
        kvm,
        command_line: line,
        kernel: Image::of(&resources.kernel).map_err(system_failed("reading the kernel"))?,
        block: BlockShape::of_all(&resources.block)
            .map_err(system_failed("reading the block devices' images"))?,
        share,
    })
}

fn start_vcpus(
    vcpus: Vec<VcpuFd>,
    xstate: Option<Arc<XstateLayout>>,
    bus: &Arc<Bus>,
    memory: &GuestMemoryMmap,
    ended: &Ended,
    on_start: &ThreadStart,
) -> Result<Vcpus, BuildError> {
    let on_end = ended
        .sender()
        .map_err(system_failed("duplicating an event descriptor"))?;
    let Some(first) = vcpus.first() else {
        let none = std::io::Error::from(std::io::ErrorKind::InvalidInput);
        return Err(system_failed("a machine without vCPUs")(none));
    };
    let gathered =
        GatheredWrites::map(first).map_err(system_failed("mapping KVM's coalesced MMIO ring"))?;
    let context = VcpuContext {
        bus: Arc::clone(bus),
        gathered,
        memory: memory.clone(),
        xstate,
        on_end,
        on_start: Arc::clone(on_start),
    };
    Vcpus::start(vcpus, context).map_err(system_failed("starting the vCPU threads"))
}

/// Where the guest's first instruction comes from.
enum Start {
    /// The kernel's entry point.
    Boot(File),
    /// A template, whose memory file is being checked.
    Continue(Template),
}

/// Kernel, boot tables and registers of a cold boot.
fn load_boot_state(
    memory: &GuestMemoryMmap,
    shape: &Shape,
    device_count: usize,
    kernel: File,
    vcpus: &[(VcpuFd, CpuId)],
) -> Result<(), BuildError> {
    let entry = kernel::load(memory, kernel)?;
    let seed = random_seed().map_err(system_failed("reading random numbers"))?;
    boot_params::write(memory, shape.memory_bytes, &shape.command_line, seed)?;
    mptable::write(memory, shape.vcpus, device_count)?;
    registers::write_tables(memory)?;
    for (vcpu, _) in vcpus {
        registers::set_up(vcpu, entry).map_err(kvm_failed("setting boot registers"))?;
    }
    Ok(())
}

/// A thread that can't be confined must not run: the whole process ends.
fn thread_start(filters: Filters) -> ThreadStart {
    Arc::new(move |kind| {
        if let Err(error) = filters.install(kind) {
            tracing::error!("{error}");
            std::process::exit(1);
        }
    })
}

fn check_kvm(kvm: &Kvm) -> Result<(), BuildError> {
    let version = kvm.get_api_version();
    if version == kvm_bindings::KVM_API_VERSION as i32 {
        return Ok(());
    }
    Err(BuildError::System {
        what: "opening /dev/kvm",
        source: std::io::Error::other(format!(
            "kvm_fd is not /dev/kvm, or its API version {version} is not 12"
        )),
    })
}

/// The VM with its memory, and its interrupt controllers, which KVM models in the host's kernel.
/// Memory comes first: KVM waits for readers of what it replaces, for which it needs no time only
/// as long as nothing else has been changed before.
fn create_vm(kvm: &Kvm, memory: &GuestMemoryMmap) -> Result<VmFd, BuildError> {
    let vm = kvm.create_vm().map_err(kvm_failed("KVM_CREATE_VM"))?;
    memory::register(&vm, memory).map_err(kvm_failed("KVM_SET_USER_MEMORY_REGION"))?;
    vm.set_identity_map_address(layout::IDENTITY_MAP)
        .map_err(kvm_failed("KVM_SET_IDENTITY_MAP_ADDR"))?;
    vm.set_tss_address(layout::TSS)
        .map_err(kvm_failed("KVM_SET_TSS_ADDR"))?;
    vm.create_irq_chip()
        .map_err(kvm_failed("KVM_CREATE_IRQCHIP"))?;
    if has_pit(kvm) {
        vm.create_pit2(kvm_pit_config {
            flags: KVM_PIT_SPEAKER_DUMMY,
            ..Default::default()
        })
        .map_err(kvm_failed("KVM_CREATE_PIT2"))?;
    }
    Ok(vm)
}

/// Whether machines have a programmable interval timer: only where the local APIC's timer has no
/// deadline mode. With it, and with the rates that KVM's clock names, Linux has no use for another
/// (`apic_needs_pit()` of arch/x86/kernel/apic/apic.c). For this timer KVM makes a thread of the
/// host's kernel, which a start would wait for.
pub(crate) fn has_pit(kvm: &Kvm) -> bool {
    !kvm.check_extension(Cap::TscDeadlineTimer)
}

fn random_seed() -> std::io::Result<[u8; boot_params::SEED_LEN]> {
    let mut seed = [0u8; boot_params::SEED_LEN];
    // SAFETY: the buffer is as long as said; up to 256 bytes come whole and without a signal's
    // interference (getrandom(2)).
    let read = unsafe { libc::getrandom(seed.as_mut_ptr().cast(), seed.len(), 0) };
    if read == seed.len() as isize {
        Ok(seed)
    } else {
        Err(std::io::Error::last_os_error())
    }
}

/// The vCPUs, each with the CPUID that it was given.
fn create_vcpus(
    kvm: &Kvm,
    vm: &VmFd,
    shape: &Shape,
    supported: &CpuId,
) -> Result<Vec<(VcpuFd, CpuId)>, BuildError> {
    let tsc_deadline = kvm.check_extension(Cap::TscDeadlineTimer);
    (0..shape.vcpus)
        .map(|index| {
            let vcpu = vm
                .create_vcpu(u64::from(index))
                .map_err(kvm_failed("KVM_CREATE_VCPU"))?;
            let cpuid = cpuid::for_vcpu(supported, shape.kvm, tsc_deadline, index, shape.vcpus);
            vcpu.set_cpuid2(&cpuid)
                .map_err(kvm_failed("KVM_SET_CPUID2"))?;
            Ok((vcpu, cpuid))
        })
        .collect()
}
