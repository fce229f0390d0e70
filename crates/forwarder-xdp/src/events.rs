//! What the kernel tells by its ring.

use std::collections::VecDeque;

use aya::maps::{MapData, RingBuf};
use phalanx_flow::FlowEventKind;

use crate::abi::{EVENT_ECHO, RawEvent};

/// Events of flows that are kept at the most while only echoes are asked for; what is beyond stays in the kernel's ring.
const MAX_WAITING: usize = 1 << 16;

/// What the kernel tells: events of flows and echoes come by one ring.
pub(crate) struct Events {
    ring: RingBuf<MapData>,
    /// Events of flows that were before an echo.
    waiting: VecDeque<RawEvent>,
}

impl Events {
    /// What is in a pinned ring already was told to a daemon that is gone, by now for who knows how long: it would be taken for news. What
    /// nobody heard of it the control plane looks for in the table.
    pub(crate) fn new(mut ring: RingBuf<MapData>) -> Self {
        while ring.next().is_some() {}
        Self { ring, waiting: VecDeque::new() }
    }

    /// The next event of a flow; what comes before it goes where it belongs.
    pub(crate) fn next(&mut self, echoes: &mut Vec<u64>) -> Option<RawEvent> {
        self.waiting.pop_front().or_else(|| self.read(echoes))
    }

    /// The same out of the ring.
    fn read(&mut self, echoes: &mut Vec<u64>) -> Option<RawEvent> {
        while let Some(item) = self.ring.next() {
            match RawEvent::from_bytes(&item) {
                Some(event) if event.kind == EVENT_ECHO => echoes.push(event.entry.birth),
                Some(event) => return Some(event),
                None => {}
            }
        }
        None
    }

    /// Goes through the ring for the echoes in it.
    pub(crate) fn find_echoes(&mut self, echoes: &mut Vec<u64>) {
        while self.waiting.len() < MAX_WAITING
            && let Some(event) = self.read(echoes)
        {
            self.waiting.push_back(event);
        }
    }
}

pub(crate) fn kind_of(number: u8) -> Option<FlowEventKind> {
    [
        FlowEventKind::New,
        FlowEventKind::Changed,
        FlowEventKind::Touched,
        FlowEventKind::Cached,
        FlowEventKind::Hint,
        FlowEventKind::Expired,
    ]
    .into_iter()
    .find(|kind| *kind as u8 == number)
}
