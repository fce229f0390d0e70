//! What forwarders count. Every packet is in exactly one outcome; every dropped one has a reason besides.

use std::sync::atomic::{AtomicU64, Ordering};

use phalanx_flow::decide::{DropReason, OUTCOMES, Outcome};

/// Why a packet went no further. Named as in `phalanx_drops_total{reason=..}`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Drop {
    /// To a service's address, but no service there.
    NoService = 0,
    /// The service has no backend.
    NoBackend,
    /// A protocol we do not balance, to a service's address.
    Protocol,
    /// Truncated, lying or odd headers.
    Malformed,
    /// The time to live ran out here.
    TtlExpired,
    /// No route or neighbour yet for the backend or member; the daemon asks for one.
    NoNextHop,
    /// Too big for the path once encapsulated; the client was told (ICMP).
    TooBig,
    /// A hand-off with a wrong cookie.
    BadCookie,
    /// A hand-off that is not well-formed.
    BadHandoff,
    /// A later fragment that came before its first one and found no room or no first one in time.
    Fragment,
    /// The egress refused the packet.
    Transmit,
    /// Received but not processed: the ring was full.
    RingFull,
    /// Thrown away unprocessed after the process was stopped.
    Stale,
    /// See [`DropReason::NotJoined`].
    NotJoined,
}

/// Number of [`Drop`] reasons.
pub const DROPS: usize = 14;

impl Drop {
    /// All reasons, by number.
    pub const ALL: [Self; DROPS] = [
        Self::NoService,
        Self::NoBackend,
        Self::Protocol,
        Self::Malformed,
        Self::TtlExpired,
        Self::NoNextHop,
        Self::TooBig,
        Self::BadCookie,
        Self::BadHandoff,
        Self::Fragment,
        Self::Transmit,
        Self::RingFull,
        Self::Stale,
        Self::NotJoined,
    ];

    /// The name in metrics and documents.
    pub const fn name(self) -> &'static str {
        match self {
            Self::NoService => "no_service",
            Self::NoBackend => "no_backend",
            Self::Protocol => "protocol",
            Self::Malformed => "malformed",
            Self::TtlExpired => "ttl_expired",
            Self::NoNextHop => "no_next_hop",
            Self::TooBig => "too_big",
            Self::BadCookie => "bad_cookie",
            Self::BadHandoff => "bad_handoff",
            Self::Fragment => "fragment",
            Self::Transmit => "transmit",
            Self::RingFull => "ring_full",
            Self::Stale => "stale",
            Self::NotJoined => "not_joined",
        }
    }
}

impl From<DropReason> for Drop {
    fn from(reason: DropReason) -> Self {
        match reason {
            DropReason::NoService => Self::NoService,
            DropReason::NoBackend => Self::NoBackend,
            DropReason::Protocol => Self::Protocol,
            DropReason::NotJoined => Self::NotJoined,
        }
    }
}

/// Names of [`Outcome`]s, by number, as in `phalanx_packets_total{verdict=..}`.
pub const OUTCOME_NAMES: [&str; OUTCOMES] = [
    "passed",
    "dropped",
    "echo",
    "new",
    "hit",
    "cache_hit",
    "recovered",
    "handed_off",
    "asked",
    "fragment_handed_off",
    "held",
    "icmp_steered",
    "reset",
];

/// A reading of a forwarder's counters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Packets by [`Outcome`].
    pub outcomes: [u64; OUTCOMES],
    /// Packets by [`Drop`].
    pub drops: [u64; DROPS],
    /// Hand-offs received.
    pub handoffs_in: u64,
    /// Flows that were not recorded because the flow table was full.
    pub table_full: u64,
    /// Half-open flows pushed out by younger ones.
    pub half_open_evicted: u64,
    /// Events that found the queue full; a scan by the daemon finds what they were about.
    pub events_lost: u64,
    /// Merged frames (GRO, TSO) cut into segments.
    pub segmented: u64,
    /// Outer packets sent in fragments.
    pub fragmented: u64,
    /// Packets whose next hop was not known, so that the kernel's routes were asked for each of them.
    pub fib_lookups: u64,
    /// Packets that a program in the kernel left to the daemon: too big, out of time, held fragments, without a next hop.
    pub punted: u64,
    /// Frames for another host's MAC address, as a switch floods them, left alone by a program in the kernel. In no outcome: the
    /// packet is not ours.
    pub other_host: u64,
    /// Flows in the flow table, half-open ones not counted. A gauge.
    pub flows: u64,
    /// Half-open flows. A gauge.
    pub half_open: u64,
    /// Entries in the cache. A gauge.
    pub cached: u64,
}

impl Counters {
    /// Packets with this outcome.
    pub fn outcome(&self, outcome: Outcome) -> u64 {
        self.outcomes[outcome as usize]
    }

    /// Packets dropped for this reason.
    pub fn dropped(&self, reason: Drop) -> u64 {
        self.drops[reason as usize]
    }
}

/// Counters that many threads add to. Relaxed: a reading is not a snapshot across counters.
#[derive(Debug, Default)]
pub struct SharedCounters {
    outcomes: [AtomicU64; OUTCOMES],
    drops: [AtomicU64; DROPS],
    /// See [`Counters::handoffs_in`].
    pub handoffs_in: AtomicU64,
    /// See [`Counters::table_full`].
    pub table_full: AtomicU64,
    /// See [`Counters::half_open_evicted`].
    pub half_open_evicted: AtomicU64,
    /// See [`Counters::events_lost`].
    pub events_lost: AtomicU64,
    /// See [`Counters::segmented`].
    pub segmented: AtomicU64,
    /// See [`Counters::fragmented`].
    pub fragmented: AtomicU64,
}

impl SharedCounters {
    /// Counts a packet's outcome.
    pub fn count(&self, outcome: Outcome) {
        self.outcomes[outcome as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// Counts packets of the outcome with this number.
    pub(crate) fn add_outcomes(&self, outcome: usize, packets: u64) {
        if let Some(counter) = self.outcomes.get(outcome) {
            counter.fetch_add(packets, Ordering::Relaxed);
        }
    }

    /// Counts a packet dropped.
    pub fn count_drop(&self, reason: Drop) {
        self.add_drops(reason, 1);
    }

    /// Counts packets dropped.
    pub fn add_drops(&self, reason: Drop, packets: u64) {
        self.drops[reason as usize].fetch_add(packets, Ordering::Relaxed);
    }

    /// A reading, without the gauges.
    pub fn read(&self) -> Counters {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Counters {
            outcomes: self.outcomes.each_ref().map(load),
            drops: self.drops.each_ref().map(load),
            handoffs_in: load(&self.handoffs_in),
            table_full: load(&self.table_full),
            half_open_evicted: load(&self.half_open_evicted),
            events_lost: load(&self.events_lost),
            segmented: load(&self.segmented),
            fragmented: load(&self.fragmented),
            ..Counters::default()
        }
    }
}
