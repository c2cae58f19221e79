//! cgroup v2: one folder per container, directly below the mount.

mod block_io;
mod devices;
mod freezer;
mod limits;
mod stats;

use devices::DeviceRules;
pub use limits::{CgroupSettings, Setting};

use crate::error::{Context, Failure, Kind};
use rustix::fs::{AtFlags, CWD, Mode, OFlags};
use rustix::io::Errno;
use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

/// Before each container's folder, so that no container id collides with a file of the kernel's.
const PREFIX: &str = "container-";

/// Controllers that every container gets; each makes a cgroup dearer, so the others are enabled
/// by the first container that asks for them.
const ALWAYS: [&str; 3] = ["cpu", "memory", "pids"];

/// Longest cgroup file that is read; `cgroup.procs` of a full guest fits.
const MAX_FILE: u64 = 1024 * 1024;

/// How long killed processes may take to leave their cgroup.
const EMPTY_WITHIN: Duration = Duration::from_secs(60);

/// The cgroup tree in which containers get their folders.
#[derive(Debug)]
pub struct Hierarchy {
    root: Option<PathBuf>,
    /// Leave out what the tree has no controller for (only outside a guest).
    tolerant: bool,
    enabled: Mutex<BTreeSet<String>>,
    made_ahead: AtomicU32,
    /// The program for [`DeviceRules::default`], once it has been loaded.
    default_devices: OnceLock<Arc<OwnedFd>>,
}

impl Hierarchy {
    /// No cgroups at all: limits are ignored. Only outside a guest.
    pub fn absent() -> Self {
        Self {
            root: None,
            tolerant: true,
            enabled: Mutex::default(),
            made_ahead: AtomicU32::new(0),
            default_devices: OnceLock::new(),
        }
    }

    /// A tree in which controllers may be missing. Only outside a guest.
    pub fn tolerant(root: PathBuf) -> Self {
        Self {
            root: Some(root),
            ..Self::absent()
        }
    }

    /// The guest's own tree, with the controllers that every container gets.
    pub fn open(root: PathBuf) -> Result<Self, Failure> {
        let hierarchy = Self {
            root: Some(root),
            tolerant: false,
            enabled: Mutex::default(),
            made_ahead: AtomicU32::new(0),
            default_devices: OnceLock::new(),
        };
        hierarchy.enable(ALWAYS.into_iter())?;
        Ok(hierarchy)
    }

    /// Creates the cgroup of a container and sets its limits. `None` when there are no cgroups.
    pub fn create(
        &self,
        container_id: &str,
        settings: &CgroupSettings,
    ) -> Result<Option<Arc<Cgroup>>, Failure> {
        let cgroup = self.make(&format!("{PREFIX}{container_id}"))?;
        if let Some(cgroup) = &cgroup
            && let Err(failure) = self.limit(cgroup, settings)
        {
            // Nothing runs in it yet, so it can go at once.
            let _ = rustix::fs::unlinkat(CWD, &cgroup.path, AtFlags::REMOVEDIR);
            return Err(failure);
        }
        Ok(cgroup)
    }

    /// Creates a cgroup for a container that isn't known yet.
    pub fn create_ahead(&self) -> Result<Option<Arc<Cgroup>>, Failure> {
        let number = self.made_ahead.fetch_add(1, Ordering::Relaxed);
        let cgroup = self.make(&format!("ahead-{number}"))?;
        if let Some(cgroup) = &cgroup {
            // Most containers have just these rules.
            self.restrict(cgroup, &DeviceRules::default())?;
        }
        Ok(cgroup)
    }

    /// Sets the limits of a container.
    pub fn limit(&self, cgroup: &Cgroup, settings: &CgroupSettings) -> Result<(), Failure> {
        if !self.tolerant {
            self.enable(settings.controllers())?;
        }
        cgroup.apply(settings, self.tolerant)?;
        self.restrict(cgroup, &settings.devices)
    }

    /// Has the kernel enforce the rules for devices.
    fn restrict(&self, cgroup: &Cgroup, rules: &DeviceRules) -> Result<(), Failure> {
        let program = match self.device_program(rules) {
            Ok(program) => program,
            // Outside of a guest the kernel may refuse, as it refuses controllers.
            Err(_) if self.tolerant => None,
            Err(failure) => return Err(failure),
        };
        let mut current = cgroup.devices.lock().unwrap_or_else(|e| e.into_inner());
        if current.as_ref().map(Arc::as_ptr) == program.as_ref().map(Arc::as_ptr) {
            return Ok(());
        }
        if let Some(old) = current.take() {
            devices::detach(cgroup.as_fd(), old.as_fd())?;
        }
        if let Some(new) = &program {
            devices::attach(cgroup.as_fd(), new.as_fd())?;
        }
        *current = program;
        Ok(())
    }

