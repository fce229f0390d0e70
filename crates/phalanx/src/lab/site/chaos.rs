//! Chaos on a running site: when the next step may come, and what each one did.
//!
//! A step waits until whatever lasts of the one before is over and the members say, each by its own admin API, that the cluster is
//! protected: everybody sees the same members, nobody is suspected, no flow lacks its backup, no transfer is under way. Then every flow
//! has two holders again, and one may go.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::Result;

use super::super::changes::{BrokenReport, ChangeNote, ChaosReport, Sample};
use super::super::chaos::{ChaosSite, Schedule, Step, is_backend_change};
use super::super::metrics;
use super::super::scenario::Action;
use super::super::weather::Weather;
use super::Lab;

/// A view can be this old until the status shows it, and a death as old until it is suspected (0.8 s on a LAN): what members say sooner
/// after a change may be of the time before it.
const SETTLE: Duration = Duration::from_millis(1500);
/// The members are asked this often while a step waits for them, and must say so twice.
const ASK_PERIOD: Duration = Duration::from_millis(250);
/// A cluster that is not protected after this long is a fault of its own.
const PROTECTED_WITHIN: Duration = Duration::from_secs(60);
/// No step begins when there is less left than this: its consequences are to be seen.
const LAST_STEP: Duration = Duration::from_secs(8);
/// A router's BFD session that went down sends once a second until it is up (RFC 5880 §6.8.3), so it takes that long to come up again.
const SESSION_UP: Duration = Duration::from_secs(1);
/// A flow that is half-open has one holder unless the backends change: nothing covers it if they do while its owner goes. So of two
/// changes made together that of the backends comes first, by this much, which is far more than a handshake takes.
const BACKENDS_FIRST: Duration = Duration::from_millis(500);
/// How often the live connections and the flows without a backup are sampled.
const SAMPLE_PERIOD: Duration = Duration::from_millis(250);

/// What chaos has done and seen so far.
#[derive(Debug, Default)]
pub(super) struct Book {
    notes: Vec<ChangeNote>,
    samples: Vec<Sample>,
    sampled: Option<Instant>,
}

/// Weather and when it ends.
#[derive(Debug)]
pub(super) struct Lasting {
    pub(super) until: Instant,
    pub(super) weather: Weather,
    /// The member it is about; `None`: all.
    pub(super) member: Option<u32>,
}

impl Lab {
    /// The site that a schedule is made for.
    pub(super) const fn chaos_site(options: &super::LabOptions) -> ChaosSite {
        ChaosSite { topology: options.topology, members: options.members, backends: options.backends }
    }

    /// Goes through the schedule of `seed` until the run's time is over.
    pub(super) fn chaos(&mut self, seed: u64) -> Result<()> {
        let duration = self.options.duration();
        for step in Schedule::new(seed, Self::chaos_site(&self.options)) {
            if !self.wait_until_protected()? {
                break;
            }
            let calm = Instant::now();
            while calm.elapsed() < step.calm && !self.is_interrupted() {
                self.step_and_sample()?;
            }
            if self.start.elapsed() + LAST_STEP > duration || self.is_interrupted() {
                break;
            }
            self.make(&step)?;
        }
        while (self.start.elapsed() < duration || self.something_lasts()) && !self.is_interrupted() {
            self.step_and_sample()?;
        }
        self.wait_until_protected().map(drop)
    }

    fn make(&mut self, step: &Step) -> Result<()> {
        let what = step.what();
        let share = self.open_window(&what);
        if self.deviating.is_none() && step.actions.iter().any(Action::changes_members) {
            self.deviating = share;
        }
        self.say(&what);
        self.chaos.notes.push(ChangeNote {
            window: self.windows.len() - 1,
            kind: step.kind(),
            handed_off_before: self.total("phalanx_handoffs_total{direction=\"out\"}"),
            recovered_before: self.total("phalanx_recovered_total"),
            ..ChangeNote::default()
        });
        self.last_event = what;
        for action in &step.actions {
            if let Err(error) = self.carry_out(*action) {
                self.problems.push(format!("cannot {action}: {error:#}"));
            }
            let done = Instant::now();
            while is_backend_change(*action) && done.elapsed() < BACKENDS_FIRST && !self.is_interrupted() {
                self.step_and_sample()?;
            }
        }
        Ok(())
    }

