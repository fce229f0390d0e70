//! What happens to a site, and when.

use std::fmt;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt as _, seq::SliceRandom as _};

use crate::settings::{Settings, pick, stream};

/// One thing that happens. What makes no sense at its time (a crash of who is down) does nothing, so that a schedule may be shortened
/// anywhere.
#[derive(Clone, Debug, PartialEq)]
pub enum Change {
    /// A member's machine dies.
    Crash(usize),
    /// Only its daemon dies; the program in its kernel goes on forwarding.
    CrashDaemon(usize),
    /// A member that is down starts: again without its flow table, or for the first time.
    Start(usize),
    /// A daemon starts again over the tables its forwarder has kept.
    Adopt(usize),
    /// A member is told to leave.
    Leave(usize),
    /// A member gets another weight.
    Reweight(usize, u32),
    /// A member does not run for so long.
    Stall(usize, Duration),
    /// These members and the others do not hear each other.
    Partition(Vec<usize>),
    /// All hear each other again.
    Heal,
    /// Two members do not hear each other.
    Cut(usize, usize),
    /// Nothing one member sends reaches the other, but it hears it.
    CutOneWay(usize, usize),
    /// A share of all datagrams among members is lost for so long.
    Loss(f64, Duration),
    /// Streams of a member deliver late for so long.
    Slow(usize, Duration, Duration),
    /// A backend comes into the configuration.
    BackendAdd(usize),
    /// A backend gets no new flows.
    BackendDrain(usize),
    /// A backend dies; health checks find out.
    BackendFail(usize),
    /// A backend that died or drained is back.
    BackendBack(usize),
    /// The router spreads all flows anew.
    Rehash,
    /// So many connections are opened at once.
    Burst(usize),
}

impl Change {
    /// The kind of change, for tables.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Crash(_) => "crash",
            Self::CrashDaemon(_) => "daemon crash",
            Self::Start(_) => "join",
            Self::Adopt(_) => "restart with state",
            Self::Leave(_) => "leave",
            Self::Reweight(..) => "reweight",
            Self::Stall(..) => "stall",
            Self::Partition(_) => "partition",
            Self::Heal => "heal",
            Self::Cut(..) => "cut link",
            Self::CutOneWay(..) => "cut one way",
            Self::Loss(..) => "packet loss",
            Self::Slow(..) => "slow peer",
            Self::BackendAdd(_) => "backend added",
            Self::BackendDrain(_) => "backend drained",
            Self::BackendFail(_) => "backend failed",
            Self::BackendBack(_) => "backend back",
            Self::Rehash => "router rehash",
            Self::Burst(_) => "burst",
        }
    }
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = |node: &usize| format!("m{}", node + 1);
        match self {
            Self::Crash(node) => write!(f, "{} crashes", name(node)),
            Self::CrashDaemon(node) => {
                write!(f, "the daemon of {} crashes, its forwarder goes on", name(node))
            }
            Self::Start(node) => write!(f, "{} starts", name(node)),
            Self::Adopt(node) => write!(f, "the daemon of {} starts again over its tables", name(node)),
            Self::Leave(node) => write!(f, "{} is told to leave", name(node)),
            Self::Reweight(node, weight) => write!(f, "{} gets weight {weight}", name(node)),
            Self::Stall(node, time) => write!(f, "{} stands still for {time:?}", name(node)),
            Self::Partition(nodes) => {
                let names: Vec<_> = nodes.iter().map(name).collect();
                write!(f, "{} are cut off from the others", names.join(", "))
            }
            Self::Heal => write!(f, "all hear each other again"),
            Self::Cut(a, b) => write!(f, "{} and {} do not hear each other", name(a), name(b)),
            Self::CutOneWay(a, b) => write!(f, "{} does not reach {}", name(a), name(b)),
            Self::Loss(share, time) => write!(f, "{:.0} % of datagrams are lost for {time:?}", share * 100.0),
            Self::Slow(node, late, time) => {
                write!(f, "streams of {} are {late:?} late for {time:?}", name(node))
            }
            Self::BackendAdd(backend) => write!(f, "b{backend} is added"),
            Self::BackendDrain(backend) => write!(f, "b{backend} drains"),
            Self::BackendFail(backend) => write!(f, "b{backend} fails"),
            Self::BackendBack(backend) => write!(f, "b{backend} is back"),
            Self::Rehash => write!(f, "the router spreads all flows anew"),
            Self::Burst(flows) => write!(f, "{flows} connections are opened"),
        }
    }
}

