use phalanx_flow::Method;
use phalanx_membership::{Digest, MemberState, MemberView, Metadata, Wish};

use super::*;

fn fixed(local: u32) -> Fixed {
    Fixed {
        local: MemberId(local),
        address: IpAddr::from([10, 0, 0, local as u8]),
        seed: FlowSeed([1, 2]),
        scoring: Scoring::Rendezvous { key: [1, 2] },
        rows: 1024,
        site_rule: BackupSite::Any,
        backups: 1,
        handoff: Handoff { port: 6081, cookie: 7, old_cookie: None, fragment: false },
        replicate_syn: false,
    }
}

fn member(id: u32, boot: u64, state: MemberState, liveness: Liveness) -> MemberView {
    MemberView {
        id: MemberId(id),
        address: ([10, 0, 0, id as u8], 7946).into(),
        boot,
        generation: 0,
        state,
        metadata: Arc::new(Metadata { weight: 100, ..Metadata::default() }),
        known: true,
        serial: 1,
        wish: None,
        admitted: true,
        done: Digest(0),
        view_digest: Digest(0),
        liveness,
        suspected: liveness != Liveness::Alive,
        echo_failing: false,
    }
}

fn active(id: u32) -> MemberView {
    member(id, 1, MemberState::Active, Liveness::Alive)
}

fn view(digest: u64, members: Vec<MemberView>) -> View {
    View { members, digest: Digest(digest), pending: None, distrusts_itself: false }
}

/// `member`, which wishes to be active with this weight.
fn wishing(member: MemberView, weight: u32) -> MemberView {
    MemberView { wish: Some(Wish { active: true, weight, serial: 2 }), ..member }
}

fn pending(name: u64, members: Vec<MemberView>) -> View {
    View { pending: Some(Digest(name)), ..view(1, members) }
}

/// Member 1 among three, with a fourth that joins.
fn joining() -> View {
    let joiner = member(4, 1, MemberState::Joining, Liveness::Alive);
    pending(2, vec![active(1), active(2), active(3), wishing(joiner, 100)])
}

/// A planner of member 1 that has seen members 1 to 3 active.
fn settled() -> Planner {
    let mut planner = Planner::new(fixed(1)).unwrap();
    planner.set_view(&view(1, vec![active(1), active(2), active(3)]), true).unwrap().unwrap();
    planner.close_window();
    planner
}

fn id_at(plan: &Plan, slot: MemberSlot) -> Option<MemberId> {
    plan.members.get(usize::from(slot.0)).map(|member| member.id)
}

#[test]
fn who_is_down_keeps_its_position_and_needs_no_next_hop() {
    let mut planner = settled();
    assert!(planner.destinations().members.iter().all(|member| member.is_needed));
    planner.set_view(&view(2, vec![active(1), active(3)]), true).unwrap().unwrap();
    let needed: Vec<bool> = planner.destinations().members.iter().map(|member| member.is_needed).collect();
    assert_eq!(needed, [true, false, true]);
}

#[test]
fn a_newcomer_takes_the_table_of_the_others_for_the_one_before() {
    let mut planner = Planner::new(fixed(1)).unwrap();
    let change = planner.set_view(&view(1, vec![active(1), active(2), active(3)]), true).unwrap().unwrap();
    assert_eq!(change.survivors.blank, BTreeSet::from([MemberId(1)]));
    let old: Vec<MemberId> = change.old.table.members().iter().map(|member| member.id).collect();
    assert_eq!(old, [MemberId(2), MemberId(3)]);
    let plan = planner.plan();
    let previous = plan.previous.clone().expect("the window is open");
    for (row, before) in plan.rows.iter().zip(previous.iter()) {
        assert_ne!(id_at(&plan, before.owner()), Some(MemberId(1)));
        if id_at(&plan, row.owner()) != Some(MemberId(1)) {
            assert_eq!(row.owner(), before.owner(), "only the newcomer takes rows");
        }
    }
}

