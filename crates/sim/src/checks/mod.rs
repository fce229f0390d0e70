//! What must be true of a run, one type for each promise.

pub mod converges;
pub mod diverts;
pub mod held;
pub mod loops;
pub mod memory;
pub mod owner;
pub mod sticky;

use std::time::Duration;

use crate::schedule::Change;
use crate::world::event::Packet;
use crate::world::{Ruling, World};

/// One promise that was not kept.
#[derive(Clone, Debug)]
pub struct Violation {
    /// Which checker says so.
    pub checker: &'static str,
    /// When.
    pub at: Duration,
    /// What was seen.
    pub what: String,
}

/// What checkers found.
#[derive(Debug, Default)]
pub struct Findings {
    /// Promises not kept, at most `MOST` of each checker.
    pub violations: Vec<Violation>,
    /// Flows of which every holder was lost: what becomes of them is nobody's fault.
    pub excused: Vec<usize>,
    /// Flows of which the last copy within anybody's reach has just been lost, through nobody's fault.
    pub lost: Vec<usize>,
    /// When.
    pub(crate) now: Duration,
    /// Who is asked.
    pub(crate) checker: &'static str,
}

/// More of one kind say nothing more.
const MOST: usize = 8;

impl Findings {
    /// Notes a violation found by the checker that is asked.
    pub fn violate(&mut self, what: String) {
        self.violate_as(self.checker, self.now, what);
    }

    pub(crate) fn violate_as(&mut self, checker: &'static str, at: Duration, what: String) {
        if self.violations.iter().filter(|known| known.checker == checker).count() < MOST {
            self.violations.push(Violation { checker, at, what });
        }
    }
}

/// Looks at a run as it goes, and says what is not as it should be. All methods but the name have a default that looks at nothing.
pub trait Checker {
    /// What it is called in tables.
    fn name(&self) -> &'static str;

    /// A member ruled on a packet.
    fn ruled(&mut self, _world: &World, _ruling: &Ruling<'_>, _findings: &mut Findings) {}

    /// A packet of an open connection has come to another backend than its own.
    fn astray(&mut self, _world: &World, _packet: &Packet, _backend: usize, _findings: &mut Findings) {}

    /// A change is about to be carried out.
    fn changing(&mut self, _world: &World, _change: &Change, _findings: &mut Findings) {}

    /// A change was carried out.
    fn changed(&mut self, _world: &World, _change: &Change, _findings: &mut Findings) {}

    /// A little time has passed.
    fn sampled(&mut self, _world: &World, _findings: &mut Findings) {}

    /// All changes are over and have had the time they need; clients go on.
    fn settled(&mut self, _world: &World, _findings: &mut Findings) {}

    /// All clients have ended, and every timeout is over.
    fn emptied(&mut self, _world: &World, _findings: &mut Findings) {}
}

/// All checkers, in the order of `docs/testing.md`.
pub fn all() -> Vec<Box<dyn Checker>> {
    vec![
        Box::new(owner::OneOwner),
        Box::new(loops::NoLoop),
        Box::new(sticky::Sticky::default()),
        Box::new(held::Held),
        Box::new(converges::Converges),
        Box::new(diverts::Diverts::default()),
        Box::new(memory::NoGrowth::default()),
        Box::new(memory::NoImmortal),
    ]
}

/// The names of all checkers, and of what the drivers themselves notice.
pub const NAMES: [&str; 10] = [
    "one-owner",
    "no-loop",
    "sticky",
    "held",
    "converges",
    "diverts",
    "no-growth",
    "no-immortal",
    "install",
    "streams",
];
