//! The host's flow table: sharded by flow hash, established flows bounded and never evicted, half-open ones in a table of their own.

use std::collections::VecDeque;
use std::num::NonZeroUsize;
use std::sync::{Mutex, MutexGuard, PoisonError};

use hashbrown::HashTable;
use hashbrown::hash_table::Entry;
use lru::LruCache;
use phalanx_flow::{FlowEntry, FlowKey, FlowState};

/// Shards of the table; a power of two, many more than forwarding threads, so that they seldom meet.
const SHARDS: usize = 64;

/// Limits of a [`FlowTable`].
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

type Slot = (FlowKey, u64, FlowEntry);

/// One share of the table.
#[derive(Debug)]
pub(crate) struct Shard {
    flows: HashTable<Slot>,
    half_open: HashTable<Slot>,
    /// Half-open flows in the order of their making; keys that have moved on are skipped.
    half_open_order: VecDeque<(FlowKey, u64)>,
    pub(crate) cache: LruCache<FlowKey, FlowEntry>,
    max_flows: usize,
    max_half_open: usize,
    /// Where the next scan for expired entries goes on.
    pub(crate) next_scan_ms: u64,
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
    fn new(limits: TableLimits) -> Self {
        let share = |total: usize| total.div_ceil(SHARDS).max(1);
        let cached = NonZeroUsize::new(share(limits.cached)).unwrap_or(NonZeroUsize::MIN);
        Self {
            flows: HashTable::new(),
            half_open: HashTable::new(),
            half_open_order: VecDeque::new(),
            cache: LruCache::new(cached),
            // A share may fill before the others: an eighth more room keeps the whole close to its limit.
            max_flows: share(limits.flows) + share(limits.flows) / 8,
            max_half_open: share(limits.half_open),
            next_scan_ms: 0,
        }
    }

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

    /// Asks the processor for the slots that may be this flow's, and does not wait for them: only their tags are read.
    fn prefetch(&self, hash: u64) {
        let none = self.flows.find(hash, |slot| {
            prefetch(slot);
            false
        });
        debug_assert!(none.is_none(), "nothing was looked for");
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
        if entry.flow_state() == FlowState::HalfOpen {
            return self.put_half_open(hash, key, entry);
        }
        if self.flows.len() >= self.max_flows {
            // What is half-open stays so: the flow goes on by the consistent choice.
            return Put::Full;
        }
        if let Ok(found) = self.half_open.find_entry(hash, same) {
            found.remove();
        }
        self.flows.insert_unique(hash, (key, hash, entry), |slot| slot.1);
        Put::Done
    }

    /// Overwrites the entry that was read under the same lock.
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

/// Brings a slot into the caches. Does nothing where the standard library offers no stable way.
#[inline(always)]
fn prefetch(slot: &Slot) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        let start = std::ptr::from_ref(slot).cast::<i8>();
        // Cache lines of 64 bytes; the last byte may lie in one more.
        for at in [0, 64, size_of::<Slot>() - 1] {
            // SAFETY: a hint, which reads nothing and cannot fault.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(start.wrapping_add(at)) };
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = slot;
}

/// Flow table, half-open table and cache of one member on the host.
#[derive(Debug)]
pub(crate) struct FlowTable {
    shards: Box<[Mutex<Shard>]>,
}

impl FlowTable {
    pub(crate) fn new(limits: TableLimits) -> Self {
        Self { shards: (0..SHARDS).map(|_| Mutex::new(Shard::new(limits))).collect() }
    }

    /// The share of a flow. The low bits choose rows and slots; the shard comes from others.
    pub(crate) fn shard(&self, hash: u64) -> MutexGuard<'_, Shard> {
        self.shards[(hash >> 24) as usize % SHARDS].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a lookup of this flow soon after cheaper. A share that is in use is left alone.
    #[inline]
    pub(crate) fn prefetch(&self, hash: u64) {
        if let Ok(shard) = self.shards[(hash >> 24) as usize % SHARDS].try_lock() {
            shard.prefetch(hash);
        }
    }

    pub(crate) fn shards(&self) -> impl Iterator<Item = MutexGuard<'_, Shard>> {
        self.shards.iter().map(|shard| shard.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
