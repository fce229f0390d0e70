//! Transfer tables on their way to one peer, and the pace of all of them.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::{Duration, Instant};

use phalanx_flow::{MemberId, Record};

use super::aged;
use super::ended::Births;
use crate::codec::{MAX_ITEMS, encode_chunk};

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

/// Records to be sent, that stay where they are until all of them are acknowledged.
#[derive(Debug)]
struct Table {
    records: Vec<Record>,
    /// When their idle times were read.
    at: Instant,
    /// For the receiver's cache instead of its flow table.
    cache: bool,
}

/// A part of a transfer table that was sent.
#[derive(Debug)]
pub(super) struct Chunk {
    table: Arc<Table>,
    /// Which of the table's records.
    places: Vec<u32>,
    /// Whether the peer lost its connection since: send it again.
    again: bool,
}

impl Chunk {
    /// How many records it has.
    pub(super) fn len(&self) -> usize {
        self.places.len()
    }

    /// Its records that are to be held, in their order; none if they are for a cache.
    pub(super) fn records(&self) -> impl Iterator<Item = &Record> {
        let places = if self.table.cache { &[][..] } else { &self.places[..] };
        places.iter().map(|place| &self.table.records[*place as usize])
    }

    /// The records that the receiver holds if it refused those at these places.
    pub(super) fn held(&self, refused: &BTreeSet<u16>) -> impl Iterator<Item = &Record> {
        (0_u16..).zip(self.records()).filter(|(place, _)| !refused.contains(place)).map(|(_, record)| record)
    }

    fn encode(&self, id: u64, now: Instant) -> Vec<u8> {
        let Table { records, at, cache } = &*self.table;
        let passed_ms = aged(0, *at, now);
        let records = self.places.iter().map(|place| {
            let mut record = records[*place as usize];
            record.idle_ms = record.idle_ms.saturating_add(passed_ms);
            (record, *cache)
        });
        encode_chunk(id, records)
    }
}

/// A chunk as it goes out.
pub(super) struct Encoded {
    pub(super) bytes: Vec<u8>,
    pub(super) records: usize,
}

/// The transfer table for one peer.
#[derive(Debug, Default)]
pub(super) struct Transfer {
    /// What is not sent yet, and where in the first table that begins.
    queue: VecDeque<Arc<Table>>,
    next: usize,
    inflight: BTreeMap<u64, Chunk>,
    again: BTreeSet<u64>,
    /// No record of it is one that the peer holds as backup by the table in force.
    is_ahead: bool,
    sent: usize,
    acked: usize,
    refused: usize,
    total: usize,
}

impl Transfer {
    /// A transfer of nothing yet.
    pub(super) fn new() -> Self {
        Self { is_ahead: true, ..Self::default() }
    }

    /// Adds records; `is_ahead`: the peer is no backup of any of them by the table in force.
    pub(super) fn add(&mut self, at: Instant, records: Vec<Record>, cache: bool, is_ahead: bool) {
        self.total += records.len();
        self.is_ahead &= is_ahead;
        self.queue.push_back(Arc::new(Table { records, at, cache }));
    }

    /// Another table is in force.
    pub(super) fn handle_switch(&mut self) {
        self.is_ahead = false;
    }

    /// Whether all that it acknowledges is acknowledged ahead of a switch.
    pub(super) fn is_ahead(&self) -> bool {
        self.is_ahead
    }

    pub(super) fn is_done(&self) -> bool {
        self.queue.is_empty() && self.inflight.is_empty()
    }

    /// The records to be held that are not acknowledged yet.
    pub(super) fn records(&self) -> impl Iterator<Item = &Record> {
        let begins = std::iter::once(self.next).chain(std::iter::repeat(0));
        let queued = self.queue.iter().zip(begins).filter(|(table, _)| !table.cache);
        let queued = queued.flat_map(|(table, begin)| &table.records[begin..]);
        queued.chain(self.inflight.values().flat_map(Chunk::records))
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

    /// How many records a chunk may have that begins with what is to be sent next.
    fn available(&self) -> usize {
        self.queue.front().map_or(0, |table| table.records.len() - self.next)
    }

    /// The next records to be sent, at most `max`, of one table, without those that have ended.
    fn take(&mut self, max: usize, ended: &Births) -> Option<Chunk> {
        let table = Arc::clone(self.queue.front()?);
        let mut places = Vec::with_capacity(max.min(self.available()));
        while places.len() < max
            && let Some(record) = table.records.get(self.next)
        {
            let seen = || {
                let idle = Duration::from_millis(record.idle_ms.into());
                table.at.checked_sub(idle).unwrap_or(table.at)
            };
            if !ended.is_empty() && ended.bars(&record.key, record.birth, seen()).is_some() {
                self.sent += 1;
                self.acked += 1;
            } else {
                // A table of 2^32 records would be 344 GB.
                places.push(self.next as u32);
            }
            self.next += 1;
        }
        if self.next == table.records.len() {
            self.queue.pop_front();
            self.next = 0;
        }
        (!places.is_empty()).then_some(Chunk { table, places, again: false })
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
        ended: &Births,
    ) -> Option<Encoded> {
        if let Some(&id) = self.again.first() {
            let chunk = self.inflight.get_mut(&id)?;
            if !pace.take(now, chunk.len()) {
                return None;
            }
            self.again.remove(&id);
            chunk.again = false;
            return Some(Encoded { bytes: chunk.encode(id, now), records: chunk.len() });
        }
        // A part of a table may have ended as a whole.
        while self.wants_to_send() && pace.take(now, pace.chunk().min(self.available())) {
            let Some(chunk) = self.take(pace.chunk(), ended) else { continue };
            let id = *next_id;
            *next_id += 1;
            self.sent += chunk.len();
            let encoded = Encoded { bytes: chunk.encode(id, now), records: chunk.len() };
            self.inflight.insert(id, chunk);
            return Some(encoded);
        }
        None
    }

    /// Takes the acknowledgement of a chunk and returns it; `None` if it is not on its way.
    pub(super) fn handle_ack(&mut self, id: u64, refused: &BTreeSet<u16>) -> Option<Chunk> {
        let chunk = self.inflight.remove(&id)?;
        self.again.remove(&id);
        self.acked += chunk.len();
        self.refused += refused.len().min(chunk.len());
        Some(chunk)
    }
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
