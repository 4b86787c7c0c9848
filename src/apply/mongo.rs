//! The real target: lane transactions on the local MongoDB.
//!
//! Every transaction's first statement updates its lane documents filtered by term *and* by the position this process
//! believes they have. So a stale agent commits nothing, and neither does an agent whose earlier commits were rolled back
//! with a failed primary.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use bson::raw::{RawDocument, RawDocumentBuf};
use bson::{Document, doc};
use futures::StreamExt as _;
use mongodb::options::{Acknowledgment, ReadConcern, WriteConcern};
use mongodb::{Client, ClientSession};
use tokio::sync::Mutex;
use tokio::time::Instant;

use super::catalog::{Entries, Entry, Presence};
use super::lanes::{Item, LaneState, LaneStep};
use super::plan::{self, Step};
use super::reply::{WriteError, first_write_error, hint_of, plan_error};
use super::store;
use super::suspects::{self, key_of};
use super::target::{
    Cause, Claim, CommitError, DdlStep, Divergence, Election, StreamRecord, Suspect, Target, TargetError, Transaction,
};
use crate::model::raw::{self, Writer};
use crate::model::{CollectionUuid, LaneId, Position, StreamHash, StreamId, Term, hash};
use crate::mongo::{self, Failure, code};

pub(super) const DB: &str = "farshore";

impl From<Failure> for TargetError {
    fn from(failure: Failure) -> Self {
        let message = failure.to_string();
        match failure.code() {
            None if failure.server_code == Some(code::WRITE_CONFLICT) => Self::Conflict(message),
            None if failure.is_transient() => Self::Transient(message),
            Some(code::TOO_LARGE_FOR_CACHE) => Self::TooLarge(message),
            Some(code::USER_WRITES_BLOCKED) => Self::Fatal {
                message,
                hint: "the agent's user needs the privilege bypassWriteBlockingMode; see the role in the README",
            },
            Some(code::UNAUTHORIZED | code::AUTHENTICATION_FAILED) => {
                Self::Fatal { message, hint: "grant the agent's user the role in the README" }
            }
            Some(code) => Self::Fatal { message, hint: hint_of(code) },
            None => Self::Fatal { message, hint: "see the message of MongoDB" },
        }
    }
}

impl From<store::StoreError> for TargetError {
    fn from(error: store::StoreError) -> Self {
        Self::Fatal {
            message: error.to_string(),
            hint: "the target's farshore database was written by another version or by hand",
        }
    }
}

/// After a claim DDL waits for so long for a command an earlier session may have sent.
pub const SETTLING: Duration = Duration::from_secs(1);
/// A DDL command is sent within this of a look at the term, or not at all; the rest of [`SETTLING`] is for its way.
pub const FRESH: Duration = Duration::from_millis(500);

/// The sessions and the term of a claim.
#[derive(Debug, Default)]
struct Held {
    term: Term,
    /// When the claim was complete.
    since: Option<Instant>,
    /// One for each worker, and the last for DDL: all on record, so that a successor can free what they leave open.
    sessions: Vec<Arc<Mutex<ClientSession>>>,
}

/// See the module text.
#[derive(Debug)]
pub struct MongoTarget {
    pub(super) client: Client,
    pub(super) stream: StreamId,
    held: tokio::sync::RwLock<Held>,
    errors: std::sync::Mutex<BTreeMap<i32, u64>>,
}

impl MongoTarget {
    /// The target of `stream` behind `client`.
    pub fn new(client: Client, stream: StreamId) -> Self {
        Self { client, stream, held: tokio::sync::RwLock::default(), errors: std::sync::Mutex::default() }
    }

    fn count_error(&self, code: i32) {
        *self.errors.lock().unwrap_or_else(PoisonError::into_inner).entry(code).or_default() += 1;
    }

    /// [`Failure::of`] that is counted.
    pub(super) fn failed(&self, doing: &'static str) -> impl FnOnce(mongodb::error::Error) -> Failure {
        move |error| self.counted(Failure::of(doing)(error))
    }

