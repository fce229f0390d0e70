//! The state machine.

use std::{
    collections::{BTreeMap, VecDeque},
    net::SocketAddr,
    time::{Duration, Instant},
};

use foca::Timer;
use phalanx_flow::MemberId;
use rand::{RngExt, SeedableRng, rngs::StdRng};
use serde::{Deserialize, Serialize};

use crate::{
    config::{Config, ConfigError, Digest, Shared, SharedField, timing_digest},
    event::{Counters, Event, Transmit, Warning},
    identity::Identity,
    item::{Board, MemberState, Metadata, Wish},
    seal::{KeyRing, Life, Seal},
    view::View,
    wire::{KIND_CONTROL, KIND_FOCA, MAX_PUSH_PULL_MEMBERS, PushPull, PushPullError},
};

mod change;
mod join;
mod publish;
mod refresh;
mod swim;

use swim::{Io, Ping, Swim};

/// Changed metadata is told at once, but not more often than this for every [`SPACING_CROWD`] members: when many join together,
/// every join changes every member's view digest.
const PUBLISH_SPACING: Duration = Duration::from_millis(250);

/// See [`PUBLISH_SPACING`].
const SPACING_CROWD: usize = 16;

/// Above this many members the ID messages are stretched in proportion.
const ID_CROWD: usize = 64;

/// Probes whose answers still count.
const PINGS_KEPT: usize = 16;

/// Former members that are remembered beside twice the present ones, so that a healed partition knows itself again at once.
const STRANGERS_KEPT: usize = 64;

/// Gossip intervals by which the word that we leave goes ahead of the word that we are down: as long as news takes to reach the last of
/// a hundred members.
const LEAVE_AHEAD: u32 = 5;

/// Datagrams that repeat the news of our leaving, one a gossip interval.
const LEAVE_REPEATS: u8 = 4;

/// Echoes lost in a row that make a path suspect: one may be lost by chance.
const ECHO_LOSSES: u8 = 3;

/// Probe periods in which the others are heard again, all of them, by who could hear none: each says within a few gossip intervals that it
/// lives, and answers an echo a period.
const RECOVERY: u32 = 8;

/// Slow answers in a row that are worth a warning.
const SLOW_ANSWERS: u8 = 8;

/// Who is in the cluster.
///
/// ```text
///             seeds answer, the cluster is known, and it has made ready for us,
///             or nobody is active and ours is the lowest id
///   Joining ------------------------------------------------> Active
///      |                                                         | begin_leave, and the others have made ready,
///      |                   begin_leave, leave                    v or leave
///      '----------------------------------------------------> Leaving ---> left (Event::Left)
/// ```
/// What planned changes wait for is drawn in `membership/change.rs`.
///
/// - Getters: [`view`](Self::view), [`identity`](Self::identity), [`state`](Self::state),
///   [`is_resuming`](Self::is_resuming), [`lease_valid_until`](Self::lease_valid_until), [`counters`](Self::counters).
/// - Inputs: `handle_*`; each takes the time, which must not go backwards.
/// - Commands: [`update_metadata`](Self::update_metadata), [`set_keys`](Self::set_keys), [`set_shared`](Self::set_shared),
///   [`change_address`](Self::change_address), [`set_forwarder_alive`](Self::set_forwarder_alive), [`activate`](Self::activate),
///   [`begin_leave`](Self::begin_leave), [`leave`](Self::leave), [`report_room`](Self::report_room),
///   [`report_done`](Self::report_done), [`push_pull_request`](Self::push_pull_request).
/// - Outputs: after each input or command, [`poll_event`](Self::poll_event) and [`poll_transmit`](Self::poll_transmit) until `None`,
///   then [`poll_timeout`](Self::poll_timeout).
#[derive(Debug)]
pub struct Membership {
    config: Config,
    timing_digest: Digest,
    shared_digest: Digest,
    swim: SwimBox,
    /// Grows when `swim` is made anew: timers of the old one mean nothing to the new one.
    epoch: u32,
    io: Io,
    board: Board,
    rng: StdRng,
    seal: Seal,
    tasks: BTreeMap<(Instant, u64), Task>,
    sequence: u64,
    transmits: VecDeque<Transmit>,
    events: VecDeque<Event>,
    counters: Counters,

