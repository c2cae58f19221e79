//! Templates through the shim: made by the first start, cloned by every other, and never the reason
//! for a start that fails.

use crate::clone_network;
use bulkhead_tests::Artifacts;
use bulkhead_tests::fifo::ReadFifo;
use bulkhead_tests::leaks::processes_of;
use bulkhead_tests::runner::Checks;
use bulkhead_tests::shim::{Bundle, Shim, TaskVersion, process, spec};
use bulkhead_vmm::snapshot::{format, msrs};
use nix::sys::signal::{Signal, kill};
use serde_json::Value;
use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tempfile::TempDir;

const V: TaskVersion = TaskVersion::V3;
const SLOW: Duration = Duration::from_secs(120);

/// A template folder of the scenario's own.
pub(crate) struct Templates<'a> {
    artifacts: &'a Artifacts,
    folder: TempDir,
}

/// One pod's bundle, and what its shim logs.
pub(crate) struct Pod {
    pub(crate) bundle: Bundle,
    log: File,
}

impl<'a> Templates<'a> {
    fn new(artifacts: &'a Artifacts) -> Self {
        let folder = TempDir::with_prefix("bt.").unwrap();
        Self { artifacts, folder }
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("templates")
    }

    fn settings(&self) -> String {
        format!("template_dir = {:?}\n", self.path())
    }

    pub(crate) fn pod(&self, id: &str, argv: &[&str]) -> Pod {
        self.pod_with(id, argv, "")
    }

    /// A pod with more lines in its configuration.
    fn pod_with(&self, id: &str, argv: &[&str], settings: &str) -> Pod {
        let settings = self.settings() + settings;
        let bundle = Bundle::new(self.artifacts, id, &settings).unwrap();
        bundle.set_spec(&spec(argv)).unwrap();
        let path = bundle.path().join("log");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        // Both directions, so that it neither waits for a writer nor loses what was written when
        // the last one leaves (fifo(7)).
        let mut options = File::options();
        options
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK);
        let log = options.open(path).unwrap();
        Pod { bundle, log }
    }

    /// A `bulkhead template` command with this folder.
    fn command(&self, arguments: &[&str]) -> (Option<i32>, String, String) {
        let config = self.folder.path().join("bulkhead.toml");
        let run = self.folder.path().join("run");
        let text = bulkhead_tests::containerd::shim_config(self.artifacts, &run, &self.settings());
        std::fs::write(&config, text).unwrap();
        let output = Command::new(self.artifacts.program("bulkhead"))
            .arg("template")
            .args(arguments)
            .arg("--config")
            .arg(config)
            .output()
            .unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (
            output.status.code(),
            text(&output.stdout),
            text(&output.stderr),
        )
    }

    fn list(&self) -> Vec<Value> {
        let (code, stdout, stderr) = self.command(&["list", "--json"]);
        assert_eq!(code, Some(0), "{stderr}");
        let listing: Value = serde_json::from_str(&stdout).unwrap();
        listing["templates"].as_array().unwrap().clone()
    }

    /// The one template that there is.
    #[track_caller]
    fn only(&self) -> Value {
        let all = self.list();
        assert_eq!(all.len(), 1, "{all:?}");
        all[0].clone()
    }

    fn names(&self) -> Vec<String> {
        let folder = std::fs::read_dir(self.path()).unwrap();
        let names = folder.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.collect()
    }
}

impl Pod {
    /// Starts a shim with the container in it.
    fn start(&self) -> Shim<'_> {
        let shim = self.bundle.start().unwrap();
        shim.create(V, [""; 3]).unwrap();
        shim.start_process(V, "").unwrap();
        shim
    }

    /// Runs the container to its end and returns its output.
    pub(crate) fn run(&self) -> String {
        let out = ReadFifo::make(&self.bundle.beside("out")).unwrap();
        let shim = self.bundle.start().unwrap();
        shim.create(V, ["", &out.path(), ""]).unwrap();
        shim.start_process(V, "").unwrap();
        assert_eq!(shim.wait(V, "").unwrap().exit_status, 0);
        shim.delete(V, "").unwrap();
        shim.shutdown(V).unwrap();
        out.read(SLOW)
    }

    /// What the shim has logged since the last call.
    pub(crate) fn log(&mut self) -> String {
        let mut bytes = vec![0; 1 << 16];
        let length = self.log.read(&mut bytes).unwrap_or(0);
        String::from_utf8_lossy(&bytes[..length]).into_owned()
    }
}

fn end(shim: &Shim<'_>) {
    shim.kill(V, "", 9, true).unwrap();
    shim.wait(V, "").unwrap();
    shim.delete(V, "").unwrap();
    shim.shutdown(V).unwrap();
}

