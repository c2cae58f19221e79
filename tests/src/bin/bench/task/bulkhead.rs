//! Containers of a pod in a microVM, through the shim.

use super::{Figure, Values, expect_status};
use crate::start::marks::Marks;
use bulkhead_tests::Artifacts;
use bulkhead_tests::error::{Context, Error, Result};
use bulkhead_tests::footprint::Footprint;
use bulkhead_tests::perf::Watch;
use bulkhead_tests::pod::{member_spec, sandbox_spec};
use bulkhead_tests::shim::{Bundle, Shim, TaskVersion, process};
use containerd_shim_protos::api;
use std::time::{Duration, Instant};

const VERSION: TaskVersion = TaskVersion::V3;
const POD: &str = "bench-pod";
const NO_STREAMS: [&str; 3] = [""; 3];

/// Longest that a program may take to begin in the guest.
const BEGIN: Duration = Duration::from_secs(60);

/// How long the shim and the guest may do what a call has left to be done after its answer.
const SETTLE: Duration = Duration::from_secs(2);

/// The bundle of the pod's sandbox.
///
/// # Errors
/// When a file can't be written.
pub fn sandbox(artifacts: &Artifacts, settings: &str) -> Result<Bundle> {
    let bundle = Bundle::new(artifacts, POD, settings)?;
    bundle.set_spec(&sandbox_spec(POD))?;
    Ok(bundle)
}

/// A pod that runs.
pub struct Pod<'a> {
    artifacts: &'a Artifacts,
    settings: &'a str,
    shim: Shim<'a>,
    shim_pid: u32,
    vmm_pid: u32,
    member: Bundle,
    marks: Marks,
}

impl<'a> Pod<'a> {
    /// Starts it.
    ///
    /// # Errors
    /// What the shim answers.
    pub fn start(artifacts: &'a Artifacts, bundle: &'a Bundle, settings: &'a str) -> Result<Self> {
        let shim = bundle.start()?;
        let vmm_pid = shim.create(VERSION, NO_STREAMS)?.pid;
        shim.start_process(VERSION, "")?;
        let request = api::ConnectRequest {
            id: POD.into(),
            ..Default::default()
        };
        let connected: api::ConnectResponse = shim.call(VERSION, "Connect", &request)?;
        Ok(Self {
            artifacts,
            settings,
            shim_pid: connected.shim_pid,
            shim,
            vmm_pid,
            member: member(artifacts, "bench-task", settings, vmm_pid)?,
            marks: Marks::find(artifacts),
        })
    }

    /// One container's life on the clock.
    ///
    /// # Errors
    /// What the shim answers.
    pub fn life(&self, values: &mut Values) -> Result<()> {
        let shim = self.member.connect(&self.shim.address)?;
        let mut timed = |figure, step: &dyn Fn() -> Result<()>| -> Result<()> {
            let began = Instant::now();
            step()?;
            values.add(figure, began.elapsed().as_secs_f64() * 1000.0);
            Ok(())
        };
        timed(Figure::CreateMs, &|| {
            shim.create(VERSION, NO_STREAMS).map(drop)
        })?;
        timed(Figure::StartMs, &|| {
            shim.start_process(VERSION, "").map(drop)
        })?;
        timed(Figure::ExecMs, &|| exec(&shim))?;
        timed(Figure::KillMs, &|| kill(&shim))?;
        timed(Figure::DeleteMs, &|| shim.delete(VERSION, "").map(drop))
    }

