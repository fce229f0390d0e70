//! The control task: drives [`phalanx_control::Control`] with what comes from membership, peers, health checks and the operator.
//!
//! ```text
//!   MembershipEvent ─┐                        ┌─► forwarder: plans, tables (by the core itself)
//!   PeerEvent ───────┼─► ControlDriver ───────┤
//!   HealthChange ────┤   (one task) owns      ├─► Peers: frames
//!   Request ─────────┘   the Control core     └─► next hops, membership, status
//! ```
//! All channels are unbounded: their senders are few and slow (a view, a health change), or bounded by the replicator's windows (frames).
//! Every arm of the select is cancel-safe: channel receives and an interval.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use phalanx_control::{Control, Event as ControlEvent, Service};
use phalanx_flow::slots::RankedBackend;
use phalanx_flow::{BackendId, FlowKey, MemberId, Record};
use phalanx_forwarder::Forwarder;
use phalanx_membership::{Event as MemberEvent, KeyRing, Metadata, View, Warning};
use phalanx_rebalancer::Event as ReplicationEvent;
use tokio::sync::{mpsc, oneshot};

use super::membership::{Command, MembershipDriver, MembershipEvent};
use super::next_hops::NextHopDriver;
use super::peers::{Link, Peer, PeerEvent, Peers};
use super::resume;
use super::status::{Shared, Status};
use crate::config::{Config, OnFailure, ServiceConfig};
use crate::health::{Candidate, HealthChange, HealthDriver, usable_backends};

/// How often the forwarder's events are taken: the delay a flow is unprotected for at least, against wakeups.
const TICK: Duration = Duration::from_millis(2);

/// The status for admin and the gossiped counters are made anew this often.
const STATUS_EVERY: Duration = Duration::from_millis(250);
const METADATA_EVERY: Duration = Duration::from_secs(1);

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
    /// [`phalanx_flow::FlowState`] by number.
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

/// The services of a configuration as the core knows them.
pub fn services(config: &Config) -> Vec<Service> {
    config.services.iter().map(service_of).collect()
}

fn service_of(config: &ServiceConfig) -> Service {
    Service {
        address: config.address,
        port: config.port,
        protocol: config.protocol.number(),
        backends: config.backends.iter().map(|backend| config.backend_id(backend)).collect(),
        idle: config.idle_timeout,
        linger: config.linger,
        reset_linger: config.reset_linger,
        half_open: config.half_open_timeout,
        fragment: config.fragment,
    }
}

/// Everything the control task owns.
pub struct ControlDriver {
    /// The configuration in force.
    pub config: Config,
    /// Decides what to do.
    pub core: Control,
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
    pub health: HashMap<(String, BackendId), bool>,
    /// What changes as the task runs.
    pub state: State,
}

