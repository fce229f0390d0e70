//! What every forwarder on the host shares: tables, plan lookup, events, and the ruling on one packet.
//!
//! [`Batch::rule`] parses nothing and sends nothing: it asks [`decide_into`] and carries the decision out on the flow table;
//! [`Batch::target`] says where the packet goes, and [`crate::rewrite`] makes it go there.

mod ahead;
mod clock;
pub mod entry;
mod held;
mod pages;
mod table;
#[cfg(test)]
mod tests;

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::iter::once;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use arc_swap::{ArcSwap, Guard};
use hashbrown::HashMap;
use phalanx_flow::decide::{
    Action, Began, Choice, Decision, HandOff, Local, OUTCOMES, Outcome, Service, ServiceMatch, Tables,
    decide_into,
};
use phalanx_flow::member::Liveness;
use phalanx_flow::packet::Packet;
use phalanx_flow::{
    Arrival, BackendId, BackendIndex, FlowEntry, FlowEvent, FlowEventKind, FlowFlags, FlowKey, MemberId,
    MemberSlot, Record, Row, Verdict, flow_hash,
};

use crate::counters::SharedCounters;
use crate::plan::{NextHop, NextHops, Plan, PlanBackend, PlanMember, PlanService};
use crate::{Counters, Drop, InstallError, RowSet, Upserted};
pub use ahead::{Ahead, GROUP};
pub use clock::Clock;
use entry::{FLOW_STATES, entry_of, is_replaced, is_told, life, record_of, shortest_lives};
pub use held::{Held, HeldFrame};
pub use table::TableLimits;
use table::{ByShare, FlowTable, Put, Shard};

/// Events that wait for the daemon at the most; what comes then is counted and found by the daemon's scan.
const MAX_EVENTS: usize = 1 << 18;

/// Fragmented packets whose ports are known at the most, and for how long they are kept (RFC 791 reassembly is slower; senders are not).
const MAX_FRAGMENTED: usize = 4096;
const FRAGMENT_LIFE_MS: u64 = 2_000;

/// Tokens of hand-off echoes that wait for the daemon at the most.
const MAX_ECHOES: usize = 4096;

/// Where the clock starts: a record's idle time has 32 bits.
const CLOCK_START_MS: u64 = 1 << 32;

/// How often each share of the table is searched for expired entries, and how long the daemon has for its word on one.
const SCAN_EVERY_MS: u64 = 1_000;

/// A plan with what a host needs to look things up in it.
#[derive(Debug)]
pub struct CompiledPlan {
    /// The plan.
    pub plan: Plan,
    services: HashMap<ServiceName, Service>,
    addresses: HashMap<[u8; 16], ()>,
    local_address: ([u8; 16], u8),
    slots: HashMap<MemberId, MemberSlot>,
    backends: HashMap<BackendId, BackendIndex>,
    /// How long an entry in each state is kept at the least, by [`FlowState`].
    shortest_life_ms: [u64; FLOW_STATES],
}

impl CompiledPlan {
    /// Checks a plan and indexes it.
    pub fn new(plan: Plan) -> Result<Self, InstallError> {
        let wrong = |what: &str| Err(InstallError::Inconsistent(what.to_owned()));
        let Some(local) = plan.members.get(usize::from(plan.local.0)) else {
            return wrong("the local member is not in it");
        };
        if plan.rows.len() != plan.row_function.row_count() as usize {
            return wrong("the current table has another number of rows than the row function gives");
        }
        if plan.previous.as_ref().is_some_and(|previous| previous.len() != plan.rows.len()) {
            return wrong("the previous table has another number of rows than the current one");
        }
        let mut tables =
            plan.services.iter().flat_map(|service| once(&service.slots).chain(&service.earlier));
        if tables.any(|slots| slots.len() != crate::plan::SLOTS) {
            return wrong("a service has not one backend a slot");
        }
        let local_address = phalanx_flow::key::octets(local.address);
        let mut services = HashMap::new();
        let mut addresses = HashMap::new();
        for (index, service) in (0_u32..).zip(&plan.services) {
            let (address, _) = phalanx_flow::key::octets(service.address);
            let read = Service {
                index,
                idle_ms: u32::try_from(service.idle.as_millis()).unwrap_or(u32::MAX),
                linger_ms: u32::try_from(service.linger.as_millis()).unwrap_or(u32::MAX),
                replicate_syn: service.replicate_syn,
                resets: !service.failed.is_empty(),
            };
            services.insert((address, service.port.to_be_bytes(), service.protocol), read);
            addresses.insert(address, ());
        }
        let slots =
            (0_u16..).zip(&plan.members).map(|(slot, member)| (member.id, MemberSlot(slot))).collect();
        let backends =
            (0_u32..).zip(&plan.backends).map(|(index, backend)| (backend.id, BackendIndex(index))).collect();
        let shortest_life_ms = shortest_lives(&plan.services);
        Ok(Self { plan, services, addresses, local_address, slots, backends, shortest_life_ms })
    }

