//! Owner and backup lost at the same instant: what is saved with one backup, with caches, and with two backups.

use std::time::Duration;

use crate::consistency;
use crate::runner::run_schedule;
use crate::schedule::{Change, PACED};
use crate::settings::{Balancer, Settings};

/// A configuration under test: its name, the backups of a flow, and the share of members with a cache.
pub type Case = (&'static str, usize, f64);

/// The rows of the table.
pub const CASES: [Case; 3] = [
    ("`backups = 1`, no caches", 1, 0.0),
    ("`backups = 1`, `cache = \"all\"` everywhere", 1, 1.0),
    ("`backups = 2`, no caches", 2, 0.0),
];

/// What became of the connections of one case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Loss {
    /// Open when two of four members died.
    pub open: u64,
    /// Of these, whose owner and first backup they were.
    pub orphans: u64,
    /// Of the orphans, broken.
    pub broken_orphans: u64,
    /// Broken in all.
    pub broken: u64,
}

/// Runs `count` seeds of one case: four members at rest, most connections off the consistent choice, then two members die at once.
pub fn loss((_, backups, caches): Case, from: u64, count: u64) -> Loss {
    let mut loss = Loss::default();
    for seed in from..from + count {
        let settings = Settings { backups, caches, ..consistency::settings(seed, Balancer::Phalanx) };
        let mut schedule = consistency::schedule(&settings, Vec::new());
        let at = Duration::from_secs(9) + PACED;
        schedule.extend([(at, Change::Crash(1)), (at, Change::Crash(2))]);
        let report = run_schedule(settings, schedule, false);
        let [orphans, broken_orphans] = report.orphans;
        loss.open += report.live as u64;
        loss.orphans += orphans;
        loss.broken_orphans += broken_orphans;
        loss.broken += report.broken_since(at);
    }
    loss
}
