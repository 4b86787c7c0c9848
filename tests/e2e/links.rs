//! Links that are cut, and links that stand still in one direction with every connection open.

use std::time::Duration;

use anyhow::{Result, ensure};
use bson::{Document, doc};
use farshore_api::ClusterTime;
use farshore_testkit::compare::Options;
use farshore_testkit::pair::{Between, Pair, PairOptions, Side};
use farshore_testkit::wait;

use crate::support::{client, equal, now_at, pair, site};

const DEADLINE: Duration = Duration::from_secs(60);
/// An agent tries again at least this often while its link is away.
const ATTEMPTS: u32 = 5;

/// How often each agent has said this.
fn said(pair: &Pair, what: &str) -> Result<[usize; 2]> {
    let count = |side| {
        let log = site(pair, side).agents[0].log()?;
        anyhow::Ok(log.lines().filter(|line| line.contains(what)).count())
    };
    Ok([count(Side::North)?, count(Side::South)?])
}

async fn heard(pair: &Pair, what: &str, times: usize) -> Result<()> {
    wait::until(&format!("'{what}'"), DEADLINE, || async {
        let said = said(pair, what)?;
        ensure!(said == [times, times], "{what}: {said:?}");
        Ok(())
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_link_that_goes_away_is_told_once_and_loses_nothing() -> Result<()> {
    let mut pair = pair(PairOptions { between: Between::Tcp, ..PairOptions::default() }).await?;
    let source = client(&mut pair, Side::North)?;
    let items = source.database("shop").collection::<Document>("items");
    let mut documents = 0;
    for (round, away) in ["cut", "held towards south", "held towards north"].into_iter().enumerate() {
        match away {
            "cut" => pair.link.cut().await?,
            "held towards south" => pair.link.hold(Side::South),
            _ => pair.link.hold(Side::North),
        }
        items.insert_many((0..100).map(|id| doc! {"_id": id + documents})).await?;
        heard(&pair, "link is down", round + 1).await?;
        let since = now_at(&source).await?;
        wait::until("more attempts", DEADLINE, || async {
            let now = now_at(&source).await?;
            ensure!(now > ClusterTime::new(since.seconds() + ATTEMPTS, 0), "{now} is too soon after {since}");
            Ok(())
        })
        .await?;
        pair.link.heal().await?;
        documents += 100;
        let comparison = equal(&mut pair, &Options::default()).await?;
        heard(&pair, "link is up again", round + 1).await?;
        ensure!(said(&pair, "link is down")? == [round + 1; 2], "{away}: said more than once");
        println!("{away}: {comparison}");
    }
    pair.check_logs(&[])
}
