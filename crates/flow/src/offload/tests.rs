use std::vec;
use std::vec::Vec;

use etherparse::defrag::IpDefragPool;
use etherparse::{SlicedPacket, TransportSlice};
use proptest::prelude::*;

use super::*;
use crate::packet::samples::{self, checksum_error};
use crate::packet::tcp_flags::{ACK, CWR, ECE, FIN, PSH};
use crate::packet::{PacketKind, Reason};

const HEADROOM: usize = 20;

fn segments(ip_packet: &[u8], size: u16) -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    let count = segment(ip_packet, size, HEADROOM, &mut Vec::new(), |bytes| {
        all.push(bytes[HEADROOM..].to_vec());
    });
    assert_eq!(count, Ok(all.len()));
    all
}

fn fragments(ip_packet: &[u8], mtu: u16) -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    let count = fragment(ip_packet, mtu, 0x0dd_ba11, HEADROOM, &mut Vec::new(), |bytes| {
        all.push(bytes[HEADROOM..].to_vec());
    });
    assert_eq!(count, Ok(all.len()));
    all
}

fn numbered(length: usize) -> Vec<u8> {
    (0..length).map(|i| (i % 251) as u8).collect()
}

#[test]
fn a_merged_tcp_packet_is_cut_as_the_card_would_cut_it() {
    for family in [4, 6] {
        let payload = numbered(60_001);
        let mut merged = samples::tcp(family, ACK | PSH | FIN | CWR | ECE, &payload);
        // A checksum still to be filled in.
        let at = if family == 4 { 36 } else { 56 };
        merged[at..at + 2].copy_from_slice(&[0xde, 0xad]);
        assert_eq!(checksum_error(&merged), Some("TCP"));
        let all = segments(&merged, 1448);
        assert_eq!(all.len(), 42);
        let mut joined = Vec::new();
        for (index, bytes) in all.iter().enumerate() {
            assert_eq!(checksum_error(bytes), None);
            let packet = parse(bytes.as_slice(), Link::Ip).unwrap();
            assert_eq!(usize::from(packet.l3_length), bytes.len());
            assert_eq!(packet.tcp_sequence, 0x0102_0304 + index as u32 * 1448);
            assert_eq!(packet.tcp_acknowledgment, 0x0a0b_0c0d);
            let mut flags = ACK | ECE;
            if index == 0 {
                flags |= CWR;
            }
            if index == 41 {
                flags |= PSH | FIN;
            }
            assert_eq!(packet.kind, PacketKind::Tcp { flags });
            if family == 4 {
                assert_eq!(word(bytes, 4).unwrap(), word(&merged, 4).unwrap() + index as u16);
            }
            // Options, window and ports stay.
            let (l4, payload) = (usize::from(packet.l4_offset), usize::from(packet.payload_offset()));
            assert_eq!(bytes[l4 + 20..payload], merged[l4 + 20..payload]);
            assert_eq!(bytes[l4..l4 + 4], merged[l4..l4 + 4]);
            joined.extend_from_slice(&bytes[payload..]);
        }
        assert_eq!(joined, payload);
    }
}

#[test]
fn a_merged_datagram_is_cut_into_datagrams() {
    for family in [4, 6] {
        let payload = numbered(3001);
        let merged = samples::udp(family, &payload);
        let all = segments(&merged, 1000);
        assert_eq!(all.len(), 4);
        let mut joined = Vec::new();
        for bytes in &all {
            assert_eq!(checksum_error(bytes), None);
            let sliced = SlicedPacket::from_ip(bytes).unwrap();
            let Some(TransportSlice::Udp(udp)) = sliced.transport else { panic!("UDP") };
            assert_ne!(udp.checksum(), 0);
            joined.extend_from_slice(udp.payload());
        }
        assert_eq!(joined, payload);
    }
    let mut unsummed = samples::udp(4, &numbered(2000));
    unsummed[26..28].fill(0);
    for bytes in segments(&unsummed, 1000) {
        assert_eq!(bytes[26..28], [0, 0]);
    }
}

