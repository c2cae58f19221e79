//! The memory device as its transport and the host see it, and its worker.

use super::super::buffers::Buffers;
use super::super::queue::{RingError, Virtqueue};
use super::super::worker::{WorkerContext, WorkerSlot};
use super::super::{
    Activation, DeviceError, DeviceState, DeviceType, F_EVENT_IDX, Interrupt, SuspendError,
    VirtioDevice,
};
use super::region::{BLOCK, PlugError, Region};
use super::request::{Blocks, Request, Response};
use crate::event_loop::{self, EventLoopHandle};
use bulkhead_proto::vmm::{HOTPLUG_BLOCK_MIB, HotplugStatus};
use event_manager::{EventOps, Events, MutEventSubscriber};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Feature bit VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE (§5.15.3): the driver leaves blocks alone that
/// it has not plugged.
pub const F_UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;

/// Linux has one request under way at a time.
const QUEUE_SIZE: u16 = 8;
/// Longest chain; Linux uses two descriptors.
const MAX_DESCRIPTORS: usize = QUEUE_SIZE as usize;
/// Requests served for each wake-up. Giving back what one takes away (Linux: 128 MiB) keeps the
/// other devices of the thread waiting for some milliseconds.
const REQUESTS_PER_WAKE_UP: usize = 2;

const MIB: u64 = 1 << 20;

/// What the transport's thread, the worker and the holder of a [`MemHandle`] have in common.
struct Sizes {
    /// Guest-physical address of the region.
    start: u64,
    /// Length of the region in bytes.
    region: u64,
    /// Most bytes that the host may ask for; less than the region if that isn't as long as Linux
    /// wants it.
    limit: u64,
    requested: AtomicU64,
    plugged: AtomicU64,
    generation: AtomicU32,
    /// The host has asked for a size and has not been told yet that it was reached.
    awaited: AtomicBool,
    /// Tells the host, with the size in MiB.
    reached: Box<dyn Fn(u32) + Send + Sync>,
    /// Of the active device.
    interrupt: Mutex<Option<Arc<Interrupt>>>,
}

impl std::fmt::Debug for Sizes {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.debug_struct("Sizes")
            .field("requested", &self.requested)
            .field("plugged", &self.plugged)
            .finish_non_exhaustive()
    }
}

impl Sizes {
    fn requested(&self) -> u64 {
        self.requested.load(Ordering::SeqCst)
    }

    fn plugged(&self) -> u64 {
        self.plugged.load(Ordering::SeqCst)
    }

    /// Called after each change of either size: whichever comes last finds them equal.
    fn tell_if_reached(&self) {
        let requested = self.requested();
        if requested == self.plugged() && self.awaited.swap(false, Ordering::SeqCst) {
            (self.reached)(mib(requested));
        }
    }

    fn set_interrupt(&self, interrupt: Option<Arc<Interrupt>>) {
        *self
            .interrupt
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = interrupt;
    }
}

/// Sizes are multiples of a block and at most a region's, whose limit is a number of MiB.
fn mib(bytes: u64) -> u32 {
    u32::try_from(bytes / MIB).unwrap_or(u32::MAX)
}

/// Why a size can't be asked for; nothing has changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ResizeError {
    /// Not made of blocks.
    #[error("{mib} MiB is not a multiple of {HOTPLUG_BLOCK_MIB} MiB")]
    Misaligned {
        /// What was asked for.
        mib: u32,
    },
    /// More than there are addresses for.
    #[error(
        "{mib} MiB is more than the {limit_mib} MiB that can be plugged; start the machine with a \
         larger hotplug_mib"
    )]
    TooMuch {
        /// What was asked for.
        mib: u32,
        /// What can be asked for.
        limit_mib: u32,
    },
}

/// Asks for memory from another thread than the transport's.
#[derive(Debug, Clone)]
pub struct MemHandle(Arc<Sizes>);

