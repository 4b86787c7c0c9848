//! What writes do to a log and what reads must find: the rules both stores share. Pure.
//!
//! A log is a list of segments: (generation, start), each covering the records after its start up to the next
//! segment's.
//! `begin` leaves one segment, `rewind` cuts the list and adds one. So cut-off records never need to be deleted.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;

use super::{Error, LogId, LogState, Stored, Write};
use crate::model::{Batch, Epoch, Header, Incarnation, Position, StreamHash, Term};

/// What a record occupies besides its own bytes: key, envelope, place.
pub(super) const ENTRY_OVERHEAD: u64 = 96;
/// Rewinds a log can hold before it must begin anew; each needs a damaged record, so more mean a broken disk.
const MAX_SEGMENTS: usize = 64;

/// Bytes a batch counts for.
pub(super) fn size_of(batch: &Batch) -> u64 {
    batch.record().len() as u64 + ENTRY_OVERHEAD
}

/// Records of one generation after `start`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    pub(super) generation: u64,
    pub(super) start: Position,
}

/// Where a record stands; stored with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    /// The log's end before it.
    pub(super) skip_through: Position,
    /// Bytes appended before it.
    pub(super) offset: u64,
    /// Records appended before it.
    pub(super) index: u64,
}

/// A record as stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) place: Place,
    pub(super) record: Bytes,
}

impl LogState {
    /// The state after `begin`.
    pub(super) fn begun(
        old: Option<&Self>,
        incarnation: Incarnation,
        epoch: Epoch,
        at: Position,
        hash: StreamHash,
        token: Option<Bytes>,
    ) -> Self {
        let term = old.map_or(Term(0), |old| old.term);
        let generation = old.map_or(0, |old| old.generation) + 1;
        Self {
            incarnation,
            epoch,
            first: at,
            end: at,
            hash,
            token,
            term,
            bytes: 0,
            batches: 0,
            generation,
            appended: 0,
        }
    }

    /// Takes the token of its end, or says where it ends.
    fn put_token(&mut self, log: &LogId, end: Position, token: Bytes) -> Result<(), Error> {
        if end != self.end {
            return Err(Error::Gap { log: log.clone(), end: self.end, previous: end });
        }
        self.token = Some(token);
        Ok(())
    }

    /// Appends, or says why not.
    pub(super) fn append(
        &mut self,
        log: &LogId,
        header: &Header,
        size: u64,
        token: Option<Bytes>,
    ) -> Result<(), Error> {
        let log = || log.clone();
        if header.incarnation != self.incarnation {
            return Err(Error::Incarnation { log: log(), have: self.incarnation, got: header.incarnation });
        }
        if header.previous > self.end {
            return Err(Error::Gap { log: log(), end: self.end, previous: header.previous });
        }
        if header.end <= self.end {
            return Err(Error::Overlap { log: log(), end: self.end, batch_end: header.end });
        }
        let meets = header.previous == self.end && header.epoch == self.epoch;
        if meets && header.hash_before != self.hash {
            return Err(Error::Chain { log: log(), at: self.end, have: self.hash, got: header.hash_before });
        }
        self.epoch = self.epoch.max(header.epoch);
        self.end = header.end;
        self.hash = header.hash;
        self.token = token.or_else(|| self.token.take());
        self.bytes += size;
        self.appended += size;
        self.batches += 1;
        Ok(())
    }
}

/// A log's state with what only the store needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Ledger {
    pub(super) state: LogState,
    pub(super) segments: Vec<Segment>,
    pub(super) appended_batches: u64,
}

impl Ledger {
    fn new(state: LogState) -> Self {
        let segments = vec![Segment { generation: state.generation, start: state.end }];
        Self { state, segments, appended_batches: 0 }
    }

    /// Key ranges (generation, after, through) that hold the records with `end > after`.
    pub(super) fn ranges(&self, after: Position) -> Vec<(u64, Position, Position)> {
        let ends = self.segments.iter().skip(1).map(|next| next.start).chain([self.state.end]);
        let ranges =
            self.segments.iter().zip(ends).map(|(segment, end)| (segment.generation, after.max(segment.start), end));
        ranges.filter(|(_, start, end)| start < end).collect()
    }

    fn trim(&mut self, through: Position, find: &Find<'_>) -> Result<(), Error> {
        let state = &mut self.state;
        if through >= state.end {
            (state.first, state.bytes, state.batches) = (state.end, 0, 0);
        } else if through > state.first {
            let next = first_after(self, through, find)?;
            let state = &mut self.state;
            state.first = next.skip_through;
            state.bytes = state.appended - next.offset;
            state.batches = self.appended_batches - next.index;
        }
        let first = self.state.first;
        while self.segments.get(1).is_some_and(|next| next.start <= first) {
            self.segments.remove(0);
        }
        Ok(())
    }

