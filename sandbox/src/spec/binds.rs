//! Bind mounts: a host file or folder reaches the guest through the share.

use super::{SpecError, field, guest_bind, guest_volume, unsupported};
use crate::ids::ContainerId;
use crate::mounts::{MemoryVolume, MountError, mounted_below};
use bulkhead_proto::agent::StorageMount;
use bulkhead_proto::vmm::SHARE_UPPER;
use oci_spec::runtime::{LinuxIdMapping, Mount, Spec};
use sha2::{Digest, Sha256};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Devices that every guest has under the same name.
const GUEST_DEVICES: [&str; 6] = [
    "/dev/null",
    "/dev/zero",
    "/dev/full",
    "/dev/random",
    "/dev/urandom",
    "/dev/tty",
];

/// One host file or folder to bind into the share.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bind {
    /// Its number among the container's.
    pub number: usize,
    /// On the host.
    pub source: PathBuf,
    /// A folder or a file.
    pub is_dir: bool,
    /// The guest may not write to it.
    pub readonly: bool,
    /// With the mounts below it.
    pub recursive: bool,
    /// What the host mounts below the source later shows up in the guest.
    pub follows: bool,
    /// Other ids of its files' owners.
    pub ids: Option<MountIds>,
    /// The pod's containers have it in common, under this name; see [`pod_volume`].
    pub volume: Option<String>,
    /// An overlay's upper layer and work folder are in it, and nothing else of it is the guest's.
    pub upper: bool,
}

impl Bind {
    /// Its name below the container's `mounts` folder.
    pub fn name(&self) -> String {
        match self.upper {
            true => format!("{SHARE_UPPER}{}", self.number),
            false => self.number.to_string(),
        }
    }
}

/// From the ids of files to those that they are shown as.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountIds {
    /// Users.
    pub uids: Vec<LinuxIdMapping>,
    /// Groups.
    pub gids: Vec<LinuxIdMapping>,
    /// Also of the mounts below.
    pub recursive: bool,
}

/// Most lines that the kernel takes in a map (user_namespaces(7)).
const MAX_RANGES: usize = 340;

/// What `mount` says of ids; `own` are the maps of the container's user namespace.
fn mount_ids(
    mount: &Mount,
    own: &(Vec<LinuxIdMapping>, Vec<LinuxIdMapping>),
    at: &str,
) -> Result<Option<MountIds>, SpecError> {
    let has = |name: &str| mount.options().iter().flatten().any(|word| word == name);
    let mut uids = mount.uid_mappings().clone().unwrap_or_default();
    let mut gids = mount.gid_mappings().clone().unwrap_or_default();
    if uids.is_empty() && gids.is_empty() {
        if !has("idmap") && !has("ridmap") {
            return Ok(None);
        }
        // OCI runtime spec, config, "Mount options", idmap.
        (uids, gids) = own.clone();
    }
    for (name, ranges) in [("uidMappings", &uids), ("gidMappings", &gids)] {
        let refused = |problem: String| Err(field(format!("{at}.{name}"), problem));
        let ends = |start: u32, size: u32| start.checked_add(size).is_some();
        if ranges.is_empty() {
            return refused("is missing; an id-mapped mount needs both maps".into());
        }
        if ranges.len() > MAX_RANGES {
            return refused(format!("has {} ranges of {MAX_RANGES}", ranges.len()));
        }
        for one in ranges {
            let (container, host, size) = (one.container_id(), one.host_id(), one.size());
            if size == 0 || !ends(container, size) || !ends(host, size) {
                return refused(format!("{container} {host} {size} is not a range of ids"));
            }
        }
    }
    let recursive = has("ridmap");
    Ok(Some(MountIds {
        uids,
        gids,
        recursive,
    }))
}

/// Takes out of `mount` what the host has done.
fn forget_ids(mount: &mut Mount) {
    mount.set_uid_mappings(None);
    mount.set_gid_mappings(None);
    if let Some(options) = mount.options_mut() {
        options.retain(|word| word != "idmap" && word != "ridmap");
    }
}

/// Refuses what would have to show up outside of the VM.
fn check_propagation(mount: &Mount, at: &str) -> Result<(), SpecError> {
    let shared = |word: &&String| *word == "shared" || *word == "rshared";
    let Some(word) = mount.options().iter().flatten().find(shared) else {
        return Ok(());
    };
    let problem = format!(
        "{word:?} (Bidirectional in Kubernetes): what a container mounts is mounted in its virtual \
         machine and cannot show up on the host; use \"rslave\" (HostToContainer) or \"rprivate\" \
         (None)"
    );
    Err(unsupported(at, problem))
}

