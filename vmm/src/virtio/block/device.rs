//! The block device as its transport sees it, and its worker.

use super::super::queue::{RingError, Virtqueue};
use super::super::worker::{WorkerContext, WorkerSlot};
use super::super::{
    Activation, DeviceError, DeviceState, DeviceType, F_EVENT_IDX, Interrupt, SuspendError,
    VirtioDevice, mismatch,
};
use super::backend::{Backing, BackingError};
use super::request::{
    ID_BYTES, Limits, MAX_DESCRIPTORS, MAX_RANGE_SECTORS, MAX_RANGES, MAX_SEGMENTS, Operation,
    Range, Request, Status,
};
use crate::event_loop::EventLoopHandle;
use crate::virtio::buffers::Buffers;
use event_manager::{EventOps, Events, MutEventSubscriber};
use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use virtio_bindings::virtio_blk as ids;

/// Room for one request of [`MAX_SEGMENTS`], or for many of the usual size. No indirect descriptors
/// are offered: Linux would use them for every request, and allocate a table for each.
const QUEUE_SIZE: u16 = 512;
/// Requests taken up for each wake-up, so that other devices have their turn.
const REQUESTS_PER_WAKE_UP: usize = 64;
/// Bytes transferred for each wake-up: a longer request goes on at the next one.
const BYTES_PER_WAKE_UP: usize = 1 << 20;
/// Discards are worth it for whole blocks of the host's file system.
const DISCARD_ALIGNMENT_SECTORS: u32 = 8;

/// What the transport's thread, the worker and the holder of a [`BlockHandle`] have in common.
#[derive(Debug)]
struct Slot {
    serial: [u8; ID_BYTES],
    read_only: bool,
    backing: OnceLock<Backing>,
    /// Of the active device.
    interrupt: Mutex<Option<Arc<Interrupt>>>,
}

impl Slot {
    fn limits(&self) -> Limits {
        Limits {
            sectors: self.backing.get().map_or(0, Backing::sectors),
            read_only: self.read_only,
        }
    }

    fn set_interrupt(&self, interrupt: Option<Arc<Interrupt>>) {
        *self
            .interrupt
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = interrupt;
    }
}

/// Why a slot can't take a backing; the slot is unchanged.
#[derive(Debug, thiserror::Error)]
pub enum SetBackingError {
    /// A backing can't be exchanged under the guest's feet.
    #[error("the block slot already has a backing; use an empty slot")]
    AlreadySet,
    /// The file is not good for it.
    #[error(transparent)]
    Backing(#[from] BackingError),
}

/// Fills an empty slot from another thread than the transport's.
#[derive(Debug, Clone)]
pub struct BlockHandle(Arc<Slot>);

impl BlockHandle {
    /// Whether the slot refuses writes.
    pub fn read_only(&self) -> bool {
        self.0.read_only
    }

