//! From a received frame to the frames to send: what every forwarder on the host does between its sockets.
//!
//! ```text
//!  frame ─► parse ─► a hand-off? open it ─► Batch::rule ─► Batch::target ─┬─► backend: TTL, encapsulate
//!                      │                                                  ├─► member: hand-off header
//!                      └─► echo: answer, or tell the daemon               ├─► ping: answer in place
//!                                                                         └─► later fragment: keep a while
//!  too big for the path ─► fragment it where that is allowed, else tell the client
//!  merged or unfinished ─► l2 passes it on as it is, everything else cuts it and finishes its checksums first
//! ```
//!
//! Bytes are rewritten where they lie; the caller's [`Sink`] sends them.

mod own;

use std::sync::atomic::Ordering;

use phalanx_flow::decide::Outcome;
use phalanx_flow::encap::{
    self, EncapError, HandOffError, HandOffHeader, IcmpError, LinkHeader, OpenError, Outer, icmp_error,
    parse_hand_off,
};
use phalanx_flow::packet::{
    Fragment, Frame, FrameBuf, HEADROOM, Link, Packet, PacketKind, ParseError, Reader, parse,
};
use phalanx_flow::{Arrival, Decision, Method, offload};

use crate::Drop;
use crate::engine::{Batch, HeldFrame, Target, lock};
use crate::plan::NextHop;
pub use own::{OwnFrame, echo_frame, probe_frame};

/// Ethernet header in front of every frame that leaves.
const ETHERNET: usize = 14;

/// What the sender of a frame left to the network card, in the terms of `struct virtio_net_hdr` (virtio 1.2 §5.1.6).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offload {
    /// The checksum is a pseudo-header's sum: where what it covers starts, from the frame's start, and where in that its field is.
    pub checksum: Option<(u16, u16)>,
    /// The frame is several segments in one.
    pub merged: Option<Merged>,
}

/// Several segments in one frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Merged {
    /// `VIRTIO_NET_HDR_GSO_*`, with its ECN bit.
    pub kind: u8,
    /// Payload of a segment in bytes; above 0.
    pub size: u16,
    /// Length of all headers, Ethernet's included; a hint.
    pub header_length: u16,
}

impl Offload {
    /// A plain frame.
    pub const NONE: Self = Self { checksum: None, merged: None };

    /// The same after the frame's head moved by `delta` bytes (positive: bytes were cut).
    fn moved(self, delta: isize) -> Self {
        let shift = |offset: u16| {
            u16::try_from(isize::try_from(offset).unwrap_or(0).saturating_sub(delta)).unwrap_or(0)
        };
        Self {
            checksum: self.checksum.map(|(start, offset)| (shift(start), offset)),
            merged: self.merged.map(|merged| Merged { header_length: shift(merged.header_length), ..merged }),
        }
    }
}

