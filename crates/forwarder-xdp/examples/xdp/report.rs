//! What came out, as a table or as JSON.

use crate::{Case, Measured, Result};

/// All rounds.
pub(crate) struct Report {
    cases: Vec<Case>,
    rounds: Vec<Vec<f64>>,
    /// The same of whole calls.
    calls: Vec<Vec<f64>>,
}

/// Median, and the quartiles around it.
#[derive(Clone, Copy, Debug)]
struct Spread {
    median: f64,
    low: f64,
    high: f64,
}

impl Spread {
    fn of(values: impl Iterator<Item = f64>) -> Self {
        let mut values: Vec<f64> = values.collect();
        values.sort_by(f64::total_cmp);
        let at = |share: usize| values.get(values.len() * share / 4).copied().unwrap_or(f64::NAN);
        Self { median: at(2), low: at(1), high: at(3) }
    }

    fn show(self, digits: usize) -> String {
        format!("{:.digits$} ({:.digits$} to {:.digits$})", self.median, self.low, self.high)
    }

    fn json(self) -> serde_json::Value {
        serde_json::json!({ "median": self.median, "lower_quartile": self.low, "upper_quartile": self.high })
    }
}

impl Report {
    pub(crate) fn new(cases: Vec<Case>) -> Self {
        Self { cases, rounds: Vec::new(), calls: Vec::new() }
    }

    pub(crate) fn add(&mut self, measured: &[Measured]) {
        self.rounds.push(measured.iter().map(|measured| measured.packet).collect());
        self.calls.push(measured.iter().map(|measured| measured.call).collect());
    }

    fn place(&self, name: &str, flows: u32, live: bool) -> usize {
        let found =
            self.cases.iter().position(|case| case.name == name && case.flows == flows && case.live == live);
        found.expect("the reference is among the cases")
    }

    fn gross(&self, place: usize) -> Spread {
        Spread::of(self.rounds.iter().map(|round| round[place]))
    }

    /// What the harness alone costs, with a program that does nothing.
    fn harness(&self, case: &Case) -> usize {
        self.place(if case.handed_off() { "harness alone, handed off" } else { "harness alone" }, 0, false)
    }

    fn net(&self, place: usize) -> Spread {
        let harness = self.harness(&self.cases[place]);
        Spread::of(self.rounds.iter().map(|round| round[place] - round[harness]))
    }

    /// By how much more time one takes than the other (with live frames, how many packets it passes), and the same without the harness.
    fn ratios(&self, place: usize) -> Option<(Spread, Option<Spread>)> {
        let case = &self.cases[place];
        let (name, flows, _) = case.reference?;
        let reference = self.place(name, flows, case.live);
        if case.live {
            return Some((Spread::of(self.rounds.iter().map(|round| round[reference] / round[place])), None));
        }
        let (own, its) = (self.harness(case), self.harness(&self.cases[reference]));
        let gross = Spread::of(self.rounds.iter().map(|round| round[place] / round[reference]));
        let net = Spread::of(
            self.rounds.iter().map(|round| (round[place] - round[own]) / (round[reference] - round[its])),
        );
        Some((gross, Some(net)))
    }

    /// With live frames: as [`Self::ratios`], where each frame has its share of the call that sent it; and as many times the frames of the
    /// minimal program with as many flows.
    fn live_ratios(&self, place: usize) -> (String, String) {
        let case = &self.cases[place];
        let ratio = |rounds: &[Vec<f64>], reference: usize| {
            Spread::of(rounds.iter().map(|round| round[reference] / round[place])).show(2)
        };
        let whole = case
            .reference
            .map_or(String::new(), |(name, flows, _)| ratio(&self.calls, self.place(name, flows, true)));
        let minimal = self.cases.iter().position(|other| {
            other.live && other.flows == case.flows && other.name == "minimal" && case.name != "minimal"
        });
        (whole, minimal.map_or(String::new(), |minimal| ratio(&self.rounds, minimal)))
    }

