//! A container that may send raw frames takes the part of another pod. What comes out is caught
//! where the pods' bridge is.

use super::super::client::Client;
use super::super::{IGNORED, Pod, own_network, pod_config, security, shell_container};
use super::{NETWORKS, interfaces, ip, run as run_program};
use bulkhead_tests::Artifacts;
use bulkhead_tests::cgroups::Cgroup;
use bulkhead_tests::containerd::{Containerd, Release};
use bulkhead_tests::leaks::{Snapshot, processes_of};
use bulkhead_tests::packets::{Capture, checksum};
use bulkhead_tests::runner::Checks;
use k8s_cri::v1::{Capability, Mount};
use nix::unistd::Pid;
use std::fs::File;
use std::io::Write;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

/// The program that sends, run in a container.
const PROGRAM: &str = env!("CARGO_BIN_EXE_raw-frames");
const LOADER: &str = "ld-linux-x86-64.so.2";
/// Until the last of some frames has come out.
const PATIENCE: Duration = Duration::from_secs(60);
const HOST: [u8; 4] = [10, 88, 0, 1];
const ANNOTATION: &str = "io.bulkhead.network.source_addresses";
/// virtio-net's, in front of each frame that goes through a tap.
const HEADER: usize = 12;

type Mac = [u8; 6];

/// A pod, and who it is on the bridge.
struct Member<'a> {
    pod: Pod<'a>,
    container: String,
    vmm: Pid,
    mac: Mac,
    ip: Ipv4Addr,
    ip6: Ipv6Addr,
}

/// A frame that a pod sends.
struct Case {
    name: &'static str,
    frame: Vec<u8>,
    /// Whether it comes out where pods send from their own addresses, and where from any.
    own: bool,
    any: bool,
}

pub fn run(checks: &mut Checks, artifacts: &Artifacts) {
    let settings =
        |sources| format!("memory_mib = 160\n[network]\nsource_addresses = \"{sources}\"\n");
    let started = checks.require("containerd with a bridge", || {
        own_network();
        let containerd = Containerd::start_with_networks(
            artifacts,
            &Release::debian(),
            &settings("annotated"),
            &NETWORKS[..1],
        );
        let containerd = containerd.unwrap();
        install(&containerd.folder().join("tools"));
        let client = Client::with_images(&containerd);
        (containerd, client)
    });
    let Some((containerd, client)) = started else {
        return;
    };
    let pods = Cgroup::make("pods").unwrap();
    let before = Snapshot::take(&IGNORED);
    let host = Host {
        containerd: &containerd,
        client: &client,
        pods: &pods,
    };
    let members = checks.require("three pods", || {
        let victim = host.member("victim", &[]);
        let attacker = host.member("attacker", &[]);
        let router = host.member("router", &[(ANNOTATION, "any")]);
        (victim, attacker, router)
    });
    if let Some((victim, attacker, router)) = members {
        host.attack(checks, &attacker, &victim, false);
        host.attack(checks, &router, &victim, true);
        broken_vmm(checks, &attacker, &victim);
        for member in [victim, attacker, router] {
            client.stop_pod(&member.pod.id).unwrap();
            client.remove_pod(&member.pod.id).unwrap();
        }
    }
    checks.check("a pod can't allow itself what the host doesn't", || {
        containerd.configure_shims(&settings("own")).unwrap();
        let error = host.config_of("greedy", &[(ANNOTATION, "any")]);
        let error = client.run_pod(&error).unwrap_err().to_string();
        assert!(error.contains(ANNOTATION), "{error}");
        assert!(error.contains("source_addresses = "), "{error}");
        assert!(processes_of("bulkhead-vmm").is_empty());
    });
    drop(client);
    checks.check("nothing is left", || before.assert_nothing_added(&IGNORED));
}

/// Puts the program and what it is linked with into a folder.
fn install(folder: &Path) {
    std::fs::create_dir(folder).unwrap();
    std::fs::copy(PROGRAM, folder.join("raw-frames")).unwrap();
    let libraries = run_program(Command::new("ldd").arg(PROGRAM));
    for library in libraries
        .split_whitespace()
        .filter(|word| word.starts_with('/'))
    {
        let name = Path::new(library).file_name().unwrap();
        std::fs::copy(library, folder.join(name)).unwrap();
    }
    assert!(folder.join(LOADER).exists(), "{libraries}");
}

struct Host<'a> {
    containerd: &'a Containerd,
    client: &'a Client,
    pods: &'a Cgroup,
}

impl<'a> Host<'a> {
    fn config_of(&self, name: &str, annotations: &[(&str, &str)]) -> k8s_cri::v1::PodSandboxConfig {
        let mut config = pod_config(self.containerd, self.pods, name);
        config.annotations = (annotations.iter())
            .map(|(name, value)| ((*name).into(), (*value).into()))
            .collect();
        config
    }

