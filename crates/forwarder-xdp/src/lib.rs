//! A forwarder in the kernel: the whole decision as an XDP program, for IPv4 and IPv6.
//!
//! ```text
//!  daemon ── install, next hops ──► Writer ──► maps: two plans, one word says which ──┐
//!         ── lease, upsert, stamp ───────────► maps, phalanx_apply ──────────────────┐│
//!         ◄─ events ─────────────────────────── ring ◄── phalanx_decide ◄── phalanx ◄┴┴─ packets
//!         ◄─ too big, TTL, handed-off pings ─── ring ◄── phalanx_punt
//! ```
//! The flow table is a map of the kernel's. With a pin directory it outlives the process, and so do the programs: a daemon that was
//! killed and comes back adopts both.
//!
//! Invariant: `crates/flow` decides, in the kernel as everywhere; this crate puts tables where the program reads them.

pub mod abi;
mod error;
mod macs;
mod map;
mod maps;
mod note;
pub mod object;
mod occupant;
mod pass;
mod pins;
mod punts;
mod run;
mod writer;

use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::IpAddr;
use std::os::fd::AsFd as _;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::thread::JoinHandle;
use std::time::Duration;

use aya::maps::{MapData, RingBuf};
use phalanx_flow::decide::DropReason;
use phalanx_flow::{BackendId, FlowEntry, FlowEvent, FlowEventKind, FlowKey, MemberSlot, Record, flow_hash};
use phalanx_forwarder::engine::entry::{entry_of, is_replaced, life, record_of};
use phalanx_forwarder::engine::{Engine, TableLimits};
use phalanx_forwarder::{
    Counters, Drop as Reason, Forwarder, InstallError, NextHops, Plan, RowSet, SendError, Upserted, rewrite,
};

use abi::{Change, EVENT_ECHO, MAX_CHANGES, RawEvent, change, drops};
pub use error::StartError;
use macs::OwnMacs;
use maps::{Maps, now_ms};
pub use pass::attach_pass;
pub use pins::{detach, usual_directory};
use run::run;
use writer::{Names, Site, Writer};

/// How often the tables are searched for entries whose time is over.
const SCAN_EVERY_MS: u64 = 1_000;
/// Blocks of the table of slots beyond those of twice the services at the start: room for services that a reload adds.
const SPARE_SLOT_BLOCKS: u32 = 8;
/// A count of the flows is used for this long: counting a full table takes tenths of a second.
const COUNT_EVERY_MS: u64 = 1_000;

const _: () = assert!(
    drops::MALFORMED == Reason::Malformed as usize
        && drops::NO_NEXT_HOP == Reason::NoNextHop as usize
        && drops::BAD_COOKIE == Reason::BadCookie as usize
        && drops::BAD_HANDOFF == Reason::BadHandoff as usize
        && drops::FRAGMENT == Reason::Fragment as usize
        && drops::NO_SERVICE == Reason::NoService as usize
        && drops::NOT_JOINED == Reason::NotJoined as usize
        // The program takes these numbers from `flow`.
        && DropReason::NoService as usize == Reason::NoService as usize
        && DropReason::NoBackend as usize == Reason::NoBackend as usize
        && DropReason::Protocol as usize == Reason::Protocol as usize
        && drops::TRANSMIT == Reason::Transmit as usize
);

/// What an [`XdpForwarder`] needs to know before its first plan.
#[derive(Clone, Debug)]
pub struct Config {
    /// The interfaces to receive on. It sends on whatever interface the next hops name.
    pub interfaces: Vec<String>,
    /// Sizes of the tables. They are allocated at the start.
    pub limits: TableLimits,
    /// Our end of the hand-off tunnels: that of the local member in every plan.
    pub data_address: IpAddr,
    /// Where link and maps are pinned, below a BPF file system; one directory a member. `None`: they end with the process.
    pub pins: Option<PathBuf>,
    /// Another object than the one compiled in.
    pub object: Option<PathBuf>,
}

