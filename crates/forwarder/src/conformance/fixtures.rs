//! The fixture table: cases as text, with the frames in and out as bytes, for every forwarder and for the object in the kernel.
//!
//! ```text
//! # a claim that names the case
//! with: row=2,1,3 flow=established@1         what differs from the usual world; may be left out
//! frame: ip4 10.9.0.1>192.0.2.1 tcp 40000>80 S        as frames::frame reads it; one or more
//! in: 0200…                                  the same in bytes
//! verdict: handed_off                        outcomes, drops, other counters, events and the flow's entry afterwards
//! out: 0200…                                 frames, or "client " and an IP packet; none or more
//! ```
//! `frame` and `with` are written by hand, the rest by `UPDATE_EXPECT=1`.

use std::fmt::Write as _;
use std::time::Duration;

use phalanx_flow::encap::parse_hand_off;
use phalanx_flow::member::Liveness;
use phalanx_flow::packet::{Link, PacketKind, parse};
use phalanx_flow::{FlowFlags, FlowKey, FlowState, Record};

use super::frames::{COOKIE, frame, hex, unhex};
use super::world::{HANDOFF_PORT, World, backends, ip};
use super::{Emitted, Harness, Start};
use crate::counters::{Counters, Drop, OUTCOME_NAMES};
use crate::engine::TableLimits;

/// One case.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Case {
    /// The claim.
    pub name: String,
    /// What differs from the usual world.
    pub with: String,
    /// Frames as lines.
    pub frames: Vec<String>,
    /// Frames as bytes.
    pub input: Vec<Vec<u8>>,
    /// What is counted, told and recorded.
    pub verdict: String,
    /// What comes out.
    pub output: Vec<String>,
}

/// Reads a table. Lines before the first case are its preface.
///
/// # Panics
/// If it is not one.
pub fn read(text: &str) -> (String, Vec<Case>) {
    let mut preface = String::new();
    let mut cases: Vec<Case> = Vec::new();
    for line in text.lines() {
        if let Some(name) = line.strip_prefix("# ") {
            cases.push(Case { name: name.to_owned(), ..Case::default() });
            continue;
        }
        let Some(case) = cases.last_mut() else {
            let _ = writeln!(preface, "{line}");
            continue;
        };
        match line.split_once(": ") {
            Some(("with", value)) => value.clone_into(&mut case.with),
            Some(("frame", value)) => case.frames.push(value.to_owned()),
            Some(("in", value)) => case.input.push(unhex(value)),
            Some(("verdict", value)) => value.clone_into(&mut case.verdict),
            Some(("out", value)) => case.output.push(value.to_owned()),
            _ => assert!(line.is_empty(), "not a line of a case: {line:?}"),
        }
    }
    (preface, cases)
}

/// Writes a table.
pub fn write(preface: &str, cases: &[Case]) -> String {
    let mut text = preface.to_owned();
    for case in cases {
        let _ = writeln!(text, "# {}", case.name);
        if !case.with.is_empty() {
            let _ = writeln!(text, "with: {}", case.with);
        }
        for (line, bytes) in case.frames.iter().zip(&case.input) {
            let _ = writeln!(text, "frame: {line}\nin: {}", hex(bytes));
        }
        let _ = writeln!(text, "verdict: {}", case.verdict);
        for output in &case.output {
            let _ = writeln!(text, "out: {output}");
        }
        text.push('\n');
    }
    while text.ends_with("\n\n") {
        text.pop();
    }
    text
}

/// Flows that leave no share of a table of one flow empty, however it is cut into shares.
const FILL: u16 = 4096;

fn other_flow(port: u16) -> FlowKey {
    FlowKey::new(6, (ip("10.9.0.77"), port), (ip("192.0.2.1"), 80)).expect("one family")
}

