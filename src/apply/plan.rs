//! Turns the changes of one job into the commands of one transaction (pure).
//!
//! Commands are grouped by collection and kind, so that a thousand changes are a few commands; the order of the changes
//! of one document is kept. Collections with unique indexes or a collation keep the order of all their changes.

use std::collections::{BTreeMap, HashMap};

use bson::raw::{RawDocument, RawDocumentBuf};
use bytes::Bytes;

use super::catalog::{Entries, Entry, Presence};
use super::diff::{self, Diff, DiffError};
use super::lanes::{Floor, Item};
use crate::model::change::ParseError;
use crate::model::raw::{self, Element, Writer};
use crate::model::{Change, ClusterTime, CollectionUuid, Op};

/// Statements in one command, at most.
const COMMAND_STATEMENTS: usize = 1_000;
/// Bytes a command begins with when nothing is known of its size.
const SMALL_COMMAND: usize = 16 << 10;
/// Bytes of one command before another is begun; one document more may follow, up to [`COMMAND_LIMIT`].
pub(super) const COMMAND_BYTES: usize = 8 << 20;
/// The server takes commands of 16 MiB and 16 KiB.
pub(super) const COMMAND_LIMIT: usize = 16 << 20;

/// A document as the source has it at `at`; written in place of whatever the target has (rule K).
#[derive(Clone, Debug)]
pub struct Resolved {
    /// Collection at the source, identity of the document, and the time of the read.
    pub floor: Floor,
    /// `{_id: ...}`.
    pub key: RawDocumentBuf,
    /// The document; none when the source does not have it.
    pub document: Option<Bytes>,
}

/// What a command does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// `insert`.
    Insert,
    /// `update`, for updates and replacements.
    Update,
    /// Updates whose documents must be read first.
    Patch,
    /// `delete`.
    Delete,
}

/// One step of a transaction.
#[derive(Debug)]
pub enum Step {
    /// Run a command; `expected` statements must match, unless any number may.
    Run { db: String, collection: CollectionUuid, body: RawDocumentBuf, expected: Option<usize> },
    /// Read these documents, apply the diffs, write them back.
    Patch { entry: Entry, collection: CollectionUuid, changes: Vec<Patch> },
}

/// A diff that needs its document.
#[derive(Clone, Debug)]
pub struct Patch {
    /// `{_id: ...}`.
    pub key: RawDocumentBuf,
    /// Canonical identity.
    pub identity: u128,
    /// The diff.
    pub update: RawDocumentBuf,
}

/// Why a job cannot be planned.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// A stored change cannot be read.
    #[error(transparent)]
    Change(#[from] ParseError),
    /// An update's diff cannot be read.
    #[error("change at {position}: {source}")]
    Diff { position: crate::model::Position, source: DiffError },
    /// A change of a collection the catalog does not have.
    #[error("change at {position}: collection {collection} is not in the catalog")]
    Unknown { position: crate::model::Position, collection: CollectionUuid },
    /// The change came without its document.
    #[error("change at {0} must be fetched again")]
    NeedsFetch(crate::model::Position),
    /// Others of its collection, whose `_id`s may be the same to the server, are ahead of the change.
    #[error("change at {position}: others of its collection are ahead")]
    Ahead { position: crate::model::Position, collection: CollectionUuid },
}

/// Documents that are ahead of their lane, by collection and identity.
pub type Floors = BTreeMap<(CollectionUuid, u128), ClusterTime>;

