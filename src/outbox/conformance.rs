//! One suite for every store: random writes, reads and crashes beside a simple model; then what only a disk can suffer.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use proptest::prelude::*;
use proptest::sample::Index;
use tempfile::TempDir;

use super::ledger::size_of;
use super::tests::{at, batch_of, hash_at, incarnation};
use super::{EncryptionKey, Error, Fault, LogId, MemStore, RocksOptions, RocksStore, Store, Write};
use crate::model::{Batch, Epoch, Position, SiteName, StreamHash, Term};

/// Size of one change in these tests.
const SIZE: usize = 20;

fn logs() -> [LogId; 2] {
    [LogId::Outbox, LogId::Inbox(SiteName::try_from("north").expect("valid"))]
}

#[derive(Clone, Debug)]
enum Op {
    Begin {
        at: u64,
    },
    /// Starts `back` before the end (or past it), ends `forward` past the end.
    Append {
        back: i64,
        forward: u64,
        token: Option<u8>,
    },
    Token(u8),
    Term(u64),
    Trim(Index),
    Rewind(Index),
}

fn ops() -> impl Strategy<Value = (usize, Op)> {
    let op = prop_oneof![
        1 => (0u64..20).prop_map(|at| Op::Begin { at }),
        12 => (-1i64..4, 0u64..4, proptest::option::of(any::<u8>()))
            .prop_map(|(back, forward, token)| Op::Append { back, forward, token }),
        2 => any::<u8>().prop_map(Op::Token),
        1 => (0u64..5).prop_map(Op::Term),
        3 => any::<Index>().prop_map(Op::Trim),
        1 => any::<Index>().prop_map(Op::Rewind),
    ];
    (0usize..2, op)
}

/// Groups of operations, each one commit; now and then the process dies.
fn histories() -> impl Strategy<Value = Vec<(Vec<(usize, Op)>, bool)>> {
    let group = (proptest::collection::vec(ops(), 1..5), proptest::bool::weighted(0.15));
    proptest::collection::vec(group, 1..14)
}

#[derive(Clone, Debug)]
struct ModelRecord {
    end: u64,
    skip: u64,
    batch: Batch,
}

#[derive(Clone, Debug)]
struct ModelLog {
    first: u64,
    end: u64,
    token: Option<Bytes>,
    term: Term,
    records: Vec<ModelRecord>,
}

/// What a store must hold; written without a thought for speed or disks.
#[derive(Clone, Debug, Default)]
struct Model(BTreeMap<LogId, ModelLog>);

impl Model {
    /// Turns an operation into a write and applies it; `Err` when it must be refused.
    fn apply(&mut self, log: &LogId, op: &Op) -> (Write, Result<(), ()>) {
        let entry = self.0.get_mut(log);
        let end = entry.as_ref().map_or(0, |log| log.end);
        let id = log.clone();
        match op {
            Op::Begin { at: n } => {
                let term = entry.map_or(Term(0), |log| log.term);
                self.0.insert(id.clone(), ModelLog { first: *n, end: *n, token: None, term, records: Vec::new() });
                let write = Write::Begin {
                    log: id,
                    incarnation: incarnation(),
                    epoch: Epoch(1),
                    at: at(*n),
                    hash: hash_at(*n, SIZE),
                    token: None,
                };
                (write, Ok(()))
            }
            Op::Append { back, forward, token } => {
                let previous = end.saturating_add_signed(-back);
                let last = end + forward;
                let (previous, last) = if last <= previous { (previous, previous + 1) } else { (previous, last) };
                let token = token.map(|b| Bytes::from(vec![b; 3]));
                let batch = batch_of(previous, last, SIZE);
                let write = Write::Append { log: id, batch: batch.clone(), token: token.clone() };
                let Some(log) = entry.filter(|log| previous <= log.end && last > log.end) else {
                    return (write, Err(()));
                };
                log.records.push(ModelRecord { end: last, skip: log.end, batch });
                log.end = last;
                log.token = token.or(log.token.take());
                (write, Ok(()))
            }
            Op::Token(b) => {
                let token = Bytes::from(vec![*b; 5]);
                // Now and then it is the token of another end.
                let end = end + u64::from(b % 8 == 0);
                let result = entry.filter(|log| log.end == end).ok_or(()).map(|log| log.token = Some(token.clone()));
                (Write::Token { log: id, end: at(end), token }, result)
            }
            Op::Term(n) => {
                let result = entry.ok_or(()).map(|log| log.term = log.term.max(Term(*n)));
                (Write::Term { log: id, term: Term(*n) }, result)
            }
            Op::Trim(index) => {
                let through = index.index(end as usize + 2) as u64;
                let result = entry.ok_or(()).map(|log| log.trim(through));
                (Write::Trim { log: id, through: at(through) }, result)
            }
            Op::Rewind(index) => {
                let to =
                    entry.as_ref().map_or(0, |log| log.first + index.index((log.end - log.first + 1) as usize) as u64);
                let write = Write::Rewind { log: id, to: at(to), hash: hash_at(to, SIZE), token: None };
                let border =
                    |log: &&mut ModelLog| to < log.end && (to == log.first || log.records.iter().any(|r| r.end == to));
                let Some(log) = entry.filter(border) else { return (write, Err(())) };
                log.records.retain(|record| record.end <= to);
                (log.end, log.token) = (to, None);
                (write, Ok(()))
            }
        }
    }

