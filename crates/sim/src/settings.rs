//! What a run is made of: everything that is fixed before virtual time starts.

use std::time::Duration;

use phalanx_flow::FlowSeed;
use phalanx_flow::score::{Best, Scoring};
use phalanx_flow::table::BackupSite;
use phalanx_forwarder::engine::TableLimits;
use phalanx_membership::Timing;
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};

use crate::faults::Fault;

/// Members of a site that starts by itself before anything else happens, however long that takes.
pub const LARGE: usize = 64;

/// A generator of its own for each use, so that a shortened schedule does not change what else is random.
pub fn stream(seed: u64, use_of_it: u64) -> StdRng {
    StdRng::seed_from_u64(
        seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ use_of_it.wrapping_mul(0xd6e8_feb8_6659_fd93),
    )
}

/// Who spreads connections over the backends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Balancer {
    /// The router alone: ECMP straight to the backends, no load balancer.
    Ecmp,
    /// Members with consistent hashing and a flow table of their own each, of which the others know nothing.
    LocalTables,
    /// Phalanx.
    Phalanx,
}

/// How the router spreads flows when its next hops change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rehash {
    /// Hash modulo the number of next hops: a change moves almost every flow.
    Modulo,
    /// Only the flows of a next hop that goes move, and a share to one that comes.
    Resilient,
}

/// Everything that is fixed for a run; all of it follows from the seed and the size.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Names the run.
    pub seed: u64,
    /// Members that start the cluster.
    pub members: usize,
    /// Members that may join later.
    pub spares: usize,
    /// Rows of the members' table; 65,536 in production.
    pub rows: usize,
    /// Ranking.
    pub scoring: Scoring,
    /// Of flow hash and rankings.
    pub hash_seed: FlowSeed,
    /// Where backups stand.
    pub site_rule: BackupSite,
    /// Backups of every flow.
    pub backups: usize,
    /// Timing of the membership.
    pub timing: Timing,
    /// Backends at first, and those that may come later.
    pub backends: [usize; 2],
    /// Connections opened at first.
    pub flows: usize,
    /// Idle timeout of both services.
    pub idle: Duration,
    /// Linger after a FIN.
    pub linger: Duration,
    /// Linger after a RST.
    pub reset_linger: Duration,
    /// Life of what was only asked for.
    pub half_open: Duration,
    /// One-way latency between any two.
    pub latency: [Duration; 2],
    /// Share of packets lost, each by itself: among members, and between clients and members.
    pub loss: [f64; 2],
    /// Share of datagrams and packets delivered twice.
    pub duplicates: f64,
    /// Which members have a cache of everything: a share.
    pub caches: f64,
    /// `replicate = "syn"`.
    pub replicate_syn: bool,
    /// Off: the twin.
    pub replication: bool,
    /// Records of transfer tables a second and member.
    pub transfer_rate: u32,
    /// What the router does when next hops change.
    pub rehash: Rehash,
    /// Clocks of day differ by up to this, either way.
    pub skew: Duration,
    /// Monotonic clocks run fast or slow by up to so many millionths.
    pub drift_ppm: i64,
    /// Room in the flow tables of ordinary members.
    pub limits: TableLimits,
    /// One member has room for this many flows only.
    pub cramped: Option<usize>,
    /// Weights of the members are drawn from 1 to this.
    pub weights: u32,
    /// Who balances.
    pub balancer: Balancer,
    /// What is broken on purpose.
    pub fault: Option<Fault>,
    /// What is due by time alone is late in the drivers by at most this.
    pub idle_tick: Duration,
    /// A view that has changed is acted upon after this, with whatever has changed meanwhile; the daemon's control task takes the latest when
    /// it comes to it.
    pub view_pause: Duration,
    /// The share of connections over IPv6.
    pub ipv6: f64,
    /// Pauses between ICMP errors about live connections, at the least and at the most.
    pub icmp: Option<[Duration; 2]>,
    /// One member hears of backends so much later than the others, and until then has none in its configuration that came after the start.
    pub laggard: Option<Duration>,
    /// Rounds of traffic, changes, rest and silence, each [`schedule::ROUND`](crate::schedule::ROUND) long; one in a common run, which does
    /// not wait for the end of it.
    pub rounds: u32,
}

