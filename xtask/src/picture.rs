//! `cargo xtask picture`: draws the README's picture from two reports of `phalanx lab --json`.
//!
//! A lane for each run, on one axis of time: what was done, how long connections stood still, how many broke.

use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use phalanx::lab::svg::{AXIS, BAD, DARK, GOOD, GREY, GRID, INK, PALE, Svg, thousands};
use serde_json::Value;

use crate::{cargo, execute};

const PICTURE: &str = "docs/images/lab.svg";

const WIDTH: f64 = 960.0;
const LEFT: f64 = 64.0;
/// Where the axis of time ends and the totals begin.
const RIGHT: f64 = 770.0;
const LANE: f64 = 176.0;
const LANE_GAP: f64 = 40.0;
const TOP: f64 = 96.0;

/// What stands in one window of time, from one event to the next.
struct Window {
    from_s: f64,
    to_s: f64,
    what: String,
    stall_p99_ms: f64,
    stall_max_ms: f64,
    broken: u64,
}

/// A run as the picture shows it.
struct Run {
    title: &'static str,
    members: u64,
    backends: u64,
    opened: u64,
    broken: u64,
    deviating: f64,
    windows: Vec<Window>,
}

pub(crate) fn run(root: &Path, files: Option<(&Path, &Path)>) -> Result<()> {
    let (run, twin) = match files {
        Some((run, twin)) => (read(run)?, read(twin)?),
        None => (lab(root, &[])?, lab(root, &["--no-replication"])?),
    };
    let runs = [parse(&run, "replication on")?, parse(&twin, "the twin: replication off")?];
    let svg = draw(&runs);
    let path = root.join(PICTURE);
    std::fs::create_dir_all(path.parent().unwrap_or(root))?;
    std::fs::write(&path, svg).with_context(|| format!("cannot write {}", path.display()))?;
    println!("{PICTURE}: {} broken, {} in the twin", runs[0].broken, runs[1].broken);
    Ok(())
}

fn read(path: &Path) -> Result<Value> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_str(&text)
        .with_context(|| format!("{} is not a report of phalanx lab --json", path.display()))
}

/// Runs the lab; broken connections are a result and not a failure.
fn lab(root: &Path, arguments: &[&str]) -> Result<Value> {
    execute(&mut cargo(root, &["build", "--release", "--bin", "phalanx"]))?;
    let words = ["run", "--quiet", "--release", "--bin", "phalanx", "--", "lab", "--quiet", "--json"];
    println!("$ cargo {} {}", words.join(" "), arguments.join(" "));
    let output = cargo(root, &words).args(arguments).output().context("cannot start the lab")?;
    serde_json::from_slice(&output.stdout)
        .with_context(|| format!("the lab made no report: {}", String::from_utf8_lossy(&output.stderr)))
}

fn parse(report: &Value, title: &'static str) -> Result<Run> {
    let number = |name: &str| report[name].as_u64().with_context(|| format!("the report has no {name}"));
    let events: Vec<_> = report["events"]
        .as_array()
        .context("the report has no events")?
        .iter()
        .filter(|event| event["what"] != "ending")
        .collect();
    ensure!(!events.is_empty(), "the report has no events");
    let start = |event: &Value| event["at_s"].as_f64().unwrap_or_default();
    let end = report["duration_s"].as_f64().context("the report has no duration_s")?;
    let windows = events.iter().enumerate().map(|(index, event)| Window {
        from_s: start(event),
        to_s: events.get(index + 1).map_or(end, |next| start(next)),
        what: event["what"].as_str().unwrap_or_default().replace("kill ", "kill member "),
        stall_p99_ms: event["stall_p99_ms"].as_f64().unwrap_or_default(),
        stall_max_ms: event["stall_max_ms"].as_f64().unwrap_or_default(),
        broken: event["broken"].as_u64().unwrap_or_default(),
    });
    Ok(Run {
        title,
        members: number("members")?,
        backends: number("backends")?,
        opened: number("opened")?,
        broken: number("broken")?,
        deviating: report["deviating_share"].as_f64().unwrap_or_default(),
        windows: windows.collect(),
    })
}

