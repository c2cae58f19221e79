//! The same programs in a container of runc's, on the host's kernel.

use crate::start::runc::{runc, set_cgroup};
use bulkhead_tests::Artifacts;
use bulkhead_tests::error::{Context, Error, Result};
use bulkhead_tests::shim::{Bundle, spec};
use serde_json::{Value, json};
use std::path::Path;
use std::process::{Command, Stdio};

pub use crate::start::runc::PROGRAM;

/// Runs a program of the bench's root in a container of its own and returns what it prints.
///
/// # Errors
/// When it fails.
pub fn run(artifacts: &Artifacts, argv: &[&str], change: impl Fn(&mut Value)) -> Result<String> {
    let bundle = Bundle::new(artifacts, "bench-devices", "")?;
    let root = bundle.path().join("rootfs");
    copy(&artifacts.fio(), &root.join("bin/fio"))?;
    copy(&artifacts.bench_guest(), &root.join("bin/bench-guest"))?;
    copy_with_libraries("/usr/bin/iperf3", &root)?;
    let mut spec = spec(argv);
    // fio's jobs share memory, and iperf3 has a scratch file.
    if let Some(mounts) = spec["mounts"].as_array_mut() {
        for folder in ["/tmp", "/dev/shm"] {
            mounts.push(json!({ "destination": folder, "type": "tmpfs", "source": "tmpfs" }));
        }
    }
    change(&mut spec);
    bundle.set_spec(&spec)?;
    set_cgroup(&bundle)?;
    let output = runc(&bundle)
        .args(["run", "--bundle"])
        .arg(bundle.path())
        .arg(bundle.id())
        .stdin(Stdio::null())
        .output()
        .context(|| format!("start {PROGRAM}"))?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    match output.status.success() {
        true => Ok(text(&output.stdout)),
        false => Err(Error::Unexpected(format!(
            "{argv:?} under runc: {}: {}{}",
            output.status,
            text(&output.stderr),
            text(&output.stdout),
        ))),
    }
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    if let Some(folder) = to.parent() {
        std::fs::create_dir_all(folder).context(|| format!("make {}", folder.display()))?;
    }
    std::fs::copy(from, to)
        .map(drop)
        .context(|| format!("copy {} to {}", from.display(), to.display()))
}

fn copy_with_libraries(program: &str, root: &Path) -> Result<()> {
    let output = Command::new("ldd").arg(program).output();
    let output = output.context(|| format!("run ldd {program}"))?;
    let listed = String::from_utf8_lossy(&output.stdout).into_owned();
    let libraries = listed
        .split_whitespace()
        .filter(|word| word.starts_with('/'));
    for library in libraries {
        copy(
            Path::new(library),
            &root.join(library.trim_start_matches('/')),
        )?;
    }
    let name = Path::new(program).file_name().unwrap_or_default();
    copy(Path::new(program), &root.join("bin").join(name))
}
