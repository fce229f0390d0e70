//! What happens to a packet: one pure function for every forwarder, the simulator and `phalanx explain` (design §4).
//!
//! In: the packet, how it came ([`Arrival`]), and the tables ([`Tables`]).
//! Out: a [`Decision`]: a verdict, and what to record. The caller carries it out; nothing is written here.
//!
//! ```text
//!  not a service's address ─► Pass            to it, but no service ─► EchoReply, Drop
//!  fragment ─► its fragment owner, who knows the ports
//!  SYN ──────► live entry: Forward        acting owner: record, Forward        else HandOff to the acting owner
//!  else ─────► entry: Forward    cache: Forward    acting owner: ask once, then Forward and record    else HandOff
//! ```

use crate::entry::{BackendIndex, FlowEntry, FlowEventKind, FlowFlags, FlowState, Vintage};
use crate::hash::{FlowSeed, flow_hash};
use crate::key::{FlowKey, UDP};
use crate::member::{Liveness, MemberId, MemberSlot};
use crate::packet::{Fragment, Packet, PacketKind, tcp_flags};
use crate::row::Row;

/// A packet handed off this many times is dealt with where it is, so that no views, however different, make a loop (design §4).
/// What nobody on its way has known is asked of one holder more before it is guessed, and what its sender has the flow of goes back to the
/// sender: one hop more each.
pub const MAX_HOPS: u8 = 2;

/// An owner believes its own entry of a connection that has ended for this long after the entry's last packet; then it asks the backup
/// first: the tuple may have been used again, and the word of that be on its way. The client's last packets come within it.
const ENDED_BELIEVED_MS: u64 = 1_000;

/// How a packet came to us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arrival {
    /// Hand-offs behind it; 0: from the wire.
    pub hops: u8,
    /// Whom the sender passed over because it suspects them.
    pub bypassed: Option<MemberId>,
    /// Who was passed over handed the packet off itself: it has the flow, but only from former times.
    pub known: bool,
    /// Of what it has, if `known` and not a fragment.
    pub vintage: Vintage,
    /// Source and destination port of a fragment, as a member that saw the first one tells us.
    pub ports: Option<[[u8; 2]; 2]>,
}

impl Arrival {
    /// From a client, by way of a router.
    pub const WIRE: Self = Self { hops: 0, bypassed: None, known: false, vintage: Vintage(0), ports: None };
}

/// What the decision reads of the local member.
#[derive(Clone, Copy, Debug)]
pub struct Local {
    /// Our place in the plan.
    pub slot: MemberSlot,
    /// Whether we may own: without a lease we record nothing, hand off, and forward what we know only if nobody else does.
    pub leased: bool,
    /// The flow hash's seed.
    pub seed: FlowSeed,
    /// The forwarder's monotonic clock, in milliseconds.
    pub now_ms: u64,
}

/// What a packet's destination is to us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ServiceMatch {
    /// Not ours: the kernel's.
    Foreign,
    /// The address of a service, but no service of ours.
    AddressOnly,
    /// A service.
    Service(Service),
}

/// What the decision reads of a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Service {
    /// Its place in the plan.
    pub index: u32,
    /// A flow not seen by any holder for this long is idle.
    pub idle_ms: u32,
    /// The same for a flow whose client has sent a FIN.
    pub linger_ms: u32,
    /// Replicate a flow on its first packet (`replicate = "syn"`, the founding document's way).
    pub replicate_syn: bool,
    /// A backend has failed whose flows are to be reset (`on_failure = "reset"`): [`Tables::has_failed`] says which.
    pub resets: bool,
}

/// Which connections the consistent table is asked about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Began {
    /// With this packet.
    Now,
    /// Before, and nobody knows it any more: what a member knew that is lost. The table as it was when that member was last heard.
    Earlier,
}

/// What the consistent table says of a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Choice {
    /// The best backend; [`BackendIndex::NONE`] if the service has none.
    pub backend: BackendIndex,
    /// The slot changes now or changed within the last 10 s: flows in it are replicated at once.
    pub unsettled: bool,
}

/// The tables a decision reads, one snapshot of them for the whole of a packet.
pub trait Tables {
    /// The local member.
    fn local(&self) -> Local;
    /// What `destination`, port and protocol of the key are to us.
    fn service(&self, key: &FlowKey) -> ServiceMatch;
    /// The row of a flow.
    fn row_of(&self, key: &FlowKey, hash: u64) -> u32;
    /// The same where nobody needs the hash.
    #[inline(always)]
    fn hashed_row_of(&self, key: &FlowKey, seed: FlowSeed) -> u32 {
        self.row_of(key, flow_hash(seed, key))
    }
    /// A row of the current table.
    fn row(&self, row: u32) -> Row;
    /// The row in the previous table, while a handover window is open.
    fn previous_row(&self, row: u32) -> Option<Row>;
    /// What we believe of a member.
    fn liveness(&self, slot: MemberSlot) -> Liveness;
    /// A member's place in the plan, [`MemberSlot::NONE`] for a stranger.
    fn slot_of(&self, id: MemberId) -> MemberSlot;
    /// The flow table, half-open flows included.
    fn flow(&self, key: &FlowKey) -> Option<FlowEntry>;
    /// The cache.
    fn cached(&self, key: &FlowKey) -> Option<FlowEntry>;
    /// Whether flows of this service at this backend are to be reset; asked only if [`Service::resets`].
    fn has_failed(&self, service: u32, backend: BackendIndex) -> bool;
    /// The consistent table of a service.
    fn consistent(&self, service: u32, slot: u16, began: Began) -> Choice;
    /// The ports of a fragmented packet, by [`Packet::fragment_key`].
    fn fragment_ports(&self, key: &FlowKey) -> Option<[[u8; 2]; 2]>;
}

