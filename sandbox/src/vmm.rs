//! The VMM as a child process: started with the descriptors its contract names, heard through its
//! event pipe, and watched until its end.

use crate::fds::ChildFds;
use crate::folder::{CONSOLE_LIMIT, FolderError, RuntimeFolder};
use crate::images::Images;
use crate::process_ref::ProcessRef;
use crate::sizing::MachineSize;
use crate::spec::HostNetns;
use crate::template::Template;
use bulkhead_proto::vmm::{
    BlockConfig, CONFIG_FD, ConsoleConfig, Event, ExitReason, TemplateConfig, VmConfig,
};
use nix::fcntl::OFlag;
use nix::sched::{CloneFlags, setns, unshare};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::net::unix::pipe;
use tokio::sync::{mpsc, watch};

/// Longest event line that is read: the contract's longest event is 32 lines of 512 bytes, which
/// JSON may blow up sixfold.
const MAX_EVENT_LINE: u64 = 256 * 1024;

/// How long the event pipe may stay open after the VMM's end.
const LAST_EVENTS: Duration = Duration::from_secs(1);

/// Why a VM ended, as the VMM said or as its process shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VmEnd {
    /// The VMM's own report.
    Reported(ExitReason),
    /// The VMM was killed.
    Killed {
        /// By this signal.
        signal: i32,
    },
    /// The VMM left without a report.
    Silent {
        /// With this exit code.
        code: i32,
    },
}

impl std::fmt::Display for VmEnd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            VmEnd::Reported(reason) => write!(f, "{reason}"),
            VmEnd::Killed { signal } => write!(f, "the VMM was killed by signal {signal}"),
            VmEnd::Silent { code } => {
                write!(f, "the VMM left with exit code {code} and gave no reason")
            }
        }
    }
}

/// What a VMM is started with.
pub(crate) struct VmmStart<'a> {
    pub program: &'a PathBuf,
    pub sandbox: &'a str,
    pub size: MachineSize,
    pub images: &'a Images,
    /// What to continue instead of booting the kernel.
    pub template: Option<&'a Template>,
    pub folder: &'a RuntimeFolder,
    pub netns: &'a HostNetns,
    pub kernel_params: &'a [String],
    pub verbose: bool,
    /// The VMM is killed when the thread that starts it ends, which must be the process's main one
    /// or one that lives as long: for a VM that nobody could clean up after.
    pub dies_with_us: bool,
}

/// A running VMM. Dropping the handle doesn't end it.
#[derive(Debug)]
pub(crate) struct Vmm {
    pub process: ProcessRef,
    pub ended: watch::Receiver<Option<VmEnd>>,
    /// The size in MiB of the last [`Event::HotplugReached`].
    pub hotplug_reached: watch::Receiver<Option<u32>>,
    kill: mpsc::Sender<()>,
}

/// A VMM that waits for its configuration. If it's never given, because this process dies before
/// it has written down whom to clean up, the VMM reads an empty one and leaves.
pub(crate) struct Unconfigured {
    pub vmm: Vmm,
    pub events: mpsc::Receiver<Event>,
    config: VmConfig,
    pipe: File,
}

impl Unconfigured {
    /// Lets the VMM begin.
    pub fn configure(mut self) -> io::Result<(Vmm, mpsc::Receiver<Event>)> {
        let text = serde_json::to_vec(&self.config)?;
        self.pipe.write_all(&text)?;
        Ok((self.vmm, self.events))
    }
}

