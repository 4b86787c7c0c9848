//! Apply's view of the target: the trait the engine drives, with everything that can go wrong between two statements.

use std::collections::BTreeSet;
use std::sync::Mutex;

use bson::RawDocument;
use bson::oid::ObjectId;
use farshore::apply::catalog::{Entries, Entry, Presence};
use farshore::apply::lanes::{Item, LaneState};
use farshore::apply::mongo::{FRESH, SETTLING};
use farshore::apply::suspects;
use farshore::apply::target::{
    Cause, Claim, CommitError, DdlStep, Divergence, Election, StreamRecord, Suspect, Target, TargetError, Transaction,
};
use farshore::model::{Change, CollectionUuid, LaneId, Op, Position, StreamHash, Term, raw};
use tokio::time::Instant;

use crate::target::{self, Collection, StreamDocument, TargetDb, field_of, first_lane, gone, plan_of, positions};
use crate::world::{Shared, World, lock};

type Changed = Vec<(CollectionUuid, Entry)>;

/// The target as one process sees it.
pub(crate) struct SimTarget {
    world: Shared,
    host: &'static str,
    term: Mutex<Term>,
    /// When the claim was complete.
    since: Mutex<Option<Instant>>,
}

impl SimTarget {
    pub(crate) fn new(world: Shared, host: &'static str) -> Self {
        Self { world, host, term: Mutex::default(), since: Mutex::default() }
    }

    fn term(&self) -> Term {
        *self.term.lock().expect("no holder panics")
    }

    /// One statement: takes time, may fail before it is done, and its answer may be lost.
    async fn call<R>(&self, act: impl FnOnce(&mut World) -> Result<R, TargetError>) -> Result<R, TargetError> {
        let wait = lock(&self.world).latency();
        tokio::time::sleep(wait).await;
        let result = {
            let mut world = lock(&self.world);
            world.target_up()?;
            let result = act(&mut world);
            if world.answer_lost() {
                return Err(TargetError::Transient("the answer was lost".into()));
            }
            result
        };
        let wait = lock(&self.world).latency();
        tokio::time::sleep(wait).await;
        result
    }

    /// A majority write of the stream's record under this process's term.
    async fn guard(&self) -> Result<(), TargetError> {
        let term = self.term();
        self.call(move |world| held(&mut world.target, term)).await
    }

    /// As the real target does before every DDL command.
    async fn about_to_send(&self) -> Result<(), TargetError> {
        let since = *self.since.lock().expect("no holder panics");
        if let Some(since) = since {
            tokio::time::sleep_until(since + SETTLING).await;
        }
        let (term, looked) = (self.term(), Instant::now());
        self.call(move |world| match &world.target.stream {
            Some(stream) if stream.term == term => Ok(()),
            _ => Err(world.target.not_ours(term)),
        })
        .await?;
        match looked.elapsed() < FRESH {
            true => Ok(()),
            false => Err(TargetError::Transient("too slow for ddl".into())),
        }
    }

    async fn save(&self, changed: &Changed) -> Result<(), TargetError> {
        for (uuid, entry) in changed {
            let (uuid, entry) = (*uuid, entry.clone());
            self.call(move |world| {
                let db = &mut world.target;
                db.majority();
                let older = db.catalog.get(&uuid).is_none_or(|stored| stored.ddl_through <= entry.ddl_through);
                if older {
                    db.intents.remove(&uuid);
                    db.catalog.insert(uuid, entry);
                }
                Ok(())
            })
            .await?;
        }
        Ok(())
    }
}

/// Fails unless the stream is held under `term`; a majority write.
fn held(db: &mut TargetDb, term: Term) -> Result<(), TargetError> {
    if db.stream.as_ref().is_none_or(|stream| stream.term != term) {
        return Err(db.not_ours(term));
    }
    db.majority();
    Ok(())
}

fn election(db: &TargetDb) -> Election {
    let mut bytes = [0; 12];
    bytes[4..].copy_from_slice(&db.election.to_be_bytes());
    Some(ObjectId::from_bytes(bytes))
}

impl Target for SimTarget {
    async fn record(&self) -> Result<Option<StreamRecord>, TargetError> {
        self.call(|world| Ok(world.target.stream.as_ref().map(|stream| stream.record.clone()))).await
    }

