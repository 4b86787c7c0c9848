//! The largest that MongoDB takes: documents of 15.9 MB, deltas of a thousand paths and of many MB, events that do not fit
//! into a reply of the change stream, a transaction of more than 60 MB.

use std::convert::Infallible;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use bson::{Bson, Document, Timestamp, doc};
use farshore_api::ClusterTime;
use farshore_testkit::compare::Options;
use farshore_testkit::mongo;
use farshore_testkit::pair::{Between, Pair, PairOptions, Sets, Side};
use mongodb::error::ErrorKind;
use mongodb::options::ChangeStreamOptions;
use mongodb::{Client, Collection};

use crate::support::{caught_up, client, equal, now_at, pair, stream};

const MB: usize = 1_000_000;
/// `memory.limit` as it is without configuration: it holds for documents of any size too.
const BOUND_MIB: u64 = 256;
/// What a document may still hold beside its long text.
const LARGEST: usize = 15_900_000;

fn big(client: &Client) -> Collection<Document> {
    client.database("large").collection("big")
}

/// Text that zstd does not make small, the same for the same seed.
fn text(seed: u64, length: usize) -> String {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let next = |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        char::from(b'!' + (state % 64) as u8)
    };
    (0..length).map(next).collect()
}

/// A document of `size` bytes with an array of 1,500 small documents.
fn document(id: impl Into<Bson>, seed: u64, size: usize) -> Document {
    let parts: Vec<Document> = (0..1_500).map(|n| doc! {"n": n, "x": 0}).collect();
    let mut document = doc! {"_id": id.into(), "n": 0, "parts": parts, "deep": {"note": "short"}};
    let rest = size.saturating_sub(bson::serialize_to_vec(&document).expect("encode").len() + 20);
    document.insert("text", text(seed, rest));
    document
}

async fn peaks(pair: &Pair) -> Result<(u64, u64)> {
    Ok((pair.north.agents[0].usage()?.peak_rss >> 20, pair.south.agents[0].usage()?.peak_rss >> 20))
}

async fn step(pair: &mut Pair, what: &str) -> Result<()> {
    caught_up(pair).await?;
    let (north, south) = peaks(pair).await?;
    println!("{what}: peak RSS {north} MiB at the source, {south} MiB at the target");
    Ok(())
}

async fn documents_and_deltas(pair: &mut Pair, source: &Client) -> Result<()> {
    let big = big(source);
    for id in 0..2 {
        big.insert_one(document(id, id as u64, LARGEST)).await?;
    }
    step(pair, "two documents of 15.9 MB").await?;
    big.replace_one(doc! {"_id": 0}, document(0, 10, LARGEST)).await?;
    step(pair, "one of them replaced").await?;
    let paths: Document = (0..1_000).map(|n| (format!("parts.{n}.x"), Bson::from(n))).collect();
    big.update_one(doc! {"_id": 1}, doc! {"$set": paths.clone()}).await?;
    let new: Document = (0..1_000).map(|n| (format!("deep.f{}", (n * 7) % 1_000), Bson::from(n))).collect();
    big.update_one(doc! {"_id": 1}, doc! {"$set": new}).await?;
    big.update_one(doc! {"_id": 1}, doc! {"$push": {"parts": {"$each": [], "$slice": 700}}}).await?;
    step(pair, "deltas of a thousand paths").await?;
    let touched =
        doc! {"$map": {"input": "$parts", "in": {"$mergeObjects": ["$$this", {"x": {"$add": ["$$this.n", 1]}}]}}};
    big.update_one(doc! {"_id": 0}, vec![doc! {"$set": {"parts": touched}}]).await?;
    step(pair, "every element of an array of 1,500 touched by a pipeline").await?;
    big.insert_one(document("grows", 20, 6 * MB)).await?;
    big.update_one(doc! {"_id": "grows"}, doc! {"$set": {"top": text(21, 9 * MB)}}).await?;
    big.update_one(doc! {"_id": "grows"}, doc! {"$set": {"top": 1, "deep.note": text(22, 9 * MB)}}).await?;
    big.update_one(doc! {"_id": "grows"}, doc! {"$unset": {"text": 1}, "$set": {"deep.other": text(23, 5 * MB)}})
        .await?;
    step(pair, "deltas of many MB").await
}

