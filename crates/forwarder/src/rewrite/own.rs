//! Packets that the forwarder sends of itself: hand-off echoes and the daemon's probes.

use std::net::IpAddr;

use phalanx_flow::encap::{self, EncapError, HandOffFlags, HandOffHeader, LinkHeader, Outer};
use phalanx_flow::key::octets;
use phalanx_flow::packet::{Fragment, Frame, FrameBuf, HEADROOM, Link, Packet, PacketKind, Reader, parse};
use phalanx_flow::{BackendId, FlowKey, MemberSlot, Method, flow_hash};

use super::{Offload, Sink, link_header, with_headroom};
use crate::engine::Batch;
use crate::plan::PlanMember;
use crate::{Drop, SendError};

/// Bytes of a token behind the hand-off header of an echo.
const TOKEN: usize = 8;

/// An Ethernet frame of ours, ready to be sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwnFrame {
    /// The interface to send it on.
    pub interface: u32,
    /// The whole frame.
    pub bytes: Vec<u8>,
}

/// The outer headers of a hand-off to `member`.
#[inline]
pub(super) fn hand_off_outer(batch: &Batch<'_>, member: &PlanMember, hash: u64) -> Outer {
    let (destination, family) = octets(member.address);
    let (source, _) = batch.plan().local_address();
    // Of no meaning in a hand-off, which is a method of its own.
    let method = Method::Gue;
    Outer::new(method, family, source, destination, batch.plan().plan.handoff.port, hash)
}

/// The echo to `to` that carries `token`.
pub fn echo_frame(batch: &Batch<'_>, to: MemberSlot, token: u64) -> Result<OwnFrame, SendError> {
    let member = batch.plan().member(to).ok_or(SendError::Unknown)?;
    let next_hop =
        batch.next_hops().members.get(usize::from(to.0)).copied().flatten().ok_or(SendError::NoNextHop)?;
    let outer = hand_off_outer(batch, member, token << 32);
    let mut bytes = vec![0; HEADROOM];
    bytes.extend_from_slice(&token.to_be_bytes());
    let mut sent = Err(SendError::TooBig);
    with_headroom(&mut bytes, |frame| {
        let written = write_echo(
            batch,
            frame,
            HandOffFlags::ECHO_REQUEST,
            &outer,
            next_hop.mtu,
            &link_header(&next_hop),
        );
        if written.is_ok() {
            sent = Ok(OwnFrame { interface: next_hop.interface, bytes: frame.bytes().to_vec() });
        }
    });
    sent
}

/// Puts an echo's headers around the token that `frame` is.
fn write_echo(
    batch: &Batch<'_>,
    frame: &mut FrameBuf<'_>,
    flag: u8,
    outer: &Outer,
    mtu: u16,
    link: &LinkHeader,
) -> Result<(), EncapError> {
    let plan = &batch.plan().plan;
    let mut header = HandOffHeader::new(1, plan.view_digest, plan.handoff.cookie);
    header.flags = HandOffFlags(flag);
    encap::hand_off(frame, &TOKEN_PACKET, &header, outer, mtu, link)
}

/// The token in the place of a packet; family 0 says in the header that there is none.
const TOKEN_PACKET: Packet = Packet {
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
    l3_length: TOKEN as u16,
    l4_offset: 0,
    l4_length: 0,
    payload_length: 0,
    ttl: 64,
    tos: 0,
    dont_fragment: true,
};

/// What the outer packet of a reassembled hand-off would have parsed to, as far as opening it goes.
pub(super) fn datagram(frame: &FrameBuf<'_>, from: IpAddr) -> Packet {
    let (source, family) = octets(from);
    // A datagram of UDP is never longer.
    let length = u16::try_from(frame.len()).unwrap_or(u16::MAX);
    Packet {
        key: FlowKey { source, family, ..TOKEN_PACKET.key },
        l3_length: length,
        l4_length: length,
        payload_length: length,
        ..TOKEN_PACKET
    }
}

/// An echo came in: its answer goes back the way it came, an answer to ours goes to the daemon.
#[cold]
pub(super) fn echo_in<S: Sink>(
    batch: &Batch<'_>,
    frame: &mut FrameBuf<'_>,
    packet: &Packet,
    header: &HandOffHeader,
    inner: usize,
    ingress: u32,
    sink: &mut S,
) {
    let bad = || {
        batch.count(phalanx_flow::decide::Outcome::Dropped);
        batch.engine().counters.count_drop(Drop::BadHandoff);
    };
    let Some(token) = frame.read::<TOKEN>(inner) else { return bad() };
    batch.count(phalanx_flow::decide::Outcome::Echo);
    if header.flags.has(HandOffFlags::ECHO_REPLY) {
        return batch.engine().push_echo(u64::from_be_bytes(token));
    }
    let plan = batch.plan();
    let (source, family) = plan.local_address();
    let port = plan.plan.handoff.port;
    // The hash gives the source port; an answer need not spread over queues, so that any will do.
    let outer =
        Outer::new(Method::Gue, family, source, packet.key.source, port, u64::from_be_bytes(token) << 32);
    let member = plan.plan.members.iter().position(|member| octets(member.address).0 == packet.key.source);
    let next_hop = member.and_then(|slot| batch.next_hops().members.get(slot).copied().flatten());
    let (interface, link, mtu) = match (next_hop, frame.read::<12>(0)) {
        (Some(next_hop), _) => (next_hop.interface, link_header(&next_hop), next_hop.mtu),
        // A member that we do not know yet: back to whom we have it from.
        (None, Some([d0, d1, d2, d3, d4, d5, s0, s1, s2, s3, s4, s5])) if packet.l3_offset > 0 => (
            ingress,
            LinkHeader { source: [d0, d1, d2, d3, d4, d5], destination: [s0, s1, s2, s3, s4, s5] },
            u16::MAX,
        ),
        (None, _) => return batch.engine().counters.count_drop(Drop::NoNextHop),
    };
    let cut = frame.truncate(inner + TOKEN) && frame.move_head(inner.cast_signed());
    if cut && write_echo(batch, frame, HandOffFlags::ECHO_REPLY, &outer, mtu, &link).is_ok() {
        sink.frame(interface, frame, Offload::NONE);
    }
}

/// The frame that takes an IP packet of the daemon's own to a backend, the way flows go.
pub fn probe_frame(batch: &Batch<'_>, backend: &BackendId, ip_packet: &[u8]) -> Result<OwnFrame, SendError> {
    let index = batch.plan().backend_index(backend).ok_or(SendError::Unknown)?;
    let backend = batch.plan().backend(index).ok_or(SendError::Unknown)?;
    let next_hop =
        batch.next_hops().backends.get(index.0 as usize).copied().flatten().ok_or(SendError::NoNextHop)?;
    let method = Method::from_u8(backend.id.method).ok_or(SendError::Unknown)?;
    let packet = parse(ip_packet, Link::Ip).map_err(|_| SendError::Unknown)?;
    let (source, family) = octets(backend.source);
    let hash = flow_hash(batch.plan().plan.seed, &packet.key);
    let port = u16::from_be_bytes(backend.id.port);
    let outer = Outer::new(method, family, source, backend.id.address, port, hash);
    let mut bytes = vec![0; HEADROOM];
    bytes.extend_from_slice(ip_packet);
    let mut sent = Err(SendError::TooBig);
    with_headroom(&mut bytes, |frame| {
        if encap::encapsulate(frame, &packet, &outer, next_hop.mtu, &link_header(&next_hop)).is_ok() {
            sent = Ok(OwnFrame { interface: next_hop.interface, bytes: frame.bytes().to_vec() });
        }
    });
    sent
}
