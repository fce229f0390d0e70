//! The control task: the one place where views, flows, health and the operator's wishes meet.
//!
//! ```text
//!   MembershipEvent ─┐                        ┌─► Planner ──► forwarder.install, next hops
//!   PeerEvent ───────┼─► Control (one task) ──┤
//!   HealthChange ────┤     every TICK:        ├─► Replicator ──► peers, forwarder's tables
//!   Request ─────────┘     forwarder events ──┘
//! ```
//! All channels are unbounded: their senders are few and slow (a view, a health change), or bounded by the replicator's windows (frames).
//! Every arm of the select is cancel-safe: channel receives and an interval.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use phalanx_flow::member::Liveness;
use phalanx_flow::slots::RankedBackend;
use phalanx_flow::{BackendId, FlowEvent, FlowEventKind, FlowKey, FlowState, MemberId, Record};
use phalanx_forwarder::{Forwarder, RowSet, Upserted};
use phalanx_membership::{Event as MemberEvent, KeyRing, MemberState, Metadata, View, Warning};
use phalanx_rebalancer::{
    Apply, ApplyBatch, ApplyResult, Change, Event as ReplicationEvent, Policy, Ranking, Replicator,
    ViewInput, changed_rows, former_entries, plan, plan_cache_offers, plan_refill,
};
use tokio::sync::{mpsc, oneshot};

use super::membership::{Command, MembershipDriver, MembershipEvent};
use super::next_hops::NextHopDriver;
use super::peers::{Link, Peer, PeerEvent, Peers};
use super::planner::{Planner, TableChange};
use super::status::{Shared, Status};
use crate::config::{CacheMode, Config, ServiceConfig};
use crate::health::{Candidate, HealthChange, HealthDriver, usable_backends};

/// How often the forwarder's events are taken: the delay a flow is unprotected for at least, against wakeups.
const TICK: Duration = Duration::from_millis(2);

/// Events taken at once, so that a burst does not keep views and frames waiting.
const EVENTS_A_TICK: usize = 16_384;

/// The status for admin and the gossiped counters are made anew this often.
const STATUS_EVERY: Duration = Duration::from_millis(250);
const METADATA_EVERY: Duration = Duration::from_secs(1);

/// Other members' transfers have had this long when a member drops what it holds no more.
const SWEEP_AFTER: Duration = Duration::from_secs(1);

/// How long a leaving member waits for its transfers and for the others to switch before it goes anyway, and how long it stays after
/// that for packets that were on their way.
const LEAVE_AT_MOST: Duration = Duration::from_secs(10);
const LEAVE_GRACE: Duration = Duration::from_millis(500);

/// A warning that was said once is shown for this long.
const WARNING_KEPT: Duration = Duration::from_secs(60);

/// What clients send at the most: Ethernet's MTU.
const CLIENT_MTU: u16 = 1500;

/// What peers ask by [`Peers::request`].
#[derive(Debug, serde::Serialize, serde::Deserialize)]
pub enum Question {
    /// The whole membership, ours first.
    PushPull(Vec<u8>),
    /// What do you hold of this flow?
    Flow {
        /// Client.
        source: std::net::SocketAddr,
        /// Service.
        destination: std::net::SocketAddr,
        /// IP protocol number.
        protocol: u8,
    },
}

/// A holder's answer to [`Question::Flow`].
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub struct HeldFlow {
    /// Its backend.
    pub backend: std::net::IpAddr,
    /// [`FlowState`] by number.
    pub state: u8,
    /// Nobody knew it once.
    pub recovered: bool,
    /// The backup has acknowledged it.
    pub protected: bool,
    /// Milliseconds since its last packet.
    pub idle_ms: u32,
}

impl HeldFlow {
    /// What a record tells a peer that asks.
    pub fn of(record: &Record) -> Self {
        Self {
            backend: record.backend.ip(),
            state: record.state as u8,
            recovered: record.flags.has(phalanx_flow::FlowFlags::RECOVERED),
            protected: record.flags.has(phalanx_flow::FlowFlags::PROTECTED),
            idle_ms: record.idle_ms,
        }
    }
}