/// Where a packet goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Leave it to the kernel.
    Pass,
    /// Drop it, and count why.
    Drop(DropReason),
    /// Answer the ping in place.
    EchoReply,
    /// Answer the segment with a RST ([`crate::encap::tcp_reset`]).
    Reset,
    /// To a backend.
    Forward(BackendIndex),
    /// To the member that should process it.
    HandOff(HandOff),
    /// A later fragment before its first one: keep it a little while, or drop it.
    Hold,
}

/// A hand-off to make.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HandOff {
    /// To whom.
    pub to: MemberSlot,
    /// Hops to write into it.
    pub hops: u8,
    /// Whom we passed over.
    pub bypassed: MemberSlot,
    /// As [`Arrival::known`].
    pub known: bool,
    /// As [`Arrival::vintage`].
    pub vintage: Vintage,
    /// The ports of a fragment, if known.
    pub ports: Option<[[u8; 2]; 2]>,
}

/// Why the decision itself drops a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum DropReason {
    /// To a service's address, but no service there.
    NoService = 0,
    /// The service has no backend.
    NoBackend = 1,
    /// A protocol we do not balance, to a service's address.
    Protocol = 2,
    /// Nobody owns the row: we are in no cluster yet, or no more; or we have no lease, and none of the others can be asked; or who asks us has a newer record, and is a stranger to us. The consistent table alone would be a guess that resets a connection which others know, or a new one that nobody knows. The client sends again.
    NotJoined = 3,
}

/// What to do with the flow table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Nothing.
    Keep,
    /// Put a new entry there, whatever was there.
    Insert,
    /// Overwrite the entry that was read.
    Update,
    /// Overwrite the cache's entry that was read.
    UpdateCache,
    /// Remove the entry that was read: its tuple is used again, and somebody else records the new connection.
    Remove,
}

/// How the decision came about, for the counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Outcome {
    /// Not ours.
    Passed = 0,
    /// Dropped by [`DropReason`].
    Dropped = 1,
    /// A ping answered.
    Echo = 2,
    /// A new flow recorded and forwarded.
    New = 3,
    /// Forwarded by the flow table.
    Hit = 4,
    /// Forwarded by the cache.
    CacheHit = 5,
    /// Forwarded by the consistent table because nobody knew the flow.
    Recovered = 6,
    /// Handed off to the acting owner.
    HandedOff = 7,
    /// Handed off to ask another holder.
    Asked = 8,
    /// A fragment handed to the member that gathers the packet's fragments.
    FragmentHandedOff = 9,
    /// A later fragment held.
    Held = 10,
    /// An ICMP error steered to its flow's backend.
    IcmpSteered = 11,
    /// Answered with a RST: the flow's backend has failed.
    Reset = 12,
}

/// Number of [`Outcome`]s.
pub const OUTCOMES: usize = 13;

/// The whole of what [`decide`] says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decision {
    /// Where the packet goes.
    pub verdict: Verdict,
    /// How that came about.
    pub outcome: Outcome,
    /// The key under which everything below is recorded (a fragment's with its ports).
    pub key: FlowKey,
    /// The flow's hash: queue spreading and outer ports come from it too.
    pub hash: u64,
    /// The flow's service, for its timeouts.
    pub service: u32,
    /// What to do with the flow table.
    pub action: Action,
    /// The entry to write if `action` says so.
    pub entry: FlowEntry,
    /// What to tell the daemon.
    pub event: Option<FlowEventKind>,
    /// The event's [`FlowEvent::at_once`](crate::entry::FlowEvent::at_once).
    pub at_once: bool,
    /// Erase the cache's entry for the key.
    pub erase_cache: bool,
    /// Remember the ports of a fragmented packet under its fragment key.
    pub learn_fragment: bool,
}

const NO_ENTRY: FlowEntry = FlowEntry {
    birth: 0,
    last_seen_ms: 0,
    last_reported_ms: 0,
    update: 0,
    backend: BackendIndex::NONE,
    state: FlowState::HalfOpen as u8,
    flags: FlowFlags(0),
    reserved: [0; 6],
};

impl Decision {
    /// To the kernel, nothing recorded: what [`decide_into`] starts from.
    pub const PASS: Self = Self {
        verdict: Verdict::Pass,
        outcome: Outcome::Passed,
        key: FlowKey {
            source: [0; 16],
            destination: [0; 16],
            source_port: [0; 2],
            destination_port: [0; 2],
            protocol: 0,
            family: 0,
            reserved: [0; 2],
        },
        hash: 0,
        service: u32::MAX,
        action: Action::Keep,
        entry: NO_ENTRY,
        event: None,
        at_once: false,
        erase_cache: false,
        learn_fragment: false,
    };

