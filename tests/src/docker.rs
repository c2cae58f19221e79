//! A private Docker daemon over a private containerd, driven through its HTTP API with curl, as the
//! `docker` command does it.

use crate::containerd::{Containerd, Finished, RUNTIME};
use crate::error::{Context, Error, Result};
use serde_json::{Value, json};
use std::fs::File;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Environment variable with the folder of dockerd; scripts/dev sets it when it could build one.
pub const DOCKERD_ENV: &str = "BULKHEAD_DOCKERD";

/// Longest that a call may take, in seconds: a boot, or a stop with its grace time.
const CALL_LIMIT: &str = "150";

/// The folder with Docker's programs; none where they couldn't be built.
pub fn programs() -> Option<PathBuf> {
    let programs = PathBuf::from(std::env::var_os(DOCKERD_ENV)?);
    programs.join("dockerd").is_file().then_some(programs)
}

/// A running daemon. Dropping it ends it.
#[derive(Debug)]
pub struct Docker {
    child: Child,
    folder: PathBuf,
}

impl Docker {
    /// Starts one on `containerd`, whose runtime is Bulkhead unless a container asks for another.
    ///
    /// # Errors
    /// When there is none, or it doesn't answer within a minute.
    pub fn start(containerd: &Containerd) -> Result<Self> {
        let programs = programs().ok_or_else(|| Error::Unexpected("there is no dockerd".into()))?;
        let folder = containerd.folder().join("docker");
        std::fs::create_dir(&folder).context(|| "make Docker's folder".into())?;
        let configuration = json!({
            "runtimes": { "bulkhead": { "runtimeType": RUNTIME } },
            "default-runtime": "bulkhead",
        });
        let file = folder.join("daemon.json");
        std::fs::write(&file, configuration.to_string()).context(|| "write daemon.json".into())?;
        let log = File::create(folder.join("log")).context(|| "make a log".into())?;
        let child = Command::new(programs.join("dockerd"))
            .arg("--config-file")
            .arg(file)
            .arg("--containerd")
            .arg(containerd.socket())
            .arg("--host")
            .arg(format!("unix://{}", folder.join("docker.sock").display()))
            .arg("--data-root")
            .arg(folder.join("root"))
            .arg("--exec-root")
            .arg(folder.join("exec"))
            .arg("--pidfile")
            .arg(folder.join("pid"))
            .arg("--userland-proxy-path")
            .arg(programs.join("docker-proxy"))
            .stdin(Stdio::null())
            .stdout(log.try_clone().context(|| "share a log".into())?)
            .stderr(log)
            .spawn()
            .context(|| "start dockerd".into())?;
        let mut this = Self { child, folder };
        this.wait_until_it_answers()?;
        Ok(this)
    }

    fn wait_until_it_answers(&mut self) -> Result<()> {
        let end = Instant::now() + Duration::from_secs(60);
        while self.call("GET", "/_ping", None).is_err() {
            let ended = self
                .child
                .try_wait()
                .context(|| "wait for dockerd".into())?;
            if ended.is_some() || Instant::now() > end {
                return Err(Error::Unexpected(format!(
                    "dockerd does not answer: {}",
                    self.log_tail(10)
                )));
            }
            std::thread::sleep(Duration::from_millis(200));
        }
        Ok(())
    }

    fn curl(&self, method: &str, path: &str) -> Command {
        let mut command = Command::new("curl");
        command
            .args(["--silent", "--show-error", "--fail-with-body", "--max-time"])
            .args([CALL_LIMIT, "--unix-socket"])
            .arg(self.folder.join("docker.sock"))
            .args(["--request", method])
            .arg(format!("http://docker{path}"))
            .stdin(Stdio::null());
        command
    }

    /// What the daemon answers to a request.
    ///
    /// # Errors
    /// When there is no answer, or it's an error: with what it says.
    pub fn call(&self, method: &str, path: &str, body: Option<&Value>) -> Result<Vec<u8>> {
        let mut command = self.curl(method, path);
        if let Some(body) = body {
            command
                .args(["--header", "Content-Type: application/json", "--data"])
                .arg(body.to_string());
        }
        let output = command.output().context(|| "run curl".into())?;
        if output.status.success() {
            return Ok(output.stdout);
        }
        let finished: Finished = output.into();
        Err(Error::Unexpected(format!("{method} {path}: {finished:?}")))
    }

