//! Replicators over fake forwarder tables and a network that loses connections.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::{Duration, Instant};

use phalanx_flow::{FlowEvent, FlowEventKind, FlowFlags, FlowKey, FlowState, MemberId, Record};

use super::super::*;
use crate::ranking::{Ranking, Survivors};
use crate::testing::{TestRanking, backend, epoch, key, mix};
use crate::transfer::{Change, former_entries, plan};

pub(super) const WALL_MS: u64 = 1_800_000_000_000;

/// A forwarder's table: records with the time a packet was last seen.
#[derive(Default)]
pub(super) struct Table {
    pub(super) flows: BTreeMap<FlowKey, (Record, Instant)>,
    pub(super) cache: BTreeMap<FlowKey, Record>,
    pub(super) capacity: Option<usize>,
    pub(super) unknown_backend: Option<phalanx_flow::BackendId>,
    /// While set, nothing is applied.
    pub(super) stuck: bool,
}

impl Table {
    pub(super) fn get(&self, now: Instant, key: &FlowKey) -> Option<Record> {
        self.flows.get(key).map(|&(mut record, seen)| {
            record.idle_ms = (now - seen).as_millis() as u32;
            record
        })
    }

    fn apply(&mut self, now: Instant, apply: Apply) -> ApplyResult {
        use ApplyResult::{Applied, Full, Stale, UnknownBackend};
        match apply {
            Apply::Upsert(mut record) => {
                if self.unknown_backend == Some(record.backend) {
                    return UnknownBackend;
                }
                let seen = now - Duration::from_millis(record.idle_ms.into());
                record.flags = record.flags.with(FlowFlags::PROTECTED, false);
                let full = self.capacity.is_some_and(|capacity| self.flows.len() >= capacity);
                match self.flows.get_mut(&record.key) {
                    Some((known, known_seen)) if known.is_replaced_by(&record) => {
                        *known = record;
                        *known_seen = seen.max(*known_seen);
                        Applied
                    }
                    Some(_) => Stale,
                    None if full => Full,
                    None => {
                        self.flows.insert(record.key, (record, seen));
                        Applied
                    }
                }
            }
            Apply::Remove { key, birth, min_idle_ms } => match self.get(now, &key) {
                Some(record) if record.birth == birth && record.idle_ms >= min_idle_ms => {
                    self.flows.remove(&key);
                    Applied
                }
                _ => Stale,
            },
            Apply::End { key, birth, min_idle_ms } => match self.get(now, &key) {
                Some(record) if record.birth == birth && record.idle_ms < min_idle_ms => Stale,
                Some(record) if record.birth == birth => {
                    self.flows.remove(&key);
                    Applied
                }
                _ => Applied,
            },
            Apply::Touch { key, idle_ms } => match self.flows.get_mut(&key) {
                Some((_, seen)) => {
                    *seen = (*seen).max(now - Duration::from_millis(idle_ms.into()));
                    Applied
                }
                None => Stale,
            },
            Apply::CacheUpsert(record) => {
                self.cache.insert(record.key, record);
                Applied
            }
            Apply::CacheRemove { key } => {
                self.cache.remove(&key);
                Applied
            }
            Apply::Stamp { key, birth } => match self.flows.get_mut(&key) {
                Some((record, _)) if record.birth == 0 => {
                    record.birth = birth;
                    Applied
                }
                _ => Stale,
            },
            Apply::Protect { key, birth, update } => match self.flows.get_mut(&key) {
                Some((record, _)) if record.birth == birth && record.update == update => {
                    record.flags = record.flags.with(FlowFlags::PROTECTED, true);
                    Applied
                }
                _ => Stale,
            },
        }
    }
}

pub(super) struct Node {
    pub(super) replicator: Replicator,
    pub(super) table: Table,
    pub(super) events: Vec<Event>,
    pub(super) errors: Vec<PeerError>,
    view: Option<ViewInput>,
}

pub(super) struct World {
    pub(super) now: Instant,
    pub(super) nodes: BTreeMap<u32, Node>,
    /// Bytes under way from one to another, for pairs that are connected.
    wires: BTreeMap<(u32, u32), VecDeque<u8>>,
    pub(super) ranking: Arc<TestRanking>,
    pub(super) caches: BTreeSet<MemberId>,
    pub(super) policy: Policy,
    pub(super) enabled: bool,
    random: u64,
    /// One in this many deliveries loses the connection; 0: none.
    pub(super) loss: u64,
    pub(super) frames: u64,
}

pub(super) const ROWS: u32 = 32;

impl World {
    /// `ids` are up, connected and ranked.
    pub(super) fn new(ids: &[u32]) -> Self {
        Self::with(ids, |_| {})
    }

