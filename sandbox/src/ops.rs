//! The operations that take time: each runs as a task of its own and hands its result back to the
//! owner. None of them knows the owner's state.

use crate::Kind;
use crate::disks::Attached;
use crate::disks::upper::mark_opaque;
use crate::disks::volumes::renumber;
use crate::error::{Error, Result};
use crate::folder::RuntimeFolder;
use crate::guest::{AgentError, Guest, streams};
use crate::hooks::{self, HookState};
use crate::ids::{ContainerId, Namespace, ProcessId};
use crate::mounts::{bind_into_share, bind_root_into_share, make_mount_points};
use crate::network::{NetworkHandle, PodNetwork};
use crate::pod_files;
use crate::prepare::{self, Prepared};
use crate::spec::{BundleSpec, parse_process};
use crate::stdio::{Copies, Stdio};
use bulkhead_proto::agent;
use bulkhead_proto::guest::SHARE_MOUNTS;
use oci_spec::runtime::{Hook, Process};
use std::path::PathBuf;
use std::sync::Arc;

/// Runs `work` off the runtime's thread.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(Error::Invalid(format!("internal error: {error}"))),
    }
}

/// A container that was set up in the guest.
pub(crate) struct SetUp {
    pub copies: Copies,
    pub disks: Attached,
}

/// Sets `prepared` up in the guest. On failure nothing is left of it there or in the share.
pub(crate) async fn create(
    guest: Arc<Guest>,
    prepared: Arc<Prepared>,
    namespace: Namespace,
) -> Result<SetUp> {
    let folder = prepared.plan.folder.clone();
    let sharing = prepared.clone();
    let created = async {
        blocking(move || share(&sharing)).await?;
        run_create_hooks(&prepared, guest.vmm.process.pid).await?;
        let disks = Attached::new(&guest, &prepared).await?;
        match create_in_guest(&guest, &prepared, &disks, &namespace).await {
            Ok(copies) => Ok(SetUp { copies, disks }),
            Err(error) => {
                let folder = Arc::new(prepared.plan.folder.clone());
                disks.remove(Some(&guest), &folder).await;
                Err(error)
            }
        }
    };
    let created = created.await;
    if created.is_err() {
        let id = prepared.id.clone();
        if let Err(error) = blocking(move || Ok(folder.remove_container(&id)?)).await {
            tracing::error!(%error, "undoing a failed create left something in the share");
        }
    }
    created
}

/// Sets up what a pod has before its containers: its network, and the files that are left to us.
pub(crate) async fn create_pod(network: &NetworkHandle, prepared: &Arc<Prepared>) -> Result<()> {
    network.settle().await?;
    let prepared = prepared.clone();
    blocking(move || match &prepared.pod {
        Some(pod) => pod_files::make(&prepared.plan.folder, pod),
        None => Ok(()),
    })
    .await
}

/// Makes the container's root and bind mounts visible in the share.
fn share(prepared: &Prepared) -> Result<()> {
    let folder = &prepared.plan.folder;
    let skeleton = folder.container_skeleton(&prepared.id);
    make_mount_points(&skeleton, &prepared.guest.binds).map_err(|cause| {
        crate::folder::FolderError::Io {
            verb: "make mount points in",
            path: skeleton,
            cause,
        }
    })?;
    let share = folder.container_share(&prepared.id);
    // Writable though the spec may ask for a read-only root: mount points that the image lacks are
    // made in it first, and then the agent makes it read-only. Where the daemon mounted the root
    // read-only, it is that here too; and where it is only what lies below a layer of limited size.
    if !prepared.own_root {
        let root = prepared.spec.root_path();
        bind_root_into_share(&root, &share.join("rootfs"), prepared.root_below)?;
    }
    for bind in &prepared.guest.binds {
        if let Some(volume) = &bind.volume {
            folder.bind_volume(bind, volume)?;
            continue;
        }
        let target = share.join(SHARE_MOUNTS).join(bind.name());
        bind_into_share(bind, &target)?;
    }
    Ok(())
}

