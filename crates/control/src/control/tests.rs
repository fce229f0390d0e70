//! Some members in one place: views are given, frames go from one to the other, time is told.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::num::NonZeroU32;
use std::sync::atomic::{AtomicU64, Ordering};

use phalanx_flow::decide::Outcome;
use phalanx_flow::packet::Link;
use phalanx_flow::score::Scoring;
use phalanx_flow::table::BackupSite;
use phalanx_flow::{BackendId, FlowFlags, FlowSeed, Method};
use phalanx_forwarder::Handoff;
use phalanx_forwarder::conformance::frames::frame;
use phalanx_forwarder::engine::{Clock, TableLimits};
use phalanx_forwarder::memory::MemoryForwarder;
use phalanx_membership::{Metadata, Wish};

use super::former::STRANGERS_STAY;
use super::room::expected_records;
use super::*;
use crate::planner::Fixed;

mod aging;
mod cached;
mod doubts;
mod missing;

const FLOWS: u16 = 60;
/// What a member's flow table takes.
const LIMIT: usize = 10_000;
const IDLE: Duration = Duration::from_secs(900);
const LINGER: Duration = Duration::from_secs(20);
const TICK: Duration = Duration::from_millis(500);

fn backend() -> BackendId {
    BackendId::new([10, 0, 1, 1].into(), Method::IpIp, 0)
}

fn service() -> Service {
    Service {
        address: IpAddr::from([192, 0, 2, 1]),
        port: 80,
        protocol: phalanx_flow::key::TCP,
        backends: vec![backend()],
        idle: IDLE,
        linger: LINGER,
        reset_linger: Duration::from_secs(5),
        half_open: Duration::from_secs(10),
        fragment: false,
    }
}

fn key(n: u16) -> FlowKey {
    let client = (IpAddr::from([198, 51, 100, 7]), 1024 + n);
    FlowKey::new(phalanx_flow::key::TCP, client, (service().address, 80)).expect("one family")
}

fn record(n: u16) -> Record {
    Record {
        key: key(n),
        backend: backend(),
        state: FlowState::Established,
        flags: FlowFlags::default(),
        birth: (1 << 30) + u64::from(n),
        update: 1,
        idle_ms: 0,
    }
}

struct Site {
    now: Instant,
    /// What the forwarders tell the time by: the milliseconds that have passed.
    elapsed_ms: Arc<AtomicU64>,
    members: BTreeMap<u32, (Control, Arc<MemoryForwarder>)>,
    /// Pairs that are cut off from each other.
    cut: Vec<(u32, u32)>,
    said: Vec<(u32, Event)>,
}

impl Site {
    fn new(ids: &[u32]) -> Self {
        Self::with_backups(ids, 1)
    }

