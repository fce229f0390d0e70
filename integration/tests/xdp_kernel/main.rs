//! What the kernel's program leaves to user space and what user space finds out about it, with the program in the kernel. Needs root.

mod cache;
mod interfaces;
mod packets;

use std::collections::{HashMap, HashSet};
use std::io::Read as _;
use std::net::{IpAddr, Ipv4Addr};
use std::ops::Range;
use std::os::fd::AsRawFd as _;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use phalanx::lab::netns::Netns;
use phalanx::lab::pins::Pins;
use phalanx_flow::decide::Outcome;
use phalanx_flow::{FlowEvent, FlowFlags, FlowKey, FlowState, Record};
use phalanx_forwarder::conformance::frames::{OUR_MAC, frame};
use phalanx_forwarder::conformance::world::{OUR_ADDRESS, World, backends, ip};
use phalanx_forwarder::engine::TableLimits;
use phalanx_forwarder::{Drop as Reason, Forwarder, RowSet, Upserted};
use phalanx_forwarder_xdp::abi::STAGES;
use phalanx_forwarder_xdp::object::map_sizes;
use phalanx_forwarder_xdp::{Config, StartError, XdpForwarder, pinned_entries};
use phalanx_integration::open_directory;
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
    start_pinned(limits, None)
}

/// What it pins there outlives the forwarder.
fn start_pinned(limits: TableLimits, pins: Option<PathBuf>) -> Site {
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
    let forwarder = forwarder(&netns, limits, pins);
    let wire = netns.enter(|| packet_socket(peer)).expect("enter");
    Site { forwarder, wire, interface, netns }
}

fn forwarder(netns: &Netns, limits: TableLimits, pins: Option<PathBuf>) -> XdpForwarder {
    try_forwarder(netns, &["eth0"], limits, pins).expect("the forwarder starts")
}

