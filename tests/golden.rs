//! Bytes that older and newer agents must understand: batch records, the documents in the target's database, and the
//! fields of every wire message.
//!
//! Golden elsewhere: every frame of the link (`src/link/golden.txt`), states, keys and envelopes of the outbox
//! (`src/outbox/{record,keys,envelope}.rs`), resume tokens of a real server (`src/source/token.rs`).
//! A failing test here means a new format version and another golden file, never another golden text.

use std::collections::{BTreeMap, BTreeSet};

use bson::{Document, RawDocumentBuf, doc, rawdoc};
use bytes::Bytes;
use farshore::apply::catalog::{Entry, Presence};
use farshore::apply::lanes::{Floor, LaneState};
use farshore::apply::store;
use farshore::apply::target::StreamRecord;
use farshore::model::{Batch, BatchBuilder, ClusterTime, CollectionUuid, Epoch, Incarnation, Position, StreamHash};

fn unhex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
    let pair = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).expect("ascii"), 16).expect("hex");
    digits.chunks_exact(2).map(pair).collect()
}

fn hex(bytes: &[u8]) -> String {
    let lines = bytes.chunks(48).map(|line| line.iter().map(|byte| format!("{byte:02x}")).collect::<String>());
    lines.collect::<Vec<_>>().join("\n") + "\n"
}

fn changes(pad: usize) -> Vec<(Position, RawDocumentBuf)> {
    let time = ClusterTime::new(0x6650_0000, 7);
    let change = |n: i32| rawdoc! {"operationType": "insert", "n": n, "pad": "x".repeat(pad)};
    vec![(Position::new(time, 1), change(1)), (Position::new(time, 2), change(2))]
}

fn record(pad: usize) -> Batch {
    let previous = Position::new(ClusterTime::new(0x6650_0000, 6), 3);
    let mut builder = BatchBuilder::new(Incarnation([0xA1; 16]), Epoch(2), previous, StreamHash(0x0102_0304_0506_0708));
    for (position, change) in changes(pad) {
        builder.push(position, &[change.as_bytes()]);
    }
    builder.finish(Position::through(ClusterTime::new(0x6650_0000, 7)))
}

fn check(batch: &Batch, pad: usize) {
    let header = batch.header();
    assert_eq!((header.incarnation, header.epoch, header.count), (Incarnation([0xA1; 16]), Epoch(2), 2));
    assert_eq!(header, record(pad).header());
    let found: Vec<_> = batch.changes().expect("changes").shared().collect();
    let wanted: Vec<_> = changes(pad).into_iter().map(|(at, change)| (at, Bytes::from(change.into_bytes()))).collect();
    assert_eq!(found, wanted);
}

#[test]
fn a_record_of_version_1_is_written_as_ever() {
    assert_eq!(hex(record(3).record()), include_str!("golden/batch-v1.hex"));
    check(&Batch::decode(unhex(include_str!("golden/batch-v1.hex")).into()).expect("decode"), 3);
}

/// A compressed body may come out otherwise with another version of zstd; it must be read for ever.
#[test]
fn a_compressed_record_of_version_1_is_read_for_ever() {
    check(&Batch::decode(unhex(include_str!("golden/batch-v1-zstd.hex")).into()).expect("decode"), 400);
}

fn at(n: u32) -> Position {
    Position::new(ClusterTime::new(n, 2), 3)
}

fn lane() -> LaneState {
    let floors = vec![Floor { collection: CollectionUuid([2; 16]), key: 7, at: ClusterTime::new(8, 1) }];
    LaneState { position: at(9), parked: BTreeMap::from([(CollectionUuid([1; 16]), at(5))]), floors }
}

fn stream() -> StreamRecord {
    StreamRecord { incarnation: Incarnation([3; 16]), floor: at(4), hash: StreamHash(u64::MAX - 1), adopted: true }
}

fn entries() -> [Entry; 3] {
    let entry = |presence, one_lane| {
        let (db, coll) = ("d".into(), "c".into());
        Entry { db, coll, presence, one_lane, collation: one_lane, ddl_through: at(3) }
    };
    [
        entry(Presence::Present(CollectionUuid([4; 16])), true),
        entry(Presence::Dropped, false),
        entry(Presence::Refused("capped".into()), true),
    ]
}

