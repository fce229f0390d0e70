//! What a forwarder needs to know, as one immutable whole.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use phalanx_flow::hash::RowFunction;
use phalanx_flow::member::Liveness;
use phalanx_flow::{BackendId, BackendIndex, FlowSeed, MemberId, MemberSlot, Row};

/// Slots of every service's backend table (2^16): the low 16 bits of the flow hash.
pub const SLOTS: usize = 1 << 16;

/// Everything a forwarder needs to process packets.
///
/// Tables that have not changed keep their [`Arc`] from one plan to the next, so that a forwarder can tell by pointer.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Which of `members` we are.
    pub local: MemberSlot,
    /// Seed of the flow hash.
    pub seed: FlowSeed,
    /// How a flow maps to a row.
    pub row_function: RowFunction,
    /// The members known to any table of this plan; a position is a [`MemberSlot`].
    pub members: Vec<PlanMember>,
    /// The current table.
    pub rows: Arc<[Row]>,
    /// The table before, while the handover window is open; same length as `rows`.
    pub previous: Option<Arc<[Row]>>,
    /// Digest of the view the current table comes from; carried in hand-offs.
    pub view_digest: u64,
    /// How packets are handed off.
    pub handoff: Handoff,
    /// The services.
    pub services: Vec<PlanService>,
    /// The backends of all services, draining and foreign ones included; a position is a [`BackendIndex`].
    /// A backend keeps its position for as long as a flow may name it.
    pub backends: Vec<PlanBackend>,
}

/// A member, as far as packets are concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlanMember {
    /// Its name.
    pub id: MemberId,
    /// Where hand-offs go to.
    pub address: IpAddr,
    /// Whether traffic may go to it.
    pub liveness: Liveness,
}

/// How members hand packets to each other (design §4, "Hand-off").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Handoff {
    /// UDP port of the Geneve tunnel, the same on all members.
    pub port: u16,
    /// Derived from the cluster key; hand-offs with another are dropped and counted.
    pub cookie: u64,
    /// A second cookie that is accepted while keys rotate.
    pub old_cookie: Option<u64>,
    /// Fragment the outer packet where the path between members is too narrow, instead of telling the client to send less.
    pub fragment: bool,
}

/// A service: one virtual address, protocol and port.
#[derive(Clone, Debug)]
pub struct PlanService {
    /// Virtual address.
    pub address: IpAddr,
    /// Port.
    pub port: u16,
    /// IP protocol number: 6 or 17.
    pub protocol: u8,
    /// Slot → backend; [`SLOTS`] entries.
    pub slots: Arc<[BackendIndex]>,
    /// What `slots` was when a member was last heard that may have been lost since, if it has changed: by this goes what nobody knows any
    /// more.
    pub earlier: Option<Arc<[BackendIndex]>>,
    /// Slots that change or changed just now; flows recorded in them are replicated at once.
    pub unsettled: Option<Arc<SlotSet>>,
    /// Backends that have failed and whose TCP flows are to be reset (`on_failure = "reset"`); few, in no order.
    pub failed: Arc<[BackendIndex]>,
    /// A flow that no holder has seen for this long is idle.
    pub idle: Duration,
    /// How long a closing flow is kept after its last packet.
    pub linger: Duration,
    /// How long a reset flow is kept after its last packet.
    pub reset_linger: Duration,
    /// How long a half-open flow is kept after its last packet.
    pub half_open: Duration,
    /// Replicate on the first packet.
    pub replicate_syn: bool,
    /// Fragment the outer packet where the path to the backend is too narrow, instead of telling the client to send less.
    pub fragment: bool,
}

/// A set of slots of one service.
#[derive(Clone, Debug)]
pub struct SlotSet(pub Box<[u64; SLOTS / 64]>);

impl SlotSet {
    /// The set of `slots`.
    pub fn new(slots: impl IntoIterator<Item = u16>) -> Self {
        let mut bits = Box::new([0_u64; SLOTS / 64]);
        for slot in slots {
            bits[usize::from(slot) / 64] |= 1 << (slot % 64);
        }
        Self(bits)
    }

    /// Whether `slot` is in the set.
    pub fn contains(&self, slot: u16) -> bool {
        self.0[usize::from(slot) / 64] & (1 << (slot % 64)) != 0
    }
}

/// A backend, as far as packets are concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlanBackend {
    /// Its name on all members.
    pub id: BackendId,
    /// Our address in the outer header; of the family of the backend's.
    pub source: IpAddr,
}

/// How to reach the plan's members and backends; positions are those of the plan.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NextHops {
    /// Per [`MemberSlot`].
    pub members: Vec<Option<NextHop>>,
    /// Per [`BackendIndex`].
    pub backends: Vec<Option<NextHop>>,
}

/// The egress of one destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NextHop {
    /// Index of the interface to send on.
    pub interface: u32,
    /// That interface's MAC.
    pub source_mac: [u8; 6],
    /// The MAC of the router or neighbour.
    pub destination_mac: [u8; 6],
    /// Largest IP packet the path takes, in bytes.
    pub mtu: u16,
}
