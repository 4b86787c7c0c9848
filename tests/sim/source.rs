//! The source's MongoDB in memory: documents, an oplog of raw change events as mongod 6.0.5 emits them, and every
//! version every document ever had, against which the target is judged.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use bson::{Binary, Bson, Document, RawDocumentBuf, doc, rawdoc, spec::BinarySubtype};
use bytes::Bytes;
use farshore::model::change::TRIMMED;
use farshore::model::{ClusterTime, CollectionUuid, Position, hash, raw};
use farshore::source::chunk::Reply;
use farshore::source::tail::{Reading, StartAt, Tail, TailError, TailStream};
use farshore::source::token::{self, Token};

use crate::world::{Shared, lock};

/// Seconds of the first cluster time.
const BASE: u32 = 1_700_000_000;
/// How long an idle `getMore` is held.
const AWAIT: Duration = Duration::from_millis(500);
/// How often the double looks for news.
const POLL: Duration = Duration::from_millis(10);

/// A collection of the source.
#[derive(Default)]
pub(crate) struct Collection {
    pub(crate) db: String,
    pub(crate) coll: String,
    pub(crate) documents: BTreeMap<u128, Document>,
    /// Names of its unique indexes; all are on `u`.
    pub(crate) unique: BTreeSet<String>,
}

/// A write of one document.
pub(crate) enum Write {
    Insert(Document),
    Replace(Document),
    Delete(Bson),
    /// The document after it, and the update description.
    Update(Document, Document),
}

struct Entry {
    position: Position,
    event: RawDocumentBuf,
    token: RawDocumentBuf,
    large: bool,
}

/// One version of a document: since when, and its bytes; none when it was deleted.
type Version = (Position, Option<Bytes>);

/// See the module text.
#[derive(Default)]
pub(crate) struct SourceDb {
    pub(crate) clock: ClusterTime,
    oplog: Vec<Entry>,
    /// Nothing before this time can be read any more.
    pub(crate) oldest: ClusterTime,
    pub(crate) collections: BTreeMap<CollectionUuid, Collection>,
    versions: BTreeMap<(CollectionUuid, u128), Vec<Version>>,
    /// Document changes of every multi-operation transaction.
    pub(crate) transactions: BTreeMap<ClusterTime, Vec<(Position, CollectionUuid)>>,
    uuids: u64,
    txn_number: i64,
    marks: i64,
    /// The primary is away until then.
    pub(crate) down_until: Duration,
}

pub(crate) fn identity(id: &Bson) -> u128 {
    let key = RawDocumentBuf::try_from(&doc! {"_id": id.clone()}).expect("encodes");
    hash::key_identity(&raw::get(&key, "_id").expect("present"))
}

pub(crate) fn encode(document: &Document) -> Bytes {
    Bytes::from(RawDocumentBuf::try_from(document).expect("encodes").into_bytes())
}

fn binary(uuid: CollectionUuid) -> Bson {
    Bson::Binary(Binary { subtype: BinarySubtype::Uuid, bytes: uuid.0.to_vec() })
}

/// `_data` of the token of the operation `index` at `time`, as a 6.0.5 server writes it.
fn event_token(time: ClusterTime, index: u32, uuid: Option<CollectionUuid>) -> RawDocumentBuf {
    let index = match index << 1 {
        0 => "29".to_owned(),
        doubled @ 1..=0xFF => format!("2B{doubled:02X}"),
        doubled => format!("2C{doubled:04X}"),
    };
    let uuid: String = uuid.map_or_else(String::new, |uuid| uuid.0.iter().map(|b| format!("{b:02X}")).collect());
    rawdoc! {"_data": format!("82{:016X}2B022C0100{index}296E5A1004{uuid}46645F6964000004", time.0)}
}

fn high_water(time: ClusterTime) -> RawDocumentBuf {
    rawdoc! {"_data": format!("82{:016X}2B0229296E04", time.0)}
}

impl SourceDb {
    /// The next cluster time: seconds follow the wall clock, the counter tells apart what happens within one.
    fn next_time(&mut self, now: Duration) -> ClusterTime {
        let seconds = BASE + u32::try_from(now.as_secs()).expect("short runs");
        let wall = ClusterTime::new(seconds, 1);
        self.clock = if wall > self.clock { wall } else { self.clock.next() };
        self.clock
    }

    /// Something happens that no change stream shows.
    pub(crate) fn noop(&mut self, now: Duration) {
        self.next_time(now);
    }

