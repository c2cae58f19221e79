//! Layers of containerd's overlayfs as disks: converted once, shared by pods, and the same files as
//! the host's overlay would show.

use super::{IGNORED, client::Client, own_network, pod_config, shell_container};
use bulkhead_tests::Artifacts;
use bulkhead_tests::cgroups::Cgroup;
use bulkhead_tests::containerd::{Containerd, IMAGE, Release, SANDBOX_IMAGE};
use bulkhead_tests::leaks::{Snapshot, processes_of};
use bulkhead_tests::runner::Checks;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::Value;
use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// OVERLAYFS_SUPER_MAGIC.
const OVERLAY: &str = "794c7630";

/// What a container sees of the image. Its upper layer replaces a folder, takes files away, and has
/// hard links, a device node, an attribute and a file's capability.
const LOOK: &str = "stat -f -c %t /; ls /home; ls /etc/bulkhead-image /tmp/../var 2>&1; \
    stat -c '%h %a %u %g' /data/one; [ /data/one -ef /data/two ] && echo same; \
    stat -c '%F %t:%T' /data/null; cat /data/link; stat -c %Y /data/one; echo shown";

const SEEN: &str = "new\nls: /etc/bulkhead-image: No such file or directory\n/tmp/../var:\n\
    2 4755 7 8\nsame\ncharacter special file 1:3\ncontent\n1000000000\nshown\n";

#[track_caller]
fn shell(script: &str, arguments: &[&Path]) -> String {
    let output = Command::new("sh")
        .args(["-ec", script, "sh"])
        .args(arguments)
        .output()
        .unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(
        output.status.success(),
        "{script}: {}",
        text(&output.stderr)
    );
    text(&output.stdout)
}

/// An archive of the image's upper layer.
fn layer(folder: &Path) -> PathBuf {
    let archive = folder.join("layer.tar");
    let script = "mkdir -p $1/home $1/etc $1/data; : >$1/home/.wh..wh..opq; : >$1/home/new; \
        : >$1/etc/.wh.bulkhead-image; echo content >$1/data/one; chown 7:8 $1/data/one; \
        chmod 4755 $1/data/one; ln $1/data/one $1/data/two; ln -s two $1/data/link; \
        mknod -m 666 $1/data/null c 1 3; echo program >$1/data/able; \
        setfattr -n security.capability -v 0x0100000200040000000000000000000000000000 $1/data/able; \
        find $1 -exec touch -h -d @1000000000 {} +; \
        tar --create --file $2 --format=posix --xattrs --xattrs-include='security.*' --sort=name \
            --numeric-owner -C $1 .";
    shell(script, &[&folder.join("layer"), &archive]);
    archive
}

struct Setting<'a> {
    containerd: &'a Containerd,
    artifacts: &'a Artifacts,
    store: PathBuf,
}

impl Setting<'_> {
    /// What `bulkhead layer` prints.
    #[track_caller]
    fn command(&self, arguments: &[&str]) -> Value {
        let output = Command::new(self.artifacts.program("bulkhead"))
            .arg("layer")
            .args(arguments)
            .args(["--json", "--config"])
            .arg(self.containerd.shim_config())
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{arguments:?}: {output:?}");
        serde_json::from_str(&text).unwrap()
    }

    fn keys(&self) -> BTreeSet<String> {
        let listing = self.command(&["list"]);
        let keys = listing["layers"].as_array().unwrap().iter();
        keys.map(|one| one["key"].as_str().unwrap().to_owned())
            .collect()
    }

    /// The files of the store, without what it knows of folders.
    fn files(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.store).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name != "seen").collect()
    }

    fn settings(store: &Path, more: &str) -> String {
        format!("convert_layers = true\nlayer_dir = {store:?}\n{more}")
    }

    /// The overlay of a container's snapshot, as the host would mount it: its options.
    #[track_caller]
    fn overlay(&self, id: &str) -> String {
        let target = self.containerd.folder().join("view").display().to_string();
        let snapshotter = self.containerd.snapshotter();
        let mounts = [
            "snapshots",
            "--snapshotter",
            snapshotter,
            "mounts",
            &target,
            id,
        ];
        let printed = self.containerd.ctr(&mounts).unwrap().success();
        let mut words = printed.split_whitespace();
        words.find(|word| *word == "-o").unwrap();
        words.next().unwrap().to_owned()
    }
}

fn option<'a>(options: &'a str, key: &str) -> &'a str {
    let found = options.split(',').find_map(|one| one.strip_prefix(key));
    found.unwrap_or_else(|| panic!("{key} in {options}"))
}

