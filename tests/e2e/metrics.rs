//! The metrics are true: each one that is exported moves when what it tells of happens, and the two sites agree.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use bson::{Document, doc};
use farshore_testkit::agent::{AgentProcess, Metrics, get};
use farshore_testkit::compare::Options;
use farshore_testkit::pair::{Pair, PairOptions, Side};
use farshore_testkit::wait;
use farshore_testkit::workload::{Profile, Until, Workload};
use futures::TryStreamExt as _;
use mongodb::Client;

use crate::support::{caught_up, client, equal, pair, streaming};

const DEADLINE: Duration = Duration::from_secs(60);
const STREAM: (&str, &str) = ("stream", "north/south");

/// Families that this run does not move, with the reason; `src/admin/{counted,observed}.rs` and `src/link/tests/` test
/// that they show what they are given.
const UNMOVED: &[(&str, &str)] = &[
    ("farshore_build", "the build stays the same"),
    ("farshore_site_info", "site, role and group stay the same"),
    ("farshore_outbox_capacity_bytes", "the limit is configured"),
    ("farshore_peer_certificate_expiry_timestamp_seconds", "no certificate is renewed"),
    ("farshore_corrupt_records", "nothing is damaged"),
    ("farshore_rejects", "nobody is refused"),
    ("farshore_leader", "may be gained before the first scrape"),
];

/// What was seen of one agent.
#[derive(Default)]
struct Seen {
    /// Newest values of gauges.
    standing: BTreeMap<String, f64>,
    /// Newest values of what only grows, since the agent was started.
    growing: BTreeMap<String, f64>,
    families: BTreeSet<String>,
    moved: BTreeSet<String>,
    backwards: Vec<String>,
    scrapes: u64,
}

impl Seen {
    fn note(&mut self, metrics: &Metrics, restarted: bool) {
        if restarted {
            self.growing.clear();
        }
        self.families.extend(metrics.families().keys().cloned());
        self.scrapes += 1;
        for (sample, now) in metrics.samples() {
            let (family, kind) = metrics.family_of(sample).expect("every sample has a type");
            let moved = if matches!(kind, "counter" | "histogram") {
                let before = self.growing.insert(sample.clone(), *now).unwrap_or(0.0);
                if *now < before {
                    self.backwards.push(format!("{sample}: {before}, then {now}"));
                }
                *now > before
            } else {
                self.standing.insert(sample.clone(), *now).is_some_and(|before| before != *now)
            };
            if moved {
                self.moved.insert(family.to_owned());
            }
        }
    }
}

/// Scrapes an agent all the time.
#[derive(Clone)]
struct Watch {
    seen: Arc<Mutex<Seen>>,
    /// Counts the starts of the agent; counters begin again at each.
    starts: Arc<AtomicU64>,
    task: Arc<tokio::task::JoinHandle<()>>,
}

impl Watch {
    fn start(agent: &AgentProcess) -> Self {
        let (seen, starts) = (Arc::<Mutex<Seen>>::default(), Arc::<AtomicU64>::default());
        let task = tokio::spawn(scrape(agent.admin_address(), seen.clone(), starts.clone()));
        Self { seen, starts, task: Arc::new(task) }
    }

    /// Stops the agent and starts it again.
    async fn restart(&self, agent: &mut AgentProcess) -> Result<()> {
        agent.term().await?;
        self.starts.fetch_add(1, Ordering::SeqCst);
        agent.restart()
    }
}

