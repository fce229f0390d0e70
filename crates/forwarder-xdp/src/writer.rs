//! Puts plans into the kernel: written beside the one in force, then switched to by one word.
//!
//! Tables that have not changed are not written again: blocks of rows and slots are known by the plan's `Arc`s.
//! Backends have numbers of the kernel's own, kept for as long as the tables live, so that flows that an earlier process recorded
//! still mean what they meant.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;

use phalanx_flow::hash::RowFunction;
use phalanx_flow::key::octets;
use phalanx_flow::member::Liveness;
use phalanx_flow::{BackendId, BackendIndex, Row};
use phalanx_forwarder::engine::CompiledPlan;
use phalanx_forwarder::{InstallError, NextHop, NextHops, Plan, SlotSet};

use crate::abi::{
    Backend, CRC8_ROWS, FRONT, FailedKey, FrontService, Header, Hop, MAX_BACKENDS, MAX_MACS, MAX_MEMBERS,
    Member, MemberKey, NO_BLOCK, ROW_BLOCKS, ROWS, SLOTS, ServiceKey, ServiceValue, UNSETTLED, front_place,
};
use crate::maps::Maps;

/// Names of the kernel's backends by their numbers.
#[derive(Debug, Default)]
pub(crate) struct Names {
    by_number: Vec<BackendId>,
    by_name: HashMap<BackendId, u32>,
}

impl Names {
    pub(crate) fn name(&self, index: BackendIndex) -> Option<BackendId> {
        self.by_number.get(index.0 as usize).copied()
    }

    pub(crate) fn number(&self, name: &BackendId) -> Option<BackendIndex> {
        self.by_name.get(name).copied().map(BackendIndex)
    }

    /// All of them, by their numbers.
    pub(crate) fn all(&self) -> &[BackendId] {
        &self.by_number
    }

    fn add(&mut self, name: BackendId) -> Option<u32> {
        if let Some(number) = self.by_name.get(&name) {
            return Some(*number);
        }
        let number = u32::try_from(self.by_number.len()).ok().filter(|number| *number < MAX_BACKENDS)?;
        self.by_number.push(name);
        self.by_name.insert(name, number);
        Some(number)
    }
}

type SlotsKey = (Arc<[BackendIndex]>, Option<Arc<SlotSet>>);

/// What is in a block.
#[derive(Debug)]
enum Block<T> {
    Free,
    /// Written by an earlier process.
    Unknown,
    Holds(T),
}

/// What the program has to know beside the plan.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Site {
    /// Our interfaces' addresses.
    pub(crate) macs: [u64; MAX_MACS],
    /// Something was put into the cache.
    pub(crate) caching: bool,
    /// A next hop that is not known stays what it was.
    pub(crate) keep_hops: bool,
}

/// What is written where.
#[derive(Debug)]
pub(crate) struct Writer {
    active: u32,
    rows: Vec<Block<Arc<[Row]>>>,
    slots: Vec<Block<SlotsKey>>,
    /// Blocks that the plan in force reads.
    rows_in_force: Vec<u32>,
    slots_in_force: Vec<u32>,
    /// Waits for the packets that read the plan before the one in force; none if nobody does.
    grace: Option<JoinHandle<()>>,
    /// Keys that each of the two plans has.
    services: [Vec<ServiceKey>; 2],
    failed: [Vec<FailedKey>; 2],
    members: [Vec<MemberKey>; 2],
}

fn refused(table: &'static str) -> impl FnOnce(io::Error) -> InstallError {
    move |source| InstallError::Kernel { table, source }
}

impl Writer {
    /// For empty maps.
    pub(crate) fn new(maps: &Maps) -> Self {
        Self {
            active: 0,
            rows: (0..ROW_BLOCKS).map(|_| Block::Free).collect(),
            slots: (0..maps.slot_blocks).map(|_| Block::Free).collect(),
            rows_in_force: Vec::new(),
            slots_in_force: Vec::new(),
            grace: None,
            services: [Vec::new(), Vec::new()],
            failed: [Vec::new(), Vec::new()],
            members: [Vec::new(), Vec::new()],
        }
    }

