//! A member whose interface has no native XDP: it says so, and forwards all the same. Needs root.

use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::path::Path;
use std::time::Duration;

use phalanx::lab::world::{Host, INTERFACE};
use phalanx::lab::{Lab, metrics};
use phalanx_integration::{open_directory, poll_until, xdp_site};

/// Puts a bridge in the place of the interface, which becomes its only port: the bridge's driver has no native XDP.
fn bridge(host: &Host) {
    const PORT: &str = "wire0";
    let mut netlink = host.netns.netlink().expect("netlink");
    let wire = netlink.link(INTERFACE).expect("the interface");
    netlink.set_down(wire.index).expect("down");
    netlink.set_name(wire.index, PORT).expect("another name");
    for address in netlink.addresses().expect("addresses").iter().filter(|it| it.index == wire.index) {
        netlink.delete_address(address).expect("no address");
    }
    netlink.create_bridge(INTERFACE).expect("a bridge");
    let bridge = netlink.link(INTERFACE).expect("the bridge").index;
    netlink.set_mac(bridge, wire.mac.expect("a MAC address")).expect("the same MAC address");
    netlink.set_master(wire.index, Some(bridge)).expect("a port");
    netlink.set_up(wire.index).expect("up");
    // Brings it up, and the addresses and routes that went with the old interface.
    host.restore().expect("addresses");
}

/// Opens a connection and says something over it, which the server says back.
fn exchange(lab: &mut Lab, server: &TcpListener) {
    const LENGTH: usize = 20_000;
    let mut connection = None;
    poll_until(lab, Duration::from_secs(5), "a connection", |lab| {
        connection = lab.world().client.connect(lab.world().target(), Duration::from_millis(500)).ok();
        connection.is_some()
    });
    let mut client = connection.expect("a connection");
    let echo = || {
        let (mut accepted, _) = server.accept().expect("accept");
        let mut said = [0; LENGTH];
        accepted.read_exact(&mut said).expect("read");
        accepted.write_all(&said).expect("write");
    };
    std::thread::scope(|scope| {
        scope.spawn(echo);
        client.set_read_timeout(Some(Duration::from_secs(5))).expect("a timeout");
        client.write_all(&[7; LENGTH]).expect("write");
        let mut answer = [0; LENGTH];
        client.read_exact(&mut answer).expect("an answer");
        assert_eq!(answer, [7; LENGTH]);
    });
}

fn value(lab: &Lab, name: &str) -> f64 {
    let (_, text) = metrics::get(&lab.world().members[0].netns, "/metrics").expect("metrics");
    metrics::samples(&text).find(|(sample, _)| *sample == name).map_or(0.0, |(_, value)| value)
}

fn log(keep: &Path) -> String {
    std::fs::read_to_string(keep.join("member1.log")).expect("the member's log")
}

#[test]
fn in_generic_mode_a_member_warns_and_forwards() {
    let keep = open_directory();
    let (mut lab, server) = xdp_site(Some(keep.path()), bridge);
    exchange(&mut lab, &server);
    let log = log(keep.path());
    let warning = log.lines().find(|line| line.contains("generic mode")).unwrap_or_else(|| panic!("{log}"));
    assert!(warning.contains("WARN") && warning.contains(INTERFACE), "{warning}");
    assert!(value(&lab, "phalanx_packets_total{verdict=\"new\"}") >= 1.0, "it was not we who forwarded");
    assert!(value(&lab, "phalanx_packets_total{verdict=\"hit\"}") >= 10.0, "nor what followed");
}

/// The twin: the same site on an interface that has it.
#[test]
fn in_native_mode_a_member_forwards_without_a_warning() {
    let keep = open_directory();
    let (mut lab, server) = xdp_site(Some(keep.path()), |_| ());
    exchange(&mut lab, &server);
    let log = log(keep.path());
    assert!(!log.contains("generic mode"), "{log}");
    assert!(value(&lab, "phalanx_packets_total{verdict=\"hit\"}") >= 10.0);
}
