//! Tables that are full.

use std::time::Duration;

use phalanx::lab::{Action, LabOptions};
use phalanx_integration::{at, deviating, lossless, run, site};

const CONNECTIONS: u32 = 2200;
/// The least that is allowed, and less than a member's two thirds of the connections.
const MAX_FLOWS: &str = "max_flows = 1024";

#[test]
fn a_full_flow_table_falls_back_on_the_consistent_choice_and_is_counted() {
    let full = lossless(LabOptions {
        forwarder_lines: MAX_FLOWS.to_owned(),
        ..site(CONNECTIONS, &[at(1.0, Action::Kill(2))])
    });
    assert!(full.table_full > 0, "the table was never full: {full}");
    // Its twin: with room nothing is counted.
    let roomy = lossless(LabOptions { duration: None, ..site(CONNECTIONS, &[]) });
    assert_eq!(roomy.table_full, 0);
}

/// A full table is no state for those that came late; those that were first keep theirs.
#[test]
fn a_full_flow_table_evicts_no_established_flow_and_members_live_on() {
    let few_requests = |forwarder_lines: &str| LabOptions {
        forwarder_lines: forwarder_lines.to_owned(),
        // What finds no room among the established flows stays half-open, and is forgotten between two requests.
        service_lines: "half_open_timeout = \"1s\"".to_owned(),
        interval: Duration::from_secs(3),
        duration: Some(Duration::from_secs(9)),
        ..site(CONNECTIONS, &deviating(&[]))
    };
    let full = run(few_requests(MAX_FLOWS));
    assert!(full.table_full > 0);
    assert_eq!(full.problems, [""; 0], "members live on");
    let share = full.deviating_share_at_end.expect("a share");
    assert!(full.broken > 0, "connections beyond the table that deviate break");
    assert!(share > 0.1, "those in the table deviate and live: {full}");
    // The twin has room for all.
    lossless(few_requests(""));
}
