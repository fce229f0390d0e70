//! What waits to be sent to one peer, one slot per flow.
//!
//! However long a peer is away, a flow takes one slot: a later record replaces an earlier one of the same flow, an end takes the
//! record it ends with it, and an end is sent before the record of the flow's next life.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};
use std::time::Instant;

use phalanx_flow::{FlowKey, Record};

use super::aged;
use crate::codec::Item;

/// What is to be told of one flow, in this order.
#[derive(Debug, Default)]
struct Slot {
    /// Birth, and whether it is for the cache.
    end: Option<(u64, bool)>,
    associate: Option<Associate>,
    /// Birth and when a packet was seen, as idle milliseconds at a time.
    touch: Option<(u64, u32, Instant)>,
}

#[derive(Clone, Copy, Debug)]
struct Associate {
    record: Record,
    /// When the record's idle time was read.
    at: Instant,
    purpose: Purpose,
}

/// Best first: what the receiver does with a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Purpose {
    Hold,
    Cache,
    Hint,
}

#[derive(Debug)]
pub(super) struct Outbox {
    slots: HashMap<FlowKey, Slot>,
    order: VecDeque<FlowKey>,
    capacity: usize,
}

impl Outbox {
    pub(super) fn new(capacity: usize) -> Self {
        Self { slots: HashMap::new(), order: VecDeque::new(), capacity }
    }

    /// How many flows wait.
    pub(super) fn len(&self) -> usize {
        self.slots.len()
    }

    pub(super) fn clear(&mut self) {
        self.slots.clear();
        self.order.clear();
    }

    /// Takes an item to be sent; idle times in it are as of `at`. `false`: there is no room and it was dropped.
    pub(super) fn push(&mut self, at: Instant, item: Item) -> bool {
        let full = self.slots.len() >= self.capacity;
        let slot = match self.slots.entry(*item.key()) {
            Entry::Occupied(slot) => slot.into_mut(),
            Entry::Vacant(_) if full => return false,
            Entry::Vacant(slot) => {
                self.order.push_back(*item.key());
                slot.insert(Slot::default())
            }
        };
        slot.merge(at, item);
        true
    }

    /// Takes back an item that was sent and not acknowledged: what has been said since stands. It goes first.
    pub(super) fn push_back_unacknowledged(&mut self, at: Instant, item: Item) {
        // Room is not asked for: the item had its slot, and the window that was in flight is bounded.
        let slot = match self.slots.entry(*item.key()) {
            Entry::Occupied(slot) => slot.into_mut(),
            Entry::Vacant(slot) => {
                self.order.push_front(*item.key());
                slot.insert(Slot::default())
            }
        };
        let newer = std::mem::take(slot);
        slot.merge(at, item);
        newer.for_each_item(*item.key(), at, |at, item| slot.merge(at, item));
    }

    /// Drops what tells of a life of `key` up to `birth`: it has ended, and somebody else said so.
    pub(super) fn forget(&mut self, key: &FlowKey, birth: u64) {
        if let Some(slot) = self.slots.get_mut(key) {
            slot.drop_life(birth);
        }
    }

    /// The next items, at most `max`, with idle times as of `now`.
    pub(super) fn take(&mut self, now: Instant, max: usize) -> Vec<Item> {
        let mut items = Vec::new();
        // A slot has up to three items.
        while items.len() + 3 <= max
            && let Some(key) = self.order.pop_front()
        {
            let Some(slot) = self.slots.remove(&key) else { continue };
            slot.for_each_item(key, now, |at, item| items.push(aged_item(item, at, now)));
        }
        items
    }
}

impl Slot {
    fn merge(&mut self, at: Instant, item: Item) {
        match item {
            Item::Associate { record, cache } => {
                self.associate(Associate {
                    record,
                    at,
                    purpose: if cache { Purpose::Cache } else { Purpose::Hold },
                });
            }
            Item::Hint { record } => self.associate(Associate { record, at, purpose: Purpose::Hint }),
            Item::End { birth, cache, .. } => {
                self.drop_life(birth);
                self.end = match self.end {
                    Some((known, known_cache)) => Some((known.max(birth), known_cache && cache)),
                    None => Some((birth, cache)),
                };
            }
            Item::Touch { birth, idle_ms, .. } => self.touch = Some((birth, idle_ms, at)),
            // Questions and answers have a queue of their own: they are not worth repeating.
            Item::IdleQuery { .. } | Item::IdleReply { .. } => {}
        }
    }

    fn associate(&mut self, new: Associate) {
        let birth = new.record.birth;
        if birth != 0 && self.end.is_some_and(|(ended, _)| birth <= ended) {
            return;
        }
        match &mut self.associate {
            Some(known) if new.purpose == Purpose::Hint && known.purpose != Purpose::Hint => {}
            Some(known) => {
                let purpose = known.purpose.min(new.purpose);
                if known.purpose == Purpose::Hint || !new.record.is_replaced_by(&known.record) {
                    *known = new;
                }
                known.purpose = purpose;
            }
            None => self.associate = Some(new),
        }
    }

    fn drop_life(&mut self, birth: u64) {
        if self.associate.is_some_and(|known| known.record.birth <= birth && known.purpose != Purpose::Hint) {
            self.associate = None;
        }
        if self.touch.is_some_and(|(touched, ..)| touched <= birth) {
            self.touch = None;
        }
    }

    /// The slot's items in the order in which they are to be applied, with the time of their idle times.
    fn for_each_item(self, key: FlowKey, now: Instant, mut f: impl FnMut(Instant, Item)) {
        if let Some((birth, cache)) = self.end {
            f(now, Item::End { key, birth, cache });
        }
        if let Some(Associate { record, at, purpose }) = self.associate {
            f(
                at,
                match purpose {
                    Purpose::Hold => Item::Associate { record, cache: false },
                    Purpose::Cache => Item::Associate { record, cache: true },
                    Purpose::Hint => Item::Hint { record },
                },
            );
        }
        if let Some((birth, idle_ms, at)) = self.touch {
            f(at, Item::Touch { key, birth, idle_ms });
        }
    }
}

/// `item`, whose idle time was read at `at`, as it is at `now`.
pub(super) fn aged_item(mut item: Item, at: Instant, now: Instant) -> Item {
    match &mut item {
        Item::Associate { record, .. } | Item::Hint { record } => {
            record.idle_ms = aged(record.idle_ms, at, now)
        }
        Item::Touch { idle_ms, .. } => *idle_ms = aged(*idle_ms, at, now),
        Item::End { .. } | Item::IdleQuery { .. } | Item::IdleReply { .. } => {}
    }
    item
}