/// Where frames go.
pub trait Sink {
    /// Sends an Ethernet frame that stays where it is until the caller's batch of frames is sent.
    fn frame(&mut self, interface: u32, frame: &mut FrameBuf<'_>, offload: Offload);

    /// Sends an Ethernet frame whose bytes are gone after the call.
    fn copy(&mut self, interface: u32, frame: &[u8]);

    /// Sends an IP packet of ours to a client, the way the kernel routes.
    fn to_client(&mut self, ip_packet: &[u8]);

    /// The frame was not ours.
    fn pass(&mut self);
}

/// Memory that is used for one frame after the other.
#[derive(Debug, Default)]
pub struct Scratch {
    segments: Vec<u8>,
    fragments: Vec<u8>,
}

/// Works off one frame that came in on the interface `ingress`.
///
/// `frame` has [`HEADROOM`] bytes in front.
#[inline]
pub fn process<S: Sink>(
    batch: &Batch<'_>,
    scratch: &mut Scratch,
    frame: &mut FrameBuf<'_>,
    link: Link,
    ingress: u32,
    offload: Offload,
    sink: &mut S,
) {
    // Looked at where it is: what was just written byte by byte is slow to be moved on in larger pieces.
    let parsed = parse(frame, link);
    let packet = match &parsed {
        Ok(packet) => packet,
        Err(error) => return malformed(batch, error, sink),
    };
    let mut work = Work { batch, scratch, ingress, sink };
    if work.is_hand_off(packet) {
        work.hand_off_in(frame, packet, offload);
    } else {
        work.rule(frame, packet, link, &Arrival::WIRE, offload);
    }
}

/// Works off a hand-off that the kernel reassembled from fragments: `frame` is what follows the UDP header, sent by `from`.
pub fn process_datagram<S: Sink>(
    batch: &Batch<'_>,
    scratch: &mut Scratch,
    frame: &mut FrameBuf<'_>,
    from: std::net::IpAddr,
    sink: &mut S,
) {
    let outer = own::datagram(frame, from);
    Work { batch, scratch, ingress: 0, sink }.hand_off_in(frame, &outer, Offload::NONE);
}

/// Carries out a decision that was made elsewhere, and recorded and counted there: what the kernel's program leaves to user space.
/// Answers on Ethernet go out where the frame came in, by the interface `ingress`.
pub fn carry_out<S: Sink>(
    batch: &Batch<'_>,
    scratch: &mut Scratch,
    frame: &mut FrameBuf<'_>,
    link: Link,
    ingress: u32,
    decision: &Decision,
    sink: &mut S,
) {
    let Ok(packet) = parse(frame, link) else {
        return batch.engine().counters.count_drop(Drop::Malformed);
    };
    Work { batch, scratch, ingress, sink }.carry_out(
        frame,
        &packet,
        link,
        &Arrival::WIRE,
        decision,
        Offload::NONE,
    );
}

/// A packet that cannot be read goes no further if it is for a service; otherwise it is none of our business.
fn malformed<S: Sink>(batch: &Batch<'_>, error: &ParseError, sink: &mut S) {
    if error.family != 0 && batch.plan().is_service_address(&error.destination) {
        batch.count(Outcome::Dropped);
        batch.engine().counters.count_drop(Drop::Malformed);
    } else {
        batch.count(Outcome::Passed);
        sink.pass();
    }
}

/// One frame being worked off.
struct Work<'w, 'b, S> {
    batch: &'w Batch<'b>,
    scratch: &'w mut Scratch,
    ingress: u32,
    sink: &'w mut S,
}

/// Where a packet leaves by, in what.
enum Wrapping<'a> {
    Backend { outer: Outer, fragment: bool },
    Member { outer: Outer, header: &'a HandOffHeader, fragment: bool },
}

impl Wrapping<'_> {
    #[inline]
    fn apply(
        &self,
        frame: &mut FrameBuf<'_>,
        packet: &Packet,
        mtu: u16,
        link: &LinkHeader,
    ) -> Result<(), EncapError> {
        match self {
            Self::Backend { outer, .. } => encap::encapsulate(frame, packet, outer, mtu, link),
            Self::Member { outer, header, .. } => encap::hand_off(frame, packet, header, outer, mtu, link),
        }
    }

    fn outer_mut(&mut self) -> &mut Outer {
        match self {
            Self::Backend { outer, .. } | Self::Member { outer, .. } => outer,
        }
    }

    /// Rewriting the MAC leaves the packet whole, so that the kernel can cut it and finish its checksum.
    fn keeps_packet(&self) -> bool {
        matches!(self, Self::Backend { outer: Outer { method: Method::L2, .. }, .. })
    }
}

impl<S: Sink> Work<'_, '_, S> {
    fn drop(&self, reason: Drop) {
        self.batch.engine().counters.count_drop(reason);
    }

    /// Whether the packet is for our end of the hand-off tunnel.
    #[inline]
    fn is_hand_off(&self, packet: &Packet) -> bool {
        let plan = self.batch.plan();
        let (address, family) = plan.local_address();
        packet.kind == PacketKind::Datagram
            && packet.fragment == Fragment::Whole
            && packet.key.destination_port == plan.plan.handoff.port.to_be_bytes()
            && packet.key.destination == address
            && packet.key.family == family
    }

