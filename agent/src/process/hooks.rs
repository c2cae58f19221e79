//! `hooks.startContainer`: programs of the container's image that run between start and the
//! execution of the container's own program (runtime spec, "POSIX-platform Hooks").

use crate::error::{Context, Failure, Kind};
use crate::spec::{absolute_path, no_nul};
use oci_spec::runtime::{Hook, Spec};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{PidfdFlags, pidfd_open};
use serde_json::json;
use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};

/// How much of what a failed hook has complained about is passed on, in bytes.
const MAX_COMPLAINT: u64 = 1024;

/// The hooks of a container.
#[derive(Debug, Clone, Default)]
pub struct HookPlan {
    hooks: Vec<OneHook>,
    /// Everything in the state that hooks are given but the id and the pid.
    state: serde_json::Value,
}

#[derive(Debug, Clone)]
struct OneHook {
    path: PathBuf,
    args: Vec<String>,
    env: Vec<(String, String)>,
    /// Seconds.
    timeout: Option<i64>,
}

impl HookPlan {
    /// Checks `hooks.startContainer`.
    pub fn new(spec: &Spec) -> Result<Self, Failure> {
        let list = spec.hooks().as_ref();
        let list = list.and_then(|hooks| hooks.start_container().as_ref());
        let hooks: Vec<OneHook> = list
            .into_iter()
            .flatten()
            .enumerate()
            .map(|(index, hook)| OneHook::new(&format!("hooks.startContainer[{index}]"), hook))
            .collect::<Result<_, _>>()?;
        if hooks.is_empty() {
            return Ok(Self::default());
        }
        let root = spec.root().as_ref().map(|root| root.path());
        Ok(Self {
            hooks,
            state: json!({
                "ociVersion": spec.version(),
                "status": "created",
                "bundle": root,
                "annotations": spec.annotations(),
            }),
        })
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.hooks.is_empty()
    }

    /// In the container's first process: runs them one after another, until one fails.
    pub fn run(&self, id: &str) -> Result<(), Failure> {
        if self.is_empty() {
            return Ok(());
        }
        let mut state = self.state.clone();
        if let Some(state) = state.as_object_mut() {
            state.insert("id".to_owned(), id.into());
            state.insert("pid".to_owned(), std::process::id().into());
        }
        let state = state.to_string();
        for (index, hook) in self.hooks.iter().enumerate() {
            hook.run(&state).map_err(|reason| {
                let path = hook.path.display();
                let message =
                    format!("error running startContainer hook #{index} ({path}): {reason}");
                Failure::new(Kind::FailedPrecondition, message)
            })?;
        }
        Ok(())
    }
}

impl OneHook {
    fn new(field: &str, hook: &Hook) -> Result<Self, Failure> {
        let args = hook.args().clone().unwrap_or_default();
        for arg in &args {
            no_nul(&format!("{field}.args"), arg.as_bytes())?;
        }
        let mut env = Vec::new();
        for entry in hook.env().iter().flatten() {
            let field = format!("{field}.env");
            no_nul(&field, entry.as_bytes())?;
            match entry.split_once('=') {
                Some((name, value)) if !name.is_empty() => {
                    env.push((name.to_owned(), value.to_owned()));
                }
                _ => {
                    return Err(Failure::invalid(
                        field,
                        format!("{entry:?} is not NAME=value"),
                    ));
                }
            }
        }
        if let Some(timeout) = hook.timeout().filter(|timeout| *timeout <= 0) {
            return Err(Failure::invalid(
                format!("{field}.timeout"),
                format!("{timeout} is not a number of seconds above 0"),
            ));
        }
        Ok(Self {
            path: absolute_path(&format!("{field}.path"), hook.path())?.to_owned(),
            args,
            env,
            timeout: hook.timeout(),
        })
    }

