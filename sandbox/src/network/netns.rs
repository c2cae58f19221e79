//! The pod's network namespace on the host: the one that its VMM lives in.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

/// A network namespace, held open: it stays as long as this does.
#[derive(Debug, Clone)]
pub(crate) struct Netns {
    file: Arc<File>,
}

impl Netns {
    /// The one at `path`.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = Arc::new(File::open(path)?);
        Ok(Self { file })
    }

    /// Runs `work` in it, off the runtime's thread.
    pub async fn later<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> io::Result<T> {
        let netns = self.clone();
        tokio::task::spawn_blocking(move || netns.inside(work))
            .await
            .unwrap_or_else(|error| Err(io::Error::other(error)))
    }

    /// Runs `work` in it, on a thread of its own. Sockets that are opened there stay there.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> io::Result<T> {
        let netns = &*self.file;
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().name("netns".into());
            let thread = thread.spawn_scoped(scope, move || {
                nix::sched::setns(netns, nix::sched::CloneFlags::CLONE_NEWNET)?;
                Ok(work())
            })?;
            let panicked = |_| Err(io::Error::other("the thread in the namespace has panicked"));
            thread.join().unwrap_or_else(panicked)
        })
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Whether `path` is the network namespace of this process or of the host's first one.
pub(crate) fn is_hosts(path: &Path) -> bool {
    // Numbers of the namespace, which are the same by whatever path it's named (namespaces(7)).
    let number = |path: &Path| {
        let metadata = path.metadata().ok()?;
        Some((metadata.dev(), metadata.ino()))
    };
    let Some(wanted) = number(path) else {
        return false;
    };
    ["/proc/self/ns/net", "/proc/1/ns/net"]
        .iter()
        .any(|own| number(Path::new(own)) == Some(wanted))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hosts_own_is_known_by_any_path() {
        assert!(is_hosts(Path::new("/proc/self/ns/net")));
        assert!(is_hosts(Path::new("/proc/thread-self/ns/net")));
        assert!(!is_hosts(Path::new("/proc/self/ns/uts")));
        assert!(!is_hosts(Path::new("/nonexistent")));
    }

    #[test]
    fn work_is_done_in_the_namespace_and_nowhere_else() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let number = || std::fs::read_link("/proc/thread-self/ns/net").unwrap();
        let (other, made) = std::thread::spawn(move || {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            let netns = Netns::open(Path::new("/proc/thread-self/ns/net")).unwrap();
            (netns, number())
        })
        .join()
        .unwrap();
        let before = number();
        assert_eq!(other.inside(number).unwrap(), made);
        assert_eq!(number(), before);
        assert_ne!(made, before);
    }
}