    fn total(&self, name: &str) -> u64 {
        self.scraper.totals().get(name).copied().unwrap_or_default() as u64
    }

    /// What was done last, in words.
    fn last_change(&self) -> &str {
        self.windows.last().map_or("the start", |window| &window.what)
    }

    fn something_lasts(&self) -> bool {
        !self.resumes.is_empty() || !self.lasting.is_empty() || !self.returning.is_empty()
    }

    /// Waits until every member says that one may go; `false` if the run's time is over before.
    pub(super) fn wait_until_protected(&mut self) -> Result<bool> {
        let begun = Instant::now();
        let mut lasted = begun;
        let mut asked: Option<Instant> = None;
        let mut protected_since: Option<Instant> = None;
        let mut complained = false;
        // Members all of whose flows have been protected at some moment since the change: connections come all the time, and each is
        // without a backup for some milliseconds; those that the change concerns had theirs then.
        let mut all_protected = BTreeSet::new();
        loop {
            self.step_and_sample()?;
            if self.is_interrupted() {
                return Ok(false);
            }
            if self.something_lasts() {
                lasted = Instant::now();
            }
            if lasted.elapsed() < SETTLE {
                all_protected.clear();
            }
            if asked.is_none_or(|asked| asked.elapsed() >= ASK_PERIOD) {
                asked = Some(Instant::now());
                match self.why_not_protected(&mut all_protected) {
                    None => {
                        let since = *protected_since.get_or_insert_with(Instant::now);
                        if lasted.elapsed() >= SETTLE && since.elapsed() >= ASK_PERIOD {
                            if let Some(note) = self.chaos.notes.last_mut() {
                                note.protected_after_s = Some(since.duration_since(begun).as_secs_f64());
                            }
                            return Ok(true);
                        }
                    }
                    Some(reason) => {
                        protected_since = None;
                        self.last_event = format!("{}; waiting: {reason}", self.last_change());
                        if lasted.elapsed() > PROTECTED_WITHIN && !complained {
                            complained = true;
                            self.problems.push(format!(
                                "the cluster was not protected {} s after {}: {reason}",
                                PROTECTED_WITHIN.as_secs(),
                                self.last_change()
                            ));
                        }
                    }
                }
            }
            // Once the time is over there is no next step to wait for; but the last one's consequences are waited for.
            if complained && self.start.elapsed() > self.options.duration() {
                return Ok(false);
            }
        }
    }

    /// Why a member may not go now, as the members say; `None` if one may.
    fn why_not_protected(&self, all_protected: &mut BTreeSet<u32>) -> Option<String> {
        let mut unprotected = None;
        let running: BTreeSet<u64> = self
            .members
            .iter()
            .filter(|member| member.has_process())
            .map(|member| member.id.into())
            .collect();
        let mut digest: Option<String> = None;
        for (index, member) in self.members.iter().enumerate().filter(|(_, member)| member.has_process()) {
            let id = member.id;
            if !self.scraper.is_ready(index) {
                return Some(format!("member {id} is not ready"));
            }
            let ask = |path| metrics::ask::<serde_json::Value>(&self.world.members[index].netns, path);
            let (Some(health), Some(view)) = (ask("/healthz"), ask("/v1/members")) else {
                return Some(format!("member {id} does not answer"));
            };
            let seen: BTreeSet<u64> = view["members"]
                .as_array()
                .into_iter()
                .flatten()
                .filter(|other| other["liveness"] == "alive" && other["state"] == "active")
                .filter_map(|other| other["id"].as_u64())
                .collect();
            if seen != running {
                return Some(format!("member {id} sees {seen:?} active and not {running:?}"));
            }
            let its = view["view_digest"].as_str().unwrap_or_default().to_owned();
            if digest.get_or_insert_with(|| its.clone()) != &its {
                return Some(format!("member {id} has another view"));
            }
            // Without replication nothing is ever protected.
            if health["safe_to_lose"] == true || !self.options.replication {
                all_protected.insert(id);
            } else if !all_protected.contains(&id) || !is_only_unprotected(&health["reasons"]) {
                unprotected.get_or_insert_with(|| format!("member {id}: {}", health["reasons"]));
            }
        }
        unprotected
    }

