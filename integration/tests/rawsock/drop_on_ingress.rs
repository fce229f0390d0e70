//! Every frame has one owner: what the forwarder takes is dropped on tc ingress, also while no forwarder lives.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use phalanx_forwarder::Forwarder as _;
use phalanx_forwarder::conformance::Emitted;
use phalanx_forwarder::conformance::frames::{ROUTER_MAC, frame};
use phalanx_forwarder::conformance::world::World;
use phalanx_forwarder::engine::TableLimits;
use phalanx_forwarder_rawsock::{Config, RawsockForwarder};
use phalanx_integration::wire::{INTERFACE, Wire, ip, seen};
use phalanx_integration::{open_directory, program};
use phalanx_netlink::{BpfFilter, BpfInstruction, Filter, Mac, Reachability};

/// Enough that one that comes out twice is no chance.
const FRAMES: usize = 100;

/// The forwarder's mark on its filter ("PHLX"): another one than this would not be found again by a version that comes later.
const HANDLE: u32 = 0x5048_4c58;

fn syns(from_port: usize) -> Vec<Vec<u8>> {
    let line = |port| format!("ip4 10.9.0.1>192.0.2.1 tcp {port}>80 S");
    (from_port..from_port + FRAMES).map(|port| frame(&line(port))).collect()
}

/// What a hundred SYNs make: frames of the forwarder's, and frames that the kernel forwarded.
fn copies(wire: &Wire, from_port: usize, expected: usize, count: &dyn Fn() -> u64) -> (usize, u64) {
    let before = wire.by_kernel();
    let emitted = wire.exchange(&syns(from_port), expected, count);
    let ours = emitted.iter().filter(|emitted| matches!(emitted, Emitted::Frame(_))).count();
    assert_eq!(ours, emitted.len(), "nothing goes to the clients");
    (ours, wire.by_kernel() - before)
}

fn filters(wire: &Wire) -> Vec<Filter> {
    let mut netlink = wire.host().netlink().expect("netlink");
    // One line stands for each priority as a whole.
    let filters = netlink.filters(wire.index()).expect("list");
    filters.into_iter().filter(|filter| filter.handle != 0).collect()
}

fn delete_filter(wire: &Wire, filter: &Filter) {
    let mut netlink = wire.host().netlink().expect("netlink");
    netlink.delete_bpf_filter(wire.index(), filter.priority, filter.handle).expect("delete");
}

fn start(wire: &Wire) -> RawsockForwarder {
    let world = World { backend: 1, ..World::default() };
    let config = Config {
        limits: TableLimits { flows: 4096, half_open: 4096, cached: 64 },
        ..Config::new(vec![INTERFACE.to_owned()], ip("10.0.0.1"))
    };
    let start = || RawsockForwarder::start(&config, world.plan());
    let forwarder = wire.host().enter(start).expect("enter").expect("the forwarder starts");
    forwarder.set_next_hops(world.next_hops(wire.index()));
    forwarder.renew_lease(Duration::from_secs(600));
    forwarder
}

#[test]
fn a_host_that_forwards_sends_no_packet_twice() {
    let wire = Wire::new();
    let forwarder = start(&wire);
    let count = || seen(&forwarder.counters());
    assert_eq!(copies(&wire, 1000, FRAMES, &count), (FRAMES, 0));
    // What is not ours the kernel forwards, and we do not.
    let foreign = vec![frame("ip4 10.9.0.1>192.0.2.77 tcp 1>80 S"); FRAMES];
    assert_eq!(wire.exchange(&foreign, 0, &count), []);
    assert_eq!(wire.by_kernel(), FRAMES as u64);
    // The twin: without the drop every packet goes twice, and this test sees it.
    let [filter] = &filters(&wire)[..] else { panic!("one filter") };
    delete_filter(&wire, filter);
    assert_eq!(copies(&wire, 2000, FRAMES, &count), (FRAMES, FRAMES as u64));
}

/// A switch floods frames to a station it has lost: if the members forwarded each other's again, every packet to such a backend would
/// become a storm.
#[test]
fn frames_that_a_switch_floods_are_not_forwarded_again() {
    let wire = Wire::new();
    let forwarder = start(&wire);
    let count = || seen(&forwarder.counters());
    for other in [[2, 0, 0, 0, 0, 9], [0xff; 6]] {
        let mut flooded = syns(1000);
        flooded.iter_mut().for_each(|frame| frame[..6].copy_from_slice(&other));
        assert_eq!(wire.exchange(&flooded, 0, &count), []);
    }
    assert_eq!(wire.by_kernel(), 0);
    // The twin: the same frames, to our address.
    assert_eq!(copies(&wire, 1000, FRAMES, &count), (FRAMES, 0));
}

