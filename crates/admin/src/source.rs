//! What the daemon tells the admin API.

use std::future::Future;
use std::net::SocketAddr;

use crate::metrics::Sample;
use crate::types::{Explain, Health, Members, Services};

/// A flow somebody asks about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowQuery {
    /// The client.
    pub source: SocketAddr,
    /// The service; of the same family as `source`.
    pub destination: SocketAddr,
    /// IP protocol number: 6 (TCP) or 17 (UDP).
    pub protocol: u8,
}

impl FlowQuery {
    /// `tcp` or `udp`.
    pub const fn protocol_name(&self) -> &'static str {
        if self.protocol == 17 { "udp" } else { "tcp" }
    }
}

/// The daemon, as the admin API sees it.
///
/// All but [`AdminSource::explain`] answer from what is at hand: they are called on the runtime's threads and must not block.
pub trait AdminSource: Send + Sync + 'static {
    /// The members in this member's view, by id.
    fn members(&self) -> Members;
    /// The services in the order of the configuration.
    fn services(&self) -> Services;
    /// What happens to a flow. May ask peers what they hold; must not take longer than a few seconds.
    fn explain(&self, flow: FlowQuery) -> impl Future<Output = Explain> + Send;
    /// Whether this member is ready, and safe to lose.
    fn health(&self) -> Health;
    /// All metrics, in any order.
    fn metrics(&self) -> Vec<Sample>;
}
