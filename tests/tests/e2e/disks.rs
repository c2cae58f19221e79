//! Roots and volumes that come as disks: put together in the guest, written to as far as they
//! reach, and whole after whatever end.

use bulkhead_tests::Artifacts;
use bulkhead_tests::fifo::ReadFifo;
use bulkhead_tests::leaks::{Snapshot, processes_of};
use bulkhead_tests::runner::Checks;
use bulkhead_tests::shim::{Bundle, RootMount, Shim, TaskVersion, process, spec};
use containerd_shim_protos::api::Status;
use nix::mount::{MsFlags, mount, umount};
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::{major, minor};
use serde_json::json;
use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

const V: TaskVersion = TaskVersion::V3;
const SLOW: Duration = Duration::from_secs(120);
/// Size of the writable layer.
const LAYER: u64 = 4 << 20;
/// OVERLAYFS_SUPER_MAGIC.
const OVERLAY: &str = "794c7630";

/// Runs an exec to its end, which must be a good one.
#[track_caller]
fn exec(bundle: &Bundle, shim: &Shim<'_>, id: &str, script: &str) -> String {
    let out = ReadFifo::make(&bundle.beside(id)).unwrap();
    let script = format!("exec 2>&1; {script}");
    let process = process(&["sh", "-c", &script]);
    shim.exec(V, id, &process, ["", &out.path(), ""]).unwrap();
    shim.start_process(V, id).unwrap();
    let status = shim.wait(V, id).unwrap().exit_status;
    let output = out.read(SLOW);
    let _ = shim.delete(V, id);
    fs::remove_file(bundle.beside(id)).unwrap();
    assert_eq!(status, 0, "{script}: {output}");
    output
}

/// Runs a program of the host's; what it prints, and whether it succeeded.
fn host(program: &str, arguments: &[&str]) -> (bool, String) {
    let output = Command::new(program).args(arguments).output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    (
        output.status.success(),
        String::from_utf8_lossy(&text).into_owned(),
    )
}

#[track_caller]
fn succeed(program: &str, arguments: &[&str]) -> String {
    let (good, output) = host(program, arguments);
    assert!(good, "{program} {arguments:?}: {output}");
    output
}

/// The disks of one container, in a folder of their own.
struct Disks(PathBuf);

impl Disks {
    fn new(bundle: &Bundle) -> Self {
        let disks = Self(bundle.beside("disks"));
        fs::create_dir(&disks.0).unwrap();
        disks.layer("base", |at| {
            fs::rename(bundle.path().join("rootfs"), at).unwrap();
            fs::write(at.join("etc/both"), "lower\n").unwrap();
            fs::write(at.join("etc/gone"), "lower\n").unwrap();
            for folder in ["data", "seed", "full"] {
                fs::create_dir(at.join(folder)).unwrap();
            }
        });
        disks.layer("top", |at| {
            fs::create_dir_all(at.join("etc")).unwrap();
            fs::write(at.join("etc/both"), "upper\n").unwrap();
            succeed(
                "mknod",
                &[at.join("etc/gone").to_str().unwrap(), "c", "0", "0"],
            );
            symlink("both", at.join("etc/link")).unwrap();
        });
        disks.layer("seed", |at| {
            fs::create_dir(at).unwrap();
            fs::write(at.join("file"), "of the seed\n").unwrap();
        });
        fs::create_dir(bundle.path().join("rootfs")).unwrap();
        disks.ext4("rw", LAYER);
        disks.ext4("data", LAYER);
        let raw = "pattern\n".repeat(8192);
        fs::write(disks.path("raw"), raw).unwrap();
        disks
    }

    fn path(&self, name: &str) -> String {
        self.0.join(name).display().to_string()
    }

    fn layer(&self, name: &str, fill: impl FnOnce(&Path)) {
        let folder = self.0.join(name);
        fill(&folder);
        let image = self.path(&format!("{name}.erofs"));
        succeed("mkfs.erofs", &["--quiet", &image, folder.to_str().unwrap()]);
    }

    fn ext4(&self, name: &str, size: u64) {
        let path = self.path(&format!("{name}.img"));
        fs::File::create(&path).unwrap().set_len(size).unwrap();
        succeed("mkfs.ext4", &["-q", "-F", &path]);
    }

    /// As containerd's erofs snapshotter hands it over when it was given a default size.
    fn root(&self) -> Vec<RootMount> {
        let mount = |kind: &str, source: String, options: &[&str]| RootMount {
            kind: kind.into(),
            source,
            options: options.iter().map(|&one| one.into()).collect(),
        };
        let overlay = [
            "X-containerd.mkdir.path={{ mount 0 }}/upper:0755",
            "X-containerd.mkdir.path={{ mount 0 }}/work:0755",
            "workdir={{ mount 0 }}/work",
            "upperdir={{ mount 0 }}/upper",
            "lowerdir={{ overlay 1 2 }}",
        ];
        vec![
            mount("ext4", self.path("rw.img"), &["rw", "loop"]),
            mount("erofs", self.path("top.erofs"), &["ro", "loop"]),
            mount("erofs", self.path("base.erofs"), &["ro", "loop"]),
            mount("format/mkdir/overlay", "overlay".into(), &overlay),
        ]
    }

