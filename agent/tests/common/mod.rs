//! A real agent outside of a guest, driven over its real protocol: containers in these tests are
//! real, only their kernel is the host's.
#![allow(dead_code, reason = "no test program uses all of it")]

use bulkhead_proto::agent::{
    AgentClient, CreateRequest, DeleteRequest, ExecRequest, IdentifyRequest, PauseRequest,
    PidsRequest, PrepareRequest, Process, ResizeRequest, ResumeRequest, SignalRequest,
    StartRequest, StatsRequest, StatsResponse, Streams, UpdateRequest, WaitRequest, WaitResponse,
};
use serde_json::{Value, json};
use std::io::ErrorKind;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

/// Everything takes milliseconds here; this only ends tests that hang.
const PATIENCE: Duration = Duration::from_secs(30);

/// Whether this host can run the tests; says so if it can't, since a test that is left out should
/// be seen.
pub fn host_is_able() -> bool {
    let root = rustix::process::geteuid().is_root();
    let busybox = Path::new("/bin/busybox").exists() || Path::new("/usr/bin/busybox").exists();
    if !(root && busybox) {
        eprintln!("SKIPPED 1 test: it needs root ({root}) and a static busybox ({busybox})");
    }
    root && busybox
}

/// Waits until somebody listens at `socket`. That its file is there doesn't say so yet: bind makes
/// it, and until listen follows, a connection is refused.
async fn wait_for_listener(socket: &Path) {
    let deadline = std::time::Instant::now() + PATIENCE;
    while let Err(error) = UnixStream::connect(socket).await {
        let soon = matches!(
            error.kind(),
            ErrorKind::NotFound | ErrorKind::ConnectionRefused
        );
        assert!(
            soon && std::time::Instant::now() < deadline,
            "the agent doesn't listen at {}: {error}",
            socket.display()
        );
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// A running agent with its folder.
pub struct Agent {
    process: Running,
    folder: tempfile::TempDir,
    cgroup: Option<CgroupFolder>,
    pub client: AgentClient,
    next_token: AtomicU64,
}

impl Agent {
    pub async fn start() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let cgroup = cgroup_folder();
        let mut command = Command::new(env!("CARGO_BIN_EXE_bulkhead-agent"));
        command.arg("--listen-unix").arg(folder.path());
        if let Some(cgroup) = &cgroup {
            command.arg("--cgroup").arg(&cgroup.0);
        }
        let process = command
            .stdin(Stdio::null())
            .spawn()
            .expect("the agent starts");
        let process = Running(process);
        for socket in ["agent.sock", "stream.sock", "forward.sock"] {
            wait_for_listener(&folder.path().join(socket)).await;
        }
        let address = format!("unix://{}", folder.path().join("agent.sock").display());
        let client = ttrpc::asynchronous::Client::connect(&address)
            .await
            .expect("connected");
        Self {
            process,
            folder,
            cgroup,
            client: AgentClient::new(client),
            next_token: AtomicU64::new(1),
        }
    }

    /// Whether limits for cpu, memory and pids can be set below its cgroup.
    pub fn has_controllers(&self) -> bool {
        self.enable("+cpu +memory +pids")
    }

    /// The cgroup of a container.
    pub fn cgroup_of(&self, id: &str) -> Option<PathBuf> {
        Some(self.cgroup.as_ref()?.0.join(format!("container-{id}")))
    }

    pub fn pid(&self) -> u32 {
        self.process.0.id()
    }

    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// A rootfs with busybox in it.
    pub fn rootfs(&self, name: &str) -> PathBuf {
        let root = self.folder.path().join(name);
        for folder in ["bin", "dev", "proc", "sys", "tmp", "etc", "root"] {
            std::fs::create_dir_all(root.join(folder)).expect("a folder");
        }
        let busybox = ["/bin/busybox", "/usr/bin/busybox"]
            .into_iter()
            .find(|path| Path::new(path).exists());
        // Copied by another process: what this one has open for writing, an agent that another
        // test is just starting may have too, and then it can't be executed (ETXTBSY).
        let copied = Command::new("cp")
            .arg(busybox.expect("busybox"))
            .arg(root.join("bin/busybox"))
            .status();
        assert!(copied.expect("cp").success());
        for applet in [
            "sh", "cat", "sleep", "true", "id", "hostname", "stty", "ls", "readlink", "touch",
            "mount", "grep", "env", "pwd", "head", "wc", "kill", "ip", "dd", "ulimit", "stat",
            "tty", "seq", "printf", "rm", "mkdir", "echo",
        ] {
            symlink("busybox", root.join("bin").join(applet)).expect("a link");
        }
        std::fs::write(
            root.join("etc/passwd"),
            "root:x:0:0::/root:/bin/sh\nweb:x:1000:1000::/home/web:/bin/sh\n",
        )
        .expect("a file");
        root
    }

    /// A spec as containerd makes it, for `args` in the rootfs `name`.
    pub fn spec(&self, name: &str, args: &[&str]) -> Value {
        let root = self.rootfs(name);
        let capabilities = [
            "CAP_CHOWN",
            "CAP_KILL",
            "CAP_SETUID",
            "CAP_SETGID",
            "CAP_NET_BIND_SERVICE",
        ];
        json!({
            "ociVersion": "1.2.0",
            "root": {"path": root},
            "hostname": "inside",
            "process": {
                "args": args,
                "cwd": "/",
                "env": ["PATH=/bin"],
                "user": {"uid": 0, "gid": 0},
                "noNewPrivileges": true,
                "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 1024, "hard": 1024}],
                "capabilities": {"bounding": capabilities, "effective": capabilities, "permitted": capabilities},
            },
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
                {"destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
                {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]},
                {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": ["nosuid", "noexec", "nodev"]},
                {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]},
            ],
            "linux": {
                "namespaces": [{"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, {"type": "network"}],
                "maskedPaths": ["/proc/kcore", "/proc/keys", "/proc/acpi", "/sys/firmware"],
                "readonlyPaths": ["/proc/sys", "/proc/bus"],
                "resources": {"devices": [{"allow": false, "access": "rwm"}]},
            },
        })
    }

    pub async fn dial(&self) -> (u64, UnixStream) {
        let token = self.next_token.fetch_add(1, Ordering::Relaxed);
        let mut stream = UnixStream::connect(self.path().join("stream.sock"))
            .await
            .expect("connected");
        stream.write_all(&token.to_le_bytes()).await.expect("sent");
        (token, stream)
    }

    pub async fn streams(&self) -> (Streams, [UnixStream; 3]) {
        let (stdin_token, stdin) = self.dial().await;
        let (stdout_token, stdout) = self.dial().await;
        let (stderr_token, stderr) = self.dial().await;
        let tokens = Streams {
            stdin_token,
            stdout_token,
            stderr_token,
            ..Default::default()
        };
        (tokens, [stdin, stdout, stderr])
    }

    pub async fn create(&self, id: &str, spec: &Value, streams: Streams) -> ttrpc::Result<u32> {
        let request = CreateRequest {
            container_id: id.to_owned(),
            spec_json: serde_json::to_vec(spec).expect("JSON"),
            streams: Some(streams).into(),
            terminal_rows: 33,
            terminal_columns: 101,
            ..Default::default()
        };
        Ok(self.client.create(context(), &request).await?.guest_pid)
    }

    pub async fn start_container(&self, id: &str) -> ttrpc::Result<()> {
        let request = StartRequest {
            container_id: id.to_owned(),
            ..Default::default()
        };
        self.client.start(context(), &request).await.map(drop)
    }

    pub async fn exec(
        &self,
        id: &str,
        exec_id: &str,
        process: &Value,
        streams: Streams,
    ) -> ttrpc::Result<u32> {
        let request = ExecRequest {
            container_id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            process_json: serde_json::to_vec(process).expect("JSON"),
            streams: Some(streams).into(),
            ..Default::default()
        };
        Ok(self.client.exec(context(), &request).await?.guest_pid)
    }

    pub async fn wait(&self, id: &str, exec_id: &str) -> ttrpc::Result<WaitResponse> {
        let request = WaitRequest {
            process: Some(process(id, exec_id)).into(),
            ..Default::default()
        };
        self.client.wait(context(), &request).await
    }

    pub async fn delete(&self, id: &str, exec_id: &str) -> ttrpc::Result<()> {
        let request = DeleteRequest {
            process: Some(process(id, exec_id)).into(),
            ..Default::default()
        };
        self.client.delete(context(), &request).await.map(drop)
    }

    pub async fn signal(
        &self,
        id: &str,
        exec_id: &str,
        signal: u32,
        all: bool,
    ) -> ttrpc::Result<()> {
        let request = SignalRequest {
            process: Some(process(id, exec_id)).into(),
            signal,
            all,
            ..Default::default()
        };
        self.client.signal(context(), &request).await.map(drop)
    }

    pub async fn pids(&self, id: &str) -> ttrpc::Result<Vec<u32>> {
        let request = PidsRequest {
            container_id: id.to_owned(),
            ..Default::default()
        };
        Ok(self.client.pids(context(), &request).await?.guest_pids)
    }

    pub async fn resize(
        &self,
        id: &str,
        exec_id: &str,
        rows: u32,
        columns: u32,
    ) -> ttrpc::Result<()> {
        let request = ResizeRequest {
            process: Some(process(id, exec_id)).into(),
            rows,
            columns,
            ..Default::default()
        };
        self.client.resize(context(), &request).await.map(drop)
    }

    pub async fn pause(&self, id: &str) -> ttrpc::Result<()> {
        let request = PauseRequest {
            container_id: id.to_owned(),
            ..Default::default()
        };
        self.client.pause(context(), &request).await.map(drop)
    }

    pub async fn resume(&self, id: &str) -> ttrpc::Result<()> {
        let request = ResumeRequest {
            container_id: id.to_owned(),
            ..Default::default()
        };
        self.client.resume(context(), &request).await.map(drop)
    }

    pub async fn stats(&self, id: &str) -> ttrpc::Result<StatsResponse> {
        let request = StatsRequest {
            container_id: id.to_owned(),
            ..Default::default()
        };
        self.client.stats(context(), &request).await
    }

    pub async fn update(&self, id: &str, resources: &Value) -> ttrpc::Result<()> {
        let request = UpdateRequest {
            container_id: id.to_owned(),
            resources_json: serde_json::to_vec(resources).expect("JSON"),
            ..Default::default()
        };
        self.client.update(context(), &request).await.map(drop)
    }

    /// Whether the controllers of `words`, such as "+hugetlb", can be had below its cgroup.
    pub fn enable(&self, words: &str) -> bool {
        let Some(CgroupFolder(folder)) = &self.cgroup else {
            return false;
        };
        let enable = |folder: &Path| std::fs::write(folder.join("cgroup.subtree_control"), words);
        folder.parent().is_some_and(|root| enable(root).is_ok()) && enable(folder).is_ok()
    }

    pub async fn prepare(&self) -> ttrpc::Result<()> {
        let request = PrepareRequest::default();
        self.client.prepare(context(), &request).await.map(drop)
    }

    pub async fn identify(&self, generation_id: &[u8]) -> ttrpc::Result<Vec<u8>> {
        let request = IdentifyRequest {
            entropy: vec![5; 32],
            wall_seconds: 1_700_000_000,
            wall_nanos: 1,
            hostname: "guest".to_owned(),
            generation_id: generation_id.to_vec(),
            ..Default::default()
        };
        Ok(self
            .client
            .identify(context(), &request)
            .await?
            .generation_id)
    }

    /// Runs a container to its end: exit status, output and error output.
    pub async fn run(&self, id: &str, spec: &Value) -> (u32, String, String) {
        let (tokens, [stdin, mut stdout, mut stderr]) = self.streams().await;
        self.create(id, spec, tokens).await.expect("created");
        drop(stdin);
        self.start_container(id).await.expect("started");
        let (mut out, mut err) = (String::new(), String::new());
        stdout.read_to_string(&mut out).await.expect("output");
        stderr.read_to_string(&mut err).await.expect("error output");
        let exit = self.wait(id, "").await.expect("waited");
        self.delete(id, "").await.expect("deleted");
        (exit.exit_status, out, err)
    }

    /// What a container of this agent's would leave behind.
    pub fn assert_nothing_left(&self) {
        let children = std::fs::read_to_string(format!("/proc/{0}/task/{0}/children", self.pid()))
            .unwrap_or_default();
        assert_eq!(children.trim(), "", "processes are left");
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").expect("mounts");
        assert!(
            !mounts.contains(&*self.path().to_string_lossy()),
            "mounts are left"
        );
        if let Some(cgroup) = &self.cgroup {
            let left: Vec<_> = std::fs::read_dir(&cgroup.0)
                .expect("the cgroup")
                .flatten()
                .filter(|entry| entry.path().is_dir())
                .collect();
            assert!(left.is_empty(), "cgroups are left: {left:?}");
        }
    }
}

/// The agent's process, which ends with the test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A cgroup that is removed with the test, and with it what a failed test has left in it.
struct CgroupFolder(PathBuf);

impl Drop for CgroupFolder {
    fn drop(&mut self) {
        for entry in std::fs::read_dir(&self.0).into_iter().flatten().flatten() {
            if entry.path().is_dir() {
                let _ = std::fs::write(entry.path().join("cgroup.kill"), "1");
                std::thread::sleep(Duration::from_millis(50));
                let _ = std::fs::remove_dir(entry.path());
            }
        }
        let _ = std::fs::remove_dir(&self.0);
    }
}

/// A new cgroup v2 folder of the host's, if it has any; its controllers may be missing.
fn cgroup_folder() -> Option<CgroupFolder> {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"]
        .into_iter()
        .map(Path::new)
        .find(|root| root.join("cgroup.procs").exists() && root.join("cgroup.controllers").exists())
        .map(|root| {
            root.join(format!(
                "bulkhead-agent-test-{}-{number}",
                std::process::id()
            ))
        })
        .filter(|folder| std::fs::create_dir(folder).is_ok())
        .map(CgroupFolder)
}

fn process(id: &str, exec_id: &str) -> Process {
    Process {
        container_id: id.to_owned(),
        exec_id: exec_id.to_owned(),
        ..Default::default()
    }
}

fn context() -> ttrpc::context::Context {
    ttrpc::context::with_duration(PATIENCE)
}

/// The ttrpc status code and message of a failed call.
pub fn status<T: std::fmt::Debug>(result: ttrpc::Result<T>) -> (ttrpc::Code, String) {
    match result.expect_err("it should fail") {
        ttrpc::Error::RpcStatus(status) => (status.code(), status.message),
        other => panic!("not a status: {other}"),
    }
}

/// `spec` with the value at `pointer` replaced or added.
pub fn with(mut spec: Value, pointer: &str, value: Value) -> Value {
    let (parent, key) = pointer.rsplit_once('/').expect("a pointer");
    match spec.pointer_mut(parent).expect("a parent") {
        Value::Array(list) if key == "-" => list.push(value),
        Value::Array(list) => list[key.parse::<usize>().expect("an index")] = value,
        parent => parent[key] = value,
    }
    spec
}

pub async fn read_all(mut stream: UnixStream) -> String {
    let mut text = Vec::new();
    stream.read_to_end(&mut text).await.expect("output");
    String::from_utf8_lossy(&text).into_owned()
}
