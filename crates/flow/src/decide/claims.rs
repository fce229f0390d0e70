//! The founding document's claims about one packet: 1, 2 and 15 to 17 (Figures 4-a, 4-b and 5).
use super::*;
use crate::entry::BIRTH_MS_BITS;
use crate::packet::{Link, parse, samples};

pub(super) const OWNER: MemberSlot = MemberSlot(0);
pub(super) const BACKUP: MemberSlot = MemberSlot(1);
pub(super) const THIRD: MemberSlot = MemberSlot(2);

/// What the consistent table would give.
const CONSISTENT: BackendIndex = BackendIndex(7);
/// Where the flow is: backends have changed since it began.
pub(super) const RECORDED: BackendIndex = BackendIndex(3);

/// One member's tables; every member has the same row.
#[derive(Clone)]
pub(super) struct World {
    pub(super) local: MemberSlot,
    pub(super) suspect: Option<MemberSlot>,
    pub(super) flow: Option<FlowEntry>,
    pub(super) cached: Option<FlowEntry>,
    /// There is no member in the table.
    pub(super) alone: bool,
    pub(super) failed: Option<BackendIndex>,
    pub(super) leased: bool,
    /// There are two members.
    pub(super) pair: bool,
    /// The row before, while the handover window is open.
    pub(super) previous: Option<[MemberSlot; 3]>,
    /// What the consistent table gave before a member was lost.
    pub(super) earlier: Option<BackendIndex>,
}

pub(super) const NOW_MS: u64 = 100_000;

impl World {
    pub(super) fn of(local: MemberSlot) -> Self {
        Self {
            local,
            suspect: None,
            flow: None,
            cached: None,
            alone: false,
            failed: None,
            leased: true,
            pair: false,
            previous: None,
            earlier: None,
        }
    }

    fn decide(&self, arrival: Arrival, flags: u8) -> Decision {
        let payload: &[u8] = if flags & tcp_flags::SYN == 0 { b"data" } else { b"" };
        self.decide_on(arrival, flags, payload)
    }

    fn decide_on(&self, arrival: Arrival, flags: u8, payload: &[u8]) -> Decision {
        let packet = parse(samples::tcp(4, flags, payload).as_slice(), Link::Ip).unwrap();
        decide(&packet, &arrival, self)
    }
}

impl Tables for World {
    fn local(&self) -> Local {
        Local { slot: self.local, leased: self.leased, seed: FlowSeed([1, 2]), now_ms: NOW_MS }
    }
    fn service(&self, _: &FlowKey) -> ServiceMatch {
        ServiceMatch::Service(Service {
            index: 0,
            idle_ms: 60_000,
            linger_ms: 6_000,
            replicate_syn: false,
            resets: self.failed.is_some(),
        })
    }
    fn row_of(&self, _: &FlowKey, _: u64) -> u32 {
        0
    }
    fn row(&self, _: u32) -> Row {
        let third = if self.pair { MemberSlot::NONE } else { THIRD };
        if self.alone { Row::EMPTY } else { Row { ranks: [OWNER, BACKUP, third], flags: 0 } }
    }
    fn previous_row(&self, _: u32) -> Option<Row> {
        self.previous.map(|ranks| Row { ranks, flags: 0 })
    }
    fn liveness(&self, slot: MemberSlot) -> Liveness {
        if self.suspect == Some(slot) { Liveness::Suspect } else { Liveness::Alive }
    }
    fn slot_of(&self, id: MemberId) -> MemberSlot {
        MemberSlot(id.0 as u16)
    }
    fn flow(&self, _: &FlowKey) -> Option<FlowEntry> {
        self.flow
    }
    fn cached(&self, _: &FlowKey) -> Option<FlowEntry> {
        self.cached
    }
    fn has_failed(&self, _: u32, backend: BackendIndex) -> bool {
        self.failed == Some(backend)
    }
    fn consistent(&self, _: u32, _: u16, began: Began) -> Choice {
        let earlier = self.earlier.filter(|_| began == Began::Earlier);
        Choice { backend: earlier.unwrap_or(CONSISTENT), unsettled: false }
    }
    fn fragment_ports(&self, _: &FlowKey) -> Option<[[u8; 2]; 2]> {
        None
    }
}

pub(super) fn recorded() -> Option<FlowEntry> {
    let state = FlowState::Established as u8;
    Some(FlowEntry {
        backend: RECORDED,
        state,
        last_seen_ms: NOW_MS - 100,
        last_reported_ms: NOW_MS - 100,
        ..NO_ENTRY
    })
}

fn handed_to(decision: &Decision) -> Option<MemberSlot> {
    match decision.verdict {
        Verdict::HandOff(hand_off) => Some(hand_off.to),
        _ => None,
    }
}

const DATA: u8 = tcp_flags::ACK | tcp_flags::PSH;

#[test]
fn claim_1_the_owner_processes_its_connections_and_all_others_hand_them_off_to_it() {
    for slot in [OWNER, BACKUP, THIRD] {
        let decision = World::of(slot).decide(Arrival::WIRE, tcp_flags::SYN);
        if slot == OWNER {
            assert_eq!(decision.verdict, Verdict::Forward(CONSISTENT));
            assert_eq!((decision.action, decision.outcome), (Action::Insert, Outcome::New));
        } else {
            assert_eq!(handed_to(&decision), Some(OWNER), "{slot:?}");
            assert_eq!(decision.action, Action::Keep, "who does not own it records nothing");
        }
    }
}

#[test]
fn claim_2_the_backup_processes_the_connection_while_the_owner_cannot() {
    let third = World { suspect: Some(OWNER), ..World::of(THIRD) };
    let passed_on = third.decide(Arrival::WIRE, DATA);
    assert_eq!(handed_to(&passed_on), Some(BACKUP));
    let Verdict::HandOff(hand_off) = passed_on.verdict else { panic!("{passed_on:?}") };
    assert_eq!(hand_off.bypassed, OWNER, "the backup is told why it gets the packet");

    let arrival = Arrival {
        hops: 1,
        bypassed: Some(MemberId(u32::from(OWNER.0))),
        known: false,
        vintage: Vintage(0),
        ports: None,
    };
    let backup = World { flow: recorded(), ..World::of(BACKUP) };
    assert_eq!(backup.decide(arrival, DATA).verdict, Verdict::Forward(RECORDED), "by the state it was sent");
    let new = World::of(BACKUP).decide(arrival, tcp_flags::SYN);
    assert_eq!((new.verdict, new.action), (Verdict::Forward(CONSISTENT), Action::Insert), "and new ones too");

    // The twin: while the owner is well, the same packet goes to it.
    assert_eq!(handed_to(&World::of(THIRD).decide(Arrival::WIRE, DATA)), Some(OWNER));
}

#[test]
fn claim_15_a_syn_is_forwarded_and_recorded_by_the_owner_or_handed_to_it() {
    let at_owner = World::of(OWNER).decide(Arrival::WIRE, tcp_flags::SYN);
    assert_eq!(at_owner.event, Some(FlowEventKind::New), "the daemon is told, to tell the backup (430)");
    assert_eq!(at_owner.entry.backend, CONSISTENT);
    // A SYN that was handed to the owner is dealt with like one that came to it (445).
    let arrival = Arrival { hops: 1, bypassed: None, known: false, vintage: Vintage(0), ports: None };
    let handed = World::of(OWNER).decide(arrival, tcp_flags::SYN);
    assert_eq!(
        (handed.verdict, handed.action, handed.event),
        (at_owner.verdict, Action::Insert, at_owner.event)
    );
    // A new connection never follows what a cache knows of an old one.
    let caching = World { cached: recorded(), ..World::of(THIRD) };
    let decision = caching.decide(Arrival::WIRE, tcp_flags::SYN);
    assert_eq!((handed_to(&decision), decision.erase_cache), (Some(OWNER), true));
}

