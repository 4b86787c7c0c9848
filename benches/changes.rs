//! What is done to every change between a server's reply and a command, in bytes per second of changes: parsing, cutting
//! a reply, routing, lanes, planning.

use std::hint::black_box;

use bson::raw::{RawArrayBuf, RawDocumentBuf};
use bson::{Binary, Timestamp, rawdoc, spec::BinarySubtype};
use bytes::Bytes;
use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use farshore::apply::catalog::{Entries, Entry, Presence};
use farshore::apply::lanes::{Item, LaneState, Lanes, Limits};
use farshore::apply::plan::{Floors, plan};
use farshore::apply::route::Router;
use farshore::model::raw;
use farshore::model::{
    Batch, BatchBuilder, Change, ClusterTime, CollectionUuid, Epoch, Incarnation, LaneId, Op, Position, StreamHash,
    hash,
};
use farshore::source::chunk::{Chunker, Reply};

const CHANGES: u32 = 1_000;
const UUID: CollectionUuid = CollectionUuid([7; 16]);
const KINDS: [&str; 4] = ["insert", "update", "delete", "mixed"];

fn time(n: u32) -> ClusterTime {
    ClusterTime::new(1_763_600_000, n + 1)
}

/// A resume token as mongod 6.0 writes it; a change's one ends with its collection and document key.
fn token(n: u32, change: bool) -> RawDocumentBuf {
    let tail = if change { "2C0100296E5A1004" } else { "29296E04" };
    let key = if change { "07".repeat(16) + "46645F6964006400000000000000000004" } else { String::new() };
    rawdoc! {"_data": format!("82{:016X}2B02{tail}{key}", time(n).0)}
}

/// An event of a document of about 500 bytes, half of it hard to compress.
fn event(kind: &str, n: u32) -> RawDocumentBuf {
    let id = i64::from(n);
    let noise: String =
        (0..16u64).map(|i| format!("{:016x}", (u64::from(n) * 16 + i).wrapping_mul(0x9e37_79b9_7f4a_7c15))).collect();
    let at = Timestamp { time: time(n).seconds(), increment: time(n).increment() };
    let mut event = rawdoc! {
        "_id": token(n, true), "operationType": kind, "clusterTime": at, "wallTime": bson::DateTime::from_millis(1_763_600_000_000),
        "collectionUUID": Binary { subtype: BinarySubtype::Uuid, bytes: UUID.0.to_vec() },
    };
    match kind {
        "insert" => event.append(
            bson::cstr!("fullDocument"),
            rawdoc! {
                "_id": id, "noise": noise, "name": "an item of the shop", "tags": ["a", "b", "c"], "stock": 12, "price": 9.5,
                "description": "an item that is sold in the shop, with a description of a hundred characters",
            },
        ),
        "update" => event.append(
            bson::cstr!("rawUpdateDescription"),
            rawdoc! {"$v": 2, "diff": {"u": {"note": &noise[..16], "price": 3.5, "stock": n as i32}}},
        ),
        _ => {}
    }
    event.append(bson::cstr!("ns"), rawdoc! {"db": "shop", "coll": "items"});
    event.append(bson::cstr!("documentKey"), rawdoc! {"_id": id});
    event
}

fn events(kind: &str) -> Vec<RawDocumentBuf> {
    let kind_of = |n: u32| match (kind, n % 5) {
        ("mixed", 0 | 1) => "insert",
        ("mixed", 2 | 3) => "update",
        ("mixed", _) => "delete",
        (kind, _) => kind,
    };
    (0..CHANGES).map(|n| event(kind_of(n), n)).collect()
}

fn bytes_of(events: &[RawDocumentBuf]) -> Throughput {
    Throughput::Bytes(events.iter().map(|event| event.as_bytes().len() as u64).sum())
}

fn reply(events: &[RawDocumentBuf]) -> Reply {
    let mut batch = RawArrayBuf::new();
    for event in events {
        batch.push(event.clone());
    }
    Reply::new(
        rawdoc! {"cursor": {"nextBatch": batch, "postBatchResumeToken": token(CHANGES, false), "id": 1_i64}, "ok": 1.0},
    )
}

