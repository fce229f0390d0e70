//! The table of half-open flows: sets of a few, chosen by the flow's hash, in which the oldest gives way to a new one.
//!
//! Whoever changes a set has its lock; whoever reads has none, and knows by an entry's number whether it is whole
//! (docs/design/0010-half-open-table.md).

use core::arch::asm;

use phalanx_flow::{FlowEntry, FlowKey, FlowSeed, flow_hash};

use crate::abi::{CpuCounters, Header};
use crate::maps::HALF_OPEN;
use crate::sets::{Candidates, HalfOpenFlow, HalfOpenSet, Order, SET_FLOWS, set_of, tag_of};
use crate::tables::in_map;

/// How often a lock is asked for that another CPU has: some microseconds, where a change takes less than a tenth of one. A CPU that is kept
/// from running meanwhile, as virtual ones are, is not waited for; and the verifier follows each of the tries to the program's end.
const TRIES: u32 = 32;

/// What came of a flow that was to be recorded.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Put {
    /// It is recorded.
    Done,
    /// It was there already.
    Known,
    /// Another CPU had the set for too long.
    Busy,
}

/// What a change of an entry came to.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Changed {
    No,
    Yes,
    /// The flow is to be forgotten.
    Over,
    /// It is to be recorded like this, as the youngest.
    Anew(FlowEntry),
}

/// A set as one flow sees it.
struct Set {
    at: *mut HalfOpenSet,
    tag: u16,
    words: [u64; 5],
}

/// Writes a word, and says what was there. Nothing is moved across it, by the compiler or by the processor. In assembly, because Rust has
/// atomics of 64 bits alone for this target.
///
/// # Safety
/// The word may be written.
#[inline(always)]
unsafe fn exchange(place: *mut u32, value: u32) -> u32 {
    let mut value = value;
    // SAFETY: as the caller promises.
    unsafe { asm!("{0} = xchg32_32({1} + 0, {0})", inout(wreg) value, in(reg) place, options(nostack)) };
    value
}

/// Reads a word; nothing is moved across it either.
///
/// # Safety
/// The word is there, and may be written.
#[inline(always)]
unsafe fn read(place: *mut u32) -> u32 {
    let mut value = 0;
    // SAFETY: as the caller promises; nothing is added.
    unsafe {
        asm!("{0} = atomic_fetch_add((u32 *)({1} + 0), {0})", inout(wreg) value, in(reg) place, options(nostack));
    }
    value
}

/// The words of an entry, or of a key.
///
/// # Safety
/// It is there.
#[inline(always)]
unsafe fn load<T>(from: *const T) -> [u64; 5] {
    const { assert!(size_of::<T>() == 40 && align_of::<T>() == 8) };
    let from = from.cast::<u64>();
    // SAFETY: as the caller promises.
    let word = |place| unsafe { from.add(place).read_volatile() };
    [word(0), word(1), word(2), word(3), word(4)]
}

/// Writes them.
///
/// # Safety
/// It may be written.
#[inline(always)]
unsafe fn store<T>(to: *mut T, words: [u64; 5]) {
    const { assert!(size_of::<T>() == 40 && align_of::<T>() == 8) };
    for (place, word) in words.into_iter().enumerate() {
        // SAFETY: as the caller promises.
        unsafe { to.cast::<u64>().add(place).write_volatile(word) };
    }
}

impl Set {
    #[inline(always)]
    fn of(header: &Header, hash: u64, words: [u64; 5]) -> Option<Self> {
        let at = HALF_OPEN.get_ptr_mut(set_of(hash, header.half_open_sets))?;
        Some(Self { at, tag: tag_of(hash), words })
    }

    /// Takes the lock.
    #[inline(always)]
    fn lock(&self) -> bool {
        let mut tries = 0;
        while tries < TRIES {
            // SAFETY: the verifier knows where it points, here and below.
            if unsafe { exchange(&raw mut (*self.at).lock, 1) } == 0 {
                return true;
            }
            tries += 1;
        }
        false
    }

    /// Gives it back, after nothing was written or [`Self::put`], which ends with an [`exchange`], so that all that it wrote is there before.
    #[inline(always)]
    fn unlock(&self) {
        // SAFETY: as above.
        unsafe { (&raw mut (*self.at).lock).write_volatile(0) };
    }

    /// Gives it back, after all that was written.
    #[inline(always)]
    fn unlock_changed(&self) {
        // SAFETY: as above.
        unsafe { exchange(&raw mut (*self.at).lock, 0) };
    }

    #[inline(always)]
    fn number(&self, place: usize) -> *mut u32 {
        // SAFETY: within the set, as the callers see to.
        unsafe { (&raw mut (*self.at).numbers).cast::<u32>().add(place) }
    }

    #[inline(always)]
    fn flow(&self, place: usize) -> *mut HalfOpenFlow {
        // SAFETY: as above.
        unsafe { (&raw mut (*self.at).flows).cast::<HalfOpenFlow>().add(place) }
    }

    #[inline(always)]
    fn order(&self) -> Order {
        // SAFETY: as above.
        Order(unsafe { (*self.at).order } ^ Order::FIRST)
    }

    #[inline(always)]
    fn set_order(&self, order: Order) {
        // SAFETY: as above.
        unsafe { (*self.at).order = order.0 ^ Order::FIRST };
    }

    /// Where the flow may be.
    #[inline(always)]
    fn candidates(&self) -> Candidates {
        // SAFETY: as above; they stand at a multiple of eight.
        Candidates::new(unsafe { (&raw const (*self.at).tags).cast::<[u64; 2]>().read_volatile() }, self.tag)
    }

