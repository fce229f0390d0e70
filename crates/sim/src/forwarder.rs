//! A forwarder in virtual time: the engine of the host's forwarders, without packets' bytes.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use phalanx_flow::decide::Decision;
use phalanx_flow::packet::Packet;
use phalanx_flow::{Arrival, BackendId, FlowEvent, FlowFlags, FlowKey, MemberId, MemberSlot, Record};
use phalanx_forwarder::engine::{Clock, CompiledPlan, Engine, TableLimits};
use phalanx_forwarder::{Counters, Forwarder, InstallError, NextHops, Plan, RowSet, SendError, Upserted};

use crate::faults::Fault;

/// See the module's doc.
pub struct SimForwarder {
    engine: Engine,
    local: MemberId,
    fault: Option<Fault>,
    elapsed_ms: Arc<AtomicU64>,
    installs: AtomicU64,
    /// What [`Fault::CacheUsedForSyn`] looks at: the engine does not show its cache.
    cached: Mutex<std::collections::BTreeMap<FlowKey, BackendId>>,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl SimForwarder {
    /// A forwarder with empty tables whose clock stands at 0.
    pub(crate) fn new(
        local: MemberId,
        plan: Plan,
        limits: TableLimits,
        fault: Option<Fault>,
    ) -> Result<Self, InstallError> {
        let elapsed_ms = Arc::new(AtomicU64::new(0));
        Ok(Self {
            engine: Engine::with_clock(plan, limits, Clock::Told(Arc::clone(&elapsed_ms)))?,
            local,
            fault: fault.filter(|fault| fault.concerns(local)),
            elapsed_ms,
            installs: AtomicU64::new(0),
            cached: Mutex::default(),
        })
    }

    /// Says how late it is.
    pub(crate) fn set_elapsed(&self, elapsed: Duration) {
        self.elapsed_ms.store(elapsed.as_millis() as u64, Ordering::Relaxed);
    }

    /// Decides on one packet and records what is to be recorded.
    pub(crate) fn rule(&self, packet: &Packet, arrival: &Arrival) -> Decision {
        let mut arrival = *arrival;
        if self.fault == Some(Fault::HopsNotCounted) {
            arrival.hops = 0;
        }
        self.engine.batch().rule(packet, &arrival)
    }

    /// The backend of a cached flow, where [`Fault::CacheUsedForSyn`] is planted.
    pub(crate) fn cached_for_syn(&self, key: &FlowKey) -> Option<BackendId> {
        (self.fault == Some(Fault::CacheUsedForSyn)).then(|| lock(&self.cached).get(key).copied()).flatten()
    }

    /// The plan in force.
    pub fn plan(&self) -> Arc<CompiledPlan> {
        self.engine.plan()
    }

    /// Whether the member may own.
    pub fn is_leased(&self) -> bool {
        self.engine.is_leased()
    }

    /// Every flow, in order.
    pub fn flows(&self) -> Vec<Record> {
        let mut flows = Vec::new();
        self.engine.visit(&RowSet::All, &mut |record| flows.push(*record));
        flows.sort_unstable_by_key(|record| record.key);
        flows
    }

    fn swap_ranks(plan: &mut Plan) {
        let ids: Vec<u32> = plan.members.iter().map(|member| member.id.0).collect();
        let id = |slot: MemberSlot| ids.get(usize::from(slot.0)).copied();
        let mut rows = plan.rows.to_vec();
        for row in &mut rows {
            let [first, second, _] = row.ranks;
            if let (Some(a), Some(b)) = (id(first), id(second))
                && (a ^ b) % 2 == 1
            {
                row.ranks.swap(0, 1);
            }
        }
        plan.rows = rows.into();
    }
}

impl Forwarder for SimForwarder {
    fn install(&self, mut plan: Plan) -> Result<(), InstallError> {
        let installs = self.installs.fetch_add(1, Ordering::Relaxed);
        match self.fault {
            Some(Fault::WrongTieBreak) => Self::swap_ranks(&mut plan),
            Some(Fault::NoWindow) => plan.previous = None,
            // The first views of a cold start come within a second.
            Some(Fault::StaleTable) if installs > 8 && self.elapsed_ms.load(Ordering::Relaxed) > 9_000 => {
                // Backends and positions must stay right, or the engine refuses what follows.
                let old = self.engine.plan();
                if plan.members.len() == old.plan.members.len() {
                    plan.rows = Arc::clone(&old.plan.rows);
                    plan.previous = None;
                }
            }
            _ => {}
        }
        self.engine.install(plan)
    }

