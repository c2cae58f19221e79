//! The network of pods, made by real CNI plugins in a network namespace of the test's own: a bridge
//! with both families and port mapping, and a macvlan interface beside it.

mod forward;
pub mod hostile;
pub mod kinds;
mod lone;
pub mod rates;
mod servers;

use super::client::Client;
use super::{IGNORED, Pod, own_network, pod_config, shell_container};
use bulkhead_tests::Artifacts;
use bulkhead_tests::cgroups::Cgroup;
use bulkhead_tests::containerd::{Containerd, Release};
use bulkhead_tests::leaks::{Snapshot, processes_of};
use bulkhead_tests::runner::Checks;
use k8s_cri::v1::{DnsConfig, NamespaceMode, PortMapping};
use nix::unistd::Pid;
use serde_json::Value;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::process::Command;
use std::time::{Duration, Instant};

/// The bridge in the test's namespace.
const HOST: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 88, 0, 1));
/// The other end of the link on which the macvlan interfaces are.
const SECOND_HOST: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 89, 0, 1));
/// Where the first pod's server is, on all addresses, and where another is on its loopback.
const PORT: u16 = 8080;
const LOOPBACK_PORT: u16 = 9090;
/// Where the first one is to be found on the host.
const HOST_PORT: u16 = 18080;

const NETWORKS: [(&str, &str); 2] = [
    (
        "10-bridge.conflist",
        r#"{ "cniVersion": "0.4.0", "name": "pods", "plugins": [
    { "type": "bridge", "bridge": "pods0", "isGateway": true, "mtu": 1400,
      "ipam": { "type": "host-local", "dataDir": "@DIR@/ipam",
                "ranges": [[{ "subnet": "10.88.0.0/24" }], [{ "subnet": "fd00:88::/64" }]],
                "routes": [{ "dst": "0.0.0.0/0" }, { "dst": "::/0" }] } },
    { "type": "portmap", "capabilities": { "portMappings": true } } ] }
"#,
    ),
    (
        "20-macvlan.conflist",
        r#"{ "cniVersion": "0.4.0", "name": "second", "plugins": [
    { "type": "macvlan", "master": "second0",
      "ipam": { "type": "host-local", "dataDir": "@DIR@/ipam",
                "ranges": [[{ "subnet": "10.89.0.0/24", "rangeStart": "10.89.0.10" }]] } } ] }
"#,
    ),
];

pub fn debian(checks: &mut Checks, artifacts: &Artifacts) {
    through(checks, artifacts, &Release::debian());
}

pub fn current(checks: &mut Checks, artifacts: &Artifacts) {
    match Release::current() {
        Some(release) => through(checks, artifacts, &release),
        None => checks.check("found", || panic!("the current containerd has gone")),
    }
}

/// A pod with one container, whose servers are up.
struct Served<'a> {
    pod: Pod<'a>,
    container: String,
    vmm: Pid,
    /// Of eth0.
    ip: IpAddr,
    ip6: IpAddr,
    /// Of eth1.
    second: IpAddr,
}

fn through(checks: &mut Checks, artifacts: &Artifacts, release: &Release) {
    let name = format!(
        "containerd {} with two networks",
        release.version().unwrap()
    );
    let Some((containerd, client)) = checks.require(&name, || {
        own_network();
        ip("link add second0 type veth peer name second1");
        ip("address add 10.89.0.1/24 dev second1");
        ip("link set second0 up");
        ip("link set second1 up");
        lone::prepare();
        let settings = "memory_mib = 160\n";
        let containerd =
            Containerd::start_with_networks(artifacts, release, settings, &NETWORKS).unwrap();
        let client = Client::with_images(&containerd);
        (containerd, client)
    }) else {
        return;
    };
    let pods = Cgroup::make("pods").unwrap();
    let before = Snapshot::take(&IGNORED);
    let first = checks.require("a pod with a server", || {
        serve(&containerd, &client, &pods, "web")
    });
    if let Some(first) = first {
        one_pod(checks, &first);
        let second = checks.require("a second pod", || {
            serve(&containerd, &client, &pods, "other")
        });
        if let Some(second) = second {
            two_pods(checks, &first, &second);
            followed(checks, &second);
            killed(checks, second);
        }
        first.pod.removed(checks);
    }
    refused(checks, &containerd, &client, &pods);
    lone::run(checks, &containerd);
    drop(client);
    checks.check("nothing is left, and no interface of a pod's", || {
        before.assert_nothing_added(&IGNORED);
        let left = ip("-j link show type veth");
        let left: Value = serde_json::from_str(&left).unwrap();
        let names: Vec<_> = left.as_array().unwrap().iter().collect();
        let names: Vec<_> = names
            .iter()
            .filter_map(|one| one["ifname"].as_str())
            .collect();
        assert!(
            names.iter().all(|name| name.starts_with("second")),
            "{names:?}"
        );
    });
    drop((pods, containerd));
    lone::clean_up();
}

