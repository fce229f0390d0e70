//! What the lab says at the end.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use serde::Serialize;

use super::changes::ChaosReport;
use super::traffic::{Window, percentile};
use super::world::Topology;

/// The result of a run. Serialized it is the output of `--json`.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// How the site was laid out.
    pub topology: Topology,
    /// How members reached backends.
    pub method: String,
    /// Which forwarder members had.
    pub forwarder: String,
    /// Members at the start.
    pub members: u32,
    /// Backends at the start.
    pub backends: u32,
    /// Whether owners told backups of their flows.
    pub replication: bool,
    /// Length of the run after all long-lived connections were open, in seconds.
    pub duration_s: f64,
    /// Connects tried.
    pub attempted: u64,
    /// Connections opened.
    pub opened: u64,
    /// Connections that said all they had to say, every byte checked at both ends.
    pub completed: u64,
    /// Connections that broke: a failed connect, any error, a wrong byte, or 30 s without progress.
    pub broken: u64,
    /// Why they broke, and how many each.
    pub broken_causes: BTreeMap<String, u64>,
    /// Bytes of payload checked at both ends.
    pub bytes: u64,
    /// Share of the live connections whose backend is not the one the consistent table would give: at the first event that took a
    /// member away or brought one, otherwise at the end. 0 to 1.
    pub deviating_share: Option<f64>,
    /// The same at the end.
    pub deviating_share_at_end: Option<f64>,
    /// The time before the first event, and each event with what was measured until the next.
    pub events: Vec<EventReport>,
    /// Packets that members handed off to each other.
    pub handed_off: u64,
    /// Packets by verdict, all members together.
    pub verdicts: BTreeMap<String, u64>,
    /// Packets dropped by reason, all members together.
    pub drops: BTreeMap<String, u64>,
    /// Packets of flows that nobody knew.
    pub recovered: u64,
    /// Flows that were not recorded because a flow table was full.
    pub table_full: u64,
    /// What went wrong beside connections: members that ended by themselves, configurations that were refused.
    pub problems: Vec<String>,
    /// Whether the run was ended by a signal before its time.
    pub interrupted: bool,
    /// What was measured by kind of change, where the run was chaos.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub chaos: Option<ChaosReport>,
}

/// What was measured from one event to the next.
#[derive(Clone, Debug, Default, Serialize)]
pub struct EventReport {
    /// Time since all long-lived connections were open, in seconds; below 0 while they were opened.
    pub at_s: f64,
    /// What was done; "start" for the time before the first event.
    pub what: String,
    /// Live connections at that moment.
    pub live: u64,
    /// As [`Report::deviating_share`], at that moment, before it was done.
    pub deviating_share: Option<f64>,
    /// 99th percentile over the connections of their longest gap, in milliseconds.
    pub stall_p99_ms: Option<f64>,
    /// The longest gap of any connection, in milliseconds.
    pub stall_max_ms: Option<f64>,
    /// Connects.
    pub connects: u64,
    /// Median time to connect, in milliseconds.
    pub connect_p50_ms: Option<f64>,
    /// 99th percentile of the time to connect, in milliseconds.
    pub connect_p99_ms: Option<f64>,
    /// The longest time to connect, in milliseconds.
    pub connect_max_ms: Option<f64>,
    /// Connections that broke.
    pub broken: u64,
}

impl EventReport {
    /// Adds what was measured in the event's window.
    pub fn measure(&mut self, window: &Window) {
        let ms = |duration: Option<Duration>| {
            duration.map(|duration| (duration.as_secs_f64() * 1e6).round() / 1e3)
        };
        self.stall_p99_ms = ms(percentile(&window.stalls, 0.99));
        self.stall_max_ms = ms(window.stalls.last().copied());
        self.connects = window.connects.len() as u64;
        self.connect_p50_ms = ms(percentile(&window.connects, 0.5));
        self.connect_p99_ms = ms(percentile(&window.connects, 0.99));
        self.connect_max_ms = ms(window.connects.last().copied());
        self.broken = window.broken;
    }
}

pub(super) fn share(value: Option<f64>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| format!("{:.1} %", value * 100.0))
}

pub(super) fn millis(value: Option<f64>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| format!("{value:.1}"))
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let topology = match self.topology {
            Topology::Lan => "lan",
            Topology::Routed => "routed",
        };
        writeln!(
            f,
            "{} members ({}), {} backends, {topology}, {}, replication {}, {:.1} s{}",
            self.members,
            self.forwarder,
            self.backends,
            self.method,
            if self.replication { "on" } else { "OFF" },
            self.duration_s,
            if self.interrupted { ", INTERRUPTED" } else { "" },
        )?;
        writeln!(f)?;
        writeln!(
            f,
            "{:>8}  {:<34} {:>6} {:>9} {:>11} {:>11} {:>9} {:>12} {:>12} {:>7}",
            "at",
            "event",
            "live",
            "deviating",
            "stall p99",
            "stall max",
            "connects",
            "connect p99",
            "connect max",
            "broken"
        )?;
        for event in &self.events {
            writeln!(
                f,
                "{:>6.1} s  {:<34} {:>6} {:>9} {:>8} ms {:>8} ms {:>9} {:>9} ms {:>9} ms {:>7}",
                event.at_s,
                event.what,
                event.live,
                share(event.deviating_share),
                millis(event.stall_p99_ms),
                millis(event.stall_max_ms),
                event.connects,
                millis(event.connect_p99_ms),
                millis(event.connect_max_ms),
                event.broken
            )?;
        }
        writeln!(f)?;
        if let Some(chaos) = &self.chaos {
            writeln!(f, "{chaos}")?;
        }
        let list = |counts: &BTreeMap<String, u64>| {
            if counts.is_empty() {
                return "none".to_owned();
            }
            counts.iter().map(|(name, count)| format!("{name} {count}")).collect::<Vec<_>>().join(", ")
        };
        writeln!(f, "packets by verdict:   {}", list(&self.verdicts))?;
        writeln!(f, "packets dropped:      {}", list(&self.drops))?;
        writeln!(f, "packets handed off:   {}", self.handed_off)?;
        writeln!(f, "packets recovered:    {}", self.recovered)?;
        writeln!(f, "bytes checked:        {}", self.bytes)?;
        writeln!(f, "deviating share:      {}", share(self.deviating_share))?;
        for problem in &self.problems {
            writeln!(f, "problem:              {problem}")?;
        }
        writeln!(f)?;
        writeln!(f, "connections opened:    {} of {} tried", self.opened, self.attempted)?;
        writeln!(f, "connections completed: {}", self.completed)?;
        for (cause, count) in &self.broken_causes {
            writeln!(f, "    {count} x {cause}")?;
        }
        write!(f, "connections broken:    {}", self.broken)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_ends_with_the_number_that_matters() {
        let mut report = Report { broken: 3, ..Report::default() };
        report.broken_causes.insert("client: connection reset".to_owned(), 3);
        let mut event = EventReport { what: "kill 2".to_owned(), ..EventReport::default() };
        event.measure(&Window {
            stalls: vec![Duration::from_micros(1500), Duration::from_millis(300)],
            connects: Vec::new(),
            broken: 3,
        });
        assert_eq!((event.stall_p99_ms, event.connect_max_ms), (Some(300.0), None));
        report.events.push(event);
        let text = report.to_string();
        assert!(text.ends_with("connections broken:    3"), "{text}");
        assert!(text.contains("3 x client: connection reset") && text.contains("kill 2"));
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["broken"], 3);
        assert_eq!(json["topology"], "lan");
    }
}
