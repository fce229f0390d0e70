//! *Sticky*: no packet of an open connection reaches another backend while one holder lives.
//!
//! A connection that goes astray is excused only if its state was lost through no fault of the members: at the moment of some change
//! no running member that holds it could be reached any more, and either more than one member was lost at once, or the last trouble (or
//! the connection's opening) was so recent that its second holder could not have it yet.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use phalanx_flow::{FlowKey, FlowState, Record};
use phalanx_membership::MemberView;

use super::{Checker, Findings};
use crate::schedule::Change;
use crate::world::World;
use crate::world::event::Packet;
use crate::world::node::backend_number;
use crate::world::traffic::Phase;

/// How long replication of one flow may take where all is well.
pub(super) const REPLICATED: Duration = Duration::from_millis(500);

/// How long after a change a second holder may still be missing: detection, confirmation, transfer.
const RESTORED: Duration = Duration::from_millis(7_500);

/// How long members that were apart may take to believe in each other again: retries to who is down, greetings, the join.
const MERGED: Duration = Duration::from_secs(25);

/// See the module's doc.
#[derive(Debug, Default)]
pub struct Sticky {
    /// When the last change was that may leave flows with one holder.
    trouble: Duration,
    /// Flows that members lost, and by when they must have found them again (never, if nobody has them).
    lost: Vec<Option<Loss>>,
    /// Who held what before the change that is carried out now.
    reach: Vec<BTreeSet<usize>>,
    /// Flows, by place and life, for which a full table had no room when something changed: what became of them since is its doing, also
    /// when its member is gone. Until they are replicated.
    roomless: BTreeMap<usize, u32>,
    /// Since when, and until when, what some members learn may not be known to others.
    apart: Option<(Duration, Duration)>,
}

#[derive(Clone, Debug)]
struct Loss {
    /// Of which use of the tuple.
    life: u32,
    /// Members that could not reach a holder; empty: there is none.
    by: BTreeSet<usize>,
    until: Option<Duration>,
}

/// The members with a daemon that have the flow as it is and are to hold it by their table: what was sent ahead of a change is nobody's
/// to ask for yet, and what former holders still have is kept as long as may be, but promised to nobody.
fn holders(world: &World, flow: usize) -> BTreeSet<usize> {
    let entry = &world.flows[flow];
    world
        .running()
        .filter(|node| {
            record(world, *node, &entry.key)
                .is_some_and(|record| Some(backend_number(&record.backend)) == entry.backend)
                && is_to_hold(world, *node, &entry.key)
        })
        .collect()
}

fn record(world: &World, node: usize, key: &FlowKey) -> Option<Record> {
    let forwarder = world.nodes[node].forwarder.as_ref()?;
    phalanx_forwarder::Forwarder::get(&**forwarder, key)
}

/// Whether the table that is in force at `node` gives it the flow.
fn is_to_hold(world: &World, node: usize, key: &FlowKey) -> bool {
    let process = world.nodes[node].process.as_ref();
    process.is_some_and(|process| process.control.planner().gives_now(world.nodes[node].id, key))
}

/// Whether the flow is one that a full table could not take: it goes on by the consistent choice, and that is counted (design §4).
fn found_no_room(world: &World, node: usize, key: &FlowKey, backend: Option<usize>) -> bool {
    let Some(forwarder) = &world.nodes[node].forwarder else { return false };
    let full = phalanx_forwarder::Forwarder::counters(&**forwarder).table_full > 0;
    let (id, process) = (world.nodes[node].id, &world.nodes[node].process);
    let has_row = process.as_ref().is_none_or(|process| process.control.planner().gives(id, key));
    let record = phalanx_forwarder::Forwarder::get(&**forwarder, key);
    // What the table of half-open flows has is replicated to nobody.
    let has_it = record.is_some_and(|record| {
        record.state != FlowState::HalfOpen && Some(backend_number(&record.backend)) == backend
    });
    full && has_row && !has_it && world.nodes[node].is_cramped()
}

