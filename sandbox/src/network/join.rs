//! An interface of the pod's and the tap beside it, joined in both directions.

use super::NetworkError;
use super::filter::Instruction;
use super::redirect::{change_program, is_redirected, redirect, redirect_some, undo};
use super::senders::{MAX_ADDRESSES, Senders};
use super::state::Interface;
use super::tap::Tap;
use bulkhead_netlink::{Netlink, NetlinkError};

/// Makes the tap and joins the two, in the calling thread's namespace. On failure nothing is left.
pub(super) fn join(
    index: u32,
    interface: &Interface,
    queues: usize,
    senders: &Senders,
    netlink: &mut Netlink,
) -> Result<Tap, NetworkError> {
    let program = program(interface, senders)?;
    let failed = |step: &'static str| {
        let interface = interface.name.clone();
        move |cause: NetlinkError| NetworkError::Interface {
            interface,
            step,
            cause: cause.to_string(),
        }
    };
    let tap = Tap::new(index, queues, interface.mtu, netlink).map_err(|cause| {
        // Its name is taken, or it is another's with as many queues.
        match cause.errno() {
            Some(libc::EBUSY) => failed(
                "make a tap device: another virtual machine is joined to this network namespace, and \
                 two can't share one; give each container a network of its own",
            )(cause),
            _ => failed("make a tap device (is there /dev/net/tun?)")(cause),
        }
    })?;
    // The guest's frames find their way first: nothing is sent before it is plugged in.
    redirect_some(tap.index, index, &program, netlink).map_err(failed(
        "redirect what the guest sends (does the kernel have cls_bpf?)",
    ))?;
    // From here on the pod's frames are the guest's. With the tap its own redirection goes.
    redirect(index, tap.index, netlink).map_err(failed(
        "redirect what comes in (another program's ingress qdisc has to go first)",
    ))?;
    Ok(tap)
}

/// Has the tap with number `tap` let the frames of others pass from now on.
pub(super) fn change_senders(
    tap: u32,
    index: u32,
    interface: &Interface,
    senders: &Senders,
    netlink: &mut Netlink,
) -> Result<(), NetworkError> {
    let program = program(interface, senders)?;
    change_program(tap, index, &program, netlink).map_err(|cause| NetworkError::Interface {
        interface: interface.name.clone(),
        step: "change whose frames pass",
        cause: cause.to_string(),
    })
}

fn program(interface: &Interface, senders: &Senders) -> Result<Vec<Instruction>, NetworkError> {
    senders.program().ok_or_else(|| NetworkError::Interface {
        interface: interface.name.clone(),
        step: "check the sources of its frames",
        cause: format!(
            "it has more than {MAX_ADDRESSES} addresses; let pods send from any \
             (source_addresses in the configuration)"
        ),
    })
}

