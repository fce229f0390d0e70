//! The rtnetlink wrapper against the kernel, in a network namespace of the test's own.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use phalanx_netlink::{
    Address, BpfFilter, BpfInstruction, Family, Lookup, Mac, Monitor, Netlink, NextHop, Reachability, Route,
    RouteKind, Rule, Veth,
};

/// Runs `body` on a thread in a network namespace of its own, which ends with the thread.
fn in_namespace(body: impl FnOnce() + Send + 'static) {
    let thread = std::thread::spawn(|| {
        // SAFETY: unshare changes only the calling thread's namespaces.
        let result = unsafe { libc::unshare(libc::CLONE_NEWNET) };
        assert_eq!(result, 0, "these tests need root: {}", std::io::Error::last_os_error());
        body();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

/// A veth pair, up, with 10.0.0.1/24 and fd00::1/64 on the first end.
fn pair(netlink: &mut Netlink) -> (u32, u32) {
    netlink
        .create_veth(&Veth {
            name: "left",
            peer: "right",
            peer_netns: None,
            mtu: Some(1700),
            mac: Some(Mac([2, 0, 0, 0, 0, 1])),
            peer_mac: None,
        })
        .expect("create");
    let left = netlink.link("left").expect("left");
    let right = netlink.link("right").expect("right");
    assert_eq!((left.mtu, left.mac, left.up), (1700, Some(Mac([2, 0, 0, 0, 0, 1])), false));
    netlink.set_up(left.index).expect("up");
    netlink.set_up(right.index).expect("up");
    netlink.add_address(&Address { index: left.index, address: ip("10.0.0.1"), prefix: 24 }).expect("v4");
    netlink.add_address(&Address { index: left.index, address: ip("fd00::1"), prefix: 64 }).expect("v6");
    (left.index, right.index)
}

#[test]
fn links_are_made_changed_listed_and_deleted() {
    in_namespace(|| {
        let mut netlink = Netlink::open().expect("open");
        let (left, right) = pair(&mut netlink);
        netlink.create_bridge("bridge").expect("bridge");
        let bridge = netlink.link("bridge").expect("bridge");
        assert_eq!(bridge.kind.as_deref(), Some("bridge"));
        netlink.set_master(right, Some(bridge.index)).expect("master");
        netlink.set_mtu(right, 9000).expect("mtu");
        let found = netlink.link_by_index(right).expect("right");
        assert_eq!(
            (found.master, found.mtu, found.up, found.running),
            (Some(bridge.index), 9000, true, true)
        );
        assert_eq!(netlink.links().expect("links").len(), 4);
        netlink.delete_link(left).expect("delete");
        assert!(netlink.link("right").expect_err("both ends go").is_not_found());
        let error = netlink.set_up(left).expect_err("it is gone");
        assert!(error.to_string().contains(&format!("set link {left} up")), "{error}");
    });
}

#[test]
fn multipath_routes_are_replaced_in_place_and_looked_up() {
    in_namespace(|| {
        let mut netlink = Netlink::open().expect("open");
        let (left, _) = pair(&mut netlink);
        for (vip, a, b, prefix) in
            [("192.0.2.1", "10.0.0.11", "10.0.0.12", 32), ("2001:db8::1", "fd00::11", "fd00::12", 128)]
        {
            let mut route =
                Route::new(ip(vip), prefix, vec![NextHop::via(left, ip(a)), NextHop::via(left, ip(b))]);
            netlink.replace_route(&route).expect("two hops");
            route.hops.truncate(1);
            route.mtu = Some(1400);
            netlink.replace_route(&route).expect("one hop");
            let hop = netlink.lookup(&Lookup::to(ip(vip))).expect("lookup");
            assert_eq!((hop.index, hop.gateway, hop.mtu), (left, Some(ip(a)), Some(1400)));
            assert!(netlink.add_route(&route).expect_err("it is there").is_exists());
            let mine: Vec<Route> = netlink
                .routes(Family::of(ip(vip)))
                .expect("routes")
                .into_iter()
                .filter(|found| found.destination == ip(vip))
                .collect();
            assert_eq!(mine, [route.clone()]);
            netlink.delete_route(&route).expect("delete");
            assert!(netlink.lookup(&Lookup::to(ip(vip))).is_err());
        }
        let here = netlink.lookup(&Lookup::to(ip("10.0.0.1"))).expect("local");
        assert_eq!(here.kind, RouteKind::Local);
    });
}

#[test]
fn a_marked_packet_uses_the_table_of_its_rule() {
    in_namespace(|| {
        let mut netlink = Netlink::open().expect("open");
        let (left, _) = pair(&mut netlink);
        let mut route = Route::default_via(left, ip("10.0.0.77"));
        route.table = 1234;
        netlink.add_route(&route).expect("route");
        let rule = Rule { family: Family::V4, mark: 7, table: 1234, priority: 100 };
        netlink.add_rule(&rule).expect("rule");
        let marked = Lookup { mark: 7, ..Lookup::to(ip("198.51.100.1")) };
        assert_eq!(netlink.lookup(&marked).expect("marked").gateway, Some(ip("10.0.0.77")));
        assert!(netlink.lookup(&Lookup::to(ip("198.51.100.1"))).is_err(), "an unmarked one has no way");
        netlink.delete_rule(&rule).expect("delete");
        assert!(netlink.lookup(&marked).is_err());
    });
}

#[test]
fn neighbours_are_set_asked_for_and_seen_to_change() {
    in_namespace(|| {
        let mut netlink = Netlink::open().expect("open");
        let (left, _) = pair(&mut netlink);
        let mac = Mac([2, 0, 0, 0, 0, 9]);
        for (known, unknown) in [("10.0.0.9", "10.0.0.10"), ("fd00::9", "fd00::10")] {
            netlink.set_neighbour(left, ip(known), mac).expect("set");
            let found = netlink.neighbour(left, ip(known)).expect("get").expect("some");
            assert_eq!((found.usable_mac(), found.state), (Some(mac), Reachability::Permanent));
            assert_eq!(netlink.neighbour(left, ip(unknown)).expect("get"), None);

            let mut monitor = Monitor::open().expect("monitor");
            assert!(!monitor.wait(Duration::ZERO).expect("nothing yet").neighbours);
            netlink.resolve_neighbour(left, ip(unknown)).expect("ask");
            let found = netlink.neighbour(left, ip(unknown)).expect("get").expect("being asked");
            assert_eq!((found.usable_mac(), found.state), (None, Reachability::Incomplete));
            // Nobody answers: after three questions, a second apart, it has failed, and the monitor says so.
            let start = Instant::now();
            loop {
                assert!(start.elapsed() < Duration::from_secs(20), "the neighbour never failed");
                let _ = monitor.wait(Duration::from_millis(500)).expect("wait");
                let state = netlink.neighbour(left, ip(unknown)).expect("get").map(|found| found.state);
                if matches!(state, None | Some(Reachability::Failed)) {
                    break;
                }
            }
        }
    });
}

#[test]
fn a_classic_program_on_ingress_is_added_replaced_listed_and_drops() {
    in_namespace(|| {
        let mut netlink = Netlink::open().expect("open");
        let (left, _) = pair(&mut netlink);
        netlink.ensure_clsact(left).expect("clsact");
        netlink.ensure_clsact(left).expect("again is no error");
        let verdict = |k| vec![BpfInstruction { code: 0x06, jt: 0, jf: 0, k }];
        let mut filter = BpfFilter { index: left, priority: 1, handle: 1, program: verdict(2) };
        netlink.add_bpf_filter(&filter).expect("add");
        assert!(netlink.add_bpf_filter(&filter).is_err(), "it is there");
        filter.program = verdict(u32::MAX);
        netlink.replace_bpf_filter(&filter).expect("replace");
        let found: Vec<_> =
            netlink.filters(left).expect("list").into_iter().filter(|filter| filter.handle != 0).collect();
        assert_eq!(found.len(), 1);
        assert_eq!((found[0].priority, found[0].handle), (1, 1));
        assert_eq!(found[0].program.as_ref(), Some(&filter.program));
        netlink.delete_bpf_filter(left, 1, 1).expect("delete");
        assert!(netlink.filters(left).expect("list").iter().all(|filter| filter.handle == 0));
        // Twin: a program that the kernel's checker refuses.
        filter.program.clear();
        assert!(netlink.add_bpf_filter(&filter).is_err());
        netlink.delete_clsact(left).expect("delete clsact");
    });
}
