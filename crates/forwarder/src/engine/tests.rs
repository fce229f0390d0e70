//! What the suite for every forwarder cannot see from outside: eviction, expiry and races.

use phalanx_flow::FlowState;
use phalanx_flow::packet::{Link, parse};

use super::*;
use crate::conformance::frames::frame;
use crate::conformance::world::{World, backends, key};

const FLOW: &str = "tcp 10.9.0.1 40000 192.0.2.1 80";
const ACK: &str = "ip4 10.9.0.1>192.0.2.1 tcp 40000>80 A len=4";

fn engine(limits: TableLimits) -> Engine {
    let engine = Engine::new(World::default().plan(), limits).expect("a plan");
    engine.renew_lease(Duration::from_secs(60));
    engine
}

fn record(line: &str, state: FlowState, idle_ms: u32) -> Record {
    Record {
        key: key(line),
        backend: backends()[1],
        birth: 100,
        update: 0,
        state,
        flags: FlowFlags(0),
        idle_ms,
    }
}

fn rule(engine: &Engine, line: &str) -> Decision {
    let packet = parse(&frame(line)[..], Link::Ethernet).expect("a packet");
    engine.batch().rule(&packet, &Arrival::WIRE)
}

fn events(engine: &Engine) -> Vec<FlowEvent> {
    let mut events = Vec::new();
    while engine.poll_events(&mut events, 64) {}
    events
}

#[test]
fn a_flood_of_syns_pushes_out_older_half_open_flows_and_no_others() {
    let engine = engine(TableLimits { flows: 4096, half_open: 64, cached: 64 });
    let established = record(FLOW, FlowState::Established, 0);
    assert_eq!(engine.upsert(&[established]), [Upserted::Applied]);
    for port in 1..=2000 {
        let decision = rule(&engine, &format!("ip4 10.9.0.2>192.0.2.1 tcp {port}>80 S"));
        assert_eq!(decision.outcome, Outcome::New);
        let newest = engine.get(&key(&format!("tcp 10.9.0.2 {port} 192.0.2.1 80")));
        assert!(newest.is_some(), "the newest stays: {port}");
    }
    let counters = engine.read_counters();
    assert_eq!((counters.flows, counters.half_open), (1, 64));
    assert_eq!(counters.half_open_evicted, 2000 - 64);
    assert_eq!(counters.table_full, 0);
    assert!(engine.get(&established.key).is_some());
}

#[test]
fn with_room_for_them_half_open_flows_stay() {
    let engine = engine(TableLimits { flows: 64, half_open: 1 << 16, cached: 64 });
    for port in 1..=500 {
        rule(&engine, &format!("ip4 10.9.0.2>192.0.2.1 tcp {port}>80 S"));
    }
    let counters = engine.read_counters();
    assert_eq!((counters.half_open, counters.half_open_evicted), (500, 0));
}

#[test]
fn a_half_open_flow_that_finds_the_table_full_stays_half_open() {
    let engine = engine(TableLimits { flows: 1, half_open: 4096, cached: 64 });
    let lines = (1..=2000).map(|port| format!("tcp 10.9.0.2 {port} 192.0.2.1 80"));
    engine.upsert(&lines.map(|line| record(&line, FlowState::Established, 0)).collect::<Vec<_>>());
    let before = engine.read_counters();
    rule(&engine, "ip4 10.9.0.1>192.0.2.1 tcp 40000>80 S");
    assert_eq!(events(&engine).iter().map(|event| event.kind).collect::<Vec<_>>(), [FlowEventKind::New]);
    assert_eq!(rule(&engine, ACK).outcome, Outcome::Hit);
    let after = engine.read_counters();
    assert_eq!((after.flows, after.half_open), (before.flows, 1));
    assert_eq!(after.table_full, before.table_full + 1);
    assert_eq!(engine.get(&key(FLOW)).map(|record| record.state), Some(FlowState::HalfOpen));
}

#[test]
fn a_flow_that_stays_half_open_lives_by_its_packets_and_tells_nothing() {
    let engine = engine(TableLimits { flows: 1, half_open: 4096, cached: 64 });
    let lines = (1..=2000).map(|port| format!("tcp 10.9.0.2 {port} 192.0.2.1 80"));
    engine.upsert(&lines.map(|line| record(&line, FlowState::Established, 0)).collect::<Vec<_>>());
    // As old as the half-open flows that are about to expire.
    engine.upsert(&[record(FLOW, FlowState::HalfOpen, 4_000)]);
    for _ in 0..3 {
        assert_eq!(rule(&engine, ACK).outcome, Outcome::Hit);
        assert_eq!(events(&engine), [], "nothing changed");
    }
    let kept = engine.get(&key(FLOW)).expect("the flow");
    assert_eq!((kept.state, kept.update), (FlowState::HalfOpen, 0));
    assert!(kept.idle_ms < 4_000, "{} ms", kept.idle_ms);
    // Its end is no news either: nobody was told of its beginning.
    rule(&engine, "ip4 10.9.0.1>192.0.2.1 tcp 40000>80 R");
    assert_eq!(events(&engine), []);
    // The twin: with room again the next packet establishes it, and that is told, once.
    for port in 1..=2000 {
        engine.remove(&key(&format!("tcp 10.9.0.2 {port} 192.0.2.1 80")), 0, Duration::ZERO);
    }
    rule(&engine, ACK);
    rule(&engine, ACK);
    assert_eq!(events(&engine).iter().map(|event| event.kind).collect::<Vec<_>>(), [FlowEventKind::Changed]);
    assert_eq!(engine.get(&key(FLOW)).map(|record| record.state), Some(FlowState::Established));
}

