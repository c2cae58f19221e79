//! `start`: finds the shim of the container's pod, or starts one in the background, and prints its
//! address. The daemon reads standard output and standard error as one, up to their end: not one
//! byte too many may appear there, and the shim in the background must not hold them open.

use crate::address::{self, Socket};
use crate::bootstrap;
use crate::daemon::{EVENTS_ENV, LISTENER_FD};
use crate::flags::Flags;
use crate::options;
use bulkhead_sandbox::fds::ChildFds;
use bulkhead_sandbox::ids::{ContainerId, IdError, Namespace, SandboxId};
use bulkhead_sandbox::pod;
use bulkhead_sandbox::spec::{BundleSpec, SpecError};
use containerd_shim_protos::bootstrap_api::BootstrapParams;
use protobuf::well_known_types::any::Any;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Longest input that is read; options are some hundred bytes.
const MAX_INPUT: u64 = 1 << 20;

/// Why a shim can't be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A bad id.
    #[error(transparent)]
    Id(#[from] IdError),
    /// A bad spec.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// A file or process operation failed.
    #[error("cannot {verb} {what}: {cause}")]
    Io {
        /// What was tried.
        verb: &'static str,
        /// On what.
        what: String,
        /// Why it failed.
        cause: io::Error,
    },
}

fn fail(verb: &'static str, what: impl ToString) -> impl FnOnce(io::Error) -> StartError {
    let what = what.to_string();
    move |cause| StartError::Io { verb, what, cause }
}

/// Starts or finds the shim for the bundle in the working directory; returns what to print.
///
/// # Errors
/// When an id or the spec is bad, or the shim can't be started; then nothing is left.
pub fn run(flags: &Flags) -> Result<Vec<u8>, StartError> {
    let bundle = std::env::current_dir().map_err(fail("find", "the working directory"))?;
    let input = read_input();
    let params = bootstrap::params(&input, flags);
    ContainerId::try_from(flags.id.as_str())?;
    Namespace::try_from(flags.namespace.as_str())?;
    let group = match bundle.join("config.json").exists() {
        true => group(&bundle, flags)?,
        false => {
            leave_options(&bundle, bootstrap::runtime_options(&input, params.as_ref()))?;
            SandboxId::try_from(flags.id.as_str())?
        }
    };
    let dir = bootstrap::socket_dir(params.as_ref());
    let dir = dir.unwrap_or_else(|| PathBuf::from(address::SOCKET_DIR));
    let socket = address::path(&dir, &flags.address, &flags.namespace, group.as_str());
    let printed = address::to_address(&socket);
    match address::bind(&socket).map_err(fail("listen on", socket.display()))? {
        Socket::Answers => leave_word(&bundle, &printed, None)?,
        Socket::Bound(listener) => {
            let started = daemonise(flags, &group, listener, params.as_ref());
            let left = started.and_then(|pid| leave_word(&bundle, &printed, Some(pid)));
            if left.is_err() {
                let _ = std::fs::remove_file(&socket);
            }
            left?;
        }
    }
    Ok(bootstrap::answer(&printed, params.as_ref()))
}

/// The options or parameters that the daemon may send; it closes the pipe after them.
fn read_input() -> Vec<u8> {
    let mut input = Vec::new();
    // No input at all is fine, and so is one that can't be read: it's a help, not a need.
    let _ = io::stdin().take(MAX_INPUT).read_to_end(&mut input);
    input
}

fn group(bundle: &Path, flags: &Flags) -> Result<SandboxId, StartError> {
    let spec = BundleSpec::load(bundle)?;
    Ok(pod::sandbox_of(&spec.annotations(), &flags.id)?)
}

/// A bundle without a spec is that of a sandbox (of containerd's sandbox API), whose request to be
/// created carries no runtime options.
fn leave_options(bundle: &Path, options: Option<Any>) -> Result<(), StartError> {
    let Some(options) = options else {
        return Ok(());
    };
    options::leave_in(bundle, &options).map_err(fail("leave options in", bundle.display()))
}

fn leave_word(bundle: &Path, printed: &str, pid: Option<u32>) -> Result<(), StartError> {
    let write = |name: &str, text: &str| {
        address::leave_word(bundle, name, text).map_err(fail("write", bundle.join(name).display()))
    };
    if let Some(pid) = pid {
        write("shim.pid", &pid.to_string())?;
    }
    write("address", printed)
}

/// Starts this program again as the daemon: in a session of its own, with /dev/null for its
/// standard streams and no descriptor but the socket. Returns its pid.
fn daemonise(
    flags: &Flags,
    group: &SandboxId,
    listener: UnixListener,
    params: Option<&BootstrapParams>,
) -> Result<u32, StartError> {
    let program = std::env::current_exe().map_err(fail("find", "this program's own file"))?;
    let starting = |cause| fail("start", program.display())(cause);
    let mut fds = ChildFds::new();
    let number = fds.add(&listener).map_err(starting)?;
    debug_assert_eq!(number, LISTENER_FD);
    let mut command = Command::new(&program);
    command.args([
        "-namespace",
        &flags.namespace,
        "-id",
        group.as_str(),
        "-address",
        &flags.address,
    ]);
    if flags.debug {
        command.arg("-debug");
    }
    command
        .arg("serve")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    if let Some(params) = params.filter(|params| !params.containerd_ttrpc_address.is_empty()) {
        command.env(EVENTS_ENV, &params.containerd_ttrpc_address);
    }
    // SAFETY: setsid is a plain system call, safe between fork and exec.
    unsafe {
        command.pre_exec(|| {
            nix::unistd::setsid()?;
            Ok(())
        });
    }
    Ok(fds.spawn(&mut command).map_err(starting)?.id())
}

/// Prints the answer, whole.
///
/// # Errors
/// When the daemon has gone.
pub fn print(answer: &[u8]) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(answer)?;
    stdout.flush()
}
