//! No datagram on the gossip port and no push-pull message makes a member panic.
//!
//! Datagrams without the key end at the seal; push-pull messages reach the decoder and foca.
#![no_main]

use std::time::Instant;

use libfuzzer_sys::fuzz_target;
use phalanx_membership::{
    Membership, Timing,
    harness::{address, config},
};

fuzz_target!(|bytes: &[u8]| {
    let now = Instant::now();
    let Ok(mut membership) = Membership::new(config(1, &Timing::lan()), 1, now) else {
        panic!("a good configuration is refused");
    };
    membership.handle_datagram(now, address(2), bytes);
    assert_eq!(membership.view().members.len(), 1, "a datagram without the key changed the view");
    let _ = membership.handle_push_pull(now, bytes);
    let _ = membership.handle_push_pull_reply(now, bytes);
});
