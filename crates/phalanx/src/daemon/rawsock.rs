//! Starts the raw-socket forwarder.

use std::sync::Arc;

use phalanx_forwarder::{Forwarder, Plan};

use crate::config::Config;

/// Starts it with the settings of the configuration.
pub(super) fn start(config: &Config, plan: Plan) -> anyhow::Result<Arc<dyn Forwarder>> {
    let _ = (config, plan);
    anyhow::bail!("no forwarder yet")
}