#[test]
fn claim_16_owner_and_backup_forward_by_their_table_and_others_by_cache_or_owner() {
    for slot in [OWNER, BACKUP] {
        let holder = World { flow: recorded(), ..World::of(slot) };
        let decision = holder.decide(Arrival::WIRE, DATA);
        assert_eq!(
            (decision.verdict, decision.outcome),
            (Verdict::Forward(RECORDED), Outcome::Hit),
            "{slot:?}"
        );
    }
    let caching = World { cached: recorded(), ..World::of(THIRD) };
    let decision = caching.decide(Arrival::WIRE, DATA);
    assert_eq!((decision.verdict, decision.outcome), (Verdict::Forward(RECORDED), Outcome::CacheHit));
    let neither = World::of(THIRD).decide(Arrival::WIRE, DATA);
    assert_eq!((handed_to(&neither), neither.outcome), (Some(OWNER), Outcome::HandedOff));
}

#[test]
fn claim_16_the_end_of_a_connection_is_told_whoever_forwards_it() {
    for (flags, state) in [(tcp_flags::FIN, FlowState::Closing), (tcp_flags::RST, FlowState::Reset)] {
        let holder = World { flow: recorded(), ..World::of(BACKUP) };
        let decision = holder.decide(Arrival::WIRE, flags | tcp_flags::ACK);
        assert_eq!((decision.event, decision.entry.flow_state()), (Some(FlowEventKind::Changed), state));
        let caching = World { cached: recorded(), ..World::of(THIRD) };
        let decision = caching.decide(Arrival::WIRE, flags | tcp_flags::ACK);
        assert_eq!((decision.event, decision.action), (Some(FlowEventKind::Cached), Action::UpdateCache));
        assert_eq!(decision.verdict, Verdict::Forward(RECORDED), "the packet itself still arrives");
    }
    // The twin: data ends nothing.
    let holder = World { flow: recorded(), ..World::of(BACKUP) };
    assert_eq!(holder.decide(Arrival::WIRE, DATA).event, None);
}

#[test]
fn a_state_that_changes_on_a_cache_hit_is_a_later_update_for_the_holders() {
    let in_state = |state| recorded().map(|entry| FlowEntry { state: state as u8, update: 7, ..entry });
    for (before, flags, after) in [
        (FlowState::HalfOpen, tcp_flags::ACK, FlowState::Established),
        (FlowState::Established, tcp_flags::ACK | tcp_flags::FIN, FlowState::Closing),
    ] {
        let decision = World { cached: in_state(before), ..World::of(THIRD) }.decide(Arrival::WIRE, flags);
        assert_eq!(decision.event, Some(FlowEventKind::Cached), "{before:?}");
        assert_eq!((decision.entry.flow_state(), decision.entry.update), (after, 8));
    }
    // The twin: what changes nothing is told to nobody.
    let same =
        World { cached: in_state(FlowState::Established), ..World::of(THIRD) }.decide(Arrival::WIRE, DATA);
    assert_eq!((same.event, same.entry.update), (None, 7));
}

#[test]
fn a_cache_that_knows_of_an_end_leaves_the_packet_to_the_owner() {
    let cached = |state: FlowState| {
        let entry = recorded().map(|entry| FlowEntry { state: state as u8, ..entry });
        let decision = World { cached: entry, ..World::of(THIRD) }.decide(Arrival::WIRE, DATA);
        (decision.outcome, handed_to(&decision))
    };
    // The tuple may have been used again, of which caches are not told.
    assert_eq!(cached(FlowState::Closing), (Outcome::HandedOff, Some(OWNER)));
    assert_eq!(cached(FlowState::Reset), (Outcome::HandedOff, Some(OWNER)));
    // The twin; and what is ended is better than a guess where nobody else can be asked.
    assert_eq!(cached(FlowState::Established), (Outcome::CacheHit, None));
    let entry = recorded().map(|entry| FlowEntry { state: FlowState::Closing as u8, ..entry });
    let last = Arrival { hops: MAX_HOPS, ..Arrival::WIRE };
    assert_eq!(World { cached: entry, ..World::of(THIRD) }.decide(last, DATA).outcome, Outcome::CacheHit);
}

/// Whom a packet from the wire is handed off to, and the packet as it arrives there.
fn handed_on(decision: &Decision) -> (MemberSlot, Arrival) {
    let Verdict::HandOff(to) = decision.verdict else { panic!("{:?}", decision.verdict) };
    let bypassed = to.bypassed.is_some().then(|| MemberId(u32::from(to.bypassed.0)));
    (to.to, Arrival { hops: to.hops, bypassed, known: to.known, vintage: to.vintage, ports: to.ports })
}

fn former(state: FlowState) -> Option<FlowEntry> {
    let flags = FlowFlags(FlowFlags::FORMER);
    recorded().map(|entry| FlowEntry { state: state as u8, flags, ..entry })
}

#[test]
fn what_a_former_holder_has_is_asked_for_and_not_believed() {
    for state in [FlowState::Established, FlowState::Closing] {
        // From the wire it goes to the owner, with a word that the flow is known here.
        let third = World { flow: former(state), ..World::of(THIRD) };
        let (to, arrival) = handed_on(&third.decide(Arrival::WIRE, DATA));
        assert_eq!((to, arrival.known, arrival.bypassed), (OWNER, true, Some(MemberId(2))));
        // The owner forwards by what it has itself,
        let known = World { flow: recorded(), ..World::of(OWNER) }.decide(arrival, DATA);
        assert_eq!(known.verdict, Verdict::Forward(RECORDED));
        // and asks who has it rather than guess, or ask somebody else,
        let (to, arrival) = handed_on(&World::of(OWNER).decide(arrival, DATA));
        assert_eq!((to, arrival.bypassed, arrival.known), (THIRD, None, false));
        // who forwards by it.
        assert_eq!(third.decide(arrival, DATA).verdict, Verdict::Forward(RECORDED));
        // An owner that is not sure of its own entry asks its backup, and takes it if the backup does not know.
        let owner = World { flow: former(state), ..World::of(OWNER) };
        let (to, arrival) = handed_on(&owner.decide(Arrival::WIRE, DATA));
        assert_eq!((to, arrival.known), (BACKUP, true));
        let (to, arrival) = handed_on(&World::of(BACKUP).decide(arrival, DATA));
        assert_eq!(to, OWNER);
        assert_eq!(owner.decide(arrival, DATA).verdict, Verdict::Forward(RECORDED));
        let alone = World { suspect: Some(BACKUP), ..owner };
        assert_eq!(alone.decide(Arrival::WIRE, DATA).verdict, Verdict::Forward(RECORDED));
    }
    // A SYN is for the owner to judge; the entry stays, in case it is a repeated one.
    let live = World { flow: former(FlowState::Established), ..World::of(THIRD) };
    let syn = live.decide(Arrival::WIRE, tcp_flags::SYN);
    assert_eq!((handed_to(&syn), syn.action), (Some(OWNER), Action::Keep));
    // The twin.
    let holds = World { flow: recorded(), ..World::of(THIRD) };
    assert_eq!(holds.decide(Arrival::WIRE, DATA).verdict, Verdict::Forward(RECORDED));
}

