//! To a backend, or to another member.

use aya_ebpf::bindings::xdp_action::{XDP_DROP, XDP_REDIRECT, XDP_TX};
use aya_ebpf::helpers::bpf_redirect;
use aya_ebpf::helpers::generated::bpf_fib_lookup;
use aya_ebpf::macros::xdp;
use aya_ebpf::programs::XdpContext;
use phalanx_flow::encap::{EncapError, HandOffHeader, LinkHeader, Outer, encapsulate, hand_off};
use phalanx_flow::{BackendIndex, MemberId, MemberSlot, Method, Verdict};

use super::{counters, drop, go, header, work};
use crate::abi::{
    Backend, CpuCounters, FibLookup, Hop, MAX_BACKENDS, MAX_MEMBERS, Member, drops, punt, stage,
};
use crate::frame::{XdpFrame, load};
use crate::maps::{BACKENDS, MEMBERS, Work};

/// Sends the packet to its backend.
#[xdp]
pub fn phalanx_forward(ctx: XdpContext) -> u32 {
    let (Some(counters), Some(work)) = (counters(), work()) else { return XDP_DROP };
    let Verdict::Forward(index) = work.decision.verdict else { return XDP_DROP };
    let Some(backend) = backend(work.plan, index) else { return drop(counters, drops::NO_NEXT_HOP) };
    let mut hop = backend.hop;
    if hop.interface == 0
        && !look_up(&ctx, counters, backend.family, &backend.source, &backend.address, &mut hop)
    {
        work.why = punt::NO_NEXT_HOP;
        return go(&ctx, stage::PUNT);
    }
    let Some(method) = Method::from_u8(backend.method) else { return drop(counters, drops::NO_NEXT_HOP) };
    let port = u16::from_be_bytes(backend.port_be);
    let outer = Outer::new(method, backend.family, backend.source, backend.address, port, work.decision.hash);
    let mut frame = XdpFrame { ctx: &ctx };
    let wrapped = encapsulate(&mut frame, &work.packet, &outer, hop.mtu, &link(&hop));
    sent(&ctx, counters, work, &hop, wrapped)
}

/// Hands the packet off to another member.
#[xdp]
pub fn phalanx_hand_off(ctx: XdpContext) -> u32 {
    let (Some(counters), Some(work)) = (counters(), work()) else { return XDP_DROP };
    let Some(header) = header(work.plan) else { return XDP_DROP };
    let Verdict::HandOff(to) = work.decision.verdict else { return XDP_DROP };
    let Some(member) = member(work.plan, to.to) else { return drop(counters, drops::NO_NEXT_HOP) };
    let mut hop = member.hop;
    if hop.interface == 0
        && !look_up(&ctx, counters, member.family, &header.local_address, &member.address, &mut hop)
    {
        work.why = punt::NO_NEXT_HOP;
        return go(&ctx, stage::PUNT);
    }
    let mut geneve = HandOffHeader::new(to.hops, header.view_digest, header.cookies[0]);
    if let Some(bypassed) = self::member(work.plan, to.bypassed) {
        geneve = geneve.bypassing(MemberId(bypassed.id)).with_known(to.known).with_vintage(to.vintage);
    }
    if let Some([source, destination]) = to.ports {
        geneve = geneve.with_ports(source, destination);
    }
    let port = u16::from_be_bytes(header.handoff_port_be);
    let hash = work.decision.hash;
    let outer = Outer::new(Method::Gue, member.family, header.local_address, member.address, port, hash);
    let mut frame = XdpFrame { ctx: &ctx };
    let wrapped = hand_off(&mut frame, &work.packet, &geneve, &outer, hop.mtu, &link(&hop));
    sent(&ctx, counters, work, &hop, wrapped)
}

/// `BPF_FIB_LKUP_RET_SUCCESS`.
const FIB_SUCCESS: i64 = 0;

