//! Which frames of a guest's leave its tap: those that say that they come from it. A program of the
//! classic packet filter decides, which is attached to the tap (`redirect.rs`), outside of the VMM
//! and out of its reach: it holds for whatever moves the frames there, a VMM that the guest has
//! broken included.
//!
//! Always checked is the sender's link-layer address. Beside it, unless the pod may send from any
//! address: the sender in IPv4 and IPv6 headers, and what ARP (RFC 826) and neighbour discovery
//! (RFC 4861) say about whose address is where. Frames of other protocols or with a VLAN's tag, router
//! advertisements and redirects are dropped then: a pod is no router.

use super::filter::{Assembler, At, Instruction, Label, Size};
use super::state::Interface;
use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Most addresses of an interface that are checked for: each takes two instructions, and 39 if it
/// is of IPv6.
pub(super) const MAX_ADDRESSES: usize = 96;

/// What a program says of a frame.
pub(super) const PASS: u32 = u32::MAX;
const DROP: u32 = 0;

const IP4: u32 = libc::ETH_P_IP as u32;
const ARP: u32 = libc::ETH_P_ARP as u32;
const IP6: u32 = libc::ETH_P_IPV6 as u32;

/// Places in a frame.
const SENDER: u32 = 6;
const TYPE: u32 = 12;
const NETWORK: u32 = 14;
const IP4_SOURCE: u32 = NETWORK + 12;
const IP6_LENGTH: u32 = NETWORK + 4;
const IP6_NEXT: u32 = NETWORK + 6;
const IP6_SOURCE: u32 = NETWORK + 8;
const IP6_PAYLOAD: u32 = NETWORK + 40;
/// In solicitations and advertisements: the address that is asked for or told of, and options.
const TARGET: u32 = IP6_PAYLOAD + 8;
const TARGET_OPTION: u32 = IP6_PAYLOAD + 24;
/// In router solicitations: options.
const ROUTER_OPTION: u32 = IP6_PAYLOAD + 8;

/// Next headers (IANA's protocol numbers).
const HOP_BY_HOP: u32 = 0;
const ROUTING: u32 = 43;
const FRAGMENT: u32 = 44;
const ICMP6: u32 = 58;
const DESTINATION: u32 = 60;
/// Most extension headers before the one that matters. RFC 8200, section 4.1 knows an order with
/// five.
const EXTENSIONS: usize = 6;

/// Types of ICMPv6 (RFC 4861, section 4).
const ROUTER_SOLICITATION: u32 = 133;
const ROUTER_ADVERTISEMENT: u32 = 134;
const NEIGHBOUR_SOLICITATION: u32 = 135;
const NEIGHBOUR_ADVERTISEMENT: u32 = 136;
const REDIRECT: u32 = 137;

/// Options of neighbour discovery: type, and a length of 8 bytes.
const SOURCE_ADDRESS: u32 = 0x0101;
const TARGET_ADDRESS: u32 = 0x0201;
/// RFC 7527: in solicitations that look for duplicates.
const NONCE: u32 = 0x0e01;

/// Words of scratch memory: whether an IPv6 packet has no source, and a next header.
const UNSPECIFIED: u32 = 0;
const NEXT: u32 = 1;

/// Whose frames pass.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Senders {
    mac: [u8; 6],
    /// None if any is good.
    addresses: Option<Addresses>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Addresses {
    ip4: BTreeSet<Ipv4Addr>,
    ip6: BTreeSet<Ipv6Addr>,
    /// Addresses that are made of the link-layer address (RFC 4291, appendix A) are the
    /// interface's, whatever network they are of: those of stateless autoconfiguration.
    interface_id: Option<[u8; 8]>,
}

impl Senders {
    /// The frames of `interface` with its link-layer address, and, if `own_only`, with none but its
    /// addresses.
    pub fn of(interface: &Interface, own_only: bool) -> Self {
        let addresses = own_only.then(|| {
            let mut own = Addresses {
                // Of interfaces that share one it is nobody's own.
                interface_id: (!interface.shares_mac).then(|| interface_id(interface.mac)),
                ..Addresses::default()
            };
            for address in &interface.addresses {
                match address.ip {
                    IpAddr::V4(ip) => own.ip4.insert(ip),
                    IpAddr::V6(ip) => own.ip6.insert(ip),
                };
            }
            own
        });
        Self {
            mac: interface.mac,
            addresses,
        }
    }

    /// The program; none if there are more than [`MAX_ADDRESSES`].
    pub fn program(&self) -> Option<Vec<Instruction>> {
        let mut writer = Writer::new(self);
        writer.mac(At::Packet(SENDER));
        match &self.addresses {
            None => writer.program.finish(PASS),
            Some(own) if own.ip4.len() + own.ip6.len() > MAX_ADDRESSES => return None,
            Some(own) => writer.addresses(own),
        }
        writer.end().assemble()
    }
}

