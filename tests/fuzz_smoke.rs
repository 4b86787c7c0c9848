//! Feeds every decoder mutated samples for a few seconds: a panic or a broken promise fails the test and prints the input.
//!
//! `FARSHORE_FUZZ_SECONDS` (6) is the time for all decoders together, `FARSHORE_FUZZ_SEED` (1) chooses the mutations. This
//! is blind mutation of good samples, without coverage feedback; the libFuzzer targets in `fuzz/` have that.

#[path = "../fuzz/entries.rs"]
mod entries;

use std::panic::catch_unwind;
use std::time::{Duration, Instant};

use bson::{Document, RawDocumentBuf, doc};
use farshore::apply::catalog::{Entry, Presence};
use farshore::apply::lanes::{Floor, LaneState};
use farshore::apply::store;
use farshore::apply::target::StreamRecord;
use farshore::model::{Batch, BatchBuilder, ClusterTime, CollectionUuid, Epoch, Incarnation, Position, StreamHash};
use farshore_api::replication::v1 as pb;
use prost::Message as _;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;
use rand::{Rng as _, SeedableRng as _};

fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable).map_or(default, |text| text.parse().expect("a number"))
}

fn bytes_of(document: Document) -> Vec<u8> {
    RawDocumentBuf::try_from(&document).expect("encodes").into_bytes()
}

fn uuid() -> bson::Bson {
    store::uuid(CollectionUuid([3; 16]))
}

fn token(index: &str) -> Document {
    doc! {"_data": format!("826B00B86B000000022B022C0100{index}6E5A1004AA0974BD0E33488483159709266")}
}

fn events() -> Vec<Document> {
    let ns = doc! {"db": "shop", "coll": "items"};
    let list = doc! {"a": true, "l": 3, "u2": 5_i64};
    let diff = doc! {"d": {"gone": false}, "u": {"n": 1}, "i": {"a.b": "x"}, "sc": {"d": {"d": false}}, "slist": list};
    let update = doc! {"$v": 2, "diff": diff};
    let key = doc! {"_id": {"a": 1, "b": [1.5, null]}};
    vec![
        doc! {"_id": token("29"), "operationType": "insert", "collectionUUID": uuid(), "ns": ns.clone(), "documentKey": {"_id": 1}, "fullDocument": {"_id": 1, "x": "y"}},
        doc! {"_id": token("29"), "operationType": "update", "collectionUUID": uuid(), "ns": ns.clone(), "documentKey": key, "rawUpdateDescription": update, "txnNumber": 1_i64},
        doc! {"_id": token("2B02"), "operationType": "delete", "collectionUUID": uuid(), "ns": ns.clone(), "documentKey": {"_id": "k"}},
        doc! {"_id": token("2B04"), "operationType": "rename", "collectionUUID": uuid(), "ns": ns.clone(), "to": ns, "operationDescription": {"dropTarget": uuid()}},
    ]
}

fn batch(large: bool) -> Batch {
    let previous = Position::new(ClusterTime::new(100, 1), 1);
    let mut builder = BatchBuilder::new(Incarnation([5; 16]), Epoch(3), previous, StreamHash(77));
    for (index, event) in events().into_iter().enumerate() {
        let mut event = event;
        if large {
            event.insert("pad", "x".repeat(500));
        }
        let position = Position::new(ClusterTime::new(101, 1), index as u32 + 1);
        builder.push(position, &[&bytes_of(event)]);
    }
    builder.finish(Position::through(ClusterTime::new(101, 1)))
}

