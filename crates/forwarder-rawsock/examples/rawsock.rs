//! Packets per second of the raw-socket forwarder beside one that decides nothing, in the same run (`cargo xtask bench rawsock`).
//!
//! ```text
//!   generator ─┬─ out0 ══ in0 ─ reference (rewrites MACs only) ─ to0 ══ sink0 ─┬─ counted and dropped
//!    (CPU 0)   └─ out1 ══ in1 ─ RawsockForwarder ─────────────── to1 ══ sink1 ─┘
//!                              (both on CPU 1, by turns)
//! ```
//! Three network namespaces without names, which go with the process. Both forwarders have a `TPACKET_V3` ring of the same size, send
//! by `sendmmsg` from where frames lie, and have a drop on tc ingress, so that the difference is what a decision costs.
//! What arrives at the sink counts.
//!
//! Two processors are not enough to offer more than the reference takes: what sends and receives in the kernel costs the generator as
//! much as the reference. So a gate (a thread of a higher class that spins on CPU 1) keeps the forwarder from running until its ring is
//! full, and the ring does not run empty while packets are counted. The share of the window that the forwarding thread ran says so.

use std::error::Error;
use std::fs::File;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use phalanx_flow::hash::RowFunction;
use phalanx_flow::member::Liveness;
use phalanx_flow::row::RANKS;
use phalanx_flow::{BackendId, BackendIndex, FlowSeed, MemberId, MemberSlot, Method, Row};
use phalanx_forwarder::plan::SLOTS;
use phalanx_forwarder::{
    Forwarder as _, Handoff, NextHop, NextHops, Plan, PlanBackend, PlanMember, PlanService,
};
use phalanx_forwarder_rawsock::{Config, RawsockForwarder};
use phalanx_netlink::{Address, BpfFilter, BpfInstruction, Mac, Netlink, Veth};

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// The target of the ratio's median (design, "Measured bars").
const TARGET: f64 = 0.8;

/// Rounds unless told otherwise; each measures both forwarders.
const ROUNDS: usize = 24;

/// How long the generator has for filling a ring of 8 MB (50,000 frames of the reference), how long the forwarder runs before
/// counting starts, and how long is counted.
const FILL: Duration = Duration::from_millis(200);
const SETTLE: Duration = Duration::from_millis(5);
const WINDOW: Duration = Duration::from_millis(150);

/// A forwarding thread that ran for less than this share of the window had nothing to do for a while, or was kept from running.
const BUSY: f64 = 0.97;

/// How long the flow table may take to fill.
const PATIENCE: Duration = Duration::from_secs(30);

/// Frames are as short as Ethernet's (without FCS), of this many flows.
const FRAME_BYTES: usize = 64;
const FLOWS: usize = 1 << 16;

/// Frames per `sendmmsg`.
const BATCH: usize = 64;

/// Blocks of the reference's ring, and their number: the same ring as the forwarder's.
const BLOCK_BYTES: usize = 256 << 10;
const BLOCKS: usize = Config::DEFAULT_RING_BYTES / BLOCK_BYTES;

const VIP: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
const PORT: u16 = 9;
const MEMBER: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1));
const HANDOFF_PORT: u16 = 6081;

/// The generator's choice: a path, or silence.
const SILENT: usize = 2;

