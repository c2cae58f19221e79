//! What a guest has synced is on the host's disk before its call returns: seen in the VMM's own
//! system calls. Each of them is made to take longer, so that a call in the guest that didn't wait
//! for it would return first.

use super::volumes::{able, end, running, with_a_disk};
use bulkhead_tests::Artifacts;
use bulkhead_tests::leaks::processes_of;
use bulkhead_tests::runner::Checks;
use bulkhead_tests::shim::{Bundle, Shim, TaskVersion, process};
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::Mode;
use nix::unistd::{Pid, mkfifo};
use serde_json::json;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

const V: TaskVersion = TaskVersion::V3;

/// How much longer each of the host's calls takes, in seconds: strace keeps the thread at its end.
const DELAY: f64 = 1.5;

/// strace(1) over the VMM. Dropping it lets go of the VMM.
struct Trace {
    child: Child,
    log: PathBuf,
}

impl Trace {
    fn attach(vmm: Pid, log: PathBuf) -> Self {
        let delay = DELAY * 1e6;
        let inject = format!("inject=fsync,fdatasync,syncfs:delay_exit={delay}");
        let child = Command::new("strace")
            .args([
                "-f",
                "-qq",
                "-y",
                "-ttt",
                "-T",
                "-e",
                "trace=fsync,fdatasync,syncfs",
            ])
            .args(["-e", &inject, "-p", &vmm.to_string(), "-o"])
            .arg(&log)
            .spawn()
            .unwrap();
        let traced = || {
            let tasks = fs::read_dir(format!("/proc/{vmm}/task")).unwrap();
            tasks.flatten().all(|task| {
                let status = fs::read_to_string(task.path().join("status")).unwrap_or_default();
                !status.contains("TracerPid:\t0\n")
            })
        };
        let end = Instant::now() + Duration::from_secs(30);
        while !traced() {
            assert!(Instant::now() < end, "strace doesn't attach");
            std::thread::sleep(Duration::from_millis(50));
        }
        Self { child, log }
    }

    /// The calls so far: each with its line, and when it was over, in seconds since the epoch.
    fn calls(&self) -> Vec<(String, f64)> {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        let line = |line: &str| {
            let (_, rest) = line.split_once(' ')?;
            let (begin, call) = rest.trim_start().split_once(' ')?;
            let took = call.rsplit_once('<')?.1.trim_end_matches('>');
            let end = begin.parse::<f64>().ok()? + took.parse::<f64>().ok()? + DELAY;
            call.contains("= 0 ").then(|| (call.to_owned(), end))
        };
        text.lines().filter_map(line).collect()
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        let _ = kill(Pid::from_raw(self.child.id() as i32), Signal::SIGTERM);
        let _ = self.child.wait();
    }
}

/// Runs a script whose last line is printed once its sync has returned; when that line came.
fn until_printed(bundle: &Bundle, shim: &Shim<'_>, id: &str, script: &str) -> f64 {
    let path = bundle.beside(id);
    mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR).unwrap();
    let opened = path.clone();
    let reader = std::thread::spawn(move || {
        let mut lines = BufReader::new(File::open(opened).unwrap()).lines();
        let line = lines.next().unwrap().unwrap();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        lines.for_each(drop);
        (line, now)
    });
    let script = format!("exec 2>&1; {script} && echo returned");
    let mut spec = able(json!({ "process": process(&["sh", "-c", &script]) }));
    let output = path.display().to_string();
    shim.exec(V, id, &spec["process"].take(), ["", &output, ""])
        .unwrap();
    shim.start_process(V, id).unwrap();
    assert_eq!(shim.wait(V, id).unwrap().exit_status, 0);
    let (line, now) = reader.join().unwrap();
    assert_eq!(line, "returned", "{script}");
    let _ = shim.delete(V, id);
    fs::remove_file(&path).unwrap();
    now.as_secs_f64()
}

pub fn run(checks: &mut Checks, artifacts: &Artifacts) {
    let bundle = Bundle::new(artifacts, "synced", "").unwrap();
    let (volume, disk) = (bundle.beside("volume"), bundle.beside("disk.img"));
    let Some(shim) = checks.require("a container with a volume and a disk", || {
        running(&bundle, &with_a_disk(&volume, &disk, 16))
    }) else {
        return;
    };
    let vmm = processes_of("bulkhead-vmm")[0];
    let Some(trace) = checks.require("strace is attached to the VMM", || {
        Trace::attach(vmm, bundle.beside("strace.log"))
    }) else {
        return;
    };
    let check =
        |checks: &mut Checks, name: &str, id: &str, script: &str, calls: &[&str], file: &Path| {
            checks.check(name, || {
                let before = trace.calls().len();
                let returned = until_printed(&bundle, &shim, id, script);
                let file = file.display().to_string();
                let made = trace.calls();
                let fits = |call: &str| {
                    calls
                        .iter()
                        .any(|name| call.starts_with(&format!("{name}(")))
                        && call.contains(&file)
                };
                let call = made[before..].iter().find(|(call, _)| fits(call));
                let (call, ended) =
                    call.unwrap_or_else(|| panic!("no {calls:?} of {file}: {made:?}"));
                assert!(
                    *ended <= returned,
                    "{call} ended {} s late",
                    ended - returned
                );
            });
        };
    let any = ["fsync", "fdatasync"];
    // Where the VMM sees the volume.
    let share = PathBuf::from("/synced/mounts/0");
    for (name, id, script, calls, file) in [
        (
            "fsync of a volume's file",
            "fsync",
            "echo 1 >/volume/a && sync /volume/a",
            &any[..1],
            share.join("a"),
        ),
        (
            "fdatasync of a volume's file",
            "fdatasync",
            "echo 2 >/volume/b && sync -d /volume/b",
            &any[1..],
            share.join("b"),
        ),
        (
            "fsync of a volume's folder",
            "fsyncdir",
            "mkdir /volume/d && sync /volume/d",
            &any,
            share.join("d"),
        ),
        (
            "syncfs of a volume",
            "syncfs",
            "sync -f /volume",
            &["syncfs"],
            share.clone(),
        ),
        ("sync", "sync", "sync", &["syncfs"], share.clone()),
        (
            "fsync of a file on a disk",
            "disk",
            "echo 3 >/disk/a && sync /disk/a",
            &any,
            disk.clone(),
        ),
        (
            "fdatasync of a file on a disk",
            "disk-data",
            "echo 4 >/disk/b && sync -d /disk/b",
            &any,
            disk.clone(),
        ),
        (
            "syncfs of a disk",
            "disk-fs",
            "echo 5 >/disk/c && sync -f /disk",
            &any,
            disk.clone(),
        ),
    ] {
        check(
            checks,
            &format!("{name} returns when the host's disk has it"),
            id,
            script,
            calls,
            &file,
        );
    }
    drop(trace);
    checks.check("ends", || end(&shim));
}