fn chunker() -> Chunker {
    Chunker::new(Incarnation([1; 16]), Epoch(1), Position::ZERO, StreamHash::default())
}

fn batch(events: &[RawDocumentBuf]) -> Batch {
    let mut builder = BatchBuilder::new(Incarnation([1; 16]), Epoch(1), Position::ZERO, StreamHash::default());
    for (event, n) in events.iter().zip(0..) {
        builder.push(Position::new(time(n), 1), &[event.as_bytes()]);
    }
    builder.finish(Position::before(time(CHANGES)))
}

fn catalog() -> Entries {
    let entry = Entry {
        db: "shop".into(),
        coll: "items".into(),
        presence: Presence::Present(CollectionUuid([8; 16])),
        one_lane: false,
        collation: false,
        ddl_through: Position::ZERO,
    };
    Entries::from([(UUID, entry)])
}

fn items(events: &[RawDocumentBuf]) -> Vec<Item> {
    let item = |(event, n): (&RawDocumentBuf, u32)| {
        let id = raw::get(event, "documentKey").and_then(|key| raw::get(key.document()?, "_id")).expect("a key");
        Item {
            position: Position::new(time(n), 1),
            bytes: Bytes::copy_from_slice(event.as_bytes()),
            op: Op::of(event),
            collection: UUID,
            key: hash::key_identity(&id),
            doc_lane: hash::lane_of(UUID, &id),
        }
    };
    events.iter().zip(0..).map(item).collect()
}

fn parse(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("parse");
    for kind in KINDS {
        let events = events(kind);
        group.throughput(bytes_of(&events));
        group.bench_function(kind, |b| {
            b.iter(|| {
                for event in &events {
                    black_box(Change::parse(Position::ZERO, black_box(event)).expect("a change"));
                }
            });
        });
    }
    group.finish();
}

fn cut(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("cut");
    for kind in KINDS {
        let events = events(kind);
        let reply = reply(&events);
        group.throughput(bytes_of(&events));
        group.bench_function(kind, |b| b.iter(|| chunker().cut(black_box(&reply)).expect("batches")));
    }
    group.finish();
}

fn route(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("route");
    let catalog = catalog();
    for kind in KINDS {
        let events = events(kind);
        let changes = batch(&events).changes().expect("changes");
        group.throughput(bytes_of(&events));
        group.bench_function(kind, |b| {
            b.iter(|| {
                let mut units = Vec::new();
                Router::default().feed(black_box(&changes), Position::ZERO, &catalog, &mut units).expect("routed");
                units
            });
        });
    }
    group.finish();
}

fn lanes(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("lanes");
    let events = events("insert");
    let items = items(&events);
    group.throughput(bytes_of(&events));
    for workers in [1, 4] {
        let limits = Limits { changes: 1_000, bytes: 4 << 20, lanes: LaneId::COUNT.div_ceil(workers) };
        group.bench_function(BenchmarkId::new("push, take, done", workers), |b| {
            b.iter_batched(
                || (Lanes::new(vec![LaneState::default(); LaneId::COUNT], Position::ZERO), items.clone()),
                |(mut lanes, items)| {
                    for item in items {
                        lanes.push(item);
                    }
                    while let Some(job) = lanes.take(limits) {
                        lanes.done(job.id, Vec::new());
                    }
                    assert!(lanes.is_idle());
                    black_box(lanes.floor())
                },
                BatchSize::SmallInput,
            );
        });
    }
    group.finish();
}

fn planning(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("plan");
    let catalog = catalog();
    for kind in KINDS {
        let events = events(kind);
        let items = items(&events);
        group.throughput(bytes_of(&events));
        group.bench_function(kind, |b| {
            b.iter(|| plan(black_box(&items), &[], &catalog, &Floors::new()).expect("a plan"));
        });
    }
    group.finish();
}

criterion_group!(benches, parse, cut, route, lanes, planning);
criterion_main!(benches);