impl Settings {
    /// The settings of a seed; with `members` members if that is given.
    pub fn from_seed(seed: u64, members: Option<usize>) -> Self {
        let mut rng = stream(seed, 1);
        let members = members.unwrap_or_else(|| *pick(&mut rng, &[2, 3, 3, 4, 4, 5, 5, 6, 8]));
        let hash_seed = FlowSeed([rng.random(), rng.random()]);
        let crc8 = rng.random_bool(0.05);
        let scoring = if crc8 {
            Scoring::Crc8 { best: Best::Highest }
        } else {
            Scoring::Rendezvous { key: hash_seed.0 }
        };
        let loss = *pick(&mut rng, &[0.0, 0.0, 0.001, 0.01]);
        let cramped = (rng.random_bool(0.08)).then(|| rng.random_range(16..200));
        Self {
            seed,
            members,
            spares: (members / 2).clamp(1, 3),
            rows: if crc8 { 256 } else { *pick(&mut rng, &[16, 64, 256, 1024]) },
            scoring,
            hash_seed,
            site_rule: if rng.random_bool(0.15) { BackupSite::Other } else { BackupSite::Any },
            backups: 1,
            timing: Timing::lan(),
            backends: [rng.random_range(3..=6), 3],
            flows: if members > 20 { 400 } else { rng.random_range(60..=140) },
            idle: Duration::from_secs(12),
            linger: Duration::from_secs(6),
            reset_linger: Duration::from_secs(1),
            half_open: Duration::from_secs(5),
            latency: [
                Duration::from_micros(100),
                Duration::from_micros(*pick(&mut rng, &[400, 2_000, 6_000])),
            ],
            loss: [loss, *pick(&mut rng, &[0.0, 0.0, 0.005])],
            duplicates: *pick(&mut rng, &[0.0, 0.0, 0.01]),
            caches: *pick(&mut rng, &[0.0, 0.0, 0.5, 1.0]),
            replicate_syn: rng.random_bool(0.1),
            replication: true,
            transfer_rate: *pick(&mut rng, &[200_000, 200_000, 400]),
            rehash: if rng.random_bool(0.5) { Rehash::Modulo } else { Rehash::Resilient },
            skew: *pick(&mut rng, &[Duration::ZERO, Duration::from_millis(200), Duration::from_secs(5)]),
            drift_ppm: *pick(&mut rng, &[0, 50, 500]),
            limits: TableLimits { flows: 4096, half_open: 1024, cached: 2048 },
            cramped,
            weights: *pick(&mut rng, &[1, 1, 4]),
            balancer: Balancer::Phalanx,
            fault: None,
            idle_tick: Duration::from_millis(100),
            view_pause: if members > LARGE { Duration::from_millis(100) } else { Duration::ZERO },
            ipv6: 0.0,
            icmp: None,
            laggard: None,
            rounds: 1,
        }
    }

    /// The same site with connections of both families, ICMP errors about them, and a member whose list of backends is not that of the
    /// others.
    #[must_use]
    pub fn mixed(self) -> Self {
        let mut rng = stream(self.seed, 20);
        Self {
            ipv6: *pick(&mut rng, &[0.3, 0.5, 1.0]),
            icmp: Some([Duration::from_millis(5), Duration::from_millis(120)]),
            laggard: rng.random_bool(0.5).then(|| Duration::from_millis(rng.random_range(3_000..15_000))),
            ..self
        }
    }

    /// The same site for days: the slower of the two timings that the daemon has, its timeouts, and clients that send seldom.
    #[must_use]
    pub fn for_days(self, rounds: u32) -> Self {
        Self {
            timing: Timing::wan(),
            idle: Duration::from_secs(900),
            linger: Duration::from_secs(60),
            reset_linger: Duration::from_secs(10),
            idle_tick: Duration::from_secs(1),
            flows: self.flows.div_ceil(4),
            rounds,
            ..self
        }
    }

    /// How much longer detection and what depends on it may take than among members of one network.
    pub fn slowness(&self) -> u32 {
        let lan = Timing::lan().confirm_after.as_millis();
        (self.timing.confirm_after.as_millis() / lan.max(1)) as u32
    }

    /// How much longer clients pause than in a run of a minute.
    pub(crate) fn sparseness(&self) -> u32 {
        (self.idle.as_secs() / 12) as u32
    }
}

/// One of `choices`, all equally likely.
pub(crate) fn pick<'a, T>(rng: &mut StdRng, choices: &'a [T]) -> &'a T {
    &choices[rng.random_range(0..choices.len())]
}
