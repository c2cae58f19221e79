//! What the frames of one pod's go through: several queues where the pod has several vCPUs, with
//! segmentation and checksums left to the other side; and an ipvlan interface, whose MAC is its
//! master's.

use super::super::client::Client;
use super::super::{IGNORED, Pod, own_network, pod_config, shell_container};
use super::hostile::mac;
use super::{NETWORKS, interfaces, ip, run as run_program, servers};
use bulkhead_tests::Artifacts;
use bulkhead_tests::cgroups::Cgroup;
use bulkhead_tests::containerd::{Containerd, Release};
use bulkhead_tests::leaks::{Snapshot, processes_of};
use bulkhead_tests::packets::Capture;
use bulkhead_tests::runner::Checks;
use bulkhead_tests::tap::vhosts_of;
use nix::unistd::Pid;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::process::Command;

const IPVLAN: (&str, &str) = (
    "10-ipvlan.conflist",
    r#"{ "cniVersion": "0.4.0", "name": "shared", "plugins": [
    { "type": "ipvlan", "master": "second0",
      "ipam": { "type": "host-local", "dataDir": "@DIR@/ipam",
                "ranges": [[{ "subnet": "10.89.0.0/24", "rangeStart": "10.89.0.10" }]] } } ] }
"#,
);
/// Bytes there and back.
const BYTES: usize = 200_000;
/// Of the bridge's network; a frame has a header more.
const MTU: usize = 1400;
const HEADER: usize = 14;

struct Member<'a> {
    pod: Pod<'a>,
    container: String,
    vmm: Pid,
    mac: [u8; 6],
    ip: IpAddr,
}

/// A containerd with one network, and pods on it.
struct Host {
    containerd: Containerd,
    client: Client,
    pods: Cgroup,
}

impl Host {
    fn start(artifacts: &Artifacts, network: (&str, &str)) -> Self {
        let containerd = Containerd::start_with_networks(
            artifacts,
            &Release::debian(),
            "memory_mib = 160\n",
            &[network],
        );
        let containerd = containerd.unwrap();
        let client = Client::with_images(&containerd);
        Self {
            client,
            pods: Cgroup::make("pods").unwrap(),
            containerd,
        }
    }

    #[track_caller]
    fn member(&self, name: &str, vcpus: u32, prefix: &str) -> Member<'_> {
        let known = processes_of("bulkhead-vmm");
        let mut config = pod_config(&self.containerd, &self.pods, name);
        let linux = config.linux.get_or_insert_default();
        let resources = linux.resources.get_or_insert_default();
        (resources.cpu_period, resources.cpu_quota) = (100_000, i64::from(vcpus) * 100_000);
        let id = self.client.run_pod(&config);
        let id = id.unwrap_or_else(|error| panic!("{error}: {}", self.containerd.log_tail(12)));
        let pod = Pod {
            client: &self.client,
            config,
            id,
        };
        let container = shell_container(name, "exec sleep 100000");
        let container = pod.run(&self.containerd, container);
        let vmm = processes_of("bulkhead-vmm")
            .into_iter()
            .find(|vmm| !known.contains(vmm));
        let vmm = vmm.unwrap();
        let all = interfaces(vmm);
        let mut addresses = all.iter().flat_map(|one| &one.addresses);
        let address = addresses.find(|ip| ip.starts_with(prefix)).unwrap();
        Member {
            mac: mac(&all[0].mac),
            pod,
            container,
            vmm,
            ip: address.split('/').next().unwrap().parse().unwrap(),
        }
    }

    fn remove(&self, member: &Member) {
        self.client.stop_pod(&member.pod.id).unwrap();
        self.client.remove_pod(&member.pod.id).unwrap();
    }

    fn shell(&self, member: &Member, script: &str) -> String {
        self.client.shell(&member.container, script)
    }
}

