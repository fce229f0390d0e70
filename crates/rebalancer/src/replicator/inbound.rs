//! What peers ask of the local forwarder, and what follows when it has been done.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use phalanx_flow::{FlowFlags, FlowKey, MemberId, Record};

use super::ending::IDLE_SLACK_MS;
use super::{
    Apply, ApplyBatch, ApplyResult, Control, Event, Frame, Held, Holders, Item, LOCAL_BATCH, Lookup,
    MAX_INBOUND, PeerError, Refusal, Replicator, Unprotected,
};

/// What follows when one change was applied.
#[derive(Clone, Copy, Debug)]
pub(super) enum Then {
    Nothing,
    /// A removal of ours, to be announced.
    Announce {
        key: FlowKey,
        birth: u64,
        seen: Instant,
    },
    /// The end a peer announced.
    Ended {
        key: FlowKey,
        birth: u64,
        seen: Instant,
    },
    /// A removal of ours that concerns nobody else.
    Forget {
        key: FlowKey,
        birth: u64,
    },
    /// We recorded a flow nobody knew: replicate it.
    Record(Record),
    /// A peer's record, at this place in its frame.
    Received {
        place: u16,
        record: Record,
        hint: bool,
    },
}

/// Where an apply batch came from, and so who gets an acknowledgement.
#[derive(Clone, Copy, Debug)]
enum Origin {
    Local,
    Batch { peer: MemberId, epoch: u64, seq: u64 },
    Chunk { peer: MemberId, epoch: u64, id: u64 },
}

#[derive(Debug)]
struct Pending {
    origin: Origin,
    /// Of a transfer table, upserted as they are.
    records: Arc<Vec<Record>>,
    then: Vec<Then>,
}

#[derive(Debug)]
struct Question {
    peer: MemberId,
    epoch: u64,
    asked: Vec<(FlowKey, u64)>,
}

/// The queues towards the forwarder.
#[derive(Debug, Default)]
pub(super) struct Inbound {
    next_id: u64,
    ready: VecDeque<(ApplyBatch, Pending)>,
    pending: HashMap<u64, Pending>,
    lookups: VecDeque<(Lookup, Question)>,
    questions: HashMap<u64, Question>,
    /// Frames of each peer that have not been applied.
    unapplied: BTreeMap<MemberId, usize>,
}

impl Inbound {
    /// Everything that waits.
    pub(super) fn len(&self) -> usize {
        self.ready.len()
            + self.pending.len()
            + self.lookups.len()
            + self.questions.len()
            + self.unapplied.len()
    }

    pub(super) fn push_local(&mut self, apply: Apply, then: Then) {
        if let Some((batch, pending)) = self.ready.back_mut()
            && batch.from.is_none()
            && batch.items.len() < LOCAL_BATCH
        {
            batch.items.push(apply);
            pending.then.push(then);
            return;
        }
        self.push(
            None,
            vec![apply],
            Pending { origin: Origin::Local, records: Arc::default(), then: vec![then] },
        );
    }

    fn push(&mut self, from: Option<MemberId>, items: Vec<Apply>, pending: Pending) {
        self.next_id += 1;
        let records = Arc::clone(&pending.records);
        self.ready.push_back((ApplyBatch { id: self.next_id, from, records, items }, pending));
        if let Some(from) = from {
            *self.unapplied.entry(from).or_default() += 1;
        }
    }

    pub(super) fn poll_apply(&mut self) -> Option<ApplyBatch> {
        let (batch, pending) = self.ready.pop_front()?;
        self.pending.insert(batch.id, pending);
        Some(batch)
    }

    pub(super) fn poll_lookup(&mut self) -> Option<Lookup> {
        let (lookup, question) = self.lookups.pop_front()?;
        self.questions.insert(lookup.id, question);
        Some(lookup)
    }

    fn take_pending(&mut self, id: u64) -> Option<Pending> {
        let pending = self.pending.remove(&id)?;
        if let Origin::Batch { peer, .. } | Origin::Chunk { peer, .. } = pending.origin
            && let Some(unapplied) = self.unapplied.get_mut(&peer)
        {
            *unapplied -= 1;
            if *unapplied == 0 {
                self.unapplied.remove(&peer);
            }
        }
        Some(pending)
    }
}

pub(super) fn version(record: &Record) -> Held {
    (record.key, record.birth, record.update)
}

