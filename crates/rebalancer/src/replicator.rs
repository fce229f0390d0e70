//! Replication of associations, ends and touches, and the sending of transfer tables: one state machine per daemon.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use phalanx_flow::{FlowEvent, FlowEventKind, FlowFlags, FlowKey, FlowState, MemberId, Record};

use crate::codec::{self, Control, Digests, Frame, FrameDecoder, Item, Refusal};
use crate::digest::RowDigest;
use crate::flow_map::FlowMap;
use crate::hlc::Hlc;
use crate::ranking::{Holders, MAX_HOLDERS, holders_of};
use crate::transfer::TransferPlan;

mod ended;
mod ending;
mod idle;
mod inbound;
mod outbox;
mod peer;
mod protection;
mod sending;
mod stalled;
mod types;

use ended::Births;
use idle::IdleFlows;
use inbound::{Inbound, Then};
use peer::Peer;
use protection::Unprotected;
pub use sending::TransferProgress;
use sending::{Chunk, Pace, Transfer};
pub use types::{
    Apply, ApplyBatch, ApplyResult, Config, Counters, Event, Held, Lookup, PeerError, Policy, ViewInput,
};

/// Items in one batch: 64 kB, so that an acknowledgement comes back soon and one batch holds up nothing for long.
const BATCH_ITEMS: usize = 1024;
/// Batches on their way to one peer without an acknowledgement: what a 100 ms path carries of 160,000 items a second.
const BATCH_WINDOW: usize = 16;
/// Frames of one peer that wait for the forwarder; a peer that keeps to its windows has at most these, or twice that after a reconnect.
const MAX_INBOUND: usize = 4 * (BATCH_WINDOW + sending::CHUNK_WINDOW);
/// Local changes of the flow table in one [`ApplyBatch`].
const LOCAL_BATCH: usize = 1024;
/// Flows that wait for one peer: about 40 MB for a peer that is away for long. Beyond, flows stay unprotected and the driver is told.
const MAX_BACKLOG: usize = 131_072;
/// Tombstones: two minutes of 2,000 ends a second; more ends shorten the time, and records in flight are seconds old at most.
const MAX_ENDED: usize = 262_144;
/// How long an ended flow is remembered: longer than any reconnect delays a record.
const ENDED_FOR: Duration = Duration::from_secs(120);
/// Stamps the forwarder may not have applied when it made an event: a tenth of a second at a million connections a second.
const MAX_STAMPS: usize = 131_072;
/// How long an event may be on its way from the forwarder to us.
const STAMPS_FOR: Duration = Duration::from_secs(10);
const _: () = assert!(BATCH_ITEMS <= codec::MAX_ITEMS);

/// The replication half of a daemon, sans-io.
///
/// ```text
///             handle_view, handle_event, begin_transfer
///  forwarder ───────────────────────────────────────────► Replicator ──poll_message──► peers
///      ▲                                                   │    ▲  ▲
///      ├──────────────── poll_apply, poll_lookup ──────────┘    │  └── handle_data, handle_(dis)connected
///      └──────────────── handle_applied, handle_lookup ─────────┘
///
///  One flow at its owner, as its backups know it:
///
///                Changed (established), at_once, hint        every backup's ack, this version
///   UNTOLD ───────────────────────────────► UNPROTECTED ───────────────────────► PROTECTED
///                                            ▲   │ refused: stays                   │
///                                            └───┴──────────────────────────────────┘
///                                              Changed, backup replaced by another
///   From each: removed (idle everywhere, linger over) ► ENDED: End to all, a tombstone bars older records
///
///  One peer:   DISCONNECTED ──handle_connected──► CONNECTED: at most 16 batches and 32 chunks unacknowledged
///               ▲  everything unacknowledged goes    │
///               └──back to its slot──handle_disconnected
/// ```
/// The waiting of idle flows is drawn in `replicator/idle.rs`.
///
/// Call it like this. **Inputs** (`handle_*`): [`handle_view`](Self::handle_view) first and on every change, then events,
/// connections, data, results and timeouts as they come; `now` never goes back. **Outputs** (`poll_*`): after every input, until
/// each returns `None`: [`poll_apply`](Self::poll_apply) and [`poll_lookup`](Self::poll_lookup) (carried out in order),
/// [`poll_message`](Self::poll_message) (as long as the peers' streams take more), [`poll_event`](Self::poll_event), and last
/// [`poll_timeout`](Self::poll_timeout). **Commands**: [`begin_transfer`](Self::begin_transfer),
/// [`compare`](Self::compare), [`answer`](Self::answer).
pub struct Replicator {
    config: Config,
    view: Option<ViewInput>,
    now: Instant,
    started: Instant,
    started_wall_ms: u64,
    clock: Hlc,
    peers: BTreeMap<MemberId, Peer>,
    /// Where [`Replicator::poll_message`] goes on, so that no peer waits for another.
    last_served: Option<MemberId>,
    /// Flows owned here that a backup has not acknowledged.
    unprotected: FlowMap<Unprotected>,
    /// What who will be their backups in the pending table have acknowledged. Looked into at the switch alone: to note a million of them
    /// in the map as they come would cost more than all else that their transfer does.
    ahead: Vec<(MemberId, Held)>,
    /// The same, as whole chunks of transfer tables.
    ahead_chunks: Vec<(MemberId, Chunk)>,
    /// The last of the stalled flows that were told again, if it was not the turn of all.
    told_last: Option<FlowKey>,
    stamps: Births,
    ended: Births,
    idle: IdleFlows,
    inbound: Inbound,
    pace: Pace,
    next_chunk: u64,
    transferring: bool,
    events: VecDeque<Event>,
    counters: Counters,
}