    async fn begin(&self, record: &StreamRecord, term: Term) -> Result<(), TargetError> {
        let record = record.clone();
        self.call(move |world| {
            world.target.majority();
            world.target.stream.get_or_insert(StreamDocument { term, record });
            Ok(())
        })
        .await
    }

    async fn claim(&self, term: Term, _: usize) -> Result<Claim, TargetError> {
        let record = self
            .call(move |world| {
                let db = &mut world.target;
                let Some(stream) = &mut db.stream else {
                    return Err(TargetError::Moved("the stream has not begun".into()));
                };
                if stream.term > term {
                    return Err(TargetError::Deposed(stream.term));
                }
                stream.term = term;
                let record = stream.record.clone();
                db.majority();
                Ok(record)
            })
            .await?;
        let first = record.clone();
        self.call(move |world| {
            let db = &mut world.target;
            for lane in LaneId::all() {
                let document = db.lanes.entry(lane.index()).or_insert_with(|| first_lane(&first, term));
                if document.term > term {
                    return Err(TargetError::Deposed(document.term));
                }
                document.term = term;
            }
            db.majority();
            Ok(())
        })
        .await?;
        let floor = record.floor;
        let lanes: Vec<LaneState> = self
            .call(move |world| {
                let db = &mut world.target;
                held(db, term)?;
                let lift = |lane: LaneId| {
                    let document = db.lanes.get_mut(&lane.index()).expect("claimed before");
                    document.state = document.state.clone().lifted(floor);
                    document.state.clone()
                };
                Ok(LaneId::all().map(lift).collect())
            })
            .await?;
        let entries = self.call(|world| Ok(world.target.catalog.clone())).await?;
        *self.term.lock().expect("no holder panics") = term;
        *self.since.lock().expect("no holder panics") = Some(Instant::now());
        let host = self.host;
        lock(&self.world).log(format!("{host} claims in term {term} from {floor}"));
        Ok(Claim { record, lanes, entries })
    }

    async fn commit(&self, _: usize, transaction: Transaction<'_>) -> Result<(), CommitError> {
        let steps = plan_of(&transaction)?;
        let term = self.term();
        let wait = lock(&self.world).latency();
        tokio::time::sleep(wait).await;
        let result = {
            let mut world = lock(&self.world);
            world.target_up()?;
            if world.write_conflict() {
                return Err(TargetError::Conflict("WriteConflict".into()).into());
            }
            let World { target, source, settings, counts, .. } = &mut *world;
            if transaction.items.len() > settings.cache {
                counts.too_large += 1;
                return Err(TargetError::TooLarge("TransactionTooLargeForCache".into()).into());
            }
            let whole = settings.cache == usize::MAX;
            let result = target.transact(source, term, &transaction, &steps, whole);
            world.committed(self.host, &transaction, &result);
            if world.answer_lost() {
                return Err(TargetError::Moved("nobody knows whether it was committed".into()).into());
            }
            result
        };
        let wait = lock(&self.world).latency();
        tokio::time::sleep(wait).await;
        result.map_err(|error| error.unwrap_or_else(|broken| TargetError::Moved(broken).into()))
    }

    async fn examine(
        &self,
        items: &[Item],
        entries: &Entries,
        divergence: &Divergence,
    ) -> Result<Vec<Suspect>, TargetError> {
        self.call(|world| Ok(examine(&world.target, items, entries, divergence))).await
    }

    async fn confirm(&self, floor: Option<(Position, StreamHash)>) -> Result<(Vec<Position>, Election), TargetError> {
        let term = self.term();
        let host = self.host;
        self.call(move |world| {
            held(&mut world.target, term)?;
            if let Some((position, hash)) = floor {
                let record = &mut world.target.stream.as_mut().expect("held").record;
                let before = record.floor;
                (record.floor, record.hash) = (position, hash);
                world.log(format!("{host} floor {position}"));
                if position < before {
                    world.broken(format!("the floor goes back from {before} to {position}"));
                }
            }
            let lanes = positions(&world.target.lanes).ok_or(TargetError::Moved("a lane is missing".into()))?;
            Ok((lanes, election(&world.target)))
        })
        .await
    }

