//! What moves between members: replication and transfer tables, sans-io.
pub mod codec;
pub mod digest;
pub mod hlc;
pub mod ranking;
#[cfg(test)]
mod testing;
pub mod transfer;

pub use digest::{RowDigest, differing_rows, row_digests};
pub use ranking::{Ranking, Survivors};
pub use transfer::{
    Change, LocalAction, TransferPlan, changed_rows, former_entries, plan, plan_cache_offers,
};
