//! Memory beyond that which a VM booted with: plugged when the limits of its containers need it,
//! given back when they don't. One task for each VM has its size in hand and takes wishes one at a
//! time.

use crate::Kind;
use crate::control;
use crate::folder::RuntimeFolder;
use crate::host_cgroup::{HostCgroup, HostCgroupError};
use crate::pace::Pace;
use crate::vmm::SharedVmm;
use bulkhead_proto::vmm::{HOTPLUG_BLOCK_MIB, HotplugStatus, Request, Response};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

/// One step of a conversation with the VMM, which does nothing in it that takes time.
const STEP: Duration = Duration::from_secs(10);

/// Memory that could not be had.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HotplugError {
    /// The machine wasn't made for it.
    #[error(
        "the containers' memory limits need {wanted_mib} MiB more than the virtual machine started \
         with, and it can grow by {limit_mib} MiB: start it with a higher limit, or raise \
         memory_max_mib in the configuration for those to come"
    )]
    TooMuch {
        /// What would be needed, in MiB.
        wanted_mib: u64,
        /// What can be had, in MiB.
        limit_mib: u32,
    },
    /// The guest doesn't take it.
    #[error(
        "the guest took {plugged_mib} of {wanted_mib} MiB of further memory within {limit:?}; the \
         limit is as it was"
    )]
    NotTaken {
        /// What it was to have in all, in MiB.
        wanted_mib: u32,
        /// What it had in the end, in MiB.
        plugged_mib: u32,
        /// How long was waited.
        limit: Duration,
    },
    /// The VMM doesn't do as its contract says, or is gone.
    #[error("the virtual machine cannot be resized: {0}")]
    Vmm(String),
}

impl HotplugError {
    pub(crate) fn kind(&self) -> Kind {
        match self {
            HotplugError::TooMuch { .. } => Kind::InvalidArgument,
            HotplugError::NotTaken { .. } => Kind::DeadlineExceeded,
            HotplugError::Vmm(_) => Kind::Unknown,
        }
    }
}

/// The way to the task. With the last of these it ends.
#[derive(Debug, Clone)]
pub(crate) struct Hotplug {
    wishes: mpsc::UnboundedSender<Wish>,
    limit_mib: u32,
}

#[derive(Debug)]
enum Wish {
    /// At least so much, and word of it when it's there.
    Grow(u32, oneshot::Sender<Result<(), HotplugError>>),
    /// As near to so much as the guest gets.
    Settle(u32),
}

impl Hotplug {
    /// For a VM into which up to `limit_mib` MiB can be plugged. Must be called on the runtime.
    pub fn new(
        folder: RuntimeFolder,
        vmm: SharedVmm,
        pace: Pace,
        limit_mib: u32,
        bound: MemoryBound,
    ) -> Self {
        let (wishes, wished) = mpsc::unbounded_channel();
        let machine = Machine {
            folder: Arc::new(folder),
            vmm,
            pace,
            requested: 0,
            bound,
        };
        tokio::spawn(machine.run(wished));
        Self { wishes, limit_mib }
    }

    /// Returns once at least `mib` MiB are plugged.
    pub async fn grow(&self, mib: u64) -> Result<(), HotplugError> {
        let wanted = u32::try_from(mib).ok().filter(|mib| *mib <= self.limit_mib);
        let Some(wanted) = wanted else {
            return Err(HotplugError::TooMuch {
                wanted_mib: mib,
                limit_mib: self.limit_mib,
            });
        };
        let gone = || HotplugError::Vmm("it is ending".into());
        let (reply, answer) = oneshot::channel();
        self.wishes
            .send(Wish::Grow(wanted, reply))
            .map_err(|_| gone())?;
        answer.await.unwrap_or_else(|_| Err(gone()))
    }

    /// Has `mib` MiB plugged in due course, or what can be of them, and unplugs the rest.
    pub fn settle(&self, mib: u64) {
        // Fails only with the task, which nobody expects anything of then.
        let _ = self.wishes.send(Wish::Settle(self.most_of(mib)));
    }

