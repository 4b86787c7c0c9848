//! Healing by rule K: a target that was changed behind Farshore's back becomes equal again as soon as the source's changes
//! touch what differs, and every such document is counted by its kind and logged once.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use bson::{Bson, Document, doc};
use farshore::source::fetch::Fetcher;
use farshore_api::replication::v1::Fetch;
use farshore_testkit::compare::{self, Options};
use farshore_testkit::pair::{Pair, PairOptions, Side};
use farshore_testkit::wait;
use farshore_testkit::workload::{Profile, Until, Workload};
use mongodb::{Client, Collection};

use crate::support::{caught_up, client, equal, now_at, pair, stream};

const NOTICED: &str = "document differs from the source; fetched again";

fn items(client: &Client) -> Collection<Document> {
    client.database("shop").collection("items")
}

fn users(client: &Client) -> Collection<Document> {
    client.database("shop").collection("users")
}

fn item(id: i32) -> Document {
    // Long enough for an update to tell of what changes in it, instead of the whole list.
    let mut list = vec![Bson::from(1), Bson::from(2), doc! {"x": 1}.into()];
    list.extend((0..10).map(|n| Bson::from(format!("a rather long text to make the list long, number {n}"))));
    doc! {"_id": id, "v": 0, "other": "as at the source", "deep": {"a": {"b": 1}}, "list": list}
}

fn user(id: i32, email: &str) -> Document {
    doc! {"_id": id, "email": email, "address": {"zip": id}, "name": format!("Name {id}")}
}

/// 60 items, and users whose `email`, `address.zip` and (in no case) `name` are unique.
async fn seed(source: &Client) -> Result<()> {
    items(source).insert_many((0..60).map(item)).await?;
    users(source).insert_many((0..40).map(|id| user(id, &format!("u{id}@x")))).await?;
    let index = |key: Document| doc! {"key": key, "name": "by value", "unique": true};
    let mut nested = index(doc! {"address.zip": 1, "email": 1});
    nested.insert("name", "nested");
    let mut folded = index(doc! {"name": 1});
    folded.extend(doc! {"name": "folded", "collation": {"locale": "en", "strength": 2}});
    let indexes = vec![index(doc! {"email": 1}), nested, folded];
    source.database("shop").run_command(doc! {"createIndexes": "users", "indexes": indexes}).await?;
    Ok(())
}

/// What is done to the target behind Farshore's back.
async fn damage(target: &Client) -> Result<()> {
    let (items, users) = (items(target), users(target));
    items.delete_many(doc! {"_id": {"$lt": 24}}).await?;
    items.insert_many((1000..1012).map(|id| doc! {"_id": id, "stranger": true})).await?;
    items.update_many(doc! {"_id": {"$gte": 30, "$lt": 41}}, doc! {"$set": {"v": "x", "other": "changed"}}).await?;
    let misshapen = doc! {"$set": {"deep": 5, "list": "none"}};
    items.update_many(doc! {"_id": {"$gte": 50, "$lt": 54}}, misshapen).await?;
    // Strangers that hold what users at the source get later, the last in other letters under a collation.
    users.insert_many([user(500, "new@x"), user(501, "changed@x"), user(502, "later@x")]).await?;
    users.insert_one(doc! {"_id": 503, "email": "stranger@x", "address": {"zip": 503}, "name": "ANNA"}).await?;
    // A ring: healing one of them needs the next one healed.
    for (id, email) in [(7, "z@x"), (8, "u7@x"), (9, "u8@x")] {
        users.update_one(doc! {"_id": id}, doc! {"$set": {"email": email}}).await?;
    }
    Ok(())
}

