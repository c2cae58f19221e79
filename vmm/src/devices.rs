//! The machine's devices: built in slot order, each with its window, its interrupt line and its
//! notification descriptors.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Instant;

use bulkhead_proto::vmm::{Event, HotplugStatus};
use thiserror::Error;

use crate::config::BlockResource;
use crate::event_loop::{self, EventLoop, EventLoopHandle};
use crate::events::EventSink;
use crate::memory::Memory;
use crate::pins::Pins;
use crate::seccomp::{ThreadKind, ThreadStart};
use crate::virtio::balloon::BalloonDevice;
use crate::virtio::block::{Backing, BackingError, BlockDevice, BlockHandle, SetBackingError};
use crate::virtio::console::{ConsoleDevice, ConsoleLog};
use crate::virtio::fs::{FsDevice, FsError};
use crate::virtio::mem::{KvmSlots, MemDevice, MemHandle, Region, ResizeError};
use crate::virtio::mmio::MmioTransport;
use crate::virtio::rng::RngDevice;
use crate::virtio::vsock::{VsockDevice, VsockError};
use crate::virtio::{DeviceType, VirtioDevice};
use crate::wiring::{Place, WiringError};

/// Why a device could not be built.
#[derive(Debug, Error)]
pub enum DevicesError {
    /// A thread or its descriptors.
    #[error(transparent)]
    EventLoop(#[from] event_loop::Error),
    /// A block device's backing.
    #[error("block device {serial}: {source}")]
    Block {
        /// Its serial number.
        serial: String,
        /// What is wrong with it.
        #[source]
        source: BackingError,
    },
    /// The socket device.
    #[error(transparent)]
    Vsock(#[from] VsockError),
    /// The file-system server.
    #[error(transparent)]
    Fs(#[from] FsError),
    /// A device's window.
    #[error(transparent)]
    Wiring(#[from] WiringError),
}

/// Why a slot's backing could not be set; nothing has changed.
#[derive(Debug, Error)]
pub enum BackingRequestError {
    /// No such slot.
    #[error("there is no block slot {index}; the machine has {count}")]
    NoSuchSlot {
        /// What was asked for.
        index: usize,
        /// How many there are.
        count: usize,
    },
    /// The request came without a descriptor.
    #[error("the request has no descriptor; send the backing's with it as SCM_RIGHTS")]
    NoDescriptor,
    /// The driver has been told otherwise already.
    #[error("block slot {index} was made read_only = {made}, which the guest has been told")]
    OtherMode {
        /// Which slot.
        index: usize,
        /// What it was made as.
        made: bool,
    },
    /// The slot is taken or the file is no good.
    #[error(transparent)]
    SetBacking(#[from] SetBackingError),
}

/// Why a guest wasn't asked for another size; nothing has changed.
#[derive(Debug, Error)]
pub enum HotplugRequestError {
    /// Not on this machine.
    #[error("the machine has no memory device; start it with a hotplug_mib")]
    NoDevice,
    /// Not this much.
    #[error(transparent)]
    Resize(#[from] ResizeError),
}

/// What devices are built from.
pub struct DeviceContext<'a> {
    /// For interrupt lines, notifications and plugged memory.
    pub pins: &'a Arc<Pins>,
    /// Guest memory.
    pub memory: &'a Memory,
    /// How many MiB of its region can be plugged.
    pub hotplug_mib: u32,
    /// Block devices in slot order.
    pub block: Vec<BlockResource>,
    /// Where clients dial the guest.
    pub vsock: UnixListener,
    /// The folder served over virtio-fs.
    pub share: Option<OwnedFd>,
    /// A virtio console that writes here.
    pub console: Option<Arc<Mutex<ConsoleLog>>>,
    /// The threads that the devices' workers run on.
    pub loops: Loops,
    /// Where readiness is told.
    pub events: EventSink,
    /// When this process began.
    pub started: Instant,
    /// The guest is ready from the start: its drivers have set up their devices.
    pub ready: bool,
}

/// The devices' threads. They take their time to start, so they are started before all else.
pub struct Loops {
    events: EventLoop,
    file_server: Option<EventLoop>,
}

impl Loops {
    /// Starts the threads, that of the file server only if there is a `share`; `on_start` runs
    /// first in each.
    ///
    /// # Errors
    /// [`event_loop::Error`].
    pub fn start(on_start: &ThreadStart, share: bool) -> Result<Self, event_loop::Error> {
        let thread = |name, kind| {
            let on_start = Arc::clone(on_start);
            EventLoop::new(name, move || on_start(kind))
        };
        Ok(Self {
            events: thread("events", ThreadKind::Events)?,
            file_server: share
                .then(|| thread("fs", ThreadKind::FileServer))
                .transpose()?,
        })
    }
}

/// How many devices [`Devices::build`] makes: the block devices, random numbers, vsock and the
/// balloon, and what else is asked for.
pub fn count(block: usize, share: bool, console: bool, hotplug: bool) -> usize {
    block + 3 + usize::from(share) + usize::from(console) + usize::from(hotplug)
}

/// The machine's devices and the threads that serve them.
pub struct Devices {
    types: Vec<DeviceType>,
    block: Vec<BlockHandle>,
    mem: Option<MemHandle>,
    readiness: Arc<Readiness>,
    events: EventLoopHandle,
    /// Held for their threads.
    _loops: Vec<EventLoop>,
}

impl Devices {
    /// Builds all devices; the second value is their windows in slot order.
    ///
    /// # Errors
    /// [`DevicesError`].
    pub fn build(context: DeviceContext) -> Result<(Self, Vec<MmioTransport>), DevicesError> {
        let Loops {
            events: event_loop,
            file_server,
        } = context.loops;
        let events = event_loop.handle();
        let mut devices: Vec<Box<dyn VirtioDevice>> = Vec::new();

        let mut handles = Vec::new();
        for block in context.block {
            let (device, handle) = block_device(block, events.clone())?;
            devices.push(Box::new(device));
            handles.push(handle);
        }
        devices.push(Box::new(RngDevice::new(events.clone())));

        let readiness = Arc::new(Readiness::new(
            context.events.clone(),
            context.started,
            context.ready,
        ));
        let knock = Arc::clone(&readiness);
        devices.push(Box::new(VsockDevice::new(
            context.vsock,
            Box::new(move || knock.tell()),
            events.clone(),
        )?));
        if let (Some(share), Some(file_server)) = (context.share, &file_server) {
            // Built here, while this thread may still open what the server needs.
            devices.push(Box::new(FsDevice::new(share, file_server.handle())?));
        }
        if let Some(log) = context.console {
            devices.push(Box::new(ConsoleDevice::new(log, events.clone())));
        }
        devices.push(Box::new(BalloonDevice::new(events.clone())));
        let mem = context.memory.hotplug.as_ref().map(|region| {
            let slots = KvmSlots::new(Arc::clone(context.pins.vm()), Arc::clone(region));
            let region = Region::new(Arc::clone(region), Box::new(slots));
            let sink = context.events.clone();
            let reached = Box::new(move |mib| sink.send(&Event::HotplugReached { mib }));
            let (device, handle) =
                MemDevice::new(region, context.hotplug_mib, reached, events.clone());
            devices.push(Box::new(device));
            handle
        });

        let types = devices.iter().map(|device| device.device_type()).collect();
        let windows = devices
            .into_iter()
            .enumerate()
            .map(|(slot, device)| {
                let window = Place::of_boot_device(slot).connect(
                    context.pins,
                    &context.memory.whole,
                    device,
                )?;
                if !context.ready {
                    Place::of_boot_device(slot).gather_writes(context.pins.vm())?;
                }
                Ok(window)
            })
            .collect::<Result<Vec<_>, WiringError>>()?;
        let loops: Vec<EventLoop> = file_server.into_iter().chain([event_loop]).collect();
        // They have started meanwhile.
        for event_loop in &loops {
            event_loop.wait_started()?;
        }
        let this = Self {
            types,
            block: handles,
            mem,
            readiness,
            events,
            _loops: loops,
        };
        Ok((this, windows))
    }

    /// Whose exits the readiness report counts.
    pub fn count_exits(&self, exits: Arc<AtomicU64>) {
        // Set once, by the one caller that builds the machine.
        let _ = self.readiness.exits.set(exits);
    }

    /// The thread that serves them, for more devices.
    pub fn event_loop(&self) -> &EventLoopHandle {
        &self.events
    }

    /// The guest has knocked.
    pub fn ready(&self) -> bool {
        self.readiness.told.load(Ordering::Relaxed)
    }

    /// Type names in slot order.
    pub fn names(&self) -> Vec<String> {
        self.types
            .iter()
            .map(|device| device.name().to_owned())
            .collect()
    }

    /// What was asked for and what is plugged; none without a memory device.
    pub fn hotplug(&self) -> Option<HotplugStatus> {
        self.mem.as_ref().map(MemHandle::status)
    }

    /// Asks the guest to have `mib` MiB plugged.
    ///
    /// # Errors
    /// [`HotplugRequestError`]; nothing has changed then.
    pub fn set_hotplug(&self, mib: u32) -> Result<(), HotplugRequestError> {
        let mem = self.mem.as_ref().ok_or(HotplugRequestError::NoDevice)?;
        Ok(mem.request(mib)?)
    }

    /// Gives the empty block slot `index` its backing.
    ///
    /// # Errors
    /// [`BackingRequestError`]; nothing has changed then.
    pub fn set_backing(
        &self,
        index: usize,
        read_only: bool,
        descriptor: Option<OwnedFd>,
    ) -> Result<(), BackingRequestError> {
        let handle = self
            .block
            .get(index)
            .ok_or(BackingRequestError::NoSuchSlot {
                index,
                count: self.block.len(),
            })?;
        let made = handle.read_only();
        if made != read_only {
            return Err(BackingRequestError::OtherMode { index, made });
        }
        let file = descriptor.ok_or(BackingRequestError::NoDescriptor)?;
        Ok(handle.set_backing(file.into())?)
    }
}

fn block_device(
    block: BlockResource,
    events: EventLoopHandle,
) -> Result<(BlockDevice, BlockHandle), DevicesError> {
    let backing =
        block
            .file
            .map(Backing::new)
            .transpose()
            .map_err(|source| DevicesError::Block {
                serial: block.serial.clone(),
                source,
            })?;
    Ok(BlockDevice::new(
        &block.serial,
        backing,
        block.read_only,
        events,
    ))
}

/// Tells the parent, once, that the guest is ready.
struct Readiness {
    events: EventSink,
    started: Instant,
    exits: OnceLock<Arc<AtomicU64>>,
    told: AtomicBool,
}

impl Readiness {
    fn new(events: EventSink, started: Instant, told: bool) -> Self {
        Self {
            events,
            started,
            exits: OnceLock::new(),
            told: AtomicBool::new(told),
        }
    }

    fn tell(&self) {
        if self.told.swap(true, Ordering::Relaxed) {
            return;
        }
        self.events.send(&Event::Ready {
            since_start_us: self.started.elapsed().as_micros() as u64,
            userspace_exits: self
                .exits
                .get()
                .map_or(0, |exits| exits.load(Ordering::Relaxed)),
        });
    }
}