/// A running forwarder. It stops when it is dropped, unless it was told to [leave](Self::leave_attached) things as they are.
pub struct XdpForwarder {
    engine: Arc<Engine>,
    maps: Arc<Maps>,
    names: Arc<RwLock<Names>>,
    writer: Mutex<Writer>,
    macs: Arc<Mutex<OwnMacs>>,
    /// Whether anything was put into the cache, now or by an earlier process: the program does without looking while it is empty.
    caching: AtomicBool,
    /// A plan of ours is in force, and no adopted one.
    installed: AtomicBool,
    events: Mutex<Events>,
    echoes: Mutex<Vec<u64>>,
    scan: Mutex<Scan>,
    counted: Mutex<Counted>,
    cpus: usize,
    adopted: Option<Adopted>,
    note: Option<note::Note>,
    /// Where the daemon does not know a next hop yet, the one that was adopted counts for a while.
    adopted_hops: AdoptedHops,
    stop: Arc<AtomicBool>,
    table_full: AtomicU64,
    half_open_evicted: AtomicU64,
    punts: Mutex<Option<JoinHandle<()>>>,
    attached: Mutex<Option<pins::Attached>>,
}

/// Events of flows that are kept at the most while only echoes are asked for; what is beyond stays in the kernel's ring.
const MAX_WAITING: usize = 1 << 16;

/// What the kernel tells: events of flows and echoes come by one ring.
struct Events {
    ring: RingBuf<MapData>,
    /// Events of flows that were before an echo.
    waiting: VecDeque<RawEvent>,
}

impl Events {
    /// The next event of a flow; what comes before it goes where it belongs.
    fn next(&mut self, echoes: &mut Vec<u64>) -> Option<RawEvent> {
        self.waiting.pop_front().or_else(|| self.read(echoes))
    }

    /// The same out of the ring.
    fn read(&mut self, echoes: &mut Vec<u64>) -> Option<RawEvent> {
        while let Some(item) = self.ring.next() {
            match RawEvent::from_bytes(&item) {
                Some(event) if event.kind == EVENT_ECHO => echoes.push(event.entry.birth),
                Some(event) => return Some(event),
                None => {}
            }
        }
        None
    }

    /// Goes through the ring for the echoes in it.
    fn find_echoes(&mut self, echoes: &mut Vec<u64>) {
        while self.waiting.len() < MAX_WAITING
            && let Some(event) = self.read(echoes)
        {
            self.waiting.push_back(event);
        }
    }
}

/// What an earlier process left, and this one goes on with.
#[derive(Clone, Debug)]
pub struct Adopted {
    /// What it remembered last ([`Forwarder::remember`]); empty if nothing.
    pub note: Vec<u8>,
    /// The backends that its flows may name.
    pub backends: Vec<BackendId>,
}

/// How long an adopted next hop counts that the daemon has not found yet: neighbours answer within milliseconds.
const ADOPTED_HOPS_MS: u64 = 2_000;

#[derive(Debug)]
struct AdoptedHops {
    until_ms: u64,
    /// Those that were not found have been written as unknown.
    given_up: AtomicBool,
}

