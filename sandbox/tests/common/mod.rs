//! A pod without a VM: the library as it is, the VMM's double, and an agent that keeps processes
//! in its memory.

mod agent;

pub use agent::FakeAgent;

use bulkhead_sandbox::config::Config;
use bulkhead_sandbox::ids::{ContainerId, ExecId, Namespace, ProcessId, SandboxId};
use bulkhead_sandbox::{CreateContainer, ExecProcess, Notification, Sandbox, StdioPaths};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;

/// Whether this host can run these tests; says so if not.
pub fn possible() -> bool {
    let possible = nix::unistd::geteuid().is_root() && bulkhead_sandbox::images::open_kvm().is_ok();
    if !possible {
        eprintln!("SKIPPED 1 test: it needs root and /dev/kvm");
    }
    possible
}

/// A network namespace that isn't this host's, and a path to it that holds as long as the file.
fn netns() -> (std::fs::File, PathBuf) {
    let made = std::thread::spawn(|| {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
        std::fs::File::open("/proc/thread-self/ns/net").unwrap()
    });
    let file = made.join().unwrap();
    let number = std::os::fd::AsRawFd::as_raw_fd(&file);
    let path = format!("/proc/{}/fd/{number}", std::process::id());
    (file, path.into())
}

/// A daemon's namespace of this test's own: the sandboxes' cgroups on the host are named by it.
fn namespace_of(dir: &tempfile::TempDir) -> Namespace {
    let name = dir.path().file_name().unwrap().to_str().unwrap();
    let name = format!("test-{}", name.trim_start_matches('.'));
    Namespace::try_from(name.as_str()).unwrap()
}

/// One sandbox and everything around it.
pub struct Pod {
    pub dir: tempfile::TempDir,
    pub sandbox: Sandbox,
    pub agent: Arc<FakeAgent>,
    /// A network namespace for a pod that names its own.
    pub netns: PathBuf,
    _netns: std::fs::File,
    /// Where templates are; without it every boot is a cold one.
    pub templates: Option<PathBuf>,
    notifications: mpsc::UnboundedReceiver<Notification>,
    mode: &'static str,
}

impl Pod {
    /// A pod whose VMM behaves as `mode` says (see the double).
    pub async fn new(mode: &'static str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let agent = FakeAgent::serve(dir.path()).await;
        let (send, notifications) = mpsc::unbounded_channel();
        let id = SandboxId::try_from("pod").unwrap();
        let namespace = namespace_of(&dir);
        let sandbox = Sandbox::new(id, namespace, send);
        let (held, netns) = netns();
        let mut image = vec![0; 4096];
        image[1024..1028].copy_from_slice(&0xE0F5_E1E2_u32.to_le_bytes());
        std::fs::write(dir.path().join("rootfs.erofs"), image).unwrap();
        Self {
            dir,
            sandbox,
            agent,
            netns,
            _netns: held,
            templates: None,
            notifications,
            mode,
        }
    }

    pub fn config(&self) -> Config {
        let own = std::env::current_exe().unwrap();
        Config {
            kernel: own,
            rootfs: self.dir.path().join("rootfs.erofs"),
            vmm: env!("CARGO_BIN_EXE_vmm-double").into(),
            runtime_dir: self.dir.path().join("run"),
            templates: self.templates.is_some(),
            template_dir: self.templates.clone().unwrap_or_default(),
            kernel_params: vec![
                format!("double.sockets={}", self.dir.path().display()),
                format!("double.mode={}", self.mode),
            ],
            ..Config::default()
        }
    }

    /// Has this pod use templates, in a folder of its own.
    pub fn with_templates(mut self) -> Self {
        self.templates = Some(self.dir.path().join("templates"));
        self
    }

    /// The daemon's namespace that its sandboxes are in.
    pub fn namespace(&self) -> String {
        namespace_of(&self.dir).to_string()
    }

    /// A second pod beside this one: of the same host, agent and configuration.
    pub fn sibling(&self) -> Sandbox {
        let (send, _) = mpsc::unbounded_channel();
        let id = SandboxId::try_from("sibling").unwrap();
        Sandbox::new(id, namespace_of(&self.dir), send)
    }

    /// A bundle whose process is `args`.
    pub fn request(&self, id: &str, args: &[&str]) -> CreateContainer {
        self.request_with(
            id,
            json!({
                "ociVersion": "1.0.2",
                "root": {"path": "rootfs"},
                "process": {"cwd": "/", "args": args, "user": {"uid": 0, "gid": 0}},
                "linux": {"namespaces": [{"type": "pid"}, {"type": "network"}]},
            }),
        )
    }

