//! Which checker catches which planted fault.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use crate::faults::Fault;
use crate::runner::{self, Options};
use crate::world::Report;

/// In how many seeds each checker caught a fault: it found something that it does not find in the same seed without the fault.
pub type Caught = BTreeMap<&'static str, u64>;

/// What became of one fault.
#[derive(Clone, Debug)]
pub struct Row {
    /// Which.
    pub fault: Fault,
    /// Who caught it.
    pub caught: Caught,
    /// How many seeds it took until somebody did, and how long they ran, one after the other.
    pub first: Option<(u64, Duration)>,
}

fn checkers(report: &Report) -> BTreeSet<&'static str> {
    report.violations.iter().map(|violation| violation.checker).collect()
}

/// What the checkers find in a seed with the fault and not without.
pub fn caught_in(seed: u64, fault: Fault, options: Options) -> BTreeSet<&'static str> {
    let faulty = checkers(&runner::run(seed, Options { fault: Some(fault), ..options }));
    if faulty.is_empty() {
        return faulty;
    }
    let clean = checkers(&runner::run(seed, options));
    faulty.difference(&clean).copied().collect()
}

/// Runs seeds without a fault and then with each of `faults` in turn, and gives `each` row as soon as it is there.
pub fn table(
    faults: &[Fault],
    from: u64,
    count: u64,
    threads: usize,
    options: Options,
    mut each: impl FnMut(Row),
) {
    let mut clean = BTreeMap::new();
    runner::run_many(from, count, threads, options, |report| {
        clean.insert(report.seed, checkers(&report));
    });
    for fault in faults.iter().copied() {
        let mut caught = Caught::new();
        let mut took = BTreeMap::new();
        let mut first = None;
        runner::run_many(from, count, threads, Options { fault: Some(fault), ..options }, |report| {
            took.insert(report.seed, report.took);
            let mut seen = checkers(&report);
            if let Some(known) = clean.get(&report.seed) {
                seen.retain(|checker| !known.contains(checker));
            }
            if !seen.is_empty() {
                first = Some(first.map_or(report.seed, |first: u64| first.min(report.seed)));
            }
            for checker in seen {
                *caught.entry(checker).or_insert(0) += 1;
            }
        });
        let first = first.map(|first| (first - from + 1, took.range(..=first).map(|(_, took)| *took).sum()));
        each(Row { fault, caught, first });
    }
}
