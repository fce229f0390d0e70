//! What the program in the kernel costs, beside programs written to be compared with, in the same run (`cargo xtask bench xdp`).
//!
//! ```text
//!  test runs    BPF_PROG_TEST_RUN ─► harness ─► tail call ─► one program              ns a packet
//!  live frames  generate ─► near0 ══ far0: reflect, minimal or phalanx ─► XDP_TX ─► near0: sink   packets/s
//! ```
//! All in one network namespace, which goes with the process. See docs/performance.md.

mod report;
mod site;

use std::error::Error;
use std::time::{Duration, Instant};

use aya::programs::{TestRun, TestRunAttrs, TestRunOptions, Xdp};
use phalanx_forwarder::conformance::frames::frame;

use crate::abi::{Config, DIRECT, HANDED_OFF};
use crate::report::Report;
use crate::site::{Site, Subject};

#[path = "../../bench/abi.rs"]
mod abi;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Rounds unless told otherwise: each measures every case once, in an order that rotates.
const ROUNDS: usize = 60;
/// Packets of one measurement; each call costs some 25 ms besides, whatever their number.
const PACKETS: u32 = 60_000;
/// The same of new flows: as many as the ring of events has room for, since nobody reads it meanwhile.
const NEW_FLOWS: u32 = 40_000;
/// Tries of a measurement. On a busy machine the kernel may leave received frames to a thread, which this process keeps from running
/// until the ring is full: then frames are missing at the sink, and what was measured says nothing.
const TRIES: u32 = 5;
/// Live frames that the kernel hands over at a time.
const BATCH: u32 = 64;

/// The frames offered: 64 bytes, as short as Ethernet's (without FCS).
const ACK: &str = "ip4 10.128.0.0>192.0.2.1 tcp 16384>80 A len=10";
const SYN: &str = "ip4 10.128.0.0>192.0.2.1 tcp 16384>80 S len=10";
/// The first of them as another member hands it off.
const HANDED: &str = "ip4 10.0.0.2>10.0.0.1 handoff 6081 {ip4 10.128.0.0>192.0.2.1 tcp 16384>80 A len=10}";

/// Flows of a case, as powers of two.
const ONE: u32 = 0;
const K64: u32 = 16;
const M1: u32 = 20;
/// So many that hardly any comes twice while the table of half-open flows remembers it.
const M16: u32 = 24;

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Case {
    /// What happens.
    pub(crate) name: &'static str,
    /// What runs.
    pub(crate) subject: Subject,
    /// The frame.
    line: &'static str,
    /// Number of flows, as a power of two.
    pub(crate) flows: u32,
    /// With live frames.
    pub(crate) live: bool,
    /// What it is compared with: a name and flows, and the most that the ratio may be (the least, with live frames).
    pub(crate) reference: Option<(&'static str, u32, Option<f64>)>,
}

const fn run(name: &'static str, subject: Subject, line: &'static str, flows: u32) -> Case {
    Case { name, subject, line, flows, live: false, reference: None }
}

impl Case {
    const fn beside(self, name: &'static str, flows: u32, target: Option<f64>) -> Self {
        Self { reference: Some((name, flows, target)), ..self }
    }

    const fn live(self) -> Self {
        Self { live: true, ..self }
    }

    /// Whether the frame is one that another member handed off.
    pub(crate) fn handed_off(&self) -> bool {
        self.line == HANDED
    }
}

/// The cases. The references come before what is compared with them.
const CASES: &[Case] = &[
    run("harness alone", Subject::Finish, ACK, ONE),
    run("harness alone, handed off", Subject::Finish, HANDED, ONE),
    run("reflect", Subject::Reflect, ACK, ONE).beside("minimal", ONE, None),
    run("minimal", Subject::Minimal, ACK, ONE),
    run("minimal", Subject::Minimal, ACK, K64),
    run("minimal", Subject::Minimal, ACK, M1),
    run("hit", Subject::Owner, ACK, ONE).beside("minimal", ONE, Some(1.6)),
    run("hit", Subject::Owner, ACK, K64).beside("minimal", K64, None),
    run("hit", Subject::Owner, ACK, M1).beside("minimal", M1, Some(1.15)),
    run("new flow, 1,024 half-open", Subject::Small, SYN, K64).beside("minimal", ONE, Some(4.0)),
    run("new flow, 65,536 half-open", Subject::Owner, SYN, M16).beside("minimal", M1, None),
    run("hand-off out", Subject::Out, ACK, ONE).beside("minimal", ONE, None),
    run("hand-off out", Subject::Out, ACK, K64).beside("minimal", K64, None),
    run("hand-off out", Subject::Out, ACK, M1).beside("minimal", M1, None),
    run("hand-off in", Subject::Owner, HANDED, ONE).beside("minimal", ONE, None),
    run("hand-off in", Subject::Owner, HANDED, K64).beside("minimal", K64, None),
    run("hand-off in", Subject::Owner, HANDED, M1).beside("minimal", M1, None),
    run("hit, 3 members", Subject::Members3, ACK, K64),
    run("hit, 64 members", Subject::Members64, ACK, K64).beside("hit, 3 members", K64, None),
    run("hand-off, 3 members", Subject::Members3, SYN, M1),
    run("hand-off, 64 members", Subject::Members64, SYN, M1).beside("hand-off, 3 members", M1, None),
    run("reflect", Subject::Reflect, ACK, ONE).live(),
    run("minimal", Subject::Minimal, ACK, ONE).live().beside("reflect", ONE, None),
    run("minimal", Subject::Minimal, ACK, K64).live().beside("reflect", ONE, None),
    run("minimal", Subject::Minimal, ACK, M1).live().beside("reflect", ONE, None),
    run("hit", Subject::Owner, ACK, ONE).live().beside("reflect", ONE, Some(0.85)),
    run("hit", Subject::Owner, ACK, K64).live().beside("reflect", ONE, Some(0.55)),
    run("hit", Subject::Owner, ACK, M1).live().beside("reflect", ONE, None),
    run("new flow, 65,536 half-open", Subject::Owner, SYN, M16).live().beside("reflect", ONE, None),
    run("hand-off out", Subject::Out, ACK, K64).live().beside("reflect", ONE, None),
    run("hand-off in", Subject::Owner, HANDED, K64).live().beside("reflect", ONE, None),
];

fn main() -> Result<()> {
    let (mut rounds, mut json, mut object, mut cases) = (ROUNDS, false, None, CASES.to_vec());
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--json" => json = true,
            "--only" => cases = only(&arguments.next().ok_or("--only needs the name of a case")?),
            "--object" => object = Some(arguments.next().ok_or("--object needs a path")?.into()),
            number => {
                rounds = number.parse().map_err(|_| {
                    format!("a number of rounds, --json, --only NAME or --object PATH, not {number}")
                })?
            }
        }
    }
    // SAFETY: no arguments.
    if unsafe { libc::geteuid() } != 0 {
        return Err(
            "this benchmark needs root: it loads programs into the kernel and makes a network namespace"
                .into(),
        );
    }
    let mut site = Site::build(object)?;
    let mut report = Report::new(cases.clone());
    for round in 0..rounds {
        let mut measured = vec![Measured::default(); cases.len()];
        for turn in 0..cases.len() {
            // Who comes first changes, so that none gains from what the one before left in the caches.
            let place = (turn + round * 7) % cases.len();
            measured[place] = measure_again(&mut site, &cases[place])?;
        }
        report.add(&measured);
    }
    if json {
        report.print_json()?
    } else {
        report.print()
    }
    Ok(())
}

