//! How a packet leaves: to a backend, to another member, or back to the client.

mod hand_off;

pub use hand_off::{
    GENEVE_LENGTH, GENEVE_PORT, HandOffError, HandOffFlags, HandOffHeader, hand_off_bytes, parse_hand_off,
};
