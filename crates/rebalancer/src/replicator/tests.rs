use std::collections::BTreeSet;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use phalanx_flow::{FlowEventKind, FlowFlags, FlowState, MemberId};
use proptest::prelude::*;

use super::idle::{BACKUP_WAIT, OWNER_WAIT};
use super::*;
use crate::codec::CodecError;
use crate::testing::{TestRanking, backend, key, record};

mod backups;
mod world;
use world::World;

const SECOND: Duration = Duration::from_secs(1);

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn every_established_flow_ends_up_at_owner_and_backup_over_a_network_that_loses_connections(
        seed: u64,
        backups in 1usize..=2,
    ) {
        let mut world = World::with_backups(&[1, 2, 3, 4], backups);
        world.seed(seed);
        world.loss = 12;
        for n in 0..100 {
            world.open(n, (n % 7) as u8);
            if n % 10 == 0 {
                world.settle();
            }
        }
        world.settle();
        for n in 0..100 {
            let holders = world.sorted_holders(n);
            prop_assert_eq!(holders.len(), backups + 1);
            for &holder in &holders {
                let record = world.record(holder, n);
                prop_assert_eq!(record.map(|record| record.backend), Some(backend((n % 7) as u8)));
                prop_assert_eq!(record.map(|record| record.version()), world.record(holders[0], n).map(|record| record.version()));
            }
            prop_assert_eq!(world.has(n), holders);
            let [owner, _] = world.holders(n);
            prop_assert!(world.record(owner, n).unwrap().flags.has(FlowFlags::PROTECTED));
        }
        prop_assert_eq!(world.unprotected(), 0);
    }

    #[test]
    fn several_changes_at_once_and_in_a_row_lose_nothing(seed: u64, backups in 1usize..=2) {
        let mut world = World::with_backups(&[1, 2, 3, 4], backups);
        world.seed(seed);
        world.loss = 15;
        for n in 0..80 {
            world.open(n, 1);
        }
        world.settle();
        let mut members = vec![(1, 1), (2, 1), (3, 1), (4, 1)];
        let mut next = 5;
        for _ in 0..4 {
            // Joins, leaves and weights, one after another before the transfers of the last are done.
            for _ in 0..=world.random(2) {
                match world.random(3) {
                    0 => {
                        world.start(next);
                        members.push((next, 1));
                        next += 1;
                    }
                    1 if members.iter().filter(|(_, weight)| *weight > 0).count() > 2 => {
                        let which = world.random(members.len() as u64) as usize;
                        members[which].1 = 0;
                    }
                    _ => {
                        let which = world.random(members.len() as u64) as usize;
                        members[which].1 = 1 + world.random(4) as u32;
                    }
                }
            }
            if world.random(3) == 0 && members.iter().filter(|(_, weight)| *weight > 0).count() > 2 {
                // A crash, once everything has two holders again.
                world.switch(&members);
                world.settle();
                let which = world.random(members.len() as u64) as usize;
                let (id, _) = members.remove(which);
                world.kill(id);
            }
            world.switch(&members);
        }
        world.settle();
        world.close_window();
        world.settle();
        for n in 0..80 {
            prop_assert_eq!(world.has(n), world.sorted_holders(n));
        }
        prop_assert_eq!(world.unprotected(), 0);
        prop_assert!(world.nodes.values().all(|node| node.replicator.transfers().count() == 0));
    }
}

#[test]
fn without_replication_the_backup_has_nothing_and_all_count_as_unprotected() {
    let outcome = |enabled| {
        let mut world = World::with(&[1, 2, 3], |world| world.enabled = enabled);
        for n in 0..30 {
            world.open(n, 1);
        }
        world.settle();
        let at_backups = (0..30).filter(|&n| world.record(world.holders(n)[1], n).is_some()).count();
        (at_backups, world.unprotected(), world.frames == 0)
    };
    assert_eq!(outcome(true), (30, 0, false));
    assert_eq!(outcome(false), (0, 30, true));
}

#[test]
fn without_replication_transfer_tables_are_not_sent_either() {
    let outcome = |enabled| {
        let mut world = World::with(&[1, 2], |world| world.enabled = enabled);
        for n in 0..60 {
            world.open(n, 1);
        }
        world.settle();
        world.start(3);
        world.switch(&[(1, 1), (2, 1), (3, 1)]);
        world.settle();
        assert_eq!(world.node(1).events.last(), Some(&Event::AllDone));
        world.node(3).table.flows.len()
    };
    let moved = (0..60).filter(|&n| World::new(&[1, 2, 3]).holders(n).contains(&3)).count();
    assert_eq!((outcome(true), outcome(false)), (moved, 0));
}

#[test]
fn half_open_flows_make_no_traffic_unless_they_deviate_or_the_policy_says_so() {
    let frames = |policy, at_once| {
        let mut world = World::with(&[1, 2], |world| world.policy = policy);
        for n in 0..20 {
            let [owner, _] = world.holders(n);
            world.syn(owner, n, 1, at_once);
        }
        world.settle();
        (world.frames > 0, world.unprotected())
    };
    assert_eq!(frames(Policy::Established, false), (false, 0));
    assert_eq!(frames(Policy::Established, true), (true, 0));
    assert_eq!(frames(Policy::Syn, false), (true, 0));
}

