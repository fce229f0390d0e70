//! Sealed datagrams: AES-256-GCM under the cluster key, with a replay window per sender and session.
//!
//! ```text
//!  0      2      3       4         8          12          20       28          36
//!  | "PX" | ver. |   0   | key id  | sender   | session   | salt   | counter   | ciphertext … tag(16) |
//!  '---------------------------- authenticated, not encrypted -----------------'
//! ```
//!
//! Every process seals under a key of its own, derived (HKDF-SHA-256, RFC 5869) from the cluster key, the cluster's name, the
//! sender, its session and a random salt; so the counter alone is a nonce that never repeats (RFC 5116 §3.1), whatever the clock does.

use std::collections::{BTreeMap, btree_map::Entry};

use aws_lc_rs::{
    aead::{AES_256_GCM, Aad, LessSafeKey, MAX_TAG_LEN, NONCE_LEN, Nonce, UnboundKey},
    digest::{SHA256, digest},
    hkdf::{HKDF_SHA256, Salt},
};
use phalanx_flow::MemberId;

/// Bytes before the ciphertext.
const HEADER: usize = 36;

/// Bytes that sealing adds.
pub const SEAL_OVERHEAD: usize = HEADER + MAX_TAG_LEN;

/// Counters this far behind the newest are too old to be told from a replay.
/// A large cluster's member sends some 100 datagrams a second to all others together: ten seconds' worth.
const WINDOW: u64 = 1024;

/// Most senders whose windows are kept; only holders of the key can add one.
const MAX_SENDERS: usize = 8192;

/// Most keys in a ring: rotating needs two.
pub const MAX_KEYS: usize = 8;

const MAGIC: [u8; 4] = *b"PX\x02\x00";

/// The cluster keys. The first one seals, all of them open, so that keys rotate without downtime: append the new key everywhere,
/// then move it to the front everywhere, then remove the old one everywhere.
#[derive(Clone, PartialEq, Eq)]
pub struct KeyRing {
    keys: Vec<[u8; 32]>,
}

impl std::fmt::Debug for KeyRing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Never the keys themselves.
        write!(f, "KeyRing({} keys)", self.keys.len())
    }
}

/// A key file that cannot be used. Nothing changed; the operator corrects the line named.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// No line holds a key.
    #[error(
        "the key file holds no key: write 64 hexadecimal digits on a line, e.g. from `openssl rand -hex 32`"
    )]
    Empty,
    /// A line is not 64 hexadecimal digits.
    #[error(
        "line {line} of the key file is not a key: a key is 64 hexadecimal digits, e.g. from `openssl rand -hex 32`"
    )]
    Malformed {
        /// Counted from 1.
        line: usize,
    },
    /// More than [`MAX_KEYS`].
    #[error("the key file holds {0} keys: keep the one in use and the next, at most {MAX_KEYS}")]
    TooMany(usize),
}

impl KeyRing {
    /// A ring of `keys`, the first of which seals.
    pub fn new(keys: Vec<[u8; 32]>) -> Result<Self, KeyError> {
        match keys.len() {
            0 => Err(KeyError::Empty),
            count if count > MAX_KEYS => Err(KeyError::TooMany(count)),
            _ => Ok(Self { keys }),
        }
    }

    /// Reads a key file: a key of 64 hexadecimal digits a line; blank lines and lines that start with `#` are skipped.
    pub fn parse(text: &str) -> Result<Self, KeyError> {
        let mut keys = Vec::new();
        for (index, line) in text.lines().enumerate() {
            let line = line.trim();
            if !line.is_empty() && !line.starts_with('#') {
                keys.push(parse_key(line).ok_or(KeyError::Malformed { line: index + 1 })?);
            }
        }
        Self::new(keys)
    }

    /// The cookies of hand-off datagrams under each key, the first to send, all to accept (design §4).
    pub fn cookies(&self) -> impl Iterator<Item = u64> + '_ {
        self.keys.iter().map(|key| {
            let hash = tagged_hash(b"phalanx hand-off cookie", key);
            hash.iter().take(8).fold(0, |sum, byte| sum << 8 | u64::from(*byte))
        })
    }
}

fn parse_key(line: &str) -> Option<[u8; 32]> {
    let digits = line.as_bytes();
    if digits.len() != 64 {
        return None;
    }
    let mut key = [0; 32];
    for (byte, pair) in key.iter_mut().zip(digits.chunks_exact(2)) {
        let value = pair
            .iter()
            .try_fold(0, |sum, digit| (*digit as char).to_digit(16).map(|value| sum << 4 | value))?;
        // Two hexadecimal digits are at most 255.
        *byte = value as u8;
    }
    Some(key)
}

fn tagged_hash(tag: &[u8], key: &[u8; 32]) -> [u8; 32] {
    let mut bytes = tag.to_vec();
    bytes.extend_from_slice(key);
    let mut hash = [0; 32];
    hash.copy_from_slice(digest(&SHA256, &bytes).as_ref());
    hash
}

type KeyId = [u8; 4];

/// A ring as the sealer and the opener use it.
#[derive(Debug)]
struct Ring {
    keys: Vec<(KeyId, [u8; 32])>,
    cluster: Vec<u8>,
}

