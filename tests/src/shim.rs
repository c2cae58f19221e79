//! A shim without containerd: started by its command line, driven through ttrpc by either version
//! of the Task service.

use crate::artifacts::Artifacts;
use crate::containerd::{Finished, search_path, shim_config};
use crate::error::{Context, Error, Result};
use containerd_shim_protos::api;
use protobuf::Message;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;
use tempfile::TempDir;

/// Which Task service a call goes to; both have the same messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TaskVersion {
    /// `containerd.task.v2.Task`
    V2,
    /// `containerd.task.v3.Task`
    V3,
}

impl TaskVersion {
    fn service(self) -> &'static str {
        match self {
            TaskVersion::V2 => "containerd.task.v2.Task",
            TaskVersion::V3 => "containerd.task.v3.Task",
        }
    }
}

/// A bundle and the folder that the shim's sandboxes live in.
#[derive(Debug)]
pub struct Bundle {
    folder: TempDir,
    id: String,
    artifacts: Artifacts,
}

/// A mount of a root, as a daemon describes it.
#[derive(Debug, Clone)]
pub struct RootMount {
    /// File system type, with containerd's prefixes.
    pub kind: String,
    /// Device, file, or a name.
    pub source: String,
    /// As in fstab(5), with containerd's templates.
    pub options: Vec<String>,
}

/// A started shim.
pub struct Shim<'a> {
    bundle: &'a Bundle,
    client: ttrpc::Client,
    /// What `start` printed.
    pub address: String,
}

impl Bundle {
    /// A bundle with a busybox root file system and [`spec`]'s configuration; `settings` are
    /// further lines of the shim's configuration.
    ///
    /// # Errors
    /// When a file can't be written.
    pub fn new(artifacts: &Artifacts, id: &str, settings: &str) -> Result<Self> {
        let folder = TempDir::with_prefix("bh.").context(|| "make a bundle".into())?;
        let bundle = Self {
            folder,
            id: id.to_owned(),
            artifacts: artifacts.clone(),
        };
        let config = shim_config(artifacts, &bundle.runtime_dir(), settings);
        bundle.write("bulkhead.toml", &config)?;
        std::fs::create_dir(bundle.path()).context(|| "make a bundle".into())?;
        busybox_root(&bundle.path().join("rootfs"))?;
        bundle.set_spec(&spec(&["sleep", "100000"]))?;
        Ok(bundle)
    }

    /// The bundle folder itself.
    pub fn path(&self) -> PathBuf {
        self.folder.path().join("b")
    }

    /// Where the shim keeps its sandboxes.
    pub fn runtime_dir(&self) -> PathBuf {
        self.folder.path().join("run")
    }

    /// The container's id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// A file beside the bundle.
    pub fn beside(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Replaces config.json.
    ///
    /// # Errors
    /// When it can't be written.
    pub fn set_spec(&self, spec: &Value) -> Result<()> {
        self.write("b/config.json", &spec.to_string())
    }

    /// Writes a file below the bundle's parent.
    ///
    /// # Errors
    /// When it can't be written.
    pub fn write(&self, name: &str, text: &str) -> Result<()> {
        let path = self.folder.path().join(name);
        std::fs::write(&path, text).context(|| format!("write {}", path.display()))
    }

    /// The shim's command line up to and with its action.
    pub fn command(&self, action: &[&str]) -> Command {
        let mut command = Command::new(self.artifacts.program("containerd-shim-bulkhead-v2"));
        command
            .args([
                "-namespace",
                &crate::namespace(),
                "-address",
                "/run/t/no-containerd.sock",
            ])
            .args(["-publish-binary", "/bin/true", "-id", &self.id])
            .args(action)
            .current_dir(self.path())
            .env("PATH", search_path(&self.artifacts))
            .env("BULKHEAD_CONFIG", self.folder.path().join("bulkhead.toml"))
            .env_remove("TTRPC_ADDRESS")
            .stdin(Stdio::null());
        command
    }

    /// Runs one of the shim's actions to its end.
    ///
    /// # Errors
    /// When it can't be started.
    pub fn action(&self, action: &[&str]) -> Result<Finished> {
        let output = self.command(action).output();
        Ok(output
            .context(|| format!("run the shim's {action:?}"))?
            .into())
    }

    /// Starts the shim and connects to it.
    ///
    /// # Errors
    /// When it prints no address or nothing listens there.
    pub fn start(&self) -> Result<Shim<'_>> {
        let started = self.action(&["start"])?;
        if started.code != Some(0) {
            return Err(Error::Unexpected(format!(
                "the shim did not start: {started:?}"
            )));
        }
        self.connect(started.stdout.trim())
    }

