use std::vec;
use std::vec::Vec;

use etherparse::{
    IcmpEchoHeader, Icmpv4Type, Icmpv6Type, NetSlice, SlicedPacket, TransportSlice,
    icmpv4::DestUnreachableHeader,
};
use proptest::prelude::*;

use super::*;
use crate::key::mapped;
use crate::member::MemberId;
use crate::packet::samples::{
    self, CLIENT4, CLIENT6, MAC_A, MAC_B, SERVICE4, SERVICE6, checksum_error, ethernet,
};
use crate::packet::tcp_flags::ACK;
use crate::packet::{FrameBuf, HEADROOM, Link, Packet, PacketKind, parse};

const US4: [u8; 4] = [10, 0, 0, 1];
const THEM4: [u8; 4] = [10, 0, 1, 2];
const US6: [u8; 16] = [0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
const THEM6: [u8; 16] = [0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2];
const LINK: LinkHeader = LinkHeader { source: [2, 0, 0, 0, 0, 1], destination: [2, 0, 0, 0, 0, 2] };
const COOKIE: u64 = 0x1122_3344_5566_7788;
const HASH: u64 = 0xfeed_f00d_dead_beef;

fn outer(method: Method, family: u8) -> Outer {
    let (us, them) = if family == 4 { (mapped(US4), mapped(THEM4)) } else { (US6, THEM6) };
    Outer::new(method, family, us, them, 6080, HASH)
}

/// Runs `action` on a copy of `bytes` with headroom, and returns its result and the frame afterwards.
fn on<T>(bytes: &[u8], link: Link, action: impl FnOnce(&mut FrameBuf<'_>, &Packet) -> T) -> (T, Vec<u8>) {
    let packet = parse(bytes, link).unwrap();
    let mut storage = vec![0xaa; HEADROOM];
    storage.extend_from_slice(bytes);
    let mut frame = FrameBuf::new(&mut storage, HEADROOM, bytes.len()).unwrap();
    let result = action(&mut frame, &packet);
    (result, frame.bytes().to_vec())
}

/// `ip_packet` with one taken from its TTL, by hand.
fn one_hop_on(ip_packet: &[u8]) -> Vec<u8> {
    let mut bytes = ip_packet.to_vec();
    if bytes[0] >> 4 == 4 {
        let (mut header, rest) = etherparse::Ipv4Header::from_slice(ip_packet).unwrap();
        header.time_to_live -= 1;
        header.header_checksum = header.calc_header_checksum();
        bytes = [&header.to_bytes()[..], rest].concat();
    } else {
        bytes[7] -= 1;
    }
    bytes
}

/// All there is to forward, in both families.
fn packets() -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    for family in [4, 6] {
        all.push(samples::tcp(family, ACK, b""));
        all.push(samples::tcp(family, ACK, &[0x5a; 1379]));
        all.push(samples::udp(family, b"odd"));
    }
    all.push(samples::fragment4(3, true, &[1; 64]));
    all.push(samples::fragment6(3, true, &[1; 64]));
    all
}

#[test]
fn ipip_and_gue_put_the_right_headers_around_any_packet() {
    for bytes in packets() {
        for (method, family) in [(Method::IpIp, 4), (Method::IpIp, 6), (Method::Gue, 4), (Method::Gue, 6)] {
            for checksum in [UdpChecksum::Zero, UdpChecksum::Full] {
                for tags in 0..=2 {
                    let mut padded = ethernet(tags, &bytes);
                    padded.extend_from_slice(&[0xee; 7]);
                    let outer = Outer { checksum, ..outer(method, family) };
                    let (result, frame) =
                        on(&padded, Link::Ethernet, |f, p| encapsulate(f, p, &outer, 1500, &LINK));
                    assert_eq!(result, Ok(()));
                    check_tunnel(&frame, &bytes, &outer);
                }
            }
        }
    }
}

fn check_tunnel(frame: &[u8], inner: &[u8], outer: &Outer) {
    assert_eq!(frame[..6], LINK.destination);
    assert_eq!(frame[6..12], LINK.source);
    let added = usize::from(overhead(outer.method, outer.family));
    assert_eq!(frame.len(), 14 + added + inner.len());
    assert_eq!(frame[14 + added..], one_hop_on(inner));
    let tunnel = parse(frame, Link::Ethernet).unwrap();
    assert_eq!((tunnel.key.source, tunnel.key.destination), (outer.source, outer.destination));
    assert_eq!((tunnel.ttl, tunnel.dont_fragment), (64, true));
    match outer.method {
        Method::Gue => {
            let sliced = SlicedPacket::from_ethernet(frame).unwrap();
            let Some(TransportSlice::Udp(udp)) = sliced.transport else { panic!("UDP") };
            assert_eq!((udp.source_port(), udp.destination_port()), (source_port(HASH), 6080));
            assert_eq!(udp.length() as usize, 8 + inner.len());
            if outer.checksum == UdpChecksum::Zero {
                assert_eq!(udp.checksum(), 0);
            } else {
                assert_eq!(checksum_error(&frame[14..]), None);
            }
        }
        _ => {
            let expected = if inner[0] >> 4 == 4 { 4 } else { 41 };
            assert_eq!(tunnel.key.protocol, expected);
            assert_eq!(tunnel.kind, PacketKind::Other);
        }
    }
    if outer.family == 4 {
        let (header, _) = etherparse::Ipv4Header::from_slice(&frame[14..]).unwrap();
        assert_eq!(header.header_checksum, header.calc_header_checksum());
        assert_eq!(header.identification, 0);
    } else {
        let label = u32::from_be_bytes([0, frame[15] & 0xf, frame[16], frame[17]]);
        assert_eq!(label, outer.flow_label);
    }
}

#[test]
fn l2_changes_the_macs_and_the_ttl_and_nothing_else() {
    for bytes in packets() {
        for (tags, link) in [(0, Link::Ethernet), (2, Link::Ethernet), (0, Link::Ip)] {
            let input = if link == Link::Ip { bytes.clone() } else { ethernet(tags, &bytes) };
            let (result, frame) =
                on(&input, link, |f, p| encapsulate(f, p, &outer(Method::L2, 4), 1500, &LINK));
            assert_eq!(result, Ok(()));
            let ethertype: &[u8] = if bytes[0] >> 4 == 4 { &[8, 0] } else { &[0x86, 0xdd] };
            assert_eq!(frame, [&LINK.destination, &LINK.source, ethertype, &one_hop_on(&bytes)].concat());
        }
    }
}

#[test]
fn type_of_service_and_fragmentation_go_by_the_arguments() {
    let mut bytes = samples::udp(6, b"x");
    bytes[0] = 0x6b;
    bytes[1] = 0x90;
    let mut clear = outer(Method::IpIp, 4);
    clear.dont_fragment = false;
    clear.identification = 0x1234;
    let (_, frame) = on(&bytes, Link::Ip, |f, p| encapsulate(f, p, &clear, 1500, &LINK));
    let (header, _) = etherparse::Ipv4Header::from_slice(&frame[14..]).unwrap();
    assert_eq!((header.dscp.value(), header.ecn.value()), (0xb9 >> 2, 1));
    assert_eq!((header.dont_fragment, header.identification), (false, 0x1234));
    assert_eq!(header.header_checksum, header.calc_header_checksum());
    let (_, frame) = on(&bytes, Link::Ip, |f, p| encapsulate(f, p, &outer(Method::Gue, 6), 1500, &LINK));
    assert_eq!(parse(frame.as_slice(), Link::Ethernet).unwrap().tos, 0xb9);
}

#[test]
fn what_is_too_big_is_left_as_it_came() {
    let bytes = ethernet(0, &samples::tcp(4, ACK, &[0; 1448]));
    assert_eq!(bytes.len(), 1514);
    for (method, family, fits) in [
        (Method::L2, 4, 1500),
        (Method::IpIp, 4, 1520),
        (Method::IpIp, 6, 1540),
        (Method::Gue, 4, 1528),
        (Method::Gue, 6, 1548),
    ] {
        let (result, _) =
            on(&bytes, Link::Ethernet, |f, p| encapsulate(f, p, &outer(method, family), fits, &LINK));
        assert_eq!(result, Ok(()));
        let (result, frame) =
            on(&bytes, Link::Ethernet, |f, p| encapsulate(f, p, &outer(method, family), fits - 1, &LINK));
        assert_eq!(result, Err(EncapError::TooBig { mtu: 1499 }));
        assert_eq!(frame, bytes);
        let (result, _) =
            on(&bytes, Link::Ethernet, |f, p| encapsulate(f, p, &outer(method, family), 3, &LINK));
        assert!(matches!(result, Err(EncapError::TooBig { mtu: 0 | 3 })));
    }
}

#[test]
fn the_last_hop_is_not_forwarded_but_may_be_handed_off() {
    for family in [4, 6] {
        let mut bytes = samples::udp(family, b"x");
        let at = if family == 4 { 8 } else { 7 };
        for (ttl, dead) in [(0, true), (1, true), (2, false)] {
            bytes[at] = ttl;
            for method in [Method::L2, Method::IpIp, Method::Gue] {
                let (result, frame) =
                    on(&bytes, Link::Ip, |f, p| encapsulate(f, p, &outer(method, 4), 1500, &LINK));
                assert_eq!(result.err(), dead.then_some(EncapError::TtlExpired));
                assert_eq!(frame == bytes, dead);
            }
            let header = HandOffHeader::new(1, 2, COOKIE);
            let (result, _) =
                on(&bytes, Link::Ip, |f, p| hand_off(f, p, &header, &outer(Method::Gue, 4), 1500, &LINK));
            assert_eq!(result, Ok(()));
        }
    }
}

#[test]
fn without_headroom_there_is_no_frame() {
    let mut bytes = ethernet(0, &samples::udp(4, b"x"));
    let packet = parse(bytes.as_slice(), Link::Ethernet).unwrap();
    for (start, result) in [(19, Err(EncapError::NoRoom)), (20, Ok(()))] {
        let mut storage = [&vec![0; start], bytes.as_slice()].concat();
        let mut frame = FrameBuf::new(&mut storage, start, bytes.len()).unwrap();
        assert_eq!(encapsulate(&mut frame, &packet, &outer(Method::IpIp, 4), 1500, &LINK), result);
    }
    // A packet that is not in the frame.
    let length = bytes.len() - 1;
    let mut frame = FrameBuf::new(&mut bytes, 0, length).unwrap();
    assert_eq!(forward_l2(&mut frame, &packet, 1500, &LINK), Err(EncapError::NoRoom));
}

#[test]
fn a_hand_off_comes_out_as_it_went_in() {
    let header = HandOffHeader::new(2, 0x0123_4567_89ab_cdef, COOKIE)
        .bypassing(MemberId(0x0a00_0001))
        .with_ports([1, 2], [3, 4]);
    for bytes in packets() {
        for family in [4, 6] {
            for checksum in [UdpChecksum::Zero, UdpChecksum::Full] {
                let outer = Outer { checksum, destination_port: GENEVE_PORT, ..outer(Method::L2, family) };
                let (result, mut frame) = on(&ethernet(1, &bytes), Link::Ethernet, |f, p| {
                    hand_off(f, p, &header, &outer, 1600, &LINK)
                });
                assert_eq!(result, Ok(()));
                assert_eq!(frame.len(), 14 + usize::from(hand_off_overhead(family)) + bytes.len());
                if checksum == UdpChecksum::Full {
                    assert_eq!(checksum_error(&frame[14..]), None);
                }
                frame.extend_from_slice(&[0xee; 3]);
                let packet = parse(frame.as_slice(), Link::Ethernet).unwrap();
                assert_eq!(packet.key.destination_port, GENEVE_PORT.to_be_bytes());
                let offset = usize::from(packet.payload_offset());
                let (read, inner) = parse_hand_off(frame.as_slice(), offset, [0, COOKIE]).unwrap();
                assert_eq!(read, header);
                assert_eq!(read.bypassed(), Some(MemberId(0x0a00_0001)));
                assert_eq!(read.ports(), Some(([1, 2], [3, 4])));
                let (opened, left) = on(&frame, Link::Ethernet, |f, p| open(f, p, inner));
                assert_eq!(left, bytes);
                assert_eq!(opened, parse(bytes.as_slice(), Link::Ip).map_err(OpenError::Parse));
            }
        }
    }
    let plain = HandOffHeader::new(1, 0, COOKIE);
    assert_eq!((plain.bypassed(), plain.ports()), (None, None));
}

/// A hand-off of an IPv4 packet after the UDP header.
fn geneve() -> Vec<u8> {
    let mut bytes = hand_off_bytes(&HandOffHeader::new(1, 2, COOKIE), 4).to_vec();
    bytes.extend_from_slice(&samples::udp(4, b"x"));
    bytes
}

fn hand_off_error(bytes: &[u8]) -> HandOffError {
    parse_hand_off(bytes, 0, [COOKIE; 2]).unwrap_err()
}

#[test]
fn damaged_hand_offs_are_named() {
    let good = geneve();
    assert_eq!(parse_hand_off(good.as_slice(), 0, [COOKIE; 2]).unwrap().1, GENEVE_LENGTH);
    let with = |at: usize, value: u8| {
        let mut bytes = good.clone();
        bytes[at] = value;
        hand_off_error(&bytes)
    };
    for length in 0..40 {
        assert_eq!(hand_off_error(&good[..length]), HandOffError::Truncated);
    }
    assert_eq!(with(0, 0x48), HandOffError::Version);
    assert_eq!(with(0, 0x3f), HandOffError::Truncated);
    assert_eq!(with(0, 7), HandOffError::OptionLength);
    assert_eq!(with(11, 8), HandOffError::OptionLength);
    assert_eq!(with(0, 0), HandOffError::NoOption);
    assert_eq!(with(10, 0x82), HandOffError::UnknownOption);
    // Without the critical bit an unknown option is ignored, and ours is missing.
    assert_eq!(with(10, 0x01), HandOffError::NoOption);
    assert_eq!(with(39, 0x89), HandOffError::Cookie);
    assert_eq!(with(32, 0x10), HandOffError::Cookie);
    assert_eq!(with(12, 0), HandOffError::Hops);
    assert_eq!(with(2, 0x09), HandOffError::Protocol);
    // A probe says so in its protocol too.
    assert_eq!(with(13, HandOffFlags::ECHO_REQUEST), HandOffError::Protocol);
}

#[test]
fn options_of_others_are_stepped_over_unless_critical() {
    let with = |option: &[u8]| {
        let mut bytes = geneve();
        bytes[0] += (option.len() / 4) as u8;
        bytes.splice(8..8, option.iter().copied());
        parse_hand_off(bytes.as_slice(), 0, [COOKIE; 2])
    };
    let harmless = [0xff, 0x01, 0x05, 0x01, 1, 2, 3, 4];
    let (header, inner) = with(&harmless).unwrap();
    assert_eq!((header, inner), (HandOffHeader::new(1, 2, COOKIE), 48));
    assert!(with(&harmless.repeat(3)).is_ok());
    assert_eq!(with(&harmless.repeat(4)), Err(HandOffError::UnknownOption));
    let mut critical = harmless;
    critical[2] |= 0x80;
    assert_eq!(with(&critical), Err(HandOffError::UnknownOption));
    assert_eq!(with(&geneve()[8..40]), Err(HandOffError::NoOption));
}

#[test]
fn a_probe_has_no_packet_inside() {
    for flags in [HandOffFlags::ECHO_REQUEST, HandOffFlags::ECHO_REPLY] {
        let header = HandOffHeader { flags: HandOffFlags(flags), ..HandOffHeader::new(1, 9, COOKIE) };
        let bytes = hand_off_bytes(&header, 0);
        assert_eq!(bytes[1], 0xc0, "control and critical");
        assert_eq!(parse_hand_off(&bytes[..], 0, [COOKIE; 2]), Ok((header, 40)));
    }
}

#[test]
fn congestion_outside_is_told_inside() {
    // (inner, outer, result) of RFC 6040 figure 4.
    let table = [
        (0, 0, Some(0)),
        (0, 1, Some(0)),
        (0, 2, Some(0)),
        (0, 3, None),
        (2, 0, Some(2)),
        (2, 1, Some(1)),
        (2, 2, Some(2)),
        (2, 3, Some(3)),
        (1, 0, Some(1)),
        (1, 1, Some(1)),
        (1, 2, Some(1)),
        (1, 3, Some(3)),
        (3, 0, Some(3)),
        (3, 1, Some(3)),
        (3, 2, Some(3)),
        (3, 3, Some(3)),
    ];
    for family in [4, 6] {
        for (inside, outside, result) in table {
            let mut bytes = samples::udp(family, b"x");
            let tos = 0xa0 | inside;
            if family == 4 {
                let (mut header, rest) = etherparse::Ipv4Header::from_slice(&bytes).unwrap();
                header.dscp = (tos >> 2).try_into().unwrap();
                header.ecn = inside.try_into().unwrap();
                header.header_checksum = header.calc_header_checksum();
                bytes = [&header.to_bytes()[..], rest].concat();
            } else {
                bytes[0] = 0x60 | tos >> 4;
                bytes[1] = tos << 4 | 7;
            }
            let (_, mut frame) =
                on(&bytes, Link::Ip, |f, p| encapsulate(f, p, &outer(Method::IpIp, 6), 1500, &LINK));
            frame[15] = frame[15] & 0xcf | outside << 4;
            let (opened, left) = on(&frame, Link::Ethernet, |f, p| open(f, p, usize::from(p.l4_offset)));
            match result {
                Some(ecn) => {
                    assert_eq!(opened.unwrap().tos, 0xa0 | ecn);
                    assert_eq!(parse(left.as_slice(), Link::Ip).unwrap().tos, 0xa0 | ecn);
                    assert_eq!(checksum_error(&left), None);
                    assert!(family == 4 || left[1] & 0xf == 7, "the flow label stays");
                }
                None => assert_eq!(opened, Err(OpenError::Congestion)),
            }
        }
    }
}

#[test]
fn the_client_is_told_what_fits() {
    for family in [4u8, 6] {
        let source = if family == 4 { mapped(US4) } else { US6 };
        let (most, header) = if family == 4 { (548, 20) } else { (1232, 40) };
        for size in [0, 1, 700, 1400] {
            let bytes = samples::tcp(family, ACK, &vec![0x5a; size]);
            let quote = &bytes[..bytes.len().min(most)];
            for (tags, link) in [(0usize, None), (2, None), (1, Some(&LINK)), (9, None), (9, Some(&LINK))] {
                let bare = tags == 9;
                let input = if bare { bytes.clone() } else { ethernet(tags, &bytes) };
                let from = if bare { Link::Ip } else { Link::Ethernet };
                let (result, frame) = on(&input, from, |f, p| too_big(f, p, 1400, source, link));
                assert_eq!(result, Ok(()));
                let l3 = match (link, bare) {
                    (Some(_), _) => {
                        assert_eq!(frame[..12], [LINK.destination, LINK.source].concat());
                        14
                    }
                    (None, true) => 0,
                    (None, false) => {
                        // The way it came: MAC addresses swapped, tags kept.
                        assert_eq!(frame[..12], [MAC_A, MAC_B].concat());
                        assert_eq!(frame[12..14 + tags * 4], input[12..14 + tags * 4]);
                        14 + tags * 4
                    }
                };
                let ip = &frame[l3..];
                assert_eq!(checksum_error(ip), None);
                assert_eq!(ip.len(), header + 8 + quote.len());
                assert_eq!(&ip[header + 8..], quote);
                check_too_big(ip);
            }
        }
    }
}

fn check_too_big(ip: &[u8]) {
    let sliced = SlicedPacket::from_ip(ip).unwrap();
    match (sliced.net.unwrap(), sliced.transport.unwrap()) {
        (NetSlice::Ipv4(v4), TransportSlice::Icmpv4(icmp)) => {
            assert_eq!((v4.header().source(), v4.header().destination()), (US4, CLIENT4));
            assert_eq!(
                icmp.icmp_type(),
                Icmpv4Type::DestinationUnreachable(DestUnreachableHeader::FragmentationNeeded {
                    next_hop_mtu: 1400
                })
            );
        }
        (NetSlice::Ipv6(v6), TransportSlice::Icmpv6(icmp)) => {
            assert_eq!((v6.header().source(), v6.header().destination()), (US6, CLIENT6));
            assert_eq!(icmp.icmp_type(), Icmpv6Type::PacketTooBig { mtu: 1400 });
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn time_exceeded_has_its_type() {
    for (family, source, kind) in [(4, mapped(US4), 11), (6, US6, 3)] {
        let bytes = samples::udp(family, b"x");
        let (result, frame) =
            on(&bytes, Link::Ip, |f, p| icmp_error(f, p, IcmpError::TimeExceeded, source, None));
        assert_eq!(result, Ok(()));
        assert_eq!(checksum_error(&frame), None);
        assert_eq!(frame[if family == 4 { 20 } else { 40 }], kind);
    }
}

#[test]
fn errors_fragments_and_nobody_get_no_error() {
    let told = |bytes: &[u8]| {
        let (result, frame) = on(bytes, Link::Ip, |f, p| too_big(f, p, 1400, mapped(US4), None));
        assert_eq!(result.is_err(), frame == bytes);
        result
    };
    assert_eq!(told(&samples::udp(4, b"x")), Ok(()));
    assert_eq!(told(&samples::ping(4)), Ok(()));
    let error = samples::icmp(4, 3, 1, [0; 4], &samples::reply(4, UDP, b""));
    assert_eq!(told(&error), Err(ReplyError::NotAllowed));
    assert_eq!(told(&samples::icmp(4, 5, 1, [0; 4], &[0; 28])), Err(ReplyError::NotAllowed));
    assert_eq!(told(&samples::fragment4(9, false, b"x")), Err(ReplyError::NotAllowed));
    for source in [[0, 0, 0, 0], [127, 0, 0, 1], [224, 0, 0, 1], [255; 4], SERVICE4] {
        let mut bytes = samples::udp(4, b"x");
        bytes[12..16].copy_from_slice(&source);
        assert_eq!(told(&bytes), Err(ReplyError::NotAllowed), "{source:?}");
    }
    for (first, last, wrong) in [(0xff, 1, true), (0, 0, true), (0, 1, true), (0, 2, false), (0x20, 1, false)]
    {
        let mut bytes = samples::udp(6, b"x");
        bytes[8..24].fill(0);
        bytes[8] = first;
        bytes[23] = last;
        assert_eq!(told(&bytes).is_err(), wrong);
    }
}

#[test]
fn a_ping_is_answered() {
    for family in [4, 6] {
        let bytes = samples::ping(family);
        let mut padded = ethernet(1, &bytes);
        padded.extend_from_slice(&[0xee; 9]);
        let (result, frame) = on(&padded, Link::Ethernet, |f, p| echo_reply(f, p, None));
        assert_eq!(result, Ok(()));
        assert_eq!(frame.len(), 18 + bytes.len());
        assert_eq!(frame[..18], [&MAC_A, &MAC_B, &padded[12..18]].concat());
        let ip = &frame[18..];
        assert_eq!(checksum_error(ip), None);
        let echo = IcmpEchoHeader { id: 7, seq: 8 };
        let sliced = SlicedPacket::from_ip(ip).unwrap();
        match (sliced.net.unwrap(), sliced.transport.unwrap()) {
            (NetSlice::Ipv4(v4), TransportSlice::Icmpv4(icmp)) => {
                assert_eq!((v4.header().source(), v4.header().destination()), (SERVICE4, CLIENT4));
                assert_eq!(v4.header().ttl(), 64);
                assert_eq!(icmp.icmp_type(), Icmpv4Type::EchoReply(echo));
                assert_eq!(icmp.payload(), b"are you there?");
            }
            (NetSlice::Ipv6(v6), TransportSlice::Icmpv6(icmp)) => {
                assert_eq!((v6.header().source(), v6.header().destination()), (SERVICE6, CLIENT6));
                assert_eq!(v6.header().hop_limit(), 64);
                assert_eq!(icmp.icmp_type(), Icmpv6Type::EchoReply(echo));
                assert_eq!(icmp.payload(), b"are you there?");
            }
            other => panic!("{other:?}"),
        }
        let (result, _) = on(&bytes, Link::Ip, |f, p| echo_reply(f, p, Some(&LINK)));
        assert_eq!(result, Ok(()));
        let (result, frame) = on(&samples::udp(family, b"x"), Link::Ip, |f, p| echo_reply(f, p, None));
        assert_eq!((result, frame), (Err(ReplyError::NotAllowed), samples::udp(family, b"x")));
    }
}

#[test]
fn sources_spread_within_their_bits_only() {
    let source = mapped([10, 0, 0xff, 0xff]);
    assert_eq!(spread_source(source, 0, HASH), source);
    for bits in 1..=16 {
        let low = |address: [u8; 16]| u16::from_be_bytes([address[14], address[15]]);
        let spread = spread_source(source, bits, HASH);
        assert_eq!(spread[..14], source[..14]);
        assert_eq!(u32::from(low(spread)) >> bits, 0xffff >> bits);
        assert_eq!(u32::from(low(spread)) % (1 << bits), (HASH >> 32) as u32 % (1 << bits));
    }
    assert_eq!(spread_source(source, 99, HASH), spread_source(source, 16, HASH));
    for hash in [0, HASH, u64::MAX] {
        assert!(source_port(hash) >= 49_152);
    }
    assert_ne!(source_port(0), source_port(1 << 32));
}

proptest! {
    #[test]
    fn arbitrary_hand_offs_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..120), offset in 0..8usize) {
        if let Ok((_, inner)) = parse_hand_off(bytes.as_slice(), offset, [COOKIE, 0]) {
            prop_assert!(inner <= bytes.len());
        }
    }

    #[test]
    fn damaged_hand_offs_never_panic(
        damage in prop::collection::vec((0..44usize, any::<u8>()), 0..4),
        cut in any::<prop::sample::Index>(),
    ) {
        let mut bytes = geneve();
        for (at, value) in damage {
            bytes[at] = value;
        }
        bytes.truncate(cut.index(bytes.len()) + 1);
        if let Ok((_, inner)) = parse_hand_off(bytes.as_slice(), 0, [COOKIE; 2]) {
            prop_assert!(inner <= bytes.len());
        }
    }

    #[test]
    fn the_ttl_keeps_every_checksum_right(ttl in 2u8.., id: u16, payload in prop::collection::vec(any::<u8>(), 0..50)) {
        let mut bytes = samples::udp(4, &payload);
        let (mut header, rest) = etherparse::Ipv4Header::from_slice(&bytes).unwrap();
        header.identification = id;
        header.time_to_live = ttl;
        header.header_checksum = header.calc_header_checksum();
        bytes = [&header.to_bytes()[..], rest].concat();
        let (result, frame) = on(&bytes, Link::Ip, |f, _| decrement_ttl(f, 4, 0));
        prop_assert_eq!(result, Ok(()));
        prop_assert_eq!(checksum_error(&frame), None);
        prop_assert_eq!(frame[8], ttl - 1);
    }

    #[test]
    fn sums_agree_whichever_way_they_are_taken(bytes in prop::collection::vec(any::<u8>(), 0..300), offset in 0..5usize) {
        let mut naive = 0u64;
        for pair in bytes.chunks(2) {
            naive += u64::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
        }
        let framed = [&vec![0xff; offset], bytes.as_slice()].concat();
        let of_frame = checksum::of_frame(framed.as_slice(), offset, bytes.len()).unwrap();
        prop_assert_eq!(of_frame, naive);
        prop_assert_eq!(checksum::finish(checksum::of_slice(&bytes)), checksum::finish(naive));
        prop_assert_eq!(checksum::of_frame(framed.as_slice(), offset, bytes.len() + 1), None);
    }

    #[test]
    fn an_updated_checksum_is_the_whole_one(words in prop::array::uniform5(any::<u16>()), at in 0..5usize, new: u16) {
        // RFC 1624 §4: a header is never all zeros, and only then do the two differ.
        prop_assume!(words.iter().enumerate().any(|(i, word)| i != at && *word != 0));
        let sum = |words: &[u16]| checksum::finish(words.iter().map(|word| u64::from(*word)).sum());
        let mut changed = words;
        changed[at] = new;
        prop_assert_eq!(checksum::update(sum(&words), words[at], new), sum(&changed));
    }

    #[test]
    fn a_checksum_updated_for_the_time_to_live_is_the_general_one(checksum: u16, ttl in 1..=255u8, protocol: u8) {
        let word = |ttl| u16::from_be_bytes([ttl, protocol]);
        let general = checksum::update(checksum, word(ttl), word(ttl - 1));
        prop_assert_eq!(checksum::with_lower_ttl(checksum.to_be_bytes()), general.to_be_bytes());
    }
}