/// Asks the kernel's routes for a next hop that the plan does not know; whether they do. Costs more than all the rest of a packet.
#[inline(always)]
fn look_up(
    ctx: &XdpContext,
    counters: &mut CpuCounters,
    family: u8,
    source: &[u8; 16],
    destination: &[u8; 16],
    hop: &mut Hop,
) -> bool {
    counters.fib_lookups = counters.fib_lookups.wrapping_add(1);
    let ingress = ctx.ingress_ifindex() as u32;
    let mut asked = FibLookup {
        family: if family == 4 { 2 } else { 10 },
        protocol: 0,
        ports: [0; 2],
        length_mtu: 0,
        interface: ingress,
        tos_metric: 0,
        source: [0; 16],
        destination: [0; 16],
        vlan: 0,
        source_mac: [0; 6],
        destination_mac: [0; 6],
    };
    if family == 4 {
        let [.., s0, s1, s2, s3] = *source;
        let [.., d0, d1, d2, d3] = *destination;
        asked.source = [s0, s1, s2, s3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        asked.destination = [d0, d1, d2, d3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    } else {
        asked.source = *source;
        asked.destination = *destination;
    }
    let size = size_of::<FibLookup>() as i32;
    // On a host that forwards nothing by itself the kernel never answers, whatever the flags (`bpf_ipv4_fib_lookup` in
    // net/core/filter.c, Linux 6.18): then user space resolves the next hop.
    // SAFETY: the context is the kernel's, and the structure lives through the call.
    let answer = unsafe { bpf_fib_lookup(ctx.ctx.cast(), (&raw mut asked).cast(), size, 0) };
    if answer != FIB_SUCCESS {
        return false;
    }
    *hop = Hop {
        interface: asked.interface,
        mtu: asked.length_mtu,
        source_mac: asked.source_mac,
        destination_mac: asked.destination_mac,
        reserved: [0; 2],
    };
    true
}

#[inline(always)]
pub(super) fn backend(plan: u32, index: BackendIndex) -> Option<&'static Backend> {
    if index.0 >= MAX_BACKENDS {
        return None;
    }
    BACKENDS.get(plan.wrapping_mul(MAX_BACKENDS).wrapping_add(index.0))
}

#[inline(always)]
fn member(plan: u32, slot: MemberSlot) -> Option<&'static Member> {
    let slot = u32::from(slot.0);
    if slot >= MAX_MEMBERS {
        return None;
    }
    MEMBERS.get(plan.wrapping_mul(MAX_MEMBERS).wrapping_add(slot))
}

#[inline(always)]
fn link(hop: &Hop) -> LinkHeader {
    LinkHeader { source: hop.source_mac, destination: hop.destination_mac }
}

/// The same of a hop in a map.
#[inline(always)]
pub(super) fn link_in_words(hop: &'static Hop) -> LinkHeader {
    let macs = (&raw const hop.destination_mac).cast::<[u8; 12]>();
    // SAFETY: the source's address follows the destination's.
    let [a, b, c, d, e, f, g, h, i, j, k, l] = unsafe { load(macs) };
    LinkHeader { destination: [a, b, c, d, e, f], source: [g, h, i, j, k, l] }
}

/// Sends the frame on the hop's interface.
#[inline(always)]
pub(super) fn leave(ctx: &XdpContext, hop: &Hop) -> u32 {
    if hop.interface == ctx.ingress_ifindex() as u32 {
        return XDP_TX;
    }
    // SAFETY: plain numbers.
    let _ = unsafe { bpf_redirect(hop.interface, 0) };
    XDP_REDIRECT
}

/// What becomes of a frame that was wrapped.
#[inline(always)]
fn sent(
    ctx: &XdpContext,
    counters: &mut CpuCounters,
    work: &mut Work,
    hop: &Hop,
    wrapped: Result<(), EncapError>,
) -> u32 {
    match wrapped {
        Ok(()) => leave(ctx, hop),
        Err(EncapError::TooBig { .. }) => {
            work.why = punt::TOO_BIG;
            go(ctx, stage::PUNT)
        }
        Err(EncapError::TtlExpired) => {
            work.why = punt::TTL;
            go(ctx, stage::PUNT)
        }
        Err(EncapError::NoRoom) => drop(counters, drops::TRANSMIT),
    }
}
