//! Everything about a container that can be checked and done without a VM: first all checks, then
//! the root file system's mounts.

use crate::boot::BootPlan;
use crate::disks::volumes::{self, DeviceDisk};
use crate::disks::{Disk, DiskRoot, WritableLimit};
use crate::error::{Error, Result};
use crate::folder::{Locator, RuntimeFolder};
use crate::ids::{ContainerId, Namespace, SandboxId};
use crate::images::Images;
use crate::layers;
use crate::mounts::{MountError, mount_rootfs, unmount_tree};
use crate::pod::{self, PodSandbox, PodSettings, Role};
use crate::sandbox::CreateContainer;
use crate::sizing::{host_memory, machine_size};
use crate::spec::{BundleSpec, GuestSpec};
use crate::stdio::Stdio;
use std::path::{Path, PathBuf};

/// A container that is ready to be set up in a guest.
pub(crate) struct Prepared {
    pub id: ContainerId,
    pub bundle: PathBuf,
    pub role: Role,
    pub spec: BundleSpec,
    pub guest: GuestSpec,
    /// The guest puts the root together itself, and the host mounts nothing for it.
    pub own_root: bool,
    /// What the host mounts is only what lies below the guest's root.
    pub root_below: bool,
    /// The host's folder of an upper layer that the guest writes to.
    pub upper: Option<PathBuf>,
    /// Converted layers among the disks: they stay in their store for as long as the container does.
    #[expect(dead_code, reason = "held, not read")]
    pub layers: Vec<layers::Image>,
    /// What to attach to the VM.
    pub disks: Vec<Disk>,
    /// Those of them that the container has as devices.
    pub devices: Vec<DeviceDisk>,
    pub stdio: Stdio,
    /// Of a pod's sandbox that came by the sandbox API.
    pub pod: Option<PodSandbox>,
    /// How to boot the sandbox's VM if this container is its first.
    pub plan: BootPlan,
}

/// What the sandbox knows when a container is prepared.
pub(crate) struct Context {
    pub sandbox: SandboxId,
    pub namespace: Namespace,
    /// A VM runs or is being booted, so its images and size are settled.
    pub vm_exists: bool,
    pub pod: PodSettings,
}

/// Checks `request` and mounts its root. On failure nothing is left.
pub(crate) fn prepare(request: &CreateContainer, context: &Context) -> Result<Prepared> {
    let prepared = check(request, context)?;
    if prepared.role == Role::PodSandbox {
        // Nothing of the pause image is used.
        Locator::write(&request.bundle, &prepared.plan.folder, &context.sandbox)?;
        return Ok(prepared);
    }
    let mounted = mount(request, &prepared, context);
    if mounted.is_err() {
        undo(&request.bundle);
    }
    mounted.map(|()| prepared)
}

fn check(request: &CreateContainer, context: &Context) -> Result<Prepared> {
    let config = &request.config;
    let spec = match &request.pod {
        None => BundleSpec::load(&request.bundle)?,
        Some(pod) => BundleSpec::of_pod(&request.bundle, &request.id, pod)?,
    };
    let role = pod::role(&spec.annotations());
    let stdio = Stdio::parse(&request.stdio)?;
    let mut guest = match role {
        // Its mounts and namespaces are the host's; no process of it exists.
        Role::PodSandbox => GuestSpec {
            spec: Default::default(),
            binds: Vec::new(),
            storage: Vec::new(),
        },
        _ => spec.for_guest(&request.id, &context.pod)?,
    };
    if let Some(process) = guest.spec.process_mut() {
        process.set_terminal(Some(request.stdio.terminal));
    }
    let size = machine_size(
        config,
        spec.limits(),
        if context.vm_exists {
            u64::MAX
        } else {
            host_memory()?
        },
    );
    let plan = BootPlan {
        sandbox: context.sandbox.clone(),
        config: config.clone(),
        folder: RuntimeFolder::new(&config.runtime_dir, &context.namespace, &context.sandbox),
        size: size?,
        netns: spec.host_netns()?,
        cgroup: spec.host_cgroup(&context.namespace, &context.sandbox)?,
        network: config.network.of_pod(&spec.annotations())?,
        hostname: spec.hostname().map(str::to_owned),
    };
    if !context.vm_exists {
        Images::open(config)?;
    }
    // Last: layers are converted, and a disk is made.
    let limit = WritableLimit::new(config.writable_layer_mib, &spec.annotations())?;
    let (root, layers) = match role {
        Role::PodSandbox => (None, Vec::new()),
        _ => {
            let converted = layers::converted(&request.rootfs, config);
            let (mounts, layers) =
                converted.unwrap_or_else(|| (request.rootfs.clone(), Vec::new()));
            let root = DiskRoot::plan(&mounts, &request.id, limit, &mut guest.binds)?;
            (root, layers)
        }
    };
    let own_root = root.as_ref().is_some_and(|root| !root.over_hosts);
    let root_below = root.as_ref().is_some_and(|root| root.over_hosts);
    let upper = root.as_ref().and_then(|root| root.upper.clone());
    let mut disks = Vec::new();
    if let Some(root) = root {
        if let Some(path) = guest.spec.root_mut() {
            path.set_path(root.path);
        }
        guest.storage.splice(..0, root.storage);
        disks = root.disks;
    }
    let devices = volumes::devices(&guest.spec, &request.id)?;
    let (more, storage) = volumes::mounts(&mut guest.spec, &request.id);
    disks.extend(more);
    guest.storage.extend(storage);
    let (id, bundle) = (request.id.clone(), request.bundle.clone());
    Ok(Prepared {
        id,
        bundle,
        role,
        spec,
        guest,
        own_root,
        root_below,
        upper,
        layers,
        disks,
        devices,
        stdio,
        pod: request.pod.clone(),
        plan,
    })
}

fn mount(request: &CreateContainer, prepared: &Prepared, context: &Context) -> Result<()> {
    Locator::write(&request.bundle, &prepared.plan.folder, &context.sandbox)?;
    if prepared.own_root {
        return Ok(());
    }
    mount_rootfs(&request.rootfs, &rootfs(&request.bundle))?;
    let path = prepared.spec.root_path();
    let missing = |cause| {
        Error::from(MountError::NoRootfs {
            path: path.clone(),
            cause,
        })
    };
    match path.metadata() {
        Ok(metadata) if metadata.is_dir() => Ok(()),
        Ok(_) => Err(missing(std::io::Error::from_raw_os_error(libc::ENOTDIR))),
        Err(cause) => Err(missing(cause)),
    }
}

/// Where containerd expects a task's root to be mounted.
fn rootfs(bundle: &Path) -> PathBuf {
    bundle.join("rootfs")
}

/// Unmounts a container's root. Idempotent.
pub(crate) fn unmount_rootfs(bundle: &Path) -> std::result::Result<(), MountError> {
    unmount_tree(&rootfs(bundle))
}

/// Takes back what [`prepare`] did.
pub(crate) fn undo(bundle: &Path) {
    if let Err(error) = unmount_rootfs(bundle) {
        tracing::error!(%error, "undoing a failed create left a mount");
    }
    Locator::remove(bundle);
}
