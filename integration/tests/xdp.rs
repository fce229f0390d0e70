//! The kernel's program against the suite and the fixture table that every forwarder is held to. Needs root.
//!
//! ```text
//!  BPF_PROG_TEST_RUN ─► phalanx (on `us`) ─► what it returns, and the frame then
//!  `router` ══ veth ══ `us`: frames that user space sends (too big, TTL, held fragments), and in the live harness all of them
//! ```
//! Both ends of the pair are in one network namespace, which goes with the test's thread.

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::rc::Rc;
use std::time::{Duration, Instant};

use phalanx_flow::decide::Outcome;
use phalanx_forwarder::conformance::fixtures::{self, Case};
use phalanx_forwarder::conformance::frames::{OUR_MAC, ROUTER_MAC};
use phalanx_forwarder::conformance::{self, Emitted, Harness, world};
use phalanx_forwarder::engine::TableLimits;
use phalanx_forwarder::{Counters, Forwarder, Plan, RowSet};
use phalanx_forwarder_xdp::{Config, XdpForwarder, attach_pass};
use phalanx_integration::wire::receive_one;
use phalanx_netlink::{Address, Mac, Netlink, NextHop, Route, Veth};
use socket2::{Domain, Protocol, Socket, Type};

/// What the kernel routes to clients itself goes to this address, so that it is not taken for a frame of the forwarder's.
const CLIENTS_MAC: [u8; 6] = [2, 0, 0, 0, 0, 3];
/// How long what is expected may take to come, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long is waited for what is not expected.
const QUIET: Duration = Duration::from_millis(30);
/// A packet waits for a next hop for a second at the most (`crates/forwarder-xdp/src/punts.rs`).
const GIVEN_UP: Duration = Duration::from_millis(1_500);
/// Hand-offs are larger than what is handed off.
const MTU: u32 = 2_000;

/// What an XDP program returns (`include/uapi/linux/bpf.h`).
const XDP_DROP: u32 = 1;
const XDP_PASS: u32 = 2;
const XDP_TX: u32 = 3;

/// Fixtures that no run of a program can express, with the reason.
const NOT_EXPRESSIBLE: &[(&str, &str)] = &[(
    "a frame that ends in the Ethernet header is the kernel's",
    "neither a link nor BPF_PROG_TEST_RUN takes a frame shorter than an Ethernet header (bpf_prog_test_run_xdp, packet_snd)",
)];

/// How frames reach the program.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    TestRun,
    Live,
}

/// The forwarder on `us`, and its router.
struct Xdp {
    // Fields are dropped in this order: the forwarder before its interface.
    forwarder: XdpForwarder,
    _pass: OwnedFd,
    router: Socket,
    interface: u32,
    netlink: Netlink,
    way: Way,
}

impl Xdp {
    fn start(plan: Plan, limits: TableLimits, way: Way) -> Self {
        let mut netlink = Netlink::open().expect("netlink");
        netlink
            .create_veth(&Veth {
                name: "us",
                peer: "router",
                peer_netns: None,
                mtu: Some(MTU),
                mac: Some(Mac(OUR_MAC)),
                peer_mac: Some(Mac(ROUTER_MAC)),
            })
            .expect("a veth pair");
        let us = netlink.link("us").expect("us").index;
        let router = netlink.link("router").expect("router").index;
        netlink.set_mtu(router, MTU).expect("MTU");
        std::fs::write("/proc/sys/net/ipv6/conf/router/disable_ipv6", "1").expect("sysctl");
        std::fs::write("/proc/sys/net/ipv6/conf/us/accept_dad", "0").expect("sysctl");
        for index in [us, router] {
            netlink.set_up(index).expect("up");
        }
        for (own, prefix, gateway, clients, length) in [
            (world::OUR_ADDRESS, 24, "10.0.0.254", "10.9.0.0", 16),
            ("fd00::1", 64, "fd00::fe", "2001:db8:9::", 48),
        ] {
            let ip = |text: &str| -> IpAddr { text.parse().expect("an address") };
            netlink.add_address(&Address { index: us, address: ip(own), prefix }).expect("address");
            netlink.set_neighbour(us, ip(gateway), Mac(CLIENTS_MAC)).expect("neighbour");
            let route = Route::new(ip(clients), length, vec![NextHop::via(us, ip(gateway))]);
            netlink.add_route(&route).expect("route");
        }
        let pass = attach_pass(router).expect("a program on the router's end");
        let config = Config {
            interfaces: vec!["us".to_owned()],
            limits,
            data_address: world::OUR_ADDRESS.parse().expect("an address"),
            pins: None,
            object: None,
        };
        let forwarder = XdpForwarder::start(&config, plan).unwrap_or_else(|error| panic!("{error}"));
        Self { forwarder, _pass: pass, router: packet_socket(router), interface: us, netlink, way }
    }