async fn create_in_guest(
    guest: &Guest,
    prepared: &Prepared,
    disks: &Attached,
    namespace: &Namespace,
) -> Result<Copies> {
    let mut spec = prepared.guest.spec.clone();
    renumber(&mut spec, &disks.numbers);
    let spec_json = serde_json::to_vec(&spec)
        .map_err(|error| Error::Invalid(format!("the guest's spec cannot be written: {error}")))?;
    let ends = prepared.stdio.open(prepared.id.as_str(), namespace).await?;
    let (tokens, copies) = ends.connect(guest).await?;
    let (rows, columns) = spec
        .process()
        .as_ref()
        .map(terminal_size)
        .unwrap_or_default();
    let request = agent::CreateRequest {
        container_id: prepared.id.to_string(),
        spec_json,
        streams: streams(tokens),
        terminal_rows: rows,
        terminal_columns: columns,
        storage: prepared.guest.storage.clone(),
        ..Default::default()
    };
    match guest.create(&request).await {
        Ok(()) => Ok(copies),
        Err(cause) => {
            forget(guest, &ProcessId::init(prepared.id.clone()), &cause).await;
            Err(Error::Runtime {
                verb: "create",
                cause: Arc::new(cause),
            })
        }
    }
}

/// After a call without an answer the guest may hold what nobody else knows of.
async fn forget(guest: &Guest, process: &ProcessId, cause: &AgentError) {
    if matches!(cause, AgentError::TimedOut { .. }) {
        let _ = guest.signal(process, libc::SIGKILL as u32, false).await;
        let _ = guest.delete(process).await;
    }
}

fn terminal_size(process: &Process) -> (u32, u32) {
    let cells = |number: u64| u32::try_from(number).unwrap_or_default();
    process
        .console_size()
        .map(|size| (cells(size.height()), cells(size.width())))
        .unwrap_or_default()
}

/// The hooks between creation and start. All of them run on the host: the container's namespaces
/// are in the guest.
async fn run_create_hooks(prepared: &Prepared, pid: u32) -> Result<()> {
    let Some(all) = prepared.spec.hooks() else {
        return Ok(());
    };
    let state = hook_state(
        &prepared.id,
        "creating",
        pid,
        &prepared.bundle,
        &prepared.spec,
    );
    #[allow(deprecated)] // Docker still uses them.
    let prestart = all.prestart();
    let kinds = [
        ("prestart", prestart),
        ("createRuntime", all.create_runtime()),
        ("createContainer", all.create_container()),
    ];
    for (kind, hooks) in kinds {
        hooks::run(kind, hooks.as_deref().unwrap_or_default(), &state).await?;
    }
    Ok(())
}

fn hook_state(
    id: &ContainerId,
    status: &'static str,
    pid: u32,
    bundle: &std::path::Path,
    spec: &BundleSpec,
) -> HookState {
    HookState::new(id, status, pid, bundle, spec.annotations())
}

/// Lets a created container run, with the network that it was given since its creation: Docker and
/// `ctr run --cni` wire it in between.
pub(crate) async fn start(
    guest: Arc<Guest>,
    prepared: Arc<Prepared>,
    network: NetworkHandle,
) -> Result<()> {
    network.settle().await?;
    guest.start(&prepared.id).await?;
    let hooks = prepared
        .spec
        .hooks()
        .and_then(|hooks| hooks.poststart().clone())
        .unwrap_or_default();
    run_late_hooks(
        "poststart",
        hooks,
        "running",
        guest.vmm.process.pid,
        &prepared,
    )
    .await;
    Ok(())
}

/// The OCI spec has a runtime log failures of these hooks and go on ("Lifecycle", steps 9 and 12).
async fn run_late_hooks(
    kind: &'static str,
    hooks: Vec<Hook>,
    status: &'static str,
    pid: u32,
    prepared: &Prepared,
) {
    if hooks.is_empty() {
        return;
    }
    let state = hook_state(&prepared.id, status, pid, &prepared.bundle, &prepared.spec);
    if let Err(error) = hooks::run(kind, &hooks, &state).await {
        tracing::warn!(%error, "hook failed");
    }
}

/// An exec that was added and waits for its start.
pub(crate) struct AddedExec {
    pub process: Process,
    pub stdio: Stdio,
}

impl AddedExec {
    /// Checks an exec's process and streams.
    pub fn new(process: &[u8], paths: &crate::sandbox::StdioPaths) -> Result<Self> {
        let process = parse_process(process, paths.terminal)?;
        Ok(Self {
            process,
            stdio: Stdio::parse(paths)?,
        })
    }
}

