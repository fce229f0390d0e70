//! The JSON of the admin API. Units stand last in a name; 64-bit digests and scores are text, because JSON numbers lose bits.

use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

/// The answer of `/v1/members`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Members {
    /// The cluster's name.
    pub cluster: String,
    /// Id of the member that answers.
    pub local: u32,
    /// Digest of its view, 16 hexadecimal digits: members that agree show the same.
    pub view_digest: String,
    /// While a change of members is planned: the digest the view will have then.
    pub pending_view: Option<String>,
    /// Differences that are allowed and unwise, one sentence each: backend lists that differ, a profile that does not fit.
    pub warnings: Vec<String>,
    /// The members, by id.
    pub members: Vec<MemberStatus>,
}

/// One member.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MemberStatus {
    /// Its id.
    pub id: u32,
    /// Its data address.
    pub address: IpAddr,
    /// Its site, empty if it has none.
    pub site: String,
    /// Its weight; 0 is a director.
    pub weight: u32,
    /// What it says of itself: `joining`, `active` or `leaving`.
    pub state: String,
    /// What the member that answers believes of it: `alive`, `suspect` or `down`.
    pub liveness: String,
    /// Its boot number: grows with every start that lost the flow table.
    pub boot: u64,
    /// Its SWIM generation: grows whenever it had to prove that it lives.
    pub generation: u32,
    /// Whether it keeps a cache.
    pub cache: bool,
    /// Its program's version.
    pub version: String,
    /// Where its admin API listens, if that can be reached from elsewhere.
    pub admin_address: Option<SocketAddr>,
    /// Digest of the view it has, as it last said; empty if not known.
    pub view_digest: String,
    /// What it waits for: `to join`, `to leave`, `weight N`, or, of a member met after a partition, `to merge`.
    pub waits: Option<String>,
    /// While a change is planned: whether it has sent all it has to send for it.
    pub ready: bool,
    /// Flows it holds, as it last said.
    pub flows: u64,
    /// Flows whose backup has not acknowledged them, as it last said: what its death would lose.
    pub unprotected_flows: u64,
    /// Rows it owns and rows it backs up, in the view of the member that answers.
    pub rows_owned: u32,
    /// Rows it is the backup of.
    pub rows_backed_up: u32,
}

/// The answer of `/v1/services`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Services {
    /// The services, in the order of the configuration.
    pub services: Vec<ServiceStatus>,
}

/// One service.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ServiceStatus {
    /// Its name.
    pub name: String,
    /// Its virtual address.
    pub address: IpAddr,
    /// Its port.
    pub port: u16,
    /// `tcp` or `udp`.
    pub protocol: String,
    /// `l2`, `ipip` or `gue`.
    pub method: String,
    /// No backend is healthy, so all of them are used.
    pub fail_open: bool,
    /// Its backends: those of the configuration in their order, then those that were removed and still have flows.
    pub backends: Vec<BackendStatus>,
}

/// One backend of a service.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BackendStatus {
    /// Where packets are sent.
    pub address: IpAddr,
    /// Its weight in the configuration.
    pub weight: u32,
    /// It takes no new flows: `drain = true`, or removed from the configuration.
    pub drain: bool,
    /// What the checks of this member say.
    pub health: BackendHealth,
    /// Flows to it in this member's flow table.
    pub flows: u64,
}

/// What health checks say of a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BackendHealth {
    /// The service has no checks.
    Unchecked,
    /// It answers.
    Healthy,
    /// It does not.
    Unhealthy,
}

/// The answer of `/v1/explain`: what happens to a flow's packets, and why.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Explain {
    /// The client.
    pub source: SocketAddr,
    /// The service's address and port.
    pub destination: SocketAddr,
    /// `tcp` or `udp`.
    pub protocol: String,
    /// The service's name; none if the flow goes to no service.
    pub service: Option<String>,
    /// The flow hash, 16 hexadecimal digits.
    pub hash: String,
    /// The flow's row.
    pub row: u32,
    /// The members of the row's ranking, best first.
    pub ranking: Vec<Ranked>,
    /// First of the ranking.
    pub owner: Option<u32>,
    /// Second of the ranking, or the best of another site.
    pub backup: Option<u32>,
    /// Third of the ranking, where it holds flows too (`backups = 2`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub second_backup: Option<u32>,
    /// Who handles the flow now: the owner, or the backup while the owner is suspected.
    pub acting_owner: Option<u32>,
    /// The flow's slot in the backend table.
    pub slot: Option<u32>,
    /// The backend that the consistent table gives.
    pub consistent_backend: Option<IpAddr>,
    /// The backend that the holders have recorded: where the flow's packets go.
    pub recorded_backend: Option<IpAddr>,
    /// Whether the recorded backend is another one than the consistent table gives: only state keeps this flow alive.
    pub deviates: bool,
    /// Members whose flow table has the flow.
    pub holders: Vec<Holder>,
    /// Members that were asked and did not answer in time: they may hold it too.
    pub silent: Vec<u32>,
    /// What a packet of this flow that comes in here would meet, in a sentence.
    pub verdict: String,
}

/// A member in a row's ranking.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ranked {
    /// The member.
    pub member: u32,
    /// Its score for the row, 16 hexadecimal digits before weighting.
    pub score: String,
    /// Its weight.
    pub weight: u32,
    /// `alive`, `suspect` or `down`.
    pub liveness: String,
}

/// A member that holds a flow.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Holder {
    /// The member.
    pub member: u32,
    /// `owner`, `backup`, `second backup`, `former` or `cache`.
    pub role: String,
    /// The backend in its record.
    pub backend: IpAddr,
    /// `half-open`, `established`, `closing` or `reset`.
    pub state: String,
    /// Nobody knew the flow, and the record is the consistent choice.
    pub recovered: bool,
    /// The backup has acknowledged the record.
    pub protected: bool,
    /// Time since it last saw a packet of the flow.
    pub idle_ms: u64,
}

/// The answer of `/healthz`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Health {
    /// Packets are forwarded and the lease stands: routers may send packets here.
    pub ready: bool,
    /// No connection would break if this member died now.
    pub safe_to_lose: bool,
    /// Why not, one sentence each.
    pub reasons: Vec<String>,
}

/// What any route answers when it cannot answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// One sentence: what is wrong and what to do.
    pub error: String,
    /// The query parameter to blame, if one is.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub parameter: Option<String>,
}
