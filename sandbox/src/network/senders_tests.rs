//! The program against what its module says, said once more without jumps.

use super::super::filter::run;
use super::super::state::Address;
use super::*;
use proptest::prelude::*;

const MAC: [u8; 6] = [2, 0x42, 0x0a, 9, 0, 2];
const OTHER_MAC: [u8; 6] = [2, 0x42, 0x0a, 9, 0, 3];

fn interface(ips: &[&str]) -> Interface {
    let address = |ip: &&str| Address {
        ip: ip.parse().unwrap(),
        prefix_length: 24,
        peer: None,
        broadcast: None,
        scope: 0,
    };
    Interface {
        name: "eth0".into(),
        mac: MAC,
        mtu: 1500,
        up: true,
        arp: true,
        shares_mac: false,
        addresses: ips.iter().map(address).collect(),
    }
}

fn own() -> Interface {
    interface(&["10.9.0.2", "10.9.1.2", "fd00::2", "2001:db8::2"])
}

const OWN6: [&str; 3] = ["fd00::2", "2001:db8::2", "fe80::42:aff:fe09:2"];
const FOREIGN6: [&str; 3] = ["fd00::3", "fe80::42:aff:fe09:3", "fd00::1:2"];

/// What the module says, in other words.
fn wanted(frame: &[u8]) -> Option<bool> {
    let bytes = |at: usize, count: usize| frame.get(at..at + count);
    let number = |at: usize, count: usize| Some(word(bytes(at, count)?));
    let is_own6 = |at: usize| {
        let ip: [u8; 16] = bytes(at, 16)?.try_into().ok()?;
        let named = ["fd00::2", "2001:db8::2"].map(|ip| ip.parse::<Ipv6Addr>().unwrap());
        Some(named.contains(&ip.into()) || ip[8..] == interface_id(MAC))
    };
    if bytes(6, 6)? != MAC {
        return Some(false);
    }
    let is_own4 =
        |ip: &[u8]| [[0; 4], [10, 9, 0, 2], [10, 9, 1, 2]].contains(&ip.try_into().unwrap());
    match number(12, 2)? {
        0x0800 => Some(is_own4(bytes(26, 4)?)),
        0x0806 => {
            let ethernet = bytes(14, 6)? == [0, 1, 8, 0, 6, 4];
            Some(ethernet && bytes(22, 6)? == MAC && is_own4(bytes(28, 4)?))
        }
        0x86dd => {
            let unspecified = bytes(22, 16)? == [0; 16];
            if !unspecified && !is_own6(22)? {
                return Some(false);
            }
            let (mut next, mut at) = (number(20, 1)?, 54);
            for _ in 0..EXTENSIONS {
                match next {
                    58 => return discovery(frame, at, unspecified, is_own6),
                    0 | 43 | 60 => {
                        next = number(at, 1)?;
                        at += 8 * (number(at + 1, 1)? as usize + 1);
                    }
                    44 if number(at + 2, 2)? & 0xfff8 != 0 => return Some(!unspecified),
                    44 => {
                        next = number(at, 1)?;
                        at += 8;
                    }
                    _ => return Some(!unspecified),
                }
            }
            Some(false)
        }
        _ => Some(false),
    }
}

fn discovery(
    frame: &[u8],
    at: usize,
    unspecified: bool,
    is_own6: impl Fn(usize) -> Option<bool>,
) -> Option<bool> {
    let kind = *frame.get(at)?;
    if !(133..=137).contains(&kind) {
        return Some(true);
    }
    if at != 54 {
        return Some(false);
    }
    let length = word(frame.get(18..20)?);
    let option = |bare: u32, at: usize, head: [u8; 2]| match length {
        length if length == bare => Some(true),
        length if length == bare + 8 => {
            let option = frame.get(at..at + 8)?;
            Some(option[..2] == head && option[2..] == MAC)
        }
        _ => Some(false),
    };
    let nonce = || Some(length == 32 && frame.get(78..80)? == [14, 1]);
    match kind {
        133 => option(8, 62, [1, 1]),
        135 if unspecified => Some(is_own6(62)? && (length == 24 || nonce()?)),
        135 => Some(nonce()? || option(24, 78, [1, 1])?),
        136 => Some(!unspecified && is_own6(62)? && option(24, 78, [2, 1])?),
        _ => Some(false),
    }
}

