//! Clusters in virtual time: a seeded network with latency, loss and partitions, and processes that die, stall and start again.
//!
//! One thread, one ordered queue, one generator: the same seed gives the same run.

use std::{
    collections::{BTreeMap, HashMap},
    net::SocketAddr,
    time::{Duration, Instant},
};

use phalanx_flow::{MemberId, member::Liveness};
use rand::{RngExt, SeedableRng, rngs::StdRng};

use crate::{
    Config, ConfigError, Digest, Event, KeyRing, MemberState, Membership, Metadata, Timing, Transmit,
};

/// The network between the members.
#[derive(Clone, Copy, Debug)]
pub struct Network {
    /// Shortest one-way latency.
    pub latency_min: Duration,
    /// Longest one-way latency; each datagram takes a random time in between, so datagrams overtake each other.
    pub latency_max: Duration,
    /// Share of datagrams lost, 0 to 1, each by itself.
    pub loss: f64,
}

impl Network {
    /// One-way latency of 0.1 to 2 ms.
    pub fn lan(loss: f64) -> Self {
        Self { latency_min: Duration::from_micros(100), latency_max: Duration::from_millis(2), loss }
    }

    /// One-way latency of 20 to 80 ms.
    pub fn wan(loss: f64) -> Self {
        Self { latency_min: Duration::from_millis(20), latency_max: Duration::from_millis(80), loss }
    }
}

/// A datagram as the network saw it.
#[derive(Clone, Debug)]
pub struct Datagram {
    /// Its source.
    pub from: SocketAddr,
    /// Where it goes and what it is.
    pub transmit: Transmit,
}

/// One process.
#[derive(Debug)]
pub struct Node {
    /// As it was last started.
    pub config: Config,
    /// Everything it said happened, since it was last started.
    pub events: Vec<(Instant, Event)>,
    membership: Option<Membership>,
    stalled: Option<Vec<Happening>>,
    group: u32,
    wake: Option<Instant>,
}

#[derive(Clone, Debug)]
enum Happening {
    Arrival(Datagram),
    Wake { node: usize },
    Resume { node: usize },
    PushPullRequest { from: usize, to: usize, bytes: Vec<u8> },
    PushPullReply { to: usize, bytes: Vec<u8> },
}

/// A cluster in virtual time.
#[derive(Debug)]
pub struct Cluster {
    /// The nodes, in the order in which they were added; a dead one keeps its place.
    pub nodes: Vec<Node>,
    /// May be changed at any time.
    pub network: Network,
    /// Whether push-pull streams work. Default true.
    pub push_pull: bool,
    /// Whether members report at once that they are ready for a pending view, as if they had no flows. Default true.
    pub ready: bool,
    /// If `Some`, every datagram sent is kept here.
    pub tap: Option<Vec<Datagram>>,
    now: Instant,
    rng: StdRng,
    queue: BTreeMap<(Instant, u64), Happening>,
    sequence: u64,
    by_address: HashMap<SocketAddr, usize>,
}

/// The gossip address of the member that [`config`] describes.
pub fn address(id: u32) -> SocketAddr {
    let [_, a, b, c] = id.to_be_bytes();
    SocketAddr::from(([10, a, b, c], 7946))
}

/// A usable configuration: weight 1, seeds are members 1 to 3, one key.
pub fn config(id: u32, timing: &Timing) -> Config {
    // One key is neither none nor too many.
    let keys = KeyRing::new(vec![[42; 32]]).unwrap_or_else(|error| unreachable!("{error}"));
    let mut transfer_address = address(id);
    transfer_address.set_port(7947);
    Config {
        seeds: (1..=3).map(address).collect(),
        timing: timing.clone(),
        metadata: Metadata {
            weight: 1,
            site: "a".to_owned(),
            transfer_address: Some(transfer_address),
            version: "0.1.0".to_owned(),
            fingerprint: [id as u8; 32],
            ..Metadata::default()
        },
        ..Config::new(MemberId(id), address(id), keys)
    }
}

impl Cluster {
    /// An empty cluster. `epoch` is when virtual time starts; nothing depends on its value.
    pub fn new(epoch: Instant, seed: u64, network: Network) -> Self {
        Self {
            nodes: Vec::new(),
            network,
            push_pull: true,
            ready: true,
            tap: None,
            now: epoch,
            rng: StdRng::seed_from_u64(seed),
            queue: BTreeMap::new(),
            sequence: 0,
            by_address: HashMap::new(),
        }
    }

