use std::vec;
use std::vec::Vec;

use etherparse::{IpHeaders, Ipv4Header, Ipv6Header, SlicedPacket, TransportSlice};
use proptest::prelude::*;

use super::samples::{self, CLIENT_PORT, CLIENT4, CLIENT6, SERVICE_PORT, SERVICE4, SERVICE6, ethernet};
use super::tcp_flags::{ACK, FIN, RST, SYN};
use super::{Fragment, Frame, FrameBuf, Link, Packet, PacketKind, Reader, Reason, parse, parse_plain};
use crate::key::{FlowKey, ICMP, ICMPV6, TCP, UDP, mapped};

fn key(family: u8, protocol: u8) -> FlowKey {
    let (source, destination) =
        if family == 4 { (mapped(CLIENT4), mapped(SERVICE4)) } else { (CLIENT6, SERVICE6) };
    FlowKey {
        source,
        destination,
        source_port: CLIENT_PORT.to_be_bytes(),
        destination_port: SERVICE_PORT.to_be_bytes(),
        protocol,
        family,
        reserved: [0; 2],
    }
}

fn without_ports(key: FlowKey) -> FlowKey {
    FlowKey { source_port: [0; 2], destination_port: [0; 2], ..key }
}

fn ip(bytes: &[u8]) -> Packet {
    parse(bytes, Link::Ip).unwrap()
}

fn reason(bytes: &[u8]) -> Reason {
    parse(bytes, Link::Ip).unwrap_err().reason
}

#[test]
fn a_tcp_segment_is_read_behind_any_link_header() {
    for family in [4, 6] {
        let bytes = samples::tcp(family, ACK, b"hello");
        for (tags, l3) in [(0, 14), (1, 18), (2, 22)] {
            let packet = parse(ethernet(tags, &bytes).as_slice(), Link::Ethernet).unwrap();
            let header: u16 = if family == 4 { 20 } else { 40 };
            assert_eq!(
                packet,
                Packet {
                    key: key(family, TCP),
                    kind: PacketKind::Tcp { flags: ACK },
                    fragment: Fragment::Whole,
                    tcp_sequence: 0x0102_0304,
                    tcp_acknowledgment: 0x0a0b_0c0d,
                    l3_offset: l3,
                    l3_length: header + 37,
                    l4_offset: l3 + header,
                    l4_length: 37,
                    payload_length: 5,
                    ttl: 63,
                    tos: 0,
                    dont_fragment: true,
                }
            );
            assert_eq!(packet.payload_offset(), l3 + header + 32);
            assert_eq!(packet.fragment_key(), None);
        }
        let three = parse(ethernet(3, &bytes).as_slice(), Link::Ethernet).unwrap_err();
        assert_eq!(three.reason, Reason::VlanDepth);
        assert_eq!(three.family, 0);
    }
}

#[test]
fn only_a_syn_without_ack_opens_a_connection() {
    for family in [4, 6] {
        assert_eq!(ip(&samples::tcp(family, SYN, b"")).kind, PacketKind::TcpSyn);
        for flags in [SYN | ACK, ACK, FIN | ACK, RST, 0] {
            assert_eq!(ip(&samples::tcp(family, flags, b"")).kind, PacketKind::Tcp { flags });
        }
        assert_eq!(reason(&samples::tcp(family, SYN | FIN, b"")), Reason::TcpFlags);
        assert_eq!(reason(&samples::tcp(family, SYN | RST | ACK, b"")), Reason::TcpFlags);
    }
}

#[test]
fn padding_of_a_short_frame_is_not_payload() {
    let mut frame = ethernet(0, &samples::tcp(4, ACK, b""));
    frame.resize(80, 0xee);
    assert_eq!(parse(frame.as_slice(), Link::Ethernet).unwrap().payload_length, 0);
    assert_eq!(parse(frame.as_slice(), Link::Ethernet).unwrap().l3_length, 52);
    // Its twin: where the IP length says so, the same bytes are payload.
    frame[17] = 66;
    assert_eq!(parse(frame.as_slice(), Link::Ethernet).unwrap().payload_length, 14);
}

