//! From the wire: what is plain goes the whole way here, the rest to its stages.

use aya_ebpf::bindings::xdp_action::{XDP_DROP, XDP_PASS};
use aya_ebpf::macros::xdp;
use aya_ebpf::programs::XdpContext;
use phalanx_flow::decide::{Outcome, hit};
use phalanx_flow::encap::{EncapError, Outer, encapsulate, is_spread};
use phalanx_flow::packet::{Fragment, Link, Packet, PacketKind, Reader as _, parse, parse_plain};
use phalanx_flow::{FlowSeed, Method, flow_hash};

use super::send::{backend, leave, link_in_words};
use super::{count, count_hit, counters, drop, go, header, work};
use crate::abi::{CpuCounters, Header, MAC_BITS, MAC_GROUP, MAX_MACS, drops, stage};
use crate::frame::{XdpFrame, read};
use crate::maps::{ACTIVE, Work};
use crate::tables::{View, coarse_ms, halves, in_words, is_service_address, of_words, opaque};

/// The program that is attached: reads the packet.
#[xdp]
pub fn phalanx(ctx: XdpContext) -> u32 {
    let Some(counters) = counters() else { return XDP_DROP };
    // Before there is a plan the kernel has everything.
    let Some(plan) = ACTIVE.get(0) else { return XDP_PASS };
    let plan = *plan & 1;
    let Some(header) = header(plan) else { return XDP_PASS };
    let frame = XdpFrame { ctx: &ctx };
    if !is_for_us(&frame, header, counters) {
        return XDP_PASS;
    }
    match parse_plain::<_, 4>(&frame) {
        Some(packet) => plain(&ctx, counters, header, plan, packet),
        None => match start_work(plan) {
            Some(_) => go(&ctx, stage::V6),
            None => XDP_DROP,
        },
    }
}

/// The same for IPv6: a program of its own, because both are too much for one stack.
#[xdp]
pub fn phalanx_v6(ctx: XdpContext) -> u32 {
    let (Some(counters), Some(work)) = (counters(), work()) else { return XDP_DROP };
    let plan = work.plan;
    let Some(header) = header(plan) else { return XDP_DROP };
    match parse_plain::<_, 6>(&XdpFrame { ctx: &ctx }) {
        Some(packet) => plain(&ctx, counters, header, plan, packet),
        None => go(&ctx, stage::PARSE),
    }
}

/// What stages tell each other, for a packet from the wire.
#[inline(always)]
pub(super) fn start_work(plan: u32) -> Option<&'static mut Work> {
    let work = work()?;
    work.plan = plan;
    work.bare = 0;
    work.echo = 0;
    // As `Arrival::WIRE`, field by field: the compiler would call a function that writes bytes.
    work.arrival.hops = 0;
    work.arrival.bypassed = None;
    work.arrival.known = false;
    work.arrival.vintage.0 = 0;
    work.arrival.ports = None;
    Some(work)
}

/// The way of most packets, in one piece; the others go to their stages. Once for each family, whose number is then no question.
#[inline(always)]
fn plain(
    ctx: &XdpContext,
    counters: &mut CpuCounters,
    header: &'static Header,
    plan: u32,
    packet: Packet,
) -> u32 {
    if matches!(packet.kind, PacketKind::TcpSyn) {
        return if packet.key.family == 4 { go(ctx, stage::SYN4) } else { go(ctx, stage::SYN6) };
    }
    let words = in_words(&packet.key);
    let packet = &Packet { key: of_words(words, packet.key.family), ..packet };
    let handed_off = is_handed_off(packet, words, header);
    if !handed_off {
        let view = View::<true>::new(header, plan, coarse_ms(counters), words);
        if let Some(found) = hit(packet, &view)
            && let Some(backend) = backend(plan, found.backend)
            && backend.hop.interface != 0
            && let Some(method) = Method::from_u8(backend.method)
        {
            let spread = is_spread(method, backend.family);
            let hash = if spread { flow_hash(FlowSeed(header.seed), &view.key(packet.key.family)) } else { 0 };
            let port = u16::from_be_bytes(backend.port_be);
            let (source, destination) = (read(&backend.source), read(&backend.address));
            let outer = Outer::new(method, backend.family, source, destination, port, hash);
            let hop = &backend.hop;
            match encapsulate(&mut XdpFrame { ctx }, packet, &outer, hop.mtu, &link_in_words(hop)) {
                Ok(()) => {
                    view.touch(found.is_known_to_owner);
                    count_hit(counters);
                    return leave(ctx, hop);
                }
                Err(EncapError::NoRoom) => {
                    count_hit(counters);
                    return drop(counters, drops::TRANSMIT);
                }
                // Nothing was changed: the long way finds the same, and knows what to do.
                Err(EncapError::TooBig { .. } | EncapError::TtlExpired) => {}
            }
        }
    }
    let Some(work) = start_work(plan) else { return XDP_DROP };
    work.keep(packet, words);
    // Two calls, because the kernel makes a plain jump of one whose stage is a constant.
    if handed_off { go(ctx, stage::OPEN) } else { go(ctx, stage::DECIDE) }
}

/// Reads packets that are not plain.
#[xdp]
pub fn phalanx_parse(ctx: XdpContext) -> u32 {
    let (Some(counters), Some(work)) = (counters(), work()) else { return XDP_DROP };
    let plan = work.plan;
    let Some(header) = header(plan) else { return XDP_DROP };
    let frame = XdpFrame { ctx: &ctx };
    match parse(&frame, Link::Ethernet) {
        Ok(packet) => {
            let words = in_words(&packet.key);
            let handed_off = is_handed_off(&packet, words, header);
            work.keep(&packet, words);
            // Two calls, because the kernel makes a plain jump of one whose stage is a constant.
            if handed_off { go(&ctx, stage::OPEN) } else { go(&ctx, stage::DECIDE) }
        }
        Err(error) => {
            if error.family != 0 && is_service_address(&error.destination, plan) {
                count(counters, Outcome::Dropped);
                drop(counters, drops::MALFORMED)
            } else {
                count(counters, Outcome::Passed);
                XDP_PASS
            }
        }
    }
}

/// Whether the packet is for our end of the hand-off tunnels.
#[inline(always)]
fn is_handed_off(packet: &Packet, words: [u64; 5], header: &Header) -> bool {
    let [_, _, a, b, ends] = words;
    // The compiler would keep apart what it knows of the kind by this from what it is, at a copy for each way out.
    opaque(u64::from(matches!(packet.kind, PacketKind::Datagram))) != 0
        && matches!(packet.fragment, Fragment::Whole)
        && (ends >> 16) as u16 == u16::from_ne_bytes(header.handoff_port_be)
        && packet.key.family == header.local_family
        && (a, b) == halves(&read(&header.local_address))
}

/// Whether the frame was sent to one of our interfaces. A switch that has forgotten a host floods its frames to all, and a port may be
/// promiscuous: if all members forwarded those, each would forward the others' again.
#[inline(always)]
fn is_for_us(frame: &XdpFrame<'_>, header: &Header, counters: &mut CpuCounters) -> bool {
    let Some(start) = frame.read::<8>(0) else { return false };
    let address = u64::from_le_bytes(start) & MAC_BITS;
    let mut place = 0;
    while place < MAX_MACS {
        if header.macs.get(place) == Some(&address) {
            return true;
        }
        place += 1;
    }
    if address & MAC_GROUP == 0 {
        counters.other_host = counters.other_host.wrapping_add(1);
    } else {
        count(counters, Outcome::Passed);
    }
    false
}
