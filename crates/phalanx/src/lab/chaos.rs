//! Chaos: a schedule of changes that follows from a seed, one or two at a time, never more than the promise covers.
//!
//! The promise is that no connection breaks as long as one holder of it lives. So the schedule never takes a second member before what
//! the first one held has two holders again; *when* that is the members say themselves (see `site/chaos.rs`), so the schedule is a list
//! of steps and not of times. *What* is done, to whom and in which order depends on nothing but the seed and the site.

use std::collections::BTreeSet;
use std::time::Duration;

use super::scenario::Action;
use super::world::Topology;

/// The site as the schedule needs to know it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChaosSite {
    /// Part of what the schedule follows from, so that two topologies do not run the same story.
    pub topology: Topology,
    /// Members that run at the start, at least 3.
    pub members: u32,
    /// Backends at the start, at least 3.
    pub backends: u32,
}

impl ChaosSite {
    /// Hosts for members: one more than at the start.
    pub const fn member_hosts(&self) -> u32 {
        self.members + 1
    }

    /// Hosts for backends: so many more than at the start that two thirds can be newer than the oldest connections.
    pub const fn backend_hosts(&self) -> u32 {
        2 * self.backends
    }
}

/// One or two changes made together, once the cluster is protected and then this much later.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// Time to let pass once the cluster is protected.
    pub calm: Duration,
    /// What is done, in this order: at most one of it takes a member away, brings one, or moves flows, and backends change before it.
    pub actions: Vec<Action>,
}

impl Step {
    /// The kinds of change, as reports group them.
    pub fn kind(&self) -> String {
        self.actions.iter().map(Action::kind).collect::<Vec<_>>().join(" + ")
    }

    /// What is done, in words.
    pub fn what(&self) -> String {
        self.actions.iter().map(Action::to_string).collect::<Vec<_>>().join(" + ")
    }
}

/// Fewest members that own flows: the one that a change takes away leaves two, who hold everything twice.
const LEAST_OWNERS: usize = 3;
/// Of a third of the live connections the backend must not be the consistent choice. Of the oldest it must be more: of those that come
/// and go few deviate, and shares are never quite even.
const LEAST_DEVIATING: f64 = 0.44;
/// How many steps have a second change, of a hundred.
const TWO_AT_A_TIME: u64 = 30;

/// The schedule: an endless iterator over steps.
#[derive(Clone, Debug)]
pub struct Schedule {
    site: ChaosSite,
    dice: Dice,
    /// Members that run, and those of them with weight 0.
    running: BTreeSet<u32>,
    drained: BTreeSet<u32>,
    /// Backends in the configuration, and those of them without new flows.
    backends: BTreeSet<u32>,
    unused: BTreeSet<u32>,
    failing: BTreeSet<u32>,
    /// The first steps, made when there is nothing else yet: the backends change.
    opening: Vec<Step>,
    /// Kinds that have not come since the last round through all of them.
    due: Vec<Kind>,
    /// What the loss of a step still lasts is no time for another.
    loss_made: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Kill,
    Crash,
    Pause,
    Restart,
    Join,
    Leave,
    Partition,
    Split,
    Drain,
    Undrain,
    Loss,
    Reload,
    AddBackend,
    DrainBackend,
    FailBackend,
    MendBackend,
}

const KINDS: [Kind; 16] = [
    Kind::Kill,
    Kind::Crash,
    Kind::Pause,
    Kind::Restart,
    Kind::Join,
    Kind::Leave,
    Kind::Partition,
    Kind::Split,
    Kind::Drain,
    Kind::Undrain,
    Kind::Loss,
    Kind::Reload,
    Kind::AddBackend,
    Kind::DrainBackend,
    Kind::FailBackend,
    Kind::MendBackend,
];

impl Kind {
    const fn is_gentle(self) -> bool {
        matches!(
            self,
            Self::Loss
                | Self::Reload
                | Self::AddBackend
                | Self::DrainBackend
                | Self::FailBackend
                | Self::MendBackend
        )
    }
}

impl Schedule {
    /// The schedule of a seed on a site.
    pub fn new(seed: u64, site: ChaosSite) -> Self {
        let topology = match site.topology {
            Topology::Lan => 1,
            Topology::Routed => 2,
        };
        let mut dice = Dice(seed);
        for part in [topology, site.members, site.backends] {
            dice = Dice(dice.next() ^ u64::from(part));
        }
        let second = Duration::from_secs(1);
        let step = |action| Step { calm: second / 2, actions: vec![action] };
        let mut schedule = Self {
            site,
            dice,
            running: (1..=site.members).collect(),
            drained: BTreeSet::new(),
            backends: (1..=site.backends).collect(),
            unused: BTreeSet::new(),
            failing: BTreeSet::new(),
            opening: Vec::new(),
            due: Vec::new(),
            loss_made: false,
        };
        // From here on most of the connections that were opened first are held by state alone.
        let first = site.backends + 1;
        for action in
            [Action::AddBackend(Some(first)), Action::AddBackend(Some(first + 1)), Action::DrainBackend(1)]
        {
            schedule.take_over(action);
            schedule.opening.push(step(action));
        }
        schedule.opening.reverse();
        schedule
    }

