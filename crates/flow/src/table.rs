//! The row table: who owns what, and who is the backup.
//!
//! The invariant that makes it all work: remove the best of a ranking, and the second best is now the best.
//! So the backup *is* the next owner, and already has the state.
//!
//! With [`BackupSite::Other`] the backup is the best of another site, not always the second best of all; then the next owner is the
//! backup or, where that is displaced, the third of the row, and asks the backup for what it lacks.

use alloc::vec::Vec;
use core::fmt;

use crate::hash::RowFunction;
use crate::member::{MemberId, MemberSlot};
use crate::ranking::{Candidate, Ranking};
use crate::row::{RANKS, Row};
use crate::score::{Score, Scorer, Scoring};

/// Where the backup stands (`backup_site` in the configuration).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum BackupSite {
    /// Sites do not change the ranking.
    #[default]
    Any,
    /// The backup is the best of another site than the owner's, where there is one.
    Other,
}

/// What the ranking needs to know of a member.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RankedMember {
    /// Its name.
    pub id: MemberId,
    /// Its share, relative to the other members'; 0: a director, which never owns.
    pub weight: u32,
    /// Its site; only equality counts.
    pub site: u32,
}

/// Why a table could not be made or changed. The table is as it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RankingError {
    /// The scoring cannot have that many rows: a configuration error.
    Rows(usize),
    /// Two members have this id: whoever builds the view must refuse one of them.
    Duplicate(MemberId),
    /// No member has this id.
    Unknown(MemberId),
}

impl fmt::Display for RankingError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Rows(rows) => write!(
                f,
                "{rows} rows: rendezvous takes a power of two of at most 65,536, crc8 takes exactly 256"
            ),
            Self::Duplicate(id) => write!(f, "two members have the id {id}"),
            Self::Unknown(id) => write!(f, "no member has the id {id}"),
        }
    }
}

impl core::error::Error for RankingError {}

/// The ranking of the members in every row: the same on every member with the same view, whatever the order of the changes.
///
/// `add`, `remove` and `reweight` cost a few hashes per row whatever the number of members (1,000 members: milliseconds);
/// they belong on a thread that may wait.
#[derive(Clone, Debug)]
pub struct RowTable {
    scoring: Scoring,
    function: RowFunction,
    site_rule: BackupSite,
    ranking: Ranking<MemberId, RANKS>,
}

impl RowTable {
    /// Ranks `members` in `rows` rows (1 to 65,536: a power of two for rendezvous, 256 for `crc8`).
    pub fn new(
        scoring: Scoring,
        rows: usize,
        site_rule: BackupSite,
        members: &[RankedMember],
    ) -> Result<Self, RankingError> {
        let function = scoring.row_function(rows).ok_or(RankingError::Rows(rows))?;
        let mut ids: Vec<MemberId> = members.iter().map(|member| member.id).collect();
        ids.sort_unstable();
        if let Some([id, _]) = ids.array_windows::<2>().find(|[a, b]| a == b) {
            return Err(RankingError::Duplicate(*id));
        }
        let scorer = Scorer::of(scoring);
        let candidates = members.iter().map(|member| (member.id, candidate(scorer, member)));
        let ranking = Ranking::new(scorer, rows, site_rule == BackupSite::Other, candidates);
        Ok(Self { scoring, function, site_rule, ranking })
    }

    /// Adds a member; an error if its id is taken.
    pub fn add(&mut self, member: RankedMember) -> Result<(), RankingError> {
        if self.ranking.get(member.id).is_some() {
            return Err(RankingError::Duplicate(member.id));
        }
        self.ranking.add(member.id, candidate(Scorer::of(self.scoring), &member));
        Ok(())
    }

    /// Takes a member out; an error if there is none of that id.
    pub fn remove(&mut self, id: MemberId) -> Result<(), RankingError> {
        if self.ranking.remove(id) { Ok(()) } else { Err(RankingError::Unknown(id)) }
    }

    /// Gives a member another weight; an error if there is none of that id.
    pub fn reweight(&mut self, id: MemberId, weight: u32) -> Result<(), RankingError> {
        if self.ranking.reweight(id, weight) { Ok(()) } else { Err(RankingError::Unknown(id)) }
    }

