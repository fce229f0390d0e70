use proptest::prelude::*;

use super::*;
use crate::testing::{backend, key, record};

fn any_record() -> impl Strategy<Value = Record> {
    (any::<(u16, u8, u64, u32, u32)>(), 0u8..4, 0u8..4).prop_map(
        |((n, to, birth, update, idle_ms), state, flags)| Record {
            key: key(n),
            backend: backend(to),
            birth,
            update,
            state: FlowState::from_u8(state).unwrap(),
            flags: FlowFlags(flags),
            idle_ms,
        },
    )
}

fn any_item() -> impl Strategy<Value = Item> {
    prop_oneof![
        (any_record(), any::<bool>()).prop_map(|(record, cache)| Item::Associate { record, cache }),
        any_record().prop_map(|record| Item::Hint { record }),
        any::<(u16, u64, u32, bool)>().prop_map(|(n, birth, idle_ms, cache)| Item::End {
            key: key(n),
            birth,
            idle_ms,
            cache
        }),
        any::<(u16, u64, u32)>().prop_map(|(n, birth, idle_ms)| Item::Touch { key: key(n), birth, idle_ms }),
        any::<(u16, u64)>().prop_map(|(n, birth)| Item::IdleQuery { key: key(n), birth }),
        any::<(u16, u64, Option<u32>)>().prop_map(|(n, birth, idle_ms)| Item::IdleReply {
            key: key(n),
            birth,
            idle_ms
        }),
    ]
}

fn any_refusals() -> impl Strategy<Value = Vec<(u16, Refusal)>> {
    prop::collection::vec(
        (any::<u16>(), prop_oneof![Just(Refusal::Full), Just(Refusal::UnknownBackend)]),
        0..20,
    )
}

fn any_frame() -> impl Strategy<Value = Frame> {
    prop_oneof![
        (any::<u64>(), prop::collection::vec(any_item(), 0..40))
            .prop_map(|(seq, items)| Frame::Batch { seq, items }),
        (any::<u64>(), prop::collection::vec((any_record(), any::<bool>()), 0..40)).prop_map(
            |(id, records)| {
                let places = (0_u16..).zip(&records);
                let cached = places.filter(|(_, (_, cache))| *cache).map(|(place, _)| place).collect();
                let records = records.iter().map(|(record, _)| *record).collect();
                Frame::Chunk { id, records, cached }
            }
        ),
        (any::<u64>(), any_refusals())
            .prop_map(|(seq, refused)| Frame::Control(Control::Ack { seq, refused })),
        (any::<u64>(), any_refusals())
            .prop_map(|(id, refused)| Frame::Control(Control::ChunkAck { id, refused })),
    ]
}

fn decode_all(pieces: &[&[u8]]) -> Result<Vec<Frame>, CodecError> {
    let mut decoder = FrameDecoder::new();
    let mut frames = Vec::new();
    for piece in pieces {
        decoder.handle_data(piece);
        while let Some(frame) = decoder.poll_frame()? {
            frames.push(frame);
        }
        assert!(decoder.buffer.len() - decoder.start <= HEAD + MAX_BODY);
    }
    Ok(frames)
}

proptest! {
    #[test]
    fn what_is_encoded_decodes_the_same_however_the_stream_is_cut(
        frames in prop::collection::vec(any_frame(), 0..6),
        piece in 1usize..400,
    ) {
        let bytes: Vec<u8> = frames.iter().flat_map(encode).collect();
        let pieces: Vec<_> = bytes.chunks(piece).collect();
        prop_assert_eq!(decode_all(&pieces), Ok(frames));
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        let _ = decode_all(&[&bytes]);
    }

    #[test]
    fn arbitrary_bodies_never_panic(kind in 0u8..5, body in prop::collection::vec(any::<u8>(), 0..600)) {
        let mut bytes = MAGIC.to_vec();
        bytes.extend_from_slice(&[VERSION, kind, 0, 0]);
        bytes.extend_from_slice(&(body.len() as u32).to_le_bytes());
        bytes.extend_from_slice(&body);
        let _ = decode_all(&[&bytes]);
    }

    #[test]
    fn damaged_frames_never_panic(frame in any_frame(), flips in prop::collection::vec((any::<prop::sample::Index>(), 1u8..), 1..8)) {
        let mut bytes = encode(&frame);
        for (place, flip) in flips {
            let place = place.index(bytes.len());
            bytes[place] ^= flip;
        }
        let _ = decode_all(&[&bytes, &bytes]);
    }

    #[test]
    fn a_cut_frame_is_not_a_frame(frame in any_frame(), cut in any::<prop::sample::Index>()) {
        let bytes = encode(&frame);
        prop_assert_eq!(decode_all(&[&bytes[..cut.index(bytes.len())]]), Ok(vec![]));
    }
}

