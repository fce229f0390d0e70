//! The short ways: what [`decide`](super::decide) says of most packets, made of the same pieces with the rest left out.
//!
//! Each says the same as the whole, or nothing; then the whole is asked.

use super::{Began, ServiceMatch, Tables, advance, is_unreported, picked};
use crate::entry::{BackendIndex, FlowEntry, FlowFlags, FlowState};
use crate::hash::flow_hash;
use crate::packet::{Fragment, Packet, PacketKind};

/// The way of most packets: an established flow of the flow table, whose packet changes nothing but when it was last seen.
///
/// What [`decide`](super::decide) says of a packet from the wire, wherever this is not `None`: a verdict to forward to this backend, the outcome
/// [`Outcome::Hit`](super::Outcome::Hit), [`Action::Update`](super::Action::Update) with `last_seen_ms` of now, and nothing else. It is made of the same pieces, and reads a row
/// only when [`Hit::is_known_to_owner`]. `None` says nothing.
#[inline(always)]
pub fn hit<T: Tables>(packet: &Packet, tables: &T) -> Option<Hit> {
    if !matches!(packet.kind, PacketKind::Tcp { .. } | PacketKind::Datagram)
        || !matches!(packet.fragment, Fragment::Whole)
    {
        return None;
    }
    let ServiceMatch::Service(service) = tables.service(&packet.key) else { return None };
    let entry = tables.flow(&packet.key)?;
    let local = tables.local();
    // Asked first, so that hardly anything of `advance` is left.
    if entry.state != FlowState::Established as u8
        || entry.flags.has(FlowFlags::FORMER)
        || service.resets
        || !local.leased
    {
        return None;
    }
    let (entry, changed) = advance(entry, packet, false);
    if changed {
        return None;
    }
    let is_known_to_owner = is_unreported(&entry, &service, local.now_ms);
    if is_known_to_owner {
        let row = tables.row(tables.hashed_row_of(&packet.key, local.seed));
        if row.owner() != local.slot {
            return None;
        }
    }
    Some(Hit { backend: entry.backend, is_known_to_owner })
}

/// What [`hit`] says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hit {
    /// To whom.
    pub backend: BackendIndex,
    /// It was time to report that the flow lives, and we are its owner: `last_reported_ms` is now, too.
    pub is_known_to_owner: bool,
}

/// The way of new connections: a SYN from the wire that nobody here knows and whose owner we are, with a lease.
///
/// What [`decide`] says of it, wherever this is not `None`: a verdict to forward to this backend, the outcome [`Outcome::New`],
/// [`Action::Insert`] with this entry, [`FlowEventKind::New`], to erase the cache's entry, and nothing else. `None` says nothing.
///
/// [`decide`]: super::decide
/// [`Outcome::New`]: super::Outcome::New
/// [`Action::Insert`]: super::Action::Insert
/// [`FlowEventKind::New`]: crate::FlowEventKind::New
#[inline(always)]
pub fn new_flow<T: Tables>(packet: &Packet, tables: &T) -> Option<NewFlow> {
    if !matches!(packet.kind, PacketKind::TcpSyn) || !matches!(packet.fragment, Fragment::Whole) {
        return None;
    }
    let ServiceMatch::Service(service) = tables.service(&packet.key) else { return None };
    let local = tables.local();
    let hash = flow_hash(local.seed, &packet.key);
    let row = tables.row(tables.row_of(&packet.key, hash));
    // Then we are the acting owner, too.
    if row.owner() != local.slot
        || !local.slot.is_some()
        || !local.leased
        || tables.flow(&packet.key).is_some()
    {
        return None;
    }
    #[expect(clippy::cast_possible_truncation, reason = "the slot is the low 16 bits of the hash")]
    let choice = tables.consistent(service.index, hash as u16, Began::Now);
    if choice.backend == BackendIndex::NONE {
        return None;
    }
    let at_once = choice.unsettled || service.replicate_syn;
    Some(NewFlow { entry: picked(choice.backend, local.now_ms), at_once, hash })
}

/// What [`new_flow`] says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NewFlow {
    /// What to record, and where to send the packet.
    pub entry: FlowEntry,
    /// As [`Decision::at_once`](super::Decision::at_once).
    pub at_once: bool,
    /// The flow's hash.
    pub hash: u64,
}
