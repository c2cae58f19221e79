//! virtio-net whose frames the host's kernel moves (vhost-net): between the rings and the tap
//! directly, told by the driver's ioeventfds and telling it by the irqfd. This process only sets it
//! up and serves the control queue.
//!
//! ```text
//! guest's rings ◄── vhost-net (a thread of the kernel's in this process) ──► tap
//!   kick: ioeventfd ─►                    ─► interrupt: irqfd
//! ```
//!
//! Frames are not looked at here: their senders are checked at the tap, and cards with rate limits
//! are served in this process. What the kernel reads of the guest is bounded by the table of memory
//! that it is given, which is the same that the other back end resolves addresses in.

mod kernel;

pub use kernel::{VhostError, ioctls};

use super::super::queue::Virtqueue;
use super::super::worker::{WorkerContext, WorkerSlot};
use super::super::{Activation, DeviceError, DeviceState, DeviceType, SuspendError, VirtioDevice};
use super::control;
use super::device::{NetConfig, NetDevice};
use super::tap::{Offloads, Tap};
use super::worker::offloads;
use crate::event_loop::{EventLoopHandle, watch};
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use kernel::{Kernel, SHARED};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use virtio_bindings::virtio_net as ids;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

/// Numbers of events.
const CONTROL: u32 = 0;
const FAILED: u32 = 1;

/// A queue's worth of a tap, with the descriptor as vhost takes it.
#[derive(Debug)]
struct TapQueue {
    tap: Arc<Tap>,
    file: File,
}

/// A virtio-net device with this back end.
#[derive(Debug)]
pub struct VhostNetDevice {
    /// What the transport sees of it is as with the other back end.
    front: NetDevice,
    features: u64,
    taps: Vec<Arc<TapQueue>>,
    kernels: Vec<Arc<Kernel>>,
    /// Rung by the kernel when it can make no sense of a ring.
    failure: EventFd,
    worker: WorkerSlot<VhostWorker>,
}

impl VhostNetDevice {
    /// A device with as many queue pairs as there are taps, all of one tap device, and descriptors of
    /// /dev/vhost-net. `config` may have no limits and is not asked about senders.
    ///
    /// # Errors
    /// When a descriptor is none of vhost-net's, or none can be had.
    pub fn new(
        config: NetConfig,
        taps: Vec<Tap>,
        descriptors: Vec<OwnedFd>,
        memory: &GuestMemoryMmap,
        events: EventLoopHandle,
    ) -> Result<Self, VhostError> {
        let memory = Arc::new(memory.clone());
        let mut features = u64::MAX;
        let mut kernels = Vec::with_capacity(descriptors.len());
        for descriptor in descriptors {
            let (kernel, its) = Kernel::new(descriptor, Arc::clone(&memory))?;
            features &= its;
            kernels.push(Arc::new(kernel));
        }
        let failure = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC);
        let failure = failure.map_err(VhostError::EventFd)?;
        let (front, _) =
            NetDevice::new(config, taps, events.clone()).map_err(VhostError::EventFd)?;
        let taps = front
            .taps()
            .iter()
            .map(|tap| {
                let file = tap.as_fd().try_clone_to_owned();
                let file = file.map_err(VhostError::EventFd)?.into();
                let tap = Arc::clone(tap);
                Ok(Arc::new(TapQueue { tap, file }))
            })
            .collect::<Result<_, _>>()?;
        Ok(Self {
            front,
            features,
            taps,
            kernels,
            failure,
            worker: WorkerSlot::new(DeviceType::Net, events),
        })
    }
}

impl VirtioDevice for VhostNetDevice {
    fn device_type(&self) -> DeviceType {
        DeviceType::Net
    }

    fn queue_max_sizes(&self) -> &[u16] {
        self.front.queue_max_sizes()
    }

    fn device_features(&self) -> u64 {
        self.front.device_features() & (self.features | !SHARED)
    }

    fn config(&self) -> Vec<u8> {
        self.front.config()
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        // The kernel raises interrupts without telling here that it did.
        activation.interrupt.always_used_buffers();
        let failure = self.failure.try_clone().ok();
        let worker = VhostWorker::new(&self.taps, &self.kernels, failure, activation);
        self.worker.start(worker)
    }

    fn reset(&mut self) -> Result<Vec<Virtqueue>, DeviceError> {
        // On the event loop's thread: those of vCPUs can't.
        self.worker.with(VhostWorker::stop)?;
        let worker = self.worker.stop()?;
        Ok(worker.map(VhostWorker::end).unwrap_or_default())
    }

    /// As with the other back end.
    fn suspend(&mut self) -> Result<(Vec<Virtqueue>, DeviceState), SuspendError> {
        self.front.suspend()
    }
}

/// A receive and a transmit queue, and who serves them.
#[derive(Debug)]
struct Pair {
    tap: Arc<TapQueue>,
    kernel: Arc<Kernel>,
    queues: [Virtqueue; 2],
}

