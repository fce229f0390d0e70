//! Packets for tests, built by `etherparse` so that our own code does not vouch for itself.

use std::vec;
use std::vec::Vec;

use etherparse::{
    IpFragOffset, IpNumber, Ipv4Header, Ipv6FragmentHeader, NetSlice, PacketBuilder, PacketBuilderStep,
    SlicedPacket, TcpHeader, TransportSlice,
};

use super::tcp_flags;

pub(crate) const CLIENT4: [u8; 4] = [198, 51, 100, 7];
pub(crate) const SERVICE4: [u8; 4] = [203, 0, 113, 80];
pub(crate) const CLIENT6: [u8; 16] = [0x20, 1, 0xd, 0xb8, 0, 0xc, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7];
pub(crate) const SERVICE6: [u8; 16] = [0x20, 1, 0xd, 0xb8, 0, 0x5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x80];
pub(crate) const CLIENT_PORT: u16 = 40_123;
pub(crate) const SERVICE_PORT: u16 = 443;
pub(crate) const MAC_A: [u8; 6] = [2, 0, 0, 0, 0, 0xa];
pub(crate) const MAC_B: [u8; 6] = [2, 0, 0, 0, 0, 0xb];

fn ip(family: u8, to_service: bool, ttl: u8) -> PacketBuilderStep<etherparse::IpHeaders> {
    match (family, to_service) {
        (4, true) => PacketBuilder::ipv4(CLIENT4, SERVICE4, ttl),
        (4, false) => PacketBuilder::ipv4(SERVICE4, CLIENT4, ttl),
        (_, true) => PacketBuilder::ipv6(CLIENT6, SERVICE6, ttl),
        (_, false) => PacketBuilder::ipv6(SERVICE6, CLIENT6, ttl),
    }
}

/// A TCP header from the client with these flags.
pub(crate) fn tcp_header(flags: u8) -> TcpHeader {
    let mut header = TcpHeader::new(CLIENT_PORT, SERVICE_PORT, 0x0102_0304, 1000);
    header.acknowledgment_number = 0x0a0b_0c0d;
    header.fin = flags & tcp_flags::FIN != 0;
    header.syn = flags & tcp_flags::SYN != 0;
    header.rst = flags & tcp_flags::RST != 0;
    header.psh = flags & tcp_flags::PSH != 0;
    header.ack = flags & tcp_flags::ACK != 0;
    header.ece = flags & tcp_flags::ECE != 0;
    header.cwr = flags & tcp_flags::CWR != 0;
    header.set_options_raw(&[1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2]).unwrap();
    header
}

/// An IP packet with a TCP segment from the client, whose header is 32 bytes long.
pub(crate) fn tcp(family: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    ip(family, true, 63).tcp_header(tcp_header(flags)).write_to_vec(&mut bytes, payload).unwrap();
    bytes
}

/// An IP packet with a UDP datagram from the client.
pub(crate) fn udp(family: u8, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    ip(family, true, 63).udp(CLIENT_PORT, SERVICE_PORT).write_to_vec(&mut bytes, payload).unwrap();
    bytes
}

/// An IP packet from the service to the client.
pub(crate) fn reply(family: u8, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let step = ip(family, false, 64);
    if protocol == crate::key::TCP {
        let mut header = TcpHeader::new(SERVICE_PORT, CLIENT_PORT, 77, 1000);
        header.ack = true;
        step.tcp_header(header).write_to_vec(&mut bytes, payload).unwrap();
    } else {
        step.udp(SERVICE_PORT, CLIENT_PORT).write_to_vec(&mut bytes, payload).unwrap();
    }
    bytes
}

/// An IP packet with an ICMP message to the service.
pub(crate) fn icmp(family: u8, kind: u8, code: u8, rest: [u8; 4], body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let step = ip(family, true, 60);
    if family == 4 {
        step.icmpv4_raw(kind, code, rest).write_to_vec(&mut bytes, body).unwrap();
    } else {
        step.icmpv6_raw(kind, code, rest).write_to_vec(&mut bytes, body).unwrap();
    }
    bytes
}

/// A ping of the service.
pub(crate) fn ping(family: u8) -> Vec<u8> {
    let mut bytes = Vec::new();
    let step = ip(family, true, 60);
    if family == 4 {
        step.icmpv4_echo_request(7, 8).write_to_vec(&mut bytes, b"are you there?").unwrap();
    } else {
        step.icmpv6_echo_request(7, 8).write_to_vec(&mut bytes, b"are you there?").unwrap();
    }
    bytes
}

