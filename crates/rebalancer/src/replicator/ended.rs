//! Tombstones: flows that have ended, so that no record of them comes back, and births the forwarder may not know yet.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use phalanx_flow::FlowKey;

use crate::flow_map::FlowMap;

/// A holder that saw a packet later than another by no more than this has seen nothing: records age by their transit when copied.
pub(super) const SEEN_SLACK: Duration = Duration::from_millis(250);

/// A bounded memory of births by flow; oldest out first.
#[derive(Debug)]
pub(super) struct Births {
    /// With when a packet was last seen by who ended the flow.
    births: FlowMap<(u64, Instant)>,
    order: VecDeque<(Instant, FlowKey, u64)>,
    capacity: usize,
    lifetime: Duration,
}

impl Births {
    pub(super) fn new(capacity: usize, lifetime: Duration) -> Self {
        Self { births: FlowMap::default(), order: VecDeque::new(), capacity, lifetime }
    }

    /// Everything that is kept.
    pub(super) fn len(&self) -> usize {
        self.births.len() + self.order.len()
    }

    /// Whether nothing is kept.
    pub(super) fn is_empty(&self) -> bool {
        self.births.is_empty()
    }

    /// Remembers `birth` unless a later one is known; `seen`: when a packet was last seen.
    pub(super) fn insert(&mut self, now: Instant, key: FlowKey, birth: u64, seen: Instant) {
        self.expire(now);
        let known = self.births.entry(key).or_insert((0, seen));
        if known.0 < birth {
            *known = (birth, seen);
            self.order.push_back((now, key, birth));
            if self.order.len() > self.capacity {
                self.forget_oldest();
            }
        }
    }

    /// The latest birth known of `key`.
    pub(super) fn get(&self, key: &FlowKey) -> Option<u64> {
        self.births.get(key).map(|(birth, _)| *birth)
    }

    /// If a record of `key` with `birth`, of which a packet was seen at `seen`, is of a flow that has ended: when who ended it saw the last
    /// one.
    pub(super) fn bars(&self, key: &FlowKey, birth: u64, seen: Instant) -> Option<Instant> {
        let (ended, last) = self.births.get(key)?;
        (birth != 0 && birth <= *ended && seen <= *last + SEEN_SLACK).then_some(*last)
    }

    /// Forgets what is older than the lifetime.
    pub(super) fn expire(&mut self, now: Instant) {
        while self.order.front().is_some_and(|(at, ..)| now.saturating_duration_since(*at) >= self.lifetime) {
            self.forget_oldest();
        }
    }

    fn forget_oldest(&mut self) {
        if let Some((_, key, birth)) = self.order.pop_front()
            && self.get(&key) == Some(birth)
        {
            self.births.remove(&key);
        }
    }
}
