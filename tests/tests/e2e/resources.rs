//! What a container may use and does use: counters, changed limits, standing still, its processes.

use bulkhead_tests::runner::Checks;
use bulkhead_tests::shim::{Bundle, Shim, TaskVersion, process, spec};
use bulkhead_tests::{Artifacts, Error};
use containerd_shim_protos::api;
use containerd_shim_protos::cgroups_v2::metrics::Metrics;
use containerd_shim_protos::shim::oci::ProcessDetails;
use nix::sys::statfs::{EXT4_SUPER_MAGIC, TMPFS_MAGIC, statfs};
use protobuf::Message;
use serde_json::{Value, json};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

const V: TaskVersion = TaskVersion::V3;
const LIMIT: u64 = 32 << 20;

struct Task<'a> {
    bundle: &'a Bundle,
    shim: Shim<'a>,
}

impl Task<'_> {
    fn id(&self) -> String {
        self.bundle.id().to_owned()
    }

    fn stats(&self) -> Metrics {
        let request = api::StatsRequest {
            id: self.id(),
            ..Default::default()
        };
        let answer: api::StatsResponse = self.shim.call(V, "Stats", &request).unwrap();
        let stats = answer.stats.unwrap();
        assert_eq!(stats.type_url, "io.containerd.cgroups.v2.Metrics");
        Metrics::parse_from_bytes(&stats.value).unwrap()
    }

    fn update(&self, resources: &Value) -> Result<api::Empty, Error> {
        self.shim.update(V, resources)
    }

    fn pause(&self) -> Result<api::Empty, Error> {
        let request = api::PauseRequest {
            id: self.id(),
            ..Default::default()
        };
        self.shim.call(V, "Pause", &request)
    }

    fn resume(&self) -> Result<api::Empty, Error> {
        let request = api::ResumeRequest {
            id: self.id(),
            ..Default::default()
        };
        self.shim.call(V, "Resume", &request)
    }

    fn pids(&self) -> Vec<api::ProcessInfo> {
        let request = api::PidsRequest {
            id: self.id(),
            ..Default::default()
        };
        let answer: api::PidsResponse = self.shim.call(V, "Pids", &request).unwrap();
        answer.processes
    }

    fn status(&self) -> api::Status {
        let state = self.shim.state(V, "").unwrap();
        state.status.enum_value().unwrap()
    }
}

#[track_caller]
fn assert_code<T: std::fmt::Debug>(result: Result<T, Error>, code: ttrpc::Code) {
    match result {
        Err(Error::Rpc { code: found, .. }) if found == code as i32 => {}
        other => panic!("{other:?} instead of {code:?}"),
    }
}

