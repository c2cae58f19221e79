//! What is in the pod's network namespace, as CNI left it: what the guest is to have too.

use super::NetworkError;
use super::rules::{self, Rule};
use bulkhead_netlink::Netlink;
use bulkhead_netlink::route::address::{AddressAttribute, AddressFlags, AddressMessage};
use bulkhead_netlink::route::link::{
    InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage,
};
use bulkhead_netlink::route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use bulkhead_netlink::route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteMetric, RouteNextHopFlags,
    RouteType,
};
use bulkhead_netlink::route::{AddressFamily, RouteNetlinkMessage as Message};
use std::collections::BTreeMap;
use std::net::IpAddr;

/// Most addresses, routes and neighbours of a pod together: some 60 bytes each in a request that
/// may have 4 MiB.
const MAX_ENTRIES: usize = 16_384;

/// A pod's network.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct NetworkState {
    /// By their number in the namespace.
    pub interfaces: BTreeMap<u32, Interface>,
    pub routes: Vec<Route>,
    pub neighbours: Vec<Neighbour>,
    pub rules: Vec<Rule>,
    /// What the guest can't have, in words.
    pub left_out: Vec<String>,
}

/// An interface that Ethernet frames go through.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Interface {
    pub name: String,
    pub mac: [u8; 6],
    pub mtu: u32,
    pub up: bool,
    pub arp: bool,
    /// Others on its network have the same `mac`.
    pub shares_mac: bool,
    pub addresses: Vec<Address>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Address {
    pub ip: IpAddr,
    pub prefix_length: u8,
    pub peer: Option<IpAddr>,
    pub broadcast: Option<IpAddr>,
    pub scope: u8,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Route {
    pub interface: u32,
    pub table: u32,
    pub destination: IpAddr,
    pub prefix_length: u8,
    pub gateway: Option<IpAddr>,
    pub source: Option<IpAddr>,
    pub scope: u8,
    pub priority: u32,
    pub mtu: u32,
    pub onlink: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Neighbour {
    pub interface: u32,
    pub ip: IpAddr,
    pub mac: [u8; 6],
}

impl NetworkState {
    /// Reads it, but for the interfaces that `is_ours` knows.
    pub fn read(
        netlink: &mut Netlink,
        is_ours: impl Fn(u32) -> bool,
    ) -> Result<Self, NetworkError> {
        let mut state = Self::default();
        let mut entries = 0;
        let mut dump = |what: &'static str, request: Message| {
            let found = netlink.dump(&request);
            let found = found.map_err(|cause| NetworkError::Read {
                what,
                cause: std::sync::Arc::new(cause),
            })?;
            entries += found.len();
            if entries > MAX_ENTRIES {
                return Err(NetworkError::TooMuch {
                    what,
                    limit: MAX_ENTRIES,
                });
            }
            Ok(found)
        };
        for message in dump("interfaces", Message::GetLink(LinkMessage::default()))? {
            if let Message::NewLink(link) = message
                && !is_ours(link.header.index)
                && let Some(interface) = interface(&link)
            {
                state.interfaces.insert(link.header.index, interface);
            }
        }
        for message in dump("addresses", Message::GetAddress(AddressMessage::default()))? {
            if let Message::NewAddress(message) = message
                && let Some(interface) = state.interfaces.get_mut(&message.header.index)
            {
                interface.addresses.extend(address(&message));
            }
        }
        // One that is down and was never given anything is nothing to the pod.
        state
            .interfaces
            .retain(|_, one| one.up || !one.addresses.is_empty());
        for message in dump("routes", Message::GetRoute(RouteMessage::default()))? {
            if let Message::NewRoute(message) = message {
                state.routes.extend(routes(&message));
            }
        }
        let interfaces = &state.interfaces;
        let known = |index: u32| interfaces.contains_key(&index);
        state.routes.retain(|route| known(route.interface));
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            for message in dump("rules", Message::GetRule(rules::request(family)))? {
                if let Message::NewRule(message) = message {
                    match rules::rule(&message) {
                        Ok(rule) => state.rules.extend(rule),
                        Err(what) => state.left_out.push(what),
                    }
                }
            }
        }
        for message in dump(
            "neighbours",
            Message::GetNeighbour(NeighbourMessage::default()),
        )? {
            if let Message::NewNeighbour(message) = message {
                state.neighbours.extend(neighbour(&message));
            }
        }
        state.neighbours.retain(|one| known(one.interface));
        Ok(state)
    }
}

