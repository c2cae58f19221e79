//! Creation: prepare, boot if there is no VM, set up in the guest. Each step's failure takes back
//! the steps before it.

use super::{AfterStop, Container, Done, Owner, Running, Vm, memory};
use crate::boot::{self, BootError, BootPlan};
use crate::disks::Attached;
use crate::error::{Error, Result};
use crate::folder::StateFile;
use crate::guest::Guest;
use crate::hotplug::{Hotplug, MemoryBound};
use crate::ids::{ContainerId, ProcessId};
use crate::network::PodNetwork;
use crate::ops::{self, SetUp};
use crate::pod::Role;
use crate::pod_files;
use crate::prepare::{self, Prepared};
use crate::process::{ExitStatus, Phase, Process, Reply};
use crate::sandbox::{CreateContainer, Notification};
use crate::stdio::{Copies, Progress};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::SystemTime;

impl Owner {
    pub(super) fn create(&mut self, request: CreateContainer, reply: Reply<u32>) {
        let id = request.id.clone();
        if self.containers.contains_key(&id) {
            return drop(reply.send(Err(Error::AlreadyExists(format!("container {id}")))));
        }
        if let Vm::Dead { end, .. } = &self.vm {
            return drop(reply.send(Err(Error::VmEnded(end.clone()))));
        }
        let container = Container {
            bundle: request.bundle.clone(),
            rootfs: request.rootfs.clone(),
            init: Process::new(Phase::Creating, request.stdio.clone()),
            execs: BTreeMap::new(),
            prepared: None,
            disks: Attached::default(),
            create_reply: Some(reply),
            held_exit: None,
            pid: 0,
            created_at: SystemTime::now(),
            paused: false,
            memory_limit: 0,
            raising: 0,
            by_sandbox_api: request.pod.is_some(),
        };
        self.containers.insert(id.clone(), container);
        let context = prepare::Context {
            sandbox: self.id.clone(),
            namespace: self.namespace.clone(),
            vm_exists: matches!(self.vm, Vm::Booting | Vm::Up(_)),
            pod: self.pod.clone(),
        };
        self.spawn(async move {
            let prepared = ops::blocking(move || prepare::prepare(&request, &context)).await;
            let result = prepared.map(Arc::new);
            Done::Prepared { id, result }
        });
    }

    pub(super) fn prepared(&mut self, id: ContainerId, result: Result<Arc<Prepared>>) {
        let prepared = match result {
            Ok(prepared) => prepared,
            Err(error) => return self.create_failed(&id, error),
        };
        let plan = prepared.plan.clone();
        if let Ok(container) = self.container(&id) {
            container.prepared = Some(prepared);
        }
        match self.vm {
            Vm::Up(_) => self.create_in_guest(id),
            Vm::Absent => {
                self.waiting.push(id);
                self.boot(plan);
            }
            Vm::Booting | Vm::Stopping => self.waiting.push(id),
            Vm::Dead { ref end, .. } => {
                let error = Error::VmEnded(end.clone());
                self.fail_prepared(id, error);
            }
        }
    }

    /// Boots a VM for the containers that wait for one.
    pub(super) fn boot(&mut self, plan: BootPlan) {
        self.vm = Vm::Booting;
        tracing::info!(sandbox = %self.id, size = ?plan.size, "booting");
        self.spawn(async move {
            let result = Box::new(boot::boot(&plan).await);
            Done::Booted { plan, result }
        });
    }

    pub(super) fn booted(
        &mut self,
        plan: BootPlan,
        result: std::result::Result<(Guest, StateFile), BootError>,
    ) {
        let waiting = std::mem::take(&mut self.waiting);
        let (guest, state) = match result {
            Ok(up) => up,
            Err(error) => {
                self.vm = Vm::Absent;
                let error = Error::from(error);
                for id in waiting {
                    self.fail_prepared(id, error.clone());
                }
                return self.stopped(Ok(()));
            }
        };
        let guest = Arc::new(guest);
        let vmm = guest.vmm.clone();
        let hotplug = (plan.size.hotplug_mib > 0).then(|| {
            let (folder, limit) = (plan.folder.clone(), plan.size.hotplug_mib);
            let boot_mib = u64::from(plan.size.memory_mib);
            let bound = MemoryBound {
                cgroup: state.cgroup.clone(),
                guest_mib: boot_mib,
                boot_mib,
            };
            Hotplug::new(folder, vmm.clone(), guest.pace, limit, bound)
        });
        let network = PodNetwork::start(guest.clone(), &plan);
        self.vm = Vm::Up(Running {
            guest,
            plan,
            state,
            hotplug,
            network,
            told_to_end: false,
        });
        self.spawn(async move {
            Done::VmEnded {
                vmm: vmm.process,
                end: vmm.wait().await,
            }
        });
        for id in waiting {
            self.create_in_guest(id);
        }
        if !self.after_stop.is_empty() {
            // Asked to stop while booting.
            self.stop_vm(true);
        }
    }

