//! A bulk transfer over kernel TCP, byte for byte, with the default offloads on every interface: merged frames and unfinished
//! checksums by every method, and through the hand-off.
//!
//! ```text
//!  client 10.0.0.100 ─┐                      ┌─ member 1, 10.0.0.1 (hands off)     every link 1,500 bytes
//!                     ├──── one segment ─────┼─ member 2, 10.0.0.2
//!  backend 10.0.0.50 ─┘                      └─ …
//! ```

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd as _;
use std::time::{Duration, Instant};

use phalanx::decap::{self, DecapArgs, DeviceKind};
use phalanx::lab::netns::{Netns, switch_offloads_off};
use phalanx_flow::decide::Outcome;
use phalanx_flow::{BackendId, MemberSlot, Method};
use phalanx_forwarder::conformance::world::World;
use phalanx_forwarder::{Counters, Forwarder as _, NextHop, NextHops, Plan, PlanBackend};
use phalanx_forwarder_rawsock::{Config, RawsockForwarder};
use phalanx_integration::wire::ip;
use phalanx_netlink::{Address, Mac, NextHop as Hop, Route, Veth};

const GUE_PORT: u16 = 6080;
const INTERFACE: &str = "eth0";
/// What the client sends, and what it gets back afterwards.
const UPLOAD_BYTES: usize = 8 << 20;
const DOWNLOAD_BYTES: usize = 1 << 20;
/// A connection without progress for this long is broken.
const PATIENCE: Duration = Duration::from_secs(10);
/// Payload of a full segment of 1,500 bytes.
const SEGMENT: u64 = 1448;

/// How a transfer goes.
#[derive(Clone, Copy, Debug)]
struct Way {
    method: Method,
    /// The backend's address.
    backend: &'static str,
    /// Whether the packets enter by a member that hands them off.
    handed_off: bool,
    /// Whether the client leaves segmentation and checksums to its interface.
    offloads: bool,
}

/// A host on the segment.
struct Host {
    netns: Netns,
    index: u32,
    mac: [u8; 6],
}

fn host(switch: &Netns, bridge: u32, number: u8) -> Host {
    let netns = Netns::new(&format!("host{number}")).expect("these tests need root");
    netns
        .sysctl(&[
            ("net/ipv6/conf/default/accept_dad", "0"),
            ("net/ipv4/conf/all/rp_filter", "0"),
            ("net/ipv4/conf/default/rp_filter", "0"),
        ])
        .expect("sysctl");
    let mac = [2, 0, 0, 0, 1, number];
    let mut there = switch.netlink().expect("netlink");
    let port = format!("port{number}");
    there
        .create_veth(&Veth {
            name: &port,
            peer: INTERFACE,
            peer_netns: Some(netns.as_fd()),
            mtu: None,
            mac: None,
            peer_mac: Some(Mac(mac)),
        })
        .expect("veth");
    let port = there.link(&port).expect("port").index;
    there.set_master(port, Some(bridge)).expect("master");
    there.set_up(port).expect("up");
    let mut netlink = netns.netlink().expect("netlink");
    let index = netlink.link(INTERFACE).expect("eth0").index;
    netlink.set_up(index).expect("up");
    for (address, prefix) in [(format!("10.0.0.{number}"), 24), (format!("fd00::{number}"), 64)] {
        netlink.add_address(&Address { index, address: ip(&address), prefix }).expect("address");
    }
    Host { netns, index, mac }
}

/// The world's plan with one backend, as `member` sees it.
fn plan(way: Way, member: u16) -> Plan {
    let world = World { row: if way.handed_off { vec![2, 1] } else { vec![1, 2] }, ..World::default() };
    let backend = ip(way.backend);
    let port = if way.method == Method::Gue { GUE_PORT } else { 0 };
    let source = if backend.is_ipv4() { format!("10.0.0.{member}") } else { format!("fd00::{member}") };
    Plan {
        local: MemberSlot(member - 1),
        backends: vec![PlanBackend { id: BackendId::new(backend, way.method, port), source: ip(&source) }],
        ..world.plan()
    }
}

