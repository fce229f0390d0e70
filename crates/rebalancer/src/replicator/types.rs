//! What goes into a [`Replicator`](super::Replicator) and what comes out.

use std::collections::BTreeSet;
use std::num::NonZeroU32;
use std::sync::Arc;

use phalanx_flow::{FlowKey, MemberId, Record};

use super::TransferProgress;
use crate::codec::{CodecError, Digests};
use crate::ranking::Ranking;

/// When a new flow is told to its backup.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Policy {
    /// When the client has answered the server; a SYN flood makes no replication traffic.
    #[default]
    Established,
    /// At the SYN, as the founding document has it \[430\].
    Syn,
}

/// What does not change while a daemon runs.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// This member.
    pub local: MemberId,
    /// Records of transfer tables a second, over all receivers together.
    pub transfer_rate: NonZeroU32,
}

/// The cluster as the local member sees it.
#[derive(Clone)]
pub struct ViewInput {
    /// Who owns and backs up what.
    pub ranking: Arc<dyn Ranking>,
    /// The tables before the last switches, while the handover window is open (design §6).
    pub previous: Vec<Arc<dyn Ranking>>,
    /// The table of the pending view, while a change is planned.
    pub pending: Option<Arc<dyn Ranking>>,
    /// Members not confirmed down, the local one among them or not.
    pub live: BTreeSet<MemberId>,
    /// Of these, those that SWIM suspects: hints go past them.
    pub suspects: BTreeSet<MemberId>,
    /// Members with `cache = "all"`.
    pub caches: BTreeSet<MemberId>,
    /// When a new flow is told to its backup.
    pub policy: Policy,
    /// `false` is the lab's `--no-replication` twin: nothing is sent at all, neither associations nor transfer tables.
    pub enabled: bool,
}

impl ViewInput {
    /// All tables whose holders are told of a flow, the one in force first.
    pub(super) fn tables(&self) -> impl Iterator<Item = &dyn Ranking> {
        [&self.ranking].into_iter().chain(&self.pending).chain(&self.previous).map(|table| &**table)
    }
}

/// One change to the forwarder's flow table (or cache).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Apply {
    /// Hold this record unless [`Record::is_replaced_by`] says that the present one stays.
    Upsert(Record),
    /// Remove the entry, if it has this birth and no packet of it was seen for `min_idle_ms` milliseconds.
    /// `Stale`: there is no such entry, or it lives.
    Remove {
        /// The flow.
        key: FlowKey,
        /// Another birth is another life: it stays.
        birth: u64,
        /// 0: whenever it was last seen.
        min_idle_ms: u32,
    },
    /// Another member says that this life of the flow is over: as [`Apply::Remove`], but `Stale` only if the entry lives.
    End {
        /// The flow.
        key: FlowKey,
        /// The life.
        birth: u64,
        /// As there: an entry that has seen a packet since lives.
        min_idle_ms: u32,
    },
    /// A packet of the flow was seen elsewhere this long ago; never makes an entry look older.
    Touch {
        /// The flow.
        key: FlowKey,
        /// Milliseconds since the packet.
        idle_ms: u32,
    },
    /// As [`Apply::Upsert`], into the cache.
    CacheUpsert(Record),
    /// Erase the cache's entry.
    CacheRemove {
        /// The flow.
        key: FlowKey,
    },
    /// Give the entry this birth if it has none yet (0).
    Stamp {
        /// The flow.
        key: FlowKey,
        /// The birth.
        birth: u64,
    },
    /// Set [`FlowFlags::PROTECTED`](phalanx_flow::FlowFlags::PROTECTED) if the entry still has this birth and update.
    Protect {
        /// The flow.
        key: FlowKey,
        /// The birth the backup acknowledged.
        birth: u64,
        /// The update the backup acknowledged.
        update: u32,
    },
}

/// A flow in one version: key, birth and update.
pub type Held = (FlowKey, u64, u32);

/// What the forwarder did with one [`Apply`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ApplyResult {
    /// It is so now.
    Applied,
    /// There was nothing to do: what is there is as new or newer, or there is nothing there.
    Stale,
    /// The table is full.
    Full,
    /// The backend cannot be reached from here.
    UnknownBackend,
}

/// Changes to be made in order; [`Replicator::handle_applied`](super::Replicator::handle_applied) takes the results.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApplyBatch {
    /// Names the batch.
    pub id: u64,
    /// Who asked for it; `None`: we did.
    pub from: Option<MemberId>,
    /// To be upserted first: records of a transfer table, each with its own result.
    pub records: Arc<Vec<Record>>,
    /// The changes; their results follow those of the records.
    pub items: Vec<Apply>,
}

/// Flows whose records are asked for; [`Replicator::handle_lookup`](super::Replicator::handle_lookup) takes the answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lookup {
    /// Names the question.
    pub id: u64,
    /// The flows.
    pub keys: Vec<FlowKey>,
}

/// What a driver may want to know or act on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A peer refused records: its table is full or it cannot reach their backend. The flows stay unprotected.
    PeerFull {
        /// The peer.
        peer: MemberId,
        /// How many records.
        refused: usize,
    },
    /// So much waits for a peer that records were dropped: when it is back, send it all that it should hold
    /// ([`crate::transfer::plan_refill`]).
    Overflow {
        /// The peer.
        peer: MemberId,
    },
    /// A peer says what it holds of some rows: compare, answer with [`Replicator::answer`](super::Replicator::answer), and send it what
    /// it lacks.
    Digests {
        /// The peer.
        from: MemberId,
        /// What it holds.
        digests: Digests,
    },
    /// A peer holds other things of these rows than we said: send it what we have.
    Differing {
        /// The peer.
        from: MemberId,
        /// The [`Digests::round`] it answers.
        round: u64,
        /// The rows.
        rows: Vec<u32>,
    },
    /// The transfer table to this member has been acknowledged whole.
    TransferDone {
        /// The receiver.
        to: MemberId,
        /// How far it came, refused records among them.
        progress: TransferProgress,
    },
    /// The receiver is no longer alive; the next view's plan replaces the transfer.
    TransferDropped {
        /// The receiver.
        to: MemberId,
        /// Records it has not acknowledged.
        records: usize,
    },
    /// No transfer is under way any more.
    AllDone,
}

/// Why a peer's bytes were not taken. Nothing of the offending frame was applied; close the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PeerError {
    /// The bytes are not this protocol.
    #[error(transparent)]
    Codec(#[from] CodecError),
    /// [`Replicator::handle_connected`](super::Replicator::handle_connected) was not called.
    #[error("data from a peer that is not connected")]
    NotConnected,
    /// The peer sends more than its windows allow, or the local forwarder has stopped applying.
    #[error("more frames than the window allows wait for the forwarder")]
    Window,
}

/// Counters, all since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Items sent, repetitions included.
    pub items_sent: u64,
    /// Items received.
    pub items_received: u64,
    /// Frames sent.
    pub frames_sent: u64,
    /// Records received that made the local table newer.
    pub applied: u64,
    /// Records received of flows that have ended, not applied.
    pub barred: u64,
    /// Records that peers refused (full, or backend unknown).
    pub refused: u64,
    /// Flows told again because nothing was on its way that could have protected them.
    pub told_again: u64,
    /// Records not queued because too much waits for the peer.
    pub overflowed: u64,
    /// Births more than a day ahead of our clock, not followed.
    pub clock_ahead: u64,
    /// Records received without a birth, or hints for flows we do not hold; not applied.
    pub misplaced: u64,
    /// Frames received while replication is switched off.
    pub ignored: u64,
    /// Idle entries removed because nobody answered in time.
    pub unanswered: u64,
}