/// Runs `ip` in the test's namespace.
#[track_caller]
fn ip(words: &str) -> String {
    run(Command::new("ip").args(words.split(' ')))
}

/// Runs a program of the host's in the namespace of a pod's.
#[track_caller]
fn inside(vmm: Pid, words: &str) -> String {
    let netns = format!("--net=/proc/{vmm}/ns/net");
    run(Command::new("nsenter").arg(netns).args(words.split(' ')))
}

#[track_caller]
fn run(command: &mut Command) -> String {
    let done = command.output().unwrap();
    let errors = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "{command:?}: {errors}");
    String::from_utf8(done.stdout).unwrap()
}

fn serve<'a>(containerd: &Containerd, client: &'a Client, pods: &Cgroup, name: &str) -> Served<'a> {
    let known = processes_of("bulkhead-vmm");
    let mut config = pod_config(containerd, pods, name);
    config.dns_config = Some(DnsConfig {
        servers: vec![HOST.to_string()],
        searches: vec!["pods.test".into()],
        options: Vec::new(),
    });
    if name == "web" {
        config.port_mappings = vec![PortMapping {
            container_port: PORT.into(),
            host_port: HOST_PORT.into(),
            ..Default::default()
        }];
    }
    let id = client.run_pod(&config);
    let id = id.unwrap_or_else(|error| panic!("{error}: {}", containerd.log_tail(12)));
    let pod = Pod { client, config, id };
    let script = format!(
        "mkdir /www; echo 'this is {name}</end>' >/www/index.html; httpd -p {PORT} -h /www; \
         httpd -p 127.0.0.1:{LOOPBACK_PORT} -h /www; echo ready; exec sleep 100000"
    );
    let container = pod.run(containerd, shell_container(name, &script));
    pod.log(name, 1);
    let vmm = processes_of("bulkhead-vmm")
        .into_iter()
        .find(|vmm| !known.contains(vmm));
    let vmm = vmm.unwrap();
    let addresses = interfaces(vmm);
    let of = |name: &str, prefix: &str| {
        let found = addresses.iter().filter(|one| one.name == name);
        let mut found = found.flat_map(|one| &one.addresses);
        let found = found.find(|ip| ip.starts_with(prefix)).unwrap();
        found.split('/').next().unwrap().parse().unwrap()
    };
    Served {
        ip: of("eth0", "10.88.0."),
        ip6: of("eth0", "fd00:88::"),
        second: of("eth1", "10.89.0."),
        pod,
        container,
        vmm,
    }
}

/// An interface in a pod's namespace.
struct Interface {
    name: String,
    mac: String,
    mtu: u64,
    /// With their prefixes' lengths.
    addresses: Vec<String>,
}

fn interfaces(vmm: Pid) -> Vec<Interface> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let all: Value = serde_json::from_str(&inside(vmm, "ip -j address show")).unwrap();
    let ethernet =
        all.as_array().unwrap().iter().filter(|one| {
            one["link_type"] == "ether" && !text(&one["ifname"]).starts_with("bulkhead")
        });
    let interfaces = ethernet.map(|one| {
        let addresses = one["addr_info"].as_array().unwrap().iter();
        let addresses = addresses.map(|ip| format!("{}/{}", text(&ip["local"]), ip["prefixlen"]));
        Interface {
            name: text(&one["ifname"]),
            mac: text(&one["address"]),
            mtu: one["mtu"].as_u64().unwrap(),
            addresses: addresses.collect(),
        }
    });
    interfaces.collect()
}

