//! A run from its first moment to its last.

use std::collections::BTreeMap;
use std::hash::Hasher as _;
use std::time::Duration;

use phalanx_flow::MemberId;
use phalanx_flow::member::Liveness;
use phalanx_membership::MemberState;
use phalanx_rebalancer::Ranking as _;
use rand::RngExt as _;

use super::event::Event;
use super::traffic::Phase;
use super::{SAMPLE, World};
use crate::checks::Violation;
use crate::schedule::{self, Change, FLOWS_FROM, ROUND, ROUND_FROM};
use crate::settings::{Balancer, LARGE};

/// How long a site may take after the last change until all members agree, all is transferred and every window is closed; see
/// `docs/testing.md`.
pub(crate) const CONVERGES: Duration = Duration::from_secs(45);

/// How long a large site has for its start.
const STARTS: Duration = Duration::from_secs(120);

/// How long it is left alone after that before what is held is looked at.
const REST: Duration = Duration::from_secs(2);

/// So many idle timeouts after the end of all traffic nothing may be remembered: one, the waits for other holders' answers, and slack.
const FORGOTTEN_AFTER: u32 = 5;

/// What a run showed.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Of the run.
    pub seed: u64,
    /// What is not as it should be.
    pub violations: Vec<Violation>,
    /// Connections opened.
    pub opened: u64,
    /// Connections that were broken, by the kind of the change before: \[avoidable, unavoidable\].
    pub broken_by: BTreeMap<&'static str, [u64; 2]>,
    /// When each connection was broken.
    pub broken_at: Vec<Duration>,
    /// Flows whose owner and first backup died before anybody had noticed, and those of them that broke.
    pub orphans: [u64; 2],
    /// Live flows when the changes under test began, and those off the consistent choice.
    pub live: usize,
    /// See [`Self::live`].
    pub off_choice: usize,
    /// From the last change until all was as it should be.
    pub converged_in: Option<Duration>,
    /// Packets that members ruled on, and hand-offs.
    pub packets: u64,
    /// See [`Self::packets`].
    pub hand_offs: u64,
    /// ICMP errors that came to their connection's backend, and to another.
    pub errors: [u64; 2],
    /// Names the whole course of the run: when everything happened, and every byte that members sent each other.
    pub trace: u64,
    /// Virtual time that has passed.
    pub virtual_time: Duration,
    /// How long the run took.
    pub took: Duration,
    /// The story, if it was to be told.
    pub story: Vec<(Duration, String)>,
}

impl Report {
    /// Connections broken that need not have been.
    pub fn broken(&self) -> u64 {
        self.broken_by.values().map(|[avoidable, _]| avoidable).sum()
    }

    /// Connections broken from then on, whatever could have saved them.
    pub fn broken_since(&self, from: Duration) -> u64 {
        self.broken_at.iter().filter(|at| **at >= from).count() as u64
    }

    /// Connections broken because every holder was lost.
    pub fn lost(&self) -> u64 {
        self.broken_by.values().map(|[_, lost]| lost).sum()
    }
}

impl World {
    /// Runs to the end.
    pub fn run(mut self) -> Report {
        let mut report = Report { seed: self.settings.seed, ..Report::default() };
        self.push(SAMPLE, Event::Sample);
        self.run_for(FLOWS_FROM);
        if self.settings.members > LARGE {
            while self.now < STARTS && self.unsettled().is_some() {
                self.run_for(SAMPLE);
            }
            self.plan_changes(self.now - FLOWS_FROM);
        }
        if self.settings.rounds > 1 {
            for round in 0..self.settings.rounds {
                self.begin_round(round);
                self.round(&mut report);
                self.run_until(ROUND * (round + 1));
            }
        } else {
            self.round(&mut report);
        }
        report.virtual_time = self.now;
        report.trace = self.trace.finish();
        report.violations = std::mem::take(&mut self.findings.violations);
        report.opened = self.opened;
        report.broken_by = self.broken_by;
        report.broken_at = self.broken_at;
        let broken = self.orphans.iter().filter(|flow| self.flows[**flow].broken).count();
        report.orphans = [self.orphans.len() as u64, broken as u64];
        report.packets = self.packets;
        report.hand_offs = self.hand_offs;
        report.errors = self.errors;
        report.story = self.story.unwrap_or_default();
        report
    }