fn try_forwarder(
    netns: &Netns,
    interfaces: &[&str],
    limits: TableLimits,
    pins: Option<PathBuf>,
) -> Result<XdpForwarder, StartError> {
    let config = Config {
        interfaces: interfaces.iter().map(|name| (*name).to_owned()).collect(),
        limits,
        data_address: ip(OUR_ADDRESS),
        pins,
        object: None,
    };
    let forwarder = netns.enter(|| XdpForwarder::start(&config, World::default().plan())).expect("enter")?;
    forwarder.renew_lease(Duration::from_secs(60));
    Ok(forwarder)
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

/// Where the client of connection `number` is.
fn client(number: u32) -> (IpAddr, u16) {
    (IpAddr::V4(Ipv4Addr::from(0x0a09_0000 + number / 50_000)), (10_000 + number % 50_000) as u16)
}

/// The client's first packet of connection `number`.
fn syn(number: u32) -> Vec<u8> {
    let (client, port) = client(number);
    frame(&format!("ip4 {client}>192.0.2.1 tcp {port}>80 S"))
}

/// Its answer to the server's.
fn ack(number: u32) -> Vec<u8> {
    let (client, port) = client(number);
    frame(&format!("ip4 {client}>192.0.2.1 tcp {port}>80 A"))
}

fn key(number: u32) -> FlowKey {
    FlowKey::new(6, client(number), (ip("192.0.2.1"), 80)).expect("a key")
}

/// A half-open flow as another member tells of it, whose birth and update follow from its number.
fn half_open(number: u32) -> Record {
    Record {
        key: key(number),
        backend: backends()[1],
        birth: u64::from(number) + 1,
        update: number,
        state: FlowState::HalfOpen,
        flags: FlowFlags(0),
        idle_ms: 0,
    }
}

impl Site {
    /// Has the program process the first packets of these connections, where it has this site's routes and no others.
    fn open(&self, numbers: Range<u32>) {
        self.process(numbers.map(syn));
    }

    /// Has the program process these frames there.
    fn process(&self, frames: impl Iterator<Item = Vec<u8>> + Send) {
        self.netns
            .enter(|| {
                for frame in frames {
                    self.forwarder.test_run(self.interface, &frame).expect("run");
                }
            })
            .expect("enter");
    }

    /// Which of these connections are known.
    fn known(&self, numbers: Range<u32>) -> Vec<u32> {
        numbers.filter(|number| self.forwarder.get(&key(*number)).is_some()).collect()
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
    // One that is sent again is none that was pushed out, nor does it push out others.
    for _ in 0..1_000 {
        site.open(FLOOD - 1..FLOOD);
    }
    let after = site.forwarder.counters();
    assert_eq!(after.half_open_evicted, counters.half_open_evicted);
    assert_eq!((after.outcome(Outcome::New), after.outcome(Outcome::Hit)), (u64::from(FLOOD), 1_000));
}

#[test]
fn of_a_full_set_the_oldest_half_open_flow_gives_way_and_a_free_place_is_taken_before() {
    // One set of eight.
    let site = start(TableLimits { flows: 1024, half_open: 8, ..TableLimits::default() });
    site.forwarder.set_next_hops(World::default().next_hops(site.interface));
    let evicted = || site.forwarder.counters().half_open_evicted;
    site.open(0..8);
    assert_eq!((site.known(0..8).len(), evicted()), (8, 0));
    site.open(8..10);
    assert_eq!((site.known(0..10), evicted()), ((2..10).collect(), 2), "the oldest two");
    // One in the middle becomes established, and one is removed: two places.
    site.process(std::iter::once(ack(5)));
    assert!(site.forwarder.remove(&key(7), 0, Duration::ZERO));
    let counters = site.forwarder.counters();
    assert_eq!((counters.flows, counters.half_open), (1, 6));
    site.open(10..12);
    assert_eq!((site.known(0..12), evicted()), (vec![2, 3, 4, 5, 6, 8, 9, 10, 11], 2), "nobody gave way");
    site.open(12..15);
    assert_eq!((site.known(0..15), evicted()), (vec![5, 6, 8, 9, 10, 11, 12, 13, 14], 5), "the oldest three");
    // Records of other members take their turn likewise.
    assert_eq!(site.forwarder.upsert(&[half_open(15)]), [Upserted::Applied]);
    assert_eq!((site.known(0..16), evicted()), (vec![5, 8, 9, 10, 11, 12, 13, 14, 15], 6));
    let told = site.forwarder.get(&key(15)).expect("it was just recorded");
    assert_eq!((told.birth, told.update, told.state), (16, 15, FlowState::HalfOpen));
    assert_eq!(told.backend, half_open(15).backend);
}

/// Runs both at once, each on a processor of its own: else the scheduler may have one wait for the other.
fn beside(first: impl FnOnce() + Send, second: impl FnOnce() + Send) {
    fn stay_on(processor: usize) {
        // SAFETY: a set of CPUs is plain bits, and lives through the call.
        let result = unsafe {
            let mut set: libc::cpu_set_t = std::mem::zeroed();
            libc::CPU_SET(processor, &mut set);
            libc::sched_setaffinity(0, size_of_val(&set), &raw const set)
        };
        assert_eq!(result, 0, "two processors are needed: {}", std::io::Error::last_os_error());
    }
    std::thread::scope(|scope| {
        scope.spawn(|| {
            stay_on(0);
            first();
        });
        scope.spawn(|| {
            stay_on(1);
            second();
        });
    });
}

#[test]
fn a_flow_whose_first_packet_two_processors_have_at_once_is_recorded_once() {
    // As many as come in this time: on a busy machine each may wait long for the other.
    const TIME: Duration = Duration::from_secs(4);
    const FLOWS: u32 = 40_000;
    let site = start(TableLimits { flows: 1024, half_open: 1 << 19, ..TableLimits::default() });
    site.forwarder.set_next_hops(World::default().next_hops(site.interface));
    let arrived = [AtomicU32::new(0), AtomicU32::new(0)];
    let start = Instant::now();
    let run = |own: usize| {
        site.process((0..FLOWS).map_while(|number| {
            let frame = syn(number);
            // Both begin with each at the same moment.
            arrived[own].store(number + 1, Ordering::SeqCst);
            while arrived[1 - own].load(Ordering::SeqCst) <= number {
                if start.elapsed() > TIME {
                    return None;
                }
            }
            Some(frame)
        }));
    };
    beside(|| run(0), || run(1));
    let mut records = HashMap::<FlowKey, u32>::new();
    site.forwarder.visit_half_open(&mut |key, _| *records.entry(*key).or_default() += 1);
    assert!(records.len() > 100, "hardly any was processed twice: this test shows nothing");
    let twice = records.values().filter(|times| **times > 1).count();
    assert_eq!(twice, 0, "flows with two records, of {}", records.len());
    let counters = site.forwarder.counters();
    assert_eq!((counters.half_open as usize, counters.half_open_evicted), (records.len(), 0));
}

#[test]
fn whoever_reads_the_table_while_it_changes_sees_no_record_that_is_of_two_flows() {
    const CHANGES: u32 = 200_000;
    // So many that a flow is pushed out before it comes again, out of one set: each place is overwritten all the time.
    const FLOWS: u32 = 12;
    let site = start(TableLimits { flows: 1024, half_open: 8, ..TableLimits::default() });
    let done = AtomicBool::new(false);
    let (mut whole, mut torn) = (0, 0);
    beside(
        || {
            for number in 0..CHANGES {
                assert_eq!(site.forwarder.upsert(&[half_open(number % FLOWS)]), [Upserted::Applied]);
            }
            done.store(true, Ordering::Relaxed);
        },
        || {
            while !done.load(Ordering::Relaxed) {
                site.forwarder.visit_half_open(&mut |key, entry| {
                    let port = 10_000 + entry.update as u16;
                    let same =
                        key.source_port == port.to_be_bytes() && entry.birth == u64::from(entry.update) + 1;
                    *if same { &mut whole } else { &mut torn } += 1;
                });
            }
        },
    );
    assert!(whole > 0, "nothing was read: this test shows nothing");
    assert_eq!(torn, 0, "of {whole}");
    assert_eq!(site.forwarder.counters().half_open_evicted, u64::from(CHANGES) - 8);
}

#[test]
fn half_open_flows_outlive_their_daemon_and_are_told_apart_from_established_ones_afterwards() {
    let keep = open_directory();
    // In a mount namespace of this thread's own.
    let file_system = Pins::mount(keep.path()).expect("a BPF file system");
    let pins = file_system.of(1);
    let limits = TableLimits { flows: 1024, half_open: 1024, ..TableLimits::default() };
    let mut site = start_pinned(limits, Some(pins.clone()));
    site.forwarder.set_next_hops(World::default().next_hops(site.interface));
    site.open(0..20);
    site.forwarder.leave_attached();
    site.forwarder = forwarder(&site.netns, limits, Some(pins.clone()));
    assert!(site.forwarder.adopted().is_some());
    let counters = site.forwarder.counters();
    assert_eq!((site.known(0..30), counters.half_open), ((0..20).collect(), 20));
    // What the kernel told the daemon before is no news: it may be minutes old, and be stamped as of now.
    assert_eq!(events(&site.forwarder), []);
    site.process((0..5).map(ack));
    site.open(4..21);
    assert!(!events(&site.forwarder).is_empty());
    let counters = site.forwarder.counters();
    assert_eq!((counters.flows, counters.half_open, counters.half_open_evicted), (5, 16, 0));
    assert_eq!((counters.outcome(Outcome::New), counters.outcome(Outcome::Recovered)), (21, 0));
    // The twin: tables of another size are not adopted, and their flows are forgotten.
    site.forwarder.leave_attached();
    site.forwarder = forwarder(&site.netns, TableLimits { half_open: 2048, ..limits }, Some(pins));
    assert!(site.forwarder.adopted().is_none() && site.known(0..30).is_empty());
}

fn events(forwarder: &XdpForwarder) -> Vec<FlowEvent> {
    let mut events = Vec::new();
    while forwarder.poll_events(&mut events, 4_096) {}
    events
}

/// What a member's configuration says when it says nothing of sizes; `phalanx`'s own tests follow it to here.
#[test]
fn the_kernel_makes_the_tables_of_flows_as_large_as_it_is_told() {
    let keep = open_directory();
    let file_system = Pins::mount(keep.path()).expect("a BPF file system");
    let pins = file_system.of(1);
    let limits = TableLimits { flows: 1_000_000, half_open: 65_536, cached: 3_000 };
    let _site = start_pinned(limits, Some(pins.clone()));
    for (name, entries) in map_sizes(&limits, 1).into_iter().filter(|(name, _)| *name != "SLOT_TABLE") {
        assert_eq!(pinned_entries(&pins, name), Some(entries), "{name}");
    }
    assert_eq!(pinned_entries(&pins, "FLOWS4"), Some(1_000_000));
    assert_eq!(pinned_entries(&pins, "NOTHING"), None);
}

/// What the verifier follows of a program grows by leaps with each question that the decision asks, and another kernel's counts otherwise.
#[test]
fn the_verifier_takes_every_program_with_room_to_spare() {
    /// Of the million that it follows before it refuses (`BPF_COMPLEXITY_LIMIT_INSNS`).
    const ALLOWED: u32 = 600_000;
    let _site = start(TableLimits::default());
    let verified: Vec<u32> = std::fs::read_dir("/proc/self/fdinfo")
        .expect("our files")
        .filter_map(|file| std::fs::read_to_string(file.ok()?.path()).ok())
        .filter_map(|info| {
            info.lines().find_map(|line| line.strip_prefix("verified_insns:")?.trim().parse().ok())
        })
        .collect();
    assert!(verified.len() > STAGES.len(), "the stages, and where packets come in: {verified:?}");
    let largest = verified.iter().max().expect("some");
    assert!((50_000..ALLOWED).contains(largest), "{verified:?}");
}

/// A switch floods what is for a host that it does not know; if members forwarded it, each would forward what the others had forwarded.
#[test]
fn a_frame_for_another_hosts_mac_is_left_alone_and_counted_and_the_same_for_ours_is_forwarded() {
    const OTHER: [u8; 6] = [2, 0, 0, 0, 0, 9];
    let site = start(TableLimits { flows: 1024, half_open: 1024, ..TableLimits::default() });
    let hops = World::default().next_hops(site.interface);
    site.forwarder.set_next_hops(hops.clone());
    assert_eq!(site.returned(OTHER), XDP_PASS);
    // The kernel sends frames to groups of its own accord (MLD, router solicitations).
    let passed = site.forwarder.counters().outcome(Outcome::Passed);
    assert_eq!(site.returned([0xff; 6]), XDP_PASS);
    let counters = site.forwarder.counters();
    assert_eq!((counters.other_host, counters.half_open), (1, 0), "{counters:?}");
    assert!(counters.outcome(Outcome::Passed) > passed, "of the group's");
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
    // With less room some sets would be full.
    let site = start(TableLimits { flows: 1024, half_open: 1 << 19, ..TableLimits::default() });
    site.forwarder.set_next_hops(World::default().next_hops(site.interface));
    site.open(0..FLOWS);
    assert_eq!(site.forwarder.counters().half_open_evicted, 0);
    let told: HashSet<FlowKey> = events(&site.forwarder).iter().map(|event| event.record.key).collect();
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
