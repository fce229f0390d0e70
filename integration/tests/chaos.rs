//! Changes as a seed decides, one or two at a time, with each forwarder and in each topology: a short run of what `phalanx lab --chaos` does
//! for as long as one likes. Needs root itself, for XDP.

use std::time::Duration;

use phalanx::config::ForwarderKind;
use phalanx::lab::{LabOptions, Topology};
use phalanx_integration::{lossless, lossy, site, twin};

const SEED: u64 = 4;
/// Some eight steps, of which two make the connections deviate: each waits until the members say that one of them may go, which takes
/// longer where other work keeps these from the processor (once nine seconds for the first).
const RUN: Duration = Duration::from_secs(40);
const STEPS: u64 = 4;
const CONNECTIONS: u32 = 400;

fn chaos(forwarder: ForwarderKind, topology: Topology) -> LabOptions {
    LabOptions { forwarder, topology, members: 4, duration: Some(RUN), ..site(CONNECTIONS, &[]) }
        .with_chaos(SEED)
}

fn breaks_nothing(forwarder: ForwarderKind, topology: Topology) {
    let report = lossless(chaos(forwarder, topology));
    let chaos = report.chaos.expect("a report of chaos");
    assert!(chaos.steps >= STEPS, "{} steps in {RUN:?} show little", chaos.steps);
    let share = chaos.least_deviating_share.expect("a share");
    assert!(share >= 1.0 / 3.0, "only {share} of the live connections deviate: this run proves nothing");
}

#[test]
fn chaos_with_raw_sockets_on_a_lan_breaks_nothing() {
    breaks_nothing(ForwarderKind::Rawsock, Topology::Lan);
}

#[test]
fn chaos_with_raw_sockets_over_routed_links_breaks_nothing() {
    breaks_nothing(ForwarderKind::Rawsock, Topology::Routed);
}

#[test]
fn chaos_with_xdp_on_a_lan_breaks_nothing() {
    breaks_nothing(ForwarderKind::Xdp, Topology::Lan);
}

#[test]
fn chaos_with_xdp_over_routed_links_breaks_nothing() {
    breaks_nothing(ForwarderKind::Xdp, Topology::Routed);
}

#[test]
fn chaos_breaks_connections_without_replication() {
    lossy(twin(chaos(ForwarderKind::Rawsock, Topology::Lan)));
}
