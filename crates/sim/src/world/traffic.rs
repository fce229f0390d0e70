//! Clients and backends: the truth that members do not know.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use phalanx_flow::{Arrival, FlowKey};
use rand::RngExt as _;

use super::World;
use super::event::{Event, Kind, Packet, Reply};
use super::node::{SERVICE, SERVICE_6, TCP_PORT, UDP_PORT};
use crate::settings::pick;

/// First retransmission of data, and the longest pause (Linux: 200 ms and doubling).
const RETRANSMIT: [Duration; 2] = [Duration::from_millis(200), Duration::from_millis(1_600)];

/// First retransmission of a SYN; doubling.
const SYN_AGAIN: Duration = Duration::from_secs(1);

/// SYNs sent before a client gives up.
const SYNS: u32 = 6;

/// SYN-ACKs that a backend sends again, doubling from [`SYN_AGAIN`] (Linux: `tcp_synack_retries`).
const SYN_ACKS: u32 = 5;

/// How a client behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Profile {
    /// Data every so often, to the end.
    Steady(Duration),
    /// A few packets of data, then a FIN.
    Short(u32),
    /// A FIN early, then acknowledgements and no data, as in a half-closed download.
    HalfClosed(Duration),
    /// A few packets, then a RST.
    Resetting(u32),
    /// As [`Self::Short`], and then again and again on the same tuple.
    Reusing(u32),
    /// Nothing any more once it is established: it idles out.
    Silent,
    /// Datagrams every so often.
    Datagrams(Duration),
}

/// How far a client is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Its connection is not open yet.
    Opening,
    /// Its connection is open.
    Open,
    /// It has sent a FIN and goes on acknowledging.
    HalfClosed,
    /// Its last packet of this connection waits for an answer.
    Closing,
    /// It sends nothing more on this connection.
    Over,
}

/// A client's connection.
#[derive(Clone, Debug)]
pub struct Flow {
    /// Its tuple.
    pub key: FlowKey,
    /// What it does.
    pub profile: Profile,
    /// How far it is.
    pub phase: Phase,
    /// Which connection on its tuple it is.
    pub life: u32,
    /// Who has it: who answered first.
    pub backend: Option<usize>,
    /// When its backend heard from the client that it is open.
    pub established: Option<Duration>,
    /// It was reset by a backend that did not know it.
    pub broken: bool,
    /// It was broken, and nothing could have saved it.
    pub excused: bool,
    /// The last copy of it was lost, and nothing could have kept it.
    pub lost: bool,
    /// Nobody knew it when its last packet came, and it went by the consistent choice: until the next one it is held as half-open.
    pub guessed: bool,
    /// When a member with a daemon last forwarded a packet of it by what it knew.
    pub forwarded: Duration,
    /// When a member last had to tell others of a change of its state.
    pub changed: Duration,
    /// As [`Self::forwarded`], for members that were cut off from others and could not tell: by place, in which life, and when.
    pub unheard: BTreeMap<usize, (u64, Duration)>,
    /// Its backend died.
    pub orphaned: bool,
    /// Since when its last packet waits for an answer.
    pub waiting_since: Option<Duration>,
    /// When its client last sent something.
    pub last_sent: Duration,
    /// Backends that were asked for this connection.
    pub asked: BTreeSet<usize>,
    /// Datagrams that came to backends.
    heard: u32,
    sequence: u32,
    unanswered: Option<(Kind, u32)>,
    tries: u32,
    sent: u32,
    token: u64,
}

impl Flow {
    /// Whether the client counts on it.
    pub fn is_live(&self) -> bool {
        matches!(self.phase, Phase::Open | Phase::HalfClosed) && !self.broken && !self.orphaned
    }

    /// Its client waits for nothing any more.
    pub(super) fn stop_waiting(&mut self) {
        self.unanswered = None;
        self.waiting_since = None;
    }
}

/// A server.
#[derive(Clone, Debug, Default)]
pub struct Backend {
    /// It answers.
    pub alive: bool,
    /// New flows are meant to go to it.
    pub usable: bool,
    /// The connections it has, by tuple: which life.
    pub(super) connections: BTreeMap<FlowKey, u32>,
}

