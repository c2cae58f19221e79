//! `tmpcopyup`: fills a new tmpfs with what it covers.

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Deepest folder that is copied; a limit for the recursion, far beyond what images have.
const MAX_DEPTH: usize = 64;

/// Copies folders, files and symbolic links with owner and mode from one folder into an empty
/// one. Devices, FIFOs and sockets are left out, as they are of no use in a copy.
pub fn copy(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> io::Result<()> {
    let from = open_below(from, c".")?;
    copy_folder(&from, to, 0)
}

fn copy_folder(from: &OwnedFd, to: BorrowedFd<'_>, depth: usize) -> io::Result<()> {
    if depth > MAX_DEPTH {
        return Err(io::Error::other(format!(
            "more than {MAX_DEPTH} folders deep"
        )));
    }
    let stat = rustix::fs::fstat(from)?;
    rustix::fs::fchown(to, owner(stat.st_uid), group(stat.st_gid))?;
    rustix::fs::fchmod(to, Mode::from_raw_mode(stat.st_mode))?;
    for entry in Dir::read_from(from)? {
        let entry = entry?;
        let name = entry.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        let stat = rustix::fs::statat(from, name, AtFlags::SYMLINK_NOFOLLOW)?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => {
                rustix::fs::mkdirat(to, name, Mode::RWXU)?;
                let below = open_below(from.as_fd(), name)?;
                let copy = open_below(to, name)?;
                copy_folder(&below, copy.as_fd(), depth + 1)?;
            }
            FileType::RegularFile => copy_file(from, to, name, &stat)?,
            FileType::Symlink => {
                let target = rustix::fs::readlinkat(from, name, Vec::new())?;
                rustix::fs::symlinkat(target, to, name)?;
                rustix::fs::chownat(
                    to,
                    name,
                    owner(stat.st_uid),
                    group(stat.st_gid),
                    AtFlags::SYMLINK_NOFOLLOW,
                )?;
            }
            _ => {}
        }
    }
    Ok(())
}

fn copy_file(
    from: &OwnedFd,
    to: BorrowedFd<'_>,
    name: &std::ffi::CStr,
    stat: &rustix::fs::Stat,
) -> io::Result<()> {
    let flags = OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let source = rustix::fs::openat(from, name, flags | OFlags::RDONLY, Mode::empty())?;
    let created = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL;
    let copy = rustix::fs::openat(to, name, flags | created, Mode::RUSR | Mode::WUSR)?;
    let mut source = std::fs::File::from(source);
    let mut copy = std::fs::File::from(copy);
    io::copy(&mut source, &mut copy)?;
    rustix::fs::fchown(&copy, owner(stat.st_uid), group(stat.st_gid))?;
    // After the owner: changing that clears the set-id bits.
    Ok(rustix::fs::fchmod(
        &copy,
        Mode::from_raw_mode(stat.st_mode),
    )?)
}

fn open_below(at: BorrowedFd<'_>, name: &std::ffi::CStr) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(at, name, flags, Mode::empty())?)
}

fn owner(uid: u32) -> Option<rustix::fs::Uid> {
    Some(rustix::fs::Uid::from_raw(uid))
}

fn group(gid: u32) -> Option<rustix::fs::Gid> {
    Some(rustix::fs::Gid::from_raw(gid))
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::os::unix::fs::{PermissionsExt, symlink};

    #[test]
    fn copies_a_tree() {
        let from = tempfile::tempdir().expect("a folder");
        let to = tempfile::tempdir().expect("a folder");
        std::fs::create_dir(from.path().join("sub")).expect("a folder");
        std::fs::write(from.path().join("sub/file"), b"content").expect("a file");
        let mode = std::fs::Permissions::from_mode(0o640);
        std::fs::set_permissions(from.path().join("sub/file"), mode).expect("a mode");
        symlink("sub/file", from.path().join("link")).expect("a link");
        let open = |path| std::fs::File::open(path).expect("a folder");
        super::copy(open(from.path()).as_fd(), open(to.path()).as_fd()).expect("copied");
        assert_eq!(
            std::fs::read(to.path().join("link")).expect("a file"),
            b"content"
        );
        let mode = std::fs::metadata(to.path().join("sub/file"))
            .expect("a file")
            .permissions();
        assert_eq!(mode.mode() & 0o7777, 0o640);
    }
}
