//! The wire format between two rebalancers; `docs/protocol.md` draws it.
//!
//! A stream is a sequence of frames, each a 12-byte head and a bounded body.
//! Flows travel as fixed-size items with a dictionary of backends per frame; everything else is a [`Control`] message in bincode.
//! This module is the only one that knows bincode (2.0.1 is its last usable version, and it is unmaintained).
//!
//! Invariant: any bytes decode to a frame or to a [`CodecError`], and nothing is allocated beyond [`MAX_BODY`].

use std::collections::HashMap;

use bincode::config::{Configuration, Fixint, Limit, LittleEndian};
use phalanx_flow::{BackendId, FlowFlags, FlowKey, FlowState, Method, Record};
use serde::{Deserialize, Serialize};

/// The first four bytes of every frame.
pub const MAGIC: [u8; 4] = *b"PHXR";
/// The version of everything in this module. Another version is refused, so a change of format needs a new number.
pub const VERSION: u8 = 2;
/// Bytes of a frame's head.
pub const HEAD: usize = 12;
/// Items in one frame: a transfer table's chunk is at most this many records.
pub const MAX_ITEMS: usize = 4096;
/// Bytes of one item.
pub const ITEM: usize = 64;
/// Bytes of a dictionary entry.
const BACKEND: usize = 20;
/// Bytes in front of dictionary and items.
const BODY_HEAD: usize = 16;
/// The longest body: every item names a backend of its own.
pub const MAX_BODY: usize = BODY_HEAD + MAX_ITEMS * (ITEM + BACKEND);
/// The dictionary index of an item without a backend.
const NO_BACKEND: u16 = u16::MAX;
/// Bytes of the longest control message: an acknowledgement that refuses every item (an index and a reason each), with room to spare.
const MAX_CONTROL: usize = 64 * 1024;

/// Rows in one [`Control::Digests`] or [`Control::Differing`], 16 bytes each at most.
pub const MAX_ROWS: usize = 3072;

const _: () = assert!(MAX_ROWS * 16 + 64 <= MAX_CONTROL);
const _: () = assert!(MAX_ITEMS < NO_BACKEND as usize);
const _: () = assert!(MAX_CONTROL <= MAX_BODY);
const _: () = assert!(MAX_ITEMS * 8 + 64 <= MAX_CONTROL);

/// Why bytes are not a frame. The connection they came by is of no further use: close it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CodecError {
    /// The stream does not begin a frame with [`MAGIC`]: the peer does not speak this protocol, or we lost our place.
    #[error("not a frame of this protocol")]
    Magic,
    /// The peer speaks another version.
    #[error("protocol version {0}, and we speak {VERSION}")]
    Version(u8),
    /// A kind of frame or item, a state, method or family that does not exist, or a reserved byte that is not zero.
    #[error("unknown or damaged {0}")]
    Unknown(&'static str),
    /// The body says it is longer than a frame may be, or not as long as its parts.
    #[error("length out of bounds")]
    Length,
    /// A control message does not decode.
    #[error("damaged control message")]
    Control,
}

/// What an item tells of a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Item {
    /// An association: hold this record, or cache it.
    Associate {
        /// The flow as the sender has it.
        record: Record,
        /// For the receiver's cache instead of its flow table.
        cache: bool,
    },
    /// The flow with this birth (or an older one) has ended.
    End {
        /// The flow.
        key: FlowKey,
        /// Births up to this one have ended.
        birth: u64,
        /// Milliseconds since the sender, or whoever told it, saw a packet: whoever has seen one since knows that the flow lives.
        idle_ms: u32,
        /// The receiver has it in its cache, not in its flow table.
        cache: bool,
    },
    /// The sender has seen a packet of the flow.
    Touch {
        /// The flow.
        key: FlowKey,
        /// Its birth as the sender knows it.
        birth: u64,
        /// Milliseconds since.
        idle_ms: u32,
    },
    /// Nobody knew the flow and the sender, not its acting owner, forwarded it by the consistent table: the receiver may record that.
    Hint {
        /// What the sender did, marked recovered.
        record: Record,
    },
    /// The sender's entry is idle beyond its timeout: what does the receiver know?
    IdleQuery {
        /// The flow.
        key: FlowKey,
        /// Its birth as the sender knows it.
        birth: u64,
    },
    /// The answer to [`Item::IdleQuery`].
    IdleReply {
        /// The flow.
        key: FlowKey,
        /// The birth that was asked for.
        birth: u64,
        /// Milliseconds since the answering member saw a packet; `None`: it has no entry for the flow.
        idle_ms: Option<u32>,
    },
}

