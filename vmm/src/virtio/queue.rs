//! A virtqueue in the hands of a device's worker.
//!
//! The driver configures a queue by registers (`queue_config.rs`; the transport keeps what it wrote).
//! At DRIVER_OK the configuration is validated once and becomes a [`Virtqueue`], which the driver
//! can't change any more: what it writes to the registers later is not looked at.

use super::Interrupt;
use super::buffers::ChainError;
use crate::event_loop::watch;
use event_manager::{EventOps, EventSet, Events};
use serde::{Deserialize, Serialize};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{Ordering, fence};
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

/// A descriptor chain in guest memory.
pub type Chain<'m> = DescriptorChain<&'m GuestMemoryMmap>;

/// Why a ring can't go on from the indices with which it was saved.
#[derive(Debug, thiserror::Error)]
#[error(
    "queue {index} was saved at {next_avail} available and {next_used} used chains, which its rings \
     in guest memory contradict: {why}"
)]
pub struct QueueIndexError {
    index: usize,
    next_avail: u16,
    next_used: u16,
    why: &'static str,
}

/// Where a device had come to in a ring.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueuePosition {
    /// Chains taken so far, modulo 2^16.
    pub next_avail: u16,
    /// Chains given back so far, modulo 2^16.
    pub next_used: u16,
}

impl QueuePosition {
    /// Puts `ring`, queue `index`, which was just validated, there. No chain may be with the
    /// device, the used ring must end there, and no more chains wait than the ring has room for.
    pub fn apply(
        self,
        index: usize,
        ring: &mut Queue,
        mem: &GuestMemoryMmap,
    ) -> Result<(), QueueIndexError> {
        let refuse = |why| QueueIndexError {
            index,
            next_avail: self.next_avail,
            next_used: self.next_used,
            why,
        };
        if !ring.ready() {
            return match self {
                QueuePosition {
                    next_avail: 0,
                    next_used: 0,
                } => Ok(()),
                _ => Err(refuse("the queue is not in use")),
            };
        }
        if self.next_avail != self.next_used {
            return Err(refuse("chains were not finished"));
        }
        let used = ring.used_idx(mem, Ordering::Relaxed);
        if !used.is_ok_and(|used| used.0 == self.next_used) {
            return Err(refuse("the used ring ends elsewhere"));
        }
        let available = ring.avail_idx(mem, Ordering::Relaxed);
        if !available
            .is_ok_and(|available| available.0.wrapping_sub(self.next_avail) <= ring.size())
        {
            return Err(refuse("the available ring ends elsewhere"));
        }
        ring.set_next_avail(self.next_avail);
        ring.set_next_used(self.next_used);
        Ok(())
    }
}

/// The driver broke the rules of the ring or of a descriptor chain: the device needs a reset.
#[derive(Debug, thiserror::Error)]
pub enum RingError {
    /// Ring indices or addresses are impossible.
    #[error("the ring is broken: {0}")]
    Ring(virtio_queue::Error),
    /// A chain is impossible.
    #[error(transparent)]
    Chain(#[from] ChainError),
}

impl From<virtio_queue::Error> for RingError {
    fn from(error: virtio_queue::Error) -> Self {
        RingError::Ring(error)
    }
}

/// A ring that the driver configured and the descriptor by which the driver notifies.
#[derive(Debug)]
pub struct Virtqueue {
    ring: Queue,
    kick: EventFd,
    /// Index of the used ring up to which the driver's wish to be notified was looked at.
    announced: u16,
}

impl AsRawFd for Virtqueue {
    /// The descriptor that becomes readable when the driver notifies.
    fn as_raw_fd(&self) -> RawFd {
        self.kick.as_raw_fd()
    }
}

impl Virtqueue {
    /// `kick` is non-blocking and registered as the queue's ioeventfd.
    pub fn new(ring: Queue, kick: EventFd) -> Self {
        Virtqueue {
            announced: ring.next_used(),
            ring,
            kick,
        }
    }

    /// Where the device has come to.
    pub fn position(&self) -> QueuePosition {
        QueuePosition {
            next_avail: self.ring.next_avail(),
            next_used: self.ring.next_used(),
        }
    }

    /// Gives up the ring and hands back the descriptor.
    pub fn into_kick(self) -> EventFd {
        self.kick
    }

    /// The descriptor by which the driver notifies.
    pub fn kick(&self) -> &EventFd {
        &self.kick
    }

    /// Whether the driver has set it up.
    pub fn is_ready(&self) -> bool {
        self.ring.ready()
    }

    /// The ring's indices and addresses, which were validated.
    pub fn state(&self) -> virtio_queue::QueueState {
        self.ring.state()
    }

    /// Has the worker called with `number` whenever the driver notifies. By edges, so that nobody
    /// has to read the counter, which would be one call more for each notification.
    pub fn watch(&self, ops: &mut EventOps, number: u32) {
        let set = EventSet::IN | EventSet::EDGE_TRIGGERED;
        watch(ops, Events::with_data(self, number, set));
    }

    /// Wakes the worker up once more, for work that it has left for fairness.
    pub fn rearm(&self) {
        // Fails only if the counter is full, and then the worker wakes up anyway.
        let _ = self.kick.write(1);
    }

