//! What the kernel's program leaves to user space and what user space finds out about it, with the program in the kernel. Needs root.

use std::collections::HashSet;
use std::io::Read as _;
use std::net::{IpAddr, Ipv4Addr};
use std::ops::Range;
use std::os::fd::AsRawFd as _;
use std::time::{Duration, Instant};

use phalanx::lab::netns::Netns;
use phalanx_flow::FlowKey;
use phalanx_flow::decide::Outcome;
use phalanx_forwarder::conformance::frames::{OUR_MAC, frame};
use phalanx_forwarder::conformance::world::{OUR_ADDRESS, World, ip};
use phalanx_forwarder::engine::TableLimits;
use phalanx_forwarder::{Drop as Reason, Forwarder, RowSet};
use phalanx_forwarder_xdp::{Config, XdpForwarder};
use phalanx_netlink::{Mac, Veth};
use socket2::{Domain, Socket, Type};

/// What an XDP program returns (`include/uapi/linux/bpf.h`).
const XDP_PASS: u32 = 2;
const XDP_TX: u32 = 3;

/// The forwarder on eth0, and the other end of the wire.
struct Site {
    forwarder: XdpForwarder,
    wire: Socket,
    interface: u32,
    netns: Netns,
}

fn start(limits: TableLimits) -> Site {
    let netns = Netns::new("host").expect("a namespace");
    let mut netlink = netns.netlink().expect("netlink");
    let veth = Veth {
        name: "eth0",
        peer: "peer0",
        peer_netns: None,
        mtu: None,
        mac: Some(Mac(OUR_MAC)),
        peer_mac: None,
    };
    netlink.create_veth(&veth).expect("a veth");
    let [interface, peer] = ["eth0", "peer0"].map(|name| {
        let index = netlink.link(name).expect("link").index;
        netlink.set_up(index).expect("up");
        index
    });
    let config = Config {
        interfaces: vec!["eth0".to_owned()],
        limits,
        data_address: ip(OUR_ADDRESS),
        pins: None,
        object: None,
    };
    let forwarder = netns
        .enter(|| XdpForwarder::start(&config, World::default().plan()))
        .expect("enter")
        .expect("the forwarder starts");
    forwarder.renew_lease(Duration::from_secs(60));
    let wire = netns.enter(|| packet_socket(peer)).expect("enter");
    Site { forwarder, wire, interface, netns }
}

/// Everything that comes out of an interface.
fn packet_socket(interface: u32) -> Socket {
    let everything = (libc::ETH_P_ALL as u16).to_be();
    let socket =
        Socket::new(Domain::PACKET, Type::RAW, Some(i32::from(everything).into())).expect("a socket");
    let address = libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        sll_protocol: everything,
        sll_ifindex: interface.cast_signed(),
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    let size = size_of::<libc::sockaddr_ll>() as u32;
    // SAFETY: the address lives through the call, with its true length.
    let bound = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), size) };
    assert_eq!(bound, 0, "{}", std::io::Error::last_os_error());
    socket.set_read_timeout(Some(Duration::from_millis(10))).expect("a timeout");
    socket
}

/// The client's first packet of connection `number`.
fn syn(number: u32) -> Vec<u8> {
    let client = IpAddr::V4(Ipv4Addr::from(0x0a09_0000 + number / 50_000));
    let port = 10_000 + number % 50_000;
    frame(&format!("ip4 {client}>192.0.2.1 tcp {port}>80 S"))
}

impl Site {
    /// Has the program process the first packets of these connections, where it has this site's routes and no others.
    fn open(&self, numbers: Range<u32>) {
        self.netns
            .enter(|| {
                for number in numbers {
                    self.forwarder.test_run(self.interface, &syn(number)).expect("run");
                }
            })
            .expect("enter");
    }

    /// Whether an IPv4 frame to a TCP port of the service comes out of the wire within `within`.
    fn comes(&self, within: Duration) -> bool {
        let start = Instant::now();
        let mut bytes = [0; 2048];
        while start.elapsed() < within {
            let Ok(length) = (&self.wire).read(&mut bytes) else { continue };
            let frame = &bytes[..length];
            if frame.get(12..14) == Some(&[8, 0]) && frame.get(30..34) == Some(&[192, 0, 2, 1]) {
                return true;
            }
        }
        false
    }

    /// What the program returns for the first packet of a connection that was sent to this MAC address.
    fn returned(&self, to: [u8; 6]) -> u32 {
        let mut frame = syn(0);
        frame[..6].copy_from_slice(&to);
        let (returned, after) = self.forwarder.test_run(self.interface, &frame).expect("run");
        assert!(returned == XDP_TX || after == frame, "what is passed is as it came");
        returned
    }

    fn dropped(&self, reason: Reason) -> u64 {
        self.forwarder.counters().dropped(reason)
    }
}

