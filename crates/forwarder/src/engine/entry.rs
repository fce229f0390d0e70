//! From records to entries of a table and back, the same in every forwarder.

use std::cmp::Ordering;
use std::time::Duration;

use phalanx_flow::{BackendId, BackendIndex, FlowEntry, FlowFlags, FlowKey, FlowState, Record, Version};

use super::CompiledPlan;
use crate::plan::PlanService;

/// How long a flow is kept after its last packet when its service has gone from the configuration.
const ORPHAN_LIFE: Duration = Duration::from_secs(60);

/// How long a report that a flow lives is on its way at the most. Whoever forwards what has ended says so to all its holders each quarter of
/// the linger, so that each knows its last packet as well as that, whoever is lost.
const LATE_REPORT: Duration = Duration::from_secs(1);

/// The entry of a record whose backend has the position `backend`.
pub fn entry_of(record: &Record, backend: BackendIndex, now_ms: u64) -> FlowEntry {
    let seen_ms = now_ms.saturating_sub(u64::from(record.idle_ms));
    FlowEntry {
        birth: record.birth,
        last_seen_ms: seen_ms,
        last_reported_ms: seen_ms,
        update: record.update,
        backend,
        state: record.state as u8,
        flags: record.flags.with(FlowFlags::LOCAL, false),
        reserved: [0; 6],
    }
}

/// The record of an entry whose backend is `backend`.
pub fn record_of(key: &FlowKey, entry: &FlowEntry, backend: BackendId, now_ms: u64) -> Record {
    Record {
        key: *key,
        backend,
        birth: entry.birth,
        update: entry.update,
        state: entry.flow_state(),
        flags: entry.flags,
        idle_ms: u32::try_from(now_ms.saturating_sub(entry.last_seen_ms)).unwrap_or(u32::MAX),
    }
}

/// Whether the daemon is told of an entry when it asks: what is presumed is the packet path's alone.
pub fn is_told(entry: &FlowEntry) -> bool {
    !entry.flags.has(FlowFlags::PRESUMED)
}

/// Whether a record takes the place of an entry, whose backend is `backend` (`None`: nobody knows any more).
pub fn is_replaced(entry: &FlowEntry, backend: Option<BackendId>, record: &Record) -> bool {
    if entry.flags.has(FlowFlags::PRESUMED) {
        // Its birth is that of the connection before the presumed one.
        return record.birth > entry.birth;
    }
    let version = Version {
        tcp: record.key.protocol == phalanx_flow::key::TCP,
        recovered: entry.flags.has(FlowFlags::RECOVERED),
        state: entry.flow_state(),
        birth: entry.birth,
        update: entry.update,
    };
    let backends = backend.map_or(Ordering::Greater, |backend| backend.cmp(&record.backend));
    version.is_replaced_by(record.version(), backends)
}

/// How many states a flow may be in.
pub(super) const FLOW_STATES: usize = 4;

/// How long an entry of the flow table is kept at the least, by state, whatever its service.
pub(super) fn shortest_lives(services: &[PlanService]) -> [u64; FLOW_STATES] {
    let mut lives = [ORPHAN_LIFE.as_millis() as u64; FLOW_STATES];
    for (number, shortest) in (0..).zip(&mut lives) {
        let Some(state) = FlowState::from_u8(number) else { continue };
        for service in services {
            *shortest = (*shortest).min(life_in(service, state).as_millis() as u64);
        }
    }
    lives
}

fn life_in(service: &PlanService, state: FlowState) -> Duration {
    match state {
        FlowState::HalfOpen => service.half_open,
        FlowState::Established => service.idle,
        FlowState::Closing => service.linger + service.linger / 4 + LATE_REPORT,
        FlowState::Reset => service.reset_linger,
    }
}

/// How long an entry of the flow table is kept after its last packet.
pub fn life(plan: &CompiledPlan, key: &FlowKey, entry: &FlowEntry) -> Duration {
    plan.service_of(key).map_or(ORPHAN_LIFE, |service| life_in(service, entry.flow_state()))
}
