//! The vsock device as its transport sees it, and its worker.

use super::super::buffers::{Buffers, ChainError};
use super::super::queue::{RingError, Virtqueue};
use super::super::worker::{WorkerContext, WorkerSlot};
use super::super::{
    Activation, DeviceError, DeviceState, DeviceType, F_EVENT_IDX, SuspendError, VirtioDevice,
    mismatch,
};
use super::muxer::{FIRST_HOST_PORT, Muxer, Watch};
use super::packet::{GuestPacket, HEADER_LEN};
use crate::event_loop::{self, EventLoopHandle, watch};
use bulkhead_proto::guest::GUEST_CID;
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use std::os::unix::net::UnixListener;
use vm_memory::ByteValued;

/// Index of the queue to the guest, which Linux fills with a page for each entry at boot.
const RX: u32 = 0;
/// Index of the queue from the guest.
const TX: u32 = 1;
/// Index of the queue for transport events.
const EVENT: u32 = 2;
const QUEUE_SIZES: [u16; 3] = [64, 64, 8];
/// Event data of the listener; connections have their host ports.
const LISTENER: u32 = 3;
const _: () = assert!(LISTENER < FIRST_HOST_PORT);

/// Longest chain: Linux uses a header and up to MAX_SKB_FRAGS + 1 pages.
const MAX_DESCRIPTORS: usize = 64;
/// Packets each way for each wake-up.
const PACKETS_PER_WAKE_UP: usize = 64;
/// Clients accepted for each wake-up.
const CLIENTS_PER_WAKE_UP: usize = 32;
/// VIRTIO_VSOCK_EVENT_TRANSPORT_RESET.
const TRANSPORT_RESET: u32 = 0;

/// Called once, on the event loop's thread, when the guest says that it listens.
pub type OnReady = Box<dyn FnOnce() + Send>;

/// Why a vsock device can't be made.
#[derive(Debug, thiserror::Error)]
pub enum VsockError {
    /// The listening socket refused to become non-blocking.
    #[error("making the vsock listener non-blocking failed: {0}; it must be a Unix socket")]
    Listener(#[source] std::io::Error),
    /// No random numbers.
    #[error("choosing the first host port of vsock: reading random numbers failed: {0}")]
    Random(#[source] std::io::Error),
}

/// The virtio-vsock device.
#[derive(Debug)]
pub struct VsockDevice {
    /// While the device is not active.
    idle: Option<HostSide>,
    worker: WorkerSlot<VsockWorker>,
}

/// What stays when the driver resets the device.
struct HostSide {
    listener: UnixListener,
    on_ready: Option<OnReady>,
    /// Where the ports of this VM begin.
    first_host_port: u32,
}

impl std::fmt::Debug for HostSide {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.debug_struct("HostSide")
            .field("listener", &self.listener)
            .finish_non_exhaustive()
    }
}

impl VsockDevice {
    /// Clients of `listener` reach the guest; `on_ready` is called once, when it knocks.
    pub fn new(
        listener: UnixListener,
        on_ready: OnReady,
        events: EventLoopHandle,
    ) -> Result<Self, VsockError> {
        listener
            .set_nonblocking(true)
            .map_err(VsockError::Listener)?;
        Ok(VsockDevice {
            idle: Some(HostSide {
                listener,
                on_ready: Some(on_ready),
                first_host_port: random_host_port().map_err(VsockError::Random)?,
            }),
            worker: WorkerSlot::new(DeviceType::Vsock, events),
        })
    }

    /// Ends all connections and tells the driver so by a transport reset event (§5.10.6.7), as is
    /// needed when a snapshot is restored. Without effect while the device is not active.
    pub fn reset_transport(&self) -> Result<(), DeviceError> {
        self.worker.with(|worker| {
            worker.transport_reset = true;
            worker.queues.iter().for_each(Virtqueue::rearm);
        })?;
        Ok(())
    }

