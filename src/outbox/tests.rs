//! The writer, readers and their limits; what the disk must look like.

use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bson::{Binary, rawdoc, spec::BinarySubtype};
use bytes::Bytes;
use futures::FutureExt;
use tokio_util::task::TaskTracker;

use super::*;
use crate::model::{Batch, BatchBuilder, ClusterTime, Epoch, Incarnation, Position, SiteName, StreamHash, Term};

pub(super) fn incarnation() -> Incarnation {
    Incarnation([7; 16])
}

/// Change `n`'s position; ordinal 1 makes it the end of a batch as well.
pub(super) fn at(n: u64) -> Position {
    Position::new(ClusterTime(n), u32::from(n > 0))
}

/// Change `n` as a document of about `size` bytes that do not compress.
fn document(n: u64, size: usize) -> bson::RawDocumentBuf {
    let mut seed = n.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let bytes = std::iter::repeat_with(|| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed as u8
    });
    rawdoc! {"n": n as i64, "pad": Binary { subtype: BinarySubtype::Generic, bytes: bytes.take(size).collect() }}
}

/// Stream hash at change `n`.
pub(super) fn hash_at(n: u64, size: usize) -> StreamHash {
    (1..=n).fold(StreamHash::default(), |hash, n| hash.roll(at(n), document(n, size).as_bytes()))
}

/// The changes after `previous` up to `end`.
pub(super) fn batch_of(previous: u64, end: u64, size: usize) -> Batch {
    let mut builder = BatchBuilder::new(incarnation(), Epoch(1), at(previous), hash_at(previous, size));
    for n in previous + 1..=end {
        builder.push(at(n), &[document(n, size).as_bytes()]);
    }
    builder.finish(at(end))
}

/// One large change per batch, without hashing all before it again.
fn large(n: u64, hash: &mut StreamHash, size: usize) -> Batch {
    let mut builder = BatchBuilder::new(incarnation(), Epoch(1), at(n), *hash);
    builder.push(at(n + 1), &[document(n + 1, size).as_bytes()]);
    *hash = builder.hash();
    builder.finish(at(n + 1))
}

fn quota(limit_bytes: u64) -> Quota {
    Quota { limit_bytes, retention_bytes: 0, retention_time: Duration::ZERO }
}

fn inbox() -> LogId {
    LogId::Inbox(SiteName::try_from("north").expect("valid"))
}

async fn begin(log: &Log) {
    log.begin(incarnation(), Epoch(1), at(0), StreamHash::default(), None).await.expect("begin");
}

async fn memory(limit: u64) -> (MemStore, Arc<Logs>, Log) {
    let store = MemStore::new();
    let logs = Logs::start(Arc::new(store.clone()), quota(limit), &TaskTracker::new()).expect("start");
    let log = logs.log(&LogId::Outbox);
    begin(&log).await;
    (store, logs, log)
}

#[tokio::test]
async fn what_is_queued_shares_one_commit() {
    let (store, _logs, log) = memory(1 << 30).await;
    let before = store.commits();
    let mut waiting = Vec::new();
    for n in 0..20 {
        waiting.push(log.enqueue(batch_of(n, n + 1, 50), Some(Bytes::from_static(b"t"))).await.expect("room"));
    }
    assert_eq!(log.state().expect("begun").end, at(0), "nothing is durable before the commit");
    for commit in waiting {
        assert_eq!(commit.await.expect("durable").end, at(20));
    }
    assert_eq!(store.commits() - before, 1);
    assert_eq!(log.state().expect("begun").token.as_deref(), Some(&b"t"[..]));
}

#[tokio::test]
async fn a_bad_batch_is_refused_alone() {
    let (_store, _logs, log) = memory(1 << 30).await;
    let good = log.enqueue(batch_of(0, 2, 50), None).await.expect("room");
    let gap = log.enqueue(batch_of(3, 4, 50), None).await.expect("room");
    let stale = log.enqueue(batch_of(0, 2, 50), None).await.expect("room");
    let overlap = log.enqueue(batch_of(1, 3, 50), None).await.expect("room");
    good.await.expect("good");
    assert!(matches!(gap.await, Err(Error::Gap { .. })));
    assert!(matches!(stale.await, Err(Error::Overlap { .. })));
    assert_eq!(overlap.await.expect("sliced").end, at(3));
    let mut reader = log.reader(at(0));
    reader.next().await.expect("first");
    let sliced = reader.next().await.expect("second");
    assert_eq!((sliced.batch.header().previous, sliced.skip_through), (at(1), at(2)));
    let foreign =
        BatchBuilder::new(Incarnation([1; 16]), Epoch(1), at(3), StreamHash(0)).finish(Position::through(at(3).time));
    assert!(matches!(log.append(foreign, None).await, Err(Error::Incarnation { .. })));
    let forged = BatchBuilder::new(incarnation(), Epoch(1), at(3), StreamHash(1)).finish(Position::through(at(3).time));
    assert!(matches!(log.append(forged, None).await, Err(Error::Chain { .. })));
}

