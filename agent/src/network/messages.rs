//! What is wanted, in the words of rtnetlink(7).

use super::wanted::{Address, Link, Neighbour, Route};
use bulkhead_netlink::route::address::{
    AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage,
};
use bulkhead_netlink::route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, LinkAttribute, LinkFlags, LinkMessage,
};
use bulkhead_netlink::route::neighbour::{NeighbourAttribute, NeighbourMessage, NeighbourState};
use bulkhead_netlink::route::route::{
    RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric, RouteProtocol, RouteType,
};
use bulkhead_netlink::route::{AddressFamily, RouteNetlinkMessage};
use std::net::IpAddr;

pub fn rename(index: u32, name: &str) -> RouteNetlinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.attributes = vec![LinkAttribute::IfName(name.to_owned())];
    RouteNetlinkMessage::SetLink(message)
}

/// No address but those that are given: the kernel would make a link-local one by itself.
pub fn no_own_address(index: u32) -> RouteNetlinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = index;
    let mode = AfSpecInet6::AddrGenMode(In6AddrGenMode::None);
    let spec = AfSpecUnspec::Inet6(vec![mode]);
    message.attributes = vec![LinkAttribute::AfSpecUnspec(vec![spec])];
    RouteNetlinkMessage::SetLink(message)
}

pub fn link(index: u32, link: Link) -> RouteNetlinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.header.change_mask = LinkFlags::Up | LinkFlags::Noarp;
    message.header.flags.set(LinkFlags::Up, link.up);
    message.header.flags.set(LinkFlags::Noarp, !link.arp);
    if link.mtu != 0 {
        message.attributes = vec![LinkAttribute::Mtu(link.mtu)];
    }
    RouteNetlinkMessage::SetLink(message)
}

/// Without the route that the kernel makes of a prefix (the request's routes have it, where it's
/// wanted) and without the wait for others that use the address: on this network it is old.
pub fn address(index: u32, address: &Address) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = family(address.ip);
    message.header.prefix_len = address.prefix_length;
    message.header.flags = AddressHeaderFlags::Permanent;
    message.header.scope = address.scope.into();
    message.header.index = index;
    message.attributes = vec![
        AddressAttribute::Local(address.ip),
        AddressAttribute::Address(address.peer.unwrap_or(address.ip)),
        AddressAttribute::Flags(
            AddressFlags::Permanent | AddressFlags::Nodad | AddressFlags::Noprefixroute,
        ),
    ];
    if let Some(IpAddr::V4(broadcast)) = address.broadcast {
        message
            .attributes
            .push(AddressAttribute::Broadcast(broadcast));
    }
    message
}

pub fn route(index: u32, route: &Route) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = family(route.destination);
    message.header.destination_prefix_length = route.prefix_length;
    message.header.table = u8::try_from(route.table).unwrap_or(RouteHeader::RT_TABLE_UNSPEC);
    message.header.protocol = RouteProtocol::Static;
    message.header.scope = route.scope.into();
    message.header.kind = RouteType::Unicast;
    message.header.flags.set(RouteFlags::Onlink, route.onlink);
    message.attributes.push(RouteAttribute::Table(route.table));
    message.attributes.push(RouteAttribute::Oif(index));
    if route.prefix_length > 0 {
        let destination = RouteAttribute::Destination(route.destination.into());
        message.attributes.push(destination);
    }
    if let Some(gateway) = route.gateway {
        let gateway = RouteAttribute::Gateway(gateway.into());
        message.attributes.push(gateway);
    }
    if let Some(source) = route.source {
        let source = RouteAttribute::PrefSource(source.into());
        message.attributes.push(source);
    }
    if route.priority != 0 {
        let priority = RouteAttribute::Priority(route.priority);
        message.attributes.push(priority);
    }
    if route.mtu != 0 {
        let metrics = RouteAttribute::Metrics(vec![RouteMetric::Mtu(route.mtu)]);
        message.attributes.push(metrics);
    }
    message
}

pub fn neighbour(index: u32, neighbour: &Neighbour) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = family(neighbour.ip);
    message.header.ifindex = index;
    message.header.state = NeighbourState::Permanent;
    message.attributes = vec![
        NeighbourAttribute::Destination(neighbour.ip.into()),
        NeighbourAttribute::LinkLayerAddress(neighbour.mac.to_vec()),
    ];
    message
}

pub fn family(ip: IpAddr) -> AddressFamily {
    match ip {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    }
}