#[test]
fn a_forwarder_that_stops_in_good_order_takes_its_drop_along_and_leaves_others_filters_alone() {
    let wire = Wire::new();
    let mut netlink = wire.host().netlink().expect("netlink");
    netlink.ensure_clsact(wire.index()).expect("clsact");
    // An operator's: `return TC_ACT_UNSPEC`, which leaves the frame to the next filter.
    let program = vec![BpfInstruction { code: 0x06, jt: 0, jf: 0, k: u32::MAX }];
    let filter = BpfFilter { index: wire.index(), priority: 1, handle: 1, program };
    netlink.add_bpf_filter(&filter).expect("add");
    let forwarder = start(&wire);
    assert_eq!(filters(&wire).iter().map(|filter| filter.handle).collect::<Vec<_>>(), [1, HANDLE]);
    let count = || seen(&forwarder.counters());
    assert_eq!(copies(&wire, 1000, FRAMES, &count), (FRAMES, 0));
    forwarder.shutdown();
    assert_eq!(filters(&wire).iter().map(|filter| filter.handle).collect::<Vec<_>>(), [1]);
    assert_eq!(copies(&wire, 2000, 0, &|| 0), (0, FRAMES as u64), "the kernel has these packets again");
}

#[test]
fn two_forwarders_in_one_process_are_two_filters_on_two_interfaces() {
    let (one, other) = (Wire::new(), Wire::new());
    let first = start(&one);
    let second = start(&other);
    drop(first);
    assert_eq!((filters(&one).len(), filters(&other).len()), (0, 1));
    drop(second);
    assert_eq!(filters(&other).len(), 0);
}

const CONFIGURATION: &str = r#"[member]
id = 1
address = "10.0.0.1"

[cluster]
name = "alone"
key_file = "cluster.key"
hash_seed = "00112233445566778899aabbccddeeff"
bootstrap_wait = "500ms"

[forwarder]
interfaces = ["eth0"]

[[service]]
name = "web"
address = "192.0.2.1"
port = 80
method = "l2"

[[service.backend]]
address = "10.0.0.50"
"#;

/// A member's process that ends with the test.
struct Member(Child);

impl Member {
    fn start(wire: &Wire, directory: &Path) -> Self {
        let log =
            std::fs::File::options().create(true).append(true).open(directory.join("log")).expect("log");
        let mut command = Command::new(program());
        command.arg("run").arg("--config").arg(directory.join("phalanx.toml"));
        command.stdin(Stdio::null()).stdout(log.try_clone().expect("log")).stderr(log);
        Self(wire.host().spawn(&mut command).expect("the member starts"))
    }

    fn signal(&self, signal: i32) {
        // SAFETY: the process is our child and not yet waited for, so its number is still its own.
        let result = unsafe { libc::kill(self.0.id().cast_signed(), signal) };
        assert_eq!(result, 0);
    }

    fn wait(&mut self) {
        self.0.wait().expect("wait");
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Sends SYNs until the member forwards them all.
fn wait_until_it_forwards(wire: &Wire, directory: &Path) {
    let start = Instant::now();
    while copies(wire, 3000, 0, &|| 0).0 < FRAMES {
        let log = || std::fs::read_to_string(directory.join("log")).unwrap_or_default();
        assert!(start.elapsed() < Duration::from_secs(20), "the member does not forward\n{}", log());
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn after_a_sigkill_the_drop_stays_and_the_next_start_adopts_it() {
    let wire = Wire::new();
    let mut netlink = wire.host().netlink().expect("netlink");
    let backend = ip("10.0.0.50");
    netlink.set_neighbour(wire.index(), backend, Mac(ROUTER_MAC)).expect("set");
    let directory = open_directory();
    phalanx::keys::generate(&directory.path().join("cluster.key")).expect("a key");
    std::fs::write(directory.path().join("phalanx.toml"), CONFIGURATION).expect("write");

    let mut member = Member::start(&wire, directory.path());
    wait_until_it_forwards(&wire, directory.path());
    let neighbour = netlink.neighbour(wire.index(), backend).expect("get").expect("an entry");
    assert_eq!(neighbour.state, Reachability::Permanent, "an entry of the operator's stays as it is");
    let before = filters(&wire);
    assert_eq!(before.iter().map(|filter| filter.handle).collect::<Vec<_>>(), [HANDLE]);

    member.signal(libc::SIGKILL);
    member.wait();
    assert_eq!(filters(&wire), before, "the drop stays");
    assert_eq!(copies(&wire, 4000, 0, &|| 0), (0, 0), "nobody forwards, the kernel least of all");

    let mut member = Member::start(&wire, directory.path());
    let by_kernel = wire.by_kernel();
    wait_until_it_forwards(&wire, directory.path());
    assert_eq!(filters(&wire), before, "the same one, and no second");
    assert_eq!(copies(&wire, 5000, FRAMES, &|| 0), (FRAMES, 0));
    assert_eq!(wire.by_kernel(), by_kernel, "at no moment of the start did the kernel forward");

    // The twin: a member that ends in good order leaves no drop, and the kernel forwards.
    member.signal(libc::SIGTERM);
    member.wait();
    assert_eq!(filters(&wire), []);
    assert_eq!(copies(&wire, 6000, 0, &|| 0), (0, FRAMES as u64));
}
