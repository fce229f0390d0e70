//! What the lab says of chaos: by kind of change, by connection that broke, and over time.

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::time::Duration;

use serde::Serialize;

use super::report::{EventReport, millis, share};
use super::traffic::{Second, Window, percentile};

/// Connections that broke are told one by one up to this many; a twin breaks hundreds.
const TOLD: usize = 200;
/// The first steps change the backends; until they are made nothing deviates.
const OPENING_STEPS: usize = 3;

/// What one change did, noted while it happened.
#[derive(Clone, Debug, Default)]
pub struct ChangeNote {
    /// Its window in the ledger.
    pub window: usize,
    /// Its kind, or its kinds.
    pub kind: String,
    /// Time for which some flow lacked its backup, in seconds.
    pub unprotected_s: f64,
    /// Time until every flow had two holders again and everybody agreed, in seconds.
    pub protected_after_s: Option<f64>,
    /// Packets handed off before it.
    pub handed_off_before: u64,
    /// Packets of flows that nobody knew before it.
    pub recovered_before: u64,
}

/// The state of the site at a moment.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Sample {
    /// Time since all long-lived connections were open, in seconds.
    pub at_s: f64,
    /// Connections in progress.
    pub live: u64,
    /// Connections that broke until then.
    pub broken: u64,
    /// Flows whose backup had not acknowledged them, all members together.
    pub unprotected: u64,
}

/// What happened to connections in one second.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct StallSecond {
    /// Its beginning: time since all long-lived connections were open, in seconds.
    pub at_s: f64,
    /// The longest gap of any connection that ended in it, in milliseconds.
    pub longest_ms: f64,
    /// Gaps of 200 ms or more that ended in it.
    pub stalls: u64,
}

/// A connection that broke.
#[derive(Clone, Debug, Serialize)]
pub struct BrokenReport {
    /// Its number.
    pub id: u64,
    /// What it was for; `None` if it was never opened.
    pub kind: Option<String>,
    /// The client's address and port.
    pub source: Option<SocketAddr>,
    /// The backend that had it.
    pub backend: Option<u32>,
    /// Why it broke.
    pub cause: String,
    /// The change made last before.
    pub during: String,
}

/// What all changes of a kind did together.
#[derive(Clone, Debug, Default, Serialize)]
pub struct KindReport {
    /// The kind; two kinds if two changes were made at once.
    pub kind: String,
    /// How many changes.
    pub changes: u64,
    /// Connections that broke.
    pub broken: u64,
    /// Median over connections and changes of their longest gap, in milliseconds.
    pub stall_p50_ms: Option<f64>,
    /// Its 99th percentile.
    pub stall_p99_ms: Option<f64>,
    /// The longest.
    pub stall_max_ms: Option<f64>,
    /// Connects.
    pub connects: u64,
    /// Median time to connect, in milliseconds.
    pub connect_p50_ms: Option<f64>,
    /// Its 99th percentile.
    pub connect_p99_ms: Option<f64>,
    /// The longest.
    pub connect_max_ms: Option<f64>,
    /// Packets handed off.
    pub handed_off: u64,
    /// Packets of flows that nobody knew.
    pub recovered: u64,
    /// Time for which some flow lacked its backup, in seconds, sampled four times a second.
    pub unprotected_s: f64,
    /// Longest time until every flow had two holders again and everybody agreed, in seconds.
    pub protected_after_max_s: Option<f64>,
}

/// The report on chaos.
#[derive(Clone, Debug, Default, Serialize)]
pub struct ChaosReport {
    /// What the schedule followed from.
    pub seed: u64,
    /// Steps made; each is one change or two.
    pub steps: u64,
    /// The smallest share of deviating connections at any step but the first, which make them deviate. 0 to 1.
    pub least_deviating_share: Option<f64>,
    /// By kind of change.
    pub kinds: Vec<KindReport>,
    /// The connections that broke, at most 200 of them.
    pub broken: Vec<BrokenReport>,
    /// The site over time, four times a second.
    pub samples: Vec<Sample>,
    /// Stalls over time.
    pub stalls: Vec<StallSecond>,
}

