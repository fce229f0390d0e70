//! What the admin API shows: a status the control task publishes, and what a flow's tables say.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use arc_swap::ArcSwap;
use phalanx_admin::metrics::{self, Sample};
use phalanx_admin::{
    AdminSource, BackendHealth, BackendStatus, Explain, FlowQuery, Health, Holder, MemberStatus, Members,
    Ranked, ServiceStatus, Services,
};
use phalanx_control::TableRanking;
use phalanx_flow::member::Liveness;
use phalanx_flow::{BackendId, FlowKey, FlowState, MemberId, flow_hash};
use phalanx_forwarder::counters::OUTCOME_NAMES;
use phalanx_forwarder::{Counters, Drop, Forwarder, RowSet};
use phalanx_membership::{MemberState, MemberView, View};
use phalanx_rebalancer::{Ranking as _, TransferProgress};
use tokio::sync::{mpsc, oneshot};

use super::control::{ControlDriver, HeldFlow, Question, Request};
use super::peers::Peers;
use crate::config::{Config, ServiceConfig};
use crate::logging;

/// Flows per backend are counted by a walk over the flow table, not more often than this.
const BACKEND_FLOWS_EVERY: Duration = Duration::from_secs(2);

/// What the drivers count.
#[derive(Clone, Debug, Default)]
pub struct DriverCounters {
    /// Of the membership.
    pub membership: phalanx_membership::Counters,
    /// Echoes lost, by peer.
    pub echoes_lost: BTreeMap<MemberId, u64>,
    /// Reloads done.
    pub reloads: u64,
    /// Reloads whose configuration had mistakes.
    pub reloads_refused: u64,
    /// Transfer tables acknowledged whole.
    pub transfers_done: u64,
    /// Transfer tables whose receiver has gone.
    pub transfers_given_up: u64,
    /// Flows found by a scan, after events were lost or a restart.
    pub found_by_scan: u64,
}

/// The daemon at one moment.
pub struct Status {
    /// The view.
    pub view: Arc<View>,
    /// Recent warnings.
    pub warnings: Vec<String>,
    /// The services in force.
    pub services: Vec<ServiceConfig>,
    /// Health by service and backend.
    pub health: HashMap<(String, BackendId), bool>,
    /// Services without a healthy backend.
    pub fail_open: HashMap<String, bool>,
    /// The forwarder's counters.
    pub forwarder: Counters,
    /// Who has no next hop.
    pub unresolved: Vec<IpAddr>,
    /// The table in force.
    pub table: Arc<TableRanking>,
    /// Flows whose backup has not acknowledged them.
    pub unprotected: u64,
    /// Of comparing with the other holders.
    pub repair: phalanx_control::RepairCounters,
    /// Of replication.
    pub replication: phalanx_rebalancer::Counters,
    /// Transfer tables under way.
    pub transfers: Vec<TransferProgress>,
    /// The handover window is open.
    pub window_open: bool,
    /// The member is about to leave.
    pub leaving: bool,
    /// Views since the start.
    pub view_changes: u64,
    /// Of the drivers.
    pub counters: DriverCounters,
}

/// What control task and admin API share.
pub struct Shared {
    /// The last status.
    pub status: ArcSwap<Status>,
}

/// What the tables of the control task say of a flow.
#[derive(Clone, Debug)]
pub struct FlowFacts {
    service: Option<String>,
    hash: u64,
    row: u32,
    ranking: Vec<Ranked>,
    owner: Option<MemberId>,
    backup: Option<MemberId>,
    second_backup: Option<MemberId>,
    acting_owner: Option<MemberId>,
    slot: Option<u32>,
    consistent: Option<IpAddr>,
    former: Option<MemberId>,
}

