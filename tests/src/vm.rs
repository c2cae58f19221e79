//! A VM without a sandbox or a shim: `bulkhead-vmm` started by its contract alone
//! (`bulkhead_proto::vmm`).

use crate::artifacts::Artifacts;
use crate::error::{Context, Error, Result};
use bulkhead_proto::vmm::{
    BlockConfig, CONFIG_FD, ConsoleConfig, Event, MAX_CONTROL_LINE, Request, Response,
    TemplateConfig, VmConfig,
};
use bulkhead_sandbox::fds::ChildFds;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use std::ffi::OsString;
use std::fs::File;
use std::io::{BufRead, BufReader, IoSlice, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// What a test says about the VM it wants.
#[derive(Debug, Clone)]
pub struct VmSpec {
    /// Number of vCPUs.
    pub vcpus: u8,
    /// Guest memory in MiB.
    pub memory_mib: u32,
    /// Memory in MiB that can be plugged; 0 for a machine without that device.
    pub hotplug_mib: u32,
    /// Appended to the kernel's command line.
    pub kernel_params: Vec<String>,
    /// All kernel messages into [`Vm::console`].
    pub verbose: bool,
    /// Kernel to boot instead of the built one.
    pub kernel: Option<PathBuf>,
    /// Root image instead of the built one.
    pub rootfs: Option<PathBuf>,
    /// Disks besides the root, from /dev/vdb on.
    pub disks: Vec<Disk>,
    /// Program and first arguments of what is started in the VMM's place, with the VMM's path as
    /// last argument: it executes the VMM when it sees fit. Empty: the VMM itself.
    pub launcher: Vec<OsString>,
    /// Continue this saved machine instead of booting.
    pub template: Option<TemplatePaths>,
}

/// A raw file as a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    /// At most 20 bytes.
    pub serial: String,
    /// The file.
    pub path: PathBuf,
}

/// The files of a saved machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TemplatePaths {
    /// Guest memory.
    pub memory: PathBuf,
    /// All else.
    pub state: PathBuf,
}

impl TemplatePaths {
    /// The usual names in `folder`.
    pub fn in_folder(folder: &Path) -> Self {
        Self {
            memory: folder.join("memory"),
            state: folder.join("state"),
        }
    }

    /// Makes both files, empty, or empties them.
    ///
    /// # Errors
    /// When one can't be created.
    pub fn create(&self) -> Result<[File; 2]> {
        Ok([create(&self.memory)?, create(&self.state)?])
    }
}

impl Default for VmSpec {
    /// The machine that the figures are taken on: 1 vCPU and 128 MiB.
    fn default() -> Self {
        Self {
            vcpus: 1,
            memory_mib: 128,
            hotplug_mib: 0,
            kernel_params: Vec::new(),
            verbose: false,
            kernel: None,
            rootfs: None,
            disks: Vec::new(),
            launcher: Vec::new(),
            template: None,
        }
    }
}

/// A VMM that waits for its configuration: the moment to attach counters to its process.
#[derive(Debug)]
pub struct PreparedVm {
    vm: Vm,
    config: VmConfig,
    pipe: File,
}

/// A VM. Dropping it kills the VMM and removes its folder.
#[derive(Debug)]
pub struct Vm {
    child: Child,
    folder: TempDir,
    events: Receiver<std::result::Result<Event, String>>,
    started: Instant,
}