    pub(super) fn counted(&self, failure: Failure) -> Failure {
        if let Some(code) = failure.server_code {
            self.count_error(code);
        }
        failure
    }

    /// The first write error of a reply, counted.
    fn write_error(&self, reply: &Document) -> Option<WriteError> {
        let error = first_write_error(reply)?;
        self.count_error(error.code);
        Some(error)
    }

    fn lane_id(&self, lane: LaneId) -> String {
        format!("{}/{lane}", self.stream)
    }

    /// The id of the document every DDL step updates first: the fence against stale agents.
    fn stream_id(&self) -> String {
        self.stream.to_string()
    }

    /// The session of DDL transactions.
    pub(super) async fn ddl_session(&self) -> Result<Arc<Mutex<ClientSession>>, TargetError> {
        let last = self.held.read().await.sessions.last().cloned();
        last.ok_or_else(|| TargetError::Moved("the stream is not claimed".into()))
    }

    pub(super) async fn term(&self) -> Term {
        self.held.read().await.term
    }

    async fn stored_stream(&self) -> Result<Option<Document>, TargetError> {
        let streams = self.client.database(DB).collection::<Document>("streams");
        let found = streams.find_one(doc! {"_id": self.stream_id()}).read_concern(ReadConcern::majority()).await;
        Ok(found.map_err(Failure::of("read the stream"))?)
    }

    /// Runs an update with majority write concern and returns how many documents matched.
    pub(super) async fn update(
        &self,
        collection: &str,
        statements: Vec<Document>,
        doing: &'static str,
    ) -> Result<i32, TargetError> {
        let command = doc! {"update": collection, "updates": statements, "ordered": true};
        let reply = mongo::run_majority(&self.client, DB, command, doing).await.map_err(|f| self.counted(f))?;
        if let Some(error) = self.write_error(&reply) {
            return match error.code {
                code::DUPLICATE_KEY => Ok(0),
                other => {
                    Err(TargetError::Fatal { message: format!("{doing}: {}", error.message), hint: hint_of(other) })
                }
            };
        }
        Ok(reply.get_i32("n").unwrap_or(0))
    }

    /// Fails unless this process still holds the stream; also makes everything read before it safe to act upon.
    pub(super) async fn guard(&self, position: Position) -> Result<(), TargetError> {
        let term = self.term().await;
        let q = doc! {"_id": self.stream_id(), "term": term.0 as i64};
        let statement = doc! {"q": q, "u": {"$set": {"ddl": store::position(position)}}};
        match self.update("streams", vec![statement], "claim a ddl step").await? {
            1 => Ok(()),
            _ => Err(self.not_ours().await),
        }
    }

    /// To be called right before a DDL command is sent. Nothing can tie such a command to the term, so one of an earlier
    /// session may still be on its way after a claim. It was sent within [`FRESH`] of a look at the record, and whoever
    /// claimed waits for [`SETTLING`] before the first command of his own, which then comes after it.
    pub(super) async fn about_to_send(&self) -> Result<(), TargetError> {
        let since = self.held.read().await.since;
        if let Some(since) = since {
            tokio::time::sleep_until(since + SETTLING).await;
        }
        let looked = Instant::now();
        let held = doc! {"_id": self.stream_id(), "term": self.term().await.0 as i64};
        let streams = self.client.database(DB).collection::<Document>("streams");
        let found = streams.find_one(held).projection(doc! {"_id": 1}).await.map_err(self.failed("look at the term"));
        if found.map_err(TargetError::from)?.is_none() {
            return Err(self.not_ours().await);
        }
        match looked.elapsed() < FRESH {
            true => Ok(()),
            false => Err(TargetError::Transient("the target answers too slowly for ddl to be safe".into())),
        }
    }