#[test]
fn flows_expire_by_their_state() {
    // The world's service: idle 60 s, linger 10 s (and a quarter, and a second: reports are late), reset linger 1 s, half-open 5 s.
    let cases = [
        (FlowState::HalfOpen, 4_000, 5_500),
        (FlowState::Established, 59_000, 60_500),
        (FlowState::Closing, 13_000, 14_000),
        (FlowState::Reset, 500, 1_500),
    ];
    for (state, young, old) in cases {
        let engine = engine(TableLimits::default());
        engine.upsert(&[record("tcp 10.9.0.2 1 192.0.2.1 80", state, young), record(FLOW, state, old)]);
        let expired = events(&engine);
        assert_eq!(expired.len(), 1, "{state:?}: {expired:?}");
        assert_eq!((expired[0].kind, expired[0].record.key), (FlowEventKind::Expired, key(FLOW)));
        // Only the daemon's word removes it, and it is not asked again at once.
        assert!(engine.get(&key(FLOW)).is_some());
        assert_eq!(events(&engine), []);
        assert!(engine.remove(&key(FLOW), 100, Duration::from_millis(u64::from(old))));
        assert_eq!(engine.get(&key(FLOW)), None);
    }
}

#[test]
fn an_entry_is_as_old_as_its_last_sighting() {
    let engine = engine(TableLimits::default());
    engine.upsert(&[record(FLOW, FlowState::Established, 30_000)]);
    engine.touch(&[(key(FLOW), 40_000)]);
    let idle_ms = |engine: &Engine| engine.get(&key(FLOW)).expect("the flow").idle_ms;
    assert!((30_000..35_000).contains(&idle_ms(&engine)));
    engine.touch(&[(key(FLOW), 10_000)]);
    assert!((10_000..15_000).contains(&idle_ms(&engine)));
    // Who is seen again in the meantime is not removed.
    assert!(!engine.remove(&key(FLOW), 100, Duration::from_secs(20)));
    assert!(engine.get(&key(FLOW)).is_some());
}

#[test]
fn a_change_takes_the_protection_of_the_version_before() {
    let engine = engine(TableLimits::default());
    rule(&engine, "ip4 10.9.0.1>192.0.2.1 tcp 40000>80 S");
    assert!(engine.stamp(&key(FLOW), 7));
    assert!(!engine.stamp(&key(FLOW), 8), "a birth is given once");
    let protected = |engine: &Engine| {
        let record = engine.get(&key(FLOW)).expect("the flow");
        record.flags.has(FlowFlags::PROTECTED)
    };
    engine.protect(&key(FLOW), 7, 0);
    assert!(protected(&engine));
    rule(&engine, ACK);
    assert!(!protected(&engine), "the backup has not seen it established");
    engine.protect(&key(FLOW), 7, 0);
    assert!(!protected(&engine), "a late word on the version before");
    engine.protect(&key(FLOW), 7, 1);
    assert!(protected(&engine));
    rule(&engine, ACK);
    assert!(protected(&engine), "nothing changed");
}

/// The packet path reads an entry and writes it back; what the daemon writes in between must not be lost.
#[test]
fn packets_do_not_overwrite_a_newer_record() {
    let engine = engine(TableLimits::default());
    engine.upsert(&[record(FLOW, FlowState::Established, 0)]);
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                assert_eq!(rule(&engine, ACK).outcome, Outcome::Hit);
            }
        });
        let lost = (1..=20_000).find(|update| {
            let newer = Record { update: *update, ..record(FLOW, FlowState::Established, 0) };
            engine.upsert(&[newer]) != [Upserted::Applied]
                || engine.get(&newer.key).is_none_or(|record| record.update != *update)
        });
        done.store(true, Ordering::Relaxed);
        assert_eq!(lost, None, "the first record that was lost");
    });
}

#[test]
fn records_of_many_shares_are_answered_in_their_order_and_those_of_one_flow_taken_in_it() {
    let engine = engine(TableLimits::default());
    let flow = |port: u16| record(&format!("tcp 10.9.0.3 {port} 192.0.2.1 80"), FlowState::Established, 0);
    let mut records: Vec<Record> = (1..=500).map(flow).collect();
    records[7].backend.address[15] ^= 1;
    // The same flow again: later, and then as it was.
    records.push(Record { update: 1, ..flow(100) });
    records.push(flow(100));
    let results = engine.upsert(&records);
    let expected = |place: usize| match place {
        7 => Upserted::UnknownBackend,
        501 => Upserted::Stale,
        _ => Upserted::Applied,
    };
    assert_eq!(results, (0..502).map(expected).collect::<Vec<_>>());
    assert_eq!(engine.read_counters().flows, 499);
    assert_eq!(engine.get(&flow(100).key).map(|record| record.update), Some(1));
}

#[test]
fn no_entry_lives_shorter_than_the_shortest_life_of_its_state() {
    let mut plan = World::default().plan();
    let shortest = shortest_lives(&plan.services);
    for (number, shortest) in (0..).zip(shortest) {
        let state = FlowState::from_u8(number).expect("a state");
        let entry = FlowEntry { state: state as u8, ..Decision::PASS.entry };
        let compiled = CompiledPlan::new(plan.clone()).expect("a plan");
        for line in [FLOW, "tcp 10.9.0.1 40000 203.0.113.77 80"] {
            assert!(life(&compiled, &key(line), &entry).as_millis() as u64 >= shortest, "{line} {state:?}");
        }
    }
    plan.services[0].idle = Duration::from_millis(7);
    assert_eq!(shortest_lives(&plan.services)[FlowState::Established as usize], 7);
}
