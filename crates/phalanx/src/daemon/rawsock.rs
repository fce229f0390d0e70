//! Starts the raw-socket forwarder.

use std::num::NonZeroUsize;
use std::sync::Arc;

use phalanx_forwarder::engine::TableLimits;
use phalanx_forwarder::{Forwarder, Plan};
use phalanx_forwarder_rawsock::{Config as Settings, RawsockForwarder};

use crate::config::Config;

/// Starts it with the settings of the configuration.
pub(super) fn start(config: &Config, plan: Plan) -> anyhow::Result<Arc<dyn Forwarder>> {
    let forwarder = &config.forwarder;
    let defaults = Settings::new(forwarder.interfaces.clone(), config.member.address);
    let settings = Settings {
        threads: NonZeroUsize::new(usize::from(forwarder.threads)).unwrap_or(NonZeroUsize::MIN),
        limits: TableLimits {
            flows: forwarder.max_flows as usize,
            half_open: forwarder.max_half_open as usize,
            ..defaults.limits
        },
        ..defaults
    };
    Ok(Arc::new(RawsockForwarder::start(&settings, plan)?))
}
