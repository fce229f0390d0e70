//! What packets may look like and which way they may take.

use std::time::Duration;

use phalanx::lab::{Action, LabOptions, Report, Topology};
use phalanx_flow::Method;
use phalanx_integration::{at, deviating, lossless_with_a_third_deviating, lossy, site, twin};

const CONNECTIONS: u32 = 600;

fn killed() -> LabOptions {
    site(CONNECTIONS, &deviating(&[at(2.0, Action::Kill(2))]))
}

fn routed(method: Method, options: LabOptions) -> LabOptions {
    LabOptions { topology: Topology::Routed, method: Some(method), ..options }
}

/// Full-size segments, and no link that has room for encapsulation.
fn uploads() -> LabOptions {
    LabOptions {
        uploads: 20,
        mtu: 1500,
        interval: Duration::from_millis(100),
        // Those that are opened later deviate less; few of them, and enough others that the share is no matter of luck.
        short_rate: 10,
        ..site(200, &deviating(&[at(1.5, Action::Kill(2))]))
    }
}

#[test]
fn uploads_with_an_mtu_of_1500_everywhere_break_nothing_on_a_lan() {
    let report = lossless_with_a_third_deviating(uploads());
    assert!(report.bytes > 20 << 20, "{} bytes are no uploads", report.bytes);
}

#[test]
fn uploads_with_an_mtu_of_1500_everywhere_break_nothing_over_ipip() {
    let report = lossless_with_a_third_deviating(routed(Method::IpIp, uploads()));
    assert!(report.bytes > 20 << 20, "{} bytes are no uploads", report.bytes);
}

#[test]
fn uploads_of_a_client_without_offloads_break_nothing_over_ipip() {
    lossless_with_a_third_deviating(LabOptions { client_offloads: false, ..routed(Method::IpIp, uploads()) });
}

#[test]
fn uploads_break_nothing_when_icmp_is_filtered_and_packets_may_be_fragmented() {
    lossless_with_a_third_deviating(LabOptions {
        filter_icmp: true,
        service_lines: "fragment = true".to_owned(),
        ..routed(Method::IpIp, uploads())
    });
}

#[test]
fn uploads_break_nothing_when_icmp_is_filtered_and_servers_announce_small_segments() {
    lossless_with_a_third_deviating(LabOptions {
        filter_icmp: true,
        server_mss: Some(1400),
        ..routed(Method::IpIp, uploads())
    });
}

/// The twin of the two before: the client never learns that its segments are too large for the tunnel.
#[test]
fn uploads_break_when_icmp_is_filtered_and_nothing_is_done_about_it() {
    let report = lossy(LabOptions {
        filter_icmp: true,
        uploads: 10,
        connections: 10,
        short_rate: 0,
        duration: Some(Duration::from_secs(33)),
        events: Vec::new(),
        ..routed(Method::IpIp, uploads())
    });
    assert!(report.broken <= 10, "small requests get through: {report}");
}

#[test]
fn ipv6_breaks_nothing_on_a_lan() {
    lossless_with_a_third_deviating(LabOptions { ipv6: true, ..killed() });
}

#[test]
fn ipv6_breaks_nothing_over_gue() {
    lossless_with_a_third_deviating(LabOptions { ipv6: true, ..routed(Method::Gue, killed()) });
}

#[test]
fn the_documents_crc_breaks_nothing() {
    lossless_with_a_third_deviating(LabOptions { scoring: "crc8-highest".to_owned(), ..killed() });
}

#[test]
fn the_documents_crc_breaks_connections_without_replication() {
    lossy(twin(LabOptions { scoring: "crc8-highest".to_owned(), ..killed() }));
}

#[test]
fn caches_spare_hand_offs_and_break_nothing() {
    // With four members half of the packets enter by one that holds nothing of their flow. What opens or closes is handed off with a cache
    // too, so the connections are few and busy.
    let options = |cache| LabOptions {
        members: 4,
        cache,
        short_rate: 10,
        interval: Duration::from_millis(100),
        ..site(200, &deviating(&[at(2.0, Action::Kill(2))]))
    };
    let with = lossless_with_a_third_deviating(options(true));
    let without = lossless_with_a_third_deviating(options(false));
    assert!(with.verdicts.get("cache_hit").is_some_and(|hits| *hits > 0), "{:?}", with.verdicts);
    assert_eq!(without.verdicts.get("cache_hit"), None);
    // Some 0.3 of them on a machine that has time, and more where a member that is not scheduled loses its lease.
    let handed_off = |report: &Report| report.verdicts.get("handed_off").copied().unwrap_or(0);
    let (with, without) = (handed_off(&with), handed_off(&without));
    assert!(with * 4 < without * 3, "{with} and {without}");
}

/// Two members, so that each flow's backup is the one that is not its owner; all packets enter by member 2.
fn enter_by_the_backup(interval: Duration) -> LabOptions {
    let events = deviating(&[
        at(1.0, Action::Enter(Some(2))),
        // Four times the idle timeout later only member 1 can say where its flows go, and those it was the backup of.
        at(9.0, Action::Kill(2)),
        at(9.0, Action::Enter(None)),
    ]);
    LabOptions {
        members: 2,
        interval,
        service_lines: "idle_timeout = \"2s\"".to_owned(),
        // Short connections would tell nothing here.
        short_rate: 0,
        ..site(CONNECTIONS, &events)
    }
}

#[test]
fn a_flow_that_enters_through_its_backup_for_longer_than_the_idle_timeout_stays_with_its_owner() {
    lossless_with_a_third_deviating(enter_by_the_backup(Duration::from_millis(400)));
}

#[test]
fn a_flow_that_enters_through_its_backup_is_lost_without_replication() {
    lossy(twin(enter_by_the_backup(Duration::from_millis(400))));
}

/// The other twin: silent for longer than the idle timeout, a flow is forgotten, so the timeout was in force.
#[test]
fn a_flow_that_is_silent_for_longer_than_the_idle_timeout_is_forgotten() {
    lossy(enter_by_the_backup(Duration::from_secs(6)));
}
