//! A target agent that is killed leaves transactions open. Its successor ends them before it goes on, instead of waiting for
//! the server to give them up after a minute.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use bson::{Bson, Document, doc};
use farshore_api::Position;
use farshore_testkit::compare::Options;
use farshore_testkit::pair::{Pair, PairOptions, Side};
use farshore_testkit::wait;
use farshore_testkit::workload::{Counters, Profile, Until, Workload};
use futures::TryStreamExt as _;
use mongodb::Client;

use crate::support::{CATCH_UP, client, equal, now_at, pair, stream};

const ROUNDS: usize = 5;
/// The promise.
const PROMISED: Duration = Duration::from_secs(5);
/// Tests share their processors with others.
const PATIENCE: u32 = 5;

/// Sessions among `of` that have a transaction open, and when it was begun.
async fn open_transactions(target: &Client, of: &[Bson]) -> Result<Vec<(Bson, Bson)>> {
    let sessions = vec![
        doc! {"$currentOp": {"allUsers": true, "idleSessions": true}},
        doc! {"$match": {"transaction": {"$exists": true}, "lsid.id": {"$in": of}}},
    ];
    let mut cursor = target.database("admin").aggregate(sessions).await?;
    let mut found = Vec::new();
    while let Some(operation) = cursor.try_next().await? {
        let id = operation.get_document("lsid")?.get("id").context("an id")?.clone();
        let parameters = operation.get_document("transaction")?.get_document("parameters")?;
        found.push((id, parameters.get("txnNumber").context("a number")?.clone()));
    }
    Ok(found)
}

/// The sessions the target's agent has on record.
async fn sessions(target: &Client) -> Result<Vec<Bson>> {
    let streams = target.database("farshore").collection::<Document>("streams");
    let stream = streams.find_one(doc! {"_id": "north/south"}).await?.context("the stream's record")?;
    let ids = stream.get_array("sessions")?.iter().filter_map(|session| session.as_document()?.get("id").cloned());
    Ok(ids.collect())
}

/// Stops the agent at a moment when it has a transaction open.
async fn stop_within_a_transaction(pair: &Pair, target: &Client) -> Result<Vec<(Bson, Bson)>> {
    let own = sessions(target).await?;
    wait::until("the agent to be caught within a transaction", CATCH_UP, || async {
        pair.south.agents[0].stop()?;
        // What it had sent may still be under way.
        let mut open = open_transactions(target, &own).await?;
        if !open.is_empty() {
            tokio::time::sleep(Duration::from_millis(50)).await;
            open = open_transactions(target, &own).await?;
        }
        if open.is_empty() {
            pair.south.agents[0].cont()?;
            bail!("none is open");
        }
        Ok(open)
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn applying_goes_on_within_seconds_of_a_killed_target_agent() -> Result<()> {
    let mut pair = pair(PairOptions::default()).await?;
    let (source, target) = (client(&mut pair, Side::North)?, client(&mut pair, Side::South)?);
    let stop = Arc::new(AtomicBool::new(false));
    let workload = Workload::new(31, Profile { transactions: 20, ..Profile::without_ddl() }, "app");
    let mut counters = Counters::new(31, "counters");
    let (for_workload, for_counters) = (source.clone(), source.clone());
    let (until_workload, until_counters) = (Until::Flag(stop.clone()), Until::Flag(stop.clone()));
    let writing = tokio::spawn(async move { workload.run(&for_workload, until_workload).await });
    let counting = tokio::spawn(async move {
        let done = counters.run(&for_counters, until_counters).await;
        done.map(|done| (done, counters))
    });
    let mut times = Vec::new();
    let mut orphans = 0;
    for _ in 0..ROUNDS {
        let open = stop_within_a_transaction(&pair, &target).await?;
        pair.south.agents[0].kill9()?;
        let left = open_transactions(&target, &open.iter().map(|(id, _)| id.clone()).collect::<Vec<_>>()).await?;
        ensure!(left == open, "killing the agent left {left:?} of {open:?}");
        orphans += open.len();
        let started = Instant::now();
        pair.south.agents[0].restart()?;
        let now = Position::before(now_at(&source).await?);
        let shared = &pair;
        wait::until("applying to go on", CATCH_UP, || async {
            match stream(shared).await?.applied.map(Position::from) {
                Some(applied) if applied >= now => Ok(()),
                applied => bail!("applied {applied:?} of {now}"),
            }
        })
        .await?;
        times.push(started.elapsed());
        let left = open_transactions(&target, &open.iter().map(|(id, _)| id.clone()).collect::<Vec<_>>()).await?;
        ensure!(left.iter().all(|session| !open.contains(session)), "still open: {left:?}");
    }
    stop.store(true, Ordering::Relaxed);
    let counts = writing.await??;
    let (increments, counters) = counting.await??;
    println!("applying again after {times:?}; {orphans} orphaned transactions");
    let comparison = equal(&mut pair, &Options::default()).await?;
    counters.check(&target).await?;
    println!("{} operations, {increments} increments, {comparison}", counts.operations());
    ensure!(times.iter().all(|time| *time <= PROMISED * PATIENCE), "too late: {times:?}");
    pair.check_logs(&[])
}
