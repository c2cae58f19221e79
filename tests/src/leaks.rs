//! What a host shows of sandboxes: taken before and after a test, the two must be equal.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, Instant};

/// Processes, mounts, files below /run, and cgroups.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Snapshot {
    entries: BTreeSet<String>,
}

impl Snapshot {
    /// Looks at everything that a sandbox could leave behind, as seen in this mount and process
    /// namespace. This process itself isn't counted, nor are folders and files that match one of
    /// `ignored` by a part of their path.
    pub fn take(ignored: &[&str]) -> Self {
        let mut entries = BTreeSet::new();
        processes(&mut entries);
        for line in std::fs::read_to_string("/proc/self/mounts")
            .unwrap_or_default()
            .lines()
        {
            entries.insert(format!("mount {line}"));
        }
        tree(Path::new("/run"), "file", &mut entries);
        cgroups(
            Path::new("/sys/fs/cgroup"),
            &crate::namespace(),
            &mut entries,
        );
        entries.retain(|entry| !ignored.iter().any(|part| entry.contains(part)));
        Self { entries }
    }

    /// What is here and wasn't in `before`.
    pub fn added_since(&self, before: &Self) -> Vec<String> {
        self.entries.difference(&before.entries).cloned().collect()
    }

    /// Waits, up to 15 s, until nothing is here that wasn't in `self`: a shim leaves just after it
    /// has answered its last call.
    ///
    /// # Panics
    /// When something is left.
    #[track_caller]
    pub fn assert_nothing_added(&self, ignored: &[&str]) {
        let end = Instant::now() + Duration::from_secs(15);
        loop {
            let added = Self::take(ignored).added_since(self);
            if added.is_empty() {
                return;
            }
            assert!(
                Instant::now() < end,
                "left behind:\n  {}",
                added.join("\n  ")
            );
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

fn processes(entries: &mut BTreeSet<String>) {
    let own = std::process::id().to_string();
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let pid = entry.file_name().to_string_lossy().into_owned();
        if !pid.bytes().all(|byte| byte.is_ascii_digit()) || pid == own {
            continue;
        }
        let stat = std::fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        let state = stat
            .rsplit(')')
            .next()
            .unwrap_or("")
            .split_whitespace()
            .next();
        // Gone meanwhile, or a zombie that its parent is about to reap.
        if matches!(state, None | Some("Z" | "X")) {
            continue;
        }
        let command = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let command = String::from_utf8_lossy(&command).replace('\0', " ");
        entries.insert(format!("process {pid} {command}"));
    }
}

fn tree(folder: &Path, kind: &str, entries: &mut BTreeSet<String>) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        entries.insert(format!("{kind} {}", path.display()));
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            tree(&path, kind, entries);
        }
    }
}

/// Cgroups as daemons name them for containers of `namespace`. Others belong to other scenarios, or
/// to the host's other business, and come and go as they like.
fn cgroups(folder: &Path, namespace: &str, entries: &mut BTreeSet<String>) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            let path = entry.path();
            if path
                .iter()
                .any(|part| part.to_string_lossy().trim_start_matches("bulkhead-") == namespace)
            {
                entries.insert(format!("cgroup {}", path.display()));
            }
            cgroups(&path, namespace, entries);
        }
    }
}

/// The processes of this namespace whose program has this file name.
pub fn processes_of(program: &str) -> Vec<nix::unistd::Pid> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        else {
            continue;
        };
        let exe = std::fs::read_link(entry.path().join("exe")).unwrap_or_default();
        if exe.file_name().is_some_and(|name| name == program) {
            found.push(nix::unistd::Pid::from_raw(pid));
        }
    }
    found
}

/// The paths of listening Unix sockets below /run, as this namespace's files show them.
pub fn sockets_below_run() -> Vec<std::path::PathBuf> {
    use std::os::unix::fs::FileTypeExt;
    let mut found = Vec::new();
    let mut folders = vec![std::path::PathBuf::from("/run")];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => folders.push(entry.path()),
                Ok(kind) if kind.is_socket() => found.push(entry.path()),
                _ => {}
            }
        }
    }
    found
}
