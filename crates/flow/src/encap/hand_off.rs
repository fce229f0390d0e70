//! The hand-off's header: Geneve (RFC 8926) with one option.
//!
//! ```text
//!  0                   1                   2                   3
//!  0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1
//! +-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+
//! |Ver|  8 words  |O|1|    0      |   ethertype of the packet     |
//! |                  VNI 0                        |       0       |
//! |     class 0xff50              |   type 0x81   | 0 0 0|7 words |
//! |     hops      |     flags     |              0                |
//! |         source port           |       destination port        |
//! |                                                               |
//! |                  digest of the sender's view                  |
//! |                       member bypassed                         |
//! |                                                               |
//! |                            cookie                             |
//! +-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+
//! ```

use crate::entry::Vintage;
use crate::member::MemberId;
use crate::packet::{ETHERTYPE_IPV4, ETHERTYPE_IPV6, Reader};

/// Geneve's UDP port (IANA).
pub const GENEVE_PORT: u16 = 6081;
/// Bytes from the end of the UDP header to the packet handed off: 8 of Geneve, 4 and 28 of our option.
pub const GENEVE_LENGTH: usize = 40;

/// Option class: RFC 8926 §7 leaves 0xff00 to 0xffff for experiments.
const CLASS: u16 = 0xff50;
/// Option type; the high bit says that who does not know it must drop the packet (RFC 8926 §3.5).
const TYPE: u8 = 0x81;
/// The option's data in words of four bytes.
const OPTION_WORDS: u8 = 7;
/// Bits of Geneve's second byte: control packet, and critical options present.
const CONTROL: u8 = 0x80;
const CRITICAL: u8 = 0x40;
/// Options that are looked at; members send one, and another hand may add a few.
const MAX_OPTIONS: usize = 4;

/// Bits of [`HandOffHeader::flags`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub struct HandOffFlags(pub u8);

impl HandOffFlags {
    /// The ports are those of the datagram that the fragment inside belongs to.
    pub const PORTS: u8 = 1;
    /// A member was bypassed.
    pub const BYPASSED: u8 = 2;
    /// No packet inside: a probe of the path through the receiver's forwarder.
    pub const ECHO_REQUEST: u8 = 4;
    /// No packet inside: the answer to a probe.
    pub const ECHO_REPLY: u8 = 8;
    /// The member bypassed is the one that handed the packet off first: it has the flow, but only from former times.
    pub const KNOWN: u8 = 16;

    /// Whether every bit of `bits` is set.
    #[inline(always)]
    pub const fn has(self, bits: u8) -> bool {
        self.0 & bits == bits
    }

    /// Whether the header stands before a probe or its answer, not a packet.
    #[inline(always)]
    pub const fn is_echo(self) -> bool {
        self.0 & (Self::ECHO_REQUEST | Self::ECHO_REPLY) != 0
    }
}

/// What a member says when it hands off a packet (\[440\], \[488\]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct HandOffHeader {
    /// Derived from the cluster key: whoever does not know it is no member.
    pub cookie: u64,
    /// Digest of the sender's view.
    pub view_digest: u64,
    /// The member that should have had the packet but is suspected; counts with [`HandOffFlags::BYPASSED`].
    pub bypassed: MemberId,
    /// Ports of a fragment's datagram, network byte order; they count with [`HandOffFlags::PORTS`]. Without it, and with
    /// [`HandOffFlags::KNOWN`], both together are the [`Vintage`] of what the member bypassed has.
    pub source_port: [u8; 2],
    /// See `source_port`.
    pub destination_port: [u8; 2],
    /// How often the packet has been handed off, this time included: at least 1.
    pub hops: u8,
    /// Bits of [`HandOffFlags`].
    pub flags: HandOffFlags,
    /// Zero.
    pub reserved: [u8; 6],
}

const _: () = assert!(size_of::<HandOffHeader>() == 32);

impl HandOffHeader {
    /// A plain hand-off: nobody bypassed, no ports.
    #[inline(always)]
    pub const fn new(hops: u8, view_digest: u64, cookie: u64) -> Self {
        Self {
            cookie,
            view_digest,
            bypassed: MemberId(0),
            source_port: [0; 2],
            destination_port: [0; 2],
            hops,
            flags: HandOffFlags(0),
            reserved: [0; 6],
        }
    }

