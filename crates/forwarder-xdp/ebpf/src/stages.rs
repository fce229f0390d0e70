//! The stages: one program each.

use core::arch::asm;

use aya_ebpf::bindings::xdp_action::{XDP_DROP, XDP_PASS, XDP_REDIRECT, XDP_TX};
use aya_ebpf::helpers::generated::bpf_fib_lookup;
use aya_ebpf::helpers::{bpf_redirect, bpf_xdp_load_bytes};
use aya_ebpf::macros::xdp;
use aya_ebpf::programs::XdpContext;
use phalanx_flow::decide::{Action, DropReason, Outcome, decide_into, hit};
use phalanx_flow::encap::{
    EncapError, HandOffError, HandOffFlags, HandOffHeader, LinkHeader, OpenError, Outer, echo_reply,
    encapsulate, hand_off, is_spread, open, parse_hand_off,
};
use phalanx_flow::packet::{Fragment, Frame, Link, Packet, PacketKind, Reader, parse, parse_plain};
use phalanx_flow::{
    Arrival, BackendIndex, FlowEntry, FlowKey, FlowSeed, FlowState, MemberId, MemberSlot, Method, Verdict,
    flow_hash,
};

use crate::abi::{
    Backend, CpuCounters, DROP_REASONS, EVENT_ECHO, FRAGMENT_LIFE_MS, FibLookup, Header, Hop, MAC_BITS,
    MAC_GROUP, MAX_BACKENDS, MAX_MACS, MAX_MEMBERS, Member, OUTCOME_COUNTERS, PUNT_BYTES, Ports, Punt,
    RawEvent, drops, punt, stage,
};
use crate::frame::{XdpFrame, load, read};
use crate::maps::{
    ACTIVE, BACKENDS, CACHE, COUNTERS, EVENTS, FLOWS, FRAGMENTS, HALF_OPEN, HEADERS, MEMBERS, PUNTS, STAGES,
    WORK, Work,
};
use crate::tables::{Place, View, coarse_ms, halves, in_words, is_service_address};

/// Flags of an update: whatever is there.
const ANY: u64 = 0;
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
fn header(plan: u32) -> Option<&'static Header> {
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