    /// For maps that an earlier process left: what they say stays in force until the first plan.
    pub(crate) fn adopt(maps: &Maps) -> io::Result<(Self, Names, Header)> {
        let mut writer = Self::new(maps);
        // It may have switched a moment ago.
        wait_for_packets();
        writer.active = maps.active.get(&0)?.unwrap_or(0) & 1;
        let header = maps.headers.get(&writer.active)?.ok_or(io::ErrorKind::NotFound)?;
        writer.rows_in_force =
            [header.rows, header.previous].into_iter().filter(|block| *block < ROW_BLOCKS).collect();
        maps.services.each(&mut |key, value| {
            writer.services[usize::from(key.plan & 1)].push(*key);
            if u32::from(key.plan) == writer.active && value.block < maps.slot_blocks {
                writer.slots_in_force.extend([value.block, value.earlier]);
            }
        })?;
        maps.failed.each(&mut |key, _| writer.failed[(key.plan & 1) as usize].push(*key))?;
        maps.member_slots.each(&mut |key, _| writer.members[(key.plan & 1) as usize].push(*key))?;
        for block in &writer.rows_in_force {
            writer.rows[*block as usize] = Block::Unknown;
        }
        for block in &writer.slots_in_force {
            writer.slots[*block as usize] = Block::Unknown;
        }
        let mut names = Names::default();
        for index in 0..MAX_BACKENDS {
            let Some(backend) = maps.backends.get(&(writer.active * MAX_BACKENDS + index))? else { break };
            if backend.family == 0 {
                break;
            }
            names.add(name_of(&backend));
        }
        Ok((writer, names, header))
    }

    /// Writes a plan and switches to it.
    pub(crate) fn write(
        &mut self,
        maps: &Maps,
        names: &mut Names,
        compiled: &CompiledPlan,
        next_hops: &NextHops,
        site: Site,
    ) -> Result<(), InstallError> {
        let Site { macs, caching, keep_hops } = site;
        let plan = &compiled.plan;
        let next = self.active ^ 1;
        // Packets that still read what is overwritten now have ended then.
        self.end_grace();
        let rows = self.rows_block(maps, &plan.rows, &[])?;
        let previous = match &plan.previous {
            Some(previous) => self.rows_block(maps, previous, &[rows])?,
            None => NO_BLOCK,
        };
        let numbers = self.write_backends(maps, names, plan, next_hops, next, keep_hops)?;
        self.write_members(maps, plan, next_hops, next, keep_hops)?;
        let blocks = self.write_services(maps, plan, &numbers, next)?;

        let (local_address, local_family) = compiled.local_address();
        let header = Header {
            seed: plan.seed.0,
            view_digest: plan.view_digest,
            cookies: [plan.handoff.cookie, plan.handoff.old_cookie.unwrap_or(plan.handoff.cookie)],
            local_address,
            rows,
            previous,
            row_mask: match plan.row_function {
                RowFunction::Rendezvous { mask } => mask,
                RowFunction::Crc8 => CRC8_ROWS,
            },
            local_slot: plan.local.0,
            handoff_port_be: plan.handoff.port.to_be_bytes(),
            local_family,
            caching: u8::from(caching),
            reserved: [0; 2],
            half_open_sets: maps.half_open.sets(),
            macs,
        };
        maps.headers.put(&next, &header).map_err(refused("HEADERS"))?;
        maps.active.put(&0, &next).map_err(refused("ACTIVE"))?;
        self.active = next;
        self.begin_grace();
        self.rows_in_force = [rows, previous].into_iter().filter(|block| *block != NO_BLOCK).collect();
        self.slots_in_force = blocks;
        Ok(())
    }