fn start(way: Way, member: u16, host: &Host, others: &[&Host], backend: &Host) -> RawsockForwarder {
    let config = Config::new(vec![INTERFACE.to_owned()], ip(&format!("10.0.0.{member}")));
    let start = || RawsockForwarder::start(&config, plan(way, member));
    let forwarder = host.netns.enter(start).expect("enter").expect("the forwarder starts");
    let to = |other: &Host| {
        Some(NextHop { interface: host.index, source_mac: host.mac, destination_mac: other.mac, mtu: 1500 })
    };
    forwarder.set_next_hops(NextHops {
        members: others.iter().map(|other| to(other)).chain([None, None]).collect(),
        backends: vec![to(backend)],
    });
    forwarder.renew_lease(Duration::from_secs(600));
    forwarder
}

/// Bytes that show where they were in the stream.
fn pattern(length: usize, seed: u32) -> Vec<u8> {
    let mut state = seed;
    let next = || {
        // Xorshift (Marsaglia 2003).
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state.to_le_bytes()
    };
    std::iter::repeat_with(next).flatten().take(length).collect()
}

fn assert_same(label: &str, got: &[u8], wanted: &[u8]) {
    let differs = got.iter().zip(wanted).position(|(got, wanted)| got != wanted);
    assert_eq!(
        (got.len(), differs),
        (wanted.len(), None),
        "{label}: length, and the first byte that differs"
    );
}

fn serve(listener: &TcpListener) -> Vec<u8> {
    listener.set_nonblocking(true).expect("nonblocking");
    let start = Instant::now();
    let (mut stream, _) = loop {
        match listener.accept() {
            Ok(accepted) => break accepted,
            Err(error) => assert!(start.elapsed() < PATIENCE, "no client came: {error}"),
        }
        std::thread::sleep(Duration::from_millis(1));
    };
    stream.set_nonblocking(false).expect("blocking");
    stream.set_read_timeout(Some(PATIENCE)).expect("timeout");
    let mut got = Vec::new();
    stream.read_to_end(&mut got).expect("the upload");
    // The client has said that it is done: what follows rests on its acknowledgements alone.
    stream.write_all(&pattern(DOWNLOAD_BYTES, 2)).expect("the download");
    got
}

fn call(service: SocketAddr) -> Vec<u8> {
    let mut stream = TcpStream::connect_timeout(&service, PATIENCE).expect("connect");
    stream.set_read_timeout(Some(PATIENCE)).expect("timeout");
    stream.set_write_timeout(Some(PATIENCE)).expect("timeout");
    stream.write_all(&pattern(UPLOAD_BYTES, 1)).expect("the upload");
    stream.shutdown(Shutdown::Write).expect("shutdown");
    let mut got = Vec::new();
    stream.read_to_end(&mut got).expect("the download");
    got
}

