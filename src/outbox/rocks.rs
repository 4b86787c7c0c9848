//! The store on RocksDB; only this file and its options import it. Layout and reasons: the module texts of [`super`]
//! and
//! [`super::keys`].

mod options;

use std::collections::BTreeMap;
use std::fs::{self, File, Permissions, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, RwLock, RwLockReadGuard};

use bytes::Bytes;
use rocksdb::{
    Cache, ColumnFamilyDescriptor, DBRawIteratorWithThreadMode, DBWithThreadMode, ErrorKind, MultiThreaded, Options,
    ReadOptions, WriteBatch, WriteOptions,
};

use options::FILE_BYTES;
pub use options::RocksOptions;

use super::envelope::{EncryptionKey, EnvelopeError, Sealer, hex};
use super::keys::{self, Key};
use super::ledger::{self, Entry, Item, Ledger, Lookup, Plan, Unreadable};
use super::{Error, LogId, LogState, Mark, Store, Stored, Write};
use crate::model::Position;

/// Newest store format this version reads, and the one it writes.
const FORMAT: u32 = 1;
/// Room for the states in a write.
const STATES_BYTES: usize = 16 << 10;
/// Its holder is the one process that may open the directory.
const LOCK: &str = "farshore.lock";
/// Column family of states and meta.
const STATE: &str = "state";
type Db = DBWithThreadMode<MultiThreaded>;

/// Logs in a RocksDB directory.
pub struct RocksStore {
    /// `None` once closed.
    db: RwLock<Option<Db>>,
    /// Held as long as the database is open; declared after it, so released after it.
    lock: Mutex<Option<File>>,
    ledgers: RwLock<BTreeMap<LogId, Ledger>>,
    writing: Mutex<()>,
    sealer: Sealer,
    dir: PathBuf,
    records: Options,
    /// Bytes written since file modes were last set.
    unswept: AtomicU64,
}

impl RocksStore {
    /// Opens the directory, or makes it.
    ///
    /// # Errors
    /// Another process has it open, a newer version wrote it, the key does not fit, or it is damaged.
    pub fn open(dir: &Path, options: &RocksOptions) -> Result<Self, Error> {
        let context = |error: io::Error| Error::Io {
            context: format!("prepare directory {}", dir.display()),
            reason: error.to_string(),
        };
        fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(context)?;
        fs::set_permissions(dir, Permissions::from_mode(0o700)).map_err(context)?;
        let lock = lock(dir)?;
        let cache = Cache::new_lru_cache(options.memory / 6);
        let records = options.records(&cache);
        let database = options.database();
        let mut families = vec![STATE.to_owned()];
        if dir.join("CURRENT").exists() {
            families = Db::list_cf(&database, dir).map_err(|error| opening(dir, &error))?;
        }
        families.retain(|name| name != "default" && name != STATE);
        let descriptors = families.into_iter().map(|name| ColumnFamilyDescriptor::new(name, records.clone())).chain([
            ColumnFamilyDescriptor::new("default", options.state(&cache)),
            ColumnFamilyDescriptor::new(STATE, options.state(&cache)),
        ]);
        let db = Db::open_cf_descriptors(&database, dir, descriptors).map_err(|error| opening(dir, &error))?;
        check_format(&db)?;
        check_key(&db, options.key.as_ref())?;
        let sealer = Sealer::new(options.key.as_ref());
        let ledgers = load(&db, &sealer)?;
        let store = Self {
            db: RwLock::new(Some(db)),
            lock: Mutex::new(Some(lock)),
            ledgers: RwLock::new(ledgers),
            writing: Mutex::new(()),
            sealer,
            dir: dir.to_owned(),
            records,
            unswept: AtomicU64::new(0),
        };
        store.sweep_modes().map_err(context)?;
        Ok(store)
    }

