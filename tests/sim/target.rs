//! The target's MongoDB in memory: documents as bytes, unique indexes, lane documents with compare-and-set, a catalog.
//!
//! Transactions commit at w:1 and are undone by a failover unless something with majority was acknowledged after them.
//! Every commit is judged against the versions the source had.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use bson::raw::{RawDocument, RawDocumentBuf};
use bson::{Bson, Document};
use bytes::Bytes;
use farshore::apply::catalog::{Entries, Presence};
use farshore::apply::diff::Diff;
use farshore::apply::lanes::LaneState;
use farshore::apply::plan::{self, Patch, Step};
use farshore::apply::target::{Cause, CommitError, Divergence, StreamRecord, TargetError, Transaction};
use farshore::model::{ClusterTime, CollectionUuid, LaneId, Position, Term};

use crate::commands::{self, Statement};
use crate::source::SourceDb;

/// A collection of the target.
#[derive(Default)]
pub(crate) struct Collection {
    pub(crate) db: String,
    pub(crate) coll: String,
    pub(crate) documents: BTreeMap<u128, Bytes>,
    /// Unique indexes: name and field.
    pub(crate) unique: BTreeMap<String, String>,
}

/// The stored document of a lane.
#[derive(Clone)]
pub(crate) struct LaneDocument {
    pub(crate) term: Term,
    pub(crate) state: LaneState,
}

/// The stored document of the stream.
pub(crate) struct StreamDocument {
    pub(crate) term: Term,
    pub(crate) record: StreamRecord,
}

enum Undo {
    Document(CollectionUuid, u128, Option<Bytes>),
    Lane(usize, LaneDocument),
    Applied(Position),
}

/// What commits brought about.
#[derive(Clone, Copy, Default, Debug)]
pub(crate) struct Done {
    pub(crate) commits: u64,
    pub(crate) changes: u64,
    pub(crate) transactions: u64,
    pub(crate) rolled_back: u64,
}

/// See the module text.
#[derive(Default)]
pub(crate) struct TargetDb {
    pub(crate) stream: Option<StreamDocument>,
    pub(crate) lanes: BTreeMap<usize, LaneDocument>,
    pub(crate) catalog: Entries,
    pub(crate) intents: BTreeSet<CollectionUuid>,
    /// Index builds and when they end, whoever waits for them.
    pub(crate) building: BTreeMap<CollectionUuid, Duration>,
    pub(crate) collections: BTreeMap<CollectionUuid, Collection>,
    applied: BTreeSet<Position>,
    /// Commits the majority does not have yet.
    journal: Vec<Vec<Undo>>,
    pub(crate) election: u64,
    /// There is no primary until then.
    pub(crate) electing_until: Duration,
    uuids: u64,
    pub(crate) done: Done,
}

impl TargetDb {
    /// A fresh collection UUID.
    pub(crate) fn uuid(&mut self) -> CollectionUuid {
        self.uuids += 1;
        let mut bytes = [0x5A; 16];
        bytes[8..].copy_from_slice(&self.uuids.to_be_bytes());
        CollectionUuid(bytes)
    }

    pub(crate) fn named(&self, db: &str, coll: &str) -> Option<CollectionUuid> {
        let found = self.collections.iter().find(|(_, c)| c.db == db && c.coll == coll);
        found.map(|(uuid, _)| *uuid)
    }

    /// Something was acknowledged by the majority: nothing before it can be undone any more.
    pub(crate) fn majority(&mut self) {
        self.journal.clear();
    }

    /// The primary dies; of the commits the majority does not have, the newest are lost.
    pub(crate) fn fail_over(&mut self, keep: usize, until: Duration) {
        while self.journal.len() > keep {
            let undo = self.journal.pop().expect("longer than `keep`");
            self.done.rolled_back += 1;
            self.undo(undo);
        }
        self.election += 1;
        self.electing_until = until;
    }

    /// Commits that could still be lost.
    pub(crate) fn unconfirmed(&self) -> usize {
        self.journal.len()
    }

