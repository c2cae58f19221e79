//! Kubernetes pods: through the CRI plugin of a real containerd, as kubelet asks for them.

mod client;
pub mod layers;
pub mod network;
pub mod sandboxer;
mod security;
mod stream;
mod terminals;
mod users;
pub mod volumes;

use bulkhead_tests::Artifacts;
use bulkhead_tests::cgroups::Cgroup;
use bulkhead_tests::containerd::{Containerd, IMAGE, Release};
use bulkhead_tests::leaks::{Snapshot, processes_of};
use bulkhead_tests::runner::Checks;
use client::Client;
use k8s_cri::v1::security_profile::ProfileType;
use k8s_cri::v1::{
    ContainerConfig, ContainerMetadata, ContainerState, ContainerStats, DnsConfig, ImageSpec,
    LinuxContainerConfig, LinuxContainerResources, LinuxContainerSecurityContext,
    LinuxPodSandboxConfig, LinuxSandboxSecurityContext, Mount, NamespaceMode, NamespaceOption,
    PodSandboxConfig, PodSandboxMetadata, PodSandboxState, SecurityProfile,
};
use std::path::Path;
use std::process::Command;
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

/// The scenario's own folders, and the folders that the CNI plugins make once.
const IGNORED: [&str; 3] = ["file /run/t", "file /run/cni", "/run/netns"];

/// A pod and the client that made it.
struct Pod<'a> {
    client: &'a Client,
    config: PodSandboxConfig,
    id: String,
}

fn through(checks: &mut Checks, artifacts: &Artifacts, release: &Release) {
    let name = format!("containerd {} serves CRI", release.version().unwrap());
    let Some((containerd, client)) = checks.require(&name, || {
        own_network();
        let settings = "memory_mib = 160\n";
        let containerd = Containerd::start_with_cri(artifacts, release, settings).unwrap();
        let client = Client::with_images(&containerd);
        (containerd, client)
    }) else {
        return;
    };
    // Kubelet's, with all that it makes.
    let pods = Cgroup::make("pods").unwrap();
    let before = Snapshot::take(&IGNORED);
    let config = pod_config(&containerd, &pods, "web");
    let pod = checks.require("RunPodSandbox: ready, with one VMM", || {
        let id = client.run_pod(&config);
        let id = id.unwrap_or_else(|error| panic!("{error}: {}", containerd.log_tail(12)));
        let status = client.pod_status(&id).unwrap();
        assert_eq!(status.state(), PodSandboxState::SandboxReady, "{status:?}");
        assert_eq!(status.runtime_handler, "bulkhead");
        let address = status.network.clone().unwrap_or_default().ip;
        assert!(address.starts_with("10.88.0."), "{status:?}");
        assert_eq!(processes_of("bulkhead-vmm").len(), 1);
        Pod {
            client: &client,
            config: config.clone(),
            id,
        }
    });
    if let Some(pod) = pod {
        containers(checks, &containerd, &pod);
        host_cgroup(checks, &pod, &pods);
        endings(checks, &containerd, &pod);
        pod.removed(checks);
    }
    sharing(checks, &containerd, &client, &pods);
    if release.series().unwrap() > 1 {
        users::checks(checks, &containerd, &client, &pods);
    }
    drop(client);
    checks.check("no process, mount, socket or cgroup is left", || {
        before.assert_nothing_added(&IGNORED);
        let run = containerd.runtime_dir();
        let left: Vec<_> = std::fs::read_dir(run).into_iter().flatten().collect();
        assert!(left.is_empty(), "in the runtime folder: {left:?}");
    });
}

/// Moves this thread, and so all that it starts, into a network namespace of its own: the CNI
/// plugins make their interfaces there.
fn own_network() {
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
    let up = Command::new("ip")
        .args(["link", "set", "lo", "up"])
        .status();
    assert!(up.unwrap().success());
}

