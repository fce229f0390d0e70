//! A forwarder in the kernel: the whole decision as an XDP program, for IPv4 and IPv6.
//!
//! ```text
//!  daemon ── install, next hops ──► Writer ──► maps: two plans, one word says which ──┐
//!         ── lease, upsert, stamp ───────────► maps, phalanx_apply ──────────────────┐│
//!         ◄─ events ─────────────────────────── ring ◄── phalanx_record ◄── phalanx ◄┴┴─ packets
//!         ◄─ too big, TTL, handed-off pings ─── ring ◄── phalanx_punt
//! ```
//! The flow table is a map of the kernel's. With a pin directory it outlives the process, and so do the programs: a daemon that was
//! killed and comes back adopts both.
//!
//! Invariant: `crates/flow` decides, in the kernel as everywhere; this crate puts tables where the program reads them.

pub mod abi;
mod apply;
mod error;
mod events;
mod forward;
mod half_open;
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
mod scan;
pub mod sets;
mod writer;

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};
use std::thread::JoinHandle;

use phalanx_flow::decide::DropReason;
use phalanx_flow::{BackendId, FlowEntry, FlowKey};
use phalanx_forwarder::engine::{Engine, TableLimits};
use phalanx_forwarder::{Drop as Reason, InstallError, Plan};
use phalanx_netlink::FrameSender;

use abi::drops;
pub use error::StartError;
use events::Events;
use macs::OwnMacs;
use maps::{Flows, Kind, Maps, now_ms};
pub use occupant::program_id as attached_program;
pub use pass::attach_pass;
pub use pins::{detach, pinned_entries, usual_directory};
use run::run;
use scan::{Counted, Scan};
use writer::{Names, Site, Writer};

/// Blocks of the table of slots beyond those of three times the services at the start (in force, as it was earlier, and next): room for services that a reload adds.
const SPARE_SLOT_BLOCKS: u32 = 8;

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
    frames: Arc<FrameSender>,
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
    punts: Mutex<Option<JoinHandle<()>>>,
    attached: Mutex<Option<pins::Attached>>,
}

/// What an earlier process left, and this one goes on with.
#[derive(Clone, Debug)]
pub struct Adopted {
    /// What it remembered last ([`phalanx_forwarder::Forwarder::remember`]); empty if nothing.
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

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn read<T>(lock: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}

impl XdpForwarder {
    /// Loads the programs, or adopts what is pinned, and attaches them.
    ///
    /// What was adopted goes on by its old plan until the first [`phalanx_forwarder::Forwarder::install`]; else `plan` is in force from the start.
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
        let slot_blocks = plan.services.len() as u32 * 3 + SPARE_SLOT_BLOCKS;
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
        let seed = engine.plan().plan.seed;
        let maps = Maps::open(&loaded.ebpf, seed).map_err(|error| StartError::system("open maps", error))?;
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
            if header.seed == seed.0 {
                (writer, names) = (old_writer, old_names);
                caching = header.caching != 0;
                adopted = Some(Adopted {
                    note: note.as_ref().and_then(|note| note.read().ok()).unwrap_or_default(),
                    backends: names.all().to_vec(),
                });
            } else {
                tracing::warn!("the pinned tables are of another hash seed: their flows are forgotten");
                for (kind, table) in maps.tables() {
                    clear(&maps, kind, table);
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
        let frames = FrameSender::open()
            .map_err(|error| StartError::system("open a packet socket to send on", error))?;
        let frames = Arc::new(frames);
        let entry = entry(&attached).map_err(|error| StartError::system("open the program", error))?;
        let worker = punts::Worker {
            ring: punts,
            entry,
            maps: Arc::clone(&maps),
            engine: Arc::clone(&engine),
            names: Arc::clone(&names),
            macs: Arc::clone(&macs),
            frames: Arc::clone(&frames),
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
            frames,
            caching: AtomicBool::new(caching),
            installed: AtomicBool::new(adopted.is_none()),
            events: Mutex::new(Events::new(events)),
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
            punts: Mutex::new(Some(punts)),
            attached: Mutex::new(Some(attached)),
        })
    }

    /// What was adopted of an earlier process; its plan stays in force until the first [`phalanx_forwarder::Forwarder::install`].
    pub fn adopted(&self) -> Option<&Adopted> {
        self.adopted.as_ref()
    }

    /// Shows what the table of half-open flows has, in no order and without a call of the kernel.
    pub fn visit_half_open(&self, show: &mut dyn FnMut(&FlowKey, &FlowEntry)) {
        // It is memory: nothing can fail.
        let _ = self.maps.half_open.each(show);
    }

    /// Runs the program that is attached by `BPF_PROG_TEST_RUN`, as for a frame that came in on `ingress`, one of our interfaces in the
    /// calling thread's namespace: what it returns, and the frame then.
    pub fn test_run(&self, ingress: u32, frame: &[u8]) -> io::Result<(u32, Vec<u8>)> {
        let program = match lock(&self.attached).as_ref() {
            Some(attached) => entry(attached)?,
            None => return Err(io::ErrorKind::NotConnected.into()),
        };
        // `struct xdp_md`: data, data_end, data_meta, ingress_ifindex, rx_queue_index, egress_ifindex.
        let context = [0, frame.len() as u32, 0, ingress, 0, 0].map(u32::to_ne_bytes).concat();
        run(program.as_fd(), frame, Some(&context))
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
}

impl Drop for XdpForwarder {
    fn drop(&mut self) {
        self.shutdown();
    }
}

/// A descriptor of the program that is attached.
fn entry(attached: &pins::Attached) -> io::Result<OwnedFd> {
    attached.program(abi::ENTRY)?.fd().map_err(io::Error::other)?.as_fd().try_clone_to_owned()
}

fn clear(maps: &Maps, kind: Kind, table: &dyn Flows) {
    let mut keys = Vec::new();
    let _ = table.each(&mut |key, _| keys.push(*key));
    for key in keys {
        maps.delete(kind, &key);
    }
}
