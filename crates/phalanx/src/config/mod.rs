//! What an operator writes down: one TOML file per member.
//!
//! [`Config::load`] reads the file and finds *every* mistake in it at once, each with its line; nothing later has to check again.
//! The fields are documented here for the code and in `docs/operating/configuration.md` for the operator; a test keeps the
//! two complete.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use phalanx_flow::{BackendId, FlowSeed, MemberId, Method};

mod build;
mod digest;
mod environment;
mod error;
mod reader;
#[cfg(test)]
pub(crate) mod tests;

pub use digest::{ClusterDigests, FieldDigest};
pub use environment::{Environment, System};
pub use error::{ConfigError, ConfigErrorKind};

pub use crate::keys::ClusterKey;

/// Default UDP port of the gossip.
pub const GOSSIP_PORT: u16 = 7946;
/// Default UDP port of the QUIC connections between members.
pub const TRANSFER_PORT: u16 = 7947;
/// Default UDP port of handed-off packets: Geneve's own (RFC 8926 §3.3).
pub const HANDOFF_PORT: u16 = 6081;
/// Default UDP port of a GUE decapsulator: 6080, which IANA gives to GUE.
pub const GUE_PORT: u16 = 6080;
/// Default port of the admin API.
pub const ADMIN_PORT: u16 = 7980;
/// Default weight of a member or backend: leaves room to go down in steps of 1 %.
pub const DEFAULT_WEIGHT: u32 = 100;
/// Greatest weight of a member or backend: 16 bits, so that scores times weights fit in integers.
pub const MAX_WEIGHT: u32 = 65_535;

/// Seeds at most: a few are enough to join by.
pub const MAX_SEEDS: usize = 256;

/// A whole configuration, checked.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// The file it came from.
    pub file: PathBuf,
    /// This member.
    pub member: MemberConfig,
    /// What all members share.
    pub cluster: ClusterConfig,
    /// The packet path.
    pub forwarder: ForwarderConfig,
    /// The admin API.
    pub admin: AdminConfig,
    /// Logs.
    pub log: LogConfig,
    /// The services, in the order of the file; at least one.
    pub services: Vec<ServiceConfig>,
}

/// `[member]`: this member.
#[derive(Clone, Debug, PartialEq)]
pub struct MemberConfig {
    /// The member's id: 1 to 4294967294, or an IPv4 address in quotes, which stands for its number (claims 5 and 6). Required.
    /// Unique in the cluster.
    pub id: MemberId,
    /// The data address: gossip, hand-off and QUIC use it, and it is the outer source of tunnels. Required.
    pub address: IpAddr,
    /// Share of the flows, relative to the other members: 0 to 65535, default 100. 0 is a director: it dispatches and never
    /// owns.
    pub weight: u32,
    /// The site the member stands in, default empty. Counts only with `cluster.backup_site = "other"`.
    pub site: String,
    /// Whether the member keeps a cache of other members' flows, default off. `all` costs memory and replication traffic and
    /// saves hand-offs.
    pub cache: CacheMode,
    /// Members to announce to, at most 256, default none: alone until another one calls. The member's own address may be among
    /// them.
    pub seeds: Vec<Seed>,
    /// Directory in which the boot number is kept, default none: the boot number is then the time of the start.
    pub state_dir: Option<PathBuf>,
}

/// One of `member.seeds`: `"address"`, `"address:port"`, or either with `id@` in front.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seed {
    /// The id the member there should have; checked for doubles.
    pub id: Option<MemberId>,
    /// Its gossip socket.
    pub address: SocketAddr,
}

/// `member.cache`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CacheMode {
    /// No cache: the version of Figure 5.
    #[default]
    Off,
    /// Every association of the cluster is sent here: the document's broadcast.
    All,
}