    pub(super) fn with(ids: &[u32], set_up: impl FnOnce(&mut Self)) -> Self {
        Self::ranked_by(ids, TestRanking::new(ids, ROWS), set_up)
    }

    /// Members `ids` with so many backups a row.
    pub(super) fn with_backups(ids: &[u32], backups: usize) -> Self {
        Self::ranked_by(ids, TestRanking::new(ids, ROWS).with_backups(backups), |_| {})
    }

    fn rank(&self, members: &[(u32, u32)]) -> TestRanking {
        TestRanking::weighted(members, ROWS).with_backups(self.ranking.backups())
    }

    pub(super) fn ranked_by(ids: &[u32], ranking: TestRanking, set_up: impl FnOnce(&mut Self)) -> Self {
        let mut world = Self {
            now: epoch() + Duration::from_secs(86_400),
            nodes: BTreeMap::new(),
            wires: BTreeMap::new(),
            ranking: Arc::new(ranking),
            caches: BTreeSet::new(),
            policy: Policy::Established,
            enabled: true,
            random: 1,
            loss: 0,
            frames: 0,
        };
        set_up(&mut world);
        for &id in ids {
            world.start(id);
        }
        let live = world.live();
        for &id in ids {
            let view = world.view(None, &live);
            world.set_view(id, view);
        }
        world
    }

    pub(super) fn live(&self) -> BTreeSet<MemberId> {
        self.nodes.keys().map(|&id| MemberId(id)).collect()
    }

    pub(super) fn view(&self, previous: Option<Arc<TestRanking>>, live: &BTreeSet<MemberId>) -> ViewInput {
        ViewInput {
            ranking: self.ranking.clone(),
            previous: previous.into_iter().map(|ranking| ranking as Arc<dyn Ranking>).collect(),
            pending: None,
            live: live.clone(),
            suspects: BTreeSet::new(),
            caches: self.caches.clone(),
            policy: self.policy,
            enabled: self.enabled,
        }
    }

    pub(super) fn set_view(&mut self, id: u32, view: ViewInput) {
        let now = self.now;
        let node = self.nodes.get_mut(&id).unwrap();
        node.replicator.handle_view(now, view.clone());
        node.view = Some(view);
    }

    /// Starts a member, without a view, and connects it with all others.
    pub(super) fn start(&mut self, id: u32) {
        let config = Config { local: MemberId(id), transfer_rate: NonZeroU32::new(1_000_000).unwrap() };
        self.start_with(id, config);
    }

    pub(super) fn start_with(&mut self, id: u32, config: Config) {
        let others: Vec<u32> = self.nodes.keys().copied().collect();
        let node = Node {
            replicator: Replicator::new(config, self.now, WALL_MS),
            table: Table::default(),
            events: Vec::new(),
            errors: Vec::new(),
            view: None,
        };
        self.nodes.insert(id, node);
        for other in others {
            self.connect(id, other);
        }
    }

    /// SIGKILL: it is gone with its table and all that was under way.
    pub(super) fn kill(&mut self, id: u32) {
        for other in self.nodes.keys().copied().collect::<Vec<_>>() {
            self.disconnect(id, other);
        }
        self.nodes.remove(&id);
    }

    pub(super) fn connect(&mut self, a: u32, b: u32) {
        let now = self.now;
        for (from, to) in [(a, b), (b, a)] {
            self.wires.insert((from, to), VecDeque::new());
            self.nodes.get_mut(&from).unwrap().replicator.handle_connected(now, MemberId(to));
        }
    }

    pub(super) fn disconnect(&mut self, a: u32, b: u32) {
        let now = self.now;
        for (from, to) in [(a, b), (b, a)] {
            if self.wires.remove(&(from, to)).is_some()
                && let Some(node) = self.nodes.get_mut(&from)
            {
                node.replicator.handle_disconnected(now, MemberId(to));
            }
        }
    }

    /// The next pseudo-random number below `bound`.
    pub(super) fn random(&mut self, bound: u64) -> u64 {
        self.random = mix(self.random);
        self.random % bound
    }

    pub(super) fn seed(&mut self, seed: u64) {
        self.random = mix(seed);
    }