    pub(crate) fn print(&self) {
        println!(
            "{} rounds, each case once a round; medians, and lower to upper quartile.\n\
             Test runs: ns a packet, gross (with the kernel's loop and the harness) and net (less \"harness alone\" of the same round).\n\
             Ratios are those of each round. A target is for the gross ratio.\n",
            self.rounds.len()
        );
        println!("| test run | flows | ns gross | ns net | beside | ratio gross | ratio net | target |");
        println!("|---|---|---|---|---|---|---|---|");
        for (place, case) in self.cases.iter().enumerate().filter(|(_, case)| !case.live) {
            let (beside, gross, net, target) = match (case.reference, self.ratios(place)) {
                (Some((name, flows, target)), Some((gross, net))) => (
                    format!("{name}, {}", count(flows)),
                    gross.show(2),
                    net.map_or(String::new(), |net| net.show(2)),
                    verdict(target, |target| gross.median <= target, "at most"),
                ),
                _ => Default::default(),
            };
            println!(
                "| {} | {} | {} | {} | {beside} | {gross} | {net} | {target} |",
                case.name,
                count(case.flows),
                self.gross(place).show(0),
                self.net(place).show(0),
            );
        }
        println!(
            "\n| live frames | flows | M packets/s | beside | ratio | ratio with the calls | ratio to minimal | target |"
        );
        println!("|---|---|---|---|---|---|---|---|");
        for (place, case) in self.cases.iter().enumerate().filter(|(_, case)| case.live) {
            let rate = Spread::of(self.rounds.iter().map(|round| 1e3 / round[place]));
            let (beside, ratio, target) = match (case.reference, self.ratios(place)) {
                (Some((name, flows, target)), Some((ratio, _))) => (
                    format!("{name}, {}", count(flows)),
                    ratio.show(2),
                    verdict(target, |target| ratio.median >= target, "at least"),
                ),
                _ => Default::default(),
            };
            let (whole, minimal) = self.live_ratios(place);
            println!(
                "| {} | {} | {} | {beside} | {ratio} | {whole} | {minimal} | {target} |",
                case.name,
                count(case.flows),
                rate.show(2)
            );
        }
    }

    pub(crate) fn print_json(&self) -> Result<()> {
        let cases: Vec<_> = self
            .cases
            .iter()
            .enumerate()
            .map(|(place, case)| {
                let mut value = serde_json::json!({
                    "name": case.name,
                    "subject": format!("{:?}", case.subject),
                    "flows": 1_u32 << case.flows,
                    "live_frames": case.live,
                    "gross_ns": self.gross(place).json(),
                });
                if !case.live {
                    value["net_ns"] = self.net(place).json();
                }
                if let (Some((name, flows, target)), Some((gross, net))) =
                    (case.reference, self.ratios(place))
                {
                    value["reference"] = serde_json::json!({ "name": name, "flows": 1_u32 << flows });
                    value["ratio"] = gross.json();
                    value["net_ratio"] = net.map_or(serde_json::Value::Null, Spread::json);
                    value["target"] = serde_json::json!(target);
                }
                value
            })
            .collect();
        let rounds: Vec<_> = self.rounds.iter().map(|round| serde_json::json!(round)).collect();
        let all = serde_json::json!({ "rounds": rounds.len(), "cases": cases, "gross_ns_by_round": rounds });
        println!("{}", serde_json::to_string_pretty(&all)?);
        Ok(())
    }
}

fn verdict(target: Option<f64>, met: impl Fn(f64) -> bool, word: &str) -> String {
    target.map_or(String::new(), |target| {
        format!("{word} {target}: {}", if met(target) { "met" } else { "missed" })
    })
}

/// A number of flows in words.
fn count(power: u32) -> String {
    match power {
        0 => "1".to_owned(),
        16 => "64 K".to_owned(),
        20 => "1 M".to_owned(),
        24 => "16 M".to_owned(),
        other => format!("2^{other}"),
    }
}