/// `[cluster]`: what all members share. Fields marked *equal* must be the same on every member: a joiner that differs is
/// refused by name.
#[derive(Clone, Debug, PartialEq)]
pub struct ClusterConfig {
    /// The cluster's name: 1 to 64 letters, digits, `-`, `_` and `.`; *equal*. Required.
    pub name: String,
    /// The key file, relative to the configuration file. Required. See `phalanx keygen`.
    pub key_file: PathBuf,
    /// The keys in it, first one first: it seals, all of them open.
    pub keys: Vec<ClusterKey>,
    /// Seed of the flow hash: 32 hexadecimal digits; *equal*. Required. Changing it moves every flow.
    pub hash_seed: FlowSeed,
    /// How members and backends are ranked, default rendezvous; *equal*.
    pub scoring: ScoringKind,
    /// Timing of the gossip, default lan; *equal*, because leases must run out before the others' confirmation.
    pub profile: Profile,
    /// UDP port of the gossip, 1 to 65535, default 7946.
    pub gossip_port: u16,
    /// UDP port of QUIC between members, 1 to 65535, default 7947.
    pub transfer_port: u16,
    /// UDP port of handed-off packets, 1 to 65535, default 6081; *equal*.
    pub handoff_port: u16,
    /// Whether hand-offs too large for the path are fragmented between members, default false: the client is told a smaller
    /// MTU instead.
    pub handoff_fragment: bool,
    /// Where the backup is looked for, default any; *equal*.
    pub backup_site: BackupSite,
    /// Backups of every flow, 1 or 2, default 1; *equal*. With 2 a flow outlives the loss of any two members in the same instant, and
    /// every member holds half as many flows again and sends each association twice.
    pub backups: u32,
    /// How long the seeds are tried before the joining member with the lowest id turns active alone: 100 ms to 10 min,
    /// default 2 s.
    pub bootstrap_wait: Duration,
    /// Whether flows are replicated to backups, default true. False breaks connections when a member dies: it exists for the
    /// lab's twin.
    pub replication: bool,
    /// When an association is sent to the backup, default established.
    pub replicate: Replicate,
    /// Flow records a second that this member sends in transfer tables: 100 to 100000000, default 100000.
    pub transfer_rate: u32,
    /// Whether caches forget what they hold of a departed member once its flows have new owners, default true (case \[750\]).
    pub flush_on_leave: bool,
}

/// `cluster.scoring`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ScoringKind {
    /// Keyed SipHash-2-4, weighted logarithmically; 65,536 rows.
    #[default]
    Rendezvous,
    /// The document's CRC of degree 8, highest is best; 256 rows. Its shares are uneven.
    Crc8Highest,
    /// The same, lowest is best.
    Crc8Lowest,
}

impl ScoringKind {
    /// Number of rows.
    pub const fn rows(self) -> u32 {
        match self {
            Self::Rendezvous => 65_536,
            Self::Crc8Highest | Self::Crc8Lowest => 256,
        }
    }

    /// As it is written in the file.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Rendezvous => "rendezvous",
            Self::Crc8Highest => "crc8-highest",
            Self::Crc8Lowest => "crc8-lowest",
        }
    }
}

/// `cluster.profile`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Profile {
    /// Round trips of a few milliseconds.
    #[default]
    Lan,
    /// Round trips of up to a few hundred milliseconds.
    Wan,
}

impl Profile {
    /// As it is written in the file.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Lan => "lan",
            Self::Wan => "wan",
        }
    }
}

/// `cluster.backup_site`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BackupSite {
    /// The second of the ranking, wherever it stands.
    #[default]
    Any,
    /// The best of the ranking that stands in another site than the owner, where there is one.
    Other,
}

/// `cluster.replicate`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Replicate {
    /// At the client's first packet with ACK and without SYN: a SYN flood makes no traffic.
    #[default]
    Established,
    /// At the SYN: the document's way.
    Syn,
}

/// `[forwarder]`: the packet path.
#[derive(Clone, Debug, PartialEq)]
pub struct ForwarderConfig {
    /// Which forwarder, default rawsock; must be compiled in.
    pub kind: ForwarderKind,
    /// Interfaces to take packets from, at least one. Required.
    pub interfaces: Vec<String>,
    /// Threads of the packet path: 1 to 64, default 1.
    pub threads: u16,
    /// Flows remembered at most, with kind xdp per address family: 1024 to 67108864, default 1000000. A full table falls back on the consistent choice, counted.
    pub max_flows: u32,
    /// Half-open flows remembered at most, oldest out first: 1024 to 16777216, default 65536.
    pub max_half_open: u32,
    /// With kind xdp: where programs and tables are pinned, so that they outlive the process.
    pub pin_dir: PinDir,
    /// With kind xdp: another object than the one compiled in, default none.
    pub bpf_object: Option<PathBuf>,
}