impl Item {
    /// The flow.
    pub const fn key(&self) -> &FlowKey {
        match self {
            Self::Associate { record, .. } | Self::Hint { record } => &record.key,
            Self::End { key, .. }
            | Self::Touch { key, .. }
            | Self::IdleQuery { key, .. }
            | Self::IdleReply { key, .. } => key,
        }
    }
}

/// Why an item was not applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Refusal {
    /// The receiver's flow table is full.
    Full,
    /// The receiver cannot reach the backend.
    UnknownBackend,
}

/// Messages that are not about single flows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Control {
    /// The batch with this number has been applied in the receiver's forwarder.
    Ack {
        /// [`Frame::Batch::seq`].
        seq: u64,
        /// Items that were not applied, by their place in the batch.
        refused: Vec<(u16, Refusal)>,
    },
    /// The chunk of a transfer table has been applied in the receiver's forwarder.
    ChunkAck {
        /// [`Frame::Chunk::id`].
        id: u64,
        /// Records that were not applied, by their place in the chunk.
        refused: Vec<(u16, Refusal)>,
    },
    /// What the sender holds of some rows, for the receiver to compare with what it holds itself.
    Digests(Digests),
    /// The answer to [`Control::Digests`].
    Differing {
        /// [`Digests::round`].
        round: u64,
        /// Rows of which the two hold different things. The receiver of this sends what it has of them.
        rows: Vec<u32>,
    },
}

/// What one member holds of some rows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Digests {
    /// Names the question.
    pub round: u64,
    /// The sender has lost the rows, and asks only whether the receiver, who holds them now, lacks anything it has.
    pub former: bool,
    /// The first row that is spoken of.
    pub first: u32,
    /// The last one.
    pub last: u32,
    /// Row, number of flows and sum, for every row of which the sender holds anything; at most [`MAX_ROWS`].
    pub rows: Vec<(u32, u32, u64)>,
}

/// One message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// Replication: associations, ends, touches, questions and answers.
    Batch {
        /// Grows by one with every batch to this peer; acknowledged.
        seq: u64,
        /// At most [`MAX_ITEMS`].
        items: Vec<Item>,
    },
    /// A part of a transfer table; on the wire, items that are all [`Item::Associate`].
    Chunk {
        /// Names the chunk; sent again under the same name after a reconnect.
        id: u64,
        /// At most [`MAX_ITEMS`].
        records: Vec<Record>,
        /// The places of those that are for the receiver's cache instead of its flow table, in order.
        cached: Vec<u16>,
    },
    /// Everything else.
    Control(Control),
}

const KIND_BATCH: u8 = 1;
const KIND_CHUNK: u8 = 2;
const KIND_CONTROL: u8 = 3;

/// The bytes of `frame`.
///
/// # Panics
/// When the frame has more than [`MAX_ITEMS`] items or refusals, which no caller in this crate makes.
pub fn encode(frame: &Frame) -> Vec<u8> {
    match frame {
        Frame::Batch { seq, items } => {
            let mut bytes = begin(KIND_BATCH, body_capacity(items.len()));
            encode_items(&mut bytes, *seq, items.iter().copied());
            finish(bytes)
        }
        Frame::Chunk { id, records, cached } => {
            let items = records.iter().enumerate().map(|(place, &record)| {
                // No more than MAX_ITEMS, or it panics.
                (record, cached.binary_search(&(place as u16)).is_ok())
            });
            encode_chunk(*id, items)
        }
        Frame::Control(control) => {
            let mut bytes = begin(KIND_CONTROL, 64);
            let body = bincode::serde::encode_to_vec(control, control_config())
                .expect("a control message has nothing that cannot be encoded, and a Vec grows");
            bytes.extend_from_slice(&body);
            finish(bytes)
        }
    }
}

