//! Any stream of bytes is frames or an error, however it is cut; and a frame that was read is written as it was read.
#![no_main]

use libfuzzer_sys::fuzz_target;
use phalanx_rebalancer::codec::{FrameDecoder, encode};

fn decode(pieces: &[&[u8]]) -> Vec<phalanx_rebalancer::codec::Frame> {
    let mut decoder = FrameDecoder::new();
    let mut frames = Vec::new();
    for piece in pieces {
        decoder.handle_data(piece);
        while let Ok(Some(frame)) = decoder.poll_frame() {
            frames.push(frame);
        }
    }
    frames
}

fuzz_target!(|input: (usize, Vec<u8>)| {
    let (cut, bytes) = input;
    let whole = decode(&[&bytes]);
    let (head, tail) = bytes.split_at(cut % (bytes.len() + 1));
    assert_eq!(decode(&[head, tail]), whole, "the cut matters");
    for frame in whole {
        assert_eq!(decode(&[&encode(&frame)]), [frame]);
    }
});