#[test]
fn every_cut_has_a_reason_and_none_panics() {
    for bytes in [
        samples::tcp(4, ACK, b"x"),
        samples::tcp(6, ACK, b"x"),
        samples::udp(4, b"x"),
        samples::udp(6, b"x"),
        samples::ping(4),
        samples::ping(6),
        samples::fragment4(100, false, b"x"),
        samples::fragment6(100, false, b"x"),
    ] {
        let frame = ethernet(1, &bytes);
        for length in 0..frame.len() {
            let error = parse(&frame[..length], Link::Ethernet).unwrap_err();
            let expected: &[Reason] = match length {
                0..18 => &[Reason::EthernetTruncated],
                _ => &[
                    Reason::Ipv4Truncated,
                    Reason::Ipv4TotalLength,
                    Reason::Ipv6Truncated,
                    Reason::Ipv6PayloadLength,
                ],
            };
            assert!(expected.contains(&error.reason), "{length}: {error}");
        }
        assert!(parse(frame.as_slice(), Link::Ethernet).is_ok());
    }
}

#[test]
fn lying_ipv4_headers_are_named() {
    let good = samples::tcp(4, ACK, b"x");
    let with = |at: usize, value: u8| {
        let mut bytes = good.clone();
        bytes[at] = value;
        parse(bytes.as_slice(), Link::Ip)
    };
    assert_eq!(with(0, 0x44).unwrap_err().reason, Reason::Ipv4HeaderLength);
    assert_eq!(with(0, 0x4f).unwrap_err().reason, Reason::Ipv4HeaderLength);
    assert_eq!(with(0, 0x4a).unwrap_err().reason, Reason::TcpTruncated);
    assert_eq!(with(3, 19).unwrap_err().reason, Reason::Ipv4HeaderLength);
    assert_eq!(with(2, 1).unwrap_err().reason, Reason::Ipv4TotalLength);
    assert_eq!(with(0, 0x55).unwrap_err().reason, Reason::IpVersion);
    // TCP data offset of 16, and of 60 bytes where there are 33.
    assert_eq!(with(32, 0x40).unwrap_err().reason, Reason::TcpDataOffset);
    assert_eq!(with(32, 0xf0).unwrap_err().reason, Reason::TcpDataOffset);
    assert!(with(32, 0x50).is_ok());
    // Whoever it is for is known all the same.
    let error = with(32, 0x40).unwrap_err();
    assert_eq!((error.family, error.destination), (4, mapped(SERVICE4)));
}

#[test]
fn the_ethertype_must_name_the_version() {
    let mut frame = ethernet(0, &samples::tcp(4, ACK, b"padding to forty bytes and more"));
    frame[12..14].copy_from_slice(&[0x86, 0xdd]);
    assert_eq!(parse(frame.as_slice(), Link::Ethernet).unwrap_err().reason, Reason::IpVersion);
    frame[12..14].copy_from_slice(&[0x08, 0x06]);
    assert_eq!(parse(frame.as_slice(), Link::Ethernet).unwrap_err().reason, Reason::NotIp);
    assert_eq!(reason(&[0x50; 60]), Reason::IpVersion);
    assert_eq!(reason(&[]), Reason::Ipv4Truncated);
}

#[test]
fn ipv4_options_are_stepped_over() {
    let mut header = Ipv4Header::new(0, 9, etherparse::IpNumber::TCP, CLIENT4, SERVICE4).unwrap();
    header.options = [148, 4, 0, 0].into();
    header.dscp = 10.try_into().unwrap();
    header.ecn = 1.try_into().unwrap();
    header.dont_fragment = false;
    let mut bytes = Vec::new();
    etherparse::PacketBuilder::ip(IpHeaders::Ipv4(header, Default::default()))
        .tcp_header(samples::tcp_header(SYN))
        .write_to_vec(&mut bytes, b"abc")
        .unwrap();
    let packet = ip(&bytes);
    assert_eq!((packet.l4_offset, packet.payload_length, packet.ttl), (24, 3, 9));
    assert_eq!((packet.tos, packet.dont_fragment), (10 << 2 | 1, false));
    assert_eq!(packet.key, key(4, TCP));
}

#[test]
fn the_traffic_class_is_read_across_two_bytes() {
    let mut bytes = samples::udp(6, b"x");
    bytes[0] = 0x6b;
    bytes[1] = 0x93;
    assert_eq!(ip(&bytes).tos, 0xb9);
}