/// Milliseconds of idleness that were `idle_ms` at `at`, at the later time `now`.
pub fn aged(idle_ms: u32, at: Instant, now: Instant) -> u32 {
    let passed = now.saturating_duration_since(at).as_millis();
    idle_ms.saturating_add(u32::try_from(passed).unwrap_or(u32::MAX))
}

impl Replicator {
    /// A replicator that knows no view yet; `wall_ms` is the time of day in milliseconds since 1970.
    ///
    /// Afterwards only `now` counts: a step of the system's clock does not disturb the births.
    pub fn new(config: Config, now: Instant, wall_ms: u64) -> Self {
        Self {
            config,
            view: None,
            now,
            started: now,
            started_wall_ms: wall_ms,
            clock: Hlc::new(config.local),
            peers: BTreeMap::new(),
            last_served: None,
            unprotected: FlowMap::default(),
            ahead: Vec::new(),
            ahead_chunks: Vec::new(),
            told_last: None,
            stamps: Births::new(MAX_STAMPS, STAMPS_FOR),
            ended: Births::new(MAX_ENDED, ENDED_FOR),
            idle: IdleFlows::default(),
            inbound: Inbound::default(),
            pace: Pace::new(now, config.transfer_rate),
            next_chunk: 1,
            transferring: false,
            events: VecDeque::new(),
            counters: Counters::default(),
        }
    }

    /// This member.
    pub const fn local(&self) -> MemberId {
        self.config.local
    }

    /// Flows owned here whose present version some backup has not acknowledged, those without any backup among them.
    ///
    /// With two backups both must have: the count says whether the cluster may lose as many members as there are backups.
    pub fn unprotected(&self) -> usize {
        self.unprotected.len()
    }

    /// Whether the flow is one of [`Self::unprotected`].
    pub fn is_unprotected(&self, key: &FlowKey) -> bool {
        self.unprotected.contains_key(key)
    }

    /// Idle entries that wait for what another holder knows.
    pub fn waiting_idle(&self) -> usize {
        self.idle.len()
    }

    /// Flows of which something waits to be sent to `peer`, and batches on their way to it.
    pub fn backlog(&self, peer: MemberId) -> (usize, usize) {
        self.peers.get(&peer).map_or((0, 0), |peer| (peer.outbox.len(), peer.inflight.len()))
    }

    /// How many things are kept in memory, of whatever kind: what leaks shows here.
    pub fn remembered(&self) -> usize {
        let peers: usize = self.peers.values().map(Peer::remembered).sum();
        let flows = self.unprotected.len() + self.noted_ahead() + self.idle.len();
        peers + flows + self.stamps.len() + self.ended.len() + self.inbound.len() + self.events.len()
    }

    /// The counters.
    pub const fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Every transfer under way.
    pub fn transfers(&self) -> impl Iterator<Item = TransferProgress> {
        self.peers
            .iter()
            .filter_map(|(&to, peer)| peer.transfer.as_ref().map(|transfer| transfer.progress(to)))
    }

    // Inputs.

