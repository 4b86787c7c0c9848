//! The role of the agent's user lets it do everything the agent does, and nothing of what it must not.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bson::{Binary, Document, Timestamp, doc, spec::BinarySubtype};
use farshore_testkit::mongo::{ReplicaSet, User, Warm};
use farshore_testkit::wait;
use mongodb::options::{
    ChangeStreamOptions, IndexOptions, ReadConcern, SelectionCriteria, TransactionOptions, WriteConcern,
};
use mongodb::{Client, IndexModel};

async fn run(client: &Client, database: &str, command: Document) -> Result<Document> {
    let name = format!("{command}");
    client.database(database).run_command(command).await.with_context(|| format!("{database}: {name}"))
}

#[tokio::test]
async fn captures_every_kind_of_change() -> Result<()> {
    let set = ReplicaSet::warm(Warm::One).await?;
    let farshore = set.client(User::Farshore)?;
    let app = set.client(User::App)?;
    let options = ChangeStreamOptions::builder().show_expanded_events(true).build();
    let mut stream = farshore.watch().with_options(options).await.context("open a change stream")?;

    let items = app.database("shop").collection::<Document>("items");
    items.insert_one(doc! { "_id": 1 }).await?;
    items.create_index(IndexModel::builder().keys(doc! { "a": 1 }).build()).await?;
    run(&app, "shop", doc! { "create": "cheap", "viewOn": "items", "pipeline": [{ "$match": { "price": 1 } }] })
        .await?;
    run(&app, "shop", doc! { "collMod": "items", "validator": { "a": { "$exists": true } } }).await?;
    run(&farshore, "farshore", doc! { "create": "marks" }).await?;
    run(&app, "admin", doc! { "renameCollection": "shop.items", "to": "shop.things" }).await?;
    run(&app, "shop", doc! { "dropDatabase": 1 }).await?;

    let mut seen = Vec::new();
    while !seen.contains(&"dropDatabase".to_owned()) {
        let next = tokio::time::timeout(Duration::from_secs(20), stream.next_if_any()).await.context("no change")??;
        if let Some(change) = next {
            seen.push(serde_json::to_value(&change.operation_type)?.as_str().context("a name")?.to_owned());
        }
    }
    for kind in ["create", "insert", "createIndexes", "modify", "rename", "drop"] {
        ensure!(seen.contains(&kind.to_owned()), "no {kind} among {seen:?}");
    }
    Ok(())
}

#[tokio::test]
async fn applies_every_kind_of_change() -> Result<()> {
    let set = ReplicaSet::warm(Warm::One).await?;
    let farshore = set.client(User::Farshore)?;
    let create =
        doc! { "create": "items", "validator": { "name": { "$exists": true } }, "collation": { "locale": "de" } };
    run(&farshore, "shop", create).await?;
    let insert = doc! { "insert": "items", "documents": [{ "_id": 1 }], "bypassDocumentValidation": true };
    let done = run(&farshore, "shop", insert).await?;
    ensure!(!done.contains_key("writeErrors"), "{done}");
    let found = run(&farshore, "shop", doc! { "listCollections": 1, "filter": { "name": "items" } }).await?;
    let uuid = found.get_document("cursor")?.get_array("firstBatch")?[0].as_document().context("a collection")?;
    let uuid = uuid.get_document("info")?.get("uuid").context("its UUID")?.clone();
    let update = doc! {
        "update": "items", "collectionUUID": uuid, "bypassDocumentValidation": true,
        "updates": [{ "q": { "_id": 1 }, "u": { "$set": { "a": 1 } } }],
    };
    ensure!(run(&farshore, "shop", update).await?.get_i32("nModified")? == 1);

    let index = doc! { "createIndexes": "items", "indexes": [{ "key": { "a": 1 }, "name": "a", "unique": true }] };
    run(&farshore, "shop", index).await?;
    run(&farshore, "shop", doc! { "collMod": "items", "index": { "name": "a", "hidden": true } }).await?;
    run(&farshore, "shop", doc! { "listIndexes": "items" }).await?;
    run(&farshore, "shop", doc! { "dropIndexes": "items", "index": "a" }).await?;
    run(&farshore, "shop", doc! { "create": "cheap", "viewOn": "items", "pipeline": [{ "$limit": 1 }] }).await?;
    run(&farshore, "shop", doc! { "collMod": "cheap", "viewOn": "items", "pipeline": [{ "$limit": 2 }] }).await?;
    run(&farshore, "shop", doc! { "find": "cheap" }).await?;
    run(&farshore, "shop", doc! { "find": "system.views" }).await?;
    run(&farshore, "shop", doc! { "drop": "cheap" }).await?;
    run(&farshore, "shop", doc! { "create": "old" }).await?;
    run(&farshore, "admin", doc! { "renameCollection": "shop.items", "to": "shop.old", "dropTarget": true }).await?;
    run(&farshore, "shop", doc! { "collStats": "old" }).await?;
    run(&farshore, "shop", doc! { "dbStats": 1 }).await?;
    run(&farshore, "shop", doc! { "delete": "old", "deletes": [{ "q": { "_id": 1 }, "limit": 1 }] }).await?;
    run(&farshore, "shop", doc! { "drop": "old" }).await?;
    let function = doc! { "_id": "f", "value": "function() {}" };
    run(&farshore, "shop", doc! { "insert": "system.js", "documents": [function] }).await?;
    run(&farshore, "shop", doc! { "dropDatabase": 1 }).await?;
    let names = farshore.list_database_names().await.context("list databases")?;
    ensure!(!names.contains(&"shop".to_owned()), "{names:?}");
    Ok(())
}

