//! The folder of converted layers.
//!
//! ```text
//! <layer_dir>/         mode 0700
//!   <key>.erofs        a finished image, on the disk to its last byte; appears by one rename. Its
//!                      time of modification is that of its last use; whoever uses it, the VMM
//!                      among them, holds a shared lock of it (flock)
//!   <key>.lock         held by whoever makes that image
//!   <key>.building     what mkfs.erofs is writing, <key>.log what it says
//!   seen/<stamp>       which key a folder with this stamp has
//!   seen/<stamp>.failed  why it couldn't be converted: for a while nobody tries again
//! ```

use super::LayerError;
use super::clock::Moment;
use super::tree::Stamp;
use crate::cache::{self, Folder, Key, PathLock, hex, read_json};
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

const IMAGE: &str = ".erofs";
const LOCK: &str = ".lock";
const BUILDING: &str = ".building";
const LOG: &str = ".log";
const FAILED: &str = ".failed";
const SEEN: &str = "seen";

/// How much older than a note its folder's last change must be, in nanoseconds: more than the
/// granularity of any file system's times.
pub(super) const SETTLED: i128 = 2_000_000_000;

/// What is kept of a folder that was read whole.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Seen {
    key: String,
    /// When it was stamped.
    at: Moment,
}

/// A converted layer that is in use, and stays in the store for as long as this lives.
#[derive(Debug)]
pub struct Image {
    key: Key,
    path: PathBuf,
    _held: Flock<File>,
}

impl Image {
    /// The image's name.
    pub fn key(&self) -> &Key {
        &self.key
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// One image of the store, as `list` shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Entry {
    /// Its key.
    pub key: Key,
    /// Bytes that it takes on the disk.
    pub bytes: u64,
    /// When a container was last created with it, in seconds since the epoch.
    pub last_used: u64,
    /// Whether a container has it.
    pub in_use: bool,
}

/// The folder of converted layers.
#[derive(Debug, Clone)]
pub struct Store {
    path: PathBuf,
}

fn fail<'a>(verb: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> LayerError + 'a {
    move |cause| LayerError::Io {
        verb,
        path: path.into(),
        cause,
    }
}

impl Store {
    /// Opens the store at `path`, which is made if it doesn't exist.
    ///
    /// # Errors
    /// When it can't be made, or others could have put something there.
    pub fn open(path: &Path) -> Result<Self, LayerError> {
        let seen = path.join(SEEN);
        cache::make_private(&seen).map_err(fail("make", &seen))?;
        Self::existing(path)?.ok_or_else(|| fail("open", path)(ErrorKind::NotFound.into()))
    }

    /// Opens the store at `path`; none if there is no such folder.
    ///
    /// # Errors
    /// When it isn't a folder of this user's alone: whoever can write there writes what containers
    /// run.
    pub fn existing(path: &Path) -> Result<Option<Self>, LayerError> {
        match cache::look_at(path).map_err(fail("look at", path))? {
            Folder::Missing => Ok(None),
            Folder::Private => Ok(Some(Self { path: path.into() })),
            Folder::Unfit(problem) => Err(LayerError::Folder {
                path: path.into(),
                problem,
            }),
        }
    }

    fn at(&self, key: &Key, suffix: &str) -> PathBuf {
        self.path.join(format!("{key}{suffix}"))
    }

    fn seen_path(&self, stamp: &Stamp) -> PathBuf {
        self.path.join(SEEN).join(hex(&stamp.digest))
    }

    /// Takes an image into use; none if there is none.
    pub(super) fn find(&self, key: &Key) -> Result<Option<Image>, LayerError> {
        let path = self.at(key, IMAGE);
        let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
        let opened = OpenOptions::new()
            .read(true)
            .custom_flags(flags)
            .open(&path);
        let file = match opened {
            Err(cause) if cause.kind() == ErrorKind::NotFound => return Ok(None),
            opened => opened.map_err(fail("open", &path))?,
        };
        // Whoever removes it, or looks whether it is in use, has it to himself for a moment.
        let held = Flock::lock(file, FlockArg::LockShared)
            .map_err(|(_, errno)| fail("lock", &path)(errno.into()))?;
        let same = || -> io::Result<bool> {
            let (ours, now) = (held.metadata()?, fs::symlink_metadata(&path)?);
            Ok((ours.dev(), ours.ino()) == (now.dev(), now.ino()) && ours.is_file())
        };
        if !same().unwrap_or(false) {
            return Ok(None);
        }
        if let Err(error) = held.set_modified(SystemTime::now()) {
            tracing::debug!(%error, key = key.short(), "the use of a layer is not noted");
        }
        Ok(Some(Image {
            key: key.clone(),
            path,
            _held: held,
        }))
    }

