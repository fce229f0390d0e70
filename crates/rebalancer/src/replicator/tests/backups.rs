//! `backups = 2`: a third holder of every flow.

use super::*;

const FLOWS: u16 = 400;

fn opened(backups: usize) -> World {
    let mut world = World::with_backups(&[1, 2, 3, 4, 5], backups);
    for n in 0..FLOWS {
        world.open(n, 1);
    }
    world.settle();
    assert_eq!(world.unprotected(), 0);
    world
}

#[test]
fn a_flow_is_protected_when_both_backups_have_acknowledged() {
    let mut world = World::with_backups(&[1, 2, 3], 2);
    let n = world.flow_of(1, 2);
    world.disconnect(1, 3);
    world.open(n, 1);
    world.settle();
    assert_eq!((world.has(n), world.unprotected()), (vec![1, 2], 1));
    assert!(!world.record(1, n).unwrap().flags.has(FlowFlags::PROTECTED));
    world.connect(1, 3);
    world.settle();
    assert_eq!((world.has(n), world.unprotected()), (vec![1, 2, 3], 0));
    assert!(world.record(1, n).unwrap().flags.has(FlowFlags::PROTECTED));
}

#[test]
fn an_acknowledgement_of_an_earlier_version_counts_for_neither_backup() {
    let mut world = World::with_backups(&[1, 2, 3], 2);
    let n = world.flow_of(1, 2);
    world.node(3).table.stuck = true;
    world.open(n, 1);
    world.settle();
    world.change(1, n, FlowState::Closing);
    world.settle();
    assert_eq!(world.unprotected(), 1, "3 has applied neither");
    world.node(3).table.stuck = false;
    world.settle();
    assert_eq!(world.unprotected(), 0);
    assert_eq!(world.record(3, n).unwrap().state, FlowState::Closing);
}

#[test]
fn each_backup_is_told_once() {
    let frames = |backups| {
        let mut world = World::with_backups(&[1, 2, 3], backups);
        let n = world.flow_of(1, 2);
        world.open(n, 1);
        world.settle();
        world.frames
    };
    // The record and its acknowledgement, for each.
    assert_eq!((frames(1), frames(2)), (2, 4));
}

#[test]
fn losing_owner_and_backup_at_once_loses_nothing_with_two_backups_and_something_with_one() {
    let lost = |backups| {
        let mut world = opened(backups);
        let [owner, backup] = world.holders(0);
        let hit = (0..FLOWS)
            .filter(|&n| world.holders(n) == [owner, backup] || world.holders(n) == [backup, owner])
            .count();
        assert!(hit > 3);
        world.kill(owner);
        world.kill(backup);
        let left: Vec<(u32, u32)> = world.nodes.keys().map(|&id| (id, 1)).collect();
        world.switch(&left);
        world.settle();
        world.close_window();
        let lost = (0..FLOWS).filter(|&n| world.has(n).is_empty()).count();
        for n in (0..FLOWS).filter(|&n| !world.has(n).is_empty()) {
            assert_eq!(world.has(n), world.sorted_holders(n));
        }
        assert_eq!(world.unprotected(), 0);
        (lost, hit)
    };
    let (one, hit) = lost(1);
    assert_eq!(one, hit);
    assert_eq!(lost(2).0, 0);
}

#[test]
fn a_flow_is_idle_only_when_neither_backup_has_seen_it() {
    let outcome = |packet_at: Option<u32>| {
        let mut world = World::with_backups(&[1, 2, 3], 2);
        let n = world.flow_of(1, 2);
        world.open(n, 1);
        world.advance(SECOND * 100);
        if let Some(at) = packet_at {
            world.packet(at, n);
        }
        world.advance(SECOND * 100);
        world.expired(1, n);
        world.settle();
        (world.has(n), world.record(1, n).map(|record| record.idle_ms / 1000))
    };
    assert_eq!(outcome(Some(2)), (vec![1, 2, 3], Some(100)));
    assert_eq!(outcome(Some(3)), (vec![1, 2, 3], Some(100)));
    assert_eq!(outcome(None), (vec![], None));
}

#[test]
fn a_planned_change_protects_with_both_next_backups_before_it_is_in_force() {
    let mut world = opened(2);
    world.start(6);
    let members: Vec<(u32, u32)> = (1..=6).map(|id| (id, 1)).collect();
    let pending = world.plan(&members);
    world.settle();
    for n in 0..FLOWS {
        let [owner, _] = world.holders(n);
        world.change(owner, n, FlowState::Closing);
    }
    world.settle();
    let frames = world.frames;
    world.put_in_force(pending);
    world.settle();
    assert_eq!((world.frames, world.unprotected()), (frames, 0));
    world.close_window();
    for n in 0..FLOWS {
        assert_eq!(world.has(n), world.sorted_holders(n));
    }
}

