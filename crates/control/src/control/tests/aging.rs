//! When flows were last seen, and by whom it is known that they are held.

use phalanx_rebalancer::TransferPlan;

use super::*;
use crate::planner::TableRanking;

/// How long the flows of these tests have been idle.
const LONG_MS: u32 = 600_000;

impl Site {
    fn table(&self) -> Arc<TableRanking> {
        self.members[&1].0.planner().current()
    }

    fn control(&mut self, id: u32) -> &mut Control {
        &mut self.members.get_mut(&id).expect("there").0
    }

    /// How long the flow has been idle at `id`, in milliseconds.
    fn idle_ms(&self, id: u32, n: u16) -> Option<u32> {
        self.forwarder(id).get(&key(n)).map(|record| record.idle_ms)
    }

    /// Every flow is at its holders, and has been idle for long.
    fn open_long_ago(&self) {
        for n in 0..FLOWS {
            for holder in self.holders(n) {
                self.forwarder(holder).upsert(&[Record { idle_ms: LONG_MS, ..record(n) }]);
            }
        }
    }

    fn is_former(&self, id: u32, n: u16) -> bool {
        self.forwarder(id).get(&key(n)).is_some_and(|record| record.flags.has(FlowFlags::FORMER))
    }

    fn is_protected(&self, id: u32, n: u16) -> bool {
        self.forwarder(id).get(&key(n)).is_some_and(|record| record.flags.has(FlowFlags::PROTECTED))
    }
}

/// Flows among the first of all that `wanted` holds of.
fn flows(wanted: impl Fn(&u16) -> bool, count: usize) -> Vec<u16> {
    let found: Vec<u16> = (0..u16::MAX - 1024).filter(wanted).take(count).collect();
    assert_eq!(found.len(), count);
    found
}

#[test]
fn where_a_rows_owner_changes_idle_times_begin_anew_and_nowhere_else() {
    let mut site = Site::new(&[1, 2, 3]);
    site.see(&[1, 2], &[], 1, None);
    site.open_long_ago();
    let old: Vec<u32> = (0..FLOWS).map(|n| site.holders(n)[0]).collect();
    // A join that was planned: nobody is lost, and what it moves is sent with its idle time.
    site.see(&[1, 2], &[3], 1, Some(2));
    assert!(
        (0..FLOWS).all(|n| [1, 2, 3].iter().all(|&id| site.idle_ms(id, n).is_none_or(|ms| ms == LONG_MS)))
    );
    site.see(&[1, 2, 3], &[], 2, None);
    let mut changed = 0;
    for n in 0..FLOWS {
        let is_new = site.holders(n)[0] != old[usize::from(n)];
        changed += usize::from(is_new);
        for holder in site.holders(n) {
            let expected = if is_new { 0 } else { LONG_MS };
            assert_eq!(site.idle_ms(holder, n), Some(expected), "flow {n} at {holder}");
        }
    }
    assert!(changed > 10 && changed < usize::from(FLOWS) - 10, "{changed}");
}

#[test]
fn where_a_member_is_lost_the_idle_times_of_all_flows_begin_anew() {
    let mut site = Site::new(&[1, 2, 3]);
    site.see(&[1, 2, 3], &[], 1, None);
    site.open_long_ago();
    let half_open = Record { state: FlowState::HalfOpen, idle_ms: 8_000, ..record(FLOWS) };
    // What has ended goes in time, whoever is lost: all its holders hear of its packets.
    let ended = Record { state: FlowState::Closing, idle_ms: 9_000, ..record(FLOWS + 1) };
    site.forwarder(1).upsert(&[half_open, ended]);
    // The twin: another view of the same members.
    site.see(&[1, 2, 3], &[], 2, None);
    let begun_anew = |site: &Site| {
        let held = [1, 2].into_iter().flat_map(|id| (0..FLOWS).filter_map(move |n| site.idle_ms(id, n)));
        let held: Vec<u32> = held.collect();
        assert!(held.iter().all(|&ms| ms == 0 || ms == LONG_MS));
        (held.iter().filter(|&&ms| ms == 0).count(), held.len())
    };
    assert_eq!(begun_anew(&site).0, 0);
    let kept_owner = (0..FLOWS).filter(|n| site.holders(*n)[0] != 3).count();
    site.see(&[1, 2], &[], 3, None);
    let (anew, all) = begun_anew(&site);
    assert_eq!(anew, all);
    assert!(kept_owner > 10, "also where the owner is the same");
    assert_eq!(
        site.idle_ms(1, FLOWS),
        Some(8_000),
        "who waits for an answer to a SYN has been given no time"
    );
    assert_eq!(site.idle_ms(1, FLOWS + 1), Some(9_000), "nor has what has ended");
}