fn verdict(senders: &Senders, frame: &[u8]) -> bool {
    verdict_of(senders, frame, false)
}

fn verdict_of(senders: &Senders, frame: &[u8], tagged: bool) -> bool {
    match run(&senders.program().unwrap(), frame, tagged) {
        PASS => true,
        DROP => false,
        other => panic!("{other}"),
    }
}

pub fn ethernet(mac: [u8; 6], kind: u16, rest: &[u8]) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend(mac);
    frame.extend(kind.to_be_bytes());
    frame.extend(rest);
    frame
}

fn arp(sender: [u8; 6], ip: [u8; 4]) -> Vec<u8> {
    let mut packet = vec![0, 1, 8, 0, 6, 4, 0, 2];
    packet.extend(sender);
    packet.extend(ip);
    packet.extend([0; 10]);
    packet
}

fn ip4(source: [u8; 4]) -> Vec<u8> {
    let mut packet = vec![0x45, 0, 0, 20, 0, 0, 0, 0, 64, 17, 0, 0];
    packet.extend(source);
    packet.extend([10, 9, 0, 1]);
    packet
}

fn ip6(source: &str, next: u8, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend((payload.len() as u16).to_be_bytes());
    packet.extend([next, 255]);
    packet.extend(source.parse::<Ipv6Addr>().unwrap().octets());
    packet.extend("ff02::1".parse::<Ipv6Addr>().unwrap().octets());
    packet.extend(payload);
    packet
}

/// A message of neighbour discovery.
fn nd(kind: u8, target: &str, option: Option<(u8, [u8; 6])>) -> Vec<u8> {
    let mut message = vec![kind, 0, 0, 0, 0, 0, 0, 0];
    if kind != 133 {
        message.extend(target.parse::<Ipv6Addr>().unwrap().octets());
    }
    if let Some((kind, mac)) = option {
        message.extend([kind, 1]);
        message.extend(mac);
    }
    message
}

