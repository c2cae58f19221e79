//! What a layer's folder is: a digest of all that is in it, which names the image made from it, and
//! a stamp that costs no reading and tells whether it is still the same.

use rustix::fs::{lgetxattr, llistxattr};
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::ffi::{CStr, OsStr};
use std::fs::{self, Metadata, OpenOptions};
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// To be raised when an image of the same tree would have to be another.
const FORMAT: &[u8] = b"bulkhead layer 1";

/// XATTR_LIST_MAX and XATTR_SIZE_MAX of Linux.
const MAX_XATTR: usize = 64 << 10;

/// How much of a file is read at a time.
const CHUNK: usize = 128 << 10;

/// What tells a tree from any other, and from itself before a change, without reading its files.
///
/// The digest is over the path, device, inode number, mode, owner, size, modification time (mtime)
/// and time of change (ctime) of each file and folder. The host's kernel sets the ctime at every
/// change of content, name, attribute or link, and nobody can set it otherwise.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Stamp {
    pub digest: [u8; 32],
    /// The latest ctime, in nanoseconds since the epoch.
    pub changed: i128,
    /// All files' sizes together, holes included.
    pub bytes: u64,
}

impl Stamp {
    /// Looks at every file and folder below `root`.
    pub fn of(root: &Path) -> io::Result<Self> {
        let mut hash = Sha256::new();
        let (mut changed, mut bytes) = (i128::MIN, 0u64);
        walk(root, |path, _, found| {
            field(&mut hash, path.as_os_str().as_bytes());
            for number in [found.dev(), found.ino(), found.size(), found.rdev()] {
                hash.update(number.to_le_bytes());
            }
            for number in [found.mode(), found.uid(), found.gid()] {
                hash.update(number.to_le_bytes());
            }
            for time in [
                found.mtime(),
                found.mtime_nsec(),
                found.ctime(),
                found.ctime_nsec(),
            ] {
                hash.update(time.to_le_bytes());
            }
            changed = changed.max(nanoseconds(found.ctime(), found.ctime_nsec()));
            bytes = bytes.saturating_add(found.size());
            Ok(())
        })?;
        Ok(Self {
            digest: hash.finalize().into(),
            changed,
            bytes,
        })
    }
}

/// A time of stat(2)'s in nanoseconds.
fn nanoseconds(seconds: i64, rest: i64) -> i128 {
    i128::from(seconds) * 1_000_000_000 + i128::from(rest)
}

/// The digest of all that an image of the tree would hold: names, kinds, modes, owners, times of
/// modification, content, devices' numbers, targets of links, attributes, and which names are of one
/// file. Where the tree lies, and when it was put there, is not in it.
pub(super) fn digest(root: &Path) -> io::Result<[u8; 32]> {
    let mut hash = Sha256::new();
    hash.update(FORMAT);
    let mut seen: HashMap<u64, u64> = HashMap::new();
    let mut number = 0u64;
    walk(root, |path, full, found| {
        number += 1;
        field(&mut hash, path.as_os_str().as_bytes());
        let kind = found.file_type();
        if !kind.is_dir() && found.nlink() > 1 {
            if let Some(first) = seen.get(&found.ino()) {
                hash.update(b"again");
                hash.update(first.to_le_bytes());
                return Ok(());
            }
            seen.insert(found.ino(), number);
        }
        hash.update(b"file ");
        for word in [found.mode(), found.uid(), found.gid()] {
            hash.update(word.to_le_bytes());
        }
        // The top folder's is when the last name came into it, with every unpacking another; an
        // overlay shows its upper layer's instead.
        if number > 1 {
            hash.update(found.mtime().to_le_bytes());
            hash.update(found.mtime_nsec().to_le_bytes());
        }
        attributes(&mut hash, full)?;
        if kind.is_file() {
            content(&mut hash, full, found.size())?;
        } else if kind.is_symlink() {
            field(&mut hash, fs::read_link(full)?.as_os_str().as_bytes());
        } else if kind.is_char_device() || kind.is_block_device() {
            hash.update(found.rdev().to_le_bytes());
        }
        Ok(())
    })?;
    Ok(hash.finalize().into())
}

