//! A container started through the shim without containerd, so that its times can be compared with
//! those of a bare runc.

use crate::hold;
use bulkhead_tests::Artifacts;
use bulkhead_tests::error::{Context, Error, Result};
use bulkhead_tests::perf::now_ns;
use bulkhead_tests::shim::{Bundle, Shim, TaskVersion, spec};
use bulkhead_tests::vm::TemplatePaths;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

const VERSION: TaskVersion = TaskVersion::V3;
const SIGKILL: u32 = 9;

/// File in the root file system that [`greeting_bundle`]'s container prints.
const GREETING: &str = "hello";

/// Settings of a shim that boots each VM, or that starts it from a template of the bench's own.
///
/// # Errors
/// When the templates' folder can't be made.
pub fn settings(cold: bool) -> Result<String> {
    if cold {
        return Ok("templates = false\n".into());
    }
    let folder = template_dir();
    std::fs::create_dir_all(&folder).context(|| format!("make {}", folder.display()))?;
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o700);
    std::fs::set_permissions(&folder, mode).context(|| format!("close {}", folder.display()))?;
    Ok(format!(
        "templates = true\ntemplate_dir = {:?}\n",
        folder.display().to_string()
    ))
}

/// Where the bench's template is: it goes with the bench.
pub fn template_dir() -> PathBuf {
    std::env::temp_dir().join("templates")
}

/// Builds the template by starting one container and ending it. Returns how long that took.
///
/// # Errors
/// When the container doesn't start, or no template comes of it.
pub fn warm_up(artifacts: &Artifacts) -> Result<Duration> {
    let bundle = greeting_bundle(artifacts, "bench-warm-up", &settings(false)?)?;
    eprintln!("waiting for the template: one boot, saved, and one container from it");
    let began = Instant::now();
    let (pod, _) = HeldStart::new(&bundle)?.release()?;
    pod.run(None)?;
    pod.end()?;
    let took = began.elapsed();
    saved_machine()?;
    Ok(took)
}

/// The template that [`warm_up`] has built.
///
/// # Errors
/// When there is none: the shim has booted cold, and its log has said why.
pub fn saved_machine() -> Result<TemplatePaths> {
    let folder = template_dir();
    let entries = std::fs::read_dir(&folder).context(|| format!("list {}", folder.display()))?;
    for entry in entries.flatten() {
        let paths = TemplatePaths::in_folder(&entry.path());
        if paths.memory.is_file() && paths.state.is_file() {
            return Ok(paths);
        }
    }
    Err(Error::Unexpected(format!(
        "no template was built: {}",
        why_none(&folder)
    )))
}

/// What the failed build has left to be read.
fn why_none(folder: &Path) -> String {
    let notes = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let notes: Vec<String> = notes
        .filter(|entry| entry.path().extension().is_some_and(|end| end == "failed"))
        .filter_map(|entry| std::fs::read_to_string(entry.path()).ok())
        .collect();
    if notes.is_empty() {
        "the shim left no word of the reason".into()
    } else {
        notes.join("; ")
    }
}

/// A bundle whose container prints a line and then waits: one program, one execve.
///
/// # Errors
/// When a file can't be written.
pub fn greeting_bundle(artifacts: &Artifacts, id: &str, settings: &str) -> Result<Bundle> {
    let bundle = Bundle::new(artifacts, id, settings)?;
    bundle.write(&format!("b/rootfs/{GREETING}"), "hello\n")?;
    bundle.set_spec(&spec(&["tail", "-f", &format!("/{GREETING}")]))?;
    Ok(bundle)
}

/// A shim's `start` command, held before it begins.
pub struct HeldStart<'a> {
    bundle: &'a Bundle,
    child: std::process::Child,
}

/// A shim and, once created, its container.
pub struct Pod<'a> {
    shim: Shim<'a>,
    shim_pid: u32,
}

impl<'a> HeldStart<'a> {
    /// Starts the command, held.
    ///
    /// # Errors
    /// When it can't be started.
    pub fn new(bundle: &'a Bundle) -> Result<Self> {
        let mut command = hold::held(&bundle.command(&["start"]))?;
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context(|| "start the shim's start command".into())?;
        hold::wait_until_held(child.id())?;
        Ok(Self { bundle, child })
    }