    fn db(&self) -> RwLockReadGuard<'_, Option<Db>> {
        self.db.read().expect("no holder panics")
    }

    fn ledgers(&self) -> RwLockReadGuard<'_, BTreeMap<LogId, Ledger>> {
        self.ledgers.read().expect("no holder panics")
    }

    fn write(&self, db: &Db, plan: &Plan<'_>) -> Result<(), Error> {
        // At its size from the start: growing by doubling would hold three times the records for a moment.
        let size: u64 = plan.records.iter().map(|new| ledger::size_of(new.batch)).sum();
        let mut batch = WriteBatch::with_capacity_bytes(usize::try_from(size).unwrap_or(0) + STATES_BYTES);
        for new in &plan.records {
            let family = keys::family(new.log);
            if db.cf_handle(&family).is_none() {
                db.create_cf(&family, &self.records).map_err(|error| failed("create a log", &error))?;
            }
            let cf = db.cf_handle(&family).expect("just made");
            let key = Key::Record { log: new.log.clone(), generation: new.generation, end: new.batch.header().end }
                .to_bytes();
            let value = self.sealer.seal(&key, &[&new.place.to_bytes(), new.batch.record()]);
            batch.put_cf(&cf, key, value);
        }
        let state = state_family(db)?;
        for (log, ledger) in &plan.ledgers {
            let key = Key::State { log: log.clone() }.to_bytes();
            let value = self.sealer.seal(&key, &[&ledger.encode()]);
            batch.put_cf(&state, key, value);
        }
        self.unswept.fetch_add(batch.size_in_bytes() as u64, Ordering::Relaxed);
        db.write_opt(batch, &synced()).map_err(|error| failed("commit", &error))
    }

    /// Removes the files that hold only unreachable records. They are garbage already, so a failure only costs space.
    fn reclaim(&self, db: &Db, log: &LogId, ledger: &Ledger) {
        let Some(cf) = db.cf_handle(&keys::family(log)) else { return };
        let from = Key::Record { log: log.clone(), generation: 0, end: Position::ZERO }.to_bytes();
        let oldest = ledger.segments[0].generation;
        let through = Key::Record { log: log.clone(), generation: oldest, end: ledger.state.first }.to_bytes();
        if let Err(error) = db.delete_file_in_range_cf(&cf, from, through) {
            tracing::warn!(%log, %error, "reclaim disk space");
        }
    }

    /// RocksDB makes files with the process's umask; only the owner may read them. (The directory is closed to others
    /// anyway.)
    fn sweep_modes(&self) -> io::Result<()> {
        self.unswept.store(0, Ordering::Relaxed);
        for entry in fs::read_dir(&self.dir)? {
            match fs::set_permissions(entry?.path(), Permissions::from_mode(0o600)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    fn read_once(
        &self,
        db: &Db,
        log: &LogId,
        ledger: &Ledger,
        after: Position,
        max_bytes: usize,
    ) -> Result<Vec<Stored>, Error> {
        ledger::collect(log, ledger, after, max_bytes, &|generation, after, through| {
            Box::new(Records::new(self, db, log, generation, after, false, through))
        })
    }
}

/// RocksDB has a lock too, but touches files of the directory before it looks at it.
fn lock(dir: &Path) -> Result<File, Error> {
    let context =
        |error: io::Error| Error::Io { context: format!("lock {}", dir.display()), reason: error.to_string() };
    let file = File::create(dir.join(LOCK)).map_err(context)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(Error::Locked { dir: dir.to_owned() }),
        Err(TryLockError::Error(error)) => Err(context(error)),
    }
}

fn synced() -> WriteOptions {
    let mut options = WriteOptions::default();
    options.set_sync(true);
    options
}

fn state_family(db: &Db) -> Result<std::sync::Arc<rocksdb::BoundColumnFamily<'_>>, Error> {
    db.cf_handle(STATE)
        .ok_or_else(|| Error::Damaged { what: "column families".to_owned(), reason: "'state' is missing".to_owned() })
}

fn failed(context: &str, error: &rocksdb::Error) -> Error {
    match error.kind() {
        ErrorKind::Corruption => Error::Damaged { what: context.to_owned(), reason: error.to_string() },
        _ => Error::Io { context: context.to_owned(), reason: error.to_string() },
    }
}

fn opening(dir: &Path, error: &rocksdb::Error) -> Error {
    failed(&format!("open {}", dir.display()), error)
}

