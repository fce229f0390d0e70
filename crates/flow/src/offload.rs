//! What network cards do for others: finishing checksums, cutting merged packets into segments, fragmenting. On the host only.
//!
//! A raw socket delivers what the kernel works on: TCP and UDP packets merged up to 64 kB (GRO) or not yet cut (TSO, USO), with
//! checksums still to be filled in. [`segment`] makes of such a packet what would have been on the wire.
//!
//! [`segment`] and [`fragment`] build each packet in a buffer of the caller's with `headroom` bytes (of no meaning) in front, so that
//! [`FrameBuf`](crate::packet::FrameBuf) can wrap it where it lies.

use alloc::vec::Vec;

use crate::checksum;
use crate::key::{TCP, UDP};
use crate::packet::{Fragment, Link, Packet, ParseError, parse, tcp_flags};

#[cfg(test)]
mod tests;

/// Why a packet could not be worked on. Nothing was emitted or changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OffloadError {
    /// It is no packet.
    Parse(ParseError),
    /// It is not a whole TCP or UDP packet, or (to fragment) has IPv6 extension headers.
    Unsupported,
    /// A segment size of 0, or an MTU that leaves no room for eight bytes of payload.
    Size,
    /// The checksum, or what it covers, is not within the packet.
    Range,
    /// DF is set.
    DontFragment,
}

impl core::fmt::Display for OffloadError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::Parse(error) => error.fmt(f),
            Self::Unsupported => f.write_str("neither TCP nor UDP, or not whole"),
            Self::Size => f.write_str("no room for payload"),
            Self::Range => f.write_str("checksum beyond the packet"),
            Self::DontFragment => f.write_str("must not be fragmented"),
        }
    }
}

impl core::error::Error for OffloadError {}

/// Finishes a partial checksum, as `VIRTIO_NET_HDR_F_NEEDS_CSUM` asks for: the field at `start + offset` of `bytes` holds the
/// pseudo-header's sum, and becomes the checksum of everything from `start` on. `bytes` must end where the packet ends.
pub fn finish_checksum(bytes: &mut [u8], start: usize, offset: usize) -> Result<(), OffloadError> {
    let covered = bytes.get_mut(start..).ok_or(OffloadError::Range)?;
    let sum = checksum::of_slice(covered);
    let field = covered.get_mut(offset..).and_then(|rest| rest.first_chunk_mut::<2>());
    // Zero would mean "none" in UDP and is the same number as 0xffff in TCP, so that nobody need ask which it is.
    *field.ok_or(OffloadError::Range)? = checksum::finish_udp(sum).to_be_bytes();
    Ok(())
}

/// Computes the TCP or UDP checksum of a whole IP packet anew, whatever stands there.
pub fn fill_checksum(ip_packet: &mut [u8]) -> Result<(), OffloadError> {
    let packet = parse(&*ip_packet, Link::Ip).map_err(OffloadError::Parse)?;
    if packet.fragment != Fragment::Whole {
        return Err(OffloadError::Unsupported);
    }
    let end = usize::from(packet.l3_length);
    let bytes = ip_packet.get_mut(..end).ok_or(OffloadError::Range)?;
    transport_checksum(bytes, &packet)
}

