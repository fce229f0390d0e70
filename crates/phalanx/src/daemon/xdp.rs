//! Starts the XDP forwarder.

use std::path::PathBuf;
use std::sync::Arc;

use phalanx_forwarder::Plan;
use phalanx_forwarder::engine::TableLimits;
use phalanx_forwarder_xdp::{Config as Settings, XdpForwarder, usual_directory};

use super::Started;
use super::resume::Adopted;
use crate::config::{CacheMode, Config, PinDir};

/// Where the member's programs and tables are pinned; `None`: nowhere.
pub(super) fn pin_directory(config: &Config) -> Option<PathBuf> {
    match &config.forwarder.pin_dir {
        PinDir::Off => None,
        PinDir::At(directory) => Some(directory.clone()),
        PinDir::Usual => usual_directory(&format!("{}-{}", config.cluster.name, config.member.id)),
    }
}

/// Starts it with the settings of the configuration.
pub(super) fn start(config: &Config, plan: Plan) -> anyhow::Result<Started> {
    let forwarder = &config.forwarder;
    let pins = pin_directory(config);
    if pins.is_none() && forwarder.pin_dir == PinDir::Usual {
        tracing::warn!(
            "there is no BPF file system on /sys/fs/bpf and none can be mounted: nothing is pinned, so connections depend on the other \
             members while this daemon does not run"
        );
    }
    let settings = Settings {
        interfaces: forwarder.interfaces.clone(),
        limits: TableLimits {
            flows: forwarder.max_flows as usize,
            half_open: forwarder.max_half_open as usize,
            cached: match config.member.cache {
                CacheMode::All => TableLimits::default().cached,
                // Nothing is put into it.
                CacheMode::Off => 128,
            },
        },
        data_address: config.member.address,
        pins,
        object: forwarder.bpf_object.clone(),
    };
    // Its sentences say the causes themselves.
    let started = XdpForwarder::start(&settings, plan).map_err(|error| anyhow::anyhow!("{error}"))?;
    let forwarder = Arc::new(started);
    let adopted = forwarder
        .adopted()
        .map(|adopted| Adopted { note: adopted.note.clone(), backends: adopted.backends.clone() });
    let handle = Arc::clone(&forwarder);
    let end = Box::new(move |keep: bool| if keep { handle.leave_attached() } else { handle.shutdown() });
    Ok(Started { forwarder, adopted, end })
}
