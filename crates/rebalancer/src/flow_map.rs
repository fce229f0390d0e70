//! Maps by flow, of which one may have an entry for every flow of a member.

use std::collections::HashMap;
use std::hash::{BuildHasher, Hasher, RandomState};

use phalanx_flow::FlowKey;

/// A map by flow. The standard library's hash costs more than the rest of a lookup, and so much that the processor does not get to ask
/// memory for the next entry meanwhile.
pub(crate) type FlowMap<V> = HashMap<FlowKey, V, FlowHashes>;

/// The second multiplier of Stafford's mix 13 ("Better bit mixing", 2011), and 2^64 divided by the golden ratio.
const STAFFORD: u64 = 0x94d0_49bb_1331_11eb;
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// Hashes with a secret of this map's own: clients choose their tuples, and must not find such that meet in one place.
#[derive(Clone, Debug)]
pub(crate) struct FlowHashes {
    start: u64,
    multiplier: u64,
}

impl Default for FlowHashes {
    fn default() -> Self {
        let random = RandomState::new();
        // Odd, so that no bit of the input is lost.
        Self { start: random.hash_one(0), multiplier: random.hash_one(1) | 1 }
    }
}

impl BuildHasher for FlowHashes {
    type Hasher = FlowHasher;

    fn build_hasher(&self) -> FlowHasher {
        FlowHasher { state: self.start, multiplier: self.multiplier }
    }
}

/// As [`phalanx_flow::flow_hash`] takes its words in, for whatever a key is made of.
#[derive(Clone, Debug)]
pub(crate) struct FlowHasher {
    state: u64,
    multiplier: u64,
}

impl FlowHasher {
    fn absorb(&mut self, word: u64) {
        let mixed = (self.state ^ word).wrapping_mul(self.multiplier);
        self.state = mixed ^ (mixed >> 32);
    }
}

impl Hasher for FlowHasher {
    fn write(&mut self, bytes: &[u8]) {
        let (words, rest) = bytes.as_chunks::<8>();
        for word in words {
            self.absorb(u64::from_le_bytes(*word));
        }
        if !rest.is_empty() {
            let mut word = [0; 8];
            for (to, from) in word.iter_mut().zip(rest) {
                *to = *from;
            }
            self.absorb(u64::from_le_bytes(word));
        }
    }

    fn write_u8(&mut self, byte: u8) {
        self.absorb(byte.into());
    }

    /// Lengths: all keys have the same parts.
    fn write_usize(&mut self, _length: usize) {}

    fn finish(&self) -> u64 {
        // Places are taken from the low bits, tags from the high ones.
        let state = (self.state ^ (self.state >> 30)).wrapping_mul(GOLDEN);
        let state = (state ^ (state >> 27)).wrapping_mul(STAFFORD);
        state ^ (state >> 31)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::testing::key;

    #[test]
    fn flows_are_spread_over_places_and_tags() {
        let hashes = FlowHashes::default();
        let flows: Vec<u64> = (0..4096).map(|n| hashes.hash_one(key(n))).collect();
        let different =
            |bits: &dyn Fn(u64) -> u64| flows.iter().map(|hash| bits(*hash)).collect::<HashSet<_>>();
        assert_eq!(different(&|hash| hash).len(), 4096);
        // Of 4,096 balls in as many places 1 - 1/e find one of their own, give or take 26 (4 standard deviations: 120).
        let places = different(&|hash| hash & 4095).len();
        assert!((2469..2709).contains(&places), "{places}");
        assert_eq!(different(&|hash| hash >> 57).len(), 128, "every tag");
    }

    #[test]
    fn no_two_maps_have_the_same_secret_and_one_map_keeps_its_own() {
        let (one, two) = (FlowHashes::default(), FlowHashes::default());
        assert_eq!(one.hash_one(key(1)), one.clone().hash_one(key(1)));
        assert_ne!(one.hash_one(key(1)), two.hash_one(key(1)));
    }

    #[test]
    fn every_part_of_a_key_counts() {
        let hashes = FlowHashes::default();
        let one = key(1);
        let mut others = vec![one; 6];
        others[0].source[3] ^= 1;
        others[1].destination[15] ^= 1;
        others[2].source_port[1] ^= 1;
        others[3].destination_port[0] ^= 1;
        others[4].protocol ^= 1;
        others[5].family ^= 2;
        assert!(others.iter().all(|other| hashes.hash_one(other) != hashes.hash_one(one)));
    }
}
