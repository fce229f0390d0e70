//! Coming, going, coming back: every way a member can, in virtual time.
use std::time::{Duration, Instant};

use phalanx_flow::{MemberId, member::Liveness};
use phalanx_membership::{
    Config, Digest, DownReason, Event, MemberState, Membership, Metadata, Refusal, SharedField, Timing,
    Warning,
    harness::{Cluster, Network, address, config},
    trial,
};

const SECOND: Duration = Duration::from_secs(1);

fn epoch() -> Instant {
    #[expect(
        clippy::disallowed_methods,
        reason = "virtual time has to start somewhere; nothing depends on where"
    )]
    Instant::now()
}

fn lan(id: u32) -> Config {
    config(id, &Timing::lan())
}

fn empty(seed: u64) -> Cluster {
    Cluster::new(epoch(), seed, Network::lan(0.01))
}

fn settled(members: u32, seed: u64) -> Cluster {
    let mut cluster = trial::settled(epoch(), &Timing::lan(), Network::lan(0.01), members, seed).unwrap();
    forget(&mut cluster);
    cluster
}

fn forget(cluster: &mut Cluster) {
    for node in &mut cluster.nodes {
        node.events.clear();
    }
}

/// Whether any of `nodes` said `event`.
fn said(cluster: &Cluster, nodes: impl IntoIterator<Item = usize>, wanted: impl Fn(&Event) -> bool) -> bool {
    nodes.into_iter().any(|node| cluster.nodes[node].events.iter().any(|(_, event)| wanted(event)))
}

fn all_say(
    cluster: &Cluster,
    nodes: impl IntoIterator<Item = usize>,
    wanted: impl Fn(&Event) -> bool,
) -> bool {
    nodes.into_iter().all(|node| said(cluster, [node], &wanted))
}

fn down(event: &Event) -> bool {
    matches!(event, Event::MemberDown { .. })
}

fn settles(cluster: &mut Cluster, within: Duration) -> Duration {
    cluster.run_until(within, Cluster::is_settled).unwrap_or_else(|| {
        let views: Vec<_> = (0..cluster.nodes.len())
            .filter_map(|node| cluster.membership(node))
            .map(|m| (m.state(), m.view()))
            .collect();
        panic!("did not settle: {views:#?}")
    })
}

/// A later start of the same member that lost its flow table.
fn reborn(id: u32) -> Config {
    Config { boot: 2, session: 2, ..lan(id) }
}

/// A later start of the same member that adopted its flow table.
fn adopted(id: u32) -> Config {
    Config { session: 2, ..lan(id) }
}

#[test]
fn three_members_started_at_the_same_moment_become_one_cluster() {
    let (mut first, mut alone) = (Duration::ZERO, 0);
    for seed in 0..50 {
        let mut cluster = empty(seed);
        for id in 1..=3 {
            cluster.add(lan(id)).unwrap();
        }
        first = first.max(settles(&mut cluster, 10 * SECOND));
        assert!(!said(&cluster, 0..3, down), "seed {seed}");
        // Who turned active when nobody else was.
        let early = cluster.nodes.iter().map(|node| {
            node.events
                .iter()
                .find(|(_, event)| *event == Event::StateChanged(MemberState::Active))
                .unwrap()
                .0
        });
        let mut early: Vec<_> = early.collect();
        early.sort_unstable();
        alone += usize::from(early[1] == early[0]);
        assert!(cluster.membership(0).unwrap().state() == MemberState::Active);
    }
    println!("slowest {first:?}; two at once in {alone} of 50");
    assert!(first < 4 * SECOND);
    assert_eq!(alone, 0);
}

#[test]
fn nobody_turns_active_alone_before_bootstrap_wait_or_when_told_to_hold() {
    let mut cluster = empty(1);
    cluster.add(lan(7)).unwrap();
    cluster.add(Config { hold_joining: true, seeds: Vec::new(), ..lan(8) }).unwrap();
    cluster.run_for(Duration::from_millis(1900));
    assert_eq!(cluster.membership(0).unwrap().state(), MemberState::Joining);
    cluster.run_for(Duration::from_millis(300));
    assert_eq!(cluster.membership(0).unwrap().state(), MemberState::Active);
    assert_eq!(cluster.membership(1).unwrap().state(), MemberState::Joining);
    cluster.with(1, |membership, now| membership.activate(now));
    assert_eq!(cluster.membership(1).unwrap().state(), MemberState::Active);
}

/// Stalls a joiner from its first moment and then over and over, so that it runs a fifth of the time, for longer than `bootstrap_wait`.
fn starve(cluster: &mut Cluster, node: usize, mut check: impl FnMut(&Cluster)) {
    let stall = |cluster: &mut Cluster, length| {
        cluster.stall(node, length);
        cluster.run_for(length);
    };
    stall(cluster, 3 * SECOND);
    for _ in 0..10 {
        check(cluster);
        cluster.run_for(Duration::from_millis(100));
        check(cluster);
        stall(cluster, Duration::from_millis(400));
    }
}