    async fn forget(&self, through: Position) -> Result<(), TargetError> {
        self.call(move |world| {
            let db = &mut world.target;
            db.majority();
            let floor = db.stream.as_ref().map_or(Position::ZERO, |stream| stream.record.floor);
            if through > floor {
                world.broken(format!("dropped collections are forgotten through {through}, past the floor {floor}"));
            }
            let db = &mut world.target;
            let before = db.catalog.len();
            db.catalog.retain(|_, entry| entry.presence != Presence::Dropped || entry.ddl_through > through);
            world.counts.forgotten += (before - db.catalog.len()) as u64;
            Ok(())
        })
        .await
    }

    async fn ddl(&self, position: Position, step: &DdlStep, entries: &Entries) -> Result<Changed, TargetError> {
        let changed = match step {
            DdlStep::Adopt { collection, db, coll } => {
                let reason = format!("{db}.{coll} was never created");
                vec![(*collection, entry(db, coll, Presence::Refused(reason), true, position))]
            }
            DdlStep::Event { position, event } => {
                let raw = RawDocument::from_bytes(event).expect("ddl events are valid");
                let change = Change::parse(*position, raw).expect("ddl events are valid");
                self.event(&change, entries).await?
            }
        };
        if !changed.is_empty() {
            self.guard().await?;
        }
        for (_, entry) in &changed {
            if let Presence::Refused(reason) = &entry.presence {
                lock(&self.world).broken(reason.clone());
            }
        }
        self.save(&changed).await?;
        let (host, count) = (self.host, changed.len());
        lock(&self.world).log(format!("{host} ddl {position} {count}"));
        Ok(changed)
    }
}

fn entry(db: &str, coll: &str, presence: Presence, one_lane: bool, ddl_through: Position) -> Entry {
    Entry { db: db.to_owned(), coll: coll.to_owned(), presence, one_lane, collation: false, ddl_through }
}

/// Updates, replacements and deletes whose document is missing, inserts whose `_id` is there, holders of a unique value.
fn examine(db: &TargetDb, items: &[Item], entries: &Entries, divergence: &Divergence) -> Vec<Suspect> {
    let here = |uuid: &CollectionUuid| match entries.get(uuid).map(|entry| &entry.presence) {
        Some(Presence::Present(here)) => db.collections.get(here),
        _ => None,
    };
    let mut suspects = Vec::new();
    match divergence {
        Divergence::Unique { collection, fields } => {
            let field = fields.iter().next().expect("a unique index has fields").expect("valid");
            let (name, value) = (field.0.as_str().to_owned(), bson::Bson::try_from(field.1).ok());
            for (identity, bytes) in here(collection).iter().flat_map(|c| &c.documents) {
                if field_of(bytes, &name) == value {
                    let id = field_of(bytes, "_id").expect("every document has an _id");
                    let key = bson::RawDocumentBuf::try_from(&bson::doc! {"_id": id}).expect("encodes");
                    suspects.push(Suspect { collection: *collection, identity: *identity, key, cause: Cause::Unique });
                }
            }
        }
        Divergence::Document { collection, identity, cause } => {
            suspects.extend(suspects::named(items, *collection, *identity, *cause));
        }
        Divergence::Ahead { .. } => return suspects,
        Divergence::Somewhere => {}
    }
    let mut there: BTreeSet<(CollectionUuid, u128)> = BTreeSet::new();
    for item in items {
        if here(&item.collection).is_some_and(|c| c.documents.contains_key(&item.key)) {
            there.insert((item.collection, item.key));
        }
    }
    suspects.extend(suspects::unmatched(items, there));
    suspects
}

