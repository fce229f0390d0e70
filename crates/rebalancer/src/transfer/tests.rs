use proptest::prelude::*;

use super::*;
use crate::testing::{TestRanking, key, record};

const M: u32 = 1;
const X: u32 = 2;
const Y: u32 = 3;
const N: u32 = 9;

/// One row before and after; what M sends, to whom, and what it does locally.
fn one_row(old: [u32; 2], new: [u32; 2], live: &[u32]) -> (Vec<u32>, LocalAction) {
    let (old, new) = (TestRanking::by_hand(&[old]), TestRanking::by_hand(&[new]));
    let survivors = Survivors::all(live.iter().map(|&id| MemberId(id)));
    let caches = BTreeSet::new();
    let change = Change {
        local: MemberId(M),
        old: &old,
        new: &new,
        survivors: &survivors,
        caches: &caches,
        ahead: None,
    };
    let plan = plan(&change, [record(1, 1)]);
    assert!(plan.holders.values().all(|records| *records == [record(1, 1)]));
    (plan.holders.keys().map(|id| id.0).collect(), plan.local[0].1)
}

#[test]
fn claim_19_case_652_the_new_member_is_owner_and_we_are_its_backup() {
    assert_eq!(one_row([M, X], [N, M], &[M, X, N]), (vec![N], LocalAction::Demote));
}

#[test]
fn claim_19_case_654_we_stay_owner_and_the_new_member_is_our_backup() {
    assert_eq!(one_row([M, X], [M, N], &[M, X, N]), (vec![N], LocalAction::Keep));
}

#[test]
fn claim_19_case_656_the_new_member_is_backup_and_we_lose_the_flow() {
    // Old owner M: it sends, and keeps the entry as former holder until the window closes (the document deletes it at once).
    assert_eq!(one_row([M, X], [X, N], &[M, X, N]), (vec![N], LocalAction::Former));
    // Old backup M loses it likewise, and the owner X is the one that sends.
    assert_eq!(one_row([X, M], [X, N], &[M, X, N]), (vec![], LocalAction::Former));
    let ranking = TestRanking::by_hand(&[[X, N]]);
    let dropped: Vec<_> = former_entries(MemberId(M), &ranking, [key(1)]).collect();
    assert_eq!(dropped, [key(1)]);
    let kept: Vec<_> = former_entries(MemberId(N), &ranking, [key(1)]).collect();
    assert_eq!(kept, []);
}

#[test]
fn what_we_sent_ahead_is_not_sent_again_and_what_others_should_have_sent_is() {
    let survivors = Survivors::all([M, X, N].map(MemberId));
    let caches = BTreeSet::new();
    let (sent, old, new) =
        (TestRanking::by_hand(&[[N, M]]), TestRanking::by_hand(&[[M, X]]), TestRanking::by_hand(&[[M, N]]));
    let receivers = |base: [u32; 2], members: &[u32]| {
        let base = TestRanking::by_hand(&[base]);
        let members = members.iter().map(|&id| MemberId(id)).collect();
        let ahead = Some(Ahead { base: &base, ranking: &sent, members: &members });
        let local = MemberId(M);
        let change = Change { local, old: &old, new: &new, survivors: &survivors, caches: &caches, ahead };
        plan(&change, [record(1, 1)]).holders.into_keys().collect::<Vec<_>>()
    };
    assert_eq!(receivers([M, X], &[M, N]), []);
    assert_eq!(receivers([M, X], &[M]), [MemberId(N)], "it has started again since");
    assert_eq!(
        receivers([X, M], &[M, N]),
        [MemberId(N)],
        "X owned it then, and may have died before it sent it"
    );
}

#[test]
fn claim_20_case_752_our_backup_left_and_another_takes_its_place() {
    assert_eq!(one_row([M, X], [M, Y], &[M, Y]), (vec![Y], LocalAction::Keep));
}

#[test]
fn claim_20_case_754_the_owner_left_and_we_its_backup_own_the_flow() {
    assert_eq!(one_row([X, M], [M, Y], &[M, Y]), (vec![Y], LocalAction::Promote));
    // The twin: the owner leaves gracefully, still lives, and is the one that sends.
    assert_eq!(one_row([X, M], [M, Y], &[M, X, Y]), (vec![], LocalAction::Promote));
}

