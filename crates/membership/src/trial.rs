//! Figures: how fast a death is noticed, how seldom a life is doubted. Called by the tests (short) and by `cargo xtask membership` (long).

use std::time::{Duration, Instant};

use phalanx_flow::{MemberId, member::Liveness};

use crate::{
    ConfigError, Event, Timing,
    harness::{Cluster, Network, config},
};

/// Longest a cluster may take to find itself before a trial gives up; cold starts of 100 take seconds.
const SETTLE_LIMIT: Duration = Duration::from_secs(120);

/// Why a trial has no figures.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TrialError {
    /// The members could not be started.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The members did not agree on one view in time.
    #[error("{members} members did not settle within {SETTLE_LIMIT:?} (seed {seed})")]
    Unsettled {
        /// How many.
        members: u32,
        /// Of the trial.
        seed: u64,
    },
    /// Somebody never noticed.
    #[error("member {0} did not notice (seed {1})")]
    Unnoticed(MemberId, u64),
}

/// How long after a kill what happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kill {
    /// The first of the others suspects it.
    pub first_suspicion: Duration,
    /// The last one does: from here on all traffic is diverted.
    pub suspected: Duration,
    /// The first one holds it to be down.
    pub first_confirmation: Duration,
    /// The last one does.
    pub confirmed: Duration,
}

/// A cluster of members 1 to `members`, started together and settled.
pub fn settled(
    epoch: Instant,
    timing: &Timing,
    network: Network,
    members: u32,
    seed: u64,
) -> Result<Cluster, TrialError> {
    let mut cluster = Cluster::new(epoch, seed, network);
    for id in 1..=members {
        cluster.add(config(id, timing))?;
    }
    cluster.run_until(SETTLE_LIMIT, Cluster::is_settled).ok_or(TrialError::Unsettled { members, seed })?;
    // What the start left to be passed on would help or hinder; let it pass.
    cluster.run_for(timing.gossip_interval * 40);
    Ok(cluster)
}

/// Kills one of `members` and measures.
pub fn kill(
    epoch: Instant,
    timing: &Timing,
    network: Network,
    members: u32,
    seed: u64,
) -> Result<Kill, TrialError> {
    let mut cluster = settled(epoch, timing, network, members, seed)?;
    let victim = (seed % u64::from(members)) as usize;
    let id = cluster.nodes[victim].config.id;
    // Anywhere in the probe period, so that the trials do not all start in step.
    cluster.run_for(timing.probe_period.mul_f64((seed % 97) as f64 / 97.0));
    for node in &mut cluster.nodes {
        node.events.clear();
    }
    let from = cluster.now();
    cluster.kill(victim);
    cluster.run_for(timing.confirm_after * 4 + timing.probe_period * 20);

    let mut figures: Option<Kill> = None;
    for (_, node) in cluster.nodes.iter().enumerate().filter(|(index, _)| *index != victim) {
        let first = |wanted: fn(&Event, MemberId) -> bool| {
            node.events
                .iter()
                .find(|(_, event)| wanted(event, id))
                .map(|(at, _)| *at - from)
                .ok_or(TrialError::Unnoticed(node.config.id, seed))
        };
        let down = first(|event, id| matches!(event, Event::MemberDown { id: who, .. } if *who == id))?;
        let suspected = first(|event, id| {
            matches!(event, Event::Liveness { id: who, liveness: Liveness::Suspect } if *who == id)
                || matches!(event, Event::MemberDown { id: who, .. } if *who == id)
        })?;
        let sum = figures.get_or_insert(Kill {
            first_suspicion: suspected,
            suspected,
            first_confirmation: down,
            confirmed: down,
        });
        sum.first_suspicion = sum.first_suspicion.min(suspected);
        sum.suspected = sum.suspected.max(suspected);
        sum.first_confirmation = sum.first_confirmation.min(down);
        sum.confirmed = sum.confirmed.max(down);
    }
    figures.ok_or(TrialError::Unnoticed(id, seed))
}