    /// What happens in this round of a run of days is laid out.
    fn begin_round(&mut self, round: u32) {
        self.ending = false;
        let up: Vec<bool> = self.nodes.iter().map(|node| node.process.is_some()).collect();
        let usable: Vec<bool> = self.backends.iter().map(|backend| backend.usable && backend.alive).collect();
        for (after, change) in schedule::round(&self.settings, round, &up, &usable) {
            self.push(self.now + after, Event::Change(self.schedule.len()));
            self.schedule.push((self.now + after, change));
        }
    }

    /// Connections are opened, what is to happen happens, all comes to rest, and all connections end.
    fn round(&mut self, report: &mut Report) {
        let flows = self.settings.flows;
        self.open(flows, Duration::from_secs(2));
        if self.settings.icmp.is_some() {
            self.push_in(Duration::from_secs(2), Event::IcmpTurn);
        }
        // In a run of days backends change first, and then rest.
        let days = self.settings.rounds > 1;
        let after = self.now + if days { ROUND_FROM - SAMPLE } else { Duration::from_secs(5) };
        let first = self.schedule.iter().map(|(at, _)| *at).find(|at| *at > after);
        if let Some(first) = first {
            self.run_until(first - Duration::from_millis(1));
        }
        (report.live, report.off_choice) = self.off_choice();
        let last = self.schedule.last().map(|(at, _)| *at).unwrap_or_default();
        self.run_until(last);
        self.mend();
        if self.settings.balancer != Balancer::Phalanx {
            return self.run_for(Duration::from_secs(10));
        }
        let from = self.now;
        let bound = CONVERGES * self.settings.slowness();
        while self.now < from + bound && self.unsettled().is_some() {
            self.run_for(SAMPLE);
        }
        match self.unsettled() {
            None => {
                report.converged_in = Some(report.converged_in.unwrap_or_default().max(self.now - from));
            }
            Some(reason) => {
                self.findings.violate_as("converges", self.now, format!("after {bound:?}: {reason}"));
            }
        }
        self.run_for(REST);
        self.check(|checker, world, findings| checker.settled(world, findings));
        self.end_traffic();
        let end = self.now + self.settings.idle * FORGOTTEN_AFTER;
        self.run_for(self.settings.linger);
        while self.now < end && !self.is_empty() {
            self.run_for(SAMPLE * 4);
        }
        // The last word of the last end is still to be acknowledged.
        self.run_for(Duration::from_secs(1));
        self.check(|checker, world, findings| checker.emptied(world, findings));
    }

    /// Somebody has died: notes the live flows whose owner and first backup, by the table in force, are both gone.
    pub(super) fn note_orphans(&mut self) {
        let Some(table) = self
            .running()
            .find_map(|node| self.nodes[node].process.as_ref())
            .map(|process| process.control.planner().current())
        else {
            return;
        };
        let gone = |id: Option<MemberId>| {
            id.and_then(|id| self.node_of(id)).is_some_and(|node| self.nodes[node].process.is_none())
        };
        let orphans = self.flows.iter().enumerate().filter(|(_, flow)| {
            let [owner, backup, _] = table.holders(table.row_of(&flow.key));
            flow.is_live() && gone(owner) && gone(backup)
        });
        let orphans: Vec<usize> = orphans.map(|(number, _)| number).collect();
        self.orphans.extend(orphans);
    }

    fn run_until(&mut self, at: Duration) {
        if at > self.now {
            self.run_for(at - self.now);
        }
    }

