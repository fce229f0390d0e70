//! *No loop*: a packet is handed off at most twice, whatever the views, once more to a holder that is asked for what nobody on its way has
//! known, and once more back to who has its flow.

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
        let asks = ruling.decision.outcome == Outcome::Asked;
        let more = if returns { 2 } else { usize::from(asks) };
        if hand_offs >= usize::from(MAX_HOPS) + more {
            findings.violate(format!("flow {} by {:?}", ruling.packet.flow, ruling.packet.path));
        }
    }
}
