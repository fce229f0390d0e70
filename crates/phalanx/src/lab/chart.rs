//! The picture of a run in chaos: connections and stalls over time, and what was done when.

use super::report::Report;
use super::scenario::Action;
use super::svg::{AXIS, BAD, DARK, GOOD, GREY, GRID, INK, PALE, Svg, thousands};
use super::world::Topology;

const WIDTH: f64 = 1200.0;
const LEFT: f64 = 64.0;
/// Where the axis of time ends and the total begins.
const RIGHT: f64 = 1060.0;
/// Tops and heights of the three lanes: changes, connections, stalls.
const CHANGES: (f64, f64) = (86.0, 118.0);
const CONNECTIONS: (f64, f64) = (232.0, 110.0);
const STALLS: (f64, f64) = (388.0, 190.0);
const HEIGHT: f64 = 640.0;

/// Rows of the lane of changes.
const ROWS: [&str; 5] = ["dies or stops", "cut off", "comes or goes", "reload, loss", "backends"];

/// The row of a change by its kind.
fn row(kind: &str) -> usize {
    match kind {
        "kill" | "crash" | "pause" | "restart" => 0,
        "partition" | "split" => 1,
        "join" | "leave" | "drain" | "undrain" => 2,
        "reload" | "loss" => 3,
        _ => 4,
    }
}

/// Draws the run; `None` if it was not chaos.
pub fn draw(report: &Report) -> Option<String> {
    let chaos = report.chaos.as_ref()?;
    let from = report.events.first().map_or(0.0, |event| event.at_s).min(0.0);
    let to = chaos.samples.last().map_or(1.0, |sample| sample.at_s).max(report.duration_s);
    let x = |second: f64| LEFT + (second - from) / (to - from).max(1.0) * (RIGHT - LEFT);
    let mut svg = Svg::new(WIDTH, HEIGHT);
    let topology = match report.topology {
        Topology::Lan => "lan",
        Topology::Routed => "routed",
    };
    let title = format!(
        "phalanx lab --chaos {}: {} members ({}), {topology}, {}, replication {}",
        chaos.seed,
        report.members,
        report.forwarder,
        report.method,
        if report.replication { "on" } else { "off" },
    );
    svg.text(LEFT, 30.0, "start", INK, 17, &title);
    let what = format!(
        "{} changes, {} connections opened, every byte checked at both ends, always at least {:.0} % off the consistent table",
        chaos.steps,
        thousands(report.opened),
        chaos.least_deviating_share.unwrap_or_default() * 100.0,
    );
    svg.text(LEFT, 52.0, "start", GREY, 13, &what);

    changes(&mut svg, report, x);
    connections(&mut svg, report, x);
    stalls(&mut svg, report, x);

    let step = [5.0, 10.0, 30.0, 60.0, 120.0, 300.0]
        .into_iter()
        .find(|step| (to - from) / step <= 16.0)
        .unwrap_or(600.0);
    // Negative zero would be shown as such.
    let mut second = (from / step).ceil() * step + 0.0;
    while second <= to {
        svg.text(x(second), STALLS.0 + STALLS.1 + 18.0, "middle", AXIS, 11, &format!("{second} s"));
        second += step;
    }
    let note = "seconds since the long-lived connections were open";
    svg.text(LEFT, HEIGHT - 18.0, "start", GREY, 12, note);

    let colour = if report.broken == 0 { GOOD } else { BAD };
    let middle = f64::midpoint(RIGHT, WIDTH);
    svg.text(middle, CONNECTIONS.0 + 60.0, "middle", colour, 44, &thousands(report.broken));
    svg.text(middle, CONNECTIONS.0 + 84.0, "middle", colour, 15, "broken");
    Some(svg.finish())
}

fn changes(svg: &mut Svg, report: &Report, x: impl Fn(f64) -> f64) {
    let (top, height) = CHANGES;
    let step = height / ROWS.len() as f64;
    for (index, name) in ROWS.iter().enumerate() {
        let y = top + step * (index as f64 + 0.5);
        svg.line((LEFT, y), (RIGHT, y), GRID);
        svg.text(RIGHT + 8.0, y + 4.0, "start", GREY, 12, name);
    }
    for event in &report.events {
        let here = x(event.at_s);
        for what in event.what.split(" + ") {
            let Some(kind) = Action::kind_of(what) else { continue };
            let y = top + step * (row(kind) as f64 + 0.5);
            let colour = if event.broken > 0 { BAD } else { DARK };
            svg.put(&format!("<circle cx=\"{here:.1}\" cy=\"{y:.1}\" r=\"3.5\" fill=\"{colour}\"/>"));
            // A run of minutes has no room for words.
            if report.duration_s <= 90.0 {
                svg.put(&format!(
                    "<text x=\"{:.1}\" y=\"{:.1}\" font-size=\"9\" fill=\"{INK}\">{kind}</text>",
                    here + 5.0,
                    y - 3.0
                ));
            }
        }
        if event.broken > 0 {
            svg.dashed((here, top), (here, STALLS.0 + STALLS.1), BAD);
        }
    }
}