    #[inline(always)]
    fn has_key(&self, place: usize) -> bool {
        // SAFETY: as above.
        let there = unsafe { load(&raw const (*self.flow(place)).key) };
        // By hand: for arrays the compiler would call a function that compares bytes.
        let mut word = 0;
        while word < there.len() {
            if there[word] != self.words[word] {
                return false;
            }
            word += 1;
        }
        true
    }

    /// The flow's place. Needs the lock.
    #[inline(always)]
    fn place(&self) -> Option<usize> {
        let mut candidates = self.candidates();
        let mut tried = 0;
        while !candidates.is_empty() && tried < SET_FLOWS {
            let place = candidates.first();
            // SAFETY: as above.
            if unsafe { *self.number(place) } != 0 && self.has_key(place) {
                return Some(place);
            }
            candidates = candidates.rest();
            tried += 1;
        }
        None
    }

    /// Makes the place free. Needs the lock.
    #[inline(always)]
    fn take_out(&self, place: usize) {
        self.set_order(self.order().freed(place));
        // SAFETY: as above.
        unsafe { exchange(self.number(place), 0) };
    }

    /// Puts the flow where it is its turn. Needs the lock.
    #[inline(always)]
    fn put(&self, counters: &mut CpuCounters, entry: &FlowEntry) {
        let order = self.order();
        let place = order.next();
        self.set_order(order.taken());
        let number = self.number(place);
        // SAFETY: as above.
        unsafe {
            if *number != 0 {
                // Before anything of it is overwritten.
                exchange(number, 0);
                counters.half_open_evicted = counters.half_open_evicted.wrapping_add(1);
            }
            (&raw mut (*self.at).tags).cast::<u16>().add(place).write_volatile(self.tag);
            let flow = self.flow(place);
            store(&raw mut (*flow).key, self.words);
            store(&raw mut (*flow).entry, load(entry));
            let count = match (*self.at).count.wrapping_add(1) {
                0 => 1,
                count => count,
            };
            (*self.at).count = count;
            // After everything is written.
            exchange(number, count);
        }
    }
}

/// Records a flow, whose key is `words`, if it is not there.
#[inline(always)]
pub(crate) fn put_new(
    counters: &mut CpuCounters,
    header: &Header,
    hash: u64,
    words: [u64; 5],
    entry: &FlowEntry,
) -> Put {
    let Some(set) = Set::of(header, hash, words) else { return Put::Busy };
    if !set.lock() {
        return Put::Busy;
    }
    let put = if set.place().is_some() {
        Put::Known
    } else {
        set.put(counters, entry);
        Put::Done
    };
    set.unlock();
    put
}

/// What is known of a flow, whose key is in a map, and where that is.
#[inline(always)]
pub(crate) fn find(header: &Header, key: &FlowKey) -> Option<(FlowEntry, *mut FlowEntry)> {
    let set = Set::of(header, flow_hash(FlowSeed(header.seed), key), in_map(key))?;
    let mut candidates = set.candidates();
    let mut tried = 0;
    while !candidates.is_empty() && tried < SET_FLOWS {
        let place = candidates.first();
        // SAFETY: the verifier knows where it points.
        unsafe {
            let number = read(set.number(place));
            if number != 0 && set.has_key(place) {
                let entry = &raw mut (*set.flow(place)).entry;
                let words = load(entry);
                // Else it was pushed out meanwhile, or is another already.
                if read(set.number(place)) != number {
                    return None;
                }
                // SAFETY: numbers, of which every pattern is a value.
                return Some((core::mem::transmute::<[u64; 5], FlowEntry>(words), entry));
            }
        }
        candidates = candidates.rest();
        tried += 1;
    }
    None
}

/// Changes what is known of a flow, whose key is in memory, where no packet of another CPU can push it out meanwhile: `change` is given its
/// entry if there is one. Whether it was changed.
#[inline(always)]
pub(crate) fn change(
    counters: &mut CpuCounters,
    header: &Header,
    key: &FlowKey,
    change: impl FnOnce(Option<&mut FlowEntry>) -> Changed,
) -> bool {
    let Some(set) = Set::of(header, flow_hash(FlowSeed(header.seed), key), in_map(key)) else { return false };
    if !set.lock() {
        return false;
    }
    let place = set.place();
    // SAFETY: the verifier knows where it points; other CPUs write clock readings alone.
    let known = place.map(|place| unsafe { &mut (*set.flow(place)).entry });
    let seen_ms = known.as_ref().map_or(0, |entry| entry.last_seen_ms);
    let changed = change(known);
    if let Some(place) = place
        && matches!(changed, Changed::Over | Changed::Anew(_))
    {
        set.take_out(place);
    }
    if let Changed::Anew(mut entry) = changed {
        entry.last_seen_ms = entry.last_seen_ms.max(seen_ms);
        set.put(counters, &entry);
    }
    set.unlock_changed();
    !matches!(changed, Changed::No)
}

/// Records a flow, whose key is in memory, whatever is there; false: another CPU had the set for too long.
#[inline(always)]
pub(crate) fn put(counters: &mut CpuCounters, header: &Header, key: &FlowKey, entry: &FlowEntry) -> bool {
    change(counters, header, key, |_| Changed::Anew(*entry))
}

/// Forgets a flow, whose key is in memory.
#[inline(always)]
pub(crate) fn remove(counters: &mut CpuCounters, header: &Header, key: &FlowKey) {
    change(counters, header, key, |known| if known.is_some() { Changed::Over } else { Changed::No });
}
