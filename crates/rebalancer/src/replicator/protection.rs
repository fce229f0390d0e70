//! Which flows of ours their backups have not acknowledged, and what they have acknowledged ahead of a switch.

use phalanx_flow::{FlowKey, MemberId};

use super::inbound::{Then, version};
use super::sending::{Chunk, Transfer};
use super::{Apply, Held, Holders, Item, MAX_HOLDERS, Replicator, ViewInput};

/// How many acknowledgements ahead of a switch are kept beyond two for each unprotected flow, before those that are of no use are dropped.
const AHEAD_SPARE: usize = 16_384;

/// Birth and update of a record.
pub(super) type Version = (u64, u32);

/// What a flow's backups have not acknowledged.
#[derive(Clone, Copy, Debug)]
pub(super) struct Unprotected {
    pub(super) version: Version,
    /// The backups that have not; nobody, if there is no backup at all.
    pub(super) missing: [Option<MemberId>; MAX_HOLDERS - 1],
    /// While a switch is settled: who has acknowledged this version ahead of it.
    ahead: [Option<MemberId>; MAX_HOLDERS - 1],
}

impl Unprotected {
    pub(super) fn new(version: Version, missing: [Option<MemberId>; MAX_HOLDERS - 1]) -> Self {
        Self { version, missing, ahead: Default::default() }
    }

    fn lacks(&self, member: MemberId) -> bool {
        self.missing.contains(&Some(member))
    }
}

impl Replicator {
    /// After a switch from `old`: who is a backup now may have acknowledged flows before it was, and what waits for it is unprotected
    /// from now on.
    pub(super) fn settle_unprotected(&mut self, old: Option<&ViewInput>) {
        for transfer in self.peers.values_mut().filter_map(|peer| peer.transfer.as_mut()) {
            transfer.handle_switch();
        }
        let chunks = std::mem::take(&mut self.ahead_chunks);
        let of_chunks = chunks
            .iter()
            .flat_map(|(member, chunk)| chunk.records().map(|record| (*member, version(record))))
            .filter(|(member, (key, ..))| self.backups_of_own(key).contains(&Some(*member)));
        let of_chunks: Vec<_> = of_chunks.collect();
        for (member, (key, birth, update)) in std::mem::take(&mut self.ahead).into_iter().chain(of_chunks) {
            if let Some(flow) = self.unprotected.get_mut(&key)
                && flow.version == (birth, update)
                && !flow.ahead.contains(&Some(member))
                && let Some(free) = flow.ahead.iter_mut().find(|ahead| ahead.is_none())
            {
                *free = Some(member);
            }
        }
        let mut unprotected = std::mem::take(&mut self.unprotected);
        unprotected.retain(|&key, flow| {
            let backups = self.backups_of_own(&key);
            let holders =
                old.map_or_else(Holders::default, |old| old.ranking.holders(old.ranking.row_of(&key)));
            // Who was no holder before is sent the flow now, unless it was ahead.
            let ahead = std::mem::take(&mut flow.ahead);
            flow.missing = backups.map(|backup| {
                backup.filter(|&backup| {
                    let has_it = ahead.contains(&Some(backup)) || holders.contains(&Some(backup));
                    flow.lacks(backup) || !has_it
                })
            });
            let is_held = flow.missing.iter().all(Option::is_none) && backups.iter().any(Option::is_some);
            if is_held {
                let (birth, update) = flow.version;
                self.inbound.push_local(Apply::Protect { key, birth, update }, Then::Nothing);
            }
            !is_held
        });
        self.unprotected = unprotected;
        let mut waiting = Vec::new();
        for (&id, peer) in &self.peers {
            let batches = peer.inflight.values().flat_map(|(_, items)| items);
            let sent = batches.filter_map(|item| match item {
                Item::Associate { record, cache: false } => Some(record),
                _ => None,
            });
            let records =
                sent.chain(peer.outbox.records()).chain(peer.transfer.iter().flat_map(Transfer::records));
            waiting.extend(
                records
                    .filter(|record| self.backups_of_own(&record.key).contains(&Some(id)))
                    .map(|record| (record.key, (record.birth, record.update), id)),
            );
        }
        for (key, version, backup) in waiting {
            self.note_missing(key, version, backup);
        }
    }

