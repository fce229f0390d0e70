//! How a member scores for a row, and how scores compare.
//!
//! Two scorings, chosen in the configuration and equal on all members. Everything here is integers, so that every member on every
//! platform gets the same ranking, bit for bit.
//!
//! # Checking against published vectors
//!
//! With equal weights a row's order is the order of the members' SipHash-2-4 values, largest first, whatever the logarithm does.
//! So a table published for another system can be checked by that system's own inputs: hash them with
//! [`siphash`](crate::siphash::siphash) and compare. GLB's, for one, hashes `row seed ‖ address`, reads the digest as a big-endian number and
//! puts the smallest first; complemented, that is our order (the tests do it).

use core::cmp::Ordering;
use core::fmt;

use crate::crc8;
use crate::hash::RowFunction;
use crate::member::MemberId;
use crate::siphash::{siphash_8, siphash_12};

/// The most rows there can be, and the default of [`Scoring::Rendezvous`].
pub const MAX_ROWS: usize = 65_536;

/// Rows of [`Scoring::Crc8`]: one for each value of the tuple's CRC.
pub const CRC8_ROWS: usize = 256;

/// Which score is the best.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Best {
    /// The largest arithmetical value (claim 8); weights multiply scores.
    Highest,
    /// The lowest arithmetical value (claim 9); weights divide scores, so that a heavier member still gets more.
    Lowest,
}

/// How members are ranked in a row (claims 3, 7 to 11). Equal scores always go to the higher id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Scoring {
    /// Keyed SipHash-2-4 of `row u32 ‖ member id u32` (little-endian), weighted by the logarithmic method: the member with the least
    /// `-log2(h / 2^64) / weight` is the best. Shares are proportional to weights, and a change of one weight moves only what it must.
    /// Equal weights compare the hashes themselves, the largest is the best.
    Rendezvous {
        /// From the configuration, equal on all members.
        key: [u64; 2],
    },
    /// The document's example: a CRC of degree 8 over member id ‖ 12-byte tuple (claim 10, [`crc8`]).
    /// Its shares are uneven: see `docs/shares.md`.
    Crc8 {
        /// Which value is the best.
        best: Best,
    },
}

impl Scoring {
    /// The row function for a table of `rows` rows; `None` where the scoring cannot have as many:
    /// rendezvous takes a power of two of at most 65,536, `crc8` exactly 256.
    pub const fn row_function(&self, rows: usize) -> Option<RowFunction> {
        match self {
            Self::Rendezvous { .. } if rows.is_power_of_two() && rows <= MAX_ROWS => {
                Some(RowFunction::Rendezvous { mask: (rows as u32).saturating_sub(1) })
            }
            Self::Crc8 { .. } if rows == CRC8_ROWS => Some(RowFunction::Crc8),
            _ => None,
        }
    }

    /// The score of `member` for `row`; `None` for weight 0, which is left out of every ranking.
    pub fn score(&self, row: u32, member: MemberId, weight: u32) -> Option<Score> {
        if weight == 0 {
            return None;
        }
        let scorer = Scorer::of(*self);
        Some(Score { scorer, value: scorer.value(row, scorer.member_name(member)), weight })
    }
}

/// A member's score for one row; the greater one is the better one.
///
/// Scores of different scorings do not compare.
#[derive(Clone, Copy, Debug)]
pub struct Score {
    scorer: Scorer,
    value: u64,
    weight: u32,
}

impl Score {
    /// The hash or the CRC, before the weight counts.
    pub const fn value(&self) -> u64 {
        self.value
    }

    /// The weight that counted.
    pub const fn weight(&self) -> u32 {
        self.weight
    }
}

impl PartialEq for Score {
    fn eq(&self, other: &Self) -> bool {
        self.partial_cmp(other) == Some(Ordering::Equal)
    }
}

impl PartialOrd for Score {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        (self.scorer == other.scorer)
            .then(|| self.scorer.compare((self.value, self.weight), (other.value, other.weight)))
    }
}