fn main() -> Result<()> {
    let rounds = match std::env::args().nth(1) {
        Some(count) => count.parse()?,
        None => ROUNDS,
    };
    if thread::available_parallelism()?.get() < 2 {
        return Err("this benchmark needs two processors: one offers, one forwards".into());
    }
    let [offering, forwarding, sinking] = [new_namespace()?, new_namespace()?, new_namespace()?];

    enter(&forwarding)?;
    let mut netlink = Netlink::open()?;
    let paths = [lay(&mut netlink, 0, &offering, &sinking)?, lay(&mut netlink, 1, &offering, &sinking)?];
    netlink.add_address(&Address { index: paths[1].ingress, address: MEMBER, prefix: 24 })?;
    drop_all(&mut netlink, paths[0].ingress)?;

    let load = Arc::new(Load {
        path: AtomicUsize::new(SILENT),
        sent: AtomicU64::new(0),
        shut: AtomicBool::new(false),
        stop: AtomicBool::new(false),
    });
    let generator = {
        let load = Arc::clone(&load);
        let interfaces = paths.each_ref().map(|path| path.origin);
        let macs = paths.each_ref().map(|path| path.ingress_mac);
        thread::spawn(move || -> Result<()> {
            enter(&offering)?;
            pin(0)?;
            generate(&load, interfaces, macs)
        })
    };
    // Threads started from here on inherit the processor.
    pin(1)?;
    let forwarder = start_forwarder(&paths[1])?;
    let reference_thread = Arc::new(AtomicU32::new(0));
    let reference = {
        let (load, number) = (Arc::clone(&load), Arc::clone(&reference_thread));
        let (ingress, egress) = (paths[0].ingress, paths[0].egress);
        let macs = (paths[0].egress_mac, paths[0].sink_mac);
        thread::spawn(move || -> Result<()> {
            number.store(thread_number(), Ordering::Release);
            forward_without_deciding(&load, ingress, egress, macs)
        })
    };
    let gate = {
        let load = Arc::clone(&load);
        thread::spawn(move || keep_gate(&load))
    };
    // This thread only sleeps and reads: beside the generator, and in the namespace whose counters it reads.
    pin(0)?;
    enter(&sinking)?;
    let mut netlink = Netlink::open()?;
    for path in &paths {
        drop_all(&mut netlink, path.sink)?;
    }
    thread::sleep(Duration::from_millis(100));
    let clocks = [reference_thread.load(Ordering::Acquire), thread_named("phalanx-rx-0")?];

    // Every flow is in the table before counting starts: a flow counts as one from its second packet on.
    let begin = Instant::now();
    while forwarder.counters().flows < FLOWS as u64 && begin.elapsed() < PATIENCE {
        load.measure(1, clocks[1], WINDOW)?;
        forget_events(&forwarder);
    }
    let mut measured = [Vec::new(), Vec::new()];
    for round in 0..rounds {
        // Who goes first changes, so that neither gains from a drift.
        for path in [round % 2, 1 - round % 2] {
            measured[path].push(load.measure(path, clocks[path], WINDOW)?);
        }
        forget_events(&forwarder);
    }
    load.stop.store(true, Ordering::Relaxed);
    generator.join().map_err(|_| "the generator panicked")??;
    reference.join().map_err(|_| "the reference panicked")??;
    gate.join().map_err(|_| "the gate panicked")??;
    report(&measured, &forwarder);
    Ok(())
}

/// One measurement of one forwarder.
#[derive(Clone, Copy, Debug)]
struct Measured {
    /// Packets per second that arrived at the sink, and that the generator sent.
    forwarded: f64,
    offered: f64,
    /// Nanoseconds that the forwarding thread ran for each of the former, and its share of the time.
    nanoseconds: f64,
    busy: f64,
}

fn report(measured: &[Vec<Measured>; 2], forwarder: &RawsockForwarder) {
    for (name, rounds) in ["reference", "forwarder"].iter().zip(measured) {
        println!(
            "{name}: forwarded {} k packets/s, offered {}, thread time {} ns/packet, of all time {}",
            spread(rounds.iter().map(|round| round.forwarded / 1e3), 0),
            spread(rounds.iter().map(|round| round.offered / 1e3), 0),
            spread(rounds.iter().map(|round| round.nanoseconds), 0),
            spread(rounds.iter().map(|round| round.busy), 2),
        );
    }
    let pairs = || measured[1].iter().zip(&measured[0]);
    let ratio = spread(pairs().map(|(ours, reference)| ours.forwarded / reference.forwarded), 2);
    let work = spread(pairs().map(|(ours, reference)| reference.nanoseconds / ours.nanoseconds), 2);
    println!("forwarded, forwarder / reference, {} rounds: {ratio}; target {TARGET}", measured[0].len());
    println!("packets per second of thread time, forwarder / reference: {work}");
    println!("(median, and the range of all rounds)");
    let counters = forwarder.counters();
    println!("the forwarder's counters: {counters:?}");
    let idle = measured.iter().flatten().filter(|round| round.busy < BUSY).count();
    if idle > 0 {
        println!(
            "NOTE: in {idle} of {} measurements the forwarding thread did not run all the time: it was out of work, or other processes ran",
            2 * measured[0].len()
        );
    }
}