/// The test runs of this name and what they are compared with: so that two objects can be compared in short runs by turns.
fn only(name: &str) -> Vec<Case> {
    let of_name = || CASES.iter().filter(|case| case.name == name && !case.live);
    let needed = |case: &Case| {
        case.name.starts_with("harness alone")
            || case.name == name
            || of_name().any(|named| matches!(named.reference, Some((other, ..)) if other == case.name))
    };
    CASES.iter().copied().filter(|case| !case.live && needed(case)).collect()
}

/// What one case took in one round, in nanoseconds a packet.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Measured {
    /// The packet; with live frames the time between two that reach the sink.
    pub(crate) packet: f64,
    /// The whole call of `BPF_PROG_TEST_RUN`, which takes some 25 ms more than its packets.
    pub(crate) call: f64,
}

/// As [`measure`], and once more if that was disturbed.
fn measure_again(site: &mut Site, case: &Case) -> Result<Measured> {
    let mut tries = 0;
    loop {
        tries += 1;
        match measure(site, case) {
            Err(error) if tries < TRIES => eprintln!("{error}: once more"),
            result => return result,
        }
    }
}

fn measure(site: &mut Site, case: &Case) -> Result<Measured> {
    let bytes = frame(case.line);
    let new = case.line == SYN;
    let packets = if new { NEW_FLOWS } else { PACKETS };
    let mut config = Config {
        mask: (1 << case.flows) - 1,
        length: u32::try_from(bytes.len())?,
        // Flows that are recorded, or others.
        source: if new { site::STRANGERS } else { site::CLIENTS },
        target: case.subject as u32,
        interface: site.near(case.subject),
        ..Config::default()
    };
    let headers = if case.handed_off() { HANDED_OFF } else { DIRECT };
    for (place, word) in bytes[..headers].chunks(8).enumerate() {
        let mut whole = [0; 8];
        whole[..word.len()].copy_from_slice(word);
        config.head[place] = u64::from_ne_bytes(whole);
    }
    site.configure(config)?;
    site.forget_events();
    let name = match (case.live, case.handed_off()) {
        (false, false) => "harness",
        (false, true) => "harness_in",
        (true, false) => "generate",
        (true, true) => "generate_in",
    };
    // `struct xdp_md`: the program must see its own interface, so that it sends back and does not redirect.
    let ingress = if case.live { 0 } else { site.far(case.subject) };
    let context = [0, config.length, 0, ingress, 0, 0].map(u32::to_ne_bytes).concat();
    site.empty_sinks()?;
    let program: &Xdp = site.program(name)?;
    let mut options = TestRunOptions::new();
    options.data_in = Some(&bytes);
    options.repeat = packets;
    if case.live {
        options.attrs = TestRunAttrs::new().xdp_live_frames(BATCH);
    } else {
        options.ctx_in = Some(&context);
    }
    let started = Instant::now();
    let result = program.test_run(options)?;
    let call = started.elapsed().as_nanos() as f64 / f64::from(packets);
    let nanoseconds = result.duration.as_nanos() as f64;
    if !case.live {
        // XDP_TX: whatever else it did, it did not do what is measured.
        if result.return_value != 3 {
            return Err(format!("{} returned {}", case.name, result.return_value).into());
        }
        return Ok(Measured { packet: nanoseconds, call });
    }
    // The last ones may still be on their way.
    std::thread::sleep(Duration::from_millis(1));
    let (arrived, apart) = site.sunk()?;
    if arrived * 10 < u64::from(packets) * 9 {
        return Err(format!("of {packets} frames of {} {arrived} arrived", case.name).into());
    }
    Ok(Measured { packet: apart, call })
}