#[test]
fn udp_lengths_are_checked() {
    for family in [4, 6] {
        let good = samples::udp(family, b"12345678");
        let packet = ip(&good);
        assert_eq!((packet.kind, packet.payload_length), (PacketKind::Datagram, 8));
        assert_eq!(packet.key, key(family, UDP));
        let length_at = usize::from(packet.l4_offset) + 5;
        for (length, wrong) in [(7, true), (8, false), (16, false), (17, true), (0, true)] {
            let mut bytes = good.clone();
            bytes[length_at] = length;
            let result = parse(bytes.as_slice(), Link::Ip).map_err(|error| error.reason);
            assert_eq!(result.err(), wrong.then_some(Reason::UdpLength), "{length}");
        }
    }
}

#[test]
fn extension_headers_are_looked_through() {
    let options = |next: u8| [next, 0, 1, 4, 0, 0, 0, 0];
    let tcp = samples::tcp(6, SYN, b"");
    let mut rest = Vec::new();
    // Hop-by-hop, destination options, routing (nothing left), an atomic fragment, destination options, TCP.
    rest.extend(options(60));
    rest.extend(options(43));
    rest.extend([44, 0, 4, 0, 0, 0, 0, 0]);
    rest.extend([60, 0, 0, 0, 0, 0, 0, 9]);
    rest.extend(options(TCP));
    rest.extend(&tcp[40..]);
    let packet = ip(&samples::ipv6(0, &rest));
    assert_eq!((packet.kind, packet.l4_offset, packet.fragment), (PacketKind::TcpSyn, 80, Fragment::Whole));
    assert_eq!(packet.key, key(6, TCP));

    let mut left = rest.clone();
    left[19] = 1;
    assert_eq!(reason(&samples::ipv6(0, &left)), Reason::Ipv6SegmentsLeft);
    let late = [&options(0)[..], &options(TCP), &tcp[40..]].concat();
    assert_eq!(reason(&samples::ipv6(60, &late)), Reason::Ipv6ExtensionOrder);
    let twice = [&[44, 0, 0, 0, 0, 0, 0, 9], &[TCP, 0, 0, 0, 0, 0, 0, 9][..], &tcp[40..]].concat();
    assert_eq!(reason(&samples::ipv6(44, &twice)), Reason::Ipv6ExtensionOrder);
    assert_eq!(ip(&samples::ipv6(44, &twice[8..])).kind, PacketKind::TcpSyn);
    let mut long = rest.clone();
    long[1] = 200;
    assert_eq!(reason(&samples::ipv6(0, &long)), Reason::Ipv6ExtensionTruncated);
    assert_eq!(reason(&samples::ipv6(60, &[60, 0, 0])), Reason::Ipv6ExtensionTruncated);
    assert_eq!(reason(&samples::ipv6(0, &[])), Reason::Ipv6Jumbogram);

    // Six are looked through, seven are not.
    for (count, wrong) in [(6usize, false), (7, true)] {
        let mut chain = options(60).repeat(count);
        let last = chain.len() - 8;
        chain[last] = TCP;
        chain.extend(&tcp[40..]);
        let result = parse(samples::ipv6(60, &chain).as_slice(), Link::Ip).map_err(|error| error.reason);
        assert_eq!(result.err(), wrong.then_some(Reason::Ipv6ExtensionCount));
    }
}

#[test]
fn all_fragments_of_a_datagram_share_a_key() {
    let mut first = samples::udp_header(2000).to_vec();
    first.resize(1480, 7);
    let rest = vec![7; 520];
    for (first, later, id) in [
        (samples::fragment4(0, true, &first), samples::fragment4(185, false, &rest), 0xbeef),
        (samples::fragment6(0, true, &first), samples::fragment6(185, false, &rest), 0xdead_beef),
    ] {
        let (first, later) = (ip(&first), ip(&later));
        assert_eq!((first.kind, first.fragment), (PacketKind::Datagram, Fragment::First { id }));
        assert_eq!((later.kind, later.fragment), (PacketKind::LaterFragment, Fragment::Later { id }));
        assert_eq!(first.key, key(first.key.family, UDP));
        assert_eq!(later.key, without_ports(first.key));
        let shared = first.fragment_key().unwrap();
        assert_eq!(Some(shared), later.fragment_key());
        assert_eq!([shared.source_port, shared.destination_port].concat(), id.to_be_bytes());
    }
    let another = {
        let mut bytes = samples::fragment4(185, false, &rest);
        bytes[5] ^= 1;
        ip(&bytes)
    };
    assert_ne!(another.fragment_key(), ip(&samples::fragment4(185, false, &rest)).fragment_key());
}