/// What the source does to all of it; the keys that must be noticed, by kind.
async fn touch(source: &Client) -> Result<BTreeMap<&'static str, BTreeSet<i64>>> {
    let (items, users) = (items(source), users(source));
    for id in 0..24 {
        let q = doc! {"_id": id};
        match id % 4 {
            0 => items.update_one(q, doc! {"$inc": {"v": 1}}).await?.matched_count,
            1 => items.update_one(q, doc! {"$set": {"deep.a.b": 2, "list.0": 9}}).await?.matched_count,
            2 => items.replace_one(q, doc! {"v": 2}).await?.matched_count,
            _ => items.delete_one(q).await?.deleted_count,
        };
    }
    items.insert_many((1000..1010).map(item)).await?;
    items.update_many(doc! {"_id": {"$gte": 1000, "$lt": 1005}}, doc! {"$inc": {"v": 5}}).await?;
    for id in 30..35 {
        items.replace_one(doc! {"_id": id}, doc! {"v": id}).await?;
    }
    items.delete_many(doc! {"_id": {"$gte": 35, "$lt": 40}}).await?;
    // Only a verify can find what is left of this one: a change of one field says nothing of the others.
    items.update_one(doc! {"_id": 40}, doc! {"$set": {"v": 40}}).await?;
    items.update_one(doc! {"_id": 50}, doc! {"$unset": {"deep.a.b": 1}}).await?;
    let shorter = doc! {"$set": {"list": {"$slice": ["$list", 8]}}};
    items.update_one(doc! {"_id": 51}, vec![shorter]).await?;
    items.update_one(doc! {"_id": 52}, doc! {"$set": {"list.2.x": 7}}).await?;
    items.update_one(doc! {"_id": 53}, doc! {"$set": {"deep.a.b": 7}}).await?;
    users.insert_one(user(100, "new@x")).await?;
    users.update_one(doc! {"_id": 1}, doc! {"$set": {"email": "changed@x"}}).await?;
    users.insert_one(doc! {"_id": 101, "email": "u101@x", "address": {"zip": 101}, "name": "anna"}).await?;
    users.insert_one(user(102, "z@x")).await?;
    // All in one source transaction: what is gone, what is there already, what is blocked.
    let mut session = source.start_session().await?;
    session.start_transaction().await?;
    items.update_one(doc! {"_id": 0}, doc! {"$inc": {"v": 1}}).session(&mut session).await?;
    items.insert_many((1010..1012).map(item)).session(&mut session).await?;
    users.insert_one(user(103, "later@x")).session(&mut session).await?;
    users.insert_one(user(502, "own@x")).session(&mut session).await?;
    session.commit_transaction().await?;
    Ok(BTreeMap::from([
        ("missing", (0..24).collect()),
        ("exists", (1000..1012).chain([502]).collect()),
        ("shape", (50..54).collect()),
        ("unique", BTreeSet::from([500, 501, 503, 7, 8, 9])),
    ]))
}

