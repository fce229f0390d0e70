use std::vec::Vec;

use proptest::prelude::*;

use super::*;
use crate::siphash::siphash;

const KEY: [u64; 2] = [0x0706_0504_0302_0100, 0x0f0e_0d0c_0b0a_0908];
const RENDEZVOUS: Scoring = Scoring::Rendezvous { key: KEY };
const HIGHEST: Scoring = Scoring::Crc8 { best: Best::Highest };
const LOWEST: Scoring = Scoring::Crc8 { best: Best::Lowest };

fn score(scoring: Scoring, value: u64, weight: u32) -> Score {
    Score { scorer: Scorer::of(scoring), value, weight }
}

#[test]
fn the_logarithm_is_right() {
    let mut worst: f64 = 0.0;
    let mut h = 1_u64;
    for step in 0..200_000_u64 {
        let exact = 64.0 - (h as f64).log2();
        let found = neg_log2(h) as f64 / ONE as f64;
        worst = worst.max((found - exact).abs());
        h = siphash_8(KEY, step) >> (step % 64);
        h = h.max(1);
    }
    assert!(worst < 2e-7, "{worst}");
    // Near 1 the error is small against the value, too: the best of many members are there.
    for distance in [1 << 30, 1 << 40, 1 << 50_u64] {
        let exact = distance as f64 / 64_f64.exp2() / core::f64::consts::LN_2;
        let found = neg_log2(0_u64.wrapping_sub(distance)) as f64 / ONE as f64;
        assert!((found / exact - 1.0).abs() < 1e-3 || found - exact < 1e-14, "{distance}: {found} {exact}");
    }
    assert_eq!(neg_log2(1), 64 << FRACTION_BITS);
    assert_eq!(neg_log2(0), 64 << FRACTION_BITS);
    assert!(neg_log2(u64::MAX) >= 1, "a cost of 0 would make weights worthless");
    assert_eq!(neg_log2(1 << 63), ONE);
    assert_eq!(neg_log2(1 << 62), 2 << FRACTION_BITS);
}

#[test]
fn the_logarithm_never_grows_where_intervals_and_powers_of_two_meet() {
    for zeros in 0..53 {
        for interval in 0..TABLE_LEN as u64 {
            let h = ((1 << 63) | interval << (63 - TABLE_BITS)) >> zeros;
            assert!(neg_log2(h - 1) >= neg_log2(h) && neg_log2(h) >= neg_log2(h + 1), "{h:x}");
        }
    }
}

/// Equal everywhere or the cluster falls apart: these values are part of the protocol.
#[test]
fn rendezvous_scores_are_what_they_were() {
    let values: Vec<u64> = [(0, 1), (1, 1), (65_535, 3), (7, 0xc000_0201)]
        .into_iter()
        .map(|(row, id)| RENDEZVOUS.score(row, MemberId(id), 1).unwrap().value())
        .collect();
    let expected: Vec<u64> = [(0_u32, 1_u32), (1, 1), (65_535, 3), (7, 0xc000_0201)]
        .into_iter()
        .map(|(row, id)| siphash(KEY, &[row.to_le_bytes(), id.to_le_bytes()].concat()))
        .collect();
    assert_eq!(values, expected);
    assert_eq!(
        values,
        [
            7_953_020_669_994_056_139,
            13_685_239_183_381_957_190,
            10_318_488_349_264_885_370,
            9_872_775_343_461_282_624
        ]
    );
    assert_eq!(neg_log2(values[0]), 341_651_902_528_714);
}

/// Rows 0x0000, 0xffff and 0xbb44 of GLB's forwarding table for the seed 49a3d861d661ae5ab06ed9326871a2f5 and the hosts
/// 1.1.1.1 to 1.1.1.4, as published in `github/glb-director`, `src/glb-director/tests/test_rendezvous_table.py`.
#[test]
fn the_order_is_that_of_published_rendezvous_vectors() {
    let key = [0x5aae_61d6_61d8_a349, 0xf5a2_7168_32d9_6eb0];
    for (row, row_seed, digests, order) in [
        (
            0x0000_u32,
            0x491c_53a7_2df4_c837_u64,
            [0xe471_27dd_8fe0_77de_u64, 0x8b1d_dec5_575c_8634, 0x7054_25e3_e522_989b, 0x6f02_2ce1_ea60_7e16],
            [4, 3, 2, 1],
        ),
        (
            0xffff,
            0xf223_c0cc_6516_1620,
            [0x0233_ef12_d7a9_83d9, 0x6414_aa65_f0a1_0601, 0xaf48_ea8c_8386_7829, 0xa1f6_10df_9fbb_2025],
            [1, 2, 4, 3],
        ),
        (
            0xbb44,
            0xe290_f8f4_30eb_33d3,
            [0x3595_c936_c995_ae63, 0xdb40_d503_1678_c90a, 0xeb79_8632_d691_530c, 0x0676_eaf9_cb7d_2f85],
            [4, 1, 2, 3],
        ),
    ] {
        let seed = siphash(key, &row.to_be_bytes());
        assert_eq!(seed.to_le_bytes(), row_seed.to_be_bytes());
        let mut ranked: Vec<(u8, Score)> = (1..=4)
            .map(|host| {
                let hash = siphash_12(key, seed, u32::from_le_bytes([1, 1, 1, host]));
                let digest = hash.swap_bytes();
                assert_eq!(digest, digests[usize::from(host) - 1]);
                // Theirs: the smallest digest is the best.
                (host, score(RENDEZVOUS, !digest, 10))
            })
            .collect();
        ranked.sort_by(|(_, a), (_, b)| b.partial_cmp(a).unwrap());
        assert_eq!(ranked.iter().map(|(host, _)| *host).collect::<Vec<_>>(), order);
    }
}