/// Plans one transaction: fetched documents first, then the changes.
///
/// # Errors
/// See [`PlanError`].
pub fn plan(items: &[Item], resolved: &[Resolved], catalog: &Entries, floors: &Floors) -> Result<Vec<Step>, PlanError> {
    let mut ahead = floors.clone();
    let mut steps = Vec::new();
    resolve(resolved, catalog, &mut ahead, &mut steps);
    let mut collections: Vec<(CollectionUuid, Grouper<'_>)> = Vec::new();
    let mut index: HashMap<CollectionUuid, usize> = HashMap::new();
    // For the first collection only: a job of very many must not take as much for each.
    let mut expected = Expected::of(items);
    for item in items {
        if ahead.get(&(item.collection, item.key)).is_some_and(|at| *at >= item.position.time) {
            continue;
        }
        let unknown = PlanError::Unknown { position: item.position, collection: item.collection };
        let entry = catalog.get(&item.collection).ok_or(unknown)?;
        let Presence::Present(_) = entry.presence else { continue };
        if entry.collation && others_ahead(&ahead, item)? {
            return Err(PlanError::Ahead { position: item.position, collection: item.collection });
        }
        let slot = *index.entry(item.collection).or_insert_with(|| {
            collections.push((item.collection, Grouper::new(entry, std::mem::take(&mut expected))));
            collections.len() - 1
        });
        collections[slot].1.add(item)?;
    }
    for (uuid, grouper) in collections {
        grouper.finish(uuid, &mut steps);
    }
    Ok(steps)
}

/// Whether another document, whose `_id` may be the same to the server, is ahead of the change: only strings are compared by
/// a collation.
fn others_ahead(floors: &Floors, item: &Item) -> Result<bool, ParseError> {
    let collection = (item.collection, u128::MIN)..=(item.collection, u128::MAX);
    if !floors.range(collection).any(|(_, at)| *at >= item.position.time) {
        return Ok(false);
    }
    let document = RawDocument::from_bytes(&item.bytes).map_err(|_| ParseError::Bson { position: item.position })?;
    Ok(Change::parse(item.position, document)?.id().is_some_and(|id| raw::holds_string(&id)))
}

fn resolve(resolved: &[Resolved], catalog: &Entries, ahead: &mut Floors, steps: &mut Vec<Step>) {
    // All removals first: a stale document must not block a value of a fresh one.
    for kind in [Kind::Delete, Kind::Insert] {
        for one in resolved {
            ahead.insert((one.floor.collection, one.floor.key), one.floor.at);
            let Some(entry) = catalog.get(&one.floor.collection) else { continue };
            let Presence::Present(_) = entry.presence else { continue };
            let group = match (kind, &one.document) {
                (Kind::Delete, _) => {
                    let mut group = Group::new(Kind::Delete, entry, SMALL_COMMAND);
                    group.delete(&one.key);
                    group
                }
                (Kind::Insert, Some(document)) => Group::of_document(&one.key, document, entry),
                _ => continue,
            };
            let expected = (kind == Kind::Insert).then_some(1);
            let Step::Run { db, collection, body, .. } = group.finish(one.floor.collection, entry) else { continue };
            steps.push(Step::Run { db, collection, body, expected });
        }
    }
}

/// Bytes of a job's changes by the kind of command they become, at most: so that a command need not grow.
#[derive(Clone, Copy, Default)]
struct Expected {
    insert: usize,
    update: usize,
    delete: usize,
}

impl Expected {
    fn of(items: &[Item]) -> Self {
        let mut expected = Self::default();
        for item in items {
            *expected.kind(match item.op {
                Op::Insert => Kind::Insert,
                Op::Delete => Kind::Delete,
                _ => Kind::Update,
            }) += item.bytes.len();
        }
        expected
    }

    fn kind(&mut self, kind: Kind) -> &mut usize {
        match kind {
            Kind::Insert => &mut self.insert,
            Kind::Update | Kind::Patch => &mut self.update,
            Kind::Delete => &mut self.delete,
        }
    }

    /// What the first command of a kind begins with; later ones grow as they need.
    fn take(&mut self, kind: Kind) -> usize {
        std::mem::take(self.kind(kind)).clamp(SMALL_COMMAND, COMMAND_BYTES)
    }
}

/// Groups the changes of one collection.
struct Grouper<'a> {
    entry: &'a Entry,
    expected: Expected,
    /// Groups in the order they run; within a generation by kind.
    groups: Vec<Group>,
    /// For each generation and kind the group that is still growing.
    growing: HashMap<(usize, Kind), usize>,
    order: Vec<(usize, Kind, usize)>,
    /// Where each document's last change went.
    last: HashMap<u128, (usize, Kind)>,
    generation: usize,
}

impl<'a> Grouper<'a> {
    fn new(entry: &'a Entry, expected: Expected) -> Self {
        Self {
            entry,
            expected,
            groups: Vec::new(),
            growing: HashMap::new(),
            order: Vec::new(),
            last: HashMap::new(),
            generation: 0,
        }
    }

