//! Guest memory, and waiting for a device as a driver does: by its interrupt.

use bulkhead_vmm::virtio::Activation;
use bulkhead_vmm::virtio::fake_driver::{DriverQueue, activation};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::os::fd::{AsRawFd, BorrowedFd};
use vm_memory::{GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

/// Bytes of guest memory.
const MEMORY: usize = 64 << 20;

/// How long a device may take for a batch, in milliseconds.
const PATIENCE: u16 = 10_000;

/// Fresh guest memory.
pub fn memory() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).expect("memory can be mapped")
}

/// A device's interrupt line.
pub struct Line(EventFd);

impl Line {
    /// An activation with these queues, and the line that it raises.
    pub fn activation(
        mem: &GuestMemoryMmap,
        queues: &[&DriverQueue],
        features: u64,
    ) -> (Activation, Self) {
        let (activation, line) = activation(mem, queues, features);
        (activation, Self(line))
    }

    /// Waits for interrupts until the device has used `count` chains.
    pub fn wait_used(&self, queue: &mut DriverQueue, count: u16) {
        let mut left = count;
        while left > 0 {
            while left > 0 && queue.used().is_some() {
                left -= 1;
            }
            if left > 0 {
                self.wait();
            }
        }
    }

    /// An interrupt that came before is noticed, too.
    ///
    /// # Panics
    /// When none comes for ten seconds: the device is stuck.
    fn wait(&self) {
        // SAFETY: the descriptor lives as long as `self`.
        let line = unsafe { BorrowedFd::borrow_raw(self.0.as_raw_fd()) };
        let mut wanted = [PollFd::new(line, PollFlags::POLLIN)];
        let ready =
            poll(&mut wanted, PollTimeout::from(PATIENCE)).expect("polling an event descriptor");
        assert!(ready > 0, "the device has raised no interrupt");
        let _ = self.0.read();
    }
}