    /// Takes a new view: who owns what, who lives, whom to tell.
    ///
    /// What waits for members that no longer live is dropped. The driver then visits its flow table in the changed rows and calls
    /// [`Replicator::begin_transfer`].
    pub fn handle_view(&mut self, now: Instant, view: ViewInput) {
        self.advance(now);
        for (&id, peer) in &mut self.peers {
            if view.live.contains(&id) {
                continue;
            }
            peer.outbox.clear();
            peer.asks.clear();
            peer.overflowed = false;
            // What is on its way may still be acknowledged, and must not come back after that.
            peer.inflight.clear();
            if let Some(transfer) = peer.transfer.take() {
                self.events.push_back(Event::TransferDropped { to: id, records: transfer.remaining() });
            }
        }
        self.peers.retain(|id, peer| peer.connected || view.live.contains(id));
        let switched = self.view.as_ref().is_none_or(|old| !Arc::ptr_eq(&old.ranking, &view.ranking));
        if switched {
            // Of the same table we own the same rows.
            let local = Some(self.config.local);
            self.unprotected.retain(|key, _| view.ranking.holders(view.ranking.row_of(key))[0] == local);
        }
        let old = self.view.replace(view);
        if switched {
            self.settle_unprotected(old.as_ref());
        } else if self.view.as_ref().is_some_and(|view| view.pending.is_none()) {
            // The change is planned no more: what was sent for it is dropped by its receivers.
            self.ahead = Vec::new();
            self.ahead_chunks = Vec::new();
        }
        self.finish_transfers();
    }

    /// Takes what the forwarder says of a flow.
    pub fn handle_event(&mut self, now: Instant, event: FlowEvent) {
        self.advance(now);
        let mut record = event.record;
        match event.kind {
            FlowEventKind::New => {
                self.idle.remove(&record.key);
                if record.birth == 0 {
                    record.birth = self.stamp(&record.key);
                }
                if event.at_once || self.is_worth_telling(&record) {
                    self.replicate(record);
                }
            }
            FlowEventKind::Changed => {
                self.settle_birth(&mut record);
                self.idle.remove(&record.key);
                if event.at_once || self.is_worth_telling(&record) {
                    self.replicate(record);
                }
            }
            FlowEventKind::Touched => {
                self.settle_birth(&mut record);
                self.touch(&record);
            }
            FlowEventKind::Cached if record.birth == 0 => self.counters.misplaced += 1,
            // Whose row it is knows the flow by its cache alone: now it holds it.
            FlowEventKind::Cached if self.holders(&record.key).contains(&Some(self.config.local)) => {
                self.inbound.push_local(Apply::Upsert(record), Then::Record(record));
            }
            FlowEventKind::Cached => self.replicate(record),
            FlowEventKind::Hint => self.hint(record),
            FlowEventKind::Expired => {
                self.settle_birth(&mut record);
                self.expire(record, event.at_once);
            }
        }
    }

    /// A stream to `peer` is open: what waits is sent, and what was not acknowledged on the last one is sent again.
    pub fn handle_connected(&mut self, now: Instant, peer: MemberId) {
        self.advance(now);
        let peer = self.peers.entry(peer).or_insert_with(Peer::new);
        peer.disconnect();
        peer.connected = true;
        peer.epoch += 1;
    }

    /// The stream to `peer` is gone.
    pub fn handle_disconnected(&mut self, now: Instant, peer: MemberId) {
        self.advance(now);
        if let Some(peer) = self.peers.get_mut(&peer) {
            peer.disconnect();
        }
    }

    /// Takes bytes of `peer`'s stream, cut anywhere. After an error, close the connection.
    pub fn handle_data(&mut self, now: Instant, from: MemberId, bytes: &[u8]) -> Result<(), PeerError> {
        self.advance(now);
        let peer = self.peers.get_mut(&from).filter(|peer| peer.connected).ok_or(PeerError::NotConnected)?;
        peer.decoder.handle_data(bytes);
        loop {
            let peer = self.peers.get_mut(&from).ok_or(PeerError::NotConnected)?;
            let epoch = peer.epoch;
            let Some(frame) = peer.decoder.poll_frame()? else { return Ok(()) };
            self.handle_frame(from, epoch, frame)?;
        }
    }

    /// The time [`Replicator::poll_timeout`] named has come.
    pub fn handle_timeout(&mut self, now: Instant) {
        self.advance(now);
        for key in self.idle.due(self.now) {
            self.ask_again(&key);
        }
        self.ended.expire(self.now);
        self.stamps.expire(self.now);
    }

