//! What waits to be sent to one peer, one slot per flow.
//!
//! However long a peer is away, a flow takes one slot: a later record replaces an earlier one of the same flow, an end takes the
//! record it ends with it, and an end is sent before the record of the flow's next life.

use std::collections::VecDeque;
use std::collections::hash_map::Entry;
use std::time::Instant;

use phalanx_flow::{FlowKey, Record};

use super::aged;
use crate::codec::Item;
use crate::flow_map::FlowMap;

/// What is to be told of one flow, in this order.
#[derive(Debug, Default)]
struct Slot {
    end: Option<End>,
    associate: Option<Associate>,
    /// Birth and when a packet was seen, as idle milliseconds at a time.
    touch: Option<(u64, u32, Instant)>,
}

#[derive(Clone, Copy, Debug)]
struct End {
    birth: u64,
    /// When a packet was seen, as idle milliseconds at a time.
    idle_ms: u32,
    at: Instant,
    cache: bool,
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
    slots: FlowMap<Slot>,
    order: VecDeque<FlowKey>,
    capacity: usize,
}

impl Outbox {
    pub(super) fn new(capacity: usize) -> Self {
        Self { slots: FlowMap::default(), order: VecDeque::new(), capacity }
    }

    /// How many flows wait.
    pub(super) fn len(&self) -> usize {
        self.slots.len()
    }

    /// Everything that is kept.
    pub(super) fn remembered(&self) -> usize {
        self.slots.len() + self.order.len()
    }

