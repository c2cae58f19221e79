//! What a container left in the host's folder of its upper layer, made readable for the host.
//!
//! A folder that stands in a lower one's place is marked as opaque by the guest's overlay; the
//! machine's file server keeps the mark under a name of its own, as it may set no trusted attributes
//! (`vmm/src/virtio/fs/xattrs.rs`). The host's overlay, by which daemons commit a container to an
//! image, knows `trusted.overlay.opaque` only.

use bulkhead_proto::guest::KEPT_OVERLAY_XATTRS;
use rustix::fd::OwnedFd;
use rustix::fs::{
    CWD, Dir, FileType, Mode, OFlags, ResolveFlags, XattrFlags, fgetxattr, fsetxattr, openat,
    openat2,
};
use rustix::io::Errno;
use std::ffi::{CStr, CString};
use std::io;
use std::path::Path;

const OPAQUE: &CStr = c"trusted.overlay.opaque";

/// Deepest folder that is looked into, and most folders in all. What is beyond that is the doing of
/// somebody who wants to keep the host busy.
const MAX_DEPTH: usize = 256;
const MAX_FOLDERS: usize = 1 << 20;

/// Marks the folders below `upper` that the guest has marked. How many those are.
///
/// A guest that is still there might put links in the place of folders meanwhile, so each folder is
/// opened from the one above it, and no link is followed.
pub(crate) fn mark_opaque(upper: &Path) -> io::Result<usize> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let top = openat2(
        CWD,
        upper,
        flags,
        Mode::empty(),
        ResolveFlags::NO_MAGICLINKS,
    )?;
    let kept = CString::new(format!("{KEPT_OVERLAY_XATTRS}opaque"))?;
    let mut marks = Marks {
        kept,
        folders: 0,
        marked: 0,
    };
    marks.look_into(top, 0)?;
    Ok(marks.marked)
}

struct Marks {
    kept: CString,
    folders: usize,
    marked: usize,
}

impl Marks {
    fn look_into(&mut self, folder: OwnedFd, depth: usize) -> io::Result<()> {
        self.folders += 1;
        if depth > MAX_DEPTH || self.folders > MAX_FOLDERS {
            return Err(io::Error::other("too many folders, or too deep ones"));
        }
        let mut value = [0; 2];
        match fgetxattr(&folder, self.kept.as_c_str(), &mut value) {
            Ok(length) if value[..length] == *b"y" => {
                fsetxattr(&folder, OPAQUE, b"y", XattrFlags::empty())?;
                self.marked += 1;
            }
            Ok(_) | Err(Errno::NODATA | Errno::RANGE | Errno::NOTSUP) => {}
            Err(error) => return Err(error.into()),
        }
        for entry in Dir::read_from(&folder)? {
            let entry = entry?;
            let name = entry.file_name();
            let maybe = matches!(entry.file_type(), FileType::Directory | FileType::Unknown);
            if !maybe || matches!(name.to_bytes(), b"." | b"..") {
                continue;
            }
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
            match openat(&folder, name, flags, Mode::empty()) {
                Ok(below) => self.look_into(below, depth + 1)?,
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::lsetxattr;
    use std::fs;

    #[test]
    fn marked_folders_are_marked_for_the_host_and_links_lead_nowhere() {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("SKIPPED 1 test: it needs root");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let outside = dir.path().join("outside");
        let upper = dir.path().join("upper");
        fs::create_dir_all(upper.join("a/b")).unwrap();
        fs::create_dir_all(upper.join("c")).unwrap();
        fs::create_dir_all(outside.join("d")).unwrap();
        std::os::unix::fs::symlink(&outside, upper.join("link")).unwrap();
        let kept = CString::new(format!("{KEPT_OVERLAY_XATTRS}opaque")).unwrap();
        for (path, value) in [
            (upper.join("a/b"), b"y"),
            (upper.join("c"), b"x"),
            (outside.clone(), b"y"),
        ] {
            lsetxattr(&path, kept.as_c_str(), value, XattrFlags::empty()).unwrap();
        }
        assert_eq!(mark_opaque(&upper).unwrap(), 1);
        let marked = |path: &Path| rustix::fs::lgetxattr(path, OPAQUE, &mut [0; 8][..]).is_ok();
        assert!(marked(&upper.join("a/b")));
        assert!(!marked(&upper.join("a")) && !marked(&upper.join("c")) && !marked(&outside));
    }
}
