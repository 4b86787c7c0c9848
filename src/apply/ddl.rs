//! DDL on the real target: what a step should have done is compared with what is there by UUID, then done.
//!
//! Every command names `collectionUUID`, so neither a replay nor a stale agent can touch a recreated collection. A create,
//! which has no UUID yet, is one transaction with a term-filtered write. Before every other command the stream's record is
//! written under this term ([`MongoTarget::guard`]); what a step removes is looked up *before* that, so a stale agent can
//! only ever name what its successor has already seen.

use bson::raw::RawDocument;
use bson::{Bson, Document, doc};
use mongodb::options::{Acknowledgment, WriteConcern};

use super::catalog::{Entries, Entry, Presence};
use super::mongo::{DB, MongoTarget};
use super::reply::hint_of;
use super::store;
use super::target::{DdlStep, TargetError};
use crate::model::{Change, CollectionUuid, Namespace, Op, Position};
use crate::mongo::{self, Failure, code};

type Changed = Vec<(CollectionUuid, Entry)>;

/// Does one step; see [`super::target::Target::ddl`].
pub(super) async fn run(
    target: &MongoTarget,
    position: Position,
    step: &DdlStep,
    entries: &Entries,
) -> Result<Changed, TargetError> {
    let changed = match step {
        DdlStep::Adopt { collection, db, coll } => adopt(target, position, *collection, db, coll).await?,
        DdlStep::Event { position, event: bytes } => {
            let malformed =
                |message: String| TargetError::Fatal { message, hint: "the change is kept in the inbox; report it" };
            let raw = RawDocument::from_bytes(bytes).map_err(|e| malformed(e.to_string()))?;
            let change = Change::parse(*position, raw).map_err(|e| malformed(e.to_string()))?;
            event(target, &change, entries).await?
        }
    };
    if !changed.is_empty() {
        // What was looked up may be a successor's doing: nothing is concluded from it by an agent that was replaced.
        target.guard(position).await?;
    }
    for (uuid, entry) in &changed {
        save(target, *uuid, entry).await?;
    }
    Ok(changed)
}

async fn event(target: &MongoTarget, change: &Change<'_>, entries: &Entries) -> Result<Changed, TargetError> {
    let Some(uuid) = change.uuid else { return nameless(target, change, entries).await };
    let entry = entries.get(&uuid);
    if entry.is_some_and(|entry| entry.ddl_through >= change.position) {
        return Ok(Vec::new());
    }
    if change.op == Op::Create {
        return create(target, change, uuid).await;
    }
    let Some(entry) = entry else {
        let reason = format!("{} was there before the stream began and is not known at the target", change.ns);
        return Ok(vec![(uuid, refused(change, reason))]);
    };
    let mut entry = entry.clone();
    entry.ddl_through = change.position;
    let mut changed = Vec::new();
    let Presence::Present(here) = entry.presence else {
        // What it replaces at the source is gone, whatever becomes of itself here.
        if let Some((dropped, other)) = replaced(change, entries) {
            if let Presence::Present(there) = other.presence {
                drop_collection(target, change.position, other, there).await?;
            }
            changed.push((dropped, other.dropped(change.position)));
        }
        rename_entry(change, &mut entry);
        changed.push((uuid, entry));
        return Ok(changed);
    };
    match change.op {
        Op::Drop => {
            drop_collection(target, change.position, &entry, here).await?;
            entry.presence = Presence::Dropped;
        }
        Op::Rename => changed = rename(target, change, &mut entry, here, entries).await?,
        Op::CreateIndexes => {
            let command = doc! {"createIndexes": &entry.coll, "indexes": index_specs(&description(change)?)};
            on_collection(target, change.position, &entry, here, command).await?;
        }
        Op::DropIndexes => drop_indexes(target, change, &entry, here).await?,
        Op::Modify => {
            let mut command = doc! {"collMod": &entry.coll};
            command.extend(description(change)?);
            on_collection(target, change.position, &entry, here, command).await?;
        }
        _ => {
            let reason = format!("{:?} of {} is not supported", change.op, change.ns);
            entry.presence = Presence::Refused(reason);
        }
    }
    if matches!(change.op, Op::CreateIndexes | Op::DropIndexes | Op::Modify) {
        set_laning(target, &mut entry, here).await?;
    }
    changed.push((uuid, entry));
    Ok(changed)
}