#[test]
fn a_syn_flood_that_is_reset_and_pushed_out_makes_no_traffic() {
    let frames = |established| {
        let mut world = World::new(&[1, 2]);
        for n in 0..20 {
            let [owner, _] = world.holders(n);
            world.syn(owner, n, 1, false);
            if established {
                world.change(owner, n, FlowState::Established);
            }
            if n % 2 == 0 {
                world.change(owner, n, FlowState::Reset);
            }
            world.settle();
            world.expired(owner, n);
        }
        world.settle();
        world.frames
    };
    assert_eq!(frames(false), 0);
    assert!(frames(true) > 0);
}

#[test]
fn every_flow_gets_a_birth_and_events_made_before_the_stamp_get_the_same() {
    let mut world = World::new(&[1, 2]);
    let n = world.flow_of(1, 2);
    // `open` sends New and Changed before the forwarder has applied the stamp.
    world.open(n, 1);
    world.settle();
    let birth = world.record(1, n).unwrap().birth;
    assert_ne!(birth, 0);
    assert_eq!(world.record(2, n).unwrap().birth, birth);
    let births: BTreeSet<_> = (0..50)
        .map(|n| {
            let [owner, _] = world.holders(n);
            world.syn(owner, n, 1, false);
            world.settle();
            world.record(owner, n).unwrap().birth
        })
        .collect();
    assert_eq!(births.len(), 50);
}

#[test]
fn an_end_reaches_backup_and_caches_and_what_is_older_does_not_come_back() {
    let mut world = World::with(&[1, 2, 3], |world| world.caches = [MemberId(3)].into());
    let n = world.flow_of(1, 2);
    world.open(n, 1);
    world.settle();
    let old = Record { idle_ms: 60_000, ..world.record(1, n).unwrap() };
    assert!(world.node(3).table.cache.contains_key(&key(n)));
    world.change(1, n, FlowState::Closing);
    world.settle();
    assert_eq!(world.record(2, n).unwrap().state, FlowState::Closing);
    world.advance(SECOND * 60);
    world.expired(1, n);
    world.settle();
    assert_eq!(world.has(n), [0; 0]);
    assert!(!world.node(3).table.cache.contains_key(&key(n)));

    // Somebody who was away, and has not heard of the end, tells of it once more.
    world.kill(3);
    world.start(3);
    let live = world.live();
    let view = world.view(None, &live);
    world.set_view(3, view);
    for to in [1, 2] {
        let now = world.now;
        world.node(3).replicator.begin_transfer(
            now,
            TransferPlan { holders: [(MemberId(to), vec![old])].into(), ..TransferPlan::default() },
        );
    }
    world.settle();
    assert_eq!(world.has(n), [0; 0]);
    assert!(world.node(1).replicator.counters().barred > 0 && world.node(2).replicator.counters().barred > 0);

    // The twin: the tuple's next connection is taken.
    world.open(n, 2);
    world.settle();
    assert_eq!(world.has(n), [1, 2]);
}

#[test]
fn an_end_does_not_take_what_has_seen_a_packet_since() {
    for seen_since in [false, true] {
        let mut world = World::new(&[1, 2]);
        let n = world.flow_of(1, 2);
        world.open(n, 1);
        world.settle();
        // The owner is cut off, and ends by itself what the other goes on to forward.
        world.disconnect(1, 2);
        world.switch(&[(1, 1)]);
        world.advance(SECOND * 60);
        if seen_since {
            let now = world.now;
            world.node(2).table.flows.get_mut(&key(n)).unwrap().1 = now;
        }
        world.advance(SECOND);
        world.expired(1, n);
        world.settle();
        assert_eq!(world.has(n), [2]);
        let end = Item::End {
            key: key(n),
            birth: world.record(2, n).unwrap().birth,
            idle_ms: 61_000,
            cache: false,
        };
        world.connect(1, 2);
        world.switch(&[(1, 1), (2, 1)]);
        world.node(1).replicator.push(MemberId(2), end);
        world.settle();
        assert_eq!(world.has(n), if seen_since { vec![2] } else { vec![] });
        if seen_since {
            // It is taken again by who has ended it.
            let now = world.now;
            let record = world.record(2, n).unwrap();
            let offer =
                TransferPlan { holders: [(MemberId(1), vec![record])].into(), ..TransferPlan::default() };
            world.node(2).replicator.begin_transfer(now, offer);
            world.settle();
            assert_eq!(world.has(n), [1, 2]);
        }
    }
}

#[test]
fn a_state_that_changed_on_a_cache_hit_of_a_holder_is_held_and_told() {
    let mut world = World::new(&[1, 2]);
    let n = world.flow_of(1, 2);
    let mut cached = record(n, 1);
    (cached.birth, cached.update, cached.state) = (7, 3, FlowState::Established);
    world.event(1, FlowEventKind::Cached, false, cached);
    world.settle();
    assert_eq!(world.has(n), [1, 2]);
    assert_eq!(world.unprotected(), 0);
}

#[test]
fn an_end_and_the_next_life_of_the_tuple_arrive_in_order_after_a_long_absence() {
    let mut world = World::new(&[1, 2]);
    let n = world.flow_of(1, 2);
    world.open(n, 1);
    world.settle();
    world.disconnect(1, 2);
    world.change(1, n, FlowState::Reset);
    world.settle();
    world.expired(1, n);
    world.settle();
    assert_eq!(world.has(n), [2]);
    world.open(n, 2);
    world.settle();
    assert_eq!(world.node(1).replicator.backlog(MemberId(2)), (1, 0));
    world.connect(1, 2);
    world.settle();
    assert_eq!(world.record(2, n).unwrap().backend, backend(2));
    assert_eq!(world.unprotected(), 0);
}