    /// The address that hand-offs to us are sent to, IPv4 as mapped, and its family.
    pub fn local_address(&self) -> ([u8; 16], u8) {
        self.local_address
    }

    /// Whether packets to this address are ours.
    pub fn is_service_address(&self, address: &[u8; 16]) -> bool {
        self.addresses.contains_key(address)
    }

    /// A backend's position.
    pub fn backend_index(&self, id: &BackendId) -> Option<BackendIndex> {
        self.backends.get(id).copied()
    }

    /// A backend by its position.
    pub fn backend(&self, index: BackendIndex) -> Option<&PlanBackend> {
        self.plan.backends.get(index.0 as usize)
    }

    /// A service by its position.
    pub fn service(&self, index: u32) -> Option<&PlanService> {
        self.plan.services.get(index as usize)
    }

    /// A member by its slot.
    pub fn member(&self, slot: MemberSlot) -> Option<&PlanMember> {
        self.plan.members.get(usize::from(slot.0))
    }

    /// The service of a flow.
    pub fn service_of(&self, key: &FlowKey) -> Option<&PlanService> {
        let service = self.services.get(&(key.destination, key.destination_port, key.protocol))?;
        self.service(service.index)
    }

    #[inline]
    fn row_of(&self, key: &FlowKey, hash: u64) -> u32 {
        self.plan.row_function.row_of(key, hash)
    }
}

/// Where a packet goes, with all that rewriting it needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// To the kernel.
    Pass,
    /// Nowhere; it has been counted.
    Drop,
    /// Answer the ping in place.
    EchoReply,
    /// Answer the segment with a RST.
    Reset,
    /// Keep it a little while: a later fragment.
    Hold,
    /// To a backend.
    Backend {
        /// Which.
        backend: PlanBackend,
        /// By way of.
        next_hop: NextHop,
        /// Fragment the outer packet rather than tell the client.
        fragment: bool,
    },
    /// To another member.
    Member {
        /// Which.
        member: PlanMember,
        /// By way of.
        next_hop: NextHop,
        /// The hand-off to write.
        hand_off: HandOff,
        /// The member passed over.
        bypassed: Option<MemberId>,
    },
}

/// Tables, plan and events of one member on the host.
#[derive(Debug)]
pub struct Engine {
    /// Plan and next hops change as one, because positions in the one are positions in the other.
    state: ArcSwap<State>,
    installing: Mutex<()>,
    table: FlowTable,
    fragments: Mutex<Fragments>,
    pub(crate) held: Mutex<Held>,
    events: Mutex<VecDeque<FlowEvent>>,
    echoes: Mutex<Vec<u64>>,
    clock: Clock,
    lease_until_ms: AtomicU64,
    lease_term_ms: AtomicU64,
    errors_sent: ErrorLimit,
    next_identification: AtomicU64,
    /// Counters; the caller adds what only it sees.
    pub counters: SharedCounters,
}

#[derive(Debug)]
struct State {
    plan: Arc<CompiledPlan>,
    next_hops: Arc<NextHops>,
}

#[derive(Debug, Default)]
struct Fragments {
    ports: HashMap<FlowKey, ([[u8; 2]; 2], u64)>,
    order: VecDeque<FlowKey>,
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a forwarder reads while it works off a few packets: one plan, one moment, one lease.
///
/// Short-lived: whoever holds it sees no newer plan. Outcomes are counted when it is dropped.
pub struct Batch<'a> {
    engine: &'a Engine,
    state: Guard<Arc<State>>,
    now_ms: u64,
    leased: bool,
    outcomes: [Cell<u32>; OUTCOMES],
    /// The service that was asked for last: the next packet's, more often than not.
    last_service: Cell<Option<(ServiceName, Service)>>,
}

