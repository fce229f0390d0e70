//! What `decide` reads, out of the maps.

use core::arch::asm;
use core::cell::Cell;

use aya_ebpf::helpers::generated::{bpf_jiffies64, bpf_ktime_get_coarse_ns};
use phalanx_flow::decide::{Choice, Local, Service, ServiceMatch, Tables};
use phalanx_flow::hash::RowFunction;
use phalanx_flow::member::Liveness;
use phalanx_flow::{BackendIndex, FlowEntry, FlowKey, FlowSeed, MemberId, MemberSlot, Row};

use crate::abi::{
    CRC8_ROWS, CpuCounters, FRONT, FailedKey, Header, MAX_MEMBERS, MemberKey, NO_BLOCK, ROWS, SLOTS,
    ServiceKey, ServiceValue, UNSETTLED, front_place,
};
use crate::frame::read;
use crate::maps::{
    CACHE, FAILED, FLOWS, FRAGMENTS, FRONT_SERVICES, HALF_OPEN, LEASE, MEMBER_SLOTS, MEMBERS, ROW_TABLE,
    SERVICES, SLOT_TABLE,
};

/// Where an entry was found.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    Nowhere,
    Flows,
    HalfOpen,
    Cache,
}

/// The maps as one packet sees them. With `FAST` the flow table is that of flows which are not half-open, for the way of most packets.
pub(crate) struct View<const FAST: bool> {
    pub(crate) header: &'static Header,
    pub(crate) plan: u32,
    pub(crate) now_ms: u64,
    block: Cell<u32>,
    /// The entry that was found, so that it can be written in place.
    pub(crate) found: Cell<Option<*mut FlowEntry>>,
    pub(crate) place: Cell<Place>,
}

/// Where a map's key stands. A key is put together in words: for bytes the compiler would call functions, and read what is in
/// registers from memory.
#[repr(C, align(8))]
struct Aligned<T>(T);

/// The words of a flow's key.
#[inline(always)]
pub(crate) fn words(key: &FlowKey) -> [u64; 5] {
    let [s0, s1] = key.source_port;
    let [d0, d1] = key.destination_port;
    let (a, b) = halves(&key.source);
    let (c, d) = halves(&key.destination);
    [a, b, c, d, u64::from_ne_bytes([s0, s1, d0, d1, key.protocol, key.family, 0, 0])]
}

/// The same key in five registers. The compiler takes it apart into bytes, and would keep each in a place of its own on the stack.
#[inline(always)]
pub(crate) fn in_words(key: &FlowKey) -> FlowKey {
    let [a, b, c, d, e] = words(key).map(|word| {
        let mut word = word;
        // SAFETY: no instruction; the compiler does not know that it is the same number.
        unsafe { asm!("/* {0} */", inout(reg) word, options(pure, nomem, nostack, preserves_flags)) };
        word
    });
    let [s0, s1, d0, d1, protocol, ..] = e.to_ne_bytes();
    FlowKey {
        source: join(a, b),
        destination: join(c, d),
        source_port: [s0, s1],
        destination_port: [d0, d1],
        protocol,
        // What the compiler knows of it is worth more.
        family: key.family,
        reserved: [0; 2],
    }
}

/// An address of its two words.
#[inline(always)]
fn join(first: u64, second: u64) -> [u8; 16] {
    let [a, b, c, d, e, f, g, h] = first.to_ne_bytes();
    let [i, j, k, l, m, n, o, p] = second.to_ne_bytes();
    [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p]
}

/// The two words of an address.
#[inline(always)]
pub(crate) fn halves(address: &[u8; 16]) -> (u64, u64) {
    let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = *address;
    (u64::from_ne_bytes([a, b, c, d, e, f, g, h]), u64::from_ne_bytes([i, j, k, l, m, n, o, p]))
}

/// Milliseconds of the program's clock, `CLOCK_MONOTONIC_COARSE`: as fine as a tick. It is read once a tick of each CPU, because
/// reading and dividing it costs more than finding out that there was none; so it may be two ticks old.
#[inline(always)]
pub(crate) fn coarse_ms(counters: &mut CpuCounters) -> u64 {
    // SAFETY: no arguments.
    let tick = unsafe { bpf_jiffies64() };
    if counters.tick != tick {
        counters.tick = tick;
        // SAFETY: no arguments.
        counters.tick_ms = unsafe { bpf_ktime_get_coarse_ns() } / 1_000_000;
    }
    counters.tick_ms
}

impl<const FAST: bool> View<FAST> {
    #[inline(always)]
    pub(crate) fn new(header: &'static Header, plan: u32, now_ms: u64) -> Self {
        Self {
            header,
            plan,
            now_ms,
            block: Cell::new(NO_BLOCK),
            found: Cell::new(None),
            place: Cell::new(Place::Nowhere),
        }
    }

    /// The flow that was found was seen now. Written only if the clock has moved: other CPUs may have the line.
    #[inline(always)]
    pub(crate) fn touch(&self, reported: bool) {
        if let Some(entry) = self.found.get() {
            // SAFETY: the verifier knows where it points.
            unsafe {
                if (*entry).last_seen_ms != self.now_ms {
                    (*entry).last_seen_ms = self.now_ms;
                }
                if reported {
                    (*entry).last_reported_ms = self.now_ms;
                }
            }
        }
    }

    #[inline(always)]
    fn found_service(&self, value: &ServiceValue) -> ServiceMatch {
        self.block.set(value.block);
        ServiceMatch::Service(Service {
            index: value.index,
            idle_ms: value.idle_ms,
            linger_ms: value.linger_ms,
            replicate_syn: value.replicate_syn != 0,
            resets: value.resets != 0,
        })
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

impl<const FAST: bool> Tables for View<FAST> {
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
        // On the long way the key is in a map.
        let (a, b) = halves(&if FAST { key.destination } else { read(&key.destination) });
        let [p0, p1] = key.destination_port;
        let rest = [p0, p1, key.protocol, self.plan as u8];
        let place = self.plan.wrapping_mul(FRONT).wrapping_add(front_place(a, b, key.destination_port));
        if let Some(front) = FRONT_SERVICES.get(place)
            && halves(&read(&front.address)) == (a, b)
            && u32::from_ne_bytes(read(&front.rest)) == u32::from_ne_bytes(rest)
        {
            return self.found_service(&front.value);
        }
        let service = Aligned([a, b, u64::from(u32::from_ne_bytes(rest))]);
        // SAFETY: entries of the plan in force are not changed; the words begin as a `ServiceKey`.
        if let Some(value) = unsafe { SERVICES.get(&*(&raw const service).cast::<ServiceKey>()) }
            && value.block != NO_BLOCK
        {
            return self.found_service(value);
        }
        if !FAST && is_service_address(&key.destination, self.plan) {
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
        let aligned;
        let key = if FAST {
            aligned = Aligned(words(key));
            // SAFETY: as many bytes as a key has.
            unsafe { &*(&raw const aligned).cast::<FlowKey>() }
        } else {
            key
        };
        let found = match FLOWS.get_ptr_mut(key) {
            Some(found) => {
                self.place.set(Place::Flows);
                found
            }
            None if FAST => return None,
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
        if self.header.caching == 0 {
            return None;
        }
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