#[test]
fn stale_never_overwrites_and_recovered_never_overwrites_what_a_syn_made() {
    let mut world = World::new(&[1, 2, 3]);
    let n = world.flow_of(1, 2);
    world.open(n, 1);
    world.settle();
    let made_by_syn = world.record(1, n).unwrap();

    // A hint from who does not hold it, with another backend.
    let mut hint = record(n, 9);
    hint.birth = 0;
    world.event(3, FlowEventKind::Hint, false, hint);
    world.settle();
    for id in [1, 2] {
        assert_eq!(world.record(id, n).unwrap().version(), made_by_syn.version());
        assert_eq!(world.record(id, n).unwrap().backend, backend(1));
    }

    // An older version of the same flow, by transfer.
    world.change(1, n, FlowState::Closing);
    world.settle();
    let now = world.now;
    world.node(3).replicator.begin_transfer(
        now,
        TransferPlan { holders: [(MemberId(2), vec![made_by_syn])].into(), ..TransferPlan::default() },
    );
    world.settle();
    assert_eq!(world.record(2, n).unwrap().state, FlowState::Closing);

    // The twins: where nobody knows the flow the hint is recorded, and a SYN's record then replaces it.
    let m = (n + 1..).find(|&m| world.holders(m) == [1, 2]).unwrap();
    hint.key = key(m);
    world.event(3, FlowEventKind::Hint, false, hint);
    world.settle();
    assert_eq!(world.has(m), [1, 2]);
    assert!(world.record(2, m).unwrap().flags.has(FlowFlags::RECOVERED));
    assert_eq!(world.unprotected(), 0);
    world.open(m, 4);
    world.settle();
    assert_eq!(world.record(2, m).unwrap().backend, backend(4));
}

#[test]
fn a_hint_goes_past_a_suspect_to_the_acting_owner() {
    let mut world = World::new(&[1, 2, 3]);
    let n = world.flow_of(1, 2);
    let live = world.live();
    let mut view = world.view(None, &live);
    view.suspects.insert(MemberId(1));
    world.set_view(3, view);
    world.disconnect(1, 2);
    world.disconnect(1, 3);
    let mut hint = record(n, 1);
    hint.birth = 0;
    world.event(3, FlowEventKind::Hint, false, hint);
    world.settle();
    assert_eq!(world.has(n), [2]);
    // The bypassed owner learns of it when it is back.
    world.connect(1, 2);
    world.settle();
    assert_eq!(world.has(n), [1, 2]);
}

#[test]
fn a_flow_that_enters_through_its_backup_outlives_the_idle_timeout() {
    let outcome = |packet_at_backup: bool| {
        let mut world = World::new(&[1, 2]);
        let n = world.flow_of(1, 2);
        world.open(n, 1);
        world.advance(SECOND * 100);
        if packet_at_backup {
            world.packet(2, n);
        }
        world.advance(SECOND * 100);
        world.expired(1, n);
        world.settle();
        (world.has(n), world.record(1, n).map(|record| record.idle_ms / 1000))
    };
    assert_eq!(outcome(true), (vec![1, 2], Some(100)));
    assert_eq!(outcome(false), (vec![], None));
}

#[test]
fn touches_reach_the_owner_with_their_age() {
    let mut world = World::new(&[1, 2]);
    let n = world.flow_of(1, 2);
    world.open(n, 1);
    world.advance(SECOND * 100);
    world.disconnect(1, 2);
    world.packet(2, n);
    let seen = world.record(2, n).unwrap();
    world.event(2, FlowEventKind::Touched, false, seen);
    world.advance(SECOND * 7);
    assert_eq!(world.record(1, n).unwrap().idle_ms, 107_000);
    world.connect(1, 2);
    world.settle();
    assert_eq!(world.record(1, n).unwrap().idle_ms, 7_000);
}

/// The backup must know what the owner sees: once it owns the flow itself, it could not tell it from one that nobody has used for long.
#[test]
fn touches_of_what_has_ended_reach_the_backup_too_and_those_of_what_lives_do_not() {
    for state in [FlowState::Closing, FlowState::Established] {
        let mut world = World::new(&[1, 2, 3]);
        let n = world.flow_of(1, 2);
        world.open(n, 1);
        world.settle();
        world.change(1, n, state);
        world.settle();
        world.advance(SECOND * 10);
        world.packet(1, n);
        let seen = world.record(1, n).unwrap();
        assert_eq!(seen.state, state);
        world.event(1, FlowEventKind::Touched, false, seen);
        world.settle();
        let expected = if state == FlowState::Closing { 0 } else { 10_000 };
        assert_eq!(world.record(2, n).unwrap().idle_ms, expected, "{state:?} at the backup");
        // Whoever else forwards it tells both.
        world.advance(SECOND * 10);
        world.event(3, FlowEventKind::Touched, false, seen);
        world.settle();
        let idle = [1, 2].map(|id| world.record(id, n).unwrap().idle_ms);
        assert_eq!(idle, [0, if state == FlowState::Closing { 0 } else { expected + 10_000 }], "{state:?}");
    }
}

/// Whoever forwards by its cache, cut off from the owner, is the only one to see the flow: without a word of it both holders forget it.
#[test]
fn touches_reach_the_backup_while_the_owner_is_suspected() {
    for suspected in [true, false] {
        let mut world = World::new(&[1, 2, 3]);
        let n = world.flow_of(1, 2);
        world.open(n, 1);
        world.settle();
        let seen = world.record(1, n).unwrap();
        world.disconnect(1, 3);
        if suspected {
            let live = world.live();
            let mut view = world.view(None, &live);
            view.suspects.insert(MemberId(1));
            world.set_view(3, view);
        }
        world.advance(SECOND * 10);
        world.event(3, FlowEventKind::Touched, false, seen);
        world.settle();
        assert_eq!(world.record(2, n).unwrap().idle_ms, if suspected { 0 } else { 10_000 });
    }
}

