//! *Converges*: within the bound all is as it should be, and no client waits for an answer any more.
//!
//! That the members agree in time is found by the run itself ([`crate::world::World::unsettled`]), which waits for it.

use std::time::Duration;

use super::{Checker, Findings};
use crate::world::World;
use crate::world::traffic::Profile;

/// See the module's doc.
#[derive(Debug)]
pub struct Converges;

/// A client whose packet has waited this long at rest waits for ever: retransmissions come every 1.6 s at the least.
const WAITS: Duration = Duration::from_secs(8);

impl Checker for Converges {
    fn name(&self) -> &'static str {
        "converges"
    }

    fn settled(&mut self, world: &World, findings: &mut Findings) {
        // Before that nobody could serve anybody.
        let steady = world.running().map(|node| world.nodes[node].steady_since).min().unwrap_or_default();
        for (number, flow) in world.flows.iter().enumerate() {
            let waits = flow.waiting_since.map(|since| world.now.saturating_sub(since.max(steady)));
            // A datagram that is lost is not sent again: the next one is answered.
            let most = match flow.profile {
                Profile::Datagrams(every) => (WAITS * world.settings.slowness()).max(every * 2),
                _ => WAITS * world.settings.slowness(),
            };
            // What was lost with all its holders may have been guessed to be a dead backend's.
            if flow.is_live() && !flow.lost && waits.is_some_and(|waits| waits > most) {
                findings.violate(format!("flow {number} ({}) waits for an answer since {waits:?}", flow.key));
            }
        }
    }
}
