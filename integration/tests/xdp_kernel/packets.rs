//! What is promised of every packet: none sees two plans, none of a known flow is told of, and one without a next hop asks the kernel.

use std::net::IpAddr;
use std::time::Duration;

use phalanx_flow::decide::Outcome;
use phalanx_forwarder::Forwarder as _;
use phalanx_forwarder::conformance::world::{OUR_ADDRESS, World, ip};
use phalanx_forwarder::engine::TableLimits;
use phalanx_forwarder::{Plan, RowSet};
use phalanx_netlink::{Address, Mac, NextHop, Route};

use super::{XDP_TX, ack, beside, start, syn};

const LIMITS: TableLimits = TableLimits { flows: 1024, half_open: 1024, cached: 1024 };

/// A plan in which everything is handed off to `member`, and says so by its digest and its cookie.
fn all_to(member: u32) -> Plan {
    let mut plan = World { row: vec![member, 1], ..World::default() }.plan();
    plan.view_digest = word(member);
    plan.handoff.cookie = word(member);
    plan
}

/// A word that is in no frame by chance.
fn word(member: u32) -> u64 {
    u64::from_be_bytes([0xd0 + member as u8; 8])
}

#[test]
fn while_plans_change_every_packet_sees_one_of_them_whole() {
    const CHANGES: usize = 150;
    let site = start(LIMITS);
    site.forwarder.set_next_hops(World::default().next_hops(site.interface));
    let plans = [2, 3].map(|member| (member, all_to(member)));
    site.forwarder.install(plans[0].1.clone()).expect("install");
    let done = std::sync::atomic::AtomicBool::new(false);
    let mut seen = [0_u32; 2];
    beside(
        || {
            for change in 0..CHANGES {
                site.forwarder.install(plans[change % 2].1.clone()).expect("install");
            }
            done.store(true, std::sync::atomic::Ordering::Relaxed);
        },
        || {
            let packet = ack(0);
            let process = || site.forwarder.test_run(site.interface, &packet).expect("run");
            site.netns
                .enter(|| {
                    while !done.load(std::sync::atomic::Ordering::Relaxed) {
                        let (returned, frame) = process();
                        assert_eq!(returned, XDP_TX);
                        let to = u32::from(frame[33]);
                        let words = frame.windows(8).filter(|bytes| **bytes == word(to).to_be_bytes());
                        assert_eq!(words.count(), 2, "to member {to} by the other's plan: {frame:x?}");
                        seen[to as usize - 2] += 1;
                    }
                })
                .expect("enter");
        },
    );
    assert!(seen.into_iter().all(|times| times > 100), "{seen:?}: this test shows nothing");
}

#[test]
fn of_a_known_flow_no_packet_goes_to_user_space_nor_makes_an_event() {
    const PACKETS: u32 = 2_000;
    let site = start(LIMITS);
    site.forwarder.set_next_hops(World::default().next_hops(site.interface));
    site.process([syn(0), ack(0)].into_iter());
    let told = || {
        let mut events = Vec::new();
        while site.forwarder.poll_events(&mut events, 4_096) {}
        events.len()
    };
    // The twin: what is new is told, in batches.
    assert_eq!(told(), 2, "new, and established");
    site.process((0..PACKETS).map(|_| ack(0)));
    let counters = site.forwarder.counters();
    assert_eq!((told(), counters.punted, counters.events_lost), (0, 0, 0));
    assert_eq!(counters.outcome(Outcome::Hit), u64::from(PACKETS) + 1);
    let mut records = 0;
    site.forwarder.visit(&RowSet::All, &mut |_| records += 1);
    assert_eq!(records, 1);
}

#[test]
fn a_next_hop_that_only_the_kernel_knows_is_looked_up_there_and_counted_packet_by_packet() {
    const GATEWAY: Mac = Mac([2, 0, 0, 0, 0, 0x31]);
    let site = start(LIMITS);
    let gateway = ip("10.0.0.254");
    let mut netlink = site.netns.netlink().expect("netlink");
    let address = Address { index: site.interface, address: ip(OUR_ADDRESS), prefix: 24 };
    netlink.add_address(&address).expect("an address");
    netlink.set_neighbour(site.interface, gateway, GATEWAY).expect("a neighbour");
    let backends: IpAddr = ip("10.0.1.0");
    let route = Route::new(backends, 24, vec![NextHop::via(site.interface, gateway)]);
    netlink.add_route(&route).expect("a route");
    // The kernel answers for a host that forwards alone (`bpf_ipv4_fib_lookup` in net/core/filter.c).
    site.netns.sysctl(&[("net/ipv4/ip_forward", "1")]).expect("sysctl");

    for number in 0..3 {
        let (returned, frame) = site
            .netns
            .enter(|| site.forwarder.test_run(site.interface, &syn(number)))
            .expect("enter")
            .expect("run");
        assert_eq!((returned, &frame[..6]), (XDP_TX, &GATEWAY.0[..]));
    }
    let counters = site.forwarder.counters();
    let asked = (counters.fib_lookups, counters.punted, counters.outcome(Outcome::New));
    assert_eq!(asked, (3, 0, 3), "all of them asked, and none waited");
    // With next hops the share falls.
    site.forwarder.set_next_hops(World::default().next_hops(site.interface));
    site.open(3..9);
    let counters = site.forwarder.counters();
    assert_eq!((counters.fib_lookups, counters.outcome(Outcome::New)), (3, 9));
    // The twin: without the route it is not sent.
    netlink.delete_route(&route).expect("deleted");
    site.forwarder.set_next_hops(World { resolved: false, ..World::default() }.next_hops(site.interface));
    site.open(9..10);
    let counters = site.forwarder.counters();
    assert_eq!((counters.fib_lookups, counters.punted), (4, 1));
    assert!(!site.comes(Duration::from_millis(50)));
}
