//! The namespace in which the benchmark runs: a veth pair for each program, and the forwarders.

use std::collections::HashMap;
use std::fs::File;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use aya::maps::{Array, HashMap as BpfHashMap, MapData, PerCpuArray, PerCpuValues, ProgramArray};
use aya::programs::xdp::XdpMode;
use aya::programs::{ProgramFd, Xdp};
use aya::{Ebpf, Pod};
use phalanx_flow::member::Liveness;
use phalanx_flow::{FlowFlags, FlowKey, FlowState, MemberId, MemberSlot, Record, Row};
use phalanx_forwarder::conformance::frames::{OUR_MAC, ROUTER_MAC};
use phalanx_forwarder::conformance::world::{World, backends};
use phalanx_forwarder::engine::TableLimits;
use phalanx_forwarder::{Forwarder as _, Plan, PlanMember, Upserted};
use phalanx_forwarder_xdp::{Config as ForwarderConfig, XdpForwarder};
use phalanx_netlink::{Mac, Netlink, Veth};

use crate::Result;
use crate::abi::{Config, Key, Sunk, Value};

/// The programs that are compared with (`crates/forwarder-xdp/bench`).
static OBJECT: &[u8] = aya::include_bytes_aligned!("../../phalanx-xdp-bench.o");

/// Source addresses of the flows that are recorded, and of others.
pub(crate) const CLIENTS: u32 = 0x0a80_0000;
pub(crate) const STRANGERS: u32 = 0x0ac0_0000;
/// Flows that the large table holds, and the minimal program's.
const MANY: u32 = 1 << 20;
/// Flows that the small ones hold.
const FEW: u32 = 1 << 16;
/// Room for a hand-off around the longest packet.
const MTU: u32 = 2_000;

/// What runs. The numbers are those of the table of tail calls, and of the veth pairs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub(crate) enum Subject {
    Finish = 0,
    Reflect = 1,
    Minimal = 2,
    /// Owns all flows and knows a million of them.
    Owner = 3,
    /// Owns all flows and knows none; few half-open ones have room.
    Small = 4,
    /// Owns none and knows none.
    Out = 5,
    /// One of three members; the others own all flows.
    Members3 = 6,
    /// One of 64.
    Members64 = 7,
}

const SUBJECTS: [Subject; 8] = [
    Subject::Finish,
    Subject::Reflect,
    Subject::Minimal,
    Subject::Owner,
    Subject::Small,
    Subject::Out,
    Subject::Members3,
    Subject::Members64,
];

// SAFETY: `#[repr(C)]` structures of numbers, without padding.
unsafe impl Pod for Config {}
// SAFETY: as above.
unsafe impl Pod for Key {}
// SAFETY: as above.
unsafe impl Pod for Value {}
// SAFETY: as above.
unsafe impl Pod for Sunk {}

/// Everything that is measured, loaded and attached.
pub(crate) struct Site {
    ebpf: Ebpf,
    config: Array<MapData, Config>,
    sunk: PerCpuArray<MapData, Sunk>,
    _targets: ProgramArray<MapData>,
    forwarders: HashMap<Subject, XdpForwarder>,
    /// Interfaces by subject: the generator's end, and the one with the program.
    pairs: Vec<(u32, u32)>,
    state: u64,
    _namespace: File,
}

