//! What a driver asks, and what it is answered (virtio 1.3 §5.15.6).

use super::super::buffers::{Buffers, ChainError};
use vm_memory::GuestMemoryMmap;

/// Length of struct virtio_mem_req in bytes. Every type of request takes up all of it.
pub const REQUEST_SIZE: usize = 24;
/// Length of struct virtio_mem_resp in bytes.
pub const RESPONSE_SIZE: usize = 10;

/// The request's type and its answer's, both 16 bits, little-endian, are followed by three of
/// padding.
const PAYLOAD: usize = 8;

/// A request of the driver's. Ranges are as the driver gave them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// VIRTIO_MEM_REQ_PLUG: it wants to use these blocks.
    Plug(Blocks),
    /// VIRTIO_MEM_REQ_UNPLUG: it no longer uses these blocks.
    Unplug(Blocks),
    /// VIRTIO_MEM_REQ_UNPLUG_ALL: it uses none.
    UnplugAll,
    /// VIRTIO_MEM_REQ_STATE: it wants to know which they are.
    State(Blocks),
    /// A type that there isn't.
    Unknown(u16),
}

/// Blocks in a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Blocks {
    /// Guest-physical address of the first one.
    pub address: u64,
    /// How many.
    pub count: u16,
}

/// An answer. Numbers are those on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Response {
    /// VIRTIO_MEM_RESP_ACK: done.
    Ack,
    /// VIRTIO_MEM_RESP_ACK to a request for the state.
    State(State),
    /// VIRTIO_MEM_RESP_NACK: more than the host has asked for.
    Nack,
    /// VIRTIO_MEM_RESP_BUSY: not now; the driver may try again.
    Busy,
    /// VIRTIO_MEM_RESP_ERROR: the request makes no sense.
    Error,
}

/// State of some blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// VIRTIO_MEM_STATE_PLUGGED: all of them are plugged.
    Plugged = 0,
    /// VIRTIO_MEM_STATE_UNPLUGGED: none is.
    Unplugged = 1,
    /// VIRTIO_MEM_STATE_MIXED.
    Mixed = 2,
}

impl Request {
    /// Reads a request.
    ///
    /// # Errors
    /// When it is too short, or there is no room for its answer.
    pub fn read(buffers: &Buffers, mem: &GuestMemoryMmap) -> Result<Self, ChainError> {
        let too_short = |what| ChainError::TooShort {
            head: buffers.head,
            what,
        };
        if buffers.writable.len() < RESPONSE_SIZE {
            return Err(too_short("a response"));
        }
        let mut bytes = [0; REQUEST_SIZE];
        if buffers.readable.read(mem, &mut bytes) < REQUEST_SIZE {
            return Err(too_short("a request"));
        }
        Ok(Self::parse(&bytes))
    }

    fn parse(bytes: &[u8; REQUEST_SIZE]) -> Self {
        let [t0, t1, .., c0, c1, _, _, _, _, _, _] = *bytes;
        let mut address = [0; 8];
        address.copy_from_slice(&bytes[PAYLOAD..PAYLOAD + 8]);
        let blocks = Blocks {
            address: u64::from_le_bytes(address),
            count: u16::from_le_bytes([c0, c1]),
        };
        match u16::from_le_bytes([t0, t1]) {
            0 => Request::Plug(blocks),
            1 => Request::Unplug(blocks),
            2 => Request::UnplugAll,
            3 => Request::State(blocks),
            other => Request::Unknown(other),
        }
    }
}

impl Response {
    /// On the wire.
    pub fn bytes(self) -> [u8; RESPONSE_SIZE] {
        let (kind, state): (u16, u16) = match self {
            Response::Ack => (0, 0),
            Response::State(state) => (0, state as u16),
            Response::Nack => (1, 0),
            Response::Busy => (2, 0),
            Response::Error => (3, 0),
        };
        let mut bytes = [0; RESPONSE_SIZE];
        bytes[..2].copy_from_slice(&kind.to_le_bytes());
        bytes[PAYLOAD..].copy_from_slice(&state.to_le_bytes());
        bytes
    }
}