/// The bytes of a [`Frame::Chunk`] of these records, each with whether it is for the receiver's cache. It is asked for them twice.
///
/// # Panics
/// As [`encode`].
pub(crate) fn encode_chunk(
    id: u64,
    records: impl ExactSizeIterator<Item = (Record, bool)> + Clone,
) -> Vec<u8> {
    let mut bytes = begin(KIND_CHUNK, body_capacity(records.len()));
    encode_items(&mut bytes, id, records.map(|(record, cache)| Item::Associate { record, cache }));
    finish(bytes)
}

/// Room for so many items and the backends that most services have.
const fn body_capacity(items: usize) -> usize {
    BODY_HEAD + items * ITEM + COMPARED * BACKEND
}

/// A head without a length, and room for a body.
fn begin(kind: u8, capacity: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEAD + capacity);
    bytes.extend_from_slice(&MAGIC);
    bytes.extend_from_slice(&[VERSION, kind, 0, 0, 0, 0, 0, 0]);
    bytes
}

/// Writes the length into the head.
fn finish(mut bytes: Vec<u8>) -> Vec<u8> {
    let length = u32::try_from(bytes.len() - HEAD).expect("callers keep to MAX_ITEMS");
    assert!(length as usize <= MAX_BODY, "callers keep to MAX_ITEMS");
    bytes[8..12].copy_from_slice(&length.to_le_bytes());
    bytes
}

/// Takes a stream apart into frames.
///
/// It keeps at most one unfinished frame, however long the pieces it is given are: call [`FrameDecoder::poll_frame`] until it
/// returns `None` after every [`FrameDecoder::handle_data`].
#[derive(Debug, Default)]
pub struct FrameDecoder {
    buffer: Vec<u8>,
    /// How much of `buffer` has been decoded.
    start: usize,
}

impl FrameDecoder {
    /// A decoder at the beginning of a stream.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds bytes of the stream.
    pub fn handle_data(&mut self, bytes: &[u8]) {
        if self.start > 0 {
            self.buffer.drain(..self.start);
            self.start = 0;
        }
        self.buffer.extend_from_slice(bytes);
    }

    /// The next frame. After an error the stream has no next frame.
    pub fn poll_frame(&mut self) -> Result<Option<Frame>, CodecError> {
        let pending = &self.buffer[self.start..];
        let Some((head, rest)) = pending.split_first_chunk::<HEAD>() else {
            // A stream that starts wrong is refused as soon as it can be seen.
            return if MAGIC.starts_with(&pending[..pending.len().min(4)]) {
                Ok(None)
            } else {
                Err(CodecError::Magic)
            };
        };
        let length = body_length(head)?;
        let Some(body) = rest.get(..length) else { return Ok(None) };
        let frame = decode_body(head[5], body)?;
        self.start += HEAD + length;
        Ok(Some(frame))
    }
}

/// Checks a frame's head and returns the length of its body.
fn body_length(head: &[u8; HEAD]) -> Result<usize, CodecError> {
    let [m0, m1, m2, m3, version, kind, r0, r1, l0, l1, l2, l3] = *head;
    if [m0, m1, m2, m3] != MAGIC {
        return Err(CodecError::Magic);
    }
    if version != VERSION {
        return Err(CodecError::Version(version));
    }
    let limit = match kind {
        KIND_BATCH | KIND_CHUNK => MAX_BODY,
        KIND_CONTROL => MAX_CONTROL,
        _ => return Err(CodecError::Unknown("frame")),
    };
    if [r0, r1] != [0, 0] {
        return Err(CodecError::Unknown("frame head"));
    }
    let length = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
    if length > limit { Err(CodecError::Length) } else { Ok(length) }
}