    /// The records that wait to be held by the peer.
    pub(super) fn records(&self) -> impl Iterator<Item = &Record> {
        let waiting = self.slots.values().filter_map(|slot| slot.associate.as_ref());
        waiting.filter(|waiting| waiting.purpose == Purpose::Hold).map(|waiting| &waiting.record)
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
        newer.for_each_item(*item.key(), |at, item| slot.merge(at, item));
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
            slot.for_each_item(key, |at, item| items.push(aged_item(item, at, now)));
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
            Item::End { birth, idle_ms, cache, .. } => {
                self.drop_life(birth);
                let new = End { birth, idle_ms, at, cache };
                self.end = Some(match self.end {
                    Some(known) if known.birth > birth => End { cache: known.cache && cache, ..known },
                    Some(known) => End { cache: known.cache && cache, ..new },
                    None => new,
                });
            }
            Item::Touch { birth, idle_ms, .. } => self.touch = Some((birth, idle_ms, at)),
            // Questions and answers have a queue of their own: they are not worth repeating.
            Item::IdleQuery { .. } | Item::IdleReply { .. } => {}
        }
    }

    fn associate(&mut self, new: Associate) {
        let birth = new.record.birth;
        if birth != 0 && self.end.is_some_and(|end| birth <= end.birth) {
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
    fn for_each_item(self, key: FlowKey, mut f: impl FnMut(Instant, Item)) {
        if let Some(End { birth, idle_ms, at, cache }) = self.end {
            f(at, Item::End { key, birth, idle_ms, cache });
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
        Item::Touch { idle_ms, .. } | Item::End { idle_ms, .. } => *idle_ms = aged(*idle_ms, at, now),
        Item::IdleQuery { .. } | Item::IdleReply { .. } => {}
    }
    item
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::testing::{epoch, key, record};

    fn associate(n: u16, birth: u64, update: u32) -> Item {
        let mut record = record(n, 1);
        (record.birth, record.update) = (birth, update);
        Item::Associate { record, cache: false }
    }

    fn end(n: u16, birth: u64) -> Item {
        Item::End { key: key(n), birth, idle_ms: 0, cache: false }
    }

    fn outbox(items: &[Item]) -> (Instant, Outbox) {
        let now = epoch();
        let mut outbox = Outbox::new(10);
        for &item in items {
            assert!(outbox.push(now, item));
        }
        (now, outbox)
    }

    #[test]
    fn a_later_record_replaces_an_earlier_one_and_not_the_other_way_round() {
        for items in [[associate(1, 5, 1), associate(1, 5, 2)], [associate(1, 5, 2), associate(1, 5, 1)]] {
            let (now, mut outbox) = outbox(&items);
            assert_eq!(outbox.take(now, 100), [associate(1, 5, 2)]);
        }
    }

    #[test]
    fn an_end_takes_the_life_it_ends_and_goes_before_the_next() {
        let (now, mut outbox) =
            outbox(&[associate(1, 5, 1), end(1, 5), associate(1, 5, 2), associate(1, 6, 0)]);
        assert_eq!(outbox.take(now, 100), [end(1, 5), associate(1, 6, 0)]);
    }

    #[test]
    fn a_record_of_an_ended_life_is_not_taken_after_its_end() {
        let (now, mut outbox) = outbox(&[end(1, 5), associate(1, 5, 2)]);
        assert_eq!(outbox.take(now, 100), [end(1, 5)]);
    }

    #[test]
    fn what_comes_back_unacknowledged_goes_first_and_overwrites_nothing_said_since() {
        let (now, mut outbox) = outbox(&[associate(1, 5, 3), associate(3, 5, 1), end(4, 5)]);
        // In the order in which a lost connection gives them back: last sent, first back.
        for item in [associate(4, 5, 2), associate(1, 5, 2), associate(2, 5, 1)] {
            outbox.push_back_unacknowledged(now, item);
        }
        let sent = outbox.take(now, 100);
        assert_eq!(sent, [associate(2, 5, 1), associate(1, 5, 3), associate(3, 5, 1), end(4, 5)]);
    }

    #[test]
    fn an_end_that_comes_back_does_not_take_the_next_life_with_it() {
        let (now, mut outbox) = outbox(&[associate(1, 6, 1)]);
        outbox.push_back_unacknowledged(now, end(1, 5));
        outbox.push_back_unacknowledged(now, associate(1, 5, 4));
        assert_eq!(outbox.take(now, 100), [end(1, 5), associate(1, 6, 1)]);
    }

    #[test]
    fn to_hold_a_record_goes_before_to_cache_it_and_both_before_a_hint() {
        let Item::Associate { record, .. } = associate(1, 5, 1) else { unreachable!("an association") };
        let cache = Item::Associate { record, cache: true };
        let hint = Item::Hint { record: Record { birth: 0, ..record } };
        for items in [[hint, cache, associate(1, 5, 1)], [associate(1, 5, 1), hint, cache]] {
            let (now, mut outbox) = outbox(&items);
            assert_eq!(outbox.take(now, 100), [associate(1, 5, 1)]);
        }
        let (now, mut outbox) = outbox(&[hint]);
        assert_eq!(outbox.take(now, 100), [hint], "the twin: alone it is sent");
    }

    #[test]
    fn records_age_while_they_wait() {
        let (now, mut outbox) =
            outbox(&[associate(1, 5, 1), Item::Touch { key: key(2), birth: 5, idle_ms: 7 }]);
        let sent = outbox.take(now + Duration::from_millis(1_500), 100);
        assert!(matches!(sent[0], Item::Associate { record, .. } if record.idle_ms == 1_500));
        assert!(matches!(sent[1], Item::Touch { idle_ms: 1_507, .. }));
    }

    #[test]
    fn a_full_outbox_takes_nothing_of_new_flows_and_all_of_old_ones() {
        let items: Vec<_> = (0..10).map(|n| associate(n, 5, 1)).collect();
        let (now, mut outbox) = outbox(&items);
        assert!(!outbox.push(now, associate(10, 5, 1)));
        assert!(outbox.push(now, associate(9, 5, 2)));
        assert_eq!(outbox.take(now, 6).len(), 4, "room is kept for a slot's three items");
        assert!(outbox.push(now, associate(10, 5, 1)));
    }
}
