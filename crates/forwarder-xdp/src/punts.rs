//! What the kernel's program leaves to user space: packets too big for the path, those whose time to live is over, handed-off pings,
//! fragments that came before their first one, and packets that nobody knows the way for yet.

use std::collections::VecDeque;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd as _, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use aya::maps::{MapData, RingBuf};
use phalanx_flow::decide::HandOff;
use phalanx_flow::encap::{self, HandOffHeader, LinkHeader, Outer};
use phalanx_flow::packet::{FrameBuf, HEADROOM, Link, parse};
use phalanx_flow::{
    Arrival, BackendIndex, Decision, FlowKey, MemberId, MemberSlot, Method, Verdict, Vintage,
};
use phalanx_forwarder::Drop as Reason;
use phalanx_forwarder::engine::{Engine, Held, HeldFrame};
use phalanx_forwarder::rewrite::{self, Offload, Scratch, Sink};
use phalanx_netlink::FrameSender;
use socket2::{Domain, Protocol, Socket, Type};

use crate::abi::{Punt, punt};
use crate::lock;
use crate::macs::OwnMacs;
use crate::maps::{Maps, now_ms};
use crate::run::run;
use crate::writer::Names;

/// How long the thread waits for a packet before it looks whether it should end, and while packets wait for something.
const WAIT_MS: i32 = 100;
const BUSY_WAIT_MS: i32 = 5;

/// Packets without a next hop that wait for one at the most, and how long: neighbours answer within milliseconds, and clients repeat.
const MAX_WAITING: usize = 256;
const WAITING_MS: u64 = 1_000;

/// The thread that carries out what the kernel's program decided and could not do.
pub(crate) struct Worker {
    pub(crate) ring: RingBuf<MapData>,
    /// The program that is attached, for what is put in again.
    pub(crate) entry: OwnedFd,
    pub(crate) maps: Arc<Maps>,
    pub(crate) engine: Arc<Engine>,
    pub(crate) names: Arc<RwLock<Names>>,
    pub(crate) macs: Arc<Mutex<OwnMacs>>,
    pub(crate) frames: Arc<FrameSender>,
    pub(crate) stop: Arc<AtomicBool>,
}

/// What waits.
#[derive(Default)]
struct Waiting {
    /// Later fragments, for their first one.
    fragments: Held,
    /// Packets, for a next hop; oldest first, with the time until they do.
    packets: VecDeque<(u64, Box<Punt>)>,
}

