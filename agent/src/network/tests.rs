//! In network namespaces of the tests' own, with veth pairs for the devices of a guest's.

use super::Network;
use crate::error::Kind;
use bulkhead_proto::agent::{
    NetworkAddress, NetworkInterface, NetworkNeighbour, NetworkRoute, NetworkRule,
    SetNetworkRequest,
};
use std::net::IpAddr;
use std::process::Command;

/// Moves the test's thread into a new namespace with these devices. False, with the reason, where
/// that can't be done.
fn own_network(devices: &[&str]) -> bool {
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED 1 test: it needs root, for network namespaces");
        return false;
    }
    crate::namespaces::unshare(rustix::thread::UnshareFlags::NEWNET).unwrap();
    for (n, device) in devices.iter().enumerate() {
        ip(&format!("link add {device} type veth peer name far{n}"));
        ip(&format!("link set far{n} up"));
    }
    true
}

#[track_caller]
fn ip(words: &str) -> String {
    let done = Command::new("ip").args(words.split(' ')).output().unwrap();
    let errors = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "ip {words}: {errors}");
    String::from_utf8(done.stdout).unwrap()
}

fn bytes(address: &str) -> Vec<u8> {
    match address.parse().unwrap() {
        IpAddr::V4(four) => four.octets().to_vec(),
        IpAddr::V6(six) => six.octets().to_vec(),
    }
}

fn address(text: &str) -> NetworkAddress {
    let (ip, length) = text.split_once('/').unwrap();
    NetworkAddress {
        ip: bytes(ip),
        prefix_length: length.parse().unwrap(),
        ..Default::default()
    }
}

fn interface(id: u32, device: &str, name: &str, addresses: &[&str]) -> NetworkInterface {
    NetworkInterface {
        id,
        device: device.into(),
        name: name.into(),
        mtu: 1400,
        up: true,
        arp: true,
        addresses: addresses.iter().copied().map(address).collect(),
        ..Default::default()
    }
}

/// A route on the link, or by way of a gateway.
fn route(id: u32, to: &str, gateway: Option<&str>) -> NetworkRoute {
    let (destination, length) = to.split_once('/').unwrap();
    NetworkRoute {
        id,
        destination: bytes(destination),
        prefix_length: length.parse().unwrap(),
        gateway: gateway.map(bytes).unwrap_or_default(),
        scope: if gateway.is_some() || to.contains(':') {
            0
        } else {
            253
        },
        ..Default::default()
    }
}

fn pods() -> SetNetworkRequest {
    let mut onlink = route(7, "198.51.100.0/24", Some("192.0.2.1"));
    (onlink.onlink, onlink.mtu, onlink.priority) = (true, 1300, 50);
    SetNetworkRequest {
        interfaces: vec![interface(
            7,
            "guest0",
            "eth0",
            &[
                "10.1.2.3/24",
                "10.1.2.4/24",
                "2001:db8::3/64",
                "fe80::77/64",
            ],
        )],
        // The gateway first: the agent must see to the order.
        routes: vec![
            route(7, "0.0.0.0/0", Some("10.1.2.1")),
            route(7, "::/0", Some("2001:db8::1")),
            onlink,
            route(7, "10.1.2.0/24", None),
            route(7, "2001:db8::/64", None),
            route(7, "fe80::/64", None),
        ],
        neighbours: vec![NetworkNeighbour {
            id: 7,
            ip: bytes("10.1.2.9"),
            mac: vec![2, 0, 0, 0, 0, 9],
            ..Default::default()
        }],
        ..Default::default()
    }
}

/// Everything that could be wrong after a request, in words.
fn all() -> String {
    let shown = [
        "-o -4 address show",
        "-o -6 address show",
        "route show",
        "-6 route show",
        "neighbour show nud permanent",
    ];
    shown.map(ip).concat()
}

#[track_caller]
fn assert_has(text: &str, wanted: &[&str]) {
    for part in wanted {
        assert!(text.contains(part), "{part:?} is not in\n{text}");
    }
}

