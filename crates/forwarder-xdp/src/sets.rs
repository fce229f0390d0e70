//! The table of half-open flows as the program and its loader share it: an array of sets of a few flows, each flow in the set that its
//! hash chooses (docs/design/0010-half-open-table.md). Both compile this file; a change of it is a change of the layouts' version.

use phalanx_flow::{FlowEntry, FlowKey};

/// Flows of a set.
pub const SET_FLOWS: usize = 8;

/// A flow in the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct HalfOpenFlow {
    /// The flow.
    pub key: FlowKey,
    /// What is known of it.
    pub entry: FlowEntry,
}

const _: () = assert!(size_of::<HalfOpenFlow>() == 80);

/// The half-open flows whose hashes choose this set. Zeroes are an empty one.
///
/// Only the program writes here, and only on the CPU that has the lock, but for when a flow was last seen and reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct HalfOpenSet {
    /// 1: a CPU is changing the set.
    pub lock: u32,
    /// The places' [`Order`], as its difference from [`Order::FIRST`].
    pub order: u32,
    /// How many flows were put here; 0 is left out.
    pub count: u32,
    /// Zero.
    pub reserved: u32,
    /// By place what `count` was when its flow was put there; 0: there is none, or it is being written. Whoever reads an entry finds the
    /// same number before and after, or has read nothing.
    pub numbers: [u32; SET_FLOWS],
    /// By place bits of the flow's hash, so that others' entries need not be read.
    pub tags: [u16; SET_FLOWS],
    /// By place.
    pub flows: [HalfOpenFlow; SET_FLOWS],
}

// Eleven cache lines: all that a search reads of other flows is the first.
const _: () = assert!(size_of::<HalfOpenSet>() == 11 * 64);
const _: () = assert!(core::mem::offset_of!(HalfOpenSet, flows) == 64);

/// The set of the flow with this hash, of so many. By other bits than choose row and slot: a member's flows share those.
#[inline(always)]
pub const fn set_of(hash: u64, sets: u32) -> u32 {
    (((hash >> 32) * sets as u64) >> 32) as u32
}

/// The flow's tag.
#[inline(always)]
pub const fn tag_of(hash: u64) -> u16 {
    (hash >> 16) as u16
}

/// The places of a set whose tags equal one tag, all of them and seldom one more, without a branch for each: the verifier would follow every
/// one of them to the end of the program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidates(u64);

impl Candidates {
    /// Of the tags, four to a word, the first one lowest.
    #[inline(always)]
    pub const fn new([first, second]: [u64; 2], tag: u16) -> Self {
        const ONES: u64 = 0x0001_0001_0001_0001;
        const fn zeroes(word: u64) -> u64 {
            // A part less one has its highest bit where it was zero.
            word.wrapping_sub(ONES) & !word & (ONES << 15)
        }
        let all = (tag as u64).wrapping_mul(ONES);
        Self(zeroes(first ^ all) >> 15 | zeroes(second ^ all) >> 7)
    }

    /// Whether there are none.
    #[inline(always)]
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// One of them. If there is none it is any place.
    #[inline(always)]
    pub const fn first(self) -> usize {
        // The bit of place `i` is 16 `i`, of place 4 + `i` 16 `i` + 8: shifted by so much, this has the place as its highest three bits.
        const PLACES: u64 = {
            let (mut places, mut place) = (0, 0);
            while place < 4 {
                places |= (place << 61 | (place + 4) << 53) >> (16 * place);
                place += 1;
            }
            places
        };
        ((self.0 & self.0.wrapping_neg()).wrapping_mul(PLACES) >> 61) as usize
    }

    /// Those without the first.
    #[inline(always)]
    #[must_use]
    pub const fn rest(self) -> Self {
        Self(self.0 & self.0.wrapping_sub(1))
    }
}

/// The places of a set in the order in which they are taken, four bits for each, the next one lowest: free ones first, then by age, the
/// oldest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Order(pub(crate) u32);

