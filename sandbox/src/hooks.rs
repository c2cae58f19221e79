//! OCI hooks that run on the host (OCI runtime spec, "POSIX-platform Hooks").

use crate::ids::ContainerId;
use oci_spec::runtime::Hook;
use serde::Serialize;
use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Limit for a hook that sets none.
const DEFAULT_LIMIT: Duration = Duration::from_secs(60);

/// Bytes of a failed hook's stderr that go into the error.
const MAX_STDERR: u64 = 4096;

/// A hook that failed.
#[derive(Debug, thiserror::Error)]
#[error("the {kind} hook {path} failed: {cause}", path = .path.display())]
pub struct HookError {
    kind: &'static str,
    path: PathBuf,
    cause: String,
}

/// A container's state, as a hook gets it on stdin (OCI runtime spec, "State").
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct HookState {
    oci_version: &'static str,
    id: String,
    status: &'static str,
    pid: u32,
    bundle: PathBuf,
    annotations: HashMap<String, String>,
}

impl HookState {
    pub fn new(
        id: &ContainerId,
        status: &'static str,
        pid: u32,
        bundle: &Path,
        annotations: HashMap<String, String>,
    ) -> Self {
        let (id, bundle) = (id.to_string(), bundle.to_owned());
        Self {
            oci_version: "1.0.2",
            id,
            status,
            pid,
            bundle,
            annotations,
        }
    }
}

/// Runs `hooks` in order, off the runtime's thread, up to the first that fails.
pub(crate) async fn run(
    kind: &'static str,
    hooks: &[Hook],
    state: &HookState,
) -> Result<(), HookError> {
    for hook in hooks {
        let (hook, path) = (hook.clone(), hook.path().clone());
        let state = serde_json::to_vec(state);
        let ran = tokio::task::spawn_blocking(move || run_one(&hook, &state?)).await;
        ran.map_err(io::Error::other)
            .flatten()
            .map_err(|cause| HookError {
                kind,
                path,
                cause: cause.to_string(),
            })?;
    }
    Ok(())
}

fn run_one(hook: &Hook, state: &[u8]) -> io::Result<()> {
    use std::os::unix::process::CommandExt;
    let mut command = Command::new(hook.path());
    if let Some([name, args @ ..]) = hook.args().as_deref() {
        command.arg0(name).args(args);
    }
    command.env_clear();
    for pair in hook.env().iter().flatten() {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        command.env(key, value);
    }
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    let mut child = command.spawn()?;
    if let Some(mut stdin) = child.stdin.take() {
        // A hook may end without reading its state.
        let _ = stdin.write_all(state);
    }
    let stderr = child.stderr.take();
    let limit = hook
        .timeout()
        .and_then(|t| u64::try_from(t).ok())
        .map_or(DEFAULT_LIMIT, Duration::from_secs);
    let status = wait(&mut child, limit)?;
    if status.success() {
        return Ok(());
    }
    let mut text = Vec::new();
    if let Some(stderr) = stderr {
        stderr.take(MAX_STDERR).read_to_end(&mut text)?;
    }
    Err(io::Error::other(format!(
        "{status}: {}",
        String::from_utf8_lossy(&text).trim()
    )))
}

fn wait(child: &mut Child, limit: Duration) -> io::Result<std::process::ExitStatus> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        if Instant::now() >= deadline {
            child.kill()?;
            child.wait()?;
            return Err(io::Error::new(
                io::ErrorKind::TimedOut,
                format!("it ran longer than {limit:?}"),
            ));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn shell(script: &str) -> Hook {
        let hook =
            json!({"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["K=v"], "timeout": 1});
        serde_json::from_value(hook).unwrap()
    }

    fn state() -> HookState {
        let id = ContainerId::try_from("c1").unwrap();
        HookState::new(&id, "created", 42, Path::new("/b"), HashMap::new())
    }

    #[tokio::test]
    async fn a_hook_gets_the_state_and_its_own_environment_only() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        let script = format!(
            "cat > {0}; echo >> {0}; echo \"$K,$HOME\" >> {0}",
            out.display()
        );
        run("prestart", &[shell(&script)], &state()).await.unwrap();
        let text = std::fs::read_to_string(out).unwrap();
        let (first, second) = text.split_once('\n').unwrap();
        let seen: serde_json::Value = serde_json::from_str(first).unwrap();
        assert_eq!(seen["pid"], 42);
        assert_eq!(seen["status"], "created");
        assert_eq!(seen["ociVersion"], "1.0.2");
        assert_eq!(second.trim(), "v,");
    }

    #[tokio::test]
    async fn a_failed_or_endless_hook_is_an_error_with_its_words() {
        let error = run(
            "poststart",
            &[shell("echo no network >&2; exit 3")],
            &state(),
        )
        .await
        .unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("poststart") && text.contains("no network") && text.contains('3'),
            "{text}"
        );
        let error = run("prestart", &[shell("exec sleep 30")], &state())
            .await
            .unwrap_err();
        assert!(error.to_string().contains("longer than 1s"), "{error}");
    }
}