    /// Sends the local part of a change's transfer tables.
    ///
    /// A transfer that is under way to the same member goes on, and the new records follow it.
    /// Half-open flows that agree with the consistent table are left out: the handover window covers them, and a SYN flood must not
    /// make a change of members expensive. With replication switched off nothing is sent and [`Event::AllDone`] comes at once.
    pub fn begin_transfer(&mut self, now: Instant, plan: TransferPlan) {
        self.advance(now);
        self.transferring = true;
        if self.is_enabled() {
            let tables = plan.holders.into_iter().map(|(to, records)| (to, records, false));
            let caches = plan.caches.into_iter().map(|(to, records)| (to, records, true));
            for (to, mut records, cache) in tables.chain(caches) {
                if to == self.config.local {
                    continue;
                }
                let mut is_ahead = true;
                records.retain_mut(|record| {
                    self.settle_birth(record);
                    if !self.is_worth_telling(record)
                        || self.bars(&record.key, record.birth, record.idle_ms).is_some()
                    {
                        return false;
                    }
                    if !cache && self.backups_of_own(&record.key).contains(&Some(to)) {
                        self.note_missing(record.key, (record.birth, record.update), to);
                        is_ahead = false;
                    }
                    true
                });
                if !records.is_empty() {
                    let peer = self.peers.entry(to).or_insert_with(Peer::new);
                    let transfer = peer.transfer.get_or_insert_with(Transfer::new);
                    transfer.add(self.now, records, cache, is_ahead);
                }
            }
        }
        self.finish_transfers();
    }

    /// Asks `peer` whether it holds the same of the rows from `first` to `last` ([`crate::row_digests`]; all that is held of them is
    /// given, and nothing else); returns how many answers ([`Event::Differing`]) of this `round` will come. None, if it is not connected.
    pub fn compare(
        &mut self,
        peer: MemberId,
        round: u64,
        former: bool,
        [first, last]: [u32; 2],
        held: &BTreeMap<u32, RowDigest>,
    ) -> usize {
        if !self.is_enabled() {
            return 0;
        }
        let Some(peer) = self.peers.get_mut(&peer).filter(|peer| peer.connected) else { return 0 };
        let held: Vec<(u32, u32, u64)> =
            held.iter().map(|(&row, digest)| (row, digest.count, digest.sum)).collect();
        let mut parts: Vec<&[(u32, u32, u64)]> = held.chunks(codec::MAX_ROWS).collect();
        if parts.is_empty() {
            parts.push(&[]);
        }
        let (mut from, count) = (first, parts.len());
        for (part, rows) in parts.into_iter().enumerate() {
            let to = if part + 1 == count { last } else { rows.last().map_or(last, |row| row.0) };
            let digests = Digests { round, former, first: from, last: to, rows: rows.to_vec() };
            peer.controls.push_back(Control::Digests(digests));
            from = to.saturating_add(1);
        }
        count
    }

    /// Answers a peer's [`Event::Digests`]: these rows differ.
    pub fn answer(&mut self, peer: MemberId, round: u64, rows: Vec<u32>) {
        if let Some(peer) = self.peers.get_mut(&peer).filter(|peer| peer.connected) {
            peer.controls.push_back(Control::Differing { round, rows });
        }
    }

    // Outputs.

    /// The next frame and whom to send it to, over its reliable ordered stream.
    pub fn poll_message(&mut self) -> Option<(MemberId, Vec<u8>)> {
        let after = self.last_served;
        let order: Vec<MemberId> = self
            .peers
            .keys()
            .filter(|&&id| Some(id) > after)
            .chain(self.peers.keys().filter(|&&id| Some(id) <= after))
            .copied()
            .collect();
        for id in order {
            if let Some(bytes) = self.poll_bytes(id) {
                self.last_served = Some(id);
                self.counters.frames_sent += 1;
                return Some((id, bytes));
            }
        }
        None
    }

    /// The next changes to be made in the forwarder's tables, in order.
    pub fn poll_apply(&mut self) -> Option<ApplyBatch> {
        self.inbound.poll_apply()
    }

    /// The next flows to be looked up in the forwarder's flow table.
    pub fn poll_lookup(&mut self) -> Option<Lookup> {
        self.inbound.poll_lookup()
    }

    /// The next thing to know.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// When [`Replicator::handle_timeout`] is to be called, if nothing else is called before.
    pub fn poll_timeout(&self) -> Option<Instant> {
        let paced = self
            .peers
            .values()
            .any(|peer| peer.connected && peer.transfer.as_ref().is_some_and(Transfer::wants_to_send));
        let pace = paced.then(|| self.pace.next_timeout());
        [pace, self.idle.next_timeout()].into_iter().flatten().min()
    }