#[inline(always)]
fn drop(counters: &mut CpuCounters, reason: usize) -> u32 {
    if let Some(place) = counters.drops.get_mut(below_16(reason)) {
        *place = place.wrapping_add(1);
    }
    XDP_DROP
}

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
fn start_work(plan: u32) -> Option<&'static mut Work> {
    let work = work()?;
    work.plan = plan;
    work.bare = 0;
    work.echo = 0;
    // As `Arrival::WIRE`, field by field: the compiler would call a function that writes bytes.
    work.arrival.hops = 0;
    work.arrival.bypassed = None;
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
    let packet = &Packet { key: in_words(&packet.key), ..packet };
    let handed_off = is_handed_off(packet, header);
    if !handed_off {
        let view = View::<true>::new(header, plan, coarse_ms(counters));
        let (local, seed) = (MemberSlot(header.local_slot), FlowSeed(header.seed));
        if let Some(found) = hit(packet, &view, local, seed, view.now_ms)
            && let Some(backend) = backend(plan, found.backend)
            && backend.hop.interface != 0
            && let Some(method) = Method::from_u8(backend.method)
        {
            let spread = is_spread(method, backend.family);
            let hash = if spread { flow_hash(seed, &packet.key) } else { 0 };
            let port = u16::from_be_bytes(backend.port_be);
            let (source, destination) = (read(&backend.source), read(&backend.address));
            let outer = Outer::new(method, backend.family, source, destination, port, hash);
            let hop = &backend.hop;
            match encapsulate(&mut XdpFrame { ctx }, packet, &outer, hop.mtu, &link_in_words(hop)) {
                Ok(()) => {
                    view.touch(found.is_known_to_owner);
                    count(counters, Outcome::Hit);
                    return leave(ctx, hop);
                }
                Err(EncapError::NoRoom) => {
                    count(counters, Outcome::Hit);
                    return drop(counters, drops::TRANSMIT);
                }
                // Nothing was changed: the long way finds the same, and knows what to do.
                Err(EncapError::TooBig { .. } | EncapError::TtlExpired) => {}
            }
        }
    }
    let Some(work) = start_work(plan) else { return XDP_DROP };
    work.keep(packet);
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
            let handed_off = is_handed_off(&packet, header);
            work.keep(&packet);
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
fn is_handed_off(packet: &Packet, header: &Header) -> bool {
    matches!(packet.kind, PacketKind::Datagram)
        && matches!(packet.fragment, Fragment::Whole)
        && u16::from_ne_bytes(packet.key.destination_port) == u16::from_ne_bytes(header.handoff_port_be)
        && packet.key.family == header.local_family
        && halves(&packet.key.destination) == halves(&read(&header.local_address))
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

/// Decides, and records what was decided.
#[xdp]
pub fn phalanx_decide(ctx: XdpContext) -> u32 {
    let (Some(counters), Some(work)) = (counters(), work()) else { return XDP_DROP };
    let Some(header) = header(work.plan) else { return XDP_DROP };
    let view = View::<false>::new(header, work.plan, coarse_ms(counters));
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
    let mut full = false;
    match decision.action {
        Action::Keep => {}
        Action::Insert => {
            // What was recorded before is over: a new connection on an old tuple.
            if matches!(view.place.get(), Place::Flows) {
                let _ = FLOWS.remove(&decision.key);
            }
            full = HALF_OPEN.insert(&decision.key, &decision.entry, ANY).is_err();
            if !full && !matches!(view.place.get(), Place::HalfOpen) {
                counters.half_open_in = counters.half_open_in.wrapping_add(1);
            }
        }
        Action::Update if matches!(view.place.get(), Place::HalfOpen) && !half_open => {
            match FLOWS.insert(&decision.key, &decision.entry, ANY) {
                Ok(()) => {
                    if HALF_OPEN.remove(&decision.key).is_ok() {
                        counters.half_open_out = counters.half_open_out.wrapping_add(1);
                    }
                }
                Err(_) => {
                    full = true;
                    // What is half-open stays so, and nobody needs to hear of it: the flow goes on by what is there.
                    if let Some(entry) = view.found.get() {
                        // SAFETY: the verifier knows where it points.
                        unsafe { (*entry).last_seen_ms = decision.entry.last_seen_ms };
                    }
                }
            }
        }
        Action::Remove => {
            if matches!(view.place.get(), Place::Flows) {
                let _ = FLOWS.remove(&decision.key);
            } else if HALF_OPEN.remove(&decision.key).is_ok() {
                counters.half_open_out = counters.half_open_out.wrapping_add(1);
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
                    if decision.event.is_some() {
                        (*entry).update = decision.entry.update;
                        (*entry).state = decision.entry.state;
                        (*entry).flags = decision.entry.flags;
                    }
                }
            }
        }
    }
    if full {
        counters.table_full = counters.table_full.wrapping_add(1);
        return;
    }
    if let Some(kind) = decision.event {
        if let Some(mut event) = EVENTS.reserve::<RawEvent>(0) {
            let place = event.as_mut_ptr();
            // SAFETY: the place was reserved, and every byte of it is written.
            unsafe {
                copy(&raw mut (*place).key, &decision.key);
                copy(&raw mut (*place).entry, &decision.entry);
                (*place).kind = kind as u8;
                (*place).at_once = decision.at_once as u8;
                (*place).reserved = [0; 6];
            }
            event.submit(NO_WAKEUP);
        } else {
            counters.events_lost = counters.events_lost.wrapping_add(1);
        }
    }
}

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
        geneve = geneve.bypassing(MemberId(bypassed.id));
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

/// `BPF_FIB_LKUP_RET_SUCCESS` and `BPF_FIB_LKUP_RET_FWD_DISABLED`.
const FIB_SUCCESS: i64 = 0;
const FIB_FORWARDING_DISABLED: i64 = 5;
/// `BPF_FIB_LOOKUP_OUTPUT`.
const FIB_OUTPUT: u32 = 2;

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
    // SAFETY: the context is the kernel's, and the structure lives through the call.
    let mut answer = unsafe { bpf_fib_lookup(ctx.ctx.cast(), (&raw mut asked).cast(), size, 0) };
    if answer == FIB_FORWARDING_DISABLED {
        // A host that forwards nothing by itself: asked as the sender that it is.
        // SAFETY: as above.
        answer = unsafe { bpf_fib_lookup(ctx.ctx.cast(), (&raw mut asked).cast(), size, FIB_OUTPUT) };
    }
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
fn backend(plan: u32, index: BackendIndex) -> Option<&'static Backend> {
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
fn link_in_words(hop: &'static Hop) -> LinkHeader {
    let macs = (&raw const hop.destination_mac).cast::<[u8; 12]>();
    // SAFETY: the source's address follows the destination's.
    let [a, b, c, d, e, f, g, h, i, j, k, l] = unsafe { load(macs) };
    LinkHeader { destination: [a, b, c, d, e, f], source: [g, h, i, j, k, l] }
}

/// Sends the frame on the hop's interface.
#[inline(always)]
fn leave(ctx: &XdpContext, hop: &Hop) -> u32 {
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
            }
            _ => {}
        }
        (*place).has_ports = ports.is_some() as u8;
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