    /// Gives the slot its backing and tells the driver, if there is one, by a configuration change.
    pub fn set_backing(&self, file: File) -> Result<(), SetBackingError> {
        let backing = Backing::new(file)?;
        self.0
            .backing
            .set(backing)
            .map_err(|_| SetBackingError::AlreadySet)?;
        let interrupt = self
            .0
            .interrupt
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(interrupt) = interrupt.as_ref() {
            interrupt.config_changed();
        }
        Ok(())
    }
}

/// One virtio-blk device.
#[derive(Debug)]
pub struct BlockDevice {
    slot: Arc<Slot>,
    /// Whether the slot was made without a backing, so that its capacity may have changed.
    filled_later: bool,
    worker: WorkerSlot<BlockWorker>,
}

impl BlockDevice {
    /// A slot with this backing or, without one, of capacity 0. `serial` is cut to 20 bytes.
    pub fn new(
        serial: &str,
        backing: Option<Backing>,
        read_only: bool,
        events: EventLoopHandle,
    ) -> (BlockDevice, BlockHandle) {
        let mut id = [0; ID_BYTES];
        for (to, from) in id.iter_mut().zip(serial.bytes()) {
            *to = from;
        }
        let filled_later = backing.is_none();
        let slot = Arc::new(Slot {
            serial: id,
            read_only,
            backing: backing.map_or_else(OnceLock::new, OnceLock::from),
            interrupt: Mutex::new(None),
        });
        let device = BlockDevice {
            slot: slot.clone(),
            filled_later,
            worker: WorkerSlot::new(DeviceType::Block, events),
        };
        (device, BlockHandle(slot))
    }
}

impl VirtioDevice for BlockDevice {
    fn device_type(&self) -> DeviceType {
        DeviceType::Block
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn device_features(&self) -> u64 {
        let always = F_EVENT_IDX | 1 << ids::VIRTIO_BLK_F_SEG_MAX | 1 << ids::VIRTIO_BLK_F_BLK_SIZE;
        let by_mode = if self.slot.read_only {
            1 << ids::VIRTIO_BLK_F_RO
        } else {
            1 << ids::VIRTIO_BLK_F_FLUSH
                | 1 << ids::VIRTIO_BLK_F_DISCARD
                | 1 << ids::VIRTIO_BLK_F_WRITE_ZEROES
        };
        always | by_mode
    }

    fn config_generation(&self) -> u32 {
        u32::from(self.filled_later && self.slot.backing.get().is_some())
    }

    /// struct virtio_blk_config (§5.2.4), as far as the features offered need it.
    fn config(&self) -> Vec<u8> {
        let mut config = Vec::with_capacity(60);
        config.extend(self.slot.limits().sectors.to_le_bytes()); // capacity
        config.extend([0; 4]); // size_max
        config.extend(MAX_SEGMENTS.to_le_bytes()); // seg_max
        config.extend([0; 4]); // geometry
        config.extend((super::SECTOR as u32).to_le_bytes()); // blk_size
        config.extend([0; 8]); // topology
        config.extend([0; 4]); // writeback, unused0, num_queues
        config.extend(MAX_RANGE_SECTORS.to_le_bytes()); // max_discard_sectors
        config.extend(MAX_RANGES.to_le_bytes()); // max_discard_seg
        config.extend(DISCARD_ALIGNMENT_SECTORS.to_le_bytes()); // discard_sector_alignment
        config.extend(MAX_RANGE_SECTORS.to_le_bytes()); // max_write_zeroes_sectors
        config.extend(MAX_RANGES.to_le_bytes()); // max_write_zeroes_seg
        config.extend([1, 0, 0, 0]); // write_zeroes_may_unmap, unused1
        config
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let interrupt = activation.interrupt.clone();
        self.worker
            .start(BlockWorker::new(self.slot.clone(), activation))?;
        self.slot.set_interrupt(Some(interrupt.clone()));
        // The backing may have come after the driver had read the capacity.
        if self.config_generation() != 0 {
            interrupt.config_changed();
        }
        Ok(())
    }

    fn reset(&mut self) -> Result<Vec<Virtqueue>, DeviceError> {
        self.slot.set_interrupt(None);
        let worker = self.worker.stop()?;
        Ok(worker.map_or_else(Vec::new, |worker| worker.queues))
    }

    fn suspend(&mut self) -> Result<(Vec<Virtqueue>, DeviceState), SuspendError> {
        // What goes on at the next wake-up would be lost with the worker.
        self.worker.with(BlockWorker::finish)?;
        let state = DeviceState::Block {
            sectors: self.slot.limits().sectors,
        };
        Ok((self.reset()?, state))
    }

    /// A slot that was empty may have its backing by now, which its driver is told; a full one has
    /// the size that its driver knows.
    fn resume(&mut self, activation: Activation, state: DeviceState) -> Result<(), SuspendError> {
        let DeviceState::Block { sectors: saved } = state else {
            return Err(mismatch(DeviceType::Block, state));
        };
        let sectors = self.slot.limits().sectors;
        if saved != 0 && saved != sectors {
            return Err(SuspendError::Mismatch {
                device: DeviceType::Block,
                what: format!("it had {saved} sectors, its backing has {sectors}"),
            });
        }
        self.filled_later |= saved != sectors;
        Ok(self.activate(activation)?)
    }
}

/// Serves the queue on the event loop's thread.
#[derive(Debug)]
struct BlockWorker {
    slot: Arc<Slot>,
    context: WorkerContext,
    /// One.
    queues: Vec<Virtqueue>,
    /// A long transfer that goes on at the next wake-up.
    current: Option<Current>,
    /// No request is begun any more: what a kick that is still on its way announces waits for the
    /// next worker.
    finished: bool,
}

/// A request in work.
#[derive(Debug)]
struct Current {
    request: Request,
    /// Bytes written to the driver's buffers so far.
    written: u32,
}

impl BlockWorker {
    fn new(slot: Arc<Slot>, activation: Activation) -> Self {
        BlockWorker {
            slot,
            context: WorkerContext::new(DeviceType::Block, activation.mem, activation.interrupt),
            queues: activation.queues,
            current: None,
            finished: false,
        }
    }

