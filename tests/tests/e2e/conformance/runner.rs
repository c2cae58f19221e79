//! Runs one case under one runtime.

use super::cases::Case;
use bulkhead_tests::Artifacts;
use bulkhead_tests::fifo::ReadFifo;
use bulkhead_tests::shim::{Bundle, Shim, TaskVersion, spec};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// Comes with Debian's containerd.
const RUNC: &str = "/usr/sbin/runc";
const V: TaskVersion = TaskVersion::V3;
const SLOW: Duration = Duration::from_secs(120);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Runtime {
    Runc,
    Bulkhead,
}

/// What came of a container.
#[derive(Debug)]
pub struct Outcome {
    /// Its output, and what its hooks have written.
    output: String,
    /// Its exit status, or why it was not run.
    end: Result<u32, String>,
}

impl Outcome {
    /// What the container says of `what`, in a line `what=value`. Two are ours: `exit status`, and
    /// `run`, which is `refused` when the runtime did not run it.
    pub fn value(&self, what: &str) -> Option<String> {
        match (what, &self.end) {
            ("exit status", Ok(status)) => Some(status.to_string()),
            ("exit status", Err(_)) => None,
            ("run", Ok(_)) => Some("done".into()),
            ("run", Err(_)) => Some("refused".into()),
            _ => {
                let lines = self.output.lines();
                let mut values = lines.filter_map(|line| line.split_once('='));
                let found = values.find(|(name, _)| *name == what);
                found.map(|(_, value)| value.to_owned())
            }
        }
    }

    /// All of it, for a value that is missing.
    pub fn whole(&self) -> String {
        format!("nothing; {self:?}")
    }
}

pub fn runc_is_there() -> bool {
    Path::new(RUNC).exists()
}

pub fn run(artifacts: &Artifacts, case: &Case, runtime: Runtime) -> Outcome {
    let id = format!("conformance-{}-{}", case.name, std::process::id());
    let bundle = Bundle::new(artifacts, &id, "").unwrap();
    let hooks = bundle.beside("hooks");
    std::fs::write(&hooks, "").unwrap();
    std::fs::create_dir(bundle.beside("volume")).unwrap();
    let mut spec = spec(&["sh", "-c", case.script]);
    (case.change)(&mut spec, &Places::of(&bundle));
    bundle.set_spec(&spec).unwrap();
    let mut outcome = match runtime {
        Runtime::Runc => under_runc(&bundle),
        Runtime::Bulkhead => under_bulkhead(&bundle),
    };
    let written = std::fs::read_to_string(&hooks).unwrap();
    let written: Vec<&str> = written.lines().collect();
    outcome
        .output
        .push_str(&format!("\nhooks={}\n", written.join(" ")));
    outcome
}

/// What of the host a case may name in its configuration.
pub struct Places {
    /// File to which hooks write lines.
    pub hooks: PathBuf,
    /// Folder for bind mounts.
    pub volume: PathBuf,
    /// The container's root file system.
    pub rootfs: PathBuf,
}

impl Places {
    fn of(bundle: &Bundle) -> Self {
        Self {
            hooks: bundle.beside("hooks"),
            volume: bundle.beside("volume"),
            rootfs: bundle.path().join("rootfs"),
        }
    }
}

fn under_runc(bundle: &Bundle) -> Outcome {
    let runc = |arguments: &[&str]| {
        let mut command = Command::new(RUNC);
        command.arg("--root").arg(bundle.beside("runc"));
        command.args(arguments).current_dir(bundle.path());
        command.output().unwrap()
    };
    let output = runc(&["run", bundle.id()]);
    runc(&["delete", "--force", bundle.id()]);
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    let refused = errors.contains("level=error");
    let status = output
        .status
        .code()
        .and_then(|code| u32::try_from(code).ok());
    Outcome {
        output: String::from_utf8_lossy(&output.stdout).into_owned(),
        end: status.filter(|_| !refused).ok_or(errors),
    }
}

fn under_bulkhead(bundle: &Bundle) -> Outcome {
    let out = ReadFifo::make(&bundle.beside("out")).unwrap();
    let run = |shim: &Shim<'_>| -> bulkhead_tests::Result<u32> {
        shim.create(V, ["", &out.path(), ""])?;
        let run = shim
            .start_process(V, "")
            .and_then(|_| Ok(shim.wait(V, "")?.exit_status));
        shim.delete(V, "")?;
        run
    };
    // A configuration that can't be read is refused before there is a task.
    let end = bundle.start().and_then(|shim| {
        let end = run(&shim);
        shim.shutdown(V)?;
        end
    });
    let end = end.map_err(|error| error.to_string());
    let output = if end.is_ok() {
        out.read(SLOW)
    } else {
        String::new()
    };
    Outcome { output, end }
}