fn decode_body(kind: u8, body: &[u8]) -> Result<Frame, CodecError> {
    match kind {
        KIND_BATCH => decode_items(body, decode_item).map(|(seq, items)| Frame::Batch { seq, items }),
        KIND_CHUNK => {
            let mut cached = Vec::new();
            let mut place = 0_u16;
            let (id, records) = decode_items(body, |bytes, dictionary| {
                let fields = Fields::decode(bytes)?;
                if fields.kind != ASSOCIATE {
                    return Err(CodecError::Unknown("item in a transfer table"));
                }
                if fields.bits & BIT_CACHE != 0 {
                    cached.push(place);
                }
                place += 1;
                fields.record(key_of(bytes)?, dictionary)
            })?;
            Ok(Frame::Chunk { id, records, cached })
        }
        KIND_CONTROL => {
            let (control, used) = bincode::serde::decode_from_slice::<Control, _>(body, control_config())
                .map_err(|_| CodecError::Control)?;
            if used == body.len() { Ok(Frame::Control(control)) } else { Err(CodecError::Length) }
        }
        _ => Err(CodecError::Unknown("frame")),
    }
}

/// Fixed-size integers, so that a length is what it says, and a limit on all a message may make the decoder allocate.
fn control_config() -> Configuration<LittleEndian, Fixint, Limit<MAX_CONTROL>> {
    bincode::config::standard().with_fixed_int_encoding().with_limit::<MAX_CONTROL>()
}

const ASSOCIATE: u8 = 1;
const END: u8 = 2;
const TOUCH: u8 = 3;
const HINT: u8 = 4;
const IDLE_QUERY: u8 = 5;
const IDLE_REPLY: u8 = 6;

/// Bit 0 of an item's fourth byte: meant for the cache.
const BIT_CACHE: u8 = 1;
/// Bit 1 of an item's fourth byte: an answer without an entry.
const BIT_ABSENT: u8 = 2;

fn encode_items(bytes: &mut Vec<u8>, number: u64, items: impl ExactSizeIterator<Item = Item> + Clone) {
    assert!(items.len() <= MAX_ITEMS, "callers keep to MAX_ITEMS");
    let count = items.len() as u16;
    let mut dictionary = Dictionary::default();
    let places: Vec<u16> = items
        .clone()
        .map(|item| match item {
            Item::Associate { record, .. } | Item::Hint { record } => dictionary.place(&record.backend),
            _ => NO_BACKEND,
        })
        .collect();
    let dictionary = dictionary.backends;
    bytes.extend_from_slice(&number.to_le_bytes());
    bytes.extend_from_slice(&(dictionary.len() as u16).to_le_bytes());
    bytes.extend_from_slice(&count.to_le_bytes());
    bytes.extend_from_slice(&[0; 4]);
    for backend in &dictionary {
        bytes.extend_from_slice(&backend.address);
        bytes.extend_from_slice(&backend.port);
        bytes.extend_from_slice(&[backend.method, backend.family]);
    }
    for (item, place) in items.zip(places) {
        bytes.extend_from_slice(&encode_item(&item, place));
    }
}

/// Backends that are looked for one after the other before the map is asked: most services have no more, and to compare is cheaper than
/// to hash.
const COMPARED: usize = 16;

/// The backends of one frame, each once.
#[derive(Default)]
struct Dictionary {
    backends: Vec<BackendId>,
    places: HashMap<BackendId, u16>,
}

impl Dictionary {
    fn place(&mut self, backend: &BackendId) -> u16 {
        let near = self.backends.iter().take(COMPARED).position(|known| known == backend);
        if let Some(place) = near {
            return place as u16;
        }
        *self.places.entry(*backend).or_insert_with(|| {
            self.backends.push(*backend);
            // No more backends than items, and those are fewer than NO_BACKEND.
            (self.backends.len() - 1) as u16
        })
    }
}