    fn undo(&mut self, undo: Vec<Undo>) {
        for one in undo.into_iter().rev() {
            match one {
                Undo::Document(uuid, key, before) => {
                    let collection = self.collections.get_mut(&uuid).expect("drops are majority-written");
                    match before {
                        Some(bytes) => collection.documents.insert(key, bytes),
                        None => collection.documents.remove(&key),
                    };
                }
                Undo::Lane(lane, before) => drop(self.lanes.insert(lane, before)),
                Undo::Applied(position) => drop(self.applied.remove(&position)),
            }
        }
    }

    /// Why something that names a term or a lane's position matched nothing.
    pub(crate) fn not_ours(&self, term: Term) -> TargetError {
        match &self.stream {
            Some(stream) if stream.term > term => TargetError::Deposed(stream.term),
            _ => TargetError::Moved("a lane is not where this process left it".into()),
        }
    }

    /// Runs a lane transaction, `whole` if source transactions must be. `Err(Ok(..))` is the answer, `Err(Err(..))` a broken promise.
    pub(crate) fn transact(
        &mut self,
        source: &SourceDb,
        term: Term,
        transaction: &Transaction<'_>,
        steps: &[Step],
        whole: bool,
    ) -> Result<(), Result<CommitError, String>> {
        for step in transaction.lanes {
            let ours = |lane: &LaneDocument| lane.term == term && lane.state.position == step.from.position;
            if !self.lanes.get(&step.lane.index()).is_some_and(ours) {
                return Err(Ok(self.not_ours(term).into()));
            }
        }
        let expected = judge(self, source, transaction, whole).map_err(Err)?;
        let mut undo = Vec::new();
        if let Err(error) = self.run(transaction, steps, &mut undo) {
            self.undo(undo);
            return Err(error);
        }
        for ((uuid, key), after) in &expected.documents {
            let have = self.collections.get(uuid).and_then(|c| c.documents.get(key));
            if have != after.as_ref() {
                return Err(Err(format!(
                    "document {key:x} of {uuid} is not what the source had: {}",
                    differ(have, after.as_ref())
                )));
            }
        }
        for position in expected.positions {
            if !self.applied.insert(position) {
                return Err(Err(format!("the change at {position} was applied twice")));
            }
            undo.push(Undo::Applied(position));
            self.done.changes += 1;
        }
        self.done.commits += 1;
        self.done.transactions += expected.transactions;
        self.journal.push(undo);
        Ok(())
    }

    fn run(
        &mut self,
        transaction: &Transaction<'_>,
        steps: &[Step],
        undo: &mut Vec<Undo>,
    ) -> Result<(), Result<CommitError, String>> {
        for step in transaction.lanes {
            let lane = self.lanes.get_mut(&step.lane.index()).expect("checked before");
            undo.push(Undo::Lane(step.lane.index(), lane.clone()));
            if step.to.position < step.from.position {
                return Err(Err(format!(
                    "lane {} goes back from {} to {}",
                    step.lane, step.from.position, step.to.position
                )));
            }
            lane.state.position = step.to.position;
            if step.from.parked != step.to.parked {
                lane.state.parked.clone_from(&step.to.parked);
            }
            if step.from.floors != step.to.floors {
                lane.state.floors.clone_from(&step.to.floors);
            }
        }
        for step in steps {
            match step {
                Step::Run { db, collection, body, expected } => {
                    self.run_command(db, *collection, body, *expected, undo)?
                }
                Step::Patch { entry, collection, changes } => {
                    let Presence::Present(here) = entry.presence else { continue };
                    self.patch(here, *collection, entry.one_lane, changes, undo)?;
                }
            }
        }
        Ok(())
    }

