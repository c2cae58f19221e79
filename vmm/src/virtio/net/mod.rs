//! virtio-net (virtio 1.3 §5.1) over a tap device.
//!
//! | file | what it is about |
//! |---|---|
//! | `tap.rs` | the host's end: a descriptor that gives and takes one frame at a time |
//! | `device.rs` | what the transport sees: features, configuration space, queues |
//! | `worker.rs` | which queue is served when, on the event loop's thread |
//! | `receive.rs`, `transmit.rs` | frames to the guest, and from it |
//! | `control.rs` | the control queue, which there is with several queue pairs |
//! | `rate.rs` | limits of bytes and frames a second |
//! | `vhost.rs`, `vhost/kernel.rs` | the same device with its frames moved by the host's kernel |
//!
//! Frames go between the tap and guest memory without a copy in between, but for their first bytes
//! on the way from the guest: those that say who has sent a frame are copied and then checked, so
//! that the guest can't change them in between.

mod control;
mod device;
mod rate;
mod receive;
mod tap;
#[cfg(test)]
mod tests;
mod transmit;
mod vhost;
mod worker;

pub use device::{NetConfig, NetCounters, NetDevice};
pub use tap::{Tap, TapError, ioctls as tap_ioctls};
pub use vhost::{VhostError, VhostNetDevice, ioctls as vhost_ioctls};

/// Length of struct virtio_net_hdr (§5.1.6), which is in front of every frame both ways.
const HEADER: usize = size_of::<virtio_bindings::virtio_net::virtio_net_hdr_v1>();
/// Two addresses and a type.
const ETHERNET_HEADER: usize = 14;
/// A VLAN's tag in between.
const VLAN_TAG: usize = 4;
/// Longest packet that segmentation is left to the other side for.
const MAX_SEGMENTED: usize = 65_535;
/// Descriptors of each of the queues that frames take.
const QUEUE_SIZE: u16 = 256;
/// Frames for each wake-up of a queue, so that other devices have their turn.
const FRAMES_PER_WAKE_UP: usize = 64;
/// Bytes for each wake-up of a queue.
const BYTES_PER_WAKE_UP: usize = 1 << 20;
