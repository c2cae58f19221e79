//! Rules of policy routing (ip-rule(8)): which routing table is looked at for what.

use super::wanted;
use crate::error::Failure;
use bulkhead_netlink::route::rule::{RuleAction, RuleAttribute, RuleFlags, RuleMessage};
use bulkhead_proto::agent::NetworkRule;
use std::net::IpAddr;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    pub source: (IpAddr, u8),
    pub destination: (IpAddr, u8),
    /// Names of interfaces, or empty.
    pub input: String,
    pub output: String,
    pub mark: u32,
    pub mark_mask: u32,
    pub inverted: bool,
    pub priority: u32,
    pub table: u32,
    /// Routes with prefixes up to so long don't count.
    pub suppressed: Option<u32>,
}

impl Rule {
    /// Checks one.
    pub fn new(rule: &NetworkRule) -> Result<Self, Failure> {
        let what = || format!("routing rule {}", rule.priority);
        let invalid = |why| Failure::invalid(what(), why);
        let network = |ip: &[u8], length| {
            let ip = wanted::ip(ip)?;
            Ok((ip, wanted::prefix_length(ip, length)?))
        };
        let source = network(&rule.source, rule.source_prefix_length).map_err(invalid)?;
        let destination = network(&rule.destination, rule.destination_prefix_length);
        let destination = destination.map_err(invalid)?;
        if source.0.is_ipv4() != destination.0.is_ipv4() {
            let why = format!("{} and {} are of two families", source.0, destination.0);
            return Err(invalid(why));
        }
        for name in [&rule.input, &rule.output] {
            if !name.is_empty() && !wanted::is_name(name) {
                return Err(invalid(format!("{name:?} is no name of an interface")));
            }
        }
        Ok(Self {
            source,
            destination,
            input: rule.input.clone(),
            output: rule.output.clone(),
            mark: rule.mark,
            mark_mask: rule.mark_mask,
            inverted: rule.inverted,
            priority: rule.priority,
            table: rule.table,
            suppressed: rule.suppressed_prefix_length.checked_sub(1),
        })
    }

    /// In the words of rtnetlink(7).
    pub fn message(&self) -> RuleMessage {
        let mut message = RuleMessage::default();
        message.header.family = super::messages::family(self.source.0);
        message.header.src_len = self.source.1;
        message.header.dst_len = self.destination.1;
        message.header.action = RuleAction::ToTable;
        message.header.flags.set(RuleFlags::Invert, self.inverted);
        let mut attributes = vec![
            RuleAttribute::Priority(self.priority),
            RuleAttribute::Table(self.table),
        ];
        if self.source.1 > 0 {
            attributes.push(RuleAttribute::Source(self.source.0));
        }
        if self.destination.1 > 0 {
            attributes.push(RuleAttribute::Destination(self.destination.0));
        }
        if !self.input.is_empty() {
            attributes.push(RuleAttribute::Iifname(self.input.clone()));
        }
        if !self.output.is_empty() {
            attributes.push(RuleAttribute::Oifname(self.output.clone()));
        }
        if self.mark != 0 || self.mark_mask != 0 {
            attributes.push(RuleAttribute::FwMark(self.mark));
            attributes.push(RuleAttribute::FwMask(self.mark_mask));
        }
        attributes.extend(self.suppressed.map(RuleAttribute::SuppressPrefixLen));
        message.attributes = attributes;
        message
    }
}