impl fmt::Display for Score {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { scorer, value, weight } = *self;
        match scorer {
            Scorer::Crc8(Best::Highest) => write!(f, "{value} x {weight}"),
            Scorer::Crc8(Best::Lowest) => write!(f, "{value} / {weight}"),
            Scorer::Member(_) | Scorer::Backend(_) => {
                let cost = neg_log2(value);
                let fraction = u128::from(cost & FRACTION_MASK).wrapping_mul(1_000_000_000) >> FRACTION_BITS;
                write!(f, "{}.{fraction:09} / {weight} (hash {value:016x})", cost >> FRACTION_BITS)
            }
        }
    }
}

/// What the ranking code needs of a scoring: one number from (row, name), and how two numbers with weights compare.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scorer {
    /// Members, rendezvous.
    Member([u64; 2]),
    /// Members, CRC.
    Crc8(Best),
    /// Backends, rendezvous.
    Backend([u64; 2]),
}

impl Scorer {
    pub(crate) const fn of(scoring: Scoring) -> Self {
        match scoring {
            Scoring::Rendezvous { key } => Self::Member(key),
            Scoring::Crc8 { best } => Self::Crc8(best),
        }
    }

    /// What stands for `member` in [`Scorer::value`].
    pub(crate) fn member_name(self, member: MemberId) -> u64 {
        match self {
            Self::Crc8(_) => u64::from(crc8::member_part(member)),
            Self::Member(_) | Self::Backend(_) => u64::from(member.0),
        }
    }

    /// The unweighted score of who is called `name`, for `row`.
    #[inline(always)]
    pub(crate) const fn value(self, row: u32, name: u64) -> u64 {
        match self {
            Self::Member(key) => siphash_8(key, row as u64 | name << 32),
            Self::Crc8(_) => row as u64 ^ name,
            Self::Backend(key) => siphash_12(key, name, row),
        }
    }

    /// Compares two (value, weight), both weights above 0; greater is better.
    ///
    /// A total preorder: for the logarithmic method the key is (cost / weight, hash). The cost is monotone in the hash, so that with
    /// equal weights the hash alone decides.
    #[inline(always)]
    pub(crate) fn compare(self, a: (u64, u32), b: (u64, u32)) -> Ordering {
        match self {
            Self::Crc8(Best::Highest) => {
                u128::from(a.0).wrapping_mul(a.1.into()).cmp(&u128::from(b.0).wrapping_mul(b.1.into()))
            }
            Self::Crc8(Best::Lowest) => {
                u128::from(b.0).wrapping_mul(a.1.into()).cmp(&u128::from(a.0).wrapping_mul(b.1.into()))
            }
            Self::Member(_) | Self::Backend(_) => {
                if a.1 == b.1 {
                    return a.0.cmp(&b.0);
                }
                let a_cost = u128::from(neg_log2(a.0)).wrapping_mul(b.1.into());
                let b_cost = u128::from(neg_log2(b.0)).wrapping_mul(a.1.into());
                b_cost.cmp(&a_cost).then(a.0.cmp(&b.0))
            }
        }
    }
}

/// A score that others are compared with many times: its cost is reckoned once.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bar {
    value: u64,
    cost: u64,
    /// 0: nobody, whom everybody beats.
    weight: u32,
}

impl Bar {
    /// The bar that (value, weight) sets.
    #[inline(always)]
    pub(crate) fn new((value, weight): (u64, u32)) -> Self {
        Self { value, cost: neg_log2(value), weight }
    }
}

impl Scorer {
    /// Whether a greater weight always makes a better score. A CRC of 0 stays 0 whatever the weight; a cost is never 0.
    pub(crate) const fn is_strict(self) -> bool {
        matches!(self, Self::Member(_) | Self::Backend(_))
    }

