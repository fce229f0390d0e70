//! Later fragments that came before their first one.

use std::collections::VecDeque;

use phalanx_flow::packet::Link;
use phalanx_flow::{Arrival, FlowKey};

/// Frames held at the most, and how long: reordering on a path is shorter, and what is lost the client sends again.
const MAX_HELD: usize = 1024;
const HOLD_MS: u64 = 200;

/// A frame that waits.
#[derive(Clone, Debug)]
pub struct HeldFrame {
    /// The packet that it is a fragment of.
    pub fragment: FlowKey,
    /// Until when it waits; [`Held::push`] says.
    pub until_ms: u64,
    /// The frame.
    pub bytes: Vec<u8>,
    /// What it starts with.
    pub link: Link,
    /// The interface it came in on.
    pub ingress: u32,
    /// How it came.
    pub arrival: Arrival,
}

/// The frames that wait, oldest first.
#[derive(Debug, Default)]
pub struct Held {
    frames: VecDeque<HeldFrame>,
}

impl Held {
    /// Keeps a frame for a while from `now_ms` on. Returns how many older ones were given up.
    pub fn push(&mut self, mut frame: HeldFrame, now_ms: u64) -> u64 {
        let mut given_up = self.expire(now_ms);
        if self.frames.len() >= MAX_HELD && self.frames.pop_front().is_some() {
            given_up += 1;
        }
        frame.until_ms = now_ms + HOLD_MS;
        self.frames.push_back(frame);
        given_up
    }

    /// Forgets frames that waited too long, and returns how many.
    pub fn expire(&mut self, now_ms: u64) -> u64 {
        let before = self.frames.len();
        while self.frames.front().is_some_and(|frame| frame.until_ms <= now_ms) {
            self.frames.pop_front();
        }
        (before - self.frames.len()) as u64
    }

    /// Which packets' fragments wait, some named more than once.
    pub fn waiting(&self) -> impl Iterator<Item = &FlowKey> {
        self.frames.iter().map(|frame| &frame.fragment)
    }

    /// Takes out the frames that waited for this packet's first fragment, in their order.
    pub fn release(&mut self, fragment: &FlowKey) -> Vec<HeldFrame> {
        if !self.frames.iter().any(|frame| frame.fragment == *fragment) {
            return Vec::new();
        }
        let (released, kept) =
            std::mem::take(&mut self.frames).into_iter().partition(|frame| frame.fragment == *fragment);
        self.frames = kept;
        Vec::from(released)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(id: u8) -> HeldFrame {
        HeldFrame {
            fragment: FlowKey {
                source: [0; 16],
                destination: [0; 16],
                source_port: [0, id],
                destination_port: [0; 2],
                protocol: 17,
                family: 4,
                reserved: [0; 2],
            },
            until_ms: 0,
            bytes: vec![id],
            link: Link::Ip,
            ingress: 1,
            arrival: Arrival::WIRE,
        }
    }

    #[test]
    fn frames_of_one_datagram_are_released_in_order_and_others_stay() {
        let mut held = Held::default();
        for id in [1, 2, 1] {
            assert_eq!(held.push(frame(id), 10), 0);
        }
        assert_eq!(held.release(&frame(1).fragment).len(), 2);
        assert_eq!(held.release(&frame(1).fragment).len(), 0);
        assert_eq!(held.release(&frame(2).fragment).len(), 1);
    }

    #[test]
    fn frames_are_given_up_after_a_while_and_when_there_are_too_many() {
        let mut held = Held::default();
        held.push(frame(1), 10);
        assert_eq!(held.expire(10 + HOLD_MS - 1), 0);
        assert_eq!(held.expire(10 + HOLD_MS), 1);
        for _ in 0..MAX_HELD {
            assert_eq!(held.push(frame(1), 10), 0);
        }
        assert_eq!(held.push(frame(2), 10), 1);
        assert_eq!(held.release(&frame(1).fragment).len(), MAX_HELD - 1);
    }
}