impl MemHandle {
    /// Has the driver, if there is one, make what is plugged so many MiB.
    ///
    /// # Errors
    /// [`ResizeError`].
    pub fn request(&self, mib: u32) -> Result<(), ResizeError> {
        let sizes = &self.0;
        if !mib.is_multiple_of(HOTPLUG_BLOCK_MIB) {
            return Err(ResizeError::Misaligned { mib });
        }
        let bytes = u64::from(mib) * MIB;
        if bytes > sizes.limit {
            let limit_mib = self::mib(sizes.limit);
            return Err(ResizeError::TooMuch { mib, limit_mib });
        }
        sizes.requested.store(bytes, Ordering::SeqCst);
        sizes.awaited.store(true, Ordering::SeqCst);
        sizes.generation.fetch_add(1, Ordering::SeqCst);
        let interrupt = sizes
            .interrupt
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(interrupt) = interrupt.as_ref() {
            interrupt.config_changed();
        }
        drop(interrupt);
        sizes.tell_if_reached();
        Ok(())
    }

    /// What was asked for and what there is.
    pub fn status(&self) -> HotplugStatus {
        HotplugStatus {
            requested_mib: mib(self.0.requested()),
            plugged_mib: mib(self.0.plugged()),
        }
    }
}

/// The virtio-mem device.
#[derive(Debug)]
pub struct MemDevice {
    sizes: Arc<Sizes>,
    worker: WorkerSlot<MemWorker>,
    /// While the device is not active.
    region: Option<Region>,
}

impl MemDevice {
    /// A device of which at most `limit_mib` MiB are plugged, be its region larger; its worker will
    /// run in `events`. `reached` is told of each size that was asked for and is there, in MiB.
    pub fn new(
        region: Region,
        limit_mib: u32,
        reached: Box<dyn Fn(u32) + Send + Sync>,
        events: EventLoopHandle,
    ) -> (MemDevice, MemHandle) {
        let sizes = Arc::new(Sizes {
            start: region.start(),
            region: region.bytes(),
            limit: region.bytes().min(u64::from(limit_mib) * MIB),
            requested: AtomicU64::new(0),
            plugged: AtomicU64::new(0),
            generation: AtomicU32::new(0),
            awaited: AtomicBool::new(false),
            reached,
            interrupt: Mutex::new(None),
        });
        let device = MemDevice {
            sizes: Arc::clone(&sizes),
            worker: WorkerSlot::new(DeviceType::Mem, events),
            region: Some(region),
        };
        (device, MemHandle(sizes))
    }
}

impl VirtioDevice for MemDevice {
    fn device_type(&self) -> DeviceType {
        DeviceType::Mem
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn device_features(&self) -> u64 {
        F_EVENT_IDX | F_UNPLUGGED_INACCESSIBLE
    }

    fn config_generation(&self) -> u32 {
        self.sizes.generation.load(Ordering::SeqCst)
    }

    /// struct virtio_mem_config (§5.15.4). The whole region is usable.
    fn config(&self) -> Vec<u8> {
        let sizes = &self.sizes;
        let mut config = Vec::with_capacity(56);
        config.extend(BLOCK.to_le_bytes()); // block_size
        config.extend([0; 8]); // node_id, padding
        config.extend(sizes.start.to_le_bytes()); // addr
        config.extend(sizes.region.to_le_bytes()); // region_size
        config.extend(sizes.region.to_le_bytes()); // usable_region_size
        config.extend(sizes.plugged().to_le_bytes()); // plugged_size
        config.extend(sizes.requested().to_le_bytes()); // requested_size
        config
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        // None only if it was lost with a broken event loop.
        let Some(region) = self.region.take() else {
            return Err(DeviceError {
                verb: "activating",
                device: DeviceType::Mem,
                source: event_loop::Error::NoSuchWorker,
            });
        };
        let interrupt = activation.interrupt.clone();
        self.worker
            .start(MemWorker::new(activation, region, Arc::clone(&self.sizes)))?;
        self.sizes.set_interrupt(Some(interrupt.clone()));
        // The host may have asked after the driver had read the sizes.
        if self.config_generation() != 0 {
            interrupt.config_changed();
        }
        Ok(())
    }

    fn reset(&mut self) -> Result<Vec<Virtqueue>, DeviceError> {
        self.sizes.set_interrupt(None);
        let Some(worker) = self.worker.stop()? else {
            return Ok(Vec::new());
        };
        self.region = Some(worker.region);
        Ok(worker.queues)
    }

    fn suspend(&mut self) -> Result<(Vec<Virtqueue>, DeviceState), SuspendError> {
        let (plugged, requested) = (self.sizes.plugged(), self.sizes.requested());
        if plugged != 0 || requested != 0 {
            return Err(SuspendError::InUse {
                device: DeviceType::Mem,
                what: format!(
                    "{} MiB are plugged and {} MiB asked for",
                    mib(plugged),
                    mib(requested)
                ),
            });
        }
        Ok((self.reset()?, DeviceState::None))
    }
}

/// Serves the queue on the event loop's thread.
#[derive(Debug)]
pub struct MemWorker {
    pub context: WorkerContext,
    /// One.
    queues: Vec<Virtqueue>,
    region: Region,
    sizes: Arc<Sizes>,
}

impl MemWorker {
    fn new(activation: Activation, region: Region, sizes: Arc<Sizes>) -> Self {
        MemWorker {
            context: WorkerContext::new(DeviceType::Mem, activation.mem, activation.interrupt),
            queues: activation.queues,
            region,
            sizes,
        }
    }