#[tokio::test]
async fn a_failed_write_ends_all_writing_but_not_reading() {
    let (store, logs, log) = memory(1 << 30).await;
    log.append(batch_of(0, 1, 50), None).await.expect("append");
    store.fail(0, Fault::BeforeWrite);
    let queued = [
        log.enqueue(batch_of(1, 2, 50), None).await.expect("room"),
        log.enqueue(batch_of(2, 3, 50), None).await.expect("room"),
    ];
    for commit in queued {
        let error = commit.await.expect_err("failed");
        assert!(matches!(&error, Error::Failed { reason } if reason.contains("injected")), "{error}");
    }
    assert!(log.append(batch_of(1, 2, 50), None).await.is_err());
    assert!(log.put_token(Position::ZERO, Bytes::new()).await.is_err());
    assert!(logs.failed().expect("failsafe").contains("injected fault"));
    assert_eq!(log.state().expect("begun").end, at(1));
    assert_eq!(log.reader(at(0)).next().await.expect("read").batch, batch_of(0, 1, 50));
    logs.close().await;
    let again = Logs::start(Arc::new(store.crash()), quota(1 << 30), &TaskTracker::new()).expect("restart");
    assert_eq!(again.agent_id(), logs.agent_id());
    again.log(&LogId::Outbox).append(batch_of(1, 2, 50), None).await.expect("append after the restart");
}

#[tokio::test]
async fn a_full_log_refuses_and_the_inbox_keeps_a_reserve() {
    let (_store, logs, log) = memory(100_000).await;
    let inbox = logs.log(&inbox());
    begin(&inbox).await;
    let mut hash = StreamHash::default();
    let mut n = 0;
    let error = loop {
        let batch = large(n, &mut hash, 5000);
        match log.append(batch, None).await {
            Ok(_) => n += 1,
            Err(error) => break error,
        }
    };
    assert!(matches!(error, Error::Full { .. }) && error.disposition() == Disposition::Wait, "{error}");
    assert_eq!((n, logs.usage().level), (17, Level::Warn));
    assert_eq!(log.state().expect("begun").end, at(17));
    inbox.append(large(0, &mut StreamHash::default(), 5000), None).await.expect("reserve");
    assert_eq!(logs.usage().level, Level::Full);
    log.put_token(log.state().expect("begun").end, Bytes::from_static(b"x")).await.expect("tokens go on");
    log.release(Incarnation([1; 16]), at(17));
    assert!(
        matches!(log.append(large(17, &mut hash_of(&log), 5000), None).await, Err(Error::Full { .. })),
        "a release of another history"
    );
    log.release(incarnation(), at(10));
    log.append(large(17, &mut hash_of(&log), 5000), None).await.expect("room after the release");
    let first = log.state().expect("begun").first;
    assert_eq!(first, at(10), "only what is released goes");
    assert_eq!(log.reader(at(3)).next().await.map(|stored| stored.skip_through), Ok(at(3)), "the ring still has it");
}

#[tokio::test]
async fn what_was_released_before_a_new_beginning_is_needed_again() {
    let (_store, _logs, log) = memory(100_000).await;
    log.release(incarnation(), at(1_000));
    begin(&log).await;
    let (mut hash, mut n) = (StreamHash::default(), 0);
    while log.append(large(n, &mut hash, 5000), None).await.is_ok() {
        n += 1;
        assert!(n < 1_000, "what nobody has applied was dropped");
    }
    assert_eq!((n, log.state().expect("begun").first), (17, at(0)));
}

fn hash_of(log: &Log) -> StreamHash {
    log.state().expect("begun").hash
}