    /// The share of the connections opened at the start whose backend is not what the consistent table of these would give: an old
    /// backend in use keeps a connection it has unless a new one scores higher, which is as likely for each of all in use.
    fn deviating(&self, unused: &BTreeSet<u32>, failing: &BTreeSet<u32>) -> f64 {
        let used = |number: &&u32| !unused.contains(number) && !failing.contains(number);
        let old = self.backends.iter().filter(used).filter(|number| **number <= self.site.backends).count();
        let new = self.backends.iter().filter(used).filter(|number| **number > self.site.backends).count();
        1.0 - old as f64 / (self.site.backends as usize + new) as f64
    }

    /// Whether enough deviates with these out of use, whether or not a failing backend is mended.
    fn deviates_enough(&self, unused: &BTreeSet<u32>) -> bool {
        let least = self.deviating(unused, &self.failing).min(self.deviating(unused, &BTreeSet::new()));
        least >= LEAST_DEVIATING
    }

    fn in_use(&self) -> usize {
        self.backends.len() - self.unused.union(&self.failing).count()
    }

    fn owners(&self) -> Vec<u32> {
        self.running.difference(&self.drained).copied().collect()
    }

    /// What a kind of change is done to, if it can be done now.
    fn choose(&mut self, kind: Kind) -> Option<Action> {
        let owners = self.owners();
        let seconds = |dice: &mut Dice, from: u64, to: u64| Duration::from_millis(dice.between(from, to));
        let enough = owners.len() >= LEAST_OWNERS;
        match kind {
            Kind::Kill if enough => self.dice.pick(&owners).map(Action::Kill),
            Kind::Crash if enough => self.dice.pick(&owners).map(Action::Crash),
            Kind::Restart if enough => self.dice.pick(&owners).map(Action::Restart),
            Kind::Leave if enough => self.dice.pick(&owners).map(Action::Leave),
            Kind::Drain if enough && self.drained.is_empty() => self.dice.pick(&owners).map(Action::Drain),
            Kind::Undrain => {
                let drained: Vec<u32> = self.drained.iter().copied().collect();
                self.dice.pick(&drained).map(Action::Undrain)
            }
            // From well below the time in which a member is suspected to well above the time in which it is confirmed down.
            Kind::Pause if enough => {
                let id = self.dice.pick(&owners)?;
                Some(Action::Pause(id, seconds(&mut self.dice, 200, 6000)))
            }
            Kind::Partition if enough => {
                let id = self.dice.pick(&owners)?;
                Some(Action::Partition(id, seconds(&mut self.dice, 200, 6000)))
            }
            // Shorter than it takes to confirm that a member is down: two clusters that both get packets are more than is promised.
            Kind::Split if enough => {
                let id = self.dice.pick(&owners)?;
                Some(Action::Split(id, seconds(&mut self.dice, 100, 1000)))
            }
            Kind::Join => {
                let down: Vec<u32> =
                    (1..=self.site.member_hosts()).filter(|id| !self.running.contains(id)).collect();
                self.dice.pick(&down).map(|id| Action::Join(Some(id)))
            }
            Kind::Loss => {
                let share = self.dice.between(1, 5) as u32;
                Some(Action::Loss(share, seconds(&mut self.dice, 500, 4000)))
            }
            Kind::Reload => {
                let running: Vec<u32> = self.running.iter().copied().collect();
                let one = self.dice.between(0, 1) == 1;
                Some(Action::Reload(one.then(|| self.dice.pick(&running)).flatten()))
            }
            Kind::AddBackend => {
                let mut rest: Vec<u32> = (1..=self.site.backend_hosts())
                    .filter(|number| !self.backends.contains(number))
                    .collect();
                rest.extend(&self.unused);
                let number = self.dice.pick(&rest)?;
                let mut unused = self.unused.clone();
                unused.remove(&number);
                (number > self.site.backends || self.deviates_enough(&unused))
                    .then_some(Action::AddBackend(Some(number)))
            }
            Kind::DrainBackend if self.in_use() > 2 => {
                let used: Vec<u32> = self.usable();
                let number = self.dice.pick(&used)?;
                let mut unused = self.unused.clone();
                unused.insert(number);
                self.deviates_enough(&unused).then_some(Action::DrainBackend(number))
            }
            Kind::FailBackend if self.in_use() > 2 && self.failing.is_empty() => {
                let used: Vec<u32> = self.usable();
                let number = self.dice.pick(&used)?;
                let failing = BTreeSet::from([number]);
                (self.deviating(&self.unused, &failing) >= LEAST_DEVIATING)
                    .then_some(Action::FailBackend(number))
            }
            Kind::MendBackend => {
                let failing: Vec<u32> = self.failing.iter().copied().collect();
                self.dice.pick(&failing).map(Action::MendBackend)
            }
            _ => None,
        }
    }

