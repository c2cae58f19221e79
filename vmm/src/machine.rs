//! The machine at work: what it is asked, and how it ends.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::Instant;

use bulkhead_proto::vmm::{Event, ExitReason, PluggedSlot, Request, Response, Status};
use kvm_bindings::CpuId;
use kvm_ioctls::{Kvm, VmFd};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::Bus;
use crate::config::Resources;
use crate::control::{self, Next};
use crate::devices::Devices;
use crate::events::EventSink;
use crate::memory::Memory;
use crate::recipe::{self, BuildError};
use crate::snapshot::save::Paused;
use crate::snapshot::{HostKvm, SaveError, Saving, Shape};
use crate::spares::{SpareError, Spares};
use crate::vcpu::{VcpuEnd, Vcpus};
use crate::virtio::console::ConsoleLog;
use crate::virtio::net::NetConfig;

/// What Linux writes to its console when it gives up.
const PANIC_LINE: &str = "Kernel panic - not syncing";

/// Builds the machine, runs it to its end, and says why it ended.
pub fn run(resources: Resources, events: &EventSink, started: Instant) -> ExitReason {
    match recipe::build(resources, events, started) {
        Ok(machine) => machine.run(events, started),
        Err(BuildError::Template(refused)) => ExitReason::TemplateRefused {
            message: refused.to_string(),
        },
        Err(error) => ExitReason::VmmFailed {
            message: error.to_string(),
        },
    }
}

/// A built machine. Fields drop in order: vCPUs end before devices, devices before memory.
pub(crate) struct Machine {
    pub(crate) vcpus: Vcpus,
    /// What each of them was given as its CPUID.
    pub(crate) cpuids: Vec<CpuId>,
    pub(crate) devices: Devices,
    pub(crate) spares: Spares,
    pub(crate) bus: Arc<Bus>,
    pub(crate) vm: Arc<VmFd>,
    pub(crate) kvm: Kvm,
    pub(crate) memory: Memory,
    /// What the guest was told of this machine.
    pub(crate) shape: Shape,
    pub(crate) host: HostKvm,
    pub(crate) console: Arc<Mutex<ConsoleLog>>,
    pub(crate) control: UnixListener,
    pub(crate) ended: Ended,
    /// By request.
    pub(crate) paused: bool,
    pub(crate) saved: bool,
}

impl Machine {
    fn run(mut self, events: &EventSink, started: Instant) -> ExitReason {
        events.send(&Event::Running {
            kvm: self.shape.kvm,
            setup_us: started.elapsed().as_micros() as u64,
        });
        self.vcpus.resume();
        // Taken out, so that requests can be handled with the rest of the machine.
        let (Ok(listener), Ok(signal)) = (self.control.try_clone(), self.ended.signal.try_clone())
        else {
            return ExitReason::VmmFailed {
                message: "duplicating the control socket failed; check the limit on open files"
                    .into(),
            };
        };
        let served = control::serve(&listener, &signal, |request, descriptors| {
            self.handle(request, descriptors)
        });
        let end = self.ended.receiver.try_recv().ok();
        self.vcpus.stop();
        match (end, served) {
            (Some(end), _) => self.explain(end),
            (None, Ok(())) if self.saved => ExitReason::Saved,
            (None, Ok(())) => ExitReason::Stopped,
            (None, Err(error)) => ExitReason::VmmFailed {
                message: format!("waiting on the control socket: {error}"),
            },
        }
    }

