//! What we say to a client ourselves: errors about its packets, answers to its pings, and the end of connections whose backend is gone.

use super::{ETHERNET, EncapError, LinkHeader, headers};
use crate::checksum;
use crate::key::{ICMP, ICMPV6, TCP, unmapped};
use crate::packet::{Fragment, Frame, Packet, PacketKind, tcp_flags};

/// Time to live of what we send ourselves.
const TTL: u8 = 64;
/// Type of service of an ICMPv4 error: precedence "internetwork control" (RFC 1812 §4.3.2.5).
const CONTROL_PRECEDENCE: u8 = 0xc0;
/// Bytes of the client's packet that an error quotes: as many as fit into 576 bytes (RFC 1812 §4.3.2.3) ...
const QUOTE_V4: u16 = 576 - 20 - 8;
/// ... or into the least MTU of IPv6 (RFC 4443 §3.2).
const QUOTE_V6: u16 = 1280 - 40 - 8;

/// What an ICMP error of ours says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum IcmpError {
    /// "Fragmentation needed and DF set" (RFC 792, with the MTU by RFC 1191 §4), or "packet too big" (RFC 4443 §3.2).
    TooBig {
        /// The largest IP packet that fits, in bytes.
        mtu: u16,
    },
    /// "Time to live exceeded in transit" (RFC 792, RFC 4443 §3.3).
    TimeExceeded,
}

/// Why there is no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ReplyError {
    /// One must not answer this packet (RFC 1812 §4.3.2.7, RFC 4443 §2.4 e): an error, a later fragment, or from no single host.
    /// Nothing was changed.
    NotAllowed,
    /// Not enough headroom, or the packet is not in the frame, which is spoilt now.
    NoRoom,
}

impl From<EncapError> for ReplyError {
    #[inline(always)]
    fn from(_: EncapError) -> Self {
        Self::NoRoom
    }
}

/// Turns the frame into the error that tells the packet's sender of the path's MTU; see [`icmp_error`].
#[inline(always)]
pub fn too_big<F: Frame>(
    frame: &mut F,
    packet: &Packet,
    mtu: u16,
    source: [u8; 16],
    link: Option<&LinkHeader>,
) -> Result<(), ReplyError> {
    icmp_error(frame, packet, IcmpError::TooBig { mtu }, source, link)
}

/// Turns the frame into an ICMP error to the packet's sender, from `source` (IPv4 as mapped).
///
/// It leaves with `link`, or if there is none by the way it came: MAC addresses swapped, VLAN tags kept, nothing at all in front of
/// what had no Ethernet header. The packet must be as it came. The caller limits the rate (RFC 1812 §4.3.2.8, RFC 4443 §2.4 f).
#[inline(always)]
pub fn icmp_error<F: Frame>(
    frame: &mut F,
    packet: &Packet,
    error: IcmpError,
    source: [u8; 16],
    link: Option<&LinkHeader>,
) -> Result<(), ReplyError> {
    let family = packet.key.family;
    let client = packet.key.source;
    if !may_be_told(packet) {
        return Err(ReplyError::NotAllowed);
    }
    let (most, added) = if family == 4 { (QUOTE_V4, 28usize) } else { (QUOTE_V6, 48) };
    let quote = if packet.l3_length < most { packet.l3_length } else { most };
    let l3 = usize::from(packet.l3_offset);
    if !frame.truncate(l3.wrapping_add(usize::from(quote))) {
        return Err(ReplyError::NoRoom);
    }
    let ip = place_link(frame, l3, added, family, link)?;
    let icmp = ip.wrapping_add(added).wrapping_sub(8);
    let icmp_length = quote.wrapping_add(8);

    let (kind, code, rest) = match (family, error) {
        (4, IcmpError::TooBig { mtu }) => (3u8, 4u8, u32::from(mtu)),
        (4, IcmpError::TimeExceeded) => (11, 0, 0),
        (_, IcmpError::TooBig { mtu }) => (2, 0, u32::from(mtu)),
        (_, IcmpError::TimeExceeded) => (3, 0, 0),
    };
    let [r0, r1, r2, r3] = rest.to_be_bytes();
    if !frame.write(icmp, [kind, code, 0, 0, r0, r1, r2, r3]) {
        return Err(ReplyError::NoRoom);
    }
    let mut sum = match checksum::of_frame(frame, icmp, usize::from(icmp_length)) {
        Some(sum) => sum,
        None => return Err(ReplyError::NoRoom),
    };
    if family == 6 {
        let pseudo = checksum::pseudo_header(6, &source, &client, ICMPV6, u32::from(icmp_length));
        sum = sum.wrapping_add(pseudo);
    }
    let summed = frame.write(icmp.wrapping_add(2), checksum::finish(sum).to_be_bytes());

    let headed = if family == 4 {
        let total = icmp_length.wrapping_add(20);
        frame.write(
            ip,
            headers::ipv4(unmapped(source), unmapped(client), CONTROL_PRECEDENCE, TTL, ICMP, total, None),
        )
    } else {
        frame.write(ip, headers::ipv6_start(0, 0, icmp_length, ICMPV6, TTL))
            && frame.write(ip.wrapping_add(8), source)
            && frame.write(ip.wrapping_add(24), client)
    };
    if summed && headed { Ok(()) } else { Err(ReplyError::NoRoom) }
}