/// DDL as `apply::ddl` does it: what should be is compared with what is there by UUID, then done; every statement is a
/// round trip of its own, and every command names a UUID.
impl SimTarget {
    async fn event(&self, change: &Change<'_>, entries: &Entries) -> Result<Changed, TargetError> {
        let Some(uuid) = change.uuid else {
            if change.op == Op::DropDatabase {
                self.drop_database(change, entries).await?;
            }
            return Ok(Vec::new());
        };
        if entries.get(&uuid).is_some_and(|entry| entry.ddl_through >= change.position) {
            return Ok(Vec::new());
        }
        if change.op == Op::Create {
            return self.create(change, uuid).await;
        }
        let mut entry = entries.get(&uuid).expect("everything was created in the stream").clone();
        entry.ddl_through = change.position;
        let Presence::Present(here) = entry.presence else { return Ok(vec![(uuid, entry)]) };
        let mut changed = Vec::new();
        match change.op {
            Op::Drop => {
                self.drop_collection(here).await?;
                entry.presence = Presence::Dropped;
            }
            Op::Rename => changed = self.rename(change, &mut entry, here, entries).await?,
            Op::CreateIndexes => entry.one_lane = self.index(&entry, here, true).await?,
            Op::DropIndexes => entry.one_lane = self.index(&entry, here, false).await?,
            other => return Err(gone(&format!("{other:?} is not simulated"))),
        }
        changed.push((uuid, entry));
        Ok(changed)
    }

    async fn create(&self, change: &Change<'_>, uuid: CollectionUuid) -> Result<Changed, TargetError> {
        let (db, coll) = (change.ns.db.to_owned(), change.ns.coll.to_owned());
        let (there, ours, empty) = self
            .call(|world| {
                let there = world.target.named(&db, &coll);
                let empty = there.is_some_and(|here| world.target.collections[&here].documents.is_empty());
                let said = world.target.catalog.get(&uuid).map(|entry| &entry.presence);
                let ours = there.is_some_and(|here| said == Some(&Presence::Present(here)));
                Ok((there, ours || world.target.intents.contains(&uuid), empty))
            })
            .await?;
        let here = match there {
            Some(found) if ours => found,
            Some(_) if !empty => {
                let reason = format!("{db}.{coll} is in the way at the target");
                return Ok(vec![(uuid, entry(&db, &coll, Presence::Refused(reason), true, change.position))]);
            }
            found => {
                if let Some(found) = found {
                    self.drop_collection(found).await?;
                }
                let term = self.term();
                let (db, coll) = (db.clone(), coll.clone());
                self.call(move |world| {
                    // One transaction with a term-filtered write.
                    let target = &mut world.target;
                    held(target, term)?;
                    if target.named(&db, &coll).is_some() {
                        return Err(gone("NamespaceExists"));
                    }
                    target.intents.insert(uuid);
                    let here = target.uuid();
                    target.collections.insert(here, Collection { db, coll, ..Collection::default() });
                    Ok(here)
                })
                .await?
            }
        };
        Ok(vec![(uuid, entry(&db, &coll, Presence::Present(here), false, change.position))])
    }

    async fn drop_collection(&self, here: CollectionUuid) -> Result<(), TargetError> {
        let there = self.call(move |world| Ok(world.target.collections.contains_key(&here))).await?;
        if !there {
            return Ok(());
        }
        self.guard().await?;
        self.about_to_send().await?;
        self.call(move |world| {
            world.target.majority();
            world.target.collections.remove(&here).map(drop).ok_or_else(|| gone("drop: NamespaceNotFound"))
        })
        .await
    }

    /// The server goes on building whoever waits for it; who sends the same command waits for the same build.
    async fn index(&self, entry: &Entry, here: CollectionUuid, create: bool) -> Result<bool, TargetError> {
        self.guard().await?;
        self.about_to_send().await?;
        let name = (entry.db.clone(), entry.coll.clone());
        let end = self
            .call(move |world| {
                let took = world.building();
                let end = world.now + took;
                let target = &mut world.target;
                let named = |c: &&mut Collection| (&c.db, &c.coll) == (&name.0, &name.1);
                let collection = target.collections.get_mut(&here).filter(named);
                let collection = collection.ok_or_else(|| gone("index command: collection UUID mismatch"))?;
                if create {
                    return Ok(Some(*target.building.entry(here).or_insert(end)));
                }
                collection.unique.remove("u_1");
                target.building.remove(&here);
                target.majority();
                Ok(None)
            })
            .await?;
        let Some(end) = end else { return Ok(false) };
        let left = end.saturating_sub(lock(&self.world).now);
        tokio::time::sleep(left).await;
        self.call(move |world| {
            world.target.majority();
            let building = world.target.building.remove(&here).is_some();
            let collection = world.target.collections.get_mut(&here).ok_or_else(|| gone("the collection is gone"))?;
            if !building {
                let built = collection.unique.contains_key("u_1");
                return if built { Ok(true) } else { Err(gone("createIndexes: the build was aborted")) };
            }
            let mut values = Vec::new();
            for bytes in collection.documents.values() {
                let value = field_of(bytes, "u");
                if values.contains(&value) {
                    world.broken("documents at the target violate an index the source has".into());
                    return Err(gone("createIndexes: DuplicateKey"));
                }
                values.push(value);
            }
            collection.unique.insert("u_1".into(), "u".into());
            Ok(true)
        })
        .await
    }

