//! The sandbox API of containerd 2.x through a shim without containerd: a pod that is no task.

use crate::shim_task::assert_refused;
use bulkhead_proto::cri::{
    DNSConfig, LinuxContainerResources, LinuxPodSandboxConfig, PodSandboxConfig,
};
use bulkhead_tests::fifo::ReadFifo;
use bulkhead_tests::leaks::{Snapshot, processes_of};
use bulkhead_tests::pod::member_spec;
use bulkhead_tests::runner::Checks;
use bulkhead_tests::shim::{Bundle, Shim, TaskVersion, process};
use bulkhead_tests::{Artifacts, Result};
use containerd_shim_protos::api;
use containerd_shim_protos::cgroups_v2::metrics::Metrics;
use containerd_shim_protos::sandbox_api::{
    CreateSandboxRequest, CreateSandboxResponse, PingRequest, PingResponse, PlatformRequest,
    PlatformResponse, SandboxMetricsRequest, SandboxMetricsResponse, SandboxStatusRequest,
    SandboxStatusResponse, ShutdownSandboxRequest, ShutdownSandboxResponse, StartSandboxRequest,
    StartSandboxResponse, StopSandboxRequest, StopSandboxResponse, WaitSandboxRequest,
    WaitSandboxResponse,
};
use protobuf::Message;
use protobuf::well_known_types::any::Any;
use serde_json::{Value, json};
use std::os::fd::AsRawFd;
use std::time::Duration;
use ttrpc::Code;

const V: TaskVersion = TaskVersion::V3;
const POD: &str = "pod";
const SLOW: Duration = Duration::from_secs(120);

/// A connection to the shim of a pod, with the calls of the API.
struct Pod<'a> {
    shim: Shim<'a>,
    bundle: &'a Bundle,
    /// A network namespace as CNI would have made it, held by this descriptor.
    netns: std::fs::File,
}

/// A new network namespace.
fn netns() -> std::fs::File {
    let made = std::thread::spawn(|| {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
        std::fs::File::open("/proc/thread-self/ns/net").unwrap()
    });
    made.join().unwrap()
}

/// A method whose request is the sandbox's id and nothing else.
macro_rules! by_id {
    ($($function:ident: $method:literal, $request:ident -> $response:ident;)*) => {$(
        fn $function(&self, id: &str) -> Result<$response> {
            let request = $request { sandbox_id: id.into(), ..Default::default() };
            self.shim.sandbox($method, &request)
        }
    )*};
}

impl Pod<'_> {
    by_id! {
        start: "StartSandbox", StartSandboxRequest -> StartSandboxResponse;
        platform: "Platform", PlatformRequest -> PlatformResponse;
        stop: "StopSandbox", StopSandboxRequest -> StopSandboxResponse;
        wait: "WaitSandbox", WaitSandboxRequest -> WaitSandboxResponse;
        status: "SandboxStatus", SandboxStatusRequest -> SandboxStatusResponse;
        ping: "PingSandbox", PingRequest -> PingResponse;
        shutdown: "ShutdownSandbox", ShutdownSandboxRequest -> ShutdownSandboxResponse;
        metrics: "SandboxMetrics", SandboxMetricsRequest -> SandboxMetricsResponse;
    }

    fn create(&self, id: &str) -> Result<CreateSandboxResponse> {
        let config = PodSandboxConfig {
            hostname: "web-0".into(),
            dns_config: Some(DNSConfig {
                servers: vec!["192.0.2.53".into()],
                searches: vec!["svc.example".into()],
                ..Default::default()
            })
            .into(),
            linux: Some(LinuxPodSandboxConfig {
                sysctls: [("kernel.shm_rmid_forced".to_owned(), "1".to_owned())].into(),
                resources: Some(LinuxContainerResources {
                    memory_limit_in_bytes: 160 << 20,
                    ..Default::default()
                })
                .into(),
                ..Default::default()
            })
            .into(),
            ..Default::default()
        };
        let options = Any {
            type_url: "runtime.v1.PodSandboxConfig".into(),
            value: config.write_to_bytes().unwrap(),
            ..Default::default()
        };
        let request = CreateSandboxRequest {
            sandbox_id: id.into(),
            bundle_path: self.bundle.path().display().to_string(),
            options: Some(options).into(),
            netns_path: format!("/proc/{}/fd/{}", std::process::id(), self.netns.as_raw_fd()),
            ..Default::default()
        };
        self.shim.sandbox("CreateSandbox", &request)
    }

    fn state(&self) -> String {
        self.status(POD).unwrap().state
    }
}