/// When a packet of the connection was last forwarded by a member from which those that this packet came by have heard of it, or may now.
fn last_heard_of(world: &World, packet: &Packet) -> Duration {
    let flow = &world.flows[packet.flow];
    let told = flow.unheard.iter().filter(|(node, (life, _))| {
        let may_tell = |by: &u16| world.linked(usize::from(*by), **node);
        world.nodes[**node].runs() && world.nodes[**node].life() == *life && packet.path.iter().any(may_tell)
    });
    told.map(|(_, (_, at))| *at).fold(flow.forwarded, Duration::max)
}

/// For each member, which members it exchanges packets with, or would if it did not stand still; itself among them.
///
/// Who was `apart` reaches another when it has admitted it: before that, neither asks the other for anything.
fn reach(world: &World, apart: bool) -> Vec<BTreeSet<usize>> {
    (0..world.nodes.len())
        .map(|from| {
            let Some(process) = &world.nodes[from].process else { return BTreeSet::new() };
            let knows = |to: &usize| {
                let known = process.last_view.get(world.nodes[*to].id);
                !apart || known.is_some_and(MemberView::is_in_force)
            };
            world.running().filter(|to| world.linked(from, *to) && knows(to)).chain([from]).collect()
        })
        .collect()
}

fn is_trouble(change: &Change) -> bool {
    !matches!(change, Change::Rehash | Change::Burst(_))
}

impl Sticky {
    fn were_apart(&self, world: &World) -> bool {
        self.apart.is_some_and(|(_, until)| until >= world.now)
    }

    /// Who is out of somebody's reach now may have recorded a SYN of the connection a moment ago, and told nobody yet.
    fn note_opening(&mut self, world: &World, flow: usize, after: &[BTreeSet<usize>]) {
        let lost_some =
            |node: &usize| self.reach.get(*node).is_some_and(|before| !before.is_subset(&after[*node]));
        let by: BTreeSet<usize> =
            (0..after.len()).filter(|node| !after[*node].is_empty()).filter(lost_some).collect();
        if !by.is_empty() {
            let until = Some(world.now + MERGED * world.settings.slowness());
            self.lost[flow] = Some(Loss { life: world.flows[flow].life, by, until });
        }
    }

    fn note_roomless(&mut self, world: &World) {
        for (number, flow) in world.flows.iter().enumerate().filter(|(_, flow)| flow.backend.is_some()) {
            if (0..world.nodes.len()).any(|node| found_no_room(world, node, &flow.key, flow.backend)) {
                self.roomless.insert(number, flow.life);
            } else {
                // Who has it as half-open forgets it soon.
                let held = holders(world, number);
                let open = held.iter().filter(|node| {
                    let record = record(world, **node, &flow.key);
                    record.is_some_and(|record| record.state != FlowState::HalfOpen)
                });
                if open.count() > 1 {
                    self.roomless.remove(&number);
                }
            }
        }
    }

    /// Whether the connection was opened, or is being opened, while members were apart, and was forwarded by one that has not heard of it.
    fn is_unheard_of(&self, world: &World, packet: &Packet) -> bool {
        let Some((since, until)) = self.apart else { return false };
        let held = holders(world, packet.flow);
        // The backend may not have heard yet that it is open.
        let opened = world.flows[packet.flow].established.unwrap_or(world.now);
        opened + REPLICATED >= since
            && until >= world.now
            && packet.path.last().is_some_and(|node| !held.contains(&usize::from(*node)))
    }
}