fn stored(document: &Document) -> String {
    let text = bson::Bson::Document(document.clone()).into_canonical_extjson();
    serde_json::to_string(&text).expect("json") + "\n"
}

fn read(line: &str) -> Document {
    let value: serde_json::Value = serde_json::from_str(line).expect("json");
    bson::Bson::try_from(value).expect("extended json").as_document().expect("a document").clone()
}

fn entry_document(entry: &Entry) -> Document {
    let mut document = store::entry_fields(entry);
    document.insert("_id", doc! {"stream": "north/south", "collection": store::uuid(CollectionUuid([5; 16]))});
    document
}

/// Fields may be added (an older agent skips them), never changed.
#[test]
fn documents_of_the_target_keep_their_form() {
    let golden = include_str!("golden/stored-v1.jsonl");
    let mut written = stored(&store::lane_fields(&LaneState::default(), &lane()));
    written += &stored(&store::stream_fields(&stream()));
    entries().iter().for_each(|entry| written += &stored(&entry_document(entry)));
    assert_eq!(written, golden);
    let lines: Vec<Document> = golden.lines().map(read).collect();
    assert_eq!(store::read_lane(&lines[0]), Ok(lane()));
    assert_eq!(store::read_stream(&lines[1]), Ok(stream()));
    for (line, entry) in lines[2..].iter().zip(entries()) {
        assert_eq!(store::read_entry(line), Ok(Some((CollectionUuid([5; 16]), entry))));
    }
}

#[test]
fn newer_documents_of_the_target_are_refused_with_a_hint() {
    let newer = doc! {"version": store::VERSION + 1};
    let errors = [
        store::read_lane(&newer).map(drop).expect_err("newer"),
        store::read_stream(&newer).map(drop).expect_err("newer"),
        store::read_entry(&newer).map(drop).expect_err("newer"),
    ];
    for error in errors {
        assert!(error.to_string().contains("upgrade this agent first"), "{error}");
    }
}

/// Every field, enum value and call of the protocol as `where: type name = number`.
fn protocol(text: &str) -> BTreeSet<String> {
    let (mut found, mut scope): (BTreeSet<String>, Vec<String>) = (BTreeSet::new(), Vec::new());
    for line in text.lines() {
        let line = line.split("//").next().unwrap_or_default().trim();
        if let Some(package) = line.strip_prefix("package ") {
            scope.push(package.trim_end_matches(';').to_owned());
        } else if line.ends_with('{') {
            scope.push(line.split_whitespace().nth(1).unwrap_or_default().trim_end_matches('{').to_owned());
        } else if line.ends_with("{}") || line == "}" {
            if line == "}" {
                scope.pop();
            } else if line.starts_with("message") {
                found.insert(format!("{}: {}", scope.join("."), line.trim_end_matches(" {}")));
            }
        } else if line.starts_with("rpc ") || (line.contains(" = ") && line.ends_with(';') && scope.len() > 1) {
            let words: Vec<&str> = line.trim_end_matches(';').split_whitespace().collect();
            found.insert(format!("{}: {}", scope.join("."), words.join(" ")));
        }
    }
    found
}

/// A number or type that changed would be misread by an agent of another version without a word. New lines are welcome:
/// they are added to the golden file with the change that brings them.
#[test]
fn the_protocol_keeps_its_numbers() {
    let now: BTreeSet<String> = [
        include_str!("../proto/farshore/replication/v1/replication.proto"),
        include_str!("../proto/farshore/control/v1/control.proto"),
    ]
    .into_iter()
    .flat_map(protocol)
    .collect();
    let golden: BTreeSet<String> = include_str!("golden/protocol.txt").lines().map(str::to_owned).collect();
    let gone: Vec<_> = golden.difference(&now).collect();
    let new: Vec<_> = now.difference(&golden).collect();
    assert!(gone.is_empty(), "changed or removed: {gone:#?}");
    assert!(new.is_empty(), "add to tests/golden/protocol.txt: {new:#?}");
}