#[tokio::test]
async fn commits_its_position_and_the_changes_in_one_transaction() -> Result<()> {
    let set = ReplicaSet::warm(Warm::One).await?;
    let farshore = set.client(User::Farshore)?;
    let lanes = farshore.database("farshore").collection::<Document>("lanes");
    let items = farshore.database("shop").collection::<Document>("items");
    let unique = IndexOptions::builder().unique(true).build();
    lanes.create_index(IndexModel::builder().keys(doc! { "lane": 1 }).options(unique).build()).await?;
    lanes.insert_one(doc! { "_id": 1, "lane": 1, "term": 1 }).await?;
    items.insert_one(doc! { "_id": 1, "n": 0 }).await?;
    let options = TransactionOptions::builder()
        .read_concern(ReadConcern::snapshot())
        .write_concern(WriteConcern::builder().w(mongodb::options::Acknowledgment::Nodes(1)).build())
        .build();
    let mut session = farshore.start_session().await?;
    session.start_transaction().with_options(options).await?;
    lanes.update_one(doc! { "_id": 1, "term": 1 }, doc! { "$set": { "position": 7 } }).session(&mut session).await?;
    items.update_one(doc! { "_id": 1 }, doc! { "$inc": { "n": 1 } }).session(&mut session).await?;
    session.commit_transaction().await?;
    wait::until("the commit at majority", Duration::from_secs(10), || async {
        let lane = lanes.find_one(doc! {}).read_concern(ReadConcern::majority()).await?.context("no lane")?;
        ensure!(lane.get_i32("position").ok() == Some(7), "{lane}");
        Ok(())
    })
    .await
}

/// Ends the orphaned transaction of `owner`'s session as user farshore, by `kill`'s command.
async fn frees_the_document(set: &ReplicaSet, owner: User, kill: impl Fn(&Document) -> Document) -> Result<()> {
    let items = set.client(owner)?.database("shop").collection::<Document>("items");
    items.update_one(doc! { "_id": 1 }, doc! { "$inc": { "n": 1 } }).upsert(true).await?;
    let mut session = set.client(owner)?.start_session().await?;
    let lsid = session.id().clone();
    session.start_transaction().await?;
    items.update_one(doc! { "_id": 1 }, doc! { "$inc": { "n": 100 } }).session(&mut session).await?;

    let farshore = set.client(User::Farshore)?;
    run(&farshore, "admin", kill(&lsid)).await?;
    let items = farshore.database("shop").collection::<Document>("items");
    let write = items.update_one(doc! { "_id": 1 }, doc! { "$inc": { "n": 1 } });
    tokio::time::timeout(Duration::from_secs(5), async { write.await })
        .await
        .context("the transaction still blocks")??;
    ensure!(session.commit_transaction().await.is_err(), "a killed transaction committed");
    Ok(())
}

