//! virtio-fs (virtio 1.3 §5.11): a folder of the host's as a FUSE file system.
//!
//! The server is fuse-backend-rs' passthrough file system. What it takes from the guest on trust is
//! checked by [`guard`] in between, which also says what exactly. The device has an event loop of
//! its own, since file operations may block.
//!
//! Mounts that appear below the folder later are served like folders. Each file has a number of
//! its own (the FUSE node id, reported as st_ino as well), whichever host file system it is on.

#[cfg(test)]
mod attack_tests;
mod checks;
mod device;
mod guard;
mod held;
#[cfg(test)]
mod suspend_tests;
mod sync;
#[cfg(test)]
mod tests;
mod volumes;
mod xattrs;

pub use device::{FsDevice, FsError};

use caps::Capability;

/// What the server's thread needs besides being user 0, so that it can act for the guest's users:
/// it creates files as the user that the guest names (set*id), and does all else as itself. In
/// either case it keeps these capabilities, since the guest's kernel has checked the permission
/// ([`crate::privileges::keep_across_users`]).
///
/// CAP_DAC_READ_SEARCH is for hard links only (linkat(2) with AT_EMPTY_PATH). It would also open
/// any file of the host's file system by its handle: the thread's seccomp filter must not allow
/// open_by_handle_at(2). CAP_MKNOD is not among them, as the guard refuses device nodes.
pub const CAPABILITIES: &[Capability] = &[
    Capability::CAP_CHOWN,
    Capability::CAP_DAC_OVERRIDE,
    Capability::CAP_DAC_READ_SEARCH,
    Capability::CAP_FOWNER,
    Capability::CAP_FSETID,
    Capability::CAP_SETFCAP,
    Capability::CAP_SETGID,
    Capability::CAP_SETUID,
];