/// Where the search for entries whose time is over stands.
#[derive(Debug, Default)]
struct Scan {
    table: usize,
    cursor: Option<u32>,
    next_ms: u64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Counted {
    until_ms: u64,
    flows: u64,
    half_open: u64,
    cached: u64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl XdpForwarder {
    /// Loads the programs, or adopts what is pinned, and attaches them.
    ///
    /// What was adopted goes on by its old plan until the first [`Forwarder::install`]; else `plan` is in force from the start.
    pub fn start(config: &Config, plan: Plan) -> Result<Self, StartError> {
        let local = plan.members.get(usize::from(plan.local.0));
        if local.is_some_and(|local| local.address != config.data_address) {
            return Err(StartError::OtherAddress(config.data_address));
        }
        if config.interfaces.is_empty() {
            return Err(StartError::NoInterfaces);
        }
        if config.interfaces.len() > abi::MAX_MACS {
            return Err(StartError::TooManyInterfaces(config.interfaces.len()));
        }
        let slot_blocks = plan.services.len() as u32 * 2 + SPARE_SLOT_BLOCKS;
        let engine = Arc::new(Engine::new(plan, config.limits)?);
        let claimed = config.pins.as_deref().map(pins::claim).transpose()?;
        let (lock, linked) = claimed.map_or((None, false), |(lock, linked)| (Some(lock), linked));
        let started = Self::start_with(config, engine, slot_blocks, lock);
        if started.is_err()
            && !linked
            && let Some(pins) = &config.pins
        {
            // Nothing forwards by what was pinned.
            let _ = pins::remove(pins);
        }
        started
    }

    fn start_with(
        config: &Config,
        engine: Arc<Engine>,
        slot_blocks: u32,
        lock: Option<pins::Lock>,
    ) -> Result<Self, StartError> {
        let mut loaded = object::load(config, slot_blocks, lock)?;
        let maps = Maps::open(&loaded.ebpf).map_err(|error| StartError::system("open maps", error))?;
        let note = match &config.pins {
            Some(pins) => Some(
                note::Note::open(&pins::tables(pins))
                    .map_err(|error| StartError::system("open the note", error))?,
            ),
            None => None,
        };
        let macs = OwnMacs::read(&config.interfaces)?;
        let (mut adopted, mut caching) = (None, false);
        let (mut writer, mut names) = (Writer::new(&maps), Names::default());
        if loaded.adopted {
            let (old_writer, old_names, header) =
                Writer::adopt(&maps).map_err(|error| StartError::system("adopt the tables", error))?;
            if header.seed == engine.plan().plan.seed.0 {
                (writer, names) = (old_writer, old_names);
                caching = header.caching != 0;
                adopted = Some(Adopted {
                    note: note.as_ref().and_then(|note| note.read().ok()).unwrap_or_default(),
                    backends: names.all().to_vec(),
                });
            } else {
                tracing::warn!("the pinned tables are of another hash seed: their flows are forgotten");
                for table in [&maps.flows, &maps.half_open, &maps.cache] {
                    clear(&maps, table);
                }
                writer = old_writer;
            }
        }
        if adopted.is_none() {
            let site = Site { macs: macs.current(), caching: false, keep_hops: false };
            writer.write(&maps, &mut names, &engine.plan(), &engine.next_hops(), site)?;
        }
        let events = maps::ring(&mut loaded.ebpf, "EVENTS")
            .map_err(|error| StartError::system("open events", error))?;
        let punts =
            maps::ring(&mut loaded.ebpf, "PUNTS").map_err(|error| StartError::system("open punts", error))?;
        let attached = pins::attach(config, loaded)?;
        let maps = Arc::new(maps);
        let macs = Arc::new(Mutex::new(macs));
        let names = Arc::new(RwLock::new(names));
        let stop = Arc::new(AtomicBool::new(false));
        let entry = attached
            .program(abi::ENTRY)
            .and_then(|entry| entry.fd().map_err(io::Error::other)?.as_fd().try_clone_to_owned())
            .map_err(|error| StartError::system("open the program", error))?;
        let worker = punts::Worker {
            ring: punts,
            entry,
            maps: Arc::clone(&maps),
            engine: Arc::clone(&engine),
            names: Arc::clone(&names),
            macs: Arc::clone(&macs),
            stop: Arc::clone(&stop),
        };
        let punts = std::thread::Builder::new()
            .name("phalanx-punts".to_owned())
            .spawn(move || worker.run())
            .map_err(|error| StartError::system("start a thread", error))?;
        Ok(Self {
            engine,
            maps,
            names,
            writer: Mutex::new(writer),
            macs,
            caching: AtomicBool::new(caching),
            installed: AtomicBool::new(adopted.is_none()),
            events: Mutex::new(Events { ring: events, waiting: VecDeque::new() }),
            echoes: Mutex::default(),
            scan: Mutex::default(),
            counted: Mutex::default(),
            cpus: aya::util::nr_cpus().map_err(|(_, error)| StartError::system("count CPUs", error))?,
            adopted_hops: AdoptedHops {
                until_ms: adopted.as_ref().map_or(0, |_| now_ms() + ADOPTED_HOPS_MS),
                given_up: AtomicBool::new(adopted.is_none()),
            },
            adopted,
            note,
            stop,
            table_full: AtomicU64::new(0),
            half_open_evicted: AtomicU64::new(0),
            punts: Mutex::new(Some(punts)),
            attached: Mutex::new(Some(attached)),
        })
    }

    /// What was adopted of an earlier process; its plan stays in force until the first [`Forwarder::install`].
    pub fn adopted(&self) -> Option<&Adopted> {
        self.adopted.as_ref()
    }

    /// Runs the program that is attached by `BPF_PROG_TEST_RUN`, as for a frame that came in on `ingress`, one of our interfaces in the
    /// calling thread's namespace: what it returns, and the frame then.
    pub fn test_run(&self, ingress: u32, frame: &[u8]) -> io::Result<(u32, Vec<u8>)> {
        let attached = lock(&self.attached);
        let Some(attached) = attached.as_ref() else { return Err(io::ErrorKind::NotConnected.into()) };
        // `struct xdp_md`: data, data_end, data_meta, ingress_ifindex, rx_queue_index, egress_ifindex.
        let context = [0, frame.len() as u32, 0, ingress, 0, 0].map(u32::to_ne_bytes).concat();
        run(attached.program(abi::ENTRY)?.fd().map_err(io::Error::other)?.as_fd(), frame, Some(&context))
    }

    /// The kernel's number of the program that is attached, by which other programs and tools find it.
    pub fn program_id(&self) -> io::Result<u32> {
        let attached = lock(&self.attached);
        let Some(attached) = attached.as_ref() else { return Err(io::ErrorKind::NotConnected.into()) };
        Ok(attached.program(abi::ENTRY)?.info().map_err(io::Error::other)?.id())
    }

    /// Lets go of the programs, and leaves those that are pinned as they are, with their tables.
    pub fn leave_attached(&self) {
        self.end(pins::Attached::keep);
    }

    /// Detaches the programs and forgets the tables. Again does nothing.
    pub fn shutdown(&self) {
        self.end(pins::Attached::remove);
    }

    fn end(&self, how: fn(pins::Attached)) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = lock(&self.punts).take()
            && thread.join().is_err()
        {
            tracing::error!("the thread for packets from the kernel had panicked");
        }
        if let Some(attached) = lock(&self.attached).take() {
            how(attached);
        }
    }

    fn write(&self) -> Result<(), InstallError> {
        let mut writer = lock(&self.writer);
        let mut names = self.names.write().unwrap_or_else(PoisonError::into_inner);
        let keep_hops = now_ms() < self.adopted_hops.until_ms;
        let caching = self.caching.load(Ordering::Relaxed);
        let site = Site { macs: lock(&self.macs).current(), caching, keep_hops };
        writer.write(&self.maps, &mut names, &self.engine.plan(), &self.engine.next_hops(), site)
    }

    /// Has the kernel make changes of flows; which of them were made.
    fn change(&self, changes: &[Change]) -> Vec<bool> {
        let mut made = Vec::with_capacity(changes.len());
        let attached = lock(&self.attached);
        let apply =
            attached.as_ref().ok_or(io::ErrorKind::NotConnected.into()).and_then(|it| it.program(abi::APPLY));
        for changes in changes.chunks(MAX_CHANGES) {
            let mut bytes = Vec::with_capacity(size_of_val(changes));
            for change in changes {
                bytes.extend_from_slice(&change.to_bytes());
            }
            let answer = match &apply {
                Ok(program) => program
                    .fd()
                    .map_err(io::Error::other)
                    .and_then(|program| run(program.as_fd(), &bytes, None)),
                Err(error) => Err(error.kind().into()),
            };
            match answer {
                Ok((_, answer)) => {
                    made.extend(answer.chunks_exact(size_of::<Change>()).map(|change| change[40] == 1))
                }
                Err(error) => {
                    tracing::error!(%error, "the kernel makes no changes of flows");
                    made.extend(changes.iter().map(|_| false));
                }
            }
        }
        made
    }

    fn record(&self, names: &Names, key: &FlowKey, entry: &FlowEntry, now_ms: u64) -> Option<Record> {
        Some(record_of(key, entry, names.name(entry.backend)?, now_ms))
    }

    fn upsert_one(&self, names: &Names, record: &Record, now_ms: u64) -> Upserted {
        let Some(backend) = names.number(&record.backend) else { return Upserted::UnknownBackend };
        let mut entry = entry_of(record, backend, now_ms);
        let known = self.maps.entry(&record.key);
        if let Some((current, _)) = &known {
            if !is_replaced(current, names.name(current.backend), record) {
                return Upserted::Stale;
            }
            entry.last_seen_ms = entry.last_seen_ms.max(current.last_seen_ms);
        }
        let _ = self.maps.cache.delete(&record.key);
        if self.maps.put(&record.key, &entry, known.map(|(_, established)| established)) {
            Upserted::Applied
        } else {
            self.table_full.fetch_add(1, Ordering::Relaxed);
            Upserted::Full
        }
    }

    /// Searches a share of the tables for entries whose time is over.
    fn find_expired(&self, events: &mut Vec<FlowEvent>) {
        let mut scan = lock(&self.scan);
        let now_ms = now_ms();
        if now_ms < scan.next_ms {
            return;
        }
        let plan = self.engine.plan();
        let names = self.names.read().unwrap_or_else(PoisonError::into_inner);
        let table = [&self.maps.flows, &self.maps.half_open, &self.maps.cache][scan.table];
        let cached = scan.table == 2;
        let mut over = Vec::new();
        let next = table.batch(scan.cursor, &mut |key, entry| {
            let life = match cached {
                true => plan.service_of(key).map_or(Duration::ZERO, |service| service.idle),
                false => life(&plan, key, entry),
            };
            if now_ms.saturating_sub(entry.last_seen_ms) > life.as_millis() as u64 {
                over.push((*key, *entry));
            }
        });
        for (key, entry) in over {
            if cached {
                let _ = table.delete(&key);
            } else if let Some(record) = self.record(&names, &key, &entry, now_ms) {
                events.push(FlowEvent { kind: FlowEventKind::Expired, at_once: false, record });
            } else {
                self.maps.delete(table, &key);
            }
        }
        scan.cursor = next.unwrap_or(None);
        if scan.cursor.is_none() {
            scan.table = (scan.table + 1) % 3;
            if scan.table == 0 {
                scan.next_ms = now_ms + SCAN_EVERY_MS;
            }
        }
    }

    fn counted(&self) -> Counted {
        let mut counted = lock(&self.counted);
        let now_ms = now_ms();
        if now_ms >= counted.until_ms {
            let count = |table: &map::Map<FlowKey, FlowEntry>| {
                let mut count = 0_u64;
                let _ = table.each(&mut |_, _| count += 1);
                count
            };
            *counted = Counted {
                flows: count(&self.maps.flows),
                half_open: count(&self.maps.half_open),
                cached: count(&self.maps.cache),
                until_ms: 0,
            };
            // A small table is counted each time.
            if counted.flows + counted.half_open + counted.cached > 10_000 {
                counted.until_ms = now_ms + COUNT_EVERY_MS;
            }
        }
        *counted
    }
}

impl Drop for XdpForwarder {
    fn drop(&mut self) {
        self.shutdown();
    }
}

fn clear(maps: &Maps, table: &map::Map<FlowKey, FlowEntry>) {
    let mut keys = Vec::new();
    let _ = table.each(&mut |key, _| keys.push(*key));
    for key in keys {
        maps.delete(table, &key);
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
        let names = self.names.read().unwrap_or_else(PoisonError::into_inner);
        records.iter().map(|record| self.upsert_one(&names, record, now_ms)).collect()
    }

    fn remove(&self, key: &FlowKey, birth: u64, min_idle: Duration) -> bool {
        let seen_ms = now_ms().saturating_sub(min_idle.as_millis() as u64);
        self.change(&[Change { key: *key, what: change::REMOVE, update: 0, birth, seen_ms }]) == [true]
    }

    fn stamp(&self, key: &FlowKey, birth: u64) -> bool {
        self.change(&[Change { key: *key, what: change::STAMP, update: 0, birth, seen_ms: 0 }]) == [true]
    }

    fn protect(&self, key: &FlowKey, birth: u64, update: u32) {
        self.change(&[Change { key: *key, what: change::PROTECT, update, birth, seen_ms: 0 }]);
    }

    fn touch(&self, flows: &[(FlowKey, u32)]) {
        let now_ms = now_ms();
        let changes: Vec<Change> = flows
            .iter()
            .map(|(key, idle_ms)| Change {
                key: *key,
                what: change::TOUCH,
                update: 0,
                birth: 0,
                seen_ms: now_ms.saturating_sub(u64::from(*idle_ms)),
            })
            .collect();
        self.change(&changes);
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
        let names = self.names.read().unwrap_or_else(PoisonError::into_inner);
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
            let _ = self.maps.cache.delete(key);
        }
    }

