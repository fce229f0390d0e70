//! The way of most packets, beside the whole decision.

use std::vec::Vec;

use super::claims::{BACKUP, NOW_MS, OWNER, RECORDED, THIRD, World, recorded};
use super::*;
use crate::packet::{Link, parse, samples};

/// Segments of all flags, with and without payload, and datagrams.
fn packets() -> Vec<Packet> {
    let mut bytes = Vec::new();
    for family in [4, 6] {
        for flags in 0..=u8::MAX {
            bytes.push(samples::tcp(family, flags, b"data"));
            bytes.push(samples::tcp(family, flags, b""));
        }
        bytes.push(samples::udp(family, b"data"));
        bytes.push(samples::ping(family));
    }
    bytes.iter().filter_map(|bytes| parse(bytes.as_slice(), Link::Ip).ok()).collect()
}

#[test]
fn what_is_a_hit_the_whole_decision_says_too_with_nothing_besides() {
    let mut hits = 0;
    for local in [OWNER, BACKUP, THIRD] {
        for state in [FlowState::HalfOpen, FlowState::Established, FlowState::Closing, FlowState::Reset] {
            // A quarter of the idle timeout is 15 s, of the linger 1.5 s.
            for reported_ms in [0, 1_500, 1_501, 15_000, 15_001].map(|ago_ms| NOW_MS - ago_ms) {
                for failed in [None, Some(RECORDED)] {
                    let flow = recorded().map(|entry| FlowEntry {
                        state: state as u8,
                        last_reported_ms: reported_ms,
                        ..entry
                    });
                    let world = World { flow, failed, ..World::of(local) };
                    for packet in packets() {
                        let Some(found) = hit(&packet, &world) else { continue };
                        hits += 1;
                        let decision = decide(&packet, &Arrival::WIRE, &world);
                        let seen = FlowEntry { last_seen_ms: NOW_MS, ..flow.unwrap() };
                        let seen = if found.is_known_to_owner {
                            FlowEntry { last_reported_ms: NOW_MS, ..seen }
                        } else {
                            seen
                        };
                        let told = (decision.verdict, decision.outcome, decision.action, decision.entry);
                        let expected = (Verdict::Forward(found.backend), Outcome::Hit, Action::Update, seen);
                        assert_eq!(told, expected, "{state:?} {packet:?}");
                        let besides = (decision.event, decision.erase_cache, decision.learn_fragment);
                        assert_eq!(besides, (None, false, false), "{state:?} {packet:?}");
                    }
                }
            }
        }
    }
    assert!(hits > 1_000, "{hits}");
}

#[test]
fn data_of_an_established_connection_is_a_hit_and_whatever_changes_it_is_none() {
    let world = World { flow: recorded(), ..World::of(OWNER) };
    let backend_of = |flags, world: &World| {
        let packet = parse(samples::tcp(4, flags, b"data").as_slice(), Link::Ip).unwrap();
        hit(&packet, world).map(|found| found.backend)
    };
    assert_eq!(backend_of(tcp_flags::ACK, &world), Some(RECORDED));
    for flags in [tcp_flags::SYN, tcp_flags::ACK | tcp_flags::FIN, tcp_flags::RST] {
        assert_eq!(backend_of(flags, &world), None, "{flags}");
    }
    let half_open = recorded().map(|entry| FlowEntry { state: FlowState::HalfOpen as u8, ..entry });
    assert_eq!(backend_of(tcp_flags::ACK, &World { flow: half_open, ..World::of(OWNER) }), None);
    assert_eq!(backend_of(tcp_flags::ACK, &World { failed: Some(RECORDED), ..world.clone() }), None);
    let former = recorded().map(|entry| FlowEntry { flags: FlowFlags(FlowFlags::FORMER), ..entry });
    assert_eq!(backend_of(tcp_flags::ACK, &World { flow: former, ..World::of(OWNER) }), None);
    assert_eq!(backend_of(tcp_flags::ACK, &World { leased: false, ..world.clone() }), None);
    assert_eq!(backend_of(tcp_flags::ACK, &World::of(OWNER)), None);
}

#[test]
fn the_owner_brings_the_time_up_to_date_that_others_report_and_tells_nobody() {
    let flow = recorded().map(|entry| FlowEntry { last_reported_ms: NOW_MS - 15_001, ..entry });
    let packet = parse(samples::tcp(4, tcp_flags::ACK, b"data").as_slice(), Link::Ip).unwrap();
    for (local, event) in [(OWNER, None), (BACKUP, Some(FlowEventKind::Touched))] {
        let world = World { flow, ..World::of(local) };
        let owner = Hit { backend: RECORDED, is_known_to_owner: true };
        assert_eq!(hit(&packet, &world), (local == OWNER).then_some(owner));
        let decision = decide(&packet, &Arrival::WIRE, &world);
        assert_eq!((decision.entry.last_reported_ms, decision.event), (NOW_MS, event));
    }
}

#[test]
fn what_is_a_new_flow_the_whole_decision_says_too_with_nothing_besides() {
    let (mut new, mut none) = (0, 0);
    for local in [OWNER, BACKUP, THIRD] {
        for suspect in [None, Some(OWNER), Some(BACKUP)] {
            for flow in [None, recorded()] {
                for cached in [None, recorded()] {
                    let world = World { suspect, flow, cached, ..World::of(local) };
                    for packet in packets() {
                        let Some(found) = new_flow(&packet, &world) else {
                            none += 1;
                            continue;
                        };
                        new += 1;
                        let decision = decide(&packet, &Arrival::WIRE, &world);
                        let expected = Decision {
                            verdict: Verdict::Forward(found.entry.backend),
                            outcome: Outcome::New,
                            key: packet.key,
                            hash: found.hash,
                            service: decision.service,
                            action: Action::Insert,
                            entry: found.entry,
                            event: Some(FlowEventKind::New),
                            at_once: found.at_once,
                            erase_cache: true,
                            learn_fragment: false,
                        };
                        assert_eq!(decision, expected, "{packet:?}");
                    }
                }
            }
        }
    }
    assert!(new > 100 && none > new, "{new} and {none}");
}

#[test]
fn a_syn_of_the_owners_is_a_new_flow_and_one_that_is_known_or_anothers_is_none() {
    let new = |flags, world: &World| {
        new_flow(&parse(samples::tcp(4, flags, b"").as_slice(), Link::Ip).unwrap(), world).is_some()
    };
    assert!(new(tcp_flags::SYN, &World::of(OWNER)));
    assert!(!new(tcp_flags::SYN | tcp_flags::ACK, &World::of(OWNER)));
    assert!(!new(tcp_flags::ACK, &World::of(OWNER)));
    assert!(!new(tcp_flags::SYN, &World { flow: recorded(), ..World::of(OWNER) }));
    // Not even where the owner is suspected, which is for the whole decision.
    for suspect in [None, Some(OWNER)] {
        assert!(!new(tcp_flags::SYN, &World { suspect, ..World::of(BACKUP) }));
    }
}