    fn hand_off_in(&mut self, frame: &mut FrameBuf<'_>, outer: &Packet, offload: Offload) {
        if let Some(merged) = offload.merged {
            // Datagrams merged by UDP GRO: each is a hand-off of its own.
            let ip = ip_packet(frame, outer);
            let mut segments = std::mem::take(&mut self.scratch.segments);
            let (batch, scratch, ingress) = (self.batch, &mut *self.scratch, self.ingress);
            let mut copies = CopySink(&mut *self.sink);
            let cut = offload::segment(ip, merged.size, HEADROOM, &mut segments, |bytes| {
                with_headroom(bytes, |segment| {
                    process(batch, scratch, segment, Link::Ip, ingress, Offload::NONE, &mut copies);
                });
            });
            self.scratch.segments = segments;
            match cut {
                Ok(_) => {
                    self.batch.engine().counters.segmented.fetch_add(1, Ordering::Relaxed);
                }
                Err(_) => self.bad_hand_off(Drop::BadHandoff),
            }
            return;
        }
        let handoff = &self.batch.plan().plan.handoff;
        let cookies = [handoff.cookie, handoff.old_cookie.unwrap_or(handoff.cookie)];
        let (header, inner) = match parse_hand_off(frame, usize::from(outer.payload_offset()), cookies) {
            Ok(found) => found,
            Err(HandOffError::Cookie) => return self.bad_hand_off(Drop::BadCookie),
            Err(_) => return self.bad_hand_off(Drop::BadHandoff),
        };
        if header.flags.is_echo() {
            return own::echo_in(self.batch, frame, outer, &header, inner, self.ingress, self.sink);
        }
        let packet = match encap::open(frame, outer, inner) {
            Ok(packet) => packet,
            Err(OpenError::Parse(_)) => return self.bad_hand_off(Drop::Malformed),
            Err(OpenError::NoRoom | OpenError::Congestion) => return self.bad_hand_off(Drop::BadHandoff),
        };
        self.batch.engine().counters.handoffs_in.fetch_add(1, Ordering::Relaxed);
        let arrival = Arrival {
            hops: header.hops,
            bypassed: header.bypassed(),
            known: header.known(),
            vintage: header.vintage(),
            ports: header.ports().map(|(source, destination)| [source, destination]),
        };
        self.rule(frame, &packet, Link::Ip, &arrival, Offload::NONE);
    }

    fn bad_hand_off(&self, reason: Drop) {
        self.batch.count(Outcome::Dropped);
        self.drop(reason);
    }

    #[inline]
    fn rule(
        &mut self,
        frame: &mut FrameBuf<'_>,
        packet: &Packet,
        link: Link,
        arrival: &Arrival,
        offload: Offload,
    ) {
        let mut decision = Decision::PASS;
        self.batch.rule_into(&mut decision, packet, arrival);
        self.carry_out(frame, packet, link, arrival, &decision, offload);
        if decision.learn_fragment {
            self.release(packet);
        }
    }

    #[inline]
    fn carry_out(
        &mut self,
        frame: &mut FrameBuf<'_>,
        packet: &Packet,
        link: Link,
        arrival: &Arrival,
        decision: &Decision,
        offload: Offload,
    ) {
        match self.batch.target(decision) {
            Target::Drop => {}
            Target::Backend { backend, next_hop, fragment } => {
                let Some(method) = Method::from_u8(backend.id.method) else {
                    return self.drop(Drop::NoNextHop);
                };
                let (source, family) = phalanx_flow::key::octets(backend.source);
                let port = u16::from_be_bytes(backend.id.port);
                let outer = Outer::new(method, family, source, backend.id.address, port, decision.hash);
                let wrapping = Wrapping::Backend { outer, fragment };
                self.send(frame, packet, wrapping, &next_hop, offload);
            }
            Target::Member { member, next_hop, hand_off, bypassed } => {
                let plan = &self.batch.plan().plan;
                let mut header = HandOffHeader::new(hand_off.hops, plan.view_digest, plan.handoff.cookie);
                if let Some(bypassed) = bypassed {
                    header =
                        header.bypassing(bypassed).with_known(hand_off.known).with_vintage(hand_off.vintage);
                }
                if let Some([source, destination]) = hand_off.ports {
                    header = header.with_ports(source, destination);
                }
                let outer = own::hand_off_outer(self.batch, &member, decision.hash);
                let wrapping = Wrapping::Member { outer, header: &header, fragment: plan.handoff.fragment };
                self.send(frame, packet, wrapping, &next_hop, offload);
            }
            Target::EchoReply => {
                self.answer(frame, packet, link, offload, |frame| encap::echo_reply(frame, packet, None));
            }
            // Nothing of the segment but its headers counts, finished or not.
            Target::Reset => {
                self.answer(frame, packet, link, Offload::NONE, |frame| {
                    encap::tcp_reset(frame, packet, None)
                });
            }
            Target::Hold => self.hold(frame, packet, link, arrival),
            Target::Pass if arrival.hops == 0 => self.sink.pass(),
            // A member whose configuration has a service that ours has not.
            Target::Pass => self.drop(Drop::NoService),
        }
    }