#[test]
fn claim_20_transfer_tables_go_to_all_remaining_members_where_caches_are_on() {
    let (old, new) = (TestRanking::by_hand(&[[X, M]]), TestRanking::by_hand(&[[M, Y]]));
    let survivors = Survivors::all([M, Y, N].map(MemberId));
    let plan_with = |caches: &[u32]| {
        let caches = caches.iter().map(|&id| MemberId(id)).collect();
        let change = Change {
            local: MemberId(M),
            old: &old,
            new: &new,
            survivors: &survivors,
            caches: &caches,
            ahead: None,
        };
        plan(&change, [record(1, 1)])
    };
    let all = plan_with(&[M, X, Y, N]);
    assert_eq!(all.holders.keys().collect::<Vec<_>>(), [&MemberId(Y)]);
    assert_eq!(
        all.caches.keys().collect::<Vec<_>>(),
        [&MemberId(N)],
        "not the dead one, and holders only once"
    );
    assert!(plan_with(&[]).caches.is_empty(), "the twin: no caches, nothing but the holders");
}

#[test]
fn claim_20_case_750_caches_flush_what_the_departed_owned_and_no_more() {
    let (old, new) = (TestRanking::by_hand(&[[X, M]]), TestRanking::by_hand(&[[M, Y]]));
    let caches = BTreeSet::new();
    let flushed = |live: &[u32]| {
        let survivors = Survivors::all(live.iter().map(|&id| MemberId(id)));
        let change = Change {
            local: MemberId(N),
            old: &old,
            new: &new,
            survivors: &survivors,
            caches: &caches,
            ahead: None,
        };
        cache_entries_of_departed(&change, [key(1)]).count()
    };
    assert_eq!(flushed(&[M, Y, N]), 1);
    assert_eq!(flushed(&[M, X, Y, N]), 0);
}

#[test]
fn a_cache_offers_what_no_surviving_holder_can_send() {
    let (old, new) = (TestRanking::by_hand(&[[X, M]]), TestRanking::by_hand(&[[Y, N]]));
    let caches = BTreeSet::new();
    let offered = |live: &[u32]| {
        let survivors = Survivors::all(live.iter().map(|&id| MemberId(id)));
        let change = Change {
            local: MemberId(8),
            old: &old,
            new: &new,
            survivors: &survivors,
            caches: &caches,
            ahead: None,
        };
        plan_cache_offers(&change, [record(1, 1)]).holders.into_keys().map(|id| id.0).collect::<Vec<_>>()
    };
    assert_eq!(offered(&[Y, N, 8]), [Y, N]);
    assert_eq!(offered(&[M, Y, N, 8]), [0; 0]);
}

#[test]
fn a_member_that_started_again_is_sent_everything_it_held() {
    let ranking = TestRanking::by_hand(&[[M, X], [X, M], [M, Y]]);
    let caches = BTreeSet::new();
    let rows = |blank: &[u32]| {
        let mut survivors = Survivors::all([M, X, Y].map(MemberId));
        survivors.blank.extend(blank.iter().map(|&id| MemberId(id)));
        let change = Change {
            local: MemberId(M),
            old: &ranking,
            new: &ranking,
            survivors: &survivors,
            caches: &caches,
            ahead: None,
        };
        let rows: Vec<_> = changed_rows(&change).collect();
        let sent = plan(&change, (0..60).map(|n| record(n, 1)));
        assert!(sent.holders.keys().all(|to| blank.contains(&to.0)));
        (rows, sent.len())
    };
    let held =
        (0..60).filter(|&n| ranking.holders(ranking.row_of(&key(n))).contains(&Some(MemberId(X)))).count();
    assert_eq!(rows(&[X]), (vec![0, 1], held));
    assert_eq!(rows(&[]), (vec![], 0));
}

#[test]
fn an_early_record_is_offered_by_the_new_owner_to_its_backup() {
    assert_eq!(one_row([X, Y], [M, N], &[M, X, Y, N]), (vec![N], LocalAction::Keep));
    assert_eq!(one_row([X, Y], [N, M], &[M, X, Y, N]), (vec![], LocalAction::Keep));
}