#[test]
fn a_joiner_that_is_starved_does_not_make_a_cluster_of_its_own() {
    for seed in 0..50 {
        let mut cluster = settled(2, seed);
        let joiner = cluster.add(lan(3)).unwrap();
        let in_company = |cluster: &Cluster| {
            let membership = cluster.membership(joiner).unwrap();
            let (state, known) = (membership.state(), membership.view().members.len());
            assert!(state == MemberState::Joining || known == 3, "seed {seed}: {state:?} among {known}");
        };
        starve(&mut cluster, joiner, in_company);
        settles(&mut cluster, 10 * SECOND);
        assert!(!said(&cluster, [0, 1, joiner], down), "seed {seed}");
    }
}

/// Seed 2225 of the simulator: it was active after two seconds, beside the cluster that it had not heard.
#[test]
fn a_joiner_does_not_make_a_cluster_of_its_own_where_many_datagrams_are_lost() {
    let lossy = Network::lan(0.4);
    for seed in 0..100 {
        let mut cluster = settled(1, seed);
        cluster.network = lossy;
        let joiner = cluster.add(lan(3)).unwrap();
        let active = |cluster: &Cluster| cluster.membership(joiner).unwrap().state() == MemberState::Active;
        cluster.run_until(20 * SECOND, active).expect("it joins");
        assert_eq!(cluster.membership(joiner).unwrap().view().members.len(), 2, "seed {seed}");
    }
}

/// The twin: where nobody answers, a starved member turns active too, after it has tried for `bootstrap_wait` of its own time.
#[test]
fn a_starved_member_that_is_alone_turns_active_all_the_same() {
    let mut cluster = empty(1);
    let node = cluster.add(lan(2)).unwrap();
    let active = |cluster: &Cluster| cluster.membership(node).unwrap().state() == MemberState::Active;
    cluster.stall(node, 3 * SECOND);
    cluster.run_for(3 * SECOND);
    let took = cluster.run_until(5 * SECOND, active).expect("it turns active");
    assert!(took >= 2 * SECOND, "{took:?} after it began to run");
    // With a fifth of the time it takes five times as long, and no longer.
    let mut cluster = empty(2);
    let node = cluster.add(lan(2)).unwrap();
    starve(&mut cluster, node, |_| ());
    assert!(cluster.run_until(2 * SECOND, active).is_some());
}

#[test]
fn two_who_bootstrapped_apart_merge() {
    let mut cluster = empty(3);
    for id in 1..=2 {
        let node = cluster.add(lan(id)).unwrap();
        cluster.set_group(node, id);
    }
    cluster.run_for(5 * SECOND);
    assert!((0..2).all(|node| cluster.membership(node).unwrap().state() == MemberState::Active));
    cluster.heal();
    assert!(settles(&mut cluster, 5 * SECOND) < 3 * SECOND);
}

#[test]
fn two_members_survive_each_other() {
    let mut cluster = settled(2, 5);
    cluster.kill(1);
    let suspected = cluster
        .run_until(5 * SECOND, |cluster| {
            cluster
                .membership(0)
                .unwrap()
                .view()
                .get(MemberId(2))
                .is_some_and(|m| m.liveness == Liveness::Suspect)
        })
        .unwrap();
    assert!(suspected < Duration::from_millis(500));
    let lease = cluster.membership(0).unwrap().lease_valid_until().unwrap();
    assert!(lease < cluster.now() + Timing::lan().lease);
    cluster.run_for(4 * SECOND);
    let survivor = cluster.membership(0).unwrap();
    assert_eq!(survivor.view().members.len(), 1);
    assert_eq!(survivor.state(), MemberState::Active);
    assert!(survivor.lease_valid_until().unwrap() > cluster.now() + SECOND);
    cluster.start(1, reborn(2)).unwrap();
    assert!(settles(&mut cluster, 5 * SECOND) < 2 * SECOND);
}

#[test]
fn an_isolated_member_loses_its_lease_before_the_others_confirm_it_down() {
    for seed in 0..20 {
        let mut cluster = settled(5, seed);
        cluster.set_group(0, 1);
        let cut = cluster.now();
        cluster.run_for(5 * SECOND);
        let first_down = (1..5)
            .flat_map(|node| cluster.nodes[node].events.iter())
            .find(|(_, event)| matches!(event, Event::MemberDown { id: MemberId(1), .. }))
            .unwrap()
            .0;
        // It was alive and well when it was cut off, so its lease ran for no longer than this.
        assert!(first_down > cut + Timing::lan().lease, "seed {seed}");
        assert!(all_say(&cluster, 1..5, down));
        // It suspects everybody, and so rather itself.
        assert!(said(&cluster, [0], |event| *event == Event::Warning(Warning::DistrustsItself)));
    }
}

