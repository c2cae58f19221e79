//! How much a FUSE client holds that only its own server knows.

use fuse_backend_rs::api::filesystem::ROOT_ID;
use std::sync::atomic::{AtomicU64, Ordering};

/// Counts what a client was given and has not given back. A client that forgets what it was never
/// given makes these numbers too small, and deceives only itself.
#[derive(Debug, Default)]
pub struct Held {
    /// Lookups of all files but the root.
    entries: AtomicU64,
    /// Open files and folders.
    handles: AtomicU64,
}

impl Held {
    /// Entries besides the root, and open handles.
    pub fn counts(&self) -> (u64, u64) {
        (
            self.entries.load(Ordering::Relaxed),
            self.handles.load(Ordering::Relaxed),
        )
    }

    /// An entry goes to the client.
    pub fn given(&self) {
        self.entries.fetch_add(1, Ordering::Relaxed);
    }

    /// The client has forgotten `count` entries of the file `inode`.
    pub fn forgotten(&self, inode: u64, count: u64) {
        if inode != ROOT_ID {
            subtract(&self.entries, count);
        }
    }

    /// A file or folder was opened, for which the server may have given no handle.
    pub fn opened(&self, handle: Option<u64>) {
        if handle.is_some() {
            self.handles.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// A handle was released.
    pub fn closed(&self) {
        subtract(&self.handles, 1);
    }

    /// The client is gone.
    pub fn nothing(&self) {
        self.entries.store(0, Ordering::Relaxed);
        self.handles.store(0, Ordering::Relaxed);
    }
}

fn subtract(counter: &AtomicU64, count: u64) {
    // Fails never: the closure always gives a value.
    let _ = counter.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |value| {
        Some(value.saturating_sub(count))
    });
}