    /// The key of a folder with this stamp, if it was read whole before.
    ///
    /// Why that key can't be another content's: the stamp has the ctime of every file, which the
    /// host's kernel sets from its clock at each change, and all of them lie two seconds or more
    /// before the moment that is noted. A change since then has a later ctime, so the stamp would be
    /// another, unless the clock has been set back in the meantime; then the note isn't used, nor
    /// after a boot, before which nobody knows what was done to the disk. What is written past the
    /// file system, to its block device, nobody can see; what was mapped for writing before the
    /// folder was read gets its ctime late, but nothing that makes layers leaves one mapped.
    pub(super) fn seen(&self, stamp: &Stamp, now: &Moment) -> Option<Key> {
        let seen: Seen = read_json(&self.seen_path(stamp))?;
        let settled = seen.at.nanoseconds().checked_sub(stamp.changed)? >= SETTLED;
        (settled && now.follows(&seen.at))
            .then(|| Key::parse(&seen.key))
            .flatten()
    }

    pub(super) fn note_seen(&self, stamp: &Stamp, at: Moment, key: &Key) {
        let key = key.to_string();
        let path = self.seen_path(stamp);
        let draft = path.with_extension(format!("new{}", std::process::id()));
        let written = serde_json::to_vec(&Seen { key, at })
            .map_err(io::Error::from)
            .and_then(|text| fs::write(&draft, text))
            .and_then(|()| fs::rename(&draft, &path));
        if let Err(error) = written {
            tracing::debug!(%error, "the next start reads the layer again");
            let _ = fs::remove_file(draft);
        }
    }

    /// Why a folder with this stamp couldn't be converted a short while ago.
    pub(super) fn recent_failure(&self, stamp: &Stamp) -> Option<String> {
        cache::recent_failure(&self.seen_path(stamp).with_extension(&FAILED[1..]))
    }

    pub(super) fn note_failure(&self, stamp: &Stamp, reason: &str) {
        cache::note_failure(&self.seen_path(stamp).with_extension(&FAILED[1..]), reason);
    }

    /// Waits until nobody else makes the image of `key`.
    pub(super) fn lock(
        &self,
        key: &Key,
        limit: std::time::Duration,
    ) -> Result<PathLock, LayerError> {
        let path = self.at(key, LOCK);
        PathLock::take_within(&path, limit)
            .map_err(fail("lock", &path))?
            .ok_or(LayerError::StillBuilding { limit })
    }

    /// Where the image of `key` is made, and what is said of that: by whoever has its lock.
    pub(super) fn build(&self, key: &Key) -> Build<'_> {
        let build = Build {
            store: self,
            key: key.clone(),
            image: self.at(key, BUILDING),
            log: self.at(key, LOG),
        };
        // What a process that was killed has left.
        build.clear();
        build
    }

    /// All images, the least recently used first.
    ///
    /// # Errors
    /// When the folder can't be read.
    pub fn list(&self) -> Result<Vec<Entry>, LayerError> {
        let mut entries: Vec<Entry> = self
            .keys(IMAGE)?
            .into_iter()
            .filter_map(|key| self.entry(key))
            .collect();
        entries.sort_by_key(|entry| entry.last_used);
        Ok(entries)
    }

    fn keys(&self, suffix: &str) -> Result<Vec<Key>, LayerError> {
        let entries = fs::read_dir(&self.path).map_err(fail("read", &self.path))?;
        let names = entries.flatten().map(|entry| entry.file_name());
        let key = |name: std::ffi::OsString| Key::parse(name.to_str()?.strip_suffix(suffix)?);
        Ok(names.filter_map(key).collect())
    }

    fn entry(&self, key: Key) -> Option<Entry> {
        let path = self.at(&key, IMAGE);
        let found = fs::symlink_metadata(&path).ok()?;
        let file = File::open(&path).ok()?;
        let in_use = Flock::lock(file, FlockArg::LockExclusiveNonblock).is_err();
        Some(Entry {
            key,
            // st_blocks counts 512 bytes each, whatever the file system's own blocks (stat(2)).
            bytes: found.blocks().saturating_mul(512),
            last_used: u64::try_from(found.mtime()).unwrap_or(0),
            in_use,
        })
    }