    /// Notes what `peer` holds of a flow in `row`, if it will be a backup of it.
    pub(super) fn note_ahead(&mut self, row: u32, peer: MemberId, held: Held) {
        if self.unprotected.is_empty() || !self.pending_holders(row)[1..].contains(&Some(peer)) {
            return;
        }
        self.ahead.push((peer, held));
        self.bound_ahead();
    }

    /// The same for a whole chunk: which of its flows the peer will be a backup of is looked at when the change comes into force.
    pub(super) fn note_chunk_ahead(&mut self, peer: MemberId, chunk: Chunk) {
        let is_planned = self.view.as_ref().is_some_and(|view| view.pending.is_some());
        if self.unprotected.is_empty() || !is_planned || chunk.records().next().is_none() {
            return;
        }
        self.ahead_chunks.push((peer, chunk));
        self.bound_ahead();
    }

    /// What is kept of acknowledgements ahead of a switch, flow by flow.
    pub(super) fn noted_ahead(&self) -> usize {
        self.ahead.len() + self.ahead_chunks.iter().map(|(_, chunk)| chunk.len()).sum::<usize>()
    }

    fn bound_ahead(&mut self) {
        if self.noted_ahead() <= 2 * self.unprotected.len() + AHEAD_SPARE {
            return;
        }
        // Each flow has been told of again and again, or most are protected by now.
        let chunks = std::mem::take(&mut self.ahead_chunks);
        let of_chunks =
            chunks.iter().flat_map(|(peer, chunk)| chunk.records().map(|record| (*peer, version(record))));
        self.ahead.extend(of_chunks);
        let unprotected = &self.unprotected;
        self.ahead.retain(|(_, (key, birth, update))| {
            unprotected.get(key).is_some_and(|flow| flow.version == (*birth, *update))
        });
    }

    /// A backup of a flow of ours is being sent this version. What is known of a later one, or was known before, stays.
    pub(super) fn note_missing(&mut self, key: FlowKey, version: Version, backup: MemberId) {
        let flow = self.unprotected.entry(key).or_insert(Unprotected::new(version, Default::default()));
        if !flow.lacks(backup)
            && let Some(free) = flow.missing.iter_mut().find(|missing| missing.is_none())
        {
            *free = Some(backup);
        }
    }

    /// `peer` holds this version: if it is the last backup of a flow of ours that had not said so, the flow is protected.
    pub(super) fn note_held(&mut self, peer: MemberId, (key, birth, update): Held) {
        let row = self.row_of(&key);
        let backups = self.backups_in_own(row);
        if !backups.contains(&Some(peer)) {
            self.note_ahead(row, peer, (key, birth, update));
            return;
        }
        match self.unprotected.get_mut(&key) {
            Some(flow) => {
                // A later version that waits for its own acknowledgement stays unprotected.
                if flow.version.0 != birth || flow.version.1 > update {
                    return;
                }
                for missing in flow.missing.iter_mut().filter(|missing| **missing == Some(peer)) {
                    *missing = None;
                }
                if flow.missing.iter().any(Option::is_some) {
                    return;
                }
            }
            // It is protected, or nobody knows who else lacks it: then the next comparison says.
            None if backups.iter().flatten().count() > 1 => return,
            None => {}
        }
        self.unprotected.remove(&key);
        self.inbound.push_local(Apply::Protect { key, birth, update }, Then::Nothing);
    }

    pub(super) fn forget_unprotected(&mut self, key: &FlowKey, birth: u64) {
        if self.unprotected.get(key).is_some_and(|flow| flow.version.0 <= birth) {
            self.unprotected.remove(key);
        }
    }
}
