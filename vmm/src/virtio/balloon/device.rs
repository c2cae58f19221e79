//! The balloon device as its transport sees it, and its worker.

use super::super::buffers::Buffers;
use super::super::queue::{RingError, Virtqueue};
use super::super::worker::{WorkerContext, WorkerSlot};
use super::super::{Activation, DeviceError, DeviceType, F_EVENT_IDX, VirtioDevice};
use super::request;
use crate::event_loop::EventLoopHandle;
use crate::memory;
use event_manager::{EventOps, Events, MutEventSubscriber};
use vm_memory::volatile_memory::VolatileSlice;

/// Feature bit VIRTIO_BALLOON_F_REPORTING (§5.5.3): there is a queue for free pages.
pub const F_REPORTING: u64 = 1 << 5;

/// The queues' places. Those of features that are not offered are left out, as drivers do: free
/// page reporting's is the last in §5.5.2's list, and the third here, after the deflate queue.
pub const INFLATE: usize = 0;
/// See [`INFLATE`].
pub const REPORTING: usize = 2;

/// Linux reports 32 ranges at once (PAGE_REPORTING_CAPACITY) and doesn't take a smaller queue.
const QUEUE_SIZE: u16 = 32;
const MAX_DESCRIPTORS: usize = QUEUE_SIZE as usize;
/// Requests served for each queue and wake-up. Linux has one under way at a time; taking away 32
/// ranges of 4 MiB keeps the other devices of the thread waiting for some milliseconds.
const REQUESTS_PER_WAKE_UP: usize = 2;

/// The virtio-balloon device.
#[derive(Debug)]
pub struct BalloonDevice {
    worker: WorkerSlot<BalloonWorker>,
}

impl BalloonDevice {
    /// Its worker will run in `events`.
    pub fn new(events: EventLoopHandle) -> Self {
        BalloonDevice {
            worker: WorkerSlot::new(DeviceType::Balloon, events),
        }
    }
}

impl VirtioDevice for BalloonDevice {
    fn device_type(&self) -> DeviceType {
        DeviceType::Balloon
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE; 3]
    }

    fn device_features(&self) -> u64 {
        F_EVENT_IDX | F_REPORTING
    }

    /// `num_pages` and `actual` (§5.5.4). The driver's writes to `actual` are not kept: nobody
    /// asks for pages, so nobody waits for it.
    fn config(&self) -> Vec<u8> {
        vec![0; 8]
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        self.worker.start(BalloonWorker::new(activation))
    }

    fn reset(&mut self) -> Result<Vec<Virtqueue>, DeviceError> {
        let worker = self.worker.stop()?;
        Ok(worker.map_or_else(Vec::new, |worker| worker.queues))
    }
}

#[derive(Debug)]
pub struct BalloonWorker {
    pub context: WorkerContext,
    /// Three.
    queues: Vec<Virtqueue>,
    /// The driver knows of the reporting queue.
    reporting: bool,
    /// The host has refused to take pages, and the log tells.
    refused: bool,
}

impl BalloonWorker {
    pub fn new(activation: Activation) -> Self {
        BalloonWorker {
            context: WorkerContext::new(DeviceType::Balloon, activation.mem, activation.interrupt),
            queues: activation.queues,
            reporting: activation.features & F_REPORTING != 0,
            refused: false,
        }
    }

    pub fn serve(&mut self) -> Result<(), RingError> {
        let WorkerContext { mem, interrupt, .. } = &self.context;
        for (index, queue) in self.queues.iter_mut().enumerate() {
            if index == REPORTING && !self.reporting {
                continue;
            }
            queue.serve(mem, interrupt, REQUESTS_PER_WAKE_UP, |chain| {
                let buffers = Buffers::collect(chain, mem, MAX_DESCRIPTORS)?;
                let pages = match index {
                    INFLATE => request::inflated(&buffers, mem)?,
                    REPORTING => request::reported(&buffers, mem),
                    // A page out of the balloon is there again once the guest touches it.
                    _ => Vec::new(),
                };
                give_back(&pages, &mut self.refused);
                Ok(0)
            })?;
        }
        Ok(())
    }
}

/// Gives the pages to the host. One that it doesn't take (a locked one, say) stays the guest's.
fn give_back(pages: &[VolatileSlice], refused: &mut bool) {
    for range in pages {
        if let Err(error) = memory::discard(range)
            && !*refused
        {
            *refused = true;
            tracing::warn!(
                "giving {} bytes of free guest memory back to the host failed: {error}; the VM \
                 keeps what the host refuses",
                range.len()
            );
        }
    }
}

impl MutEventSubscriber for BalloonWorker {
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
