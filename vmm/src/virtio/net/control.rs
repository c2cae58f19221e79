//! The control queue (virtio 1.3 §5.1.6.5), of which only the number of queue pairs is there.

use super::super::buffers::Buffers;
use super::super::queue::{RingError, Virtqueue};
use super::super::worker::WorkerContext;
use virtio_bindings::virtio_net as ids;
use vm_memory::{ByteValued, GuestMemoryMmap, Le16};

/// Linux has one command under way at a time.
pub const QUEUE_SIZE: u16 = 16;
const MAX_DESCRIPTORS: usize = QUEUE_SIZE as usize;
const COMMANDS_PER_WAKE_UP: usize = 8;

/// struct virtio_net_ctrl up to its data.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
struct Command {
    class: u8,
    command: u8,
}

// SAFETY: only bytes.
unsafe impl ByteValued for Command {}

/// Serves commands; `use_pairs` is called with a number of queue pairs that is to be used, from 1
/// to `most`.
pub fn serve(
    queue: &mut Virtqueue,
    context: &WorkerContext,
    most: u16,
    mut use_pairs: impl FnMut(u16),
) -> Result<(), RingError> {
    let WorkerContext { mem, interrupt, .. } = context;
    queue.serve(mem, interrupt, COMMANDS_PER_WAKE_UP, |chain| {
        let mut buffers = Buffers::collect(chain, mem, MAX_DESCRIPTORS)?;
        let pairs = pairs_of(&mut buffers, mem).filter(|pairs| (1..=most).contains(pairs));
        let answer = match pairs {
            Some(_) => ids::VIRTIO_NET_OK,
            None => ids::VIRTIO_NET_ERR,
        };
        if let Some(pairs) = pairs {
            use_pairs(pairs);
        }
        Ok(buffers.writable.write(mem, &[answer as u8]) as u32)
    })
}

/// The number of queue pairs that a command wants; none if it is another command.
fn pairs_of(buffers: &mut Buffers, mem: &GuestMemoryMmap) -> Option<u16> {
    let command: Command = buffers.readable.take_object(mem)?;
    let wanted = (
        ids::VIRTIO_NET_CTRL_MQ,
        ids::VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET,
    );
    if (u32::from(command.class), u32::from(command.command)) != wanted {
        return None;
    }
    let pairs: Le16 = buffers.readable.take_object(mem)?;
    Some(pairs.to_native())
}