    fn rewind(&mut self, log: &LogId, to: Position, find: &Find<'_>) -> Result<(), Error> {
        let refuse = |reason| Err(Error::Rewind { log: log.clone(), to, reason });
        if to < self.state.first || to >= self.state.end {
            return refuse("it is not inside the log");
        }
        if self.segments.len() >= MAX_SEGMENTS {
            return refuse("the log was rewound too often");
        }
        let trimmed = self.state.appended - self.state.bytes;
        let trimmed_batches = self.appended_batches - self.state.batches;
        let (appended, batches) = if to == self.state.first {
            (trimmed, trimmed_batches)
        } else {
            let range =
                self.ranges(self.state.first).into_iter().find(|(_, after, through)| *after < to && to <= *through);
            let (generation, _, _) = range.expect("ranges cover first to end");
            match find(generation, to, true, to)? {
                Some((_, size, place)) => (place.offset + size, place.index + 1),
                None => return refuse("no record ends there"),
            }
        };
        let state = &mut self.state;
        state.generation += 1;
        state.end = to;
        (state.appended, state.bytes) = (appended, appended - trimmed);
        (self.appended_batches, state.batches) = (batches, batches - trimmed_batches);
        self.segments.retain(|segment| segment.start < to);
        self.segments.push(Segment { generation: state.generation, start: to });
        Ok(())
    }
}

/// Finds the first record of (generation, from, inclusive, through): its end, size and place.
type Find<'a> = dyn Fn(u64, Position, bool, Position) -> Result<Option<(Position, u64, Place)>, Error> + 'a;

fn first_after(ledger: &Ledger, after: Position, find: &Find<'_>) -> Result<Place, Error> {
    for (generation, from, through) in ledger.ranges(after) {
        if let Some((_, _, place)) = find(generation, from, false, through)? {
            return Ok(place);
        }
    }
    Err(Error::Damaged { what: format!("records after {after}"), reason: "they are missing".to_owned() })
}

/// Where the records of a store are looked up: the first of a log within (generation, from, inclusive, through).
pub(super) trait Lookup {
    /// Its end and the entry.
    fn find(
        &self,
        log: &LogId,
        generation: u64,
        from: Position,
        inclusive: bool,
        through: Position,
    ) -> Result<Option<(Position, Entry)>, Error>;
}

/// A record to write.
pub(super) struct NewRecord<'a> {
    pub(super) log: &'a LogId,
    pub(super) generation: u64,
    pub(super) place: Place,
    pub(super) batch: &'a Batch,
}

/// What one commit changes.
#[derive(Default)]
pub(super) struct Plan<'a> {
    pub(super) ledgers: BTreeMap<LogId, Ledger>,
    pub(super) records: Vec<NewRecord<'a>>,
    /// Logs of which something became unreachable.
    pub(super) reclaim: BTreeSet<LogId>,
}

/// Decides what `writes` change, or why they are refused as a whole.
pub(super) fn plan<'a>(
    current: &BTreeMap<LogId, Ledger>,
    writes: &'a [Write],
    lookup: &dyn Lookup,
) -> Result<Plan<'a>, Error> {
    let mut plan = Plan::default();
    for write in writes {
        let log = write.log();
        let old = plan.ledgers.get(log).or_else(|| current.get(log)).cloned();
        let ledger = next(log, old, write, &mut plan, lookup)?;
        plan.ledgers.insert(log.clone(), ledger);
        if matches!(write, Write::Begin { .. } | Write::Trim { .. }) {
            plan.reclaim.insert(log.clone());
        }
    }
    Ok(plan)
}

fn next<'a>(
    log: &'a LogId,
    old: Option<Ledger>,
    write: &'a Write,
    plan: &mut Plan<'a>,
    lookup: &dyn Lookup,
) -> Result<Ledger, Error> {
    if let Write::Begin { incarnation, epoch, at, hash, token, .. } = write {
        let old = old.as_ref().map(|ledger| &ledger.state);
        return Ok(Ledger::new(LogState::begun(old, *incarnation, *epoch, *at, *hash, token.clone())));
    }
    let mut ledger = old.ok_or_else(|| Error::NotBegun { log: log.clone() })?;
    let find = |generation, from, inclusive, through| find(plan, lookup, log, generation, from, inclusive, through);
    match write {
        Write::Begin { .. } => unreachable!("handled above"),
        Write::Append { batch, token, .. } => {
            let place =
                Place { skip_through: ledger.state.end, offset: ledger.state.appended, index: ledger.appended_batches };
            ledger.state.append(log, batch.header(), size_of(batch), token.clone())?;
            ledger.appended_batches += 1;
            plan.records.push(NewRecord { log, generation: ledger.state.generation, place, batch });
        }
        Write::Token { end, token, .. } => ledger.state.put_token(log, *end, token.clone())?,
        Write::Term { term, .. } => ledger.state.term = ledger.state.term.max(*term),
        Write::Trim { through, .. } => ledger.trim(*through, &find)?,
        Write::Rewind { to, hash, token, .. } => {
            ledger.rewind(log, *to, &find)?;
            ledger.state.hash = *hash;
            ledger.state.token = token.clone();
        }
    }
    Ok(ledger)
}