    #[expect(
        clippy::disallowed_methods,
        reason = "an Instant cannot be made otherwise; only differences count"
    )]
    fn with_backups(ids: &[u32], backups: usize) -> Self {
        let now = Instant::now();
        let mut site = Self {
            now,
            elapsed_ms: Arc::default(),
            members: BTreeMap::new(),
            cut: Vec::new(),
            said: Vec::new(),
        };
        // Flows may have been idle since before the start.
        site.elapsed_ms.store(IDLE.as_millis() as u64, Ordering::Relaxed);
        for &id in ids {
            let fixed = Fixed {
                local: MemberId(id),
                address: IpAddr::from([10, 0, 0, id as u8]),
                seed: FlowSeed([1, 2]),
                scoring: Scoring::Rendezvous { key: [1, 2] },
                rows: 64,
                site_rule: BackupSite::Any,
                backups,
                handoff: Handoff { port: 6081, cookie: 7, old_cookie: None, fragment: false },
                replicate_syn: false,
            };
            let mut planner = Planner::new(fixed).expect("64 rows");
            planner.set_services(&[service()]);
            let limits = TableLimits { flows: LIMIT, half_open: 1000, ..TableLimits::default() };
            let clock = Clock::Told(Arc::clone(&site.elapsed_ms));
            let forwarder =
                Arc::new(MemoryForwarder::with_clock(planner.plan(), limits, clock).expect("a plan"));
            let rate = NonZeroU32::new(1_000_000).expect("not zero");
            let config = phalanx_rebalancer::Config { local: MemberId(id), transfer_rate: rate };
            let replicator = Replicator::new(config, now, 1_700_000_000_000);
            let settings = Settings {
                local: MemberId(id),
                cache: false,
                flush_on_leave: true,
                policy: Policy::Established,
                replication: true,
            };
            let control = Control::new(settings, planner, replicator, forwarder.clone());
            site.members.insert(id, (control, forwarder));
        }
        for &a in ids {
            for &b in ids.iter().filter(|b| **b != a) {
                site.members.get_mut(&a).expect("there").0.handle_connected(now, MemberId(b));
            }
        }
        site
    }

    /// Everybody suspects a member, or no more; each judges by itself whether to believe that.
    fn suspect(&mut self, id: u32, suspected: bool) {
        for (local, (control, _)) in &mut self.members {
            let mut view = View::clone(control.view());
            for member in view.members.iter_mut().filter(|member| member.id == MemberId(id)) {
                member.suspected = suspected;
            }
            view.judge(MemberId(*local));
            control.handle_view(self.now, Arc::new(view));
        }
        self.settle();
    }

    /// All have this view: active members, those that wish to be active, and a name for each.
    fn see(&mut self, active: &[u32], joining: &[u32], digest: u64, pending: Option<u64>) {
        let member = |id: u32, state, wish| MemberView {
            id: MemberId(id),
            address: ([10, 0, 0, id as u8], 7946).into(),
            boot: 1,
            generation: 0,
            state,
            metadata: Arc::new(Metadata { weight: 100, ..Metadata::default() }),
            serial: 1,
            wish,
            admitted: true,
            done: Digest(0),
            known: true,
            view_digest: Digest(digest),
            liveness: Liveness::Alive,
            suspected: false,
            echo_failing: false,
        };
        let wish = Some(Wish { active: true, weight: 100, serial: 2 });
        let members = active.iter().map(|&id| member(id, MemberState::Active, None));
        let members = members.chain(joining.iter().map(|&id| member(id, MemberState::Joining, wish)));
        let mut members: Vec<_> = members.collect();
        members.sort_by_key(|member| member.id);
        let pending = pending.map(Digest);
        let view = Arc::new(View { members, digest: Digest(digest), pending, distrusts_itself: false });
        for (control, _) in self.members.values_mut() {
            control.handle_view(self.now, Arc::clone(&view));
        }
        self.settle();
    }

    /// Frames go until there are none.
    fn settle(&mut self) {
        loop {
            let mut frames = Vec::new();
            for (&id, (control, _)) in &mut self.members {
                while let Some((to, frame)) = control.poll_message(self.now) {
                    frames.push((id, to.0, frame));
                }
                while let Some(event) = control.poll_event() {
                    self.said.push((id, event));
                }
            }
            if frames.is_empty() {
                return;
            }
            for (from, to, frame) in frames {
                if !self.cut.contains(&(from, to)) && !self.cut.contains(&(to, from)) {
                    let control = &mut self.members.get_mut(&to).expect("there").0;
                    control.handle_data(self.now, MemberId(from), &frame).expect("good frames");
                }
            }
        }
    }

    fn pass(&mut self, time: Duration) {
        let until = self.now + time;
        while self.now < until {
            self.now += TICK;
            self.elapsed_ms.fetch_add(TICK.as_millis() as u64, Ordering::Relaxed);
            for (control, _) in self.members.values_mut() {
                control.handle_timeout(self.now);
            }
            self.settle();
        }
    }

    fn holders(&self, n: u16) -> [u32; 2] {
        let table = self.members[&1].0.planner().current();
        let [owner, backup, _] = table.holders(table.row_of(&key(n)));
        [owner, backup].map(|id| id.map_or(0, |id| id.0))
    }

    fn forwarder(&self, id: u32) -> &MemoryForwarder {
        &self.members[&id].1
    }

    fn has(&self, id: u32, n: u16) -> bool {
        self.forwarder(id).get(&key(n)).is_some()
    }

    /// Every flow is at its holders.
    fn open(&self) {
        for n in 0..FLOWS {
            for holder in self.holders(n) {
                self.forwarder(holder).upsert(&[record(n)]);
            }
        }
    }

    /// How many flows are at their holders and nowhere else.
    fn held(&self) -> usize {
        let exactly = |n: &u16| {
            let holders = self.holders(*n);
            self.members.keys().all(|id| self.has(*id, *n) == holders.contains(id))
        };
        (0..FLOWS).filter(exactly).count()
    }

    fn ready_for(&self, id: u32, name: u64) -> bool {
        self.said
            .iter()
            .any(|(who, event)| *who == id && matches!(event, Event::ReadyFor(said) if *said == Digest(name)))
    }
}

