//! Id-mapped bind mounts: the owners of files are shown, and written, as other ids
//! (mount_setattr(2), "ID-mapped mounts").
//!
//! They are made on the host, where the files are: the guest's virtio-fs takes none, and to the VMM
//! such a mount is one like any other.

use super::{MountError, bind_into_share_with, failed};
use crate::spec::{Bind, MountIds};
use std::ffi::{CStr, CString, c_int, c_long};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// linux/mount.h; libc has no names for these.
const OPEN_TREE_CLONE: c_int = 1;
const MOVE_MOUNT_F_EMPTY_PATH: c_int = 4;

const EMPTY: &CStr = c"";

/// Binds `bind`'s source at `target` below the share, with ids as `ids` says.
pub(super) fn bind_mapped(bind: &Bind, ids: &MountIds, target: &Path) -> Result<(), MountError> {
    let source = Some(bind.source.as_path());
    let users = user_namespace(ids)
        .map_err(|cause| failed("map the ids of what is bound to", target, source, cause))?;
    let attach = || {
        let tree = open_tree(&bind.source, bind.recursive)?;
        map(&tree, &users, ids.recursive)?;
        move_to(&tree, target)
    };
    bind_into_share_with(target, bind.readonly, bind.recursive, bind.follows, || {
        attach().map_err(|cause| failed("bind", target, source, cause))
    })
}

/// Mounts `source` at `target` with the ids of `users`.
pub(super) fn attach_mapped(
    source: &Path,
    users: &OwnedFd,
    recursive: bool,
    target: &Path,
) -> io::Result<()> {
    let tree = open_tree(source, recursive)?;
    map(&tree, users, recursive)?;
    move_to(&tree, target)
}

/// A user namespace with these ids, in which there is no process.
pub(super) fn user_namespace(ids: &MountIds) -> io::Result<OwnedFd> {
    let none: c_long = 0;
    let flags = c_long::from(libc::CLONE_NEWUSER | libc::SIGCHLD);
    // SAFETY: without CLONE_VM this is a fork. The child only makes system calls, which is all
    // that is allowed in the child of a process with many threads, and never returns.
    let pid = unsafe { libc::syscall(libc::SYS_clone, flags, none, none, none, none) };
    if pid == 0 {
        // SAFETY: as above; none of them takes a pointer.
        unsafe {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            libc::pause();
            libc::_exit(0)
        }
    }
    if pid < 0 {
        return Err(io::Error::last_os_error());
    }
    let opened = fs::write(format!("/proc/{pid}/uid_map"), lines(&ids.uids))
        .and_then(|()| fs::write(format!("/proc/{pid}/gid_map"), lines(&ids.gids)))
        .and_then(|()| File::open(format!("/proc/{pid}/ns/user")));
    let child = nix::unistd::Pid::from_raw(pid as i32);
    // It is there until it has been waited for, so these can't hit another one.
    nix::sys::signal::kill(child, nix::sys::signal::Signal::SIGKILL)?;
    while nix::sys::wait::waitpid(child, None) == Err(nix::errno::Errno::EINTR) {}
    opened.map(OwnedFd::from)
}

/// Lines of uid_map and gid_map (user_namespaces(7)).
fn lines(ranges: &[oci_spec::runtime::LinuxIdMapping]) -> String {
    let line = |one: &oci_spec::runtime::LinuxIdMapping| {
        format!("{} {} {}\n", one.container_id(), one.host_id(), one.size())
    };
    ranges.iter().map(line).collect()
}

/// A detached copy of the mount at `source`.
fn open_tree(source: &Path, recursive: bool) -> io::Result<OwnedFd> {
    let path = CString::new(source.as_os_str().as_bytes())?;
    let mut flags = OPEN_TREE_CLONE | libc::O_CLOEXEC;
    if recursive {
        flags |= libc::AT_RECURSIVE;
    }
    // SAFETY: the path is a C string that outlives the call.
    let tree = unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, path.as_ptr(), flags) };
    if tree < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor that no one else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(tree as i32) })
}

fn map(tree: &OwnedFd, users: &OwnedFd, recursive: bool) -> io::Result<()> {
    // SAFETY: mount_attr is plain data for which all zeroes is valid.
    let mut request: libc::mount_attr = unsafe { std::mem::zeroed() };
    request.attr_set = libc::MOUNT_ATTR_IDMAP;
    request.userns_fd = users.as_raw_fd() as u64;
    let mut flags = libc::AT_EMPTY_PATH;
    if recursive {
        flags |= libc::AT_RECURSIVE;
    }
    // SAFETY: an empty path and a mount_attr of the size given, which the kernel only reads.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            EMPTY.as_ptr(),
            flags,
            &raw const request,
            size_of::<libc::mount_attr>(),
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::EINVAL) => io::Error::other(
                "the host's kernel or this file system has no id-mapped mounts (ext4, xfs and \
                 btrfs have); use another one, or leave idmap and uidMappings out",
            ),
            error => error,
        }),
    }
}

fn move_to(tree: &OwnedFd, target: &Path) -> io::Result<()> {
    let path = CString::new(target.as_os_str().as_bytes())?;
    // SAFETY: both paths are C strings that outlive the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            tree.as_raw_fd(),
            EMPTY.as_ptr(),
            libc::AT_FDCWD,
            path.as_ptr(),
            MOVE_MOUNT_F_EMPTY_PATH,
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mounts::{bind_into_share, unmount_tree};
    use oci_spec::runtime::LinuxIdMappingBuilder;
    use std::os::unix::fs::{MetadataExt, chown};

    fn bind(source: &Path, ids: Option<MountIds>) -> Bind {
        Bind {
            number: 0,
            source: source.to_owned(),
            is_dir: true,
            readonly: false,
            recursive: true,
            follows: true,
            ids,
            volume: None,
            upper: false,
        }
    }

    fn range(container: u32, host: u32) -> oci_spec::runtime::LinuxIdMapping {
        LinuxIdMappingBuilder::default()
            .container_id(container)
            .host_id(host)
            .size(10_u32)
            .build()
            .unwrap()
    }

    /// Needs root, and a temporary folder on a file system with id-mapped mounts.
    #[test]
    fn owners_are_shown_and_written_as_other_ids() {
        let (source, target) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::write(source.path().join("file"), "").unwrap();
        let ids = MountIds {
            uids: vec![range(0, 100_000)],
            gids: vec![range(0, 200_000)],
            recursive: false,
        };
        let bound = bind_into_share(&bind(source.path(), Some(ids)), target.path());
        match bound {
            Err(MountError::Failed { cause, .. })
                if !nix::unistd::geteuid().is_root()
                    || cause.to_string().contains("has no id-mapped mounts") =>
            {
                eprintln!("SKIPPED 1 test: {cause}");
                return;
            }
            bound => bound.unwrap(),
        }
        let shown = fs::metadata(target.path().join("file")).unwrap();
        assert_eq!((shown.uid(), shown.gid()), (100_000, 200_000));
        chown(target.path().join("file"), Some(100_005), Some(200_006)).unwrap();
        let written = fs::metadata(source.path().join("file")).unwrap();
        assert_eq!((written.uid(), written.gid()), (5, 6));
        // Ids without a place in the map.
        assert!(chown(target.path().join("file"), Some(5), None).is_err());
        unmount_tree(target.path()).unwrap();
    }
}