/// `forwarder.pin_dir`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum PinDir {
    /// `/sys/fs/bpf/phalanx/CLUSTER-ID`, where there is a BPF file system or one can be mounted.
    #[default]
    Usual,
    /// Written as the empty text: nothing is pinned, and programs and tables end with the process.
    Off,
    /// This directory of a BPF file system; it is an error if it is not one.
    At(PathBuf),
}

/// `forwarder.kind`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ForwarderKind {
    /// `AF_PACKET` sockets.
    #[default]
    Rawsock,
    /// A program in the kernel.
    Xdp,
}

impl ForwarderKind {
    /// As it is written in the file.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Rawsock => "rawsock",
            Self::Xdp => "xdp",
        }
    }
}

/// `[admin]`: the admin API.
#[derive(Clone, Debug, PartialEq)]
pub struct AdminConfig {
    /// Where it listens, default `127.0.0.1:7980`. It has no authentication: loopback only, unless `allow_remote`.
    pub listen: SocketAddr,
    /// Whether `listen` may be something else than loopback, default false.
    pub allow_remote: bool,
}

/// `[log]`.
#[derive(Clone, Debug, PartialEq)]
pub struct LogConfig {
    /// Text for people or one JSON object a line, default text.
    pub format: LogFormat,
    /// What is logged, default `info`: a level, or a filter as `tracing-subscriber` reads it (`info,phalanx=debug`).
    pub level: String,
}

/// `log.format`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// `[[service]]`: one virtual address, protocol and port. The set of them must be *equal* on all members.
#[derive(Clone, Debug, PartialEq)]
pub struct ServiceConfig {
    /// Name in logs, metrics and the admin API: as `cluster.name`, unique. Required.
    pub name: String,
    /// The virtual address. Required.
    pub address: IpAddr,
    /// The port: 1 to 65535. Required.
    pub port: u16,
    /// TCP or UDP, default tcp.
    pub protocol: Protocol,
    /// How packets reach the backends. Required.
    pub method: Method,
    /// UDP port of the backends' GUE decapsulator: 1 to 65535, default 6080. For method gue only.
    pub gue_port: u16,
    /// A flow without packets for this long is forgotten: 1 s to 7 days, default 15 min for TCP and 60 s for UDP. Less than
    /// what clients keep idle breaks nothing as long as the backends are unchanged.
    pub idle_timeout: Duration,
    /// How long a flow is kept after a FIN and its last packet: 1 s to 1 h, default 60 s.
    pub linger: Duration,
    /// How long a flow is kept after a RST and its last packet: 100 ms to 10 min, default 5 s.
    pub reset_linger: Duration,
    /// How long a flow that was only asked for is kept: 1 s to 5 min, default 10 s.
    pub half_open_timeout: Duration,
    /// Whether packets too large for the path once encapsulated are fragmented outside, default false: the client is told
    /// "too big" instead.
    pub fragment: bool,
    /// How backends are checked, default not at all: all are taken for healthy.
    pub health: Option<HealthConfig>,
    /// The backends, in the order of the file; at least one.
    pub backends: Vec<BackendConfig>,
}

/// `service.protocol`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    /// TCP.
    #[default]
    Tcp,
    /// UDP.
    Udp,
}

impl Protocol {
    /// IP protocol number.
    pub const fn number(self) -> u8 {
        match self {
            Self::Tcp => phalanx_flow::key::TCP,
            Self::Udp => phalanx_flow::key::UDP,
        }
    }

    /// As it is written in the file.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        }
    }
}

/// `[[service.backend]]`.
#[derive(Clone, Debug, PartialEq)]
pub struct BackendConfig {
    /// Where packets are sent. Required; unique in the service.
    pub address: IpAddr,
    /// Share of the flows, relative to the service's other backends: 0 to 65535, default 100. 0 takes no new flows.
    pub weight: u32,
    /// Takes no new flows and keeps those it has, default false. The same as weight 0, without forgetting the weight.
    pub drain: bool,
}

impl BackendConfig {
    /// Weight for new flows.
    pub const fn effective_weight(&self) -> u32 {
        if self.drain { 0 } else { self.weight }
    }
}