    fn add(&mut self, item: &Item) -> Result<(), PlanError> {
        let document =
            RawDocument::from_bytes(&item.bytes).map_err(|_| ParseError::Bson { position: item.position })?;
        let change = Change::parse(item.position, document)?;
        if change.trimmed {
            return Err(PlanError::NeedsFetch(item.position));
        }
        let key = change.document_key.expect("checked when parsed");
        // An update may become several statements, each with the key.
        let size = item.bytes.len() + diff::MAX_UPDATES * key.as_bytes().len();
        match change.op {
            Op::Insert => {
                let document = change.full_document.expect("checked");
                match stamped(document) {
                    true => self.group(item.key, Kind::Update, size).insert_literally(key, document),
                    false => self.group(item.key, Kind::Insert, size).insert(document.as_bytes()),
                }
            }
            Op::Delete => self.group(item.key, Kind::Delete, size).delete(key),
            Op::Replace => {
                self.group(item.key, Kind::Update, size).replace(key, change.full_document.expect("checked"))
            }
            Op::Update => {
                let update = change.update.expect("checked when parsed");
                let diff = |source| PlanError::Diff { position: item.position, source };
                let parsed = Diff::parse(update).map_err(diff)?;
                if parsed.is_empty() {
                    // A plain update without operators would be a replacement by an empty document.
                } else if parsed.is_plain() && !(self.entry.one_lane && parsed.appends()) {
                    self.group(item.key, Kind::Update, size).update(key, &parsed);
                } else {
                    let patch = Patch { key: key.to_owned(), identity: item.key, update: update.to_owned() };
                    self.group(item.key, Kind::Patch, size).patches.push(patch);
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// The group a change of this document may join without passing an earlier one.
    fn group(&mut self, key: u128, kind: Kind, size: usize) -> &mut Group {
        let repeatable = matches!(kind, Kind::Update | Kind::Patch);
        let generation = if self.entry.one_lane {
            // Source order: a new generation whenever the kind changes, or a document is patched twice.
            let same = self.growing.contains_key(&(self.generation, kind));
            let twice = kind == Kind::Patch && self.last.get(&key) == Some(&(self.generation, kind));
            if !same || twice {
                self.generation += usize::from(!self.groups.is_empty());
            }
            self.generation
        } else {
            match self.last.get(&key) {
                None => 0,
                Some((generation, last)) if kind > *last || (kind == *last && repeatable) => *generation,
                Some((generation, _)) => generation + 1,
            }
        };
        self.last.insert(key, (generation, kind));
        let full = |group: &Group| {
            let (length, empty) = (group.len(), group.statements == 0 && group.patches.is_empty());
            group.statements >= COMMAND_STATEMENTS || length >= COMMAND_BYTES || !empty && length + size > COMMAND_LIMIT
        };
        let growing = self.growing.get(&(generation, kind)).copied().filter(|at| !full(&self.groups[*at]));
        let at = growing.unwrap_or_else(|| {
            let capacity = if kind == Kind::Patch { 0 } else { self.expected.take(kind) };
            self.groups.push(Group::new(kind, self.entry, capacity));
            let at = self.groups.len() - 1;
            self.growing.insert((generation, kind), at);
            self.order.push((generation, kind, at));
            at
        });
        &mut self.groups[at]
    }

    fn finish(mut self, uuid: CollectionUuid, steps: &mut Vec<Step>) {
        self.order.sort_unstable();
        let mut groups: Vec<Option<Group>> = self.groups.into_iter().map(Some).collect();
        for (_, _, at) in self.order {
            let group = groups[at].take().expect("each group once");
            steps.push(group.finish(uuid, self.entry));
        }
    }
}

/// One command being written.
struct Group {
    kind: Kind,
    writer: Writer,
    statements: usize,
    patches: Vec<Patch>,
}

impl Group {
    fn new(kind: Kind, entry: &Entry, capacity: usize) -> Self {
        let mut writer = Writer::with_capacity(capacity);
        let (command, list) = match kind {
            Kind::Insert => ("insert", "documents"),
            Kind::Update | Kind::Patch => ("update", "updates"),
            Kind::Delete => ("delete", "deletes"),
        };
        writer.value(command, entry.coll.as_str());
        if let Presence::Present(target) = entry.presence {
            writer.uuid("collectionUUID", target.0);
        }
        if matches!(kind, Kind::Insert | Kind::Update) {
            writer.value("bypassDocumentValidation", true);
        }
        writer.begin_array(list);
        Self { kind, writer, statements: 0, patches: Vec::new() }
    }

    /// Inserts one document.
    fn of_document(key: &RawDocument, document: &[u8], entry: &Entry) -> Self {
        match RawDocument::from_bytes(document) {
            Ok(document) if stamped(document) => {
                let mut group = Self::new(Kind::Update, entry, SMALL_COMMAND);
                group.insert_literally(key, document);
                group
            }
            _ => {
                let mut group = Self::new(Kind::Insert, entry, SMALL_COMMAND);
                group.insert(document);
                group
            }
        }
    }

    fn len(&self) -> usize {
        self.writer.len() + self.patches.iter().map(|patch| patch.update.as_bytes().len()).sum::<usize>()
    }

    fn insert(&mut self, document: &[u8]) {
        self.writer.item(self.statements, document);
        self.statements += 1;
    }

    /// An upsert that matches nothing, so an `_id` that is there is an error as it is for an insert.
    fn insert_literally(&mut self, key: &RawDocument, document: &RawDocument) {
        self.writer.begin_item(self.statements);
        self.writer.begin_document("q");
        if let Some(id) = raw::get(key, "_id") {
            self.writer.copy(&id);
        }
        self.writer.begin_array("$nor");
        self.writer.begin_item(0);
        self.writer.end();
        self.writer.end();
        self.writer.end();
        write_literal(&mut self.writer, document);
        self.writer.value("upsert", true);
        self.end_statement();
    }

    fn delete(&mut self, key: &RawDocument) {
        self.begin_statement(key);
        self.writer.value("limit", 1_i32);
        self.end_statement();
    }

    fn replace(&mut self, key: &RawDocument, document: &RawDocument) {
        self.begin_statement(key);
        write_replacement(&mut self.writer, document);
        self.end_statement();
    }

    fn update(&mut self, key: &RawDocument, diff: &Diff<'_>) {
        for update in diff.plain_updates() {
            self.begin_statement(key);
            self.writer.begin_document("u");
            update.write(&mut self.writer);
            self.writer.end();
            self.end_statement();
        }
    }

    fn begin_statement(&mut self, key: &RawDocument) {
        self.writer.begin_item(self.statements);
        self.writer.begin_document("q");
        if let Some(id) = raw::get(key, "_id") {
            self.writer.copy(&id);
        }
        self.writer.end();
    }

    fn end_statement(&mut self) {
        self.writer.end();
        self.statements += 1;
    }

    fn finish(mut self, collection: CollectionUuid, entry: &Entry) -> Step {
        if self.kind == Kind::Patch {
            return Step::Patch { entry: entry.clone(), collection, changes: self.patches };
        }
        self.writer.end();
        let expected = Some(self.statements);
        Step::Run { db: entry.db.clone(), collection, body: self.writer.finish(), expected }
    }
}

/// Whether the server would put its own time into the document: it does so with empty timestamps at the top level of
/// what is inserted or replaces a document (but for `_id`), and not with those of `$set` and of pipelines, so a source may
/// hold some.
fn stamped(document: &RawDocument) -> bool {
    let empty = |element: Element<'_>| element.timestamp() == Some(ClusterTime(0)) && element.key != "_id";
    raw::elements(document).any(|element| element.is_ok_and(empty))
}

/// The `u` of a replacement: a plain document, or a pipeline for what the server does not take or keep in a plain one:
/// top-level names that begin with `$`, and empty timestamps.
fn write_replacement(writer: &mut Writer, document: &RawDocument) {
    let dollar = |element: Result<Element<'_>, _>| element.is_ok_and(|element| element.key.starts_with('$'));
    if raw::elements(document).any(dollar) || stamped(document) {
        write_literal(writer, document);
    } else {
        writer.embed("u", document);
    }
}

fn write_literal(writer: &mut Writer, document: &RawDocument) {
    writer.begin_array("u");
    writer.begin_item(0);
    writer.begin_document("$replaceWith");
    writer.embed("$literal", document);
    writer.end();
    writer.end();
    writer.end();
}

/// The update command that writes patched documents back.
pub fn write_back(entry: &Entry, documents: &[(RawDocumentBuf, RawDocumentBuf)]) -> (RawDocumentBuf, usize) {
    let mut group = Group::new(Kind::Update, entry, SMALL_COMMAND);
    for (key, document) in documents {
        group.replace(key, document);
    }
    group.writer.end();
    (group.writer.finish(), group.statements)
}

#[cfg(test)]
mod tests {
    use bson::{Binary, Bson, Document, doc, spec::BinarySubtype};

    use super::*;
    use crate::model::{LaneId, Position, hash};

    const UUID: CollectionUuid = CollectionUuid([9; 16]);

    fn entries(one_lane: bool) -> Entries {
        let entry = Entry {
            db: "d".into(),
            coll: "c".into(),
            presence: Presence::Present(CollectionUuid([8; 16])),
            one_lane,
            collation: false,
            ddl_through: Position::ZERO,
        };
        BTreeMap::from([(UUID, entry)])
    }

    fn item(time: u64, op: &str, id: i32, extra: Document) -> Item {
        let uuid = Binary { subtype: BinarySubtype::Uuid, bytes: UUID.0.to_vec() };
        let mut event = doc! {"operationType": op, "collectionUUID": uuid, "ns": {"db": "d", "coll": "c"}, "documentKey": {"_id": id}};
        event.extend(extra);
        let bytes = RawDocumentBuf::try_from(&event).expect("encode");
        let key = bytes.get_document("documentKey").expect("key");
        let id = raw::get(key, "_id").expect("id");
        let (key, doc_lane) = (hash::key_identity(&id), LaneId::of(0));
        Item {
            position: Position::new(ClusterTime(time), 1),
            key,
            doc_lane,
            collection: UUID,
            op: Op::of(&bytes),
            bytes: bytes.into_bytes().into(),
        }
    }

    fn insert(time: u64, id: i32) -> Item {
        item(time, "insert", id, doc! {"fullDocument": {"_id": id, "v": time as i64}})
    }

    fn set(time: u64, id: i32) -> Item {
        item(time, "update", id, doc! {"rawUpdateDescription": {"$v": 2, "diff": {"u": {"v": time as i64}}}})
    }

    fn delete(time: u64, id: i32) -> Item {
        item(time, "delete", id, doc! {})
    }

    fn commands(items: &[Item], one_lane: bool) -> Vec<(String, usize)> {
        let steps = plan(items, &[], &entries(one_lane), &Floors::new()).expect("plan");
        let name = |step: &Step| match step {
            Step::Run { body, expected, .. } => {
                let command = raw::elements(body).next().expect("a field").expect("valid").key.to_owned();
                (command, expected.expect("counted"))
            }
            Step::Patch { changes, .. } => ("patch".to_owned(), changes.len()),
        };
        steps.iter().map(name).collect()
    }

    fn named(pairs: &[(&str, usize)]) -> Vec<(String, usize)> {
        pairs.iter().map(|(name, count)| ((*name).to_owned(), *count)).collect()
    }

    #[test]
    fn changes_of_different_documents_share_commands() {
        let items = [insert(1, 1), set(2, 2), insert(3, 3), delete(4, 4), set(5, 5), insert(6, 6)];
        assert_eq!(commands(&items, false), named(&[("insert", 3), ("update", 2), ("delete", 1)]));
    }

    #[test]
    fn the_order_of_one_document_is_kept() {
        let items = [insert(1, 1), set(2, 1), set(3, 1), delete(4, 1), insert(5, 1), set(6, 1)];
        let expected = [("insert", 1), ("update", 2), ("delete", 1), ("insert", 1), ("update", 1)];
        assert_eq!(commands(&items, false), named(&expected));
    }

    #[test]
    fn a_one_lane_collection_keeps_the_order_of_all_changes() {
        let items = [insert(1, 1), set(2, 2), insert(3, 3), delete(4, 4), insert(5, 5)];
        let expected = [("insert", 1), ("update", 1), ("insert", 1), ("delete", 1), ("insert", 1)];
        assert_eq!(commands(&items, true), named(&expected));
    }

    #[test]
    fn changes_below_a_floor_are_dropped() {
        let items = [set(5, 1), set(7, 1)];
        let floors = Floors::from([((UUID, items[0].key), ClusterTime(5))]);
        let steps = plan(&items, &[], &entries(false), &floors).expect("plan");
        assert!(matches!(&steps[..], [Step::Run { expected: Some(1), .. }]));
    }

    #[test]
    fn a_resolved_document_is_removed_and_written_whole() {
        let floor = Floor { collection: UUID, key: set(1, 1).key, at: ClusterTime(9) };
        let document = RawDocumentBuf::try_from(&doc! {"_id": 1, "v": 9}).expect("encode");
        let key = RawDocumentBuf::try_from(&doc! {"_id": 1}).expect("encode");
        let resolved = Resolved { floor, key, document: Some(document.into_bytes().into()) };
        let steps = plan(&[set(5, 1)], &[resolved], &entries(false), &Floors::new()).expect("plan");
        assert!(matches!(&steps[..], [Step::Run { expected: None, .. }, Step::Run { expected: Some(1), .. }]));
    }

    #[test]
    fn nested_fields_are_patched_and_dollar_documents_use_a_pipeline() {
        let nested = item(1, "update", 1, doc! {"rawUpdateDescription": {"$v": 2, "diff": {"sa": {"u": {"b": 1}}}}});
        assert_eq!(commands(&[nested], false), named(&[("patch", 1)]));
        let dollar = item(1, "replace", 1, doc! {"fullDocument": {"_id": 1, "$c": 1}});
        let steps = plan(&[dollar], &[], &entries(false), &Floors::new()).expect("plan");
        let Step::Run { body, .. } = &steps[0] else { panic!("a command") };
        let command = Document::try_from(&**body).expect("valid");
        let update = command.get_array("updates").expect("updates")[0].as_document().expect("statement");
        assert_eq!(update.get_array("u").expect("a pipeline").len(), 1);
    }

    #[test]
    fn an_update_that_changes_nothing_replaces_nothing() {
        let empty = item(1, "update", 1, doc! {"rawUpdateDescription": {"$v": 2, "diff": {}}});
        assert_eq!(commands(&[empty], false), named(&[]));
    }

    #[test]
    fn what_the_server_would_stamp_is_written_literally() {
        let empty = Bson::Timestamp(bson::Timestamp { time: 0, increment: 0 });
        let inserted = item(1, "insert", 1, doc! {"fullDocument": {"_id": 1, "at": empty.clone()}});
        let nested = item(2, "insert", 2, doc! {"fullDocument": {"_id": empty.clone(), "deep": {"at": empty}}});
        assert_eq!(commands(&[inserted, nested], false), named(&[("insert", 1), ("update", 1)]));
    }

    #[test]
    fn large_documents_of_one_transaction_do_not_share_a_command() {
        let large = |id: i32, megabytes: usize| {
            item(id as u64, "insert", id, doc! {"fullDocument": {"_id": id, "text": "x".repeat(megabytes << 20)}})
        };
        let items = [large(1, 6), large(2, 12), large(3, 1)];
        assert_eq!(commands(&items, false), named(&[("insert", 1), ("insert", 1), ("insert", 1)]));
    }

    /// Memory is bounded whatever a job is made of.
    #[test]
    fn a_job_of_many_collections_does_not_take_its_size_for_each() {
        let (mut catalog, mut items) = (entries(false), Vec::new());
        let known = catalog[&UUID].clone();
        for n in 0..200_u8 {
            let collection = CollectionUuid([n; 16]);
            catalog.insert(collection, known.clone());
            let large = item(1, "insert", i32::from(n), doc! {"fullDocument": {"_id": 1, "text": "x".repeat(10_000)}});
            items.push(Item { collection, position: Position::new(ClusterTime(u64::from(n) + 1), 1), ..large });
        }
        let steps = plan(&items, &[], &catalog, &Floors::new()).expect("plan");
        let taken = steps.into_iter().map(|step| match step {
            Step::Run { body, .. } => body.into_bytes().capacity(),
            Step::Patch { .. } => panic!("inserts"),
        });
        let (count, taken) = (taken.len(), taken.sum::<usize>());
        assert!(count == 200 && taken < 4 * 200 * SMALL_COMMAND, "{count} commands take {taken} bytes");
    }

    #[test]
    fn every_command_names_the_targets_uuid() {
        for one in [insert(1, 1), set(1, 1), delete(1, 1)] {
            let steps = plan(&[one], &[], &entries(false), &Floors::new()).expect("plan");
            let Step::Run { body, .. } = &steps[0] else { panic!("a command") };
            assert_eq!(raw::get(body, "collectionUUID").and_then(|u| u.binary()), Some(&[8u8; 16][..]));
        }
    }
}