/// The median, and the range.
fn spread(values: impl Iterator<Item = f64>, digits: usize) -> String {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    match values.as_slice() {
        [] => "nothing".to_owned(),
        [least, ..] => {
            let (median, most) = (values[values.len() / 2], values[values.len() - 1]);
            format!("{median:.digits$} ({least:.digits$} to {most:.digits$})")
        }
    }
}

/// What the generator is told, and what it did.
#[derive(Debug)]
struct Load {
    path: AtomicUsize,
    sent: AtomicU64,
    /// Forwarders do not run.
    shut: AtomicBool,
    stop: AtomicBool,
}

impl Load {
    /// Loads one path for a while; `clock` is the number of its forwarding thread.
    fn measure(&self, path: usize, clock: u32, window: Duration) -> Result<Measured> {
        let sink = format!("sink{path}");
        self.shut.store(true, Ordering::Relaxed);
        self.path.store(path, Ordering::Relaxed);
        thread::sleep(FILL);
        self.shut.store(false, Ordering::Relaxed);
        thread::sleep(SETTLE);
        let read = || -> Result<_> {
            Ok((Instant::now(), received(&sink)?, self.sent.load(Ordering::Relaxed), thread_time(clock)?))
        };
        let (t0, received0, sent0, ran0) = read()?;
        thread::sleep(window);
        let (t1, received1, sent1, ran1) = read()?;
        self.path.store(SILENT, Ordering::Relaxed);
        // The ring runs empty before the other one's turn.
        thread::sleep(Duration::from_millis(60));
        let seconds = (t1 - t0).as_secs_f64();
        let arrived = (received1 - received0) as f64;
        let ran = ran1 - ran0;
        Ok(Measured {
            forwarded: arrived / seconds,
            offered: (sent1 - sent0) as f64 / seconds,
            nanoseconds: ran.as_nanos() as f64 / arrived,
            busy: ran.as_secs_f64() / seconds,
        })
    }
}

/// One way from the generator to the sink.
#[derive(Debug)]
struct Path {
    origin: u32,
    ingress: u32,
    ingress_mac: [u8; 6],
    egress: u32,
    egress_mac: [u8; 6],
    sink: u32,
    sink_mac: [u8; 6],
}

/// Lays a path through the calling thread's namespace.
fn lay(netlink: &mut Netlink, number: u8, offering: &OwnedFd, sinking: &OwnedFd) -> Result<Path> {
    let mac = |place| [2, 0, 0, 0, number, place];
    let names = ["in", "out", "to", "sink"].map(|name| format!("{name}{number}"));
    let [inside, outside, to, sink] = names.each_ref().map(String::as_str);
    for (name, peer, place, netns) in [(inside, outside, 1, offering), (to, sink, 3, sinking)] {
        let (own, other) = (mac(place), mac(place + 1));
        netlink.create_veth(&Veth {
            name,
            peer,
            peer_netns: Some(netns.as_fd()),
            mtu: None,
            mac: Some(Mac(own)),
            peer_mac: Some(Mac(other)),
        })?;
    }
    // The other ends are asked for where they are.
    let up_there = |netns: &OwnedFd, name: &str| -> Result<u32> {
        thread::scope(|scope| {
            let there = scope.spawn(|| -> Result<u32> {
                enter(netns)?;
                let mut netlink = Netlink::open()?;
                let index = netlink.link(name)?.index;
                netlink.set_up(index)?;
                Ok(index)
            });
            there.join().map_err(|_| "a thread panicked")?
        })
    };
    let (origin, sink) = (up_there(offering, outside)?, up_there(sinking, sink)?);
    let (ingress, egress) = (netlink.link(inside)?.index, netlink.link(to)?.index);
    netlink.set_up(ingress)?;
    netlink.set_up(egress)?;
    Ok(Path { origin, ingress, ingress_mac: mac(1), egress, egress_mac: mac(3), sink, sink_mac: mac(4) })
}

