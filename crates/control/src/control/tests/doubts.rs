//! What a member has when it comes back is asked for until the others have had the time to tell it theirs.

use phalanx_flow::FlowFlags;

use super::*;
use crate::control::former::{DOUBTS_LAST, SUSPECTED_AFTER, doubt_all};

impl Site {
    /// Member 1 renews its identity: the others held it to be down, or it them.
    fn renew(&mut self, generation: u32) {
        let control = &mut self.members.get_mut(&1).expect("there").0;
        let mut view = View::clone(control.view());
        for member in view.members.iter_mut().filter(|member| member.id == MemberId(1)) {
            member.generation = generation;
        }
        control.handle_view(self.now, Arc::new(view));
        self.settle();
    }

    /// How many flows member 1 has, and does not believe.
    fn doubted(&self) -> usize {
        let former = |record: Record| record.flags.has(FlowFlags::FORMER);
        (0..FLOWS).filter(|n| self.forwarder(1).get(&key(*n)).is_some_and(former)).count()
    }
}

fn site() -> Site {
    let mut site = Site::new(&[1, 2]);
    site.see(&[1, 2], &[], 1, None);
    site.pass(LINGER + 4 * TICK);
    site.open();
    site
}

#[test]
fn who_comes_back_doubts_all_it_has_and_nobody_else_does() {
    let mut site = site();
    site.renew(0);
    assert_eq!(site.doubted(), 0, "the twin: nothing has happened");
    site.renew(1);
    assert_eq!(site.doubted(), usize::from(FLOWS));
    let others = (0..FLOWS).filter_map(|n| site.forwarder(2).get(&key(n)));
    assert!(others.into_iter().all(|record| !record.flags.has(FlowFlags::FORMER)));
    // What a holder sends is believed, though it is not newer.
    site.forwarder(1).upsert(&[record(0)]);
    assert_eq!(site.doubted(), usize::from(FLOWS) - 1);
    site.pass(DOUBTS_LAST - 4 * TICK);
    assert!(site.doubted() > 0);
    site.pass(8 * TICK);
    assert_eq!(site.doubted(), 0);
}

#[test]
fn what_an_earlier_process_has_left_is_doubted_before_there_is_any_view() {
    let site = site();
    doubt_all(site.forwarder(1));
    assert_eq!(site.doubted(), usize::from(FLOWS));
}

#[test]
fn who_is_heard_by_nobody_doubts_what_it_has_for_as_long_as_it_suspects_anybody() {
    // Of two members the other one is rather lost.
    let mut pair = site();
    pair.members.get_mut(&1).expect("there").0.handle_unheard(pair.now);
    assert_eq!(pair.doubted(), 0);

    let mut site = Site::new(&[1, 2, 3]);
    site.see(&[1, 2, 3], &[], 1, None);
    site.pass(LINGER + 4 * TICK);
    site.open();
    let had = (0..FLOWS).filter(|n| site.has(1, *n)).count();
    assert!(had > 0);
    // Who suspects both others takes neither for lost: it rather doubts itself.
    for id in [2, 3] {
        site.suspect(id, true);
    }
    assert!(site.members[&1].0.view().members.iter().all(|member| member.liveness == Liveness::Alive));
    site.members.get_mut(&1).expect("there").0.handle_unheard(site.now);
    assert_eq!(site.doubted(), had);
    // Nobody resolves doubts while those who could are suspected.
    site.pass(DOUBTS_LAST + 4 * TICK);
    assert!(site.doubted() > 0);
    for id in [2, 3] {
        site.suspect(id, false);
    }
    site.pass(DOUBTS_LAST + 4 * TICK);
    assert_eq!(site.doubted(), 0);
}

#[test]
fn who_stood_still_for_as_long_as_others_take_to_suspect_it_doubts_what_it_has() {
    for (still, doubts) in [(TICK, 0), (SUSPECTED_AFTER, usize::from(FLOWS))] {
        let mut site = site();
        site.now += still - TICK;
        site.pass(TICK);
        assert_eq!(site.doubted(), doubts);
    }
}

#[test]
fn time_that_a_member_stood_still_resolves_no_doubt() {
    let mut site = site();
    site.renew(1);
    site.now += DOUBTS_LAST;
    site.pass(4 * TICK);
    assert_eq!(site.doubted(), usize::from(FLOWS));
    site.pass(DOUBTS_LAST + 4 * TICK);
    assert_eq!(site.doubted(), 0);
}

#[test]
fn doubts_last_while_nobody_is_there_to_resolve_them() {
    let mut site = site();
    let alone = |site: &mut Site, generation| {
        let control = &mut site.members.get_mut(&1).expect("there").0;
        let mut view = View::clone(control.view());
        view.members.retain(|member| member.id == MemberId(1));
        view.members[0].generation = generation;
        view.digest = Digest(7);
        control.handle_view(site.now, Arc::new(view));
    };
    alone(&mut site, 1);
    assert_eq!(site.doubted(), usize::from(FLOWS));
    site.pass(LINGER + 2 * DOUBTS_LAST);
    assert_eq!(site.doubted(), usize::from(FLOWS));
    // The view of all again, in which it has the same generation.
    alone(&mut site, 1);
    site.see(&[1, 2], &[], 8, None);
    site.renew(1);
    assert!(site.doubted() <= usize::from(FLOWS));
    site.pass(LINGER + DOUBTS_LAST);
    assert_eq!(site.doubted(), 0);
}

#[test]
fn who_comes_back_compares_what_it_has_with_who_took_its_rows() {
    for generation in [0, 1] {
        let mut site = site();
        // Just after a comparison.
        site.pass(REPAIR_EVERY);
        let owned = |n: &u16| site.holders(*n) == [1, 2];
        let owned: Vec<u16> = (0..FLOWS).filter(owned).collect();
        assert!(owned.len() > 10);
        for &n in &owned {
            let guess = Record {
                birth: record(n).birth + 1_000,
                flags: FlowFlags(FlowFlags::RECOVERED),
                ..record(n)
            };
            site.forwarder(2).remove(&key(n), 0, Duration::ZERO);
            site.forwarder(2).upsert(&[guess]);
        }
        site.renew(generation);
        site.pass(Duration::from_secs(4));
        let known =
            |n: &&u16| site.forwarder(2).get(&key(**n)).is_some_and(|held| held.birth == record(**n).birth);
        let known = owned.iter().filter(known).count();
        assert_eq!(known, if generation > 0 { owned.len() } else { 0 }, "the twin: at the next comparison");
    }
}
