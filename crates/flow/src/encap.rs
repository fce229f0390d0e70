//! How a packet leaves: to a backend, to another member, or back to the client.
//!
//! All of it rewrites the frame in place. The size is checked before anything is changed, so that after
//! [`EncapError::TooBig`] the frame still serves for [`too_big`].

mod hand_off;
mod headers;
mod icmp;
mod open;
#[cfg(test)]
mod tests;

pub use hand_off::{
    GENEVE_LENGTH, GENEVE_PORT, HandOffError, HandOffFlags, HandOffHeader, hand_off_bytes, parse_hand_off,
};
pub use icmp::{IcmpError, ReplyError, echo_reply, icmp_error, tcp_reset, too_big};
pub use open::{OpenError, open};

use crate::checksum;
use crate::entry::Method;
use crate::key::UDP;
use crate::packet::{Frame, Packet};

/// Length of an Ethernet header in bytes.
pub(crate) const ETHERNET: usize = 14;
const UDP_LENGTH: usize = 8;
/// IP protocol numbers of an IPv4 or IPv6 packet inside another (RFC 2003, RFC 2473, RFC 4213).
const IPV4_INSIDE: u8 = 4;
const IPV6_INSIDE: u8 = 41;

/// The Ethernet header that a frame leaves with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct LinkHeader {
    /// The egress interface's.
    pub source: [u8; 6],
    /// The next hop's.
    pub destination: [u8; 6],
}

/// Whether outer UDP headers carry a checksum.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum UdpChecksum {
    /// None: what is inside has its own. Allowed over IPv4 by RFC 768, over IPv6 for tunnels by RFC 6935 §5 under the conditions of
    /// RFC 6936 §4; the receiver must be willing (a Linux FOU/GUE port is: `net/ipv4/fou_core.c` never asks for
    /// `use_udp6_rx_checksums`).
    #[default]
    Zero,
    /// Computed over the whole packet, at the price of reading it.
    Full,
}

/// The headers that are put around a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outer {
    /// How; [`hand_off`] ignores it.
    pub method: Method,
    /// 4 or 6: that of the two addresses.
    pub family: u8,
    /// Our address, IPv4 as mapped. With [`Method::IpIp`], where there are no ports, [`spread_source`] may vary it.
    pub source: [u8; 16],
    /// The backend's or member's address, IPv4 as mapped.
    pub destination: [u8; 16],
    /// UDP source port, 49,152 to 65,535: see [`source_port`].
    pub source_port: u16,
    /// UDP port of the decapsulator, or of the member ([`GENEVE_PORT`]).
    pub destination_port: u16,
    /// IPv6 flow label (low 20 bits), so that routers spread tunnels too (RFC 6438).
    pub flow_label: u32,
    /// IPv4 identification; it counts only where DF is clear (RFC 6864 §4.1).
    pub identification: u16,
    /// IPv4's DF bit. Clear only where somebody fragments the outer packet.
    pub dont_fragment: bool,
    /// Time to live, or hop limit; 64 by RFC 1700 is a good one.
    pub ttl: u8,
    /// Of the UDP header.
    pub checksum: UdpChecksum,
}

impl Outer {
    /// Headers by `method` from `source` to `destination` (mapped addresses of `family`) for a flow with this hash:
    /// DF set, time to live 64, no UDP checksum.
    #[inline(always)]
    pub const fn new(
        method: Method,
        family: u8,
        source: [u8; 16],
        destination: [u8; 16],
        destination_port: u16,
        flow_hash: u64,
    ) -> Self {
        Self {
            method,
            family,
            source,
            destination,
            source_port: source_port(flow_hash),
            destination_port,
            flow_label: (flow_hash >> 32) as u32 & 0xf_ffff,
            identification: 0,
            dont_fragment: true,
            ttl: 64,
            checksum: UdpChecksum::Zero,
        }
    }
}

/// Why a packet could not leave. Nothing was changed, except that after `NoRoom` the frame is spoilt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum EncapError {
    /// Larger than the path takes.
    TooBig {
        /// The largest IP packet that would have fitted, in bytes: what the client should be told.
        mtu: u16,
    },
    /// Its time to live is 1 or 0.
    TtlExpired,
    /// Not enough headroom, or the packet is not in the frame.
    NoRoom,
}