impl Replicator {
    /// Takes what the forwarder did with an [`ApplyBatch`], change by change; a result that is missing counts as refused.
    pub fn handle_applied(&mut self, now: Instant, id: u64, results: &[ApplyResult]) {
        self.advance(now);
        let Some(pending) = self.inbound.take_pending(id) else { return };
        let from = match pending.origin {
            Origin::Local => None,
            Origin::Batch { peer, .. } | Origin::Chunk { peer, .. } => Some(peer),
        };
        let mut refused = Vec::new();
        let mut results = results.iter().copied().chain(std::iter::repeat(ApplyResult::Full));
        for ((place, record), result) in (0_u16..).zip(&*pending.records).zip(&mut results) {
            self.handle_received(result, place, record, false, from, &mut refused);
        }
        for (then, result) in pending.then.into_iter().zip(results) {
            match then {
                Then::Nothing => {}
                // An entry that lives, or is of another life, is left alone and not announced.
                Then::Announce { key, birth, seen } if result == ApplyResult::Applied => {
                    self.announce_end(key, birth, seen);
                }
                Then::Ended { key, birth, seen } if result == ApplyResult::Applied => {
                    self.note_end(&key, birth, seen);
                }
                Then::Forget { key, birth } if result == ApplyResult::Applied => {
                    self.forget_unprotected(&key, birth)
                }
                Then::Announce { .. } | Then::Forget { .. } | Then::Ended { .. } => {}
                Then::Record(record) => {
                    if result == ApplyResult::Applied {
                        self.replicate(record);
                    }
                }
                Then::Received { place, record, hint } => {
                    self.handle_received(result, place, &record, hint, from, &mut refused);
                }
            }
        }
        self.acknowledge(pending.origin, refused);
    }

    /// What the forwarder did with a peer's record, at this place in its frame.
    #[inline]
    fn handle_received(
        &mut self,
        result: ApplyResult,
        place: u16,
        record: &Record,
        hint: bool,
        from: Option<MemberId>,
        refused: &mut Vec<(u16, Refusal)>,
    ) {
        match result {
            ApplyResult::Applied => {
                self.counters.applied += 1;
                if hint {
                    self.replicate(*record);
                } else if let Some(from) = from {
                    self.pass_on(record, from);
                }
            }
            // What our backup sends it holds, and we may have heard of it from elsewhere.
            ApplyResult::Stale => {
                let backups = self.backups_of_own(&record.key);
                if let Some(from) = from.filter(|from| backups.contains(&Some(*from))) {
                    self.note_held(from, version(record));
                }
            }
            ApplyResult::Full => refused.push((place, Refusal::Full)),
            ApplyResult::UnknownBackend => refused.push((place, Refusal::UnknownBackend)),
        }
    }

    /// Takes the answer to a [`Lookup`], one for each key: the record in the flow table, if there is one.
    pub fn handle_lookup(&mut self, now: Instant, id: u64, records: &[Option<Record>]) {
        self.advance(now);
        let Some(question) = self.inbound.questions.remove(&id) else { return };
        if self.peers.get(&question.peer).is_none_or(|peer| peer.epoch != question.epoch) {
            return;
        }
        for ((key, birth), record) in question.asked.into_iter().zip(records) {
            // A later birth is another life of the tuple: of the one asked for we have nothing.
            let alive = record.as_ref().filter(|record| record.birth != 0 && record.birth <= birth);
            let idle_ms = alive.map(|record| record.idle_ms);
            self.push(question.peer, Item::IdleReply { key, birth, idle_ms });
        }
    }

    pub(super) fn handle_frame(&mut self, from: MemberId, epoch: u64, frame: Frame) -> Result<(), PeerError> {
        if !self.is_enabled() {
            self.counters.ignored += 1;
            return Ok(());
        }
        match frame {
            Frame::Batch { seq, items } => {
                self.handle_items(from, Origin::Batch { peer: from, epoch, seq }, items)
            }
            Frame::Chunk { id, records, cached } => {
                self.handle_records(from, Origin::Chunk { peer: from, epoch, id }, records, &cached)
            }
            Frame::Control(Control::Ack { seq, refused }) => {
                self.handle_ack(from, seq, refused);
                Ok(())
            }
            Frame::Control(Control::ChunkAck { id, refused }) => {
                self.handle_chunk_ack(from, id, refused);
                Ok(())
            }
            Frame::Control(Control::Digests(digests)) => {
                self.events.push_back(Event::Digests { from, digests });
                Ok(())
            }
            Frame::Control(Control::Differing { round, rows }) => {
                self.events.push_back(Event::Differing { from, round, rows });
                Ok(())
            }
        }
    }

    /// A part of a transfer table. Nearly always all of it is to be held, and is handed on as it is.
    fn handle_records(
        &mut self,
        from: MemberId,
        origin: Origin,
        records: Vec<Record>,
        cached: &[u16],
    ) -> Result<(), PeerError> {
        let is_barred = |record: &Record| {
            !self.ended.is_empty() && self.bars(&record.key, record.birth, record.idle_ms).is_some()
        };
        let is_plain = |record: &Record| record.birth != 0 && !is_barred(record);
        if records.is_empty() || !cached.is_empty() || !records.iter().all(is_plain) {
            let items = (0_u16..).zip(records).map(|(place, record)| Item::Associate {
                record,
                cache: cached.binary_search(&place).is_ok(),
            });
            return self.handle_items(from, origin, items.collect());
        }
        self.admit(from)?;
        self.counters.items_received += records.len() as u64;
        let wall_ms = self.wall_ms();
        for record in &records {
            if !self.clock.observe(wall_ms, record.birth) {
                self.counters.clock_ahead += 1;
            }
        }
        let pending = Pending { origin, records: Arc::new(records), then: Vec::new() };
        self.inbound.push(Some(from), Vec::new(), pending);
        Ok(())
    }

