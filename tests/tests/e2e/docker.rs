//! Docker: a current daemon with Bulkhead as its runtime. Its interfaces come between a container's
//! creation and its start, and while it runs.

use bulkhead_tests::Artifacts;
use bulkhead_tests::artifacts::workspace;
use bulkhead_tests::containerd::{Containerd, IMAGE, RUNTIME, Release};
use bulkhead_tests::docker::Docker;
use bulkhead_tests::leaks::processes_of;
use bulkhead_tests::runner::Checks;
use nix::sched::{CloneFlags, unshare};
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::Command;
use std::time::{Duration, Instant};

const HOST_PORT: u16 = 18_081;
/// For what a guest is to have done.
const PATIENCE: Duration = Duration::from_secs(90);

/// A container's life on the default bridge.
pub fn life(checks: &mut Checks, artifacts: &Artifacts) {
    with_daemon(checks, artifacts, |host, checks| {
        if checks
            .require("docker run: the default bridge", || host.web())
            .is_some()
        {
            host.default_bridge(checks);
            host.life(checks);
        }
        host.refused(checks);
    });
}

/// Networks of users', and none.
pub fn networks(checks: &mut Checks, artifacts: &Artifacts) {
    with_daemon(checks, artifacts, |host, checks| {
        if checks
            .require("docker run: the default bridge", || host.web())
            .is_some()
        {
            host.user_network(checks);
        }
        host.others(checks);
        checks.check("docker network rm", || {
            host.remove();
            host.docker.call("DELETE", "/networks/mine", None).unwrap();
        });
    });
}

fn with_daemon(
    checks: &mut Checks,
    artifacts: &Artifacts,
    work: impl FnOnce(&Host<'_>, &mut Checks),
) {
    let started = checks.require("a daemon on containerd", || {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        let up = Command::new("ip")
            .args(["link", "set", "lo", "up"])
            .status();
        assert!(up.unwrap().success());
        let release = Release::current().unwrap();
        let containerd = Containerd::start(artifacts, &release, "memory_mib = 160\n").unwrap();
        let docker = Docker::start(&containerd).unwrap();
        let archive = containerd.folder().join("docker-busybox.tar");
        let made = Command::new(workspace().join("scripts/busybox-image"))
            .arg("--out")
            .arg(&archive)
            .args(["--name", IMAGE])
            .status();
        assert!(made.unwrap().success());
        docker.load(&archive).unwrap();
        let version = docker.json("GET", "/version", None).unwrap();
        let module = &version["Components"][0]["Details"]["ModuleVersion"];
        println!("API {}, {module}", version["ApiVersion"]);
        (containerd, docker)
    });
    let Some((containerd, docker)) = started else {
        return;
    };
    let host = Host {
        containerd: &containerd,
        docker: &docker,
    };
    work(&host, checks);
    checks.check("docker rm --force: nothing is left of any", || {
        host.remove();
        assert!(processes_of("bulkhead-vmm").is_empty());
        let run = containerd.runtime_dir().join("moby");
        let left: Vec<_> = std::fs::read_dir(run).into_iter().flatten().collect();
        assert!(left.is_empty(), "in the runtime folder: {left:?}");
    });
    drop(docker);
}

struct Host<'a> {
    containerd: &'a Containerd,
    docker: &'a Docker,
}

/// A container's configuration.
fn shell(script: &str, host: Value) -> Value {
    json!({ "Image": IMAGE, "Cmd": ["sh", "-c", script], "HostConfig": host })
}