    /// What the schedule left broken is mended: partitions, dead daemons over live forwarders, members that stand still.
    fn mend(&mut self) {
        self.run_for(Duration::from_millis(500));
        let zombies: Vec<usize> = (0..self.nodes.len())
            .filter(|node| self.nodes[*node].process.is_none() && self.nodes[*node].forwarder.is_some())
            .collect();
        let nobody = self.nodes.iter().all(|node| node.process.is_none());
        let mut mending = vec![Change::Heal];
        mending.extend(zombies.into_iter().map(Change::Adopt));
        if nobody && self.settings.balancer == Balancer::Phalanx {
            mending.push(Change::Start(0));
        }
        for change in mending {
            self.schedule.push((self.now, change));
            let index = self.schedule.len() - 1;
            self.happen(Event::Change(index));
        }
        let longest = Duration::from_secs(10);
        let until = self.now + longest;
        while self.now < until
            && self.nodes.iter().any(|node| node.is_stalled() || node.leaving && node.process.is_some())
        {
            self.run_for(SAMPLE);
        }
    }

    /// Why the site is not at rest yet.
    pub fn unsettled(&self) -> Option<String> {
        let mut digest = None;
        let count = self.nodes.iter().filter(|node| node.process.is_some()).count();
        for (at, node) in self.nodes.iter().enumerate() {
            let name = at + 1;
            if node.is_stalled() {
                return Some(format!("m{name} stands still"));
            }
            let Some(process) = &node.process else { continue };
            if process.metadata.weight != node.weight {
                return Some(format!("m{name} has not told of its weight yet"));
            }
            if process.membership.state() != MemberState::Active {
                return Some(format!("m{name} is {:?}", process.membership.state()));
            }
            let view = process.membership.view();
            if *digest.get_or_insert(view.digest) != view.digest || view.members.len() != count {
                return Some(format!("m{name} has another view: {} of {count} members", view.members.len()));
            }
            if let Some(other) =
                view.members.iter().find(|other| !other.known || other.liveness != Liveness::Alive)
            {
                return Some(format!("m{name} holds m{} to be {:?}", other.id, other.liveness));
            }
            if view.pending.is_some() {
                return Some(format!("m{name} knows of a change that is planned"));
            }
            // While nobody ranks none closes.
            if process.control.window_open() && self.ranked() > 0 {
                return Some(format!("m{name} has its handover window open"));
            }
            if process.control.is_sweeping() {
                return Some(format!("m{name} has entries to sweep"));
            }
            if process.control.replicator().transfers().next().is_some() {
                return Some(format!("m{name} is sending transfer tables"));
            }
            if count > 1 && process.links.len() + 1 < count {
                return Some(format!("m{name} is not connected with all"));
            }
            if self.settings.cramped.is_none()
                && process.control.replicator().unprotected() > 0
                && self.ranked() > 1
            {
                let replicator = process.control.replicator();
                let first = self.flows.iter().position(|flow| replicator.is_unprotected(&flow.key));
                let record = first.zip(node.forwarder.as_ref()).and_then(|(flow, forwarder)| {
                    phalanx_forwarder::Forwarder::get(&**forwarder, &self.flows[flow].key)
                });
                return Some(format!(
                    "m{name} has {} unprotected flows, flow {first:?} among them: {record:?}",
                    replicator.unprotected()
                ));
            }
        }
        None
    }

    /// Members that own rows.
    pub fn ranked(&self) -> usize {
        self.nodes.iter().filter(|node| node.process.is_some() && node.weight > 0).count()
    }

    /// All clients end, each in its way.
    fn end_traffic(&mut self) {
        self.tell(|| "-- all clients end".to_owned());
        self.ending = true;
        for flow in 0..self.flows.len() {
            if self.flows[flow].phase == Phase::Opening {
                self.flows[flow].phase = Phase::Over;
                self.flows[flow].stop_waiting();
            }
            let late = self.traffic.random_range(Duration::ZERO..Duration::from_secs(1));
            self.client_timer(flow, late);
        }
        self.run_for(Duration::from_secs(4));
        // Who still waits for an answer gives up.
        for flow in &mut self.flows {
            flow.phase = Phase::Over;
            flow.stop_waiting();
        }
    }

    /// Whether no member remembers any flow.
    fn is_empty(&self) -> bool {
        self.nodes.iter().filter_map(|node| node.forwarder.as_ref()).all(|forwarder| {
            let counters = phalanx_forwarder::Forwarder::counters(&**forwarder);
            counters.flows + counters.half_open + counters.cached == 0
        })
    }
}