/// What the operator asks.
#[derive(Debug)]
pub enum Request {
    /// Take over this configuration (SIGHUP).
    Reload(Box<Config>),
    /// The configuration has mistakes (which have been said): nothing changes.
    ReloadRefused,
    /// Leave the cluster, then end (SIGTERM).
    Leave,
    /// What the tables say of a flow.
    Explain(FlowKey, oneshot::Sender<super::status::FlowFacts>),
}

/// Why the control task has ended.
#[derive(Debug)]
pub enum End {
    /// It has left the cluster.
    Left,
    /// The cluster refuses it; the sentence says why.
    Refused(String),
}

/// What new flows of a service go to, by configuration and health; and whether that is all of them for want of a healthy one.
pub fn usable_of(
    service: &ServiceConfig,
    healthy: impl Fn(&BackendId) -> bool,
) -> (Vec<RankedBackend>, bool) {
    let ids: Vec<BackendId> = service.backends.iter().map(|backend| service.backend_id(backend)).collect();
    let candidates: Vec<Candidate> = service
        .backends
        .iter()
        .zip(&ids)
        .map(|(backend, id)| Candidate { weight: backend.effective_weight(), healthy: healthy(id) })
        .collect();
    let usable = usable_backends(&candidates);
    let backends = ids
        .into_iter()
        .zip(usable.weights)
        .filter(|(_, weight)| *weight > 0)
        .map(|(id, weight)| RankedBackend { id, weight })
        .collect();
    (backends, usable.fail_open)
}

/// Everything the control task owns.
pub struct Control {
    /// The configuration in force.
    pub config: Config,
    /// Makes plans.
    pub planner: Planner,
    /// Says what to tell whom.
    pub replicator: Replicator,
    /// Carries packets.
    pub forwarder: Arc<dyn Forwarder>,
    /// Resolves next hops.
    pub next_hops: NextHopDriver,
    /// Talks to peers.
    pub peers: Peers,
    /// Drives the membership.
    pub membership: MembershipDriver,
    /// Says what of itself.
    pub metadata: Metadata,
    /// What the admin API shows.
    pub shared: Arc<Shared>,
    /// Checks backends.
    pub checks: HealthDriver,
    /// Health by service (its name) and backend; absent: not checked, which counts as healthy.
    health: HashMap<(String, BackendId), bool>,
    state: State,
}

/// What changes as the task runs.
#[derive(Default)]
struct State {
    view: Arc<View>,
    links: HashMap<MemberId, Link>,
    window_opened: Option<Instant>,
    /// When entries that neither the current table nor the one before gives us are to be dropped.
    sweep_at: Option<Instant>,
    transferring: bool,
    leaving_since: Option<Instant>,
    ready_to_leave_at: Option<Instant>,
    left: bool,
    events_lost: u64,
    warnings: BTreeMap<String, Instant>,
    view_changes: u64,
    counters: super::status::DriverCounters,
}

/// The channels the control task listens on.
pub struct Inboxes {
    /// From the membership driver.
    pub membership: mpsc::UnboundedReceiver<MembershipEvent>,
    /// From peers.
    pub peers: mpsc::UnboundedReceiver<PeerEvent>,
    /// From the health checks.
    pub health: mpsc::UnboundedReceiver<HealthChange>,
    /// From the operator.
    pub requests: mpsc::UnboundedReceiver<Request>,
}

/// The parts of a [`Control`] that is about to start.
#[expect(clippy::too_many_arguments, reason = "each driver is started by whoever knows its settings")]
pub fn control(
    config: Config,
    planner: Planner,
    replicator: Replicator,
    forwarder: Arc<dyn Forwarder>,
    next_hops: NextHopDriver,
    peers: Peers,
    membership: MembershipDriver,
    metadata: Metadata,
    shared: Arc<Shared>,
    checks: HealthDriver,
) -> Control {
    Control {
        config,
        planner,
        replicator,
        forwarder,
        next_hops,
        peers,
        membership,
        metadata,
        shared,
        checks,
        health: HashMap::new(),
        state: State::default(),
    }
}

