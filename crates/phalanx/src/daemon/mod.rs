//! A member of the cluster: the drivers that connect the sans-io cores to sockets, clocks and the kernel.
//!
//! [`run`] starts, from the bottom: the forwarder, the next-hop driver, QUIC, the membership, the health checks, the admin API; and then
//! runs the control task, which connects them, until the member has left.

pub mod control;
pub mod membership;
pub mod next_hops;
pub mod peers;
#[cfg(feature = "rawsock")]
mod rawsock;
mod resume;
mod signals;
pub mod status;
#[cfg(feature = "xdp")]
mod xdp;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use anyhow::Context as _;
use phalanx_control::{Control, Fixed, Planner};
use phalanx_flow::BackendId;
use phalanx_flow::score::{Best, Scoring};
use phalanx_flow::table::BackupSite;
use phalanx_forwarder::{Forwarder, Handoff, Plan};
use phalanx_membership::{Config as MembershipConfig, Digest, KeyRing, Metadata, Timing};
use phalanx_rebalancer::{Policy, Replicator};
use tokio::sync::mpsc;

use self::control::{ControlDriver, End, Inboxes, State};
use self::membership::{ALONE, MembershipDriver};
use self::next_hops::NextHopDriver;
use self::peers::{Identity, Peers};
use self::resume::{Adopted, Resumed};
pub use self::signals::hold_reloads;
use self::status::{DriverCounters, Shared, Source, Status};
use crate::config::{self, CacheMode, Config, Profile, Replicate, ScoringKind};
use crate::health::{HealthDriver, ProbeSender};

/// How the daemon ended.
#[derive(Debug)]
pub enum Ended {
    /// It left the cluster as it was told.
    Left,
    /// It may not join; the sentence says why and what to do. Exit status 2.
    Refused(String),
}

/// Where a member's programs and tables are pinned; `None`: nowhere.
pub fn pin_directory(config: &Config) -> Option<PathBuf> {
    match config.forwarder.kind {
        #[cfg(feature = "xdp")]
        config::ForwarderKind::Xdp => xdp::pin_directory(config),
        _ => None,
    }
}

/// Removes what a dead daemon left pinned; whether there was something. `WouldBlock`: its daemon runs.
pub fn detach(directory: &Path) -> std::io::Result<bool> {
    #[cfg(feature = "xdp")]
    return phalanx_forwarder_xdp::detach(directory);
    #[cfg(not(feature = "xdp"))]
    {
        let _ = directory;
        Err(std::io::Error::other("this program was built without the feature xdp"))
    }
}

/// A forwarder that runs.
struct Started {
    forwarder: Arc<dyn Forwarder>,
    /// What an earlier process left pinned.
    adopted: Option<Adopted>,
    /// Ends it; told true it leaves what is pinned as it is.
    end: Box<dyn FnOnce(bool) + Send>,
}

/// Starts the forwarder that the configuration names.
fn start_forwarder(config: &Config, plan: Plan) -> anyhow::Result<Started> {
    match config.forwarder.kind {
        #[cfg(feature = "rawsock")]
        config::ForwarderKind::Rawsock => {
            let forwarder = rawsock::start(config, plan)?;
            Ok(Started { forwarder, adopted: None, end: Box::new(|_| ()) })
        }
        #[cfg(not(feature = "rawsock"))]
        config::ForwarderKind::Rawsock => {
            let _ = plan;
            anyhow::bail!("forwarder.kind = \"rawsock\": this program was built without the feature rawsock")
        }
        #[cfg(feature = "xdp")]
        config::ForwarderKind::Xdp => xdp::start(config, plan),
        #[cfg(not(feature = "xdp"))]
        config::ForwarderKind::Xdp => {
            let _ = plan;
            anyhow::bail!("forwarder.kind = \"xdp\": this program was built without the feature xdp")
        }
    }
}

/// Runs a member until it is told to leave (SIGTERM or SIGINT). SIGHUP reloads the configuration from its file.
pub fn run(config: Config) -> anyhow::Result<Ended> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("phalanx")
        .enable_all()
        .build()
        .context("start the runtime")?;
    let ended = runtime.block_on(run_in_runtime(config));
    runtime.shutdown_timeout(Duration::from_millis(200));
    ended
}