    fn usable(&self) -> Vec<u32> {
        let unusable: BTreeSet<u32> = self.unused.union(&self.failing).copied().collect();
        self.backends.difference(&unusable).copied().collect()
    }

    /// Takes over what an action leaves behind once it is over.
    fn take_over(&mut self, action: Action) {
        match action {
            Action::Kill(id) | Action::Crash(id) | Action::Leave(id) => {
                self.running.remove(&id);
            }
            Action::Join(Some(id)) => {
                self.running.insert(id);
            }
            Action::Drain(id) => {
                self.drained.insert(id);
            }
            Action::Undrain(id) => {
                self.drained.remove(&id);
            }
            Action::AddBackend(Some(number)) => {
                self.backends.insert(number);
                self.unused.remove(&number);
            }
            Action::DrainBackend(number) => {
                self.unused.insert(number);
            }
            Action::FailBackend(number) => {
                self.failing.insert(number);
            }
            Action::MendBackend(number) => {
                self.failing.remove(&number);
            }
            _ => {}
        }
    }

    /// An action of a kind that is still due in this round, of those that `fits`.
    fn draw(&mut self, fits: impl Fn(Kind) -> bool) -> Option<Action> {
        let mut tried = Vec::new();
        loop {
            let candidates: Vec<usize> = (0..self.due.len())
                .filter(|at| fits(self.due[*at]) && !tried.contains(&self.due[*at]))
                .collect();
            let at = self.dice.pick(&candidates)?;
            let kind = self.due[at];
            if let Some(action) = self.choose(kind) {
                self.due.remove(at);
                self.take_over(action);
                self.loss_made |= kind == Kind::Loss;
                return Some(action);
            }
            tried.push(kind);
        }
    }
}

impl Iterator for Schedule {
    type Item = Step;

    fn next(&mut self) -> Option<Step> {
        if let Some(step) = self.opening.pop() {
            return Some(step);
        }
        self.loss_made = false;
        // While nobody may be taken away, most kinds have to wait: somebody is soon to come back.
        let few = self.owners().len() < LEAST_OWNERS;
        if few && self.dice.between(0, 1) == 0 {
            self.due.extend([Kind::Join, Kind::Undrain]);
        }
        let first = match self.draw(|_| true) {
            Some(action) => action,
            None => {
                // Whatever of the last round could not be done yet is the likelier in the next.
                self.due.extend(KINDS);
                self.draw(|_| true)?
            }
        };
        let mut actions = vec![first];
        if self.dice.between(0, 99) < TWO_AT_A_TIME {
            // The second is a gentle one, and not the undoing of the first.
            let loss_made = self.loss_made;
            let gentle = |kind: Kind| kind.is_gentle() && !(loss_made && kind == Kind::Loss);
            if !is_backend_change(first)
                && let Some(action) = self.draw(gentle)
            {
                actions.insert(if is_backend_change(action) { 0 } else { 1 }, action);
            }
        }
        Some(Step { calm: Duration::from_millis(self.dice.between(500, 2000)), actions })
    }
}

/// Whether the consistent table changes by it.
pub const fn is_backend_change(action: Action) -> bool {
    matches!(
        action,
        Action::AddBackend(_) | Action::DrainBackend(_) | Action::FailBackend(_) | Action::MendBackend(_)
    )
}

/// SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): the same numbers on every platform and in every version.
#[derive(Clone, Debug)]
struct Dice(u64);