#[test]
fn rotated_keys_reach_the_next_plan() {
    let mut planner = settled();
    let before = planner.plan().handoff.cookie;
    let keys = KeyRing::new(vec![[2; 32], [1; 32]]).unwrap();
    planner.set_keys(&keys);
    let handoff = planner.plan().handoff;
    let cookies: Vec<u64> = keys.cookies().collect();
    assert_eq!((handoff.cookie, handoff.old_cookie), (cookies[0], Some(cookies[1])));
    assert_ne!(handoff.cookie, before);
}

#[test]
fn a_member_alone_has_nobody_before_it() {
    let mut planner = Planner::new(fixed(1)).unwrap();
    planner.set_view(&view(1, vec![active(1)]), true).unwrap().unwrap();
    assert!(planner.previous().next().is_none());
}

#[test]
fn suspicion_diverts_and_moves_nothing_while_a_confirmation_does() {
    let mut planner = settled();
    let before = planner.plan();
    let doubted = member(2, 1, MemberState::Active, Liveness::Suspect);
    assert!(planner.set_view(&view(1, vec![active(1), doubted, active(3)]), true).unwrap().is_none());
    let plan = planner.plan();
    assert!(Arc::ptr_eq(&before.rows, &plan.rows), "the table keeps its Arc");
    assert_eq!(plan.members[usize::from(planner.slot_of(MemberId(2)).0)].liveness, Liveness::Suspect);

    let change = planner.set_view(&view(2, vec![active(1), active(3)]), true).unwrap().unwrap();
    assert!(change.departed);
    assert!(!change.survivors.live.contains(&MemberId(2)));
    let after = planner.plan();
    for (old, new) in before.rows.iter().zip(after.rows.iter()) {
        if id_at(&before, old.owner()) == Some(MemberId(2)) {
            assert_eq!(
                id_at(&before, old.backup()),
                id_at(&after, new.owner()),
                "the backup is the next owner"
            );
        }
    }
}

/// `id`, active on another side.
fn met(id: u32) -> MemberView {
    MemberView { admitted: false, ..wishing(active(id), 100) }
}

/// Whom member 1 asks first, with `members` in its view.
fn asked_among(planner: &mut Planner, members: Vec<MemberView>) -> BTreeSet<Option<MemberId>> {
    let view = pending(2, members);
    planner.set_view(&view, true).unwrap();
    planner.set_pending(&view).unwrap();
    let plan = planner.plan();
    let first = |row: &Row| id_at(&plan, row.owner());
    plan.previous.iter().flat_map(|rows| rows.iter()).map(first).collect()
}

#[test]
fn members_of_another_side_are_asked_by_their_own_table_until_the_sides_are_one() {
    let mut planner = settled();
    let ids = |ids: &[u32]| ids.iter().map(|id| Some(MemberId(*id))).collect::<BTreeSet<_>>();
    planner.set_view(&view(2, vec![active(1)]), true).unwrap().unwrap();
    planner.close_window();
    assert_eq!(asked_among(&mut planner, vec![active(1)]), ids(&[1, 2, 3]), "the table before");
    assert_eq!(asked_among(&mut planner, vec![active(1), met(2), met(3)]), ids(&[2, 3]));
    let alive = |plan: &Plan, id: u32| plan.members[usize::from(planner.slot_of(MemberId(id)).0)].liveness;
    assert_eq!(alive(&planner.plan(), 2), Liveness::Alive);
    // One now: each asks by the table before again, in which member 1 was alone.
    assert_eq!(asked_among(&mut planner, vec![active(1), active(2), active(3)]), ids(&[1]));
}

#[test]
fn a_joiner_has_nothing_to_be_asked_for_and_a_smaller_side_less_than_the_table_before() {
    let mut planner = settled();
    let joiner = member(4, 1, MemberState::Joining, Liveness::Alive);
    assert!(
        asked_among(&mut planner, vec![active(1), active(2), active(3), wishing(joiner, 100)]).is_empty()
    );
    let one = BTreeSet::from([Some(MemberId(4))]);
    assert_eq!(asked_among(&mut planner, vec![active(1), active(2), active(3), met(4)]), one);
    // Member 3 is lost: what it had is on its way.
    let asked = asked_among(&mut planner, vec![active(1), active(2), met(4)]);
    assert_eq!(asked, [1, 2, 3].map(|id| Some(MemberId(id))).into());
    planner.close_window();
    assert_eq!(asked_among(&mut planner, vec![active(1), active(2), met(4)]), one);
}

