//! Flows whose entry is idle here and waits for what another holder knows.
//!
//! ```text
//!                    Expired, another holder lives
//!  (not waiting) ────────────────────────────────► WAITING ──┐ retry: ask again
//!        ▲                                            │  ▲───┘
//!        │  newer packet there: touch                 │
//!        ├────────────────────────────────────────────┤
//!        │  owner:  idle there too, or no entry there, at every backup in turn: remove, announce the end
//!        │  owner:  no answer in BACKUP_WAIT: remove here, announce nothing
//!        │  others: no entry at the owner, or no end from it in OWNER_WAIT: remove here
//!        │  both:   the flow lives again, is replaced, or its end is announced
//!        └────────────────────────────────────────────┘
//! ```
//! Every path out of WAITING is bounded in time, so that nothing becomes immortal.

use std::collections::{BTreeSet, HashMap};
use std::time::{Duration, Instant};

use phalanx_flow::{FlowKey, MemberId, Record};

/// A question without an answer is asked again after this: several round trips, and short beside any linger.
pub(super) const RETRY: Duration = Duration::from_secs(1);
/// How long an owner waits for its backup's answer; a live peer answers in milliseconds.
pub(super) const BACKUP_WAIT: Duration = Duration::from_secs(5);
/// How long another holder keeps an entry that its owner should end: the owner's own wait, and time for a reconnect.
pub(super) const OWNER_WAIT: Duration = Duration::from_secs(30);

/// One idle entry.
#[derive(Clone, Debug)]
pub(super) struct Waiting {
    /// The entry as it was when it expired.
    pub(super) record: Record,
    /// When that was.
    pub(super) since: Instant,
    /// Who was asked last.
    pub(super) asked: Option<MemberId>,
    /// Who has answered that it has not seen it either.
    pub(super) idle_at: BTreeSet<MemberId>,
    next: Instant,
}

#[derive(Debug, Default)]
pub(super) struct IdleFlows {
    waiting: HashMap<FlowKey, Waiting>,
    timers: BTreeSet<(Instant, FlowKey)>,
}

impl IdleFlows {
    pub(super) fn len(&self) -> usize {
        self.waiting.len()
    }

    /// Takes an expired entry; `false` if this life of the flow is waiting already.
    pub(super) fn insert(&mut self, now: Instant, record: Record) -> bool {
        if self.waiting.get(&record.key).is_some_and(|known| known.record.birth == record.birth) {
            return false;
        }
        self.remove(&record.key);
        self.waiting.insert(
            record.key,
            Waiting { record, since: now, asked: None, idle_at: BTreeSet::new(), next: now },
        );
        self.timers.insert((now, record.key));
        true
    }

    pub(super) fn get(&self, key: &FlowKey) -> Option<&Waiting> {
        self.waiting.get(key)
    }

    pub(super) fn remove(&mut self, key: &FlowKey) -> Option<Waiting> {
        let waiting = self.waiting.remove(key)?;
        self.timers.remove(&(waiting.next, *key));
        Some(waiting)
    }

    /// Stops waiting for lives of `key` up to `birth`.
    pub(super) fn remove_life(&mut self, key: &FlowKey, birth: u64) {
        if self.waiting.get(key).is_some_and(|waiting| waiting.record.birth <= birth) {
            self.remove(key);
        }
    }

    /// Notes that `peer` has not seen the flow either.
    pub(super) fn is_idle_at(&mut self, key: &FlowKey, peer: MemberId) {
        if let Some(waiting) = self.waiting.get_mut(key) {
            waiting.idle_at.insert(peer);
        }
    }

    /// Notes that `peer` has been asked, and that it is to be asked again after [`RETRY`].
    pub(super) fn asked(&mut self, now: Instant, key: &FlowKey, peer: Option<MemberId>) {
        if let Some(waiting) = self.waiting.get_mut(key) {
            self.timers.remove(&(waiting.next, *key));
            waiting.asked = peer;
            waiting.next = now + RETRY;
            self.timers.insert((waiting.next, *key));
        }
    }

    /// When [`IdleFlows::due`] next has something.
    pub(super) fn next_timeout(&self) -> Option<Instant> {
        self.timers.first().map(|&(at, _)| at)
    }

    /// The flows whose time has come.
    pub(super) fn due(&self, now: Instant) -> Vec<FlowKey> {
        self.timers.iter().take_while(|&&(at, _)| at <= now).map(|&(_, key)| key).collect()
    }
}