impl Control {
    /// Runs until the member has left or was refused.
    pub async fn run(mut self, mut inboxes: Inboxes) -> End {
        let (reply_sender, mut replies) = mpsc::unbounded_channel();
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut status_at = Instant::now();
        let mut metadata_at = Instant::now();
        loop {
            tokio::select! {
                Some(event) = inboxes.membership.recv() => {
                    if let Some(end) = self.handle_membership(event, &reply_sender) {
                        return self.end(end).await;
                    }
                }
                Some(event) = inboxes.peers.recv() => {
                    self.handle_peer(event);
                    // Frames come in bunches: one round of the replicator serves many.
                    for _ in 0..256 {
                        match inboxes.peers.try_recv() {
                            Ok(event) => self.handle_peer(event),
                            Err(_) => break,
                        }
                    }
                }
                Some(reply) = replies.recv() => self.membership.command(Command::PushPullReply(reply)),
                Some(change) = inboxes.health.recv() => self.handle_health(change),
                Some(request) = inboxes.requests.recv() => self.handle_request(request),
                _ = tick.tick() => {}
            }
            let now = Instant::now();
            self.take_events(now);
            if self.replicator.poll_timeout().is_some_and(|due| due <= now) {
                self.replicator.handle_timeout(now);
            }
            self.drain(now);
            if self.planner.settle(now) {
                self.install();
            }
            self.close_window_if_due(now);
            self.sweep_if_due(now);
            self.leave_if_due(now);
            if status_at <= now {
                status_at = now + STATUS_EVERY;
                self.publish_status(now);
            }
            if metadata_at <= now {
                metadata_at = now + METADATA_EVERY;
                self.publish_metadata();
                self.check_paths(now);
            }
        }
    }

    async fn end(self, end: End) -> End {
        self.peers.shutdown().await;
        self.forwarder.renew_lease(Duration::ZERO);
        end
    }

    // Membership.

    fn handle_membership(
        &mut self,
        event: MembershipEvent,
        replies: &mpsc::UnboundedSender<Vec<u8>>,
    ) -> Option<End> {
        match event {
            MembershipEvent::View(view) => self.handle_view(view),
            MembershipEvent::PushPull(with, request) => {
                let (peers, replies) = (self.peers.clone(), replies.clone());
                tokio::spawn(async move {
                    let Ok(question) = postcard::to_stdvec(&Question::PushPull(request)) else { return };
                    match peers.request(with, &question).await {
                        Ok(reply) => drop(replies.send(reply)),
                        Err(error) => tracing::debug!(%with, "push-pull: {error:#}"),
                    }
                });
            }
            MembershipEvent::Counters(counters, echoes_lost) => {
                self.state.counters.membership = counters;
                self.state.counters.echoes_lost = echoes_lost.into_iter().collect();
            }
            MembershipEvent::Event(event) => return self.handle_member_event(event),
        }
        None
    }

    fn handle_member_event(&mut self, event: MemberEvent) -> Option<End> {
        match event {
            MemberEvent::Refused { by, reason } => return Some(End::Refused(reason.sentence(by))),
            MemberEvent::Left => return Some(End::Left),
            MemberEvent::Warning(warning) => {
                tracing::warn!("{warning}");
                // The others stand in the view for as long as they hold: see `standing_warnings`.
                if matches!(warning, Warning::SharedDiffers { .. } | Warning::SlowPath { .. }) {
                    self.state.warnings.insert(warning.to_string(), Instant::now());
                }
            }
            MemberEvent::MemberUp(id) => tracing::info!(member = %id, "a member came"),
            MemberEvent::MemberDown { id, reason } => tracing::info!(member = %id, ?reason, "a member went"),
            MemberEvent::Liveness { id, liveness } => tracing::info!(member = %id, ?liveness, "liveness"),
            MemberEvent::StateChanged(state) => tracing::info!(?state, "our own state"),
            other => tracing::debug!(?other, "membership"),
        }
        None
    }

