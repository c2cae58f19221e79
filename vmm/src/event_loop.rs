//! One thread that serves events: queue notifications of the devices and host descriptors.
//!
//! A [`Worker`] is the active half of a device. It is moved into the loop when the driver
//! activates the device and moved out again when the driver resets it, so at every moment exactly
//! one thread owns a device's queues and back end and no lock guards them. Workers run one after
//! the other and bound what they do for each wake-up; what may block in the kernel (the
//! file-system server) gets an event loop of its own.
//!
//! Threads are created by [`EventLoop::new`], before the guest runs: nothing here calls clone(2)
//! later.

use event_manager::{EventManager, EventOps, MutEventSubscriber, RemoteEndpoint, SubscriberId};
use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread::JoinHandle;

/// The part of a device that an event loop runs.
pub trait Worker: MutEventSubscriber + Any + Send {}

impl<T: MutEventSubscriber + Any + Send> Worker for T {}

/// Why a call to an event loop failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel refused the epoll or event descriptors.
    #[error(
        "creating the {name} event loop failed: {source}; check the limit on open files (ulimit -n)"
    )]
    Create {
        /// Name of the thread.
        name: &'static str,
        /// What event-manager says.
        source: event_manager::Error,
    },
    /// The kernel refused the thread.
    #[error(
        "starting the {name} thread failed: {source}; check the limits on threads and memory \
         (pids.max, memory.max)"
    )]
    Spawn {
        /// Name of the thread.
        name: &'static str,
        /// What spawning says.
        source: std::io::Error,
    },
    /// The thread ended, after [`EventLoop::stop`] or a failure that the log tells.
    #[error("the event loop has ended: {0}")]
    Ended(event_manager::Error),
    /// The worker is not in this loop, or is of another type.
    #[error("the event loop has no such worker")]
    NoSuchWorker,
}

impl From<event_manager::Error> for Error {
    fn from(error: event_manager::Error) -> Self {
        match error {
            event_manager::Error::InvalidId => Error::NoSuchWorker,
            other => Error::Ended(other),
        }
    }
}

/// Names a worker in a loop until it is removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WorkerId(SubscriberId);

/// Owner of the thread.
#[derive(Debug)]
pub struct EventLoop {
    handle: EventLoopHandle,
    thread: JoinHandle<()>,
    started: mpsc::Receiver<()>,
}

impl EventLoop {
    /// Creates the loop and its thread, on which `on_start` runs first, for installing the thread's
    /// system-call filter. [`EventLoop::wait_started`] says when that is done. `name` is the thread's, at most 15
    /// bytes (TASK_COMM_LEN less its NUL).
    pub fn new<F>(name: &'static str, on_start: F) -> Result<Self, Error>
    where
        F: FnOnce() + Send + 'static,
    {
        let mut manager = EventManager::<Box<dyn Worker>>::new()
            .map_err(|source| Error::Create { name, source })?;
        let handle = EventLoopHandle {
            endpoint: manager.remote_endpoint(),
            stop: Arc::new(AtomicBool::new(false)),
        };
        let stop = handle.stop.clone();
        let (tell_started, started) = mpsc::channel();
        let thread = std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                on_start();
                // The receiver is only gone if the creator's thread has died; the loop then ends
                // with the process.
                let _ = tell_started.send(());
                run(name, &mut manager, &stop);
            })
            .map_err(|source| Error::Spawn { name, source })?;
        Ok(EventLoop {
            handle,
            thread,
            started,
        })
    }

    /// Returns once `on_start` has returned. To be called once.
    pub fn wait_started(&self) -> Result<(), Error> {
        self.started
            .recv()
            .map_err(|_| Error::Ended(event_manager::Error::ChannelRecv))
    }

    /// A handle to add and remove workers with; cheap to clone.
    pub fn handle(&self) -> EventLoopHandle {
        self.handle.clone()
    }

    /// Ends the thread after the event that it is serving and drops all workers.
    pub fn stop(self) {
        self.handle.stop.store(true, Ordering::Release);
        // A kick fails only if the loop's counter is full, and then it wakes up anyway.
        let _ = self.handle.endpoint.kick();
        if self.thread.join().is_err() {
            tracing::error!("an event loop ended by a panic");
        }
    }
}

fn run(name: &str, manager: &mut EventManager<Box<dyn Worker>>, stop: &AtomicBool) {
    while !stop.load(Ordering::Acquire) {
        if let Err(error) = manager.run() {
            tracing::error!("the {name} event loop ends: waiting for events failed: {error}");
            return;
        }
    }
}