fn refused(change: &Change<'_>, reason: String) -> Entry {
    Entry {
        db: change.ns.db.to_owned(),
        coll: change.ns.coll.to_owned(),
        presence: Presence::Refused(reason),
        one_lane: true,
        collation: false,
        ddl_through: change.position,
    }
}

fn rename_entry(change: &Change<'_>, entry: &mut Entry) {
    if let (Op::Rename, Some(to)) = (change.op, change.to) {
        (entry.db, entry.coll) = (to.db.to_owned(), to.coll.to_owned());
    }
    if change.op == Op::Drop {
        entry.presence = Presence::Dropped;
    }
}

fn description(change: &Change<'_>) -> Result<Document, TargetError> {
    let raw = change.description.unwrap_or(RawDocument::from_bytes(b"\x05\0\0\0\0").expect("an empty document"));
    Document::try_from(raw).map_err(|error| TargetError::Fatal {
        message: format!("ddl at {}: {error}", change.position),
        hint: "the change is kept in the inbox; report it",
    })
}

async fn save(target: &MongoTarget, uuid: CollectionUuid, entry: &Entry) -> Result<(), TargetError> {
    let id = doc! {"stream": target.stream.to_string(), "collection": store::uuid(uuid)};
    // A stale agent's older result must not replace a newer one; its insert then collides, which counts as nothing.
    let older = doc! {"ddlThrough": {"$not": {"$gt": store::position(entry.ddl_through)}}};
    let mut q = doc! {"_id": id};
    q.extend(older);
    let u = doc! {"$set": store::entry_fields(entry), "$unset": {"intent": ""}};
    target.update("catalog", vec![doc! {"q": q, "u": u, "upsert": true}], "record a ddl result").await?;
    Ok(())
}

/// `listCollections` entry of a UUID, if it is in this database.
async fn find(target: &MongoTarget, db: &str, filter: Document) -> Result<Option<bson::RawDocumentBuf>, TargetError> {
    Ok(mongo::list_collections(&target.client, db, filter).await?.into_iter().next())
}

async fn name_of(target: &MongoTarget, db: &str, here: CollectionUuid) -> Result<Option<String>, TargetError> {
    let found = find(target, db, doc! {"info.uuid": store::uuid(here)}).await?;
    Ok(found.and_then(|entry| Some(entry.get_str("name").ok()?.to_owned())))
}

async fn command(target: &MongoTarget, db: &str, command: Document, doing: &'static str) -> Result<(), TargetError> {
    target.about_to_send().await?;
    match mongo::run_majority(&target.client, db, command, doing).await.map_err(|failure| target.counted(failure)) {
        Ok(_) => Ok(()),
        Err(failure) if failure.is_transient() => Err(failure.into()),
        Err(failure) => {
            let hint = match failure.code() {
                Some(code::UUID_MISMATCH | code::NAMESPACE_NOT_FOUND) => {
                    "a replicated collection was dropped or replaced at the target; it must be copied again"
                }
                Some(code::DUPLICATE_KEY) => {
                    "documents at the target violate an index the source has: they differ; verify and repair"
                }
                Some(code) => hint_of(code),
                None => "see the message of MongoDB",
            };
            Err(TargetError::Fatal { message: failure.to_string(), hint })
        }
    }
}

async fn on_collection(
    target: &MongoTarget,
    position: Position,
    entry: &Entry,
    here: CollectionUuid,
    mut body: Document,
) -> Result<(), TargetError> {
    target.guard(position).await?;
    body.insert("collectionUUID", store::uuid(here));
    command(target, &entry.db, body, "apply ddl").await
}

async fn drop_collection(
    target: &MongoTarget,
    position: Position,
    entry: &Entry,
    here: CollectionUuid,
) -> Result<(), TargetError> {
    let Some(name) = name_of(target, &entry.db, here).await? else { return Ok(()) };
    target.guard(position).await?;
    command(target, &entry.db, doc! {"drop": name, "collectionUUID": store::uuid(here)}, "drop a collection").await
}

