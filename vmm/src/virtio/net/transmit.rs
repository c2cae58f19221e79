//! Frames from the guest.

use super::super::buffers::Buffers;
use super::super::queue::{RingError, Virtqueue};
use super::super::worker::WorkerContext;
use super::device::NetCounters;
use super::rate::Limiter;
use super::tap::Tap;
use super::{BYTES_PER_WAKE_UP, ETHERNET_HEADER, FRAMES_PER_WAKE_UP, HEADER, QUEUE_SIZE};
use std::io::ErrorKind;

/// Longest chain: what the ring holds.
const MAX_DESCRIPTORS: usize = QUEUE_SIZE as usize;
/// Length of what is copied and checked.
const START: usize = HEADER + ETHERNET_HEADER;
/// Where the sender's address is in it.
const SENDER: std::ops::Range<usize> = HEADER + 6..HEADER + 12;

/// A transmit queue.
#[derive(Debug)]
pub struct Transmitter {
    pub queue: Virtqueue,
    /// The only sender; none lets every one pass.
    sender: Option<[u8; 6]>,
    /// The tap has had no room.
    pub blocked: bool,
}

/// What became of a frame.
enum Sent {
    /// It is on its way: so many bytes, header included.
    Gone(usize),
    /// It is dropped.
    Dropped,
    /// There is no room for it now.
    Full,
}

impl Transmitter {
    /// Lets only frames of `sender` pass, or all.
    pub fn new(queue: Virtqueue, sender: Option<[u8; 6]>) -> Self {
        Self {
            queue,
            sender,
            blocked: false,
        }
    }

    /// Moves frames from the guest to the tap until there are none, no room, or it is the turn of
    /// others; then the queue's descriptor is signalled. Whether any went; the driver isn't told of
    /// them yet.
    pub fn serve(
        &mut self,
        context: &WorkerContext,
        tap: &Tap,
        limiter: &mut Limiter,
        counters: &NetCounters,
    ) -> Result<bool, RingError> {
        let mem = &context.mem;
        let mut sent = false;
        let mut frames_left = FRAMES_PER_WAKE_UP;
        let mut bytes_left = BYTES_PER_WAKE_UP;
        self.blocked = false;
        self.queue.disable_notification(mem)?;
        loop {
            if frames_left == 0 || bytes_left == 0 {
                self.queue.rearm();
                break;
            }
            if !limiter.allows() {
                break;
            }
            let Some(chain) = self.queue.pop(mem)? else {
                if self.queue.enable_notification(mem)? {
                    self.queue.disable_notification(mem)?;
                    continue;
                }
                break;
            };
            let buffers = Buffers::collect(chain, mem, MAX_DESCRIPTORS)?;
            let head = buffers.head;
            frames_left -= 1;
            match self.send(context, tap, buffers, counters) {
                Sent::Gone(len) => {
                    sent = true;
                    limiter.passed(len);
                    counters.sent(len);
                    bytes_left = bytes_left.saturating_sub(len);
                }
                Sent::Dropped => {}
                Sent::Full => {
                    self.queue.undo_pop();
                    self.blocked = true;
                    break;
                }
            }
            self.queue.push(mem, head, 0)?;
        }
        Ok(sent)
    }

    fn send(
        &self,
        context: &WorkerContext,
        tap: &Tap,
        mut buffers: Buffers,
        counters: &NetCounters,
    ) -> Sent {
        let mem = &context.mem;
        let mut start = [0; START];
        let front = buffers.readable.take_front(START);
        if front.read(mem, &mut start) < START {
            counters.lost();
            return Sent::Dropped;
        }
        if self.sender.is_some_and(|sender| start[SENDER] != sender) {
            counters.spoofed();
            return Sent::Dropped;
        }
        match tap.send(&start, &buffers.readable.slices(mem)) {
            Ok(len) => Sent::Gone(len),
            Err(error) if error.kind() == ErrorKind::WouldBlock => Sent::Full,
            // What the host's kernel doesn't take: a bad header, a device that is down.
            Err(_) => {
                counters.lost();
                Sent::Dropped
            }
        }
    }
}