#[test]
fn a_planned_join_is_ready_before_it_is_in_force_and_no_sooner() {
    let mut site = Site::new(&[1, 2, 3]);
    site.see(&[1, 2], &[], 1, None);
    site.open();
    site.cut = vec![(1, 3)];
    site.see(&[1, 2], &[3], 1, Some(2));
    site.pass(TICK);
    assert!(site.ready_for(2, 2) && site.ready_for(3, 2), "they have sent what they had to");
    assert!(!site.ready_for(1, 2), "what it sent has not arrived");
    let before = (0..FLOWS).filter(|n| site.holders(*n).contains(&3)).count();
    assert_eq!(before, 0, "the table in force is as it was");
    // The link is back: a new connection.
    site.cut.clear();
    for (a, b) in [(1, 3), (3, 1)] {
        let now = site.now;
        site.members.get_mut(&a).expect("there").0.handle_connected(now, MemberId(b));
    }
    site.pass(2 * TICK);
    assert!(site.ready_for(1, 2));

    site.said.clear();
    site.see(&[1, 2, 3], &[], 2, None);
    assert!((0..FLOWS).any(|n| site.holders(n).contains(&3)));
    assert!((0..FLOWS).all(|n| site.holders(n).into_iter().all(|holder| site.has(holder, n))));
    assert!(
        !site.said.iter().any(|(_, event)| matches!(event, Event::Planned(_))),
        "nothing is left to be sent"
    );
    let protected = |n: &u16| {
        let owner = site.forwarder(site.holders(*n)[0]);
        owner.get(&key(*n)).is_some_and(|record| record.flags.has(FlowFlags::PROTECTED))
    };
    assert!((0..FLOWS).filter(|n| site.holders(*n)[0] == 3).all(|n| protected(&n)));
    site.pass(LINGER + 2 * TICK);
    assert_eq!(site.held(), usize::from(FLOWS), "the former holders have let go");
}

#[test]
fn who_cannot_reach_a_joiner_goes_on_without_after_a_while_and_says_so() {
    let mut site = Site::new(&[1, 2, 3]);
    site.see(&[1, 2], &[], 1, None);
    site.open();
    site.cut = vec![(1, 3)];
    site.see(&[1, 2], &[3], 1, Some(2));
    site.pass(crate::change::STUCK_AFTER - TICK);
    let stuck = |site: &Site| {
        site.said.iter().any(|(who, event)| {
            matches!(event, Event::StuckFor(Digest(2), peers) if *who == 1 && *peers == [MemberId(3)])
        })
    };
    assert!(!stuck(&site));
    site.pass(2 * TICK);
    assert!(stuck(&site));
}

#[test]
fn a_change_that_is_dropped_leaves_no_entry_behind() {
    let mut site = Site::new(&[1, 2, 3]);
    site.see(&[1, 2], &[], 1, None);
    site.open();
    site.see(&[1, 2], &[3], 1, Some(2));
    assert!((0..FLOWS).any(|n| site.has(3, n)));
    site.see(&[1, 2], &[], 1, None);
    site.pass(SWEEP_AFTER + 2 * TICK);
    assert_eq!(site.held(), usize::from(FLOWS));
}

#[test]
fn what_one_holder_lost_comes_back_with_the_next_comparison_and_not_before() {
    let mut site = Site::new(&[1, 2, 3]);
    site.see(&[1, 2, 3], &[], 1, None);
    site.open();
    // The comparison that follows a change finds nothing.
    site.pass(Duration::from_secs(4));
    for n in 0..FLOWS {
        // Owners and backups in turn.
        let lost = site.holders(n)[usize::from(n % 2)];
        assert!(site.forwarder(lost).remove(&key(n), 0, Duration::ZERO));
    }
    assert_eq!(site.held(), 0);
    site.pass(REPAIR_EVERY - Duration::from_secs(4));
    assert_eq!(site.held(), 0, "the twin: without a comparison nothing comes back");
    site.pass(Duration::from_secs(5));
    assert_eq!(site.held(), usize::from(FLOWS));
    let repaired: u64 = site.members.values().map(|(control, _)| control.repair_counters().records).sum();
    assert!(repaired >= u64::from(FLOWS));
    // Once more: there is nothing to do.
    site.pass(REPAIR_EVERY + 4 * TICK);
    let again: u64 = site.members.values().map(|(control, _)| control.repair_counters().records).sum();
    assert_eq!(again, repaired);
}

#[test]
fn claim_19_case_656_who_lost_a_row_sends_what_the_new_holder_lacks_before_it_drops_it() {
    let mut site = Site::new(&[1, 2, 3]);
    site.see(&[1, 2], &[], 1, None);
    site.open();
    site.see(&[1, 2], &[3], 1, Some(2));
    site.see(&[1, 2, 3], &[], 2, None);
    site.pass(Duration::from_secs(4));
    let lost: Vec<u16> = (0..FLOWS).filter(|n| site.holders(*n).contains(&3)).collect();
    // The newcomer, and the one that stayed, forget; only who lost the row has the flow.
    for &n in &lost {
        for holder in site.holders(n) {
            site.forwarder(holder).remove(&key(n), 0, Duration::ZERO);
        }
    }
    site.pass(LINGER + 4 * TICK);
    assert!(lost.len() > 10);
    assert_eq!(site.held(), usize::from(FLOWS));
}