    /// Why a term-filtered statement matched nothing.
    async fn not_ours(&self) -> TargetError {
        match self.stored_stream().await {
            Err(error) => error,
            Ok(Some(stream)) => {
                let term = Term(stream.get_i64("term").unwrap_or(0) as u64);
                if term > self.term().await {
                    TargetError::Deposed(term)
                } else {
                    TargetError::Moved("a lane is not where this process left it".into())
                }
            }
            Ok(None) => TargetError::Fatal {
                message: format!("the record of stream {} is gone", self.stream),
                hint: "somebody removed farshore.streams at the target; the stream must begin again",
            },
        }
    }

    async fn kill_earlier_sessions(&self, stream: &Document) -> Result<(), TargetError> {
        let sessions: Vec<Document> =
            stream.get_array("sessions").into_iter().flatten().filter_map(|s| s.as_document().cloned()).collect();
        if sessions.is_empty() {
            return Ok(());
        }
        let reply = self.client.database("admin").run_command(doc! {"killSessions": sessions}).await;
        reply.map_err(Failure::of("free the sessions of an earlier agent"))?;
        Ok(())
    }

    async fn read_lanes(&self) -> Result<BTreeMap<String, LaneState>, TargetError> {
        let filter = doc! {"stream": self.stream_id()};
        let lanes = self.client.database(DB).collection::<Document>("lanes");
        let doing = || Failure::of("read the lanes");
        let mut cursor = lanes.find(filter).read_concern(ReadConcern::majority()).await.map_err(doing())?;
        let mut found = BTreeMap::new();
        while let Some(lane) = cursor.next().await.transpose().map_err(doing())? {
            found.insert(lane.get_str("_id").unwrap_or("").to_owned(), store::read_lane(&lane)?);
        }
        Ok(found)
    }

    async fn read_entries(&self) -> Result<Entries, TargetError> {
        let catalog = self.client.database(DB).collection::<Document>("catalog");
        let doing = || Failure::of("read the catalog");
        let filter = doc! {"_id.stream": self.stream_id()};
        let mut cursor = catalog.find(filter).read_concern(ReadConcern::majority()).await.map_err(doing())?;
        let mut entries = Entries::new();
        while let Some(entry) = cursor.next().await.transpose().map_err(doing())? {
            entries.extend(store::read_entry(&entry)?);
        }
        Ok(entries)
    }

    fn lanes_command(&self, term: Term, lanes: &[LaneStep]) -> RawDocumentBuf {
        let mut command = Writer::with_capacity(lanes.len() * 160);
        command.value("update", "lanes");
        command.begin_array("updates");
        for (index, step) in lanes.iter().enumerate() {
            command.begin_item(index);
            command.begin_document("q");
            command.value("_id", self.lane_id(step.lane).as_str());
            command.value("term", term.0 as i64);
            write_position(&mut command, "position", step.from.position);
            command.end();
            command.begin_document("u");
            if step.from.parked == step.to.parked && step.from.floors == step.to.floors {
                command.begin_document("$set");
                write_position(&mut command, "position", step.to.position);
                command.end();
            } else {
                let fields = store::lane_fields(&step.from, &step.to);
                let fields = RawDocumentBuf::try_from(&fields).expect("documents of our own encode");
                command.embed("$set", &fields);
            }
            command.end();
            command.end();
        }
        command.end();
        command.finish()
    }

    async fn run_transaction(
        &self,
        session: &mut ClientSession,
        term: Term,
        transaction: Transaction<'_>,
        steps: Vec<Step>,
    ) -> Result<(), CommitError> {
        let reply = self.run(session, DB, self.lanes_command(term, transaction.lanes), "move the lanes").await?;
        if let Some(error) = self.write_error(&reply) {
            return Err(error.into_target("move the lanes").into());
        }
        if reply.get_i32("n").unwrap_or(0) as usize != transaction.lanes.len() {
            return Err(self.not_ours().await.into());
        }
        for step in steps {
            match step {
                Step::Run { db, collection, body, expected } => {
                    self.run_step(session, &db, collection, body, expected).await?;
                }
                Step::Patch { entry, collection, changes } => {
                    self.run_patch(session, &entry, collection, &changes).await?
                }
            }
        }
        Ok(())
    }