#[test]
fn claim_8_the_largest_is_the_best_and_weights_multiply() {
    assert!(score(HIGHEST, 200, 1) > score(HIGHEST, 199, 1));
    assert!(score(HIGHEST, 100, 3) > score(HIGHEST, 200, 1));
    assert!(score(HIGHEST, 100, 2) == score(HIGHEST, 200, 1));
}

#[test]
fn claim_9_the_lowest_is_the_best_and_weights_divide() {
    assert!(score(LOWEST, 199, 1) > score(LOWEST, 200, 1));
    assert!(score(LOWEST, 200, 3) > score(LOWEST, 100, 1));
    assert!(score(LOWEST, 200, 2) == score(LOWEST, 100, 1));
}

#[test]
fn claim_10_the_score_is_the_crc_over_id_and_connection() {
    let tuple = [0, 80, 192, 0, 2, 1, 4, 1, 10, 1, 2, 3];
    let row = u32::from(crc8::crc8(tuple));
    let id = MemberId(0xc000_0205);
    let expected = crc8::tests::straightforward(id, tuple);
    assert_eq!(HIGHEST.score(row, id, 1).unwrap().value(), u64::from(expected));
}

/// Were the tie left to the ids, two members of one weight would rank by hash and each by id with the third: a circle.
#[test]
fn equal_costs_of_unequal_weights_fall_back_on_the_hash() {
    let (a, b, c) =
        (score(RENDEZVOUS, 1 << 63, 1), score(RENDEZVOUS, (1 << 63) + 1, 1), score(RENDEZVOUS, 1 << 62, 2));
    assert_eq!(neg_log2(a.value), neg_log2(b.value));
    assert_eq!(2 * neg_log2(a.value), neg_log2(c.value));
    assert!(b > a && a > c && b > c);
}

#[test]
fn weight_0_has_no_score() {
    for scoring in [RENDEZVOUS, HIGHEST, LOWEST] {
        assert!(scoring.score(0, MemberId(1), 0).is_none());
        assert!(scoring.score(0, MemberId(1), 1).is_some());
    }
}

#[test]
fn scores_of_different_scorings_do_not_compare() {
    assert_eq!(score(HIGHEST, 1, 1).partial_cmp(&score(LOWEST, 1, 1)), None);
}

#[test]
fn a_score_reads_as_operators_reckon() {
    use std::string::ToString;
    assert_eq!(score(HIGHEST, 100, 3).to_string(), "100 x 3");
    assert_eq!(score(LOWEST, 100, 3).to_string(), "100 / 3");
    assert_eq!(score(RENDEZVOUS, 1 << 63, 3).to_string(), "1.000000000 / 3 (hash 8000000000000000)");
}

#[test]
fn row_functions_refuse_other_numbers_of_rows() {
    assert_eq!(RENDEZVOUS.row_function(65_536), Some(RowFunction::Rendezvous { mask: 0xffff }));
    assert_eq!(RENDEZVOUS.row_function(1), Some(RowFunction::Rendezvous { mask: 0 }));
    for rows in [0, 3, 65_535, 131_072] {
        assert_eq!(RENDEZVOUS.row_function(rows), None);
    }
    assert_eq!(HIGHEST.row_function(256), Some(RowFunction::Crc8));
    assert_eq!(HIGHEST.row_function(65_536), None);
}

/// Hashes near each other and near the ends, so that costs tie.
fn hashes() -> impl Strategy<Value = u64> {
    prop_oneof![any::<u64>(), 0_u64..8, (u64::MAX - 8)..=u64::MAX, (1_u64 << 63) - 4..(1 << 63) + 4]
}

fn weights() -> impl Strategy<Value = u32> {
    prop_oneof![1_u32..5, Just(u32::MAX), 1_u32..=u32::MAX]
}

proptest! {
    #[test]
    fn the_logarithm_is_monotone(a: u64, difference in 0_u64..1 << 40) {
        prop_assert!(neg_log2(a) >= neg_log2(a.saturating_add(difference)));
    }

    #[test]
    fn what_is_surely_below_loses(a in hashes(), b in hashes(), weights in (weights(), weights())) {
        prop_assert!(least_neg_log2(a) <= neg_log2(a));
        let (a, b) = ((a, weights.0), (b, weights.1));
        let scorer = Scorer::of(RENDEZVOUS);
        let order = scorer.compare(a, b);
        if order != Ordering::Less {
            prop_assert!(!scorer.surely_below(a, &Bar::new(b)));
        }
        if order == Ordering::Less && weights.0 == weights.1 {
            prop_assert!(scorer.surely_below(a, &Bar::new(b)));
        }
        prop_assert!(!scorer.surely_below(a, &Bar::new((0, 0))));
    }

    #[test]
    fn equal_weights_compare_the_hashes(a in hashes(), b in hashes(), weight in weights()) {
        prop_assert_eq!(score(RENDEZVOUS, a, weight).partial_cmp(&score(RENDEZVOUS, b, weight)), Some(a.cmp(&b)));
    }

    #[test]
    fn scores_are_ordered_transitively(
        scores in proptest::collection::vec((hashes(), weights()), 3),
        which in 0_usize..3,
    ) {
        let scoring = [RENDEZVOUS, HIGHEST, LOWEST][which];
        let [a, b, c] = [0, 1, 2].map(|at| {
            let (value, weight) = scores[at];
            score(scoring, if which == 0 { value } else { value & 0xff }, weight)
        });
        prop_assert_eq!(a.partial_cmp(&b).unwrap(), b.partial_cmp(&a).unwrap().reverse());
        if a <= b && b <= c {
            prop_assert!(a <= c);
        }
        if a == b && b == c {
            prop_assert!(a == c);
        }
    }
}
