//! Bytes that say where they belong: a stream's every byte follows from its seed and its position.

/// The stream that the client of connection `id` sends.
pub(super) const fn client_seed(id: u64) -> u64 {
    mix(id ^ 0x636c_6965_6e74_0000)
}

/// The stream that the server sends it.
pub(super) const fn server_seed(id: u64) -> u64 {
    mix(id ^ 0x7365_7276_6572_0000)
}

/// SplitMix64's finalizer: a bijection that spreads every bit.
pub(super) const fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// The bytes at `offset` of the stream `seed`.
pub(super) fn fill(seed: u64, offset: u64, buffer: &mut [u8]) {
    let mut word = offset / 8;
    let mut skip = (offset % 8) as usize;
    let mut rest = buffer;
    while !rest.is_empty() {
        let bytes = mix(seed ^ word).to_le_bytes();
        let part = &bytes[skip..];
        let count = part.len().min(rest.len());
        let (head, tail) = rest.split_at_mut(count);
        head.copy_from_slice(&part[..count]);
        rest = tail;
        word = word.wrapping_add(1);
        skip = 0;
    }
}

/// Where `bytes` first differs from the stream `seed` at `offset`.
pub(super) fn first_difference(seed: u64, offset: u64, bytes: &[u8]) -> Option<u64> {
    let mut expected = [0; 1024];
    for (index, chunk) in bytes.chunks(expected.len()).enumerate() {
        let start = offset.wrapping_add((index * expected.len()) as u64);
        let expected = &mut expected[..chunk.len()];
        fill(seed, start, expected);
        if expected != chunk {
            let place = expected.iter().zip(chunk).position(|(a, b)| a != b).unwrap_or_default();
            return Some(start.wrapping_add(place as u64));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_is_the_same_however_it_is_cut() {
        let mut whole = [0; 5000];
        fill(7, 0, &mut whole);
        for (start, length) in [(0, 1), (1, 7), (3, 13), (8, 8), (1023, 1025), (4999, 1)] {
            let mut part = vec![0; length];
            fill(7, start as u64, &mut part);
            assert_eq!(part, whole[start..start + length]);
        }
    }

    #[test]
    fn one_wrong_byte_is_found_where_it_is() {
        let mut bytes = vec![0; 3000];
        fill(9, 100, &mut bytes);
        assert_eq!(first_difference(9, 100, &bytes), None);
        for place in [0, 1, 1023, 1024, 2999] {
            bytes[place] ^= 1;
            assert_eq!(first_difference(9, 100, &bytes), Some(100 + place as u64));
            bytes[place] ^= 1;
        }
        // Another stream, and the right one at another place, are wrong at once.
        assert!(first_difference(8, 100, &bytes).is_some());
        assert!(first_difference(9, 101, &bytes).is_some());
        assert_ne!(client_seed(1), server_seed(1));
    }
}