#[test]
fn who_was_isolated_comes_back_without_shaking_the_others() {
    for seed in 0..10 {
        let mut cluster = settled(5, seed);
        cluster.set_group(0, 1);
        cluster.run_for(30 * SECOND);
        assert_eq!(cluster.membership(0).unwrap().view().members.len(), 1);
        forget(&mut cluster);
        cluster.heal();
        let took = settles(&mut cluster, 20 * SECOND);
        assert!(took < 2 * SECOND, "seed {seed}: {took:?}");
        cluster.run_for(10 * SECOND);
        assert!(!said(&cluster, 0..5, down), "seed {seed}");
    }
}

#[test]
fn who_is_left_alone_owns_though_somebody_asks_to_join() {
    for active in [false, true] {
        let mut cluster = settled(2, 1);
        cluster.ready = false;
        cluster.kill(1);
        cluster.run_for(Duration::from_millis(1_900));
        let leased = |cluster: &Cluster| {
            cluster.membership(0).unwrap().lease_valid_until().is_some_and(|until| until > cluster.now())
        };
        assert!(!leased(&cluster), "the other may live, and hold this one to be down");
        if active {
            // The twin: it comes with the tables it had.
            cluster.start(1, Config { resume: true, ..adopted(2) }).unwrap();
        } else {
            cluster.start(1, reborn(2)).unwrap();
        }
        // Too short for a probe and its answer.
        let known = cluster.run_until(Duration::from_millis(90), |cluster| {
            let view = cluster.membership(0).unwrap().view();
            view.get(MemberId(2)).is_some_and(|other| other.known && !other.suspected)
        });
        assert!(known.is_some());
        assert_eq!(leased(&cluster), !active);
    }
}

#[test]
fn who_is_left_alone_says_hello_at_once() {
    for seed in 0..20 {
        let mut cluster = settled(2, seed);
        // It is back just after the other has confirmed it down.
        cluster.stall(0, Duration::from_millis(2_400));
        cluster.run_for(Duration::from_millis(2_400));
        assert!(said(&cluster, [1], down), "seed {seed}");
        let took = settles(&mut cluster, 10 * SECOND);
        assert!(took < Duration::from_millis(1_200), "seed {seed}: {took:?}");
    }
}

/// It is told that it was held to be down, takes another identity, and nobody is there any more to say a word to it.
#[test]
fn who_wakes_when_the_last_other_member_is_gone_finds_that_out() {
    for seed in 0..20 {
        let mut cluster = settled(2, seed);
        cluster.stall(0, 9 * SECOND);
        cluster.run_for(4 * SECOND);
        assert!(said(&cluster, [1], down), "seed {seed}");
        cluster.kill(1);
        cluster.run_for(5 * SECOND);
        let took = cluster.run_until(30 * SECOND, Cluster::is_settled);
        assert!(took.is_some_and(|took| took < 4 * SECOND), "seed {seed}: {took:?}");
        let generation = cluster.membership(0).unwrap().identity().generation;
        assert!(generation > 0, "seed {seed}: it was told");
    }
}

/// The word of the suspicion is said no more when the network heals, so who hears the suspect must tell it.
#[test]
fn who_was_cut_off_for_less_than_the_confirmation_time_is_believed_at_once() {
    for members in [2, 3, 5, 10] {
        for seed in 0..10 {
            let mut cluster = settled(members, seed);
            cluster.set_group(0, 1);
            cluster.run_for(Duration::from_millis(1_500));
            assert!(said(&cluster, 1..members as usize, |event| {
                matches!(event, Event::Liveness { id: MemberId(1), liveness: Liveness::Suspect })
            }));
            cluster.heal();
            let took = settles(&mut cluster, 5 * SECOND);
            assert!(took < SECOND, "{members} members, seed {seed}: {took:?}");
            cluster.run_for(5 * SECOND);
            assert!(!said(&cluster, 0..members as usize, down), "{members} members, seed {seed}");
        }
    }
}

/// It hears one after the other again, and holds none that it has not heard yet to be lost: that one may have acted for it meanwhile.
#[test]
fn who_was_cut_off_suspects_nobody_while_it_comes_back() {
    for members in [3, 5, 10] {
        for seed in 0..20 {
            let mut cluster = settled(members, seed);
            cluster.set_group(0, 1);
            cluster.run_for(Duration::from_millis(1_200));
            let distrusts = cluster.membership(0).unwrap().view().distrusts_itself;
            assert!(distrusts, "{members} members, seed {seed}");
            forget(&mut cluster);
            cluster.heal();
            settles(&mut cluster, 5 * SECOND);
            let suspects = said(&cluster, [0], |event| matches!(event, Event::Liveness { .. }));
            assert!(!suspects, "{members} members, seed {seed}");
        }
    }
}

