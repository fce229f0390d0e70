//! A site in virtual time: one thread, one ordered queue, generators that follow from one seed.

mod changes;
mod driver;
pub mod event;
pub mod node;
mod router;
mod run;
mod streams;
pub mod traffic;

use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::hash::{DefaultHasher, Hash as _};
use std::sync::Arc;
use std::time::{Duration, Instant};

use phalanx_control::SharedTables;
use phalanx_flow::decide::{Decision, Outcome};
use phalanx_flow::{Arrival, FlowEventKind, FlowKey, MemberId, Verdict};
use rand::RngExt as _;
use rand::rngs::StdRng;

use crate::checks::{self, Checker, Findings};
use crate::schedule::Schedule;
use crate::settings::{Balancer, LARGE, Settings, stream};
use event::{Event, Packet, Timed};
use node::Node;
pub use run::Report;
use traffic::{Backend, Flow, Phase};

/// What a member did with a packet.
pub struct Ruling<'a> {
    /// Which member.
    pub node: usize,
    /// The packet, its path so far included.
    pub packet: &'a Packet,
    /// How it came.
    pub arrival: &'a Arrival,
    /// What was decided.
    pub decision: &'a Decision,
}

/// See the module's doc.
pub struct World {
    /// What is fixed.
    pub settings: Settings,
    /// What happens.
    pub schedule: Schedule,
    /// Virtual time since the start.
    pub now: Duration,
    epoch: Instant,
    tables: Arc<SharedTables>,
    queue: BinaryHeap<Timed>,
    sequence: u64,
    /// Of all that happened so far, bytes among members included: equal runs have equal ones.
    trace: DefaultHasher,
    network: StdRng,
    traffic: StdRng,
    /// What [`Settings::mixed`] adds.
    extras: StdRng,
    seeds: StdRng,
    /// The members' machines; who is down keeps its place.
    pub nodes: Vec<Node>,
    /// The servers.
    pub backends: Vec<Backend>,
    /// The connections.
    pub flows: Vec<Flow>,
    by_key: BTreeMap<FlowKey, usize>,
    /// From whom nothing reaches whom, beside what groups say.
    cuts: BTreeSet<(usize, usize)>,
    extra_loss: f64,
    links: BTreeMap<u64, streams::Link>,
    pairs: BTreeMap<(usize, usize), u64>,
    next_link: u64,
    next_hops: Vec<usize>,
    salt: u64,
    local_tables: Vec<BTreeMap<FlowKey, usize>>,
    /// Clients that ended by their own will, or will.
    ending: bool,
    /// Connections that were opened.
    pub opened: u64,
    /// Connections that never opened.
    pub refused: u64,
    /// The kind of change that came last.
    last_change: &'static str,
    broken_by: BTreeMap<&'static str, [u64; 2]>,
    broken_at: Vec<Duration>,
    /// Flows whose owner and backup died before anybody had noticed.
    orphans: BTreeSet<usize>,
    checkers: Vec<Box<dyn Checker>>,
    findings: Findings,
    story: Option<Vec<(Duration, String)>>,
    /// The flow of which the story tells every packet.
    pub watched: Option<usize>,
    watched_was: String,
    packets: u64,
    hand_offs: u64,
    /// ICMP errors that came to their connection's backend, and to another.
    errors: [u64; 2],
}

