//! A pod's network in the words of the agent's contract.

use super::rules::Rule;
use super::state::{Address, NetworkState};
use bulkhead_proto::agent::{
    NetworkAddress, NetworkInterface, NetworkNeighbour, NetworkRoute, NetworkRule,
    SetNetworkRequest,
};
use std::net::IpAddr;

/// An interface's device in the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Device {
    /// What stands for the interface in requests.
    pub id: u32,
    /// What the guest called it at first.
    pub name: String,
}

/// All of `state` that lies on interfaces for which `device` knows one.
pub(super) fn request(
    state: &NetworkState,
    device: impl Fn(u32) -> Option<Device>,
) -> SetNetworkRequest {
    let id = |interface: u32| device(interface).map(|device| device.id);
    let interfaces = state.interfaces.iter().filter_map(|(index, interface)| {
        let device = device(*index)?;
        Some(NetworkInterface {
            id: device.id,
            device: device.name,
            name: interface.name.clone(),
            mtu: interface.mtu,
            up: interface.up,
            arp: interface.arp,
            addresses: interface.addresses.iter().map(address).collect(),
            ..Default::default()
        })
    });
    let routes = state.routes.iter().filter_map(|route| {
        Some(NetworkRoute {
            id: id(route.interface)?,
            destination: bytes(route.destination),
            prefix_length: route.prefix_length.into(),
            gateway: optional(route.gateway),
            source: optional(route.source),
            scope: route.scope.into(),
            priority: route.priority,
            mtu: route.mtu,
            onlink: route.onlink,
            table: route.table,
            ..Default::default()
        })
    });
    let neighbours = state.neighbours.iter().filter_map(|neighbour| {
        Some(NetworkNeighbour {
            id: id(neighbour.interface)?,
            ip: bytes(neighbour.ip),
            mac: neighbour.mac.to_vec(),
            ..Default::default()
        })
    });
    SetNetworkRequest {
        interfaces: interfaces.collect(),
        routes: routes.collect(),
        neighbours: neighbours.collect(),
        rules: state.rules.iter().map(rule).collect(),
        ..Default::default()
    }
}

fn address(address: &Address) -> NetworkAddress {
    NetworkAddress {
        ip: bytes(address.ip),
        prefix_length: address.prefix_length.into(),
        peer: optional(address.peer),
        broadcast: optional(address.broadcast),
        scope: address.scope.into(),
        ..Default::default()
    }
}

fn rule(rule: &Rule) -> NetworkRule {
    NetworkRule {
        source: bytes(rule.source),
        source_prefix_length: rule.source_prefix_length.into(),
        destination: bytes(rule.destination),
        destination_prefix_length: rule.destination_prefix_length.into(),
        input: rule.input.clone(),
        output: rule.output.clone(),
        mark: rule.mark,
        mark_mask: rule.mark_mask,
        inverted: rule.inverted,
        priority: rule.priority,
        table: rule.table,
        suppressed_prefix_length: rule.suppressed.map_or(0, |length| length.saturating_add(1)),
        ..Default::default()
    }
}

fn optional(ip: Option<IpAddr>) -> Vec<u8> {
    ip.map(bytes).unwrap_or_default()
}

fn bytes(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(four) => four.octets().to_vec(),
        IpAddr::V6(six) => six.octets().to_vec(),
    }
}