impl VmSpec {
    /// Starts the VMM's process, but does not configure it yet.
    ///
    /// # Errors
    /// When a file can't be opened or the VMM can't be started.
    pub fn prepare(&self, artifacts: &Artifacts) -> Result<PreparedVm> {
        let folder = TempDir::with_prefix("bulkhead-vm.").context(|| "make a folder".into())?;
        let at = |name: &str| folder.path().join(name);
        std::fs::create_dir(at("share")).context(|| "make the share".into())?;
        let mut fds = ChildFds::new();
        let (config_read, config_write) = pipe()?;
        let (events_read, events_write) = pipe()?;
        let config_number = give(&mut fds, config_read)?;
        assert_eq!(config_number, CONFIG_FD, "the configuration comes first");
        let config = VmConfig {
            sandbox_id: "bulkhead-tests".into(),
            vcpus: self.vcpus,
            memory_mib: self.memory_mib,
            hotplug_mib: self.hotplug_mib,
            kvm_fd: give(&mut fds, open_both(Path::new("/dev/kvm"))?)?,
            kernel_fd: give(
                &mut fds,
                open(self.kernel.as_ref().unwrap_or(&artifacts.kernel()))?,
            )?,
            kernel_params: self.kernel_params.clone(),
            block: self.block(&mut fds, artifacts)?,
            vsock_fd: give(&mut fds, listen(&at("vsock.sock"))?)?,
            share_fd: Some(give(&mut fds, open(&at("share"))?)?),
            console: ConsoleConfig {
                log_fd: Some(give(&mut fds, create(&at("console.log"))?)?),
                limit_bytes: 1 << 20,
                verbose: self.verbose,
            },
            control_fd: give(&mut fds, listen(&at("control.sock"))?)?,
            events_fd: give(&mut fds, events_write)?,
            template: self
                .template
                .as_ref()
                .map(|template| {
                    Ok(TemplateConfig {
                        memory_fd: give(&mut fds, open(&template.memory)?)?,
                        state_fd: give(&mut fds, open(&template.state)?)?,
                    })
                })
                .transpose()?,
        };
        let log = create(&at("vmm.log"))?;
        let mut words = self.launcher.clone();
        words.push(artifacts.program("bulkhead-vmm").into());
        let mut command = Command::new(&words[0]);
        command
            .args(&words[1..])
            .env_clear()
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        let started = Instant::now();
        let child = fds
            .spawn(&mut command)
            .context(|| format!("start {command:?}"))?;
        let vm = Vm {
            child,
            folder,
            events: read_events(events_read),
            started,
        };
        Ok(PreparedVm {
            vm,
            config,
            pipe: File::from(config_write),
        })
    }

    fn block(&self, fds: &mut ChildFds, artifacts: &Artifacts) -> Result<Vec<BlockConfig>> {
        let root = open(self.rootfs.as_ref().unwrap_or(&artifacts.rootfs()))?;
        let mut block = vec![BlockConfig {
            serial: "root".into(),
            fd: Some(give(fds, root)?),
            read_only: true,
        }];
        for disk in &self.disks {
            block.push(BlockConfig {
                serial: disk.serial.clone(),
                fd: Some(give(fds, open_both(&disk.path)?)?),
                read_only: false,
            });
        }
        Ok(block)
    }

    /// Starts a VM.
    ///
    /// # Errors
    /// When a file can't be opened or the VMM can't be started.
    pub fn start(&self, artifacts: &Artifacts) -> Result<Vm> {
        self.prepare(artifacts)?.run()
    }
}

impl PreparedVm {
    /// The VMM's process.
    pub fn pid(&self) -> u32 {
        self.vm.child.id()
    }

    /// The configuration that [`PreparedVm::run`] will send; a test may spoil it.
    pub fn config_mut(&mut self) -> &mut VmConfig {
        &mut self.config
    }

    /// Sends the configuration.
    ///
    /// # Errors
    /// When the VMM has already ended.
    pub fn run(self) -> Result<Vm> {
        let text = serde_json::to_string(&self.config).map_err(std::io::Error::from);
        self.run_with(&text.context(|| "encode the configuration".into())?)
    }

    /// Sends `text` in place of the configuration.
    ///
    /// # Errors
    /// When the VMM has already ended.
    pub fn run_with(mut self, text: &str) -> Result<Vm> {
        let sent = self.pipe.write_all(text.as_bytes());
        sent.context(|| "send the VMM its configuration".into())?;
        self.vm.started = Instant::now();
        Ok(self.vm)
    }
}

impl Vm {
    /// The VMM's process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// When the VMM got its configuration.
    pub fn started(&self) -> Instant {
        self.started
    }