#[test]
fn a_packet_that_comes_while_the_backup_is_asked_keeps_the_flow() {
    let mut world = World::new(&[1, 2]);
    let n = world.flow_of(1, 2);
    world.open(n, 1);
    world.advance(SECOND * 100);
    world.expired(1, n);
    world.packet(1, n);
    world.settle();
    assert_eq!(world.has(n), [1, 2]);
}

#[test]
fn an_owner_whose_backup_does_not_answer_lets_go_in_bounded_time_and_ends_nothing_elsewhere() {
    let mut world = World::new(&[1, 2]);
    let n = world.flow_of(1, 2);
    world.open(n, 1);
    world.advance(SECOND * 100);
    world.disconnect(1, 2);
    world.expired(1, n);
    world.advance(BACKUP_WAIT - SECOND);
    assert_eq!(world.has(n), [1, 2]);
    world.advance(SECOND * 2);
    assert_eq!(world.has(n), [2]);
    world.connect(1, 2);
    world.settle();
    assert_eq!(world.has(n), [2], "no end was announced");
    // The backup's entry is not immortal: its owner says that it has none.
    world.expired(2, n);
    world.settle();
    assert_eq!(world.has(n), [0; 0]);
}

#[test]
fn a_backup_keeps_what_its_owner_has_and_drops_what_nobody_answers_for() {
    let mut world = World::new(&[1, 2]);
    let n = world.flow_of(1, 2);
    world.open(n, 1);
    world.advance(SECOND * 100);
    world.packet(1, n);
    world.advance(SECOND);
    world.expired(2, n);
    world.settle();
    assert_eq!(world.record(2, n).unwrap().idle_ms, 1_000, "refreshed by the owner's");

    world.advance(SECOND * 100);
    world.disconnect(1, 2);
    world.expired(2, n);
    world.advance(OWNER_WAIT - SECOND);
    assert_eq!(world.has(n), [1, 2]);
    world.advance(SECOND * 2);
    assert_eq!(world.has(n), [1]);
}

#[test]
fn a_full_peer_says_so_and_the_flow_stays_unprotected() {
    let outcome = |capacity| {
        let mut world = World::ranked_by(&[1, 2], TestRanking::by_hand(&[[1, 2]]), |_| {});
        world.node(2).table.capacity = Some(capacity);
        for n in 0..10 {
            world.open(n, 1);
        }
        world.settle();
        let refused: usize = world
            .node(1)
            .events
            .iter()
            .map(|event| if let Event::PeerFull { refused, .. } = event { *refused } else { 0 })
            .sum();
        (refused, world.unprotected())
    };
    assert_eq!(outcome(7), (3, 3));
    assert_eq!(outcome(10), (0, 0));
}

#[test]
fn a_record_whose_backend_the_peer_cannot_reach_stays_unprotected() {
    let mut world = World::ranked_by(&[1, 2], TestRanking::by_hand(&[[1, 2]]), |_| {});
    world.node(2).table.unknown_backend = Some(backend(5));
    world.open(1, 5);
    world.open(2, 6);
    world.settle();
    assert_eq!((world.unprotected(), world.has(1), world.has(2)), (1, vec![1], vec![1, 2]));
}

#[test]
fn acknowledged_means_applied() {
    let mut world = World::new(&[1, 2]);
    let n = world.flow_of(1, 2);
    world.node(2).table.stuck = true;
    world.open(n, 1);
    world.settle();
    assert_eq!(world.unprotected(), 1);
    world.node(2).table.stuck = false;
    world.settle();
    assert_eq!(world.unprotected(), 0);
}

#[test]
fn what_came_by_an_earlier_connection_is_not_acknowledged_on_a_later_one() {
    let mut world = World::new(&[1, 2]);
    let n = world.flow_of(1, 2);
    world.node(2).table.stuck = true;
    world.open(n, 1);
    world.settle();
    world.disconnect(1, 2);
    // Member 1 starts again, and the first batch of its new life has the number of the one that 2 has not applied yet.
    world.nodes.remove(&1);
    world.start(1);
    let live = world.live();
    let view = world.view(None, &live);
    world.set_view(1, view);
    world.node(2).table.capacity = Some(1);
    let m = (n + 1..).find(|&m| world.holders(m) == [1, 2]).unwrap();
    world.open(m, 1);
    world.node(2).table.stuck = false;
    world.settle();
    // The old flow took the only place, so the new one is refused, and nothing may say otherwise.
    assert_eq!((world.has(n), world.has(m)), (vec![2], vec![1]));
    assert_eq!(world.unprotected(), 1);
}

#[test]
fn many_changes_of_one_flow_take_one_slot_while_the_peer_is_away() {
    let mut world = World::new(&[1, 2]);
    let n = world.flow_of(1, 2);
    world.disconnect(1, 2);
    world.open(n, 1);
    for _ in 0..1000 {
        world.change(1, n, FlowState::Closing);
        world.change(1, n, FlowState::Established);
    }
    world.settle();
    assert_eq!(world.node(1).replicator.backlog(MemberId(2)), (1, 0));
    world.connect(1, 2);
    world.settle();
    assert_eq!(world.record(2, n).unwrap().update, 2001);
    assert_eq!(world.node(1).replicator.counters().items_sent, 1);
    assert_eq!(world.unprotected(), 0);
}