impl Ring {
    fn new(ring: &KeyRing, cluster: &str) -> Self {
        let keys = ring
            .keys
            .iter()
            .map(|key| {
                let [a, b, c, d, ..] = tagged_hash(b"phalanx key id", key);
                ([a, b, c, d], *key)
            })
            .collect();
        Self { keys, cluster: cluster.as_bytes().to_vec() }
    }

    fn get(&self, id: KeyId) -> Option<&[u8; 32]> {
        self.keys.iter().find(|(known, _)| *known == id).map(|(_, key)| key)
    }

    /// The key of one process; `None` only if the library refuses, which it has no reason to.
    fn derive(&self, key: &[u8; 32], life: Life) -> Option<LessSafeKey> {
        let (sender, session, salt) =
            (life.sender.0.to_be_bytes(), life.session.to_be_bytes(), life.salt.to_be_bytes());
        let info = [b"phalanx gossip".as_slice(), &self.cluster, &sender, &session, &salt];
        let pseudorandom = Salt::new(HKDF_SHA256, b"phalanx").extract(key);
        let okm = pseudorandom.expand(&info, &AES_256_GCM).ok()?;
        Some(LessSafeKey::new(UnboundKey::from(okm)))
    }
}

/// One process of one member.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Life {
    pub(crate) sender: MemberId,
    pub(crate) session: u64,
    pub(crate) salt: u64,
}

fn nonce(counter: u64) -> Nonce {
    let mut bytes = [0; NONCE_LEN];
    bytes[NONCE_LEN - 8..].copy_from_slice(&counter.to_be_bytes());
    Nonce::assume_unique_for_key(bytes)
}

/// Seals what this process sends.
#[derive(Debug)]
pub(crate) struct Sealer {
    life: Life,
    key_id: KeyId,
    key: LessSafeKey,
    counter: u64,
}

impl Sealer {
    fn new(ring: &Ring, life: Life, counter: u64) -> Option<Self> {
        let (key_id, key) = ring.keys.first()?;
        Some(Self { life, key_id: *key_id, key: ring.derive(key, life)?, counter })
    }

    pub(crate) fn life(&self) -> Life {
        self.life
    }

    /// Seals `parts`, one after the other; `None` once 2^64 datagrams were sent, which takes longer than anything runs.
    pub(crate) fn seal(&mut self, parts: &[&[u8]]) -> Option<Vec<u8>> {
        self.counter = self.counter.checked_add(1)?;
        let length = parts.iter().map(|part| part.len()).sum::<usize>();
        let mut out = Vec::with_capacity(SEAL_OVERHEAD + length);
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&self.key_id);
        out.extend_from_slice(&self.life.sender.0.to_be_bytes());
        out.extend_from_slice(&self.life.session.to_be_bytes());
        out.extend_from_slice(&self.life.salt.to_be_bytes());
        out.extend_from_slice(&self.counter.to_be_bytes());
        for part in parts {
            out.extend_from_slice(part);
        }
        let (header, body) = out.split_at_mut(HEADER);
        let tag = self.key.seal_in_place_separate_tag(nonce(self.counter), Aad::from(&*header), body).ok()?;
        out.extend_from_slice(tag.as_ref());
        Some(out)
    }
}

/// Why a datagram was not opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unopened {
    /// Not ours, or under a key we do not have.
    Foreign,
    /// It does not authenticate.
    Damaged,
    /// Seen before, or too old to tell.
    Replayed,
    /// Authentic, but of an earlier process of its sender; `newest` is the session of the later one.
    Stale { sender: MemberId, newest: u64 },
}

/// An authentic datagram that is not a replay.
#[derive(Debug)]
pub(crate) struct Opened {
    pub(crate) life: Life,
    /// Nothing of this process was accepted before.
    pub(crate) is_new_life: bool,
    pub(crate) plain: Vec<u8>,
    counter: u64,
    key_id: KeyId,
    /// Derived for this datagram; kept when it is accepted.
    derived: Option<LessSafeKey>,
}

#[derive(Debug)]
struct Sender {
    life: Life,
    keys: Vec<(KeyId, LessSafeKey)>,
    window: Window,
}

/// Seals what this process sends and opens what others sent.
#[derive(Debug)]
pub(crate) struct Seal {
    ring: Ring,
    pub(crate) sealer: Sealer,
    senders: BTreeMap<MemberId, Sender>,
}

impl Seal {
    /// `None` only if the library refuses to derive a key.
    pub(crate) fn new(ring: &KeyRing, cluster: &str, life: Life) -> Option<Self> {
        let ring = Ring::new(ring, cluster);
        let sealer = Sealer::new(&ring, life, 0)?;
        Some(Self { ring, sealer, senders: BTreeMap::new() })
    }

    /// Replaces the keys; windows stay, so that what was seen stays seen.
    pub(crate) fn set_keys(&mut self, ring: &KeyRing) {
        let cluster = std::mem::take(&mut self.ring.cluster);
        self.ring = Ring { cluster, ..Ring::new(ring, "") };
        // The counter goes on: the same life may come back to a key it used before.
        if let Some(sealer) = Sealer::new(&self.ring, self.sealer.life, self.sealer.counter) {
            self.sealer = sealer;
        }
        for sender in self.senders.values_mut() {
            sender.keys.retain(|(id, _)| self.ring.get(*id).is_some());
        }
    }

