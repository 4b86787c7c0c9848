//! The demo: two real replica sets, a real agent for each, the ratings application's data replicated from `north` to
//! `south` while both agents are killed with -9 and brought back; at the end both clusters are compared byte for byte.
//!
//! Started by `dev/demo`. Exits with 1 when the clusters differ or anything else goes wrong. Leaves nothing running: the
//! test kit's reaper ends the processes even when this one is killed.
#![allow(clippy::disallowed_methods, reason = "a program of its own, outside the agent's supervisor")]

mod control;
mod live;
mod plan;
mod screen;

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use bson::doc;
use clap::Parser;
use farshore_api::{ClusterTime, Position};
use farshore_testkit::compare::{self, Options};
use farshore_testkit::mongo::{self, User};
use farshore_testkit::pair::{Pair, PairOptions, Sets};
use farshore_testkit::workload::{Ratings, Until};
use farshore_testkit::{agent, wait};
use mongodb::Client;

use self::control::Operator;
use self::live::{Absence, count};
use self::screen::{Screen, Tone, bytes, grouped, seconds};

/// The application's database.
const DATABASE: &str = "ratingsdb";
/// Ratings written each second while the agents are killed.
const RATE: u32 = 200;
/// Ratings written each second with `--keep`, so that there is something to see.
const IDLE_RATE: u32 = 10;
/// For what takes a second on an idle machine.
const PATIENCE: Duration = Duration::from_secs(90);

#[derive(Parser)]
#[command(about = "Two sites, two agents, kill -9, and a comparison")]
struct Args {
    /// Length of the live part
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u64).range(5..=3600))]
    seconds: u64,
    /// Leave the sites up until Ctrl-C, and say how to reach them
    #[arg(long)]
    keep: bool,
}

#[tokio::main]
async fn main() -> ExitCode {
    let (args, screen) = (Args::parse(), Screen::detect());
    match demo(&args, screen).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("\n{} {error:#}", screen.paint(Tone::Bad, "The demo failed:"));
            ExitCode::FAILURE
        }
    }
}

async fn demo(args: &Args, screen: Screen) -> Result<()> {
    println!("{}", screen.paint(Tone::Heading, "Farshore: one site's MongoDB replicated to another, exactly once"));
    let mut pair = start(screen).await?;
    let done = replicate(args, screen, &mut pair).await;
    if done.is_err() {
        show_logs(&pair);
    }
    // The agents end before the databases, as in life.
    drop(pair);
    done?;
    what_next(args, screen);
    Ok(())
}

/// The sites, with agents that know each other.
async fn start(screen: Screen) -> Result<Pair> {
    screen.heading("1. Two sites");
    screen.say("Starting a MongoDB replica set with users and passwords at each site, and an agent beside it ...");
    let options = PairOptions { sets: Sets::New(mongo::Options::default()), ..PairOptions::default() };
    let pair = Pair::start(&options).await.context("start the sites")?;
    for site in [&pair.north, &pair.south] {
        let (name, agent) = (site.side.name(), &site.agents[0]);
        screen.figure(name, format!("{}, agent process {} on {}", site.mongo.uri(), agent.pid(), agent.link_address()));
    }
    screen.say("The agents talk gRPC over mutual TLS; certificates come from a CA made for this run.");
    Ok(pair)
}