/// Runs an exec in a running container and returns its output.
fn exec(pod: &Pod, shim: &Shim<'_>, id: &str, script: &str) -> String {
    let out = ReadFifo::make(&pod.bundle.beside(id)).unwrap();
    let process = process(&["sh", "-c", script]);
    shim.exec(V, id, &process, ["", &out.path(), ""]).unwrap();
    shim.start_process(V, id).unwrap();
    assert_eq!(shim.wait(V, id).unwrap().exit_status, 0);
    shim.delete(V, id).unwrap();
    out.read(SLOW)
}

#[track_caller]
pub(crate) fn assert_cloned(log: &str) {
    assert!(log.contains("cloned=true"), "no clone was started:\n{log}");
    assert!(!log.contains("booting cold"), "it booted cold:\n{log}");
}

const BUILT: &str = "built a template";

/// Made once, used from then on, and replaced when it's damaged.
pub fn life(checks: &mut Checks, artifacts: &Artifacts) {
    let templates = Templates::new(artifacts);
    let made = checks.require("the first start makes a template and runs from it", || {
        let mut pod = templates.pod("first", &["echo", "hello"]);
        assert_eq!(pod.run(), "hello\n");
        let log = pod.log();
        assert!(log.contains(BUILT), "{log}");
        assert_cloned(&log);
        let made = templates.only();
        assert_eq!(made["uses"], 1, "{made}");
        assert_eq!(made["current"], true, "{made}");
        assert_eq!(made["description"]["identity"]["shape"]["memory_mib"], 128);
        made["key"].as_str().unwrap().to_owned()
    });
    let Some(key) = made else { return };
    checks.check(
        "the second start uses it; it may go while the clone runs",
        || {
            let mut pod = templates.pod("second", &["sleep", "100000"]);
            let shim = pod.start();
            assert_eq!(templates.only()["uses"], 2);
            let (code, stdout, stderr) = templates.command(&["rm", &key[..8]]);
            assert_eq!(code, Some(0), "{stderr}");
            assert!(
                key.starts_with(stdout.trim()) && stdout.len() > 8,
                "{stdout}"
            );
            assert!(templates.list().is_empty());
            // Programs and pages that the clone hasn't touched before.
            let seen = exec(
                &pod,
                &shim,
                "e1",
                "busybox sha256sum /bin/busybox | cut -c1-4; id -u",
            );
            assert_eq!(seen.lines().count(), 2, "{seen}");
            end(&shim);
            let log = pod.log();
            assert_cloned(&log);
            assert!(!log.contains(BUILT), "{log}");
        },
    );
    checks.check(
        "`template build` makes it again, `show` tells of what",
        || {
            let (code, stdout, stderr) = templates.command(&["build", "--json"]);
            assert_eq!(code, Some(0), "{stderr}");
            let built: Value = serde_json::from_str(&stdout).unwrap();
            assert_eq!(built["key"], key.as_str());
            let (_, text, _) = templates.command(&["show", &key[..8]]);
            assert!(
                text.contains(&artifacts.kernel().display().to_string()),
                "{text}"
            );
            let (code, _, stderr) = templates.command(&["show", "ffffffffffff"]);
            assert_eq!(code, Some(1));
            assert!(stderr.contains("ffffffffffff"), "{stderr}");
        },
    );
    checks.check("two versions of the VMM at work on one folder", || {
        two_versions(&templates, &key);
    });
    clones(checks, &templates);
    clone_network::run(checks, &templates);
    checks.check("a host that was suspended and woken since the save", || {
        woken(&templates, &key);
    });
    damaged(checks, &templates, &key);
}

/// Each has a template of its own, and neither takes or spoils the other's.
fn two_versions(templates: &Templates<'_>, key: &str) {
    let vmm = templates.folder.path().join("bulkhead-vmm");
    std::fs::copy(templates.artifacts.program("bulkhead-vmm"), &vmm).unwrap();
    let setting = format!("vmm = {vmm:?}\n");
    let uses = || {
        let all = templates.list();
        let uses = |wanted: bool| {
            let of = all.iter().filter(|one| (one["key"] == key) == wanted);
            of.map(|one| one["uses"].as_u64().unwrap())
                .collect::<Vec<_>>()
        };
        (uses(true), uses(false))
    };
    let (first, none) = uses();
    assert_eq!((first.len(), none.len()), (1, 0));
    let run = |id: &str, setting: &str, built: bool| {
        let mut pod = templates.pod_with(id, &["echo", "hello"], setting);
        assert_eq!(pod.run(), "hello\n");
        let log = pod.log();
        assert_cloned(&log);
        assert_eq!(log.contains(BUILT), built, "{log}");
    };
    run("other", &setting, true);
    run("same", "", false);
    run("other-again", &setting, false);
    assert_eq!(uses(), (vec![first[0] + 1], vec![2]));
    let other = templates.list();
    let other = other.iter().find(|one| one["key"] != key).unwrap();
    let (code, _, stderr) = templates.command(&["rm", other["key"].as_str().unwrap()]);
    assert_eq!(code, Some(0), "{stderr}");
}

