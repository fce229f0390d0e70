//! The name of a flow.

use core::fmt;
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// One connection: protocol and 4-tuple, as the client's packets carry it (claim 4, Figure 2 \[200\]).
///
/// A map key: it compares as bytes, so every byte is set. An IPv4 address stands as its IPv4-mapped IPv6 address
/// (RFC 4291 §2.5.5.2), so that one key serves both families.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(C, align(8))]
pub struct FlowKey {
    /// The client's address.
    pub source: [u8; 16],
    /// The service's address.
    pub destination: [u8; 16],
    /// The client's port, in network byte order.
    pub source_port: [u8; 2],
    /// The service's port, in network byte order.
    pub destination_port: [u8; 2],
    /// IP protocol number: 6 (TCP) or 17 (UDP).
    pub protocol: u8,
    /// 4 or 6.
    pub family: u8,
    /// Zero.
    pub reserved: [u8; 2],
}

const _: () = assert!(size_of::<FlowKey>() == 40 && align_of::<FlowKey>() == 8);

/// IP protocol number of TCP.
pub const TCP: u8 = 6;
/// IP protocol number of UDP.
pub const UDP: u8 = 17;
/// IP protocol number of ICMP.
pub const ICMP: u8 = 1;
/// IP protocol number of ICMPv6.
pub const ICMPV6: u8 = 58;

/// The IPv4-mapped IPv6 address of `v4`.
#[inline(always)]
pub const fn mapped(v4: [u8; 4]) -> [u8; 16] {
    [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, v4[0], v4[1], v4[2], v4[3]]
}

/// The last four bytes of a mapped address: the IPv4 address it stands for.
#[inline(always)]
pub const fn unmapped(address: [u8; 16]) -> [u8; 4] {
    [address[12], address[13], address[14], address[15]]
}

/// The 16 bytes that stand for `address` in a key, and its family (4 or 6).
pub const fn octets(address: IpAddr) -> ([u8; 16], u8) {
    match address {
        IpAddr::V4(v4) => (mapped(v4.octets()), 4),
        IpAddr::V6(v6) => (v6.octets(), 6),
    }
}

/// The address that `octets` of family `family` stand for.
pub const fn address(octets: [u8; 16], family: u8) -> IpAddr {
    if family == 4 {
        let [a, b, c, d] = unmapped(octets);
        IpAddr::V4(Ipv4Addr::new(a, b, c, d))
    } else {
        IpAddr::V6(Ipv6Addr::from_octets(octets))
    }
}

impl FlowKey {
    /// The key of a flow from `source` to `destination`; `None` if their families differ.
    pub const fn new(protocol: u8, source: (IpAddr, u16), destination: (IpAddr, u16)) -> Option<Self> {
        let (source_octets, family) = octets(source.0);
        let (destination_octets, destination_family) = octets(destination.0);
        if family != destination_family {
            return None;
        }
        Some(Self {
            source: source_octets,
            destination: destination_octets,
            source_port: source.1.to_be_bytes(),
            destination_port: destination.1.to_be_bytes(),
            protocol,
            family,
            reserved: [0; 2],
        })
    }

    /// The client's address.
    pub const fn source_address(&self) -> IpAddr {
        address(self.source, self.family)
    }

    /// The service's address.
    pub const fn destination_address(&self) -> IpAddr {
        address(self.destination, self.family)
    }
}

impl fmt::Debug for FlowKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for FlowKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let source = core::net::SocketAddr::new(self.source_address(), u16::from_be_bytes(self.source_port));
        let destination =
            core::net::SocketAddr::new(self.destination_address(), u16::from_be_bytes(self.destination_port));
        let protocol = match self.protocol {
            TCP => "tcp",
            UDP => "udp",
            _ => "ip",
        };
        write!(f, "{protocol} {source} -> {destination}")
    }
}
