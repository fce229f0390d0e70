use std::collections::BTreeMap;
use std::vec;
use std::vec::Vec;

use proptest::collection::vec as vec_of;
use proptest::prelude::*;

use super::*;
use crate::crc8;
use crate::key::FlowKey;
use crate::score::Best;

const RENDEZVOUS: Scoring = Scoring::Rendezvous { key: [11, 22] };
const HIGHEST: Scoring = Scoring::Crc8 { best: Best::Highest };
const LOWEST: Scoring = Scoring::Crc8 { best: Best::Lowest };
const ALL: [Scoring; 3] = [RENDEZVOUS, HIGHEST, LOWEST];
const ROWS: usize = 256;

fn member(id: u32, weight: u32) -> RankedMember {
    RankedMember { id: MemberId(id), weight, site: id % 2 }
}

fn members(weights: &[u32]) -> Vec<RankedMember> {
    (1..).zip(weights).map(|(id, weight)| member(id, *weight)).collect()
}

fn table(scoring: Scoring, members: &[RankedMember]) -> RowTable {
    RowTable::new(scoring, ROWS, BackupSite::Any, members).unwrap()
}

fn rankings(table: &RowTable) -> Vec<[Option<MemberId>; RANKS]> {
    (0..table.row_count() as u32).map(|row| table.ranking(row)).collect()
}

/// The ranking as the design says it: score all, sort, equal scores to the higher id, and the site rule on top.
fn plain(scoring: Scoring, site_rule: BackupSite, members: &[RankedMember], row: u32) -> Vec<MemberId> {
    let mut scored: Vec<(Score, RankedMember)> =
        members.iter().filter_map(|m| Some((scoring.score(row, m.id, m.weight)?, *m))).collect();
    scored.sort_by(|(a, a_member), (b, b_member)| {
        b.partial_cmp(a).unwrap().then(b_member.id.cmp(&a_member.id))
    });
    if site_rule == BackupSite::Other
        && let Some(at) = scored.iter().position(|(_, m)| m.site != scored[0].1.site)
    {
        let backup = scored.remove(at);
        scored.insert(1, backup);
    }
    scored.into_iter().map(|(_, m)| m.id).collect()
}

fn assert_plain(table: &RowTable) -> Result<(), TestCaseError> {
    let members = table.members();
    for row in 0..table.row_count() as u32 {
        let plain = plain(table.scoring(), table.site_rule(), &members, row);
        let expected: [Option<MemberId>; RANKS] = core::array::from_fn(|rank| plain.get(rank).copied());
        prop_assert_eq!(table.ranking(row), expected, "row {}", row);
    }
    Ok(())
}

/// What happens to one member of a small cluster.
#[derive(Clone, Copy, Debug)]
enum Change {
    Add(RankedMember),
    Remove(MemberId),
    Reweight(MemberId, u32),
}

fn change() -> impl Strategy<Value = Change> {
    // 0x11d is the polynomial: ids that differ by it have equal CRCs, always.
    let id = prop_oneof![0_u32..12, (0_u32..4).prop_map(|id| id ^ 0x11d)];
    let weight = prop_oneof![Just(0_u32), Just(1), Just(1), 1_u32..5, Just(u32::MAX)];
    (0..4, id, weight, 0_u32..3).prop_map(|(kind, id, weight, site)| match kind {
        0 | 1 => Change::Add(RankedMember { id: MemberId(id), weight, site }),
        2 => Change::Remove(MemberId(id)),
        _ => Change::Reweight(MemberId(id), weight),
    })
}