pub fn run(checks: &mut Checks, artifacts: &Artifacts) {
    let Some((containerd, client)) = checks.require("containerd serves CRI", || {
        own_network();
        let release = Release::debian();
        let containerd = Containerd::start_with_cri(artifacts, &release, "").unwrap();
        let archive = layer(containerd.folder());
        containerd.import_layered(IMAGE, Some(&archive)).unwrap();
        containerd.import_busybox_as(SANDBOX_IMAGE).unwrap();
        let client = Client::connect(&containerd.socket());
        (containerd, client)
    }) else {
        return;
    };
    if containerd.snapshotter() != "overlayfs" {
        return eprintln!("SKIPPED 1 test: no overlay can be mounted here");
    }
    let store = containerd.folder().join("layers");
    let settings = Setting::settings(&store, "");
    containerd.configure_shims(&settings).unwrap();
    let setting = Setting {
        containerd: &containerd,
        artifacts,
        store,
    };
    let before = Snapshot::take(&IGNORED);
    first(checks, &setting);
    changes(checks, &setting);
    pods(checks, &setting, &client);
    changed_on_disk(checks, &setting);
    full_disk(checks, &setting);
    checks.check("no process, mount, socket or cgroup is left", || {
        before.assert_nothing_added(&IGNORED);
    });
}

fn first(checks: &mut Checks, setting: &Setting) {
    checks.check(
        "two first starts at once make one image of each layer, and both see it",
        || {
            let run = |id| {
                let mut run = setting
                    .containerd
                    .run_command(&["--rm"], id, &["sh", "-c", LOOK]);
                run.stdout(Stdio::piped())
                    .stderr(Stdio::piped())
                    .spawn()
                    .unwrap()
            };
            for run in ["at-once-1", "at-once-2"].map(run) {
                let output = run.wait_with_output().unwrap();
                let text = String::from_utf8_lossy(&output.stdout).into_owned();
                assert_eq!(text, format!("{OVERLAY}\n{SEEN}"), "{output:?}");
            }
            assert_eq!(setting.keys().len(), 2);
            let files = setting.files();
            assert!(
                files.len() == 2 && files.iter().all(|name| name.ends_with(".erofs")),
                "{files:?}"
            );
            assert_eq!(
                setting
                    .containerd
                    .log()
                    .matches("converted a layer")
                    .count(),
                2
            );
            // A shim has them until it leaves, just after its last answer.
            let end = Instant::now() + Duration::from_secs(30);
            let in_use = || {
                let listing = setting.command(&["list"]);
                let layers = listing["layers"].as_array().unwrap().iter();
                layers.filter(|one| one["in_use"] == true).count()
            };
            while in_use() > 0 {
                assert!(Instant::now() < end, "layers stay in use");
                std::thread::sleep(Duration::from_millis(100));
            }
        },
    );
}

fn changes(checks: &mut Checks, setting: &Setting) {
    let containerd = setting.containerd;
    checks.check("what a container changes is in its snapshot, as the host's overlay has it", || {
        let script = "rm /etc/group; rm -r /home; mkdir /home; echo mine >/home/mine; echo more >>/etc/passwd; mkdir /made; ln /etc/passwd /made/link; rm -r /data; mkdir /data; \
            ls /home /data; grep -c . /proc/self/mountinfo >/dev/null; ls -d /made/link";
        let ran = containerd.run(&[], "changes", &["sh", "-c", script]).unwrap();
        assert_eq!(ran.stdout, "/data:\n\n/home:\nmine\n/made/link\n", "{ran:?}");
        let options = setting.overlay("changes");
        let upper = Path::new(option(&options, "upperdir="));
        let gone = fs::symlink_metadata(upper.join("etc/group")).unwrap();
        assert!(gone.file_type().is_char_device() && gone.rdev() == 0, "{gone:?}");
        assert!(fs::read_to_string(upper.join("etc/passwd")).unwrap().ends_with("more\n"));
        // Committing mounts it so.
        let view = containerd.folder().join("view");
        fs::create_dir(&view).unwrap();
        let kind = Some("overlay");
        mount(kind, &view, kind, MsFlags::empty(), Some(options.as_str())).unwrap();
        let seen = shell("ls -A $1/home $1/data; ls $1/etc; stat -c %h $1/etc/passwd", &[&view]);
        umount2(&view, MntFlags::empty()).unwrap();
        let wanted = format!("{0}/data:\n\n{0}/home:\nmine\npasswd\n2\n", view.display());
        assert_eq!(seen, wanted);
    });
    checks.check("started again, it finds its changes", || {
        let started = containerd.ctr(&["tasks", "start", "changes"]).unwrap();
        // Its process is the same script.
        assert!(started.stdout.contains("/home:\nmine"), "{started:?}");
        containerd
            .ctr(&["containers", "rm", "changes"])
            .unwrap()
            .success();
    });
}

/// The files that a VMM has open below `folder`.
fn opened(vmm: nix::unistd::Pid, folder: &Path) -> BTreeSet<PathBuf> {
    let entries = fs::read_dir(format!("/proc/{vmm}/fd")).unwrap();
    let targets = entries.filter_map(|entry| fs::read_link(entry.ok()?.path()).ok());
    targets
        .filter(|target| target.starts_with(folder))
        .collect()
}

