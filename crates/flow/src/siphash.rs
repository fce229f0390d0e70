//! SipHash-2-4 (Aumasson and Bernstein, 2012) of the short messages that the scorings hash.

/// SipHash-2-4 of the 8 bytes of `message` in little-endian order.
#[inline(always)]
pub const fn siphash_8(key: [u64; 2], message: u64) -> u64 {
    // The last word holds the length in its highest byte.
    State::new(key).word(message).word(8 << 56).finish()
}

/// SipHash-2-4 of the 12 bytes of `first` and then `last`, each in little-endian order.
#[inline(always)]
pub const fn siphash_12(key: [u64; 2], first: u64, last: u32) -> u64 {
    State::new(key).word(first).word(12 << 56 | last as u64).finish()
}

/// SipHash-2-4 of any bytes: for names that are hashed once, and for checking published vectors.
pub fn siphash(key: [u64; 2], message: &[u8]) -> u64 {
    let mut state = State::new(key);
    let (words, rest) = message.as_chunks::<8>();
    for word in words {
        state = state.word(u64::from_le_bytes(*word));
    }
    let mut last = (message.len() as u64) << 56;
    let mut shift = 0_u32;
    for byte in rest {
        // At most seven bytes are left: the shift stays below 56.
        last |= u64::from(*byte) << (shift & 63);
        shift = shift.wrapping_add(8);
    }
    state.word(last).finish()
}

/// The four words of the hash.
#[derive(Clone, Copy)]
struct State {
    v0: u64,
    v1: u64,
    v2: u64,
    v3: u64,
}

impl State {
    #[inline(always)]
    const fn new(key: [u64; 2]) -> Self {
        let [k0, k1] = key;
        Self {
            v0: k0 ^ 0x736f_6d65_7073_6575,
            v1: k1 ^ 0x646f_7261_6e64_6f6d,
            v2: k0 ^ 0x6c79_6765_6e65_7261,
            v3: k1 ^ 0x7465_6462_7974_6573,
        }
    }

    #[inline(always)]
    const fn round(mut self) -> Self {
        self.v0 = self.v0.wrapping_add(self.v1);
        self.v1 = self.v1.rotate_left(13) ^ self.v0;
        self.v0 = self.v0.rotate_left(32);
        self.v2 = self.v2.wrapping_add(self.v3);
        self.v3 = self.v3.rotate_left(16) ^ self.v2;
        self.v0 = self.v0.wrapping_add(self.v3);
        self.v3 = self.v3.rotate_left(21) ^ self.v0;
        self.v2 = self.v2.wrapping_add(self.v1);
        self.v1 = self.v1.rotate_left(17) ^ self.v2;
        self.v2 = self.v2.rotate_left(32);
        self
    }

    /// One word of the message, two rounds.
    #[inline(always)]
    const fn word(mut self, word: u64) -> Self {
        self.v3 ^= word;
        self = self.round().round();
        self.v0 ^= word;
        self
    }

    /// Four rounds more.
    #[inline(always)]
    const fn finish(mut self) -> u64 {
        self.v2 ^= 0xff;
        let state = self.round().round().round().round();
        state.v0 ^ state.v1 ^ state.v2 ^ state.v3
    }
}

#[cfg(test)]
mod tests {
    use core::hash::Hasher;
    use std::vec::Vec;

    use proptest::prelude::*;
    use siphasher::sip::SipHasher24;

    use super::*;

    /// The key of the reference implementation's vectors: the bytes 0 to 15.
    const REFERENCE_KEY: [u64; 2] = [0x0706_0504_0302_0100, 0x0f0e_0d0c_0b0a_0908];

    fn library(key: [u64; 2], message: &[u8]) -> u64 {
        let mut hasher = SipHasher24::new_with_keys(key[0], key[1]);
        hasher.write(message);
        hasher.finish()
    }

    /// `vectors_sip64` of the reference implementation (`veorq/SipHash`, `vectors.h`): messages 00, 00 01, ...
    #[test]
    fn the_reference_vectors() {
        let message: Vec<u8> = (0..63).collect();
        for (length, bytes) in [
            (0, [0x31, 0x0e, 0x0e, 0xdd, 0x47, 0xdb, 0x6f, 0x72]),
            (1, [0xfd, 0x67, 0xdc, 0x93, 0xc5, 0x39, 0xf8, 0x74]),
            (2, [0x5a, 0x4f, 0xa9, 0xd9, 0x09, 0x80, 0x6c, 0x0d]),
            (3, [0x2d, 0x7e, 0xfb, 0xd7, 0x96, 0x66, 0x67, 0x85]),
            (7, [0x37, 0xd1, 0x01, 0x8b, 0xf5, 0x00, 0x02, 0xab]),
            (8, [0x62, 0x24, 0x93, 0x9a, 0x79, 0xf5, 0xf5, 0x93]),
            (15, [0xe5, 0x45, 0xbe, 0x49, 0x61, 0xca, 0x29, 0xa1]),
        ] {
            assert_eq!(siphash(REFERENCE_KEY, &message[..length]), u64::from_le_bytes(bytes), "{length}");
        }
        assert_eq!(
            siphash_8(REFERENCE_KEY, 0x0706_0504_0302_0100),
            u64::from_le_bytes([0x62, 0x24, 0x93, 0x9a, 0x79, 0xf5, 0xf5, 0x93])
        );
    }

    proptest! {
        #[test]
        fn equal_to_the_library(key: [u64; 2], message in proptest::collection::vec(any::<u8>(), 0..40)) {
            prop_assert_eq!(siphash(key, &message), library(key, &message));
        }

        #[test]
        fn the_fixed_lengths_equal_the_library(key: [u64; 2], first: u64, last: u32) {
            let mut message = first.to_le_bytes().to_vec();
            prop_assert_eq!(siphash_8(key, first), library(key, &message));
            message.extend_from_slice(&last.to_le_bytes());
            prop_assert_eq!(siphash_12(key, first, last), library(key, &message));
        }
    }
}