/// Cuts a merged TCP or UDP packet into segments with `segment_size` bytes of payload each (the last may have fewer), as the card
/// would have done: sequence numbers, IPv4 identifications, lengths and all checksums are right; PSH and FIN only on the last one, CWR
/// only on the first (RFC 3168 §6.1.2). A packet that is not larger comes out as one, its checksum computed.
///
/// `ip_packet` starts with the IP header; its own transport checksum does not count, but a UDP checksum of 0 over IPv4 stays 0.
/// `emit` gets each segment behind `headroom` bytes in `buffer`. Returns how many there were.
pub fn segment(
    ip_packet: &[u8],
    segment_size: u16,
    headroom: usize,
    buffer: &mut Vec<u8>,
    mut emit: impl FnMut(&mut [u8]),
) -> Result<usize, OffloadError> {
    if segment_size == 0 {
        return Err(OffloadError::Size);
    }
    let packet = parse(ip_packet, Link::Ip).map_err(OffloadError::Parse)?;
    let is_tcp = packet.key.protocol == TCP;
    if packet.fragment != Fragment::Whole || !is_tcp && packet.key.protocol != UDP {
        return Err(OffloadError::Unsupported);
    }
    let payload_offset = usize::from(packet.payload_offset());
    let (headers, payload) = ip_packet
        .get(..usize::from(packet.l3_length))
        .and_then(|bytes| bytes.split_at_checked(payload_offset))
        .ok_or(OffloadError::Range)?;
    let l4 = usize::from(packet.l4_offset);
    let unsummed = !is_tcp && packet.key.family == 4 && word(headers, l4.wrapping_add(6)) == Some(0);

    let count = payload.len().div_ceil(usize::from(segment_size)).max(1);
    let mut chunks = payload.chunks(usize::from(segment_size));
    for index in 0..count {
        let chunk = chunks.next().unwrap_or_default();
        let Some(bytes) = lay_out(buffer, headroom, &[headers, chunk]) else { continue };
        set_length(bytes, packet.key.family);
        if packet.key.family == 4 {
            let id = word(headers, 4).unwrap_or_default().wrapping_add(index as u16);
            set(bytes, 4, id.to_be_bytes());
            sum_ipv4_header(bytes);
        }
        if is_tcp {
            let sequence =
                packet.tcp_sequence.wrapping_add((index as u32).wrapping_mul(u32::from(segment_size)));
            set(bytes, l4.wrapping_add(4), sequence.to_be_bytes());
            let mut flags = packet.tcp_flags();
            if index != 0 {
                flags &= !tcp_flags::CWR;
            }
            if index.wrapping_add(1) != count {
                flags &= !(tcp_flags::PSH | tcp_flags::FIN);
            }
            set(bytes, l4.wrapping_add(13), [flags]);
        } else {
            let length = bytes.len().wrapping_sub(l4) as u16;
            set(bytes, l4.wrapping_add(4), length.to_be_bytes());
        }
        if !unsummed {
            transport_checksum(bytes, &packet)?;
        }
        emit(buffer);
    }
    Ok(count)
}

/// Cuts an IP packet into fragments of at most `mtu` bytes, and returns how many there were; one that fits comes out as it is.
///
/// IPv4 (RFC 791 §3.2) keeps its identification, which must be unique; a fragment may be fragmented again.
/// IPv6 (RFC 8200 §4.5) is fragmented by its sender only, which for our own outer packets are we: it gets a fragment header with
/// `identification`. `emit` gets each fragment behind `headroom` bytes in `buffer`.
pub fn fragment(
    ip_packet: &[u8],
    mtu: u16,
    identification: u32,
    headroom: usize,
    buffer: &mut Vec<u8>,
    mut emit: impl FnMut(&mut [u8]),
) -> Result<usize, OffloadError> {
    let packet = parse(ip_packet, Link::Ip).map_err(OffloadError::Parse)?;
    let whole = ip_packet.get(..usize::from(packet.l3_length)).ok_or(OffloadError::Range)?;
    if packet.l3_length <= mtu {
        if lay_out(buffer, headroom, &[whole]).is_some() {
            emit(buffer);
        }
        return Ok(1);
    }
    let is_v4 = packet.key.family == 4;
    if is_v4 && packet.dont_fragment {
        return Err(OffloadError::DontFragment);
    }
    // Whole packets of ours have no extension headers; fragmenting others is not ours.
    if !is_v4 && (packet.fragment != Fragment::Whole || packet.l4_offset != 40) {
        return Err(OffloadError::Unsupported);
    }
    let (header, payload) =
        whole.split_at_checked(usize::from(packet.l4_offset)).ok_or(OffloadError::Range)?;
    let added = if is_v4 { 0usize } else { 8 };
    let room = usize::from(mtu).saturating_sub(header.len()).saturating_sub(added) & !7;
    if room == 0 {
        return Err(OffloadError::Size);
    }
    let field = word(header, 6).unwrap_or_default();
    let (start, more_after) = if is_v4 { (field & 0x1fff, field & 0x2000) } else { (0, 0) };

    let count = payload.len().div_ceil(room);
    for (index, chunk) in payload.chunks(room).enumerate() {
        let last = index.wrapping_add(1) == count;
        let units = (index.wrapping_mul(room) >> 3) as u16;
        if is_v4 {
            let Some(bytes) = lay_out(buffer, headroom, &[header, chunk]) else { continue };
            let more = if last { more_after } else { 0x2000 };
            set(bytes, 6, (start.wrapping_add(units) | more).to_be_bytes());
            if index != 0 {
                blank_options(bytes);
            }
            set_length(bytes, 4);
            sum_ipv4_header(bytes);
        } else {
            let [i0, i1, i2, i3] = identification.to_be_bytes();
            let [f0, f1] = (units << 3 | u16::from(!last)).to_be_bytes();
            let extension = [packet.key.protocol, 0, f0, f1, i0, i1, i2, i3];
            let Some(bytes) = lay_out(buffer, headroom, &[header, &extension, chunk]) else { continue };
            set(bytes, 6, [44]);
            set_length(bytes, 6);
        }
        emit(buffer);
    }
    Ok(count)
}