    /// The writes of one commit, and whether it must be refused (then the model is unchanged).
    fn commit(&mut self, group: &[(usize, Op)]) -> (Vec<Write>, bool) {
        let before = self.clone();
        let results: Vec<_> = group.iter().map(|(log, op)| self.apply(&logs()[*log], op)).collect();
        let refused = results.iter().any(|(_, result)| result.is_err());
        if refused {
            *self = before;
        }
        (results.into_iter().map(|(write, _)| write).collect(), refused)
    }

    fn check(&self, store: &dyn Store) {
        assert_eq!(store.logs().expect("logs"), self.0.keys().cloned().collect::<Vec<_>>());
        for id in logs() {
            let Some(log) = self.0.get(&id) else {
                assert_eq!(store.state(&id).expect("state"), None);
                continue;
            };
            log.check(&id, store);
        }
    }
}

impl ModelLog {
    fn trim(&mut self, through: u64) {
        self.records.retain(|record| record.end > through);
        self.first = self.records.first().map_or(self.end, |record| record.skip);
    }

    fn check(&self, id: &LogId, store: &dyn Store) {
        let state = store.state(id).expect("state").expect("begun");
        assert_eq!((state.first, state.end, state.hash), (at(self.first), at(self.end), hash_at(self.end, SIZE)));
        assert_eq!((&state.token, state.term, state.incarnation), (&self.token, self.term, incarnation()));
        let bytes: u64 = self.records.iter().map(|record| size_of(&record.batch)).sum();
        assert_eq!((state.bytes, state.batches), (bytes, self.records.len() as u64));
        for after in 0..self.end + 2 {
            let read = store.read(id, at(after), usize::MAX);
            if after < self.first {
                assert_eq!(read, Err(Error::Trimmed { log: id.clone(), first: at(self.first) }));
                continue;
            }
            let expected: Vec<_> = self.records.iter().filter(|record| record.end > after).collect();
            let read = read.expect("read");
            assert_eq!(read.len(), expected.len(), "after {after}");
            let mut skip = at(after);
            for (stored, expected) in read.iter().zip(&expected) {
                assert_eq!((&stored.batch, stored.skip_through), (&expected.batch, skip));
                skip = at(expected.end);
            }
            let one = store.read(id, at(after), 1).expect("read");
            assert_eq!(one.first(), read.first());
            assert!(one.len() <= 1);
        }
        for mark in store.marks(id).expect("marks") {
            assert!(mark.end > state.first && mark.end <= state.end && mark.appended <= state.appended);
        }
    }
}

/// A store that can die.
trait Subject {
    fn store(&self) -> &dyn Store;
    fn crash(&mut self);
}

impl Subject for MemStore {
    fn store(&self) -> &dyn Store {
        self
    }

    fn crash(&mut self) {
        let stale = self.clone();
        *self = MemStore::crash(self);
        assert_eq!(stale.commit(&[]), Err(Error::Closed));
    }
}

/// A RocksDB store in a directory of its own; dying means going on with a copy of the files as they are.
struct Disk {
    store: Option<RocksStore>,
    dir: TempDir,
    options: RocksOptions,
}