impl World {
    /// A site before its first moment. `epoch` is what its clocks show then; nothing depends on it.
    pub fn new(settings: Settings, schedule: Schedule, epoch: Instant, told: bool) -> Self {
        let seed = settings.seed;
        let nodes = settings.members + settings.spares;
        let mut rng = stream(seed, 3);
        let [at_first, later] = settings.backends;
        let backends = (0..at_first + later)
            .map(|backend| Backend { alive: true, usable: backend < at_first, connections: BTreeMap::new() })
            .collect();
        let cramped = settings.cramped.map(|flows| (rng.random_range(0..settings.members), flows));
        let make = |at: usize, rng: &mut StdRng| Node {
            id: MemberId(at as u32 + 1),
            address: node::address(at),
            process: None,
            forwarder: None,
            life: 1,
            boot: 0,
            stalled: None,
            stalls: 0,
            group: 0,
            slow: Duration::ZERO,
            weight: rng.random_range(1..=settings.weights),
            site: if rng.random_bool(0.5) { "a".to_owned() } else { "b".to_owned() },
            cache: rng.random_bool(settings.caches),
            cramped: cramped.filter(|(node, _)| *node == at).map(|(_, flows)| flows),
            drift_ppm: rng.random_range(-settings.drift_ppm..=settings.drift_ppm),
            skew_ms: {
                let most = settings.skew.as_millis() as i64;
                rng.random_range(-most..=most)
            },
            usable: Vec::new(),
            lacks: 0..0,
            leaving: false,
            note: None,
            steady_since: Duration::ZERO,
            silent_since: Some(Duration::ZERO),
            ran: Duration::ZERO,
        };
        let nodes: Vec<Node> = (0..nodes).map(|at| make(at, &mut rng)).collect();
        let mut nodes = nodes;
        if settings.laggard.is_some() {
            let late = stream(seed, 22).random_range(0..settings.members);
            nodes[late].lacks = at_first..at_first + later;
        }
        let mut world = Self {
            checkers: checks::all(),
            local_tables: vec![BTreeMap::new(); nodes.len()],
            nodes,
            backends,
            schedule,
            now: Duration::ZERO,
            epoch,
            tables: Arc::default(),
            queue: BinaryHeap::new(),
            sequence: 0,
            trace: DefaultHasher::new(),
            network: stream(seed, 4),
            traffic: stream(seed, 5),
            extras: stream(seed, 21),
            seeds: stream(seed, 6),
            flows: Vec::new(),
            by_key: BTreeMap::new(),
            cuts: BTreeSet::new(),
            extra_loss: 0.0,
            links: BTreeMap::new(),
            pairs: BTreeMap::new(),
            next_link: 1,
            next_hops: Vec::new(),
            salt: seed,
            ending: false,
            opened: 0,
            refused: 0,
            last_change: "start",
            broken_by: BTreeMap::new(),
            broken_at: Vec::new(),
            orphans: BTreeSet::new(),
            findings: Findings::default(),
            story: told.then(Vec::new),
            watched: None,
            watched_was: String::new(),
            packets: 0,
            hand_offs: 0,
            errors: [0; 2],
            settings,
        };
        if world.settings.members <= LARGE {
            world.plan_changes(Duration::ZERO);
        }
        for node in 0..world.settings.members {
            let late = world.seeds.random_range(Duration::ZERO..Duration::from_millis(800));
            world.push(late, Event::Resume { node, stall: u64::MAX });
        }
        world
    }

    /// Puts the schedule into the queue, so much later than it says.
    fn plan_changes(&mut self, later: Duration) {
        for index in 0..self.schedule.len() {
            self.schedule[index].0 += later;
            self.push(self.schedule[index].0, Event::Change(index));
        }
    }

    // Small questions, for checkers too.

    /// Whether what `from` sends reaches `to`, as far as the network is concerned.
    pub fn reaches(&self, from: usize, to: usize) -> bool {
        self.nodes[from].group == self.nodes[to].group && !self.cuts.contains(&(from, to))
    }

    /// Whether both hear each other.
    pub fn linked(&self, a: usize, b: usize) -> bool {
        a == b || (self.reaches(a, b) && self.reaches(b, a))
    }

    /// Whether all members that run exchange packets with each other, and none stands still.
    pub fn all_linked(&self) -> bool {
        let running: Vec<usize> = self.running().collect();
        running.iter().all(|a| running.iter().all(|b| self.linked(*a, *b)))
            && self.nodes.iter().all(|node| node.stalled.is_none())
    }

    /// The place of a member.
    pub fn node_of(&self, id: MemberId) -> Option<usize> {
        (id.0 as usize).checked_sub(1).filter(|at| *at < self.nodes.len())
    }

    /// The members whose daemons run and do not stand still.
    pub fn running(&self) -> impl Iterator<Item = usize> {
        (0..self.nodes.len()).filter(|node| self.nodes[*node].runs())
    }