async fn rename(
    target: &MongoTarget,
    change: &Change<'_>,
    entry: &mut Entry,
    here: CollectionUuid,
    entries: &Entries,
) -> Result<Changed, TargetError> {
    let to = change.to.expect("checked when parsed");
    let mut changed = Vec::new();
    let mut drop_target = Bson::Boolean(false);
    if let Some((dropped, other)) = replaced(change, entries) {
        if let Presence::Present(there) = other.presence
            && name_of(target, to.db, there).await?.as_deref() == Some(to.coll)
        {
            drop_target = store::uuid(there);
        }
        let other = other.dropped(change.position);
        changed.push((dropped, other));
    }
    let from_db = entry.db.clone();
    (entry.db, entry.coll) = (to.db.to_owned(), to.coll.to_owned());
    let Some(name) = name_of(target, &from_db, here).await? else {
        // A rename across databases makes a new collection; it is in the new database already, or gone.
        return Ok(changed);
    };
    if name == to.coll && from_db == to.db {
        return Ok(changed);
    }
    if drop_target == Bson::Boolean(false) && find(target, to.db, doc! {"name": to.coll}).await?.is_some() {
        let reason = format!("a collection {to} that is not from the source is in the way at the target");
        entry.presence = Presence::Refused(reason);
        return Ok(changed);
    }
    target.guard(change.position).await?;
    let body = doc! {
        "renameCollection": format!("{from_db}.{name}"),
        "to": to.to_string(),
        "dropTarget": drop_target,
        "collectionUUID": store::uuid(here),
    };
    command(target, "admin", body, "rename a collection").await?;
    Ok(changed)
}

/// What a rename replaces.
fn replaced<'a>(change: &Change<'_>, entries: &'a Entries) -> Option<(CollectionUuid, &'a Entry)> {
    let dropped = dropped_by_rename(change)?;
    entries.get(&dropped).filter(|entry| entry.presence != Presence::Dropped).map(|entry| (dropped, entry))
}

/// The UUID of the collection a rename replaces at the source.
pub(super) fn dropped_by_rename(change: &Change<'_>) -> Option<CollectionUuid> {
    let description = change.description?;
    let element = crate::model::raw::get(description, "dropTarget")?;
    CollectionUuid::from_slice(element.binary()?)
}

async fn indexes_of(target: &MongoTarget, entry: &Entry) -> Result<Vec<Document>, TargetError> {
    use futures::TryStreamExt as _;
    let body = doc! {"listIndexes": &entry.coll, "cursor": {}};
    let cursor = target.client.database(&entry.db).run_cursor_command(body).await;
    let cursor = cursor.map_err(Failure::of("list indexes"))?;
    Ok(cursor.try_collect().await.map_err(Failure::of("list indexes"))?)
}

async fn drop_indexes(
    target: &MongoTarget,
    change: &Change<'_>,
    entry: &Entry,
    here: CollectionUuid,
) -> Result<(), TargetError> {
    let there = indexes_of(target, entry).await?;
    let description = description(change)?;
    let gone = description
        .get_array("indexes")
        .into_iter()
        .flatten()
        .filter_map(|spec| spec.as_document()?.get_str("name").ok());
    let names: Vec<&str> =
        gone.filter(|name| there.iter().any(|index| index.get_str("name").is_ok_and(|n| n == *name))).collect();
    if names.is_empty() {
        return Ok(());
    }
    on_collection(target, change.position, entry, here, doc! {"dropIndexes": &entry.coll, "index": names}).await
}

/// The source's index specifications as a command takes them: one without collation has the simple one, where the
/// command would fill in the collection's.
fn index_specs(description: &Document) -> Vec<Document> {
    let specs = description.get_array("indexes").into_iter().flatten().filter_map(|spec| spec.as_document().cloned());
    let explicit = |mut spec: Document| {
        if !spec.contains_key("collation") {
            spec.insert("collation", doc! {"locale": "simple"});
        }
        spec
    };
    specs.map(explicit).collect()
}

