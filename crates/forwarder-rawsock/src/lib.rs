//! A forwarder on `AF_PACKET` sockets: any Linux, no kernel feature beyond raw sockets.
//!
//! The sockets listen before tc ingress, and a classic BPF filter there drops exactly what they take, so that every frame has one
//! owner. After a SIGKILL the drop stays in place (nobody forwards meanwhile, and the kernel must not), and the next start adopts it.
//!
//! Invariant: this crate moves bytes; what happens to a packet is [`phalanx_forwarder::rewrite`]'s and the engine's business.

mod error;
mod filter;
mod offloads;
mod ring;
mod transmit;
mod worker;

use std::io;
use std::net::{IpAddr, UdpSocket};
use std::num::NonZeroUsize;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use phalanx_flow::{BackendId, MemberSlot};
use phalanx_forwarder::engine::{Engine, TableLimits};
use phalanx_forwarder::{
    Counters, Drop as Reason, Forwarder, InstallError, Plan, SendError, forward_to_engine, rewrite,
};
use phalanx_netlink::{BpfFilter, BpfInstruction, FrameSender, Link, Netlink};

pub use error::StartError;
use filter::{MAX_INSTRUCTIONS, Selection};
use ring::Ring;
use worker::{Shared, ToClients, Worker};

/// Where our filter stands on tc ingress: behind what an operator puts at the low numbers, and found again at the next start.
const FILTER_PRIORITY: u16 = 0x5048;
/// "PHLX": says whose it is.
const FILTER_HANDLE: u32 = 0x5048_4c58;

/// include/uapi/linux/udp.h
const UDP_NO_CHECK6_RX: libc::c_int = 102;

/// The least MTU of an interface: IPv6's (RFC 8200 §5).
const LEAST_MTU: u32 = 1280;

/// What a [`RawsockForwarder`] needs to know before its first plan.
#[derive(Clone, Debug)]
pub struct Config {
    /// The interfaces to receive on. It sends on whatever interface the next hops name.
    pub interfaces: Vec<String>,
    /// Forwarding threads; each has a ring for each interface. More than cores are of no use.
    pub threads: NonZeroUsize,
    /// Sizes of the tables.
    pub limits: TableLimits,
    /// Our end of the hand-off tunnels: an address of this host, that of the local member in every plan.
    pub data_address: IpAddr,
    /// Bytes of each ring; rounded up to blocks of 256 kB, at least four of them. It must outlast a thread's longest pause.
    pub ring_bytes: usize,
}

impl Config {
    /// 8 MB of ring: at a million packets a second and 200 bytes each, 40 ms.
    pub const DEFAULT_RING_BYTES: usize = 8 << 20;

    /// The defaults for `interfaces` with hand-offs at `data_address`: one thread.
    pub fn new(interfaces: Vec<String>, data_address: IpAddr) -> Self {
        Self {
            interfaces,
            threads: NonZeroUsize::MIN,
            limits: TableLimits::default(),
            data_address,
            ring_bytes: Self::DEFAULT_RING_BYTES,
        }
    }
}