pub fn run(checks: &mut Checks, artifacts: &Artifacts) {
    let before = Snapshot::take(&[]);
    {
        let bundle = bundle(artifacts);
        let started = checks.require("start without a spec in the bundle", || Pod {
            shim: bundle.start().unwrap(),
            bundle: &bundle,
            netns: netns(),
        });
        let Some(pod) = started else { return };
        unknown(checks, &pod);
        let Some(pid) = created(checks, &pod) else {
            return;
        };
        members(checks, artifacts, &pod, pid);
        checks.check("ShutdownSandbox ends the shim", || {
            pod.shutdown(POD).unwrap();
        });
    }
    checks.check("no process, mount, socket or folder is left", || {
        before.assert_nothing_added(&[]);
    });
    machine_killed(checks, artifacts);
    checks.check("and nothing is left after that either", || {
        before.assert_nothing_added(&[]);
    });
}

/// As containerd makes it for its shim sandboxer: an empty root and no config.json.
fn bundle(artifacts: &Artifacts) -> Bundle {
    let bundle = Bundle::new(artifacts, POD, "").unwrap();
    std::fs::remove_file(bundle.path().join("config.json")).unwrap();
    bundle
}

fn unknown(checks: &mut Checks, pod: &Pod<'_>) {
    checks.check("what isn't there yet: not found", || {
        for id in [POD, "other"] {
            assert_refused(pod.start(id), Code::NOT_FOUND, id);
            assert_refused(pod.status(id), Code::NOT_FOUND, id);
            assert_refused(pod.wait(id), Code::NOT_FOUND, id);
            assert_refused(pod.stop(id), Code::NOT_FOUND, id);
            assert_refused(pod.ping(id), Code::NOT_FOUND, id);
            assert_refused(pod.metrics(id), Code::NOT_FOUND, id);
        }
        assert_refused(pod.create("other"), Code::NOT_FOUND, "other");
        assert_refused(pod.platform("other"), Code::NOT_FOUND, "other");
        assert_refused(pod.shutdown("other"), Code::NOT_FOUND, "other");
        assert_refused(pod.start("../up"), Code::INVALID_ARGUMENT, "../up");
    });
}

fn created(checks: &mut Checks, pod: &Pod<'_>) -> Option<u32> {
    checks.require("CreateSandbox boots the machine, which isn't ready", || {
        pod.create(POD).unwrap();
        assert_eq!(processes_of("bulkhead-vmm").len(), 1);
        assert_eq!(pod.state(), "SANDBOX_NOTREADY");
        assert_refused(pod.create(POD), Code::ALREADY_EXISTS, POD);
    })?;
    checks.require("StartSandbox: ready, with the machine's pid", || {
        let started = pod.start(POD).unwrap();
        assert!(started.created_at.seconds > 1_600_000_000, "{started:?}");
        let status = pod.status(POD).unwrap();
        assert_eq!(status.state, "SANDBOX_READY");
        assert_eq!(
            (status.pid, &status.created_at),
            (started.pid, &started.created_at)
        );
        let vmm = processes_of("bulkhead-vmm")[0].as_raw();
        assert_eq!(started.pid, vmm as u32);
        assert_refused(pod.start(POD), Code::FAILED_PRECONDITION, "running");
        assert_refused(pod.shim.state(V, ""), Code::NOT_FOUND, "task pod");
        pod.ping(POD).unwrap();
        let platform = pod.platform(POD).unwrap().platform.unwrap();
        assert_eq!((&*platform.os, &*platform.architecture), ("linux", "amd64"));
        started.pid
    })
}

