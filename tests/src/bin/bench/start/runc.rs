//! The same container under runc: namespaces on the host's kernel, no virtual machine.

use super::Context;
use crate::hold;
use crate::isolate;
use crate::pod::FirstOutput;
use bulkhead_tests::error::{Context as _, Error, Result};
use bulkhead_tests::figures::{Figure, Sample, ms_between};
use bulkhead_tests::footprint::Footprint;
use bulkhead_tests::shim::Bundle;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

/// Comes with Debian's containerd.
pub const PROGRAM: &str = "/usr/sbin/runc";

/// Adds to the bundle's spec the cgroup that the bench removes at its end.
///
/// # Errors
/// When config.json can't be read or written.
pub fn set_cgroup(bundle: &Bundle) -> Result<()> {
    let path = bundle.path().join("config.json");
    let text = std::fs::read_to_string(&path).context(|| format!("read {}", path.display()))?;
    let mut spec: serde_json::Value = serde_json::from_str(&text)
        .map_err(|error| Error::Unexpected(format!("{}: {error}", path.display())))?;
    spec["linux"]["cgroupsPath"] = format!("/{}/{}", isolate::cgroup(), bundle.id()).into();
    bundle.set_spec(&spec)
}

/// A container of runc's. Dropping it removes it by force.
pub struct Container<'a> {
    bundle: &'a Bundle,
    child: Child,
}

impl<'a> Container<'a> {
    /// Starts `runc run`, held, with its output in a pipe.
    ///
    /// # Errors
    /// When it can't be started.
    pub fn hold(bundle: &'a Bundle) -> Result<(Self, FirstOutput)> {
        let mut run = runc(bundle);
        run.args(["run", "--bundle"])
            .arg(bundle.path())
            .arg(bundle.id());
        let mut child = hold::held(&run)?
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .context(|| format!("start {PROGRAM}"))?;
        let output = child.stdout.take().map(FirstOutput::of);
        let container = Self { bundle, child };
        hold::wait_until_held(container.child.id())?;
        let output = output.ok_or_else(|| Error::Unexpected("runc has no output".into()))?;
        Ok((container, output))
    }

    /// The process of `runc run`; the container's is its child.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Container<'_> {
    fn drop(&mut self) {
        let _ = runc(self.bundle)
            .args(["delete", "--force", self.bundle.id()])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// `runc` with a state folder of the bundle's own.
pub fn runc(bundle: &Bundle) -> Command {
    let state: PathBuf = bundle.beside("runc");
    let mut command = Command::new(PROGRAM);
    command.arg("--root").arg(state);
    command
}

/// Starts the bundle's container, to its first output, and ends it.
///
/// # Errors
/// When it doesn't start.
pub fn container(context: &Context, bundle: &Bundle) -> Result<Sample> {
    let (container, output) = Container::hold(bundle)?;
    let began = hold::release(container.pid())?;
    let first = output.wait(context.boot_limit)?;
    let mut sample = Sample::new();
    let ms = ms_between(began, first);
    sample.insert(Figure::FirstOutputMs, ms);
    sample.insert(Figure::CommandToOutputMs, ms);
    let footprint = Footprint::of_tree(container.pid())?;
    sample.insert(Figure::PrivateKib, footprint.private_kib as f64);
    sample.insert(Figure::SharedKib, footprint.shared_kib as f64);
    Ok(sample)
}