impl Vmm {
    /// Starts the VMM. Must be called on the runtime.
    pub fn spawn(start: VmmStart<'_>) -> Result<Unconfigured, FolderError> {
        let program = start.program.clone();
        let failed = |cause| FolderError::Io {
            verb: "start",
            path: program.clone(),
            cause,
        };
        let log = start.folder.create_log("vmm.log")?;
        let (config_read, config_write) =
            nix::unistd::pipe2(OFlag::O_CLOEXEC).map_err(|e| failed(e.into()))?;
        let (events_read, events_write) =
            nix::unistd::pipe2(OFlag::O_CLOEXEC).map_err(|e| failed(e.into()))?;
        let mut fds = ChildFds::new();
        let config_fd = fds.add(&config_read).map_err(failed)?;
        debug_assert_eq!(config_fd, CONFIG_FD);
        let config = describe(&start, &mut fds, &events_write)?;

        let mut command = Command::new(start.program);
        command
            .env_clear()
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        isolate(&mut command, start.netns, start.dies_with_us).map_err(failed)?;
        let child = fds.spawn(&mut command).map_err(failed)?;
        drop((config_read, events_write));

        let process = ProcessRef::of(child.id()).map_err(failed)?;
        let (kill, killed) = mpsc::channel(1);
        let (ended_tx, ended) = watch::channel(None);
        let (events_tx, events) = mpsc::channel(8);
        let reader = pipe::Receiver::from_owned_fd(events_read).map_err(failed)?;
        let (reached_tx, hotplug_reached) = watch::channel(None);
        let told = Told {
            events: events_tx,
            hotplug_reached: reached_tx,
        };
        tokio::spawn(monitor(child, reader, told, killed, ended_tx));
        let vmm = Self {
            process,
            ended,
            hotplug_reached,
            kill,
        };
        Ok(Unconfigured {
            vmm,
            events,
            config,
            pipe: File::from(config_write),
        })
    }

    /// Ends the VMM with SIGKILL; [`Vmm::ended`] tells when it's gone.
    pub fn kill(&self) {
        let _ = self.kill.try_send(());
    }

    /// Waits for the VMM's end.
    pub async fn wait(&self) -> VmEnd {
        let mut ended = self.ended.clone();
        let end = ended
            .wait_for(Option::is_some)
            .await
            .ok()
            .and_then(|end| end.clone());
        end.unwrap_or(VmEnd::Silent { code: -1 })
    }
}

/// The devices that [`describe`] gives every VM, in words: part of a template's key, to be changed
/// with them.
pub(crate) const DEVICES: &str = "block(root,ro) vsock fs console";

/// Adds the VM's descriptors to `fds` and names them in the configuration.
fn describe(
    start: &VmmStart<'_>,
    fds: &mut ChildFds,
    events: &OwnedFd,
) -> Result<VmConfig, FolderError> {
    let folder = start.folder;
    let share_path = folder.share();
    let failed = |cause| FolderError::Io {
        verb: "pass on",
        path: share_path.clone(),
        cause,
    };
    let share = File::open(&share_path).map_err(failed)?;
    let console = folder.create_log("console.log")?;
    let (vsock, control) = (folder.bind("vsock.sock")?, folder.bind("control.sock")?);
    Ok(VmConfig {
        sandbox_id: start.sandbox.to_string(),
        vcpus: start.size.vcpus,
        memory_mib: start.size.memory_mib,
        hotplug_mib: start.size.hotplug_mib,
        kvm_fd: fds.add(&start.images.kvm).map_err(failed)?,
        kernel_fd: fds.add(&start.images.kernel).map_err(failed)?,
        kernel_params: start.kernel_params.to_vec(),
        block: vec![BlockConfig {
            serial: "root".into(),
            fd: Some(fds.add(&start.images.rootfs).map_err(failed)?),
            read_only: true,
        }],
        vsock_fd: fds.add(&vsock).map_err(failed)?,
        share_fd: Some(fds.add(&share).map_err(failed)?),
        console: ConsoleConfig {
            log_fd: Some(fds.add(&console).map_err(failed)?),
            limit_bytes: CONSOLE_LIMIT,
            verbose: start.verbose,
        },
        control_fd: fds.add(&control).map_err(failed)?,
        events_fd: fds.add(events).map_err(failed)?,
        template: match start.template {
            Some(template) => Some(TemplateConfig {
                memory_fd: fds.add(&template.memory).map_err(failed)?,
                state_fd: fds.add(&template.state).map_err(failed)?,
            }),
            None => None,
        },
    })
}

