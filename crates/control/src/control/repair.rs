//! Holders compare what they hold, and send each other what one of them lacks (docs/design/0006-planned-changes.md, "Repair").
//!
//! ```text
//!   owner                                   backup                     former holder                     new holder
//!     │ every REPAIR_EVERY, at rest:           │                             │ its window may close:           │
//!     │ digests of the rows they share ───────►│                             │ digests of what it has ────────►│
//!     │◄──────────── the rows that differ ─────│                             │◄── the rows that differ ────────│
//!     │◄──────────── its entries of them ──────│                             │ its entries of them ───────────►│
//!     │ its entries of them ──────────────────►│                             │ drops them all                  │
//! ```
//! It only ever adds: an entry is copied with its idle time, and records are ordered by their versions. What has ended is not taken
//! again for as long as its end is remembered (120 s), and who offers it is told of the end.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use phalanx_flow::{FlowFlags, FlowState, MemberId, Record};
use phalanx_forwarder::RowSet;
use phalanx_rebalancer::{Digests, Held, Ranking, RowDigest, TransferPlan, row_digests};

use super::Control;

/// How often an owner compares its rows with their backups: four times while an end is remembered, so that an end that was lost is
/// told again before the entry could come back.
pub const REPAIR_EVERY: Duration = Duration::from_secs(30);

/// A change of table is followed by a comparison after this: what was in flight across it should have arrived by then.
const AFTER_CHANGE: Duration = Duration::from_secs(2);

/// While views change or transfers are under way a comparison would find what is being sent anyway; it is put off by this.
const NOT_NOW: Duration = Duration::from_secs(2);

/// A former holder whose questions are not answered for this long (a new holder is cut off) lets go all the same.
const ANSWER_WAIT: Duration = Duration::from_secs(10);

/// What is under way.
#[derive(Debug, Default)]
pub(super) struct Repair {
    next: Option<Instant>,
    pub(super) round: u64,
    asked: Vec<(MemberId, Digests)>,
    differing: Vec<(MemberId, BTreeSet<u32>)>,
    /// Flows of the comparison under way that we do not know to be protected: by backup, with the row.
    doubtful: BTreeMap<MemberId, Vec<(u32, Held)>>,
    /// The handover window is about to close: its round, the answers that are missing, and since when.
    farewell: Option<(u64, usize, Instant)>,
    counters: RepairCounters,
}

/// What comparing has come to, since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RepairCounters {
    /// Comparisons made, as owner.
    pub rounds: u64,
    /// Rows that were found to differ.
    pub rows: u64,
    /// Records sent because of it.
    pub records: u64,
}

/// Half-open and reset flows come and go faster than they could be compared.
fn counts(record: &Record) -> bool {
    record.birth != 0 && matches!(record.state, FlowState::Established | FlowState::Closing)
}

impl Control {
    /// What comparing has come to.
    pub const fn repair_counters(&self) -> &RepairCounters {
        &self.repair.counters
    }

    pub(super) fn handle_digests(&mut self, from: MemberId, digests: Digests) {
        self.repair.asked.push((from, digests));
    }

    pub(super) fn handle_differing(&mut self, now: Instant, from: MemberId, round: u64, rows: Vec<u32>) {
        if let Some((farewell, missing, _)) = &mut self.repair.farewell
            && *farewell == round
        {
            *missing = missing.saturating_sub(1);
        }
        let rows: BTreeSet<u32> = rows.into_iter().collect();
        // A backup that holds the same of a row has acknowledged it, whoever told it.
        if round == self.repair.round
            && rows.len() < phalanx_rebalancer::codec::MAX_ROWS
            && let Some(doubtful) = self.repair.doubtful.get(&from)
        {
            let held: Vec<Held> =
                doubtful.iter().filter(|(row, _)| !rows.contains(row)).map(|(_, held)| *held).collect();
            self.replicator.handle_compared(now, from, &held);
        }
        if !rows.is_empty() {
            self.repair.differing.push((from, rows));
        }
    }

    /// Compares what is due, answers what was asked, and sends what was found missing.
    pub(super) fn repair_if_due(&mut self, now: Instant) {
        self.answer_digests(now);
        self.send_differing(now);
        let next = *self.repair.next.get_or_insert(now + REPAIR_EVERY);
        if next > now {
            return;
        }
        if self.transferring || self.view.pending.is_some() || !self.everybody_switched() {
            self.repair.next = Some(now + NOT_NOW);
            return;
        }
        self.repair.next = Some(now + REPAIR_EVERY);
        self.repair.counters.rounds += 1;
        let (local, table) = (self.settings.local, self.planner.current());
        let last = table.row_count().saturating_sub(1);
        // Whoever is a backup of ours is asked, also where we have nothing: it may have what we lack.
        let backups: BTreeSet<MemberId> = (0..table.row_count())
            .map(|row| table.holders(row))
            .filter(|holders| holders[0] == Some(local))
            .flat_map(|[_, backups @ ..]| backups.into_iter().flatten())
            .collect();
        let mut held: BTreeMap<MemberId, Vec<Record>> = backups.iter().map(|&id| (id, Vec::new())).collect();
        let mut doubtful: BTreeMap<MemberId, Vec<(u32, Held)>> = BTreeMap::new();
        self.forwarder.visit(&RowSet::All, &mut |record| {
            let row = table.row_of(&record.key);
            let [owner, backups @ ..] = table.holders(row);
            if owner == Some(local) && counts(record) {
                let doubted =
                    !record.flags.has(FlowFlags::PROTECTED) || self.replicator.is_unprotected(&record.key);
                for backup in backups.into_iter().flatten() {
                    if doubted {
                        let version = (record.key, record.birth, record.update);
                        doubtful.entry(backup).or_default().push((row, version));
                    }
                    held.entry(backup).or_default().push(*record);
                }
            }
        });
        self.repair.doubtful = doubtful;
        self.repair.round += 1;
        for (backup, records) in held {
            let digests = row_digests(&*table, &records);
            self.replicator.compare(backup, self.repair.round, false, [0, last], &digests);
        }
    }