/// Views differ: whom the former holder took for the owner handed the packet on, and the owner may ask nobody else.
#[test]
fn with_no_hop_left_a_packet_goes_back_to_who_has_its_flow() {
    let last =
        |bypassed, known| Arrival { hops: MAX_HOPS, bypassed, known, vintage: Vintage(0), ports: None };
    let owner = World::of(OWNER);
    let (to, arrival) = handed_on(&owner.decide(last(Some(MemberId(2)), true), DATA));
    assert_eq!((to, arrival.known), (THIRD, false));
    let third = World { flow: former(FlowState::Established), ..World::of(THIRD) };
    assert_eq!(third.decide(arrival, DATA).verdict, Verdict::Forward(RECORDED));
    // It may be suspected: it has just handed the packet off, so it is there (a program in the kernel whose daemon has died).
    let suspecting = World { suspect: Some(THIRD), ..World::of(OWNER) };
    assert_eq!(handed_to(&suspecting.decide(last(Some(MemberId(2)), true), DATA)), Some(THIRD));
    // The twins: nobody says that it has it; and who knows the flow forwards it.
    for arrival in [last(Some(MemberId(2)), false), last(None, false)] {
        assert_eq!(handed_to(&owner.decide(arrival, DATA)), Some(BACKUP), "as the other holder");
    }
    let knows = World { flow: recorded(), ..World::of(OWNER) };
    assert_eq!(knows.decide(last(Some(MemberId(2)), true), DATA).verdict, Verdict::Forward(RECORDED));
}

/// Whoever sent it here takes us for the owner, or asks us as who was it before: a member that has just come back from a partition and has
/// missed what its row's backup recorded meanwhile, while the others do not agree yet that it is back.
#[test]
fn what_nobody_on_its_way_has_known_is_asked_of_one_holder_more_before_it_is_guessed() {
    let last = Arrival { hops: MAX_HOPS, ..Arrival::WIRE };
    let asked = |suspect, local| {
        let world = World { suspect, ..World::of(local) };
        handed_to(&world.decide(last, DATA))
    };
    assert_eq!(asked(None, THIRD), Some(BACKUP));
    assert_eq!(asked(Some(BACKUP), THIRD), Some(OWNER));
    assert_eq!(asked(None, OWNER), Some(BACKUP));
    let (_, arrival) = handed_on(&World::of(THIRD).decide(last, DATA));
    let knows = World { flow: recorded(), ..World::of(BACKUP) };
    assert_eq!(knows.decide(arrival, DATA).verdict, Verdict::Forward(RECORDED));
    // The twins: nobody is left to be asked, and who was asked does not know it either.
    assert_eq!((asked(Some(BACKUP), OWNER), asked(None, BACKUP)), (None, None));
    let guesses = World::of(BACKUP).decide(arrival, DATA);
    assert_eq!((guesses.verdict, guesses.outcome), (Verdict::Forward(CONSISTENT), Outcome::Recovered));
    // What has ended is known.
    let ended = World { flow: former(FlowState::Closing), ..World::of(THIRD) };
    assert_eq!(ended.decide(last, DATA).verdict, Verdict::Forward(RECORDED));
}

/// The daemon of the owner has just come back, and has nothing of what its backup recorded meanwhile; who asks it has heard of the connection
/// before alone.
#[test]
fn an_owner_without_a_lease_that_knows_nothing_leaves_it_to_its_backup() {
    let ended = former(FlowState::Closing).map(|entry| FlowEntry { birth: 5 << BIRTH_MS_BITS << 1, ..entry });
    let asking = World { flow: ended, ..World::of(THIRD) };
    let (to, arrival) = handed_on(&asking.decide(Arrival::WIRE, DATA));
    assert_eq!((to, arrival.known), (OWNER, true));
    let owner = World { leased: false, ..World::of(OWNER) };
    let (to, arrival) = handed_on(&owner.decide(arrival, DATA));
    assert_eq!((to, arrival.known, arrival.bypassed), (BACKUP, true, Some(MemberId(2))));
    let again =
        recorded().map(|entry| FlowEntry { backend: CONSISTENT, birth: 6 << BIRTH_MS_BITS << 1, ..entry });
    let backup = World { flow: again, ..World::of(BACKUP) };
    assert_eq!(backup.decide(arrival, DATA).verdict, Verdict::Forward(CONSISTENT));
    // The twins: it knows nothing either, and there is nobody to leave it to.
    assert_eq!(handed_to(&World::of(BACKUP).decide(arrival, DATA)), Some(THIRD));
    let (_, arrival) = handed_on(&asking.decide(Arrival::WIRE, DATA));
    let last = Arrival { hops: MAX_HOPS, ..arrival };
    assert_eq!(handed_to(&owner.decide(last, DATA)), Some(THIRD));
}

/// The others may have gone on without it: a daemon that is dead or was stopped, a member that was cut off.
#[test]
fn without_a_lease_what_is_known_is_asked_for_and_taken_if_nobody_knows_better() {
    for (local, other) in [(OWNER, BACKUP), (BACKUP, OWNER), (THIRD, OWNER)] {
        let world = World { flow: recorded(), leased: false, ..World::of(local) };
        let (to, arrival) = handed_on(&world.decide(Arrival::WIRE, DATA));
        assert_eq!((to, arrival.known), (other, true));
        let (to, arrival) = handed_on(&World::of(other).decide(arrival, DATA));
        assert_eq!(to, local);
        assert_eq!(world.decide(arrival, DATA).verdict, Verdict::Forward(RECORDED));
        // The twin.
        let leased = World { leased: true, ..world };
        assert_eq!(leased.decide(Arrival::WIRE, DATA).verdict, Verdict::Forward(RECORDED));
    }
    let suspecting = World { flow: recorded(), leased: false, suspect: Some(BACKUP), ..World::of(OWNER) };
    let (to, _) = handed_on(&suspecting.decide(Arrival::WIRE, DATA));
    assert_eq!(to, THIRD, "the next member of the row");
    // Of two members the other one is rather lost.
    let pair = World { flow: recorded(), leased: false, pair: true, ..World::of(OWNER) };
    assert_eq!(pair.decide(Arrival::WIRE, DATA).verdict, Verdict::Forward(RECORDED));
}

/// A new backup has not been told all yet by an owner that it holds to be alive, and that a third member suspects.
#[test]
fn while_a_window_is_open_whom_another_member_suspects_is_asked_rather_than_guessed_for() {
    let suspecting = World { suspect: Some(OWNER), ..World::of(THIRD) };
    let (to, arrival) = handed_on(&suspecting.decide(Arrival::WIRE, DATA));
    assert_eq!((to, arrival.bypassed, arrival.known), (BACKUP, Some(MemberId(0)), false));
    let moved = World { previous: Some([OWNER, THIRD, MemberSlot::NONE]), ..World::of(BACKUP) };
    let (to, last) = handed_on(&World { suspect: Some(THIRD), ..moved.clone() }.decide(arrival, DATA));
    assert_eq!((to, last.hops, last.bypassed), (OWNER, MAX_HOPS, None));
    // It has the last word, if it is there.
    let owner = World { flow: recorded(), ..World::of(OWNER) };
    assert_eq!(owner.decide(last, DATA).verdict, Verdict::Forward(RECORDED));
    // The twin: who has held the row for long has been told all that it cannot guess.
    assert_eq!(World { previous: None, ..moved }.decide(arrival, DATA).outcome, Outcome::Recovered);
}

