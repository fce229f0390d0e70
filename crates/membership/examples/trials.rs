//! The long runs behind `docs/operating/membership.md`: `cargo run --release -p phalanx-membership --example trials -- all`.
//! The second argument is the only size of cluster to try, if given, and the third the only profile. Exits with status 1 if a target of the LAN profile is missed.
use std::{
    env,
    process::ExitCode,
    time::{Duration, Instant},
};

use phalanx_membership::{
    Timing,
    harness::Network,
    trial::{self, TrialError, quantile},
};

/// Trials per row of the kill table.
const TRIALS: u64 = 100;

fn main() -> ExitCode {
    let mode = env::args().nth(1).unwrap_or_else(|| "all".to_owned());
    let only = env::args().nth(2).and_then(|members| members.parse().ok());
    #[expect(
        clippy::disallowed_methods,
        reason = "virtual time has to start somewhere; nothing depends on where"
    )]
    let epoch = Instant::now();
    let result = match mode.as_str() {
        "kill" => kills(epoch, only),
        "quiet" => quiets(epoch, only),
        "stall" => stalls(epoch),
        "all" => kills(epoch, only)
            .and_then(|good| Ok(good & stalls(epoch)?))
            .and_then(|good| Ok(good & quiets(epoch, only)?)),
        _ => {
            eprintln!("usage: trials [kill|stall|quiet|all] [members] [lan|wan]");
            return ExitCode::from(2);
        }
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => {
            eprintln!("a target was missed");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn profiles(loss: f64) -> Vec<(Timing, Network)> {
    let only = env::args().nth(3);
    let mut profiles = vec![(Timing::lan(), Network::lan(loss)), (Timing::wan(), Network::wan(loss))];
    profiles.retain(|(timing, _)| only.as_ref().is_none_or(|only| *only == timing.name));
    profiles
}

fn sizes(all: &[u32], only: Option<u32>) -> Vec<u32> {
    only.map_or_else(|| all.to_vec(), |members| vec![members])
}

fn seconds(duration: Duration) -> String {
    format!("{:.2}", duration.as_secs_f64())
}

fn kills(epoch: Instant, only: Option<u32>) -> Result<bool, TrialError> {
    println!(
        "| profile | members | loss | suspected by all: p50 | p99 | max | first confirmed: min | confirmed by all: p50 | p99 | max |"
    );
    println!("|-|-|-|-|-|-|-|-|-|-|");
    let mut good = true;
    for (timing, network) in profiles(0.01) {
        for members in sizes(&[2, 3, 10, 100], only) {
            let (mut suspected, mut confirmed, mut first) = (Vec::new(), Vec::new(), Vec::new());
            for seed in 0..TRIALS {
                let kill = trial::kill(epoch, &timing, network, members, seed)?;
                suspected.push(kill.suspected);
                confirmed.push(kill.confirmed);
                first.push(kill.first_confirmation);
            }
            for list in [&mut suspected, &mut confirmed, &mut first] {
                list.sort_unstable();
            }
            let row = [
                quantile(&suspected, 0.5),
                quantile(&suspected, 0.99),
                quantile(&suspected, 1.0),
                quantile(&first, 0.0),
                quantile(&confirmed, 0.5),
                quantile(&confirmed, 0.99),
                quantile(&confirmed, 1.0),
            ];
            let row: Vec<_> = row.into_iter().map(seconds).collect();
            println!("| {} | {members} | 1 % | {} |", timing.name, row.join(" | "));
            if timing.name == "lan" {
                good &= quantile(&suspected, 0.99) <= Duration::from_millis(800);
                good &= quantile(&confirmed, 0.99) <= Duration::from_secs(3);
            }
        }
    }
    Ok(good)
}

fn stalls(epoch: Instant) -> Result<bool, TrialError> {
    println!(
        "\n| profile | members | stalled for | suspected by (of 9) | trials with a confirmation | recovered within |"
    );
    println!("|-|-|-|-|-|-|");
    let mut good = true;
    for (timing, network) in profiles(0.01) {
        for length in [timing.confirm_after / 2, timing.confirm_after * 5 / 2] {
            let (mut confirmed, mut suspected, mut slowest) = (0, usize::MAX, Duration::ZERO);
            for seed in 0..TRIALS {
                let stall = trial::stall(epoch, &timing, network, 10, seed, length)?;
                suspected = suspected.min(stall.suspected_by);
                confirmed += u64::from(stall.confirmed_by > 0);
                slowest = slowest.max(stall.recovered.unwrap_or(Duration::MAX));
            }
            println!(
                "| {} | 10 | {} s | at least {suspected} | {confirmed} of {TRIALS} | {} s |",
                timing.name,
                seconds(length),
                seconds(slowest)
            );
            if timing.name == "lan" && length < timing.confirm_after {
                good &= suspected == 9 && confirmed == 0;
            }
        }
    }
    Ok(good)
}

fn quiets(epoch: Instant, only: Option<u32>) -> Result<bool, TrialError> {
    println!(
        "\n| profile | members | loss | virtual time | false confirmations | suspicions | renewals | datagrams/s | bytes/s | shortest lease left |"
    );
    println!("|-|-|-|-|-|-|-|-|-|-|");
    let mut good = true;
    for loss in [0.05, 0.01] {
        for (timing, network) in profiles(loss) {
            for members in sizes(&[10, 100], only) {
                let quiet = trial::quiet(epoch, &timing, network, members, 1, Duration::from_secs(3600))?;
                println!(
                    "| {} | {members} | {} % | 1 h | {} | {} | {} | {:.0} | {:.0} | {} s |",
                    timing.name,
                    (loss * 100.0).round(),
                    quiet.false_confirmations,
                    quiet.suspicions,
                    quiet.renewals,
                    quiet.datagrams_per_second,
                    quiet.bytes_per_second,
                    seconds(quiet.shortest_lease)
                );
                good &= timing.name != "lan" || quiet.false_confirmations == 0;
            }
        }
    }
    Ok(good)
}