    /// Removes an image that no container has; false if there is none.
    ///
    /// # Errors
    /// When it is in use, or can't be removed.
    pub fn remove(&self, key: &Key) -> Result<bool, LayerError> {
        let path = self.at(key, IMAGE);
        let file = match File::open(&path) {
            Err(cause) if cause.kind() == ErrorKind::NotFound => return Ok(false),
            opened => opened.map_err(fail("open", &path))?,
        };
        let Ok(_alone) = Flock::lock(file, FlockArg::LockExclusiveNonblock) else {
            return Err(LayerError::InUse);
        };
        fs::remove_file(&path).map_err(fail("remove", &path))?;
        Ok(true)
    }

    /// Removes the least recently used images that no container has until all together take at most
    /// `limit` bytes.
    pub(super) fn enforce_limit(&self, limit: u64) -> Result<(), LayerError> {
        let entries = self.list()?;
        let mut bytes: u64 = entries.iter().map(|entry| entry.bytes).sum();
        for entry in entries.iter().filter(|entry| !entry.in_use) {
            if bytes <= limit {
                break;
            }
            match self.remove(&entry.key) {
                Ok(_) => {
                    bytes = bytes.saturating_sub(entry.bytes);
                    tracing::info!(key = entry.key.short(), "removed a layer: limit reached");
                }
                Err(error) => tracing::warn!(%error, key = entry.key.short(), "a layer stays"),
            }
        }
        if bytes > limit {
            tracing::warn!(
                bytes,
                limit,
                "the layers in use take more than `layer_limit_mib`"
            );
        }
        Ok(())
    }

    /// Removes what conversions that were cut short have left, and notes of what is no longer there.
    ///
    /// # Errors
    /// When the folder can't be read.
    pub fn sweep(&self) -> Result<(), LayerError> {
        for key in self.keys(LOCK)? {
            // Held by a conversion that goes on.
            let Ok(Some(lock)) = PathLock::try_take(&self.at(&key, LOCK)) else {
                continue;
            };
            self.build(&key);
            lock.remove();
        }
        let seen = self.path.join(SEEN);
        for entry in fs::read_dir(&seen).map_err(fail("read", &seen))?.flatten() {
            let path = entry.path();
            let of = read_json(&path).and_then(|seen: Seen| Key::parse(&seen.key));
            let useful = match of {
                Some(key) => self.at(&key, IMAGE).exists(),
                None => cache::recent_failure(&path).is_some(),
            };
            if !useful {
                let _ = fs::remove_file(&path);
            }
        }
        Ok(())
    }
}

/// An image in the making; what there is of it goes with this value, unless it was published.
#[derive(Debug)]
pub(super) struct Build<'a> {
    store: &'a Store,
    key: Key,
    pub image: PathBuf,
    pub log: PathBuf,
}

impl Build<'_> {
    /// Puts the finished image into its place. Its bytes are on the disk first: nobody looks at
    /// them again, so a power failure must not leave the name without them.
    pub fn publish(&self) -> Result<Image, LayerError> {
        let image = File::open(&self.image).map_err(fail("open", &self.image))?;
        image.sync_all().map_err(fail("write", &self.image))?;
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o400);
        image
            .set_permissions(mode)
            .map_err(fail("protect", &self.image))?;
        let target = self.store.at(&self.key, IMAGE);
        fs::rename(&self.image, &target).map_err(fail("rename a finished image to", &target))?;
        let folder = &self.store.path;
        File::open(folder)
            .and_then(|folder| folder.sync_all())
            .map_err(fail("write", folder))?;
        self.store
            .find(&self.key)?
            .ok_or_else(|| fail("open", &target)(ErrorKind::NotFound.into()))
    }

    fn clear(&self) {
        for path in [&self.image, &self.log] {
            match fs::remove_file(path) {
                Err(error) if error.kind() != ErrorKind::NotFound => {
                    tracing::error!(%error, path = %path.display(), "a conversion left something");
                }
                _ => {}
            }
        }
    }
}

impl Drop for Build<'_> {
    fn drop(&mut self) {
        self.clear();
    }
}