fn get_plain(db: &Db, key: &Key) -> Result<Option<Bytes>, Error> {
    let bytes = key.to_bytes();
    let value = db.get_cf(&state_family(db)?, &bytes).map_err(|error| failed("read the store's format", &error))?;
    value
        .map(|value| Sealer::new(None).open(&bytes, value).map_err(|error| unreadable("the store's format", &error)))
        .transpose()
}

fn put_plain(db: &Db, key: &Key, payload: &[u8]) -> Result<(), Error> {
    let bytes = key.to_bytes();
    let value = Sealer::new(None).seal(&bytes, &[payload]);
    db.put_cf_opt(&state_family(db)?, bytes, value, &synced())
        .map_err(|error| failed("write the store's format", &error))
}

fn unreadable(what: &str, error: &EnvelopeError) -> Error {
    match error {
        EnvelopeError::Newer { found } => Error::Newer { found: u32::from(*found), supported: FORMAT },
        error => Error::Damaged { what: what.to_owned(), reason: error.to_string() },
    }
}

fn check_format(db: &Db) -> Result<(), Error> {
    let Some(stored) = get_plain(db, &Key::Format)? else {
        return put_plain(db, &Key::Format, &FORMAT.to_le_bytes());
    };
    let found = stored.as_ref().try_into().map(u32::from_le_bytes);
    match found {
        Ok(found) if found <= FORMAT => Ok(()),
        Ok(found) => Err(Error::Newer { found, supported: FORMAT }),
        Err(_) => Err(Error::Damaged { what: "format".to_owned(), reason: "it is not a version".to_owned() }),
    }
}

fn check_key(db: &Db, key: Option<&EncryptionKey>) -> Result<(), Error> {
    let stored = get_plain(db, &Key::Cipher)?;
    match (stored, key) {
        (None, None) => Ok(()),
        (None, Some(key)) => put_plain(db, &Key::Cipher, &key.id()),
        (Some(id), None) => Err(Error::KeyMissing { id: hex(&id) }),
        (Some(id), Some(key)) if id == key.id()[..] => Ok(()),
        (Some(id), Some(key)) => Err(Error::KeyWrong { stored: hex(&id), given: hex(&key.id()) }),
    }
}

fn load(db: &Db, sealer: &Sealer) -> Result<BTreeMap<LogId, Ledger>, Error> {
    let mut options = ReadOptions::default();
    options.set_iterate_range(b"s".to_vec()..b"t".to_vec());
    let mut iterator = db.raw_iterator_cf_opt(&state_family(db)?, options);
    let mut ledgers = BTreeMap::new();
    iterator.seek_to_first();
    while let Some((key, value)) = iterator.item() {
        let damaged = |reason: &str| Error::Damaged { what: "state of a log".to_owned(), reason: reason.to_owned() };
        let Some(Key::State { log }) = Key::parse(key) else { return Err(damaged("its key is not ours")) };
        let payload = sealer.open(key, value.to_vec()).map_err(|error| unreadable("state of a log", &error))?;
        let ledger = Ledger::decode(payload).ok_or_else(|| damaged("it contradicts itself"))?;
        ledgers.insert(log, ledger);
        iterator.next();
    }
    iterator.status().map_err(|error| failed("read states", &error))?;
    Ok(ledgers)
}

/// Iterates the records of one generation within bounds; always seeks to a known head.
struct Records<'d> {
    store: &'d RocksStore,
    iterator: Option<DBRawIteratorWithThreadMode<'d, Db>>,
}

impl<'d> Records<'d> {
    fn new(
        store: &'d RocksStore,
        db: &'d Db,
        log: &LogId,
        generation: u64,
        from: Position,
        inclusive: bool,
        through: Position,
    ) -> Self {
        let key = |end| Key::Record { log: log.clone(), generation, end }.to_bytes();
        let (mut lower, mut upper) = (key(from), key(through));
        if !inclusive {
            lower.push(0);
        }
        upper.push(0);
        let iterator = db.cf_handle(&keys::family(log)).map(|cf| {
            let mut options = ReadOptions::default();
            options.set_iterate_range(lower..upper);
            options.fill_cache(false);
            let mut iterator = db.raw_iterator_cf_opt(&cf, options);
            iterator.seek_to_first();
            iterator
        });
        Self { store, iterator }
    }

