//! The headers that go in front.

use super::{ETHERNET, EncapError, LinkHeader, Outer, UdpChecksum, written};
use crate::checksum;
use crate::key::{UDP, unmapped};
use crate::packet::{ETHERTYPE_IPV4, ETHERTYPE_IPV6, Frame};

/// Writes the Ethernet header of an IP packet of `family` at the frame's start.
#[inline(always)]
pub(super) fn ethernet<F: Frame>(frame: &mut F, link: &LinkHeader, family: u8) -> Result<(), EncapError> {
    let d = link.destination;
    let s = link.source;
    let [e0, e1] = if family == 4 { ETHERTYPE_IPV4 } else { ETHERTYPE_IPV6 }.to_be_bytes();
    written(frame.write(0, [d[0], d[1], d[2], d[3], d[4], d[5], s[0], s[1], s[2], s[3], s[4], s[5], e0, e1]))
}

/// Writes an Ethernet header and an IP header for a packet of `total` bytes, the IP header included, at the frame's start.
#[inline(always)]
pub(super) fn ethernet_and_ip<F: Frame>(
    frame: &mut F,
    link: &LinkHeader,
    outer: &Outer,
    tos: u8,
    protocol: u8,
    total: u16,
) -> Result<(), EncapError> {
    if outer.family == 4 {
        let h = ipv4(
            unmapped(outer.source),
            unmapped(outer.destination),
            tos,
            outer.ttl,
            protocol,
            total,
            if outer.dont_fragment { None } else { Some(outer.identification) },
        );
        let (d, s) = (link.destination, link.source);
        let [e0, e1] = ETHERTYPE_IPV4.to_be_bytes();
        // In one piece: each is compared with the frame's end.
        written(frame.write(
            0,
            [
                d[0], d[1], d[2], d[3], d[4], d[5], s[0], s[1], s[2], s[3], s[4], s[5], e0, e1, h[0], h[1],
                h[2], h[3], h[4], h[5], h[6], h[7], h[8], h[9], h[10], h[11], h[12], h[13], h[14], h[15],
                h[16], h[17], h[18], h[19],
            ],
        ))
    } else {
        ethernet(frame, link, outer.family)?;
        let (at, payload) = (ETHERNET, total.wrapping_sub(40));
        written(frame.write(at, ipv6_start(tos, outer.flow_label, payload, protocol, outer.ttl)))?;
        written(frame.write(at.wrapping_add(8), outer.source))?;
        written(frame.write(at.wrapping_add(24), outer.destination))
    }
}

/// An IPv4 header without options; `identification` for a packet that may be fragmented, else DF is set and the identification 0
/// (RFC 6864 §4.1).
#[inline(always)]
pub(super) const fn ipv4(
    s: [u8; 4],
    d: [u8; 4],
    tos: u8,
    ttl: u8,
    protocol: u8,
    total: u16,
    identification: Option<u16>,
) -> [u8; 20] {
    let [l0, l1] = total.to_be_bytes();
    let ([i0, i1], flags) = match identification {
        Some(id) => (id.to_be_bytes(), 0),
        None => ([0, 0], 0x40),
    };
    // In words, because the kernel's program has addresses in words, and would take them apart for a sum of bytes.
    let (source, destination) = (u32::from_ne_bytes(s), u32::from_ne_bytes(d));
    let [c0, c1] = checksum::ipv4_header([
        u32::from_ne_bytes([0x45, tos, l0, l1]),
        u32::from_ne_bytes([i0, i1, flags, 0]),
        u32::from_ne_bytes([ttl, protocol, 0, 0]),
        source,
        destination,
    ]);
    let [s0, s1, s2, s3] = source.to_ne_bytes();
    let [d0, d1, d2, d3] = destination.to_ne_bytes();
    [0x45, tos, l0, l1, i0, i1, flags, 0, ttl, protocol, c0, c1, s0, s1, s2, s3, d0, d1, d2, d3]
}

/// The eight bytes of an IPv6 header before its addresses.
#[inline(always)]
pub(super) const fn ipv6_start(
    traffic_class: u8,
    flow_label: u32,
    payload: u16,
    next: u8,
    hop_limit: u8,
) -> [u8; 8] {
    let first = 6 << 28 | (traffic_class as u32) << 20 | flow_label & 0xf_ffff;
    let [a, b, c, d] = first.to_be_bytes();
    let [p0, p1] = payload.to_be_bytes();
    [a, b, c, d, p0, p1, next, hop_limit]
}

/// Writes a UDP header at `at` for a datagram of `length` bytes, this header included; what follows is there already.
#[inline(always)]
pub(super) fn udp<F: Frame>(frame: &mut F, at: usize, outer: &Outer, length: u16) -> Result<(), EncapError> {
    let [s0, s1] = outer.source_port.to_be_bytes();
    let [d0, d1] = outer.destination_port.to_be_bytes();
    let [l0, l1] = length.to_be_bytes();
    written(frame.write(at, [s0, s1, d0, d1, l0, l1, 0, 0]))?;
    if let UdpChecksum::Zero = outer.checksum {
        return Ok(());
    }
    let Some(sum) = checksum::of_frame(frame, at, usize::from(length)) else {
        return Err(EncapError::NoRoom);
    };
    let pseudo =
        checksum::pseudo_header(outer.family, &outer.source, &outer.destination, UDP, u32::from(length));
    let checksum = checksum::finish_udp(sum.wrapping_add(pseudo)).to_be_bytes();
    written(frame.write(at.wrapping_add(6), checksum))
}