    fn start(&mut self, activation: Activation, guest_ready: bool) -> Result<(), DeviceError> {
        // The host side is lost only with the event loop.
        let host = self.idle.take().ok_or(DeviceError {
            verb: "activating",
            device: DeviceType::Vsock,
            source: event_loop::Error::NoSuchWorker,
        })?;
        self.worker.start(VsockWorker {
            context: WorkerContext::new(DeviceType::Vsock, activation.mem, activation.interrupt),
            queues: activation.queues,
            muxer: Muxer::new(host.listener, host.first_host_port, guest_ready),
            first_host_port: host.first_host_port,
            on_ready: host.on_ready,
            transport_reset: false,
        })
    }
}

/// A random one of the ports that are given away, so that clones of a saved guest, which may
/// remember an earlier connection, are not dialled from the same ports.
fn random_host_port() -> std::io::Result<u32> {
    let mut bytes = [0; 4];
    // SAFETY: the pointer and length are those of the array.
    let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    if got != bytes.len() as isize {
        return Err(std::io::Error::last_os_error());
    }
    // 2^32-1 is VMADDR_PORT_ANY.
    Ok(FIRST_HOST_PORT + u32::from_le_bytes(bytes) % (u32::MAX - FIRST_HOST_PORT))
}

impl VirtioDevice for VsockDevice {
    fn device_type(&self) -> DeviceType {
        DeviceType::Vsock
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn device_features(&self) -> u64 {
        F_EVENT_IDX
    }

    /// struct virtio_vsock_config (§5.10.4).
    fn config(&self) -> Vec<u8> {
        GUEST_CID.to_le_bytes().to_vec()
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        self.start(activation, false)
    }

    fn reset(&mut self) -> Result<Vec<Virtqueue>, DeviceError> {
        let Some(worker) = self.worker.stop()? else {
            return Ok(Vec::new());
        };
        self.idle = Some(HostSide {
            listener: worker.muxer.into_listener(),
            on_ready: worker.on_ready,
            first_host_port: worker.first_host_port,
        });
        Ok(worker.queues)
    }

    /// No connection outlives its VMM, so there must be none.
    fn suspend(&mut self) -> Result<(Vec<Virtqueue>, DeviceState), SuspendError> {
        let closed = self.worker.with(|worker| worker.muxer.close())?;
        if let Some(Err(what)) = closed {
            return Err(SuspendError::InUse {
                device: DeviceType::Vsock,
                what,
            });
        }
        Ok((self.reset()?, DeviceState::None))
    }

    /// Only a guest that is ready is ever suspended.
    fn resume(&mut self, activation: Activation, state: DeviceState) -> Result<(), SuspendError> {
        if state != DeviceState::None {
            return Err(mismatch(DeviceType::Vsock, state));
        }
        Ok(self.start(activation, true)?)
    }
}

/// Serves the queues and the clients on the event loop's thread.
struct VsockWorker {
    context: WorkerContext,
    /// [`RX`], [`TX`], [`EVENT`].
    queues: Vec<Virtqueue>,
    muxer: Muxer,
    first_host_port: u32,
    on_ready: Option<OnReady>,
    /// A transport reset is to be told.
    transport_reset: bool,
}

impl VsockWorker {
    fn queue(&self, index: u32) -> Option<&Virtqueue> {
        self.queues.get(index as usize)
    }

    /// Takes packets from the guest.
    fn transmit(&mut self) -> Result<(), RingError> {
        let VsockWorker {
            context,
            queues,
            muxer,
            on_ready,
            ..
        } = self;
        let mem = &context.mem;
        let Some(queue) = queues.get_mut(TX as usize) else {
            return Ok(());
        };
        queue.serve(mem, &context.interrupt, PACKETS_PER_WAKE_UP, |chain| {
            let buffers = Buffers::collect(chain, mem, MAX_DESCRIPTORS)?;
            let packet = GuestPacket::parse(buffers.readable, mem);
            if muxer.guest_packet(packet, mem)
                && let Some(on_ready) = on_ready.take()
            {
                on_ready();
            }
            Ok(0)
        })
    }

