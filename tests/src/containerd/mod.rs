//! A private containerd with Bulkhead's shim on its PATH, driven through `ctr`.

mod config;
mod release;

pub use config::{CNI_PLUGINS, search_path, shim_config};
pub use release::{Release, SECOND_ENV};

use crate::artifacts::{self, Artifacts};
use crate::error::{Context, Error, Result};
use config::{CNI, cri_template, pick_snapshotter, read_source, write};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// The image that the tests run; see scripts/busybox-image.
pub const IMAGE: &str = "bulkhead.local/busybox:latest";

/// The runtime under test.
pub const RUNTIME: &str = "io.containerd.bulkhead.v2";

/// The name under which an image is imported for pods' sandboxes, whose program never runs.
pub const SANDBOX_IMAGE: &str = "bulkhead.local/pause:latest";

/// containerd's namespace of what its CRI plugin makes.
const CRI_NAMESPACE: &str = "k8s.io";

/// Output of a finished command, as text.
#[derive(Debug, Clone)]
pub struct Finished {
    /// Exit code; `None` when a signal ended it.
    pub code: Option<i32>,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

impl From<Output> for Finished {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code(),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

impl Finished {
    /// Standard output of a command that must have succeeded.
    ///
    /// # Panics
    /// When it failed.
    #[track_caller]
    pub fn success(self) -> String {
        assert!(self.code == Some(0), "failed: {self:?}");
        self.stdout
    }
}

/// A running containerd. Dropping it ends it and removes its folder.
#[derive(Debug)]
pub struct Containerd {
    child: Child,
    artifacts: Artifacts,
    folder: TempDir,
    release: Release,
    snapshotter: &'static str,
    namespace: String,
}

impl Containerd {
    /// Starts one whose shims get a configuration with `settings`, further TOML lines, at its end.
    ///
    /// # Errors
    /// When it doesn't answer within a minute.
    pub fn start(artifacts: &Artifacts, release: &Release, settings: &str) -> Result<Self> {
        let template = read_source("scripts/lib/containerd.toml.in")?;
        Self::start_with(
            artifacts,
            release,
            settings,
            &template,
            crate::namespace(),
            &[CNI],
        )
    }

    /// Starts one of 2.2 or later that keeps images and containers with `snapshotter`, which is off
    /// otherwise; `settings` are its plugin's.
    ///
    /// # Errors
    /// When it doesn't answer within a minute.
    pub fn start_with_snapshotter(
        artifacts: &Artifacts,
        release: &Release,
        snapshotter: &'static str,
        settings: &str,
    ) -> Result<Self> {
        let plugin = format!("io.containerd.snapshotter.v1.{snapshotter}");
        let template = read_source("scripts/lib/containerd.toml.in")?;
        let template = template.replace(&format!("\"{plugin}\","), "")
            + &format!("\n[plugins.{plugin:?}]\n{settings}\n");
        let namespace = crate::namespace();
        let mut started = Self::start_with(artifacts, release, "", &template, namespace, &[])?;
        started.snapshotter = snapshotter;
        Ok(started)
    }

    /// Starts one with its CRI plugin on, the runtime's table being the documentation's, and a
    /// network of one veth pair for each pod.
    ///
    /// # Errors
    /// When it doesn't answer within a minute.
    pub fn start_with_cri(
        artifacts: &Artifacts,
        release: &Release,
        settings: &str,
    ) -> Result<Self> {
        Self::start_with_sandboxer(artifacts, release, settings, "podsandbox")
    }

    /// The same, with these files, names and contents, in the folder of CNI's configurations. In
    /// them `@DIR@` stands for containerd's own folder. Each is an interface of every pod.
    ///
    /// # Errors
    /// When it doesn't answer within a minute.
    pub fn start_with_networks(
        artifacts: &Artifacts,
        release: &Release,
        settings: &str,
        networks: &[(&str, &str)],
    ) -> Result<Self> {
        let template = cri_template(release, "podsandbox")?;
        Self::start_with(
            artifacts,
            release,
            settings,
            &template,
            CRI_NAMESPACE.into(),
            networks,
        )
    }

    /// The same, with the pods' sandboxes driven by `sandboxer`: `shim` for the sandbox API, which
    /// takes a 2.x.
    ///
    /// # Errors
    /// When it doesn't answer within a minute.
    pub fn start_with_sandboxer(
        artifacts: &Artifacts,
        release: &Release,
        settings: &str,
        sandboxer: &str,
    ) -> Result<Self> {
        let template = cri_template(release, sandboxer)?;
        Self::start_with(
            artifacts,
            release,
            settings,
            &template,
            CRI_NAMESPACE.into(),
            &[CNI],
        )
    }