impl Disk {
    fn new(key: Option<EncryptionKey>) -> Self {
        let dir = tempfile::tempdir().expect("tempdir");
        let options = RocksOptions { key, ..RocksOptions::default() };
        Self { store: Some(RocksStore::open(dir.path(), &options).expect("open")), dir, options }
    }

    fn rocks(&self) -> &RocksStore {
        self.store.as_ref().expect("open")
    }
}

impl Subject for Disk {
    fn store(&self) -> &dyn Store {
        self.rocks()
    }

    fn crash(&mut self) {
        let copy = copy_of(self.dir.path());
        self.store = None;
        self.store = Some(RocksStore::open(copy.path(), &self.options).expect("reopen"));
        self.dir = copy;
    }
}

fn copy_of(dir: &Path) -> TempDir {
    let copy = tempfile::tempdir().expect("tempdir");
    for entry in fs::read_dir(dir).expect("list") {
        let entry = entry.expect("entry");
        fs::copy(entry.path(), copy.path().join(entry.file_name())).expect("copy");
    }
    copy
}

fn run(subject: &mut dyn Subject, history: &[(Vec<(usize, Op)>, bool)]) {
    let mut model = Model::default();
    for (group, crash) in history {
        let (writes, refused) = model.commit(group);
        assert_eq!(subject.store().commit(&writes).is_err(), refused, "{writes:?}");
        if *crash {
            subject.crash();
        }
        model.check(subject.store());
    }
    subject.crash();
    model.check(subject.store());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn memory_follows_the_model(history in histories()) {
        run(&mut MemStore::new(), &history);
    }

    /// A commit that fails is on disk as a whole or not at all, and the log goes on after a restart.
    #[test]
    fn memory_survives_a_failure_at_every_write(history in histories(), at in any::<Index>(), after in any::<bool>()) {
        let mut store = MemStore::new();
        let (mut model, mut written, fail_at) = (Model::default(), 0, at.index(history.len()));
        store.fail(fail_at, if after { Fault::AfterWrite } else { Fault::BeforeWrite });
        for (group, _) in &history {
            let mut next = model.clone();
            let (writes, refused) = next.commit(group);
            let fails = !refused && written == fail_at;
            prop_assert_eq!(store.commit(&writes).is_err(), refused || fails);
            written += usize::from(!refused);
            if !fails || after {
                model = next;
            }
            if fails {
                store = store.crash();
            }
            model.check(&store);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn rocks_follows_the_model(history in histories(), sealed in any::<bool>()) {
        run(&mut Disk::new(sealed.then(|| EncryptionKey::new([3; 32]))), &history);
    }

    /// Power loss: the write-ahead log ends anywhere. Every synced commit is there, a torn one is absent as a whole.
    #[test]
    fn rocks_survives_a_torn_log_at_every_boundary(history in histories()) {
        let disk = Disk::new(None);
        let mut model = Model::default();
        let mut boundaries = vec![(wal(disk.dir.path()), model.clone())];
        for (group, _) in &history {
            let (writes, refused) = model.commit(group);
            prop_assert_eq!(disk.rocks().commit(&writes).is_err(), refused);
            if !refused {
                boundaries.push((wal(disk.dir.path()), model.clone()));
            }
        }
        for pair in boundaries.windows(2) {
            let ((_, from), before) = &pair[0];
            let ((file, to), after) = &pair[1];
            for (cut, expected) in [(*from + 1, before), ((from + to) / 2, before), (to - 1, before), (*to, after)] {
                let copy = copy_of(disk.dir.path());
                let wal = copy.path().join(file.file_name().expect("name"));
                OpenOptions::new().write(true).open(wal).expect("open").set_len(cut).expect("cut");
                let store = RocksStore::open(copy.path(), &RocksOptions::default()).expect("open");
                expected.check(&store);
            }
        }
    }
}

/// The newest write-ahead log and its length.
fn wal(dir: &Path) -> (PathBuf, u64) {
    let newest = files(dir, "log").pop().expect("a log");
    let length = fs::metadata(&newest).expect("metadata").len();
    (newest, length)
}

fn files(dir: &Path, extension: &str) -> Vec<PathBuf> {
    let paths = fs::read_dir(dir).expect("list").map(|entry| entry.expect("entry").path());
    let mut paths: Vec<_> = paths.filter(|path| path.extension().is_some_and(|e| e == extension)).collect();
    paths.sort();
    paths
}

fn flip(path: &Path, at: usize) {
    let mut bytes = fs::read(path).expect("read");
    bytes[at] ^= 0x10;
    fs::write(path, bytes).expect("write");
}

/// Ten records in the outbox, one commit each.
fn ten(store: &dyn Store) -> Vec<Batch> {
    let begin = Write::Begin {
        log: LogId::Outbox,
        incarnation: incarnation(),
        epoch: Epoch(1),
        at: at(0),
        hash: StreamHash::default(),
        token: None,
    };
    store.commit(&[begin]).expect("begin");
    let batches: Vec<_> = (0..10).map(|n| batch_of(n, n + 1, 100)).collect();
    for batch in &batches {
        store
            .commit(&[Write::Append {
                log: LogId::Outbox,
                batch: batch.clone(),
                token: Some(Bytes::from_static(b"token")),
            }])
            .expect("append");
    }
    batches
}

/// Reads to the end or to the first error.
fn read_all(store: &dyn Store) -> (Vec<Batch>, Option<Error>) {
    let (mut batches, mut after) = (Vec::new(), at(0));
    let end = store.state(&LogId::Outbox).expect("state").map_or(Position::ZERO, |state| state.end);
    while after < end {
        match store.read(&LogId::Outbox, after, 1) {
            Ok(read) => {
                after = read[0].batch.header().end;
                batches.push(read[0].batch.clone());
            }
            Err(error) => return (batches, Some(error)),
        }
    }
    (batches, None)
}

#[test]
fn a_flipped_byte_in_a_table_is_found_and_never_returned() {
    let mut disk = Disk::new(None);
    let batches = ten(disk.store());
    disk.rocks().flush(&LogId::Outbox);
    disk.store = None;
    let mut found = 0;
    for path in files(disk.dir.path(), "sst") {
        let length = fs::metadata(&path).expect("metadata").len() as usize;
        for at in (0..length).step_by(length / 30 + 1) {
            let copy = copy_of(disk.dir.path());
            flip(&copy.path().join(path.file_name().expect("name")), at);
            let Ok(store) = RocksStore::open(copy.path(), &disk.options) else {
                found += 1;
                continue;
            };
            let (read, error) = read_all(&store);
            assert_eq!(read, batches[..read.len()]);
            if let Some(error) = error {
                let expected = super::tests::at(read.len() as u64);
                assert!(matches!(&error, Error::Corrupt { position, .. } if *position == expected), "{error}");
                found += 1;
            } else {
                assert_eq!(read.len(), batches.len(), "a record vanished");
            }
        }
    }
    assert!(found > 10, "only {found} flips were found");
}

#[test]
fn a_flipped_byte_in_the_write_ahead_log_never_comes_back_as_data() {
    let mut disk = Disk::new(None);
    let batches = ten(disk.store());
    let (path, length) = wal(disk.dir.path());
    disk.store = None;
    let mut shorter = 0;
    for at in (0..length as usize).step_by(length as usize / 40 + 1) {
        let copy = copy_of(disk.dir.path());
        flip(&copy.path().join(path.file_name().expect("name")), at);
        let Ok(store) = RocksStore::open(copy.path(), &disk.options) else { continue };
        let (read, error) = read_all(&store);
        assert_eq!((&read[..], error), (&batches[..read.len()], None), "state and records go together");
        shorter += usize::from(read.len() < batches.len());
    }
    assert!(shorter > 20, "{shorter}");
}

#[test]
fn a_damaged_record_is_named_and_can_be_cut_off() {
    let store = MemStore::new();
    let batches = ten(&store);
    assert!(store.corrupt(&LogId::Outbox, at(7)));
    let (read, error) = read_all(&store);
    assert_eq!(read.len(), 6);
    assert!(matches!(&error, Some(Error::Corrupt { position, .. }) if *position == at(6)), "{error:?}");
    let rewind = |to: u64| Write::Rewind { log: LogId::Outbox, to: at(to), hash: hash_at(to, 100), token: None };
    store.commit(&[rewind(6)]).expect("rewind");
    let again = batch_of(6, 12, 100);
    store.commit(&[Write::Append { log: LogId::Outbox, batch: again.clone(), token: None }]).expect("append");
    let (read, error) = read_all(&store);
    assert_eq!((read, error), (batches[..6].iter().cloned().chain([again]).collect(), None));
}