/// Drops all that an interface receives before the kernel's own stack works on it.
fn drop_all(netlink: &mut Netlink, index: u32) -> Result<()> {
    netlink.ensure_clsact(index)?;
    // `return TC_ACT_SHOT`.
    let program = vec![BpfInstruction { code: 0x06, jt: 0, jf: 0, k: 2 }];
    Ok(netlink.add_bpf_filter(&BpfFilter { index, priority: 1, handle: 1, program })?)
}

/// The forwarder under test: one member, one service, one backend in its segment.
fn start_forwarder(path: &Path) -> Result<RawsockForwarder> {
    let row_function = RowFunction::Rendezvous { mask: 255 };
    let mut ranks = [MemberSlot::NONE; RANKS];
    ranks[0] = MemberSlot(0);
    let life = Duration::from_secs(600);
    let plan = Plan {
        local: MemberSlot(0),
        seed: FlowSeed([1, 2]),
        row_function,
        members: vec![PlanMember { id: MemberId(1), address: MEMBER, liveness: Liveness::Alive }],
        rows: vec![Row { ranks, flags: 0 }; row_function.row_count() as usize].into(),
        previous: None,
        view_digest: 1,
        handoff: Handoff { port: HANDOFF_PORT, cookie: 1, old_cookie: None, fragment: false },
        services: vec![PlanService {
            address: VIP.into(),
            port: PORT,
            protocol: 17,
            slots: vec![BackendIndex(0); SLOTS].into(),
            earlier: None,
            unsettled: None,
            failed: [].into(),
            idle: life,
            linger: life,
            reset_linger: life,
            half_open: life,
            replicate_syn: false,
            fragment: false,
        }],
        backends: vec![PlanBackend {
            id: BackendId::new(IpAddr::V4(Ipv4Addr::new(10, 0, 0, 2)), Method::L2, 0),
            source: MEMBER,
        }],
    };
    let forwarder = RawsockForwarder::start(&Config::new(vec!["in1".to_owned()], MEMBER), plan)?;
    forwarder.set_next_hops(NextHops {
        members: vec![None],
        backends: vec![Some(NextHop {
            interface: path.egress,
            source_mac: path.egress_mac,
            destination_mac: path.sink_mac,
            mtu: 1500,
        })],
    });
    forwarder.renew_lease(life);
    Ok(forwarder)
}

/// Takes what the daemon would take, so that events do not pile up.
fn forget_events(forwarder: &RawsockForwarder) {
    let mut events = Vec::new();
    while forwarder.poll_events(&mut events, 1 << 16) {
        events.clear();
    }
}

/// Keeps the processor of the forwarders to itself while the gate is shut.
fn keep_gate(load: &Load) -> Result<()> {
    let priority = libc::sched_param { sched_priority: 1 };
    // SAFETY: the pointer is that of `priority`; 0 is the calling thread.
    succeeded(unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const priority) })?;
    while !load.stop.load(Ordering::Relaxed) {
        if load.shut.load(Ordering::Relaxed) {
            std::hint::spin_loop();
        } else {
            thread::sleep(Duration::from_millis(1));
        }
    }
    Ok(())
}

