//! How fast a death is noticed and how seldom a life is doubted: short versions of `cargo xtask membership`.
use std::time::{Duration, Instant};

use phalanx_membership::{
    Timing,
    harness::Network,
    trial::{self, quantile},
};

fn epoch() -> Instant {
    #[expect(
        clippy::disallowed_methods,
        reason = "virtual time has to start somewhere; nothing depends on where"
    )]
    Instant::now()
}

fn kills(members: u32, trials: u64) -> (Vec<Duration>, Vec<Duration>) {
    let epoch = epoch();
    let (mut suspected, mut confirmed) = (Vec::new(), Vec::new());
    for seed in 0..trials {
        let kill = trial::kill(epoch, &Timing::lan(), Network::lan(0.01), members, seed).unwrap();
        suspected.push(kill.suspected);
        confirmed.push(kill.confirmed);
    }
    suspected.sort_unstable();
    confirmed.sort_unstable();
    (suspected, confirmed)
}

#[test]
fn a_killed_member_of_ten_is_suspected_in_800_ms_and_confirmed_in_3_s() {
    let (suspected, confirmed) = kills(10, 100);
    println!(
        "suspected p50 {:?} p99 {:?} max {:?}",
        quantile(&suspected, 0.5),
        quantile(&suspected, 0.99),
        suspected.last()
    );
    println!(
        "confirmed p50 {:?} p99 {:?} max {:?}",
        quantile(&confirmed, 0.5),
        quantile(&confirmed, 0.99),
        confirmed.last()
    );
    assert!(quantile(&suspected, 0.99) <= Duration::from_millis(800));
    assert!(quantile(&confirmed, 0.99) <= Duration::from_secs(3));
    // The twin: nobody can confirm before the suspect had its time to refute.
    assert!(confirmed[0] >= Timing::lan().confirm_after);
}

#[test]
fn a_killed_member_of_a_hundred_is_suspected_in_800_ms_and_confirmed_in_3_s() {
    let (suspected, confirmed) = kills(100, 3);
    println!("suspected {suspected:?} confirmed {confirmed:?}");
    assert!(suspected[2] <= Duration::from_millis(1000));
    assert!(confirmed[2] <= Duration::from_secs(3));
}

#[test]
fn nobody_is_confirmed_down_by_mistake_at_five_percent_loss() {
    let quiet =
        trial::quiet(epoch(), &Timing::lan(), Network::lan(0.05), 10, 1, Duration::from_secs(300)).unwrap();
    println!("{quiet:?}");
    assert_eq!(quiet.false_confirmations, 0);
    assert_eq!(quiet.renewals, 0);
    assert!(quiet.shortest_lease > Duration::from_millis(500));
    // The twin: the losses do hurt, or the test would prove nothing.
    let storm = trial::quiet(epoch(), &Timing::lan(), Network::lan(0.6), 10, 1, Duration::from_secs(60)).ok();
    assert!(storm.is_none_or(|storm| storm.suspicions > 0));
}

#[test]
fn a_process_stalled_for_a_second_is_suspected_and_comes_back() {
    for seed in 0..10 {
        let stall =
            trial::stall(epoch(), &Timing::lan(), Network::lan(0.01), 10, seed, Duration::from_secs(1))
                .unwrap();
        println!("{stall:?}");
        assert_eq!(stall.suspected_by, 9, "seed {seed}");
        assert_eq!(stall.confirmed_by, 0, "seed {seed}");
        assert!(stall.recovered.is_some_and(|after| after < Duration::from_secs(1)), "seed {seed}");
    }
}

#[test]
fn a_process_stalled_for_five_seconds_is_confirmed_down_and_comes_back() {
    for seed in 0..5 {
        let stall =
            trial::stall(epoch(), &Timing::lan(), Network::lan(0.01), 10, seed, Duration::from_secs(5))
                .unwrap();
        println!("{stall:?}");
        // It is; and it confirms nobody itself, though it heard nobody for five seconds.
        assert_eq!(stall.confirmed_by, 9, "seed {seed}");
        assert!(stall.recovered.is_some_and(|after| after < Duration::from_secs(3)), "seed {seed}");
    }
}

#[test]
fn the_wan_profile_confirms_nobody_by_mistake_over_a_wan() {
    let quiet =
        trial::quiet(epoch(), &Timing::wan(), Network::wan(0.05), 10, 1, Duration::from_secs(300)).unwrap();
    println!("{quiet:?}");
    assert_eq!(quiet.false_confirmations, 0);
    // The twin: the LAN profile's probes time out there.
    let lan =
        trial::quiet(epoch(), &Timing::lan(), Network::wan(0.05), 10, 1, Duration::from_secs(60)).unwrap();
    assert!(lan.suspicions > quiet.suspicions);
}