/// Cross-lane hazards exist where documents can get in each other's way.
async fn set_laning(target: &MongoTarget, entry: &mut Entry, here: CollectionUuid) -> Result<(), TargetError> {
    let options = find(target, &entry.db, doc! {"info.uuid": store::uuid(here)}).await?;
    let options = options.as_ref().and_then(|entry| entry.get_document("options").ok());
    let capped = options.is_some_and(|options| options.get_bool("capped").unwrap_or(false));
    entry.collation = options.is_some_and(|options| matches!(options.get("collation"), Ok(Some(_))));
    let unique = |index: &Document| {
        let flag = |name| index.get_bool(name).unwrap_or(false);
        index.get_str("name").is_ok_and(|name| name != "_id_") && (flag("unique") || flag("prepareUnique"))
    };
    entry.one_lane = capped || entry.collation || indexes_of(target, entry).await?.iter().any(unique);
    Ok(())
}

async fn create(target: &MongoTarget, change: &Change<'_>, uuid: CollectionUuid) -> Result<Changed, TargetError> {
    let mut options = description(change)?;
    if options.get_bool("capped").unwrap_or(false) {
        let reason = "capped collections are not replicated yet".to_owned();
        return Ok(vec![(uuid, refused(change, reason))]);
    }
    for internal in ["idIndex", "temp", "autoIndexId"] {
        options.remove(internal);
    }
    let collation = options.contains_key("collation");
    let (db, coll) = (change.ns.db, change.ns.coll);
    let there = find(target, db, doc! {"name": coll}).await?;
    let here = match there.as_deref().and_then(mongo::uuid_of) {
        Some(found) if is_ours(target, uuid, found).await? => found,
        Some(found) => {
            if !is_empty(target, db, coll).await? {
                let reason =
                    format!("a collection {} that is not from the source is in the way at the target", change.ns);
                return Ok(vec![(uuid, refused(change, reason))]);
            }
            let entry = Entry {
                db: db.into(),
                coll: coll.into(),
                presence: Presence::Present(found),
                one_lane: collation,
                collation,
                ddl_through: change.position,
            };
            drop_collection(target, change.position, &entry, found).await?;
            create_now(target, change, uuid, &options).await?
        }
        None => create_now(target, change, uuid, &options).await?,
    };
    let entry = Entry {
        db: db.into(),
        coll: coll.into(),
        presence: Presence::Present(here),
        one_lane: collation,
        collation,
        ddl_through: change.position,
    };
    Ok(vec![(uuid, entry)])
}

/// Whether an earlier attempt of ours made the collection that is there.
async fn is_ours(target: &MongoTarget, uuid: CollectionUuid, here: CollectionUuid) -> Result<bool, TargetError> {
    let catalog = target.client.database(DB).collection::<Document>("catalog");
    let id = doc! {"stream": target.stream.to_string(), "collection": store::uuid(uuid)};
    let found = catalog.find_one(doc! {"_id": id}).await.map_err(Failure::of("read the catalog"))?;
    found.map_or(Ok(false), |stored| says_ours(&stored, here))
}

/// An attempt may have ended before it could say what it made, or before it heard that this was stored.
fn says_ours(stored: &Document, here: CollectionUuid) -> Result<bool, TargetError> {
    let is = |(_, entry): (CollectionUuid, Entry)| entry.presence == Presence::Present(here);
    Ok(stored.contains_key("intent") || store::read_entry(stored)?.is_some_and(is))
}

async fn is_empty(target: &MongoTarget, db: &str, coll: &str) -> Result<bool, TargetError> {
    let documents = target.client.database(db).collection::<Document>(coll);
    Ok(documents
        .find_one(doc! {})
        .projection(doc! {"_id": 1})
        .await
        .map_err(Failure::of("look into a collection"))?
        .is_none())
}