fn frames() -> Vec<Vec<u8>> {
    use pb::frame::Body;
    let position = Some(pb::Position { time: 7, ordinal: 1 });
    let hello = pb::Hello {
        version_min: 1,
        version_max: 1,
        site: "south".into(),
        group: "bank".into(),
        agent: "01010101-0101-0101-0101-010101010101".into(),
        epoch: 2,
        term: 3,
        receiving: vec![pb::Receiving {
            source: "north".into(),
            received: position,
            incarnation: vec![7; 16].into(),
            hash: 5,
            start_at: Some(4),
            empty: true,
        }],
        originating: vec![pb::Originating {
            source: "south".into(),
            incarnation: vec![8; 16].into(),
            captured: position,
        }],
        leader: true,
    };
    let shipped =
        pb::Batch { source: "north".into(), epoch: 1, term: 2, record: batch(false).record().clone(), begins: true };
    let ack = pb::Ack { source: "north".into(), received: position, applied: position, verified: None, credit: 9 };
    let reject = pb::Reject { reason: 3, message: "over".into(), hint: "stop".into(), epoch: 1, term: 4 };
    [Body::Hello(hello), Body::Batch(shipped), Body::Ack(ack), Body::Reject(reject)]
        .map(|body| pb::Frame::of(body).encode_to_vec())
        .into()
}

fn stored_documents() -> Vec<Vec<u8>> {
    let at = Position::new(ClusterTime(9), 1);
    let floors = vec![Floor { collection: CollectionUuid([2; 16]), key: 7, at: ClusterTime(8) }];
    let lane = LaneState { position: at, parked: [(CollectionUuid([1; 16]), at)].into(), floors };
    let record = StreamRecord { incarnation: Incarnation([3; 16]), floor: at, hash: StreamHash(5), adopted: true };
    let presence = Presence::Present(CollectionUuid([4; 16]));
    let entry = Entry { db: "d".into(), coll: "c".into(), presence, one_lane: true, collation: false, ddl_through: at };
    let mut entry = store::entry_fields(&entry);
    entry.insert("_id", doc! {"stream": "a/b", "collection": uuid()});
    vec![
        bytes_of(store::lane_fields(&LaneState::default(), &lane)),
        bytes_of(store::stream_fields(&record)),
        bytes_of(entry),
    ]
}

const CONFIG: &str = "[site]\nname = \"north\"\ndomain = \"fleet.example\"\n[group]\nname = \"bank\"\nprimary = \"north\"\n\
    [mongodb]\nuri = \"mongodb://a:1/?replicaSet=rs\"\n[data]\ndirectory = \"/var/lib/x\"\noutbox_limit = \"10 GiB\"\n\
    [link]\nlisten = \"0.0.0.0:7000\"\nheartbeat = \"500ms\"\n[[peers]]\nsite = \"south\"\naddresses = [\"s:7000\"]\ndial = true\n";

fn samples(entry: &str) -> Vec<Vec<u8>> {
    let reply = |events: Vec<Document>| {
        bytes_of(doc! {"cursor": {"nextBatch": events, "postBatchResumeToken": token("2B06")}, "ok": 1})
    };
    match entry {
        "record" => vec![batch(false).record().to_vec(), batch(true).record().to_vec()],
        "stored_value" => {
            let place = [[0; 24].as_slice(), &[1, 0, 0, 0], batch(false).record()].concat();
            let state = "090909090909090909090909090909090200000000000000000000000000000500000000000000000000001400000000\
                030000000000000004000000000000006400000000000000020000000000000001000000000000002c01000000000000\
                06000000000000000100010000000000000000000000000000050000000001746f6b";
            let state: Vec<u8> = (0..state.len() / 2)
                .map(|at| u8::from_str_radix(state.get(at * 2..at * 2 + 2).expect("ascii"), 16).expect("hex"))
                .collect();
            vec![place, state]
        }
        "change" => events().into_iter().map(bytes_of).collect(),
        "resume_token" => {
            vec![
                bytes_of(token("2B04")),
                b"826B00B86F000000052B022C01002C75566E5A1004".to_vec(),
                b"826B00B871000000032B0229296E04".to_vec(),
            ]
        }
        "reply" => vec![reply(events()), reply(Vec::new())],
        "diff" => {
            let document =
                doc! {"_id": 1, "n": 0, "a": {"b": 1}, "list": [1, 2, 3, 4], "gone": 1, "c": {"d": 2}, "a.b": 3};
            let diff =
                |event: &Document| event.get_document("rawUpdateDescription").ok()?.get_document("diff").ok().cloned();
            let plain = doc! {"d": {"n": false}, "u": {"gone": 3}, "i": {"z": 1, "b": 2, "7": 3}};
            let nested = doc! {"sa": {"u": {"b": 9}}, "slist": {"a": true, "l": 9, "u6": {}}};
            let diffs = events().iter().filter_map(diff).chain([plain, nested]).collect::<Vec<_>>();
            diffs.into_iter().map(|d| [bytes_of(d), bytes_of(document.clone())].concat()).collect()
        }
        "config" => vec![CONFIG.into()],
        "frame" => frames(),
        "stored_document" => stored_documents(),
        other => panic!("no samples for {other}"),
    }
}

