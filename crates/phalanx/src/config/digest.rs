//! Digests of what all members must have in common.

use std::hash::Hasher;

use phalanx_membership::{Digest, Shared};
use siphasher::sip::SipHasher24;

use super::{BackupSite, Config, ServiceConfig, method_name};

/// Digests of a configuration, for the gossip.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClusterDigests {
    /// Fields that must be equal on all members: a joiner that differs in one is refused by its name.
    pub must_match: Vec<FieldDigest>,
    /// All backend lists: members that differ are warned about, because they still serve each other's flows.
    pub backends: u64,
}

/// Digest of one field.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FieldDigest {
    /// The field as it stands in the configuration.
    pub name: &'static str,
    /// A digest that is the same on every platform and in every version.
    pub digest: u64,
}

impl ClusterDigests {
    pub(super) fn of(config: &Config) -> Self {
        let cluster = &config.cluster;
        let rows = cluster.scoring.rows().to_string();
        let seed = format!("{:016x}{:016x}", cluster.hash_seed.0[0], cluster.hash_seed.0[1]);
        let site = match cluster.backup_site {
            BackupSite::Any => "any",
            BackupSite::Other => "other",
        };
        let backups = cluster.backups.to_string();
        let handoff = cluster.handoff_port.to_string();
        let services = lines(config.services.iter().map(service));
        let must_match = [
            ("cluster.name", cluster.name.as_str()),
            ("cluster.hash_seed", seed.as_str()),
            ("cluster.scoring", cluster.scoring.as_str()),
            ("rows", rows.as_str()),
            ("cluster.backup_site", site),
            ("cluster.backups", backups.as_str()),
            ("cluster.profile", cluster.profile.as_str()),
            ("cluster.handoff_port", handoff.as_str()),
            ("service", services.as_str()),
        ]
        .into_iter()
        .map(|(name, value)| FieldDigest { name, digest: digest(name, value) })
        .collect();
        let backends = lines(config.services.iter().flat_map(|of| {
            of.backends.iter().map(move |backend| {
                format!(
                    "{} {} {} {} {}",
                    service(of),
                    backend.address,
                    method_name(of.method),
                    of.backend_id(backend).port.map(|byte| format!("{byte:02x}")).concat(),
                    backend.effective_weight(),
                )
            })
        }));
        Self { must_match, backends: digest("backends", &backends) }
    }

    /// What the gossip compares. The cluster's name and the profile are compared there by other means: the first goes into the
    /// keys, the second is digested with the timing.
    pub fn shared(&self) -> Shared {
        let field = |name| {
            let found = self.must_match.iter().find(|field| field.name == name);
            found.map_or(Digest::default(), |field| Digest(field.digest))
        };
        Shared {
            hash_seed: field("cluster.hash_seed"),
            scoring: field("cluster.scoring"),
            rows: field("rows"),
            backup_site: field("cluster.backup_site"),
            backups: field("cluster.backups"),
            handoff_port: field("cluster.handoff_port"),
            services: field("service"),
        }
    }

    /// The names of the fields in which `other` differs.
    pub fn differences(&self, other: &Self) -> Vec<&'static str> {
        let theirs =
            |name| other.must_match.iter().find(|field| field.name == name).map(|field| field.digest);
        self.must_match
            .iter()
            .filter(|field| theirs(field.name) != Some(field.digest))
            .map(|field| field.name)
            .collect()
    }
}

fn service(service: &ServiceConfig) -> String {
    format!("{} {}", service.protocol.as_str(), service.socket())
}

/// The order in the file does not count.
fn lines(lines: impl Iterator<Item = String>) -> String {
    let mut lines: Vec<String> = lines.collect();
    lines.sort_unstable();
    lines.join("\n")
}

fn digest(name: &str, value: &str) -> u64 {
    let mut hasher = SipHasher24::new_with_keys(0, 0);
    hasher.write(name.as_bytes());
    hasher.write_u8(0);
    hasher.write(value.as_bytes());
    hasher.finish()
}
