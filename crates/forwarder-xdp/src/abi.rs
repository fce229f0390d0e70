//! What the kernel's program and its loader share: maps' names, keys and values. Both compile this file.
//!
//! Everything is `#[repr(C)]` with explicit padding and without `bool`, `enum` or `Option`; sizes are asserted.
//! A change of anything here is a change of [`VERSION`]: pinned maps of another version are not adopted.

use phalanx_flow::decide::OUTCOMES;
#[cfg(not(target_arch = "bpf"))]
use phalanx_flow::key::{mapped, unmapped};
use phalanx_flow::{FlowEntry, FlowKey};

/// Version of these layouts.
pub const VERSION: u32 = 7;

/// Plans that exist at once: the one in force and the one being written.
pub const PLANS: u32 = 2;
/// Members of a plan at most.
pub const MAX_MEMBERS: u32 = 1024;
/// Backends of a plan at most.
pub const MAX_BACKENDS: u32 = 8192;
/// Rows in a block of the table of rows.
pub const ROWS: u32 = 65_536;
/// Blocks of rows: the current and previous table of two plans.
pub const ROW_BLOCKS: u32 = 4;
/// Slots in a block of the table of slots.
pub const SLOTS: u32 = 65_536;
/// No block of that kind.
pub const NO_BLOCK: u32 = u32::MAX;
/// In [`Header::row_mask`]: rows are found by the CRC of the tuple.
pub const CRC8_ROWS: u32 = u32::MAX;
/// In a slot's value: the slot is unsettled. The other bits are the backend's index, all of them set for none.
pub const UNSETTLED: u32 = 1 << 31;

/// MAC addresses of ours at most: one for each interface that is received on.
pub const MAX_MACS: usize = 8;
/// No address, where there are fewer.
pub const NO_MAC: u64 = u64::MAX;
/// The bits of a frame's first eight bytes, read as a little-endian number, that are its destination address.
pub const MAC_BITS: u64 = 0xffff_ffff_ffff;
/// The bit of such a number that says that the address is a group's: broadcast or multicast.
pub const MAC_GROUP: u64 = 1;

/// A plan's single values. What every packet reads comes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Header {
    /// Seed of the flow hash.
    pub seed: [u64; 2],
    /// Our end of the hand-off tunnels, IPv4 as mapped.
    pub local_address: [u8; 16],
    /// Block of the current rows.
    pub rows: u32,
    /// Block of the previous rows, or [`NO_BLOCK`].
    pub previous: u32,
    /// Number of rows less one, or [`CRC8_ROWS`].
    pub row_mask: u32,
    /// Our slot.
    pub local_slot: u16,
    /// UDP port of hand-offs.
    pub handoff_port_be: [u8; 2],
    /// Family of `local_address`: 4 or 6.
    pub local_family: u8,
    /// 1: there may be something in the cache.
    pub caching: u8,
    /// Zero.
    pub reserved: [u8; 2],
    /// Sets in the table of half-open flows.
    pub half_open_sets: u32,
    /// Our interfaces' addresses, little-endian, [`NO_MAC`] behind the last: frames for others are not ours to forward.
    pub macs: [u64; MAX_MACS],
    /// Digest of the view, for hand-offs.
    pub view_digest: u64,
    /// Cookies that hand-offs are accepted with; the first is the one we send.
    pub cookies: [u64; 2],
}

const _: () = assert!(size_of::<Header>() == 144);

/// How to get somewhere.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Hop {
    /// Egress interface; 0: not known.
    pub interface: u32,
    /// MAC of the next hop.
    pub destination_mac: [u8; 6],
    /// MAC of the egress interface: it follows the other one as in a frame.
    pub source_mac: [u8; 6],
    /// Largest IP packet, in bytes.
    pub mtu: u16,
    /// Zero.
    pub reserved: [u8; 2],
}

const _: () = assert!(size_of::<Hop>() == 20 && core::mem::offset_of!(Hop, destination_mac) == 4);

