//! What `decide` reads, out of the maps.

use core::arch::asm;
use core::cell::Cell;

use aya_ebpf::helpers::generated::{bpf_jiffies64, bpf_ktime_get_coarse_ns};
use phalanx_flow::decide::{Began, Choice, Local, Service, ServiceMatch, Tables};
use phalanx_flow::hash::RowFunction;
use phalanx_flow::member::Liveness;
use phalanx_flow::{BackendIndex, FlowEntry, FlowKey, FlowSeed, MemberId, MemberSlot, Row, flow_hash};

use crate::abi::{
    CRC8_ROWS, CpuCounters, FRONT, FailedKey, Header, MAX_MEMBERS, MemberKey, NO_BLOCK, ROWS, SLOTS,
    ServiceKey, ServiceValue, UNSETTLED, front_place,
};
use crate::flows;
use crate::frame::read;
use crate::half_open;
use crate::maps::{
    CACHE, FAILED, FRAGMENTS, FRONT_SERVICES, LEASE, MEMBER_SLOTS, MEMBERS, ROW_TABLE, SERVICES, SLOT_TABLE,
};

/// Where an entry was found.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
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
    /// The packet's key, with `FAST`; else keys are read where they lie, in a map.
    words: [u64; 5],
    block: Cell<u32>,
    earlier: Cell<u32>,
    /// The entry that was found, with `FAST`, so that it can be written in place.
    found: Cell<Option<*mut FlowEntry>>,
    pub(crate) place: Cell<Place>,
    /// When it was seen before.
    pub(crate) seen_ms: Cell<u64>,
}

/// Where a map's key stands. A key is put together in words: for bytes the compiler would call functions, and read what is in
/// registers from memory.
#[repr(C, align(8))]
pub(crate) struct Aligned<T>(pub(crate) T);

/// The words of a flow's key.
#[inline(always)]
pub(crate) fn words(key: &FlowKey) -> [u64; 5] {
    let [s0, s1] = key.source_port;
    let [d0, d1] = key.destination_port;
    let (a, b) = halves(&key.source);
    let (c, d) = halves(&key.destination);
    [a, b, c, d, u64::from_ne_bytes([s0, s1, d0, d1, key.protocol, key.family, 0, 0])]
}

/// The words of a key that lies in memory.
#[inline(always)]
pub(crate) fn in_map(key: &FlowKey) -> [u64; 5] {
    const { assert!(size_of::<FlowKey>() == 40 && align_of::<FlowKey>() == 8) };
    // SAFETY: it is five words.
    unsafe { core::ptr::from_ref(key).cast::<[u64; 5]>().read() }
}

/// The same in five registers. The compiler takes a key apart into bytes, and would keep each in a place of its own on the stack.
#[inline(always)]
pub(crate) fn in_words(key: &FlowKey) -> [u64; 5] {
    let [a, b, c, d, e] = words(key);
    if key.family == 4 {
        // The rest is known: see `mapped`.
        return [a, opaque(b), c, opaque(d), opaque(e)];
    }
    [opaque(a), opaque(b), opaque(c), opaque(d), opaque(e)]
}

/// The same number, which the compiler does not know to be the same.
#[inline(always)]
pub(crate) fn opaque(word: u64) -> u64 {
    let mut word = word;
    // SAFETY: no instruction.
    unsafe { asm!("/* {0} */", inout(reg) word, options(pure, nomem, nostack, preserves_flags)) };
    word
}

/// The key of its words, of a family that the compiler knows.
#[inline(always)]
pub(crate) fn of_words(words: [u64; 5], family: u8) -> FlowKey {
    let [a, b, c, d, e] = words;
    let [s0, s1, d0, d1, protocol, ..] = e.to_ne_bytes();
    FlowKey {
        source: join(a, b),
        destination: join(c, d),
        source_port: [s0, s1],
        destination_port: [d0, d1],
        protocol,
        family,
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
    pub(crate) fn new(header: &'static Header, plan: u32, now_ms: u64, words: [u64; 5]) -> Self {
        Self {
            header,
            plan,
            now_ms,
            words,
            block: Cell::new(NO_BLOCK),
            earlier: Cell::new(NO_BLOCK),
            found: Cell::new(None),
            place: Cell::new(Place::Nowhere),
            seen_ms: Cell::new(0),
        }
    }

    /// The packet's key, put together anew: the compiler would take it apart where the words come from, for a use that is rare.
    #[inline(always)]
    pub(crate) fn key(&self, family: u8) -> FlowKey {
        let [a, b, c, d, e] = self.words;
        of_words([a, opaque(b), c, opaque(d), opaque(e)], family)
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
        self.earlier.set(value.earlier);
        ServiceMatch::Service(Service {
            index: value.index,
            idle_ms: value.idle_ms,
            linger_ms: value.linger_ms,
            replicate_syn: value.replicate_syn != 0,
            resets: value.resets != 0,
        })
    }

    /// What was read, and where.
    #[inline(always)]
    fn read(&self, place: Place, entry: FlowEntry) -> Option<FlowEntry> {
        if !FAST {
            self.place.set(place);
            self.seen_ms.set(entry.last_seen_ms);
        }
        Some(entry)
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
        let [_, _, a, b, ends] = if FAST { self.words } else { in_map(key) };
        // Destination port, protocol and plan, as in a `ServiceKey`.
        let rest = (ends >> 16) as u32 & 0xff_ffff | self.plan << 24;
        let place = self.plan.wrapping_mul(FRONT).wrapping_add(front_place(a, b, (ends >> 16) as u16));
        if let Some(front) = FRONT_SERVICES.get(place)
            && halves(&read(&front.address)) == (a, b)
            && u32::from_ne_bytes(read(&front.rest)) == rest
        {
            return self.found_service(&front.value);
        }
        let service = Aligned([a, b, u64::from(rest)]);
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
    fn hashed_row_of(&self, key: &FlowKey, seed: FlowSeed) -> u32 {
        let key = if FAST { &self.key(key.family) } else { key };
        self.row_of(key, flow_hash(seed, key))
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
        let found = match if FAST { flows::find(key.family, self.words) } else { flows::find_in_map(key) } {
            Some(found) => found,
            None if FAST => return None,
            None => {
                let (entry, _) = half_open::find(self.header, key)?;
                return self.read(Place::HalfOpen, entry);
            }
        };
        if FAST {
            self.found.set(Some(found));
        }
        // SAFETY: the kernel keeps the element's memory; another CPU may write it meanwhile, each field by itself.
        self.read(Place::Flows, unsafe { *found })
    }

    #[inline(always)]
    fn cached(&self, key: &FlowKey) -> Option<FlowEntry> {
        if self.header.caching == 0 {
            return None;
        }
        // SAFETY: as above.
        self.read(Place::Cache, unsafe { *CACHE.get_ptr_mut(key)? })
    }

    #[inline(always)]
    fn has_failed(&self, service: u32, backend: BackendIndex) -> bool {
        FAILED.get_ptr(&FailedKey { service, backend: backend.0, plan: self.plan }).is_some()
    }

    #[inline(always)]
    fn consistent(&self, _service: u32, slot: u16, began: Began) -> Choice {
        // The block is that of the service that was found last, which is the one meant.
        let block = if matches!(began, Began::Now) { self.block.get() } else { self.earlier.get() };
        let at = block.wrapping_mul(SLOTS).wrapping_add(u32::from(slot));
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
