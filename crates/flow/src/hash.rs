//! The keyed flow hash, and the row it gives.

use crate::crc8;
use crate::key::{FlowKey, unmapped};

/// The seed of the flow hash: equal on all members, from the configuration, never derived from keys that rotate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct FlowSeed(pub [u64; 2]);

/// Odd, from the golden ratio, as splitmix64 uses it.
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;
/// The two multipliers of the finaliser of splitmix64 (variant 13 of David Stafford's).
const STAFFORD: [u64; 2] = [0xbf58_476d_1ce4_e5b9, 0x94d0_49bb_1331_11eb];

/// A keyed 64-bit hash of the flow's name.
///
/// Multiplies, shifts and xors only, so that it is cheap in eBPF too; an IPv4 flow costs four multiplies, an IPv6 flow seven.
/// The low 16 bits choose row and slot.
/// It is keyed against traffic that aims at one row, and is no message authentication code.
#[inline(always)]
pub fn flow_hash(seed: FlowSeed, key: &FlowKey) -> u64 {
    let FlowSeed([k0, k1]) = seed;
    // A secret odd multiplier, so that no difference of inputs cancels under every seed.
    let multiplier = k1 | 1;
    let [s0, s1] = key.source_port;
    let [d0, d1] = key.destination_port;
    // Family is in the hash, so that an IPv4 flow is no sibling of an IPv6 one.
    let last = u64::from_le_bytes([s0, s1, d0, d1, key.protocol, key.family, 0, 0]);
    let state = k0 ^ GOLDEN;
    let state = if key.family == 4 {
        let [a, b, c, d] = unmapped(key.source);
        let [e, f, g, h] = unmapped(key.destination);
        absorb(state, u64::from_le_bytes([a, b, c, d, e, f, g, h]), multiplier)
    } else {
        let (source_high, source_low) = halves(key.source);
        let (destination_high, destination_low) = halves(key.destination);
        let state = absorb(state, source_high, multiplier);
        let state = absorb(state, source_low, multiplier);
        let state = absorb(state, destination_high, multiplier);
        absorb(state, destination_low, multiplier)
    };
    let [m0, m1] = STAFFORD;
    let state = absorb(state, last ^ k1, GOLDEN);
    let state = (state ^ (state >> 30)).wrapping_mul(m0);
    let state = (state ^ (state >> 27)).wrapping_mul(m1);
    state ^ (state >> 31)
}

/// One word into the state. A bijection of the state for every word and of the word for every state.
#[inline(always)]
const fn absorb(state: u64, word: u64, multiplier: u64) -> u64 {
    let mixed = (state ^ word).wrapping_mul(multiplier);
    mixed ^ (mixed >> 32)
}

/// The two little-endian words of an address.
#[inline(always)]
const fn halves(octets: [u8; 16]) -> (u64, u64) {
    let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = octets;
    (u64::from_le_bytes([a, b, c, d, e, f, g, h]), u64::from_le_bytes([i, j, k, l, m, n, o, p]))
}

/// How a flow finds its row. The scoring supplies it (design §3), and a forwarder needs no more of the scoring than this.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowFunction {
    /// The low bits of the flow hash.
    Rendezvous {
        /// Number of rows less one; the number is a power of two of at most 65,536.
        mask: u32,
    },
    /// The CRC of degree 8 of the 12-byte tuple: 256 rows.
    Crc8,
}

impl RowFunction {
    /// The row of the flow `key`, whose [`flow_hash`] is `hash`; always below [`RowFunction::row_count`].
    #[inline(always)]
    pub fn row_of(&self, key: &FlowKey, hash: u64) -> u32 {
        match *self {
            // The mask has at most 16 bits: what is cut off above 32 bits is never looked at.
            Self::Rendezvous { mask } => (hash as u32) & mask,
            Self::Crc8 => u32::from(crc8::crc8(crc8::tuple(key))),
        }
    }

    /// How many rows there are: 1 to 65,536.
    #[inline(always)]
    pub const fn row_count(&self) -> u32 {
        match *self {
            Self::Rendezvous { mask } => mask.saturating_add(1),
            Self::Crc8 => 256,
        }
    }
}

