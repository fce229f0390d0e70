//! What caches save when owner and backup are lost in one moment.

use super::*;

/// Of the flows that members 2 and 3 hold, and a cache has in this state, how many are at their new holders once both are confirmed down, so
/// long after each other; and how many there were.
fn saved(between: Duration, state: FlowState) -> (usize, usize) {
    let mut site = Site::new(&[1, 2, 3, 4, 5]);
    site.see(&[1, 2, 3, 4, 5], &[], 1, None);
    site.members.get_mut(&5).expect("there").0.settings.cache = true;
    site.open();
    site.pass(LINGER + 4 * TICK);
    let lost: Vec<u16> =
        (0..FLOWS).filter(|n| site.holders(*n).iter().all(|id| [2, 3].contains(id))).collect();
    let owners: BTreeMap<u16, u32> = lost.iter().map(|n| (*n, site.holders(*n)[0])).collect();
    site.forwarder(5).upsert_cache(&lost.iter().map(|n| Record { state, ..record(*n) }).collect::<Vec<_>>());
    site.cut = [1, 2, 3, 4, 5].iter().flat_map(|&id| [(2, id), (3, id)]).collect();
    site.see(&[1, 3, 4, 5], &[], 2, None);
    site.pass(between);
    // Claim 20: what the departed owned is flushed, and what the other owns stays.
    let stays = site.forwarder(5).flush_cache();
    site.forwarder(5).upsert_cache(&stays);
    let stays: BTreeSet<FlowKey> = stays.iter().map(|record| record.key).collect();
    let owned: BTreeSet<FlowKey> = lost.iter().filter(|n| owners[*n] == 3).map(|n| key(*n)).collect();
    assert!(!owned.is_empty() && owned.len() < lost.len());
    assert_eq!(stays, owned);
    site.see(&[1, 4, 5], &[], 3, None);
    let has = |n: &&u16| site.holders(**n).into_iter().all(|id| site.has(id, **n));
    (lost.iter().filter(has).count(), lost.len())
}

#[test]
fn a_cache_gives_the_flows_of_owner_and_backup_that_are_lost_in_one_moment_to_the_new_holders() {
    let (count, all) = saved(4 * TICK, FlowState::Established);
    assert!(all > 2);
    assert_eq!(count, all);
    // The twin: what is lost later has been held by somebody else meanwhile, and nothing is kept for long.
    let (count, all) = saved(Duration::from_secs(11), FlowState::Established);
    assert!(count < all, "{count} of {all}");
}

#[test]
fn a_cache_does_not_offer_connections_that_have_ended() {
    let (count, all) = saved(4 * TICK, FlowState::Closing);
    assert!(all > 2);
    assert_eq!(count, 0);
}

/// A site in which member 4 has joined, and the flows that member 3, with or without a cache, held before and holds no more.
fn joined(cache: bool) -> (Site, Vec<u16>) {
    let mut site = Site::new(&[1, 2, 3, 4]);
    site.members.get_mut(&3).expect("there").0.settings.cache = cache;
    site.see(&[1, 2, 3], &[], 1, None);
    site.open();
    let held: Vec<u16> = (0..FLOWS).filter(|n| site.holders(*n).contains(&3)).collect();
    site.see(&[1, 2, 3], &[4], 1, Some(2));
    site.see(&[1, 2, 3, 4], &[], 2, None);
    let lost: Vec<u16> = held.into_iter().filter(|n| !site.holders(*n).contains(&3)).collect();
    assert!(lost.len() > 2 && lost.iter().all(|n| site.has(3, *n)));
    (site, lost)
}

#[test]
fn what_a_member_with_a_cache_holds_no_more_stays_there() {
    let (mut site, lost) = joined(true);
    let ended = Record { state: FlowState::Closing, update: 1, ..record(lost[0]) };
    site.forwarder(3).upsert(&[ended]);
    site.pass(LINGER + 4 * TICK);
    assert!(lost.iter().all(|n| !site.has(3, *n)), "the window is closed");
    let cached: BTreeSet<FlowKey> = site.forwarder(3).flush_cache().iter().map(|record| record.key).collect();
    assert_eq!(cached, lost[1..].iter().map(|n| key(*n)).collect());
    // The twin.
    let (mut site, _) = joined(false);
    site.pass(LINGER + 4 * TICK);
    assert_eq!(site.forwarder(3).flush_cache(), []);
}

#[test]
fn what_a_cache_is_told_of_a_flow_counts_for_what_is_held_from_former_times_too() {
    let (mut site, lost) = joined(true);
    let used_again = Record { birth: record(lost[0]).birth + 1, ..record(lost[0]) };
    let control = &mut site.members.get_mut(&3).expect("there").0;
    control.apply_one(&Apply::CacheUpsert(used_again));
    control.apply_one(&Apply::CacheRemove { key: key(lost[1]) });
    site.pass(LINGER + 4 * TICK);
    let cached = site.forwarder(3).flush_cache();
    let born = |n: u16| cached.iter().find(|record| record.key == key(n)).map(|record| record.birth);
    assert_eq!(born(lost[0]), Some(used_again.birth));
    assert_eq!(born(lost[1]), None);
    assert_eq!(born(lost[2]), Some(record(lost[2]).birth), "the twin");
}