fn one_pod(checks: &mut Checks, web: &Served) {
    let client = web.pod.client;
    let shell = |script: &str| client.shell(&web.container, script);
    checks.check(
        "interfaces and routes are those of the pod's namespace",
        || {
            let wanted = interfaces(web.vmm);
            assert_eq!(wanted.len(), 2);
            for one in &wanted {
                let name = &one.name;
                let seen = shell(&format!("cd /sys/class/net/{name}; cat address mtu"));
                assert_eq!(seen, format!("{}\n{}", one.mac, one.mtu));
                let seen = shell(&format!("ip -o address show dev {name}"));
                for address in &one.addresses {
                    assert!(seen.contains(&format!(" {address} ")), "{address}: {seen}");
                }
            }
            let routes = shell("ip route; ip -6 route");
            for wanted in [
                "default via 10.88.0.1 dev eth0",
                "10.88.0.0/24 dev eth0",
                "10.89.0.0/24 dev eth1",
                "default via fd00:88::1 dev eth0",
            ] {
                assert!(routes.contains(wanted), "{wanted}: {routes}");
            }
            assert!(shell("ping -c 1 -w 30 127.0.0.1").contains(" 0% packet loss"));
        },
    );
    checks.check(
        "host to pod: ping and TCP, by both interfaces and IPv6",
        || {
            for ip in [web.ip, web.second, web.ip6] {
                let ip = ip.to_string();
                run(Command::new("/bin/busybox").args(["ping", "-c", "1", "-w", "30", &ip]));
            }
            for ip in [web.ip, web.second, web.ip6] {
                let page = servers::get(SocketAddr::new(ip, PORT));
                assert_eq!(page, "this is web</end>");
            }
        },
    );
    checks.check(
        "pod to host: a hundred KiB there and back, unchanged",
        || {
            for host in [HOST, SECOND_HOST] {
                let server = servers::echo(host);
                let (ip, port) = (server.ip(), server.port());
                // Every byte comes back one higher.
                let sums = shell(&format!(
                    "seq 1 20000 >/tmp/sent; nc {ip} {port} </tmp/sent >/tmp/got; \
                 tr '\\n0-9' '\\v1-9:' </tmp/sent | sha256sum; sha256sum </tmp/got; \
                 wc -c </tmp/got"
                ));
                let [sent, got, length] = sums.lines().collect::<Vec<_>>()[..] else {
                    panic!("{sums}");
                };
                assert_eq!(sent, got);
                assert_eq!(length, "108894");
            }
        },
    );
    checks.check("DNS by the pod's resolv.conf", || {
        servers::names(HOST, "db.pods.test", Ipv4Addr::new(10, 88, 0, 77));
        let found = shell("nslookup db.pods.test");
        assert!(found.contains("10.88.0.77"), "{found}");
        let resolver = shell("cat /etc/resolv.conf");
        assert!(resolver.contains("nameserver 10.88.0.1"), "{resolver}");
    });
    checks.check("a port of the host's is mapped to the pod's", || {
        let page = servers::get(SocketAddr::new(HOST, HOST_PORT));
        assert_eq!(page, "this is web</end>");
    });
    checks.check("PortForward reaches a server on the pod's loopback", || {
        let request = b"GET / HTTP/1.0\r\n\r\n";
        for port in [LOOPBACK_PORT, PORT, LOOPBACK_PORT] {
            let url = client.port_forward(&web.pod.id, port).unwrap();
            let answer = forward::exchange(&url, port, request).unwrap();
            assert!(answer.ends_with("this is web</end>\n"), "{answer:?}");
        }
        let from_outside = TcpStream::connect((web.ip, LOOPBACK_PORT));
        assert!(from_outside.is_err(), "it is on the loopback only");
    });
}

fn two_pods(checks: &mut Checks, first: &Served, second: &Served) {
    checks.check("pod to pod, by each network and family", || {
        let client = second.pod.client;
        for ip in [first.ip, first.second] {
            let script = format!("ping -c 1 -w 30 {ip} && wget -qO- http://{ip}:{PORT}/");
            let seen = client.shell(&second.container, &script);
            assert!(seen.ends_with("this is web</end>"), "{seen}");
        }
        let script = format!("wget -qO- 'http://[{}]:{PORT}/'", first.ip6);
        let seen = client.shell(&second.container, &script);
        assert_eq!(seen, "this is web</end>");
    });
}