    /// Back to [`Self::PASS`] for another packet. The entry stays what it was: it counts only where something sets it.
    #[inline(always)]
    fn restart(&mut self, key: &FlowKey) {
        self.key = *key;
        self.hash = 0;
        self.service = u32::MAX;
        self.action = Action::Keep;
        self.event = None;
        self.at_once = false;
        self.erase_cache = false;
        self.learn_fragment = false;
        self.end(Verdict::Pass, Outcome::Passed);
    }

    #[inline(always)]
    const fn end(&mut self, verdict: Verdict, outcome: Outcome) {
        self.verdict = verdict;
        self.outcome = outcome;
    }
}

/// Who is whom for one packet.
#[derive(Clone, Copy)]
struct Roles {
    local: Local,
    row_number: u32,
    row: Row,
    bypassed: MemberSlot,
    known: bool,
    /// Who handed the packet off has the flow, and is not in our plan.
    strange: bool,
}

impl Roles {
    #[inline(always)]
    fn new<T: Tables>(tables: &T, local: Local, key: &FlowKey, hash: u64, arrival: &Arrival) -> Self {
        let row_number = tables.row_of(key, hash);
        let bypassed = match arrival.bypassed {
            Some(id) => tables.slot_of(id),
            None => MemberSlot::NONE,
        };
        let known = arrival.known && bypassed.is_some() && bypassed != local.slot;
        let strange = arrival.known && !bypassed.is_some();
        Self { local, row_number, row: tables.row(row_number), bypassed, known, strange }
    }

    /// Whether traffic may go to `slot`: alive, not passed over on the way here, and if it is us, leased.
    #[inline(always)]
    fn usable<T: Tables>(&self, tables: &T, slot: MemberSlot) -> bool {
        slot.is_some()
            && slot != self.bypassed
            && if slot == self.local.slot {
                self.local.leased
            } else {
                matches!(tables.liveness(slot), Liveness::Alive)
            }
    }

    /// Whether our own entry may be believed: whoever holds the row no more is not told when the tuple is used again, nor is who has no
    /// lease, being cut off, stopped or without a daemon.
    #[inline(always)]
    fn believes<T: Tables>(&self, tables: &T, entry: &FlowEntry, arrival: &Arrival) -> bool {
        if entry.flags.has(FlowFlags::PRESUMED) {
            // Who recorded the connection knows better. Only in its place does this count.
            return self.local.leased
                && self.acting_owner(tables) == self.local.slot
                && !self.usable(tables, self.holder_with_us())
                && !self.gives_way(entry, arrival);
        }
        // Of two members, who loses its lease has rather lost the other one (docs/design/0002-membership.md).
        let [owner, backup, third] = self.row.ranks;
        let former = entry.flags.has(FlowFlags::FORMER) || !self.local.leased && third.is_some();
        if self.gives_way(entry, arrival) {
            return false;
        }
        if !former && entry.flow_state().is_live() {
            return true;
        }
        // An owner before us, or who acted for us while we could not be reached, heard of the tuple's next use before we did.
        let owns = owner == self.local.slot;
        let quiet = self.local.now_ms.saturating_sub(entry.last_seen_ms) > ENDED_BELIEVED_MS;
        if !former && owns && self.local.leased && !quiet && !self.is_new_owner(tables) {
            return true;
        }
        if arrival.hops >= MAX_HOPS {
            return true;
        }
        let acting = self.acting_owner(tables);
        if acting.is_some() && acting != self.local.slot {
            // Who is asked says what it has. An owner is asked by nobody, but given what is its own; so is, by those who switch before it, an owner
            // to be, which has what was sent ahead: the tuple's next use the owner of now hears of. If that one is lost, its backup asks.
            let asked = former || backup == self.local.slot || !self.usable(tables, acting);
            return arrival.hops > 0 && !owns && asked;
        }
        !self.asked(tables, true).is_some()
    }

    /// Whether another member owned the row before.
    #[inline(always)]
    fn is_new_owner<T: Tables>(&self, tables: &T) -> bool {
        // Not `is_some_and`: the verifier must see a value on every way here.
        let before = tables.previous_row(self.row_number).unwrap_or(Row::EMPTY).owner();
        before.is_some() && before != self.local.slot
    }

    /// Whether the packet may go back to who has its flow, or has just recorded it: even if it is suspected, since the packet came from it
    /// just now, or by way of one holder more ([`Self::rather_asked`]).
    #[inline(always)]
    const fn returns(&self, arrival: &Arrival) -> bool {
        self.known && arrival.hops <= MAX_HOPS + 1
    }

    /// Whom a packet goes to before it goes back to an owner that has asked us, who hold nothing of the row and do not know the flow: by its
    /// table we would hold it, but by ours the backup does, which may know what happened while the owner was away. (A backup gets it back at
    /// once: the owner may be lost, which is why it asks.)
    #[inline(always)]
    fn rather_asked<T: Tables>(&self, tables: &T, arrival: &Arrival) -> MemberSlot {
        let [owner, backup, _] = self.row.ranks;
        let by_owner = self.known && self.bypassed == owner;
        if by_owner && arrival.hops <= MAX_HOPS && backup != self.local.slot && self.usable(tables, backup) {
            backup
        } else {
            MemberSlot::NONE
        }
    }

    /// Whether who handed the packet off has a newer record than `entry`, and gets it back.
    #[inline(always)]
    const fn gives_way(&self, entry: &FlowEntry, arrival: &Arrival) -> bool {
        self.returns(arrival) && arrival.ports.is_none() && Vintage::of(entry).is_replaced_by(arrival.vintage)
    }