/// Loads, writes, kills, brings back, compares.
async fn replicate(args: &Args, screen: Screen, pair: &mut Pair) -> Result<()> {
    let operator = Operator::new(&pair.pki)?;
    let north = pair.north.mongo.client(User::App)?;
    wait_streaming(pair, &operator).await?;
    screen.say("The stream north -> south is open.");

    screen.heading("2. The application's data");
    let history = if args.seconds < 20 { 2_000 } else { 20_000 };
    let mut ratings = Ratings::new(1, DATABASE);
    ratings.load(&north, history).await.context("load the data at north")?;
    let history = u64::from(history);
    screen.say(format!("Loaded at north: 4 items, 1 site, {} ratings of fruit smoothies.", grouped(history)));
    screen
        .say(format!("Visitors now rate up to {RATE} smoothies a second at north. Every write waits for a majority."));

    screen.heading("3. Live: agents are killed with -9 and brought back");
    screen.say("behind = ratings at north that are not at south yet; lag = what the agents' control service says");
    let stop = Arc::new(AtomicBool::new(false));
    let writer = write(ratings, north.clone(), RATE, Arc::clone(&stop));
    let live = live::watch(screen, pair, &operator, Duration::from_secs(args.seconds)).await;
    stop.store(true, Ordering::Relaxed);
    let (ratings, written) = writer.await.context("the writer")??;
    let absences = live?;

    screen.heading("4. The comparison");
    screen.say(format!("The writer has stopped after {} ratings. South applies the rest ...", grouped(written)));
    let waited = Instant::now();
    wait_applied(pair, &operator).await?;
    screen.say(format!(
        "South has everything, {} later. Comparing both clusters byte for byte ...",
        seconds(waited.elapsed())
    ));
    let result = compare_sites(pair, &operator, history + written).await?;
    show_result(screen, &result, written, &absences);
    ensure!(result.comparison.is_equal() && result.lost == 0, "the sites are not equal");
    screen.happens(Tone::Good, "equal: nothing lost, nothing applied twice");
    if args.keep {
        keep(screen, pair, &operator, ratings, north).await?;
    }
    Ok(())
}

type Writer = tokio::task::JoinHandle<Result<(Ratings, u64)>>;

fn write(mut ratings: Ratings, client: Client, rate: u32, stop: Arc<AtomicBool>) -> Writer {
    tokio::spawn(async move {
        let written = ratings.run(&client, rate, u64::MAX, Until::Flag(stop)).await?;
        Ok((ratings, written))
    })
}

/// A stream begins at an empty source, so nothing is written before it is open.
async fn wait_streaming(pair: &Pair, operator: &Operator) -> Result<()> {
    pair.wait_ready(PATIENCE).await?;
    wait::until("the stream to open", PATIENCE, || async {
        let stream = operator.stream(&pair.south.agents[0]).await?;
        ensure!(stream.state == "streaming", "{} ({})", stream.state, stream.reason);
        Ok(())
    })
    .await
}

/// Waits until south has applied all that north has done so far.
async fn wait_applied(pair: &Pair, operator: &Operator) -> Result<()> {
    let admin = pair.north.mongo.client(User::Root)?.database("admin");
    let now = admin.run_command(doc! { "ping": 1 }).await?.get_timestamp("operationTime")?;
    let now = Position::through(ClusterTime::new(now.time, now.increment));
    wait::until("south to apply everything", PATIENCE, || async {
        let stream = operator.stream(&pair.south.agents[0]).await?;
        let applied: Option<Position> = stream.applied.map(Into::into);
        ensure!(applied >= Some(now), "{} {}", stream.state, stream.reason);
        Ok(())
    })
    .await
}

struct Outcome {
    comparison: compare::Comparison,
    bytes: u64,
    /// Acknowledged ratings that are not at south.
    lost: u64,
    /// Divergences that south's agent has met since its last start.
    diverged: u64,
}

async fn compare_sites(pair: &Pair, operator: &Operator, acknowledged: u64) -> Result<Outcome> {
    let (north, south) = (pair.north.mongo.client(User::Root)?, pair.south.mongo.client(User::Root)?);
    let comparison = compare::compare(&north, &south, &Options::default()).await.context("compare the sites")?;
    let digest = compare::digest(&south, &Options::default()).await?;
    let lost = acknowledged.abs_diff(count(&south).await?);
    let diverged = operator.stream(&pair.south.agents[0]).await?.diverged;
    Ok(Outcome { comparison, bytes: digest.bytes, lost, diverged })
}