/// A running forwarder; it stops when it is dropped.
#[derive(Debug)]
pub struct RawsockForwarder {
    engine: Arc<Engine>,
    shared: Arc<Shared>,
    data_address: IpAddr,
    links: Vec<Link>,
    sockets: Vec<Arc<OwnedFd>>,
    frames: FrameSender,
    control: Mutex<Control>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

/// What changes with plans.
#[derive(Debug)]
struct Control {
    netlink: Netlink,
    selection: Selection,
}

impl RawsockForwarder {
    /// Opens sockets and rings, puts the drop on tc ingress and starts forwarding by `plan`, in the calling thread's network namespace.
    pub fn start(config: &Config, plan: Plan) -> Result<Self, StartError> {
        let local = plan.members.get(usize::from(plan.local.0));
        if local.is_some_and(|local| local.address != config.data_address) {
            return Err(StartError::OtherAddress(config.data_address));
        }
        if config.interfaces.is_empty() {
            return Err(StartError::NoInterfaces);
        }
        let selection = select(&plan, config.data_address);
        let handoff_port = plan.handoff.port;
        let program = selection.socket_program();
        if program.len() > MAX_INSTRUCTIONS {
            return Err(StartError::TooManyServices { instructions: program.len() });
        }
        let engine = Arc::new(Engine::new(plan, config.limits)?);
        let mut netlink =
            Netlink::open().map_err(|error| StartError::system("open rtnetlink", io::Error::other(error)))?;
        let links =
            config.interfaces.iter().map(|name| usable(&mut netlink, name)).collect::<Result<Vec<_>, _>>()?;

        let frames = FrameSender::open()
            .map_err(|error| StartError::system("open a packet socket to send on", error))?;
        let mut workers = Vec::new();
        let mut sockets = Vec::new();
        let shared = Arc::new(Shared {
            engine: Arc::clone(&engine),
            stop: AtomicBool::new(false),
            discards: AtomicU64::new(0),
            heartbeats: (0..config.threads.get()).map(|_| AtomicU64::new(engine.now_ms())).collect(),
        });
        for index in 0..config.threads.get() {
            let clients = ToClients::open().map_err(|error| StartError::system("open raw sockets", error))?;
            let mut rings = Vec::new();
            for link in &links {
                let ring = Ring::open(link.index, config.ring_bytes, &program).map_err(|error| {
                    StartError::system(format!("open a packet socket on {}", link.name), error)
                })?;
                sockets.push(Arc::clone(ring.socket()));
                rings.push((link.index, ring));
            }
            workers.push(Worker { shared: Arc::clone(&shared), index, rings, reassembled: None, clients });
        }
        for (at, link) in links.iter().enumerate() {
            let rings: Vec<&Ring> = workers.iter().map(|worker| &worker.rings[at].1).collect();
            ring::fan_out(&rings)
                .map_err(|error| StartError::system(format!("share {} out to threads", link.name), error))?;
        }
        workers[0].reassembled = Some(hand_off_socket(config.data_address, handoff_port)?);

        // The sockets listen by now: a frame may be seen twice for a moment, but none is lost.
        for link in &links {
            drop_on_ingress(&mut netlink, link.index, selection.drop_program())
                .map_err(|source| ingress_error(link, source))?;
        }
        let mut threads = Vec::new();
        for worker in workers {
            let name = format!("phalanx-rx-{}", worker.index);
            let thread = std::thread::Builder::new()
                .name(name)
                .spawn(move || worker.run())
                .map_err(|error| StartError::system("start a thread", error))?;
            threads.push(thread);
        }
        Ok(Self {
            engine,
            shared,
            data_address: config.data_address,
            links,
            sockets,
            frames,
            control: Mutex::new(Control { netlink, selection }),
            threads: Mutex::new(threads),
        })
    }

    /// The engine inside.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// Stops forwarding and takes the drop off tc ingress: from now on the kernel has these packets. Again does nothing.
    pub fn shutdown(&self) {
        let mut threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        if threads.is_empty() {
            return;
        }
        self.shared.stop.store(true, Ordering::Relaxed);
        for thread in threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a forwarding thread had panicked");
            }
        }
        let mut control = self.control.lock().unwrap_or_else(PoisonError::into_inner);
        for link in &self.links {
            let deleted = control.netlink.delete_bpf_filter(link.index, FILTER_PRIORITY, FILTER_HANDLE);
            if let Err(error) = deleted
                && !error.is_not_found()
            {
                tracing::warn!(interface = link.name, %error, "the drop on tc ingress stays");
            }
        }
    }

    /// Makes sockets and tc ingress agree on which frames are ours.
    fn select(&self, control: &mut Control, selection: Selection) -> Result<(), InstallError> {
        if selection == control.selection {
            return Ok(());
        }
        // While tc changes the sockets take what either of both drops, so that no frame is nobody's.
        let attach = |selection: &Selection| {
            let program = selection.socket_program();
            self.sockets.iter().try_for_each(|socket| ring::attach_filter(socket, &program))
        };
        let refused = |source| InstallError::Kernel { table: "filter", source };
        attach(&selection.union(&control.selection)).map_err(refused)?;
        for link in &self.links {
            drop_on_ingress(&mut control.netlink, link.index, selection.drop_program())
                .map_err(|error| refused(io::Error::other(error)))?;
        }
        attach(&selection).map_err(refused)?;
        control.selection = selection;
        Ok(())
    }
}

impl Drop for RawsockForwarder {
    fn drop(&mut self) {
        self.shutdown();
    }
}

impl Forwarder for RawsockForwarder {
    forward_to_engine!(engine);