/// A member, by plan and slot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Member {
    /// Where hand-offs go to, IPv4 as mapped.
    pub address: [u8; 16],
    /// Its id.
    pub id: u32,
    /// How to get there.
    pub hop: Hop,
    /// A `Liveness`.
    pub liveness: u8,
    /// 4 or 6.
    pub family: u8,
    /// Zero.
    pub reserved: [u8; 2],
}

const _: () = assert!(size_of::<Member>() == 44);

/// A backend, by plan and index.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Backend {
    /// Where packets are sent.
    pub address: [u8; 16],
    /// Our address in the outer header.
    pub source: [u8; 16],
    /// How to get there.
    pub hop: Hop,
    /// UDP port of the decapsulator.
    pub port_be: [u8; 2],
    /// A `Method`.
    pub method: u8,
    /// 4 or 6.
    pub family: u8,
}

const _: () = assert!(size_of::<Backend>() == 56);

/// Key of a service, or with port and protocol zero of a service's address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct ServiceKey {
    /// Virtual address, IPv4 as mapped.
    pub address: [u8; 16],
    /// Port.
    pub port_be: [u8; 2],
    /// Protocol.
    pub protocol: u8,
    /// Which of the two plans.
    pub plan: u8,
}

const _: () = assert!(size_of::<ServiceKey>() == 20);

/// A service.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct ServiceValue {
    /// Block of its slots.
    pub block: u32,
    /// Block of its slots as they were when a member was last heard that may have been lost since; the same if they have not changed.
    pub earlier: u32,
    /// Idle timeout in milliseconds.
    pub idle_ms: u32,
    /// How long a closing flow is kept after its last packet, in milliseconds.
    pub linger_ms: u32,
    /// Its position in the plan.
    pub index: u32,
    /// 1: replicate on the first packet.
    pub replicate_syn: u32,
    /// 1: flows at backends that are in the map of failed ones are reset.
    pub resets: u32,
}

/// A place in the table in front of the map of services, which does without the map's hash: each service has one place by
/// [`front_place`], and is found in the map alone where another has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct FrontService {
    /// Virtual address, IPv4 as mapped.
    pub address: [u8; 16],
    /// [`ServiceKey`]'s port, protocol and plan.
    pub rest: [u8; 4],
    /// The service.
    pub value: ServiceValue,
}

const _: () = assert!(size_of::<FrontService>() == 48);

impl FrontService {
    /// Nobody's: there are two plans only.
    pub const EMPTY: Self = Self {
        address: [0; 16],
        rest: [0, 0, 0, u8::MAX],
        value: ServiceValue {
            block: 0,
            earlier: 0,
            idle_ms: 0,
            linger_ms: 0,
            index: 0,
            replicate_syn: 0,
            resets: 0,
        },
    };
}

/// Places of a plan.
pub const FRONT: u32 = 256;

/// Where a service stands among [`FRONT`] places; of its address, in words, and its port, as they stand in memory.
#[inline(always)]
pub fn front_place(first: u64, second: u64, port: u16) -> u32 {
    let mixed = (first ^ second ^ port as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (mixed >> 56) as u32
}

/// Key of a backend of a service whose flows are reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct FailedKey {
    /// The service's position in the plan.
    pub service: u32,
    /// The backend's number.
    pub backend: u32,
    /// Which of the two plans.
    pub plan: u32,
}

/// Key of a member's slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct MemberKey {
    /// Its id.
    pub id: u32,
    /// Which of the two plans.
    pub plan: u32,
}

/// A flow of IPv4 in the table of such flows: a [`FlowKey`] without what all of them have in common, because the kernel hashes and
/// compares keys whole, and that is the largest part of what a lookup costs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C, align(8))]
pub struct Key4 {
    /// The client's address.
    pub source: [u8; 4],
    /// The service's address.
    pub destination: [u8; 4],
    /// The client's port, in network byte order.
    pub source_port: [u8; 2],
    /// The service's port, in network byte order.
    pub destination_port: [u8; 2],
    /// IP protocol number.
    pub protocol: u8,
    /// Zero.
    pub reserved: [u8; 3],
}