    /// Whether `from` keeps to its windows.
    fn admit(&self, from: MemberId) -> Result<(), PeerError> {
        if self.inbound.unapplied.get(&from).is_some_and(|&frames| frames >= MAX_INBOUND)
            || self.inbound.lookups.len() + self.inbound.questions.len()
                >= MAX_INBOUND * self.peers.len().max(1)
        {
            return Err(PeerError::Window);
        }
        Ok(())
    }

    fn handle_items(&mut self, from: MemberId, origin: Origin, items: Vec<Item>) -> Result<(), PeerError> {
        self.admit(from)?;
        self.counters.items_received += items.len() as u64;
        let wall_ms = self.wall_ms();
        let local_caches = self.view.as_ref().is_some_and(|view| view.caches.contains(&self.config.local));
        let mut applies = Vec::with_capacity(items.len());
        let mut then = Vec::with_capacity(items.len());
        let mut asked = Vec::new();
        for (place, item) in (0u16..).zip(items) {
            let birth = match item {
                Item::Associate { record, .. } => record.birth,
                Item::End { birth, .. } => birth,
                Item::Hint { .. } | Item::Touch { .. } | Item::IdleQuery { .. } | Item::IdleReply { .. } => 0,
            };
            if !self.clock.observe(wall_ms, birth) {
                self.counters.clock_ahead += 1;
            }
            match item {
                Item::Associate { record, .. } if record.birth == 0 => self.counters.misplaced += 1,
                Item::Associate { record, cache }
                    if let Some(seen) = self.bars(&record.key, record.birth, record.idle_ms) =>
                {
                    self.counters.barred += 1;
                    // Who still tells of it has missed its end.
                    if !cache {
                        self.push_end(from, record.key, record.birth, seen, false);
                    }
                }
                Item::Associate { record, cache: true } => {
                    applies.push(Apply::CacheUpsert(record));
                    then.push(Then::Nothing);
                }
                Item::Associate { record, cache: false } => {
                    applies.push(Apply::Upsert(record));
                    then.push(Then::Received { place, record, hint: false });
                }
                Item::Hint { mut record } => {
                    if !self.holders(&record.key).contains(&Some(self.config.local)) {
                        self.counters.misplaced += 1;
                        continue;
                    }
                    // Whatever the sender says, a flow nobody knew is recovered, and born here and now.
                    record.flags = record.flags.with(FlowFlags::RECOVERED, true);
                    record.birth = self.clock.stamp(wall_ms);
                    record.update = 0;
                    applies.push(Apply::Upsert(record));
                    then.push(Then::Received { place, record, hint: true });
                }
                Item::End { key, birth, idle_ms, cache } => {
                    let seen = self.seen(idle_ms, self.now);
                    if cache {
                        self.note_end(&key, birth, seen);
                    } else {
                        applies.push(Apply::End {
                            key,
                            birth,
                            min_idle_ms: idle_ms.saturating_sub(IDLE_SLACK_MS),
                        });
                        then.push(Then::Ended { key, birth, seen });
                    }
                    if cache || local_caches {
                        applies.push(Apply::CacheRemove { key });
                        then.push(Then::Nothing);
                    }
                }
                Item::Touch { key, birth, idle_ms } => {
                    if self.bars(&key, birth, idle_ms).is_none() {
                        applies.push(Apply::Touch { key, idle_ms });
                        then.push(Then::Nothing);
                    }
                }
                Item::IdleQuery { key, birth } => asked.push((key, birth)),
                Item::IdleReply { key, birth, idle_ms } => self.handle_idle_reply(from, &key, birth, idle_ms),
            }
        }
        if !asked.is_empty() {
            self.inbound.next_id += 1;
            let id = self.inbound.next_id;
            let epoch = self.peers.get(&from).map_or(0, |peer| peer.epoch);
            let keys = asked.iter().map(|&(key, _)| key).collect();
            self.inbound.lookups.push_back((Lookup { id, keys }, Question { peer: from, epoch, asked }));
        }
        if applies.is_empty() {
            self.acknowledge(origin, Vec::new());
        } else {
            self.inbound.push(Some(from), applies, Pending { origin, records: Arc::default(), then });
        }
        Ok(())
    }

