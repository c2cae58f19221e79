//! The shim that stays: serves the Task and the sandbox API on the socket it was started with until no task is
//! left.

use crate::flags::Flags;
use crate::sandbox_service::SandboxService;
use crate::service::TaskService;
use crate::{logging, publisher};
use bulkhead_sandbox::Sandbox;
use bulkhead_sandbox::ids::{Namespace, SandboxId};
use std::os::fd::FromRawFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Notify, mpsc};
use tokio::time::timeout;
use ttrpc::r#async::Server;
use ttrpc::r#async::transport::Listener;

/// Environment variable with the daemon's event socket; empty where nobody listens.
pub const EVENTS_ENV: &str = "TTRPC_ADDRESS";

/// Descriptor on which `start` hands the listening socket over.
pub const LISTENER_FD: i32 = 3;

/// How long the last answers and the last events may take.
const LAST_ANSWERS: Duration = Duration::from_secs(1);
const LAST_EVENTS: Duration = Duration::from_secs(5);

/// Why the daemon couldn't serve.
pub type DaemonError = Box<dyn std::error::Error + Send + Sync>;

/// Serves the sandbox `flags.id` until it's told to leave. The working directory is the bundle of
/// the sandbox's first container.
///
/// # Errors
/// When the ids are bad or the socket can't be used.
pub fn run(flags: &Flags) -> Result<(), DaemonError> {
    share_heap();
    logging::to_bundle(Path::new("."), flags.debug);
    // SAFETY: `start` put the listening socket there for this process alone; nothing else has
    // taken it yet.
    let listener = unsafe { UnixListener::from_raw_fd(LISTENER_FD) };
    let socket = listener.local_addr()?.as_pathname().map(Path::to_owned);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let result = runtime.block_on(serve(flags, listener, socket.as_deref()));
    if result.is_err() {
        remove(socket.as_deref());
    }
    // Blocking work that can't be waited for, a hook that hangs, must not keep the shim.
    runtime.shutdown_timeout(LAST_ANSWERS);
    result
}

fn remove(socket: Option<&Path>) {
    if let Some(socket) = socket {
        let _ = std::fs::remove_file(socket);
    }
}

/// glibc gives threads heaps of their own, up to eight for each core, and each keeps some of what it
/// once held. A shim is there for every pod, and its threads mostly wait: one heap does for all.
fn share_heap() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it takes two numbers, and there is no other thread yet.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

async fn serve(
    flags: &Flags,
    listener: UnixListener,
    socket: Option<&Path>,
) -> Result<(), DaemonError> {
    let id = SandboxId::try_from(flags.id.as_str())?;
    let namespace = Namespace::try_from(flags.namespace.as_str())?;
    let (notifications, events) = mpsc::unbounded_channel();
    let address = std::env::var(EVENTS_ENV).unwrap_or_default();
    let publisher = tokio::spawn(publisher::publish(address, flags.namespace.clone(), events));
    let sandbox = Sandbox::new(id, namespace, notifications);
    let leave = Arc::new(Notify::new());
    let tasks = TaskService::new(sandbox.clone(), leave.clone());
    let pods = SandboxService::new(flags.id.clone(), sandbox.clone(), leave.clone());
    let mut server = Server::new()
        .add_listener(Listener::try_from(listener)?)
        .register_service(tasks.into_services())
        .register_service(pods.into_services());
    server.start().await?;
    tracing::info!(sandbox = %flags.id, namespace = %flags.namespace, "serving");
    told_to_leave(&leave).await?;

    tracing::info!("leaving");
    // At once: a container of the same name may be started by now, whose shim must not be this one,
    // and from then on the path is the next one's.
    remove(socket);
    if let Err(error) = sandbox.stop().await {
        tracing::error!(%error, "something of the sandbox is left");
    }
    // The answer to Shutdown is still on its way.
    tokio::time::sleep(Duration::from_millis(20)).await;
    let _ = timeout(LAST_ANSWERS, server.shutdown()).await;
    // The owner ends with its last handle, and with it the senders of events.
    drop((sandbox, server));
    if timeout(LAST_EVENTS, publisher).await.is_err() {
        tracing::warn!("leaving with events unsent");
    }
    Ok(())
}

/// Until Shutdown, or a signal that asks for the same.
async fn told_to_leave(leave: &Notify) -> std::io::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        () = leave.notified() => {}
        _ = terminate.recv() => tracing::info!("SIGTERM"),
        _ = interrupt.recv() => tracing::info!("SIGINT"),
    }
    Ok(())
}