async fn run_in_runtime(config: Config) -> anyhow::Result<Ended> {
    let keys = KeyRing::new(config.cluster.keys.iter().map(|key| key.0).collect())
        .with_context(|| format!("cluster.key_file {}", config.cluster.key_file.display()))?;
    let mut planner = Planner::new(fixed(&config, &keys)).context("cluster.scoring")?;
    planner.set_services(&control::services(&config));
    // The forwarder carries packets from its first moment on: it must know all backends then.
    let now = Instant::now();
    for (index, service) in config.services.iter().enumerate() {
        planner.set_usable(index, &control::usable_of(service, |_| true).0, now);
    }
    // There are no flows yet that the first tables could disturb.
    planner.settle(now + phalanx_control::planner::UNSETTLED);
    let started = start_forwarder(&config, planner.plan())?;
    let adopted = started.adopted.is_some();
    let resumed = started.adopted.as_ref().and_then(|adopted| {
        let resumed = resume::resume(&config, &mut planner, adopted);
        if let Err(sentence) = &resumed {
            tracing::warn!("the pinned tables are of no use, their flows are forgotten: {sentence}");
            phalanx_control::forget_flows(&*started.forwarder);
        }
        resumed.ok()
    });
    if let Some(Resumed { boot, .. }) = resumed {
        tracing::info!(boot, "going on with the pinned tables of an earlier start");
        phalanx_control::doubt_all(&*started.forwarder);
    }
    let ended = run_member(config, keys, planner, Arc::clone(&started.forwarder), resumed).await;
    // Who left is in nobody's table any more. Else what was found pinned goes on as it did before this start.
    (started.end)(adopted && !matches!(ended, Ok(Ended::Left)));
    ended
}

async fn run_member(
    config: Config,
    keys: KeyRing,
    planner: Planner,
    forwarder: Arc<dyn Forwarder>,
    resumed: Option<Resumed>,
) -> anyhow::Result<Ended> {
    let next_hops = NextHopDriver::start(Arc::clone(&forwarder))?;

    let (peer_events, peers_inbox) = mpsc::unbounded_channel();
    let identity = Identity::generate()?;
    let peers = Peers::start(config.member.id, &identity, config.transfer_address(), peer_events)?;

    let metadata = metadata(&config, &identity);
    let (member_events, membership_inbox) = mpsc::unbounded_channel();
    let settings = membership_config(&config, keys, metadata.clone(), resumed);
    let longest_lease = match config.forwarder.kind {
        // It goes on without this process.
        config::ForwarderKind::Xdp => ALONE,
        config::ForwarderKind::Rawsock => Duration::MAX,
    };
    let membership = MembershipDriver::start(settings, Arc::clone(&forwarder), longest_lease, member_events)?;

    let (health_changes, health_inbox) = mpsc::unbounded_channel();
    let probes = Arc::new(Probes(Arc::clone(&forwarder)));
    let health = HealthDriver::start(&config, probes, health_changes)?;
    let (requests, requests_inbox) = mpsc::unbounded_channel();

    let shared =
        Arc::new(Shared { status: arc_swap::ArcSwap::from_pointee(first_status(&config, &planner)) });
    let source =
        Source::new(&config, Arc::clone(&shared), Arc::clone(&forwarder), peers.clone(), requests.clone());
    serve_admin(config.admin.listen, source).await?;
    signals::spawn(config.file.clone(), requests)?;

    let replicator = Replicator::new(
        phalanx_rebalancer::Config {
            local: config.member.id,
            transfer_rate: NonZeroU32::new(config.cluster.transfer_rate).unwrap_or(NonZeroU32::MAX),
        },
        Instant::now(),
        SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_millis() as u64,
    );
    let inboxes = Inboxes {
        membership: membership_inbox,
        peers: peers_inbox,
        health: health_inbox,
        requests: requests_inbox,
    };
    tracing::info!(
        member = %config.member.id,
        address = %config.member.address,
        services = config.services.len(),
        "phalanx {} runs",
        env!("CARGO_PKG_VERSION")
    );
    let settings = phalanx_control::Settings {
        local: config.member.id,
        cache: config.member.cache == CacheMode::All,
        flush_on_leave: config.cluster.flush_on_leave,
        policy: match config.cluster.replicate {
            Replicate::Established => Policy::Established,
            Replicate::Syn => Policy::Syn,
        },
        replication: config.cluster.replication,
    };
    let core = Control::new(settings, planner, replicator, Arc::clone(&forwarder));
    let mut control = ControlDriver {
        core: match resumed {
            Some(Resumed { boot, .. }) => core.resumed(boot),
            None => core,
        },
        config,
        forwarder,
        next_hops,
        peers,
        membership,
        metadata,
        shared,
        checks: health,
        health: HashMap::new(),
        state: State::default(),
    };
    control.update_backends();
    match control.run(inboxes).await {
        End::Left => Ok(Ended::Left),
        End::Refused(sentence) => Ok(Ended::Refused(sentence)),
    }
}