    #[track_caller]
    fn member(&self, name: &str, annotations: &[(&str, &str)]) -> Member<'a> {
        let known = processes_of("bulkhead-vmm");
        let config = self.config_of(name, annotations);
        let id = self.client.run_pod(&config);
        let id = id.unwrap_or_else(|error| panic!("{error}: {}", self.containerd.log_tail(12)));
        let pod = Pod {
            client: self.client,
            config,
            id,
        };
        let mut container = shell_container(name, "exec sleep 100000");
        container.mounts = vec![Mount {
            container_path: "/tools".into(),
            host_path: self.containerd.folder().join("tools").display().to_string(),
            readonly: true,
            ..Default::default()
        }];
        security(&mut container).capabilities = Some(Capability {
            add_capabilities: vec!["NET_RAW".into(), "NET_ADMIN".into()],
            ..Default::default()
        });
        let container = pod.run(self.containerd, container);
        let vmm = processes_of("bulkhead-vmm")
            .into_iter()
            .find(|vmm| !known.contains(vmm));
        let vmm = vmm.unwrap();
        let eth0 = interfaces(vmm).into_iter().find(|one| one.name == "eth0");
        let eth0 = eth0.unwrap();
        let of = |prefix: &str| {
            let found = eth0.addresses.iter().find(|ip| ip.starts_with(prefix));
            found.unwrap().split('/').next().unwrap().to_owned()
        };
        Member {
            pod,
            container,
            vmm,
            mac: mac(&eth0.mac),
            ip: of("10.88.0.").parse().unwrap(),
            ip6: of("fd00:88::").parse().unwrap(),
        }
    }

    fn attack(&self, checks: &mut Checks, attacker: &Member, victim: &Member, any: bool) {
        let who = if any { "any address" } else { "its own" };
        let name = format!("only what a pod may send comes out: from {who}");
        checks.check(&name, || {
            let cases = cases(attacker, victim);
            let last = udp(attacker.mac, attacker.ip, if any { 9998 } else { 9999 });
            let mut capture = Capture::start().unwrap();
            let hex = |frame: &Vec<u8>| -> String {
                frame.iter().map(|byte| format!("{byte:02x}")).collect()
            };
            let mut sent: Vec<String> = cases.iter().map(|case| hex(&case.frame)).collect();
            sent.push(hex(&last));
            let words = format!(
                "/tools/{LOADER} --library-path /tools /tools/raw-frames eth0 {}",
                sent.join(" ")
            );
            self.client.shell(&attacker.container, &words);
            let frames: Vec<&[u8]> = cases.iter().map(|case| &case.frame[..]).collect();
            let seen = capture.until(&last, &frames, PATIENCE);
            for (case, seen) in cases.iter().zip(seen) {
                let wanted = if any { case.any } else { case.own };
                assert_eq!(seen, wanted, "{}", case.name);
            }
        });
        if any {
            return;
        }
        checks.check("whoever talks to the other pod still does", || {
            let victim = victim.ip.to_string();
            let known = ip(&format!("neighbour show {victim}"));
            assert!(!known.contains(&text(attacker.mac)), "{known}");
            let ping = ["ping", "-c", "1", "-w", "30", &victim];
            run_program(Command::new("/bin/busybox").args(ping));
            let script = format!("ping -c 1 -w 30 {victim}");
            self.client.shell(&attacker.container, &script);
        });
        checks.check(
            "an address that is taken in the guest reaches nobody",
            || {
                let script = format!(
                    "ip address add {0}/32 dev eth0; ping -c 2 -w 4 -I {0} 10.88.0.1; \
                 ip address delete {0}/32 dev eth0",
                    victim.ip
                );
                let seen = self.client.shell(&attacker.container, &script);
                assert!(seen.contains("100% packet loss"), "{seen}");
                let known = ip(&format!("neighbour show {}", victim.ip));
                assert!(!known.contains(&text(attacker.mac)), "{known}");
            },
        );
    }
}

/// A guest that has taken its VMM over holds the tap's descriptor: what it sends by that is looked
/// at as well.
fn broken_vmm(checks: &mut Checks, attacker: &Member, victim: &Member) {
    checks.check(
        "frames of a VMM that was taken over end there as well",
        || {
            let mut tap = tap_of(attacker.vmm);
            let cases = cases(attacker, victim);
            let last = udp(attacker.mac, attacker.ip, 9997);
            let mut capture = Capture::start().unwrap();
            for frame in cases.iter().map(|case| &case.frame).chain([&last]) {
                let whole = [&[0; HEADER], &frame[..]].concat();
                tap.write_all(&whole).unwrap();
            }
            let frames: Vec<&[u8]> = cases.iter().map(|case| &case.frame[..]).collect();
            let seen = capture.until(&last, &frames, PATIENCE);
            for (case, seen) in cases.iter().zip(seen) {
                assert_eq!(seen, case.own, "{}", case.name);
            }
        },
    );
}

