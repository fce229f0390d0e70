//! Flows that are counted as unprotected though nothing is on its way that could be acknowledged.
//!
//! A peer refused them; or, after members had been cut off from each other, what it acknowledged was another record of the flow than
//! the one that was counted. Nobody would ever protect them.

use phalanx_flow::{FlowKey, MemberId, Record};

use super::{Replicator, Unprotected};

impl Replicator {
    /// Some of them, at most `limit`: those of which a backup that has not acknowledged them is connected and has acknowledged all it was
    /// sent, and those that have no backup. In the order of their keys: in what order a full peer is told decides what it takes, and a run must be
    /// one that can be repeated. If there are more, the next call goes on where this one ends.
    pub fn stalled(&mut self, limit: usize) -> Vec<FlowKey> {
        let is_quiet = |backup: MemberId| {
            self.peers.get(&backup).is_some_and(|peer| {
                peer.connected
                    && peer.outbox.len() == 0
                    && peer.inflight.is_empty()
                    && peer.transfer.is_none()
            })
        };
        // Where there is no backup nothing is on its way, and what is gone from the table would count for good.
        let waits = |flow: &Unprotected| {
            let mut missing = flow.missing.into_iter().flatten().peekable();
            missing.peek().is_none() || missing.any(is_quiet)
        };
        let waiting = self.unprotected.iter().filter(|(_, flow)| waits(flow)).map(|(key, _)| *key);
        let mut stalled: Vec<FlowKey> = waiting.collect();
        let last = self.told_last;
        let turn = |key: &FlowKey| (Some(*key) <= last, *key);
        let more = stalled.len() > limit;
        if more {
            stalled.select_nth_unstable_by_key(limit, turn);
            stalled.truncate(limit);
        }
        stalled.sort_unstable_by_key(turn);
        self.told_last = stalled.last().copied().filter(|_| more);
        stalled
    }

    /// What the forwarder has of a [stalled](Self::stalled) flow: it is told again, if there is anybody to tell, or no longer counted if
    /// there is nothing.
    pub fn handle_stalled(&mut self, key: &FlowKey, record: Option<Record>) {
        let record = record.filter(|record| record.birth != 0 && self.is_worth_telling(record));
        if record.is_some() && self.backups_of_own(key).iter().all(Option::is_none) {
            return;
        }
        self.unprotected.remove(key);
        if let Some(record) = record {
            self.counters.told_again += 1;
            self.replicate(record);
        }
    }
}