    fn run_command(
        &mut self,
        db: &str,
        source_uuid: CollectionUuid,
        body: &RawDocumentBuf,
        expected: Option<usize>,
        undo: &mut Vec<Undo>,
    ) -> Result<(), Result<CommitError, String>> {
        let (uuid, name, statements) = commands::read(body).map_err(Err)?;
        let uuid = CollectionUuid(uuid);
        let there = self.collections.get(&uuid).is_some_and(|c| c.db == db && c.coll == name);
        if !there {
            return Err(Ok(gone(&format!("apply changes: collection UUID does not match {db}.{name}")).into()));
        }
        let mut matched = 0;
        for statement in statements {
            let have = |key: &u128| self.collections[&uuid].documents.get(key).cloned();
            let (key, after) = match statement {
                Statement::Insert(bytes) => {
                    let key = commands::key_of(&bytes);
                    if have(&key).is_some() {
                        return Err(Ok(CommitError::Diverged(Divergence::Somewhere)));
                    }
                    (key, Some(bytes))
                }
                Statement::Delete(key) if have(&key).is_some() => (key, None),
                Statement::Update(key, change) => match have(&key) {
                    Some(before) => (key, Some(commands::update(&before, &change).map_err(Err)?)),
                    None => continue,
                },
                Statement::Delete(_) => continue,
            };
            matched += 1;
            self.put(uuid, source_uuid, key, after, undo)?;
        }
        match expected {
            Some(expected) if expected != matched => Err(Ok(CommitError::Diverged(Divergence::Somewhere))),
            _ => Ok(()),
        }
    }

    fn patch(
        &mut self,
        here: CollectionUuid,
        source_uuid: CollectionUuid,
        one_lane: bool,
        changes: &[Patch],
        undo: &mut Vec<Undo>,
    ) -> Result<(), Result<CommitError, String>> {
        // Of several diffs of a document only what the last one leaves is written: where order counts there is one.
        let keys: BTreeSet<u128> = changes.iter().map(|patch| patch.identity).collect();
        if one_lane && keys.len() != changes.len() {
            return Err(Err("a document of a one-lane collection is patched twice from one reading".into()));
        }
        for patch in changes {
            let diverged =
                Divergence::Document { collection: source_uuid, identity: patch.identity, cause: Cause::Shape };
            let before = self.collections.get(&here).and_then(|c| c.documents.get(&patch.identity)).cloned();
            let Some(before) = before else { return Err(Ok(CommitError::Diverged(diverged))) };
            let before = RawDocument::from_bytes(&before).expect("stored documents are valid");
            let diff = Diff::parse(&patch.update).map_err(|e| Err(e.to_string()))?;
            let Ok(after) = diff.apply(before) else { return Err(Ok(CommitError::Diverged(diverged))) };
            self.put(here, source_uuid, patch.identity, Some(after.into_bytes().into()), undo)?;
        }
        Ok(())
    }

    fn put(
        &mut self,
        uuid: CollectionUuid,
        source_uuid: CollectionUuid,
        key: u128,
        after: Option<Bytes>,
        undo: &mut Vec<Undo>,
    ) -> Result<(), Result<CommitError, String>> {
        let collection = self.collections.get_mut(&uuid).expect("checked before");
        if let Some(bytes) = &after {
            for field in collection.unique.values() {
                let value = field_of(bytes, field);
                let taken = |(other, bytes): (&u128, &Bytes)| *other != key && field_of(bytes, field) == value;
                if collection.documents.iter().any(taken) {
                    let mut fields = Document::new();
                    fields.insert(field.clone(), value.unwrap_or(Bson::Null));
                    let fields = RawDocumentBuf::try_from(&fields).expect("encodes");
                    return Err(Ok(CommitError::Diverged(Divergence::Unique { collection: source_uuid, fields })));
                }
            }
        }
        let before = match after {
            Some(bytes) => collection.documents.insert(key, bytes),
            None => collection.documents.remove(&key),
        };
        undo.push(Undo::Document(uuid, key, before));
        Ok(())
    }
}

/// The lane documents a claim finds missing begin here.
pub(crate) fn first_lane(record: &StreamRecord, term: Term) -> LaneDocument {
    LaneDocument { term, state: LaneState { position: record.floor, ..LaneState::default() } }
}

/// A collection is not what the catalog says.
pub(crate) fn gone(message: &str) -> TargetError {
    TargetError::Fatal { message: message.to_owned(), hint: "dropped or replaced at the target" }
}

pub(crate) fn field_of(bytes: &Bytes, field: &str) -> Option<Bson> {
    let document = RawDocument::from_bytes(bytes).ok()?;
    document.get(field).ok()?.and_then(|value| Bson::try_from(value).ok())
}

