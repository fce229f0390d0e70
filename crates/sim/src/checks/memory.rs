//! *No immortal*: what ended or idled is gone everywhere. *No growth*: nothing leaks.

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

/// Nothing leaks: when all flows are gone, no member waits for anything, and none knows more than there is.
#[derive(Debug)]
pub struct NoGrowth;

impl Checker for NoGrowth {
    fn name(&self) -> &'static str {
        "no-growth"
    }

    fn emptied(&mut self, world: &World, findings: &mut Findings) {
        for node in world.running() {
            let Some(process) = &world.nodes[node].process else { continue };
            let replicator = process.control.replicator();
            let name = node + 1;
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
