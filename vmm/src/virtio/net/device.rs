//! The network device as its transport sees it.

use super::super::queue::Virtqueue;
use super::super::worker::WorkerSlot;
use super::super::{
    Activation, DeviceError, DeviceState, DeviceType, F_EVENT_IDX, SuspendError, VirtioDevice,
};
use super::rate::Limiter;
use super::tap::Tap;
use super::worker::NetWorker;
use super::{QUEUE_SIZE, control};
use crate::event_loop::{self, EventLoopHandle};
use bulkhead_proto::vmm::RateLimit;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use virtio_bindings::virtio_net as ids;

/// What a network device is made as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NetConfig {
    /// Its address.
    pub mac: [u8; 6],
    /// Longest packet in bytes that the driver may send and gets, segmentation aside.
    pub mtu: u16,
    /// Frames of the guest's may have other sender addresses than `mac`.
    pub any_sender: bool,
    /// Limit of what the guest gets.
    pub to_guest: RateLimit,
    /// Limit of what the guest sends.
    pub from_guest: RateLimit,
}

/// What has passed a device, of all its queues together. Lengths are with headers.
#[derive(Debug, Default)]
pub struct NetCounters {
    received_frames: AtomicU64,
    received_bytes: AtomicU64,
    sent_frames: AtomicU64,
    sent_bytes: AtomicU64,
    lost: AtomicU64,
    spoofed: AtomicU64,
}

impl NetCounters {
    pub(super) fn received(&self, bytes: usize) {
        self.received_frames.fetch_add(1, Ordering::Relaxed);
        self.received_bytes
            .fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(super) fn sent(&self, bytes: usize) {
        self.sent_frames.fetch_add(1, Ordering::Relaxed);
        self.sent_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(super) fn lost(&self) {
        self.lost.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn spoofed(&self) {
        self.spoofed.fetch_add(1, Ordering::Relaxed);
    }

    /// As the parent is told.
    pub fn read(&self) -> bulkhead_proto::vmm::NetCounters {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        bulkhead_proto::vmm::NetCounters {
            received_frames: read(&self.received_frames),
            received_bytes: read(&self.received_bytes),
            sent_frames: read(&self.sent_frames),
            sent_bytes: read(&self.sent_bytes),
            lost_frames: read(&self.lost),
            spoofed_frames: read(&self.spoofed),
        }
    }
}

/// One virtio-net device.
#[derive(Debug)]
pub struct NetDevice {
    config: NetConfig,
    /// One for each queue pair.
    taps: Vec<Arc<Tap>>,
    queue_sizes: Vec<u16>,
    counters: Arc<NetCounters>,
    /// None while the worker has them, or if they were lost with a broken event loop.
    limiters: Option<Limiters>,
    worker: WorkerSlot<NetWorker>,
}

/// The limits of both directions.
#[derive(Debug)]
pub struct Limiters {
    pub to_guest: Limiter,
    pub from_guest: Limiter,
}

impl NetDevice {
    /// A device with as many queue pairs as there are taps, all of one tap device. The second value
    /// counts what passes.
    ///
    /// # Errors
    /// When a rate limit has no timer.
    pub fn new(
        config: NetConfig,
        taps: Vec<Tap>,
        events: EventLoopHandle,
    ) -> io::Result<(Self, Arc<NetCounters>)> {
        let mut queue_sizes = vec![QUEUE_SIZE; 2 * taps.len()];
        if taps.len() > 1 {
            queue_sizes.push(control::QUEUE_SIZE);
        }
        let counters = Arc::new(NetCounters::default());
        let device = Self {
            config,
            taps: taps.into_iter().map(Arc::new).collect(),
            queue_sizes,
            counters: Arc::clone(&counters),
            limiters: Some(Limiters {
                to_guest: Limiter::new(config.to_guest)?,
                from_guest: Limiter::new(config.from_guest)?,
            }),
            worker: WorkerSlot::new(DeviceType::Net, events),
        };
        Ok((device, counters))
    }

    /// The taps, one for each queue pair.
    pub(super) fn taps(&self) -> &[Arc<Tap>] {
        &self.taps
    }
}

/// Whatever the tap is.
const ALWAYS: [u32; 10] = [
    ids::VIRTIO_NET_F_MAC,
    ids::VIRTIO_NET_F_MTU,
    ids::VIRTIO_NET_F_STATUS,
    ids::VIRTIO_NET_F_MRG_RXBUF,
    ids::VIRTIO_NET_F_CSUM,
    ids::VIRTIO_NET_F_GUEST_CSUM,
    ids::VIRTIO_NET_F_HOST_TSO4,
    ids::VIRTIO_NET_F_HOST_TSO6,
    ids::VIRTIO_NET_F_GUEST_TSO4,
    ids::VIRTIO_NET_F_GUEST_TSO6,
];
/// Where it segments UDP.
const USO: [u32; 3] = [
    ids::VIRTIO_NET_F_HOST_USO,
    ids::VIRTIO_NET_F_GUEST_USO4,
    ids::VIRTIO_NET_F_GUEST_USO6,
];
/// Where it has several queues.
const SEVERAL: [u32; 2] = [ids::VIRTIO_NET_F_CTRL_VQ, ids::VIRTIO_NET_F_MQ];

impl VirtioDevice for NetDevice {
    fn device_type(&self) -> DeviceType {
        DeviceType::Net
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn device_features(&self) -> u64 {
        let uso = self.taps.iter().all(|tap| tap.uso());
        let uso = USO.iter().filter(|_| uso);
        let several = SEVERAL.iter().filter(|_| self.taps.len() > 1);
        ALWAYS
            .iter()
            .chain(uso)
            .chain(several)
            .fold(F_EVENT_IDX, |features, bit| features | 1 << bit)
    }

    /// struct virtio_net_config (§5.1.4), as far as the features offered need it.
    fn config(&self) -> Vec<u8> {
        let mut config = Vec::with_capacity(12);
        config.extend(self.config.mac);
        config.extend((ids::VIRTIO_NET_S_LINK_UP as u16).to_le_bytes()); // status
        config.extend((self.taps.len() as u16).to_le_bytes()); // max_virtqueue_pairs
        config.extend(self.config.mtu.to_le_bytes()); // mtu
        config
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let Some(limiters) = self.limiters.take() else {
            return Err(DeviceError {
                verb: "activating",
                device: DeviceType::Net,
                source: event_loop::Error::NoSuchWorker,
            });
        };
        let counters = Arc::clone(&self.counters);
        let worker = NetWorker::new(&self.config, &self.taps, limiters, counters, activation);
        self.worker.start(worker)
    }

    fn reset(&mut self) -> Result<Vec<Virtqueue>, DeviceError> {
        let Some(worker) = self.worker.stop()? else {
            return Ok(Vec::new());
        };
        let (limiters, queues) = worker.end();
        self.limiters = Some(limiters);
        Ok(queues)
    }

    /// A template has no network, and its clones each get one of their own.
    fn suspend(&mut self) -> Result<(Vec<Virtqueue>, DeviceState), SuspendError> {
        Err(SuspendError::InUse {
            device: DeviceType::Net,
            what: "a machine is saved without networks".into(),
        })
    }
}
