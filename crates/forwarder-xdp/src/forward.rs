//! What the rest of the daemon asks of a forwarder.

use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::time::Duration;

use phalanx_flow::{BackendId, FlowEntry, FlowEvent, FlowFlags, FlowKey, MemberSlot, Record, flow_hash};
use phalanx_forwarder::engine::entry::{entry_of, is_replaced, is_told, record_of};
use phalanx_forwarder::{
    Counters, Drop as Reason, Forwarder, InstallError, NextHops, Plan, RowSet, SendError, Upserted, rewrite,
};

use crate::abi::{self, Change, change};
use crate::events::kind_of;
use crate::maps::{Kind, now_ms};
use crate::writer::Names;
use crate::{XdpForwarder, lock, read};

impl XdpForwarder {
    pub(crate) fn record(
        &self,
        names: &Names,
        key: &FlowKey,
        entry: &FlowEntry,
        now_ms: u64,
    ) -> Option<Record> {
        Some(record_of(key, entry, names.name(entry.backend)?, now_ms))
    }

    fn upsert_one(&self, names: &Names, record: &Record, now_ms: u64) -> Upserted {
        let Some(backend) = names.number(&record.backend) else { return Upserted::UnknownBackend };
        let mut entry = entry_of(record, backend, now_ms);
        let known = self.maps.entry(&record.key);
        if let Some((current, _)) = &known {
            if !is_replaced(current, names.name(current.backend), record) {
                if current.flags.has(FlowFlags::FORMER) {
                    // Whoever sent this counts us among the holders, and knows of nothing newer.
                    self.set_former(&[record.key], false);
                }
                return Upserted::Stale;
            }
            entry.last_seen_ms = entry.last_seen_ms.max(current.last_seen_ms);
        }
        self.maps.delete(Kind::Cached, &record.key);
        if self.maps.put(&record.key, &entry, known.map(|(_, kind)| kind)) {
            Upserted::Applied
        } else {
            self.table_full.fetch_add(1, Ordering::Relaxed);
            Upserted::Full
        }
    }
}

impl Forwarder for XdpForwarder {
    fn install(&self, plan: Plan) -> Result<(), InstallError> {
        if plan.members.len() > abi::MAX_MEMBERS as usize {
            return Err(InstallError::Inconsistent(format!("more than {} members", abi::MAX_MEMBERS)));
        }
        self.engine.install(plan)?;
        self.installed.store(true, Ordering::Relaxed);
        self.write()
    }

    fn set_next_hops(&self, next_hops: NextHops) {
        let hops = &self.adopted_hops;
        let over = now_ms() >= hops.until_ms && !hops.given_up.swap(true, Ordering::Relaxed);
        // The daemon says this again whenever a link has changed.
        let moved = lock(&self.macs).refresh();
        if !over && !moved && *self.engine.next_hops() == next_hops {
            return;
        }
        self.engine.set_next_hops(next_hops);
        if let Err(error) = self.write() {
            tracing::error!(%error, "the kernel did not take the next hops");
        }
    }

    fn renew_lease(&self, term: Duration) {
        let until_ms = if term.is_zero() { 0 } else { now_ms() + term.as_millis() as u64 };
        if let Err(error) = self.maps.lease.put(&0, &until_ms) {
            tracing::error!(%error, "the lease was not renewed");
        }
    }

    fn remember(&self, note: &[u8]) {
        if let Some(kept) = &self.note
            && let Err(error) = kept.write(note)
        {
            tracing::error!(%error, "a restart will not go on with these flows");
        }
    }

    fn upsert(&self, records: &[Record]) -> Vec<Upserted> {
        let now_ms = now_ms();
        let names = read(&self.names);
        records.iter().map(|record| self.upsert_one(&names, record, now_ms)).collect()
    }

    fn remove(&self, key: &FlowKey, birth: u64, min_idle: Duration) -> bool {
        let seen_ms = now_ms().saturating_sub(min_idle.as_millis() as u64);
        self.maps.apply.make(&[Change { birth, seen_ms, ..Change::new(change::REMOVE, key) }]) == [true]
    }

    fn stamp(&self, key: &FlowKey, birth: u64) -> bool {
        self.maps.apply.make(&[Change { birth, ..Change::new(change::STAMP, key) }]) == [true]
    }

    fn protect(&self, key: &FlowKey, birth: u64, update: u32) {
        self.maps.apply.make(&[Change { update, birth, ..Change::new(change::PROTECT, key) }]);
    }

    fn set_former(&self, keys: &[FlowKey], former: bool) {
        let changes: Vec<Change> = keys
            .iter()
            .map(|key| Change { update: u32::from(former), ..Change::new(change::FORMER, key) })
            .collect();
        self.maps.apply.make(&changes);
    }

    fn touch(&self, flows: &[(FlowKey, u32)]) {
        let now_ms = now_ms();
        let changes: Vec<Change> = flows
            .iter()
            .map(|(key, idle_ms)| Change {
                seen_ms: now_ms.saturating_sub(u64::from(*idle_ms)),
                ..Change::new(change::TOUCH, key)
            })
            .collect();
        self.maps.apply.make(&changes);
    }

