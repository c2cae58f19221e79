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
    /// What a change of the user does to capabilities.
    #[error("keeping capabilities across changes of the user: {0}")]
    SecureBits(#[source] std::io::Error),
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
        keep_across_users().map_err(PrivilegeError::SecureBits)?;
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

/// Has the calling thread, and those that it makes, keep its capabilities when it acts as another
/// user for a moment. Needs CAP_SETPCAP.
///
/// The file server creates a file as the guest's user. Whether that one may, only the guest's
/// kernel knows, which has checked it: a FUSE request names the user's first group, and none of the
/// others, by which it may be allowed.
///
/// # Errors
/// When the kernel refuses.
pub fn keep_across_users() -> std::io::Result<()> {
    /// SECBIT_NO_SETUID_FIXUP of linux/securebits.h (capabilities(7), "The securebits flags").
    const NO_SETUID_FIXUP: libc::c_ulong = 1 << 2;
    // SAFETY: takes no pointers.
    match unsafe { libc::prctl(libc::PR_SET_SECUREBITS, NO_SETUID_FIXUP, 0, 0, 0) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}
