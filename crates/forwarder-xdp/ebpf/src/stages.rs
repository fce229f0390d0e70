//! The stages: one program each. Here is what they share.

mod answer;
mod decide;
mod enter;
mod open;
mod record;
mod send;
mod syn;

use core::arch::asm;

use aya_ebpf::bindings::xdp_action::XDP_DROP;
use aya_ebpf::programs::XdpContext;
use phalanx_flow::decide::Outcome;

use crate::abi::{CpuCounters, DROP_REASONS, Header, OUTCOME_COUNTERS};
use crate::maps::{COUNTERS, HEADERS, STAGES, WORK, Work};

/// Flags of an event: the daemon polls, so that it need not be woken.
const NO_WAKEUP: u64 = 1;

#[inline(always)]
pub(crate) fn counters() -> Option<&'static mut CpuCounters> {
    // SAFETY: each CPU has its own, and XDP runs to its end where it began.
    COUNTERS.get_ptr_mut(0).map(|counters| unsafe { &mut *counters })
}

#[inline(always)]
fn work() -> Option<&'static mut Work> {
    // SAFETY: as above.
    WORK.get_ptr_mut(0).map(|work| unsafe { &mut *work })
}

#[inline(always)]
pub(crate) fn header(plan: u32) -> Option<&'static Header> {
    HEADERS.get(plan)
}

/// Goes on with another stage.
#[inline(always)]
fn go(ctx: &XdpContext, stage: u32) -> u32 {
    // SAFETY: the context is the kernel's.
    unsafe { STAGES.tail_call(ctx, stage) };
    if let Some(counters) = counters() {
        counters.faults = counters.faults.wrapping_add(1);
    }
    XDP_DROP
}

/// `index` below 16, for the verifier: the compiler believes an enum's number to be small, and would drop a mask.
#[inline(always)]
fn below_16(index: usize) -> usize {
    let mut index = index;
    // SAFETY: plain arithmetic.
    unsafe {
        asm!("{0} &= 15", inout(reg) index, options(pure, nomem, nostack, preserves_flags));
    }
    index
}

const _: () = assert!(OUTCOME_COUNTERS == 16 && DROP_REASONS == 16);

#[inline(always)]
fn count(counters: &mut CpuCounters, outcome: Outcome) {
    if let Some(place) = counters.outcomes.get_mut(below_16(outcome as usize)) {
        *place = place.wrapping_add(1);
    }
}

/// [`count`] of an outcome that is known here: then its place is, too.
#[inline(always)]
fn count_hit(counters: &mut CpuCounters) {
    let place = &mut counters.outcomes[Outcome::Hit as usize];
    *place = place.wrapping_add(1);
}

#[inline(always)]
fn drop(counters: &mut CpuCounters, reason: usize) -> u32 {
    if let Some(place) = counters.drops.get_mut(below_16(reason)) {
        *place = place.wrapping_add(1);
    }
    XDP_DROP
}
