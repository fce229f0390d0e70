//! The maps. Their sizes here are the smallest; the loader sets those that the configuration names.

use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, HashMap, LruHashMap, PerCpuArray, ProgramArray, RingBuf};
use phalanx_flow::decide::Decision;
use phalanx_flow::packet::Packet;
use phalanx_flow::{FlowEntry, FlowKey, Row};

use crate::abi::{
    Backend, CpuCounters, FRONT, FailedKey, FrontService, Header, Key4, MAX_BACKENDS, MAX_MEMBERS, Member,
    MemberKey, PLANS, Ports, ROW_BLOCKS, ROWS, SLOTS, ServiceKey, ServiceValue, stage,
};
use crate::sets::HalfOpenSet;
use crate::tables::Place;

/// Which plan is in force: the one word that switches.
#[map]
pub(crate) static ACTIVE: Array<u32> = Array::with_max_entries(1, 0);
/// Until when we may own, in milliseconds of the program's clock.
#[map]
pub(crate) static LEASE: Array<u64> = Array::with_max_entries(1, 0);
/// By plan.
#[map]
pub(crate) static HEADERS: Array<Header> = Array::with_max_entries(PLANS, 0);
/// By plan and slot.
#[map]
pub(crate) static MEMBERS: Array<Member> = Array::with_max_entries(PLANS * MAX_MEMBERS, 0);
/// By plan and id.
#[map]
pub(crate) static MEMBER_SLOTS: HashMap<MemberKey, u32> = HashMap::with_max_entries(PLANS * MAX_MEMBERS, 0);
/// By plan and index.
#[map]
pub(crate) static BACKENDS: Array<Backend> = Array::with_max_entries(PLANS * MAX_BACKENDS, 0);
/// Services and their addresses.
#[map]
pub(crate) static SERVICES: HashMap<ServiceKey, ServiceValue> = HashMap::with_max_entries(1024, 0);
/// In front of it, by plan and place.
#[map]
pub(crate) static FRONT_SERVICES: Array<FrontService> = Array::with_max_entries(PLANS * FRONT, 0);
/// Backends whose flows are reset.
#[map]
pub(crate) static FAILED: HashMap<FailedKey, u32> = HashMap::with_max_entries(PLANS * MAX_BACKENDS, 0);
/// By block and row.
#[map]
pub(crate) static ROW_TABLE: Array<Row> = Array::with_max_entries(ROW_BLOCKS * ROWS, 0);
/// By block and slot.
#[map]
pub(crate) static SLOT_TABLE: Array<u32> = Array::with_max_entries(2 * SLOTS, 0);
/// Entries are allocated one by one (`BPF_F_NO_PREALLOC`): one of IPv4 then lies in two neighbouring cache lines, in memory that the
/// kernel maps by large pages, and a table that is hardly used takes hardly any.
const ONE_BY_ONE: u32 = 1;
/// Flows of IPv4, half-open ones not among them.
#[map]
pub(crate) static FLOWS4: HashMap<Key4, FlowEntry> = HashMap::with_max_entries(1024, ONE_BY_ONE);
/// The same of IPv6.
#[map]
pub(crate) static FLOWS6: HashMap<FlowKey, FlowEntry> = HashMap::with_max_entries(1024, ONE_BY_ONE);
/// The daemon may have it in its memory (`BPF_F_MMAPABLE`).
const MAPPABLE: u32 = 1 << 10;
/// Half-open flows: see [`crate::half_open`].
#[map]
pub(crate) static HALF_OPEN: Array<HalfOpenSet> = Array::with_max_entries(128, MAPPABLE);
/// Other members' flows.
#[map]
pub(crate) static CACHE: LruHashMap<FlowKey, FlowEntry> = LruHashMap::with_max_entries(1024, 0);
/// Ports of fragmented packets.
#[map]
pub(crate) static FRAGMENTS: LruHashMap<FlowKey, Ports> = LruHashMap::with_max_entries(4096, 0);
/// [`crate::abi::RawEvent`]s.
#[map]
pub(crate) static EVENTS: RingBuf = RingBuf::with_byte_size(1 << 22, 0);
/// [`crate::abi::Punt`]s.
#[map]
pub(crate) static PUNTS: RingBuf = RingBuf::with_byte_size(1 << 21, 0);
/// What each CPU counted.
#[map]
pub(crate) static COUNTERS: PerCpuArray<CpuCounters> = PerCpuArray::with_max_entries(1, 0);
/// What stages tell each other.
#[map]
pub(crate) static WORK: PerCpuArray<Work> = PerCpuArray::with_max_entries(1, 0);
/// The stages.
#[map]
pub(crate) static STAGES: ProgramArray = ProgramArray::with_max_entries(stage::COUNT, 0);

impl Work {
    /// Keeps the packet for the next stage; its key is that of `words`.
    #[inline(always)]
    pub(crate) fn keep(&mut self, packet: &Packet, words: [u64; 5]) {
        let key = (&raw mut self.packet.key).cast::<u64>();
        for (place, word) in words.into_iter().enumerate() {
            // SAFETY: a key is five words.
            unsafe { key.add(place).write_volatile(word) };
        }
        let kept = &mut self.packet;
        kept.kind = packet.kind;
        kept.fragment = packet.fragment;
        kept.tcp_sequence = packet.tcp_sequence;
        kept.tcp_acknowledgment = packet.tcp_acknowledgment;
        kept.l3_offset = packet.l3_offset;
        kept.l3_length = packet.l3_length;
        kept.l4_offset = packet.l4_offset;
        kept.l4_length = packet.l4_length;
        kept.payload_length = packet.payload_length;
        kept.ttl = packet.ttl;
        kept.tos = packet.tos;
        kept.dont_fragment = packet.dont_fragment;
    }
}

/// What stages tell each other about one packet.
#[repr(C)]
pub(crate) struct Work {
    pub(crate) packet: Packet,
    pub(crate) arrival: phalanx_flow::Arrival,
    pub(crate) decision: Decision,
    /// Where the entry that the decision is about was found.
    pub(crate) place: Place,
    /// The plan that the whole packet sees.
    pub(crate) plan: u32,
    /// 1: the frame starts with the IP header.
    pub(crate) bare: u32,
    /// Where in a hand-off the packet or the token is; 0 for a ping.
    pub(crate) echo: u32,
    /// See [`crate::abi::punt`].
    pub(crate) why: u8,
}