#[test]
fn frames_of_the_interfaces_own_pass_and_no_others() {
    let senders = Senders::of(&own(), true);
    let any = Senders::of(&own(), false);
    let mine = |kind, packet: Vec<u8>| ethernet(MAC, kind, &packet);
    let six = |source, next, payload: Vec<u8>| mine(0x86dd, ip6(source, next, &payload));
    for (name, frame, passes) in [
        ("own IPv4", mine(0x0800, ip4([10, 9, 0, 2])), true),
        ("own second IPv4", mine(0x0800, ip4([10, 9, 1, 2])), true),
        (
            "another pod's IPv4",
            mine(0x0800, ip4([10, 9, 0, 3])),
            false,
        ),
        ("DHCP", mine(0x0800, ip4([0; 4])), true),
        ("own ARP", mine(0x0806, arp(MAC, [10, 9, 0, 2])), true),
        ("ARP probe", mine(0x0806, arp(MAC, [0; 4])), true),
        (
            "ARP of another's IPv4",
            mine(0x0806, arp(MAC, [10, 9, 0, 3])),
            false,
        ),
        (
            "ARP of another's MAC",
            mine(0x0806, arp(OTHER_MAC, [10, 9, 0, 2])),
            false,
        ),
        (
            "spanning tree",
            mine(38, vec![0x42, 0x42, 3, 0, 0, 0]),
            false,
        ),
        ("VLAN within VLAN", mine(0x8100, vec![0, 1, 8, 0]), false),
        ("no payload at all", mine(0x0800, vec![]), false),
        ("own IPv6", six("fd00::2", 17, vec![0; 8]), true),
        ("own link-local", six(OWN6[2], 17, vec![0; 8]), true),
        ("another's IPv6", six("fd00::3", 17, vec![0; 8]), false),
        ("UDP from nobody", six("::", 17, vec![0; 8]), false),
        ("echo request", six("fd00::2", 58, vec![128, 0, 0, 0]), true),
        (
            "listener report",
            six("::", 0, vec![58, 0, 5, 2, 0, 0, 1, 0, 143, 0, 0, 0]),
            true,
        ),
        (
            "own advertisement",
            six("fd00::2", 58, nd(136, "fd00::2", Some((2, MAC)))),
            true,
        ),
        (
            "own, short",
            six("fd00::2", 58, nd(136, "fd00::2", None)),
            true,
        ),
        (
            "of another's",
            six("fd00::2", 58, nd(136, "fd00::3", Some((2, MAC)))),
            false,
        ),
        (
            "with another's MAC",
            six("fd00::2", 58, nd(136, "fd00::2", Some((2, OTHER_MAC)))),
            false,
        ),
        (
            "solicitation",
            six("fd00::2", 58, nd(135, "fd00::9", Some((1, MAC)))),
            true,
        ),
        (
            "with another's MAC",
            six("fd00::2", 58, nd(135, "fd00::9", Some((1, OTHER_MAC)))),
            false,
        ),
        (
            "looks for duplicates",
            six("::", 58, nd(135, "fd00::2", None)),
            true,
        ),
        (
            "with a nonce",
            six("::", 58, nd(135, "fd00::2", Some((14, [7; 6])))),
            true,
        ),
        (
            "of another's address",
            six("::", 58, nd(135, "fd00::3", None)),
            false,
        ),
        (
            "router solicitation",
            six("::", 58, nd(133, "::", None)),
            true,
        ),
        (
            "router advertisement",
            six("fd00::2", 58, nd(134, "::", None)),
            false,
        ),
        ("redirect", six("fd00::2", 58, nd(137, "::", None)), false),
        (
            "behind a header",
            six(
                "fd00::2",
                60,
                [vec![58, 0, 1, 4, 0, 0, 0, 0], nd(136, "fd00::2", None)].concat(),
            ),
            false,
        ),
        (
            "in a fragment",
            six(
                "fd00::2",
                44,
                [vec![58, 0, 0, 1, 0, 0, 0, 1], nd(136, "fd00::2", None)].concat(),
            ),
            false,
        ),
        (
            "TCP in a fragment",
            six(
                "fd00::2",
                44,
                [vec![6, 0, 0, 1, 0, 0, 0, 1], vec![0; 20]].concat(),
            ),
            true,
        ),
        (
            "a later fragment",
            six("fd00::2", 44, vec![58, 0, 0, 9, 0, 0, 0, 1, 136]),
            true,
        ),
        (
            "first fragment without its beginning",
            six("fd00::2", 44, vec![60, 0, 0, 1, 0, 0, 0, 1]),
            false,
        ),
    ] {
        assert_eq!(verdict(&senders, &frame), passes, "{name}: {frame:02x?}");
        assert_eq!(wanted(&frame).unwrap_or(false), passes, "{name}, again");
        assert!(verdict(&any, &frame), "{name}");
        assert!(!verdict_of(&senders, &frame, true), "{name}, in a VLAN");
        assert!(verdict_of(&any, &frame, true), "{name}, in a VLAN");
        let mut stolen = frame.clone();
        stolen[6..12].copy_from_slice(&OTHER_MAC);
        assert!(
            !verdict(&senders, &stolen) && !verdict(&any, &stolen),
            "{name}"
        );
    }
}

#[test]
fn a_shared_mac_gives_no_address() {
    let mut ipvlan = own();
    ipvlan.shares_mac = true;
    let frame = ethernet(MAC, 0x86dd, &ip6(OWN6[2], 17, &[0; 8]));
    assert!(verdict(&Senders::of(&own(), true), &frame));
    assert!(!verdict(&Senders::of(&ipvlan, true), &frame));
}

