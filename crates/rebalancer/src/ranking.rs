//! What this crate asks of a view: who holds which flow.

use std::collections::BTreeSet;

use phalanx_flow::{FlowKey, MemberId};

/// Holders of a row at the most: the owner and two backups (`backups = 2`).
pub const MAX_HOLDERS: usize = 3;

/// The holders of a row: the owner first, then the backups, then `None` where there are no more.
pub type Holders = [Option<MemberId>; MAX_HOLDERS];

/// A row table as the rebalancer sees it: every row has an owner and one backup or two.
///
/// The daemon, the simulator and the tests each bring one; it never changes once it is handed over.
pub trait Ranking: Send + Sync {
    /// The row of `key`, below [`Ranking::row_count`].
    fn row_of(&self, key: &FlowKey) -> u32;

    /// Who holds the flows of `row`; nobody, for a row that does not exist. Where there are fewer members than a row wants, all of them.
    fn holders(&self, row: u32) -> Holders;

    /// How many rows there are, the same for all rankings of one cluster.
    fn row_count(&self) -> u32;
}

/// The members of one row that hold its flows: owner first.
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