#[test]
fn a_backlog_is_bounded_and_says_when_it_overflows() {
    let mut world = World::ranked_by(&[1, 2], TestRanking::by_hand(&[[1, 2]]), |_| {});
    world.disconnect(1, 2);
    for n in 0..MAX_BACKLOG as u32 + 10 {
        let mut record = record(n as u16, 1);
        record.key.source[15] = (n >> 16) as u8;
        world.event(1, FlowEventKind::Changed, false, record);
        if n + 10 == MAX_BACKLOG as u32 {
            world.settle();
            assert_eq!(world.node(1).events, []);
        }
    }
    world.settle();
    assert_eq!(world.node(1).replicator.backlog(MemberId(2)), (MAX_BACKLOG, 0));
    assert_eq!(world.node(1).replicator.counters().overflowed, 10);
    assert_eq!(world.node(1).events, [Event::Overflow { peer: MemberId(2) }]);
}

#[test]
fn a_fin_seen_on_a_cache_hit_reaches_owner_and_backup() {
    let mut world = World::with(&[1, 2, 3], |world| world.caches = [MemberId(3)].into());
    let n = world.flow_of(1, 2);
    world.open(n, 1);
    world.settle();
    let mut cached = world.node(3).table.cache[&key(n)];
    world.event(3, FlowEventKind::Cached, false, cached);
    world.settle();
    assert_eq!(
        world.record(1, n).unwrap().state,
        FlowState::Established,
        "the twin: a packet is only a touch"
    );
    cached.state = FlowState::Closing;
    cached.update += 1;
    world.event(3, FlowEventKind::Cached, false, cached);
    world.settle();
    for id in [1, 2] {
        assert_eq!(world.record(id, n).unwrap().state, FlowState::Closing);
    }
}

#[test]
fn associations_go_to_the_holders_of_both_tables_while_the_window_is_open() {
    let mut world = World::new(&[1, 2, 3]);
    let old = Arc::new(TestRanking::by_hand(&[[3, 2]]));
    world.ranking = Arc::new(TestRanking::by_hand(&[[1, 2]]));
    let live = world.live();
    for id in 1..=3 {
        let view = world.view(Some(old.clone()), &live);
        world.set_view(id, view);
    }
    world.open(1, 1);
    world.settle();
    assert_eq!(world.has(1), [1, 2, 3]);
    world.close_window();
    world.open(2, 1);
    world.settle();
    assert_eq!(world.has(2), [1, 2], "the twin: not after it has closed");
}

/// Whether every one of these flows is at both its holders, with one version.
fn all_held(world: &World, flows: std::ops::Range<u16>) -> bool {
    flows.clone().all(|n| {
        let [owner, backup] = world.holders(n);
        let (owner, backup) = (world.record(owner, n), world.record(backup, n));
        owner.is_some() && owner.map(|record| record.version()) == backup.map(|record| record.version())
    })
}

#[test]
fn a_planned_change_is_ready_before_it_is_in_force_and_costs_nothing_then() {
    for told in [true, false] {
        let mut world = World::new(&[1, 2, 3]);
        for n in 0..60 {
            world.open(n, 1);
        }
        world.settle();
        world.start(4);
        let pending = world.plan(&[(1, 1), (2, 1), (3, 1), (4, 1)]);
        world.settle();
        if !told {
            // The twin: what happens after the snapshot is told to the present holders only.
            let live = world.live();
            for id in 1..=4 {
                let view = world.view(None, &live);
                world.set_view(id, view);
            }
        }
        for n in 60..120 {
            world.open(n, 1);
        }
        for n in 0..20 {
            let [owner, _] = world.holders(n);
            world.change(owner, n, FlowState::Closing);
        }
        world.settle();
        assert_eq!(world.unprotected(), 0, "the present backups are told first");
        let frames = world.frames;
        world.put_in_force(pending);
        world.settle();
        assert_eq!(world.frames, frames, "nothing is left to be sent");
        assert_eq!(all_held(&world, 0..120), told);
        assert_eq!(world.unprotected(), 0);
    }
}

/// One change follows another: what an owner inherits it may get only when it has sent ahead what it had.
#[test]
fn what_an_owner_is_sent_while_a_change_is_planned_goes_on_to_the_next_holders() {
    for owns in [true, false] {
        let mut world = World::new(&[1, 2, 3]);
        world.ranking = Arc::new(TestRanking::by_hand(&[if owns { [1, 2] } else { [3, 1] }]));
        let pending: Arc<dyn crate::Ranking> = Arc::new(TestRanking::by_hand(&[[4, 2]]));
        world.start(4);
        let live = world.live();
        for id in 1..=4 {
            let view = ViewInput { pending: Some(Arc::clone(&pending)), ..world.view(None, &live) };
            world.set_view(id, view);
        }
        let sent =
            TransferPlan { holders: [(MemberId(1), vec![record(1, 1)])].into(), ..TransferPlan::default() };
        world.disconnect(1, 3);
        let now = world.now;
        world.node(2).replicator.begin_transfer(now, sent);
        world.settle();
        assert!(world.has(1).contains(&1));
        assert_eq!(world.has(1).contains(&4), owns, "the twin: a backup leaves that to the owner");
    }
}

