//! The lab's own instrument, without any member: the router spreads the connections over the backends itself.

use std::time::Duration;

use phalanx::lab::{self, Action, Event, LabOptions, Topology};

fn options() -> LabOptions {
    LabOptions {
        direct: true,
        connections: 300,
        short_rate: 20,
        interval: Duration::from_millis(100),
        duration: Some(Duration::from_secs(2)),
        ..LabOptions::default()
    }
}

#[test]
fn a_site_left_alone_breaks_nothing_however_it_is_laid_out() {
    for (topology, ipv6, client_offloads) in [
        (Topology::Lan, false, true),
        (Topology::Lan, true, true),
        (Topology::Routed, false, false),
        (Topology::Routed, true, true),
    ] {
        let report =
            lab::run(LabOptions { topology, ipv6, client_offloads, uploads: 5, ..options() }).expect("run");
        assert_eq!((report.broken, report.problems.len()), (0, 0), "{report}");
        assert!(report.opened >= 305 && report.completed == report.opened, "{report}");
        assert!(report.bytes > 1_000_000, "{report}");
    }
}

#[test]
fn a_backend_that_is_cut_off_breaks_its_connections_and_no_other() {
    let crash = Event { at: Duration::from_millis(500), action: Action::CrashBackend(2) };
    let report = lab::run(LabOptions { events: vec![crash], short_rate: 0, ..options() }).expect("run");
    // A third, give or take what chance gives the router's hash.
    assert!((60..=140).contains(&report.broken), "{report}");
    assert_eq!(report.completed + report.broken, 300, "{report}");
    assert!(report.broken_causes.keys().all(|cause| cause.starts_with("client: ")), "{report}");
}
