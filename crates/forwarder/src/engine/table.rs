//! The host's flow table: sharded by flow hash, established flows bounded and never evicted, half-open ones in a table of their own.

use std::collections::VecDeque;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hashbrown::HashTable;
use hashbrown::hash_table::Entry;
use lru::LruCache;
use phalanx_flow::{FlowEntry, FlowKey, FlowState};

use super::ahead::GROUP;
use super::pages::Pages;

/// Shards of the table; a power of two, many more than forwarding threads, so that they seldom meet.
const SHARDS: usize = 64;

/// Room for fewer flows than this is made at once: some milliseconds.
const MUCH_ROOM: usize = 1 << 16;

/// Limits of a table of flows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TableLimits {
    /// Flows, half-open ones not counted.
    pub flows: usize,
    /// Half-open flows; the oldest give way.
    pub half_open: usize,
    /// Cache entries; the least recently used give way.
    pub cached: usize,
}

impl Default for TableLimits {
    fn default() -> Self {
        Self { flows: 1 << 20, half_open: 1 << 16, cached: 1 << 18 }
    }
}

/// Bytes that memory is asked for at once.
const CACHE_LINE: usize = 64;

type Slot = (FlowKey, u64, FlowEntry);

/// One share of the table.
#[derive(Debug)]
pub(crate) struct Shard {
    flows: HashTable<Slot, Pages>,
    half_open: HashTable<Slot, Pages>,
    /// Half-open flows in the order of their making; keys that have moved on are skipped.
    half_open_order: VecDeque<(FlowKey, u64)>,
    pub(crate) cache: LruCache<FlowKey, FlowEntry>,
    max_flows: usize,
    max_half_open: usize,
    /// Where the next scan for expired entries goes on.
    pub(crate) next_scan_ms: u64,
    /// Flows for which there is to be room before the next is written.
    wanted: usize,
    /// What [`Self::tags`] said last, for hints; as many tags as there were then.
    known_tags: (usize, usize),
}

/// What became of a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Put {
    Done,
    /// Done, and an older half-open flow gave way.
    Evicted,
    /// The table is full.
    Full,
}

impl Shard {
    fn new(limits: TableLimits, pages: &Pages) -> Self {
        let share = |total: usize| total.div_ceil(SHARDS).max(1);
        let cached = NonZeroUsize::new(share(limits.cached)).unwrap_or(NonZeroUsize::MIN);
        Self {
            flows: HashTable::new_in(pages.clone()),
            half_open: HashTable::new_in(pages.clone()),
            half_open_order: VecDeque::new(),
            cache: LruCache::new(cached),
            // A share may fill before the others: an eighth more room keeps the whole close to its limit.
            max_flows: share(limits.flows) + share(limits.flows) / 8,
            max_half_open: share(limits.half_open),
            next_scan_ms: 0,
            wanted: 0,
            known_tags: (0, 0),
        }
    }

    /// Makes the room that is wanted, if it is not made yet.
    fn make_room(&mut self) {
        let room = std::mem::take(&mut self.wanted).min(self.max_flows.saturating_sub(self.flows.len()));
        self.flows.reserve(room, |slot| slot.1);
    }

    #[inline]
    pub(crate) fn get(&self, hash: u64, key: &FlowKey) -> Option<&FlowEntry> {
        let same = |slot: &Slot| slot.0 == *key;
        self.flows.find(hash, same).or_else(|| self.half_open.find(hash, same)).map(|slot| &slot.2)
    }

    pub(crate) fn get_mut(&mut self, hash: u64, key: &FlowKey) -> Option<&mut FlowEntry> {
        let same = |slot: &Slot| slot.0 == *key;
        if let Some(slot) = self.flows.find_mut(hash, same) {
            return Some(&mut slot.2);
        }
        self.half_open.find_mut(hash, same).map(|slot| &mut slot.2)
    }

    /// Notes which slots may be this flow's: only their tags are read.
    #[inline]
    fn locate(&self, hash: u64, found: &mut Whereabouts) {
        let none = self.flows.find(hash, |slot| {
            found.push(slot);
            false
        });
        debug_assert!(none.is_none(), "nothing was looked for");
    }

    /// Where the tags of the table start, as an address, and how many there are less one.
    #[cold]
    fn tags(&self) -> Option<(usize, usize)> {
        Some((self.tags_beside(self.flows.iter().next()?)?, self.flows.num_buckets() - 1))
    }

    /// Where the tags start, by one slot of the table: slots lie in front of the tags, the first one last. Were the library to lay its
    /// tables out in another way, memory would be asked for what nobody needs, and no more.
    fn tags_beside(&self, slot: &Slot) -> Option<usize> {
        let index = self.flows.find_bucket_index(slot.1, |other| std::ptr::eq(slot, other))?;
        Some(std::ptr::from_ref(slot).addr() + (index + 1) * size_of::<Slot>())
    }