    /// The next event; `None` once the VMM has closed its end.
    ///
    /// # Errors
    /// When none comes in time, or a line isn't one of the contract's.
    pub fn event(&self, timeout: Duration) -> Result<Option<Event>> {
        match self.events.recv_timeout(timeout) {
            Ok(Ok(event)) => Ok(Some(event)),
            Ok(Err(line)) => Err(Error::Unexpected(format!("not an event: {line:?}"))),
            Err(RecvTimeoutError::Disconnected) => Ok(None),
            Err(RecvTimeoutError::Timeout) => Err(Error::TimedOut {
                what: "an event of the VMM".into(),
                seconds: timeout.as_secs(),
                detail: format!("; {}", self.logs()),
            }),
        }
    }

    /// Waits until the agent listens and returns that event and the moment it was read.
    ///
    /// # Errors
    /// When the VM ends before, or nothing happens in time.
    pub fn wait_ready(&self, timeout: Duration) -> Result<(Event, Instant)> {
        let end = Instant::now() + timeout;
        loop {
            match self.event(end.saturating_duration_since(Instant::now()))? {
                Some(ready @ Event::Ready { .. }) => return Ok((ready, Instant::now())),
                Some(Event::Running { .. }) => {}
                other => {
                    return Err(Error::Unexpected(format!(
                        "the VM ended before the agent was ready: {other:?}; {}",
                        self.logs()
                    )));
                }
            }
        }
    }

    /// Asks the VMM on its control socket.
    ///
    /// # Errors
    /// When the socket breaks or the answer isn't one of the contract's.
    pub fn control(&self, request: &Request) -> Result<Response> {
        let line = serde_json::to_string(request).map_err(std::io::Error::from);
        let line = line.context(|| "encode a request".into())?;
        parse_response(&self.control_line(&line)?)
    }

    /// Asks the VMM to save the machine to these files.
    ///
    /// # Errors
    /// When the socket breaks or the answer isn't one of the contract's.
    pub fn save(&self, files: &[File]) -> Result<Response> {
        self.control_with(&Request::SaveTemplate {}, files)
    }

    /// Asks the VMM on its control socket, with descriptors of `files`.
    ///
    /// # Errors
    /// When the socket breaks or the answer isn't one of the contract's.
    pub fn control_with(&self, request: &Request, files: &[File]) -> Result<Response> {
        let stream = connect(&self.folder.path().join("control.sock"))?;
        let line = serde_json::to_string(request).map_err(std::io::Error::from);
        let line = line.context(|| "encode a request".into())? + "\n";
        let fds: Vec<RawFd> = files.iter().map(AsRawFd::as_raw_fd).collect();
        sendmsg::<()>(
            stream.as_raw_fd(),
            &[IoSlice::new(line.as_bytes())],
            &[ControlMessage::ScmRights(&fds)],
            MsgFlags::empty(),
            None,
        )
        .context(|| "send a request with descriptors".into())?;
        read_response(stream)
    }

    /// Sends one line on a new connection to the control socket and returns the answer's line.
    ///
    /// # Errors
    /// When the socket breaks.
    pub fn control_line(&self, line: &str) -> Result<String> {
        let mut stream = connect(&self.folder.path().join("control.sock"))?;
        writeln!(stream, "{line}").context(|| "send a request".into())?;
        read_answer(stream)
    }

    /// Dials a vsock port of the guest.
    ///
    /// # Errors
    /// When the guest refuses or doesn't answer within a minute.
    pub fn dial(&self, port: u32) -> Result<UnixStream> {
        let mut stream = connect(&self.folder.path().join("vsock.sock"))?;
        writeln!(stream, "CONNECT {port}").context(|| format!("dial port {port}"))?;
        let mut answer = Vec::new();
        let mut byte = [0];
        while !answer.ends_with(b"\n") {
            let read = stream
                .read(&mut byte)
                .context(|| format!("dial port {port}"))?;
            if read == 0 || answer.len() > 64 {
                let refused = format!("port {port} of the guest was refused: {answer:?}");
                return Err(Error::Unexpected(refused));
            }
            answer.push(byte[0]);
        }
        Ok(stream)
    }

