//! What a member remembers of a flow.

use core::cmp::Ordering;
use core::net::IpAddr;

use crate::key::{FlowKey, TCP};

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
    /// No table gives us the flow any more, so that nobody tells us what becomes of it: its holders are asked before this is believed.
    pub const FORMER: u8 = 8;
    /// Made when a SYN passed through here to who records it: a guess at what that one has recorded, for the case that it is lost before it
    /// has told of it. Nobody but the packet path knows of such an entry (docs/design/0012-used-tuples.md).
    pub const PRESUMED: u8 = 16;
    /// What says something of one member's entry, not of the flow: it is not sent, and ignored from the wire.
    pub const LOCAL: u8 = Self::PROTECTED | Self::FORMER | Self::PRESUMED;

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

/// Above so many bits of a birth its milliseconds begin.
pub const BIRTH_MS_BITS: u32 = 22;

/// A flow table's value (the LTOC of claims 12 and 13; role and backup follow from the row).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct FlowEntry {
    /// Hybrid logical clock of the record's making, stamped by the daemon; 0: not stamped yet, newer than any stamp.
    pub birth: u64,
    /// When a packet of the flow was last seen here, in milliseconds of the forwarder's monotonic clock.
    pub last_seen_ms: u64,
    /// The last-seen time that was last reported to the owner, same clock; the owner itself brings it up to date as often.
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

/// One flow as members tell each other of it: the table's entry with the backend by name and ages instead of clock readings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// The flow.
    pub key: FlowKey,
    /// Who has the connection.
    pub backend: BackendId,
    /// As [`FlowEntry::birth`].
    pub birth: u64,
    /// As [`FlowEntry::update`].
    pub update: u32,
    /// How far the flow has come.
    pub state: FlowState,
    /// Bits of [`FlowFlags`]; those of [`FlowFlags::LOCAL`] are ignored from the wire.
    pub flags: FlowFlags,
    /// Milliseconds since a packet of the flow was last seen by whoever made this record.
    pub idle_ms: u32,
}

impl Record {
    /// What orders this record among those of its flow.
    pub const fn version(&self) -> Version {
        Version {
            tcp: self.key.protocol == TCP,
            recovered: self.flags.has(FlowFlags::RECOVERED),
            state: self.state,
            birth: self.birth,
            update: self.update,
        }
    }

    /// Whether this record is replaced by `incoming`, a record of the same flow.
    pub fn is_replaced_by(&self, incoming: &Self) -> bool {
        self.version().is_replaced_by(incoming.version(), self.backend.cmp(&incoming.backend))
    }
}

/// How a hand-off says which record its sender has (docs/design/0013-births-in-hand-offs.md): a [`Version`] in 32 bits, of which the
/// update does not count.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct Vintage(pub u32);

impl Vintage {
    /// The record was not made by a first packet.
    const RECOVERED: u32 = 1 << 31;
    /// The connection has ended.
    const ENDED: u32 = 1 << 30;
    /// Its birth in steps of 2 ms; they wrap after 24 days. 0: not stamped yet, and later than any.
    const BIRTH: u32 = Self::ENDED - 1;
    /// Above so many bits of a birth its steps of 2 ms begin.
    const BELOW: u32 = BIRTH_MS_BITS + 1;

    /// That of `entry`.
    #[inline(always)]
    pub const fn of(entry: &FlowEntry) -> Self {
        #[expect(clippy::cast_possible_truncation, reason = "the low bits are what is wanted")]
        let low = (entry.birth >> Self::BELOW) as u32 & Self::BIRTH;
        let stamped = (entry.birth != 0) as u32;
        // 0 is taken.
        let birth = low | (low == 0) as u32 & stamped;
        let recovered = if entry.flags.has(FlowFlags::RECOVERED) { Self::RECOVERED } else { 0 };
        let ended = if entry.flow_state().is_live() { 0 } else { Self::ENDED };
        Self(birth | recovered | ended)
    }

