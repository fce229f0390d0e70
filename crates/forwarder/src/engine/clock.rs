//! What the engine tells time by.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// A clock that counts milliseconds and never goes back. Read once a batch, so that the choice costs nothing a packet.
#[derive(Clone, Debug)]
pub enum Clock {
    /// The time since then, by the system's monotonic clock.
    Since(Instant),
    /// Whatever the owner of this counter says: virtual time.
    Told(Arc<AtomicU64>),
}

impl Clock {
    /// The system's clock, from now on.
    pub fn started_now() -> Self {
        Self::Since(Instant::now())
    }

    /// Milliseconds since the clock was started.
    #[inline]
    pub(super) fn elapsed_ms(&self) -> u64 {
        match self {
            Self::Since(start) => start.elapsed().as_millis() as u64,
            Self::Told(elapsed_ms) => elapsed_ms.load(Ordering::Relaxed),
        }
    }
}