    /// Virtual time.
    pub fn now(&self) -> Instant {
        self.now
    }

    /// Starts a member that was not there before; returns its place in [`Self::nodes`].
    pub fn add(&mut self, config: Config) -> Result<usize, ConfigError> {
        self.nodes.push(Node {
            config: config.clone(),
            events: Vec::new(),
            membership: None,
            stalled: None,
            group: 0,
            wake: None,
        });
        let node = self.nodes.len() - 1;
        self.start(node, config)?;
        Ok(node)
    }

    /// Starts node `node` (again).
    pub fn start(&mut self, node: usize, config: Config) -> Result<(), ConfigError> {
        let seed = self.rng.random();
        let membership = Membership::new(config.clone(), seed, self.now)?;
        self.by_address.insert(config.address, node);
        let entry = &mut self.nodes[node];
        entry.config = config;
        entry.events.clear();
        entry.membership = Some(membership);
        entry.stalled = None;
        entry.wake = None;
        self.drain(node);
        Ok(())
    }

    /// Ends node `node` without a word.
    pub fn kill(&mut self, node: usize) {
        let entry = &mut self.nodes[node];
        entry.membership = None;
        entry.stalled = None;
        entry.wake = None;
        let address = entry.config.address;
        if self.by_address.get(&address) == Some(&node) {
            self.by_address.remove(&address);
        }
    }

    /// Node `node` does not run for so long; what arrives waits in its socket.
    pub fn stall(&mut self, node: usize, length: Duration) {
        self.nodes[node].stalled = Some(Vec::new());
        self.push(self.now + length, Happening::Resume { node });
    }

    /// Datagrams and streams pass only between nodes of one group. All start in group 0.
    pub fn set_group(&mut self, node: usize, group: u32) {
        self.nodes[node].group = group;
    }

    /// All nodes hear each other again.
    pub fn heal(&mut self) {
        for node in &mut self.nodes {
            node.group = 0;
        }
    }

    /// The data address of node `node` changes while it runs.
    pub fn change_address(&mut self, node: usize, address: SocketAddr) -> Result<(), ConfigError> {
        let old = std::mem::replace(&mut self.nodes[node].config.address, address);
        self.by_address.remove(&old);
        self.by_address.insert(address, node);
        self.with(node, |membership, now| membership.change_address(now, address)).unwrap_or(Ok(()))
    }

    /// The state machine of node `node`, if it runs.
    pub fn membership(&self, node: usize) -> Option<&Membership> {
        self.nodes[node].membership.as_ref()
    }

    /// Does something with the state machine of node `node`, if it runs, and carries out what comes of it.
    pub fn with<R>(&mut self, node: usize, act: impl FnOnce(&mut Membership, Instant) -> R) -> Option<R> {
        let now = self.now;
        let result = self.nodes[node].membership.as_mut().map(|membership| act(membership, now));
        self.drain(node);
        result
    }

    /// Puts a datagram on the network; it arrives now.
    pub fn inject(&mut self, datagram: Datagram) {
        self.push(self.now, Happening::Arrival(datagram));
    }

    /// Lets virtual time pass.
    pub fn run_for(&mut self, length: Duration) {
        let until = self.now + length;
        while self.step(until) {}
        self.now = until;
    }

    /// Lets virtual time pass until `done`, looked at every 10 ms, or until `limit` has passed; returns the time it took.
    pub fn run_until(&mut self, limit: Duration, mut done: impl FnMut(&Self) -> bool) -> Option<Duration> {
        let from = self.now;
        loop {
            if done(self) {
                return Some(self.now - from);
            }
            if self.now - from >= limit {
                return None;
            }
            self.run_for(Duration::from_millis(10));
        }
    }

    /// Whether every running node is active and they all have the same view of exactly themselves, nobody suspected.
    pub fn is_settled(&self) -> bool {
        let mut digest: Option<Digest> = None;
        let running = self.nodes.iter().filter_map(|node| node.membership.as_ref());
        let count = running.clone().count();
        running.into_iter().all(|membership| {
            let view = membership.view();
            membership.state() == MemberState::Active
                && view.pending.is_none()
                && *digest.get_or_insert(view.digest) == view.digest
                && view.members.len() == count
                && view.members.iter().all(|member| {
                    member.known
                        && !member.suspected
                        && member.state == MemberState::Active
                        && member.liveness == Liveness::Alive
                })
        })
    }

    fn push(&mut self, at: Instant, happening: Happening) {
        self.sequence += 1;
        self.queue.insert((at, self.sequence), happening);
    }