/// Runs a case on a forwarder, and returns it with what happened in the place of what was expected.
///
/// # Panics
/// If the case is written wrong.
pub fn play(case: &Case, start: &mut Start<'_>) -> Case {
    let mut world = World::default();
    let mut records = Vec::new();
    let mut cached = Vec::new();
    let mut leased = true;
    let mut limits = TableLimits { flows: 4096, half_open: 4096, cached: 4096 };
    let input: Vec<Vec<u8>> = case.frames.iter().map(|line| frame(line)).collect();
    let subject = input.iter().find_map(|bytes| flow_of(bytes));
    for word in case.with.split(' ').filter(|word| !word.is_empty()) {
        let (name, value) = word.split_once('=').unwrap_or((word, ""));
        let ids = || -> Vec<u32> {
            let ids = value.split(',').filter(|id| !id.is_empty());
            ids.map(|id| id.parse().expect("a member id")).collect()
        };
        match name {
            "row" => world.row = ids(),
            "previous" => world.previous = Some(ids()),
            "suspect" => world.liveness.extend(ids().into_iter().map(|id| (id, Liveness::Suspect))),
            "down" => world.liveness.extend(ids().into_iter().map(|id| (id, Liveness::Down))),
            "backend" => world.backend = value.parse().expect("a backend"),
            "earlier" => world.earlier = Some(value.parse().expect("a backend")),
            "failed" => world.failed = Some(value.parse().expect("a backend")),
            "mtu" => world.mtu = value.parse().expect("an MTU"),
            "unsettled" => world.unsettled = true,
            "replicate-syn" => world.replicate_syn = true,
            "fragment-hand-offs" => world.fragment_hand_offs = true,
            "unresolved" => world.resolved = false,
            "no-lease" => leased = false,
            "full" => {
                limits.flows = 1;
                records.extend((1..=FILL).map(|port| record(other_flow(port), "established@0")));
            }
            "flow" => records.push(record(subject.expect("a flow"), value)),
            "cache" => cached.push(record(subject.expect("a flow"), value)),
            other => panic!("unknown condition {other:?}"),
        }
    }
    let mut harness = start(world.plan(), limits);
    harness.forwarder().set_next_hops(world.next_hops(harness.interface()));
    harness.forwarder().renew_lease(Duration::from_secs(if leased { 60 } else { 0 }));
    harness.forwarder().upsert(&records);
    harness.forwarder().upsert_cache(&cached);
    let before = harness.forwarder().counters();
    let emitted = harness.exchange(&input, case.output.len());
    let verdict = verdict(&*harness, &before, subject.as_ref());
    let output = emitted
        .into_iter()
        .map(|emitted| match emitted {
            Emitted::Frame(bytes) => hex(&bytes),
            Emitted::ToClient(packet) => format!("client {}", hex(&without_identification(packet))),
        })
        .collect();
    Case { input, verdict, output, ..case.clone() }
}

/// The kernel gives an IPv4 packet of ours an identification where it had none.
fn without_identification(mut packet: Vec<u8>) -> Vec<u8> {
    if packet[0] >> 4 == 4 {
        packet[4..6].fill(0);
        packet[10..12].fill(0);
    }
    packet
}

/// The flow that a frame belongs to; what is inside, for a hand-off.
fn flow_of(bytes: &[u8]) -> Option<FlowKey> {
    let packet = parse(bytes, Link::Ethernet).ok()?;
    if packet.kind == PacketKind::Datagram && packet.key.destination_port == HANDOFF_PORT.to_be_bytes() {
        let (_, inner) =
            parse_hand_off(bytes, usize::from(packet.payload_offset()), [COOKIE, COOKIE + 1]).ok()?;
        return Some(parse(&bytes[inner..], Link::Ip).ok()?.key);
    }
    Some(packet.key)
}

