//! What is refused, it is refused by name and with the way out, and everything else goes on.

use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use bson::{DateTime, Document, doc};
use farshore_testkit::agent::{AgentConfig, AgentProcess};
use farshore_testkit::compare::Options;
use farshore_testkit::mongo::{ReplicaSet, Standalone, Warm};
use farshore_testkit::pair::{Pair, PairOptions, Side};
use farshore_testkit::pki::Pki;
use farshore_testkit::wait;
use mongodb::Client;
use mongodb::options::IndexOptions;

use crate::support::{caught_up, client, equal, now_at, pair, status, stream, streaming};

const DEADLINE: Duration = Duration::from_secs(60);
const NOT_REPLICATED: &str = "a collection is not replicated";

/// What is refused in these tests, and what lies behind it.
fn others() -> Options {
    let skip = ["shop.ring", "shop.series", "shop.system.buckets.series", "shop.system.views"];
    Options { skip: skip.map(str::to_owned).into(), ..Options::default() }
}

async fn write(source: &Client, round: i32) -> Result<()> {
    let shop = source.database("shop");
    for collection in ["plain", "ring"] {
        let documents = (0..20).map(|n| doc! {"_id": round * 100 + n, "n": n});
        shop.collection::<Document>(collection).insert_many(documents).await?;
        shop.collection::<Document>(collection).update_many(doc! {}, doc! {"$inc": {"n": 1}}).await?;
    }
    let points = (0..20).map(|n| doc! {"t": DateTime::from_millis(1_700_000_000_000 + n * 1_000), "m": 1, "x": n});
    shop.collection::<Document>("series").insert_many(points).await?;
    Ok(())
}

async fn refused(pair: &Pair) -> Result<Vec<(String, String)>> {
    let refused = stream(pair).await?.refused;
    let mut refused: Vec<_> = refused.into_iter().map(|one| (one.namespace, one.reason)).collect();
    refused.sort();
    Ok(refused)
}

fn refusals() -> Vec<(String, String)> {
    let entry = |name: &str, what: &str| (name.to_owned(), format!("{what} collections are not replicated yet"));
    vec![entry("shop.ring", "capped"), entry("shop.series", "time-series")]
}