/// Carries out one transfer of each family, compares every byte, and returns what the two members counted.
fn transfer(way: Way) -> [Counters; 2] {
    let switch = Netns::new("switch").expect("these tests need root");
    let mut netlink = switch.netlink().expect("netlink");
    netlink.create_bridge("bridge").expect("bridge");
    let bridge = netlink.link("bridge").expect("bridge").index;
    netlink.set_up(bridge).expect("up");
    let [client, first, second, backend] = [100, 1, 2, 50].map(|number| host(&switch, bridge, number));
    if !way.offloads {
        client.netns.enter(|| switch_offloads_off(INTERFACE)).expect("enter").expect("offloads off");
    }

    let services = [("192.0.2.1", 32, "10.0.0.1"), ("2001:db8::1", 128, "fd00::1")];
    let mut there = backend.netns.netlink().expect("netlink");
    let loopback = there.link("lo").expect("lo").index;
    let mut here = client.netns.netlink().expect("netlink");
    for (service, prefix, member) in services {
        there.add_address(&Address { index: loopback, address: ip(service), prefix }).expect("service");
        let hop = Hop::via(client.index, ip(member));
        here.add_route(&Route::new(ip(service), prefix, vec![hop])).expect("route");
    }
    if way.method != Method::L2 {
        let args = DecapArgs { device: "decap".to_owned(), kind: DeviceKind::Auto, gue_port: GUE_PORT };
        // The thread lives as long as the test's process: a decapsulator only ends with it.
        drop(backend.netns.spawn_thread(move || decap::run(&args)).expect("spawn"));
        let start = Instant::now();
        while !there.link("decap").is_ok_and(|link| link.up) {
            assert!(start.elapsed() < PATIENCE, "the decapsulator makes no device");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    let members = [&first, &second];
    let forwarders = [start(way, 1, &first, &members, &backend), start(way, 2, &second, &members, &backend)];
    for (service, ..) in services {
        let service = SocketAddr::new(ip(service), 80);
        let label = format!("{way:?} {service}");
        let listener = backend.netns.enter(|| TcpListener::bind(service)).expect("enter").expect("bind");
        let (uploaded, downloaded) = std::thread::scope(|scope| {
            let server = scope.spawn(|| serve(&listener));
            let downloaded = client.netns.enter(|| call(service)).map_err(|error| error.to_string());
            let counted = || forwarders.each_ref().map(|forwarder| forwarder.counters());
            let downloaded = downloaded.unwrap_or_else(|error| panic!("{label}: {error}; {:?}", counted()));
            (server.join().expect("the server"), downloaded)
        });
        assert_same(&format!("{label}, upload"), &uploaded, &pattern(UPLOAD_BYTES, 1));
        assert_same(&format!("{label}, download"), &downloaded, &pattern(DOWNLOAD_BYTES, 2));
    }
    let counters = [forwarders[0].counters(), forwarders[1].counters()];
    let [entered, _] = &counters;
    let expected = if way.handed_off { Outcome::HandedOff } else { Outcome::Hit };
    assert!(entered.outcome(expected) > 100, "{way:?}: {entered:?}");
    if way.handed_off {
        assert_eq!(entered.outcome(Outcome::Hit), 0, "{entered:?}");
        assert!(counters[1].handoffs_in > 100, "{way:?}: {:?}", counters[1]);
    }
    for counters in &counters {
        assert_eq!(counters.dropped(phalanx_forwarder::Drop::Malformed), 0, "{counters:?}");
        assert_eq!(counters.dropped(phalanx_forwarder::Drop::Transmit), 0, "{counters:?}");
    }
    counters
}

/// Segments of both uploads, had the client cut them itself.
const SEGMENTS: u64 = 2 * UPLOAD_BYTES as u64 / SEGMENT;

fn packets(counters: &Counters) -> u64 {
    counters.outcomes.iter().sum()
}

fn way(method: Method, backend: &'static str, handed_off: bool) -> Way {
    Way { method, backend, handed_off, offloads: true }
}

#[test]
fn merged_frames_stay_whole_in_a_segment() {
    let [member, _] = transfer(way(Method::L2, "10.0.0.50", false));
    assert!(packets(&member) < SEGMENTS / 2, "no merged frames came: {member:?}");
    assert_eq!(member.segmented, 0, "{member:?}");
}

#[test]
fn merged_frames_are_cut_for_ipip() {
    for backend in ["10.0.0.50", "fd00::50"] {
        let [member, _] = transfer(way(Method::IpIp, backend, false));
        assert!(member.segmented > 100, "no merged frames came: {member:?}");
        assert!(packets(&member) < SEGMENTS, "{member:?}");
    }
}

#[test]
fn merged_frames_are_cut_for_gue() {
    for backend in ["10.0.0.50", "fd00::50"] {
        let [member, _] = transfer(way(Method::Gue, backend, false));
        assert!(member.segmented > 100, "no merged frames came: {member:?}");
    }
}

#[test]
fn merged_frames_are_cut_for_the_hand_off_whatever_the_method_behind_it() {
    for method in [Method::L2, Method::IpIp, Method::Gue] {
        let [entered, owner] = transfer(way(method, "10.0.0.50", true));
        assert!(entered.segmented > 100, "no merged frames came: {entered:?}");
        assert!(owner.outcome(Outcome::Hit) > SEGMENTS / 2, "{owner:?}");
    }
}

/// The twin: a client that merges nothing shows that it was merged frames which the others counted.
#[test]
fn without_offloads_nothing_is_cut() {
    for handed_off in [false, true] {
        let [member, _] = transfer(Way { offloads: false, ..way(Method::IpIp, "10.0.0.50", handed_off) });
        assert_eq!(member.segmented, 0, "{member:?}");
        assert!(packets(&member) > SEGMENTS, "{member:?}");
    }
}