fn differ(have: Option<&Bytes>, want: Option<&Bytes>) -> String {
    let text = |bytes: Option<&Bytes>| match bytes {
        None => "nothing".to_owned(),
        Some(bytes) => RawDocument::from_bytes(bytes)
            .ok()
            .and_then(|d| Document::try_from(d).ok())
            .map_or_else(|| "no document".to_owned(), |d| d.to_string()),
    };
    format!("have {}, want {}", text(have), text(want))
}

/// What a good transaction leaves behind.
struct Expected {
    documents: BTreeMap<(CollectionUuid, u128), Option<Bytes>>,
    positions: Vec<Position>,
    transactions: u64,
}

/// The serial model: every document must be what the source had right before each of its changes, and source
/// transactions must be whole, unless the cache is too small for that.
fn judge(target: &TargetDb, source: &SourceDb, transaction: &Transaction<'_>, whole: bool) -> Result<Expected, String> {
    let mut ahead: BTreeMap<(CollectionUuid, u128), ClusterTime> = transaction.floors.clone();
    let mut now: BTreeMap<(CollectionUuid, u128), Option<Bytes>> = BTreeMap::new();
    let mut expected = Expected { documents: BTreeMap::new(), positions: Vec::new(), transactions: 0 };
    let here = |uuid: &CollectionUuid| match transaction.entries.get(uuid).map(|entry| &entry.presence) {
        Some(Presence::Present(here)) => Some(*here),
        _ => None,
    };
    for one in transaction.resolved {
        let id = (one.floor.collection, one.floor.key);
        if source.collections.contains_key(&id.0) && source.at(id.0, id.1, one.floor.at) != one.document.as_ref() {
            return Err(format!("a fetched document is not what the source had at {}", one.floor.at));
        }
        ahead.insert(id, one.floor.at);
        now.insert(id, one.document.clone());
    }
    let mut inside: BTreeMap<ClusterTime, BTreeSet<Position>> = BTreeMap::new();
    let mut last = Position::ZERO;
    for item in transaction.items {
        if item.position <= last {
            return Err(format!("changes of one transaction are out of order at {}", item.position));
        }
        last = item.position;
        inside.entry(item.position.time).or_default().insert(item.position);
        let id = (item.collection, item.key);
        let Some(at_target) = here(&item.collection) else { continue };
        expected.positions.push(item.position);
        if ahead.get(&id).is_some_and(|at| *at >= item.position.time) {
            continue;
        }
        let stored = || target.collections.get(&at_target).and_then(|c| c.documents.get(&item.key)).cloned();
        let have = now.entry(id).or_insert_with(stored);
        let want = source.before(item.collection, item.key, item.position);
        if have.as_ref() != want {
            return Err(format!(
                "before the change at {} its document is not what the source had: {}",
                item.position,
                differ(have.as_ref(), want)
            ));
        }
        *have = source
            .before(item.collection, item.key, Position::new(item.position.time, item.position.ordinal + 1))
            .cloned();
    }
    for (time, positions) in &inside {
        let Some(all) = source.transactions.get(time) else { continue };
        expected.transactions += 1;
        for (position, uuid) in all {
            let entry = transaction.entries.get(uuid);
            let needed = entry.is_some_and(|e| matches!(e.presence, Presence::Present(_)) && e.ddl_through < *position);
            if whole && needed && !positions.contains(position) {
                return Err(format!("the source transaction at {time} is torn: {position} is missing"));
            }
        }
    }
    expected.documents =
        now.into_iter().filter_map(|((uuid, key), after)| Some(((here(&uuid)?, key), after))).collect();
    Ok(expected)
}

/// Plans as the real target does.
pub(crate) fn plan_of(transaction: &Transaction<'_>) -> Result<Vec<Step>, CommitError> {
    let steps = plan::plan(transaction.items, transaction.resolved, transaction.entries, transaction.floors);
    steps.map_err(|error| match error {
        plan::PlanError::NeedsFetch(_) => CommitError::Diverged(Divergence::Somewhere),
        other => TargetError::Fatal { message: other.to_string(), hint: "report it" }.into(),
    })
}

/// Positions of all lanes in order, if all are there.
pub(crate) fn positions(lanes: &BTreeMap<usize, LaneDocument>) -> Option<Vec<Position>> {
    LaneId::all().map(|lane| lanes.get(&lane.index()).map(|lane| lane.state.position)).collect()
}