    /// Sends a packet in its wrapping.
    #[inline]
    fn send(
        &mut self,
        frame: &mut FrameBuf<'_>,
        packet: &Packet,
        wrapping: Wrapping<'_>,
        next_hop: &NextHop,
        mut offload: Offload,
    ) {
        if offload.merged.is_some() || offload.checksum.is_some() {
            if let Some(merged) = offload.merged {
                if !wrapping.keeps_packet() {
                    return self.send_segments(frame, packet, wrapping, next_hop, merged);
                }
                return self.send_merged(frame, packet, &wrapping, next_hop, offload, merged);
            }
            if !wrapping.keeps_packet() && !finish(frame, packet, &mut offload) {
                return self.drop(Drop::Malformed);
            }
        }
        let link = link_header(next_hop);
        let start = frame.start();
        match wrapping.apply(frame, packet, next_hop.mtu, &link) {
            Ok(()) => {
                let offload = if offload == Offload::NONE {
                    offload
                } else {
                    offload.moved(frame.start().cast_signed() - start.cast_signed())
                };
                self.sink.frame(next_hop.interface, frame, offload);
            }
            Err(EncapError::TooBig { mtu }) => {
                self.send_in_parts(frame, packet, wrapping, next_hop, mtu, offload);
            }
            Err(EncapError::TtlExpired) => {
                self.drop(Drop::TtlExpired);
                self.tell(frame, packet, IcmpError::TimeExceeded);
            }
            Err(EncapError::NoRoom) => self.drop(Drop::Malformed),
        }
    }

    /// A merged frame that only changes MACs: the kernel cuts it.
    #[cold]
    fn send_merged(
        &mut self,
        frame: &mut FrameBuf<'_>,
        packet: &Packet,
        wrapping: &Wrapping<'_>,
        next_hop: &NextHop,
        offload: Offload,
        merged: Merged,
    ) {
        let headers = packet.payload_offset().saturating_sub(packet.l3_offset);
        if headers.saturating_add(merged.size) > next_hop.mtu {
            self.drop(Drop::TooBig);
            return self.tell(frame, packet, IcmpError::TooBig { mtu: next_hop.mtu });
        }
        let start = frame.start();
        match wrapping.apply(frame, packet, u16::MAX, &link_header(next_hop)) {
            Ok(()) => {
                let offload = offload.moved(frame.start().cast_signed() - start.cast_signed());
                self.sink.frame(next_hop.interface, frame, offload);
            }
            Err(EncapError::TtlExpired) => {
                self.drop(Drop::TtlExpired);
                self.tell(frame, packet, IcmpError::TimeExceeded);
            }
            Err(EncapError::TooBig { .. } | EncapError::NoRoom) => self.drop(Drop::Malformed),
        }
    }

    /// A merged frame that goes into a tunnel: cut here, each segment wrapped by itself.
    #[cold]
    fn send_segments(
        &mut self,
        frame: &mut FrameBuf<'_>,
        packet: &Packet,
        mut wrapping: Wrapping<'_>,
        next_hop: &NextHop,
        merged: Merged,
    ) {
        let link = link_header(next_hop);
        let mut segments = std::mem::take(&mut self.scratch.segments);
        let mut failed = None;
        let cut = offload::segment(ip_packet(frame, packet), merged.size, HEADROOM, &mut segments, |bytes| {
            with_headroom(bytes, |segment| {
                let length = segment.len() as u16;
                let of_segment = Packet { l3_offset: 0, l3_length: length, ..*packet };
                match wrapping.apply(segment, &of_segment, next_hop.mtu, &link) {
                    Ok(()) => self.sink.copy(next_hop.interface, segment.bytes()),
                    Err(EncapError::TooBig { mtu }) => {
                        if !self.send_fragments(segment, &of_segment, &mut wrapping, next_hop, mtu) {
                            failed = Some(EncapError::TooBig { mtu });
                        }
                    }
                    Err(error) => failed = Some(error),
                }
            });
        });
        self.scratch.segments = segments;
        if cut.is_err() {
            return self.drop(Drop::Malformed);
        }
        self.batch.engine().counters.segmented.fetch_add(1, Ordering::Relaxed);
        match failed {
            None => {}
            Some(EncapError::TooBig { mtu }) => {
                self.drop(Drop::TooBig);
                self.tell(frame, packet, IcmpError::TooBig { mtu });
            }
            Some(EncapError::TtlExpired) => {
                self.drop(Drop::TtlExpired);
                self.tell(frame, packet, IcmpError::TimeExceeded);
            }
            Some(EncapError::NoRoom) => self.drop(Drop::Malformed),
        }
    }