    /// See [`Births::bars`](super::ended::Births::bars), of a packet that was seen this long ago.
    pub(super) fn bars(&self, key: &FlowKey, birth: u64, idle_ms: u32) -> Option<Instant> {
        self.ended.bars(key, birth, self.seen(idle_ms, self.now))
    }

    /// Sends the acknowledgement, unless the connection it belongs to is gone.
    fn acknowledge(&mut self, origin: Origin, refused: Vec<(u16, Refusal)>) {
        let (peer, epoch, control) = match origin {
            Origin::Local => return,
            Origin::Batch { peer, epoch, seq } => (peer, epoch, Control::Ack { seq, refused }),
            Origin::Chunk { peer, epoch, id } => (peer, epoch, Control::ChunkAck { id, refused }),
        };
        if let Some(peer) = self.peers.get_mut(&peer)
            && peer.connected
            && peer.epoch == epoch
        {
            peer.controls.push_back(control);
        }
    }

    fn handle_ack(&mut self, from: MemberId, seq: u64, refused: Vec<(u16, Refusal)>) {
        let Some((_, items)) = self.peers.get_mut(&from).and_then(|peer| peer.inflight.remove(&seq)) else {
            return;
        };
        let refused: BTreeSet<u16> = refused.into_iter().map(|(place, _)| place).collect();
        for (place, item) in (0u16..).zip(items) {
            if let Item::Associate { record, cache: false } = item
                && !refused.contains(&place)
            {
                self.note_held(from, version(&record));
            }
        }
        self.note_refused(from, refused.len());
    }

    fn handle_chunk_ack(&mut self, from: MemberId, id: u64, refused: Vec<(u16, Refusal)>) {
        let refused: BTreeSet<u16> = refused.into_iter().map(|(place, _)| place).collect();
        let transfer = self.peers.get_mut(&from).and_then(|peer| peer.transfer.as_mut());
        let Some(transfer) = transfer else { return };
        let is_ahead = transfer.is_ahead();
        let Some(chunk) = transfer.handle_ack(id, &refused) else { return };
        if is_ahead && refused.is_empty() {
            self.note_chunk_ahead(from, chunk);
        } else {
            for record in chunk.held(&refused) {
                self.note_held(from, version(record));
            }
        }
        self.note_refused(from, refused.len());
        self.finish_transfers();
    }

    fn note_refused(&mut self, peer: MemberId, refused: usize) {
        if refused > 0 {
            self.counters.refused += refused as u64;
            self.events.push_back(Event::PeerFull { peer, refused });
        }
    }

    /// A comparison has shown that `peer` holds these.
    pub fn handle_compared(&mut self, now: Instant, peer: MemberId, held: &[Held]) {
        self.advance(now);
        for &(key, birth, update) in held {
            let backups = self.backups_of_own(&key);
            if backups.contains(&Some(peer)) {
                // Another backup may still lack it.
                self.unprotected.entry(key).or_insert(Unprotected::new((birth, update), backups));
                self.note_held(peer, (key, birth, update));
            }
        }
    }

    /// A peer's record was news to us: the other holders may not have it either, so tell them, all but the one it came from.
    ///
    /// Between owner and backups this costs nothing. It repairs what moved while views differed, or while one change followed another
    /// before its transfers were done: who receives a record late gives it to who should have it now. It ends, because what is no
    /// news goes no further. What comes ahead of a planned change is no news to the present holders: one of them sent it.
    fn pass_on(&mut self, record: &Record, from: MemberId) {
        let local = Some(self.config.local);
        let row = self.row_of(&record.key);
        let holders = self.holders_in(row);
        if !holders.contains(&local) && self.pending_holders(row).contains(&local) {
            return;
        }
        // While nothing moves an owner tells all other holders by itself.
        let at_rest = self.view.as_ref().is_some_and(|view| view.tables().count() == 1);
        if at_rest && holders[0] == Some(from) && holders.contains(&local) {
            return;
        }
        let backups = self.backups_of_own(&record.key);
        if let Some(flow) = self.unprotected.get_mut(&record.key) {
            // It has taken the place of what was counted.
            flow.version = (record.birth, record.update);
        }
        let missing = backups.map(|backup| backup.filter(|&to| to != from));
        if missing.iter().any(Option::is_some) {
            let version = (record.birth, record.update);
            self.unprotected.insert(record.key, Unprotected::new(version, missing));
        } else if backups.contains(&Some(from)) {
            self.note_held(from, version(record));
        }
        // What we sent ahead was without it.
        let ahead = if holders[0] == local { self.pending_holders(row) } else { Holders::default() };
        let ahead = ahead.into_iter().flatten().filter(|to| !holders.contains(&Some(*to)));
        for to in holders.into_iter().flatten().chain(ahead).filter(|&to| to != from) {
            self.push(to, Item::Associate { record: *record, cache: false });
        }
    }
}
