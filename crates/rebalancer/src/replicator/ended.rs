//! Tombstones: flows that have ended, so that no record of them comes back, and births the forwarder may not know yet.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use phalanx_flow::FlowKey;

/// A bounded memory of births by flow; oldest out first.
#[derive(Debug)]
pub(super) struct Births {
    births: HashMap<FlowKey, u64>,
    order: VecDeque<(Instant, FlowKey, u64)>,
    capacity: usize,
    lifetime: Duration,
}

impl Births {
    pub(super) fn new(capacity: usize, lifetime: Duration) -> Self {
        Self { births: HashMap::new(), order: VecDeque::new(), capacity, lifetime }
    }

    /// Remembers `birth` unless a later one is known.
    pub(super) fn insert(&mut self, now: Instant, key: FlowKey, birth: u64) {
        self.expire(now);
        let known = self.births.entry(key).or_default();
        if *known < birth {
            *known = birth;
            self.order.push_back((now, key, birth));
            if self.order.len() > self.capacity {
                self.forget_oldest();
            }
        }
    }

    /// The latest birth known of `key`.
    pub(super) fn get(&self, key: &FlowKey) -> Option<u64> {
        self.births.get(key).copied()
    }

    /// Whether a record of `key` with `birth` is of a flow that has ended.
    pub(super) fn bars(&self, key: &FlowKey, birth: u64) -> bool {
        birth != 0 && self.get(key).is_some_and(|ended| birth <= ended)
    }

    /// Forgets what is older than the lifetime.
    pub(super) fn expire(&mut self, now: Instant) {
        while self.order.front().is_some_and(|(at, ..)| now.saturating_duration_since(*at) >= self.lifetime) {
            self.forget_oldest();
        }
    }

    fn forget_oldest(&mut self) {
        if let Some((_, key, birth)) = self.order.pop_front()
            && self.births.get(&key) == Some(&birth)
        {
            self.births.remove(&key);
        }
    }
}
