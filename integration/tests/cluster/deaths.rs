//! Members that die, stop or come back, with at least a third of the connections held by state alone.

use std::time::Duration;

use phalanx::lab::{Action, LabOptions, Topology};
use phalanx_flow::Method;
use phalanx_integration::{at, deviating, lossless_with_a_third_deviating, lossy, site, twin};

/// The number.
const CONNECTIONS: u32 = 2000;
/// Where the number is not what counts.
const FEWER: u32 = 600;

fn one_of_three_killed() -> LabOptions {
    site(CONNECTIONS, &deviating(&[at(2.0, Action::Kill(2))]))
}

fn routed(options: LabOptions, method: Method) -> LabOptions {
    LabOptions { topology: Topology::Routed, method: Some(method), ..options }
}

#[test]
fn one_of_three_members_killed_breaks_nothing_on_a_lan() {
    lossless_with_a_third_deviating(one_of_three_killed());
}

#[test]
fn one_of_three_members_killed_breaks_connections_without_replication_on_a_lan() {
    lossy(twin(one_of_three_killed()));
}

#[test]
fn one_of_three_members_killed_breaks_nothing_over_ipip() {
    lossless_with_a_third_deviating(routed(one_of_three_killed(), Method::IpIp));
}

#[test]
fn one_of_three_members_killed_breaks_connections_without_replication_over_ipip() {
    lossy(twin(routed(one_of_three_killed(), Method::IpIp)));
}

#[test]
fn one_of_three_members_killed_breaks_nothing_over_gue() {
    lossless_with_a_third_deviating(routed(one_of_three_killed(), Method::Gue));
}

/// The second dies when the first has been confirmed down (2 s) and its flows have new backups.
fn two_of_four_killed() -> LabOptions {
    let events = deviating(&[at(2.0, Action::Kill(2)), at(7.0, Action::Kill(3))]);
    LabOptions { members: 4, ..site(CONNECTIONS, &events) }
}

#[test]
fn two_of_four_members_killed_five_seconds_apart_break_nothing_on_a_lan() {
    lossless_with_a_third_deviating(two_of_four_killed());
}

#[test]
fn two_of_four_members_killed_five_seconds_apart_break_connections_without_replication() {
    lossy(twin(two_of_four_killed()));
}

#[test]
fn two_of_four_members_killed_five_seconds_apart_break_nothing_over_ipip() {
    lossless_with_a_third_deviating(routed(two_of_four_killed(), Method::IpIp));
}

/// Every tenth connection loses its owner and its first backup, and only what a third member holds of it keeps it where it is. Two of
/// five are less than half: the others do not wait to see whether it is not they who were cut off.
fn two_of_five_killed_at_once(backups: u32) -> LabOptions {
    let events = deviating(&[at(6.0, Action::Kill(2)), at(6.0, Action::Kill(3))]);
    let options = site(FEWER, &events);
    LabOptions {
        members: 5,
        cluster_lines: format!("backups = {backups}"),
        // While the cluster forms, who held a row a moment before is told of its flows too, and keeps them for one linger: that must
        // be over, or these copies would save what a third holder is to save.
        service_lines: "linger = \"2s\"".to_owned(),
        // Nobody answers these clients until both are confirmed down (2 s); then they send again after 3.2 or 6.4 s (RFC 6298 §5.5).
        duration: options.duration.map(|duration| duration + Duration::from_secs(3)),
        ..options
    }
}

#[test]
fn two_of_five_members_killed_at_once_break_nothing_with_two_backups() {
    lossless_with_a_third_deviating(two_of_five_killed_at_once(2));
}

#[test]
fn two_of_five_members_killed_at_once_break_connections_with_one_backup() {
    let report = lossy(two_of_five_killed_at_once(1));
    assert!(report.broken >= 10, "half of a tenth of the connections deviate and are nobody's any more");
}

/// The host and its links die too: nothing answers in its place, not even with an ICMP error.
fn one_of_three_crashed() -> LabOptions {
    site(FEWER, &deviating(&[at(2.0, Action::Crash(2))]))
}

#[test]
fn a_crashed_host_breaks_nothing() {
    lossless_with_a_third_deviating(routed(one_of_three_crashed(), Method::IpIp));
}

fn backend_drained_at_the_moment_of_a_death() -> LabOptions {
    let moment = 2.0;
    site(FEWER, &deviating(&[at(moment, Action::DrainBackend(2)), at(moment, Action::Kill(2))]))
}

#[test]
fn a_backend_drained_at_the_moment_a_member_dies_breaks_nothing() {
    lossless_with_a_third_deviating(backend_drained_at_the_moment_of_a_death());
}

#[test]
fn a_backend_drained_at_the_moment_a_member_dies_breaks_connections_without_replication() {
    lossy(twin(backend_drained_at_the_moment_of_a_death()));
}

fn one_stopped_for_five_seconds() -> LabOptions {
    let pause = Duration::from_secs(5);
    let options = site(FEWER, &deviating(&[at(2.0, Action::Pause(2, pause))]));
    LabOptions { duration: options.duration.map(|duration| duration + pause), ..options }
}

#[test]
fn a_member_stopped_for_five_seconds_and_back_breaks_nothing() {
    lossless_with_a_third_deviating(one_stopped_for_five_seconds());
}

#[test]
fn a_member_stopped_for_five_seconds_and_back_breaks_connections_without_replication() {
    lossy(twin(one_stopped_for_five_seconds()));
}

fn one_restarted_at_once() -> LabOptions {
    LabOptions {
        // Longer than a busy machine may keep the others from answering: a member that starts a cluster of its own over there has
        // nobody to ask, and what deviates is lost.
        cluster_lines: "bootstrap_wait = \"5s\"".to_owned(),
        ..site(FEWER, &deviating(&[at(2.0, Action::Restart(2))]))
    }
}

#[test]
fn a_member_restarted_at_once_with_the_same_id_breaks_nothing() {
    lossless_with_a_third_deviating(one_restarted_at_once());
}

#[test]
fn a_member_restarted_at_once_with_the_same_id_breaks_connections_without_replication() {
    lossy(twin(one_restarted_at_once()));
}
