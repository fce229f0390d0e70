//! The one rule of what moves when the row table changes (claims 19 and 20).
//!
//! *For each flow, if the old owner lives it sends to the new holders that are not old holders, else the old backup does.*
//! With two backups, the first of the old holders that lives.
//!
//! Every member applies the rule by itself to the records it holds, and exactly one member sends each flow;
//! but where no old holder is left, whoever still has one of an earlier table sends it, as a cache would (claim 20, \[750\]).
//! A member that started again without its flow table counts as dead in the old table and as new in the new one.
//! The cases of the founding document follow from it, where M is the member that computes, N joined and F left:
//!
//! | case | old holders | new holders | M sends to | M locally |
//! |------|-------------|-------------|------------|-----------|
//! | \[652\] | M, x | N, M | N, as owner | [`LocalAction::Demote`] |
//! | \[654\] | M, x | M, N | N, as backup | [`LocalAction::Keep`] |
//! | \[656\] | M, x | x, N | N, as backup | [`LocalAction::Former`] |
//! | \[752\] | M, F | M, y | y, as backup | [`LocalAction::Keep`] |
//! | \[754\] | F, M | M, y | y, as backup | [`LocalAction::Promote`] |
//!
//! In case \[652\] the document does not say what x does: it loses the row and keeps its entry as former holder.
//! Deviation from \[656\]: the entry is not deleted at once but kept until the handover window closes ([`former_entries`]).

use std::collections::{BTreeMap, BTreeSet};

use phalanx_flow::{FlowKey, MemberId, Record};

use crate::ranking::{Holders, Ranking, Survivors, holders_of};

/// A change of the row table, as one member sees it.
#[derive(Clone, Copy)]
pub struct Change<'a> {
    /// The member that computes.
    pub local: MemberId,
    /// Who held what before.
    pub old: &'a dyn Ranking,
    /// Who holds what from now on.
    pub new: &'a dyn Ranking,
    /// Who lives, and who of them lost its flow table.
    pub survivors: &'a Survivors,
    /// Members with `cache = "all"`: they get the transfer tables too (claim 20, \[770\]).
    pub caches: &'a BTreeSet<MemberId>,
    /// What was sent already, for a planned change that this one follows upon.
    pub ahead: Option<Ahead<'a>>,
}

/// What was sent ahead of a planned change, and has been kept up to date since.
#[derive(Clone, Copy)]
pub struct Ahead<'a> {
    /// The table it started from: who owned a row there has sent it.
    pub base: &'a dyn Ranking,
    /// Its pending table: who is a holder there was sent the flows.
    pub ranking: &'a dyn Ranking,
    /// The members that have not started again since.
    pub members: &'a BTreeSet<MemberId>,
}

impl Ahead<'_> {
    fn has(&self, row: u32, member: MemberId) -> bool {
        self.members.contains(&member) && self.ranking.holders(row).contains(&Some(member))
    }
}

/// What the local member does with an entry of its flow table when the table changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LocalAction {
    /// It stays what it is, owner or backup; it also becomes one when a record came before the table changed.
    Keep,
    /// The backup becomes the owner \[764\].
    Promote,
    /// The owner becomes the backup \[662\].
    Demote,
    /// The row is lost: the entry stays as a former holder's until the handover window closes \[666\].
    Former,
}

/// The transfer tables of one member for one change, and what becomes of its own entries.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TransferPlan {
    /// What each new holder gets into its flow table.
    pub holders: BTreeMap<MemberId, Vec<Record>>,
    /// What each member with a cache, not a holder, gets into its cache.
    pub caches: BTreeMap<MemberId, Vec<Record>>,
    /// What becomes of the local entry, for the records given, in their order.
    pub local: Vec<(FlowKey, LocalAction)>,
}

impl TransferPlan {
    /// Whether nothing is to be sent.
    pub fn is_empty(&self) -> bool {
        self.holders.is_empty() && self.caches.is_empty()
    }

    /// How many records are to be sent, counted once per receiver.
    pub fn len(&self) -> usize {
        self.holders.values().chain(self.caches.values()).map(Vec::len).sum()
    }
}