    fn flush_cache(&self) -> Vec<Record> {
        let now_ms = now_ms();
        let names = self.names.read().unwrap_or_else(PoisonError::into_inner);
        let mut found = HashMap::new();
        let _ = self.maps.cache.each(&mut |key, entry| {
            found.insert(*key, *entry);
        });
        let mut records = Vec::with_capacity(found.len());
        for (key, entry) in found {
            let _ = self.maps.cache.delete(&key);
            records.extend(self.record(&names, &key, &entry, now_ms));
        }
        records
    }

    fn get(&self, key: &FlowKey) -> Option<Record> {
        let names = self.names.read().unwrap_or_else(PoisonError::into_inner);
        let (entry, _) = self.maps.entry(key)?;
        self.record(&names, key, &entry, now_ms())
    }

    fn visit(&self, rows: &RowSet, show: &mut dyn FnMut(&Record)) {
        let plan = self.engine.plan();
        let names = self.names.read().unwrap_or_else(PoisonError::into_inner);
        let now_ms = now_ms();
        for table in [&self.maps.flows, &self.maps.half_open] {
            let read = table.each(&mut |key, entry| {
                let row = plan.plan.row_function.row_of(key, flow_hash(plan.plan.seed, key));
                if rows.contains(row)
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
        let names = self.names.read().unwrap_or_else(PoisonError::into_inner);
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
        Ok(punts::send_frame(frame.interface, &frame.bytes)?)
    }

    fn poll_echoes(&self, tokens: &mut Vec<u64>) {
        let mut told = lock(&self.events);
        let mut echoes = lock(&self.echoes);
        told.find_echoes(&mut echoes);
        tokens.append(&mut echoes);
    }

    fn send_probe(&self, backend: &BackendId, ip_packet: &[u8]) -> Result<(), SendError> {
        let frame = rewrite::probe_frame(&self.engine.batch(), backend, ip_packet)?;
        Ok(punts::send_frame(frame.interface, &frame.bytes)?)
    }

    /// Nothing waits here: the kernel processes a packet when it comes.
    fn discard_backlog(&self) {}

    /// The program runs whenever a packet comes; whether packets come is for the echoes between members to show.
    fn idle_for(&self) -> Duration {
        Duration::ZERO
    }

    fn counters(&self) -> Counters {
        let mut counters = self.engine.read_counters();
        // What went in and neither came out nor is there was pushed out.
        let mut half_open = self.maps.half_open_balance.load(Ordering::Relaxed);
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
            half_open += cpu.half_open_in.cast_signed() - cpu.half_open_out.cast_signed();
            counters.drops[Reason::RingFull as usize] += cpu.punts_lost;
            counters.drops[Reason::Transmit as usize] += cpu.faults;
        }
        counters.table_full += self.table_full.load(Ordering::Relaxed);
        let counted = self.counted();
        counters.flows = counted.flows;
        counters.half_open = counted.half_open;
        counters.cached = counted.cached;
        // Counting takes time, in which flows come and go: so it is never taken back.
        let evicted = (half_open - counted.half_open.cast_signed()).max(0).cast_unsigned();
        counters.half_open_evicted =
            self.half_open_evicted.fetch_max(evicted, Ordering::Relaxed).max(evicted);
        counters
    }
}

fn kind_of(number: u8) -> Option<FlowEventKind> {
    [
        FlowEventKind::New,
        FlowEventKind::Changed,
        FlowEventKind::Touched,
        FlowEventKind::Cached,
        FlowEventKind::Hint,
        FlowEventKind::Expired,
    ]
    .into_iter()
    .find(|kind| *kind as u8 == number)
}