pub fn queues(checks: &mut Checks, artifacts: &Artifacts) {
    let Some(host) = checks.require("containerd with a bridge", || {
        own_network();
        Host::start(artifacts, NETWORKS[0])
    }) else {
        return;
    };
    let before = Snapshot::take(&IGNORED);
    for vcpus in [1, 2] {
        let name = format!("{vcpus} vCPUs: as many queues, and frames beyond the MTU");
        checks.check(&name, || {
            let member = host.member(&format!("cpus{vcpus}"), vcpus, "10.88.0.");
            let queues = host.shell(&member, "ls /sys/class/net/eth0/queues");
            for kind in ["rx", "tx"] {
                let found = queues.lines().filter(|one| one.starts_with(kind)).count();
                assert_eq!(found, vcpus as usize, "{queues}");
            }
            segmentation(&host, &member);
            let on = match vhosts_of(member.vmm.as_raw().cast_unsigned()) {
                0 => "the VMM",
                _ => "vhost-net",
            };
            println!("{vcpus} vCPUs: frames moved by {on}");
            let has = std::path::Path::new("/dev/vhost-net").exists();
            assert_eq!(
                vhosts_of(member.vmm.as_raw().cast_unsigned()),
                if has { vcpus as usize } else { 0 }
            );
            host.remove(&member);
        });
    }
    checks.check("with vhost = false the VMM moves the frames", || {
        let settings = "memory_mib = 160\n[network]\nvhost = false\n";
        host.containerd.configure_shims(settings).unwrap();
        let member = host.member("inside", 1, "10.88.0.");
        assert_eq!(vhosts_of(member.vmm.as_raw().cast_unsigned()), 0);
        let ip = member.ip.to_string();
        run_program(Command::new("/bin/busybox").args(["ping", "-c", "1", "-w", "60", &ip]));
        host.remove(&member);
    });
    checks.check("nothing is left", || before.assert_nothing_added(&IGNORED));
}

/// Bytes each way, in frames that are longer than the link's.
fn segmentation(host: &Host, member: &Member) {
    let serve = format!("mkdir /www; head -c {BYTES} /dev/zero >/www/big; httpd -p 80 -h /www");
    host.shell(member, &serve);
    let mut capture = Capture::start().unwrap();
    let page = servers::get_path(SocketAddr::new(member.ip, 80), "/big");
    assert_eq!(page.len(), BYTES);
    let longest = capture.longest(member.mac);
    println!("from the guest: the longest frame has {longest} bytes");
    assert!(longest > MTU + HEADER, "{longest}");

    let server = servers::say(IpAddr::V4(Ipv4Addr::new(10, 88, 0, 1)), BYTES);
    let (ip, port) = (server.ip(), server.port());
    let script = format!(
        "cd /sys/class/net/eth0/statistics; look() {{ cat rx_bytes rx_packets; }}; \
         look; nc {ip} {port} </dev/null | wc -c; look"
    );
    let seen = host.shell(member, &script);
    let numbers: Vec<usize> = seen
        .lines()
        .map(|line| line.trim().parse().unwrap())
        .collect();
    let &[bytes, frames, read, bytes_after, frames_after] = &numbers[..] else {
        panic!("{seen}");
    };
    assert_eq!(read, BYTES);
    let mean = (bytes_after - bytes) / (frames_after - frames);
    println!("to the guest: frames have {mean} bytes in the mean");
    assert!(mean > MTU + HEADER, "{seen}");
}

pub fn ipvlan(checks: &mut Checks, artifacts: &Artifacts) {
    let Some(host) = checks.require("containerd with ipvlan", || {
        own_network();
        ip("link add second0 type veth peer name second1");
        ip("address add 10.89.0.1/24 dev second1");
        ip("link set second0 up");
        ip("link set second1 up");
        Host::start(artifacts, IPVLAN)
    }) else {
        return;
    };
    let before = Snapshot::take(&IGNORED);
    let members = checks.require("two pods with the same MAC", || {
        let members = ["one", "two"].map(|name| host.member(name, 1, "10.89.0."));
        let macs = members.each_ref().map(|member| {
            let look = "cat /sys/class/net/eth0/address";
            host.shell(member, look)
        });
        assert_eq!(macs[0], macs[1]);
        assert!(ip("link show second0").contains(&macs[0]));
        members
    });
    if let Some([one, two]) = members {
        checks.check("host to pod, pod to host, and pod to pod", || {
            for member in [&one, &two] {
                let ip = member.ip.to_string();
                run_program(
                    Command::new("/bin/busybox").args(["ping", "-c", "1", "-w", "60", &ip]),
                );
            }
            let (ip, port) = {
                let server = servers::echo(IpAddr::V4(Ipv4Addr::new(10, 89, 0, 1)));
                (server.ip(), server.port())
            };
            let echoed = host.shell(&one, &format!("echo abc | nc {ip} {port}"));
            assert_eq!(echoed, "bcd\u{b}".trim_end());
            host.shell(&one, &format!("ping -c 1 -w 60 {}", two.ip));
            host.shell(&two, &format!("ping -c 1 -w 60 {}", one.ip));
        });
        for member in [one, two] {
            host.remove(&member);
        }
    }
    checks.check("nothing is left", || before.assert_nothing_added(&IGNORED));
}