/// Creates the collection and records the intent under this term, in one transaction.
async fn create_now(
    target: &MongoTarget,
    change: &Change<'_>,
    uuid: CollectionUuid,
    options: &Document,
) -> Result<CollectionUuid, TargetError> {
    let doing = "create a collection";
    let session = target.ddl_session().await?;
    let mut session = session.lock().await;
    let majority = WriteConcern::builder().w(Acknowledgment::Majority).journal(true).build();
    session.start_transaction().write_concern(majority).await.map_err(target.failed(doing))?;
    let term = target.term().await.0 as i64;
    let q = doc! {"_id": target.stream.to_string(), "term": term};
    let fence =
        doc! {"update": "streams", "updates": [{"q": q, "u": {"$set": {"ddl": store::position(change.position)}}}]};
    let id = doc! {"stream": target.stream.to_string(), "collection": store::uuid(uuid)};
    let intent = doc! {"q": {"_id": id}, "u": {"$set": {"intent": store::position(change.position)}}, "upsert": true};
    let record = doc! {"update": "catalog", "updates": [intent]};
    let mut body = doc! {"create": change.ns.coll};
    body.extend(options.clone());
    let steps = [(DB, fence), (DB, record), (change.ns.db, body)];
    for (index, (db, body)) in steps.into_iter().enumerate() {
        let reply = target.client.database(db).run_command(body).session(&mut *session).await;
        let matched = match reply.map_err(target.failed(doing)) {
            Ok(reply) => reply.get_i32("n").unwrap_or(0),
            Err(failure) => {
                drop(session.abort_transaction().await);
                return Err(failure.into());
            }
        };
        if index == 0 && matched != 1 {
            drop(session.abort_transaction().await);
            target.guard(change.position).await?;
            return Err(TargetError::Moved("the stream's record changed".into()));
        }
    }
    session.commit_transaction().await.map_err(target.failed(doing))?;
    let found = find(target, change.ns.db, doc! {"name": change.ns.coll}).await?;
    let moved = || TargetError::Moved(format!("{} is gone right after it was created", change.ns));
    found.as_deref().and_then(mongo::uuid_of).ok_or_else(moved)
}

/// A collection that was there when the stream began is found by its name.
async fn adopt(
    target: &MongoTarget,
    position: Position,
    uuid: CollectionUuid,
    db: &str,
    coll: &str,
) -> Result<Changed, TargetError> {
    let found = find(target, db, doc! {"name": coll, "type": "collection"}).await?;
    let mut entry = Entry {
        db: db.to_owned(),
        coll: coll.to_owned(),
        presence: Presence::Refused("it was at the source before the stream began and is not at the target".into()),
        one_lane: true,
        collation: false,
        ddl_through: position,
    };
    let capped = found
        .as_ref()
        .and_then(|f| f.get_document("options").ok())
        .is_some_and(|o| o.get_bool("capped").unwrap_or(false));
    match found.as_deref().and_then(mongo::uuid_of) {
        Some(_) if capped => entry.presence = Presence::Refused("capped collections are not replicated yet".into()),
        Some(here) => {
            entry.presence = Presence::Present(here);
            set_laning(target, &mut entry, here).await?;
        }
        None => {}
    }
    Ok(vec![(uuid, entry)])
}

/// Views, and what concerns a whole database: told apart by name, as the source tells them apart.
async fn nameless(target: &MongoTarget, change: &Change<'_>, entries: &Entries) -> Result<Changed, TargetError> {
    let Namespace { db, coll } = change.ns;
    match change.op {
        Op::Create | Op::Modify => {
            let mut view = description(change)?;
            if view.get_str("viewOn").is_ok_and(|on| on.starts_with("system.buckets.")) {
                let reason = "time-series collections are not replicated yet".to_owned();
                return Ok(vec![(synthetic(change), refused(change, reason))]);
            }
            let there = find(target, db, doc! {"name": coll}).await?;
            if let Some(found) = there.as_deref().and_then(mongo::uuid_of) {
                return Ok(collection_in_the_way(change, found, entries));
            }
            target.guard(change.position).await?;
            let mut body = if there.is_some() {
                doc! {"collMod": coll}
            } else {
                doc! {"create": coll}
            };
            if there.is_some() {
                view.remove("collation");
            }
            body.extend(view);
            command(target, db, body, "define a view").await?;
        }
        Op::Drop => {
            let there = find(target, db, doc! {"name": coll, "type": "view"}).await?;
            target.guard(change.position).await?;
            if there.is_some() {
                command(target, db, doc! {"drop": coll}, "drop a view").await?;
            }
            let known = entries.get(&synthetic(change));
            let gone = known.map(|entry| entry.dropped(change.position));
            return Ok(gone.map(|entry| (synthetic(change), entry)).into_iter().collect());
        }
        Op::DropDatabase => drop_database(target, change, entries).await?,
        _ => tracing::warn!(op = ?change.op, "a change without collection is not supported and left out"),
    }
    Ok(Vec::new())
}

