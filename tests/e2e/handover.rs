//! Agents that are told to stop, under load: they end in time and hand over at once, and nothing is lost or done twice.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use bson::doc;
use farshore_testkit::agent::get;
use farshore_testkit::compare::Options;
use farshore_testkit::pair::{Pair, PairOptions, Side};
use farshore_testkit::wait;
use farshore_testkit::workload::{Counters, Until};
use mongodb::Client;
use tokio::task::JoinHandle;

use crate::support::{client, equal, leader, now_at, pair, site, status, stream, streaming};

/// So long that a lease which is left to run out shows.
const TTL: Duration = Duration::from_secs(30);
/// All stages together may take 25 s; with nothing stuck it is a matter of moments.
const SHUTDOWN: Duration = Duration::from_secs(8);
const DEADLINE: Duration = Duration::from_secs(60);

/// Increments at the source until it is stopped.
pub(crate) struct Load {
    stop: Arc<AtomicBool>,
    work: JoinHandle<Result<(u64, Counters)>>,
}

impl Load {
    pub(crate) fn start(source: &Client, seed: u64) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (source, until) = (source.clone(), Until::Flag(stop.clone()));
        let work = tokio::spawn(async move {
            let mut counters = Counters::new(seed, "counters");
            let done = counters.run(&source, until).await?;
            anyhow::Ok((done, counters))
        });
        Self { stop, work }
    }

    /// Stops, waits until both sites are equal, and checks every counter at the target.
    pub(crate) async fn finish(self, pair: &mut Pair) -> Result<u64> {
        self.stop.store(true, Ordering::Relaxed);
        let (done, counters) = self.work.await??;
        ensure!(done > 0, "there was no load");
        println!("{}", equal(pair, &Options::default()).await?);
        counters.check(&client(pair, Side::South)?).await?;
        Ok(done)
    }
}

/// Everything `/readyz` says until the agent has gone.
fn watch_readiness(address: SocketAddr) -> JoinHandle<Vec<String>> {
    tokio::spawn(async move {
        let mut said: Vec<String> = Vec::new();
        while let Ok(reply) = get(address, "/readyz").await {
            let word = format!("{} {}", reply.status, reply.body.trim());
            if said.last() != Some(&word) {
                said.push(word);
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        said
    })
}

/// Waits until the target has applied something written at the source just now.
async fn flowing(pair: &Pair, source: &Client) -> Result<()> {
    let now = now_at(source).await?;
    wait::until("new changes to be applied", DEADLINE, || async {
        let applied = stream(pair).await?.applied.map(farshore_api::Position::from);
        match applied {
            Some(applied) if applied >= farshore_api::Position::before(now) => Ok(()),
            _ => bail!("applied {applied:?} of {now}"),
        }
    })
    .await
}

async fn handover(side: Side) -> Result<()> {
    let settings = vec![("lease", "ttl", format!("\"{}s\"", TTL.as_secs()))];
    let mut pair = pair(PairOptions { agents: 2, settings, ..PairOptions::default() }).await?;
    let source = client(&mut pair, Side::North)?;
    let load = Load::start(&source, 3);
    flowing(&pair, &source).await?;

    let first = leader(&pair, side).await?;
    let mut old = pair.site(side).agents.remove(first);
    let readiness = watch_readiness(old.admin_address());
    wait::until("readiness to be watched", DEADLINE, || async {
        let reply = old.get("/readyz").await?;
        ensure!(reply.status == 200, "{}", reply.body);
        anyhow::Ok(())
    })
    .await?;
    let told = Instant::now();
    let ended = async {
        let ended = old.term().await?;
        anyhow::Ok((ended, told.elapsed()))
    };
    let taken = async {
        leader(&pair, side).await?;
        anyhow::Ok(told.elapsed())
    };
    let ((ended, stopping), taken) = tokio::try_join!(ended, taken)?;
    flowing(&pair, &source).await?;
    let gap = told.elapsed();
    let said = readiness.await?;
    println!(
        "{}: ended {ended} after {stopping:?}, the other leads after {taken:?}, flows after {gap:?}; {said:?}",
        side.name()
    );
    ensure!(ended.success(), "it ends with {ended}");
    ensure!(stopping < SHUTDOWN, "it took {stopping:?} to stop");
    ensure!(taken < TTL / 5, "the other agent led only after {taken:?}: the lease was not given up");
    ensure!(gap < TTL, "changes flowed again only after {gap:?}");
    ensure!(said.iter().any(|word| word.starts_with("503") && word.contains("stopping")), "{said:?}");
    old.check_log(&[])?;
    let done = load.finish(&mut pair).await?;
    println!("{done} increments");
    pair.check_logs(&[])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_agent_told_to_stop_hands_over_at_once() -> Result<()> {
    handover(Side::North).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_target_agent_told_to_stop_hands_over_at_once() -> Result<()> {
    handover(Side::South).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rolling_restarts_of_all_agents_under_load_lose_nothing() -> Result<()> {
    let mut pair = pair(PairOptions { agents: 2, ..PairOptions::default() }).await?;
    let source = client(&mut pair, Side::North)?;
    source.database("before").collection("c").insert_one(doc! {"_id": 1}).await?;
    let load = Load::start(&source, 4);
    for (side, index) in [(Side::North, 0), (Side::North, 1), (Side::South, 0), (Side::South, 1)] {
        let began = Instant::now();
        let led = status(&pair.pki, &site(&pair, side).agents[index]).await?.leader;
        let agent = &mut pair.site(side).agents[index];
        let ended = agent.term().await?;
        ensure!(ended.success(), "it ends with {ended}");
        agent.restart()?;
        agent.wait_ready(DEADLINE).await?;
        streaming(&pair).await?;
        flowing(&pair, &source).await.with_context(|| format!("after {} {index}", side.name()))?;
        println!("{} {index} (led: {led}): flows again after {:?}", side.name(), began.elapsed());
    }
    let done = load.finish(&mut pair).await?;
    println!("{done} increments");
    pair.check_logs(&[])
}
