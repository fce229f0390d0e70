//! Which checker catches which planted fault.

use std::collections::{BTreeMap, BTreeSet};

use crate::faults::Fault;
use crate::runner::{self, Options};
use crate::world::Report;

/// In how many seeds each checker caught a fault: it found something that it does not find in the same seed without the fault.
pub type Caught = BTreeMap<&'static str, u64>;

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

/// Runs seeds with each fault, and without.
pub fn table(from: u64, count: u64, threads: usize, options: Options) -> BTreeMap<Fault, Caught> {
    let mut clean = BTreeMap::new();
    runner::run_many(from, count, threads, options, |report| {
        clean.insert(report.seed, checkers(&report));
    });
    let mut table = BTreeMap::new();
    for fault in Fault::ALL {
        let caught = table.entry(fault).or_insert_with(Caught::new);
        runner::run_many(from, count, threads, Options { fault: Some(fault), ..options }, |report| {
            let none = BTreeSet::new();
            let known = clean.get(&report.seed).unwrap_or(&none);
            for checker in checkers(&report).difference(known) {
                *caught.entry(*checker).or_insert(0) += 1;
            }
        });
    }
    table
}
