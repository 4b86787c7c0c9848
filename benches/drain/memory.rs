//! Peak memory of both agents with a backlog in the outbox that is far larger than the memory limit.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use bson::doc;
use farshore_testkit::pair::Side;
use rand::SeedableRng;
use rand::rngs::StdRng;

use crate::load::{noise, run};
use crate::report::Memory;
use crate::sites::{Sites, cluster_time};

/// Bytes of a document; a mix of small and large would hide which one costs.
const DOCUMENT: usize = 4 << 10;
/// Documents of a command.
const DOCUMENTS: usize = 500;

/// Writes so many bytes of documents while the target agent is away, then lets it catch up.
pub(crate) async fn measure(sites: &mut Sites, bytes: u64) -> Result<Memory> {
    let source = sites.source()?;
    run(&source, doc! {"create": "large"}).await?;
    sites.settle().await?;
    ensure!(sites.agent(Side::South).term().await?.success(), "the target agent did not end well");
    let mut rng = StdRng::seed_from_u64(1);
    let count = bytes / DOCUMENT as u64;
    let mut end = None;
    for from in (0..count).step_by(DOCUMENTS) {
        let documents = (from..(from + DOCUMENTS as u64).min(count)).map(|id| {
            // Random digits pack to a half, so twice as many stand for the size on disk.
            doc! {"_id": id as i64, "a": noise(&mut rng, DOCUMENT / 32), "b": noise(&mut rng, DOCUMENT / 32)}
        });
        let documents: Vec<_> = documents.collect();
        let reply = run(&source, doc! {"insert": "large", "documents": documents, "writeConcern": {"w": 1}}).await?;
        end = Some(reply.get_timestamp("operationTime")?);
    }
    let end = farshore_api::Position::new(cluster_time(end.expect("at least one command")), 1);
    sites.captured(end).await?;
    let captured = sites.agent(Side::North).usage()?;
    let start = Instant::now();
    sites.agent(Side::South).restart()?;
    let watch = sites.watch(Side::South).await?;
    watch.drained(start, end).await?;
    let took: Duration = start.elapsed();
    let usages = sites.usages()?;
    Ok(Memory {
        backlog: count * DOCUMENT as u64,
        took,
        source_captured: captured.peak_rss,
        source: usages.source.map_or(0, |usage| usage.peak_rss),
        target: usages.target.map_or(0, |usage| usage.peak_rss),
    })
}
