//! Hand-offs that come in.

use aya_ebpf::bindings::xdp_action::XDP_DROP;
use aya_ebpf::macros::xdp;
use aya_ebpf::programs::XdpContext;
use phalanx_flow::decide::Outcome;
use phalanx_flow::encap::{HandOffError, HandOffFlags, OpenError, open, parse_hand_off};
use phalanx_flow::packet::Reader as _;
use phalanx_flow::{Arrival, FlowEntry};

use super::{count, counters, drop, go, header, work};
use crate::abi::{CpuCounters, EVENT_ECHO, RawEvent, drops, stage};
use crate::frame::XdpFrame;
use crate::maps::{EVENTS, Work};

/// Takes a packet out of its hand-off.
#[xdp]
pub fn phalanx_open(ctx: XdpContext) -> u32 {
    let (Some(counters), Some(work)) = (counters(), work()) else { return XDP_DROP };
    let Some(header) = header(work.plan) else { return XDP_DROP };
    let frame = XdpFrame { ctx: &ctx };
    let reason = match parse_hand_off(&frame, usize::from(work.packet.payload_offset()), header.cookies) {
        Ok((hand_off, inner)) => {
            if hand_off.flags.is_echo() {
                return echo_in(&ctx, counters, work, &frame, hand_off.flags, inner);
            }
            work.echo = inner as u32;
            work.arrival = Arrival {
                hops: hand_off.hops,
                bypassed: hand_off.bypassed(),
                known: hand_off.known(),
                vintage: hand_off.vintage(),
                ports: match hand_off.ports() {
                    Some((source, destination)) => Some([source, destination]),
                    None => None,
                },
            };
            return go(&ctx, stage::INNER);
        }
        Err(HandOffError::Cookie) => drops::BAD_COOKIE,
        Err(_) => drops::BAD_HANDOFF,
    };
    count(counters, Outcome::Dropped);
    drop(counters, reason)
}

/// Cuts the outer headers off, and reads the packet inside.
#[xdp]
pub fn phalanx_inner(ctx: XdpContext) -> u32 {
    let (Some(counters), Some(work)) = (counters(), work()) else { return XDP_DROP };
    let mut frame = XdpFrame { ctx: &ctx };
    let reason = match open(&mut frame, &work.packet, work.echo as usize) {
        Ok(packet) => {
            counters.handoffs_in = counters.handoffs_in.wrapping_add(1);
            work.packet = packet;
            work.bare = 1;
            return go(&ctx, stage::DECIDE);
        }
        Err(OpenError::Parse(_)) => drops::MALFORMED,
        Err(OpenError::NoRoom | OpenError::Congestion) => drops::BAD_HANDOFF,
    };
    count(counters, Outcome::Dropped);
    drop(counters, reason)
}

/// An echo: a question is answered, an answer goes to the daemon.
#[inline(always)]
fn echo_in(
    ctx: &XdpContext,
    counters: &mut CpuCounters,
    work: &mut Work,
    frame: &XdpFrame<'_>,
    flags: HandOffFlags,
    inner: usize,
) -> u32 {
    let Some(token) = frame.read::<8>(inner) else {
        count(counters, Outcome::Dropped);
        return drop(counters, drops::BAD_HANDOFF);
    };
    count(counters, Outcome::Echo);
    if !flags.has(HandOffFlags::ECHO_REPLY) {
        // Not zero: an Ethernet header at least is before it.
        work.echo = inner as u32;
        return go(ctx, stage::REPLY);
    }
    if let Some(mut event) = EVENTS.reserve::<RawEvent>(0) {
        let place = event.as_mut_ptr();
        // SAFETY: the place was reserved, and every byte of it is written.
        unsafe {
            (*place).key = work.packet.key;
            (*place).entry = FlowEntry { birth: u64::from_be_bytes(token), ..EMPTY };
            (*place).kind = EVENT_ECHO;
            (*place).at_once = 0;
            (*place).reserved = [0; 6];
        }
        event.submit(0);
    } else {
        counters.events_lost = counters.events_lost.wrapping_add(1);
    }
    XDP_DROP
}

const EMPTY: FlowEntry = FlowEntry {
    birth: 0,
    last_seen_ms: 0,
    last_reported_ms: 0,
    update: 0,
    backend: phalanx_flow::BackendIndex::NONE,
    state: 0,
    flags: phalanx_flow::FlowFlags(0),
    reserved: [0; 6],
};
