//! The main job: everything that is written at one site is at the other, byte for byte.

use std::time::Duration;

use anyhow::{Result, ensure};
use bson::raw::cstr;
use bson::{Document, RawDocumentBuf, Timestamp, doc, rawdoc};
use farshore_testkit::compare::Options;
use farshore_testkit::mongo::{self, User};
use farshore_testkit::pair::{PairOptions, Sets, Side};
use farshore_testkit::wait;
use farshore_testkit::workload::{Profile, Until, Workload};

use crate::support::{caught_up, client, equal, pair, stream};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_form_of_write_arrives() -> Result<()> {
    let mut pair = pair(PairOptions::default()).await?;
    let source = client(&mut pair, Side::North)?;
    let workload = Workload::new(7, Profile::default(), "app");
    let counts = workload.run(&source, Until::Operations(3_000)).await?;
    let comparison = equal(&mut pair, &Options::default()).await?;
    println!("seed 7: {counts}\n{comparison}");
    ensure!(stream(&pair).await?.diverged == 0, "nothing differed on the way");
    let missing = counts.missing(Profile::default().kinds());
    assert!(missing.is_empty(), "kinds of writes that never took effect: {missing:?}");
    pair.check_logs(&[])
}

/// What an event's ordinary description of an update cannot tell apart, the oplog's diff does.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn odd_names_and_moved_fields_are_what_they_are() -> Result<()> {
    let mut pair = pair(PairOptions::default()).await?;
    let source = client(&mut pair, Side::North)?;
    let documents = source.database("shop").collection::<Document>("odd");
    let set_field = |field: &str, value: i32| {
        vec![doc! {"$replaceWith": {"$setField": {"field": {"$literal": field}, "input": "$$ROOT", "value": value}}}]
    };
    for id in 0..8 {
        documents.insert_one(doc! {"_id": id, "a": {"b": 1, "0": 2}, "list": [1, {"0": 1}], "z": 1, "y": 2}).await?;
    }
    let one = |id: i32| doc! {"_id": id};
    // A name with a dot beside an object of which it could be a path, both changed and one removed.
    documents.update_one(one(0), set_field("a.b", 7)).await?;
    documents.update_one(one(1), set_field("a.b", 7)).await?;
    documents.update_one(one(1), doc! {"$set": {"a.b": 8}}).await?;
    documents.update_one(one(2), set_field("a.b", 7)).await?;
    documents.update_one(one(2), doc! {"$unset": {"a.b": ""}}).await?;
    for name in ["$c", "", ".x", "x.", "0.0", "list.0", "$v", "$set"] {
        documents.update_one(one(3), set_field(name, 1)).await?;
        documents.update_one(one(3), set_field(name, 2)).await?;
    }
    // What looks like an update of the oplog, or like operators.
    documents.insert_one(doc! {"_id": 9, "$v": 2, "diff": {"u": {"x": 1}}, "$set": {"x": 1}}).await?;
    documents.update_one(one(9), set_field("$v", 1)).await?;
    documents.update_one(one(9), doc! {"$set": {"diff.u.x": 2}}).await?;
    // Numbers that are names here and indexes there.
    documents.update_one(one(4), doc! {"$set": {"a.0": 5, "a.00": 6, "list.1.0": 7, "list.4": 8}}).await?;
    // Fields that only change their places, at the top and below.
    let last = doc! {"$mergeObjects": ["$$ROOT", {"z": "$old.z"}]};
    let moved =
        [doc! {"$set": {"old": "$$ROOT"}}, doc! {"$unset": "z"}, doc! {"$replaceWith": last}, doc! {"$unset": "old"}];
    documents.update_one(one(5), moved.to_vec()).await?;
    documents.update_one(one(6), vec![doc! {"$set": {"a": {"$literal": {"0": 2, "b": 1}}}}]).await?;
    documents.update_one(one(7), doc! {"$set": {"pad": "p".repeat(10_000)}}).await?;
    documents.update_one(one(7), moved.to_vec()).await?;
    // Names that begin with a digit are set in an order of their own.
    documents.update_one(one(0), vec![doc! {"$set": {"24h": 1}}, doc! {"$set": {"7d": 2}}]).await?;
    documents.update_one(one(1), vec![doc! {"$set": {"7d": 2}}, doc! {"$set": {"24h": 1}}]).await?;
    // A pipeline may drop, move or retype `_id`, as far as the server is concerned.
    for id in 10..13 {
        documents.insert_one(doc! {"_id": id, "a": 1, "b": 2, "pad": "p".repeat(500)}).await?;
    }
    documents.update_one(one(10), vec![doc! {"$project": {"_id": 0, "a": 0}}]).await?;
    let last = doc! {"b": "$b", "pad": "$pad", "a": "$a", "_id": "$_id"};
    documents.update_one(one(11), vec![doc! {"$replaceWith": last}]).await?;
    documents.update_one(one(12), vec![doc! {"$set": {"_id": {"$toLong": "$_id"}}}]).await?;
    for id in 10..13 {
        documents.update_one(one(id), doc! {"$set": {"pad": id, "later": {"x": 1}}}).await?;
    }
    // An update that adds a field of a unique index is never half done.
    let unique = doc! {"key": {"a": 1, "b": 1}, "name": "u", "unique": true};
    source.database("shop").run_command(doc! {"createIndexes": "pairs", "indexes": [unique]}).await?;
    let pairs = source.database("shop").collection::<Document>("pairs");
    pairs.insert_many([doc! {"_id": 1, "a": 2}, doc! {"_id": 2, "a": 1}]).await?;
    pairs.update_one(one(2), doc! {"$set": {"a": 2, "b": 5}}).await?;
    // Ids that share their nearest double.
    let large = 1_i64 << 60;
    let snowflakes = source.database("shop").collection::<Document>("snowflakes");
    snowflakes.insert_many((large..large + 200).map(|id| doc! {"_id": id, "n": {"v": id}})).await?;
    for id in large..large + 200 {
        snowflakes.update_one(doc! {"_id": id}, doc! {"$set": {"n.w": id - large}}).await?;
    }
    snowflakes.delete_many(doc! {"n.w": {"$mod": [3, 0]}}).await?;
    // A document that holds a name twice keeps both, whatever is added to it.
    let mut twice = rawdoc! {"_id": 8, "twice": 1, "n": 1};
    twice.append(cstr!("twice"), 2);
    documents.clone_with_type::<RawDocumentBuf>().insert_one(twice).await?;
    documents.update_one(one(8), doc! {"$set": {"n": 2}}).await?;
    documents.update_one(one(8), doc! {"$set": {"new": {"z": 1}}}).await?;
    documents.update_one(one(8), doc! {"$set": {"new.a": 2}}).await?;
    let comparison = equal(&mut pair, &Options::default()).await?;
    println!("{comparison}");
    ensure!(stream(&pair).await?.diverged == 0, "no document had to be fetched");
    pair.check_logs(&[])
}

