//! What can be said of the committed object without privileges.

use std::path::{Path, PathBuf};

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

/// A copy of what the digests are of, for one test.
fn copied(name: &str) -> PathBuf {
    fn copy(from: &Path, to: &Path) {
        std::fs::create_dir_all(to).unwrap();
        for entry in std::fs::read_dir(from).unwrap() {
            let (path, to) = (entry.as_ref().unwrap().path(), to.join(entry.unwrap().file_name()));
            if path.is_dir() {
                copy(&path, &to);
            } else {
                std::fs::copy(&path, &to).unwrap();
            }
        }
    }
    let to = std::env::temp_dir().join(format!("phalanx-{name}-{}", std::process::id()));
    for part in [
        "crates/flow/src",
        "crates/forwarder-xdp/src",
        "crates/forwarder-xdp/ebpf",
        "crates/forwarder-xdp/bench",
    ] {
        copy(&root().join(part), &to.join(part));
    }
    to
}

#[test]
fn a_change_of_any_source_of_the_object_is_seen_and_one_of_a_test_is_not() {
    let copy = copied("sources");
    assert_eq!(source_digest(&copy).unwrap(), OBJECT_SOURCES);
    let append = |file: &str| {
        let path = copy.join(file);
        let before = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, format!("{before}\n")).unwrap();
        let digest = source_digest(&copy).unwrap();
        std::fs::write(&path, before).unwrap();
        digest
    };
    for file in [
        "flow/src/decide.rs",
        "flow/src/packet/parse.rs",
        "forwarder-xdp/src/abi.rs",
        "forwarder-xdp/ebpf/src/stages/enter.rs",
        "forwarder-xdp/ebpf/Cargo.lock",
    ] {
        assert_ne!(append(&format!("crates/{file}")), OBJECT_SOURCES, "{file}");
    }
    for file in ["flow/src/decide/tests.rs", "forwarder-xdp/src/lib.rs"] {
        assert_eq!(append(&format!("crates/{file}")), OBJECT_SOURCES, "{file}");
    }
    std::fs::remove_dir_all(copy).unwrap();
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
        "MEMBERS",
        "MEMBER_SLOTS",
        "BACKENDS",
        "SERVICES",
        "FRONT_SERVICES",
        "FAILED",
        "ROW_TABLE",
        "SLOT_TABLE",
        "FLOWS4",
        "FLOWS6",
        "HALF_OPEN",
        "CACHE",
        "FRAGMENTS",
        "COUNTERS",
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