    /// Works until no request is begun, and begins none from then on.
    fn finish(&mut self) {
        self.finished = true;
        while self.current.is_some() && !self.context.broken() {
            let result = self.serve();
            self.context.check(result);
        }
    }

    fn serve(&mut self) -> Result<(), RingError> {
        let BlockWorker {
            slot,
            context,
            queues,
            current,
            ..
        } = self;
        let mem = &context.mem;
        let Some(queue) = queues.first_mut() else {
            return Ok(());
        };
        let mut bytes_left = BYTES_PER_WAKE_UP;
        let mut requests_left = REQUESTS_PER_WAKE_UP;
        queue.disable_notification(mem)?;
        loop {
            if bytes_left == 0 || requests_left == 0 {
                queue.rearm();
                break;
            }
            let mut work = match current.take() {
                Some(work) => work,
                None => match queue.pop(mem)? {
                    Some(chain) => Current {
                        request: Request::parse(
                            Buffers::collect(chain, mem, MAX_DESCRIPTORS)?,
                            mem,
                            slot.limits(),
                        )?,
                        written: 0,
                    },
                    None if queue.enable_notification(mem)? => {
                        queue.disable_notification(mem)?;
                        continue;
                    }
                    None => break,
                },
            };
            match work.step(slot, mem, &mut bytes_left) {
                Some(status) => {
                    work.request.answer(mem, status);
                    let written = work.written.saturating_add(1);
                    queue.push(mem, work.request.head, written)?;
                    requests_left -= 1;
                }
                None => *current = Some(work),
            }
        }
        queue.notify(mem, &context.interrupt)
    }
}

impl Current {
    /// Works on the request, transferring at most `bytes_left` bytes; gives its status once it is
    /// finished.
    fn step(
        &mut self,
        slot: &Slot,
        mem: &vm_memory::GuestMemoryMmap,
        bytes_left: &mut usize,
    ) -> Option<Status> {
        let backing = slot.backing.get();
        let result = match (&mut self.request.operation, backing) {
            (Operation::Refuse(status), _) => return Some(*status),
            (Operation::GetId { data }, _) => {
                self.written = data.write(mem, &slot.serial) as u32;
                Ok(())
            }
            // Without a backing, transfers are out of range and were refused unless empty.
            (_, None) => Ok(()),
            (Operation::Read { offset, data }, Some(backing)) => {
                let now = data.take_front(*bytes_left);
                let len = now.len();
                *bytes_left -= len;
                let result = backing.read_at(&now.slices(mem), *offset);
                *offset += len as u64;
                self.written = self.written.saturating_add(len as u32);
                if result.is_ok() && !data.is_empty() {
                    return None;
                }
                result
            }
            (Operation::Write { offset, data }, Some(backing)) => {
                let now = data.take_front(*bytes_left);
                let len = now.len();
                *bytes_left -= len;
                let result = backing.write_at(&now.slices(mem), *offset);
                *offset += len as u64;
                if result.is_ok() && !data.is_empty() {
                    return None;
                }
                result
            }
            (Operation::Flush, Some(backing)) => backing.flush(),
            (Operation::Discard(ranges), Some(backing)) => ranges
                .iter()
                .try_for_each(|range| backing.discard(range.offset, range.len)),
            (Operation::WriteZeroes(ranges), Some(backing)) => {
                ranges.iter().try_for_each(|range| zero(backing, range))
            }
        };
        Some(status_of(result))
    }
}

fn zero(backing: &Backing, range: &Range) -> io::Result<()> {
    if range.unmap {
        backing.discard(range.offset, range.len)
    } else {
        backing.write_zeroes(range.offset, range.len)
    }
}

/// §5.2.6: what the host's file system can't do is unsupported, all else an I/O error. The cause is
/// not logged: a guest could fill the log with it.
fn status_of(result: io::Result<()>) -> Status {
    match result {
        Ok(()) => Status::Ok,
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => Status::Unsupported,
        Err(_) => Status::IoError,
    }
}

impl MutEventSubscriber for BlockWorker {
    fn init(&mut self, ops: &mut EventOps) {
        for queue in &self.queues {
            queue.watch(ops, 0);
        }
    }

    fn process(&mut self, _events: Events, _ops: &mut EventOps) {
        if self.finished {
            return;
        }
        if !self.context.broken() {
            let result = self.serve();
            self.context.check(result);
        }
    }
}
