//! The request of the host's, checked.

use super::rules::Rule;
use crate::error::Failure;
use bulkhead_netlink::route::route::RouteHeader;
use bulkhead_proto::agent::{
    NetworkAddress, NetworkInterface, NetworkNeighbour, NetworkRoute, SetNetworkRequest,
};
use std::collections::BTreeMap;
use std::net::IpAddr;

/// Longest name of an interface, IFNAMSIZ without the end.
const MAX_NAME: usize = 15;

/// What stands for an interface on the host's side.
pub type Id = u32;

/// Everything that a request says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Wanted {
    pub interfaces: BTreeMap<Id, Interface>,
    /// Those on the link first: gateways are reached by them.
    pub routes: Vec<Route>,
    pub neighbours: Vec<Neighbour>,
    pub rules: Vec<Rule>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    pub device: String,
    pub name: String,
    pub link: Link,
    pub addresses: Vec<Address>,
}

/// What is set on the link itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Link {
    /// 0 to leave it alone.
    pub mtu: u32,
    pub up: bool,
    pub arp: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Address {
    pub ip: IpAddr,
    pub prefix_length: u8,
    pub peer: Option<IpAddr>,
    pub broadcast: Option<IpAddr>,
    pub scope: u8,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Route {
    pub id: Id,
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
pub struct Neighbour {
    pub id: Id,
    pub ip: IpAddr,
    pub mac: [u8; 6],
}

impl Wanted {
    /// Checks all of it.
    pub fn new(request: &SetNetworkRequest) -> Result<Self, Failure> {
        let mut interfaces = BTreeMap::new();
        for interface in &request.interfaces {
            let checked = Interface::new(interface)?;
            let same = |other: &Interface| other.name == checked.name;
            if interfaces.values().any(same) {
                let what = format!("interface {:?}", checked.name);
                return Err(Failure::invalid(what, "there are two of this name"));
            }
            if interfaces.insert(interface.id, checked).is_some() {
                let what = format!("interface {:?}", interface.name);
                let why = format!("its id {} is another's too", interface.id);
                return Err(Failure::invalid(what, why));
            }
        }
        let name = |id: Id| interfaces.get(&id).map(|one: &Interface| one.name.clone());
        let routes = request.routes.iter().map(|route| {
            let name = name(route.id).ok_or_else(|| no_interface("a route", route.id))?;
            Route::new(route).map_err(|why| Failure::invalid(format!("{name}: a route"), why))
        });
        let mut routes: Vec<Route> = routes.collect::<Result<_, _>>()?;
        routes.sort_by_key(|route| route.gateway.is_some());
        let neighbours = request.neighbours.iter().map(|one| {
            let name = name(one.id).ok_or_else(|| no_interface("a neighbour", one.id))?;
            Neighbour::new(one).map_err(|why| Failure::invalid(format!("{name}: a neighbour"), why))
        });
        let neighbours = neighbours.collect::<Result<_, _>>()?;
        let rules = request.rules.iter().map(Rule::new);
        Ok(Self {
            interfaces,
            routes,
            neighbours,
            rules: rules.collect::<Result<_, _>>()?,
        })
    }
}

/// Whether an interface can be called so.
pub fn is_name(name: &str) -> bool {
    // The kernel's own rule (dev_valid_name), and no conversion of blanks.
    let fits = (1..=MAX_NAME).contains(&name.len()) && name != "." && name != "..";
    let plain = |byte: u8| byte.is_ascii_graphic() && byte != b'/' && byte != b':';
    fits && name.bytes().all(plain)
}

fn no_interface(what: &str, id: Id) -> Failure {
    Failure::invalid(what, format!("its interface {id} is not in the request"))
}

impl Interface {
    fn new(interface: &NetworkInterface) -> Result<Self, Failure> {
        let what = || format!("interface {:?}", interface.name);
        for name in [&interface.name, &interface.device] {
            if !is_name(name) {
                let why = format!("{name:?} is no name of an interface");
                return Err(Failure::invalid(what(), why));
            }
        }
        let addresses = interface.addresses.iter().map(Address::new);
        let addresses: Result<Vec<_>, _> = addresses.collect();
        Ok(Self {
            device: interface.device.clone(),
            name: interface.name.clone(),
            link: Link {
                mtu: interface.mtu,
                up: interface.up,
                arp: interface.arp,
            },
            addresses: addresses.map_err(|why| Failure::invalid(what(), why))?,
        })
    }
}

impl Address {
    fn new(address: &NetworkAddress) -> Result<Self, String> {
        let ip = ip(&address.ip)?;
        let broadcast = optional(&address.broadcast, ip)?;
        if broadcast.is_some() && ip.is_ipv6() {
            return Err(format!("{ip} has a broadcast address, which IPv6 has not"));
        }
        Ok(Self {
            ip,
            prefix_length: prefix_length(ip, address.prefix_length)?,
            peer: optional(&address.peer, ip)?,
            broadcast,
            scope: scope(address.scope)?,
        })
    }
}

impl Route {
    fn new(route: &NetworkRoute) -> Result<Self, String> {
        let destination = ip(&route.destination)?;
        Ok(Self {
            id: route.id,
            table: match route.table {
                0 => RouteHeader::RT_TABLE_MAIN.into(),
                table => table,
            },
            destination,
            prefix_length: prefix_length(destination, route.prefix_length)?,
            gateway: optional(&route.gateway, destination)?,
            source: optional(&route.source, destination)?,
            scope: scope(route.scope)?,
            priority: route.priority,
            mtu: route.mtu,
            onlink: route.onlink,
        })
    }
}

impl Neighbour {
    fn new(neighbour: &NetworkNeighbour) -> Result<Self, String> {
        let ip = ip(&neighbour.ip)?;
        let mac = <[u8; 6]>::try_from(neighbour.mac.as_slice());
        let wrong = |_| format!("{ip} has a MAC of {} bytes; it has 6", neighbour.mac.len());
        Ok(Self {
            id: neighbour.id,
            ip,
            mac: mac.map_err(wrong)?,
        })
    }
}

pub fn ip(bytes: &[u8]) -> Result<IpAddr, String> {
    if let Ok(four) = <[u8; 4]>::try_from(bytes) {
        return Ok(IpAddr::from(four));
    }
    <[u8; 16]>::try_from(bytes)
        .map(IpAddr::from)
        .map_err(|_| format!("an address of {} bytes; it has 4 or 16", bytes.len()))
}

/// Of the same family as `like`.
fn optional(bytes: &[u8], like: IpAddr) -> Result<Option<IpAddr>, String> {
    if bytes.is_empty() {
        return Ok(None);
    }
    let found = ip(bytes)?;
    if found.is_ipv4() != like.is_ipv4() {
        return Err(format!("{found} is of another family than {like}"));
    }
    Ok(Some(found))
}

pub fn prefix_length(ip: IpAddr, length: u32) -> Result<u8, String> {
    let most = if ip.is_ipv4() { 32 } else { 128 };
    u8::try_from(length)
        .ok()
        .filter(|length| *length <= most)
        .ok_or_else(|| format!("{ip}/{length}: the prefix has {most} bits at most"))
}

fn scope(scope: u32) -> Result<u8, String> {
    u8::try_from(scope).map_err(|_| format!("the scope {scope} is not 0 to 255"))
}