    async fn run(
        &self,
        session: &mut ClientSession,
        db: &str,
        command: RawDocumentBuf,
        doing: &'static str,
    ) -> Result<Document, TargetError> {
        Ok(mongo::run(&self.client, db, command, Some(session), doing).await.map_err(|f| self.counted(f))?)
    }

    pub(super) async fn run_step(
        &self,
        session: &mut ClientSession,
        db: &str,
        collection: CollectionUuid,
        body: RawDocumentBuf,
        expected: Option<usize>,
    ) -> Result<(), CommitError> {
        let reply = self.run(session, db, body, "apply changes").await?;
        if let Some(error) = self.write_error(&reply) {
            return Err(error.into_commit(collection));
        }
        let matched = reply.get_i32("n").unwrap_or(0) as usize;
        match expected {
            Some(expected) if matched != expected => Err(CommitError::Diverged(Divergence::Somewhere)),
            _ => Ok(()),
        }
    }

    /// Which of these keys exist, outside of any transaction.
    async fn existing(&self, entry: &Entry, keys: &[RawDocumentBuf]) -> Result<BTreeSet<u128>, TargetError> {
        let mut found = BTreeSet::new();
        for part in keys.chunks(500) {
            let command = find_command(entry, part.iter().map(|key| &**key), true);
            let cursor = self.client.database(&entry.db).run_raw_cursor_command(command).batch().await;
            let mut cursor = cursor.map_err(Failure::of("look for diverged documents"))?;
            while let Some(batch) =
                cursor.next().await.transpose().map_err(Failure::of("look for diverged documents"))?
            {
                let documents = batch.doc_slices().map_err(Failure::of("look for diverged documents"))?;
                let ids = documents.into_iter().filter_map(|d| raw::get(d.ok()?.as_document()?, "_id"));
                found.extend(ids.map(|id| hash::key_identity(&id)));
            }
        }
        Ok(found)
    }
}

fn write_position(writer: &mut Writer, key: &str, position: Position) {
    writer.begin_document(key);
    writer.value("time", mongo::timestamp(position.time));
    writer.value("ordinal", i64::from(position.ordinal));
    writer.end();
}

pub(super) fn find_command<'a>(
    entry: &Entry,
    keys: impl Iterator<Item = &'a RawDocument>,
    ids_only: bool,
) -> RawDocumentBuf {
    let mut command = Writer::document();
    command.value("find", entry.coll.as_str());
    if let Presence::Present(target) = entry.presence {
        command.uuid("collectionUUID", target.0);
    }
    command.begin_document("filter");
    command.begin_document("_id");
    command.begin_array("$in");
    for (index, key) in keys.enumerate() {
        if let Some(id) = raw::get(key, "_id") {
            command.copy_item(index, &id);
        }
    }
    command.end();
    command.end();
    command.end();
    if ids_only {
        command.begin_document("projection");
        command.value("_id", 1_i32);
        command.end();
    }
    command.finish()
}

impl Target for MongoTarget {
    async fn record(&self) -> Result<Option<StreamRecord>, TargetError> {
        let stored = self.stored_stream().await?;
        let begun = stored.filter(|stream| stream.contains_key("incarnation"));
        Ok(begun.map(|stream| store::read_stream(&stream)).transpose()?)
    }

    async fn begin(&self, record: &StreamRecord, term: Term) -> Result<(), TargetError> {
        let mut fields = store::stream_fields(record);
        fields.insert("term", term.0 as i64);
        let statement = doc! {"q": {"_id": self.stream_id()}, "u": {"$setOnInsert": fields}, "upsert": true};
        self.update("streams", vec![statement], "begin the stream").await?;
        Ok(())
    }

