//! How each [`Change`] is carried out.

use std::time::Duration;

use rand::RngExt as _;

use super::World;
use super::event::Event;
use crate::schedule::Change;
use crate::settings::{Balancer, stream};

/// Health checks and reloads reach members within this, each by itself.
const HEALTH_LAG: [Duration; 2] = [Duration::from_millis(100), Duration::from_millis(1_500)];

impl World {
    pub(super) fn change(&mut self, index: usize) {
        let Some((_, change)) = self.schedule.get(index).cloned() else { return };
        self.tell(|| format!("-- {change}"));
        self.check(|checker, world, findings| checker.changing(world, &change, findings));
        self.last_change = change.kind();
        self.carry_out(&change);
        self.check(|checker, world, findings| checker.changed(world, &change, findings));
    }

    fn carry_out(&mut self, change: &Change) {
        match *change {
            Change::Crash(node) => {
                self.crash(node);
                self.note_orphans();
            }
            Change::CrashDaemon(node) => {
                if self.nodes[node].process.is_some() && self.settings.balancer == Balancer::Phalanx {
                    self.end_daemon(node, false);
                }
            }
            Change::Start(node) => {
                let phalanx = self.settings.balancer == Balancer::Phalanx;
                let down = self.nodes[node].process.is_none() && self.nodes[node].forwarder.is_none();
                if (phalanx && down) || (!phalanx && !self.next_hops.contains(&node)) {
                    self.nodes[node].leaving = false;
                    self.start_daemon(node);
                }
            }
            Change::Adopt(node) => {
                if self.nodes[node].process.is_none() && self.nodes[node].forwarder.is_some() {
                    self.start_daemon(node);
                }
            }
            Change::Leave(node) => {
                if self.settings.balancer != Balancer::Phalanx {
                    self.nodes[node].leaving = true;
                    let life = self.nodes[node].life;
                    self.announce_to_router(node, false, life);
                } else if self.nodes[node].runs() {
                    self.begin_leave(node);
                }
            }
            Change::Reweight(node, weight) => self.nodes[node].weight = weight,
            Change::Stall(node, length) => self.stall(node, length),
            Change::Partition(ref nodes) => {
                for node in nodes {
                    self.nodes[*node].group = 1;
                }
            }
            Change::Heal => {
                self.cuts.clear();
                self.nodes.iter_mut().for_each(|node| node.group = 0);
                self.unblock();
                self.hear_from_who_was_apart();
            }
            Change::Cut(a, b) => {
                self.cuts.extend([(a, b), (b, a)]);
            }
            Change::CutOneWay(a, b) => {
                self.cuts.insert((a, b));
            }
            Change::Loss(share, length) => {
                self.extra_loss = share;
                self.push_in(length, Event::Calm(None));
            }
            Change::Slow(node, late, length) => {
                self.nodes[node].slow = late;
                self.push_in(length, Event::Calm(Some(node)));
            }
            Change::BackendAdd(backend) | Change::BackendBack(backend) => {
                self.backends[backend].alive = true;
                self.backends[backend].usable = true;
                self.spread_health(backend, true);
            }
            Change::BackendDrain(backend) => {
                self.backends[backend].usable = false;
                self.spread_health(backend, false);
            }
            Change::BackendFail(backend) => {
                self.backends[backend].alive = false;
                self.backends[backend].connections.clear();
                for flow in &mut self.flows {
                    if flow.backend == Some(backend) {
                        flow.orphaned = true;
                        flow.waiting_since = None;
                    }
                }
                self.spread_health(backend, false);
            }
            Change::Rehash => self.salt = self.salt.wrapping_add(0x1234_5678_9abc_def1),
            Change::Burst(count) => self.open(count, Duration::from_millis(50)),
        }
    }

    /// What members saw while they were cut off is known to the others from now on.
    fn hear_from_who_was_apart(&mut self) {
        for flow in &mut self.flows {
            for (node, (life, at)) in std::mem::take(&mut flow.unheard) {
                if self.nodes[node].process.is_some() && self.nodes[node].life == life {
                    flow.forwarded = flow.forwarded.max(at);
                }
            }
        }
    }

    fn spread_health(&mut self, backend: usize, usable: bool) {
        let [least, most] = HEALTH_LAG;
        for node in 0..self.nodes.len() {
            // What changes together reaches a member together.
            let mut lag = stream(self.settings.seed ^ self.now.as_secs(), 16 + node as u64);
            let mut late = lag.random_range(least..=most);
            // It stays behind for as long as its configuration is not that of the others.
            if !self.nodes[node].lacks.is_empty() {
                late += self.settings.laggard.unwrap_or_default();
            }
            self.push_in(late, Event::Health { node, backend, usable });
        }
    }

    fn crash(&mut self, node: usize) {
        let entry = &mut self.nodes[node];
        let life = entry.life;
        if self.settings.balancer != Balancer::Phalanx {
            entry.leaving = true;
            self.local_tables[node].clear();
        } else if entry.process.is_none() && entry.forwarder.is_none() {
            return;
        }
        self.end_daemon(node, true);
        self.announce_to_router(node, false, life);
    }

    /// The daemon of `node` ends without a word; its forwarder too, or not.
    pub(super) fn end_daemon(&mut self, node: usize, forwarder: bool) {
        let now = self.now;
        let entry = &mut self.nodes[node];
        if let Some(process) = entry.process.take() {
            entry.note = process.control.planner().snapshot();
        }
        entry.stalled = None;
        entry.stalls += 1;
        if forwarder {
            entry.forwarder = None;
            entry.silent_since.get_or_insert(now);
        }
        self.orphan_links(node);
    }

    fn stall(&mut self, node: usize, length: Duration) {
        let phalanx = self.settings.balancer == Balancer::Phalanx;
        let now = self.now;
        let entry = &mut self.nodes[node];
        if entry.stalled.is_some() || (phalanx && entry.process.is_none()) {
            return;
        }
        entry.stalled = Some(Vec::new());
        entry.silent_since = Some(now);
        entry.stalls += 1;
        let (stall, life) = (entry.stalls, entry.life);
        self.push_in(length, Event::Resume { node, stall });
        // The router's probes are not answered either.
        self.announce_to_router(node, false, life);
    }

    pub(super) fn resume(&mut self, node: usize, stall: u64) {
        // Those of the start come as this too: a cold start is spread over a little time.
        if stall == u64::MAX {
            return self.start_daemon(node);
        }
        if self.nodes[node].stalls != stall {
            return;
        }
        let Some(mut waiting) = self.nodes[node].stalled.take() else { return };
        self.nodes[node].steady_since = self.now;
        self.nodes[node].silent_since = None;
        self.nodes[node].tell_time(self.now);
        self.tell(|| format!("m{} runs again", node + 1));
        // A driver may look at its timers or at its sockets first; both must do.
        if self.network.random() {
            waiting.sort_by_key(|event| !matches!(event, Event::Wake { .. } | Event::Tick { .. }));
        } else if self.network.random() {
            waiting.sort_by_key(|event| !matches!(event, Event::AtMember { .. }));
        }
        let life = self.nodes[node].life;
        for event in waiting {
            if self.nodes[node].stalled.is_some() || self.nodes[node].life != life {
                break;
            }
            self.happen(event);
        }
        self.announce_to_router(node, true, life);
    }
}
