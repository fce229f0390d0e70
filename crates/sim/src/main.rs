//! `cargo xtask sim`: see `docs/testing.md`.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use phalanx_sim::faults::Fault;
use phalanx_sim::runner::{self, Options};
use phalanx_sim::schedule::{ROUND, generate};
use phalanx_sim::shrink::shrink;
use phalanx_sim::{consistency, losses, planted};

/// Runs a whole site in virtual time, from seeds.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask sim", bin_name = "cargo xtask sim")]
struct Cli {
    /// How many seeds.
    #[arg(long, default_value_t = 300)]
    seeds: u64,
    /// The first of them.
    #[arg(long, default_value_t = 0)]
    from: u64,
    /// Members at the start, instead of as many as the seed says.
    #[arg(long)]
    members: Option<usize>,
    /// Tell the story of this seed.
    #[arg(long)]
    trace: Option<u64>,
    /// Tell every packet of this flow in it.
    #[arg(long, requires = "trace")]
    flow: Option<usize>,
    /// Run only the changes before this time, in seconds.
    #[arg(long)]
    until: Option<f64>,
    /// Instead of a minute or two, let so many days pass, with few packets and a change every quarter of an hour.
    #[arg(long)]
    days: Option<f64>,
    /// Connections of both families, ICMP errors about them, and in half of the seeds a member whose list of backends is not the others'.
    #[arg(long)]
    mixed: bool,
    /// Run each seed twice, and say which take another course the second time.
    #[arg(long)]
    twice: bool,
    /// Switch replication off.
    #[arg(long)]
    twin: bool,
    /// Plant this fault.
    #[arg(long, value_parser = |name: &str| Fault::named(name).ok_or("no such fault"))]
    fault: Option<Fault>,
    /// Plant each fault in turn (or the one named), and say which checker catches it in how many seeds.
    #[arg(long)]
    faults: bool,
    /// Make the table of docs/consistency.md.
    #[arg(long)]
    consistency: bool,
    /// Make the table of owner and backup lost at once, in docs/consistency.md.
    #[arg(long)]
    losses: bool,
    /// Backups of every flow, 1 or 2.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=2))]
    backups: u8,
    /// Shorten the schedule of this seed as far as it still fails, and tell its story.
    #[arg(long)]
    shrink: Option<u64>,
    /// Threads.
    #[arg(long, default_value_t = 2)]
    threads: usize,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let options = Options {
        members: cli.members,
        more_backups: usize::from(cli.backups) - 1,
        mixed: cli.mixed,
        twin: cli.twin,
        rounds: cli.days.map(|days| (days * 86_400.0 / ROUND.as_secs_f64()).ceil().max(2.0) as u32),
        fault: cli.fault,
        story: cli.trace.is_some(),
        watched: cli.flow,
        until: cli.until,
        twice: cli.twice,
    };
    if let Some(seed) = cli.trace {
        return trace(seed, options);
    }
    if let Some(seed) = cli.shrink {
        return shortened(seed, options);
    }
    if cli.faults {
        return faults(&cli, options);
    }
    if cli.consistency {
        consistency(&cli);
        return ExitCode::SUCCESS;
    }
    if cli.losses {
        print_losses(&cli);
        return ExitCode::SUCCESS;
    }
    let mut by_checker: BTreeMap<&'static str, (u64, u64)> = BTreeMap::new();
    let mut errors = [0, 0];
    let (mut opened, mut broken, mut lost, mut live, mut off, mut packets, mut hand_offs) =
        (0, 0, 0, 0, 0, 0, 0);
    let mut slowest = Duration::ZERO;
    let mut failed = Vec::new();
    runner::run_many(cli.from, cli.seeds, cli.threads, options, |report| {
        opened += report.opened;
        broken += report.broken();
        lost += report.lost();
        live += report.live;
        off += report.off_choice;
        packets += report.packets;
        hand_offs += report.hand_offs;
        errors = [errors[0] + report.errors[0], errors[1] + report.errors[1]];
        slowest = slowest.max(report.converged_in.unwrap_or_default());
        let mut seen = std::collections::BTreeSet::new();
        for violation in &report.violations {
            let (seeds, first) = by_checker.entry(violation.checker).or_insert((0, report.seed));
            if seen.insert(violation.checker) {
                *seeds += 1;
                *first = (*first).min(report.seed);
            }
        }
        if let Some(first) = report.violations.first() {
            println!("seed {}: {} at {:.3?}: {}", report.seed, first.checker, first.at, first.what);
            println!("  cargo xtask sim --trace {}{}", report.seed, again(&options));
            failed.push(report.seed);
        }
    });
    println!(
        "{} seeds: {} failed; {opened} connections, {broken} broken, {lost} lost with all holders; {off} of {live} live flows off \
         the consistent choice; {packets} rulings, {hand_offs} hand-offs; slowest to converge {slowest:.1?}",
        cli.seeds,
        failed.len()
    );
    if options.mixed {
        println!("  {} ICMP errors came to their connection's backend, {} to another", errors[0], errors[1]);
    }
    for (checker, (seeds, first)) in &by_checker {
        println!("  {checker:12} in {seeds} seeds, first {first}");
    }
    if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn trace(seed: u64, options: Options) -> ExitCode {
    let settings = options.settings(seed);
    println!("{settings:#?}");
    for (at, change) in generate(&settings) {
        println!("{:>9.3} {change}", at.as_secs_f64());
    }
    let report = runner::run(seed, options);
    for (at, line) in &report.story {
        println!("{:>9.3} {line}", at.as_secs_f64());
    }
    println!("broken: {:?}; converged in {:?}", report.broken_by, report.converged_in);
    for violation in &report.violations {
        println!("{:>9.3} {}: {}", violation.at.as_secs_f64(), violation.checker, violation.what);
    }
    if report.violations.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// The arguments that make a run the same as under these options.
fn again(options: &Options) -> String {
    let mut words = String::new();
    if let Some(members) = options.members {
        words += &format!(" --members {members}");
    }
    if options.more_backups > 0 {
        words += &format!(" --backups {}", 1 + options.more_backups);
    }
    if let Some(rounds) = options.rounds {
        words += &format!(" --days {}", (ROUND * rounds).as_secs_f64() / 86_400.0);
    }
    if options.mixed {
        words += " --mixed";
    }
    if options.twin {
        words += " --twin";
    }
    if let Some(fault) = options.fault {
        words += &format!(" --fault {}", fault.name());
    }
    words
}

fn shortened(seed: u64, options: Options) -> ExitCode {
    let settings = options.settings(seed);
    let report = runner::run(seed, options);
    let Some(first) = report.violations.first() else {
        println!("seed {seed} does not fail");
        return ExitCode::SUCCESS;
    };
    let schedule = shrink(&settings, generate(&settings), first.checker);
    for (at, change) in &schedule {
        println!("{:>9.3} {change}", at.as_secs_f64());
    }
    println!("-- its story:");
    let report = runner::run_schedule(settings, schedule, true);
    for (at, line) in &report.story {
        println!("{:>9.3} {line}", at.as_secs_f64());
    }
    ExitCode::FAILURE
}

fn faults(cli: &Cli, options: Options) -> ExitCode {
    println!("| fault | caught by, in so many of {} seeds | first caught after |\n|---|---|---|", cli.seeds);
    let mut missed = false;
    let faults = cli.fault.map_or_else(|| Fault::ALL.to_vec(), |fault| vec![fault]);
    let options = Options { fault: None, ..options };
    planted::table(&faults, cli.from, cli.seeds, cli.threads, options, |row| {
        let words: Vec<String> =
            row.caught.iter().map(|(checker, seeds)| format!("*{checker}* {seeds}")).collect();
        let words = if words.is_empty() { "nobody".to_owned() } else { words.join(", ") };
        let first = match row.first {
            Some((1, took)) => format!("1 seed, {:.1} s", took.as_secs_f64()),
            Some((seeds, took)) => format!("{seeds} seeds, {:.1} s", took.as_secs_f64()),
            None => "never".to_owned(),
        };
        missed |= row.first.is_none();
        println!("| {} | {words} | {first} |", row.fault.name());
    });
    if missed { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

fn consistency(cli: &Cli) {
    let table = consistency::table(cli.from, cli.seeds);
    print!("| change |");
    for (_, name) in consistency::BALANCERS {
        print!(" {name} |");
    }
    println!("\n|---|---|---|---|");
    for (row, (kind, _)) in consistency::KINDS.iter().enumerate() {
        print!("| {kind} |");
        for column in 0..consistency::BALANCERS.len() {
            let cell = table.get(&(row, column)).copied().unwrap_or_default();
            print!(
                " {} of {} ({:.1} %) |",
                cell.broken,
                cell.open,
                100.0 * cell.broken as f64 / cell.open.max(1) as f64
            );
        }
        println!();
    }
}

fn print_losses(cli: &Cli) {
    println!(
        "| configuration | open | owner and backup lost | of these saved | broken in all |\n|---|---|---|---|---|"
    );
    for case in losses::CASES {
        let loss = losses::loss(case, cli.from, cli.seeds);
        let saved = loss.orphans - loss.broken_orphans;
        println!(
            "| {} | {} | {} | {saved} ({:.0} %) | {} |",
            case.0,
            loss.open,
            loss.orphans,
            100.0 * saved as f64 / loss.orphans.max(1) as f64,
            loss.broken
        );
    }
}
