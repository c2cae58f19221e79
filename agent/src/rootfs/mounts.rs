//! The `mounts` of a spec.

use super::options::{Attributes, MountOptions};
use super::paths::{Missing, open_or_create};
use super::{copy_up, is_folder};
use crate::error::{Context, Failure, Kind};
use crate::spec::{absolute_path, no_nul};
use crate::syscalls::{Syscalls, c_string};
use oci_spec::runtime::Mount;
use rustix::fs::{OFlags, ResolveFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, MountPropagationFlags};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

/// One mount of a container.
#[derive(Debug, Clone)]
pub struct MountPlan {
    /// Absolute path inside the container.
    pub destination: PathBuf,
    kind: MountKind,
    options: MountOptions,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum MountKind {
    /// A file or folder of the guest; mostly below the virtio-fs share.
    Bind { source: PathBuf, recursive: bool },
    /// The container's own part of the cgroup tree, for a container that sees the guest's whole
    /// tree otherwise.
    OwnCgroup,
    /// What is mounted there already, with other options (mount(2), MS_REMOUNT).
    Again,
    /// A new instance of a file system.
    FileSystem { name: String, source: PathBuf },
}

impl MountPlan {
    /// Checks `mounts[index]`.
    pub fn new(index: usize, mount: &Mount, own_cgroups: bool) -> Result<Self, Failure> {
        let field = |name: &str| format!("mounts[{index}].{name}");
        let mappings = |list: &Option<Vec<_>>| list.as_ref().is_some_and(|list| !list.is_empty());
        if mappings(mount.uid_mappings()) || mappings(mount.gid_mappings()) {
            return Err(Failure::invalid(
                field("uidMappings"),
                "only a bind mount can be id-mapped, which is done on the host",
            ));
        }
        let words = mount.options().iter().flatten().map(String::as_str);
        let mut options = MountOptions::parse(words).map_err(|(word, why)| {
            Failure::invalid(field("options"), format!("{word:?}: {why}"))
        })?;
        let name = mount.typ().as_deref().unwrap_or("none");
        no_nul(&field("type"), name.as_bytes())?;
        let kind = if options.remount {
            MountKind::Again
        } else if options.bind.is_some() || name == "bind" {
            let source = mount.source().as_ref().ok_or_else(|| {
                Failure::invalid(field("source"), "missing; a bind mount needs one")
            })?;
            MountKind::Bind {
                source: absolute_path(&field("source"), source)?.to_owned(),
                recursive: options.bind.unwrap_or(false),
            }
        } else if name == "none" || name.is_empty() {
            return Err(Failure::invalid(
                field("type"),
                "missing; name a file system, or use the option bind",
            ));
        } else if name == "cgroup" || name == "cgroup2" {
            // Options of cgroup v1's controllers have no meaning here.
            options.data.clear();
            if own_cgroups {
                MountKind::FileSystem {
                    name: "cgroup2".to_owned(),
                    source: "cgroup".into(),
                }
            } else {
                MountKind::OwnCgroup
            }
        } else {
            let source = mount.source().clone().unwrap_or_else(|| name.into());
            no_nul(&field("source"), source.as_os_str().as_encoded_bytes())?;
            MountKind::FileSystem {
                name: name.to_owned(),
                source,
            }
        };
        if options.copy_up
            && !matches!(&kind, MountKind::FileSystem { name, .. } if name == "tmpfs")
        {
            return Err(Failure::invalid(
                field("options"),
                "tmpcopyup: only a tmpfs can have it",
            ));
        }
        Ok(Self {
            destination: destination(&field("destination"), mount.destination())?,
            kind,
            options,
        })
    }

    /// The devpts that a terminal needs, with the options of the runtime spec's example.
    pub fn terminals() -> Self {
        Self {
            destination: "/dev/pts".into(),
            kind: MountKind::FileSystem {
                name: "devpts".to_owned(),
                source: "devpts".into(),
            },
            options: MountOptions {
                flags: MountFlags::NOSUID | MountFlags::NOEXEC,
                data: "newinstance,ptmxmode=0666,mode=0620,gid=5".to_owned(),
                ..MountOptions::default()
            },
        }
    }

    /// Whether it shows what exists elsewhere.
    pub fn is_bind(&self) -> bool {
        matches!(self.kind, MountKind::Bind { .. })
    }

    /// Whether it is a bind mount that may do less than what it shows.
    pub fn restricts(&self) -> bool {
        let attributes = [self.options.attributes, self.options.recursive_attributes];
        self.is_bind() && attributes.iter().any(|attributes| !attributes.is_empty())
    }

    /// Whether mounts made elsewhere later may have to show up in it, or the other way round.
    pub fn wants_propagation(&self) -> bool {
        self.options.propagation.iter().any(|flags| {
            flags.intersects(MountPropagationFlags::SHARED | MountPropagationFlags::DOWNSTREAM)
        })
    }