/// Sends frames of all flows, round and round, as fast as the kernel takes them.
fn generate(load: &Load, interfaces: [u32; 2], macs: [[u8; 6]; 2]) -> Result<()> {
    let frames = macs.map(|mac| (0..FLOWS).map(|flow| frame(flow, mac)).collect::<Vec<_>>());
    let sockets = [packet_socket(interfaces[0], 0)?, packet_socket(interfaces[1], 0)?];
    let mut batch = Batch::new();
    let mut at = 0;
    while !load.stop.load(Ordering::Relaxed) {
        let path = load.path.load(Ordering::Relaxed);
        if path == SILENT {
            thread::sleep(Duration::from_millis(1));
            continue;
        }
        for frame in &frames[path][at..at + BATCH] {
            batch.push(frame.as_ptr(), FRAME_BYTES);
        }
        at = (at + BATCH) % FLOWS;
        // SAFETY: the frames live as long as this function.
        let sent = unsafe { batch.send(&sockets[path]) };
        load.sent.fetch_add(sent, Ordering::Relaxed);
    }
    Ok(())
}

/// A UDP datagram of one of the flows to the service. Neighbours in time differ in all bits of their source.
fn frame(flow: usize, to: [u8; 6]) -> [u8; FRAME_BYTES] {
    let mixed = (flow as u32).wrapping_mul(0x9e37_79b1);
    let length = (FRAME_BYTES - 14) as u16;
    let mut frame = [0; FRAME_BYTES];
    frame[..6].copy_from_slice(&to);
    frame[6..12].copy_from_slice(&[2, 0, 0, 0, 9, 9]);
    frame[12..16].copy_from_slice(&[8, 0, 0x45, 0]);
    frame[16..18].copy_from_slice(&length.to_be_bytes());
    frame[22..24].copy_from_slice(&[64, 17]);
    frame[26..30].copy_from_slice(&[198, 18, (mixed >> 24) as u8, (mixed >> 16) as u8]);
    frame[30..34].copy_from_slice(&VIP.octets());
    let sum: u32 =
        frame[14..34].as_chunks::<2>().0.iter().map(|word| u32::from(u16::from_be_bytes(*word))).sum();
    let sum = (sum & 0xffff) + (sum >> 16);
    frame[24..26].copy_from_slice(&(!(sum as u16)).to_be_bytes());
    frame[34..36].copy_from_slice(&(flow as u16).to_be_bytes());
    frame[36..38].copy_from_slice(&PORT.to_be_bytes());
    frame[38..40].copy_from_slice(&(length - 20).to_be_bytes());
    frame
}