    state: MemberState,
    /// Weight and serial in force, and what we wish instead.
    weight: u32,
    serial: u64,
    wish: Option<Wish>,
    /// The pending view for which we have sent all we have to send.
    done: Digest,
    waiting: change::Waiting,
    /// Members of our side, by boot: see [`crate::MemberView::admitted`].
    met: BTreeMap<MemberId, u64>,
    departed: bool,
    started: Instant,
    version: u64,
    published: Option<Instant>,
    publish_soon: bool,

    view: View,
    signature: u64,
    rebuild: bool,
    links: Links,
    acquaintances: BTreeMap<MemberId, SocketAddr>,
    echo_losses: BTreeMap<MemberId, u8>,
    slow_answers: BTreeMap<MemberId, u8>,
    /// When members that we hear were last told that they are suspected.
    told_doubted: BTreeMap<MemberId, Instant>,
    /// Since when members are suspected, whoever began.
    suspected_since: BTreeMap<MemberId, Instant>,
    /// As whom members were heard last, and when.
    heard: BTreeMap<MemberId, (Identity, Instant)>,
    warned_backends: BTreeMap<MemberId, (Digest, Digest)>,
    warned_shared: BTreeMap<MemberId, SharedField>,

    pings: VecDeque<Ping>,
    lease: Option<Instant>,
    /// [`Event::Unheard`] was said, and nobody has heard us since.
    unheard: bool,
    frozen: Option<Instant>,
    joining: join::Joining,
}

/// What we think of our own links, by how many of the others we doubt ([`View::judge`]).
#[derive(Clone, Copy, Debug)]
enum Links {
    /// Whoever we doubt is doubted.
    Sound,
    /// Rather than so many others we doubt ourselves.
    Doubtful,
    /// They were doubtful, and the others are being heard again, one after the other: nobody is doubted before that time.
    Recovering(Instant),
}

/// foca's type has no `Debug` of its own.
struct SwimBox(Swim);

impl std::fmt::Debug for SwimBox {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Swim({})", self.0.identity())
    }
}

#[derive(Clone, Debug)]
enum Task {
    Swim { epoch: u32, timer: Timer<Identity> },
    Tick,
    Hello,
    Id,
    PushPull,
    Leave(u8),
}

/// Everything that can be put into a [`Membership`] from outside, so that a driver can record it and a test replay it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Input {
    /// [`Membership::handle_datagram`].
    Datagram {
        /// Its source address.
        from: SocketAddr,
        /// As received.
        bytes: Vec<u8>,
    },
    /// [`Membership::handle_timeout`].
    Timeout,
    /// [`Membership::handle_push_pull_reply`].
    PushPullReply(Vec<u8>),
    /// [`Membership::handle_echo_result`].
    Echo {
        /// Whose forwarder.
        peer: u32,
        /// Whether it answered.
        ok: bool,
    },
    /// [`Membership::set_forwarder_alive`].
    ForwarderAlive(bool),
    /// [`Membership::update_metadata`].
    Metadata(Metadata),
    /// [`Membership::leave`].
    Leave,
    /// [`Membership::begin_leave`].
    BeginLeave,
    /// [`Membership::report_done`].
    Done(Digest),
}