    fn step_and_sample(&mut self) -> Result<()> {
        self.step()?;
        let now = Instant::now();
        let Some(passed) = self.chaos.sampled.map(|sampled| now.duration_since(sampled)) else {
            self.chaos.sampled = Some(now);
            return Ok(());
        };
        if passed < SAMPLE_PERIOD {
            return Ok(());
        }
        self.chaos.sampled = Some(now);
        let unprotected: f64 = (0..self.members.len())
            .filter(|index| self.scraper.is_ready(*index))
            .filter_map(|index| self.scraper.value(index, "phalanx_unprotected_flows"))
            .sum();
        if unprotected > 0.0
            && let Some(note) = self.chaos.notes.last_mut()
        {
            note.unprotected_s += passed.as_secs_f64();
        }
        let counts = self.counts();
        self.chaos.samples.push(Sample {
            at_s: self.start.elapsed().as_secs_f64(),
            live: counts.live,
            broken: counts.broken,
            unprotected: unprotected as u64,
        });
        Ok(())
    }

    /// Begins weather on the links of one member, or of all.
    pub(super) fn begin_weather(
        &mut self,
        weather: Weather,
        member: Option<u32>,
        length: Duration,
    ) -> Result<()> {
        let mut netlink = self.world.router.netlink()?;
        for port in self.ports(member) {
            weather.begin(&mut netlink, port)?;
        }
        self.lasting.push(Lasting { until: Instant::now() + length, weather, member });
        Ok(())
    }

    /// Ends the weather whose time has come.
    pub(super) fn end_weather(&mut self, now: Instant) -> Result<()> {
        for at in (0..self.lasting.len()).rev() {
            if self.lasting[at].until <= now {
                let over = self.lasting.swap_remove(at);
                if over.weather == Weather::Cut {
                    self.returning.extend(over.member.map(|id| (now + SESSION_UP, id)));
                }
                let mut netlink = self.world.router.netlink()?;
                for port in self.ports(over.member) {
                    over.weather.end(&mut netlink, port)?;
                }
            }
        }
        Ok(())
    }

    fn ports(&self, member: Option<u32>) -> Vec<u32> {
        let hosts = self.world.members.iter();
        hosts.filter(|host| member.is_none_or(|id| host.number == id)).map(|host| host.port).collect()
    }

    /// Whether nothing reaches a member.
    pub(super) fn is_cut(lasting: &[Lasting], id: u32) -> bool {
        lasting.iter().any(|it| it.weather == Weather::Cut && it.member == Some(id))
    }

    /// Counters are wanted more often: how long flows are without a backup is a matter of fractions of a second.
    pub(super) fn watch_closely(&self) {
        self.scraper.set_period(SAMPLE_PERIOD);
    }

    /// The report on chaos, from the run's ledger.
    pub(super) fn chaos_report(&mut self, seed: u64, ledger: &super::super::traffic::Ledger) -> ChaosReport {
        let book = std::mem::take(&mut self.chaos);
        let opened_before_s = self.start.saturating_duration_since(ledger.opened_at()).as_secs_f64();
        let windows = ledger.windows();
        let totals =
            [self.total("phalanx_handoffs_total{direction=\"out\"}"), self.total("phalanx_recovered_total")];
        let broken = ledger.broken_by_window().into_iter().map(|(window, broken)| BrokenReport {
            id: broken.id,
            kind: broken.live.map(|live| live.kind.name().to_owned()),
            source: broken.live.map(|live| live.source),
            backend: broken.backend,
            cause: broken.cause,
            during: self.windows.get(window).map(|window| window.what.clone()).unwrap_or_default(),
        });
        ChaosReport::new(
            seed,
            book.notes,
            &self.windows,
            &windows,
            broken.collect(),
            (book.samples, ledger.seconds(), opened_before_s),
            totals,
        )
    }
}

/// Whether all that keeps a member from being safe to lose is that some flow's backup has not acknowledged it yet.
fn is_only_unprotected(reasons: &serde_json::Value) -> bool {
    let words = "flows are not acknowledged by their backup yet";
    reasons.as_array().is_some_and(|reasons| {
        reasons.iter().all(|reason| reason.as_str().is_some_and(|reason| reason.ends_with(words)))
    })
}
