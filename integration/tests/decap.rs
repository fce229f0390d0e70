//! The decapsulator, with packets encapsulated by hand, in namespaces of the test's own.

use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::AsFd as _;
use std::time::{Duration, Instant};

use etherparse::PacketBuilder;
use phalanx::decap::{self, DecapArgs, DeviceKind};
use phalanx::lab::netns::Netns;
use phalanx_netlink::{Address, Veth};
use socket2::{Domain, Protocol, Socket, Type};

const GUE_PORT: u16 = 6080;
const NOBODY: &str = "192.0.2.9:9000";

fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

/// A sender (10.0.0.1) and a backend (10.0.0.2) that has the service's addresses on loopback and a decapsulator running.
fn pair(kind: DeviceKind) -> (Netns, Netns) {
    let sender = Netns::new("sender").expect("these tests need root");
    let backend = Netns::new("backend").expect("backend");
    for netns in [&sender, &backend] {
        netns
            .sysctl(&[
                ("net/ipv4/conf/all/rp_filter", "0"),
                ("net/ipv4/conf/default/rp_filter", "0"),
                ("net/ipv6/conf/default/accept_dad", "0"),
            ])
            .expect("sysctl");
    }
    let mut netlink = sender.netlink().expect("netlink");
    netlink
        .create_veth(&Veth {
            name: "eth0",
            peer: "eth0",
            peer_netns: Some(backend.as_fd()),
            mtu: None,
            mac: None,
            peer_mac: None,
        })
        .expect("veth");
    for (netns, v4, v6) in [(&sender, "10.0.0.1", "fd00::1"), (&backend, "10.0.0.2", "fd00::2")] {
        let mut netlink = netns.netlink().expect("netlink");
        let index = netlink.link("eth0").expect("eth0").index;
        netlink.set_up(index).expect("up");
        netlink.add_address(&Address { index, address: ip(v4), prefix: 24 }).expect("v4");
        netlink.add_address(&Address { index, address: ip(v6), prefix: 64 }).expect("v6");
    }
    let mut netlink = backend.netlink().expect("netlink");
    let loopback = netlink.link("lo").expect("lo").index;
    netlink.add_address(&Address { index: loopback, address: ip("192.0.2.1"), prefix: 32 }).expect("v4");
    netlink.add_address(&Address { index: loopback, address: ip("2001:db8::1"), prefix: 128 }).expect("v6");
    let device = "decap".to_owned();
    let args = DecapArgs { device: device.clone(), kind, gue_port: GUE_PORT };
    // The thread lives as long as the test's process: a decapsulator only ends with it.
    drop(backend.spawn_thread(move || decap::run(&args)).expect("spawn"));
    let start = Instant::now();
    while !netlink.link(&device).is_ok_and(|link| link.up) {
        assert!(start.elapsed() < Duration::from_secs(5), "the decapsulator makes no device");
        std::thread::sleep(Duration::from_millis(10));
    }
    (sender, backend)
}

/// A datagram from a client to `destination`.
fn inner(destination: SocketAddr, payload: &[u8]) -> Vec<u8> {
    let mut packet = Vec::new();
    match destination.ip() {
        IpAddr::V4(v4) => PacketBuilder::ipv4([198, 18, 0, 2], v4.octets(), 60)
            .udp(1234, destination.port())
            .write(&mut packet, payload)
            .expect("packet"),
        IpAddr::V6(v6) => PacketBuilder::ipv6(ip6("fd00:9::2"), v6.octets(), 60)
            .udp(1234, destination.port())
            .write(&mut packet, payload)
            .expect("packet"),
    }
    packet
}

fn ip6(text: &str) -> [u8; 16] {
    match ip(text) {
        IpAddr::V6(v6) => v6.octets(),
        IpAddr::V4(_) => panic!("an IPv6 address"),
    }
}

#[test]
fn every_tunnel_brings_its_packet_to_the_services_address() {
    for kind in [DeviceKind::Tun, DeviceKind::Veth] {
        let (sender, backend) = pair(kind);
        for (service, number) in [("192.0.2.1:80", 4), ("[2001:db8::1]:80", 41)] {
            let service: SocketAddr = service.parse().expect("an address");
            let server: UdpSocket = backend.enter(|| UdpSocket::bind(service)).expect("enter").expect("bind");
            server.set_read_timeout(Some(Duration::from_secs(2))).expect("timeout");
            for outer in ["10.0.0.2", "fd00::2"] {
                let outer = ip(outer);
                let domain = if outer.is_ipv4() { Domain::IPV4 } else { Domain::IPV6 };
                let raw = Some(Protocol::from(number));
                let sockets = [
                    ("ip in ip", sender.enter(|| Socket::new(domain, Type::RAW, raw)), 0),
                    ("gue", sender.enter(|| Socket::new(domain, Type::DGRAM, None)), GUE_PORT),
                ];
                for (method, socket, port) in sockets {
                    let socket = socket.expect("enter").expect("socket");
                    let label = format!("{kind:?} {method} {service} in {outer}");
                    let target = SocketAddr::new(outer, port).into();
                    // Twins: garbage, and an address that is not the backend's, reach nobody.
                    socket.send_to(&[0xff; 100], &target).expect(&label);
                    socket.send_to(&inner(NOBODY.parse().expect("nobody"), b"no"), &target).expect(&label);
                    socket.send_to(&inner(service, label.as_bytes()), &target).expect(&label);
                    let mut buffer = [0; 200];
                    let (length, from) = server.recv_from(&mut buffer).expect(&label);
                    assert_eq!(&buffer[..length], label.as_bytes());
                    assert_eq!(from.port(), 1234, "{label}");
                }
            }
            server.set_nonblocking(true).expect("nonblocking");
            let more = server.recv_from(&mut [0; 10]).expect_err("nothing else arrived");
            assert_eq!(more.kind(), ErrorKind::WouldBlock);
        }
    }
}
