//! One mount: from the words of its options to the kernel's calls.

use crate::error::{Context, Failure, Kind};
use crate::rootfs::MountOptions;
use crate::syscalls::{Linux, Syscalls};
use bulkhead_proto::agent::StorageMount;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::CWD;
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MoveMountFlags, OpenTreeFlags,
    fsconfig_create, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, move_mount,
    open_tree,
};
use std::path::Path;

/// Longest message of a file system's that is passed on, in bytes.
const MAX_REASON: usize = 512;

/// A mount whose fields have been checked.
pub(super) struct Wanted<'a> {
    kind: &'a str,
    source: &'a str,
    options: MountOptions,
    /// `KEY=VALUE` and `KEY`, the file system's own.
    words: Vec<String>,
}

impl<'a> Wanted<'a> {
    /// Checks `one`; `field` names its options in messages.
    pub fn new(field: &str, one: &'a StorageMount) -> Result<Self, Failure> {
        let given = one.options.iter().map(String::as_str);
        let options = MountOptions::parse(given)
            .map_err(|(word, why)| Failure::invalid(field, format!("{word:?}: {why}")))?;
        let refused = [
            ("remount", options.remount),
            ("tmpcopyup", options.copy_up),
            ("a propagation", !options.propagation.is_empty()),
        ];
        if let Some((word, _)) = refused.iter().find(|(_, given)| *given) {
            return Err(Failure::invalid(
                field,
                format!("{word} has no meaning here"),
            ));
        }
        // A word that was given may be several, by commas.
        let words = options.data.split(',').filter(|word| !word.is_empty());
        let words = words.map(str::to_owned).collect();
        Ok(Self {
            kind: &one.type_,
            source: &one.source,
            options,
            words,
        })
    }

    /// Mounts it on `target`.
    pub fn mount(&self, target: &Path) -> Result<(), Failure> {
        let tree = match self.options.bind {
            Some(recursive) => self.existing(recursive),
            None if self.kind == "bind" => self.existing(false),
            None => self.new_file_system(),
        }?;
        move_mount(
            tree.as_fd(),
            "",
            CWD,
            target,
            MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
        )
        .context(|| format!("{}: put it at {}", self.shown(), target.display()))
    }

    fn shown(&self) -> String {
        format!("mount {} as {}", self.source, self.kind)
    }

    fn existing(&self, recursive: bool) -> Result<OwnedFd, Failure> {
        let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        if recursive {
            flags |= OpenTreeFlags::AT_RECURSIVE;
        }
        let tree = open_tree(CWD, self.source, flags).context(|| self.shown())?;
        let attributes = self.options.attributes;
        if !attributes.is_empty() {
            Linux
                .set_attributes(tree.as_fd(), attributes, false)
                .context(|| self.shown())?;
        }
        Ok(tree)
    }

    /// Option by option (fsconfig(2)): the data of mount(2) ends with its page, which the layers of
    /// an image may not fit into.
    fn new_file_system(&self) -> Result<OwnedFd, Failure> {
        let context =
            fsopen(self.kind, FsOpenFlags::FSOPEN_CLOEXEC).map_err(|error| match error {
                Errno::NODEV => Failure::invalid(
                    "storage",
                    format!(
                        "{}: the guest's kernel has no such file system",
                        self.shown()
                    ),
                ),
                other => Failure::internal(self.shown(), other),
            })?;
        let failed = |error| self.failure(error, context.as_fd());
        fsconfig_set_string(context.as_fd(), "source", self.source).map_err(failed)?;
        for (flag, name) in [
            (MountFlags::RDONLY, "ro"),
            (MountFlags::SYNCHRONOUS, "sync"),
            (MountFlags::DIRSYNC, "dirsync"),
            (MountFlags::LAZYTIME, "lazytime"),
        ] {
            if self.options.flags.contains(flag) {
                fsconfig_set_flag(context.as_fd(), name).map_err(failed)?;
            }
        }
        for word in &self.words {
            match word.split_once('=') {
                Some((key, value)) => fsconfig_set_string(context.as_fd(), key, value),
                None => fsconfig_set_flag(context.as_fd(), word.as_str()),
            }
            .map_err(failed)?;
        }
        fsconfig_create(context.as_fd()).map_err(failed)?;
        let attributes = self.options.attributes.set & !libc::MOUNT_ATTR_RDONLY;
        let attributes = MountAttrFlags::from_bits_retain(attributes as u32);
        fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes).map_err(failed)
    }

    /// With what the file system says itself, which the context's descriptor has lines of
    /// ("e erofs: ...").
    fn failure(&self, error: Errno, context: BorrowedFd<'_>) -> Failure {
        let mut said = Vec::new();
        let mut line = [0; MAX_REASON];
        while let Ok(length) = rustix::io::read(context, &mut line) {
            let line = line.get(..length).unwrap_or_default();
            if length == 0 || said.len() + length > MAX_REASON {
                break;
            }
            let text = String::from_utf8_lossy(line);
            said.extend_from_slice(text.trim_end().as_bytes());
            said.extend_from_slice(b"; ");
        }
        let kind = match error {
            Errno::INVAL => Kind::InvalidArgument,
            _ => Kind::Internal,
        };
        let said = String::from_utf8_lossy(&said).into_owned();
        let options = self.words.join(",");
        let shown = self.shown();
        let message = format!("{shown} with options {options:?}: {said}{error}");
        Failure::new(kind, message)
    }
}