#[test]
fn a_guess_that_another_record_has_replaced_is_not_counted_for_ever() {
    let mut world = World::new(&[1, 2]);
    world.ranking = Arc::new(TestRanking::by_hand(&[[1, 0]]));
    let alone = [MemberId(1)].into();
    let view = world.view(None, &alone);
    world.set_view(1, view);
    let guess = Record { birth: 0, flags: FlowFlags(FlowFlags::RECOVERED), ..record(1, 1) };
    let now = world.now;
    world.node(1).table.flows.insert(guess.key, (guess, now));
    world.event(1, FlowEventKind::New, false, guess);
    world.settle();
    assert_eq!(world.node(1).replicator.unprotected(), 1, "there is no backup");
    // Somebody who was cut off has it from its SYN.
    let known = record(1, 1);
    let sent = TransferPlan { holders: [(MemberId(1), vec![known])].into(), ..TransferPlan::default() };
    let now = world.now;
    world.node(2).replicator.begin_transfer(now, sent);
    world.settle();
    assert_eq!(world.record(1, 1).map(|held| held.birth), Some(known.birth));
    world.advance(Duration::from_secs(900));
    world.expired(1, 1);
    world.settle();
    assert!(!world.has(1).contains(&1));
    assert_eq!(world.node(1).replicator.unprotected(), 0);
}

#[test]
fn what_waits_for_the_next_backup_is_unprotected_once_it_is_the_backup() {
    let mut world = World::new(&[1, 2]);
    world.start(3);
    let pending = world.plan(&[(1, 1), (3, 1)]);
    world.settle();
    world.disconnect(1, 3);
    world.disconnect(2, 3);
    for n in 0..40 {
        world.open(n, 1);
    }
    world.settle();
    assert_eq!(world.unprotected(), 0, "2 holds them all");
    let kept: Vec<u16> = (0..40).filter(|&n| world.holders(n) == [1, 2]).collect();
    world.put_in_force(pending);
    world.settle();
    let owned = kept.iter().filter(|&&n| world.holders(n) == [1, 3]).count();
    assert!(owned > 5);
    assert_eq!(world.node(1).replicator.unprotected(), owned);
    world.connect(1, 3);
    world.connect(2, 3);
    world.settle();
    assert_eq!(world.unprotected(), 0);
    assert!(all_held(&world, 0..40));
}

/// Member 2 cannot be told of what member 1 has recorded, and a change is planned that makes member 3 the backup: the world, the change, and
/// the flows.
fn cut_off_backup_with_another_planned() -> (World, std::sync::Arc<TestRanking>, Vec<u16>) {
    let mut world = World::new(&[1, 2]);
    world.start(3);
    world.disconnect(1, 2);
    let pending = world.plan(&[(1, 1), (3, 1)]);
    let owned: Vec<u16> = (0..60).filter(|&n| world.holders(n) == [1, 2]).collect();
    for &n in &owned {
        world.syn(1, n, 1, false);
        world.change(1, n, FlowState::Established);
    }
    world.settle();
    (world, pending, owned)
}

#[test]
fn a_backup_that_is_cut_off_is_replaced_by_one_that_has_acknowledged_already() {
    let (mut world, pending, owned) = cut_off_backup_with_another_planned();
    assert_eq!(world.unprotected(), owned.len());
    world.put_in_force(pending);
    world.settle();
    let kept = owned.iter().filter(|&&n| world.holders(n) == [1, 3]).count();
    assert!(kept > 0);
    assert_eq!(world.unprotected(), 0, "3 had acknowledged them before it was their backup");
}

#[test]
fn after_a_crash_every_flow_has_two_holders_again() {
    let mut world = World::new(&[1, 2, 3]);
    for n in 0..100 {
        world.open(n, 1);
    }
    world.settle();
    world.kill(2);
    world.switch(&[(1, 1), (3, 1)]);
    assert!(world.unprotected() > 0);
    world.settle();
    world.close_window();
    for n in 0..100 {
        assert_eq!(world.has(n), [1, 3]);
    }
    assert_eq!(world.unprotected(), 0);
}

#[test]
fn transfers_keep_to_the_rate_and_show_how_far_they_are() {
    let mut world = World::new(&[1]);
    world.kill(1);
    world.start_with(1, Config { local: MemberId(1), transfer_rate: NonZeroU32::new(1000).unwrap() });
    let live = world.live();
    let view = world.view(None, &live);
    world.set_view(1, view);
    for n in 0..10_000 {
        world.open(n, 1);
    }
    world.settle();
    world.start(2);
    world.switch(&[(1, 1), (2, 1)]);
    let started = world.now;
    world.advance(SECOND * 5);
    let progress: Vec<_> = world.node(1).replicator.transfers().collect();
    let [TransferProgress { to, sent, acked, refused, total }] = progress[..] else { panic!("one transfer") };
    assert_eq!((to, total, refused), (MemberId(2), 10_000, 0));
    assert!((4_900..=5_200).contains(&sent) && sent == acked, "{sent} sent, {acked} acked after 5 s");
    while world.node(1).replicator.transfers().count() > 0 {
        world.advance(SECOND / 10);
    }
    let took = (world.now - started).as_secs_f64();
    assert!((9.8..10.3).contains(&took), "{took} s for 10,000 records at 1,000 a second");
    let events = &world.node(1).events;
    assert!(
        matches!(events[..], [Event::TransferDone { to: MemberId(2), .. }, Event::AllDone]),
        "{events:?}"
    );
    assert_eq!(world.node(2).table.flows.len(), 10_000);
}

