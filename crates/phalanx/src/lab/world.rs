//! The site: namespaces, links and addresses.
//!
//! ```text
//!   lan                                        routed
//!   client ── router ═╦═ member 1..N           client ── router ─┬─ member 1    each on a
//!            (bridge) ╚═ backend 1..M                             ├─ member 2    subnet of
//!                                                                 └─ backend 1   its own
//! ```
//! All links are veth pairs with the kernel's default offloads; every host has IPv4 and IPv6 addresses.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::num::NonZero;
use std::os::fd::AsFd as _;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use anyhow::{Context as _, Result, bail};
use phalanx_netlink::{Address, BpfFilter, BpfInstruction, Netlink, NextHop, Route, Veth};

use super::netns::{Netns, face_xdp, switch_offloads_off};

/// The interface of every host.
pub const INTERFACE: &str = "eth0";
/// The service's port.
pub const SERVICE_PORT: u16 = 80;
/// MTU of the client's link, and of all where 1,500 is asked for.
pub const CLIENT_MTU: u32 = 1500;
/// MTU between members and backends by default: room for every encapsulation.
pub const INNER_MTU: u32 = 1700;
/// Hosts of a kind at most: they share a byte of the address plan.
pub const MAX_HOSTS: u32 = 99;
/// Connections that wait to be accepted by a server.
const BACKLOG: i32 = 4096;

/// How the site is laid out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Topology {
    /// Members and backends on one segment.
    #[default]
    Lan,
    /// Every member and every backend on a subnet of its own behind the router.
    Routed,
}

/// What to build.
#[derive(Clone, Copy, Debug)]
pub struct WorldOptions {
    /// How it is laid out.
    pub topology: Topology,
    /// Hosts for members, 0 to 99.
    pub members: u32,
    /// Hosts for backends, 1 to 99.
    pub backends: u32,
    /// MTU of the links of members, and of backends in `routed`, in bytes.
    pub mtu: u32,
    /// The service has an IPv6 address.
    pub ipv6: bool,
    /// The client's interface keeps the kernel's default offloads.
    pub client_offloads: bool,
    /// Members have XDP programs.
    pub xdp: bool,
    /// ICMP does not reach the client.
    pub filter_icmp: bool,
    /// The largest segment the servers announce, in bytes: how operators live with filtered ICMP.
    pub server_mss: Option<u32>,
}

/// One host of the site.
#[derive(Debug)]
pub struct Host {
    /// Its number, from 1.
    pub number: u32,
    /// Its namespace.
    pub netns: Arc<Netns>,
    /// Its IPv4 address.
    pub v4: IpAddr,
    /// Its IPv6 address.
    pub v6: IpAddr,
    gateway_v4: IpAddr,
    gateway_v6: IpAddr,
    prefix_v4: u8,
    server_mss: Option<u32>,
    /// The router's interface towards it, by which packets are routed.
    router_link: u32,
    /// The router's end of its link; on a segment not the same.
    pub port: u32,
}

impl Host {
    /// Its address of the service's family (`v6`), or IPv4.
    pub const fn address(&self, v6: bool) -> IpAddr {
        if v6 { self.v6 } else { self.v4 }
    }

    /// The next hop by which the router reaches it.
    pub const fn next_hop(&self, v6: bool) -> NextHop {
        NextHop::via(self.router_link, self.address(v6))
    }

    /// Cuts its link: nothing it sends arrives any more, and nothing reaches it.
    pub fn cut(&self) -> Result<()> {
        let mut netlink = self.netns.netlink()?;
        let index = netlink.link(INTERFACE)?.index;
        Ok(netlink.set_down(index)?)
    }

    /// Sets its link up, with addresses and routes (which go when a link is cut).
    pub fn restore(&self) -> Result<()> {
        let mut netlink = self.netns.netlink()?;
        let index = netlink.link(INTERFACE)?.index;
        netlink.set_up(index)?;
        netlink.add_address(&Address { index, address: self.v4, prefix: self.prefix_v4 })?;
        netlink.add_address(&Address { index, address: self.v6, prefix: 64 })?;
        for gateway in [self.gateway_v4, self.gateway_v6] {
            let mut route = Route::default_via(index, gateway);
            route.advmss = self.server_mss;
            netlink.replace_route(&route)?;
        }
        Ok(())
    }
}

