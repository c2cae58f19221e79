//! What a container sees of itself, gathered by one command, since each further process costs a
//! second or more where guest kernel mode is emulated.

use std::collections::HashMap;

/// Shell script that prints each of [`FILES`] under a header line, then [`END`].
pub fn script() -> String {
    format!(
        "echo pid $$; echo cwd $PWD; tail -n +1 {} 2>/dev/null; echo '{END}'",
        FILES.join(" ")
    )
}

/// Last line of the output; a header itself, so that it belongs to no file.
pub const END: &str = "==> end <==";

const FILES: [&str; 14] = [
    "/proc/sys/kernel/osrelease",
    "/proc/sys/kernel/hostname",
    "/proc/self/status",
    "/proc/self/limits",
    "/proc/self/mounts",
    "/proc/self/cgroup",
    "/proc/self/environ",
    "/proc/net/dev",
    "/proc/keys",
    "/sys/devices/system/cpu/online",
    // In the container's cgroup, and from the root of the tree for one without a cgroup namespace.
    "/sys/fs/cgroup/memory.max",
    "/sys/fs/cgroup/cpu.max",
    "/sys/fs/cgroup/*/memory.max",
    "/sys/fs/cgroup/*/cpu.max",
];

/// The script's output, by file.
#[derive(Debug)]
pub struct Facts {
    files: HashMap<String, String>,
}

impl Facts {
    pub fn parse(output: &str) -> Self {
        let mut files = HashMap::new();
        let mut current = String::new();
        for line in output.lines() {
            let header = line
                .strip_prefix("==> ")
                .and_then(|rest| rest.strip_suffix(" <=="));
            match header {
                Some(path) => current = path.to_owned(),
                None => {
                    let text: &mut String = files.entry(current.clone()).or_default();
                    text.push_str(line);
                    text.push('\n');
                }
            }
        }
        Self { files }
    }

    /// A file's text.
    #[track_caller]
    pub fn file(&self, path: &str) -> &str {
        match self.files.get(path) {
            Some(text) => text.trim_end(),
            None => panic!("the container has no {path}: {:?}", self.files),
        }
    }

    /// A file of the container's own cgroup. Daemons on hosts with cgroup v1 ask for no cgroup
    /// namespace, and then the container sees the whole tree.
    #[track_caller]
    pub fn cgroup(&self, name: &str) -> &str {
        let inside = format!("/sys/fs/cgroup/{name}");
        let group = self.file("/proc/self/cgroup").trim_start_matches("0::");
        let from_root = format!("/sys/fs/cgroup{}/{name}", group.trim_end_matches('/'));
        if self.files.contains_key(&from_root) {
            self.file(&from_root)
        } else {
            self.file(&inside)
        }
    }

    /// What `echo` printed before the first file.
    pub fn shell(&self, name: &str) -> &str {
        let said = self.files.get("").map_or("", String::as_str);
        said.lines()
            .find_map(|line| line.strip_prefix(name))
            .unwrap_or_default()
            .trim()
    }

    /// A field of /proc/self/status.
    #[track_caller]
    pub fn status(&self, field: &str) -> String {
        let status = self.file("/proc/self/status");
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
        line.unwrap_or_default()
            .split_whitespace()
            .collect::<Vec<_>>()
            .join(" ")
    }

    /// The options of what is mounted at a path.
    pub fn mount_options(&self, target: &str) -> Option<String> {
        self.file("/proc/self/mounts").lines().find_map(|line| {
            let mut fields = line.split(' ').skip(1);
            (fields.next()? == target)
                .then(|| fields.nth(1).map(str::to_owned))
                .flatten()
        })
    }
}
