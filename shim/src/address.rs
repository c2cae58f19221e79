//! The shim's socket: its place, binding it, and leaving word of it in the bundle.

use sha2::{Digest, Sha256};
use std::fs::{self, DirBuilder, Permissions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// Where shims' sockets are unless the daemon says otherwise. Short, for a socket's path has at
/// most 107 characters.
pub const SOCKET_DIR: &str = "/run/containerd/s";

/// Longest path that daemons accept.
const MAX_PATH: usize = 106;

/// A shim's socket, bound or found.
pub enum Socket {
    /// Newly bound: a shim has to be started on it.
    Bound(UnixListener),
    /// Another shim already answers on it.
    Answers,
}

/// The socket of the shim that serves `group` for the daemon at `address`.
pub fn path(dir: &Path, address: &str, namespace: &str, group: &str) -> PathBuf {
    let digest = Sha256::digest(format!("{address}/{namespace}/{group}"));
    let name: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    dir.join(name)
}

/// Binds the socket at `path`, mode 0600 in a folder of mode 0700, unless a shim answers there.
/// What a dead one left is removed.
///
/// # Errors
/// When the folder can't be made or the socket can't be bound.
pub fn bind(path: &Path) -> io::Result<Socket> {
    if path.as_os_str().len() > MAX_PATH {
        let message = format!("{} is longer than {MAX_PATH} characters", path.display());
        return Err(io::Error::new(ErrorKind::InvalidInput, message));
    }
    if let Some(dir) = path.parent() {
        DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    }
    // A second round if a dead shim's socket was in the way, and one more if another `start` has
    // just been faster.
    for _ in 0..3 {
        match UnixListener::bind(path) {
            Ok(listener) => {
                fs::set_permissions(path, Permissions::from_mode(0o600))?;
                return Ok(Socket::Bound(listener));
            }
            Err(error) if error.kind() == ErrorKind::AddrInUse => {}
            Err(error) => return Err(error),
        }
        if answers(path) {
            return Ok(Socket::Answers);
        }
        match fs::remove_file(path) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Err(io::Error::new(
        ErrorKind::AddrInUse,
        "another shim keeps taking the socket",
    ))
}

/// Whether something listens at `path`.
pub fn answers(path: &Path) -> bool {
    UnixStream::connect(path).is_ok()
}

/// The address that daemons are told.
pub fn to_address(path: &Path) -> String {
    format!("unix://{}", path.display())
}

/// Writes `text` to the file `name` in `bundle`, whole or not at all.
///
/// # Errors
/// When it can't be written.
pub fn leave_word(bundle: &Path, name: &str, text: &str) -> io::Result<()> {
    let draft = bundle.join(format!(".{name}.new"));
    fs::write(&draft, text)?;
    fs::rename(draft, bundle.join(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_daemon_namespace_and_group_has_a_socket_of_its_own() {
        let dir = Path::new(SOCKET_DIR);
        let one = path(dir, "/run/containerd/containerd.sock", "default", "c1");
        assert!(one.as_os_str().len() <= MAX_PATH);
        assert_ne!(one, path(dir, "/run/other.sock", "default", "c1"));
        assert_ne!(
            one,
            path(dir, "/run/containerd/containerd.sock", "k8s.io", "c1")
        );
        assert_eq!(to_address(Path::new("/s/x")), "unix:///s/x");
    }

    #[test]
    fn a_socket_is_private_found_when_it_answers_and_replaced_when_it_does_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s/socket");
        let Socket::Bound(first) = bind(&path).unwrap() else {
            panic!("nothing was there")
        };
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(
            path.parent()
                .unwrap()
                .metadata()
                .unwrap()
                .permissions()
                .mode()
                & 0o777,
            0o700
        );
        assert!(matches!(bind(&path).unwrap(), Socket::Answers));
        drop(first);
        // A program that another test is just starting holds a copy until it is executed.
        let end = std::time::Instant::now() + std::time::Duration::from_secs(30);
        while answers(&path) {
            assert!(std::time::Instant::now() < end, "somebody still listens");
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        assert!(path.exists(), "a dead shim leaves its socket");
        assert!(matches!(bind(&path).unwrap(), Socket::Bound(_)));
        let long = dir.path().join("x".repeat(120));
        assert!(bind(&long).is_err());
    }
}