    /// The backend that new flows on this tuple would get, as a running member sees it.
    pub fn consistent(&self, key: &FlowKey) -> Option<usize> {
        let node = self.running().next()?;
        let process = self.nodes[node].process.as_ref()?;
        let (_, backend) = process.control.planner().consistent(key)?;
        backend.map(|backend| node::backend_number(&backend))
    }

    /// Live flows, and those of them that sit off the consistent choice.
    pub fn off_choice(&self) -> (usize, usize) {
        let live = self.flows.iter().filter(|flow| flow.is_live());
        live.fold((0, 0), |(all, off), flow| {
            (all + 1, off + usize::from(self.consistent(&flow.key) != flow.backend))
        })
    }

    /// Whether something is wrong right now that does not end by itself at once.
    pub fn is_troubled(&self) -> bool {
        let troubled = |node: &Node| {
            node.group != 0 || node.stalled.is_some() || node.slow > Duration::ZERO || node.leaving
        };
        self.extra_loss > 0.0 || !self.cuts.is_empty() || self.nodes.iter().any(troubled)
    }

    /// Whether messages among members are lost or late beyond what is usual.
    pub fn is_noisy(&self) -> bool {
        self.extra_loss > 0.0
            || !self.cuts.is_empty()
            || self.nodes.iter().any(|node| node.group != 0 || node.slow > Duration::ZERO)
    }

    /// When the clocks started.
    pub fn epoch(&self) -> Instant {
        self.epoch
    }

    // Time.

    pub(super) fn push(&mut self, at: Duration, event: Event) {
        self.sequence += 1;
        self.queue.push(Timed { at, sequence: self.sequence, event });
    }

    pub(super) fn push_in(&mut self, after: Duration, event: Event) {
        self.push(self.now + after, event);
    }

    /// One-way latency of one packet.
    pub(super) fn latency(&mut self) -> Duration {
        let [least, most] = self.settings.latency;
        self.network.random_range(least..=most)
    }

    pub(super) fn tell(&mut self, line: impl FnOnce() -> String) {
        if let Some(story) = &mut self.story {
            story.push((self.now, line()));
        }
    }

    /// Lets virtual time pass.
    pub(super) fn run_for(&mut self, length: Duration) {
        let until = self.now + length;
        while self.queue.peek().is_some_and(|next| next.at <= until) {
            let Some(Timed { at, sequence, event }) = self.queue.pop() else { break };
            (at, sequence, event.bytes()).hash(&mut self.trace);
            // What was put off happens now, not then.
            self.now = self.now.max(at);
            self.happen(event);
        }
        self.now = until;
    }

    pub(super) fn happen(&mut self, event: Event) {
        if let Some(node) = event.node()
            && let Some(waiting) = &mut self.nodes[node].stalled
        {
            waiting.push(event);
            return;
        }
        if let Some(node) = event.node() {
            self.nodes[node].tell_time(self.now);
        }
        self.watch();
        match event {
            Event::Change(index) => self.change(index),
            Event::Calm(None) => self.extra_loss = 0.0,
            Event::Calm(Some(node)) => self.nodes[node].slow = Duration::ZERO,
            Event::Sample => {
                self.check(|checker, world, findings| checker.sampled(world, findings));
                self.push_in(SAMPLE, Event::Sample);
            }
            Event::Wake { node, life } => self.wake(node, life),
            Event::Tick { node, life } => self.tick(node, life),
            Event::View { node, life } => self.view_due(node, life),
            Event::Second { node, life } => self.second(node, life),
            Event::EchoTurn { node, life } => self.echo_turn(node, life),
            Event::Resume { node, stall } => self.resume(node, stall),
            Event::Datagram { from, to, bytes } => self.datagram(from, to, &bytes),
            Event::Echo { from, to, token } => self.echo(from, to, token),
            Event::EchoBack { to, token } => self.echo_back(to, token),
            Event::PushPull { from, to, bytes } => self.push_pull(from, to, &bytes),
            Event::PushPullBack { to, bytes } => self.push_pull_back(to, &bytes),
            Event::Dial { node, peer } => self.dial(node, peer),
            Event::Up { node, peer, link } => self.link_up(node, peer, link),
            Event::Lost { node, peer, link } => self.link_lost(node, peer, link),
            Event::Break { link, silence } => self.break_link(link, silence),
            Event::Flush { link } => self.flush(link),
            Event::Bytes { link, from, to, bytes } => self.bytes(link, from, to, bytes),
            Event::Health { node, backend, usable } => self.health(node, backend, usable),
            Event::RouterSees { node, up, life } => self.router_sees(node, up, life),
            Event::AtRouter(packet) => self.at_router(packet),
            Event::AtMember { node, packet, arrival } => self.at_member(node, packet, &arrival),
            Event::AtBackend { backend, packet } => self.at_backend(backend, packet),
            Event::AtClient { flow, life, sequence, backend, reply } => {
                self.at_client(flow, life, sequence, backend, reply);
            }
            Event::IcmpTurn => self.icmp_turn(),
            Event::Client { flow, token } => self.client(flow, token),
            Event::SynAckAgain { flow, life, sequence, backend, tries } => {
                self.syn_ack_again(flow, life, sequence, backend, tries);
            }
        }
    }