/// Two of four members have been cut off from the others, and hold those to be down; they ask each other, and then whoever may be back.
#[test]
fn who_has_the_last_word_asks_whom_it_suspects_rather_than_guess_while_a_window_is_open() {
    let last = Arrival { hops: MAX_HOPS, ..Arrival::WIRE };
    let previous = Some([THIRD, OWNER, MemberSlot::NONE]);
    let backup = World { suspect: Some(THIRD), previous, ..World::of(BACKUP) };
    let (to, arrival) = handed_on(&backup.decide(last, DATA));
    assert_eq!((to, arrival.hops), (THIRD, MAX_HOPS + 1));
    let back = World { flow: recorded(), ..World::of(THIRD) };
    assert_eq!(back.decide(arrival, DATA).verdict, Verdict::Forward(RECORDED));
    assert_eq!(World::of(THIRD).decide(arrival, DATA).outcome, Outcome::Recovered, "here it ends");
    // The twins: nobody is suspected, or nothing has moved.
    assert_eq!(World { suspect: None, ..backup.clone() }.decide(last, DATA).outcome, Outcome::Recovered);
    assert_eq!(World { previous: None, ..backup }.decide(last, DATA).outcome, Outcome::Recovered);
}

/// Neither believes what it has: who handed the packet off has rather missed more.
#[test]
fn an_owner_that_doubts_does_not_ask_who_asks_it() {
    let third = World { flow: former(FlowState::Established), ..World::of(THIRD) };
    let (to, arrival) = handed_on(&third.decide(Arrival::WIRE, DATA));
    assert_eq!((to, arrival.known), (OWNER, true));
    let owner = World { flow: former(FlowState::Established), ..World::of(OWNER) };
    let (to, arrival) = handed_on(&owner.decide(arrival, DATA));
    assert_eq!((to, arrival.bypassed, arrival.known), (BACKUP, Some(MemberId(0)), true));
    assert_eq!(handed_to(&World::of(BACKUP).decide(arrival, DATA)), Some(OWNER), "the backup knows nothing");
    let alone = World { suspect: Some(BACKUP), ..owner };
    let (_, arrival) = handed_on(&third.decide(Arrival::WIRE, DATA));
    assert_eq!(alone.decide(arrival, DATA).verdict, Verdict::Forward(RECORDED));
}

/// `entry` of a connection that a SYN made so many milliseconds ago.
fn made(entry: Option<FlowEntry>, ago: u64) -> Option<FlowEntry> {
    entry.map(|entry| FlowEntry { birth: (1_800_000_000_000 - ago) << BIRTH_MS_BITS, ..entry })
}

/// Both doubt, or one of them, for whatever reason: the tuple's last use counts.
#[test]
fn of_two_members_that_have_the_flow_the_one_with_the_newer_record_forwards() {
    let entries = [recorded(), former(FlowState::Established), former(FlowState::Closing)];
    for (asks, slot) in [(OWNER, THIRD), (BACKUP, OWNER), (THIRD, OWNER)] {
        for entry in entries {
            for leased in [true, false] {
                let arrival = |ago| {
                    let asking = World { flow: made(former(FlowState::Closing), ago), ..World::of(asks) };
                    let asked =
                        Arrival { hops: 1, bypassed: Some(MemberId(u32::from(asks.0))), ..Arrival::WIRE };
                    let vintage = Vintage::of(&asking.flow.unwrap());
                    Arrival { known: true, vintage, ..asked }
                };
                let has = World { flow: made(entry, 5_000), leased, ..World::of(slot) };
                let (to, back) = handed_on(&has.decide(arrival(1_000), DATA));
                assert_eq!((to, back.hops, back.known), (asks, 2, false), "the asker has the newer one");
                let last = Arrival { hops: MAX_HOPS, ..arrival(1_000) };
                assert_eq!(handed_to(&has.decide(last, DATA)), Some(asks));
                let last = Arrival { hops: MAX_HOPS, ..arrival(60_000) };
                assert_eq!(
                    has.decide(last, DATA).verdict,
                    Verdict::Forward(RECORDED),
                    "the asker has an older one"
                );
            }
        }
    }
}

/// The owner is new, so that it would rather ask about what has ended; but who asks it has said already what it has.
#[test]
fn an_owner_that_is_asked_does_not_ask_back() {
    let ended = recorded().map(|entry| FlowEntry { state: FlowState::Closing as u8, ..entry });
    let owner = World {
        flow: made(ended, 100),
        previous: Some([BACKUP, MemberSlot::NONE, MemberSlot::NONE]),
        ..World::of(OWNER)
    };
    let backup = World { flow: made(ended, 60_000), ..World::of(BACKUP) };
    let (to, arrival) = handed_on(&backup.decide(Arrival::WIRE, DATA));
    assert_eq!((to, arrival.known), (OWNER, true));
    assert_eq!(owner.decide(arrival, DATA).verdict, Verdict::Forward(RECORDED));
    // The twins: what the backup has is newer, or it has said nothing.
    let newer = Arrival { vintage: Vintage::of(&made(ended, 10).unwrap()), ..arrival };
    assert_eq!(handed_to(&owner.decide(newer, DATA)), Some(BACKUP));
    assert_eq!(handed_to(&owner.decide(Arrival::WIRE, DATA)), Some(BACKUP));
}

/// It holds the row since a moment ago, and nobody has told it yet what became of a flow that it had from former times.
#[test]
fn who_acts_for_an_owner_that_others_suspect_asks_it_while_the_window_is_open() {
    let quiet = |state| made(former(state), 60_000).map(|entry| FlowEntry { last_seen_ms: 0, ..entry });
    let ended = quiet(FlowState::Closing).map(|entry| FlowEntry { flags: FlowFlags(0), ..entry });
    let bypassing = Arrival { hops: 1, bypassed: Some(MemberId(u32::from(OWNER.0))), ..Arrival::WIRE };
    for flow in [ended, quiet(FlowState::Closing), quiet(FlowState::Established)] {
        let previous = Some([OWNER, MemberSlot::NONE, MemberSlot::NONE]);
        let backup = World { flow, previous, ..World::of(BACKUP) };
        let (to, asking) = handed_on(&backup.decide(bypassing, DATA));
        assert_eq!((to, asking.known), (OWNER, true));
        // It has what came after, or nothing.
        let newer = recorded().map(|entry| FlowEntry { backend: BackendIndex(5), ..entry });
        let owner = World { flow: newer, ..World::of(OWNER) };
        assert_eq!(owner.decide(asking, DATA).verdict, Verdict::Forward(BackendIndex(5)));
        let (to, back) = handed_on(&World::of(OWNER).decide(asking, DATA));
        assert_eq!((to, backup.decide(back, DATA).verdict), (BACKUP, Verdict::Forward(RECORDED)));
        // The twins: who has held the row for long knows what there is, and whom we suspect, too, is rather lost.
        let settled = World { previous: None, ..backup.clone() };
        assert_eq!(settled.decide(bypassing, DATA).verdict, Verdict::Forward(RECORDED));
        let lost = World { suspect: Some(OWNER), ..backup };
        assert_eq!(lost.decide(bypassing, DATA).verdict, Verdict::Forward(RECORDED));
        assert_eq!(lost.decide(Arrival::WIRE, DATA).verdict, Verdict::Forward(RECORDED));
    }
}

