//! The table of flows that are not half-open: one map for each family.

use phalanx_flow::{FlowEntry, FlowKey};

use crate::abi::Key4;
use crate::maps::{FLOWS4, FLOWS6};
use crate::tables::{Aligned, in_map};

/// Flags of an update: whatever is there.
const ANY: u64 = 0;

/// The key of a flow of IPv4, of the words of its [`FlowKey`]: the addresses are the last four bytes of mapped ones.
#[inline(always)]
fn key4(words: [u64; 5]) -> Aligned<[u64; 2]> {
    let [_, source, _, destination, ends] = words;
    Aligned([(source >> 32) | (destination & (u64::MAX << 32)), ends & 0xff_ffff_ffff])
}

#[inline(always)]
fn short(words: &Aligned<[u64; 2]>) -> &Key4 {
    // SAFETY: as many bytes as a key has, and every pattern of them is one.
    unsafe { &*core::ptr::from_ref(words).cast::<Key4>() }
}

/// Where the entry of a flow is, whose key is in registers.
#[inline(always)]
pub(crate) fn find(family: u8, words: [u64; 5]) -> Option<*mut FlowEntry> {
    if family == 4 {
        return FLOWS4.get_ptr_mut(short(&key4(words)));
    }
    let aligned = Aligned(words);
    // SAFETY: as many bytes as a key has.
    FLOWS6.get_ptr_mut(unsafe { &*(&raw const aligned).cast::<FlowKey>() })
}

/// The same of a key that lies in a map.
#[inline(always)]
pub(crate) fn find_in_map(key: &FlowKey) -> Option<*mut FlowEntry> {
    if key.family == 4 { FLOWS4.get_ptr_mut(short(&key4(in_map(key)))) } else { FLOWS6.get_ptr_mut(key) }
}

/// Records a flow, whose key is in a map; false: the table is full.
#[inline(always)]
pub(crate) fn insert(key: &FlowKey, entry: &FlowEntry) -> bool {
    if key.family == 4 {
        FLOWS4.insert(short(&key4(in_map(key))), entry, ANY).is_ok()
    } else {
        FLOWS6.insert(key, entry, ANY).is_ok()
    }
}

/// Forgets a flow, whose key is in a map; whether it was there.
#[inline(always)]
pub(crate) fn remove(key: &FlowKey) -> bool {
    if key.family == 4 {
        FLOWS4.remove(short(&key4(in_map(key)))).is_ok()
    } else {
        FLOWS6.remove(key).is_ok()
    }
}