#[tokio::test]
async fn readers_follow_and_end_with_their_generation() {
    let store = MemStore::new();
    let logs = Logs::start_with_ring(Arc::new(store.clone()), quota(1 << 30), &TaskTracker::new(), 0).expect("start");
    let log = logs.log(&inbox());
    let mut early = log.reader(at(0));
    assert!(early.next().now_or_never().is_none(), "waits for the log to begin");
    begin(&log).await;
    log.append(batch_of(0, 1, 50), None).await.expect("append");
    assert_eq!(early.next().await.expect("first").batch.header().end, at(1));
    assert!(early.next().now_or_never().is_none(), "waits at the end");
    log.append(batch_of(1, 3, 50), None).await.expect("append");
    assert_eq!(early.next().await.expect("second").batch.header().end, at(3));
    let mut inside = log.reader(at(2));
    assert_eq!(inside.next().await.expect("inside").skip_through, at(2));
    log.put_term(Term(5)).await.expect("term");
    begin(&log).await;
    assert_eq!(early.next().await, Err(Error::Restarted { log: inbox() }));
    assert_eq!(log.state().expect("begun").term, Term(5), "the term survives");
    logs.close().await;
    assert_eq!(log.reader(at(0)).next().await, Err(Error::Closed));
    assert_eq!(log.append(batch_of(0, 1, 50), None).await, Err(Error::Closed));
}

#[tokio::test]
async fn salvage_names_where_to_rewind_to() {
    let store = MemStore::new();
    let logs = Logs::start_with_ring(Arc::new(store.clone()), quota(1 << 30), &TaskTracker::new(), 0).expect("start");
    let log = logs.log(&LogId::Outbox);
    begin(&log).await;
    for n in 0..5 {
        log.append(batch_of(n, n + 1, 50), None).await.expect("append");
    }
    assert_eq!(log.salvage(Position::ZERO).await, Ok(Some((at(5), hash_at(5, 50)))));
    store.corrupt(&LogId::Outbox, at(4));
    let mut reader = log.reader(at(2));
    reader.next().await.expect("good");
    assert!(matches!(reader.next().await, Err(Error::Corrupt { position, .. }) if position == at(3)));
    let (to, hash) = log.salvage(Position::ZERO).await.expect("salvage").expect("some");
    assert_eq!((to, hash), (at(3), hash_at(3, 50)));
    assert!(matches!(log.rewind(Position::through(at(1).time), hash, None).await, Err(Error::Rewind { .. })));
    log.rewind(to, hash, None).await.expect("rewind");
    assert_eq!(reader.next().await, Err(Error::Restarted { log: LogId::Outbox }));
    log.append(batch_of(3, 6, 50), None).await.expect("recaptured");
    assert_eq!(log.salvage(Position::ZERO).await, Ok(Some((at(6), hash_at(6, 50)))));
    store.corrupt(&LogId::Outbox, at(1));
    assert_eq!(log.salvage(Position::ZERO).await, Ok(None));
}

fn rocks(dir: &std::path::Path) -> RocksStore {
    RocksStore::open(dir, &RocksOptions::default()).expect("open")
}