/// It has just started, and by its table two members are there, where three are.
#[test]
fn an_owner_that_asks_who_holds_nothing_hears_of_the_backup() {
    let owner = World { flow: made(former(FlowState::Closing), 60_000), ..World::of(OWNER) };
    let vintage = Vintage::of(&owner.flow.unwrap());
    for hops in 1..=MAX_HOPS {
        let asked =
            Arrival { hops, bypassed: Some(MemberId(u32::from(OWNER.0))), known: true, vintage, ports: None };
        let (to, on) = handed_on(&World::of(THIRD).decide(asked, DATA));
        assert_eq!((to, on.bypassed, on.known, on.vintage), (BACKUP, asked.bypassed, true, vintage));
        let newer = made(recorded(), 100).map(|entry| FlowEntry { backend: BackendIndex(5), ..entry });
        let backup = World { flow: newer, ..World::of(BACKUP) };
        assert_eq!(backup.decide(on, DATA).verdict, Verdict::Forward(BackendIndex(5)));
        // Who knows nothing, or what came before, gives it back.
        for flow in [None, made(recorded(), 90_000)] {
            let (to, back) = handed_on(&World { flow, ..World::of(BACKUP) }.decide(on, DATA));
            assert_eq!((to, owner.decide(back, DATA).verdict), (OWNER, Verdict::Forward(RECORDED)));
        }
        // The twin: no backup, no use.
        let lost = World { suspect: Some(BACKUP), ..World::of(THIRD) };
        assert_eq!(handed_to(&lost.decide(asked, DATA)), Some(OWNER));
    }
}

/// A program that goes on by the plan its daemon left behind, asked by a member that has joined since.
#[test]
fn a_newer_record_of_a_stranger_is_not_overruled_by_an_older_one() {
    let by_stranger = |hops, age| Arrival {
        hops,
        bypassed: Some(MemberId(u32::from(MemberSlot::NONE.0))),
        known: true,
        vintage: Vintage::of(&made(recorded(), age).unwrap()),
        ports: None,
    };
    for slot in [OWNER, BACKUP, THIRD] {
        for (flow, hops) in
            [(None, 1), (None, MAX_HOPS), (former(FlowState::Closing), 1), (recorded(), MAX_HOPS)]
        {
            for leased in [true, false] {
                let world = World { flow: made(flow, 60_000), leased, ..World::of(slot) };
                let decision = world.decide(by_stranger(hops, 1_000), DATA);
                assert_eq!(
                    decision.verdict,
                    Verdict::Drop(DropReason::NotJoined),
                    "{slot:?} {flow:?} {hops}"
                );
            }
        }
        // The twins: of the same connection, or of a later one; and who says nothing of what it has.
        let world = World { flow: made(recorded(), 1_000), ..World::of(slot) };
        for age in [1_000, 90_000] {
            assert_eq!(world.decide(by_stranger(MAX_HOPS, age), DATA).verdict, Verdict::Forward(RECORDED));
        }
        let silent = Arrival { known: false, ..by_stranger(MAX_HOPS, 10) };
        assert_eq!(world.decide(silent, DATA).verdict, Verdict::Forward(RECORDED));
    }
}

#[test]
fn a_hand_off_says_which_record_its_sender_has() {
    let third = World { flow: made(former(FlowState::Established), 10), ..World::of(THIRD) };
    let (_, arrival) = handed_on(&third.decide(Arrival::WIRE, DATA));
    assert_eq!((arrival.known, arrival.vintage), (true, Vintage::of(&third.flow.unwrap())));
    assert_ne!(arrival.vintage, Vintage(0));
    // Who has nothing passes it on to whom it asks.
    let (to, passed) = handed_on(&World::of(BACKUP).decide(arrival, DATA));
    assert_eq!((to, passed.known), (OWNER, true));
    assert_eq!(passed.vintage, arrival.vintage);
    // A holder gets it back instead: the owner may be lost, which is why it asks.
    let backup = World { flow: made(former(FlowState::Established), 10), ..World::of(BACKUP) };
    let (_, arrival) = handed_on(&backup.decide(Arrival::WIRE, DATA));
    assert_eq!(handed_to(&World::of(THIRD).decide(arrival, DATA)), Some(BACKUP));
}

/// It had no lease for a moment, so that what began then was recorded by who was its backup, and holds the row no more.
#[test]
fn an_owner_asks_who_was_its_backup_before_a_change() {
    let owner = World { previous: Some([OWNER, THIRD, MemberSlot::NONE]), ..World::of(OWNER) };
    for (hops, next) in [(0, OWNER), (1, BACKUP)] {
        let (to, arrival) = handed_on(&owner.decide(Arrival { hops, ..Arrival::WIRE }, DATA));
        assert_eq!(to, THIRD);
        let third = World { flow: former(FlowState::Established), ..World::of(THIRD) };
        assert_eq!(third.decide(arrival, DATA).verdict, Verdict::Forward(RECORDED));
        // Who knows nothing either gives it back, or asks the backup of now if that would be a hop too many.
        assert_eq!(handed_to(&World::of(THIRD).decide(arrival, DATA)), Some(next));
        // The twin: nothing has moved.
        let settled = World { previous: None, ..owner.clone() };
        assert_eq!(handed_to(&settled.decide(Arrival { hops, ..Arrival::WIRE }, DATA)), Some(BACKUP));
    }
    let last = Arrival { hops: MAX_HOPS, ..Arrival::WIRE };
    assert_eq!(handed_to(&owner.decide(last, DATA)), Some(BACKUP));
    // What it has and doubts, its backup may have recorded anew since.
    let doubting = World { flow: former(FlowState::Established), ..owner };
    assert_eq!(handed_to(&doubting.decide(Arrival::WIRE, DATA)), Some(BACKUP));
}

/// Its own entry is of a half-closed connection, so it asks who held the row before; that one may have the tuple's use before, and must
/// hear which of the two is newer.
#[test]
fn a_backup_that_acts_for_a_lost_owner_says_what_it_has_when_it_asks() {
    let closing = recorded().map(|entry| FlowEntry { state: FlowState::Closing as u8, ..entry });
    let previous = Some([THIRD, BACKUP, MemberSlot::NONE]);
    let backup = World { flow: made(closing, 10), previous, suspect: Some(OWNER), ..World::of(BACKUP) };
    let (to, arrival) = handed_on(&backup.decide(Arrival::WIRE, DATA));
    assert_eq!((to, arrival.bypassed, arrival.known), (THIRD, Some(MemberId(1)), true));
    let third = |ago| World { flow: made(former(FlowState::Closing), ago), ..World::of(THIRD) };
    let (to, arrival) = handed_on(&third(60_000).decide(arrival, DATA));
    assert_eq!(to, BACKUP);
    assert_eq!(backup.decide(arrival, DATA).verdict, Verdict::Forward(RECORDED));
    // The twin: what that one has is newer.
    let (_, arrival) = handed_on(&backup.decide(Arrival::WIRE, DATA));
    assert_eq!(third(1).decide(arrival, DATA).verdict, Verdict::Forward(RECORDED));
}