/// Visits the tree's files and folders in the order of their paths: each with its path below
/// `root`, its whole path, and what lstat(2) says of it.
fn walk(
    root: &Path,
    mut visit: impl FnMut(&Path, &Path, &Metadata) -> io::Result<()>,
) -> io::Result<()> {
    let device = fs::symlink_metadata(root)?.dev();
    let mut waiting = vec![PathBuf::new()];
    while let Some(path) = waiting.pop() {
        let full = match path.as_os_str().is_empty() {
            true => root.to_owned(),
            false => root.join(&path),
        };
        let found = fs::symlink_metadata(&full)?;
        if found.dev() != device {
            let problem = format!("another file system is mounted at {}", full.display());
            return Err(io::Error::other(problem));
        }
        visit(&path, &full, &found)?;
        if found.is_dir() {
            let names: io::Result<Vec<_>> = fs::read_dir(&full)?
                .map(|entry| entry.map(|entry| entry.file_name()))
                .collect();
            let mut names = names?;
            names.sort_unstable_by(|one, other| other.cmp(one));
            waiting.extend(names.iter().map(|name| path.join(name)));
        }
    }
    Ok(())
}

/// Bytes with their length, so that no two sequences of fields are the same bytes.
fn field(hash: &mut Sha256, bytes: &[u8]) {
    hash.update((bytes.len() as u64).to_le_bytes());
    hash.update(bytes);
}

