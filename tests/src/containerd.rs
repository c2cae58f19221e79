//! A private containerd with Bulkhead's shim on its PATH, driven through `ctr`.

use crate::artifacts::{self, Artifacts};
use crate::error::{Context, Error, Result};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Environment variable with the folder of a second containerd; scripts/dev sets it when it could
/// build one.
pub const SECOND_ENV: &str = "BULKHEAD_CONTAINERD2";

/// The image that the tests run; see scripts/busybox-image.
pub const IMAGE: &str = "bulkhead.local/busybox:latest";

/// The runtime under test.
pub const RUNTIME: &str = "io.containerd.bulkhead.v2";

/// The name under which an image is imported for pods' sandboxes, whose program never runs.
pub const SANDBOX_IMAGE: &str = "bulkhead.local/pause:latest";

/// Folder of the CNI plugins, as Debian packages them.
pub const CNI_PLUGINS: &str = "/usr/lib/cni";

/// containerd's namespace of what its CRI plugin makes.
const CRI_NAMESPACE: &str = "k8s.io";

/// The network of pods, as a file of the CNI folder and its content: works offline, and touches the network namespace of containerd only.
const CNI: (&str, &str) = (
    "10-pods.conflist",
    r#"{ "cniVersion": "0.4.0", "name": "pods", "plugins": [ {
    "type": "ptp",
    "ipam": { "type": "host-local", "dataDir": "@DIR@/ipam",
              "ranges": [[{ "subnet": "10.88.0.0/24" }]], "routes": [{ "dst": "0.0.0.0/0" }] }
} ] }
"#,
);

/// A containerd and ctr that belong together.
#[derive(Debug, Clone)]
pub struct Release {
    programs: PathBuf,
}

impl Release {
    /// Debian's package.
    pub fn debian() -> Self {
        Self {
            programs: "/usr/bin".into(),
        }
    }

    /// The current one, built by scripts/dev; `None` where it couldn't be.
    pub fn current() -> Option<Self> {
        let programs = PathBuf::from(std::env::var_os(SECOND_ENV)?);
        programs
            .join("containerd")
            .is_file()
            .then_some(Self { programs })
    }

    /// What `containerd --version` says of itself.
    ///
    /// # Errors
    /// When it can't be run.
    pub fn version(&self) -> Result<String> {
        let output = Command::new(self.programs.join("containerd"))
            .arg("--version")
            .output();
        let output = output.context(|| "run containerd --version".into())?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        Ok(text
            .split_whitespace()
            .nth(2)
            .unwrap_or("unknown")
            .to_owned())
    }

    /// The series that its configuration is written for: 1 for 1.x, else 2.
    ///
    /// # Errors
    /// When it can't be run.
    pub fn series(&self) -> Result<u32> {
        let first = self.version()?.trim_start_matches('v').starts_with("1.");
        Ok(if first { 1 } else { 2 })
    }
}

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

/// containerd's configuration with its CRI plugin on and the runtime's table, whose pods are driven
/// by `sandboxer`.
fn cri_template(release: &Release, sandboxer: &str) -> Result<String> {
    let series = release.series()?;
    let template = read_source(&format!("scripts/lib/containerd-cri-{series}.toml.in"))?
        + "\n"
        + &read_source(&format!("docs/kubernetes/containerd-{series}.toml"))?;
    Ok(template
        .replace("@SANDBOX_IMAGE@", SANDBOX_IMAGE)
        .replace("@CNI_PLUGINS@", CNI_PLUGINS)
        .replace(
            "sandboxer = \"podsandbox\"",
            &format!("sandboxer = {sandboxer:?}"),
        ))
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

/// The shim's configuration for what was built, with `settings` at its end.
pub fn shim_config(artifacts: &Artifacts, runtime_dir: &Path, settings: &str) -> String {
    // A key may stand only once: what `settings` sets is left out here.
    let base = [
        ("kernel", artifacts.kernel()),
        ("rootfs", artifacts.rootfs()),
        ("vmm", artifacts.program("bulkhead-vmm")),
        ("runtime_dir", runtime_dir.to_owned()),
        ("template_dir", artifacts.templates()),
    ];
    let sets = |key: &str| {
        settings.lines().any(|line| {
            line.split('=')
                .next()
                .is_some_and(|found| found.trim() == key)
        })
    };
    let mut text = String::new();
    for (key, path) in base.iter().filter(|(key, _)| !sets(key)) {
        text.push_str(&format!("{key} = {:?}\n", path.display().to_string()));
    }
    text + settings
}

/// PATH with the host's programs under test first.
pub fn search_path(artifacts: &Artifacts) -> std::ffi::OsString {
    let mut path = artifacts.programs().into_os_string();
    path.push(":");
    path.push(std::env::var_os("PATH").unwrap_or_else(|| "/usr/sbin:/usr/bin:/sbin:/bin".into()));
    path
}

fn read_source(path: &str) -> Result<String> {
    let path = artifacts::workspace().join(path);
    std::fs::read_to_string(&path).context(|| format!("read {}", path.display()))
}

fn write(path: &Path, text: &str) -> Result<()> {
    std::fs::write(path, text).context(|| format!("write {}", path.display()))
}

/// overlayfs where an overlay can be mounted below `folder`.
fn pick_snapshotter(folder: &Path) -> &'static str {
    use nix::mount::{MsFlags, mount, umount};
    let at = |name: &str| folder.join("overlay-probe").join(name);
    for name in ["lower", "upper", "work", "merged"] {
        if std::fs::create_dir_all(at(name)).is_err() {
            return "native";
        }
    }
    let options = format!(
        "lowerdir={},upperdir={},workdir={}",
        at("lower").display(),
        at("upper").display(),
        at("work").display()
    );
    let mounted = mount(
        Some("overlay"),
        &at("merged"),
        Some("overlay"),
        MsFlags::empty(),
        Some(options.as_str()),
    );
    let _ = umount(&at("merged"));
    let _ = std::fs::remove_dir_all(folder.join("overlay-probe"));
    if mounted.is_ok() {
        "overlayfs"
    } else {
        "native"
    }
}
