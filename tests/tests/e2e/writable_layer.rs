//! A limit of what a container may write to its root, whatever that is made of.

use bulkhead_tests::Artifacts;
use bulkhead_tests::containerd::{Containerd, Release};
use bulkhead_tests::leaks::Snapshot;
use bulkhead_tests::runner::Checks;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

const IGNORED: [&str; 1] = ["file /run/t"];

/// Fills the root, and goes on. What is printed: the root's size in KiB if it has one of its own.
const FILL: &str = "ls /bin/false; rm /bin/false; echo changed >/etc/passwd; \
    fallocate -l 11m /fill; dd if=/dev/zero of=/more bs=64k count=80 2>&1 | grep -o 'No space left'; rm /fill /more; \
    echo kept >/kept && cat /kept; sync";

const FILLED: &str = "/bin/false\nNo space left\nkept\n";

const LOWERED: [&str; 3] = [
    "--rm",
    "--annotation",
    "io.bulkhead.storage.writable_layer_mib=16",
];

/// The disks of writable layers below containerd's folder.
fn disks(containerd: &Containerd) -> Vec<PathBuf> {
    let snapshots = containerd
        .folder()
        .join("root/io.containerd.snapshotter.v1.overlayfs/snapshots");
    let entries = fs::read_dir(snapshots).unwrap();
    let paths = entries.map(|entry| entry.unwrap().path().join("bulkhead-writable.ext4"));
    paths.filter(|path| path.exists()).collect()
}

/// Disks go with their snapshots, which containerd removes when it collects its garbage.
#[track_caller]
fn assert_gone(containerd: &Containerd) {
    let end = Instant::now() + Duration::from_secs(60);
    while !disks(containerd).is_empty() {
        assert!(Instant::now() < end, "left: {:?}", disks(containerd));
        std::thread::sleep(Duration::from_millis(100));
    }
}

pub fn run(checks: &mut Checks, artifacts: &Artifacts) {
    let Some(containerd) = checks.require("containerd unpacks an image", || {
        let containerd = Containerd::start(artifacts, &Release::debian(), "").unwrap();
        containerd.import_busybox().unwrap();
        containerd
    }) else {
        return;
    };
    if containerd.snapshotter() != "overlayfs" {
        return eprintln!("SKIPPED 1 test: no overlay can be mounted here");
    }
    let before = Snapshot::take(&IGNORED);
    limited(checks, &containerd, "through the share", "");
    let store = containerd.folder().join("layers");
    let converted = format!("convert_layers = true\nlayer_dir = {store:?}\n");
    limited(checks, &containerd, "of converted layers", &converted);
    kept(checks, &containerd);
    refused(checks, &containerd);
    checks.check("no process, mount, socket or cgroup is left", || {
        before.assert_nothing_added(&IGNORED);
        assert_gone(&containerd);
    });
}

fn limited(checks: &mut Checks, containerd: &Containerd, root: &str, settings: &str) {
    let name =
        format!("a root {root} has an end where an annotation says so, and lives on after it");
    checks.check(&name, || {
        containerd.configure_shims(settings).unwrap();
        let ran = containerd
            .run(&LOWERED, "filled", &["sh", "-c", FILL])
            .unwrap();
        assert_eq!(ran.stdout, FILLED, "{ran:?}: {}", containerd.log_tail(8));
        assert_eq!(ran.code, Some(0), "{ran:?}");
        assert_gone(containerd);
        let free = containerd
            .run(&["--rm"], "free", &["ls", "/bin/false"])
            .unwrap();
        assert_eq!(
            free.stdout, "/bin/false\n",
            "another container's layer: {free:?}"
        );
    });
}

fn kept(checks: &mut Checks, containerd: &Containerd) {
    checks.check("with a limit for all, changes are there when a container starts again", || {
        containerd.configure_shims("writable_layer_mib = 64\n").unwrap();
        let script = "cat /count 2>/dev/null; echo again >>/count; ls /etc/passwd; rm -f /etc/passwd; true";
        let ran = containerd.run(&[], "kept", &["sh", "-c", script]).unwrap();
        assert_eq!(ran.stdout, "/etc/passwd\n", "{ran:?}");
        let made = disks(containerd);
        assert_eq!(made.len(), 1, "{made:?}");
        let disk = made[0].metadata().unwrap();
        assert_eq!(disk.len(), 64 << 20);
        assert!(disk.blocks() * 512 < 8 << 20, "{} blocks", disk.blocks());
        // What a daemon or a client has put into the folder in the meantime is seen, too.
        fs::write(made[0].with_file_name("fs").join("copied"), "").unwrap();
        let again = containerd.ctr(&["tasks", "start", "kept"]).unwrap();
        assert_eq!(again.stdout, "again\n", "{again:?}");
        assert!(again.stderr.contains("/etc/passwd: No such file"), "{again:?}");
        containerd.ctr(&["containers", "rm", "kept"]).unwrap().success();
        assert_gone(containerd);
    });
}

fn refused(checks: &mut Checks, containerd: &Containerd) {
    checks.check(
        "an annotation that is no size is refused, and leaves nothing",
        || {
            let wrong = [
                "--rm",
                "--annotation",
                "io.bulkhead.storage.writable_layer_mib=1G",
            ];
            let ran = containerd.run(&wrong, "wrong", &["true"]).unwrap();
            assert!(ran.stderr.contains("\"1G\" is not 0, or 16 to"), "{ran:?}");
        },
    );
}