    /// Whether it is as new, with this plan: loading the program for each of the fixtures would take minutes. What is known of fragments
    /// stays, and what is presumed of used tuples, which a visit does not show.
    fn again(&self, plan: Plan) -> bool {
        self.forwarder.install(plan).expect("a plan");
        let mut keys = Vec::new();
        self.forwarder.visit(&RowSet::All, &mut |record| keys.push(record.key));
        for key in keys {
            assert!(self.forwarder.remove(&key, 0, Duration::ZERO), "{key} is removed");
        }
        self.forwarder.flush_cache();
        let mut events = Vec::new();
        while self.forwarder.poll_events(&mut events, 1024) {}
        let counters = self.forwarder.counters();
        assert_eq!((counters.flows, counters.cached), (0, 0));
        counters.half_open == 0
    }

    /// Runs the program over a frame; what it sends.
    fn test_run(&self, frame: &[u8]) -> Option<Vec<u8>> {
        let passed = || self.forwarder.counters().outcome(Outcome::Passed);
        let before = passed();
        let (returned, after) = match self.forwarder.test_run(self.interface, frame) {
            Ok(result) => result,
            // Named in `NOT_EXPRESSIBLE`.
            Err(error) if frame.len() < 14 => {
                assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{error}");
                return None;
            }
            Err(error) => panic!("BPF_PROG_TEST_RUN: {error}"),
        };
        match returned {
            XDP_DROP | XDP_PASS => {
                // What was handed off and is for nobody here is counted as passed, but the kernel has no use for it.
                let counted = passed() > before;
                assert!(counted || returned == XDP_DROP, "a frame is passed that is not counted as passed");
                assert!(returned == XDP_DROP || after == frame, "a frame that is passed is as it came");
                None
            }
            // Everything leaves by the interface it came in on: `XDP_TX`, never a redirection.
            XDP_TX => Some(after),
            other => panic!("the program returned {other}"),
        }
    }

    /// A frame that came out of `us`, if one does before `until`.
    fn receive(&self, until: Instant) -> Option<Emitted> {
        loop {
            let left = until.saturating_duration_since(Instant::now());
            self.router
                .set_read_timeout(Some(left.max(Duration::from_millis(1))))
                .expect("a timeout for receiving");
            match receive_one(&self.router, &mut [0; 4096]) {
                Ok(bytes) => {
                    if let Some(emitted) = sorted(bytes) {
                        return Some(emitted);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => panic!("receive: {error}"),
            }
            if Instant::now() >= until {
                return None;
            }
        }
    }
}

/// A frame of the forwarder's or a packet to a client; nothing for what the kernel says of its own, which goes to groups of hosts.
fn sorted(frame: Vec<u8>) -> Option<Emitted> {
    if frame[0] & 1 != 0 {
        None
    } else if frame[..6] == CLIENTS_MAC {
        Some(Emitted::ToClient(frame[14..].to_vec()))
    } else {
        Some(Emitted::Frame(frame))
    }
}

/// A socket on the router's end that hears what comes in there, but not itself.
fn packet_socket(interface: u32) -> Socket {
    /// `PACKET_IGNORE_OUTGOING` (`include/uapi/linux/if_packet.h`).
    const IGNORE_OUTGOING: libc::c_int = 23;
    let everything = i32::from((libc::ETH_P_ALL as u16).to_be());
    // Of no protocol until it is bound, so that it hears no other interface.
    let socket = Socket::new(Domain::PACKET, Type::RAW, Some(Protocol::from(0))).expect("a packet socket");
    let address = libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        sll_protocol: everything as u16,
        sll_ifindex: interface.cast_signed(),
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    let one: libc::c_int = 1;
    // SAFETY: what the pointers point to lives through the calls, and has these lengths.
    unsafe {
        for option in [IGNORE_OUTGOING, libc::PACKET_AUXDATA] {
            let set = libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_PACKET,
                option,
                (&raw const one).cast(),
                size_of_val(&one) as u32,
            );
            assert_eq!(set, 0, "{}", io::Error::last_os_error());
        }
        let bound = libc::bind(socket.as_raw_fd(), (&raw const address).cast(), size_of_val(&address) as u32);
        assert_eq!(bound, 0, "{}", io::Error::last_os_error());
    }
    socket
}

/// One forwarder for several cases.
struct Shared(Rc<Xdp>);

impl Harness for Shared {
    fn forwarder(&self) -> &dyn Forwarder {
        &self.0.forwarder
    }

    fn interface(&self) -> u32 {
        self.0.interface
    }