#[test]
fn a_record_that_is_older_than_ours_still_says_when_its_flow_was_seen() {
    for seen_since in [false, true] {
        let mut site = Site::new(&[1, 2]);
        site.see(&[1, 2], &[], 1, None);
        let n = flows(|n| site.holders(*n) == [1, 2], 1)[0];
        site.forwarder(1).upsert(&[Record { update: 2, idle_ms: LONG_MS, ..record(n) }]);
        let idle_ms = if seen_since { 10_000 } else { LONG_MS + 10_000 };
        site.forwarder(2).upsert(&[Record { update: 1, idle_ms, ..record(n) }]);
        // They compare what they hold.
        site.pass(Duration::from_secs(4));
        let [owner, backup] = [1, 2].map(|id| site.forwarder(id).get(&key(n)).expect("there"));
        assert_eq!((owner.update, backup.update), (2, 2));
        let expected = idle_ms.min(LONG_MS) + 4_000;
        assert_eq!((owner.idle_ms, backup.idle_ms), (expected, expected), "seen since: {seen_since}");
    }
}

#[test]
fn entries_that_no_table_gives_us_go_though_no_table_has_changed() {
    let mut site = Site::new(&[1, 2, 3]);
    site.see(&[1, 2, 3], &[], 1, None);
    site.open();
    site.pass(LINGER + 4 * TICK);
    assert!(site.members.values().all(|(control, _)| !control.window_open() && control.sweep_at.is_none()));
    // Somebody whose view was another, or whose frames took long.
    let records: Vec<Record> = (0..FLOWS).map(record).collect();
    let late = TransferPlan { holders: [(MemberId(3), records)].into(), ..TransferPlan::default() };
    let now = site.now;
    site.control(1).replicator.begin_transfer(now, late);
    site.pass(TICK);
    assert!((0..FLOWS).all(|n| site.has(3, n)));
    // It may not have heard yet that they are its own, and drops nothing for another reason either; but it does not believe them.
    for n in 0..FLOWS {
        assert_eq!(site.is_former(3, n), !site.holders(n).contains(&3), "flow {n}");
    }
    let now = site.now;
    site.control(3).sweep_at = Some(now);
    site.pass(STRANGERS_STAY - 2 * TICK);
    assert!((0..FLOWS).all(|n| site.has(3, n)));
    site.pass(4 * TICK);
    assert_eq!(site.held(), usize::from(FLOWS), "what it holds stays, and the rest has gone");
}

#[test]
fn while_nobody_ranks_what_former_holders_have_stays() {
    for nobody in [true, false] {
        let mut site = Site::new(&[1, 2]);
        site.see(&[1, 2], &[], 1, None);
        site.pass(LINGER + 4 * TICK);
        site.open();
        let mut view = View::clone(site.members[&1].0.view());
        view.digest = Digest(2);
        for member in &mut view.members {
            member.view_digest = Digest(2);
            if nobody || member.id == MemberId(2) {
                member.metadata = Arc::new(Metadata { weight: 0, ..Metadata::default() });
            }
        }
        let (now, view) = (site.now, Arc::new(view));
        for id in [1, 2] {
            site.control(id).handle_view(now, Arc::clone(&view));
        }
        site.settle();
        site.pass(2 * LINGER);
        let kept = (0..FLOWS).filter(|n| site.has(2, *n)).count();
        assert_eq!(kept, if nobody { usize::from(FLOWS) } else { 0 }, "the twin: one still ranks");
        site.see(&[1, 2], &[], 3, None);
        site.pass(LINGER + 4 * TICK);
        assert_eq!(site.held(), usize::from(FLOWS));
    }
}