/// Own session, no new privileges, and the task's host network namespace.
fn isolate(command: &mut Command, netns: &HostNetns, dies_with_us: bool) -> io::Result<()> {
    let existing = match netns {
        HostNetns::Path(path) => Some(File::open(path).map_err(|cause| {
            io::Error::new(
                cause.kind(),
                format!("network namespace {}: {cause}", path.display()),
            )
        })?),
        HostNetns::New => None,
    };
    let fresh = *netns == HostNetns::New;
    let parent = nix::unistd::getpid();
    // SAFETY: between fork and exec the closure only makes system calls on what was opened before;
    // it neither allocates nor locks.
    unsafe {
        command.pre_exec(move || {
            nix::unistd::setsid()?;
            if let Some(netns) = &existing {
                setns(netns, CloneFlags::CLONE_NEWNET)?;
            } else if fresh {
                unshare(CloneFlags::CLONE_NEWNET)?;
            }
            if libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 {
                return Err(io::Error::last_os_error());
            }
            if dies_with_us {
                if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0 {
                    return Err(io::Error::last_os_error());
                }
                // It may have died before the signal was asked for.
                if nix::unistd::getppid() != parent {
                    return Err(io::Error::from_raw_os_error(libc::ESRCH));
                }
            }
            Ok(())
        });
    }
    Ok(())
}

/// Who is told of events.
struct Told {
    /// Whoever brings the VM up.
    events: mpsc::Sender<Event>,
    hotplug_reached: watch::Sender<Option<u32>>,
}

/// Reads events and waits for the end, both for as long as the VMM lives.
async fn monitor(
    mut child: std::process::Child,
    events: pipe::Receiver,
    told: Told,
    mut killed: mpsc::Receiver<()>,
    ended: watch::Sender<Option<VmEnd>>,
) {
    let reader = tokio::spawn(read_events(events, told));
    let exit = exit_signal(child.id());
    tokio::pin!(exit);
    loop {
        tokio::select! {
            () = &mut exit => break,
            // Not yet reaped, so the pid is still the VMM's.
            Some(()) = killed.recv() => if let Err(error) = child.kill() {
                tracing::warn!(%error, "killing the VMM failed");
            },
        }
    }
    let status = child.wait();
    // A worker of the VMM's could hold the pipe open; what matters has been written by then.
    let reported = tokio::time::timeout(LAST_EVENTS, reader)
        .await
        .ok()
        .and_then(Result::ok)
        .flatten();
    let end = match (reported, status) {
        (Some(reason), _) => VmEnd::Reported(reason),
        (None, Ok(status)) => match status.signal() {
            Some(signal) => VmEnd::Killed { signal },
            None => VmEnd::Silent {
                code: status.code().unwrap_or(-1),
            },
        },
        (None, Err(error)) => {
            tracing::error!(%error, "waiting for the VMM failed");
            VmEnd::Silent { code: -1 }
        }
    };
    tracing::info!(%end, "the VMM has ended");
    ended.send_replace(Some(end));
}

/// Ready when the child has ended, without reaping it.
async fn exit_signal(pid: u32) {
    match crate::process_ref::async_pidfd(pid) {
        Ok(pidfd) => {
            let _ = pidfd.readable().await;
        }
        Err(error) => {
            tracing::error!(%error, pid, "cannot watch the VMM by pidfd; polling");
            while ProcessRef::of(pid).is_ok_and(ProcessRef::is_alive) {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// Passes events on and returns the exit reason, if the VMM wrote one. The VMM may be in the
/// guest's hands, so lines are bounded and a bad one ends the reading.
async fn read_events(events: pipe::Receiver, told: Told) -> Option<ExitReason> {
    let mut events = BufReader::new(events);
    let mut reason = None;
    loop {
        let mut line = Vec::new();
        match (&mut events)
            .take(MAX_EVENT_LINE)
            .read_until(b'\n', &mut line)
            .await
        {
            Ok(0) => return reason,
            Ok(_) => {}
            Err(error) => {
                tracing::warn!(%error, "reading the VMM's events failed");
                return reason;
            }
        }
        match serde_json::from_slice::<Event>(&line) {
            Ok(Event::Exited(why)) => reason = Some(why),
            Ok(event) => {
                tracing::info!(?event, "VMM event");
                if let Event::HotplugReached { mib } = event {
                    told.hotplug_reached.send_replace(Some(mib));
                }
                // Nobody listens once the guest is ready.
                let _ = told.events.try_send(event);
            }
            Err(error) => {
                tracing::warn!(%error, "the VMM wrote an event that is none");
                return reason;
            }
        }
    }
}

/// Shared handle.
pub(crate) type SharedVmm = Arc<Vmm>;
