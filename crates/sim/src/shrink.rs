//! Shortening a schedule that fails: what is left is what it takes.

use crate::runner::run_schedule;
use crate::schedule::Schedule;
use crate::settings::Settings;

/// Leaves out changes as long as `checker` still finds a violation: halves first, then smaller parts, then single ones.
///
/// Everything else that is random comes from generators of its own, so most of the run stays the same.
pub fn shrink(settings: &Settings, schedule: Schedule, checker: &str) -> Schedule {
    let fails = |schedule: &Schedule| {
        let report = run_schedule(settings.clone(), schedule.clone(), false);
        report.violations.iter().any(|violation| violation.checker == checker)
    };
    let mut schedule = schedule;
    let mut part = schedule.len().div_ceil(2);
    while part > 0 {
        let mut at = 0;
        while at < schedule.len() {
            let mut shorter = schedule.clone();
            shorter.drain(at..(at + part).min(schedule.len()));
            if fails(&shorter) {
                schedule = shorter;
            } else {
                at += part;
            }
        }
        part /= 2;
    }
    schedule
}
