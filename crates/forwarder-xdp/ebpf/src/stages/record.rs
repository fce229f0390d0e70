//! What is recorded of a decision.
//!
//! A program of its own, because the verifier follows each way through the decision, and each of those through the locks of the table of
//! half-open flows.

use aya_ebpf::bindings::xdp_action::XDP_DROP;
use aya_ebpf::macros::xdp;
use aya_ebpf::programs::XdpContext;
use phalanx_flow::decide::{Action, Decision};
use phalanx_flow::{FlowEntry, FlowEventKind, FlowKey, FlowState};

use super::decide::carry_out;
use super::{NO_WAKEUP, counters, header, work};
use crate::abi::{CpuCounters, FRAGMENT_LIFE_MS, Header, Ports, RawEvent};
use crate::flows;
use crate::half_open;
use crate::maps::{CACHE, EVENTS, FRAGMENTS, Work};
use crate::tables::{Place, coarse_ms};

/// Flags of an update: whatever is there.
const ANY: u64 = 0;

/// Records what was decided, and goes on as [`super::decide::phalanx_decide`] would.
#[xdp]
#[inline(always)]
pub fn phalanx_record(ctx: XdpContext) -> u32 {
    let (Some(counters), Some(work)) = (counters(), work()) else { return XDP_DROP };
    let Some(header) = header(work.plan) else { return XDP_DROP };
    record(counters, header, work);
    carry_out(&ctx, counters, work)
}

#[inline(always)]
fn record(counters: &mut CpuCounters, header: &Header, work: &Work) {
    let decision = &work.decision;
    if decision.learn_fragment
        && let Some(key) = work.packet.fragment_key()
    {
        let ports = [decision.key.source_port, decision.key.destination_port];
        let until_ms = coarse_ms(counters).wrapping_add(FRAGMENT_LIFE_MS);
        let _ = FRAGMENTS.insert(&key, &Ports { until_ms, ports, reserved: [0; 4] }, ANY);
    }
    if decision.erase_cache && header.caching != 0 {
        let _ = CACHE.remove(&decision.key);
    }
    let (mut full, mut moved_on) = (false, false);
    match decision.action {
        Action::Keep => {}
        Action::Insert => {
            // What was recorded before is over: a new connection on an old tuple. Whoever looked into the cache has looked here before.
            if matches!(work.place, Place::Flows | Place::Cache) {
                flows::remove(&decision.key);
            }
            full = !half_open::put(counters, header, &decision.key, &decision.entry);
        }
        Action::Remove => {
            if matches!(work.place, Place::Flows) {
                flows::remove(&decision.key);
            } else {
                moved_on = true;
            }
        }
        // Half-open no more. If there is no room it stays so, and nobody needs to hear of it.
        Action::Update
            if matches!(work.place, Place::HalfOpen) && decision.entry.state != FlowState::HalfOpen as u8 =>
        {
            moved_on = flows::insert(&decision.key, &decision.entry);
            full = !moved_on;
            if full {
                update(header, decision, Place::HalfOpen);
            }
        }
        Action::Update | Action::UpdateCache => update(header, decision, work.place),
    }
    if moved_on {
        half_open::remove(counters, header, &decision.key);
    }
    if full {
        counters.table_full = counters.table_full.wrapping_add(1);
        return;
    }
    if let Some(kind) = decision.event {
        tell(counters, kind, decision.at_once, &decision.key, &decision.entry);
    }
}

/// Writes into the entry that the decision has read, which is looked for once more: with its place in hand the verifier would follow the
/// whole decision once for each table. Birth and backend are left alone: the daemon may have written them meanwhile.
#[inline(always)]
fn update(header: &Header, decision: &Decision, place: Place) {
    let (seen_ms, reported_ms) = (decision.entry.last_seen_ms, decision.entry.last_reported_ms);
    let found = match place {
        Place::Nowhere => None,
        Place::Flows => flows::find_in_map(&decision.key),
        Place::Cache => CACHE.get_ptr_mut(&decision.key),
        Place::HalfOpen => {
            // It may have made room for another since. Of one that stays half-open nothing else has changed.
            if let Some((_, entry)) = half_open::find(header, &decision.key) {
                // SAFETY: the verifier knows where it points.
                unsafe {
                    (*entry).last_seen_ms = seen_ms;
                    (*entry).last_reported_ms = reported_ms;
                }
            }
            None
        }
    };
    if let Some(entry) = found {
        // SAFETY: as above.
        unsafe {
            (*entry).last_seen_ms = seen_ms;
            (*entry).last_reported_ms = reported_ms;
            if decision.event.is_some() {
                (*entry).update = decision.entry.update;
                (*entry).state = decision.entry.state;
                (*entry).flags = decision.entry.flags;
            }
        }
    }
}

/// Tells the daemon of a flow.
#[inline(always)]
pub(super) fn tell(
    counters: &mut CpuCounters,
    kind: FlowEventKind,
    at_once: bool,
    key: &FlowKey,
    entry: &FlowEntry,
) {
    let Some(mut event) = EVENTS.reserve::<RawEvent>(0) else {
        counters.events_lost = counters.events_lost.wrapping_add(1);
        return;
    };
    let place = event.as_mut_ptr();
    // SAFETY: the place was reserved, and every byte of it is written.
    unsafe {
        copy(&raw mut (*place).key, key);
        copy(&raw mut (*place).entry, entry);
        // The last eight bytes: kind, whether at once, zeroes.
        let rest = u64::from_le_bytes([kind as u8, at_once as u8, 0, 0, 0, 0, 0, 0]);
        (&raw mut (*place).kind).cast::<u64>().write(rest);
    }
    event.submit(NO_WAKEUP);
}

const _: () = assert!(core::mem::offset_of!(RawEvent, kind) == 80);

/// Copies in words: the compiler would call a function that copies bytes.
///
/// # Safety
/// `to` may be written.
#[inline(always)]
unsafe fn copy<T>(to: *mut T, from: &T) {
    const { assert!(size_of::<T>() == 40 && align_of::<T>() == 8) };
    let (to, from) = (to.cast::<u64>(), core::ptr::from_ref(from).cast::<u64>());
    let mut word = 0;
    while word < 5 {
        // SAFETY: within both.
        unsafe { to.add(word).write_volatile(from.add(word).read()) };
        word += 1;
    }
}