    /// The same for answers in JSON.
    ///
    /// # Errors
    /// As [`Docker::call`], and when the answer is none.
    pub fn json(&self, method: &str, path: &str, body: Option<&Value>) -> Result<Value> {
        let answer = self.call(method, path, body)?;
        serde_json::from_slice(&answer).map_err(|error| {
            let text = String::from_utf8_lossy(&answer);
            Error::Unexpected(format!("{method} {path}: {error}: {text}"))
        })
    }

    /// Loads the images of an archive.
    ///
    /// # Errors
    /// When the daemon refuses it.
    pub fn load(&self, archive: &std::path::Path) -> Result<()> {
        let mut command = self.curl("POST", "/images/load");
        let output = command
            .args([
                "--header",
                "Content-Type: application/x-tar",
                "--data-binary",
            ])
            .arg(format!("@{}", archive.display()))
            .output();
        let loaded: Finished = output.context(|| "run curl".into())?.into();
        match loaded.code {
            Some(0) if loaded.stdout.contains("Loaded image") => Ok(()),
            _ => Err(Error::Unexpected(format!("load an image: {loaded:?}"))),
        }
    }

    /// Creates and starts a container of this name.
    ///
    /// # Errors
    /// When the daemon refuses either.
    pub fn run(&self, name: &str, configuration: &Value) -> Result<()> {
        let create = format!("/containers/create?name={name}");
        self.json("POST", &create, Some(configuration))?;
        self.call("POST", &format!("/containers/{name}/start"), None)?;
        Ok(())
    }

    /// What a container has written so far, both streams as they came.
    ///
    /// # Errors
    /// As [`Docker::call`].
    pub fn logs(&self, name: &str) -> Result<String> {
        let path = format!("/containers/{name}/logs?stdout=1&stderr=1");
        Ok(unframed(&self.call("GET", &path, None)?))
    }

    /// What a shell script in a container writes, and its exit code.
    ///
    /// # Errors
    /// As [`Docker::call`].
    pub fn exec(&self, name: &str, script: &str) -> Result<(String, i64)> {
        let exec = json!({
            "AttachStdout": true, "AttachStderr": true, "Cmd": ["sh", "-c", script],
        });
        let made = self.json("POST", &format!("/containers/{name}/exec"), Some(&exec))?;
        let id = made["Id"].as_str().unwrap_or_default().to_owned();
        let output = self.call("POST", &format!("/exec/{id}/start"), Some(&json!({})))?;
        let ended = self.json("GET", &format!("/exec/{id}/json"), None)?;
        Ok((unframed(&output), ended["ExitCode"].as_i64().unwrap_or(-1)))
    }

    /// The last lines of the daemon's log.
    pub fn log_tail(&self, lines: usize) -> String {
        let log = std::fs::read(self.folder.join("log")).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let lines: Vec<&str> = log.lines().rev().take(lines).collect();
        lines.into_iter().rev().collect::<Vec<_>>().join("\n")
    }
}

/// Each piece of output is behind a header of 8 bytes: the stream, and a length (Docker's API,
/// "Attach to a container", stream format).
fn unframed(mut bytes: &[u8]) -> String {
    let mut text = Vec::new();
    while let Some((&[_, 0, 0, 0, a, b, c, d], rest)) = bytes.split_first_chunk() {
        let length = u32::from_be_bytes([a, b, c, d]) as usize;
        let (piece, rest) = rest.split_at(length.min(rest.len()));
        text.extend(piece);
        bytes = rest;
    }
    String::from_utf8_lossy(&text).into_owned()
}

impl Drop for Docker {
    fn drop(&mut self) {
        let pid = nix::unistd::Pid::from_raw(self.child.id() as i32);
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
        let end = Instant::now() + Duration::from_secs(30);
        while Instant::now() < end && matches!(self.child.try_wait(), Ok(None)) {
            std::thread::sleep(Duration::from_millis(50));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
        // It keeps hold of its own namespace by a mount, for the next start.
        let held = self.folder.join("exec/netns/default");
        let _ = nix::mount::umount2(&held, nix::mount::MntFlags::MNT_DETACH);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_is_unframed() {
        let framed = b"\x01\0\0\0\0\0\0\x03out\x02\0\0\0\0\0\0\x03err\x01\0\0\0\0\0\0\x09cut";
        assert_eq!(unframed(framed), "outerrcut");
        assert_eq!(unframed(b""), "");
    }
}