/// `STATE@BACKEND[,AGE_MS][,recovered]`.
fn record(key: FlowKey, text: &str) -> Record {
    let (state, rest) = text.split_once('@').expect("STATE@BACKEND");
    let mut words = rest.split(',');
    let backend: usize = words.next().and_then(|word| word.parse().ok()).expect("a backend");
    let mut record = Record {
        key,
        backend: backends()[backend],
        birth: 1,
        update: 0,
        state: match state {
            "half-open" => FlowState::HalfOpen,
            "established" => FlowState::Established,
            "closing" => FlowState::Closing,
            "reset" => FlowState::Reset,
            other => panic!("no state {other:?}"),
        },
        flags: FlowFlags(0),
        idle_ms: 0,
    };
    for word in words {
        match word {
            "recovered" => record.flags = record.flags.with(FlowFlags::RECOVERED, true),
            age => record.idle_ms = age.parse().expect("an age"),
        }
    }
    record
}

/// What the forwarder counted and told since `before`, and what it knows of the flow now.
fn verdict(harness: &dyn Harness, before: &Counters, subject: Option<&FlowKey>) -> String {
    let after = harness.forwarder().counters();
    let mut said = Vec::new();
    let mut count = |name: &str, before: u64, after: u64| match after.saturating_sub(before) {
        0 => {}
        1 => said.push(name.to_owned()),
        n => said.push(format!("{name}x{n}")),
    };
    for (place, name) in OUTCOME_NAMES.iter().enumerate() {
        count(name, before.outcomes[place], after.outcomes[place]);
    }
    for reason in Drop::ALL {
        count(&format!("drop:{}", reason.name()), before.dropped(reason), after.dropped(reason));
    }
    count("handoff_in", before.handoffs_in, after.handoffs_in);
    count("table_full", before.table_full, after.table_full);
    count("segmented", before.segmented, after.segmented);
    count("fragmented", before.fragmented, after.fragmented);
    count("cached", before.cached, after.cached);
    count("uncached", after.cached, before.cached);
    let mut events = Vec::new();
    while harness.forwarder().poll_events(&mut events, 1024) {}
    for event in events {
        let at_once = if event.at_once { ",at-once" } else { "" };
        said.push(format!("event:{:?}({}{at_once})", event.kind, describe(&event.record)));
    }
    if let Some(record) = subject.and_then(|key| harness.forwarder().get(key)) {
        said.push(format!("entry({})", describe(&record)));
    }
    said.join(" ")
}

fn describe(record: &Record) -> String {
    let backend = backends().iter().position(|id| *id == record.backend);
    let backend = backend.map_or("?".to_owned(), |backend| backend.to_string());
    let mut text = format!("{:?}@{backend}", record.state);
    for (bit, name) in [(FlowFlags::RECOVERED, "recovered"), (FlowFlags::DEVIATES, "deviates")] {
        if record.flags.has(bit) {
            let _ = write!(text, ",{name}");
        }
    }
    text
}

/// Runs every case of a table and says how those that failed did. The second is the table as it would be if all were right.
pub fn run(text: &str, start: &mut Start<'_>) -> (Vec<String>, String) {
    let (preface, cases) = read(text);
    let played: Vec<Case> = cases.iter().map(|case| play(case, start)).collect();
    let failures = cases.iter().zip(&played).filter(|(expected, played)| expected != played);
    let failures = failures.map(|(expected, played)| difference(expected, played)).collect();
    (failures, write(&preface, &played))
}

/// How what happened differs from what was expected.
pub fn difference(expected: &Case, played: &Case) -> String {
    let mut text = format!("# {}\n", expected.name);
    if expected.input != played.input {
        text.push_str("  the frame in bytes is not the frame in words\n");
    }
    if expected.verdict != played.verdict {
        let _ = writeln!(text, "  expected: {}\n  got:      {}", expected.verdict, played.verdict);
    }
    if expected.output != played.output {
        let _ =
            writeln!(text, "  expected out: {:#?}\n  got out:      {:#?}", expected.output, played.output);
    }
    text
}