impl ChaosReport {
    /// Puts together what was noted (`notes`, `events` of the same windows), measured (`windows`), and seen over `time`: samples, the
    /// ledger's seconds, and how long before the start the ledger was opened. `totals` are hand-offs and recovered packets at the end.
    pub fn new(
        seed: u64,
        notes: Vec<ChangeNote>,
        events: &[EventReport],
        windows: &[Window],
        mut broken: Vec<BrokenReport>,
        time: (Vec<Sample>, Vec<Second>, f64),
        totals: [u64; 2],
    ) -> Self {
        broken.sort_by_key(|broken| broken.id);
        broken.truncate(TOLD);
        let deviating =
            notes.iter().skip(OPENING_STEPS).filter_map(|note| events.get(note.window)?.deviating_share);
        let least_deviating_share = deviating.reduce(f64::min);
        let mut gathered: BTreeMap<String, (KindReport, Vec<Duration>, Vec<Duration>)> = BTreeMap::new();
        for (index, note) in notes.iter().enumerate() {
            let Some(window) = windows.get(note.window) else { continue };
            let [handed_off, recovered] =
                notes.get(index + 1).map_or(totals, |next| [next.handed_off_before, next.recovered_before]);
            let (kind, stalls, connects) = gathered.entry(note.kind.clone()).or_default();
            kind.kind.clone_from(&note.kind);
            kind.changes += 1;
            kind.broken += window.broken;
            kind.handed_off += handed_off.saturating_sub(note.handed_off_before);
            kind.recovered += recovered.saturating_sub(note.recovered_before);
            kind.unprotected_s += note.unprotected_s;
            kind.protected_after_max_s =
                kind.protected_after_max_s.into_iter().chain(note.protected_after_s).reduce(f64::max);
            stalls.extend_from_slice(&window.stalls);
            connects.extend_from_slice(&window.connects);
        }
        let kinds =
            gathered.into_values().map(|(kind, stalls, connects)| finish(kind, stalls, connects)).collect();
        let (samples, seconds, opened_before_s) = time;
        let stalls = seconds.iter().enumerate().map(|(second, seen)| StallSecond {
            at_s: second as f64 - opened_before_s,
            longest_ms: ms(seen.longest),
            stalls: seen.stalls,
        });
        Self {
            seed,
            steps: notes.len() as u64,
            least_deviating_share,
            kinds,
            broken,
            samples,
            stalls: stalls.collect(),
        }
    }
}

fn ms(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e6).round() / 1e3
}

fn finish(kind: KindReport, mut stalls: Vec<Duration>, mut connects: Vec<Duration>) -> KindReport {
    stalls.sort_unstable();
    connects.sort_unstable();
    KindReport {
        stall_p50_ms: percentile(&stalls, 0.5).map(ms),
        stall_p99_ms: percentile(&stalls, 0.99).map(ms),
        stall_max_ms: stalls.last().copied().map(ms),
        connects: connects.len() as u64,
        connect_p50_ms: percentile(&connects, 0.5).map(ms),
        connect_p99_ms: percentile(&connects, 0.99).map(ms),
        connect_max_ms: connects.last().copied().map(ms),
        ..kind
    }
}