fn apply(members: &mut BTreeMap<MemberId, RankedMember>, change: Change) -> Result<(), RankingError> {
    match change {
        Change::Add(member) if members.contains_key(&member.id) => Err(RankingError::Duplicate(member.id)),
        Change::Add(member) => {
            members.insert(member.id, member);
            Ok(())
        }
        Change::Remove(id) => members.remove(&id).map(|_| ()).ok_or(RankingError::Unknown(id)),
        Change::Reweight(id, weight) => {
            members.get_mut(&id).map(|member| member.weight = weight).ok_or(RankingError::Unknown(id))
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn incremental_changes_equal_a_rebuild(
        changes in vec_of(change(), 1..24),
        which in 0_usize..3,
        other_site: bool,
    ) {
        let site_rule = if other_site { BackupSite::Other } else { BackupSite::Any };
        let mut table = RowTable::new(ALL[which], ROWS, site_rule, &[]).unwrap();
        let mut members = BTreeMap::new();
        for change in changes {
            let expected = apply(&mut members, change);
            let found = match change {
                Change::Add(member) => table.add(member),
                Change::Remove(id) => table.remove(id),
                Change::Reweight(id, weight) => table.reweight(id, weight),
            };
            prop_assert_eq!(found, expected);
            let list: Vec<RankedMember> = members.values().copied().collect();
            let rebuilt = RowTable::new(ALL[which], ROWS, site_rule, &list).unwrap();
            prop_assert_eq!(rankings(&table), rankings(&rebuilt));
            prop_assert_eq!(table.members(), list);
            prop_assert_eq!(table.changed_rows(&rebuilt).count(), 0);
        }
        assert_plain(&table)?;
    }

    #[test]
    fn setting_the_members_equals_a_rebuild(
        before in vec_of(change(), 0..16),
        after in vec_of(change(), 0..16),
        few: bool,
        which in 0_usize..3,
    ) {
        // Many members and few changes take the incremental way, the others are rebuilt.
        let mut start: BTreeMap<MemberId, RankedMember> =
            if few { (100..160).map(|id| (MemberId(id), member(id, 1))).collect() } else { BTreeMap::new() };
        for change in before {
            let _ = apply(&mut start, change);
        }
        let mut end = start.clone();
        for change in after {
            let _ = apply(&mut end, change);
        }
        let start: Vec<RankedMember> = start.into_values().collect();
        let end: Vec<RankedMember> = end.into_values().rev().collect();
        let mut table = RowTable::new(ALL[which], ROWS, BackupSite::Other, &start).unwrap();
        table.set_members(&end).unwrap();
        let rebuilt = RowTable::new(ALL[which], ROWS, BackupSite::Other, &end).unwrap();
        prop_assert_eq!(rankings(&table), rankings(&rebuilt));
        prop_assert_eq!(table.members(), rebuilt.members());
    }

    /// Design §3: the 256-row table is exactly the computation per connection (claims 3, 7 to 11).
    #[test]
    fn the_crc8_table_is_the_computation_per_connection(
        ids in proptest::collection::btree_map(any::<u32>(), 0_u32..4, 0..8),
        lowest: bool,
        client in (any::<[u8; 4]>(), any::<u16>()),
        service in (any::<[u8; 4]>(), any::<u16>()),
    ) {
        let key = FlowKey::new(
            6,
            (core::net::IpAddr::from(client.0), client.1),
            (core::net::IpAddr::from(service.0), service.1),
        ).unwrap();
        let mut message = [0_u8; 12];
        message[..2].copy_from_slice(&service.1.to_be_bytes());
        message[2..6].copy_from_slice(&service.0);
        message[6..8].copy_from_slice(&client.1.to_be_bytes());
        message[8..].copy_from_slice(&client.0);
        // The document's way: a CRC per member and connection, in floating point only because the test may.
        let mut scored: Vec<(f64, u32)> = ids
            .iter()
            .filter(|(_, weight)| **weight > 0)
            .map(|(id, weight)| {
                let crc = f64::from(crc8::tests::straightforward(MemberId(*id), message));
                let weight = f64::from(*weight);
                (if lowest { -crc / weight } else { crc * weight }, *id)
            })
            .collect();
        scored.sort_by(|a, b| b.partial_cmp(a).unwrap());
        let list: Vec<RankedMember> =
            ids.iter().map(|(id, weight)| RankedMember { id: MemberId(*id), weight: *weight, site: 0 }).collect();
        let table = table(if lowest { LOWEST } else { HIGHEST }, &list);
        let row = table.row_function().row_of(&key, 0x1234_5678_9abc_def0);
        let expected: [Option<MemberId>; RANKS] =
            core::array::from_fn(|rank| scored.get(rank).map(|(_, id)| MemberId(*id)));
        prop_assert_eq!(table.ranking(row), expected);
    }

    #[test]
    fn removing_the_owner_promotes_the_backup(
        weights in vec_of(1_u32..4, 1..7),
        which in 0_usize..3,
    ) {
        let before = table(ALL[which], &members(&weights));
        for gone in before.members() {
            let mut after = before.clone();
            after.remove(gone.id).unwrap();
            for row in 0..ROWS as u32 {
                let expected: Vec<Option<MemberId>> =
                    before.ranking(row).into_iter().filter(|id| *id != Some(gone.id)).collect();
                prop_assert_eq!(&after.ranking(row)[..expected.len()], &expected[..]);
            }
        }
    }

    #[test]
    fn the_next_owner_is_always_in_the_row_with_the_site_rule(
        weights in vec_of(1_u32..4, 1..7),
        which in 0_usize..3,
    ) {
        let before = RowTable::new(ALL[which], ROWS, BackupSite::Other, &members(&weights)).unwrap();
        for gone in before.members() {
            let mut after = before.clone();
            after.remove(gone.id).unwrap();
            for row in 0..ROWS as u32 {
                let [owner, backup, third] = before.ranking(row);
                if owner == Some(gone.id) {
                    let next = after.ranking(row)[0];
                    prop_assert!(next == backup || next == third);
                } else {
                    prop_assert_eq!(after.ranking(row)[0], owner);
                }
            }
        }
    }

    #[test]
    fn a_change_of_weight_moves_only_the_member_it_is_about(
        weights in vec_of(0_u32..4, 2..7),
        weight in 0_u32..6,
        which in 0_usize..3,
    ) {
        let before = table(ALL[which], &members(&weights));
        let mut after = before.clone();
        after.reweight(MemberId(1), weight).unwrap();
        for row in 0..ROWS as u32 {
            let without = |table: &RowTable| -> Vec<MemberId> {
                table.full_ranking(row).into_iter().map(|(id, _)| id).filter(|id| *id != MemberId(1)).collect()
            };
            prop_assert_eq!(without(&before), without(&after));
            let place = |table: &RowTable| {
                table.full_ranking(row).iter().position(|(id, _)| *id == MemberId(1)).unwrap_or(usize::MAX)
            };
            if weight >= weights[0] {
                prop_assert!(place(&after) <= place(&before));
            } else {
                prop_assert!(place(&after) >= place(&before));
            }
        }
    }
}

#[test]
fn the_order_of_the_list_does_not_matter() {
    for scoring in ALL {
        let forward = members(&[1, 2, 3, 1, 0]);
        let backward: Vec<RankedMember> = forward.iter().rev().copied().collect();
        assert_eq!(rankings(&table(scoring, &forward)), rankings(&table(scoring, &backward)));
    }
}

#[test]
fn a_table_without_members_ranks_nobody() {
    for scoring in ALL {
        for table in [table(scoring, &[]), table(scoring, &members(&[0, 0]))] {
            assert!(rankings(&table).iter().all(|row| *row == [None; RANKS]));
            assert!(table.to_rows(|_| MemberSlot(0)).iter().all(|row| *row == Row::EMPTY));
            assert!(table.full_ranking(0).is_empty());
        }
    }
}

#[test]
fn a_row_that_does_not_exist_ranks_nobody() {
    assert_eq!(table(RENDEZVOUS, &members(&[1])).ranking(ROWS as u32), [None; RANKS]);
}

#[test]
fn a_director_never_owns() {
    for scoring in ALL {
        let table = table(scoring, &members(&[1, 0, 1]));
        assert!(rankings(&table).iter().flatten().all(|id| *id != Some(MemberId(2))));
        assert!(table.members().contains(&member(2, 0)));
    }
}

#[test]
fn errors_name_the_member_and_leave_the_table() {
    let mut table = table(RENDEZVOUS, &members(&[1, 1]));
    let before = table.clone();
    assert_eq!(table.add(member(2, 5)), Err(RankingError::Duplicate(MemberId(2))));
    assert_eq!(table.remove(MemberId(9)), Err(RankingError::Unknown(MemberId(9))));
    assert_eq!(table.reweight(MemberId(9), 1), Err(RankingError::Unknown(MemberId(9))));
    let twice = [member(1, 1), member(1, 2)];
    assert_eq!(table.set_members(&twice), Err(RankingError::Duplicate(MemberId(1))));
    assert_eq!(table.changed_rows(&before).count(), 0);
    assert_eq!(
        RowTable::new(RENDEZVOUS, ROWS, BackupSite::Any, &twice).err(),
        Some(RankingError::Duplicate(MemberId(1)))
    );
    assert_eq!(RowTable::new(RENDEZVOUS, 100, BackupSite::Any, &[]).err(), Some(RankingError::Rows(100)));
    assert_eq!(RowTable::new(HIGHEST, 512, BackupSite::Any, &[]).err(), Some(RankingError::Rows(512)));
}

#[test]
fn changed_rows_are_those_that_differ() {
    let before = table(RENDEZVOUS, &members(&[1, 1, 1, 1, 1]));
    let mut after = before.clone();
    after.remove(MemberId(3)).unwrap();
    let changed: Vec<u32> = before.changed_rows(&after).collect();
    let expected: Vec<u32> =
        (0..ROWS as u32).filter(|row| before.ranking(*row).contains(&Some(MemberId(3)))).collect();
    assert_eq!(changed, expected);
    assert!(!changed.is_empty() && changed.len() < ROWS);
    let other = table(HIGHEST, &[]);
    assert_eq!(other.changed_rows(&table(RENDEZVOUS, &[])).count(), ROWS);
}

#[test]
fn rows_name_members_by_slot() {
    let table = table(RENDEZVOUS, &members(&[1, 1]));
    let rows = table.to_rows(|id| MemberSlot(id.0 as u16 + 10));
    for (row, found) in (0..).zip(&rows) {
        let [owner, backup, third] = table.ranking(row);
        assert_eq!(found.owner().0, owner.unwrap().0 as u16 + 10);
        assert_eq!(found.backup().0, backup.unwrap().0 as u16 + 10);
        assert_eq!((third, found.ranks[2], found.flags), (None, MemberSlot::NONE, 0));
    }
    assert_eq!(rows.len(), ROWS);
}

#[test]
fn the_full_ranking_begins_with_the_row() {
    for scoring in ALL {
        for site_rule in [BackupSite::Any, BackupSite::Other] {
            let table = RowTable::new(scoring, ROWS, site_rule, &members(&[1, 2, 1, 3, 0, 1])).unwrap();
            for row in 0..ROWS as u32 {
                let full: Vec<MemberId> = table.full_ranking(row).into_iter().map(|(id, _)| id).collect();
                assert_eq!(full, plain(scoring, site_rule, &table.members(), row));
                assert_eq!(full.len(), 5);
                let head: Vec<MemberId> = table.ranking(row).into_iter().flatten().collect();
                assert_eq!(full[..RANKS], head[..]);
            }
        }
    }
}

#[test]
fn the_backup_is_of_another_site_where_there_is_one() {
    let sites = |site: fn(u32) -> u32| -> Vec<RankedMember> {
        (1..=6).map(|id| RankedMember { id: MemberId(id), weight: 1, site: site(id) }).collect()
    };
    let same_site = |list: &[RankedMember], rule| {
        let table = RowTable::new(RENDEZVOUS, ROWS, rule, list).unwrap();
        let site = |id: Option<MemberId>| list.iter().find(|m| Some(m.id) == id).unwrap().site;
        rankings(&table).iter().filter(|row| site(row[0]) == site(row[1])).count()
    };
    let two = sites(|id| id % 2);
    assert_eq!(same_site(&two, BackupSite::Other), 0);
    assert!(same_site(&two, BackupSite::Any) > 0);
    let one = sites(|_| 7);
    assert_eq!(same_site(&one, BackupSite::Other), ROWS);
}

#[test]
fn shares_are_proportional_to_weights() {
    let weights = [1, 2, 3, 10];
    let table = RowTable::new(RENDEZVOUS, 65_536, BackupSite::Any, &members(&weights)).unwrap();
    let mut counts = [0_u32; 4];
    for [owner, ..] in rankings(&table) {
        counts[owner.unwrap().0 as usize - 1] += 1;
    }
    for (count, weight) in counts.into_iter().zip(weights) {
        let p = f64::from(weight) / 16.0;
        let deviation = (65_536.0 * p * (1.0 - p)).sqrt();
        assert!((f64::from(count) - 65_536.0 * p).abs() < 4.0 * deviation, "{counts:?}");
    }
}

/// Ids of equal CRC: they differ by a multiple of the polynomial, so they tie on every connection.
const TIED: [u32; 3] = [5, 5 ^ 0x11d, 5 ^ 0x23a];

fn figure_3(ids: &[u32], row: u32) -> [Option<u32>; 2] {
    let list: Vec<RankedMember> =
        ids.iter().map(|id| RankedMember { id: MemberId(*id), weight: 1, site: 0 }).collect();
    let [owner, backup, _] = table(HIGHEST, &list).ranking(row);
    [owner.map(|id| id.0), backup.map(|id| id.0)]
}

/// A row in which the members score as told, best first.
fn row_where(ids: &[u32]) -> u32 {
    (0..ROWS as u32)
        .find(|row| {
            let scores: Vec<Score> =
                ids.iter().map(|id| HIGHEST.score(*row, MemberId(*id), 1).unwrap()).collect();
            scores.is_sorted_by(|a, b| a > b)
        })
        .unwrap()
}

#[test]
fn figure_3_340_360_a_single_best_and_a_single_second_best() {
    let row = row_where(&[9, 7, 1]);
    assert_eq!(figure_3(&[1, 7, 9], row), [Some(9), Some(7)]);
    let row = row_where(&[1, 7, 9]);
    assert_eq!(figure_3(&[1, 7, 9], row), [Some(1), Some(7)]);
}

#[test]
fn figure_3_370_of_several_second_bests_the_highest_id_is_the_backup() {
    let row = row_where(&[9, TIED[0]]);
    let highest = TIED.into_iter().max();
    assert_eq!(figure_3(&[TIED[1], TIED[2], 9, TIED[0]], row), [Some(9), highest]);
}

#[test]
fn figure_3_345_380_of_several_bests_the_two_highest_ids_are_owner_and_backup() {
    let row = row_where(&[TIED[0], 9]);
    let mut ids = TIED;
    ids.sort_unstable();
    assert_eq!(figure_3(&[9, TIED[0], TIED[1], TIED[2]], row), [Some(ids[2]), Some(ids[1])]);
    // Two bests: the backup is the other of them, not the second best score.
    assert_eq!(figure_3(&[9, ids[0], ids[2]], row), [Some(ids[2]), Some(ids[0])]);
}

#[test]
fn figure_3_ties_are_the_same_for_the_lowest_score() {
    let list: Vec<RankedMember> = vec![member(TIED[0], 1), member(TIED[1], 1)];
    for row in rankings(&table(LOWEST, &list)) {
        assert_eq!(row[0], Some(MemberId(TIED[0].max(TIED[1]))));
    }
}