/// Whether anything of the flow's hash stands in what `method` puts in front: a port or a flow label, for routers to spread by.
#[inline(always)]
pub const fn is_spread(method: Method, family: u8) -> bool {
    match method {
        Method::L2 => false,
        Method::IpIp => family != 4,
        Method::Gue => true,
    }
}

/// Bytes that `method` adds to an IP packet when the outer addresses are of `family`.
#[inline(always)]
pub const fn overhead(method: Method, family: u8) -> u16 {
    match method {
        Method::L2 => 0,
        Method::IpIp => ip_length(family) as u16,
        Method::Gue => ip_length(family).wrapping_add(UDP_LENGTH) as u16,
    }
}

/// Bytes that a hand-off adds to an IP packet when the members' addresses are of `family`: 68 or 88.
#[inline(always)]
pub const fn hand_off_overhead(family: u8) -> u16 {
    ip_length(family).wrapping_add(UDP_LENGTH).wrapping_add(GENEVE_LENGTH) as u16
}

const _: () =
    assert!(ETHERNET + hand_off_overhead(6) as usize <= crate::packet::HEADROOM, "a bare IP packet fits");

#[inline(always)]
const fn ip_length(family: u8) -> usize {
    if family == 4 { 20 } else { 40 }
}

/// The outer UDP source port of a flow with this hash: 49,152 to 65,535 (RFC 6335 §6), from bits that do not choose the row.
#[inline(always)]
pub const fn source_port(flow_hash: u64) -> u16 {
    0xc000 | (flow_hash >> 32) as u16 & 0x3fff
}

/// `source` with its low `bits` (0 to 16) replaced by bits of the flow's hash, so that tunnels without ports still spread over receive
/// queues. Only where all these addresses are ours to send from, and nothing filters them.
#[inline(always)]
pub const fn spread_source(source: [u8; 16], bits: u32, flow_hash: u64) -> [u8; 16] {
    let mask = if bits >= 16 { 0xffff } else { (1u16 << bits).wrapping_sub(1) };
    let low = u16::from_be_bytes([source[14], source[15]]) & !mask | (flow_hash >> 32) as u16 & mask;
    let mut spread = source;
    [spread[14], spread[15]] = low.to_be_bytes();
    spread
}

/// Sends the packet on to a backend: it loses one TTL, is wrapped by `outer.method`, and leaves as an Ethernet frame with `link` and
/// without VLAN tags. `mtu` is the path's, in bytes of IP packet.
///
/// Type of service goes outside too: DSCP as in RFC 2983's uniform model, ECN as in RFC 6040 §4.1's normal mode.
#[inline(always)]
pub fn encapsulate<F: Frame>(
    frame: &mut F,
    packet: &Packet,
    outer: &Outer,
    mtu: u16,
    link: &LinkHeader,
) -> Result<(), EncapError> {
    match outer.method {
        Method::L2 => forward_l2(frame, packet, mtu, link),
        Method::IpIp => wrap(frame, packet, outer, Layer::Ip, mtu, link),
        Method::Gue => wrap(frame, packet, outer, Layer::Udp, mtu, link),
    }
}

/// Whether [`encapsulate`] will neither say that the packet is too big nor that its time is over.
#[inline(always)]
pub const fn is_forwardable(packet: &Packet, method: Method, family: u8, mtu: u16) -> bool {
    fits(packet, overhead(method, family), mtu) && packet.ttl > 1
}

/// Whether the packet is no larger than `mtu` with `added` bytes in front.
#[inline(always)]
const fn fits(packet: &Packet, added: u16, mtu: u16) -> bool {
    (packet.l3_length as u32).wrapping_add(added as u32) <= mtu as u32
}

/// Sends the packet on to a backend on the same segment: it loses one TTL and gets new MAC addresses.
#[inline(always)]
pub fn forward_l2<F: Frame>(
    frame: &mut F,
    packet: &Packet,
    mtu: u16,
    link: &LinkHeader,
) -> Result<(), EncapError> {
    if packet.l3_length > mtu {
        return Err(EncapError::TooBig { mtu });
    }
    if packet.ttl <= 1 {
        return Err(EncapError::TtlExpired);
    }
    make_room(frame, packet, 0)?;
    decrement_ttl(frame, packet.key.family, ETHERNET)?;
    headers::ethernet(frame, link, packet.key.family)
}

