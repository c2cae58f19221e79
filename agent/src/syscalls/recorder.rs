//! Stands in for the kernel in unit tests: files are entries of a table, and what is done to
//! them is written down.

use super::*;
use rustix::io::Errno;
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};

/// Records instead of doing.
#[derive(Debug, Default)]
pub struct Recorder {
    /// What has been done, in order.
    pub log: RefCell<Vec<String>>,
    folders: RefCell<BTreeSet<PathBuf>>,
    files: RefCell<BTreeSet<PathBuf>>,
    open: RefCell<BTreeMap<i32, PathBuf>>,
}

impl Recorder {
    /// A file system with these folders and files. Those of a container are given as it sees
    /// them: in this table its root is `/` as well.
    pub fn new(folders: &[&str], files: &[&str]) -> Self {
        let table = |paths: &[&str]| RefCell::new(paths.iter().map(PathBuf::from).collect());
        Self {
            folders: table(folders),
            files: table(files),
            ..Self::default()
        }
    }

    fn note(&self, what: String) -> Result<()> {
        self.log.borrow_mut().push(what);
        Ok(())
    }

    fn name(&self, place: BorrowedFd<'_>) -> PathBuf {
        let open = self.open.borrow();
        open.get(&place.as_raw_fd()).cloned().unwrap_or_default()
    }

    fn descriptor(&self, path: &Path) -> Result<OwnedFd> {
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let fd = rustix::fs::open("/dev/null", flags, Mode::empty())?;
        self.open
            .borrow_mut()
            .insert(fd.as_raw_fd(), path.to_owned());
        Ok(fd)
    }

    fn open_any(&self, path: &Path, folder: bool) -> Result<OwnedFd> {
        let is_folder = path == Path::new("/") || self.folders.borrow().contains(path);
        match (is_folder, self.files.borrow().contains(path)) {
            (true, _) => self.descriptor(path),
            (_, true) if folder => Err(Errno::NOTDIR),
            (_, true) => self.descriptor(path),
            _ => Err(Errno::NOENT),
        }
    }
}

impl Syscalls for Recorder {
    fn open_in_root(
        &self,
        _: BorrowedFd<'_>,
        path: &Path,
        flags: OFlags,
        _: ResolveFlags,
    ) -> Result<OwnedFd> {
        self.open_any(path, flags.contains(OFlags::DIRECTORY))
    }

    fn open_place(&self, path: &Path) -> Result<OwnedFd> {
        self.open_any(path, false)
    }

    fn open_folder(&self, path: &Path) -> Result<OwnedFd> {
        self.open_any(path, true)
    }

    fn make_folder(&self, parent: BorrowedFd<'_>, name: &Path, _: Mode) -> Result<()> {
        let path = self.name(parent).join(name);
        self.folders.borrow_mut().insert(path.clone());
        self.note(format!("mkdir {}", path.display()))
    }

    fn make_file(&self, parent: BorrowedFd<'_>, name: &Path, _: Mode) -> Result<()> {
        let path = self.name(parent).join(name);
        self.files.borrow_mut().insert(path.clone());
        self.note(format!("create {}", path.display()))
    }

    fn make_node(
        &self,
        parent: BorrowedFd<'_>,
        name: &Path,
        _: FileType,
        mode: Mode,
        device: Dev,
    ) -> Result<()> {
        let path = self.name(parent).join(name);
        let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
        let mode = mode.bits();
        self.note(format!("mknod {} {major}:{minor} {mode:o}", path.display()))
    }

    fn change_owner(&self, parent: BorrowedFd<'_>, name: &Path, uid: u32, gid: u32) -> Result<()> {
        self.note(format!(
            "chown {} {uid}:{gid}",
            self.name(parent).join(name).display()
        ))
    }

    fn make_link(&self, target: &Path, parent: BorrowedFd<'_>, name: &Path) -> Result<()> {
        let path = self.name(parent).join(name);
        self.note(format!(
            "symlink {} -> {}",
            path.display(),
            target.display()
        ))
    }

    fn remove_file(&self, parent: BorrowedFd<'_>, name: &Path) -> Result<()> {
        self.note(format!("unlink {}", self.name(parent).join(name).display()))
    }

    fn stat(&self, place: BorrowedFd<'_>) -> Result<Stat> {
        let file = self.files.borrow().contains(&self.name(place));
        rustix::fs::stat(if file { "/dev/null" } else { "/" })
    }

    fn mount(
        &self,
        source: &Path,
        place: BorrowedFd<'_>,
        kind: &str,
        flags: MountFlags,
        data: &CStr,
    ) -> Result<()> {
        let place = self.name(place);
        if flags.contains(MountFlags::BIND) && self.folders.borrow().contains(&place) {
            return Err(Errno::NOTDIR);
        }
        self.note(format!(
            "mount {kind} {} on {} {:#x} {:?}",
            source.display(),
            place.display(),
            flags.bits(),
            data.to_string_lossy()
        ))
    }

    fn new_mount(&self, kind: &str) -> Result<OwnedFd> {
        self.note(format!("new mount {kind}"))?;
        self.descriptor(Path::new(kind))
    }

    fn clone_mount(&self, place: BorrowedFd<'_>, recursive: bool) -> Result<OwnedFd> {
        let path = self.name(place);
        self.note(format!("clone {} recursive={recursive}", path.display()))?;
        self.descriptor(&path)
    }

    fn set_attributes(
        &self,
        mount: BorrowedFd<'_>,
        attributes: Attributes,
        recursive: bool,
    ) -> Result<()> {
        self.note(format!(
            "setattr {} +{:#x} -{:#x} recursive={recursive}",
            self.name(mount).display(),
            attributes.set,
            attributes.clear
        ))
    }

    fn attach(&self, mount: BorrowedFd<'_>, place: BorrowedFd<'_>) -> Result<()> {
        let (mount, place) = (self.name(mount), self.name(place));
        self.note(format!("attach {} to {}", mount.display(), place.display()))
    }

    fn set_propagation(&self, place: BorrowedFd<'_>, flags: MountPropagationFlags) -> Result<()> {
        self.note(format!(
            "propagation {} {:#x}",
            self.name(place).display(),
            flags.bits()
        ))
    }

    fn pivot(&self, _: BorrowedFd<'_>) -> Result<()> {
        self.note("pivot".to_owned())
    }

    fn set_root_propagation(&self, flags: MountPropagationFlags) -> Result<()> {
        self.note(format!("root propagation {:#x}", flags.bits()))
    }
}
