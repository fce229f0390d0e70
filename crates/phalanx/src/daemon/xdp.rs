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

/// The sizes of its tables.
fn limits(config: &Config) -> TableLimits {
    TableLimits {
        flows: config.forwarder.max_flows as usize,
        half_open: config.forwarder.max_half_open as usize,
        cached: match config.member.cache {
            CacheMode::All => TableLimits::default().cached,
            // Nothing is put into it.
            CacheMode::Off => 128,
        },
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
        limits: limits(config),
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

#[cfg(test)]
mod tests {
    use phalanx_forwarder_xdp::object::map_sizes;

    use super::*;
    use crate::config::tests::small;

    /// What the loader gives these maps as `max_entries`.
    fn entries<const N: usize>(config: &Config, maps: [&str; N]) -> [u32; N] {
        let sizes = map_sizes(&limits(config), 1);
        maps.map(|name| sizes.iter().find(|(map, _)| *map == name).expect("it is sized").1)
    }

    #[test]
    fn told_nothing_a_member_has_room_for_a_million_flows_of_each_family() {
        assert_eq!(entries(&small(""), ["FLOWS4", "FLOWS6"]), [1_000_000; 2]);
        // Sets of eight.
        assert_eq!(entries(&small(""), ["HALF_OPEN"]), [65_536 / 8]);
    }

    #[test]
    fn the_tables_have_the_room_that_the_configuration_names() {
        let config = small("max_flows = 5000\nmax_half_open = 4096");
        assert_eq!(entries(&config, ["FLOWS4", "FLOWS6", "HALF_OPEN"]), [5000, 5000, 512]);
        assert_eq!(entries(&config, ["CACHE"]), [128], "without `cache` nothing is put there");
    }
}
