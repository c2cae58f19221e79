//! Removing what a container left, from a process that didn't create it: the daemon runs this
//! after every lost connection, so it may be called when there is nothing to do, and twice.

use crate::error::Result;
use crate::folder::{Locator, RuntimeFolder, StateFile};
use crate::ids::ContainerId;
use crate::prepare::unmount_rootfs;
use crate::process_ref::ProcessRef;
use std::path::Path;
use std::time::Duration;

/// How long a killed process may take to end; the daemon allows 5 s for everything.
const KILL_LIMIT: Duration = Duration::from_secs(3);

/// What was found and done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CleanedUp {
    /// The VMM's pid, if one was recorded.
    pub pid: u32,
    /// The shim that drove the sandbox is gone, and so is the sandbox now.
    pub sandbox_ended: bool,
}

/// Cleans up after container `id` whose bundle is `bundle`: its mounts, and the whole sandbox if
/// `id` names it, or if its shim is gone and no other container is left in it.
///
/// # Errors
/// When the VMM can't be killed or something can't be unmounted or removed.
pub fn clean_up(bundle: &Path, id: &ContainerId) -> Result<CleanedUp> {
    let mut cleaned = CleanedUp::default();
    if let Some(locator) = Locator::read(bundle) {
        let folder = locator.runtime_folder();
        match folder.read_state()? {
            None if folder.path().exists() => {
                // The shim ended before it wrote anything down; the VMM had not begun by then.
                folder.remove()?;
                cleaned.sandbox_ended = true;
            }
            None => cleaned.sandbox_ended = true,
            Some(state) => cleaned = clean_sandbox(&folder, state, &locator.sandbox, id)?,
        }
    }
    unmount_rootfs(bundle)?;
    Ok(cleaned)
}

fn clean_sandbox(
    folder: &RuntimeFolder,
    mut state: StateFile,
    sandbox: &str,
    id: &ContainerId,
) -> Result<CleanedUp> {
    let pid = state.vmm.map_or(0, |vmm| vmm.pid);
    let known = state.containers.remove(id.as_str()).is_some();
    let shim_lives = state.shim.is_alive();
    if shim_lives && !(known && sandbox == id.as_str()) {
        // The shim does its own cleaning; it may well be serving the pod's other containers.
        return Ok(CleanedUp {
            pid,
            sandbox_ended: false,
        });
    }
    if sandbox != id.as_str() && !state.containers.is_empty() {
        folder.remove_container(id)?;
        folder.write_state(&state)?;
        return Ok(CleanedUp {
            pid,
            sandbox_ended: false,
        });
    }
    if shim_lives {
        // The daemon has given up on a shim that doesn't answer any more; nobody else will end it.
        kill(state.shim, folder)?;
    }
    if let Some(vmm) = state.vmm {
        kill(vmm, folder)?;
    }
    folder.remove()?;
    for bundle in state.containers.values() {
        unmount_rootfs(bundle)?;
    }
    Ok(CleanedUp {
        pid,
        sandbox_ended: true,
    })
}