    fn create_in_guest(&mut self, id: ContainerId) {
        let Vm::Up(running) = &self.vm else { return };
        let (guest, namespace) = (running.guest.clone(), self.namespace.clone());
        let network = running.network.handle();
        let Some(prepared) = self
            .containers
            .get(&id)
            .and_then(|one| one.prepared.clone())
        else {
            return;
        };
        self.save_state();
        if prepared.role == Role::PodSandbox {
            self.pod = prepared.spec.pod_settings();
            let folder = prepared.plan.folder.clone();
            if prepared.pod.is_some() {
                self.pod.files = pod_files::list(&folder);
            }
            return self.spawn(async move {
                let result = ops::create_pod(&network, &prepared).await.map(|()| None);
                Done::Created { id, result }
            });
        }
        let resources = prepared.guest.spec.linux().as_ref();
        let resources = resources.and_then(|linux| linux.resources().as_ref());
        if let (Some(limit), Ok(container)) =
            (resources.and_then(memory::limit_of), self.container(&id))
        {
            container.memory_limit = limit;
        }
        let growth = self.growth();
        self.spawn(async move {
            if let Some(growth) = growth {
                growth.best(id.clone()).await;
            }
            let created = async {
                network.settle().await?;
                ops::create(guest, prepared, namespace).await.map(Some)
            };
            let result = created.await;
            Done::Created { id, result }
        });
    }

    pub(super) fn created(&mut self, id: ContainerId, result: Result<Option<SetUp>>) {
        let (copies, disks) = match result {
            Ok(Some(set_up)) => (Some(set_up.copies), set_up.disks),
            Ok(None) => (None, Attached::default()),
            Err(error) => return self.fail_prepared(id, error),
        };
        let guest = match self.guest() {
            Ok(guest) => guest,
            Err(error) => return self.fail_prepared(id, error),
        };
        let pid = guest.vmm.process.pid;
        let progress = copies.as_ref().map(Copies::progress);
        let Ok(container) = self.container(&id) else {
            return;
        };
        container.init.attach(copies);
        container.disks = disks;
        container.init.phase = Phase::Created;
        container.pid = pid;
        container.created_at = SystemTime::now();
        let reply = container.create_reply.take();
        let notification = Notification::Created {
            container: id.clone(),
            bundle: container.bundle.clone(),
            rootfs: container.rootfs.clone(),
            stdio: container.init.paths.clone(),
            pid,
        };
        self.notify(notification);
        if let Some(progress) = progress {
            self.watch(guest, ProcessId::init(id), progress);
        }
        if let Some(reply) = reply {
            let _ = reply.send(Ok(pid));
        }
    }

    /// Has the process's end reported, after its last output: daemons' clients stop reading when
    /// they hear of the end, and the output comes by another connection.
    pub(super) fn watch(&self, guest: Arc<Guest>, id: ProcessId, progress: Progress) {
        self.spawn(async move {
            let (exit, oom) = match guest.wait(&id).await {
                Ok(end) => {
                    progress.settle(guest.pace.output_stall()).await;
                    end
                }
                Err(error) => {
                    // The VM is gone, or the agent broken, which is as good as gone.
                    tracing::warn!(%error, process = %id, "waiting for a process's end failed");
                    guest.vmm.kill();
                    (ExitStatus::killed(), false)
                }
            };
            Done::Exited { id, exit, oom }
        });
    }

    /// Takes back the mounts of a create that failed after its preparation, then reports it.
    pub(super) fn fail_prepared(&mut self, id: ContainerId, error: Error) {
        let Ok(container) = self.container(&id) else {
            return;
        };
        let bundle = container.bundle.clone();
        container.prepared = None;
        self.spawn(async move {
            ops::undo_prepare(bundle).await;
            Done::Prepared {
                id,
                result: Err(error),
            }
        });
    }

    fn create_failed(&mut self, id: &ContainerId, error: Error) {
        tracing::warn!(container = %id, %error, "create failed");
        let Some(mut container) = self.containers.remove(id) else {
            return;
        };
        container.init.abandon(&error);
        self.save_state();
        self.settle_memory();
        let Some(reply) = container.create_reply.take() else {
            return;
        };
        self.answer_when_settled(AfterStop::CreateFailed(reply, error));
    }
}
