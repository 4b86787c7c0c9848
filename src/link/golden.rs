//! The bytes of every kind of frame. A change here is a change of the protocol: older agents must still understand it.

use farshore_api::replication::v1 as pb;
use pb::frame::Body;
use prost::Message;

use super::testing::batch;

fn hex(body: Body) -> String {
    let bytes = pb::Frame::of(body).encode_to_vec();
    assert_eq!(pb::Frame::decode(bytes.as_slice()).map(|f| f.encode_to_vec()), Ok(bytes.clone()));
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn position(time: u64, ordinal: u32) -> Option<pb::Position> {
    Some(pb::Position { time, ordinal })
}

#[test]
fn frames_keep_their_bytes() {
    let bytes = |n: u8| bytes::Bytes::from(vec![n; 16]);
    let hello = pb::Hello {
        version_min: 1,
        version_max: 1,
        site: "south".into(),
        group: "bank".into(),
        agent: "01010101-0101-0101-0101-010101010101".into(),
        epoch: 2,
        term: 3,
        receiving: vec![
            pb::Receiving {
                source: "north".into(),
                received: position(0x0102_0304_0506_0708, 9),
                incarnation: bytes(7),
                hash: 0x1122,
                start_at: None,
                empty: false,
            },
            pb::Receiving { source: "west".into(), start_at: Some(5), empty: true, ..Default::default() },
        ],
        originating: vec![pb::Originating { source: "south".into(), incarnation: bytes(8), captured: position(6, 0) }],
        leader: true,
    };
    let frames = [
        ("hello", Body::Hello(hello)),
        (
            "batch",
            Body::Batch(pb::Batch {
                source: "north".into(),
                epoch: 1,
                term: 2,
                record: batch(1, 3, 4).record().clone(),
                begins: true,
            }),
        ),
        (
            "ack",
            Body::Ack(pb::Ack {
                source: "north".into(),
                received: position(7, 1),
                applied: position(6, 2),
                verified: position(5, 0),
                credit: 1 << 25,
            }),
        ),
        (
            "progress",
            Body::Progress(pb::Progress {
                source: "north".into(),
                head: 9,
                captured: position(8, 1),
                captured_changes: 300,
                captured_bytes: 4000,
                now_ms: 1_763_669_100_000,
            }),
        ),
        (
            "fetch",
            Body::Fetch(pb::Fetch {
                id: 5,
                database: "shop".into(),
                collection: "items".into(),
                collection_uuid: bytes(3),
                keys: vec![bytes(1), bytes(2)],
                at: 0,
            }),
        ),
        (
            "fetched",
            Body::Fetched(pb::Fetched {
                id: 5,
                at: 77,
                documents: vec![bytes(4), bytes::Bytes::new()],
                collection_gone: true,
                error: "later".into(),
            }),
        ),
        (
            "reject",
            Body::Reject(pb::Reject {
                reason: pb::reject::Reason::Term.into(),
                message: "over".into(),
                hint: "stop".into(),
                epoch: 1,
                term: 4,
            }),
        ),
        ("ping", Body::Ping(pb::Ping { at_us: 1_500_000 })),
        ("pong", Body::Pong(pb::Pong { at_us: 1_500_000 })),
    ];
    let found: String = frames.into_iter().map(|(name, body)| format!("{name} {}\n", hex(body))).collect();
    assert_eq!(found, include_str!("golden.txt"));
}
