//! The program's maps, opened, and what of them user space computes.

use std::io;
use std::sync::Arc;

use aya::Ebpf;
use aya::maps::{MapData, RingBuf};
use phalanx_flow::{FlowEntry, FlowKey, FlowSeed, FlowState, Row};

use crate::abi::{
    Backend, CpuCounters, FailedKey, FrontService, Header, Key4, Member, MemberKey, Ports, ServiceKey,
    ServiceValue,
};
use crate::apply::Apply;
use crate::half_open::HalfOpen;
use crate::map::{Map, data};

/// The maps that a restart of the daemon adopts; `STAGES` and `WORK` belong to one load: what stages tell each other has the layout
/// of its programs.
pub(crate) const KEPT: [&str; 19] = [
    "ACTIVE",
    "LEASE",
    "HEADERS",
    "MEMBERS",
    "MEMBER_SLOTS",
    "BACKENDS",
    "SERVICES",
    "FRONT_SERVICES",
    "FAILED",
    "ROW_TABLE",
    "SLOT_TABLE",
    "FLOWS4",
    "FLOWS6",
    "HALF_OPEN",
    "CACHE",
    "FRAGMENTS",
    "EVENTS",
    "PUNTS",
    "COUNTERS",
];
#[derive(Debug)]
pub(crate) struct Maps {
    pub(crate) active: Map<u32, u32>,
    pub(crate) lease: Map<u32, u64>,
    pub(crate) headers: Map<u32, Header>,
    pub(crate) members: Map<u32, Member>,
    pub(crate) member_slots: Map<MemberKey, u32>,
    pub(crate) backends: Map<u32, Backend>,
    pub(crate) services: Map<ServiceKey, ServiceValue>,
    pub(crate) front_services: Map<u32, FrontService>,
    pub(crate) failed: Map<FailedKey, u32>,
    pub(crate) rows: Map<u32, Row>,
    pub(crate) slots: Map<u32, u32>,
    flows4: Map<Key4, FlowEntry>,
    flows6: Map<FlowKey, FlowEntry>,
    pub(crate) half_open: HalfOpen,
    pub(crate) cache: Map<FlowKey, FlowEntry>,
    pub(crate) fragments: Map<FlowKey, Ports>,
    pub(crate) counters: Map<u32, CpuCounters>,
    /// Makes changes of flows.
    pub(crate) apply: Arc<Apply>,
    /// Blocks of the table of slots.
    pub(crate) slot_blocks: u32,
}

fn missing(name: &str) -> io::Error {
    io::Error::new(io::ErrorKind::NotFound, format!("the object has no map {name}"))
}

impl Maps {
    /// `seed` is that of the flow hash.
    pub(crate) fn open(ebpf: &Ebpf, seed: FlowSeed) -> io::Result<Self> {
        let map = |name: &'static str| -> io::Result<&MapData> {
            data(ebpf.map(name).ok_or_else(|| missing(name))?)
        };
        let apply = Arc::new(Apply::open(ebpf)?);
        let slots = map("SLOT_TABLE")?;
        let slot_blocks = slots.info().map_err(io::Error::other)?.max_entries() / crate::abi::SLOTS;
        Ok(Self {
            active: Map::new(map("ACTIVE")?)?,
            lease: Map::new(map("LEASE")?)?,
            headers: Map::new(map("HEADERS")?)?,
            members: Map::new(map("MEMBERS")?)?,
            member_slots: Map::new(map("MEMBER_SLOTS")?)?,
            backends: Map::new(map("BACKENDS")?)?,
            services: Map::new(map("SERVICES")?)?,
            front_services: Map::new(map("FRONT_SERVICES")?)?,
            failed: Map::new(map("FAILED")?)?,
            rows: Map::new(map("ROW_TABLE")?)?,
            slots: Map::new(slots)?,
            flows4: Map::new(map("FLOWS4")?)?,
            flows6: Map::new(map("FLOWS6")?)?,
            half_open: HalfOpen::open(map("HALF_OPEN")?, seed, Arc::clone(&apply))?,
            cache: Map::new(map("CACHE")?)?,
            fragments: Map::new(map("FRAGMENTS")?)?,
            counters: Map::new(map("COUNTERS")?)?,
            apply,
            slot_blocks,
        })
    }

    /// All maps of flows, in the order in which they are searched for what is over.
    pub(crate) fn tables(&self) -> [(Kind, &dyn Flows); 4] {
        [
            (Kind::Established, &self.flows4),
            (Kind::Established, &self.flows6),
            (Kind::HalfOpen, &self.half_open),
            (Kind::Cached, &self.cache),
        ]
    }

    /// The map that has the flow if it has come so far.
    fn table(&self, kind: Kind, key: &FlowKey) -> &dyn Flows {
        match (kind, key.family) {
            (Kind::Established, 4) => &self.flows4,
            (Kind::Established, _) => &self.flows6,
            (Kind::HalfOpen, _) => &self.half_open,
            (Kind::Cached, _) => &self.cache,
        }
    }

    /// The entry of a flow that we hold, and where it is.
    pub(crate) fn entry(&self, key: &FlowKey) -> Option<(FlowEntry, Kind)> {
        [Kind::Established, Kind::HalfOpen]
            .into_iter()
            .find_map(|kind| Some((self.table(kind, key).get(key).ok().flatten()?, kind)))
    }

    /// Whether the table of flows has it, whatever that of half-open ones has.
    pub(crate) fn is_established(&self, key: &FlowKey) -> bool {
        self.table(Kind::Established, key).get(key).is_ok_and(|entry| entry.is_some())
    }

    /// Writes an entry where its state belongs; false if the table is full. `known`: where one is already.
    pub(crate) fn put(&self, key: &FlowKey, entry: &FlowEntry, known: Option<Kind>) -> bool {
        let kind = match entry.flow_state() {
            FlowState::HalfOpen => Kind::HalfOpen,
            _ => Kind::Established,
        };
        if self.table(kind, key).put(key, entry).is_err() {
            return false;
        }
        if let Some(known) = known
            && known != kind
        {
            self.delete(known, key);
        }
        true
    }

    /// Deletes an entry.
    pub(crate) fn delete(&self, kind: Kind, key: &FlowKey) {
        let _ = self.table(kind, key).delete(key);
    }
}

