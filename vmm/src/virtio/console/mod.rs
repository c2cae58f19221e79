//! virtio-console (virtio 1.3 §5.3) with one port: what the guest writes goes to a bounded log,
//! and nothing is ever typed.

mod device;
mod log;

pub use device::ConsoleDevice;
pub use log::ConsoleLog;