const _: () = assert!(size_of::<Key4>() == 16);

/// Ports of a fragmented packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Ports {
    /// Until when they are remembered, in milliseconds of the program's clock.
    pub until_ms: u64,
    /// Source and destination port, network byte order.
    pub ports: [[u8; 2]; 2],
    /// Zero.
    pub reserved: [u8; 4],
}

/// How long a fragmented packet's ports are remembered.
pub const FRAGMENT_LIFE_MS: u64 = 2_000;

/// An event in the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct RawEvent {
    /// The flow.
    pub key: FlowKey,
    /// Its entry, after what happened; of an echo's answer `birth` is the token.
    pub entry: FlowEntry,
    /// A `FlowEventKind`, or [`EVENT_ECHO`].
    pub kind: u8,
    /// 1: replicate at once.
    pub at_once: u8,
    /// Zero.
    pub reserved: [u8; 6],
}

const _: () = assert!(size_of::<RawEvent>() == 88);

/// In [`RawEvent::kind`]: an echo of ours was answered.
pub const EVENT_ECHO: u8 = 255;

/// Counters by outcome; a power of two, so that a mask keeps an index within.
pub const OUTCOME_COUNTERS: usize = 16;
const _: () = assert!(OUTCOMES <= OUTCOME_COUNTERS);
/// Counters by reason for a drop, as the loader's `Drop` numbers them.
pub const DROP_REASONS: usize = 16;

/// What one CPU counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct CpuCounters {
    /// By outcome.
    pub outcomes: [u64; OUTCOME_COUNTERS],
    /// By reason.
    pub drops: [u64; DROP_REASONS],
    /// Hand-offs received.
    pub handoffs_in: u64,
    /// Flows not recorded because the table was full.
    pub table_full: u64,
    /// Events that found the ring full.
    pub events_lost: u64,
    /// Packets that were given to user space.
    pub punted: u64,
    /// Packets that found no room on the way to user space.
    pub punts_lost: u64,
    /// A decision named what the plan has not, or a tail call failed: faults of ours.
    pub faults: u64,
    /// Packets whose next hop the plan did not know, so that the kernel's routes were asked.
    pub fib_lookups: u64,
    /// Half-open flows that were pushed out by younger ones.
    pub half_open_evicted: u64,
    /// The tick in which the CPU looked at the clock, and what the clock said, in milliseconds.
    pub tick: u64,
    /// See `tick`.
    pub tick_ms: u64,
    /// Frames for another host's MAC address.
    pub other_host: u64,
}

/// Reasons for a drop as the program knows them: the numbers of the loader's `Drop`, asserted there.
pub mod drops {
    /// Malformed.
    pub const MALFORMED: usize = 3;
    /// No next hop.
    pub const NO_NEXT_HOP: usize = 5;
    /// A wrong cookie.
    pub const BAD_COOKIE: usize = 7;
    /// A bad hand-off.
    pub const BAD_HANDOFF: usize = 8;
    /// A later fragment without its first.
    pub const FRAGMENT: usize = 9;
    /// No service here. This and the next two have the numbers of `flow`'s reasons.
    pub const NO_SERVICE: usize = 0;
    /// Nobody owns the row.
    pub const NOT_JOINED: usize = 13;
    /// No room in front of the packet, or the path to user space is full.
    pub const TRANSMIT: usize = 10;
}

/// Why a packet goes to user space; in [`Punt::why`].
pub mod punt {
    /// It does not fit the path: fragment it or tell the client.
    pub const TOO_BIG: u8 = 1;
    /// Its time to live is over: tell the client.
    pub const TTL: u8 = 2;
    /// A later fragment before its first.
    pub const HOLD: u8 = 3;
    /// A ping that was handed off.
    pub const ECHO: u8 = 4;
    /// Nobody knows the way yet: no route, or no neighbour.
    pub const NO_NEXT_HOP: u8 = 5;
    /// A segment of a flow whose backend has failed: answer it with a RST.
    pub const RESET: u8 = 6;
}

