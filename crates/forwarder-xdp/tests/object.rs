//! What can be said of the committed object without privileges.

use std::path::Path;

use phalanx_forwarder_xdp::abi::{APPLY, ENTRY, STAGES};
use phalanx_forwarder_xdp::object::{OBJECT, OBJECT_SOURCES, bench_source_digest, source_digest};

/// Digest of the sources of the programs that the benchmark compares with.
const BENCH_SOURCES: &str = include_str!("../phalanx-xdp-bench.sources");

fn root() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
}

/// Whether a name stands in the object's table of symbols, with zeroes around it.
fn names(name: &str) -> bool {
    let wanted: Vec<u8> = [&[0], name.as_bytes(), &[0]].concat();
    OBJECT.windows(wanted.len()).any(|bytes| bytes == wanted)
}

#[test]
fn the_objects_were_built_from_these_sources() {
    assert_eq!(source_digest(root()).unwrap(), OBJECT_SOURCES, "cargo xtask ebpf build");
    assert_eq!(bench_source_digest(root()).unwrap(), BENCH_SOURCES, "cargo xtask ebpf build");
}

#[test]
fn the_object_has_the_programs_and_maps_that_the_loader_looks_for() {
    for program in STAGES.into_iter().chain([ENTRY, APPLY]) {
        assert!(names(program), "program {program}");
    }
    for map in [
        "ACTIVE",
        "LEASE",
        "HEADERS",
        "FLOWS4",
        "FLOWS6",
        "HALF_OPEN",
        "CACHE",
        "EVENTS",
        "PUNTS",
        "STAGES",
        "WORK",
    ] {
        assert!(names(map), "map {map}");
    }
    assert!(!names("phalanx_nothing"), "and a name that is not there is not found");
}

#[test]
fn the_object_is_little_endian_and_names_no_place_of_the_machine_that_built_it() {
    assert_eq!(OBJECT.get(..6), Some(&b"\x7fELF\x02\x01"[..]));
    for place in ["/root/", "/home/", "/tmp/"] {
        assert!(!OBJECT.windows(place.len()).any(|bytes| bytes == place.as_bytes()), "{place}");
    }
}