    fn entry(&self, key: &[u8], value: &[u8]) -> Item {
        let corrupt = |reason: String| Unreadable::Corrupt(reason);
        let Some(Key::Record { end, .. }) = Key::parse(key) else {
            return Err(corrupt("a key is not ours".to_owned()));
        };
        let payload = self.store.sealer.open(key, value.to_vec()).map_err(|error| corrupt(error.to_string()))?;
        let entry = Entry::decode(payload).ok_or_else(|| corrupt("a record is cut short".to_owned()))?;
        Ok((end, entry))
    }
}

impl Iterator for Records<'_> {
    type Item = Item;

    fn next(&mut self) -> Option<Item> {
        let iterator = self.iterator.as_ref()?;
        if let Some((key, value)) = iterator.item() {
            let item = self.entry(key, value);
            self.iterator.as_mut()?.next();
            return Some(item);
        }
        let error = self.iterator.take()?.status().err()?;
        Some(Err(match error.kind() {
            ErrorKind::Corruption => Unreadable::Corrupt(error.to_string()),
            _ => Unreadable::Failed(failed("read records", &error)),
        }))
    }
}

struct Find<'a>(&'a RocksStore, &'a Db);

impl Lookup for Find<'_> {
    fn find(
        &self,
        log: &LogId,
        generation: u64,
        from: Position,
        inclusive: bool,
        through: Position,
    ) -> Result<Option<(Position, Entry)>, Error> {
        match Records::new(self.0, self.1, log, generation, from, inclusive, through).next() {
            None => Ok(None),
            Some(Ok(found)) => Ok(Some(found)),
            Some(Err(Unreadable::Failed(error))) => Err(error),
            Some(Err(Unreadable::Corrupt(reason))) => Err(Error::Corrupt { log: log.clone(), position: from, reason }),
        }
    }
}

impl Store for RocksStore {
    fn commit(&self, writes: &[Write]) -> Result<(), Error> {
        let _one = self.writing.lock().expect("no holder panics");
        let guard = self.db();
        let db = guard.as_ref().ok_or(Error::Closed)?;
        let current = self.ledgers().clone();
        let plan = ledger::plan(&current, writes, &Find(self, db))?;
        self.write(db, &plan)?;
        let mut ledgers = self.ledgers.write().expect("no holder panics");
        ledgers.extend(plan.ledgers);
        drop(ledgers);
        for log in &plan.reclaim {
            let ledger = self.ledgers().get(log).cloned();
            self.reclaim(db, log, &ledger.expect("just written"));
        }
        if self.unswept.load(Ordering::Relaxed) >= FILE_BYTES as u64
            && let Err(error) = self.sweep_modes()
        {
            tracing::warn!(%error, "restrict file modes");
        }
        Ok(())
    }

    fn state(&self, log: &LogId) -> Result<Option<LogState>, Error> {
        Ok(self.ledgers().get(log).map(|ledger| ledger.state.clone()))
    }

    fn logs(&self) -> Result<Vec<LogId>, Error> {
        Ok(self.ledgers().keys().cloned().collect())
    }

    fn read_of(
        &self,
        log: &LogId,
        generation: Option<u64>,
        after: Position,
        max_bytes: usize,
    ) -> Result<Vec<Stored>, Error> {
        let guard = self.db();
        let db = guard.as_ref().ok_or(Error::Closed)?;
        let current = || self.ledgers().get(log).cloned().ok_or_else(|| Error::NotBegun { log: log.clone() });
        let mut ledger = current()?;
        loop {
            if generation.is_some_and(|generation| generation != ledger.state.generation) {
                return Err(Error::Restarted { log: log.clone() });
            }
            let read = self.read_once(db, log, &ledger, after, max_bytes);
            let now = current()?;
            let same = now.segments == ledger.segments && now.state.first == ledger.state.first;
            // A trim or begin in between took files away: what looks like damage may just be gone.
            if same || !matches!(read, Err(Error::Corrupt { .. })) {
                return read;
            }
            ledger = now;
        }
    }