/// A view is to be where a collection is: one that came later at the source, when what is done already is done again.
fn collection_in_the_way(change: &Change<'_>, found: CollectionUuid, entries: &Entries) -> Changed {
    let later = |entry: &Entry| entry.presence == Presence::Present(found) && entry.ddl_through > change.position;
    if entries.values().any(later) {
        return Vec::new();
    }
    let reason = format!("a collection {} that is not from the source is in the way of a view", change.ns);
    vec![(synthetic(change), refused(change, reason))]
}

/// An id for something refused that has no UUID in the stream.
fn synthetic(change: &Change<'_>) -> CollectionUuid {
    let name = change.ns.to_string();
    let (a, b) =
        (xxhash_rust::xxh3::xxh3_64(name.as_bytes()), xxhash_rust::xxh3::xxh3_64_with_seed(name.as_bytes(), 1));
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&a.to_be_bytes());
    bytes[8..].copy_from_slice(&b.to_be_bytes());
    CollectionUuid(bytes)
}

/// Drops what is left of a database, collection by collection and by UUID; the database goes with the last one.
async fn drop_database(target: &MongoTarget, change: &Change<'_>, entries: &Entries) -> Result<(), TargetError> {
    let left = mongo::list_collections(&target.client, change.ns.db, doc! {}).await?;
    target.guard(change.position).await?;
    for entry in &left {
        let name = entry.get_str("name").unwrap_or("");
        let here = mongo::uuid_of(entry);
        let newer = |known: &Entry| {
            known.presence == Presence::Present(here.unwrap_or(CollectionUuid([0; 16])))
                && known.ddl_through > change.position
        };
        if name.starts_with("system.") || entries.values().any(newer) {
            continue;
        }
        let mut body = doc! {"drop": name};
        if let Some(here) = here {
            body.insert("collectionUUID", store::uuid(here));
        }
        command(target, change.ns.db, body, "drop a database").await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::model::ClusterTime;

    #[test]
    fn what_an_earlier_attempt_made_is_ours_whether_it_said_so_or_not() {
        let here = CollectionUuid([2; 16]);
        let id = doc! {"stream": "north/south", "collection": store::uuid(CollectionUuid([1; 16]))};
        let stored = |presence| {
            let at = Position::new(ClusterTime(5), 1);
            let (db, coll) = ("d".to_owned(), "c".to_owned());
            let entry = Entry { db, coll, presence, one_lane: false, collation: false, ddl_through: at };
            let mut stored = store::entry_fields(&entry);
            stored.insert("_id", &id);
            stored
        };
        assert!(says_ours(&doc! {"_id": &id, "intent": 1}, here).expect("readable"), "made, not said");
        assert!(says_ours(&stored(Presence::Present(here)), here).expect("readable"), "said, the answer was lost");
        let others = [Presence::Present(CollectionUuid([3; 16])), Presence::Dropped, Presence::Refused("x".into())];
        for other in others {
            assert!(!says_ours(&stored(other.clone()), here).expect("readable"), "{other:?}");
        }
    }

    #[test]
    fn a_view_that_is_made_again_gives_way_to_a_collection_that_came_later_only() {
        let event = doc! {"operationType": "create", "ns": {"db": "d", "coll": "v"},
        "operationDescription": {"viewOn": "c", "pipeline": []}};
        let event = bson::RawDocumentBuf::try_from(&event).expect("encode");
        let at = |time| Position::new(ClusterTime(time), 1);
        let change = Change::parse(at(5), &event).expect("a create");
        let (uuid, here) = (CollectionUuid([1; 16]), CollectionUuid([2; 16]));
        let known = |through| {
            let presence = Presence::Present(here);
            let (db, coll) = ("d".into(), "v".into());
            let entry = Entry { db, coll, presence, one_lane: false, collation: false, ddl_through: through };
            BTreeMap::from([(uuid, entry)])
        };
        assert!(collection_in_the_way(&change, here, &known(at(7))).is_empty());
        let refused = collection_in_the_way(&change, here, &known(at(3)));
        assert!(matches!(&refused[..], [(_, Entry { presence: Presence::Refused(_), .. })]), "{refused:?}");
    }
}