/// A container of the pod's, by the Task API of the same connection.
struct Member {
    bundle: Bundle,
    address: String,
}

impl Member {
    fn run(artifacts: &Artifacts, pod: &Pod<'_>, id: &str, spec: &Value) -> Self {
        let bundle = Bundle::new(artifacts, id, "").unwrap();
        bundle.set_spec(spec).unwrap();
        let member = Self {
            bundle,
            address: pod.shim.address.clone(),
        };
        member.shim().create(V, [""; 3]).unwrap();
        member.shim().start_process(V, "").unwrap();
        member
    }

    fn shim(&self) -> Shim<'_> {
        self.bundle.connect(&self.address).unwrap()
    }

    /// What a script in it prints.
    fn shell(&self, exec: &str, script: &str) -> String {
        let out = ReadFifo::make(&self.bundle.beside(exec)).unwrap();
        let shim = self.shim();
        let process = process(&["sh", "-c", script]);
        shim.exec(V, exec, &process, ["", &out.path(), ""]).unwrap();
        shim.start_process(V, exec).unwrap();
        assert_eq!(shim.wait(V, exec).unwrap().exit_status, 0);
        shim.delete(V, exec).unwrap();
        out.read(SLOW)
    }
}

fn members(checks: &mut Checks, artifacts: &Artifacts, pod: &Pod<'_>, pid: u32) {
    let both = checks.require("two containers join the pod", || {
        let spec = member_spec(POD, pid, &["sleep", "100000"]);
        ["one", "two"].map(|id| Member::run(artifacts, pod, id, &spec))
    });
    let Some([one, two]) = both else { return };
    checks.check(
        "host name, resolver, kernel parameters, /dev/shm are the pod's",
        || {
            let script = "hostname; cat /etc/hostname /proc/sys/kernel/shm_rmid_forced; \
                      cat /etc/resolv.conf; echo by one >/dev/shm/note";
            let told = one.shell("facts", script);
            let wanted = "web-0\nweb-0\n1\nsearch svc.example\nnameserver 192.0.2.53\n";
            assert_eq!(told, wanted);
            assert_eq!(two.shell("note", "cat /dev/shm/note"), "by one\n");
        },
    );
    checks.check(
        "SandboxMetrics are the sum of the containers', not zero",
        || {
            let of = |bytes: &Any| Metrics::parse_from_bytes(&bytes.value).unwrap();
            let stats = |member: &Member| {
                let request = api::StatsRequest {
                    id: member.bundle.id().into(),
                    ..Default::default()
                };
                let answer: api::StatsResponse = pod.shim.call(V, "Stats", &request).unwrap();
                of(&answer.stats)
            };
            let (first, second) = (stats(&one), stats(&two));
            let metrics = pod.metrics(POD).unwrap().metrics.unwrap();
            assert_eq!(metrics.data.type_url, "io.containerd.cgroups.v2.Metrics");
            assert_eq!(metrics.id, POD);
            let sum = of(&metrics.data);
            assert_eq!(sum.pids.current, 2, "{sum}");
            let least = first.cpu.usage_usec + second.cpu.usage_usec;
            assert!(
                least > 0 && sum.cpu.usage_usec >= least,
                "{least} and {sum}"
            );
            let memory = first.memory.usage.min(second.memory.usage);
            assert!(sum.memory.usage > memory, "{sum}");
        },
    );
    bad_siblings(checks, artifacts, pod, pid, &one);
    stopped(checks, pod, [&one, &two]);
}