/// A processor's time-stamp counter may begin anew when its host wakes up. To a template it then looks
/// as if it had been saved later: here by some days.
fn woken(templates: &Templates<'_>, key: &str) {
    const AHEAD: u64 = 1 << 50;
    let state = templates.path().join(key).join("state");
    set_tsc_ahead(&state, AHEAD);
    let script = "read up idle </proc/uptime; date +%s; sleep 1; \
        read later idle </proc/uptime; echo $up $later";
    let mut pod = templates.pod("woken", &["sh", "-c", script]);
    let before = now();
    let output = pod.run();
    let after = now();
    let log = pod.log();
    let words: Vec<f64> = output
        .split_whitespace()
        .map(|word| word.parse().unwrap())
        .collect();
    let [date, up, later] = words[..] else {
        panic!("{output}\n{log}")
    };
    assert!((before as f64..=after as f64).contains(&date), "{output}");
    assert!((0.0..3600.0).contains(&up), "{output}");
    assert!((1.0..600.0).contains(&(later - up)), "{output}");
    // Either KVM can set the counter, or a new template takes this one's place.
    let refused = log.contains("time-stamp counter");
    assert_eq!(refused, log.contains(BUILT), "{log}");
    assert_cloned(&log);
}

/// Changes the counter that a state file has, as the VMM itself would have written it.
fn set_tsc_ahead(state: &Path, ahead: u64) {
    let decoded = format::decode(&std::fs::read(state).unwrap()).unwrap();
    let mut fields = serde_json::to_value(&decoded).unwrap();
    // Each is a struct kvm_msr_entry as bytes: its index, reserved ones, its value.
    let registers = fields["vcpus"][0]["msrs"].as_array_mut().unwrap();
    let index: Value = msrs::TSC.to_le_bytes().to_vec().into();
    let counter = registers
        .iter_mut()
        .map(|register| register.as_array_mut().unwrap())
        .find(|register| register[..4] == index.as_array().unwrap()[..])
        .unwrap();
    let value: Vec<u8> = serde_json::from_value(counter[8..].to_vec().into()).unwrap();
    let later = u64::from_le_bytes(value.try_into().unwrap()) + ahead;
    counter.truncate(8);
    counter.extend(later.to_le_bytes().map(Value::from));
    let changed = serde_json::from_value(fields).unwrap();
    std::fs::write(state, format::encode(&changed).unwrap()).unwrap();
}

/// Seconds since the epoch.
fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap()
        .as_secs()
}

/// What no two clones may share.
fn clones(checks: &mut Checks, templates: &Templates<'_>) {
    const SCRIPT: &str = "read uuid </proc/sys/kernel/random/uuid; \
        read boot </proc/sys/kernel/random/boot_id; read up idle </proc/uptime; \
        echo $uuid $boot $(hexdump -n 32 -e '\"%08x\"' /dev/urandom) $up $(date +%s) $(hostname)";
    let mut seen: Vec<Vec<String>> = Vec::new();
    checks.check("five clones: right clocks and host names", || {
        for number in 0..5 {
            let mut pod = templates.pod(&format!("clone{number}"), &["sh", "-c", SCRIPT]);
            let before = now();
            let output = pod.run();
            let after = now();
            assert_cloned(&pod.log());
            let words: Vec<String> = output.split_whitespace().map(str::to_owned).collect();
            assert_eq!(words.len(), 6, "{output}");
            let time: u64 = words[4].parse().unwrap();
            assert!((before..=after).contains(&time), "{before} {time} {after}");
            let up: f64 = words[3].parse().unwrap();
            // Since the builder's boot, not since the host's or for ages.
            assert!((0.0..3600.0).contains(&up), "{up}");
            assert_eq!(words[5], "direct");
            seen.push(words);
        }
    });
    for (column, name) in ["UUIDs", "boot ids", "random bytes"].iter().enumerate() {
        checks.check(&format!("five clones have distinct {name}"), || {
            let distinct: BTreeSet<&String> = seen.iter().map(|words| &words[column]).collect();
            assert_eq!(distinct.len(), 5, "{seen:?}");
            assert!(distinct.iter().all(|word| word.len() >= 32), "{seen:?}");
        });
    }
}

