//! Which backends new flows go to.

use phalanx_flow::BackendId;
use phalanx_flow::slots::RankedBackend;

use crate::config::ServiceConfig;

/// A backend's health has changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HealthChange {
    /// Name of the service.
    pub service: String,
    /// The backend.
    pub backend: BackendId,
    /// Whether its checks succeed.
    pub healthy: bool,
}

/// The backends that new flows of a service go to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Usable {
    /// Drained ones are left out.
    pub backends: Vec<RankedBackend>,
    /// No backend is healthy, so all are used.
    pub fail_open: bool,
}

/// Leaves out what is drained and what is not healthy; if nothing healthy is left, all that is not drained counts as healthy.
pub fn usable_backends(service: &ServiceConfig, healthy: impl Fn(&BackendId) -> bool) -> Usable {
    let willing: Vec<RankedBackend> = service
        .backends
        .iter()
        .map(|backend| RankedBackend { id: service.backend_id(backend), weight: backend.effective_weight() })
        .filter(|backend| backend.weight > 0)
        .collect();
    let backends: Vec<RankedBackend> = willing.iter().copied().filter(|backend| healthy(&backend.id)).collect();
    let fail_open = backends.is_empty() && !willing.is_empty();
    Usable { backends: if fail_open { willing } else { backends }, fail_open }
}