/// What came late, for a table that counted still, stays when that table counts no more: other strangers do.
#[test]
fn what_is_left_over_when_the_window_closes_is_not_believed() {
    let mut site = Site::new(&[1, 2, 3]);
    site.see(&[1, 2], &[], 1, None);
    site.pass(LINGER + 4 * TICK);
    let before: Vec<[u32; 2]> = (0..FLOWS).map(|n| site.holders(n)).collect();
    site.see(&[1, 2, 3], &[], 2, None);
    let lost: Vec<u16> = (0..FLOWS).filter(|n| !site.holders(*n).contains(&1)).collect();
    assert!(lost.len() > 10 && lost.iter().all(|n| before[usize::from(*n)].contains(&1)));
    for n in 0..FLOWS {
        site.forwarder(1).upsert(&[record(n)]);
    }
    site.pass(LINGER - 4 * TICK);
    assert!(lost.iter().all(|n| !site.is_former(1, *n)), "a table that counts gives them");
    // Something has come that no table gives it.
    let now = site.now;
    site.control(1).strangers_until = Some(now + STRANGERS_STAY);
    site.pass(8 * TICK);
    assert!(!site.members[&1].0.window_open());
    assert!(lost.iter().all(|n| site.has(1, *n) && site.is_former(1, *n)));
    let held = (0..FLOWS).filter(|n| site.holders(*n).contains(&1)).all(|n| !site.is_former(1, n));
    assert!(held, "the twin: what it holds is believed");
    site.pass(STRANGERS_STAY);
    assert!(lost.iter().all(|n| !site.has(1, *n)));
}

/// Who has just started knows of no table before, and tells it nothing of what becomes of the flow.
#[test]
fn what_others_send_for_a_table_that_is_in_force_no_more_is_kept_and_not_believed() {
    let mut site = Site::new(&[1, 2, 3]);
    site.see(&[1, 2], &[], 1, None);
    site.pass(LINGER + 4 * TICK);
    site.see(&[1, 2, 3], &[], 2, None);
    let held_before = flows(|n| !site.holders(*n).contains(&1), 10);
    let holds = flows(|n| site.holders(*n).contains(&1), 10);
    let records = |flows: &[u16]| flows.iter().map(|n| record(*n)).collect::<Vec<Record>>();
    let holders = [(MemberId(1), [records(&held_before), records(&holds)].concat())].into();
    let (now, sent) = (site.now, TransferPlan { holders, ..TransferPlan::default() });
    site.control(2).replicator.begin_transfer(now, sent);
    site.pass(4 * TICK);
    assert!(held_before.iter().all(|n| site.is_former(1, *n)));
    assert!(holds.iter().all(|n| site.has(1, *n) && !site.is_former(1, *n)), "the twin");
    assert_eq!(
        site.control(1).strangers_until,
        None,
        "it is no stranger: it stays until the window closes, and no longer"
    );
    site.pass(LINGER);
    assert!(!held_before.iter().any(|n| site.has(1, *n)));
}