fn kill(process: ProcessRef, folder: &RuntimeFolder) -> Result<()> {
    process.kill(KILL_LIMIT).map_err(|cause| {
        let path = folder.path().to_owned();
        crate::folder::FolderError::Io {
            verb: "kill the process of",
            path,
            cause,
        }
        .into()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host_cgroup::HostCgroup;
    use crate::ids::{Namespace, SandboxId};
    use std::collections::BTreeMap;
    use std::path::PathBuf;
    use std::process::{Child, Command};

    struct Pod {
        dir: tempfile::TempDir,
        folder: RuntimeFolder,
        vmm: Child,
    }

    fn sleeper() -> Child {
        Command::new("sleep").arg("60").spawn().unwrap()
    }

    impl Pod {
        /// A sandbox `s1` with containers `s1` and `c2` whose shim is `shim`, or gone.
        fn new(shim: Option<&Child>) -> Self {
            let dir = tempfile::tempdir().unwrap();
            let id = SandboxId::try_from("s1").unwrap();
            let namespace = Namespace::try_from("ns").unwrap();
            let folder = RuntimeFolder::new(&dir.path().join("run"), &namespace, &id);
            folder.create().unwrap();
            let vmm = sleeper();
            let cgroup = format!("/bulkhead-test-{}/s1", vmm.id());
            let cgroup = HostCgroup::named(Some(Path::new(&cgroup)), &namespace, &id).unwrap();
            let cgroup = cgroup.noting_what_is_missing();
            cgroup.place(vmm.id(), 32).unwrap();
            let gone = ProcessRef {
                pid: 1,
                start_time: u64::MAX,
            };
            let mut containers = BTreeMap::new();
            for container in ["s1", "c2"] {
                let bundle = dir.path().join(container);
                std::fs::create_dir(&bundle).unwrap();
                Locator::write(&bundle, &folder, &id).unwrap();
                containers.insert(container.to_owned(), bundle);
            }
            let state = StateFile {
                shim: shim.map_or(gone, |shim| ProcessRef::of(shim.id()).unwrap()),
                vmm: Some(ProcessRef::of(vmm.id()).unwrap()),
                containers,
                cgroup: Some(cgroup),
            };
            folder.write_state(&state).unwrap();
            Self { dir, folder, vmm }
        }

        fn clean(&self, id: &str) -> CleanedUp {
            clean_up(
                &self.dir.path().join(id),
                &ContainerId::try_from(id).unwrap(),
            )
            .unwrap()
        }

        fn cgroup_is_there(&self) -> bool {
            let name = format!("bulkhead-test-{}", self.vmm.id());
            let mut found = vec![PathBuf::from("/sys/fs/cgroup")];
            let below = std::fs::read_dir("/sys/fs/cgroup").unwrap();
            found.extend(below.map(|entry| entry.unwrap().path()));
            found.iter().any(|root| root.join(&name).exists())
        }

        fn vmm_lives(&self) -> bool {
            ProcessRef::of(self.vmm.id()).is_ok_and(ProcessRef::is_alive)
        }
    }

    impl Drop for Pod {
        fn drop(&mut self) {
            let _ = self.vmm.kill();
            let _ = self.vmm.wait();
            self.folder.remove().unwrap();
        }
    }

    #[test]
    fn after_a_dead_shim_the_sandboxs_id_ends_the_vm_and_twice_is_fine() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let pod = Pod::new(None);
        let cleaned = pod.clean("s1");
        assert_eq!(
            cleaned,
            CleanedUp {
                pid: pod.vmm.id(),
                sandbox_ended: true
            }
        );
        assert!(!pod.vmm_lives() && !pod.folder.path().exists() && !pod.cgroup_is_there());
        assert!(pod.clean("s1").sandbox_ended);
        assert!(pod.clean("c2").sandbox_ended);
    }

    #[test]
    fn after_a_dead_shim_the_last_container_ends_the_vm() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let pod = Pod::new(None);
        assert!(!pod.clean("c2").sandbox_ended);
        assert!(pod.vmm_lives(), "the pod's own container is still to come");
        assert!(pod.clean("s1").sandbox_ended);
        assert!(!pod.vmm_lives());
    }

    #[test]
    fn a_living_shim_is_left_alone_but_for_the_sandboxs_own_id() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let mut shim = sleeper();
        let pod = Pod::new(Some(&shim));
        assert!(!pod.clean("c2").sandbox_ended);
        assert!(pod.vmm_lives() && pod.folder.path().exists() && pod.cgroup_is_there());
        assert!(pod.clean("s1").sandbox_ended);
        assert!(!pod.vmm_lives());
        assert!(!ProcessRef::of(shim.id()).unwrap().is_alive());
        shim.wait().unwrap();
    }

    #[test]
    fn a_container_that_never_was_leaves_nothing_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let id = ContainerId::try_from("c1").unwrap();
        assert_eq!(clean_up(dir.path(), &id).unwrap(), CleanedUp::default());
    }
}
