//! One member: its process, its forwarder, its clocks.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::num::NonZeroU32;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use phalanx_control::planner::UNSETTLED;
use phalanx_control::{
    Control, Fixed, Planner, Service, Settings as ControlSettings, SharedTables, Snapshot,
};
use phalanx_flow::slots::RankedBackend;
use phalanx_flow::{BackendId, MemberId, MemberSlot, Method};
use phalanx_forwarder::Handoff;
use phalanx_membership::{Config, Digest, KeyRing, Membership, Metadata, Shared, View};
use phalanx_rebalancer::{Policy, Replicator};

use super::event::Event;
use crate::forwarder::SimForwarder;
use crate::settings::Settings;

/// The two services' addresses: one for connections, one for datagrams.
pub const SERVICE: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);

/// The same for clients that use IPv6.
pub const SERVICE_6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 1);

/// Ports of the two services.
pub const TCP_PORT: u16 = 443;
/// See [`TCP_PORT`].
pub const UDP_PORT: u16 = 4433;

/// Members of a large cluster that everybody knows from the start; of a small one, all are.
const SEEDS: usize = 16;

/// Wall-clock time when virtual time starts.
const WALL_MS: u64 = 1_800_000_000_000;

/// A process and what belongs to it alone.
pub struct Process {
    /// Who is in the cluster.
    pub membership: Membership,
    /// What to make of it.
    pub control: Control,
    /// The view it acts by.
    pub last_view: Arc<View>,
    pub(super) slots: BTreeMap<MemberId, MemberSlot>,
    pub(super) echoes: Echoes,
    /// Streams that are open, by the peer's place.
    pub(super) links: BTreeMap<usize, u64>,
    pub(super) dialling: BTreeSet<usize>,
    pub(super) wake: Option<Duration>,
    pub(super) tick: Option<Duration>,
    /// Whether its view will be looked at.
    pub(super) view_due: bool,
    pub(super) metadata: Metadata,
}

/// Hand-off echoes under way, as the daemon's driver sends them.
#[derive(Default)]
pub(super) struct Echoes {
    pub(super) next_token: u64,
    pub(super) next_peer: usize,
    pub(super) sent: BTreeMap<u64, (MemberId, Duration)>,
}

/// One member's machine.
pub struct Node {
    /// Its name.
    pub id: MemberId,
    pub(super) address: SocketAddr,
    /// The daemon, while it runs.
    pub process: Option<Process>,
    /// The flow table, while packets are carried; it may outlive the daemon.
    pub forwarder: Option<Arc<SimForwarder>>,
    /// Counts processes: what was meant for an earlier one is ignored.
    pub(super) life: u64,
    /// Counts flow tables.
    pub boot: u64,
    pub(super) stalled: Option<Vec<Event>>,
    pub(super) stalls: u64,
    /// Members hear each other within a group only.
    pub group: u32,
    pub(super) slow: Duration,
    pub(super) weight: u32,
    pub(super) site: String,
    pub(super) cache: bool,
    pub(super) cramped: Option<usize>,
    pub(super) drift_ppm: i64,
    pub(super) skew_ms: i64,
    /// Whether this member gives new flows to each backend, as far as it has heard.
    pub(super) usable: Vec<bool>,
    /// Backends that are not in its configuration, though they are in those of the others.
    pub(super) lacks: Range<usize>,
    pub(super) leaving: bool,
    /// What the last daemon left beside its pinned tables.
    pub(super) note: Option<Snapshot>,
    /// Since when it has run without a break; the end of the last stall or start.
    pub steady_since: Duration,
    /// Since when it has carried no packets: dead, or standing still.
    pub silent_since: Option<Duration>,
    /// When its daemon last did anything for the membership, leases included.
    pub ran: Duration,
}

impl Node {
    /// Whether it carries packets and can be talked to now.
    pub fn runs(&self) -> bool {
        self.process.is_some() && self.stalled.is_none()
    }

    /// Which of its processes it is.
    pub fn life(&self) -> u64 {
        self.life
    }