#[test]
fn an_ipv6_fragment_key_does_not_depend_on_headers_that_only_the_first_fragment_has() {
    let fragment = |next: u8, field: u16, payload: &[u8]| {
        let [f0, f1] = field.to_be_bytes();
        samples::ipv6(44, &[&[next, 0, f0, f1, 1, 2, 3, 4], payload].concat())
    };
    let first =
        fragment(60, 1, &[&[UDP, 0, 1, 4, 0, 0, 0, 0], &samples::udp_header(100)[..], &[0; 8]].concat());
    let later = fragment(60, 24, &[0; 8]);
    assert_eq!(ip(&first).key.protocol, UDP);
    assert_eq!(ip(&later).key.protocol, 60);
    assert_eq!(ip(&first).fragment_key(), ip(&later).fragment_key());
}

#[test]
fn impossible_fragments_are_named() {
    let sixteen = [0u8; 16];
    // More to come, but not a multiple of eight; nothing inside; beyond 65,535.
    assert_eq!(reason(&samples::fragment4(1, true, &sixteen[..15])), Reason::FragmentRange);
    assert_eq!(reason(&samples::fragment4(1, false, &[])), Reason::FragmentRange);
    assert_eq!(reason(&samples::fragment4(8190, false, &sixteen)), Reason::FragmentRange);
    assert_eq!(reason(&samples::fragment6(1, true, &sixteen[..15])), Reason::FragmentRange);
    assert_eq!(reason(&samples::fragment6(8191, false, &sixteen)), Reason::FragmentRange);
    assert!(parse(samples::fragment4(8187, false, &sixteen[..15]).as_slice(), Link::Ip).is_ok());
    // A first fragment that ends within the headers.
    let tcp = samples::tcp(6, ACK, b"");
    let mut rest = vec![TCP, 0, 0, 1, 0, 0, 0, 1];
    rest.extend(&tcp[40..56]);
    assert_eq!(reason(&samples::ipv6(44, &rest)), Reason::FragmentTiny);
    let mut rest = vec![60, 0, 0, 1, 0, 0, 0, 1];
    rest.extend([TCP, 1, 0, 0, 0, 0, 0, 0]);
    assert_eq!(reason(&samples::ipv6(44, &rest)), Reason::FragmentTiny);
    // One that would overwrite TCP's flags.
    let mut overlap = samples::fragment4(1, false, &sixteen);
    assert!(parse(overlap.as_slice(), Link::Ip).is_ok());
    overlap[9] = TCP;
    assert_eq!(reason(&overlap), Reason::FragmentTiny);
}

#[test]
fn an_icmp_error_has_the_key_of_its_flow() {
    for family in [4, 6] {
        let (kinds, header): (&[u8], usize) =
            if family == 4 { (&[3, 11, 12], 20) } else { (&[1, 2, 3, 4], 40) };
        for protocol in [TCP, UDP] {
            let whole = samples::reply(family, protocol, b"a response");
            for quoted in [&whole[..], &whole[..header + 8]] {
                for kind in kinds {
                    let packet = ip(&samples::icmp(family, *kind, 1, [0; 4], quoted));
                    assert_eq!(packet.kind, PacketKind::IcmpError);
                    assert_eq!(packet.key, key(family, protocol));
                }
            }
            let cut = samples::icmp(family, kinds[0], 0, [0; 4], &whole[..header + 3]);
            assert_eq!(reason(&cut), Reason::QuoteTruncated);
            let cut = samples::icmp(family, kinds[0], 0, [0; 4], &whole[..header - 1]);
            assert_eq!(reason(&cut), Reason::QuoteTruncated);
            // Any other type is nobody's flow.
            assert_eq!(ip(&samples::icmp(family, 200, 0, [0; 4], &whole)).kind, PacketKind::Other);
        }
        let kind = kinds[0];
        let quote = samples::reply(family, TCP, b"");
        let mut foreign = quote.clone();
        foreign[if family == 4 { 15 } else { 23 }] ^= 1;
        assert_eq!(reason(&samples::icmp(family, kind, 0, [0; 4], &foreign)), Reason::QuoteMismatch);
        let mut odd = quote.clone();
        odd[0] ^= 0x20;
        assert_eq!(reason(&samples::icmp(family, kind, 0, [0; 4], &odd)), Reason::QuoteOdd);
        let mut other = quote.clone();
        other[if family == 4 { 9 } else { 6 }] = 132;
        assert_eq!(reason(&samples::icmp(family, kind, 0, [0; 4], &other)), Reason::QuoteUnsupported);
    }
    let mut later = samples::reply(4, UDP, b"");
    later[7] = 9;
    assert_eq!(reason(&samples::icmp(4, 3, 4, [0; 4], &later)), Reason::QuoteUnsupported);
    let error = parse(samples::icmp(4, 3, 4, [0; 4], &later).as_slice(), Link::Ip).unwrap_err();
    assert_eq!(error.destination, mapped(SERVICE4));
}

