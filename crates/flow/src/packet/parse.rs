//! From bytes to a [`Packet`].
//!
//! The IPv4 header checksum is not verified (a deviation from RFC 1812 §5.2.2): every change of ours updates it incrementally, so a
//! damaged header stays visibly damaged and whoever takes the packet out of the tunnel drops it.

use super::{Fragment, Link, Packet, PacketKind, Reader, tcp_flags};
use crate::key::{FlowKey, ICMP, ICMPV6, TCP, UDP, mapped};

/// Ethertype of IPv4.
pub(crate) const ETHERTYPE_IPV4: u16 = 0x0800;
/// Ethertype of IPv6.
pub(crate) const ETHERTYPE_IPV6: u16 = 0x86dd;
/// Ethertypes of a VLAN tag: IEEE 802.1Q and 802.1ad.
const ETHERTYPE_VLAN: u16 = 0x8100;
const ETHERTYPE_SERVICE_VLAN: u16 = 0x88a8;

/// VLAN tags that are looked through: a customer's within a provider's.
const MAX_VLAN_TAGS: usize = 2;
/// IPv6 extension headers that are looked through: each of the four kinds once, destination options a second time (RFC 8200 §4.1),
/// and one to spare. It bounds the verifier's work.
const MAX_EXTENSIONS: usize = 6;

const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const DESTINATION_OPTIONS: u8 = 60;