#[tokio::test]
async fn ends_orphaned_transactions_of_its_own_and_of_others() -> Result<()> {
    let set = ReplicaSet::warm(Warm::One).await?;
    // A predecessor had the same user: the server completes the session id with it.
    frees_the_document(&set, User::Farshore, |lsid| doc! { "killSessions": [{ "id": lsid.get("id") }] }).await?;
    frees_the_document(&set, User::App, |_| doc! { "killAllSessions": [{ "user": "app", "db": "admin" }] }).await?;
    // The id alone does not name a session: its owner's digest belongs to it, and is in the session's oplog entries.
    frees_the_document(&set, User::App, |lsid| {
        let uid = Binary { subtype: BinarySubtype::Generic, bytes: digest("app@admin") };
        doc! { "killAllSessionsByPattern": [{ "lsid": { "id": lsid.get("id"), "uid": uid } }] }
    })
    .await
}

fn digest(text: &str) -> Vec<u8> {
    use rustls::crypto::aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256;
    let suite = TLS13_AES_128_GCM_SHA256.tls13().expect("a TLS 1.3 suite");
    suite.common.hash_provider.hash(text.as_bytes()).as_ref().to_vec()
}

#[tokio::test]
async fn reads_what_it_needs_of_the_server() -> Result<()> {
    let set = ReplicaSet::warm(Warm::One).await?;
    let farshore = set.client(User::Farshore)?;
    let oplog = farshore.database("local").collection::<Document>("oplog.rs");
    let oldest = oplog.find_one(doc! {}).sort(doc! { "$natural": 1 }).await.context("read the oplog")?;
    let oldest: Timestamp = oldest.context("an entry")?.get_timestamp("ts")?;
    let config = farshore.database("local").collection::<Document>("system.replset");
    let config = config.find_one(doc! {}).await.context("read the set's configuration")?.context("it has one")?;
    ensure!(config.get_document("settings")?.contains_key("replicaSetId"), "{config}");

    run(&farshore, "admin", doc! { "replSetGetStatus": 1 }).await?;
    run(&farshore, "admin", doc! { "replSetGetConfig": 1 }).await?;
    run(&farshore, "admin", doc! { "serverStatus": 1 }).await?;
    run(&farshore, "admin", doc! { "getParameter": 1, "featureCompatibilityVersion": 1 }).await?;
    run(&farshore, "admin", doc! { "appendOplogNote": 1, "data": { "farshore": "mark" } }).await?;
    wait::until("the note in the oplog", Duration::from_secs(10), || async {
        let note = oplog.find_one(doc! { "ts": { "$gt": oldest }, "o.farshore": "mark" }).await?;
        note.context("not there yet")
    })
    .await?;
    let snapshot = doc! { "find": "items", "readConcern": { "level": "snapshot" } };
    let primary = SelectionCriteria::ReadPreference(mongodb::options::ReadPreference::Primary);
    farshore.database("shop").run_command(snapshot).selection_criteria(primary).await.context("read a snapshot")?;
    Ok(())
}

#[tokio::test]
async fn may_not_do_what_an_agent_has_no_business_with() -> Result<()> {
    let set = ReplicaSet::warm(Warm::One).await?;
    let farshore = set.client(User::Farshore)?;
    for (database, command) in [
        ("admin", doc! { "createUser": "eve", "pwd": "eve", "roles": [] }),
        ("admin", doc! { "usersInfo": 1 }),
        ("admin", doc! { "find": "system.users" }),
        ("admin", doc! { "shutdown": 1 }),
        ("admin", doc! { "replSetStepDown": 1 }),
        ("local", doc! { "insert": "oplog.rs", "documents": [{ "_id": 1 }] }),
        ("local", doc! { "drop": "startup_log" }),
        ("config", doc! { "delete": "transactions", "deletes": [{ "q": {}, "limit": 0 }] }),
    ] {
        let name = format!("{command}");
        let error = farshore.database(database).run_command(command).await.err();
        let code = error.as_ref().and_then(code);
        ensure!(code == Some(13), "{database}: {name}: {error:?}");
    }
    Ok(())
}

fn code(error: &mongodb::error::Error) -> Option<i32> {
    match error.kind.as_ref() {
        mongodb::error::ErrorKind::Command(error) => Some(error.code),
        _ => None,
    }
}
