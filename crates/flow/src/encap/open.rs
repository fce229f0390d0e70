//! Takes a packet out of its tunnel.

use crate::checksum;
use crate::packet::{Frame, Link, Packet, ParseError, parse};

/// Why nothing came out of a tunnel packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpenError {
    /// The frame does not have what the packet says.
    NoRoom,
    /// The outer packet saw congestion, and the inner one cannot be told because its ends do not speak ECN (RFC 6040 §4.2: drop).
    Congestion,
    /// What was inside is no packet.
    Parse(ParseError),
}

/// Cuts the outer headers of `outer` off the frame, so that it starts with the IP packet at `inner_offset`, and reads that.
///
/// A hand-off's inner offset comes from [`parse_hand_off`](super::parse_hand_off); that of IP in IP is `outer.l4_offset`, that of GUE
/// is [`Packet::payload_offset`]. Congestion that the outer packet met is marked on the inner one (RFC 6040 §4.2).
#[inline(always)]
pub fn open<F: Frame>(frame: &mut F, outer: &Packet, inner_offset: usize) -> Result<Packet, OpenError> {
    let end = usize::from(outer.l3_offset).wrapping_add(usize::from(outer.l3_length));
    if inner_offset > end || !frame.truncate(end) || !frame.move_head(inner_offset as isize) {
        return Err(OpenError::NoRoom);
    }
    let mut packet = match parse(frame, Link::Ip) {
        Ok(packet) => packet,
        Err(error) => return Err(OpenError::Parse(error)),
    };
    // 0: not ECN-capable, 1 and 2: capable, 3: congestion experienced.
    let ecn = match (outer.tos & 3, packet.tos & 3) {
        (3, 0) => return Err(OpenError::Congestion),
        (3, _) => 3,
        (1, 2) => 1,
        (_, inner) => inner,
    };
    let tos = packet.tos & !3 | ecn;
    if tos == packet.tos {
        return Ok(packet);
    }
    let changed = if packet.key.family == 4 { set_ipv4_tos(frame, tos) } else { set_ipv6_class(frame, tos) };
    match changed {
        Some(true) => {
            packet.tos = tos;
            Ok(packet)
        }
        _ => Err(OpenError::NoRoom),
    }
}

#[inline(always)]
fn set_ipv4_tos<F: Frame>(frame: &mut F, tos: u8) -> Option<bool> {
    let [first, old] = frame.read::<2>(0)?;
    let sum = u16::from_be_bytes(frame.read::<2>(10)?);
    let sum = checksum::update(sum, u16::from_be_bytes([first, old]), u16::from_be_bytes([first, tos]));
    Some(frame.write(0, [first, tos]) && frame.write(10, sum.to_be_bytes()))
}

#[inline(always)]
fn set_ipv6_class<F: Frame>(frame: &mut F, class: u8) -> Option<bool> {
    let [first, second] = frame.read::<2>(0)?;
    Some(frame.write(0, [first & 0xf0 | class >> 4, second & 0x0f | class << 4]))
}
