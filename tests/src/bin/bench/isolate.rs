//! Namespaces of the bench's own, so that nothing is left however it ends: all that it starts lives
//! in a process namespace that ends with its first process, and writes to a fresh /run that nobody
//! else sees.
//!
//! ```text
//! bulkhead-bench start …           waits for the end or a signal, then removes cgroups
//!   unshare                        dies with it
//!     bulkhead-bench  (stage init) first process of the namespaces; reaps
//!       bulkhead-bench (stage work) measures
//! ```

use bulkhead_tests::cgroups;
use bulkhead_tests::error::{Context, Error, Result};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::wait::{WaitStatus, wait};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Child, Command, ExitCode};

/// Environment variable that tells a process its stage.
const STAGE_ENV: &str = "BULKHEAD_BENCH_STAGE";

/// Environment variable with the name of the cgroup folder.
const CGROUP_ENV: &str = "BULKHEAD_BENCH_CGROUP";

/// Where temporary files go: on a tmpfs, with a short path for sockets.
const SCRATCH: &str = "/run/t";

/// Folders that programs under test expect below /run.
const FOLDERS: [&str; 2] = ["/run/containerd/s", SCRATCH];

/// Runs `work` in namespaces of its own. Returns the exit code of the whole.
pub fn run(work: impl FnOnce() -> Result<()>) -> ExitCode {
    let done = match std::env::var(STAGE_ENV).as_deref() {
        Ok("work") => work().map(|()| 0),
        Ok("init") => init(),
        _ => outside(),
    };
    match done {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("bulkhead-bench: {error}");
            ExitCode::FAILURE
        }
    }
}

/// The cgroup below which measured containers may make theirs; removed at the end.
pub fn cgroup() -> String {
    std::env::var(CGROUP_ENV).unwrap_or_else(|_| "bulkhead-bench".into())
}

fn again(stage: &str, command: &mut Command) -> Result<Child> {
    command
        .args(std::env::args_os().skip(1))
        .env(STAGE_ENV, stage)
        .spawn()
        .context(|| format!("start {:?}", command.get_program()))
}

fn own_program() -> Result<PathBuf> {
    std::env::current_exe().context(|| "find this program's own file".into())
}

/// Waits for the end of it all or for a signal.
fn outside() -> Result<u8> {
    let mut signals = SigSet::empty();
    for signal in [
        Signal::SIGINT,
        Signal::SIGTERM,
        Signal::SIGHUP,
        Signal::SIGCHLD,
    ] {
        signals.add(signal);
    }
    signals.thread_block().context(|| "block signals".into())?;
    let cgroup = format!("bulkhead-bench-{}", std::process::id());
    let mut command = Command::new("unshare");
    command
        .args(["--mount", "--pid", "--fork", "--kill-child", "--mount-proc"])
        .arg(own_program()?)
        .env(CGROUP_ENV, &cgroup);
    // SAFETY: prctl is a plain system call, safe between fork and exec.
    unsafe {
        command.pre_exec(|| {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            Ok(())
        });
    }
    let mut child = again("init", &mut command)?;
    let code = loop {
        let signal = signals.wait().context(|| "wait for signals".into())?;
        let ended = child.try_wait().context(|| "wait for the bench".into())?;
        match (ended, signal) {
            (Some(status), _) => break status.code().unwrap_or(1),
            (None, Signal::SIGCHLD) => {}
            (None, signal) => {
                eprintln!("bulkhead-bench: {signal}: ending what was started");
                let _ = child.kill();
                let _ = child.wait();
                break 128 + signal as i32;
            }
        }
    };
    cgroups::remove(&cgroup);
    Ok(u8::try_from(code).unwrap_or(1))
}

/// First process of the namespaces: starts the bench proper and reaps until that has ended.
fn init() -> Result<u8> {
    prepare_run()?;
    let mut command = Command::new(own_program()?);
    let child = again("work", command.env("TMPDIR", SCRATCH))?;
    loop {
        match wait() {
            Ok(WaitStatus::Exited(pid, code)) if pid.as_raw() as u32 == child.id() => {
                return Ok(u8::try_from(code).unwrap_or(1));
            }
            Ok(WaitStatus::Signaled(pid, signal, _)) if pid.as_raw() as u32 == child.id() => {
                let status = std::process::ExitStatus::from_raw(signal as i32);
                return Err(Error::Unexpected(format!(
                    "the bench itself ended: {status}"
                )));
            }
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error).context(|| "wait for processes".into()),
        }
    }
}

/// A fresh /run for this mount namespace.
fn prepare_run() -> Result<()> {
    use nix::mount::{MsFlags, mount};
    mount(
        Some("tmpfs"),
        "/run",
        Some("tmpfs"),
        MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
        Some("mode=755"),
    )
    .context(|| "mount a fresh /run".into())?;
    for folder in FOLDERS {
        std::fs::create_dir_all(folder).context(|| format!("make {folder}"))?;
    }
    Ok(())
}