/// Looks again until it's so; the scenario's limit has the last word.
fn until(mut so: impl FnMut() -> bool) {
    while !so() {
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// The user that the container has.
const USER: u32 = 1000;

/// Gives the container another user, a volume in which the files of root are that one's, and a hook
/// that writes there. None where the file system can't do that.
fn mapped_volume(bundle: &Bundle, spec: &mut Value) -> Option<PathBuf> {
    let volume = bundle.beside("volume");
    std::fs::create_dir(&volume).unwrap();
    if !has_mapped_mounts(&volume) {
        eprintln!("not checked: id-mapped mounts, which the file system of the tests lacks");
        return None;
    }
    let ids = json!([{ "containerID": 0, "hostID": USER, "size": 1 }]);
    let mount = json!({ "destination": "/volume", "type": "bind", "source": volume,
        "options": ["rbind", "idmap"], "uidMappings": ids, "gidMappings": ids });
    spec["mounts"].as_array_mut().unwrap().push(mount);
    spec["process"]["user"] = json!({ "uid": USER, "gid": USER });
    let hook = json!({ "path": "/bin/busybox", "args": ["touch", "/volume/hooked"] });
    spec["hooks"] = json!({ "startContainer": [hook] });
    Some(volume)
}

/// Whether the file system that `folder` is on has id-mapped mounts (mount_setattr(2)).
fn has_mapped_mounts(folder: &Path) -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers = release
        .split('.')
        .map_while(|part| part.parse::<u32>().ok());
    let kernel = (numbers.next(), numbers.next());
    match statfs(folder).unwrap().filesystem_type() {
        TMPFS_MAGIC => kernel >= (Some(6), Some(3)),
        EXT4_SUPER_MAGIC => kernel >= (Some(5), Some(12)),
        _ => false,
    }
}

pub fn run(checks: &mut Checks, artifacts: &Artifacts) {
    let bundle = Bundle::new(artifacts, "resources", "").unwrap();
    // Works all the time, without the kernel.
    let mut busy = spec(&["sh", "-c", "echo >/volume/made; while :; do :; done"]);
    let volume = mapped_volume(&bundle, &mut busy);
    busy["linux"]["resources"] = json!({
        "memory": { "limit": LIMIT },
        "pids": { "limit": 20 }
    });
    bundle.set_spec(&busy).unwrap();
    let started = checks.require("a container with limits starts", || {
        let shim = bundle.start().unwrap();
        shim.create(V, [""; 3]).unwrap();
        shim.start_process(V, "").unwrap();
        Task {
            bundle: &bundle,
            shim,
        }
    });
    let Some(task) = started else { return };
    if let Some(volume) = volume {
        checks.check("an id-mapped volume: its files have other owners", || {
            until(|| volume.join("made").exists());
            let made = std::fs::metadata(volume.join("made")).unwrap();
            assert_eq!((made.uid(), made.gid()), (0, 0));
        });
        checks.check(
            "a startContainer hook ran in the container, before it",
            || {
                let hooked = std::fs::metadata(volume.join("hooked")).unwrap();
                assert_eq!((hooked.uid(), hooked.gid()), (0, 0));
            },
        );
    }
    stats_and_pids(checks, &task);
    updates(checks, &task);
    pauses(checks, &task);
    checks.check("kill and delete of a paused container", || {
        task.pause().unwrap();
        task.shim.kill(V, "", 9, true).unwrap();
        assert_eq!(task.shim.wait(V, "").unwrap().exit_status, 137);
        assert_code(task.pause(), ttrpc::Code::FAILED_PRECONDITION);
        assert_code(task.update(&json!({})), ttrpc::Code::NOT_FOUND);
        assert!(
            task.stats().cpu.usage_usec > 0,
            "what it has used is still told"
        );
        assert!(!task.pids().is_empty());
        task.shim.delete(V, "").unwrap();
        task.shim.shutdown(V).unwrap();
    });
}

fn stats_and_pids(checks: &mut Checks, task: &Task<'_>) {
    checks.check("stats tell limits and what is used", || {
        until(|| task.stats().cpu.user_usec > 100_000);
        let stats = task.stats();
        assert_eq!((stats.pids.current, stats.pids.limit), (1, 20), "{stats}");
        assert_eq!(stats.memory.usage_limit, LIMIT, "{stats}");
        assert!((1..LIMIT).contains(&stats.memory.usage), "{stats}");
        assert!(stats.memory.pgfault > 0, "{stats}");
        assert_eq!(stats.memory_events.oom_kill, 0, "{stats}");
    });
    checks.check(
        "pids list the guest's processes, execs by their names",
        || {
            assert_eq!(task.pids().len(), 1);
            let sleep = process(&["sleep", "100000"]);
            task.shim.exec(V, "sleeper", &sleep, [""; 3]).unwrap();
            task.shim.start_process(V, "sleeper").unwrap();
            let processes = task.pids();
            assert_eq!(processes.len(), 2, "{processes:?}");
            assert_eq!(task.stats().pids.current, 2);
            let named: Vec<_> = processes
                .iter()
                .filter_map(|one| one.info.as_ref())
                .collect();
            assert_eq!(named.len(), 1, "{processes:?}");
            let details = ProcessDetails::parse_from_bytes(&named[0].value).unwrap();
            assert_eq!(details.exec_id, "sleeper");
            task.shim.kill(V, "sleeper", 9, false).unwrap();
            task.shim.wait(V, "sleeper").unwrap();
            task.shim.delete(V, "sleeper").unwrap();
        },
    );
}

fn updates(checks: &mut Checks, task: &Task<'_>) {
    checks.check("update: memory and pids", || {
        let wanted = json!({ "memory": { "limit": 2 * LIMIT }, "pids": { "limit": 30 } });
        task.update(&wanted).unwrap();
        let stats = task.stats();
        assert_eq!(stats.memory.usage_limit, 2 * LIMIT);
        assert_eq!(stats.pids.limit, 30);
    });
    checks.check("update: a CPU quota throttles", || {
        let before = task.stats().cpu.nr_throttled;
        let wanted = json!({ "cpu": { "quota": 20_000, "period": 100_000 } });
        task.update(&wanted).unwrap();
        until(|| task.stats().cpu.nr_throttled > before);
        assert_eq!(task.stats().pids.limit, 30, "what is left out stays");
        task.update(&json!({ "cpu": { "quota": -1 } })).unwrap();
    });
    checks.check("what is no update is refused and changes nothing", || {
        let wrong = json!({ "memory": { "limit": "much" } });
        assert_code(task.update(&wrong), ttrpc::Code::INVALID_ARGUMENT);
        assert_code(task.update(&json!("?")), ttrpc::Code::INVALID_ARGUMENT);
        assert_eq!(task.stats().memory.usage_limit, 2 * LIMIT);
    });
}

fn pauses(checks: &mut Checks, task: &Task<'_>) {
    checks.check(
        "pause: all of it stands still, and nothing new is let in",
        || {
            task.pause().unwrap();
            assert_eq!(task.status(), api::Status::PAUSED);
            let used = task.stats().cpu.usage_usec;
            std::thread::sleep(Duration::from_secs(1));
            assert_eq!(task.stats().cpu.usage_usec, used);
            assert_code(task.pause(), ttrpc::Code::FAILED_PRECONDITION);
            let exec = task.shim.exec(V, "late", &process(&["true"]), [""; 3]);
            assert_code(exec, ttrpc::Code::FAILED_PRECONDITION);
        },
    );
    checks.check("resume: it goes on", || {
        let used = task.stats().cpu.usage_usec;
        task.resume().unwrap();
        assert_eq!(task.status(), api::Status::RUNNING);
        until(|| task.stats().cpu.usage_usec > used);
        assert_code(task.resume(), ttrpc::Code::FAILED_PRECONDITION);
    });
}