/// Waits until `script` succeeds in the container.
#[track_caller]
fn until(served: &Served, script: &str) {
    let end = Instant::now() + Duration::from_secs(60);
    loop {
        let answer = served
            .pod
            .client
            .exec(&served.container, &["sh", "-c", script]);
        let answer = answer.unwrap();
        if answer.exit_code == 0 {
            return;
        }
        let all = served
            .pod
            .client
            .shell(&served.container, "ip address; ip route");
        assert!(Instant::now() < end, "{script}: {all}");
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// Runs the CNI plugin `sbr` for an interface that is there already.
#[track_caller]
fn sbr(vmm: Pid, command: &str) {
    let netns = format!("/proc/{vmm}/ns/net");
    let config = serde_json::json!({
        "cniVersion": "0.4.0", "name": "late", "type": "sbr",
        "prevResult": {
            "cniVersion": "0.4.0", "interfaces": [{ "name": "late0", "sandbox": netns }],
            "ips": [{ "version": "4", "address": "10.77.0.2/24", "gateway": "10.77.0.1",
                      "interface": 0 }],
        },
    });
    let (read, mut write) = std::io::pipe().unwrap();
    // Less than a pipe holds.
    std::io::Write::write_all(&mut write, config.to_string().as_bytes()).unwrap();
    drop(write);
    let mut plugin = Command::new("/usr/lib/cni/sbr");
    plugin.stdin(read);
    plugin.envs([
        ("CNI_COMMAND", command),
        ("CNI_CONTAINERID", "late"),
        ("CNI_NETNS", &netns),
        ("CNI_IFNAME", "late0"),
        ("CNI_PATH", "/usr/lib/cni"),
    ]);
    run(&mut plugin);
}

fn followed(checks: &mut Checks, served: &Served) {
    let vmm = served.vmm;
    checks.check("an interface that comes later, changes and goes", || {
        ip("link add late1 type veth peer name late0");
        ip("address add 10.77.0.1/24 dev late1");
        ip("link set late1 up");
        ip(&format!("link set late0 netns {vmm}"));
        inside(vmm, "ip link set late0 mtu 1300");
        inside(vmm, "ip address add 10.77.0.2/24 dev late0");
        inside(vmm, "ip link set late0 up");
        until(
            served,
            "ip -o address show dev late0 | grep -q 10.77.0.2/24",
        );
        until(served, "ping -c 1 -w 10 10.77.0.1");
        inside(vmm, "ip address add 10.77.0.3/24 dev late0");
        inside(vmm, "ip route add 192.0.2.0/24 via 10.77.0.1");
        until(
            served,
            "ip -o address show dev late0 | grep -q 10.77.0.3/24 && \
             ip route | grep -q '192.0.2.0/24 via 10.77.0.1 dev late0'",
        );
        // The plugin moves the routes to a table that its rule leads to.
        sbr(vmm, "ADD");
        until(
            served,
            "ip route get 198.18.0.1 from 10.77.0.2 | grep -q 'via 10.77.0.1 dev late0' && \
             ! ip route | grep 192.0.2.0/24",
        );
        sbr(vmm, "DEL");
        until(served, "! ip rule | grep 10.77.0.2");
        ip("link delete late1");
        until(served, "! ip link show dev late0");
        let left = inside(vmm, "ip link show");
        assert_eq!(left.matches("bulkhead").count(), 2, "{left}");
    });
}

/// A VMM that dies leaves the pod's namespace as CNI made it.
fn killed(checks: &mut Checks, served: Served) {
    checks.check("a killed VMM leaves no tap and no redirection", || {
        let netns = std::fs::File::open(format!("/proc/{}/ns/net", served.vmm)).unwrap();
        let number = std::os::fd::AsRawFd::as_raw_fd(&netns);
        let path = format!("--net=/proc/{}/fd/{number}", std::process::id());
        let look = || {
            let inside =
                |words: &str| run(Command::new("nsenter").arg(&path).args(words.split(' ')));
            (inside("ip link show"), inside("tc qdisc show"))
        };
        let (links, qdiscs) = look();
        assert_eq!(links.matches("bulkhead").count(), 2, "{links}");
        assert!(qdiscs.contains("ingress"), "{qdiscs}");
        nix::sys::signal::kill(served.vmm, nix::sys::signal::Signal::SIGKILL).unwrap();
        let end = Instant::now() + Duration::from_secs(30);
        loop {
            let (links, qdiscs) = look();
            if !links.contains("bulkhead") && !qdiscs.contains("ingress") {
                assert!(links.contains("eth0") && links.contains("eth1"), "{links}");
                break;
            }
            assert!(Instant::now() < end, "{links}\n{qdiscs}");
            std::thread::sleep(Duration::from_millis(100));
        }
    });
    checks.check("and its pod can be removed", || {
        // containerd learns of the containers' ends one by one; kubelet asks until it is done.
        let (client, id) = (served.pod.client, &served.pod.id);
        let end = Instant::now() + Duration::from_secs(60);
        while let Err(error) = client.stop_pod(id).and_then(|()| client.remove_pod(id)) {
            assert!(Instant::now() < end, "{error}");
            std::thread::sleep(Duration::from_millis(500));
        }
    });
}

fn refused(checks: &mut Checks, containerd: &Containerd, client: &Client, pods: &Cgroup) {
    checks.check("the host's network is refused, and says why", || {
        let mut config = pod_config(containerd, pods, "host");
        let linux = config.linux.get_or_insert_default();
        let security = linux.security_context.get_or_insert_default();
        let namespaces = security.namespace_options.get_or_insert_default();
        namespaces.network = NamespaceMode::Node.into();
        let error = client.run_pod(&config).unwrap_err().to_string();
        assert!(error.contains("a network, of its own"), "{error}");
        assert!(processes_of("bulkhead-vmm").is_empty());
    });
}