/// Starts an exec; the number is its pid in the guest.
pub(crate) async fn start_exec(
    guest: Arc<Guest>,
    id: ProcessId,
    exec: Arc<AddedExec>,
    namespace: Namespace,
) -> Result<(Copies, u32)> {
    let process_json = serde_json::to_vec(&exec.process).map_err(|error| {
        Error::Invalid(format!("the exec's process cannot be written: {error}"))
    })?;
    let ends = exec.stdio.open(id.container.as_str(), &namespace).await?;
    let (tokens, copies) = ends.connect(&guest).await?;
    let (rows, columns) = terminal_size(&exec.process);
    let request = agent::ExecRequest {
        container_id: id.container.to_string(),
        exec_id: id
            .exec
            .as_ref()
            .map(ToString::to_string)
            .unwrap_or_default(),
        process_json,
        streams: streams(tokens),
        terminal_rows: rows,
        terminal_columns: columns,
        ..Default::default()
    };
    match guest.exec(&request).await {
        Ok(guest_pid) => Ok((copies, guest_pid)),
        Err(cause) => {
            forget(&guest, &id, &cause).await;
            Err(Error::Runtime {
                verb: "exec",
                cause: Arc::new(cause),
            })
        }
    }
}

/// Sends a signal; an ended process is an error that says so. A guest that doesn't even answer to
/// SIGKILL for an init is ended as a whole.
pub(crate) async fn signal(
    guest: Arc<Guest>,
    process: ProcessId,
    signal: u32,
    all: bool,
) -> Result<()> {
    match guest.signal(&process, signal, all).await {
        Ok(()) => Ok(()),
        Err(
            AgentError::Refused {
                kind: Kind::NotFound,
                ..
            }
            | AgentError::VmEnded { .. },
        ) => Err(Error::AlreadyFinished),
        Err(error @ AgentError::TimedOut { .. })
            if signal == libc::SIGKILL as u32 && process.exec.is_none() =>
        {
            tracing::error!(%error, "the guest does not answer to SIGKILL; killing the VM");
            guest.vmm.kill();
            Ok(())
        }
        Err(error) => Err(error.into()),
    }
}

/// Takes an ended process away: its streams drained, forgotten by the agent.
pub(crate) async fn delete(
    guest: Option<Arc<Guest>>,
    id: ProcessId,
    copies: Option<Copies>,
) -> Result<()> {
    if let Some(copies) = copies {
        copies.drain().await;
    }
    let Some(guest) = guest else { return Ok(()) };
    match guest.delete(&id).await {
        Ok(())
        | Err(
            AgentError::Refused {
                kind: Kind::NotFound,
                ..
            }
            | AgentError::VmEnded { .. },
        ) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Takes away what a deleted container had on the host.
pub(crate) async fn remove_container(
    guest: Option<Arc<Guest>>,
    prepared: Arc<Prepared>,
    disks: Attached,
    pid: u32,
) -> Result<()> {
    let folder = Arc::new(prepared.plan.folder.clone());
    disks.remove(guest.as_deref(), &folder).await;
    let (folder, id, bundle) = (
        prepared.plan.folder.clone(),
        prepared.id.clone(),
        prepared.bundle.clone(),
    );
    let upper = prepared.upper.clone();
    blocking(move || {
        folder.remove_container(&id)?;
        prepare::unmount_rootfs(&bundle)?;
        let Some(upper) = upper else { return Ok(()) };
        if let Err(error) = mark_opaque(&upper) {
            tracing::warn!(%error, folder = %upper.display(), "committing the container may bring back what it has removed");
        }
        Ok(())
    })
    .await?;
    let hooks = prepared
        .spec
        .hooks()
        .and_then(|hooks| hooks.poststop().clone())
        .unwrap_or_default();
    run_late_hooks("poststop", hooks, "stopped", pid, &prepared).await;
    Ok(())
}

/// Ends the VM, by the guest's own shutdown or at once, and removes the sandbox's folder.
pub(crate) async fn stop_vm(
    guest: Option<Arc<Guest>>,
    network: PodNetwork,
    folder: RuntimeFolder,
    at_once: bool,
) -> Result<()> {
    if let Some(guest) = guest {
        if at_once {
            guest.vmm.kill();
            guest.vmm.wait().await;
        } else {
            guest.shut_down().await;
        }
    }
    network.ended().await;
    blocking(move || Ok(folder.remove()?)).await
}

/// The bundle's own failures of a create, undone.
pub(crate) async fn undo_prepare(bundle: PathBuf) {
    let undone = blocking(move || {
        prepare::undo(&bundle);
        Ok(())
    });
    if let Err(error) = undone.await {
        tracing::error!(%error, "undoing a failed create failed");
    }
}
