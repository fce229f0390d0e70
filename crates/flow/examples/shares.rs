//! Measures how evenly the scorings spread the flows over 2 to 8 members, and prints `docs/shares.md`:
//! `cargo run -p phalanx-flow --example shares > docs/shares.md`.
#![expect(
    clippy::arithmetic_side_effects,
    clippy::expect_used,
    clippy::float_arithmetic,
    reason = "an example runs on the host and may fail loudly"
)]

use phalanx_flow::{BackupSite, Best, MemberId, RankedMember, RowTable, Scoring};

const SCORINGS: [(&str, Scoring, usize); 3] = [
    ("rendezvous", Scoring::Rendezvous { key: [0x0706_0504_0302_0100, 0x0f0e_0d0c_0b0a_0908] }, 65_536),
    ("crc8, highest", Scoring::Crc8 { best: Best::Highest }, 256),
    ("crc8, lowest", Scoring::Crc8 { best: Best::Lowest }, 256),
];

fn main() {
    print!(
        "\
# Measured shares

How much of the flow space each member owns, for 2 to 8 members, by scoring.
Printed by `cargo run -p phalanx-flow --example shares`.

**Why `crc8` is not the default:** a CRC is affine, so the scores of two members differ, on every connection, by the same xor; who \
wins hangs on a few bits, and so of three equal members one gets half of all flows, of eight one can get half too, and of two \
whose ids have the same CRC one gets nothing, whatever the traffic, while `rendezvous` keeps every member within the noise of \
65,536 draws.
Weights distort it further: they are factors, and not shares.

Shares are percentages of the rows, which the flow hash (or the CRC of the tuple) fills evenly, in the order of the ids, which are \
1, 2, 3, ... .
*Off* is the largest ratio of a member's share to what its weight deserves, or of the deserved to the share, less one.
"
    );
    for (title, weight) in
        [("Equal weights", (|_| 1) as fn(u32) -> u32), ("Unequal weights: 1, 2, 3, ...", |n| n)]
    {
        println!("\n## {title}\n");
        println!("| members | scoring | shares in % | deserved in % | off |");
        println!("|---|---|---|---|---|");
        for count in 2..=8 {
            for (name, scoring, rows) in SCORINGS {
                let members: Vec<RankedMember> = (0..count)
                    .map(|n| RankedMember { id: MemberId(n + 1), weight: weight(n + 1), site: 0 })
                    .collect();
                let shares = shares(scoring, rows, &members);
                let total: u32 = members.iter().map(|member| member.weight).sum();
                let deserved: Vec<f64> =
                    members.iter().map(|member| f64::from(member.weight) / f64::from(total)).collect();
                let off = shares
                    .iter()
                    .zip(&deserved)
                    .map(|(share, deserved)| (share / deserved).max(deserved / share) - 1.0)
                    .fold(0.0, f64::max);
                let off =
                    if off.is_finite() { format!("{:.1} %", off * 100.0) } else { "one gets none".into() };
                println!(
                    "| {count} | {name} | {} | {} | {off} |",
                    percentages(&shares),
                    percentages(&deserved)
                );
            }
        }
    }
    println!("\n## The largest share of one of three equal members, over the ids 1 to 255\n");
    println!("Deserved: 33.3 %.\n");
    println!("| scoring | least | median | most |");
    println!("|---|---|---|---|");
    for (name, scoring, rows) in SCORINGS {
        // Fewer rows and fewer triples for rendezvous: the noise stays the same for all triples.
        let step = if rows == 256 { 7 } else { 29 };
        let mut largest = Vec::new();
        for a in (1..=255).step_by(step) {
            for b in (a + 1..=255).step_by(step) {
                for c in (b + 1..=255).step_by(step) {
                    let members = [a, b, c].map(|id| RankedMember { id: MemberId(id), weight: 1, site: 0 });
                    largest.push(shares(scoring, rows, &members).into_iter().fold(0.0, f64::max));
                }
            }
        }
        largest.sort_by(f64::total_cmp);
        let at = |part: usize| largest.get((largest.len() - 1) * part / 2).copied().unwrap_or(0.0) * 100.0;
        println!("| {name} | {:.1} % | {:.1} % | {:.1} % |", at(0), at(1), at(2));
    }
}

/// The part of the rows that each member owns, from 0 to 1, in the order of `members`.
fn shares(scoring: Scoring, rows: usize, members: &[RankedMember]) -> Vec<f64> {
    let table = RowTable::new(scoring, rows, BackupSite::Any, members).expect("the members differ");
    members
        .iter()
        .map(|member| {
            let owned = (0..rows as u32).filter(|row| table.ranking(*row).first() == Some(&Some(member.id)));
            owned.count() as f64 / rows as f64
        })
        .collect()
}

fn percentages(parts: &[f64]) -> String {
    parts.iter().map(|part| format!("{:.1}", part * 100.0)).collect::<Vec<_>>().join(" ")
}
