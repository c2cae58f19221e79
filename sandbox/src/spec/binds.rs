//! Bind mounts: a host file or folder reaches the guest through the share.

use super::{SpecError, field, guest_bind, unsupported};
use crate::ids::ContainerId;
use oci_spec::runtime::Spec;
use std::os::unix::fs::FileTypeExt;
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
    /// Its number, which is its name below the container's `mounts` folder.
    pub number: usize,
    /// On the host.
    pub source: PathBuf,
    /// A folder or a file.
    pub is_dir: bool,
    /// The guest may not write to it.
    pub readonly: bool,
    /// With the mounts below it.
    pub recursive: bool,
}

/// Re-sources `spec`'s bind mounts to the share and returns what has to be bound there.
pub(super) fn translate(
    spec: &mut Spec,
    id: &ContainerId,
    bundle: &Path,
) -> Result<Vec<Bind>, SpecError> {
    let mut binds = Vec::new();
    let Some(mounts) = spec.mounts_mut() else {
        return Ok(binds);
    };
    for (n, mount) in mounts.iter_mut().enumerate() {
        let options = mount.options().clone().unwrap_or_default();
        let has = |name: &str| options.iter().any(|option| option == name);
        let is_bind = mount.typ().as_deref() == Some("bind") || has("bind") || has("rbind");
        if !is_bind {
            continue;
        }
        let at = format!("mounts[{n}].source");
        let source = match mount.source() {
            Some(source) if !source.as_os_str().is_empty() => bundle.join(source),
            _ => return Err(field(at, "is missing; a bind mount needs one")),
        };
        let Some(is_dir) = shared_kind(&source, &at)? else {
            continue;
        };
        let number = binds.len();
        binds.push(Bind {
            number,
            source,
            is_dir,
            readonly: has("ro") || has("rro"),
            recursive: has("rbind"),
        });
        mount.set_source(Some(guest_bind(id, number)));
    }
    Ok(binds)
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