    async fn rename(
        &self,
        change: &Change<'_>,
        entry: &mut Entry,
        here: CollectionUuid,
        entries: &Entries,
    ) -> Result<Changed, TargetError> {
        let to = change.to.expect("checked when parsed");
        let (db, coll) = (to.db.to_owned(), to.coll.to_owned());
        let description = change.description.expect("renames say what they did");
        let replaced = raw::get(description, "dropTarget").and_then(|e| CollectionUuid::from_slice(e.binary()?));
        let mut changed = Vec::new();
        let mut drop_target = None;
        if let Some((uuid, other)) = replaced.and_then(|uuid| Some((uuid, entries.get(&uuid)?)))
            && let Presence::Present(there) = other.presence
        {
            let named = {
                let (db, coll) = (db.clone(), coll.clone());
                self.call(move |world| Ok(world.target.named(&db, &coll))).await?
            };
            drop_target = (named == Some(there)).then_some(there);
            changed.push((uuid, other.dropped(change.position)));
        }
        (entry.db, entry.coll) = (db.clone(), coll.clone());
        let name = self.call(move |world| Ok(world.target.collections.get(&here).map(|c| c.coll.clone()))).await?;
        if name.is_none_or(|name| name == coll) {
            return Ok(changed);
        }
        self.guard().await?;
        self.about_to_send().await?;
        self.call(move |world| {
            let target = &mut world.target;
            target.majority();
            match (target.named(&db, &coll), drop_target) {
                (None, _) => {}
                (Some(there), Some(wanted)) if there == wanted => drop(target.collections.remove(&there)),
                (Some(_), _) => return Err(gone("renameCollection: target namespace exists")),
            }
            let collection = target.collections.get_mut(&here).ok_or_else(|| gone("renameCollection: not found"))?;
            collection.coll = coll;
            Ok(())
        })
        .await?;
        Ok(changed)
    }

    async fn drop_database(&self, change: &Change<'_>, entries: &Entries) -> Result<(), TargetError> {
        let db = change.ns.db.to_owned();
        let left = self
            .call(move |world| {
                let inside = world.target.collections.iter().filter(|(_, c)| c.db == db);
                Ok(inside.map(|(uuid, _)| *uuid).collect::<Vec<_>>())
            })
            .await?;
        self.guard().await?;
        for here in left {
            let newer =
                |known: &Entry| known.presence == Presence::Present(here) && known.ddl_through > change.position;
            if !entries.values().any(newer) {
                self.drop_collection(here).await?;
            }
        }
        Ok(())
    }
}

/// The differences between the two sites, for people.
pub(crate) fn compare(world: &World) -> Vec<String> {
    let mut differences = Vec::new();
    let db: &target::TargetDb = &world.target;
    for collection in world.source.collections.values() {
        let name = format!("{}.{}", collection.db, collection.coll);
        let Some(here) = db.named(&collection.db, &collection.coll) else {
            differences.push(format!("{name} is missing"));
            continue;
        };
        let there = &db.collections[&here];
        if !collection.unique.iter().eq(there.unique.keys()) {
            differences.push(format!("{name}: indexes {:?}, not {:?}", there.unique.keys(), collection.unique));
        }
        for (key, document) in &collection.documents {
            if there.documents.get(key) != Some(&crate::source::encode(document)) {
                differences.push(format!("{name}: {document} differs"));
            }
        }
        if there.documents.len() != collection.documents.len() {
            differences.push(format!(
                "{name}: {} documents, not {}",
                there.documents.len(),
                collection.documents.len()
            ));
        }
    }
    for collection in db.collections.values() {
        if world.source.named(&collection.db, &collection.coll).is_none() {
            differences.push(format!("{}.{} is not at the source", collection.db, collection.coll));
        }
    }
    differences
}