#[test]
fn who_can_hear_again_and_not_one_member_diverts_from_that_one() {
    for seed in 0..10 {
        let mut cluster = settled(5, seed);
        cluster.set_group(0, 1);
        cluster.run_for(Duration::from_millis(1_200));
        cluster.kill(1);
        forget(&mut cluster);
        cluster.heal();
        let diverts = |cluster: &Cluster| {
            said(cluster, [0], |event| match event {
                Event::Liveness { id, liveness } => *id == MemberId(2) && *liveness == Liveness::Suspect,
                Event::MemberDown { id, .. } => *id == MemberId(2),
                _ => false,
            })
        };
        let took = cluster.run_until(5 * SECOND, diverts).unwrap();
        assert!(took < Duration::from_millis(1_500), "seed {seed}: {took:?}");
    }
}

/// Half of the others are lost, one after the other: once the first is confirmed down the second is few.
#[test]
fn whoever_is_doubted_beside_a_member_that_is_confirmed_down_is_suspected_at_once() {
    for seed in 0..10 {
        let mut cluster = settled(5, seed);
        cluster.kill(1);
        cluster.run_for(Duration::from_millis(400));
        cluster.kill(2);
        forget(&mut cluster);
        cluster.run_until(5 * SECOND, |cluster| said(cluster, [0], down)).unwrap();
        let view = cluster.membership(0).unwrap().view();
        assert!(!view.distrusts_itself, "seed {seed}");
        let other = view.get(MemberId(2)).or_else(|| view.get(MemberId(3)));
        assert!(other.is_none_or(|other| other.liveness == Liveness::Suspect), "seed {seed}");
    }
}

/// It has confirmed all others down, and says so as soon as its link is back.
#[test]
fn who_was_cut_off_does_not_make_the_others_lose_each_other_when_it_is_back() {
    let another_down = |event: &Event| matches!(event, Event::MemberDown { id, .. } if *id != MemberId(1));
    for members in [3, 5, 10] {
        for seed in 0..20 {
            let mut cluster = settled(members, seed);
            cluster.set_group(0, 1);
            let alone = cluster.run_until(10 * SECOND, |cluster| said(cluster, [0], another_down));
            assert!(alone.is_some(), "{members} members, seed {seed}");
            cluster.heal();
            settles(&mut cluster, 10 * SECOND);
            let lost = said(&cluster, 1..members as usize, another_down);
            assert!(!lost, "{members} members, seed {seed}");
        }
    }
}

#[test]
fn a_cluster_cut_in_two_lives_on_and_heals() {
    for (left, members) in [(5, 10), (3, 10), (1, 2), (4, 5)] {
        let (mut slowest, mut shaken) = (Duration::ZERO, 0);
        for seed in 0..5 {
            let mut cluster = settled(members, seed);
            for node in 0..left {
                cluster.set_group(node, 1);
            }
            cluster.run_for(30 * SECOND);
            let counts: Vec<_> = (0..members as usize)
                .map(|node| cluster.membership(node).unwrap().view().members.len())
                .collect();
            for (node, count) in counts.iter().enumerate() {
                assert_eq!(*count, if node < left { left } else { members as usize - left });
                let membership = cluster.membership(node).unwrap();
                assert_eq!(membership.state(), MemberState::Active);
                assert!(membership.lease_valid_until().unwrap() > cluster.now());
            }
            forget(&mut cluster);
            cluster.heal();
            slowest = slowest.max(settles(&mut cluster, 60 * SECOND));
            shaken += usize::from(said(&cluster, 0..members as usize, down));
        }
        println!("{left} of {members}: healed within {slowest:?}; shaken in {shaken} of 5");
        assert!(slowest < 15 * SECOND);
    }
}

#[test]
fn a_restart_without_state_is_a_crash_and_a_join() {
    for pause in [Duration::ZERO, Duration::from_millis(500), 5 * SECOND] {
        for seed in 0..10 {
            let mut cluster = settled(5, seed);
            let before = cluster.membership(0).unwrap().view().digest;
            cluster.kill(4);
            cluster.run_for(pause);
            cluster.start(4, reborn(5)).unwrap();
            let took = settles(&mut cluster, 10 * SECOND);
            assert!(took < 2 * SECOND, "pause {pause:?} seed {seed}: {took:?}");
            let reason = if pause < SECOND { DownReason::Restarted } else { DownReason::Confirmed };
            let expected = Event::MemberDown { id: MemberId(5), reason };
            assert!(all_say(&cluster, 0..4, |event| *event == expected), "pause {pause:?} seed {seed}");
            assert_ne!(cluster.membership(0).unwrap().view().digest, before);
            assert_eq!(cluster.membership(0).unwrap().view().get(MemberId(5)).unwrap().boot, 2);
        }
    }
}

#[test]
fn a_restart_with_state_is_the_same_member() {
    for pause in [Duration::ZERO, Duration::from_millis(500)] {
        for seed in 0..10 {
            let mut cluster = settled(5, seed);
            let ranked = |cluster: &Cluster| {
                let view = cluster.membership(0).unwrap().view();
                view.ranked().map(|member| (member.id, member.boot)).collect::<Vec<_>>()
            };
            let before = ranked(&cluster);
            cluster.kill(4);
            cluster.run_for(pause);
            cluster.start(4, adopted(5)).unwrap();
            settles(&mut cluster, 5 * SECOND);
            cluster.run_for(5 * SECOND);
            assert!(!said(&cluster, 0..5, down), "pause {pause:?} seed {seed}");
            assert_eq!(ranked(&cluster), before);
        }
    }
}