/// News of the tuple's next use is still on its way to an owner that is new.
#[test]
fn a_new_owner_asks_before_it_believes_that_a_connection_has_ended() {
    let ended = recorded().map(|entry| FlowEntry { state: FlowState::Closing as u8, ..entry });
    let before = Some([THIRD, BACKUP, MemberSlot::NONE]);
    let owner = World { flow: made(ended, 60_000), previous: before, ..World::of(OWNER) };
    let third = World { flow: made(former(FlowState::Established), 10), ..World::of(THIRD) };
    let (to, arrival) = handed_on(&owner.decide(Arrival::WIRE, DATA));
    assert_eq!(to, THIRD);
    assert_eq!(third.decide(arrival, DATA).verdict, Verdict::Forward(RECORDED));
    // The twins: it has long been the owner, or nobody is there to be asked; and what lives is believed.
    for world in [
        World { previous: None, ..owner.clone() },
        World { previous: Some([OWNER, THIRD, MemberSlot::NONE]), ..owner.clone() },
        World { flow: made(recorded(), 60_000), ..owner },
    ] {
        assert_eq!(world.decide(Arrival::WIRE, DATA).verdict, Verdict::Forward(RECORDED));
    }
}

/// Chaos: a joiner's program had the plan of before when a member that had switched took it for the owner, and what had been sent ahead of the
/// change was of the connection before.
#[test]
fn who_is_sent_an_ended_connection_ahead_of_a_change_leaves_it_to_the_owner_until_then() {
    let ended = recorded().map(|entry| FlowEntry { state: FlowState::Closing as u8, ..entry });
    let joiner = World { flow: made(ended, 60_000), ..World::of(THIRD) };
    let handed = Arrival { hops: 1, ..Arrival::WIRE };
    let (to, arrival) = handed_on(&joiner.decide(handed, DATA));
    assert_eq!((to, arrival.known, arrival.bypassed), (OWNER, true, Some(MemberId(2))));
    // The owner has the tuple's next use,
    let again = recorded().map(|entry| FlowEntry { backend: CONSISTENT, ..entry });
    let owner = World { flow: made(again, 10), ..World::of(OWNER) };
    assert_eq!(owner.decide(arrival, DATA).verdict, Verdict::Forward(CONSISTENT));
    // or the same connection, or it knows nothing, and asks the joiner.
    let same = World { flow: made(ended, 60_000), ..World::of(OWNER) };
    assert_eq!(same.decide(arrival, DATA).verdict, Verdict::Forward(RECORDED));
    let (to, back) = handed_on(&World::of(OWNER).decide(arrival, DATA));
    assert_eq!((to, joiner.decide(back, DATA).verdict), (THIRD, Verdict::Forward(RECORDED)));
    // The twins: what lives is believed, and a former holder that is asked says what it has.
    let live = World { flow: made(recorded(), 60_000), ..World::of(THIRD) };
    assert_eq!(live.decide(handed, DATA).verdict, Verdict::Forward(RECORDED));
    let former = World { flow: former(FlowState::Closing), ..World::of(THIRD) };
    assert_eq!(former.decide(handed, DATA).verdict, Verdict::Forward(RECORDED));
    // So does who is asked by the backup that acts for a lost owner (simulator, seed 5236): that owner would get the packet.
    let asks = Arrival { bypassed: Some(MemberId(u32::from(BACKUP.0))), ..handed };
    let lost = World { suspect: Some(OWNER), ..joiner.clone() };
    assert_eq!(lost.decide(asks, DATA).verdict, Verdict::Forward(RECORDED));
    assert_eq!(handed_to(&joiner.decide(asks, DATA)), Some(OWNER));
    assert_eq!(handed_to(&lost.decide(handed, DATA)), Some(BACKUP));
}

/// While others held it to be lost for a moment, its backup recorded the tuple's next use, and could not tell it.
#[test]
fn an_owner_asks_about_a_connection_that_ended_and_was_quiet_since() {
    let ended = |quiet_ms: u64| {
        let entry = recorded().map(|entry| FlowEntry { state: FlowState::Closing as u8, ..entry });
        entry.map(|entry| FlowEntry { last_seen_ms: NOW_MS - quiet_ms, ..entry })
    };
    let owner = World { flow: made(ended(1_001), 60_000), ..World::of(OWNER) };
    let (to, arrival) = handed_on(&owner.decide(Arrival::WIRE, DATA));
    assert_eq!((to, arrival.known), (BACKUP, true));
    let again = recorded().map(|entry| FlowEntry { backend: CONSISTENT, ..entry });
    let backup = World { flow: made(again, 10), ..World::of(BACKUP) };
    assert_eq!(backup.decide(arrival, DATA).verdict, Verdict::Forward(CONSISTENT));
    // Who has nothing else to say leaves it to the owner.
    let (_, back) = handed_on(&World::of(BACKUP).decide(arrival, DATA));
    let last = owner.decide(back, DATA);
    assert_eq!((last.verdict, last.entry.last_seen_ms), (Verdict::Forward(RECORDED), NOW_MS));
    // The twins: a packet of it came a moment ago, and there is nobody to ask.
    let busy = World { flow: made(ended(1_000), 60_000), ..World::of(OWNER) }.decide(Arrival::WIRE, DATA);
    assert_eq!(busy.verdict, Verdict::Forward(RECORDED));
    let alone = World { suspect: Some(BACKUP), ..owner };
    assert_eq!(alone.decide(Arrival::WIRE, DATA).verdict, Verdict::Forward(RECORDED));
}

/// Its daemon has just come back over pinned tables, and others send it what is its own before it has a lease.
#[test]
fn an_owner_without_a_lease_is_asked_by_nobody_and_asks_itself() {
    let owner = World { flow: made(former(FlowState::Closing), 60_000), leased: false, ..World::of(OWNER) };
    let handed = Arrival { hops: 1, ..Arrival::WIRE };
    let (to, arrival) = handed_on(&owner.decide(handed, DATA));
    assert_eq!((to, arrival.known, arrival.hops), (BACKUP, true, 2));
    let again = recorded().map(|entry| FlowEntry { backend: CONSISTENT, ..entry });
    let backup = World { flow: made(again, 10), ..World::of(BACKUP) };
    assert_eq!(backup.decide(arrival, DATA).verdict, Verdict::Forward(CONSISTENT));
    let (to, back) = handed_on(&World::of(BACKUP).decide(arrival, DATA));
    assert_eq!((to, back.hops), (OWNER, 3));
    assert_eq!(owner.decide(back, DATA).verdict, Verdict::Forward(RECORDED));
    // The twin: whoever does not own it was asked what it has.
    let asked = World { flow: made(former(FlowState::Closing), 60_000), ..World::of(THIRD) };
    assert_eq!(asked.decide(handed, DATA).verdict, Verdict::Forward(RECORDED));
}