fn show_result(screen: Screen, result: &Outcome, written: u64, absences: &[Absence]) {
    let comparison = &result.comparison;
    let verdict =
        if comparison.is_equal() { screen.paint(Tone::Good, "equal") } else { screen.paint(Tone::Bad, comparison) };
    screen.figure("comparison", verdict);
    screen.figure("documents", format!("{} at both sites, {}", grouped(comparison.documents), bytes(result.bytes)));
    screen.figure("collections", format!("{} with {} indexes", comparison.collections, comparison.indexes));
    screen.figure("written live", format!("{} changes, each acknowledged by north's majority", grouped(written)));
    screen.figure("lost", format!("{} of them; documents that had to be healed: {}", result.lost, result.diverged));
    for absence in absences {
        screen.figure(&format!("agent of {}", absence.side.name()), absence);
    }
}

/// Leaves everything up until Ctrl-C, with a trickle of writes.
async fn keep(screen: Screen, pair: &Pair, operator: &Operator, ratings: Ratings, client: Client) -> Result<()> {
    screen.heading("The sites stay up until Ctrl-C");
    screen.say(format!("{IDLE_RATE} ratings a second go on at north."));
    for site in [&pair.north, &pair.south] {
        let (name, agent) = (site.side.name(), &site.agents[0]);
        screen.figure(&format!("{name}: MongoDB"), site.mongo.uri_as(User::App));
        screen.figure(&format!("{name}: config"), agent.config_file().display());
        screen.figure(&format!("{name}: metrics"), format!("http://{}/metrics", agent.admin_address()));
    }
    let (identity, binary) = (operator.identity(), agent::binary()?);
    let (binary, south, north) =
        (binary.display(), pair.south.agents[0].link_address(), pair.north.agents[0].link_address());
    println!("\n  To paste in another terminal (an operator's certificate):\n");
    println!("export FARSHORE_CERT={}", identity.certificate_file.display());
    println!("export FARSHORE_KEY={}", identity.key_file.display());
    println!("export FARSHORE_CA={}", identity.ca_file.display());
    println!("{binary} status --address {south}");
    println!("{binary} lag --watch --address {south}");
    println!("{binary} outbox stats --address {north}");
    println!("{binary} outbox peek --limit 3 --address {north}");
    println!("kill -9 {}   # the agent of south; the sites stay up, the lag grows", pair.south.agents[0].pid());
    println!("{binary} agent --config {}   # and back", pair.south.agents[0].config_file().display());
    let stop = Arc::new(AtomicBool::new(false));
    let writer = write(ratings, client, IDLE_RATE, Arc::clone(&stop));
    interrupted().await?;
    stop.store(true, Ordering::Relaxed);
    let _ = writer.await.context("the writer")?;
    println!();
    screen.say("Stopping both sites.");
    Ok(())
}

/// Ctrl-C, or a polite end from elsewhere.
async fn interrupted() -> Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate()).context("watch for signals")?;
    tokio::select! {
        done = tokio::signal::ctrl_c() => done.context("watch for Ctrl-C"),
        Some(()) = terminate.recv() => Ok(()),
        else => bail!("signals cannot be watched"),
    }
}

fn what_next(args: &Args, screen: Screen) {
    screen.heading("Nothing is left running. What to try next");
    if !args.keep {
        screen.say("./dev/demo --keep    leaves the sites up: look at them with farshore status, lag and outbox");
    }
    screen.say("./dev/test           runs every test, on real replica sets where that matters");
    screen.say("README.md            connects two replica sets of your own");
}

/// What a person needs to see when something went wrong; the folders are gone afterwards.
fn show_logs(pair: &Pair) {
    for agent in pair.north.agents.iter().chain(&pair.south.agents) {
        let log = agent.log().unwrap_or_else(|error| format!("{error:#}"));
        let lines: Vec<&str> = log.lines().collect();
        println!("\nLast lines of the log of {}'s agent:", agent.config().site());
        for line in &lines[lines.len().saturating_sub(15)..] {
            println!("  {line}");
        }
    }
}