#[test]
fn a_clock_that_ran_backwards_does_not_keep_a_member_out() {
    let mut cluster = empty(1);
    for id in 1..=3 {
        cluster.add(Config { boot: 1000, session: 1000, ..lan(id) }).unwrap();
    }
    settles(&mut cluster, 10 * SECOND);
    cluster.kill(2);
    cluster.run_for(5 * SECOND);
    cluster.start(2, Config { boot: 10, session: 10, ..lan(3) }).unwrap();
    settles(&mut cluster, 10 * SECOND);
    assert!(cluster.membership(0).unwrap().view().get(MemberId(3)).unwrap().boot > 1000);
    assert!(cluster.membership(0).unwrap().counters().stale > 0);
}

#[test]
fn a_change_of_address_is_no_change_of_member() {
    for seed in 0..10 {
        let mut cluster = settled(5, seed);
        let before = cluster.membership(0).unwrap().view().digest;
        let moved = ([10, 9, 9, 9], 7946).into();
        cluster.change_address(4, moved).unwrap();
        settles(&mut cluster, 5 * SECOND);
        cluster.run_for(5 * SECOND);
        assert!(!said(&cluster, 0..5, down), "seed {seed}");
        for node in 0..5 {
            let view = cluster.membership(node).unwrap().view();
            assert_eq!(view.digest, before);
            assert_eq!(view.get(MemberId(5)).unwrap().address, moved);
        }
        assert!(all_say(&cluster, 0..4, |event| *event == Event::MemberChanged(MemberId(5))));
    }
}

#[test]
fn a_graceful_leave_is_known_at_once_and_as_such() {
    let mut slowest = Duration::ZERO;
    for seed in 0..20 {
        let mut cluster = settled(10, seed);
        let from = cluster.now();
        cluster.with(4, |membership, now| membership.leave(now));
        cluster.run_until(5 * SECOND, |cluster| said(cluster, [4], |event| *event == Event::Left)).unwrap();
        assert!(cluster.now() - from < SECOND);
        cluster.kill(4);
        cluster.run_for(2 * SECOND);
        let others = || (0..10).filter(|node| *node != 4);
        let left = Event::MemberDown { id: MemberId(5), reason: DownReason::Left };
        assert!(all_say(&cluster, others(), |event| *event == left), "seed {seed}");
        assert!(!said(&cluster, others(), |event| matches!(event, Event::Liveness { .. })), "seed {seed}");
        for node in others() {
            let at = cluster.nodes[node].events.iter().find(|(_, event)| *event == left).unwrap().0;
            slowest = slowest.max(at - from);
        }
        // And it may come back.
        cluster.start(4, reborn(5)).unwrap();
        settles(&mut cluster, 5 * SECOND);
    }
    println!("slowest {slowest:?}");
    assert!(slowest < Duration::from_millis(500));
}

#[test]
fn who_begins_to_leave_ranks_no_more_and_is_still_there() {
    let mut cluster = settled(3, 1);
    cluster.with(2, |membership, now| membership.begin_leave(now));
    cluster.run_for(SECOND);
    for node in 0..3 {
        let view = cluster.membership(node).unwrap().view();
        assert_eq!(view.members.len(), 3);
        assert_eq!(view.ranked().map(|member| member.id.0).collect::<Vec<_>>(), [1, 2]);
    }
    assert!(!said(&cluster, 0..3, down));
}

#[test]
fn a_joiner_that_differs_is_refused_with_the_field_named() {
    type Change = fn(&mut Config);
    let fields: [(SharedField, Change); 5] = [
        (SharedField::HashSeed, |config| config.shared.hash_seed = Digest(1)),
        (SharedField::Scoring, |config| config.shared.scoring = Digest(1)),
        (SharedField::Rows, |config| config.shared.rows = Digest(1)),
        (SharedField::Services, |config| config.shared.services = Digest(1)),
        (SharedField::Timing, |config| config.timing.confirm_after = 3 * SECOND),
    ];
    for (field, change) in fields {
        let mut cluster = settled(3, 1);
        let mut wrong = lan(4);
        change(&mut wrong);
        let node = cluster.add(wrong).unwrap();
        cluster.run_for(20 * SECOND);
        let refusal = cluster.nodes[node].events.iter().find_map(|(_, event)| match event {
            Event::Refused { by, reason } => Some(reason.sentence(*by)),
            _ => None,
        });
        let sentence = refusal.unwrap();
        assert!(sentence.starts_with(field.name()), "{sentence}");
        assert_eq!(cluster.membership(node).unwrap().state(), MemberState::Joining);
        assert!((0..3).all(|node| cluster.membership(node).unwrap().view().members.len() == 3));
        // The twin: put right, it joins.
        cluster.start(node, Config { session: 2, ..lan(4) }).unwrap();
        settles(&mut cluster, 5 * SECOND);
    }
}