#[test]
fn an_interface_gets_all_that_is_wanted() {
    if !own_network(&["guest0"]) {
        return;
    }
    let network = Network::default();
    network.set(&pods()).unwrap();
    let link = ip("link show dev eth0");
    assert_has(&link, &["mtu 1400", ",UP"]);
    let found = all();
    assert_has(
        &found,
        &[
            "inet 10.1.2.3/24",
            "inet 10.1.2.4/24",
            "inet6 2001:db8::3/64",
            "inet6 fe80::77/64",
            "default via 10.1.2.1 dev eth0",
            "default via 2001:db8::1 dev eth0",
            "198.51.100.0/24 via 192.0.2.1 dev eth0 proto static metric 50 onlink mtu 1300",
            "10.1.2.9 dev eth0 lladdr 02:00:00:00:00:09 PERMANENT",
        ],
    );
    let of_eth0 = ip("-o -6 address show dev eth0");
    assert!(!of_eth0.contains("tentative"), "{of_eth0}");
    assert_eq!(of_eth0.matches("fe80::").count(), 1, "{of_eth0}");
    // Once more changes nothing, nor does it to an agent that has forgotten.
    network.set(&pods()).unwrap();
    assert_eq!(all(), found);
    let mut renamed = pods();
    renamed.interfaces[0].device = "eth0".into();
    Network::default().set(&renamed).unwrap();
    assert_eq!(all(), found);
}

#[test]
fn a_change_is_a_difference() {
    if !own_network(&["guest0"]) {
        return;
    }
    let network = Network::default();
    network.set(&pods()).unwrap();
    ip("route add 203.0.113.0/24 dev eth0");
    let mut changed = pods();
    changed.interfaces[0].addresses[1] = address("10.1.2.5/24");
    changed.routes.retain(|route| !route.onlink);
    changed.neighbours[0].mac[5] = 10;
    network.set(&changed).unwrap();
    let found = all();
    assert_has(
        &found,
        &[
            "inet 10.1.2.3/24",
            "inet 10.1.2.5/24",
            "lladdr 02:00:00:00:00:0a",
            "default via 10.1.2.1",
            "203.0.113.0/24 dev eth0",
        ],
    );
    for gone in ["10.1.2.4", "198.51.100.0", "00:00:09"] {
        assert!(!found.contains(gone), "{gone} is still in\n{found}");
    }
    // Down and up again: all of it comes back.
    changed.interfaces[0].up = false;
    network.set(&changed).unwrap();
    assert!(!all().contains("default"), "{}", all());
    changed.interfaces[0].up = true;
    network.set(&changed).unwrap();
    let wanted = [
        "inet6 2001:db8::3/64",
        "default via 10.1.2.1",
        "default via 2001:db8::1",
    ];
    assert_has(&all(), &wanted);
    // The primary address goes, and with it, in the kernel, the secondary one.
    changed.interfaces[0].addresses.remove(0);
    network.set(&changed).unwrap();
    assert_has(&all(), &["inet 10.1.2.5/24", "default via 10.1.2.1"]);
    assert!(!all().contains("10.1.2.3"), "{}", all());
}

#[test]
fn interfaces_come_go_and_exchange_names() {
    if !own_network(&["eth0", "eth1"]) {
        return;
    }
    let network = Network::default();
    let index = |name: &str| ip(&format!("-o link show dev {name}"));
    let number = |line: String| line.split(':').next().unwrap().to_owned();
    let (first, second) = (number(index("eth0")), number(index("eth1")));
    let mut both = SetNetworkRequest {
        interfaces: vec![
            interface(0, "eth0", "eth1", &["10.1.0.2/24"]),
            interface(1, "eth1", "eth0", &["10.2.0.2/24"]),
        ],
        routes: vec![route(0, "fe80::/64", None), route(1, "fe80::/64", None)],
        ..Default::default()
    };
    network.set(&both).unwrap();
    assert_eq!(number(index("eth1")), first);
    assert_eq!(number(index("eth0")), second);
    let routes = ip("-6 route show fe80::/64");
    assert_has(&routes, &["dev eth0", "dev eth1"]);
    let gone = both.interfaces.remove(0);
    both.routes.remove(0);
    network.set(&both).unwrap();
    assert!(!all().contains("dev eth1"), "{}", all());
    // The slot's next device.
    ip("link delete eth1");
    ip("link add new0 type veth peer name far9");
    both.interfaces.push(NetworkInterface {
        device: "new0".into(),
        ..gone
    });
    network.set(&both).unwrap();
    assert_has(&all(), &["inet 10.1.0.2/24", "inet 10.2.0.2/24"]);
}

/// What is sent from `source` is routed by table 100.
fn rule(source: &str, everywhere: &str) -> NetworkRule {
    let (source, length) = source.split_once('/').unwrap();
    NetworkRule {
        source: bytes(source),
        source_prefix_length: length.parse().unwrap(),
        destination: bytes(everywhere),
        priority: 1000,
        table: 100,
        ..Default::default()
    }
}