    /// Takes the next available chain.
    pub fn pop<'m>(&mut self, mem: &'m GuestMemoryMmap) -> Result<Option<Chain<'m>>, RingError> {
        if !self.ring.ready() {
            return Ok(None);
        }
        Ok(self.ring.iter(mem)?.next())
    }

    /// Puts back the chain taken last.
    pub fn undo_pop(&mut self) {
        self.ring.go_to_previous_position();
    }

    /// Returns a chain to the driver with `len` bytes written to it.
    pub fn push(&mut self, mem: &GuestMemoryMmap, head: u16, len: u32) -> Result<(), RingError> {
        Ok(self.ring.add_used(mem, head, len)?)
    }

    /// Returns several chains so that the driver sees all of them or none, as those of one frame
    /// (virtio 1.3 §5.1.6.4).
    pub fn push_together(
        &mut self,
        mem: &GuestMemoryMmap,
        chains: &[(u16, u32)],
    ) -> Result<(), RingError> {
        let Some(((last, last_len), others)) = chains.split_last() else {
            return Ok(());
        };
        let first = self.ring.next_used();
        let size = self.ring.size();
        for (index, (head, len)) in others.iter().enumerate() {
            let place = first.wrapping_add(index as u16) % size;
            // The used ring (§2.7.8) lies in guest memory, as was checked at activation.
            let at = self.ring.used_ring() + 4 + 8 * u64::from(place);
            let element = u64::from(u32::from(*head)) | u64::from(*len) << 32;
            mem.write_obj(element.to_le(), GuestAddress(at))
                .map_err(virtio_queue::Error::GuestMemory)?;
        }
        if !others.is_empty() {
            self.ring
                .set_next_used(first.wrapping_add(others.len() as u16));
        }
        self.push(mem, *last, *last_len)
    }

    /// Descriptors of the ring.
    pub fn size(&self) -> u16 {
        self.ring.size()
    }

    /// Asks the driver to notify from now on; true if chains have become available meanwhile.
    pub fn enable_notification(&mut self, mem: &GuestMemoryMmap) -> Result<bool, RingError> {
        if !self.ring.ready() {
            return Ok(false);
        }
        Ok(self.ring.enable_notification(mem)?)
    }

    /// Tells the driver that it needn't notify.
    pub fn disable_notification(&mut self, mem: &GuestMemoryMmap) -> Result<(), RingError> {
        if !self.ring.ready() {
            return Ok(());
        }
        Ok(self.ring.disable_notification(mem)?)
    }

    /// Interrupts the driver if chains were pushed and it wants to know.
    pub fn notify(
        &mut self,
        mem: &GuestMemoryMmap,
        interrupt: &Interrupt,
    ) -> Result<(), RingError> {
        if self.needs_notification(mem)? {
            interrupt.used_buffers();
        }
        Ok(())
    }

    /// Whether chains were pushed since the last call and the driver wants to know (virtio 1.3
    /// §2.7.7.2). The caller interrupts it then.
    pub fn needs_notification(&mut self, mem: &GuestMemoryMmap) -> Result<bool, RingError> {
        let (old, new) = (self.announced, self.ring.next_used());
        self.announced = new;
        if !self.ring.ready() || old == new {
            return Ok(false);
        }
        Ok(!self.ring.event_idx_enabled() || self.wanted_between(mem, old, new)?)
    }

    /// Whether the used ring has passed the driver's used_event on its way from `old` to `new`. The
    /// ring's own `needs_notification` doesn't know of chains that were returned together.
    fn wanted_between(&self, mem: &GuestMemoryMmap, old: u16, new: u16) -> Result<bool, RingError> {
        // The used index must be out before the wish is read.
        fence(Ordering::SeqCst);
        let at = self.ring.avail_ring() + 4 + 2 * u64::from(self.ring.size());
        let used_event: u16 = mem
            .load(GuestAddress(at), Ordering::Relaxed)
            .map_err(virtio_queue::Error::GuestMemory)?;
        let used_event = u16::from_le(used_event);
        Ok(new.wrapping_sub(used_event).wrapping_sub(1) < new.wrapping_sub(old))
    }

    /// Serves available chains until there are none, or `budget` chains were served: then the
    /// worker is woken up again, after others have had their turn.
    ///
    /// `serve` returns the number of bytes that it wrote into the chain.
    pub fn serve<'m, F>(
        &mut self,
        mem: &'m GuestMemoryMmap,
        interrupt: &Interrupt,
        budget: usize,
        mut serve: F,
    ) -> Result<(), RingError>
    where
        F: FnMut(Chain<'m>) -> Result<u32, RingError>,
    {
        let mut served = 0;
        self.disable_notification(mem)?;
        loop {
            if served == budget {
                self.rearm();
                break;
            }
            match self.pop(mem)? {
                Some(chain) => {
                    served += 1;
                    let head = chain.head_index();
                    let len = serve(chain)?;
                    self.push(mem, head, len)?;
                }
                None if self.enable_notification(mem)? => self.disable_notification(mem)?,
                None => break,
            }
        }
        if served > 0 {
            self.notify(mem, interrupt)?;
        }
        Ok(())
    }
}
