//! A stored record that is damaged on disk is never shipped and never applied: Farshore's own crc finds it, its counter
//! moves, and the rest is read from the source once more.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use bson::doc;
use farshore_api::Position;
use farshore_testkit::compare::Options;
use farshore_testkit::pair::{Between, Pair, PairOptions, Side};
use farshore_testkit::wait;
use farshore_testkit::workload::{Profile, Until, Workload};
use mongodb::Client;
use rocksdb::{DB, IteratorMode, Options as RocksOptions};

use crate::support::{CATCH_UP, client, equal, now_at, pair, status, stream};

/// Which records are damaged.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Which {
    /// One in the middle of those past a position.
    Middle,
    /// All there are.
    All,
}

/// Flips a bit in stored values. RocksDB writes its own checksums anew, so it finds nothing wrong.
fn damage(data: &Path, family: &str, after: Position, which: Which) -> Result<(usize, usize)> {
    let mut options = RocksOptions::default();
    // The files stay as the agent has laid them out.
    options.set_disable_auto_compactions(true);
    let families = DB::list_cf(&options, data)?;
    let families = families.into_iter().map(|name| (name, options.clone()));
    let db = DB::open_cf_with_opts(&options, data, families)?;
    let records = db.cf_handle(family).with_context(|| format!("no column family {family}"))?;
    let entries = db.iterator_cf(records, IteratorMode::Start).collect::<Result<Vec<_>, _>>()?;
    // A key ends with the position where its batch ends.
    let end = |key: &[u8]| key.last_chunk::<12>().map(|end| Position::from_bytes(*end));
    let past: Vec<_> = entries.iter().filter(|(key, _)| end(key).is_some_and(|end| end > after)).collect();
    ensure!(past.len() >= 3, "only {} records past {after}", past.len());
    let chosen = match which {
        Which::Middle => vec![past[past.len() / 2]],
        Which::All => entries.iter().collect(),
    };
    for (key, value) in &chosen {
        let mut value = value.to_vec();
        let at = value.len() - 3;
        value[at] ^= 0x10;
        db.put_cf(records, key, value)?;
    }
    db.flush_cf(records)?;
    Ok((chosen.len(), entries.len()))
}

/// Many small batches: each of these writes is waited for.
async fn write(workload: &Workload, source: &Client) -> Result<()> {
    workload.run(source, Until::Operations(150)).await?;
    for n in 0..20 {
        let statement = doc! {"q": {"_id": 1}, "u": {"$inc": {"n": n}}, "upsert": true};
        let command = doc! {"update": "slow", "updates": [statement], "writeConcern": {"w": "majority"}};
        source.database("app_slow").run_command(command).await?;
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    Ok(())
}

async fn captured(pair: &Pair, source: &Client) -> Result<()> {
    let now = Position::before(now_at(source).await?);
    wait::until("the backlog to be captured", CATCH_UP, || async {
        let status = status(&pair.pki, &pair.north.agents[0]).await?;
        match status.outbox.and_then(|log| log.last).map(Position::from) {
            Some(last) if last >= now => Ok(()),
            last => bail!("captured {last:?} of {now}"),
        }
    })
    .await
}

async fn corrupt_at_source(pair: &Pair) -> Result<u64> {
    let status = status(&pair.pki, &pair.north.agents[0]).await?;
    Ok(status.streams.first().context("a stream")?.corrupt_records)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_record_of_the_outbox_is_captured_again() -> Result<()> {
    let mut pair = pair(PairOptions { between: Between::Tcp, ..PairOptions::default() }).await?;
    let source = client(&mut pair, Side::North)?;
    let workload = Workload::new(21, Profile::default(), "app");
    for which in [Which::Middle, Which::All] {
        write(&workload, &source).await?;
        equal(&mut pair, &Options::default()).await?;
        let applied = stream(&pair).await?.applied.map(Position::from).context("applied")?;
        pair.link.cut().await?;
        write(&workload, &source).await?;
        captured(&pair, &source).await?;
        pair.north.agents[0].kill9()?;
        let (damaged, of) = damage(&pair.north.agents[0].data(), "log.outbox", applied, which)?;
        pair.north.agents[0].restart()?;
        pair.link.heal().await?;
        let shared = &pair;
        wait::until("the damage to be noticed", CATCH_UP, || async {
            let found = corrupt_at_source(shared).await?;
            ensure!(found > 0, "{found} corrupt records");
            anyhow::Ok(())
        })
        .await?;
        let comparison = equal(&mut pair, &Options::default()).await?;
        let found = corrupt_at_source(&pair).await?;
        println!("{which:?}: {damaged} of {of} records damaged, noticed {found} times, {comparison}");
        let stream = stream(&pair).await?;
        ensure!(stream.corrupt_records == 0, "a damaged record was shipped");
        ensure!(stream.diverged == 0, "something was applied that should not be: {:?}", stream.diverged_kinds);
    }
    pair.check_logs(&[])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_record_of_the_inbox_is_received_again() -> Result<()> {
    let settings = vec![("lease", "ttl", "\"60s\"".to_owned())];
    let mut pair = pair(PairOptions { settings, ..PairOptions::default() }).await?;
    let source = client(&mut pair, Side::North)?;
    let workload = Workload::new(22, Profile::default(), "app");
    for which in [Which::Middle, Which::All] {
        write(&workload, &source).await?;
        equal(&mut pair, &Options::default()).await?;
        let applied = stream(&pair).await?.applied.map(Position::from).context("applied")?;
        // What arrives now cannot be applied.
        pair.south.mongo.stop(0)?;
        write(&workload, &source).await?;
        let now = Position::before(now_at(&source).await?);
        let shared = &pair;
        let received = wait::until("the backlog to be received", CATCH_UP, || async {
            match stream(shared).await?.received.map(Position::from) {
                Some(received) if received >= now => Ok(()),
                received => bail!("received {received:?} of {now}"),
            }
        });
        received.await?;
        pair.south.agents[0].kill9()?;
        let (damaged, of) = damage(&pair.south.agents[0].data(), "log.inbox.north", applied, which)?;
        pair.south.mongo.cont(0)?;
        pair.south.agents[0].restart()?;
        let comparison = equal(&mut pair, &Options::default()).await?;
        let stream = stream(&pair).await?;
        println!(
            "{which:?}: {damaged} of {of} records damaged, noticed {} times, {comparison}",
            stream.corrupt_records
        );
        ensure!(stream.corrupt_records > 0, "nothing was noticed");
        ensure!(stream.diverged == 0, "something was applied that should not be: {:?}", stream.diverged_kinds);
    }
    pair.check_logs(&[])
}