    /// From now on nobody begins to read the plan before. The next plan, which takes its place, is seldom there before nobody reads it at
    /// all: whoever installs it does not wait for a grace period then, which takes seconds while the kernel verifies other programs.
    fn begin_grace(&mut self) {
        let thread = std::thread::Builder::new().name("phalanx-grace".to_owned()).spawn(wait_for_packets);
        self.grace = match thread {
            Ok(thread) => Some(thread),
            Err(_) => {
                wait_for_packets();
                None
            }
        };
    }

    fn end_grace(&mut self) {
        if let Some(thread) = self.grace.take() {
            // It cannot panic.
            let _ = thread.join();
        }
    }

    /// The block that has these rows; written if none has.
    fn rows_block(&mut self, maps: &Maps, rows: &Arc<[Row]>, taken: &[u32]) -> Result<u32, InstallError> {
        let held = |block: &Block<Arc<[Row]>>| matches!(block, Block::Holds(held) if Arc::ptr_eq(held, rows));
        if let Some(at) = self.rows.iter().position(held) {
            return Ok(at as u32);
        }
        let free = (0..ROW_BLOCKS).find(|at| !self.rows_in_force.contains(at) && !taken.contains(at));
        // Two are in force at the most, one is taken, and there are four.
        let at = free.unwrap_or(ROW_BLOCKS - 1);
        let keys: Vec<u32> = (at * ROWS..).take(rows.len()).collect();
        self.rows[at as usize] = Block::Free;
        maps.rows.put_all(&keys, rows).map_err(refused("ROW_TABLE"))?;
        self.rows[at as usize] = Block::Holds(Arc::clone(rows));
        Ok(at)
    }

    /// Writes the backends, and says which number each of the plan's has.
    fn write_backends(
        &self,
        maps: &Maps,
        names: &mut Names,
        plan: &Plan,
        next_hops: &NextHops,
        next: u32,
        keep_hops: bool,
    ) -> Result<Vec<u32>, InstallError> {
        // What the plan does not name keeps what it had: flows may still go there.
        let known = names.by_number.len() as u32;
        let mut table: Vec<Backend> = Vec::with_capacity(known as usize);
        for number in 0..known {
            let old =
                maps.backends.get(&(self.active * MAX_BACKENDS + number)).map_err(refused("BACKENDS"))?;
            table.push(old.unwrap_or_default());
        }
        let mut numbers = Vec::with_capacity(plan.backends.len());
        for (index, backend) in plan.backends.iter().enumerate() {
            let Some(number) = names.add(backend.id) else {
                return Err(InstallError::Inconsistent(format!(
                    "more than {MAX_BACKENDS} backends since the tables were made; they need a restart without them"
                )));
            };
            let mut hop = hop(next_hops.backends.get(index).copied().flatten());
            if hop.interface == 0
                && keep_hops
                && let Some(old) = table.get(number as usize)
            {
                hop = old.hop;
            }
            let written = Backend {
                address: backend.id.address,
                source: octets(backend.source).0,
                hop,
                port_be: backend.id.port,
                method: backend.id.method,
                family: backend.id.family,
            };
            if table.len() <= number as usize {
                table.resize(number as usize + 1, Backend::default());
            }
            table[number as usize] = written;
            numbers.push(number);
        }
        let keys: Vec<u32> = (next * MAX_BACKENDS..).take(table.len()).collect();
        maps.backends.put_all(&keys, &table).map_err(refused("BACKENDS"))?;
        Ok(numbers)
    }