/// The server puts its own time into empty timestamps of what is inserted and of replacements, but not of `$set`, of
/// pipelines and of upserts that insert: a source may hold them, and what is written at the target must not be stamped.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn empty_timestamps_stay_empty() -> Result<()> {
    const EMPTY: Timestamp = Timestamp { time: 0, increment: 0 };
    let mut pair = pair(PairOptions::default()).await?;
    let (source, target) = (client(&mut pair, Side::North)?, client(&mut pair, Side::South)?);
    let unique = doc! {"key": {"u": 1}, "name": "u", "unique": true};
    for name in ["many_lanes", "one_lane"] {
        let shop = source.database("shop");
        let documents = shop.collection::<Document>(name);
        documents.insert_many((0..5).map(|id| doc! {"_id": id, "u": id, "deep": {"a": 1}})).await?;
        if name == "one_lane" {
            shop.run_command(doc! {"createIndexes": name, "indexes": [&unique]}).await?;
        }
        let upsert = doc! {"$setOnInsert": {"u": 10, "at": EMPTY}};
        documents.update_one(doc! {"_id": 10}, upsert).upsert(true).await?;
        documents.update_one(doc! {"_id": 0}, doc! {"$set": {"at": EMPTY}}).await?;
        documents.update_one(doc! {"_id": 0}, doc! {"$set": {"deep.a": 2}}).await?;
        let literally = vec![doc! {"$replaceWith": {"$literal": {"_id": 1, "u": 1, "at": EMPTY}}}];
        documents.update_one(doc! {"_id": 1}, literally).await?;
        // What a target lost comes as the source has it (rule K).
        documents.update_one(doc! {"_id": 2}, doc! {"$set": {"at": EMPTY}}).await?;
        caught_up(&mut pair).await?;
        let there = target.database("shop").collection::<Document>(name);
        for id in [2, 10] {
            ensure!(there.delete_one(doc! {"_id": id}).await?.deleted_count == 1, "{name} {id} was not there");
            documents.update_one(doc! {"_id": id}, doc! {"$set": {"again": true}}).await?;
        }
        let comparison = equal(&mut pair, &Options::default()).await?;
        let empty = there.count_documents(doc! {"at": EMPTY}).await?;
        println!("{name}: {comparison}; {empty} empty timestamps");
        ensure!(empty == 4, "{empty} empty timestamps at the target");
    }
    ensure!(stream(&pair).await?.diverged == 4, "only what was deleted at the target differs");
    pair.check_logs(&[])
}