    /// A packet that its wrapping makes too big for the path.
    #[cold]
    fn send_in_parts(
        &mut self,
        frame: &mut FrameBuf<'_>,
        packet: &Packet,
        mut wrapping: Wrapping<'_>,
        next_hop: &NextHop,
        mtu: u16,
        mut offload: Offload,
    ) {
        let bare = without_link(packet);
        let ready = finish(frame, packet, &mut offload)
            && frame.truncate(usize::from(packet.l3_offset) + usize::from(packet.l3_length))
            && frame.move_head(isize::try_from(packet.l3_offset).unwrap_or(0));
        if !ready {
            return self.drop(Drop::Malformed);
        }
        if !self.send_fragments(frame, &bare, &mut wrapping, next_hop, mtu) {
            self.drop(Drop::TooBig);
            self.tell(frame, &bare, IcmpError::TooBig { mtu });
        }
    }

    /// Sends an IP packet in fragments: the packet's own where it allows that and goes to a backend, else the outer packet's where the
    /// configuration says so (or the packet's sender, who may not be told). False, and nothing sent, if neither.
    fn send_fragments(
        &mut self,
        frame: &mut FrameBuf<'_>,
        packet: &Packet,
        wrapping: &mut Wrapping<'_>,
        next_hop: &NextHop,
        mtu: u16,
    ) -> bool {
        let link = link_header(next_hop);
        let may_cut = !packet.dont_fragment && packet.key.family == 4;
        let mut fragments = std::mem::take(&mut self.scratch.fragments);
        let sink = &mut *self.sink;
        let cut = match wrapping {
            Wrapping::Backend { .. } if may_cut => {
                // As any router would: the backend puts the client's packet together again.
                offload::fragment(frame.bytes(), mtu, 0, HEADROOM, &mut fragments, |bytes| {
                    with_headroom(bytes, |part| {
                        let of_part = Packet { l3_length: part.len() as u16, ..*packet };
                        if wrapping.apply(part, &of_part, next_hop.mtu, &link).is_ok() {
                            sink.copy(next_hop.interface, part.bytes());
                        }
                    });
                })
                .ok()
            }
            Wrapping::Backend { outer: Outer { method: Method::L2, .. }, .. } => None,
            Wrapping::Backend { fragment: true, .. } => Some(0),
            Wrapping::Member { fragment, .. } => (*fragment || may_cut).then_some(0),
            Wrapping::Backend { .. } => None,
        };
        let sent = match cut {
            None => false,
            Some(0) => {
                let identification = self.batch.engine().next_identification();
                let outer = wrapping.outer_mut();
                outer.dont_fragment = false;
                outer.identification = identification as u16;
                let wrapped = wrapping.apply(frame, packet, u16::MAX, &link);
                if wrapped.is_ok()
                    && let Some((ethernet, ip)) = frame.bytes().split_first_chunk::<ETHERNET>()
                {
                    let cut = offload::fragment(
                        ip,
                        next_hop.mtu,
                        identification,
                        ETHERNET,
                        &mut fragments,
                        |bytes| {
                            if let Some(start) = bytes.first_chunk_mut::<ETHERNET>() {
                                *start = *ethernet;
                            }
                            sink.copy(next_hop.interface, bytes);
                        },
                    );
                    if cut.is_err() {
                        self.drop(Drop::TooBig);
                    }
                }
                wrapped.is_ok()
            }
            Some(_) => true,
        };
        self.scratch.fragments = fragments;
        if sent {
            self.batch.engine().counters.fragmented.fetch_add(1, Ordering::Relaxed);
        }
        sent
    }

    /// Tells the client, if it may be told and not too often, by a packet from the service's address. The frame is spent.
    #[cold]
    fn tell(&mut self, frame: &mut FrameBuf<'_>, packet: &Packet, error: IcmpError) {
        if !self.batch.engine().may_send_error() {
            return;
        }
        let source = packet.key.destination;
        let bare = without_link(packet);
        if frame.move_head(isize::try_from(packet.l3_offset).unwrap_or(0))
            && icmp_error(frame, &bare, error, source, None).is_ok()
        {
            self.sink.to_client(frame.bytes());
        }
    }

