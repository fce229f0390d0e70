//! A whole site in virtual time, from one seed: members, router, clients, backends; checkers, replay and shortening of what fails.
//!
//! Everything that decides is the real code: `membership`, `control`, `rebalancer`, the engine of the forwarders, `flow::decide`.
//! What is simulated is what lies between and around: clocks, datagrams, streams, a router, clients and backends.
//!
//! ```text
//!  Settings, Schedule (from a seed) ──► World ──► Report: violations, connections broken by kind of change
//!                                        │ asks after every ruling, change and sample
//!                                        ▼
//!                                     Checkers
//! ```
//!
//! Invariant: one thread, one queue, generators that follow from the seed: the same seed gives the same run.
//! Invariant: members see the world only through the cores' own inputs; checkers see all of it and change nothing.

pub mod checks;
pub mod consistency;
pub mod faults;
pub mod forwarder;
pub mod losses;
pub mod planted;
pub mod runner;
pub mod schedule;
pub mod settings;
pub mod shrink;
pub mod world;