#[test]
fn what_is_sent_from_an_address_goes_by_its_own_table() {
    if !own_network(&["guest0"]) {
        return;
    }
    let network = Network::default();
    let mut request = pods();
    let mut other = route(7, "0.0.0.0/0", Some("10.1.2.254"));
    other.table = 100;
    let mut far = route(7, "203.0.113.0/24", Some("10.1.2.253"));
    far.table = 70_000;
    request.routes.extend([other, far]);
    let mut marked = rule("10.1.2.0/24", "0.0.0.0");
    (marked.mark, marked.mark_mask, marked.inverted) = (5, 7, true);
    (marked.priority, marked.output, marked.table) = (1001, "eth0".into(), 70_000);
    marked.suppressed_prefix_length = 1;
    request.rules = vec![
        rule("10.1.2.4/32", "0.0.0.0"),
        rule("2001:db8::3/128", "::"),
        marked,
    ];
    network.set(&request).unwrap();
    let from = |source: &str| ip(&format!("route get 198.18.0.1 from {source}"));
    assert_has(&from("10.1.2.4"), &["via 10.1.2.254"]);
    assert_has(&from("10.1.2.3"), &["via 10.1.2.1"]);
    let rules = ip("rule show");
    let wanted = [
        "1000:\tfrom 10.1.2.4 lookup 100",
        "1001:\tnot from 10.1.2.0/24 fwmark 0x5/0x7 oif eth0 lookup 70000 suppress_prefixlength 0",
    ];
    assert_has(&rules, &wanted);
    assert_has(&ip("-6 rule show"), &["1000:\tfrom 2001:db8::3 lookup 100"]);
    assert_has(
        &ip("route show table 70000"),
        &["203.0.113.0/24 via 10.1.2.253"],
    );
    // Once more changes nothing, nor does it to an agent that has forgotten.
    network.set(&request).unwrap();
    request.interfaces[0].device = "eth0".into();
    Network::default().set(&request).unwrap();
    assert_eq!(ip("rule show"), rules);

    request.rules.truncate(1);
    request.routes.pop();
    network.set(&request).unwrap();
    assert!(!ip("rule show").contains("1001"), "{}", ip("rule show"));
    assert_eq!(ip("route show table all").matches("70000").count(), 0);
    assert_has(&from("10.1.2.4"), &["via 10.1.2.254"]);
    network.set(&pods()).unwrap();
    assert_has(&from("10.1.2.4"), &["via 10.1.2.1"]);
    assert!(!ip("rule show").contains("1000"), "{}", ip("rule show"));
}

#[test]
fn errors_name_interface_and_step() {
    if !own_network(&["guest0"]) {
        return;
    }
    let network = Network::default();
    let before = all();
    type Breaks = fn(&mut SetNetworkRequest);
    let broken: [(Breaks, &str); 10] = [
        (|all| all.interfaces[0].name = "a/b".into(), "no name"),
        (
            |all| all.interfaces[0].device = "none".into(),
            "no device \"none\"",
        ),
        (|all| all.interfaces[0].addresses[0].ip = vec![1], "1 bytes"),
        (
            |all| all.interfaces[0].addresses[0].prefix_length = 33,
            "32 bits",
        ),
        (|all| all.routes[0].gateway = bytes("::1"), "another family"),
        (|all| all.routes[0].id = 8, "interface 8"),
        (|all| all.neighbours[0].mac = vec![], "0 bytes"),
        (
            |all| all.rules.push(rule("10.1.2.4/33", "0.0.0.0")),
            "routing rule 1000",
        ),
        (
            |all| all.rules.push(rule("10.1.2.4/32", "::")),
            "two families",
        ),
        (
            |all| {
                let mut named = rule("10.1.2.4/32", "0.0.0.0");
                named.input = "a/b".into();
                all.rules.push(named);
            },
            "no name of an interface",
        ),
    ];
    for (breaks, wanted) in broken {
        let mut request = pods();
        breaks(&mut request);
        let failure = network.set(&request).unwrap_err();
        assert_eq!(failure.kind, Kind::InvalidArgument, "{failure}");
        assert!(failure.message.contains(wanted), "{failure}");
    }
    assert_eq!(all(), before);
    let mut request = pods();
    request.routes[0].gateway = bytes("192.0.2.77");
    let failure = network.set(&request).unwrap_err();
    assert_eq!(failure.kind, Kind::Internal);
    let wanted = "interface \"eth0\": add the route to 0.0.0.0/0 by 192.0.2.77: ";
    assert!(failure.message.starts_with(wanted), "{failure}");
    // The next request goes on from there.
    network.set(&pods()).unwrap();
    assert_has(&all(), &["default via 10.1.2.1"]);
}
