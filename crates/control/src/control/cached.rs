//! What a cache has to offer when members are lost (claim 20, \[750\]).
//!
//! Owner and backup that are lost in one moment are confirmed down one after the other, and what the first owned is flushed from the cache
//! by then: what stood in it is kept for a while, and offered again when the next one is confirmed, by the table that counted before the
//! first.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use phalanx_flow::{FlowKey, Record};
use phalanx_rebalancer::{Change, aged, cache_entries_of_departed, plan_cache_offers};

use super::Control;
use crate::planner::{TableChange, TableRanking};

/// Members that are lost in one moment are confirmed down within this of each other: some probe rounds, also under load. Far shorter than
/// an end is remembered (120 s), so that nothing is offered that has ended.
const KEPT_FOR: Duration = Duration::from_secs(10);

/// What stood in the cache when somebody was lost.
pub(super) struct Kept {
    /// When somebody was last lost: the time of the idle times.
    at: Instant,
    /// The table that was in force before.
    base: Arc<TableRanking>,
    records: HashMap<FlowKey, Record>,
}

impl Control {
    /// Members are gone: offers what the cache has of flows all of whose holders are, and flushes what the departed owned.
    pub(super) fn offer_cached(&mut self, change: &TableChange, now: Instant) {
        let mut kept = self.kept_cached.take().unwrap_or_else(|| Kept {
            at: now,
            base: Arc::clone(&change.old),
            records: HashMap::new(),
        });
        for record in kept.records.values_mut() {
            record.idle_ms = aged(record.idle_ms, kept.at, now);
        }
        kept.at = now;
        self.with_change(change, |this, change| {
            let cached = this.flush_departed(change);
            // Nobody tells a cache that a tuple is used again: where a connection has ended there, whoever recovers the next one knows
            // better.
            let live = cached.into_iter().filter(|record| record.state.is_live());
            kept.records.extend(live.map(|record| (record.key, record)));
            let change = Change { old: &*kept.base, ..*change };
            let mut records: Vec<Record> = kept.records.values().copied().collect();
            records.sort_by_key(|record| record.key);
            let offers = plan_cache_offers(&change, records.iter().copied());
            // What is ours from now on nobody else need send us.
            let is_ours = |record: &Record| {
                let row = change.new.row_of(&record.key);
                change.sender(row).is_none() && change.receivers(row).any(|member| member == change.local)
            };
            records.retain(is_ours);
            this.upsert(now, &records, &mut Vec::new());
            this.replicator.begin_transfer(now, offers);
        });
        self.kept_cached = Some(kept);
        self.transferring = true;
    }

    /// Flushes what the departed owned from the cache, where `flush_on_leave` is set, and returns all that stood in it. What the others
    /// own stays: nobody would send it again.
    fn flush_departed(&self, change: &Change<'_>) -> Vec<Record> {
        let cached = self.forwarder.flush_cache();
        let mut stays = cached.clone();
        if self.settings.flush_on_leave {
            let keys = cached.iter().map(|record| record.key);
            let departed: HashSet<FlowKey> = cache_entries_of_departed(change, keys).collect();
            stays.retain(|record| !departed.contains(&record.key));
        }
        self.forwarder.upsert_cache(&stays);
        cached
    }

    /// Lets go of what is kept.
    pub(super) fn forget_cached_if_due(&mut self, now: Instant) {
        self.kept_cached.take_if(|kept| now.saturating_duration_since(kept.at) >= KEPT_FOR);
    }
}