/// The fields an item may have, in wire order; what a kind does not use is zero.
struct Fields {
    kind: u8,
    state: u8,
    flags: u8,
    bits: u8,
    backend: u16,
    birth: u64,
    update: u32,
    idle_ms: u32,
}

#[inline]
fn encode_item(item: &Item, place: u16) -> [u8; ITEM] {
    let none =
        Fields { kind: 0, state: 0, flags: 0, bits: 0, backend: NO_BACKEND, birth: 0, update: 0, idle_ms: 0 };
    let of_record = |kind, record: &Record, bits| Fields {
        kind,
        state: record.state as u8,
        flags: record.flags.with(FlowFlags::LOCAL, false).0,
        bits,
        backend: place,
        birth: record.birth,
        update: record.update,
        idle_ms: record.idle_ms,
    };
    let fields = match *item {
        Item::Associate { ref record, cache } => {
            of_record(ASSOCIATE, record, if cache { BIT_CACHE } else { 0 })
        }
        Item::Hint { ref record } => of_record(HINT, record, 0),
        Item::End { birth, idle_ms, cache, .. } => {
            Fields { kind: END, birth, idle_ms, bits: if cache { BIT_CACHE } else { 0 }, ..none }
        }
        Item::Touch { birth, idle_ms, .. } => Fields { kind: TOUCH, birth, idle_ms, ..none },
        Item::IdleQuery { birth, .. } => Fields { kind: IDLE_QUERY, birth, ..none },
        Item::IdleReply { birth, idle_ms: Some(idle_ms), .. } => {
            Fields { kind: IDLE_REPLY, birth, idle_ms, ..none }
        }
        Item::IdleReply { birth, idle_ms: None, .. } => {
            Fields { kind: IDLE_REPLY, birth, bits: BIT_ABSENT, ..none }
        }
    };
    let key = item.key();
    let mut bytes = [0; ITEM];
    bytes[0] = fields.kind;
    bytes[1] = fields.state;
    bytes[2] = fields.flags;
    bytes[3] = fields.bits;
    bytes[4..6].copy_from_slice(&fields.backend.to_le_bytes());
    bytes[8..16].copy_from_slice(&fields.birth.to_le_bytes());
    bytes[16..20].copy_from_slice(&fields.update.to_le_bytes());
    bytes[20..24].copy_from_slice(&fields.idle_ms.to_le_bytes());
    bytes[24..40].copy_from_slice(&key.source);
    bytes[40..56].copy_from_slice(&key.destination);
    bytes[56..58].copy_from_slice(&key.source_port);
    bytes[58..60].copy_from_slice(&key.destination_port);
    bytes[60] = key.protocol;
    bytes[61] = key.family;
    bytes
}

/// The number of a body and what `decode` makes of each of its items.
#[inline]
fn decode_items<T>(
    body: &[u8],
    mut decode: impl FnMut(&[u8; ITEM], &[BackendId]) -> Result<T, CodecError>,
) -> Result<(u64, Vec<T>), CodecError> {
    let mut reader = Reader(body);
    let number = u64::from_le_bytes(reader.take()?);
    let backends = usize::from(u16::from_le_bytes(reader.take()?));
    let count = usize::from(u16::from_le_bytes(reader.take()?));
    if reader.take::<4>()? != [0; 4] {
        return Err(CodecError::Unknown("batch head"));
    }
    // Checked before anything is allocated: the body is as long as it says, so the lists below are no longer than it.
    if count > MAX_ITEMS || backends > count || reader.0.len() != backends * BACKEND + count * ITEM {
        return Err(CodecError::Length);
    }
    let mut dictionary = Vec::with_capacity(backends);
    for _ in 0..backends {
        let backend = BackendId {
            address: reader.take()?,
            port: reader.take()?,
            method: reader.byte()?,
            family: reader.byte()?,
        };
        if Method::from_u8(backend.method).is_none() || !matches!(backend.family, 4 | 6) {
            return Err(CodecError::Unknown("backend"));
        }
        dictionary.push(backend);
    }
    let mut items = Vec::with_capacity(count);
    for _ in 0..count {
        items.push(decode(&reader.take()?, &dictionary)?);
    }
    Ok((number, items))
}