impl World {
    /// Opens `count` connections over the next `spread`.
    pub(super) fn open(&mut self, count: usize, spread: Duration) {
        for _ in 0..count {
            let number = self.flows.len() as u32;
            let [_, a, b, c] = number.to_be_bytes();
            let port = self.traffic.random_range(1_024..u16::MAX);
            let newer = self.settings.ipv6 > 0.0 && self.extras.random_bool(self.settings.ipv6);
            let [client, address] = if newer {
                let [one, other] = [a, b].map(u16::from);
                let host = u16::from_be_bytes([1, c]);
                [Ipv6Addr::new(0x2001, 0xdb8, 2, 0, 0, one, other, host), SERVICE_6].map(IpAddr::V6)
            } else {
                [Ipv4Addr::new(100, a, b, c), SERVICE].map(IpAddr::V4)
            };
            let profile = self.profile();
            let (protocol, service) = match profile {
                Profile::Datagrams(_) => (phalanx_flow::key::UDP, UDP_PORT),
                _ => (phalanx_flow::key::TCP, TCP_PORT),
            };
            let Some(key) = FlowKey::new(protocol, (client, port), (address, service)) else {
                continue;
            };
            let flow = Flow {
                key,
                profile,
                phase: Phase::Opening,
                life: 0,
                backend: None,
                established: None,
                broken: false,
                excused: false,
                lost: false,
                guessed: false,
                forwarded: self.now,
                changed: self.now,
                unheard: BTreeMap::new(),
                orphaned: false,
                waiting_since: None,
                last_sent: self.now,
                asked: BTreeSet::new(),
                heard: 0,
                sequence: 0,
                unanswered: None,
                tries: 0,
                sent: 0,
                token: 0,
            };
            self.by_key.insert(key, self.flows.len());
            self.flows.push(flow);
            let late = self.traffic.random_range(Duration::ZERO..=spread);
            self.client_timer(number as usize, late);
        }
    }

    fn profile(&mut self) -> Profile {
        let idle = self.settings.idle;
        let sparse = self.settings.sparseness();
        let half_closed = (self.settings.linger.as_secs() / 6) as u32;
        let pause = |milliseconds: u64| Duration::from_millis(milliseconds) * sparse;
        let rng = &mut self.traffic;
        let seldom = idle.mul_f64(rng.random_range(0.3..0.75));
        match rng.random_range(0..100) {
            0..=34 => Profile::Steady(pause(*pick(rng, &[150, 400, 1_000, 2_500]))),
            35..=49 => Profile::Steady(seldom),
            50..=57 => Profile::Short(rng.random_range(1..8)),
            58..=67 => Profile::HalfClosed(Duration::from_millis(*pick(rng, &[300, 1_200])) * half_closed),
            68..=72 => Profile::Resetting(rng.random_range(1..8)),
            73..=80 => Profile::Reusing(rng.random_range(1..5)),
            81..=84 => Profile::Silent,
            _ => Profile::Datagrams(pause(*pick(rng, &[100, 700, 2_000]))),
        }
    }

    pub(super) fn client_timer(&mut self, flow: usize, after: Duration) {
        self.flows[flow].token += 1;
        let token = self.flows[flow].token;
        self.push_in(after, Event::Client { flow, token });
    }

