//! Where logs go: stderr, as text or JSON.

use std::io::IsTerminal as _;

use tracing_subscriber::EnvFilter;

use crate::config::{LogConfig, LogFormat};

/// Starts logging. `PHALANX_LOG`, if set, wins over `log.level`. A second call changes nothing.
pub fn start(config: &LogConfig) {
    let filter = std::env::var("PHALANX_LOG")
        .ok()
        .and_then(|text| EnvFilter::try_new(text).ok())
        // The level was checked with the configuration.
        .unwrap_or_else(|| EnvFilter::try_new(&config.level).unwrap_or_else(|_| EnvFilter::new("info")));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    let started = match config.format {
        LogFormat::Text => builder.try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    };
    if started.is_err() {
        tracing::debug!("logging was already started");
    }
}
