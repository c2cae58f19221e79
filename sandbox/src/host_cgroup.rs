//! The pod's cgroup on the host, in which its VMM runs. There the host's tools see what the pod
//! takes, and there ends what a guest can make its VMM take: memory, above all, which a hostile
//! guest could touch beyond what it was given.
//!
//! It is the cgroup that `linux.cgroupsPath` of the sandbox's own spec names, on cgroup v2 as on v1.
//! The containers' own cgroups are in the guest.

use crate::ids::{Namespace, SandboxId};
use libcgroups::common::{
    AnyCgroupManager, CgroupConfig, CgroupManager, ControllerOpt, create_cgroup_manager,
};
use nix_of_libcgroups::unistd::Pid;
use oci_spec::runtime::{LinuxMemory, LinuxResources};
use serde::{Deserialize, Serialize};
use std::path::{Component, Path, PathBuf};

/// Where cgroup hierarchies are mounted: v2's own, or one folder for each of v1's.
const MOUNT: &str = "/sys/fs/cgroup";

/// Memory in MiB that a VMM may take beside the guest's: its own, and what the kernel keeps for it.
const VMM_MIB: u64 = 128;

/// The kernel's tables for a guest's memory, as a part of that memory.
const TABLES_PART: u64 = 16;

/// How often a cgroup is made anew that goes while it is made.
const ATTEMPTS: usize = 3;

const MIB: u64 = 1024 * 1024;

/// A cgroup that can't be made, used or removed.
#[derive(Debug, thiserror::Error)]
#[error("cannot {verb} the host cgroup {path} (linux.cgroupsPath): {cause}", path = .path.display())]
pub struct HostCgroupError {
    /// What was tried.
    pub verb: &'static str,
    /// The cgroup's path.
    pub path: PathBuf,
    /// Why it failed.
    pub cause: String,
}

/// A sandbox's cgroup on the host. It may not be there yet, or no more.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct HostCgroup {
    /// Below the hierarchies' roots; or systemd's `slice:prefix:name`.
    path: PathBuf,
    /// The topmost folder on the way there that goes with this sandbox, if nobody else uses it.
    made: Option<PathBuf>,
}

impl HostCgroup {
    /// The cgroup of the sandbox `id`, whose spec names `path`; a spec without one gets
    /// `/bulkhead-NAMESPACE/ID`.
    ///
    /// # Errors
    /// What is wrong with the path.
    pub fn named(
        path: Option<&Path>,
        namespace: &Namespace,
        id: &SandboxId,
    ) -> Result<Self, String> {
        let own = PathBuf::from(format!("/bulkhead-{namespace}"));
        let path = match path.filter(|path| !path.as_os_str().is_empty()) {
            None => own.join(id),
            Some(path) if is_unit(path) => path.to_owned(),
            Some(path) => Path::new("/").join(path),
        };
        let only_names = |path: &Path| {
            path.components()
                .all(|part| matches!(part, Component::RootDir | Component::Normal(_)))
        };
        if !only_names(&path) {
            return Err("may not hold \"..\"".into());
        }
        if path == Path::new("/") {
            return Err("is the host's root cgroup; it must name one of the sandbox's own".into());
        }
        // Folders that hold nothing but sandboxes of this namespace: ours, and containerd's default.
        let shared = [own, Path::new("/").join(namespace)];
        let made = path
            .parent()
            .filter(|parent| shared.iter().any(|own| own == parent));
        let made = made.map(Path::to_owned);
        Ok(Self { path, made })
    }

    /// Its path below the hierarchies' roots, or its unit.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The same, with what isn't there of its path by now written down: it goes with the sandbox.
    pub fn noting_what_is_missing(mut self) -> Self {
        if is_unit(&self.path) || self.made.is_some() {
            return self;
        }
        let missing = |path: &&Path| folders(path).all(|folder| !folder.exists());
        // From the cgroup itself upwards, as far as nothing is there.
        let made = self.path.ancestors().take_while(missing).last();
        self.made = made.map(Path::to_owned);
        self
    }

    /// Puts the VMM `pid` there and bounds its memory.
    ///
    /// # Errors
    /// When the cgroup can't be made, isn't the sandbox's alone, or doesn't take the VMM.
    pub fn place(&self, pid: u32, guest_mib: u64) -> Result<(), HostCgroupError> {
        if !is_unit(&self.path) && !folders(&self.path).all(|folder| is_free(&folder)) {
            let cause = "there are processes in it; a sandbox needs one of its own";
            return Err(self.failed("use")(cause.into()));
        }
        let pid = i32::try_from(pid).map_err(|error| self.failed("use")(error.to_string()))?;
        let mut attempts = 0..ATTEMPTS;
        while let Err(error) = self.manager()?.add_task(Pid::from_raw(pid)) {
            // Another sandbox's end may have taken a folder that was empty.
            if attempts.next().is_none() || is_unit(&self.path) {
                return Err(self.failed("put the VMM into")(error.to_string()));
            }
        }
        self.allow_memory(guest_mib)
    }

