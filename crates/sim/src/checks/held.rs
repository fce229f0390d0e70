//! *Held*: after quiescence exactly owner and backups hold each flow, with equal content, and the owner knows that it is protected.

use std::time::Duration;

use phalanx_control::TableRanking;
use phalanx_flow::{FlowFlags, FlowState, Record};
use phalanx_rebalancer::Ranking as _;

use super::sticky::REPLICATED;
use super::{Checker, Findings};
use crate::world::World;
use crate::world::node::backend_number;
use crate::world::traffic::Phase;

/// See the module's doc.
#[derive(Debug)]
pub struct Held;

/// A holder that sees no packets of a live flow asks, once its entry is idle, and is told; it looks for idle entries once a second, and
/// question and answer are up to 2 s late each where a peer is slow.
const IDLE_SLACK: Duration = Duration::from_millis(5_500);

impl Checker for Held {
    fn name(&self) -> &'static str {
        "held"
    }

    fn settled(&mut self, world: &World, findings: &mut Findings) {
        // Where nobody ranks there are no holders, and who has something keeps it.
        if world.ranked() == 0 {
            return;
        }
        let Some(table) = world
            .running()
            .find_map(|node| world.nodes[node].process.as_ref())
            .map(|process| process.control.planner().current())
        else {
            return;
        };
        for (number, flow) in world.flows.iter().enumerate() {
            // What was opened, or changed, a moment ago may be on its way; what was lost and found again is a recovered one.
            let old = flow.established.is_some_and(|at| world.now.saturating_sub(at).as_secs() >= 2);
            let told = world.now.saturating_sub(flow.changed) >= REPLICATED;
            // What nobody with a daemon has seen for so long is over, as far as members can know.
            let life =
                if flow.phase == Phase::HalfClosed { world.settings.linger } else { world.settings.idle };
            let over = world.now.saturating_sub(flow.forwarded) > life;
            if !flow.is_live()
                || !old
                || !told
                || over
                || flow.excused
                || flow.guessed
                || world.settings.cramped.is_some()
            {
                continue;
            }
            let held: Vec<(usize, Record)> = world
                .running()
                .filter_map(|node| {
                    let forwarder = world.nodes[node].forwarder.as_ref()?;
                    Some((node, phalanx_forwarder::Forwarder::get(&**forwarder, &flow.key)?))
                })
                .collect();
            if !(held.is_empty() && flow.lost) {
                check(world, &table, number, &held, findings);
            }
        }
    }
}

fn check(
    world: &World,
    table: &TableRanking,
    number: usize,
    held: &[(usize, Record)],
    findings: &mut Findings,
) {
    let flow = &world.flows[number];
    let holders: Vec<usize> = table
        .holders(table.row_of(&flow.key))
        .into_iter()
        .flatten()
        .filter_map(|id| world.node_of(id))
        .collect();
    let who = format!("flow {number} ({}) of b{:?}", flow.key, flow.backend);
    for holder in &holders {
        if !held.iter().any(|(node, _)| node == holder) {
            let names: Vec<usize> = holders.iter().map(|node| node + 1).collect();
            return findings.violate(format!("{who}: m{} of {names:?} does not hold it", holder + 1));
        }
    }
    if let Some((node, _)) = held.iter().find(|(node, _)| !holders.contains(node)) {
        return findings.violate(format!("{who}: m{} holds it and is no holder", node + 1));
    }
    let Some((_, first)) = held.iter().find(|(node, _)| Some(node) == holders.first()) else { return };
    for (node, record) in held {
        let same = |record: &Record| (record.backend, record.birth, record.update, record.state);
        if same(record) != same(first) {
            return findings.violate(format!("{who}: m{} has {record:?}, the owner {first:?}", node + 1));
        }
        let idle_ms = (world.settings.idle + IDLE_SLACK).as_millis();
        if u128::from(record.idle_ms) > idle_ms {
            return findings.violate(format!("{who}: m{} saw it {} ms ago", node + 1, record.idle_ms));
        }
    }
    if Some(backend_number(&first.backend)) != flow.backend {
        return findings.violate(format!("{who}: held with {:?}", first.backend));
    }
    let settled = first.state != FlowState::HalfOpen;
    if settled && holders.len() > 1 && !first.flags.has(FlowFlags::PROTECTED) {
        findings.violate(format!("{who}: unprotected"));
    }
}
