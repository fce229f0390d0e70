//! Changes of neighbours and routes: members with XDP programs follow them within a second. Needs root.

use std::net::{IpAddr, Ipv4Addr, TcpListener};
use std::time::{Duration, Instant};

use phalanx::lab::Lab;
use phalanx_integration::{poll_until, xdp_site};
use phalanx_netlink::{Mac, NextHop, Route};

/// What the issue promises, and what a busy machine may add.
const WITHIN: Duration = Duration::from_millis(1_500);

/// One member, one backend, and a server on the service's address there.
struct Site {
    lab: Lab,
    _server: TcpListener,
}

fn start() -> Site {
    let (lab, server) = xdp_site(None, |_| ());
    let mut site = Site { lab, _server: server };
    assert!(site.connects_within(Duration::from_secs(5)), "the site does not work at all");
    site
}

impl Site {
    /// Whether a new connection can be opened within this time, tried often: a SYN that is lost is sent again only after a second.
    fn connects_within(&mut self, within: Duration) -> bool {
        let start = Instant::now();
        while start.elapsed() < within {
            self.lab.poll().expect("poll");
            let target = self.lab.world().target();
            if self.lab.world().client.connect(target, Duration::from_millis(100)).is_ok() {
                return true;
            }
        }
        false
    }

    fn member(&self) -> (phalanx_netlink::Netlink, u32) {
        let mut netlink = self.lab.world().members[0].netns.netlink().expect("netlink");
        let index = netlink.link("eth0").expect("eth0").index;
        (netlink, index)
    }

    fn backend(&self) -> IpAddr {
        self.lab.world().backends[0].v4
    }
}

#[test]
fn packets_follow_a_neighbour_to_its_new_mac_within_a_second() {
    let mut site = start();
    let host = site.lab.world().backends[0].netns.netlink().expect("netlink").link("eth0").expect("eth0");
    let new = Mac([2, 0xab, 0, 0, 0, 9]);
    site.lab.world().backends[0].netns.netlink().expect("netlink").set_mac(host.index, new).expect("set");
    // The twin: as long as the neighbour is thought to be at its old MAC, nothing arrives.
    let old = host.mac.expect("a MAC");
    let (mut netlink, index) = site.member();
    netlink.set_neighbour(index, site.backend(), old).expect("set");
    assert!(!site.connects_within(Duration::from_millis(500)));
    netlink.set_neighbour(index, site.backend(), new).expect("set");
    assert!(site.connects_within(WITHIN), "packets did not follow");
}

#[test]
fn packets_follow_a_route_away_and_back_within_a_second() {
    let mut site = start();
    let (mut netlink, index) = site.member();
    // A way by a router that is not there.
    let nowhere = IpAddr::V4(Ipv4Addr::new(10, 0, 1, 250));
    let away = Route::new(site.backend(), 32, vec![NextHop::via(index, nowhere)]);
    netlink.set_neighbour(index, nowhere, Mac([2, 0xab, 0, 0, 0, 10])).expect("set");
    netlink.add_route(&away).expect("add");
    let start = Instant::now();
    poll_until(&mut site.lab, WITHIN, "packets go on where no route leads", |lab| {
        let target = lab.world().target();
        lab.world().client.connect(target, Duration::from_millis(100)).is_err()
    });
    println!("followed away after {:?}", start.elapsed());
    assert!(!site.connects_within(Duration::from_millis(500)));
    netlink.delete_route(&away).expect("delete");
    assert!(site.connects_within(WITHIN), "packets did not follow");
}