    /// A client's timer: it sends again, or sends what comes next.
    pub(super) fn client(&mut self, flow: usize, token: u64) {
        let entry = &mut self.flows[flow];
        if entry.token != token || entry.broken || entry.orphaned {
            return;
        }
        if let Some((kind, sequence)) = entry.unanswered {
            entry.tries += 1;
            if kind == Kind::Syn && entry.tries >= SYNS {
                entry.phase = Phase::Over;
                entry.unanswered = None;
                entry.waiting_since = None;
                self.refused += 1;
                return;
            }
            let tries = entry.tries;
            self.send(flow, kind, sequence);
            let pause = match kind {
                Kind::Syn => SYN_AGAIN * 2_u32.pow(tries.min(5)),
                _ => (RETRANSMIT[0] * 2_u32.pow(tries.min(5))).min(RETRANSMIT[1]),
            };
            return self.client_timer(flow, pause);
        }
        match (entry.phase, entry.profile) {
            (Phase::Opening, Profile::Datagrams(_)) => self.say(flow, Kind::Datagram),
            (Phase::Opening, _) => self.say(flow, Kind::Syn),
            (Phase::Open, Profile::Steady(_) | Profile::Datagrams(_)) if self.ending => self.wind_up(flow),
            (Phase::Open, Profile::Datagrams(_)) => self.say(flow, Kind::Datagram),
            (Phase::Open, Profile::Short(count) | Profile::Reusing(count)) if entry.sent > count => {
                entry.phase = Phase::Closing;
                self.say(flow, Kind::Fin);
            }
            (Phase::Open, Profile::Resetting(count)) if entry.sent > count => {
                entry.phase = Phase::Over;
                self.say(flow, Kind::Rst);
                self.flows[flow].unanswered = None;
                self.flows[flow].waiting_since = None;
            }
            (Phase::Open, Profile::HalfClosed(_)) if entry.sent > 3 => {
                entry.phase = Phase::HalfClosed;
                self.say(flow, Kind::Fin);
            }
            (Phase::Open, Profile::Silent) if entry.sent > 2 => entry.phase = Phase::Over,
            (Phase::Open, _) => self.say(flow, Kind::Data),
            (Phase::HalfClosed, _) if self.ending => entry.phase = Phase::Over,
            (Phase::HalfClosed, Profile::HalfClosed(every)) => {
                let sequence = entry.sequence;
                self.send(flow, Kind::Ack, sequence);
                self.client_timer(flow, every);
            }
            (Phase::Over, Profile::Reusing(_)) if !self.ending => {
                entry.life += 1;
                entry.phase = Phase::Opening;
                entry.backend = None;
                entry.established = None;
                entry.asked.clear();
                entry.unheard.clear();
                entry.heard = 0;
                entry.sent = 0;
                (entry.broken, entry.excused, entry.lost) = (false, false, false);
                (entry.orphaned, entry.guessed, entry.forwarded) = (false, false, self.now);
                self.say(flow, Kind::Syn);
            }
            _ => {}
        }
    }

    /// Ends a connection as connections end: most by a FIN, some by a RST, some by silence.
    fn wind_up(&mut self, flow: usize) {
        let choice = self.traffic.random_range(0..10);
        let datagrams = matches!(self.flows[flow].profile, Profile::Datagrams(_));
        match choice {
            0..=5 if !datagrams => {
                self.flows[flow].phase = Phase::Closing;
                self.say(flow, Kind::Fin);
            }
            6..=7 if !datagrams => {
                self.flows[flow].phase = Phase::Over;
                let sequence = self.flows[flow].sequence;
                self.send(flow, Kind::Rst, sequence);
            }
            _ => self.flows[flow].phase = Phase::Over,
        }
    }

    /// Sends something new that wants an answer.
    fn say(&mut self, flow: usize, kind: Kind) {
        let now = self.now;
        let entry = &mut self.flows[flow];
        entry.sequence += 1;
        entry.sent += 1;
        entry.tries = 0;
        entry.unanswered = Some((kind, entry.sequence));
        entry.waiting_since = Some(now);
        let sequence = entry.sequence;
        self.send(flow, kind, sequence);
        let pause = match kind {
            Kind::Syn => SYN_AGAIN,
            // A datagram is not sent again: the next one is another.
            Kind::Datagram => match self.flows[flow].profile {
                Profile::Datagrams(every) if self.flows[flow].phase == Phase::Open => {
                    self.flows[flow].unanswered = None;
                    every
                }
                _ => {
                    self.flows[flow].unanswered = None;
                    Duration::from_millis(500)
                }
            },
            _ => RETRANSMIT[0],
        };
        self.client_timer(flow, pause);
    }

    fn send(&mut self, flow: usize, kind: Kind, sequence: u32) {
        let now = self.now;
        self.flows[flow].last_sent = now;
        let packet = Packet { flow, life: self.flows[flow].life, kind, sequence, path: Vec::new() };
        let [_, loss] = self.settings.loss;
        if self.network.random_bool(loss) {
            return;
        }
        if self.network.random_bool(self.settings.duplicates) {
            let late = self.latency();
            self.push_in(late, Event::AtRouter(packet.clone()));
        }
        let late = self.latency();
        self.push_in(late, Event::AtRouter(packet));
    }