    /// Whether the packet goes back to who has its flow: what we have is older, or we have nothing, and a holder has asked us, or we have no
    /// lease either and cannot give it to who acts for us (`theirs`).
    #[inline(always)]
    fn returned(&self, entry: Option<&FlowEntry>, arrival: &Arrival, theirs: bool) -> bool {
        match entry {
            Some(entry) => self.gives_way(entry, arrival),
            None => {
                let is_holder = self.bypassed == self.row.owner() || self.bypassed == self.row.backup();
                self.returns(arrival) && (is_holder || !self.local.leased && !theirs)
            }
        }
    }

    /// Whether who handed the packet off has a newer record than we, and cannot get it back: it has joined while we were away, and the plan that
    /// our daemon left behind is older. Whoever else we asked could not be told of that record.
    #[inline(always)]
    fn is_out_of_reach(&self, entry: Option<&FlowEntry>, arrival: &Arrival) -> bool {
        self.strange
            && arrival.ports.is_none()
            && match entry {
                Some(entry) => Vintage::of(entry).is_replaced_by(arrival.vintage),
                None => true,
            }
    }

    /// Whether there are other members that might say what we may not.
    #[inline(always)]
    fn others(&self) -> bool {
        self.row.owner() != self.local.slot || self.row.backup().is_some()
    }

    /// The owner, or the backup while the owner is suspected; the owner again if both are.
    #[inline(always)]
    fn acting_owner<T: Tables>(&self, tables: &T) -> MemberSlot {
        let [owner, backup, third] = self.row.ranks;
        if self.usable(tables, owner) {
            owner
        } else if self.usable(tables, backup) {
            backup
        } else if owner == self.local.slot && self.usable(tables, third) {
            // We have no lease and our backup is suspected: still the next member of the row, never ourselves.
            third
        } else {
            owner
        }
    }

    /// Somebody else who may hold a flow that we, its acting owner, do not know, or do not believe what we have of it (design §4, step 5).
    #[inline(always)]
    fn other_holder<T: Tables>(&self, tables: &T, has: bool) -> MemberSlot {
        let other = |slot: MemberSlot| slot != self.local.slot && self.usable(tables, slot);
        if let Some(previous) = tables.previous_row(self.row_number) {
            if other(previous.owner()) {
                return previous.owner();
            }
            // If that is us, its backup may have acted for us while we had no lease. About what we have ourselves the backup of now has
            // newer news.
            if other(previous.backup()) && (previous.owner() != self.local.slot || !has) {
                return previous.backup();
            }
        }
        let holder = self.holder_with_us();
        if other(holder) { holder } else { MemberSlot::NONE }
    }

    /// The backup if we are the owner, and else the owner.
    #[inline(always)]
    fn holder_with_us(&self) -> MemberSlot {
        if self.row.owner() == self.local.slot { self.row.backup() } else { self.row.owner() }
    }

    /// Whom we, the acting owner, ask for a flow that we do not know: who handed it off because it has it, and else who may hold it.
    /// `has`: we have the flow ourselves, but from former times, and who handed it off has no better.
    #[inline(always)]
    fn asked<T: Tables>(&self, tables: &T, has: bool) -> MemberSlot {
        if self.known && !has {
            return self.bypassed;
        }
        let other = self.other_holder(tables, has);
        if has && !other.is_some() { self.passed_over(tables) } else { other }
    }

    /// The owner that we act for only because who handed the packet off suspects it, while the handover window is open: we may hold the row
    /// since a moment ago, and what we have missed the tuple's next use. Not one that we suspect, too: that one is rather lost.
    #[inline(always)]
    fn passed_over<T: Tables>(&self, tables: &T) -> MemberSlot {
        let owner = self.row.owner();
        let passed = owner.is_some() && owner == self.bypassed && owner != self.local.slot && !self.known;
        if passed
            && self.local.leased
            && tables.previous_row(self.row_number).is_some()
            && matches!(tables.liveness(owner), Liveness::Alive)
        {
            owner
        } else {
            MemberSlot::NONE
        }
    }

    /// As [`Self::other_holder`], among those that are suspected, by us or by who handed the packet off, while the handover window is open.
    ///
    /// A holder that has held its row for long knows all that deviates, so what it does not know it may guess.
    /// After a change it may not have been told yet: a packet that is lost on its way to somebody who is dead comes again, and a
    /// connection sent to the wrong backend does not.
    #[inline(always)]
    fn doubted_holder<T: Tables>(&self, tables: &T) -> MemberSlot {
        let Some(previous) = tables.previous_row(self.row_number) else { return MemberSlot::NONE };
        let doubted = |slot: MemberSlot| {
            slot != self.local.slot
                && slot.is_some()
                && match tables.liveness(slot) {
                    Liveness::Suspect => true,
                    Liveness::Alive => slot == self.bypassed,
                    Liveness::Down => false,
                }
        };
        let [first, second, _] = previous.ranks;
        let [third, fourth, _] = self.row.ranks;
        if doubted(first) {
            first
        } else if doubted(second) {
            second
        } else if doubted(third) {
            third
        } else if doubted(fourth) {
            fourth
        } else {
            MemberSlot::NONE
        }
    }

