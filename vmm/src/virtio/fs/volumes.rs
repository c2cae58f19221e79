//! Which files of the share are volumes: what the host binds below `CONTAINER/mounts` for each
//! container, and may change at any time. All else belongs to the guest, as it made it; but for the
//! folders that hold an overlay's upper layer and work folder. These two are what the host's daemons
//! make mounts of later, by their names: were the upper layer's name that of a link, they would show
//! and change what the link leads to.

use super::guard::Inode;
use bulkhead_proto::guest::SHARE_MOUNTS;
use bulkhead_proto::vmm::SHARE_UPPER;
use fuse_backend_rs::api::filesystem::ROOT_ID;
use std::collections::HashMap;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Where a file is, as far as that matters here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// A container's folder.
    Container,
    /// The folder of its volumes.
    Mounts,
    /// A volume, or in one.
    Volume,
    /// A folder with an overlay's upper layer and work folder.
    Upper,
}

/// Remembers files that the client knows, with their count of lookups: no more of them than the
/// server has open anyway. The server forgets a file with the same message as this does, so what the
/// client can name has its place here.
#[derive(Debug, Default)]
pub struct Volumes(Mutex<HashMap<Inode, (Place, u64)>>);

impl Volumes {
    fn locked(&self) -> MutexGuard<'_, HashMap<Inode, (Place, u64)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes note that the file `inode` was found as `name` in `parent`.
    pub fn given(&self, parent: Inode, name: &[u8], inode: Inode) {
        let mut known = self.locked();
        let place = match known.get(&parent) {
            _ if parent == ROOT_ID => Place::Container,
            Some((Place::Container, _)) if name == SHARE_MOUNTS.as_bytes() => Place::Mounts,
            Some((Place::Mounts, _)) if name.starts_with(SHARE_UPPER.as_bytes()) => Place::Upper,
            Some((Place::Mounts | Place::Volume, _)) => Place::Volume,
            _ => return,
        };
        let (_, count) = known.entry(inode).or_insert((place, 0));
        *count = count.saturating_add(1);
    }

    /// Whether the file is a volume or in one, as far as is known.
    pub fn has(&self, inode: Inode) -> bool {
        matches!(self.locked().get(&inode), Some((Place::Volume, _)))
    }

    /// Refuses to change a folder, or the names in it, that holds an upper layer.
    ///
    /// # Errors
    /// EPERM.
    pub fn may_change(&self, folder: Inode) -> io::Result<()> {
        match self.locked().get(&folder) {
            Some((Place::Upper, _)) => Err(io::Error::from_raw_os_error(libc::EPERM)),
            _ => Ok(()),
        }
    }

    /// The client has forgotten `count` lookups of it.
    pub fn forgotten(&self, inode: Inode, count: u64) {
        let mut known = self.locked();
        if let Some((_, left)) = known.get_mut(&inode) {
            *left = left.saturating_sub(count);
            if *left == 0 {
                known.remove(&inode);
            }
        }
    }

    /// The client is gone.
    pub fn nothing(&self) {
        self.locked().clear();
    }
}