/// The modified EUI-64 of a link-layer address.
fn interface_id(mac: [u8; 6]) -> [u8; 8] {
    let [a, b, c, d, e, f] = mac;
    [a ^ 2, b, c, 0xff, 0xfe, d, e, f]
}

fn word(bytes: &[u8]) -> u32 {
    bytes
        .iter()
        .fold(0, |word, byte| word << 8 | u32::from(*byte))
}

/// Writes the program of [`Senders`].
struct Writer {
    program: Assembler,
    mac: [u8; 6],
    pass: Label,
    drop: Label,
}

impl Writer {
    fn new(senders: &Senders) -> Self {
        let mut program = Assembler::default();
        Self {
            pass: program.label(),
            drop: program.label(),
            program,
            mac: senders.mac,
        }
    }

    fn end(mut self) -> Assembler {
        self.program.place(self.drop);
        self.program.finish(DROP);
        self.program.place(self.pass);
        self.program.finish(PASS);
        self.program
    }

    /// Drops unless the number there is `value`.
    fn expect(&mut self, size: Size, at: u32, value: u32) {
        self.program.load(size, At::Packet(at));
        self.program.unless_equal(value, self.drop);
    }

    /// Drops unless the link-layer address there is the card's.
    fn mac(&mut self, at: At) {
        let rest = match at {
            At::Packet(offset) => At::Packet(offset + 4),
            At::X(offset) => At::X(offset + 4),
        };
        let (first, last) = (word(&self.mac[..4]), word(&self.mac[4..]));
        self.program.load(Size::Word, at);
        self.program.unless_equal(first, self.drop);
        self.program.load(Size::Half, rest);
        self.program.unless_equal(last, self.drop);
    }

    fn addresses(&mut self, own: &Addresses) {
        let [ip4, arp, ip6, sender] = [(); 4].map(|()| self.program.label());
        // The type that is seen here is the one behind a VLAN's tag.
        self.program.load_tagged();
        self.program.unless_equal(0, self.drop);
        self.program.load(Size::Half, At::Packet(TYPE));
        for (protocol, label) in [(IP4, ip4), (ARP, arp), (IP6, ip6)] {
            self.program.if_equal(protocol, label);
        }
        self.program.jump(self.drop);

        self.program.place(arp);
        // Ethernet and IPv4, and the lengths of their addresses.
        self.expect(Size::Word, NETWORK, 0x0001_0800);
        self.expect(Size::Half, NETWORK + 4, 0x0604);
        self.mac(At::Packet(NETWORK + 8));
        self.program.load(Size::Word, At::Packet(NETWORK + 14));
        self.program.jump(sender);

        self.program.place(ip4);
        self.program.load(Size::Word, At::Packet(IP4_SOURCE));
        self.program.place(sender);
        // Who has none yet asks by DHCP, and looks whether another has it (RFC 5227).
        self.program.if_equal(0, self.pass);
        for ip in &own.ip4 {
            self.program.if_equal(ip.to_bits(), self.pass);
        }
        self.program.jump(self.drop);

        self.program.place(ip6);
        self.ip6(own);
    }

    fn ip6(&mut self, own: &Addresses) {
        let [known, unspecified, walk] = [(); 3].map(|()| self.program.label());
        self.one_of(own, IP6_SOURCE, known);
        self.address(&[0; 16], IP6_SOURCE, unspecified);
        self.program.jump(self.drop);

        self.program.place(known);
        self.constant(0);
        self.program.jump(walk);
        self.program.place(unspecified);
        self.constant(1);
        self.program.place(walk);
        self.program.store(UNSPECIFIED);
        self.headers(own);
    }

    /// Jumps if the address at `at` is one of the interface's own.
    fn one_of(&mut self, own: &Addresses, at: u32, found: Label) {
        for ip in &own.ip6 {
            self.address(&ip.octets(), at, found);
        }
        if let Some(id) = own.interface_id {
            self.address(&id, at + 8, found);
        }
    }

    /// Jumps if these bytes, a multiple of four, are at `at`.
    fn address(&mut self, bytes: &[u8], at: u32, found: Label) {
        let other = self.program.label();
        for (offset, part) in (at..).step_by(4).zip(bytes.chunks(4)) {
            self.program.load(Size::Word, At::Packet(offset));
            self.program.unless_equal(word(part), other);
        }
        self.program.jump(found);
        self.program.place(other);
    }