impl Site {
    pub(crate) fn build(object: Option<PathBuf>) -> Result<Self> {
        // SAFETY: unshare changes only the calling thread's namespaces.
        if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
            return Err(std::io::Error::last_os_error().into());
        }
        let namespace = File::open("/proc/thread-self/ns/net")?;
        pin_to_last_cpu()?;
        let pairs = lay_pairs()?;
        let mut ebpf = Ebpf::load(OBJECT)?;
        for name in
            ["harness", "harness_in", "generate", "generate_in", "sink", "finish", "reflect", "minimal"]
        {
            program_mut(&mut ebpf, name)?.load()?;
        }
        for (place, subject) in SUBJECTS.iter().enumerate() {
            let (near, far) = pairs[place];
            program_mut(&mut ebpf, "sink")?.attach_to_if_index(near, XdpMode::Driver)?;
            if let Some(name) = reference(*subject) {
                program_mut(&mut ebpf, name)?.attach_to_if_index(far, XdpMode::Driver)?;
            }
        }
        let mut flows: BpfHashMap<_, Key, Value> = BpfHashMap::try_from(take(&mut ebpf, "FLOWS")?)?;
        fill_minimal(&mut flows)?;
        let mut forwarders = HashMap::new();
        for (place, subject) in SUBJECTS.into_iter().enumerate() {
            if reference(subject).is_none() {
                forwarders.insert(subject, forwarder(subject, pairs[place].1, object.clone())?);
            }
        }
        let mut targets = ProgramArray::try_from(take(&mut ebpf, "TARGETS")?)?;
        for subject in SUBJECTS {
            let fd = match reference(subject) {
                Some(name) => program_mut(&mut ebpf, name)?.fd()?.try_clone()?,
                None => program_fd(&forwarders[&subject])?,
            };
            targets.set(subject as u32, &fd, 0)?;
        }
        Ok(Self {
            config: Array::try_from(take(&mut ebpf, "CONFIG")?)?,
            sunk: PerCpuArray::try_from(take(&mut ebpf, "SUNK")?)?,
            ebpf,
            _targets: targets,
            forwarders,
            pairs,
            state: 0x9e37_79b9_7f4a_7c15,
            _namespace: namespace,
        })
    }

    pub(crate) fn configure(&mut self, mut config: Config) -> Result<()> {
        // Random numbers go on where they stopped: no case meets flows that another has just brought into the caches.
        let before = self.config.get(&0, 0)?.state;
        config.state = if before == 0 { self.state } else { before };
        Ok(self.config.set(0, config, 0)?)
    }

    pub(crate) fn near(&self, subject: Subject) -> u32 {
        self.pairs[subject as usize].0
    }

    pub(crate) fn far(&self, subject: Subject) -> u32 {
        self.pairs[subject as usize].1
    }

    pub(crate) fn program(&self, name: &str) -> Result<&Xdp> {
        Ok(self.ebpf.program(name).ok_or("the object has no such program")?.try_into()?)
    }

    /// Forgets what reached the sinks.
    pub(crate) fn empty_sinks(&mut self) -> Result<()> {
        let cpus = aya::util::nr_cpus().map_err(|(_, error)| error)?;
        Ok(self.sunk.set(0, PerCpuValues::try_from(vec![Sunk::default(); cpus])?, 0)?)
    }

    /// Frames that reached the sinks since, and nanoseconds between two of them.
    pub(crate) fn sunk(&self) -> Result<(u64, f64)> {
        let values = self.sunk.get(&0, 0)?;
        let arrived = values.iter().map(|sunk| sunk.count).sum();
        // The generator, the program and the sink run on one CPU, one after the other.
        let most = values.iter().max_by_key(|sunk| sunk.count).copied().unwrap_or_default();
        Ok((arrived, (most.last_ns - most.first_ns) as f64 / most.last_count as f64))
    }

    /// Empties the rings of events, as the daemon would.
    pub(crate) fn forget_events(&self) {
        let mut events = Vec::new();
        for forwarder in self.forwarders.values() {
            while forwarder.poll_events(&mut events, 4096) {
                events.clear();
            }
            events.clear();
        }
    }
}

/// The program of the benchmark's object that a subject is.
fn reference(subject: Subject) -> Option<&'static str> {
    match subject {
        Subject::Finish => Some("finish"),
        Subject::Reflect => Some("reflect"),
        Subject::Minimal => Some("minimal"),
        _ => None,
    }
}

fn take(ebpf: &mut Ebpf, name: &str) -> Result<aya::maps::Map> {
    Ok(ebpf.take_map(name).ok_or("the object has no such map")?)
}

fn program_mut<'e>(ebpf: &'e mut Ebpf, name: &str) -> Result<&'e mut Xdp> {
    Ok(ebpf.program_mut(name).ok_or("the object has no such program")?.try_into()?)
}

fn program_fd(forwarder: &XdpForwarder) -> Result<ProgramFd> {
    // `aya` makes descriptors of programs only from its own: by way of the program's number.
    let wanted = forwarder.program_id()?;
    for info in aya::programs::loaded_programs() {
        let info = info?;
        if info.id() == wanted {
            return Ok(info.fd()?);
        }
    }
    Err("the program is not among those that are loaded".into())
}

/// On the last CPU: the first one has most of the interrupts.
fn pin_to_last_cpu() -> Result<()> {
    let last = std::thread::available_parallelism()?.get() - 1;
    // SAFETY: a set of CPUs is plain bits, and lives through the call.
    let result = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(last, &mut set);
        libc::sched_setaffinity(0, size_of_val(&set), &raw const set)
    };
    if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error().into()) }
}

fn lay_pairs() -> Result<Vec<(u32, u32)>> {
    let mut netlink = Netlink::open()?;
    let mut pairs = Vec::new();
    for number in 0..SUBJECTS.len() {
        let (near, far) = (format!("near{number}"), format!("far{number}"));
        netlink.create_veth(&Veth {
            name: &near,
            peer: &far,
            peer_netns: None,
            mtu: Some(MTU),
            mac: Some(Mac(ROUTER_MAC)),
            peer_mac: Some(Mac(OUR_MAC)),
        })?;
        let (near, far) = (netlink.link(&near)?.index, netlink.link(&far)?.index);
        netlink.set_mtu(far, MTU)?;
        for index in [near, far] {
            netlink.set_up(index)?;
        }
        pairs.push((near, far));
    }
    Ok(pairs)
}

