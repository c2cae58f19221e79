//! What the folders have in common in which things are kept that later starts can use: the
//! templates ([`crate::template`]) and the converted layers of images ([`crate::layers`]). Both are
//! named by a digest of what they were made from, made by one process at a time, and root's alone.

mod failure;
mod key;
mod lock;

pub(crate) use failure::{note_failure, recent_failure};
pub use key::Key;
pub(crate) use key::hex;
pub(crate) use lock::PathLock;

use serde::Deserialize;
use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, ErrorKind, Read};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

/// Longest description or note that is read.
const MAX_TEXT: u64 = 256 * 1024;

/// What [`look_at`] found at a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Folder {
    /// Nothing.
    Missing,
    /// A folder that only this user can write to.
    Private,
    /// Something else, and why it can't be used.
    Unfit(&'static str),
}

/// Whether `path` is a folder of this user's alone: whoever can write there decides what the
/// virtual machines to come are made of.
///
/// # Errors
/// When that can't be seen.
pub(crate) fn look_at(path: &Path) -> io::Result<Folder> {
    let metadata = match fs::symlink_metadata(path) {
        Err(cause) if cause.kind() == ErrorKind::NotFound => return Ok(Folder::Missing),
        found => found?,
    };
    Ok(if !metadata.is_dir() {
        Folder::Unfit("it is not a folder")
    } else if metadata.uid() != nix::unistd::geteuid().as_raw() {
        Folder::Unfit("it belongs to another user")
    } else if metadata.mode() & 0o022 != 0 {
        Folder::Unfit("others may write to it; chmod 0700 it after a look at what is in there")
    } else {
        Folder::Private
    })
}

/// Makes `path` and the folders above it, for this user alone, if there is nothing yet.
///
/// # Errors
/// When it can't be made.
pub(crate) fn make_private(path: &Path) -> io::Result<()> {
    if path.exists() {
        return Ok(());
    }
    DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// Reads a file of such a folder; none if it isn't there or isn't what it should be.
pub(crate) fn read_json<T: for<'a> Deserialize<'a>>(path: &Path) -> Option<T> {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(flags)
        .open(path)
        .ok()?;
    let mut text = Vec::new();
    file.take(MAX_TEXT).read_to_end(&mut text).ok()?;
    serde_json::from_slice(&text)
        .inspect_err(|error| tracing::debug!(%error, path = %path.display(), "unreadable"))
        .ok()
}

/// Seconds since the epoch.
pub(crate) fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}