/// Sends the packets of health checks the way flows go.
struct Probes(Arc<dyn Forwarder>);

impl ProbeSender for Probes {
    fn send_probe(&self, backend: BackendId, ip_packet: &[u8]) {
        if let Err(error) = self.0.send_probe(&backend, ip_packet) {
            tracing::debug!(?backend, "health check: {error}");
        }
    }
}

fn fixed(config: &Config, keys: &KeyRing) -> Fixed {
    let cluster = &config.cluster;
    let mut cookies = keys.cookies();
    Fixed {
        local: config.member.id,
        address: config.member.address,
        seed: cluster.hash_seed,
        scoring: match cluster.scoring {
            ScoringKind::Rendezvous => Scoring::Rendezvous { key: cluster.hash_seed.0 },
            ScoringKind::Crc8Highest => Scoring::Crc8 { best: Best::Highest },
            ScoringKind::Crc8Lowest => Scoring::Crc8 { best: Best::Lowest },
        },
        rows: cluster.scoring.rows() as usize,
        site_rule: match cluster.backup_site {
            config::BackupSite::Any => BackupSite::Any,
            config::BackupSite::Other => BackupSite::Other,
        },
        backups: cluster.backups as usize,
        handoff: Handoff {
            port: cluster.handoff_port,
            cookie: cookies.next().unwrap_or_default(),
            old_cookie: cookies.next(),
            fragment: cluster.handoff_fragment,
        },
        replicate_syn: cluster.replicate == Replicate::Syn,
    }
}

fn metadata(config: &Config, identity: &Identity) -> Metadata {
    Metadata {
        weight: config.member.weight,
        site: config.member.site.clone(),
        admin_address: (!config.admin.listen.ip().is_loopback()).then_some(config.admin.listen),
        transfer_address: Some(config.transfer_address()),
        fingerprint: identity.fingerprint(),
        cache: config.member.cache == CacheMode::All,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        backends: Digest(config.cluster_digests().backends),
        flows: 0,
        unprotected: 0,
    }
}

fn membership_config(
    config: &Config,
    keys: KeyRing,
    metadata: Metadata,
    resumed: Option<Resumed>,
) -> MembershipConfig {
    let now_us =
        SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_micros() as u64;
    MembershipConfig {
        // A start without the table of an earlier one is a new boot.
        boot: resumed.map_or(now_us, |resumed| resumed.boot),
        resume: resumed.is_some(),
        session: now_us,
        cluster: config.cluster.name.clone(),
        seeds: config.member.seeds.iter().map(|seed| seed.address).collect(),
        timing: match config.cluster.profile {
            Profile::Lan => Timing::lan(),
            Profile::Wan => Timing::wan(),
        },
        metadata,
        shared: config.cluster_digests().shared(),
        bootstrap_wait: match resumed {
            Some(Resumed { alone: true, .. }) => Duration::ZERO,
            _ => config.cluster.bootstrap_wait,
        },
        waits_for_room: true,
        ..MembershipConfig::new(config.member.id, config.gossip_address(), keys)
    }
}

fn first_status(config: &Config, planner: &Planner) -> Status {
    Status {
        view: Arc::default(),
        warnings: Vec::new(),
        services: config.services.clone(),
        health: HashMap::new(),
        fail_open: HashMap::new(),
        forwarder: phalanx_forwarder::Counters::default(),
        unresolved: Vec::new(),
        table: planner.current(),
        unprotected: 0,
        repair: phalanx_control::RepairCounters::default(),
        replication: phalanx_rebalancer::Counters::default(),
        transfers: Vec::new(),
        window_open: false,
        leaving: false,
        view_changes: 0,
        counters: DriverCounters::default(),
    }
}

async fn serve_admin(listen: SocketAddr, source: Source) -> anyhow::Result<()> {
    let listener = tokio::net::TcpListener::bind(listen)
        .await
        .with_context(|| format!("admin.listen: cannot listen on {listen}: give a free port of this host"))?;
    let router = phalanx_admin::router(Arc::new(source));
    tokio::spawn(async move {
        if let Err(error) = axum::serve(listener, router).await {
            tracing::error!("the admin API ended: {error}");
        }
    });
    Ok(())
}