    fn run(&self, state: &str) -> Result<(), String> {
        let mut command = Command::new(&self.path);
        if let Some(name) = self.args.first() {
            command.arg0(name);
        }
        command
            .args(self.args.iter().skip(1))
            .env_clear()
            .envs(self.env.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let mut child = command.spawn().map_err(|error| error.to_string())?;
        if let Some(mut stdin) = child.stdin.take() {
            // It need not read it.
            let _ = stdin.write_all(state.as_bytes());
        }
        let status = self.wait(&mut child).map_err(|failure| failure.message)?;
        match status {
            None => Err(format!("not done after {} s", self.timeout.unwrap_or(0))),
            Some(status) if status.success() => Ok(()),
            Some(status) => Err(format!("{status}: {}", complaint(child))),
        }
    }

    /// `None` when its time was up; then it has been killed.
    fn wait(&self, child: &mut Child) -> Result<Option<ExitStatus>, Failure> {
        if let Some(seconds) = self.timeout {
            let action = || "wait for a hook";
            let pid = rustix::process::Pid::from_child(child);
            let pidfd = pidfd_open(pid, PidfdFlags::empty()).context(action)?;
            let limit = Timespec {
                tv_sec: seconds,
                tv_nsec: 0,
            };
            let mut polled = [PollFd::new(&pidfd, PollFlags::IN)];
            let ended = rustix::event::poll(&mut polled, Some(&limit)).context(action)?;
            if ended == 0 {
                let _ = child.kill();
                let _ = child.wait();
                return Ok(None);
            }
        }
        child.wait().map(Some).context(|| "wait for a hook")
    }
}

fn complaint(child: Child) -> String {
    let mut text = Vec::new();
    if let Some(stderr) = child.stderr {
        // What it left running may hold the pipe open.
        let _ = rustix::fs::fcntl_setfl(&stderr, rustix::fs::OFlags::NONBLOCK);
        let _ = stderr.take(MAX_COMPLAINT).read_to_end(&mut text);
    }
    String::from_utf8_lossy(&text).trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(hook: serde_json::Value) -> Result<HookPlan, Failure> {
        let spec = json!({"ociVersion": "1.2.0", "hooks": {"startContainer": [hook]}});
        HookPlan::new(&serde_json::from_value(spec).expect("a spec"))
    }

    #[test]
    fn gives_the_state_and_takes_the_exit_status() {
        let folder = tempfile::tempdir().expect("a folder");
        let seen = folder.path().join("seen");
        let script = format!("cat > {}; echo \"$0 $A\" >> {0}", seen.display());
        let hook = json!({"path": "/bin/sh", "args": ["sh", "-c", script, "zero"], "env": ["A=b"]});
        plan(hook).expect("a plan").run("c1").expect("run");
        let text = std::fs::read_to_string(seen).expect("what it saw");
        let (state, rest) = text.rsplit_once('}').expect("a state");
        let state: serde_json::Value = serde_json::from_str(&format!("{state}}}")).expect("JSON");
        assert_eq!(
            (&state["id"], &state["status"]),
            (&json!("c1"), &json!("created"))
        );
        assert_eq!(state["pid"], json!(std::process::id()));
        assert_eq!(rest, "zero b\n");
    }

    #[test]
    fn tells_why_a_hook_failed() {
        for (hook, words) in [
            (
                json!({"path": "/bin/sh", "args": ["sh", "-c", "echo why >&2; exit 3"]}),
                "exit status: 3: why",
            ),
            (json!({"path": "/no/such"}), "No such file"),
            (
                json!({"path": "/bin/sleep", "args": ["sleep", "1000"], "timeout": 1}),
                "not done after 1 s",
            ),
        ] {
            let failure = plan(hook).expect("a plan").run("c1").expect_err("failed");
            assert!(failure.message.contains("hook #0"), "{failure}");
            assert!(failure.message.contains(words), "{failure}");
        }
    }

    #[test]
    fn refuses_by_name_what_is_no_hook() {
        for (hook, field) in [
            (json!({"path": "bin/sh"}), "hooks.startContainer[0].path"),
            (
                json!({"path": "/bin/sh", "env": ["x"]}),
                "hooks.startContainer[0].env",
            ),
            (
                json!({"path": "/bin/sh", "timeout": 0}),
                "hooks.startContainer[0].timeout",
            ),
        ] {
            let failure = plan(hook).expect_err("refused");
            assert!(failure.message.starts_with(field), "{failure}");
        }
    }
}