    fn handle_view(&mut self, view: Arc<View>) {
        let now = Instant::now();
        let digest_changed = view.digest != self.state.view.digest;
        self.state.view = Arc::clone(&view);
        let change = match self.planner.set_view(&view) {
            Ok(change) => change,
            Err(error) => {
                tracing::error!("the view cannot be ranked: {error}");
                return;
            }
        };
        if digest_changed || change.is_some() {
            self.state.view_changes += 1;
            tracing::info!(digest = format!("{:016x}", view.digest.0), members = view.members.len(), "view");
        }
        self.install();
        let local = self.config.member.id;
        let peers: Vec<Peer> = view
            .members
            .iter()
            .filter(|member| member.id != local && member.known)
            .filter_map(|member| {
                Some(Peer {
                    id: member.id,
                    address: member.metadata.transfer_address?,
                    fingerprint: member.metadata.fingerprint,
                })
            })
            .collect();
        self.peers.set_peers(&peers);
        let slots = view.members.iter().map(|member| (member.id, self.planner.slot_of(member.id))).collect();
        self.membership.command(Command::Slots(slots));
        self.replicator.handle_view(now, self.view_input(&view));
        if let Some(change) = change {
            self.move_flows(&change, now);
        }
    }

    fn view_input(&self, view: &View) -> ViewInput {
        let of = |wanted: &dyn Fn(&phalanx_membership::MemberView) -> bool| -> BTreeSet<MemberId> {
            view.members.iter().filter(|member| wanted(member)).map(|member| member.id).collect()
        };
        let cluster = &self.config.cluster;
        ViewInput {
            ranking: self.planner.current(),
            previous: self.planner.previous().map(|table| table as Arc<dyn Ranking>),
            live: of(&|_| true),
            suspects: of(&|member| member.liveness != Liveness::Alive),
            caches: of(&|member| member.metadata.cache),
            policy: match cluster.replicate {
                crate::config::Replicate::Established => Policy::Established,
                crate::config::Replicate::Syn => Policy::Syn,
            },
            enabled: cluster.replication,
        }
    }

    /// Sends our part of a change's transfer tables (claims 19 and 20).
    fn move_flows(&mut self, table_change: &TableChange, now: Instant) {
        // What the forwarder recorded until now belongs to the tables that are sent.
        self.take_events(now);
        let caches: BTreeSet<MemberId> = self
            .state
            .view
            .members
            .iter()
            .filter(|member| member.metadata.cache)
            .map(|member| member.id)
            .collect();
        let change = Change {
            local: self.config.member.id,
            old: &*table_change.old,
            new: &*table_change.new,
            survivors: &table_change.survivors,
            caches: &caches,
        };
        let rows = RowSet::from_rows(changed_rows(&change));
        let mut records = Vec::new();
        self.forwarder.visit(&rows, &mut |record| records.push(*record));
        let transfer = plan(&change, records);
        tracing::info!(records = transfer.len(), "transfer tables");
        self.replicator.begin_transfer(now, transfer);
        if table_change.departed && self.config.member.cache == CacheMode::All {
            let cached = self.forwarder.flush_cache();
            self.replicator.begin_transfer(now, plan_cache_offers(&change, cached.iter().copied()));
            if !self.config.cluster.flush_on_leave {
                self.forwarder.upsert_cache(&cached);
            }
        }
        self.state.transferring = true;
        self.state.window_opened = self.planner.previous().map(|_| now);
        self.state.sweep_at = Some(now + SWEEP_AFTER);
    }

    /// The window closes when every active member has gossiped the new digest, our transfers are done, and one linger has passed.
    fn close_window_if_due(&mut self, now: Instant) {
        let Some(opened) = self.state.window_opened else { return };
        let linger = self.config.services.iter().map(|service| service.linger).max().unwrap_or_default();
        if now.duration_since(opened) < linger || self.state.transferring || !self.everybody_switched() {
            return;
        }
        self.state.window_opened = None;
        self.planner.close_window();
        self.install();
        self.replicator.handle_view(now, self.view_input(&Arc::clone(&self.state.view)));
        let dropped = self.drop_former();
        tracing::info!(dropped, "handover window closed");
    }

    /// Two changes after it lost a row, a member is told nothing of its flows any more: what it still has of them goes when its transfers
    /// are done, lest it be used when a client uses a tuple again.
    fn sweep_if_due(&mut self, now: Instant) {
        if self.state.sweep_at.is_some_and(|at| at <= now) && !self.state.transferring {
            self.state.sweep_at = None;
            let dropped = self.drop_former();
            tracing::debug!(dropped, "entries of rows lost two changes ago");
        }
    }

