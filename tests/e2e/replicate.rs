//! The main job: everything that is written at one site is at the other, byte for byte.

use anyhow::{Result, ensure};
use bson::{Document, Timestamp, doc};
use farshore_testkit::compare::Options;
use farshore_testkit::pair::{PairOptions, Side};
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
    let missing = counts.missing(Profile::default().kinds());
    assert!(missing.is_empty(), "kinds of writes that never took effect: {missing:?}");
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