    fn device_program(&self, rules: &DeviceRules) -> Result<Option<Arc<OwnedFd>>, Failure> {
        if rules.allow_all() {
            return Ok(None);
        }
        if *rules != DeviceRules::default() {
            return Ok(Some(Arc::new(rules.load()?)));
        }
        if let Some(program) = self.default_devices.get() {
            return Ok(Some(Arc::clone(program)));
        }
        let program = Arc::new(rules.load()?);
        Ok(Some(Arc::clone(
            self.default_devices.get_or_init(|| program),
        )))
    }

    /// Changes the limits of a container; none of them when one is refused.
    pub fn change(&self, cgroup: &Cgroup, settings: &CgroupSettings) -> Result<(), Failure> {
        // Outside a guest, a controller that is missing is found out by its missing files.
        if !self.tolerant {
            self.enable(settings.controllers())?;
        }
        cgroup.replace(settings)
    }

    fn make(&self, name: &str) -> Result<Option<Arc<Cgroup>>, Failure> {
        let Some(root) = &self.root else {
            return Ok(None);
        };
        let path = root.join(name);
        match rustix::fs::mkdirat(CWD, &path, Mode::from_raw_mode(0o755)) {
            Ok(()) => {}
            Err(Errno::EXIST) => {
                return Err(Failure::new(
                    Kind::AlreadyExists,
                    format!("the guest already has a cgroup {}", path.display()),
                ));
            }
            Err(error) => {
                return Err(Failure::internal(
                    format!("create the cgroup {} in the guest", path.display()),
                    error,
                ));
            }
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        match rustix::fs::open(&path, flags, Mode::empty()) {
            Ok(folder) => Ok(Some(Arc::new(Cgroup {
                folder,
                path,
                devices: Mutex::default(),
            }))),
            Err(error) => {
                let _ = rustix::fs::unlinkat(CWD, &path, AtFlags::REMOVEDIR);
                Err(Failure::internal(
                    format!("open the cgroup {} in the guest", path.display()),
                    error,
                ))
            }
        }
    }

    fn enable<'a>(&self, controllers: impl Iterator<Item = &'a str>) -> Result<(), Failure> {
        let Some(root) = &self.root else {
            return Ok(());
        };
        let mut enabled = self.enabled.lock().unwrap_or_else(|e| e.into_inner());
        let missing: BTreeSet<&str> = controllers
            .filter(|name| !enabled.contains(*name))
            .collect();
        if missing.is_empty() {
            return Ok(());
        }
        let words: Vec<String> = missing.iter().map(|name| format!("+{name}")).collect();
        let file = root.join("cgroup.subtree_control");
        std::fs::OpenOptions::new()
            .write(true)
            .open(&file)
            .and_then(|mut file| file.write_all(words.join(" ").as_bytes()))
            .context(|| {
                format!(
                    "enable the cgroup controllers {} in the guest (does its kernel have them?)",
                    words.join(" ")
                )
            })?;
        enabled.extend(missing.into_iter().map(str::to_owned));
        Ok(())
    }
}

/// The cgroup of one container.
#[derive(Debug)]
pub struct Cgroup {
    folder: OwnedFd,
    path: PathBuf,
    /// The program that says which devices may be used in it.
    devices: Mutex<Option<Arc<OwnedFd>>>,
}

impl Cgroup {
    /// Where it is in the guest.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes all settings, or none of them.
    fn replace(&self, settings: &CgroupSettings) -> Result<(), Failure> {
        let mut before = Vec::new();
        for setting in &settings.files {
            let old = self
                .read(&setting.file)
                .map(|text| before_of(setting, &text));
            match self.set(setting, false) {
                Ok(()) => before.push((setting, old)),
                Err(failure) => {
                    for (setting, old) in before.into_iter().rev() {
                        // It was in force a moment ago.
                        let _ = old.and_then(|old| self.write(&setting.file, &old));
                    }
                    return Err(failure);
                }
            }
        }
        Ok(())
    }

    fn apply(&self, settings: &CgroupSettings, tolerant: bool) -> Result<(), Failure> {
        settings
            .files
            .iter()
            .try_for_each(|setting| self.set(setting, tolerant))
    }

