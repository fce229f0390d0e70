//! The [`Forwarder`] trait, the [`Plan`] it carries out, its counters, and what every forwarder on the host shares.
//!
//! A forwarder moves bytes and counts; it never decides: [`phalanx_flow::decide()`] does.
//! The flow table lives in the forwarder and only there: the daemon reads it with [`Forwarder::visit`], changes it with
//! [`Forwarder::upsert`] and its kin, and hears of changes by [`Forwarder::poll_events`].
//!
//! Invariant: this crate knows nothing of boots, views, peers or sockets.

pub mod conformance;
pub mod counters;
pub mod engine;
pub mod memory;
pub mod plan;
pub mod rewrite;

use std::time::Duration;

use phalanx_flow::{BackendId, FlowEvent, FlowKey, MemberSlot, Record};

pub use counters::{Counters, Drop};
pub use plan::{Handoff, NextHop, NextHops, Plan, PlanBackend, PlanMember, PlanService, SlotSet};

/// What became of one record given to [`Forwarder::upsert`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Upserted {
    /// It is in the table now.
    Applied,
    /// The table has the same record or a newer one (see [`phalanx_flow::Version`]); nothing changed.
    Stale,
    /// The table is full and the flow was not in it; nothing changed.
    Full,
    /// The plan has no backend of that name: the daemon adds it to the plan and tries again.
    UnknownBackend,
}

/// Why a plan was refused. The plan in force before goes on.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    /// The plan contradicts itself; a fault of the daemon.
    #[error("the plan is wrong: {0}")]
    Inconsistent(String),
    /// The kernel refused a table; the operator finds the reason in the message.
    #[error("the kernel refused the plan's {table}: {source}")]
    Kernel {
        /// Which table.
        table: &'static str,
        /// What the kernel said.
        source: std::io::Error,
    },
}

/// Why a packet of the daemon's own could not be sent.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// No such backend or member in the plan.
    #[error("not in the plan")]
    Unknown,
    /// The next hop is not resolved yet; try again.
    #[error("no next hop yet")]
    NoNextHop,
    /// The packet does not fit the path.
    #[error("too big for the path")]
    TooBig,
    /// The socket refused it.
    #[error("send: {0}")]
    Io(#[from] std::io::Error),
}

/// Rows of the current table, for [`Forwarder::visit`].
#[derive(Clone, Debug)]
pub enum RowSet {
    /// Every row.
    All,
    /// One bit a row, row 0 first.
    Some(Vec<u64>),
}

impl RowSet {
    /// The set of `rows`.
    pub fn from_rows(rows: impl IntoIterator<Item = u32>) -> Self {
        let mut bits = Vec::new();
        for row in rows {
            let word = row as usize / 64;
            if bits.len() <= word {
                bits.resize(word + 1, 0_u64);
            }
            bits[word] |= 1 << (row % 64);
        }
        Self::Some(bits)
    }

    /// Whether `row` is in the set.
    pub fn contains(&self, row: u32) -> bool {
        match self {
            Self::All => true,
            Self::Some(bits) => bits.get(row as usize / 64).is_some_and(|word| word & (1 << (row % 64)) != 0),
        }
    }
}

/// Something that carries packets as a plan says.
///
/// - Commands: [`install`](Self::install), [`set_next_hops`](Self::set_next_hops), [`renew_lease`](Self::renew_lease), [`remember`](Self::remember), then the flow
///   table's [`upsert`](Self::upsert), [`remove`](Self::remove), [`stamp`](Self::stamp), [`protect`](Self::protect),
///   [`touch`](Self::touch), and the cache's.
/// - Queries: [`get`](Self::get), [`visit`](Self::visit), [`counters`](Self::counters).
/// - Outputs: [`poll_events`](Self::poll_events), [`poll_echoes`](Self::poll_echoes).
///
/// All take `&self`: packets go on while the daemon calls. Each packet sees one plan whole.
pub trait Forwarder: Send + Sync {
    /// Puts a plan in force, atomically per packet.
    fn install(&self, plan: Plan) -> Result<(), InstallError>;

    /// Says how to reach the plan's members and backends; positions are those of the plan in force.
    fn set_next_hops(&self, next_hops: NextHops);

    /// Lets the local member own flows for `term` from now; zero ends the lease at once.
    fn renew_lease(&self, term: Duration);

    /// Keeps bytes whose meaning is the daemon's for as long as the flow table lives, in place of those before.
    /// Without effect where the table ends with the process.
    fn remember(&self, _note: &[u8]) {}

    /// Puts records from other members or from the daemon into the flow table, each unless the table has a newer one.
    /// One answer a record, in order.
    fn upsert(&self, records: &[Record]) -> Vec<Upserted>;

    /// So many records more may come soon: makes room for them ahead where the table grows as they come, which
    /// [`has_room`](Self::has_room) says the end of. A hint.
    fn make_room(&self, _records: usize) {}

    /// Whether all room that was asked for is made.
    fn has_room(&self) -> bool {
        true
    }

    /// Removes a flow if its entry has this birth (any birth if it is 0) and no packet of it was seen for `min_idle`.
    /// Whether it was removed.
    fn remove(&self, key: &FlowKey, birth: u64, min_idle: Duration) -> bool;

    /// Gives an entry that has no birth yet its birth. Whether there was one.
    fn stamp(&self, key: &FlowKey, birth: u64) -> bool;

    /// Marks the entry as acknowledged by the backup, if it still has this birth and update.
    fn protect(&self, key: &FlowKey, birth: u64, update: u32);

    /// Sets or clears [`FORMER`](phalanx_flow::FlowFlags::FORMER) in the flows' entries. An upsert clears it too, of an older record as well.
    fn set_former(&self, keys: &[FlowKey], former: bool);

    /// Another holder saw the flow this many milliseconds ago: an entry that saw it longer ago is refreshed.
    fn touch(&self, flows: &[(FlowKey, u32)]);

    /// Puts records into the cache, each unless the flow table has the flow or the cache a newer record.
    fn upsert_cache(&self, records: &[Record]);

    /// Removes flows from the cache.
    fn remove_cache(&self, keys: &[FlowKey]);

    /// Empties the cache and returns what was in it.
    fn flush_cache(&self) -> Vec<Record>;

    /// The flow table's record of a flow.
    fn get(&self, key: &FlowKey) -> Option<Record>;

    /// Shows every flow of the given rows, half-open ones included, in no order.
    fn visit(&self, rows: &RowSet, show: &mut dyn FnMut(&Record));

    /// Appends what happened since the last call, at most `limit` events; whether more wait.
    ///
    /// Entries that are idle or whose linger is over come as [`phalanx_flow::FlowEventKind::Expired`], again after a while if the daemon
    /// has not removed or refreshed them.
    fn poll_events(&self, events: &mut Vec<FlowEvent>, limit: usize) -> bool;

    /// Sends a hand-off echo through the packet path of another member, which answers with the same token.
    fn send_echo(&self, to: MemberSlot, token: u64) -> Result<(), SendError>;

    /// Appends the tokens of echo answers that arrived.
    fn poll_echoes(&self, tokens: &mut Vec<u64>);

    /// Sends an IP packet of the daemon's own to a backend, the way flows go.
    fn send_probe(&self, backend: &BackendId, ip_packet: &[u8]) -> Result<(), SendError>;

    /// Throws away packets that were received and not yet processed; used after the process was stopped.
    fn discard_backlog(&self);

    /// When the packet path last showed that it runs, as time before now.
    fn idle_for(&self) -> Duration;

    /// What was counted so far.
    fn counters(&self) -> Counters;
}
