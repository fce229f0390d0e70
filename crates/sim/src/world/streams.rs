//! The members' streams: reliable and ordered, until they break.

use std::collections::VecDeque;
use std::time::Duration;

use phalanx_flow::MemberId;
use phalanx_rebalancer::codec::{self, FrameDecoder};
use rand::RngExt as _;

use super::World;
use super::event::Event;
use crate::faults;

/// A stream whose other end is silent ends after this (the daemon's idle timeout).
const SILENCE: Duration = Duration::from_secs(6);

/// Pause before a lost connection is dialled again; the daemon's is 50 ms to 1 s.
const AGAIN: [Duration; 2] = [Duration::from_millis(50), Duration::from_secs(1)];

/// One connection between two members.
#[derive(Debug)]
pub(super) struct Link {
    ends: [usize; 2],
    /// When the last bytes towards each end arrive: what follows does not overtake.
    last: [Duration; 2],
    /// Bytes that cannot get through now, with where they go.
    held: VecDeque<(usize, Vec<u8>)>,
    blocked: bool,
    /// Counts the times it was blocked: a silence that ended does not break it later.
    silences: u64,
    /// The end whose process is gone: what has not come through by now is not sent again.
    gone: Option<usize>,
    /// Something it had sent is missing: what comes later is of no use.
    gap: bool,
}

fn pair(a: usize, b: usize) -> (usize, usize) {
    (a.min(b), a.max(b))
}

impl World {
    /// A member wants a connection with a peer of its view.
    pub(super) fn dial(&mut self, at: usize, peer: usize) {
        let peer_id = MemberId(peer as u32 + 1);
        let Some(process) = self.nodes[at].process.as_mut() else { return };
        process.dialling.remove(&peer);
        if process.links.contains_key(&peer) || process.last_view.get(peer_id).is_none() {
            return;
        }
        let id = self.nodes[at].id;
        let known = self.nodes[peer]
            .process
            .as_ref()
            .is_some_and(|process| process.last_view.get(id).is_some_and(|member| member.known));
        if self.nodes[peer].runs() && self.linked(at, peer) && known {
            // A new connection replaces what the peer still has of an earlier one.
            if let Some(old) = self.pairs.get(&pair(at, peer)).copied() {
                self.break_link(old, None);
            }
            let link = self.next_link;
            self.next_link += 1;
            let late = [self.latency(), self.latency()];
            self.links.insert(
                link,
                Link {
                    ends: [at, peer],
                    last: [self.now + late[0], self.now + late[1]],
                    held: VecDeque::new(),
                    blocked: false,
                    silences: 0,
                    gone: None,
                    gap: false,
                },
            );
            self.pairs.insert(pair(at, peer), link);
            // Both ends know at once: whoever knows later would find frames it cannot place.
            self.happen(Event::Up { node: at, peer, link });
            self.happen(Event::Up { node: peer, peer: at, link });
            return;
        }
        self.dial_again(at, peer);
    }

    fn dial_again(&mut self, at: usize, peer: usize) {
        let Some(process) = self.nodes[at].process.as_mut() else { return };
        if process.dialling.insert(peer) {
            let [least, most] = AGAIN;
            let late = self.network.random_range(least..=most);
            self.push_in(late, Event::Dial { node: at, peer });
        }
    }

    pub(super) fn link_up(&mut self, at: usize, peer: usize, link: u64) {
        let clock = self.nodes[at].clock(self.epoch, self.now);
        if !self.links.contains_key(&link) {
            return;
        }
        let Some(process) = self.nodes[at].process.as_mut() else { return };
        process.links.insert(peer, link);
        process.control.handle_connected(clock, MemberId(peer as u32 + 1));
        self.after_control(at);
    }

    pub(super) fn link_lost(&mut self, at: usize, peer: usize, link: u64) {
        let clock = self.nodes[at].clock(self.epoch, self.now);
        let Some(process) = self.nodes[at].process.as_mut() else { return };
        if process.links.get(&peer) != Some(&link) {
            return;
        }
        process.links.remove(&peer);
        process.control.handle_disconnected(clock, MemberId(peer as u32 + 1));
        self.after_control(at);
        self.dial_again(at, peer);
    }

    /// A connection ends at both ends; what is on its way is lost. `silence` if it ends for want of an answer since then.
    pub(super) fn break_link(&mut self, link: u64, silence: Option<u64>) {
        let over = |link: &Link| silence.is_some_and(|silence| !link.blocked || link.silences != silence);
        if self.links.get(&link).is_none_or(over) {
            return;
        }
        let Some(Link { ends: [a, b], .. }) = self.links.remove(&link) else { return };
        self.pairs.remove(&pair(a, b));
        self.happen(Event::Lost { node: a, peer: b, link });
        self.happen(Event::Lost { node: b, peer: a, link });
    }

    /// A member closes its connection with a peer that is in its view no more.
    pub(super) fn hang_up(&mut self, at: usize, peer: usize) {
        if let Some(link) = self.nodes[at].process.as_ref().and_then(|process| process.links.get(&peer)) {
            let link = *link;
            if self.linked(at, peer) {
                self.break_link(link, None);
            } else {
                // The peer does not hear of it.
                self.happen(Event::Lost { node: at, peer, link });
            }
        }
    }