    /// A fresh collection UUID.
    pub(crate) fn uuid(&mut self) -> CollectionUuid {
        self.uuids += 1;
        let mut bytes = [0xA5; 16];
        bytes[8..].copy_from_slice(&self.uuids.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes());
        CollectionUuid(bytes)
    }

    pub(crate) fn named(&self, db: &str, coll: &str) -> Option<CollectionUuid> {
        let found = self.collections.iter().find(|(_, c)| c.db == db && c.coll == coll);
        found.map(|(uuid, _)| *uuid)
    }

    /// Position of the newest event.
    pub(crate) fn end(&self) -> Position {
        self.oplog.last().map_or(Position::ZERO, |entry| entry.position)
    }

    /// Events so far.
    pub(crate) fn len(&self) -> usize {
        self.oplog.len()
    }

    fn emit(&mut self, position: Position, uuid: Option<CollectionUuid>, large: bool, body: Document, txn: bool) {
        let token = event_token(position.time, position.ordinal - 1, uuid);
        let mut event = RawDocumentBuf::new();
        let mut body = body;
        // The server puts the new name of a rename before the token.
        if let Some(to) = body.remove("to") {
            let to = RawDocumentBuf::try_from(to.as_document().expect("a namespace")).expect("encodes");
            event.append(bson::cstr!("to"), to);
        }
        event.append(bson::cstr!("_id"), token.clone());
        body.insert("clusterTime", farshore::mongo::timestamp(position.time));
        body.insert("wallTime", bson::DateTime::from_millis(i64::from(position.time.seconds()) * 1000));
        if txn {
            body.insert("txnNumber", self.txn_number);
            body.insert("lsid", doc! {"id": binary(CollectionUuid([7; 16]))});
        }
        let body = RawDocumentBuf::try_from(&body).expect("encodes");
        for field in body.iter() {
            let (key, value) = field.expect("just encoded");
            event.append(key, bson::RawBson::from(value));
        }
        self.oplog.push(Entry { position, event, token, large });
    }

    /// Commits writes (and creates of collections) at one cluster time; more than one is a transaction.
    pub(crate) fn commit(
        &mut self,
        now: Duration,
        creates: Vec<(String, String)>,
        writes: Vec<(CollectionUuid, Write)>,
    ) {
        let time = self.next_time(now);
        let many = creates.len() + writes.len() > 1;
        self.txn_number += i64::from(many);
        let mut ordinal = 0;
        for (db, coll) in creates {
            ordinal += 1;
            self.create_at(Position::new(time, ordinal), &db, &coll, many);
        }
        for (uuid, write) in writes {
            ordinal += 1;
            let position = Position::new(time, ordinal);
            if many {
                self.transactions.entry(time).or_default().push((position, uuid));
            }
            self.write(position, uuid, write, many);
        }
    }

    fn write(&mut self, position: Position, uuid: CollectionUuid, write: Write, txn: bool) {
        let collection = self.collections.get_mut(&uuid).expect("the workload writes to what is there");
        let large = collection.coll == "big" && position.time.0.is_multiple_of(9) && !matches!(write, Write::Delete(_));
        let ns = doc! {"db": &collection.db, "coll": &collection.coll};
        let (op, key, after, details) = match write {
            Write::Insert(document) => {
                ("insert", document.get("_id").cloned(), Some(document.clone()), doc! {"fullDocument": document})
            }
            Write::Replace(document) => {
                ("replace", document.get("_id").cloned(), Some(document.clone()), doc! {"fullDocument": document})
            }
            Write::Delete(id) => ("delete", Some(id), None, doc! {}),
            Write::Update(document, diff) => (
                "update",
                document.get("_id").cloned(),
                Some(document),
                doc! {"rawUpdateDescription": {"$v": 2, "diff": diff}},
            ),
        };
        let key = key.expect("every document has an _id");
        let identity = identity(&key);
        let bytes = after.as_ref().map(encode);
        match after {
            Some(document) => collection.documents.insert(identity, document),
            None => collection.documents.remove(&identity),
        };
        self.versions.entry((uuid, identity)).or_default().push((position, bytes));
        let mut event =
            doc! {"operationType": op, "collectionUUID": binary(uuid), "ns": ns, "documentKey": {"_id": key}};
        event.extend(details);
        self.emit(position, Some(uuid), large, event, txn);
    }

