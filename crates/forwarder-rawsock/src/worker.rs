//! One forwarding thread: poll, rule, rewrite, send, block by block.
//!
//! ```text
//!  ring of each interface ──► blocks ──► 64 frames a batch: rewrite::process ──► Transmit ──► sendmmsg
//!  UDP socket of the hand-off port ──► hand-offs that the kernel reassembled ──►┘         └─► raw sockets: ICMP to clients
//! ```

use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use phalanx_flow::packet::{FrameBuf, HEADROOM, Link};
use phalanx_forwarder::Drop as Reason;
use phalanx_forwarder::engine::{Ahead, Engine};
use phalanx_forwarder::rewrite::{self, Offload, Scratch, Sink};
use socket2::{Domain, Protocol, Socket, Type};

use crate::ring::{Block, Ring};
use crate::transmit::Transmit;

/// A thread wakes this often though nothing comes, to show that it runs and to hear that it shall stop.
const WAKE_MS: i32 = 10;

/// Frames worked off under one reading of plan, clock and lease.
const BATCH: usize = 64;

/// A thread that could not run for longer than this, and than its lease, was stopped: what waits for it is stale.
const STALL_MS: u64 = 250;

/// What the threads share with the forwarder.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) engine: Arc<Engine>,
    pub(crate) stop: AtomicBool,
    /// Counts calls of `discard_backlog`.
    pub(crate) discards: AtomicU64,
    /// When each thread last showed that it runs, by the engine's clock.
    pub(crate) heartbeats: Vec<AtomicU64>,
}

/// A forwarding thread's own.
pub(crate) struct Worker {
    pub(crate) shared: Arc<Shared>,
    pub(crate) index: usize,
    pub(crate) rings: Vec<(u32, Ring)>,
    /// Hand-offs that the kernel reassembled come here; one thread reads them.
    pub(crate) reassembled: Option<UdpSocket>,
    pub(crate) clients: ToClients,
}

impl Worker {
    /// Forwards until told to stop.
    pub(crate) fn run(mut self) {
        let shared = Arc::clone(&self.shared);
        let mut transmit = Transmit::new(Arc::clone(&shared.engine));
        let mut scratch = Scratch::default();
        let mut discards = shared.discards.load(Ordering::Relaxed);
        let mut datagram = vec![0; HEADROOM + usize::from(u16::MAX)];
        while !shared.stop.load(Ordering::Relaxed) {
            let now_ms = shared.engine.now_ms();
            let before_ms = shared.heartbeats[self.index].swap(now_ms, Ordering::Relaxed);
            let wanted = shared.discards.load(Ordering::Acquire);
            let stalled_ms = now_ms.saturating_sub(before_ms);
            let lease_ms = shared.engine.lease_term().as_millis() as u64;
            if wanted != discards || stalled_ms > STALL_MS.max(lease_ms) {
                discards = wanted;
                self.discard();
            }
            let mut idle = true;
            for (interface, ring) in &mut self.rings {
                // One round of the ring at the most: other interfaces wait too.
                for _ in 0..8 {
                    let Some(mut block) = ring.next_block() else { break };
                    idle = false;
                    let output = Output { transmit: &mut transmit, clients: &self.clients };
                    work_off(&shared.engine, &mut block, *interface, &mut scratch, output);
                    transmit.flush();
                }
            }
            if let Some(socket) = &self.reassembled {
                while let Ok((length, from)) = socket.recv_from(&mut datagram[HEADROOM..]) {
                    idle = false;
                    let mut output = Output { transmit: &mut transmit, clients: &self.clients };
                    if let Some(mut frame) = FrameBuf::new(&mut datagram, HEADROOM, length) {
                        let batch = shared.engine.batch();
                        rewrite::process_datagram(&batch, &mut scratch, &mut frame, from.ip(), &mut output);
                    }
                    transmit.flush();
                }
            }
            if idle {
                self.wait();
            }
        }
    }

    /// Throws away what waits, as the kernel received it before now.
    fn discard(&mut self) {
        let mut stale = 0;
        for (_, ring) in &mut self.rings {
            // No more than there was room for: what comes meanwhile is fresh.
            for _ in 0..ring.blocks() {
                match ring.next_block() {
                    Some(block) => stale += block.len() as u64,
                    None => break,
                }
            }
        }
        if let Some(socket) = &self.reassembled {
            while socket.recv_from(&mut [0]).is_ok() {
                stale += 1;
            }
        }
        self.shared.engine.counters.add_drops(Reason::Stale, stale);
    }