impl Membership {
    /// A member that starts to look for the others. `rng_seed` must come from the operating system: it salts the datagram keys.
    pub fn new(config: Config, rng_seed: u64, now: Instant) -> Result<Self, ConfigError> {
        config.validate()?;
        let mut rng = StdRng::seed_from_u64(rng_seed);
        let life = Life { sender: config.id, session: config.session, salt: rng.random() };
        let seal = Seal::new(&config.keys, &config.cluster, life)
            .ok_or(ConfigError::Timing("the cryptographic library refuses to derive a key"))?;
        let identity = Identity { id: config.id, address: config.address, boot: config.boot, generation: 0 };
        let board = Board::new(config.id);
        let swim_rng = StdRng::seed_from_u64(rng.random());
        let timing_digest = timing_digest(&config.timing);
        let mut this = Self {
            timing_digest,
            shared_digest: config.shared.digest(timing_digest),
            swim: SwimBox(swim::new(identity, &config.timing, swim_rng, board.clone())),
            epoch: 0,
            io: Io::default(),
            board,
            rng,
            seal,
            tasks: BTreeMap::new(),
            sequence: 0,
            transmits: VecDeque::new(),
            events: VecDeque::new(),
            counters: Counters::default(),
            state: MemberState::Joining,
            weight: 0,
            serial: 0,
            wish: None,
            done: Digest::default(),
            waiting: change::Waiting::default(),
            met: BTreeMap::new(),
            departed: false,
            started: now,
            version: 0,
            published: None,
            publish_soon: false,
            view: View::default(),
            signature: 0,
            rebuild: true,
            links: Links::Sound,
            acquaintances: BTreeMap::new(),
            echo_losses: BTreeMap::new(),
            slow_answers: BTreeMap::new(),
            told_doubted: BTreeMap::new(),
            suspected_since: BTreeMap::new(),
            heard: BTreeMap::new(),
            warned_backends: BTreeMap::new(),
            warned_shared: BTreeMap::new(),
            pings: VecDeque::new(),
            lease: None,
            unheard: false,
            frozen: None,
            joining: join::Joining::default(),
            config,
        };
        this.publish(now);
        let interval = this.config.id_interval;
        // Spread, so that members started together do not all speak at once for ever.
        let first_id = this.jitter(interval);
        this.schedule(now + first_id, Task::Id);
        let first_push_pull = this.jitter(this.config.timing.push_pull);
        this.schedule(now + first_push_pull, Task::PushPull);
        this.schedule(now, Task::Hello);
        this.schedule(now + this.config.timing.gossip_interval, Task::Tick);
        this.settle(now);
        Ok(this)
    }

    /// The members that are not confirmed down, this one included.
    pub fn view(&self) -> &View {
        &self.view
    }

    /// Who we are now.
    pub fn identity(&self) -> Identity {
        *self.swim.0.identity()
    }

    /// Where we stand.
    pub fn state(&self) -> MemberState {
        self.state
    }

    /// Whether this start goes on with an earlier one's flow table ([`Config::resume`]) and has not met the others yet: until then the view
    /// is of no use, and the lease is the one that the earlier start had.
    pub fn is_resuming(&self) -> bool {
        self.config.resume && self.state == MemberState::Joining
    }

    /// Until when this member may own. `None` before the first proof that others hear it, and while the forwarder is not alive.
    ///
    /// Renewed by every answer to a probe, from the time the probe was sent, and while nobody else is known, or only such as ask
    /// to join.
    /// Runs out before the others confirm this member down ([`crate::Timing::lease`]).
    pub fn lease_valid_until(&self) -> Option<Instant> {
        if self.frozen.is_some() || self.departed || self.is_resuming() { None } else { self.lease }
    }

    /// What happened so far.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Any input; what it answers, for a push-pull request, comes from [`Self::handle_push_pull`] only.
    pub fn handle(&mut self, now: Instant, input: Input) {
        match input {
            Input::Datagram { from, bytes } => self.handle_datagram(now, from, &bytes),
            Input::Timeout => self.handle_timeout(now),
            // What a broken reply changes is nothing, and who replays one knows.
            Input::PushPullReply(bytes) => drop(self.handle_push_pull_reply(now, &bytes)),
            Input::Echo { peer, ok } => self.handle_echo_result(now, MemberId(peer), ok),
            Input::ForwarderAlive(alive) => self.set_forwarder_alive(now, alive),
            // Likewise: metadata too long changes nothing.
            Input::Metadata(metadata) => drop(self.update_metadata(now, metadata)),
            Input::Leave => self.leave(now),
            Input::BeginLeave => self.begin_leave(now),
            Input::Done(name) => self.report_done(now, name),
        }
    }

    /// A datagram arrived on the gossip socket.
    pub fn handle_datagram(&mut self, now: Instant, from: SocketAddr, datagram: &[u8]) {
        self.catch_up(now);
        self.counters.received += 1;
        if self.frozen.is_some() || self.departed {
            self.counters.not_alive += 1;
            return;
        }
        self.receive(now, from, datagram);
        self.settle(now);
    }

    /// The time of [`Self::poll_timeout`] has come.
    pub fn handle_timeout(&mut self, now: Instant) {
        self.catch_up(now);
        if self.frozen.is_some() {
            return;
        }
        while let Some(entry) = self.tasks.first_entry().filter(|entry| entry.key().0 <= now) {
            let task = entry.remove();
            self.run(now, task);
        }
        self.settle(now);
    }

    /// A peer's push-pull request arrived on an authenticated stream; returns the reply.
    pub fn handle_push_pull(&mut self, now: Instant, request: &[u8]) -> Result<Vec<u8>, PushPullError> {
        self.apply_push_pull(now, request)?;
        Ok(self.push_pull_request())
    }

