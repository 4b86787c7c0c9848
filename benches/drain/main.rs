//! End to end, on real servers: how fast a backlog drains, at what cost, against a MongoDB secondary that catches up
//! with the same backlog in the same run; how far the target lags behind an open-loop writer; and how much memory the
//! agents take with a backlog much larger than it.
//!
//! ```text
//! cargo bench --bench drain -- [--quick] [--changes N] [--kinds inserts,set] [--only drain,lag,rss] [--json FILE]
//! ```
//!
//! The method and what the figures mean: `docs/PERFORMANCE.md`.
#![allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "measures real processes in real time, outside the agent's supervisor"
)]

mod anchor;
mod lag;
mod load;
mod memory;
mod report;
mod sites;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Parser, ValueEnum};

use crate::anchor::Anchor;
use crate::load::{Kind, Load};
use crate::report::{Drains, Report};
use crate::sites::{Mode, Sites};

/// How fast a backlog drains, how far the target lags, how much memory the agents take.
#[derive(Parser)]
struct Args {
    /// Changes of each backlog [default: 200000, with --quick 50000].
    #[arg(long)]
    changes: Option<u64>,
    /// One round instead of the best of three, and less of everything.
    #[arg(long)]
    quick: bool,
    /// Backlogs of these kinds only.
    #[arg(long, value_enum, value_delimiter = ',')]
    kinds: Vec<Kind>,
    /// These parts only.
    #[arg(long, value_enum, value_delimiter = ',', default_value = "drain,lag,rss")]
    only: Vec<Part>,
    /// Writes per second of the lag part.
    #[arg(long, default_value_t = 1_000)]
    rate: u64,
    /// Megabytes of the memory part's backlog.
    #[arg(long, default_value_t = 2_048)]
    backlog_mb: u64,
    /// Also write the figures to this file.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Given by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    Drain,
    Lag,
    Rss,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(run(args))
}

async fn run(args: Args) -> Result<()> {
    let changes = args.changes.unwrap_or(if args.quick { 50_000 } else { 200_000 });
    let rounds = if args.quick { 1 } else { 3 };
    let mut report = Report::new(changes, rounds);
    if args.only.contains(&Part::Drain) {
        let kinds = if args.kinds.is_empty() { Kind::value_variants().to_vec() } else { args.kinds.clone() };
        drains(&kinds, changes, rounds, &mut report).await?;
    }
    if args.only.contains(&Part::Lag) {
        eprintln!("lag: {} majority writes/s", args.rate);
        let mut sites = Sites::start().await?;
        let time = Duration::from_secs(if args.quick { 10 } else { 30 });
        report.lag = Some(lag::measure(&mut sites, args.rate, time).await.context("measure the lag")?);
    }
    if args.only.contains(&Part::Rss) {
        let mb = if args.quick { args.backlog_mb / 8 } else { args.backlog_mb };
        eprintln!("memory: a backlog of {mb} MB");
        let mut sites = Sites::start().await?;
        report.memory = Some(memory::measure(&mut sites, mb << 20).await.context("measure memory")?);
    }
    println!("{report}");
    if let Some(file) = &args.json {
        let text = serde_json::to_string_pretty(&report.json())?;
        std::fs::write(file, text + "\n").with_context(|| format!("write {}", file.display()))?;
    }
    Ok(())
}

/// Every kind: the secondary and the agents in turn, so that both see the same machine.
async fn drains(kinds: &[Kind], changes: u64, rounds: u32, report: &mut Report) -> Result<()> {
    let anchor = Anchor::start().await?;
    let mut sites = Sites::start().await?;
    for kind in kinds {
        let mut drains = Drains::new(*kind);
        for round in 0..rounds {
            let load = |name: &str| Load::new(*kind, &format!("{}_{name}_{round}", kind.name()), changes);
            let secondary = anchor.drain(&load("anchor")).await.context("the secondary catches up")?;
            eprintln!("{:8} secondary {secondary}", kind.name());
            let both = sites.drain(&load("both"), Mode::BothStopped).await.context("drain with both agents stopped")?;
            eprintln!("{:8} both      {both}", kind.name());
            let filled = sites.drain(&load("filled"), Mode::Prefilled).await.context("drain a prefilled outbox")?;
            eprintln!("{:8} prefilled {filled}", kind.name());
            drains.round(secondary, both, filled);
        }
        report.drains.push(drains);
    }
    Ok(())
}