/// The whole site.
#[derive(Debug)]
pub struct World {
    /// What was built.
    pub options: WorldOptions,
    /// Where the clients are.
    pub client: Netns,
    /// The router's namespace.
    pub router: Netns,
    /// Hosts for members, in order of number.
    pub members: Vec<Host>,
    /// Hosts for backends, in order of number.
    pub backends: Vec<Host>,
    /// The programs of the router's interfaces, where members have some.
    #[expect(dead_code, reason = "they are attached for as long as these are open")]
    passes: Vec<OwnedFd>,
}

impl World {
    /// Builds it all. Nothing has a name outside of this process, and all goes with it.
    pub fn build(options: WorldOptions) -> Result<Self> {
        for (what, count) in [("members", options.members), ("backends", options.backends)] {
            if count > MAX_HOSTS {
                bail!("{count} {what} are too many: the lab's address plan has room for {MAX_HOSTS}");
            }
        }
        let router = Netns::new("router")?;
        router.sysctl(COMMON)?;
        router.sysctl(&[
            ("net/ipv4/ip_forward", "1"),
            ("net/ipv6/conf/all/forwarding", "1"),
            ("net/ipv4/fib_multipath_hash_policy", "1"),
            ("net/ipv6/fib_multipath_hash_policy", "1"),
            ("net/ipv4/conf/all/send_redirects", "0"),
            ("net/ipv4/conf/default/send_redirects", "0"),
        ])?;
        let mut builder = Builder {
            options,
            netlink: router.netlink()?,
            router: &router,
            bridge: None,
            passes: Vec::new(),
        };
        let client = builder.client()?;
        builder.segment()?;
        let members =
            (1..=options.members).map(|number| builder.member(number)).collect::<Result<Vec<_>>>()?;
        let backends =
            (1..=options.backends).map(|number| builder.backend(number)).collect::<Result<Vec<_>>>()?;
        let passes = std::mem::take(&mut builder.passes);
        Ok(Self { options, client, router, members, backends, passes })
    }

    /// The service's address.
    pub const fn service(&self) -> IpAddr {
        service_address(self.options.ipv6)
    }

    /// The service's address and port.
    pub const fn target(&self) -> SocketAddr {
        SocketAddr::new(self.service(), SERVICE_PORT)
    }

    /// Listening sockets of all backends, each with its backend's number.
    pub fn listeners(&self) -> Result<Vec<(u32, TcpListener)>> {
        self.backends
            .iter()
            .map(|host| Ok((host.number, host.netns.listen(self.target(), BACKLOG)?)))
            .collect()
    }
}

/// Lets one processor receive all that comes to interfaces that will be made in `netns`, as one queue of a network card would have it.
///
/// A client's last packet of the handshake and its first data may else be received by two processors at once, and Linux may take the
/// latter for a segment of no connection while the former makes a socket of the request: chaos lost one connection of some 100,000 to a reset
/// by its own backend, 40 us after the SYN-ACK. Kernels before 6.3 have no such setting.
fn one_processor(netns: &Netns, number: u32) -> Result<()> {
    const SETTING: &str = "net/core/rps_default_mask";
    if !std::fs::exists(format!("/proc/sys/{SETTING}"))? {
        return Ok(());
    }
    let processors = std::thread::available_parallelism().map_or(1, NonZero::get).min(32);
    let mask = 1u32 << (number as usize % processors);
    netns.sysctl(&[(SETTING, &format!("{mask:x}"))])
}

/// The service's address, from the blocks for documentation (RFC 5737, RFC 3849).
const fn service_address(v6: bool) -> IpAddr {
    if v6 {
        IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1))
    } else {
        IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1))
    }
}

/// Settings of every host: packets may leave by another way than they came, and IPv6 addresses are usable at once.
const COMMON: &[(&str, &str)] = &[
    ("net/ipv4/conf/all/rp_filter", "0"),
    ("net/ipv4/conf/default/rp_filter", "0"),
    ("net/ipv6/conf/all/accept_dad", "0"),
    ("net/ipv6/conf/default/accept_dad", "0"),
    ("net/ipv6/conf/all/accept_ra", "0"),
    ("net/ipv6/conf/default/accept_ra", "0"),
];