/// 20 flows of member 1 with 2 as backup, and which of them 2 holds. Member 2 has no room for the others.
fn half_held(site: &Site) -> (Vec<u16>, Vec<u16>) {
    let table = site.table();
    let row = |n: u16| table.row_of(&key(n));
    let ours = flows(|n| site.holders(*n) == [1, 2], 20);
    // Some rows are the same. In some the first flow is missing, and the others are there.
    let rows: BTreeSet<u32> = ours.iter().map(|n| row(*n)).collect();
    let differing: BTreeSet<u32> = rows.into_iter().step_by(2).collect();
    let mut met = BTreeSet::new();
    let missing = |n: &u16| differing.contains(&row(*n)) && met.insert(row(*n));
    let (missing, held): (Vec<u16>, Vec<u16>) = ours.into_iter().partition(missing);
    assert!(missing.len() > 2 && held.iter().any(|n| !differing.contains(&row(*n))));
    let record = |n: &u16| record(*n);
    site.forwarder(1).upsert(&held.iter().chain(&missing).map(record).collect::<Vec<_>>());
    site.forwarder(2).upsert(&held.iter().map(record).collect::<Vec<_>>());
    // The limit is one of each part of its table, so that some of these are too many.
    let strangers = flows(|n| !site.holders(*n).contains(&1), LIMIT * 3 / 2);
    site.forwarder(2).upsert(&strangers.iter().map(record).collect::<Vec<_>>());
    (held, missing)
}

#[test]
fn a_comparison_protects_what_the_backup_holds_the_same_of_and_nothing_else() {
    let mut site = Site::new(&[1, 2, 3]);
    site.see(&[1, 2, 3], &[], 1, None);
    let (held, missing) = half_held(&site);
    let protected = |site: &Site, of: &[u16]| of.iter().filter(|n| site.is_protected(1, **n)).count();
    assert_eq!(protected(&site, &held), 0, "nobody has acknowledged anything");
    site.pass(Duration::from_secs(4));
    assert_eq!(protected(&site, &held), held.len());
    assert_eq!(protected(&site, &missing), 0, "there was no room for them");
}

#[test]
fn with_two_backups_a_comparison_protects_once_both_have_answered() {
    for reachable in [true, false] {
        let mut site = Site::with_backups(&[1, 2, 3], 2);
        site.see(&[1, 2, 3], &[], 1, None);
        let ours = flows(|n| site.holders(*n) == [1, 2], 20);
        for id in [1, 2, 3] {
            site.forwarder(id).upsert(&ours.iter().map(|n| record(*n)).collect::<Vec<_>>());
        }
        if !reachable {
            site.cut = vec![(1, 3)];
        }
        site.pass(Duration::from_secs(4));
        let protected = ours.iter().filter(|n| site.is_protected(1, **n)).count();
        let expected = if reachable { (20, 0) } else { (0, 20) };
        assert_eq!((protected, site.control(1).replicator().unprotected()), expected);
    }
}

#[test]
fn only_an_answer_to_the_comparison_under_way_protects() {
    let mut site = Site::new(&[1, 2, 3]);
    site.see(&[1, 2, 3], &[], 1, None);
    let ours = flows(|n| site.holders(*n) == [1, 2], 20);
    site.forwarder(1).upsert(&ours.iter().map(|n| record(*n)).collect::<Vec<_>>());
    // It has asked, and nobody answers.
    site.cut = vec![(1, 2)];
    site.pass(Duration::from_secs(4));
    let now = site.now;
    let round = site.control(1).repair.round;
    let table = site.table();
    let differs = table.row_of(&key(ours[0]));
    let protected = |site: &Site| ours.iter().filter(|n| site.is_protected(1, **n)).count();
    // Rows that ours are not among.
    let others = table.row_count()..;
    let many: Vec<u32> = others.take(phalanx_rebalancer::codec::MAX_ROWS).collect();
    for (from, round, rows) in [
        // Of another round; of somebody who was not asked for these; and one that may have been cut short.
        (2, round - 1, vec![]),
        (3, round, vec![]),
        (2, round, many),
    ] {
        site.control(1).handle_differing(now, MemberId(from), round, rows);
        site.control(1).pump(now);
        assert_eq!(protected(&site), 0);
    }
    site.control(1).handle_differing(now, MemberId(2), round, vec![differs]);
    site.control(1).pump(now);
    let same = ours.iter().filter(|n| table.row_of(&key(**n)) != differs).count();
    assert!(same > 0 && same < ours.len());
    assert_eq!(protected(&site), same);
}

