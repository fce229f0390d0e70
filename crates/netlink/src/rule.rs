//! Rules that choose a routing table.

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};

use crate::{Family, Netlink, Result};

/// "Packets with this mark use this table."
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Rule {
    /// IPv4 or IPv6: each has its own rules.
    pub family: Family,
    /// The firewall mark; 0 matches every packet.
    pub mark: u32,
    /// The table.
    pub table: u32,
    /// Lower numbers are looked at first; the main table's rule is 32,766.
    pub priority: u32,
}

impl Netlink {
    /// Adds a rule.
    pub fn add_rule(&mut self, rule: &Rule) -> Result<()> {
        self.request(
            &|| format!("add the rule for mark {:#x} to table {}", rule.mark, rule.table),
            RouteNetlinkMessage::NewRule(rule_message(rule)),
            NLM_F_CREATE | NLM_F_EXCL,
        )
        .map(drop)
    }

    /// Deletes a rule.
    pub fn delete_rule(&mut self, rule: &Rule) -> Result<()> {
        self.request(
            &|| format!("delete the rule for mark {:#x} to table {}", rule.mark, rule.table),
            RouteNetlinkMessage::DelRule(rule_message(rule)),
            0,
        )
        .map(drop)
    }
}

fn rule_message(rule: &Rule) -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header.family = rule.family.to_kernel();
    message.header.action = RuleAction::ToTable;
    message.header.table = u8::try_from(rule.table).unwrap_or(0);
    message.attributes.push(RuleAttribute::Priority(rule.priority));
    message.attributes.push(RuleAttribute::Table(rule.table));
    if rule.mark != 0 {
        message.attributes.push(RuleAttribute::FwMark(rule.mark));
    }
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_without_a_mark_matches_on_none() {
        let mut rule = Rule { family: Family::V4, mark: 0, table: 300, priority: 100 };
        let has_mark = |rule: &Rule| {
            rule_message(rule)
                .attributes
                .iter()
                .any(|attribute| matches!(attribute, RuleAttribute::FwMark(_)))
        };
        assert!(!has_mark(&rule));
        rule.mark = 5;
        assert!(has_mark(&rule));
    }
}