    /// What the backend of some live connection sent does not fit, or does not get through: an error about it comes by the router.
    pub(super) fn icmp_turn(&mut self) {
        let Some([least, most]) = self.settings.icmp.filter(|_| !self.ending) else { return };
        let late = self.extras.random_range(least..=most);
        self.push_in(late, Event::IcmpTurn);
        let live = |flow: &&Flow| flow.is_live() && flow.established.is_some();
        let count = self.flows.iter().filter(live).count();
        if count == 0 {
            return;
        }
        let chosen = self.extras.random_range(0..count);
        let Some(key) = self.flows.iter().filter(live).nth(chosen).map(|flow| flow.key) else { return };
        let Some(flow) = self.by_key.get(&key).copied() else { return };
        let sequence = self.extras.random();
        let packet =
            Packet { flow, life: self.flows[flow].life, kind: Kind::IcmpError, sequence, path: Vec::new() };
        let late = self.settings.latency[0];
        self.push_in(late, Event::AtRouter(packet));
    }

    /// A packet has come to a backend.
    pub(super) fn at_backend(&mut self, backend: usize, packet: Packet) {
        self.delivered(backend, &packet);
        if packet.kind == Kind::IcmpError {
            let flow = &self.flows[packet.flow];
            self.errors[usize::from(flow.backend != Some(backend))] += 1;
            return;
        }
        let now = self.now;
        let entry = &self.flows[packet.flow];
        let (key, current) = (entry.key, entry.life == packet.life);
        let Some(server) = self.backends.get_mut(backend) else { return };
        if !server.alive {
            return;
        }
        let known = server.connections.get(&key) == Some(&packet.life);
        let reply = match packet.kind {
            // A SYN that comes late, of a connection that is over, opens nothing that anybody uses.
            Kind::Syn | Kind::Datagram if !current => None,
            Kind::Syn | Kind::Datagram => {
                server.connections.insert(key, packet.life);
                self.flows[packet.flow].asked.insert(backend);
                if packet.kind == Kind::Syn {
                    let Packet { flow, life, sequence, .. } = packet;
                    self.push_in(SYN_AGAIN, Event::SynAckAgain { flow, life, sequence, backend, tries: 1 });
                }
                Some(if packet.kind == Kind::Syn { Reply::SynAck } else { Reply::Ack })
            }
            Kind::Rst => {
                if known {
                    server.connections.remove(&key);
                }
                None
            }
            Kind::IcmpError => None,
            _ if known => {
                let entry = &mut self.flows[packet.flow];
                if current && entry.backend == Some(backend) && entry.established.is_none() {
                    entry.established = Some(now);
                }
                Some(Reply::Ack)
            }
            _ => Some(Reply::Reset),
        };
        if packet.kind == Kind::Datagram && current {
            let entry = &mut self.flows[packet.flow];
            entry.heard += 1;
            // The second one is what makes members tell each other of it.
            if entry.backend == Some(backend) && entry.heard > 1 && entry.established.is_none() {
                entry.established = Some(now);
            }
        }
        if let Some(reply) = reply {
            let Packet { flow, life, sequence, .. } = packet;
            self.reply(flow, life, sequence, backend, reply);
        }
    }

    fn reply(&mut self, flow: usize, life: u32, sequence: u32, backend: usize, reply: Reply) {
        let [_, loss] = self.settings.loss;
        if !self.network.random_bool(loss) {
            let late = self.latency();
            self.push_in(late, Event::AtClient { flow, life, sequence, backend, reply });
        }
    }

    pub(super) fn syn_ack_again(
        &mut self,
        flow: usize,
        life: u32,
        sequence: u32,
        backend: usize,
        tries: u32,
    ) {
        let entry = &self.flows[flow];
        let waits = self.backends[backend].alive
            && self.backends[backend].connections.get(&entry.key) == Some(&life)
            && entry.established.is_none();
        if waits && tries <= SYN_ACKS {
            self.reply(flow, life, sequence, backend, Reply::SynAck);
            let pause = SYN_AGAIN * 2_u32.pow(tries);
            self.push_in(pause, Event::SynAckAgain { flow, life, sequence, backend, tries: tries + 1 });
        }
    }