    fn set(&self, setting: &Setting, tolerant: bool) -> Result<(), Failure> {
        let Setting { file, value, field } = setting;
        match self.write(file, value) {
            Ok(()) => Ok(()),
            Err(error) if tolerant && error.kind() == std::io::ErrorKind::NotFound => Ok(()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Err(Failure::invalid(
                field,
                format!("the guest's cgroups have no file {file}"),
            )),
            Err(error) => Err(Failure::invalid(
                field,
                format!("the guest's kernel refuses {value:?} in {file}: {error}"),
            )),
        }
    }

    fn open(&self, file: &str, flags: OFlags) -> std::io::Result<std::fs::File> {
        let file = rustix::fs::openat(&self.folder, file, flags | OFlags::CLOEXEC, Mode::empty())?;
        Ok(file.into())
    }

    fn write(&self, file: &str, value: &str) -> std::io::Result<()> {
        // One write: the kernel takes each as a whole value.
        let written = self.open(file, OFlags::WRONLY)?.write(value.as_bytes())?;
        if written == value.len() {
            Ok(())
        } else {
            Err(std::io::ErrorKind::WriteZero.into())
        }
    }

    fn read(&self, file: &str) -> std::io::Result<String> {
        let mut text = String::new();
        self.open(file, OFlags::RDONLY)?
            .take(MAX_FILE)
            .read_to_string(&mut text)?;
        Ok(text)
    }

    /// The processes in it, as the agent numbers them.
    pub fn pids(&self) -> Result<Vec<u32>, Failure> {
        let text = self
            .read("cgroup.procs")
            .context(|| format!("read the processes of {}", self.path.display()))?;
        Ok(text.lines().filter_map(|line| line.parse().ok()).collect())
    }

    /// Whether the kernel has killed a process in it for want of memory.
    pub fn oom_killed(&self) -> bool {
        // Without the memory controller there is no such file, and no such end.
        self.read("memory.events")
            .is_ok_and(|events| count_of(&events, "oom_kill") > 0)
    }

    /// SIGKILL to every process in it, also to those that are just being forked.
    pub fn kill(&self) -> Result<(), Failure> {
        self.write("cgroup.kill", "1")
            .context(|| format!("kill the processes of {}", self.path.display()))
    }

    /// Kills what is left in it, waits until it is empty, and removes it. Removing it again does
    /// nothing.
    pub async fn remove(&self) -> Result<(), Failure> {
        let deadline = tokio::time::Instant::now() + EMPTY_WITHIN;
        let mut pause = Duration::from_millis(1);
        let mut killed = false;
        loop {
            match rustix::fs::unlinkat(CWD, &self.path, AtFlags::REMOVEDIR) {
                Ok(()) | Err(Errno::NOENT) => return Ok(()),
                Err(Errno::BUSY) if tokio::time::Instant::now() < deadline => {}
                Err(error) => {
                    return Err(Failure::internal(
                        format!("remove the cgroup {} in the guest", self.path.display()),
                        error,
                    ));
                }
            }
            if !killed {
                self.kill()?;
                killed = true;
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_millis(100));
        }
    }
}

impl AsFd for Cgroup {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.folder.as_fd()
    }
}

/// What brings a file back to where it was; `text` is what is in it. Files of the io controller
/// have a line for each device that isn't at its default.
fn before_of(setting: &Setting, text: &str) -> String {
    let key = setting.value.split(' ').next().unwrap_or_default();
    let default = match &*setting.file {
        "io.max" => "rbps=max wbps=max riops=max wiops=max",
        "io.weight" => "default",
        _ => return text.trim_end().to_owned(),
    };
    let line = text
        .lines()
        .find(|line| line.split(' ').next() == Some(key));
    line.map_or_else(|| format!("{key} {default}"), str::to_owned)
}

/// The value of `key` in a flat-keyed cgroup file.
fn count_of(text: &str, key: &str) -> u64 {
    text.lines()
        .filter_map(|line| line.split_once(' '))
        .find(|(name, _)| *name == key)
        .and_then(|(_, value)| value.parse().ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::{Setting, before_of, count_of};

    #[test]
    fn reads_flat_keyed_files() {
        let events = "low 0\nhigh 0\nmax 12\noom 1\noom_kill 3\noom_group_kill 0\n";
        assert_eq!(count_of(events, "oom_kill"), 3);
        assert_eq!(count_of(events, "oom"), 1);
        assert_eq!(count_of(events, "absent"), 0);
        assert_eq!(count_of("oom_kill x\n", "oom_kill"), 0);
    }

    #[test]
    fn knows_what_brings_a_file_back() {
        let before = |file: &'static str, value: &str, text: &str| {
            let value = value.to_owned();
            let setting = Setting {
                file: file.into(),
                value,
                field: "f",
            };
            before_of(&setting, text)
        };
        assert_eq!(before("cpu.max", "5 10", "max 100000\n"), "max 100000");
        let text =
            "8:0 rbps=1 wbps=max riops=max wiops=max\n254:0 rbps=2 wbps=3 riops=max wiops=max\n";
        assert_eq!(
            before("io.max", "254:0 wbps=9", text),
            "254:0 rbps=2 wbps=3 riops=max wiops=max"
        );
        assert_eq!(
            before("io.max", "254:1 wbps=9", text),
            "254:1 rbps=max wbps=max riops=max wiops=max"
        );
        assert_eq!(
            before("io.weight", "default 7", "default 100\n"),
            "default 100"
        );
        assert_eq!(before("io.weight", "8:0 7", "default 100\n"), "8:0 default");
    }
}