impl FlowFacts {
    /// Reads them off.
    pub fn of(control: &ControlDriver, key: &FlowKey) -> Self {
        let planner = control.core.planner();
        let table = planner.current();
        let row = table.row_of(key);
        let [owner, backup, second_backup] = table.holders(row);
        let liveness = |id: MemberId| control.view().get(id).map_or(Liveness::Down, |member| member.liveness);
        let ranked = table.table.members();
        let ranking = table
            .table
            .full_ranking(row)
            .into_iter()
            .map(|(id, score)| Ranked {
                member: id.0,
                score: score.to_string(),
                weight: ranked.iter().find(|member| member.id == id).map_or(0, |member| member.weight),
                liveness: liveness_name(liveness(id)).to_owned(),
            })
            .collect();
        let alive = |id: &MemberId| liveness(*id) == Liveness::Alive;
        let consistent = planner.consistent(key);
        Self {
            hash: flow_hash(control.config.cluster.hash_seed, key),
            row,
            ranking,
            owner,
            backup,
            second_backup,
            acting_owner: owner.filter(alive).or_else(|| backup.filter(alive)).or(owner),
            slot: consistent.as_ref().map(|_| u32::from(planner.slot(key))),
            service: consistent.map(|(service, _)| control.config.services[service].name.clone()),
            consistent: consistent.and_then(|(_, backend)| backend).map(|backend| backend.ip()),
            former: planner.asked().and_then(|table| table.holders(row)[0]),
        }
    }
}

fn liveness_name(liveness: Liveness) -> &'static str {
    match liveness {
        Liveness::Alive => "alive",
        Liveness::Suspect => "suspect",
        Liveness::Down => "down",
    }
}

fn state_name(state: MemberState) -> &'static str {
    match state {
        MemberState::Joining => "joining",
        MemberState::Active => "active",
        MemberState::Leaving => "leaving",
    }
}

/// What a member asks for, or what we wait for to take it in.
fn waits(member: &MemberView) -> Option<String> {
    match (member.wish, member.state) {
        (Some(wish), _) if !wish.active => Some("to leave".to_owned()),
        (Some(_), MemberState::Joining) => Some("to join".to_owned()),
        (Some(wish), _) => Some(format!("weight {}", wish.weight)),
        (None, _) => (!member.admitted).then(|| "to merge".to_owned()),
    }
}

fn flow_state_name(state: u8) -> &'static str {
    match FlowState::from_u8(state) {
        Some(FlowState::Established) => "established",
        Some(FlowState::Closing) => "closing",
        Some(FlowState::Reset) => "reset",
        Some(FlowState::HalfOpen) | None => "half-open",
    }
}

/// Flows per service address and backend, and when they were counted.
type FlowsByBackend = (Instant, HashMap<(IpAddr, u16, BackendId), u64>);

/// The daemon as the admin API sees it.
pub struct Source {
    local: MemberId,
    cluster: String,
    forwarder_kind: &'static str,
    shared: Arc<Shared>,
    forwarder: Arc<dyn Forwarder>,
    peers: Peers,
    requests: mpsc::UnboundedSender<Request>,
    backend_flows: Mutex<Option<FlowsByBackend>>,
    started: SystemTime,
}

impl Source {
    /// A source that shows `shared`.
    pub fn new(
        config: &Config,
        shared: Arc<Shared>,
        forwarder: Arc<dyn Forwarder>,
        peers: Peers,
        requests: mpsc::UnboundedSender<Request>,
    ) -> Self {
        Self {
            local: config.member.id,
            cluster: config.cluster.name.clone(),
            forwarder_kind: config.forwarder.kind.as_str(),
            shared,
            forwarder,
            peers,
            requests,
            backend_flows: Mutex::new(None),
            started: SystemTime::now(),
        }
    }

    fn backend_flows(&self) -> HashMap<(IpAddr, u16, BackendId), u64> {
        let mut counted = self.backend_flows.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((at, flows)) = &*counted
            && at.elapsed() < BACKEND_FLOWS_EVERY
        {
            return flows.clone();
        }
        let mut flows = HashMap::new();
        self.forwarder.visit(&RowSet::All, &mut |record| {
            let port = u16::from_be_bytes(record.key.destination_port);
            *flows.entry((record.key.destination_address(), port, record.backend)).or_default() += 1;
        });
        *counted = Some((Instant::now(), flows.clone()));
        flows
    }