async fn scrape(address: SocketAddr, seen: Arc<Mutex<Seen>>, starts: Arc<AtomicU64>) {
    let mut known = 0;
    loop {
        let start = starts.load(Ordering::SeqCst);
        let reply = tokio::time::timeout(Duration::from_secs(2), get(address, "/metrics")).await;
        if let Ok(Ok(reply)) = reply
            && starts.load(Ordering::SeqCst) == start
        {
            let metrics = Metrics::parse(&reply.body).expect("well formed");
            seen.lock().expect("no holder panics").note(&metrics, start != known);
            known = start;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Changes by what they do, and their bytes, as a stage counted them.
fn flow(metrics: &Metrics, stage: &str) -> BTreeMap<&'static str, f64> {
    let ops = ["insert", "update", "replace", "delete", "ddl"];
    let count = |op| metrics.total_where("farshore_changes_total", &[("stage", stage), ("op", op)]).unwrap_or(f64::NAN);
    let bytes = metrics.total_where("farshore_bytes_total", &[("stage", stage)]).unwrap_or(f64::NAN);
    ops.into_iter().map(|op| (op, count(op))).chain([("bytes", bytes)]).collect()
}

fn sum(a: &BTreeMap<&'static str, f64>, b: &BTreeMap<&'static str, f64>) -> BTreeMap<&'static str, f64> {
    a.iter().map(|(key, value)| (*key, value + b[key])).collect()
}

/// Metrics of both agents when everything is applied.
async fn at_rest(pair: &mut Pair) -> Result<(Metrics, Metrics)> {
    caught_up(pair).await?;
    Ok((pair.north.agents[0].metrics().await?, pair.south.agents[0].metrics().await?))
}

fn value(metrics: &Metrics, name: &str, labels: &[(&str, &str)]) -> Result<f64> {
    metrics.total_where(name, labels).with_context(|| format!("{name} {labels:?} is not exported"))
}

/// A document is deleted at the target and then updated at the source; another is at the target before it is inserted.
async fn diverge(source: &Client, target: &Client) -> Result<()> {
    let (here, there) = (source.database("odd").collection("c"), target.database("odd").collection::<Document>("c"));
    here.insert_one(doc! {"_id": 1, "v": 1}).await?;
    wait::until("the document to arrive", DEADLINE, || async {
        ensure!(there.find_one(doc! {"_id": 1}).await?.is_some(), "it is not there");
        anyhow::Ok(())
    })
    .await?;
    there.delete_one(doc! {"_id": 1}).await?;
    there.insert_one(doc! {"_id": 2, "v": "of nobody"}).await?;
    here.update_one(doc! {"_id": 1}, doc! {"$set": {"v": 2}}).await?;
    here.insert_one(doc! {"_id": 2, "v": 3}).await?;
    Ok(())
}

/// Ends the change stream's cursor, as a server does that is short of memory.
async fn kill_cursor(source: &Client) -> Result<()> {
    let admin = source.database("admin");
    let running = vec![doc! {"$currentOp": {"allUsers": true, "idleCursors": true}}];
    let found: Vec<Document> = admin.aggregate(running).await?.try_collect().await?;
    let tails = found.iter().filter_map(|op| op.get_document("cursor").ok());
    let tails = tails.filter(|cursor| cursor.get_bool("tailable").unwrap_or(false));
    let ids: Vec<i64> = tails.filter_map(|cursor| cursor.get_i64("cursorId").ok()).collect();
    ensure!(!ids.is_empty(), "no change stream among {} operations", found.len());
    admin.run_command(doc! {"killCursors": "$cmd.aggregate", "cursors": ids}).await?;
    Ok(())
}

/// While the source's agent stands still, the target's view of what may be lost grows; afterwards it is small again.
async fn stopped_source(pair: &Pair) -> Result<()> {
    let exposure = async || {
        let metrics = pair.south.agents[0].metrics().await?;
        value(&metrics, "farshore_data_loss_exposure_seconds", &[STREAM])
    };
    let source = &pair.north.agents[0];
    let before = exposure().await?;
    source.stop()?;
    let began = Instant::now();
    let mut grown = Vec::new();
    for wanted in [4.0, 5.0, 6.0] {
        let found = wait::until("the exposure to grow", DEADLINE, || async {
            let now = exposure().await?;
            ensure!(now >= wanted, "{now} s");
            anyhow::Ok(now)
        });
        grown.push((found.await, began.elapsed().as_secs_f64()));
    }
    source.cont()?;
    for (found, elapsed) in grown {
        let found = found?;
        // Cluster times have seconds, so a value may be one off either way, besides what was there before.
        ensure!(found <= elapsed + before + 2.0, "{found} s of exposure after {elapsed} s");
    }
    wait::until("the exposure to shrink", DEADLINE, || async {
        let now = exposure().await?;
        ensure!(now <= 2.0, "{now} s");
        anyhow::Ok(())
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_metric_moves_and_the_sites_agree() -> Result<()> {
    let began = Instant::now();
    let mut pair = pair(PairOptions::default()).await?;
    let watches = [Watch::start(&pair.north.agents[0]), Watch::start(&pair.south.agents[0])];
    let (source, target) = (client(&mut pair, Side::North)?, client(&mut pair, Side::South)?);
    let workload = Workload::new(21, Profile { transactions: 15, ..Profile::default() }, "app");
    workload.run(&source, Until::Operations(600)).await?;
    diverge(&source, &target).await?;
    let (north, south) = at_rest(&mut pair).await?;
    assert_eq!(flow(&north, "capture"), flow(&south, "apply"), "what was captured is what was applied");
    for kind in ["missing", "exists"] {
        assert_eq!(value(&south, "farshore_divergences_total", &[STREAM, ("kind", kind)])?, 1.0, "{kind}");
    }
    assert_eq!(value(&south, "farshore_healed_total", &[STREAM])?, 2.0);
    assert_eq!(value(&south, "farshore_divergences_total", &[STREAM, ("kind", "unique")])?, 0.0);
    let samples = value(&south, "farshore_commit_to_apply_seconds_count", &[STREAM])?;
    let mean = value(&south, "farshore_commit_to_apply_seconds_sum", &[STREAM])? / samples;
    ensure!(samples > 0.0 && mean > 0.0 && mean < began.elapsed().as_secs_f64(), "{samples} samples, mean {mean} s");

    // What the first process applied is gone with it; nothing is on its way now.
    let applied = flow(&south, "apply");
    watches[1].restart(&mut pair.south.agents[0]).await?;
    streaming(&pair).await?;
    kill_cursor(&source).await?;
    source.database("odd").create_collection("ring").capped(true).size(4096).await?;
    let ring = source.database("odd").collection("ring");
    ring.insert_many((0..5).map(|n| doc! {"_id": n})).await?;
    workload.run(&source, Until::Operations(300)).await?;
    let (north, south) = at_rest(&mut pair).await?;
    let left_out = value(&south, "farshore_left_out_changes_total", &[STREAM])?;
    let (mut captured, mut applied) = (flow(&north, "capture"), sum(&applied, &flow(&south, "apply")));
    assert_eq!(left_out, 5.0);
    applied.entry("insert").and_modify(|inserts| *inserts += left_out);
    ensure!(captured.remove("bytes") > applied.remove("bytes"), "what is left out has bytes, too");
    assert_eq!(captured, applied, "what was captured is what both processes applied or left out");
    stopped_source(&pair).await?;
    let comparison = equal(&mut pair, &Options { skip: vec!["odd.ring".into()], ..Options::default() }).await?;
    println!("seed 21: captured {captured:?}, mean {mean:.3} s from commit to apply\n{comparison}");
    verdict(&watches)
}

/// Every family moved at one of the agents or is among the exceptions, and no counter went back.
fn verdict(watches: &[Watch; 2]) -> Result<()> {
    let (mut families, mut moved) = (BTreeSet::new(), BTreeSet::new());
    for watch in watches {
        watch.task.abort();
        let seen = watch.seen.lock().expect("no holder panics");
        ensure!(seen.backwards.is_empty(), "counters went back: {:#?}", seen.backwards);
        ensure!(seen.scrapes > 20, "{} scrapes", seen.scrapes);
        families.extend(seen.families.clone());
        moved.extend(seen.moved.clone());
    }
    let excused = |family: &&String| UNMOVED.iter().any(|(name, _)| name == family);
    let still: Vec<_> = families.difference(&moved).filter(|family| !excused(family)).collect();
    ensure!(still.is_empty(), "exported and never moved: {still:#?}");
    let gone: Vec<_> = UNMOVED.iter().filter(|(name, _)| !families.contains(*name)).collect();
    ensure!(gone.is_empty(), "excused and not exported: {gone:#?}");
    let still: Vec<_> = families.difference(&moved).collect();
    println!("{} families, {} moved; not so {still:?}", families.len(), moved.len());
    Ok(())
}