    /// Connects to the shim that prints this address at its start.
    ///
    /// # Errors
    /// When nothing listens there.
    pub fn connect(&self, address: &str) -> Result<Shim<'_>> {
        let address = address.to_owned();
        let client = ttrpc::Client::connect(&address)
            .map_err(|error| Error::Unexpected(format!("connect to {address:?}: {error}")))?;
        Ok(Shim {
            bundle: self,
            client,
            address,
        })
    }

    /// Runs the shim's `delete`, as containerd does after a lost connection, and returns its
    /// answer.
    ///
    /// # Errors
    /// When it fails or prints no DeleteResponse.
    pub fn delete(&self) -> Result<api::DeleteResponse> {
        let bundle = self.path().display().to_string();
        let output = self.command(&["-bundle", &bundle, "delete"]).output();
        let output = output.context(|| "run the shim's delete".into())?;
        let parsed = api::DeleteResponse::parse_from_bytes(&output.stdout);
        match parsed {
            Ok(response) if output.status.success() => Ok(response),
            _ => Err(Error::Unexpected(format!(
                "delete: {:?}",
                Finished::from(output)
            ))),
        }
    }
}

impl Drop for Bundle {
    /// After a failed check only, so that later ones don't fail for its sake: ends the shim and
    /// what it has made. After a success, what was left would be a finding.
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        for pid in crate::leaks::processes_of("containerd-shim-bulkhead-v2") {
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
        }
        let _ = self.delete();
    }
}