/// A member was lost, and backends have changed since; or it had not heard of the change.
#[test]
fn what_nobody_knows_any_more_goes_where_the_consistent_table_pointed_when_a_member_was_last_heard() {
    let owner = World { earlier: Some(RECORDED), ..World::of(OWNER) };
    let last = Arrival { hops: MAX_HOPS, ..Arrival::WIRE };
    let recovered = owner.decide(Arrival { hops: MAX_HOPS + 1, ..last }, DATA);
    assert_eq!((recovered.outcome, recovered.verdict), (Outcome::Recovered, Verdict::Forward(RECORDED)));
    assert_eq!(recovered.entry.backend, RECORDED);
    // The twin: what begins now.
    assert_eq!(owner.decide(last, tcp_flags::SYN).verdict, Verdict::Forward(CONSISTENT));
}

/// Members whose views differ handed it on as often as may be: nobody else will record it, and the client's next packet needs it.
#[test]
fn a_syn_on_its_last_hop_is_recorded_where_it_is_and_told_at_once() {
    let last = Arrival { hops: MAX_HOPS, ..Arrival::WIRE };
    for slot in [BACKUP, THIRD] {
        let new = World::of(slot).decide(last, tcp_flags::SYN);
        assert_eq!((new.verdict, new.action), (Verdict::Forward(CONSISTENT), Action::Insert));
        assert_eq!((new.event, new.at_once), (Some(FlowEventKind::New), true));
        // The owner may have been told of a later one, and is asked.
        let world = World { flow: Some(new.entry), ..World::of(slot) };
        let (to, arrival) = handed_on(&world.decide(Arrival::WIRE, DATA));
        assert_eq!((to, arrival.known), (OWNER, true));
        let (mut to, mut back) =
            handed_on(&World { leased: false, ..World::of(OWNER) }.decide(arrival, DATA));
        if slot == THIRD {
            // Without a lease it leaves that to its backup.
            assert_eq!(to, BACKUP);
            (to, back) = handed_on(&World::of(BACKUP).decide(back, DATA));
        }
        assert_eq!((to, world.decide(back, DATA).verdict), (slot, Verdict::Forward(CONSISTENT)));
    }
    // The twins: the owner's own is no guest, a hop is left, and without a lease nothing is recorded.
    let own = World::of(OWNER).decide(last, tcp_flags::SYN);
    assert_eq!(
        (own.action, own.entry.flags.has(FlowFlags::FORMER), own.at_once),
        (Action::Insert, false, false)
    );
    let early = World::of(THIRD).decide(Arrival { hops: 1, ..Arrival::WIRE }, tcp_flags::SYN);
    assert_eq!((handed_to(&early), early.action), (Some(OWNER), Action::Keep));
    let unleased = World { leased: false, ..World::of(THIRD) }.decide(last, tcp_flags::SYN);
    assert_eq!((unleased.verdict, unleased.action), (Verdict::Drop(DropReason::NotJoined), Action::Keep));
}

#[test]
fn an_owner_that_doubts_asks_for_packets_that_were_handed_to_it_too() {
    const OTHER: BackendIndex = BackendIndex(5);
    for state in [FlowState::HalfOpen, FlowState::Established, FlowState::Closing] {
        let third = World::of(THIRD);
        let (to, arrival) = handed_on(&third.decide(Arrival::WIRE, DATA));
        assert_eq!(to, OWNER);
        let owner = World { flow: former(state), ..World::of(OWNER) };
        let (to, arrival) = handed_on(&owner.decide(arrival, DATA));
        assert_eq!((to, arrival.known), (BACKUP, true));
        // The backup has what came after it, or nothing.
        let knows = recorded().map(|entry| FlowEntry { backend: OTHER, ..entry });
        let backup = World { flow: knows, ..World::of(BACKUP) };
        assert_eq!(backup.decide(arrival, DATA).verdict, Verdict::Forward(OTHER));
        let (to, arrival) = handed_on(&World::of(BACKUP).decide(arrival, DATA));
        assert_eq!(to, OWNER);
        assert_eq!(owner.decide(arrival, DATA).verdict, Verdict::Forward(RECORDED));
    }
}

#[test]
fn a_connection_that_has_ended_is_for_the_owner_to_know() {
    let ended = recorded().map(|entry| FlowEntry { state: FlowState::Closing as u8, ..entry });
    let at = |local, arrival| World { flow: ended, ..World::of(local) }.decide(arrival, DATA);
    // The owner may have recorded a new one a moment ago.
    assert_eq!(handed_to(&at(BACKUP, Arrival::WIRE)), Some(OWNER));
    assert_eq!(at(OWNER, Arrival::WIRE).verdict, Verdict::Forward(RECORDED));
    // Who is asked, or acts for the owner, says what it has.
    assert_eq!(at(BACKUP, Arrival { hops: 1, ..Arrival::WIRE }).verdict, Verdict::Forward(RECORDED));
    let acting = World { flow: ended, suspect: Some(OWNER), ..World::of(BACKUP) };
    assert_eq!(acting.decide(Arrival::WIRE, DATA).verdict, Verdict::Forward(RECORDED));
}

#[test]
fn a_syn_on_a_used_tuple_tells_the_backup_before_it_reaches_a_backend() {
    const BEFORE: u64 = 5 << BIRTH_MS_BITS << 1;
    let ended = recorded().map(|entry| FlowEntry { state: FlowState::Closing as u8, birth: BEFORE, ..entry });
    for hops in 0..MAX_HOPS {
        let owner = World { flow: ended, ..World::of(OWNER) };
        let new = owner.decide(Arrival { hops, ..Arrival::WIRE }, tcp_flags::SYN);
        assert_eq!((new.action, new.event), (Action::Insert, Some(FlowEventKind::New)));
        assert_eq!((new.outcome, new.entry.backend), (Outcome::New, CONSISTENT));
        let (to, arrival) = handed_on(&new);
        assert_eq!((to, arrival.known), (BACKUP, true));

        let told = World { flow: ended, ..World::of(BACKUP) }.decide(arrival, tcp_flags::SYN);
        assert_eq!((told.action, told.event), (Action::Insert, None));
        assert_eq!((told.entry.flags, told.entry.birth), (FlowFlags(FlowFlags::PRESUMED), BEFORE));
        let (to, arrival) = handed_on(&told);
        assert_eq!((to, arrival.hops, arrival.known), (OWNER, hops + 2, false));
        // What lives there may be this connection: the packet has come twice.
        let lives = World { flow: recorded(), ..World::of(BACKUP) };
        let kept = lives.decide(handed_on(&new).1, tcp_flags::SYN);
        assert_eq!((handed_to(&kept), kept.action), (Some(OWNER), Action::Keep));

        let owner = World { flow: Some(new.entry), ..World::of(OWNER) };
        assert_eq!(owner.decide(arrival, tcp_flags::SYN).verdict, Verdict::Forward(CONSISTENT));
        // And if the owner is lost before it has told anybody, nobody believes the connection before, and nobody else is asked.
        let previous = Some([THIRD, BACKUP, OWNER]);
        let presumed = World { flow: Some(told.entry), previous, ..World::of(BACKUP) };
        let acting = World { suspect: Some(OWNER), ..presumed };
        let acted = acting.decide(Arrival::WIRE, DATA);
        assert_eq!((acted.verdict, acted.event), (Verdict::Forward(CONSISTENT), Some(FlowEventKind::New)));
        let guess = (FlowFlags(FlowFlags::RECOVERED), 0);
        assert_eq!((acted.entry.flags, acted.entry.birth), guess, "told to others from now on");
        // The twin: with nothing in its place, who has heard of the connection before alone would be asked.
        let nothing = World { flow: None, ..acting };
        assert_eq!(handed_to(&nothing.decide(Arrival::WIRE, DATA)), Some(THIRD));
    }
    // The twins: nobody to tell, no hop left, and nothing to forget.
    let forwards = |world: World, hops| {
        let decision = world.decide(Arrival { hops, ..Arrival::WIRE }, tcp_flags::SYN);
        assert_eq!(decision.action, Action::Insert);
        decision.verdict == Verdict::Forward(CONSISTENT)
    };
    assert!(forwards(World { flow: ended, suspect: Some(BACKUP), ..World::of(OWNER) }, 0));
    assert!(forwards(World { flow: ended, ..World::of(OWNER) }, MAX_HOPS));
    assert!(forwards(World::of(OWNER), 0));
}