/// A copy of the first tap descriptor of a process's.
fn tap_of(process: Pid) -> File {
    let descriptors = std::fs::read_dir(format!("/proc/{process}/fd")).unwrap();
    let number: i32 = descriptors
        .flatten()
        .find(|entry| {
            std::fs::read_link(entry.path()).is_ok_and(|to| to == Path::new("/dev/net/tun"))
        })
        .and_then(|entry| entry.file_name().to_str()?.parse().ok())
        .unwrap();
    // SAFETY: both calls take numbers and return fresh descriptors.
    unsafe {
        let process = libc::syscall(libc::SYS_pidfd_open, process.as_raw(), 0) as i32;
        assert!(process >= 0);
        let process = OwnedFd::from_raw_fd(process);
        let copy = libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), number, 0) as i32;
        assert!(copy >= 0, "{}", std::io::Error::last_os_error());
        File::from_raw_fd(copy)
    }
}

fn cases(attacker: &Member, victim: &Member) -> Vec<Case> {
    let (me, other) = (attacker.mac, victim.mac);
    let case = |name, own, any, frame| Case {
        name,
        frame,
        own,
        any,
    };
    let told = |target: Ipv6Addr, mac: Mac| {
        let mut message = vec![136, 0, 0, 0, 0x20, 0, 0, 0];
        message.extend(target.octets());
        message.extend([2, 1]);
        message.extend(mac);
        icmp6(me, attacker.ip6, message)
    };
    vec![
        case(
            "another pod's MAC",
            false,
            false,
            udp(other, attacker.ip, 1),
        ),
        case(
            "another pod's MAC and IPv4",
            false,
            false,
            udp(other, victim.ip, 2),
        ),
        case(
            "nobody's MAC",
            false,
            false,
            udp([2, 9, 9, 9, 9, 9], attacker.ip, 3),
        ),
        case("its own IPv4", true, true, udp(me, attacker.ip, 4)),
        case("another pod's IPv4", false, true, udp(me, victim.ip, 5)),
        case("the host's IPv4", false, true, udp(me, HOST.into(), 6)),
        case("ARP for itself", true, true, arp(me, me, attacker.ip)),
        case("ARP for another pod", false, true, arp(me, me, victim.ip)),
        case("ARP for the gateway", false, true, arp(me, me, HOST.into())),
        case(
            "ARP with another pod's MAC",
            false,
            true,
            arp(me, other, attacker.ip),
        ),
        case(
            "its own IPv6",
            true,
            true,
            icmp6(me, attacker.ip6, vec![128, 0, 0, 0, 1, 1, 1, 1]),
        ),
        case(
            "another pod's IPv6",
            false,
            true,
            icmp6(me, victim.ip6, vec![128, 0, 0, 0, 2, 2, 2, 2]),
        ),
        case("itself told of", true, true, told(attacker.ip6, me)),
        case("another pod told of", false, true, told(victim.ip6, me)),
        case(
            "itself told to be elsewhere",
            false,
            true,
            told(attacker.ip6, other),
        ),
        case(
            "a router's word",
            false,
            true,
            icmp6(
                me,
                attacker.ip6,
                [&[134, 0, 0, 0, 64, 0, 7, 8], &[0; 8][..]].concat(),
            ),
        ),
        case(
            "another protocol",
            false,
            true,
            ethernet(me, 0x88cc, &[7; 50]),
        ),
    ]
}

fn ethernet(from: Mac, kind: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend(from);
    frame.extend(kind.to_be_bytes());
    frame.extend(payload);
    frame
}

fn udp(from: Mac, source: Ipv4Addr, port: u16) -> Vec<u8> {
    let mut packet = vec![0x45, 0, 0, 36, 0, 0, 0, 0, 64, 17, 0, 0];
    packet.extend(source.octets());
    packet.extend(HOST);
    let sum = checksum(&packet);
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    packet.extend([port, port, 16, 0].map(u16::to_be_bytes).concat());
    packet.extend([0xb7; 8]);
    ethernet(from, 0x0800, &packet)
}

/// A request, which changes what others know of the sender as a reply does (RFC 826).
fn arp(from: Mac, sender: Mac, ip: Ipv4Addr) -> Vec<u8> {
    let mut packet = vec![0, 1, 8, 0, 6, 4, 0, 1];
    packet.extend(sender);
    packet.extend(ip.octets());
    packet.extend([0; 6]);
    packet.extend(HOST);
    ethernet(from, 0x0806, &packet)
}

fn icmp6(from: Mac, source: Ipv6Addr, mut message: Vec<u8>) -> Vec<u8> {
    let to: Ipv6Addr = "ff02::1".parse().unwrap();
    let length = message.len() as u16;
    let mut summed = [source.octets(), to.octets()].concat();
    summed.extend(u32::from(length).to_be_bytes());
    summed.extend([0, 0, 0, 58]);
    summed.extend(&message);
    let sum = checksum(&summed);
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend(length.to_be_bytes());
    packet.extend([58, 255]);
    packet.extend(source.octets());
    packet.extend(to.octets());
    packet.extend(message);
    ethernet(from, 0x86dd, &packet)
}

pub fn mac(text: &str) -> Mac {
    let bytes: Vec<u8> = text
        .split(':')
        .map(|byte| u8::from_str_radix(byte, 16).unwrap())
        .collect();
    bytes.try_into().unwrap()
}

fn text(mac: Mac) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}