    /// Makes `members` the members, by as few changes as possible, or by a rebuild where that is cheaper.
    pub fn set_members(&mut self, members: &[RankedMember]) -> Result<(), RankingError> {
        let mut wanted = members.to_vec();
        wanted.sort_unstable_by_key(|member| member.id);
        if let Some([a, _]) = wanted.array_windows::<2>().find(|[a, b]| a.id == b.id) {
            return Err(RankingError::Duplicate(a.id));
        }
        let present = self.members();
        let find = |list: &[RankedMember], id: MemberId| -> Option<RankedMember> {
            list.binary_search_by_key(&id, |member| member.id).ok().and_then(|at| list.get(at).copied())
        };
        // Who changed its site leaves and joins.
        let same = |a: &RankedMember, b: RankedMember| a.site == b.site;
        let gone: Vec<MemberId> = present
            .iter()
            .filter(|member| !find(&wanted, member.id).is_some_and(|new| same(member, new)))
            .map(|member| member.id)
            .collect();
        let (kept, new): (Vec<RankedMember>, Vec<RankedMember>) =
            wanted.iter().partition(|member| find(&present, member.id).is_some_and(|old| same(member, old)));
        let reweighted: Vec<RankedMember> =
            kept.into_iter().filter(|member| find(&present, member.id) != Some(*member)).collect();
        // A change costs about as many hashes per row as the row has places and one more; a rebuild as many as there are members.
        let changes = gone.len().saturating_add(new.len()).saturating_add(reweighted.len());
        if changes.saturating_mul(RANKS) > wanted.len() {
            *self = Self::new(self.scoring, self.row_count(), self.site_rule, &wanted)?;
            return Ok(());
        }
        gone.into_iter().try_for_each(|id| self.remove(id))?;
        reweighted.into_iter().try_for_each(|member| self.reweight(member.id, member.weight))?;
        new.into_iter().try_for_each(|member| self.add(member))
    }

    /// How many rows there are: 1 to 65,536.
    pub fn row_count(&self) -> usize {
        self.ranking.row_count()
    }

    /// How members are ranked.
    pub const fn scoring(&self) -> Scoring {
        self.scoring
    }

    /// Where the backup stands.
    pub const fn site_rule(&self) -> BackupSite {
        self.site_rule
    }

    /// How a flow finds its row.
    pub const fn row_function(&self) -> RowFunction {
        self.function
    }

    /// All members, those of weight 0 too, by id.
    pub fn members(&self) -> Vec<RankedMember> {
        let mut members: Vec<RankedMember> = self
            .ranking
            .candidates()
            .map(|(id, candidate)| RankedMember { id, weight: candidate.weight, site: candidate.site })
            .collect();
        members.sort_unstable_by_key(|member| member.id);
        members
    }

    /// Owner, backup and third of a row; `None` where there are fewer members, and in a row that does not exist.
    pub fn ranking(&self, row: u32) -> [Option<MemberId>; RANKS] {
        self.ranking.best(row as usize)
    }

    /// Every member that can own the row, best first, with its score: for operators.
    /// With [`BackupSite::Other`] the backup stands second whatever its score.
    pub fn full_ranking(&self, row: u32) -> Vec<(MemberId, Score)> {
        let mut ranked: Vec<(MemberId, Score)> = self
            .ranking
            .candidates()
            .filter_map(|(id, candidate)| Some((id, self.scoring.score(row, id, candidate.weight)?)))
            .collect();
        ranked.sort_by(|(a_id, a), (b_id, b)| {
            b.partial_cmp(a).unwrap_or(core::cmp::Ordering::Equal).then(b_id.cmp(a_id))
        });
        if self.site_rule == BackupSite::Other
            && let [_, backup, _] = self.ranking(row)
            && let Some(at) = ranked.iter().position(|(id, _)| Some(*id) == backup)
            && let Some(rest) = ranked.get_mut(1..=at)
        {
            rest.rotate_right(1);
        }
        ranked
    }

    /// The rows whose owner, backup or third differ between the two tables; all rows where the tables have not as many.
    pub fn changed_rows<'a>(&'a self, other: &'a Self) -> impl Iterator<Item = u32> + 'a {
        let alike = self.function == other.function;
        let rows = self.function.row_count().max(other.function.row_count());
        (0..rows).filter(move |row| !alike || self.ranking(*row) != other.ranking(*row))
    }

    /// The rows as a forwarder reads them. `slot_of` gives each member its place in the plan, and is asked once for each.
    pub fn to_rows(&self, slot_of: impl Fn(MemberId) -> MemberSlot) -> Vec<Row> {
        let slots = self.ranking.map_positions(slot_of, || MemberSlot::NONE);
        (0..self.row_count())
            .map(|row| {
                let ranks = self
                    .ranking
                    .positions(row)
                    .map(|position| slots.get(position as usize).copied().unwrap_or(MemberSlot::NONE));
                Row { ranks, flags: 0 }
            })
            .collect()
    }
}

fn candidate(scorer: Scorer, member: &RankedMember) -> Candidate {
    Candidate { name: scorer.member_name(member.id), weight: member.weight, site: member.site }
}

#[cfg(test)]
mod tests;