    /// The held process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Lets it go and connects to the shim. Also returns when it went, as [`now_ns`].
    ///
    /// # Errors
    /// When no shim comes of it.
    pub fn release(self) -> Result<(Pod<'a>, u64)> {
        let began = hold::release(self.child.id())?;
        let output = self.child.wait_with_output();
        let output = output.context(|| "wait for the shim's start command".into())?;
        if !output.status.success() {
            return Err(Error::Unexpected(format!(
                "the shim did not start: {}",
                String::from_utf8_lossy(&output.stderr).trim()
            )));
        }
        let shim = self
            .bundle
            .connect(String::from_utf8_lossy(&output.stdout).trim())?;
        let pid_file = self.bundle.path().join("shim.pid");
        let shim_pid = std::fs::read_to_string(&pid_file)
            .context(|| format!("read {}", pid_file.display()))?;
        let shim_pid = shim_pid
            .trim()
            .parse()
            .map_err(|_| Error::Unexpected(format!("not a pid: {shim_pid:?}")))?;
        Ok((Pod { shim, shim_pid }, began))
    }
}

impl Pod<'_> {
    /// The shim's process; the VMM is its child.
    pub fn shim_pid(&self) -> u32 {
        self.shim_pid
    }

    /// Creates and starts the container with its output in `output`, or nowhere.
    ///
    /// # Errors
    /// What the shim answers.
    pub fn run(&self, output: Option<&FirstOutput>) -> Result<()> {
        let path = output.map_or_else(String::new, |output| output.path.clone());
        self.shim.create(VERSION, ["", &path, ""])?;
        self.shim.start_process(VERSION, "")?;
        Ok(())
    }

    /// Ends container, VM and shim, and waits until they have gone.
    ///
    /// # Errors
    /// What the shim answers, or when it doesn't leave.
    pub fn end(self) -> Result<()> {
        self.shim.kill(VERSION, "", SIGKILL, true)?;
        self.shim.wait(VERSION, "")?;
        self.shim.delete(VERSION, "")?;
        self.shim.shutdown(VERSION)?;
        let end = Instant::now() + Duration::from_secs(30);
        while Path::new(&format!("/proc/{}", self.shim_pid)).exists() {
            if Instant::now() > end {
                return Err(Error::TimedOut {
                    what: "the shim's end".into(),
                    seconds: 30,
                    detail: String::new(),
                });
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }
}

/// Tells when the first byte of an output arrives, and reads on to its end.
pub struct FirstOutput {
    path: String,
    first: Receiver<u64>,
}

impl FirstOutput {
    /// Of a FIFO that is made here.
    ///
    /// # Errors
    /// When it can't be made.
    pub fn of_fifo(path: &Path) -> Result<Self> {
        let _ = std::fs::remove_file(path);
        nix::unistd::mkfifo(path, nix::sys::stat::Mode::from_bits_truncate(0o600))
            .context(|| format!("make the FIFO {}", path.display()))?;
        let (sender, first) = mpsc::channel();
        let opened = path.to_owned();
        std::thread::spawn(move || {
            if let Ok(fifo) = File::open(opened) {
                read_through(fifo, &sender);
            }
        });
        Ok(Self {
            path: path.display().to_string(),
            first,
        })
    }

    /// Of something open.
    pub fn of(source: impl Read + Send + 'static) -> Self {
        let (sender, first) = mpsc::channel();
        std::thread::spawn(move || read_through(source, &sender));
        Self {
            path: String::new(),
            first,
        }
    }

    /// When the first byte arrived, as [`now_ns`].
    ///
    /// # Errors
    /// When none has arrived in time.
    pub fn wait(&self, timeout: Duration) -> Result<u64> {
        self.first
            .recv_timeout(timeout)
            .map_err(|_| Error::TimedOut {
                what: "the container's first output".into(),
                seconds: timeout.as_secs(),
                detail: String::new(),
            })
    }
}

fn read_through(mut source: impl Read, first: &mpsc::Sender<u64>) {
    let mut bytes = [0; 4096];
    let mut began = false;
    while matches!(source.read(&mut bytes), Ok(1..)) {
        if !began {
            let _ = first.send(now_ns());
            began = true;
        }
    }
}