#[test]
fn of_two_joiners_that_differ_one_gives_way() {
    let mut cluster = empty(1);
    cluster.add(lan(1)).unwrap();
    let mut wrong = lan(2);
    wrong.shared.services = Digest(9);
    cluster.add(wrong).unwrap();
    cluster.run_for(8 * SECOND);
    assert_eq!(cluster.membership(0).unwrap().state(), MemberState::Active);
    assert_eq!(cluster.membership(1).unwrap().state(), MemberState::Joining);
    assert!(said(&cluster, [1], |event| matches!(event, Event::Refused { .. })));
    assert!(!said(&cluster, [0], |event| matches!(event, Event::Refused { .. })));
}

#[test]
fn members_stay_members_while_a_shared_setting_is_rolled_out() {
    let mut cluster = settled(5, 1);
    let mut shared = lan(1).shared;
    shared.services = Digest(7);
    for node in 0..3 {
        cluster.with(node, |membership, _| membership.set_shared(shared.clone()));
    }
    cluster.run_for(20 * SECOND);
    assert!(!said(&cluster, 0..5, down));
    assert!(cluster.is_settled());
    // Half way, it is said; to a member asked by one that differs, sooner or later.
    assert!(said(&cluster, 0..5, |event| matches!(
        event,
        Event::Warning(Warning::SharedDiffers { field: SharedField::Services, .. })
    )));
}

#[test]
fn a_second_process_with_the_id_of_a_live_member_is_refused() {
    let mut cluster = settled(3, 1);
    let mut twin = Config { address: address(77), session: 5, boot: 5, ..lan(2) };
    twin.metadata.transfer_address = None;
    let node = cluster.add(twin).unwrap();
    cluster.run_for(20 * SECOND);
    let refused = Event::Refused { by: MemberId(1), reason: Refusal::IdInUse(address(2)) };
    assert!(said(&cluster, [node], |event| {
        matches!((event, &refused), (Event::Refused { reason: a, .. }, Event::Refused { reason: b, .. }) if a == b)
    }));
    assert!(!said(&cluster, 0..3, down));
    // The twin of the twin: a member that has moved while it was down may come back at once.
    cluster.kill(node);
    cluster.kill(1);
    cluster.run_for(Duration::from_millis(100));
    let moved = Config { address: address(78), session: 6, boot: 6, ..lan(2) };
    cluster.start(1, moved).unwrap();
    cluster.nodes.truncate(3);
    settles(&mut cluster, 5 * SECOND);
}

#[test]
fn differing_backends_are_a_warning_on_every_member() {
    let mut cluster = settled(3, 1);
    let mut metadata = lan(3).metadata;
    metadata.backends = Digest(5);
    cluster.with(2, |membership, now| membership.update_metadata(now, metadata)).unwrap().unwrap();
    cluster.run_for(SECOND);
    let warned = |event: &Event| matches!(event, Event::Warning(Warning::BackendsDiffer(_)));
    assert!(all_say(&cluster, 0..3, warned));
    let count = |cluster: &Cluster, node: usize| {
        cluster.nodes[node].events.iter().filter(|(_, event)| warned(event)).count()
    };
    cluster.run_for(30 * SECOND);
    assert_eq!([count(&cluster, 0), count(&cluster, 1), count(&cluster, 2)], [1, 1, 2]);
}

#[test]
fn metadata_reaches_everybody_and_late_joiners_with_push_pull_or_without() {
    for push_pull in [true, false] {
        let mut cluster = settled(10, 1);
        cluster.push_pull = push_pull;
        let changed = Metadata { weight: 5, site: "b".to_owned(), cache: true, ..lan(4).metadata };
        cluster.with(3, |membership, now| membership.update_metadata(now, changed.clone())).unwrap().unwrap();
        let took = cluster
            .run_until(5 * SECOND, |cluster| {
                (0..10).all(|node| {
                    cluster.membership(node).unwrap().view().get(MemberId(4)).unwrap().metadata.weight == 5
                })
            })
            .unwrap();
        assert!(took < Duration::from_millis(500), "{took:?}");
        cluster.run_for(SECOND);
        let node = cluster.add(lan(11)).unwrap();
        let took = settles(&mut cluster, 10 * SECOND);
        assert!(took < 2 * SECOND, "{took:?}");
        assert_eq!(*cluster.membership(node).unwrap().view().get(MemberId(4)).unwrap().metadata, changed);
    }
}

#[test]
fn counters_travel_with_the_id_message_and_digests_of_views_show_who_has_switched() {
    let mut cluster = settled(3, 1);
    let counted = Metadata { flows: 12, unprotected: 3, ..lan(2).metadata };
    cluster.with(1, |membership, now| membership.update_metadata(now, counted)).unwrap().unwrap();
    cluster.run_for(6 * SECOND);
    for node in 0..3 {
        let view = cluster.membership(node).unwrap().view();
        let second = view.get(MemberId(2)).unwrap();
        assert_eq!((second.metadata.flows, second.metadata.unprotected), (12, 3));
        assert!(view.members.iter().all(|member| member.view_digest == view.digest));
    }
    assert!(!said(&cluster, 0..3, |event| matches!(event, Event::MemberChanged(_))));
}

