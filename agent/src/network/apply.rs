//! From what was applied last to what is wanted now.
//!
//! Each step is one that can be done again, and what it did is noted at once: after a failure the
//! same request goes on where this one stopped.

use super::messages;
use super::rules::Rule;
use super::wanted::{Address, Id, Interface, Link, Neighbour, Route, Wanted};
use crate::error::Failure;
use bulkhead_netlink::route::RouteNetlinkMessage as Message;
use bulkhead_netlink::route::route::RouteHeader;
use bulkhead_netlink::{
    NLM_F_APPEND, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE, Netlink, NetlinkError, allow,
};
use std::collections::BTreeMap;
use std::ffi::CString;

/// What a deletion finds when it's of something that has gone by itself: with its device, with
/// another one, or by a container's hand.
const GONE: [i32; 4] = [libc::ESRCH, libc::ENOENT, libc::EADDRNOTAVAIL, libc::ENODEV];

/// What has been applied.
#[derive(Debug, Default)]
pub struct Applied {
    interfaces: BTreeMap<Id, Known>,
    routes: Vec<Route>,
    neighbours: Vec<Neighbour>,
    rules: Vec<Rule>,
}

/// An interface of the guest's that stands for one of the host's.
#[derive(Debug)]
struct Known {
    index: u32,
    name: String,
    /// None before it has been set for the first time.
    link: Option<Link>,
    addresses: Vec<Address>,
}

impl Applied {
    /// See the module.
    pub fn change_to(&mut self, wanted: Wanted, netlink: &mut Netlink) -> Result<(), Failure> {
        self.forget_interfaces(&wanted, netlink);
        self.find_interfaces(&wanted)?;
        self.name_interfaces(&wanted, netlink)?;
        self.delete_rules(&wanted, netlink)?;
        self.delete_routes(&wanted, netlink)?;
        self.delete_neighbours(&wanted, netlink)?;
        for (id, interface) in &wanted.interfaces {
            if self.set_interface(*id, interface, netlink)? {
                // The kernel may have deleted what depends on what was there before.
                self.routes.retain(|route| route.id != *id);
                self.neighbours.retain(|neighbour| neighbour.id != *id);
            }
        }
        self.add_routes(&wanted, netlink)?;
        self.add_neighbours(&wanted, netlink)?;
        // What a rule leads to is there by now.
        self.add_rules(&wanted, netlink)
    }

    /// Their devices are about to be taken away.
    fn forget_interfaces(&mut self, wanted: &Wanted, netlink: &mut Netlink) {
        self.interfaces.retain(|id, known| {
            let stays = wanted.interfaces.contains_key(id);
            if !stays {
                let down = Link {
                    mtu: 0,
                    up: false,
                    arp: true,
                };
                // If the device has gone first, there is nothing to do.
                let _ = netlink.change(messages::link(known.index, down), 0);
            }
            stays
        });
        let interfaces = &self.interfaces;
        self.routes.retain(|one| interfaces.contains_key(&one.id));
        self.neighbours
            .retain(|one| interfaces.contains_key(&one.id));
    }

    /// All new ones or none.
    fn find_interfaces(&mut self, wanted: &Wanted) -> Result<(), Failure> {
        let mut found = Vec::new();
        for (id, interface) in &wanted.interfaces {
            if !self.interfaces.contains_key(id) {
                let known = Known {
                    index: index_of(&interface.device).ok_or_else(|| {
                        let why = format!("the guest has no device {:?}", interface.device);
                        Failure::invalid(format!("interface {:?}", interface.name), why)
                    })?,
                    name: interface.device.clone(),
                    link: None,
                    addresses: Vec::new(),
                };
                found.push((*id, known));
            }
        }
        self.interfaces.extend(found);
        Ok(())
    }

