//! Planned changes, as far as this member asks for them or goes along with them (docs/design/0006-planned-changes.md).
//!
//! ```text
//!              wish (join, leave, weight)                   all are ready for the pending view,
//!   in force ─────────────────────────────► waiting ──────  or nobody has come further for PATIENCE ──► switch: in force
//!      ▲                                       │
//!      └── the wish is withdrawn ◄─────────────┘
//!
//!   foreign member ── all are ready for the pending view, or PATIENCE ──► admitted
//! ```
//! The member that wishes is the coordinator of its change: it alone decides when it is in force, and says so in its item.
//! If it dies, the wish dies with its item. Whoever is *ready* has sent all it has to send, and says that in its own item.

use std::time::{Duration, Instant};

use phalanx_flow::MemberId;

use super::Membership;
use crate::{
    config::Digest,
    event::{Event, Warning},
    item::{MemberState, Wish},
};

/// How long a joiner, or who changes its weight, or a side that meets another, waits for others of whom none comes further. They
/// report themselves ready when their transfers are done or stuck, so who says nothing for this long has a fault of its own.
const PATIENCE: Duration = Duration::from_secs(120);

/// The same for a member that leaves: whoever told it to is waiting.
const LEAVE_PATIENCE: Duration = Duration::from_secs(30);

/// How far the others have come with the pending view.
#[derive(Debug, Default)]
pub(super) struct Waiting {
    /// The pending view, and how many are ready for it.
    seen: Option<(Digest, usize)>,
    /// When that was last news.
    since: Option<Instant>,
}

impl Membership {
    /// Says that this member has sent all it has to send for the pending view called `name`: from now on every other member that
    /// knows of it may switch. Nothing happens if the pending view has another name by now.
    pub fn report_done(&mut self, now: Instant, name: Digest) {
        if self.view.pending == Some(name) && self.done != name {
            self.done = name;
            self.publish(now);
            self.settle(now);
        }
    }

    /// The weight this member asks for, if it is active, or has now.
    fn wanted_weight(&self) -> u32 {
        self.wish.map_or(self.weight, |wish| wish.weight)
    }

    /// Asks to be active, with the weight of our metadata.
    pub(super) fn wish_to_join(&mut self, now: Instant) {
        self.wish(now, true, self.config.metadata.weight);
    }

    /// Asks to be active no more.
    pub(super) fn wish_to_leave(&mut self, now: Instant) {
        self.wish(now, false, self.weight);
    }

    /// Brings the wish in line with the weight in our metadata.
    pub(super) fn wish_weight(&mut self, now: Instant) {
        let wanted = self.config.metadata.weight;
        match (self.state, self.wish) {
            // Who leaves wants no other weight, and who has not asked yet says it when it does.
            (_, Some(Wish { active: false, .. }))
            | (MemberState::Joining, None)
            | (MemberState::Leaving, _) => {}
            _ if wanted == self.wanted_weight() => {}
            (MemberState::Active, Some(_)) if wanted == self.weight => {
                self.wish = None;
                self.publish(now);
            }
            _ => self.wish(now, true, wanted),
        }
    }

    fn wish(&mut self, now: Instant, active: bool, weight: u32) {
        self.wish = Some(Wish { active, weight, serial: self.next_serial() });
        self.publish(now);
    }

    /// The first of a boot is the boot, so that a start that resumes says the same as the one before. Later ones, and those of a start
    /// that has the boot and does not resume, are above all that this boot has used: a session begins at the time of day in microseconds,
    /// and no process says that much.
    fn next_serial(&self) -> u64 {
        let first = self.config.session == self.config.boot || self.is_resuming();
        if first && self.state == MemberState::Joining && self.wish.is_none() {
            return self.config.boot;
        }
        self.seal.sealer.life().session.wrapping_add(self.version).wrapping_add(1)
    }

    /// Turns active with the weight of our metadata, without asking: there is nobody to ask.
    pub(super) fn activate_alone(&mut self, now: Instant) {
        self.wish = None;
        self.weight = self.config.metadata.weight;
        self.serial = self.next_serial();
        self.enter(now, MemberState::Active);
    }

    /// Puts our wish in force.
    fn switch(&mut self, now: Instant, wish: Wish) {
        self.wish = None;
        self.weight = wish.weight;
        self.serial = wish.serial;
        match (wish.active, self.state) {
            (true, MemberState::Active) => self.publish(now),
            (true, _) => self.enter(now, MemberState::Active),
            (false, _) => self.enter(now, MemberState::Leaving),
        }
    }

    /// Puts our wish in force, or admits members of another side, if it is time; whether anything changed.
    pub(super) fn change(&mut self, now: Instant) -> bool {
        if self.frozen.is_some() || self.departed {
            return false;
        }
        let foreign = self.view.members.iter().any(|member| !member.admitted);
        let Some(name) = self.view.pending.filter(|_| self.wish.is_some() || foreign) else {
            self.waiting = Waiting::default();
            return false;
        };
        let (mut ready, mut missing) = (0, None);
        for member in &self.view.members {
            let counts = member.state == MemberState::Active || member.id == self.config.id;
            let done =
                if member.id == self.config.id { self.done == name } else { member.is_ready_for(name) };
            match (counts, done) {
                (true, true) => ready += 1,
                (true, false) => missing = missing.or(Some(member.id)),
                (false, _) => {}
            }
        }
        if let Some(missing) = missing
            && !self.patience_is_over(now, name, ready, missing)
        {
            return false;
        }
        if foreign {
            self.admit_all();
        }
        if let Some(wish) = self.wish {
            self.switch(now, wish);
        }
        true
    }

    /// Whether nobody has come further for too long; a warning says whom we do not wait for any more.
    fn patience_is_over(&mut self, now: Instant, name: Digest, ready: usize, missing: MemberId) -> bool {
        let leaves = self.wish.is_some_and(|wish| !wish.active);
        let patience = if leaves { LEAVE_PATIENCE } else { PATIENCE };
        if self.waiting.seen != Some((name, ready)) {
            self.waiting.seen = Some((name, ready));
            self.waiting.since = Some(now);
        }
        let over = self.waiting.since.is_some_and(|since| now.saturating_duration_since(since) >= patience);
        if over {
            self.events.push_back(Event::Warning(Warning::NotReady(missing)));
        }
        over
    }

    /// Takes the members of another side for ours.
    fn admit_all(&mut self) {
        for member in self.view.members.iter().filter(|member| !member.admitted) {
            self.met.insert(member.id, member.boot);
        }
        self.rebuild = true;
    }

    /// Notes who is of our side: who joined while we looked on, and, as long as we have no table of our own, everybody.
    pub(super) fn meet(&mut self, id: MemberId) {
        let items = self.board.lock();
        if let Some(item) = items.get(id)
            && (item.state == MemberState::Joining || self.state == MemberState::Joining)
        {
            self.met.insert(id, item.head.boot);
        }
    }
}