#[test]
fn a_new_boot_changes_no_row_and_loses_the_flows_all_the_same() {
    let mut planner = settled();
    let restarted = member(2, 2, MemberState::Active, Liveness::Alive);
    let change =
        planner.set_view(&view(2, vec![active(1), restarted.clone(), active(3)]), true).unwrap().unwrap();
    assert_eq!(change.survivors.blank, BTreeSet::from([MemberId(2)]));
    assert_eq!(change.old.table.changed_rows(&change.new.table).count(), 0);
    // Another generation of the same boot is the same member with its state.
    let renewed = MemberView { generation: 9, ..restarted };
    assert!(planner.set_view(&view(2, vec![active(1), renewed, active(3)]), true).unwrap().is_none());
}

/// The ids in a row of the table that is asked, in its order.
fn asked_in(plan: &Plan, row: usize) -> Vec<Option<MemberId>> {
    let ranks = plan.previous.as_ref().expect("a window is open")[row].ranks;
    ranks.into_iter().filter(|slot| slot.is_some()).map(|slot| id_at(plan, slot)).collect()
}

#[test]
fn who_came_back_without_its_flows_is_not_asked_for_them_and_the_next_of_the_row_is() {
    let back = |boot| {
        let mut planner = settled();
        let restarted = member(2, boot, MemberState::Joining, Liveness::Alive);
        planner.set_view(&view(2, vec![active(1), restarted, active(3)]), true).unwrap().unwrap();
        planner.plan()
    };
    let (same, reborn) = (back(1), back(2));
    let mut first = 0;
    for row in 0..same.rows.len() {
        let mut before = asked_in(&same, row);
        assert!(before.contains(&Some(MemberId(2))), "the twin: with its flows it is asked");
        first += usize::from(before[0] == Some(MemberId(2)));
        before.retain(|id| *id != Some(MemberId(2)));
        assert_eq!(asked_in(&reborn, row), before);
    }
    assert!(first > 100);
}

#[test]
fn a_member_that_joins_again_has_lost_what_it_held_before_it_is_active() {
    let mut planner = settled();
    let joining = member(2, 2, MemberState::Joining, Liveness::Alive);
    let change = planner.set_view(&view(2, vec![active(1), joining, active(3)]), true).unwrap().unwrap();
    assert!(change.survivors.live.contains(&MemberId(2)));
    assert!(
        !change.survivors.keeps_state(MemberId(2)),
        "else nobody would send what it owned to the new backups"
    );
    assert!(change.survivors.keeps_state(MemberId(3)));
}

#[test]
fn a_leaving_member_ranks_no_more_and_stays_reachable() {
    let mut planner = settled();
    let leaving = member(2, 1, MemberState::Leaving, Liveness::Alive);
    let change = planner.set_view(&view(2, vec![active(1), leaving, active(3)]), true).unwrap().unwrap();
    assert!(change.survivors.keeps_state(MemberId(2)), "it sends its transfer tables itself");
    let plan = planner.plan();
    let slot = planner.slot_of(MemberId(2));
    assert!(plan.rows.iter().all(|row| !row.ranks.contains(&slot)));
    assert_eq!(plan.members[usize::from(slot.0)].liveness, Liveness::Alive);
}

fn service(backends: &[u8]) -> Service {
    Service {
        address: IpAddr::from([192, 0, 2, 1]),
        port: 80,
        protocol: phalanx_flow::key::TCP,
        backends: backends
            .iter()
            .map(|last| BackendId::new([10, 0, 1, *last].into(), Method::IpIp, 0))
            .collect(),
        idle: Duration::from_secs(900),
        linger: Duration::from_secs(60),
        reset_linger: Duration::from_secs(5),
        half_open: Duration::from_secs(10),
        fragment: false,
    }
}

/// A moment to count from.
#[expect(clippy::disallowed_methods, reason = "an Instant cannot be made otherwise; only differences count")]
fn start() -> Instant {
    Instant::now()
}