#[test]
fn what_is_presumed_yields_to_whoever_may_know() {
    let entry = FlowEntry {
        backend: CONSISTENT,
        flags: FlowFlags(FlowFlags::PRESUMED),
        birth: 5 << BIRTH_MS_BITS << 1,
        last_seen_ms: NOW_MS - 100,
        ..NO_ENTRY
    };
    let presumed = World { flow: Some(entry), ..World::of(BACKUP) };
    let is_ignored = |world: &World, arrival: Arrival, flags: u8| {
        let decision = world.decide(arrival, flags);
        let without = World { flow: None, ..world.clone() }.decide(arrival, flags);
        assert_eq!((decision.verdict, decision.event), (without.verdict, without.event));
        decision
    };
    // The owner lives, or has the flow and no lease; and we have no lease.
    let handed_off = is_ignored(&presumed, Arrival::WIRE, DATA);
    assert_eq!(handed_to(&handed_off), Some(OWNER));
    let (_, arrival) = handed_on(&handed_off);
    assert!(!arrival.known, "a guess is not handed off as knowledge");
    let asks = Arrival { hops: 1, bypassed: Some(MemberId(0)), known: true, ..Arrival::WIRE };
    assert_eq!(handed_to(&is_ignored(&presumed, asks, DATA)), Some(OWNER));
    // Who knows the connection before alone knows nothing.
    let suspect = World { suspect: Some(OWNER), ..presumed.clone() };
    let knows = |birth: u64| {
        let vintage = Vintage::of(&FlowEntry { birth, state: FlowState::Closing as u8, ..NO_ENTRY });
        Arrival { hops: 1, bypassed: Some(MemberId(2)), known: true, vintage, ..Arrival::WIRE }
    };
    assert_eq!(suspect.decide(knows(entry.birth), DATA).verdict, Verdict::Forward(CONSISTENT));
    assert_eq!(handed_to(&suspect.decide(knows(6 << BIRTH_MS_BITS << 1), DATA)), Some(THIRD));
    is_ignored(&World { leased: false, ..suspect.clone() }, Arrival::WIRE, DATA);
    // Nor has an owner that left the SYN to its backup while it had no lease.
    let owner = World { local: OWNER, ..presumed.clone() };
    assert_eq!(handed_to(&is_ignored(&owner, Arrival::WIRE, DATA)), Some(BACKUP));
    // A SYN that is ours to record is recorded, as if there were nothing.
    let new = is_ignored(&suspect, Arrival::WIRE, tcp_flags::SYN);
    assert_eq!((new.action, new.entry.flags), (Action::Insert, FlowFlags(0)));
}

#[test]
fn who_forwards_for_the_owner_says_so_after_a_quarter_of_the_time_it_would_be_forgotten_in() {
    let after = |state: FlowState, unreported_ms: u64| {
        let entry = recorded().map(|entry| FlowEntry {
            state: state as u8,
            last_reported_ms: NOW_MS - unreported_ms,
            ..entry
        });
        // What has ended is forwarded by others than the owner only while they act for it.
        let suspect = (!state.is_live()).then_some(OWNER);
        let held = World { flow: entry, suspect, ..World::of(BACKUP) };
        let [held, cached] = [held, World { cached: entry, ..World::of(THIRD) }]
            .map(|world| world.decide_on(Arrival::WIRE, tcp_flags::ACK, b""));
        if state.is_live() {
            assert_eq!(held.event, cached.event, "{state:?} after {unreported_ms} ms");
        }
        held.event
    };
    assert_eq!(after(FlowState::Established, 15_000), None);
    assert_eq!(after(FlowState::Established, 15_001), Some(FlowEventKind::Touched));
    assert_eq!(after(FlowState::Closing, 1_500), None);
    assert_eq!(after(FlowState::Closing, 1_501), Some(FlowEventKind::Touched));
    // The owner says it of what has ended, for its backup to know.
    let closing = |unreported_ms: u64| {
        let entry = recorded().map(|entry| FlowEntry {
            state: FlowState::Closing as u8,
            last_reported_ms: NOW_MS - unreported_ms,
            ..entry
        });
        World { flow: entry, ..World::of(OWNER) }.decide_on(Arrival::WIRE, tcp_flags::ACK, b"").event
    };
    assert_eq!([closing(1_500), closing(1_501)], [None, Some(FlowEventKind::Touched)]);
    // The twin: the owner knows.
    let owner = World {
        flow: recorded().map(|entry| FlowEntry { last_reported_ms: 0, ..entry }),
        ..World::of(OWNER)
    };
    assert_eq!(owner.decide(Arrival::WIRE, DATA).event, None);
}

#[test]
fn claim_17_without_a_cache_what_is_not_ours_always_goes_to_the_owner() {
    for flags in [DATA, tcp_flags::ACK | tcp_flags::FIN, tcp_flags::RST, tcp_flags::SYN | tcp_flags::ACK] {
        let decision = World::of(THIRD).decide(Arrival::WIRE, flags);
        assert_eq!(handed_to(&decision), Some(OWNER), "{flags:#x}");
        assert_eq!((decision.action, decision.event), (Action::Keep, None));
    }
}

#[test]
fn who_is_in_no_cluster_does_not_guess_where_a_connection_goes() {
    let alone = World { alone: true, ..World::of(OWNER) };
    for hops in 0..=MAX_HOPS {
        let decision = alone.decide(Arrival { hops, ..Arrival::WIRE }, DATA);
        assert_eq!(decision.verdict, Verdict::Drop(DropReason::NotJoined), "{hops} hops");
        assert_eq!((decision.action, decision.event), (Action::Keep, None));
    }
    // What it knows it forwards; a new connection, which nobody could record, waits for the client's next SYN.
    let known = World { flow: recorded(), ..alone.clone() };
    assert_eq!(known.decide(Arrival::WIRE, DATA).verdict, Verdict::Forward(RECORDED));
    let new = alone.decide(Arrival::WIRE, tcp_flags::SYN);
    assert_eq!((new.verdict, new.action), (Verdict::Drop(DropReason::NotJoined), Action::Keep));
    // The twin: the owner with nobody left to ask recovers the flow.
    let owner = World::of(OWNER).decide(Arrival { hops: MAX_HOPS + 1, ..Arrival::WIRE }, DATA);
    assert_eq!((owner.verdict, owner.outcome), (Verdict::Forward(CONSISTENT), Outcome::Recovered));
}