impl Change<'_> {
    /// Whether the flows of `row` may have to move: its holders change in who or in order, or one lost its flow table.
    pub fn affects(&self, row: u32) -> bool {
        let old = self.old.holders(row);
        let new = self.new.holders(row);
        old != new || new.iter().flatten().any(|member| self.survivors.blank.contains(member))
    }

    /// Who sends the flows of `row`: the old owner if it still has them, else the first old backup that has, else whoever has any by an
    /// earlier table.
    pub fn sender(&self, row: u32) -> Option<MemberId> {
        holders_of(self.old, row).find(|&member| self.survivors.keeps_state(member))
    }

    /// Who must be sent the flows of `row`: the new holders that have not held it, or have forgotten it, and were not sent it ahead.
    pub fn receivers(&self, row: u32) -> impl Iterator<Item = MemberId> {
        let old = self.old.holders(row);
        holders_of(self.new, row).filter(move |&member| {
            self.survivors.live.contains(&member)
                && !(old.contains(&Some(member)) && self.survivors.keeps_state(member))
                && !self.was_sent_ahead(row, member)
        })
    }

    /// Where we inherit `row` from an owner that died: its other backups that stay. What it last told may have reached us and not them,
    /// and whether it has we hear only from them.
    fn co_heirs(&self, row: u32) -> impl Iterator<Item = MemberId> {
        let (old, new) = (self.old.holders(row), self.new.holders(row));
        let inherits =
            new[0] == Some(self.local) && old[0].is_some_and(|owner| !self.survivors.keeps_state(owner));
        new.into_iter().flatten().filter(move |&member| {
            inherits
                && member != self.local
                && old.contains(&Some(member))
                && self.survivors.keeps_state(member)
        })
    }

    /// Whether we know that `member` was sent the flows of `row` ahead: we did it. What others should have sent, they may not have.
    fn was_sent_ahead(&self, row: u32, member: MemberId) -> bool {
        self.ahead
            .is_some_and(|ahead| ahead.base.holders(row)[0] == Some(self.local) && ahead.has(row, member))
    }

    /// What becomes of local entries in `row`.
    pub fn local_action(&self, row: u32) -> LocalAction {
        let local = Some(self.local);
        let place = |holders: Holders| holders.iter().position(|holder| *holder == local);
        match (place(self.old.holders(row)), place(self.new.holders(row))) {
            (_, None) => LocalAction::Former,
            (Some(1..), Some(0)) => LocalAction::Promote,
            (Some(0), Some(1..)) => LocalAction::Demote,
            _ => LocalAction::Keep,
        }
    }

    /// The members with a cache that hold nothing of `row` and are told of it when it moves (claim 20, \[770\]).
    fn cache_receivers(&self, row: u32) -> impl Iterator<Item = MemberId> {
        let new = self.new.holders(row);
        self.caches.iter().copied().filter(move |&member| {
            member != self.local && self.survivors.live.contains(&member) && !new.contains(&Some(member))
        })
    }
}

/// The rows whose flows may have to move, in order: those for which a driver visits its flow table.
pub fn changed_rows(change: &Change<'_>) -> impl Iterator<Item = u32> {
    (0..change.new.row_count()).filter(|&row| change.affects(row))
}

/// Applies the one rule to the local records of the changed rows.
///
/// Records of rows that have not changed are passed over, so a driver may hand over its whole flow table.
/// A record that came before the local view changed (the sender was faster) is also offered by the new owner to the new backups,
/// so that the owner learns that it is protected.
pub fn plan(change: &Change<'_>, records: impl IntoIterator<Item = Record>) -> TransferPlan {
    let mut plan = TransferPlan::default();
    for record in records {
        let row = change.new.row_of(&record.key);
        if !change.affects(row) {
            continue;
        }
        plan.local.push((record.key, change.local_action(row)));
        let [owner, backups @ ..] = change.new.holders(row);
        if change.sender(row).is_none_or(|sender| sender == change.local) {
            for to in change.receivers(row).filter(|&to| to != change.local) {
                plan.holders.entry(to).or_default().push(record);
            }
            for to in change.co_heirs(row) {
                plan.holders.entry(to).or_default().push(record);
            }
            for to in change.cache_receivers(row) {
                plan.caches.entry(to).or_default().push(record);
            }
        } else if owner == Some(change.local)
            && !change.old.holders(row).contains(&owner)
            && !change.ahead.is_some_and(|ahead| ahead.has(row, change.local))
        {
            for to in backups.into_iter().flatten().filter(|to| change.survivors.live.contains(to)) {
                plan.holders.entry(to).or_default().push(record);
            }
        }
    }
    plan
}

/// All that `to` should hold of what `local` has, for a peer that missed records ([`crate::Event::Overflow`]).
pub fn plan_refill(
    ranking: &dyn Ranking,
    to: MemberId,
    records: impl IntoIterator<Item = Record>,
) -> TransferPlan {
    let missing: Vec<Record> = records
        .into_iter()
        .filter(|record| ranking.holders(ranking.row_of(&record.key)).contains(&Some(to)))
        .collect();
    let holders = if missing.is_empty() { BTreeMap::new() } else { BTreeMap::from([(to, missing)]) };
    TransferPlan { holders, ..TransferPlan::default() }
}

/// What a member's cache has to offer when members left: the cached flows of rows all of whose old holders are gone, for the new holders.
///
/// `cached` is what stands in the cache; the driver flushes those entries afterwards where `flush_on_leave` is set (claim 20, \[750\]).
/// Flows with a surviving old holder are left out: that holder sends them.
pub fn plan_cache_offers(change: &Change<'_>, cached: impl IntoIterator<Item = Record>) -> TransferPlan {
    let mut plan = TransferPlan::default();
    for record in cached {
        let row = change.new.row_of(&record.key);
        if change.sender(row).is_some() {
            continue;
        }
        for to in change.receivers(row).filter(|&to| to != change.local) {
            plan.holders.entry(to).or_default().push(record);
        }
    }
    plan
}

/// The cached flows to flush when members left: those whose old owner is gone (claim 20, \[750\]).
pub fn cache_entries_of_departed(
    change: &Change<'_>,
    cached: impl IntoIterator<Item = FlowKey>,
) -> impl Iterator<Item = FlowKey> {
    cached.into_iter().filter(|key| {
        let [owner, ..] = change.old.holders(change.old.row_of(key));
        owner.is_some_and(|owner| !change.survivors.keeps_state(owner))
    })
}

/// Of `keys`, those that `local` holds under no row of `ranking`: what a former holder drops when the handover window has closed.
pub fn former_entries(
    local: MemberId,
    ranking: &dyn Ranking,
    keys: impl IntoIterator<Item = FlowKey>,
) -> impl Iterator<Item = FlowKey> {
    keys.into_iter().filter(move |key| !ranking.holders(ranking.row_of(key)).contains(&Some(local)))
}

#[cfg(test)]
mod tests;