    /// Whether it is in the middle of a stall.
    pub fn is_stalled(&self) -> bool {
        self.stalled.is_some()
    }

    /// Whether it has room for few flows only.
    pub fn is_cramped(&self) -> bool {
        self.cramped.is_some()
    }

    /// This member's clock at virtual time `at`.
    pub(super) fn clock(&self, epoch: Instant, at: Duration) -> Instant {
        epoch + self.elapsed(at)
    }

    fn elapsed(&self, at: Duration) -> Duration {
        let nanos = at.as_nanos() as i128;
        Duration::from_nanos((nanos + nanos * i128::from(self.drift_ppm) / 1_000_000).max(0) as u64)
    }

    /// When this member's clock shows `then`, or shortly after.
    pub(super) fn when(&self, epoch: Instant, then: Instant) -> Duration {
        let shown = then.saturating_duration_since(epoch).as_nanos() as i128;
        let nanos = shown * 1_000_000 / i128::from(1_000_000 + self.drift_ppm);
        Duration::from_nanos(nanos as u64) + Duration::from_nanos(2)
    }

    /// Sets the forwarder's clock.
    pub(super) fn tell_time(&self, at: Duration) {
        if let Some(forwarder) = &self.forwarder {
            forwarder.set_elapsed(self.elapsed(at));
        }
    }
}

/// The gossip address of node `node`.
pub(super) fn address(node: usize) -> SocketAddr {
    let [_, a, b, c] = (node as u32 + 1).to_be_bytes();
    SocketAddr::from(([10, a, b, c], 7946))
}

/// The node that has this gossip address.
pub(super) fn at_address(address: SocketAddr) -> Option<usize> {
    let IpAddr::V4(ip) = address.ip() else { return None };
    let [_, a, b, c] = ip.octets();
    (u32::from_be_bytes([0, a, b, c]) as usize).checked_sub(1)
}

/// Backend number `backend`.
pub fn backend_id(backend: usize) -> BackendId {
    BackendId::new(IpAddr::V4(Ipv4Addr::new(198, 51, 100, backend as u8 + 1)), Method::Gue, 6080)
}

/// The number of a backend.
pub fn backend_number(id: &BackendId) -> usize {
    usize::from(phalanx_flow::key::unmapped(id.address)[3]) - 1
}

/// The addresses of services.
fn addresses(settings: &Settings) -> Vec<IpAddr> {
    let both = [IpAddr::V4(SERVICE), IpAddr::V6(SERVICE_6)];
    both.into_iter().take(if settings.ipv6 > 0.0 { 2 } else { 1 }).collect()
}

/// The services, for the planner.
pub(super) fn services(settings: &Settings, node: &Node) -> Vec<Service> {
    let backends: Vec<BackendId> =
        (0..node.usable.len()).filter(|backend| !node.lacks.contains(backend)).map(backend_id).collect();
    let ports = [(TCP_PORT, phalanx_flow::key::TCP), (UDP_PORT, phalanx_flow::key::UDP)];
    addresses(settings)
        .into_iter()
        .flat_map(|address| ports.map(|(port, protocol)| (address, port, protocol)))
        .map(|(address, port, protocol)| Service {
            address,
            port,
            protocol,
            backends: backends.clone(),
            idle: settings.idle,
            linger: settings.linger,
            reset_linger: settings.reset_linger,
            half_open: settings.half_open,
            fragment: false,
        })
        .collect()
}

/// What new flows go to, as a member sees it: all backends if none is good.
pub(super) fn usable_lists(settings: &Settings, node: &Node) -> Vec<Vec<RankedBackend>> {
    let known = || node.usable.iter().enumerate().filter(|(backend, _)| !node.lacks.contains(backend));
    let open = !known().any(|(_, usable)| *usable);
    let list: Vec<RankedBackend> = known()
        .filter(|(_, usable)| open || **usable)
        .map(|(backend, _)| RankedBackend { id: backend_id(backend), weight: 1 })
        .collect();
    vec![list; 2 * addresses(settings).len()]
}

