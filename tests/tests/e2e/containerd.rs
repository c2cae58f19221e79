//! Through a real containerd, Debian's and a current one: the same checks on both.

use crate::facts::{self, Facts};
use bulkhead_tests::Artifacts;
use bulkhead_tests::containerd::{Containerd, Release};
use bulkhead_tests::leaks::Snapshot;
use bulkhead_tests::runner::Checks;
use sha2::{Digest, Sha256};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::Stdio;
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

pub fn debian(checks: &mut Checks, artifacts: &Artifacts) {
    through(checks, artifacts, &Release::debian());
}

pub fn current(checks: &mut Checks, artifacts: &Artifacts) {
    match Release::current() {
        Some(release) => through(checks, artifacts, &release),
        None => checks.check("found", || panic!("the current containerd has gone")),
    }
}

const IGNORED: [&str; 1] = ["file /run/t"];

fn through(checks: &mut Checks, artifacts: &Artifacts, release: &Release) {
    let name = format!(
        "containerd {} answers, image imported",
        release.version().unwrap()
    );
    let Some(containerd) = checks.require(&name, || {
        let containerd = Containerd::start(artifacts, release, "memory_mib = 160\n").unwrap();
        containerd.import_busybox().unwrap();
        containerd
    }) else {
        return;
    };
    let before = Snapshot::take(&IGNORED);
    let image = image_hash(&containerd);
    let events = Events::follow(&containerd);
    one_shot(checks, &containerd);
    if started(checks, &containerd).is_some() {
        inside(checks, &containerd);
        execs(checks, &containerd);
        own_layer(checks, &containerd);
        ended(checks, &containerd);
        checks.check("events came in their order", || events.check_order());
    }
    missing_executable(checks, &containerd);
    checks.check("the image is what it was", || {
        assert_eq!(
            image_hash(&containerd),
            image,
            "files of the image's layers have changed"
        );
    });
    drop(events);
    checks.check("no process, mount, socket or cgroup is left", || {
        before.assert_nothing_added(&IGNORED);
        let run = containerd.runtime_dir();
        let left: Vec<_> = std::fs::read_dir(run).into_iter().flatten().collect();
        assert!(left.is_empty(), "in the runtime folder: {left:?}");
    });
}

/// Hash of every file of the image's layer as it is unpacked. Each blob of the content store must
/// still have the hash that is its name.
fn image_hash(containerd: &Containerd) -> String {
    let root = containerd.folder().join("root");
    for blob in std::fs::read_dir(root.join(BLOBS)).unwrap() {
        let path = blob.unwrap().path();
        let found = hex(&Sha256::digest(std::fs::read(&path).unwrap()));
        assert_eq!(path.file_name().unwrap().to_str(), Some(found.as_str()));
    }
    let store = format!("io.containerd.snapshotter.v1.{}", containerd.snapshotter());
    // The first snapshot is the image's only layer; what containers write has later numbers.
    let mut hash = Sha256::new();
    add_tree(&root.join(store).join("snapshots/1"), &mut hash);
    hex(&hash.finalize())
}

const BLOBS: &str = "io.containerd.content.v1.content/blobs/sha256";

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn add_tree(path: &Path, hash: &mut Sha256) {
    use std::os::unix::fs::MetadataExt;
    let meta = std::fs::symlink_metadata(path).unwrap();
    let attributes = (
        meta.mode(),
        meta.uid(),
        meta.gid(),
        meta.mtime(),
        meta.mtime_nsec(),
    );
    hash.update(format!("{} {attributes:?}\n", path.display()));
    if meta.is_dir() {
        let mut entries: Vec<_> = std::fs::read_dir(path)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .collect();
        entries.sort();
        entries.iter().for_each(|entry| add_tree(entry, hash));
    } else if meta.is_symlink() {
        hash.update(
            std::fs::read_link(path)
                .unwrap()
                .as_os_str()
                .as_encoded_bytes(),
        );
    } else {
        hash.update(std::fs::read(path).unwrap());
    }
}

