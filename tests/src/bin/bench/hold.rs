//! A program that is held just before it begins, so that it can be watched from its first
//! instruction on.

use bulkhead_tests::error::{Context, Error, Result};
use bulkhead_tests::perf::now_ns;
use nix::sys::signal::{Signal, kill, raise};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::process::Command;

/// This program's hidden subcommand.
pub const SUBCOMMAND: &str = "hold";

/// What can be said on the command line.
#[derive(clap::Args)]
pub struct Arguments {
    /// Program and arguments.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
    words: Vec<OsString>,
}

/// Stops this process; continued, it executes the program.
pub fn run(arguments: &Arguments) -> Error {
    let words = &arguments.words;
    let _ = raise(Signal::SIGSTOP);
    Error::Io {
        what: format!("execute {:?}", words[0]),
        cause: Command::new(&words[0]).args(&words[1..]).exec(),
    }
}

/// Program and first argument that hold what follows them.
///
/// # Errors
/// When this program's own file is unknown.
pub fn launcher() -> Result<Vec<OsString>> {
    let exe = std::env::current_exe().context(|| "find this program's own file".into())?;
    Ok(vec![exe.into(), SUBCOMMAND.into()])
}

/// The same command, held.
///
/// # Errors
/// When this program's own file is unknown.
pub fn held(command: &Command) -> Result<Command> {
    let words = launcher()?;
    let mut held = Command::new(&words[0]);
    held.args(&words[1..])
        .arg(command.get_program())
        .args(command.get_args());
    if let Some(folder) = command.get_current_dir() {
        held.current_dir(folder);
    }
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => held.env(name, value),
            None => held.env_remove(name),
        };
    }
    Ok(held)
}

fn pid(id: u32) -> Pid {
    Pid::from_raw(id as i32)
}

/// Waits until a child that was started held has stopped.
///
/// # Errors
/// When it ends instead.
pub fn wait_until_held(child: u32) -> Result<()> {
    let status = waitpid(pid(child), Some(WaitPidFlag::WUNTRACED));
    match status.context(|| "wait for a held program".into())? {
        WaitStatus::Stopped(..) => Ok(()),
        other => Err(Error::Unexpected(format!(
            "a program that should wait has ended: {other:?}"
        ))),
    }
}

/// Lets a held child go; returns the moment before, as [`now_ns`].
///
/// # Errors
/// When it's gone.
pub fn release(child: u32) -> Result<u64> {
    let began = now_ns();
    kill(pid(child), Signal::SIGCONT).context(|| "let a held program go".into())?;
    Ok(began)
}