    /// Follows an IPv6 packet's headers to the one that says what it is.
    fn headers(&mut self, own: &Addresses) {
        let [icmp, other] = [(); 2].map(|()| self.program.label());
        self.constant(IP6_PAYLOAD);
        self.program.a_to_x();
        self.program.load(Size::Byte, At::Packet(IP6_NEXT));
        for _ in 0..EXTENSIONS {
            let [extension, fragment, next] = [(); 3].map(|()| self.program.label());
            self.program.if_equal(ICMP6, icmp);
            for header in [HOP_BY_HOP, ROUTING, DESTINATION] {
                self.program.if_equal(header, extension);
            }
            self.program.if_equal(FRAGMENT, fragment);
            self.program.jump(other);

            self.program.place(extension);
            self.program.load(Size::Byte, At::X(0));
            self.program.store(NEXT);
            // In units of 8 bytes, the first not counted.
            self.program.load(Size::Byte, At::X(1));
            self.program.add(1);
            self.program.shift_left(3);
            self.program.jump(next);

            self.program.place(fragment);
            // What follows a first fragment needs its beginning.
            self.program.load(Size::Half, At::X(2));
            self.program.and(0xfff8);
            self.program.unless_equal(0, other);
            self.program.load(Size::Byte, At::X(0));
            self.program.store(NEXT);
            self.constant(8);

            self.program.place(next);
            self.program.add_x();
            self.program.a_to_x();
            self.program.recall(NEXT);
        }
        self.program.jump(self.drop);

        self.program.place(other);
        self.program.recall(UNSPECIFIED);
        self.program.if_equal(0, self.pass);
        self.program.jump(self.drop);

        self.program.place(icmp);
        self.neighbours(own);
    }

    /// ICMPv6, whose header is at X.
    fn neighbours(&mut self, own: &Addresses) {
        let [discovery, told, tell, ask, look, seek_router] =
            [(); 6].map(|()| self.program.label());
        self.program.load(Size::Byte, At::X(0));
        for kind in ROUTER_SOLICITATION..=REDIRECT {
            self.program.if_equal(kind, discovery);
        }
        self.program.jump(self.pass);

        self.program.place(discovery);
        // RFC 6980: not in fragments; and nobody has a use for other headers before it.
        self.program.x_to_a();
        self.program.unless_equal(IP6_PAYLOAD, self.drop);
        self.program.load(Size::Byte, At::Packet(IP6_PAYLOAD));
        self.program.if_equal(ROUTER_ADVERTISEMENT, self.drop);
        self.program.if_equal(REDIRECT, self.drop);
        self.program.if_equal(ROUTER_SOLICITATION, seek_router);
        self.program.if_equal(NEIGHBOUR_SOLICITATION, ask);
        self.program
            .unless_equal(NEIGHBOUR_ADVERTISEMENT, self.drop);
        self.program.recall(UNSPECIFIED);
        self.program.unless_equal(0, self.drop);
        self.one_of(own, TARGET, tell);
        self.program.jump(self.drop);
        self.program.place(tell);
        self.option(24, TARGET_OPTION, TARGET_ADDRESS);

        self.program.place(ask);
        self.program.recall(UNSPECIFIED);
        self.program.if_equal(0, told);
        // Looks for others with the address that it is about to use.
        self.one_of(own, TARGET, look);
        self.program.jump(self.drop);
        self.program.place(look);
        self.nonce(false);

        self.program.place(told);
        self.nonce(true);
        self.option(24, TARGET_OPTION, SOURCE_ADDRESS);

        self.program.place(seek_router);
        self.option(8, ROUTER_OPTION, SOURCE_ADDRESS);
    }

    /// Passes a solicitation with nothing but a nonce; others are dropped, or left.
    fn nonce(&mut self, leave: bool) {
        let rest = self.program.label();
        self.program.load(Size::Half, At::Packet(IP6_LENGTH));
        if !leave {
            self.program.if_equal(24, self.pass);
        }
        self.program.unless_equal(32, rest);
        self.program.load(Size::Half, At::Packet(TARGET_OPTION));
        self.program.if_equal(NONCE, self.pass);
        self.program.place(rest);
        if !leave {
            self.program.jump(self.drop);
        }
    }

    /// Passes a message without options, which is `bare` bytes long, or with this one alone, which
    /// gives the card's link-layer address; others are dropped.
    fn option(&mut self, bare: u32, at: u32, option: u32) {
        self.program.load(Size::Half, At::Packet(IP6_LENGTH));
        self.program.if_equal(bare, self.pass);
        self.program.unless_equal(bare + 8, self.drop);
        self.expect(Size::Half, at, option);
        self.mac(At::Packet(at + 2));
        self.program.jump(self.pass);
    }

    /// Puts a number into A, of which the assembler's loads have none.
    fn constant(&mut self, value: u32) {
        self.program.and(0);
        self.program.add(value);
    }
}

#[cfg(test)]
#[path = "senders_tests.rs"]
pub(super) mod tests;
