//! The router in front of the members, and the two balancers Phalanx is compared with.

use std::time::Duration;

use phalanx_flow::FlowKey;
use rand::RngExt as _;

use super::World;
use super::event::{Event, Kind, Packet};
use crate::settings::{Balancer, Rehash};

/// A router finds out within this that a next hop does not answer.
const DETECTION: [Duration; 2] = [Duration::from_millis(300), Duration::from_millis(900)];

/// A next hop that came is used after this.
const ANNOUNCED: [Duration; 2] = [Duration::from_millis(50), Duration::from_millis(600)];

/// SplitMix64's finisher over a key: what routers hash with is not what members hash with.
pub(super) fn mix(key: &FlowKey, salt: u64) -> u64 {
    let mut state = salt;
    for part in [&key.source[12..], &key.destination[12..], &key.source_port, &key.destination_port] {
        for byte in part {
            state = (state ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }
    let mut z = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The best of `choices` for a key by rendezvous.
fn best(key: &FlowKey, salt: u64, choices: impl Iterator<Item = usize>) -> Option<usize> {
    choices.max_by_key(|choice| mix(key, salt ^ (*choice as u64 + 1).wrapping_mul(0x2545_f491_4f6c_dd1d)))
}

impl World {
    /// The router will find out that `node` answers (or not) as the process of that life.
    pub(super) fn announce_to_router(&mut self, node: usize, up: bool, life: u64) {
        let [least, most] = if up { ANNOUNCED } else { DETECTION };
        let late = self.network.random_range(least..=most);
        self.push_in(late, Event::RouterSees { node, up, life });
    }

    pub(super) fn router_sees(&mut self, node: usize, up: bool, life: u64) {
        let entry = &self.nodes[node];
        if entry.life != life {
            return;
        }
        // Who was declared dead while it stood still, or came back meanwhile, is seen as it is now.
        let answers = self.carries(node);
        if up != answers {
            return;
        }
        let there = self.next_hops.contains(&node);
        if up && !there {
            self.next_hops.push(node);
            self.next_hops.sort_unstable();
        } else if !up && there {
            self.next_hops.retain(|hop| *hop != node);
        } else {
            return;
        }
        let word = if up { "adds" } else { "drops" };
        self.tell(|| format!("the router {word} m{}", node + 1));
    }

    /// Whether a next hop answers the router's probes.
    fn carries(&self, node: usize) -> bool {
        let entry = &self.nodes[node];
        if self.settings.balancer != Balancer::Phalanx {
            return entry.life > 1 && !entry.leaving && entry.stalled.is_none();
        }
        entry.forwarder.is_some() && entry.stalled.is_none()
    }

    /// A client's packet has come to the router.
    pub(super) fn at_router(&mut self, packet: Packet) {
        let key = self.flows[packet.flow].key;
        if self.settings.balancer == Balancer::Ecmp {
            let usable: Vec<usize> = (0..self.backends.len())
                .filter(|backend| self.backends[*backend].usable && self.backends[*backend].alive)
                .collect();
            if !usable.is_empty() {
                let backend = match self.settings.rehash {
                    Rehash::Modulo => Some(usable[(mix(&key, self.salt) % usable.len() as u64) as usize]),
                    Rehash::Resilient => best(&key, self.salt, usable.into_iter()),
                };
                if let Some(backend) = backend {
                    let late = self.latency();
                    self.push_in(late, Event::AtBackend { backend, packet });
                }
            }
            return;
        }
        // An error comes from somewhere else: whoever it comes to knows as little as the router.
        let salt = match packet.kind {
            Kind::IcmpError => self.salt ^ u64::from(packet.sequence),
            _ => self.salt,
        };
        let hop = match self.settings.rehash {
            _ if self.next_hops.is_empty() => None,
            Rehash::Modulo => {
                let at = mix(&key, salt) % self.next_hops.len() as u64;
                Some(self.next_hops[at as usize])
            }
            Rehash::Resilient => best(&key, salt, self.next_hops.iter().copied()),
        };
        if let Some(node) = hop {
            self.pass_to_member(node, packet);
        }
    }

    /// A member that has consistent hashing and its own table only.
    pub(super) fn at_local_table(&mut self, node: usize, packet: Packet) {
        if !self.carries(node) {
            return;
        }
        let key = self.flows[packet.flow].key;
        let salt = self.settings.seed;
        let known =
            self.local_tables[node].get(&key).copied().filter(|backend| self.backends[*backend].alive);
        let known = if packet.kind == Kind::Syn { None } else { known };
        let usable = (0..self.backends.len())
            .filter(|backend| self.backends[*backend].usable && self.backends[*backend].alive);
        let Some(backend) = known.or_else(|| best(&key, salt, usable)) else { return };
        self.local_tables[node].insert(key, backend);
        let late = self.latency();
        self.push_in(late, Event::AtBackend { backend, packet });
    }
}