/// Address, port and protocol of a service.
type ServiceName = ([u8; 16], [u8; 2], u8);

/// What [`decide_into`] reads for one packet. The flow's shard stays locked from reading to writing, so that nothing comes between.
struct View<'a, 'b> {
    batch: &'b Batch<'a>,
    hash: Cell<u64>,
    shard: RefCell<Option<MutexGuard<'a, Shard>>>,
}

impl<'a> View<'a, '_> {
    #[inline]
    fn with_shard<T>(&self, look: impl FnOnce(&mut Shard, u64) -> T) -> T {
        let hash = self.hash.get();
        let mut shard = self.shard.borrow_mut();
        look(shard.get_or_insert_with(|| self.batch.engine.table.shard(hash)), hash)
    }

    fn plan(&self) -> &CompiledPlan {
        &self.batch.state.plan
    }
}

impl Tables for View<'_, '_> {
    #[inline]
    fn local(&self) -> Local {
        Local {
            slot: self.plan().plan.local,
            leased: self.batch.leased,
            seed: self.plan().plan.seed,
            now_ms: self.batch.now_ms,
        }
    }

    #[inline]
    fn service(&self, key: &FlowKey) -> ServiceMatch {
        let name = (key.destination, key.destination_port, key.protocol);
        if let Some((last, service)) = self.batch.last_service.get()
            && last == name
        {
            return ServiceMatch::Service(service);
        }
        let plan = self.plan();
        match plan.services.get(&name) {
            Some(service) => {
                self.batch.last_service.set(Some((name, *service)));
                ServiceMatch::Service(*service)
            }
            None if plan.is_service_address(&key.destination) => ServiceMatch::AddressOnly,
            None => ServiceMatch::Foreign,
        }
    }

    #[inline]
    fn row_of(&self, key: &FlowKey, hash: u64) -> u32 {
        // `decide_into` asks for a key's row before it looks the key up.
        self.hash.set(hash);
        self.plan().row_of(key, hash)
    }

    #[inline]
    fn row(&self, row: u32) -> Row {
        self.plan().plan.rows.get(row as usize).copied().unwrap_or(Row::EMPTY)
    }

    #[inline]
    fn previous_row(&self, row: u32) -> Option<Row> {
        self.plan().plan.previous.as_ref()?.get(row as usize).copied()
    }

    #[inline]
    fn liveness(&self, slot: MemberSlot) -> Liveness {
        self.plan().member(slot).map_or(Liveness::Down, |member| member.liveness)
    }

    fn slot_of(&self, id: MemberId) -> MemberSlot {
        self.plan().slots.get(&id).copied().unwrap_or(MemberSlot::NONE)
    }

    #[inline]
    fn flow(&self, key: &FlowKey) -> Option<FlowEntry> {
        debug_assert_eq!(self.hash.get(), flow_hash(self.plan().plan.seed, key), "row_of comes first");
        self.with_shard(|shard, hash| shard.get(hash, key).copied())
    }

    #[inline]
    fn cached(&self, key: &FlowKey) -> Option<FlowEntry> {
        self.with_shard(|shard, _| shard.cache.get(key).copied())
    }

    fn has_failed(&self, service: u32, backend: BackendIndex) -> bool {
        self.plan().service(service).is_some_and(|service| service.failed.contains(&backend))
    }

    fn consistent(&self, service: u32, slot: u16, began: Began) -> Choice {
        let Some(service) = self.plan().service(service) else {
            return Choice { backend: BackendIndex::NONE, unsettled: false };
        };
        let slots = match (began, &service.earlier) {
            (Began::Earlier, Some(earlier)) => earlier,
            _ => &service.slots,
        };
        Choice {
            backend: slots.get(usize::from(slot)).copied().unwrap_or(BackendIndex::NONE),
            unsettled: service.unsettled.as_ref().is_some_and(|set| set.contains(slot)),
        }
    }

    fn fragment_ports(&self, key: &FlowKey) -> Option<[[u8; 2]; 2]> {
        let fragments = lock(&self.batch.engine.fragments);
        let (ports, until_ms) = fragments.ports.get(key)?;
        (self.batch.now_ms < *until_ms).then_some(*ports)
    }
}