    /// Lets one node carry out what its replicator asks; whether it asked for anything.
    fn drive(&mut self, id: u32) -> bool {
        let now = self.now;
        let Some(node) = self.nodes.get_mut(&id) else { return false };
        let mut busy = false;
        if !node.table.stuck {
            while let Some(batch) = node.replicator.poll_apply() {
                busy = true;
                let records = batch.records.iter().map(|&record| Apply::Upsert(record));
                let changes = records.chain(batch.items.iter().copied());
                let results: Vec<_> = changes.map(|apply| node.table.apply(now, apply)).collect();
                node.replicator.handle_applied(now, batch.id, &results);
            }
            while let Some(lookup) = node.replicator.poll_lookup() {
                busy = true;
                let records: Vec<_> = lookup.keys.iter().map(|key| node.table.get(now, key)).collect();
                node.replicator.handle_lookup(now, lookup.id, &records);
            }
        }
        while let Some((to, frame)) = node.replicator.poll_message() {
            busy = true;
            self.frames += 1;
            if let Some(wire) = self.wires.get_mut(&(id, to.0)) {
                wire.extend(frame);
            }
        }
        while let Some(event) = node.replicator.poll_event() {
            node.events.push(event);
        }
        busy
    }

    /// Delivers some of the bytes under way, or loses a connection with all of them.
    fn deliver(&mut self) -> bool {
        let now = self.now;
        let mut busy = false;
        for (from, to) in self.wires.keys().copied().collect::<Vec<_>>() {
            let waiting = self.wires.get(&(from, to)).map_or(0, VecDeque::len);
            if waiting == 0 {
                continue;
            }
            busy = true;
            let some = if self.loss == 0 { waiting } else { 1 + self.random(waiting as u64) as usize };
            let bytes: Vec<u8> = self.wires.get_mut(&(from, to)).unwrap().drain(..some).collect();
            let node = self.nodes.get_mut(&to).unwrap();
            if let Err(error) = node.replicator.handle_data(now, MemberId(from), &bytes) {
                node.errors.push(error);
                self.disconnect(from, to);
            } else if self.loss > 0 && self.random(self.loss) == 0 {
                self.disconnect(from, to);
                self.connect(from, to);
            }
        }
        busy
    }

    /// Runs without the passing of time until nobody has anything to say.
    pub(super) fn settle(&mut self) {
        for round in 0.. {
            assert!(round < 100_000, "it never ends");
            let mut busy = false;
            for id in self.nodes.keys().copied().collect::<Vec<_>>() {
                busy |= self.drive(id);
            }
            busy |= self.deliver();
            if !busy {
                return;
            }
        }
    }

    /// Lets time pass, with every timeout on the way.
    pub(super) fn advance(&mut self, by: Duration) {
        let end = self.now + by;
        self.settle();
        loop {
            let next = self.nodes.values().filter_map(|node| node.replicator.poll_timeout()).min();
            self.now = next.map_or(end, |next| next.clamp(self.now, end));
            let now = self.now;
            for node in self.nodes.values_mut() {
                if node.replicator.poll_timeout().is_some_and(|at| at <= now) || now == end {
                    node.replicator.handle_timeout(now);
                }
            }
            self.settle();
            if self.now == end {
                return;
            }
            // A timeout that does not move forward would never end.
            self.now += Duration::from_micros(1);
        }
    }

    pub(super) fn node(&mut self, id: u32) -> &mut Node {
        self.nodes.get_mut(&id).unwrap()
    }

    pub(super) fn holders(&self, n: u16) -> [u32; 2] {
        let [owner, backup, _] = self.ranking.holders(self.ranking.row_of(&key(n)));
        [owner, backup].map(|member| member.map_or(0, |member| member.0))
    }

    /// All who should have the flow, in order of their names.
    pub(super) fn sorted_holders(&self, n: u16) -> Vec<u32> {
        let holders = self.ranking.holders(self.ranking.row_of(&key(n)));
        let mut holders: Vec<u32> = holders.into_iter().flatten().map(|member| member.0).collect();
        holders.sort_unstable();
        holders
    }

    /// A flow number whose owner and backup are these.
    pub(super) fn flow_of(&self, owner: u32, backup: u32) -> u16 {
        (0..).find(|&n| self.holders(n) == [owner, backup]).unwrap()
    }

    pub(super) fn event(&mut self, id: u32, kind: FlowEventKind, at_once: bool, record: Record) {
        let now = self.now;
        self.node(id).replicator.handle_event(now, FlowEvent { kind, at_once, record });
    }

    /// The forwarder of `id` records a new half-open flow.
    pub(super) fn syn(&mut self, id: u32, n: u16, to: u8, at_once: bool) {
        let record = Record {
            key: key(n),
            backend: backend(to),
            birth: 0,
            update: 0,
            state: FlowState::HalfOpen,
            flags: FlowFlags(0),
            idle_ms: 0,
        };
        let now = self.now;
        self.node(id).table.flows.insert(record.key, (record, now));
        self.event(id, FlowEventKind::New, at_once, record);
    }

