//! The sandbox's folder below `runtime_dir`, and what another process needs to know of it.
//!
//! ```text
//! <runtime_dir>/<namespace>/<sandbox id>/   mode 0700
//!   state.json     who runs here: shim, VMM, containers (for `delete` in another process)
//!   vsock.sock     the guest's vsock ports          control.sock   the VMM's control socket
//!   vmm.log        the VMM's own log                console.log    at most 1 MiB of the guest's
//!   pod/           what a pod's containers find in /etc and at /dev/shm (pod_files.rs)
//!   skeleton/      mount points, made by the host
//!   shared/        the share's root: the skeleton, bound read-only, with the mounts on top
//! ```

use crate::cache::PathLock;
use crate::host_cgroup::{HostCgroup, HostCgroupError};
use crate::ids::{ContainerId, Namespace, SandboxId};
use crate::mounts::{MountError, bind_into_share, mount_share, mounts_below, unmount_tree};
use crate::process_ref::ProcessRef;
use crate::spec::Bind;
use bulkhead_proto::guest::{SHARE_MOUNTS, SHARE_VOLUMES};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

/// Bytes of console output that are kept.
pub(crate) const CONSOLE_LIMIT: u64 = 1 << 20;

/// Lines and bytes of the console that go into an error.
const TAIL_LINES: usize = 32;
const TAIL_BYTES: i64 = 8 << 10;

/// Name of the file in a bundle that leads to its sandbox's folder.
const LOCATOR_FILE: &str = "bulkhead.json";

/// The folder can't be made, used or removed.
#[derive(Debug, thiserror::Error)]
pub enum FolderError {
    /// A file operation failed.
    #[error("cannot {verb} {path}: {cause}", path = .path.display())]
    Io {
        /// What was tried.
        verb: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        cause: io::Error,
    },
    /// Another sandbox of this id runs.
    #[error(
        "the folder {path} belongs to a sandbox that still runs (process {pid}); \
         delete that one first, or use another id",
        path = .path.display()
    )]
    InUse {
        /// The folder.
        path: PathBuf,
        /// The shim's or the VMM's pid.
        pid: u32,
    },
    /// The share can't be mounted or unmounted.
    #[error(transparent)]
    Mount(#[from] MountError),
    /// The cgroup that the VMM ran in can't be removed.
    #[error(transparent)]
    Cgroup(#[from] HostCgroupError),
}

fn fail<'a>(verb: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> FolderError + 'a {
    move |cause| FolderError::Io {
        verb,
        path: path.into(),
        cause,
    }
}

/// What `delete` in another process must know, as state.json.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct StateFile {
    /// The process that drives this sandbox.
    pub shim: ProcessRef,
    /// The VMM, once it runs.
    pub vmm: Option<ProcessRef>,
    /// The pod's network namespace, if it has one that outlives the VMM.
    #[serde(default)]
    pub netns: Option<PathBuf>,
    /// The bundles of all containers, by id.
    pub containers: BTreeMap<String, PathBuf>,
    /// Where the VMM runs; none for a VM that is nobody's sandbox.
    pub cgroup: Option<HostCgroup>,
}

/// The path of a sandbox's folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RuntimeFolder {
    path: PathBuf,
}

impl RuntimeFolder {
    /// Where the folder of sandbox `id` is. Touches nothing.
    pub fn new(runtime_dir: &Path, namespace: &Namespace, id: &SandboxId) -> Self {
        Self {
            path: runtime_dir.join(namespace).join(id),
        }
    }

    /// A folder that isn't below a `runtime_dir`.
    pub(crate) fn at(path: PathBuf) -> Self {
        Self { path }
    }