    fn service_status(
        &self,
        status: &Status,
        service: &ServiceConfig,
        flows: &HashMap<(IpAddr, u16, BackendId), u64>,
    ) -> ServiceStatus {
        let health = |id: &BackendId| {
            if service.health.is_none() {
                return BackendHealth::Unchecked;
            }
            match status.health.get(&(service.name.clone(), *id)) {
                Some(false) => BackendHealth::Unhealthy,
                _ => BackendHealth::Healthy,
            }
        };
        let flows_to =
            |id: &BackendId| flows.get(&(service.address, service.port, *id)).copied().unwrap_or_default();
        let mut backends: Vec<BackendStatus> = service
            .backends
            .iter()
            .map(|backend| {
                let id = service.backend_id(backend);
                BackendStatus {
                    address: backend.address,
                    weight: backend.weight,
                    drain: backend.drain,
                    health: health(&id),
                    flows: flows_to(&id),
                }
            })
            .collect();
        let configured: Vec<BackendId> =
            service.backends.iter().map(|backend| service.backend_id(backend)).collect();
        let mut removed: Vec<(&BackendId, u64)> = flows
            .iter()
            .filter(|((address, port, id), _)| {
                *address == service.address && *port == service.port && !configured.contains(id)
            })
            .map(|((_, _, id), flows)| (id, *flows))
            .collect();
        removed.sort_unstable();
        backends.extend(removed.into_iter().map(|(id, flows)| BackendStatus {
            address: id.ip(),
            weight: 0,
            drain: true,
            health: BackendHealth::Unchecked,
            flows,
        }));
        ServiceStatus {
            name: service.name.clone(),
            address: service.address,
            port: service.port,
            protocol: service.protocol.as_str().to_owned(),
            method: crate::config::method_name(service.method).to_owned(),
            fail_open: status.fail_open.get(&service.name).copied().unwrap_or_default(),
            backends,
        }
    }
}

impl AdminSource for Source {
    fn members(&self) -> Members {
        let status = self.shared.status.load();
        let mut rows: HashMap<MemberId, (u32, u32)> = HashMap::new();
        for row in 0..status.table.row_count() {
            let [owner, backups @ ..] = status.table.holders(row);
            if let Some(owner) = owner {
                rows.entry(owner).or_default().0 += 1;
            }
            for backup in backups.into_iter().flatten() {
                rows.entry(backup).or_default().1 += 1;
            }
        }
        let members = status
            .view
            .members
            .iter()
            .map(|member| {
                let (rows_owned, rows_backed_up) = rows.get(&member.id).copied().unwrap_or_default();
                MemberStatus {
                    id: member.id.0,
                    address: member.address.ip(),
                    site: member.metadata.site.clone(),
                    weight: member.metadata.weight,
                    state: state_name(member.state).to_owned(),
                    liveness: liveness_name(member.liveness).to_owned(),
                    boot: member.boot,
                    generation: member.generation,
                    cache: member.metadata.cache,
                    version: member.metadata.version.clone(),
                    admin_address: member.metadata.admin_address,
                    view_digest: if member.known {
                        format!("{:016x}", member.view_digest.0)
                    } else {
                        String::new()
                    },
                    waits: waits(member),
                    ready: status.view.pending.is_some_and(|name| member.is_ready_for(name)),
                    flows: member.metadata.flows,
                    unprotected_flows: member.metadata.unprotected,
                    rows_owned,
                    rows_backed_up,
                }
            })
            .collect();
        Members {
            cluster: self.cluster.clone(),
            local: self.local.0,
            view_digest: format!("{:016x}", status.view.digest.0),
            pending_view: status.view.pending.map(|name| format!("{:016x}", name.0)),
            warnings: status.warnings.clone(),
            members,
        }
    }

    fn services(&self) -> Services {
        let status = self.shared.status.load();
        let flows = self.backend_flows();
        Services {
            services: status
                .services
                .iter()
                .map(|service| self.service_status(&status, service, &flows))
                .collect(),
        }
    }