impl Dice {
    const fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let value = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        value ^ (value >> 31)
    }

    const fn between(&mut self, from: u64, to: u64) -> u64 {
        from + self.next() % (to - from + 1)
    }

    fn pick<T: Copy>(&mut self, among: &[T]) -> Option<T> {
        if among.is_empty() { None } else { Some(among[(self.next() % among.len() as u64) as usize]) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn site(topology: Topology) -> ChaosSite {
        ChaosSite { topology, members: 4, backends: 3 }
    }

    fn steps(seed: u64, topology: Topology) -> Vec<Step> {
        Schedule::new(seed, site(topology)).take(300).collect()
    }

    #[test]
    fn the_same_seed_and_site_give_the_same_schedule_and_others_give_another() {
        assert_eq!(steps(7, Topology::Lan), steps(7, Topology::Lan));
        assert_ne!(steps(7, Topology::Lan), steps(8, Topology::Lan));
        assert_ne!(steps(7, Topology::Lan), steps(7, Topology::Routed));
        assert_ne!(
            steps(1, Topology::Routed),
            steps(2, Topology::Lan),
            "seed and site do not make up for each other"
        );
    }

    #[test]
    fn a_schedule_is_endless_and_every_kind_of_change_comes_soon() {
        for seed in 0..50 {
            let steps = steps(seed, Topology::Lan);
            assert_eq!(steps.len(), 300, "seed {seed}");
            let kinds: BTreeSet<&str> =
                steps[..60].iter().flat_map(|step| &step.actions).map(Action::kind).collect();
            assert!(kinds.len() >= KINDS.len(), "seed {seed}: only {kinds:?}");
        }
    }

    /// Follows a schedule by the rules of the promise, without the schedule's own book.
    #[test]
    fn a_schedule_never_takes_more_than_the_promise_covers() {
        for seed in 0..200 {
            let mut running: BTreeSet<u32> = (1..=4).collect();
            let mut drained = BTreeSet::new();
            for step in steps(seed, Topology::Routed) {
                assert!((1..=2).contains(&step.actions.len()));
                let member_changes = step.actions.iter().filter(|action| action.changes_members()).count();
                assert!(member_changes <= 1, "seed {seed}: {step:?}");
                assert!(step.calm >= Duration::from_millis(500));
                for action in step.actions {
                    let owners: BTreeSet<u32> = running.difference(&drained).copied().collect();
                    match action {
                        Action::Kill(id) | Action::Crash(id) | Action::Leave(id) => {
                            assert!(owners.len() >= 3, "seed {seed}: {action} of {owners:?}");
                            assert!(running.remove(&id));
                        }
                        Action::Pause(id, _)
                        | Action::Restart(id)
                        | Action::Partition(id, _)
                        | Action::Split(id, _) => {
                            assert!(owners.len() >= 3 && owners.contains(&id), "seed {seed}: {action}");
                        }
                        Action::Drain(id) => {
                            assert!(owners.len() >= 3);
                            assert!(running.contains(&id) && drained.insert(id));
                        }
                        Action::Undrain(id) => assert!(drained.remove(&id)),
                        Action::Join(Some(id)) => assert!(id <= 5 && running.insert(id)),
                        Action::CrashBackend(_) | Action::Enter(_) => panic!("seed {seed}: {action}"),
                        _ => {}
                    }
                }
            }
        }
    }

    /// By the real table: of connections opened with the first backends, more than a third are elsewhere than it would put them.
    #[test]
    fn after_the_first_steps_a_third_of_the_old_connections_always_deviates() {
        use phalanx_flow::slots::{BackendTable, RankedBackend};
        use phalanx_flow::{BackendId, Method};
        let id = |number: u32| {
            BackendId::new(format!("10.0.1.{}", 100 + number).parse().unwrap(), Method::L2, 6080)
        };
        let table = |numbers: &BTreeSet<u32>| {
            let ranked: Vec<RankedBackend> =
                numbers.iter().map(|number| RankedBackend { id: id(*number), weight: 100 }).collect();
            BackendTable::new([1, 2], &ranked)
        };
        let start = table(&(1..=3).collect());
        for seed in 0..10 {
            let (mut usable, mut failing) = ((1..=3).collect::<BTreeSet<u32>>(), BTreeSet::new());
            for (index, step) in steps(seed, Topology::Lan).into_iter().take(120).enumerate() {
                for action in step.actions {
                    match action {
                        Action::AddBackend(Some(number)) => drop(usable.insert(number)),
                        Action::DrainBackend(number) => drop(usable.remove(&number)),
                        Action::FailBackend(number) => drop(failing.insert(number)),
                        Action::MendBackend(number) => drop(failing.remove(&number)),
                        _ => {}
                    }
                }
                let now = table(&usable.difference(&failing).copied().collect());
                let slots = (0..4096u16).map(|slot| slot * 16);
                let moved = slots.filter(|slot| start.best(*slot) != now.best(*slot)).count();
                assert!(index < 2 || moved * 3 >= 4096, "seed {seed}, step {index}: {moved} of 4096");
            }
        }
    }
}