    // Sending.

    fn poll_bytes(&mut self, id: MemberId) -> Option<Vec<u8>> {
        let peer = self.peers.get_mut(&id).filter(|peer| peer.connected)?;
        if let Some(control) = peer.controls.pop_front() {
            return Some(codec::encode(&Frame::Control(control)));
        }
        if peer.inflight.len() < BATCH_WINDOW && (!peer.asks.is_empty() || peer.outbox.len() > 0) {
            let asks = peer.asks.len().min(BATCH_ITEMS / 2);
            let mut items: Vec<_> = peer.asks.drain(..asks).collect();
            items.extend(peer.outbox.take(self.now, BATCH_ITEMS - items.len()));
            peer.overflowed &= peer.outbox.len() > 0;
            let seq = peer.next_seq;
            peer.next_seq += 1;
            peer.inflight.insert(seq, (self.now, items.clone()));
            self.counters.items_sent += items.len() as u64;
            return Some(codec::encode(&Frame::Batch { seq, items }));
        }
        let transfer = peer.transfer.as_mut()?;
        match transfer.poll_chunk(self.now, &mut self.pace, &mut self.next_chunk, &self.ended) {
            Some(chunk) => {
                self.counters.items_sent += chunk.records as u64;
                Some(chunk.bytes)
            }
            None => {
                // All that was left may have ended.
                self.finish_transfers();
                None
            }
        }
    }

    /// Tells all who should know of the flow, and counts it as unprotected if it is ours.
    fn replicate(&mut self, record: Record) {
        let (holders, caches) = self.audience(&record.key);
        if self.is_own(&record.key) {
            let missing = self.backups_of_own(&record.key);
            self.unprotected.insert(record.key, Unprotected::new((record.birth, record.update), missing));
        }
        for to in holders {
            self.push(to, Item::Associate { record, cache: false });
        }
        for to in caches {
            self.push(to, Item::Associate { record, cache: true });
        }
    }

    /// The other holders of `key` under the table in force, the pending one and the earlier ones, and the other members with a cache: all who are told of the flow.
    fn audience(&self, key: &FlowKey) -> (Vec<MemberId>, Vec<MemberId>) {
        let Some(view) = &self.view else { return Default::default() };
        let reachable = |member: &MemberId| *member != self.config.local && view.live.contains(member);
        let mut holders: Vec<MemberId> = Vec::with_capacity(4);
        for ranking in view.tables() {
            for member in holders_of(ranking, ranking.row_of(key)).filter(reachable) {
                if !holders.contains(&member) {
                    holders.push(member);
                }
            }
        }
        let caches = view
            .caches
            .iter()
            .copied()
            .filter(|member| reachable(member) && !holders.contains(member))
            .collect();
        (holders, caches)
    }

    /// Tells the owner, under every table, that a packet was seen; and its backups, while it is suspected and may hear nothing of us, or of
    /// a flow that has ended.
    fn touch(&mut self, record: &Record) {
        let Some(view) = &self.view else { return };
        let mut holders: Vec<MemberId> = Vec::with_capacity(4);
        for ranking in view.tables() {
            for holder in holders_of(ranking, ranking.row_of(&record.key)) {
                if holder != self.config.local && !holders.contains(&holder) {
                    holders.push(holder);
                }
                if record.state.is_live() && !view.suspects.contains(&holder) {
                    break;
                }
            }
        }
        let (key, birth, idle_ms) = (record.key, record.birth, record.idle_ms);
        for holder in holders {
            self.push(holder, Item::Touch { key, birth, idle_ms });
        }
    }

    /// Offers what was done for an unknown flow to its acting owner.
    fn hint(&mut self, mut record: Record) {
        let Some(view) = &self.view else { return };
        record.flags = record.flags.with(FlowFlags::RECOVERED, true);
        let acting = holders_of(&*view.ranking, view.ranking.row_of(&record.key))
            .find(|member| view.live.contains(member) && !view.suspects.contains(member));
        match acting {
            Some(acting) if acting == self.config.local => {
                record.birth = self.clock.stamp(self.wall_ms());
                self.inbound.push_local(Apply::Upsert(record), Then::Record(record));
            }
            Some(acting) => self.push(acting, Item::Hint { record }),
            None => {}
        }
    }