/// How often the agent of south said that this collection is not replicated.
fn said(pair: &Pair, namespace: &str) -> Result<usize> {
    let log = pair.south.agents[0].log()?;
    Ok(log.lines().filter(|line| line.contains(NOT_REPLICATED) && line.contains(namespace)).count())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn capped_and_time_series_collections_are_refused_by_name_and_the_rest_goes_on() -> Result<()> {
    let mut pair = pair(PairOptions::default()).await?;
    let source = client(&mut pair, Side::North)?;
    let shop = source.database("shop");
    shop.run_command(doc! {"create": "ring", "capped": true, "size": 10_000, "max": 30}).await?;
    shop.run_command(doc! {"create": "series", "timeseries": {"timeField": "t", "metaField": "m"}}).await?;
    for round in 1..=4 {
        write(&source, round).await?;
        let comparison = equal(&mut pair, &others()).await?;
        ensure!(comparison.documents == round as u64 * 20, "{comparison}");
        ensure!(refused(&pair).await? == refusals(), "round {round}: refused {:?}", refused(&pair).await?);
        let problems = status(&pair.pki, &pair.south.agents[0]).await?.problems;
        for name in ["shop.ring", "shop.series"] {
            ensure!(problems.iter().any(|p| p.severity == "error" && p.message.contains(name)), "{problems:?}");
        }
        match round {
            2 => pair.south.agents[0].restart()?,
            3 => pair.north.agents[0].restart()?,
            _ => {}
        }
        streaming(&pair).await?;
    }
    // One that is not replicated takes the place of one that is: what it replaces goes all the same.
    let target = client(&mut pair, Side::South)?;
    shop.run_command(doc! {"create": "spare", "capped": true, "size": 10_000}).await?;
    source
        .database("admin")
        .run_command(doc! {"renameCollection": "shop.spare", "to": "shop.plain", "dropTarget": true})
        .await?;
    caught_up(&mut pair).await?;
    let left = target.database("shop").list_collection_names().await?;
    ensure!(!left.contains(&"plain".to_owned()), "it is still at the target: {left:?}");
    shop.collection::<Document>("plain").drop().await?;
    // The name is free again for what can be replicated.
    shop.collection::<Document>("ring").drop().await?;
    shop.collection::<Document>("ring").insert_one(doc! {"_id": 1}).await?;
    shop.collection::<Document>("series").drop().await?;
    let comparison = equal(&mut pair, &Options::default()).await?;
    ensure!(refused(&pair).await?.is_empty(), "still refused: {:?}", refused(&pair).await?);
    let (ring, series) = (said(&pair, "shop.ring")?, said(&pair, "shop.series")?);
    println!("4 rounds, {comparison}; said {ring} and {series} times");
    // Once by each of the two processes.
    ensure!((ring, series) == (2, 2), "said {ring} and {series} times that they are not replicated");
    pair.check_logs(&[NOT_REPLICATED])
}

/// The same documents, index and capped collection at both sites.
async fn fill(client: &Client) -> Result<()> {
    let shop = client.database("shop");
    let items = shop.collection::<Document>("items");
    items.insert_many((0..50).map(|n| doc! {"_id": n, "code": format!("c{n}"), "n": 0})).await?;
    let unique = mongodb::IndexModel::builder()
        .keys(doc! {"code": 1})
        .options(IndexOptions::builder().unique(true).build())
        .build();
    items.create_index(unique).await?;
    shop.run_command(doc! {"create": "ring", "capped": true, "size": 10_000}).await?;
    shop.collection("ring").insert_one(doc! {"_id": 1}).await?;
    shop.collection("report").insert_one(doc! {"_id": "old"}).await?;
    Ok(())
}

/// Both sites as they were before there was Farshore, and with data.
async fn sites_with_data() -> Result<Pair> {
    let mut pair = Pair::start(&PairOptions::default()).await?;
    pair.wait_ready(DEADLINE).await?;
    for side in [Side::North, Side::South] {
        pair.site(side).agents[0].kill9()?;
        pair.site(side).agents[0].wipe_data()?;
        let client = client(&mut pair, side)?;
        client.database("farshore").drop().await?;
        fill(&client).await?;
    }
    for side in [Side::South, Side::North] {
        pair.site(side).agents[0].restart()?;
    }
    Ok(pair)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_target_that_is_not_empty_is_refused_until_start_at_says_since_when_it_is_equal() -> Result<()> {
    let mut pair = sites_with_data().await?;
    let source = client(&mut pair, Side::North)?;
    let shared = &pair;
    let reason = wait::until("the target to be refused", DEADLINE, || async {
        let stream = stream(shared).await?;
        match stream.state.as_str() {
            "refused" => Ok(stream.reason),
            state => bail!("{state} ({})", stream.reason),
        }
    })
    .await?;
    ensure!(reason.contains("not empty") && reason.contains("shop.") && reason.contains("apply.start_at"), "{reason}");
    ensure!(pair.south.agents[0].log()?.contains("the target is not empty"), "the log does not say why");

    let at = now_at(&source).await?;
    let items = source.database("shop").collection::<Document>("items");
    // The first the stream hears of a collection is that another takes its place.
    source.database("shop").collection("fresh").insert_one(doc! {"_id": "new"}).await?;
    let rename = doc! {"renameCollection": "shop.fresh", "to": "shop.report", "dropTarget": true};
    source.database("admin").run_command(rename).await?;
    items.update_many(doc! {}, doc! {"$inc": {"n": 1}}).await?;
    items.delete_many(doc! {"_id": {"$lt": 10}}).await?;
    items.insert_one(doc! {"_id": 100, "code": "c1"}).await?;
    source.database("shop").collection("ring").insert_one(doc! {"_id": 2}).await?;
    pair.south.agents[0].config_mut().set_text("apply", "start_at", &at.to_string());
    for round in 0..3 {
        pair.south.agents[0].restart()?;
        streaming(&pair).await?;
        items.insert_one(doc! {"_id": 200 + round, "code": format!("r{round}")}).await?;
        let comparison = equal(&mut pair, &others()).await?;
        let stream = stream(&pair).await?;
        ensure!(stream.diverged == 0, "what was there counts as different: {:?}", stream.diverged_kinds);
        ensure!(refused(&pair).await?.iter().map(|(name, _)| name.as_str()).eq(["shop.ring"]), "{:?}", stream.refused);
        println!("refused: {reason}\nstart_at {at}, round {round}: {comparison}");
    }
    pair.check_logs(&[NOT_REPLICATED])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_is_no_replica_set_is_refused_in_so_many_words() -> Result<()> {
    let pki = Pki::new("farshore")?;
    let (set, server) = tokio::try_join!(ReplicaSet::warm(Warm::One), Standalone::start())?;
    for site in ["north", "south"] {
        let peer = if site == "north" { "south" } else { "north" };
        let mut config = AgentConfig::new(site, "north", &set, &pki)?.peer(peer, &[]);
        config.set_text("mongodb", "uri", &format!("{}?replicaSet=rs0", server.uri()));
        config.unset("mongodb", "username");
        config.unset("mongodb", "password_file");
        let agent = AgentProcess::start(config)?;
        let told = wait::until("the agent to refuse the server", DEADLINE, || async {
            let status = status(&pki, &agent).await?;
            let problem = status.problems.into_iter().find(|problem| problem.subject == "mongodb");
            let told = problem.map(|problem| problem.message).context("no problem is told")?;
            ensure!(told.contains("is not a member of a replica set"), "{told}");
            Ok(told)
        })
        .await?;
        let ready = agent.get("/readyz").await?;
        let log = agent.log()?;
        println!(
            "{site}: {told}; /readyz {} {}; {} lines of log",
            ready.status,
            ready.body.trim(),
            log.lines().count()
        );
        ensure!(log.contains("not a member of a replica set"), "the log does not say why");
        let written = server_databases(&server).await?;
        ensure!(!written.contains(&"farshore".to_owned()), "{site} wrote to a server it refuses: {written:?}");
    }
    Ok(())
}

async fn server_databases(server: &Standalone) -> Result<Vec<String>> {
    Ok(Client::with_uri_str(server.uri()).await?.list_database_names().await?)
}
