//! Where logs go: stderr, as text or JSON, by way of a thread of their own.
//!
//! A member that stands still while stderr takes its time (a full pipe, a disk that is busy) would miss its probes and be suspected: whoever
//! logs hands its line to that thread and goes on. When more lines wait than have room (128,000) those that come are dropped and counted.

use std::io::IsTerminal as _;
use std::sync::OnceLock;

use tracing_appender::non_blocking::{ErrorCounter, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::EnvFilter;

use crate::config::{LogConfig, LogFormat};

/// What [`start`] gives: while it lives lines are written, and when it goes those that wait are written first (for at most a second).
#[must_use = "nothing is logged once this is dropped"]
pub struct Logging {
    _writer: WorkerGuard,
}

/// Counts the lines that had no room.
static DROPPED: OnceLock<ErrorCounter> = OnceLock::new();

/// Starts logging. `PHALANX_LOG`, if set, wins over `log.level`. A second call changes nothing.
pub fn start(config: &LogConfig) -> Logging {
    let filter = std::env::var("PHALANX_LOG")
        .ok()
        .and_then(|text| EnvFilter::try_new(text).ok())
        // The level was checked with the configuration.
        .unwrap_or_else(|| EnvFilter::try_new(&config.level).unwrap_or_else(|_| EnvFilter::new("info")));
    let (writer, guard) = NonBlockingBuilder::default().thread_name("log").finish(std::io::stderr());
    let dropped = writer.error_counter();
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(writer)
        .with_ansi(std::io::stderr().is_terminal());
    let started = match config.format {
        LogFormat::Text => builder.try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    };
    match started {
        Ok(()) => DROPPED.set(dropped).unwrap_or_default(),
        Err(_) => tracing::debug!("logging was already started"),
    }
    Logging { _writer: guard }
}

/// Lines dropped because more waited to be written than have room.
pub fn dropped_lines() -> u64 {
    DROPPED.get().map_or(0, |dropped| dropped.dropped_lines() as u64)
}