    /// Whom to ask for what nobody on a packet's way has known, when it has come as far as it may and else would be guessed: the backup, or
    /// the owner while that one is suspected. If we are the owner or hold nothing of the row, whoever sent it here has another table than
    /// we have, and was rather who is the owner in ours. A backup is asked by the owner, who does not know it either.
    #[inline(always)]
    fn last_asked<T: Tables>(&self, tables: &T) -> MemberSlot {
        let [owner, backup, _] = self.row.ranks;
        if backup == self.local.slot {
            MemberSlot::NONE
        } else if self.usable(tables, backup) {
            backup
        } else if owner != self.local.slot && self.usable(tables, owner) {
            owner
        } else {
            MemberSlot::NONE
        }
    }

    /// `has`: we have the flow, and would rather know better.
    #[inline(always)]
    fn hand_off<T: Tables>(
        &self,
        tables: &T,
        to: MemberSlot,
        arrival: &Arrival,
        has: Option<&FlowEntry>,
    ) -> Verdict {
        let knows = has.is_some();
        let owner = self.row.owner();
        let (bypassed, known) = if to == self.bypassed {
            // It gets back what it has asked for, or is asked itself though others suspect it.
            if knows && !self.known { (self.local.slot, true) } else { (MemberSlot::NONE, false) }
        } else if knows && (self.bypassed.is_some() || self.row.backup() == self.local.slot) {
            // That we have the flow says more than whom others passed over, since who gets it may hand it on no more, or whom we act for, since it
            // may have older news than we.
            (self.local.slot, true)
        } else if self.bypassed.is_some() {
            (self.bypassed, self.known)
        } else if to != owner && owner.is_some() && !self.usable(tables, owner) {
            (owner, knows && owner == self.local.slot)
        } else if knows {
            (self.local.slot, true)
        } else {
            (MemberSlot::NONE, false)
        };
        let hops = arrival.hops.wrapping_add(1);
        let vintage = match has {
            _ if !known => Vintage(0),
            Some(entry) => Vintage::of(entry),
            None => arrival.vintage,
        };
        Verdict::HandOff(HandOff { to, hops, bypassed, known, vintage, ports: arrival.ports })
    }
}

/// Decides what happens to one packet. See the module's doc; the steps are those of design §4.
#[inline(always)]
pub fn decide<T: Tables>(packet: &Packet, arrival: &Arrival, tables: &T) -> Decision {
    let mut decision = Decision::PASS;
    decide_into(&mut decision, packet, arrival, tables);
    decision
}

/// [`decide`] into memory of the caller's, whatever it held before: a decision is too large to be moved about on the eBPF stack.
/// [`Decision::entry`] is meaningless unless an action or an event says otherwise.
#[inline(always)]
pub fn decide_into<T: Tables>(decision: &mut Decision, packet: &Packet, arrival: &Arrival, tables: &T) {
    // Step 1: is it ours?
    decision.restart(&packet.key);
    let mut arrival = *arrival;
    let local = tables.local();

    if matches!(packet.kind, PacketKind::NeighbourDiscovery) {
        return;
    }
    if !matches!(packet.fragment, Fragment::Whole)
        && !matches!(packet.kind, PacketKind::IcmpError)
        && !fragment_ports(decision, packet, &mut arrival, tables, local)
    {
        return;
    }

    let service = match tables.service(&decision.key) {
        ServiceMatch::Foreign => return,
        ServiceMatch::AddressOnly => {
            decision.learn_fragment = false;
            return match packet.kind {
                PacketKind::EchoRequest => decision.end(Verdict::EchoReply, Outcome::Echo),
                PacketKind::Other | PacketKind::LaterFragment => {
                    decision.end(Verdict::Drop(DropReason::Protocol), Outcome::Dropped);
                }
                _ => decision.end(Verdict::Drop(DropReason::NoService), Outcome::Dropped),
            };
        }
        ServiceMatch::Service(service) => service,
    };

    decision.hash = flow_hash(local.seed, &decision.key);
    let roles = Roles::new(tables, local, &decision.key, decision.hash, &arrival);
    decision.service = service.index;

    match packet.kind {
        PacketKind::TcpSyn => syn(decision, &roles, &arrival, tables, &service),
        PacketKind::IcmpError => icmp_error(decision, &roles, &arrival, tables, &service),
        _ => other(decision, packet, &roles, &arrival, tables, &service),
    }
}

/// All fragments of a packet meet at the owner of row hash(src, dst, protocol, id), who learns the ports from the first one.
///
/// Whether the ports are known, and stand in the decision's key; if not, the decision is made.
#[inline(always)]
fn fragment_ports<T: Tables>(
    decision: &mut Decision,
    packet: &Packet,
    arrival: &mut Arrival,
    tables: &T,
    local: Local,
) -> bool {
    let Some(fragment_key) = packet.fragment_key() else { return true };
    if matches!(tables.service(&decision.key), ServiceMatch::Foreign) {
        return false;
    }
    if arrival.ports.is_none() {
        let hash = flow_hash(local.seed, &fragment_key);
        let roles = Roles::new(tables, local, &fragment_key, hash, arrival);
        let gatherer = roles.acting_owner(tables);
        if gatherer != local.slot && gatherer.is_some() && arrival.hops == 0 {
            decision.end(roles.hand_off(tables, gatherer, arrival, None), Outcome::FragmentHandedOff);
            return false;
        }
        // The gatherer was chosen by another row: whoever it bypassed says nothing of the flow's row.
        arrival.bypassed = None;
        arrival.known = false;
        arrival.ports = if matches!(packet.fragment, Fragment::First { .. }) {
            decision.learn_fragment = true;
            Some([packet.key.source_port, packet.key.destination_port])
        } else {
            tables.fragment_ports(&fragment_key)
        };
    }
    let Some([source, destination]) = arrival.ports else {
        decision.end(Verdict::Hold, Outcome::Held);
        return false;
    };
    decision.key.source_port = source;
    decision.key.destination_port = destination;
    true
}