    fn create_at(&mut self, position: Position, db: &str, coll: &str, txn: bool) -> CollectionUuid {
        let uuid = self.uuid();
        self.collections.insert(uuid, Collection { db: db.into(), coll: coll.into(), ..Collection::default() });
        let index = doc! {"v": 2, "key": {"_id": 1}, "name": "_id_"};
        let event = doc! {"operationType": "create", "collectionUUID": binary(uuid), "ns": {"db": db, "coll": coll},
        "operationDescription": {"idIndex": index}};
        self.emit(position, Some(uuid), false, event, txn);
        uuid
    }

    fn single(&mut self, now: Duration) -> Position {
        Position::new(self.next_time(now), 1)
    }

    pub(crate) fn create(&mut self, now: Duration, db: &str, coll: &str) -> CollectionUuid {
        let position = self.single(now);
        self.create_at(position, db, coll, false)
    }

    pub(crate) fn drop_collection(&mut self, now: Duration, uuid: CollectionUuid) {
        let position = self.single(now);
        let collection = self.collections.remove(&uuid).expect("there");
        let event = doc! {"operationType": "drop", "collectionUUID": binary(uuid),
        "ns": {"db": collection.db, "coll": collection.coll}};
        self.emit(position, Some(uuid), false, event, false);
    }

    pub(crate) fn drop_database(&mut self, now: Duration, db: &str) {
        let inside: Vec<_> = self.collections.iter().filter(|(_, c)| c.db == db).map(|(uuid, _)| *uuid).collect();
        for uuid in inside {
            self.drop_collection(now, uuid);
        }
        let position = self.single(now);
        self.emit(position, None, false, doc! {"operationType": "dropDatabase", "ns": {"db": db}}, false);
    }

    pub(crate) fn rename(&mut self, now: Duration, uuid: CollectionUuid, coll: &str, replaced: Option<CollectionUuid>) {
        let position = self.single(now);
        if let Some(replaced) = replaced {
            self.collections.remove(&replaced);
        }
        let collection = self.collections.get_mut(&uuid).expect("there");
        let from = doc! {"db": &collection.db, "coll": &collection.coll};
        coll.clone_into(&mut collection.coll);
        let to = doc! {"db": &collection.db, "coll": coll};
        let mut description = doc! {"to": to.clone()};
        if let Some(replaced) = replaced {
            description.insert("dropTarget", binary(replaced));
        }
        let event = doc! {"operationType": "rename", "collectionUUID": binary(uuid), "ns": from, "to": to,
        "operationDescription": description};
        self.emit(position, Some(uuid), false, event, false);
    }

    pub(crate) fn unique_index(&mut self, now: Duration, uuid: CollectionUuid, create: bool) {
        let position = self.single(now);
        let collection = self.collections.get_mut(&uuid).expect("there");
        let ns = doc! {"db": &collection.db, "coll": &collection.coll};
        let op = if create { "createIndexes" } else { "dropIndexes" };
        if create {
            collection.unique.insert("u_1".into());
        } else {
            collection.unique.remove("u_1");
        }
        let index = doc! {"v": 2, "key": {"u": 1}, "name": "u_1", "unique": true};
        let event = doc! {"operationType": op, "collectionUUID": binary(uuid), "ns": ns,
        "operationDescription": {"indexes": [index]}};
        self.emit(position, Some(uuid), false, event, false);
    }

    /// A heartbeat mark.
    pub(crate) fn mark(&mut self, now: Duration) {
        let position = self.single(now);
        self.marks += 1;
        let uuid = CollectionUuid([0xFF; 16]);
        let event = doc! {"operationType": "update", "collectionUUID": binary(uuid),
        "ns": {"db": "farshore", "coll": "marks"}, "documentKey": {"_id": "north"},
        "rawUpdateDescription": {"$v": 2, "diff": {"u": {"n": self.marks}}}};
        self.emit(position, Some(uuid), false, event, false);
    }

    /// What the document was right before `position`.
    pub(crate) fn before(&self, uuid: CollectionUuid, key: u128, position: Position) -> Option<&Bytes> {
        let versions = self.versions.get(&(uuid, key))?;
        versions.iter().take_while(|(at, _)| *at < position).last()?.1.as_ref()
    }

    /// What the document was after everything of `time`.
    pub(crate) fn at(&self, uuid: CollectionUuid, key: u128, time: ClusterTime) -> Option<&Bytes> {
        self.before(uuid, key, Position::through(time))
    }

