//! Planned changes in virtual time: nothing is in force before everybody is ready, and nothing stays half done.
use std::time::{Duration, Instant};

use phalanx_flow::MemberId;
use phalanx_membership::{
    Config, Digest, Event, MemberState, Metadata, Timing, Warning,
    harness::{Cluster, Network, config},
    trial,
};

const SECOND: Duration = Duration::from_secs(1);

fn lan(id: u32) -> Config {
    config(id, &Timing::lan())
}

#[expect(
    clippy::disallowed_methods,
    reason = "virtual time has to start somewhere; nothing depends on where"
)]
fn settled(members: u32, seed: u64) -> Cluster {
    trial::settled(Instant::now(), &Timing::lan(), Network::lan(0.01), members, seed).unwrap()
}

/// The same, and from now on nobody is ready before it is told to be.
fn held(members: u32, seed: u64) -> Cluster {
    let mut cluster = settled(members, seed);
    cluster.ready = false;
    cluster
}

fn state(cluster: &Cluster, node: usize) -> MemberState {
    cluster.membership(node).unwrap().state()
}

fn pending(cluster: &Cluster, node: usize) -> Option<Digest> {
    cluster.membership(node).unwrap().view().pending
}

fn ranked(cluster: &Cluster, node: usize) -> Vec<(u32, u32)> {
    let view = cluster.membership(node).unwrap().view();
    view.ranked().map(|member| (member.id.0, member.metadata.weight)).collect()
}

/// `node` reports that it is ready for whatever is pending in its eyes.
fn report(cluster: &mut Cluster, node: usize) {
    if let Some(name) = pending(cluster, node) {
        cluster.with(node, |membership, now| membership.report_done(now, name));
    }
}

fn report_all(cluster: &mut Cluster) {
    for node in 0..cluster.nodes.len() {
        if cluster.membership(node).is_some() {
            report(cluster, node);
        }
    }
}

fn one_name(cluster: &Cluster, nodes: std::ops::Range<usize>) -> Digest {
    let names: Vec<_> = nodes.map(|node| pending(cluster, node)).collect();
    assert!(names.iter().all(|name| *name == names[0]), "{names:?}");
    names[0].expect("something is pending")
}

#[test]
fn a_joiner_ranks_only_when_the_last_member_is_ready_and_then_in_one_step() {
    for seed in 0..10 {
        let mut cluster = held(3, seed);
        let joiner = cluster.add(lan(4)).unwrap();
        cluster.run_for(3 * SECOND);
        let name = one_name(&cluster, 0..4);
        for node in [joiner, 0, 1] {
            report(&mut cluster, node);
            cluster.run_for(3 * SECOND);
            assert_eq!(state(&cluster, joiner), MemberState::Joining, "seed {seed}");
            assert_eq!(ranked(&cluster, 0), [(1, 1), (2, 1), (3, 1)]);
        }
        report(&mut cluster, 2);
        let took = cluster.run_until(5 * SECOND, Cluster::is_settled).expect("the joiner joins");
        assert!(took < SECOND, "seed {seed}: {took:?}");
        assert_eq!(
            cluster.membership(0).unwrap().view().digest,
            name,
            "the view has the digest it was named by"
        );
    }
}

#[test]
fn a_joiner_that_waits_for_room_asks_when_it_has_it_or_ten_seconds_after_it_met_somebody() {
    for told in [true, false] {
        let mut cluster = held(3, 4);
        let joiner = cluster.add(Config { waits_for_room: true, ..lan(4) }).unwrap();
        let pending = |cluster: &Cluster| cluster.membership(0).unwrap().view().pending;
        cluster.run_for(9 * SECOND);
        assert_eq!((state(&cluster, joiner), pending(&cluster)), (MemberState::Joining, None));
        if told {
            cluster.with(joiner, |membership, now| membership.report_room(now));
            cluster.run_for(SECOND / 2);
            assert_ne!(pending(&cluster), None);
        } else {
            cluster.run_for(3 * SECOND);
            assert_ne!(pending(&cluster), None, "it goes on without");
        }
        report_all(&mut cluster);
        cluster.run_until(5 * SECOND, Cluster::is_settled).expect("the joiner joins");
    }
}

#[test]
fn a_word_for_another_pending_view_is_no_word() {
    let mut cluster = held(2, 1);
    let first = cluster.add(lan(3)).unwrap();
    cluster.run_for(2 * SECOND);
    report(&mut cluster, 0);
    report(&mut cluster, first);
    let old = one_name(&cluster, 0..3);
    let second = cluster.add(lan(4)).unwrap();
    cluster.run_for(2 * SECOND);
    assert_ne!(one_name(&cluster, 0..4), old);
    // The second member says now what was asked of it before the second joiner came: it is too late for that.
    cluster.with(1, |membership, now| membership.report_done(now, old));
    cluster.run_for(2 * SECOND);
    assert_eq!([state(&cluster, first), state(&cluster, second)], [MemberState::Joining; 2]);
    report_all(&mut cluster);
    cluster.run_until(5 * SECOND, Cluster::is_settled).expect("both join under one name");
}

#[test]
fn a_joiner_that_dies_takes_its_change_with_it() {
    let mut cluster = held(3, 2);
    let before = cluster.membership(0).unwrap().view().digest;
    let joiner = cluster.add(lan(4)).unwrap();
    cluster.run_for(2 * SECOND);
    one_name(&cluster, 0..4);
    cluster.kill(joiner);
    cluster.run_for(5 * SECOND);
    for node in 0..3 {
        let view = cluster.membership(node).unwrap().view();
        assert_eq!((view.pending, view.digest), (None, before));
    }
}

