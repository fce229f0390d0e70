//! What is kept of one peer.

use std::collections::{BTreeMap, VecDeque};
use std::time::Instant;

use super::outbox::Outbox;
use super::sending::Transfer;
use super::{Control, FrameDecoder, Item, MAX_BACKLOG};

/// What is kept of one peer.
pub(super) struct Peer {
    pub(super) connected: bool,
    /// Counts connections: what came by an earlier one is not acknowledged on this one, because its sender may have started again.
    pub(super) epoch: u64,
    pub(super) decoder: FrameDecoder,
    pub(super) controls: VecDeque<Control>,
    /// Idle queries and replies; worth nothing after a reconnect.
    pub(super) asks: VecDeque<Item>,
    pub(super) outbox: Outbox,
    /// Whether records were dropped since the outbox was last empty.
    pub(super) overflowed: bool,
    pub(super) next_seq: u64,
    pub(super) inflight: BTreeMap<u64, (Instant, Vec<Item>)>,
    pub(super) transfer: Option<Transfer>,
}

impl Peer {
    pub(super) fn new() -> Self {
        Self {
            connected: false,
            epoch: 0,
            decoder: FrameDecoder::new(),
            controls: VecDeque::new(),
            asks: VecDeque::new(),
            outbox: Outbox::new(MAX_BACKLOG),
            overflowed: false,
            next_seq: 1,
            inflight: BTreeMap::new(),
            transfer: None,
        }
    }

    pub(super) fn remembered(&self) -> usize {
        let waiting = self.controls.len() + self.asks.len() + self.outbox.remembered();
        1 + waiting + self.inflight.values().map(|(_, items)| 1 + items.len()).sum::<usize>()
    }

    pub(super) fn disconnect(&mut self) {
        self.connected = false;
        self.decoder = FrameDecoder::new();
        self.controls.clear();
        self.asks.clear();
        while let Some((_, (at, items))) = self.inflight.pop_last() {
            for item in items.into_iter().rev() {
                if !matches!(item, Item::IdleQuery { .. } | Item::IdleReply { .. }) {
                    self.outbox.push_back_unacknowledged(at, item);
                }
            }
        }
        if let Some(transfer) = &mut self.transfer {
            transfer.handle_disconnected();
        }
    }
}
