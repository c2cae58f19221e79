//! Cgroups that somebody else than the runtime makes, as kubelet makes one for each pod.

use crate::error::{Context, Result};
use std::path::{Path, PathBuf};

const MOUNT: &str = "/sys/fs/cgroup";

/// A cgroup in all hierarchies of this host, v2's or v1's, below one of this scenario's own. Goes
/// when it is dropped.
#[derive(Debug)]
pub struct Cgroup {
    path: String,
}

impl Cgroup {
    /// Makes one.
    ///
    /// # Errors
    /// When a folder can't be made.
    pub fn make(name: &str) -> Result<Self> {
        let path = format!("/{}/{name}", crate::namespace());
        let this = Self { path };
        for folder in folders(&this.path) {
            std::fs::create_dir_all(&folder).context(|| format!("make {}", folder.display()))?;
        }
        Ok(this)
    }

    /// Its path below the roots of the hierarchies.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The names of the cgroups in it, and how many processes they have in all.
    pub fn below(&self) -> (Vec<String>, usize) {
        let mut names = Vec::new();
        let mut processes = 0;
        for folder in folders(&self.path) {
            for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
                let file = entry.path().join("cgroup.procs");
                if let Ok(pids) = std::fs::read_to_string(file) {
                    names.push(entry.file_name().to_string_lossy().into_owned());
                    processes = processes.max(pids.lines().count());
                }
            }
        }
        names.sort();
        names.dedup();
        (names, processes)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        for folder in folders(&self.path) {
            let _ = std::fs::remove_dir(&folder);
            let _ = folder.parent().map(std::fs::remove_dir);
        }
    }
}

/// Removes what an earlier run of this scenario has left that was killed.
pub fn remove_leftovers() {
    let namespace = crate::namespace();
    remove(&format!("bulkhead-{namespace}"));
    remove(&namespace);
}

/// Removes the folders of this name, whose processes have ended, from every hierarchy.
pub fn remove(name: &str) {
    folders(name).iter().for_each(|folder| remove_tree(folder));
    // runc makes one in the hybrid layout's v2 tree, too.
    remove_tree(&Path::new(MOUNT).join("unified").join(name));
}

/// A cgroup goes by rmdir, from the leaves upwards.
fn remove_tree(folder: &Path) {
    let Ok(entries) = std::fs::read_dir(folder) else {
        return;
    };
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_tree(&entry.path());
        }
    }
    // Processes that were just killed may take a moment to leave.
    for _ in 0..50 {
        if std::fs::remove_dir(folder).is_ok() || !folder.exists() {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    eprintln!("the cgroup {} is left", folder.display());
}

fn folders(path: &str) -> Vec<PathBuf> {
    let below = path.trim_start_matches('/');
    let root = Path::new(MOUNT);
    if root.join("cgroup.controllers").exists() {
        return vec![root.join(below)];
    }
    let hierarchies = std::fs::read_dir(root).into_iter().flatten().flatten();
    hierarchies
        .map(|entry| entry.path())
        // The hybrid layout's v2 tree has no controllers.
        .filter(|path| path.is_dir() && !path.is_symlink() && !path.ends_with("unified"))
        .map(|path| path.join(below))
        .collect()
}