    /// What can be had of `mib` MiB.
    pub fn most_of(&self, mib: u64) -> u32 {
        u32::try_from(mib).unwrap_or(u32::MAX).min(self.limit_mib)
    }
}

/// What the VMM's cgroup lets it take. It only ever grows: memory that a guest gives back comes
/// back in its own time, and a limit below what is in use would kill the VM.
#[derive(Debug)]
pub(crate) struct MemoryBound {
    pub cgroup: Option<HostCgroup>,
    /// What is allowed for the guest, in MiB.
    pub guest_mib: u64,
    /// What it started with of these.
    pub boot_mib: u64,
}

impl MemoryBound {
    /// Makes room for `plugged` MiB beyond what the guest started with.
    fn raise(&mut self, plugged: u32) -> Result<(), HotplugError> {
        let wanted = self.boot_mib.saturating_add(plugged.into());
        if wanted > self.guest_mib
            && let Some(cgroup) = &self.cgroup
        {
            let failed = |error: HostCgroupError| HotplugError::Vmm(error.to_string());
            cgroup.allow_memory(wanted).map_err(failed)?;
            self.guest_mib = wanted;
        }
        Ok(())
    }
}

struct Machine {
    folder: Arc<RuntimeFolder>,
    vmm: SharedVmm,
    pace: Pace,
    /// What the VMM was asked for last, in MiB.
    requested: u32,
    bound: MemoryBound,
}

impl Machine {
    async fn run(mut self, mut wished: mpsc::UnboundedReceiver<Wish>) {
        while let Some(wish) = wished.recv().await {
            match wish {
                Wish::Grow(mib, reply) => {
                    let result = self.grow(mib).await;
                    let _ = reply.send(result);
                }
                Wish::Settle(mib) if mib == self.requested => {}
                Wish::Settle(mib) => {
                    if let Err(error) = self.request(mib).await {
                        tracing::warn!(%error, mib, "the memory stays as it is");
                    }
                }
            }
        }
    }

    async fn grow(&mut self, mib: u32) -> Result<(), HotplugError> {
        let before = self.requested;
        if mib <= before && self.status().await?.plugged_mib >= mib {
            return Ok(());
        }
        let wanted = mib.max(before);
        let mut reached = self.vmm.hotplug_reached.clone();
        reached.mark_unchanged();
        self.request(wanted).await?;
        let limit = self.pace.plug(wanted);
        let taken = async {
            while self.status().await?.plugged_mib < wanted {
                let changed = reached.changed().await;
                changed.map_err(|_| HotplugError::Vmm("it has ended".into()))?;
            }
            Ok(())
        };
        match timeout(limit, taken).await {
            Ok(result) => result,
            Err(_) => {
                let plugged_mib = self.status().await?.plugged_mib;
                self.request(before).await?;
                Err(HotplugError::NotTaken {
                    wanted_mib: wanted,
                    plugged_mib,
                    limit,
                })
            }
        }
    }

    async fn request(&mut self, mib: u32) -> Result<(), HotplugError> {
        debug_assert!(mib.is_multiple_of(HOTPLUG_BLOCK_MIB));
        self.bound.raise(mib)?;
        match self.ask(Request::SetHotplug { mib }).await? {
            Response::Ok => {
                self.requested = mib;
                tracing::info!(mib, "memory to be plugged");
                Ok(())
            }
            other => Err(unexpected(other)),
        }
    }

    async fn status(&self) -> Result<HotplugStatus, HotplugError> {
        match self.ask(Request::Status {}).await? {
            Response::Status(status) => status
                .hotplug
                .ok_or_else(|| HotplugError::Vmm("it has no memory device".into())),
            other => Err(unexpected(other)),
        }
    }

    async fn ask(&self, request: Request) -> Result<Response, HotplugError> {
        control::ask_later(&self.folder, request, Vec::new(), STEP)
            .await
            .map_err(|error| HotplugError::Vmm(error.to_string()))
    }
}

fn unexpected(response: Response) -> HotplugError {
    HotplugError::Vmm(match response {
        Response::Error { message } => message,
        _ => "it answered another question".into(),
    })
}
