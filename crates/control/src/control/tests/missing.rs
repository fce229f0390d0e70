//! What backends were when a member was last heard, once it is missing.

use phalanx_flow::slots::RankedBackend;

use super::*;

impl Site {
    /// These are the usable backends of the service, at every member.
    fn use_backends(&mut self, backends: &[u8]) {
        let id = |&last: &u8| BackendId::new([10, 0, 1, last].into(), Method::L2, 0);
        let ranked: Vec<RankedBackend> =
            backends.iter().map(|last| RankedBackend { id: id(last), weight: 100 }).collect();
        for (control, _) in self.members.values_mut() {
            control.set_usable(self.now, std::slice::from_ref(&ranked));
        }
        self.settle();
    }

    /// By whose slots member 1 forwards what nobody knows, if not by those in force.
    fn goes_by_earlier(&self) -> bool {
        self.members[&1].0.planner().plan().services[0].earlier.is_some()
    }
}

fn site() -> Site {
    let mut site = Site::new(&[1, 2, 3]);
    site.see(&[1, 2, 3], &[], 1, None);
    site.use_backends(&[1, 2]);
    site.pass(LINGER + 4 * TICK);
    site
}

#[test]
fn backends_that_change_while_a_member_is_missing_do_not_change_where_what_it_knew_goes() {
    let mut site = site();
    site.use_backends(&[2, 3]);
    assert!(!site.goes_by_earlier(), "the twin: nobody is missing");
    site.pass(Duration::from_secs(20));
    site.suspect(3, true);
    assert!(!site.goes_by_earlier(), "nothing has changed since it was heard");
    site.use_backends(&[1, 3]);
    assert!(site.goes_by_earlier());
    // It is confirmed down, and the others have its rows.
    site.see(&[1, 2], &[], 2, None);
    assert!(site.goes_by_earlier());
    site.pass(Duration::from_secs(9));
    assert!(site.goes_by_earlier());
    site.pass(Duration::from_secs(2));
    assert!(!site.goes_by_earlier());
}

#[test]
fn who_is_lost_without_having_been_suspected_is_missing_too() {
    let mut site = site();
    site.use_backends(&[2, 3]);
    site.see(&[1, 2], &[], 2, None);
    assert!(site.goes_by_earlier());
}