/// Puts `parts` into `buffer` behind `headroom` bytes, and returns them as one.
fn lay_out<'a>(buffer: &'a mut Vec<u8>, headroom: usize, parts: &[&[u8]]) -> Option<&'a mut [u8]> {
    buffer.resize(headroom, 0);
    for part in parts {
        buffer.extend_from_slice(part);
    }
    buffer.get_mut(headroom..)
}

/// The two bytes at `at` as a number.
fn word(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..)?.first_chunk::<2>().map(|two| u16::from_be_bytes(*two))
}

/// Writes `value` at `at`, where the headers are known to be.
fn set<const N: usize>(bytes: &mut [u8], at: usize, value: [u8; N]) {
    if let Some(place) = bytes.get_mut(at..).and_then(|rest| rest.first_chunk_mut::<N>()) {
        *place = value;
    }
}

/// Makes the IP header's length that of `bytes`, a whole packet.
fn set_length(bytes: &mut [u8], family: u8) {
    let length = bytes.len() as u16;
    if family == 4 {
        set(bytes, 2, length.to_be_bytes());
    } else {
        set(bytes, 4, length.wrapping_sub(40).to_be_bytes());
    }
}

/// Length of the IPv4 header that `bytes` start with.
fn ipv4_header_length(bytes: &[u8]) -> usize {
    usize::from(bytes.first().copied().unwrap_or_default() & 0x0f) << 2
}

fn sum_ipv4_header(bytes: &mut [u8]) {
    set(bytes, 10, [0, 0]);
    let sum = checksum::of_slice(bytes.get(..ipv4_header_length(bytes)).unwrap_or_default());
    set(bytes, 10, checksum::finish(sum).to_be_bytes());
}

/// Blanks the options that only the first fragment carries (RFC 791 §3.1: those without the copied flag) with no-operations, so that
/// the header keeps its length.
fn blank_options(bytes: &mut [u8]) {
    let end = ipv4_header_length(bytes);
    let Some(mut options) = bytes.get_mut(20..end) else { return };
    loop {
        match options {
            // A no-operation is one byte long; "end of options" is the last.
            [1, rest @ ..] => options = rest,
            [kind, length, ..] if *kind != 0 => {
                let copied = *kind & 0x80 != 0;
                let length = usize::from(*length);
                let Some((option, rest)) = options.split_at_mut_checked(length) else { return };
                if length < 2 {
                    return;
                }
                if !copied {
                    option.fill(1);
                }
                options = rest;
            }
            _ => return,
        }
    }
}

/// Computes the TCP or UDP checksum of `bytes`, a whole IP packet whose addresses, protocol and offsets are those of `packet`.
fn transport_checksum(bytes: &mut [u8], packet: &Packet) -> Result<(), OffloadError> {
    let key = &packet.key;
    let at = match key.protocol {
        TCP => 16usize,
        UDP => 6,
        _ => return Err(OffloadError::Unsupported),
    };
    let l4 = bytes.get_mut(usize::from(packet.l4_offset)..).ok_or(OffloadError::Range)?;
    set(l4, at, [0, 0]);
    // The pseudo-header of UDP has the UDP length, which may leave a surplus (RFC 9868) out.
    let length = match key.protocol {
        UDP => usize::from(word(l4, 4).unwrap_or_default()),
        _ => l4.len(),
    };
    let covered = l4.get(..length).ok_or(OffloadError::Range)?;
    let pseudo =
        checksum::pseudo_header(key.family, &key.source, &key.destination, key.protocol, length as u32);
    let sum = pseudo.wrapping_add(checksum::of_slice(covered));
    let checksum = if key.protocol == UDP { checksum::finish_udp(sum) } else { checksum::finish(sum) };
    set(l4, at, checksum.to_be_bytes());
    Ok(())
}
