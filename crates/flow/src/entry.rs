//! What a member remembers of a flow.

use core::net::IpAddr;

/// How a packet reaches its backend (design §5).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Method {
    /// Rewrite the destination MAC; backend on the same segment.
    L2 = 0,
    /// IP in IP (RFC 2003, RFC 2473, RFC 4213).
    IpIp = 1,
    /// IP in UDP, as Linux FOU/GUE decodes it (GUE version 1: no header of its own).
    Gue = 2,
}

impl Method {
    /// The method with this number, as it stands in map values and on the wire.
    #[inline(always)]
    pub const fn from_u8(value: u8) -> Option<Self> {
        match value {
            0 => Some(Self::L2),
            1 => Some(Self::IpIp),
            2 => Some(Self::Gue),
            _ => None,
        }
    }
}

/// A backend's name on every member: address, port and method (the service is in the flow's key).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(C)]
pub struct BackendId {
    /// Address the packets are sent to, IPv4 as mapped.
    pub address: [u8; 16],
    /// UDP port of the decapsulator for [`Method::Gue`], otherwise zero; network byte order.
    pub port: [u8; 2],
    /// A [`Method`].
    pub method: u8,
    /// 4 or 6: the family of `address`.
    pub family: u8,
}

impl BackendId {
    /// The name of the backend at `address`, reached by `method` (`port` counts for GUE only).
    pub const fn new(address: IpAddr, method: Method, port: u16) -> Self {
        let (octets, family) = crate::key::octets(address);
        let port = if matches!(method, Method::Gue) { port.to_be_bytes() } else { [0; 2] };
        Self { address: octets, port, method: method as u8, family }
    }

    /// Where the packets go.
    pub const fn ip(&self) -> IpAddr {
        crate::key::address(self.address, self.family)
    }
}

impl core::fmt::Debug for BackendId {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{} by {:?}", self.ip(), Method::from_u8(self.method))
    }
}

/// Where a backend stands in one member's list of backends. Local: it never goes on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct BackendIndex(pub u32);

impl BackendIndex {
    /// No backend.
    pub const NONE: Self = Self(u32::MAX);
}

/// How far a flow has come.
///
/// ```text
///   SYN, first datagram        ACK without SYN/RST, second datagram
///  ──────────────► HalfOpen ──────────────────────────► Established ◄──┐
///                     │                                  │    │        │ data after
///                     │ RST                          FIN │    │ RST    │ FIN or RST
///                     └────────────► Reset ◄─────────────┼────┘        │
///                                      │                 ▼             │
///                                      └──────────────► Closing ───────┘
/// ```
/// `Closing` and `Reset` end when nothing was seen for the linger of their kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum FlowState {
    /// A SYN or a first datagram was seen.
    HalfOpen = 0,
    /// The client has answered the server.
    Established = 1,
    /// The client sent a FIN.
    Closing = 2,
    /// The client sent a RST.
    Reset = 3,
}

impl FlowState {
    /// The state with this number.
    #[inline(always)]
    pub const fn from_u8(value: u8) -> Option<Self> {
        match value {
            0 => Some(Self::HalfOpen),
            1 => Some(Self::Established),
            2 => Some(Self::Closing),
            3 => Some(Self::Reset),
            _ => None,
        }
    }

    /// Whether a SYN on this tuple is a retransmission (or a challenge the backend answers) and not a new connection.
    #[inline(always)]
    pub const fn is_live(self) -> bool {
        matches!(self, Self::HalfOpen | Self::Established)
    }
}

/// Bits of [`FlowEntry::flags`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub struct FlowFlags(pub u8);

impl FlowFlags {
    /// Nobody knew the flow and its backend is the consistent choice; never overwrites a record made by a SYN.
    pub const RECOVERED: u8 = 1;
    /// The backend is not the one the consistent table gave when the record was made.
    pub const DEVIATES: u8 = 2;
    /// The backup has acknowledged the record in its present version.
    pub const PROTECTED: u8 = 4;

    /// Whether every bit of `bits` is set.
    #[inline(always)]
    pub const fn has(self, bits: u8) -> bool {
        self.0 & bits == bits
    }

    /// These flags with `bits` set or cleared.
    #[inline(always)]
    #[must_use]
    pub const fn with(self, bits: u8, on: bool) -> Self {
        if on { Self(self.0 | bits) } else { Self(self.0 & !bits) }
    }
}

/// A flow table's value (the LTOC of claims 12 and 13; role and backup follow from the row).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct FlowEntry {
    /// Hybrid logical clock of the record's making, stamped by the daemon; 0: not stamped yet, newer than any stamp.
    pub birth: u64,
    /// When a packet of the flow was last seen here, in milliseconds of the forwarder's monotonic clock.
    pub last_seen_ms: u64,
    /// The last-seen time that was last reported to the owner, same clock.
    pub last_reported_ms: u64,
    /// Counts changes of state since `birth`.
    pub update: u32,
    /// The backend that has the connection.
    pub backend: BackendIndex,
    /// A [`FlowState`].
    pub state: u8,
    /// Bits of [`FlowFlags`].
    pub flags: FlowFlags,
    /// Zero.
    pub reserved: [u8; 6],
}

const _: () = assert!(size_of::<FlowEntry>() == 40);

impl FlowEntry {
    /// How far the flow has come; a damaged number counts as half-open.
    #[inline(always)]
    pub const fn flow_state(&self) -> FlowState {
        match FlowState::from_u8(self.state) {
            Some(state) => state,
            None => FlowState::HalfOpen,
        }
    }
}

/// Whether `incoming` replaces `existing` when both are records of one flow, from wherever they came.
///
/// The order is total and the same on every member (design §4, "Versions"): made by a SYN before recovered; of one birth and backend the
/// later update; live before closing; then the earlier birth, then the lower backend.
/// `backend_order` is `existing` compared with `incoming` by [`BackendId`], because indexes are local.
pub fn replaces(existing: &FlowEntry, incoming: &FlowEntry, backend_order: core::cmp::Ordering) -> bool {
    use core::cmp::Ordering;
    match (existing.flags.has(FlowFlags::RECOVERED), incoming.flags.has(FlowFlags::RECOVERED)) {
        (false, true) => return false,
        (true, false) => return true,
        _ => {}
    }
    if existing.birth == incoming.birth && backend_order == Ordering::Equal {
        return incoming.update > existing.update;
    }
    match (existing.flow_state().is_live(), incoming.flow_state().is_live()) {
        (true, false) => return false,
        (false, true) => return true,
        _ => {}
    }
    // An unstamped record (0) is the newest of all: wrapping makes it the largest.
    match incoming.birth.wrapping_sub(1).cmp(&existing.birth.wrapping_sub(1)) {
        Ordering::Less => true,
        Ordering::Greater => false,
        Ordering::Equal => backend_order == Ordering::Greater,
    }
}