    /// The folder's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn share(&self) -> PathBuf {
        self.path.join("shared")
    }

    /// Where the pod's own files are; no part of the share.
    pub(crate) fn pod(&self) -> PathBuf {
        self.path.join("pod")
    }

    fn skeleton(&self) -> PathBuf {
        self.path.join("skeleton")
    }

    /// Where the mount points of container `id` are made.
    pub(crate) fn container_skeleton(&self, id: &ContainerId) -> PathBuf {
        self.skeleton().join(id)
    }

    /// Where they appear in the share.
    pub(crate) fn container_share(&self, id: &ContainerId) -> PathBuf {
        self.share().join(id)
    }

    /// Binds `bind`'s source, which containers of the pod have in common under the name `volume`,
    /// unless it is there already. It stays as long as the pod does.
    pub(crate) fn bind_volume(&self, bind: &Bind, volume: &str) -> Result<(), FolderError> {
        let lock = self.path.join("volumes.lock");
        let _lock = PathLock::take(&lock).map_err(fail("lock", &lock))?;
        let below = Path::new(SHARE_VOLUMES).join(SHARE_MOUNTS).join(volume);
        let target = self.share().join(&below);
        if !mounts_below(&target)?.is_empty() {
            return Ok(());
        }
        let skeleton = self.skeleton().join(below);
        fs::create_dir_all(&skeleton).map_err(fail("make", &skeleton))?;
        Ok(bind_into_share(bind, &target)?)
    }

    /// Makes the folder and mounts the share. What an ended sandbox of the same id left is
    /// removed first.
    pub(crate) fn create(&self) -> Result<(), FolderError> {
        self.remove_stale()?;
        let parent = self.path.parent().unwrap_or(&self.path);
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(parent)
            .map_err(fail("make", parent))?;
        DirBuilder::new()
            .mode(0o700)
            .create(&self.path)
            .map_err(fail("make", &self.path))?;
        self.fill().inspect_err(|_| {
            if let Err(error) = self.remove() {
                tracing::warn!(%error, "undoing the runtime folder failed");
            }
        })
    }

    /// Makes the folder for a VM without containers: its share is an empty folder, and nothing is
    /// mounted.
    pub(crate) fn create_bare(&self) -> Result<(), FolderError> {
        for folder in [self.path.clone(), self.share()] {
            DirBuilder::new()
                .mode(0o700)
                .create(&folder)
                .map_err(fail("make", &folder))?;
        }
        Ok(())
    }

    fn fill(&self) -> Result<(), FolderError> {
        for folder in [self.skeleton(), self.share()] {
            DirBuilder::new()
                .mode(0o700)
                .create(&folder)
                .map_err(fail("make", &folder))?;
        }
        mount_share(&self.skeleton(), &self.share())?;
        Ok(())
    }

    fn remove_stale(&self) -> Result<(), FolderError> {
        if !self.path.exists() {
            return Ok(());
        }
        if let Some(state) = self.read_state()? {
            let own = std::process::id();
            let owners = [Some(state.shim), state.vmm].into_iter().flatten();
            if let Some(alive) = owners
                .filter(|owner| owner.pid != own)
                .find(|owner| owner.is_alive())
            {
                return Err(FolderError::InUse {
                    path: self.path.clone(),
                    pid: alive.pid,
                });
            }
        }
        tracing::warn!(folder = %self.path.display(), "removing what an ended sandbox left");
        self.remove()
    }

    /// Unmounts the share with everything below it and removes the folder. Idempotent.
    pub(crate) fn remove(&self) -> Result<(), FolderError> {
        // All mounts must be gone before anything is removed, or removal would go through them.
        unmount_tree(&self.path)?;
        if let Some(cgroup) = self.read_state()?.and_then(|state| state.cgroup) {
            cgroup.remove()?;
        }
        match fs::remove_dir_all(&self.path) {
            Ok(()) => {}
            Err(cause) if cause.kind() == ErrorKind::NotFound => {}
            Err(cause) => return Err(fail("remove", &self.path)(cause)),
        }
        // The namespace's folder goes with its last sandbox; it's not an error if others are left.
        if let Some(parent) = self.path.parent() {
            let _ = fs::remove_dir(parent);
        }
        Ok(())
    }

    /// Unmounts what the share holds of one container and removes its mount points. Idempotent.
    pub(crate) fn remove_container(&self, id: &ContainerId) -> Result<(), FolderError> {
        unmount_tree(&self.container_share(id))?;
        let skeleton = self.container_skeleton(id);
        match fs::remove_dir_all(&skeleton) {
            Err(cause) if cause.kind() != ErrorKind::NotFound => {
                Err(fail("remove", &skeleton)(cause))
            }
            _ => Ok(()),
        }
    }

    fn state_path(&self) -> PathBuf {
        self.path.join("state.json")
    }

    /// Writes state.json, whole or not at all.
    pub(crate) fn write_state(&self, state: &StateFile) -> Result<(), FolderError> {
        let path = self.state_path();
        let text = serde_json::to_vec_pretty(state).map_err(|e| fail("write", &path)(e.into()))?;
        write_atomically(&path, &text).map_err(fail("write", &path))
    }

    /// Reads state.json; none if there is none, or none that can be read.
    pub(crate) fn read_state(&self) -> Result<Option<StateFile>, FolderError> {
        let path = self.state_path();
        match fs::read(&path) {
            Err(cause) if cause.kind() == ErrorKind::NotFound => Ok(None),
            Err(cause) => Err(fail("read", &path)(cause)),
            Ok(text) => Ok(serde_json::from_slice(&text)
                .inspect_err(|error| tracing::warn!(%error, path = %path.display(), "unreadable"))
                .ok()),
        }
    }

    /// Opens a new log file in the folder.
    pub(crate) fn create_log(&self, name: &str) -> Result<File, FolderError> {
        let path = self.path.join(name);
        let mut options = OpenOptions::new();
        options
            .create(true)
            .append(true)
            .mode(0o600)
            .open(&path)
            .map_err(fail("make", &path))
    }

    /// Binds a listening socket in the folder.
    pub(crate) fn bind(&self, name: &str) -> Result<UnixListener, FolderError> {
        let path = self.path.join(name);
        let folder = self.open().map_err(fail("open", &self.path))?;
        UnixListener::bind(short_path(&folder, name)).map_err(fail("listen on", &path))
    }

    /// The folder itself, to reach sockets in it by [`short_path`].
    pub(crate) fn open(&self) -> io::Result<File> {
        OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_PATH | libc::O_DIRECTORY)
            .open(&self.path)
    }

    /// The last lines of a log, control characters replaced: for errors.
    pub(crate) fn log_tail(&self, name: &str) -> Vec<String> {
        let read = || -> io::Result<Vec<u8>> {
            let mut file = File::open(self.path.join(name))?;
            let length = file.metadata()?.len();
            if length > TAIL_BYTES as u64 {
                file.seek(SeekFrom::End(-TAIL_BYTES))?;
            }
            let mut bytes = Vec::new();
            file.take(TAIL_BYTES as u64).read_to_end(&mut bytes)?;
            Ok(bytes)
        };
        tail_lines(&read().unwrap_or_default())
    }
}