#[test]
fn pings_and_neighbours_are_told_apart() {
    assert_eq!(ip(&samples::ping(4)).kind, PacketKind::EchoRequest);
    assert_eq!(ip(&samples::ping(6)).kind, PacketKind::EchoRequest);
    assert_eq!(ip(&samples::ping(4)).key.protocol, ICMP);
    assert_eq!(ip(&samples::ping(6)).key.protocol, ICMPV6);
    for kind in 133..=137 {
        assert_eq!(ip(&samples::icmp(6, kind, 0, [0; 4], &[0; 16])).kind, PacketKind::NeighbourDiscovery);
    }
    assert_eq!(ip(&samples::icmp(6, 132, 0, [0; 4], &[0; 16])).kind, PacketKind::Other);
    assert_eq!(ip(&samples::icmp(4, 0, 0, [0; 4], &[0; 16])).kind, PacketKind::Other);
    // ICMP over the wrong IP is just another protocol.
    assert_eq!(ip(&samples::ipv6(ICMP, &[8, 0, 0, 0, 0, 0, 0, 0])).kind, PacketKind::Other);
}

#[test]
fn a_frame_buffer_moves_within_its_storage_only() {
    let mut storage = [0u8; 10];
    assert!(FrameBuf::new(&mut storage, 4, 7).is_none());
    assert!(FrameBuf::new(&mut storage, usize::MAX, 2).is_none());
    let mut frame = FrameBuf::new(&mut storage, 4, 4).unwrap();
    assert!(frame.write(2, [1, 2]));
    assert!(!frame.write(3, [9, 9]));
    assert_eq!(frame.bytes(), [0, 0, 1, 2]);
    assert!(!frame.move_head(-5));
    assert!(frame.move_head(-4));
    assert_eq!(frame.read::<2>(6), Some([1, 2]));
    assert_eq!(frame.read::<2>(7), None);
    assert!(!frame.move_head(9));
    assert!(frame.truncate(7));
    assert!(!frame.truncate(8));
    assert_eq!((frame.start(), frame.end(), frame.len()), (0, 7, 7));
}

#[test]
fn every_reason_has_a_name_of_its_own() {
    let mut names: Vec<_> = Reason::ALL.iter().map(|reason| reason.name()).collect();
    assert_eq!(Reason::ALL.iter().map(|reason| *reason as usize).max(), Some(names.len() - 1));
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), Reason::ALL.len());
}

#[test]
fn plain_packets_are_whole_tcp_and_udp_without_anything_between_the_headers() {
    for family in [4, 6] {
        let is_plain = |frame: &[u8]| match family {
            4 => parse_plain::<_, 4>(frame).is_some() && parse_plain::<_, 6>(frame).is_none(),
            _ => parse_plain::<_, 6>(frame).is_some() && parse_plain::<_, 4>(frame).is_none(),
        };
        for packet in
            [samples::tcp(family, SYN, b""), samples::tcp(family, ACK, b"x"), samples::udp(family, b"x")]
        {
            assert!(is_plain(&ethernet(0, &packet)));
            assert!(!is_plain(&ethernet(1, &packet)), "a VLAN tag");
        }
        assert!(!is_plain(&ethernet(0, &samples::ping(family))));
    }
    let later = [&samples::udp_header(300)[..], &[1; 64]].concat();
    assert_eq!(parse_plain::<_, 4>(ethernet(0, &samples::fragment4(0, true, &later)).as_slice()), None);
    assert_eq!(parse_plain::<_, 6>(ethernet(0, &samples::fragment6(0, true, &later)).as_slice()), None);
}