    /// Queues an item for a peer that lives; without replication, nowhere.
    fn push(&mut self, to: MemberId, item: Item) {
        if to == self.config.local || !self.is_enabled() || !self.is_live(to) {
            return;
        }
        let peer = self.peers.entry(to).or_insert_with(Peer::new);
        if matches!(item, Item::IdleQuery { .. } | Item::IdleReply { .. }) {
            if peer.connected {
                peer.asks.push_back(item);
            }
            return;
        }
        if !peer.outbox.push(self.now, item) {
            self.counters.overflowed += 1;
            if !std::mem::replace(&mut peer.overflowed, true) {
                self.events.push_back(Event::Overflow { peer: to });
            }
        }
    }

    fn finish_transfers(&mut self) {
        for (&to, peer) in &mut self.peers {
            if let Some(done) = peer.transfer.take_if(|transfer| transfer.is_done()) {
                self.events.push_back(Event::TransferDone { to, progress: done.progress(to) });
            }
        }
        if self.transferring && self.peers.values().all(|peer| peer.transfer.is_none()) {
            self.transferring = false;
            self.events.push_back(Event::AllDone);
        }
    }

    // Small questions.

    fn advance(&mut self, now: Instant) {
        self.now = self.now.max(now);
    }

    fn wall_ms(&self) -> u64 {
        let passed = self.now.saturating_duration_since(self.started).as_millis();
        self.started_wall_ms.saturating_add(u64::try_from(passed).unwrap_or(u64::MAX))
    }

    fn is_enabled(&self) -> bool {
        self.view.as_ref().is_none_or(|view| view.enabled)
    }

    fn is_live(&self, member: MemberId) -> bool {
        self.view.as_ref().is_some_and(|view| view.live.contains(&member))
    }

    fn holders(&self, key: &FlowKey) -> Holders {
        self.holders_in(self.row_of(key))
    }

    fn holders_in(&self, row: u32) -> Holders {
        self.view.as_ref().map_or_else(Holders::default, |view| view.ranking.holders(row))
    }

    /// Who will hold the flows of `row` once a planned change is in force.
    fn pending_holders(&self, row: u32) -> Holders {
        let pending = self.view.as_ref().and_then(|view| view.pending.as_ref());
        pending.map_or_else(Holders::default, |pending| pending.holders(row))
    }

    /// The row of `key`, in every table: all of a cluster have the same rows.
    fn row_of(&self, key: &FlowKey) -> u32 {
        self.view.as_ref().map_or(0, |view| view.ranking.row_of(key))
    }

    fn is_own(&self, key: &FlowKey) -> bool {
        self.holders(key)[0] == Some(self.config.local)
    }

    /// The backups of `key` if we own it.
    fn backups_of_own(&self, key: &FlowKey) -> [Option<MemberId>; MAX_HOLDERS - 1] {
        self.backups_in_own(self.row_of(key))
    }

    /// The backups of `row` if we own it.
    fn backups_in_own(&self, row: u32) -> [Option<MemberId>; MAX_HOLDERS - 1] {
        let [owner, backups @ ..] = self.holders_in(row);
        if owner == Some(self.config.local) { backups } else { Default::default() }
    }

    /// Whether others need to know the flow: not while it is half-open and agrees with the consistent table, unless the policy says
    /// so, and not when it was reset in that state (a SYN flood from addresses that answer with RST is a flood all the same).
    fn is_worth_telling(&self, record: &Record) -> bool {
        if self.view.as_ref().is_some_and(|view| view.policy == Policy::Syn)
            || record.flags.has(FlowFlags::DEVIATES)
            || record.flags.has(FlowFlags::RECOVERED)
        {
            return true;
        }
        match record.state {
            FlowState::HalfOpen => false,
            // Update 1 is the RST itself, so the flow was never established.
            FlowState::Reset => record.update > 1 || record.flags.has(FlowFlags::PROTECTED),
            FlowState::Established | FlowState::Closing => true,
        }
    }

    /// A birth for a flow the forwarder has just made.
    fn stamp(&mut self, key: &FlowKey) -> u64 {
        let birth = self.clock.stamp(self.wall_ms());
        self.stamps.insert(self.now, *key, birth, self.now);
        self.inbound.push_local(Apply::Stamp { key: *key, birth }, Then::Nothing);
        birth
    }

    /// Gives a record its birth if the forwarder made the event before it knew.
    fn settle_birth(&mut self, record: &mut Record) {
        if record.birth == 0 {
            record.birth = match self.stamps.get(&record.key) {
                Some(birth) => birth,
                None => self.stamp(&record.key),
            };
        }
    }
}

#[cfg(test)]
mod tests;
