//! Chains of hand-offs between members whose views are arbitrary and contradict each other.
//!
//! Every member has its own list of members, row table, previous table, liveness, lease, flow table and cache: nothing that one
//! believes need be true for another. Cases come from a seed, which a failure names.
#![expect(
    clippy::arithmetic_side_effects,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "tests run on the host and may fail loudly"
)]

use phalanx_flow::decide::{
    Action, Began, Choice, DropReason, Local, MAX_HOPS, Service, ServiceMatch, Tables, Verdict, decide,
};
use phalanx_flow::member::Liveness;
use phalanx_flow::packet::{Fragment, Packet, PacketKind, tcp_flags};
use phalanx_flow::{
    Arrival, BackendIndex, FlowEntry, FlowFlags, FlowKey, FlowSeed, FlowState, MemberId, MemberSlot, Row,
    Vintage,
};

const SEED: FlowSeed = FlowSeed([1, 2]);
const NOW_MS: u64 = 1 << 32;

/// SplitMix64 (Steele and others 2014): a case from a number.
struct Dice(u64);

impl Dice {
    fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`.
    fn below(&mut self, bound: usize) -> usize {
        (self.roll() % bound as u64) as usize
    }

    fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }
}

/// What one member believes.
#[derive(Clone, Debug)]
struct Member {
    /// Its list of members: the position is the slot.
    slots: Vec<MemberId>,
    local: MemberSlot,
    leased: bool,
    rows: [Row; 2],
    previous: Option<[Row; 2]>,
    liveness: Vec<Liveness>,
    service: ServiceMatch,
    consistent: BackendIndex,
    flow: Option<(FlowKey, FlowEntry)>,
    cached: Option<(FlowKey, FlowEntry)>,
    ports: Option<[[u8; 2]; 2]>,
}

impl Tables for Member {
    fn has_failed(&self, _: u32, _: BackendIndex) -> bool {
        false
    }
    fn local(&self) -> Local {
        Local { slot: self.local, leased: self.leased, seed: SEED, now_ms: NOW_MS }
    }
    fn service(&self, _: &FlowKey) -> ServiceMatch {
        self.service
    }
    fn row_of(&self, key: &FlowKey, _: u64) -> u32 {
        // A flow's row is one, that of its fragments another.
        u32::from(key.source_port != FLOW_PORTS[0])
    }
    fn row(&self, row: u32) -> Row {
        self.rows[row as usize]
    }
    fn previous_row(&self, row: u32) -> Option<Row> {
        self.previous.map(|previous| previous[row as usize])
    }
    fn liveness(&self, slot: MemberSlot) -> Liveness {
        self.liveness[usize::from(slot.0)]
    }
    fn slot_of(&self, id: MemberId) -> MemberSlot {
        let found = self.slots.iter().position(|known| *known == id);
        found.map_or(MemberSlot::NONE, |at| MemberSlot(at as u16))
    }
    fn flow(&self, key: &FlowKey) -> Option<FlowEntry> {
        self.flow.filter(|(known, _)| known == key).map(|(_, entry)| entry)
    }
    fn cached(&self, key: &FlowKey) -> Option<FlowEntry> {
        self.cached.filter(|(known, _)| known == key).map(|(_, entry)| entry)
    }
    fn consistent(&self, _: u32, _: u16, _: Began) -> Choice {
        Choice { backend: self.consistent, unsettled: false }
    }
    fn fragment_ports(&self, _: &FlowKey) -> Option<[[u8; 2]; 2]> {
        self.ports
    }
}

const FLOW_PORTS: [[u8; 2]; 2] = [[0x9c, 0x40], [0, 80]];

const fn flow_key(protocol: u8) -> FlowKey {
    FlowKey {
        source: [1; 16],
        destination: [2; 16],
        source_port: FLOW_PORTS[0],
        destination_port: FLOW_PORTS[1],
        protocol,
        family: 4,
        reserved: [0; 2],
    }
}

const fn packet(kind: PacketKind, fragment: Fragment) -> Packet {
    let (protocol, payload_length) = match kind {
        PacketKind::Tcp { flags } if flags & tcp_flags::PSH == 0 => (6, 0),
        PacketKind::TcpSyn => (6, 0),
        PacketKind::Tcp { .. } | PacketKind::IcmpError => (6, 10),
        _ => (17, 10),
    };
    Packet {
        key: flow_key(protocol),
        kind,
        fragment,
        tcp_sequence: 0,
        tcp_acknowledgment: 0,
        l3_offset: 14,
        l3_length: 50,
        l4_offset: 34,
        l4_length: 30,
        payload_length,
        ttl: 64,
        tos: 0,
        dont_fragment: true,
    }
}

const fn tcp(flags: u8) -> Packet {
    packet(PacketKind::Tcp { flags }, Fragment::Whole)
}

const SYN: Packet = packet(PacketKind::TcpSyn, Fragment::Whole);
const DATA: Packet = tcp(tcp_flags::ACK | tcp_flags::PSH);

/// Every kind of packet that a chain may begin with.
fn any_packet(dice: &mut Dice) -> Packet {
    let all = [
        SYN,
        DATA,
        tcp(tcp_flags::ACK),
        tcp(tcp_flags::ACK | tcp_flags::FIN),
        tcp(tcp_flags::RST),
        packet(PacketKind::Datagram, Fragment::Whole),
        packet(PacketKind::IcmpError, Fragment::Whole),
        packet(PacketKind::Datagram, Fragment::First { id: 7 }),
        packet(PacketKind::LaterFragment, Fragment::Later { id: 7 }),
        packet(PacketKind::EchoRequest, Fragment::Whole),
    ];
    all[dice.below(all.len())]
}

fn entry(backend: u32, state: FlowState) -> FlowEntry {
    FlowEntry {
        birth: 1,
        last_seen_ms: NOW_MS - 1,
        last_reported_ms: NOW_MS - 1,
        update: 0,
        backend: BackendIndex(backend),
        state: state as u8,
        flags: FlowFlags(0),
        reserved: [0; 6],
    }
}

fn any_entry(dice: &mut Dice, key: FlowKey) -> Option<(FlowKey, FlowEntry)> {
    let states = [FlowState::HalfOpen, FlowState::Established, FlowState::Closing, FlowState::Reset];
    dice.one_in(3).then(|| (key, entry(dice.below(5) as u32, states[dice.below(4)])))
}

/// A row of members in any order: shorter than its places, or with one member twice, as no ranking would make it.
fn any_row(dice: &mut Dice, members: usize) -> Row {
    let mut row = Row::EMPTY;
    for rank in &mut row.ranks {
        if !dice.one_in(8) {
            *rank = MemberSlot(dice.below(members) as u16);
        }
    }
    row
}

/// A member whose beliefs are arbitrary.
fn any_member(dice: &mut Dice, id: MemberId, members: usize, key: FlowKey) -> Member {
    // Its own order, and one or two that nobody else may know by this number.
    let mut slots: Vec<MemberId> = (0..members as u32).map(MemberId).collect();
    for at in (1..members).rev() {
        slots.swap(at, dice.below(at + 1));
    }
    let local = slots.iter().position(|known| *known == id).expect("we know ourselves");
    let liveness = [Liveness::Alive, Liveness::Alive, Liveness::Suspect, Liveness::Down];
    let any_rows = |dice: &mut Dice| [any_row(dice, members), any_row(dice, members)];
    Member {
        local: MemberSlot(local as u16),
        leased: !dice.one_in(4),
        rows: any_rows(dice),
        previous: if dice.one_in(2) { Some(any_rows(dice)) } else { None },
        liveness: (0..members).map(|_| liveness[dice.below(4)]).collect(),
        service: match dice.below(10) {
            0 => ServiceMatch::Foreign,
            1 => ServiceMatch::AddressOnly,
            _ => SERVICE,
        },
        consistent: if dice.one_in(10) { BackendIndex::NONE } else { BackendIndex(dice.below(5) as u32) },
        flow: any_entry(dice, key),
        cached: any_entry(dice, key),
        ports: dice.one_in(2).then_some(FLOW_PORTS),
        slots,
    }
}

const SERVICE: ServiceMatch = ServiceMatch::Service(Service {
    index: 0,
    idle_ms: 60_000,
    linger_ms: 6_000,
    replicate_syn: false,
    resets: false,
});

/// Who gets a packet, one after the other, and what becomes of it in the end. A chain of more than 32 hand-offs ends as it is.
struct Chain {
    path: Vec<usize>,
    last: Verdict,
}

/// Lets `members` hand a packet to each other. `count_hops` off is the twin: nobody says how often it was handed off.
fn follow(
    members: &mut [Member],
    packet: &Packet,
    mut arrival: Arrival,
    at: usize,
    count_hops: bool,
) -> Chain {
    let mut chain = Chain { path: vec![at], last: Verdict::Pass };
    let mut at = at;
    while chain.path.len() <= 32 {
        let member = &mut members[at];
        let decision = decide(packet, &arrival, member);
        match decision.action {
            Action::Keep => {}
            Action::Insert | Action::Update => member.flow = Some((decision.key, decision.entry)),
            Action::UpdateCache => member.cached = Some((decision.key, decision.entry)),
            Action::Remove => member.flow = None,
        }
        if decision.erase_cache {
            member.cached = None;
        }
        if decision.learn_fragment {
            member.ports = Some([decision.key.source_port, decision.key.destination_port]);
        }
        chain.last = decision.verdict;
        let Verdict::HandOff(hand_off) = decision.verdict else { break };
        assert!(hand_off.to.is_some() && hand_off.to != member.local, "handed to itself or to nobody");
        assert_eq!(hand_off.hops, arrival.hops + 1, "every hop is counted");
        let id = member.slots[usize::from(hand_off.to.0)];
        let bypassed = member.slots.get(usize::from(hand_off.bypassed.0)).copied();
        let hops = if count_hops { hand_off.hops } else { 0 };
        arrival = Arrival {
            hops,
            bypassed,
            known: hand_off.known,
            vintage: hand_off.vintage,
            ports: hand_off.ports,
        };
        at = id.0 as usize;
        chain.path.push(at);
    }
    chain
}

/// A case: members, a packet, and how and where it comes.
fn any_case(seed: u64) -> (Vec<Member>, Packet, Arrival, usize) {
    let mut dice = Dice(seed);
    let members = 1 + dice.below(5);
    let packet = any_packet(&mut dice);
    let all = (0..members as u32).map(|id| any_member(&mut dice, MemberId(id), members, packet.key));
    let all: Vec<Member> = all.collect();
    let arrival = if dice.one_in(2) {
        Arrival::WIRE
    } else {
        // A hand-off from who knows whom, of a number of hops that nobody honest would write.
        let hops = [0, 1, 2, 3, 200, 255][dice.below(6)];
        let bypassed = dice.one_in(2).then(|| MemberId(dice.below(7) as u32));
        Arrival {
            hops,
            bypassed,
            known: dice.one_in(2),
            vintage: Vintage(0),
            ports: dice.one_in(3).then_some(FLOW_PORTS),
        }
    };
    let at = dice.below(members);
    (all, packet, arrival, at)
}

const CASES: u64 = 200_000;

#[test]
fn every_chain_of_hand_offs_ends_within_the_hops_allowed_whatever_the_members_believe() {
    let mut longest = 0;
    for seed in 0..CASES {
        let (mut members, packet, arrival, at) = any_case(seed);
        let chain = follow(&mut members, &packet, arrival, at, true);
        let hops = chain.path.len() - 1;
        // And one to a holder more, and one back to who has the flow.
        let allowed = usize::from((MAX_HOPS + 2).saturating_sub(arrival.hops));
        assert!(hops <= allowed, "seed {seed}: {hops} hops of {allowed}: {:?}", chain.path);
        assert!(!matches!(chain.last, Verdict::HandOff(_)), "seed {seed}: it does not end");
        longest = longest.max(hops);
    }
    assert_eq!(longest, usize::from(MAX_HOPS) + 2, "no chain was as long as it may be: this showed nothing");
}

/// The twin: these views are contradictory enough to make loops, and only the count of hops breaks them.
#[test]
fn without_a_count_of_hops_packets_go_round_for_ever() {
    let endless = (0..CASES / 20).filter(|seed| {
        let (mut members, packet, _, at) = any_case(*seed);
        let chain = follow(&mut members, &packet, Arrival::WIRE, at, false);
        matches!(chain.last, Verdict::HandOff(_))
    });
    let endless = endless.count();
    assert!(endless > 100, "{endless} endless chains of {}", CASES / 20);
}

/// Members that believe the same, each from where it stands: who is suspected knows it by its lease, who is down does nothing.
fn agreeing(dice: &mut Dice) -> (Vec<Member>, Vec<usize>) {
    let members = 2 + dice.below(4);
    let mut order: Vec<MemberSlot> = (0..members as u16).map(MemberSlot).collect();
    for at in (1..members).rev() {
        order.swap(at, dice.below(at + 1));
    }
    let mut row = Row::EMPTY;
    for (rank, slot) in row.ranks.iter_mut().zip(&order) {
        *rank = *slot;
    }
    // One at the most is in doubt: with more, nobody may be left that knows.
    let doubted = dice.one_in(2).then(|| (dice.below(members), dice.one_in(2)));
    let liveness = |member| match doubted {
        Some((doubted, down)) if doubted == member => {
            if down {
                Liveness::Down
            } else {
                Liveness::Suspect
            }
        }
        _ => Liveness::Alive,
    };
    let all = (0..members).map(|member| Member {
        slots: (0..members as u32).map(MemberId).collect(),
        local: MemberSlot(member as u16),
        leased: liveness(member) == Liveness::Alive,
        rows: [row, row],
        previous: None,
        liveness: (0..members).map(liveness).collect(),
        service: SERVICE,
        consistent: BackendIndex(0),
        flow: None,
        cached: None,
        ports: None,
    });
    let running = (0..members).filter(|member| liveness(*member) != Liveness::Down).collect();
    (all.collect(), running)
}

/// Plays a connection while backends come and go, and returns the backends its packets reached, each once.
fn backends_of_a_connection(dice: &mut Dice, members: &mut [Member], running: &[usize]) -> Vec<u32> {
    let mut reached = Vec::new();
    for step in 0..12 {
        let packet = match step {
            0 => SYN,
            11 => tcp(tcp_flags::ACK | tcp_flags::FIN),
            _ => DATA,
        };
        let at = running[dice.below(running.len())];
        let chain = follow(members, &packet, Arrival::WIRE, at, true);
        let Verdict::Forward(backend) = chain.last else { panic!("{:?} by {:?}", chain.last, chain.path) };
        if !reached.contains(&backend.0) {
            reached.push(backend.0);
        }
        // The consistent table changes under it, everywhere at once.
        let consistent = BackendIndex(dice.below(5) as u32);
        for member in members.iter_mut() {
            member.consistent = consistent;
        }
    }
    reached
}

#[test]
fn with_equal_views_and_leases_every_packet_of_a_flow_ends_at_one_backend() {
    for seed in 0..CASES / 10 {
        let mut dice = Dice(seed);
        let (mut members, running) = agreeing(&mut dice);
        let reached = backends_of_a_connection(&mut dice, &mut members, &running);
        assert_eq!(reached.len(), 1, "seed {seed}: backends {reached:?}; {members:?}");
    }
}

/// The twin: it is the agreement that does it.
#[test]
fn with_views_that_differ_some_flows_reach_two_backends() {
    let split = (0..CASES / 10).filter(|seed| {
        let mut dice = Dice(*seed);
        let (mut members, running) = agreeing(&mut dice);
        for member in &mut members {
            // Each ranks by itself.
            for row in &mut member.rows {
                let ranked = row.ranks.iter().filter(|slot| slot.is_some()).count();
                row.ranks[..ranked].rotate_left(dice.below(ranked));
            }
        }
        backends_of_a_connection(&mut dice, &mut members, &running).len() > 1
    });
    let split = split.count();
    assert!(split > 10, "{split} of {}", CASES / 10);
}

/// On the last hop, where nobody can be asked any more.
#[test]
fn who_has_no_lease_guesses_only_where_there_is_nobody_else() {
    let (mut members, _) = agreeing(&mut Dice(1));
    let member = &mut members[0];
    let last_hop = Arrival { hops: MAX_HOPS + 1, ..Arrival::WIRE };
    let [alone, two] = [[0, u16::MAX, u16::MAX], [0, 1, u16::MAX]]
        .map(|ranks| Row { ranks: ranks.map(MemberSlot), flags: 0 });
    let other = Row { ranks: [1, u16::MAX, u16::MAX].map(MemberSlot), flags: 0 };
    let guess = Verdict::Forward(BackendIndex(0));
    let drop = Verdict::Drop(DropReason::NotJoined);
    for (row, leased, expected) in [
        (alone, true, guess),
        (alone, false, guess),
        (two, true, guess),
        (two, false, drop),
        (other, true, guess),
        (other, false, drop),
    ] {
        member.rows = [row; 2];
        member.leased = leased;
        for packet in [SYN, DATA, packet(PacketKind::Datagram, Fragment::Whole)] {
            let verdict = decide(&packet, &last_hop, member).verdict;
            assert_eq!(verdict, expected, "{row:?}, leased: {leased}, {packet:?}");
        }
        // What it knows it forwards, lease or not.
        member.flow = Some((DATA.key, entry(3, FlowState::Established)));
        assert_eq!(decide(&DATA, &last_hop, member).verdict, Verdict::Forward(BackendIndex(3)));
        member.flow = None;
    }
}