/// A good packet of some kind, to be damaged.
fn any_packet() -> impl Strategy<Value = Vec<u8>> {
    (0..8usize, prop::sample::select(vec![4u8, 6]), prop::collection::vec(any::<u8>(), 0..200)).prop_map(
        |(which, family, payload)| match which {
            0 => samples::tcp(family, SYN, &payload),
            1 => samples::tcp(family, ACK, &payload),
            2 => samples::udp(family, &payload),
            3 => samples::ping(family),
            4 => samples::icmp(
                family,
                if family == 4 { 3 } else { 2 },
                4,
                [0; 4],
                &samples::reply(family, TCP, &payload),
            ),
            5 => samples::fragment4(0, true, &[&samples::udp_header(300)[..], &[1; 64]].concat()),
            6 => samples::fragment6(3, false, &[&payload[..], b"x"].concat()),
            _ => samples::ipv6(
                0,
                &[
                    &[60, 0, 1, 4, 0, 0, 0, 0, UDP, 0, 1, 4, 0, 0, 0, 0][..],
                    &samples::udp_header(8),
                    &payload,
                ]
                .concat(),
            ),
        },
    )
}

/// What must be true of every packet that is accepted, however odd.
fn consistent(frame: &[u8], packet: &Packet) {
    assert!(usize::from(packet.l3_offset) + usize::from(packet.l3_length) <= frame.len());
    assert!(packet.l4_offset >= packet.l3_offset + if packet.key.family == 4 { 20 } else { 40 });
    assert_eq!(
        usize::from(packet.l4_offset) + usize::from(packet.l4_length),
        usize::from(packet.l3_offset) + usize::from(packet.l3_length)
    );
    assert!(packet.payload_length <= packet.l4_length);
}

proptest! {
    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), link in any::<bool>()) {
        let link = if link { Link::Ethernet } else { Link::Ip };
        if let Ok(packet) = parse(bytes.as_slice(), link) {
            consistent(&bytes, &packet);
        }
    }

    #[test]
    fn damaged_packets_never_panic(
        mut bytes in any_packet(),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        cut in any::<prop::sample::Index>(),
        tags in 0..3usize,
    ) {
        for (at, value) in damage {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        bytes.truncate(cut.index(bytes.len()) + 1);
        let frame = ethernet(tags, &bytes);
        if let Ok(packet) = parse(frame.as_slice(), Link::Ethernet) {
            consistent(&frame, &packet);
        }
    }

    /// And so is everything that the program in the kernel decides in one piece.
    #[test]
    fn a_plain_packet_is_read_as_any_is(
        mut bytes in any_packet(),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..3),
        tags in 0..2usize,
    ) {
        for (at, value) in damage {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        let frame = ethernet(tags, &bytes);
        for packet in [parse_plain::<_, 4>(frame.as_slice()), parse_plain::<_, 6>(frame.as_slice())].into_iter().flatten() {
            prop_assert_eq!(parse(frame.as_slice(), Link::Ethernet), Ok(packet));
            prop_assert_eq!((packet.fragment, packet.l3_offset), (Fragment::Whole, 14));
        }
    }

    #[test]
    fn good_packets_are_read_as_the_oracle_reads_them(bytes in any_packet(), tags in 0..3usize) {
        let frame = ethernet(tags, &bytes);
        let packet = parse(frame.as_slice(), Link::Ethernet);
        let oracle = SlicedPacket::from_ethernet(&frame).unwrap();
        let Some(TransportSlice::Tcp(tcp)) = &oracle.transport else { return Ok(()) };
        let packet = packet.unwrap();
        prop_assert_eq!(packet.key.source_port, tcp.source_port().to_be_bytes());
        prop_assert_eq!(packet.key.destination_port, tcp.destination_port().to_be_bytes());
        prop_assert_eq!(packet.tcp_sequence, tcp.sequence_number());
        prop_assert_eq!(packet.tcp_acknowledgment, tcp.acknowledgment_number());
        prop_assert_eq!(usize::from(packet.payload_length), tcp.payload().len());
        prop_assert_eq!(&frame[usize::from(packet.payload_offset())..], tcp.payload());
    }

    /// The oracle accepts whatever we accept; what we refuse and it does not is what it does not check.
    #[test]
    fn what_is_accepted_the_oracle_accepts(mut bytes in any_packet(), at in any::<prop::sample::Index>(), value: u8) {
        let at = at.index(bytes.len());
        bytes[at] = value;
        if parse(bytes.as_slice(), Link::Ip).is_ok() {
            match bytes[0] >> 4 {
                4 => prop_assert!(Ipv4Header::from_slice(&bytes).is_ok()),
                _ => prop_assert!(Ipv6Header::from_slice(&bytes).is_ok()),
            }
        }
    }
}