#[test]
fn what_is_not_merged_comes_out_as_one() {
    for payload in [&b""[..], b"x", &[7; 100]] {
        let bytes = samples::tcp(4, ACK | PSH, payload);
        assert_eq!(segments(&bytes, 100), [bytes]);
    }
    assert_eq!(segments(&samples::tcp(4, ACK, &[7; 101]), 100).len(), 2);
}

#[test]
fn what_cannot_be_cut_is_named() {
    let mut nothing = |_: &mut [u8]| panic!("nothing is emitted");
    let mut cut = |bytes: &[u8], size| segment(bytes, size, 0, &mut Vec::new(), &mut nothing);
    assert_eq!(cut(&samples::tcp(4, ACK, b"xx"), 0), Err(OffloadError::Size));
    assert_eq!(cut(&samples::ping(4), 1), Err(OffloadError::Unsupported));
    assert_eq!(cut(&samples::fragment4(1, false, b"xx"), 1), Err(OffloadError::Unsupported));
    assert!(
        matches!(cut(&[0x45], 1), Err(OffloadError::Parse(error)) if error.reason == Reason::Ipv4Truncated)
    );
}

#[test]
fn a_partial_checksum_is_finished() {
    for family in [4u8, 6] {
        for protocol in [TCP, UDP] {
            let whole = if protocol == TCP {
                samples::tcp(family, ACK, b"odd")
            } else {
                samples::udp(family, b"odd")
            };
            let packet = parse(whole.as_slice(), Link::Ip).unwrap();
            let (start, offset) = (usize::from(packet.l4_offset), if protocol == TCP { 16 } else { 6 });
            let key = packet.key;
            let pseudo = checksum::pseudo_header(
                family,
                &key.source,
                &key.destination,
                protocol,
                u32::from(packet.l4_length),
            );
            let mut partial = whole.clone();
            set(&mut partial, start + offset, checksum::fold(pseudo).to_be_bytes());
            assert!(checksum_error(&partial).is_some());
            assert_eq!(finish_checksum(&mut partial, start, offset), Ok(()));
            assert_eq!(partial, whole);
            set(&mut partial, start + offset, [1, 2]);
            assert_eq!(fill_checksum(&mut partial), Ok(()));
            assert_eq!(partial, whole);
            let length = whole.len();
            assert_eq!(finish_checksum(&mut partial, length + 1, 0), Err(OffloadError::Range));
            assert_eq!(finish_checksum(&mut partial, length - 7, 6), Err(OffloadError::Range));
        }
    }
    assert_eq!(fill_checksum(&mut samples::ping(4)), Err(OffloadError::Unsupported));
}

/// Puts fragments together again, by `etherparse`, last one first.
fn joined(all: &[Vec<u8>]) -> Option<Vec<u8>> {
    let mut pool = IpDefragPool::<(), ()>::new();
    let mut whole = None;
    for bytes in all.iter().rev() {
        assert!(whole.is_none(), "complete before the last");
        let sliced = SlicedPacket::from_ip(bytes).unwrap();
        whole = pool.process_sliced_packet(&sliced, (), ()).unwrap();
    }
    Some(whole?.payload)
}

#[test]
fn fragments_fit_and_come_together_again() {
    for family in [4, 6] {
        let mut bytes = samples::udp(family, &numbered(4000));
        if family == 4 {
            assert_eq!(
                fragment(&bytes, 1500, 0, 0, &mut Vec::new(), |_| panic!("nothing is emitted")),
                Err(OffloadError::DontFragment)
            );
            bytes[6] &= !0x40;
        }
        let header = if family == 4 { 20 } else { 40 };
        for mtu in [1500, 1280, 600] {
            let all = fragments(&bytes, mtu);
            assert!(all.len() > 2);
            for (index, one) in all.iter().enumerate() {
                assert!(one.len() <= usize::from(mtu));
                assert!(
                    index + 1 == all.len() || one.len() + 8 > usize::from(mtu),
                    "no smaller than need be"
                );
                assert_eq!(checksum_error_of_header(one), None);
                let kind = parse(one.as_slice(), Link::Ip).unwrap().kind;
                assert_eq!(kind == PacketKind::Datagram, index == 0);
                assert_eq!(kind == PacketKind::LaterFragment, index != 0);
            }
            assert_eq!(joined(&all).unwrap(), bytes[header..]);
            // The twin: with one missing there is no whole.
            assert_eq!(joined(&all[1..]), None);
        }
        assert_eq!(fragments(&bytes, 4100), [bytes.clone()]);
        let small = fragment(&bytes, 27, 0, 0, &mut Vec::new(), |_| panic!("nothing is emitted"));
        assert_eq!(small, Err(OffloadError::Size));
    }
}

