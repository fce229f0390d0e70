//! What the operator and the driver say, once, at the start.

use std::{net::SocketAddr, time::Duration};

use aws_lc_rs::digest::{SHA256, digest};
use phalanx_flow::MemberId;
use serde::{Deserialize, Serialize};

use crate::{item::Metadata, seal::KeyRing};

/// Longest site name and longest version, in bytes: an item must fit one gossip datagram together with others.
pub const MAX_NAME_BYTES: usize = 64;

/// Most seeds that are asked; a cluster needs a few well-known members, not all of them.
pub const MAX_SEEDS: usize = 256;

/// Everything a member needs to know of itself before it can look for others.
#[derive(Clone, Debug)]
pub struct Config {
    /// This member's name, unique in the cluster.
    pub id: MemberId,
    /// The address others reach this member's gossip socket at; the data address, never a wildcard.
    pub address: SocketAddr,
    /// Grows with every start that lost the flow table; a start that adopted one keeps the boot of that table.
    pub boot: u64,
    /// Grows with every start of the process, whatever became of the flow table; microseconds since 1970 do.
    /// Orders this process's datagrams and metadata after those of its earlier lives.
    /// If the clock ran backwards, the others say so and the member continues above what they have seen.
    pub session: u64,
    /// The cluster's name; mixed into the datagram keys, so that two clusters with one key file stay apart.
    pub cluster: String,
    /// Gossip addresses to join through; own address ignored, at most [`MAX_SEEDS`].
    pub seeds: Vec<SocketAddr>,
    /// The cluster keys: the first seals, all open.
    pub keys: KeyRing,
    /// How fast failures are found; equal on all members, [`Timing::lan`] or [`Timing::wan`].
    pub timing: Timing,
    /// What this member says of itself to begin with.
    pub metadata: Metadata,
    /// What must be equal everywhere.
    pub shared: Shared,
    /// Every how much an active member repeats its metadata: the ID message of claim 18. Default 5 s.
    /// Above 64 members it is stretched in proportion, so that the ID messages of a large cluster do not crowd its datagrams.
    pub id_interval: Duration,
    /// How long the seeds are tried before the joining member with the lowest id turns active alone, time in which this member did not
    /// run not counted. Default 2 s.
    pub bootstrap_wait: Duration,
    /// This start adopted the flow table of an earlier one with the same `boot`: the member tells the others from its first word on that it
    /// is active, and is so itself when it has met them. Default false.
    pub resume: bool,
    /// Wait for [`crate::Membership::activate`] instead of turning active as soon as the cluster is known. Default false.
    pub hold_joining: bool,
    /// Ask to join an active cluster only once [`crate::Membership::report_room`] was called, or after 10 s. Default false.
    pub waits_for_room: bool,
}

impl Config {
    /// A configuration with the defaults of every field that has one.
    pub fn new(id: MemberId, address: SocketAddr, keys: KeyRing) -> Self {
        Self {
            id,
            address,
            boot: 1,
            session: 1,
            cluster: "phalanx".to_owned(),
            seeds: Vec::new(),
            keys,
            timing: Timing::lan(),
            metadata: Metadata::default(),
            shared: Shared::default(),
            id_interval: Duration::from_secs(5),
            bootstrap_wait: Duration::from_secs(2),
            resume: false,
            hold_joining: false,
            waits_for_room: false,
        }
    }

    pub(crate) fn validate(&self) -> Result<(), ConfigError> {
        if self.address.ip().is_unspecified() || self.address.port() == 0 {
            return Err(ConfigError::Address(self.address));
        }
        if self.seeds.len() > MAX_SEEDS {
            return Err(ConfigError::Seeds(self.seeds.len()));
        }
        self.metadata.validate()?;
        if self.id_interval < Duration::from_millis(100) {
            return Err(ConfigError::IdInterval);
        }
        self.timing.validate()
    }
}