    fn handle(&mut self, request: Request, mut descriptors: Vec<OwnedFd>) -> (Response, Next) {
        let response = match request {
            Request::Status {} => Response::Status(Status {
                paused: self.paused,
                ready: self.devices.ready(),
                kvm: self.shape.kvm,
                userspace_exits: self.vcpus.exits().load(Ordering::Relaxed),
                devices: self.devices.names(),
                plugged: self.spares.plugged(),
                hotplug: self.devices.hotplug(),
            }),
            Request::Pause {} => {
                self.vcpus.pause();
                self.paused = true;
                Response::Ok
            }
            Request::Resume {} => {
                self.vcpus.resume();
                self.paused = false;
                Response::Ok
            }
            Request::SetBlockBacking { index, read_only } => {
                let backing = descriptors.pop();
                done(self.devices.set_backing(index, read_only, backing))
            }
            Request::SetHotplug { mib } => done(self.devices.set_hotplug(mib)),
            Request::PlugBlock { serial, read_only } => {
                plugged(self.spares.plug_block(&serial, read_only, descriptors))
            }
            Request::PlugNet {
                mac,
                mtu,
                any_sender,
                to_guest,
                from_guest,
                vhost,
            } => {
                let config = NetConfig {
                    mac,
                    mtu,
                    any_sender,
                    to_guest,
                    from_guest,
                };
                plugged(self.spares.plug_net(config, vhost, descriptors))
            }
            Request::Unplug { slot } => done(self.spares.unplug(slot)),
            Request::SaveTemplate {} => match self.save(descriptors) {
                Ok(()) => {
                    self.saved = true;
                    return (Response::Ok, Next::End);
                }
                Err(error) => refused(&error),
            },
            Request::Stop {} => return (Response::Ok, Next::End),
        };
        (response, Next::GoOn)
    }

    /// Saves the machine to the two files; it stands still afterwards. When that fails it goes on.
    fn save(&self, descriptors: Vec<OwnedFd>) -> Result<(), SaveError> {
        let files = Saving::new(descriptors)?;
        if !self.devices.ready() {
            return Err(SaveError::NotReady);
        }
        if !self.spares.is_empty() {
            return Err(SaveError::Plugged);
        }
        self.vcpus.pause();
        let saved = files.run(&Paused {
            kvm: &self.kvm,
            vm: &self.vm,
            vcpus: &self.vcpus,
            cpuids: &self.cpuids,
            bus: &self.bus,
            memory: &self.memory.boot,
            shape: &self.shape,
            host: &self.host,
        });
        if saved.is_err() && !self.paused {
            self.vcpus.resume();
        }
        saved
    }

    /// Only the console says whether a reset was a panic; it is the guest's word, and only shown.
    fn explain(&self, end: VcpuEnd) -> ExitReason {
        match end {
            VcpuEnd::Failed {
                vcpu,
                rip,
                instruction,
                detail,
            } => ExitReason::KvmFailed {
                vcpu,
                rip,
                instruction,
                detail,
            },
            VcpuEnd::Reset => {
                let console_tail = self
                    .console
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .tail();
                if console_tail.iter().any(|line| line.contains(PANIC_LINE)) {
                    ExitReason::GuestPanic { console_tail }
                } else {
                    ExitReason::GuestShutdown
                }
            }
        }
    }
}

fn done(result: Result<(), impl std::error::Error>) -> Response {
    match result {
        Ok(()) => Response::Ok,
        Err(error) => refused(&error),
    }
}

fn plugged(result: Result<PluggedSlot, SpareError>) -> Response {
    match result {
        Ok(slot) => Response::Plugged { slot },
        Err(error) => refused(&error),
    }
}

fn refused(error: &impl std::error::Error) -> Response {
    Response::Error {
        message: error.to_string(),
    }
}

/// How vCPU threads tell the main thread that the machine has ended.
pub(crate) struct Ended {
    signal: EventFd,
    report: mpsc::SyncSender<VcpuEnd>,
    receiver: mpsc::Receiver<VcpuEnd>,
}

impl Ended {
    pub(crate) fn new() -> std::io::Result<Self> {
        let (report, receiver) = mpsc::sync_channel(1);
        Ok(Self {
            signal: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
            report,
            receiver,
        })
    }

    /// The first end counts; the others are its consequence.
    pub(crate) fn sender(&self) -> std::io::Result<Arc<dyn Fn(VcpuEnd) + Send + Sync>> {
        let report = self.report.clone();
        let signal = self.signal.try_clone()?;
        Ok(Arc::new(move |end| {
            let _ = report.try_send(end);
            let _ = signal.write(1);
        }))
    }
}