    fn start_with(
        artifacts: &Artifacts,
        release: &Release,
        settings: &str,
        template: &str,
        namespace: String,
        networks: &[(&str, &str)],
    ) -> Result<Self> {
        let folder = TempDir::with_prefix("bh.").context(|| "make containerd's folder".into())?;
        let at = folder.path();
        let snapshotter = pick_snapshotter(at);
        let text = template
            .replace("@DIR@", &at.display().to_string())
            .replace("@SNAPSHOTTER@", snapshotter);
        write(&at.join("config.toml"), &text)?;
        std::fs::create_dir(at.join("cni")).context(|| "make a folder for CNI".into())?;
        for (name, network) in networks {
            let network = network.replace("@DIR@", &at.display().to_string());
            write(&at.join("cni").join(name), &network)?;
        }
        write(
            &at.join("bulkhead.toml"),
            &shim_config(artifacts, &at.join("run"), settings),
        )?;
        let mut started = Self {
            child: spawn(at, artifacts, release)?,
            artifacts: artifacts.clone(),
            folder,
            release: release.clone(),
            snapshotter,
            namespace,
        };
        started.wait_until_it_answers()?;
        Ok(started)
    }

    /// Ends the daemon at once, as a crash would; shims and what they run are left as they are.
    ///
    /// # Errors
    /// When it can't be waited for.
    pub fn crash(&mut self) -> Result<()> {
        let _ = self.child.kill();
        let ended = self.child.wait();
        ended
            .context(|| "wait for containerd's end".into())
            .map(drop)
    }

    /// Starts it again after [`Containerd::crash`], with the same folder.
    ///
    /// # Errors
    /// When it doesn't answer within a minute.
    pub fn start_again(&mut self) -> Result<()> {
        self.child = spawn(self.folder.path(), &self.artifacts, &self.release)?;
        self.wait_until_it_answers()
    }

    /// Its whole log.
    pub fn log(&self) -> String {
        let log = std::fs::read(self.folder.path().join("containerd.log")).unwrap_or_default();
        String::from_utf8_lossy(&log).into_owned()
    }

    fn wait_until_it_answers(&mut self) -> Result<()> {
        let limit = Duration::from_secs(60);
        let end = Instant::now() + limit;
        while self.ctr(&["version"])?.code != Some(0) {
            let ended = self
                .child
                .try_wait()
                .context(|| "wait for containerd".into())?;
            if ended.is_some() || Instant::now() > end {
                return Err(Error::TimedOut {
                    what: "an answer of containerd".into(),
                    seconds: limit.as_secs(),
                    detail: format!("; its log: {}", self.log_tail(10)),
                });
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(())
    }

    /// A `ctr` command with this containerd's address, ended with status 124 when it hangs.
    pub fn ctr_command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("timeout");
        command
            // In the caller's process group: in one of its own a terminal would stop it (SIGTTOU).
            .args(["--foreground", "--kill-after=5", "150"])
            .arg(self.release.programs.join("ctr"));
        self.connected(command, arguments)
    }

    /// A `ctr` command that runs until it is killed.
    pub fn endless_ctr_command(&self, arguments: &[&str]) -> Command {
        self.connected(Command::new(self.release.programs.join("ctr")), arguments)
    }

    fn connected(&self, mut command: Command, arguments: &[&str]) -> Command {
        command
            .arg("--address")
            .arg(self.socket())
            .args(["--connect-timeout", "10s", "--namespace", &self.namespace])
            .args(arguments)
            .stdin(Stdio::null());
        command
    }

    /// Runs `ctr` to its end.
    ///
    /// # Errors
    /// When it can't be started.
    pub fn ctr(&self, arguments: &[&str]) -> Result<Finished> {
        let output = self.ctr_command(arguments).output();
        Ok(output.context(|| format!("run ctr {arguments:?}"))?.into())
    }

    /// `ctr run` with this runtime, `options` before image and id, `argv` behind them.
    pub fn run_command(&self, options: &[&str], id: &str, argv: &[&str]) -> Command {
        let fifos = self.folder.path().join("fifo");
        let mut command = self.ctr_command(&["run", "--runtime", RUNTIME]);
        command
            .args(["--snapshotter", self.snapshotter, "--fifo-dir"])
            .arg(fifos);
        command.args(options).args([IMAGE, id]).args(argv);
        command
    }

    /// Runs [`Containerd::run_command`] to its end.
    ///
    /// # Errors
    /// When it can't be started.
    pub fn run(&self, options: &[&str], id: &str, argv: &[&str]) -> Result<Finished> {
        let output = self.run_command(options, id, argv).output();
        Ok(output.context(|| format!("run container {id}"))?.into())
    }

    /// `ctr tasks exec` without a terminal, to its end.
    ///
    /// # Errors
    /// When it can't be started.
    pub fn exec(&self, options: &[&str], id: &str, argv: &[&str]) -> Result<Finished> {
        let output = self.exec_command(options, id, argv).output();
        Ok(output.context(|| format!("exec in {id}"))?.into())
    }

    /// The command behind [`Containerd::exec`].
    pub fn exec_command(&self, options: &[&str], id: &str, argv: &[&str]) -> Command {
        use std::sync::atomic::{AtomicU32, Ordering};
        // Exec ids must differ for as long as the container lives.
        static NEXT: AtomicU32 = AtomicU32::new(1);
        let exec_id = format!("exec-{}", NEXT.fetch_add(1, Ordering::Relaxed));
        let mut command = self.ctr_command(&["tasks", "exec", "--exec-id", &exec_id, "--fifo-dir"]);
        command
            .arg(self.folder.path().join("fifo"))
            .args(options)
            .arg(id)
            .args(argv);
        command
    }

    /// Makes and imports the busybox image.
    ///
    /// # Errors
    /// When the script or the import fails.
    pub fn import_busybox(&self) -> Result<()> {
        self.import_busybox_as(IMAGE)
    }

    /// Makes the busybox image and imports it under the name `image`.
    ///
    /// # Errors
    /// When the script or the import fails.
    pub fn import_busybox_as(&self, image: &str) -> Result<()> {
        self.import_layered(image, None)
    }

    /// Makes the busybox image, with a layer over it that is in the archive `layer`, and imports it
    /// under the name `image`.
    ///
    /// # Errors
    /// When the script or the import fails.
    pub fn import_layered(&self, image: &str, layer: Option<&Path>) -> Result<()> {
        let archive = self.folder.path().join("busybox.tar");
        let script = artifacts::workspace().join("scripts/busybox-image");
        let made = Command::new(&script)
            .arg("--out")
            .arg(&archive)
            .args(["--name", image])
            .args(
                layer
                    .into_iter()
                    .flat_map(|layer| [Path::new("--layer"), layer]),
            )
            .output();
        let made: Finished = made.context(|| format!("run {}", script.display()))?.into();
        let archive = archive.display().to_string();
        let mut import = vec![
            "images",
            "import",
            "--snapshotter",
            self.snapshotter,
            &archive,
        ];
        if !matches!(self.snapshotter, "overlayfs" | "native") {
            // containerd's own import knows the snapshotters of its configuration only.
            import.insert(2, "--local");
        }
        let imported = self.ctr(&import)?;
        if made.code != Some(0) || imported.code != Some(0) {
            return Err(Error::Unexpected(format!(
                "no busybox image: {made:?}, {imported:?}"
            )));
        }
        Ok(())
    }

    /// The socket on which it serves its own API and, with its plugin on, CRI.
    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("containerd.sock")
    }