/// What member 1 does with an acknowledgement of a flow that it does not know.
fn unknown(site: &Site, port: u16) -> &'static str {
    let member = site.forwarder(1);
    member.renew_lease(Duration::from_secs(600));
    let before = member.counters();
    member.inject(&frame(&format!("ip4 198.51.100.8>192.0.2.1 tcp {port}>80 A")), Link::Ethernet, 1);
    let after = member.counters();
    let did = |outcome| after.outcome(outcome) > before.outcome(outcome);
    match (did(Outcome::Asked), did(Outcome::Recovered)) {
        (true, false) => "asked",
        (false, true) => "recovered",
        other => panic!("{other:?}"),
    }
}

/// A member that is cut off and comes back owns everything until it hears from the others: it must ask them, not guess.
#[test]
fn who_has_lost_half_of_the_members_asks_them_until_it_is_sure_that_they_are_down() {
    let mut site = Site::new(&[1, 2, 3]);
    let services = [vec![RankedBackend { id: backend(), weight: 1 }]];
    let now = site.now;
    site.members.get_mut(&1).expect("there").0.set_usable(now, &services);
    site.see(&[1, 2, 3], &[], 1, None);
    site.pass(LINGER + 4 * TICK);
    // One of three is an ordinary failure; of the rows that were its alone nothing is left to ask.
    site.see(&[1, 2], &[], 2, None);
    site.pass(LINGER + 4 * TICK);
    site.see(&[1], &[], 3, None);
    site.pass(LINGER + 4 * TICK);
    // Cut off for long, and back: the first packets go to who may hold them.
    assert!((0..FLOWS).all(|n| unknown(&site, 2000 + n) == "asked"));
    site.pass(TICK);
    assert!((0..FLOWS).all(|n| unknown(&site, 2000 + n) == "asked"));
    // Packets come, and the other member does not: it is down.
    site.pass(crate::lost::DOUBT + TICK);
    assert!((0..FLOWS).all(|n| unknown(&site, 2000 + n) == "recovered"));
    // Silence: perhaps it was cut off again.
    site.pass(crate::lost::SILENCE + TICK);
    assert!((0..FLOWS).all(|n| unknown(&site, 3000 + n) == "asked"));
    // It is met again. Nobody is asked but who is in the table.
    site.see(&[1, 2], &[], 4, None);
    site.pass(LINGER + 4 * TICK);
    assert!(!site.members[&1].0.planner().lost_half());
}

/// Members 3 and 4 are lost, and believed to be down; rows change hands; then another one is lost.
#[test]
fn who_was_lost_before_the_last_one_and_is_believed_to_be_down_is_asked_no_more() {
    for believed in [true, false] {
        let mut site = Site::new(&[1, 2, 3, 4, 5]);
        let services = [vec![RankedBackend { id: backend(), weight: 1 }]];
        let now = site.now;
        site.members.get_mut(&1).expect("there").0.set_usable(now, &services);
        site.see(&[1, 2, 3, 4, 5], &[], 1, None);
        site.pass(LINGER + 4 * TICK);
        site.see(&[1, 2, 5], &[], 2, None);
        site.see(&[1, 2], &[], 3, None);
        if believed {
            let packet = frame("ip4 198.51.100.8>192.0.2.1 tcp 2000>80 A");
            site.forwarder(1).inject(&packet, Link::Ethernet, 1);
            site.pass(crate::lost::DOUBT + 4 * TICK);
        }
        assert!(site.members[&1].0.planner().lost_half());
        site.see(&[1], &[], 4, None);
        let plan = site.members[&1].0.planner().plan();
        let doubted = plan.members.iter().filter(|member| member.liveness == Liveness::Suspect);
        let doubted: Vec<u32> = doubted.map(|member| member.id.0).collect();
        assert_eq!(doubted, if believed { vec![2] } else { vec![2, 3, 4, 5] });
        // Nobody else stands in the rows by which it asks.
        let asked = plan.previous.expect("rows");
        let slot_of_3 = site.members[&1].0.planner().slot_of(MemberId(3));
        assert_eq!(asked.iter().any(|row| row.ranks.contains(&slot_of_3)), !believed);
    }
}

