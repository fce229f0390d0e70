//! How flows end: by the owner's word, when no holder has seen them.

use std::time::{Duration, Instant};

use phalanx_flow::{FlowKey, FlowState, MemberId, Record};

use super::ended::SEEN_SLACK;
use super::idle::{BACKUP_WAIT, OWNER_WAIT};
use super::inbound::Then;
use super::{Apply, Item, Replicator, aged};

/// [`SEEN_SLACK`] in milliseconds.
pub(super) const IDLE_SLACK_MS: u32 = SEEN_SLACK.as_millis() as u32;

impl Replicator {
    pub(super) fn expire(&mut self, record: Record, at_once: bool) {
        match record.state {
            // Half-open entries are many and worth little, and a reset flow has its answer: both go without asking.
            FlowState::HalfOpen | FlowState::Reset => {
                let announce = self.is_own(&record.key) && (at_once || self.is_worth_telling(&record));
                self.remove(&record, self.now, announce);
            }
            FlowState::Established | FlowState::Closing => {
                if self.idle.insert(self.now, record) {
                    self.ask_again(&record.key);
                }
            }
        }
    }

    /// Asks who else holds the waiting flow, or ends the waiting.
    pub(super) fn ask_again(&mut self, key: &FlowKey) {
        let Some(waiting) = self.idle.get(key).cloned() else { return };
        let own = self.is_own(key);
        let waited = self.now.saturating_duration_since(waiting.since);
        let holders = self.holders(key);
        // An owner asks its backups, one after the other, and a backup the owner.
        let asked = if own { &holders[1..] } else { &holders[..1] };
        let other = asked.iter().copied().flatten().find(|member| {
            *member != self.config.local
                && self.is_live(*member)
                && self.is_enabled()
                && !waiting.idle_at.contains(member)
        });
        match other {
            // Nobody else can have seen it, or nobody has.
            None => {
                self.idle.remove(key);
                self.remove(&waiting.record, waiting.since, own);
            }
            Some(_) if waited >= if own { BACKUP_WAIT } else { OWNER_WAIT } => {
                self.counters.unanswered += 1;
                self.idle.remove(key);
                self.remove(&waiting.record, waiting.since, false);
            }
            Some(other) => {
                self.push(other, Item::IdleQuery { key: *key, birth: waiting.record.birth });
                self.idle.asked(self.now, key, Some(other));
            }
        }
    }

    pub(super) fn handle_idle_reply(
        &mut self,
        from: MemberId,
        key: &FlowKey,
        birth: u64,
        theirs: Option<u32>,
    ) {
        let Some(waiting) = self.idle.get(key).cloned() else { return };
        if waiting.asked != Some(from) || waiting.record.birth != birth {
            return;
        }
        let ours = aged(waiting.record.idle_ms, waiting.since, self.now);
        match theirs {
            Some(theirs) if theirs.saturating_add(IDLE_SLACK_MS) < ours => {
                self.idle.remove(key);
                self.inbound.push_local(Apply::Touch { key: *key, idle_ms: theirs }, Then::Nothing);
            }
            // The owner has it and will end it; it is asked again meanwhile, in case a packet passes there.
            Some(_) if !self.is_own(key) => {}
            // Another backup may have seen it.
            _ if self.is_own(key) => {
                self.idle.is_idle_at(key, from);
                self.ask_again(key);
            }
            _ => {
                self.idle.remove(key);
                self.remove(&waiting.record, waiting.since, false);
            }
        }
    }

    /// When a packet was seen, if that was `idle_ms` before `at`.
    pub(super) fn seen(&self, idle_ms: u32, at: Instant) -> Instant {
        at.checked_sub(Duration::from_millis(idle_ms.into())).unwrap_or(self.started)
    }

    /// Removes an entry here that was idle at `at`; the end is announced once the forwarder has agreed that it is.
    fn remove(&mut self, record: &Record, at: Instant, announce: bool) {
        let (key, birth, seen) = (record.key, record.birth, self.seen(record.idle_ms, at));
        let then = if announce { Then::Announce { key, birth, seen } } else { Then::Forget { key, birth } };
        self.inbound.push_local(Apply::Remove { key, birth, min_idle_ms: record.idle_ms }, then);
    }

    pub(super) fn announce_end(&mut self, key: FlowKey, birth: u64, seen: Instant) {
        let (holders, caches) = self.audience(&key);
        self.note_end(&key, birth, seen);
        for to in holders {
            self.push_end(to, key, birth, seen, false);
        }
        for to in caches {
            self.push_end(to, key, birth, seen, true);
        }
    }

    /// Tells `to` that a flow of which a packet was last seen at `seen` has ended.
    pub(super) fn push_end(&mut self, to: MemberId, key: FlowKey, birth: u64, seen: Instant, cache: bool) {
        self.push(to, Item::End { key, birth, idle_ms: aged(0, seen, self.now), cache });
    }

    /// The flow has ended, whoever said so: nothing older is to be told or taken any more, unless a packet was seen since.
    pub(super) fn note_end(&mut self, key: &FlowKey, birth: u64, seen: Instant) {
        self.ended.insert(self.now, *key, birth, seen);
        self.idle.remove_life(key, birth);
        self.forget_unprotected(key, birth);
        for peer in self.peers.values_mut() {
            peer.outbox.forget(key, birth);
        }
    }
}