    /// Drops the entries that neither the current table nor the one before gives us, and says how many.
    fn drop_former(&mut self) -> usize {
        let local = self.config.member.id;
        let (current, previous) = (self.planner.current(), self.planner.previous());
        let mut births = HashMap::new();
        self.forwarder.visit(&RowSet::All, &mut |record| {
            births.insert(record.key, record.birth);
        });
        let former: Vec<FlowKey> = former_entries(local, &*current, births.keys().copied()).collect();
        let former: Vec<FlowKey> = match &previous {
            Some(previous) => former_entries(local, &**previous, former).collect(),
            None => former,
        };
        for key in &former {
            self.forwarder.remove(key, births[key], Duration::ZERO);
        }
        former.len()
    }

    fn everybody_switched(&self) -> bool {
        let view = &self.state.view;
        view.members
            .iter()
            .filter(|member| member.state == MemberState::Active && member.id != self.config.member.id)
            .all(|member| member.view_digest == view.digest)
    }

    fn leave_if_due(&mut self, now: Instant) {
        let Some(since) = self.state.leaving_since else { return };
        let handed_over = !self.state.transferring && self.everybody_switched();
        if (handed_over || now.duration_since(since) >= LEAVE_AT_MOST)
            && self.state.ready_to_leave_at.is_none()
        {
            self.state.ready_to_leave_at = Some(now + LEAVE_GRACE);
        }
        if self.state.ready_to_leave_at.is_some_and(|at| at <= now) && !self.state.left {
            self.state.left = true;
            self.membership.command(Command::Leave);
        }
    }

    // Peers.

    fn handle_peer(&mut self, event: PeerEvent) {
        let now = Instant::now();
        match event {
            PeerEvent::Connected(peer, link) => {
                tracing::debug!(%peer, "connected");
                self.state.links.insert(peer, link);
                self.replicator.handle_connected(now, peer);
            }
            PeerEvent::Disconnected(peer, link) => {
                if self.state.links.get(&peer) == Some(&link) {
                    self.state.links.remove(&peer);
                    self.replicator.handle_disconnected(now, peer);
                }
            }
            PeerEvent::Frame(from, link, bytes) => {
                if self.state.links.get(&from) == Some(&link)
                    && let Err(error) = self.replicator.handle_data(now, from, &bytes)
                {
                    tracing::warn!(%from, "frames from a peer: {error}");
                    self.peers.reset(from);
                }
            }
            PeerEvent::Request { body, reply, .. } => match postcard::from_bytes(&body) {
                Ok(Question::PushPull(request)) => self.membership.command(Command::PushPull(request, reply)),
                Ok(Question::Flow { source, destination, protocol }) => {
                    let held = FlowKey::new(
                        protocol,
                        (source.ip(), source.port()),
                        (destination.ip(), destination.port()),
                    )
                    .and_then(|key| self.forwarder.get(&key))
                    .map(|record| HeldFlow::of(&record));
                    if let Ok(answer) = postcard::to_stdvec(&held) {
                        let _ = reply.send(answer);
                    }
                }
                Err(error) => tracing::debug!("a peer's request: {error}"),
            },
        }
    }

    // Health, configuration.

    fn handle_health(&mut self, change: HealthChange) {
        let HealthChange { service, backend, healthy, reason } = change;
        tracing::info!(service, ?backend, healthy, reason, "health");
        self.update_backends();
    }

    /// What new flows of a service go to, by configuration and health; and whether that is all of them for want of a healthy one.
    fn usable(&self, service: &ServiceConfig) -> (Vec<RankedBackend>, bool) {
        usable_of(service, |id| self.health.get(&(service.name.clone(), *id)).copied().unwrap_or(true))
    }

