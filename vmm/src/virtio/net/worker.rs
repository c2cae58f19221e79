//! Which queue is served when, on the event loop's thread.

use super::super::queue::{RingError, Virtqueue};
use super::super::worker::WorkerContext;
use super::super::{Activation, DeviceType};
use super::control;
use super::device::{Limiters, NetConfig, NetCounters};
use super::receive::Receiver;
use super::tap::{Offloads, Tap};
use super::transmit::Transmitter;
use super::{ETHERNET_HEADER, HEADER, MAX_SEGMENTED, VLAN_TAG};
use crate::event_loop::watch;
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use std::sync::Arc;
use virtio_bindings::virtio_net as ids;

/// What an event is about: the lower bits of its number, the pair's index above them.
const RECEIVE: u32 = 0;
const TRANSMIT: u32 = 1;
const TAP: u32 = 2;
const KINDS: u32 = 4;
/// Numbers that no pair's events have.
const CONTROL: u32 = u32::MAX;
const TO_GUEST: u32 = u32::MAX - 1;
const FROM_GUEST: u32 = u32::MAX - 2;

/// A receive and a transmit queue and the tap's queue for both.
#[derive(Debug)]
struct Pair {
    tap: Arc<Tap>,
    receiver: Receiver,
    transmitter: Transmitter,
    /// The tap is watched for room, too.
    room_watched: bool,
}

/// The number of a pair's event.
fn number(index: usize, kind: u32) -> u32 {
    index as u32 * KINDS + kind
}

impl Pair {
    fn tap_events(&self, index: usize) -> Events {
        let mut set = EventSet::IN | EventSet::EDGE_TRIGGERED;
        set.set(EventSet::OUT, self.room_watched);
        Events::with_data(&*self.tap, number(index, TAP), set)
    }

    /// Watches the tap for room while it has none. Otherwise the thread would wake up for a tap that
    /// was readable for a moment, as it has room nearly always.
    fn watch_room(&mut self, ops: &mut EventOps, index: usize) {
        if self.room_watched == self.transmitter.blocked {
            return;
        }
        self.room_watched = self.transmitter.blocked;
        // If there is room or a frame by now, the event comes at once.
        if let Err(error) = ops.modify(self.tap_events(index)) {
            tracing::error!("watching a tap for room failed: {error}");
        }
    }
}

/// Serves all queues of a device.
#[derive(Debug)]
pub struct NetWorker {
    context: WorkerContext,
    pairs: Vec<Pair>,
    control: Option<Virtqueue>,
    /// Queues that the driver can't know, as it hasn't accepted VIRTIO_NET_F_MQ.
    unknown: Vec<Virtqueue>,
    /// How many pairs are used; the first ones.
    used: usize,
    offloads: Offloads,
    limiters: Limiters,
    counters: Arc<NetCounters>,
}

fn has(features: u64, bit: u32) -> bool {
    features & 1 << bit != 0
}

/// What a driver with these features lets the other side leave to it.
pub(super) fn offloads(features: u64) -> Offloads {
    Offloads {
        checksum: has(features, ids::VIRTIO_NET_F_GUEST_CSUM),
        tso4: has(features, ids::VIRTIO_NET_F_GUEST_TSO4),
        tso6: has(features, ids::VIRTIO_NET_F_GUEST_TSO6),
        uso4: has(features, ids::VIRTIO_NET_F_GUEST_USO4),
        uso6: has(features, ids::VIRTIO_NET_F_GUEST_USO6),
    }
}

impl NetWorker {
    /// For the queues of an activation: pairs, and the control queue if there is more than one
    /// pair.
    pub fn new(
        config: &NetConfig,
        taps: &[Arc<Tap>],
        limiters: Limiters,
        counters: Arc<NetCounters>,
        activation: Activation,
    ) -> Self {
        let Activation {
            mem,
            interrupt,
            mut queues,
            features,
        } = activation;
        let offloads = offloads(features);
        let payload = if offloads.segmentation() {
            MAX_SEGMENTED
        } else {
            config.mtu.into()
        };
        let needed = HEADER + ETHERNET_HEADER + VLAN_TAG + payload;
        let mergeable = has(features, ids::VIRTIO_NET_F_MRG_RXBUF);
        let known = match has(features, ids::VIRTIO_NET_F_MQ) {
            true => taps.len(),
            false => 1,
        };
        // §5.1.2: the control queue comes after the pairs that the driver knows.
        let mut rest = queues.split_off((2 * known).min(queues.len())).into_iter();
        let control = rest.next();
        let mut pairs = Vec::with_capacity(known);
        let mut queues = queues.into_iter();
        for tap in taps {
            let (Some(receive), Some(transmit)) = (queues.next(), queues.next()) else {
                break;
            };
            pairs.push(Pair {
                tap: Arc::clone(tap),
                receiver: Receiver::new(receive, needed, mergeable, mem.clone()),
                transmitter: Transmitter::new(transmit, (!config.any_sender).then_some(config.mac)),
                room_watched: false,
            });
        }
        Self {
            context: WorkerContext::new(DeviceType::Net, mem, interrupt),
            pairs,
            control,
            unknown: rest.collect(),
            used: 1,
            offloads,
            limiters,
            counters,
        }
    }

    /// Hands the limiters back, and the queues in their order.
    pub fn end(self) -> (Limiters, Vec<Virtqueue>) {
        let mut queues: Vec<Virtqueue> = self
            .pairs
            .into_iter()
            .flat_map(|pair| [pair.receiver.queue, pair.transmitter.queue])
            .collect();
        queues.extend(self.control);
        queues.extend(self.unknown);
        (self.limiters, queues)
    }