#[test]
fn a_comparison_protects_once_both_backups_hold_the_same() {
    let held_by = |answers: &[u32]| {
        let mut world = World::with_backups(&[1, 2, 3, 4], 2);
        let n = world.flow_of(1, 2);
        // All hold it, and nobody has acknowledged it.
        let mut of_all = record(n, 1);
        (of_all.birth, of_all.update) = (7, 3);
        let now = world.now;
        for holder in world.sorted_holders(n) {
            world.node(holder).table.flows.insert(key(n), (of_all, now));
        }
        for &from in answers {
            world.node(1).replicator.handle_compared(now, MemberId(from), &[(key(n), 7, 3)]);
            world.settle();
        }
        (world.record(1, n).unwrap().flags.has(FlowFlags::PROTECTED), world.unprotected())
    };
    let world = World::with_backups(&[1, 2, 3, 4], 2);
    let holders = world.sorted_holders(world.flow_of(1, 2));
    let [second] = holders.iter().copied().filter(|&id| id > 2).collect::<Vec<_>>()[..] else { panic!() };
    let stranger = 7 - second;
    assert_eq!(held_by(&[2]), (false, 1), "now it is known that somebody may lack it");
    assert_eq!(held_by(&[second, second]), (false, 1));
    assert_eq!(held_by(&[2, stranger]), (false, 1));
    assert_eq!(held_by(&[2, second]), (true, 0));
    assert_eq!(held_by(&[stranger]), (false, 0), "who holds none of our rows says nothing of them");
}

#[test]
fn what_one_backup_sends_says_nothing_of_the_other() {
    let mut world = World::with_backups(&[1, 2, 3], 2);
    let n = world.flow_of(1, 2);
    let mut kept = record(n, 1);
    (kept.birth, kept.update) = (7, 3);
    let now = world.now;
    world.node(2).table.flows.insert(key(n), (kept, now));
    // The owner hears of a flow that it has forgotten; the second backup cannot be reached.
    world.disconnect(1, 3);
    world.disconnect(2, 3);
    let offer = TransferPlan { holders: [(MemberId(1), vec![kept])].into(), ..TransferPlan::default() };
    world.node(2).replicator.begin_transfer(now, offer.clone());
    world.settle();
    let protected = |world: &World| world.record(1, n).unwrap().flags.has(FlowFlags::PROTECTED);
    assert_eq!((world.has(n), protected(&world), world.unprotected()), (vec![1, 2], false, 1));
    // It is sent once more, and is no news.
    world.node(2).replicator.begin_transfer(now, offer);
    world.settle();
    assert_eq!((protected(&world), world.unprotected()), (false, 1));
    world.connect(1, 3);
    world.settle();
    assert_eq!((world.has(n), protected(&world), world.unprotected()), (vec![1, 2, 3], true, 0));
}

#[test]
fn of_a_flow_that_nobody_has_acknowledged_one_of_two_backups_proves_nothing() {
    let protected = |backups| {
        let mut world = World::with_backups(&[1, 2, 3], backups);
        let n = world.flow_of(1, 2);
        let mut kept = record(n, 1);
        (kept.birth, kept.update) = (7, 3);
        let now = world.now;
        for holder in [1, 2] {
            world.node(holder).table.flows.insert(key(n), (kept, now));
        }
        let offer = TransferPlan { holders: [(MemberId(1), vec![kept])].into(), ..TransferPlan::default() };
        world.node(2).replicator.begin_transfer(now, offer);
        world.settle();
        world.record(1, n).unwrap().flags.has(FlowFlags::PROTECTED)
    };
    assert!(protected(1));
    assert!(!protected(2));
}

#[test]
fn who_inherits_a_flow_from_a_lost_owner_counts_on_the_other_backup_once_that_has_answered() {
    let mut world = World::with_backups(&[1, 2, 3, 4], 2);
    let n = (0..1000).find(|&n| world.holders(n) == [1, 2] && world.sorted_holders(n) == [1, 2, 3]).unwrap();
    world.open(n, 1);
    world.settle();
    // The owner's last word reaches one of them.
    for other in [1, 2, 4] {
        world.disconnect(other, 3);
    }
    world.change(1, n, FlowState::Closing);
    world.settle();
    world.kill(1);
    world.switch(&[(2, 1), (3, 1), (4, 1)]);
    world.settle();
    let seen = |world: &World| {
        let states = [2, 3, 4].map(|id| world.record(id, n).unwrap().state);
        (states, world.record(2, n).unwrap().flags.has(FlowFlags::PROTECTED), world.unprotected())
    };
    let (closing, established) = (FlowState::Closing, FlowState::Established);
    assert_eq!(seen(&world), ([closing, established, closing], false, 1));
    world.connect(2, 3);
    world.settle();
    assert_eq!(seen(&world), ([closing; 3], true, 0));
}