    /// Gives packets to the guest, as long as there are packets and buffers.
    fn receive(&mut self) -> Result<(), RingError> {
        let VsockWorker {
            context,
            queues,
            muxer,
            ..
        } = self;
        let mem = &context.mem;
        let Some(queue) = queues.get_mut(RX as usize) else {
            return Ok(());
        };
        let mut packets = 0;
        while muxer.has_packets() {
            if packets == PACKETS_PER_WAKE_UP {
                queue.rearm();
                break;
            }
            let Some(chain) = queue.pop(mem)? else {
                // Only now a notification is of use.
                if queue.enable_notification(mem)? {
                    continue;
                }
                break;
            };
            let buffers = Buffers::collect(chain, mem, MAX_DESCRIPTORS)?;
            let head = buffers.head;
            let mut room = buffers.writable;
            let header = room.take_front(HEADER_LEN);
            if header.len() < HEADER_LEN || room.is_empty() {
                let what = "a vsock header and payload";
                return Err(ChainError::TooShort { head, what }.into());
            }
            let Some(packet) = muxer.next_packet(&room, mem) else {
                queue.undo_pop();
                break;
            };
            header.write(mem, packet.to_raw().as_slice());
            queue.push(mem, head, HEADER_LEN as u32 + packet.len)?;
            packets += 1;
        }
        if packets > 0 {
            queue.notify(mem, &context.interrupt)?;
        }
        Ok(())
    }

    /// Tells the driver of a transport reset, once it has given a buffer for it.
    fn tell_transport_reset(&mut self) -> Result<(), RingError> {
        let mem = &self.context.mem;
        let Some(queue) = self.queues.get_mut(EVENT as usize) else {
            return Ok(());
        };
        let Some(chain) = queue.pop(mem)? else {
            queue.enable_notification(mem)?;
            return Ok(());
        };
        let buffers = Buffers::collect(chain, mem, MAX_DESCRIPTORS)?;
        let len = buffers.writable.write(mem, &TRANSPORT_RESET.to_le_bytes());
        queue.push(mem, buffers.head, len as u32)?;
        self.transport_reset = false;
        self.muxer.drop_connections();
        queue.notify(mem, &self.context.interrupt)
    }

    fn serve(&mut self, source: u32, set: EventSet) -> Result<(), RingError> {
        match source {
            TX => self.transmit()?,
            LISTENER => self.muxer.listener_ready(),
            RX | EVENT => {}
            host_port => self.muxer.client_event(host_port, set),
        }
        if self.transport_reset {
            self.tell_transport_reset()?;
        }
        if self.muxer.accept(CLIENTS_PER_WAKE_UP)
            && let Some(queue) = self.queue(RX)
        {
            queue.rearm();
        }
        self.receive()
    }

    /// Brings the watched descriptors up to date.
    fn update_watches(&mut self, ops: &mut EventOps) {
        let set = EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        for change in self.muxer.take_watches() {
            match change {
                Watch::Add { host_port, fd } => {
                    watch(ops, Events::with_data_raw(fd, host_port, set));
                }
                Watch::Remove(stream) => {
                    // Fails only if watching it has failed.
                    let _ = ops.remove(Events::empty(&stream));
                }
            }
        }
    }
}

impl MutEventSubscriber for VsockWorker {
    fn init(&mut self, ops: &mut EventOps) {
        for (queue, index) in self.queues.iter().zip(0..) {
            queue.watch(ops, index);
        }
        let set = EventSet::IN | EventSet::EDGE_TRIGGERED;
        let fd = self.muxer.listener_fd();
        watch(ops, Events::with_data_raw(fd, LISTENER, set));
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        if self.context.broken() {
            return;
        }
        let result = self.serve(events.data(), events.event_set());
        self.context.check(result);
        if self.context.broken() {
            // Nobody would answer the clients any more.
            self.muxer.drop_connections();
        }
        self.update_watches(ops);
    }
}