/// A configuration that cannot work. Nothing was started; the operator corrects the field named.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Others could not reach it.
    #[error(
        "the gossip address {0} cannot be reached by others: give the data address and a port, not a wildcard"
    )]
    Address(SocketAddr),
    /// More than [`MAX_SEEDS`].
    #[error("{0} seeds are too many: name at most {MAX_SEEDS} members to join through")]
    Seeds(usize),
    /// A name longer than [`MAX_NAME_BYTES`].
    #[error("{field} is {bytes} bytes long: use at most {MAX_NAME_BYTES}")]
    NameTooLong {
        /// Which.
        field: &'static str,
        /// Its length.
        bytes: usize,
    },
    /// Below 100 ms.
    #[error("id_interval is below 100 ms: the ID messages would crowd the probes, use 5 s")]
    IdInterval,
    /// Times that contradict each other.
    #[error("timing: {0}")]
    Timing(&'static str),
}

/// How fast failures are found, and how surely.
///
/// Probes are fast and confirmation is slow, because suspicion alone already diverts traffic (design §4).
/// Measured figures for both profiles stand in `docs/operating/membership.md`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timing {
    /// The profile's name, as messages to the operator use it.
    pub name: String,
    /// One member is probed every so often. LAN 100 ms, WAN 600 ms.
    pub probe_period: Duration,
    /// After this long without an answer others are asked to probe; above the usual round trip, below the period. LAN 30 ms, WAN 200 ms.
    pub probe_timeout: Duration,
    /// How many others are asked. 3.
    pub indirect_probes: u8,
    /// From suspicion to confirmation; the suspected member can refute it in between. LAN 2 s, WAN 6 s.
    pub confirm_after: Duration,
    /// How long a member may own after the last proof that others hear it; below `confirm_after`. LAN 1.5 s, WAN 4.5 s.
    pub lease: Duration,
    /// News is passed on every so often. LAN 50 ms, WAN 150 ms.
    pub gossip_interval: Duration,
    /// How often one piece of news is passed on by each member: at least 15, or the last to hear it hears it seconds late.
    pub max_transmissions: u8,
    /// Members held to be down are tried again every so often, two at a time: heals partitions. LAN 5 s, WAN 15 s.
    pub retry_down: Duration,
    /// Seeds are tried again every so often while nobody is known. LAN 500 ms, WAN 1 s.
    pub hello_alone: Duration,
    /// Seeds that are not members are tried again every so often. LAN 5 s, WAN 15 s.
    pub hello_settled: Duration,
    /// The whole state is compared with one other member every so often. LAN 10 s, WAN 30 s.
    pub push_pull: Duration,
}

impl Timing {
    /// Members within a few milliseconds of each other.
    pub fn lan() -> Self {
        Self {
            name: "lan".to_owned(),
            probe_period: Duration::from_millis(100),
            probe_timeout: Duration::from_millis(30),
            indirect_probes: 3,
            confirm_after: Duration::from_secs(2),
            lease: Duration::from_millis(1500),
            gossip_interval: Duration::from_millis(50),
            max_transmissions: 15,
            retry_down: Duration::from_secs(5),
            hello_alone: Duration::from_millis(500),
            hello_settled: Duration::from_secs(5),
            push_pull: Duration::from_secs(10),
        }
    }

    /// Members in several data centres, round trips up to 160 ms.
    pub fn wan() -> Self {
        Self {
            name: "wan".to_owned(),
            probe_period: Duration::from_millis(600),
            probe_timeout: Duration::from_millis(200),
            indirect_probes: 3,
            confirm_after: Duration::from_secs(6),
            lease: Duration::from_millis(4500),
            gossip_interval: Duration::from_millis(150),
            max_transmissions: 15,
            retry_down: Duration::from_secs(15),
            hello_alone: Duration::from_secs(1),
            hello_settled: Duration::from_secs(15),
            push_pull: Duration::from_secs(30),
        }
    }

