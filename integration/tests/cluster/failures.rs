//! Backends that fail their checks.

use phalanx::lab::{Action, LabOptions, Report};
use phalanx_integration::{at, run, site};

/// Three hundred connections to three backends under check; backend 2 is cut off after a second. The checks are patient: those of a
/// busy machine are answered late, and no other backend may fail.
fn with_a_backend_cut_off(on_failure: &str) -> Report {
    let checks = format!(
        "[service.health]\nkind = \"tcp\"\ninterval = \"200ms\"\ntimeout = \"1s\"\nfall = 2\non_failure = \"{on_failure}\""
    );
    let events = [at(1.0, Action::CrashBackend(2))];
    let report =
        run(LabOptions { service_lines: checks, short_rate: 0, connections: 300, ..site(300, &events) });
    // A third, give or take what the slots' hash gives.
    assert!((60..=140).contains(&report.broken), "{report}");
    assert_eq!(report.completed + report.broken, 300, "the other backends' connections go on: {report}");
    report
}

#[test]
fn a_failed_backends_connections_are_reset_where_the_operator_says_so() {
    let report = with_a_backend_cut_off("reset");
    assert!(report.broken_causes.keys().all(|cause| cause.contains("reset")), "{report}");
    let resets = report.verdicts.get("reset").copied().unwrap_or_default();
    assert!(resets >= report.broken, "{report}");
}

#[test]
fn a_failed_backends_connections_are_kept_where_he_does_not() {
    let report = with_a_backend_cut_off("keep");
    assert!(report.broken_causes.keys().all(|cause| !cause.contains("reset")), "{report}");
}