    /// The forwarder of `id` sees a packet that changes the flow's state.
    pub(super) fn change(&mut self, id: u32, n: u16, state: FlowState) {
        let now = self.now;
        let (record, seen) = self.node(id).table.flows.get_mut(&key(n)).unwrap();
        record.state = state;
        record.update += 1;
        record.flags = record.flags.with(FlowFlags::PROTECTED, false);
        *seen = now;
        let record = *record;
        self.event(id, FlowEventKind::Changed, false, record);
    }

    /// A packet of the flow passes through `id` and changes nothing.
    pub(super) fn packet(&mut self, id: u32, n: u16) {
        let now = self.now;
        self.node(id).table.flows.get_mut(&key(n)).unwrap().1 = now;
    }

    /// SYN and ACK through the owner.
    pub(super) fn open(&mut self, n: u16, to: u8) {
        let [owner, _] = self.holders(n);
        self.syn(owner, n, to, false);
        self.change(owner, n, FlowState::Established);
    }

    /// The forwarder of `id` says that its entry is idle.
    pub(super) fn expired(&mut self, id: u32, n: u16) {
        let now = self.now;
        let record = self.node(id).table.get(now, &key(n)).unwrap();
        self.event(id, FlowEventKind::Expired, false, record);
    }

    pub(super) fn record(&self, id: u32, n: u16) -> Option<Record> {
        self.nodes.get(&id).and_then(|node| node.table.get(self.now, &key(n)))
    }

    /// Who has the flow in its table.
    pub(super) fn has(&self, n: u16) -> Vec<u32> {
        self.nodes
            .iter()
            .filter(|(_, node)| node.table.flows.contains_key(&key(n)))
            .map(|(&id, _)| id)
            .collect()
    }

    pub(super) fn unprotected(&self) -> usize {
        self.nodes.values().map(|node| node.replicator.unprotected()).sum()
    }

    /// Every member's daemon learns of a new ranking, with the old one as previous, and begins its transfers.
    pub(super) fn switch(&mut self, members: &[(u32, u32)]) {
        let new = Arc::new(self.rank(members));
        let old = std::mem::replace(&mut self.ranking, new);
        let survivors = Survivors::all(self.live());
        for id in self.nodes.keys().copied().collect::<Vec<_>>() {
            let view = self.view(Some(old.clone()), &survivors.live);
            self.set_view(id, view);
            let change = Change {
                local: MemberId(id),
                old: &*old,
                new: &*self.ranking,
                survivors: &survivors,
                caches: &self.caches,
                ahead: None,
            };
            let now = self.now;
            let node = self.nodes.get_mut(&id).unwrap();
            let records: Vec<_> =
                node.table.flows.keys().map(|key| node.table.get(now, key).unwrap()).collect();
            node.replicator.begin_transfer(now, plan(&change, records));
        }
    }

    /// Every member's daemon learns of a planned change and sends ahead what it moves; nothing is in force.
    pub(super) fn plan(&mut self, members: &[(u32, u32)]) -> Arc<TestRanking> {
        let pending = Arc::new(self.rank(members));
        let survivors = Survivors::all(self.live());
        for id in self.nodes.keys().copied().collect::<Vec<_>>() {
            let view = ViewInput { pending: Some(pending.clone()), ..self.view(None, &survivors.live) };
            self.set_view(id, view);
            let change = Change {
                local: MemberId(id),
                old: &*self.ranking,
                new: &*pending,
                survivors: &survivors,
                caches: &self.caches,
                ahead: None,
            };
            let now = self.now;
            let node = self.nodes.get_mut(&id).unwrap();
            let records: Vec<_> =
                node.table.flows.keys().map(|key| node.table.get(now, key).unwrap()).collect();
            node.replicator.begin_transfer(now, plan(&change, records));
        }
        pending
    }

    /// The planned change is in force, and nobody sends anything for it.
    pub(super) fn put_in_force(&mut self, pending: Arc<TestRanking>) {
        let old = std::mem::replace(&mut self.ranking, pending);
        let live = self.live();
        for id in self.nodes.keys().copied().collect::<Vec<_>>() {
            let view = self.view(Some(old.clone()), &live);
            self.set_view(id, view);
        }
    }

    /// The handover window closes: former holders drop what they lost.
    pub(super) fn close_window(&mut self) {
        let live = self.live();
        for id in self.nodes.keys().copied().collect::<Vec<_>>() {
            let view = self.view(None, &live);
            self.set_view(id, view);
            let table = &mut self.nodes.get_mut(&id).unwrap().table;
            let keys: Vec<_> = table.flows.keys().copied().collect();
            for key in former_entries(MemberId(id), &*self.ranking, keys) {
                table.flows.remove(&key);
            }
        }
    }
}