/// Takes back what [`join`] did to the interface, in the calling thread's namespace, unless it is
/// taken back already: another program may have its own qdisc there by now. The tap goes with its
/// last descriptor.
pub(super) fn part(index: u32, netlink: &mut Netlink) -> Result<(), NetlinkError> {
    match is_redirected(index, netlink)? {
        true => undo(index, netlink),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::super::netns::Netns;
    use super::super::senders::tests::ethernet;
    use super::super::state::NetworkState;
    use super::*;
    use std::ffi::CString;
    use std::fs::File;
    use std::io::{Read, Write};
    use std::net::{TcpStream, UdpSocket};
    use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
    use std::path::Path;
    use std::process::Command;
    use std::time::{Duration, Instant};

    #[track_caller]
    fn ip(words: &str) -> String {
        let done = Command::new("ip").args(words.split(' ')).output().unwrap();
        let errors = String::from_utf8_lossy(&done.stderr);
        assert!(done.status.success(), "ip {words}: {errors}");
        String::from_utf8(done.stdout).unwrap()
    }

    /// The pod's namespace, with eth0 at 10.9.0.2, and this thread's, with its other end at 10.9.0.1.
    fn pod() -> Option<Netns> {
        if !nix::unistd::geteuid().is_root() || !Path::new("/dev/net/tun").exists() {
            eprintln!("SKIPPED 1 test: it needs root and /dev/net/tun");
            return None;
        }
        let fresh = || {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            ip("link set lo up");
            Netns::open(Path::new("/proc/thread-self/ns/net")).unwrap()
        };
        let pod = std::thread::spawn(fresh).join().unwrap();
        fresh();
        ip("link add far type veth peer name near");
        ip("address add 10.9.0.1/24 dev far");
        ip("link set far up");
        // `ip` has no name for the namespace, and a thread is none that it knows by a pid.
        let mut netlink = Netlink::open().unwrap();
        let near = ip("-o link show near");
        let index: u32 = near.split(':').next().unwrap().parse().unwrap();
        let mut moved = bulkhead_netlink::route::link::LinkMessage::default();
        moved.header.index = index;
        let fd = pod.inside(|| File::open("/proc/thread-self/ns/net").unwrap());
        let fd = fd.unwrap();
        let to = std::os::fd::AsRawFd::as_raw_fd(&fd);
        moved.attributes = vec![bulkhead_netlink::route::link::LinkAttribute::NetNsFd(to)];
        let moved = bulkhead_netlink::route::RouteNetlinkMessage::SetLink(moved);
        netlink.change(moved, 0).unwrap();
        pod.inside(|| {
            for words in [
                "link set near name eth0 address 02:00:00:00:00:02 mtu 1400",
                "address add 10.9.0.2/24 dev eth0",
                "address add 2001:db8:9::2/64 dev eth0 nodad",
                "link set eth0 up",
                "route add default via 10.9.0.1 metric 7",
                "neighbour add 10.9.0.7 lladdr 02:00:00:00:00:07 dev eth0",
                "route add 198.51.100.0/24 dev eth0 table 100",
                "rule add from 10.9.0.2 table 100 priority 500",
                "-6 rule add from 2001:db8:9::2 table 101 priority 501",
                "rule add from 192.0.2.9 blackhole priority 502",
            ] {
                ip(words);
            }
        })
        .unwrap();
        Some(pod)
    }

    fn own(interface: &Interface) -> Senders {
        Senders::of(interface, true)
    }

    fn read(pod: &Netns) -> NetworkState {
        pod.inside(|| NetworkState::read(&mut Netlink::open().unwrap(), |_| false).unwrap())
            .unwrap()
    }

    #[test]
    fn what_cni_left_is_read() {
        let Some(pod) = pod() else { return };
        let state = read(&pod);
        let (index, eth0) = state.interfaces.first_key_value().unwrap();
        assert_eq!(state.interfaces.len(), 1, "{state:?}");
        assert_eq!((eth0.name.as_str(), eth0.mtu), ("eth0", 1400));
        assert_eq!(eth0.mac, [2, 0, 0, 0, 0, 2]);
        assert!(eth0.up && eth0.arp);
        let ips: Vec<_> = eth0
            .addresses
            .iter()
            .map(|one| one.ip.to_string())
            .collect();
        assert!(ips.contains(&"10.9.0.2".to_owned()), "{ips:?}");
        assert!(ips.contains(&"2001:db8:9::2".to_owned()), "{ips:?}");
        let default = state.routes.iter().find(|one| one.prefix_length == 0);
        let default = default.unwrap();
        assert_eq!((default.interface, default.priority), (*index, 7));
        assert_eq!(default.gateway.unwrap().to_string(), "10.9.0.1");
        let networks = state.routes.iter().filter(|one| one.prefix_length == 24);
        let mut networks: Vec<_> = networks
            .map(|one| (one.table, one.destination.to_string()))
            .collect();
        networks.sort();
        let wanted = [(100, "198.51.100.0"), (254, "10.9.0.0")];
        assert_eq!(networks, wanted.map(|(table, to)| (table, to.to_owned())));
        let rules = state.rules.iter();
        let rules: Vec<_> = rules
            .map(|one| (one.priority, one.table, one.source.to_string()))
            .collect();
        let wanted = [(500, 100, "10.9.0.2"), (501, 101, "2001:db8:9::2")];
        assert_eq!(rules, wanted.map(|(a, b, ip)| (a, b, ip.to_owned())));
        assert_eq!(state.left_out.len(), 1, "{:?}", state.left_out);
        assert_eq!(state.neighbours.len(), 1);
        assert_eq!(state.neighbours[0].mac, [2, 0, 0, 0, 0, 7]);
    }

    /// A frame of the tap's that `wanted` accepts, behind its virtio-net header of 10 bytes.
    fn frame(tap: &Tap, wanted: impl Fn(&[u8]) -> bool) -> bool {
        let end = Instant::now() + Duration::from_secs(20);
        let mut buffer = [0; 2048];
        while Instant::now() < end {
            match (&tap.queues[0]).read(&mut buffer) {
                Ok(length) if wanted(&buffer[10..length]) => return true,
                Ok(_) => {}
                Err(_) => std::thread::sleep(Duration::from_millis(10)),
            }
        }
        false
    }

    #[test]
    fn frames_go_to_the_tap_and_the_host_stays_silent_until_they_are_parted() {
        let Some(pod) = pod() else { return };
        let state = read(&pod);
        let (index, eth0) = state.interfaces.first_key_value().unwrap();
        let joined = pod.inside(|| {
            let mut netlink = Netlink::open().unwrap();
            let tap = join(*index, eth0, 1, &own(eth0), &mut netlink).unwrap();
            assert!(is_redirected(*index, &mut netlink).unwrap());
            tap
        });
        let tap = joined.unwrap();
        let socket = UdpSocket::bind("10.9.0.1:0").unwrap();
        socket.send_to(b"x", "10.9.0.2:9").unwrap();
        // ARP (RFC 826): a request, for 10.9.0.2.
        let asks = |frame: &[u8]| {
            frame.get(12..14) == Some(&[8, 6]) && frame.get(38..42) == Some(&[10, 9, 0, 2])
        };
        assert!(frame(&tap, asks), "the request did not reach the tap");
        let neighbour = ip("neighbour show 10.9.0.2");
        assert!(
            !neighbour.contains("lladdr"),
            "the host answered: {neighbour}"
        );

        let ours = tap.index;
        let seen = pod.inside(|| {
            NetworkState::read(&mut Netlink::open().unwrap(), |index| index == ours).unwrap()
        });
        assert_eq!(seen.unwrap(), state, "the namespace is as it was");
        pod.inside(|| part(*index, &mut Netlink::open().unwrap()).unwrap())
            .unwrap();
        drop(tap);
        pod.inside(|| {
            let mut netlink = Netlink::open().unwrap();
            assert!(!is_redirected(*index, &mut netlink).unwrap());
            // Once more is no mistake.
            part(*index, &mut netlink).unwrap();
            assert!(!ip("link show").contains("bulkhead"), "{}", ip("link show"));
            // As when nobody was left to part them.
            drop(join(*index, eth0, 1, &own(eth0), &mut netlink).unwrap());
            assert!(is_redirected(*index, &mut netlink).unwrap());
            super::super::clear(Path::new("/proc/thread-self/ns/net")).unwrap();
            assert!(!is_redirected(*index, &mut netlink).unwrap());
        })
        .unwrap();
        ip("neighbour flush all");
        // The host is itself again: it answers, by refusing.
        let refused = TcpStream::connect("10.9.0.2:9").unwrap_err();
        assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
    }

    /// All that comes in by a device of this thread's namespace from now on.
    fn capture(device: &str) -> OwnedFd {
        let device = CString::new(device).unwrap();
        // SAFETY: numbers, and a C string that lives across the call.
        let (socket, index) = unsafe {
            let protocol = i32::from((libc::ETH_P_ALL as u16).to_be());
            let socket = libc::socket(libc::AF_PACKET, libc::SOCK_RAW, protocol);
            assert!(socket >= 0);
            let index = libc::if_nametoindex(device.as_ptr());
            (OwnedFd::from_raw_fd(socket), index)
        };
        // SAFETY: sockaddr_ll is plain data, for which all zeroes is a value.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
        address.sll_ifindex = index.cast_signed();
        let length = size_of_val(&address) as libc::socklen_t;
        // SAFETY: reads a sockaddr_ll, which lives across the call.
        let bound = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) };
        assert_eq!(bound, 0);
        socket
    }

    /// Sends frames as a guest does, and tells which of them come out at the other end. The last
    /// one must.
    fn come_out(tap: &Tap, frames: &[&[u8]], seen: &OwnedFd) -> Vec<usize> {
        for frame in frames {
            (&tap.queues[0])
                .write_all(&[&[0; 10], *frame].concat())
                .unwrap();
        }
        let mut seen = File::from(seen.try_clone().unwrap());
        let (mut found, mut buffer) = (Vec::new(), [0; 2048]);
        while !found.contains(&(frames.len() - 1)) {
            let length = seen.read(&mut buffer).unwrap();
            found.extend(frames.iter().position(|frame| buffer[..length] == **frame));
        }
        found
    }

    #[test]
    fn frames_of_others_end_at_the_tap() {
        let Some(pod) = pod() else { return };
        let state = read(&pod);
        let (index, eth0) = state.interfaces.first_key_value().unwrap();
        let joined =
            pod.inside(|| join(*index, eth0, 1, &own(eth0), &mut Netlink::open().unwrap()));
        let tap = joined.unwrap().unwrap();
        let (mine, other) = (eth0.mac, [2, 0, 0, 0, 0, 9]);
        let packet = |source: u8| {
            let mut packet = vec![0x45, 0, 0, 28, 0, 0, 0, 0, 64, 17, 0, 0, 10, 9, 0, source];
            packet.extend([10, 9, 0, 1, 0, 9, 0, 9, 0, 8, 0, 0]);
            packet
        };
        let arp = |source: u8| {
            let mut arp = vec![0, 1, 8, 0, 6, 4, 0, 2];
            arp.extend(mine);
            arp.extend([10, 9, 0, source, 2, 0, 0, 0, 0, 1, 10, 9, 0, 1]);
            arp
        };
        let vlan = [&[0, 0, 8, 0], &packet(4)[..]].concat();
        let six = |source: u16| {
            let mut packet = vec![0x60, 0, 0, 0, 0, 0, 59, 64];
            packet.extend(
                [0x2001, 0xdb8, 9, 0, 0, 0, 0, source]
                    .map(u16::to_be_bytes)
                    .concat(),
            );
            packet.extend([0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
            packet
        };
        let frames = [
            ethernet(other, 0x0800, &packet(2)),
            ethernet(mine, 0x0800, &packet(3)),
            ethernet(mine, 0x0800, &[]),
            ethernet(mine, 0x8100, &vlan),
            ethernet(mine, 0x88cc, &packet(2)),
            ethernet(mine, 0x0806, &arp(3)),
            ethernet(mine, 0x86dd, &six(3)),
            ethernet(mine, 0x0806, &arp(2)),
            ethernet(mine, 0x86dd, &six(2)),
            ethernet(mine, 0x0800, &packet(2)),
        ];
        let frames = frames.each_ref().map(Vec::as_slice);
        let seen = capture("far");
        assert_eq!(come_out(&tap, &frames, &seen), [7, 8, 9]);

        let change = |more: Option<&str>, own_only| {
            let mut changed = eth0.clone();
            let mut address = changed.addresses[0];
            if let Some(ip) = more {
                address.ip = ip.parse().unwrap();
                changed.addresses.push(address);
            }
            let senders = Senders::of(&changed, own_only);
            pod.inside(|| {
                let mut netlink = Netlink::open().unwrap();
                change_senders(tap.index, *index, &changed, &senders, &mut netlink).unwrap();
            })
            .unwrap();
        };
        change(Some("10.9.0.3"), true);
        assert_eq!(come_out(&tap, &frames, &seen), [1, 5, 7, 8, 9]);
        change(None, false);
        // A VLAN's tag is beside the frame when it is captured.
        assert_eq!(come_out(&tap, &frames, &seen), [1, 2, 4, 5, 6, 7, 8, 9]);
        change(None, true);
        assert_eq!(come_out(&tap, &frames, &seen), [7, 8, 9]);
    }

    #[test]
    fn a_vlans_tag_is_no_way_around() {
        let Some(pod) = pod() else { return };
        let state = read(&pod);
        let (index, eth0) = state.interfaces.first_key_value().unwrap();
        let senders = own(eth0);
        let joined = pod.inside(|| join(*index, eth0, 1, &senders, &mut Netlink::open().unwrap()));
        let tap = joined.unwrap().unwrap();
        let packet = |last: u8| {
            let mut packet = vec![0x45, 0, 0, 28, 0, 0, 0, 0, 64, 17, 0, 0, 10, 9, 0, 2];
            packet.extend([10, 9, 0, last, 0, 9, 0, 9, 0, 8, 0, 0]);
            packet
        };
        let tagged = ethernet(eth0.mac, 0x8100, &[&[0, 5, 8, 0], &packet(7)[..]].concat());
        // As it would be captured: the tag is beside it then.
        let stripped = ethernet(eth0.mac, 0x0800, &packet(7));
        let last = ethernet(eth0.mac, 0x0800, &packet(1));
        let seen = capture("far");
        let comes_out = || {
            for frame in [&tagged, &last] {
                let framed = [&[0; 10], frame.as_slice()].concat();
                (&tap.queues[0]).write_all(&framed).unwrap();
            }
            let mut seen = File::from(seen.try_clone().unwrap());
            let (mut found, mut buffer) = (false, [0; 2048]);
            loop {
                let length = seen.read(&mut buffer).unwrap();
                if buffer[..length] == *last {
                    return found;
                }
                found |= buffer[..length] == *stripped;
            }
        };
        assert!(!comes_out(), "a frame with a VLAN's tag got through");
        pod.inside(|| {
            let mut netlink = Netlink::open().unwrap();
            let any = Senders::of(eth0, false);
            change_senders(tap.index, *index, eth0, &any, &mut netlink).unwrap();
        })
        .unwrap();
        assert!(comes_out(), "a pod that may send anything can't use VLANs");
    }

    /// A tap of before may live a little longer: a process that another test is starting has copies
    /// of all descriptors until it executes its program.
    fn first_join(index: u32, eth0: &Interface, queues: usize, netlink: &mut Netlink) -> Tap {
        let end = Instant::now() + Duration::from_secs(20);
        loop {
            match join(index, eth0, queues, &own(eth0), netlink) {
                Ok(tap) => return tap,
                Err(error) => assert!(Instant::now() < end, "{error}"),
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    #[test]
    fn a_second_machine_is_refused_and_the_first_left_alone() {
        let Some(pod) = pod() else { return };
        let state = read(&pod);
        let (index, eth0) = state.interfaces.first_key_value().unwrap();
        pod.inside(|| {
            let mut netlink = Netlink::open().unwrap();
            for queues in [1, 2] {
                let first = first_join(*index, eth0, queues, &mut netlink);
                let second = join(*index, eth0, queues, &own(eth0), &mut netlink);
                let error = second.unwrap_err().to_string();
                assert!(
                    error.contains("another virtual machine"),
                    "{queues}: {error}"
                );
                assert!(is_redirected(*index, &mut netlink).unwrap());
                drop(first);
                part(*index, &mut netlink).unwrap();
            }
        })
        .unwrap();
    }

    #[test]
    fn another_programs_qdisc_is_left_alone() {
        let Some(pod) = pod() else { return };
        let state = read(&pod);
        let (index, eth0) = state.interfaces.first_key_value().unwrap();
        pod.inside(|| {
            let mut netlink = Netlink::open().unwrap();
            let words = ["qdisc", "add", "dev", "eth0", "ingress"];
            let status = Command::new("tc").args(words).status();
            assert!(status.unwrap().success());
            let error = join(*index, eth0, 2, &own(eth0), &mut netlink)
                .unwrap_err()
                .to_string();
            assert!(
                error.contains("\"eth0\"") && error.contains("ingress qdisc"),
                "{error}"
            );
            assert!(!ip("link show").contains("bulkhead"), "{}", ip("link show"));
            let left = Command::new("tc")
                .args(["qdisc", "show", "dev", "eth0"])
                .output();
            let left = String::from_utf8(left.unwrap().stdout).unwrap();
            assert!(left.contains("ingress"), "{left}");
        })
        .unwrap();
    }
}
