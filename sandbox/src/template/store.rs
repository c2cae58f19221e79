//! The folder of templates.
//!
//! ```text
//! <template_dir>/            mode 0700
//!   <key>/                   a finished template; appears by one rename, disappears by one
//!     memory  state          what the VMM saved; read-only
//!     template.json          what it was made from: for people, and for `list`
//!     uses                   one byte for each start, the last one's time as its own
//!   <key>.lock               held by whoever builds, replaces or removes that template
//!   <key>.failed             why the last build failed: for a while nobody tries again
//!   building-<key>/          a build, complete with its VM's sockets and logs
//!   removing-<key>-<random>/ on its way out
//! ```
//!
//! Nothing is synced to the disk: what a power failure has cut short the VMM refuses by its
//! checksums, and it's built again.

use super::TemplateError;
use super::key::Identity;
use super::lock::KeyLock;
use crate::cache::{self, Folder, Key, read_json};
use crate::folder::RuntimeFolder;
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;
use serde::{Deserialize, Serialize};
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Names in a template's folder.
pub(super) const MEMORY: &str = "memory";
pub(super) const STATE: &str = "state";
const DESCRIPTION: &str = "template.json";
const USES: &str = "uses";

/// Prefixes and suffixes of names in the store.
const BUILDING: &str = "building-";
const REMOVING: &str = "removing-";
const LOCK: &str = ".lock";
const FAILED: &str = ".failed";

/// How long a VM that a dead process left behind may take to end.
const KILL_LIMIT: Duration = Duration::from_secs(5);

/// What is kept beside a template.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Description {
    /// What it was made from.
    pub identity: Identity,
    /// When, in seconds since the epoch.
    pub created: u64,
    /// How long the build took, in milliseconds.
    pub build_ms: u64,
}

/// One template of the store, as `list` shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Entry {
    /// Its key.
    pub key: Key,
    /// Bytes that it takes on the disk.
    pub bytes: u64,
    /// How many starts have used it.
    pub uses: u64,
    /// When it was used last, or made if it never was; in seconds since the epoch.
    pub last_used: u64,
    /// What is kept beside it; none if that can't be read.
    pub description: Option<Description>,
}

/// An opened template. It stays usable when it is removed from the store meanwhile.
#[derive(Debug)]
pub(crate) struct Template {
    pub key: Key,
    pub memory: File,
    pub state: File,
    folder: File,
}

impl Template {
    /// Whether `other` is the very same one, not another of the same key.
    fn is(&self, other: &Self) -> bool {
        let inode = |one: &Self| one.folder.metadata().map(|meta| (meta.dev(), meta.ino()));
        matches!((inode(self), inode(other)), (Ok(one), Ok(two)) if one == two)
    }

    /// Counts a start.
    pub fn note_use(&self) {
        let flags = OFlag::O_WRONLY | OFlag::O_APPEND | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
        let noted = openat(&self.folder, USES, flags, Mode::empty())
            .map_err(io::Error::from)
            .and_then(|file| File::from(file).write_all(b"+"));
        if let Err(error) = noted {
            // It may have been removed, or the disk is full; it's only a number.
            tracing::debug!(%error, key = self.key.short(), "the use of a template is not counted");
        }
    }
}

/// The folder of templates.
#[derive(Debug, Clone)]
pub struct Store {
    path: PathBuf,
}