impl Checker for Sticky {
    fn name(&self) -> &'static str {
        "sticky"
    }

    fn changing(&mut self, world: &World, _: &Change, _: &mut Findings) {
        self.reach = reach(world, self.were_apart(world));
        if world.settings.cramped.is_some() {
            self.note_roomless(world);
        }
    }

    fn changed(&mut self, world: &World, change: &Change, findings: &mut Findings) {
        let after = reach(world, self.were_apart(world));
        self.lost.resize(world.flows.len(), None);
        let calm = world.now.saturating_sub(self.trouble) >= RESTORED * world.settings.slowness()
            && !world.is_troubled();
        for flow in 0..world.flows.len() {
            let entry = &world.flows[flow];
            if entry.backend.is_none() && entry.phase == Phase::Opening {
                self.note_opening(world, flow, &after);
            }
            if entry.backend.is_none() || entry.broken {
                continue;
            }
            let held = holders(world, flow);
            let replicated = entry.established.is_some_and(|at| world.now.saturating_sub(at) >= REPLICATED);
            let mut by = BTreeSet::new();
            for (node, reached) in after.iter().enumerate() {
                if reached.is_empty() || !held.is_disjoint(reached) {
                    continue;
                }
                let gone = self.reach.get(node).map_or(0, |before| before.difference(reached).count());
                let inexcusable = calm && replicated && gone <= 1 && world.settings.cramped.is_none();
                if !inexcusable {
                    by.insert(node);
                }
            }
            if held.is_empty() && after.iter().all(|reached| reached.is_empty() || !by.is_empty()) {
                self.lost[flow] = Some(Loss { life: entry.life, by: BTreeSet::new(), until: None });
                findings.lost.push(flow);
            } else if !by.is_empty() {
                let until = Some(world.now + MERGED * world.settings.slowness());
                match &mut self.lost[flow] {
                    Some(loss) if loss.life == entry.life => {
                        if loss.until.is_some() {
                            loss.by.extend(by);
                            loss.until = until;
                        }
                    }
                    none => *none = Some(Loss { life: entry.life, by, until }),
                }
            }
        }
        if is_trouble(change) {
            self.trouble = world.now + duration(change);
        }
    }

    fn sampled(&mut self, world: &World, _: &mut Findings) {
        // Only in trouble can anybody be apart.
        if world.is_troubled() && !world.all_linked() {
            let since =
                self.apart.filter(|(_, until)| *until >= world.now).map_or(world.now, |(since, _)| since);
            self.apart = Some((since, world.now + MERGED * world.settings.slowness()));
        }
        // As long as members are apart, what one side lost stays lost to it.
        if world.is_troubled() {
            let until = world.now + MERGED * world.settings.slowness();
            for loss in self.lost.iter_mut().flatten() {
                if loss.until.is_some_and(|known| known > world.now) {
                    loss.until = Some(until);
                }
            }
        }
    }

    fn astray(&mut self, world: &World, packet: &Packet, backend: usize, findings: &mut Findings) {
        let flow = &world.flows[packet.flow];
        // A connection that was asked for twice may be answered twice; the client has taken the first answer.
        if flow.established.is_none() && flow.asked.len() > 1 && flow.asked.contains(&backend) {
            return findings.excused.push(packet.flow);
        }
        let excused = self.lost.get(packet.flow).and_then(Option::as_ref).is_some_and(|loss| {
            let now = loss.until.is_none_or(|until| until >= world.now);
            let here = loss.by.is_empty()
                || packet.path.iter().any(|node| {
                    let node = usize::from(*node);
                    loss.by.contains(&node) || loss.by.iter().any(|other| world.linked(node, *other))
                });
            loss.life == packet.life && now && here
        });
        // What no member has seen a packet of for so long is over, as far as members can know.
        let life = match flow.phase {
            // Its client has answered, and nobody has heard that yet.
            Phase::Open if flow.established.is_none() => world.settings.half_open,
            Phase::HalfClosed | Phase::Closing => world.settings.linger,
            _ => world.settings.idle,
        };
        let over = world.now.saturating_sub(last_heard_of(world, packet)) > life;
        let no_room = self.roomless.get(&packet.flow) == Some(&packet.life)
            || (0..world.nodes.len()).any(|node| found_no_room(world, node, &flow.key, flow.backend));
        if excused || no_room || over || self.is_unheard_of(world, packet) {
            return findings.excused.push(packet.flow);
        }
        let held: Vec<usize> = holders(world, packet.flow).into_iter().map(|node| node + 1).collect();
        let path: Vec<u16> = packet.path.iter().map(|node| node + 1).collect();
        findings.violate(format!(
            "flow {} ({}) of b{:?} came to b{backend} by {path:?} ({:?}); held by {held:?}; last forwarded at {:?}",
            packet.flow, flow.key, flow.backend, packet.kind, flow.forwarded
        ));
    }
}

/// How long a change itself goes on.
fn duration(change: &Change) -> Duration {
    match change {
        Change::Stall(_, length) | Change::Loss(_, length) | Change::Slow(_, _, length) => *length,
        _ => Duration::ZERO,
    }
}