    /// The header with `member` as the one bypassed.
    #[inline(always)]
    #[must_use]
    pub const fn bypassing(self, member: MemberId) -> Self {
        Self { bypassed: member, flags: HandOffFlags(self.flags.0 | HandOffFlags::BYPASSED), ..self }
    }

    /// The header with the one bypassed as one that has the flow.
    #[inline(always)]
    #[must_use]
    pub const fn with_known(self, known: bool) -> Self {
        if known { Self { flags: HandOffFlags(self.flags.0 | HandOffFlags::KNOWN), ..self } } else { self }
    }

    /// The header with the vintage of the record that the one bypassed has; [`Self::with_ports`] leaves no room for it.
    #[inline(always)]
    #[must_use]
    pub const fn with_vintage(self, vintage: Vintage) -> Self {
        let [a, b, c, d] = vintage.0.to_be_bytes();
        Self { source_port: [a, b], destination_port: [c, d], ..self }
    }

    /// The vintage of the record that the one bypassed has. It counts with [`Self::known`] and without ports.
    #[inline(always)]
    pub const fn vintage(&self) -> Vintage {
        let ([a, b], [c, d]) = (self.source_port, self.destination_port);
        Vintage(u32::from_be_bytes([a, b, c, d]))
    }

    /// The header with the ports of the fragment's datagram, network byte order.
    #[inline(always)]
    #[must_use]
    pub const fn with_ports(self, source: [u8; 2], destination: [u8; 2]) -> Self {
        Self {
            source_port: source,
            destination_port: destination,
            flags: HandOffFlags(self.flags.0 | HandOffFlags::PORTS),
            ..self
        }
    }

    /// The member bypassed, if one was.
    #[inline(always)]
    pub const fn bypassed(&self) -> Option<MemberId> {
        if self.flags.has(HandOffFlags::BYPASSED) { Some(self.bypassed) } else { None }
    }

    /// Whether the member bypassed has the flow.
    #[inline(always)]
    pub const fn known(&self) -> bool {
        self.flags.has(HandOffFlags::BYPASSED | HandOffFlags::KNOWN)
    }

    /// Source and destination port of the fragment's datagram, network byte order, if the sender knew them.
    #[inline(always)]
    pub const fn ports(&self) -> Option<([u8; 2], [u8; 2])> {
        if self.flags.has(HandOffFlags::PORTS) {
            Some((self.source_port, self.destination_port))
        } else {
            None
        }
    }
}

/// Why a datagram on the hand-off port is no hand-off. Each has a counter of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum HandOffError {
    /// It ends within the header.
    Truncated,
    /// Not Geneve version 0.
    Version,
    /// The options do not fill the length that the header tells.
    OptionLength,
    /// A critical option that we do not know, or more options than we look at.
    UnknownOption,
    /// Our option is not there, twice there, or not of our length.
    NoOption,
    /// The cookie is not the cluster's.
    Cookie,
    /// A hop count of 0.
    Hops,
    /// What is inside is neither IPv4, IPv6 nor a probe.
    Protocol,
}

impl HandOffError {
    /// All of them, in the order of their numbers.
    pub const ALL: &[Self] = &[
        Self::Truncated,
        Self::Version,
        Self::OptionLength,
        Self::UnknownOption,
        Self::NoOption,
        Self::Cookie,
        Self::Hops,
        Self::Protocol,
    ];

    /// The error as it stands in metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Truncated => "hand_off_truncated",
            Self::Version => "hand_off_version",
            Self::OptionLength => "hand_off_option_length",
            Self::UnknownOption => "hand_off_unknown_option",
            Self::NoOption => "hand_off_no_option",
            Self::Cookie => "hand_off_cookie",
            Self::Hops => "hand_off_hops",
            Self::Protocol => "hand_off_protocol",
        }
    }
}

impl core::fmt::Display for HandOffError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(self.name())
    }
}

impl core::error::Error for HandOffError {}

