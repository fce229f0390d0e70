//! The decision.

use aya_ebpf::bindings::xdp_action::{XDP_DROP, XDP_PASS};
use aya_ebpf::macros::xdp;
use aya_ebpf::programs::XdpContext;
use phalanx_flow::decide::{Action, Decision, DropReason, decide_into};
use phalanx_flow::Verdict;

use super::{count, counters, drop, go, header, work};
use crate::abi::{CpuCounters, drops, punt, stage};
use crate::maps::Work;
use crate::tables::{View, coarse_ms};

/// Decides. What is to be recorded, if anything, is [`super::record`]'s.
// In line with what the macro makes of it: the kernel forbids tail calls in a subprogram without BTF.
#[xdp]
#[inline(always)]
pub fn phalanx_decide(ctx: XdpContext) -> u32 {
    let (Some(counters), Some(work)) = (counters(), work()) else { return XDP_DROP };
    let Some(header) = header(work.plan) else { return XDP_DROP };
    let view = View::<false>::new(header, work.plan, coarse_ms(counters), [0; 5]);
    decide_into(&mut work.decision, &work.packet, &work.arrival, &view);
    count(counters, work.decision.outcome);
    work.place = view.place.get();
    if is_to_be_recorded(&work.decision, &view) {
        return go(&ctx, stage::RECORD);
    }
    carry_out(&ctx, counters, work)
}

/// Most packets of a flow come within the same tick of the clock as others of it, and change nothing.
#[inline(always)]
fn is_to_be_recorded(decision: &Decision, view: &View<false>) -> bool {
    let acts = match decision.action {
        Action::Keep => false,
        Action::Update | Action::UpdateCache => view.seen_ms.get() != view.now_ms,
        Action::Insert | Action::Remove => true,
    };
    acts || decision.event.is_some() || decision.learn_fragment || decision.erase_cache && view.header.caching != 0
}

/// Does with the packet what was decided.
#[inline(always)]
pub(super) fn carry_out(ctx: &XdpContext, counters: &mut CpuCounters, work: &mut Work) -> u32 {
    match work.decision.verdict {
        Verdict::Forward(_) => go(ctx, stage::FORWARD),
        Verdict::HandOff(_) => go(ctx, stage::HAND_OFF),
        Verdict::EchoReply if work.bare == 0 => go(ctx, stage::REPLY),
        Verdict::EchoReply => {
            work.why = punt::ECHO;
            go(ctx, stage::PUNT)
        }
        // Rare, and soon over: user space makes the answer.
        Verdict::Reset => {
            work.why = punt::RESET;
            go(ctx, stage::PUNT)
        }
        Verdict::Hold => {
            work.why = punt::HOLD;
            go(ctx, stage::PUNT)
        }
        Verdict::Pass if work.arrival.hops == 0 => XDP_PASS,
        // A member whose configuration has a service that ours has not.
        Verdict::Pass => drop(counters, drops::NO_SERVICE),
        Verdict::Drop(DropReason::NotJoined) => drop(counters, drops::NOT_JOINED),
        Verdict::Drop(reason) => drop(counters, reason as usize),
    }
}