#[test]
fn an_end_leaves_an_entry_that_has_seen_a_packet_since() {
    let mut site = Site::new(&[1, 2]);
    site.see(&[1, 2], &[], 1, None);
    let kept = Record { idle_ms: 10_000, ..record(1) };
    let now = site.now;
    let mut end = |of: &Record, min_idle_ms| {
        site.forwarder(1).upsert(&[kept]);
        let end = Apply::End { key: of.key, birth: of.birth, min_idle_ms };
        let result = site.control(1).apply(
            now,
            &ApplyBatch { id: 1, from: Some(MemberId(2)), records: Arc::default(), items: vec![end] },
        );
        (result, site.has(1, 1))
    };
    assert_eq!(end(&kept, 10_001), (vec![ApplyResult::Stale], true), "it has seen a packet since");
    assert_eq!(end(&kept, 10_000), (vec![ApplyResult::Applied], false));
    assert_eq!(end(&kept, 0), (vec![ApplyResult::Applied], false), "whenever it was seen");
    // What is not there has ended.
    let earlier = Record { birth: kept.birth - 1, ..kept };
    assert_eq!(end(&earlier, 0), (vec![ApplyResult::Applied], true), "the tuple's next life");
    assert_eq!(end(&record(2), 10_001), (vec![ApplyResult::Applied], true));
}

#[test]
fn what_moves_away_is_former_until_the_window_closes_or_a_holder_sends_it_again() {
    let mut site = Site::new(&[1, 2, 3]);
    site.see(&[1, 2], &[], 1, None);
    site.open();
    site.see(&[1, 2], &[3], 1, Some(2));
    assert!((0..FLOWS).all(|n| !site.is_former(1, n) && !site.is_former(2, n)), "still held");
    site.see(&[1, 2, 3], &[], 2, None);
    let mut moved = Vec::new();
    for n in 0..FLOWS {
        for id in [1, 2] {
            let holds = site.holders(n).contains(&id);
            assert_eq!(site.is_former(id, n), !holds, "flow {n} at {id}");
            if !holds {
                moved.push((id, n));
            }
        }
    }
    assert!(moved.len() > 10);
    // An older record is news too: its sender takes us for a holder, and knows of nothing newer.
    let (id, n) = moved[0];
    assert_eq!(site.forwarder(id).upsert(&[record(n)]), [Upserted::Stale]);
    assert!(!site.is_former(id, n));
    // While somebody is suspected, what former holders have may be all there is.
    site.suspect(3, true);
    site.pass(LINGER + 4 * TICK);
    assert!(moved.iter().all(|&(id, n)| site.has(id, n)));
    site.suspect(3, false);
    site.pass(4 * TICK);
    assert!(moved.iter().all(|&(id, n)| !site.has(id, n)), "the window is closed");
}

/// Member 1 owns a flow of which it has seen the SYN alone; member 2, its backup, has recovered it with `backend`, and sends it.
fn recovered_elsewhere(backend: BackendId) -> [Record; 2] {
    let mut site = Site::new(&[1, 2]);
    site.see(&[1, 2], &[], 1, None);
    let n = flows(|n| site.holders(*n) == [1, 2], 1)[0];
    let asked_for = Record { state: FlowState::HalfOpen, update: 0, ..record(n) };
    site.forwarder(1).upsert(&[asked_for]);
    site.control(2).planner.register(backend);
    site.control(2).install();
    let flags = FlowFlags(FlowFlags::RECOVERED);
    let recovered = Record { birth: record(n).birth + 1_000, backend, flags, ..record(n) };
    site.forwarder(2).upsert(&[recovered]);
    let sent = TransferPlan { holders: [(MemberId(1), vec![recovered])].into(), ..TransferPlan::default() };
    let now = site.now;
    site.control(2).replicator.begin_transfer(now, sent);
    site.pass(TICK);
    [1, 2].map(|id| site.forwarder(id).get(&key(n)).expect("there"))
}