    /// Brings the backend tables in line with configuration and health; half-open flows in slots that change are replicated first.
    pub fn update_backends(&mut self) {
        let now = Instant::now();
        self.health = self
            .checks
            .statuses()
            .into_iter()
            .map(|check| ((check.service, check.backend), check.healthy))
            .collect();
        let services = self.config.services.clone();
        let usable: Vec<Vec<RankedBackend>> = services.iter().map(|service| self.usable(service).0).collect();
        let mut changed = HashMap::new();
        for (index, backends) in usable.iter().enumerate() {
            if let Some(slots) = self.planner.slots_that_would_change(index, backends) {
                let service = &services[index];
                let (address, _) = phalanx_flow::key::octets(service.address);
                changed.insert((address, service.port.to_be_bytes(), service.protocol.number()), slots);
            }
        }
        if !changed.is_empty() {
            self.take_events(now);
            let mut half_open = Vec::new();
            let planner = &self.planner;
            self.forwarder.visit(&RowSet::All, &mut |record| {
                let key = &record.key;
                if record.state == FlowState::HalfOpen
                    && changed
                        .get(&(key.destination, key.destination_port, key.protocol))
                        .is_some_and(|slots| slots.contains(planner.slot(key)))
                {
                    half_open.push(*record);
                }
            });
            for record in half_open {
                let event = FlowEvent { kind: FlowEventKind::Changed, at_once: true, record };
                self.replicator.handle_event(now, event);
            }
            self.drain(now);
        }
        for (index, backends) in usable.iter().enumerate() {
            self.planner.set_usable(index, backends, now);
        }
        self.install();
    }

    fn handle_request(&mut self, request: Request) {
        match request {
            Request::Reload(config) => self.reload(*config),
            Request::ReloadRefused => self.state.counters.reloads_refused += 1,
            Request::Leave => {
                if self.state.leaving_since.is_none() {
                    tracing::info!("leaving the cluster");
                    self.state.leaving_since = Some(Instant::now());
                    self.membership.command(Command::BeginLeave);
                } else {
                    tracing::warn!("told to leave again: going without waiting for transfers");
                    self.state.ready_to_leave_at = Some(Instant::now());
                }
            }
            Request::Explain(key, reply) => {
                let facts = super::status::FlowFacts::of(self, &key);
                let _ = reply.send(facts);
            }
        }
    }

    fn reload(&mut self, config: Config) {
        let fixed = self.config.needs_restart(&config);
        if !fixed.is_empty() {
            tracing::warn!(
                "the new configuration changes {}: that takes a restart of this member; everything else is in force",
                fixed.join(", ")
            );
        }
        if let Err(error) = self.checks.reload(&config) {
            tracing::error!("the health checks stay as they were: {error}");
        }
        self.config.services = config.services;
        self.config.member.weight = config.member.weight;
        self.planner.set_services(&self.config.services);
        self.update_backends();
        self.membership.command(Command::Shared(self.config.cluster_digests().shared()));
        match KeyRing::new(config.cluster.keys.iter().map(|key| key.0).collect()) {
            Ok(keys) => {
                // Gossip first: it opens with every key of the file, so the order among members does not matter.
                self.membership.command(Command::Keys(keys.clone()));
                self.planner.set_keys(&keys);
                self.install();
                self.config.cluster.keys = config.cluster.keys;
            }
            Err(error) => tracing::error!("the keys stay as they were: cluster.key_file: {error}"),
        }
        self.publish_metadata();
        self.state.counters.reloads += 1;
        tracing::info!(services = self.config.services.len(), "configuration reloaded");
    }

    /// Installs the planner's plan and says whom to resolve.
    pub fn install(&mut self) {
        if let Err(error) = self.forwarder.install(self.planner.plan()) {
            tracing::error!("the forwarder refused a plan, the one before goes on: {error}");
            return;
        }
        self.next_hops.set_destinations(self.planner.destinations());
    }

    // Flows.

    fn take_events(&mut self, now: Instant) {
        let mut events = Vec::new();
        self.forwarder.poll_events(&mut events, EVENTS_A_TICK);
        for event in events {
            self.replicator.handle_event(now, event);
        }
        let lost = self.state.counters.forwarder_events_lost;
        if lost > self.state.events_lost {
            self.state.events_lost = lost;
            self.find_missed(now);
        }
    }

    /// The event queue overflowed: whatever is not stamped or not protected is looked at as if it had just changed.
    fn find_missed(&mut self, now: Instant) {
        let mut missed = Vec::new();
        self.forwarder.visit(&RowSet::All, &mut |record| {
            let protected = record.flags.has(phalanx_flow::FlowFlags::PROTECTED);
            if record.birth == 0 || (!protected && record.state != FlowState::HalfOpen) {
                missed.push(*record);
            }
        });
        tracing::warn!(flows = missed.len(), "events were lost; their flows were found by a scan");
        for record in missed {
            let kind = if record.birth == 0 { FlowEventKind::New } else { FlowEventKind::Changed };
            self.replicator.handle_event(now, FlowEvent { kind, at_once: false, record });
        }
    }

