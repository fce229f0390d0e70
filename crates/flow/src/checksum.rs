//! The Internet checksum (RFC 1071): whole, incremental (RFC 1624), and over parts of a frame.
//!
//! Sums are kept unfolded in 64 bits: 65,535 bytes of 32-bit words need no more than 46, so that nothing overflows before [`fold`].

use crate::packet::Reader;

/// Bytes that [`of_frame`] adds at a time.
const CHUNK: usize = 32;
/// Enough chunks for the longest IP packet: it bounds the verifier's work.
const MAX_CHUNKS: usize = 2048;

const _: () = assert!(CHUNK * MAX_CHUNKS > u16::MAX as usize);

/// The ones' complement sum of `sum` in 16 bits.
#[inline(always)]
pub const fn fold(sum: u64) -> u16 {
    let sum = (sum & 0xffff_ffff).wrapping_add(sum >> 32);
    let sum = (sum & 0xffff).wrapping_add(sum >> 16 & 0xffff).wrapping_add(sum >> 32);
    let sum = (sum & 0xffff).wrapping_add(sum >> 16);
    (sum & 0xffff).wrapping_add(sum >> 16) as u16
}

/// The checksum that makes data with this `sum` (its own field counted as zero) right.
#[inline(always)]
pub const fn finish(sum: u64) -> u16 {
    !fold(sum)
}

/// A UDP checksum: 0 says that there is none, and 0xffff is the same number (RFC 768).
#[inline(always)]
pub const fn finish_udp(sum: u64) -> u16 {
    match finish(sum) {
        0 => 0xffff,
        checksum => checksum,
    }
}

/// The sum of `N` bytes, `N` even.
#[inline(always)]
pub const fn of<const N: usize>(bytes: &[u8; N]) -> u64 {
    const { assert!(N.is_multiple_of(2), "an odd byte belongs to the end of the data") };
    let mut sum = 0u64;
    let mut i = 0usize;
    while i < N / 2 {
        let at = i.wrapping_mul(2);
        sum = sum.wrapping_add(u16::from_be_bytes([get(bytes, at), get(bytes, at.wrapping_add(1))]) as u64);
        i = i.wrapping_add(1);
    }
    sum
}

/// A byte at a place that the caller keeps below `N`.
#[inline(always)]
const fn get<const N: usize>(bytes: &[u8; N], at: usize) -> u8 {
    // `as_slice` first: the bound is a constant here, and the lint would have it so for slices only.
    match bytes.as_slice().split_at_checked(at) {
        Some((_, [first, ..])) => *first,
        _ => 0,
    }
}

/// The sum of `length` bytes of `frame` from `offset` on; `None` if it ends before, or for more than 65,535.
#[inline(always)]
pub fn of_frame<R: Reader + ?Sized>(frame: &R, offset: usize, length: usize) -> Option<u64> {
    if length > usize::from(u16::MAX) {
        return None;
    }
    let mut sum = 0u64;
    let mut at = offset;
    let mut left = length;
    for _ in 0..MAX_CHUNKS {
        if left < CHUNK {
            break;
        }
        sum = sum.wrapping_add(of(&frame.read::<CHUNK>(at)?));
        at = at.wrapping_add(CHUNK);
        left = left.wrapping_sub(CHUNK);
    }
    for _ in 0..CHUNK / 2 {
        if left < 2 {
            break;
        }
        sum = sum.wrapping_add(of(&frame.read::<2>(at)?));
        at = at.wrapping_add(2);
        left = left.wrapping_sub(2);
    }
    if left == 1 {
        let [last] = frame.read::<1>(at)?;
        sum = sum.wrapping_add(u64::from(last) << 8);
    }
    Some(sum)
}

/// The sum of `bytes`, on the host.
pub fn of_slice(bytes: &[u8]) -> u64 {
    // Words in the host's order are added whole, each carry put back in, and swapped once at the end (RFC 1071 §2).
    // Four chains, because each waits for its carries.
    let (blocks, rest) = bytes.as_chunks::<32>();
    let mut lanes = [0u64; 4];
    for block in blocks {
        let (words, _) = block.as_chunks::<8>();
        for (lane, word) in lanes.iter_mut().zip(words) {
            *lane = add(*lane, u64::from_ne_bytes(*word));
        }
    }
    let mut sum = 0u64;
    for lane in lanes {
        sum = add(sum, lane);
    }
    for part in rest.chunks(8) {
        let mut word = [0u8; 8];
        for (to, from) in word.iter_mut().zip(part) {
            *to = *from;
        }
        sum = add(sum, u64::from_ne_bytes(word));
    }
    u64::from(u16::from_be_bytes(fold(sum).to_ne_bytes()))
}