    /// The reply to our push-pull request arrived.
    pub fn handle_push_pull_reply(&mut self, now: Instant, reply: &[u8]) -> Result<(), PushPullError> {
        self.apply_push_pull(now, reply)
    }

    /// An echo through `peer`'s forwarder came back, or did not in time. One a probe period is expected.
    pub fn handle_echo_result(&mut self, now: Instant, peer: MemberId, ok: bool) {
        self.catch_up(now);
        if !self.is_member(peer) {
            return;
        }
        let losses = self.echo_losses.entry(peer).or_default();
        let failing = *losses >= ECHO_LOSSES;
        *losses = if ok { 0 } else { losses.saturating_add(1) };
        if failing != (*losses >= ECHO_LOSSES) {
            self.rebuild = true;
            if !failing {
                self.events.push_back(Event::Warning(Warning::EchoFails(peer)));
            }
        }
        self.settle(now);
    }

    /// Says something new of ourselves. Counters are told with the next ID message, everything else at once; another weight is a
    /// planned change, and in force when the others have made ready for it.
    pub fn update_metadata(&mut self, now: Instant, metadata: Metadata) -> Result<(), ConfigError> {
        metadata.validate()?;
        self.publish_soon |= self.config.metadata.differs_from(&metadata);
        self.config.metadata = metadata;
        self.wish_weight(now);
        self.publish_if_due(now);
        self.settle(now);
        Ok(())
    }

    /// Replaces the cluster keys.
    pub fn set_keys(&mut self, keys: &KeyRing) {
        self.seal.set_keys(keys);
        self.config.keys = keys.clone();
    }

    /// Replaces what must be equal everywhere, while a change is rolled out: members stay members, joiners are measured by it.
    pub fn set_shared(&mut self, shared: Shared) {
        self.shared_digest = shared.digest(self.timing_digest);
        self.config.shared = shared;
        self.warned_shared.clear();
    }

    /// The data address has changed; the same member with its state.
    pub fn change_address(&mut self, now: Instant, address: SocketAddr) -> Result<(), ConfigError> {
        if address.ip().is_unspecified() || address.port() == 0 {
            return Err(ConfigError::Address(address));
        }
        if address != self.config.address {
            self.config.address = address;
            let renewed = Identity { address, ..self.identity().renewed_beyond(0) };
            self.change_identity(now, renewed);
            self.settle(now);
        }
        Ok(())
    }

    /// Whether the forwarder answers its own driver. While it does not, this member neither hears nor says anything, so that the others
    /// suspect it as if it were gone: alive means the packet path is.
    pub fn set_forwarder_alive(&mut self, now: Instant, alive: bool) {
        match (self.frozen, alive) {
            (None, false) => {
                self.catch_up(now);
                self.frozen = Some(now);
            }
            (Some(since), true) => {
                self.frozen = None;
                self.shift(now.saturating_duration_since(since));
                self.settle(now);
            }
            _ => {}
        }
    }

    /// Turns active at once, asking nobody, if [`Config::hold_joining`] kept it from doing so by itself.
    pub fn activate(&mut self, now: Instant) {
        if self.state == MemberState::Joining {
            self.activate_alone(now);
            self.settle(now);
        }
    }

    /// Asks to rank no more, and stays to hand over what it holds. [`Event::StateChanged`] says when the others have made ready.
    pub fn begin_leave(&mut self, now: Instant) {
        match self.state {
            MemberState::Joining => {
                self.wish = None;
                self.enter(now, MemberState::Leaving);
            }
            MemberState::Active if self.wish.is_none_or(|wish| wish.active) => self.wish_to_leave(now),
            MemberState::Active | MemberState::Leaving => return,
        }
        self.settle(now);
    }

    /// Goes. [`Event::Left`] comes when the others have been told.
    pub fn leave(&mut self, now: Instant) {
        // Who leaves says so, whatever became of its forwarder.
        self.set_forwarder_alive(now, true);
        if self.state != MemberState::Leaving {
            self.wish = None;
            self.enter(now, MemberState::Leaving);
            self.settle(now);
        }
        // The word that we leave goes ahead of the word that we are down, so that the others know the reason.
        self.drive(now, |swim, io| swim.gossip(io));
        self.schedule(now + self.config.timing.gossip_interval * LEAVE_AHEAD, Task::Leave(0));
    }