fn stopped(checks: &mut Checks, pod: &Pod<'_>, [one, two]: [&Member; 2]) {
    checks.check(
        "StopSandbox ends the machine, and all that wait hear of it",
        || {
            std::thread::scope(|scope| {
                let waiter = scope.spawn(|| pod.wait(POD).unwrap());
                let member = scope.spawn(|| one.shim().wait(V, "").unwrap());
                pod.stop(POD).unwrap();
                assert_eq!(waiter.join().unwrap().exit_status, 137);
                assert_eq!(member.join().unwrap().exit_status, 137);
            });
            assert!(processes_of("bulkhead-vmm").is_empty());
            let status = pod.status(POD).unwrap();
            assert_eq!(status.state, "SANDBOX_NOTREADY");
            assert!(status.exited_at.seconds > 1_600_000_000, "{status:?}");
            assert_eq!(pod.wait(POD).unwrap().exit_status, 137, "waiting again");
            pod.stop(POD).unwrap();
            assert_refused(pod.ping(POD), Code::UNAVAILABLE, "ended");
            assert_refused(pod.metrics(POD), Code::UNAVAILABLE, "ended");
            assert_refused(pod.start(POD), Code::FAILED_PRECONDITION, "stopped");
        },
    );
    checks.check("its containers are deleted, and the shim stays", || {
        for member in [one, two] {
            let shim = member.shim();
            assert_eq!(shim.delete(V, "").unwrap().exit_status, 137);
            shim.shutdown(V).unwrap();
        }
        assert_eq!(pod.state(), "SANDBOX_NOTREADY");
    });
}

/// Ends that containers come to by their own fault, with the limits that a pod's container has.
fn bad_siblings(
    checks: &mut Checks,
    artifacts: &Artifacts,
    pod: &Pod<'_>,
    pid: u32,
    sibling: &Member,
) {
    let spec = |argv: &[&str], resources: Value| {
        let mut spec = member_spec(POD, pid, argv);
        spec["linux"]["resources"] = resources;
        spec
    };
    let ended = |member: &Member| {
        let shim = member.shim();
        let status = shim.wait(V, "").unwrap().exit_status;
        assert_eq!(shim.delete(V, "").unwrap().exit_status, status);
        status
    };
    checks.check("a crash and an OOM leave the others alone", || {
        // Its child crashes: process 1 of a namespace ignores what comes from within.
        let script = "sh -c 'kill -SEGV $$'; exit $?";
        let crash = spec(&["sh", "-c", script], json!({}));
        let member = Member::run(artifacts, pod, "crash", &crash);
        assert_eq!(ended(&member), 128 + 11);
        let argv = ["dd", "if=/dev/zero", "of=/dev/null", "bs=64M", "count=1"];
        let greedy = spec(&argv, json!({ "memory": { "limit": 8 << 20 } }));
        let member = Member::run(artifacts, pod, "greedy", &greedy);
        assert_eq!(ended(&member), 137);
        assert_eq!(sibling.shell("after-oom", "echo alive"), "alive\n");
    });
    checks.check("a fork bomb leaves the others alone", || {
        let limits = json!({
            "pids": { "limit": 16 },
            "cpu": { "quota": 20_000, "period": 100_000 },
        });
        let script = "bomb() { bomb | bomb & }; while :; do bomb; done";
        let bomb = spec(&["sh", "-c", script], limits);
        let member = Member::run(artifacts, pod, "bomb", &bomb);
        assert_eq!(sibling.shell("beside-bomb", "echo alive"), "alive\n");
        // Its first process may have given up by itself: it can't fork.
        let _ = member.shim().kill(V, "", 9, true);
        assert_ne!(ended(&member), 0);
    });
}

fn machine_killed(checks: &mut Checks, artifacts: &Artifacts) {
    checks.check("kill -9 of the VMM: WaitSandbox says 137", || {
        let bundle = bundle(artifacts);
        let shim = bundle.start().unwrap();
        let pod = Pod {
            shim,
            bundle: &bundle,
            netns: netns(),
        };
        pod.create(POD).unwrap();
        let pid = pod.start(POD).unwrap().pid;
        let vmm = nix::unistd::Pid::from_raw(pid as i32);
        nix::sys::signal::kill(vmm, nix::sys::signal::Signal::SIGKILL).unwrap();
        assert_eq!(pod.wait(POD).unwrap().exit_status, 137);
        assert_eq!(pod.state(), "SANDBOX_NOTREADY");
        assert_refused(pod.ping(POD), Code::UNAVAILABLE, "ended");
        pod.shutdown(POD).unwrap();
    });
}