    /// This containerd's folder.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Where its shims keep their sandboxes.
    pub fn runtime_dir(&self) -> PathBuf {
        self.folder.path().join("run")
    }

    /// The snapshotter in use: overlayfs, or native where no overlay can be mounted.
    pub fn snapshotter(&self) -> &'static str {
        self.snapshotter
    }

    /// Where its shims find their configuration.
    pub fn shim_config(&self) -> PathBuf {
        self.folder.path().join("bulkhead.toml")
    }

    /// Gives shims that start from now on a configuration with these `settings` at its end.
    ///
    /// # Errors
    /// When it can't be written.
    pub fn configure_shims(&self, settings: &str) -> Result<()> {
        let text = shim_config(&self.artifacts, &self.runtime_dir(), settings);
        write(&self.shim_config(), &text)
    }

    /// What it has warned of, or said to have failed.
    pub fn complaints(&self) -> String {
        let log = self.log();
        let bad = |line: &&str| line.contains("level=warning") || line.contains("level=error");
        log.lines().filter(bad).collect::<Vec<_>>().join("\n")
    }

    /// The last lines of its log.
    pub fn log_tail(&self, lines: usize) -> String {
        let log = self.log();
        let lines: Vec<&str> = log.lines().rev().take(lines).collect();
        lines.into_iter().rev().collect::<Vec<_>>().join("\n")
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        // A plain kill would skip its own clean-up of mounts.
        let pid = nix::unistd::Pid::from_raw(self.child.id() as i32);
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
        let end = Instant::now() + Duration::from_secs(15);
        while Instant::now() < end && matches!(self.child.try_wait(), Ok(None)) {
            std::thread::sleep(Duration::from_millis(50));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Starts the daemon whose configuration is in `folder`; its log there grows.
fn spawn(folder: &Path, artifacts: &Artifacts, release: &Release) -> Result<Child> {
    let mut log = File::options();
    let log = log
        .create(true)
        .append(true)
        .open(folder.join("containerd.log"))
        .context(|| "open a log".into())?;
    Command::new(release.programs.join("containerd"))
        .args(["--log-level", "debug", "--config"])
        .arg(folder.join("config.toml"))
        .env("PATH", search_path(artifacts))
        .env("BULKHEAD_CONFIG", folder.join("bulkhead.toml"))
        .stdin(Stdio::null())
        .stdout(log.try_clone().context(|| "share a log".into())?)
        .stderr(log)
        .spawn()
        .context(|| "start containerd".into())
}