impl fmt::Display for ChaosReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "chaos of seed {}: {} steps, always at least {} deviating",
            self.seed,
            self.steps,
            share(self.least_deviating_share)
        )?;
        writeln!(f)?;
        writeln!(
            f,
            "{:<30} {:>7} {:>7} {:>9} {:>9} {:>9} {:>11} {:>11} {:>10} {:>9} {:>11} {:>10}",
            "kind of change",
            "changes",
            "broken",
            "stall p50",
            "stall p99",
            "stall max",
            "connect p99",
            "connect max",
            "handed off",
            "recovered",
            "unprotected",
            "safe after"
        )?;
        for kind in &self.kinds {
            let seconds =
                |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |value| format!("{value:.1} s"));
            writeln!(
                f,
                "{:<30} {:>7} {:>7} {:>9} {:>9} {:>9} {:>11} {:>11} {:>10} {:>9} {:>11} {:>10}",
                kind.kind,
                kind.changes,
                kind.broken,
                millis(kind.stall_p50_ms),
                millis(kind.stall_p99_ms),
                millis(kind.stall_max_ms),
                millis(kind.connect_p99_ms),
                millis(kind.connect_max_ms),
                kind.handed_off,
                kind.recovered,
                seconds(Some(kind.unprotected_s)),
                seconds(kind.protected_after_max_s),
            )?;
        }
        for broken in &self.broken {
            let source = broken.source.map_or_else(|| "not opened".to_owned(), |source| source.to_string());
            let backend = broken.backend.map_or_else(|| "none".to_owned(), |backend| backend.to_string());
            writeln!(
                f,
                "broken: connection {} ({}, {source}, backend {backend}) after {}: {}",
                broken.id,
                broken.kind.as_deref().unwrap_or("connecting"),
                broken.during,
                broken.cause
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn note(window: usize, kind: &str, handed_off_before: u64) -> ChangeNote {
        ChangeNote { window, kind: kind.to_owned(), handed_off_before, ..ChangeNote::default() }
    }

    fn window(stalls: &[u64], broken: u64) -> Window {
        let stalls = stalls.iter().copied().map(Duration::from_millis).collect();
        Window { stalls, connects: vec![Duration::from_millis(1)], broken }
    }

    #[test]
    fn changes_of_a_kind_are_told_together() {
        let notes = vec![
            note(1, "kill", 10),
            ChangeNote { unprotected_s: 0.5, protected_after_s: Some(4.0), ..note(2, "join", 30) },
            note(3, "kill", 35),
            ChangeNote { protected_after_s: Some(2.0), ..note(4, "join", 40) },
        ];
        let windows = [
            window(&[9000], 9),
            window(&[1, 300], 1),
            window(&[2], 0),
            window(&[2, 900], 2),
            window(&[3], 0),
        ];
        let mut events = vec![EventReport::default(); 5];
        for (event, share) in events.iter_mut().zip([0.0, 0.1, 0.2, 0.3, 0.6]) {
            event.deviating_share = Some(share);
        }
        let seconds = vec![Second { longest: Duration::from_millis(300), stalls: 2 }; 3];
        let report =
            ChaosReport::new(5, notes, &events, &windows, Vec::new(), (Vec::new(), seconds, 2.5), [47, 0]);
        let [join, kill] = &report.kinds[..] else { panic!("{:?}", report.kinds) };
        assert_eq!((kill.kind.as_str(), kill.changes, kill.broken), ("kill", 2, 3));
        assert_eq!((kill.stall_p50_ms, kill.stall_max_ms), (Some(2.0), Some(900.0)));
        assert_eq!((kill.handed_off, join.handed_off), (20 + 5, 5 + 7));
        assert_eq!((join.unprotected_s, join.protected_after_max_s), (0.5, Some(4.0)));
        assert_eq!(report.least_deviating_share, Some(0.6), "the opening steps do not count");
        assert_eq!((report.stalls[0].at_s, report.stalls[2].longest_ms), (-2.5, 300.0));
        let text = report.to_string();
        assert!(text.contains("seed 5: 4 steps") && text.contains("60.0 %"), "{text}");
    }

    #[test]
    fn a_connection_that_broke_is_told_with_its_story() {
        let broken = BrokenReport {
            id: 17,
            kind: Some("half-closed".to_owned()),
            source: "198.18.0.2:4711".parse().ok(),
            backend: Some(3),
            cause: "client: connection reset".to_owned(),
            during: "pause 2 for 3s".to_owned(),
        };
        let report = ChaosReport { broken: vec![broken], ..ChaosReport::default() };
        let line = "broken: connection 17 (half-closed, 198.18.0.2:4711, backend 3) after pause 2 for 3s: client: connection reset";
        assert!(report.to_string().contains(line), "{report}");
    }
}