fn ranked(service: &Service) -> Vec<RankedBackend> {
    service.backends.iter().map(|&id| RankedBackend { id, weight: 100 }).collect()
}

#[test]
fn slots_that_change_are_unsettled_for_a_while_and_no_others() {
    let mut planner = settled();
    let now = start();
    let two = service(&[1, 2]);
    planner.set_services(std::slice::from_ref(&two));
    planner.set_usable(0, &ranked(&two), now);
    assert!(planner.settle(now + UNSETTLED));
    let before = planner.plan().services[0].slots.clone();

    let three = service(&[1, 2, 3]);
    planner.set_services(std::slice::from_ref(&three));
    assert!(planner.slots_that_would_change(0, &ranked(&two)).is_none());
    planner.set_usable(0, &ranked(&three), now);
    let plan = planner.plan();
    let unsettled = plan.services[0].unsettled.clone().expect("slots changed");
    let mut changed = 0;
    for (slot, (old, new)) in before.iter().zip(plan.services[0].slots.iter()).enumerate() {
        assert_eq!(old != new, unsettled.contains(slot as u16), "slot {slot}");
        changed += usize::from(old != new);
    }
    assert!((18_000..26_000).contains(&changed), "a third of 65,536 moves to the third backend: {changed}");
    assert!(!planner.settle(now + UNSETTLED / 2));
    assert!(planner.settle(now + UNSETTLED));
    assert!(planner.plan().services[0].unsettled.is_none());
}

#[test]
fn what_slots_were_when_a_member_was_last_heard_counts_for_a_while_after_it_is_missing() {
    let begun = start() + Duration::from_secs(100);
    let after = |milliseconds| begun + Duration::from_millis(milliseconds);
    let mut planner = settled();
    let two = service(&[1, 2]);
    planner.set_services(std::slice::from_ref(&two));
    planner.set_usable(0, &ranked(&two), after(0));
    let before = planner.plan().services[0].slots.clone();
    // Which slots count: none but those in force, those from before, or others.
    let earlier = |planner: &Planner| {
        let earlier = planner.plan().services[0].earlier.clone();
        earlier.map(|slots| if slots == before { "before" } else { "others" })
    };
    // A service that has just got its first backends had no others, whoever is missing.
    planner.note_missing(after(500), true, None);
    assert_eq!(earlier(&planner), None);
    assert!(planner.settle(after(20_000)));

    // Backends change before the member is found missing, but after it was last heard; and again after.
    let one = service(&[2]);
    planner.set_usable(0, &ranked(&one), after(99_500));
    assert_eq!(earlier(&planner), None, "nobody is missing");
    planner.note_missing(after(100_000), true, None);
    assert_eq!(earlier(&planner), Some("before"));
    planner.set_usable(0, &ranked(&two), after(101_000));
    planner.note_missing(after(104_000), false, None);
    assert_eq!(earlier(&planner), Some("before"), "it is still the same one");
    let _ = planner.settle(after(113_000));
    assert_eq!(earlier(&planner), Some("before"), "its time counts from when it was missing last");
    // Another one, which was heard after the first change.
    planner.note_missing(after(101_500), true, None);
    assert_eq!(earlier(&planner), Some("others"));
    assert!(planner.settle(after(111_500)));
    assert_eq!(earlier(&planner), None);
    // The twin: what had changed long before.
    planner.note_missing(after(200_000), true, None);
    assert_eq!(earlier(&planner), None);

    // It changed half a second before, and the one that is missing has said that it knows; or has not.
    for (agreed, expected) in [(Some(after(299_510)), None), (None, Some("others"))] {
        planner.set_usable(0, &ranked(&two), after(290_000));
        assert!(!planner.settle(after(299_000)) || earlier(&planner).is_none());
        planner.set_usable(0, &ranked(&one), after(299_500));
        planner.note_missing(after(300_000), true, agreed);
        assert_eq!(earlier(&planner).map(|_| "others"), expected);
        let _ = planner.settle(after(320_000));
    }
}

