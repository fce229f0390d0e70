//! The forwarder in memory against the suite that every forwarder passes, and against the fixture table.

use phalanx_flow::packet::Link;
use phalanx_forwarder::conformance::{self, Emitted, Harness, fixtures};
use phalanx_forwarder::engine::TableLimits;
use phalanx_forwarder::memory::{MemoryForwarder, Output};
use phalanx_forwarder::{Forwarder, Plan};

const INTERFACE: u32 = 7;

struct Memory(MemoryForwarder);

impl Harness for Memory {
    fn forwarder(&self) -> &dyn Forwarder {
        &self.0
    }

    fn interface(&self) -> u32 {
        INTERFACE
    }

    fn exchange(&mut self, frames: &[Vec<u8>], _expected: usize) -> Vec<Emitted> {
        let outputs = frames.iter().flat_map(|frame| self.0.inject(frame, Link::Ethernet, INTERFACE));
        let outputs: Vec<Output> = outputs.collect();
        let outputs = outputs.into_iter().chain(self.0.take_sent());
        outputs
            .filter_map(|output| match output {
                Output::Frame { interface, bytes, .. } => {
                    assert_eq!(interface, INTERFACE);
                    Some(Emitted::Frame(bytes))
                }
                Output::ToClient(packet) => Some(Emitted::ToClient(packet)),
                Output::Pass => None,
            })
            .collect()
    }
}

fn start(plan: Plan, limits: TableLimits) -> Box<dyn Harness> {
    Box::new(Memory(MemoryForwarder::new(plan, limits).expect("a plan")))
}

#[test]
fn the_forwarder_in_memory_conforms() {
    conformance::run(&mut start);
}

#[test]
fn every_fixture_is_decided_and_rewritten_as_the_table_says() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../flow/fixtures/packets.txt");
    let text = std::fs::read_to_string(path).expect("the table");
    let (failures, right) = fixtures::run(&text, &mut start);
    if std::env::var_os("UPDATE_EXPECT").is_some() {
        std::fs::write(path, right).expect("the table is written");
    } else {
        assert!(
            failures.is_empty(),
            "{} (UPDATE_EXPECT=1 accepts them)\n{}",
            failures.len(),
            failures.concat()
        );
        assert_eq!(right, text, "the table is not written as it is read");
    }
    let (_, cases) = fixtures::read(&text);
    assert!(cases.len() >= 100, "{} cases", cases.len());
    let mut names: Vec<&str> = cases.iter().map(|case| case.name.as_str()).collect();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), cases.len(), "two cases of one name");
}

#[test]
fn a_fixture_that_is_wrong_fails() {
    let text = "# wrong\nframe: ip4 10.9.0.1>192.0.2.1 tcp 40000>80 S\nin: 00\nverdict: hit\n";
    let (failures, right) = fixtures::run(text, &mut start);
    assert_eq!(failures.len(), 1);
    let (failures, _) = fixtures::run(&right, &mut start);
    assert!(failures.is_empty(), "{failures:?}");
}