    fn install(&self, plan: Plan) -> Result<(), InstallError> {
        let mut control = self.control.lock().unwrap_or_else(PoisonError::into_inner);
        let selection = select(&plan, self.data_address);
        if plan.handoff.port != control.selection.hand_off.1 {
            return Err(InstallError::Inconsistent(
                "the hand-off port changed; it needs a restart".to_owned(),
            ));
        }
        let both = selection.union(&control.selection).socket_program().len();
        if both > MAX_INSTRUCTIONS {
            return Err(InstallError::Inconsistent(format!(
                "the services need a filter of {both} instructions and the kernel takes {MAX_INSTRUCTIONS}"
            )));
        }
        self.engine.install(plan)?;
        self.select(&mut control, selection)
    }

    fn send_echo(&self, to: MemberSlot, token: u64) -> Result<(), SendError> {
        let frame = rewrite::echo_frame(&self.engine.batch(), to, token)?;
        Ok(self.frames.send(frame.interface, &frame.bytes)?)
    }

    fn send_probe(&self, backend: &BackendId, ip_packet: &[u8]) -> Result<(), SendError> {
        let frame = rewrite::probe_frame(&self.engine.batch(), backend, ip_packet)?;
        Ok(self.frames.send(frame.interface, &frame.bytes)?)
    }

    fn discard_backlog(&self) {
        self.shared.discards.fetch_add(1, Ordering::Release);
    }

    fn idle_for(&self) -> Duration {
        let heartbeats = self.shared.heartbeats.iter().map(|heartbeat| heartbeat.load(Ordering::Relaxed));
        let oldest = heartbeats.min().unwrap_or(0);
        Duration::from_millis(self.engine.now_ms().saturating_sub(oldest))
    }

    fn counters(&self) -> Counters {
        let full = self.sockets.iter().map(|socket| ring::take_drops(socket)).sum();
        self.engine.counters.add_drops(Reason::RingFull, full);
        self.engine.read_counters()
    }
}

/// What a plan's frames are selected by.
fn select(plan: &Plan, data_address: IpAddr) -> Selection {
    Selection::new(plan.services.iter().map(|service| service.address), (data_address, plan.handoff.port))
}

/// The interface of that name, if we can work with it.
fn usable(netlink: &mut Netlink, name: &str) -> Result<Link, StartError> {
    let link = netlink.link(name).map_err(|error| {
        if error.is_not_found() || matches!(error, phalanx_netlink::Error::NoLink(_)) {
            StartError::NoInterface(name.to_owned())
        } else if error.is_permission() {
            StartError::Permission
        } else {
            StartError::System { operation: format!("look up {name}"), source: io::Error::other(error) }
        }
    })?;
    if !link.ethernet {
        return Err(StartError::NotEthernet(name.to_owned()));
    }
    if link.mtu < LEAST_MTU {
        return Err(StartError::Mtu { name: name.to_owned(), mtu: link.mtu });
    }
    if offloads::has_large_receive(name) {
        return Err(StartError::LargeReceive(name.to_owned()));
    }
    Ok(link)
}

/// The socket that makes the kernel reassemble fragmented hand-offs for us, and keeps it from answering whole ones with
/// "port unreachable".
fn hand_off_socket(address: IpAddr, port: u16) -> Result<UdpSocket, StartError> {
    let open = || {
        let socket = UdpSocket::bind((address, port))?;
        if address.is_ipv6() {
            // Hand-offs have no UDP checksum (RFC 6935 §5), which IPv6 sockets refuse unless told.
            ring::set_option_at(&socket, libc::SOL_UDP, UDP_NO_CHECK6_RX, &1_i32)?;
        }
        socket.set_nonblocking(true)?;
        Ok(socket)
    };
    open().map_err(|source| StartError::DataAddress { address, port, source })
}

/// Puts the drop on an interface's tc ingress, in the place of one that an earlier process left.
fn drop_on_ingress(
    netlink: &mut Netlink,
    index: u32,
    program: Vec<BpfInstruction>,
) -> Result<(), phalanx_netlink::Error> {
    netlink.ensure_clsact(index)?;
    netlink.replace_bpf_filter(&BpfFilter {
        index,
        priority: FILTER_PRIORITY,
        handle: FILTER_HANDLE,
        program,
    })
}

fn ingress_error(link: &Link, source: phalanx_netlink::Error) -> StartError {
    if source.is_permission() {
        StartError::Permission
    } else {
        StartError::Ingress { name: link.name.clone(), source }
    }
}