    /// The folder served to the guest.
    pub fn share(&self) -> PathBuf {
        self.folder.path().join("share")
    }

    /// What the guest has printed.
    pub fn console(&self) -> String {
        read_lossy(&self.folder.path().join("console.log"))
    }

    /// The end of both logs, for messages.
    pub fn logs(&self) -> String {
        let log = read_lossy(&self.folder.path().join("vmm.log"));
        format!(
            "VMM's log: {:?}; console: {:?}",
            tail(&log),
            tail(&self.console())
        )
    }

    /// Sends the VMM a signal.
    pub fn signal(&self, signal: nix::sys::signal::Signal) {
        let pid = nix::unistd::Pid::from_raw(self.child.id() as i32);
        let _ = nix::sys::signal::kill(pid, signal);
    }

    /// Waits for the VMM's end.
    ///
    /// # Errors
    /// When it hasn't ended in time.
    pub fn wait_end(&mut self, timeout: Duration) -> Result<ExitStatus> {
        let end = Instant::now() + timeout;
        loop {
            if let Some(status) = self
                .child
                .try_wait()
                .context(|| "wait for the VMM".into())?
            {
                return Ok(status);
            }
            if Instant::now() > end {
                return Err(Error::TimedOut {
                    what: "the VMM's end".into(),
                    seconds: timeout.as_secs(),
                    detail: format!("; {}", self.logs()),
                });
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn read_answer(stream: UnixStream) -> Result<String> {
    let mut answer = String::new();
    BufReader::new(stream.take(MAX_CONTROL_LINE as u64))
        .read_line(&mut answer)
        .context(|| "read the response".into())?;
    Ok(answer)
}

fn read_response(stream: UnixStream) -> Result<Response> {
    parse_response(&read_answer(stream)?)
}

fn parse_response(answer: &str) -> Result<Response> {
    serde_json::from_str(answer)
        .map_err(|error| Error::Unexpected(format!("not a response: {answer:?}: {error}")))
}

fn tail(text: &str) -> String {
    let lines: Vec<&str> = text.lines().rev().take(6).collect();
    lines.into_iter().rev().collect::<Vec<_>>().join("\n")
}

fn read_lossy(path: &Path) -> String {
    String::from_utf8_lossy(&std::fs::read(path).unwrap_or_default()).into_owned()
}

fn read_events(pipe: OwnedFd) -> Receiver<std::result::Result<Event, String>> {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        for line in BufReader::new(File::from(pipe))
            .lines()
            .map_while(|line| line.ok())
        {
            let event = serde_json::from_str(&line).map_err(|error| format!("{line}: {error}"));
            if sender.send(event).is_err() {
                return;
            }
        }
    });
    receiver
}

fn give(fds: &mut ChildFds, fd: impl AsFd) -> Result<RawFd> {
    fds.add(fd).context(|| "pass a descriptor on".into())
}

fn pipe() -> Result<(OwnedFd, OwnedFd)> {
    nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).context(|| "make a pipe".into())
}

fn open(path: &Path) -> Result<File> {
    File::open(path).context(|| format!("open {}", path.display()))
}

fn open_both(path: &Path) -> Result<File> {
    let opened = File::options().read(true).write(true).open(path);
    opened.context(|| format!("open {}", path.display()))
}

fn create(path: &Path) -> Result<File> {
    File::create(path).context(|| format!("create {}", path.display()))
}

fn listen(path: &Path) -> Result<UnixListener> {
    UnixListener::bind(path).context(|| format!("listen on {}", path.display()))
}

fn connect(path: &Path) -> Result<UnixStream> {
    let stream = UnixStream::connect(path).context(|| format!("connect to {}", path.display()))?;
    let limit = Some(Duration::from_secs(60));
    stream
        .set_read_timeout(limit)
        .context(|| "set a time limit".into())?;
    Ok(stream)
}