/// What the entries of a map of flows are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Flows that are not half-open.
    Established,
    /// Half-open flows.
    HalfOpen,
    /// Flows of other members.
    Cached,
}

/// A map of flows, whatever its keys are.
pub(crate) trait Flows {
    /// The entry of a flow.
    fn get(&self, key: &FlowKey) -> io::Result<Option<FlowEntry>>;
    /// Writes an entry, whatever is there.
    fn put(&self, key: &FlowKey, entry: &FlowEntry) -> io::Result<()>;
    /// Deletes an entry; whether it was there.
    fn delete(&self, key: &FlowKey) -> io::Result<bool>;
    /// As [`Map::batch`].
    fn batch(
        &self,
        cursor: Option<u32>,
        show: &mut dyn FnMut(&FlowKey, &FlowEntry),
    ) -> io::Result<Option<u32>>;

    /// Reads all of it.
    fn each(&self, show: &mut dyn FnMut(&FlowKey, &FlowEntry)) -> io::Result<()> {
        let mut cursor = None;
        loop {
            cursor = self.batch(cursor, show)?;
            if cursor.is_none() {
                return Ok(());
            }
        }
    }
}

impl Flows for Map<FlowKey, FlowEntry> {
    fn get(&self, key: &FlowKey) -> io::Result<Option<FlowEntry>> {
        self.get(key)
    }

    fn put(&self, key: &FlowKey, entry: &FlowEntry) -> io::Result<()> {
        self.put(key, entry)
    }

    fn delete(&self, key: &FlowKey) -> io::Result<bool> {
        self.delete(key)
    }

    fn batch(
        &self,
        cursor: Option<u32>,
        show: &mut dyn FnMut(&FlowKey, &FlowEntry),
    ) -> io::Result<Option<u32>> {
        self.batch(cursor, show)
    }
}

impl Flows for Map<Key4, FlowEntry> {
    fn get(&self, key: &FlowKey) -> io::Result<Option<FlowEntry>> {
        self.get(&Key4::of(key))
    }

    fn put(&self, key: &FlowKey, entry: &FlowEntry) -> io::Result<()> {
        self.put(&Key4::of(key), entry)
    }

    fn delete(&self, key: &FlowKey) -> io::Result<bool> {
        self.delete(&Key4::of(key))
    }

    fn batch(
        &self,
        cursor: Option<u32>,
        show: &mut dyn FnMut(&FlowKey, &FlowEntry),
    ) -> io::Result<Option<u32>> {
        self.batch(cursor, &mut |key, entry| show(&key.flow(), entry))
    }
}

/// Takes a ring buffer out of the object.
pub(crate) fn ring(ebpf: &mut Ebpf, name: &str) -> io::Result<RingBuf<MapData>> {
    let map = ebpf.take_map(name).ok_or_else(|| missing(name))?;
    RingBuf::try_from(map).map_err(io::Error::other)
}

/// The program's clock, `CLOCK_MONOTONIC_COARSE`, in milliseconds. It outlives the process.
pub(crate) fn now_ms() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `now` lives through the call.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC_COARSE, &raw mut now) };
    now.tv_sec.unsigned_abs() * 1_000 + now.tv_nsec.unsigned_abs() / 1_000_000
}