/// What a quiet cluster did.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Quiet {
    /// Times a member held a live one to be down.
    pub false_confirmations: u64,
    /// Times a member's liveness turned to suspect.
    pub suspicions: u64,
    /// Times a member renewed its identity.
    pub renewals: u64,
    /// Datagrams sent per member and second.
    pub datagrams_per_second: f64,
    /// Bytes sent per member and second, sealed, without UDP and IP headers.
    pub bytes_per_second: f64,
    /// Shortest remaining lease seen, looked at once a second at every member.
    pub shortest_lease: Duration,
}

/// Leaves `members` alone for `length` of virtual time.
pub fn quiet(
    epoch: Instant,
    timing: &Timing,
    network: Network,
    members: u32,
    seed: u64,
    length: Duration,
) -> Result<Quiet, TrialError> {
    let mut cluster = settled(epoch, timing, network, members, seed)?;
    let totals = |cluster: &Cluster| {
        (0..cluster.nodes.len())
            .filter_map(|node| cluster.membership(node))
            .map(|membership| {
                let counters = membership.counters();
                (counters.sent, counters.sent_bytes, counters.renewals)
            })
            .fold((0, 0, 0), |sum, each| (sum.0 + each.0, sum.1 + each.1, sum.2 + each.2))
    };
    let before = totals(&cluster);
    let from = cluster.now();
    let mut result = Quiet { shortest_lease: timing.lease, ..Quiet::default() };
    for node in &mut cluster.nodes {
        node.events.clear();
    }
    while cluster.now() - from < length {
        cluster.run_for(Duration::from_secs(1));
        let now = cluster.now();
        for node in 0..cluster.nodes.len() {
            let lease = cluster.membership(node).and_then(|membership| membership.lease_valid_until());
            let left = lease.map_or(Duration::ZERO, |until| until.saturating_duration_since(now));
            result.shortest_lease = result.shortest_lease.min(left);
        }
        for node in &mut cluster.nodes {
            for (_, event) in node.events.drain(..) {
                result.false_confirmations += u64::from(matches!(event, Event::MemberDown { .. }));
                result.suspicions +=
                    u64::from(matches!(event, Event::Liveness { liveness: Liveness::Suspect, .. }));
            }
        }
    }
    let after = totals(&cluster);
    let member_seconds = f64::from(members) * (cluster.now() - from).as_secs_f64();
    result.renewals = after.2 - before.2;
    result.datagrams_per_second = (after.0 - before.0) as f64 / member_seconds;
    result.bytes_per_second = (after.1 - before.1) as f64 / member_seconds;
    Ok(result)
}

/// What a process that stood still for a while caused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stall {
    /// How many of the others suspected it.
    pub suspected_by: usize,
    /// How many members (it included) held a live member to be down.
    pub confirmed_by: usize,
    /// From its waking until nobody suspects anybody.
    pub recovered: Option<Duration>,
}

/// Stops one of `members` for `length` and measures.
pub fn stall(
    epoch: Instant,
    timing: &Timing,
    network: Network,
    members: u32,
    seed: u64,
    length: Duration,
) -> Result<Stall, TrialError> {
    let mut cluster = settled(epoch, timing, network, members, seed)?;
    let victim = (seed % u64::from(members)) as usize;
    let id = cluster.nodes[victim].config.id;
    for node in &mut cluster.nodes {
        node.events.clear();
    }
    cluster.stall(victim, length);
    cluster.run_for(length);
    let recovered = cluster.run_until(timing.confirm_after * 10, Cluster::is_settled);
    cluster.run_for(timing.confirm_after * 2);
    let having = |wanted: fn(&Event, MemberId) -> bool| {
        cluster.nodes.iter().filter(|node| node.events.iter().any(|(_, event)| wanted(event, id))).count()
    };
    Ok(Stall {
        suspected_by: having(
            |event, id| matches!(event, Event::Liveness { id: who, liveness: Liveness::Suspect } if *who == id),
        ),
        confirmed_by: having(|event, _| matches!(event, Event::MemberDown { .. })),
        recovered,
    })
}

/// The smallest of `sorted` that at least `share` of them do not exceed.
pub fn quantile(sorted: &[Duration], share: f64) -> Duration {
    let rank = (sorted.len() as f64 * share).ceil() as usize;
    sorted.get(rank.saturating_sub(1)).or(sorted.last()).copied().unwrap_or_default()
}