    async fn claim(&self, term: Term, workers: usize) -> Result<Claim, TargetError> {
        let gone = || TargetError::Moved("the stream has not begun".into());
        let stream = self.stored_stream().await?.ok_or_else(gone)?;
        let stored_term = Term(stream.get_i64("term").unwrap_or(0) as u64);
        if stored_term > term {
            return Err(TargetError::Deposed(stored_term));
        }
        self.kill_earlier_sessions(&stream).await?;
        mongo::block_users(&self.client).await?;
        let mut sessions = Vec::with_capacity(workers + 1);
        for _ in 0..=workers {
            let session = self.client.start_session().await.map_err(Failure::of("start a session"))?;
            sessions.push(session);
        }
        // The sessions are on record before any of them opens a transaction.
        let ids: Vec<Document> = sessions.iter().map(|session| session.id().clone()).collect();
        let below = doc! {"$lte": term.0 as i64};
        let q = doc! {"_id": self.stream_id(), "term": below.clone()};
        let statement = doc! {"q": q, "u": {"$set": {"term": term.0 as i64, "sessions": ids}}};
        if self.update("streams", vec![statement], "take the stream over").await? != 1 {
            return Err(self.not_ours().await);
        }
        let record = store::read_stream(&self.stored_stream().await?.ok_or_else(gone)?)?;
        let statement = |lane| {
            let first =
                doc! {"stream": self.stream_id(), "version": store::VERSION, "position": store::position(record.floor)};
            doc! {
                "q": {"_id": self.lane_id(lane), "term": below.clone()},
                "u": {"$set": {"term": term.0 as i64}, "$setOnInsert": first},
                "upsert": true,
            }
        };
        let claimed = self.update("lanes", LaneId::all().map(statement).collect(), "take the lanes over").await?;
        if claimed as usize != LaneId::COUNT {
            return Err(self.not_ours().await);
        }
        let mut stored = self.read_lanes().await?;
        let missing = || TargetError::Moved("a lane is missing".into());
        let lanes = LaneId::all().map(|lane| stored.remove(&self.lane_id(lane)).ok_or_else(missing));
        let lanes = self.lift(lanes.collect::<Result<Vec<_>, _>>()?, record.floor, term).await?;
        let entries = self.read_entries().await?;
        *self.held.write().await = Held {
            term,
            since: Some(Instant::now()),
            sessions: sessions.into_iter().map(|session| Arc::new(Mutex::new(session))).collect(),
        };
        Ok(Claim { record, lanes, entries })
    }

    async fn commit(&self, worker: usize, transaction: Transaction<'_>) -> Result<(), CommitError> {
        let steps = plan::plan(transaction.items, transaction.resolved, transaction.entries, transaction.floors);
        let steps = steps.map_err(plan_error)?;
        let held = self.held.read().await;
        let mut session = held.sessions[worker].lock().await;
        let w1 = WriteConcern::builder().w(Acknowledgment::Nodes(1)).build();
        session
            .start_transaction()
            .write_concern(w1)
            .await
            .map_err(self.failed("start a transaction"))
            .map_err(TargetError::from)?;
        match self.run_transaction(&mut session, held.term, transaction, steps).await {
            Ok(()) => match session.commit_transaction().await.map_err(self.failed("commit a transaction")) {
                Ok(()) => Ok(()),
                Err(failure) if failure.transaction_aborted => Err(TargetError::from(failure).into()),
                // Committed or not: only the stored lanes can tell.
                Err(failure) => Err(TargetError::Moved(failure.to_string()).into()),
            },
            Err(error) => {
                // An aborted transaction is what is wanted; the server ends it by itself when this fails.
                drop(session.abort_transaction().await);
                Err(error)
            }
        }
    }

    async fn examine(
        &self,
        items: &[Item],
        entries: &Entries,
        divergence: &Divergence,
    ) -> Result<Vec<Suspect>, TargetError> {
        let mut suspects = Vec::new();
        match divergence {
            Divergence::Unique { collection, fields } => {
                let Some(entry) = entries.get(collection) else { return Ok(suspects) };
                for (identity, key) in self.holders(entry, *collection, fields, items).await? {
                    suspects.push(Suspect { collection: *collection, identity, key, cause: Cause::Unique });
                }
            }
            Divergence::Document { collection, identity, cause } => {
                suspects.extend(suspects::named(items, *collection, *identity, *cause));
            }
            Divergence::Ahead { .. } => return Ok(suspects),
            Divergence::Somewhere => {}
        }
        suspects.extend(self.unmatched(items, entries).await?);
        Ok(suspects)
    }