    fn step(&mut self, until: Instant) -> bool {
        let Some(entry) = self.queue.first_entry().filter(|entry| entry.key().0 <= until) else {
            return false;
        };
        // Something late (a stalled node's) happens now, not then.
        self.now = self.now.max(entry.key().0);
        let happening = entry.remove();
        self.happen(happening);
        true
    }

    fn happen(&mut self, happening: Happening) {
        let node = match &happening {
            Happening::Resume { node } => return self.resume(*node),
            Happening::Wake { node } => *node,
            Happening::Arrival(datagram) => match self.by_address.get(&datagram.transmit.to) {
                Some(node) => *node,
                None => return,
            },
            Happening::PushPullRequest { to, .. } | Happening::PushPullReply { to, .. } => *to,
        };
        if let Some(waiting) = &mut self.nodes[node].stalled {
            waiting.push(happening);
            return;
        }
        let now = self.now;
        let entry = &mut self.nodes[node];
        let Some(membership) = &mut entry.membership else { return };
        match happening {
            Happening::Wake { .. } => {
                if entry.wake.is_none_or(|at| at > now) {
                    return;
                }
                entry.wake = None;
                // It may have been put off since, but a driver that wakes early is allowed.
                membership.handle_timeout(now);
            }
            Happening::Arrival(datagram) => {
                membership.handle_datagram(now, datagram.from, &datagram.transmit.payload);
            }
            Happening::PushPullRequest { from, to, bytes } => {
                if let Ok(bytes) = membership.handle_push_pull(now, &bytes) {
                    self.stream(to, from, |to| Happening::PushPullReply { to, bytes });
                }
            }
            Happening::PushPullReply { bytes, .. } => drop(membership.handle_push_pull_reply(now, &bytes)),
            Happening::Resume { .. } => {}
        }
        self.drain(node);
    }

    fn resume(&mut self, node: usize) {
        let mut waiting = self.nodes[node].stalled.take().unwrap_or_default();
        // A driver may look at its timer or at its socket first; both must do.
        if self.rng.random() {
            waiting.sort_by_key(|happening| !matches!(happening, Happening::Wake { .. }));
        }
        for happening in waiting {
            self.happen(happening);
        }
    }

    /// Something on a reliable stream: a few round trips late, and only within a group.
    fn stream(&mut self, from: usize, to: usize, happening: impl FnOnce(usize) -> Happening) {
        if self.nodes[from].group == self.nodes[to].group {
            let at = self.now + self.network.latency_max * 3;
            self.push(at, happening(to));
        }
    }

    fn drain(&mut self, node: usize) {
        let now = self.now;
        let Network { latency_min, latency_max, loss } = self.network;
        let group = self.nodes[node].group;
        let mut wishes = Vec::new();
        let entry = &mut self.nodes[node];
        let Some(membership) = &mut entry.membership else { return };
        let from = membership.identity().address;
        while let Some(event) = membership.poll_event() {
            if let (Event::PendingChanged(Some(name)), true) = (&event, self.ready) {
                membership.report_done(now, *name);
            }
            if let Event::PushPull { address, .. } = event {
                wishes.push(address);
            } else {
                entry.events.push((now, event));
            }
        }
        let mut sent = Vec::new();
        while let Some(transmit) = membership.poll_transmit() {
            sent.push(transmit);
        }
        let wake = membership.poll_timeout();
        if let Some(at) = wake.filter(|at| entry.wake.is_none_or(|known| *at < known)) {
            entry.wake = Some(at);
            self.push(at, Happening::Wake { node });
        }
        for transmit in sent {
            let datagram = Datagram { from, transmit };
            if let Some(tap) = &mut self.tap {
                tap.push(datagram.clone());
            }
            let reachable =
                self.by_address.get(&datagram.transmit.to).is_some_and(|to| self.nodes[*to].group == group);
            if reachable && !self.rng.random_bool(loss) {
                let late = self.rng.random_range(latency_min..=latency_max);
                self.push(now + late, Happening::Arrival(datagram));
            }
        }
        if !self.push_pull {
            wishes.clear();
        }
        for address in wishes {
            let to =
                self.nodes.iter().position(|node| node.config.metadata.transfer_address == Some(address));
            let request = self.nodes[node].membership.as_ref().map(Membership::push_pull_request);
            if let (Some(to), Some(bytes)) = (to, request) {
                self.stream(node, to, |to| Happening::PushPullRequest { from: node, to, bytes });
            }
        }
    }
}
