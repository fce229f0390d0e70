//! *No loop*: a packet is handed off at most twice, whatever the views, and once more only back to who has its flow, or to a holder that is
//! asked for what nobody else knows.

use phalanx_flow::Verdict;
use phalanx_flow::decide::{MAX_HOPS, Outcome};

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
        let Verdict::HandOff(hand_off) = ruling.decision.verdict else { return };
        // To whom the sender passed over, nobody else would say that nobody was.
        let returns = ruling.arrival.known && !hand_off.known && !hand_off.bypassed.is_some();
        // And what nobody has known is asked of one holder more.
        let asks = ruling.decision.outcome == Outcome::Asked;
        if hand_offs >= usize::from(MAX_HOPS) + usize::from(returns || asks) {
            findings.violate(format!("flow {} by {:?}", ruling.packet.flow, ruling.packet.path));
        }
    }
}