    fn receive(&mut self, index: usize) {
        if self.context.broken() {
            return;
        }
        let served = self.take_frames(index);
        let result = served.and_then(|()| self.tell_driver(index));
        self.context.check(result);
    }

    /// Unlike [`NetWorker::receive`] also for pairs that aren't used: their driver may have frames
    /// in them from before.
    fn transmit(&mut self, index: usize, ops: &mut EventOps) {
        if self.context.broken() {
            return;
        }
        let served = self.give_frames(index);
        let result = served.and_then(|()| self.tell_driver(index));
        self.context.check(result);
        if let Some(pair) = self.pairs.get_mut(index) {
            pair.watch_room(ops, index);
        }
    }

    fn take_frames(&mut self, index: usize) -> Result<(), RingError> {
        match self.pairs.get_mut(index) {
            Some(pair) if index < self.used => pair.receiver.serve(
                &self.context,
                &pair.tap,
                &mut self.limiters.to_guest,
                &self.counters,
            ),
            _ => Ok(()),
        }
    }

    /// What a peer on this host answers at once (TCP's acknowledgements) is in the tap as soon as
    /// the frame is out of our hands. It is taken in the same go: one wake-up of this thread and one
    /// interrupt instead of two.
    fn give_frames(&mut self, index: usize) -> Result<(), RingError> {
        let Some(pair) = self.pairs.get_mut(index) else {
            return Ok(());
        };
        let sent = pair.transmitter.serve(
            &self.context,
            &pair.tap,
            &mut self.limiters.from_guest,
            &self.counters,
        )?;
        if !sent {
            return Ok(());
        }
        pair.receiver.readable = true;
        self.take_frames(index)
    }

    /// Interrupts the driver, once for both queues.
    fn tell_driver(&mut self, index: usize) -> Result<(), RingError> {
        let Some(pair) = self.pairs.get_mut(index) else {
            return Ok(());
        };
        let mem = &self.context.mem;
        let received = pair.receiver.queue.needs_notification(mem)?;
        let sent = pair.transmitter.queue.needs_notification(mem)?;
        if received || sent {
            self.context.interrupt.used_buffers();
        }
        Ok(())
    }

    fn tap_event(&mut self, index: usize, events: EventSet, ops: &mut EventOps) {
        let Some(pair) = self.pairs.get_mut(index) else {
            return;
        };
        let blocked = pair.transmitter.blocked;
        if events.contains(EventSet::IN) {
            pair.receiver.readable = true;
            self.receive(index);
        }
        if events.contains(EventSet::OUT) && blocked {
            self.transmit(index, ops);
        }
    }

    fn control(&mut self) {
        let Some(queue) = &mut self.control else {
            return;
        };
        if self.context.broken() {
            return;
        }
        let most = self.pairs.len();
        let mut wanted = None;
        let result = control::serve(queue, &self.context, most as u16, |pairs| {
            wanted = Some(usize::from(pairs));
        });
        if let Some(wanted) = wanted {
            self.set_used(wanted);
        }
        self.context.check(result);
    }

    fn set_used(&mut self, wanted: usize) {
        for (index, pair) in self.pairs.iter().enumerate() {
            let (before, now) = (index < self.used, index < wanted);
            if before != now
                && let Err(error) = pair.tap.set_attached(now)
            {
                tracing::debug!("changing the use of a tap's queue failed: {error}");
            }
        }
        self.used = wanted;
        for index in 0..self.used {
            self.receive(index);
        }
    }

    /// What is set on the tap itself, as far as it is a tap.
    fn prepare_taps(&self) {
        for (index, pair) in self.pairs.iter().enumerate() {
            if let Err(error) = pair.tap.set_offloads(self.offloads) {
                tracing::debug!("setting a tap's offloads failed: {error}");
            }
            // §5.1.5: one pair is used until the driver asks for more.
            if index >= self.used
                && let Err(error) = pair.tap.set_attached(false)
            {
                tracing::debug!("changing the use of a tap's queue failed: {error}");
            }
        }
    }
}

impl MutEventSubscriber for NetWorker {
    fn init(&mut self, ops: &mut EventOps) {
        self.prepare_taps();
        for (index, pair) in self.pairs.iter().enumerate() {
            pair.receiver.queue.watch(ops, number(index, RECEIVE));
            pair.transmitter.queue.watch(ops, number(index, TRANSMIT));
            watch(ops, pair.tap_events(index));
        }
        if let Some(queue) = &self.control {
            queue.watch(ops, CONTROL);
        }
        let limits = [
            (&self.limiters.to_guest, TO_GUEST),
            (&self.limiters.from_guest, FROM_GUEST),
        ];
        for (limiter, number) in limits {
            if let Some(timer) = limiter.timer() {
                let set = EventSet::IN | EventSet::EDGE_TRIGGERED;
                watch(ops, Events::with_data(timer, number, set));
            }
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        match events.data() {
            CONTROL => self.control(),
            TO_GUEST => (0..self.pairs.len()).for_each(|index| self.receive(index)),
            FROM_GUEST => (0..self.pairs.len()).for_each(|index| self.transmit(index, ops)),
            number => {
                let index = (number / KINDS) as usize;
                let Some(pair) = self.pairs.get(index) else {
                    return;
                };
                match number % KINDS {
                    RECEIVE => self.receive(index),
                    TRANSMIT if pair.transmitter.blocked => {}
                    TRANSMIT => self.transmit(index, ops),
                    _ => self.tap_event(index, events.event_set(), ops),
                }
            }
        }
    }
}