    /// Lets the VMM take `guest_mib` MiB for its guest's memory, and its own.
    ///
    /// # Errors
    /// When the limit can't be set.
    pub fn allow_memory(&self, guest_mib: u64) -> Result<(), HostCgroupError> {
        let mut memory = LinuxMemory::default();
        memory.set_limit(i64::try_from(bound_mib(guest_mib).saturating_mul(MIB)).ok());
        let mut resources = LinuxResources::default();
        resources.set_devices(None);
        resources.set_memory(Some(memory));
        let limits = ControllerOpt {
            resources: &resources,
            disable_oom_killer: false,
            oom_score_adj: None,
            freezer_state: None,
        };
        self.manager()?
            .apply(&limits)
            .map_err(|error| self.failed("limit the memory of")(error.to_string()))
    }

    /// Removes it, and the folders above that came with it unless others use them. Whatever still
    /// runs there is killed. Nothing is wrong if it isn't there.
    ///
    /// # Errors
    /// When it can't be removed.
    pub fn remove(&self) -> Result<(), HostCgroupError> {
        self.manager()?
            .remove()
            .map_err(|error| self.failed("remove")(error.to_string()))?;
        let Some(made) = &self.made else {
            return Ok(());
        };
        let above = self.path.ancestors().skip(1);
        for path in above.take_while(|path| path.starts_with(made)) {
            // Another sandbox may be below by now.
            folders(path).for_each(|folder| drop(std::fs::remove_dir(folder)));
        }
        Ok(())
    }

    fn manager(&self) -> Result<AnyCgroupManager, HostCgroupError> {
        let config = CgroupConfig {
            cgroup_path: self.path.clone(),
            systemd_cgroup: is_unit(&self.path),
            container_name: String::new(),
        };
        create_cgroup_manager(config).map_err(|error| self.failed("reach")(error.to_string()))
    }

    fn failed(&self, verb: &'static str) -> impl FnOnce(String) -> HostCgroupError {
        let path = self.path.clone();
        move |cause| HostCgroupError { verb, path, cause }
    }
}

/// systemd's form: `slice:prefix:name`.
fn is_unit(path: &Path) -> bool {
    let text = path.to_string_lossy();
    !text.contains('/') && text.split(':').count() == 3
}

fn bound_mib(guest_mib: u64) -> u64 {
    guest_mib
        .saturating_add(guest_mib / TABLES_PART)
        .saturating_add(VMM_MIB)
}

/// The folders of `path` in all hierarchies.
fn folders(path: &Path) -> impl Iterator<Item = PathBuf> {
    let below = path.strip_prefix("/").unwrap_or(path).to_owned();
    let unified = Path::new(MOUNT).join("cgroup.controllers").exists();
    let roots = if unified {
        vec![PathBuf::from(MOUNT)]
    } else {
        let entries = std::fs::read_dir(MOUNT).into_iter().flatten().flatten();
        entries.map(|entry| entry.path()).collect()
    };
    roots.into_iter().map(move |root| root.join(&below))
}

/// No process is there.
fn is_free(folder: &Path) -> bool {
    std::fs::read_to_string(folder.join("cgroup.procs"))
        .map_or(true, |processes| processes.trim().is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(path: &str) -> Result<HostCgroup, String> {
        let (namespace, id) = (Namespace::try_from("ns"), SandboxId::try_from("s1"));
        HostCgroup::named(Some(Path::new(path)), &namespace.unwrap(), &id.unwrap())
    }

    #[test]
    fn paths_are_taken_as_runtimes_take_them() {
        let named = |path: &str| at(path).map(|cgroup| cgroup.path);
        assert_eq!(
            named("/kubepods/pod1/c1").unwrap(),
            Path::new("/kubepods/pod1/c1")
        );
        assert_eq!(named("pods/c1").unwrap(), Path::new("/pods/c1"));
        assert_eq!(
            named("a.slice:cri:c1").unwrap(),
            Path::new("a.slice:cri:c1")
        );
        assert_eq!(named("").unwrap(), Path::new("/bulkhead-ns/s1"));
        for bad in ["/", "/pods/../../c1", "../c1"] {
            assert!(named(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_bound_leaves_room_and_does_not_overflow() {
        assert_eq!(bound_mib(128), 128 + 8 + 128);
        assert_eq!(bound_mib(u64::MAX), u64::MAX);
    }

    #[test]
    fn a_process_is_placed_and_bounded_and_nothing_is_left() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let parent = format!("/bulkhead-test-{}", std::process::id());
        let path = format!("{parent}/pod/s1");
        let cgroup = at(&path).unwrap().noting_what_is_missing();
        assert_eq!(cgroup.made.as_deref(), Some(Path::new(&parent)));
        cgroup.remove().unwrap();
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        cgroup.place(child.id(), 64).unwrap();
        let shown = std::fs::read_to_string(format!("/proc/{}/cgroup", child.id())).unwrap();
        assert!(shown.lines().any(|line| line.ends_with(&path)), "{shown}");
        let limits = folders(Path::new(&path)).find_map(|folder| {
            ["memory.max", "memory.limit_in_bytes"]
                .iter()
                .find_map(|name| std::fs::read_to_string(folder.join(name)).ok())
        });
        assert_eq!(limits.unwrap().trim(), (bound_mib(64) * MIB).to_string());
        // It isn't for anybody else, and not for long.
        let other = at(&path).unwrap();
        assert!(
            other
                .noting_what_is_missing()
                .place(std::process::id(), 64)
                .is_err()
        );
        cgroup.remove().unwrap();
        assert!(!child.wait().unwrap().success());
        cgroup.remove().unwrap();
        assert!(folders(Path::new(&parent)).all(|folder| !folder.exists()));
    }
}