/// What is left to do here while a device is active.
#[derive(Debug)]
struct VhostWorker {
    context: WorkerContext,
    pairs: Vec<Pair>,
    control: Option<Virtqueue>,
    /// Queues that the driver can't know, as it hasn't accepted VIRTIO_NET_F_MQ.
    unknown: Vec<Virtqueue>,
    /// How many pairs are used; the first ones.
    used: usize,
    features: u64,
    offloads: Offloads,
    failure: Option<EventFd>,
}

impl VhostWorker {
    fn new(
        taps: &[Arc<TapQueue>],
        kernels: &[Arc<Kernel>],
        failure: Option<EventFd>,
        activation: Activation,
    ) -> Self {
        let Activation {
            mem,
            interrupt,
            queues,
            features,
        } = activation;
        let known = match features & 1 << ids::VIRTIO_NET_F_MQ {
            0 => 1,
            _ => taps.len(),
        };
        let mut queues = queues.into_iter();
        let mut pairs = Vec::with_capacity(known);
        for (tap, kernel) in taps.iter().zip(kernels).take(known) {
            let (Some(receive), Some(transmit)) = (queues.next(), queues.next()) else {
                break;
            };
            pairs.push(Pair {
                tap: Arc::clone(tap),
                kernel: Arc::clone(kernel),
                queues: [receive, transmit],
            });
        }
        Self {
            context: WorkerContext::new(DeviceType::Net, mem, interrupt),
            pairs,
            // §5.1.2: it comes after the pairs that the driver knows.
            control: queues.next(),
            unknown: queues.collect(),
            used: 0,
            features,
            offloads: offloads(features),
            failure,
        }
    }

    fn prepare(&mut self) -> Result<(), VhostError> {
        let Some(failure) = &self.failure else {
            let none = io::Error::from_raw_os_error(libc::EMFILE);
            return Err(VhostError::EventFd(none));
        };
        let line = self.context.interrupt.share();
        for pair in &self.pairs {
            // A queue that the driver has left out never has anything in it.
            if pair.queues.iter().all(Virtqueue::is_ready) {
                pair.kernel
                    .prepare(self.features, &pair.queues, line, failure)?;
            }
            if let Err(error) = pair.tap.tap.set_offloads(self.offloads) {
                tracing::debug!("setting a tap's offloads failed: {error}");
            }
        }
        // §5.1.5: one pair is used until the driver asks for more.
        for pair in self.pairs.iter().skip(1) {
            if let Err(error) = pair.tap.tap.set_attached(false) {
                tracing::debug!("changing the use of a tap's queue failed: {error}");
            }
        }
        self.use_pairs(1)
    }

    fn use_pairs(&mut self, wanted: usize) -> Result<(), VhostError> {
        for (index, pair) in self.pairs.iter().enumerate() {
            let (before, now) = (index < self.used, index < wanted);
            if before == now || !pair.queues.iter().all(Virtqueue::is_ready) {
                continue;
            }
            if !now {
                pair.kernel.connect(None)?;
            }
            // Alone it is always attached.
            if self.pairs.len() > 1
                && index > 0
                && let Err(error) = pair.tap.tap.set_attached(now)
            {
                tracing::debug!("changing the use of a tap's queue failed: {error}");
            }
            if now {
                pair.kernel.connect(Some(&pair.tap.file))?;
            }
        }
        self.used = wanted;
        Ok(())
    }

    /// Has the kernel let go of the queues, and waits until it has.
    fn stop(&mut self) {
        for pair in &self.pairs {
            if let Err(error) = pair.kernel.connect(None) {
                tracing::warn!("stopping vhost-net: {error}");
            }
        }
        self.used = 0;
    }

    /// Hands the queues back in their order.
    fn end(self) -> Vec<Virtqueue> {
        let mut queues: Vec<Virtqueue> = self
            .pairs
            .into_iter()
            .flat_map(|pair| pair.queues)
            .collect();
        queues.extend(self.control);
        queues.extend(self.unknown);
        queues
    }

    fn control(&mut self) {
        let Some(queue) = &mut self.control else {
            return;
        };
        if self.context.broken() {
            return;
        }
        let mut wanted = None;
        let result = control::serve(queue, &self.context, self.pairs.len() as u16, |pairs| {
            wanted = Some(usize::from(pairs));
        });
        self.context.check(result);
        if let Some(wanted) = wanted
            && let Err(error) = self.use_pairs(wanted)
        {
            self.context.interrupt.needs_reset("net", &error);
        }
    }
}

impl MutEventSubscriber for VhostWorker {
    fn init(&mut self, ops: &mut EventOps) {
        if let Err(error) = self.prepare() {
            self.context.interrupt.needs_reset("net", &error);
        }
        if let Some(queue) = &self.control {
            queue.watch(ops, CONTROL);
        }
        if let Some(failure) = &self.failure {
            watch(ops, Events::with_data(failure, FAILED, EventSet::IN));
        }
    }

    fn process(&mut self, events: Events, _ops: &mut EventOps) {
        match events.data() {
            CONTROL => self.control(),
            _ => {
                if let Some(failure) = &self.failure {
                    let _ = failure.read();
                }
                let why = "the host's kernel can make no sense of its rings";
                self.context.interrupt.needs_reset("net", &why);
            }
        }
    }
}