#[test]
fn backends_keep_their_position_whoever_comes_or_goes() {
    let mut planner = settled();
    let now = start();
    let two = service(&[1, 2]);
    planner.set_services(std::slice::from_ref(&two));
    planner.set_usable(0, &ranked(&two), now);
    let foreign = BackendId::new([10, 0, 1, 99].into(), Method::IpIp, 0);
    assert!(planner.register(foreign));
    assert!(!planner.register(foreign));
    let before: Vec<BackendId> = planner.plan().backends.iter().map(|backend| backend.id).collect();
    let other = service(&[3]);
    planner.set_services(std::slice::from_ref(&other));
    planner.set_usable(0, &ranked(&other), now);
    let after: Vec<BackendId> = planner.plan().backends.iter().map(|backend| backend.id).collect();
    assert_eq!(after[..before.len()], before[..]);
    assert_eq!(after.len(), before.len() + 1);
    assert_eq!(planner.destinations().backends.len(), after.len());
}

#[test]
fn a_planned_change_moves_no_row_until_it_is_in_force_and_is_sent_once() {
    let mut planner = settled();
    let before = planner.plan().rows;
    assert!(planner.set_view(&joining(), true).unwrap().is_none());
    let change = planner.set_pending(&joining()).unwrap().expect("there is something to send");
    let mut joiner = Planner::new(fixed(4)).unwrap();
    joiner.set_view(&joining(), true).unwrap().expect("the table of the others");
    let foreseen = joiner.joined(&joining()).unwrap();
    assert_eq!(foreseen.table.members(), change.new.table.members(), "what a joiner makes room for");
    assert!(change.survivors.blank.contains(&MemberId(4)));
    assert!(change.old.table.changed_rows(&change.new.table).count() > 0);
    assert!(Arc::ptr_eq(&planner.plan().rows, &before), "the forwarder goes on as it was");
    assert!(planner.set_pending(&joining()).unwrap().is_none(), "once is enough");

    let joined = view(2, vec![active(1), active(2), active(3), active(4)]);
    let switch = planner.set_view(&joined, true).unwrap().expect("it is in force");
    assert!(switch.was_planned);
    assert!(planner.set_pending(&joined).unwrap().is_none());
    assert!(planner.pending().is_none());
    assert_eq!(switch.new.table.members(), change.new.table.members());
}

#[test]
fn a_crash_in_the_midst_of_a_planned_change_is_not_taken_for_it() {
    for sent in [false, true] {
        let mut planner = settled();
        planner.set_view(&joining(), true).unwrap();
        planner.set_pending(&joining()).unwrap().unwrap();
        if sent {
            planner.pending_is_sent();
        }
        let without = |name| {
            let mut view = joining();
            view.members.remove(1);
            View { digest: Digest(name), pending: Some(Digest(name + 1)), ..view }
        };
        let crash = planner.set_view(&without(3), false).unwrap().expect("rows move at once");
        assert!(!crash.was_planned);
        assert_eq!(crash.ahead.is_some(), sent, "only what was sent whole counts as sent");
        let next = planner.set_pending(&without(3)).unwrap().expect("another pending table");
        assert_eq!(next.old.table.members(), crash.new.table.members());
        assert_eq!(next.ahead.is_some(), sent);
    }
}

#[test]
fn a_change_that_is_dropped_leaves_nothing_behind() {
    let mut planner = settled();
    planner.set_view(&joining(), true).unwrap();
    planner.set_pending(&joining()).unwrap().unwrap();
    let alone = view(1, vec![active(1), active(2), active(3)]);
    assert!(planner.set_view(&alone, true).unwrap().is_none());
    assert!(planner.set_pending(&alone).unwrap().is_none());
    assert!(planner.pending().is_none());
    assert!(planner.previous().next().is_none());
}

#[test]
fn the_last_table_at_rest_is_asked_and_no_more_than_four_are_kept() {
    let mut planner = settled();
    let at_rest = planner.current();
    let lose = |planner: &mut Planner, ids: &[u32], settled| {
        planner.set_view(&view(9, ids.iter().copied().map(active).collect()), settled).unwrap().unwrap();
    };
    lose(&mut planner, &[1, 3], true);
    lose(&mut planner, &[1], false);
    assert!(Arc::ptr_eq(&planner.asked().unwrap(), &at_rest), "who came after it may not have got all yet");
    let newer = planner.current();
    lose(&mut planner, &[1, 2], true);
    assert!(Arc::ptr_eq(&planner.asked().unwrap(), &newer));
    lose(&mut planner, &[1, 2, 3], false);
    lose(&mut planner, &[1, 2, 3, 4], false);
    assert_eq!(planner.previous().count(), 4);
}

