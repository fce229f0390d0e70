//! Any frame is parsed or refused with a reason, and what was parsed lies within the frame.
#![no_main]

use libfuzzer_sys::fuzz_target;
use phalanx_flow::packet::{Link, parse};

fuzz_target!(|frame: &[u8]| {
    for link in [Link::Ethernet, Link::Ip] {
        if let Ok(packet) = parse(frame, link) {
            let end = usize::from(packet.l3_offset) + usize::from(packet.l3_length);
            assert!(end <= frame.len(), "the packet ends behind its frame");
        }
    }
});
