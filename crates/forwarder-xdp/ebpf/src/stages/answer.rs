//! What is answered here, and what user space has to do.

use core::arch::asm;

use aya_ebpf::bindings::xdp_action::{XDP_DROP, XDP_TX};
use aya_ebpf::helpers::bpf_xdp_load_bytes;
use aya_ebpf::macros::xdp;
use aya_ebpf::programs::XdpContext;
use phalanx_flow::encap::{HandOffFlags, HandOffHeader, LinkHeader, Outer, echo_reply, hand_off};
use phalanx_flow::packet::{Fragment, Packet, PacketKind, Reader as _};
use phalanx_flow::{FlowKey, Method, Verdict};

use super::{NO_WAKEUP, counters, drop, header, work};
use crate::abi::{PUNT_BYTES, Punt, drops};
use crate::frame::XdpFrame;
use crate::maps::PUNTS;

/// Answers pings to a service's address, and other members' echoes: back the way they came.
#[xdp]
pub fn phalanx_reply(ctx: XdpContext) -> u32 {
    let (Some(counters), Some(work)) = (counters(), work()) else { return XDP_DROP };
    let mut frame = XdpFrame { ctx: &ctx };
    if work.echo == 0 {
        return match echo_reply(&mut frame, &work.packet, None) {
            Ok(()) => XDP_TX,
            Err(_) => drop(counters, drops::MALFORMED),
        };
    }
    let Some(header) = header(work.plan) else { return XDP_DROP };
    let inner = work.echo as usize;
    let (Some([d0, d1, d2, d3, d4, d5, s0, s1, s2, s3, s4, s5]), Some(token)) =
        (frame.read::<12>(0), frame.read::<8>(inner))
    else {
        return drop(counters, drops::BAD_HANDOFF);
    };
    let link = LinkHeader { source: [d0, d1, d2, d3, d4, d5], destination: [s0, s1, s2, s3, s4, s5] };
    // The token stays where it is, because the kernel lets no frame be shorter than an Ethernet header.
    let packet = Packet { l3_offset: inner as u16, ..TOKEN };
    let mut geneve = HandOffHeader::new(1, header.view_digest, header.cookies[0]);
    geneve.flags = HandOffFlags(HandOffFlags::ECHO_REPLY);
    let port = u16::from_be_bytes(header.handoff_port_be);
    let hash = u64::from_be_bytes(token) << 32;
    let (family, to) = (header.local_family, work.packet.key.source);
    let outer = Outer::new(Method::Gue, family, header.local_address, to, port, hash);
    match hand_off(&mut frame, &packet, &geneve, &outer, u16::MAX, &link) {
        Ok(()) => XDP_TX,
        Err(_) => drop(counters, drops::BAD_HANDOFF),
    }
}

/// An echo's token in the place of a packet; family 0 says in the header that there is none.
const TOKEN: Packet = Packet {
    key: FlowKey {
        source: [0; 16],
        destination: [0; 16],
        source_port: [0; 2],
        destination_port: [0; 2],
        protocol: 0,
        family: 0,
        reserved: [0; 2],
    },
    kind: PacketKind::Other,
    fragment: Fragment::Whole,
    tcp_sequence: 0,
    tcp_acknowledgment: 0,
    l3_offset: 0,
    l3_length: 8,
    l4_offset: 0,
    l4_length: 0,
    payload_length: 0,
    ttl: 64,
    tos: 0,
    dont_fragment: true,
};

/// Gives the packet to user space, with what was decided.
#[xdp]
pub fn phalanx_punt(ctx: XdpContext) -> u32 {
    let (Some(counters), Some(work)) = (counters(), work()) else { return XDP_DROP };
    let frame = XdpFrame { ctx: &ctx };
    let length = frame.len();
    if length == 0 || length > PUNT_BYTES {
        counters.punts_lost = counters.punts_lost.wrapping_add(1);
        return XDP_DROP;
    }
    let mut bounded = length.wrapping_sub(1);
    // SAFETY: plain arithmetic; in assembly, because only the verifier needs the mask.
    unsafe {
        asm!("{0} &= 2047", inout(reg) bounded, options(pure, nomem, nostack, preserves_flags));
    }
    let length = bounded.wrapping_add(1) as u32;
    let Some(mut reserved) = PUNTS.reserve::<Punt>(0) else {
        counters.punts_lost = counters.punts_lost.wrapping_add(1);
        return XDP_DROP;
    };
    let place = reserved.as_mut_ptr();
    // SAFETY: the place was reserved; what is not written is not read, `length` says how much of the frame is.
    unsafe {
        (*place).hash = work.decision.hash;
        (*place).ingress = ctx.ingress_ifindex() as u32;
        (*place).length = length;
        (*place).backend = u32::MAX;
        (*place).service = work.decision.service;
        (*place).member = u16::MAX;
        (*place).bypassed = u16::MAX;
        (*place).hops = work.arrival.hops;
        (*place).why = work.why;
        (*place).bare = work.bare as u8;
        let mut known = work.arrival.known;
        let mut vintage = work.arrival.vintage;
        (*place).passed_over = match work.arrival.bypassed {
            Some(id) => id.0,
            None => 0,
        };
        let mut ports = work.arrival.ports;
        match work.decision.verdict {
            Verdict::Forward(index) => (*place).backend = index.0,
            Verdict::HandOff(to) => {
                (*place).member = to.to.0;
                (*place).bypassed = to.bypassed.0;
                (*place).hops = to.hops;
                ports = to.ports;
                known = to.known;
                vintage = to.vintage;
            }
            _ => {}
        }
        (*place).has_ports = ports.is_some() as u8;
        (*place).known = known as u8;
        (*place).vintage = vintage.0;
        (*place).ports = ports.unwrap_or([[0; 2]; 2]);
        if bpf_xdp_load_bytes(ctx.ctx, 0, (&raw mut (*place).frame).cast(), length) != 0 {
            reserved.discard(NO_WAKEUP);
            counters.punts_lost = counters.punts_lost.wrapping_add(1);
            return XDP_DROP;
        }
    }
    reserved.submit(0);
    counters.punted = counters.punted.wrapping_add(1);
    XDP_DROP
}
