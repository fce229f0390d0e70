//! Many runs, on as many threads as there are.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use crate::checks::Violation;
use crate::faults::Fault;
use crate::schedule::{Schedule, generate};
use crate::settings::Settings;
use crate::world::{Report, World};

/// What is asked of each run.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Members at the start, instead of as many as the seed says.
    pub members: Option<usize>,
    /// Backups of every flow beyond the first.
    pub more_backups: usize,
    /// Replication is switched off: the twin.
    pub twin: bool,
    /// Broken on purpose.
    pub fault: Option<Fault>,
    /// Instead of a minute or two, so many rounds of four hours each.
    pub rounds: Option<u32>,
    /// Both families, ICMP errors, a member with another list of backends.
    pub mixed: bool,
    /// Tell the story.
    pub story: bool,
    /// Tell every packet of this flow in it.
    pub watched: Option<usize>,
    /// Run only the changes before this time, in seconds.
    pub until: Option<f64>,
    /// Run each seed twice: nothing but the seed may decide what happens.
    pub twice: bool,
}

impl Options {
    /// The settings of a seed under these options.
    pub fn settings(&self, seed: u64) -> Settings {
        let settings = Settings::from_seed(seed, self.members);
        let settings = match self.rounds {
            Some(rounds) => settings.for_days(rounds),
            None => settings,
        };
        let settings = if self.mixed { settings.mixed() } else { settings };
        Settings { replication: !self.twin, backups: 1 + self.more_backups, fault: self.fault, ..settings }
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "an Instant can be had in no other way; nothing of a run depends on which it is"
)]
fn epoch() -> Instant {
    Instant::now()
}

/// Runs one seed.
pub fn run(seed: u64, options: Options) -> Report {
    let settings = options.settings(seed);
    let mut schedule = if options.rounds.is_some() { Schedule::new() } else { generate(&settings) };
    schedule.retain(|(at, _)| options.until.is_none_or(|until| at.as_secs_f64() < until));
    let started = epoch();
    let mut world = World::new(settings, schedule, started, options.story);
    world.watched = options.watched;
    let report = world.run();
    Report { took: epoch().saturating_duration_since(started), ..report }
}

/// Runs a schedule of one's own.
pub fn run_schedule(settings: Settings, schedule: Schedule, story: bool) -> Report {
    World::new(settings, schedule, epoch(), story).run()
}

/// Runs seeds `from` to `from + count` on `threads` threads and gives `each` report as it comes, in no order.
pub fn run_many(from: u64, count: u64, threads: usize, options: Options, each: impl FnMut(Report) + Send) {
    let next = AtomicU64::new(from);
    let each = Mutex::new(each);
    std::thread::scope(|scope| {
        for _ in 0..threads.max(1) {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= from + count {
                        return;
                    }
                    let mut report = run(seed, options);
                    if options.twice && run(seed, options).trace != report.trace {
                        let what = "another run of this seed went another way".to_owned();
                        let at = report.virtual_time;
                        report.violations.push(Violation { checker: "repeats", at, what });
                    }
                    (each.lock().unwrap_or_else(PoisonError::into_inner))(report);
                }
            });
        }
    });
}
