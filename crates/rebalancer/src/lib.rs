//! What moves between members: replication and transfer tables, sans-io (design §4 "What is recorded and replicated", §7).
//!
//! Top-down:
//! - [`Replicator`] is the state machine a daemon drives: events of the forwarder and bytes of the peers in, changes to the
//!   forwarder's tables and bytes for the peers out. Its documentation draws the states and says in what order to call it.
//! - [`transfer`] is the one rule of what moves when the row table changes, as pure functions.
//! - [`digest`] finds the rows in which two holders differ.
//! - [`codec`] is the wire format, and [`hlc`] the clock that stamps births.
//!
//! ```text
//!   membership: a view ──► Change ──changed_rows──► the driver visits its flow table
//!                            │                                  │ records
//!                            └──────────────► plan ◄────────────┘
//!                                              │ TransferPlan
//!                     Replicator::begin_transfer ──► chunks, paced, acknowledged when applied
//! ```
//!
//! Invariant: no clocks, sockets or threads; `now` is an argument and deadlines come out.
//! Invariant: this crate knows views only as two rankings and sets of members, and packets not at all.
//! Invariant: bytes from a peer never panic and never allocate beyond a frame.

pub mod codec;
pub mod digest;
mod flow_map;
pub mod hlc;
pub mod ranking;
pub mod replicator;
pub mod transfer;

#[cfg(test)]
mod testing;

pub use codec::Digests;
pub use digest::{RowDigest, differing_rows, row_digests};
pub use ranking::{Holders, MAX_HOLDERS, Ranking, Survivors};
pub use replicator::{
    Apply, ApplyBatch, ApplyResult, Config, Counters, Event, Held, Lookup, PeerError, Policy, Replicator,
    TransferProgress, ViewInput, aged,
};
pub use transfer::{
    Ahead, Change, LocalAction, TransferPlan, cache_entries_of_departed, changed_rows, former_entries, plan,
    plan_cache_offers, plan_refill,
};