    /// The process at one end is gone: the other finds out by silence, or when it is back.
    pub(super) fn orphan_links(&mut self, at: usize) {
        let links: Vec<u64> =
            self.links.iter().filter(|(_, link)| link.ends.contains(&at)).map(|(id, _)| *id).collect();
        for link in links {
            if let Some(state) = self.links.get_mut(&link) {
                let before = state.held.len();
                state.held.retain(|(to, _)| *to == at);
                state.gap |= state.held.len() < before;
                state.gone = Some(at);
            }
            let late = self.network.random_range(Duration::from_millis(1)..SILENCE);
            self.push_in(late, Event::Break { link, silence: None });
        }
    }

    pub(super) fn send_frame(&mut self, at: usize, to: MemberId, bytes: Vec<u8>) {
        let Some(peer) = self.node_of(to) else { return };
        let Some(bytes) = self.with_fault(at, to, bytes) else { return };
        let Some(link) = self.nodes[at].process.as_ref().and_then(|process| process.links.get(&peer)) else {
            return;
        };
        self.transmit(*link, at, peer, &bytes);
    }

    /// What a faulty member sends in the place of `bytes`.
    fn with_fault(&mut self, at: usize, to: MemberId, bytes: Vec<u8>) -> Option<Vec<u8>> {
        let Some(fault) = self.settings.fault else { return Some(bytes) };
        let mut decoder = FrameDecoder::new();
        decoder.handle_data(&bytes);
        // Our own bytes decode.
        let Ok(Some(frame)) = decoder.poll_frame() else { return Some(bytes) };
        let (frame, answer) = faults::frame(fault, self.nodes[at].id, frame);
        if let Some(answer) = answer {
            let clock = self.nodes[at].clock(self.epoch, self.now);
            if let Some(process) = self.nodes[at].process.as_mut() {
                let _ = process.control.handle_data(clock, to, &codec::encode(&answer));
            }
        }
        frame.map(|frame| codec::encode(&frame))
    }

    fn transmit(&mut self, link: u64, from: usize, to: usize, bytes: &[u8]) {
        let late = self.latency() + self.nodes[from].slow + self.nodes[to].slow;
        // Streams are cut anywhere.
        let cut = if self.network.random_bool(0.1) { self.network.random_range(1..bytes.len()) } else { 0 };
        let Some(state) = self.links.get_mut(&link) else { return };
        let last = &mut state.last[usize::from(state.ends[1] == to)];
        *last = (*last).max(self.now + late);
        let at = *last;
        let (head, tail) = bytes.split_at(cut);
        for part in [head, tail] {
            if !part.is_empty() {
                self.push(at, Event::Bytes { link, from, to, bytes: part.to_vec() });
            }
        }
    }

    pub(super) fn bytes(&mut self, link: u64, from: usize, to: usize, bytes: Vec<u8>) {
        let passes = self.linked(from, to);
        let Some(state) = self.links.get_mut(&link) else { return };
        if state.gone == Some(from) && (state.gap || !passes) {
            state.gap = true;
            return;
        }
        if !passes || !state.held.is_empty() {
            state.held.push_back((to, bytes));
            if !std::mem::replace(&mut state.blocked, true) {
                state.silences += 1;
                let silence = Some(state.silences);
                self.push_in(SILENCE, Event::Break { link, silence });
            }
            return;
        }
        self.take_bytes(link, from, to, &bytes);
    }

    fn take_bytes(&mut self, link: u64, from: usize, to: usize, bytes: &[u8]) {
        let clock = self.nodes[to].clock(self.epoch, self.now);
        let peer = MemberId(from as u32 + 1);
        let Some(process) = self.nodes[to].process.as_mut() else { return };
        if process.links.get(&from) != Some(&link) {
            return;
        }
        match process.control.handle_data(clock, peer, bytes) {
            Ok(()) => {}
            Err(error) => {
                let line = format!("m{} closes its stream with m{peer}: {error}", to + 1);
                self.findings.violate_as("streams", self.now, line);
                self.break_link(link, None);
            }
        }
        self.after_control(to);
    }

    /// What was held goes on where members hear each other again.
    pub(super) fn unblock(&mut self) {
        let links: Vec<(u64, [usize; 2])> =
            self.links.iter().filter(|(_, link)| link.blocked).map(|(id, link)| (*id, link.ends)).collect();
        for (link, [a, b]) in links {
            if self.linked(a, b) {
                if let Some(state) = self.links.get_mut(&link) {
                    state.blocked = false;
                }
                // Until then what comes waits behind what is held.
                let late = self.latency();
                self.push_in(late, Event::Flush { link });
            }
        }
    }

    pub(super) fn flush(&mut self, link: u64) {
        while let Some(state) = self.links.get_mut(&link) {
            let [a, b] = state.ends;
            let Some((to, bytes)) = state.held.pop_front() else { return };
            let from = if to == a { b } else { a };
            if let Some(waiting) = &mut self.nodes[to].stalled {
                waiting.push(Event::Bytes { link, from, to, bytes });
            } else {
                self.take_bytes(link, from, to, &bytes);
            }
        }
    }
}
