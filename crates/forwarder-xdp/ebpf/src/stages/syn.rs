//! New connections: the whole way in one program.

use aya_ebpf::bindings::xdp_action::XDP_DROP;
use aya_ebpf::macros::xdp;
use aya_ebpf::programs::XdpContext;
use phalanx_flow::decide::{Outcome, new_flow};
use phalanx_flow::encap::{Outer, encapsulate, is_forwardable};
use phalanx_flow::packet::{Packet, parse_plain};
use phalanx_flow::{FlowEventKind, FlowKey, Method};

use super::enter::start_work;
use super::record::tell;
use super::send::{backend, leave, link_in_words};
use super::{count, counters, drop, go, header};
use crate::abi::{CpuCounters, Header, drops, stage};
use crate::frame::{XdpFrame, read};
use crate::half_open::{self, Put};
use crate::maps::{ACTIVE, CACHE};
use crate::tables::{Aligned, View, coarse_ms, in_words, of_words};

/// A SYN of IPv4, which [`super::enter::phalanx`] has found to be for us.
#[xdp]
pub fn phalanx_syn4(ctx: XdpContext) -> u32 {
    syn::<4>(&ctx)
}

/// The same of IPv6.
#[xdp]
pub fn phalanx_syn6(ctx: XdpContext) -> u32 {
    syn::<6>(&ctx)
}

#[inline(always)]
fn syn<const FAMILY: u8>(ctx: &XdpContext) -> u32 {
    // Nothing was decided yet: a plan that is new since the program before is as good.
    let (Some(counters), Some(plan)) = (counters(), ACTIVE.get(0)) else { return XDP_DROP };
    let plan = *plan & 1;
    let Some(header) = header(plan) else { return XDP_DROP };
    let Some(packet) = parse_plain::<_, FAMILY>(&XdpFrame { ctx }) else { return XDP_DROP };
    let words = in_words(&packet.key);
    let packet = Packet { key: of_words(words, FAMILY), ..packet };
    if let Some(returned) = record_and_send(ctx, counters, header, plan, &packet, words) {
        return returned;
    }
    let Some(work) = start_work(plan) else { return XDP_DROP };
    work.keep(&packet, words);
    go(ctx, stage::DECIDE)
}

/// `None`: nothing was done.
#[inline(always)]
fn record_and_send(
    ctx: &XdpContext,
    counters: &mut CpuCounters,
    header: &'static Header,
    plan: u32,
    packet: &Packet,
    words: [u64; 5],
) -> Option<u32> {
    let view = View::<true>::new(header, plan, coarse_ms(counters), words);
    let new = new_flow(packet, &view)?;
    let backend = backend(plan, new.entry.backend)?;
    let method = Method::from_u8(backend.method)?;
    let hop = &backend.hop;
    if hop.interface == 0 || !is_forwardable(packet, method, backend.family, hop.mtu) {
        return None;
    }
    let key = Aligned(words);
    // SAFETY: as many bytes as a key has.
    let key = unsafe { &*(&raw const key).cast::<FlowKey>() };
    // The view looks into the table of flows alone: a half-open one is found out here, which spares a second search.
    if half_open::put_new(counters, header, new.hash, words, &new.entry) != Put::Done {
        return None;
    }
    if header.caching != 0 {
        let _ = CACHE.remove(key);
    }
    tell(counters, FlowEventKind::New, new.at_once, key, &new.entry);
    count(counters, Outcome::New);
    let port = u16::from_be_bytes(backend.port_be);
    let (source, destination) = (read(&backend.source), read(&backend.address));
    let outer = Outer::new(method, backend.family, source, destination, port, new.hash);
    let wrapped = encapsulate(&mut XdpFrame { ctx }, packet, &outer, hop.mtu, &link_in_words(hop));
    // Only for want of room: it was looked at whether the packet can go.
    Some(if wrapped.is_ok() { leave(ctx, hop) } else { drop(counters, drops::TRANSMIT) })
}