    /// Two may exchange their names, so those that are in the way get one in between.
    fn name_interfaces(&mut self, wanted: &Wanted, netlink: &mut Netlink) -> Result<(), Failure> {
        let target = |id: &Id| wanted.interfaces.get(id).map(|one| one.name.clone());
        let in_the_way: Vec<Id> = self
            .interfaces
            .iter()
            .filter(|(id, known)| {
                target(id).as_ref() != Some(&known.name)
                    && wanted.interfaces.values().any(|one| one.name == known.name)
            })
            .map(|(id, _)| *id)
            .collect();
        for id in in_the_way {
            self.rename(id, format!("moving{id}"), netlink)?;
        }
        for (id, interface) in &wanted.interfaces {
            self.rename(*id, interface.name.clone(), netlink)?;
        }
        Ok(())
    }

    fn rename(&mut self, id: Id, name: String, netlink: &mut Netlink) -> Result<(), Failure> {
        let Some(known) = self.interfaces.get_mut(&id) else {
            return Ok(());
        };
        if known.name != name {
            let done = netlink.change(messages::rename(known.index, &name), 0);
            done.map_err(|error| failed(&known.name, format!("name it {name:?}"), error))?;
            known.name = name;
        }
        Ok(())
    }

    /// Link and addresses. Says whether anything was changed.
    fn set_interface(
        &mut self,
        id: Id,
        wanted: &Interface,
        netlink: &mut Netlink,
    ) -> Result<bool, Failure> {
        let Some(known) = self.interfaces.get_mut(&id) else {
            return Ok(false);
        };
        let fail = |step: String, error| failed(&wanted.name, step, error);
        let mut changed = false;
        if known.link.is_none() {
            let done = netlink.change(messages::no_own_address(known.index), 0);
            // A guest without IPv6.
            let done = allow(done, &[libc::EAFNOSUPPORT, libc::EOPNOTSUPP]);
            done.map_err(|error| fail("keep it without an address of its own".into(), error))?;
        }
        if known.link != Some(wanted.link) {
            let done = netlink.change(messages::link(known.index, wanted.link), 0);
            done.map_err(|error| fail(format!("set {:?}", wanted.link), error))?;
            known.link = Some(wanted.link);
            changed = true;
            // Without a link there are no IPv6 addresses.
            known.addresses.retain(|address| address.ip.is_ipv4());
        }
        // In the order in which they are wanted, since the first of a network is its primary one;
        // and with a primary the kernel deletes all others of its network.
        let common = known
            .addresses
            .iter()
            .zip(&wanted.addresses)
            .take_while(|(old, new)| old == new)
            .count();
        while known.addresses.len() > common {
            let Some(last) = known.addresses.last() else {
                break;
            };
            let message = Message::DelAddress(messages::address(known.index, last));
            let done = allow(netlink.change(message, 0), &GONE);
            done.map_err(|error| fail(format!("delete the address {}", last.ip), error))?;
            known.addresses.pop();
            changed = true;
        }
        for address in wanted.addresses.iter().skip(common) {
            let message = Message::NewAddress(messages::address(known.index, address));
            let done = netlink.change(message, NLM_F_CREATE | NLM_F_REPLACE);
            done.map_err(|error| {
                let (ip, length) = (address.ip, address.prefix_length);
                fail(format!("add the address {ip}/{length}"), error)
            })?;
            known.addresses.push(*address);
            changed = true;
        }
        Ok(changed)
    }

    fn delete_routes(&mut self, wanted: &Wanted, netlink: &mut Netlink) -> Result<(), Failure> {
        // Gateways go before the routes by which they are reached.
        for at in (0..self.routes.len()).rev() {
            let route = self.routes[at];
            if wanted.routes.contains(&route) {
                continue;
            }
            if let Some(known) = self.interfaces.get(&route.id) {
                let message = Message::DelRoute(messages::route(known.index, &route));
                let done = allow(netlink.change(message, 0), &GONE);
                let step = format!("delete the {}", described(&route));
                done.map_err(|error| failed(&known.name, step, error))?;
            }
            self.routes.remove(at);
        }
        Ok(())
    }