/// Gives work to an [`EventLoop`] from other threads. The calls wait until the loop's thread has
/// run them and must not be made from that thread.
#[derive(Clone)]
pub struct EventLoopHandle {
    endpoint: RemoteEndpoint<Box<dyn Worker>>,
    stop: Arc<AtomicBool>,
}

impl std::fmt::Debug for EventLoopHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.debug_struct("EventLoopHandle").finish_non_exhaustive()
    }
}

impl EventLoopHandle {
    /// Moves a worker into the loop; its `init` registers its descriptors there.
    pub fn add(&self, worker: Box<dyn Worker>) -> Result<WorkerId, Error> {
        self.endpoint
            .call_blocking(move |ops| Ok(WorkerId(ops.add_subscriber(worker))))
    }

    /// Moves a worker out of the loop, after the event that it may be serving, with none of its
    /// descriptors watched any more.
    pub fn remove<W: Worker>(&self, id: WorkerId) -> Result<Box<W>, Error> {
        let worker = self
            .endpoint
            .call_blocking::<_, _, Error>(move |ops| Ok(ops.remove_subscriber(id.0)?))?;
        let any: Box<dyn Any> = worker;
        any.downcast().map_err(|_| Error::NoSuchWorker)
    }

    /// Runs `call` on the worker, on the loop's thread.
    pub fn with<W, R, F>(&self, id: WorkerId, call: F) -> Result<R, Error>
    where
        W: Worker,
        R: Send + 'static,
        F: FnOnce(&mut W) -> R + Send + 'static,
    {
        self.endpoint.call_blocking(move |ops| {
            let worker: &mut dyn Any = &mut **ops.subscriber_mut(id.0)?;
            let worker = worker.downcast_mut().ok_or(Error::NoSuchWorker)?;
            Ok(call(worker))
        })
    }
}

/// Registers a descriptor and logs a failure, which leaves the descriptor unserved.
///
/// It fails only for lack of kernel memory or when a descriptor is watched twice.
pub fn watch(ops: &mut EventOps, events: event_manager::Events) -> bool {
    match ops.add(events) {
        Ok(()) => true,
        Err(error) => {
            tracing::error!("watching descriptor {} failed: {error}", events.fd());
            false
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use event_manager::{EventSet, Events};
    use std::sync::atomic::AtomicU64;
    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    struct Counter {
        event: EventFd,
        seen: Arc<AtomicU64>,
    }

    impl MutEventSubscriber for Counter {
        fn process(&mut self, _events: Events, _ops: &mut EventOps) {
            self.seen
                .fetch_add(self.event.read().unwrap(), Ordering::SeqCst);
        }
        fn init(&mut self, ops: &mut EventOps) {
            assert!(watch(ops, Events::new(&self.event, EventSet::IN)));
        }
    }

    fn wait_for(seen: &AtomicU64, value: u64) {
        for _ in 0..1000 {
            if seen.load(Ordering::SeqCst) == value {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        panic!("expected {value}, have {}", seen.load(Ordering::SeqCst));
    }

    #[test]
    fn a_worker_is_served_and_handed_back() {
        let started_on = Arc::new(std::sync::Mutex::new(None));
        let record = started_on.clone();
        let events = EventLoop::new("events", move || {
            *record.lock().unwrap() = std::thread::current().name().map(str::to_owned);
        })
        .unwrap();
        events.wait_started().unwrap();
        assert_eq!(started_on.lock().unwrap().as_deref(), Some("events"));

        let seen = Arc::new(AtomicU64::new(0));
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        let kick = event.try_clone().unwrap();
        let handle = events.handle();
        let id = handle
            .add(Box::new(Counter {
                event,
                seen: seen.clone(),
            }))
            .unwrap();
        kick.write(3).unwrap();
        wait_for(&seen, 3);
        let value = handle.with(id, |counter: &mut Counter| {
            counter.seen.load(Ordering::SeqCst)
        });
        assert_eq!(value.unwrap(), 3);

        let counter = handle.remove::<Counter>(id).unwrap();
        kick.write(1).unwrap();
        assert!(matches!(
            handle.remove::<Counter>(id),
            Err(Error::NoSuchWorker)
        ));
        assert_eq!(counter.seen.load(Ordering::SeqCst), 3);

        events.stop();
        assert!(matches!(handle.add(counter), Err(Error::Ended(_))));
    }
}
