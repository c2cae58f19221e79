//! One process at a time makes, replaces or removes an entry.

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How often [`PathLock::take_within`] looks again.
const POLL: Duration = Duration::from_millis(50);

/// A lock that is a file's. Ends with this value, and with the process at the latest.
#[derive(Debug)]
pub(crate) struct PathLock {
    path: PathBuf,
    _file: Flock<File>,
}

impl PathLock {
    /// Waits for the lock at `path`, whose file is made if there is none.
    pub fn take(path: &Path) -> io::Result<Option<Self>> {
        lock(path, FlockArg::LockExclusive)
    }

    /// Takes it if nobody has it.
    pub fn try_take(path: &Path) -> io::Result<Option<Self>> {
        lock(path, FlockArg::LockExclusiveNonblock)
    }

    /// Waits up to `limit`; none when somebody has it for longer.
    pub fn take_within(path: &Path, limit: Duration) -> io::Result<Option<Self>> {
        let end = Instant::now() + limit;
        loop {
            if let Some(lock) = Self::try_take(path)? {
                return Ok(Some(lock));
            }
            if Instant::now() >= end {
                return Ok(None);
            }
            std::thread::sleep(POLL);
        }
    }

    /// Removes the file, too. Whoever waits for it sees that the file he has locked is no longer
    /// the one.
    pub fn remove(self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

fn lock(path: &Path, how: FlockArg) -> io::Result<Option<PathLock>> {
    loop {
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(false).mode(0o600);
        let file = match Flock::lock(options.open(path)?, how) {
            Ok(file) => file,
            Err((_, Errno::EWOULDBLOCK)) => return Ok(None),
            Err((_, Errno::EINTR)) => continue,
            Err((_, errno)) => return Err(errno.into()),
        };
        if is_still_at(&file, path)? {
            let path = path.to_owned();
            return Ok(Some(PathLock { path, _file: file }));
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
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn a_lock_is_one_owners_even_when_its_file_is_removed_again_and_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let (inside, entries) = (Arc::new(AtomicUsize::new(0)), 200);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..entries {
                        let lock = PathLock::take(&path).unwrap().unwrap();
                        assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                        std::thread::yield_now();
                        assert_eq!(inside.fetch_sub(1, Ordering::SeqCst), 1);
                        lock.remove();
                    }
                });
            }
        });
        assert!(!path.exists());
    }

    #[test]
    fn waiting_has_a_bound() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let held = PathLock::take(&path).unwrap();
        let limit = Duration::from_millis(10);
        assert!(PathLock::take_within(&path, limit).unwrap().is_none());
        drop(held);
        assert!(PathLock::take_within(&path, limit).unwrap().is_some());
    }
}