/// `[service.health]`: checks through the forwarding path, by every member.
#[derive(Clone, Debug, PartialEq)]
pub struct HealthConfig {
    /// What counts as an answer.
    pub kind: HealthKind,
    /// Time between checks of one backend: 100 ms to 10 min, default 1 s; jittered by up to a tenth.
    pub interval: Duration,
    /// How long a check may take: 10 ms to 1 min, default the lesser of 1 s and the interval.
    pub timeout: Duration,
    /// Good checks in a row until a backend is healthy again: 1 to 100, default 2.
    pub rise: u32,
    /// Bad checks in a row until a backend is not healthy any more: 1 to 100, default 3.
    pub fall: u32,
    /// What becomes of the connections of a backend that is not healthy, default keep. New ones go elsewhere in any case.
    pub on_failure: OnFailure,
}

/// `health.on_failure`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnFailure {
    /// They stay, in case the backend comes back before the client gives up.
    #[default]
    Keep,
    /// The client's next packet is answered with a RST, so that it can connect anew at once.
    Reset,
}

/// `health.kind` and what belongs to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HealthKind {
    /// The connection is accepted.
    Tcp,
    /// A GET is answered with the status expected.
    Http {
        /// Path and query asked for, default `/`.
        path: String,
        /// The Host header, default the service's address.
        host: Option<String>,
        /// Status expected: 100 to 599, default 200.
        expect_status: u16,
    },
}

impl Config {
    /// Reads and checks `path`, and what it names on this machine: interfaces and the key file. Finds every mistake at once.
    pub fn load(path: &Path) -> Result<Self, Vec<ConfigError>> {
        match std::fs::read_to_string(path) {
            Ok(text) => Self::parse(path, &text, &System),
            Err(error) => Err(vec![ConfigError::file(path, &error)]),
        }
    }

    /// Checks `text`, which came from `path`, on a machine that is `environment`.
    pub fn parse(path: &Path, text: &str, environment: &dyn Environment) -> Result<Self, Vec<ConfigError>> {
        build::build(path, text, environment)
    }

    /// The member's gossip socket.
    pub fn gossip_address(&self) -> SocketAddr {
        SocketAddr::new(self.member.address, self.cluster.gossip_port)
    }

    /// The member's QUIC socket.
    pub fn transfer_address(&self) -> SocketAddr {
        SocketAddr::new(self.member.address, self.cluster.transfer_port)
    }

    /// What must be, or should be, equal on all members.
    pub fn cluster_digests(&self) -> ClusterDigests {
        ClusterDigests::of(self)
    }

    /// The sections and fields in which `new` differs and that a reload (SIGHUP) cannot change: everything but services, their
    /// backends, the weight of the member, and the cluster keys.
    pub fn needs_restart(&self, new: &Self) -> Vec<&'static str> {
        let (old_member, new_member) =
            (self.member.clone(), MemberConfig { weight: self.member.weight, ..new.member.clone() });
        let new_cluster = ClusterConfig {
            keys: self.cluster.keys.clone(),
            key_file: self.cluster.key_file.clone(),
            ..new.cluster.clone()
        };
        let mut fields = Vec::new();
        for (same, field) in [
            (old_member == new_member, "[member]"),
            (self.cluster == new_cluster, "[cluster]"),
            (self.forwarder == new.forwarder, "[forwarder]"),
            (self.admin == new.admin, "[admin]"),
            (self.log == new.log, "[log]"),
        ] {
            if !same {
                fields.push(field);
            }
        }
        fields
    }
}

impl ServiceConfig {
    /// The name on the wire of one of the service's backends.
    pub fn backend_id(&self, backend: &BackendConfig) -> BackendId {
        BackendId::new(backend.address, self.method, self.gue_port)
    }

    /// Virtual address and port.
    pub const fn socket(&self) -> SocketAddr {
        SocketAddr::new(self.address, self.port)
    }
}

/// The name of a forwarding method as it is written in the file.
pub const fn method_name(method: Method) -> &'static str {
    match method {
        Method::L2 => "l2",
        Method::IpIp => "ipip",
        Method::Gue => "gue",
    }
}

/// The id that an IPv4 address stands for.
pub(crate) const fn id_of(address: Ipv4Addr) -> MemberId {
    MemberId(address.to_bits())
}