#[test]
fn who_still_has_a_flow_by_an_earlier_table_sends_it_where_no_old_holder_is_left() {
    assert_eq!(one_row([X, Y], [N, 8], &[M, N, 8]), (vec![8, N], LocalAction::Former));
    assert_eq!(one_row([X, Y], [M, N], &[M, N]), (vec![N], LocalAction::Keep));
    // The twin: who held it last sends it.
    assert_eq!(one_row([X, Y], [N, 8], &[M, Y, N, 8]), (vec![], LocalAction::Former));
}

/// A member in a random change: weight before and after (0: not ranked), and what happened to it.
#[derive(Clone, Copy, Debug)]
struct Fate {
    before: u32,
    after: u32,
    crashed: bool,
    restarted: bool,
}

fn any_fates() -> impl Strategy<Value = Vec<Fate>> {
    let fate = (0u32..4, 0u32..4, prop::bool::weighted(0.15), prop::bool::weighted(0.1))
        .prop_map(|(before, after, crashed, restarted)| Fate { before, after, crashed, restarted });
    prop::collection::vec(fate, 1..9)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn after_any_change_exactly_the_new_owner_and_backups_hold_what_an_old_holder_kept(
        fates in any_fates(),
        backups in 1usize..=2,
    ) {
        let ids: Vec<u32> = (1..=fates.len() as u32).collect();
        let old = TestRanking::weighted(
            &ids.iter().zip(&fates).map(|(&id, fate)| (id, fate.before)).collect::<Vec<_>>(), 64).with_backups(backups);
        let new = TestRanking::weighted(
            &ids.iter().zip(&fates).map(|(&id, fate)| (id, if fate.crashed { 0 } else { fate.after })).collect::<Vec<_>>(), 64).with_backups(backups);
        let mut survivors = Survivors::default();
        for (&id, fate) in ids.iter().zip(&fates) {
            if !fate.crashed { survivors.live.insert(MemberId(id)); }
            if fate.restarted && !fate.crashed { survivors.blank.insert(MemberId(id)); }
        }
        let caches = BTreeSet::new();
        let records: Vec<_> = (0..150).map(|n| record(n, 1)).collect();

        // What everyone holds before, by the old table; then every survivor plans by itself, and all tables are applied.
        let mut tables: BTreeMap<MemberId, BTreeMap<FlowKey, Record>> =
            survivors.live.iter().map(|&member| (member, BTreeMap::new())).collect();
        for record in &records {
            for holder in holders_of(&old, old.row_of(&record.key)).filter(|&holder| survivors.keeps_state(holder)) {
                tables.get_mut(&holder).unwrap().insert(record.key, *record);
            }
        }
        let lost: BTreeSet<FlowKey> = records.iter().map(|record| record.key)
            .filter(|key| tables.values().all(|table| !table.contains_key(key))).collect();
        let mut sent = Vec::new();
        for (&local, table) in &tables {
            let change = Change { local, old: &old, new: &new, survivors: &survivors, caches: &caches, ahead: None };
            let plan = plan(&change, table.values().copied());
            for (to, records) in plan.holders {
                prop_assert!(to != local);
                sent.extend(records.into_iter().map(|record| (to, record)));
            }
        }
        for &(to, record) in &sent {
            let twice = tables.get_mut(&to).unwrap().insert(record.key, record);
            // A backup that has it is sent it again only by who inherits the row from a dead owner, to hear that it has.
            let row = new.row_of(&record.key);
            let inherited = old.holders(row)[0].is_some_and(|owner| !survivors.keeps_state(owner));
            prop_assert!(
                twice.is_none() || backups == 2 && inherited,
                "one sender for each flow, and no receiver that has it"
            );
        }
        for (&member, table) in &mut tables {
            let dropped: Vec<_> = former_entries(member, &new, table.keys().copied().collect::<Vec<_>>()).collect();
            for key in dropped {
                table.remove(&key);
            }
        }
        for record in &records {
            let has: BTreeSet<_> = tables.iter().filter(|(_, table)| table.contains_key(&record.key)).map(|(&m, _)| m).collect();
            let should: BTreeSet<_> = if lost.contains(&record.key) {
                BTreeSet::new()
            } else {
                holders_of(&new, new.row_of(&record.key)).collect()
            };
            prop_assert_eq!(has, should);
        }
        // Lost only what no old holder kept.
        for key in &lost {
            prop_assert!(holders_of(&old, old.row_of(key)).all(|holder| !survivors.keeps_state(holder)));
        }
    }
}