    /// Carries out whatever the replicator wants, until it wants nothing more.
    fn drain(&mut self, now: Instant) {
        loop {
            let mut idle = true;
            while let Some(batch) = self.replicator.poll_apply() {
                idle = false;
                let results = self.apply(&batch);
                self.replicator.handle_applied(now, batch.id, &results);
            }
            while let Some(lookup) = self.replicator.poll_lookup() {
                idle = false;
                let records: Vec<Option<Record>> =
                    lookup.keys.iter().map(|key| self.forwarder.get(key)).collect();
                self.replicator.handle_lookup(now, lookup.id, &records);
            }
            while let Some((to, frame)) = self.replicator.poll_message() {
                idle = false;
                if let Some(link) = self.state.links.get(&to) {
                    self.peers.send(to, *link, frame);
                }
            }
            while let Some(event) = self.replicator.poll_event() {
                idle = false;
                self.handle_replication(event, now);
            }
            if idle {
                return;
            }
        }
    }

    fn handle_replication(&mut self, event: ReplicationEvent, now: Instant) {
        match event {
            ReplicationEvent::AllDone => {
                self.state.transferring = false;
                tracing::info!("transfers done");
            }
            ReplicationEvent::TransferDone { to, .. } => {
                self.state.counters.transfers_done += 1;
                tracing::debug!(%to, "transfer done");
            }
            ReplicationEvent::TransferDropped { to, records } => {
                self.state.counters.transfers_given_up += 1;
                tracing::info!(%to, records, "transfer given up: its receiver is gone");
            }
            ReplicationEvent::PeerFull { peer, refused } => {
                tracing::warn!(%peer, refused, "a peer's table refuses flows; they stay unprotected");
            }
            ReplicationEvent::Overflow { peer } => {
                let mut records = Vec::new();
                self.forwarder.visit(&RowSet::All, &mut |record| records.push(*record));
                let refill = plan_refill(&*self.planner.current(), peer, records);
                tracing::warn!(%peer, records = refill.len(), "too much waited for a peer; it gets a table instead");
                self.state.transferring = true;
                self.replicator.begin_transfer(now, refill);
            }
        }
    }

    fn apply(&mut self, batch: &ApplyBatch) -> Vec<ApplyResult> {
        let mut results = Vec::with_capacity(batch.items.len());
        let mut upserts: Vec<Record> = Vec::new();
        for item in &batch.items {
            if let Apply::Upsert(record) = item {
                upserts.push(*record);
                continue;
            }
            self.upsert(&mut upserts, &mut results);
            results.push(self.apply_one(item));
        }
        self.upsert(&mut upserts, &mut results);
        results
    }

    /// Upserts what has gathered; backends that nobody here knew get a place in the plan first.
    fn upsert(&mut self, records: &mut Vec<Record>, results: &mut Vec<ApplyResult>) {
        if records.is_empty() {
            return;
        }
        let mut answers = self.forwarder.upsert(records);
        if answers.contains(&Upserted::UnknownBackend) {
            let mut new = false;
            for record in records.iter() {
                new |= self.planner.register(record.backend);
            }
            if new {
                self.install();
            }
            answers = self
                .forwarder
                .upsert(records)
                .into_iter()
                .zip(answers)
                // What the first round applied is stale in the second, and applied all the same.
                .map(|(second, first)| if first == Upserted::UnknownBackend { second } else { first })
                .collect();
        }
        results.extend(answers.into_iter().map(|answer| match answer {
            Upserted::Applied => ApplyResult::Applied,
            Upserted::Stale => ApplyResult::Stale,
            Upserted::Full => ApplyResult::Full,
            Upserted::UnknownBackend => ApplyResult::UnknownBackend,
        }));
        records.clear();
    }

