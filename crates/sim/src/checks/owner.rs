//! *One owner*: after quiescence every member names the same holders for every row, to its forwarder too.

use phalanx_flow::{MemberId, MemberSlot};

use super::{Checker, Findings};
use crate::world::World;

/// See the module's doc.
#[derive(Debug)]
pub struct OneOwner;

type Ranks = Vec<[Option<MemberId>; 3]>;

impl Checker for OneOwner {
    fn name(&self) -> &'static str {
        "one-owner"
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