fn pod_config(containerd: &Containerd, pods: &Cgroup, name: &str) -> PodSandboxConfig {
    let logs = containerd.folder().join(format!("logs-{name}"));
    std::fs::create_dir(&logs).unwrap();
    PodSandboxConfig {
        metadata: Some(PodSandboxMetadata {
            name: name.into(),
            uid: format!("uid-{name}"),
            namespace: "default".into(),
            attempt: 0,
        }),
        hostname: format!("{name}-host"),
        log_directory: logs.display().to_string(),
        dns_config: Some(DnsConfig {
            servers: vec!["192.0.2.53".into()],
            searches: vec!["svc.example".into()],
            options: Vec::new(),
        }),
        linux: Some(LinuxPodSandboxConfig {
            cgroup_parent: pods.path().into(),
            security_context: Some(LinuxSandboxSecurityContext {
                namespace_options: Some(own_pids()),
                seccomp: Some(runtime_default()),
                ..Default::default()
            }),
            resources: Some(LinuxContainerResources {
                memory_limit_in_bytes: 96 << 20,
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// What a pod has unless it asks for another thing: network and IPC shared, processes not.
fn own_pids() -> NamespaceOption {
    NamespaceOption {
        pid: NamespaceMode::Container.into(),
        ..Default::default()
    }
}

fn runtime_default() -> SecurityProfile {
    SecurityProfile {
        profile_type: ProfileType::RuntimeDefault.into(),
        ..Default::default()
    }
}

fn shell_container(name: &str, script: &str) -> ContainerConfig {
    ContainerConfig {
        metadata: Some(ContainerMetadata {
            name: name.into(),
            attempt: 0,
        }),
        image: Some(ImageSpec {
            image: IMAGE.into(),
            ..Default::default()
        }),
        command: ["sh", "-c", script].map(String::from).into(),
        log_path: format!("{name}.log"),
        linux: Some(LinuxContainerConfig {
            resources: Some(LinuxContainerResources::default()),
            security_context: Some(LinuxContainerSecurityContext {
                namespace_options: Some(own_pids()),
                seccomp: Some(runtime_default()),
                ..Default::default()
            }),
        }),
        ..Default::default()
    }
}

/// The security context of a container that [`shell_container`] made.
fn security(config: &mut ContainerConfig) -> &mut LinuxContainerSecurityContext {
    let linux = config.linux.get_or_insert_default();
    linux.security_context.get_or_insert_default()
}

impl Pod<'_> {
    /// Creates and starts a container, and returns its id.
    #[track_caller]
    fn run(&self, containerd: &Containerd, config: ContainerConfig) -> String {
        let created = self.client.create(&self.id, config, &self.config);
        let id = created.unwrap_or_else(|error| panic!("create: {error}"));
        let started = self.client.start(&id);
        started.unwrap_or_else(|error| panic!("start: {error}: {}", containerd.log_tail(12)));
        id
    }

    /// The log of a container, as kubelet finds it, once it has as many lines.
    fn log(&self, name: &str, lines: usize) -> Vec<String> {
        let path = Path::new(&self.config.log_directory).join(format!("{name}.log"));
        let end = Instant::now() + Duration::from_secs(20);
        loop {
            let text = std::fs::read_to_string(&path).unwrap_or_default();
            let found: Vec<String> = text.lines().map(str::to_owned).collect();
            if found.len() >= lines {
                return found;
            }
            assert!(Instant::now() < end, "{}: {text:?}", path.display());
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    fn removed(self, checks: &mut Checks) {
        checks.check(
            "StopPodSandbox ends the machine, RemovePodSandbox the rest",
            || {
                self.client.stop_pod(&self.id).unwrap();
                let status = self.client.pod_status(&self.id).unwrap();
                assert_eq!(status.state(), PodSandboxState::SandboxNotready);
                assert!(processes_of("bulkhead-vmm").is_empty());
                // kubelet asks again and again.
                self.client.stop_pod(&self.id).unwrap();
                self.client.remove_pod(&self.id).unwrap();
                self.client.remove_pod(&self.id).unwrap();
            },
        );
    }
}

fn containers(checks: &mut Checks, containerd: &Containerd, pod: &Pod) {
    let forever = "echo to stdout; echo to stderr >&2; exec sleep 100000";
    let Some((first, second)) = checks.require("two containers in one machine", || {
        let first = pod.run(containerd, shell_container("first", forever));
        let second = pod.run(containerd, shell_container("second", forever));
        assert_eq!(processes_of("bulkhead-vmm").len(), 1);
        let boot = "cat /proc/sys/kernel/random/boot_id";
        assert_eq!(
            pod.client.shell(&first, boot),
            pod.client.shell(&second, boot)
        );
        (first, second)
    }) else {
        return;
    };
    let client = pod.client;
    checks.check("logs are in CRI's format", || {
        let lines = pod.log("first", 2);
        let has = |stream: &str, text: &str| {
            let wanted = format!(" {stream} F {text}");
            lines
                .iter()
                .any(|line| line.ends_with(&wanted) && line.starts_with("20"))
        };
        assert!(
            has("stdout", "to stdout") && has("stderr", "to stderr"),
            "{lines:?}"
        );
    });
    checks.check("ExecSync: output and exit code", || {
        let script = "echo out; echo err >&2; exit 42";
        let answer = client.exec(&first, &["sh", "-c", script]).unwrap();
        assert_eq!(answer.exit_code, 42);
        assert_eq!(answer.stdout, b"out\n");
        assert_eq!(answer.stderr, b"err\n");
    });
    checks.check(
        "network, IPC and host name are the pod's, processes are not",
        || {
            let script = "for kind in net ipc pid; do readlink /proc/self/ns/$kind; done; hostname";
            let [one, other] = [&first, &second].map(|id| client.shell(id, script));
            let (one, other): (Vec<_>, Vec<_>) = (one.lines().collect(), other.lines().collect());
            assert_eq!((one.len(), &one[..2]), (4, &other[..2]));
            assert_ne!(one[2], other[2], "the pid namespace");
            assert_eq!([one[3], other[3]], ["web-host"; 2]);
        },
    );
    checks.check("/dev/shm is shared", || {
        client.shell(&first, "echo by the first >/dev/shm/note");
        assert_eq!(client.shell(&second, "cat /dev/shm/note"), "by the first");
    });
    checks.check("resolv.conf, hosts and hostname are the pod's", || {
        let files = client.shell(&first, "cat /etc/hostname /etc/resolv.conf /etc/hosts");
        for line in ["web-host", "nameserver 192.0.2.53", "search svc.example"] {
            assert!(files.lines().any(|found| found == line), "{line}: {files}");
        }
        assert!(files.contains("localhost"), "{files}");
    });
    checks.check("RuntimeDefault's seccomp profile filters", || {
        let status = client.shell(&first, "grep Seccomp: /proc/self/status");
        assert_eq!(status.split_whitespace().last(), Some("2"), "{status}");
    });
    checks.check("statistics: what each container did, and no other", || {
        let before = [&first, &second].map(|id| usage(&client.stats(id).unwrap()));
        // /dev is memory of the container's own.
        let script = "head -c 1000000 /dev/zero >/dev/fill; \
            head -c 300000 /dev/zero | sha256sum >/dev/null; times >/tmp/times; tail -n 1 /tmp/times";
        // As the shell counts what its children have used: "0m0.10s 0m2.35s".
        let used: f64 = (client.shell(&first, script).split_whitespace())
            .map(|time| {
                let (minutes, seconds) = time.trim_end_matches('s').split_once('m').unwrap();
                minutes.parse::<f64>().unwrap() * 60.0 + seconds.parse::<f64>().unwrap()
            })
            .sum();
        // The counters may be those of a moment ago.
        let end = Instant::now() + Duration::from_secs(60);
        loop {
            let all = client.all_stats(&pod.id).unwrap();
            let after = [&first, &second].map(|id| {
                let one = all.iter().find(|one| {
                    one.attributes.as_ref().is_some_and(|attributes| attributes.id == **id)
                });
                usage(one.unwrap_or_else(|| panic!("{id} is not in {all:?}")))
            });
            let cpu = |index: usize| (after[index].0 - before[index].0) as f64 / 1e9;
            if cpu(0) >= used * 0.9 {
                assert!(used > 0.0 && cpu(1) < cpu(0) / 2.0, "{used} {before:?} {after:?}");
                let more = |index: usize| after[index].1.saturating_sub(before[index].1);
                assert!(
                    more(0) > 500_000 && more(1) < 500_000 && after[1].1 > 0,
                    "{before:?} {after:?}"
                );
                break;
            }
            assert!(Instant::now() < end, "{used} {before:?} {after:?}");
            std::thread::sleep(Duration::from_millis(200));
        }
    });
    terminals::checks(checks, containerd, pod, &first);
    security::restricted(checks, containerd, pod);
}

/// What the pod takes of the host is in the cgroup that kubelet made for it.
fn host_cgroup(checks: &mut Checks, pod: &Pod<'_>, pods: &Cgroup) {
    checks.check(
        "the VMM runs in the pod's cgroup on the host, alone",
        || {
            assert_eq!(pods.below(), (vec![pod.id.clone()], 1));
            let vmm = processes_of("bulkhead-vmm");
            let shown = std::fs::read_to_string(format!("/proc/{}/cgroup", vmm[0])).unwrap();
            let path = format!("{}/{}", pods.path(), pod.id);
            assert!(shown.lines().any(|line| line.ends_with(&path)), "{shown}");
        },
    );
    let answer = pod.client.pod_stats(&pod.id);
    if let Err(status) = &answer
        && status.code() == tonic::Code::Unimplemented
    {
        println!("this containerd has no PodSandboxStats: {status}");
        return;
    }
    checks.check(
        "the pod's statistics are the VM's as the host sees them",
        || {
            let stats = answer.unwrap().linux.unwrap_or_default();
            let value = |value: Option<k8s_cri::v1::UInt64Value>| value.unwrap_or_default().value;
            let cpu = value(stats.cpu.unwrap_or_default().usage_core_nano_seconds);
            let memory = value(stats.memory.unwrap_or_default().working_set_bytes);
            // A guest that has booted, or been continued, and run containers.
            assert!(cpu > 50_000_000, "{cpu} ns of CPU time");
            let bounds = (4 << 20)..(400 << 20);
            assert!(bounds.contains(&memory), "{memory} bytes");
        },
    );
}

/// Nanoseconds of CPU time, bytes of memory.
fn usage(stats: &ContainerStats) -> (u64, u64) {
    let value = |value: Option<k8s_cri::v1::UInt64Value>| value.unwrap_or_default().value;
    let cpu = stats.cpu.unwrap_or_default();
    let memory = stats.memory.unwrap_or_default();
    (
        value(cpu.usage_core_nano_seconds),
        value(memory.working_set_bytes),
    )
}

/// A second pod, privileged, which shares its processes and sets kernel parameters.
fn sharing(checks: &mut Checks, containerd: &Containerd, client: &Client, pods: &Cgroup) {
    let mut config = pod_config(containerd, pods, "shared");
    let linux = config.linux.get_or_insert_default();
    linux.security_context = Some(LinuxSandboxSecurityContext {
        namespace_options: Some(NamespaceOption::default()),
        privileged: true,
        ..Default::default()
    });
    let sysctls = [
        ("net.ipv4.ip_unprivileged_port_start", "80"),
        ("kernel.shm_rmid_forced", "1"),
    ];
    linux.sysctls = sysctls
        .map(|(name, value)| (name.into(), value.into()))
        .into();
    let Some(pod) = checks.require("a pod with kernel parameters and shared processes", || {
        let id = client.run_pod(&config);
        let id = id.unwrap_or_else(|error| panic!("{error}: {}", containerd.log_tail(12)));
        Pod { client, config, id }
    }) else {
        return;
    };
    checks.check(
        "its kernel parameters are set, its processes shared",
        || {
            let run = |name: &str, script: &str| {
                let mut config = shell_container(name, script);
                security(&mut config).namespace_options = Some(NamespaceOption::default());
                pod.run(containerd, config)
            };
            let first = run("first", "exec sleep 4711");
            let second = run("second", "exec sleep 100000");
            let files = sysctls.map(|(name, _)| format!("/proc/sys/{}", name.replace('.', "/")));
            let values = client.shell(&second, &format!("cat {}", files.join(" ")));
            assert!(values.lines().eq(sysctls.map(|(_, value)| value)), "{values}");
            // Neither the agent nor the kernel's threads.
            let all = "until [ $(pidof sleep | wc -w) = 2 ]; do :; done; \
                for p in /proc/[0-9]*; do cat $p/comm 2>/dev/null; done; true";
            let all = client.shell(&second, all);
            let theirs = ["pod", "sleep", "sh", "cat"];
            assert_eq!(all.lines().next(), Some("pod"), "{all}");
            assert!(all.lines().all(|name| theirs.contains(&name)), "{all}");
            assert_eq!(all.lines().filter(|name| *name == "sleep").count(), 2, "{all}");
            let kill = "for p in $(pidof sleep); do grep -q 4711 /proc/$p/cmdline && kill -9 $p; done; true";
            client.shell(&second, kill);
            assert_eq!(client.exited(&first).exit_code, 137);
            let status = client.status(&second).unwrap();
            assert_eq!(status.state(), ContainerState::ContainerRunning);
        },
    );
    security::privileged(checks, containerd, &pod);
    pod.removed(checks);
}

fn endings(checks: &mut Checks, containerd: &Containerd, pod: &Pod) {
    let client = pod.client;
    checks.check(
        "exit codes, reasons and the message of a termination",
        || {
            let message = containerd.folder().join("termination");
            std::fs::write(&message, "").unwrap();
            let mut config =
                shell_container("crash", "echo 'out of luck' >/dev/termination-log; exit 3");
            config.mounts = vec![Mount {
                container_path: "/dev/termination-log".into(),
                host_path: message.display().to_string(),
                ..Default::default()
            }];
            let id = pod.run(containerd, config.clone());
            let status = client.exited(&id);
            assert_eq!(
                (status.exit_code, status.reason.as_str()),
                (3, "Error"),
                "{status:?}"
            );
            assert!(status.finished_at >= status.started_at && status.started_at > 0);
            assert_eq!(std::fs::read_to_string(&message).unwrap(), "out of luck\n");
            // As kubelet restarts it: a new container, the next attempt.
            config.metadata.get_or_insert_default().attempt = 1;
            config.command = ["true"].map(String::from).into();
            let again = pod.run(containerd, config);
            let status = client.exited(&again);
            assert_eq!(
                (status.exit_code, status.reason.as_str()),
                (0, "Completed"),
                "{status:?}"
            );
            client.remove(&id).unwrap();
            client.remove(&again).unwrap();
        },
    );
    checks.check("StopContainer: its grace time, then SIGKILL", || {
        let id = pod.run(
            containerd,
            shell_container("stubborn", "trap '' TERM; while :; do sleep 1; done"),
        );
        client.stop(&id, 2).unwrap();
        let status = client.status(&id).unwrap();
        assert_eq!(status.state(), ContainerState::ContainerExited);
        assert_eq!(status.exit_code, 137, "{status:?}");
    });
    checks.check("too much memory: OOMKilled", || {
        let mut config = shell_container(
            "glutton",
            "exec dd if=/dev/zero of=/dev/null bs=64M count=1",
        );
        let resources = &mut config.linux.get_or_insert_default().resources;
        resources.get_or_insert_default().memory_limit_in_bytes = 8 << 20;
        let id = pod.run(containerd, config);
        let status = client.exited(&id);
        assert_eq!(
            (status.exit_code, status.reason.as_str()),
            (137, "OOMKilled"),
            "{status:?}"
        );
    });
}