#[test]
fn a_dead_forwarder_is_a_dead_member_until_it_lives() {
    let mut cluster = settled(4, 1);
    cluster.with(3, |membership, now| membership.set_forwarder_alive(now, false));
    assert_eq!(cluster.membership(3).unwrap().lease_valid_until(), None);
    cluster.run_for(SECOND);
    let suspected =
        |event: &Event| *event == Event::Liveness { id: MemberId(4), liveness: Liveness::Suspect };
    assert!(all_say(&cluster, 0..3, suspected));
    cluster.run_for(3 * SECOND);
    assert!(all_say(&cluster, 0..3, down));
    cluster.with(3, |membership, now| membership.set_forwarder_alive(now, true));
    settles(&mut cluster, 5 * SECOND);
    assert!(!said(&cluster, [3], down));
}

#[test]
fn a_path_that_fails_the_echo_is_suspect_here_and_only_here() {
    let mut cluster = settled(4, 1);
    let echo = |cluster: &mut Cluster, ok| {
        cluster.with(0, |membership, now| membership.handle_echo_result(now, MemberId(2), ok))
    };
    for _ in 0..2 {
        echo(&mut cluster, false);
    }
    echo(&mut cluster, true);
    echo(&mut cluster, false);
    assert!(!said(&cluster, [0], |event| matches!(event, Event::Liveness { .. })));
    echo(&mut cluster, false);
    echo(&mut cluster, false);
    cluster.run_for(5 * SECOND);
    let member = cluster.membership(0).unwrap().view().get(MemberId(2)).unwrap().clone();
    assert_eq!((member.liveness, member.suspected, member.echo_failing), (Liveness::Suspect, false, true));
    assert!(said(&cluster, [0], |event| *event == Event::Warning(Warning::EchoFails(MemberId(2)))));
    assert_eq!(cluster.membership(2).unwrap().view().get(MemberId(2)).unwrap().liveness, Liveness::Alive);
    echo(&mut cluster, true);
    assert_eq!(cluster.membership(0).unwrap().view().get(MemberId(2)).unwrap().liveness, Liveness::Alive);
}

#[test]
fn a_stall_beyond_the_lease_is_reported_and_one_below_is_not() {
    for (length, reported) in [(SECOND, false), (3 * SECOND, true)] {
        let mut cluster = settled(3, 1);
        cluster.stall(2, length);
        cluster.run_for(length + SECOND);
        assert_eq!(said(&cluster, [2], |event| matches!(event, Event::Stalled { .. })), reported);
        assert!(!said(&cluster, [2], down));
    }
}

#[test]
fn who_is_heard_by_nobody_notices_before_its_lease_is_over() {
    let unheard = |event: &Event| matches!(event, Event::Unheard);
    let mut cluster = settled(4, 1);
    cluster.run_for(5 * SECOND);
    let times = |cluster: &Cluster, node: usize| {
        cluster.nodes[node]
            .events
            .iter()
            .filter(|(_, event)| unheard(event))
            .map(|(at, _)| *at)
            .collect::<Vec<_>>()
    };
    assert!((0..4).all(|node| times(&cluster, node).is_empty()), "the twin: all are heard");
    for round in 1..=2 {
        cluster.set_group(2, 1);
        let cut_off = cluster.now();
        cluster.run_for(SECOND);
        let said = times(&cluster, 2);
        assert_eq!(said.len(), round, "once for each time");
        assert!(said.last().expect("said").duration_since(cut_off) < Timing::lan().lease / 2 + SECOND / 10);
        assert!([0, 1, 3].iter().all(|node| times(&cluster, *node).is_empty()));
        cluster.heal();
        cluster.run_for(3 * SECOND);
    }
}

#[test]
fn a_round_trip_too_long_for_the_profile_is_said_and_the_profile_named() {
    let slow =
        Network { latency_min: Duration::from_millis(9), latency_max: Duration::from_millis(10), loss: 0.0 };
    for (network, warned) in [(slow, true), (Network::lan(0.0), false)] {
        let mut cluster = Cluster::new(epoch(), 1, network);
        cluster.add(lan(1)).unwrap();
        cluster.add(lan(2)).unwrap();
        cluster.run_for(10 * SECOND);
        let warning = cluster.nodes[0].events.iter().find_map(|(_, event)| match event {
            Event::Warning(warning @ Warning::SlowPath { .. }) => Some(warning.to_string()),
            _ => None,
        });
        assert_eq!(warning.is_some(), warned);
        assert!(warning.is_none_or(|sentence| sentence.contains("profile = \"wan\"")));
    }
}

