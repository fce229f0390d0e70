//! The cache of other members' flows: a table of its own, with a bound of its own.

use std::collections::HashSet;
use std::ops::Range;

use phalanx_flow::decide::Outcome;
use phalanx_flow::{FlowState, Record};
use phalanx_forwarder::conformance::world::World;
use phalanx_forwarder::engine::TableLimits;
use phalanx_forwarder::{Forwarder as _, Upserted};

use super::{XDP_TX, ack, half_open, key, start};

/// Not the size that the object's source names, so that what is measured is what was asked for.
const CACHED: u32 = 2_048;

fn established(number: u32) -> Record {
    Record { state: FlowState::Established, ..half_open(number) }
}

fn records(numbers: Range<u32>) -> Vec<Record> {
    numbers.map(established).collect()
}

#[test]
fn a_cache_that_overflows_forgets_its_oldest_entries_and_no_flow() {
    // The table of flows is full, too: whatever the cache took of it would be missed.
    const FLOWS: u32 = 1_024;
    const OVERFLOW: u32 = 4 * CACHED;
    let site = start(TableLimits { flows: FLOWS as usize, half_open: 1024, cached: CACHED as usize });
    site.forwarder.set_next_hops(World::default().next_hops(site.interface));
    let flows = 0..FLOWS;
    let cached = FLOWS..FLOWS + OVERFLOW;
    assert_eq!(site.forwarder.upsert(&records(flows.clone())), vec![Upserted::Applied; FLOWS as usize]);
    let late = established(cached.end);
    assert_eq!(site.forwarder.upsert(&[late]), [Upserted::Full], "no room is left");

    site.forwarder.upsert_cache(&records(cached.clone()));
    let counters = site.forwarder.counters();
    assert_eq!(counters.flows, u64::from(FLOWS));
    // The kernel forgets some at a time, so the cache is never quite full (`kernel/bpf/bpf_lru_list.c`).
    let (least, most) = (u64::from(CACHED) * 3 / 4, u64::from(CACHED));
    assert!((least..=most).contains(&counters.cached), "{} entries", counters.cached);
    assert_eq!(site.known(flows.clone()).len(), FLOWS as usize);
    assert_eq!(site.known(cached.clone()), [0; 0], "what is cached is no flow of ours");

    // By packets: flows by the table, what came last by the cache, and what came first not at all.
    let run = |number: u32| {
        let before = site.forwarder.counters();
        let frame = ack(number);
        let process = || site.forwarder.test_run(site.interface, &frame).expect("run").0;
        let returned = site.netns.enter(process).expect("enter");
        let after = site.forwarder.counters();
        let which = [Outcome::Hit, Outcome::CacheHit]
            .into_iter()
            .find(|outcome| after.outcome(*outcome) > before.outcome(*outcome));
        (returned, which)
    };
    assert_eq!(run(0), (XDP_TX, Some(Outcome::Hit)));
    assert_eq!(run(FLOWS - 1), (XDP_TX, Some(Outcome::Hit)));
    assert_eq!(run(cached.end - 1), (XDP_TX, Some(Outcome::CacheHit)));
    assert_ne!(run(cached.start).1, Some(Outcome::CacheHit), "the oldest");

    // Nearly all that is left is of the last that came.
    let left: HashSet<_> = site.forwarder.flush_cache().into_iter().map(|record| record.key).collect();
    let last = (cached.end - CACHED..cached.end).filter(|number| left.contains(&key(*number))).count();
    assert!(last as u64 >= least, "{last} of {} entries are of the last {CACHED}", left.len());
    assert_eq!((site.forwarder.counters().cached, site.known(flows).len()), (0, FLOWS as usize));
}
