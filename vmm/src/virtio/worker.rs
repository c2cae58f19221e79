//! The link between a device, which the transport owns, and its worker, which an event loop owns.

use super::queue::RingError;
use super::{DeviceError, DeviceType, Interrupt};
use crate::event_loop::{EventLoopHandle, Worker, WorkerId};
use std::marker::PhantomData;
use std::sync::Arc;
use vm_memory::GuestMemoryMmap;

/// Holds the place of a worker while it is in the event loop.
pub struct WorkerSlot<W> {
    device: DeviceType,
    events: EventLoopHandle,
    id: Option<WorkerId>,
    worker: PhantomData<fn() -> W>,
}

impl<W> std::fmt::Debug for WorkerSlot<W> {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.debug_struct("WorkerSlot")
            .field("device", &self.device)
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

impl<W: Worker> WorkerSlot<W> {
    /// An empty slot; workers will run in `events`.
    pub fn new(device: DeviceType, events: EventLoopHandle) -> Self {
        WorkerSlot {
            device,
            events,
            id: None,
            worker: PhantomData,
        }
    }

    /// Moves the worker into the loop.
    pub fn start(&mut self, worker: W) -> Result<(), DeviceError> {
        let id = self
            .events
            .add(Box::new(worker))
            .map_err(|source| DeviceError {
                verb: "activating",
                device: self.device,
                source,
            })?;
        self.id = Some(id);
        Ok(())
    }

    /// Moves the worker out of the loop, once it has finished what it is doing; none if the
    /// device is not active.
    pub fn stop(&mut self) -> Result<Option<W>, DeviceError> {
        let Some(id) = self.id.take() else {
            return Ok(None);
        };
        match self.events.remove(id) {
            Ok(worker) => Ok(Some(*worker)),
            Err(source) => Err(DeviceError {
                verb: "resetting",
                device: self.device,
                source,
            }),
        }
    }

    /// Runs `call` on the worker, on the loop's thread; none if the
    /// device is not active.
    pub fn with<R, F>(&self, call: F) -> Result<Option<R>, DeviceError>
    where
        R: Send + 'static,
        F: FnOnce(&mut W) -> R + Send + 'static,
    {
        let Some(id) = self.id else {
            return Ok(None);
        };
        match self.events.with(id, call) {
            Ok(result) => Ok(Some(result)),
            Err(source) => Err(DeviceError {
                verb: "reaching",
                device: self.device,
                source,
            }),
        }
    }
}

/// What every worker has besides its queues.
#[derive(Debug)]
pub struct WorkerContext {
    /// Guest memory.
    pub mem: GuestMemoryMmap,
    /// How to notify the driver.
    pub interrupt: Arc<Interrupt>,
    device: DeviceType,
    broken: bool,
}

impl WorkerContext {
    /// For a worker of `device`.
    pub fn new(device: DeviceType, mem: GuestMemoryMmap, interrupt: Arc<Interrupt>) -> Self {
        WorkerContext {
            mem,
            interrupt,
            device,
            broken: false,
        }
    }

    /// Whether the rings were found broken; nothing is done on them any more until a reset
    /// (virtio 1.3 §2.1.2).
    pub fn broken(&self) -> bool {
        self.broken
    }

    /// Takes note of how serving a queue went.
    pub fn check(&mut self, result: Result<(), RingError>) {
        if let Err(error) = result {
            self.broken = true;
            self.interrupt.needs_reset(self.device.name(), &error);
        }
    }
}