/// Checks that a change since `at` does not fit into a reply, and moves `at` behind it.
async fn exceeds(source: &Client, at: &mut ClusterTime) -> Result<()> {
    let mut options = ChangeStreamOptions::default();
    options.start_at_operation_time = Some(Timestamp { time: at.seconds(), increment: at.increment() });
    let read: mongodb::error::Result<Infallible> = async {
        let mut events = big(source).watch().with_options(options).await?;
        loop {
            events.next_if_any().await?;
        }
    }
    .await;
    let Err(error) = read;
    let ErrorKind::Command(told) = &*error.kind else { bail!("{error}") };
    ensure!(told.code == 10334, "{error}");
    *at = now_at(source).await?;
    Ok(())
}

/// An `_id` of 300 KB stands in an event three times: as the key, and in the resume token as hexadecimal digits.
async fn events_over_the_limit(pair: &mut Pair, source: &Client) -> Result<()> {
    let big = big(source);
    let id = |letter: &str| letter.repeat(300_000);
    let mut at = now_at(source).await?;
    big.insert_one(document(id("k"), 30, 16_100_000)).await?;
    exceeds(source, &mut at).await?;
    big.insert_one(document(id("l"), 31, 2 * MB)).await?;
    big.update_one(doc! {"_id": id("l")}, doc! {"$set": {"text": text(32, 15_950_000)}}).await?;
    exceeds(source, &mut at).await?;
    big.replace_one(doc! {"_id": id("k")}, document(id("k"), 33, 16_100_000)).await?;
    exceeds(source, &mut at).await?;
    step(pair, "events over 16 MB").await?;
    let mut session = source.start_session().await?;
    session.start_transaction().await?;
    big.insert_one(doc! {"_id": "before"}).session(&mut session).await?;
    big.replace_one(doc! {"_id": id("k")}, document(id("k"), 34, 16_100_000)).session(&mut session).await?;
    big.update_one(doc! {"_id": "before"}, doc! {"$set": {"then": 1}}).session(&mut session).await?;
    session.commit_transaction().await?;
    exceeds(source, &mut at).await?;
    step(pair, "one of them in a transaction").await
}

async fn transaction(pair: &mut Pair, source: &Client) -> Result<()> {
    let parts: Collection<Document> = source.database("large").collection("parts");
    parts.insert_one(doc! {"_id": "first"}).await?;
    let mut session = source.start_session().await?;
    session.start_transaction().await?;
    for id in 0..16 {
        parts.insert_one(document(id, 100 + id as u64, 4 * MB)).session(&mut session).await?;
    }
    parts
        .update_many(doc! {"_id": {"$in": ["first", 15]}}, doc! {"$set": {"together": true}})
        .session(&mut session)
        .await?;
    session.commit_transaction().await?;
    step(pair, "a transaction of 64 MB").await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_largest_documents_deltas_events_and_transactions_arrive() -> Result<()> {
    // With the smallest cache not even the source takes such transactions.
    let sets = Sets::New(mongo::Options { cache_gb: 2.0, ..mongo::Options::default() });
    let mut pair = pair(PairOptions { sets, ..PairOptions::default() }).await?;
    let source = client(&mut pair, Side::North)?;
    step(&mut pair, "at rest").await?;
    documents_and_deltas(&mut pair, &source).await?;
    events_over_the_limit(&mut pair, &source).await?;
    transaction(&mut pair, &source).await?;
    let comparison = equal(&mut pair, &Options::default()).await?;
    let stream = stream(&pair).await?;
    let (north, south) = peaks(&pair).await?;
    println!(
        "{} changes, {} MB, {comparison}; peak RSS {north} and {south} MiB",
        stream.changes,
        stream.bytes / MB as u64
    );
    ensure!(stream.diverged == 0, "nothing differed: {:?}", stream.diverged_kinds);
    ensure!(north <= BOUND_MIB && south <= BOUND_MIB, "peak RSS {north} and {south} MiB are above {BOUND_MIB} MiB");
    pair.check_logs(&[])
}

/// A frame takes longer there than a silent peer is given.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_link_carries_a_large_document_in_its_own_time() -> Result<()> {
    let mut pair = pair(PairOptions { between: Between::Tcp, ..PairOptions::default() }).await?;
    let source = client(&mut pair, Side::North)?;
    let began = Instant::now();
    pair.link.set_bandwidth(Some(450 << 10));
    source.database("slow").collection("large").insert_one(document(1, 1, 11 * MB)).await?;
    let comparison = equal(&mut pair, &Options::default()).await?;
    let took = began.elapsed();
    println!("11 MB over a slow link after {took:?}: {comparison}");
    ensure!(took > Duration::from_secs(17), "the link was not slow");
    pair.check_logs(&[])
}
