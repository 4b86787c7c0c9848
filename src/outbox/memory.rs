//! The honest in-memory double of the store: same rules, same errors, with crashes and failing writes on demand.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Bound;
use std::sync::{Arc, Mutex, MutexGuard};

use bytes::Bytes;

use super::ledger::{self, Entry, Ledger, Lookup, Unreadable};
use super::{Error, LogId, LogState, Mark, Store, Stored, Write};
use crate::model::Position;

/// How a commit fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Nothing reaches the disk.
    BeforeWrite,
    /// Everything reaches the disk, and the caller hears of a failure all the same.
    AfterWrite,
}

type Records = BTreeMap<(u64, Position), Entry>;

#[derive(Default)]
struct Disk {
    ledgers: BTreeMap<LogId, Ledger>,
    records: BTreeMap<LogId, Records>,
    meta: BTreeMap<String, Bytes>,
    /// Fate of the next commits; `None` succeeds.
    faults: VecDeque<Option<Fault>>,
    commits: u64,
    /// The process that may write; a crash starts the next one.
    process: u64,
}

/// A store in memory. A clone is another handle of the same process on the same disk.
#[derive(Clone, Default)]
pub struct MemStore {
    disk: Arc<Mutex<Disk>>,
    process: u64,
    closed: Arc<Mutex<bool>>,
}

impl MemStore {
    /// An empty disk.
    pub fn new() -> Self {
        Self::default()
    }

    /// The process dies: its handles fail from now on, and what it had committed is found by the returned one.
    pub fn crash(&self) -> Self {
        let mut disk = self.lock();
        disk.process += 1;
        disk.faults.clear();
        Self { disk: Arc::clone(&self.disk), process: disk.process, closed: Arc::default() }
    }

    /// After `after` more good commits, one fails.
    pub fn fail(&self, after: usize, fault: Fault) {
        let mut disk = self.lock();
        disk.faults = std::iter::repeat_n(None, after).chain([Some(fault)]).collect();
    }

    /// Damages the stored record that ends at `end`; says whether there is one.
    pub fn corrupt(&self, log: &LogId, end: Position) -> bool {
        let mut disk = self.lock();
        let Some(records) = disk.records.get_mut(log) else { return false };
        let Some((_, entry)) = records.iter_mut().rev().find(|((_, at), _)| *at == end) else { return false };
        let mut bytes = entry.record.to_vec();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        entry.record = bytes.into();
        true
    }

    /// Commits that reached the disk.
    pub fn commits(&self) -> u64 {
        self.lock().commits
    }

    fn lock(&self) -> MutexGuard<'_, Disk> {
        self.disk.lock().expect("no holder panics")
    }

    fn alive(&self) -> Result<MutexGuard<'_, Disk>, Error> {
        let disk = self.lock();
        let closed = *self.closed.lock().expect("no holder panics");
        if closed || disk.process != self.process { Err(Error::Closed) } else { Ok(disk) }
    }
}

impl Lookup for Disk {
    fn find(
        &self,
        log: &LogId,
        generation: u64,
        from: Position,
        inclusive: bool,
        through: Position,
    ) -> Result<Option<(Position, Entry)>, Error> {
        let from = (generation, from);
        let from = if inclusive { Bound::Included(from) } else { Bound::Excluded(from) };
        let Some(records) = self.records.get(log) else { return Ok(None) };
        let found = records.range((from, Bound::Included((generation, through)))).next();
        Ok(found.map(|((_, end), entry)| (*end, entry.clone())))
    }
}

impl Disk {
    fn write(&mut self, writes: &[Write]) -> Result<(), Error> {
        let plan = ledger::plan(&self.ledgers, writes, self)?;
        let fault = self.faults.pop_front().flatten();
        let failed = || Error::Io { context: "commit".to_owned(), reason: "injected fault".to_owned() };
        if fault == Some(Fault::BeforeWrite) {
            return Err(failed());
        }
        for new in plan.records {
            let entry = Entry { place: new.place, record: new.batch.record().clone() };
            self.records.entry(new.log.clone()).or_default().insert((new.generation, new.batch.header().end), entry);
        }
        self.ledgers.extend(plan.ledgers);
        for log in plan.reclaim {
            let ledger = &self.ledgers[&log];
            let oldest = (ledger.segments[0].generation, ledger.state.first);
            self.records.entry(log).or_default().retain(|key, _| *key > oldest);
        }
        self.commits += 1;
        if fault.is_some() { Err(failed()) } else { Ok(()) }
    }
}

impl Store for MemStore {
    fn commit(&self, writes: &[Write]) -> Result<(), Error> {
        self.alive()?.write(writes)
    }

    fn state(&self, log: &LogId) -> Result<Option<LogState>, Error> {
        Ok(self.alive()?.ledgers.get(log).map(|ledger| ledger.state.clone()))
    }

    fn logs(&self) -> Result<Vec<LogId>, Error> {
        Ok(self.alive()?.ledgers.keys().cloned().collect())
    }

    fn read_of(
        &self,
        log: &LogId,
        generation: Option<u64>,
        after: Position,
        max_bytes: usize,
    ) -> Result<Vec<Stored>, Error> {
        let disk = self.alive()?;
        let ledger = disk.ledgers.get(log).ok_or_else(|| Error::NotBegun { log: log.clone() })?;
        if generation.is_some_and(|generation| generation != ledger.state.generation) {
            return Err(Error::Restarted { log: log.clone() });
        }
        let empty = Records::new();
        let records = disk.records.get(log).unwrap_or(&empty);
        ledger::collect(log, ledger, after, max_bytes, &|generation, after, through| {
            let range = (Bound::Excluded((generation, after)), Bound::Included((generation, through)));
            Box::new(records.range(range).map(|((_, end), entry)| Ok::<_, Unreadable>((*end, entry.clone()))))
        })
    }

    fn marks(&self, log: &LogId) -> Result<Vec<Mark>, Error> {
        let disk = self.alive()?;
        let Some(ledger) = disk.ledgers.get(log) else { return Ok(Vec::new()) };
        let Some(records) = disk.records.get(log) else { return Ok(Vec::new()) };
        let ranges = ledger.ranges(ledger.state.first);
        let of_range = |(generation, after, through)| {
            records.range((Bound::Excluded((generation, after)), Bound::Included((generation, through))))
        };
        let size = |entry: &Entry| entry.record.len() as u64 + ledger::ENTRY_OVERHEAD;
        let marks = ranges.into_iter().flat_map(of_range);
        Ok(marks.map(|((_, end), entry)| Mark { end: *end, appended: entry.place.offset + size(entry) }).collect())
    }

    fn meta(&self, key: &str) -> Result<Option<Bytes>, Error> {
        Ok(self.alive()?.meta.get(key).cloned())
    }

    fn put_meta(&self, key: &str, value: Bytes) -> Result<(), Error> {
        self.alive()?.meta.insert(key.to_owned(), value);
        Ok(())
    }

    fn blocking(&self) -> bool {
        false
    }

    fn close(&self) {
        *self.closed.lock().expect("no holder panics") = true;
    }
}
