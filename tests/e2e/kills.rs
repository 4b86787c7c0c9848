//! The kill matrix: whatever is killed under load, both sites end equal, nothing is applied twice, and no reader of the
//! target ever sees half a transaction.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use farshore_testkit::compare::Options;
use farshore_testkit::mongo;
use farshore_testkit::pair::{Between, Pair, PairOptions, Sets, Side};
use farshore_testkit::sizes;
use farshore_testkit::workload::{ConstantSum, Counters, Profile, Until, Workload};
use mongodb::Client;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use crate::support::{CATCH_UP, caught_up, client, equal, pair};

/// What is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Cell {
    SourceAgent,
    TargetAgent,
    BothAgents,
    SourceStepsDown,
    SourcePrimary,
    TargetStepsDown,
    TargetPrimary,
    LinkCut,
    Everything,
}

const CELLS: [Cell; 9] = [
    Cell::SourceAgent,
    Cell::TargetAgent,
    Cell::TargetPrimary,
    Cell::LinkCut,
    Cell::SourcePrimary,
    Cell::BothAgents,
    Cell::TargetStepsDown,
    Cell::SourceStepsDown,
    Cell::Everything,
];

async fn kill_primary(pair: &mut Pair, side: Side) -> Result<usize> {
    let set = &pair.site(side).mongo;
    let primary = set.wait_primary(CATCH_UP).await?;
    set.kill9(primary)?;
    Ok(primary)
}

async fn restart_member(pair: &mut Pair, side: Side, member: usize) -> Result<()> {
    pair.site(side).mongo.restart(member).await
}

fn kill_agent(pair: &mut Pair, side: Side) -> Result<()> {
    pair.site(side).agents[0].kill9()
}

fn start_agent(pair: &mut Pair, side: Side) -> Result<()> {
    pair.site(side).agents[0].restart()
}

/// Kills, leaves it dead for a moment that differs by seed, and brings it back.
async fn strike(pair: &mut Pair, cell: Cell, away: Duration) -> Result<()> {
    match cell {
        Cell::SourceAgent | Cell::TargetAgent => {
            let side = if cell == Cell::SourceAgent { Side::North } else { Side::South };
            kill_agent(pair, side)?;
            tokio::time::sleep(away).await;
            start_agent(pair, side)?;
        }
        Cell::BothAgents => {
            kill_agent(pair, Side::North)?;
            kill_agent(pair, Side::South)?;
            tokio::time::sleep(away).await;
            start_agent(pair, Side::South)?;
            start_agent(pair, Side::North)?;
        }
        Cell::SourceStepsDown => pair.site(Side::North).mongo.step_down().await?,
        Cell::TargetStepsDown => pair.site(Side::South).mongo.step_down().await?,
        Cell::SourcePrimary | Cell::TargetPrimary => {
            let side = if cell == Cell::SourcePrimary { Side::North } else { Side::South };
            let member = kill_primary(pair, side).await?;
            tokio::time::sleep(away).await;
            restart_member(pair, side, member).await?;
        }
        Cell::LinkCut => {
            pair.link.cut().await?;
            tokio::time::sleep(away).await;
            pair.link.heal().await?;
        }
        Cell::Everything => {
            kill_agent(pair, Side::North)?;
            kill_agent(pair, Side::South)?;
            pair.link.cut().await?;
            let north = kill_primary(pair, Side::North).await?;
            let south = kill_primary(pair, Side::South).await?;
            tokio::time::sleep(away).await;
            restart_member(pair, Side::North, north).await?;
            restart_member(pair, Side::South, south).await?;
            pair.link.heal().await?;
            start_agent(pair, Side::South)?;
            start_agent(pair, Side::North)?;
        }
    }
    Ok(())
}

/// Everything that writes at the source between two comparisons.
struct Writers {
    sum: ConstantSum,
    counters: Counters,
    transfers: u64,
    increments: u64,
    operations: u64,
}