    async fn explain(&self, flow: FlowQuery) -> Explain {
        let mut explain = Explain {
            source: flow.source,
            destination: flow.destination,
            protocol: flow.protocol_name().to_owned(),
            service: None,
            hash: String::new(),
            row: 0,
            ranking: Vec::new(),
            owner: None,
            backup: None,
            second_backup: None,
            acting_owner: None,
            slot: None,
            consistent_backend: None,
            recorded_backend: None,
            deviates: false,
            holders: Vec::new(),
            silent: Vec::new(),
            verdict: "source and destination are of different families: no such flow".to_owned(),
        };
        let Some(key) = FlowKey::new(
            flow.protocol,
            (flow.source.ip(), flow.source.port()),
            (flow.destination.ip(), flow.destination.port()),
        ) else {
            return explain;
        };
        let (reply, facts) = oneshot::channel();
        let _ = self.requests.send(Request::Explain(key, reply));
        let Ok(facts) = facts.await else {
            explain.verdict = "the daemon is about to end".to_owned();
            return explain;
        };
        let own = self.forwarder.get(&key).map(|record| HeldFlow::of(&record));
        let view = Arc::clone(&self.shared.status.load().view);
        let asked: Vec<MemberId> =
            view.members.iter().map(|member| member.id).filter(|id| *id != self.local).collect();
        let (held, silent) = self.ask(flow, asked).await;
        let mut held: BTreeMap<MemberId, HeldFlow> = held;
        held.extend(own.map(|own| (self.local, own)));
        let role = |id: MemberId| {
            if facts.owner == Some(id) {
                "owner"
            } else if facts.backup == Some(id) {
                "backup"
            } else if facts.second_backup == Some(id) {
                "second backup"
            } else {
                "former"
            }
        };
        explain.holders = held
            .iter()
            .map(|(id, held)| Holder {
                member: id.0,
                role: role(*id).to_owned(),
                backend: held.backend,
                state: flow_state_name(held.state).to_owned(),
                recovered: held.recovered,
                protected: held.protected,
                idle_ms: u64::from(held.idle_ms),
            })
            .collect();
        explain.silent = silent.into_iter().map(|id| id.0).collect();
        let recorded = [facts.owner, facts.backup, facts.second_backup, facts.former]
            .into_iter()
            .flatten()
            .chain(held.keys().copied())
            .find_map(|id| held.get(&id))
            .map(|held| held.backend);
        explain.recorded_backend = recorded;
        explain.deviates = recorded.is_some() && recorded != facts.consistent;
        explain.verdict = verdict(&facts, self.local, held.contains_key(&self.local), recorded);
        explain.service = facts.service;
        explain.hash = format!("{:016x}", facts.hash);
        explain.row = facts.row;
        explain.ranking = facts.ranking;
        explain.owner = facts.owner.map(|id| id.0);
        explain.backup = facts.backup.map(|id| id.0);
        explain.second_backup = facts.second_backup.map(|id| id.0);
        explain.acting_owner = facts.acting_owner.map(|id| id.0);
        explain.slot = facts.slot;
        explain.consistent_backend = facts.consistent;
        explain
    }

    fn health(&self) -> Health {
        let status = self.shared.status.load();
        let mut reasons = Vec::new();
        let local = status.view.get(self.local);
        let active = local.is_some_and(|member| member.state == MemberState::Active);
        if !active {
            let state = local.map_or("unknown", |member| state_name(member.state));
            reasons.push(format!("this member is {state}, not active"));
        }
        if self.forwarder.idle_for() > Duration::from_millis(500) {
            reasons.push("the forwarder stands still".to_owned());
        }
        let ready = reasons.is_empty();
        if !status.unresolved.is_empty() {
            let who: Vec<String> = status.unresolved.iter().map(IpAddr::to_string).collect();
            reasons.push(format!("no next hop for {}", who.join(", ")));
        }
        if status.table.table.members().len() < 2 {
            reasons.push("there is no other member to be the backup".to_owned());
        }
        if status.unprotected > 0 {
            reasons.push(format!("{} flows are not acknowledged by their backup yet", status.unprotected));
        }
        let waiting: usize = status.transfers.iter().map(|transfer| transfer.total - transfer.acked).sum();
        if waiting > 0 {
            reasons.push(format!("{waiting} records of transfer tables are on their way"));
        }
        if status.view.pending.is_some() {
            reasons.push("a change of members is planned and not yet in force".to_owned());
        }
        if let Some(suspect) = status.view.members.iter().find(|member| member.liveness != Liveness::Alive) {
            reasons.push(format!("member {} is suspected: it may be the backup", suspect.id));
        }
        Health { ready, safe_to_lose: reasons.is_empty(), reasons }
    }