    /// Asks for the memory that writes of these flows are about to need: the tags, and the slots where new ones will most likely be. Without
    /// that each waits for it twice, one after the other.
    pub(crate) fn prefetch_for_writes(&mut self, hashes: impl Iterator<Item = u64>) {
        self.make_room();
        let buckets = self.flows.num_buckets();
        if buckets != self.known_tags.1 {
            let Some((tags, _)) = self.tags() else { return };
            self.known_tags = (tags, buckets);
        }
        let (tags, buckets) = self.known_tags;
        for hash in hashes {
            let index = hash as usize & (buckets - 1);
            prefetch(tags.wrapping_add(index));
            // The slot and the next one, which lies in front of it.
            let end = tags.wrapping_sub(index * size_of::<Slot>());
            for line in 0..=2 * size_of::<Slot>() / CACHE_LINE {
                prefetch(end.wrapping_sub(1 + line * CACHE_LINE));
            }
        }
    }

    /// Writes an entry where its state belongs.
    pub(crate) fn put(&mut self, hash: u64, key: FlowKey, entry: FlowEntry) -> Put {
        let same = |slot: &Slot| slot.0 == key;
        if let Ok(found) = self.flows.find_entry(hash, same) {
            if entry.flow_state() != FlowState::HalfOpen {
                found.into_mut().2 = entry;
                return Put::Done;
            }
            found.remove();
        }
        if entry.flow_state() != FlowState::HalfOpen
            && self.flows.len() < self.max_flows
            && let Ok(found) = self.half_open.find_entry(hash, same)
        {
            found.remove();
        }
        self.insert(hash, key, entry)
    }

    /// Writes the entry of a flow that has none, or a half-open one of a flow that stays so.
    pub(crate) fn insert(&mut self, hash: u64, key: FlowKey, entry: FlowEntry) -> Put {
        if entry.flow_state() == FlowState::HalfOpen {
            return self.put_half_open(hash, key, entry);
        }
        if self.flows.len() >= self.max_flows {
            // What is half-open stays so: the flow goes on by the consistent choice.
            return Put::Full;
        }
        self.flows.insert_unique(hash, (key, hash, entry), |slot| slot.1);
        Put::Done
    }

    /// Overwrites the entry that was read under the same lock.
    #[inline]
    pub(crate) fn update(&mut self, hash: u64, key: FlowKey, entry: FlowEntry) -> Put {
        let same = |slot: &Slot| slot.0 == key;
        if entry.flow_state() != FlowState::HalfOpen
            && let Some(slot) = self.flows.find_mut(hash, same)
        {
            slot.2 = entry;
            return Put::Done;
        }
        self.put(hash, key, entry)
    }

    fn put_half_open(&mut self, hash: u64, key: FlowKey, entry: FlowEntry) -> Put {
        match self.half_open.entry(hash, |slot| slot.0 == key, |slot| slot.1) {
            Entry::Occupied(mut found) => {
                found.get_mut().2 = entry;
                return Put::Done;
            }
            Entry::Vacant(free) => {
                free.insert((key, hash, entry));
            }
        }
        self.half_open_order.push_back((key, hash));
        let mut evicted = false;
        while self.half_open.len() > self.max_half_open {
            let Some((oldest, hash)) = self.half_open_order.pop_front() else { break };
            if let Ok(found) = self.half_open.find_entry(hash, |slot| slot.0 == oldest) {
                found.remove();
                evicted = true;
            }
        }
        if self.half_open_order.len() > 2 * self.max_half_open + 64 {
            let half_open = &self.half_open;
            self.half_open_order.retain(|(key, hash)| half_open.find(*hash, |slot| slot.0 == *key).is_some());
        }
        if evicted { Put::Evicted } else { Put::Done }
    }

    pub(crate) fn remove(&mut self, hash: u64, key: &FlowKey) -> Option<FlowEntry> {
        for table in [&mut self.flows, &mut self.half_open] {
            if let Ok(found) = table.find_entry(hash, |slot| slot.0 == *key) {
                return Some(found.remove().0.2);
            }
        }
        None
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&FlowKey, u64, &FlowEntry)> {
        self.flows.iter().chain(self.half_open.iter()).map(|(key, hash, entry)| (key, *hash, entry))
    }

    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = (&FlowKey, u64, &mut FlowEntry)> {
        self.flows.iter_mut().chain(self.half_open.iter_mut()).map(|(key, hash, entry)| (&*key, *hash, entry))
    }

    pub(crate) fn len(&self) -> (usize, usize, usize) {
        (self.flows.len(), self.half_open.len(), self.cache.len())
    }
}