/// A socket's path by way of its folder's descriptor: always short enough for sun_path's 107
/// characters (unix(7)), however deep the folder is.
pub(crate) fn short_path(folder: &File, name: &str) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}/{name}", folder.as_raw_fd()))
}

fn tail_lines(bytes: &[u8]) -> Vec<String> {
    let text = String::from_utf8_lossy(bytes);
    let lines: Vec<&str> = text.lines().collect();
    let clean = |line: &&str| -> String {
        line.trim_end()
            .chars()
            .map(|c| if c.is_control() { '·' } else { c })
            .take(512)
            .collect()
    };
    lines[lines.len().saturating_sub(TAIL_LINES)..]
        .iter()
        .map(clean)
        .collect()
}

fn write_atomically(path: &Path, text: &[u8]) -> io::Result<()> {
    let draft = path.with_extension("json.new");
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&draft)?;
    file.write_all(text)?;
    drop(file);
    fs::rename(&draft, path)
}

/// The note in a bundle that leads from a container to its sandbox, for `delete`, which knows
/// neither the configuration nor the pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Locator {
    /// The sandbox's folder.
    pub folder: PathBuf,
    /// The sandbox's id.
    pub sandbox: String,
}

impl Locator {
    /// Leaves the note in `bundle`.
    pub(crate) fn write(
        bundle: &Path,
        folder: &RuntimeFolder,
        id: &SandboxId,
    ) -> Result<(), FolderError> {
        let path = bundle.join(LOCATOR_FILE);
        let note = Self {
            folder: folder.path.clone(),
            sandbox: id.as_str().into(),
        };
        let text = serde_json::to_vec(&note).map_err(|e| fail("write", &path)(e.into()))?;
        write_atomically(&path, &text).map_err(fail("write", &path))
    }

