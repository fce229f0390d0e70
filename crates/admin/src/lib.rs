//! The admin API: routes, types and metrics.
//!
//! The daemon implements [`AdminSource`] and serves [`router`]; the command line reads the same types back.
//!
//! | route | answer |
//! |---|---|
//! | `GET /v1/members` | [`Members`] |
//! | `GET /v1/services` | [`Services`] |
//! | `GET /v1/explain?src=IP:PORT&dst=IP:PORT&protocol=tcp` | [`Explain`] |
//! | `GET /healthz` | [`Health`]; status 503 while the member is not ready |
//! | `GET /metrics` | Prometheus text |
//!
//! Invariant: this crate reads no flow table and asks no peer; it shows what the source says.

pub mod metrics;
mod routes;
mod source;
#[cfg(test)]
mod tests;
pub mod types;

pub use metrics::{Metric, MetricKind, Sample};
pub use routes::router;
pub use source::{AdminSource, FlowQuery};
pub use types::{
    BackendHealth, BackendStatus, ErrorBody, Explain, Health, Holder, MemberStatus, Members, Ranked,
    ServiceStatus, Services,
};