/// Keys of the documents the target's agent said were different, by kind, in the order of its log.
fn noticed(pair: &Pair) -> Result<Vec<(String, i64)>> {
    let log = pair.south.agents[0].log()?;
    let lines = log.lines().filter(|line| line.contains(NOTICED));
    let parse = |line: &str| {
        let line: serde_json::Value = serde_json::from_str(line)?;
        let field = |name: &str| {
            let found = line.get(name).or_else(|| line.get("fields").and_then(|f| f.get(name)));
            found.and_then(|v| v.as_str()).map(str::to_owned).with_context(|| format!("no {name} in {line}"))
        };
        let key: serde_json::Value = serde_json::from_str(&field("key")?)?;
        Ok((field("kind")?, key["_id"].as_i64().context("an `_id`")?))
    };
    lines.map(parse).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_changed_at_the_target_is_healed_when_the_source_touches_it() -> Result<()> {
    let mut pair = pair(PairOptions::default()).await?;
    let (source, target) = (client(&mut pair, Side::North)?, client(&mut pair, Side::South)?);
    seed(&source).await?;
    caught_up(&mut pair).await?;
    damage(&target).await?;

    // Others write meanwhile, also to what is being healed.
    let workload = Workload::new(3, Profile::without_ddl(), "app");
    let busy = async {
        for round in 0..40 {
            let some = doc! {"_id": {"$in": [0, 4, 4 * (round % 6), 1000 + round % 12]}};
            items(&source).update_many(some, doc! {"$inc": {"n": 1}}).await?;
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        anyhow::Ok(())
    };
    let (counts, expected, ()) = tokio::try_join!(workload.run(&source, Until::Operations(600)), touch(&source), busy)?;
    caught_up(&mut pair).await?;

    let comparison = compare::compare(&source, &target, &Options::default()).await?;
    ensure!(comparison.differences.len() == 1 && comparison.more == 0, "{comparison}");
    let left = format!("{}", comparison.differences[0]);
    ensure!(left.contains("shop.items") && left.contains("40") && left.contains("other"), "{left}");
    items(&source).replace_one(doc! {"_id": 40}, item(40)).await?;

    let said = noticed(&pair)?;
    let found: BTreeMap<&str, BTreeSet<i64>> = said.iter().fold(BTreeMap::new(), |mut found, (kind, key)| {
        found.entry(kind.as_str()).or_insert_with(BTreeSet::new).insert(*key);
        found
    });
    ensure!(found == expected, "noticed {found:?}, expected {expected:?}");
    let distinct: BTreeSet<_> = said.iter().collect();
    ensure!(distinct.len() == said.len(), "logged more than once: {said:?}");
    let stream = stream(&pair).await?;
    for (kind, keys) in &expected {
        ensure!(stream.diverged_kinds.get(*kind) == Some(&(keys.len() as u64)), "{kind}: {:?}", stream.diverged_kinds);
    }
    ensure!(stream.diverged == said.len() as u64 && stream.healed == stream.diverged, "{stream:?}");
    let comparison = equal(&mut pair, &Options::default()).await?;
    println!(
        "{} healed ({:?}) beside {} operations\n{comparison}",
        said.len(),
        stream.diverged_kinds,
        counts.operations()
    );
    pair.check_logs(&[])
}

/// Unique values wander between documents while the target is a stranger's: what is fetched is ahead of what is still to be
/// applied and must not block it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn healing_under_wandering_unique_values_ends_equal() -> Result<()> {
    const USERS: i32 = 12;
    let mut pair = pair(PairOptions::default()).await?;
    let (source, target) = (client(&mut pair, Side::North)?, client(&mut pair, Side::South)?);
    seed(&source).await?;
    caught_up(&mut pair).await?;
    // These are in the way of the first round for sure; the rest depends on who comes first.
    users(&target).insert_many((0..3).map(|n| user(900 + n, &format!("r{n}@x")))).await?;
    let mut damaged = 3;
    for round in 0..30 {
        // Values go round at the source, each step valid by itself.
        let take = async {
            for id in 0..USERS {
                let set = |email: String| doc! {"$set": {"email": email}};
                let value = format!("r{}@x", (id + round) % USERS);
                users(&source).update_many(doc! {"email": &value}, set(format!("free{round}-{id}@x"))).await?;
                users(&source).update_one(doc! {"_id": id}, set(value)).await?;
            }
            anyhow::Ok(())
        };
        let spoil = async {
            for id in 0..3 {
                let stranger = user(1000 + round * 3 + id, &format!("r{}@x", (round + id) % USERS));
                let spoilt = users(&target).insert_one(stranger).await.is_ok();
                damaged += u64::from(spoilt);
                let other = doc! {"$set": {"email": format!("r{}@x", (round + 2 * id) % USERS)}};
                damaged +=
                    u64::from(users(&target).update_one(doc! {"_id": (round + id) % USERS}, other).await.is_ok());
            }
            anyhow::Ok(())
        };
        tokio::try_join!(take, spoil)?;
    }
    caught_up(&mut pair).await?;
    // What nobody needed is still there: the source touches every document and every value once more.
    for id in 0..USERS {
        let value = users(&source).find_one(doc! {"_id": id}).await?.context("a user")?;
        users(&source)
            .replace_one(
                doc! {"_id": id},
                doc! {"email": format!("parked{id}@x"), "address": {"zip": id}, "name": format!("Name {id}")},
            )
            .await?;
        users(&source).replace_one(doc! {"_id": id}, value).await?;
    }
    caught_up(&mut pair).await?;
    let shared = &pair;
    let healed = wait::until("nothing to be left", Duration::from_secs(20), || async {
        let stream = stream(shared).await?;
        let left = compare::compare(&source, &target, &Options::default()).await?;
        // Strangers whose values nobody wants any more are for a verify.
        let strangers = |d: &compare::Difference| matches!(d.kind, compare::Kind::DocumentExtra { .. });
        match left.more == 0 && left.differences.iter().all(strangers) && stream.state == "streaming" {
            true => Ok((stream.healed, left.differences.len())),
            false => bail!("{} {}: {left}", stream.state, stream.reason),
        }
    })
    .await?;
    println!("{damaged} times damaged, {} documents healed, {} strangers left", healed.0, healed.1);
    ensure!(healed.0 >= 3, "only {} documents were healed", healed.0);
    pair.check_logs(&[])
}

/// Under a collation `_id`s that differ are one to the server: which of them a document has changes while it is healed, and
/// changes that build on the one must not be applied to the other.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ids_that_are_one_under_a_collation_are_healed_at_one_time() -> Result<()> {
    const WORDS: [&str; 6] = ["ant", "bee", "cat", "dog", "elk", "fox"];
    let mut pair = pair(PairOptions::default()).await?;
    let (source, target) = (client(&mut pair, Side::North)?, client(&mut pair, Side::South)?);
    let collation = doc! {"locale": "en", "strength": 2};
    source.database("shop").run_command(doc! {"create": "words", "collation": collation}).await?;
    let words = |client: &Client| client.database("shop").collection::<Document>("words");
    words(&source).insert_many(WORDS.map(|word| doc! {"_id": word, "v": 0})).await?;
    caught_up(&mut pair).await?;
    // Some are gone, some are others in the same letters, and some strangers are in the way of what comes.
    words(&target).delete_many(doc! {"_id": {"$in": ["ant", "bee", "cat", "dog"]}}).await?;
    words(&target).insert_many([doc! {"_id": "DOG", "stranger": true}, doc! {"_id": "Gnu", "stranger": true}]).await?;
    pair.south.agents[0].kill9()?;

    let set = |word: &str, v: i32| (doc! {"_id": word}, doc! {"$set": {"v": v, format!("of {word}"): true}});
    for (round, word) in WORDS.iter().enumerate() {
        let upper = word.to_uppercase();
        let (q, u) = set(word, 1);
        words(&source).update_one(q, u).await?;
        // Some change their letters within one transaction of the target, some much later.
        if round % 2 == 1 {
            let filler = (0..1_200).map(|n| doc! {"_id": format!("{word} {n}"), "v": n});
            words(&source).insert_many(filler).await?;
        }
        words(&source).delete_one(doc! {"_id": word}).await?;
        words(&source).insert_one(doc! {"_id": &upper, "v": 2}).await?;
        let (q, u) = set(&upper, 3);
        words(&source).update_one(q, u).await?;
        if round % 3 == 0 {
            words(&source).delete_one(doc! {"_id": &upper}).await?;
            words(&source).insert_one(doc! {"_id": word, "v": 4}).await?;
            let (q, u) = set(word, 5);
            words(&source).update_one(q, u).await?;
        }
    }
    words(&source).insert_one(doc! {"_id": "gnu", "v": 1}).await?;
    pair.south.agents[0].restart()?;
    let comparison = equal(&mut pair, &Options::default()).await?;
    let stream = stream(&pair).await?;
    println!("healed {} ({:?})\n{comparison}", stream.healed, stream.diverged_kinds);
    // The first one found brings the others ahead, which are not told one by one then.
    ensure!(stream.healed >= 1 && stream.healed == stream.diverged, "{stream:?}");
    pair.check_logs(&[])
}

