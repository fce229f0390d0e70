//! *Diverts*: who died or stands still gets no more packets from the others soon after, long before anybody may confirm that it is down.

use std::collections::BTreeMap;
use std::time::Duration;

use phalanx_flow::decide::Outcome;
use phalanx_flow::{MemberSlot, Verdict};
use phalanx_membership::View;

use super::{Checker, Findings};
use crate::schedule::Change;
use crate::world::{Ruling, World};

/// See the module's doc.
#[derive(Debug, Default)]
pub struct Diverts {
    /// When messages among members were last lost or late.
    noise: Option<Duration>,
    /// Since when members distrust themselves, by their place, and then since when they do so though they doubt few: they hear others
    /// again, and wait for the last.
    distrusting: BTreeMap<(usize, bool), Duration>,
}

/// From a member's last sign of life until all others suspect it and send its packets to the next in their rows.
///
/// Whoever is first to probe it suspects it a probe period later and spreads that; confirmation takes 2 s more.
/// Among members far apart both take longer.
pub const DIVERTED: Duration = Duration::from_millis(1_000);

/// Who was cut off from others may be suspected by them, and confirmed down, after it hears them again; until it has joined again it may
/// suspect too many to trust itself.
const QUIET: Duration = Duration::from_secs(8);

/// If who has this view distrusts itself: whether it doubts less than half of the others all the same.
fn distrusts(view: &View) -> Option<bool> {
    let doubted = view.members.iter().filter(|member| member.is_doubted()).count();
    view.distrusts_itself.then_some(doubted * 2 < view.members.len().saturating_sub(1))
}

impl Checker for Diverts {
    fn name(&self) -> &'static str {
        "diverts"
    }

    fn changed(&mut self, world: &World, _: &Change, findings: &mut Findings) {
        self.sampled(world, findings);
    }

    fn sampled(&mut self, world: &World, _: &mut Findings) {
        if world.is_noisy() {
            self.noise = Some(world.now);
        }
        for (node, member) in world.nodes.iter().enumerate() {
            let distrusts = member.process.as_ref().and_then(|process| distrusts(&process.last_view));
            for few in [false, true] {
                if distrusts == Some(few) {
                    self.distrusting.entry((node, few)).or_insert(world.now);
                } else {
                    self.distrusting.remove(&(node, few));
                }
            }
        }
    }

    fn ruled(&mut self, world: &World, ruling: &Ruling<'_>, findings: &mut Findings) {
        let (Verdict::HandOff(hand_off), Outcome::HandedOff) =
            (ruling.decision.verdict, ruling.decision.outcome)
        else {
            return;
        };
        let sender = &world.nodes[ruling.node];
        let (Some(forwarder), Some(process)) = (&sender.forwarder, &sender.process) else { return };
        let plan = forwarder.plan();
        let node_of = |slot: MemberSlot| plan.member(slot).and_then(|member| world.node_of(member.id));
        let Some(to) = node_of(hand_off.to) else { return };
        let Some(silent) = world.nodes[to].silent_since.map(|since| world.now.saturating_sub(since)) else {
            return;
        };
        let steady = world.now.saturating_sub(sender.steady_since);
        let (diverted, quiet) = (DIVERTED * world.settings.slowness(), QUIET * world.settings.slowness());
        if silent < diverted || steady < diverted || self.noise.is_some_and(|noise| world.now < noise + quiet)
        {
            return;
        }
        // A lost probe or two, and it suspects another one until that has said that it lives.
        if let Some(few) = distrusts(&process.last_view) {
            let since = self.distrusting.get(&(ruling.node, few)).copied().unwrap_or(world.now);
            if world.now.saturating_sub(since) < diverted {
                return;
            }
        }
        // Who has just come, nobody may have heard of yet.
        let lives = |node: usize| {
            let node = &world.nodes[node];
            node.runs() && world.now.saturating_sub(node.steady_since) >= diverted
        };
        // Who suspects half of the others or more distrusts itself instead.
        let known = process.last_view.members.iter().filter_map(|member| world.node_of(member.id));
        let (mut count, mut dead) = (0_usize, 0_usize);
        for node in known {
            count += 1;
            dead += usize::from(!lives(node));
        }
        let key = &ruling.decision.key;
        let row = plan.plan.rows[plan.plan.row_function.row_of(key, ruling.decision.hash) as usize];
        let next = [row.owner(), row.backup()].into_iter().filter_map(node_of).find(|node| *node != to);
        // Who hands off is no other holder while it has no lease.
        let lives = next.is_some_and(|node| lives(node) && (node != ruling.node || forwarder.is_leased()));
        if lives && dead * 2 < count.saturating_sub(1) {
            findings.violate(format!(
                "m{} hands flow {} off to m{}, which is silent for {silent:?}",
                ruling.node + 1,
                ruling.packet.flow,
                to + 1
            ));
        }
    }
}