/// Bytes of a packet that is given to user space; longer ones are dropped and counted.
pub const PUNT_BYTES: usize = 2048;

/// A packet for user space: what was decided, then the frame as it is now.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Punt {
    /// The flow's hash.
    pub hash: u64,
    /// Interface it came in on.
    pub ingress: u32,
    /// Bytes of the frame.
    pub length: u32,
    /// For a backend its index.
    pub backend: u32,
    /// Position of the flow's service in its plan.
    pub service: u32,
    /// For a member its slot; else 0xffff.
    pub member: u16,
    /// The member bypassed; else 0xffff.
    pub bypassed: u16,
    /// Hops: of the hand-off to make, or of a held fragment's arrival.
    pub hops: u8,
    /// See [`punt`].
    pub why: u8,
    /// 1: the frame starts with the IP header.
    pub bare: u8,
    /// 1: `ports` count.
    pub has_ports: u8,
    /// Ports of a fragment.
    pub ports: [[u8; 2]; 2],
    /// 1: the member bypassed has the flow, as [`Arrival::known`](phalanx_flow::Arrival::known).
    pub known: u8,
    /// Zero.
    pub reserved: [u8; 3],
    /// As [`Arrival::vintage`](phalanx_flow::Arrival::vintage).
    pub vintage: u32,
    /// Of a held fragment: whom its sender passed over; 0: nobody.
    pub passed_over: u32,
    /// The frame.
    pub frame: [u8; PUNT_BYTES],
}

/// What `bpf_fib_lookup` is asked and answers: `struct bpf_fib_lookup` (`include/uapi/linux/bpf.h`).
#[derive(Clone, Copy)]
#[repr(C)]
pub struct FibLookup {
    /// `AF_INET` or `AF_INET6`.
    pub family: u8,
    /// Protocol; it does not count here.
    pub protocol: u8,
    /// Ports; they do not count here.
    pub ports: [u16; 2],
    /// In: length of the packet; out: largest packet the path takes.
    pub length_mtu: u16,
    /// In: interface the packet came in on; out: the one to send on.
    pub interface: u32,
    /// In: type of service; out: the route's metric.
    pub tos_metric: u32,
    /// Source address; an IPv4 address in its first four bytes.
    pub source: [u8; 16],
    /// Destination address, likewise; out: the neighbour's.
    pub destination: [u8; 16],
    /// Out: VLAN.
    pub vlan: u32,
    /// Out: our MAC.
    pub source_mac: [u8; 6],
    /// Out: the neighbour's MAC.
    pub destination_mac: [u8; 6],
}

const _: () = assert!(size_of::<FibLookup>() == 64);

/// Where programs stand in the table of tail calls.
pub mod stage {
    /// Decides.
    pub const DECIDE: u32 = 0;
    /// Encapsulates towards a backend.
    pub const FORWARD: u32 = 1;
    /// Hands off to a member.
    pub const HAND_OFF: u32 = 2;
    /// Opens a hand-off.
    pub const OPEN: u32 = 3;
    /// Answers pings, and echoes of other members.
    pub const REPLY: u32 = 4;
    /// Gives the packet to user space.
    pub const PUNT: u32 = 5;
    /// Reads what was inside a hand-off.
    pub const INNER: u32 = 6;
    /// Reads packets that are not plain.
    pub const PARSE: u32 = 7;
    /// Reads plain packets of IPv6.
    pub const V6: u32 = 8;
    /// The whole way of new connections of IPv4.
    pub const SYN4: u32 = 9;
    /// The same of IPv6.
    pub const SYN6: u32 = 10;
    /// Records.
    pub const RECORD: u32 = 11;
    /// How many there are.
    pub const COUNT: u32 = 12;
}