fn draw(runs: &[Run; 2]) -> String {
    let windows = || runs.iter().flat_map(|run| &run.windows);
    let from = windows().map(|window| window.from_s).fold(0.0, f64::min);
    let to = windows().map(|window| window.to_s).fold(1.0, f64::max);
    // Whole steps of 100 ms.
    let tallest = windows().map(|window| (window.stall_max_ms / 100.0).ceil() * 100.0).fold(100.0, f64::max);
    let x = |second: f64| LEFT + (second - from) / (to - from) * (RIGHT - LEFT);
    let height = TOP + 2.0 * LANE + LANE_GAP + 44.0;

    let mut svg = Svg::new(WIDTH, height);
    svg.text(LEFT, 28.0, "start", INK, 17, "phalanx lab: the backends change, then a member is killed");
    let site = format!(
        "{} members, {} backends at the start, {} TCP connections, every byte checked at both ends",
        runs[0].members,
        runs[0].backends,
        thousands(runs[0].opened)
    );
    svg.text(LEFT, 50.0, "start", GREY, 13, &site);
    svg.text(LEFT, 74.0, "start", GREY, 12, "longest stall of any connection, in ms:");
    for (index, (colour, what)) in [(PALE, "the longest"), (DARK, "99th percentile")].into_iter().enumerate()
    {
        let left = LEFT + 250.0 + 110.0 * index as f64;
        svg.rect(left, 64.0, 12.0, 12.0, colour);
        svg.text(left + 18.0, 74.0, "start", GREY, 12, what);
    }

    for (lane, run) in runs.iter().enumerate() {
        let top = TOP + lane as f64 * (LANE + LANE_GAP);
        let base = top + LANE;
        let y = |ms: f64| base - ms / tallest * (LANE - 44.0);
        for step in 0..=(tallest / 100.0) as u32 {
            let ms = f64::from(step) * 100.0;
            svg.line((LEFT, y(ms)), (RIGHT, y(ms)), GRID);
            svg.text(LEFT - 8.0, y(ms) + 4.0, "end", AXIS, 11, &format!("{ms}"));
        }
        for (index, window) in run.windows.iter().enumerate() {
            let (left, right) = (x(window.from_s), x(window.to_s));
            // A narrow bar: a stall is not as long as its window.
            for (ms, colour) in [(window.stall_max_ms, PALE), (window.stall_p99_ms, DARK)] {
                svg.rect(left + 6.0, y(ms), BAR, base - y(ms), colour);
            }
            let longest = format!("{:.0} ms", window.stall_max_ms);
            let beside = (y(window.stall_max_ms) + 4.0).min(base - 5.0);
            svg.text(left + 10.0 + BAR, beside, "start", "#333333", 11, &longest);
            let opening = index == 0;
            if !opening && window.what != "start" {
                svg.dashed((left, top + 14.0), (left, base), INK);
                svg.text(left + 5.0, top + 24.0, "start", INK, 12, &window.what);
            } else if opening {
                svg.text(left + 3.0, top + 24.0, "start", AXIS, 12, "opening");
            }
            if window.broken > 0 {
                let middle = f64::midpoint(left + 10.0 + BAR, right);
                let words = format!("{} broken", thousands(window.broken));
                svg.text(middle, y(0.0) - 24.0, "middle", BAD, 14, &words);
            }
        }
        svg.line((LEFT, base), (RIGHT, base), AXIS);
        let colour = if run.broken == 0 { GOOD } else { BAD };
        let middle = f64::midpoint(RIGHT, WIDTH);
        svg.text(middle, top + 82.0, "middle", colour, 52, &thousands(run.broken));
        svg.text(middle, top + 106.0, "middle", colour, 15, "broken");
        svg.text(middle, top + 132.0, "middle", GREY, 12, run.title);
        let deviating = format!("{:.0} % off the consistent table", run.deviating * 100.0);
        svg.text(middle, top + 150.0, "middle", GREY, 12, &deviating);
    }
    let base = TOP + 2.0 * LANE + LANE_GAP;
    // Negative zero would be shown as such.
    let mut second = (from / 5.0).ceil() * 5.0 + 0.0;
    while second <= to {
        svg.text(x(second), base + 18.0, "middle", AXIS, 11, &format!("{second} s"));
        second += 5.0;
    }
    let note = "seconds since 2,000 long-lived connections were open; short ones come and go all the time";
    svg.text(LEFT, base + 36.0, "start", GREY, 12, note);
    svg.finish()
}

/// Width of a bar.
const BAR: f64 = 14.0;

#[cfg(test)]
mod tests {
    use super::*;

    fn report(broken: u64) -> Value {
        serde_json::json!({
            "members": 3, "backends": 3, "opened": 2951, "broken": broken, "duration_s": 19.0, "deviating_share": 0.48,
            "events": [
                { "at_s": -2.0, "what": "opening", "stall_p99_ms": 1.0, "stall_max_ms": 2.0, "broken": 0 },
                { "at_s": 9.0, "what": "kill <2>", "stall_p99_ms": 310.0, "stall_max_ms": 420.0, "broken": broken },
                { "at_s": 19.0, "what": "ending", "broken": 0 },
            ],
        })
    }

    #[test]
    fn the_picture_says_what_the_reports_say() {
        let runs = [parse(&report(0), "a").unwrap(), parse(&report(1341), "b").unwrap()];
        let svg = draw(&runs);
        for shown in [
            "2,951 TCP connections",
            ">0<",
            ">1,341<",
            "1,341 broken",
            "kill member &lt;2&gt;",
            "48 %",
            ">500<",
        ] {
            assert!(svg.contains(shown), "{shown}");
        }
        assert!(!svg.contains("ending"));
        assert!(parse(&serde_json::json!({}), "c").is_err());
    }
}
