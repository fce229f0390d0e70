//! Maps by flow, of which one may have an entry for every flow of a member.

use std::collections::HashMap;

use phalanx_flow::FlowKey;

/// A map by flow. The standard library's hash costs more than the rest of a lookup, and so much that the processor does not get to ask
/// memory for the next entry meanwhile. Each map has a secret of its own: clients choose their tuples, and must not find such that meet in
/// one place.
pub(crate) type FlowMap<V> = HashMap<FlowKey, V, foldhash::quality::RandomState>;