impl Shim<'_> {
    /// Makes one call of the Task service.
    ///
    /// # Errors
    /// [`Error::Rpc`] with the status that the shim answered.
    pub fn call<Response: Message>(
        &self,
        version: TaskVersion,
        method: &str,
        request: &impl Message,
    ) -> Result<Response> {
        self.call_service(version.service(), method, request)
    }

    /// Makes one call of the sandbox API.
    ///
    /// # Errors
    /// As [`Shim::call`].
    pub fn sandbox<Response: Message>(
        &self,
        method: &str,
        request: &impl Message,
    ) -> Result<Response> {
        self.call_service("containerd.runtime.sandbox.v1.Sandbox", method, request)
    }

    fn call_service<Response: Message>(
        &self,
        service: &str,
        method: &str,
        request: &impl Message,
    ) -> Result<Response> {
        let payload = request.write_to_bytes();
        let mut call = ttrpc::Request::new();
        call.service = service.to_owned();
        call.method = method.to_owned();
        call.timeout_nano = limit_of(method).as_nanos() as i64;
        call.payload = payload.map_err(|error| Error::Unexpected(error.to_string()))?;
        let response = self.client.request(call).map_err(|error| match error {
            ttrpc::Error::RpcStatus(status) => Error::Rpc {
                method: method.to_owned(),
                code: status.code.value(),
                message: status.message,
            },
            other => Error::Unexpected(format!("{method}: {other}")),
        })?;
        Response::parse_from_bytes(&response.payload)
            .map_err(|error| Error::Unexpected(format!("answer to {method}: {error}")))
    }

    /// Start, Kill, Wait and so on for the bundle's container or one of its execs.
    ///
    /// # Errors
    /// As [`Shim::call`].
    pub fn start_process(&self, version: TaskVersion, exec_id: &str) -> Result<api::StartResponse> {
        let (id, exec_id) = (self.bundle.id.clone(), exec_id.to_owned());
        let request = api::StartRequest {
            id,
            exec_id,
            ..Default::default()
        };
        self.call(version, "Start", &request)
    }

    /// Waits for a process's end.
    ///
    /// # Errors
    /// As [`Shim::call`].
    pub fn wait(&self, version: TaskVersion, exec_id: &str) -> Result<api::WaitResponse> {
        let (id, exec_id) = (self.bundle.id.clone(), exec_id.to_owned());
        let request = api::WaitRequest {
            id,
            exec_id,
            ..Default::default()
        };
        self.call(version, "Wait", &request)
    }

    /// Sends a signal to a process, or with `all` to every process of the container.
    ///
    /// # Errors
    /// As [`Shim::call`].
    pub fn kill(
        &self,
        version: TaskVersion,
        exec_id: &str,
        signal: u32,
        all: bool,
    ) -> Result<api::Empty> {
        let (id, exec_id) = (self.bundle.id.clone(), exec_id.to_owned());
        let request = api::KillRequest {
            id,
            exec_id,
            signal,
            all,
            ..Default::default()
        };
        self.call(version, "Kill", &request)
    }

    /// State of a process.
    ///
    /// # Errors
    /// As [`Shim::call`].
    pub fn state(&self, version: TaskVersion, exec_id: &str) -> Result<api::StateResponse> {
        let (id, exec_id) = (self.bundle.id.clone(), exec_id.to_owned());
        let request = api::StateRequest {
            id,
            exec_id,
            ..Default::default()
        };
        self.call(version, "State", &request)
    }

    /// Forgets a process that has ended.
    ///
    /// # Errors
    /// As [`Shim::call`].
    pub fn delete(&self, version: TaskVersion, exec_id: &str) -> Result<api::DeleteResponse> {
        let (id, exec_id) = (self.bundle.id.clone(), exec_id.to_owned());
        let request = api::DeleteRequest {
            id,
            exec_id,
            ..Default::default()
        };
        self.call(version, "Delete", &request)
    }

    /// Adds an exec; `process` is an OCI process as JSON.
    ///
    /// # Errors
    /// As [`Shim::call`].
    pub fn exec(
        &self,
        version: TaskVersion,
        exec_id: &str,
        process: &Value,
        [stdin, stdout, stderr]: [&str; 3],
    ) -> Result<api::Empty> {
        let spec = protobuf::well_known_types::any::Any {
            type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".into(),
            value: process.to_string().into_bytes(),
            ..Default::default()
        };
        let request = api::ExecProcessRequest {
            id: self.bundle.id.clone(),
            exec_id: exec_id.to_owned(),
            terminal: process["terminal"] == true,
            stdin: stdin.to_owned(),
            stdout: stdout.to_owned(),
            stderr: stderr.to_owned(),
            spec: Some(spec).into(),
            ..Default::default()
        };
        self.call(version, "Exec", &request)
    }

    /// Changes limits; `resources` are the runtime spec's as JSON.
    ///
    /// # Errors
    /// As [`Shim::call`].
    pub fn update(&self, version: TaskVersion, resources: &Value) -> Result<api::Empty> {
        let resources = protobuf::well_known_types::any::Any {
            type_url: "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources".into(),
            value: resources.to_string().into_bytes(),
            ..Default::default()
        };
        let request = api::UpdateTaskRequest {
            id: self.bundle.id.clone(),
            resources: Some(resources).into(),
            ..Default::default()
        };
        self.call(version, "Update", &request)
    }

    /// Asks the shim to leave if it has no task.
    ///
    /// # Errors
    /// As [`Shim::call`]; the connection may break before the answer, which is no error.
    pub fn shutdown(&self, version: TaskVersion) -> Result<()> {
        let id = self.bundle.id.clone();
        let request = api::ShutdownRequest {
            id,
            ..Default::default()
        };
        match self.call::<api::Empty>(version, "Shutdown", &request) {
            Err(error @ Error::Rpc { .. }) => Err(error),
            _ => Ok(()),
        }
    }

    /// Create for the bundle's container, with its streams at these paths or URIs.
    ///
    /// # Errors
    /// As [`Shim::call`].
    pub fn create(
        &self,
        version: TaskVersion,
        [stdin, stdout, stderr]: [&str; 3],
    ) -> Result<api::CreateTaskResponse> {
        self.create_rooted(version, [stdin, stdout, stderr], &[])
    }

    /// The same, with what a daemon has the shim mount as the root.
    ///
    /// # Errors
    /// As [`Shim::call`].
    pub fn create_rooted(
        &self,
        version: TaskVersion,
        [stdin, stdout, stderr]: [&str; 3],
        root: &[RootMount],
    ) -> Result<api::CreateTaskResponse> {
        let mounts = root.iter().map(|one| api::Mount {
            type_: one.kind.clone(),
            source: one.source.clone(),
            options: one.options.clone(),
            ..Default::default()
        });
        let request = api::CreateTaskRequest {
            id: self.bundle.id.clone(),
            bundle: self.bundle.path().display().to_string(),
            stdin: stdin.to_owned(),
            stdout: stdout.to_owned(),
            stderr: stderr.to_owned(),
            rootfs: mounts.collect(),
            ..Default::default()
        };
        self.call(version, "Create", &request)
    }
}

