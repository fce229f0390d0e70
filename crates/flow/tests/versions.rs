//! Which of two records of one flow stays (design §4, "Versions"; docs/design/0009-later-birth.md).
#![expect(clippy::expect_used, clippy::panic, reason = "tests run on the host and may fail loudly")]

use core::cmp::Ordering;
use core::net::IpAddr;

use phalanx_flow::key::{TCP, UDP};
use phalanx_flow::{
    BIRTH_MS_BITS, BackendId, BackendIndex, FlowEntry, FlowFlags, FlowKey, FlowState, Method, Record, Vintage,
};

const STATES: [FlowState; 4] =
    [FlowState::HalfOpen, FlowState::Established, FlowState::Closing, FlowState::Reset];

fn record(protocol: u8, recovered: bool, state: FlowState, birth: u64, update: u32, backend: u8) -> Record {
    let address = |last: u8| IpAddr::from([192, 0, 2, last]);
    Record {
        key: FlowKey::new(protocol, (address(1), 4000), (address(2), 443)).expect("of one family"),
        backend: BackendId::new(address(backend), Method::L2, 0),
        birth,
        update,
        state,
        flags: FlowFlags(if recovered { FlowFlags::RECOVERED } else { 0 }),
        idle_ms: 0,
    }
}

fn all(protocol: u8) -> Vec<Record> {
    let mut records = Vec::new();
    for recovered in [false, true] {
        for state in STATES {
            for birth in [0, 10, 20, 30] {
                for update in [0, 1] {
                    for backend in [5, 6] {
                        records.push(record(protocol, recovered, state, birth, update, backend));
                    }
                }
            }
        }
    }
    records
}

/// How `a` stands to `b`: `Greater` if it stays whichever comes second.
fn order(a: &Record, b: &Record) -> Ordering {
    match (b.is_replaced_by(a), a.is_replaced_by(b)) {
        (true, false) => Ordering::Greater,
        (false, true) => Ordering::Less,
        (false, false) => Ordering::Equal,
        (true, true) => panic!("each replaces the other: {a:?} {b:?}"),
    }
}

#[test]
fn two_records_of_one_flow_are_ordered_the_same_way_everywhere() {
    for protocol in [TCP, UDP] {
        let records = all(protocol);
        for a in &records {
            for b in &records {
                assert_eq!(order(a, b), order(b, a).reverse());
                let same = (a.backend, a.birth, a.update, a.state, a.flags)
                    == (b.backend, b.birth, b.update, b.state, b.flags);
                assert_eq!(order(a, b) == Ordering::Equal, same, "{a:?} {b:?}");
            }
        }
    }
}

/// But one: a guess, after a connection that has ended, after one that lives somewhere still.
#[test]
fn the_order_has_no_other_circle_than_that_of_a_guess_after_an_end() {
    let made = |record: &Record| !record.flags.has(FlowFlags::RECOVERED);
    for protocol in [TCP, UDP] {
        let records = all(protocol);
        let mut circles = 0;
        for a in &records {
            for b in &records {
                for c in &records {
                    if [order(a, b), order(b, c), order(c, a)] != [Ordering::Greater; 3] {
                        continue;
                    }
                    circles += 1;
                    // An unstamped birth is the latest.
                    let birth = |record: &Record| record.birth.wrapping_sub(1);
                    let is_circle =
                        [[a, b, c], [b, c, a], [c, a, b]].into_iter().any(|[guess, ended, before]| {
                            !made(guess)
                                && made(ended)
                                && !ended.state.is_live()
                                && birth(guess) > birth(ended)
                                && (!made(before) || before.state.is_live())
                                && birth(before) <= birth(ended)
                        });
                    assert!(is_circle, "{a:?} {b:?} {c:?}");
                }
            }
        }
        assert_eq!(circles > 0, protocol == TCP);
    }
}