    fn add_routes(&mut self, wanted: &Wanted, netlink: &mut Netlink) -> Result<(), Failure> {
        for route in &wanted.routes {
            let Some(known) = self.interfaces.get(&route.id) else {
                continue;
            };
            // A link that is down has no routes; once it's up it changes, and they come.
            if self.routes.contains(route) || known.link.is_some_and(|link| !link.up) {
                continue;
            }
            let message = Message::NewRoute(messages::route(known.index, route));
            // To replace would be to replace a like route by another interface.
            let done = netlink.change(message, NLM_F_CREATE | NLM_F_APPEND);
            let step = format!("add the {}", described(route));
            allow(done, &[libc::EEXIST]).map_err(|error| failed(&known.name, step, error))?;
            self.routes.push(*route);
        }
        Ok(())
    }

    fn delete_rules(&mut self, wanted: &Wanted, netlink: &mut Netlink) -> Result<(), Failure> {
        for at in (0..self.rules.len()).rev() {
            let rule = &self.rules[at];
            if wanted.rules.contains(rule) {
                continue;
            }
            let done = netlink.change(Message::DelRule(rule.message()), 0);
            allow(done, &GONE).map_err(of_rule("delete", rule))?;
            self.rules.remove(at);
        }
        Ok(())
    }

    fn add_rules(&mut self, wanted: &Wanted, netlink: &mut Netlink) -> Result<(), Failure> {
        for rule in &wanted.rules {
            if self.rules.contains(rule) {
                continue;
            }
            let message = Message::NewRule(rule.message());
            let done = netlink.change(message, NLM_F_CREATE | NLM_F_EXCL);
            allow(done, &[libc::EEXIST]).map_err(of_rule("add", rule))?;
            self.rules.push(rule.clone());
        }
        Ok(())
    }

    fn delete_neighbours(&mut self, wanted: &Wanted, netlink: &mut Netlink) -> Result<(), Failure> {
        for at in (0..self.neighbours.len()).rev() {
            let neighbour = self.neighbours[at];
            if wanted.neighbours.contains(&neighbour) {
                continue;
            }
            if let Some(known) = self.interfaces.get(&neighbour.id) {
                let message = messages::neighbour(known.index, &neighbour);
                let done = allow(netlink.change(Message::DelNeighbour(message), 0), &GONE);
                let step = format!("delete the neighbour {}", neighbour.ip);
                done.map_err(|error| failed(&known.name, step, error))?;
            }
            self.neighbours.remove(at);
        }
        Ok(())
    }

    fn add_neighbours(&mut self, wanted: &Wanted, netlink: &mut Netlink) -> Result<(), Failure> {
        for neighbour in &wanted.neighbours {
            let Some(known) = self.interfaces.get(&neighbour.id) else {
                continue;
            };
            if self.neighbours.contains(neighbour) {
                continue;
            }
            let message = Message::NewNeighbour(messages::neighbour(known.index, neighbour));
            let done = netlink.change(message, NLM_F_CREATE | NLM_F_REPLACE);
            let step = format!("add the neighbour {}", neighbour.ip);
            done.map_err(|error| failed(&known.name, step, error))?;
            self.neighbours.push(*neighbour);
        }
        Ok(())
    }
}

fn of_rule(verb: &str, rule: &Rule) -> impl FnOnce(NetlinkError) -> Failure {
    let step = format!(
        "{verb} the routing rule {} of table {}",
        rule.priority, rule.table
    );
    move |error| Failure::internal(step, error)
}

fn described(route: &Route) -> String {
    let mut to = format!("route to {}/{}", route.destination, route.prefix_length);
    if route.table != u32::from(RouteHeader::RT_TABLE_MAIN) {
        to = format!("{to} of table {}", route.table);
    }
    match route.gateway {
        Some(gateway) => format!("{to} by {gateway}"),
        None => to,
    }
}

fn failed(interface: &str, step: String, error: NetlinkError) -> Failure {
    Failure::internal(format!("interface {interface:?}: {step}"), error)
}

/// The number of a device in the calling thread's network namespace.
fn index_of(name: &str) -> Option<u32> {
    let name = CString::new(name).ok()?;
    // SAFETY: the name is a C string that lives across the call.
    let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
    (index != 0).then_some(index)
}