/// An OCI spec that runs `argv` as containerd's default one would, without a terminal.
pub fn spec(argv: &[&str]) -> Value {
    let caps = [
        "CAP_CHOWN",
        "CAP_KILL",
        "CAP_SETUID",
        "CAP_SETGID",
        "CAP_NET_BIND_SERVICE",
    ];
    json!({
        "ociVersion": "1.0.2",
        "process": {
            "terminal": false,
            "user": { "uid": 0, "gid": 0 },
            "args": argv,
            "env": ["PATH=/bin"],
            "cwd": "/",
            "capabilities": { "bounding": caps, "effective": caps, "permitted": caps },
            "noNewPrivileges": true
        },
        "root": { "path": "rootfs" },
        "hostname": "direct",
        "mounts": [
            { "destination": "/proc", "type": "proc", "source": "proc",
              "options": ["nosuid", "noexec", "nodev"] },
            { "destination": "/dev", "type": "tmpfs", "source": "tmpfs",
              "options": ["nosuid", "strictatime", "mode=755", "size=65536k"] },
            { "destination": "/dev/pts", "type": "devpts", "source": "devpts",
              "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"] },
            { "destination": "/sys", "type": "sysfs", "source": "sysfs",
              "options": ["nosuid", "noexec", "nodev", "ro"] }
        ],
        "linux": {
            "namespaces": [
                { "type": "pid" }, { "type": "ipc" }, { "type": "uts" }, { "type": "mount" },
                { "type": "network" }
            ]
        }
    })
}

/// An OCI process for an exec, with what [`spec`] gives the init.
pub fn process(argv: &[&str]) -> Value {
    spec(argv)["process"].take()
}

/// A root file system of Debian's static busybox.
fn busybox_root(root: &Path) -> Result<()> {
    for folder in ["bin", "dev", "proc", "sys", "tmp", "etc"] {
        std::fs::create_dir_all(root.join(folder)).context(|| format!("make {folder}"))?;
    }
    std::fs::copy("/bin/busybox", root.join("bin/busybox"))
        .context(|| "copy /bin/busybox".into())?;
    let applets = Command::new("/bin/busybox").arg("--list").output();
    let applets = applets.context(|| "list busybox's applets".into())?;
    for applet in String::from_utf8_lossy(&applets.stdout)
        .lines()
        .filter(|a| *a != "busybox")
    {
        std::os::unix::fs::symlink("busybox", root.join("bin").join(applet))
            .context(|| format!("link {applet}"))?;
    }
    Ok(())
}

/// Longest that a call may take on a loaded machine. What a process does until it ends is no
/// work of the shim's.
fn limit_of(method: &str) -> Duration {
    Duration::from_secs(if method == "Wait" { 500 } else { 180 })
}