fn checksum_error_of_header(ip_packet: &[u8]) -> Option<&'static str> {
    let (header, _) = etherparse::Ipv4Header::from_slice(ip_packet).ok()?;
    (header.header_checksum != header.calc_header_checksum()).then_some("IPv4 header")
}

#[test]
fn a_fragment_is_fragmented_again() {
    let mut bytes = samples::udp(4, &numbered(4000));
    bytes[6] &= !0x40;
    let twice: Vec<Vec<u8>> = fragments(&bytes, 1500).iter().flat_map(|one| fragments(one, 600)).collect();
    assert_eq!(joined(&twice).unwrap(), bytes[20..]);
    // IPv6 is not: only its sender does that.
    let bytes = samples::fragment6(1, true, &[0; 64]);
    let again = fragment(&bytes, 80, 0, 0, &mut Vec::new(), |_| panic!("nothing is emitted"));
    assert_eq!(again, Err(OffloadError::Unsupported));
}

#[test]
fn only_copied_options_are_in_later_fragments() {
    // Record route (not copied), a no-operation, router alert (copied).
    let options = [7u8, 7, 4, 0, 0, 0, 0, 1, 148, 4, 0, 0];
    let mut header =
        etherparse::Ipv4Header::new(100, 9, etherparse::IpNumber::UDP, samples::CLIENT4, samples::SERVICE4)
            .unwrap();
    header.options = options.into();
    header.total_len += 12;
    header.dont_fragment = false;
    header.header_checksum = header.calc_header_checksum();
    let bytes = [&header.to_bytes()[..], &samples::udp_header(100), &[0; 92]].concat();
    let all = fragments(&bytes, 96);
    assert_eq!(all.len(), 2);
    assert_eq!(all[0][20..32], options);
    assert_eq!(all[1][20..32], [1, 1, 1, 1, 1, 1, 1, 1, 148, 4, 0, 0]);
    assert_eq!(checksum_error_of_header(&all[1]), None);
}

proptest! {
    #[test]
    fn segments_join_to_the_whole(length in 0..5000usize, size in 1u16..2000, family in prop::sample::select(vec![4u8, 6])) {
        let payload = numbered(length);
        let mut joined = Vec::new();
        for bytes in segments(&samples::tcp(family, ACK, &payload), size) {
            prop_assert_eq!(checksum_error(&bytes), None);
            joined.extend_from_slice(&bytes[usize::from(parse(bytes.as_slice(), Link::Ip).unwrap().payload_offset())..]);
        }
        prop_assert_eq!(joined, payload);
    }

    #[test]
    fn damaged_packets_never_panic(
        family in prop::sample::select(vec![4u8, 6]),
        damage in prop::collection::vec((0..80usize, any::<u8>()), 1..5),
        size: u16,
        cut in 1..200usize,
    ) {
        let mut bytes = samples::tcp(family, ACK, &[0; 120]);
        for (at, value) in damage {
            bytes[at] = value;
        }
        bytes.truncate(cut);
        let _ = segment(&bytes, size, 0, &mut Vec::new(), |_| {});
        let _ = fragment(&bytes, size, 0, 0, &mut Vec::new(), |_| {});
        let _ = fill_checksum(&mut bytes);
        let _ = finish_checksum(&mut bytes, usize::from(size) % 200, usize::from(size) / 200);
    }
}