/// `ctr events`, line by line.
pub struct Events {
    child: std::process::Child,
    lines: Receiver<String>,
}

impl Events {
    pub fn follow(containerd: &Containerd) -> Self {
        let mut child = containerd
            .endless_ctr_command(&["events"])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let stdout = child.stdout.take().unwrap();
        let (sender, lines) = mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        // Subscribed once it has had the time to connect.
        std::thread::sleep(Duration::from_millis(500));
        Self { child, lines }
    }

    /// Waits for an event that holds each of `texts`.
    pub fn wait_for(&self, texts: &[&str]) {
        let end = Instant::now() + Duration::from_secs(20);
        let mut seen = Vec::new();
        loop {
            let left = end.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) if texts.iter().all(|text| line.contains(text)) => return,
                Ok(line) => seen.push(line),
                Err(_) => panic!("no event with {texts:?} in {seen:#?}"),
            }
        }
    }

    /// The topics of container `long`, which had execs named `exec-…`, in the order they came.
    fn check_order(&self) {
        let mut seen = Vec::new();
        let end = Instant::now() + Duration::from_secs(10);
        while let Ok(line) = self.lines.recv_timeout(Duration::from_millis(500)) {
            if line.contains("\"long\"") && line.contains("/tasks/") {
                seen.push(line);
            }
            assert!(
                Instant::now() < end + Duration::from_secs(60),
                "events without end"
            );
        }
        let position = |what: &str, of_exec: bool| {
            let found = seen.iter().position(|line| {
                line.contains(&format!("/tasks/{what} ")) && (line.contains("exec-") == of_exec)
            });
            found.unwrap_or_else(|| panic!("no {what} (of an exec: {of_exec}) in {seen:#?}"))
        };
        let order = [
            position("create", false),
            position("start", false),
            position("exec-added", true),
            position("exec-started", true),
            position("exit", true),
            position("exit", false),
            position("delete", false),
        ];
        assert!(order.is_sorted(), "{order:?} in {seen:#?}");
        let exit = seen
            .iter()
            .find(|line| line.contains("/tasks/exit ") && !line.contains("exec-"));
        assert!(exit.unwrap().contains("\"exit_status\":137"), "{exit:?}");
        // The container's own exit is the last one.
        let last = seen
            .iter()
            .rposition(|line| line.contains("/tasks/exit "))
            .unwrap();
        assert_eq!(last, position("exit", false), "{seen:#?}");
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn one_shot(checks: &mut Checks, containerd: &Containerd) {
    let began = Instant::now();
    checks.check("ctr run: output, error output and exit code", || {
        let script = "echo to stdout; echo to stderr >&2; exit 7";
        let run = containerd
            .run(&["--rm"], "short", &["sh", "-c", script])
            .unwrap();
        assert_eq!(run.code, Some(7), "{run:?}; {}", containerd.log_tail(12));
        assert_eq!(run.stdout, "to stdout\n");
        assert!(run.stderr.contains("to stderr\n"), "{run:?}");
    });
    checks.check("a cold run takes at most 60 s", || {
        assert!(
            began.elapsed() < Duration::from_secs(60),
            "{:?}",
            began.elapsed()
        );
    });
}

/// The long-lived container that later checks look into. Its output goes to a file:// log.
fn started(checks: &mut Checks, containerd: &Containerd) -> Option<()> {
    let at = |name: &str| containerd.folder().join(name).display().to_string();
    std::fs::create_dir(at("data")).unwrap();
    std::fs::create_dir(at("fixed")).unwrap();
    std::fs::write(at("data/from-host"), "written by the host\n").unwrap();
    std::fs::write(at("fixed/from-host"), "not to be changed\n").unwrap();
    let bind = format!("type=bind,src={},dst=/data,options=rbind:rw", at("data"));
    let fixed = format!("type=bind,src={},dst=/fixed,options=rbind:ro", at("fixed"));
    let log = format!("file://{}", at("long.log"));
    checks.require(
        "ctr run --detach with limits, mounts, environment, cwd and a log file",
        || {
            let script = format!("{}; exec sleep 100000", facts::script());
            let options = [
                "--detach",
                "--log-uri",
                &log,
                "--mount",
                &bind,
                "--mount",
                &fixed,
                "--env",
                "FRUIT=apple pie",
                "--cwd",
                "/home/user",
                "--memory-limit",
                "67108864",
                "--cpus",
                "0.5",
                "--mount",
                "type=cgroup,src=cgroup,dst=/sys/fs/cgroup,options=ro:nosuid:noexec:nodev",
                "--cap-drop",
                "CAP_CHOWN",
            ];
            let run = containerd
                .run(&options, "long", &["sh", "-c", &script])
                .unwrap();
            assert_eq!(run.code, Some(0), "{run:?}; {}", containerd.log_tail(12));
        },
    )?;
    checks.check("ctr tasks ls and ps show it running", || {
        let listed = containerd.ctr(&["tasks", "ls"]).unwrap().success();
        let line = listed
            .lines()
            .find(|line| line.starts_with("long"))
            .unwrap_or_default();
        assert!(line.contains("RUNNING"), "{listed}");
        let pids = containerd.ctr(&["tasks", "ps", "long"]).unwrap().success();
        assert!(pids.lines().count() >= 2, "{pids}");
    });
    checks.check(
        "ctr tasks pause, resume and metrics, with their events",
        || {
            let events = Events::follow(containerd);
            let status = || {
                let listed = containerd.ctr(&["tasks", "ls"]).unwrap().success();
                let line = listed.lines().find(|line| line.starts_with("long"));
                line.unwrap_or_default().to_owned()
            };
            containerd
                .ctr(&["tasks", "pause", "long"])
                .unwrap()
                .success();
            assert!(status().contains("PAUSED"), "{}", status());
            events.wait_for(&["/tasks/paused", "long"]);
            containerd
                .ctr(&["tasks", "resume", "long"])
                .unwrap()
                .success();
            assert!(status().contains("RUNNING"), "{}", status());
            events.wait_for(&["/tasks/resumed", "long"]);
            let metrics = containerd
                .ctr(&["tasks", "metrics", "long"])
                .unwrap()
                .success();
            let value = |name: &str| -> u64 {
                let line = metrics.lines().find(|line| line.starts_with(name));
                let word = line.and_then(|line| line.split_whitespace().last());
                word.and_then(|word| word.parse().ok()).unwrap_or_default()
            };
            assert_eq!(value("memory.usage_limit"), 67_108_864, "{metrics}");
            assert!(
                value("memory.usage") > 0 && value("cpu.usage_usec") > 0,
                "{metrics}"
            );
            assert!(value("pids.current") >= 1, "{metrics}");
        },
    );
    Some(())
}

fn inside(checks: &mut Checks, containerd: &Containerd) {
    let Some(facts) = checks.require("what it prints is in its log file", || {
        let path = containerd.folder().join("long.log");
        let end = Instant::now() + Duration::from_secs(60);
        loop {
            let text = std::fs::read_to_string(&path).unwrap_or_default();
            if text.trim_end().ends_with(facts::END) {
                return Facts::parse(&text);
            }
            assert!(Instant::now() < end, "the log holds {text:?}");
            std::thread::sleep(Duration::from_millis(200));
        }
    }) else {
        return;
    };
    checks.check("its kernel is the guest's", || {
        let host = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
        let guest = facts.file("/proc/sys/kernel/osrelease");
        assert_ne!(guest, host.trim());
        assert!(guest.starts_with("6.12."), "{guest}");
    });
    checks.check("namespaces: own pid, net, mount", || {
        assert_eq!(facts.shell("pid"), "1");
        let interfaces: Vec<&str> = facts
            .file("/proc/net/dev")
            .lines()
            .filter_map(|line| line.split_once(':'))
            .map(|(name, _)| name.trim())
            .collect();
        assert_eq!(interfaces, ["lo"]);
        assert!(
            facts.mount_options("/run/bulkhead/shared").is_none(),
            "the share is visible"
        );
    });
    checks.check("environment and working directory", || {
        let environment = facts.file("/proc/self/environ");
        let variables: Vec<&str> = environment.split('\0').collect();
        assert!(variables.contains(&"FRUIT=apple pie"), "{variables:?}");
        assert_eq!(facts.shell("cwd"), "/home/user");
    });
    checks.check(
        "capabilities: containerd's default less the one dropped",
        || {
            let effective = u64::from_str_radix(&facts.status("CapEff"), 16).unwrap();
            let bounding = u64::from_str_radix(&facts.status("CapBnd"), 16).unwrap();
            const CHOWN: u64 = 1 << 0;
            const KILL: u64 = 1 << 5;
            const SYS_ADMIN: u64 = 1 << 21;
            for set in [effective, bounding] {
                assert_eq!(set & (CHOWN | SYS_ADMIN), 0, "{set:x}");
                assert_eq!(set & KILL, KILL, "{set:x}");
            }
            assert_eq!(facts.status("NoNewPrivs"), "1");
        },
    );
    checks.check("limits: open files, memory, cpu", || {
        let limits = facts.file("/proc/self/limits");
        let files = limits
            .lines()
            .find(|line| line.starts_with("Max open files"))
            .unwrap();
        assert_eq!(files.split_whitespace().nth(3), Some("1024"), "{files}");
        assert_eq!(facts.cgroup("memory.max"), "67108864");
        assert_eq!(facts.cgroup("cpu.max"), "50000 100000");
    });
    checks.check("masked and read-only paths", || {
        assert_eq!(facts.file("/proc/keys"), "", "masked: empty");
        let read_only = |path: &str| {
            facts
                .mount_options(path)
                .is_some_and(|options| options.split(',').any(|o| o == "ro"))
        };
        for path in ["/proc/sys", "/proc/bus", "/sys", "/fixed"] {
            assert!(
                read_only(path),
                "{path}: {}",
                facts.file("/proc/self/mounts")
            );
        }
        assert!(!read_only("/data") && !read_only("/"));
        let proc = facts.mount_options("/proc").unwrap();
        assert!(proc.contains("nosuid") && proc.contains("noexec"), "{proc}");
    });
}

fn execs(checks: &mut Checks, containerd: &Containerd) {
    checks.check(
        "exec: output and exit code, as another user, in another folder",
        || {
            let script = "echo $PWD; id; exit 3";
            let options = ["--user", "1000:1000", "--cwd", "/tmp"];
            let exec = containerd
                .exec(&options, "long", &["sh", "-c", script])
                .unwrap();
            assert_eq!(exec.code, Some(3), "{exec:?}");
            let lines: Vec<&str> = exec.stdout.lines().collect();
            assert_eq!(lines.first(), Some(&"/tmp"), "{exec:?}");
            assert!(
                lines.len() == 2 && lines[1].starts_with("uid=1000(user) gid=1000(user)"),
                "{exec:?}"
            );
        },
    );
    checks.check("exec true takes at most 8 s", || {
        let began = Instant::now();
        containerd.exec(&[], "long", &["true"]).unwrap().success();
        assert!(
            began.elapsed() < Duration::from_secs(8),
            "{:?}",
            began.elapsed()
        );
    });
    checks.check("exec: stdin reaches the process, and its end too", || {
        let mut command = containerd.exec_command(&[], "long", &["cat"]);
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        child
            .stdin
            .take()
            .unwrap()
            .write_all(b"through stdin\n")
            .unwrap();
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        assert_eq!(String::from_utf8_lossy(&output.stdout), "through stdin\n");
    });
    checks.check("exec of a missing program is refused by its name", || {
        let exec = containerd.exec(&[], "long", &["/no/such/program"]).unwrap();
        assert!(!matches!(exec.code, Some(0)), "{exec:?}");
        assert!(exec.stderr.contains("/no/such/program"), "{exec:?}");
    });
    checks.check("exec killed by SIGTERM: 143", || {
        let mut command =
            containerd.exec_command(&[], "long", &["sh", "-c", "echo $PPID; kill $$"]);
        let output = command.output().unwrap();
        assert_eq!(output.status.code(), Some(143), "{output:?}");
    });
    checks.check("bind mounts: both ways where writable, refused where not", || {
        let script = "cat /data/from-host /fixed/from-host; echo by the container >/data/from-guest; \
                      echo x >/fixed/from-host || echo refused";
        let exec = containerd.exec(&[], "long", &["sh", "-c", script]).unwrap();
        let lines: Vec<&str> = exec.stdout.lines().collect();
        assert_eq!(lines, ["written by the host", "not to be changed", "refused"], "{exec:?}");
        let data = containerd.folder().join("data/from-guest");
        assert_eq!(std::fs::read_to_string(data).unwrap(), "by the container\n");
        let fixed = containerd.folder().join("fixed/from-host");
        assert_eq!(std::fs::read_to_string(fixed).unwrap(), "not to be changed\n");
    });
}

fn own_layer(checks: &mut Checks, containerd: &Containerd) {
    checks.check("the container writes, changes and removes in its own layer", || {
        let script = "echo changed >>/etc/bulkhead-image && rm /bin/wget && echo new >/made-here && \
                      chmod 0700 /tmp && cat /etc/bulkhead-image";
        let exec = containerd.exec(&[], "long", &["sh", "-c", script]).unwrap();
        assert_eq!(exec.stdout, "busybox image of Bulkhead\nchanged\n", "{exec:?}");
        assert_eq!(exec.code, Some(0), "{exec:?}");
        // Where the snapshot's own files are, on the host.
        let snapshots = containerd.folder().join("root").join(format!(
            "io.containerd.snapshotter.v1.{}/snapshots",
            containerd.snapshotter()
        ));
        let made = std::fs::read_dir(&snapshots).unwrap().flatten().any(|snapshot| {
            let upper = snapshot.path().join("fs/made-here");
            let native = snapshot.path().join("made-here");
            upper.exists() || native.exists()
        });
        assert!(made, "no snapshot below {} holds /made-here", snapshots.display());
    });
}

fn ended(checks: &mut Checks, containerd: &Containerd) {
    checks.check("SIGKILL: stopped with 137, then delete", || {
        containerd
            .ctr(&["tasks", "kill", "--signal", "SIGKILL", "long"])
            .unwrap()
            .success();
        let end = Instant::now() + Duration::from_secs(30);
        while !containerd
            .ctr(&["tasks", "ls"])
            .unwrap()
            .stdout
            .contains("STOPPED")
        {
            assert!(
                Instant::now() < end,
                "{:?}",
                containerd.ctr(&["tasks", "ls"])
            );
            std::thread::sleep(Duration::from_millis(200));
        }
        let deleted = containerd.ctr(&["tasks", "delete", "long"]).unwrap();
        assert_eq!(deleted.code, Some(0), "{deleted:?}");
        assert!(deleted.stderr.contains("exit code 137"), "{deleted:?}");
        containerd
            .ctr(&["containers", "delete", "long"])
            .unwrap()
            .success();
    });
}

fn missing_executable(checks: &mut Checks, containerd: &Containerd) {
    checks.check(
        "a missing executable is named, and nothing stays of the container",
        || {
            let run = containerd
                .run(&["--rm"], "missing", &["no-such-program"])
                .unwrap();
            assert!(!matches!(run.code, Some(0)), "{run:?}");
            assert!(run.stderr.contains("no-such-program"), "{run:?}");
            assert!(
                run.stderr.contains("executable file not found in $PATH"),
                "{run:?}"
            );
            let tasks = containerd.ctr(&["tasks", "ls", "-q"]).unwrap().success();
            assert!(!tasks.contains("missing"), "{tasks}");
        },
    );
}