/// The place of a flow in a list, and its hash.
type Place = (usize, u64);

/// Places in a list of flows, share by share, in their order within each.
#[derive(Debug)]
pub(crate) struct ByShare {
    places: Vec<Place>,
    /// Where the places of each share end.
    ends: [usize; SHARDS],
    next: usize,
}

impl ByShare {
    /// Sorts flows by their hashes.
    pub(crate) fn new(hashes: impl ExactSizeIterator<Item = u64>) -> Self {
        let hashes: Vec<u64> = hashes.collect();
        let mut counts = [0; SHARDS];
        for hash in &hashes {
            counts[share_of(*hash)] += 1;
        }
        let mut ends = [0; SHARDS];
        let mut total = 0;
        for (end, count) in ends.iter_mut().zip(counts) {
            // Where they begin, until they are put there.
            *end = total;
            total += count;
        }
        let mut places = vec![(0, 0); hashes.len()];
        for (place, hash) in hashes.into_iter().enumerate() {
            let end = &mut ends[share_of(hash)];
            places[*end] = (place, hash);
            *end += 1;
        }
        Self { places, ends, next: 0 }
    }

    /// The next share that has any, locked, with theirs.
    pub(crate) fn next_share<'t>(
        &mut self,
        table: &'t FlowTable,
    ) -> Option<(MutexGuard<'t, Shard>, &[Place])> {
        let start = self.next.checked_sub(1).map_or(0, |before| self.ends[before]);
        self.next += 1 + self.ends[self.next..].iter().position(|end| *end > start)?;
        let places = &self.places[start..self.ends[self.next - 1]];
        Some((table.shard(places.first()?.1), places))
    }
}

/// The low bits choose rows and slots; the share comes from others.
#[inline]
fn share_of(hash: u64) -> usize {
    (hash >> 24) as usize % SHARDS
}

/// Where entries that are needed soon may be.
#[derive(Debug)]
pub(crate) struct Whereabouts {
    slots: [*const Slot; 2 * GROUP],
    count: usize,
}

impl Default for Whereabouts {
    fn default() -> Self {
        Self { slots: [std::ptr::null(); 2 * GROUP], count: 0 }
    }
}

impl Whereabouts {
    /// One flow may have several tags like its own beside it, but not many flows do: what is too much is left out.
    #[inline]
    fn push(&mut self, slot: &Slot) {
        if let Some(place) = self.slots.get_mut(self.count) {
            *place = slot;
            self.count += 1;
        }
    }

    #[inline]
    fn prefetch(&mut self) {
        for slot in &self.slots[..self.count] {
            // The last byte may lie in one more.
            for at in [0, CACHE_LINE, size_of::<Slot>() - 1] {
                prefetch(slot.addr() + at);
            }
        }
        self.count = 0;
    }
}

/// Brings the cache line of an address into the caches. Does nothing where the standard library offers no stable way.
#[inline(always)]
fn prefetch(address: usize) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a hint, which reads nothing and cannot fault, whatever the address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(std::ptr::without_provenance(address)) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}

/// A shard, and what is known of its memory without the lock.
#[derive(Debug)]
struct Share {
    /// Address of the tags, and their number less one; as they were at some time, for hints.
    tags: AtomicUsize,
    tag_mask: AtomicUsize,
    shard: Mutex<Shard>,
}

impl Share {
    fn lock(&self) -> MutexGuard<'_, Shard> {
        self.shard.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Flow table, half-open table and cache of one member on the host.
#[derive(Debug)]
pub(crate) struct FlowTable {
    shards: Arc<[Share]>,
    /// Threads that make room.
    making_room: Arc<AtomicUsize>,
}

impl FlowTable {
    pub(crate) fn new(limits: TableLimits) -> Self {
        let pages = Pages::default();
        let share = || Share {
            tags: AtomicUsize::new(0),
            tag_mask: AtomicUsize::new(0),
            shard: Mutex::new(Shard::new(limits, &pages)),
        };
        Self { shards: (0..SHARDS).map(|_| share()).collect(), making_room: Arc::default() }
    }

    #[inline]
    fn share(&self, hash: u64) -> &Share {
        &self.shards[share_of(hash)]
    }

    /// The share of a flow.
    #[inline]
    pub(crate) fn shard(&self, hash: u64) -> MutexGuard<'_, Shard> {
        self.share(hash).lock()
    }

    /// Asks for the tags among which those of this flow are.
    #[inline]
    pub(crate) fn prefetch_tags(&self, hash: u64) {
        let share = self.share(hash);
        let mask = share.tag_mask.load(Ordering::Relaxed);
        prefetch(share.tags.load(Ordering::Relaxed).wrapping_add(hash as usize & mask));
    }