/// Programs by their stage; the entry, which is attached, is [`ENTRY`].
pub const STAGES: [&str; stage::COUNT as usize] = [
    "phalanx_decide",
    "phalanx_forward",
    "phalanx_hand_off",
    "phalanx_open",
    "phalanx_reply",
    "phalanx_punt",
    "phalanx_inner",
    "phalanx_parse",
    "phalanx_v6",
    "phalanx_syn4",
    "phalanx_syn6",
    "phalanx_record",
];
/// The program that is attached.
pub const ENTRY: &str = "phalanx";
/// The program that changes flows for the daemon; run by `BPF_PROG_TEST_RUN`.
pub const APPLY: &str = "phalanx_apply";

/// A change of one flow that the daemon asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Change {
    /// The flow.
    pub key: FlowKey,
    /// See [`change`].
    pub what: u32,
    /// Of PROTECT and PUT.
    pub update: u32,
    /// Of STAMP, PROTECT, REMOVE and PUT.
    pub birth: u64,
    /// Of TOUCH, REMOVE and PUT, in milliseconds of the program's clock.
    pub seen_ms: u64,
    /// Of PUT, likewise.
    pub reported_ms: u64,
    /// Of PUT.
    pub backend: u32,
    /// Of PUT.
    pub flags: u32,
}

const _: () = assert!(size_of::<Change>() == 80);

#[cfg(not(target_arch = "bpf"))]
impl Change {
    /// A change that says nothing but what it is.
    pub fn new(what: u32, key: &FlowKey) -> Self {
        Self { key: *key, what, update: 0, birth: 0, seen_ms: 0, reported_ms: 0, backend: 0, flags: 0 }
    }
}

/// Kinds of [`Change`].
pub mod change {
    /// Give the entry its birth if it has none.
    pub const STAMP: u32 = 1;
    /// Mark it as acknowledged if birth and update are these.
    pub const PROTECT: u32 = 2;
    /// It was seen then.
    pub const TOUCH: u32 = 3;
    /// Remove it if it has this birth (or any for 0) and was not seen since.
    pub const REMOVE: u32 = 4;
    /// Record it as half-open, whatever half-open one is there.
    pub const PUT: u32 = 5;
    /// Take it out of the table of half-open flows.
    pub const TAKE_OUT: u32 = 6;
    /// Whether no table gives us the flow any more: if `update` is not 0.
    pub const FORMER: u32 = 7;
}

/// Changes in one run of [`APPLY`].
pub const MAX_CHANGES: usize = 16;

#[cfg(not(target_arch = "bpf"))]
impl Key4 {
    /// The key of a flow of family 4.
    pub fn of(key: &FlowKey) -> Self {
        Self {
            source: unmapped(key.source),
            destination: unmapped(key.destination),
            source_port: key.source_port,
            destination_port: key.destination_port,
            protocol: key.protocol,
            reserved: [0; 3],
        }
    }

    /// The flow.
    pub fn flow(&self) -> FlowKey {
        FlowKey {
            source: mapped(self.source),
            destination: mapped(self.destination),
            source_port: self.source_port,
            destination_port: self.destination_port,
            protocol: self.protocol,
            family: 4,
            reserved: [0; 2],
        }
    }
}

#[cfg(not(target_arch = "bpf"))]
impl Change {
    /// As bytes, in the kernel's order.
    pub fn to_bytes(self) -> [u8; size_of::<Self>()] {
        // SAFETY: `#[repr(C)]` of numbers without implicit padding: 40 + 2 × 4 + 3 × 8 + 2 × 4.
        unsafe { core::mem::transmute(self) }
    }
}

#[cfg(not(target_arch = "bpf"))]
impl RawEvent {
    /// Reads one; `None` for a ring that is not ours.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let bytes = bytes.get(..size_of::<Self>())?;
        // SAFETY: as many bytes as it has, and every bit pattern of numbers is a value.
        Some(unsafe { core::ptr::read_unaligned(bytes.as_ptr().cast()) })
    }
}

#[cfg(not(target_arch = "bpf"))]
impl Punt {
    /// Reads one; `None` for a ring that is not ours.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let bytes = bytes.get(..size_of::<Self>())?;
        // SAFETY: as above.
        Some(unsafe { core::ptr::read_unaligned(bytes.as_ptr().cast()) })
    }
}