/// An IPv4 fragment of protocol UDP.
pub(crate) fn fragment4(units: u16, more: bool, payload: &[u8]) -> Vec<u8> {
    let mut header = Ipv4Header::new(payload.len() as u16, 63, IpNumber::UDP, CLIENT4, SERVICE4).unwrap();
    header.dont_fragment = false;
    header.more_fragments = more;
    header.identification = 0xbeef;
    header.fragment_offset = IpFragOffset::try_new(units).unwrap();
    header.header_checksum = header.calc_header_checksum();
    let mut bytes = header.to_bytes().to_vec();
    bytes.extend_from_slice(payload);
    bytes
}

/// An IPv6 packet whose headers after the first are `rest`, which `first` names.
pub(crate) fn ipv6(first: u8, rest: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0x60, 0, 0, 0];
    bytes.extend_from_slice(&(rest.len() as u16).to_be_bytes());
    bytes.extend_from_slice(&[first, 63]);
    bytes.extend_from_slice(&CLIENT6);
    bytes.extend_from_slice(&SERVICE6);
    bytes.extend_from_slice(rest);
    bytes
}

/// An IPv6 fragment of protocol UDP.
pub(crate) fn fragment6(units: u16, more: bool, payload: &[u8]) -> Vec<u8> {
    let header =
        Ipv6FragmentHeader::new(IpNumber::UDP, IpFragOffset::try_new(units).unwrap(), more, 0xdead_beef);
    let mut rest = header.to_bytes().to_vec();
    rest.extend_from_slice(payload);
    ipv6(44, &rest)
}

/// The first eight bytes of a UDP datagram of `length`.
pub(crate) fn udp_header(length: u16) -> [u8; 8] {
    let ([s0, s1], [d0, d1], [l0, l1]) =
        (CLIENT_PORT.to_be_bytes(), SERVICE_PORT.to_be_bytes(), length.to_be_bytes());
    [s0, s1, d0, d1, l0, l1, 0, 0]
}

/// An Ethernet frame from A to B with `tags` VLAN tags (802.1ad outside 802.1Q if there are two).
pub(crate) fn ethernet(tags: usize, ip_packet: &[u8]) -> Vec<u8> {
    let mut bytes = [MAC_B, MAC_A].concat();
    for left in (1..=tags).rev() {
        bytes.extend_from_slice(if left == 1 { &[0x81, 0] } else { &[0x88, 0xa8] });
        bytes.extend_from_slice(&[0, left as u8]);
    }
    bytes.extend_from_slice(if ip_packet[0] >> 4 == 4 { &[8, 0] } else { &[0x86, 0xdd] });
    bytes.extend_from_slice(ip_packet);
    bytes
}

/// Says what is wrong with the checksums of an IP packet, by `etherparse`.
pub(crate) fn checksum_error(ip_packet: &[u8]) -> Option<&'static str> {
    let sliced = SlicedPacket::from_ip(ip_packet).expect("an IP packet");
    let (source, destination) = match sliced.net.as_ref().expect("an IP packet") {
        NetSlice::Ipv4(v4) => {
            let header = v4.header().to_header();
            if header.header_checksum != header.calc_header_checksum() {
                return Some("IPv4 header");
            }
            (header.source.to_vec(), header.destination.to_vec())
        }
        NetSlice::Ipv6(v6) => (v6.header().source().to_vec(), v6.header().destination().to_vec()),
        NetSlice::Arp(_) => panic!("ARP"),
    };
    let four = |octets: &[u8]| <[u8; 4]>::try_from(octets).unwrap();
    let sixteen = |octets: &[u8]| <[u8; 16]>::try_from(octets).unwrap();
    match sliced.transport {
        Some(TransportSlice::Tcp(tcp)) => {
            let right = if source.len() == 4 {
                tcp.calc_checksum_ipv4(four(&source), four(&destination)).unwrap()
            } else {
                tcp.calc_checksum_ipv6(sixteen(&source), sixteen(&destination)).unwrap()
            };
            (tcp.checksum() != right).then_some("TCP")
        }
        Some(TransportSlice::Udp(udp)) => {
            let header = udp.to_header();
            let right = if source.len() == 4 {
                header.calc_checksum_ipv4_raw(four(&source), four(&destination), udp.payload()).unwrap()
            } else {
                header.calc_checksum_ipv6_raw(sixteen(&source), sixteen(&destination), udp.payload()).unwrap()
            };
            (udp.checksum() != right).then_some("UDP")
        }
        Some(TransportSlice::Icmpv4(icmp)) => {
            let right = icmp.icmp_type().calc_checksum(icmp.payload());
            (icmp.checksum() != right).then_some("ICMP")
        }
        Some(TransportSlice::Icmpv6(icmp)) => {
            (!icmp.is_checksum_valid(sixteen(&source), sixteen(&destination))).then_some("ICMPv6")
        }
        _ => None,
    }
}