    fn metrics(&self) -> Vec<Sample> {
        let status = self.shared.status.load();
        let forwarder = self.forwarder.counters();
        let mut samples = forwarder_samples(&forwarder);
        let mut push = |metric, labels: &[&str], value| samples.push(Sample::new(metric, labels, value));
        push(&metrics::UNPROTECTED_FLOWS, &[], status.unprotected);
        let others = status.view.members.iter().filter(|member| member.id != self.local);
        let unprotected = status.unprotected + others.map(|member| member.metadata.unprotected).sum::<u64>();
        push(&metrics::CLUSTER_UNPROTECTED_FLOWS, &[], unprotected);
        push(&metrics::CHANGE_PENDING, &[], u64::from(status.view.pending.is_some()));
        push(&metrics::REPAIRED_RECORDS, &[], status.repair.records);
        for liveness in [Liveness::Alive, Liveness::Suspect] {
            let count = status.view.members.iter().filter(|member| member.liveness == liveness).count();
            push(&metrics::MEMBERS, &[liveness_name(liveness)], count as u64);
        }
        push(&metrics::VIEW_CHANGES, &[], status.view_changes);
        for service in &status.services {
            for backend in &service.backends {
                let id = service.backend_id(backend);
                let healthy = status.health.get(&(service.name.clone(), id)).copied().unwrap_or(true);
                let address = backend.address.to_string();
                push(&metrics::BACKEND_HEALTHY, &[&service.name, &address], u64::from(healthy));
            }
            let open = status.fail_open.get(&service.name).copied().unwrap_or_default();
            push(&metrics::SERVICE_FAIL_OPEN, &[&service.name], u64::from(open));
        }
        push(&metrics::REPLICATED_RECORDS, &["out"], status.replication.items_sent);
        push(&metrics::REPLICATED_RECORDS, &["in"], status.replication.applied);
        for transfer in &status.transfers {
            let pending = (transfer.total - transfer.acked) as u64;
            push(&metrics::TRANSFER_PENDING, &[&transfer.to.to_string()], pending);
        }
        push(&metrics::TRANSFERS, &["done"], status.counters.transfers_done);
        push(&metrics::TRANSFERS, &["given_up"], status.counters.transfers_given_up);
        let gossip = &status.counters.membership;
        push(&metrics::GOSSIP_DATAGRAMS, &["in"], gossip.received);
        push(&metrics::GOSSIP_DATAGRAMS, &["out"], gossip.sent);
        for (reason, count) in [
            ("foreign", gossip.foreign),
            ("damaged", gossip.damaged),
            ("replayed", gossip.replayed),
            ("stale", gossip.stale),
        ] {
            push(&metrics::GOSSIP_DROPPED, &[reason], count);
        }
        for (peer, lost) in &status.counters.echoes_lost {
            push(&metrics::ECHOES_LOST, &[&peer.to_string()], *lost);
        }
        push(&metrics::FOUND_BY_SCAN, &[], status.counters.found_by_scan);
        push(&metrics::RELOADS, &["done"], status.counters.reloads);
        push(&metrics::RELOADS, &["refused"], status.counters.reloads_refused);
        push(&metrics::LOG_LINES_DROPPED, &[], logging::dropped_lines());
        push(&metrics::BUILD_INFO, &[env!("CARGO_PKG_VERSION"), self.forwarder_kind], 1);
        let started = self.started.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        push(&metrics::START_TIME, &[], started.as_secs());
        samples
    }
}