    fn marks(&self, log: &LogId) -> Result<Vec<Mark>, Error> {
        let guard = self.db();
        let db = guard.as_ref().ok_or(Error::Closed)?;
        let Some(ledger) = self.ledgers().get(log).cloned() else { return Ok(Vec::new()) };
        let family = keys::family(log);
        let files = db.live_files().map_err(|error| failed("list files", &error))?;
        let mut ends: Vec<(Position, u64)> = Vec::new();
        for file in files.into_iter().filter(|file| file.column_family_name == family) {
            let Some(Key::Record { generation, end, .. }) = file.end_key.as_deref().and_then(Key::parse) else {
                continue;
            };
            let reachable = ledger
                .ranges(ledger.state.first)
                .iter()
                .any(|(g, after, through)| *g == generation && *after < end && end <= *through);
            if reachable {
                ends.push((end, file.size as u64));
            }
        }
        ends.sort_unstable();
        let trimmed = ledger.state.appended - ledger.state.bytes;
        let mut appended = trimmed;
        Ok(ends
            .into_iter()
            .map(|(end, size)| {
                appended = (appended + size).min(ledger.state.appended);
                Mark { end, appended }
            })
            .collect())
    }

    fn meta(&self, key: &str) -> Result<Option<Bytes>, Error> {
        let guard = self.db();
        let db = guard.as_ref().ok_or(Error::Closed)?;
        let bytes = Key::Meta { name: key.to_owned() }.to_bytes();
        let value = db.get_cf(&state_family(db)?, &bytes).map_err(|error| failed("read meta", &error))?;
        value.map(|value| self.sealer.open(&bytes, value).map_err(|error| unreadable(key, &error))).transpose()
    }

    fn put_meta(&self, key: &str, value: Bytes) -> Result<(), Error> {
        let guard = self.db();
        let db = guard.as_ref().ok_or(Error::Closed)?;
        let bytes = Key::Meta { name: key.to_owned() }.to_bytes();
        let value = self.sealer.seal(&bytes, &[&value]);
        db.put_cf_opt(&state_family(db)?, bytes, value, &synced()).map_err(|error| failed("write meta", &error))
    }

    fn blocking(&self) -> bool {
        true
    }

    fn close(&self) {
        let _one = self.writing.lock().expect("no holder panics");
        if let Some(db) = self.db.write().expect("no holder panics").take() {
            db.cancel_all_background_work(true);
        }
        drop(self.lock.lock().expect("no holder panics").take());
    }
}

#[cfg(test)]
impl RocksStore {
    /// Writes memtables to files, so that tests can look at them.
    pub(super) fn flush(&self, log: &LogId) {
        let guard = self.db();
        let db = guard.as_ref().expect("open");
        for family in [STATE.to_owned(), keys::family(log)] {
            if let Some(cf) = db.cf_handle(&family) {
                db.flush_cf(&cf).expect("flush");
            }
        }
    }

    /// (level, bytes) of the log's files.
    pub(super) fn files(&self, log: &LogId) -> Vec<(i32, u64)> {
        let guard = self.db();
        let files = guard.as_ref().expect("open").live_files().expect("files");
        let ours = files.into_iter().filter(|file| file.column_family_name == keys::family(log));
        ours.map(|file| (file.level, file.size as u64)).collect()
    }

    /// Bytes written to files for each byte flushed, with one decimal; 1.0 when nothing was written twice.
    pub(super) fn write_amplification(&self, log: &LogId) -> String {
        let guard = self.db();
        let db = guard.as_ref().expect("open");
        let cf = db.cf_handle(&keys::family(log)).expect("family");
        let stats = db.property_value_cf(&cf, "rocksdb.cfstats").expect("property").expect("known");
        let sum = stats.lines().find(|line| line.trim_start().starts_with("Sum")).expect("a sum");
        let header = stats.lines().find(|line| line.contains("W-Amp")).expect("a header");
        let column = header.split_whitespace().position(|name| name == "W-Amp").expect("a column");
        // Sizes have a unit of their own.
        sum.split_whitespace().nth(column + 1).expect("a value").to_owned()
    }

    /// Pretends that a newer version wrote the store.
    pub(super) fn set_format(&self, format: u32) {
        put_plain(self.db().as_ref().expect("open"), &Key::Format, &format.to_le_bytes()).expect("put");
    }
}
