//! One share of the flow space.

use crate::member::MemberSlot;

/// Places in a row: owner, backup and one more.
pub const RANKS: usize = 3;

/// One row as a forwarder reads it: who comes first, second and third.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Row {
    /// Best first; [`MemberSlot::NONE`] where there are fewer members.
    pub ranks: [MemberSlot; RANKS],
    /// Room for "settled" (design §11). Zero.
    pub flags: u16,
}

const _: () = assert!(size_of::<Row>() == 8);

impl Row {
    /// A row of a table without members.
    pub const EMPTY: Self = Self { ranks: [MemberSlot::NONE; RANKS], flags: 0 };

    /// The first of the ranking.
    #[inline(always)]
    pub const fn owner(&self) -> MemberSlot {
        self.ranks[0]
    }

    /// The second of the ranking, who is the owner when the first has gone.
    #[inline(always)]
    pub const fn backup(&self) -> MemberSlot {
        self.ranks[1]
    }
}