#[test]
fn a_transfer_goes_on_after_a_reconnect_and_counts_nothing_twice() {
    let mut world = World::new(&[1]);
    for n in 0..20_000 {
        world.open(n, 1);
    }
    world.settle();
    world.start(2);
    world.seed(3);
    world.loss = 6;
    world.switch(&[(1, 1), (2, 1)]);
    world.advance(SECOND);
    assert_eq!(world.node(2).table.flows.len(), 20_000);
    let sent = world.node(1).replicator.counters().items_sent;
    assert!(sent > 20_000, "the network lost some: {sent}");
    let Some(Event::TransferDone { progress, .. }) = world.node(1).events.first() else { panic!("done") };
    assert_eq!((progress.sent, progress.acked, progress.total), (20_000, 20_000, 20_000));
    assert_eq!(world.unprotected(), 0);
}

#[test]
fn a_transfer_to_a_member_that_dies_is_dropped_and_all_is_done() {
    let mut world = World::new(&[1]);
    for n in 0..100 {
        world.open(n, 1);
    }
    world.settle();
    world.start(2);
    world.switch(&[(1, 1), (2, 1)]);
    world.kill(2);
    world.switch(&[(1, 1)]);
    world.settle();
    let events = &world.node(1).events;
    assert_eq!(events[0], Event::TransferDropped { to: MemberId(2), records: 100 });
    assert_eq!(events[1], Event::AllDone);
    assert_eq!(world.node(1).replicator.poll_timeout(), None);
}

#[test]
fn flows_that_end_while_they_wait_are_not_transferred() {
    let mut world = World::new(&[1]);
    for n in 0..4 {
        world.open(n, 1);
    }
    world.settle();
    world.start(2);
    world.disconnect(1, 2);
    world.switch(&[(1, 1), (2, 1)]);
    world.change(1, 2, FlowState::Reset);
    world.settle();
    world.expired(1, 2);
    world.settle();
    world.connect(1, 2);
    world.settle();
    assert_eq!(world.node(2).table.flows.len(), 3);
    assert_eq!(world.node(2).replicator.counters().barred, 0);
    assert!(world.node(1).events.contains(&Event::AllDone));
}

#[test]
fn bad_bytes_close_the_connection_and_change_nothing() {
    let mut world = World::new(&[1, 2]);
    let now = world.now;
    let replicator = &mut world.node(1).replicator;
    assert_eq!(replicator.handle_data(now, MemberId(9), b"PHXR"), Err(PeerError::NotConnected));
    assert_eq!(
        replicator.handle_data(now, MemberId(2), b"GET / HTTP"),
        Err(PeerError::Codec(CodecError::Magic))
    );
    assert_eq!(replicator.poll_apply(), None);
    // The twin: after a reconnect the stream begins anew.
    replicator.handle_disconnected(now, MemberId(2));
    replicator.handle_connected(now, MemberId(2));
    assert_eq!(replicator.handle_data(now, MemberId(2), b"PHXR"), Ok(()));
}

#[test]
fn a_peer_that_ignores_its_window_is_cut_off() {
    let mut world = World::new(&[1, 2]);
    let now = world.now;
    let frame = |seq| {
        codec::encode(&Frame::Batch {
            seq,
            items: vec![Item::Associate { record: record(1, 1), cache: false }],
        })
    };
    let replicator = &mut world.node(1).replicator;
    for seq in 0..MAX_INBOUND as u64 {
        assert_eq!(replicator.handle_data(now, MemberId(2), &frame(seq)), Ok(()));
    }
    assert_eq!(replicator.handle_data(now, MemberId(2), &frame(0)), Err(PeerError::Window));
}

#[test]
fn who_offers_a_flow_that_has_ended_is_told_of_its_end() {
    let mut world = World::new(&[1, 2]);
    world.open(1, 1);
    world.settle();
    let [owner, backup] = world.holders(1);
    let kept = world.node(backup).table.flows[&key(1)];
    world.expired(owner, 1);
    world.advance(2 * SECOND);
    assert_eq!(world.has(1), []);
    // The backup has missed it, and offers what it has in a comparison.
    world.node(backup).table.flows.insert(key(1), kept);
    let table = BTreeMap::from([(MemberId(owner), vec![Record { idle_ms: 2_000, ..kept.0 }])]);
    let now = world.now;
    let offer = TransferPlan { holders: table, ..TransferPlan::default() };
    world.nodes.get_mut(&backup).unwrap().replicator.ended = Births::new(10, SECOND);
    world.node(backup).replicator.begin_transfer(now, offer);
    world.settle();
    assert_eq!(world.has(1), [], "neither holds it");
    assert_eq!(world.node(owner).replicator.counters().barred, 1);
}

#[test]
fn rows_are_compared_in_as_many_parts_as_a_message_can_take() {
    let mut world = World::new(&[1, 2]);
    let digest = RowDigest { count: 1, sum: 7 };
    let many = codec::MAX_ROWS as u32 + 10;
    let held = (0..many).map(|row| (row * 2, digest)).collect();
    let parts = world.node(1).replicator.compare(MemberId(2), 5, false, [0, 65_535], &held);
    assert_eq!(parts, 2);
    world.settle();
    let asked: Vec<_> = world
        .node(2)
        .events
        .iter()
        .filter_map(|event| match event {
            Event::Digests { from: MemberId(1), digests } => {
                Some((digests.first, digests.last, digests.rows.len() as u32))
            }
            _ => None,
        })
        .collect();
    let split = (codec::MAX_ROWS as u32 - 1) * 2;
    assert_eq!(asked, [(0, split, codec::MAX_ROWS as u32), (split + 1, 65_535, 10)]);
    world.node(2).replicator.answer(MemberId(1), 5, vec![4]);
    world.settle();
    let answer = Event::Differing { from: MemberId(2), round: 5, rows: vec![4] };
    assert_eq!(world.node(1).events.last(), Some(&answer));
    // The twin: nobody is asked who is not connected.
    world.disconnect(1, 2);
    assert_eq!(world.node(1).replicator.compare(MemberId(2), 6, false, [0, 65_535], &held), 0);
}