#[test]
fn a_member_that_dies_while_others_wait_for_it_makes_a_new_pending_view() {
    for seed in 0..5 {
        let mut cluster = held(4, seed);
        let joiner = cluster.add(lan(5)).unwrap();
        cluster.run_for(2 * SECOND);
        let name = one_name(&cluster, 0..5);
        for node in [0, 1, 2, joiner] {
            report(&mut cluster, node);
        }
        cluster.kill(3);
        cluster.run_for(5 * SECOND);
        // The dead one is out of both views, and what was sent for the old pending view counts no more.
        let ranks: Vec<_> = ranked(&cluster, 0).into_iter().map(|(id, _)| id).collect();
        assert_eq!(ranks, [1, 2, 3]);
        assert_eq!(state(&cluster, joiner), MemberState::Joining);
        assert!([0, 1, 2, joiner].iter().all(|node| pending(&cluster, *node).is_some_and(|now| now != name)));
        report_all(&mut cluster);
        cluster.run_until(5 * SECOND, Cluster::is_settled).expect("the joiner joins");
    }
}

#[test]
fn a_new_weight_is_in_force_when_all_are_ready_and_may_be_withdrawn_before() {
    let mut cluster = held(3, 3);
    let weigh = |cluster: &mut Cluster, weight| {
        let metadata = Metadata { weight, ..cluster.nodes[1].config.metadata.clone() };
        cluster.with(1, |membership, now| membership.update_metadata(now, metadata)).unwrap().unwrap();
        cluster.run_for(2 * SECOND);
    };
    weigh(&mut cluster, 7);
    let name = one_name(&cluster, 0..3);
    report(&mut cluster, 0);
    cluster.run_for(2 * SECOND);
    assert!((0..3).all(|node| ranked(&cluster, node) == [(1, 1), (2, 1), (3, 1)]));
    weigh(&mut cluster, 1);
    assert!((0..3).all(|node| pending(&cluster, node).is_none()));
    // The same wish again is another change: the word given for the first one does not count.
    weigh(&mut cluster, 7);
    assert_ne!(one_name(&cluster, 0..3), name);
    report(&mut cluster, 1);
    report(&mut cluster, 2);
    cluster.run_for(2 * SECOND);
    assert_eq!(ranked(&cluster, 0), [(1, 1), (2, 1), (3, 1)]);
    report(&mut cluster, 0);
    cluster.run_for(SECOND);
    assert!((0..3).all(|node| ranked(&cluster, node) == [(1, 1), (2, 7), (3, 1)]));
}

#[test]
fn a_member_that_leaves_ranks_until_all_are_ready() {
    let mut cluster = held(3, 4);
    cluster.with(2, |membership, now| membership.begin_leave(now));
    cluster.run_for(5 * SECOND);
    assert_eq!(ranked(&cluster, 0).len(), 3);
    report_all(&mut cluster);
    cluster.run_for(SECOND);
    assert_eq!(state(&cluster, 2), MemberState::Leaving);
    assert!((0..3).all(|node| ranked(&cluster, node) == [(1, 1), (2, 1)]));
}

#[test]
fn who_is_never_ready_is_not_waited_for_for_ever_and_is_named() {
    for (leave, patience) in [(true, 30 * SECOND), (false, 120 * SECOND)] {
        let mut cluster = held(3, 5);
        let node = if leave {
            cluster.with(1, |membership, now| membership.begin_leave(now));
            1
        } else {
            cluster.add(lan(4)).unwrap()
        };
        cluster.run_for(2 * SECOND);
        let before = state(&cluster, node);
        for ready in (0..cluster.nodes.len()).filter(|ready| *ready != 2) {
            report(&mut cluster, ready);
        }
        cluster.run_for(patience - 3 * SECOND);
        assert_eq!(state(&cluster, node), before);
        cluster.run_for(6 * SECOND);
        assert_ne!(state(&cluster, node), before);
        let warned = Event::Warning(Warning::NotReady(MemberId(3)));
        assert!(cluster.nodes[node].events.iter().any(|(_, event)| *event == warned));
    }
}

#[test]
fn both_sides_of_a_partition_keep_their_own_table_until_each_is_ready_for_the_other() {
    for (left, members) in [(2, 4), (1, 3), (3, 5)] {
        for seed in 0..60 {
            let mut cluster = settled(members, seed);
            for node in 0..left {
                cluster.set_group(node, 1);
            }
            cluster.run_for(10 * SECOND);
            let members = members as usize;
            let sides: Vec<_> = (0..members).map(|node| ranked(&cluster, node)).collect();
            assert_eq!(sides[0].len(), left);
            cluster.ready = false;
            cluster.heal();
            let met = cluster.run_until(20 * SECOND, |cluster| {
                let name = cluster.membership(0).unwrap().view().pending;
                name.is_some() && (0..members).all(|node| pending(cluster, node) == name)
            });
            assert!(met.is_some(), "all see the merged view coming, under one name");
            cluster.run_for(3 * SECOND);
            let now: Vec<_> = (0..members).map(|node| ranked(&cluster, node)).collect();
            assert_eq!(now, sides, "{left} of {members}, seed {seed}: nobody has switched");
            for node in 1..members {
                report(&mut cluster, node);
            }
            cluster.run_for(3 * SECOND);
            assert!((0..members).all(|node| ranked(&cluster, node) == sides[node]), "one is not ready");
            report(&mut cluster, 0);
            cluster.run_until(5 * SECOND, Cluster::is_settled).expect("one cluster");
        }
    }
}

#[test]
fn twenty_that_join_at_once_join_together() {
    let mut cluster = settled(3, 6);
    for id in 4..=23 {
        cluster.add(lan(id)).unwrap();
    }
    let took = cluster.run_until(30 * SECOND, Cluster::is_settled).expect("one cluster");
    println!("{took:?}");
    assert!(took < 10 * SECOND, "{took:?}");
}
