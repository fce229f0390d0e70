//! Health checks of backends, by every member, through the forwarding path.
//!
//! A check is an ordinary kernel TCP connection from the member's data address to the *service's* address.
//! Its packets carry a mark, a rule sends marked packets into a TUN device, and the driver hands what comes out of it to the
//! forwarder, which wraps it and sends it to the backend under check like any client's packet (design §5).
//! The backend answers straight to the member. So a backend that is up but lacks the service's address, or its decapsulator,
//! fails, as it would fail clients.
//!
//! ```text
//!   check task ──connect──► kernel TCP ──mark──► phx-check (TUN) ──► driver ──port → backend──► ProbeSender
//!   (one per backend)          ▲                                                                    │ l2, ipip, gue
//!        │                     └───────────── SYN-ACK, straight from the service's address ◄── backend ◄┘
//!        └─► Health (rise, fall) ──► HealthChange
//! ```
//!
//! The driver owns the TUN device and one task per backend; a task that is aborted leaves nothing behind. Changes go through an
//! unbounded channel: there are at most two per backend and `interval × min(rise, fall)`.

mod check;
mod driver;
mod path;
mod state;
mod usable;

pub use driver::{BackendCheck, HealthChange, HealthDriver};
pub use path::HealthError;
pub use state::Health;
pub use usable::{Candidate, Usable, usable_backends};

use phalanx_flow::BackendId;

/// Whoever can send a packet to a backend by its method: the forwarder.
pub trait ProbeSender: Send + Sync + 'static {
    /// Sends `ip_packet`, a whole IPv4 or IPv6 packet from this member to a service's address, to `backend` in the frame or
    /// tunnel of its method. Packets that cannot be sent are dropped: the check fails and says so. Must not block.
    fn send_probe(&self, backend: BackendId, ip_packet: &[u8]);
}