/// Geneve's header and option for `header`, as they stand after the UDP header; `family` is that of the packet inside
/// (0 for a probe, which has none).
#[inline(always)]
pub const fn hand_off_bytes(header: &HandOffHeader, family: u8) -> [u8; GENEVE_LENGTH] {
    let [protocol0, protocol1] = match family {
        4 => ETHERTYPE_IPV4,
        6 => ETHERTYPE_IPV6,
        _ => 0,
    }
    .to_be_bytes();
    let control = if header.flags.is_echo() { CONTROL } else { 0 };
    let [class0, class1] = CLASS.to_be_bytes();
    let d = header.view_digest.to_be_bytes();
    let b = header.bypassed.0.to_be_bytes();
    let c = header.cookie.to_be_bytes();
    [
        OPTION_WORDS + 1,
        control | CRITICAL,
        protocol0,
        protocol1,
        0,
        0,
        0,
        0,
        class0,
        class1,
        TYPE,
        OPTION_WORDS,
        header.hops,
        header.flags.0,
        0,
        0,
        header.source_port[0],
        header.source_port[1],
        header.destination_port[0],
        header.destination_port[1],
        d[0],
        d[1],
        d[2],
        d[3],
        d[4],
        d[5],
        d[6],
        d[7],
        b[0],
        b[1],
        b[2],
        b[3],
        c[0],
        c[1],
        c[2],
        c[3],
        c[4],
        c[5],
        c[6],
        c[7],
    ]
}

/// Reads the hand-off at `offset`, the first byte after the UDP header ([`Packet::payload_offset`](crate::packet::Packet)).
///
/// `cookies` are the two that count: the present key's, and the one before or after while keys rotate (the same one twice otherwise).
/// Returns the header and where the packet inside starts.
#[inline(always)]
pub fn parse_hand_off<R: Reader + ?Sized>(
    frame: &R,
    offset: usize,
    cookies: [u64; 2],
) -> Result<(HandOffHeader, usize), HandOffError> {
    let Some(g) = frame.read::<8>(offset) else { return Err(HandOffError::Truncated) };
    if g[0] >> 6 != 0 {
        return Err(HandOffError::Version);
    }
    let mut at = offset.wrapping_add(8);
    let inner = at.wrapping_add(usize::from(g[0] & 0x3f) << 2);
    if inner > frame.len() {
        return Err(HandOffError::Truncated);
    }
    let mut ours = None;
    for _ in 0..MAX_OPTIONS {
        if at == inner {
            break;
        }
        let Some(o) = frame.read::<4>(at) else { return Err(HandOffError::OptionLength) };
        let data = at.wrapping_add(4);
        let words = o[3] & 0x1f;
        at = data.wrapping_add(usize::from(words) << 2);
        if at > inner {
            return Err(HandOffError::OptionLength);
        }
        if u16::from_be_bytes([o[0], o[1]]) == CLASS && o[2] == TYPE {
            if words != OPTION_WORDS || ours.is_some() {
                return Err(HandOffError::NoOption);
            }
            ours = Some(data);
        } else if o[2] & 0x80 != 0 {
            return Err(HandOffError::UnknownOption);
        }
    }
    if at != inner {
        return Err(HandOffError::UnknownOption);
    }
    let Some(data) = ours else { return Err(HandOffError::NoOption) };
    let Some(o) = frame.read::<28>(data) else { return Err(HandOffError::Truncated) };
    let cookie = u64::from_be_bytes([o[20], o[21], o[22], o[23], o[24], o[25], o[26], o[27]]);
    if cookie != cookies[0] && cookie != cookies[1] {
        return Err(HandOffError::Cookie);
    }
    let header = HandOffHeader {
        cookie,
        view_digest: u64::from_be_bytes([o[8], o[9], o[10], o[11], o[12], o[13], o[14], o[15]]),
        bypassed: MemberId(u32::from_be_bytes([o[16], o[17], o[18], o[19]])),
        source_port: [o[4], o[5]],
        destination_port: [o[6], o[7]],
        hops: o[0],
        flags: HandOffFlags(o[1]),
        reserved: [0; 6],
    };
    if header.hops == 0 {
        return Err(HandOffError::Hops);
    }
    match u16::from_be_bytes([g[2], g[3]]) {
        ETHERTYPE_IPV4 | ETHERTYPE_IPV6 if !header.flags.is_echo() => Ok((header, inner)),
        0 if header.flags.is_echo() => Ok((header, inner)),
        _ => Err(HandOffError::Protocol),
    }
}