struct Builder<'a> {
    options: WorldOptions,
    netlink: Netlink,
    router: &'a Netns,
    bridge: Option<u32>,
    passes: Vec<OwnedFd>,
}

impl Builder<'_> {
    fn client(&mut self) -> Result<Netns> {
        let client = Netns::new("client")?;
        client.sysctl(COMMON)?;
        client.sysctl(&[
            // Thousands of connections to one address and port, also right after others ended.
            ("net/ipv4/ip_local_port_range", "1024 65535"),
            ("net/ipv4/tcp_tw_reuse", "1"),
            ("net/ipv4/tcp_no_metrics_save", "1"),
            // A socket's hash travels with its packets through a veth and is what the router spreads them by; drawing a new one
            // after a timeout would move the connection to another next hop, which no router does.
            ("net/core/txrehash", "0"),
        ])?;
        let link = self.link(&client, "client", CLIENT_MTU)?;
        let (v4, v6) = (v4(198, 18, 0, 0), v6(0, 0));
        self.give(link, v4(1), 24, v6(1))?;
        let host = Host {
            number: 0,
            netns: Arc::new(client),
            v4: v4(2),
            v6: v6(2),
            gateway_v4: v4(1),
            gateway_v6: v6(1),
            prefix_v4: 24,
            server_mss: None,
            router_link: link,
            port: link,
        };
        host.restore()?;
        let client = Arc::into_inner(host.netns).context("the client's namespace is shared")?;
        if !self.options.client_offloads {
            client
                .enter(|| switch_offloads_off(INTERFACE))?
                .context("cannot switch the client's offloads off")?;
        }
        if self.options.filter_icmp {
            filter_icmp(&client)?;
        }
        Ok(client)
    }

    /// The bridge of a LAN, which is the router's interface on it.
    fn segment(&mut self) -> Result<()> {
        if self.options.topology == Topology::Lan {
            self.netlink.create_bridge("lan")?;
            let bridge = self.netlink.link("lan")?.index;
            self.netlink.set_mtu(bridge, self.options.mtu)?;
            self.netlink.set_up(bridge)?;
            self.give(bridge, v4(10, 0, 1, 0)(1), 24, v6(1, 0)(1))?;
            self.bridge = Some(bridge);
        }
        Ok(())
    }

    fn member(&mut self, number: u32) -> Result<Host> {
        let netns = Netns::new(&format!("member{number}"))?;
        netns.sysctl(COMMON)?;
        self.host(netns, number, 1, 10, self.options.mtu)
    }

    fn backend(&mut self, number: u32) -> Result<Host> {
        let netns = Netns::new(&format!("backend{number}"))?;
        netns.sysctl(COMMON)?;
        netns.sysctl(&[
            // The service's address is on loopback and must not be announced on the segment.
            ("net/ipv4/conf/all/arp_ignore", "1"),
            ("net/ipv4/conf/all/arp_announce", "2"),
            ("net/core/somaxconn", "65535"),
            ("net/ipv4/tcp_max_syn_backlog", "65535"),
        ])?;
        one_processor(&netns, number)?;
        let mut netlink = netns.netlink()?;
        let loopback = netlink.link("lo")?.index;
        let service = service_address(self.options.ipv6);
        netlink.add_address(&Address {
            index: loopback,
            address: service,
            prefix: if service.is_ipv4() { 32 } else { 128 },
        })?;
        // On a LAN replies go straight to the client's network: full segments there, whatever members need.
        let mtu = match self.options.topology {
            Topology::Lan => CLIENT_MTU,
            Topology::Routed => self.options.mtu,
        };
        self.host(netns, number, 2, 100, mtu)
    }

    fn host(&mut self, netns: Netns, number: u32, subnet: u8, first: u32, mtu: u32) -> Result<Host> {
        let link = self.link(&netns, netns.name(), mtu)?;
        let number_byte = u8::try_from(number).context("too many hosts")?;
        let (plan_v4, plan_v6, own, router_link) = match self.bridge {
            Some(bridge) => {
                self.netlink.set_master(link, Some(bridge))?;
                let own = u8::try_from(first + number).context("too many hosts")?;
                (v4(10, 0, 1, 0), v6(1, 0), own, bridge)
            }
            None => {
                let plan_v4 = v4(10, subnet, number_byte, 0);
                let plan_v6 = v6(u16::from(subnet), number_byte.into());
                self.give(link, plan_v4(1), 24, plan_v6(1))?;
                (plan_v4, plan_v6, 2, link)
            }
        };
        let host = Host {
            number,
            netns: Arc::new(netns),
            v4: plan_v4(own),
            v6: plan_v6(own),
            gateway_v4: plan_v4(1),
            gateway_v6: plan_v6(1),
            prefix_v4: 24,
            server_mss: self.options.server_mss.filter(|_| subnet == 2),
            router_link,
            port: link,
        };
        host.restore()?;
        Ok(host)
    }

    /// A pair from the router to `INTERFACE` in `netns`; returns the router's end.
    fn link(&mut self, netns: &Netns, name: &str, mtu: u32) -> Result<u32> {
        self.netlink.create_veth(&Veth {
            name,
            peer: INTERFACE,
            peer_netns: Some(netns.as_fd()),
            mtu: Some(mtu),
            mac: None,
            peer_mac: None,
        })?;
        let index = self.netlink.link(name)?.index;
        self.netlink.set_up(index)?;
        // The settings for interfaces to come do not reach those made before them.
        let setting = format!("net/ipv4/conf/{name}/rp_filter");
        self.router.sysctl(&[(&setting, "0")])?;
        if self.options.xdp {
            self.router
                .enter(|| face_xdp(name))?
                .context("cannot prepare the router's interfaces for XDP")?;
            #[cfg(feature = "xdp")]
            self.passes.push(
                self.router
                    .enter(|| phalanx_forwarder_xdp::attach_pass(index))?
                    .context("cannot give the router's interfaces an XDP program")?,
            );
        }
        Ok(index)
    }

    fn give(&mut self, index: u32, v4: IpAddr, prefix_v4: u8, v6: IpAddr) -> Result<()> {
        self.netlink.add_address(&Address { index, address: v4, prefix: prefix_v4 })?;
        self.netlink.add_address(&Address { index, address: v6, prefix: 64 })?;
        Ok(())
    }
}