    async fn forget(&self, through: Position) -> Result<(), TargetError> {
        let dropped =
            doc! {"_id.stream": self.stream_id(), "state": "dropped", "ddlThrough": {"$lte": store::position(through)}};
        let command = doc! {"delete": "catalog", "deletes": [{"q": dropped, "limit": 0}]};
        mongo::run_majority(&self.client, DB, command, "forget dropped collections")
            .await
            .map_err(|f| self.counted(f))?;
        Ok(())
    }

    fn errors(&self) -> BTreeMap<i32, u64> {
        self.errors.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    async fn confirm(&self, floor: Option<(Position, StreamHash)>) -> Result<(Vec<Position>, Election), TargetError> {
        let term = self.term().await;
        let mut set = doc! {"confirmed": bson::DateTime::now()};
        if let Some((position, hash)) = floor {
            set.insert("floor", store::position(position));
            set.insert("hash", hash.0 as i64);
        }
        let statement = doc! {"q": {"_id": self.stream_id(), "term": term.0 as i64}, "u": {"$set": set}};
        if self.update("streams", vec![statement], "confirm the lanes").await? != 1 {
            return Err(self.not_ours().await);
        }
        let mut stored = self.read_lanes().await?;
        let missing = || TargetError::Moved("a lane is missing".into());
        let positions =
            LaneId::all().map(|lane| stored.remove(&self.lane_id(lane)).map(|l| l.position).ok_or_else(missing));
        let positions = positions.collect::<Result<Vec<_>, _>>()?;
        let hello = self.client.database("admin").run_command(doc! {"hello": 1}).await;
        let hello = hello.map_err(Failure::of("ask who is primary"))?;
        Ok((positions, hello.get_object_id("electionId").ok()))
    }

    async fn ddl(
        &self,
        position: Position,
        step: &DdlStep,
        entries: &Entries,
    ) -> Result<Vec<(CollectionUuid, Entry)>, TargetError> {
        super::ddl::run(self, position, step, entries).await
    }
}

impl MongoTarget {
    /// Moves lanes that had nothing to do up to the floor, so that stored and believed positions agree.
    async fn lift(&self, stored: Vec<LaneState>, floor: Position, term: Term) -> Result<Vec<LaneState>, TargetError> {
        let lifted: Vec<LaneState> = stored.iter().map(|lane| lane.clone().lifted(floor)).collect();
        let moved = LaneId::all().zip(stored.iter().zip(&lifted)).filter(|(_, (from, to))| from != to);
        let statement = |(lane, (from, to)): (LaneId, (&LaneState, &LaneState))| {
            let q = doc! {"_id": self.lane_id(lane), "term": term.0 as i64};
            doc! {"q": q, "u": {"$set": store::lane_fields(from, to)}}
        };
        let statements: Vec<Document> = moved.map(statement).collect();
        let count = statements.len();
        if count > 0 && self.update("lanes", statements, "lift the lanes").await? as usize != count {
            return Err(self.not_ours().await);
        }
        Ok(lifted)
    }

    /// Updates, replacements and deletes whose document is not there, and inserts whose `_id` is, found by looking.
    async fn unmatched(&self, items: &[Item], entries: &Entries) -> Result<Vec<Suspect>, TargetError> {
        let mut keys: BTreeMap<CollectionUuid, Vec<RawDocumentBuf>> = BTreeMap::new();
        for item in items {
            if let Some(key) = key_of(item) {
                keys.entry(item.collection).or_default().push(key);
            }
        }
        let mut there: BTreeSet<(CollectionUuid, u128)> = BTreeSet::new();
        for (uuid, keys) in &keys {
            if let Some(entry) = entries.get(uuid) {
                there.extend(self.existing(entry, keys).await?.into_iter().map(|identity| (*uuid, identity)));
            }
        }
        Ok(suspects::unmatched(items, there))
    }
}