    fn write_members(
        &mut self,
        maps: &Maps,
        plan: &Plan,
        next_hops: &NextHops,
        next: u32,
        keep_hops: bool,
    ) -> Result<(), InstallError> {
        if plan.members.len() > MAX_MEMBERS as usize {
            return Err(InstallError::Inconsistent(format!("more than {MAX_MEMBERS} members")));
        }
        for key in std::mem::take(&mut self.members[next as usize]) {
            maps.member_slots.delete(&key).map_err(refused("MEMBER_SLOTS"))?;
        }
        let mut table = Vec::with_capacity(plan.members.len() + 1);
        for (slot, member) in plan.members.iter().enumerate() {
            let (address, family) = octets(member.address);
            let mut hop = hop(next_hops.members.get(slot).copied().flatten());
            if hop.interface == 0 && keep_hops {
                hop = self.old_hop(maps, member.id.0, &address).map_err(refused("MEMBERS"))?;
            }
            table.push(Member {
                address,
                id: member.id.0,
                hop,
                liveness: member.liveness as u8,
                family,
                reserved: [0; 2],
            });
            let key = MemberKey { id: member.id.0, plan: next };
            maps.member_slots.put(&key, &(slot as u32)).map_err(refused("MEMBER_SLOTS"))?;
            self.members[next as usize].push(key);
        }
        // No row names a slot behind the last one; whatever stands there is down.
        if table.len() < MAX_MEMBERS as usize {
            table.push(Member { liveness: Liveness::Down as u8, ..Member::default() });
        }
        let keys: Vec<u32> = (next * MAX_MEMBERS..).take(table.len()).collect();
        maps.members.put_all(&keys, &table).map_err(refused("MEMBERS"))
    }

    /// The next hop that a member has in the plan in force.
    fn old_hop(&self, maps: &Maps, id: u32, address: &[u8; 16]) -> io::Result<Hop> {
        let Some(slot) = maps.member_slots.get(&MemberKey { id, plan: self.active })? else {
            return Ok(Hop::default());
        };
        let old = maps.members.get(&(self.active * MAX_MEMBERS + slot))?;
        Ok(old.filter(|old| old.address == *address).map(|old| old.hop).unwrap_or_default())
    }

    /// Writes the services and those of their tables that are new; returns the blocks in use.
    fn write_services(
        &mut self,
        maps: &Maps,
        plan: &Plan,
        numbers: &[u32],
        next: u32,
    ) -> Result<Vec<u32>, InstallError> {
        for key in std::mem::take(&mut self.services[next as usize]) {
            maps.services.delete(&key).map_err(refused("SERVICES"))?;
        }
        for key in std::mem::take(&mut self.failed[next as usize]) {
            maps.failed.delete(&key).map_err(refused("FAILED"))?;
        }
        let mut blocks = Vec::with_capacity(2 * plan.services.len());
        for service in &plan.services {
            let block =
                self.slots_block(maps, &service.slots, service.unsettled.as_ref(), numbers, &blocks)?;
            blocks.push(block.ok_or_else(|| {
                InstallError::Inconsistent(
                    "more services than the tables were made for; they need a restart".to_owned(),
                )
            })?);
        }
        let mut front = vec![FrontService::EMPTY; FRONT as usize];
        for (index, service) in (0_u32..).zip(&plan.services) {
            let block = blocks[index as usize];
            let earlier = match &service.earlier {
                // Without room for it what nobody knows goes by the slots in force.
                Some(slots) => self.slots_block(maps, slots, None, numbers, &blocks)?.unwrap_or(block),
                None => block,
            };
            blocks.push(earlier);
            let (address, _) = octets(service.address);
            let key = ServiceKey {
                address,
                port_be: service.port.to_be_bytes(),
                protocol: service.protocol,
                plan: next as u8,
            };
            let value = ServiceValue {
                block,
                earlier,
                idle_ms: u32::try_from(service.idle.as_millis()).unwrap_or(u32::MAX),
                linger_ms: u32::try_from(service.linger.as_millis()).unwrap_or(u32::MAX),
                index,
                replicate_syn: u32::from(service.replicate_syn),
                resets: u32::from(!service.failed.is_empty()),
            };
            let word = |at: usize| address[at..].first_chunk().copied().map_or(0, u64::from_ne_bytes);
            let place = &mut front[front_place(word(0), word(8), u16::from_ne_bytes(key.port_be)) as usize];
            if *place == FrontService::EMPTY {
                let [port0, port1] = key.port_be;
                *place = FrontService { address, rest: [port0, port1, key.protocol, key.plan], value };
            }
            for backend in service.failed.iter().filter_map(|index| numbers.get(index.0 as usize)) {
                let key = FailedKey { service: index, backend: *backend, plan: next };
                maps.failed.put(&key, &1).map_err(refused("FAILED"))?;
                self.failed[next as usize].push(key);
            }
            let alone = ServiceKey { port_be: [0; 2], protocol: 0, ..key };
            for (key, value) in [(key, value), (alone, ServiceValue { block: NO_BLOCK, ..value })] {
                maps.services.put(&key, &value).map_err(refused("SERVICES"))?;
                self.services[next as usize].push(key);
            }
        }
        let keys: Vec<u32> = (next * FRONT..).take(front.len()).collect();
        maps.front_services.put_all(&keys, &front).map_err(refused("FRONT_SERVICES"))?;
        Ok(blocks)
    }