    fn exchange(&mut self, frames: &[Vec<u8>], expected: usize) -> Vec<Emitted> {
        let mut emitted = Vec::new();
        let before = self.0.forwarder.counters();
        for frame in frames {
            match self.0.way {
                Way::TestRun => emitted.extend(self.0.test_run(frame).map(Emitted::Frame)),
                Way::Live => {
                    self.0.router.send(frame).expect("send");
                }
            }
        }
        let until = Instant::now() + PATIENCE;
        while emitted.len() < expected
            && let Some(more) = self.0.receive(until)
        {
            emitted.push(more);
        }
        // What user space was given comes out or is dropped; only a fragment without its first one stays there.
        let until = Instant::now() + GIVEN_UP;
        let is_settled = || {
            let after = self.0.forwarder.counters();
            let dropped = |counters: &Counters| -> u64 { counters.drops.iter().sum() };
            let held = after.outcome(Outcome::Held) - before.outcome(Outcome::Held);
            after.punted - before.punted == held || expected > 0 || dropped(&after) > dropped(&before)
        };
        while !is_settled() && Instant::now() < until {
            emitted.extend(self.0.receive(Instant::now() + QUIET));
        }
        while let Some(more) = self.0.receive(Instant::now() + QUIET) {
            emitted.push(more);
        }
        emitted
    }
}

impl Drop for Xdp {
    fn drop(&mut self) {
        self.forwarder.shutdown();
        self.netlink.delete_link(self.interface).expect("the pair is deleted");
    }
}

/// Runs `body` on a thread in a network namespace of its own, which ends with the thread.
fn in_namespace(body: impl FnOnce() + Send + 'static) {
    let thread = std::thread::spawn(|| {
        // SAFETY: unshare changes only the calling thread's namespaces.
        let result = unsafe { libc::unshare(libc::CLONE_NEWNET) };
        assert_eq!(result, 0, "these tests need root: {}", io::Error::last_os_error());
        body();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

fn cases() -> Vec<Case> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../crates/flow/fixtures/packets.txt");
    fixtures::read(&std::fs::read_to_string(path).expect("the table")).1
}

#[test]
fn the_loaded_program_decides_and_rewrites_every_fixture_as_the_host_does() {
    in_namespace(|| {
        let cases = cases();
        assert!(cases.len() >= 210, "{} cases", cases.len());
        let mut running: Option<(TableLimits, Rc<Xdp>)> = None;
        let differing: Vec<(Case, Case)> = cases
            .into_iter()
            .filter_map(|case| {
                // What is known of fragments, and how many were made, is not forgotten.
                let fragments = case.verdict.contains("fragmented")
                    || case.frames.iter().any(|frame| frame.contains(" id="));
                let played = fixtures::play(&case, &mut |plan, limits| match &running {
                    Some((same, xdp)) if *same == limits && !fragments && xdp.again(plan.clone()) => {
                        Box::new(Shared(Rc::clone(xdp)))
                    }
                    _ => {
                        // The one before goes first: interfaces have names.
                        running = None;
                        let xdp = Rc::new(Xdp::start(plan, limits, Way::TestRun));
                        running = Some((limits, Rc::clone(&xdp)));
                        Box::new(Shared(xdp))
                    }
                });
                (case != played).then_some((case, played))
            })
            .collect();
        let names: Vec<&str> = differing.iter().map(|(case, _)| case.name.as_str()).collect();
        let listed: Vec<&str> = NOT_EXPRESSIBLE.iter().map(|(name, _)| *name).collect();
        let told: String = differing
            .iter()
            .filter(|(case, _)| !listed.contains(&case.name.as_str()))
            .map(|(expected, played)| {
                format!(
                    "# {}\n  expected: {}\n  got:      {}\n  expected out: {:#?}\n  got out:      {:#?}\n",
                    expected.name, expected.verdict, played.verdict, expected.output, played.output
                )
            })
            .collect();
        assert_eq!(names, listed, "fixtures that differ, and those that may\n{told}");
    });
}

#[test]
fn a_fixture_whose_bytes_are_wrong_differs() {
    in_namespace(|| {
        let mut case =
            cases().into_iter().find(|case| case.name.starts_with("a retransmitted SYN goes")).expect("it");
        let mut start = |plan, limits| -> Box<dyn Harness> {
            Box::new(Shared(Rc::new(Xdp::start(plan, limits, Way::TestRun))))
        };
        assert_eq!(fixtures::play(&case, &mut start), case);
        case.output[0].replace_range(0..2, "04");
        assert_ne!(fixtures::play(&case, &mut start), case);
        case.output.pop();
        assert_ne!(fixtures::play(&case, &mut start), case);
    });
}

#[test]
fn the_forwarder_in_the_kernel_conforms_with_live_frames() {
    in_namespace(|| {
        conformance::run(&mut |plan, limits| Box::new(Shared(Rc::new(Xdp::start(plan, limits, Way::Live)))));
    });
}
