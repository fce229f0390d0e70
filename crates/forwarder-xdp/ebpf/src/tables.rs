//! What `decide` reads, out of the maps.

use core::cell::Cell;

use aya_ebpf::helpers::generated::bpf_ktime_get_coarse_ns;
use phalanx_flow::decide::{Choice, Local, Service, ServiceMatch, Tables};
use phalanx_flow::hash::RowFunction;
use phalanx_flow::member::Liveness;
use phalanx_flow::{BackendIndex, FlowEntry, FlowKey, FlowSeed, MemberId, MemberSlot, Row};

use crate::abi::{
    CRC8_ROWS, FailedKey, Header, MAX_MEMBERS, MemberKey, NO_BLOCK, ROWS, SLOTS, ServiceKey, UNSETTLED,
};
use crate::maps::{
    CACHE, FAILED, FLOWS, FRAGMENTS, HALF_OPEN, LEASE, MEMBER_SLOTS, MEMBERS, ROW_TABLE, SERVICES, SLOT_TABLE,
};

/// Where an entry was found.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    Nowhere,
    Flows,
    HalfOpen,
    Cache,
}

/// The maps as one packet sees them.
pub(crate) struct View {
    pub(crate) header: &'static Header,
    pub(crate) plan: u32,
    pub(crate) now_ms: u64,
    block: Cell<u32>,
    /// The entry that was found, so that it can be written in place.
    pub(crate) found: Cell<Option<*mut FlowEntry>>,
    pub(crate) place: Cell<Place>,
}

/// Milliseconds of the program's clock, `CLOCK_MONOTONIC_COARSE`: as fine as a tick, and much cheaper than the exact one.
#[inline(always)]
pub(crate) fn now_ms() -> u64 {
    // SAFETY: no arguments.
    unsafe { bpf_ktime_get_coarse_ns() / 1_000_000 }
}

impl View {
    #[inline(always)]
    pub(crate) fn new(header: &'static Header, plan: u32) -> Self {
        Self {
            header,
            plan,
            now_ms: now_ms(),
            block: Cell::new(NO_BLOCK),
            found: Cell::new(None),
            place: Cell::new(Place::Nowhere),
        }
    }

    #[inline(always)]
    fn read_row(&self, block: u32, row: u32) -> Row {
        match ROW_TABLE.get(block.wrapping_mul(ROWS).wrapping_add(row & (ROWS - 1))) {
            Some(row) => *row,
            None => Row::EMPTY,
        }
    }
}

/// Whether packets to this address are a service's.
#[inline(always)]
pub(crate) fn is_service_address(address: &[u8; 16], plan: u32) -> bool {
    let key = ServiceKey { address: *address, port_be: [0; 2], protocol: 0, plan: plan as u8 };
    SERVICES.get_ptr(&key).is_some()
}

impl Tables for View {
    #[inline(always)]
    fn local(&self) -> Local {
        let until_ms = LEASE.get(0).copied().unwrap_or(0);
        Local {
            slot: MemberSlot(self.header.local_slot),
            leased: self.now_ms < until_ms,
            seed: FlowSeed(self.header.seed),
            now_ms: self.now_ms,
        }
    }

    #[inline(always)]
    fn service(&self, key: &FlowKey) -> ServiceMatch {
        let service = ServiceKey {
            address: key.destination,
            port_be: key.destination_port,
            protocol: key.protocol,
            plan: self.plan as u8,
        };
        // SAFETY: entries of the plan in force are not changed.
        if let Some(value) = unsafe { SERVICES.get(&service) }
            && value.block != NO_BLOCK
        {
            self.block.set(value.block);
            return ServiceMatch::Service(Service {
                index: value.index,
                idle_ms: value.idle_ms,
                replicate_syn: value.replicate_syn != 0,
                resets: value.resets != 0,
            });
        }
        if is_service_address(&key.destination, self.plan) {
            ServiceMatch::AddressOnly
        } else {
            ServiceMatch::Foreign
        }
    }

    #[inline(always)]
    fn row_of(&self, key: &FlowKey, hash: u64) -> u32 {
        match self.header.row_mask {
            CRC8_ROWS => RowFunction::Crc8.row_of(key, hash),
            mask => RowFunction::Rendezvous { mask }.row_of(key, hash),
        }
    }

    #[inline(always)]
    fn row(&self, row: u32) -> Row {
        self.read_row(self.header.rows, row)
    }

    #[inline(always)]
    fn previous_row(&self, row: u32) -> Option<Row> {
        match self.header.previous {
            NO_BLOCK => None,
            block => Some(self.read_row(block, row)),
        }
    }

    #[inline(always)]
    fn liveness(&self, slot: MemberSlot) -> Liveness {
        let slot = u32::from(slot.0);
        if slot >= MAX_MEMBERS {
            return Liveness::Down;
        }
        match MEMBERS.get(self.plan.wrapping_mul(MAX_MEMBERS).wrapping_add(slot)) {
            Some(member) if member.liveness == Liveness::Alive as u8 => Liveness::Alive,
            Some(member) if member.liveness == Liveness::Suspect as u8 => Liveness::Suspect,
            _ => Liveness::Down,
        }
    }

    #[inline(always)]
    fn slot_of(&self, id: MemberId) -> MemberSlot {
        // SAFETY: entries of the plan in force are not changed.
        match unsafe { MEMBER_SLOTS.get(&MemberKey { id: id.0, plan: self.plan }) } {
            Some(slot) => MemberSlot(*slot as u16),
            None => MemberSlot::NONE,
        }
    }

    #[inline(always)]
    fn flow(&self, key: &FlowKey) -> Option<FlowEntry> {
        let found = match FLOWS.get_ptr_mut(key) {
            Some(found) => {
                self.place.set(Place::Flows);
                found
            }
            None => {
                let found = HALF_OPEN.get_ptr_mut(key)?;
                self.place.set(Place::HalfOpen);
                found
            }
        };
        self.found.set(Some(found));
        // SAFETY: the kernel keeps the element's memory; another CPU may write it meanwhile, each field by itself.
        Some(unsafe { *found })
    }

    #[inline(always)]
    fn cached(&self, key: &FlowKey) -> Option<FlowEntry> {
        let found = CACHE.get_ptr_mut(key)?;
        self.place.set(Place::Cache);
        self.found.set(Some(found));
        // SAFETY: as above.
        Some(unsafe { *found })
    }

    #[inline(always)]
    fn has_failed(&self, service: u32, backend: BackendIndex) -> bool {
        FAILED.get_ptr(&FailedKey { service, backend: backend.0, plan: self.plan }).is_some()
    }

    #[inline(always)]
    fn consistent(&self, _service: u32, slot: u16) -> Choice {
        // The block is that of the service that was found last, which is the one meant.
        let at = self.block.get().wrapping_mul(SLOTS).wrapping_add(u32::from(slot));
        match SLOT_TABLE.get(at) {
            Some(&value) if value | UNSETTLED != u32::MAX => {
                Choice { backend: BackendIndex(value & !UNSETTLED), unsettled: value & UNSETTLED != 0 }
            }
            _ => Choice { backend: BackendIndex::NONE, unsettled: false },
        }
    }

    #[inline(always)]
    fn fragment_ports(&self, key: &FlowKey) -> Option<[[u8; 2]; 2]> {
        // SAFETY: a torn reading is a wrong port for one fragment.
        let found = unsafe { FRAGMENTS.get(key) }?;
        if self.now_ms < found.until_ms { Some(found.ports) } else { None }
    }
}