#[cfg(test)]
mod tests {
    use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};
    use std::vec::Vec;

    use super::*;
    use crate::key::{TCP, UDP};

    const SEED: FlowSeed = FlowSeed([0x0706_0504_0302_0100, 0x0f0e_0d0c_0b0a_0908]);

    /// Sequential flows, as a load generator makes them: the hardest input there is in practice.
    fn flow(v6: bool, n: u32) -> FlowKey {
        let port = 1024 + (n % 50_000) as u16;
        let (client, service): (IpAddr, IpAddr) = if v6 {
            let low = u128::from(n / 7);
            (
                Ipv6Addr::from_bits(0x2001_0db8_u128 << 96 | low).into(),
                Ipv6Addr::from_bits(0x2001_0db8_u128 << 96 | 1 << 64 | 80).into(),
            )
        } else {
            (Ipv4Addr::from_bits(0x0a00_0000 + n / 7).into(), Ipv4Addr::new(192, 0, 2, 1).into())
        };
        FlowKey::new(TCP, (client, port), (service, 443)).unwrap()
    }

    /// The input bits of a key that the hash may look at, as (byte in the key, bit).
    fn input_bits(v6: bool) -> Vec<(usize, u32)> {
        let bytes: Vec<usize> =
            if v6 { (0..37).collect() } else { (12..16).chain(28..32).chain(32..37).collect() };
        bytes.into_iter().flat_map(|byte| (0..8).map(move |bit| (byte, bit))).collect()
    }

    fn flipped(key: &FlowKey, byte: usize, bit: u32) -> FlowKey {
        let mut key = *key;
        let mask = 1_u8 << bit;
        match byte {
            0..16 => key.source[byte] ^= mask,
            16..32 => key.destination[byte - 16] ^= mask,
            32..34 => key.source_port[byte - 32] ^= mask,
            34..36 => key.destination_port[byte - 34] ^= mask,
            _ => key.protocol ^= mask,
        }
        key
    }

    /// The worst distance from one half over all (input bit, output bit) pairs.
    fn worst_bias(v6: bool, seed: FlowSeed, hash: impl Fn(FlowSeed, &FlowKey) -> u64) -> f64 {
        const SAMPLES: u32 = 8192;
        let mut worst: f64 = 0.0;
        for (byte, bit) in input_bits(v6) {
            let mut flips = [0_u32; 64];
            for n in 0..SAMPLES {
                let key = flow(v6, n);
                let difference = hash(seed, &key) ^ hash(seed, &flipped(&key, byte, bit));
                for (position, count) in flips.iter_mut().enumerate() {
                    *count += (difference >> position & 1) as u32;
                }
            }
            for count in flips {
                worst = worst.max((f64::from(count) / f64::from(SAMPLES) - 0.5).abs());
            }
        }
        worst
    }

    #[test]
    fn every_input_bit_flips_every_output_bit_half_of_the_time() {
        for seed in [SEED, FlowSeed([0, 0]), FlowSeed([u64::MAX, u64::MAX]), FlowSeed([1, 1 << 63])] {
            for v6 in [false, true] {
                let worst = worst_bias(v6, seed, flow_hash);
                assert!(worst < 0.05, "seed {seed:?}, IPv6 {v6}: {worst}");
            }
        }
    }

    #[test]
    fn the_avalanche_test_finds_a_hash_that_does_not_mix() {
        let worst = worst_bias(false, SEED, |_, key| halves(key.source).1.wrapping_mul(GOLDEN));
        assert!(worst > 0.4, "{worst}");
    }

    #[test]
    fn sequential_flows_fill_the_rows_evenly() {
        for v6 in [false, true] {
            const FLOWS: u32 = 1 << 20;
            let mut rows = std::vec![0_u32; 65_536];
            for n in 0..FLOWS {
                rows[(flow_hash(SEED, &flow(v6, n)) & 0xffff) as usize] += 1;
            }
            // Chi-squared with 65,535 degrees of freedom: mean 65,535, standard deviation 362.
            let expected = f64::from(FLOWS / 65_536);
            let chi: f64 = rows.iter().map(|&n| (f64::from(n) - expected).powi(2) / expected).sum();
            assert!((chi - 65_535.0).abs() < 5.0 * 362.0, "IPv6 {v6}: {chi}");
        }
    }

    #[test]
    fn another_seed_another_hash() {
        let key = flow(false, 1);
        let hash = flow_hash(SEED, &key);
        assert_eq!(hash, flow_hash(SEED, &key));
        assert_ne!(hash & 0xffff, flow_hash(FlowSeed([SEED.0[0] ^ 1, SEED.0[1]]), &key) & 0xffff);
        assert_ne!(hash & 0xffff, flow_hash(FlowSeed([SEED.0[0], SEED.0[1] ^ 2]), &key) & 0xffff);
    }

    #[test]
    fn protocols_and_families_differ() {
        let tcp = flow(false, 1);
        let udp = FlowKey { protocol: UDP, ..tcp };
        let v6 = FlowKey { family: 6, ..tcp };
        assert_ne!(flow_hash(SEED, &tcp), flow_hash(SEED, &udp));
        assert_ne!(flow_hash(SEED, &tcp), flow_hash(SEED, &v6));
    }

    /// The hash is part of what members must agree on: a change of these values breaks a running cluster.
    #[test]
    fn the_hash_is_what_it_was() {
        assert_eq!(flow_hash(SEED, &flow(false, 1)), 7_302_033_389_107_407_643);
        assert_eq!(flow_hash(SEED, &flow(true, 1)), 8_228_864_362_482_529_915);
    }

    #[test]
    fn rows_stay_below_the_row_count() {
        for function in [RowFunction::Rendezvous { mask: 0xfff }, RowFunction::Crc8] {
            for n in 0..1000 {
                let key = flow(n % 2 == 0, n);
                assert!(function.row_of(&key, flow_hash(SEED, &key)) < function.row_count());
            }
        }
    }
}
