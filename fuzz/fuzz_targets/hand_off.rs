//! Any datagram on the hand-off port is a hand-off with its packet inside the frame, or is refused with a reason.
#![no_main]

use libfuzzer_sys::fuzz_target;
use phalanx_flow::encap::{hand_off_bytes, parse_hand_off};

/// The fuzzer cannot guess a cookie, so it is given one of eight equal bytes.
const COOKIE: u64 = 0x4141_4141_4141_4141;

fuzz_target!(|datagram: &[u8]| {
    if let Ok((header, inner)) = parse_hand_off(datagram, 0, [COOKIE, COOKIE]) {
        assert!(inner <= datagram.len() && header.hops > 0);
        // What was read is what would be written.
        let written = hand_off_bytes(&header, if header.flags.is_echo() { 0 } else { 4 });
        let read = parse_hand_off(written.as_slice(), 0, [COOKIE, COOKIE]);
        assert_eq!(read.map(|(header, _)| header), Ok(header));
    }
});