/// Changes by virtual time since the start.
pub type Schedule = Vec<(Duration, Change)>;

/// When the first connections are opened: a cold start takes two to four seconds.
pub const FLOWS_FROM: Duration = Duration::from_secs(5);

/// When backends change so that live flows get off the consistent choice.
const DEVIATE_AT: Duration = Duration::from_secs(8);

/// When what is under test begins.
const CHANGES_FROM: Duration = Duration::from_secs(11);

/// Half of the runs leave this much time between changes: as long as it takes until all is as it should be again.
pub const PACED: Duration = Duration::from_secs(9);

/// Makes a schedule.
pub fn generate(settings: &Settings) -> Schedule {
    let mut rng = stream(settings.seed, 2);
    let mut made = Maker::new(settings);
    made.deviate(&mut rng);
    let paced = rng.random_bool(0.5);
    let count = if paced { rng.random_range(2..=3) } else { rng.random_range(3..=7) };
    let mut at = CHANGES_FROM;
    for _ in 0..count {
        made.one(&mut rng, at);
        let pause = if paced {
            PACED + Duration::from_millis(rng.random_range(0..1500))
        } else {
            Duration::from_millis(*pick(&mut rng, &[5, 80, 400, 1_500, 3_000, 6_000]))
        };
        at += pause;
    }
    made.schedule.sort_by_key(|(at, _)| *at);
    made.schedule
}

/// How long one round of a run of days is.
pub const ROUND: Duration = Duration::from_secs(4 * 3_600);

/// When changes begin in a round, and the pauses between them.
pub(crate) const ROUND_FROM: Duration = Duration::from_secs(600);
const ROUND_PAUSES: [u64; 2] = [180, 1_200];

/// Makes the schedule of one round of a run of days, from its start; `up` says of each member whether it runs, `usable` the same of backends.
pub fn round(settings: &Settings, round: u32, up: &[bool], usable: &[bool]) -> Schedule {
    let mut rng = stream(settings.seed, 1_000 + u64::from(round));
    let mut made = Maker::new(settings);
    for (member, up) in made.members.iter_mut().zip(up) {
        *member = if *up { Belief::Up } else { Belief::Down };
    }
    made.backends = usable.to_vec();
    made.spare_backends.clear();
    // What was opened before is off the consistent choice from here on.
    for (backend, usable) in usable.iter().enumerate() {
        made.backends[backend] = !usable;
        let change = if *usable { Change::BackendDrain } else { Change::BackendBack };
        made.add(ROUND_FROM / 2, change(backend));
    }
    let mut at = ROUND_FROM;
    for _ in 0..rng.random_range(4..=7) {
        made.one(&mut rng, at);
        let [least, most] = ROUND_PAUSES;
        at += Duration::from_secs(rng.random_range(least..most));
    }
    made.schedule.sort_by_key(|(at, _)| *at);
    made.schedule
}

/// What the maker believes of the site as it goes.
struct Maker {
    schedule: Schedule,
    members: Vec<Belief>,
    backends: Vec<bool>,
    spare_backends: Vec<usize>,
    weights: u32,
}

#[derive(Clone, Copy, PartialEq)]
enum Belief {
    Never,
    Up,
    Down,
    Zombie,
}

impl Maker {
    fn new(settings: &Settings) -> Self {
        let mut members = vec![Belief::Up; settings.members];
        members.resize(settings.members + settings.spares, Belief::Never);
        let [now, later] = settings.backends;
        Self {
            schedule: Vec::new(),
            members,
            backends: vec![true; now],
            spare_backends: (now..now + later).collect(),
            weights: settings.weights,
        }
    }

    fn add(&mut self, at: Duration, change: Change) {
        self.schedule.push((at, change));
    }

    /// Drains about half of the backends and adds others: those flows stay where they are, off the consistent choice.
    fn deviate(&mut self, rng: &mut StdRng) {
        let mut all: Vec<usize> = (0..self.backends.len()).collect();
        all.shuffle(rng);
        let count = (self.backends.len()).div_ceil(2);
        for backend in all.into_iter().take(count) {
            self.backends[backend] = false;
            self.add(DEVIATE_AT, Change::BackendDrain(backend));
        }
        for backend in self.spare_backends.split_off(1) {
            self.backends.resize(self.backends.len().max(backend + 1), false);
            self.backends[backend] = true;
            self.add(DEVIATE_AT + Duration::from_millis(200), Change::BackendAdd(backend));
        }
    }

