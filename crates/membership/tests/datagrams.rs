//! What a hostile or broken network can deliver: counted, dropped, and without effect.
use std::time::{Duration, Instant};

use phalanx_flow::MemberId;
use phalanx_membership::{
    Config, Input, KeyRing, Membership, Timing, Transmit,
    harness::{Cluster, Datagram, Network, address, config},
    trial,
};
use proptest::prelude::*;

fn epoch() -> Instant {
    #[expect(
        clippy::disallowed_methods,
        reason = "virtual time has to start somewhere; nothing depends on where"
    )]
    Instant::now()
}

fn settled(members: u32) -> Cluster {
    trial::settled(epoch(), &Timing::lan(), Network::lan(0.0), members, 1).unwrap()
}

#[test]
fn replayed_datagrams_are_counted_and_change_nothing() {
    let mut cluster = settled(3);
    cluster.tap = Some(Vec::new());
    cluster.run_for(Duration::from_secs(1));
    let recorded = cluster.tap.take().unwrap();
    let mine: Vec<_> = recorded.into_iter().filter(|datagram| datagram.transmit.to == address(1)).collect();
    let before = *cluster.membership(0).unwrap().counters();
    let count = mine.len() as u64;
    assert!(count > 10);
    for datagram in mine {
        cluster.inject(datagram);
    }
    cluster.run_for(Duration::ZERO);
    let after = cluster.membership(0).unwrap().counters();
    // The last few may have been on their way when the recording ended.
    assert!(after.replayed - before.replayed >= count - 5);
    assert!(cluster.is_settled());
}

#[test]
fn the_datagrams_of_an_earlier_life_are_stale() {
    let mut cluster = settled(3);
    cluster.tap = Some(Vec::new());
    cluster.run_for(Duration::from_secs(1));
    let recorded = cluster.tap.take().unwrap();
    cluster.kill(1);
    cluster.start(1, Config { boot: 2, session: 2, ..config(2, &Timing::lan()) }).unwrap();
    cluster.run_until(Duration::from_secs(5), Cluster::is_settled).unwrap();
    for node in &mut cluster.nodes {
        node.events.clear();
    }
    let before = *cluster.membership(0).unwrap().counters();
    for datagram in recorded.into_iter().filter(|datagram| datagram.from == address(2)) {
        cluster.inject(datagram);
    }
    cluster.run_for(Duration::from_secs(3));
    assert!(cluster.membership(0).unwrap().counters().stale - before.stale > 5);
    assert!(cluster.is_settled());
    assert!(cluster.nodes.iter().all(|node| node.events.is_empty()), "{:?}", cluster.nodes[0].events);
}

#[test]
fn damaged_and_foreign_datagrams_are_counted_apart() {
    let mut cluster = settled(2);
    cluster.tap = Some(Vec::new());
    cluster.run_for(Duration::from_secs(1));
    let good =
        cluster.tap.take().unwrap().into_iter().find(|datagram| datagram.transmit.to == address(1)).unwrap();
    let mut damaged = good.clone();
    *damaged.transmit.payload.last_mut().unwrap() ^= 1;
    // A replay is found before anything is deciphered; this one claims to be new.
    damaged.transmit.payload[28] ^= 0x40;
    let foreign =
        Datagram { transmit: Transmit { to: address(1), payload: b"GET / HTTP/1.1".to_vec() }, ..good };
    let before = *cluster.membership(0).unwrap().counters();
    cluster.inject(damaged);
    cluster.inject(foreign);
    cluster.run_for(Duration::ZERO);
    let after = cluster.membership(0).unwrap().counters();
    assert_eq!((after.damaged - before.damaged, after.foreign - before.foreign), (1, 1));
}

#[test]
fn a_member_with_another_key_or_another_cluster_name_stays_alone() {
    let mut cluster = settled(2);
    let other_key = Config { keys: KeyRing::new(vec![[1; 32]]).unwrap(), ..config(3, &Timing::lan()) };
    let other_name = Config { cluster: "other".to_owned(), ..config(4, &Timing::lan()) };
    cluster.add(other_key).unwrap();
    cluster.add(other_name).unwrap();
    cluster.run_for(Duration::from_secs(10));
    for (node, members) in [(0, 2), (1, 2), (2, 1), (3, 1)] {
        assert_eq!(cluster.membership(node).unwrap().view().members.len(), members);
    }
    let counters = cluster.membership(0).unwrap().counters();
    assert!(counters.foreign > 0 && counters.damaged > 0);
}

#[test]
fn keys_rotate_in_a_running_cluster() {
    let mut cluster = settled(5);
    for node in &mut cluster.nodes {
        node.events.clear();
    }
    let (old, new) = ([42; 32], [43; 32]);
    for keys in [vec![old, new], vec![new, old], vec![new]] {
        let ring = KeyRing::new(keys).unwrap();
        for node in 0..5 {
            cluster.with(node, |membership, _| membership.set_keys(&ring));
            cluster.run_for(Duration::from_secs(1));
        }
    }
    assert!(cluster.is_settled());
    assert!(cluster.nodes.iter().all(|node| node.events.is_empty()));
    // The twin: a member that did not follow is out.
    cluster.with(4, |membership, _| membership.set_keys(&KeyRing::new(vec![old]).unwrap()));
    cluster.run_for(Duration::from_secs(5));
    assert_eq!(cluster.membership(0).unwrap().view().members.len(), 4);
}

fn lone(now: Instant) -> Membership {
    Membership::new(config(1, &Timing::lan()), 1, now).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_datagram_and_no_stream_makes_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        let now = epoch();
        let mut membership = lone(now);
        membership.handle_datagram(now, address(2), &bytes);
        let _ = membership.handle_push_pull(now, &bytes);
        let _ = membership.handle_push_pull_reply(now, &bytes);
        prop_assert_eq!(membership.view().members.len(), 1);
    }

    #[test]
    fn no_damaged_push_pull_makes_it_panic(at in any::<prop::sample::Index>(), to in any::<u8>(), cut in any::<prop::sample::Index>()) {
        let now = epoch();
        let mut other = Membership::new(config(2, &Timing::lan()), 2, now).unwrap();
        let mut request = other.push_pull_request();
        let mut membership = lone(now);
        prop_assert!(membership.handle_push_pull(now, &request).is_ok());
        prop_assert!(membership.view().get(MemberId(2)).is_some_and(|member| member.known));
        let at = at.index(request.len());
        request[at] = to;
        let _ = lone(now).handle_push_pull(now, &request);
        request.truncate(cut.index(request.len()));
        let _ = lone(now).handle_push_pull(now, &request);
        other.handle(now, Input::Timeout);
    }
}