    /// Makes the mount inside `root`. `apply_propagation` is false when everything is private
    /// already and no mount wants anything else.
    pub fn make(
        &self,
        sys: &dyn Syscalls,
        root: BorrowedFd<'_>,
        (cgroup, opened): (Option<&Path>, Option<BorrowedFd<'_>>),
        apply_propagation: bool,
    ) -> Result<(), Failure> {
        match &self.kind {
            MountKind::Bind { source, recursive } => {
                self.bind(sys, root, (source, opened), *recursive)?;
                if let Some(opened) = opened {
                    // Cloned in the guest, so still one with the guest's own.
                    let mode = match apply_propagation {
                        true => MountPropagationFlags::DOWNSTREAM,
                        false => MountPropagationFlags::PRIVATE,
                    };
                    sys.set_propagation(opened, mode | MountPropagationFlags::REC)
                        .context(|| "cut a bind mount off from the guest's mounts")?;
                }
            }
            MountKind::OwnCgroup => match cgroup {
                Some(cgroup) => self.bind(sys, root, (cgroup, None), true)?,
                None => return Ok(()),
            },
            MountKind::Again => self.mount_again(sys, root)?,
            MountKind::FileSystem { name, source } => match opened {
                Some(opened) => self.attach_new(sys, root, opened)?,
                None => self.mount(sys, root, name, source)?,
            },
        }
        let change = |flags| -> Result<(), Errno> {
            // Opened again: the place before now lies below the mount.
            let mounted =
                sys.open_in_root(root, &self.destination, OFlags::PATH, ResolveFlags::empty())?;
            sys.set_propagation(mounted.as_fd(), flags)
        };
        if apply_propagation {
            for flags in &self.options.propagation {
                change(*flags).context(|| {
                    format!(
                        "set the mount propagation of {}",
                        self.destination.display()
                    )
                })?;
            }
        }
        Ok(())
    }

    /// What the agent has to open for a container with a user namespace, as a detached mount with
    /// its options: the source of a bind mount; and message queues that are the guest's, which show
    /// its IPC namespace, and that isn't the container's user namespace's.
    pub fn open_source(
        &self,
        sys: &dyn Syscalls,
        guests_ipc: bool,
    ) -> Result<Option<OwnedFd>, Failure> {
        match &self.kind {
            MountKind::Bind { source, recursive } => self.tree(sys, source, *recursive).map(Some),
            MountKind::FileSystem { name, .. } if guests_ipc && name == "mqueue" => {
                let action = || format!("mount mqueue for {}", self.destination.display());
                let mount = sys.new_mount(name).context(action)?;
                self.set_attributes(sys, mount.as_fd()).context(action)?;
                Ok(Some(mount))
            }
            _ => Ok(None),
        }
    }

    fn tree(&self, sys: &dyn Syscalls, source: &Path, recursive: bool) -> Result<OwnedFd, Failure> {
        let shown = || {
            format!(
                "bind {} to {}",
                source.display(),
                self.destination.display()
            )
        };
        let from = sys.open_place(source).map_err(|error| match error {
            Errno::NOENT => Failure::new(
                Kind::NotFound,
                format!(
                    "mounts: there is no {} in the guest to bind to {}",
                    source.display(),
                    self.destination.display()
                ),
            ),
            other => Failure::internal(shown(), other),
        })?;
        let tree = sys.clone_mount(from.as_fd(), recursive).context(shown)?;
        self.set_attributes(sys, tree.as_fd())
            .context(|| format!("{}: set the options", shown()))?;
        Ok(tree)
    }

    /// `opened` is the source if it has been opened before.
    fn bind(
        &self,
        sys: &dyn Syscalls,
        root: BorrowedFd<'_>,
        (source, opened): (&Path, Option<BorrowedFd<'_>>),
        recursive: bool,
    ) -> Result<(), Failure> {
        let shown = || {
            format!(
                "bind {} to {}",
                source.display(),
                self.destination.display()
            )
        };
        let tree = match opened {
            Some(opened) => opened.try_clone_to_owned().context(shown)?,
            None => self.tree(sys, source, recursive)?,
        };
        let missing = || {
            Ok(match is_folder(sys, tree.as_fd())? {
                true => Missing::Folder,
                false => Missing::File,
            })
        };
        let place = open_or_create(sys, root, &self.destination, missing, ResolveFlags::empty())?;
        match sys.attach(tree.as_fd(), place.as_fd()) {
            Err(Errno::INVAL | Errno::NOTDIR)
                if is_folder(sys, tree.as_fd()).ok() != is_folder(sys, place.as_fd()).ok() =>
            {
                Err(Failure::new(
                    Kind::InvalidArgument,
                    format!("{}: one is a folder and the other is not", shown()),
                ))
            }
            attached => attached.context(shown),
        }
    }

    /// Puts a new file system that the agent has mounted in its place.
    fn attach_new(
        &self,
        sys: &dyn Syscalls,
        root: BorrowedFd<'_>,
        opened: BorrowedFd<'_>,
    ) -> Result<(), Failure> {
        let none = ResolveFlags::empty();
        let folder = || Ok(Missing::Folder);
        let place = open_or_create(sys, root, &self.destination, folder, none)?;
        sys.attach(opened, place.as_fd())
            .context(|| format!("mount it on {}", self.destination.display()))
    }

    /// With the option bind only the mount changes, without it the file system as well.
    fn mount_again(&self, sys: &dyn Syscalls, root: BorrowedFd<'_>) -> Result<(), Failure> {
        let shown = || {
            format!(
                "mounts: change the options of what is mounted on {}",
                self.destination.display()
            )
        };
        let none = ResolveFlags::empty();
        let place = sys
            .open_in_root(root, &self.destination, OFlags::PATH, none)
            .context(shown)?;
        let changed = match self.options.bind {
            Some(_) => self.set_attributes(sys, place.as_fd()),
            None => {
                let flags = MountFlags::from_bits_retain(libc::MS_REMOUNT as u32);
                let data = c_string(&self.options.data);
                let flags = flags | self.options.flags;
                sys.mount(Path::new(""), place.as_fd(), "", flags, &data)
            }
        };
        changed.map_err(|error| match error {
            Errno::INVAL => Failure::invalid(
                "mounts",
                format!(
                    "remount: nothing is mounted on {} yet, or it can't take these options; list \
                     the mount itself before its remount",
                    self.destination.display()
                ),
            ),
            other => Failure::internal(shown(), other),
        })
    }

    fn set_attributes(&self, sys: &dyn Syscalls, mount: BorrowedFd<'_>) -> rustix::io::Result<()> {
        for (attributes, down) in [
            (self.options.attributes, false),
            (self.options.recursive_attributes, true),
        ] {
            if !attributes.is_empty() {
                sys.set_attributes(mount, attributes, down)?;
            }
        }
        Ok(())
    }

    fn mount(
        &self,
        sys: &dyn Syscalls,
        root: BorrowedFd<'_>,
        name: &str,
        source: &Path,
    ) -> Result<(), Failure> {
        // A link in place of /proc or /sys would put the kernel's files where later steps don't
        // expect them (CVE-2019-19921).
        let resolve = match name {
            "proc" | "sysfs" => ResolveFlags::NO_SYMLINKS,
            _ => ResolveFlags::empty(),
        };
        let shown = || format!("mount {name} on {}", self.destination.display());
        let place = open_or_create(
            sys,
            root,
            &self.destination,
            || Ok(Missing::Folder),
            resolve,
        )?;
        let mut flags = self.options.flags;
        if self.options.copy_up {
            flags -= MountFlags::RDONLY;
        }
        let data = c_string(&self.options.data);
        let mounted = sys.mount(source, place.as_fd(), name, flags, &data);
        if name == "sysfs" && mounted == Err(Errno::PERM) {
            // It shows the network, which isn't this user namespace's: like runc, show the guest's.
            return self.bind(sys, root, (Path::new("/sys"), None), true);
        }
        mounted.map_err(|error| match error {
            Errno::NODEV => Failure::invalid(
                "mounts",
                format!(
                    "{}: the guest's kernel has no file system {name:?}",
                    shown()
                ),
            ),
            Errno::INVAL => Failure::invalid(
                "mounts",
                format!("{} with options {:?}: {error}", shown(), self.options.data),
            ),
            other => Failure::internal(shown(), other),
        })?;
        let reopen = |flags| sys.open_in_root(root, &self.destination, flags, resolve);
        if self.options.copy_up {
            let mounted = reopen(OFlags::RDONLY | OFlags::DIRECTORY).context(shown)?;
            copy_up::copy(place.as_fd(), mounted.as_fd())
                .context(|| format!("{}: copy what was there before", shown()))?;
            if self.options.flags.contains(MountFlags::RDONLY) {
                sys.set_attributes(mounted.as_fd(), Attributes::READONLY, false)
                    .context(shown)?;
            }
        }
        if !self.options.recursive_attributes.is_empty() {
            reopen(OFlags::PATH)
                .and_then(|mounted| {
                    sys.set_attributes(mounted.as_fd(), self.options.recursive_attributes, true)
                })
                .context(|| format!("{}: set the options", shown()))?;
        }
        Ok(())
    }
}

/// The destination as an absolute path without `.` and `..`. The spec wants it absolute; like
/// other runtimes, one that is not is taken from the root.
fn destination(field: &str, path: &Path) -> Result<PathBuf, Failure> {
    no_nul(field, path.as_os_str().as_encoded_bytes())?;
    let mut clean = PathBuf::from("/");
    for part in path.components() {
        match part {
            Component::Normal(name) => clean.push(name),
            Component::ParentDir => {
                clean.pop();
            }
            _ => {}
        }
    }
    if clean == Path::new("/") {
        return Err(Failure::invalid(
            field,
            format!("{path:?} is the root itself, which is root.path"),
        ));
    }
    Ok(clean)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cleans_destinations() {
        let clean = |path: &str| destination("d", Path::new(path)).map_err(|failure| failure.kind);
        assert_eq!(clean("/a/../../b/./c"), Ok("/b/c".into()));
        assert_eq!(clean("dev/shm"), Ok("/dev/shm".into()));
        assert_eq!(clean("/a/.."), Err(Kind::InvalidArgument));
        assert_eq!(clean(""), Err(Kind::InvalidArgument));
    }
}