fn content(hash: &mut Sha256, path: &Path, size: u64) -> io::Result<()> {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOATIME;
    let mut file = OpenOptions::new()
        .read(true)
        .custom_flags(flags)
        .open(path)?;
    hash.update(size.to_le_bytes());
    let mut chunk = vec![0; CHUNK];
    let mut whole = 0u64;
    loop {
        let read = match file.read(&mut chunk) {
            Ok(0) => break,
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        hash.update(&chunk[..read]);
        whole += read as u64;
    }
    if whole != size {
        let problem = format!("{} has changed while it was read", path.display());
        return Err(io::Error::other(problem));
    }
    Ok(())
}

/// The extended attributes, by name.
fn attributes(hash: &mut Sha256, path: &Path) -> io::Result<()> {
    let mut list = vec![0; MAX_XATTR];
    let length = match llistxattr(path, &mut list) {
        Ok(length) => length,
        Err(rustix::io::Errno::NOTSUP) => 0,
        Err(error) => return Err(error.into()),
    };
    let mut names: Vec<&[u8]> = list[..length].split_inclusive(|&byte| byte == 0).collect();
    names.sort_unstable();
    hash.update((names.len() as u64).to_le_bytes());
    let mut value = vec![0; if names.is_empty() { 0 } else { MAX_XATTR }];
    for name in names {
        let text = CStr::from_bytes_with_nul(name).map_err(io::Error::other)?;
        let length = lgetxattr(path, text, &mut value[..])?;
        field(hash, name);
        field(hash, &value[..length]);
    }
    Ok(())
}

/// `path` is one that the kernel takes in the list of an overlay's layers without quoting.
pub(super) fn is_plain(path: &OsStr) -> bool {
    !path
        .as_bytes()
        .iter()
        .any(|byte| matches!(byte, b'\\' | b',' | b':'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{Mode, XattrFlags, lsetxattr, mknodat};
    use std::os::unix::fs::{PermissionsExt, chown, symlink};

    /// A tree with one of everything, for which root is needed.
    fn tree(dir: &Path) -> PathBuf {
        let root = dir.join("layer");
        fs::create_dir_all(root.join("a/b")).unwrap();
        fs::write(root.join("a/file"), "content").unwrap();
        fs::hard_link(root.join("a/file"), root.join("a/again")).unwrap();
        symlink("file", root.join("a/link")).unwrap();
        lsetxattr(root.join("a"), c"user.x", b"y", XattrFlags::empty()).unwrap();
        root
    }

    /// The same times everywhere, as one and the same archive gives them.
    fn age(root: &Path) {
        let touched = std::process::Command::new("sh")
            .args([
                "-c",
                "find \"$0\" -exec touch --no-dereference --date=@1000000000 {} +",
            ])
            .arg(root)
            .status();
        assert!(touched.unwrap().success());
    }

    #[test]
    fn the_same_content_has_the_same_digest_wherever_it_lies() {
        let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let roots = [tree(one.path()), tree(two.path())];
        roots.iter().for_each(|root| age(root));
        assert_eq!(digest(&roots[0]).unwrap(), digest(&roots[1]).unwrap());
        assert_ne!(
            Stamp::of(&roots[0]).unwrap().digest,
            Stamp::of(&roots[1]).unwrap().digest
        );
    }

    #[test]
    fn every_change_changes_the_digest_and_the_stamp() {
        type Change = (&'static str, fn(&Path));
        let changes: [Change; 11] = [
            ("content", |root| {
                fs::write(root.join("a/file"), "CONTENT").unwrap()
            }),
            ("mode", |root| {
                let mode = fs::Permissions::from_mode(0o4755);
                fs::set_permissions(root.join("a/file"), mode).unwrap();
            }),
            ("name", |root| {
                fs::rename(root.join("a/link"), root.join("a/l")).unwrap()
            }),
            ("target", |root| {
                fs::remove_file(root.join("a/link")).unwrap();
                symlink("elif", root.join("a/link")).unwrap();
            }),
            ("attribute", |root| {
                lsetxattr(root.join("a"), c"user.x", b"z", XattrFlags::REPLACE).unwrap();
            }),
            ("further attribute", |root| {
                lsetxattr(root.join("a/b"), c"user.x", b"", XattrFlags::empty()).unwrap();
            }),
            ("further folder", |root| {
                fs::create_dir(root.join("a/b/c")).unwrap()
            }),
            ("link to a copy", |root| {
                fs::remove_file(root.join("a/again")).unwrap();
                fs::write(root.join("a/again"), "content").unwrap();
            }),
            ("moved between folders", |root| {
                fs::rename(root.join("a/link"), root.join("a/b/link")).unwrap();
            }),
            ("owner", |root| {
                chown(root.join("a/file"), Some(7), None).unwrap()
            }),
            ("whiteout", |root| {
                let mode = Mode::from_raw_mode(0);
                let kind = rustix::fs::FileType::CharacterDevice;
                mknodat(rustix::fs::CWD, root.join("a/w"), kind, mode, 0).unwrap();
            }),
        ];
        let privileged = nix::unistd::geteuid().is_root();
        for (what, change) in &changes[..if privileged { 11 } else { 9 }] {
            let dir = tempfile::tempdir().unwrap();
            let root = tree(dir.path());
            age(&root);
            let before = (digest(&root).unwrap(), Stamp::of(&root).unwrap());
            assert_eq!(before.1, Stamp::of(&root).unwrap());
            // Longer than the clock of ctime ticks.
            std::thread::sleep(std::time::Duration::from_millis(12));
            change(&root);
            let stamp = Stamp::of(&root).unwrap();
            assert_ne!(before.1.digest, stamp.digest, "{what}");
            assert!(stamp.changed > before.1.changed, "{what}");
            age(&root);
            assert_ne!(before.0, digest(&root).unwrap(), "{what}");
        }
    }

    #[test]
    fn a_time_that_was_set_back_leaves_another_stamp() {
        let dir = tempfile::tempdir().unwrap();
        let root = tree(dir.path());
        age(&root);
        let before = Stamp::of(&root).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(12));
        // The same length, and the same time of modification.
        fs::write(root.join("a/file"), "CONTENT").unwrap();
        age(&root);
        assert_ne!(before.digest, Stamp::of(&root).unwrap().digest);
    }
}
