//! The decision, and what is recorded of it.

use aya_ebpf::bindings::xdp_action::{XDP_DROP, XDP_PASS};
use aya_ebpf::macros::xdp;
use aya_ebpf::programs::XdpContext;
use phalanx_flow::decide::{Action, DropReason, decide_into};
use phalanx_flow::{FlowEntry, FlowEventKind, FlowKey, FlowState, Verdict};

use super::{NO_WAKEUP, count, counters, drop, go, header, work};
use crate::abi::{CpuCounters, FRAGMENT_LIFE_MS, Ports, RawEvent, drops, punt, stage};
use crate::flows;
use crate::half_open;
use crate::maps::{CACHE, EVENTS, FRAGMENTS, Work};
use crate::tables::{Place, View, coarse_ms};

/// Flags of an update: whatever is there.
const ANY: u64 = 0;

/// Decides, and records what was decided.
// In line with what the macro makes of it: the kernel forbids tail calls in a subprogram without BTF.
#[xdp]
#[inline(always)]
pub fn phalanx_decide(ctx: XdpContext) -> u32 {
    let (Some(counters), Some(work)) = (counters(), work()) else { return XDP_DROP };
    let Some(header) = header(work.plan) else { return XDP_DROP };
    let view = View::<false>::new(header, work.plan, coarse_ms(counters), [0; 5]);
    decide_into(&mut work.decision, &work.packet, &work.arrival, &view);
    commit(counters, work, &view);
    count(counters, work.decision.outcome);
    match work.decision.verdict {
        Verdict::Forward(_) => go(&ctx, stage::FORWARD),
        Verdict::HandOff(_) => go(&ctx, stage::HAND_OFF),
        Verdict::EchoReply if work.bare == 0 => go(&ctx, stage::REPLY),
        Verdict::EchoReply => {
            work.why = punt::ECHO;
            go(&ctx, stage::PUNT)
        }
        // Rare, and soon over: user space makes the answer.
        Verdict::Reset => {
            work.why = punt::RESET;
            go(&ctx, stage::PUNT)
        }
        Verdict::Hold => {
            work.why = punt::HOLD;
            go(&ctx, stage::PUNT)
        }
        Verdict::Pass if work.arrival.hops == 0 => XDP_PASS,
        // A member whose configuration has a service that ours has not.
        Verdict::Pass => drop(counters, drops::NO_SERVICE),
        Verdict::Drop(DropReason::NotJoined) => drop(counters, drops::NOT_JOINED),
        Verdict::Drop(reason) => drop(counters, reason as usize),
    }
}

/// Carries the decision out on the tables.
#[inline(always)]
fn commit(counters: &mut CpuCounters, work: &mut Work, view: &View<false>) {
    let decision = &work.decision;
    if decision.learn_fragment
        && let Some(key) = work.packet.fragment_key()
    {
        let ports = [decision.key.source_port, decision.key.destination_port];
        let value = Ports { until_ms: view.now_ms.wrapping_add(FRAGMENT_LIFE_MS), ports, reserved: [0; 4] };
        let _ = FRAGMENTS.insert(&key, &value, ANY);
    }
    if decision.erase_cache && view.header.caching != 0 {
        let _ = CACHE.remove(&decision.key);
    }
    let half_open = decision.entry.state == FlowState::HalfOpen as u8;
    let (mut full, mut moved_on) = (false, false);
    match decision.action {
        Action::Keep => {}
        Action::Insert => {
            // What was recorded before is over: a new connection on an old tuple.
            if matches!(view.place.get(), Place::Flows) {
                flows::remove(&decision.key);
            }
            full = !half_open::put(counters, view.header, &decision.key, &decision.entry);
        }
        Action::Update if matches!(view.place.get(), Place::HalfOpen) && !half_open => {
            if flows::insert(&decision.key, &decision.entry) {
                moved_on = true;
            } else {
                full = true;
                // What is half-open stays so, and nobody needs to hear of it: the flow goes on by what is there.
                if let Some(entry) = view.found.get() {
                    // SAFETY: the verifier knows where it points.
                    unsafe { (*entry).last_seen_ms = decision.entry.last_seen_ms };
                }
            }
        }
        Action::Remove => {
            if matches!(view.place.get(), Place::Flows) {
                flows::remove(&decision.key);
            } else {
                moved_on = true;
            }
        }
        Action::Update | Action::UpdateCache => {
            if let Some(entry) = view.found.get() {
                // SAFETY: as above. Birth and backend are left alone: the daemon may have written them since they were read.
                unsafe {
                    if (*entry).last_seen_ms != decision.entry.last_seen_ms {
                        (*entry).last_seen_ms = decision.entry.last_seen_ms;
                    }
                    if (*entry).last_reported_ms != decision.entry.last_reported_ms {
                        (*entry).last_reported_ms = decision.entry.last_reported_ms;
                    }
                    // Of a half-open flow, which may have made room for another since, nothing else has changed.
                    if decision.event.is_some() && !matches!(view.place.get(), Place::HalfOpen) {
                        (*entry).update = decision.entry.update;
                        (*entry).state = decision.entry.state;
                        (*entry).flags = decision.entry.flags;
                    }
                }
            }
        }
    }
    if moved_on {
        half_open::remove(counters, view.header, &decision.key);
    }
    if full {
        counters.table_full = counters.table_full.wrapping_add(1);
        return;
    }
    if let Some(kind) = decision.event {
        tell(counters, kind, decision.at_once, &decision.key, &decision.entry);
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
