//! containerd 2.x with snapshotters that hand disks over instead of an overlay on the host.

use bulkhead_tests::Artifacts;
use bulkhead_tests::containerd::{Containerd, Release};
use bulkhead_tests::leaks::Snapshot;
use bulkhead_tests::runner::Checks;
use bulkhead_tests::thin_pool::ThinPool;
use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

const IGNORED: [&str; 1] = ["file /run/t"];

/// Each layer of the image an EROFS image; what containers write, in a folder of the host's.
pub fn erofs(checks: &mut Checks, artifacts: &Artifacts) {
    through(checks, artifacts, "erofs", "");
}

/// A copy of the image's file system for each container.
pub fn blockfile(checks: &mut Checks, artifacts: &Artifacts) {
    let scratch = tempfile::NamedTempFile::new().unwrap();
    scratch.as_file().set_len(24 << 20).unwrap();
    let path = scratch.path().display().to_string();
    let made = Command::new("mkfs.ext4").args(["-q", "-F", &path]).status();
    assert!(made.unwrap().success());
    let settings = format!("scratch_file = {path:?}\nfs_type = \"ext4\"\n");
    through(checks, artifacts, "blockfile", &settings);
}

/// A thin device for each container, with what it has in common with the image's in the pool once.
pub fn devmapper(checks: &mut Checks, artifacts: &Artifacts) {
    let folder = tempfile::tempdir().unwrap();
    let Some(pool) = checks.require("a thin pool", || ThinPool::make(folder.path()).unwrap())
    else {
        return;
    };
    let settings = format!(
        "pool_name = {:?}\nbase_image_size = \"64MB\"\n",
        pool.name()
    );
    through(checks, artifacts, "devmapper", &settings);
    checks.check("nobody has a device of the pool any more", || {
        pool.remove().unwrap();
    });
}

fn through(checks: &mut Checks, artifacts: &Artifacts, snapshotter: &'static str, settings: &str) {
    let Some(containerd) = checks.require("containerd unpacks an image", || {
        let release = Release::current().unwrap();
        let containerd =
            Containerd::start_with_snapshotter(artifacts, &release, snapshotter, settings).unwrap();
        let imported = containerd.import_busybox();
        imported.unwrap_or_else(|error| panic!("{error}: {}", containerd.complaints()));
        containerd
    }) else {
        return;
    };
    let before = Snapshot::take(&IGNORED);
    let mounts = || fs::read_to_string("/proc/self/mounts").unwrap();
    let mounts_before = mounts();
    checks.check("a container's root is put together in its machine", || {
        let script = "grep ' / ' /proc/mounts; rm /bin/false; echo changed >/bin/changed; mkdir /bin/new; \
            rmdir /etc; mkdir /etc; ls -d /bin/new /etc; ls /bin/false 2>&1; cat /bin/changed";
        let ran = containerd.run(&["--rm"], "first", &["sh", "-c", script]).unwrap();
        assert_eq!(ran.code, Some(0), "{ran:?}: {}", containerd.log_tail(12));
        let lines: Vec<&str> = ran.stdout.lines().collect();
        let kind = if snapshotter == "erofs" { "overlay" } else { "ext4" };
        assert_eq!(lines[0].split(' ').nth(2), Some(kind), "{ran:?}");
        assert_eq!(lines[1..3], ["/bin/new", "/etc"], "{ran:?}");
        assert!(lines[3].contains("No such file") && lines[4] == "changed", "{ran:?}");
    });
    checks.check(
        "its changes are its own, and nothing is mounted on the host",
        || {
            let script = "ls -d /bin/new 2>&1; ls -d /bin/false; exec sleep 100000";
            let mut run = containerd.run_command(&["--rm"], "second", &["sh", "-c", script]);
            let mut run = run.stdout(Stdio::piped()).spawn().unwrap();
            let mut lines = BufReader::new(run.stdout.take().unwrap()).lines();
            let mut line = || lines.next().and_then(Result::ok).unwrap_or_default();
            let second = [line(), line()];
            assert!(
                second[0].contains("No such file") && second[1] == "/bin/false",
                "{second:?}"
            );
            let new: String = mounts()
                .lines()
                .filter(|line| !mounts_before.contains(line))
                .map(|line| format!("{line}\n"))
                .collect();
            assert!(
                ![" erofs ", "/dev/loop", "/dev/mapper"]
                    .iter()
                    .any(|part| new.contains(part)),
                "{new}"
            );
            containerd
                .ctr(&["tasks", "kill", "--signal", "KILL", "second"])
                .unwrap()
                .success();
            // The client deletes the task and the container.
            run.wait().unwrap();
        },
    );
    checks.check("no process, mount, socket or cgroup is left", || {
        before.assert_nothing_added(&IGNORED);
    });
}