fn connections(svg: &mut Svg, report: &Report, x: impl Fn(f64) -> f64) {
    let Some(chaos) = &report.chaos else { return };
    let (top, height) = CONNECTIONS;
    let base = top + height;
    let most =
        chaos.samples.iter().map(|sample| sample.live.max(sample.broken)).max().unwrap_or(1).max(1) as f64;
    let y = |count: u64| base - count as f64 / most * (height - 14.0);
    svg.text(LEFT, top - 6.0, "start", GREY, 12, "connections: live, and broken so far");
    for count in [0, most as u64] {
        svg.line((LEFT, y(count)), (RIGHT, y(count)), GRID);
        svg.text(LEFT - 8.0, y(count) + 4.0, "end", AXIS, 11, &thousands(count));
    }
    let line = |of: fn(&super::changes::Sample) -> u64| -> Vec<(f64, f64)> {
        chaos.samples.iter().map(|sample| (x(sample.at_s), y(of(sample)))).collect()
    };
    svg.path(&line(|sample| sample.live), DARK);
    let colour = if report.broken == 0 { GOOD } else { BAD };
    svg.path(&line(|sample| sample.broken), colour);
}

fn stalls(svg: &mut Svg, report: &Report, x: impl Fn(f64) -> f64) {
    /// A longer gap is drawn as long as this: the steps of TCP's retransmission are what there is to see.
    const TALLEST_MS: f64 = 4000.0;
    let Some(chaos) = &report.chaos else { return };
    let (top, height) = STALLS;
    let base = top + height;
    let longest = chaos.stalls.iter().map(|second| second.longest_ms).fold(0.0, f64::max);
    let tallest = [500.0, 1000.0, 2000.0].into_iter().find(|limit| longest <= *limit).unwrap_or(TALLEST_MS);
    let most = chaos.stalls.iter().map(|second| second.stalls).max().unwrap_or(1).max(1) as f64;
    let y = |ms: f64| base - ms.min(tallest) / tallest * (height - 14.0);
    for step in 0..=4 {
        let ms = tallest * f64::from(step) / 4.0;
        svg.line((LEFT, y(ms)), (RIGHT, y(ms)), GRID);
        svg.text(LEFT - 8.0, y(ms) + 4.0, "end", AXIS, 11, &format!("{ms:.0}"));
    }
    svg.rect(LEFT, top - 16.0, 11.0, 11.0, PALE);
    let words = format!(
        "longest stall of any connection in each second, in ms{}",
        if longest > tallest {
            format!(" (cut at {tallest:.0}; the longest was {longest:.0})")
        } else {
            String::new()
        }
    );
    svg.text(LEFT + 16.0, top - 6.0, "start", GREY, 12, &words);
    svg.rect(LEFT + 620.0, top - 16.0, 11.0, 11.0, DARK);
    let words =
        format!("stalls of 200 ms and more that ended in it (full height: {})", thousands(most as u64));
    svg.text(LEFT + 636.0, top - 6.0, "start", GREY, 12, &words);
    let width = (x(1.0) - x(0.0)).max(0.8);
    for second in &chaos.stalls {
        let left = x(second.at_s);
        if left + width > RIGHT + 1.0 || left < LEFT - 1.0 {
            continue;
        }
        let up = y(second.longest_ms);
        svg.rect(left, up, width * 0.9, base - up, PALE);
        let up = base - second.stalls as f64 / most * (height - 14.0);
        if second.stalls > 0 {
            svg.rect(left + width * 0.25, up, width * 0.4, base - up, DARK);
        }
    }
    svg.line((LEFT, base), (RIGHT, base), AXIS);
}

#[cfg(test)]
mod tests {
    use super::super::changes::{ChaosReport, Sample, StallSecond};
    use super::super::report::EventReport;
    use super::*;

    #[test]
    fn the_picture_of_chaos_says_what_the_report_says() {
        let event = |at_s, what: &str, broken| EventReport {
            at_s,
            what: what.to_owned(),
            broken,
            ..EventReport::default()
        };
        let chaos = ChaosReport {
            seed: 42,
            steps: 2,
            least_deviating_share: Some(0.51),
            samples: (0..20)
                .map(|at| Sample { at_s: f64::from(at), live: 900, broken: 3, unprotected: 0 })
                .collect(),
            stalls: vec![StallSecond { at_s: 3.0, longest_ms: 1700.0, stalls: 12 }],
            ..ChaosReport::default()
        };
        let report = Report {
            chaos: Some(chaos),
            opened: 12_345,
            broken: 3,
            duration_s: 20.0,
            events: vec![
                event(-2.0, "opening", 0),
                event(3.0, "kill 2 + reload all", 3),
                event(9.0, "add backend 4", 0),
            ],
            ..Report::default()
        };
        let svg = draw(&report).unwrap();
        for shown in [
            "--chaos 42",
            "12,345 connections",
            "51 %",
            ">3<",
            ">kill<",
            ">reload<",
            ">add backend<",
            "2000",
            ">broken<",
        ] {
            assert!(svg.contains(shown), "{shown}");
        }
        assert!(!svg.contains(">opening<"));
        assert!(draw(&Report::default()).is_none(), "a run without chaos has no such picture");
    }
}
