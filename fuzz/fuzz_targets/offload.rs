//! Any packet that is cut into segments or fragments gives packets that parse and are no longer than asked for.
#![no_main]

use libfuzzer_sys::fuzz_target;
use phalanx_flow::offload::{finish_checksum, fragment, segment};
use phalanx_flow::packet::{Link, parse};

/// Bytes in front of each packet made.
const HEADROOM: usize = 64;

fuzz_target!(|input: (u16, u16, Vec<u8>)| {
    let (size, mtu, mut packet) = input;
    let mut buffer = Vec::new();
    let _ = segment(&packet, size, HEADROOM, &mut buffer, |made| {
        assert!(parse(&made[HEADROOM..], Link::Ip).is_ok(), "a segment that does not parse");
    });
    let _ = fragment(&packet, mtu, 1, HEADROOM, &mut buffer, |made| {
        assert!(made.len() - HEADROOM <= usize::from(mtu).max(packet.len()), "a fragment that does not fit");
    });
    let _ = finish_checksum(&mut packet, usize::from(size), usize::from(mtu));
});