    /// One reply of a change stream, if there is news. An oversized change spoils the whole reply it would be in, as it does on a real server.
    fn reply(&self, after: &mut Position, reading: Reading, most: usize) -> Result<Option<Reply>, TailError> {
        let from = self.oplog.partition_point(|entry| entry.position <= *after);
        let most = if reading == Reading::Batches { most } else { 1 };
        let trimmed = reading == Reading::Trimmed;
        let mut batch = bson::RawArrayBuf::new();
        let mut last = None;
        let mut all = true;
        for (count, entry) in self.oplog[from..].iter().enumerate() {
            if count >= most {
                all = false;
                break;
            }
            if entry.large && !trimmed {
                return Err(TailError::TooLarge);
            }
            batch.push(if trimmed { trim(&entry.event) } else { entry.event.clone() });
            last = Some(entry);
        }
        let token = match last {
            None if self.clock <= after.time => return Ok(None),
            Some(entry) if !all || self.clock == entry.position.time => {
                *after = entry.position;
                entry.token.clone()
            }
            _ => {
                *after = Position::before(self.clock);
                high_water(self.clock)
            }
        };
        let cursor =
            rawdoc! {"nextBatch": batch, "postBatchResumeToken": token, "id": 5_i64, "ns": "admin.$cmd.aggregate"};
        Ok(Some(Reply::new(rawdoc! {"cursor": cursor, "ok": 1.0})))
    }

    /// The oplog loses what lies before the last event before `floor`: a stream resumes after one that is still there. Says whether
    /// that is more than before.
    pub(crate) fn truncate(&mut self, floor: Position) -> bool {
        let before = self.oplog.partition_point(|entry| entry.position < floor);
        let oldest = before.checked_sub(1).map_or(ClusterTime(0), |last| self.oplog[last].position.time);
        let more = oldest > self.oldest;
        self.oldest = self.oldest.max(oldest);
        more
    }

    /// What a change stream after `after` needs is still there.
    fn reaches(&self, after: Position) -> Result<(), TailError> {
        match after.time < self.oldest {
            true => Err(TailError::HistoryLost(format!("the oplog begins at {}, not at {after}", self.oldest))),
            false => Ok(()),
        }
    }

    fn idle_reply(&self, after: Position) -> Reply {
        let token = match self.oplog.iter().rev().find(|entry| entry.position == after) {
            Some(entry) => entry.token.clone(),
            None => high_water(after.time),
        };
        Reply::new(rawdoc! {"cursor": {"nextBatch": [], "postBatchResumeToken": token, "id": 5_i64}, "ok": 1.0})
    }
}

/// The event as `$project` leaves it when documents are too large.
fn trim(event: &RawDocumentBuf) -> RawDocumentBuf {
    let mut trimmed = Document::try_from(event).expect("our own");
    trimmed.remove("fullDocument");
    trimmed.remove("rawUpdateDescription");
    trimmed.insert(TRIMMED, true);
    RawDocumentBuf::try_from(&trimmed).expect("encodes")
}

/// Tails the double.
pub(crate) struct SimTail(pub(crate) Shared);

/// An open change stream of the double.
pub(crate) struct SimStream {
    world: Shared,
    after: Position,
    reading: Reading,
}

impl Tail for SimTail {
    type Stream = SimStream;

    async fn open(&self, at: &StartAt, reading: Reading) -> Result<SimStream, TailError> {
        let wait = lock(&self.0).latency();
        tokio::time::sleep(wait).await;
        lock(&self.0).source_up()?;
        let after = match at {
            StartAt::Time(time) => Position::before(*time),
            StartAt::After(bytes) => {
                let token = bson::RawDocument::from_bytes(bytes).expect("tokens are stored whole");
                match token::decode(token).expect("our own token") {
                    Token::HighWater(time) => Position::before(time),
                    Token::Change(position) => position,
                }
            }
        };
        lock(&self.0).source.reaches(after)?;
        Ok(SimStream { world: self.0.clone(), after, reading })
    }
}

impl TailStream for SimStream {
    fn single_change_units(&self) -> bool {
        lock(&self.world).settings.single_change_units
    }

    async fn next(&mut self) -> Result<Reply, TailError> {
        let wait = lock(&self.world).latency();
        tokio::time::sleep(wait).await;
        let idle_at = tokio::time::Instant::now() + AWAIT;
        loop {
            {
                let mut world = lock(&self.world);
                world.source_up()?;
                world.source.reaches(self.after)?;
                let most = world.batch_size();
                if let Some(reply) = world.source.reply(&mut self.after, self.reading, most)? {
                    return Ok(reply);
                }
                if tokio::time::Instant::now() >= idle_at {
                    return Ok(world.source.idle_reply(self.after));
                }
            }
            tokio::time::sleep(POLL).await;
        }
    }
}