/// Rows as ids, for each row the first two.
fn holders_before(plan: &Plan) -> Vec<[Option<MemberId>; 2]> {
    let rows = plan.previous.as_ref().expect("a window is open");
    rows.iter().map(|row| [id_at(plan, row.ranks[0]), id_at(plan, row.ranks[1])]).collect()
}

/// Chaos broke two connections of rows whose owner and backup, by a table of eighty seconds ago, were gone for long.
#[test]
fn where_owner_and_backup_of_the_table_that_is_asked_are_gone_the_next_table_is() {
    let mut planner = settled();
    let see = |planner: &mut Planner, ids: &[u32], settled| {
        planner.set_view(&view(9, ids.iter().copied().map(active).collect()), settled).unwrap();
        holders_before(&planner.plan())
    };
    see(&mut planner, &[1, 2, 3, 4, 5], false);
    planner.close_window();
    let at_rest = see(&mut planner, &[1, 3, 4, 5], true);
    let asked = see(&mut planner, &[1, 4, 5], false);
    let gone = |holders: &[Option<MemberId>; 2]| {
        holders.iter().all(|id| [2, 3].map(|id| Some(MemberId(id))).contains(id))
    };
    let is_gone = |row: &usize| gone(&at_rest[*row]);
    let (lost, kept): (Vec<usize>, Vec<usize>) = (0..at_rest.len()).partition(is_gone);
    assert!(lost.len() > 10 && kept.len() > 10, "{} {}", lost.len(), kept.len());
    assert!(kept.iter().all(|row| asked[*row] == at_rest[*row]), "who lives is asked, whatever came since");
    assert!(lost.iter().all(|row| !gone(&asked[*row])), "somebody who lives");
}

/// Of who is in the view but has not said what it is, its own table is not known yet: the doubts have to last until then.
#[test]
fn the_lost_are_doubted_until_they_have_said_that_they_are_back() {
    let mut planner = settled();
    planner.set_view(&view(2, vec![active(1)]), true).unwrap().unwrap();
    let suspects = |planner: &Planner| {
        let suspect = |member: &PlanMember| member.liveness == Liveness::Suspect;
        planner.plan().members.into_iter().filter(suspect).count()
    };
    assert_eq!(suspects(&planner), 2);
    let back = |known| MemberView { known, admitted: false, ..active(2) };
    planner.set_view(&view(2, vec![active(1), back(false)]), true).unwrap();
    assert_eq!(suspects(&planner), 2);
    planner.set_view(&view(2, vec![active(1), back(true)]), true).unwrap();
    assert_eq!(suspects(&planner), 1);
}

/// Chaos broke a connection of a row whose owner was about to leave: with the one that had died half a minute before, half were gone, and
/// the table that had that one was asked in the place of the last.
#[test]
fn who_leaves_makes_no_half_of_the_lost() {
    let mut planner = settled();
    let see = |planner: &mut Planner, members: Vec<MemberView>| {
        planner.set_view(&view(9, members), true).unwrap();
        (planner.lost_half(), holders_before(&planner.plan()))
    };
    see(&mut planner, [1, 2, 3, 4].map(active).to_vec());
    planner.close_window();
    assert!(!see(&mut planner, [1, 2, 3].map(active).to_vec()).0, "one of four was lost");
    let leaving = member(3, 1, MemberState::Leaving, Liveness::Alive);
    let (half, asked) = see(&mut planner, vec![active(1), active(2), leaving]);
    assert!(!half, "and another one leaves");
    let is_asked = |id| asked.iter().flatten().any(|asked| *asked == Some(MemberId(id)));
    assert!(is_asked(3) && !is_asked(4), "by the table in which the leaver was a holder");
    assert!(see(&mut planner, vec![active(1)]).0, "one of two was lost");
}
