//! Appending to the outbox (group commit, fsync) and the record codec, in bytes per second.

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bson::rawdoc;
use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use farshore::model::{Batch, BatchBuilder, ClusterTime, Epoch, Incarnation, Position, StreamHash};
use farshore::outbox::{EncryptionKey, LogId, Logs, Quota, RocksOptions, RocksStore};
use tokio_util::task::TaskTracker;

const CHANGES: u64 = 128;

fn incarnation() -> Incarnation {
    Incarnation([1; 16])
}

/// One change of about 500 bytes, half of it hard to compress.
fn change(n: u64) -> bson::RawDocumentBuf {
    let noise: String = (0..16).map(|i| format!("{:016x}", (n * 16 + i).wrapping_mul(0x9e37_79b9_7f4a_7c15))).collect();
    rawdoc! {
        "operationType": "insert", "ns": {"db": "shop", "coll": "items"}, "documentKey": {"_id": n as i64},
        "fullDocument": {"_id": n as i64, "noise": noise, "name": "an item of the shop", "tags": ["a", "b", "c"], "stock": 12, "price": 9.5},
    }
}

fn changes() -> Vec<bson::RawDocumentBuf> {
    (0..CHANGES).map(change).collect()
}

fn batch(previous: u64, hash: &mut StreamHash, changes: &[bson::RawDocumentBuf]) -> Batch {
    let mut builder = BatchBuilder::new(incarnation(), Epoch(1), Position::before(ClusterTime(previous)), *hash);
    for (i, change) in changes.iter().enumerate() {
        builder.push(Position::new(ClusterTime(previous), i as u32 + 1), &[change.as_bytes()]);
    }
    *hash = builder.hash();
    builder.finish(Position::before(ClusterTime(previous + 1)))
}

fn codec(criterion: &mut Criterion) {
    let changes = changes();
    let encoded = batch(1, &mut StreamHash::default(), &changes);
    let mut group = criterion.benchmark_group("record");
    group.throughput(Throughput::Bytes(u64::from(encoded.header().raw_len)));
    group.bench_function("encode", |b| b.iter(|| batch(1, &mut StreamHash::default(), black_box(&changes))));
    group.throughput(Throughput::Bytes(encoded.record().len() as u64));
    group.bench_function("decode", |b| {
        b.iter_batched(
            || encoded.record().clone(),
            |record| Batch::decode(record).expect("decode"),
            BatchSize::SmallInput,
        );
    });
    group.throughput(Throughput::Bytes(u64::from(encoded.header().raw_len)));
    group.bench_function("changes", |b| b.iter(|| black_box(&encoded).changes().expect("changes").entries().count()));
    group.finish();
}

fn append(criterion: &mut Criterion) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("runtime");
    let changes = changes();
    let raw = u64::from(batch(1, &mut StreamHash::default(), &changes).header().raw_len);
    let mut group = criterion.benchmark_group("append");
    group.sample_size(10).measurement_time(Duration::from_secs(3));
    for (name, key) in [("plain", None), ("sealed", Some(EncryptionKey::new([5; 32])))] {
        for size in [1u64, 16] {
            group.throughput(Throughput::Bytes(raw * size));
            group.bench_function(BenchmarkId::new(name, size), |b| {
                b.iter_custom(|rounds| runtime.block_on(rounds_of(rounds, size, &changes, key.clone())));
            });
        }
    }
    group.finish();
}

async fn rounds_of(rounds: u64, size: u64, changes: &[bson::RawDocumentBuf], key: Option<EncryptionKey>) -> Duration {
    let dir = tempfile::tempdir().expect("tempdir");
    let store = RocksStore::open(dir.path(), &RocksOptions { key, ..RocksOptions::default() }).expect("open");
    let quota = Quota { limit_bytes: 64 << 20, retention_bytes: 0, retention_time: Duration::ZERO };
    let logs = Logs::start(Arc::new(store), quota, &TaskTracker::new()).expect("start");
    let log = logs.log(&LogId::Outbox);
    let mut hash = StreamHash::default();
    log.begin(incarnation(), Epoch(1), Position::before(ClusterTime(1)), hash, None).await.expect("begin");
    let (mut next, mut took) = (1, Duration::ZERO);
    for _ in 0..rounds {
        let batches: Vec<_> = (next..next + size).map(|n| batch(n, &mut hash, changes)).collect();
        next += size;
        let start = Instant::now();
        let mut waiting = Vec::with_capacity(batches.len());
        for batch in batches {
            waiting.push(log.enqueue(batch, None).await.expect("room"));
        }
        for commit in waiting {
            commit.await.expect("durable");
        }
        took += start.elapsed();
        log.release(incarnation(), Position::before(ClusterTime(next)));
    }
    logs.close().await;
    took
}

criterion_group!(benches, codec, append);
criterion_main!(benches);