    fn validate(&self) -> Result<(), ConfigError> {
        let refuse = |sentence| Err(ConfigError::Timing(sentence));
        if self.probe_period.is_zero() || self.gossip_interval.is_zero() || self.hello_alone.is_zero() {
            return refuse("probe_period, gossip_interval and hello_alone must not be 0");
        }
        if self.probe_timeout.is_zero() || self.probe_timeout >= self.probe_period {
            return refuse(
                "probe_timeout must be above 0 and below probe_period, or no other member can be asked in time",
            );
        }
        if self.lease >= self.confirm_after || self.lease < self.probe_period * 3 {
            return refuse(
                "lease must be below confirm_after, or two members own one row, and at least three probe periods",
            );
        }
        if self.indirect_probes == 0 || self.max_transmissions == 0 {
            return refuse("indirect_probes and max_transmissions must not be 0");
        }
        if self.retry_down.is_zero() || self.hello_settled.is_zero() || self.push_pull.is_zero() {
            return refuse("retry_down, hello_settled and push_pull must not be 0");
        }
        Ok(())
    }
}

/// 64 bits of a SHA-256: enough to notice a difference nobody made on purpose, all traffic being authenticated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Digest(pub u64);

impl Digest {
    /// The digest of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        let hash = digest(&SHA256, bytes);
        Self(hash.as_ref().iter().take(8).fold(0, |sum, byte| sum << 8 | u64::from(*byte)))
    }
}

/// Digests of what must be equal on every member, field by field so that a difference can be named.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shared {
    /// The seed of the flow hash.
    pub hash_seed: Digest,
    /// The scoring and its parameters.
    pub scoring: Digest,
    /// The number of rows.
    pub rows: Digest,
    /// Where backups are looked for: it takes part in the ranking.
    pub backup_site: Digest,
    /// How many backups a flow has.
    pub backups: Digest,
    /// The port of handed-off packets.
    pub handoff_port: Digest,
    /// The services' addresses, ports and protocols; not their backends.
    pub services: Digest,
}

impl Shared {
    /// One digest of everything, with the timing, on which the leases depend.
    pub(crate) fn digest(&self, timing: Digest) -> Digest {
        let fields = [
            self.hash_seed,
            self.scoring,
            self.rows,
            self.backup_site,
            self.backups,
            self.handoff_port,
            self.services,
            timing,
        ];
        let mut bytes = Vec::with_capacity(fields.len() * 8);
        for field in fields {
            bytes.extend_from_slice(&field.0.to_be_bytes());
        }
        Digest::of(&bytes)
    }

    /// The first field in which `other` differs.
    pub(crate) fn first_difference(&self, other: &Self) -> Option<SharedField> {
        if self.hash_seed != other.hash_seed {
            Some(SharedField::HashSeed)
        } else if self.scoring != other.scoring {
            Some(SharedField::Scoring)
        } else if self.rows != other.rows {
            Some(SharedField::Rows)
        } else if self.backup_site != other.backup_site {
            Some(SharedField::BackupSite)
        } else if self.backups != other.backups {
            Some(SharedField::Backups)
        } else if self.handoff_port != other.handoff_port {
            Some(SharedField::HandoffPort)
        } else if self.services != other.services {
            Some(SharedField::Services)
        } else {
            None
        }
    }
}

/// A part of the configuration that must be equal on every member.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum SharedField {
    /// [`Shared::hash_seed`].
    HashSeed,
    /// [`Shared::scoring`].
    Scoring,
    /// [`Shared::rows`].
    Rows,
    /// [`Shared::services`].
    Services,
    /// [`Config::timing`].
    Timing,
    /// [`Shared::backup_site`].
    BackupSite,
    /// [`Shared::handoff_port`].
    HandoffPort,
    /// [`Shared::backups`].
    Backups,
}

