//! The suite that every forwarder passes, and the table of packets, over a packet socket and a veth pair.

use std::sync::Arc;

use phalanx_forwarder::conformance::{self, Emitted, Harness, fixtures};
use phalanx_forwarder::engine::TableLimits;
use phalanx_forwarder::{Forwarder, Plan};
use phalanx_forwarder_rawsock::{Config, RawsockForwarder};
use phalanx_integration::wire::{INTERFACE, Wire, ip, seen};

struct Rawsock {
    forwarder: RawsockForwarder,
    wire: Arc<Wire>,
}

impl Harness for Rawsock {
    fn forwarder(&self) -> &dyn Forwarder {
        &self.forwarder
    }

    fn interface(&self) -> u32 {
        self.wire.index()
    }

    fn exchange(&mut self, frames: &[Vec<u8>], expected: usize) -> Vec<Emitted> {
        self.wire.exchange(frames, expected, &|| seen(&self.forwarder.counters()))
    }
}

/// A forwarder on the wire's host, whose namespace the calling thread is in.
fn start(wire: &Arc<Wire>, plan: Plan, limits: TableLimits) -> Box<dyn Harness> {
    let config =
        Config { limits, ring_bytes: 1 << 20, ..Config::new(vec![INTERFACE.to_owned()], ip("10.0.0.1")) };
    let forwarder = RawsockForwarder::start(&config, plan).expect("the forwarder starts");
    Box::new(Rawsock { forwarder, wire: Arc::clone(wire) })
}

/// Runs `body` on a thread in the namespace of a new wire's host.
fn on_host(body: impl FnOnce(&Arc<Wire>) + Send + 'static) {
    let wire = Arc::new(Wire::new());
    let thread = {
        let wire = Arc::clone(&wire);
        wire.clone().host().spawn_thread(move || body(&wire)).expect("a thread")
    };
    match thread.join() {
        Ok(entered) => entered.expect("the namespace is entered"),
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

#[test]
fn the_raw_socket_forwarder_conforms() {
    on_host(|wire| {
        conformance::run(&mut |plan, limits| start(wire, plan, limits));
        assert_eq!(wire.by_kernel(), 0, "the kernel forwarded what is ours");
    });
}

/// The table's frames that no Ethernet interface delivers: shorter than an Ethernet header.
const TOO_SHORT: &[&str] = &["a frame that ends in the Ethernet header is the kernel's"];

#[test]
fn every_fixture_comes_out_of_a_real_interface_as_the_table_says() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../crates/flow/fixtures/packets.txt");
    let text = std::fs::read_to_string(path).expect("the table");
    let (_, cases) = fixtures::read(&text);
    assert!(cases.len() >= 100, "{} cases", cases.len());
    on_host(move |wire| {
        let mut failures = Vec::new();
        let (mut handled_by_kernel, mut too_short) = (0, Vec::new());
        for case in &cases {
            if case.input.iter().any(|frame| frame.len() < 14) {
                too_short.push(case.name.as_str());
                continue;
            }
            let mut expected = case.clone();
            let kernels = case.verdict == "passed";
            let before = wire.by_kernel();
            let mut played = fixtures::play(case, &mut |plan, limits| start(wire, plan, limits));
            let by_kernel = wire.by_kernel() - before;
            if kernels {
                // Most of what is the kernel's is not seen here, because the filter leaves it alone; some the kernel answers.
                expected.verdict.clone_from(&played.verdict);
                assert!(
                    ["", "passed"].contains(&played.verdict.as_str()),
                    "{}: {}",
                    case.name,
                    played.verdict
                );
                let sent = played.output.len();
                played.output.retain(|output| !output.starts_with("client "));
                handled_by_kernel += u64::from(by_kernel > 0 || played.output.len() < sent);
            } else if by_kernel != 0 {
                failures.push(format!("# {}\n  the kernel forwarded it too\n", case.name));
            }
            if played != expected {
                failures.push(fixtures::difference(&expected, &played));
            }
        }
        assert!(failures.is_empty(), "{} of {}\n{}", failures.len(), cases.len(), failures.concat());
        assert_eq!(too_short, TOO_SHORT);
        // The twin: what is not ours the kernel does handle, so that a second copy of what is ours would be seen.
        assert!(handled_by_kernel >= 4, "{handled_by_kernel} frames were handled by the kernel");
    });
}
