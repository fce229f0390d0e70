//! What the second owner buys: the same schedules for plain ECMP, for local tables, and for Phalanx.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::runner::run_schedule;
use crate::schedule::{Change, PACED, Schedule};
use crate::settings::{Balancer, Settings};

/// One kind of change under test.
pub type Kind = (&'static str, fn(&Settings) -> Vec<Change>);

/// The kinds of change in the table. Each comes alone, to a site at rest.
pub const KINDS: [Kind; 8] = [
    ("backend drained", |_| vec![Change::BackendDrain(1)]),
    ("backend added", |settings| vec![Change::BackendAdd(settings.backends[0])]),
    ("member joins", |settings| vec![Change::Start(settings.members)]),
    ("member leaves", |_| vec![Change::Leave(1)]),
    ("member crashes", |_| vec![Change::Crash(1)]),
    ("member crashes and comes back", |_| vec![Change::Crash(1), Change::Start(1)]),
    ("member stands still for 4 s", |_| vec![Change::Stall(1, Duration::from_secs(4))]),
    ("router spreads anew", |_| vec![Change::Rehash]),
];

/// Connections broken and connections open, of one balancer and one kind of change.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cell {
    /// Broken by the change, whoever might be excused.
    pub broken: u64,
    /// Open when it came.
    pub open: u64,
}

/// The table: by kind, then by balancer.
pub type Table = BTreeMap<(usize, usize), Cell>;

/// The balancers compared, in the order of the columns.
pub const BALANCERS: [(Balancer, &str); 3] = [
    (Balancer::Ecmp, "plain ECMP"),
    (Balancer::LocalTables, "consistent hashing, local tables"),
    (Balancer::Phalanx, "Phalanx"),
];

/// A site of four members whose backends have changed since its connections were opened (two drained, one added), and then one change.
pub(crate) fn schedule(settings: &Settings, changes: Vec<Change>) -> Schedule {
    let mut schedule = vec![
        (Duration::from_secs(8), Change::BackendDrain(0)),
        (Duration::from_secs(8), Change::BackendDrain(2)),
        (Duration::from_secs(8), Change::BackendAdd(settings.backends[0] + 1)),
    ];
    let first = Duration::from_secs(9) + PACED;
    for (at, change) in changes.into_iter().enumerate() {
        schedule.push((first + Duration::from_secs(6) * at as u32, change));
    }
    schedule
}

/// The settings of one seed: as Phalanx would have them, the same for all.
pub(crate) fn settings(seed: u64, balancer: Balancer) -> Settings {
    Settings {
        balancer,
        caches: 0.0,
        cramped: None,
        loss: [0.0, 0.0],
        duplicates: 0.0,
        weights: 1,
        backends: [5, 3],
        flows: 120,
        ..Settings::from_seed(seed, Some(4))
    }
}

/// Runs `count` seeds of one cell.
pub fn cell(row: usize, column: usize, from: u64, count: u64) -> Cell {
    let (_, changes) = KINDS[row];
    let (balancer, _) = BALANCERS[column];
    let mut cell = Cell::default();
    for seed in from..from + count {
        let settings = settings(seed, balancer);
        let before = schedule(&settings, Vec::new());
        let schedule = schedule(&settings, changes(&settings));
        // What the change of backends before it broke is not this change's.
        let first = schedule.get(before.len()).map(|(at, _)| *at).unwrap_or_default();
        let report = run_schedule(settings, schedule, false);
        cell.broken += report.broken_since(first);
        cell.open += report.live as u64;
    }
    cell
}

/// Runs `count` seeds of every cell.
pub fn table(from: u64, count: u64) -> Table {
    let cells = (0..KINDS.len()).flat_map(|row| (0..BALANCERS.len()).map(move |column| (row, column)));
    cells.map(|(row, column)| ((row, column), cell(row, column, from, count))).collect()
}
