//! *One owner*: after quiescence every member names the same holders for every row, to its forwarder too; and at no time does a forwarder
//! take a flow as owner whose daemon has not run for so long that another member has taken over its rows.

use phalanx_flow::decide::Action;
use phalanx_flow::{MemberId, MemberSlot};

use super::{Checker, Findings};
use crate::world::{Ruling, World};

/// See the module's doc.
#[derive(Debug)]
pub struct OneOwner;

type Ranks = Vec<[Option<MemberId>; 3]>;

impl Checker for OneOwner {
    fn name(&self) -> &'static str {
        "one-owner"
    }

    fn ruled(&mut self, world: &World, ruling: &Ruling<'_>, findings: &mut Findings) {
        let node = &world.nodes[ruling.node];
        let silent = world.now.saturating_sub(node.ran);
        // What is presumed of others' flows is told to nobody.
        let takes = ruling.decision.action == Action::Insert && ruling.decision.event.is_some();
        if !takes || silent < world.settings.timing.confirm_after {
            return;
        }
        let heir = world.running().find(|other| {
            let view = world.nodes[*other].process.as_ref().map(|process| &process.last_view);
            *other != ruling.node
                && world.linked(*other, ruling.node)
                && view.is_some_and(|view| view.get(node.id).is_none())
        });
        if let Some(heir) = heir {
            findings.violate(format!(
                "m{} takes flow {} though its daemon has not run for {silent:?} and m{} holds it to be down",
                ruling.node + 1,
                ruling.packet.flow,
                heir + 1
            ));
        }
    }

    fn settled(&mut self, world: &World, findings: &mut Findings) {
        let mut first: Option<(usize, Ranks)> = None;
        for node in world.running() {
            let Some(forwarder) = &world.nodes[node].forwarder else { continue };
            let plan = forwarder.plan();
            let id = |slot: MemberSlot| plan.member(slot).map(|member| member.id);
            let ranks: Ranks = plan.plan.rows.iter().map(|row| row.ranks.map(id)).collect();
            match &first {
                None => first = Some((node, ranks)),
                Some((other, expected)) => {
                    let row = ranks.iter().zip(expected).position(|(a, b)| a != b);
                    if let Some(row) = row {
                        findings.violate(format!(
                            "row {row} of m{} is {:?}, of m{} {:?}",
                            node + 1,
                            ranks[row],
                            other + 1,
                            expected[row]
                        ));
                    }
                }
            }
            if !forwarder.is_leased() {
                findings.violate(format!("m{} has no lease", node + 1));
            }
        }
    }
}
