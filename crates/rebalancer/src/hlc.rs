//! The hybrid logical clock that stamps births.
//!
//! ```text
//!  63                      22 21         10 9            0
//! ┌──────────────────────────┬─────────────┬──────────────┐
//! │ milliseconds since 1970  │   counter   │ member, mixed│
//! └──────────────────────────┴─────────────┴──────────────┘
//! ```
//! Follows Kulkarni et al., "Logical Physical Clocks" (2014): the clock never goes back, and what a member stamps is later than every
//! birth it has seen. Two members that stamp the same flow in the same millisecond differ in the low bits; members whose mixed
//! ids collide still agree, because records of equal birth are ordered by backend.

use phalanx_flow::MemberId;

/// Bits of the counter: 4,096 births a millisecond before the clock runs ahead of time.
const COUNTER_BITS: u32 = 12;
/// Bits of the mixed member id.
const MEMBER_BITS: u32 = 10;
/// What reads a birth's time (hand-offs do) reads it where it is.
const _: () = assert!(COUNTER_BITS + MEMBER_BITS == phalanx_flow::BIRTH_MS_BITS);
/// How far ahead of our clock a birth may be and still be followed; a clock further off is broken, and following it would spread.
pub const MAX_AHEAD_MS: u64 = 24 * 3600 * 1000;

/// One member's clock.
#[derive(Clone, Debug)]
pub struct Hlc {
    /// Milliseconds and counter of the last birth, shifted down by [`MEMBER_BITS`].
    last: u64,
    member: u64,
}

impl Hlc {
    /// The clock of `member`.
    pub const fn new(member: MemberId) -> Self {
        let id = member.0;
        let mixed = (id ^ (id >> 10) ^ (id >> 20) ^ (id >> 30)) & ((1 << MEMBER_BITS) - 1);
        Self { last: 0, member: mixed as u64 }
    }

    /// A birth later than all before; `wall_ms` is milliseconds since 1970. Never 0, which means "not stamped".
    pub fn stamp(&mut self, wall_ms: u64) -> u64 {
        self.last = (wall_ms << COUNTER_BITS).max(self.last.wrapping_add(1)).max(1);
        (self.last << MEMBER_BITS) | self.member
    }

    /// Takes note of a birth another member stamped. `false`: it is more than [`MAX_AHEAD_MS`] ahead and was not followed.
    pub fn observe(&mut self, wall_ms: u64, birth: u64) -> bool {
        let seen = birth >> MEMBER_BITS;
        if seen >> COUNTER_BITS > wall_ms.saturating_add(MAX_AHEAD_MS) {
            return false;
        }
        self.last = self.last.max(seen);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: u64 = 1_800_000_000_000;

    #[test]
    fn births_grow_even_when_time_stands_or_goes_back() {
        let mut clock = Hlc::new(MemberId(1));
        let mut last = clock.stamp(NOW);
        for step in 0..10_000 {
            let birth = clock.stamp(NOW - step);
            assert!(birth > last);
            last = birth;
        }
    }

    #[test]
    fn a_stamp_is_later_than_every_birth_seen() {
        let mut ahead = Hlc::new(MemberId(1));
        let mut behind = Hlc::new(MemberId(2));
        let birth = ahead.stamp(NOW + 5_000);
        assert!(behind.stamp(NOW) < birth, "the twin: without observing it is earlier");
        assert!(behind.observe(NOW, birth));
        assert!(behind.stamp(NOW) > birth);
    }

    #[test]
    fn a_broken_clock_is_not_followed() {
        let mut clock = Hlc::new(MemberId(1));
        let before = clock.stamp(NOW);
        assert!(!clock.observe(NOW, u64::MAX - 1));
        assert!(clock.stamp(NOW) < before + (1 << 20));
    }

    #[test]
    fn members_stamp_differently_in_one_millisecond() {
        assert_ne!(Hlc::new(MemberId(1)).stamp(NOW), Hlc::new(MemberId(2)).stamp(NOW));
        let first = u32::from_be_bytes([10, 0, 0, 1]);
        assert_ne!(Hlc::new(MemberId(first)).stamp(NOW), Hlc::new(MemberId(first + 1)).stamp(NOW));
    }
}