impl Fields {
    #[inline]
    fn decode(bytes: &[u8; ITEM]) -> Result<Self, CodecError> {
        let mut reader = Reader(bytes);
        let [kind, state, flags, bits] = reader.take()?;
        let backend = u16::from_le_bytes(reader.take()?);
        if reader.take()? != [0; 2] {
            return Err(CodecError::Unknown("item"));
        }
        let birth = u64::from_le_bytes(reader.take()?);
        let update = u32::from_le_bytes(reader.take()?);
        let idle_ms = u32::from_le_bytes(reader.take()?);
        let allowed_bits = match kind {
            ASSOCIATE | END => BIT_CACHE,
            IDLE_REPLY => BIT_ABSENT,
            _ => 0,
        };
        if bits & !allowed_bits != 0 {
            return Err(CodecError::Unknown("item"));
        }
        Ok(Self { kind, state, flags, bits, backend, birth, update, idle_ms })
    }

    #[inline]
    fn record(&self, key: FlowKey, dictionary: &[BackendId]) -> Result<Record, CodecError> {
        Ok(Record {
            key,
            backend: *dictionary.get(usize::from(self.backend)).ok_or(CodecError::Unknown("backend"))?,
            birth: self.birth,
            update: self.update,
            state: FlowState::from_u8(self.state).ok_or(CodecError::Unknown("flow state"))?,
            flags: FlowFlags(self.flags & (FlowFlags::RECOVERED | FlowFlags::DEVIATES)),
            idle_ms: self.idle_ms,
        })
    }
}

/// Where the key begins in an item.
const KEY: usize = 24;

#[inline]
fn key_of(bytes: &[u8; ITEM]) -> Result<FlowKey, CodecError> {
    let mut reader = Reader(&bytes[KEY..]);
    let key = FlowKey {
        source: reader.take()?,
        destination: reader.take()?,
        source_port: reader.take()?,
        destination_port: reader.take()?,
        protocol: reader.byte()?,
        family: reader.byte()?,
        reserved: [0; 2],
    };
    if reader.take()? != [0; 2] {
        return Err(CodecError::Unknown("item"));
    }
    if matches!(key.family, 4 | 6) { Ok(key) } else { Err(CodecError::Unknown("family")) }
}

fn decode_item(bytes: &[u8; ITEM], dictionary: &[BackendId]) -> Result<Item, CodecError> {
    let fields = Fields::decode(bytes)?;
    let key = key_of(bytes)?;
    let Fields { bits, birth, idle_ms, .. } = fields;
    Ok(match fields.kind {
        ASSOCIATE => {
            Item::Associate { record: fields.record(key, dictionary)?, cache: bits & BIT_CACHE != 0 }
        }
        HINT => Item::Hint { record: fields.record(key, dictionary)? },
        END => Item::End { key, birth, idle_ms, cache: bits & BIT_CACHE != 0 },
        TOUCH => Item::Touch { key, birth, idle_ms },
        IDLE_QUERY => Item::IdleQuery { key, birth },
        IDLE_REPLY => Item::IdleReply { key, birth, idle_ms: (bits & BIT_ABSENT == 0).then_some(idle_ms) },
        _ => return Err(CodecError::Unknown("item")),
    })
}

/// Takes fixed-size pieces off the front.
struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    #[inline]
    fn take<const N: usize>(&mut self) -> Result<[u8; N], CodecError> {
        let (piece, rest) = self.0.split_first_chunk::<N>().ok_or(CodecError::Length)?;
        self.0 = rest;
        Ok(*piece)
    }

    #[inline]
    fn byte(&mut self) -> Result<u8, CodecError> {
        self.take::<1>().map(|[byte]| byte)
    }
}

#[cfg(test)]
mod tests;
