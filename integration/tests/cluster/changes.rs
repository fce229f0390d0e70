//! Members that come and go in good order, and configurations that change.

use phalanx::lab::{Action, LabOptions, Topology};
use phalanx_integration::{
    assert_every_member_was_upgraded, at, deviating, lossless_with_a_third_deviating, lossy, site, twin,
};

const CONNECTIONS: u32 = 600;

fn join_one() -> LabOptions {
    site(CONNECTIONS, &deviating(&[at(2.0, Action::Join(None))]))
}

#[test]
fn a_member_that_joins_breaks_nothing() {
    lossless_with_a_third_deviating(LabOptions { topology: Topology::Routed, ..join_one() });
}

/// The newcomer must have got what it owns, not only asked for it: soon after it has joined, who could be asked dies.
fn join_and_kill() -> LabOptions {
    site(CONNECTIONS, &deviating(&[at(2.0, Action::Join(None)), at(7.0, Action::Kill(1))]))
}

#[test]
fn a_death_after_a_join_breaks_nothing() {
    lossless_with_a_third_deviating(join_and_kill());
}

#[test]
fn a_death_after_a_join_breaks_connections_without_replication() {
    lossy(twin(join_and_kill()));
}

fn leave_one() -> LabOptions {
    site(CONNECTIONS, &deviating(&[at(2.0, Action::Leave(2))]))
}

#[test]
fn a_member_that_leaves_breaks_nothing() {
    lossless_with_a_third_deviating(leave_one());
}

#[test]
fn a_member_that_leaves_breaks_connections_without_replication() {
    lossy(twin(leave_one()));
}

#[test]
fn members_that_read_their_configuration_again_break_nothing() {
    let events = deviating(&[
        at(1.5, Action::Reload(Some(1))),
        at(1.7, Action::Reload(None)),
        at(2.0, Action::Reload(None)),
        // Something that could break: what was deviating before the reloads must still be known after them.
        at(2.2, Action::Kill(3)),
    ]);
    lossless_with_a_third_deviating(site(CONNECTIONS, &events));
}

fn upgrade() -> LabOptions {
    LabOptions {
        // As in `deaths.rs`: a member that starts a cluster of its own while the others run has nobody to ask.
        cluster_lines: "bootstrap_wait = \"5s\"".to_owned(),
        ..site(CONNECTIONS, &deviating(&[at(2.0, Action::Upgrade)]))
    }
}

/// Afterwards no process is left of those that saw the connections begin: what keeps them where they are has been handed on three times.
#[test]
fn a_rolling_upgrade_of_every_member_breaks_nothing() {
    let report = lossless_with_a_third_deviating(upgrade());
    assert_every_member_was_upgraded(&report);
}

#[test]
fn a_rolling_upgrade_of_every_member_breaks_connections_without_replication() {
    lossy(twin(upgrade()));
}

/// All of it in one life: join, leave, death, return.
#[test]
fn one_change_after_another_breaks_nothing() {
    let events = deviating(&[
        at(2.0, Action::Join(None)),
        at(6.0, Action::Leave(1)),
        at(10.0, Action::Kill(2)),
        at(15.0, Action::Join(Some(1))),
    ]);
    lossless_with_a_third_deviating(site(CONNECTIONS, &events));
}