macro_rules! reasons {
    ($($(#[$doc:meta])* $variant:ident = $name:literal,)*) => {
        /// Why a frame makes no [`Packet`]. Each has a counter of its own.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(u8)]
        pub enum Reason { $($(#[$doc])* $variant,)* }

        impl Reason {
            /// All of them, in the order of their numbers.
            pub const ALL: &[Self] = &[$(Self::$variant),*];

            /// The reason as it stands in metrics.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }
        }
    };
}

reasons! {
    /// Neither IPv4 nor IPv6 by its ethertype: not ours, the kernel's.
    NotIp = "not_ip",
    /// Shorter than its Ethernet header.
    EthernetTruncated = "ethernet_truncated",
    /// More than two VLAN tags: not supported.
    VlanDepth = "vlan_depth",
    /// The version in the IP header is not the one promised (or neither 4 nor 6).
    IpVersion = "ip_version",
    /// Shorter than an IPv4 header.
    Ipv4Truncated = "ipv4_truncated",
    /// IPv4 header length under 20 bytes, or over the total length.
    Ipv4HeaderLength = "ipv4_header_length",
    /// The IPv4 total length is more than the frame has.
    Ipv4TotalLength = "ipv4_total_length",
    /// Shorter than an IPv6 header.
    Ipv6Truncated = "ipv6_truncated",
    /// The IPv6 payload length is more than the frame has.
    Ipv6PayloadLength = "ipv6_payload_length",
    /// A jumbogram (RFC 2675): not supported.
    Ipv6Jumbogram = "ipv6_jumbogram",
    /// An extension header goes beyond the packet.
    Ipv6ExtensionTruncated = "ipv6_extension_truncated",
    /// Hop-by-hop options anywhere but first (RFC 8200 §4.1), or a fragment header in a fragment.
    Ipv6ExtensionOrder = "ipv6_extension_order",
    /// More extension headers than are looked through: not supported.
    Ipv6ExtensionCount = "ipv6_extension_count",
    /// A routing header with segments left (RFC 8200 §4.4, RFC 5095): we are not the packet's last stop.
    Ipv6SegmentsLeft = "ipv6_segments_left",
    /// A fragment whose length or place is impossible: not a multiple of eight bytes, empty, or beyond 65,535.
    FragmentRange = "fragment_range",
    /// A first fragment without the whole transport header, or a second one that overlaps it (RFC 1858, RFC 7112).
    FragmentTiny = "fragment_tiny",
    /// Shorter than a TCP header.
    TcpTruncated = "tcp_truncated",
    /// TCP data offset under 20 bytes, or beyond the packet.
    TcpDataOffset = "tcp_data_offset",
    /// SYN together with FIN or RST.
    TcpFlags = "tcp_flags",
    /// Shorter than a UDP header.
    UdpTruncated = "udp_truncated",
    /// UDP length under 8 bytes, or beyond the packet.
    UdpLength = "udp_length",
    /// Shorter than an ICMP header.
    IcmpTruncated = "icmp_truncated",
    /// An ICMP error that quotes less than an IP header and four bytes of ports.
    QuoteTruncated = "quote_truncated",
    /// An ICMP error whose quote is no packet of the error's IP version.
    QuoteOdd = "quote_odd",
    /// An ICMP error about a packet that its receiver did not send.
    QuoteMismatch = "quote_mismatch",
    /// An ICMP error about neither TCP nor UDP, or about a later fragment: it has no flow.
    QuoteUnsupported = "quote_unsupported",
}

/// A frame that makes no [`Packet`]: why, and whom it was for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ParseError {
    /// What is wrong with it.
    pub reason: Reason,
    /// 4 or 6 if `destination` is known, else 0.
    pub family: u8,
    /// The destination, IPv4 as mapped, so that a packet for somebody else is still passed on.
    pub destination: [u8; 16],
}

impl core::fmt::Display for ParseError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(self.reason.name())
    }
}

impl core::error::Error for ParseError {}

/// Reads `frame`, which starts with `link`.
#[inline(always)]
pub fn parse<R: Reader + ?Sized>(frame: &R, link: Link) -> Result<Packet, ParseError> {
    parse_as::<R, ANY>(frame, link)
}

/// [`parse`] for most packets of `FAMILY` (4 or 6) alone: whole TCP and UDP over Ethernet, without VLAN tags, IPv4 options and IPv6
/// extension headers. `None` for others, right or not: only [`parse`] says what they are.
///
/// It is the same code with the rest left out, so that a program in the kernel is short where most packets go.
#[inline(always)]
pub fn parse_plain<R: Reader + ?Sized, const FAMILY: u8>(frame: &R) -> Option<Packet> {
    parse_as::<R, FAMILY>(frame, Link::Ethernet).ok()
}

/// For [`parse_as`]: any packet.
const ANY: u8 = 0;

/// With [`ANY`] [`parse`], or with a family [`parse_plain`]: then an error may be any.
#[inline(always)]
fn parse_as<R: Reader + ?Sized, const PLAIN: u8>(frame: &R, link: Link) -> Result<Packet, ParseError> {
    let (ethertype, l3) = match link {
        Link::Ethernet => ethernet::<R, PLAIN>(frame).map_err(nameless)?,
        Link::Ip => match frame.read::<1>(0).map(|[first]| first >> 4) {
            Some(4) => (ETHERTYPE_IPV4, 0),
            Some(6) => (ETHERTYPE_IPV6, 0),
            Some(_) => return Err(nameless(Reason::IpVersion)),
            None => return Err(nameless(Reason::Ipv4Truncated)),
        },
    };
    match ethertype {
        ETHERTYPE_IPV4 if PLAIN != 6 => ipv4::<R, PLAIN>(frame, l3),
        ETHERTYPE_IPV6 if PLAIN != 4 => ipv6::<R, PLAIN>(frame, l3),
        _ => Err(nameless(Reason::NotIp)),
    }
}

/// An error of a packet whose destination is not known.
#[inline(always)]
const fn nameless(reason: Reason) -> ParseError {
    ParseError { reason, family: 0, destination: [0; 16] }
}

/// The innermost ethertype, and where what it names starts.
#[inline(always)]
fn ethernet<R: Reader + ?Sized, const PLAIN: u8>(frame: &R) -> Result<(u16, usize), Reason> {
    let Some(header) = frame.read::<14>(0) else { return Err(Reason::EthernetTruncated) };
    let mut ethertype = u16::from_be_bytes([header[12], header[13]]);
    let mut offset = 14usize;
    if PLAIN != ANY {
        return Ok((ethertype, offset));
    }
    for _ in 0..MAX_VLAN_TAGS {
        if !is_vlan(ethertype) {
            break;
        }
        let Some(tag) = frame.read::<4>(offset) else { return Err(Reason::EthernetTruncated) };
        ethertype = u16::from_be_bytes([tag[2], tag[3]]);
        offset = offset.wrapping_add(4);
    }
    if is_vlan(ethertype) { Err(Reason::VlanDepth) } else { Ok((ethertype, offset)) }
}

#[inline(always)]
const fn is_vlan(ethertype: u16) -> bool {
    ethertype == ETHERTYPE_VLAN || ethertype == ETHERTYPE_SERVICE_VLAN
}

#[inline(always)]
fn ipv4<R: Reader + ?Sized, const PLAIN: u8>(frame: &R, l3: usize) -> Result<Packet, ParseError> {
    let Some(h) = frame.read::<20>(l3) else { return Err(nameless(Reason::Ipv4Truncated)) };
    if h[0] >> 4 != 4 {
        return Err(nameless(Reason::IpVersion));
    }
    let source = mapped([h[12], h[13], h[14], h[15]]);
    let destination = mapped([h[16], h[17], h[18], h[19]]);
    let fail = |reason| ParseError { reason, family: 4, destination };

    if PLAIN != ANY && (h[0] != 0x45 || u16::from_be_bytes([h[6], h[7]]) & 0x3fff != 0) {
        return Err(nameless(Reason::Ipv4HeaderLength));
    }
    let header_length = if PLAIN != ANY { 20 } else { ipv4_header_length(h[0]) };
    let total = u16::from_be_bytes([h[2], h[3]]);
    if header_length < 20 || header_length > total {
        return Err(fail(Reason::Ipv4HeaderLength));
    }
    if usize::from(total) > frame.len().wrapping_sub(l3) {
        return Err(fail(Reason::Ipv4TotalLength));
    }
    let id = u32::from(u16::from_be_bytes([h[4], h[5]]));
    let fragment_field = u16::from_be_bytes([h[6], h[7]]);
    let place = (fragment_field & 0x1fff) << 3;
    let more = fragment_field & 0x2000 != 0;

    let mut packet = Packet {
        key: FlowKey {
            source,
            destination,
            source_port: [0; 2],
            destination_port: [0; 2],
            protocol: h[9],
            family: 4,
            reserved: [0; 2],
        },
        kind: PacketKind::Other,
        fragment: Fragment::Whole,
        tcp_sequence: 0,
        tcp_acknowledgment: 0,
        l3_offset: l3 as u16,
        l3_length: total,
        l4_offset: (l3 as u16).wrapping_add(header_length),
        l4_length: total.wrapping_sub(header_length),
        payload_length: total.wrapping_sub(header_length),
        ttl: h[8],
        tos: h[1],
        dont_fragment: fragment_field & 0x4000 != 0,
    };
    if PLAIN == ANY {
        packet.fragment = fragment(packet.l4_length, header_length, place, more, id).map_err(fail)?;
    }
    transport::<R, PLAIN>(frame, &mut packet, place).map_err(fail)?;
    Ok(packet)
}

/// The length in bytes that the first byte of an IPv4 header tells.
#[inline(always)]
const fn ipv4_header_length(first: u8) -> u16 {
    ((first & 0x0f) as u16) << 2
}

/// What a fragment of `length` bytes at `place` is; `before` is the length of the headers that every fragment repeats.
#[inline(always)]
const fn fragment(length: u16, before: u16, place: u16, more: bool, id: u32) -> Result<Fragment, Reason> {
    if place == 0 && !more {
        return Ok(Fragment::Whole);
    }
    let end = (place as u32).wrapping_add(length as u32).wrapping_add(before as u32);
    if length == 0 || more && length & 7 != 0 || end > 0xffff {
        return Err(Reason::FragmentRange);
    }
    Ok(if place == 0 { Fragment::First { id } } else { Fragment::Later { id } })
}

#[inline(always)]
fn ipv6<R: Reader + ?Sized, const PLAIN: u8>(frame: &R, l3: usize) -> Result<Packet, ParseError> {
    // Two reads, because two addresses and a header at once are too much for the eBPF stack in some callers.
    let Some(h) = frame.read::<8>(l3) else { return Err(nameless(Reason::Ipv6Truncated)) };
    if h[0] >> 4 != 6 {
        return Err(nameless(Reason::IpVersion));
    }
    let (Some(source), Some(destination)) =
        (frame.read::<16>(l3.wrapping_add(8)), frame.read::<16>(l3.wrapping_add(24)))
    else {
        return Err(nameless(Reason::Ipv6Truncated));
    };
    let fail = |reason| ParseError { reason, family: 6, destination };

    let payload = u16::from_be_bytes([h[4], h[5]]);
    let available = frame.len().wrapping_sub(l3).wrapping_sub(40);
    // A length that does not fit beside the header in 16 bits is more than any frame of ours has.
    if usize::from(payload) > available || payload > u16::MAX.wrapping_sub(40) {
        return Err(fail(Reason::Ipv6PayloadLength));
    }
    if payload == 0 && h[6] == HOP_BY_HOP {
        return Err(fail(Reason::Ipv6Jumbogram));
    }
    if PLAIN != ANY && is_extension(h[6]) {
        return Err(nameless(Reason::Ipv6ExtensionCount));
    }
    let total = payload.wrapping_add(40);
    let end = l3.wrapping_add(usize::from(total));
    let chain = extensions(frame, l3.wrapping_add(40), end, h[6]).map_err(fail)?;

    let l4_offset = chain.offset as u16;
    let l4_length = (end as u16).wrapping_sub(l4_offset);
    let mut packet = Packet {
        key: FlowKey {
            source,
            destination,
            source_port: [0; 2],
            destination_port: [0; 2],
            protocol: chain.next,
            family: 6,
            reserved: [0; 2],
        },
        kind: PacketKind::Other,
        fragment: Fragment::Whole,
        tcp_sequence: 0,
        tcp_acknowledgment: 0,
        l3_offset: l3 as u16,
        l3_length: total,
        l4_offset,
        l4_length,
        payload_length: l4_length,
        ttl: h[7],
        tos: h[0] << 4 | h[1] >> 4,
        dont_fragment: true,
    };
    // RFC 8200 §4.5 checks the payload length of the whole, which leaves the IPv6 header out.
    let before = chain.before_fragment;
    let length = if chain.fragmented { chain.fragment_length } else { l4_length };
    packet.fragment = fragment(length, before, chain.place, chain.more, chain.id).map_err(fail)?;
    transport::<R, PLAIN>(frame, &mut packet, chain.place).map_err(fail)?;
    Ok(packet)
}

/// What a chain of extension headers leads to.
struct Chain {
    /// The first header that is not looked through.
    next: u8,
    /// Where it starts.
    offset: usize,
    /// There was a fragment header.
    fragmented: bool,
    /// The fragment's place in the whole, in bytes.
    place: u16,
    /// More fragments follow.
    more: bool,
    /// The fragment's identification.
    id: u32,
    /// Bytes after the fragment header.
    fragment_length: u16,
    /// Bytes of extension headers before the fragment header.
    before_fragment: u16,
}

/// Follows the headers from `offset` to `end`, the packet's; the first one is `next`.
#[inline(always)]
fn extensions<R: Reader + ?Sized>(frame: &R, start: usize, end: usize, next: u8) -> Result<Chain, Reason> {
    let mut chain = Chain {
        next,
        offset: start,
        fragmented: false,
        place: 0,
        more: false,
        id: 0,
        fragment_length: 0,
        before_fragment: 0,
    };
    for position in 0..MAX_EXTENSIONS {
        if !is_extension(chain.next) || chain.place != 0 {
            return Ok(chain);
        }
        if chain.next == HOP_BY_HOP && position != 0 || chain.next == FRAGMENT && chain.fragmented {
            return Err(Reason::Ipv6ExtensionOrder);
        }
        // All four kinds are at least eight bytes long.
        if chain.offset.wrapping_add(8) > end {
            return Err(if chain.fragmented { Reason::FragmentTiny } else { Reason::Ipv6ExtensionTruncated });
        }
        let Some(h) = frame.read::<8>(chain.offset) else { return Err(Reason::Ipv6ExtensionTruncated) };
        let mut length = 8usize;
        if chain.next == FRAGMENT {
            let field = u16::from_be_bytes([h[2], h[3]]);
            chain.fragmented = true;
            chain.place = field & 0xfff8;
            chain.more = field & 1 != 0;
            chain.id = u32::from_be_bytes([h[4], h[5], h[6], h[7]]);
            chain.before_fragment = chain.offset.wrapping_sub(start) as u16;
            chain.fragment_length = end.wrapping_sub(chain.offset).wrapping_sub(8) as u16;
        } else {
            if chain.next == ROUTING && h[3] != 0 {
                return Err(Reason::Ipv6SegmentsLeft);
            }
            length = usize::from(h[1]).wrapping_add(1) << 3;
        }
        chain.next = h[0];
        chain.offset = chain.offset.wrapping_add(length);
        if chain.offset > end {
            return Err(if chain.fragmented { Reason::FragmentTiny } else { Reason::Ipv6ExtensionTruncated });
        }
    }
    if is_extension(chain.next) && chain.place == 0 { Err(Reason::Ipv6ExtensionCount) } else { Ok(chain) }
}

#[inline(always)]
const fn is_extension(next: u8) -> bool {
    matches!(next, HOP_BY_HOP | ROUTING | FRAGMENT | DESTINATION_OPTIONS)
}

/// Reads what follows the IP headers and fills in ports and kind; `place` is the fragment's.
#[inline(always)]
fn transport<R: Reader + ?Sized, const PLAIN: u8>(
    frame: &R,
    packet: &mut Packet,
    place: u16,
) -> Result<(), Reason> {
    if let Fragment::Later { .. } = packet.fragment {
        packet.kind = PacketKind::LaterFragment;
        // RFC 1858 §4: a second fragment at byte 8 would overwrite the TCP flags of the first.
        return if packet.key.protocol == TCP && place == 8 { Err(Reason::FragmentTiny) } else { Ok(()) };
    }
    match (packet.key.protocol, packet.key.family) {
        (TCP, _) => tcp(frame, packet),
        (UDP, _) => udp(frame, packet),
        _ if PLAIN != ANY => Err(Reason::NotIp),
        (ICMP, 4) | (ICMPV6, 6) => icmp(frame, packet),
        _ => Ok(()),
    }
}

/// The reason for a transport header that the packet is too short for.
#[inline(always)]
const fn short(packet: &Packet, whole: Reason) -> Reason {
    match packet.fragment {
        Fragment::Whole => whole,
        _ => Reason::FragmentTiny,
    }
}

#[inline(always)]
fn tcp<R: Reader + ?Sized>(frame: &R, packet: &mut Packet) -> Result<(), Reason> {
    if packet.l4_length < 20 {
        return Err(short(packet, Reason::TcpTruncated));
    }
    let Some(h) = frame.read::<20>(usize::from(packet.l4_offset)) else { return Err(Reason::TcpTruncated) };
    let header_length = u16::from(h[12] >> 4) << 2;
    if header_length < 20 {
        return Err(Reason::TcpDataOffset);
    }
    if header_length > packet.l4_length {
        return Err(short(packet, Reason::TcpDataOffset));
    }
    let flags = h[13];
    if flags & tcp_flags::SYN != 0 && flags & (tcp_flags::FIN | tcp_flags::RST) != 0 {
        return Err(Reason::TcpFlags);
    }
    packet.key.source_port = [h[0], h[1]];
    packet.key.destination_port = [h[2], h[3]];
    packet.tcp_sequence = u32::from_be_bytes([h[4], h[5], h[6], h[7]]);
    packet.tcp_acknowledgment = u32::from_be_bytes([h[8], h[9], h[10], h[11]]);
    packet.payload_length = packet.l4_length.wrapping_sub(header_length);
    packet.kind = if flags & (tcp_flags::SYN | tcp_flags::ACK) == tcp_flags::SYN {
        PacketKind::TcpSyn
    } else {
        PacketKind::Tcp { flags }
    };
    Ok(())
}

#[inline(always)]
fn udp<R: Reader + ?Sized>(frame: &R, packet: &mut Packet) -> Result<(), Reason> {
    if packet.l4_length < 8 {
        return Err(short(packet, Reason::UdpTruncated));
    }
    let Some(h) = frame.read::<8>(usize::from(packet.l4_offset)) else { return Err(Reason::UdpTruncated) };
    let length = u16::from_be_bytes([h[4], h[5]]);
    // A first fragment has only part of what its UDP header counts. What is beyond the UDP length (RFC 9868) stays with the packet.
    if length < 8 || packet.fragment == Fragment::Whole && length > packet.l4_length {
        return Err(Reason::UdpLength);
    }
    packet.key.source_port = [h[0], h[1]];
    packet.key.destination_port = [h[2], h[3]];
    packet.payload_length = packet.l4_length.wrapping_sub(8);
    packet.kind = PacketKind::Datagram;
    Ok(())
}

#[inline(always)]
fn icmp<R: Reader + ?Sized>(frame: &R, packet: &mut Packet) -> Result<(), Reason> {
    if packet.l4_length < 8 {
        return Err(short(packet, Reason::IcmpTruncated));
    }
    let Some([kind, code]) = frame.read::<2>(usize::from(packet.l4_offset)) else {
        return Err(Reason::IcmpTruncated);
    };
    packet.payload_length = packet.l4_length.wrapping_sub(8);
    if packet.fragment != Fragment::Whole {
        return Ok(());
    }
    match (packet.key.family, kind) {
        (4, 8) | (6, 128) if code == 0 => packet.kind = PacketKind::EchoRequest,
        // RFC 792: unreachable, time exceeded, parameter problem. Source quench is dead (RFC 6633), a redirect is for the link.
        (4, 3 | 11 | 12) => return quote(frame, packet),
        // RFC 4443: unreachable, too big, time exceeded, parameter problem.
        (6, 1..=4) => return quote(frame, packet),
        (6, 133..=137) => packet.kind = PacketKind::NeighbourDiscovery,
        _ => {}
    }
    Ok(())
}

/// Reads the packet that an ICMP error quotes: one from the service to the client.
#[inline(always)]
fn quote<R: Reader + ?Sized>(frame: &R, packet: &mut Packet) -> Result<(), Reason> {
    let start = usize::from(packet.l4_offset).wrapping_add(8);
    let end = usize::from(packet.l3_offset).wrapping_add(usize::from(packet.l3_length));
    let (client, protocol, ports_at) = if packet.key.family == 4 {
        if start.wrapping_add(20) > end {
            return Err(Reason::QuoteTruncated);
        }
        let Some(h) = frame.read::<20>(start) else { return Err(Reason::QuoteTruncated) };
        let header_length = ipv4_header_length(h[0]);
        if h[0] >> 4 != 4 || header_length < 20 {
            return Err(Reason::QuoteOdd);
        }
        if u16::from_be_bytes([h[6], h[7]]) & 0x1fff != 0 {
            return Err(Reason::QuoteUnsupported);
        }
        let (service, client) = (mapped([h[12], h[13], h[14], h[15]]), mapped([h[16], h[17], h[18], h[19]]));
        if service != packet.key.destination {
            return Err(Reason::QuoteMismatch);
        }
        (client, h[9], start.wrapping_add(usize::from(header_length)))
    } else {
        if start.wrapping_add(40) > end {
            return Err(Reason::QuoteTruncated);
        }
        let Some(h) = frame.read::<8>(start) else { return Err(Reason::QuoteTruncated) };
        if h[0] >> 4 != 6 {
            return Err(Reason::QuoteOdd);
        }
        let Some(service) = frame.read::<16>(start.wrapping_add(8)) else {
            return Err(Reason::QuoteTruncated);
        };
        let Some(client) = frame.read::<16>(start.wrapping_add(24)) else {
            return Err(Reason::QuoteTruncated);
        };
        // Here and not below for both families: what lives shorter is no load for the eBPF stack.
        if service != packet.key.destination {
            return Err(Reason::QuoteMismatch);
        }
        let Ok(chain) = extensions(frame, start.wrapping_add(40), end, h[6]) else {
            return Err(Reason::QuoteUnsupported);
        };
        if chain.place != 0 {
            return Err(Reason::QuoteUnsupported);
        }
        (client, chain.next, chain.offset)
    };
    if protocol != TCP && protocol != UDP {
        return Err(Reason::QuoteUnsupported);
    }
    if ports_at.wrapping_add(4) > end {
        return Err(Reason::QuoteTruncated);
    }
    let Some([s0, s1, c0, c1]) = frame.read::<4>(ports_at) else { return Err(Reason::QuoteTruncated) };
    packet.key.source = client;
    packet.key.source_port = [c0, c1];
    packet.key.destination_port = [s0, s1];
    packet.key.protocol = protocol;
    packet.kind = PacketKind::IcmpError;
    Ok(())
}