/// The time of a document that is ahead may lie before a rename, which ends what the server can tell of it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_time_before_a_rename_is_no_reason_to_fetch_nothing() -> Result<()> {
    let mut pair = pair(PairOptions::default()).await?;
    let source = client(&mut pair, Side::North)?;
    let shop = source.database("shop");
    shop.collection::<Document>("a").insert_one(doc! {"_id": "x", "v": 1}).await?;
    let listed = shop.run_command(doc! {"listCollections": 1, "filter": {"name": "a"}}).await?;
    let listed = listed.get_document("cursor")?.get_array("firstBatch")?[0].as_document().context("a collection")?;
    let Some(Bson::Binary(uuid)) = listed.get_document("info")?.get("uuid").cloned() else { bail!("{listed}") };
    let before = now_at(&source).await?;
    let fetcher = Fetcher::new(source.clone());
    let key = bson::serialize_to_vec(&doc! {"_id": "x"})?;
    let mut request = Fetch {
        database: "shop".into(),
        collection: "a".into(),
        collection_uuid: uuid.bytes.into(),
        keys: vec![key.into()],
        at: before.0,
        ..Fetch::default()
    };
    for (name, then) in [("a", "b"), ("b", "c"), ("c", "d")] {
        let now = now_at(&source).await?;
        let fetched = fetcher.fetch(&request, now).await;
        ensure!(fetched.error.is_empty() && fetched.documents.len() == 1, "{name}: {fetched:?}");
        ensure!(!fetched.documents[0].is_empty() && fetched.at >= before.0, "{name}: {fetched:?}");
        let rename = doc! {"renameCollection": format!("shop.{name}"), "to": format!("shop.{then}")};
        source.database("admin").run_command(rename).await?;
    }
    shop.collection::<Document>("d").drop().await?;
    let fetched = fetcher.fetch(&request, now_at(&source).await?).await;
    ensure!(fetched.error.is_empty() && fetched.collection_gone, "{fetched:?}");
    request.at = 0;
    ensure!(fetcher.fetch(&request, now_at(&source).await?).await.collection_gone, "gone");
    Ok(())
}
