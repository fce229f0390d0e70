//! What clients and servers of the lab say to each other.
//!
//! ```text
//!   client: hello    "PHXC", largest request, connection
//!   server: banner   "PHXB", backend
//!   client: request  length, length of the reply, pause, check; then so many bytes of the client's stream
//!   server: reply    check; then so many bytes of the server's stream, with a pause after every few where one is asked for
//!   ... and when the client ends its side, the server ends its own.
//! ```
//! Checks depend on connection and number, so that a reply to anything else is wrong.
//! Whoever says "GET " in place of a hello is a health check, and is answered in HTTP.

use super::pattern::mix;

/// Bytes of a banner.
pub(super) const BANNER_BYTES: usize = 8;
/// Bytes of a hello.
pub(super) const HELLO_BYTES: usize = 16;
/// Bytes of a request's header.
pub(super) const HEADER_BYTES: usize = 20;
/// Bytes of a reply's header.
pub(super) const REPLY_BYTES: usize = 8;
/// Bytes of a reply between two pauses.
pub(super) const TRICKLE_BYTES: u32 = 256;
/// How a health check begins.
pub(super) const HEALTH_CHECK: &[u8] = b"GET ";
/// Longest request or reply.
pub(super) const MAX_LENGTH: u32 = 1 << 20;

const BANNER_MAGIC: [u8; 4] = *b"PHXB";
const HELLO_MAGIC: [u8; 4] = *b"PHXC";

/// Says which backend serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Banner {
    pub(super) backend: u32,
}

impl Banner {
    pub(super) fn to_bytes(self) -> [u8; BANNER_BYTES] {
        let mut bytes = [0; BANNER_BYTES];
        bytes[..4].copy_from_slice(&BANNER_MAGIC);
        bytes[4..].copy_from_slice(&self.backend.to_be_bytes());
        bytes
    }

    pub(super) fn from_bytes(bytes: &[u8; BANNER_BYTES]) -> Option<Self> {
        let [a, b, c, d, w, x, y, z] = *bytes;
        ([a, b, c, d] == BANNER_MAGIC).then(|| Self { backend: u32::from_be_bytes([w, x, y, z]) })
    }
}

/// Names the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Hello {
    pub(super) largest: u32,
    pub(super) id: u64,
}

impl Hello {
    pub(super) fn to_bytes(self) -> [u8; HELLO_BYTES] {
        let mut bytes = [0; HELLO_BYTES];
        bytes[..4].copy_from_slice(&HELLO_MAGIC);
        bytes[4..8].copy_from_slice(&self.largest.to_be_bytes());
        bytes[8..].copy_from_slice(&self.id.to_be_bytes());
        bytes
    }

    pub(super) fn from_bytes(bytes: &[u8; HELLO_BYTES]) -> Option<Self> {
        let (magic, rest) = bytes.split_first_chunk::<4>()?;
        let (largest, rest) = rest.split_first_chunk::<4>()?;
        let id = rest.first_chunk::<8>()?;
        let largest = u32::from_be_bytes(*largest);
        (*magic == HELLO_MAGIC && largest <= MAX_LENGTH)
            .then(|| Self { largest, id: u64::from_be_bytes(*id) })
    }
}

/// Heads a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) length: u32,
    pub(super) reply: u32,
    /// Milliseconds to wait after every [`TRICKLE_BYTES`] of the reply; 0: the reply comes at once.
    pub(super) pause_ms: u32,
}

impl Request {
    pub(super) fn to_bytes(self, id: u64, number: u64) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..4].copy_from_slice(&self.length.to_be_bytes());
        bytes[4..8].copy_from_slice(&self.reply.to_be_bytes());
        bytes[8..12].copy_from_slice(&self.pause_ms.to_be_bytes());
        bytes[12..].copy_from_slice(&self.check(id, number).to_be_bytes());
        bytes
    }

    pub(super) fn from_bytes(id: u64, number: u64, bytes: &[u8; HEADER_BYTES]) -> Option<Self> {
        let (length, rest) = bytes.split_first_chunk::<4>()?;
        let (reply, rest) = rest.split_first_chunk::<4>()?;
        let (pause_ms, rest) = rest.split_first_chunk::<4>()?;
        let check = rest.first_chunk::<8>()?;
        let request = Self {
            length: u32::from_be_bytes(*length),
            reply: u32::from_be_bytes(*reply),
            pause_ms: u32::from_be_bytes(*pause_ms),
        };
        let right = u64::from_be_bytes(*check) == request.check(id, number)
            && request.length <= MAX_LENGTH
            && request.reply <= MAX_LENGTH;
        right.then_some(request)
    }

    const fn check(self, id: u64, number: u64) -> u64 {
        mix(mix(mix(id) ^ number ^ (self.length as u64) << 32 ^ (self.reply as u64)) ^ self.pause_ms as u64)
    }
}

/// Heads the reply to request `number`.
pub(super) const fn reply(id: u64, number: u64) -> [u8; REPLY_BYTES] {
    mix(mix(!id) ^ number).to_be_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_survive_the_wire_and_damaged_ones_do_not() {
        let banner = Banner { backend: 3 };
        assert_eq!(Banner::from_bytes(&banner.to_bytes()), Some(banner));
        assert_eq!(Banner::from_bytes(&[0; BANNER_BYTES]), None);
        let hello = Hello { largest: 512, id: 42 };
        assert_eq!(Hello::from_bytes(&hello.to_bytes()), Some(hello));
        assert_eq!(Hello::from_bytes(&[0; HELLO_BYTES]), None);
        let request = Request { length: 100, reply: 900, pause_ms: 5 };
        let bytes = request.to_bytes(42, 7);
        assert_eq!(Request::from_bytes(42, 7, &bytes), Some(request));
        assert_eq!(Request::from_bytes(42, 8, &bytes), None, "another number");
        assert_eq!(Request::from_bytes(43, 7, &bytes), None, "another connection");
        for place in 0..HEADER_BYTES {
            let mut damaged = bytes;
            damaged[place] ^= 0x40;
            assert_eq!(Request::from_bytes(42, 7, &damaged), None, "byte {place}");
        }
        let huge = Request { length: MAX_LENGTH + 1, reply: 0, pause_ms: 0 };
        assert_eq!(Request::from_bytes(1, 1, &huge.to_bytes(1, 1)), None);
    }
}