#[test]
fn who_has_lost_less_than_half_asks_nobody_who_is_gone() {
    let mut site = Site::new(&[1, 2, 3, 4]);
    let now = site.now;
    let services = [vec![RankedBackend { id: backend(), weight: 1 }]];
    site.members.get_mut(&1).expect("there").0.set_usable(now, &services);
    site.see(&[1, 2, 3, 4], &[], 1, None);
    site.pass(LINGER + 4 * TICK);
    site.see(&[1, 2, 3], &[], 2, None);
    site.pass(LINGER + 4 * TICK);
    let plan = site.members[&1].0.planner().plan();
    assert!(plan.members.iter().all(|member| member.liveness != Liveness::Suspect));
    assert!(plan.previous.is_none());
}

#[test]
fn flows_that_the_backup_refused_are_told_again_and_protected_once_there_is_room() {
    let mut site = Site::new(&[1, 2]);
    let now = site.now;
    let services = [vec![RankedBackend { id: backend(), weight: 1 }]];
    site.members.get_mut(&1).expect("there").0.set_usable(now, &services);
    site.see(&[1, 2], &[], 1, None);
    site.pass(LINGER + 4 * TICK);
    let filler: Vec<Record> = (0..LIMIT as u16).map(|n| record(10_000 + n)).collect();
    site.forwarder(2).upsert(&filler);
    let owner = site.forwarder(1);
    owner.renew_lease(Duration::from_secs(600));
    for port in 2000..2040 {
        for flags in ["S", "A"] {
            let line = format!("ip4 198.51.100.8>192.0.2.1 tcp {port}>80 {flags}");
            owner.inject(&frame(&line), Link::Ethernet, 1);
        }
    }
    let unprotected = |site: &Site| site.members[&1].0.replicator().unprotected();
    site.pass(2 * TELL_AGAIN_EVERY);
    assert!(unprotected(&site) > 0, "there is no room");
    for record in &filler {
        site.forwarder(2).remove(&record.key, record.birth, Duration::ZERO);
    }
    site.pass(TELL_AGAIN_EVERY + 2 * TICK);
    assert_eq!(unprotected(&site), 0);
    assert!(site.members[&1].0.replicator().counters().told_again > 0);
}

/// The holders of each row.
struct Rows(Vec<[Option<MemberId>; 3]>);

impl Ranking for Rows {
    fn row_of(&self, _: &FlowKey) -> u32 {
        0
    }

    fn holders(&self, row: u32) -> [Option<MemberId>; 3] {
        self.0[row as usize]
    }

    fn row_count(&self) -> u32 {
        self.0.len() as u32
    }
}

#[test]
fn a_member_expects_its_share_of_the_flows_that_the_others_hold() {
    let [one, two, three] = [1, 2, 3].map(|id| Some(MemberId(id)));
    let alone = Rows(vec![[one, None, None]; 4]);
    let pair = Rows(vec![[one, two, None], [two, one, None], [one, two, None], [two, one, None]]);
    let joined = Rows(vec![[three, two, None], [two, three, None], [one, two, None], [two, one, None]]);
    let expected = |old, new, held| expected_records(MemberId(3), old, new, held);
    assert_eq!(expected(&pair, &joined, 2_000), 500, "half of the rows, of 1,000 flows that are held twice");
    assert_eq!(expected_records(MemberId(2), &alone, &pair, 1_000), 1_000, "all of them, as owner or backup");
    assert_eq!(expected(&joined, &joined, 2_000), 0, "what it holds it is not sent");
    assert_eq!(expected(&joined, &pair, 2_000), 0);
    assert_eq!(expected(&Rows(vec![[None; 3]; 4]), &joined, 2_000), 0, "nobody held anything by a table");
}

#[test]
fn a_joiner_has_room_for_what_it_will_be_sent_before_it_asks_to_join() {
    let mut site = Site::new(&[1, 2, 3]);
    let made = |site: &Site| {
        let made = site.said.iter().filter(|(_, event)| matches!(event, Event::RoomMade));
        made.map(|(who, _)| *who).collect::<Vec<_>>()
    };
    site.see(&[], &[1, 2, 3], 1, None);
    site.pass(TICK);
    assert_eq!(made(&site), [], "nobody is active");
    site.see(&[1, 2], &[3], 2, None);
    assert_eq!(made(&site), [], "its forwarder was not asked yet");
    site.pass(TICK);
    assert_eq!(made(&site), [3]);
    site.see(&[1, 2], &[3], 2, Some(3));
    site.see(&[1, 2, 3], &[], 3, None);
    site.pass(4 * TICK);
    assert_eq!(made(&site), [3], "once is enough");
}