    /// Our whole state, to send to a peer; also the reply to its request.
    pub fn push_pull_request(&self) -> Vec<u8> {
        let members = self.swim.0.iter_members().take(MAX_PUSH_PULL_MEMBERS - 1).cloned();
        let items = self.board.lock();
        let message = PushPull {
            shared: self.shared_digest,
            from: self.identity(),
            // Who is down is left out: across a healing partition each side would condemn the other again.
            members: members.collect(),
            items: items
                .iter()
                .filter(|item| item.head.id == self.config.id || self.view.get(item.head.id).is_some())
                .take(MAX_PUSH_PULL_MEMBERS)
                .map(|item| item.bytes.to_vec())
                .collect(),
        };
        encode(&message)
    }

    /// What to send next.
    pub fn poll_transmit(&mut self) -> Option<Transmit> {
        self.transmits.pop_front()
    }

    /// What happened next.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// When to call [`Self::handle_timeout`]; `None` while there is nothing to wait for.
    pub fn poll_timeout(&self) -> Option<Instant> {
        if self.frozen.is_some() {
            return None;
        }
        self.tasks.first_key_value().map(|((at, _), _)| *at)
    }

    // Time.

    fn schedule(&mut self, at: Instant, task: Task) {
        self.sequence += 1;
        self.tasks.insert((at, self.sequence), task);
    }

    /// Between half of `interval` and all of it.
    fn jitter(&mut self, interval: Duration) -> Duration {
        interval.mul_f64(self.rng.random_range(0.5..=1.0))
    }

    /// If this process did not run in time, behaves as if time had stood still: what others sent meanwhile waits in the socket, and
    /// must be heard before they are judged by their silence.
    fn catch_up(&mut self, now: Instant) {
        if self.frozen.is_some() {
            return;
        }
        let Some(((deadline, _), _)) = self.tasks.first_key_value() else { return };
        let late = now.saturating_duration_since(*deadline);
        if late < self.config.timing.probe_timeout {
            return;
        }
        self.shift(late);
        self.counters.late += 1;
        if late > self.config.timing.lease {
            self.counters.stalls += 1;
            self.events.push_back(Event::Stalled { late });
        }
    }

    /// Puts off everything that was to happen by the time this member neither ran nor heard anybody. That includes turning active alone:
    /// the silence of seeds counts only while their answers could have been heard.
    fn shift(&mut self, by: Duration) {
        self.started += by;
        self.joining.put_off(by);
        if let Links::Recovering(until) = &mut self.links {
            *until += by;
        }
        let tasks = std::mem::take(&mut self.tasks);
        self.tasks = tasks.into_iter().map(|((at, sequence), task)| ((at + by, sequence), task)).collect();
    }

    fn run(&mut self, now: Instant, task: Task) {
        match task {
            Task::Swim { epoch, timer } if epoch == self.epoch => {
                self.drive(now, |swim, io| swim::handle_timer(swim, io, timer));
            }
            // Of a foca that is no more.
            Task::Swim { .. } => {}
            _ if self.departed && !matches!(task, Task::Leave(_)) => {}
            Task::Tick => {
                self.joining.may_answer_stale = true;
                self.publish_if_due(now);
                self.notice_unheard(now);
                self.rebuild |= matches!(self.links, Links::Recovering(until) if until <= now);
                self.schedule(now + self.config.timing.gossip_interval, Task::Tick);
            }
            Task::Hello => self.hello(now),
            Task::Id => {
                self.publish(now);
                self.forget_strangers();
                let stretch = (self.view.members.len() / ID_CROWD).max(1) as u32;
                self.schedule(now + self.config.id_interval * stretch, Task::Id);
            }
            Task::PushPull => {
                self.wish_push_pull();
                let next = self.jitter(self.config.timing.push_pull);
                self.schedule(now + next, Task::PushPull);
            }
            Task::Leave(0) => {
                self.drive(now, |swim, io| swim.leave_cluster(io));
                self.departed = true;
                self.schedule(now + self.config.timing.gossip_interval, Task::Leave(1));
            }
            Task::Leave(step) if step < LEAVE_REPEATS => {
                self.drive(now, |swim, io| swim.gossip(io));
                self.schedule(now + self.config.timing.gossip_interval, Task::Leave(step + 1));
            }
            Task::Leave(_) => {
                self.tasks.clear();
                self.events.push_back(Event::Left);
            }
        }
    }

