//! One process at a time builds, replaces or removes a template.

use super::TemplateError;
use super::store::Store;
use crate::cache::{Key, PathLock};
use std::io;
use std::time::Duration;

/// The right to change one template. Ends with this value, and with the process at the latest.
#[derive(Debug)]
pub(crate) struct KeyLock {
    pub key: Key,
    lock: PathLock,
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
        let path = store.lock_path(key);
        // A thread that nobody waits for any more ends as soon as it gets the lock, which goes with
        // its result.
        let waiting = tokio::task::spawn_blocking(move || PathLock::take(&path));
        match tokio::time::timeout(limit, waiting).await {
            Ok(Ok(taken)) => {
                Self::of(store, key, taken)?.ok_or(TemplateError::StillBuilding { limit })
            }
            Ok(Err(_)) | Err(_) => Err(TemplateError::StillBuilding { limit }),
        }
    }

    /// Takes the lock of `key` if nobody has it.
    pub fn try_take(store: &Store, key: &Key) -> Result<Option<Self>, TemplateError> {
        Self::of(store, key, PathLock::try_take(&store.lock_path(key)))
    }

    fn of(
        store: &Store,
        key: &Key,
        taken: io::Result<Option<PathLock>>,
    ) -> Result<Option<Self>, TemplateError> {
        let taken = taken.map_err(|cause| TemplateError::Io {
            verb: "lock",
            path: store.lock_path(key),
            cause,
        })?;
        let key = key.clone();
        Ok(taken.map(|lock| Self { key, lock }))
    }

    /// Removes the lock's file if there is no template that it would be needed for.
    pub fn forget(self, store: &Store) {
        if !store.template_path(&self.key).exists() {
            self.lock.remove();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::template::key::tests::identity;

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