    /// Whether (value, weight) certainly loses against the bar, found out without its logarithm; `false` leaves it open.
    ///
    /// Of many candidates almost all lose, so this is what a scan spends its time on.
    #[inline(always)]
    pub(crate) fn surely_below(self, a: (u64, u32), bar: &Bar) -> bool {
        match self {
            Self::Crc8(_) => false,
            Self::Member(_) | Self::Backend(_) => {
                if a.1 == bar.weight {
                    return a.0 < bar.value;
                }
                u128::from(least_neg_log2(a.0)).wrapping_mul(bar.weight.into())
                    > u128::from(bar.cost).wrapping_mul(a.1.into())
            }
        }
    }
}

/// Bits after the binary point of [`neg_log2`].
const FRACTION_BITS: u32 = 48;
const FRACTION_MASK: u64 = (1 << FRACTION_BITS) - 1;
const ONE: u64 = 1 << FRACTION_BITS;

/// log2 of the interval's length in the table: 1,024 intervals keep the error below 2e-7 (linear interpolation: (1/1024)² / 8 / ln 2)
/// in 8 kB, which stay in the first-level cache.
const TABLE_BITS: u32 = 10;
const TABLE_LEN: usize = 1 << TABLE_BITS;

/// Start and rise of log2(1 + i / 1024), in units of 2^-48, for each of the intervals.
const LOG2: [(u64, u64); TABLE_LEN] = log2_table();

/// `-log2(h / 2^64)` in units of 2^-48: 0 to 64, rounded up; 0 counts as 1.
///
/// Never grows when `h` grows: the table's starts rise, what is added within an interval stays below its rise, and each power of two
/// begins where the one before ended.
#[inline(always)]
pub(crate) fn neg_log2(h: u64) -> u64 {
    let h = h | u64::from(h == 0);
    let zeros = h.leading_zeros();
    let normal = h << (zeros & 63);
    // The highest bit is set: what follows it chooses the interval and the place in it.
    let index = (normal >> (63 - TABLE_BITS)) as usize & (TABLE_LEN - 1);
    let place = normal & ((1 << (63 - TABLE_BITS)) - 1);
    // The index is masked: there is always an interval.
    let (start, rise) = match LOG2.get(index) {
        Some(interval) => *interval,
        None => (0, 0),
    };
    let within = (u128::from(rise).wrapping_mul(u128::from(place)) >> (63 - TABLE_BITS)) as u64;
    let log2 = start.wrapping_add(within);
    // zeros is at most 63: no overflow.
    (u64::from(zeros).wrapping_add(1) << FRACTION_BITS).wrapping_sub(log2)
}

/// At most [`neg_log2`] and, near the best scores, less by under one percent.
///
/// With `h = 2^64 - d` the logarithm is at least `d / 2^64 / ln 2`; 23/16 is a little less than 1 / ln 2. The interpolation of a
/// concave function stays below it, so the cost is never less than the exact one.
#[inline(always)]
const fn least_neg_log2(h: u64) -> u64 {
    (!h >> (64 - FRACTION_BITS + 4)).wrapping_mul(23)
}

#[expect(clippy::indexing_slicing, reason = "evaluated by the compiler, which refuses a wrong index")]
const fn log2_table() -> [(u64, u64); TABLE_LEN] {
    let mut table = [(0, 0); TABLE_LEN];
    let mut index = TABLE_LEN;
    let mut end = ONE;
    while index > 0 {
        index = index.wrapping_sub(1);
        let start = log2_of((1 << 63) | (index as u64) << (63 - TABLE_BITS));
        table[index] = (start, end.wrapping_sub(start));
        end = start;
    }
    table
}

/// log2 of `x / 2^63`, which is in [1, 2), in units of 2^-48, rounded down; by squaring, one bit at a time.
const fn log2_of(x: u64) -> u64 {
    let mut x = x as u128;
    let mut log2 = 0;
    let mut bit = ONE >> 1;
    while bit > 0 {
        x = x.wrapping_mul(x) >> 63;
        if x >> 64 != 0 {
            x >>= 1;
            log2 |= bit;
        }
        bit >>= 1;
    }
    log2
}

#[cfg(test)]
mod tests;