fn fail<'a>(verb: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> TemplateError + 'a {
    move |cause| TemplateError::Io {
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
    pub fn open(path: &Path) -> Result<Self, TemplateError> {
        cache::make_private(path).map_err(fail("make", path))?;
        Self::existing(path)?.ok_or_else(|| fail("open", path)(ErrorKind::NotFound.into()))
    }

    /// Opens the store at `path`; none if there is no such folder.
    ///
    /// # Errors
    /// When it isn't a folder of this user's alone: whoever can write there writes the memory of
    /// every virtual machine to come.
    pub fn existing(path: &Path) -> Result<Option<Self>, TemplateError> {
        match cache::look_at(path).map_err(fail("look at", path))? {
            Folder::Missing => Ok(None),
            Folder::Private => Ok(Some(Self { path: path.into() })),
            Folder::Unfit(problem) => Err(TemplateError::Folder {
                path: path.into(),
                problem,
            }),
        }
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn template_path(&self, key: &Key) -> PathBuf {
        self.path.join(key.as_str())
    }

    /// Opens a template; none if there is none, or only a part of one.
    pub(crate) fn find(&self, key: &Key) -> Result<Option<Template>, TemplateError> {
        let path = self.template_path(key);
        let flags = libc::O_DIRECTORY | libc::O_NOFOLLOW;
        let opened = OpenOptions::new()
            .read(true)
            .custom_flags(flags)
            .open(&path);
        let folder = match opened {
            Err(cause) if cause.kind() == ErrorKind::NotFound => return Ok(None),
            opened => opened.map_err(fail("open", &path))?,
        };
        // By way of the folder's descriptor: both files are of the same template, whatever happens
        // to the path meanwhile.
        let open = |name| -> Result<Option<File>, TemplateError> {
            let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK;
            match openat(&folder, name, flags, Mode::empty()) {
                Ok(file) => {
                    let file = File::from(file);
                    let regular = file.metadata().is_ok_and(|metadata| metadata.is_file());
                    Ok(regular.then_some(file))
                }
                Err(nix::errno::Errno::ENOENT) => Ok(None),
                Err(errno) => Err(fail("open", &path.join(name))(errno.into())),
            }
        };
        let (Some(memory), Some(state)) = (open(MEMORY)?, open(STATE)?) else {
            return Ok(None);
        };
        Ok(Some(Template {
            key: key.clone(),
            memory,
            state,
            folder,
        }))
    }

    /// All templates, the least recently used first.
    ///
    /// # Errors
    /// When the folder can't be read.
    pub fn list(&self) -> Result<Vec<Entry>, TemplateError> {
        let mut entries: Vec<Entry> = self
            .names()?
            .iter()
            .filter_map(|name| Key::parse(name))
            .filter_map(|key| self.entry(key))
            .collect();
        entries.sort_by_key(|entry| entry.last_used);
        Ok(entries)
    }

    fn names(&self) -> Result<Vec<String>, TemplateError> {
        let entries = fs::read_dir(&self.path).map_err(fail("read", &self.path))?;
        let names = entries.flatten().map(|entry| entry.file_name());
        Ok(names.filter_map(|name| name.into_string().ok()).collect())
    }

    /// None if it has just been removed.
    fn entry(&self, key: Key) -> Option<Entry> {
        let path = self.template_path(&key);
        let made = fs::symlink_metadata(&path).ok()?;
        let uses = fs::symlink_metadata(path.join(USES)).ok();
        // st_blocks counts 512 bytes each, whatever the file system's own blocks (stat(2)).
        let blocks = |name| fs::symlink_metadata(path.join(name)).map_or(0, |meta| meta.blocks());
        let blocks = [MEMORY, STATE, DESCRIPTION, USES].map(blocks);
        let last_used = uses.as_ref().map_or(made.mtime(), |uses| uses.mtime());
        Some(Entry {
            description: read_json(&path.join(DESCRIPTION)),
            key,
            bytes: blocks.iter().sum::<u64>().saturating_mul(512),
            uses: uses.map_or(0, |uses| uses.len()),
            last_used: u64::try_from(last_used).unwrap_or(0),
        })
    }

    pub(super) fn lock_path(&self, key: &Key) -> PathBuf {
        self.path.join(format!("{key}{LOCK}"))
    }

    /// Makes the folder in which the template of `lock`'s key is built, in place of what an earlier
    /// build may have left there.
    pub(super) fn begin_build(&self, lock: &KeyLock) -> Result<Build, TemplateError> {
        let path = self.path.join(format!("{BUILDING}{}", lock.key));
        remove_build(&path).map_err(fail("remove", &path))?;
        DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .map_err(fail("make", &path))?;
        Ok(Build {
            path,
            published: false,
        })
    }

    /// Puts a finished build in its template's place.
    pub(super) fn publish(
        &self,
        lock: &KeyLock,
        mut build: Build,
        description: &Description,
    ) -> Result<Template, TemplateError> {
        let text = serde_json::to_vec_pretty(description)
            .map_err(|error| fail("write", &build.path)(error.into()))?;
        for (name, content) in [(DESCRIPTION, &text[..]), (USES, b"")] {
            let path = build.path.join(name);
            fs::write(&path, content).map_err(fail("write", &path))?;
        }
        let run = build.folder();
        fs::remove_dir_all(run.path()).map_err(fail("remove", run.path()))?;
        self.remove_locked(lock)?;
        let target = self.template_path(&lock.key);
        fs::rename(&build.path, &target).map_err(fail("rename the finished build to", &target))?;
        build.published = true;
        self.find(&lock.key)?
            .ok_or_else(|| fail("open", &target)(ErrorKind::NotFound.into()))
    }

    /// Removes a template. VMs that run from it don't notice: they have its files open.
    ///
    /// # Errors
    /// When it can't be removed.
    pub(super) fn remove_locked(&self, lock: &KeyLock) -> Result<bool, TemplateError> {
        let path = self.template_path(&lock.key);
        let random = super::identify::random::<8>().map_err(fail("draw a name beside", &path))?;
        let name = format!("{REMOVING}{}-{:016x}", lock.key, u64::from_le_bytes(random));
        let aside = self.path.join(name);
        match fs::rename(&path, &aside) {
            Err(cause) if cause.kind() == ErrorKind::NotFound => return Ok(false),
            renamed => renamed.map_err(fail("rename", &path))?,
        }
        fs::remove_dir_all(&aside).map_err(fail("remove", &aside))?;
        Ok(true)
    }

    /// Removes `template`, unless another has taken its place.
    pub(super) fn remove_if_same(
        &self,
        lock: &KeyLock,
        template: &Template,
    ) -> Result<(), TemplateError> {
        if self
            .find(&lock.key)?
            .is_some_and(|found| found.is(template))
        {
            self.remove_locked(lock)?;
        }
        Ok(())
    }

    /// Removes a template and what is noted of its failures.
    ///
    /// # Errors
    /// When it can't be removed, or is being built at this moment.
    pub fn remove(&self, key: &Key) -> Result<bool, TemplateError> {
        let lock = KeyLock::try_take(self, key)?.ok_or(TemplateError::InUse)?;
        self.forget_failure(&lock);
        let removed = self.remove_locked(&lock)?;
        lock.forget(self);
        Ok(removed)
    }

    /// Removes the least recently used templates but `keep` until all together take at most
    /// `limit` bytes. Those that are locked stay.
    pub(super) fn enforce_limit(&self, limit: u64, keep: &Key) -> Result<(), TemplateError> {
        let entries = self.list()?;
        let mut bytes: u64 = entries.iter().map(|entry| entry.bytes).sum();
        for entry in entries.iter().filter(|entry| entry.key != *keep) {
            if bytes <= limit {
                break;
            }
            match self.remove(&entry.key) {
                Ok(_) => {
                    bytes = bytes.saturating_sub(entry.bytes);
                    tracing::info!(
                        key = entry.key.short(),
                        "removed the template: limit reached"
                    );
                }
                Err(error) => tracing::warn!(%error, key = entry.key.short(), "template stays"),
            }
        }
        Ok(())
    }

    /// Removes what builds and removals that were cut short have left.
    ///
    /// # Errors
    /// When something can't be removed.
    pub fn sweep(&self) -> Result<(), TemplateError> {
        for name in self.names()? {
            let path = self.path.join(&name);
            if name.starts_with(REMOVING) {
                // Whoever else removes it may be faster.
                let _ = fs::remove_dir_all(&path);
                continue;
            }
            let key = name
                .strip_prefix(BUILDING)
                .or_else(|| name.strip_suffix(LOCK))
                .and_then(Key::parse);
            let Some(key) = key else { continue };
            // Held by a build that goes on, this one's included.
            let Some(lock) = KeyLock::try_take(self, &key)? else {
                continue;
            };
            if name.starts_with(BUILDING) {
                tracing::info!(key = key.short(), "removing what an ended build left");
                remove_build(&path).map_err(fail("remove", &path))?;
            }
            lock.forget(self);
        }
        Ok(())
    }

    fn failure_path(&self, lock: &KeyLock) -> PathBuf {
        self.path.join(format!("{}{FAILED}", lock.key))
    }

    /// Why a build of this key failed a short while ago.
    pub(super) fn recent_failure(&self, lock: &KeyLock) -> Option<String> {
        cache::recent_failure(&self.failure_path(lock))
    }

    pub(super) fn note_failure(&self, lock: &KeyLock, reason: &str) {
        cache::note_failure(&self.failure_path(lock), reason);
    }

    pub(super) fn forget_failure(&self, lock: &KeyLock) {
        let _ = fs::remove_file(self.failure_path(lock));
    }
}

/// A build's folder; removed unless published.
#[derive(Debug)]
pub(super) struct Build {
    path: PathBuf,
    published: bool,
}

impl Build {
    /// Where the builder VM's sockets and logs are.
    pub fn folder(&self) -> RuntimeFolder {
        run_folder(&self.path)
    }

    /// Makes one of the files that the VMM fills.
    pub fn create(&self, name: &str) -> Result<File, TemplateError> {
        let path = self.path.join(name);
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(true).mode(0o400);
        options.open(&path).map_err(fail("make", &path))
    }
}

impl Drop for Build {
    fn drop(&mut self) {
        if self.published {
            return;
        }
        if let Err(error) = remove_build(&self.path) {
            tracing::error!(%error, path = %self.path.display(), "a failed build left something");
        }
    }
}

fn run_folder(build: &Path) -> RuntimeFolder {
    RuntimeFolder::at(build.join("run"))
}

/// Ends the VM of a build whose process is gone, and removes the folder. Idempotent.
fn remove_build(path: &Path) -> io::Result<()> {
    let state = run_folder(path).read_state().ok().flatten();
    if let Some(vmm) = state.and_then(|state| state.vmm) {
        vmm.kill(KILL_LIMIT)?;
    }
    match fs::remove_dir_all(path) {
        Err(cause) if cause.kind() != ErrorKind::NotFound => Err(cause),
        _ => Ok(()),
    }
}

#[cfg(test)]
#[path = "store_tests.rs"]
mod tests;