    /// Sends an answer that is made in place back where the packet came from.
    #[cold]
    fn answer(
        &mut self,
        frame: &mut FrameBuf<'_>,
        packet: &Packet,
        link: Link,
        mut offload: Offload,
        make: impl FnOnce(&mut FrameBuf<'_>) -> Result<(), encap::ReplyError>,
    ) {
        if !finish(frame, packet, &mut offload) || make(frame).is_err() {
            return self.drop(Drop::Malformed);
        }
        match link {
            Link::Ethernet => self.sink.frame(self.ingress, frame, Offload::NONE),
            Link::Ip => self.sink.to_client(frame.bytes()),
        }
    }

    #[cold]
    fn hold(&mut self, frame: &FrameBuf<'_>, packet: &Packet, link: Link, arrival: &Arrival) {
        let Some(fragment) = packet.fragment_key() else { return self.drop(Drop::Fragment) };
        let engine = self.batch.engine();
        let held = HeldFrame {
            fragment,
            until_ms: 0,
            bytes: frame.bytes().to_vec(),
            link,
            ingress: self.ingress,
            arrival: *arrival,
        };
        let given_up = lock(&engine.held).push(held, self.batch.now_ms());
        engine.counters.add_drops(Drop::Fragment, given_up);
    }

    /// The first fragment has come: those that waited for it go on.
    #[cold]
    fn release(&mut self, packet: &Packet) {
        let Some(fragment) = packet.fragment_key() else { return };
        let released = lock(&self.batch.engine().held).release(&fragment);
        for held in released {
            let mut bytes = vec![0; HEADROOM];
            bytes.extend_from_slice(&held.bytes);
            let mut copies = CopySink(&mut *self.sink);
            with_headroom(&mut bytes, |frame| {
                if let Ok(packet) = parse(frame, held.link) {
                    Work {
                        batch: self.batch,
                        scratch: &mut *self.scratch,
                        ingress: held.ingress,
                        sink: &mut copies,
                    }
                    .rule(frame, &packet, held.link, &held.arrival, Offload::NONE);
                }
            });
        }
    }
}

/// Sends frames that do not outlive the call.
struct CopySink<'a>(&'a mut dyn Sink);

impl Sink for CopySink<'_> {
    fn frame(&mut self, interface: u32, frame: &mut FrameBuf<'_>, _plain: Offload) {
        self.0.copy(interface, frame.bytes());
    }

    fn copy(&mut self, interface: u32, frame: &[u8]) {
        self.0.copy(interface, frame);
    }

    fn to_client(&mut self, ip_packet: &[u8]) {
        self.0.to_client(ip_packet);
    }

    fn pass(&mut self) {
        self.0.pass();
    }
}

#[inline]
fn link_header(next_hop: &NextHop) -> LinkHeader {
    LinkHeader { source: next_hop.source_mac, destination: next_hop.destination_mac }
}

/// The packet as it is described once its link header is cut off.
fn without_link(packet: &Packet) -> Packet {
    Packet { l3_offset: 0, l4_offset: packet.l4_offset.saturating_sub(packet.l3_offset), ..*packet }
}

/// The IP packet in a frame, without padding.
fn ip_packet<'f>(frame: &'f FrameBuf<'_>, packet: &Packet) -> &'f [u8] {
    let start = usize::from(packet.l3_offset);
    frame.bytes().get(start..start + usize::from(packet.l3_length)).unwrap_or_default()
}

/// Shows `bytes` as a frame behind [`HEADROOM`] bytes of headroom.
fn with_headroom(bytes: &mut [u8], show: impl FnOnce(&mut FrameBuf<'_>)) {
    let length = bytes.len().saturating_sub(HEADROOM);
    if let Some(mut frame) = FrameBuf::new(bytes, HEADROOM, length) {
        show(&mut frame);
    }
}

/// Finishes a checksum that is a pseudo-header's sum so far. False if it lies outside the packet.
fn finish(frame: &mut FrameBuf<'_>, packet: &Packet, offload: &mut Offload) -> bool {
    let Some((start, offset)) = offload.checksum.take() else { return true };
    let end = usize::from(packet.l3_offset) + usize::from(packet.l3_length);
    frame
        .bytes_mut()
        .get_mut(..end)
        .is_some_and(|bytes| offload::finish_checksum(bytes, usize::from(start), usize::from(offset)).is_ok())
}
