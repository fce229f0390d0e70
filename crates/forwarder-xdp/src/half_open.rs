//! The table of half-open flows as user space has it: mapped into its memory to be read, and changed by the program alone.
//!
//! So a daemon that is killed leaves no lock behind, and a search of the table is no call of the kernel.

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering, fence};

use aya::maps::MapData;
use phalanx_flow::{FlowEntry, FlowKey, FlowSeed, flow_hash};

use crate::abi::{Change, change};
use crate::apply::Apply;
use crate::maps::Flows;
use crate::sets::{HalfOpenFlow, HalfOpenSet, SET_FLOWS, set_of, tag_of};

/// Sets in one share of a search.
const BATCH: u32 = 512;
/// How often an entry is read that changes meanwhile: a packet takes less than a microsecond for a change, and a place has its turn only
/// after seven others.
const TRIES: u32 = 16;

/// The table.
#[derive(Debug)]
pub(crate) struct HalfOpen {
    table: NonNull<HalfOpenSet>,
    sets: u32,
    seed: FlowSeed,
    apply: Arc<Apply>,
}

// SAFETY: it is memory that the kernel keeps, and every access to it is atomic.
unsafe impl Send for HalfOpen {}
// SAFETY: as above.
unsafe impl Sync for HalfOpen {}

impl HalfOpen {
    /// Maps it. `seed` is that of the hash by which flows are found.
    pub(crate) fn open(map: &MapData, seed: FlowSeed, apply: Arc<Apply>) -> io::Result<Self> {
        let info = map.info().map_err(io::Error::other)?;
        if info.key_size() != 4 || info.value_size() as usize != size_of::<HalfOpenSet>() {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "keys or values of another size"));
        }
        let sets = info.max_entries();
        // SAFETY: a mapping of a place that the kernel chooses touches nothing of ours.
        let table = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size_of::<HalfOpenSet>() * sets as usize,
                libc::PROT_READ,
                libc::MAP_SHARED,
                map.fd().as_fd().as_raw_fd(),
                0,
            )
        };
        if table == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let table = NonNull::new(table.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { table, sets, seed, apply })
    }

    /// Sets of the table.
    pub(crate) fn sets(&self) -> u32 {
        self.sets
    }

    fn set(&self, number: u32) -> *mut HalfOpenSet {
        debug_assert!(number < self.sets);
        // SAFETY: within the mapping.
        unsafe { self.table.as_ptr().add(number as usize) }
    }

    /// What is at a place of a set, whole: its number is the same before and after.
    fn read(&self, set: *mut HalfOpenSet, place: usize) -> Option<HalfOpenFlow> {
        const { assert!(size_of::<HalfOpenFlow>() == 80 && align_of::<HalfOpenFlow>() == 8) };
        // SAFETY: within the set, whose words the program writes one by one. Relaxed loads are allowed where nothing can be written.
        let (number, words) = unsafe {
            let number = AtomicU32::from_ptr((&raw mut (*set).numbers).cast::<u32>().add(place));
            (number, (&raw mut (*set).flows).cast::<HalfOpenFlow>().add(place).cast::<u64>())
        };
        for _ in 0..TRIES {
            let before = number.load(Ordering::Relaxed);
            if before == 0 {
                return None;
            }
            fence(Ordering::Acquire);
            // SAFETY: as above.
            let read: [u64; 10] = std::array::from_fn(|word| unsafe {
                AtomicU64::from_ptr(words.add(word)).load(Ordering::Relaxed)
            });
            fence(Ordering::Acquire);
            if number.load(Ordering::Relaxed) == before {
                // SAFETY: numbers, of which every pattern is a value, and as many bytes.
                return Some(unsafe { std::mem::transmute::<[u64; 10], HalfOpenFlow>(read) });
            }
        }
        None
    }

    fn make(&self, change: Change) -> bool {
        self.apply.make(&[change]) == [true]
    }
}

impl Drop for HalfOpen {
    fn drop(&mut self) {
        // SAFETY: nobody has a reference into it.
        unsafe {
            libc::munmap(self.table.as_ptr().cast(), size_of::<HalfOpenSet>() * self.sets as usize);
        }
    }
}

impl Flows for HalfOpen {
    fn get(&self, key: &FlowKey) -> io::Result<Option<FlowEntry>> {
        let hash = flow_hash(self.seed, key);
        let set = self.set(set_of(hash, self.sets));
        let found = (0..SET_FLOWS).find_map(|place| {
            // SAFETY: as in `read`.
            let tag = unsafe { AtomicU16::from_ptr((&raw mut (*set).tags).cast::<u16>().add(place)) };
            if tag.load(Ordering::Relaxed) != tag_of(hash) {
                return None;
            }
            self.read(set, place).filter(|flow| flow.key == *key)
        });
        Ok(found.map(|flow| flow.entry))
    }

    fn put(&self, key: &FlowKey, entry: &FlowEntry) -> io::Result<()> {
        let put = Change {
            update: entry.update,
            birth: entry.birth,
            seen_ms: entry.last_seen_ms,
            reported_ms: entry.last_reported_ms,
            backend: entry.backend.0,
            flags: u32::from(entry.flags.0),
            ..Change::new(change::PUT, key)
        };
        if self.make(put) { Ok(()) } else { Err(io::ErrorKind::ResourceBusy.into()) }
    }

    fn delete(&self, key: &FlowKey) -> io::Result<bool> {
        Ok(self.make(Change::new(change::TAKE_OUT, key)))
    }

    fn batch(
        &self,
        cursor: Option<u32>,
        show: &mut dyn FnMut(&FlowKey, &FlowEntry),
    ) -> io::Result<Option<u32>> {
        let first = cursor.unwrap_or(0).min(self.sets);
        let end = first.saturating_add(BATCH).min(self.sets);
        for number in first..end {
            for place in 0..SET_FLOWS {
                if let Some(flow) = self.read(self.set(number), place) {
                    show(&flow.key, &flow.entry);
                }
            }
        }
        Ok((end < self.sets).then_some(end))
    }
}