#[test]
fn as_many_addresses_as_there_may_be_fit() {
    let ips: Vec<String> = (0..=MAX_ADDRESSES)
        .map(|n| format!("fd00::{n:x}"))
        .collect();
    let ips: Vec<&str> = ips.iter().map(String::as_str).collect();
    let last = ethernet(
        MAC,
        0x86dd,
        &ip6("fd00::5f", 58, &nd(136, "fd00::5f", None)),
    );
    let most = Senders::of(&interface(&ips[..MAX_ADDRESSES]), true);
    assert!(verdict(&most, &last));
    assert_eq!(Senders::of(&interface(&ips), true).program(), None);
    assert!(Senders::of(&interface(&ips), false).program().is_some());
}

prop_compose! {
    fn any_ip6()(own in any::<bool>(), which in 0..3usize) -> &'static str {
        if own { OWN6[which] } else { FOREIGN6[which] }
    }
}

fn any_mac() -> impl Strategy<Value = [u8; 6]> {
    prop_oneof![4 => Just(MAC), 1 => Just(OTHER_MAC)]
}

fn any_discovery() -> impl Strategy<Value = Vec<u8>> {
    let kind = prop::sample::select(vec![1u8, 2, 14, 5]);
    let option = prop::option::of((kind, any_mac()));
    (128u8..140, any_ip6(), option).prop_map(|(kind, target, option)| nd(kind, target, option))
}

/// An IPv6 packet: some headers, then a message or other bytes.
fn any_packet6() -> impl Strategy<Value = Vec<u8>> {
    let header = (prop::sample::select(vec![0u8, 43, 44, 60]), 0u8..3, 0u8..12);
    let end = prop_oneof![
        3 => any_discovery().prop_map(|message| (58, message)),
        1 => (any::<u8>(), prop::collection::vec(any::<u8>(), 0..40)),
    ];
    let source = prop_oneof![3 => any_ip6(), 1 => Just("::")];
    let headers = prop::collection::vec(header, 0..EXTENSIONS + 2);
    (source, prop_oneof![3 => Just(vec![]), 1 => headers], end).prop_map(
        |(source, headers, (mut next, mut payload))| {
            for (kind, length, third) in headers.into_iter().rev() {
                let units = if kind == 44 { 0 } else { length };
                let mut header = vec![next, units, 0, third];
                header.resize(8 * (usize::from(units) + 1), 0);
                payload.splice(..0, header);
                next = kind;
            }
            ip6(source, next, &payload)
        },
    )
}

fn any_frame() -> impl Strategy<Value = Vec<u8>> {
    let four = prop::sample::select(vec![[10, 9, 0, 2], [10, 9, 1, 2], [10, 9, 0, 3], [0; 4]]);
    let packet = prop_oneof![
        (Just(0x0800u16), four.clone().prop_map(ip4)),
        (
            Just(0x0806u16),
            (any_mac(), four).prop_map(|(mac, ip)| arp(mac, ip))
        ),
        (Just(0x86ddu16), any_packet6()),
        (any::<u16>(), prop::collection::vec(any::<u8>(), 0..60)),
    ];
    let change = prop::option::weighted(0.3, (any::<prop::sample::Index>(), any::<u8>()));
    let cut = prop::option::weighted(0.3, any::<prop::sample::Index>());
    (any_mac(), packet, change, cut).prop_map(|(mac, (kind, packet), change, cut)| {
        let mut frame = ethernet(mac, kind, &packet);
        if let Some((at, byte)) = change {
            let at = at.index(frame.len());
            frame[at] = byte;
        }
        if let Some(cut) = cut {
            frame.truncate(cut.index(frame.len()));
        }
        frame
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4096))]
    #[test]
    fn any_frame_gets_the_verdict_that_the_module_promises(frame in any_frame()) {
        let senders = Senders::of(&own(), true);
        prop_assert_eq!(verdict(&senders, &frame), wanted(&frame).unwrap_or(false), "{:02x?}", frame);
    }
}