/// None if no frames of a pod's go through it: the loopback device, tunnels without Ethernet, and
/// ports of a bridge or bond in the namespace, whose frames are its.
fn interface(link: &LinkMessage) -> Option<Interface> {
    let header = &link.header;
    if header.link_layer_type != LinkLayerType::Ether {
        return None;
    }
    let mut interface = Interface {
        name: String::new(),
        mac: [0; 6],
        mtu: 0,
        up: header.flags.contains(LinkFlags::Up),
        arp: !header.flags.contains(LinkFlags::Noarp),
        shares_mac: false,
        addresses: Vec::new(),
    };
    for attribute in &link.attributes {
        match attribute {
            LinkAttribute::IfName(name) => interface.name.clone_from(name),
            LinkAttribute::Address(mac) => interface.mac = mac.as_slice().try_into().ok()?,
            LinkAttribute::Mtu(mtu) => interface.mtu = *mtu,
            LinkAttribute::Controller(_) => return None,
            LinkAttribute::LinkInfo(info) => {
                interface.shares_mac = info.contains(&LinkInfo::Kind(InfoKind::IpVlan));
            }
            _ => {}
        }
    }
    Some(interface)
}

fn address(message: &AddressMessage) -> Option<Address> {
    let (mut local, mut other, mut broadcast) = (None, None, None);
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(ip) => local = Some(*ip),
            AddressAttribute::Address(ip) => other = Some(*ip),
            AddressAttribute::Broadcast(ip) => broadcast = Some(IpAddr::V4(*ip)),
            // Somebody else on the network has it.
            AddressAttribute::Flags(flags) if flags.contains(AddressFlags::Dadfailed) => {
                return None;
            }
            _ => {}
        }
    }
    // Without a peer, IPv4 has both, and IPv6 only one (rtnetlink(7)).
    let ip = local.or(other)?;
    Some(Address {
        ip,
        prefix_length: message.header.prefix_len,
        peer: other.filter(|other| *other != ip),
        broadcast,
        scope: message.header.scope.into(),
    })
}

/// The routes that lead out of an interface: one for each next hop. Those that the kernel made of
/// an address belong to it: the agent gives addresses without them. Those of the local table the
/// guest's kernel makes by itself.
fn routes(message: &RouteMessage) -> Vec<Route> {
    let header = &message.header;
    let unspecified = match header.address_family {
        AddressFamily::Inet => IpAddr::from([0; 4]),
        AddressFamily::Inet6 => IpAddr::from([0; 16]),
        _ => return Vec::new(),
    };
    if header.kind != RouteType::Unicast || header.flags.contains(RouteFlags::Cloned) {
        return Vec::new();
    }
    let mut hops = Vec::new();
    let mut route = Route {
        interface: 0,
        table: u32::from(header.table),
        destination: unspecified,
        prefix_length: header.destination_prefix_length,
        gateway: None,
        source: None,
        scope: header.scope.into(),
        priority: 0,
        mtu: 0,
        onlink: header.flags.contains(RouteFlags::Onlink),
    };
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Table(number) => route.table = *number,
            RouteAttribute::Destination(to) => {
                route.destination = ip(to).unwrap_or(unspecified);
            }
            RouteAttribute::PrefSource(from) => route.source = ip(from),
            RouteAttribute::Priority(priority) => route.priority = *priority,
            RouteAttribute::Metrics(metrics) => {
                route.mtu = metrics.iter().find_map(mtu).unwrap_or(0);
            }
            RouteAttribute::MultiPath(all) => hops.clone_from(all),
            other => to_hop(&mut route, other),
        }
    }
    if route.table == u32::from(libc::RT_TABLE_LOCAL) {
        return Vec::new();
    }
    if hops.is_empty() {
        return vec![route];
    }
    let of_hop = hops.iter().map(|hop| {
        let mut route = Route {
            interface: hop.interface_index,
            onlink: hop.flags.contains(RouteNextHopFlags::Onlink),
            ..route
        };
        hop.attributes
            .iter()
            .for_each(|attribute| to_hop(&mut route, attribute));
        route
    });
    of_hop.collect()
}

fn to_hop(route: &mut Route, attribute: &RouteAttribute) {
    match attribute {
        RouteAttribute::Oif(index) => route.interface = *index,
        RouteAttribute::Gateway(gateway) => route.gateway = ip(gateway),
        _ => {}
    }
}

fn mtu(metric: &RouteMetric) -> Option<u32> {
    match metric {
        RouteMetric::Mtu(mtu) => Some(*mtu),
        _ => None,
    }
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(four) => Some(IpAddr::V4(*four)),
        RouteAddress::Inet6(six) => Some(IpAddr::V6(*six)),
        _ => None,
    }
}

/// Only what somebody has set: the rest each side learns by itself.
fn neighbour(message: &NeighbourMessage) -> Option<Neighbour> {
    if message.header.state != NeighbourState::Permanent {
        return None;
    }
    let (mut ip, mut mac) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(four)) => {
                ip = Some(IpAddr::V4(*four));
            }
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(six)) => {
                ip = Some(IpAddr::V6(*six));
            }
            NeighbourAttribute::LinkLayerAddress(bytes) => mac = bytes.as_slice().try_into().ok(),
            _ => {}
        }
    }
    Some(Neighbour {
        interface: message.header.ifindex,
        ip: ip?,
        mac: mac?,
    })
}