/// Turns a ping ([`PacketKind::EchoRequest`]) into its answer (RFC 792, RFC 4443 §4.2), in place; `link` as in [`icmp_error`].
#[inline(always)]
pub fn echo_reply<F: Frame>(
    frame: &mut F,
    packet: &Packet,
    link: Option<&LinkHeader>,
) -> Result<(), ReplyError> {
    if packet.kind != PacketKind::EchoRequest || !is_one_host(packet) {
        return Err(ReplyError::NotAllowed);
    }
    let l3 = usize::from(packet.l3_offset);
    if !frame.truncate(l3.wrapping_add(usize::from(packet.l3_length))) {
        return Err(ReplyError::NoRoom);
    }
    let ip = place_link(frame, l3, 0, packet.key.family, link)?;
    let icmp = ip.wrapping_add(usize::from(packet.l4_offset)).wrapping_sub(l3);
    match answer(frame, packet, ip, icmp) {
        Some(true) => Ok(()),
        _ => Err(ReplyError::NoRoom),
    }
}

/// Length of a TCP header without options.
const TCP_LENGTH: u16 = 20;

/// Turns a TCP segment that acknowledges something into the RST that ends its connection; `link` as in [`icmp_error`].
///
/// The RST's sequence number is the segment's acknowledgment number and it acknowledges nothing (RFC 9293 §3.10.7.1), so the client
/// finds it exactly at the left edge of its window and believes it (RFC 5961 §3.2), though we have never seen what the backend sent.
#[inline(always)]
pub fn tcp_reset<F: Frame>(
    frame: &mut F,
    packet: &Packet,
    link: Option<&LinkHeader>,
) -> Result<(), ReplyError> {
    let flags = packet.tcp_flags();
    if flags & (tcp_flags::ACK | tcp_flags::RST) != tcp_flags::ACK || !is_one_host(packet) {
        return Err(ReplyError::NotAllowed);
    }
    let family = packet.key.family;
    let (service, client) = (packet.key.destination, packet.key.source);
    let header = if family == 4 { 20usize } else { 40 };
    let l3 = usize::from(packet.l3_offset);
    // A segment is at least as long: its own headers have these lengths or more.
    if !frame.truncate(l3.wrapping_add(header).wrapping_add(usize::from(TCP_LENGTH))) {
        return Err(ReplyError::NoRoom);
    }
    let ip = place_link(frame, l3, 0, family, link)?;
    let tcp = ip.wrapping_add(header);
    let [s0, s1] = packet.key.destination_port;
    let [c0, c1] = packet.key.source_port;
    let [q0, q1, q2, q3] = packet.tcp_acknowledgment.to_be_bytes();
    let words = [s0, s1, c0, c1, q0, q1, q2, q3, 0, 0, 0, 0, 5 << 4, tcp_flags::RST, 0, 0, 0, 0, 0, 0];
    if !frame.write(tcp, words) {
        return Err(ReplyError::NoRoom);
    }
    let Some(sum) = checksum::of_frame(frame, tcp, usize::from(TCP_LENGTH)) else {
        return Err(ReplyError::NoRoom);
    };
    let pseudo = checksum::pseudo_header(family, &service, &client, TCP, u32::from(TCP_LENGTH));
    let summed = frame.write(tcp.wrapping_add(16), checksum::finish(sum.wrapping_add(pseudo)).to_be_bytes());
    let headed = if family == 4 {
        let total = TCP_LENGTH.wrapping_add(20);
        frame.write(ip, headers::ipv4(unmapped(service), unmapped(client), 0, TTL, TCP, total, None))
    } else {
        frame.write(ip, headers::ipv6_start(0, 0, TCP_LENGTH, TCP, TTL))
            && frame.write(ip.wrapping_add(8), service)
            && frame.write(ip.wrapping_add(24), client)
    };
    if summed && headed { Ok(()) } else { Err(ReplyError::NoRoom) }
}