/// Addresses of an IPv4 network by their last byte.
fn v4(a: u8, b: u8, c: u8, _: u8) -> impl Fn(u8) -> IpAddr + Copy {
    move |d| IpAddr::V4(Ipv4Addr::new(a, b, c, d))
}

/// Addresses of an IPv6 network by their last byte.
fn v6(site: u16, subnet: u16) -> impl Fn(u8) -> IpAddr + Copy {
    move |host| IpAddr::V6(Ipv6Addr::new(0xfd00, site, subnet, 0, 0, 0, 0, host.into()))
}

/// Drops ICMP and ICMPv6 errors before the client's kernel sees them (neighbour discovery stays).
fn filter_icmp(client: &Netns) -> Result<()> {
    /// `TC_ACT_SHOT`, and `TC_ACT_UNSPEC` as a classic program returns it.
    const DROP: u32 = 2;
    const PASS: u32 = u32::MAX;
    let op = |code, jt, jf, k| BpfInstruction { code, jt, jf, k };
    const LOAD_HALF: u16 = 0x28;
    const LOAD_BYTE: u16 = 0x30;
    const JUMP_EQUAL: u16 = 0x15;
    const JUMP_GREATER_OR_EQUAL: u16 = 0x35;
    const RETURN: u16 = 0x06;
    let program = vec![
        op(LOAD_HALF, 0, 0, 12),
        op(JUMP_EQUAL, 0, 2, 0x0800),
        op(LOAD_BYTE, 0, 0, 23),
        op(JUMP_EQUAL, 6, 5, 1),
        op(JUMP_EQUAL, 0, 4, 0x86dd),
        op(LOAD_BYTE, 0, 0, 20),
        op(JUMP_EQUAL, 0, 2, 58),
        // ICMPv6 errors are types below 128 (RFC 4443 §2.1).
        op(LOAD_BYTE, 0, 0, 54),
        op(JUMP_GREATER_OR_EQUAL, 0, 1, 128),
        op(RETURN, 0, 0, PASS),
        op(RETURN, 0, 0, DROP),
    ];
    let mut netlink = client.netlink()?;
    let index = netlink.link(INTERFACE)?.index;
    netlink.ensure_clsact(index)?;
    Ok(netlink.add_bpf_filter(&BpfFilter { index, priority: 1, handle: 1, program })?)
}
