//! What this crate asks of a view: who holds which flow.

use std::collections::BTreeSet;

use phalanx_flow::{FlowKey, MemberId};

/// A row table as the rebalancer sees it: every row has an owner and a backup.
///
/// The daemon, the simulator and the tests each bring one; it never changes once it is handed over.
pub trait Ranking: Send + Sync {
    /// The row of `key`, below [`Ranking::row_count`].
    fn row_of(&self, key: &FlowKey) -> u32;

    /// Owner and backup of `row`, in this order; `None` where there are fewer members, and for a row that does not exist.
    fn holders(&self, row: u32) -> [Option<MemberId>; 2];

    /// How many rows there are, the same for all rankings of one cluster.
    fn row_count(&self) -> u32;
}

/// The members of one row that hold its flows: owner first, at most two.
pub(crate) fn holders_of<'a>(ranking: &'a dyn Ranking, row: u32) -> impl Iterator<Item = MemberId> + 'a {
    ranking.holders(row).into_iter().flatten()
}

/// Which members live, and which of them still have what they held under the old table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Survivors {
    /// Members not confirmed down. Suspected ones live.
    pub live: BTreeSet<MemberId>,
    /// Those of `live` whose flow table is empty because they are new or started again (a new boot number).
    pub blank: BTreeSet<MemberId>,
}

impl Survivors {
    /// The survivors when nobody lost a flow table and still lives.
    pub fn all(live: impl IntoIterator<Item = MemberId>) -> Self {
        Self { live: live.into_iter().collect(), blank: BTreeSet::new() }
    }

    /// Whether `member` lives and has kept its flow table.
    pub fn keeps_state(&self, member: MemberId) -> bool {
        self.live.contains(&member) && !self.blank.contains(&member)
    }
}