/// The ones' complement sum of two 64-bit words.
#[inline(always)]
const fn add(a: u64, b: u64) -> u64 {
    let (sum, carry) = a.overflowing_add(b);
    sum.wrapping_add(carry as u64)
}

/// The checksum of an IPv4 header without options, as its bytes are to stand there; of the header's words in the machine's order, its own
/// field zero.
#[inline(always)]
pub const fn ipv4_header(words: [u32; 5]) -> [u8; 2] {
    // The sum does not care for the order, nor for words that are larger (RFC 1071 §2).
    let [a, b, c, d, e] = words;
    let sum = (a as u64)
        .wrapping_add(b as u64)
        .wrapping_add(c as u64)
        .wrapping_add(d as u64)
        .wrapping_add(e as u64);
    // [`fold`] of so few words: at most 4 is carried over 32 bits, and then no carry can make another.
    let sum = (sum & 0xffff_ffff).wrapping_add(sum >> 32);
    let sum = (sum & 0xffff).wrapping_add(sum >> 16);
    let sum = (sum & 0xffff).wrapping_add(sum >> 16);
    (!(sum as u16)).to_ne_bytes()
}

/// `checksum` after a 16-bit word it covers changed from `old` to `new` (RFC 1624 §3, equation 3).
#[inline(always)]
pub const fn update(checksum: u16, old: u16, new: u16) -> u16 {
    let sum = (!checksum as u32).wrapping_add(!old as u32).wrapping_add(new as u32);
    // Three words of 16 bits: twice is enough.
    let sum = (sum & 0xffff).wrapping_add(sum >> 16);
    let sum = (sum & 0xffff).wrapping_add(sum >> 16);
    !(sum as u16)
}

/// The checksum of an IPv4 header, as its two bytes stand there, after one was taken from its time to live: [`update`] with both words
/// known but for their difference, in whatever order the machine has.
#[inline(always)]
pub const fn with_lower_ttl(checksum: [u8; 2]) -> [u8; 2] {
    // !old + new, whatever the protocol in the same word is.
    const LESS: u16 = 0xfeff_u16.to_be();
    let sum = (!u16::from_ne_bytes(checksum) as u32).wrapping_add(LESS as u32);
    // Two words of 16 bits: once is enough.
    let sum = (sum & 0xffff).wrapping_add(sum >> 16);
    (!(sum as u16)).to_ne_bytes()
}

/// The sum of a pseudo-header (RFC 9293 §3.1, RFC 8200 §8.1); IPv4 addresses are mapped ones.
#[inline(always)]
pub const fn pseudo_header(
    family: u8,
    source: &[u8; 16],
    destination: &[u8; 16],
    protocol: u8,
    length: u32,
) -> u64 {
    let mut sum = of(source).wrapping_add(of(destination));
    if family == 4 {
        // The mapped form has ::ffff in front of each.
        sum = sum.wrapping_sub(2 * 0xffff);
    }
    sum.wrapping_add(protocol as u64)
        .wrapping_add((length >> 16) as u64)
        .wrapping_add((length & 0xffff) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_of_an_ipv4_header_is_that_of_its_bytes_whatever_carries_there_are() {
        // Words that carry most and least, and those around each carry.
        let words = [0, 1, 0xffff, 0x1_0000, 0x7fff_ffff, 0xfffe_ffff, 0xffff_0000, 0xffff_fffe, u32::MAX];
        for a in words {
            for b in words {
                for c in words {
                    for d in words {
                        let header = [a, b, c, d, u32::MAX ^ c];
                        let bytes = header.map(u32::to_ne_bytes).concat();
                        let expected = finish(of_slice(&bytes)).to_be_bytes();
                        assert_eq!(ipv4_header(header), expected, "{header:x?}");
                    }
                }
            }
        }
    }
}