/// Step 2.
#[inline(always)]
fn syn<T: Tables>(decision: &mut Decision, roles: &Roles, arrival: &Arrival, tables: &T, service: &Service) {
    decision.erase_cache = true;
    let known = tables.flow(&decision.key);
    let acting = roles.acting_owner(tables);
    let theirs = acting != roles.local.slot && acting.is_some() && arrival.hops < MAX_HOPS;
    // Even if we suspect it: the client's next packets reach it as this one did, and we presume what it has, should it be lost.
    let recorded = roles.returns(arrival);
    if let Some(entry) = known
        && entry.flow_state().is_live()
        && !entry.flags.has(FlowFlags::PRESUMED)
    {
        if !(recorded || theirs && (entry.flags.has(FlowFlags::FORMER) || !roles.local.leased)) {
            seen(decision, entry, Outcome::Hit, roles, service);
            return;
        }
    } else if known.is_some() {
        // What is known of an ended connection must not be believed by the client's next packet, which may be here before the owner has
        // told us of the new one.
        decision.action = Action::Remove;
    }
    if recorded || theirs {
        let to = if recorded { roles.bypassed } else { acting };
        decision.verdict = roles.hand_off(tables, to, arrival, None);
        decision.outcome = Outcome::HandedOff;
        if decision.action == Action::Remove
            && let Some(before) = known
        {
            presume(decision, before.birth, roles, tables, service);
        }
        return;
    }
    let owns = acting == roles.local.slot && roles.local.leased;
    // On its last hop it is nobody else's to record; who records it tells the holders at once, and believes them about the next packet.
    let stray = acting.is_some() && !owns && roles.local.leased;
    pick(decision, roles, tables, service, owns || stray, Outcome::New);
    decision.entry.flags = decision.entry.flags.with(FlowFlags::FORMER, stray);
    decision.at_once |= stray || known.is_some() || service.replicate_syn;
    let other = roles.holder_with_us();
    let knows_it = other != roles.local.slot && roles.usable(tables, other);
    if known.is_some() && decision.action == Action::Insert && arrival.hops < MAX_HOPS && knows_it {
        // The other holder knows the connection before. It must not act for us on that when we are lost before we have told it of this one,
        // as a program whose daemon is dead always is: the SYN itself tells it, and comes back.
        decision.verdict = roles.hand_off(tables, other, arrival, Some(&decision.entry));
    }
}

/// Puts in the place of a connection that was born at `before` and has ended what whoever records the next one, whose SYN passes through
/// here, most likely records. It keeps that birth: every record that was born later is of the connection that is presumed.
///
/// Were there nothing, whoever acts for that one when it is lost would ask others, and those have only heard of the connection before.
#[inline(always)]
fn presume<T: Tables>(decision: &mut Decision, before: u64, roles: &Roles, tables: &T, service: &Service) {
    #[expect(clippy::cast_possible_truncation, reason = "the slot is the low 16 bits of the hash")]
    let choice = tables.consistent(service.index, decision.hash as u16, Began::Now);
    if choice.backend != BackendIndex::NONE {
        decision.action = Action::Insert;
        decision.entry = picked(choice.backend, roles.local.now_ms);
        decision.entry.birth = before;
        decision.entry.flags = FlowFlags(FlowFlags::PRESUMED);
    }
}

/// What may be said to others to be known of a flow: not what is presumed.
#[inline(always)]
const fn said(known: Option<&FlowEntry>) -> Option<&FlowEntry> {
    match known {
        Some(entry) if !entry.flags.has(FlowFlags::PRESUMED) => known,
        _ => None,
    }
}