    /// Looks up what the peers that asked should hold the same of, in one pass over the flow table.
    fn answer_digests(&mut self, now: Instant) {
        let asked = std::mem::take(&mut self.repair.asked);
        if asked.is_empty() {
            return;
        }
        let (local, table) = (self.settings.local, self.planner.current());
        let listed: Vec<BTreeSet<u32>> =
            asked.iter().map(|(_, digests)| digests.rows.iter().map(|(row, ..)| *row).collect()).collect();
        let concerns = |place: usize, row: u32| {
            let (from, digests) = &asked[place];
            let holders = table.holders(row);
            if digests.former {
                holders.contains(&Some(local)) && listed[place].contains(&row)
            } else {
                holders[0] == Some(*from)
                    && holders[1..].contains(&Some(local))
                    && (digests.first..=digests.last).contains(&row)
            }
        };
        let mut ours: Vec<BTreeMap<u32, RowDigest>> = vec![BTreeMap::new(); asked.len()];
        self.forwarder.visit(&RowSet::All, &mut |record| {
            if counts(record) {
                let row = table.row_of(&record.key);
                for (place, ours) in ours.iter_mut().enumerate() {
                    if concerns(place, row) {
                        ours.entry(row).or_default().add(record);
                    }
                }
            }
        });
        for (place, ours) in ours.into_iter().enumerate() {
            let (from, digests) = &asked[place];
            let theirs: BTreeMap<u32, RowDigest> = digests
                .rows
                .iter()
                .filter(|(row, ..)| concerns(place, *row))
                .map(|&(row, count, sum)| (row, RowDigest { count, sum }))
                .collect();
            let mut rows = phalanx_rebalancer::differing_rows(&ours, &theirs);
            rows.truncate(phalanx_rebalancer::codec::MAX_ROWS);
            self.repair.counters.rows += rows.len() as u64;
            self.replicator.answer(*from, digests.round, rows.clone());
            if !digests.former {
                self.repair.differing.push((*from, rows.into_iter().collect()));
            }
        }
        self.send_differing(now);
    }

    /// Sends what we have of the rows of which a peer has something else.
    fn send_differing(&mut self, now: Instant) {
        let differing = std::mem::take(&mut self.repair.differing);
        if differing.iter().all(|(_, rows)| rows.is_empty()) {
            return;
        }
        let table = self.planner.current();
        let mut holders: BTreeMap<MemberId, Vec<Record>> = BTreeMap::new();
        self.forwarder.visit(&RowSet::All, &mut |record| {
            let row = table.row_of(&record.key);
            for (to, rows) in &differing {
                // A peer that holds the row no more has no use for it.
                if counts(record) && rows.contains(&row) && table.holders(row).contains(&Some(*to)) {
                    holders.entry(*to).or_default().push(*record);
                }
            }
        });
        self.repair.counters.records += holders.values().map(Vec::len).sum::<usize>() as u64;
        if !holders.is_empty() {
            self.transferring = true;
            self.replicator.begin_transfer(now, TransferPlan { holders, ..TransferPlan::default() });
        }
    }

    /// Whether the new holders have all that we are about to drop: asks them first, and sends what they lack (case \[656\]).
    pub(super) fn took_leave(&mut self, now: Instant) -> bool {
        if let Some((_, missing, since)) = self.repair.farewell {
            let answered = missing == 0 && self.repair.differing.is_empty() && !self.transferring;
            if answered || now.saturating_duration_since(since) >= ANSWER_WAIT {
                self.repair.farewell = None;
                return true;
            }
            return false;
        }
        let (local, table) = (self.settings.local, self.planner.current());
        let mut lost: BTreeMap<MemberId, Vec<Record>> = BTreeMap::new();
        self.forwarder.visit(&RowSet::All, &mut |record| {
            let holders = table.holders(table.row_of(&record.key));
            if counts(record) && !holders.contains(&Some(local)) {
                for holder in holders.into_iter().flatten() {
                    lost.entry(holder).or_default().push(*record);
                }
            }
        });
        self.repair.round += 1;
        let last = table.row_count().saturating_sub(1);
        let mut missing = 0;
        for (holder, records) in lost {
            let digests = row_digests(&*table, &records);
            missing += self.replicator.compare(holder, self.repair.round, true, [0, last], &digests);
        }
        if missing == 0 {
            return true;
        }
        self.repair.farewell = Some((self.repair.round, missing, now));
        false
    }

    /// Another table is in force: who was asked may hold the rows no more.
    pub(super) fn table_changed(&mut self, now: Instant) {
        self.repair.doubtful.clear();
        self.repair.farewell = None;
        self.compare_soon(now);
    }

    /// What fell between two tables, or came while we were away, is looked for soon.
    pub(super) fn compare_soon(&mut self, now: Instant) {
        let soon = now + AFTER_CHANGE;
        self.repair.next = Some(self.repair.next.map_or(soon, |next| next.min(soon)));
    }
}
