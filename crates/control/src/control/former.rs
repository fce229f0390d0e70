//! What a member has of flows that its table does not give it: kept for a while, asked for, not believed, and dropped
//! (docs/design/0011-former-holders.md).

use std::time::{Duration, Instant};

use phalanx_flow::member::Liveness;
use phalanx_flow::{FlowFlags, FlowKey, FlowState, Record};
use phalanx_forwarder::{Forwarder, RowSet};
use phalanx_membership::MemberView;
use phalanx_rebalancer::Ranking as _;

use super::Control;
use crate::planner::TableRanking;

/// Entries that no table we know gives us may be ours by one that we have not heard of yet: whoever sent them has. A member that comes
/// back takes some seconds to hear of its own return.
pub(super) const STRANGERS_STAY: Duration = Duration::from_secs(10);

/// So long after we are back, and without an open window, the others have told us of all that they hold with us.
pub(super) const DOUBTS_LAST: Duration = Duration::from_secs(10);

/// Others may suspect a member that has done nothing for so long, and act for it (LAN 0.8 s at the earliest).
pub(super) const SUSPECTED_AFTER: Duration = Duration::from_millis(800);

/// Marks all that `forwarder` has: what an earlier process has left is asked for until the others have told us theirs. To be called before
/// anything renews the lease: until then nothing of it is believed anyway.
pub fn doubt_all(forwarder: &dyn Forwarder) {
    set_former(forwarder, &RowSet::All, true);
}

/// Sets or clears the mark of former entries in these rows.
fn set_former(forwarder: &dyn Forwarder, rows: &RowSet, former: bool) {
    let mut keys = Vec::new();
    forwarder.visit(rows, &mut |record| {
        if record.flags.has(FlowFlags::FORMER) != former {
            keys.push(record.key);
        }
    });
    forwarder.set_former(&keys, former);
}

/// Whether `member` is suspected, even by somebody who suspects so many that packets rather believe in them
/// ([`View::distrusts_itself`](phalanx_membership::View::distrusts_itself)).
fn is_doubted(member: &MemberView) -> bool {
    member.suspected || member.liveness == Liveness::Suspect
}

impl Control {
    /// Whether somebody may be lost with what it holds.
    pub(super) fn suspects(&self) -> bool {
        self.view.members.iter().any(is_doubted)
    }

    /// What neither the table in force nor the pending one gives us, but one before them, nobody tells us of any more.
    pub(super) fn mark_former(&self, planned_before: Option<&TableRanking>) {
        let local = Some(self.settings.local);
        let (current, pending) = (self.planner.current(), self.planner.pending());
        let past: Vec<_> = self.planner.previous().collect();
        let gives = |table: &TableRanking, row| table.holders(row).contains(&local);
        let lost = |row: &u32| {
            !gives(&current, *row)
                && !pending.as_ref().is_some_and(|table| gives(table, *row))
                && past.iter().map(|table| &**table).chain(planned_before).any(|table| gives(table, *row))
        };
        let rows = RowSet::from_rows((0..current.row_count()).filter(lost));
        set_former(&*self.forwarder, &rows, true);
    }

    /// We are back, in another process (`resumed`) or after a time in which we and the others did not hear of each other: meanwhile they
    /// end flows that we have, and use their tuples again. So what we have is asked for until its other holders have told us of it.
    pub(super) fn doubt_if_back(&mut self, now: Instant, resumed: bool) {
        let generation = self.view.get(self.settings.local).map_or(self.generation, |own| own.generation);
        if resumed || generation > self.generation {
            self.generation = generation;
            self.doubt(now);
        } else if self.doubted_since.is_some() && self.is_alone() {
            self.doubted_since = Some(now);
        }
    }

    /// Nothing that we have is believed but what is told us from now on.
    pub(super) fn doubt(&mut self, now: Instant) {
        doubt_all(&*self.forwarder);
        self.doubted_since = Some(now);
        // Those that took our rows meanwhile may have recorded what we know better.
        self.compare_soon(now);
    }