/// The target's server deletes nothing by itself: the source may yet decide otherwise.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ttl_indexes_and_users_write_nothing_at_the_target() -> Result<()> {
    let set_parameters = vec![("ttlMonitorSleepSecs".to_owned(), "1".to_owned())];
    let sets = Sets::New(mongo::Options { set_parameters, ..mongo::Options::default() });
    let mut pair = pair(PairOptions { sets, ..PairOptions::default() }).await?;
    let (source, target) = (client(&mut pair, Side::North)?, client(&mut pair, Side::South)?);
    source.database("admin").run_command(doc! {"setParameter": 1, "ttlMonitorEnabled": false}).await?;
    let index = doc! {"key": {"at": 1}, "name": "ttl", "expireAfterSeconds": 60};
    let shop = source.database("shop");
    shop.run_command(doc! {"createIndexes": "sessions", "indexes": [index]}).await?;
    let old = bson::DateTime::from_millis(1_000_000_000_000);
    shop.collection::<Document>("sessions").insert_many((0..100).map(|id| doc! {"_id": id, "at": old})).await?;
    caught_up(&mut pair).await?;
    let passes = || async {
        let status = target.database("admin").run_command(doc! {"serverStatus": 1}).await?;
        Ok::<_, anyhow::Error>(status.get_document("metrics")?.get_document("ttl")?.get_i64("passes")?)
    };
    let before = passes().await?;
    wait::until("TTL passes at the target", Duration::from_secs(60), || async {
        let now = passes().await?;
        ensure!(now >= before + 3, "{} passes", now - before);
        Ok(())
    })
    .await?;
    let shop =
        shop.run_command(doc! {"collMod": "sessions", "index": {"name": "ttl", "expireAfterSeconds": 2_000_000_000}});
    shop.await?;
    let app = pair.site(Side::South).mongo.client(User::App)?.database("shop").collection::<Document>("sessions");
    let written = app.insert_one(doc! {"_id": "own"}).await.expect_err("an application writes at the target");
    ensure!(written.to_string().contains("blocked"), "{written}");
    let comparison = equal(&mut pair, &Options::default()).await?;
    println!("{comparison}");
    ensure!(comparison.documents >= 100, "the source kept its documents");
    pair.check_logs(&[])
}