/// The name of a folder that several containers of a pod may have as a volume: the same one for all
/// that have it in the same way.
///
/// A container that comes later has what the host has mounted below the folder by then, as it would
/// on the host: with other mounts there, it is another volume. With one that follows the host's mounts
/// they show up by themselves.
///
/// The file server tells files apart by the mounts that they are found through, so what two
/// containers have through binds of their own would be two files to the guest: with sockets, FIFOs
/// and locks that don't meet, and memory maps that don't see each other's writes.
fn pod_volume(bind: &Bind) -> Option<String> {
    let found = bind.source.metadata().ok()?;
    let below = match bind.recursive && !bind.follows {
        true => mounted_below(&bind.source).ok()?,
        false => Vec::new(),
    };
    let of = format!(
        "{:?} {} {} {} {} {} {below:?}",
        bind.source,
        found.dev(),
        found.ino(),
        bind.readonly,
        bind.recursive,
        bind.follows
    );
    let digest = Sha256::digest(of);
    Some(digest.iter().take(8).map(|b| format!("{b:02x}")).collect())
}

/// Where the sources of a spec's bind mounts come from.
#[derive(Debug, Default)]
pub(super) struct Sources {
    /// What has to be bound into the share.
    pub binds: Vec<Bind>,
    /// What the guest mounts itself.
    pub storage: Vec<StorageMount>,
}

/// Gives `spec`'s bind mounts their sources in the guest, and returns what has to be there.
pub(super) fn translate(
    spec: &mut Spec,
    id: &ContainerId,
    bundle: &Path,
    in_pod: bool,
) -> Result<Sources, SpecError> {
    let mut sources = Sources::default();
    let own = spec.linux().as_ref().map(|linux| {
        let of = |maps: &Option<Vec<_>>| maps.clone().unwrap_or_default();
        (of(linux.uid_mappings()), of(linux.gid_mappings()))
    });
    let own = own.unwrap_or_default();
    let Some(mounts) = spec.mounts_mut() else {
        return Ok(sources);
    };
    for (n, mount) in mounts.iter_mut().enumerate() {
        let options = mount.options().clone().unwrap_or_default();
        let has = |name: &str| options.iter().any(|option| option == name);
        let is_bind = mount.typ().as_deref() == Some("bind") || has("bind") || has("rbind");
        // With remount nothing is bound; it changes a mount that is there.
        if !is_bind || has("remount") {
            continue;
        }
        check_propagation(mount, &format!("mounts[{n}].options"))?;
        let at = format!("mounts[{n}].source");
        let source = match mount.source() {
            Some(source) if !source.as_os_str().is_empty() => bundle.join(source),
            _ => return Err(field(at, "is missing; a bind mount needs one")),
        };
        let Some(is_dir) = shared_kind(&source, &at)? else {
            continue;
        };
        let ids = mount_ids(mount, &own, &format!("mounts[{n}]"))?;
        forget_ids(mount);
        if is_dir && ids.is_none() {
            let fail = |error: MountError| field(&at, error.to_string());
            if let Some(volume) = MemoryVolume::of(&source).map_err(fail)? {
                sources.storage.push(volume.mount().map_err(fail)?);
                mount.set_source(Some(volume.in_guest()));
                continue;
            }
        }
        let number = sources.binds.len();
        let mut bind = Bind {
            number,
            source,
            is_dir,
            readonly: has("ro") || has("rro"),
            recursive: has("rbind"),
            follows: !has("private") && !has("rprivate"),
            ids,
            volume: None,
            upper: false,
        };
        if in_pod && is_dir && bind.ids.is_none() {
            bind.volume = pod_volume(&bind);
        }
        mount.set_source(Some(match &bind.volume {
            Some(name) => guest_volume(name),
            None => guest_bind(id, &bind),
        }));
        sources.binds.push(bind);
    }
    Ok(sources)
}

/// Whether `source` is a folder (true) or a file (false); none if the guest has it itself.
fn shared_kind(source: &Path, at: &str) -> Result<Option<bool>, SpecError> {
    let kind = source
        .metadata()
        .map_err(|cause| field(at, format!("{}: {cause}", source.display())))?
        .file_type();
    let what = if kind.is_dir() || kind.is_file() {
        return Ok(Some(kind.is_dir()));
    } else if kind.is_char_device() && GUEST_DEVICES.iter().any(|name| Path::new(name) == source) {
        return Ok(None);
    } else if kind.is_socket() {
        "a Unix socket, whose listener on the host cannot be reached from inside a VM"
    } else if kind.is_fifo() {
        "a FIFO, whose other end on the host cannot be reached from inside a VM"
    } else {
        "a device of the host, which a VM has no access to"
    };
    Err(unsupported(
        at,
        format!("{} is {what}; leave this mount out", source.display()),
    ))
}