/// What changes as the task runs.
#[derive(Default)]
pub struct State {
    links: HashMap<MemberId, Link>,
    warnings: BTreeMap<String, Instant>,
    /// What the forwarder was told to remember.
    note: Vec<u8>,
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

impl ControlDriver {
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
            // What others wait for does not wait for what is due here, which may look at every flow.
            self.drain(Instant::now());
            let now = Instant::now();
            self.core.handle_timeout(now);
            self.drain(now);
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
                if matches!(
                    warning,
                    Warning::SharedDiffers { .. } | Warning::SlowPath { .. } | Warning::NotReady(_)
                ) {
                    self.state.warnings.insert(warning.to_string(), Instant::now());
                }
            }
            MemberEvent::MemberUp(id) => tracing::info!(member = %id, "a member came"),
            MemberEvent::MemberDown { id, reason } => tracing::info!(member = %id, ?reason, "a member went"),
            MemberEvent::Liveness { id, liveness } => tracing::info!(member = %id, ?liveness, "liveness"),
            MemberEvent::StateChanged(state) => tracing::info!(?state, "our own state"),
            MemberEvent::Unheard => {
                tracing::info!(
                    "no other member answers: asking for what is known, in case they act for this one"
                );
                self.core.handle_unheard(Instant::now());
            }
            other => tracing::debug!(?other, "membership"),
        }
        None
    }

    fn handle_view(&mut self, view: Arc<View>) {
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
        self.core.handle_view(Instant::now(), view);
    }

    // Peers.

    fn handle_peer(&mut self, event: PeerEvent) {
        let now = Instant::now();
        match event {
            PeerEvent::Connected(peer, link) => {
                tracing::debug!(%peer, "connected");
                self.state.links.insert(peer, link);
                self.core.handle_connected(now, peer);
            }
            PeerEvent::Disconnected(peer, link) => {
                if self.state.links.get(&peer) == Some(&link) {
                    self.state.links.remove(&peer);
                    self.core.handle_disconnected(now, peer);
                }
            }
            PeerEvent::Frame(from, link, bytes) => {
                if self.state.links.get(&from) == Some(&link)
                    && let Err(error) = self.core.handle_data(now, from, &bytes)
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

    /// The backends of a service whose flows are reset: those that fail their checks, unless all do (fail open).
    fn failed(&self, service: &ServiceConfig) -> Vec<BackendId> {
        let reset = service.health.as_ref().is_some_and(|health| health.on_failure == OnFailure::Reset);
        if !reset || self.usable(service).1 {
            return Vec::new();
        }
        let ids = service.backends.iter().map(|backend| service.backend_id(backend));
        ids.filter(|id| self.health.get(&(service.name.clone(), *id)) == Some(&false)).collect()
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
        let usable: Vec<Vec<RankedBackend>> =
            self.config.services.iter().map(|service| self.usable(service).0).collect();
        self.core.set_usable(now, &usable);
        let failed: Vec<Vec<BackendId>> =
            self.config.services.iter().map(|service| self.failed(service)).collect();
        self.core.set_failed(&failed);
    }

    fn handle_request(&mut self, request: Request) {
        match request {
            Request::Reload(config) => self.reload(*config),
            Request::ReloadRefused => self.state.counters.reloads_refused += 1,
            Request::Leave => {
                if self.core.leaving() {
                    tracing::warn!("told to leave again: going without waiting for transfers");
                } else {
                    tracing::info!("leaving the cluster");
                    self.membership.command(Command::BeginLeave);
                }
                self.core.begin_leave(Instant::now());
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
        self.core.set_services(&services(&self.config));
        self.update_backends();
        self.membership.command(Command::Shared(self.config.cluster_digests().shared()));
        match KeyRing::new(config.cluster.keys.iter().map(|key| key.0).collect()) {
            Ok(keys) => {
                // Gossip first: it opens with every key of the file, so the order among members does not matter.
                self.membership.command(Command::Keys(keys.clone()));
                self.core.set_keys(&keys);
                self.config.cluster.keys = config.cluster.keys;
            }
            Err(error) => tracing::error!("the keys stay as they were: cluster.key_file: {error}"),
        }
        self.publish_metadata();
        self.state.counters.reloads += 1;
        tracing::info!(services = self.config.services.len(), "configuration reloaded");
    }

    /// Sends what the core has for peers, and does what it asks.
    fn drain(&mut self, now: Instant) {
        while let Some((to, frame)) = self.core.poll_message(now) {
            if let Some(link) = self.state.links.get(&to) {
                self.peers.send(to, *link, frame);
            }
        }
        while let Some(event) = self.core.poll_event() {
            self.handle_core(event);
        }
    }

    /// Keeps what a restart needs with tables that outlive this process.
    fn remember(&mut self) {
        let Some(own) = self.core.view().get(self.config.member.id) else { return };
        let Some(note) = resume::note(&self.config, self.core.planner(), own.boot) else { return };
        if note != self.state.note {
            self.forwarder.remember(&note);
            self.state.note = note;
        }
    }

    fn handle_core(&mut self, event: ControlEvent) {
        match event {
            ControlEvent::Installed(destinations) => {
                self.next_hops.set_destinations(destinations);
                self.remember();
            }
            ControlEvent::NotInstalled(error) => {
                tracing::error!("the forwarder refused a plan, the one before goes on: {error}");
            }
            ControlEvent::Unranked(error) => tracing::error!("the view cannot be ranked: {error}"),
            ControlEvent::ViewChanged => {
                let view = self.core.view();
                let digest = format!("{:016x}", view.digest.0);
                tracing::info!(digest, members = view.members.len(), "view");
            }
            ControlEvent::Slots(slots) => self.membership.command(Command::Slots(slots)),
            ControlEvent::Planned(records) => tracing::info!(records, "transfer tables"),
            ControlEvent::RoomMade => self.membership.command(Command::RoomMade),
            ControlEvent::ReadyFor(name) => {
                tracing::info!(pending = format!("{:016x}", name.0), "ready for a planned change");
                self.membership.command(Command::Done(name));
            }
            ControlEvent::StuckFor(name, peers) => {
                let sentence = format!(
                    "members {peers:?} do not acknowledge what they are sent for a planned change, which goes on without: \
                     check the path to their transfer port"
                );
                tracing::warn!("{sentence}");
                self.state.warnings.insert(sentence, Instant::now());
                self.membership.command(Command::Done(name));
            }
            ControlEvent::Replication(event) => self.handle_replication(event),
            ControlEvent::Refilled(peer, records) => {
                tracing::warn!(%peer, records, "too much waited for a peer; it gets a table instead");
            }
            ControlEvent::Missed(flows) => {
                self.state.counters.found_by_scan += flows as u64;
                tracing::warn!(flows, "flows that nobody may have been told of were found by a scan");
            }
            ControlEvent::Doubting(true) => {
                tracing::warn!(
                    "half of the members or more are lost: asking them for unknown flows, in case we were cut off"
                );
            }
            ControlEvent::Doubting(false) => {
                tracing::info!("packets come and the lost members do not: serving their unknown flows");
            }
            ControlEvent::WindowClosed(dropped) => tracing::info!(dropped, "handover window closed"),
            ControlEvent::ReadyToLeave => self.membership.command(Command::Leave),
        }
    }

    fn handle_replication(&mut self, event: ReplicationEvent) {
        match event {
            ReplicationEvent::AllDone => tracing::info!("transfers done"),
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
            // `Refilled` says so, and the core answers digests itself.
            ReplicationEvent::Overflow { .. }
            | ReplicationEvent::Digests { .. }
            | ReplicationEvent::Differing { .. } => {}
        }
    }

    // What others see.

    fn publish_metadata(&mut self) {
        let counters = self.forwarder.counters();
        self.metadata.weight = self.config.member.weight;
        self.metadata.flows = counters.flows;
        self.metadata.unprotected = self.core.replicator().unprotected() as u64;
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
        let view = self.core.view();
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
        let fail_open = self
            .config
            .services
            .iter()
            .map(|service| (service.name.clone(), self.usable(service).1))
            .collect();
        let status = Status {
            view: Arc::clone(self.core.view()),
            warnings: self.standing_warnings().chain(self.state.warnings.keys().cloned()).collect(),
            services: self.config.services.clone(),
            health: self.health.clone(),
            fail_open,
            forwarder,
            unresolved: self.next_hops.unresolved(),
            table: self.core.planner().current(),
            unprotected: self.core.replicator().unprotected() as u64,
            repair: *self.core.repair_counters(),
            replication: *self.core.replicator().counters(),
            transfers: self.core.replicator().transfers().collect(),
            window_open: self.core.window_open(),
            leaving: self.core.leaving(),
            view_changes: self.core.view_changes(),
            counters: self.state.counters.clone(),
        };
        self.shared.status.store(Arc::new(status));
    }

    /// The view in force.
    pub fn view(&self) -> &View {
        self.core.view()
    }
}