impl Writers {
    /// Writes until told to stop; everything but transfers and counters goes to databases of its own.
    async fn run(mut self, source: Client, seed: u64, prefix: String, stop: Arc<AtomicBool>) -> Result<Self> {
        let until = || Until::Flag(stop.clone());
        // Much of everything but DDL, whose majority writes would be all that two processors get to.
        let profile =
            Profile { crud: 100, transactions: 10, ddl: 2, writers: 1, patience: CATCH_UP, ..Profile::default() };
        let workload = Workload::new(seed, profile, &prefix);
        let Self { sum, counters, .. } = &mut self;
        let (transfers, increments, counts) = tokio::try_join!(
            sum.run(&source, until()),
            counters.run(&source, until()),
            workload.run(&source, until())
        )?;
        self.transfers += transfers;
        self.increments += increments;
        self.operations += counts.operations();
        Ok(self)
    }
}

/// Reads the constant sum at the target all the time; returns how often it was whole.
async fn read(target: Client, seed: u64, stop: Arc<AtomicBool>) -> Result<u64> {
    let watched = ConstantSum::new(seed, "bank", 20);
    let mut reads = 0;
    while !stop.load(Ordering::Relaxed) {
        reads += u64::from(watched.check(&target).await?.is_some());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    Ok(reads)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_is_killed_both_sites_end_equal() -> Result<()> {
    let (seed, kills) = (sizes::seed(), sizes::kills());
    let sets = Sets::New(mongo::Options { members: 3, ..mongo::Options::default() });
    let settings = vec![("lease", "ttl", "\"2s\"".to_owned())];
    let mut pair = pair(PairOptions { sets, between: Between::Tcp, settings, ..PairOptions::default() }).await?;
    let (source, target) = (client(&mut pair, Side::North)?, client(&mut pair, Side::South)?);
    let (sum, counters) = (ConstantSum::new(seed, "bank", 20), Counters::new(seed, "counters"));
    sum.load(&source).await?;
    let mut writers = Writers { sum, counters, transfers: 0, increments: 0, operations: 0 };
    let end = Arc::new(AtomicBool::new(false));
    let reading = tokio::spawn(read(target.clone(), seed, end.clone()));

    let mut rng = StdRng::seed_from_u64(seed);
    let limit = sizes::time_limit().map(|limit| Instant::now() + limit);
    let (mut done, mut documents) = (0, 0);
    while done < kills && limit.is_none_or(|limit| Instant::now() < limit) {
        let cell = CELLS[usize::try_from(done)? % CELLS.len()];
        let kill = || format!("kill {done} ({cell:?}), seed {seed}");
        let stop = Arc::new(AtomicBool::new(false));
        let prefix = format!("app{done}");
        let writing = tokio::spawn(writers.run(source.clone(), seed.wrapping_add(done), prefix.clone(), stop.clone()));
        tokio::time::sleep(Duration::from_millis(rng.random_range(100..800))).await;
        let away = Duration::from_millis(rng.random_range(50..900));
        strike(&mut pair, cell, away).await.with_context(kill)?;
        let back = Instant::now();
        caught_up(&mut pair).await.with_context(kill)?;
        println!("kill {done} {cell:?}: away {away:?}, applying again after {:?}", back.elapsed());
        stop.store(true, Ordering::Relaxed);
        writers = writing.await?.with_context(kill)?;
        documents += equal(&mut pair, &Options::default()).await.with_context(kill)?.documents;
        writers.counters.check(&target).await.with_context(kill)?;
        for name in source.list_database_names().await?.iter().filter(|name| name.starts_with(&prefix)) {
            source.database(name).drop().await?;
        }
        done += 1;
    }

    end.store(true, Ordering::Relaxed);
    let reads = reading.await?.context("the reader of the target")?;
    let Writers { transfers, increments, operations, .. } = writers;
    println!(
        "seed {seed}: {done} kills, after each both sites equal ({documents} documents compared), {operations} operations, \
         {transfers} transfers, {increments} increments, {reads} snapshot reads"
    );
    ensure!(transfers > 0 && increments > 0 && reads > 0, "nothing went on during the kills");
    ensure!(done >= CELLS.len() as u64 || limit.is_some(), "not every cell was struck");
    sizes::report("kills", &serde_json::json!({"done": done, "reads": reads, "increments": increments, "failures": 0}));
    Ok(())
}