    /// Takes the note away again. Idempotent.
    pub(crate) fn remove(bundle: &Path) {
        let _ = fs::remove_file(bundle.join(LOCATOR_FILE));
    }

    /// Finds the note in `bundle`; none if the container never came so far.
    pub fn read(bundle: &Path) -> Option<Self> {
        serde_json::from_slice(&fs::read(bundle.join(LOCATOR_FILE)).ok()?).ok()
    }

    pub(crate) fn runtime_folder(&self) -> RuntimeFolder {
        RuntimeFolder {
            path: self.folder.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mounts::{bind_into_share, bind_root_into_share, make_mount_points, mounts_below};
    use crate::spec::Bind;

    fn folder(dir: &Path) -> RuntimeFolder {
        RuntimeFolder::new(
            dir,
            &Namespace::try_from("ns").unwrap(),
            &SandboxId::try_from("s1").unwrap(),
        )
    }

    #[test]
    fn console_tail_is_bounded_and_clean() {
        let noise: Vec<u8> = (0..100)
            .flat_map(|n| format!("line {n}\x1b[2J\r\n").into_bytes())
            .collect();
        let tail = tail_lines(&noise);
        assert_eq!(tail.len(), TAIL_LINES);
        assert_eq!(tail[31], "line 99·[2J");
        assert!(tail_lines(b"").is_empty());
    }

    #[test]
    fn a_deep_folder_still_holds_sockets() {
        let dir = tempfile::tempdir().unwrap();
        let deep = dir.path().join("d".repeat(120));
        fs::create_dir(&deep).unwrap();
        let folder = RuntimeFolder { path: deep };
        let listener = folder.bind("vsock.sock").unwrap();
        let opened = folder.open().unwrap();
        std::os::unix::net::UnixStream::connect(short_path(&opened, "vsock.sock")).unwrap();
        drop(listener);
    }

    #[test]
    fn the_share_shows_binds_refuses_the_guests_writes_and_goes_without_a_trace() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let (root, data) = (dir.path().join("root"), dir.path().join("data"));
        fs::create_dir(&root).unwrap();
        fs::create_dir(&data).unwrap();
        fs::write(data.join("kept"), "x").unwrap();
        let id = ContainerId::try_from("c1").unwrap();
        let folder = folder(dir.path());
        folder.create().unwrap();
        let binds = [Bind {
            number: 0,
            source: data.clone(),
            is_dir: true,
            readonly: true,
            recursive: true,
            follows: true,
            ids: None,
            volume: None,
            upper: false,
        }];
        make_mount_points(&folder.container_skeleton(&id), &binds).unwrap();
        let share = folder.container_share(&id);
        bind_root_into_share(&root, &share.join("rootfs"), false).unwrap();
        bind_into_share(&binds[0], &share.join("mounts/0")).unwrap();

        fs::write(share.join("rootfs/written"), "x").unwrap();
        assert!(root.join("written").exists());
        for forbidden in [
            share.join("mounts/0/new"),
            share.join("new"),
            folder.share().join("new"),
        ] {
            let error = fs::write(&forbidden, "x").unwrap_err();
            assert_eq!(error.kind(), ErrorKind::ReadOnlyFilesystem, "{forbidden:?}");
        }
        folder.remove_container(&id).unwrap();
        assert!(!share.exists());
        folder.remove().unwrap();
        assert!(mounts_below(dir.path()).unwrap().is_empty());
        assert!(!folder.path().exists() && !folder.path().parent().unwrap().exists());
        assert!(data.join("kept").exists() && root.join("written").exists());
    }

    #[test]
    fn a_running_sandboxs_folder_is_not_taken() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let folder = folder(dir.path());
        folder.create().unwrap();
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let shim = ProcessRef::of(child.id()).unwrap();
        folder
            .write_state(&StateFile {
                shim,
                vmm: None,
                netns: None,
                containers: BTreeMap::new(),
                cgroup: None,
            })
            .unwrap();
        assert!(matches!(folder.create(), Err(FolderError::InUse { .. })));
        child.kill().unwrap();
        child.wait().unwrap();
        folder.create().unwrap();
        folder.remove().unwrap();
    }
}