impl Batch<'_> {
    /// The engine.
    pub fn engine(&self) -> &Engine {
        self.engine
    }

    /// The plan that these packets see.
    pub fn plan(&self) -> &CompiledPlan {
        &self.state.plan
    }

    /// The next hops that these packets see.
    pub fn next_hops(&self) -> &NextHops {
        &self.state.next_hops
    }

    /// The engine's clock when the batch began.
    pub fn now_ms(&self) -> u64 {
        self.now_ms
    }

    /// Counts a packet's outcome.
    pub fn count(&self, outcome: Outcome) {
        let count = &self.outcomes[outcome as usize];
        count.set(count.get() + 1);
    }

    /// Decides on one packet and carries the decision out on the tables.
    pub fn rule(&self, packet: &Packet, arrival: &Arrival) -> Decision {
        let mut decision = Decision::PASS;
        self.rule_into(&mut decision, packet, arrival);
        decision
    }

    /// [`Self::rule`] into memory of the caller's, whatever it held before: a decision is too large to be moved about for every packet.
    #[inline]
    pub fn rule_into(&self, decision: &mut Decision, packet: &Packet, arrival: &Arrival) {
        let view = View { batch: self, hash: Cell::new(0), shard: RefCell::new(None) };
        decide_into(decision, packet, arrival, &view);
        self.engine.commit(packet, decision, &self.state.plan, self.now_ms, view.shard.into_inner());
        self.count(decision.outcome);
        if let Verdict::Drop(reason) = decision.verdict {
            self.engine.counters.count_drop(reason.into());
        }
    }

    /// Where a ruled packet goes. Counts what has no next hop.
    #[inline]
    pub fn target(&self, decision: &Decision) -> Target {
        let plan = self.plan();
        let next_hops = self.next_hops();
        let target = match decision.verdict {
            Verdict::Pass => return Target::Pass,
            Verdict::Drop(_) => return Target::Drop,
            Verdict::EchoReply => return Target::EchoReply,
            Verdict::Reset => return Target::Reset,
            Verdict::Hold => return Target::Hold,
            Verdict::Forward(index) => (|| {
                Some(Target::Backend {
                    backend: *plan.backend(index)?,
                    next_hop: (*next_hops.backends.get(index.0 as usize)?)?,
                    fragment: plan.service(decision.service)?.fragment,
                })
            })(),
            Verdict::HandOff(hand_off) => (|| {
                Some(Target::Member {
                    member: *plan.member(hand_off.to)?,
                    next_hop: (*next_hops.members.get(usize::from(hand_off.to.0))?)?,
                    hand_off,
                    bypassed: plan.member(hand_off.bypassed).map(|member| member.id),
                })
            })(),
        };
        target.unwrap_or_else(|| {
            self.engine.counters.count_drop(Drop::NoNextHop);
            Target::Drop
        })
    }
}

impl std::ops::Drop for Batch<'_> {
    fn drop(&mut self) {
        for (outcome, count) in self.outcomes.iter().enumerate() {
            if count.get() != 0 {
                self.engine.counters.add_outcomes(outcome, u64::from(count.get()));
            }
        }
    }
}

/// At most so many ICMP errors a second (RFC 1812 §4.3.2.8, RFC 4443 §2.4 f).
const ERRORS_PER_SECOND: u64 = 1_000;

/// Limits ICMP errors: the second in the upper half, how many went out in it in the lower.
#[derive(Debug, Default)]
struct ErrorLimit(AtomicU64);

impl ErrorLimit {
    fn admit(&self, now_ms: u64) -> bool {
        let second = now_ms / 1_000;
        let admitted = self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |state| {
            let sent = if state >> 32 == second { state & 0xffff_ffff } else { 0 };
            (sent < ERRORS_PER_SECOND).then_some(second << 32 | (sent + 1))
        });
        admitted.is_ok()
    }
}

impl Engine {
    /// An engine that carries out `plan`, with empty tables and no lease.
    pub fn new(plan: Plan, limits: TableLimits) -> Result<Self, InstallError> {
        Self::with_clock(plan, limits, Clock::started_now())
    }

    /// The same by another clock.
    pub fn with_clock(plan: Plan, limits: TableLimits, clock: Clock) -> Result<Self, InstallError> {
        Ok(Self {
            state: ArcSwap::from_pointee(State {
                plan: Arc::new(CompiledPlan::new(plan)?),
                next_hops: Arc::default(),
            }),
            installing: Mutex::default(),
            table: FlowTable::new(limits),
            fragments: Mutex::default(),
            held: Mutex::default(),
            events: Mutex::default(),
            echoes: Mutex::default(),
            clock,
            lease_until_ms: AtomicU64::new(0),
            lease_term_ms: AtomicU64::new(0),
            errors_sent: ErrorLimit::default(),
            next_identification: AtomicU64::new(0),
            counters: SharedCounters::default(),
        })
    }