/// The reference: takes frames from a ring, writes two MACs, sends them from where they lie.
fn forward_without_deciding(
    load: &Load,
    ingress: u32,
    egress: u32,
    (from, to): ([u8; 6], [u8; 6]),
) -> Result<()> {
    let sender = packet_socket(egress, 0)?;
    let receiver = packet_socket(0, 0)?;
    set_option(&receiver, libc::PACKET_VERSION, &(libc::tpacket_versions::TPACKET_V3 as libc::c_int))?;
    set_option(&receiver, libc::PACKET_IGNORE_OUTGOING, &1_i32)?;
    let request = libc::tpacket_req3 {
        tp_block_size: BLOCK_BYTES as u32,
        tp_block_nr: BLOCKS as u32,
        tp_frame_size: 2048,
        tp_frame_nr: (BLOCK_BYTES / 2048 * BLOCKS) as u32,
        tp_retire_blk_tov: 1,
        tp_sizeof_priv: 0,
        tp_feature_req_word: 0,
    };
    set_option(&receiver, libc::PACKET_RX_RING, &request)?;
    // SAFETY: a fresh shared mapping of the ring, placed by the kernel; it goes with the process.
    let memory = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            BLOCK_BYTES * BLOCKS,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
            receiver.as_raw_fd(),
            0,
        )
    };
    if memory == libc::MAP_FAILED {
        return Err(io::Error::last_os_error().into());
    }
    bind(&receiver, ingress, libc::ETH_P_ALL as u16)?;
    let mut batch = Batch::new();
    let mut next = 0;
    while !load.stop.load(Ordering::Relaxed) {
        // SAFETY: `next` is below the number of blocks in the mapping, and each starts with a descriptor.
        let block = unsafe { memory.cast::<u8>().add(next * BLOCK_BYTES) };
        // SAFETY: as above; the descriptor's union has this one variant.
        let header = unsafe { &raw mut (*block.cast::<libc::tpacket_block_desc>()).hdr.bh1 };
        // SAFETY: an aligned word that both sides access atomically.
        let status = unsafe { AtomicU32::from_ptr(&raw mut (*header).block_status) };
        if status.load(Ordering::Acquire) & libc::TP_STATUS_USER == 0 {
            let mut polled = libc::pollfd { fd: receiver.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            // SAFETY: one descriptor to poll.
            unsafe { libc::poll(&raw mut polled, 1, 10) };
            continue;
        }
        // SAFETY: the block is ours until its status is written.
        let (count, first) = unsafe { ((*header).num_pkts, (*header).offset_to_first_pkt as usize) };
        let mut offset = first;
        for _ in 0..count {
            // SAFETY: the kernel's own chain of frames within the block.
            let (frame, length, onward) = unsafe {
                let packet = block.add(offset).cast::<libc::tpacket3_hdr>();
                let frame = block.add(offset + usize::from((*packet).tp_mac));
                std::ptr::copy_nonoverlapping(to.as_ptr(), frame, 6);
                std::ptr::copy_nonoverlapping(from.as_ptr(), frame.add(6), 6);
                (frame, (*packet).tp_snaplen as usize, (*packet).tp_next_offset as usize)
            };
            if batch.is_full() {
                // SAFETY: the frames lie in the block, which is still ours.
                unsafe { batch.send(&sender) };
            }
            batch.push(frame, length);
            offset += onward;
        }
        // SAFETY: as above.
        unsafe { batch.send(&sender) };
        status.store(libc::TP_STATUS_KERNEL, Ordering::Release);
        next = (next + 1) % BLOCKS;
    }
    Ok(())
}

/// Frames for one `sendmmsg`.
struct Batch {
    vectors: Box<[libc::iovec; BATCH]>,
    messages: Box<[libc::mmsghdr; BATCH]>,
    waiting: usize,
}

impl Batch {
    fn new() -> Self {
        // SAFETY: all-zero is a valid `iovec`: of length 0.
        let mut vectors: Box<[libc::iovec; BATCH]> = Box::new(unsafe { std::mem::zeroed() });
        // SAFETY: all-zero is a valid `mmsghdr`: without address, data and control.
        let mut messages: Box<[libc::mmsghdr; BATCH]> = Box::new(unsafe { std::mem::zeroed() });
        for (message, vector) in messages.iter_mut().zip(vectors.iter_mut()) {
            message.msg_hdr.msg_iov = vector;
            message.msg_hdr.msg_iovlen = 1;
        }
        Self { vectors, messages, waiting: 0 }
    }

    fn is_full(&self) -> bool {
        self.waiting == BATCH
    }

    fn push(&mut self, start: *const u8, length: usize) {
        self.vectors[self.waiting] = libc::iovec { iov_base: start.cast_mut().cast(), iov_len: length };
        self.waiting += 1;
    }

    /// Sends all and says how many were taken; one that is refused is skipped.
    ///
    /// # Safety
    /// What was pushed is still there.
    unsafe fn send(&mut self, socket: &OwnedFd) -> u64 {
        let (mut at, mut taken) = (0, 0);
        while at < self.waiting {
            let left = &mut self.messages[at..self.waiting];
            // SAFETY: every message points to its vector, and every vector to bytes that are still there.
            let sent = unsafe { libc::sendmmsg(socket.as_raw_fd(), left.as_mut_ptr(), left.len() as u32, 0) };
            match usize::try_from(sent) {
                Ok(sent) => {
                    at += sent;
                    taken += sent as u64;
                }
                Err(_) => at += 1,
            }
        }
        self.waiting = 0;
        taken
    }
}

