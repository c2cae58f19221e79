//! Frames to the guest.

use super::super::buffers::{Buffers, ChainError, Segments};
use super::super::iovec::Room;
use super::super::queue::{RingError, Virtqueue};
use super::super::worker::WorkerContext;
use super::device::NetCounters;
use super::rate::Limiter;
use super::tap::Tap;
use super::{BYTES_PER_WAKE_UP, FRAMES_PER_WAKE_UP, HEADER, QUEUE_SIZE};
use smallvec::SmallVec;
use std::collections::VecDeque;
use std::mem::offset_of;
use virtio_bindings::virtio_net::virtio_net_hdr_v1;
use vm_memory::GuestMemoryMmap;

/// Longest chain; Linux uses 19 descriptors at most.
const MAX_DESCRIPTORS: usize = 32;

/// Heads of the chains that a frame fills, and how far.
type Filled = SmallVec<[(u16, u32); 4]>;

/// A receive queue.
#[derive(Debug)]
pub struct Receiver {
    pub queue: Virtqueue,
    /// Chains that were taken from the queue and hold no frame yet, oldest first.
    waiting: VecDeque<Waiting>,
    /// Their bytes, in the same order.
    room: Room,
    /// How many those are.
    free: usize,
    /// Room that the longest frame may take, header included.
    needed: usize,
    /// A frame may take several chains (VIRTIO_NET_F_MRG_RXBUF).
    mergeable: bool,
    /// The tap may have a frame.
    pub readable: bool,
}

#[derive(Debug)]
struct Waiting {
    head: u16,
    buffer: Segments,
    len: usize,
    /// Of the room.
    vectors: usize,
}

/// What became of a try to receive.
enum Received {
    /// A frame of so many bytes is in the first chains.
    Frame(usize, Filled),
    /// A frame was lost, as it has no room.
    Lost,
    /// There is none.
    Nothing,
}

impl Receiver {
    /// For frames of up to `needed` bytes, header included.
    pub fn new(queue: Virtqueue, needed: usize, mergeable: bool, mem: GuestMemoryMmap) -> Self {
        Self {
            queue,
            waiting: VecDeque::new(),
            room: Room::new(mem),
            free: 0,
            needed,
            mergeable,
            // The tap says so by an edge, which may have come before anyone watched.
            readable: true,
        }
    }

    /// Moves frames from the tap to the guest until there are none, no chains, or it is the turn of
    /// others; then the queue's descriptor is signalled. The driver isn't told of them yet.
    pub fn serve(
        &mut self,
        context: &WorkerContext,
        tap: &Tap,
        limiter: &mut Limiter,
        counters: &NetCounters,
    ) -> Result<(), RingError> {
        let mut frames_left = FRAMES_PER_WAKE_UP;
        let mut bytes_left = BYTES_PER_WAKE_UP;
        while self.readable && self.has_room(context)? {
            if frames_left == 0 || bytes_left == 0 {
                self.queue.rearm();
                break;
            }
            if !limiter.allows() {
                break;
            }
            frames_left -= 1;
            match self.receive(context, tap) {
                Received::Frame(len, filled) => {
                    limiter.passed(len);
                    bytes_left = bytes_left.saturating_sub(len);
                    counters.received(len);
                    self.give(context, &filled)?;
                }
                Received::Lost => counters.lost(),
                Received::Nothing => self.readable = false,
            }
        }
        Ok(())
    }

    /// Takes chains until the longest frame has room, or as many as it may use; has the driver tell
    /// when there are more only if that is not so.
    fn has_room(&mut self, context: &WorkerContext) -> Result<bool, RingError> {
        let mem = &context.mem;
        loop {
            self.queue.disable_notification(mem)?;
            while !self.enough() {
                let Some(chain) = self.queue.pop(mem)? else {
                    break;
                };
                let Buffers { head, writable, .. } = Buffers::collect(chain, mem, MAX_DESCRIPTORS)?;
                let len = writable.len();
                // §5.1.6.3.1. Without this, chains without room would be tried again and again.
                if len < HEADER {
                    let what = "the header of a frame";
                    return Err(ChainError::TooShort { head, what }.into());
                }
                self.free += len;
                self.waiting.push_back(Waiting {
                    head,
                    vectors: self.room.add(&writable),
                    buffer: writable,
                    len,
                });
            }
            // Whoever has given all that he has may get a frame that fits.
            if self.enough() || self.waiting.len() >= usize::from(self.queue.size()) {
                return Ok(true);
            }
            if !self.queue.enable_notification(mem)? {
                return Ok(false);
            }
        }
    }

    fn enough(&self) -> bool {
        match self.mergeable {
            true => self.free >= self.needed || self.waiting.len() >= usize::from(QUEUE_SIZE),
            false => !self.waiting.is_empty(),
        }
    }

    fn receive(&mut self, context: &WorkerContext, tap: &Tap) -> Received {
        let most = match (self.mergeable, self.waiting.front()) {
            (false, Some(first)) => first.vectors,
            _ => usize::MAX,
        };
        match tap.receive(&mut self.room, most) {
            Ok((len, room)) if len < HEADER || (len == room && len < self.needed) => Received::Lost,
            Ok((len, _)) => {
                let filled = self.chains_of(len);
                self.tell_chains(context, filled.len() as u16);
                Received::Frame(len, filled)
            }
            // A tap has taken the frame off then; an edge comes with the next one.
            Err(error) if error.raw_os_error() == Some(libc::EFAULT) => Received::Lost,
            Err(_) => Received::Nothing,
        }
    }

    /// Says in a frame's header how many chains it has (§5.1.6.4). The whole header is in the first.
    fn tell_chains(&self, context: &WorkerContext, chains: u16) {
        let Some(first) = self.waiting.front() else {
            return;
        };
        let mut rest = first.buffer.clone();
        rest.take_front(offset_of!(virtio_net_hdr_v1, num_buffers));
        rest.write(&context.mem, &chains.to_le_bytes());
    }

    /// The first chains that a frame of `len` bytes fills, and how far.
    fn chains_of(&self, mut len: usize) -> Filled {
        self.waiting
            .iter()
            .map_while(|waiting| {
                let filled = waiting.len.min(len);
                let first = std::mem::take(&mut len);
                len = first - filled;
                (first > 0).then_some((waiting.head, filled as u32))
            })
            .collect()
    }

    fn give(&mut self, context: &WorkerContext, filled: &Filled) -> Result<(), RingError> {
        for waiting in self.waiting.drain(..filled.len()) {
            self.free -= waiting.len;
            self.room.remove(waiting.vectors);
        }
        self.queue.push_together(&context.mem, filled)
    }
}
