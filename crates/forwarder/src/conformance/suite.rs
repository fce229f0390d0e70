//! The suite's claims.

use std::time::{Duration, Instant};

use phalanx_flow::member::Liveness;
use phalanx_flow::packet::{Link, Packet, parse};
use phalanx_flow::{
    BackendId, FlowEvent, FlowEventKind, FlowFlags, FlowKey, FlowState, MemberSlot, Method, Record,
};

use super::frames::{self, frame};
use super::world::{World, backends, ip, key};
use super::{Emitted, Harness, Start};
use crate::engine::TableLimits;
use crate::{Drop, Forwarder, InstallError, RowSet, SendError, Upserted};
use phalanx_flow::decide::Outcome;

type Test = fn(&mut Start<'_>);

/// Every claim, with its test.
pub(super) const ALL: &[(&str, Test)] = &[
    ("a new plan is in force for the next packet, and the old one for the one before", plans_swap),
    ("a plan that contradicts itself is refused, and the one before goes on", wrong_plans),
    ("records are applied, refused as stale, and refused when the table is full", upserts),
    ("an established flow is never pushed out by a new one", full_table),
    ("a flow is owned only under a lease", lease),
    ("visits show the flows of the rows asked for, and no others", visits),
    ("events tell of new, established, closing and expired flows", events),
    ("a holder that is not the owner reports flows it forwards", touches),
    ("a former holder's entry is asked for, and not believed", former),
    ("what is presumed of a used tuple is the packet path's alone", presumed),
    ("birth is stamped once, protection holds for one version only", stamps),
    ("a flow that is not idle enough, or younger, is not removed", removal),
    ("a cached flow is forwarded, a flow of the table goes before it, and a flush returns it", cache),
    ("a hand-off goes to the acting owner, and comes out of it to a backend", hand_off),
    ("a hand-off with a wrong cookie is dropped, one with the old cookie is taken", cookies),
    ("a packet handed off as often as allowed stays", hops),
    ("an echo is answered, and its answer reaches the daemon", echoes),
    ("a probe goes the way flows go", probes),
    ("every packet is counted once", counting),
];

const FLOW: &str = "tcp 10.9.0.1 40000 192.0.2.1 80";
const SYN: &str = "ip4 10.9.0.1>192.0.2.1 tcp 40000>80 S";
const ACK: &str = "ip4 10.9.0.1>192.0.2.1 tcp 40000>80 A len=10";
const FIN: &str = "ip4 10.9.0.1>192.0.2.1 tcp 40000>80 FA";

const LIMITS: TableLimits = TableLimits { flows: 4096, half_open: 4096, cached: 4096 };

fn begin(start: &mut Start<'_>, world: &World) -> Box<dyn Harness> {
    let harness = start(world.plan(), LIMITS);
    harness.forwarder().set_next_hops(world.next_hops(harness.interface()));
    harness.forwarder().renew_lease(Duration::from_secs(60));
    harness
}

fn record(flow: FlowKey, backend: usize, state: FlowState) -> Record {
    Record {
        key: flow,
        backend: backends()[backend],
        birth: 100,
        update: 0,
        state,
        flags: FlowFlags(0),
        idle_ms: 0,
    }
}

/// Sends one frame and returns the one that comes out, with what is in it.
#[track_caller]
fn one(harness: &mut dyn Harness, line: &str) -> (Vec<u8>, Packet) {
    let emitted = harness.exchange(&[frame(line)], 1);
    let [Emitted::Frame(bytes)] = &emitted[..] else { panic!("{line}: {emitted:?}") };
    let packet = parse(&bytes[..], Link::Ethernet).expect("a packet");
    (bytes.clone(), packet)
}

#[track_caller]
fn destination(harness: &mut dyn Harness, line: &str) -> std::net::IpAddr {
    one(harness, line).1.key.destination_address()
}

#[track_caller]
fn nothing(harness: &mut dyn Harness, line: &str) {
    assert_eq!(harness.exchange(&[frame(line)], 0), [], "{line}");
}

fn take_events(forwarder: &dyn Forwarder) -> Vec<FlowEvent> {
    let mut events = Vec::new();
    while forwarder.poll_events(&mut events, 2) {}
    events
}

fn plans_swap(start: &mut Start<'_>) {
    let world = World { backend: 1, ..World::default() };
    let mut harness = begin(start, &world);
    assert_eq!(destination(&mut *harness, SYN), ip("10.0.1.2"));
    harness.forwarder().install(World { backend: 2, ..world.clone() }.plan()).expect("a plan");
    // A known flow stays; an unknown one goes by the new table.
    assert_eq!(destination(&mut *harness, ACK), ip("10.0.1.2"));
    assert_eq!(destination(&mut *harness, "ip4 10.9.0.1>192.0.2.1 tcp 40001>80 S"), ip("10.0.1.3"));
    // A service that is no more.
    let mut without = world.plan();
    without.services.retain(|service| service.port != 80);
    harness.forwarder().install(without).expect("a plan");
    nothing(&mut *harness, ACK);
    assert_eq!(harness.forwarder().counters().dropped(Drop::NoService), 1);
    harness.forwarder().install(world.plan()).expect("a plan");
    assert_eq!(destination(&mut *harness, ACK), ip("10.0.1.2"));
}

fn wrong_plans(start: &mut Start<'_>) {
    let world = World { backend: 1, ..World::default() };
    let mut harness = begin(start, &world);
    let mut wrong = world.plan();
    wrong.local = MemberSlot(9);
    let mut short = world.plan();
    short.rows = short.rows[..5].into();
    let mut fewer = world.plan();
    fewer.backends.truncate(2);
    let mut seed = world.plan();
    seed.seed.0[0] ^= 1;
    for plan in [wrong, short, fewer, seed] {
        let refused = harness.forwarder().install(plan);
        assert!(matches!(refused, Err(InstallError::Inconsistent(_))), "{refused:?}");
        assert_eq!(destination(&mut *harness, SYN), ip("10.0.1.2"));
    }
}

fn upserts(start: &mut Start<'_>) {
    let mut harness = begin(start, &World::default());
    let forwarder = harness.forwarder();
    let first = record(key(FLOW), 1, FlowState::Established);
    let unknown = Record { backend: BackendId::new(ip("10.0.9.9"), Method::IpIp, 0), ..first };
    let later = Record { update: 1, state: FlowState::Closing, ..first };
    assert_eq!(
        forwarder.upsert(&[first, first, unknown, later, first]),
        [Upserted::Applied, Upserted::Stale, Upserted::UnknownBackend, Upserted::Applied, Upserted::Stale]
    );
    assert_eq!(forwarder.get(&key(FLOW)).map(|record| record.state), Some(FlowState::Closing));
    // The connection that uses the tuple again goes before the one that used it, made by a SYN before recovered.
    let again = Record { birth: 200, backend: backends()[2], ..first };
    let once_more = Record { birth: 250, backend: backends()[3], ..first };
    let recovered = Record { flags: FlowFlags(FlowFlags::RECOVERED), birth: 300, ..first };
    assert_eq!(
        forwarder.upsert(&[again, once_more, again, recovered]),
        [Upserted::Applied, Upserted::Applied, Upserted::Stale, Upserted::Stale]
    );
    assert_eq!(destination(&mut *harness, ACK), ip("fd00:1::4"));
}

fn full_table(start: &mut Start<'_>) {
    let world = World { backend: 1, ..World::default() };
    let mut harness = start(world.plan(), TableLimits { flows: 64, half_open: 64, cached: 64 });
    let forwarder = harness.forwarder();
    forwarder.set_next_hops(world.next_hops(harness.interface()));
    forwarder.renew_lease(Duration::from_secs(60));
    let flow = |port: u16| FlowKey::new(6, (ip("10.9.0.2"), port), (ip("192.0.2.1"), 80)).expect("a key");
    let records: Vec<Record> = (1..=1000).map(|n| record(flow(n), 2, FlowState::Established)).collect();
    let answers = forwarder.upsert(&records);
    let applied = answers.iter().filter(|answer| **answer == Upserted::Applied).count();
    // A share of the table may have a little more room than its part.
    assert!((32..=128).contains(&applied), "{applied} of 1000 in a table of 64");
    assert!(answers.iter().all(|answer| matches!(answer, Upserted::Applied | Upserted::Full)));
    for (record, answer) in records.iter().zip(&answers) {
        assert_eq!(forwarder.get(&record.key).is_some(), *answer == Upserted::Applied);
    }
    let before = forwarder.counters().flows;
    // New flows go by the consistent table and push out nobody.
    for port in 50000..50200 {
        let lines = ["S", "A len=1"].map(|flags| format!("ip4 10.9.0.3>192.0.2.1 tcp {port}>80 {flags}"));
        for line in &lines {
            assert_eq!(destination(&mut *harness, line), ip("10.0.1.2"));
        }
    }
    let forwarder = harness.forwarder();
    for (record, answer) in records.iter().zip(&answers) {
        assert_eq!(forwarder.get(&record.key).is_some(), *answer == Upserted::Applied);
    }
    assert!(forwarder.counters().flows >= before);
    assert!(forwarder.counters().table_full > 0);
}

fn lease(start: &mut Start<'_>) {
    let mut harness = begin(start, &World { backend: 1, ..World::default() });
    harness.forwarder().upsert(&[record(key(FLOW), 2, FlowState::Established)]);
    harness.forwarder().renew_lease(Duration::ZERO);
    // All goes to the next member, as if we suspected ourselves; what it does not know comes back.
    assert_eq!(destination(&mut *harness, ACK), ip("10.0.0.2"));
    let back = format!("{HANDED} hops=2 {{{ACK}}}");
    assert_eq!(destination(&mut *harness, &back), ip("10.0.1.3"));
    let new = "ip4 10.9.0.1>192.0.2.1 tcp 40002>80 S";
    assert_eq!(destination(&mut *harness, new), ip("10.0.0.2"));
    assert_eq!(harness.forwarder().get(&key("tcp 10.9.0.1 40002 192.0.2.1 80")), None);
    harness.forwarder().renew_lease(Duration::from_millis(50));
    std::thread::sleep(Duration::from_millis(120));
    assert_eq!(destination(&mut *harness, new), ip("10.0.0.2"));
    harness.forwarder().renew_lease(Duration::from_secs(60));
    assert_eq!(destination(&mut *harness, new), ip("10.0.1.2"));
    assert!(harness.forwarder().get(&key("tcp 10.9.0.1 40002 192.0.2.1 80")).is_some());
}

fn visits(start: &mut Start<'_>) {
    let world = World::default();
    let harness = begin(start, &world);
    let plan = world.plan();
    let flow = |port: u16| FlowKey::new(6, (ip("10.9.0.2"), port), (ip("192.0.2.1"), 80)).expect("a key");
    let row = |key: &FlowKey| plan.row_function.row_of(key, phalanx_flow::flow_hash(plan.seed, key));
    let states = [FlowState::HalfOpen, FlowState::Established, FlowState::Closing];
    let records: Vec<Record> = (1..=90).map(|n| record(flow(n), 2, states[usize::from(n) % 3])).collect();
    assert!(harness.forwarder().upsert(&records).iter().all(|answer| *answer == Upserted::Applied));
    let visited = |rows: &RowSet| {
        let mut found = Vec::new();
        harness.forwarder().visit(rows, &mut |record| found.push(record.key));
        found.sort();
        found
    };
    let mut all: Vec<FlowKey> = records.iter().map(|record| record.key).collect();
    all.sort();
    assert_eq!(visited(&RowSet::All), all);
    let some: Vec<FlowKey> = all.iter().take(10).copied().collect();
    assert_eq!(visited(&RowSet::from_rows(some.iter().map(row))).len(), some.len());
    assert_eq!(visited(&RowSet::from_rows([])), []);
    let empty = (0..).find(|number| all.iter().all(|key| row(key) != *number)).expect("a row");
    assert_eq!(visited(&RowSet::from_rows([empty])), []);
}

fn events(start: &mut Start<'_>) {
    let mut world = World { backend: 1, ..World::default() };
    let mut harness = begin(start, &world);
    let kinds = |harness: &dyn Harness| -> Vec<(FlowEventKind, FlowState, bool)> {
        let events = take_events(harness.forwarder());
        events.iter().map(|event| (event.kind, event.record.state, event.at_once)).collect()
    };
    one(&mut *harness, SYN);
    assert_eq!(kinds(&*harness), [(FlowEventKind::New, FlowState::HalfOpen, false)]);
    one(&mut *harness, ACK);
    assert_eq!(kinds(&*harness), [(FlowEventKind::Changed, FlowState::Established, false)]);
    one(&mut *harness, ACK);
    assert_eq!(kinds(&*harness), []);
    one(&mut *harness, FIN);
    assert_eq!(kinds(&*harness), [(FlowEventKind::Changed, FlowState::Closing, false)]);
    // Data after a FIN: the flow lives again.
    one(&mut *harness, ACK);
    assert_eq!(kinds(&*harness), [(FlowEventKind::Changed, FlowState::Established, false)]);
    one(&mut *harness, "ip4 10.9.0.1>192.0.2.1 tcp 40000>80 R");
    assert_eq!(kinds(&*harness), [(FlowEventKind::Changed, FlowState::Reset, false)]);
    world.unsettled = true;
    harness.forwarder().install(world.plan()).expect("a plan");
    one(&mut *harness, "ip4 10.9.0.1>192.0.2.1 tcp 40003>80 S");
    assert_eq!(kinds(&*harness), [(FlowEventKind::New, FlowState::HalfOpen, true)]);
    // The reset flow's second is over: it waits for the daemon's word.
    let until = Instant::now() + Duration::from_secs(10);
    loop {
        let events = take_events(harness.forwarder());
        if events.iter().any(|event| event.kind == FlowEventKind::Expired && event.record.key == key(FLOW)) {
            break;
        }
        assert!(Instant::now() < until, "the reset flow never expired");
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(harness.forwarder().get(&key(FLOW)).is_some());
}

fn touches(start: &mut Start<'_>) {
    let mut harness = begin(start, &World { row: vec![2, 1, 3], ..World::default() });
    let seen = |idle_ms| Record { idle_ms, ..record(key(FLOW), 1, FlowState::Established) };
    harness.forwarder().upsert(&[seen(1_000)]);
    one(&mut *harness, ACK);
    assert_eq!(take_events(harness.forwarder()), []);
    // An older sighting does not make the entry older.
    harness.forwarder().upsert(&[Record { update: 1, ..seen(16_000) }]);
    assert!(harness.forwarder().get(&key(FLOW)).is_some_and(|record| record.idle_ms < 1_000));
    // Beyond a quarter of the idle timeout of 60 s.
    let other = key("tcp 10.9.0.1 40009 192.0.2.1 80");
    harness.forwarder().upsert(&[Record { key: other, ..seen(16_000) }]);
    one(&mut *harness, "ip4 10.9.0.1>192.0.2.1 tcp 40009>80 A len=1");
    let events = take_events(harness.forwarder());
    assert_eq!(events.iter().map(|event| event.kind).collect::<Vec<_>>(), [FlowEventKind::Touched]);
    let idle = key("tcp 10.9.0.1 40010 192.0.2.1 80");
    harness.forwarder().upsert(&[Record { key: idle, ..seen(16_000) }]);
    harness.forwarder().touch(&[(idle, 5_000)]);
    let idle_ms = |key| harness.forwarder().get(key).map_or(0, |record: Record| record.idle_ms);
    assert!((5_000..8_000).contains(&idle_ms(&idle)), "{}", idle_ms(&idle));
    harness.forwarder().touch(&[(idle, 50_000)]);
    assert!(idle_ms(&idle) < 8_000);
}

fn stamps(start: &mut Start<'_>) {
    let mut harness = begin(start, &World { backend: 1, ..World::default() });
    one(&mut *harness, SYN);
    let flow = key(FLOW);
    let forwarder = harness.forwarder();
    assert_eq!(forwarder.get(&flow).map(|record| record.birth), Some(0));
    assert!(forwarder.stamp(&flow, 7));
    assert!(!forwarder.stamp(&flow, 8));
    assert!(!forwarder.stamp(&key("tcp 10.9.0.1 1 192.0.2.1 80"), 8));
    assert_eq!(forwarder.get(&flow).map(|record| record.birth), Some(7));
    let protected = |forwarder: &dyn Forwarder| {
        forwarder.get(&flow).is_some_and(|record| record.flags.has(FlowFlags::PROTECTED))
    };
    forwarder.protect(&flow, 6, 0);
    forwarder.protect(&flow, 7, 1);
    assert!(!protected(forwarder));
    forwarder.protect(&flow, 7, 0);
    assert!(protected(forwarder));
    // Established: a version that the backup has not seen.
    one(&mut *harness, ACK);
    let forwarder = harness.forwarder();
    assert_eq!(forwarder.get(&flow).map(|record| (record.birth, record.update)), Some((7, 1)));
    assert!(!protected(forwarder));
}

fn former(start: &mut Start<'_>) {
    let world = World { row: vec![2, 3, 1], ..World::default() };
    let mut harness = begin(start, &world);
    let flow = key(FLOW);
    harness.forwarder().upsert(&[record(flow, 1, FlowState::Established)]);
    assert_eq!(destination(&mut *harness, ACK), ip("10.0.1.2"));
    harness.forwarder().set_former(&[flow], true);
    let is_former = |forwarder: &dyn Forwarder| {
        forwarder.get(&flow).is_some_and(|record| record.flags.has(FlowFlags::FORMER))
    };
    assert!(is_former(harness.forwarder()));
    // The owner is asked, and hears that we know the flow.
    let (bytes, outer) = one(&mut *harness, ACK);
    assert_eq!(outer.key.destination_address(), ip("10.0.0.2"));
    let (header, _) = phalanx_flow::encap::parse_hand_off(
        &bytes[..],
        usize::from(outer.payload_offset()),
        [frames::COOKIE; 2],
    )
    .expect("a hand-off");
    assert_eq!((header.known(), header.bypassed().map(|member| member.0)), (true, Some(1)));
    // Asked ourselves, we forward by what we have.
    let asked = format!("{HANDED} hops=2 {{{ACK}}}");
    assert_eq!(destination(&mut *harness, &asked), ip("10.0.1.2"));
    // Whoever sends the record again, the same or an older one, takes us for a holder.
    assert_eq!(harness.forwarder().upsert(&[record(flow, 1, FlowState::Established)]), [Upserted::Stale]);
    assert!(!is_former(harness.forwarder()));
    assert_eq!(destination(&mut *harness, ACK), ip("10.0.1.2"));
    // As owner that does not know a flow, we ask who does.
    let owner = World { row: vec![1, 2, 3], ..world };
    harness.forwarder().install(owner.plan()).expect("a plan");
    let unknown = format!("{HANDED} hops=1 knows=3 {{ip4 10.9.0.1>192.0.2.1 tcp 40011>80 A}}");
    assert_eq!(destination(&mut *harness, &unknown), ip("10.0.0.3"));
    let guess = format!("{HANDED} hops=3 {{ip4 10.9.0.1>192.0.2.1 tcp 40011>80 A}}");
    assert_ne!(destination(&mut *harness, &guess), ip("10.0.0.3"));
}

/// As backup, with the end of the connection before, whose owner tells of the next one by the SYN itself.
fn presumed(start: &mut Start<'_>) {
    let mut world = World { row: vec![2, 1, 3], backend: 1, ..World::default() };
    let mut harness = begin(start, &world);
    let flow = key(FLOW);
    let before = record(flow, 2, FlowState::Closing);
    let told = format!("{HANDED} hops=1 knows=2 {{{SYN}}}");
    let use_again = |harness: &mut dyn Harness| {
        harness.forwarder().remove(&flow, 0, Duration::ZERO);
        assert_eq!(harness.forwarder().upsert(&[before]), [Upserted::Applied]);
        assert_eq!(destination(harness, &told), ip("10.0.0.2"));
        assert_eq!(harness.forwarder().get(&flow), None);
        harness.forwarder().visit(&RowSet::All, &mut |record| panic!("{record:?} is presumed"));
        assert_eq!(take_events(harness.forwarder()), []);
    };
    use_again(&mut *harness);
    // What was before does not come back, and what came after takes the place, ended or not.
    assert_eq!(harness.forwarder().upsert(&[before]), [Upserted::Stale]);
    let after = Record { birth: 101, ..before };
    assert_eq!(harness.forwarder().upsert(&[after]), [Upserted::Applied]);
    assert_eq!(harness.forwarder().get(&flow).map(|record| record.birth), Some(101));
    // While the owner lives it has the word. When it does not, the flow goes where it would have sent it, and is ours to tell of.
    use_again(&mut *harness);
    assert_eq!(destination(&mut *harness, ACK), ip("10.0.0.2"));
    world.liveness = vec![(2, Liveness::Suspect)];
    world.previous = Some(vec![3, 1, 2]);
    harness.forwarder().install(world.plan()).expect("a plan");
    assert_eq!(destination(&mut *harness, ACK), ip("10.0.1.2"));
    let [event] = &take_events(harness.forwarder())[..] else { panic!("one event") };
    assert_eq!((event.kind, event.record.birth), (FlowEventKind::New, 0));
    assert_eq!(event.record.flags, FlowFlags(FlowFlags::RECOVERED));
    assert!(harness.forwarder().get(&flow).is_some_and(|record| record.flags.has(FlowFlags::RECOVERED)));
    // Where neither happens it goes in time, as half-open flows do, and nobody hears of it.
    world.liveness.clear();
    harness.forwarder().install(world.plan()).expect("a plan");
    use_again(&mut *harness);
    let until = Instant::now() + Duration::from_secs(15);
    while harness.forwarder().counters().half_open > 0 {
        assert!(Instant::now() < until, "it never goes");
        assert_eq!(take_events(harness.forwarder()), []);
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn removal(start: &mut Start<'_>) {
    let harness = begin(start, &World::default());
    let forwarder = harness.forwarder();
    let flow = key(FLOW);
    forwarder.upsert(&[Record { idle_ms: 5_000, ..record(flow, 1, FlowState::Closing) }]);
    assert!(!forwarder.remove(&flow, 99, Duration::ZERO));
    assert!(!forwarder.remove(&flow, 100, Duration::from_secs(30)));
    assert!(forwarder.get(&flow).is_some());
    assert!(forwarder.remove(&flow, 100, Duration::from_secs(4)));
    assert_eq!(forwarder.get(&flow), None);
    assert!(!forwarder.remove(&flow, 100, Duration::ZERO));
}

fn cache(start: &mut Start<'_>) {
    let mut harness = begin(start, &World { row: vec![2, 3, 4], ..World::default() });
    let flow = key(FLOW);
    assert_eq!(destination(&mut *harness, ACK), ip("10.0.0.2"));
    harness.forwarder().upsert_cache(&[record(flow, 1, FlowState::Established)]);
    assert_eq!(harness.forwarder().counters().cached, 1);
    assert_eq!(harness.forwarder().get(&flow), None);
    assert_eq!(destination(&mut *harness, ACK), ip("10.0.1.2"));
    assert_eq!(harness.forwarder().counters().outcome(Outcome::CacheHit), 1);
    // The table goes before the cache, and empties it of the flow.
    harness.forwarder().upsert(&[record(flow, 2, FlowState::Established)]);
    assert_eq!(destination(&mut *harness, ACK), ip("10.0.1.3"));
    assert!(harness.forwarder().remove(&flow, 0, Duration::ZERO));
    harness.forwarder().upsert_cache(&[record(flow, 1, FlowState::Established)]);
    harness.forwarder().remove_cache(&[flow]);
    assert_eq!(destination(&mut *harness, ACK), ip("10.0.0.2"));
    harness.forwarder().upsert_cache(&[record(flow, 1, FlowState::Established)]);
    let flushed = harness.forwarder().flush_cache();
    assert_eq!(flushed.iter().map(|record| record.key).collect::<Vec<_>>(), [flow]);
    assert_eq!(harness.forwarder().counters().cached, 0);
    assert_eq!(destination(&mut *harness, ACK), ip("10.0.0.2"));
    // A SYN erases what the cache has of its tuple.
    harness.forwarder().upsert_cache(&[record(flow, 1, FlowState::Established)]);
    assert_eq!(destination(&mut *harness, SYN), ip("10.0.0.2"));
    assert_eq!(harness.forwarder().counters().cached, 0);
}

fn hand_off(start: &mut Start<'_>) {
    let world = World { row: vec![2, 1, 3], backend: 1, ..World::default() };
    let mut harness = begin(start, &world);
    let (bytes, outer) = one(&mut *harness, SYN);
    assert_eq!(outer.key.destination_address(), ip("10.0.0.2"));
    let cookies = [frames::COOKIE; 2];
    let (header, inner) =
        phalanx_flow::encap::parse_hand_off(&bytes[..], usize::from(outer.payload_offset()), cookies)
            .expect("a hand-off");
    assert_eq!((header.hops, header.bypassed(), header.view_digest), (1, None, frames::VIEW_DIGEST));
    assert_eq!(bytes[inner..], frames::ip_packet(SYN), "the packet inside is as it came");
    // While the owner is suspected we act for it, and the next member hears whom we passed over.
    let suspected = World { liveness: vec![(2, Liveness::Suspect)], ..world };
    harness.forwarder().install(suspected.plan()).expect("a plan");
    assert_eq!(destination(&mut *harness, SYN), ip("10.0.1.2"));
    let both = World { row: vec![2, 3, 1], ..suspected };
    harness.forwarder().install(both.plan()).expect("a plan");
    let (bytes, outer) = one(&mut *harness, "ip4 10.9.0.1>192.0.2.1 tcp 40005>80 S");
    assert_eq!(outer.key.destination_address(), ip("10.0.0.3"));
    let (header, _) =
        phalanx_flow::encap::parse_hand_off(&bytes[..], usize::from(outer.payload_offset()), cookies)
            .expect("a hand-off");
    assert_eq!(header.bypassed().map(|member| member.0), Some(2));
}

const HANDED: &str = "ip4 10.0.0.2>10.0.0.1 handoff 6081";
const INNER: &str = "{ip4 10.9.0.1>192.0.2.1 tcp 40000>80 S}";

fn cookies(start: &mut Start<'_>) {
    let mut harness = begin(start, &World { backend: 1, ..World::default() });
    assert_eq!(destination(&mut *harness, &format!("{HANDED} {INNER}")), ip("10.0.1.2"));
    nothing(&mut *harness, &format!("{HANDED} cookie=5 {INNER}"));
    let old = frames::COOKIE + 1;
    assert_eq!(destination(&mut *harness, &format!("{HANDED} cookie={old} {INNER}")), ip("10.0.1.2"));
    let counters = harness.forwarder().counters();
    assert_eq!((counters.handoffs_in, counters.dropped(Drop::BadCookie)), (2, 1));
}

fn hops(start: &mut Start<'_>) {
    let mut harness = begin(start, &World { row: vec![2, 3, 1], backend: 1, ..World::default() });
    for (hops, to) in [(1, "10.0.0.2"), (2, "10.0.1.2"), (3, "10.0.1.2"), (255, "10.0.1.2")] {
        let line = format!("{HANDED} hops={hops} {INNER}");
        assert_eq!(destination(&mut *harness, &line), ip(to), "{hops} hops");
    }
}

fn echoes(start: &mut Start<'_>) {
    let mut harness = begin(start, &World::default());
    let (bytes, packet) = one(&mut *harness, "ip4 10.0.0.2>10.0.0.1 handoff 6081 echo=0x1234567890");
    assert_eq!(packet.key.destination_address(), ip("10.0.0.2"));
    let offset = usize::from(packet.payload_offset());
    let (header, inner) =
        phalanx_flow::encap::parse_hand_off(&bytes[..], offset, [frames::COOKIE; 2]).expect("an echo");
    assert!(header.flags.has(phalanx_flow::encap::HandOffFlags::ECHO_REPLY));
    assert_eq!(bytes[inner..], 0x12_3456_7890_u64.to_be_bytes());
    let mut tokens = Vec::new();
    harness.forwarder().poll_echoes(&mut tokens);
    assert_eq!(tokens, []);
    nothing(&mut *harness, "ip4 10.0.0.2>10.0.0.1 handoff 6081 reply=77");
    nothing(&mut *harness, "ip4 10.0.0.2>10.0.0.1 handoff 6081 cookie=1 reply=78");
    harness.forwarder().poll_echoes(&mut tokens);
    assert_eq!(tokens, [77]);
    harness.forwarder().send_echo(MemberSlot(1), 0xabc).expect("sent");
    let emitted = harness.exchange(&[], 1);
    let [Emitted::Frame(bytes)] = &emitted[..] else { panic!("{emitted:?}") };
    assert!(bytes.ends_with(&0xabc_u64.to_be_bytes()));
    let unknown = harness.forwarder().send_echo(MemberSlot(99), 1);
    assert!(matches!(unknown, Err(SendError::Unknown)), "{unknown:?}");
}

fn probes(start: &mut Start<'_>) {
    let world = World::default();
    let mut harness = begin(start, &world);
    let packet = frames::ip_packet("ip4 10.0.0.1>192.0.2.1 tcp 50000>80 S");
    harness.forwarder().send_probe(&backends()[1], &packet).expect("sent");
    let emitted = harness.exchange(&[], 1);
    let [Emitted::Frame(bytes)] = &emitted[..] else { panic!("{emitted:?}") };
    let outer = parse(&bytes[..], Link::Ethernet).expect("a packet");
    assert_eq!(outer.key.destination_address(), ip("10.0.1.2"));
    assert_eq!(bytes.len(), 14 + 20 + packet.len());
    let unknown = BackendId::new(ip("10.0.9.9"), Method::IpIp, 0);
    let refused = harness.forwarder().send_probe(&unknown, &packet);
    assert!(matches!(refused, Err(SendError::Unknown)), "{refused:?}");
    harness.forwarder().set_next_hops(World { resolved: false, ..world }.next_hops(harness.interface()));
    let refused = harness.forwarder().send_probe(&backends()[1], &packet);
    assert!(matches!(refused, Err(SendError::NoNextHop)), "{refused:?}");
}

fn counting(start: &mut Start<'_>) {
    let mut harness = begin(start, &World { backend: 1, ..World::default() });
    let lines =
        [SYN, ACK, ACK, FIN, "ip4 10.9.0.1>192.0.2.1 tcp 1>82 S", "ip4 10.9.0.1>192.0.2.1 icmp 8 0 len=8"];
    let sent: Vec<Vec<u8>> = lines.iter().map(|line| frame(line)).collect();
    assert_eq!(harness.exchange(&sent, 5).len(), 5);
    let counters = harness.forwarder().counters();
    assert_eq!(counters.outcomes.iter().sum::<u64>(), lines.len() as u64);
    assert_eq!(counters.outcome(Outcome::New), 1);
    assert_eq!(counters.outcome(Outcome::Hit), 3);
    assert_eq!(counters.outcome(Outcome::Echo), 1);
    assert_eq!((counters.outcome(Outcome::Dropped), counters.dropped(Drop::NoService)), (1, 1));
    assert_eq!((counters.flows, counters.half_open), (1, 0));
}