impl Source {
    /// Asks members what they hold of a flow; and who did not answer.
    async fn ask(
        &self,
        flow: FlowQuery,
        members: Vec<MemberId>,
    ) -> (BTreeMap<MemberId, HeldFlow>, Vec<MemberId>) {
        let question =
            Question::Flow { source: flow.source, destination: flow.destination, protocol: flow.protocol };
        let Ok(body) = postcard::to_stdvec(&question) else { return (BTreeMap::new(), members) };
        let body = Arc::new(body);
        let mut asked = tokio::task::JoinSet::new();
        for id in members {
            let (peers, body) = (self.peers.clone(), Arc::clone(&body));
            asked.spawn(async move {
                let answer = peers.request(id, &body).await.ok();
                (id, answer.and_then(|bytes| postcard::from_bytes::<Option<HeldFlow>>(&bytes).ok()))
            });
        }
        let (mut held, mut silent) = (BTreeMap::new(), Vec::new());
        while let Some(Ok((id, answer))) = asked.join_next().await {
            match answer {
                Some(Some(flow)) => drop(held.insert(id, flow)),
                Some(None) => {}
                None => silent.push(id),
            }
        }
        silent.sort_unstable();
        (held, silent)
    }
}

fn forwarder_samples(counters: &Counters) -> Vec<Sample> {
    let mut samples = Vec::new();
    for (name, count) in OUTCOME_NAMES.iter().zip(counters.outcomes) {
        samples.push(Sample::new(&metrics::PACKETS, &[name], count));
    }
    for reason in Drop::ALL {
        samples.push(Sample::new(&metrics::DROPS, &[reason.name()], counters.dropped(reason)));
    }
    use phalanx_flow::decide::Outcome;
    let out = counters.outcome(Outcome::HandedOff)
        + counters.outcome(Outcome::Asked)
        + counters.outcome(Outcome::FragmentHandedOff);
    for (metric, labels, value) in [
        (&metrics::FLOWS, &["established"][..], counters.flows),
        (&metrics::FLOWS, &["half-open"], counters.half_open),
        (&metrics::CACHED_FLOWS, &[], counters.cached),
        (&metrics::HANDOFFS, &["out"], out),
        (&metrics::HANDOFFS, &["in"], counters.handoffs_in),
        (&metrics::RECOVERED, &[], counters.outcome(Outcome::Recovered)),
        (&metrics::TABLE_FULL, &[], counters.table_full),
        (&metrics::HALF_OPEN_EVICTED, &[], counters.half_open_evicted),
        (&metrics::EVENTS_LOST, &[], counters.events_lost),
        (&metrics::FIB_LOOKUPS, &[], counters.fib_lookups),
        (&metrics::OTHER_HOST, &[], counters.other_host),
        (&metrics::PUNTED, &[], counters.punted),
    ] {
        samples.push(Sample::new(metric, labels, value));
    }
    samples
}

fn verdict(facts: &FlowFacts, local: MemberId, held_here: bool, recorded: Option<IpAddr>) -> String {
    if facts.service.is_none() {
        return "no service here: a packet is left to the kernel, or dropped if the address is a service's"
            .to_owned();
    }
    match (held_here, recorded, facts.acting_owner) {
        (true, Some(backend), _) => format!("this member has the flow and forwards its packets to {backend}"),
        (_, Some(backend), Some(owner)) => {
            format!("this member hands its packets off to member {owner}; they reach {backend}")
        }
        (_, _, Some(owner)) if owner == local => match facts.consistent {
            Some(backend) => {
                format!(
                    "nobody has the flow: this member, its owner, would send a new connection to {backend}"
                )
            }
            None => "nobody has the flow, and the service has no backend".to_owned(),
        },
        (_, _, Some(owner)) => {
            format!("nobody has the flow: a packet is handed off to its owner, member {owner}")
        }
        (_, _, None) => "no member is active".to_owned(),
    }
}
