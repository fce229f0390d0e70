//! What a packet says, as far as a load balancer needs to know.
//!
//! [`parse`] reads a frame through a [`Reader`] and makes a [`Packet`], or a [`ParseError`] with a named [`Reason`].

mod parse;
mod reader;
#[cfg(test)]
pub(crate) mod samples;
#[cfg(test)]
mod tests;

pub(crate) use parse::{ETHERTYPE_IPV4, ETHERTYPE_IPV6};
pub use parse::{ParseError, Reason, parse, parse_plain};
pub use reader::{Frame, FrameBuf, HEADROOM, Reader};

use crate::key::FlowKey;

/// What a frame starts with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Link {
    /// An Ethernet header, with up to two VLAN tags.
    Ethernet,
    /// The IP header itself.
    Ip,
}

/// Bits of a TCP header's flags byte (RFC 9293 §3.1).
pub mod tcp_flags {
    /// No more data from the sender.
    pub const FIN: u8 = 1;
    /// Synchronise sequence numbers.
    pub const SYN: u8 = 2;
    /// Reset the connection.
    pub const RST: u8 = 4;
    /// Push.
    pub const PSH: u8 = 8;
    /// The acknowledgment number counts.
    pub const ACK: u8 = 16;
    /// The urgent pointer counts.
    pub const URG: u8 = 32;
    /// ECN echo (RFC 3168).
    pub const ECE: u8 = 64;
    /// Congestion window reduced (RFC 3168).
    pub const CWR: u8 = 128;
}

/// Which part of a datagram this packet is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fragment {
    /// All of it; also an IPv6 "atomic fragment" (RFC 6946).
    Whole,
    /// The first fragment: it has the ports.
    First {
        /// Identification: 16 bits in IPv4, 32 in IPv6.
        id: u32,
    },
    /// Any other fragment: it has no ports.
    Later {
        /// Identification: 16 bits in IPv4, 32 in IPv6.
        id: u32,
    },
}

/// What kind of packet it is, for the decision.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PacketKind {
    /// TCP with SYN and without ACK: a new connection.
    TcpSyn,
    /// Any other TCP segment.
    Tcp {
        /// Bits of [`tcp_flags`].
        flags: u8,
    },
    /// A UDP datagram, or its first fragment.
    Datagram,
    /// An ICMP or ICMPv6 error. The key is that of the flow it is about: the quoted packet went from the service to the client,
    /// so source and destination are those of the quote, swapped.
    IcmpError,
    /// A whole ICMP or ICMPv6 echo request.
    EchoRequest,
    /// A fragment that is not the first: only addresses and protocol are known.
    LaterFragment,
    /// ICMPv6 types 133 to 137 (RFC 4861): the link's own business, for the kernel whatever the address.
    NeighbourDiscovery,
    /// Something that has no flow: the protocol's number is in the key.
    Other,
}

/// What [`parse`] found. All offsets count from the frame's start and stay true until the frame's head moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet {
    /// The flow; ports are zero where unknown. For [`PacketKind::IcmpError`] the flow that the error is about.
    pub key: FlowKey,
    /// What kind of packet it is.
    pub kind: PacketKind,
    /// Which part of a datagram it is.
    pub fragment: Fragment,
    /// TCP sequence number, 0 for all else.
    pub tcp_sequence: u32,
    /// TCP acknowledgment number, 0 for all else; it counts only with [`tcp_flags::ACK`].
    pub tcp_acknowledgment: u32,
    /// Where the IP header starts: 0, 14, 18 or 22.
    pub l3_offset: u16,
    /// Length of the whole IP packet by its own header, in bytes; the frame may be longer (padding) but not shorter.
    pub l3_length: u16,
    /// Where the transport header starts (for fragments: where what follows the IP headers starts).
    pub l4_offset: u16,
    /// Bytes from `l4_offset` to the end of the IP packet.
    pub l4_length: u16,
    /// Bytes after the TCP, UDP or ICMP header; as `l4_length` where there is none.
    pub payload_length: u16,
    /// Time to live, or hop limit.
    pub ttl: u8,
    /// Type of service, or traffic class: DSCP in the high six bits, ECN in the low two.
    pub tos: u8,
    /// IPv4's DF bit; true for IPv6, whose routers never fragment.
    pub dont_fragment: bool,
}

impl Packet {
    /// Where the bytes after the TCP, UDP or ICMP header start.
    #[inline(always)]
    pub const fn payload_offset(&self) -> u16 {
        self.l4_offset.wrapping_add(self.l4_length).wrapping_sub(self.payload_length)
    }

    /// A TCP segment's flags, 0 for all else.
    #[inline(always)]
    pub const fn tcp_flags(&self) -> u8 {
        match self.kind {
            PacketKind::TcpSyn => tcp_flags::SYN,
            PacketKind::Tcp { flags } => flags,
            _ => 0,
        }
    }

    /// The key by whose row all fragments of one datagram meet at one member; `None` for a packet that is not a fragment.
    ///
    /// The identification stands in the place of the ports, so that every row function sees it.
    /// Never a key of the flow table: it may equal that of a real flow.
    /// An IPv6 datagram is named by addresses and identification alone (RFC 8200 §4.5): its protocol is 0 here,
    /// because only the first fragment tells what follows its extension headers.
    #[inline(always)]
    pub const fn fragment_key(&self) -> Option<FlowKey> {
        let id = match self.fragment {
            Fragment::Whole => return None,
            Fragment::First { id } | Fragment::Later { id } => id,
        };
        let [a, b, c, d] = id.to_be_bytes();
        Some(FlowKey {
            source_port: [a, b],
            destination_port: [c, d],
            protocol: if self.key.family == 4 { self.key.protocol } else { 0 },
            ..self.key
        })
    }
}