#[test]
fn tombstones_are_bounded_in_number_and_time() {
    let start = crate::testing::epoch();
    let mut ended = Births::new(3, SECOND * 10);
    for n in 0..4 {
        ended.insert(start, key(n), 100, start - SECOND);
    }
    let bars = |ended: &Births, n, birth, seen| ended.bars(&key(n), birth, seen).is_some();
    let seen = start - 2 * SECOND;
    assert!(!bars(&ended, 0, 100, seen), "the oldest made room");
    assert!(bars(&ended, 3, 100, seen) && bars(&ended, 3, 99, seen));
    assert!(!bars(&ended, 3, 101, seen), "a later life is not barred");
    assert!(!bars(&ended, 3, 0, seen), "nor one that has no birth yet");
    assert!(!bars(&ended, 3, 100, start), "nor one that has been seen since");
    ended.expire(start + SECOND * 10);
    assert!(!bars(&ended, 3, 100, seen));
}

#[test]
fn what_was_acknowledged_for_a_change_that_was_dropped_does_not_count_in_a_later_one() {
    let (mut world, pending, owned) = cut_off_backup_with_another_planned();
    let remembered = world.node(1).replicator.remembered();
    // Whoever was sent something for it sweeps that now.
    let live = world.live();
    for id in 1..=3 {
        let view = world.view(None, &live);
        world.set_view(id, view);
    }
    assert!(world.node(1).replicator.remembered() < remembered, "it is forgotten");
    world.put_in_force(pending);
    let kept = owned.iter().filter(|&&n| world.holders(n) == [1, 3]).count();
    assert!(kept > 0);
    assert_eq!(world.node(1).replicator.unprotected(), kept, "nobody knows whether 3 still has them");
}

#[test]
fn what_a_joiner_acknowledged_whole_chunks_of_is_protected_at_the_switch_but_for_what_changed_since() {
    let mut world = World::new(&[1]);
    for n in 0..100 {
        world.open(n, 1);
    }
    world.settle();
    assert_eq!(world.node(1).replicator.unprotected(), 100, "there is no backup");
    world.start(2);
    let pending = world.plan(&[(1, 1), (2, 1)]);
    world.settle();
    assert_eq!(world.node(1).replicator.noted_ahead(), 100);
    world.disconnect(1, 2);
    world.change(1, 7, FlowState::Closing);
    world.change(1, 8, FlowState::Closing);
    world.put_in_force(pending);
    world.settle();
    let changed = [7, 8].into_iter().filter(|&n| world.holders(n) == [1, 2]).count();
    assert_eq!(world.node(1).replicator.unprotected(), changed);
    assert_eq!(world.node(1).replicator.noted_ahead(), 0);
    world.connect(1, 2);
    world.settle();
    assert_eq!(world.unprotected(), 0);
}

#[test]
fn acknowledgements_ahead_of_a_change_that_does_not_come_are_not_kept() {
    let mut world = World::new(&[1]);
    for n in 0..100 {
        world.open(n, 1);
    }
    world.start(2);
    let _ = world.plan(&[(1, 1), (2, 1)]);
    world.settle();
    assert_eq!(world.node(1).replicator.noted_ahead(), 100);
    let live = world.live();
    let view = world.view(None, &live);
    world.set_view(1, view);
    assert_eq!(world.node(1).replicator.noted_ahead(), 0);
}

#[test]
fn each_stalled_flow_has_its_turn() {
    let mut world = World::new(&[1, 2]);
    let replicator = &mut world.node(1).replicator;
    for n in 0..40 {
        if replicator.is_own(&key(n)) {
            // Nothing is on its way that could be acknowledged.
            replicator.note_missing(key(n), (1, 0), MemberId(2));
        }
    }
    let count = replicator.unprotected();
    assert!(count > 6, "{count}");
    let mut told = BTreeSet::new();
    for _ in 0..count.div_ceil(3) {
        told.extend(replicator.stalled(3));
    }
    assert_eq!(told.len(), count);
    assert_eq!(replicator.stalled(count).len(), count, "all at once, if they may be");
}

/// A SYN takes out what has ended, and records nothing where there is no lease: the daemon hears of neither.
#[test]
fn where_there_is_no_backup_only_what_is_still_there_counts_as_unprotected() {
    let mut world = World::new(&[1]);
    for n in 0..10 {
        world.open(n, 1);
    }
    world.settle();
    world.node(1).table.flows.remove(&key(3));
    let told_again = |world: &mut World| {
        let stalled = world.node(1).replicator.stalled(100);
        assert_eq!(stalled.len(), world.unprotected());
        for key in stalled {
            let now = world.now;
            let record = world.node(1).table.get(now, &key);
            world.node(1).replicator.handle_stalled(&key, record);
        }
        (world.unprotected(), world.node(1).replicator.counters().told_again)
    };
    assert_eq!(told_again(&mut world), (9, 0), "there is nobody to tell of the others");
    assert_eq!(told_again(&mut world), (9, 0));
}