impl Order {
    /// Of an empty set.
    pub const FIRST: u32 = 0x7654_3210;

    /// The place that is taken next.
    #[inline(always)]
    pub const fn next(self) -> usize {
        (self.0 & 7) as usize
    }

    /// The order after that.
    #[inline(always)]
    pub const fn taken(self) -> Self {
        Self(self.0.rotate_right(4))
    }

    /// The order after `place` has become free.
    #[inline(always)]
    pub const fn freed(self, place: usize) -> Self {
        const ONES: u32 = 0x1111_1111;
        // Where it stands: the lowest part that becomes zero, without a loop that the verifier would follow.
        let others = self.0 ^ (place as u32).wrapping_mul(ONES);
        let found = others.wrapping_sub(ONES) & !others & (ONES << 3);
        let unit = ((found & found.wrapping_neg()) >> 3) as u64;
        let order = self.0 as u64;
        let before = order & unit.wrapping_sub(1);
        let after = order & !(unit << 4).wrapping_sub(1);
        Self((after | before << 4 | place as u64) as u32)
    }
}

#[cfg(all(test, not(target_arch = "bpf")))]
mod tests {
    use std::collections::VecDeque;

    use super::*;

    /// Against a queue, in every order of takings and releases that a mixed sequence makes.
    #[test]
    fn the_order_is_that_of_a_queue_whose_free_places_come_first() {
        let mut order = Order(Order::FIRST);
        let mut queue: VecDeque<usize> = (0..SET_FLOWS).collect();
        let mut state = 1_u64;
        for _ in 0..10_000 {
            state = state.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(1);
            let drawn = (state >> 40) as usize;
            assert_eq!(order.next(), queue[0]);
            if drawn & 8 == 0 {
                order = order.taken();
                queue.rotate_left(1);
            } else {
                let place = drawn & 7;
                order = order.freed(place);
                queue.retain(|other| *other != place);
                queue.push_front(place);
            }
        }
        let places = (0..SET_FLOWS).scan(order, |order, _| {
            let next = order.next();
            *order = order.taken();
            Some(next)
        });
        assert_eq!(places.collect::<VecDeque<_>>(), queue);
    }

    #[test]
    fn the_candidates_are_the_places_with_the_tag_and_hardly_any_other() {
        let mut state = 1_u64;
        for _ in 0..10_000 {
            state = state.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(1);
            // Tags that are often equal, or one more: there a borrow may make a candidate of a neighbour.
            let tags: [u16; SET_FLOWS] = std::array::from_fn(|place| {
                0xfffe_u16.wrapping_add(((state >> (20 + 2 * place)) & 3) as u16)
            });
            let words = tags.as_chunks::<4>().0;
            let word = |tags: &[u16; 4]| tags.iter().rev().fold(0, |word, tag| word << 16 | u64::from(*tag));
            let mut candidates = Candidates::new([word(&words[0]), word(&words[1])], 0xffff);
            let mut found = Vec::new();
            while !candidates.is_empty() {
                found.push(candidates.first());
                candidates = candidates.rest();
            }
            for (place, tag) in tags.into_iter().enumerate() {
                let times = found.iter().filter(|other| **other == place).count();
                assert!(times == 1 || times == 0 && tag != 0xffff, "{place} of {tags:x?}: {found:?}");
                assert!(times == 0 || tag == 0xffff || tag == 0xfffe, "{place} of {tags:x?}: {found:?}");
            }
        }
        assert!(Candidates::new([0, 0], 1).is_empty());
    }

    #[test]
    fn every_set_is_chosen_by_as_many_hashes_and_none_beyond_the_last() {
        for sets in [1, 3, 128, 8192] {
            let chosen = |part: u64| set_of(part << 32, sets);
            assert_eq!((chosen(0), chosen(u64::from(u32::MAX))), (0, sets - 1));
            let first = (1_u64 << 32).div_ceil(u64::from(sets));
            assert_eq!((chosen(first - 1), chosen(first)), (0, u32::from(sets > 1)), "{sets}");
        }
    }
}