impl Worker {
    pub(crate) fn run(mut self) {
        let mut scratch = Scratch::default();
        let mut sender = Sender::open(Arc::clone(&self.frames));
        let mut waiting = Waiting::default();
        while !self.stop.load(Ordering::Relaxed) {
            let idle = waiting.packets.is_empty() && waiting.fragments.waiting().next().is_none();
            let mut ready = libc::pollfd { fd: self.ring.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            // SAFETY: one descriptor, which lives.
            unsafe { libc::poll(&raw mut ready, 1, if idle { WAIT_MS } else { BUSY_WAIT_MS }) };
            while let Some(item) = self.ring.next() {
                let Some(punt) = Punt::from_bytes(&item) else { continue };
                drop(item);
                match punt.why {
                    punt::HOLD => hold(&self.engine, &mut waiting.fragments, &punt),
                    _ if is_reachable(&self.engine, &self.names, &punt) => {
                        carry_out(&self.engine, &self.names, &mut scratch, &mut sender, &punt);
                    }
                    _ => {
                        if waiting.packets.len() >= MAX_WAITING {
                            waiting.packets.pop_front();
                            self.engine.counters.count_drop(Reason::NoNextHop);
                        }
                        waiting.packets.push_back((now_ms() + WAITING_MS, Box::new(punt)));
                    }
                }
            }
            self.release_fragments(&mut waiting.fragments, &mut sender);
            for (until_ms, punt) in std::mem::take(&mut waiting.packets) {
                if is_reachable(&self.engine, &self.names, &punt) {
                    carry_out(&self.engine, &self.names, &mut scratch, &mut sender, &punt);
                } else if now_ms() < until_ms {
                    waiting.packets.push_back((until_ms, punt));
                } else {
                    self.engine.counters.count_drop(Reason::NoNextHop);
                }
            }
        }
    }

    /// Puts fragments in again whose first one has come.
    fn release_fragments(&self, held: &mut Held, sender: &mut Sender) {
        let now_ms = now_ms();
        self.engine.counters.add_drops(Reason::Fragment, held.expire(now_ms));
        let mut keys: Vec<FlowKey> = held.waiting().copied().collect();
        keys.dedup();
        for key in keys {
            let known = self.maps.fragments.get(&key).ok().flatten();
            let Some(ports) = known.filter(|ports| now_ms < ports.until_ms) else { continue };
            for frame in held.release(&key) {
                if let Err(error) = self.put_in(&frame, ports.ports, sender) {
                    tracing::debug!(%error, "a held fragment was not put in again");
                    self.engine.counters.count_drop(Reason::Fragment);
                }
            }
        }
    }

    /// Has the program process a frame as if it came now: one that was handed off comes in a hand-off again, which says how it came.
    fn put_in(&self, held: &HeldFrame, ports: [[u8; 2]; 2], sender: &mut Sender) -> io::Result<()> {
        let mut bytes = vec![0; HEADROOM];
        bytes.extend_from_slice(&held.bytes);
        let mut frame =
            FrameBuf::new(&mut bytes, HEADROOM, held.bytes.len()).ok_or(io::ErrorKind::InvalidData)?;
        if held.link == Link::Ip {
            let packet = parse(&frame, Link::Ip).map_err(|_| io::ErrorKind::InvalidData)?;
            let plan = self.engine.plan();
            let (address, family) = plan.local_address();
            let handoff = &plan.plan.handoff;
            let mut header = HandOffHeader::new(held.arrival.hops, plan.plan.view_digest, handoff.cookie)
                .with_ports(ports[0], ports[1]);
            if let Some(bypassed) = held.arrival.bypassed {
                header = header.bypassing(bypassed).with_known(held.arrival.known);
            }
            let outer = Outer::new(Method::Gue, family, address, address, handoff.port, 0);
            let link = LinkHeader { source: [2; 6], destination: lock(&self.macs).any() };
            encap::hand_off(&mut frame, &packet, &header, &outer, u16::MAX, &link)
                .map_err(|error| io::Error::other(format!("{error:?}")))?;
        }
        let (verdict, out) = run(self.entry.as_fd(), frame.bytes(), None)?;
        // Dropped, and counted by the program; or given to us again.
        if verdict != XDP_TX && verdict != XDP_REDIRECT {
            return Ok(());
        }
        let macs = out.get(..12).ok_or(io::ErrorKind::InvalidData)?;
        let next_hops = self.engine.next_hops();
        let hop = next_hops
            .backends
            .iter()
            .chain(&next_hops.members)
            .flatten()
            .find(|hop| hop.destination_mac == macs[..6] && hop.source_mac == macs[6..]);
        let interface = hop.map_or(held.ingress, |hop| hop.interface);
        sender.copy(interface, &out);
        Ok(())
    }
}

/// What the program returns (`enum xdp_action`).
const XDP_TX: u32 = 3;
const XDP_REDIRECT: u32 = 4;

fn hold(engine: &Engine, held: &mut Held, punt: &Punt) {
    let Some(frame) = punt.frame.get(..punt.length as usize) else { return };
    let link = if punt.bare != 0 { Link::Ip } else { Link::Ethernet };
    let mut bytes = frame.to_vec();
    let key = FrameBuf::new(&mut bytes, 0, frame.len())
        .and_then(|frame| parse(&frame, link).ok())
        .and_then(|packet| packet.fragment_key());
    let Some(fragment) = key else { return engine.counters.count_drop(Reason::Malformed) };
    let bypassed = (punt.passed_over != 0).then_some(MemberId(punt.passed_over));
    let arrival = Arrival {
        hops: punt.hops,
        bypassed,
        known: punt.known != 0,
        vintage: Vintage(punt.vintage),
        ports: None,
    };
    let frame = HeldFrame { fragment, until_ms: 0, bytes, link, ingress: punt.ingress, arrival };
    let given_up = held.push(frame, now_ms());
    engine.counters.add_drops(Reason::Fragment, given_up);
}

/// The backend of a packet in the daemon's plan.
fn backend_of(engine: &Engine, names: &RwLock<Names>, punt: &Punt) -> Option<BackendIndex> {
    let names = names.read().unwrap_or_else(PoisonError::into_inner);
    engine.plan().backend_index(&names.name(BackendIndex(punt.backend))?)
}

/// Whether the packet can be sent now, or never: only one whose next hop is missing waits.
fn is_reachable(engine: &Engine, names: &RwLock<Names>, punt: &Punt) -> bool {
    if punt.why != punt::NO_NEXT_HOP {
        return true;
    }
    let next_hops = engine.next_hops();
    let hop = if punt.member == u16::MAX {
        let Some(index) = backend_of(engine, names, punt) else { return true };
        next_hops.backends.get(index.0 as usize)
    } else {
        next_hops.members.get(usize::from(punt.member))
    };
    hop.is_some_and(Option::is_some)
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
        punt::RESET => Verdict::Reset,
        _ if punt.member != u16::MAX => Verdict::HandOff(HandOff {
            to: MemberSlot(punt.member),
            hops: punt.hops,
            bypassed: MemberSlot(punt.bypassed),
            known: punt.known != 0,
            vintage: Vintage(punt.vintage),
            ports: (punt.has_ports != 0).then_some(punt.ports),
        }),
        _ => match backend_of(engine, names, punt) {
            Some(index) => Verdict::Forward(index),
            None => return engine.counters.count_drop(Reason::NoNextHop),
        },
    };
    let decision = Decision { verdict, hash: punt.hash, service: punt.service, ..Decision::PASS };
    let link = if punt.bare != 0 { Link::Ip } else { Link::Ethernet };
    let mut bytes = vec![0; HEADROOM];
    bytes.extend_from_slice(frame);
    if let Some(mut frame) = FrameBuf::new(&mut bytes, HEADROOM, frame.len()) {
        let batch = engine.batch();
        rewrite::carry_out(&batch, scratch, &mut frame, link, punt.ingress, &decision, sender);
    }
}

/// Sends what comes of it.
struct Sender {
    frames: Arc<FrameSender>,
    v4: Option<Socket>,
    v6: Option<Socket>,
}

impl Sender {
    fn open(frames: Arc<FrameSender>) -> Self {
        // IPPROTO_RAW: the packet brings its own header (raw(7)). A host without one family does without.
        let open = |domain| Socket::new(domain, Type::RAW, Some(Protocol::from(libc::IPPROTO_RAW))).ok();
        Self { frames, v4: open(Domain::IPV4), v6: open(Domain::IPV6) }
    }
}

impl Sink for Sender {
    fn frame(&mut self, interface: u32, frame: &mut FrameBuf<'_>, _offload: Offload) {
        self.copy(interface, frame.bytes());
    }

    fn copy(&mut self, interface: u32, frame: &[u8]) {
        if let Err(error) = self.frames.send(interface, frame) {
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