    fn apply_one(&mut self, item: &Apply) -> ApplyResult {
        let done = |did: bool| if did { ApplyResult::Applied } else { ApplyResult::Stale };
        match *item {
            // Gathered by the caller.
            Apply::Upsert(_) => ApplyResult::Stale,
            Apply::Remove { key, birth, min_idle_ms } => {
                done(self.forwarder.remove(&key, birth, Duration::from_millis(u64::from(min_idle_ms))))
            }
            Apply::Touch { key, idle_ms } => {
                self.forwarder.touch(&[(key, idle_ms)]);
                ApplyResult::Applied
            }
            Apply::CacheUpsert(record) => {
                if self.planner.register(record.backend) {
                    self.install();
                }
                self.forwarder.upsert_cache(&[record]);
                ApplyResult::Applied
            }
            Apply::CacheRemove { key } => {
                self.forwarder.remove_cache(&[key]);
                ApplyResult::Applied
            }
            Apply::Stamp { key, birth } => done(self.forwarder.stamp(&key, birth)),
            Apply::Protect { key, birth, update } => {
                self.forwarder.protect(&key, birth, update);
                ApplyResult::Applied
            }
        }
    }

    // What others see.

    fn publish_metadata(&mut self) {
        let counters = self.forwarder.counters();
        self.metadata.weight = self.config.member.weight;
        self.metadata.flows = counters.flows;
        self.metadata.unprotected = self.replicator.unprotected() as u64;
        self.metadata.backends = phalanx_membership::Digest(self.config.cluster_digests().backends);
        self.membership.command(Command::Metadata(self.metadata.clone()));
    }

    /// Says where the path to a peer is too narrow for hand-offs of full-size packets, and what to set.
    fn check_paths(&mut self, now: Instant) {
        if self.config.cluster.handoff_fragment {
            return;
        }
        let family = if self.config.member.address.is_ipv4() { 4 } else { 6 };
        let needed = CLIENT_MTU + phalanx_flow::encap::hand_off_overhead(family);
        for peer in self.state.links.keys() {
            let Some(mtu) = self.peers.path_mtu(*peer).filter(|mtu| *mtu < needed) else { continue };
            let sentence = format!(
                "the path to member {peer} takes packets of {mtu} bytes, and hand-offs of full-size packets need {needed}: \
                 set the MTU between members to 1600, or cluster.handoff_fragment = true on every member"
            );
            if self.state.warnings.insert(sentence.clone(), now).is_none() {
                tracing::warn!("{sentence}");
            }
        }
    }

    /// What the view shows that the operator should mend, for as long as it does.
    fn standing_warnings(&self) -> impl Iterator<Item = String> + '_ {
        let view = &self.state.view;
        let others = view.members.iter().filter(|member| member.id != self.config.member.id && member.known);
        let of_members = others.flat_map(|member| {
            let differs = member.metadata.backends != self.metadata.backends;
            [
                differs.then(|| Warning::BackendsDiffer(member.id).to_string()),
                member.echo_failing.then(|| Warning::EchoFails(member.id).to_string()),
            ]
        });
        let of_us = view.distrusts_itself.then(|| Warning::DistrustsItself.to_string());
        of_members.chain([of_us]).flatten()
    }

    fn publish_status(&mut self, now: Instant) {
        self.state.warnings.retain(|_, at| now.duration_since(*at) < WARNING_KEPT);
        let forwarder = self.forwarder.counters();
        self.state.counters.forwarder_events_lost = forwarder.events_lost;
        let fail_open = self
            .config
            .services
            .iter()
            .map(|service| (service.name.clone(), self.usable(service).1))
            .collect();
        let status = Status {
            view: Arc::clone(&self.state.view),
            warnings: self.standing_warnings().chain(self.state.warnings.keys().cloned()).collect(),
            services: self.config.services.clone(),
            health: self.health.clone(),
            fail_open,
            forwarder,
            unresolved: self.next_hops.unresolved(),
            table: self.planner.current(),
            unprotected: self.replicator.unprotected() as u64,
            replication: *self.replicator.counters(),
            transfers: self.replicator.transfers().collect(),
            window_open: self.state.window_opened.is_some(),
            leaving: self.state.leaving_since.is_some(),
            view_changes: self.state.view_changes,
            counters: self.state.counters.clone(),
        };
        self.shared.status.store(Arc::new(status));
    }

    /// The view in force.
    pub fn view(&self) -> &View {
        &self.state.view
    }
}
