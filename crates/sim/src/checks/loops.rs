//! *No loop*: a packet is handed off at most twice, whatever the views, and a SYN once more, back to who has recorded it.

use phalanx_flow::Verdict;
use phalanx_flow::decide::MAX_HOPS;

use super::{Checker, Findings};
use crate::world::event::Kind;
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
        let allowed = usize::from(MAX_HOPS) + usize::from(ruling.packet.kind == Kind::Syn);
        if matches!(ruling.decision.verdict, Verdict::HandOff(_)) && hand_offs >= allowed {
            findings.violate(format!("flow {} by {:?}", ruling.packet.flow, ruling.packet.path));
        }
    }
}