    /// A bundle with this spec, and a network namespace if it lists none.
    pub fn request_with(&self, id: &str, mut spec: serde_json::Value) -> CreateContainer {
        let namespaces = &mut spec["linux"]["namespaces"];
        let listed = namespaces.as_array_mut().map(std::mem::take);
        let mut listed = listed.unwrap_or_default();
        if listed.iter().all(|one| one["type"] != "network") {
            listed.push(json!({"type": "network"}));
        }
        *namespaces = listed.into();
        let bundles = self.dir.path().join("bundles");
        std::fs::create_dir_all(&bundles).unwrap();
        let count = std::fs::read_dir(&bundles).unwrap().count();
        let bundle = bundles.join(format!("{count}-{id}"));
        std::fs::create_dir_all(bundle.join("rootfs")).unwrap();
        std::fs::write(bundle.join("config.json"), spec.to_string()).unwrap();
        CreateContainer {
            id: ContainerId::try_from(id).unwrap(),
            bundle,
            rootfs: Vec::new(),
            stdio: StdioPaths::default(),
            config: Arc::new(self.config()),
            pod: None,
        }
    }

    pub async fn run(&self, id: &str, args: &[&str]) -> u32 {
        let pid = self.sandbox.create(self.request(id, args)).await.unwrap();
        assert_eq!(self.sandbox.start(process(id)).await.unwrap(), pid);
        pid
    }

    pub async fn add_exec(&self, container: &str, exec: &str, args: &[&str]) {
        let process = json!({"cwd": "/", "args": args, "user": {"uid": 0, "gid": 0}});
        let request = ExecProcess {
            container: ContainerId::try_from(container).unwrap(),
            exec: ExecId::try_from(exec).unwrap(),
            process: process.to_string().into_bytes(),
            stdio: StdioPaths::default(),
        };
        self.sandbox.exec(request).await.unwrap();
    }

    /// What was told so far, in short words.
    pub fn told(&mut self) -> Vec<String> {
        let mut told = Vec::new();
        while let Ok(notification) = self.notifications.try_recv() {
            told.push(match notification {
                Notification::Created { container, .. } => format!("created {container}"),
                Notification::Started { container, .. } => format!("started {container}"),
                Notification::ExecAdded { exec, .. } => format!("added {exec}"),
                Notification::ExecStarted { exec, .. } => format!("started {exec}"),
                Notification::Paused { container } => format!("paused {container}"),
                Notification::Resumed { container } => format!("resumed {container}"),
                Notification::OutOfMemory { container } => format!("oom {container}"),
                Notification::Deleted { container, .. } => format!("deleted {container}"),
                Notification::Exited { process, exit, .. } => {
                    let name = process
                        .exec
                        .map_or(process.container.to_string(), |e| e.to_string());
                    format!("exited {name} {}", exit.code)
                }
            });
        }
        told
    }

    pub fn runtime_dir(&self) -> PathBuf {
        self.dir.path().join("run")
    }

    /// Asserts that no folder, mount or VMM of this pod is left.
    pub async fn assert_nothing_left(&self) {
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        let dir = self.dir.path().to_str().unwrap();
        assert!(!mounts.contains(dir), "mounts are left:\n{mounts}");
        let left: Vec<_> = std::fs::read_dir(self.runtime_dir())
            .map(|entries| entries.map(|entry| entry.unwrap().path()).collect())
            .unwrap_or_default();
        assert!(left.is_empty(), "folders are left: {left:?}");
        for _ in 0..50 {
            if self.vmms() == 0 {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("a VMM is left");
    }

    /// How many processes have this pod's share open: only its VMMs do.
    fn vmms(&self) -> usize {
        let dir = self.runtime_dir();
        let uses = |pid: &Path| {
            let fds = std::fs::read_dir(pid.join("fd"))
                .into_iter()
                .flatten()
                .flatten();
            fds.filter_map(|fd| std::fs::read_link(fd.path()).ok())
                .any(|target| target.starts_with(&dir))
        };
        std::fs::read_dir("/proc")
            .unwrap()
            .flatten()
            .filter(|entry| {
                entry
                    .file_name()
                    .to_string_lossy()
                    .parse::<u32>()
                    .is_ok_and(|pid| pid != std::process::id())
            })
            .filter(|entry| uses(&entry.path()))
            .count()
    }
}

pub fn process(id: &str) -> ProcessId {
    ProcessId::new(id, "").unwrap()
}

pub fn exec(id: &str, exec: &str) -> ProcessId {
    ProcessId::new(id, exec).unwrap()
}