/// Swaps the addresses of the IP packet at `ip`, gives it a fresh TTL and makes the request at `icmp` a reply.
/// Swapped addresses leave every checksum as it was.
#[inline(always)]
fn answer<F: Frame>(frame: &mut F, packet: &Packet, ip: usize, icmp: usize) -> Option<bool> {
    let [kind, code, c0, c1] = frame.read::<4>(icmp)?;
    let reply = if packet.key.family == 4 { 0 } else { 129u8 };
    let [c0, c1] = checksum::update(
        u16::from_be_bytes([c0, c1]),
        u16::from_be_bytes([kind, code]),
        u16::from_be_bytes([reply, code]),
    )
    .to_be_bytes();
    let replied = frame.write(icmp, [reply, code, c0, c1]);
    let (source, destination) = (packet.key.source, packet.key.destination);
    let headed = if packet.key.family == 4 {
        let [ttl, protocol, h0, h1] = frame.read::<4>(ip.wrapping_add(8))?;
        let [h0, h1] = checksum::update(
            u16::from_be_bytes([h0, h1]),
            u16::from_be_bytes([ttl, protocol]),
            u16::from_be_bytes([TTL, protocol]),
        )
        .to_be_bytes();
        frame.write(ip.wrapping_add(8), [TTL, protocol, h0, h1])
            && frame.write(ip.wrapping_add(12), unmapped(destination))
            && frame.write(ip.wrapping_add(16), unmapped(source))
    } else {
        frame.write(ip.wrapping_add(7), [TTL])
            && frame.write(ip.wrapping_add(8), destination)
            && frame.write(ip.wrapping_add(24), source)
    };
    Some(replied && headed)
}

/// Whether an ICMP error may be sent about the packet.
#[inline(always)]
fn may_be_told(packet: &Packet) -> bool {
    let later = matches!(packet.fragment, Fragment::Later { .. });
    let icmp = matches!(packet.key.protocol, ICMP | ICMPV6) && packet.kind != PacketKind::EchoRequest;
    packet.kind != PacketKind::IcmpError && !icmp && !later && is_one_host(packet)
}

/// Whether the packet's source is the address of one host somewhere else.
#[inline(always)]
fn is_one_host(packet: &Packet) -> bool {
    let source = &packet.key.source;
    if source == &packet.key.destination {
        return false;
    }
    if packet.key.family == 4 {
        // "This network", loopback, multicast and what is reserved, the broadcast address among it (RFC 6890).
        !matches!(source[12], 0 | 127 | 224..=255)
    } else {
        // Unspecified, loopback (both under ::/127) and multicast.
        let [first, .., last] = *source;
        let mut rest = *source;
        rest[15] = 0;
        first != 0xff && !(rest == [0; 16] && last <= 1)
    }
}

/// Moves the frame's head so that `added` bytes come free in front of the IP packet at `l3`, and writes the link header in front of
/// them. Returns where the IP header of `family` is to stand.
#[inline(always)]
fn place_link<F: Frame>(
    frame: &mut F,
    l3: usize,
    added: usize,
    family: u8,
    link: Option<&LinkHeader>,
) -> Result<usize, ReplyError> {
    if let Some(link) = link {
        let delta = (l3 as isize).wrapping_sub(ETHERNET as isize).wrapping_sub(added as isize);
        move_head(frame, delta)?;
        headers::ethernet(frame, link, family)?;
        return Ok(ETHERNET);
    }
    let delta = 0isize.wrapping_sub(added as isize);
    match l3 {
        0 => move_head(frame, delta)?,
        14 => swap_macs::<14, F>(frame, delta)?,
        18 => swap_macs::<18, F>(frame, delta)?,
        22 => swap_macs::<22, F>(frame, delta)?,
        _ => return Err(ReplyError::NoRoom),
    }
    Ok(l3)
}

/// Moves the head and writes the link header that stood there, `N` bytes with its VLAN tags, in front again, the other way round.
#[inline(always)]
fn swap_macs<const N: usize, F: Frame>(frame: &mut F, delta: isize) -> Result<(), ReplyError> {
    let Some(mut header) = frame.read::<N>(0) else { return Err(ReplyError::NoRoom) };
    if let Some((first, [s0, s1, s2, s3, s4, s5, ..])) = header.split_first_chunk_mut::<6>() {
        let destination = *first;
        *first = [*s0, *s1, *s2, *s3, *s4, *s5];
        [*s0, *s1, *s2, *s3, *s4, *s5] = destination;
    }
    move_head(frame, delta)?;
    if frame.write(0, header) { Ok(()) } else { Err(ReplyError::NoRoom) }
}

#[inline(always)]
fn move_head<F: Frame>(frame: &mut F, delta: isize) -> Result<(), ReplyError> {
    if delta == 0 || frame.move_head(delta) { Ok(()) } else { Err(ReplyError::NoRoom) }
}
