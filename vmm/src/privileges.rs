//! What this process gives up before a guest runs.

use caps::{CapSet, Capability, CapsHashSet};
use thiserror::Error;

use crate::virtio::fs;

/// A privilege could not be given up.
#[derive(Debug, Error)]
pub enum PrivilegeError {
    /// Capabilities.
    #[error("dropping capabilities: {0}")]
    Capabilities(#[from] caps::errors::CapsError),
    /// no_new_privs.
    #[error("setting no_new_privs: {0}")]
    NoNewPrivileges(#[source] nix::Error),
    /// Groups of the user that started this process.
    #[error("leaving supplementary groups: {0}")]
    Groups(#[source] nix::Error),
    /// Core dumps would hold guest memory.
    #[error("forbidding core dumps: {0}")]
    CoreDumps(#[source] nix::Error),
}

/// Drops every capability but [`fs::CAPABILITIES`] (none at all without a share), forbids gaining any
/// by executing something, leaves all supplementary groups, and forbids core dumps. Sets the umask to 0, since the guest has its
/// own.
///
/// # Errors
/// The first step that failed; the VM must not run then.
pub fn drop_all_but(share: bool) -> Result<(), PrivilegeError> {
    nix::sys::prctl::set_no_new_privs().map_err(PrivilegeError::NoNewPrivileges)?;
    nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_CORE, 0, 0)
        .map_err(PrivilegeError::CoreDumps)?;
    if caps::has_cap(None, CapSet::Effective, Capability::CAP_SETGID)? {
        nix::unistd::setgroups(&[]).map_err(PrivilegeError::Groups)?;
    }
    nix::sys::stat::umask(nix::sys::stat::Mode::empty());

    let held = caps::read(None, CapSet::Permitted)?;
    let keep: CapsHashSet = if share {
        fs::CAPABILITIES
            .iter()
            .copied()
            .filter(|capability| held.contains(capability))
            .collect()
    } else {
        CapsHashSet::new()
    };
    if caps::has_cap(None, CapSet::Effective, Capability::CAP_SETPCAP)? {
        for capability in caps::read(None, CapSet::Bounding)? {
            if !keep.contains(&capability) {
                caps::drop(None, CapSet::Bounding, capability)?;
            }
        }
    }
    caps::clear(None, CapSet::Ambient)?;
    caps::clear(None, CapSet::Inheritable)?;
    caps::set(None, CapSet::Effective, &keep)?;
    caps::set(None, CapSet::Permitted, &keep)?;
    Ok(())
}