#[test]
fn a_connection_that_uses_a_tuple_again_takes_the_place_of_the_one_before_however_far_each_has_come() {
    for before in STATES {
        for now in STATES {
            let old = record(TCP, false, before, 10, 7, 5);
            let new = record(TCP, false, now, 20, 1, 6);
            assert_eq!(order(&new, &old), Ordering::Greater, "{now:?} after {before:?}");
        }
    }
    // The twin: datagrams say nothing of a new beginning.
    let [old, new] =
        [(10, 5), (20, 6)].map(|(birth, backend)| record(UDP, false, STATES[1], birth, 0, backend));
    assert_eq!(order(&new, &old), Ordering::Less);
}

#[test]
fn what_was_guessed_never_overwrites_what_a_syn_made_nor_an_earlier_guess() {
    let guess = record(TCP, true, FlowState::Established, 20, 3, 5);
    for state in [FlowState::HalfOpen, FlowState::Established] {
        assert_eq!(order(&record(TCP, false, state, 10, 0, 6), &guess), Ordering::Greater);
    }
    let earlier = record(TCP, true, FlowState::Closing, 10, 3, 6);
    assert_eq!(order(&earlier, &guess), Ordering::Greater);
}

/// A guess that reached another backend than the connection's has reset it. So where an ended connection's record is not of the guess's
/// backend, the packet that was guessed for was of the tuple's next use, whose own record is lost with who made it.
#[test]
fn a_guess_after_a_connections_end_is_of_the_tuples_next_use() {
    for state in [FlowState::Closing, FlowState::Reset] {
        let ended = record(TCP, false, state, 10, 7, 6);
        for guessed in STATES {
            assert_eq!(order(&record(TCP, true, guessed, 20, 0, 5), &ended), Ordering::Greater);
            // The twin: guessed before the SYN that made the other.
            assert_eq!(order(&record(TCP, true, guessed, 5, 0, 5), &ended), Ordering::Less);
        }
        // Datagrams have no end.
        let datagram = |recovered, birth| record(UDP, recovered, state, birth, 0, 5);
        assert_eq!(order(&datagram(true, 20), &datagram(false, 10)), Ordering::Less);
    }
}

/// The same as an entry.
fn entry(record: &Record) -> FlowEntry {
    FlowEntry {
        birth: record.birth,
        last_seen_ms: 0,
        last_reported_ms: 0,
        update: record.update,
        backend: BackendIndex(0),
        state: record.state as u8,
        flags: record.flags,
        reserved: [0; 6],
    }
}

/// docs/design/0013-births-in-hand-offs.md. A birth counts milliseconds above 12 bits.
#[test]
fn the_vintage_in_a_hand_off_orders_connections_as_their_records_are_ordered() {
    const DAY_MS: u64 = 24 * 60 * 60 * 1_000;
    // Also where 30 bits of 2 ms wrap. (The very step of it counts as the next one.)
    for begin in [2, 1_800_000_000_000, (1 << 31) - 10, (1 << 31) + 2] {
        let births = [0, 2, 4, 18, 2_000, DAY_MS, 12 * DAY_MS].map(|later| (begin + later) << BIRTH_MS_BITS);
        let kinds = [false, true].into_iter().flat_map(|recovered| STATES.map(|state| (recovered, state)));
        let records: Vec<Record> = kinds
            .flat_map(|(recovered, state)| {
                let of = move |birth| record(TCP, recovered, state, birth, 0, 5);
                births.into_iter().chain([0]).map(of)
            })
            .collect();
        for a in &records {
            for b in &records {
                // One use of the tuple, which a vintage does not tell apart by what came later.
                if a.birth == b.birth && a.flags == b.flags {
                    continue;
                }
                let replaced = Vintage::of(&entry(a)).is_replaced_by(Vintage::of(&entry(b)));
                assert_eq!(replaced, a.is_replaced_by(b), "{a:?} {b:?}");
            }
        }
    }
    // Made within 2 ms: one use of the tuple.
    let [a, b] =
        [1, 2].map(|counter| record(TCP, false, FlowState::Established, 6 << BIRTH_MS_BITS | counter, 0, 5));
    assert!(!Vintage::of(&entry(&a)).is_replaced_by(Vintage::of(&entry(&b))));
}