    /// The others have had the time to tell us of what we doubted.
    pub(super) fn believe_if_due(&mut self, now: Instant) {
        if self.doubted_since.is_some_and(|since| now.duration_since(since) >= DOUBTS_LAST)
            && self.window_opened.is_none()
            && !self.transferring
            && !self.is_alone()
            && !self.suspects()
        {
            self.doubted_since = None;
            self.believe_what_is_ours();
        }
    }

    /// Whether we see nobody else.
    fn is_alone(&self) -> bool {
        self.view.members.len() <= 1
    }

    /// Whatever of ours is older than what other holders have was replaced meanwhile: the window closes, or we are back for long.
    pub(super) fn believe_what_is_ours(&self) {
        let (local, current) = (Some(self.settings.local), self.planner.current());
        let ours = (0..current.row_count()).filter(|row| current.holders(*row).contains(&local));
        set_former(&*self.forwarder, &RowSet::from_rows(ours), false);
    }

    /// Records have come: those that neither the table in force nor the pending one gives us are not believed, and those that no table at
    /// all gives us stay for a while. That a table before gave us the row is no reason to believe it: not everybody who records what becomes
    /// of the flow knows of that table, a member that has just started least of all.
    pub(super) fn mark_strangers(&mut self, now: Instant, records: &[Record]) {
        let local = self.settings.local;
        let mut former = Vec::new();
        let mut stranger = false;
        for key in records.iter().map(|record| record.key) {
            if !self.planner.gives_from_now_on(local, &key) {
                former.push(key);
                stranger |= !self.planner.gives(local, &key);
            }
        }
        if !former.is_empty() {
            self.forwarder.set_former(&former, true);
        }
        if stranger {
            self.strangers_until = Some(now + STRANGERS_STAY);
            self.sweep_at.get_or_insert(now + STRANGERS_STAY);
        }
    }

    /// A member that no table gives a row is told nothing of its flows any more: what it still has of them goes when its transfers
    /// are done, lest it be used when a client uses a tuple again.
    pub(super) fn sweep_if_due(&mut self, now: Instant) {
        if self.sweep_at.is_some_and(|at| at <= now) && !self.transferring && !self.suspects() {
            self.sweep_at = None;
            self.drop_former(now);
        }
    }

    /// Drops the entries that no table gives us, neither the current one, nor the pending one, nor one before; says how many. Where we have a
    /// cache, connections that live go there: their packets may pass through here, and nobody sends them again.
    pub(super) fn drop_former(&mut self, now: Instant) -> usize {
        let mut former = Vec::new();
        let mut cached = Vec::new();
        self.forwarder.visit(&RowSet::All, &mut |record| {
            if !self.is_ours(&record.key) {
                former.push((record.key, record.birth));
                if self.settings.cache && record.birth != 0 && record.state == FlowState::Established {
                    cached.push(*record);
                }
            }
        });
        if let Some(until) = self.strangers_until.filter(|until| *until > now) {
            self.sweep_at = Some(until);
            // What stays meanwhile nobody tells us of: a table that has just ceased to count may have given it to us.
            let keys: Vec<FlowKey> = former.into_iter().map(|(key, _)| key).collect();
            self.forwarder.set_former(&keys, true);
            return 0;
        }
        for (key, birth) in &former {
            self.forwarder.remove(key, *birth, Duration::ZERO);
        }
        self.forwarder.upsert_cache(&cached);
        former.len()
    }

    /// Somebody tells our cache of a flow of which we have something from former times, too: whatever of that `is_over` goes, before it could
    /// take the place of what the cache knows.
    pub(super) fn forget_former(&self, key: &FlowKey, is_over: impl FnOnce(&Record) -> bool) {
        if let Some(former) = self.forwarder.get(key)
            && former.flags.has(FlowFlags::FORMER)
            && !self.planner.gives_from_now_on(self.settings.local, key)
            && is_over(&former)
        {
            self.forwarder.remove(key, former.birth, Duration::ZERO);
        }
    }
}
