//! Transfer tables on their way to one peer, and the pace of all of them.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::num::NonZeroU32;
use std::time::{Duration, Instant};

use phalanx_flow::{MemberId, Record};

use super::aged;
use crate::codec::{Item, MAX_ITEMS};

/// Chunks on their way to one peer without an acknowledgement: what a 10 ms path carries of 3 million records a second.
pub(super) const CHUNK_WINDOW: usize = 32;
/// A chunk is a twentieth of a second's records, so that pacing is smooth, and at most a frame.
const CHUNKS_PER_SECOND: u32 = 20;
/// Records in one chunk at most: whatever is made of a chunk on its way stays in a processor's second cache.
const MAX_CHUNK: u32 = 1024;
const _: () = assert!(MAX_CHUNK as usize <= MAX_ITEMS);

/// How far a transfer to one member has come; counted in records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TransferProgress {
    /// The receiver.
    pub to: MemberId,
    /// Sent at least once.
    pub sent: usize,
    /// Applied in the receiver's forwarder, or refused by it.
    pub acked: usize,
    /// Of `acked`, those the receiver refused (its table is full, or it cannot reach the backend).
    pub refused: usize,
    /// All that is to be sent.
    pub total: usize,
}

/// A record to be sent, with when its idle time was read.
#[derive(Clone, Copy, Debug)]
struct Waiting {
    record: Record,
    at: Instant,
    cache: bool,
}

/// A part of a transfer table that was sent.
#[derive(Debug)]
pub(super) struct Chunk {
    records: Vec<Waiting>,
    /// Whether the peer lost its connection since: send it again.
    again: bool,
}

impl Chunk {
    /// The records that the receiver holds if it refused those at these places.
    pub(super) fn held(&self, refused: &BTreeSet<u16>) -> impl Iterator<Item = &Record> {
        let taken = (0_u16..).zip(&self.records).filter(|(place, _)| !refused.contains(place));
        taken.map(|(_, waiting)| waiting).filter(|waiting| !waiting.cache).map(|waiting| &waiting.record)
    }
}

/// The transfer table for one peer.
#[derive(Debug, Default)]
pub(super) struct Transfer {
    queue: VecDeque<Waiting>,
    inflight: BTreeMap<u64, Chunk>,
    again: BTreeSet<u64>,
    sent: usize,
    acked: usize,
    refused: usize,
    total: usize,
}

impl Transfer {
    pub(super) fn add(&mut self, at: Instant, records: impl IntoIterator<Item = (Record, bool)>) {
        let before = self.queue.len();
        self.queue.extend(records.into_iter().map(|(record, cache)| Waiting { record, at, cache }));
        self.total += self.queue.len() - before;
    }

    pub(super) fn is_done(&self) -> bool {
        self.queue.is_empty() && self.inflight.is_empty()
    }

    /// The records to be held that are not acknowledged yet.
    pub(super) fn records(&self) -> impl Iterator<Item = &Record> {
        let sent = self.inflight.values().flat_map(|chunk| &chunk.records);
        self.queue.iter().chain(sent).filter(|waiting| !waiting.cache).map(|waiting| &waiting.record)
    }

    /// Records not acknowledged yet.
    pub(super) fn remaining(&self) -> usize {
        self.total - self.acked
    }

    pub(super) fn progress(&self, to: MemberId) -> TransferProgress {
        TransferProgress { to, sent: self.sent, acked: self.acked, refused: self.refused, total: self.total }
    }

    /// Marks all that is on its way to be sent again.
    pub(super) fn handle_disconnected(&mut self) {
        for (&id, chunk) in &mut self.inflight {
            chunk.again = true;
            self.again.insert(id);
        }
    }

    /// Drops records that `ended` says have ended, from what has not been sent.
    fn take(&mut self, max: usize, ended: impl Fn(&Record, Instant) -> bool) -> Vec<Waiting> {
        let mut records = Vec::new();
        while records.len() < max
            && let Some(waiting) = self.queue.pop_front()
        {
            let idle = Duration::from_millis(waiting.record.idle_ms.into());
            if ended(&waiting.record, waiting.at.checked_sub(idle).unwrap_or(waiting.at)) {
                self.sent += 1;
                self.acked += 1;
            } else {
                records.push(waiting);
            }
        }
        records
    }

