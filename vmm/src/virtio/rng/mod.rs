//! virtio-rng (virtio 1.3 §5.4): bytes of the host's random number generator.

mod device;

pub use device::RngDevice;