/// A packet socket on an interface; with protocol 0 it receives nothing.
fn packet_socket(interface: u32, protocol: u16) -> Result<OwnedFd> {
    // SAFETY: no pointers.
    let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error().into());
    }
    // SAFETY: a fresh descriptor that nobody else owns.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    bind(&socket, interface, protocol)?;
    Ok(socket)
}

fn bind(socket: &OwnedFd, interface: u32, protocol: u16) -> Result<()> {
    // SAFETY: all-zero is a valid `sockaddr_ll`.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = protocol.to_be();
    address.sll_ifindex = interface.cast_signed();
    let length = size_of_val(&address) as libc::socklen_t;
    // SAFETY: the pointer and length are those of `address`.
    succeeded(unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) })
}

fn set_option<T>(socket: &OwnedFd, name: libc::c_int, value: &T) -> Result<()> {
    let length = size_of::<T>() as libc::socklen_t;
    let value = std::ptr::from_ref(value).cast();
    // SAFETY: the pointer and length are those of `value`, a plain structure of the kernel's interface.
    succeeded(unsafe { libc::setsockopt(socket.as_raw_fd(), libc::SOL_PACKET, name, value, length) })
}

fn succeeded(result: libc::c_int) -> Result<()> {
    if result < 0 { Err(io::Error::last_os_error().into()) } else { Ok(()) }
}

/// A network namespace without a name.
fn new_namespace() -> Result<OwnedFd> {
    let make = || -> Result<OwnedFd> {
        // SAFETY: unshare changes only the namespaces of this thread, which ends right after.
        succeeded(unsafe { libc::unshare(libc::CLONE_NEWNET) })
            .map_err(|error| format!("cannot make a network namespace: {error}; run as root"))?;
        Ok(File::open("/proc/thread-self/ns/net")?.into())
    };
    thread::scope(|scope| scope.spawn(make).join()).map_err(|_| "a thread panicked")?
}

/// Moves the calling thread into a namespace.
fn enter(netns: &OwnedFd) -> Result<()> {
    // SAFETY: setns changes only the calling thread.
    succeeded(unsafe { libc::setns(netns.as_raw_fd(), libc::CLONE_NEWNET) })
}

/// Keeps the calling thread on one processor.
fn pin(processor: usize) -> Result<()> {
    // SAFETY: all-zero is a valid `cpu_set_t`: the empty one.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: the number is far below the size of the set.
    unsafe { libc::CPU_SET(processor, &mut set) };
    // SAFETY: the pointer and length are those of `set`.
    succeeded(unsafe { libc::sched_setaffinity(0, size_of_val(&set), &raw const set) })
}

/// The kernel's number of the calling thread.
fn thread_number() -> u32 {
    // SAFETY: no arguments.
    unsafe { libc::gettid() }.cast_unsigned()
}

/// The number of our thread of that name.
fn thread_named(name: &str) -> Result<u32> {
    for task in std::fs::read_dir("/proc/self/task")? {
        let task = task?;
        if std::fs::read_to_string(task.path().join("comm"))?.trim() == name {
            return Ok(task.file_name().to_string_lossy().parse()?);
        }
    }
    Err(format!("there is no thread {name}").into())
}

/// How long one of our threads has run, in user and kernel.
fn thread_time(number: u32) -> Result<Duration> {
    // CPUCLOCK_PERTHREAD_MASK | CPUCLOCK_SCHED, include/linux/posix-timers_types.h.
    let clock = (!number.cast_signed()) << 3 | 4 | 2;
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is that of `time`.
    succeeded(unsafe { libc::clock_gettime(clock, &raw mut time) })?;
    Ok(Duration::new(time.tv_sec as u64, time.tv_nsec as u32))
}

/// Frames that an interface in the calling thread's namespace received.
fn received(interface: &str) -> Result<u64> {
    let table = std::fs::read_to_string("/proc/thread-self/net/dev")?;
    let row = table.lines().find_map(|line| line.trim().strip_prefix(interface)?.strip_prefix(':'));
    let packets = row.and_then(|row| row.split_whitespace().nth(1)).ok_or("no such interface")?;
    Ok(packets.parse()?)
}