#[test]
fn a_flow_that_another_member_recovered_is_open_at_its_owner_too() {
    let [owner, backup] = recovered_elsewhere(backend());
    assert_eq!((owner.state, owner.birth), (FlowState::Established, backup.birth));
    assert_eq!((backup.state, backup.update), (FlowState::Established, owner.update));
    assert!(
        !backup.flags.has(FlowFlags::RECOVERED),
        "the record of the SYN has taken the place of the guess"
    );
    // The twin: a guess at another backend says nothing of what the owner has.
    let [owner, _] = recovered_elsewhere(BackendId { port: [9, 9], ..backend() });
    assert_eq!(owner.state, FlowState::HalfOpen);
}

#[test]
fn what_a_forwarder_saw_without_a_daemon_is_told_to_the_owners_when_they_are_met() {
    for resumed in [false, true] {
        let mut site = Site::new(&[1, 2]);
        site.see(&[1, 2], &[], 1, None);
        site.open_long_ago();
        let seen: Vec<(FlowKey, u32)> = (0..FLOWS).map(|n| (key(n), 0)).collect();
        site.forwarder(2).touch(&seen);
        let control = site.control(2);
        control.resumed = resumed.then_some(1);
        site.see(&[1, 2], &[], 1, None);
        site.pass(TICK);
        for n in flows(|n| *n < FLOWS && site.holders(*n)[0] == 1, 20) {
            let idle_ms = site.idle_ms(1, n).expect("held");
            assert_eq!(idle_ms < 10_000, resumed, "flow {n}: {idle_ms} ms");
        }
    }
}

#[test]
fn what_changed_without_a_daemon_is_told_once_somebody_is_there_to_be_told() {
    for resumed in [false, true] {
        let mut site = Site::new(&[1, 2]);
        site.see(&[1, 2], &[], 1, None);
        site.pass(LINGER + 4 * TICK);
        site.open();
        let ours = flows(|n| *n < FLOWS && site.holders(*n) == [1, 2], 10);
        for &n in &ours {
            // The program saw a FIN.
            site.forwarder(2).upsert(&[Record { state: FlowState::Closing, update: 2, ..record(n) }]);
        }
        let now = site.now;
        let control = site.control(2);
        control.resumed = resumed.then_some(1);
        let mut alone = View::clone(control.view());
        alone.members.retain(|member| member.id == MemberId(2));
        alone.members[0].state = MemberState::Joining;
        control.handle_view(now, Arc::new(alone));
        site.see(&[1, 2], &[], 1, None);
        site.pass(TICK);
        let told = |n: &&u16| {
            let held = site.forwarder(1).get(&key(**n));
            held.is_some_and(|held| held.state == FlowState::Closing)
        };
        assert_eq!(ours.iter().filter(told).count(), if resumed { ours.len() } else { 0 });
    }
}

#[test]
fn who_leaves_gives_what_its_holders_lack_before_it_goes() {
    let mut site = Site::new(&[1, 2, 3]);
    site.see(&[1, 2, 3], &[], 1, None);
    site.pass(LINGER + 4 * TICK);
    let held: Vec<u16> = (0..FLOWS).filter(|n| site.holders(*n).contains(&3)).collect();
    let mut leaving = View::clone(site.members[&1].0.view());
    leaving.digest = Digest(2);
    for member in &mut leaving.members {
        member.view_digest = Digest(2);
        if member.id == MemberId(3) {
            member.state = MemberState::Leaving;
        }
    }
    let now = site.now;
    site.control(3).begin_leave(now);
    // Who was to hold these, and to send them, was lost with them; member 3 was a holder before that.
    let records: Vec<Record> = (0..FLOWS).map(record).collect();
    let leaving = Arc::new(leaving);
    for id in [1, 2, 3] {
        site.control(id).handle_view(now, Arc::clone(&leaving));
    }
    site.forwarder(3).upsert(&records);
    site.settle();
    let left =
        |site: &Site| site.said.iter().any(|(who, event)| *who == 3 && matches!(event, Event::ReadyToLeave));
    for _ in 0..100 {
        if !left(&site) {
            site.pass(TICK);
        }
    }
    assert!(left(&site));
    assert!(held.len() > 20 && held.iter().all(|n| site.has(1, *n) && site.has(2, *n)));
}