impl Host<'_> {
    #[track_caller]
    fn start(&self, name: &str, configuration: &Value) {
        if let Err(error) = self.docker.run(name, configuration) {
            let daemon = self.docker.log_tail(5);
            panic!("{error}: {}\n{daemon}", self.containerd.log_tail(12));
        }
    }

    /// What a script writes, which must succeed.
    #[track_caller]
    fn exec(&self, name: &str, script: &str) -> String {
        let (output, code) = self.docker.exec(name, script).unwrap();
        assert_eq!(code, 0, "{script}: {output}");
        output
    }

    #[track_caller]
    fn post(&self, path: &str, body: &Value) {
        self.docker.call("POST", path, Some(body)).unwrap();
    }

    fn inspect(&self, name: &str) -> Value {
        let path = format!("/containers/{name}/json");
        self.docker.json("GET", &path, None).unwrap()
    }

    /// All containers.
    fn remove(&self) {
        for name in ["web", "other", "both", "none", "named"] {
            let path = format!("/containers/{name}?force=1&v=1");
            let _ = self.docker.call("DELETE", &path, None);
        }
    }

    fn web(&self) {
        let volume = self.containerd.folder().join("volume");
        std::fs::create_dir(&volume).unwrap();
        std::fs::write(volume.join("note"), "from the host\n").unwrap();
        let script = "mkdir -p /www; echo 'this is web' >/www/index.html; httpd -p 80 -h /www; \
            echo to stdout; echo to stderr >&2; exec sleep 100000";
        let mut configuration = shell(
            script,
            json!({
                "Memory": 96 << 20,
                "NanoCpus": 1_000_000_000u64,
                "Binds": [format!("{}:/volume", volume.display()), "kept:/kept"],
                "PortBindings": { "80/tcp": [{ "HostPort": HOST_PORT.to_string() }] },
            }),
        );
        configuration["ExposedPorts"] = json!({ "80/tcp": {} });
        self.start("web", &configuration);
    }

    fn default_bridge(&self, checks: &mut Checks) {
        checks.check("the guest has the address that Docker tells of", || {
            let networks = &self.inspect("web")["NetworkSettings"]["Networks"];
            let wanted = networks["bridge"]["IPAddress"].as_str().unwrap().to_owned();
            let seen = self.exec("web", "ip -o address show dev eth0; ip route");
            assert!(seen.contains(&format!("inet {wanted}/16")), "{seen}");
            assert!(seen.contains("default via 172.17.0.1 dev eth0"), "{seen}");
            self.exec(
                "web",
                "ping -c 1 -w 30 172.17.0.1; ping -c 1 -w 30 127.0.0.1",
            );
        });
        checks.check("docker logs, and exec with its exit code", || {
            let end = Instant::now() + PATIENCE;
            while self.docker.logs("web").unwrap().lines().count() < 2 {
                assert!(Instant::now() < end, "{:?}", self.docker.logs("web"));
                std::thread::sleep(Duration::from_millis(200));
            }
            let logs = self.docker.logs("web").unwrap();
            assert!(
                logs.contains("to stdout\n") && logs.contains("to stderr\n"),
                "{logs}"
            );
            let ended = self
                .docker
                .exec("web", "echo out; echo err >&2; exit 42")
                .unwrap();
            assert_eq!(ended.1, 42);
            assert!(
                ended.0.contains("out\n") && ended.0.contains("err\n"),
                "{ended:?}"
            );
        });
        checks.check("a published port is the container's", || {
            assert_eq!(get(HOST_PORT), "this is web");
        });
        checks.check("--memory and --cpus, bind mounts and volumes", || {
            let script = "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/cpu.max; nproc; \
                cat /volume/note; echo from the guest >/volume/answer; echo kept >/kept/file";
            let seen = self.exec("web", script);
            assert_eq!(seen, "100663296\n100000 100000\n1\nfrom the host\n");
            let answer = self.containerd.folder().join("volume/answer");
            assert_eq!(std::fs::read_to_string(answer).unwrap(), "from the guest\n");
        });
    }

    fn user_network(&self, checks: &mut Checks) {
        checks.check("a user-defined network, and names on it", || {
            self.post("/networks/create", &json!({ "Name": "mine" }));
            let mut other = shell("exec sleep 100000", json!({ "NetworkMode": "mine" }));
            other["NetworkingConfig"] =
                json!({ "EndpointsConfig": { "mine": { "Aliases": ["alias"] } } });
            self.start("other", &other);
            let seen = self.exec("other", "cat /etc/resolv.conf; nslookup other");
            assert!(seen.contains("nameserver 127.0.0.11"), "{seen}");
            let own = address(&self.inspect("other"), "mine");
            assert!(seen.contains(&format!("Address: {own}")), "{seen}");
            let (seen, code) = self
                .docker
                .exec("other", "nslookup nobody.invalid")
                .unwrap();
            assert_ne!(code, 0, "{seen}");
        });
        checks.check("docker network connect, while it runs", || {
            self.post("/networks/mine/connect", &json!({ "Container": "web" }));
            let own = address(&self.inspect("web"), "mine");
            let end = Instant::now() + PATIENCE;
            let look = "ip -o address show dev eth1; nslookup alias";
            loop {
                let (seen, code) = self.docker.exec("web", look).unwrap();
                if code == 0 && seen.contains(&format!("inet {own}/16")) {
                    break;
                }
                assert!(Instant::now() < end, "{seen}");
                std::thread::sleep(Duration::from_millis(300));
            }
            self.exec("other", "ping -c 1 -w 30 web");
            let page = self.exec("other", "wget -qO- http://web/");
            assert_eq!(page, "this is web\n");
        });
        checks.check("docker network disconnect", || {
            self.post("/networks/mine/disconnect", &json!({ "Container": "web" }));
            let end = Instant::now() + PATIENCE;
            while self.docker.exec("web", "ip link show dev eth1").unwrap().1 == 0 {
                assert!(Instant::now() < end, "eth1 is still there");
                std::thread::sleep(Duration::from_millis(300));
            }
            self.exec("web", "ping -c 1 -w 30 172.17.0.1");
        });
    }

    fn life(&self, checks: &mut Checks) {
        checks.check("pause and unpause; top; stats", || {
            self.post("/containers/web/pause", &json!({}));
            assert_eq!(self.inspect("web")["State"]["Paused"], true);
            self.post("/containers/web/unpause", &json!({}));
            let stats = "/containers/web/stats?stream=false&one-shot=1";
            let stats = self.docker.json("GET", stats, None).unwrap();
            let memory = stats["memory_stats"]["limit"].as_u64();
            println!(
                "stats: cpu {} memory {}",
                stats["cpu_stats"]["cpu_usage"]["total_usage"], stats["memory_stats"]
            );
            assert!(
                stats["cpu_stats"]["cpu_usage"]["total_usage"].as_u64() > Some(0),
                "{stats}"
            );
            assert!(memory > Some(0), "{stats}");
        });
        checks.check(
            "docker restart: again on its network, its files kept",
            || {
                self.post("/containers/web/restart?t=1", &json!({}));
                assert_eq!(get(HOST_PORT), "this is web");
                assert_eq!(self.exec("web", "cat /kept/file"), "kept\n");
                assert_eq!(self.inspect("web")["RestartCount"], 0);
            },
        );
        checks.check("docker stop and start; kill, and its exit code", || {
            self.post("/containers/web/stop?t=1", &json!({}));
            assert_eq!(self.inspect("web")["State"]["ExitCode"], 137);
            self.post("/containers/web/start", &json!({}));
            self.exec("web", "ping -c 1 -w 30 172.17.0.1");
            self.post("/containers/web/kill?signal=KILL", &json!({}));
            let ended = self
                .docker
                .json("POST", "/containers/web/wait", None)
                .unwrap();
            assert_eq!(ended["StatusCode"], 137);
        });
    }

    fn refused(&self, checks: &mut Checks) {
        checks.check("--network host is refused, and says why", || {
            let host = shell("true", json!({ "NetworkMode": "host" }));
            let error = self.docker.run("host", &host).unwrap_err().to_string();
            assert!(error.contains("a network, of its own"), "{error}");
            self.docker
                .call("DELETE", "/containers/host?force=1", None)
                .unwrap();
        });
        checks.check("--network container:OTHER is refused, and says why", || {
            self.post("/containers/web/start", &json!({}));
            let shared = shell("true", json!({ "NetworkMode": "container:web" }));
            let error = self.docker.run("named", &shared).unwrap_err().to_string();
            assert!(error.contains("two can't share one"), "{error}");
            self.exec("web", "ping -c 1 -w 30 172.17.0.1");
        });
    }

    fn others(&self, checks: &mut Checks) {
        checks.check("--network none: the loopback alone", || {
            let script = "ls /sys/class/net; ping -c 1 -w 30 127.0.0.1 >/dev/null; exit 7";
            self.start("none", &shell(script, json!({ "NetworkMode": "none" })));
            let ended = self
                .docker
                .json("POST", "/containers/none/wait", None)
                .unwrap();
            assert_eq!(ended["StatusCode"], 7);
            assert_eq!(self.docker.logs("none").unwrap(), "lo\n");
        });
        checks.check("two networks from the start", || {
            let script = "ip -o -4 address; exec sleep 100000";
            let mut both = shell(script, json!({ "NetworkMode": "mine" }));
            both["NetworkingConfig"] = json!({ "EndpointsConfig": { "mine": {}, "bridge": {} } });
            self.start("both", &both);
            let seen = self.exec("both", "ip -o -4 address");
            let inspected = self.inspect("both");
            for network in ["mine", "bridge"] {
                let ip = address(&inspected, network);
                assert!(seen.contains(&format!("inet {ip}/16")), "{ip}: {seen}");
            }
        });
        checks.check("--runtime by its full name", || {
            let mut named = shell("echo hello", json!({}));
            named["HostConfig"]["Runtime"] = RUNTIME.into();
            self.start("named", &named);
            let ended = self
                .docker
                .json("POST", "/containers/named/wait", None)
                .unwrap();
            assert_eq!(ended["StatusCode"], 0);
            assert_eq!(self.docker.logs("named").unwrap(), "hello\n");
        });
    }
}

#[track_caller]
fn address(inspected: &Value, network: &str) -> String {
    let address = &inspected["NetworkSettings"]["Networks"][network]["IPAddress"];
    address.as_str().unwrap().to_owned()
}

/// What a web server on this host's port says, once it's there.
#[track_caller]
fn get(port: u16) -> String {
    let end = Instant::now() + PATIENCE;
    loop {
        let mut answer = String::new();
        let got = TcpStream::connect(("127.0.0.1", port)).and_then(|mut stream| {
            stream.set_read_timeout(Some(Duration::from_secs(20)))?;
            stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
            stream.read_to_string(&mut answer)
        });
        if let (Ok(_), Some((head, body))) = (&got, answer.split_once("\r\n\r\n")) {
            assert!(head.contains(" 200 "), "{head}");
            return body.trim_end().to_owned();
        }
        assert!(Instant::now() < end, "{got:?}: {answer:?}");
        std::thread::sleep(Duration::from_millis(300));
    }
}
