//! Several interfaces at once: attached to, adopted on, let go of and detached from, with packets coming in on each.

use std::collections::HashSet;
use std::io::{Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use phalanx::lab::netns::Netns;
use phalanx::lab::pins::Pins;
use phalanx_forwarder::Forwarder as _;
use phalanx_forwarder::conformance::frames::OUR_MAC;
use phalanx_forwarder::conformance::world::World;
use phalanx_forwarder::engine::TableLimits;
use phalanx_forwarder_xdp::{StartError, XdpForwarder, attach_pass, attached_program, detach};
use phalanx_integration::open_directory;
use phalanx_netlink::{Mac, Veth};
use socket2::Socket;

use super::{packet_socket, syn, try_forwarder};

const LIMITS: TableLimits = TableLimits { flows: 1024, half_open: 1024, cached: 1024 };
const SECOND_MAC: [u8; 6] = [2, 0, 0, 0, 0, 0x21];

/// An interface of the host, and the other end of its wire.
struct Wire {
    interface: u32,
    mac: [u8; 6],
    far: Socket,
    /// At the far end, so that what the near end transmits from its program is taken.
    _pass: OwnedFd,
}

impl Wire {
    fn new(netns: &Netns, names: [&str; 2], mac: [u8; 6]) -> Self {
        let mut netlink = netns.netlink().expect("netlink");
        let [name, peer] = names;
        let veth = Veth { name, peer, peer_netns: None, mtu: None, mac: Some(Mac(mac)), peer_mac: None };
        netlink.create_veth(&veth).expect("a veth");
        let [interface, peer] = [name, peer].map(|name| {
            let index = netlink.link(name).expect("link").index;
            netlink.set_up(index).expect("up");
            index
        });
        let (far, pass) =
            netns.enter(|| (packet_socket(peer), attach_pass(peer).expect("attach"))).expect("enter");
        Self { interface, mac, far, _pass: pass }
    }
}

/// Two wires, of which the first leads to every backend.
struct Host {
    netns: Netns,
    wires: [Wire; 2],
    clients: std::ops::RangeFrom<u32>,
}

impl Host {
    fn start(&self, interfaces: &[&str], pins: &Path) -> Result<XdpForwarder, StartError> {
        let forwarder = try_forwarder(&self.netns, interfaces, LIMITS, Some(pins.to_owned()))?;
        forwarder.set_next_hops(World::default().next_hops(self.wires[0].interface));
        Ok(forwarder)
    }

    /// Of which program each interface is.
    fn programs(&self) -> [Option<u32>; 2] {
        let ids = || self.wires.each_ref().map(|wire| attached_program(wire.interface).expect("netlink"));
        self.netns.enter(ids).expect("enter")
    }

    /// Sends the first packet of a new connection to each interface: whose came out to the backends within `within`.
    fn forwards(&mut self, within: Duration) -> [bool; 2] {
        let numbers = [(); 2].map(|()| self.clients.next().expect("a number"));
        for (wire, number) in self.wires.iter().zip(numbers) {
            let mut frame = syn(number);
            frame[..6].copy_from_slice(&wire.mac);
            (&wire.far).write_all(&frame).expect("send");
        }
        let start = Instant::now();
        let (mut came, mut bytes) = (HashSet::new(), [0; 2048]);
        while start.elapsed() < within && came.len() < numbers.len() {
            let Ok(length) = (&self.wires[0].far).read(&mut bytes) else { continue };
            // Addresses, ports: as in one of ours, by `l2`.
            came.extend(
                numbers.into_iter().filter(|number| bytes[26..38] == syn(*number)[26..38] && length > 38),
            );
        }
        numbers.map(|number| came.contains(&number))
    }

    /// That of each interface is what it should be, which takes the kernel a moment where a link has gone.
    fn settles(&self, wanted: [Option<u32>; 2]) {
        let start = Instant::now();
        while self.programs() != wanted {
            assert!(start.elapsed() < Duration::from_secs(5), "{:?}, not {wanted:?}", self.programs());
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

const SOON: Duration = Duration::from_secs(5);
const NEVER: Duration = Duration::from_millis(200);

#[test]
fn of_several_interfaces_each_is_attached_adopted_and_detached_while_packets_come_in_on_all() {
    let keep = open_directory();
    // In a mount namespace of this thread's own.
    let file_system = Pins::mount(keep.path()).expect("a BPF file system");
    let pins = file_system.of(1);
    let netns = Netns::new("host").expect("a namespace");
    let wires =
        [Wire::new(&netns, ["eth0", "peer0"], OUR_MAC), Wire::new(&netns, ["eth1", "peer1"], SECOND_MAC)];
    let mut host = Host { netns, wires, clients: 0.. };
    assert_eq!((host.programs(), host.forwards(NEVER)), ([None; 2], [false; 2]), "nothing is attached yet");

    let both = ["eth0", "eth1"];
    let first = host.start(&both, &pins).expect("it starts");
    let old = first.program_id().expect("an id");
    assert!(first.adopted().is_none());
    assert_eq!((host.programs(), host.forwards(SOON)), ([Some(old); 2], [true; 2]));
    first.leave_attached();
    drop(first);
    assert_eq!((host.programs(), host.forwards(SOON)), ([Some(old); 2], [true; 2]), "without a daemon");

    // The far end of the second wire has a program of another's: whoever wants that interface too changes nothing on the others.
    let refused = host.start(&["eth0", "eth1", "peer1"], &pins).map(|_| ());
    assert!(matches!(&refused, Err(StartError::Occupied { name, .. }) if name == "peer1"), "{refused:?}");
    assert_eq!((host.programs(), host.forwards(SOON)), ([Some(old); 2], [true; 2]), "after a refusal");

    let second = host.start(&both, &pins).expect("it starts");
    let new = second.program_id().expect("an id");
    assert!(second.adopted().is_some() && new != old);
    assert_eq!(second.counters().half_open, 6, "of both interfaces, of the three times before");
    assert_eq!((host.programs(), host.forwards(SOON)), ([Some(new); 2], [true; 2]));
    second.leave_attached();
    drop(second);

    // Without the first interface in the configuration it is let go of, and frames to its address are no longer ours.
    let third = host.start(&["eth1"], &pins).expect("it starts");
    host.settles([None, third.program_id().ok()]);
    assert_eq!(host.forwards(SOON.min(NEVER * 5)), [false, true]);
    third.leave_attached();
    drop(third);
    let fourth = host.start(&both, &pins).expect("it starts");
    assert_eq!((host.programs(), host.forwards(SOON)), ([fourth.program_id().ok(); 2], [true; 2]));
    fourth.leave_attached();
    drop(fourth);

    assert!(detach(&pins).expect("detach"));
    host.settles([None; 2]);
    assert_eq!(host.forwards(NEVER), [false; 2]);
}
