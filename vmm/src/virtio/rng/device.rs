//! The entropy device as its transport sees it, and its worker.

use super::super::buffers::{Buffers, Segments};
use super::super::queue::{RingError, Virtqueue};
use super::super::worker::{WorkerContext, WorkerSlot};
use super::super::{Activation, DeviceError, DeviceType, F_EVENT_IDX, VirtioDevice};
use crate::event_loop::EventLoopHandle;
use event_manager::{EventOps, Events, MutEventSubscriber};
use vm_memory::GuestMemoryMmap;

/// Linux has one request under way at a time.
const QUEUE_SIZE: u16 = 8;
/// Longest chain; Linux uses one descriptor.
const MAX_DESCRIPTORS: usize = QUEUE_SIZE as usize;
/// Requests served for each wake-up; with [`BYTES_PER_REQUEST`] the bound on a wake-up's work.
const REQUESTS_PER_WAKE_UP: usize = 8;
/// Bytes given at most for one request, however much room it has. §5.4.6.1 asks for at least one.
const BYTES_PER_REQUEST: usize = 8 << 10;

/// The virtio-rng device.
#[derive(Debug)]
pub struct RngDevice {
    worker: WorkerSlot<RngWorker>,
}

impl RngDevice {
    /// Its worker will run in `events`.
    pub fn new(events: EventLoopHandle) -> Self {
        RngDevice {
            worker: WorkerSlot::new(DeviceType::Rng, events),
        }
    }
}

impl VirtioDevice for RngDevice {
    fn device_type(&self) -> DeviceType {
        DeviceType::Rng
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn device_features(&self) -> u64 {
        F_EVENT_IDX
    }

    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        self.worker.start(RngWorker {
            context: WorkerContext::new(DeviceType::Rng, activation.mem, activation.interrupt),
            queues: activation.queues,
        })
    }

    fn reset(&mut self) -> Result<Vec<Virtqueue>, DeviceError> {
        let worker = self.worker.stop()?;
        Ok(worker.map_or_else(Vec::new, |worker| worker.queues))
    }
}

#[derive(Debug)]
struct RngWorker {
    context: WorkerContext,
    /// One.
    queues: Vec<Virtqueue>,
}

impl RngWorker {
    fn serve(&mut self) -> Result<(), RingError> {
        let WorkerContext { mem, interrupt, .. } = &self.context;
        for queue in &mut self.queues {
            queue.serve(mem, interrupt, REQUESTS_PER_WAKE_UP, |chain| {
                let mut buffers = Buffers::collect(chain, mem, MAX_DESCRIPTORS)?;
                Ok(fill(&buffers.writable.take_front(BYTES_PER_REQUEST), mem))
            })?;
        }
        Ok(())
    }
}

/// Fills the buffer with random bytes, through a small array of our own: the kernel's generator
/// costs far more than the copy. Returns how many bytes were written.
fn fill(buffer: &Segments, mem: &GuestMemoryMmap) -> u32 {
    let mut rest = buffer.clone();
    let mut written = 0;
    let mut bytes = [0; 256];
    while !rest.is_empty() {
        // SAFETY: the pointer and length are those of the array.
        let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
        // Requests of up to 256 bytes are neither cut short nor interrupted (getrandom(2)).
        let Ok(got) = usize::try_from(got) else {
            break;
        };
        let done = rest.take_front(got).write(mem, &bytes[..got]);
        written += done as u32;
        if done == 0 {
            break;
        }
    }
    written
}

impl MutEventSubscriber for RngWorker {
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

#[cfg(test)]
mod tests {
    use super::super::super::testing::{Desc, DriverQueue, activation, event_loop, memory};
    use super::*;
    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestAddress};

    #[test]
    fn buffers_are_filled_up_to_the_limit() {
        let mem = memory();
        let events = event_loop();
        let mut device = RngDevice::new(events.handle());
        let mut queue = DriverQueue::new(&mem, 8);
        let (activation, line) = activation(&mem, &[&queue], 0);
        device.activate(activation).unwrap();

        mem.write_slice(&[0; 0x4000], GuestAddress(0x10000))
            .unwrap();
        for (chain, expected) in [
            (vec![Desc::writable(0x10000, 32)], 32),
            (
                vec![Desc::writable(0x10020, 300), Desc::writable(0x11000, 5)],
                305,
            ),
            (
                vec![Desc::writable(0x10000, 0x10_0000)],
                BYTES_PER_REQUEST as u32,
            ),
            (vec![Desc::readable(0x10000, 16)], 0),
        ] {
            queue.add(&chain);
            queue.kick();
            assert_eq!(queue.wait_used().1, expected);
        }
        assert!(line.read().unwrap() >= 1);
        let mut bytes = vec![0; BYTES_PER_REQUEST];
        mem.read_slice(&mut bytes, GuestAddress(0x10000)).unwrap();
        let ones: u32 = bytes.iter().map(|byte| byte.count_ones()).sum();
        let bits = 8 * BYTES_PER_REQUEST as u32;
        assert!(
            (bits * 45 / 100..bits * 55 / 100).contains(&ones),
            "{ones} of {bits}"
        );
        assert_eq!(device.reset().unwrap().len(), 1);
    }

    proptest! {
        /// Any chains: bounded work, and broken ones break the queue instead of the VMM.
        #[test]
        fn any_chains_are_survived(chains in prop::collection::vec(prop::collection::vec(Desc::any(), 1..6), 1..8)) {
            let mem = memory();
            let mut queue = DriverQueue::new(&mem, 8);
            for chain in &chains {
                queue.add(chain);
            }
            let (activation, _line) = activation(&mem, &[&queue], 0);
            let mut worker = RngWorker {
                context: WorkerContext::new(DeviceType::Rng, activation.mem, activation.interrupt),
                queues: activation.queues,
            };
            if worker.serve().is_ok() {
                // A chain may have overwritten the used ring; lengths are only bounded if not.
                prop_assert!(!worker.context.broken());
            }
        }
    }
}