#[test]
fn a_packet_without_a_next_hop_waits_in_user_space_until_there_is_one() {
    let site = start(TableLimits { flows: 1024, half_open: 1024, ..TableLimits::default() });
    site.open(0..1);
    assert!(!site.comes(Duration::from_millis(100)), "nobody knows the way");
    let counters = site.forwarder.counters();
    assert_eq!((counters.fib_lookups, counters.punted), (1, 1));
    site.forwarder.set_next_hops(World::default().next_hops(site.interface));
    assert!(site.comes(Duration::from_millis(500)), "it was lost");
    assert_eq!(site.dropped(Reason::NoNextHop), 0);
    // From now on nobody is asked.
    site.open(1..2);
    assert_eq!(site.forwarder.counters().fib_lookups, 1);
}

#[test]
fn a_packet_whose_next_hop_never_comes_is_given_up_and_counted() {
    let site = start(TableLimits { flows: 1024, half_open: 1024, ..TableLimits::default() });
    site.open(0..1);
    assert!(!site.comes(Duration::from_millis(1_500)));
    assert_eq!(site.dropped(Reason::NoNextHop), 1);
}

#[test]
fn half_open_flows_that_are_pushed_out_are_counted_and_others_are_not() {
    let limits = TableLimits { flows: 1024, half_open: 1024, ..TableLimits::default() };
    let site = start(limits);
    site.forwarder.set_next_hops(World::default().next_hops(site.interface));
    site.open(0..100);
    let counters = site.forwarder.counters();
    assert_eq!((counters.half_open, counters.half_open_evicted), (100, 0));
    const FLOOD: u32 = 5_000;
    site.open(100..FLOOD);
    let counters = site.forwarder.counters();
    assert!(counters.half_open <= 1024 && counters.half_open > 256, "{}", counters.half_open);
    assert_eq!(counters.half_open_evicted, u64::from(FLOOD) - counters.half_open);
    // One that is sent again is none that was pushed out, nor does it push out others, but for a batch that the kernel takes out at once
    // (`LOCAL_FREE_TARGET` in `kernel/bpf/bpf_lru_list.c`) and the next new flow would have had taken out.
    const BATCH: u64 = 128;
    let before = counters.half_open_evicted;
    for _ in 0..1_000 {
        site.open(FLOOD - 1..FLOOD);
    }
    let after = site.forwarder.counters();
    assert!(after.half_open_evicted <= before + BATCH, "{} after {before}", after.half_open_evicted);
    assert_eq!(after.half_open_evicted, u64::from(FLOOD) - after.half_open);
    assert_eq!((after.outcome(Outcome::New), after.outcome(Outcome::Hit)), (u64::from(FLOOD), 1_000));
}

/// A switch floods what is for a host that it does not know; if members forwarded it, each would forward what the others had forwarded.
#[test]
fn a_frame_for_another_hosts_mac_is_left_alone_and_counted_and_the_same_for_ours_is_forwarded() {
    const OTHER: [u8; 6] = [2, 0, 0, 0, 0, 9];
    let site = start(TableLimits { flows: 1024, half_open: 1024, ..TableLimits::default() });
    let hops = World::default().next_hops(site.interface);
    site.forwarder.set_next_hops(hops.clone());
    assert_eq!(site.returned(OTHER), XDP_PASS);
    assert_eq!(site.returned([0xff; 6]), XDP_PASS);
    let counters = site.forwarder.counters();
    assert_eq!((counters.other_host, counters.half_open), (1, 0), "{counters:?}");
    assert_eq!(counters.outcome(Outcome::Passed), 1, "of the group's");
    assert_eq!(site.returned(OUR_MAC), XDP_TX);
    let counters = site.forwarder.counters();
    assert_eq!((counters.other_host, counters.half_open), (1, 1), "{counters:?}");
    // The interface is given that address: what was another's is ours, and the other way round.
    let mut netlink = site.netns.netlink().expect("netlink");
    netlink.set_mac(site.interface, Mac(OTHER)).expect("a MAC address");
    site.forwarder.set_next_hops(hops);
    assert_eq!((site.returned(OTHER), site.returned(OUR_MAC)), (XDP_TX, XDP_PASS));
}

/// The ring has room for some 43,000 events of the 60,000 here.
#[test]
fn a_full_ring_loses_events_which_is_counted_and_a_scan_finds_every_flow() {
    const FLOWS: u32 = 60_000;
    let site = start(TableLimits { flows: 1024, half_open: 1 << 17, ..TableLimits::default() });
    site.forwarder.set_next_hops(World::default().next_hops(site.interface));
    site.open(0..FLOWS);
    let mut events = Vec::new();
    while site.forwarder.poll_events(&mut events, 4_096) {}
    let told: HashSet<FlowKey> = events.iter().map(|event| event.record.key).collect();
    let lost = site.forwarder.counters().events_lost;
    assert!(lost > 0, "the ring was not full: this test shows nothing");
    assert_eq!(told.len() as u64 + lost, u64::from(FLOWS), "every event that is missing is counted");
    let mut found = HashSet::new();
    site.forwarder.visit(&RowSet::All, &mut |record| {
        // What the control plane's scan looks for.
        if record.birth == 0 {
            found.insert(record.key);
        }
    });
    assert_eq!(found.len(), FLOWS as usize, "the scan finds what the events said and what they did not");
    assert!(found.is_superset(&told) && told.len() < found.len());
}
