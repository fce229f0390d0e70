//! The document's example of a score: a CRC of degree 8 (Figure 3 \[310\], \[315\], claim 10).
//!
//! The polynomial is x⁸ + x⁴ + x³ + x² + 1 (0x11d), which is primitive; nothing is added before or after, nothing is reflected
//! (catalogued as CRC-8/GSM-A). Eight bits have 256 values; the document's "128 possible values (0-127)" is a slip.
//!
//! With a start value of zero a CRC is linear: `crc(id ‖ tuple) = crc(id ‖ 0¹²) ⊕ crc(tuple)`.
//! So the ranking of the members depends on the tuple only through the 8 bits of `crc(tuple)`, which is the row.

use crate::key::{FlowKey, unmapped};
use crate::member::MemberId;

/// The polynomial without its leading term.
pub const POLYNOMIAL: u8 = 0x1d;

/// What each byte in the register becomes after eight shifts.
const TABLE: [u8; 256] = table();

/// Bytes of a connection's identifier (claim 4, Figure 2 \[200\]).
pub const TUPLE_LEN: usize = 12;

/// The CRC of `bytes`, started from zero.
#[inline(always)]
pub fn crc8<const N: usize>(bytes: [u8; N]) -> u8 {
    let mut crc = 0;
    for byte in bytes {
        crc = step(crc ^ byte);
    }
    crc
}

/// The connection's 12-byte identifier in the order of claim 4: destination port, destination address, source port, source address.
///
/// The document knows IPv4 only. An IPv6 address is folded to four bytes by xoring its four 32-bit words (our choice): the scores
/// stay within 256 rows, and clients that differ in one bit anywhere still differ.
#[inline(always)]
pub const fn tuple(key: &FlowKey) -> [u8; TUPLE_LEN] {
    let (source, destination) = if key.family == 4 {
        (unmapped(key.source), unmapped(key.destination))
    } else {
        (fold(key.source), fold(key.destination))
    };
    let [d0, d1] = key.destination_port;
    let [s0, s1] = key.source_port;
    let [da, db, dc, dd] = destination;
    let [sa, sb, sc, sd] = source;
    [d0, d1, da, db, dc, dd, s0, s1, sa, sb, sc, sd]
}

/// A member's part of its scores: the CRC of its id (most significant byte first) and twelve bytes of zero.
/// Its score for a connection in row `r` is this xor `r`.
pub fn member_part(id: MemberId) -> u8 {
    let mut crc = crc8(id.0.to_be_bytes());
    for _ in 0..TUPLE_LEN {
        crc = step(crc);
    }
    crc
}

/// Four bytes that stand for an IPv6 address.
#[inline(always)]
const fn fold(octets: [u8; 16]) -> [u8; 4] {
    let words = u128::from_be_bytes(octets);
    let halves = (words as u64) ^ ((words >> 64) as u64);
    ((halves as u32) ^ ((halves >> 32) as u32)).to_be_bytes()
}

/// Eight shifts of the register.
#[inline(always)]
fn step(register: u8) -> u8 {
    // A byte is always within the table; the compiler sees that too.
    match TABLE.get(register as usize) {
        Some(crc) => *crc,
        None => 0,
    }
}

#[expect(clippy::indexing_slicing, reason = "evaluated by the compiler, which refuses a wrong index")]
const fn table() -> [u8; 256] {
    let mut table = [0; 256];
    let mut index = 0_u8;
    loop {
        let mut register = index;
        let mut shifts = 0_u8;
        while shifts < 8 {
            let carry = register & 0x80 != 0;
            register <<= 1;
            if carry {
                register ^= POLYNOMIAL;
            }
            shifts = shifts.wrapping_add(1);
        }
        table[index as usize] = register;
        index = index.wrapping_add(1);
        if index == 0 {
            return table;
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::vec::Vec;

    use proptest::prelude::*;

    use super::*;

    /// The straightforward CRC: the message as a polynomial, eight zeros appended, divided bit by bit.
    pub(crate) fn bitwise(message: &[u8]) -> u8 {
        let mut remainder = 0_u16;
        for byte in message.iter().chain(&[0]) {
            for bit in (0..8).rev() {
                remainder = remainder << 1 | u16::from(byte >> bit & 1);
                if remainder & 0x100 != 0 {
                    remainder ^= 0x11d;
                }
            }
        }
        remainder as u8
    }

    /// The score as the document computes it, for each connection and member (claim 10).
    pub(crate) fn straightforward(id: MemberId, tuple: [u8; TUPLE_LEN]) -> u8 {
        let message: Vec<u8> = id.0.to_be_bytes().into_iter().chain(tuple).collect();
        bitwise(&message)
    }

    #[test]
    fn the_catalogued_check_value() {
        assert_eq!(crc8(*b"123456789"), 0x37);
        assert_eq!(bitwise(b"123456789"), 0x37);
    }

    #[test]
    fn the_polynomial_is_primitive() {
        // x generates all 255 non-zero remainders, none of them twice.
        let mut register = 1_u8;
        let mut order = 0;
        loop {
            let carry = register & 0x80 != 0;
            register <<= 1;
            if carry {
                register ^= POLYNOMIAL;
            }
            order += 1;
            if register == 1 {
                break;
            }
        }
        assert_eq!(order, 255);
    }

    #[test]
    fn the_tuple_is_in_the_order_of_claim_4() {
        let key =
            FlowKey::new(6, ("10.1.2.3".parse().unwrap(), 0x0405), ("192.0.2.9".parse().unwrap(), 0x0607))
                .unwrap();
        assert_eq!(tuple(&key), [6, 7, 192, 0, 2, 9, 4, 5, 10, 1, 2, 3]);
    }

    #[test]
    fn an_ipv6_address_is_folded_by_xor_of_its_words() {
        let key = FlowKey::new(
            6,
            ("2001:db8:0:1::f".parse().unwrap(), 0x0405),
            ("::1:2:3:4".parse().unwrap(), 0x0607),
        )
        .unwrap();
        assert_eq!(tuple(&key), [6, 7, 0, 2, 0, 6, 4, 5, 0x20, 0x01, 0x0d, 0xb6]);
    }

    proptest! {
        #[test]
        fn the_row_and_the_members_part_give_the_straightforward_crc(id: u32, tuple: [u8; TUPLE_LEN]) {
            let id = MemberId(id);
            prop_assert_eq!(member_part(id) ^ crc8(tuple), straightforward(id, tuple));
        }
    }
}
