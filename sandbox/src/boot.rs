//! Bringing a sandbox's VM up: a recipe from top to bottom, for a boot as for a template's clone.
//! Whatever fails, nothing is left.

use crate::config::{Config, Console};
use crate::folder::{FolderError, RuntimeFolder, StateFile};
use crate::guest::{AgentError, Guest};
use crate::host_cgroup::{HostCgroup, HostCgroupError};
use crate::ids::SandboxId;
use crate::images::{ImageError, Images};
use crate::network::NetworkSettings;
use crate::pace::{Pace, VMM_SETUP};
use crate::process_ref::ProcessRef;
use crate::sizing::MachineSize;
use crate::spec::HostNetns;
use crate::template::{self, Template, micros};
use crate::vmm::{VmEnd, Vmm, VmmStart};
use bulkhead_proto::vmm::Event;
use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use tokio::time::timeout;

/// A VM that didn't come up.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// Something that it's made from can't be used.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// Its folder can't be made.
    #[error(transparent)]
    Folder(#[from] FolderError),
    /// This process can't be named.
    #[error("cannot read this process's start time: {0}")]
    Own(io::Error),
    /// The VMM can't be put into the sandbox's cgroup.
    #[error(transparent)]
    Cgroup(#[from] HostCgroupError),
    /// The configuration didn't reach the VMM.
    #[error("cannot hand the configuration to the VMM: {cause}{log}")]
    Configure {
        /// Why.
        cause: io::Error,
        /// The VMM's last log lines, or empty.
        log: Tail,
    },
    /// The VM ended first.
    #[error("the virtual machine ended while it booted: {end}{log}")]
    Ended {
        /// Why.
        end: VmEnd,
        /// The VMM's last log lines, or empty.
        log: Tail,
    },
    /// No answer in time.
    #[error("{what} within {limit:?}{log}")]
    TimedOut {
        /// What didn't happen.
        what: &'static str,
        /// How long was waited.
        limit: Duration,
        /// The guest's last console lines and the VMM's last log lines, or empty.
        log: Tail,
    },
    /// The agent said it was ready but doesn't answer.
    #[error("the guest booted, but its agent cannot be used: {cause}{log}")]
    Agent {
        /// Why.
        cause: AgentError,
        /// The guest's last console lines, or empty.
        log: Tail,
    },
}

/// Last lines of logs, for an error's end.
#[derive(Debug, Clone, Default)]
pub struct Tail(Vec<(&'static str, Vec<String>)>);

impl Tail {
    fn of(folder: &RuntimeFolder) -> Self {
        let logs = [
            ("the guest's console", "console.log"),
            ("the VMM's log", "vmm.log"),
        ];
        Self(
            logs.into_iter()
                .map(|(title, name)| (title, folder.log_tail(name)))
                .collect(),
        )
    }
}

impl std::fmt::Display for Tail {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (title, lines) in self.0.iter().filter(|(_, lines)| !lines.is_empty()) {
            write!(f, "\nlast lines of {title}:")?;
            for line in lines {
                write!(f, "\n  {line}")?;
            }
        }
        Ok(())
    }
}

/// What to boot.
#[derive(Debug, Clone)]
pub(crate) struct BootPlan {
    pub sandbox: SandboxId,
    pub config: Arc<Config>,
    pub folder: RuntimeFolder,
    pub size: MachineSize,
    pub netns: HostNetns,
    /// Where the VMM runs.
    pub cgroup: HostCgroup,
    /// Of the guest's network devices.
    pub network: NetworkSettings,
    /// What the guest itself is called; containers set their own.
    pub hostname: Option<String>,
}

/// A VM whose agent has answered, and what state.json says of it so far.
pub(crate) type Up = (Guest, StateFile);

/// Brings a VM up to an answering agent: from a template where that can be done, by booting its
/// kernel otherwise.
pub(crate) async fn boot(plan: &BootPlan) -> Result<Up, BootError> {
    let images = Images::open(&plan.config)?;
    if plan.config.templates {
        match template::start(plan, &images).await {
            Ok(up) => return Ok(up),
            Err(error) => tracing::warn!(%error, "no template can be used; booting cold"),
        }
    }
    start_in_folder(plan, &images, None).await
}

/// Makes the sandbox's folder and starts a VM there.
pub(crate) async fn start_in_folder(
    plan: &BootPlan,
    images: &Images,
    template: Option<&Template>,
) -> Result<Up, BootError> {
    plan.folder.create()?;
    let started = launch(Launch {
        sandbox: plan.sandbox.as_str(),
        config: &plan.config,
        folder: &plan.folder,
        size: plan.size,
        netns: &plan.netns,
        cgroup: Some(&plan.cgroup),
        images,
        template: template.map(|template| (template, plan.hostname.as_deref())),
        dies_with_us: false,
    })
    .await;
    if started.is_err()
        && let Err(error) = plan.folder.remove()
    {
        tracing::error!(%error, "undoing a failed boot left something");
    }
    started
}

/// A VM to start in a folder that is there.
pub(crate) struct Launch<'a> {
    /// For logs.
    pub sandbox: &'a str,
    pub config: &'a Config,
    pub folder: &'a RuntimeFolder,
    pub size: MachineSize,
    pub netns: &'a HostNetns,
    /// Where the VMM runs; none for the caller's own.
    pub cgroup: Option<&'a HostCgroup>,
    pub images: &'a Images,
    /// What to continue instead of booting, and the host name that the clone gets.
    pub template: Option<(&'a Template, Option<&'a str>)>,
    /// See [`VmmStart::dies_with_us`].
    pub dies_with_us: bool,
}

/// Starts a VM and brings it up. On failure it has ended.
pub(crate) async fn launch(launch: Launch<'_>) -> Result<Up, BootError> {
    let begin = Instant::now();
    let folder = launch.folder;
    let shim = ProcessRef::own().map_err(BootError::Own)?;
    let mut state = StateFile {
        shim,
        vmm: None,
        netns: match launch.netns {
            HostNetns::Path(path) => Some(path.clone()),
            HostNetns::New => None,
        },
        containers: BTreeMap::new(),
        cgroup: launch
            .cgroup
            .map(|cgroup| cgroup.clone().noting_what_is_missing()),
    };
    folder.write_state(&state)?;
    let unconfigured = Vmm::spawn(VmmStart {
        program: &launch.config.vmm,
        sandbox: launch.sandbox,
        size: launch.size,
        images: launch.images,
        template: launch.template.map(|(template, _)| template),
        folder,
        netns: launch.netns,
        kernel_params: &launch.config.kernel_params,
        verbose: launch.config.console == Console::Verbose,
        dies_with_us: launch.dies_with_us,
    })?;
    state.vmm = Some(unconfigured.vmm.process);
    folder.write_state(&state)?;
    if let Err(error) = place(&state, launch.size).await {
        unconfigured.vmm.kill();
        unconfigured.vmm.wait().await;
        return Err(error.into());
    }
    let (vmm, events) = unconfigured
        .configure()
        .map_err(|cause| BootError::Configure {
            cause,
            log: Tail::of(folder),
        })?;
    let spawned_us = micros(begin.elapsed());
    let vmm = Arc::new(vmm);
    let hostname = launch.template.map(|(_, hostname)| hostname);
    let guest = bring_up(folder, vmm.clone(), events, hostname).await;
    let Ok(guest) = guest else {
        vmm.kill();
        vmm.wait().await;
        return guest.map(|guest| (guest, state));
    };
    tracing::info!(
        cloned = launch.template.is_some(),
        spawned_us,
        up_us = micros(begin.elapsed()),
        "the guest is up"
    );
    Ok((guest, state))
}

/// Puts a VMM that hasn't begun into its cgroup.
async fn place(state: &StateFile, size: MachineSize) -> Result<(), HostCgroupError> {
    let (Some(cgroup), Some(vmm)) = (state.cgroup.clone(), state.vmm) else {
        return Ok(());
    };
    let path = cgroup.path().to_owned();
    let placed = move || cgroup.place(vmm.pid, size.memory_mib.into());
    // Moving a process makes the kernel wait for others.
    let placed = tokio::task::spawn_blocking(placed).await;
    placed.unwrap_or_else(|error| {
        Err(HostCgroupError {
            verb: "put the VMM into",
            path,
            cause: error.to_string(),
        })
    })
}

/// From a configured VMM to an agent that can be used. A clone, told by the host name that it may
/// get, is ready from its first instruction on.
async fn bring_up(
    folder: &RuntimeFolder,
    vmm: Arc<Vmm>,
    mut events: mpsc::Receiver<Event>,
    clone: Option<Option<&str>>,
) -> Result<Guest, BootError> {
    let begin = Instant::now();
    let kvm = wait_for(
        &mut events,
        folder,
        &vmm,
        VMM_SETUP,
        "the VMM did not build the machine",
        |event| match event {
            Event::Running { kvm, .. } => Some(kvm),
            _ => None,
        },
    );
    let pace = Pace::of(kvm.await?);
    let running_us = micros(begin.elapsed());
    if clone.is_none() {
        let what = "the guest's agent did not report ready";
        wait_for(
            &mut events,
            folder,
            &vmm,
            pace.boot(),
            what,
            |event| match event {
                Event::Ready { .. } => Some(()),
                _ => None,
            },
        )
        .await?;
    }
    let ready_us = micros(begin.elapsed());
    let opened = folder.open().map_err(|cause| {
        let path = folder.path().to_owned();
        FolderError::Io {
            verb: "open",
            path,
            cause,
        }
    })?;
    let called = async {
        let guest = Guest::connect(opened, vmm, pace).await?;
        let connected_us = micros(begin.elapsed());
        if let Some(hostname) = clone {
            guest.identify(hostname).await?;
        }
        let answered_us = micros(begin.elapsed());
        tracing::info!(
            running_us,
            ready_us,
            connected_us,
            answered_us,
            "phases of the start"
        );
        Ok(guest)
    };
    called.await.map_err(|error| match error {
        AgentError::VmEnded { end, .. } => BootError::Ended {
            end,
            log: Tail::of(folder),
        },
        cause => BootError::Agent {
            cause,
            log: Tail::of(folder),
        },
    })
}

/// Waits for the event that `pick` accepts, but not beyond `limit` nor the VMM's end.
async fn wait_for<T>(
    events: &mut mpsc::Receiver<Event>,
    folder: &RuntimeFolder,
    vmm: &Vmm,
    limit: Duration,
    what: &'static str,
    mut pick: impl FnMut(Event) -> Option<T>,
) -> Result<T, BootError> {
    let picked = timeout(limit, async {
        while let Some(event) = events.recv().await {
            if let Some(found) = pick(event) {
                return Ok(found);
            }
        }
        // The pipe is closed: the VMM is about to end, or has.
        Err(vmm.wait().await)
    });
    match picked.await {
        Ok(Ok(found)) => Ok(found),
        Ok(Err(end)) => Err(BootError::Ended {
            end,
            log: Tail::of(folder),
        }),
        Err(_) => Err(BootError::TimedOut {
            what,
            limit,
            log: Tail::of(folder),
        }),
    }
}
