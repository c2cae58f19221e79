//! One process at a time builds, replaces or removes a template.

use super::TemplateError;
use super::key::Key;
use super::store::Store;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::Duration;

/// The right to change one template. Ends with this value, and with the process at the latest.
#[derive(Debug)]
pub(crate) struct KeyLock {
    pub key: Key,
    _file: Flock<File>,
}

impl KeyLock {
    /// Waits up to `limit` for the lock of `key`.
    pub async fn take(store: &Store, key: &Key, limit: Duration) -> Result<Self, TemplateError> {
        if let Some(lock) = Self::try_take(store, key)? {
            return Ok(lock);
        }
        tracing::info!(
            key = key.short(),
            "another start builds the template; waiting for it"
        );
        let (store, key) = (store.clone(), key.clone());
        // A thread that nobody waits for any more ends as soon as it gets the lock, which goes with
        // its result.
        let waiting =
            tokio::task::spawn_blocking(move || lock(&store, &key, FlockArg::LockExclusive));
        match tokio::time::timeout(limit, waiting).await {
            Ok(Ok(Ok(Some(lock)))) => Ok(lock),
            Ok(Ok(Ok(None)) | Err(_)) | Err(_) => Err(TemplateError::StillBuilding { limit }),
            Ok(Ok(Err(error))) => Err(error),
        }
    }

    /// Takes the lock of `key` if nobody has it.
    pub fn try_take(store: &Store, key: &Key) -> Result<Option<Self>, TemplateError> {
        lock(store, key, FlockArg::LockExclusiveNonblock)
    }

    /// Removes the lock's file if there is no template that it would be needed for.
    pub fn forget(self, store: &Store) {
        if !store.template_path(&self.key).exists() {
            // Whoever waits for it sees that the file he has locked is no longer the one.
            let _ = std::fs::remove_file(store.lock_path(&self.key));
        }
    }
}

fn lock(store: &Store, key: &Key, how: FlockArg) -> Result<Option<KeyLock>, TemplateError> {
    let path = store.lock_path(key);
    let failed = |cause| TemplateError::Io {
        verb: "lock",
        path: path.clone(),
        cause,
    };
    loop {
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(false).mode(0o600);
        let file = options.open(&path).map_err(failed)?;
        let file = match Flock::lock(file, how) {
            Ok(file) => file,
            Err((_, Errno::EWOULDBLOCK)) => return Ok(None),
            Err((_, Errno::EINTR)) => continue,
            Err((_, errno)) => return Err(failed(errno.into())),
        };
        if is_still_at(&file, &path).map_err(failed)? {
            return Ok(Some(KeyLock {
                key: key.clone(),
                _file: file,
            }));
        }
    }
}

/// Whether nobody has removed or replaced the file between its opening and its locking.
fn is_still_at(file: &File, path: &Path) -> io::Result<bool> {
    let held = file.metadata()?;
    match std::fs::symlink_metadata(path) {
        Ok(now) => Ok((now.dev(), now.ino()) == (held.dev(), held.ino())),
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(cause) => Err(cause),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::template::key::tests::identity;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn a_lock_is_one_owners_even_when_its_file_is_removed_again_and_again() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("t")).unwrap();
        let key = identity(128).key();
        let (inside, entries) = (Arc::new(AtomicUsize::new(0)), 200);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..entries {
                        let lock = lock(&store, &key, FlockArg::LockExclusive);
                        let lock = lock.unwrap().unwrap();
                        assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                        std::thread::yield_now();
                        assert_eq!(inside.fetch_sub(1, Ordering::SeqCst), 1);
                        lock.forget(&store);
                    }
                });
            }
        });
        assert!(!store.lock_path(&key).exists());
    }

    #[tokio::test]
    async fn waiting_has_a_bound() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("t")).unwrap();
        let (key, other) = (identity(128).key(), identity(192).key());
        let held = KeyLock::try_take(&store, &key).unwrap().unwrap();
        assert!(KeyLock::try_take(&store, &key).unwrap().is_none());
        assert!(KeyLock::try_take(&store, &other).unwrap().is_some());
        let limit = Duration::from_millis(10);
        let error = KeyLock::take(&store, &key, limit).await.unwrap_err();
        assert!(
            matches!(error, TemplateError::StillBuilding { .. }),
            "{error}"
        );
        drop(held);
        KeyLock::take(&store, &key, Duration::from_secs(60))
            .await
            .unwrap();
    }
}