    /// Whether there is something to be sent now, pace aside.
    pub(super) fn wants_to_send(&self) -> bool {
        !self.again.is_empty() || (!self.queue.is_empty() && self.inflight.len() < CHUNK_WINDOW)
    }

    /// The next chunk, its name from `next_id`; `None` if there is nothing to send or the pace forbids it.
    pub(super) fn poll_chunk(
        &mut self,
        now: Instant,
        pace: &mut Pace,
        next_id: &mut u64,
        ended: impl Fn(&Record, Instant) -> bool,
    ) -> Option<(u64, Vec<Item>)> {
        if let Some(&id) = self.again.first() {
            let chunk = self.inflight.get_mut(&id)?;
            if !pace.take(now, chunk.records.len()) {
                return None;
            }
            self.again.remove(&id);
            chunk.again = false;
            return Some((id, items(&chunk.records, now)));
        }
        if !self.wants_to_send() || !pace.take(now, pace.chunk().min(self.queue.len())) {
            return None;
        }
        let records = self.take(pace.chunk(), ended);
        if records.is_empty() {
            return None;
        }
        let id = *next_id;
        *next_id += 1;
        self.sent += records.len();
        let items = items(&records, now);
        self.inflight.insert(id, Chunk { records, again: false });
        Some((id, items))
    }

    /// Takes the acknowledgement of a chunk and returns it; `None` if it is not on its way.
    pub(super) fn handle_ack(&mut self, id: u64, refused: &BTreeSet<u16>) -> Option<Chunk> {
        let chunk = self.inflight.remove(&id)?;
        self.again.remove(&id);
        self.acked += chunk.records.len();
        self.refused += refused.len().min(chunk.records.len());
        Some(chunk)
    }
}

fn items(records: &[Waiting], now: Instant) -> Vec<Item> {
    records
        .iter()
        .map(|&Waiting { mut record, at, cache }| {
            record.idle_ms = aged(record.idle_ms, at, now);
            Item::Associate { record, cache }
        })
        .collect()
}

/// A token bucket over all transfers of one member, in records.
#[derive(Debug)]
pub(super) struct Pace {
    rate: u32,
    /// Records that may be sent, in billionths.
    tokens: u128,
    at: Instant,
}

/// One record in the unit of [`Pace::tokens`]: a rate in records per second times nanoseconds gives it exactly.
const RECORD: u128 = 1_000_000_000;

impl Pace {
    pub(super) fn new(now: Instant, rate: NonZeroU32) -> Self {
        let mut pace = Self { rate: rate.get(), tokens: 0, at: now };
        // As much as the longest frame has, or what a twentieth of a second allows.
        pace.tokens = u128::from((rate.get() / CHUNKS_PER_SECOND).clamp(1, MAX_ITEMS as u32)) * RECORD;
        pace
    }

    /// Records in one chunk.
    pub(super) fn chunk(&self) -> usize {
        (self.rate / CHUNKS_PER_SECOND).clamp(1, MAX_CHUNK) as usize
    }

    /// How much the bucket holds: two chunks, or what comes in while a driver sleeps for a twentieth of a second.
    fn capacity(&self) -> u128 {
        (2 * self.chunk() as u128).max(u128::from(self.rate / CHUNKS_PER_SECOND)) * RECORD
    }

    fn refill(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(self.at).as_nanos();
        self.at = self.at.max(now);
        self.tokens = (self.tokens + passed * u128::from(self.rate)).min(self.capacity());
    }

    fn take(&mut self, now: Instant, records: usize) -> bool {
        self.refill(now);
        let cost = records as u128 * RECORD;
        if self.tokens < cost {
            return false;
        }
        self.tokens -= cost;
        true
    }

    /// When a whole chunk may be sent.
    pub(super) fn next_timeout(&self) -> Instant {
        let missing = (self.chunk() as u128 * RECORD).saturating_sub(self.tokens);
        let wait = missing.div_ceil(u128::from(self.rate));
        self.at + Duration::from_nanos(u64::try_from(wait).unwrap_or(u64::MAX / 2))
    }
}