    fn having(&self, belief: Belief) -> Vec<usize> {
        (0..self.members.len()).filter(|node| self.members[*node] == belief).collect()
    }

    fn one(&mut self, rng: &mut StdRng, at: Duration) {
        let up = self.having(Belief::Up);
        let down: Vec<usize> = [self.having(Belief::Down), self.having(Belief::Never)].concat();
        let zombies = self.having(Belief::Zombie);
        let later =
            |rng: &mut StdRng, from: u64, to: u64| at + Duration::from_millis(rng.random_range(from..to));
        if !zombies.is_empty() && rng.random_bool(0.7) {
            let node = *pick(rng, &zombies);
            let change = if rng.random_bool(0.8) { Change::Adopt(node) } else { Change::Crash(node) };
            self.members[node] = if matches!(change, Change::Adopt(_)) { Belief::Up } else { Belief::Down };
            return self.add(at, change);
        }
        if up.len() < 2 {
            if let Some(node) = down.first() {
                self.members[*node] = Belief::Up;
                self.add(at, Change::Start(*node));
            }
            return;
        }
        let node = *pick(rng, &up);
        match rng.random_range(0..100) {
            0..=19 => {
                self.members[node] = Belief::Down;
                self.add(at, Change::Crash(node));
                if rng.random_bool(0.4) {
                    self.members[node] = Belief::Up;
                    let back = later(rng, 200, 8_000);
                    self.add(back, Change::Start(node));
                }
            }
            20..=37 if !down.is_empty() => {
                let node = *pick(rng, &down);
                self.members[node] = Belief::Up;
                self.add(at, Change::Start(node));
            }
            38..=49 => {
                self.members[node] = Belief::Down;
                self.add(at, Change::Leave(node));
            }
            50..=55 => {
                let weight = rng.random_range(0..=self.weights.max(3));
                self.add(at, Change::Reweight(node, weight));
            }
            56..=65 => {
                let time = Duration::from_millis(*pick(rng, &[300, 900, 1_800, 4_000, 9_000]));
                self.add(at, Change::Stall(node, time));
            }
            66..=71 => {
                let count = rng.random_range(1..up.len());
                let mut cut = up.clone();
                cut.shuffle(rng);
                cut.truncate(count);
                cut.sort_unstable();
                self.add(at, Change::Partition(cut));
                let back = later(rng, 300, 9_000);
                self.add(back, Change::Heal);
            }
            72..=75 => {
                let other = *pick(rng, &up);
                let one_way = rng.random_bool(0.3);
                self.add(at, if one_way { Change::CutOneWay(node, other) } else { Change::Cut(node, other) });
                let back = later(rng, 300, 9_000);
                self.add(back, Change::Heal);
            }
            76..=78 => {
                let share = *pick(rng, &[0.05, 0.2, 0.4]);
                self.add(at, Change::Loss(share, Duration::from_millis(rng.random_range(500..4_000))));
            }
            79..=81 => {
                let late = Duration::from_millis(*pick(rng, &[50, 500, 2_000]));
                self.add(at, Change::Slow(node, late, Duration::from_millis(rng.random_range(500..5_000))));
            }
            82..=90 => self.backend(rng, at),
            91..=93 => self.add(at, Change::Rehash),
            94..=96 => {
                self.members[node] = Belief::Zombie;
                self.add(at, Change::CrashDaemon(node));
            }
            _ => {
                let flows = rng.random_range(10..60);
                self.add(at, Change::Burst(flows));
            }
        }
    }

    fn backend(&mut self, rng: &mut StdRng, at: Duration) {
        let good: Vec<usize> = (0..self.backends.len()).filter(|b| self.backends[*b]).collect();
        let bad: Vec<usize> = (0..self.backends.len()).filter(|b| !self.backends[*b]).collect();
        if good.len() > 1 && rng.random_bool(0.5) {
            let backend = *pick(rng, &good);
            self.backends[backend] = false;
            let fails = rng.random_bool(0.4);
            self.add(at, if fails { Change::BackendFail(backend) } else { Change::BackendDrain(backend) });
        } else if let Some(backend) = self.spare_backends.pop() {
            self.backends.resize(self.backends.len().max(backend + 1), false);
            self.backends[backend] = true;
            self.add(at, Change::BackendAdd(backend));
        } else if !bad.is_empty() {
            let backend = *pick(rng, &bad);
            self.backends[backend] = true;
            self.add(at, Change::BackendBack(backend));
        }
    }
}