    /// Continues under a later session: somebody has seen a later one of ours than this.
    pub(crate) fn set_session(&mut self, session: u64) {
        let life = Life { session, ..self.sealer.life };
        if let Some(sealer) = Sealer::new(&self.ring, life, self.sealer.counter) {
            self.sealer = sealer;
        }
    }

    /// Opens a datagram without marking it as seen: [`Self::accept`] does, once its sender turned out to be who it says.
    pub(crate) fn open(&self, datagram: &[u8]) -> Result<Opened, Unopened> {
        let header = datagram.first_chunk::<HEADER>().ok_or(Unopened::Foreign)?;
        let (magic, rest) = header.split_first_chunk::<4>().ok_or(Unopened::Foreign)?;
        if *magic != MAGIC {
            return Err(Unopened::Foreign);
        }
        let (key_id, rest) = rest.split_first_chunk::<4>().ok_or(Unopened::Foreign)?;
        let (sender, rest) = rest.split_first_chunk::<4>().ok_or(Unopened::Foreign)?;
        let (session, rest) = rest.split_first_chunk::<8>().ok_or(Unopened::Foreign)?;
        let (salt, rest) = rest.split_first_chunk::<8>().ok_or(Unopened::Foreign)?;
        let counter =
            rest.first_chunk::<8>().map(|bytes| u64::from_be_bytes(*bytes)).ok_or(Unopened::Foreign)?;
        let key = self.ring.get(*key_id).ok_or(Unopened::Foreign)?;
        let life = Life {
            sender: MemberId(u32::from_be_bytes(*sender)),
            session: u64::from_be_bytes(*session),
            salt: u64::from_be_bytes(*salt),
        };

        let known = self.senders.get(&life.sender);
        let same = known.filter(|known| known.life == life);
        if same.is_some_and(|known| !known.window.is_fresh(counter)) {
            return Err(Unopened::Replayed);
        }
        let kept = same.and_then(|known| known.keys.iter().find(|(id, _)| id == key_id));
        let derived = match kept {
            Some(_) => None,
            None => Some(self.ring.derive(key, life).ok_or(Unopened::Damaged)?),
        };
        let key = match (&derived, kept) {
            (Some(key), _) | (None, Some((_, key))) => key,
            (None, None) => return Err(Unopened::Damaged),
        };
        let mut plain = datagram.get(HEADER..).ok_or(Unopened::Damaged)?.to_vec();
        let length = key
            .open_in_place(nonce(counter), Aad::from(header), &mut plain)
            .map_err(|_| Unopened::Damaged)?
            .len();
        plain.truncate(length);
        if let Some(known) = known.filter(|known| known.life > life) {
            return Err(Unopened::Stale { sender: life.sender, newest: known.life.session });
        }
        Ok(Opened { life, is_new_life: same.is_none(), plain, counter, key_id: *key_id, derived })
    }

    /// Marks a datagram as seen, and its sender's earlier processes as over.
    pub(crate) fn accept(&mut self, opened: &mut Opened) {
        if self.senders.len() >= MAX_SENDERS && !self.senders.contains_key(&opened.life.sender) {
            return;
        }
        let sender = match self.senders.entry(opened.life.sender) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => {
                entry.insert(Sender { life: opened.life, keys: Vec::new(), window: Window::default() })
            }
        };
        if sender.life != opened.life {
            *sender = Sender { life: opened.life, keys: Vec::new(), window: Window::default() };
        }
        sender.window.mark(opened.counter);
        if let Some(key) = opened.derived.take() {
            sender.keys.push((opened.key_id, key));
        }
    }
}

/// Which of the last [`WINDOW`] counters were seen.
#[derive(Debug, Default)]
struct Window {
    newest: u64,
    seen: [u64; (WINDOW / 64) as usize],
}

impl Window {
    fn is_fresh(&self, counter: u64) -> bool {
        if counter > self.newest {
            return true;
        }
        self.newest - counter < WINDOW && !self.bit(counter)
    }

    fn bit(&self, counter: u64) -> bool {
        let at = counter % WINDOW;
        self.seen.get((at / 64) as usize).is_some_and(|word| word >> (at % 64) & 1 == 1)
    }

    fn mark(&mut self, counter: u64) {
        if counter > self.newest {
            if counter - self.newest >= WINDOW {
                self.seen = Default::default();
            } else {
                for skipped in self.newest + 1..counter {
                    self.set(skipped, false);
                }
            }
            self.newest = counter;
        }
        self.set(counter, true);
    }

    fn set(&mut self, counter: u64, seen: bool) {
        let at = counter % WINDOW;
        if let Some(word) = self.seen.get_mut((at / 64) as usize) {
            let bit = 1 << (at % 64);
            if seen { *word |= bit } else { *word &= !bit }
        }
    }
}

#[cfg(test)]
mod tests;
