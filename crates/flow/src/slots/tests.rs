use core::net::{IpAddr, Ipv4Addr};
use std::collections::BTreeMap;
use std::vec::Vec;

use super::*;
use crate::entry::Method;

const KEY: [u64; 2] = [3, 4];

fn id(n: u32) -> BackendId {
    BackendId::new(IpAddr::V4(Ipv4Addr::from_bits(0x0a01_0000 + n)), Method::IpIp, 0)
}

fn backends(weights: &[u32]) -> Vec<RankedBackend> {
    (1..).zip(weights).map(|(n, weight)| RankedBackend { id: id(n), weight: *weight }).collect()
}

fn slots(table: &BackendTable) -> Vec<Option<BackendId>> {
    (0..=u16::MAX).map(|slot| table.best(slot)).collect()
}

fn counts(table: &BackendTable) -> BTreeMap<BackendId, usize> {
    let mut counts = BTreeMap::new();
    for backend in slots(table).into_iter().flatten() {
        *counts.entry(backend).or_default() += 1;
    }
    counts
}

fn share(table: &BackendTable, n: u32) -> usize {
    counts(table).get(&id(n)).copied().unwrap_or(0)
}

/// The ideal: every slot that moves, moves to or from the one backend that changed, and always the same way; so the number that
/// moves is the difference of its shares, and no change could do with fewer.
fn assert_ideal(before: &BackendTable, after: &BackendTable, n: u32) {
    let (had, has) = (share(before, n), share(after, n));
    let moved: Vec<u16> = before.changed_slots(after).collect();
    assert_eq!(moved.len(), had.abs_diff(has));
    assert!(!moved.is_empty());
    for slot in moved {
        let (from, to) = (before.best(slot), after.best(slot));
        assert_ne!(from, to);
        assert_eq!(if has > had { to } else { from }, Some(id(n)));
    }
    // And the shares are what the weights say: four standard deviations.
    let total: u32 = after.backends().iter().map(|backend| backend.weight).sum();
    for RankedBackend { id, weight } in after.backends() {
        let p = f64::from(weight) / f64::from(total);
        let expected = SLOTS as f64 * p;
        let found = counts(after).get(&id).copied().unwrap_or(0) as f64;
        assert!(
            (found - expected).abs() <= 4.0 * (expected * (1.0 - p)).sqrt(),
            "{id:?}: {found} of {expected}"
        );
    }
}

#[test]
fn a_backend_added_takes_its_ideal_share_and_nothing_else_moves() {
    for weights in [&[1, 1, 1, 1][..], &[1, 2, 3, 4]] {
        let before = BackendTable::new(KEY, &backends(weights));
        for weight in [1, 3] {
            let mut after = before.clone();
            after.add(RankedBackend { id: id(9), weight });
            assert_ideal(&before, &after, 9);
        }
    }
}

#[test]
fn a_backend_removed_moves_its_own_slots_and_nothing_else() {
    for weights in [&[1, 1, 1, 1][..], &[1, 2, 3, 4]] {
        let before = BackendTable::new(KEY, &backends(weights));
        let mut after = before.clone();
        assert!(after.remove(&id(3)));
        assert_ideal(&before, &after, 3);
        assert!(!after.remove(&id(3)));
    }
}

#[test]
fn a_backend_drained_moves_what_removing_it_moves_and_gets_it_back() {
    let before = BackendTable::new(KEY, &backends(&[1, 2, 3]));
    let mut drained = before.clone();
    assert!(drained.reweight(&id(2), 0));
    assert_ideal(&before, &drained, 2);
    assert_eq!(share(&drained, 2), 0);
    let mut removed = before.clone();
    removed.remove(&id(2));
    assert_eq!(slots(&drained), slots(&removed));
    assert!(drained.backends().iter().any(|backend| backend.id == id(2)));
    drained.reweight(&id(2), 2);
    assert_eq!(slots(&drained), slots(&before));
}

#[test]
fn a_backend_reweighted_moves_the_difference_and_nothing_else() {
    let before = BackendTable::new(KEY, &backends(&[2, 2, 4, 1]));
    for weight in [1, 3, 7] {
        let mut after = before.clone();
        assert!(after.reweight(&id(1), weight));
        assert_ideal(&before, &after, 1);
    }
    assert!(!before.clone().reweight(&id(8), 1));
}

/// Its twin: a table that deals slots out in turn moves far more than the ideal, and the measure sees it.
#[test]
#[should_panic(expected = "left == right")]
fn the_ideal_is_missed_by_another_key() {
    let before = BackendTable::new(KEY, &backends(&[1, 1, 1]));
    let after = BackendTable::new([5, 6], &backends(&[1, 1, 1, 1]));
    assert_ideal(&before, &after, 4);
}