impl SharedField {
    /// What to call it: the field's name in the configuration file, or what of the file it stands for.
    pub fn name(self) -> &'static str {
        match self {
            Self::HashSeed => "cluster.hash_seed",
            Self::Scoring => "cluster.scoring",
            Self::Rows => "the number of rows (it follows from cluster.scoring)",
            Self::Services => "the list of service addresses, ports and protocols ([[service]])",
            Self::Timing => "cluster.profile",
            Self::BackupSite => "cluster.backup_site",
            Self::HandoffPort => "cluster.handoff_port",
            Self::Backups => "cluster.backups",
        }
    }
}

pub(crate) fn timing_digest(timing: &Timing) -> Digest {
    // Only what leases depend on: a member may gossip or retry at its own pace.
    let mut bytes = Vec::with_capacity(64);
    for part in [timing.probe_period, timing.probe_timeout, timing.confirm_after, timing.lease] {
        bytes.extend_from_slice(&part.as_nanos().to_be_bytes());
    }
    Digest::of(&bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> Config {
        let keys = KeyRing::new(vec![[1; 32]]).unwrap();
        Config::new(MemberId(1), ([10, 0, 0, 1], 7946).into(), keys)
    }

    #[test]
    fn the_defaults_and_both_profiles_are_good() {
        assert_eq!(good().validate(), Ok(()));
        assert_eq!(Config { timing: Timing::wan(), ..good() }.validate(), Ok(()));
    }

    #[test]
    fn every_bad_field_is_refused_by_name() {
        let bad = |change: fn(&mut Config)| {
            let mut config = good();
            change(&mut config);
            config.validate().unwrap_err().to_string()
        };
        for (sentence, word) in [
            (bad(|config| config.address = ([0, 0, 0, 0], 1).into()), "gossip address"),
            (bad(|config| config.address.set_port(0)), "gossip address"),
            (bad(|config| config.seeds = vec![config.address; 257]), "seeds"),
            (bad(|config| config.metadata.site = "x".repeat(65)), "site"),
            (bad(|config| config.metadata.version = "x".repeat(65)), "version"),
            (bad(|config| config.id_interval = Duration::from_millis(99)), "id_interval"),
            (bad(|config| config.timing.lease = config.timing.confirm_after), "lease"),
            (bad(|config| config.timing.probe_timeout = config.timing.probe_period), "probe_timeout"),
            (bad(|config| config.timing.indirect_probes = 0), "indirect_probes"),
            (bad(|config| config.timing.gossip_interval = Duration::ZERO), "gossip_interval"),
            (bad(|config| config.timing.push_pull = Duration::ZERO), "push_pull"),
        ] {
            assert!(sentence.contains(word), "{sentence}");
        }
    }

    #[test]
    fn what_must_be_equal_is_digested_field_by_field() {
        let base = Shared::default();
        let fields: [(SharedField, Shared); 7] = [
            (SharedField::HashSeed, Shared { hash_seed: Digest(1), ..base.clone() }),
            (SharedField::Scoring, Shared { scoring: Digest(1), ..base.clone() }),
            (SharedField::Rows, Shared { rows: Digest(1), ..base.clone() }),
            (SharedField::BackupSite, Shared { backup_site: Digest(1), ..base.clone() }),
            (SharedField::Backups, Shared { backups: Digest(1), ..base.clone() }),
            (SharedField::HandoffPort, Shared { handoff_port: Digest(1), ..base.clone() }),
            (SharedField::Services, Shared { services: Digest(1), ..base.clone() }),
        ];
        for (field, other) in fields {
            assert_eq!(base.first_difference(&other), Some(field));
            assert_ne!(base.digest(Digest(0)), other.digest(Digest(0)));
        }
        assert_eq!(base.first_difference(&base.clone()), None);
        assert_ne!(base.digest(Digest(0)), base.digest(Digest(1)));
        assert_ne!(timing_digest(&Timing::lan()), timing_digest(&Timing::wan()));
    }
}
