//! What one member makes of views, flows and backends, sans-io.
//!
//! Top-down:
//! - [`Control`] is the state machine a daemon or a simulator drives: views, peers' bytes and the time in; plans and changes of the
//!   flow table go straight to the [`Forwarder`](phalanx_forwarder::Forwarder), frames for the peers come out.
//! - [`change`] is our part in a planned change.
//! - [`planner`] makes the plan in force from views, services and usable backends.
//!
//! ```text
//!   membership: View ──┐                        ┌─► Planner ──► Forwarder: plan, tables
//!   peers: bytes ──────┼─► Control ─────────────┤
//!   usable backends ───┘    forwarder's events ─┴─► Replicator ──► frames for peers
//! ```
//!
//! Invariant: no clocks, sockets or threads; `now` is an argument, and the forwarder is whatever implements the trait.

pub mod change;
pub mod control;
mod lost;
pub mod planner;
pub mod shared;

pub use control::{Control, Event, REPAIR_EVERY, RepairCounters, Settings, doubt_all, forget_flows};
pub use planner::{Destination, Destinations, Fixed, Planner, Service, Snapshot, TableRanking};
pub use shared::SharedTables;