#[test]
fn the_same_seed_gives_the_same_run() {
    let run = |seed| {
        let epoch = epoch();
        let mut cluster = trial::settled(epoch, &Timing::lan(), Network::lan(0.05), 5, seed).unwrap();
        cluster.run_for(5 * SECOND);
        let counters: Vec<_> = (0..5).map(|node| *cluster.membership(node).unwrap().counters()).collect();
        (cluster.now() - epoch, counters)
    };
    assert_eq!(run(1), run(1));
    assert_ne!(run(1), run(2));
}

#[test]
fn every_command_in_every_state_leads_where_the_diagram_says() {
    use MemberState::{Active, Joining, Leaving};
    type Command = fn(&mut Membership, Instant);
    let commands: [(&str, Command); 4] = [
        ("activate", Membership::activate),
        ("begin_leave", Membership::begin_leave),
        ("leave", Membership::leave),
        ("timeout", Membership::handle_timeout),
    ];
    let table = [
        (Joining, [Active, Leaving, Leaving, Joining]),
        // A leave is planned: its own word that it has sent what it holds is still missing, and is given below.
        (Active, [Active, Active, Leaving, Active]),
        (Leaving, [Leaving, Leaving, Leaving, Leaving]),
    ];
    for (from, expected) in table {
        for ((name, command), expected) in commands.iter().zip(expected) {
            let now = epoch();
            let mut membership = Membership::new(Config { hold_joining: true, ..lan(1) }, 1, now).unwrap();
            match from {
                Joining => {}
                Active => membership.activate(now),
                Leaving => membership.begin_leave(now),
            }
            assert_eq!(membership.state(), from);
            command(&mut membership, now);
            assert_eq!(membership.state(), expected, "{name} in {from:?}");
            if let Some(pending) = membership.view().pending {
                membership.report_done(now, Digest(pending.0 ^ 1));
                assert_eq!(membership.state(), expected, "done with something else");
                membership.report_done(now, pending);
                assert_eq!(membership.state(), Leaving, "done");
            }
        }
    }
}

/// Member 2 dies and is started again half a second later; whether the others ever saw another view than the one with all three.
fn others_saw_another_view(seed: u64, again: Config) -> bool {
    let mut cluster = settled(3, seed);
    cluster.kill(1);
    cluster.run_for(SECOND / 2);
    let resumes = again.resume;
    cluster.start(1, again).unwrap();
    assert_eq!(cluster.membership(1).unwrap().is_resuming(), resumes);
    if resumes {
        assert_eq!(
            cluster.membership(1).unwrap().lease_valid_until(),
            None,
            "the lease is the earlier start's"
        );
    }
    settles(&mut cluster, 10 * SECOND);
    assert!(!cluster.membership(1).unwrap().is_resuming());
    // The lease comes with the first probe that is answered.
    cluster.run_for(SECOND);
    assert!(cluster.membership(1).unwrap().lease_valid_until().is_some());
    said(&cluster, [0, 2], |event| matches!(event, Event::ViewChanged(_)) || down(event))
}

#[test]
fn a_start_that_resumes_is_active_to_the_others_from_its_first_word_on() {
    for seed in 0..20 {
        assert!(!others_saw_another_view(seed, Config { resume: true, ..adopted(2) }), "seed {seed}");
    }
}

/// With a table of those alone whom it has met by then it would ask the wrong members, and take itself for the owner of most rows.
#[test]
fn a_start_that_resumes_is_active_once_it_knows_all_who_are_there() {
    // Datagrams overtake each other, and some are lost.
    let busy = Network {
        latency_min: Duration::from_micros(100),
        latency_max: Duration::from_millis(12),
        loss: 0.1,
    };
    for seed in 0..40 {
        let mut cluster = trial::settled(epoch(), &Timing::lan(), busy, 5, seed).unwrap();
        cluster.kill(1);
        cluster.run_for(SECOND / 2);
        cluster.start(1, Config { resume: true, ..adopted(2) }).unwrap();
        let is_active = |cluster: &Cluster| {
            cluster.membership(1).is_some_and(|member| member.state() == MemberState::Active)
        };
        cluster.run_until(5 * SECOND, is_active).expect("active");
        assert_eq!(cluster.membership(1).unwrap().view().members.len(), 5, "seed {seed}");
    }
}

#[test]
fn a_start_that_does_not_resume_is_seen_joining_even_with_its_old_boot() {
    assert!(others_saw_another_view(1, adopted(2)));
}

#[test]
fn a_start_whose_tables_are_older_than_what_the_others_know_does_not_resume() {
    let mut cluster = settled(3, 5);
    cluster.kill(1);
    cluster.start(1, Config { boot: 7, session: 7, ..lan(2) }).unwrap();
    settles(&mut cluster, 10 * SECOND);
    cluster.kill(1);
    cluster.start(1, Config { boot: 3, session: 8, resume: true, ..lan(2) }).unwrap();
    settles(&mut cluster, 20 * SECOND);
    assert_eq!(cluster.membership(1).unwrap().identity().boot, 8);
}
