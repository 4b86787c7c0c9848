//! Random writes at the source: every form of update, transactions over collections, DDL.

use bson::{Bson, Document, doc};
use farshore::model::CollectionUuid;
use rand::Rng as _;
use rand::rngs::StdRng;
use rand::seq::{IndexedRandom as _, SliceRandom as _};
use std::time::Duration;

use crate::source::{SourceDb, Write, identity};

const NAMES: [&str; 6] = ["items", "ratings", "users", "big", "tmp", "log"];
const DATABASES: [&str; 2] = ["shop", "side"];
const FIELDS: [&str; 8] = ["n", "zeta", "alpha", "m", "10", "sub.a", "24h", "7d"];

fn id(rng: &mut StdRng, ids: i32) -> Bson {
    let n = rng.random_range(0..ids);
    if n % 3 == 0 { Bson::String(format!("key-{n}")) } else { Bson::Int32(n) }
}

fn document(rng: &mut StdRng, id: &Bson) -> Document {
    let tags: Vec<i32> = (0..rng.random_range(1..5)).collect();
    let mut document =
        doc! {"_id": id.clone(), "u": rng.random_range(0..600_i64), "tags": tags, "sub": {"a": 1, "b": "x"}};
    for _ in 0..rng.random_range(0..3) {
        document.insert(*FIELDS.choose(rng).expect("some"), rng.random_range(0..1000));
    }
    if rng.random_bool(0.1) {
        document.insert("pad", "p".repeat(rng.random_range(0..4000)));
    }
    document
}

/// Changes the document as a server would, and describes it as its oplog does.
fn update(rng: &mut StdRng, before: &Document) -> (Document, Document) {
    let mut after = before.clone();
    let (mut removed, mut updated, mut inserted) = (doc! {}, doc! {}, doc! {});
    let mut set = |after: &mut Document, field: &str, value: Bson, moves: bool| {
        if moves {
            after.remove(field);
        }
        let list = if after.contains_key(field) { &mut updated } else { &mut inserted };
        list.insert(field, value.clone());
        after.insert(field, value);
    };
    let mut fields = FIELDS.to_vec();
    fields.shuffle(rng);
    for field in fields.iter().take(rng.random_range(0..4)) {
        let (value, moves) = (rng.random_range(0..1000), rng.random_bool(0.1));
        set(&mut after, field, value.into(), moves);
    }
    if rng.random_bool(0.3) {
        set(&mut after, "u", rng.random_range(0..600_i64).into(), false);
    }
    let tags = after.get_array("tags").expect("always there").clone();
    let mut nested = doc! {};
    if tags.len() > 1 && rng.random_bool(0.3) {
        let size = rng.random_range(1..tags.len());
        let mut diff = doc! {"a": true, "l": size as i32};
        let tags = after.get_array_mut("tags").expect("always there");
        tags.truncate(size);
        if rng.random_bool(0.5) {
            tags[0] = Bson::Int32(77);
            diff.insert("u0", 77);
        }
        nested.insert("stags", diff);
    } else if rng.random_bool(0.1) {
        set(&mut after, "tags", vec![Bson::Int32(5); rng.random_range(1..5)].into(), false);
    }
    if rng.random_bool(0.3) {
        let name = *["a", "b", "c"].choose(rng).expect("some");
        let value = rng.random_range(0..100);
        let sub = after.get_document_mut("sub").expect("always there");
        let section = if sub.contains_key(name) { "u" } else { "i" };
        sub.insert(name, value);
        nested.insert("ssub", doc! {section: {name: value}});
    }
    if let Some(field) = fields.last()
        && before.contains_key(field)
        && !updated.contains_key(field)
        && !inserted.contains_key(field)
    {
        after.remove(field);
        removed.insert(*field, false);
    }
    if [&removed, &updated, &inserted, &nested].into_iter().all(Document::is_empty) {
        let value = rng.random_range(0..1000);
        let list = if after.contains_key("n") { &mut updated } else { &mut inserted };
        list.insert("n", value);
        after.insert("n", value);
    }
    let sections =
        [("d", removed), ("u", updated), ("i", inserted)].into_iter().filter(|(_, fields)| !fields.is_empty());
    let mut diff: Document = sections.map(|(section, fields)| (section.to_owned(), Bson::from(fields))).collect();
    diff.extend(nested);
    (after, diff)
}