fn mutate(rng: &mut StdRng, samples: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = samples.choose(rng).expect("some").clone();
    for _ in 0..rng.random_range(1..6) {
        if bytes.is_empty() {
            bytes.push(rng.random());
        }
        let at = rng.random_range(0..bytes.len());
        match rng.random_range(0..8) {
            0 => bytes[at] ^= 1 << rng.random_range(0..8),
            1 => bytes[at] = rng.random(),
            2 => bytes[at] = bytes[at].wrapping_add(*[1, 255].choose(rng).expect("some")),
            3 => bytes.truncate(at),
            4 => bytes.insert(at, rng.random()),
            5 => drop(bytes.drain(at..(at + rng.random_range(1..9)).min(bytes.len()))),
            6 => {
                let number = *[0, 1, -1, 5, i32::MAX, i32::MIN, 1 << 20].choose(rng).expect("some");
                for (byte, new) in bytes[at..].iter_mut().zip(number.to_le_bytes()) {
                    *byte = new;
                }
            }
            _ => {
                let other = samples.choose(rng).expect("some");
                let from = rng.random_range(0..other.len());
                let part = &other[from..(from + rng.random_range(1..64)).min(other.len())];
                bytes.splice(at..at, part.iter().copied());
            }
        }
    }
    bytes
}

#[test]
fn decoders_survive_arbitrary_bytes() {
    let time = Duration::from_secs(number("FARSHORE_FUZZ_SECONDS", 6)) / entries::ENTRIES.len() as u32;
    let seed = number("FARSHORE_FUZZ_SEED", 1);
    let mut total: u64 = 0;
    for (name, entry) in entries::ENTRIES {
        let samples = samples(name);
        let mut rng = StdRng::seed_from_u64(seed);
        let (started, mut inputs) = (Instant::now(), 0u64);
        for sample in &samples {
            entry(sample);
        }
        while started.elapsed() < time {
            for _ in 0..256 {
                let input = mutate(&mut rng, &samples);
                if catch_unwind(|| entry(&input)).is_err() {
                    let hex: String = input.iter().map(|byte| format!("{byte:02x}")).collect();
                    panic!("{name} panics (seed {seed}, input {inputs}): {hex}");
                }
                inputs += 1;
            }
        }
        println!("{name}: {inputs} inputs");
        total += inputs;
    }
    println!("{total} inputs in all");
    assert!(total > 10_000, "only {total} inputs");
}

/// The samples themselves must be good, or the mutations of them test nothing.
#[test]
fn the_samples_are_good() {
    for record in samples("record") {
        Batch::decode(record.into()).expect("a record").changes().expect("its changes");
    }
    for value in samples("stored_value") {
        assert!(farshore::outbox::decode_stored_value(&value));
    }
    for frame in samples("frame") {
        assert!(pb::Frame::decode(frame.as_slice()).expect("a frame").body.is_some());
    }
    for [read] in samples("stored_document").chunks(1).map(|c| [c[0].clone()]) {
        let document = bson::Document::try_from(bson::RawDocument::from_bytes(&read).expect("bson")).expect("bson");
        let good = store::read_lane(&document).is_ok()
            || store::read_stream(&document).is_ok()
            || store::read_entry(&document).is_ok_and(|entry| entry.is_some());
        assert!(good, "{document}");
    }
}