fn disk_bytes(dir: &std::path::Path) -> u64 {
    let entries = std::fs::read_dir(dir).expect("list");
    entries.map(|entry| entry.and_then(|entry| entry.metadata()).map_or(0, |metadata| metadata.len())).sum()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reading_while_appending_gives_every_record_once() {
    for ring in [0, 20_000, 16 << 20] {
        let dir = tempfile::tempdir().expect("tempdir");
        let tasks = TaskTracker::new();
        let logs = Logs::start_with_ring(Arc::new(rocks(dir.path())), quota(1 << 30), &tasks, ring).expect("start");
        let log = logs.log(&LogId::Outbox);
        begin(&log).await;
        let mut reader = log.reader(at(0));
        let read = tasks.spawn(async move {
            for n in 0..300 {
                let stored = reader.next().await.expect("read");
                assert_eq!((stored.skip_through, stored.batch.header().end), (at(n), at(n + 1)));
            }
        });
        let (mut hash, mut waiting) = (StreamHash::default(), Vec::new());
        for n in 0..300 {
            waiting.push(log.enqueue(large(n, &mut hash, 2000), None).await.expect("room"));
        }
        for commit in waiting {
            commit.await.expect("durable");
        }
        read.await.expect("reader");
        logs.close().await;
        let again =
            Logs::start(Arc::new(rocks(dir.path())), quota(1 << 30), &tasks).expect("the lock is free after close");
        assert_eq!((again.log(&LogId::Outbox).state().expect("begun").hash, again.agent_id()), (hash, logs.agent_id()));
        again.close().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn released_records_give_their_disk_space_back() {
    const MIB: u64 = 1 << 20;
    let dir = tempfile::tempdir().expect("tempdir");
    let store = Arc::new(rocks(dir.path()));
    let logs = Logs::start(Arc::clone(&store) as Arc<dyn Store>, quota(1 << 30), &TaskTracker::new()).expect("start");
    let log = logs.log(&LogId::Outbox);
    begin(&log).await;
    let (mut hash, mut waiting) = (StreamHash::default(), Vec::new());
    for n in 0..160 {
        waiting.push(log.enqueue(large(n, &mut hash, 1 << 20), None).await.expect("room"));
    }
    for commit in waiting {
        commit.await.expect("durable");
    }
    store.flush(&LogId::Outbox);
    wait_for("files to move down", || store.files(&LogId::Outbox).iter().filter(|(level, _)| *level == 0).count() < 2)
        .await;
    assert!(disk_bytes(dir.path()) > 150 * MIB);
    assert!(store.files(&LogId::Outbox).iter().all(|(_, size)| *size < 32 * MIB), "{:?}", store.files(&LogId::Outbox));
    assert_eq!(store.write_amplification(&LogId::Outbox), "1.0", "files are moved, never written again");
    log.release(incarnation(), at(150));
    wait_for("trim", || log.state().is_some_and(|state| state.first > at(100))).await;
    assert!(disk_bytes(dir.path()) < 70 * MIB, "files go before the state is published");
    let state = log.state().expect("begun");
    assert!(state.first > at(100) && state.first <= at(150), "{state:?}");
    assert!(state.bytes < 60 * MIB);
    let first = log.reader(state.first).next().await.expect("the rest is there");
    assert_eq!(first.batch.header().previous, state.first);
    assert!(matches!(store.read(&LogId::Outbox, at(3), 1), Err(Error::Trimmed { .. })));
    logs.close().await;
    let store = rocks(dir.path());
    assert_eq!(store.state(&LogId::Outbox).expect("state"), Some(state));
}

async fn wait_for(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < deadline, "no {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn refusal(dir: &std::path::Path, key: Option<[u8; 32]>) -> Error {
    let options = RocksOptions { key: key.map(EncryptionKey::new), ..RocksOptions::default() };
    RocksStore::open(dir, &options).map(|_| ()).expect_err("refused")
}

#[test]
fn a_directory_is_opened_once_and_closed_to_others() {
    let dir = tempfile::tempdir().expect("tempdir");
    let store = rocks(&dir.path().join("data"));
    let error = refusal(&dir.path().join("data"), None);
    assert!(matches!(error, Error::Locked { .. }) && error.to_string().contains("another process"), "{error}");
    let mode = |path: &std::path::Path| std::fs::metadata(path).expect("metadata").permissions().mode() & 0o777;
    assert_eq!(mode(&dir.path().join("data")), 0o700);
    for entry in std::fs::read_dir(dir.path().join("data")).expect("list") {
        let path = entry.expect("entry").path();
        assert_eq!(mode(&path), 0o600, "{}", path.display());
    }
    store.close();
    assert_eq!(store.put_meta("a", Bytes::new()), Err(Error::Closed));
    rocks(&dir.path().join("data"));
}

#[test]
fn the_key_must_fit_and_nothing_is_stored_in_plain() {
    let dir = tempfile::tempdir().expect("tempdir");
    let options = RocksOptions { key: Some(EncryptionKey::new([1; 32])), ..RocksOptions::default() };
    let store = RocksStore::open(dir.path(), &options).expect("open");
    store.put_meta("name", Bytes::from_static(b"plain text secret")).expect("put");
    store.close();
    assert!(matches!(refusal(dir.path(), None), Error::KeyMissing { .. }));
    let error = refusal(dir.path(), Some([2; 32]));
    assert!(matches!(error, Error::KeyWrong { .. }) && error.to_string().contains("right key file"), "{error}");
    let store = RocksStore::open(dir.path(), &options).expect("open");
    assert_eq!(store.meta("name").expect("meta").as_deref(), Some(&b"plain text secret"[..]));
    for entry in std::fs::read_dir(dir.path()).expect("list") {
        let bytes = std::fs::read(entry.expect("entry").path()).expect("read");
        assert!(!bytes.windows(10).any(|w| w == b"plain text"));
    }
}

#[test]
fn a_store_of_a_newer_version_is_refused_with_a_hint() {
    let dir = tempfile::tempdir().expect("tempdir");
    let store = rocks(dir.path());
    store.set_format(2);
    store.close();
    let error = refusal(dir.path(), None);
    assert!(
        matches!(error, Error::Newer { found: 2, supported: 1 })
            && error.to_string().contains("upgrade this agent first"),
        "{error}"
    );
}
