//! What the kernel's program leaves to user space: packets too big for the path, those whose time to live is over, handed-off pings.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use aya::maps::{MapData, RingBuf};
use phalanx_flow::decide::HandOff;
use phalanx_flow::packet::{FrameBuf, HEADROOM, Link};
use phalanx_flow::{Arrival, BackendIndex, Decision, MemberSlot, Verdict};
use phalanx_forwarder::Drop as Reason;
use phalanx_forwarder::engine::Engine;
use phalanx_forwarder::rewrite::{self, Offload, Scratch, Sink};
use socket2::{Domain, Protocol, Socket, Type};

use crate::abi::{Punt, punt};
use crate::writer::Names;

/// How long the thread waits for a packet before it looks whether it should end.
const WAIT_MS: i32 = 100;

/// The thread that carries out what the kernel's program decided and could not do.
pub(crate) struct Worker {
    pub(crate) ring: RingBuf<MapData>,
    pub(crate) engine: Arc<Engine>,
    pub(crate) names: Arc<RwLock<Names>>,
    pub(crate) stop: Arc<AtomicBool>,
}

impl Worker {
    pub(crate) fn run(mut self) {
        let mut scratch = Scratch::default();
        let mut sender = Sender::open();
        while !self.stop.load(Ordering::Relaxed) {
            let mut ready = libc::pollfd { fd: self.ring.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            // SAFETY: one descriptor, which lives.
            unsafe { libc::poll(&raw mut ready, 1, WAIT_MS) };
            while let Some(item) = self.ring.next() {
                if let Some(punt) = Punt::from_bytes(&item) {
                    carry_out(&self.engine, &self.names, &mut scratch, &mut sender, &punt);
                }
            }
        }
    }
}

fn carry_out(
    engine: &Engine,
    names: &RwLock<Names>,
    scratch: &mut Scratch,
    sender: &mut Sender,
    punt: &Punt,
) {
    let Some(frame) = punt.frame.get(..punt.length as usize) else { return };
    let verdict = match punt.why {
        punt::ECHO => Verdict::EchoReply,
        // Not held yet (docs/design/0004-xdp.md): the client's next packet brings the next chance.
        punt::HOLD => return engine.counters.count_drop(Reason::Fragment),
        _ if punt.member != u16::MAX => Verdict::HandOff(HandOff {
            to: MemberSlot(punt.member),
            hops: punt.hops,
            bypassed: MemberSlot(punt.bypassed),
            ports: (punt.has_ports != 0).then_some(punt.ports),
        }),
        _ => {
            let names = names.read().unwrap_or_else(PoisonError::into_inner);
            let name = names.name(BackendIndex(punt.backend));
            match name.and_then(|name| engine.plan().backend_index(&name)) {
                Some(index) => Verdict::Forward(index),
                None => return engine.counters.count_drop(Reason::NoNextHop),
            }
        }
    };
    let decision = Decision { verdict, hash: punt.hash, service: punt.service, ..Decision::PASS };
    let link = if punt.bare != 0 { Link::Ip } else { Link::Ethernet };
    let mut bytes = vec![0; HEADROOM];
    bytes.extend_from_slice(frame);
    if let Some(mut frame) = FrameBuf::new(&mut bytes, HEADROOM, frame.len()) {
        let batch = engine.batch();
        rewrite::carry_out(&batch, scratch, &mut frame, link, &Arrival::WIRE, &decision, sender);
    }
}

/// Sends what comes of it.
struct Sender {
    v4: Option<Socket>,
    v6: Option<Socket>,
}

impl Sender {
    fn open() -> Self {
        // IPPROTO_RAW: the packet brings its own header (raw(7)). A host without one family does without.
        let open = |domain| Socket::new(domain, Type::RAW, Some(Protocol::from(libc::IPPROTO_RAW))).ok();
        Self { v4: open(Domain::IPV4), v6: open(Domain::IPV6) }
    }
}

impl Sink for Sender {
    fn frame(&mut self, interface: u32, frame: &mut FrameBuf<'_>, _offload: Offload) {
        self.copy(interface, frame.bytes());
    }

    fn copy(&mut self, interface: u32, frame: &[u8]) {
        if let Err(error) = send_frame(interface, frame) {
            tracing::debug!(%error, interface, "a frame was not sent");
        }
    }

    fn to_client(&mut self, packet: &[u8]) {
        let (socket, destination) = match packet.first().map(|first| first >> 4) {
            Some(4) => {
                (&self.v4, packet.get(16..20).and_then(|a| <[u8; 4]>::try_from(a).ok()).map(IpAddr::from))
            }
            Some(6) => {
                (&self.v6, packet.get(24..40).and_then(|a| <[u8; 16]>::try_from(a).ok()).map(IpAddr::from))
            }
            _ => return,
        };
        if let (Some(socket), Some(destination)) = (socket, destination) {
            // A courtesy to the client: if it cannot be sent now, the next packet brings the next chance.
            let _ = socket.send_to(packet, &SocketAddr::new(destination, 0).into());
        }
    }

    fn pass(&mut self) {}
}

/// Sends one Ethernet frame on an interface.
pub(crate) fn send_frame(interface: u32, frame: &[u8]) -> io::Result<()> {
    let socket = Socket::new(Domain::PACKET, Type::RAW, None)?;
    let address = libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        sll_protocol: 0,
        sll_ifindex: interface.cast_signed(),
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    // SAFETY: frame and address live through the call, with their true lengths.
    let sent = unsafe {
        libc::sendto(
            socket.as_raw_fd(),
            frame.as_ptr().cast(),
            frame.len(),
            libc::MSG_DONTWAIT,
            (&raw const address).cast(),
            size_of::<libc::sockaddr_ll>() as u32,
        )
    };
    if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
