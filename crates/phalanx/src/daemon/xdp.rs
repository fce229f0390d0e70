//! Starts the XDP forwarder.

use std::sync::Arc;

use phalanx_forwarder::engine::TableLimits;
use phalanx_forwarder::{Forwarder, Plan};
use phalanx_forwarder_xdp::{Config as Settings, XdpForwarder};

use crate::config::Config;

/// Starts it with the settings of the configuration.
pub(super) fn start(config: &Config, plan: Plan) -> anyhow::Result<Arc<dyn Forwarder>> {
    let forwarder = &config.forwarder;
    let settings = Settings {
        interfaces: forwarder.interfaces.clone(),
        limits: TableLimits {
            flows: forwarder.max_flows as usize,
            half_open: forwarder.max_half_open as usize,
            ..TableLimits::default()
        },
        data_address: config.member.address,
        pins: forwarder.pin_dir.clone(),
        object: forwarder.bpf_object.clone(),
    };
    Ok(Arc::new(XdpForwarder::start(&settings, plan)?))
}