/// A write of one collection that its unique index allows, given writes of the same transaction that come before.
fn write(
    rng: &mut StdRng,
    source: &SourceDb,
    uuid: CollectionUuid,
    touched: &mut Vec<(CollectionUuid, u128)>,
    ids: i32,
) -> Option<Write> {
    let collection = &source.collections[&uuid];
    let id = id(rng, ids);
    let key = identity(&id);
    if touched.contains(&(uuid, key)) {
        return None;
    }
    // A unique index sees the writes of its own transaction; one per transaction keeps this double simple.
    if !collection.unique.is_empty() && touched.iter().any(|(other, _)| *other == uuid) {
        return None;
    }
    touched.push((uuid, key));
    let free = |document: &Document| {
        let taken = |(other, d): (&u128, &Document)| *other != key && d.get("u") == document.get("u");
        collection.unique.is_empty() || !collection.documents.iter().any(taken)
    };
    match collection.documents.get(&key) {
        None => Some(document(rng, &id)).filter(free).map(Write::Insert),
        Some(_) if rng.random_bool(0.25) => Some(Write::Delete(id)),
        Some(_) if rng.random_bool(0.2) => Some(document(rng, &id)).filter(free).map(Write::Replace),
        Some(before) => {
            let (after, diff) = update(rng, before);
            free(&after).then_some(Write::Update(after, diff))
        }
    }
}

/// One step of the workload.
pub(crate) fn step(rng: &mut StdRng, source: &mut SourceDb, now: Duration, ids: i32) {
    let uuids: Vec<CollectionUuid> = source.collections.keys().copied().collect();
    let roll = rng.random_range(0..1000);
    if uuids.is_empty() || roll < 15 {
        ddl(rng, source, &uuids, now);
    } else if roll < 25 {
        source.noop(now);
    } else if roll < 180 {
        let mut touched = Vec::new();
        let count = if rng.random_bool(0.1) { rng.random_range(20..60) } else { rng.random_range(2..8) };
        let mut writes = Vec::new();
        for _ in 0..count {
            let uuid = *uuids.choose(rng).expect("some");
            writes.extend(write(rng, source, uuid, &mut touched, ids).map(|write| (uuid, write)));
        }
        let free = rng.random_bool(0.05).then(|| free_name(rng, source)).flatten();
        let creates: Vec<_> = free.into_iter().collect();
        if !writes.is_empty() {
            source.commit(now, creates, writes);
        }
    } else {
        let uuid = *uuids.choose(rng).expect("some");
        if let Some(write) = write(rng, source, uuid, &mut Vec::new(), ids) {
            source.commit(now, Vec::new(), vec![(uuid, write)]);
        }
    }
}

fn free_name(rng: &mut StdRng, source: &SourceDb) -> Option<(String, String)> {
    let (db, coll) = (*DATABASES.choose(rng)?, *NAMES.choose(rng)?);
    source.named(db, coll).is_none().then(|| (db.to_owned(), coll.to_owned()))
}

fn ddl(rng: &mut StdRng, source: &mut SourceDb, uuids: &[CollectionUuid], now: Duration) {
    let chosen = uuids.choose(rng).copied();
    match (rng.random_range(0..10), chosen) {
        (0..=3, _) | (_, None) => {
            if let Some((db, coll)) = free_name(rng, source) {
                source.create(now, &db, &coll);
            }
        }
        (4, Some(uuid)) => source.drop_collection(now, uuid),
        (5, Some(uuid)) => {
            let (db, from) = (source.collections[&uuid].db.clone(), source.collections[&uuid].coll.clone());
            let to = *NAMES.choose(rng).expect("some");
            // Large documents stay where no unique value can collide with a later state (see the report in main.rs).
            if to != from && to != "big" && from != "big" {
                let replaced = source.named(&db, to);
                source.rename(now, uuid, to, replaced);
            }
        }
        (6, Some(_)) if rng.random_bool(0.3) => source.drop_database(now, DATABASES[1]),
        (_, Some(uuid)) => {
            let collection = &source.collections[&uuid];
            if !collection.unique.is_empty() {
                source.unique_index(now, uuid, false);
            } else if collection.coll != "big" {
                let mut values: Vec<i64> = collection.documents.values().filter_map(|d| d.get_i64("u").ok()).collect();
                values.sort_unstable();
                if values.windows(2).all(|pair| pair[0] < pair[1]) {
                    source.unique_index(now, uuid, true);
                }
            }
        }
    }
}