    /// Tells of the watched flow whenever somebody's record of it has changed.
    fn watch(&mut self) {
        let Some(flow) = self.watched.and_then(|flow| self.flows.get(flow)) else { return };
        let mut held = String::new();
        for node in &self.nodes {
            let Some(forwarder) = &node.forwarder else { continue };
            if let Some(record) = phalanx_forwarder::Forwarder::get(&**forwarder, &flow.key) {
                let backend = node::backend_number(&record.backend);
                let (birth, update) = (record.birth >> 10, record.update);
                held += &format!(
                    " m{}: b{backend} {:?} {birth}/{update} {:?};",
                    node.id, record.state, record.flags.0
                );
            }
        }
        if held != self.watched_was {
            let line = format!("held by{held}");
            self.watched_was = held;
            self.tell(|| line);
        }
    }

    // Packets at members.

    fn at_member(&mut self, node: usize, mut packet: Packet, arrival: &Arrival) {
        if self.settings.balancer == Balancer::LocalTables {
            return self.at_local_table(node, packet);
        }
        let Some(forwarder) = self.nodes[node].forwarder.clone().filter(|_| packet.path.len() < TTL) else {
            return;
        };
        self.packets += 1;
        packet.path.push(node as u16);
        let parsed = self.parsed(&packet);
        if packet.kind == event::Kind::Syn
            && let Some(backend) = forwarder.cached_for_syn(&parsed.key)
        {
            let late = self.latency();
            return self.push_in(late, Event::AtBackend { backend: node::backend_number(&backend), packet });
        }
        let decision = forwarder.rule(&parsed, arrival);
        if decision.event.is_some() {
            self.tick_soon(node);
        }
        if matches!(decision.event, Some(FlowEventKind::New | FlowEventKind::Changed | FlowEventKind::Cached))
        {
            self.flows[packet.flow].changed = self.now;
        }
        let in_time = self.nodes.iter().all(|node| node.slow.is_zero());
        let apart = self.is_noisy() && self.running().any(|other| !self.linked(node, other));
        match decision.outcome {
            Outcome::Recovered => self.flows[packet.flow].guessed = true,
            // A datagram of a flow that was known.
            Outcome::New if packet.kind != event::Kind::Syn && self.flows[packet.flow].backend.is_some() => {
                self.flows[packet.flow].guessed = true;
            }
            Outcome::Hit | Outcome::CacheHit | Outcome::New => {
                let flow = &mut self.flows[packet.flow];
                flow.guessed = false;
                // What a forwarder without a daemon sees, others hear of when the daemon is back; and late, if streams are late.
                if self.nodes[node].process.is_some() && in_time {
                    if apart {
                        flow.unheard.insert(node, (self.nodes[node].life, self.now));
                    } else {
                        flow.forwarded = self.now;
                    }
                }
            }
            _ => {}
        }
        if self.watched == Some(packet.flow) {
            let line = format!(
                "m{} rules on {:?} {} by {:?}: {:?} {:?}, {:?}",
                node + 1,
                packet.kind,
                packet.sequence,
                packet.path,
                decision.outcome,
                decision.verdict,
                decision.event
            );
            self.tell(|| line);
        }
        let ruling = Ruling { node, packet: &packet, arrival, decision: &decision };
        self.check(|checker, world, findings| checker.ruled(world, &ruling, findings));
        let plan = forwarder.plan();
        match decision.verdict {
            Verdict::Forward(index) => {
                if let Some(backend) = plan.backend(index) {
                    let backend = node::backend_number(&backend.id);
                    let late = self.latency();
                    self.push_in(late, Event::AtBackend { backend, packet });
                }
            }
            Verdict::HandOff(hand_off) => {
                let Some(to) = plan.member(hand_off.to).and_then(|member| self.node_of(member.id)) else {
                    return;
                };
                self.hand_offs += 1;
                let bypassed = plan.member(hand_off.bypassed).map(|member| member.id);
                let arrival = Arrival {
                    hops: hand_off.hops,
                    bypassed,
                    known: hand_off.known,
                    vintage: hand_off.vintage,
                    ports: hand_off.ports,
                };
                if self.delivers(node, to) {
                    let late = self.latency();
                    self.push_in(late, Event::AtMember { node: to, packet, arrival });
                }
            }
            // Nobody sets `on_failure = "reset"` here, sends pings or fragments.
            Verdict::Pass | Verdict::Drop(_) | Verdict::EchoReply | Verdict::Reset | Verdict::Hold => {}
        }
    }