    /// One container's life in guest kernel instructions. The clock would be wrong: each
    /// instruction passes the events that watch.
    ///
    /// # Errors
    /// What the shim or the kernel answers.
    pub fn count(&self, values: &mut Values) -> Result<()> {
        let shim = self.member.connect(&self.shim.address)?;
        let watch = Watch::start(vcpu_thread(self.vmm_pid)?, &self.marks.addresses())?;
        let count = || -> Result<f64> {
            let count = watch.instructions()?;
            let count = count.ok_or_else(|| {
                Error::Unexpected("this host counts no guest instructions".into())
            })?;
            Ok(count as f64)
        };
        let until_program = || -> Result<f64> {
            let begun = watch.wait_for("a program's first instruction", BEGIN, |seen| {
                self.marks.is_exec(seen)
            })?;
            Ok(begun.instructions.unwrap_or_default() as f64)
        };

        let before = count()?;
        shim.create(VERSION, NO_STREAMS)?;
        shim.start_process(VERSION, "")?;
        values.add(Figure::CreateToExecInstructions, until_program()? - before);
        std::thread::sleep(SETTLE);

        let before = count()?;
        exec(&shim)?;
        values.add(Figure::ExecToEndInstructions, count()? - before);
        values.add(Figure::ExecInstructions, until_program()? - before);
        std::thread::sleep(SETTLE);

        let before = count()?;
        kill(&shim)?;
        let killed = count()?;
        values.add(Figure::KillInstructions, killed - before);
        shim.delete(VERSION, "")?;
        values.add(Figure::DeleteInstructions, count()? - killed);
        Ok(())
    }

    /// The shim's memory with one container, and with `more` further ones.
    ///
    /// # Errors
    /// What the shim answers.
    pub fn weigh(&self, more: u32, values: &mut Values) -> Result<()> {
        let bundles = (0..=more)
            .map(|number| {
                let id = format!("bench-weight-{number}");
                member(self.artifacts, &id, self.settings, self.vmm_pid)
            })
            .collect::<Result<Vec<_>>>()?;
        let mut shims = Vec::new();
        let mut first = 0;
        for bundle in &bundles {
            let shim = bundle.connect(&self.shim.address)?;
            shim.create(VERSION, NO_STREAMS)?;
            shim.start_process(VERSION, "")?;
            shims.push(shim);
            if shims.len() == 1 {
                first = self.shim_private_kib()?;
            }
        }
        let all = self.shim_private_kib()?;
        let each = all.saturating_sub(first) as f64 / f64::from(more);
        values.add(Figure::ShimPrivateKib, first as f64);
        values.add(Figure::ShimPrivateKibPerContainer, each);
        for shim in &shims {
            kill(shim)?;
            shim.delete(VERSION, "")?;
        }
        Ok(())
    }

    fn shim_private_kib(&self) -> Result<u64> {
        std::thread::sleep(SETTLE);
        Ok(Footprint::of(self.shim_pid)?.private_kib)
    }

    /// Ends the pod.
    ///
    /// # Errors
    /// What the shim answers.
    pub fn end(self) -> Result<()> {
        kill(&self.shim)?;
        self.shim.delete(VERSION, "")?;
        self.shim.shutdown(VERSION)
    }
}

fn member(artifacts: &Artifacts, id: &str, settings: &str, vmm_pid: u32) -> Result<Bundle> {
    let bundle = Bundle::new(artifacts, id, settings)?;
    bundle.set_spec(&member_spec(POD, vmm_pid, &["sleep", "1000000"]))?;
    Ok(bundle)
}

/// An exec of `true` from its beginning to the last trace of it.
fn exec(shim: &Shim<'_>) -> Result<()> {
    shim.exec(VERSION, "true", &process(&["true"]), NO_STREAMS)?;
    shim.start_process(VERSION, "true")?;
    expect_status("true", shim.wait(VERSION, "true")?.exit_status, 0)?;
    shim.delete(VERSION, "true").map(drop)
}

fn kill(shim: &Shim<'_>) -> Result<()> {
    const SIGKILL: u32 = 9;
    shim.kill(VERSION, "", SIGKILL, true)?;
    let ended = shim.wait(VERSION, "")?.exit_status;
    expect_status("the container", ended, 128 + SIGKILL)
}

/// The thread that runs the guest; this pod's machine has one.
fn vcpu_thread(vmm: u32) -> Result<u32> {
    let folder = format!("/proc/{vmm}/task");
    let tasks = std::fs::read_dir(&folder).context(|| format!("list {folder}"))?;
    for task in tasks.flatten() {
        let name = std::fs::read_to_string(task.path().join("comm")).unwrap_or_default();
        let number = task.file_name().to_str().and_then(|name| name.parse().ok());
        if let (true, Some(number)) = (name.starts_with("vcpu"), number) {
            return Ok(number);
        }
    }
    Err(Error::Unexpected(format!("{folder} has no vCPU thread")))
}