/// Looks in the store, then among the records of the commit itself.
fn find(
    plan: &Plan<'_>,
    lookup: &dyn Lookup,
    log: &LogId,
    generation: u64,
    from: Position,
    inclusive: bool,
    through: Position,
) -> Result<Option<(Position, u64, Place)>, Error> {
    if let Some((end, entry)) = lookup.find(log, generation, from, inclusive, through)? {
        return Ok(Some((end, entry.record.len() as u64 + ENTRY_OVERHEAD, entry.place)));
    }
    let found = plan.records.iter().find(|new| {
        let end = new.batch.header().end;
        let inside = end <= through && (end > from || inclusive && end == from);
        new.log == log && new.generation == generation && inside
    });
    Ok(found.map(|new| (new.batch.header().end, size_of(new.batch), new.place)))
}

/// One step of reading: the key's end and the entry, or why it cannot be had.
pub(super) type Item = Result<(Position, Entry), Unreadable>;

/// Why an entry cannot be had.
pub(super) enum Unreadable {
    /// Its bytes are wrong.
    Corrupt(String),
    /// The disk says no.
    Failed(Error),
}

/// Reads records with `end > after`, checking each and the chain. `range` iterates (generation, after, through).
/// Stops before what is wrong; an error comes only when nothing precedes it.
pub(super) fn collect<'s>(
    log: &LogId,
    ledger: &Ledger,
    after: Position,
    max_bytes: usize,
    range: &dyn Fn(u64, Position, Position) -> Box<dyn Iterator<Item = Item> + 's>,
) -> Result<Vec<Stored>, Error> {
    if after < ledger.state.first {
        return Err(Error::Trimmed { log: log.clone(), first: ledger.state.first });
    }
    let (mut last, mut bytes, mut out) = (after, 0, Vec::new());
    let corrupt = |position, reason| Error::Corrupt { log: log.clone(), position, reason };
    for (generation, from, through) in ledger.ranges(after) {
        for item in range(generation, from, through) {
            match checked(item, last) {
                Ok(stored) => {
                    bytes += stored.batch.record().len();
                    if !out.is_empty() && bytes > max_bytes {
                        return Ok(out);
                    }
                    last = stored.batch.header().end;
                    out.push(stored);
                }
                Err(_) if !out.is_empty() => return Ok(out),
                Err(Unreadable::Corrupt(reason)) => return Err(corrupt(last, reason)),
                Err(Unreadable::Failed(error)) => return Err(error),
            }
        }
        if last != through {
            let missing = || corrupt(last, format!("the records up to {through} are missing"));
            return if out.is_empty() { Err(missing()) } else { Ok(out) };
        }
    }
    Ok(out)
}

fn checked(item: Item, last: Position) -> Result<Stored, Unreadable> {
    let (end, entry) = item?;
    let batch = Batch::decode(entry.record).map_err(|error| Unreadable::Corrupt(error.to_string()))?;
    if batch.header().end != end {
        return Err(Unreadable::Corrupt(format!("the record at {end} ends at {}", batch.header().end)));
    }
    if entry.place.skip_through > last {
        return Err(Unreadable::Corrupt(format!("the records up to {} are missing", entry.place.skip_through)));
    }
    Ok(Stored { batch, skip_through: last })
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::model::ClusterTime;

    pub(in crate::outbox) fn at(n: u64) -> Position {
        Position::new(ClusterTime(n), 0)
    }

    pub(in crate::outbox) fn ledger() -> Ledger {
        let mut state = LogState::begun(
            None,
            Incarnation([9; 16]),
            Epoch(2),
            at(5),
            StreamHash(3),
            Some(Bytes::from_static(b"tok")),
        );
        (state.end, state.bytes, state.batches, state.appended, state.term) = (at(20), 100, 2, 300, Term(4));
        let mut ledger = Ledger::new(state);
        ledger.segments = vec![Segment { generation: 1, start: at(5) }];
        ledger.appended_batches = 6;
        ledger
    }

    #[test]
    fn ranges_follow_the_segments() {
        let mut ledger = ledger();
        ledger.segments.push(Segment { generation: 3, start: at(10) });
        assert_eq!(ledger.ranges(at(5)), [(1, at(5), at(10)), (3, at(10), at(20))]);
        assert_eq!(ledger.ranges(at(10)), [(3, at(10), at(20))]);
        assert_eq!(ledger.ranges(at(20)), []);
    }
}