fn damaged(checks: &mut Checks, templates: &Templates<'_>, key: &str) {
    let folder = templates.path().join(key);
    let flip = |path: &Path| {
        let mut bytes = std::fs::read(path).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 0x10;
        std::fs::write(path, bytes).unwrap();
    };
    let truncate = |path: &Path| {
        let file = File::options().write(true).open(path).unwrap();
        file.set_len(file.metadata().unwrap().len() / 2).unwrap();
    };
    type Damage<'a> = &'a dyn Fn(&Path);
    let damages: [(&str, &str, Damage<'_>); 2] = [
        ("a flipped bit in the state", "state", &flip),
        ("truncated memory", "memory", &truncate),
    ];
    for (name, file, damage) in damages {
        checks.check(
            &format!("{name}: refused, rebuilt, and the container runs"),
            || {
                damage(&folder.join(file));
                let mut pod = templates.pod(&format!("damaged-{file}"), &["echo", "hello"]);
                assert_eq!(pod.run(), "hello\n");
                let log = pod.log();
                assert!(log.contains("is no good"), "{log}");
                assert!(log.contains(BUILT), "{log}");
                assert_cloned(&log);
                assert_eq!(templates.only()["uses"], 1);
            },
        );
    }
}

/// Many first starts, one build.
pub fn at_once(checks: &mut Checks, artifacts: &Artifacts) {
    let templates = Templates::new(artifacts);
    checks.check("two first starts at once make one template", || {
        let mut pods = ["one", "two"].map(|id| templates.pod(id, &["echo", "hello"]));
        std::thread::scope(|scope| {
            let runs = pods.each_ref().map(|pod| scope.spawn(|| pod.run()));
            for run in runs {
                assert_eq!(run.join().unwrap(), "hello\n");
            }
        });
        assert_eq!(templates.only()["uses"], 2);
        let logs = pods.each_mut().map(Pod::log);
        let built = logs.iter().filter(|log| log.contains(BUILT)).count();
        assert_eq!(built, 1, "{logs:?}");
        logs.iter().for_each(|log| assert_cloned(log));
    });
    checks.check(
        "kill -9 in the midst of a build: the next start builds",
        || {
            let (code, _, stderr) = templates.command(&["rm", "--all"]);
            assert_eq!(code, Some(0), "{stderr}");
            killed_build(&templates);
        },
    );
}

fn killed_build(templates: &Templates<'_>) {
    let pod = templates.pod("killed", &["echo", "hello"]);
    let shim = pod.bundle.start().unwrap();
    std::thread::scope(|scope| {
        let create = scope.spawn(|| shim.create(V, [""; 3]));
        while processes_of("bulkhead-vmm").is_empty() {
            assert!(!create.is_finished(), "{:?}", create.join());
            std::thread::sleep(Duration::from_millis(10));
        }
        for pid in processes_of("containerd-shim-bulkhead-v2") {
            kill(pid, Signal::SIGKILL).unwrap();
        }
        assert!(create.join().unwrap().is_err());
    });
    // The scenario's limit ends this if they stay.
    while !processes_of("bulkhead-vmm").is_empty() {
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(
        templates
            .names()
            .iter()
            .any(|name| name.starts_with("building-"))
    );
    pod.bundle.delete().unwrap();
    let mut next = templates.pod("next", &["echo", "hello"]);
    assert_eq!(next.run(), "hello\n");
    assert!(next.log().contains(BUILT));
    let names = templates.names();
    assert!(
        !names.iter().any(|name| name.starts_with("building-")),
        "{names:?}"
    );
}

/// No room, and no template.
pub fn full_disk(checks: &mut Checks, artifacts: &Artifacts) {
    use nix::mount::{MntFlags, MsFlags, mount, umount2};
    let templates = Templates::new(artifacts);
    std::fs::create_dir(templates.path()).unwrap();
    // Room for the logs of a build, not for the memory of a machine.
    let (kind, options) = (Some("tmpfs"), Some("size=2m,mode=0700"));
    mount(kind, &templates.path(), kind, MsFlags::empty(), options).unwrap();
    checks.check("a full disk: the machine boots cold and says so", || {
        let mut pod = templates.pod("full", &["echo", "hello"]);
        assert_eq!(pod.run(), "hello\n");
        let log = pod.log();
        let warnings = log.lines().filter(|line| line.contains("booting cold"));
        assert_eq!(warnings.count(), 1, "{log}");
        assert!(
            log.contains("WARN") && log.contains("No space left"),
            "{log}"
        );
    });
    checks.check(
        "nothing of the build is left, and the next start doesn't try",
        || {
            assert!(templates.list().is_empty());
            let names = templates.names();
            assert!(
                !names.iter().any(|name| name.starts_with("building-")),
                "{names:?}"
            );
            let mut pod = templates.pod("again", &["echo", "hello"]);
            assert_eq!(pod.run(), "hello\n");
            let log = pod.log();
            assert!(log.contains("failed a short while ago"), "{log}");
        },
    );
    umount2(&templates.path(), MntFlags::MNT_DETACH).unwrap();
}