    /// Whether one datagram from `from` comes to `to`.
    pub(super) fn delivers(&mut self, from: usize, to: usize) -> bool {
        let [loss, _] = self.settings.loss;
        self.reaches(from, to) && !self.network.random_bool((loss + self.extra_loss).min(1.0))
    }

    // Checkers.

    pub(super) fn check(&mut self, ask: impl Fn(&mut dyn Checker, &Self, &mut Findings)) {
        let mut checkers = std::mem::take(&mut self.checkers);
        let mut findings = std::mem::take(&mut self.findings);
        let before = findings.violations.len();
        findings.now = self.now;
        for checker in &mut checkers {
            findings.checker = checker.name();
            ask(checker.as_mut(), self, &mut findings);
        }
        let excused = std::mem::take(&mut findings.excused);
        for flow in excused {
            self.flows[flow].excused = true;
        }
        for flow in std::mem::take(&mut findings.lost) {
            self.flows[flow].lost = true;
        }
        for violation in &findings.violations[before..] {
            let line = format!("!! {}: {}", violation.checker, violation.what);
            self.tell(|| line);
        }
        self.checkers = checkers;
        self.findings = findings;
    }

    pub(super) fn delivered(&mut self, backend: usize, packet: &Packet) {
        let flow = &self.flows[packet.flow];
        let astray = flow.life == packet.life
            && packet.kind != event::Kind::Syn
            && flow.phase != Phase::Over
            && flow.backend.is_some_and(|has| has != backend);
        if !astray {
            return;
        }
        let line = format!(
            "flow {} ({}) of b{:?} came to b{backend} by {:?}: {:?} {}",
            packet.flow, flow.key, flow.backend, packet.path, packet.kind, packet.sequence
        );
        self.tell(|| line);
        if flow_is_down(&self.flows[packet.flow]) {
            return;
        }
        self.check(|checker, world, findings| checker.astray(world, packet, backend, findings));
        if packet.kind == event::Kind::Datagram {
            self.break_flow(packet.flow, Some(backend));
        }
    }

    pub(super) fn break_flow(&mut self, flow: usize, _by: Option<usize>) {
        let entry = &mut self.flows[flow];
        if entry.broken || entry.orphaned {
            return;
        }
        entry.broken = true;
        entry.waiting_since = None;
        self.broken_at.push(self.now);
        let excused = entry.excused;
        let key = entry.key;
        self.broken_by.entry(self.last_change).or_default()[usize::from(excused)] += 1;
        let word = if excused { " (nothing could have saved it)" } else { "" };
        self.tell(|| format!("flow {flow} ({key}) is broken{word}"));
    }
}

fn flow_is_down(flow: &Flow) -> bool {
    flow.broken || flow.orphaned
}

/// Members that a packet comes by at the most, whatever they do with it. Two hand-offs are all there should be.
const TTL: usize = 16;

/// How often checkers look at the whole.
pub(super) const SAMPLE: Duration = Duration::from_millis(250);