fn pods(checks: &mut Checks, setting: &Setting, client: &Client) {
    let (containerd, keys) = (setting.containerd, setting.keys());
    let cgroup = Cgroup::make("pods").unwrap();
    let made = checks.require("two pods of one image share its files", || {
        let pods = ["one", "two"].map(|name| {
            let config = pod_config(containerd, &cgroup, name);
            let id = client.run_pod(&config);
            let id = id.unwrap_or_else(|error| panic!("{error}: {}", containerd.log_tail(12)));
            let pod = super::Pod { client, config, id };
            let container = pod.run(containerd, shell_container(name, "exec sleep 100000"));
            (pod, container)
        });
        for (_, container) in &pods {
            assert_eq!(
                client.shell(container, LOOK) + "\n",
                format!("{OVERLAY}\n{SEEN}")
            );
        }
        let vmms = processes_of("bulkhead-vmm");
        assert_eq!(vmms.len(), 2);
        let files = opened(vmms[0], &setting.store);
        assert_eq!(files.len(), 2, "{files:?}");
        assert_eq!(files, opened(vmms[1], &setting.store));
        assert_eq!(setting.keys(), keys);
        pods
    });
    let Some([(one, first), (two, second)]) = made else {
        return;
    };
    checks.check("what one writes, the other doesn't see", || {
        client.shell(&first, "echo one >/data/mine; rm /data/two");
        assert_eq!(
            client.shell(&second, "ls /data"),
            "able\nlink\nnull\none\ntwo"
        );
    });
    checks.check("a layer in use is listed so, and not removed", || {
        let listing = setting.command(&["list"]);
        let layers = listing["layers"].as_array().unwrap();
        assert!(layers.iter().all(|one| one["in_use"] == true), "{listing}");
        assert_eq!(
            setting.command(&["rm", "--unused"])["removed"],
            serde_json::json!([])
        );
        assert_eq!(setting.keys(), keys);
    });
    one.removed_quietly();
    two.removed_quietly();
}

impl super::Pod<'_> {
    fn removed_quietly(self) {
        self.client.stop_pod(&self.id).unwrap();
        self.client.remove_pod(&self.id).unwrap();
    }
}

fn changed_on_disk(checks: &mut Checks, setting: &Setting) {
    checks.check(
        "a layer that was changed on the disk gets another image",
        || {
            let ran = setting.containerd.run(&[], "before", &["true"]).unwrap();
            assert_eq!(ran.code, Some(0), "{ran:?}");
            let options = setting.overlay("before");
            let top = option(&options, "lowerdir=").split(':').next().unwrap();
            // Of the same length, and with the same time of modification.
            let change = "printf 'CONTENT\\n' >$1/data/one; touch -d @1000000000 $1/data/one";
            shell(change, &[Path::new(top)]);
            let ran = setting
                .containerd
                .run(&["--rm"], "after", &["cat", "/data/two"])
                .unwrap();
            assert_eq!(ran.stdout, "CONTENT\n", "{ran:?}");
            assert_eq!(setting.keys().len(), 3);
            shell(
                "printf 'content\\n' >$1/data/one; touch -d @1000000000 $1/data/one",
                &[Path::new(top)],
            );
            let ran = setting
                .containerd
                .run(&["--rm"], "again", &["cat", "/data/two"])
                .unwrap();
            assert_eq!(ran.stdout, "content\n", "{ran:?}");
            assert_eq!(setting.keys().len(), 3, "the first one serves again");
            setting
                .containerd
                .ctr(&["containers", "rm", "before"])
                .unwrap()
                .success();
            let removed = setting.command(&["rm", "--unused"]);
            assert_eq!(removed["removed"].as_array().unwrap().len(), 3);
            assert!(setting.files().is_empty());
        },
    );
}

fn full_disk(checks: &mut Checks, setting: &Setting) {
    checks.check(
        "with a full disk the root goes through the share, and the log says why",
        || {
            let small = setting.containerd.folder().join("small");
            fs::create_dir(&small).unwrap();
            mount(
                Some("tmpfs"),
                &small,
                Some("tmpfs"),
                MsFlags::empty(),
                Some("size=256k,mode=700"),
            )
            .unwrap();
            let store = small.join("layers");
            setting
                .containerd
                .configure_shims(&Setting::settings(&store, ""))
                .unwrap();
            let ran = setting
                .containerd
                .run(&["--rm"], "full", &["sh", "-c", LOOK])
                .unwrap();
            let (_, shown) = ran.stdout.split_once('\n').unwrap();
            assert_eq!(shown, SEEN, "{ran:?}");
            let log = setting.containerd.log();
            let line = log
                .lines()
                .find(|line| line.contains("the root's layers are not converted"));
            assert!(
                line.is_some_and(|line| line.contains("mkfs.erofs failed")),
                "{line:?}"
            );
            let left = fs::read_dir(&store).unwrap();
            let left: Vec<_> = left
                .map(|one| one.unwrap().file_name().into_string().unwrap())
                .filter(|name| name != "seen" && !name.ends_with(".erofs"))
                .collect();
            umount2(&small, MntFlags::empty()).unwrap();
            assert!(left.is_empty(), "{left:?}");
        },
    );
}