    /// Whether a record of `other` replaces one of this, as [`Version::is_replaced_by`] has it for connections.
    #[inline(always)]
    pub const fn is_replaced_by(self, other: Self) -> bool {
        let (ours, theirs) = (self.0 & Self::BIRTH, other.0 & Self::BIRTH);
        // Serial numbers of 30 bits (RFC 1982).
        let later =
            ours != theirs && (theirs == 0 || ours != 0 && theirs.wrapping_sub(ours) & Self::BIRTH < 1 << 29);
        let (guessed, guess) = (self.0 & Self::RECOVERED != 0, other.0 & Self::RECOVERED != 0);
        if guessed == guess {
            ours != theirs && later != guessed
        } else if guess {
            self.0 & Self::ENDED != 0 && later
        } else {
            other.0 & Self::ENDED == 0 || later || ours == theirs
        }
    }
}

/// What orders two records of one flow (design §4, "Versions").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Version {
    /// The flow begins with a handshake: it has another birth only if its tuple was used again.
    pub tcp: bool,
    /// Not made by a SYN.
    pub recovered: bool,
    /// How far the flow has come.
    pub state: FlowState,
    /// Hybrid logical clock; 0: not stamped yet.
    pub birth: u64,
    /// Changes since birth.
    pub update: u32,
}

impl Version {
    /// Whether `incoming` replaces this one, when both are of one flow, from wherever they came.
    ///
    /// Of any two records the same one stays on every member: made by a SYN before recovered; then by birth; then the lower backend; of one birth
    /// and backend the later update, and of equal ones, which two members made at once, the state that is further on.
    /// But what was guessed after the birth of a connection that has ended takes that one's place: the tuple was used again, and the record of
    /// that is lost. (With a third record, from before and still alive, none of the three is the last; it goes where it meets the ended one.)
    ///
    /// Of connections that SYNs made the later birth stays: the client has used the tuple again, and whoever still has the connection
    /// before it, live or closing, has missed that. Of guesses and of datagrams, which say nothing of a beginning, the earlier one: by
    /// that one packets have been forwarded for longer.
    /// `backends` is this record's [`BackendId`] compared with the incoming one's, because indexes are local.
    pub fn is_replaced_by(self, incoming: Self, backends: Ordering) -> bool {
        // An unstamped record (0) is the newest of all: wrapping makes it the largest.
        let births = incoming.birth.wrapping_sub(1).cmp(&self.birth.wrapping_sub(1));
        let has_ended = |record: Self| record.tcp && !record.state.is_live();
        match (self.recovered, incoming.recovered) {
            (false, true) => return has_ended(self) && births == Ordering::Greater,
            (true, false) => return !has_ended(incoming) || births != Ordering::Less,
            _ => {}
        }
        match (births, backends) {
            (Ordering::Greater, _) => self.tcp && !self.recovered,
            (Ordering::Less, _) => !self.tcp || self.recovered,
            (Ordering::Equal, Ordering::Equal) => {
                (incoming.update, incoming.state) > (self.update, self.state)
            }
            (Ordering::Equal, backends) => backends == Ordering::Greater,
        }
    }
}

/// What a forwarder tells the daemon of a flow, in batches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowEvent {
    /// What happened.
    pub kind: FlowEventKind,
    /// Replicate without waiting for the client's ACK: the backend deviates, the slot is about to change, or the entry replaced another.
    pub at_once: bool,
    /// The flow as it is after it happened.
    pub record: Record,
}

/// What happened to a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum FlowEventKind {
    /// The acting owner recorded a flow (half-open, or recovered); its birth is 0 until the daemon stamps it.
    New = 0,
    /// The state changed: established, closing, reset, or live again.
    Changed = 1,
    /// Who is not the owner forwarded the flow, by its flow table or its cache, and its last-seen time is a quarter of the idle timeout
    /// (of a closing flow: of the linger) newer than last told.
    Touched = 2,
    /// As [`Self::Changed`], by a cache entry: the record is the cache's, which need not know all updates.
    Cached = 3,
    /// Nobody knew the flow and we are not its acting owner: the owner may record what we did.
    Hint = 4,
    /// The entry is idle beyond its timeout, its linger is over, or a half-open one was pushed out: it waits for the daemon's word.
    Expired = 5,
}