    fn upsert_cache(&self, records: &[Record]) {
        if !self.caching.load(Ordering::Relaxed) {
            if !self.installed.load(Ordering::Relaxed) {
                // An adopted plan, which says that there is no cache, stays in force until the first of our own.
                return;
            }
            self.caching.store(true, Ordering::Relaxed);
            if let Err(error) = self.write() {
                tracing::error!(%error, "the kernel was not told that there is a cache");
                self.caching.store(false, Ordering::Relaxed);
                return;
            }
        }
        let now_ms = now_ms();
        let names = read(&self.names);
        for record in records {
            let Some(backend) = names.number(&record.backend) else { continue };
            if self.maps.entry(&record.key).is_some() {
                continue;
            }
            let current = self.maps.cache.get(&record.key).ok().flatten();
            if current.is_none_or(|current| is_replaced(&current, names.name(current.backend), record)) {
                let _ = self.maps.cache.put(&record.key, &entry_of(record, backend, now_ms));
            }
        }
    }

    fn remove_cache(&self, keys: &[FlowKey]) {
        for key in keys {
            self.maps.delete(Kind::Cached, key);
        }
    }

    fn flush_cache(&self) -> Vec<Record> {
        let now_ms = now_ms();
        let names = read(&self.names);
        let mut found = HashMap::new();
        let _ = self.maps.cache.each(&mut |key, entry| {
            found.insert(*key, *entry);
        });
        let mut records = Vec::with_capacity(found.len());
        for (key, entry) in found {
            self.maps.delete(Kind::Cached, &key);
            records.extend(self.record(&names, &key, &entry, now_ms));
        }
        records
    }

    fn get(&self, key: &FlowKey) -> Option<Record> {
        let names = read(&self.names);
        let (entry, _) = self.maps.entry(key).filter(|(entry, _)| is_told(entry))?;
        self.record(&names, key, &entry, now_ms())
    }

    fn visit(&self, rows: &RowSet, show: &mut dyn FnMut(&Record)) {
        let plan = self.engine.plan();
        let names = read(&self.names);
        let now_ms = now_ms();
        for (_, table) in self.maps.tables().into_iter().filter(|(kind, _)| *kind != Kind::Cached) {
            let read = table.each(&mut |key, entry| {
                let row = plan.plan.row_function.row_of(key, flow_hash(plan.plan.seed, key));
                if is_told(entry)
                    && rows.contains(row)
                    && let Some(record) = self.record(&names, key, entry, now_ms)
                {
                    show(&record);
                }
            });
            if let Err(error) = read {
                tracing::error!(%error, "the flow table cannot be read");
            }
        }
    }

    fn poll_events(&self, events: &mut Vec<FlowEvent>, limit: usize) -> bool {
        let before = events.len();
        self.find_expired(events);
        let names = read(&self.names);
        let mut told = lock(&self.events);
        let now_ms = now_ms();
        while events.len() - before < limit {
            let Some(event) = told.next(&mut lock(&self.echoes)) else { return false };
            if let (Some(kind), Some(record)) =
                (kind_of(event.kind), self.record(&names, &event.key, &event.entry, now_ms))
            {
                events.push(FlowEvent { kind, at_once: event.at_once != 0, record });
            }
        }
        true
    }

    fn send_echo(&self, to: MemberSlot, token: u64) -> Result<(), SendError> {
        let frame = rewrite::echo_frame(&self.engine.batch(), to, token)?;
        Ok(self.frames.send(frame.interface, &frame.bytes)?)
    }

    fn poll_echoes(&self, tokens: &mut Vec<u64>) {
        let mut told = lock(&self.events);
        let mut echoes = lock(&self.echoes);
        told.find_echoes(&mut echoes);
        tokens.append(&mut echoes);
    }

    fn send_probe(&self, backend: &BackendId, ip_packet: &[u8]) -> Result<(), SendError> {
        let frame = rewrite::probe_frame(&self.engine.batch(), backend, ip_packet)?;
        Ok(self.frames.send(frame.interface, &frame.bytes)?)
    }

    /// Nothing waits here: the kernel processes a packet when it comes.
    fn discard_backlog(&self) {}

    /// The program runs whenever a packet comes; whether packets come is for the echoes between members to show.
    fn idle_for(&self) -> Duration {
        Duration::ZERO
    }

    fn counters(&self) -> Counters {
        let mut counters = self.engine.read_counters();
        for cpu in self.maps.counters.per_cpu(self.cpus).unwrap_or_default() {
            for (sum, value) in counters.outcomes.iter_mut().zip(cpu.outcomes) {
                *sum += value;
            }
            for (sum, value) in counters.drops.iter_mut().zip(cpu.drops) {
                *sum += value;
            }
            counters.handoffs_in += cpu.handoffs_in;
            counters.table_full += cpu.table_full;
            counters.events_lost += cpu.events_lost;
            counters.fib_lookups += cpu.fib_lookups;
            counters.other_host += cpu.other_host;
            counters.punted += cpu.punted;
            counters.half_open_evicted += cpu.half_open_evicted;
            counters.drops[Reason::RingFull as usize] += cpu.punts_lost;
            counters.drops[Reason::Transmit as usize] += cpu.faults;
        }
        counters.table_full += self.table_full.load(Ordering::Relaxed);
        let counted = self.counted();
        counters.flows = counted.flows;
        counters.half_open = counted.half_open;
        counters.cached = counted.cached;
        counters
    }
}