/// Steps 3 to 6, for everything that is neither a SYN nor an ICMP error.
#[inline(always)]
fn other<T: Tables>(
    decision: &mut Decision,
    packet: &Packet,
    roles: &Roles,
    arrival: &Arrival,
    tables: &T,
    service: &Service,
) {
    let known = tables.flow(&decision.key);
    if roles.is_out_of_reach(said(known.as_ref()), arrival) {
        return decision.end(Verdict::Drop(DropReason::NotJoined), Outcome::Dropped);
    }
    if let Some(entry) = known
        && roles.believes(tables, &entry, arrival)
    {
        let failed = is_to_be_reset(&entry, packet, tables, service);
        let presumed = entry.flags.has(FlowFlags::PRESUMED);
        let (mut entry, changed) = advance(entry, packet, failed);
        if presumed {
            // From now on it is a record of ours: a guess that was born now.
            entry.birth = 0;
            entry.flags = FlowFlags(FlowFlags::RECOVERED);
        }
        seen(decision, entry, Outcome::Hit, roles, service);
        if changed {
            // What was presumed is half-open, so that each packet but a SYN changes it.
            decision.event = Some(if presumed { FlowEventKind::New } else { FlowEventKind::Changed });
            decision.entry.update = decision.entry.update.wrapping_add(1);
            decision.entry.last_reported_ms = roles.local.now_ms;
            decision.entry.flags = decision.entry.flags.with(FlowFlags::PROTECTED, false);
        }
        if failed {
            decision.end(Verdict::Reset, Outcome::Reset);
        }
        return;
    }
    let known = said(known.as_ref());
    let acting = roles.acting_owner(tables);
    let hops_left = arrival.hops < MAX_HOPS;
    let ours = acting == roles.local.slot;
    let theirs = hops_left && !ours && acting.is_some();
    // Nobody tells a cache that a tuple is used again: whose connection has ended there is the owner's to say.
    if let Some(entry) = tables.cached(&decision.key)
        && (entry.flow_state().is_live() || !theirs)
        && !roles.gives_way(&entry, arrival)
    {
        let failed = is_to_be_reset(&entry, packet, tables, service);
        let (entry, changed) = advance(entry, packet, failed);
        seen(decision, entry, Outcome::CacheHit, roles, service);
        decision.action = Action::UpdateCache;
        if changed {
            decision.event = Some(FlowEventKind::Cached);
            decision.entry.update = decision.entry.update.wrapping_add(1);
            decision.entry.last_reported_ms = roles.local.now_ms;
        }
        if failed {
            decision.end(Verdict::Reset, Outcome::Reset);
        }
        return;
    }
    if known.is_none() {
        let rather = roles.rather_asked(tables, arrival);
        if rather.is_some() {
            decision.verdict = roles.hand_off(tables, rather, arrival, None);
            decision.outcome = Outcome::Asked;
            return;
        }
    }
    let returned = roles.returned(known, arrival, theirs);
    if theirs || returned {
        let to = if returned { roles.bypassed } else { acting };
        decision.verdict = roles.hand_off(tables, to, arrival, known);
        decision.outcome = Outcome::HandedOff;
        return;
    }
    let diverted = roles.row.owner() != roles.local.slot || roles.bypassed.is_some();
    let datagram = decision.key.protocol == UDP;
    if ours && datagram && !diverted && known.is_none() && tables.previous_row(roles.row_number).is_none() {
        // Nothing moves: a datagram nobody here knows is the first of its flow.
        pick(decision, roles, tables, service, roles.local.leased, Outcome::New);
        decision.at_once |= service.replicate_syn;
        return;
    }
    let mut asked = if hops_left || roles.returns(arrival) {
        roles.asked(tables, known.is_some())
    } else {
        MemberSlot::NONE
    };
    if hops_left && !asked.is_some() && !datagram {
        asked = roles.doubted_holder(tables);
    }
    if !asked.is_some() && arrival.hops == MAX_HOPS && known.is_none() {
        asked = roles.last_asked(tables);
        if !asked.is_some() && !datagram {
            // Its holders may be back in a moment: who asks us only knew whom to ask first.
            asked = roles.doubted_holder(tables);
        }
    }
    if asked.is_some() {
        decision.verdict = roles.hand_off(tables, asked, arrival, known);
        decision.outcome = Outcome::Asked;
        return;
    }
    // A connection that nobody knows and that ends here need not be known any more.
    let ends = matches!(packet.kind, PacketKind::Tcp { flags } if flags & tcp_flags::RST != 0);
    let owns = ours && roles.local.leased && !ends;
    pick(decision, roles, tables, service, owns, Outcome::Recovered);
    if owns {
        decision.entry.flags = decision.entry.flags.with(FlowFlags::RECOVERED, true);
    } else if !matches!(decision.verdict, Verdict::Drop(_)) && roles.local.leased && !ends {
        // Its acting owner may record it; we may not.
        decision.entry.flags = decision.entry.flags.with(FlowFlags::RECOVERED, true);
        decision.event = Some(FlowEventKind::Hint);
    }
}

/// ICMP errors go to their flow's backend; they never create, refresh or end a flow.
#[inline(always)]
fn icmp_error<T: Tables>(
    decision: &mut Decision,
    roles: &Roles,
    arrival: &Arrival,
    tables: &T,
    service: &Service,
) {
    let flow = tables.flow(&decision.key);
    let known = match flow {
        Some(entry) if roles.believes(tables, &entry, arrival) => Some(entry),
        Some(_) => None,
        None => tables
            .cached(&decision.key)
            .filter(|entry| entry.flow_state().is_live() || arrival.hops >= MAX_HOPS),
    };
    if let Some(entry) = known {
        decision.verdict = Verdict::Forward(entry.backend);
        decision.outcome = Outcome::IcmpSteered;
        return;
    }
    let flow = said(flow.as_ref());
    let hops_left = arrival.hops < MAX_HOPS;
    if hops_left || roles.returns(arrival) {
        let acting = roles.acting_owner(tables);
        let theirs = hops_left && acting != roles.local.slot;
        let to = if roles.returned(flow, arrival, theirs) {
            roles.bypassed
        } else if theirs {
            acting
        } else {
            roles.asked(tables, flow.is_some())
        };
        if to.is_some() {
            decision.verdict = roles.hand_off(tables, to, arrival, flow);
            decision.outcome = if acting == roles.local.slot { Outcome::Asked } else { Outcome::HandedOff };
            return;
        }
    }
    pick(decision, roles, tables, service, false, Outcome::IcmpSteered);
}