/// Where the `number`th of the clients' flows comes from: as the harness makes them.
fn client(number: u32) -> (u32, u16) {
    (CLIENTS + (number >> 8), 0x4000 + (number & 0xff) as u16)
}

const SERVICE: u32 = 0xc000_0201;

fn fill_minimal(flows: &mut BpfHashMap<MapData, Key, Value>) -> Result<()> {
    let halves = |bytes: [u8; 4]| {
        let [a, b, c, d] = bytes;
        [u16::from_ne_bytes([a, b]), u16::from_ne_bytes([c, d])]
    };
    let macs = [ROUTER_MAC, OUR_MAC].concat();
    let mut value = Value {
        macs: [0; 6],
        source: halves([10, 0, 0, 1]),
        destination: halves([10, 0, 1, 2]),
        reserved: 0,
    };
    for (place, pair) in value.macs.iter_mut().zip(macs.chunks(2)) {
        *place = u16::from_ne_bytes([pair[0], pair[1]]);
    }
    for number in 0..MANY {
        let (address, port) = client(number);
        let key = Key {
            source: address.to_be(),
            destination: SERVICE.to_be(),
            ports: [port.to_be(), 80_u16.to_be()],
            protocol: 6,
        };
        flows.insert(key, value, 0)?;
    }
    Ok(())
}

fn forwarder(subject: Subject, interface: u32, object: Option<PathBuf>) -> Result<XdpForwarder> {
    let few = TableLimits { flows: FEW as usize * 2, half_open: 1024, cached: 1024 };
    let (plan, limits, flows) = match subject {
        Subject::Owner => (plan(4, true), TableLimits::default(), MANY),
        Subject::Small => (plan(4, true), few, 0),
        Subject::Out => (plan(4, false), few, 0),
        Subject::Members3 => (plan(3, false), few, FEW),
        _ => (plan(64, false), few, FEW),
    };
    let config = ForwarderConfig {
        interfaces: vec![format!("far{}", subject as u32)],
        limits,
        data_address: plan.members[0].address,
        pins: None,
        object,
    };
    let mut hops = World::default().next_hops(interface);
    hops.members.resize(plan.members.len(), hops.members[0]);
    let forwarder = XdpForwarder::start(&config, plan)?;
    forwarder.set_next_hops(hops);
    forwarder.renew_lease(Duration::from_secs(3_600));
    let numbers: Vec<u32> = (0..flows).collect();
    for numbers in numbers.chunks(4096) {
        let records: Vec<Record> = numbers.iter().map(|number| record(*number)).collect();
        if forwarder.upsert(&records).iter().any(|answer| *answer != Upserted::Applied) {
            return Err("the flow table did not take all flows".into());
        }
    }
    Ok(forwarder)
}

fn record(number: u32) -> Record {
    let (address, port) = client(number);
    let key = FlowKey::new(6, (IpAddr::V4(address.into()), port), (IpAddr::V4(SERVICE.into()), 80));
    Record {
        key: key.expect("one family"),
        // By IP in IP, as the minimal program does it.
        backend: backends()[1],
        birth: 1,
        update: 0,
        state: FlowState::Established,
        flags: FlowFlags(FlowFlags::PROTECTED),
        idle_ms: 0,
    }
}

/// The plan of the first of `members`; it owns every row, or the others do.
fn plan(members: u32, ours: bool) -> Plan {
    let mut plan = World { backend: 1, ..World::default() }.plan();
    plan.members = (1..=members)
        .map(|id| PlanMember {
            id: MemberId(id),
            address: IpAddr::V4((0x0a00_0000 + id).into()),
            liveness: Liveness::Alive,
        })
        .collect();
    let others = members - 1;
    plan.rows = (0..plan.row_function.row_count())
        .map(|number| {
            // Any mixing will do: neighbouring rows have other members.
            let mixed = number.wrapping_mul(0x9e37_79b9) >> 8;
            let other = |place: u32| MemberSlot(1 + ((mixed + place) % others) as u16);
            let mut row = Row::EMPTY;
            let first = if ours { MemberSlot(0) } else { other(0) };
            for (place, slot) in row.ranks.iter_mut().zip([first, other(1)]) {
                *place = slot;
            }
            row
        })
        .collect::<Vec<_>>()
        .into();
    plan
}