    /// A file of a disk's that is in no use, after its file system was found clean.
    #[track_caller]
    fn read(&self, disk: &str, path: &str) -> String {
        let image = self.path(disk);
        let (clean, output) = host("e2fsck", &["-f", "-n", &image]);
        assert!(clean, "{disk}: {output}");
        let request = format!("cat {path}");
        let output = Command::new("debugfs")
            .args(["-R", &request, &image])
            .output()
            .unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned()
    }
}

/// A loop device, given back when this is dropped.
struct Loop(PathBuf);

impl Loop {
    /// None where the host has none to give.
    fn over(image: &str) -> Option<Self> {
        let (good, output) = host("losetup", &["--find", "--show", image]);
        good.then(|| Self(output.trim().into()))
    }

    fn number(&self) -> u64 {
        fs::metadata(&self.0).unwrap().rdev()
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = host(
            "losetup",
            &["--detach", self.0.to_str().unwrap_or_default()],
        );
    }
}

pub fn run(checks: &mut Checks, artifacts: &Artifacts) {
    let before = Snapshot::take(&[]);
    {
        let bundle = Bundle::new(artifacts, "disks", "").unwrap();
        let Some(disks) = checks.require("disks are made", || Disks::new(&bundle)) else {
            return;
        };
        let device = Loop::over(&disks.path("raw"));
        let Some(shim) = checks.require("a container whose root and volumes are disks", || {
            let mut spec = spec(&["sh", "-c", "sleep 100000; true"]);
            let volume = |name: &str, kind: &str, to: &str, options: &[&str]| {
                json!({ "destination": to, "type": kind, "source": disks.path(name), "options": options })
            };
            let mounts = spec["mounts"].as_array_mut().unwrap();
            mounts.push(volume("data.img", "ext4", "/data", &["loop", "noatime"]));
            mounts.push(volume("seed.erofs", "erofs", "/seed", &["ro"]));
            if let Some(device) = &device {
                let (major, minor) = (major(device.number()), minor(device.number()));
                spec["linux"]["devices"] = json!([{ "path": "/dev/xvda", "type": "b", "major": major, "minor": minor }]);
                spec["linux"]["resources"] = json!({ "devices": [{ "allow": false, "access": "rwm" },
                    { "allow": true, "type": "b", "major": major, "minor": minor, "access": "rw" }] });
            }
            bundle.set_spec(&spec).unwrap();
            let shim = bundle.start().unwrap();
            shim.create_rooted(V, [""; 3], &disks.root()).unwrap();
            shim.start_process(V, "").unwrap();
            shim
        }) else {
            return;
        };
        root(checks, &bundle, &shim, &disks);
        volumes(checks, &bundle, &shim, &disks, device.as_ref());
        ended(checks, &shim, &disks);
        killed(checks, &bundle, &shim, &disks);
    }
    checks.check("no process, mount, socket or folder is left", || {
        before.assert_nothing_added(&[]);
    });
}

fn root(checks: &mut Checks, bundle: &Bundle, shim: &Shim<'_>, disks: &Disks) {
    checks.check(
        "layers lie one over the other, and changes are in the writable one",
        || {
            let script = "cat /etc/both /etc/link; ls /etc; echo changed >/etc/both; rm /etc/link; \
            echo note >/note; cat /etc/both; stat -f -c %t /; sync";
            let output = exec(bundle, shim, "layers", script);
            let lines: Vec<&str> = output.lines().collect();
            assert_eq!(
                lines,
                ["upper", "upper", "both", "link", "changed", OVERLAY],
                "{output}"
            );
        },
    );
    checks.check("the writable layer has an end, and the container lives on after it", || {
        let script = "dd if=/dev/zero of=/fill bs=64k 2>&1 | grep -o 'No space left'; rm /fill; \
            echo after >/after; cat /after";
        assert_eq!(exec(bundle, shim, "full", script), "No space left\nafter\n");
        let state = shim.state(V, "").unwrap();
        assert_eq!(state.status.enum_value(), Ok(Status::RUNNING));
    });
    checks.check("a disk that is written to is nobody else's", || {
        let file = fs::File::open(disks.path("rw.img")).unwrap();
        assert!(file.try_lock_shared().is_err());
        fs::File::open(disks.path("base.erofs"))
            .unwrap()
            .try_lock_shared()
            .unwrap();
    });
}