    /// Makes lookups of these flows soon after cheaper. Shares that are in use are left alone.
    #[inline]
    pub(crate) fn prefetch_entries(&self, hashes: &[u64], found: &mut Whereabouts) {
        for hash in hashes {
            let share = self.share(*hash);
            if let Ok(shard) = share.shard.try_lock() {
                if shard.flows.num_buckets() != share.tag_mask.load(Ordering::Relaxed) + 1
                    && let Some((tags, mask)) = shard.tags()
                {
                    share.tags.store(tags, Ordering::Relaxed);
                    share.tag_mask.store(mask, Ordering::Relaxed);
                }
                shard.locate(*hash, found);
            }
        }
        // Only now: a lock makes the processor wait for what it asked for before.
        found.prefetch();
    }

    /// Makes room for so many flows more, in all shares together. Much of it is made by another thread, or share by share by whoever
    /// writes to one first: the kernel clears some 190 MB for a million flows, and the caller has other things to do.
    pub(crate) fn make_room(&self, flows: usize) {
        let share = flows.div_ceil(SHARDS);
        for mut shard in self.shards() {
            // No two get the same number.
            shard.wanted = share + share / 16;
        }
        let shares = Arc::clone(&self.shards);
        let make = move || shares.iter().for_each(|share| share.lock().make_room());
        if flows < MUCH_ROOM {
            return make();
        }
        let making = Arc::clone(&self.making_room);
        making.fetch_add(1, Ordering::Relaxed);
        let thread = std::thread::Builder::new().name("make room".to_owned()).spawn(move || {
            make();
            making.fetch_sub(1, Ordering::Release);
        });
        if thread.is_err() {
            // Then it is made share by share.
            self.making_room.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// Whether no thread makes room.
    pub(crate) fn has_room(&self) -> bool {
        self.making_room.load(Ordering::Acquire) == 0
    }

    pub(crate) fn shards(&self) -> impl Iterator<Item = MutexGuard<'_, Shard>> {
        self.shards.iter().map(Share::lock)
    }
}

#[cfg(test)]
mod tests {
    use phalanx_flow::BackendIndex;
    use phalanx_flow::decide::Decision;

    use super::*;

    #[test]
    fn who_makes_room_needs_no_more_while_the_flows_come_and_no_more_than_the_limit() {
        let limits = TableLimits { flows: 64_000, ..TableLimits::default() };
        let table = FlowTable::new(limits);
        let room = || table.shards().map(|shard| shard.flows.capacity()).sum::<usize>();
        assert_eq!(room(), 0);
        table.make_room(40_000);
        let made = room();
        assert!(made >= 40_000, "{made}");
        let entry = FlowEntry { state: FlowState::Established as u8, ..Decision::PASS.entry };
        for number in 0..40_000_u64 {
            let key = FlowKey {
                source_port: (number as u16).to_be_bytes(),
                protocol: (number >> 16) as u8,
                ..Decision::PASS.key
            };
            let hash = number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
            assert_eq!(table.shard(hash).put(hash, key, entry), Put::Done);
        }
        assert_eq!(room(), made);
        // A word of others is no reason to take memory that would never be used.
        table.make_room(1 << 30);
        assert!(room() < 4 * limits.flows, "{}", room());
    }

    #[test]
    fn much_room_is_made_by_somebody_else_or_with_the_first_write() {
        let limits = TableLimits { flows: 1 << 20, ..TableLimits::default() };
        let table = FlowTable::new(limits);
        assert!(table.has_room());
        table.make_room(MUCH_ROOM);
        let (share, hash) = (MUCH_ROOM / SHARDS, 5);
        let mut shard = table.shard(hash);
        shard.prefetch_for_writes(std::iter::once(hash));
        assert!(shard.flows.capacity() >= share, "{}", shard.flows.capacity());
        drop(shard);
        while !table.has_room() {
            std::thread::yield_now();
        }
        assert!(table.shards().all(|shard| shard.flows.capacity() >= share));
    }

    #[test]
    fn all_slots_agree_on_where_the_tags_are() {
        let mut shard = Shard::new(TableLimits::default(), &Pages::default());
        assert_eq!(shard.tags(), None);
        let entry = FlowEntry {
            backend: BackendIndex(1),
            state: FlowState::Established as u8,
            ..Decision::PASS.entry
        };
        for number in 0..3_000_u64 {
            let key = FlowKey { source_port: (number as u16).to_be_bytes(), ..Decision::PASS.key };
            let put = shard.put(number.wrapping_mul(0x9e37_79b9_7f4a_7c15), key, entry);
            assert_eq!(put, Put::Done);
        }
        let (tags, mask) = shard.tags().expect("a table with flows");
        assert_eq!(mask, 4095);
        assert!(shard.flows.iter().all(|slot| shard.tags_beside(slot) == Some(tags)));
    }
}