#[test]
fn a_frame_that_says_it_is_too_long_is_refused_before_its_body_comes() {
    for (kind, limit) in [(KIND_BATCH, MAX_BODY), (KIND_CHUNK, MAX_BODY), (KIND_CONTROL, MAX_CONTROL)] {
        let head = |length: usize| {
            let mut head = MAGIC.to_vec();
            head.extend_from_slice(&[VERSION, kind, 0, 0]);
            head.extend_from_slice(&(length as u32).to_le_bytes());
            head
        };
        assert_eq!(decode_all(&[&head(limit + 1)]), Err(CodecError::Length));
        assert_eq!(decode_all(&[&head(limit)]), Ok(vec![]), "the twin: the longest waits for its body");
    }
}

#[test]
fn a_control_message_cannot_ask_for_more_than_its_limit() {
    // Ack with a list that says it has 2^60 entries.
    let mut body = 0u32.to_le_bytes().to_vec();
    body.extend_from_slice(&7u64.to_le_bytes());
    body.extend_from_slice(&(1u64 << 60).to_le_bytes());
    assert_eq!(decode_body(KIND_CONTROL, &body), Err(CodecError::Control));
    let fine = encode(&Frame::Control(Control::Ack { seq: 7, refused: vec![] }));
    assert_eq!(fine[HEAD..HEAD + 12], body[..12], "the twin differs only in the length of the list");
}

#[test]
fn foreign_versions_and_streams_are_refused_by_name() {
    let frame = Frame::Control(Control::Ack { seq: 1, refused: vec![] });
    let mut version = encode(&frame);
    version[4] = VERSION + 1;
    assert_eq!(decode_all(&[&version]), Err(CodecError::Version(VERSION + 1)));
    assert_eq!(decode_all(&[b"GET"]), Err(CodecError::Magic));
    assert_eq!(decode_all(&[b"PHX"]), Ok(vec![]));
}

#[test]
fn every_reserved_byte_and_number_is_checked() {
    let frame = Frame::Batch { seq: 1, items: vec![Item::Associate { record: record(1, 1), cache: false }] };
    let bytes = encode(&frame);
    let item = bytes.len() - ITEM;
    let dictionary = item - BACKEND;
    for (place, value) in [
        (6, 1),               // frame head
        (HEAD + 12, 1),       // batch head
        (dictionary + 18, 9), // method
        (dictionary + 19, 5), // family of the backend
        (item, 99),           // kind
        (item + 1, 4),        // state
        (item + 3, 4),        // bits
        (item + 4, 1),        // backend
        (item + 6, 1),        // reserved
        (item + 61, 5),       // family of the flow
        (item + 63, 1),       // reserved
    ] {
        let mut damaged = bytes.clone();
        damaged[place] = value;
        assert!(matches!(decode_all(&[&damaged]), Err(CodecError::Unknown(_))), "byte {place}");
    }
    assert_eq!(decode_all(&[&bytes]), Ok(vec![frame]));
}

#[test]
fn a_transfer_table_carries_associations_only() {
    let items = vec![Item::End { key: key(1), birth: 1, idle_ms: 0, cache: false }];
    let mut bytes = encode(&Frame::Batch { seq: 1, items });
    assert!(decode_all(&[&bytes]).is_ok());
    bytes[5] = KIND_CHUNK;
    assert_eq!(decode_all(&[&bytes]), Err(CodecError::Unknown("item in a transfer table")));
}

#[test]
fn the_protected_flag_stays_at_home() {
    let mut ours = record(1, 1);
    ours.flags = FlowFlags(FlowFlags::PROTECTED | FlowFlags::DEVIATES);
    let bytes = encode(&Frame::Batch { seq: 1, items: vec![Item::Associate { record: ours, cache: false }] });
    let frames = decode_all(&[&bytes]).unwrap();
    let [Frame::Batch { items, .. }] = frames.as_slice() else { panic!("one batch") };
    let Item::Associate { record, .. } = items[0] else { panic!("an association") };
    assert_eq!(record.flags, FlowFlags(FlowFlags::DEVIATES));
}

#[test]
fn a_full_chunk_fits_into_a_frame() {
    let records: Vec<_> = (0..MAX_ITEMS)
        .map(|n| {
            let mut record = record(n as u16, 0);
            record.backend.address[..2].copy_from_slice(&(n as u16).to_le_bytes());
            record
        })
        .collect();
    let frame = Frame::Chunk { id: 1, records, cached: Vec::new() };
    let bytes = encode(&frame);
    assert_eq!(bytes.len(), HEAD + MAX_BODY);
    assert_eq!(decode_all(&[&bytes]), Ok(vec![frame]));
}