    /// An answer has come to a client.
    pub(super) fn at_client(&mut self, flow: usize, life: u32, sequence: u32, backend: usize, reply: Reply) {
        let entry = &mut self.flows[flow];
        if entry.life != life || entry.broken {
            return;
        }
        // It answered and died.
        entry.orphaned |= entry.phase == Phase::Opening
            && reply != Reply::Reset
            && self.backends.get(backend).is_some_and(|server| !server.alive);
        match reply {
            Reply::SynAck => {
                if entry.phase == Phase::Open && entry.backend == Some(backend) {
                    // The backend has not heard our answer.
                    let sequence = entry.sequence;
                    return self.send(flow, Kind::Ack, sequence);
                }
                if entry.phase != Phase::Opening {
                    return;
                }
                entry.phase = Phase::Open;
                entry.backend = Some(backend);
                entry.unanswered = None;
                entry.waiting_since = None;
                entry.sent = 0;
                let sequence = entry.sequence;
                self.opened += 1;
                self.send(flow, Kind::Ack, sequence);
                let pause = self.pause(flow);
                self.client_timer(flow, pause);
            }
            Reply::Ack => {
                if entry.phase == Phase::Opening {
                    // The first answer to a datagram.
                    entry.phase = Phase::Open;
                    entry.backend = Some(backend);
                    entry.waiting_since = None;
                    self.opened += 1;
                    return;
                }
                if matches!(entry.profile, Profile::Datagrams(_)) {
                    if entry.backend == Some(backend) {
                        entry.waiting_since = None;
                    }
                    return;
                }
                if entry.unanswered.is_none_or(|(_, waiting)| waiting != sequence) {
                    return;
                }
                entry.unanswered = None;
                entry.waiting_since = None;
                if entry.phase == Phase::Closing {
                    entry.phase = Phase::Over;
                    let backend = entry.backend;
                    let key = entry.key;
                    if let Some(server) = backend.and_then(|backend| self.backends.get_mut(backend)) {
                        server.connections.remove(&key);
                    }
                    let gap = Duration::from_millis(self.traffic.random_range(5..6_000));
                    let gap = gap * self.settings.sparseness();
                    return self.client_timer(flow, gap);
                }
                let pause = self.pause(flow);
                self.client_timer(flow, pause);
            }
            Reply::Reset => match entry.phase {
                Phase::Open | Phase::HalfClosed | Phase::Closing => {
                    let backend = self.backends.get(backend).map(|_| backend);
                    self.break_flow(flow, backend);
                }
                Phase::Opening | Phase::Over => {}
            },
        }
    }

    /// How long a client waits before it sends the next thing.
    fn pause(&mut self, flow: usize) -> Duration {
        match self.flows[flow].profile {
            Profile::Steady(every) | Profile::HalfClosed(every) | Profile::Datagrams(every) => {
                every.mul_f64(self.traffic.random_range(0.7..1.05))
            }
            _ => Duration::from_millis(self.traffic.random_range(5..400)),
        }
    }

    /// How a packet looks to a member.
    pub(super) fn parsed(&self, packet: &Packet) -> phalanx_flow::packet::Packet {
        use phalanx_flow::packet::{Fragment, PacketKind, tcp_flags};
        let (kind, payload) = match packet.kind {
            Kind::Syn => (PacketKind::TcpSyn, 0),
            Kind::Ack => (PacketKind::Tcp { flags: tcp_flags::ACK }, 0),
            Kind::Data => (PacketKind::Tcp { flags: tcp_flags::ACK | tcp_flags::PSH }, 100),
            Kind::Fin => (PacketKind::Tcp { flags: tcp_flags::ACK | tcp_flags::FIN }, 0),
            Kind::Rst => (PacketKind::Tcp { flags: tcp_flags::RST }, 0),
            Kind::Datagram => (PacketKind::Datagram, 100),
            Kind::IcmpError => (PacketKind::IcmpError, 28),
        };
        phalanx_flow::packet::Packet {
            key: self.flows[packet.flow].key,
            kind,
            fragment: Fragment::Whole,
            tcp_sequence: packet.sequence,
            tcp_acknowledgment: 0,
            l3_offset: 0,
            l3_length: 40 + payload,
            l4_offset: 20,
            l4_length: 20 + payload,
            payload_length: payload,
            ttl: 64,
            tos: 0,
            dont_fragment: true,
        }
    }

    /// A packet from the wire, for `node`.
    pub(super) fn pass_to_member(&mut self, node: usize, packet: Packet) {
        let late = self.latency();
        self.push_in(late, Event::AtMember { node, packet, arrival: Arrival::WIRE });
    }
}