fn volumes(
    checks: &mut Checks,
    bundle: &Bundle,
    shim: &Shim<'_>,
    disks: &Disks,
    device: Option<&Loop>,
) {
    checks.check("images are volumes, with the file systems that the spec names", || {
        let script = "cat /seed/file; touch /seed/x 2>&1; stat -f -c %T /data; echo kept >/data/kept; sync -f /data/kept; \
            grep -c noatime /proc/mounts; true";
        let output = exec(bundle, shim, "images", script);
        let lines: Vec<&str> = output.lines().collect();
        assert_eq!(lines[0], "of the seed", "{output}");
        assert!(lines[1].contains("Read-only"), "{output}");
        assert_eq!(lines[2..], ["ext2/ext3", "1"], "{output}");
        assert!(fs::metadata(disks.path("data.img")).unwrap().len() == LAYER);
    });
    if device.is_none() {
        return eprintln!("this host has no loop device to give");
    }
    checks.check("a block device of the host's is the container's, by its own name", || {
        let script = "head -c 8 /dev/xvda; echo written | dd of=/dev/xvda conv=fsync 2>/dev/null; head -c 8 /dev/xvda";
        assert_eq!(exec(bundle, shim, "device", script), "pattern\nwritten\n");
        assert!(fs::read(disks.path("raw")).unwrap().starts_with(b"written\n"));
    });
}

fn ended(checks: &mut Checks, shim: &Shim<'_>, disks: &Disks) {
    checks.check("after its end, the disks are whole and free", || {
        shim.kill(V, "", 9, true).unwrap();
        shim.wait(V, "").unwrap();
        shim.delete(V, "").unwrap();
        assert_eq!(disks.read("rw.img", "/upper/note"), "note\n");
        assert_eq!(disks.read("rw.img", "/upper/etc/both"), "changed\n");
        assert_eq!(disks.read("data.img", "/kept"), "kept\n");
        fs::File::open(disks.path("rw.img"))
            .unwrap()
            .try_lock()
            .unwrap();
    });
}

/// A container on the same disks whose VMM is killed, and one whose disk's backing is full.
fn killed(checks: &mut Checks, bundle: &Bundle, shim: &Shim<'_>, disks: &Disks) {
    let small = bundle.beside("small");
    let Some(shim) = checks.require("a further container goes on with the same disks", || {
        shim.shutdown(V).unwrap();
        // The next one has its address.
        let end = Instant::now() + Duration::from_secs(30);
        while !processes_of("containerd-shim-bulkhead-v2").is_empty() {
            assert!(Instant::now() < end, "the shim stays");
            std::thread::sleep(Duration::from_millis(50));
        }
        fs::create_dir(&small).unwrap();
        mount(
            Some("tmpfs"),
            &small,
            Some("tmpfs"),
            MsFlags::empty(),
            Some("size=512k"),
        )
        .unwrap();
        // Larger than what it is on.
        let full = small.join("full.img");
        fs::File::create(&full).unwrap().set_len(LAYER).unwrap();
        succeed(
            "mkfs.ext4",
            &["-q", "-F", "-O", "^has_journal", full.to_str().unwrap()],
        );
        let mut spec = spec(&["sh", "-c", "sleep 100000; true"]);
        let volume = json!({ "destination": "/full", "type": "ext4", "source": full });
        spec["mounts"].as_array_mut().unwrap().push(volume);
        bundle.set_spec(&spec).unwrap();
        let shim = bundle.start().unwrap();
        shim.create_rooted(V, [""; 3], &disks.root()).unwrap();
        shim.start_process(V, "").unwrap();
        assert_eq!(
            exec(bundle, &shim, "again", "cat /note /etc/both"),
            "note\nchanged\n"
        );
        shim
    }) else {
        return;
    };
    checks.check("a write that the host can't keep is an error, and the container lives on", || {
        let script = "dd if=/dev/zero of=/full/x bs=64k count=12 conv=fsync 2>&1 | grep -o 'Input/output error'; echo lives";
        assert_eq!(exec(bundle, &shim, "error", script), "Input/output error\nlives\n");
    });
    checks.check("what was synced is there after the VMM was killed", || {
        let script = "echo synced >/synced; sync /synced; echo done";
        assert_eq!(exec(bundle, &shim, "synced", script), "done\n");
        let vmm = processes_of("bulkhead-vmm");
        kill(vmm[0], Signal::SIGKILL).unwrap();
        assert_eq!(shim.wait(V, "").unwrap().exit_status, 137);
        shim.delete(V, "").unwrap();
        shim.shutdown(V).unwrap();
        // The journal is replayed, as at the next mount.
        let (_, replayed) = host("e2fsck", &["-p", &disks.path("rw.img")]);
        assert_eq!(
            disks.read("rw.img", "/upper/synced"),
            "synced\n",
            "{replayed}"
        );
        umount(&small).unwrap();
    });
}
