//! *No immortal*: what ended or idled is gone everywhere. *No growth*: nothing leaks.

use std::collections::BTreeMap;

use phalanx_forwarder::Forwarder as _;

use super::{Checker, Findings};
use crate::world::World;

/// What ended or idled is gone everywhere.
#[derive(Debug)]
pub struct NoImmortal;

impl Checker for NoImmortal {
    fn name(&self) -> &'static str {
        "no-immortal"
    }

    fn emptied(&mut self, world: &World, findings: &mut Findings) {
        for (node, member) in world.nodes.iter().enumerate() {
            let Some(forwarder) = &member.forwarder else { continue };
            for record in forwarder.flows() {
                findings.violate(format!("m{} still has {record:?}", node + 1));
            }
            let cached = forwarder.counters().cached;
            if cached > 0 {
                findings.violate(format!("m{} still has {cached} flows in its cache", node + 1));
            }
        }
    }
}

/// Nothing leaks: when all flows are gone, no member waits for anything, and none knows more than there is; and what it remembers does not
/// grow from one such moment to the next.
#[derive(Debug, Default)]
pub struct NoGrowth {
    /// What each member remembered the first time, by its place: things the replicator keeps, and the membership written out in characters.
    first: BTreeMap<usize, [usize; 2]>,
}

/// What may come and go at such a moment: tombstones of the last flows; and numbers that have become longer, members that have come.
const SLACK: [usize; 2] = [60, 20_000];

impl NoGrowth {
    fn grows(&mut self, world: &World, node: usize, findings: &mut Findings) {
        let Some(process) = &world.nodes[node].process else { return };
        let remembered =
            [process.control.replicator().remembered(), format!("{:?}", process.membership).len()];
        let first = self.first.entry(node).or_insert(remembered);
        for (at, kind) in ["things in its replicator", "characters of membership"].into_iter().enumerate() {
            if remembered[at] > first[at] + SLACK[at] {
                findings.violate(format!(
                    "m{} has {} {kind}, at first {}",
                    node + 1,
                    remembered[at],
                    first[at]
                ));
            }
        }
    }
}

impl Checker for NoGrowth {
    fn name(&self) -> &'static str {
        "no-growth"
    }

    fn emptied(&mut self, world: &World, findings: &mut Findings) {
        for node in world.running() {
            let Some(process) = &world.nodes[node].process else { continue };
            let replicator = process.control.replicator();
            let name = node + 1;
            self.grows(world, node, findings);
            if replicator.unprotected() > 0 {
                findings.violate(format!("m{name} counts {} unprotected flows", replicator.unprotected()));
            }
            if replicator.waiting_idle() > 0 {
                findings
                    .violate(format!("m{name} waits for news of {} idle flows", replicator.waiting_idle()));
            }
            for member in &process.last_view.members {
                let (waiting, flying) = replicator.backlog(member.id);
                if waiting + flying > 0 {
                    findings.violate(format!("m{name} has {waiting} + {flying} things for m{}", member.id));
                }
            }
        }
    }
}