#[test]
fn members_that_disagree_on_one_backend_agree_on_all_others() {
    let full = BackendTable::new(KEY, &backends(&[1, 1, 1, 1]));
    let without = BackendTable::new(KEY, &backends(&[1, 1, 0, 1]));
    for slot in 0..=u16::MAX {
        assert!(full.best(slot) == Some(id(3)) || full.best(slot) == without.best(slot));
    }
}

#[test]
fn the_order_in_the_configuration_does_not_matter() {
    let forward = backends(&[1, 2, 3, 1]);
    let backward: Vec<RankedBackend> = forward.iter().rev().copied().collect();
    let expected = slots(&BackendTable::new(KEY, &forward));
    assert_eq!(slots(&BackendTable::new(KEY, &backward)), expected);
    // Nor the order of changes.
    let mut changed = BackendTable::new(KEY, &backends(&[9, 9]));
    changed.remove(&id(1));
    changed.add(RankedBackend { id: id(4), weight: 1 });
    changed.add(RankedBackend { id: id(3), weight: 3 });
    changed.add(RankedBackend { id: id(1), weight: 1 });
    changed.add(RankedBackend { id: id(2), weight: 2 });
    assert_eq!(slots(&changed), expected);
    assert_eq!(changed.backends(), forward);
}

#[test]
fn setting_the_backends_equals_a_rebuild() {
    let base: Vec<RankedBackend> = backends(&[1; 20]);
    for wanted in [
        backends(&[]),
        backends(&[1; 21]),
        backends(&[1; 19]),
        backends(&[5, 4, 3, 2, 1, 0]),
        base.iter()
            .copied()
            .map(|b| RankedBackend { weight: if b.id == id(7) { 3 } else { 1 }, ..b })
            .collect(),
    ] {
        let mut table = BackendTable::new(KEY, &base);
        table.set_backends(&wanted);
        assert_eq!(slots(&table), slots(&BackendTable::new(KEY, &wanted)));
        assert_eq!(table.backends(), wanted);
    }
}

#[test]
fn a_service_without_backends_has_none() {
    for list in [backends(&[]), backends(&[0, 0])] {
        let table = BackendTable::new(KEY, &list);
        assert!(slots(&table).iter().all(Option::is_none));
        assert!(table.to_indexes(|_| BackendIndex(1)).iter().all(|index| *index == BackendIndex::NONE));
    }
}

#[test]
fn of_a_backend_listed_twice_the_largest_weight_counts() {
    let twice = [
        RankedBackend { id: id(1), weight: 1 },
        RankedBackend { id: id(1), weight: 5 },
        RankedBackend { id: id(2), weight: 1 },
    ];
    let table = BackendTable::new(KEY, &twice);
    assert_eq!(table.backends(), backends(&[5, 1]));
}

#[test]
fn indexes_stand_for_the_best_backends() {
    let table = BackendTable::new(KEY, &backends(&[1, 2, 3]));
    let indexes = table.to_indexes(|id| BackendIndex(u32::from(id.address[15]) + 100));
    assert_eq!(indexes.len(), SLOTS);
    for (slot, index) in (0..=u16::MAX).zip(indexes) {
        assert_eq!(index.0, u32::from(table.best(slot).unwrap().address[15]) + 100);
    }
}

#[test]
fn method_and_port_are_part_of_the_name() {
    let address = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1));
    let one = BackendTable::new(KEY, &backends(&[1, 1]));
    for other in [BackendId::new(address, Method::Gue, 6080), BackendId::new(address, Method::Gue, 6081)] {
        let mut with = one.clone();
        with.add(RankedBackend { id: other, weight: 1 });
        let won: Vec<u16> = one.changed_slots(&with).collect();
        assert!(won.iter().all(|slot| with.best(*slot) == Some(other)));
        assert!((won.len() as f64 - SLOTS as f64 / 3.0).abs() < 500.0, "{}", won.len());
    }
}

/// Part of what members must agree on: a change of these values breaks a running cluster.
#[test]
fn the_slots_are_what_they_were() {
    let table = BackendTable::new(KEY, &backends(&[1, 2, 3]));
    let last: Vec<u8> = (0..16).map(|slot| table.best(slot).unwrap().address[15]).collect();
    assert_eq!(last, [3, 3, 3, 3, 3, 3, 2, 3, 3, 3, 3, 2, 3, 2, 2, 2]);
}
