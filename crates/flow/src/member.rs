//! Names for members.

use core::fmt;

/// A member's name, unique in the cluster and the same on every member: an index, or the member's IPv4 address as a number
/// (claims 5 and 6).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct MemberId(pub u32);

impl fmt::Display for MemberId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Where a member stands in one plan's list of members. Local to a plan: it never goes on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct MemberSlot(pub u16);

impl MemberSlot {
    /// Nobody: the ranking is shorter than the number of places in a row.
    pub const NONE: Self = Self(u16::MAX);

    /// Whether the slot names a member.
    #[inline(always)]
    pub const fn is_some(self) -> bool {
        self.0 != Self::NONE.0
    }
}

/// What the local member believes of another one, as far as packets are concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Liveness {
    /// It answers, or nobody has doubted it yet.
    Alive = 0,
    /// SWIM suspects it: traffic is diverted to the next in the ranking, ownership stays.
    Suspect = 1,
    /// Confirmed down, left, or unknown.
    Down = 2,
}
