//! The pod's network, which is the guest's: for each interface in the pod's network namespace a tap
//! joined to it, a network device of the VM's over that, and the same name, addresses and routes in
//! the guest. The namespace stays as CNI left it.
//!
//! ```text
//! pod's namespace:  eth0 ──ingress──► redirected ──► bulkheadN (tap) ─► VMM ─► guest's eth0
//!                   eth0 ◄─ redirected ◄──ingress── bulkheadN       ◄─ VMM ◄─ guest's eth0
//! ```
//!
//! One task for each VM has all of it in hand: it looks when it's asked to, before a container is
//! created or started, and whenever the kernel tells of a change. It ends with the VM.

mod changes;
mod error;
mod filter;
mod forward;
mod join;
mod joined;
mod netns;
mod redirect;
mod request;
mod resolver;
mod rules;
mod senders;
mod settings;
mod sk_lookup;
mod state;
mod tap;

pub use error::NetworkError;
pub(crate) use netns::is_hosts;
pub(crate) use settings::NetworkSettings;
pub use settings::{NetworkConfig, SourceAddresses};

use crate::boot::BootPlan;
use crate::guest::Guest;
use crate::spec::HostNetns;
use bulkhead_netlink::Netlink;
use bulkhead_proto::vmm::MAX_QUEUE_PAIRS;
use changes::Changes;
use forward::Forwarder;
use joined::{Joined, Joins};
use netns::Netns;
use resolver::Resolver;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};

/// When a change that could not be followed is tried again, and how often.
const RETRY: Duration = Duration::from_secs(1);
const RETRIES: u32 = 5;

type Reply = oneshot::Sender<Result<(), NetworkError>>;

/// The way to the task.
#[derive(Debug)]
pub(crate) struct PodNetwork {
    wishes: mpsc::UnboundedSender<Reply>,
    ended: oneshot::Receiver<()>,
}

/// Can ask the task; doesn't keep it.
#[derive(Debug, Clone)]
pub(crate) struct NetworkHandle {
    wishes: mpsc::UnboundedSender<Reply>,
}

impl PodNetwork {
    /// For a VM that is up. Must be called on the runtime.
    pub fn start(guest: Arc<Guest>, plan: &BootPlan) -> Self {
        // What comes to the loopback of a lone container's own namespace is not kubectl's.
        let forwards = matches!(plan.netns, HostNetns::Path(_));
        let joins = Joins {
            folder: Arc::new(plan.folder.clone()),
            guest,
            queues: usize::from(plan.size.vcpus).clamp(1, MAX_QUEUE_PAIRS),
            settings: plan.network,
        };
        let (wishes, wished) = mpsc::unbounded_channel();
        let (over, ended) = oneshot::channel();
        tokio::spawn(async move {
            follow(joins, forwards, wished).await;
            let _ = over.send(());
        });
        Self { wishes, ended }
    }

    /// A further way to the task.
    pub fn handle(&self) -> NetworkHandle {
        NetworkHandle {
            wishes: self.wishes.clone(),
        }
    }

    /// Returns when nothing of it is left in the namespace, which is after the VM's end.
    pub async fn ended(self) {
        // A task that could not enter the namespace waits for the last wish.
        drop(self.wishes);
        let _ = self.ended.await;
    }
}

impl NetworkHandle {
    /// Returns once the guest's network is what the pod's namespace has now.
    pub async fn settle(&self) -> Result<(), NetworkError> {
        let (reply, answer) = oneshot::channel();
        self.wishes.send(reply).map_err(|_| NetworkError::Ended)?;
        answer.await.unwrap_or(Err(NetworkError::Ended))
    }
}

/// The task: from the VM's start to its end.
async fn follow(joins: Joins, forwards: bool, mut wished: mpsc::UnboundedReceiver<Reply>) {
    let vmm = joins.guest.vmm.clone();
    let (netns, changes) = match enter(vmm.process.pid).await {
        Ok(entered) => entered,
        Err(error) => {
            while let Some(reply) = wished.recv().await {
                let _ = reply.send(Err(error.clone()));
            }
            return;
        }
    };
    let forwarder = forwards.then(|| Forwarder::start(&netns, &joins.guest));
    if let Some(Err(error)) = &forwarder {
        tracing::warn!(%error, "connections to the pod's loopback will not reach the guest");
    }
    let mut resolver = Resolver::new(netns.clone(), joins.guest.clone());
    let mut joined = Joined::new(netns, joins);
    let mut retries = 0;
    loop {
        tokio::select! {
            biased;
            _ = vmm.wait() => break,
            Some(reply) = wished.recv() => {
                let _ = reply.send(settle(&mut joined, &mut resolver).await);
            }
            () = next_change(&changes, retries) => match settle(&mut joined, &mut resolver).await {
                Ok(()) => retries = 0,
                Err(error) => {
                    retries = if retries < RETRIES { retries + 1 } else { 0 };
                    tracing::warn!(%error, "the guest's network is not what the pod's is");
                }
            },
        }
    }
    drop(forwarder);
    joined.part_all().await;
}

/// Makes the guest's network what the namespace has, its name server included.
async fn settle(joined: &mut Joined, resolver: &mut Resolver) -> Result<(), NetworkError> {
    joined.settle().await?;
    // Whoever needs no names is not to fail for them.
    if let Err(error) = resolver.look().await {
        tracing::warn!(%error, "the guest cannot ask the namespace's name server");
    }
    Ok(())
}

/// The namespace that the VMM lives in, and word of changes there.
async fn enter(pid: u32) -> Result<(Netns, Changes), NetworkError> {
    let failed = |cause: io::Error| NetworkError::Namespace(Arc::new(cause));
    let netns = Netns::open(Path::new(&format!("/proc/{pid}/ns/net"))).map_err(failed)?;
    let changes = Changes::of(&netns).await.map_err(failed)?;
    Ok((netns, changes))
}

/// Takes back what was done in the namespace at `path` for a VM that is gone, by a process that is
/// too. Idempotent.
pub(crate) fn clear(path: &Path) -> Result<(), NetworkError> {
    let failed = |cause: io::Error| NetworkError::Namespace(Arc::new(cause));
    let netns = match Netns::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other.map_err(failed)?,
    };
    let cleared = netns.inside(|| {
        let mut netlink = Netlink::open()?;
        redirect::undo_all(&mut netlink)
    });
    let refused = |cause| NetworkError::Read {
        what: "redirections",
        cause: Arc::new(cause),
    };
    cleared.map_err(failed)?.map_err(refused)
}

/// The next change that is to be followed, or the time to try an earlier one again.
async fn next_change(changes: &Changes, retries: u32) {
    if retries == 0 {
        return changes.next().await;
    }
    let _ = tokio::time::timeout(RETRY, changes.next()).await;
}
