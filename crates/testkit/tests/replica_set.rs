//! The replica sets themselves: starting, users, TLS, and everything that can be done to a member.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bson::{Document, doc};
use farshore_testkit::mongo::{Options, ReplicaSet, User, Warm};
use farshore_testkit::pki::Pki;
use farshore_testkit::process;
use farshore_testkit::wait;
use mongodb::error::ErrorKind;

const LONG: Duration = Duration::from_secs(30);

async fn insert(set: &ReplicaSet, user: User, id: i32) -> Result<()> {
    let collection = set.client(user)?.database("shop").collection::<Document>("items");
    collection.insert_one(doc! { "_id": id }).await?;
    Ok(())
}

async fn count(set: &ReplicaSet) -> Result<u64> {
    let collection = set.client(User::App)?.database("shop").collection::<Document>("items");
    Ok(collection.count_documents(doc! {}).await?)
}

fn code(error: &anyhow::Error) -> Option<i32> {
    match error.downcast_ref::<mongodb::error::Error>()?.kind.as_ref() {
        ErrorKind::Command(error) => Some(error.code),
        ErrorKind::Write(mongodb::error::WriteFailure::WriteError(error)) => Some(error.code),
        _ => None,
    }
}

#[tokio::test]
async fn one_member_starts_soon_and_keeps_its_data_over_a_kill() -> Result<()> {
    let begin = Instant::now();
    let set = ReplicaSet::start(Options::default()).await?;
    let took = begin.elapsed();
    eprintln!("a set of one member took {took:?}");
    ensure!(took < Duration::from_secs(15), "took {took:?}");
    insert(&set, User::App, 1).await?;
    ensure!(set.uri().ends_with("/?replicaSet=rs0") && !set.uri().contains('@'), "{}", set.uri());
    ensure!(set.usage(0)?.rss > 20 << 20, "{:?}", set.usage(0)?);

    set.kill9(0)?;
    ensure!(set.primary().await.is_err());
    set.restart(0).await?;
    ensure!(set.wait_primary(LONG).await? == 0);
    ensure!(count(&set).await? == 1);

    set.stop(0)?;
    let silent = set.primary().await.expect_err("a stopped server is silent");
    ensure!(silent.to_string().contains("silent"), "{silent}");
    set.cont(0)?;
    set.wait_primary(LONG).await?;

    set.step_down().await?;
    set.wait_primary(LONG).await?;
    insert(&set, User::App, 2).await?;

    let pid = set.pid(0);
    drop(set);
    ensure!(process::usage(pid).is_err(), "the server outlived its set");
    Ok(())
}

#[tokio::test]
async fn three_members_elect_another_when_the_primary_dies_or_steps_down() -> Result<()> {
    let set = ReplicaSet::warm(Warm::Three).await?;
    insert(&set, User::App, 1).await?;
    let first = set.wait_primary(LONG).await?;
    set.kill9(first)?;
    let second = set.wait_primary(LONG).await?;
    ensure!(first != second);
    insert(&set, User::App, 2).await?;
    set.restart(first).await?;
    set.wait_all().await?;

    set.step_down().await?;
    wait::until("another primary", LONG, || async {
        let now = set.primary().await?;
        ensure!(now != second, "still {now}");
        Ok(())
    })
    .await?;
    ensure!(count(&set).await? == 2);
    Ok(())
}

#[tokio::test]
async fn the_write_block_stops_the_application_but_not_the_agent() -> Result<()> {
    let set = ReplicaSet::warm(Warm::One).await?;
    let farshore = set.client(User::Farshore)?.database("admin");
    farshore.run_command(doc! { "setUserWriteBlockMode": 1, "global": true }).await?;
    let refused = insert(&set, User::App, 1).await.expect_err("writes are blocked");
    ensure!(code(&refused) == Some(371), "{refused:#}");
    insert(&set, User::Farshore, 2).await?;
    let status = farshore.run_command(doc! { "serverStatus": 1 }).await?;
    ensure!(status.get_document("repl")?.get_i32("userWriteBlockMode")? == 2);
    // Left blocked on purpose: the next lease must not find it so.
    drop(set);
    let set = ReplicaSet::warm(Warm::One).await?;
    insert(&set, User::App, 1).await
}

#[tokio::test]
async fn a_warm_set_is_clean_and_an_exclusive_lease() -> Result<()> {
    let one = ReplicaSet::warm(Warm::Open).await?;
    let other = ReplicaSet::warm(Warm::Open).await?;
    ensure!(one.pid(0) != other.pid(0));
    insert(&one, User::App, 1).await?;
    one.client(User::App)?.database("farshore").create_collection("marks").await?;
    let pid = one.pid(0);
    one.stop(0)?;
    drop(one);
    let again = ReplicaSet::warm(Warm::Open).await?;
    ensure!(again.pid(0) == pid, "a new one was started");
    let names = again.client(User::App)?.list_database_names().await?;
    ensure!(names.iter().all(|name| ["admin", "config", "local"].contains(&name.as_str())), "{names:?}");
    again.kill9(0)?;
    drop(again);
    drop(other);
    let alive = ReplicaSet::warm(Warm::Open).await?;
    insert(&alive, User::App, 1).await
}

#[tokio::test]
async fn with_tls_only_those_who_trust_the_ca_connect() -> Result<()> {
    let pki = Arc::new(Pki::new("farshore")?);
    let set = ReplicaSet::start(Options { tls: Some(Arc::clone(&pki)), ..Options::default() }).await?;
    insert(&set, User::Farshore, 1).await?;
    let plain = mongodb::options::ClientOptions::parse(set.uri_as(User::App) + "&serverSelectionTimeoutMS=700").await?;
    let refused = mongodb::Client::with_options(plain)?.list_database_names().await;
    ensure!(refused.is_err(), "a client without TLS got in");
    Ok(())
}

#[tokio::test]
async fn a_small_oplog_rolls_over() -> Result<()> {
    let set = ReplicaSet::start(Options { oplog_mb: 16, ..Options::default() }).await?;
    insert(&set, User::App, 1).await?;
    let (oldest, newest) = set.oplog_window().await?;
    ensure!(oldest < newest);
    set.roll_oplog(newest, Duration::from_secs(60)).await?;
    let (oldest, _) = set.oplog_window().await?;
    ensure!(oldest > newest);
    let names = set.client(User::Root)?.list_database_names().await.context("list databases")?;
    ensure!(!names.contains(&"filler".to_owned()));
    Ok(())
}
