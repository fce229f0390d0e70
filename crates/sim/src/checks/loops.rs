//! *No loop*: a packet is handed off at most twice, whatever the views.

use phalanx_flow::Verdict;
use phalanx_flow::decide::MAX_HOPS;

use super::{Checker, Findings};
use crate::world::{Ruling, World};

/// See the module's doc.
#[derive(Debug)]
pub struct NoLoop;

impl Checker for NoLoop {
    fn name(&self) -> &'static str {
        "no-loop"
    }

    fn ruled(&mut self, _: &World, ruling: &Ruling<'_>, findings: &mut Findings) {
        let hand_offs = ruling.packet.path.len() - 1;
        if matches!(ruling.decision.verdict, Verdict::HandOff(_)) && hand_offs >= usize::from(MAX_HOPS) {
            findings.violate(format!("flow {} by {:?}", ruling.packet.flow, ruling.packet.path));
        }
    }
}
