//! A fake driver: it writes descriptors into guest memory as a guest's driver would and reads the
//! used ring. For the tests, and for the benchmark of the devices without a guest (`benches/`).
//!
//! It panics where a guest would crash: nothing but tests and benchmarks may use it.

use super::interrupt::Line;
use super::queue_config::QueueConfig;
use super::{Activation, Interrupt, Virtqueue};
use crate::event_loop::EventLoop;
use crate::seccomp::{self, ThreadKind};
use std::sync::Arc;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// A started "events" loop, under the system-call filter that it has in earnest: a call that is
/// not on its list ends the test's process with a line that names it.
pub fn event_loop() -> EventLoop {
    EventLoop::new("events", || install_filter(ThreadKind::Events)).unwrap()
}

/// Installs the calling thread's filter.
pub fn install_filter(kind: ThreadKind) {
    seccomp::report_trapped_calls().unwrap();
    let filters = seccomp::Filters::compile().unwrap();
    nix::sys::prctl::set_no_new_privs().unwrap();
    filters.install(kind).unwrap();
}

/// One descriptor; its NEXT flag is set unless it is the last of its chain.
#[derive(Debug, Clone, Copy)]
pub struct Desc {
    address: u64,
    len: u32,
    flags: u16,
    next: Option<u16>,
}

/// Flags of a descriptor (virtio 1.3 §2.7.5).
const NEXT: u16 = 1;
pub(super) const WRITE: u16 = 2;

impl Desc {
    /// The device reads it.
    pub fn readable(address: u64, len: u32) -> Self {
        Desc {
            address,
            len,
            flags: 0,
            next: None,
        }
    }

    /// The device writes it.
    pub fn writable(address: u64, len: u32) -> Self {
        Desc {
            flags: WRITE,
            ..Desc::readable(address, len)
        }
    }

    /// Sets NEXT, whatever comes after.
    pub fn next(self, next: u16) -> Self {
        Desc {
            next: Some(next),
            ..self
        }
    }

    /// Any descriptor at all.
    pub fn raw(address: u64, len: u32, flags: u16, next: Option<u16>) -> Self {
        Desc {
            address,
            len,
            flags,
            next,
        }
    }

    fn write(&self, mem: &GuestMemoryMmap, at: u64, next: Option<u16>) {
        let next = self.next.or(next);
        let flags = self.flags | if next.is_some() { NEXT } else { 0 };
        mem.write_obj(self.address, GuestAddress(at)).unwrap();
        mem.write_obj(self.len, GuestAddress(at + 8)).unwrap();
        mem.write_obj(flags, GuestAddress(at + 12)).unwrap();
        mem.write_obj(next.unwrap_or(0), GuestAddress(at + 14))
            .unwrap();
    }
}

/// The driver's side of one queue.
pub struct DriverQueue {
    mem: GuestMemoryMmap,
    size: u16,
    base: u64,
    next_descriptor: u16,
    available: u16,
    used: u16,
    kick: EventFd,
}

impl DriverQueue {
    /// A queue whose rings start at 0x1000.
    pub fn new(mem: &GuestMemoryMmap, size: u16) -> Self {
        Self::at(mem, size, 0x1000)
    }

    /// A queue whose rings take up to 0x3000 bytes at `base`, for at most 256 descriptors.
    pub fn at(mem: &GuestMemoryMmap, size: u16, base: u64) -> Self {
        mem.write_slice(&[0; 0x3000], GuestAddress(base)).unwrap();
        DriverQueue {
            mem: mem.clone(),
            size,
            base,
            next_descriptor: 0,
            available: 0,
            used: 0,
            kick: EventFd::new(EFD_NONBLOCK).unwrap(),
        }
    }

    /// What the driver writes into the queue's registers.
    pub fn config(&self) -> QueueConfig {
        QueueConfig {
            size: self.size.into(),
            ready: true,
            descriptor_table: self.base,
            available_ring: self.base + 0x1000,
            used_ring: self.base + 0x2000,
        }
    }

    /// The queue as the device gets it at activation.
    pub fn device_side(&self, mem: &GuestMemoryMmap) -> Virtqueue {
        let ring = self.config().validate(0, self.size, false, mem).unwrap();
        Virtqueue::new(ring, self.kick.try_clone().unwrap())
    }

    /// Head of the chain that is added next.
    pub fn next_head(&self) -> u16 {
        self.next_descriptor
    }

    /// Makes one chain available; returns its head.
    pub fn add(&mut self, chain: &[Desc]) -> u16 {
        let head = self.next_descriptor;
        for (position, descriptor) in chain.iter().enumerate() {
            let index = self.next_descriptor;
            self.next_descriptor = (index + 1) % self.size;
            let next = (position + 1 < chain.len()).then_some(self.next_descriptor);
            descriptor.write(&self.mem, self.base + 16 * u64::from(index), next);
        }
        self.add_head(head);
        head
    }

    /// Makes an available ring entry, whatever the descriptor table holds.
    pub fn add_head(&mut self, head: u16) {
        let entry = self.base + 0x1000 + 4 + 2 * u64::from(self.available % self.size);
        self.mem.write_obj(head, GuestAddress(entry)).unwrap();
        self.set_available(self.available.wrapping_add(1));
    }

    /// Sets the available index.
    pub fn set_available(&mut self, index: u16) {
        self.available = index;
        self.mem
            .store(
                index,
                GuestAddress(self.base + 0x1002),
                std::sync::atomic::Ordering::Release,
            )
            .unwrap();
    }

    /// Notifies the device.
    pub fn kick(&self) {
        self.kick.write(1).unwrap();
    }

    /// Next entry of the used ring: head and length.
    pub fn used(&mut self) -> Option<(u16, u32)> {
        let index: u16 = self
            .mem
            .load(
                GuestAddress(self.base + 0x2002),
                std::sync::atomic::Ordering::Acquire,
            )
            .unwrap();
        if index == self.used {
            return None;
        }
        let entry = self.base + 0x2000 + 4 + 8 * u64::from(self.used % self.size);
        self.used = self.used.wrapping_add(1);
        let head: u32 = self.mem.read_obj(GuestAddress(entry)).unwrap();
        let len: u32 = self.mem.read_obj(GuestAddress(entry + 4)).unwrap();
        // A hostile chain may have overwritten the ring.
        Some((head as u16, len))
    }

    /// Waits for the next used entry, up to a minute.
    pub fn wait_used(&mut self) -> (u16, u32) {
        wait_until("a used buffer", || self.used())
    }
}

/// Polls until `probe` gives a value; panics after a minute, which a loaded machine's disk may need
/// for an fsync(2).
pub fn wait_until<T>(what: &str, mut probe: impl FnMut() -> Option<T>) -> T {
    for _ in 0..60_000 {
        if let Some(value) = probe() {
            return value;
        }
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    panic!("waited in vain for {what}");
}

/// An activation with these queues, and the interrupt line.
pub fn activation(
    mem: &GuestMemoryMmap,
    queues: &[&DriverQueue],
    features: u64,
) -> (Activation, EventFd) {
    let line = EventFd::new(EFD_NONBLOCK).unwrap();
    let activation = Activation {
        mem: mem.clone(),
        interrupt: Arc::new(Interrupt::new(Line::of_event(line.try_clone().unwrap()))),
        queues: queues.iter().map(|queue| queue.device_side(mem)).collect(),
        features,
    };
    (activation, line)
}