/// Hands the packet off to another member: Geneve over UDP.
///
/// The packet inside stays as it came. It loses its TTL where it is forwarded, so that a path is equally long whichever member took
/// the packet; what keeps it from going round is the hop count.
#[inline(always)]
pub fn hand_off<F: Frame>(
    frame: &mut F,
    packet: &Packet,
    header: &HandOffHeader,
    outer: &Outer,
    mtu: u16,
    link: &LinkHeader,
) -> Result<(), EncapError> {
    wrap(frame, packet, outer, Layer::HandOff(header), mtu, link)
}

/// Takes one from the time to live of the IP packet at `l3_offset`, and mends its checksum (RFC 1624).
#[inline(always)]
pub fn decrement_ttl<F: Frame>(frame: &mut F, family: u8, l3_offset: usize) -> Result<(), EncapError> {
    if family == 4 {
        let at = l3_offset.wrapping_add(8);
        let Some([ttl, protocol, c0, c1]) = frame.read::<4>(at) else { return Err(EncapError::NoRoom) };
        if ttl <= 1 {
            return Err(EncapError::TtlExpired);
        }
        let lower = ttl.wrapping_sub(1);
        let [c0, c1] = checksum::with_lower_ttl([c0, c1]);
        written(frame.write(at, [lower, protocol, c0, c1]))
    } else {
        let at = l3_offset.wrapping_add(7);
        let Some([hop_limit]) = frame.read::<1>(at) else { return Err(EncapError::NoRoom) };
        if hop_limit <= 1 {
            return Err(EncapError::TtlExpired);
        }
        written(frame.write(at, [hop_limit.wrapping_sub(1)]))
    }
}

/// What stands between the outer IP header and the packet.
#[derive(Clone, Copy)]
enum Layer<'a> {
    Ip,
    Udp,
    HandOff(&'a HandOffHeader),
}

#[inline(always)]
fn wrap<F: Frame>(
    frame: &mut F,
    packet: &Packet,
    outer: &Outer,
    layer: Layer<'_>,
    mtu: u16,
    link: &LinkHeader,
) -> Result<(), EncapError> {
    let ip = ip_length(outer.family);
    let (added, protocol) = match layer {
        Layer::Ip if packet.key.family == 4 => (ip, IPV4_INSIDE),
        Layer::Ip => (ip, IPV6_INSIDE),
        Layer::Udp => (ip.wrapping_add(UDP_LENGTH), UDP),
        Layer::HandOff(_) => (ip.wrapping_add(UDP_LENGTH).wrapping_add(GENEVE_LENGTH), UDP),
    };
    if !fits(packet, added as u16, mtu) {
        return Err(EncapError::TooBig { mtu: mtu.saturating_sub(added as u16) });
    }
    let forwarded = !matches!(layer, Layer::HandOff(_));
    if forwarded && packet.ttl <= 1 {
        return Err(EncapError::TtlExpired);
    }
    make_room(frame, packet, added)?;
    let inner = ETHERNET.wrapping_add(added);
    if forwarded {
        decrement_ttl(frame, packet.key.family, inner)?;
    }
    // No overflow: it is at most the MTU, which has 16 bits.
    let total = packet.l3_length.wrapping_add(added as u16);
    headers::ethernet_and_ip(frame, link, outer, packet.tos, protocol, total)?;
    if let Layer::HandOff(header) = layer {
        let at = inner.wrapping_sub(GENEVE_LENGTH);
        written(frame.write(at, hand_off_bytes(header, packet.key.family)))?;
    }
    if protocol == UDP {
        headers::udp(frame, ETHERNET.wrapping_add(ip), outer, total.wrapping_sub(ip as u16))?;
    }
    Ok(())
}

/// Cuts padding behind the packet, and makes the frame start `added` bytes and an Ethernet header before it.
#[inline(always)]
fn make_room<F: Frame>(frame: &mut F, packet: &Packet, added: usize) -> Result<(), EncapError> {
    let l3 = usize::from(packet.l3_offset);
    let end = l3.wrapping_add(usize::from(packet.l3_length));
    if frame.len() != end {
        written(frame.truncate(end))?;
    }
    let delta = (l3 as isize).wrapping_sub(ETHERNET as isize).wrapping_sub(added as isize);
    // A call that moves the head costs the kernel's program all it knows of the frame.
    if delta == 0 { Ok(()) } else { written(frame.move_head(delta)) }
}

/// A write that must have had room.
#[inline(always)]
const fn written(ok: bool) -> Result<(), EncapError> {
    if ok { Ok(()) } else { Err(EncapError::NoRoom) }
}