    /// The block that has these slots; written if none has. `None`: there is no room.
    fn slots_block(
        &mut self,
        maps: &Maps,
        slots: &Arc<[BackendIndex]>,
        unsettled: Option<&Arc<SlotSet>>,
        numbers: &[u32],
        taken: &[u32],
    ) -> Result<Option<u32>, InstallError> {
        let held = |block: &Block<SlotsKey>| match block {
            Block::Holds((table, set)) => {
                Arc::ptr_eq(table, slots)
                    && match (set, unsettled) {
                        (Some(a), Some(b)) => Arc::ptr_eq(a, b),
                        (None, None) => true,
                        _ => false,
                    }
            }
            Block::Free | Block::Unknown => false,
        };
        if let Some(at) = self.slots.iter().position(held) {
            return Ok(Some(at as u32));
        }
        let free = (0..maps.slot_blocks).find(|at| !self.slots_in_force.contains(at) && !taken.contains(at));
        let Some(at) = free else { return Ok(None) };
        let values: Vec<u32> = slots
            .iter()
            .enumerate()
            .map(|(slot, index)| {
                let number = numbers.get(index.0 as usize).copied().unwrap_or(!UNSETTLED);
                let mark = unsettled.is_some_and(|set| set.contains(slot as u16));
                number | if mark { UNSETTLED } else { 0 }
            })
            .collect();
        let keys: Vec<u32> = (at * SLOTS..).take(values.len()).collect();
        self.slots[at as usize] = Block::Free;
        maps.slots.put_all(&keys, &values).map_err(refused("SLOT_TABLE"))?;
        self.slots[at as usize] = Block::Holds((Arc::clone(slots), unsettled.cloned()));
        Ok(Some(at))
    }
}

fn name_of(backend: &Backend) -> BackendId {
    BackendId {
        address: backend.address,
        port: backend.port_be,
        method: backend.method,
        family: backend.family,
    }
}

fn hop(next_hop: Option<NextHop>) -> Hop {
    next_hop.map_or_else(Hop::default, |next_hop| Hop {
        interface: next_hop.interface,
        mtu: next_hop.mtu,
        source_mac: next_hop.source_mac,
        destination_mac: next_hop.destination_mac,
        reserved: [0; 2],
    })
}

/// Returns when every packet that was being processed has been.
fn wait_for_packets() {
    // MEMBARRIER_CMD_GLOBAL waits for an RCU grace period (`kernel/sched/membarrier.c`), and a program runs within one.
    const GLOBAL: libc::c_int = 1;
    // SAFETY: no pointers.
    let result = unsafe { libc::syscall(libc::SYS_membarrier, GLOBAL, 0, 0) };
    if result < 0 {
        // Not to be had with `nohz_full`; a packet takes microseconds.
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
}
