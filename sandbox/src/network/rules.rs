//! Rules of policy routing (ip-rule(8)): which routing table is looked at for what.

use bulkhead_netlink::route::AddressFamily;
use bulkhead_netlink::route::rule::{RuleAction, RuleAttribute, RuleFlags, RuleMessage};
use std::net::IpAddr;

/// Those that the kernel makes by itself: of the tables local, main and default.
const OWN: [(u32, u32); 3] = [(0, 255), (32_766, 254), (32_767, 253)];

/// A rule that leads to a table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Rule {
    pub source: IpAddr,
    pub source_prefix_length: u8,
    pub destination: IpAddr,
    pub destination_prefix_length: u8,
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

/// Asks for those of a family.
pub(super) fn request(family: AddressFamily) -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header.family = family;
    message
}

/// None for the kernel's own.
///
/// # Errors
/// What it is, if it asks for more than a guest is told of: half of a rule would be another one.
pub(super) fn rule(message: &RuleMessage) -> Result<Option<Rule>, String> {
    let header = &message.header;
    let unspecified = match header.family {
        AddressFamily::Inet => IpAddr::from([0; 4]),
        AddressFamily::Inet6 => IpAddr::from([0; 16]),
        _ => return Ok(None),
    };
    let mut rule = Rule {
        source: unspecified,
        source_prefix_length: header.src_len,
        destination: unspecified,
        destination_prefix_length: header.dst_len,
        input: String::new(),
        output: String::new(),
        mark: 0,
        mark_mask: 0,
        inverted: header.flags.contains(RuleFlags::Invert),
        priority: 0,
        table: header.table.into(),
        suppressed: None,
    };
    let mut unknown = None;
    for attribute in &message.attributes {
        match attribute {
            RuleAttribute::Source(ip) => rule.source = *ip,
            RuleAttribute::Destination(ip) => rule.destination = *ip,
            RuleAttribute::Iifname(name) => rule.input.clone_from(name),
            RuleAttribute::Oifname(name) => rule.output.clone_from(name),
            RuleAttribute::FwMark(mark) => rule.mark = *mark,
            RuleAttribute::FwMask(mask) => rule.mark_mask = *mask,
            RuleAttribute::Priority(priority) => rule.priority = *priority,
            RuleAttribute::Table(table) => rule.table = *table,
            // All ones: none is suppressed.
            RuleAttribute::SuppressPrefixLen(length) => {
                rule.suppressed = (*length != u32::MAX).then_some(*length);
            }
            RuleAttribute::SuppressIfGroup(u32::MAX) | RuleAttribute::Protocol(_) => {}
            other => unknown = Some(format!("{other:?}")),
        }
    }
    if OWN.contains(&(rule.priority, rule.table)) {
        return Ok(None);
    }
    if header.action != RuleAction::ToTable {
        unknown = Some(format!("{:?}", header.action));
    } else if header.tos != 0 {
        unknown = Some(format!("tos {:#x}", header.tos));
    }
    match unknown {
        None => Ok(Some(rule)),
        Some(unknown) => Err(format!("rule {} with {unknown}", rule.priority)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(priority: u32, more: Vec<RuleAttribute>) -> RuleMessage {
        let mut message = request(AddressFamily::Inet);
        message.header.action = RuleAction::ToTable;
        message.header.src_len = 32;
        message.attributes = vec![
            RuleAttribute::Priority(priority),
            RuleAttribute::Table(100),
            RuleAttribute::Source([10, 9, 0, 2].into()),
            RuleAttribute::SuppressPrefixLen(u32::MAX),
            RuleAttribute::SuppressIfGroup(u32::MAX),
        ];
        message.attributes.extend(more);
        message
    }

    #[test]
    fn a_rule_is_followed_whole_or_not_at_all() {
        let plain = rule(&message(9, Vec::new())).unwrap().unwrap();
        assert_eq!(
            (plain.priority, plain.table, plain.source_prefix_length),
            (9, 100, 32)
        );
        assert_eq!(plain.suppressed, None);
        let more = vec![
            RuleAttribute::FwMark(5),
            RuleAttribute::FwMask(7),
            RuleAttribute::Oifname("eth1".into()),
            RuleAttribute::SuppressPrefixLen(0),
        ];
        let more = rule(&message(9, more)).unwrap().unwrap();
        assert_eq!((more.mark, more.mark_mask), (5, 7));
        assert_eq!((more.output.as_str(), more.suppressed), ("eth1", Some(0)));
        for unknown in [RuleAttribute::L3MDev(true), RuleAttribute::TunId(1)] {
            let error = rule(&message(9, vec![unknown])).unwrap_err();
            assert!(error.starts_with("rule 9 with "), "{error}");
        }
        let mut other = message(9, Vec::new());
        other.header.action = RuleAction::Blackhole;
        assert!(rule(&other).unwrap_err().contains("Blackhole"));
        other = message(9, Vec::new());
        other.header.tos = 4;
        assert!(rule(&other).is_err());
    }

    #[test]
    fn the_kernels_own_are_no_rules_of_the_pods() {
        let mut main = message(32_766, vec![RuleAttribute::Table(254)]);
        main.header.src_len = 0;
        assert_eq!(rule(&main), Ok(None));
    }
}