    fn wait(&self) {
        let fds = self.rings.iter().map(|(_, ring)| ring.socket().as_raw_fd());
        let fds = fds.chain(self.reassembled.iter().map(AsRawFd::as_raw_fd));
        let mut polled: Vec<libc::pollfd> =
            fds.map(|fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 }).collect();
        // SAFETY: the pointer and length are those of `polled`.
        let ready = unsafe { libc::poll(polled.as_mut_ptr(), polled.len() as libc::nfds_t, WAKE_MS) };
        if ready > 0 && polled.iter().any(|fd| fd.revents & (libc::POLLERR | libc::POLLNVAL) != 0) {
            // An interface that went down says so once; one that is gone says so for ever, and must not keep us busy.
            for fd in &polled {
                take_error(fd.fd);
            }
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
    }
}

/// Reads and forgets a socket's pending error.
fn take_error(fd: RawFd) {
    let mut error: libc::c_int = 0;
    let mut length = size_of_val(&error) as libc::socklen_t;
    // SAFETY: the pointer and length are those of `error`.
    unsafe {
        libc::getsockopt(fd, libc::SOL_SOCKET, libc::SO_ERROR, (&raw mut error).cast(), &raw mut length)
    };
}

/// Works off all frames of a block. They are sent from where they lie: the block is kept until the transmitter is flushed.
fn work_off(
    engine: &Engine,
    block: &mut Block<'_>,
    interface: u32,
    scratch: &mut Scratch,
    mut output: Output<'_>,
) {
    let mut batch = engine.batch();
    // Fixed for the life of a cluster.
    let mut ahead = Ahead::new(engine, batch.plan().plan.seed);
    let mut worked = 0;
    block.for_each(&mut ahead, |received| {
        if worked == BATCH {
            batch = engine.batch();
            worked = 0;
        }
        worked += 1;
        match received {
            Some(mut received) => rewrite::process(
                &batch,
                scratch,
                &mut received.frame,
                Link::Ethernet,
                interface,
                received.offload,
                &mut output,
            ),
            None => engine.counters.count_drop(Reason::Malformed),
        }
    });
}

/// Where one thread's frames go.
struct Output<'a> {
    transmit: &'a mut Transmit,
    clients: &'a ToClients,
}

impl Sink for Output<'_> {
    #[inline]
    fn frame(&mut self, interface: u32, frame: &mut FrameBuf<'_>, offload: Offload) {
        // SAFETY: frames lie in a ring's block or in the datagram's buffer, and both are used again only after a flush.
        unsafe { self.transmit.push(interface, frame, offload) };
    }

    fn copy(&mut self, interface: u32, frame: &[u8]) {
        self.transmit.push_copy(interface, frame);
    }

    fn to_client(&mut self, ip_packet: &[u8]) {
        self.clients.send(ip_packet);
    }

    fn pass(&mut self) {
        // The filter takes only what is ours: this one was for a service that is no more, and the kernel must not route it.
    }
}

/// Raw IP sockets, by which the kernel routes ICMP errors of ours to clients, from the service's address.
#[derive(Debug)]
pub(crate) struct ToClients {
    v4: Option<Socket>,
    v6: Option<Socket>,
}

impl ToClients {
    /// Opens both; a host without one family does without.
    pub(crate) fn open() -> io::Result<Self> {
        let open = |domain| {
            // IPPROTO_RAW: the packet brings its own header (raw(7)).
            match Socket::new(domain, Type::RAW, Some(Protocol::from(libc::IPPROTO_RAW))) {
                Ok(socket) => {
                    socket.set_nonblocking(true)?;
                    Ok(Some(socket))
                }
                Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => Ok(None),
                Err(error) => Err(error),
            }
        };
        Ok(Self { v4: open(Domain::IPV4)?, v6: open(Domain::IPV6)? })
    }

    fn send(&self, packet: &[u8]) {
        let address = |at: usize, length: usize| packet.get(at..at + length);
        let (socket, destination) = match packet.first().map(|first| first >> 4) {
            Some(4) => (&self.v4, address(16, 4).and_then(|a| <[u8; 4]>::try_from(a).ok()).map(IpAddr::from)),
            Some(6) => {
                (&self.v6, address(24, 16).and_then(|a| <[u8; 16]>::try_from(a).ok()).map(IpAddr::from))
            }
            _ => return,
        };
        if let (Some(socket), Some(destination)) = (socket, destination) {
            // A courtesy to the client: if it cannot be sent now, the next packet brings the next chance.
            let _ = socket.send_to(packet, &SocketAddr::new(destination, 0).into());
        }
    }
}
