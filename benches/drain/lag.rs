//! How long after its intended time a write is seen, with a writer that never waits for the answer before the next one:
//! a stall counts for every write it delays, not once (no coordinated omission).

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bson::{Document, RawDocumentBuf, doc};
use farshore_testkit::mongo::{ReplicaSet, User};
use futures::StreamExt as _;
use hdrhistogram::Histogram;
use mongodb::options::WriteConcern;
use mongodb::{Client, Collection};
use tokio::sync::Barrier;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::load::{DB, run};
use crate::report::Lag;
use crate::sites::Sites;

const COLLECTION: &str = "lag";
/// Writes before the measured ones: connections, plans and caches warm up.
const WARM: Duration = Duration::from_secs(2);
/// How long the last write may take to be seen.
const LINGER: Duration = Duration::from_secs(30);
/// Between two looks of the polling probe.
const LOOK: Duration = Duration::from_millis(1);

/// The schedule, shared by the writer and the probes: write `n` is meant for `start + n * interval`.
#[derive(Clone, Copy)]
struct Schedule {
    start: Instant,
    interval: Duration,
    warm: u64,
    count: u64,
}

impl Schedule {
    fn due(&self, n: u64) -> Instant {
        self.start + self.interval * n as u32
    }

    fn end(&self) -> Instant {
        self.due(self.count) + LINGER
    }
}

/// What a probe saw of the writes.
struct Seen {
    schedule: Schedule,
    seen: Vec<bool>,
    missing: u64,
    lags: Histogram<u64>,
}

impl Seen {
    fn new(schedule: Schedule) -> Result<Self> {
        let lags = Histogram::new_with_bounds(1, 600_000_000, 3)?;
        Ok(Self { schedule, seen: vec![false; schedule.count as usize], missing: schedule.count, lags })
    }

    fn see(&mut self, n: i64, now: Instant) {
        let Some(seen) = self.seen.get_mut(n as usize).filter(|seen| !**seen) else { return };
        *seen = true;
        self.missing -= 1;
        if n as u64 >= self.schedule.warm {
            let lag = now.saturating_duration_since(self.schedule.due(n as u64));
            self.lags.saturating_record(lag.as_micros() as u64);
        }
    }
}

/// Writes at a fixed rate and observes source and target.
pub(crate) async fn measure(sites: &mut Sites, rate: u64, time: Duration) -> Result<Lag> {
    run(&sites.source()?, doc! {"create": COLLECTION}).await?;
    sites.settle().await?;
    let (north, south) = (&sites.pair.north.mongo, &sites.pair.south.mongo);
    let warm = rate * WARM.as_secs();
    let schedule = Schedule {
        start: Instant::now() + Duration::from_secs(1),
        interval: Duration::from_secs(1) / rate as u32,
        warm,
        count: warm + rate * time.as_secs(),
    };
    // Streams open before the first write.
    let ready = Arc::new(Barrier::new(3));
    let source = tokio::spawn(tail(client(north).await?, schedule, ready.clone()));
    let target = tokio::spawn(tail(client(south).await?, schedule, ready.clone()));
    let polled = tokio::spawn(poll(client(south).await?, schedule));
    ready.wait().await;
    ensure!(Instant::now() < schedule.start, "the probes took too long to start");
    let acknowledged = write(client(north).await?, schedule).await?;
    Ok(Lag {
        rate,
        seconds: time.as_secs(),
        acknowledged,
        source: source.await??,
        target: target.await??,
        visible: polled.await??,
    })
}

/// A driver of its own with connections for all writes that may be under way.
async fn client(set: &ReplicaSet) -> Result<Client> {
    let uri = format!("{}&maxPoolSize=64", set.uri_as(User::Root));
    Client::with_uri_str(uri).await.context("make a client")
}

/// Returns how long after their intended time writes were acknowledged.
async fn write(client: Client, schedule: Schedule) -> Result<Histogram<u64>> {
    let collection: Collection<Document> = client.database(DB).collection(COLLECTION);
    let mut seen = Seen::new(schedule)?;
    let mut writes = JoinSet::new();
    for n in 0..schedule.count {
        tokio::time::sleep_until(schedule.due(n)).await;
        let collection = collection.clone();
        writes.spawn(async move {
            let document = doc! {"_id": n as i64, "text": "x".repeat(400)};
            collection.insert_one(document).write_concern(WriteConcern::majority()).await?;
            Ok::<_, mongodb::error::Error>((n, Instant::now()))
        });
        while let Some(done) = writes.try_join_next() {
            let (n, at) = done??;
            seen.see(n as i64, at);
        }
    }
    while let Some(done) = writes.join_next().await {
        let (n, at) = done??;
        seen.see(n as i64, at);
    }
    Ok(seen.lags)
}

/// Observes through a change stream: what a majority has.
async fn tail(client: Client, schedule: Schedule, ready: Arc<Barrier>) -> Result<Histogram<u64>> {
    let collection: Collection<RawDocumentBuf> = client.database(DB).collection(COLLECTION);
    let pipeline = [doc! {"$project": {"documentKey": 1}}];
    let mut stream = collection.watch().pipeline(pipeline).await?.with_type::<Document>();
    ready.wait().await;
    let mut seen = Seen::new(schedule)?;
    while seen.missing > 0 {
        let event = tokio::time::timeout_at(schedule.end(), stream.next()).await;
        let event = event.with_context(|| format!("{} writes did not arrive", seen.missing))?;
        let now = Instant::now();
        let event = event.context("the change stream ended")??;
        seen.see(event.get_document("documentKey")?.get_i64("_id")?, now);
    }
    Ok(seen.lags)
}

/// Observes by asking again and again: what a reader sees.
async fn poll(client: Client, schedule: Schedule) -> Result<Histogram<u64>> {
    let collection: Collection<Document> = client.database(DB).collection(COLLECTION);
    let mut seen = Seen::new(schedule)?;
    let mut lowest = 0;
    while seen.missing > 0 {
        ensure!(Instant::now() < schedule.end(), "{} writes did not arrive", seen.missing);
        while seen.seen.get(lowest).is_some_and(|seen| *seen) {
            lowest += 1;
        }
        let unseen = doc! {"_id": {"$gte": lowest as i64}};
        let mut found = collection.find(unseen).projection(doc! {"_id": 1}).batch_size(10_000).await?;
        let now = Instant::now();
        while let Some(document) = found.next().await {
            seen.see(document?.get_i64("_id")?, now);
        }
        tokio::time::sleep(LOOK).await;
    }
    Ok(seen.lags)
}