    pub fn serve(&mut self) -> Result<(), RingError> {
        let WorkerContext { mem, interrupt, .. } = &self.context;
        let (region, sizes) = (&mut self.region, &self.sizes);
        for queue in &mut self.queues {
            queue.serve(mem, interrupt, REQUESTS_PER_WAKE_UP, |chain| {
                let buffers = Buffers::collect(chain, mem, MAX_DESCRIPTORS)?;
                let response = answer(region, sizes, Request::read(&buffers, mem)?);
                Ok(buffers.writable.write(mem, &response.bytes()) as u32)
            })?;
        }
        // Told after the answers, so that who hears of it finds the driver done.
        sizes.tell_if_reached();
        Ok(())
    }
}

/// Carries out a request.
fn answer(region: &mut Region, sizes: &Sizes, request: Request) -> Response {
    match request {
        Request::Plug(blocks) => {
            let plugged = sizes.plugged().saturating_add(bytes(blocks));
            // §5.15.6.2: not more than the host has asked for.
            if plugged > sizes.requested() && region.state(blocks).is_some() {
                return Response::Nack;
            }
            match region.plug(blocks) {
                Ok(()) => {
                    sizes.plugged.store(plugged, Ordering::SeqCst);
                    Response::Ack
                }
                Err(PlugError::Invalid) => Response::Error,
                Err(PlugError::NoSlot(error)) => {
                    tracing::warn!("KVM has no room for plugged memory: {error}");
                    Response::Busy
                }
            }
        }
        Request::Unplug(blocks) => match region.unplug(blocks) {
            Ok(()) => {
                let plugged = sizes.plugged().saturating_sub(bytes(blocks));
                sizes.plugged.store(plugged, Ordering::SeqCst);
                Response::Ack
            }
            Err(_) => Response::Error,
        },
        Request::UnplugAll => {
            region.unplug_all();
            sizes.plugged.store(0, Ordering::SeqCst);
            Response::Ack
        }
        Request::State(blocks) => region
            .state(blocks)
            .map_or(Response::Error, Response::State),
        Request::Unknown(_) => Response::Error,
    }
}

fn bytes(blocks: Blocks) -> u64 {
    u64::from(blocks.count) * BLOCK
}

impl MutEventSubscriber for MemWorker {
    fn init(&mut self, ops: &mut EventOps) {
        for queue in &self.queues {
            queue.watch(ops, 0);
        }
    }

    fn process(&mut self, _events: Events, _ops: &mut EventOps) {
        if !self.context.broken() {
            let result = self.serve();
            self.context.check(result);
        }
    }
}