    fn set_next_hops(&self, next_hops: NextHops) {
        self.engine.set_next_hops(next_hops);
    }

    fn renew_lease(&self, term: Duration) {
        if self.fault == Some(Fault::NoLease) {
            return self.engine.renew_lease(Duration::from_secs(1 << 20));
        }
        self.engine.renew_lease(term);
    }

    fn upsert(&self, records: &[Record]) -> Vec<Upserted> {
        match self.fault {
            Some(Fault::RecoveredOverwrites) => {
                for record in records.iter().filter(|record| record.flags.has(FlowFlags::RECOVERED)) {
                    self.engine.remove(&record.key, 0, Duration::ZERO);
                }
                self.engine.upsert(records)
            }
            Some(Fault::BackendRecomputed) => {
                let plan = self.engine.plan();
                let mut records = records.to_vec();
                for record in &mut records {
                    let slot = phalanx_flow::flow_hash(plan.plan.seed, &record.key) as u16;
                    if let Some(service) = plan.service_of(&record.key)
                        && let Some(index) = service.slots.get(usize::from(slot))
                        && let Some(backend) = plan.backend(*index)
                    {
                        record.backend = backend.id;
                    }
                }
                self.engine.upsert(&records)
            }
            _ => self.engine.upsert(records),
        }
    }

    fn remove(&self, key: &FlowKey, birth: u64, min_idle: Duration) -> bool {
        // Only what is dropped as a former holder's goes without having been idle; the end of a flow that another member announces
        // does too, so those are told apart by the row.
        if self.fault == Some(Fault::FormerKept) && min_idle.is_zero() && !self.holds(key) {
            return false;
        }
        self.engine.remove(key, birth, min_idle)
    }

    fn stamp(&self, key: &FlowKey, birth: u64) -> bool {
        self.engine.stamp(key, birth)
    }

    fn protect(&self, key: &FlowKey, birth: u64, update: u32) {
        self.engine.protect(key, birth, update);
    }

    fn set_former(&self, keys: &[FlowKey], former: bool) {
        self.engine.set_former(keys, former);
    }

    fn touch(&self, flows: &[(FlowKey, u32)]) {
        self.engine.touch(flows);
    }

    fn upsert_cache(&self, records: &[Record]) {
        if self.fault == Some(Fault::CacheUsedForSyn) {
            lock(&self.cached).extend(records.iter().map(|record| (record.key, record.backend)));
        }
        self.engine.upsert_cache(records);
    }

    fn remove_cache(&self, keys: &[FlowKey]) {
        self.engine.remove_cache(keys);
    }

    fn flush_cache(&self) -> Vec<Record> {
        self.engine.flush_cache()
    }

    fn get(&self, key: &FlowKey) -> Option<Record> {
        self.engine.get(key)
    }

    fn visit(&self, rows: &RowSet, show: &mut dyn FnMut(&Record)) {
        self.engine.visit(rows, show);
    }

    fn poll_events(&self, events: &mut Vec<FlowEvent>, limit: usize) -> bool {
        self.engine.poll_events(events, limit)
    }

    fn send_echo(&self, _: MemberSlot, _: u64) -> Result<(), SendError> {
        // The world carries echoes by itself: they are answered by who has a forwarder.
        Ok(())
    }

    fn poll_echoes(&self, _: &mut Vec<u64>) {}

    fn send_probe(&self, _: &BackendId, _: &[u8]) -> Result<(), SendError> {
        // Health is told to members by the schedule.
        Ok(())
    }

    fn discard_backlog(&self) {}

    fn idle_for(&self) -> Duration {
        Duration::ZERO
    }

    fn counters(&self) -> Counters {
        self.engine.read_counters()
    }
}

impl SimForwarder {
    fn holds(&self, key: &FlowKey) -> bool {
        let plan = self.engine.plan();
        let row = plan.plan.row_function.row_of(key, phalanx_flow::flow_hash(plan.plan.seed, key));
        let ours = |rows: &Arc<[phalanx_flow::Row]>| {
            rows.get(row as usize).is_some_and(|row| {
                let member = |slot: MemberSlot| plan.member(slot).map(|member| member.id);
                member(row.owner()) == Some(self.local) || member(row.backup()) == Some(self.local)
            })
        };
        ours(&plan.plan.rows) || plan.plan.previous.as_ref().is_some_and(ours)
    }
}