    /// The clock of the engine's entries, in milliseconds; monotonic, and so far from 0 that every idle time fits behind it.
    pub fn now_ms(&self) -> u64 {
        CLOCK_START_MS + self.clock.elapsed_ms()
    }

    /// The plan in force.
    pub fn plan(&self) -> Arc<CompiledPlan> {
        Arc::clone(&self.state.load().plan)
    }

    /// The next hops in force.
    pub fn next_hops(&self) -> Arc<NextHops> {
        Arc::clone(&self.state.load().next_hops)
    }

    /// What the next few packets see.
    pub fn batch(&self) -> Batch<'_> {
        let now_ms = self.now_ms();
        Batch {
            engine: self,
            state: self.state.load(),
            now_ms,
            leased: now_ms < self.lease_until_ms.load(Ordering::Relaxed),
            outcomes: [const { Cell::new(0) }; OUTCOMES],
            last_service: Cell::new(None),
        }
    }

    /// See [`crate::Forwarder::install`].
    ///
    /// A changed list of backends keeps positions, so entries stay right; a changed seed or row function would not, and is refused.
    pub fn install(&self, plan: Plan) -> Result<(), InstallError> {
        let _one_at_a_time = lock(&self.installing);
        let state = self.state.load_full();
        let old = &state.plan;
        if old.plan.seed != plan.seed || old.plan.row_function != plan.row_function {
            return Err(InstallError::Inconsistent(
                "the hash seed or the row function changed; they are fixed for the life of a cluster"
                    .to_owned(),
            ));
        }
        let moved = old.plan.backends.iter().zip(&plan.backends).any(|(old, new)| old.id != new.id);
        let compiled = CompiledPlan::new(plan)?;
        if moved || compiled.plan.backends.len() < old.plan.backends.len() {
            return Err(InstallError::Inconsistent("a backend lost its position".to_owned()));
        }
        // Members may have moved to other slots: their next hops go with them, until the daemon says better.
        let known = &state.next_hops.members;
        let members = compiled.plan.members.iter().map(|member| {
            let slot = old.slots.get(&member.id)?;
            let same = old.member(*slot).is_some_and(|before| before.address == member.address);
            if same { *known.get(usize::from(slot.0))? } else { None }
        });
        let next_hops = NextHops { members: members.collect(), backends: state.next_hops.backends.clone() };
        self.state.store(Arc::new(State { plan: Arc::new(compiled), next_hops: Arc::new(next_hops) }));
        Ok(())
    }

    /// See [`crate::Forwarder::set_next_hops`].
    pub fn set_next_hops(&self, next_hops: NextHops) {
        let _one_at_a_time = lock(&self.installing);
        self.state.store(Arc::new(State { plan: self.plan(), next_hops: Arc::new(next_hops) }));
    }

    /// See [`crate::Forwarder::renew_lease`].
    pub fn renew_lease(&self, term: Duration) {
        let until_ms = if term.is_zero() { 0 } else { self.now_ms() + term.as_millis() as u64 };
        self.lease_term_ms.store(term.as_millis() as u64, Ordering::Relaxed);
        self.lease_until_ms.store(until_ms, Ordering::Relaxed);
    }

    /// The term of the last lease; zero if there was none.
    pub fn lease_term(&self) -> Duration {
        Duration::from_millis(self.lease_term_ms.load(Ordering::Relaxed))
    }

    /// Whether one more ICMP error may be sent now; counts it.
    pub fn may_send_error(&self) -> bool {
        self.errors_sent.admit(self.now_ms())
    }

    /// A new identification for an outer packet that is fragmented (RFC 6864).
    pub fn next_identification(&self) -> u32 {
        self.next_identification.fetch_add(1, Ordering::Relaxed) as u32
    }

    /// Takes the token of a hand-off echo that came back.
    pub fn push_echo(&self, token: u64) {
        let mut echoes = lock(&self.echoes);
        if echoes.len() < MAX_ECHOES {
            echoes.push(token);
        }
    }

    /// See [`crate::Forwarder::poll_echoes`].
    pub fn poll_echoes(&self, tokens: &mut Vec<u64>) {
        tokens.append(&mut lock(&self.echoes));
    }

    /// Whether the lease has not run out.
    pub fn is_leased(&self) -> bool {
        self.now_ms() < self.lease_until_ms.load(Ordering::Relaxed)
    }

    #[inline]
    fn commit(
        &self,
        packet: &Packet,
        decision: &Decision,
        plan: &CompiledPlan,
        now_ms: u64,
        shard: Option<MutexGuard<'_, Shard>>,
    ) {
        if decision.learn_fragment {
            self.learn_fragment(packet, decision, now_ms);
        }
        if !decision.erase_cache && decision.action == Action::Keep && decision.event.is_none() {
            return;
        }
        let mut lost = false;
        {
            let mut shard = shard.unwrap_or_else(|| self.table.shard(decision.hash));
            if decision.erase_cache {
                shard.cache.pop(&decision.key);
            }
            let put = match decision.action {
                Action::Keep => Put::Done,
                Action::Insert => {
                    let put = shard.put(decision.hash, decision.key, decision.entry);
                    lost = put == Put::Full;
                    put
                }
                // The shard was locked all the while: what was read is still there.
                Action::Update => {
                    let put = shard.update(decision.hash, decision.key, decision.entry);
                    if put == Put::Full {
                        // The flow stays half-open, and lives on as such: nothing changed that anybody must hear of.
                        lost = true;
                        if let Some(entry) = shard.get_mut(decision.hash, &decision.key) {
                            entry.last_seen_ms = decision.entry.last_seen_ms;
                        }
                    }
                    put
                }
                Action::Remove => {
                    shard.remove(decision.hash, &decision.key);
                    Put::Done
                }
                Action::UpdateCache => {
                    if let Some(entry) = shard.cache.get_mut(&decision.key) {
                        *entry = decision.entry;
                    }
                    Put::Done
                }
            };
            match put {
                Put::Done => {}
                Put::Evicted => {
                    self.counters.half_open_evicted.fetch_add(1, Ordering::Relaxed);
                }
                Put::Full => {
                    self.counters.table_full.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
        if let Some(kind) = decision.event
            && !lost
            && let Some(record) = record(plan, &decision.key, &decision.entry, now_ms)
        {
            self.push_event(FlowEvent { kind, at_once: decision.at_once, record });
        }
    }

    fn learn_fragment(&self, packet: &Packet, decision: &Decision, now_ms: u64) {
        let mut fragments = lock(&self.fragments);
        let Some(key) = packet.fragment_key() else { return };
        let ports = [decision.key.source_port, decision.key.destination_port];
        if fragments.ports.insert(key, (ports, now_ms + FRAGMENT_LIFE_MS)).is_none() {
            fragments.order.push_back(key);
        }
        while fragments.order.len() > MAX_FRAGMENTED {
            let oldest = fragments.order.pop_front();
            oldest.and_then(|oldest| fragments.ports.remove(&oldest));
        }
    }

    fn push_event(&self, event: FlowEvent) {
        let mut events = lock(&self.events);
        if events.len() >= MAX_EVENTS {
            self.counters.events_lost.fetch_add(1, Ordering::Relaxed);
        } else {
            events.push_back(event);
        }
    }

    /// See [`crate::Forwarder::upsert`].
    pub fn upsert(&self, records: &[Record]) -> Vec<Upserted> {
        let plan = self.plan();
        let now_ms = self.now_ms();
        let mut results = vec![Upserted::UnknownBackend; records.len()];
        let mut last: Option<(BackendId, BackendIndex)> = None;
        // By share: each is locked once, and between locks memory answers for several records at once. Records of one flow stay in order.
        let mut shares = ByShare::new(records.iter().map(|record| flow_hash(plan.plan.seed, &record.key)));
        while let Some((mut shard, places)) = shares.next_share(&self.table) {
            for group in places.chunks(GROUP) {
                shard.prefetch_for_writes(group.iter().map(|(_, hash)| *hash));
                for &(place, hash) in group {
                    let record = &records[place];
                    let index = match last {
                        Some((id, index)) if id == record.backend => index,
                        _ => {
                            let Some(index) = plan.backend_index(&record.backend) else { continue };
                            last = Some((record.backend, index));
                            index
                        }
                    };
                    results[place] = self.upsert_one(&plan, &mut shard, hash, record, index, now_ms);
                }
            }
        }
        results
    }

    fn upsert_one(
        &self,
        plan: &CompiledPlan,
        shard: &mut Shard,
        hash: u64,
        record: &Record,
        index: BackendIndex,
        now_ms: u64,
    ) -> Upserted {
        let mut entry = entry_of(record, index, now_ms);
        let mut is_new = true;
        if let Some(current) = shard.get_mut(hash, &record.key) {
            let backend = plan.backend(current.backend).map(|backend| backend.id);
            if !is_replaced(current, backend, record) {
                // Whoever sent this counts us among the holders, and knows of nothing newer.
                current.flags = current.flags.with(FlowFlags::FORMER, false);
                return Upserted::Stale;
            }
            entry.last_seen_ms = entry.last_seen_ms.max(current.last_seen_ms);
            is_new = false;
        }
        // Most members have none, and to ask costs a hash.
        if !shard.cache.is_empty() {
            shard.cache.pop(&record.key);
        }
        let put =
            if is_new { shard.insert(hash, record.key, entry) } else { shard.put(hash, record.key, entry) };
        match put {
            Put::Done => Upserted::Applied,
            Put::Evicted => {
                self.counters.half_open_evicted.fetch_add(1, Ordering::Relaxed);
                Upserted::Applied
            }
            Put::Full => {
                self.counters.table_full.fetch_add(1, Ordering::Relaxed);
                Upserted::Full
            }
        }
    }

    /// See [`crate::Forwarder::make_room`].
    pub fn make_room(&self, records: usize) {
        self.table.make_room(records);
    }

    /// See [`crate::Forwarder::has_room`].
    pub fn has_room(&self) -> bool {
        self.table.has_room()
    }

    /// See [`crate::Forwarder::remove`].
    pub fn remove(&self, key: &FlowKey, birth: u64, min_idle: Duration) -> bool {
        let hash = self.hash(key);
        let seen_before_ms = self.now_ms().saturating_sub(min_idle.as_millis() as u64);
        let mut shard = self.table.shard(hash);
        let over = shard.get(hash, key).is_some_and(|entry| {
            (birth == 0 || entry.birth == birth) && entry.last_seen_ms <= seen_before_ms
        });
        if over {
            shard.remove(hash, key);
        }
        over
    }

    /// See [`crate::Forwarder::stamp`].
    pub fn stamp(&self, key: &FlowKey, birth: u64) -> bool {
        self.with_entry(key, |entry| {
            let unstamped = entry.birth == 0;
            if unstamped {
                entry.birth = birth;
            }
            unstamped
        })
        .unwrap_or(false)
    }

    /// See [`crate::Forwarder::protect`].
    pub fn protect(&self, key: &FlowKey, birth: u64, update: u32) {
        self.with_entry(key, |entry| {
            if entry.birth == birth && entry.update == update {
                entry.flags = entry.flags.with(FlowFlags::PROTECTED, true);
            }
        });
    }

    /// See [`crate::Forwarder::set_former`].
    pub fn set_former(&self, keys: &[FlowKey], former: bool) {
        for key in keys {
            self.with_entry(key, |entry| entry.flags = entry.flags.with(FlowFlags::FORMER, former));
        }
    }

    /// See [`crate::Forwarder::touch`].
    pub fn touch(&self, flows: &[(FlowKey, u32)]) {
        let now_ms = self.now_ms();
        for (key, idle_ms) in flows {
            self.with_entry(key, |entry| {
                entry.last_seen_ms = entry.last_seen_ms.max(now_ms.saturating_sub(u64::from(*idle_ms)));
            });
        }
    }

    fn hash(&self, key: &FlowKey) -> u64 {
        flow_hash(self.state.load().plan.plan.seed, key)
    }

    fn with_entry<T>(&self, key: &FlowKey, change: impl FnOnce(&mut FlowEntry) -> T) -> Option<T> {
        let hash = self.hash(key);
        self.table.shard(hash).get_mut(hash, key).map(change)
    }

    /// See [`crate::Forwarder::upsert_cache`].
    pub fn upsert_cache(&self, records: &[Record]) {
        let plan = self.plan();
        let now_ms = self.now_ms();
        for record in records {
            let Some(index) = plan.backend_index(&record.backend) else { continue };
            let hash = flow_hash(plan.plan.seed, &record.key);
            let mut shard = self.table.shard(hash);
            if shard.get(hash, &record.key).is_some() {
                continue;
            }
            let newer = shard.cache.peek(&record.key).is_none_or(|current| {
                is_replaced(current, plan.backend(current.backend).map(|backend| backend.id), record)
            });
            if newer {
                shard.cache.put(record.key, entry_of(record, index, now_ms));
            }
        }
    }

    /// See [`crate::Forwarder::remove_cache`].
    pub fn remove_cache(&self, keys: &[FlowKey]) {
        for key in keys {
            self.table.shard(self.hash(key)).cache.pop(key);
        }
    }

    /// See [`crate::Forwarder::flush_cache`].
    pub fn flush_cache(&self) -> Vec<Record> {
        let plan = self.plan();
        let now_ms = self.now_ms();
        let mut records = Vec::new();
        for mut shard in self.table.shards() {
            records.extend(shard.cache.iter().filter_map(|(key, entry)| record(&plan, key, entry, now_ms)));
            shard.cache.clear();
        }
        records
    }

    /// See [`crate::Forwarder::get`].
    pub fn get(&self, key: &FlowKey) -> Option<Record> {
        let hash = self.hash(key);
        let entry = self.table.shard(hash).get(hash, key).copied().filter(is_told)?;
        record(&self.plan(), key, &entry, self.now_ms())
    }

    /// See [`crate::Forwarder::visit`].
    pub fn visit(&self, rows: &RowSet, show: &mut dyn FnMut(&Record)) {
        let plan = self.plan();
        let now_ms = self.now_ms();
        for shard in self.table.shards() {
            for (key, hash, entry) in shard.iter() {
                if is_told(entry)
                    && rows.contains(plan.row_of(key, hash))
                    && let Some(record) = record(&plan, key, entry, now_ms)
                {
                    show(&record);
                }
            }
        }
    }

    /// See [`crate::Forwarder::poll_events`].
    pub fn poll_events(&self, events: &mut Vec<FlowEvent>, limit: usize) -> bool {
        self.find_expired();
        let forgotten = lock(&self.held).expire(self.now_ms());
        self.counters.add_drops(Drop::Fragment, forgotten);
        let mut queue = lock(&self.events);
        let taken = queue.len().min(limit);
        events.extend(queue.drain(..taken));
        !queue.is_empty()
    }

    /// Searches the shares whose turn it is for entries whose time is over.
    fn find_expired(&self) {
        let now_ms = self.now_ms();
        let plan = self.plan();
        let mut expired = Vec::new();
        for mut shard in self.table.shards() {
            if now_ms < shard.next_scan_ms {
                continue;
            }
            shard.next_scan_ms = now_ms + SCAN_EVERY_MS;
            let mut presumed = Vec::new();
            for (key, hash, entry) in shard.iter_mut() {
                let idle_ms = now_ms.saturating_sub(entry.last_seen_ms);
                // Nearly all: their service need not be looked for.
                if idle_ms <= plan.shortest_life_ms[entry.flow_state() as usize] {
                    continue;
                }
                let life = life(&plan, key, entry);
                if idle_ms <= life.as_millis() as u64 {
                    continue;
                }
                if is_told(entry) {
                    expired.extend(record(&plan, key, entry, now_ms));
                } else {
                    presumed.push((hash, *key));
                }
            }
            for (hash, key) in presumed {
                shard.remove(hash, &key);
            }
            let life_ms =
                |key: &FlowKey| plan.service_of(key).map_or(0, |service| service.idle.as_millis() as u64);
            while let Some((key, entry)) = shard.cache.peek_lru()
                && now_ms.saturating_sub(entry.last_seen_ms) > life_ms(key)
            {
                shard.cache.pop_lru();
            }
        }
        for record in expired {
            self.push_event(FlowEvent { kind: FlowEventKind::Expired, at_once: false, record });
        }
    }

    /// A reading of the counters, gauges included.
    pub fn read_counters(&self) -> Counters {
        let mut counters = self.counters.read();
        for shard in self.table.shards() {
            let (flows, half_open, cached) = shard.len();
            counters.flows += flows as u64;
            counters.half_open += half_open as u64;
            counters.cached += cached as u64;
        }
        counters
    }
}

fn record(plan: &CompiledPlan, key: &FlowKey, entry: &FlowEntry, now_ms: u64) -> Option<Record> {
    Some(record_of(key, entry, plan.backend(entry.backend)?.id, now_ms))
}