/// Starts node `node`'s daemon: over the forwarder it has, or with a new one.
pub(super) fn start(
    settings: &Settings,
    node: &mut Node,
    tables: &Arc<SharedTables>,
    epoch: Instant,
    now: Duration,
    rng_seed: u64,
) -> Result<Process, String> {
    let fixed = Fixed {
        local: node.id,
        address: node.address.ip(),
        seed: settings.hash_seed,
        scoring: settings.scoring,
        rows: settings.rows,
        site_rule: settings.site_rule,
        backups: settings.backups,
        handoff: Handoff { port: 6081, cookie: 1, old_cookie: None, fragment: false },
        replicate_syn: settings.replicate_syn,
    };
    let clock = node.clock(epoch, now);
    let mut planner = Planner::new(fixed).map_err(|error| error.to_string())?.sharing(Arc::clone(tables));
    if let Some(forwarder) = &node.forwarder {
        // The table names backends by position.
        for backend in &forwarder.plan().plan.backends {
            planner.register(backend.id);
        }
    }
    planner.set_services(&services(settings, node));
    for (service, usable) in usable_lists(settings, node).iter().enumerate() {
        planner.set_usable(service, usable, clock);
    }
    planner.settle(clock + UNSETTLED);
    let resumed = match (&node.forwarder, &node.note) {
        (Some(_), Some(note)) => planner.restore(note).map(|()| Some(node.boot)),
        _ => Ok(None),
    };
    let resumed = resumed.map_err(|error| error.to_string())?;
    let forwarder = match &node.forwarder {
        Some(forwarder) => Arc::clone(forwarder),
        None => {
            let mut limits = settings.limits;
            if let Some(flows) = node.cramped {
                limits.flows = flows;
            }
            let new = SimForwarder::new(node.id, planner.plan(), limits, settings.fault)
                .map_err(|error| error.to_string())?;
            Arc::new(new)
        }
    };
    node.forwarder = Some(Arc::clone(&forwarder));
    node.tell_time(now);
    let metadata = Metadata {
        weight: node.weight,
        site: node.site.clone(),
        transfer_address: Some(SocketAddr::new(node.address.ip(), 7947)),
        fingerprint: [node.id.0 as u8; 32],
        cache: node.cache,
        version: "sim".to_owned(),
        ..Metadata::default()
    };
    let keys = KeyRing::new(vec![[7; 32]]).map_err(|error| error.to_string())?;
    let config = Config {
        boot: node.boot,
        session: node.life,
        seeds: (0..(settings.members + settings.spares).min(SEEDS)).map(address).collect(),
        timing: settings.timing.clone(),
        metadata: metadata.clone(),
        shared: Shared { rows: Digest(settings.rows as u64), ..Shared::default() },
        waits_for_room: true,
        ..Config::new(node.id, node.address, keys)
    };
    let membership = Membership::new(config, rng_seed, clock).map_err(|error| error.to_string())?;
    let wall_ms = (WALL_MS + now.as_millis() as u64).saturating_add_signed(node.skew_ms);
    let replicator = Replicator::new(
        phalanx_rebalancer::Config {
            local: node.id,
            transfer_rate: NonZeroU32::new(settings.transfer_rate).unwrap_or(NonZeroU32::MAX),
        },
        clock,
        wall_ms,
    );
    let control_settings = ControlSettings {
        local: node.id,
        cache: node.cache,
        flush_on_leave: true,
        policy: if settings.replicate_syn { Policy::Syn } else { Policy::Established },
        replication: settings.replication,
    };
    let control = Control::new(control_settings, planner, replicator, forwarder);
    Ok(Process {
        membership,
        control: match resumed {
            Some(boot) => control.resumed(boot),
            None => control,
        },
        last_view: Arc::default(),
        slots: BTreeMap::new(),
        echoes: Echoes::default(),
        links: BTreeMap::new(),
        dialling: BTreeSet::new(),
        wake: None,
        tick: None,
        view_due: false,
        metadata,
    })
}
