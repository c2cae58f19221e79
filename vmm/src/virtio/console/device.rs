//! The console device as its transport sees it, and its worker.

use super::super::buffers::{Buffers, Segments};
use super::super::queue::{RingError, Virtqueue};
use super::super::worker::{WorkerContext, WorkerSlot};
use super::super::{Activation, DeviceError, DeviceType, F_EVENT_IDX, VirtioDevice};
use super::ConsoleLog;
use crate::event_loop::EventLoopHandle;
use event_manager::{EventOps, Events, MutEventSubscriber};
use std::sync::{Arc, Mutex, PoisonError};
use vm_memory::GuestMemoryMmap;

/// Index of the queue from the guest; the one to the guest is 0 and never filled.
const TRANSMIT: usize = 1;
/// Linux allocates a page for each entry of the first queue.
const QUEUE_SIZES: [u16; 2] = [2, 16];
/// Longest chain.
const MAX_DESCRIPTORS: usize = 16;
/// Chains for each wake-up.
const CHAINS_PER_WAKE_UP: usize = 16;
/// Bytes taken of a chain; Linux writes at most a page at a time.
const BYTES_PER_CHAIN: usize = 16 << 10;

/// The virtio-console device.
#[derive(Debug)]
pub struct ConsoleDevice {
    log: Arc<Mutex<ConsoleLog>>,
    worker: WorkerSlot<ConsoleWorker>,
}

impl ConsoleDevice {
    /// Writes to `log`; its worker will run in `events`.
    pub fn new(log: Arc<Mutex<ConsoleLog>>, events: EventLoopHandle) -> Self {
        ConsoleDevice {
            log,
            worker: WorkerSlot::new(DeviceType::Console, events),
        }
    }
}

impl VirtioDevice for ConsoleDevice {
    fn device_type(&self) -> DeviceType {
        DeviceType::Console
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn device_features(&self) -> u64 {
        F_EVENT_IDX
    }

    /// Every field of struct virtio_console_config (§5.3.4) belongs to a feature not offered.
    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        self.worker.start(ConsoleWorker {
            log: self.log.clone(),
            context: WorkerContext::new(DeviceType::Console, activation.mem, activation.interrupt),
            queues: activation.queues,
        })
    }

    fn reset(&mut self) -> Result<Vec<Virtqueue>, DeviceError> {
        let worker = self.worker.stop()?;
        Ok(worker.map_or_else(Vec::new, |worker| worker.queues))
    }
}

#[derive(Debug)]
struct ConsoleWorker {
    log: Arc<Mutex<ConsoleLog>>,
    context: WorkerContext,
    queues: Vec<Virtqueue>,
}

impl ConsoleWorker {
    fn serve(&mut self) -> Result<(), RingError> {
        let WorkerContext { mem, interrupt, .. } = &self.context;
        let Some(queue) = self.queues.get_mut(TRANSMIT) else {
            return Ok(());
        };
        queue.serve(mem, interrupt, CHAINS_PER_WAKE_UP, |chain| {
            let mut buffers = Buffers::collect(chain, mem, MAX_DESCRIPTORS)?;
            let mut log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
            write(&mut log, buffers.readable.take_front(BYTES_PER_CHAIN), mem);
            Ok(0)
        })
    }
}

fn write(log: &mut ConsoleLog, mut output: Segments, mem: &GuestMemoryMmap) {
    let mut bytes = [0; 512];
    while !output.is_empty() {
        let len = output.take_front(bytes.len()).read(mem, &mut bytes);
        log.write(&bytes[..len]);
    }
}

impl MutEventSubscriber for ConsoleWorker {
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
    fn output_reaches_the_log_and_input_never_comes() {
        let mem = memory();
        let events = event_loop();
        let log = Arc::new(Mutex::new(ConsoleLog::new(None, 0)));
        let mut device = ConsoleDevice::new(log.clone(), events.handle());
        let mut receive = DriverQueue::at(&mem, 2, 0x1000);
        let mut transmit = DriverQueue::at(&mem, 16, 0x4000);
        let (activation, _line) = activation(&mem, &[&receive, &transmit], 0);
        device.activate(activation).unwrap();

        receive.add(&[Desc::writable(0x10000, 0x1000)]);
        receive.kick();
        let long = vec![b'x'; BYTES_PER_CHAIN + 1000];
        mem.write_slice(b"hello\nwor", GuestAddress(0x20000))
            .unwrap();
        mem.write_slice(b"ld\n", GuestAddress(0x21000)).unwrap();
        mem.write_slice(&long, GuestAddress(0x30000)).unwrap();
        transmit.add(&[Desc::readable(0x20000, 9), Desc::readable(0x21000, 3)]);
        transmit.add(&[Desc::readable(0x30000, long.len() as u32)]);
        transmit.kick();
        assert_eq!(transmit.wait_used(), (0, 0));
        assert_eq!(transmit.wait_used(), (2, 0));
        let tail = log.lock().unwrap().tail();
        assert_eq!(tail[..2], ["hello", "world"]);
        assert_eq!(tail[2].len(), 512);
        assert_eq!(receive.used(), None);
        assert_eq!(device.reset().unwrap().len(), 2);
    }

    proptest! {
        /// Any chains: no panic, a bounded log.
        #[test]
        fn any_chains_are_survived(chains in prop::collection::vec(prop::collection::vec(Desc::any(), 1..6), 1..8)) {
            let mem = memory();
            let receive = DriverQueue::at(&mem, 2, 0x1_0000);
            let mut transmit = DriverQueue::new(&mem, 16);
            for chain in &chains {
                transmit.add(chain);
            }
            let (activation, _line) = activation(&mem, &[&receive, &transmit], 0);
            let mut worker = ConsoleWorker {
                log: Arc::new(Mutex::new(ConsoleLog::new(None, 0))),
                context: WorkerContext::new(DeviceType::Console, activation.mem, activation.interrupt),
                queues: activation.queues,
            };
            let _ = worker.serve();
            prop_assert!(worker.log.lock().unwrap().tail().len() <= 32);
        }
    }
}