/// Forwards by the consistent table, and records the pick if it is ours to record.
#[inline(always)]
fn pick<T: Tables>(
    decision: &mut Decision,
    roles: &Roles,
    tables: &T,
    service: &Service,
    record: bool,
    outcome: Outcome,
) {
    let error = matches!(outcome, Outcome::IcmpSteered);
    if !roles.row.owner().is_some() || (!roles.local.leased && roles.others() && !error) {
        decision.verdict = Verdict::Drop(DropReason::NotJoined);
        decision.outcome = Outcome::Dropped;
        return;
    }
    #[expect(clippy::cast_possible_truncation, reason = "the slot is the low 16 bits of the hash")]
    let slot = decision.hash as u16;
    let began = if matches!(outcome, Outcome::New) { Began::Now } else { Began::Earlier };
    let choice = tables.consistent(service.index, slot, began);
    if choice.backend == BackendIndex::NONE {
        decision.verdict = Verdict::Drop(DropReason::NoBackend);
        decision.outcome = Outcome::Dropped;
        return;
    }
    decision.verdict = Verdict::Forward(choice.backend);
    decision.outcome = outcome;
    decision.entry = picked(choice.backend, roles.local.now_ms);
    if record {
        decision.action = Action::Insert;
        decision.event = Some(FlowEventKind::New);
        decision.at_once = choice.unsettled;
    }
}

/// The entry of a flow that is new.
#[inline(always)]
const fn picked(backend: BackendIndex, now_ms: u64) -> FlowEntry {
    FlowEntry { last_seen_ms: now_ms, last_reported_ms: now_ms, backend, ..NO_ENTRY }
}

/// Forwards by a known entry, and reports to the owner that the flow lives if it has not heard of it for a quarter of the time after
/// which it would forget it.
#[inline(always)]
fn seen(decision: &mut Decision, mut entry: FlowEntry, outcome: Outcome, roles: &Roles, service: &Service) {
    let now_ms = roles.local.now_ms;
    entry.last_seen_ms = now_ms;
    if is_unreported(&entry, service, now_ms) {
        // The owner knows by itself. What has ended goes on only where a client still acknowledges, and all holders hear of that: with the
        // owner lost they could not tell it from what nobody has used for long, whose tuple may be used again.
        entry.last_reported_ms = now_ms;
        if roles.row.owner() != roles.local.slot || !entry.flow_state().is_live() {
            decision.event = Some(FlowEventKind::Touched);
        }
    }
    decision.verdict = Verdict::Forward(entry.backend);
    decision.outcome = outcome;
    decision.action = Action::Update;
    decision.entry = entry;
}

/// Whether it is time again that the flow's owner learns that the flow lives.
#[inline(always)]
fn is_unreported(entry: &FlowEntry, service: &Service, now_ms: u64) -> bool {
    let life_ms = if entry.flow_state().is_live() { service.idle_ms } else { service.linger_ms };
    now_ms.wrapping_sub(entry.last_reported_ms) > u64::from(life_ms >> 2)
}

/// Whether the segment is to be answered with a RST: its flow's backend has failed, and its service does not keep such flows.
///
/// Only what acknowledges something can be answered exactly and without memory: the RST's sequence number is the segment's
/// acknowledgment number (RFC 9293 §3.10.7.1). A RST is never answered.
#[inline(always)]
fn is_to_be_reset<T: Tables>(entry: &FlowEntry, packet: &Packet, tables: &T, service: &Service) -> bool {
    service.resets
        && matches!(packet.kind, PacketKind::Tcp { flags } if flags & (tcp_flags::ACK | tcp_flags::RST) == tcp_flags::ACK)
        && tables.has_failed(service.index, entry.backend)
}

/// The state after `packet`, which ends the flow if its backend has `failed`, and whether it differs from the one before (see [`FlowState`]).
#[inline(always)]
fn advance(mut entry: FlowEntry, packet: &Packet, failed: bool) -> (FlowEntry, bool) {
    let before = entry.flow_state();
    let after = match packet.kind {
        _ if failed => FlowState::Reset,
        PacketKind::Tcp { flags } if flags & tcp_flags::RST != 0 => FlowState::Reset,
        PacketKind::Tcp { flags } if flags & tcp_flags::FIN != 0 => FlowState::Closing,
        // Half-closed downloads go on with pure acknowledgements; only data says that the client is not done.
        PacketKind::Tcp { .. } if packet.payload_length > 0 => FlowState::Established,
        PacketKind::Tcp { .. } | PacketKind::Datagram if matches!(before, FlowState::HalfOpen) => {
            FlowState::Established
        }
        _ => before,
    };
    entry.state = after as u8;
    (
        entry,
        !matches!(
            (before, after),
            (FlowState::HalfOpen, FlowState::HalfOpen)
                | (FlowState::Established, FlowState::Established)
                | (FlowState::Closing, FlowState::Closing)
                | (FlowState::Reset, FlowState::Reset)
        ),
    )
}

mod short;

pub use short::{Hit, NewFlow, hit, new_flow};

#[cfg(test)]
mod claims;
#[cfg(test)]
mod tests;