    // foca.

    /// Lets foca handle one input and carries out what it asks for.
    fn drive(
        &mut self,
        now: Instant,
        input: impl FnOnce(&mut Swim, &mut Io) -> Result<(), foca::Error>,
    ) -> bool {
        // Its errors are either bad input, which the caller counts, or a probe cycle that lost its timers, from which it recovers.
        let before = *self.swim.0.identity();
        let good = input(&mut self.swim.0, &mut self.io).is_ok();
        if before != *self.swim.0.identity() {
            // With another identity foca 2.0.0 probes nobody until it hears from somebody. If those it holds to be up are gone, nobody speaks.
            drop(self.swim.0.apply_many(std::iter::empty(), false, &mut self.io));
        }
        let io = std::mem::take(&mut self.io);
        for (number, to) in io.pings {
            self.pings.push_back(Ping { number, to, at: now });
            if self.pings.len() > PINGS_KEPT {
                self.pings.pop_front();
            }
        }
        for (number, from) in io.acks {
            self.answered(now, number, from);
        }
        self.counters.failed_probes += io.failed_probes;
        self.counters.renewals += io.renewals;
        for (timer, after) in io.timers {
            let epoch = self.epoch;
            self.schedule(now + after, Task::Swim { epoch, timer });
        }
        for (to, bytes) in io.sends {
            self.send(to.address, KIND_FOCA, &bytes);
        }
        good
    }

    /// A probe was answered: proof that others hear us, as of when it was sent.
    fn answered(&mut self, now: Instant, number: foca::ProbeNumber, from: MemberId) {
        let Some(at) = self.pings.iter().position(|ping| ping.number == number && ping.to == from) else {
            return;
        };
        let Some(ping) = self.pings.remove(at) else { return };
        let lease = ping.at + self.config.timing.lease;
        self.lease = Some(self.lease.map_or(lease, |until| until.max(lease)));
        self.unheard = false;
        let round_trip = now.saturating_duration_since(ping.at);
        let slow = self.slow_answers.entry(from).or_default();
        if round_trip <= self.config.timing.probe_timeout / 2 {
            *slow = 0;
        } else if *slow <= SLOW_ANSWERS {
            *slow += 1;
            if *slow == SLOW_ANSWERS {
                self.events.push_back(Event::Warning(Warning::SlowPath {
                    id: from,
                    round_trip,
                    probe_timeout: self.config.timing.probe_timeout,
                    profile: self.config.timing.name.clone(),
                }));
            }
        }
    }

    fn notice_unheard(&mut self, now: Instant) {
        let renewed_late = |until| now + self.config.timing.lease / 2 >= until;
        if !self.unheard && self.lease.is_some_and(renewed_late) {
            self.unheard = true;
            self.events.push_back(Event::Unheard);
        }
    }

    fn change_identity(&mut self, now: Instant, identity: Identity) {
        self.drive(now, |swim, io| swim.change_identity(identity, io));
        self.rebuild = true;
    }

    /// Starts foca anew with the next generation: nobody is left that knew the old one, and what it would tell of the others (that they
    /// are down) would make them all rejoin once we meet again.
    fn forget_everyone(&mut self) {
        let identity = self.identity().renewed_beyond(0);
        let rng = StdRng::seed_from_u64(self.rng.random());
        self.epoch = self.epoch.wrapping_add(1);
        self.swim = SwimBox(swim::new(identity, &self.config.timing, rng, self.board.clone()));
        self.pings.clear();
        self.rebuild = true;
    }

    fn send(&mut self, to: SocketAddr, kind: u8, body: &[u8]) {
        let digest = self.shared_digest.0.to_be_bytes();
        if let Some(payload) = self.seal.sealer.seal(&[&[kind], &digest, body]) {
            self.counters.sent += 1;
            self.counters.sent_bytes += payload.len() as u64;
            self.transmits.push_back(Transmit { to, payload });
        }
    }

    fn send_control(&mut self, to: SocketAddr, message: &crate::wire::Control) {
        self.send(to, KIND_CONTROL, &encode(message));
    }
}

/// Everything we encode is ours, and `postcard` into a vector fails only for types it cannot describe.
fn encode<T: Serialize>(message: &T) -> Vec<u8> {
    postcard::to_stdvec(message).unwrap_or_default()
}
