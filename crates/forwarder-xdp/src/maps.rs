//! The program's maps, opened, and what of them user space computes.

use std::io;
use std::sync::atomic::{AtomicI64, Ordering};

use aya::Ebpf;
use aya::maps::{MapData, RingBuf};
use phalanx_flow::{FlowEntry, FlowKey, FlowState, Row};

use crate::abi::{
    Backend, CpuCounters, FailedKey, FrontService, Header, Member, MemberKey, Ports, ServiceKey, ServiceValue,
};
use crate::map::{Map, data};

/// The maps that a restart of the daemon adopts; `STAGES` and `WORK` belong to one load: what stages tell each other has the layout
/// of its programs.
pub(crate) const KEPT: [&str; 18] = [
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
    "FLOWS",
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
    pub(crate) flows: Map<FlowKey, FlowEntry>,
    pub(crate) half_open: Map<FlowKey, FlowEntry>,
    pub(crate) cache: Map<FlowKey, FlowEntry>,
    pub(crate) fragments: Map<FlowKey, Ports>,
    pub(crate) counters: Map<u32, CpuCounters>,
    /// Half-open flows that we put in less those that we took out; what the program did is in its counters.
    pub(crate) half_open_balance: AtomicI64,
    /// Blocks of the table of slots.
    pub(crate) slot_blocks: u32,
}

fn missing(name: &str) -> io::Error {
    io::Error::new(io::ErrorKind::NotFound, format!("the object has no map {name}"))
}

impl Maps {
    pub(crate) fn open(ebpf: &Ebpf) -> io::Result<Self> {
        let map = |name: &'static str| -> io::Result<&MapData> {
            data(ebpf.map(name).ok_or_else(|| missing(name))?)
        };
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
            flows: Map::new(map("FLOWS")?)?,
            half_open: Map::new(map("HALF_OPEN")?)?,
            cache: Map::new(map("CACHE")?)?,
            fragments: Map::new(map("FRAGMENTS")?)?,
            counters: Map::new(map("COUNTERS")?)?,
            half_open_balance: AtomicI64::new(0),
            slot_blocks,
        })
    }

    /// The entry of a flow, and whether it is in the table of those that are not half-open.
    pub(crate) fn entry(&self, key: &FlowKey) -> Option<(FlowEntry, bool)> {
        match self.flows.get(key) {
            Ok(Some(entry)) => Some((entry, true)),
            _ => self.half_open.get(key).ok().flatten().map(|entry| (entry, false)),
        }
    }

    /// Writes an entry where its state belongs; false if the table is full.
    pub(crate) fn put(&self, key: &FlowKey, entry: &FlowEntry, known: Option<bool>) -> bool {
        let half_open = entry.flow_state() == FlowState::HalfOpen;
        let (to, from) =
            if half_open { (&self.half_open, &self.flows) } else { (&self.flows, &self.half_open) };
        if to.put(key, entry).is_err() {
            return false;
        }
        let new = known != Some(!half_open);
        if half_open && new {
            self.half_open_balance.fetch_add(1, Ordering::Relaxed);
        }
        if known == Some(half_open) {
            self.delete(from, key);
        }
        true
    }

    /// Deletes an entry of one of the three tables of flows.
    pub(crate) fn delete(&self, table: &Map<FlowKey, FlowEntry>, key: &FlowKey) {
        if table.delete(key).is_ok_and(|was_there| was_there)
            && std::ptr::eq(table, &raw const self.half_open)
        {
            self.half_open_balance.fetch_sub(1, Ordering::Relaxed);
        }
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
