//! The one place that decides what happens to a packet.
//!
//! `no_std`, no dependencies, no `unsafe`, no panic path: the same code runs on the host, in the simulator and in the kernel.
//! Top-down: a forwarder parses a frame ([`packet`]), hands what it found to [`mod@decide`], carries the returned [`Decision`] out on its
//! flow table, and rewrites the frame ([`encap`]).
//!
//! Invariant: this crate never reads a clock, never allocates on the packet path and never looks at a configuration.
#![no_std]
#![forbid(unsafe_code)]
#![cfg_attr(
    test,
    allow(
        clippy::arithmetic_side_effects,
        clippy::expect_used,
        clippy::float_arithmetic,
        clippy::indexing_slicing,
        clippy::panic,
        clippy::unwrap_used,
        reason = "tests run on the host and may fail loudly"
    )
)]

#[cfg(feature = "alloc")]
extern crate alloc;
#[cfg(test)]
extern crate std;

pub mod checksum;
pub mod crc8;
pub mod decide;
pub mod encap;
pub mod entry;
pub mod hash;
pub mod key;
pub mod member;
#[cfg(feature = "alloc")]
pub mod offload;
pub mod packet;
#[cfg(feature = "alloc")]
mod ranking;
pub mod row;
#[cfg(feature = "alloc")]
pub mod score;
#[cfg(feature = "alloc")]
pub mod siphash;
#[cfg(feature = "alloc")]
pub mod slots;
#[cfg(feature = "alloc")]
pub mod table;

pub use decide::{Arrival, Decision, Verdict, decide, decide_into};
pub use entry::{
    BIRTH_MS_BITS, BackendId, BackendIndex, FlowEntry, FlowEvent, FlowEventKind, FlowFlags, FlowState,
    Method, Record, Version, Vintage,
};
pub use hash::{FlowSeed, RowFunction, flow_hash};
pub use key::FlowKey;
pub use member::{MemberId, MemberSlot};
pub use row::Row;
#[cfg(feature = "alloc")]
pub use score::{Best, Score, Scoring};
#[cfg(feature = "alloc")]
pub use slots::{BackendTable, RankedBackend};
#[cfg(feature = "alloc")]
pub use table::{BackupSite, RankedMember, RankingError, RowTable};
